--
-- lease_track: what was used is settled, and reported once.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

CREATE SERVER track_a FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://a.example');
CREATE SERVER track_b FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://b.example');
INSERT INTO meter (feature, credit, rate, event) VALUES ('track.call', 'tokens', 0.5, 'call'), ('track.third', 'tokens', 3, 'third');

-- A check, of which the hold's number is wanted.
CREATE FUNCTION pg_temp.hold(account text, quantity numeric, feature text DEFAULT 'track.call', on_failure text DEFAULT NULL,
		ttl interval DEFAULT '1 minute') RETURNS bigint LANGUAGE sql AS
	'SELECT reservation_id FROM credit_lease.lease_check(account, feature, quantity, on_failure => on_failure, ttl => ttl)';
-- What is said of a tracking, with # for the hold's number.
CREATE FUNCTION pg_temp.track(account text, reservation_id bigint, quantity numeric, traits jsonb DEFAULT NULL,
		OUT settled boolean, OUT consumed numeric, OUT refunded numeric, OUT shortfall numeric, OUT available numeric, OUT usage_key text)
	LANGUAGE sql AS $$
	SELECT settled, consumed, refunded, shortfall, available, replace(usage_key, ':' || reservation_id || ':', ':#:')
	  FROM credit_lease.lease_track(account, reservation_id, quantity, traits) $$;
-- The outbox, with what its reports are of.
CREATE VIEW pg_temp.report AS
	SELECT u.account, u.credit, u.server, u.lease_id, u.company_id, u.event, u.quantity, u.traits, u.created_at,
		   u.entry_id = r.track_entry_id AS of_the_tracking,
		   replace(u.idempotency_key, ':' || r.reservation_id || ':', ':#:') AS idempotency_key
	  FROM usage_report u LEFT JOIN reservation r ON r.account = u.account AND r.track_entry_id = u.entry_id
	 ORDER BY u.entry_id;

--
-- As much as was held, less, and more.
--
SELECT available FROM lease_topup('track:1', 'tokens', 100);
SELECT pg_temp.hold('track:1', 20) AS exact \gset
SELECT * FROM pg_temp.track('track:1', :exact, 20);
SELECT pg_temp.hold('track:1', 20) AS less \gset
SET credit_lease.mock_now = '2030-01-01 00:00:01.5+00';
SELECT * FROM pg_temp.track('track:1', :less, 12.000000000000000000, '{"model": "large"}');
SELECT pg_temp.hold('track:1', 20) AS more \gset
SELECT * FROM pg_temp.track('track:1', :more, 30);
-- nothing: all of it comes back, and there is nothing to report
SELECT pg_temp.hold('track:1', 20) AS nothing \gset
SELECT * FROM pg_temp.track('track:1', :nothing, 0);
-- with no more credit left: what is missing is the shortfall
SELECT pg_temp.hold('track:1', 100) AS short \gset
SELECT * FROM pg_temp.track('track:1', :short, 200);
SELECT status, amount, quantity, rate, tracked, traits, consumed, refunded, shortfall, overage,
	   end_entry_id = track_entry_id AS ended_by_it, ended_at
  FROM reservation WHERE account = 'track:1' ORDER BY reservation_id;
SELECT kind, amount, released, available, metadata, created_at, reservation_id IS NOT NULL AS of_a_hold FROM ledger
 WHERE account = 'track:1' ORDER BY entry_id;
SELECT day, credit, consumed, calls FROM usage_by_day WHERE account = 'track:1';
SELECT available, reserved, consumed FROM lease_balance('track:1');
-- a pool without upstream has nobody to report to
SELECT count(*) FROM usage_report WHERE account = 'track:1';

