--
-- meter: what a feature costs, which credit pays for it, and from when on.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

--
-- A row is checked when it is written.
--
SELECT n, r.code, r.message FROM (VALUES
	(1, $$ (feature, credit, rate) VALUES ('', 'tokens', 1) $$),
	(2, $$ (feature, credit, rate) VALUES (repeat('x', 513), 'tokens', 1) $$),
	(3, $$ (feature, credit, rate) VALUES (NULL, 'tokens', 1) $$),
	(4, $$ (feature, credit, rate) VALUES ('meter.bad', '', 1) $$),
	(5, $$ (feature, credit, rate) VALUES ('meter.bad', repeat('x', 513), 1) $$),
	(6, $$ (feature, credit, rate, event) VALUES ('meter.bad', 'tokens', 1, '') $$),
	-- a rate is positive, and exact in 24 digits
	(10, $$ (feature, credit, rate) VALUES ('meter.bad', 'tokens', 0) $$),
	(11, $$ (feature, credit, rate) VALUES ('meter.bad', 'tokens', -1) $$),
	(12, $$ (feature, credit, rate) VALUES ('meter.bad', 'tokens', 'NaN') $$),
	(13, $$ (feature, credit, rate) VALUES ('meter.bad', 'tokens', 'Infinity') $$),
	(14, $$ (feature, credit, rate) VALUES ('meter.bad', 'tokens', 1e26) $$),
	(15, $$ (feature, credit, rate) VALUES ('meter.bad', 'tokens', 1e-25) $$),
	-- what costs nothing has neither credit nor rate
	(20, $$ (feature, credit) VALUES ('meter.bad', 'tokens') $$),
	(21, $$ (feature, rate) VALUES ('meter.bad', 1) $$),
	-- a period does not end before it begins
	(30, $$ (feature, credit, rate, valid_from, valid_until) VALUES ('meter.bad', 'tokens', 1, '2030-01-02', '2030-01-01') $$),
	(31, $$ (feature, credit, rate, valid_from, valid_until) VALUES ('meter.bad', 'tokens', 1, '2030-01-02', '2030-01-02') $$),
	(32, $$ (feature, credit, rate, valid_from) VALUES ('meter.bad', 'tokens', 1, NULL) $$),
	-- one row for each instant
	(40, $$ (feature, credit, rate) VALUES ('meter.bad', 'tokens', 1), ('meter.bad', 'tokens', 2) $$),
	(41, $$ (feature) VALUES ('meter.bad'), ('meter.bad') $$),
	(50, $$ (feature, credit, rate, preference) VALUES ('meter.bad', 'tokens', 1, NULL) $$)
  ) v (n, row), LATERAL refusal('INSERT INTO meter ' || row) r
 ORDER BY n;
SELECT count(*) FROM meter WHERE feature = 'meter.bad';
-- So is a policy's smallest unit.
SELECT unit, r.code FROM (VALUES ('0'), ('-1'), ('NaN'), ('Infinity'), ('1e26'), ('1e-13'), ('0.1000000000001')) v (unit),
	LATERAL refusal(format('INSERT INTO policy (account, smallest_unit) VALUES (%L, %L)', 'meter:bad', unit)) r;
SELECT r.code FROM refusal($$ INSERT INTO policy (account, failure_mode) VALUES ('meter:bad', 'ajar') $$) r;

-- A rule is a function that is there, with the arguments and results of one ...
CREATE FUNCTION test.meter_rule(account text, feature text, quantity numeric, available numeric, subject jsonb,
		OUT allowed boolean, OUT reason text)
	LANGUAGE sql AS $$ SELECT true, NULL::text $$;
CREATE FUNCTION test."Meter rule"(account text, feature text, quantity numeric, available numeric, subject jsonb)
	RETURNS TABLE (allowed boolean, reason text) LANGUAGE sql AS $$ SELECT true, NULL::text $$;
CREATE FUNCTION test.meter_four(text, text, numeric, numeric, OUT allowed boolean, OUT reason text)
	LANGUAGE sql AS $$ SELECT true, NULL::text $$;
CREATE FUNCTION test.meter_integer(text, text, integer, numeric, jsonb, OUT allowed boolean, OUT reason text)
	LANGUAGE sql AS $$ SELECT true, NULL::text $$;
CREATE FUNCTION test.meter_boolean(text, text, numeric, numeric, jsonb) RETURNS boolean
	LANGUAGE sql AS $$ SELECT true $$;
