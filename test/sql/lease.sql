--
-- lease_install, lease_extend and lease_release: what an upstream has set aside
-- for a pool, and what none of its answers may do: mint credit.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

CREATE SERVER lease_a FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://a.example');
CREATE SERVER lease_b FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://b.example');
CREATE FOREIGN DATA WRAPPER regress_credit_lease_other;
CREATE SERVER lease_other FOREIGN DATA WRAPPER regress_credit_lease_other;

-- The leases of an account, with what has become of them.
CREATE VIEW pg_temp.lease AS
	SELECT account, credit, lease_id, server, granted, remaining, reserved, consumed, expired, returned, open, expires_at, released_at
	  FROM tranche WHERE kind = 'upstream';
CREATE FUNCTION pg_temp.available(name text) RETURNS numeric LANGUAGE sql AS
	'SELECT available FROM credit_lease.lease_balance(name)';

--
-- A lease is a tranche; its account need not be there before.
--
SELECT lease_install('lease:1', 'tokens', 'L1', 100, '2030-01-01 00:05:00+00', 'lease_a');
SELECT account, credit, kind, lease_id, owner, server, granted, remaining, reserved, priority, expires_at
  FROM open_lease WHERE account = 'lease:1';
SELECT kind, amount, available, idempotency_key, created_at FROM ledger WHERE account = 'lease:1';
SELECT applied, available FROM lease_consume('lease:1', 'tokens', 30);

-- It fills its server's slot, and is left as it is by another.
SELECT changed_by($$ SELECT lease_install('lease:1', 'tokens', 'L2', 500, '2030-01-01 01:00:00+00', 'lease_a') $$);
SELECT lease_install('lease:1', 'tokens', 'L2', 500, '2030-01-01 01:00:00+00', 'lease_a');
SELECT changed_by($$ SELECT lease_install('lease:1', 'tokens', 'L1', 500, '2030-01-01 01:00:00+00', 'lease_a') $$);
-- Every server has a slot of its own, and so has none, and every pool.
SELECT lease_install('lease:1', 'tokens', 'L2', 7, '2030-01-01 00:04:00+00', 'lease_b');
SELECT lease_install('lease:1', 'tokens', 'L2', 8, '2030-01-01 00:03:00+00');
SELECT lease_install('lease:1', 'tokens', 'L3', 8, '2030-01-01 00:03:00+00');
SELECT lease_install('lease:1', 'images', 'L1', 9, '2030-01-01 00:05:00+00', 'lease_a');
SELECT lease_install('lease:2', 'tokens', 'L1', 10, '2030-01-01 00:05:00+00', 'lease_a');
SELECT account, credit, lease_id, server, granted, remaining FROM open_lease WHERE account LIKE 'lease:%' ORDER BY tranche_id;

-- A server that is none, or none of ours.
SELECT * FROM refused($$ SELECT lease_install('lease:1', 'tokens', 'L9', 1, '2030-01-01 00:05:00+00', 'lease_c') $$);
SELECT * FROM refused($$ SELECT lease_install('lease:1', 'tokens', 'L9', 1, '2030-01-01 00:05:00+00', 'lease_other') $$);
SELECT * FROM refused($$ SELECT lease_install('lease:new', 'tokens', 'L9', 1, '2030-01-01 00:00:00+00') $$);

-- Used up, it fills the slot until it expires.
SELECT applied, available FROM lease_consume('lease:2', 'tokens', 10);
SELECT granted, remaining FROM open_lease WHERE account = 'lease:2';
SELECT changed_by($$ SELECT lease_install('lease:2', 'tokens', 'L2', 5, '2030-01-01 01:00:00+00', 'lease_a') $$);
SET credit_lease.mock_now = '2030-01-01 00:04:59.999999+00';
SELECT lease_install('lease:2', 'tokens', 'L2', 5, '2030-01-01 01:00:00+00', 'lease_a');
SET credit_lease.mock_now = '2030-01-01 00:05:00+00';
SELECT count(*) FROM open_lease WHERE account = 'lease:2';
SELECT lease_install('lease:2', 'tokens', 'L2', 5, '2030-01-01 01:00:00+00', 'lease_a');
SELECT pg_temp.available('lease:2');