--
-- Again: with the same arguments the same result, and nothing has changed;
-- with others LC005.
--
SELECT available FROM lease_topup('track:1', 'tokens', 5);
SELECT * FROM pg_temp.track('track:1', :less, 12, '{"model": "large"}');
SELECT * FROM pg_temp.track('track:1', :more, 30.0);
SELECT * FROM pg_temp.track('track:1', :nothing, 0);
SELECT * FROM pg_temp.track('track:1', :short, 200);
SELECT changed_by(format($$ SELECT lease_track('track:1', %s, 12, '{"model":   "large"}') $$, :less));
SELECT * FROM refused(format($$ SELECT lease_track('track:1', %s, 13, '{"model": "large"}') $$, :less));
SELECT * FROM refused(format($$ SELECT lease_track('track:1', %s, 12) $$, :less));
SELECT * FROM refused(format($$ SELECT lease_track('track:1', %s, 12, '{"model": "small"}') $$, :less));
SELECT * FROM refused(format($$ SELECT lease_track('track:1', %s, 30, '{}') $$, :more));
SELECT * FROM refused(format($$ SELECT lease_track('track:1', %s, 1) $$, :nothing));
-- It has ended (rule 4).
SELECT lease_cancel('track:1', :less);
SELECT * FROM refused(format($$ SELECT lease_renew('track:1', %s) $$, :less));
SELECT * FROM refused(format($$ SELECT lease_settle('track:1', %s, 1) $$, :less));

--
-- What cannot be tracked.
--
SELECT reservation_id AS plain FROM lease_reserve('track:1', 'tokens', 1) \gset
SELECT regexp_replace(refused, '\d+ was', '# was') AS refused FROM refused(format($$ SELECT lease_track('track:1', %s, 1) $$, :plain));
SELECT lease_cancel('track:1', :plain);
SELECT regexp_replace(refused, '\d+ was', '# was') AS refused FROM refused(format($$ SELECT lease_track('track:1', %s, 1) $$, :plain));
SELECT pg_temp.hold('track:1', 2) AS cancelled \gset
SELECT lease_cancel('track:1', :cancelled);
SELECT * FROM refused(format($$ SELECT lease_track('track:1', %s, 1) $$, :cancelled));
SELECT pg_temp.hold('track:1', 2) AS settled \gset
SELECT consumed, refunded, shortfall, available, replayed FROM lease_settle('track:1', :settled, 0.5);
SELECT * FROM refused(format($$ SELECT lease_track('track:1', %s, 1) $$, :settled));
SELECT consumed, replayed FROM lease_settle('track:1', :settled, 0.5);
SELECT * FROM refused($$ SELECT lease_track('track:1', 0, 1) $$);
SELECT * FROM refused($$ SELECT lease_track('track:nobody', 1, 1) $$);
SELECT pg_temp.hold('track:1', 2) AS held \gset
SELECT * FROM refused(format($$ SELECT lease_track('track:2', %s, 1) $$, :held));
SELECT call, r.code, r.message FROM (VALUES
	(1, 'NULL, HOLD, 1'), (2, $$'', HOLD, 1$$), (3, $$'track:1', NULL, 1$$), (4, $$'track:1', HOLD, NULL$$), (5, $$'track:1', HOLD, -1$$),
	(6, $$'track:1', HOLD, 'NaN'$$), (7, $$'track:1', HOLD, 'Infinity'$$), (8, $$'track:1', HOLD, 1e26$$), (9, $$'track:1', HOLD, 1e-13$$)
  ) v (n, call), LATERAL refusal(format('SELECT lease_track(%s)', replace(call, 'HOLD', :'held'))) r
 ORDER BY n;
SELECT * FROM pg_temp.track('track:1', :held, 0.000000000001);
-- What would cost more than an amount can be is refused.
INSERT INTO meter (feature, credit, rate) VALUES ('track.dear', 'tokens', 1e20);
SELECT pg_temp.hold('track:dear', 1, 'track.dear', 'open') AS dear \gset
SELECT code, message FROM refusal(format('SELECT lease_track(%L, %s, 1e10)', 'track:dear', :dear));

