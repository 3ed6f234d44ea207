--
-- lease_settle: a hold ends by being spent, wholly or in part.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

SELECT available FROM lease_topup('settle:1', 'tokens', 100);

-- NULL settles the whole hold.
SELECT reservation_id FROM lease_reserve('settle:1', 'tokens', 10) \gset
SELECT reservation_id = :reservation_id AS same, reserved, consumed, refunded, shortfall, available, replayed
  FROM lease_settle('settle:1', :reservation_id);

-- Less: what is not spent is available again.
SELECT reservation_id FROM lease_reserve('settle:1', 'tokens', 10) \gset
SELECT reserved, consumed, refunded, shortfall, available, replayed
  FROM lease_settle('settle:1', :reservation_id, 4, metadata => '{"tokens": 4}');
SELECT kind, amount, available, metadata FROM ledger
 WHERE account = 'settle:1' AND reservation_id = :reservation_id ORDER BY entry_id;

-- Settling again with the same arguments replays: the first result, also of
-- available (rule 4).
SELECT available FROM lease_consume('settle:1', 'tokens', 6);
SELECT reserved, consumed, refunded, shortfall, available, replayed
  FROM lease_settle('settle:1', :reservation_id, 4.0, metadata => '{"tokens": 4}');
SELECT changed_by(format($$ SELECT lease_settle('settle:1', %s, 4, metadata => '{"tokens": 4}') $$, :reservation_id));

-- With any other argument it is LC005.
SELECT * FROM refused(format($$ SELECT lease_settle('settle:1', %s, 5, metadata => '{"tokens": 4}') $$, :reservation_id));
SELECT * FROM refused(format($$ SELECT lease_settle('settle:1', %s, metadata => '{"tokens": 4}') $$, :reservation_id));
SELECT * FROM refused(format($$ SELECT lease_settle('settle:1', %s, 4, 'clamp', '{"tokens": 4}') $$, :reservation_id));
SELECT * FROM refused(format($$ SELECT lease_settle('settle:1', %s, 4, metadata => '{"tokens": 5}') $$, :reservation_id));
SELECT * FROM refused(format($$ SELECT lease_settle('settle:1', %s, 4) $$, :reservation_id));

-- NULL is the same request as the exact amount of the hold.
SELECT reservation_id FROM lease_reserve('settle:1', 'tokens', 10) \gset
SELECT consumed, replayed FROM lease_settle('settle:1', :reservation_id, 10);
SELECT consumed, replayed FROM lease_settle('settle:1', :reservation_id);

-- Nothing: all of it comes back. That is settled and not cancelled.
SELECT reservation_id FROM lease_reserve('settle:1', 'tokens', 10) \gset
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('settle:1', :reservation_id, 0);
SELECT lease_cancel('settle:1', :reservation_id);
SELECT consumed, refunded, replayed FROM lease_settle('settle:1', :reservation_id, 0);

-- Above the hold, 'charge' takes the rest from the pool ...
SELECT available FROM lease_topup('settle:2', 'tokens', 15);
SELECT reservation_id FROM lease_reserve('settle:2', 'tokens', 10) \gset
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('settle:2', :reservation_id, 12);
-- ... as far as it goes, and records what was missing. Nothing goes below zero (rule 1).
SELECT reservation_id FROM lease_reserve('settle:2', 'tokens', 1) \gset
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('settle:2', :reservation_id, 12);
SELECT reserved, consumed, refunded, shortfall, available, replayed FROM lease_settle('settle:2', :reservation_id, 12);
SELECT * FROM refused(format($$ SELECT lease_settle('settle:2', %s, 3) $$, :reservation_id));
SELECT available, reserved, consumed, granted FROM lease_balance('settle:2');

-- 'clamp' stops at the hold.
SELECT available FROM lease_topup('settle:3', 'tokens', 15);
SELECT reservation_id FROM lease_reserve('settle:3', 'tokens', 5) \gset
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('settle:3', :reservation_id, 12, 'clamp');
SELECT reserved, consumed, refunded, shortfall, available, replayed FROM lease_settle('settle:3', :reservation_id, 12, 'clamp');

-- 'refuse' raises and changes nothing; the hold is still there.
SELECT reservation_id FROM lease_reserve('settle:3', 'tokens', 5) \gset
SELECT * FROM refused(format($$ SELECT lease_settle('settle:3', %s, 5.1, 'refuse') $$, :reservation_id));
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('settle:3', :reservation_id, 5, 'refuse');

-- The overage may be charged to other tranches than the hold came from. What
-- the reservation records is the whole.
SELECT available FROM lease_topup('settle:4', 'tokens', 10);
SELECT reservation_id FROM lease_reserve('settle:4', 'tokens', 10, metadata => '{"job": 4}') \gset
SELECT available FROM lease_topup('settle:4', 'tokens', 10);
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('settle:4', :reservation_id, 14);
SELECT l.kind, l.amount, l.available, t.granted, t.reserved, t.consumed, t.remaining
  FROM ledger l JOIN tranche t USING (account, credit, tranche_id)
 WHERE l.account = 'settle:4' AND l.kind = 'settle' ORDER BY l.entry_id;
SELECT status, amount, consumed, refunded, shortfall, overage, metadata FROM reservation WHERE account = 'settle:4';

-- Of a hold that spans tranches, what burns first is spent and what burns last
-- comes back, each to the tranche that it came from (rules 8 and 10).
SELECT available FROM lease_topup('settle:5', 'tokens', 10);
SELECT available FROM lease_topup('settle:5', 'tokens', 20);
SELECT reservation_id FROM lease_reserve('settle:5', 'tokens', 25) \gset
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('settle:5', :reservation_id, 12);
SELECT l.kind, l.amount, t.granted, t.reserved, t.consumed, t.remaining
  FROM ledger l JOIN tranche t USING (account, credit, tranche_id)
 WHERE l.account = 'settle:5' AND l.kind = 'settle' ORDER BY l.entry_id;

-- A hold ends exactly once (rule 4): what was cancelled cannot be settled.
SELECT reservation_id FROM lease_reserve('settle:5', 'tokens', 5) \gset
SELECT lease_cancel('settle:5', :reservation_id);
SELECT * FROM refused(format($$ SELECT lease_settle('settle:5', %s) $$, :reservation_id));

-- What has expired cannot be settled, swept or not (rule 7).
SELECT reservation_id FROM lease_reserve('settle:5', 'tokens', 5, '1 minute') \gset
SET credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT * FROM refused(format($$ SELECT lease_settle('settle:5', %s) $$, :reservation_id));
SELECT lease_reclaim() >= 1 AS swept;
SELECT * FROM refused(format($$ SELECT lease_settle('settle:5', %s) $$, :reservation_id));
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

-- A reservation belongs to its account.
SELECT reservation_id FROM lease_reserve('settle:5', 'tokens', 5) \gset
SELECT * FROM refused(format($$ SELECT lease_settle('settle:1', %s) $$, :reservation_id));
SELECT * FROM refused($$ SELECT lease_settle('settle:1', 0) $$);

-- The parts of every hold add up to what was held (rule 4): what was charged
-- above it aside.
SELECT count(*) FILTER (WHERE status = 'held') AS held, count(*) FILTER (WHERE status <> 'held') AS ended,
	   bool_and(least(consumed, amount) + refunded = amount) FILTER (WHERE status <> 'held') AS add_up
  FROM reservation WHERE account LIKE 'settle:%';

SELECT * FROM credit_lease.lease_verify();