CREATE FUNCTION test.meter_columns(text, text, numeric, numeric, jsonb, OUT ok boolean, OUT why text)
	LANGUAGE sql AS $$ SELECT true, NULL::text $$;
CREATE FUNCTION test.meter_types(text, text, numeric, numeric, jsonb, OUT allowed integer, OUT reason text)
	LANGUAGE sql AS $$ SELECT 1, NULL::text $$;
CREATE FUNCTION test.meter_reason(text, text, numeric, numeric, jsonb, OUT allowed boolean, OUT reason integer)
	LANGUAGE sql AS $$ SELECT true, 1 $$;
CREATE PROCEDURE test.meter_procedure(text, text, numeric, numeric, jsonb, OUT allowed boolean, OUT reason text)
	LANGUAGE sql AS $$ SELECT true, NULL::text $$;
SELECT rule, r.code, r.message FROM (VALUES
	(1, ''), (2, 'meter_rule'), (3, 'a.b.c'), (4, 'test.'), (5, 'test.meter rule'), (6, 'test.meter_rule; DROP'),
	(10, 'test.nowhere'), (11, 'nowhere.meter_rule'), (12, 'test.Meter_rule(text)'), (13, 'test."Meter_rule"'),
	(20, 'test.meter_four'), (21, 'test.meter_integer'), (22, 'test.meter_procedure'),
	(30, 'test.meter_boolean'), (31, 'test.meter_columns'), (32, 'test.meter_types'), (33, 'test.meter_reason')
  ) v (n, rule), LATERAL refusal(format('INSERT INTO meter (feature, credit, rate, rule) VALUES (%L, %L, 1, %L)', 'meter.bad', 'tokens', rule)) r
 ORDER BY n;
-- ... and is kept by its name, however it was spelled.
INSERT INTO meter (feature, credit, rate, rule) VALUES
	('meter.rule 1', 'tokens', 1, 'test.meter_rule'),
	('meter.rule 2', 'tokens', 1, ' Test . METER_RULE'),
	('meter.rule 3', 'tokens', 1, 'test.meter_rule(text, text, numeric, numeric, jsonb)'),
	('meter.rule 4', NULL, NULL, 'test."Meter rule"'),
	('meter.rule 5', 'tokens', 1, 'test."Meter rule"(text, text, numeric, numeric, jsonb)');
SELECT feature, rule FROM meter WHERE feature LIKE 'meter.rule%' ORDER BY feature;
SELECT code, message FROM refusal($$ UPDATE meter SET rule = 'test.meter_boolean' WHERE feature = 'meter.rule 1' $$);
UPDATE meter SET rule = NULL WHERE feature = 'meter.rule 1';
-- Other columns can be changed when the rule has gone.
DROP FUNCTION test."Meter rule";
UPDATE meter SET rate = 2 WHERE feature = 'meter.rule 5' RETURNING rate, rule;

--
-- What a quantity costs: exact, and rounded up to the credit's smallest unit.
--
INSERT INTO meter (feature, credit, rate) VALUES
	('meter.one', 'tokens', 1), ('meter.tiny', 'tokens', 0.0000015), ('meter.third', 'tokens', 0.333333333333),
	('meter.least', 'tokens', 1e-24), ('meter.most', 'tokens', 99999999999999999999999999);
INSERT INTO policy (account, credit, smallest_unit) VALUES
	('meter:unit', NULL, 1), ('meter:cent', NULL, 0.01), ('meter:odd', NULL, 0.3), ('meter:ten', 'tokens', 10), ('meter:ten', NULL, 7);
