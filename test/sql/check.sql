--
-- lease_check: may an account use a quantity of a feature? If so, what that
-- costs is held.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

CREATE SERVER check_server FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://api.example.com');
CREATE FUNCTION test.check_rule(account text, feature text, quantity numeric, available numeric, subject jsonb,
		OUT allowed boolean, OUT reason text)
	LANGUAGE sql AS $$ SELECT coalesce((subject->>'allowed')::boolean, true), subject->>'reason' $$;
INSERT INTO meter (feature, credit, rate, event, rule) VALUES
	('check.call', 'tokens', 0.5, 'call', NULL),
	('check.ruled', 'tokens', 0.5, 'call', 'test.check_rule'),
	('check.free', NULL, NULL, NULL, NULL),
	('check.flag', NULL, NULL, NULL, 'test.check_rule');

--
-- allowed
--
SELECT available FROM lease_topup('check:1', 'tokens', 100);
SELECT reservation_id FROM lease_check('check:1', 'check.call', 10) \gset
SELECT account, credit, amount, created_at, expires_at, metadata, feature, quantity
  FROM open_reservation WHERE reservation_id = :reservation_id;
SELECT feature, quantity, rate, unit, event, tracked, traits, track_entry_id FROM reservation WHERE account = 'check:1';
SELECT kind, amount, available, reservation_id = :reservation_id AS of_the_hold FROM ledger WHERE account = 'check:1' ORDER BY entry_id;
SELECT available, reserved, consumed FROM lease_balance('check:1');
-- all columns, the hold's number aside
SELECT allowed, reason, error, reservation_id IS NOT NULL AS holds, credit, amount, rate, event, available, expires_at
  FROM lease_check('check:1', 'check.call', 10, 'my event', 'closed', '{"user": 1}', '5 minutes');
-- a hold lives as long as the policy says where the call does not
INSERT INTO policy (account, hold_ttl) VALUES ('check:1', '1 hour');
SELECT expires_at FROM lease_check('check:1', 'check.call', 1);
DELETE FROM policy WHERE account = 'check:1';
-- to the last credit
SELECT allowed, amount, available FROM lease_check('check:1', 'check.call', 179);
SELECT allowed, reason, amount, available FROM lease_check('check:1', 'check.call', 0.000000000001);

-- It is part of the caller's transaction.
BEGIN;
SELECT available FROM lease_topup('check:1', 'tokens', 1);
SELECT allowed, available FROM lease_check('check:1', 'check.call', 2);
ROLLBACK;
SELECT available, reserved FROM lease_balance('check:1');

--
-- insufficient_credit
--
SELECT available FROM lease_topup('check:2', 'tokens', 4.5);
SELECT allowed, reason, error, reservation_id, credit, amount, rate, event, available, expires_at
  FROM lease_check('check:2', 'check.call', 10);
SELECT changed_by($$ SELECT lease_check('check:2', 'check.call', 10) $$);
-- an account that nobody knows
SELECT allowed, reason, error, reservation_id, credit, amount, available FROM lease_check('check:nobody', 'check.call', 1);
SELECT changed_by($$ SELECT lease_check('check:nobody', 'check.call', 1) $$);
-- what an expired hold had can be held again (rule 7)
SELECT amount FROM lease_reserve('check:2', 'tokens', 4.5, '1 minute');
SELECT reason, available FROM lease_check('check:2', 'check.call', 9);
SET credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT reason, available FROM lease_check('check:2', 'check.call', 9);
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
-- an expired tranche cannot
SELECT available FROM lease_topup('check:3', 'tokens', 5, expires_at => '2030-01-01 00:01:00+00');
SET credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT reason, available FROM lease_check('check:3', 'check.call', 1);
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