-- It is part of the caller's transaction.
SELECT pg_temp.hold('track:1', 2) AS held \gset
BEGIN;
SELECT * FROM pg_temp.track('track:1', :held, 1);
ROLLBACK;
SELECT * FROM pg_temp.track('track:1', :held, 2);

--
-- Late: the pool is charged for what it still has, and the hold stays expired;
-- swept or not.
--
SELECT available FROM lease_topup('track:3', 'tokens', 20);
SELECT pg_temp.hold('track:3', 10) AS unswept, pg_temp.hold('track:3', 10) AS swept, pg_temp.hold('track:3', 10) AS unused \gset
SET credit_lease.mock_now = '2030-01-01 00:02:00+00';
SELECT * FROM pg_temp.track('track:3', :unswept, 8);
SELECT lease_reclaim() >= 1 AS swept;
SELECT available, reserved, consumed FROM lease_balance('track:3');
SELECT * FROM pg_temp.track('track:3', :swept, 12);
SELECT * FROM pg_temp.track('track:3', :unused, 0);
SELECT status, amount, tracked, consumed, refunded, shortfall, overage, end_entry_id < track_entry_id AS before_it, ended_at
  FROM reservation WHERE account = 'track:3' ORDER BY reservation_id;
SELECT kind, amount, released, available, created_at FROM ledger WHERE account = 'track:3' ORDER BY entry_id;
SELECT reservation_id = :unswept AS unswept, reclaimed_at, returned FROM expired_hold WHERE account = 'track:3' ORDER BY reservation_id;
SELECT day, consumed, calls FROM usage_by_day WHERE account = 'track:3';
SELECT changed_by(format($$ SELECT lease_track('track:3', %s, 8), lease_track('track:3', %s, 12), lease_track('track:3', %s, 0) $$, :unswept, :swept, :unused));
SELECT * FROM pg_temp.track('track:3', :unswept, 8);
SELECT * FROM pg_temp.track('track:3', :swept, 12);
SELECT * FROM refused(format($$ SELECT lease_track('track:3', %s, 9) $$, :unswept));
SELECT * FROM refused(format($$ SELECT lease_track('track:3', %s, 12, '{}') $$, :swept));
SELECT * FROM refused(format($$ SELECT lease_settle('track:3', %s) $$, :swept));
SELECT * FROM refused(format($$ SELECT lease_renew('track:3', %s) $$, :swept));
-- at the instant of its end it is late
SELECT pg_temp.hold('track:3', 2) AS at_end, pg_temp.hold('track:3', 2) AS before_end \gset
SET credit_lease.mock_now = '2030-01-01 00:02:59.999999+00';
SELECT settled FROM lease_track('track:3', :before_end, 2);
SET credit_lease.mock_now = '2030-01-01 00:03:00+00';
SELECT settled FROM lease_track('track:3', :at_end, 2);
-- where others have taken the rest: what is there, or nothing
SELECT pg_temp.hold('track:3', 4) AS some, pg_temp.hold('track:3', 4) AS none \gset
SET credit_lease.mock_now = '2030-01-01 00:05:00+00';
SELECT available - 1 AS rest FROM lease_balance('track:3') \gset
SELECT available FROM lease_consume('track:3', 'tokens', :rest);
SELECT * FROM pg_temp.track('track:3', :some, 4);
SELECT * FROM pg_temp.track('track:3', :none, 4);
SELECT status, tracked, consumed, refunded, shortfall FROM reservation WHERE account = 'track:3' AND reservation_id IN (:some, :none) ORDER BY reservation_id;
SELECT changed_by(format($$ SELECT lease_track('track:3', %s, 4) $$, :none));
SELECT * FROM refused(format($$ SELECT lease_track('track:3', %s, 5) $$, :none));
-- the holds of others that have expired meanwhile are given back first
SELECT available FROM lease_topup('track:4', 'tokens', 10);
SELECT pg_temp.hold('track:4', 10) AS mine, pg_temp.hold('track:4', 10) AS other \gset
SET credit_lease.mock_now = '2030-01-01 00:07:00+00';
SELECT * FROM pg_temp.track('track:4', :mine, 18);
-- and so are they where a hold that is alive is exceeded
SELECT available FROM lease_topup('track:5', 'tokens', 10);
SELECT pg_temp.hold('track:5', 10, ttl => '1 hour') AS mine, pg_temp.hold('track:5', 10) AS other \gset
SET credit_lease.mock_now = '2030-01-01 00:09:00+00';
SELECT * FROM pg_temp.track('track:5', :mine, 18);