SELECT v.*, e.reason, e.amount FROM (VALUES
	-- nothing is rounded that need not be: twelve digits
	(1, 'meter:none', 'meter.tiny', 1.0),
	(2, 'meter:none', 'meter.tiny', 2000000),
	(3, 'meter:none', 'meter.tiny', 0.000001),
	(4, 'meter:none', 'meter.tiny', 0.0000001),
	(5, 'meter:none', 'meter.third', 3),
	(6, 'meter:none', 'meter.third', 0.5),
	(7, 'meter:none', 'meter.least', 1),
	(8, 'meter:none', 'meter.least', 1000000000001),
	(9, 'meter:none', 'meter.least', 1000000000000),
	(10, 'meter:none', 'meter.least', 0.000000000001),
	(11, 'meter:none', 'meter.one', 0.000000000001),
	(12, 'meter:none', 'meter.one', 99999999999999999999999999.999999999999),
	(13, 'meter:none', 'meter.most', 1),
	(14, 'meter:none', 'meter.most', 1.000000000001),
	-- a little less than a multiple, a multiple, and a little more
	(20, 'meter:unit', 'meter.tiny', 666666.666666),
	(21, 'meter:unit', 'meter.tiny', 2000000),
	(22, 'meter:unit', 'meter.tiny', 2000000.000000000001),
	(23, 'meter:unit', 'meter.tiny', 666666.666667),
	(24, 'meter:unit', 'meter.one', 2.999999999999),
	(25, 'meter:unit', 'meter.one', 3.000000000000),
	(26, 'meter:unit', 'meter.one', 3.000000000001),
	(27, 'meter:unit', 'meter.third', 3),
	(28, 'meter:unit', 'meter.least', 0.000000000001),
	(29, 'meter:unit', 'meter.one', 99999999999999999999999999),
	(30, 'meter:unit', 'meter.one', 99999999999999999999999999.000000000001),
	(31, 'meter:unit', 'meter.tiny', 0),
	(40, 'meter:cent', 'meter.one', 0.01),
	(41, 'meter:cent', 'meter.one', 0.010000000001),
	(42, 'meter:cent', 'meter.third', 1),
	-- a unit need not be a power of ten, and the most specific policy has it
	(50, 'meter:odd', 'meter.one', 0.9),
	(51, 'meter:odd', 'meter.one', 0.899999999999),
	(52, 'meter:odd', 'meter.one', 0.900000000001),
	(53, 'meter:odd', 'meter.one', 1),
	(54, 'meter:ten', 'meter.one', 71)
  ) v (n, account, feature, quantity), LATERAL lease_explain(account, feature, quantity) e
 ORDER BY n;

-- The check holds what that says, and the tracking charges it.
SELECT available FROM lease_topup('meter:unit', 'tokens', 10);
SELECT reservation_id, allowed, amount, rate, available FROM lease_check('meter:unit', 'meter.tiny', 666666.666667) \gset c_
SELECT :'c_allowed' AS allowed, :c_amount AS amount, :c_rate AS rate, :c_available AS available;
SELECT consumed, refunded, available FROM lease_track('meter:unit', :c_reservation_id, 666666.666666);
SELECT feature, quantity, rate, unit, tracked, consumed FROM reservation WHERE account = 'meter:unit';
-- The unit is that of the check, as the rate is.
SELECT reservation_id FROM lease_check('meter:unit', 'meter.one', 2.5) \gset
UPDATE policy SET smallest_unit = 0.1 WHERE account = 'meter:unit';
SELECT consumed, refunded, available FROM lease_track('meter:unit', :reservation_id, 1.5);
SELECT amount FROM lease_explain('meter:unit', 'meter.one', 1.55);

--
-- Validity: the latest of those that are valid counts.
--
INSERT INTO meter (feature, credit, rate, event, valid_from, valid_until) VALUES
	('meter.time', 'tokens', 1, 'old', DEFAULT, NULL),
	('meter.time', 'tokens', 2, 'new', '2030-02-01 00:00:00+00', NULL),
	-- a promotion, after which it is as it was
	('meter.time', 'tokens', 0.5, 'promotion', '2030-03-01 00:00:00+00', '2030-03-08 00:00:00+00'),
	('meter.later', 'tokens', 3, NULL, '2030-02-01 00:00:00+00', '2030-03-01 00:00:00+00'),
	('meter.later', NULL, NULL, NULL, '2030-04-01 00:00:00+00', NULL);
CREATE FUNCTION pg_temp.costs(account text, feature text, quantity numeric, at timestamptz,
		OUT reason text, OUT rate numeric, OUT amount numeric, OUT event text) LANGUAGE plpgsql AS $$
BEGIN
	PERFORM set_config('credit_lease.mock_now', at::text, true);
	SELECT e.reason, e.rate, e.amount, e.event INTO reason, rate, amount, event FROM credit_lease.lease_explain(account, feature, quantity) e;