--
-- lease_acquire_failed: a pool with an upstream that could not be asked. No
-- worker runs here.
--
INSERT INTO policy (account, server) VALUES ('check:4', 'check_server');
SELECT available FROM lease_topup('check:4', 'tokens', 4);
SELECT allowed, reason, error, reservation_id, credit, amount, available FROM lease_check('check:4', 'check.call', 10);
SELECT changed_by($$ SELECT lease_check('check:4', 'check.call', 10) $$);
SELECT allowed, reason, error, amount, available FROM lease_check('check:4', 'check.call', 4);
-- nor where waiting could not help
BEGIN;
SELECT allowed FROM lease_check('check:4', 'check.call', 1);
SELECT allowed, reason, available FROM lease_check('check:4', 'check.call', 10);
ROLLBACK;
SET credit_lease.acquire_timeout = 0;
SELECT allowed, reason, available FROM lease_check('check:4', 'check.call', 10);
RESET credit_lease.acquire_timeout;
-- a credit that has enough, where the first could not be supplied, has nothing to explain
INSERT INTO meter (feature, credit, rate, preference) VALUES ('check.two', 'tokens', 1, 1), ('check.two', 'images', 1, 2);
SELECT available FROM lease_topup('check:4', 'images', 10);
SELECT allowed, reason, error, credit, amount, available FROM lease_check('check:4', 'check.two', 6);
SELECT allowed, reason, error, credit, amount, available FROM lease_check('check:4', 'check.two', 60);

-- nobody waits for a credit that is frozen
INSERT INTO policy (account, credit, server) VALUES ('check:9', 'tokens', 'check_server');
SELECT allowed, reason, error, credit FROM lease_check('check:9', 'check.two', 1);
SELECT lease_freeze('check:9', 'tokens');
SELECT allowed, reason, error, credit FROM lease_check('check:9', 'check.two', 1);

--
-- denied_by_rule, and a rule's own reason; what was held for it is nothing
--
SELECT available FROM lease_topup('check:5', 'tokens', 100);
SELECT allowed, reason, error, reservation_id, credit, amount, rate, event, available, expires_at
  FROM lease_check('check:5', 'check.ruled', 10, subject => '{"allowed": false}');
SELECT allowed, reason, error, amount, available FROM lease_check('check:5', 'check.ruled', 10, subject => '{"allowed": false, "reason": "not_on_sundays"}');
-- what a rule calls allowed is not
SELECT allowed, reason, error FROM lease_check('check:5', 'check.ruled', 10, subject => '{"allowed": false, "reason": "allowed"}');
SELECT changed_by($$ SELECT lease_check('check:5', 'check.ruled', 10, subject => '{"allowed": false}') $$);
SELECT allowed, reason, error, amount, available FROM lease_check('check:5', 'check.ruled', 10, subject => '{"reason": "why not"}');
-- who is short is not asked about
SELECT allowed, reason, error, amount, available FROM lease_check('check:5', 'check.ruled', 1000, subject => '{"allowed": false}');

--
-- not_metered
--
SELECT allowed, reason, error, reservation_id, credit, amount, rate, event, available, expires_at
  FROM lease_check('check:5', 'check.nothing', 10);
SELECT allowed, reason, event FROM lease_check('check:5', 'check.nothing', 10, 'my event', 'open');
SELECT changed_by($$ SELECT lease_check('check:5', 'check.nothing', 10) $$);

--
-- frozen, whatever the failure mode
--
SELECT lease_freeze('check:5', 'tokens', 'unpaid');
SELECT allowed, reason, error, reservation_id, credit, amount, available FROM lease_check('check:5', 'check.call', 10);
SELECT allowed, reason, error, reservation_id, amount, available FROM lease_check('check:5', 'check.call', 1000, on_failure => 'open');
SELECT allowed, reason, error FROM lease_check('check:5', 'check.ruled', 10, subject => '{"allowed": false}');
SELECT changed_by($$ SELECT lease_check('check:5', 'check.call', 10) $$);
SELECT lease_unfreeze('check:5');
SELECT lease_freeze('check:frozen');
SELECT allowed, reason FROM lease_check('check:frozen', 'check.call', 1, on_failure => 'open');

