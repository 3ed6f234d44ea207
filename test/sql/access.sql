--
-- Who may do what: lease_grant_access, and what neither a role nor hostile
-- objects can do.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

CREATE ROLE regress_credit_lease_nobody;
CREATE ROLE regress_credit_lease_spender;
CREATE ROLE regress_credit_lease_reader;
CREATE ROLE regress_credit_lease_admin;
CREATE ROLE "regress_credit_lease_""odd"" role; DROP";
SELECT lease_grant_access('regress_credit_lease_spender', 'spend');
SELECT lease_grant_access('regress_credit_lease_reader', 'read');
SELECT lease_grant_access('regress_credit_lease_admin', 'admin');
SELECT lease_grant_access('regress_credit_lease_"odd" role; DROP', 'spend');

SELECT available FROM lease_topup('access:1', 'tokens', 100);

-- What each may call ...
SELECT p.proname AS function,
	   has_function_privilege('regress_credit_lease_nobody', p.oid, 'EXECUTE') AS nobody,
	   has_function_privilege('regress_credit_lease_spender', p.oid, 'EXECUTE') AS spend,
	   has_function_privilege('regress_credit_lease_reader', p.oid, 'EXECUTE') AS read,
	   has_function_privilege('regress_credit_lease_admin', p.oid, 'EXECUTE') AS admin
  FROM pg_proc p WHERE p.pronamespace = 'credit_lease'::regnamespace
 ORDER BY p.proname COLLATE "C";