-- The same answer twice: an id is installed once, whatever has become of it.
SET credit_lease.mock_now = '2030-01-01 02:00:00+00';
SELECT lease_install('lease:2', 'tokens', 'L1', 10, '2030-01-01 03:00:00+00', 'lease_a');
SELECT lease_install('lease:2', 'tokens', 'L2', 10, '2030-01-01 03:00:00+00', 'lease_a');
SELECT lease_install('lease:2', 'tokens', 'L3', 10, '2030-01-01 03:00:00+00', 'lease_a');
SELECT lease_release('lease:2', 'tokens', 'L3');
SELECT changed_by($$ SELECT lease_install('lease:2', 'tokens', 'L3', 10, '2030-01-01 03:00:00+00', 'lease_a') $$);
SELECT pg_temp.available('lease:2');
-- the index says so too, whoever goes round the function
SELECT code FROM refusal($$ INSERT INTO tranche (account, credit, kind, priority, created_at, expires_at, server, lease_id, open)
	VALUES ('lease:2', 'tokens', 'upstream', 100, now(), now(), 'lease_a', 'L3', false) $$);
SELECT code FROM refusal($$ INSERT INTO tranche (account, credit, kind, priority, created_at, expires_at, lease_id, open)
	SELECT 'lease:2', 'tokens', 'upstream', 100, now(), now(), 'L9', false FROM generate_series(1, 2) $$);

--
-- Burn order: by expiry among themselves, after what was granted to burn first.
--
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
SELECT available FROM lease_topup('lease:order', 'tokens', 5, priority => 10);
SELECT available FROM lease_topup('lease:order', 'tokens', 5);
SELECT lease_install('lease:order', 'tokens', 'later', 5, '2030-01-01 00:10:00+00', 'lease_a');
SELECT lease_install('lease:order', 'tokens', 'sooner', 5, '2030-01-01 00:05:00+00', 'lease_b');
SELECT available FROM lease_consume('lease:order', 'tokens', 12);
SELECT kind, lease_id, priority, remaining FROM open_lease WHERE account = 'lease:order' ORDER BY priority, expires_at;

--
-- Extend: the total is the upstream's, the expiry moves forward.
--
SELECT lease_install('lease:3', 'tokens', 'L1', 100, '2030-01-01 00:05:00+00', 'lease_a');
SELECT available FROM lease_consume('lease:3', 'tokens', 60);
SELECT lease_extend('lease:3', 'tokens', 'L1', 150);
SELECT pg_temp.available('lease:3');
SELECT kind, amount, available FROM ledger WHERE account = 'lease:3' ORDER BY entry_id;
-- the same again, one that was sent before it, and one that says less than is spent
SELECT changed_by($$ SELECT lease_extend('lease:3', 'tokens', 'L1', 150) $$);
SELECT lease_extend('lease:3', 'tokens', 'L1', 150), lease_extend('lease:3', 'tokens', 'L1', 120, '2030-01-01 00:04:00+00'),
	   lease_extend('lease:3', 'tokens', 'L1', 1, '2000-01-01');
SELECT pg_temp.available('lease:3');
-- its expiry alone, which is no entry
SELECT changed_by($$ SELECT lease_extend('lease:3', 'tokens', 'L1', 150, '2030-01-01 00:06:00+00') $$);
SELECT lease_extend('lease:3', 'tokens', 'L1', 150, '2030-01-01 00:06:00+00');
-- a higher total with an earlier expiry, and both
SELECT lease_extend('lease:3', 'tokens', 'L1', 160, '2030-01-01 00:05:00+00');
SELECT lease_extend('lease:3', 'tokens', 'L1', 170.5, '2030-01-01 00:07:00+00');
SELECT lease_id, granted, remaining, consumed, expires_at FROM pg_temp.lease WHERE account = 'lease:3';