--
-- invalid_quantity
--
SELECT quantity, c.* FROM unnest(ARRAY[-1, NULL, 'NaN', 'Infinity', '-Infinity', 1e26, 1e-13, -0.000000000001]::numeric[]) quantity,
	LATERAL lease_check('check:5', 'check.call', quantity) c;
SELECT reason, error FROM lease_check('check:5', 'check.nothing', -1, on_failure => 'open');
SELECT changed_by($$ SELECT lease_check('check:5', 'check.call', 'NaN') $$);
-- digits that say nothing are no digits
SELECT allowed, amount FROM lease_check('check:5', 'check.call', 1.00000000000000000000);

-- What is wrong with the call and not with the quantity is 22023.
SELECT call, r.code, r.message FROM (VALUES
	(1, $$ NULL, 'check.call', 1 $$),
	(2, $$ '', 'check.call', 1 $$),
	(3, $$ repeat('x', 513), 'check.call', 1 $$),
	(4, $$ 'check:5', NULL, 1 $$),
	(5, $$ 'check:5', '', 1 $$),
	(6, $$ 'check:5', repeat('x', 513), 1 $$),
	(7, $$ 'check:5', 'check.call', 1, event => '' $$),
	(8, $$ 'check:5', 'check.call', 1, on_failure => 'ajar' $$),
	(9, $$ 'check:5', 'check.call', 1, on_failure => '' $$),
	(10, $$ 'check:5', 'check.call', 1, on_failure => 'Open' $$),
	(11, $$ 'check:5', 'check.call', 1, ttl => '0' $$),
	(12, $$ 'check:5', 'check.call', 1, ttl => '-1 s' $$),
	(13, $$ 'check:5', 'check.call', 1, ttl => '11 years' $$)
  ) v (n, call), LATERAL refusal(format('SELECT lease_check(%s)', call)) r
 ORDER BY n;

--
-- Nothing to pay: a quantity of 0, and what costs nothing. The rule is asked
-- alone, and nothing is held.
--
SELECT c.* FROM lease_check('check:5', 'check.call', 0) c;
SELECT c.* FROM lease_check('check:5', 'check.ruled', 0, subject => '{"allowed": false, "reason": "no"}') c;
SELECT c.* FROM lease_check('check:5', 'check.free', 7) c;
SELECT c.* FROM lease_check('check:nobody', 'check.free', 0) c;
SELECT c.* FROM lease_check('check:5', 'check.flag', 1, subject => '{"allowed": true}') c;
SELECT c.* FROM lease_check('check:5', 'check.flag', 1, subject => '{"allowed": false}') c;
SELECT c.* FROM lease_check('check:5', 'check.flag', -1) c;
SELECT changed_by($$ SELECT lease_check('check:5', 'check.ruled', 0), lease_check('check:5', 'check.free', 7) $$);
-- also of a frozen account, which spends nothing by that
SELECT allowed, reason FROM lease_check('check:frozen', 'check.free', 1);

--
-- Failure modes: open bypasses the credit gate, and nothing else. What there
-- is is held.
--
SELECT available FROM lease_topup('check:6', 'tokens', 3);
SELECT allowed, reason, error, reservation_id IS NOT NULL AS holds, credit, amount, rate, available, expires_at
  FROM lease_check('check:6', 'check.call', 10, on_failure => 'open');
-- maybe nothing
SELECT allowed, reason, error, reservation_id IS NOT NULL AS holds, credit, amount, rate, available, expires_at
  FROM lease_check('check:6', 'check.call', 10, on_failure => 'open');