-- ... and look at, or write to.
SELECT c.relname AS relation, r.role,
	   array_to_string(ARRAY(SELECT lower(p) FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) p
							  WHERE has_table_privilege(r.rolname, c.oid, p)), ', ') AS privileges
  FROM pg_class c, (VALUES (1, 'nobody', 'regress_credit_lease_nobody'), (2, 'spend', 'regress_credit_lease_spender'),
						   (3, 'read', 'regress_credit_lease_reader'), (4, 'admin', 'regress_credit_lease_admin')) r (n, role, rolname)
 WHERE c.relnamespace = 'credit_lease'::regnamespace AND c.relkind IN ('r', 'v')
   AND has_table_privilege(r.rolname, c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
 ORDER BY c.relname COLLATE "C", r.n;
SELECT count(*) AS sequences_for_anybody
  FROM pg_class c, unnest(ARRAY['nobody', 'spender', 'reader', 'admin']) r
 WHERE c.relnamespace = 'credit_lease'::regnamespace AND c.relkind = 'S'
   AND has_sequence_privilege('regress_credit_lease_' || r, c.oid, 'USAGE, SELECT, UPDATE');

-- Nobody sees nothing.
SET ROLE regress_credit_lease_nobody;
SELECT credit_lease.lease_balance('access:1');
SELECT * FROM credit_lease.balance;
RESET ROLE;

-- Who spends has the functions that spend, and no table.
SET ROLE regress_credit_lease_spender;
SELECT available FROM lease_balance('access:1');
SELECT applied, available FROM lease_consume('access:1', 'tokens', 1);
SELECT applied, available FROM lease_try_consume('access:1', 'tokens', 1);
SELECT reservation_id FROM lease_reserve('access:1', 'tokens', 5) \gset
SELECT amount FROM lease_renew('access:1', :reservation_id, '1 hour', 5);
SELECT consumed, available FROM lease_settle('access:1', :reservation_id, 2);
SELECT reservation_id FROM lease_try_reserve('access:1', 'tokens', 5) \gset
SELECT lease_cancel('access:1', :reservation_id);
SELECT applied FROM lease_session_open('access:1', 'tokens', 'session', 5);
SELECT applied FROM lease_session_topup('access:1', 'session', 1);
SELECT applied FROM lease_session_authorize('access:1', 'session', 3);
SELECT applied FROM lease_session_charge('access:1', 'session', 2);
SELECT applied FROM lease_session_reconcile('access:1', 'session', to_jsonb(lease_session_snapshot('access:1', 'session')));
SELECT applied, spent FROM lease_session_close('access:1', 'session', 2);
SELECT lease_topup('access:1', 'tokens', 1);
SELECT lease_adjust('access:1', 'tokens', 1, 'a gift');
SELECT lease_refund('access:1', 1);
SELECT lease_freeze('access:1');
SELECT lease_unfreeze('access:1');
SELECT lease_reclaim();
SELECT lease_verify('access:1');
SELECT lease_install('access:1', 'tokens', 'L1', 1, '2040-01-01');
SELECT lease_extend('access:1', 'tokens', 'L1', 2);
SELECT lease_release('access:1', 'tokens');
SELECT lease_sync('access:1', 'tokens', 1, '2029-01-01');
SELECT lease_grant_access('regress_credit_lease_spender', 'admin');
SELECT * FROM balance;
UPDATE tranche SET remaining = remaining + 1;
RESET ROLE;

-- Who reads has all of the tables and views, and changes none.
SET ROLE regress_credit_lease_reader;
SELECT available, consumed FROM balance WHERE account = 'access:1';
SELECT available, consumed FROM lease_balance('access:1');
SELECT count(*) FROM lease_verify('access:1');
SELECT kind, amount, available FROM ledger WHERE account = 'access:1' ORDER BY entry_id;
SELECT granted, remaining FROM open_lease WHERE account = 'access:1';
SELECT count(*) FROM open_reservation WHERE account = 'access:1';
SELECT count(*) FROM expired_hold WHERE account = 'access:1';
SELECT day, consumed, calls FROM usage_by_day WHERE account = 'access:1';
SELECT count(*) FROM hot_pool WHERE account = 'access:1';
SELECT lease_consume('access:1', 'tokens', 1);
SELECT lease_session_charge('access:1', 'session', 1);
SELECT lease_install('access:1', 'tokens', 'L1', 1, '2040-01-01');
INSERT INTO policy (hold_ttl) VALUES ('1 hour');
DELETE FROM reservation;
RESET ROLE;

-- Who administers calls everything, keeps the policies, and goes through the
-- functions for the rest.
SET ROLE regress_credit_lease_admin;
SELECT available FROM lease_topup('access:1', 'tokens', 1);
SELECT available FROM lease_adjust('access:1', 'tokens', -1, 'no gift');
SELECT lease_install('access:1', 'tokens', 'L1', 1, '2040-01-01');
SELECT lease_extend('access:1', 'tokens', 'L1', 2);
SELECT lease_release('access:1', 'tokens');
SELECT available FROM lease_sync('access:1', 'mirrored', 1, '2020-01-01');
SELECT lease_freeze('access:1');
SELECT lease_unfreeze('access:1');
SELECT lease_reclaim() IS NOT NULL AS swept;
SELECT applied, available FROM lease_consume('access:1', 'tokens', 1);
INSERT INTO policy (account, hold_ttl) VALUES ('access:1', '1 hour');
UPDATE policy SET hold_ttl = '2 hours' WHERE account = 'access:1';
DELETE FROM policy WHERE account = 'access:1';
UPDATE tranche SET remaining = remaining + 1;
INSERT INTO ledger (account, credit, kind, amount, available, tranche_id, created_at)
	VALUES ('access:1', 'tokens', 'topup', 1, 1, 1, now());
UPDATE ledger SET amount = 0;
TRUNCATE ledger;
ALTER TABLE ledger DISABLE TRIGGER ledger_guard;
SELECT lease_grant_access('regress_credit_lease_nobody', 'read');
RESET ROLE;
SELECT has_function_privilege('regress_credit_lease_nobody', 'lease_verify(text)', 'EXECUTE') AS granted_on;

-- A name is a name, whatever is in it.
SET ROLE "regress_credit_lease_""odd"" role; DROP";
SELECT applied, available FROM lease_consume('access:1', 'tokens', 1);
RESET ROLE;

-- The ledger says who was logged in, not whose rights were used: neither SET
-- ROLE nor SECURITY DEFINER hides it.
SET SESSION AUTHORIZATION regress_credit_lease_admin;
SELECT available FROM lease_topup('access:2', 'tokens', 10);
SELECT lease_freeze('access:2', 'images');
RESET SESSION AUTHORIZATION;
SET SESSION AUTHORIZATION regress_credit_lease_spender;
SELECT available FROM lease_consume('access:2', 'tokens', 1);
RESET SESSION AUTHORIZATION;
SET ROLE regress_credit_lease_spender;
SELECT available FROM lease_consume('access:2', 'tokens', 2);
RESET ROLE;
SELECT kind, amount, CASE created_by WHEN session_user THEN 'session_user' ELSE created_by END AS created_by
  FROM ledger WHERE account = 'access:2' ORDER BY entry_id;
SELECT frozen_by FROM frozen_pool WHERE account = 'access:2';

--
-- Hostile objects, where an unqualified name would be looked for first: tables,
-- functions, operators and casts that raise, in a schema in front and in
-- pg_temp.
--
\c -
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
CREATE SERVER access_server FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://api.example.com');
CREATE SCHEMA hostile;
GRANT USAGE, CREATE ON SCHEMA hostile TO regress_credit_lease_admin;
SET SESSION AUTHORIZATION regress_credit_lease_admin;
SET search_path = hostile;
CREATE FUNCTION hostile.trap() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'hostile code runs as %', current_user; END $$;
CREATE FUNCTION hostile.trap(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT hostile.trap() IS NULL';
CREATE FUNCTION hostile.trap(bigint, bigint) RETURNS boolean LANGUAGE sql AS 'SELECT hostile.trap() IS NULL';
CREATE FUNCTION hostile.trap(numeric, numeric) RETURNS boolean LANGUAGE sql AS 'SELECT hostile.trap() IS NULL';
CREATE FUNCTION hostile.trap(timestamptz, timestamptz) RETURNS boolean LANGUAGE sql AS 'SELECT hostile.trap() IS NULL';
CREATE FUNCTION hostile.sum_of(numeric, numeric) RETURNS numeric LANGUAGE sql AS 'SELECT hostile.trap()::numeric';
CREATE OPERATOR hostile.= (LEFTARG = text, RIGHTARG = text, FUNCTION = hostile.trap);
CREATE OPERATOR hostile.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = hostile.trap);
CREATE OPERATOR hostile.<> (LEFTARG = numeric, RIGHTARG = numeric, FUNCTION = hostile.trap);
CREATE OPERATOR hostile.<= (LEFTARG = timestamptz, RIGHTARG = timestamptz, FUNCTION = hostile.trap);
CREATE OPERATOR hostile.> (LEFTARG = timestamptz, RIGHTARG = timestamptz, FUNCTION = hostile.trap);
CREATE OPERATOR hostile.+ (LEFTARG = numeric, RIGHTARG = numeric, FUNCTION = hostile.sum_of);
CREATE OPERATOR hostile.- (LEFTARG = numeric, RIGHTARG = numeric, FUNCTION = hostile.sum_of);
CREATE FUNCTION hostile.nextval(text) RETURNS bigint LANGUAGE sql AS 'SELECT hostile.trap()::bigint';
CREATE FUNCTION hostile.nextval(regclass) RETURNS bigint LANGUAGE sql AS 'SELECT hostile.trap()::bigint';
CREATE FUNCTION hostile.sum(numeric) RETURNS numeric LANGUAGE sql AS 'SELECT hostile.trap()::numeric';
CREATE FUNCTION hostile.min(timestamptz) RETURNS timestamptz LANGUAGE sql AS 'SELECT hostile.trap()::timestamptz';
CREATE FUNCTION hostile.unnest(text[], text[]) RETURNS SETOF text LANGUAGE sql AS 'SELECT hostile.trap()';
CREATE FUNCTION hostile.unnest(anyarray) RETURNS SETOF anyelement LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(); END';
CREATE FUNCTION hostile.format(text, name) RETURNS text LANGUAGE sql AS 'SELECT hostile.trap()';
CREATE FUNCTION hostile.lease_clock() RETURNS timestamptz LANGUAGE sql AS 'SELECT hostile.trap()::timestamptz';
CREATE FUNCTION hostile.ledger_guard() RETURNS text LANGUAGE sql AS 'SELECT hostile.trap()';
CREATE DOMAIN hostile.numeric AS text CHECK (hostile.trap() IS NULL);
CREATE DOMAIN hostile.text AS bytea CHECK (hostile.trap() IS NULL);
CREATE TABLE hostile.tranche (account text DEFAULT hostile.trap());
CREATE TABLE hostile.ledger (account text DEFAULT hostile.trap());
CREATE TABLE hostile.reservation (account text DEFAULT hostile.trap());
CREATE TABLE hostile.frozen_pool (account text DEFAULT hostile.trap());
CREATE TABLE hostile.refund (account text DEFAULT hostile.trap());
CREATE TABLE hostile.chunk (account text DEFAULT hostile.trap());
CREATE FUNCTION hostile.pg_notify(text, text) RETURNS void LANGUAGE sql AS 'SELECT hostile.trap()';
CREATE TABLE hostile.policy (account text DEFAULT hostile.trap());
CREATE VIEW hostile.balance AS SELECT hostile.trap();
CREATE VIEW hostile.finding AS SELECT hostile.trap();
CREATE TEMPORARY TABLE tranche (LIKE hostile.tranche INCLUDING DEFAULTS);
CREATE TEMPORARY TABLE ledger (LIKE hostile.ledger INCLUDING DEFAULTS);
CREATE TEMPORARY TABLE reservation (LIKE hostile.reservation INCLUDING DEFAULTS);
CREATE TEMPORARY TABLE frozen_pool (LIKE hostile.frozen_pool INCLUDING DEFAULTS);
CREATE TEMPORARY TABLE refund (LIKE hostile.refund INCLUDING DEFAULTS);
CREATE TEMPORARY TABLE policy (LIKE hostile.policy INCLUDING DEFAULTS);

-- The trap works ...
SET search_path = hostile, pg_temp, pg_catalog;
\set VERBOSITY terse
SELECT 1 + 1::pg_catalog.numeric;
INSERT INTO ledger DEFAULT VALUES;
\set VERBOSITY default
-- ... and no function walks into it, though this session calls each for the
-- first time.
SELECT available FROM credit_lease.lease_topup('access:3', 'tokens', 100, 'key', '2040-01-01', 5, '{}');
SELECT available FROM credit_lease.lease_topup('access:3', 'tokens', 100);
SELECT applied, available FROM credit_lease.lease_ingest(ARRAY['access:3', 'access:4'], ARRAY['tokens', 'tokens'], ARRAY[1, 1], ARRAY['key 1', 'key 1'], NULL, 'charge');
SELECT applied, available FROM credit_lease.lease_ingest('[{"account": "access:3", "credit": "tokens", "amount": 1, "key": "key 1"}, {"account": "access:3", "feature": "none", "quantity": 1}]');
SELECT entry_id, available FROM credit_lease.lease_consume('access:3', 'tokens', 110, 'key 2') \gset
SELECT :available AS available;
SELECT available, replayed FROM credit_lease.lease_try_consume('access:3', 'tokens', 110, 'key 2');
SELECT applied, available FROM credit_lease.lease_try_consume('access:3', 'tokens', 1000);
SELECT reservation_id, available FROM credit_lease.lease_reserve('access:3', 'tokens', 10, '1 minute') \gset
SELECT :available AS available;
SELECT amount FROM credit_lease.lease_renew('access:3', :reservation_id, NULL, 5);
SELECT consumed, refunded, available FROM credit_lease.lease_settle('access:3', :reservation_id, 7);
SELECT reservation_id, available FROM credit_lease.lease_try_reserve('access:3', 'tokens', 10, '1 minute') \gset
SELECT credit_lease.lease_cancel('access:3', :reservation_id);
SELECT applied FROM credit_lease.lease_session_open('access:3', 'tokens', 'session', 10);
SELECT applied FROM credit_lease.lease_session_topup('access:3', 'session', 1);
SET credit_lease.notify_sessions = on;
SELECT applied FROM credit_lease.lease_session_authorize('access:3', 'session', 3);
RESET credit_lease.notify_sessions;
SELECT applied FROM credit_lease.lease_session_charge('access:3', 'session', 2);
SELECT required_cumulative FROM credit_lease.lease_session_snapshot('access:3', 'session', 2);
SELECT applied FROM credit_lease.lease_session_reconcile('access:3', 'session', '{"session": "session", "deposit": 12, "accepted_cumulative": 4, "spent": 3}');
SELECT applied, spent FROM credit_lease.lease_session_close('access:3', 'session', 4);
SELECT amount, available FROM credit_lease.lease_refund('access:3', :entry_id, 7);
SELECT amount, available FROM credit_lease.lease_adjust('access:3', 'tokens', -7, 'hostile');
SELECT credit_lease.lease_install('access:3', 'tokens', 'L1', 5, '2040-01-01', 'access_server');
SELECT credit_lease.lease_extend('access:3', 'tokens', 'L1', 6, '2041-01-01');
SELECT credit_lease.lease_release('access:3', 'tokens');
SELECT available FROM credit_lease.lease_sync('access:4', 'mirrored', 5, '2029-01-01', 'access_server');
SELECT available FROM credit_lease.lease_consume('access:4', 'mirrored', 2, 'key 3');
SELECT available FROM credit_lease.lease_sync('access:4', 'mirrored', 4, '2029-01-02', 'access_server', '{key 3}');
SELECT available FROM credit_lease.lease_sync('access:4', 'mirrored', 4, '2029-06-01', 'access_server');
SELECT credit_lease.lease_freeze('access:3');
SELECT applied FROM credit_lease.lease_try_consume('access:3', 'tokens', 1);
SELECT credit_lease.lease_unfreeze('access:3');
SELECT available, reserved, consumed, granted FROM credit_lease.lease_balance('access:3');
SELECT available, reserved, consumed, granted FROM credit_lease.balance WHERE account OPERATOR(pg_catalog.=) 'access:3';
SELECT pg_catalog.count(*) FROM credit_lease.lease_verify('access:3');
SELECT credit_lease.lease_reclaim() IS NOT NULL AS swept;
SELECT credit_lease.lease_grant_access('regress_credit_lease_nobody', 'spend');
SELECT pg_catalog.count(*) FROM credit_lease.open_lease WHERE account OPERATOR(pg_catalog.=) 'access:3';
SELECT pg_catalog.count(*) FROM credit_lease.open_reservation WHERE account OPERATOR(pg_catalog.=) 'access:3';
SELECT consumed, calls FROM credit_lease.usage_by_day WHERE account OPERATOR(pg_catalog.=) 'access:3';
RESET SESSION AUTHORIZATION;
RESET search_path;
DROP OWNED BY regress_credit_lease_admin CASCADE;
DROP SCHEMA hostile;
DROP SERVER access_server;

-- Who may read can read every one of them, whatever functions the views call.
SET SESSION AUTHORIZATION regress_credit_lease_reader;
DO $$
DECLARE
	name text;
BEGIN
	FOR name IN SELECT c.oid::regclass FROM pg_class c
		WHERE c.relnamespace = 'credit_lease'::regnamespace AND c.relkind IN ('r', 'v')
	LOOP
		EXECUTE 'SELECT * FROM ' || name;
	END LOOP;
END
$$;
RESET SESSION AUTHORIZATION;

--
-- The ledger is append-only, for its owner and a superuser too, and where
-- triggers are off for everybody else.
--
SET search_path = credit_lease, test;
SELECT * FROM refused('UPDATE ledger SET amount = 0');
SELECT code FROM refusal('UPDATE ledger SET amount = 0 WHERE false');
SELECT code FROM refusal('DELETE FROM ledger');
SELECT code FROM refusal('TRUNCATE ledger');
SELECT code FROM refusal($$ INSERT INTO ledger SELECT * FROM ledger WHERE account = 'access:1'
	ON CONFLICT (account, entry_id) DO UPDATE SET amount = 0 $$);
SELECT code FROM refusal($$ MERGE INTO ledger l USING (VALUES (1)) v (n) ON l.account = 'access:1'
	WHEN MATCHED THEN DELETE $$);
SET session_replication_role = replica;
SELECT code FROM refusal('UPDATE ledger SET amount = 0');
SELECT code FROM refusal('DELETE FROM ledger');
SELECT code FROM refusal('TRUNCATE ledger');
RESET session_replication_role;
SET session_replication_role = local;
SELECT code FROM refusal('DELETE FROM ledger');
RESET session_replication_role;

DROP OWNED BY regress_credit_lease_nobody, regress_credit_lease_spender, regress_credit_lease_reader, regress_credit_lease_admin,
	"regress_credit_lease_""odd"" role; DROP";
DROP ROLE regress_credit_lease_nobody, regress_credit_lease_spender, regress_credit_lease_reader, regress_credit_lease_admin,
	"regress_credit_lease_""odd"" role; DROP";

SELECT * FROM credit_lease.lease_verify();
