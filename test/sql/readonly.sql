--
-- In a read-only transaction, and so on a standby: looking works, and whatever
-- would write is PostgreSQL's own error.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

SELECT available FROM lease_topup('readonly:1', 'tokens', 10, expires_at => '2030-01-02');
SELECT entry_id FROM lease_consume('readonly:1', 'tokens', 1, 'key') \gset
SELECT reservation_id FROM lease_reserve('readonly:1', 'tokens', 2, '1 minute') \gset
CREATE ROLE regress_credit_lease_reader;

BEGIN READ ONLY;
SELECT * FROM lease_balance('readonly:1');
SELECT * FROM lease_verify('readonly:1');
SELECT available FROM balance WHERE account = 'readonly:1';
SELECT count(*) FROM open_lease WHERE account = 'readonly:1';
SELECT count(*) FROM open_reservation WHERE account = 'readonly:1';

-- Also when there would be something to give back and to write off.
SET LOCAL credit_lease.mock_now = '2030-01-02';
SELECT * FROM lease_balance('readonly:1');
SELECT returned FROM expired_hold WHERE account = 'readonly:1';

SELECT c.call, r.code FROM (VALUES
	($$ lease_topup('readonly:1', 'tokens', 1) $$),
	($$ lease_adjust('readonly:1', 'tokens', 1, 'goodwill') $$),
	($$ lease_refund('readonly:1', ENTRY) $$),
	($$ lease_consume('readonly:1', 'tokens', 1) $$),
	($$ lease_consume('readonly:1', 'tokens', 1, 'key') $$),
	($$ lease_try_consume('readonly:1', 'tokens', 1) $$),
	($$ lease_try_consume('readonly:1', 'tokens', 1000) $$),
	($$ lease_reserve('readonly:1', 'tokens', 1) $$),
	($$ lease_try_reserve('readonly:1', 'tokens', 1) $$),
	($$ lease_settle('readonly:1', HOLD) $$),
	($$ lease_cancel('readonly:1', HOLD) $$),
	($$ lease_renew('readonly:1', HOLD) $$),
	($$ lease_reclaim() $$),
	($$ lease_freeze('readonly:1') $$),
	($$ lease_unfreeze('readonly:1') $$),
	($$ lease_grant_access('regress_credit_lease_reader', 'read') $$)
  ) c (call), LATERAL refusal('SELECT ' || replace(replace(c.call, 'ENTRY', :'entry_id'), 'HOLD', :'reservation_id')) r;
COMMIT;

DROP ROLE regress_credit_lease_reader;

SELECT * FROM credit_lease.lease_verify();