-- An id that is not the slot's is dropped: never had, another pool's, another account's.
SELECT changed_by($$ SELECT lease_extend('lease:3', 'tokens', 'L2', 1000, '2030-01-02') $$);
SELECT lease_extend('lease:3', 'tokens', 'L2', 1000), lease_extend('lease:3', 'images', 'L1', 1000),
	   lease_extend('lease:nobody', 'tokens', 'L1', 1000);
SELECT lease_extend('lease:3', 'tokens', 'L10', 1000), lease_extend('lease:3', 'tokens', 'L', 1000), lease_extend('lease:3', 'tokens', 'l1', 1000);
SELECT count(*) FROM account WHERE account = 'lease:nobody';

-- Used up, it is extended and opens again.
SELECT available FROM lease_consume('lease:3', 'tokens', 110.5);
SELECT remaining, open FROM pg_temp.lease WHERE account = 'lease:3';
SELECT lease_extend('lease:3', 'tokens', 'L1', 180);
SELECT remaining, open FROM pg_temp.lease WHERE account = 'lease:3';
SELECT applied, available FROM lease_consume('lease:3', 'tokens', 1);
SELECT lease_extend('lease:3', 'tokens', 'L1', 180, '2030-01-01 00:08:00+00');

-- Expired, it is not: not by a microsecond, and not though nobody has swept.
SET credit_lease.mock_now = '2030-01-01 00:07:59.999999+00';
SELECT lease_extend('lease:3', 'tokens', 'L1', 181);
SET credit_lease.mock_now = '2030-01-01 00:08:00+00';
SELECT changed_by($$ SELECT lease_extend('lease:3', 'tokens', 'L1', 1000, '2030-01-02') $$);
SELECT lease_extend('lease:3', 'tokens', 'L1', 1000, '2030-01-02');
SELECT pg_temp.available('lease:3');
SELECT lease_reclaim() IS NOT NULL AS swept;
SELECT lease_extend('lease:3', 'tokens', 'L1', 1000, '2030-01-02');
SELECT lease_id, granted, remaining, consumed, expired, open FROM pg_temp.lease WHERE account = 'lease:3';
-- It is replaced, and what its refunds give back does not inflate its successor (rule 8).
SELECT lease_install('lease:3', 'tokens', 'L2', 50, '2030-01-01 01:00:00+00', 'lease_a');
SELECT entry_id FROM ledger WHERE account = 'lease:3' AND kind = 'consume' ORDER BY entry_id LIMIT 1 \gset
SELECT amount, available FROM lease_refund('lease:3', :entry_id, 10);
SELECT lease_id, granted, remaining, consumed, expired FROM pg_temp.lease WHERE account = 'lease:3' ORDER BY lease_id;

-- Two servers may be one upstream, which hands the same lease to both.
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
SELECT lease_install('lease:4', 'tokens', 'L1', 10, '2030-01-01 00:05:00+00', 'lease_a');
SELECT lease_install('lease:4', 'tokens', 'L1', 10, '2030-01-01 00:06:00+00', 'lease_b');
SELECT changed_by($$ SELECT lease_install('lease:4', 'tokens', 'L1', 10, '2030-01-01 00:06:00+00') $$);
SELECT lease_extend('lease:4', 'tokens', 'L1', 20);
SELECT server, granted FROM pg_temp.lease WHERE account = 'lease:4' ORDER BY server;