END
$$;
BEGIN;
SELECT at, c.* FROM unnest(ARRAY['2020-01-01 00:00:00+00', '2030-01-31 23:59:59.999999+00', '2030-02-01 00:00:00+00',
	'2030-02-28 23:59:59.999999+00', '2030-03-01 00:00:00+00', '2030-03-07 23:59:59.999999+00', '2030-03-08 00:00:00+00']::timestamptz[]) at,
	LATERAL pg_temp.costs('meter:time', 'meter.time', 10, at) c;
SELECT at, c.* FROM unnest(ARRAY['2030-01-31 23:59:59.999999+00', '2030-02-01 00:00:00+00', '2030-02-28 23:59:59.999999+00',
	'2030-03-01 00:00:00+00', '2030-04-01 00:00:00+00']::timestamptz[]) at,
	LATERAL pg_temp.costs('meter:time', 'meter.later', 10, at) c;
ROLLBACK;

-- A hold is settled at the rate that it was made with, whatever there is now.
SELECT available FROM lease_topup('meter:time', 'tokens', 100);
SET credit_lease.mock_now = '2030-01-31 23:59:30+00';
SELECT reservation_id AS old FROM lease_check('meter:time', 'meter.time', 10) \gset
SET credit_lease.mock_now = '2030-02-01 00:00:00+00';
SELECT reservation_id AS new FROM lease_check('meter:time', 'meter.time', 10) \gset
SELECT consumed, refunded, available FROM lease_track('meter:time', :old, 8);
DELETE FROM meter WHERE feature = 'meter.time';
SELECT consumed, refunded, available FROM lease_track('meter:time', :new, 8);
SELECT reason FROM lease_check('meter:time', 'meter.time', 10);

--
-- Several credits: the one with a live lease and enough first, then by preference.
--
CREATE SERVER meter_server FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://api.example.com');
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
INSERT INTO meter (feature, credit, rate, preference, event) VALUES
	('meter.mixed', 'b first', 1, 1, NULL), ('meter.mixed', 'c second', 2, 2, 'mixed'), ('meter.mixed', 'a third', 3, 3, NULL);

-- By preference, and by the name where that is the same; it falls back where
-- the preferred is short.
SELECT credit, available FROM (VALUES ('a third', 90), ('b first', 10), ('c second', 40)) v (credit, amount),
	LATERAL lease_topup('meter:mixed', credit, amount);
SELECT allowed, reason, error, credit, amount, rate, event, available FROM lease_check('meter:mixed', 'meter.mixed', 6);
SELECT allowed, reason, error, credit, amount, rate, event, available FROM lease_check('meter:mixed', 'meter.mixed', 6);
SELECT allowed, reason, error, credit, amount, rate, event, available FROM lease_check('meter:mixed', 'meter.mixed', 20);
-- Where none has enough, it is the preferred that says so.
SELECT allowed, reason, error, credit, amount, rate, available FROM lease_check('meter:mixed', 'meter.mixed', 20);
SELECT allowed, reason, error, credit, amount, rate, available FROM lease_check('meter:mixed', 'meter.mixed', 20, on_failure => 'open');
UPDATE meter SET preference = 2 WHERE feature = 'meter.mixed';
SELECT credit, available FROM lease_check('meter:mixed', 'meter.mixed', 1);
SELECT credit, available, reserved FROM lease_balance('meter:mixed') ORDER BY credit;
UPDATE meter SET preference = 1 WHERE feature = 'meter.mixed' AND credit = 'b first';

-- A frozen credit is passed over.
SELECT available FROM lease_topup('meter:mixed', 'b first', 100);
SELECT lease_freeze('meter:mixed', 'b first');
SELECT reason, credit FROM lease_check('meter:mixed', 'meter.mixed', 1);
SELECT lease_freeze('meter:mixed', 'a third');
SELECT reason, credit FROM lease_check('meter:mixed', 'meter.mixed', 1);
-- also to say that there is not enough, and to pass without
SELECT reason, error, credit, amount FROM lease_check('meter:mixed', 'meter.mixed', 1000);
SELECT reason, error, credit, amount FROM lease_check('meter:mixed', 'meter.mixed', 1000, on_failure => 'open');
SELECT lease_freeze('meter:mixed');
SELECT allowed, reason, error, credit, reservation_id FROM lease_check('meter:mixed', 'meter.mixed', 1);
SELECT allowed, reason, error, credit, reservation_id FROM lease_check('meter:mixed', 'meter.mixed', 1, on_failure => 'open');

