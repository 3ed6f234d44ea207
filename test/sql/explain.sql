--
-- lease_explain: what lease_check would answer now, and why. It goes the same
-- way, and leaves nothing behind.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

CREATE SERVER explain_server FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://api.example.com');
CREATE TABLE test.explain_note (note text);
CREATE FUNCTION test.explain_rule(account text, feature text, quantity numeric, available numeric, subject jsonb,
		OUT allowed boolean, OUT reason text)
	LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO explain_note VALUES (format('%s of %s', quantity, available));
	IF quantity = 13 THEN RAISE 'not thirteen'; END IF;
	allowed := quantity <> 7;
	reason := 'seven';
END
$$;
CREATE FUNCTION test.explain_spends(account text, feature text, quantity numeric, available numeric, subject jsonb,
		OUT allowed boolean, OUT reason text)
	LANGUAGE sql AS $$
	SELECT c.applied, NULL::text FROM credit_lease.lease_consume(account, 'tokens', 5, 'a key') c $$;
INSERT INTO meter (feature, credit, rate, preference, event, rule) VALUES
	('explain.call', 'tokens', 0.5, 1, 'call', NULL),
	('explain.ruled', 'tokens', 0.5, 1, 'call', 'test.explain_rule'),
	('explain.spends', 'tokens', 0.5, 1, 'call', 'test.explain_spends'),
	('explain.mixed', 'tokens', 1, 1, NULL, NULL), ('explain.mixed', 'images', 2, 2, NULL, 'test.explain_rule'), ('explain.mixed', 'words', 3, 3, NULL, NULL),
	('explain.free', NULL, NULL, 1, NULL, NULL), ('explain.flag', NULL, NULL, 1, NULL, 'test.explain_rule');

-- Which tranches would burn, in their order, with # for their numbers; and the
-- limits of each credit that may pay, in the order in which they are tried.
CREATE FUNCTION pg_temp.tranches(tranches jsonb) RETURNS text LANGUAGE sql AS $$
	SELECT string_agg((t - 'tranche_id')::text || CASE WHEN t ? 'tranche_id' THEN ' #' END, chr(10) ORDER BY n)
	  FROM jsonb_array_elements(tranches) WITH ORDINALITY AS e (t, n) $$;

--
-- It says what decides.
--
SELECT available FROM lease_topup('explain:1', 'tokens', 3);
SELECT available FROM lease_topup('explain:1', 'tokens', 100, expires_at => '2030-06-01', priority => 200);
SELECT available FROM lease_topup('explain:1', 'tokens', 4, priority => 50, expires_at => '2030-02-01');
SELECT lease_install('explain:1', 'tokens', 'L1', 10, '2030-01-01 00:05:00+00', 'explain_server');
SELECT allowed, reason, error, credit, amount, rate, event, available, pg_temp.tranches(tranches) AS tranches
  FROM lease_explain('explain:1', 'explain.call', 40);
SELECT jsonb_pretty(limits) FROM lease_explain('explain:1', 'explain.call', 40);
-- a part of one tranche is enough
SELECT pg_temp.tranches(tranches) FROM lease_explain('explain:1', 'explain.call', 1);
-- the numbers are theirs
SELECT bool_and(t.account = 'explain:1' AND t.credit = 'tokens' AND t.remaining = (e->>'remaining')::numeric) AS right
  FROM lease_explain('explain:1', 'explain.call', 40) x, jsonb_array_elements(x.tranches) e LEFT JOIN tranche t ON t.tranche_id = (e->>'tranche_id')::bigint;
-- what the policies say, and a freeze
INSERT INTO policy (account, server, lease_size, failure_mode, hold_ttl, smallest_unit) VALUES ('explain:1', 'explain_server', 500, 'open', '1 hour', 0.01);
SELECT amount FROM lease_reserve('explain:1', 'tokens', 6);
SELECT available, l FROM lease_explain('explain:1', 'explain.ruled', 0.003) x, jsonb_array_elements(x.limits) l;
SELECT lease_freeze('explain:1', 'tokens');
SELECT allowed, reason, tranches, l->>'frozen' AS frozen FROM lease_explain('explain:1', 'explain.call', 1) x, jsonb_array_elements(x.limits) l;
SELECT lease_unfreeze('explain:1');
DELETE FROM policy WHERE account = 'explain:1';