--
-- Frozen: what was held before is settled, and nothing above it.
--
SELECT available FROM lease_topup('track:6', 'tokens', 20);
SELECT pg_temp.hold('track:6', 10, ttl => '1 hour') AS alive, pg_temp.hold('track:6', 10) AS late, pg_temp.hold('track:6', 2) AS later \gset
SELECT lease_freeze('track:6');
SELECT * FROM pg_temp.track('track:6', :alive, 12);
SET credit_lease.mock_now = '2030-01-01 00:11:00+00';
SELECT * FROM pg_temp.track('track:6', :late, 10);
SELECT status, tracked, consumed, refunded, shortfall FROM reservation WHERE account = 'track:6' AND reservation_id = :late;
SELECT lease_reclaim() IS NOT NULL AS swept;
SELECT lease_unfreeze('track:6');
-- It was tracked, and the pool is not charged for it later.
SELECT changed_by(format($$ SELECT lease_track('track:6', %s, 10) $$, :late));
SELECT settled, consumed, refunded, shortfall FROM pg_temp.track('track:6', :late, 10);
SELECT * FROM pg_temp.track('track:6', :later, 2);
-- The first result stays, whatever there is now (rule 4).
SELECT available FROM lease_topup('track:6', 'tokens', 100);
SELECT * FROM pg_temp.track('track:6', :later, 2);

--
-- Holds of nothing, of who has passed without credit.
--
SELECT pg_temp.hold('track:7', 10, on_failure => 'open') AS used, pg_temp.hold('track:7', 10, on_failure => 'open') AS cancelled,
	   pg_temp.hold('track:7', 10, on_failure => 'open') AS settled, pg_temp.hold('track:7', 10, on_failure => 'open') AS overdrawn,
	   pg_temp.hold('track:7', 10, on_failure => 'open') AS renewed, pg_temp.hold('track:7', 10, on_failure => 'open') AS unused,
	   pg_temp.hold('track:7', 10, on_failure => 'open') AS expired, pg_temp.hold('track:7', 10, on_failure => 'open') AS late \gset