--
-- Release: what remains is returned, what is held is settled.
--
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
SELECT lease_install('lease:5', 'tokens', 'L1', 100, '2030-01-01 01:00:00+00', 'lease_a');
SELECT entry_id FROM lease_consume('lease:5', 'tokens', 10) \gset
SELECT reservation_id AS to_settle FROM lease_reserve('lease:5', 'tokens', 20, '10 minutes') \gset
SELECT reservation_id AS to_cancel FROM lease_reserve('lease:5', 'tokens', 15, '10 minutes') \gset
SELECT reservation_id AS to_renew FROM lease_reserve('lease:5', 'tokens', 7, '10 minutes') \gset
SELECT reservation_id AS to_lapse FROM lease_reserve('lease:5', 'tokens', 5, '1 minute') \gset
SELECT available FROM lease_topup('lease:5', 'tokens', 1);
SELECT lease_release('lease:5', 'tokens', 'other'), lease_release('lease:5', 'images'), lease_release('lease:nobody', 'tokens');
SELECT lease_release('lease:5', 'tokens', 'L1');
SELECT lease_id, remaining, reserved, consumed, returned, open, released_at FROM pg_temp.lease WHERE account = 'lease:5';
SELECT available, reserved, consumed, expired FROM lease_balance('lease:5');
SELECT kind FROM open_lease WHERE account = 'lease:5';
-- neither twice, nor extended, and its slot is free
SELECT changed_by($$ SELECT lease_release('lease:5', 'tokens') $$);
SELECT lease_release('lease:5', 'tokens', 'L1'), lease_extend('lease:5', 'tokens', 'L1', 500, '2030-01-02');
SELECT lease_install('lease:5', 'tokens', 'L2', 3, '2030-01-01 01:00:00+00', 'lease_a');
-- what its holds give back is returned, and not to be spent
SELECT consumed, refunded, available FROM lease_settle('lease:5', :to_settle, 8);
SELECT lease_cancel('lease:5', :to_cancel);
SELECT amount, expires_at FROM lease_renew('lease:5', :to_renew, '1 hour', 2);
SELECT consumed, refunded, shortfall, available FROM lease_settle('lease:5', :to_renew, 11);
SELECT amount, available FROM lease_refund('lease:5', :entry_id, 4);
SET credit_lease.mock_now = '2030-01-01 00:02:00+00';
SELECT available, reserved, consumed, expired FROM lease_balance('lease:5');
SELECT lease_reclaim() IS NOT NULL AS swept;
SELECT available, reserved, consumed, expired FROM lease_balance('lease:5');
SELECT lease_id, granted, remaining, reserved, consumed, expired, returned, open FROM pg_temp.lease WHERE account = 'lease:5' ORDER BY lease_id;
SELECT kind, amount, released, lapsed, returned, available FROM ledger WHERE account = 'lease:5' ORDER BY entry_id;
SELECT kind, granted, remaining, reserved, consumed, expired, returned FROM movement
 WHERE account = 'lease:5' AND tranche_id = (SELECT tranche_id FROM tranche WHERE account = 'lease:5' AND lease_id = 'L1') ORDER BY entry_id;
SELECT returned FROM expired_hold WHERE account = 'lease:5';
-- after its time, it is returned and not expired all the same
SELECT entry_id FROM ledger WHERE account = 'lease:5' AND kind = 'consume' \gset
SET credit_lease.mock_now = '2030-01-01 02:00:00+00';
SELECT amount, available FROM lease_refund('lease:5', :entry_id, 1);
SELECT lease_id, consumed, expired, returned FROM pg_temp.lease WHERE account = 'lease:5' AND lease_id = 'L1';