-- Several credits, in the order in which they are tried.
SELECT available FROM lease_topup('explain:2', 'tokens', 10);
SELECT available FROM lease_topup('explain:2', 'images', 100);
SELECT quantity, x.allowed, x.reason, x.credit, x.amount, x.available, pg_temp.tranches(x.tranches) AS tranches
  FROM unnest(ARRAY[1, 10, 11, 50, 51]) quantity, LATERAL lease_explain('explain:2', 'explain.mixed', quantity) x;
SELECT l - ARRAY['failure_mode', 'smallest_unit', 'hold_ttl', 'server', 'lease_size', 'upstream_balance'] AS limits
  FROM lease_explain('explain:2', 'explain.mixed', 11) x, jsonb_array_elements(x.limits) l;
SELECT lease_install('explain:2', 'words', 'L1', 33, '2030-01-01 00:05:00+00', 'explain_server');
SELECT quantity, x.credit, (SELECT string_agg(l->>'credit', ', ' ORDER BY n) FROM jsonb_array_elements(x.limits) WITH ORDINALITY e (l, n)) AS tried
  FROM unnest(ARRAY[11, 12]) quantity, LATERAL lease_explain('explain:2', 'explain.mixed', quantity) x;

-- Nothing to hold, nobody to pay, nothing to say.
SELECT feature, quantity, x.allowed, x.reason, x.error, x.credit, x.amount, x.rate, x.event, x.available, x.tranches, x.limits IS NULL AS no_limits, jsonb_array_length(x.limits) AS limits
  FROM (VALUES ('explain.call', 0::numeric), ('explain.free', 5), ('explain.flag', 7), ('explain.nothing', 1), ('explain.call', -1), ('explain.call', NULL), ('explain.call', 'NaN'))
	v (feature, quantity), LATERAL lease_explain('explain:2', feature, quantity) x;
SELECT limits->0->'credit' AS credit, limits->0->'rule' AS rule FROM lease_explain('explain:2', 'explain.flag', 1);
SELECT call, r.code, r.message FROM (VALUES
	(1, $$ NULL, 'explain.call', 1 $$), (2, $$ '', 'explain.call', 1 $$), (3, $$ 'explain:2', NULL, 1 $$), (4, $$ 'explain:2', '', 1 $$)
  ) v (n, call), LATERAL refusal(format('SELECT lease_explain(%s)', call)) r
 ORDER BY n;

--
-- It answers as a check does.
--
SELECT available FROM lease_topup('explain:3', 'tokens', 20, priority => 1);
SELECT available FROM lease_topup('explain:3', 'tokens', 20);
SELECT available FROM lease_topup('explain:3', 'images', 100);
SELECT available FROM lease_topup('explain:open', 'tokens', 2);
SELECT available FROM lease_topup('explain:frozen', 'tokens', 2);
SELECT lease_freeze('explain:frozen');
INSERT INTO policy (account, failure_mode) VALUES ('explain:open', 'open');
INSERT INTO policy (account, smallest_unit) VALUES ('explain:3', 3);
CREATE FUNCTION pg_temp.compare(account text, feature text, quantity numeric, OUT reason text, OUT error text, OUT held numeric, OUT same boolean, OUT same_tranches boolean)
	LANGUAGE plpgsql AS $$
DECLARE
	e credit_lease.explain_result := credit_lease.lease_explain(account, feature, quantity);
	c credit_lease.check_result;
	burned jsonb;
BEGIN
	BEGIN
		c := credit_lease.lease_check(account, feature, quantity);
		reason := c.reason;
		error := c.error;
		SELECT r.amount, jsonb_agg(jsonb_build_array(p.id, p.amount) ORDER BY p.n) INTO held, burned FROM credit_lease.reservation r,
			unnest(r.tranche_ids, r.tranche_amounts) WITH ORDINALITY AS p (id, amount, n) WHERE r.reservation_id = c.reservation_id GROUP BY 1;
		same := (e.allowed, e.reason, e.error, e.credit, e.amount, e.rate, e.event, e.available)
			IS NOT DISTINCT FROM (c.allowed, c.reason, c.error, c.credit, c.amount, c.rate, c.event, c.available);
		same_tranches := burned IS NOT DISTINCT FROM (SELECT jsonb_agg(jsonb_build_array(t->'tranche_id', t->'amount') ORDER BY n)
			FROM jsonb_array_elements(e.tranches) WITH ORDINALITY AS x (t, n));
		RAISE SQLSTATE 'P9999';
	EXCEPTION WHEN SQLSTATE 'P9999' THEN
	END;