SELECT reservation_id = :used AS used, amount, tranche_ids, status, expires_at FROM reservation WHERE account = 'track:7' AND reservation_id = :used;
SELECT count(*) FROM ledger WHERE account = 'track:7';
-- used, and nothing there to charge
SELECT * FROM pg_temp.track('track:7', :used, 8);
SELECT * FROM pg_temp.track('track:7', :used, 8);
SELECT * FROM refused(format($$ SELECT lease_track('track:7', %s, 9) $$, :used));
SELECT * FROM pg_temp.track('track:7', :unused, 0);
SELECT lease_cancel('track:7', :cancelled);
SELECT lease_cancel('track:7', :cancelled);
SELECT * FROM refused(format($$ SELECT lease_track('track:7', %s, 9) $$, :cancelled));
SELECT reserved, consumed, refunded, shortfall, available, replayed FROM lease_settle('track:7', :settled, metadata => '{"a": 1}');
SELECT reserved, consumed, refunded, shortfall, available, replayed FROM lease_settle('track:7', :settled, metadata => '{"a": 1}');
SELECT reserved, consumed, refunded, shortfall, available, replayed FROM lease_settle('track:7', :overdrawn, 3);
SELECT reserved, consumed, refunded, shortfall, available, replayed FROM lease_settle('track:7', :overdrawn, 3);
SELECT * FROM refused(format($$ SELECT lease_settle('track:7', %s, 1, 'refuse') $$, :late));
-- credit that comes later serves a hold that is renewed, and what is tracked then
SELECT * FROM refused(format($$ SELECT lease_renew('track:7', %s, NULL, 3) $$, :renewed));
SELECT reservation_id = :renewed AS same, amount, expires_at FROM lease_renew('track:7', :renewed, '5 minutes');
SELECT available FROM lease_topup('track:7', 'tokens', 10);
SELECT reservation_id = :renewed AS same, amount, expires_at FROM lease_renew('track:7', :renewed, '10 minutes', 3);
SELECT * FROM pg_temp.track('track:7', :renewed, 10);
SET credit_lease.mock_now = '2030-01-01 00:13:00+00';
SELECT * FROM pg_temp.track('track:7', :late, 4);
SELECT * FROM refused(format($$ SELECT lease_renew('track:7', %s) $$, :expired));
SELECT lease_reclaim() >= 1 AS swept;
SELECT * FROM pg_temp.track('track:7', :expired, 6);
SELECT status, amount, tracked, consumed, refunded, shortfall FROM reservation WHERE account = 'track:7' ORDER BY reservation_id;
SELECT kind, amount, released, available FROM ledger WHERE account = 'track:7' ORDER BY entry_id;
-- swept where there is no other hold, and by nobody but the sweep
SELECT pg_temp.hold('track:8', 10, on_failure => 'open') AS held \gset
SET credit_lease.mock_now = '2030-01-01 00:15:00+00';
SELECT reclaimed_at, returned FROM expired_hold WHERE account = 'track:8';
SELECT lease_reclaim() >= 1 AS swept;
SELECT reclaimed_at, returned FROM expired_hold WHERE account = 'track:8';
SELECT lease_cancel('track:8', :held);
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

--
-- Reports: exactly one of each use, of the quantity that was used, whatever
-- was held or charged.
--
INSERT INTO policy (account, server, company_id) VALUES ('track:9', 'track_a', 'comp_9');
SELECT lease_install('track:9', 'tokens', 'L9', 20, '2030-01-01 01:00:00+00', 'track_a');
SELECT pg_temp.hold('track:9', 10) AS exact, pg_temp.hold('track:9', 10) AS less, pg_temp.hold('track:9', 10) AS more,
	   pg_temp.hold('track:9', 4) AS nothing, pg_temp.hold('track:9', 2) AS late \gset
SELECT * FROM pg_temp.track('track:9', :exact, 10);
SELECT * FROM pg_temp.track('track:9', :less, 8, '{"model": "large"}');
SELECT * FROM pg_temp.track('track:9', :nothing, 0);
SELECT * FROM pg_temp.track('track:9', :more, 30);
SELECT pg_temp.hold('track:9', 2, on_failure => 'open') AS passed \gset
SELECT * FROM pg_temp.track('track:9', :passed, 2);
SET credit_lease.mock_now = '2030-01-01 00:02:00+00';
SELECT * FROM pg_temp.track('track:9', :late, 6);
SELECT * FROM pg_temp.report WHERE account = 'track:9';
-- none for what is told again, or goes wrong
SELECT changed_by(format($$ SELECT lease_track('track:9', %s, 30), lease_track('track:9', %s, 6) $$, :more, :late));
SELECT code FROM refusal(format($$ SELECT lease_track('track:9', %s, 31) $$, :more));
SELECT count(*), count(DISTINCT idempotency_key) FROM usage_report WHERE account = 'track:9';
-- the event that the call had
SELECT available FROM lease_topup('track:9', 'tokens', 1);
SELECT lease_install('track:10', 'tokens', 'L10', 20, '2030-01-01 01:00:00+00', 'track_a');
SELECT reservation_id FROM lease_check('track:10', 'track.call', 2, 'my event') \gset
SELECT usage_key IS NOT NULL AS reported FROM lease_track('track:10', :reservation_id, 2);
SELECT * FROM pg_temp.report WHERE account = 'track:10';
-- a transaction that is rolled back reports nothing (rule 9)
SELECT pg_temp.hold('track:10', 2) AS held \gset
BEGIN;
SELECT settled FROM lease_track('track:10', :held, 2);
ROLLBACK;
SELECT count(*) FROM usage_report WHERE account = 'track:10';

