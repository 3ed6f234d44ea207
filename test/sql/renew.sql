--
-- lease_renew: a hold lives longer, or holds more.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

SELECT available FROM lease_topup('renew:1', 'tokens', 20);
SELECT reservation_id FROM lease_reserve('renew:1', 'tokens', 5, '10 minutes') \gset

-- The ttl counts from now, and never shortens a hold.
SET credit_lease.mock_now = '2030-01-01 00:05:00+00';
SELECT reservation_id = :reservation_id AS same, amount, expires_at FROM lease_renew('renew:1', :reservation_id, '1 minute');
SELECT amount, expires_at FROM lease_renew('renew:1', :reservation_id, '8 minutes');
SELECT amount, expires_at FROM open_reservation WHERE account = 'renew:1';
-- Without one it is as for a new hold: a policy's, or 60 seconds.
SET credit_lease.mock_now = '2030-01-01 00:12:30+00';
SELECT amount, expires_at FROM lease_renew('renew:1', :reservation_id);

-- It may hold more, from other tranches as well; the ledger says so.
SELECT available FROM lease_topup('renew:1', 'tokens', 10);
SELECT amount, expires_at FROM lease_renew('renew:1', :reservation_id, add_amount => 17);
SELECT available, reserved, consumed FROM lease_balance('renew:1');
SELECT l.kind, l.amount, l.available, t.granted, t.reserved, t.remaining
  FROM ledger l JOIN tranche t USING (account, credit, tranche_id)
 WHERE l.account = 'renew:1' AND l.reservation_id = :reservation_id ORDER BY l.entry_id;

-- If there is that much; else nothing changes, its expiry included (rule 6).
SELECT * FROM refused(format($$ SELECT lease_renew('renew:1', %s, '1 hour', 9) $$, :reservation_id));

-- The hold is one: it is settled, and comes back, as a whole.
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('renew:1', :reservation_id, 21);
SELECT t.granted, t.reserved, t.consumed, t.remaining FROM tranche t WHERE t.account = 'renew:1' ORDER BY t.tranche_id;

-- What has ended is not renewed (rule 4).
SELECT * FROM refused(format($$ SELECT lease_renew('renew:1', %s) $$, :reservation_id));
SELECT reservation_id FROM lease_reserve('renew:1', 'tokens', 5) \gset
SELECT lease_cancel('renew:1', :reservation_id);
SELECT * FROM refused(format($$ SELECT lease_renew('renew:1', %s) $$, :reservation_id));

-- What has expired is not brought back to life, swept or not (rule 7).
SELECT reservation_id FROM lease_reserve('renew:1', 'tokens', 5, '1 minute') \gset
SET credit_lease.mock_now = '2030-01-01 00:13:30+00';
SELECT * FROM refused(format($$ SELECT lease_renew('renew:1', %s) $$, :reservation_id));
SELECT lease_cancel('renew:1', :reservation_id);
SELECT * FROM refused(format($$ SELECT lease_renew('renew:1', %s) $$, :reservation_id));

-- A renewed hold outlives the moment at which it would have expired.
SELECT reservation_id FROM lease_reserve('renew:1', 'tokens', 5, '1 minute') \gset
SELECT expires_at FROM lease_renew('renew:1', :reservation_id, '10 minutes');
SET credit_lease.mock_now = '2030-01-01 00:15:00+00';
SELECT applied, available FROM lease_try_consume('renew:1', 'tokens', 9);
SELECT lease_reclaim() IS NOT NULL AS swept;
SELECT consumed, available FROM lease_settle('renew:1', :reservation_id);

-- A reservation belongs to its account.
SELECT reservation_id FROM lease_reserve('renew:1', 'tokens', 1) \gset
SELECT * FROM refused(format($$ SELECT lease_renew('renew:2', %s) $$, :reservation_id));
SELECT * FROM refused($$ SELECT lease_renew('renew:1', 0) $$);

SELECT * FROM credit_lease.lease_verify();
