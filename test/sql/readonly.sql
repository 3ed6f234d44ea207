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
INSERT INTO meter (feature, credit, rate) VALUES ('readonly.call', 'tokens', 1), ('readonly.free', NULL, NULL);
SELECT reservation_id AS checked FROM lease_check('readonly:1', 'readonly.call', 1, ttl => '1 minute') \gset
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
	($$ lease_check('readonly:1', 'readonly.call', 1) $$),
	($$ lease_check('readonly:1', 'readonly.call', 1000) $$),
	($$ lease_explain('readonly:1', 'readonly.call', 1) $$),
	($$ lease_track('readonly:1', CHECKED, 1) $$),
	($$ lease_reclaim() $$),
	($$ lease_freeze('readonly:1') $$),
	($$ lease_unfreeze('readonly:1') $$),
	($$ lease_grant_access('regress_credit_lease_reader', 'read') $$)
  ) c (call), LATERAL refusal('SELECT ' || replace(replace(replace(c.call, 'ENTRY', :'entry_id'), 'HOLD', :'reservation_id'), 'CHECKED', :'checked')) r;

-- What costs nothing is answered without writing.
SELECT c.call, r.code FROM (VALUES
	($$ lease_check('readonly:1', 'readonly.free', 1) $$),
	($$ lease_check('readonly:1', 'readonly.call', 0) $$),
	($$ lease_check('readonly:1', 'readonly.nothing', 1) $$)
  ) c (call), LATERAL refusal('SELECT ' || c.call) r;
COMMIT;

DELETE FROM meter;
DROP ROLE regress_credit_lease_reader;

-- Whoever catches such an error goes on as who they are, and with their names
-- looked up where they were; also where it came out of a subtransaction.
CREATE ROLE regress_credit_lease_spender;
SELECT lease_grant_access('regress_credit_lease_spender', 'spend');
GRANT USAGE ON SCHEMA test TO regress_credit_lease_spender;
CREATE SERVER readonly_upstream FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'http://127.0.0.1:1');
INSERT INTO policy (credit, server) VALUES ('leased', 'readonly_upstream');
INSERT INTO meter (feature, credit, rate) VALUES ('one', 'tokens', 1), ('two', 'tokens', 1), ('two', 'leased', 1);
CREATE FUNCTION test.catch(call text) RETURNS TABLE (code text, is_user text, search_path text) LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE 'SELECT ' || call;
	RETURN QUERY SELECT '', current_user::text, current_setting('search_path');
EXCEPTION WHEN OTHERS THEN
	RETURN QUERY SELECT SQLSTATE, current_user::text, current_setting('search_path');
END $$;
BEGIN READ ONLY;
SET LOCAL ROLE regress_credit_lease_spender;
SELECT c.call, r.* FROM (VALUES
	($$ credit_lease.lease_check('readonly:1', 'one', 1) $$),
	($$ credit_lease.lease_check('readonly:1', 'two', 1) $$),
	($$ credit_lease.lease_explain('readonly:1', 'one', 1) $$),
	($$ credit_lease.lease_try_consume('readonly:1', 'leased', 1) $$),
	($$ credit_lease.lease_try_reserve('readonly:1', 'leased', 1) $$)
  ) c (call), LATERAL test.catch(c.call) r;
COMMIT;
SELECT code, is_user FROM test.catch($$ credit_lease.lease_explain('readonly:1', 'two', 1) $$);
DELETE FROM policy;
DELETE FROM meter;
DROP SERVER readonly_upstream;
DROP FUNCTION test.catch(text);
DROP OWNED BY regress_credit_lease_spender;
DROP ROLE regress_credit_lease_spender;

SELECT * FROM credit_lease.lease_verify();