-- What a grant of our own has paid is not reported.
INSERT INTO policy (account, server) VALUES ('track:11', 'track_a');
SELECT available FROM lease_topup('track:11', 'tokens', 10, priority => 1);
SELECT lease_install('track:11', 'tokens', 'L11', 10, '2030-01-01 01:00:00+00', 'track_a');
SELECT pg_temp.hold('track:11', 10) AS local, pg_temp.hold('track:11', 20) AS mixed, pg_temp.hold('track:11', 8) AS leased \gset
SELECT tranche_amounts FROM reservation WHERE account = 'track:11' ORDER BY reservation_id;
-- all of it by the grant
SELECT * FROM pg_temp.track('track:11', :local, 10);
-- a half of it, and nothing of it
SELECT * FROM pg_temp.track('track:11', :mixed, 20);
SELECT * FROM pg_temp.track('track:11', :leased, 8);
SELECT lease_id, event, quantity, of_the_tracking FROM pg_temp.report WHERE account = 'track:11';
-- 10 of 14 credits are not the grant's, of which 9 were not there: 20 of 28 units
SELECT available FROM lease_topup('track:11', 'tokens', 4);
SELECT pg_temp.hold('track:11', 8) AS more \gset
SELECT tranche_amounts FROM reservation WHERE account = 'track:11' AND reservation_id = :more;
SELECT * FROM pg_temp.track('track:11', :more, 28);
-- where it does not divide, to the last digit
SELECT available FROM lease_topup('track:12', 'tokens', 1, priority => 1);
SELECT lease_install('track:12', 'tokens', 'L12', 100, '2030-01-01 01:00:00+00', 'track_b');
SELECT pg_temp.hold('track:12', 1, 'track.third') AS third \gset
SELECT * FROM pg_temp.track('track:12', :third, 1);
-- what is cheaper than what was held is paid by what burns first
SELECT available FROM lease_topup('track:12', 'tokens', 1, priority => 1);
SELECT pg_temp.hold('track:12', 4) AS cheap, pg_temp.hold('track:12', 4) AS dear \gset
SELECT tranche_amounts FROM reservation WHERE account = 'track:12' AND reservation_id = :cheap;
SELECT * FROM pg_temp.track('track:12', :cheap, 2);
SELECT * FROM pg_temp.track('track:12', :dear, 4);
SELECT server, lease_id, company_id, event, quantity FROM pg_temp.report WHERE account IN ('track:11', 'track:12');
-- leases of two servers: each is told its part; one without a server is our own
SELECT lease_install('track:13', 'tokens', 'L13a', 4, '2030-01-01 00:30:00+00', 'track_a'),
	   lease_install('track:13', 'tokens', 'L13b', 4, '2030-01-01 00:40:00+00', 'track_b'),
	   lease_install('track:13', 'tokens', 'L13c', 4, '2030-01-01 00:50:00+00');
