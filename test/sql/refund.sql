--
-- lease_refund: what was spent comes back, to the tranches that it came from.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

SELECT available FROM lease_topup('refund:1', 'tokens', 100);

-- All of it, and a part.
SELECT entry_id FROM lease_consume('refund:1', 'tokens', 30) \gset
SELECT amount, available, replayed FROM lease_refund('refund:1', :entry_id, 10, 'slow answer');
SELECT amount, available, replayed FROM lease_refund('refund:1', :entry_id);
SELECT kind, amount, available, reason, refund_of = :entry_id AS is_of_the_entry
  FROM ledger WHERE account = 'refund:1' AND kind = 'refund' ORDER BY entry_id;
SELECT available, consumed, granted FROM lease_balance('refund:1');

-- All refunds of an entry together give back at most what it consumed.
SELECT * FROM refused(format($$ SELECT lease_refund('refund:1', %s) $$, :entry_id));
SELECT * FROM refused(format($$ SELECT lease_refund('refund:1', %s, 1) $$, :entry_id));
SELECT entry_id FROM lease_consume('refund:1', 'tokens', 30) \gset
SELECT amount, available FROM lease_refund('refund:1', :entry_id, 20);
SELECT * FROM refused(format($$ SELECT lease_refund('refund:1', %s, 11) $$, :entry_id));
SELECT amount, available FROM lease_refund('refund:1', :entry_id, 10);
-- More than it ever consumed is a mistake of another kind.
SELECT * FROM refused(format($$ SELECT lease_refund('refund:1', %s, 31) $$, :entry_id));

-- A call that spanned tranches is refunded as a whole, whichever of its rows
-- is named: what burned last comes back first.
SELECT available FROM lease_topup('refund:2', 'tokens', 10);
SELECT available FROM lease_topup('refund:2', 'tokens', 20);
SELECT available FROM lease_topup('refund:2', 'tokens', 30);
SELECT entry_id FROM lease_consume('refund:2', 'tokens', 40) \gset
SELECT max(entry_id) AS last_id FROM ledger WHERE account = 'refund:2' \gset
SELECT amount, available FROM lease_refund('refund:2', :entry_id, 15);
SELECT granted, consumed, remaining FROM tranche WHERE account = 'refund:2' ORDER BY tranche_id;
SELECT amount, available FROM lease_refund('refund:2', :last_id, 18);
SELECT granted, consumed, remaining FROM tranche WHERE account = 'refund:2' ORDER BY tranche_id;
SELECT * FROM refused(format($$ SELECT lease_refund('refund:2', %s, 8) $$, :last_id));
SELECT amount, available FROM lease_refund('refund:2', :entry_id, 7);
SELECT granted, consumed, remaining FROM tranche WHERE account = 'refund:2' ORDER BY tranche_id;
SELECT l.amount, l.available, o.amount AS was_consumed
  FROM ledger l JOIN ledger o ON o.account = l.account AND o.entry_id = l.refund_of
 WHERE l.account = 'refund:2' AND l.kind = 'refund' ORDER BY l.entry_id;

-- A tranche that was used up can be spent from again.
SELECT available FROM lease_topup('refund:3', 'tokens', 5);
SELECT entry_id FROM lease_consume('refund:3', 'tokens', 5) \gset
SELECT count(*) AS open_leases FROM open_lease WHERE account = 'refund:3';
SELECT amount, available FROM lease_refund('refund:3', :entry_id);
SELECT granted, remaining FROM open_lease WHERE account = 'refund:3';
SELECT applied, available FROM lease_consume('refund:3', 'tokens', 5);

-- What comes back to an expired tranche is gone with it (rule 8): the refund
-- is recorded, and nothing becomes available.
SELECT available FROM lease_topup('refund:4', 'tokens', 10, expires_at => '2030-01-02');
SELECT available FROM lease_topup('refund:4', 'tokens', 10);
SELECT entry_id FROM lease_consume('refund:4', 'tokens', 15) \gset
SET credit_lease.mock_now = '2030-01-02';
SELECT amount, available FROM lease_refund('refund:4', :entry_id, 12);
SELECT granted, consumed, expired, remaining FROM tranche WHERE account = 'refund:4' ORDER BY tranche_id;
SELECT available, consumed, expired FROM lease_balance('refund:4');
SET credit_lease.mock_now = '2030-01-01';

-- A settlement is refunded like any other entry, its overage included. The
-- reservation keeps saying how it was settled.
SELECT available FROM lease_topup('refund:5', 'tokens', 10);
SELECT reservation_id FROM lease_reserve('refund:5', 'tokens', 5) \gset
SELECT consumed, available FROM lease_settle('refund:5', :reservation_id, 8);
SELECT entry_id FROM ledger WHERE account = 'refund:5' AND kind = 'settle' \gset
SELECT amount, available FROM lease_refund('refund:5', :entry_id);
SELECT consumed, replayed FROM lease_settle('refund:5', :reservation_id, 8);
SELECT available, reserved, consumed FROM lease_balance('refund:5');

-- What consumed nothing cannot be refunded: neither a top-up, nor a hold, nor
-- a refund.
SELECT max(entry_id) FILTER (WHERE kind = 'topup') AS topup, max(entry_id) FILTER (WHERE kind = 'reserve') AS reserve,
	   max(entry_id) FILTER (WHERE kind = 'refund') AS refund
  FROM ledger WHERE account = 'refund:5' \gset
SELECT * FROM refused(format($$ SELECT lease_refund('refund:5', %s) $$, :topup));
SELECT * FROM refused(format($$ SELECT lease_refund('refund:5', %s) $$, :reserve));
SELECT * FROM refused(format($$ SELECT lease_refund('refund:5', %s) $$, :refund));

-- An entry belongs to its account.
SELECT entry_id FROM lease_consume('refund:5', 'tokens', 5) \gset
SELECT * FROM refused(format($$ SELECT lease_refund('refund:1', %s) $$, :entry_id));
SELECT * FROM refused($$ SELECT lease_refund('refund:5', 0) $$);

SELECT * FROM credit_lease.lease_verify();