END
$$;
SELECT v.*, c.* FROM (VALUES
	('explain:3', 'explain.call', 10), ('explain:3', 'explain.call', 60), ('explain:3', 'explain.call', 100), ('explain:3', 'explain.call', 0),
	('explain:3', 'explain.ruled', 3), ('explain:3', 'explain.ruled', 7), ('explain:3', 'explain.ruled', 13), ('explain:3', 'explain.ruled', 0),
	('explain:3', 'explain.spends', 20), ('explain:3', 'explain.spends', 75),
	('explain:3', 'explain.mixed', 39), ('explain:3', 'explain.mixed', 48), ('explain:3', 'explain.mixed', 80),
	('explain:3', 'explain.free', 1), ('explain:3', 'explain.flag', 7), ('explain:3', 'explain.nothing', 1), ('explain:3', 'explain.call', -1),
	('explain:3', 'explain.call', 1e26), ('explain:3', 'explain.call', 99999999999999999999999999),
	('explain:open', 'explain.call', 100), ('explain:open', 'explain.ruled', 100), ('explain:open', 'explain.ruled', 13),
	('explain:frozen', 'explain.call', 1), ('explain:frozen', 'explain.mixed', 1),
	('explain:nobody', 'explain.call', 1), ('explain:nobody', 'explain.mixed', 1), ('explain:nobody', 'explain.call', 0)
  ) v (account, feature, quantity), LATERAL pg_temp.compare(account, feature, quantity) c;

--
-- It leaves nothing: neither what it holds to find out, nor what it gives back
-- of expired holds, nor what the rule does.
--
SELECT count(*) AS notes FROM test.explain_note;
SELECT amount FROM lease_reserve('explain:3', 'tokens', 30, '1 minute');
SET credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT allowed, amount, available FROM lease_explain('explain:3', 'explain.call', 60);
SELECT changed_by(format('SELECT lease_explain(%L, %L, %s)', account, feature, quantity))
  FROM (VALUES ('explain:3', 'explain.call', 60), ('explain:3', 'explain.ruled', 60), ('explain:3', 'explain.ruled', 7), ('explain:3', 'explain.ruled', 13),
	('explain:3', 'explain.spends', 10), ('explain:3', 'explain.call', 1000), ('explain:open', 'explain.call', 100), ('explain:nobody', 'explain.mixed', 1),
	('explain:frozen', 'explain.call', 1)) v (account, feature, quantity);
SELECT count(*) AS notes FROM test.explain_note;
SELECT count(*) FROM account WHERE account = 'explain:nobody';
-- nor in the transaction that it is in, which goes on
BEGIN;
SELECT allowed FROM lease_explain('explain:3', 'explain.spends', 10);
SELECT allowed FROM lease_check('explain:3', 'explain.spends', 10);
SELECT allowed FROM lease_explain('explain:3', 'explain.ruled', 13);
SELECT allowed, available FROM lease_check('explain:3', 'explain.call', 10);
COMMIT;
SELECT available, reserved, consumed FROM lease_balance('explain:3', 'tokens');
SELECT count(*) AS notes FROM test.explain_note;

-- A pool that is short is not supplied for it.
INSERT INTO policy (account, server) VALUES ('explain:4', 'explain_server');
SELECT available FROM lease_topup('explain:4', 'tokens', 1);
SELECT allowed, reason, error, amount, available, limits->0->>'server' AS server, limits->0->'lease_size' AS lease_size FROM lease_explain('explain:4', 'explain.call', 10);
SELECT count(*) FROM upstream_request WHERE account = 'explain:4';

DELETE FROM meter;
DELETE FROM policy WHERE account LIKE 'explain:%';
DROP FUNCTION test.explain_rule, test.explain_spends;
DROP TABLE test.explain_note;
DROP SERVER explain_server;

SELECT * FROM credit_lease.lease_verify();