SELECT pg_temp.hold('track:13', 16) AS two, pg_temp.hold('track:13', 8) AS own \gset
SELECT * FROM pg_temp.track('track:13', :two, 16);
SELECT * FROM pg_temp.track('track:13', :own, 8);
SELECT server, lease_id, company_id, event, quantity FROM pg_temp.report WHERE account = 'track:13';
-- no lease has paid: the upstream of the pool is told, late or frozen or short
INSERT INTO policy (account, server, company_id) VALUES ('track:14', 'track_b', 'comp_14');
SELECT lease_install('track:14', 'tokens', 'L14', 10, '2030-01-01 00:03:00+00', 'track_a');
SELECT pg_temp.hold('track:14', 10) AS late, pg_temp.hold('track:14', 4) AS frozen, pg_temp.hold('track:14', 6) AS nothing \gset
SET credit_lease.mock_now = '2030-01-01 00:04:00+00';
-- the lease has expired, and with it what was held of it (rule 8)
SELECT * FROM pg_temp.track('track:14', :late, 10, '{"late": true}');
SELECT lease_freeze('track:14');
SELECT * FROM pg_temp.track('track:14', :frozen, 4);
SELECT * FROM pg_temp.track('track:14', :nothing, 0);
SELECT server, lease_id, company_id, event, quantity, traits, created_at, of_the_tracking, idempotency_key FROM pg_temp.report WHERE account = 'track:14';
-- a hold of a lease that expires before it pays all the same: it was set aside
SELECT lease_install('track:15', 'tokens', 'L15', 10, '2030-01-01 00:05:00+00', 'track_a');
SELECT pg_temp.hold('track:15', 10, ttl => '5 minutes') AS held \gset
SET credit_lease.mock_now = '2030-01-01 00:06:00+00';
SELECT * FROM pg_temp.track('track:15', :held, 14);
SELECT server, lease_id, event, quantity FROM pg_temp.report WHERE account = 'track:15';
-- settled by an amount, it is reported by the worker as any other spending, and not here
SELECT lease_install('track:16', 'tokens', 'L16', 10, '2030-01-01 01:00:00+00', 'track_a');
SELECT pg_temp.hold('track:16', 10) AS settled \gset
SELECT consumed FROM lease_settle('track:16', :settled, 2);
SELECT count(*) FROM usage_report WHERE account = 'track:16';

--
-- A tracking is refunded like any other spending; the reservation keeps saying
-- what was used.
--
SELECT available FROM lease_topup('track:17', 'tokens', 5);
SELECT available FROM lease_topup('track:17', 'tokens', 10);
SELECT pg_temp.hold('track:17', 12) AS tracked, pg_temp.hold('track:17', 2) AS unused, pg_temp.hold('track:17', 2) AS late \gset
SELECT consumed, available FROM lease_track('track:17', :tracked, 16);
SELECT consumed FROM lease_track('track:17', :unused, 0);
SET credit_lease.mock_now = '2030-01-01 00:08:00+00';
SELECT consumed, available FROM lease_track('track:17', :late, 2);
SELECT min(entry_id) FILTER (WHERE reservation_id = :tracked) AS entry, min(entry_id) FILTER (WHERE reservation_id = :unused) AS unused_entry,
	   min(entry_id) FILTER (WHERE reservation_id = :late) AS late_entry
  FROM ledger WHERE account = 'track:17' AND kind = 'track' \gset
SELECT amount, available FROM lease_refund('track:17', :entry, 3);
SELECT amount, available FROM lease_refund('track:17', :entry);
SELECT amount, available FROM lease_refund('track:17', :late_entry);
SELECT * FROM refused(format($$ SELECT lease_refund('track:17', %s) $$, :unused_entry));
SELECT * FROM refused(format($$ SELECT lease_refund('track:17', %s, 1) $$, :entry));
SELECT consumed, shortfall FROM lease_track('track:17', :tracked, 16);
SELECT available, reserved, consumed FROM lease_balance('track:17');
SELECT day, consumed, calls FROM usage_by_day WHERE account = 'track:17';
SELECT kind, amount, released, available, parts, first_entry_id IS NOT NULL AS continues FROM ledger WHERE account = 'track:17' AND kind IN ('track', 'refund') ORDER BY entry_id;

