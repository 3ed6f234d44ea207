--
-- Rules: a function of the user's own that decides with lease_check. It may do
-- what its caller may do, at any point of a check, and no check is the worse
-- for it.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

CREATE ROLE regress_credit_lease_caller;
CREATE ROLE regress_credit_lease_other;
SELECT lease_grant_access('regress_credit_lease_caller', 'spend');
SELECT lease_grant_access('regress_credit_lease_other', 'spend');
CREATE SCHEMA rules;
GRANT USAGE ON SCHEMA rules TO regress_credit_lease_caller, regress_credit_lease_other;

-- Makes a rule of a body, and a feature of it with the same name.
CREATE FUNCTION test.create_rule(name text, body text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE format('CREATE OR REPLACE FUNCTION rules.%I(account text, feature text, quantity numeric, available numeric,'
		' subject jsonb, OUT allowed boolean, OUT reason text) LANGUAGE plpgsql AS %L', name, 'BEGIN ' || body || ' END');
	INSERT INTO credit_lease.meter (feature, credit, rate, rule) VALUES ('rule.' || name, 'tokens', 0.5, format('rules.%I', name));
END
$$;

--
-- What it is told: the balance as it was before the hold.
--
CREATE TABLE rules.told (n serial, account text, feature text, quantity numeric, available numeric, subject jsonb);
GRANT SELECT, INSERT ON rules.told TO regress_credit_lease_caller;
GRANT USAGE ON SEQUENCE rules.told_n_seq TO regress_credit_lease_caller;
SELECT create_rule('told', 'INSERT INTO told (account, feature, quantity, available, subject)
	VALUES (account, feature, quantity, available, subject); allowed := true;');
INSERT INTO meter (feature, rule) VALUES ('rule.free', 'rules.told');
SELECT available FROM lease_topup('rule:1', 'tokens', 10);
SELECT allowed, amount, available FROM lease_check('rule:1', 'rule.told', 4, subject => '{"user": {"plan": "pro"}}');
SELECT allowed, amount, available FROM lease_check('rule:1', 'rule.told', 16);
-- with no credit, it is not asked
SELECT allowed, reason FROM lease_check('rule:1', 'rule.told', 1);
-- but where one passes without: then there is as much as it takes
SELECT allowed, error, amount, available FROM lease_check('rule:1', 'rule.told', 7, on_failure => 'open');
SELECT available FROM lease_topup('rule:1', 'tokens', 1);
SELECT allowed, error, amount, available FROM lease_check('rule:1', 'rule.told', 7, on_failure => 'open');
SELECT allowed, error, amount, available FROM lease_check('rule:new', 'rule.told', 7, on_failure => 'open');
-- and where nothing is to be paid: as much as there is, or NULL
SELECT available FROM lease_topup('rule:1', 'tokens', 9);
SELECT allowed, amount, available FROM lease_check('rule:1', 'rule.told', 0);
SELECT allowed, amount, available FROM lease_check('rule:1', 'rule.free', 3, subject => 'null');
-- credit of expired holds counts
SET credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT allowed, amount, available FROM lease_check('rule:1', 'rule.told', 1);
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
SELECT account, feature, quantity, available, subject FROM rules.told ORDER BY n;

--
-- Whose rights it has: those of the role that calls lease_check.
--
CREATE TABLE rules.plan (account text);
INSERT INTO rules.plan VALUES ('rule:2');
GRANT SELECT ON rules.plan TO regress_credit_lease_caller;
SELECT create_rule('plan', 'allowed := EXISTS (SELECT FROM plan p WHERE p.account = $1); reason := ''no_plan'';');
SELECT create_rule('who', 'allowed := false; reason := concat_ws('', '', session_user = current_user, current_user, current_setting(''role''), current_setting(''is_superuser''));');
SELECT create_rule('inside', 'UPDATE credit_lease.tranche t SET remaining = t.remaining + 1; allowed := true;');
SELECT create_rule('look', 'PERFORM FROM credit_lease.ledger; allowed := true;');
SELECT create_rule('extension', 'PERFORM credit_lease.lease_topup(account, ''tokens'', 1000); allowed := true;');
SELECT available FROM lease_topup('rule:2', 'tokens', 100);
SELECT available FROM lease_topup('rule:3', 'tokens', 100);
SET ROLE regress_credit_lease_caller;
SELECT allowed, reason, error, available FROM lease_check('rule:2', 'rule.plan', 1);
SELECT allowed, reason, error FROM lease_check('rule:3', 'rule.plan', 1);
SELECT allowed, reason, error FROM lease_check('rule:2', 'rule.who', 1);
SELECT allowed, reason, error FROM lease_check('rule:2', 'rule.inside', 1);
SELECT allowed, reason, error FROM lease_check('rule:2', 'rule.look', 1);
SELECT allowed, reason, error FROM lease_check('rule:2', 'rule.extension', 1);
-- and the caller is who it was
SELECT current_user;
SELECT * FROM tranche;
SET ROLE regress_credit_lease_other;
SELECT allowed, reason, error FROM lease_check('rule:2', 'rule.plan', 1);
SELECT allowed, reason, error FROM lease_explain('rule:2', 'rule.plan', 1);
SELECT allowed, reason, error FROM lease_check('rule:2', 'rule.who', 1);
SELECT allowed, reason FROM lease_explain('rule:2', 'rule.who', 1);
SELECT current_user;
RESET ROLE;
-- who may not call it, or not look into its schema, is not served by it
REVOKE EXECUTE ON FUNCTION rules.plan FROM PUBLIC;
SET ROLE regress_credit_lease_caller;
SELECT allowed, reason, error FROM lease_check('rule:2', 'rule.plan', 1);
RESET ROLE;
GRANT EXECUTE ON FUNCTION rules.plan TO PUBLIC;
REVOKE USAGE ON SCHEMA rules FROM regress_credit_lease_other;
SET ROLE regress_credit_lease_other;
SELECT allowed, reason, error FROM lease_check('rule:2', 'rule.plan', 1);
RESET ROLE;
GRANT USAGE ON SCHEMA rules TO regress_credit_lease_other;
-- In a function that runs as its owner, that is the caller.
CREATE FUNCTION test.as_other(account text, feature text) RETURNS text LANGUAGE sql SECURITY DEFINER
	AS $$ SELECT reason FROM credit_lease.lease_check(account, feature, 1) $$;
ALTER FUNCTION test.as_other OWNER TO regress_credit_lease_other;
SELECT test.as_other('rule:2', 'rule.who') LIKE '%, regress_credit_lease_other, %' AS as_other;
DROP FUNCTION test.as_other;
-- A rule that runs as its own owner is that one's business.
CREATE FUNCTION rules.owned(account text, feature text, quantity numeric, available numeric, subject jsonb,
		OUT allowed boolean, OUT reason text)
	LANGUAGE sql SECURITY DEFINER SET search_path = rules, pg_temp
	AS $$ SELECT EXISTS (SELECT FROM plan p WHERE p.account = $1), current_user::text $$;
ALTER FUNCTION rules.owned OWNER TO regress_credit_lease_caller;
INSERT INTO meter (feature, credit, rate, rule) VALUES ('rule.owned', 'tokens', 1, 'rules.owned');
SET ROLE regress_credit_lease_other;
SELECT allowed, reason, error FROM lease_check('rule:2', 'rule.owned', 1);
SELECT allowed, reason, error FROM lease_check('rule:3', 'rule.owned', 1);
RESET ROLE;

--
-- Names in it are looked up in its own schema.
--
SELECT create_rule('path', 'allowed := false; reason := current_setting(''search_path'');');
CREATE SCHEMA "Odd rules";
CREATE FUNCTION "Odd rules"."Rule 1"(account text, feature text, quantity numeric, available numeric, subject jsonb,
		OUT allowed boolean, OUT reason text)
	LANGUAGE sql AS $$ SELECT false, current_setting('search_path') $$;
CREATE FUNCTION rules.own_path(account text, feature text, quantity numeric, available numeric, subject jsonb,
		OUT allowed boolean, OUT reason text)
	LANGUAGE sql SET search_path = pg_catalog AS $$ SELECT false, current_setting('search_path') $$;
INSERT INTO meter (feature, credit, rate, rule) VALUES ('rule.odd', 'tokens', 1, '"Odd rules"."Rule 1"'), ('rule.own_path', 'tokens', 1, 'rules.own_path');
SELECT feature, c.reason, c.error FROM unnest(ARRAY['rule.path', 'rule.odd', 'rule.own_path']) feature,
	LATERAL lease_check('rule:2', feature, 1) c;
SHOW search_path;
-- What lies in front of it elsewhere is not found.
CREATE TEMPORARY TABLE plan (account text);
CREATE TABLE test.plan (account text);
SET search_path = test, credit_lease;
SELECT allowed, reason, error FROM lease_check('rule:2', 'rule.plan', 1);
SET search_path = credit_lease, test;
DROP TABLE pg_temp.plan, test.plan;

--
-- Every way to fail is a denial, says why, and leaves no hold.
--
SELECT available FROM lease_topup('rule:4', 'tokens', 100);
CREATE TABLE rules.note (note text);
SELECT create_rule('raise', 'INSERT INTO note VALUES (''raised''); RAISE ''not today'' USING DETAIL = ''a detail'', ERRCODE = ''P0077'';');
SELECT create_rule('divide', 'allowed := 1 / (quantity - quantity) = 1;');
SELECT create_rule('null', 'reason := ''a reason for nothing'';');
SELECT create_rule('assert', 'ASSERT false, ''asserted''; allowed := true;');
SELECT create_rule('syntax', 'allowed := true; EXECUTE ''SELEC'';');
SELECT create_rule('internal', 'RAISE ''inside'' USING ERRCODE = ''XX000'';');
SELECT create_rule('books', 'RAISE ''no books'' USING ERRCODE = ''LC009'';');
SELECT create_rule('commit', 'allowed := true; COMMIT;');
SELECT create_rule('dropped', 'allowed := true;');
SELECT create_rule('signature', 'allowed := true;');
SELECT create_rule('results', 'allowed := true;');
SELECT create_rule('column', 'allowed := true;');
DROP FUNCTION rules.dropped, rules.signature, rules.results, rules.column;
CREATE FUNCTION rules.signature(account text, feature text, quantity numeric, OUT allowed boolean, OUT reason text)
	LANGUAGE sql AS $$ SELECT true, NULL::text $$;
CREATE FUNCTION rules.results(account text, feature text, quantity numeric, available numeric, subject jsonb, OUT allowed text, OUT reason text)
	LANGUAGE sql AS $$ SELECT 'true', NULL::text $$;
CREATE FUNCTION rules.column(account text, feature text, quantity numeric, available numeric, subject jsonb, OUT ok boolean, OUT reason text)
	LANGUAGE sql AS $$ SELECT true, NULL::text $$;
CREATE FUNCTION rules.rows(account text, feature text, quantity numeric, available numeric, subject jsonb)
	RETURNS TABLE (allowed boolean, reason text) LANGUAGE sql
	AS $$ SELECT true, 'row ' || n FROM generate_series(1, (subject->>'rows')::integer) n $$;
CREATE SCHEMA gone;
CREATE FUNCTION gone.rule(account text, feature text, quantity numeric, available numeric, subject jsonb, OUT allowed boolean, OUT reason text)
	LANGUAGE sql AS $$ SELECT true, NULL::text $$;
INSERT INTO meter (feature, credit, rate, rule) VALUES ('rule.rows', 'tokens', 1, 'rules.rows'), ('rule.gone', 'tokens', 1, 'gone.rule');
DROP FUNCTION gone.rule;
DROP SCHEMA gone;
SELECT name, c.allowed, c.reason, c.error, c.reservation_id
  FROM unnest(ARRAY['raise', 'divide', 'null', 'assert', 'syntax', 'internal', 'books', 'commit', 'dropped', 'signature', 'results', 'column', 'gone']) name,
	LATERAL lease_check('rule:4', 'rule.' || name, 1) c;
SELECT rows, c.allowed, c.reason, c.error, c.reservation_id IS NOT NULL AS holds
  FROM generate_series(0, 3) rows, LATERAL lease_check('rule:4', 'rule.rows', 1, subject => jsonb_build_object('rows', rows)) c;
-- neither where one may pass without credit, nor where there is nothing to pay
SELECT c.allowed, c.reason, c.error, c.reservation_id FROM lease_check('rule:4', 'rule.raise', 1000, on_failure => 'open') c;
SELECT c.allowed, c.reason, c.error, c.reservation_id FROM lease_check('rule:4', 'rule.raise', 0) c;
SELECT changed_by(format($$ SELECT lease_check('rule:4', 'rule.%s', 1) $$, name))
  FROM unnest(ARRAY['raise', 'null', 'dropped', 'rows']) name;
SELECT available, reserved FROM lease_balance('rule:4');
-- What it had written is undone.
SELECT * FROM rules.note;
-- The transaction goes on.
BEGIN;
SELECT allowed FROM lease_check('rule:4', 'rule.raise', 1);
SELECT allowed, available FROM lease_check('rule:4', 'rule.told', 2);
COMMIT;

-- What concerns the transaction is not the rule's answer, and is raised.
SELECT create_rule('conflict', 'RAISE ''once more'' USING ERRCODE = subject->>''code'';');
SELECT v.code, r.code AS raised, r.message FROM unnest(ARRAY['40001', '40P01', '57P01', '55P03', '53100', '53200', '58030']) v (code),
	LATERAL refusal(format('SELECT lease_check(%L, %L, 1, subject => %L)', 'rule:4', 'rule.conflict', jsonb_build_object('code', v.code))) r;
SELECT code, c.reason, c.error FROM unnest(ARRAY['55000', '25006', '42501', '22012', '23505', '0A000']) code,
	LATERAL lease_check('rule:4', 'rule.conflict', 1, subject => jsonb_build_object('code', code)) c;
\set VERBOSITY terse
SELECT allowed FROM lease_check('rule:4', 'rule.conflict', 1, subject => '{"code": "57014"}');
SELECT create_rule('slow', 'PERFORM pg_sleep(60); allowed := true;');
SET statement_timeout = '50ms';
SELECT lease_check('rule:4', 'rule.slow', 1);
RESET statement_timeout;
\set VERBOSITY default
SELECT available, reserved FROM lease_balance('rule:4');

--
-- What it writes is its own business: it stays, also where it denies.
--
SELECT create_rule('writes', 'INSERT INTO note VALUES (subject->>''note''); allowed := (subject->>''allowed'')::boolean;');
SELECT allowed FROM lease_check('rule:4', 'rule.writes', 1, subject => '{"note": "it was allowed", "allowed": true}');
SELECT allowed FROM lease_check('rule:4', 'rule.writes', 1, subject => '{"note": "it was denied", "allowed": false}');
SELECT allowed FROM lease_check('rule:4', 'rule.writes', 1, subject => '{"note": "it failed"}');
SELECT allowed FROM lease_explain('rule:4', 'rule.writes', 1);
BEGIN;
SELECT allowed FROM lease_check('rule:4', 'rule.writes', 1, subject => '{"note": "it was rolled back", "allowed": false}');
ROLLBACK;
SELECT * FROM rules.note;

--
-- What it sets does not outlive it.
--
SELECT create_rule('sets', '
	SET search_path = test;
	SET LOCAL work_mem = ''1MB'';
	SET timezone = ''Europe/Berlin'';
	PERFORM set_config(''statement_timeout'', ''1h'', false), set_config(''lock_timeout'', ''1h'', true), set_config(''rule.own'', ''x'', false);
	IF subject ? ''role'' THEN EXECUTE format(''SET ROLE %I'', subject->>''role''); END IF;
	IF subject ? ''time'' THEN SET credit_lease.mock_now = ''2040-01-01 00:00:00+00''; END IF;
	IF subject ? ''raise'' THEN RAISE ''oh''; END IF;
	allowed := coalesce(subject ? ''allowed'', true);
	reason := concat_ws('', '', current_user, current_setting(''timezone''));');
CREATE FUNCTION test.settings() RETURNS text LANGUAGE sql AS $$
	SELECT concat_ws(', ', current_user = session_user, current_setting('search_path'), current_setting('work_mem'), current_setting('timezone'),
		current_setting('statement_timeout'), current_setting('lock_timeout'), nullif(current_setting('rule.own', true), ''), current_setting('role')) $$;
SELECT settings();
SELECT subject, c.allowed, c.reason, c.error, c.expires_at, settings() FROM unnest(ARRAY[NULL, '{"allowed": 1}', '{}', '{"raise": 1}', '{"time": 1, "allowed": 1}',
	'{"role": "regress_credit_lease_caller", "allowed": 1}', '{"role": "regress_credit_lease_caller"}',
	'{"role": "regress_credit_lease_caller", "raise": 1}']::jsonb[]) subject,
	LATERAL lease_check('rule:4', 'rule.sets', 1, subject => subject) c;
SELECT c.allowed, c.reason, settings() FROM lease_explain('rule:4', 'rule.sets', 1) c;
-- also where the check ends with it, in a transaction that goes on
BEGIN;
SET LOCAL work_mem = '2MB';
SELECT allowed FROM lease_check('rule:4', 'rule.sets', 1, subject => '{"role": "regress_credit_lease_caller", "raise": 1}');
SELECT settings();
SELECT allowed FROM lease_check('rule:4', 'rule.sets', 1, subject => '{"role": "regress_credit_lease_caller", "allowed": 1}');
SELECT settings();
COMMIT;
-- It may set what its caller may set, and become who that one may become.
SET SESSION AUTHORIZATION regress_credit_lease_caller;
SELECT allowed, reason, error FROM lease_check('rule:4', 'rule.sets', 1, subject => '{"time": 1}');
SELECT allowed, reason, error FROM lease_check('rule:4', 'rule.sets', 1, subject => '{"role": "regress_credit_lease_other"}');
SELECT allowed, reason, error FROM lease_check('rule:4', 'rule.sets', 1, subject => '{"role": "regress_credit_lease_caller"}');
SELECT current_user;
RESET SESSION AUTHORIZATION;

--
-- It may spend, hold, cancel, top up and freeze in the account of the check:
-- what is left then decides, and the books stay right.
--
SELECT create_rule('spends', 'PERFORM credit_lease.lease_consume(account, ''tokens'', (subject->>''amount'')::numeric); allowed := true;');
SELECT create_rule('holds', 'PERFORM credit_lease.lease_reserve(account, ''tokens'', (subject->>''amount'')::numeric); allowed := true;');
SELECT create_rule('tops', 'PERFORM credit_lease.lease_topup(account, ''tokens'', (subject->>''amount'')::numeric, priority => 1); allowed := true;');
SELECT create_rule('freezes', 'PERFORM credit_lease.lease_freeze(account, subject->>''credit''); allowed := true;');
SELECT create_rule('cancels', 'PERFORM credit_lease.lease_cancel(account, (subject->>''hold'')::bigint); allowed := true;');
SELECT create_rule('unmeters', 'DELETE FROM credit_lease.meter m WHERE m.feature = $2; allowed := true;');
SELECT available FROM lease_topup('rule:5', 'tokens', 10);
SELECT allowed, reason, error, amount, available FROM lease_check('rule:5', 'rule.spends', 4, subject => '{"amount": 3}');
SELECT allowed, reason, error, reservation_id, amount, available FROM lease_check('rule:5', 'rule.spends', 4, subject => '{"amount": 4}');
SELECT available, reserved, consumed FROM lease_balance('rule:5');
-- it fails where there is too little for it
SELECT allowed, reason, error, available FROM lease_check('rule:5', 'rule.spends', 2, subject => '{"amount": 2}');
SELECT allowed, reason, error, available FROM lease_check('rule:5', 'rule.holds', 2, subject => '{"amount": 0.5}');
SELECT available FROM lease_topup('rule:5', 'tokens', 10);
SELECT allowed, reason, error, amount, available FROM lease_check('rule:5', 'rule.holds', 4, subject => '{"amount": 5}');
-- credit that it brings does not make up for what was missing before it was asked, nor is it left out
SELECT allowed, reason, error, available FROM lease_check('rule:5', 'rule.tops', 100, subject => '{"amount": 100}');
SELECT allowed, reason, error, available FROM lease_check('rule:5', 'rule.tops', 2, subject => '{"amount": 7}');
SELECT allowed, reason, error, amount, available FROM lease_check('rule:5', 'rule.tops', 100, subject => '{"amount": 20}', on_failure => 'open');
SELECT remaining, reserved, consumed FROM tranche WHERE account = 'rule:5' ORDER BY priority, tranche_id;
-- a hold that it gives back
SELECT available FROM lease_topup('rule:6', 'tokens', 10);
SELECT reservation_id FROM lease_reserve('rule:6', 'tokens', 8) \gset
SELECT allowed, reason, error, available FROM lease_check('rule:6', 'rule.cancels', 4, subject => jsonb_build_object('hold', :reservation_id));
-- it leaves too little where one may pass without, and spends of what there is of it
SELECT allowed, reason, error, amount, available FROM lease_check('rule:6', 'rule.spends', 16, subject => '{"amount": 1}', on_failure => 'open');
SELECT available FROM lease_topup('rule:6', 'tokens', 8);
SELECT allowed, reason, error, amount, available FROM lease_check('rule:6', 'rule.spends', 40, subject => '{"amount": 7}', on_failure => 'open');
SELECT allowed, reason, error, amount, available FROM lease_check('rule:6', 'rule.freezes', 40, on_failure => 'open');
SELECT available, reserved, consumed FROM lease_balance('rule:6');
SELECT available FROM lease_topup('rule:7', 'tokens', 10);
SELECT allowed, reason, error, reservation_id, available FROM lease_check('rule:7', 'rule.freezes', 4, subject => '{"credit": "tokens"}');
SELECT count(*) FROM open_reservation WHERE account = 'rule:7';
SELECT lease_unfreeze('rule:7');
-- freezing another credit concerns that one
SELECT allowed, reason, error, available FROM lease_check('rule:7', 'rule.freezes', 4, subject => '{"credit": "images"}');
-- its feature
SELECT allowed, amount FROM lease_check('rule:7', 'rule.unmeters', 4);
SELECT allowed, reason FROM lease_check('rule:7', 'rule.unmeters', 4);
SELECT count(*) AS findings FROM lease_verify('rule:5') UNION ALL SELECT count(*) FROM lease_verify('rule:6') UNION ALL SELECT count(*) FROM lease_verify('rule:7');

--
-- It may check and track, also the feature that it is asked about.
--
SELECT create_rule('checks', '
	IF quantity > 1 THEN SELECT c.allowed, c.reason INTO allowed, reason FROM credit_lease.lease_check(account, feature, quantity - 1) c;
	ELSE allowed := true; END IF;');
SELECT create_rule('for ever', 'SELECT c.allowed, c.reason INTO allowed, reason FROM credit_lease.lease_check(account, feature, quantity) c;');
SELECT create_rule('tracks', '
	SELECT t.settled INTO allowed FROM credit_lease.lease_check(account, ''rule.told'', quantity) c, LATERAL credit_lease.lease_track(account, c.reservation_id, quantity) t;');
SELECT create_rule('sweeps', 'PERFORM credit_lease.lease_reclaim(); allowed := true;');
SELECT create_rule('explains', 'SELECT e.allowed, e.reason INTO allowed, reason FROM credit_lease.lease_explain(account, ''rule.told'', quantity) e;');
SELECT available FROM lease_topup('rule:8', 'tokens', 10);
-- 0.5 + 1 + 1.5 + 2, the innermost first
SELECT allowed, reason, amount, available FROM lease_check('rule:8', 'rule.checks', 4);
SELECT quantity, amount FROM reservation WHERE account = 'rule:8' ORDER BY reservation_id;
-- the innermost take what the outer ones would need
SELECT allowed, reason, amount, available FROM lease_check('rule:8', 'rule.checks', 4);
SELECT quantity, amount FROM reservation WHERE account = 'rule:8' ORDER BY reservation_id;
SELECT available FROM lease_topup('rule:8', 'tokens', 10);
SELECT allowed, reason, error, amount, available FROM lease_check('rule:8', 'rule.tracks', 4);
SELECT allowed, reason, error, amount, available FROM lease_check('rule:8', 'rule.explains', 4);
-- one that has no end does not end well, but it ends
SELECT allowed, reason, error, reservation_id FROM lease_check('rule:8', 'rule.for ever', 1);
SELECT available, reserved, consumed FROM lease_balance('rule:8');
SET credit_lease.mock_now = '2030-01-01 00:02:00+00';
SELECT allowed, reason, error, amount, available FROM lease_check('rule:8', 'rule.sweeps', 4);
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

--
-- An error that the caller catches undoes what its own block has done, and the
-- caller is who it was: wherever the error comes from, and however deep.
--
CREATE SERVER rule_server FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://api.example.com');
INSERT INTO policy (account, credit, server) VALUES ('rule:9', 'leased', 'rule_server');
SELECT create_rule('raises', 'RAISE ''once more'' USING ERRCODE = ''40001'';');
INSERT INTO meter (feature, credit, rate) VALUES ('rule.two', 'tokens', 1), ('rule.two', 'images', 1), ('rule.leased', 'leased', 1);
INSERT INTO meter (feature, credit, rate, rule) VALUES ('rule.raises', 'images', 1, 'rules.raises');
SELECT available FROM unnest(ARRAY['tokens', 'images', 'leased']) credit, LATERAL lease_topup('rule:9', credit, 10);
SELECT available FROM lease_topup('rule:10', 'tokens', 10);
CREATE FUNCTION test.caught(call text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	code text;
BEGIN
	BEGIN
		INSERT INTO rules.told (account) VALUES ('caught');
		EXECUTE 'SELECT credit_lease.' || call;
	EXCEPTION WHEN OTHERS THEN
		code := SQLSTATE;
	END;
	RETURN concat_ws(', ', code, current_user, current_setting('search_path'), (SELECT count(*) FROM rules.told WHERE account = 'caught'));
END
$$;
UPDATE tranche SET remaining = remaining + 1 WHERE account = 'rule:9';
GRANT USAGE ON SCHEMA test TO regress_credit_lease_caller;
SET SESSION AUTHORIZATION regress_credit_lease_caller;
SELECT call, test.caught(call) FROM (VALUES
	(1, $$lease_check('rule:9', 'rule.told', 1)$$),
	(2, $$lease_check('rule:9', 'rule.two', 1)$$),
	(3, $$lease_check('rule:9', 'rule.leased', 100)$$),
	(4, $$lease_explain('rule:9', 'rule.told', 1)$$),
	(5, $$lease_explain('rule:9', 'rule.two', 1)$$),
	(6, $$lease_try_consume('rule:9', 'leased', 100)$$),
	(7, $$lease_check('rule:10', 'rule.raises', 1)$$),
	(8, $$lease_explain('rule:10', 'rule.raises', 1)$$)
  ) v (n, call) ORDER BY n;
SELECT current_user;
SHOW search_path;
RESET SESSION AUTHORIZATION;
SELECT count(*) FROM rules.told WHERE account = 'caught';
UPDATE tranche SET remaining = remaining - 1 WHERE account = 'rule:9';
REVOKE USAGE ON SCHEMA test FROM regress_credit_lease_caller;

DELETE FROM meter;
DELETE FROM policy WHERE account = 'rule:9';
DROP SERVER rule_server;
SET client_min_messages = warning;
DROP SCHEMA rules, "Odd rules" CASCADE;
RESET client_min_messages;
DROP FUNCTION test.create_rule, test.settings, test.caught;
DROP OWNED BY regress_credit_lease_caller, regress_credit_lease_other;
DROP ROLE regress_credit_lease_caller, regress_credit_lease_other;

SELECT * FROM credit_lease.lease_verify();