-- All live leases of a pool at once, and no other; of what is used up nothing is returned.
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
SELECT lease_install('lease:6', 'tokens', 'L1', 10, '2030-01-01 00:01:00+00', 'lease_a');
SELECT lease_install('lease:6', 'tokens', 'L2', 20, '2030-01-01 01:00:00+00', 'lease_b');
SELECT lease_install('lease:6', 'tokens', 'L3', 30, '2030-01-01 02:00:00+00');
SELECT lease_install('lease:6', 'images', 'L1', 40, '2030-01-01 02:00:00+00', 'lease_a');
SELECT available FROM lease_topup('lease:6', 'tokens', 5);
SET credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT applied, available FROM lease_consume('lease:6', 'tokens', 25);
SELECT lease_release('lease:6', 'tokens'), lease_release('lease:6', 'tokens');
SELECT credit, lease_id, remaining, consumed, returned, open, released_at FROM pg_temp.lease WHERE account = 'lease:6' ORDER BY credit, lease_id;
SELECT kind, amount, available, parts FROM ledger WHERE account = 'lease:6' AND credit = 'tokens' ORDER BY entry_id;
SELECT credit, kind, remaining FROM open_lease WHERE account = 'lease:6' ORDER BY credit;
-- several at once are one call
SELECT lease_install('lease:6', 'tokens', 'L5', 10, '2030-01-01 02:00:00+00', 'lease_a');
SELECT lease_install('lease:6', 'tokens', 'L6', 10, '2030-01-01 02:00:00+00', 'lease_b');
SELECT lease_release('lease:6', 'tokens');
SELECT kind, amount, available, parts, first_entry_id IS NOT NULL AS part FROM ledger WHERE account = 'lease:6' AND kind = 'release' ORDER BY entry_id;
-- expired, it is not released
SELECT lease_install('lease:6', 'tokens', 'L7', 10, '2030-01-01 00:02:00+00', 'lease_a');
SET credit_lease.mock_now = '2030-01-01 00:02:00+00';
SELECT lease_release('lease:6', 'tokens', 'L7'), lease_release('lease:6', 'tokens');

-- A call gives back the pool's expired holds on its way: they are released with the rest.
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
SELECT lease_install('lease:7', 'tokens', 'L1', 10, '2030-01-01 01:00:00+00', 'lease_a');
SELECT amount FROM lease_reserve('lease:7', 'tokens', 10, '1 minute');
SET credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT lease_release('lease:7', 'tokens');
SELECT remaining, reserved, returned, open FROM pg_temp.lease WHERE account = 'lease:7';
SELECT kind, amount, available FROM ledger WHERE account = 'lease:7' ORDER BY entry_id;
SELECT refunded FROM reservation WHERE account = 'lease:7';

-- A frozen pool takes credit in, and gives it back.
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
SELECT lease_freeze('lease:8');
SELECT lease_install('lease:8', 'tokens', 'L1', 10, '2030-01-01 01:00:00+00', 'lease_a');
SELECT lease_extend('lease:8', 'tokens', 'L1', 20, '2030-01-01 02:00:00+00');
SELECT code FROM refusal($$ SELECT lease_consume('lease:8', 'tokens', 1) $$);
SELECT lease_release('lease:8', 'tokens');

-- Rolled back, nothing of it was.
BEGIN;
SELECT lease_install('lease:9', 'tokens', 'L1', 10, '2030-01-01 01:00:00+00', 'lease_a');
SAVEPOINT s;
SELECT lease_extend('lease:9', 'tokens', 'L1', 20, '2030-01-01 02:00:00+00');
SELECT lease_release('lease:9', 'tokens');
ROLLBACK TO s;
SELECT granted, remaining, expires_at, released_at FROM pg_temp.lease WHERE account = 'lease:9';
ROLLBACK;
SELECT lease_install('lease:9', 'tokens', 'L1', 10, '2030-01-01 01:00:00+00', 'lease_a');

-- 512 bytes and 38 digits are taken, and compared in full.
SELECT lease_install('lease:10', repeat('c', 512), repeat('x', 512), 1, '2030-01-01 01:00:00+00');
SELECT lease_extend('lease:10', repeat('c', 512), repeat('x', 511) || 'y', 2),
	   lease_extend('lease:10', repeat('c', 512), repeat('x', 511), 2),
	   lease_extend('lease:10', repeat('c', 512), repeat('x', 512), 99999999999999999999999999.999999999999);
SELECT remaining FROM pg_temp.lease WHERE account = 'lease:10';

DROP SERVER lease_a, lease_b, lease_other;
DROP FOREIGN DATA WRAPPER regress_credit_lease_other;
SELECT * FROM credit_lease.lease_verify();