-- What a policy says later is not what the hold was made by.
INSERT INTO policy (account, smallest_unit) VALUES ('track:18', 0.1);
SELECT available FROM lease_topup('track:18', 'tokens', 10);
SELECT pg_temp.hold('track:18', 1.1) AS held \gset
UPDATE policy SET smallest_unit = 5 WHERE account = 'track:18';
SELECT consumed, refunded FROM lease_track('track:18', :held, 0.3);

--
-- The books (rule 2): what a tracking wrote is recomputed, and it does not make
-- worse what does not balance.
--
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
SELECT available FROM lease_topup('track:19', 'tokens', 10);
SELECT pg_temp.hold('track:19', 4) AS tracked, pg_temp.hold('track:19', 4) AS late, pg_temp.hold('track:19', 4, ttl => '1 hour') AS held \gset
SELECT consumed FROM lease_track('track:19', :tracked, 6);
SET credit_lease.mock_now = '2030-01-01 00:02:00+00';
SELECT consumed FROM lease_track('track:19', :late, 2);
SELECT * FROM lease_verify('track:19');
CREATE FUNCTION pg_temp.findings(statement text) RETURNS TABLE (rule text, expected numeric, found numeric) LANGUAGE plpgsql AS $$
DECLARE
	findings jsonb;
BEGIN
	BEGIN
		EXECUTE statement;
		SELECT jsonb_agg(jsonb_build_array(regexp_replace(v.rule, ' \d+ ', ' # '), v.expected, v.found)) INTO findings FROM credit_lease.lease_verify('track:19') v;
		RAISE SQLSTATE 'P9999';
	EXCEPTION WHEN SQLSTATE 'P9999' THEN
	END;
	RETURN QUERY SELECT f->>0, (f->>1)::numeric, (f->>2)::numeric FROM jsonb_array_elements(findings) f ORDER BY (f->>0) COLLATE "C", 2, 3;
END
$$;
SELECT * FROM pg_temp.findings(format('UPDATE reservation SET consumed = 2 WHERE reservation_id = %s', :tracked));
SELECT * FROM pg_temp.findings(format('UPDATE reservation SET consumed = NULL WHERE reservation_id = %s', :late));
SELECT * FROM pg_temp.findings(format('UPDATE reservation SET refunded = 1 WHERE reservation_id = %s', :late));
BEGIN;
ALTER TABLE ledger DISABLE TRIGGER ledger_guard;
SELECT * FROM pg_temp.findings(format($$ DELETE FROM ledger WHERE kind = 'track' AND reservation_id = %s $$, :tracked));
SELECT * FROM pg_temp.findings(format($$ UPDATE ledger SET amount = 2 WHERE kind = 'track' AND reservation_id = %s $$, :late));
ROLLBACK;
BEGIN;
UPDATE tranche SET remaining = remaining + 1 WHERE account = 'track:19';
SELECT code FROM refusal($$ SELECT lease_check('track:19', 'track.call', 1) $$);
SELECT code FROM refusal($$ SELECT lease_check('track:19', 'track.call', 1000, on_failure => 'open') $$);
SELECT code FROM refusal($$ SELECT lease_explain('track:19', 'track.call', 1) $$);
SELECT code FROM refusal(format($$ SELECT lease_track('track:19', %s, 1) $$, :held));
ROLLBACK;
BEGIN;
UPDATE reservation SET consumed = NULL WHERE account = 'track:19' AND reservation_id = :tracked;
SELECT * FROM refused(format($$ SELECT lease_track('track:19', %s, 6) $$, :tracked));
UPDATE reservation SET tranche_amounts = ARRAY[1] WHERE account = 'track:19' AND reservation_id = :held;
SELECT * FROM refused(format($$ SELECT lease_track('track:19', %s, 6) $$, :held));
ROLLBACK;

DELETE FROM meter;
DELETE FROM policy WHERE account LIKE 'track:%';
DELETE FROM usage_report WHERE account LIKE 'track:%';
DROP SERVER track_a, track_b;

SELECT * FROM credit_lease.lease_verify();