-- A live lease with enough comes before what is preferred, one with less does not.
SELECT credit, available FROM unnest(ARRAY['b first', 'c second', 'a third']) credit, LATERAL lease_topup('meter:lease', credit, 100);
SELECT lease_install('meter:lease', 'a third', 'L1', 20, '2030-01-01 00:05:00+00', 'meter_server');
SELECT credit FROM lease_explain('meter:lease', 'meter.mixed', 40);
SELECT lease_install('meter:lease', 'c second', 'L2', 20, '2030-01-01 00:10:00+00', 'meter_server');
SELECT credit FROM lease_explain('meter:lease', 'meter.mixed', 40);
SELECT credit FROM lease_explain('meter:lease', 'meter.mixed', 61);
-- 'a third' has 120, too few for 41 at 3 each
SELECT credit FROM lease_explain('meter:lease', 'meter.mixed', 41);
SELECT lease_freeze('meter:lease', 'c second');
SELECT credit FROM lease_explain('meter:lease', 'meter.mixed', 40);
SELECT lease_unfreeze('meter:lease', 'c second');
-- Expired or released, it is not live.
SET credit_lease.mock_now = '2030-01-01 00:04:59.999999+00';
SELECT lease_release('meter:lease', 'c second');
SELECT credit FROM lease_explain('meter:lease', 'meter.mixed', 1);
SET credit_lease.mock_now = '2030-01-01 00:05:00+00';
SELECT credit FROM lease_explain('meter:lease', 'meter.mixed', 1);
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

-- What an expired hold had counts, swept or not (rule 7).
SELECT lease_install('meter:lapsed', 'a third', 'L1', 20, '2030-01-01 00:05:00+00', 'meter_server');
SELECT available FROM lease_topup('meter:lapsed', 'b first', 5);
SELECT amount FROM lease_reserve('meter:lapsed', 'a third', 20, '1 minute');
SELECT amount FROM lease_reserve('meter:lapsed', 'b first', 5, '1 minute');
SELECT reason, credit, available FROM lease_check('meter:lapsed', 'meter.mixed', 7);
SET credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT reason, credit, available FROM lease_explain('meter:lapsed', 'meter.mixed', 7);
SELECT reason, credit, available FROM lease_check('meter:lapsed', 'meter.mixed', 7);
SELECT reason, credit, available FROM lease_explain('meter:lapsed', 'meter.mixed', 0);
SELECT reason, credit, available FROM lease_explain('meter:lapsed', 'meter.mixed', 5);
SELECT reason, credit, available FROM lease_check('meter:lapsed', 'meter.mixed', 0);
SELECT reason, credit, available FROM lease_check('meter:lapsed', 'meter.mixed', 5);
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

-- A row without credit counts only where there is no other.
INSERT INTO meter (feature) VALUES ('meter.mixed');
SELECT credit FROM lease_explain('meter:lease', 'meter.mixed', 1);
DELETE FROM meter WHERE feature = 'meter.mixed' AND credit IS NOT NULL;
SELECT allowed, reason, credit, amount, rate, event, available FROM lease_explain('meter:lease', 'meter.mixed', 1);

-- What usage is reported as: what the call says, then the meter, the policy and the credit's name.
INSERT INTO meter (feature, credit, rate) VALUES ('meter.event', 'tokens', 1);
SELECT available FROM lease_topup('meter:event', 'tokens', 10);
SELECT event FROM lease_check('meter:event', 'meter.event', 1);
INSERT INTO policy (account, event) VALUES ('meter:event', 'from policy');
SELECT event FROM lease_check('meter:event', 'meter.event', 1);
UPDATE meter SET event = 'from meter' WHERE feature = 'meter.event';
SELECT event FROM lease_check('meter:event', 'meter.event', 1);
SELECT event FROM lease_check('meter:event', 'meter.event', 1, 'from call');
SELECT event FROM lease_check('meter:event', 'meter.event', 0, 'from call');
SELECT event FROM reservation WHERE account = 'meter:event' ORDER BY reservation_id;

DELETE FROM meter;
DELETE FROM policy WHERE account LIKE 'meter:%';
DROP FUNCTION test.meter_rule, test.meter_four, test.meter_integer, test.meter_boolean, test.meter_columns, test.meter_types, test.meter_reason;
DROP PROCEDURE test.meter_procedure;
DROP SERVER meter_server;

SELECT * FROM credit_lease.lease_verify();