SELECT amount, tranche_ids <> '{}' AS has_parts, feature, quantity FROM reservation WHERE account = 'check:6' ORDER BY reservation_id;
SELECT kind, amount, available FROM ledger WHERE account = 'check:6' ORDER BY entry_id;
-- or of nobody
SELECT allowed, reason, error, amount, available FROM lease_check('check:new', 'check.call', 10, on_failure => 'open');
SELECT account, credit, amount FROM open_reservation WHERE account = 'check:new';
-- where there is enough there is nothing to bypass
SELECT available FROM lease_topup('check:6', 'tokens', 3);
SELECT allowed, reason, error, amount, available FROM lease_check('check:6', 'check.call', 1, on_failure => 'open');
-- the rule decides, and one that fails denies
SELECT allowed, reason, error, amount FROM lease_check('check:6', 'check.ruled', 100, on_failure => 'open', subject => '{"allowed": false}');
SELECT allowed, reason, error, amount FROM lease_check('check:6', 'check.ruled', 100, on_failure => 'open', subject => '{"allowed": "oh"}');
SELECT allowed, reason, error, amount FROM lease_check('check:6', 'check.ruled', 100, on_failure => 'open');
SELECT allowed, reason, error FROM lease_check('check:6', 'check.nothing', 100, on_failure => 'open');
SELECT allowed, reason, error FROM lease_check('check:6', 'check.call', -1, on_failure => 'open');
SELECT count(*) AS holds, sum(amount) FROM open_reservation WHERE account = 'check:6';
-- the upstream that could not be asked
SELECT allowed, reason, error, amount, available FROM lease_check('check:4', 'check.call', 10, on_failure => 'open');
SELECT allowed, reason, error, amount, available FROM lease_check('check:4', 'check.ruled', 10, on_failure => 'open', subject => '{"allowed": false}');

-- By policy, and the call has the last word.
INSERT INTO policy (account, credit, failure_mode) VALUES ('check:7', NULL, 'open'), ('check:7', 'tokens', NULL), ('check:7', 'images', 'closed');
SELECT available FROM lease_topup('check:7', 'tokens', 1);
SELECT allowed, reason, error, amount FROM lease_check('check:7', 'check.call', 10);
SELECT allowed, reason, error, amount FROM lease_check('check:7', 'check.call', 10, on_failure => 'closed');
UPDATE policy SET failure_mode = 'closed' WHERE account = 'check:7' AND credit = 'tokens';
SELECT allowed, reason, error, amount FROM lease_check('check:7', 'check.call', 10);
SELECT allowed, reason, error, amount FROM lease_check('check:7', 'check.call', 10, on_failure => 'open');
SELECT allowed, reason, error, credit, amount FROM lease_check('check:7', 'check.two', 10);
DELETE FROM policy WHERE account = 'check:7' AND credit = 'tokens';
SELECT allowed, reason, error, credit, amount FROM lease_check('check:7', 'check.two', 10);

--
-- What a balance says of leases.
--
SELECT available FROM lease_topup('check:8', 'tokens', 5);
SELECT available, leased, upstream_balance FROM lease_balance('check:8');
SELECT lease_install('check:8', 'tokens', 'L1', 20, '2030-01-01 00:05:00+00', 'check_server'),
	   lease_install('check:8', 'tokens', 'L2', 7, '2030-01-01 00:05:00+00');
SELECT available, leased, upstream_balance FROM lease_balance('check:8');
SELECT reservation_id AS held, amount FROM lease_check('check:8', 'check.call', 20, ttl => '1 minute') \gset
SELECT available, reserved, leased FROM lease_balance('check:8');
BEGIN;
UPDATE lease_usage SET upstream_balance = 1000.5 WHERE account = 'check:8';
SELECT available, leased, upstream_balance FROM lease_balance('check:8');
SELECT account, leased, upstream_balance FROM balance WHERE account = 'check:8';
-- an expired hold is counted as given back, an expired lease not at all
SET LOCAL credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT available, reserved, leased, upstream_balance FROM lease_balance('check:8');
SET LOCAL credit_lease.mock_now = '2030-01-01 00:05:00+00';
SELECT available, reserved, leased, upstream_balance FROM lease_balance('check:8');
ROLLBACK;
SELECT lease_release('check:8', 'tokens', 'L1');
SELECT available, leased, upstream_balance FROM lease_balance('check:8');

DELETE FROM meter;
DELETE FROM policy WHERE account LIKE 'check:%';
DROP FUNCTION test.check_rule;
DROP SERVER check_server;

SELECT * FROM credit_lease.lease_verify();
