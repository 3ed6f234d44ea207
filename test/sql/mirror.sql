--
-- lease_sync: balances that live elsewhere, less everything that is spent or
-- held of them here.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';

CREATE SERVER mirror_a FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://a.example');
CREATE SERVER mirror_b FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://b.example');
CREATE FOREIGN DATA WRAPPER regress_credit_lease_mirror;
CREATE SERVER mirror_other FOREIGN DATA WRAPPER regress_credit_lease_mirror;

-- The clock, as minutes of an hour.
CREATE FUNCTION test.at(minute numeric) RETURNS timestamptz LANGUAGE sql AS $$
	SELECT timestamptz '2030-01-01 00:00:00+00' + minute * interval '1 minute'
$$;
CREATE FUNCTION test.it_is(minute numeric) RETURNS void LANGUAGE sql AS $$
	SELECT set_config('credit_lease.mock_now', at(minute)::text, false);
$$ SET search_path = test, pg_catalog;
SELECT it_is(0);
-- A checkpoint, and what the pool has then.
CREATE FUNCTION test.sync(name text, balance numeric, minute numeric, keys text[] DEFAULT NULL, server name DEFAULT NULL,
		OUT available numeric, OUT pending numeric, OUT as_of timestamptz)
	LANGUAGE sql AS $$
	SELECT trim_scale(s.available), trim_scale(s.pending), s.as_of
	  FROM credit_lease.lease_sync(name, 'tokens', balance, test.at(minute), server, keys) s
$$;
-- What its mirrors are, and whether the books balance.
CREATE FUNCTION test.mirrors(name text, OUT server text, OUT balance numeric, OUT included numeric, OUT granted numeric,
		OUT remaining numeric, OUT overdrawn numeric, OUT reserved numeric, OUT chunked numeric, OUT consumed numeric,
		OUT returned numeric, OUT revoked numeric, OUT findings bigint) RETURNS SETOF record
	LANGUAGE sql AS $$
	SELECT t.server, trim_scale(m.balance), trim_scale(m.included), trim_scale(t.granted), trim_scale(t.remaining),
		   trim_scale(t.overdrawn), trim_scale(t.reserved), trim_scale(t.chunked), trim_scale(t.consumed),
		   trim_scale(t.returned), trim_scale(t.revoked), (SELECT count(*) FROM credit_lease.lease_verify(name))
	  FROM credit_lease.tranche t JOIN credit_lease.mirror m USING (account, credit, tranche_id)
	 WHERE t.account = name ORDER BY t.server
$$;

--
-- A checkpoint makes the account and a tranche, and what is spent then is
-- pending until another one includes it: by its time.
--
SELECT * FROM sync('mirror:1', 100, 0);
SELECT kind, priority, server, expires_at, trusted_until, open FROM tranche WHERE account = 'mirror:1';
SELECT it_is(1);
SELECT available FROM lease_consume('mirror:1', 'tokens', 10);
SELECT it_is(2);
SELECT available FROM lease_consume('mirror:1', 'tokens', 20);
SELECT * FROM mirrors('mirror:1');
SELECT it_is(3);
-- they had heard of the first only
SELECT * FROM sync('mirror:1', 90, 1.5);
SELECT * FROM mirrors('mirror:1');
-- ... and of both, when somebody had topped up there
SELECT * FROM sync('mirror:1', 120, 2);
-- ... and spent
SELECT * FROM sync('mirror:1', 60, 2.5);
SELECT kind, amount, available FROM ledger WHERE account = 'mirror:1' ORDER BY entry_id;
SELECT * FROM mirrors('mirror:1');

-- An older one, or the same again, changes nothing, whatever it says; one that
-- moves nothing has no entry.
SELECT changed_by($$ SELECT sync('mirror:1', 1000, 2.4) $$), changed_by($$ SELECT sync('mirror:1', 1000, 2.5) $$);
SELECT * FROM sync('mirror:1', 1000, 1);
SELECT changed_by($$ SELECT sync('mirror:1', 60, 2.6) $$);

-- What is spent at the very instant, and after the checkpoint came in, is not
-- in it.
SELECT * FROM sync('mirror:1', 60, 3);
SELECT available FROM lease_consume('mirror:1', 'tokens', 5);
SELECT checkpoint, pending, available, checkpoint_as_of, checkpoint_age FROM lease_balance('mirror:1');
SELECT it_is(5);
SELECT checkpoint, pending, available, checkpoint_as_of, checkpoint_age FROM lease_balance('mirror:1');
SELECT * FROM sync('mirror:1', 55, 4);

-- A clock that goes back: by its time alone it is told what is included.
SELECT it_is(4.5);
SELECT available FROM lease_consume('mirror:1', 'tokens', 1);
SELECT it_is(4.2);
SELECT available FROM lease_consume('mirror:1', 'tokens', 2);
SELECT it_is(4.4);
SELECT * FROM sync('mirror:1', 53, 4.3);
SELECT count(*) FROM mirror_entry WHERE account = 'mirror:1';
SELECT * FROM mirrors('mirror:1');
SELECT it_is(6);
SELECT * FROM sync('mirror:1', 52, 5);
SELECT count(*) FROM mirror_entry WHERE account = 'mirror:1';
SELECT * FROM mirrors('mirror:1');

--
-- What is held counts as spent until it comes back; what is settled is pending
-- from its settlement on.
--
SELECT it_is(0);
SELECT * FROM sync('mirror:2', 100, 0);
SELECT reservation_id FROM lease_reserve('mirror:2', 'tokens', 40, '1 hour') \gset
SELECT reservation_id AS other FROM lease_reserve('mirror:2', 'tokens', 10, '20 minutes') \gset
SELECT it_is(10);
SELECT * FROM sync('mirror:2', 80, 5);
SELECT consumed, refunded, available FROM lease_settle('mirror:2', :reservation_id, 25);
SELECT * FROM mirrors('mirror:2');
SELECT it_is(20);
SELECT * FROM sync('mirror:2', 80, 9);
SELECT * FROM sync('mirror:2', 55, 15);
SELECT lease_cancel('mirror:2', :other);
SELECT refunded FROM reservation WHERE reservation_id = :other;
SELECT * FROM mirrors('mirror:2');

--
-- Others may spend of it what is held here. What is lacking is kept, and what
-- comes back goes there first, whichever way it comes.
--
SELECT it_is(0);
SELECT * FROM sync('mirror:3', 100, 0);
SELECT reservation_id AS cancelled FROM lease_reserve('mirror:3', 'tokens', 20, '1 hour') \gset
SELECT reservation_id AS settled FROM lease_reserve('mirror:3', 'tokens', 20, '1 hour') \gset
SELECT reservation_id AS expired FROM lease_reserve('mirror:3', 'tokens', 20, '5 minutes') \gset
SELECT chunk_id FROM lease_chunk_allocate('mirror:3', 'tokens', 20, 'me', '1 hour') \gset
SELECT entry_id FROM lease_consume('mirror:3', 'tokens', 20) \gset
SELECT it_is(2);
SELECT * FROM sync('mirror:3', 5, 1);
SELECT * FROM mirrors('mirror:3');
SELECT available, reserved, chunked, checkpoint, pending FROM lease_balance('mirror:3');
SELECT code FROM refusal($$ SELECT lease_consume('mirror:3', 'tokens', 1) $$);
SELECT lease_cancel('mirror:3', :cancelled);
SELECT refunded FROM reservation WHERE reservation_id = :cancelled;
SELECT * FROM mirrors('mirror:3');
SELECT consumed, refunded, available FROM lease_settle('mirror:3', :settled, 5);
SELECT * FROM mirrors('mirror:3');
SELECT amount, available FROM lease_refund('mirror:3', :entry_id, 10);
SELECT * FROM mirrors('mirror:3');
SELECT applied FROM lease_chunk_consume('mirror:3', :chunk_id, 5, 'me');
SELECT available, reserved, chunked, consumed, checkpoint, pending FROM lease_balance('mirror:3');
SELECT status FROM lease_chunk_release('mirror:3', :chunk_id, 'me');
SELECT * FROM mirrors('mirror:3');
SELECT it_is(10);
SELECT available FROM lease_balance('mirror:3');
SELECT lease_reclaim() > 0 AS some;
SELECT refunded FROM reservation WHERE reservation_id = :expired;
SELECT * FROM mirrors('mirror:3');
SELECT l.kind, l.amount, l.released, l.returned, l.available FROM ledger l WHERE account = 'mirror:3' AND l.returned IS NOT NULL ORDER BY entry_id;
-- The part that covers the lack alone is returned.
SELECT * FROM sync('mirror:3', 30, 10);
SELECT reservation_id FROM lease_reserve('mirror:3', 'tokens', 20, '1 hour') \gset
SELECT it_is(12);
SELECT * FROM sync('mirror:3', 12, 11);
SELECT lease_cancel('mirror:3', :reservation_id);
SELECT amount, returned FROM ledger WHERE account = 'mirror:3' AND reservation_id = :reservation_id AND kind = 'cancel';
SELECT * FROM mirrors('mirror:3');

-- What is spent of a chunk or a session is pending at once, of the mirror's part
-- of it, and both functions say so. It is included when that has ended.
CREATE FUNCTION test.merged(name text, figure numeric, minute numeric, OUT available numeric, OUT pending numeric, OUT reserved numeric,
		OUT chunked numeric, OUT as_the_balance boolean, OUT adds_up boolean)
	LANGUAGE plpgsql AS $$
BEGIN
	SELECT s.available, s.pending INTO available, pending FROM test.sync(name, figure, minute) s;
	SELECT trim_scale(b.reserved), trim_scale(b.chunked), (merged.available, merged.pending) = (b.available, b.pending),
		   merged.available = b.checkpoint - merged.pending - b.reserved - b.chunked
	  INTO reserved, chunked, as_the_balance, adds_up FROM credit_lease.lease_balance(name) b;
END
$$;
SELECT it_is(0);
SELECT * FROM sync('mirror:carved', 100, 0);
SELECT available FROM lease_topup('mirror:carved', 'tokens', 10, priority => 1);
SELECT chunk_id FROM lease_chunk_allocate('mirror:carved', 'tokens', 30, 'me', '1 hour') \gset
SELECT deposit FROM lease_session_open('mirror:carved', 'tokens', 'call', 20, '1 hour');
SELECT reservation_id FROM lease_reserve('mirror:carved', 'tokens', 7, '1 hour') \gset
SELECT remaining FROM lease_chunk_consume('mirror:carved', :chunk_id, 10, 'me');
SELECT * FROM merged('mirror:carved', 100, 0);
SELECT remaining FROM lease_chunk_consume('mirror:carved', :chunk_id, 5, 'me');
SELECT accepted_cumulative FROM lease_session_authorize('mirror:carved', 'call', 20);
SELECT spent FROM lease_session_charge('mirror:carved', 'call', 8);
SELECT * FROM merged('mirror:carved', 100, 0);
SELECT it_is(2);
SELECT * FROM merged('mirror:carved', 95, 1);
SELECT status FROM lease_chunk_release('mirror:carved', :chunk_id, 'me');
SELECT * FROM merged('mirror:carved', 95, 1);
SELECT it_is(4);
SELECT * FROM merged('mirror:carved', 90, 3);
SELECT lease_cancel('mirror:carved', :reservation_id);
SELECT status FROM lease_session_close('mirror:carved', 'call');
SELECT * FROM merged('mirror:carved', 90, 3);
SELECT it_is(6);
SELECT * FROM merged('mirror:carved', 82, 5);
SELECT * FROM mirrors('mirror:carved');
DROP FUNCTION merged;

-- A refund is usage of less than nothing, at its own time.
SELECT it_is(0);
SELECT * FROM sync('mirror:4', 100, 0);
SELECT entry_id FROM lease_consume('mirror:4', 'tokens', 30) \gset
SELECT it_is(2);
SELECT * FROM sync('mirror:4', 70, 1);
SELECT it_is(3);
SELECT available FROM lease_refund('mirror:4', :entry_id, 10);
SELECT checkpoint, pending, available FROM lease_balance('mirror:4');
SELECT it_is(4);
SELECT * FROM sync('mirror:4', 70, 2.5);
SELECT * FROM sync('mirror:4', 80, 3.5);
SELECT * FROM mirrors('mirror:4');

--
-- By acknowledged keys: what was included before, and these, each once; the
-- rest is pending, however old it is.
--
SELECT it_is(0);
SELECT * FROM sync('mirror:5', 100, 0);
SELECT available FROM lease_consume('mirror:5', 'tokens', 1, 'k1');
SELECT available FROM lease_consume('mirror:5', 'tokens', 2, 'k2');
SELECT available FROM lease_consume('mirror:5', 'tokens', 4, 'k3');
SELECT available FROM lease_consume('mirror:5', 'tokens', 8, 'k4');
SELECT it_is(10);
SELECT * FROM sync('mirror:5', 96, 1, '{k3}');
SELECT count(*) FROM mirror_entry WHERE account = 'mirror:5';
-- told twice, and what nobody knows (yet)
SELECT * FROM sync('mirror:5', 95, 2, '{k3,k1,k1,nobody,k5}');
SELECT * FROM sync('mirror:5', 95, 3, '{}');
SELECT available FROM lease_consume('mirror:5', 'tokens', 16, 'k5');
SELECT * FROM sync('mirror:5', 95, 4, '{k5}');
SELECT * FROM sync('mirror:5', 79, 3.5, '{k2}');
SELECT * FROM mirrors('mirror:5');
-- by time, what is included is not included again
SELECT * FROM sync('mirror:5', 69, 5);
SELECT * FROM mirrors('mirror:5');
SELECT count(*) FROM mirror_entry WHERE account = 'mirror:5';
-- ... and by key, what was by time
SELECT it_is(11);
SELECT available FROM lease_consume('mirror:5', 'tokens', 32, 'k6');
SELECT it_is(12);
SELECT * FROM sync('mirror:5', 37, 11.5, '{k1,k2,k3,k4,k5,k6}');
SELECT * FROM mirrors('mirror:5');
SELECT count(*) FROM mirror_entry WHERE account = 'mirror:5';
-- A key stands for all parts of its call; here are two tranches, and only one
-- is a mirror.
SELECT available FROM lease_topup('mirror:5', 'tokens', 10, priority => 1);
SELECT available FROM lease_consume('mirror:5', 'tokens', 15, 'k7');
SELECT * FROM sync('mirror:5', 32, 11.6, '{k7}');
SELECT * FROM mirrors('mirror:5');
-- The key of a hold stands for what its settlement spent.
SELECT reservation_id FROM lease_reserve('mirror:5', 'tokens', 12, '1 hour', 'k8') \gset
SELECT * FROM sync('mirror:5', 32, 11.7, '{k8}');
SELECT consumed FROM lease_settle('mirror:5', :reservation_id, 11);
SELECT * FROM sync('mirror:5', 21, 11.8, '{k8}');
SELECT * FROM mirrors('mirror:5');
-- That of a chunk for what was spent of it, when it has ended.
SELECT chunk_id FROM lease_chunk_allocate('mirror:5', 'tokens', 10, 'me', '1 hour', 'k9') \gset
SELECT applied FROM lease_chunk_consume('mirror:5', :chunk_id, 4, 'me', 'k10');
SELECT * FROM sync('mirror:5', 21, 11.81, '{k9,k10}');
SELECT status FROM lease_chunk_release('mirror:5', :chunk_id, 'me');
SELECT * FROM sync('mirror:5', 17, 11.82, '{k10}');
SELECT * FROM sync('mirror:5', 17, 11.83, '{k9}');
SELECT * FROM mirrors('mirror:5');
-- A key of another account is none of this one.
SELECT available FROM lease_consume('mirror:4', 'tokens', 1, 'elsewhere');
SELECT * FROM sync('mirror:5', 21, 11.9, '{elsewhere}');
SELECT * FROM mirrors('mirror:5');

--
-- Beside other tranches: the soonest expiry burns first. Nothing can be taken
-- away of a balance that lives elsewhere.
--
SELECT it_is(0);
SELECT * FROM sync('mirror:6', 100, 0);
SELECT available FROM lease_topup('mirror:6', 'tokens', 50, expires_at => at(60));
SELECT available FROM lease_consume('mirror:6', 'tokens', 20);
SELECT available FROM lease_adjust('mirror:6', 'tokens', -10, 'given by mistake', 'adjust 1');
SELECT * FROM refused($$ SELECT lease_adjust('mirror:6', 'tokens', -21, 'more than is ours') $$);
SELECT * FROM refused($$ SELECT lease_adjust('mirror:6', 'tokens', -121, 'more than there is') $$);
SELECT available FROM lease_adjust('mirror:6', 'tokens', -20, 'all of it');
SELECT available, replayed FROM lease_adjust('mirror:6', 'tokens', -10, 'given by mistake', 'adjust 1');
SELECT available FROM lease_adjust('mirror:6', 'tokens', 5, 'a gift');
SELECT lease_release('mirror:6', 'tokens');
SELECT kind, granted, remaining FROM open_lease WHERE account = 'mirror:6' ORDER BY tranche_id;
SELECT * FROM mirrors('mirror:6');
-- what is held of our own, and has expired, is taken first
SELECT reservation_id FROM lease_reserve('mirror:6', 'tokens', 105, '1 minute') \gset
SELECT it_is(2);
SELECT available FROM lease_adjust('mirror:6', 'tokens', -5, 'no gift');
SELECT * FROM mirrors('mirror:6');

-- What lapses while it is looked for may be the mirror's, which keeps it.
SELECT it_is(0);
SELECT * FROM sync('mirror:lapsed', 100, 0);
SELECT owner FROM lease_chunk_allocate('mirror:lapsed', 'tokens', 60, 'me', '1 minute');
SELECT deposit FROM lease_session_open('mirror:lapsed', 'tokens', 'call', 40, '1 minute');
SELECT it_is(2);
SELECT * FROM refused($$ SELECT lease_adjust('mirror:lapsed', 'tokens', -20, 'not ours') $$);
SELECT available FROM lease_topup('mirror:lapsed', 'tokens', 50, priority => 1);
SELECT owner FROM lease_chunk_allocate('mirror:lapsed', 'tokens', 110, 'me', '1 minute');
SELECT it_is(4);
SELECT * FROM refused($$ SELECT lease_adjust('mirror:lapsed', 'tokens', -51, 'more than is ours') $$);
SELECT available FROM lease_adjust('mirror:lapsed', 'tokens', -50, 'ours');
SELECT * FROM mirrors('mirror:lapsed');
SELECT it_is(2);

-- One for each server, and one for none; those are reported.
SELECT * FROM sync('mirror:6', 30, 1, server => 'mirror_a');
SELECT * FROM sync('mirror:6', 40, 1, server => 'mirror_b');
SELECT * FROM sync('mirror:6', 35, 1.5, server => 'mirror_a');
SELECT checkpoint, pending, available, checkpoint_as_of FROM lease_balance('mirror:6');
SELECT * FROM mirrors('mirror:6');
SELECT t.server FROM lease_usage u JOIN tranche t USING (account, credit, tranche_id) WHERE u.account = 'mirror:6' ORDER BY 1;

-- A frozen pool takes it in.
SELECT lease_freeze('mirror:6');
SELECT * FROM sync('mirror:6', 36, 1.6, server => 'mirror_a');
SELECT lease_unfreeze('mirror:6');

-- What is nothing is a balance, too.
SELECT * FROM sync('mirror:7', 0, 0);
SELECT kind FROM ledger WHERE account = 'mirror:7';
SELECT * FROM mirrors('mirror:7');
SELECT * FROM sync('mirror:7', 5, 1);
SELECT available FROM lease_consume('mirror:7', 'tokens', 5);
SELECT * FROM sync('mirror:7', 0.000000000001, 2);
SELECT * FROM mirrors('mirror:7');

--
-- How long it is trusted: as long as the policy says, unless that lets all
-- pass. What comes back meanwhile is not lost.
--
SELECT it_is(0);
INSERT INTO policy (account, max_staleness) VALUES ('mirror:8', '10 minutes');
INSERT INTO policy (account, max_staleness, failure_mode) VALUES ('mirror:9', '10 minutes', 'open');
SELECT * FROM sync('mirror:8', 100, 0);
SELECT * FROM sync('mirror:9', 100, 0);
SELECT account, trusted_until FROM tranche WHERE account IN ('mirror:8', 'mirror:9') ORDER BY 1;
SELECT reservation_id FROM lease_reserve('mirror:8', 'tokens', 40, '1 hour') \gset
SELECT reservation_id AS lapsing FROM lease_reserve('mirror:8', 'tokens', 5, '15 minutes') \gset
SELECT chunk_id FROM lease_chunk_allocate('mirror:8', 'tokens', 10, 'me', '12 minutes') \gset
SELECT available FROM lease_topup('mirror:8', 'tokens', 1, priority => 200);
SELECT available FROM lease_topup('mirror:8', 'tokens', 2, priority => 200, expires_at => at(16));
SELECT it_is(9.999);
SELECT available FROM lease_consume('mirror:8', 'tokens', 3);
SELECT it_is(10);
SELECT * FROM refused($$ SELECT lease_consume('mirror:8', 'tokens', 4) $$);
SELECT applied, available FROM lease_try_reserve('mirror:8', 'tokens', 4);
SELECT available, reserved, chunked, expired, checkpoint, pending, checkpoint_age FROM lease_balance('mirror:8');
SELECT kind, remaining FROM open_lease WHERE account = 'mirror:8' ORDER BY 1;
SELECT consumed, refunded, available FROM lease_settle('mirror:8', :reservation_id, 30);
SELECT applied FROM lease_chunk_consume('mirror:8', :chunk_id, 4, 'me');
SELECT it_is(20);
SELECT lease_reclaim() > 0 AS some;
SELECT kind, remaining, expired FROM tranche WHERE account = 'mirror:8' ORDER BY tranche_id;
SELECT available FROM lease_consume('mirror:8', 'tokens', 1);
SELECT * FROM mirrors('mirror:8');
SELECT refunded FROM reservation WHERE reservation_id = :lapsing;
SELECT available, expired FROM lease_balance('mirror:8');
INSERT INTO meter (feature, credit, rate) VALUES ('mirror chat', 'tokens', 1);
SELECT allowed, reason, error, available FROM lease_check('mirror:8', 'mirror chat', 1);
SELECT allowed, reason, available FROM lease_check('mirror:9', 'mirror chat', 1);
-- usage in bulk, as a check: also where another credit might have paid, first or last
CREATE FUNCTION test.bulk(name text, on_short text DEFAULT 'refuse', OUT applied boolean, OUT reason text, OUT available numeric) RETURNS SETOF record
	LANGUAGE sql AS $$
	SELECT i.applied, i.reason, trim_scale(i.available)
	  FROM credit_lease.lease_ingest(jsonb_build_array(
		jsonb_build_object('account', name, 'credit', 'tokens', 'amount', 2, 'key', 'bulk 1'),
		jsonb_build_object('account', name, 'feature', 'mirror chat', 'quantity', 3, 'key', 'bulk 2'),
		jsonb_build_object('account', name, 'feature', 'mirror first', 'quantity', 4, 'key', 'bulk 3'),
		jsonb_build_object('account', name, 'feature', 'mirror last', 'quantity', 5, 'key', 'bulk 4'),
		jsonb_build_object('account', name, 'credit', 'images', 'amount', 6, 'key', 'bulk 5')), on_short) i ORDER BY i.ordinal
$$;
INSERT INTO meter (feature, credit, rate, preference) VALUES ('mirror first', 'tokens', 1, 1), ('mirror first', 'images', 1, 2),
	('mirror last', 'images', 1, 1), ('mirror last', 'tokens', 1, 2);
SELECT feature, reason, error FROM unnest('{mirror first,mirror last}'::text[]) feature, lease_check('mirror:8', feature, 1);
SELECT * FROM bulk('mirror:8');
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT * FROM bulk('mirror:8');
ROLLBACK;
-- charged, it counts as usage that there was no credit for
BEGIN;
SELECT * FROM bulk('mirror:8', 'charge');
SELECT credit, amount, idempotency_key FROM shortfall WHERE account = 'mirror:8' ORDER BY entry_id;
SELECT * FROM mirrors('mirror:8');
ROLLBACK;
BEGIN;
SELECT lease_freeze('mirror:8', 'tokens');
SELECT * FROM bulk('mirror:8');
ROLLBACK;
-- one that is too old when it comes, and one that is not
SELECT * FROM sync('mirror:8', 80, 9);
SELECT * FROM mirrors('mirror:8');
SELECT * FROM sync('mirror:8', 80, 11);
BEGIN;
SELECT * FROM bulk('mirror:8');
ROLLBACK;
SELECT allowed, reason, available FROM lease_check('mirror:8', 'mirror chat', 1);
-- for ever, since the policy says nothing
DELETE FROM policy WHERE account IN ('mirror:8', 'mirror:9');
SELECT * FROM sync('mirror:8', 80, 12);
SELECT trusted_until FROM tranche WHERE account = 'mirror:8' AND kind = 'mirror';
DELETE FROM meter WHERE feature LIKE 'mirror %';
DROP FUNCTION bulk;

--
-- A pool with a mirror is not striped, and a striped pool gets none.
--
SELECT it_is(0);
SELECT * FROM sync('mirror:10', 100, 0);
SELECT * FROM refused($$ SELECT lease_stripe('mirror:10', 'tokens', 4) $$);
SELECT * FROM refused($$ INSERT INTO credit_lease.policy (account, credit, stripes) VALUES ('mirror:10', 'tokens', 4) $$);
SELECT lease_stripe('mirror:10', 'tokens', 1);
INSERT INTO policy (account, stripes) VALUES ('mirror:10', 4);
SELECT available FROM lease_topup('mirror:10', 'tokens', 1);
UPDATE policy SET stripes = NULL WHERE account = 'mirror:10' AND credit = 'tokens';
SELECT available FROM lease_topup('mirror:10', 'tokens', 1);
SELECT available FROM lease_topup('mirror:10', 'images', 1);
SELECT account, credit FROM striped_pool WHERE account = 'mirror:10';
SELECT it_is(1);
SELECT available FROM lease_consume('mirror:10', 'tokens', 2);
SELECT * FROM sync('mirror:10', 98, 1);
SELECT * FROM mirrors('mirror:10');
SELECT * FROM refused($$ SELECT lease_sync('mirror:10', 'images', 1, test.at(0)) $$);
DELETE FROM policy WHERE account = 'mirror:10';
SELECT lease_stripe('mirror:10', 'images', 1);
SELECT available FROM lease_sync('mirror:10', 'images', 1, at(0));
SELECT * FROM lease_verify('mirror:10');
DELETE FROM policy WHERE account = 'mirror:10';

--
-- What is no checkpoint
--
SELECT call, r.code, r.message FROM (VALUES
	(1, $$ (NULL, 'tokens', 1, test.at(0)) $$),
	(2, $$ ('mirror:1', NULL, 1, test.at(0)) $$),
	(3, $$ ('', 'tokens', 1, test.at(0)) $$),
	(4, $$ ('mirror:1', 'tokens', NULL, test.at(0)) $$),
	(5, $$ ('mirror:1', 'tokens', -0.01, test.at(0)) $$),
	(6, $$ ('mirror:1', 'tokens', 'NaN', test.at(0)) $$),
	(7, $$ ('mirror:1', 'tokens', 'Infinity', test.at(0)) $$),
	(8, $$ ('mirror:1', 'tokens', 1e26, test.at(0)) $$),
	(9, $$ ('mirror:1', 'tokens', 1e-13, test.at(0)) $$),
	(10, $$ ('mirror:1', 'tokens', 1, NULL) $$),
	(11, $$ ('mirror:1', 'tokens', 1, '-infinity') $$),
	(12, $$ ('mirror:1', 'tokens', 1, 'infinity') $$),
	(13, $$ ('mirror:1', 'tokens', 1, test.at(1) + '1 microsecond') $$),
	(14, $$ ('mirror:1', 'tokens', 1, test.at(1), 'nowhere') $$),
	(15, $$ ('mirror:1', 'tokens', 1, test.at(1), 'mirror_other') $$),
	(16, $$ ('mirror:1', 'tokens', 1, test.at(1), NULL, '{a,NULL}') $$)
  ) v (n, call), LATERAL refusal('SELECT credit_lease.lease_sync' || call) r
 ORDER BY n;

-- An instant before any other, and an amount of all digits that there can be.
SELECT available FROM lease_sync('mirror:11', 'tokens', 99999999999999999999999999.999999999999, '4000-01-01 BC');
SELECT available FROM lease_consume('mirror:11', 'tokens', 0.000000000001);
SELECT * FROM mirrors('mirror:11');

-- Rolled back, nothing has been told.
BEGIN;
SELECT * FROM sync('mirror:11', 5, 1);
ROLLBACK;
SELECT balance FROM mirror WHERE account = 'mirror:11';

--
-- What does not fit is found, and refused rather than made worse.
--
SELECT code, message FROM refusal($$ INSERT INTO credit_lease.tranche (account, credit, kind, priority, created_at, open)
	VALUES ('mirror:1', 'tokens', 'mirror', 100, test.at(0), true) $$);
BEGIN;
UPDATE mirror SET balance = balance + 1 WHERE account = 'mirror:1';
SELECT rule, expected, found FROM lease_verify('mirror:1');
SELECT code, regexp_replace(message, '\d+', '#') AS message FROM refusal($$ SELECT test.sync('mirror:1', 1, 1) $$);
ROLLBACK;
BEGIN;
UPDATE mirror SET included = included + 1, balance = balance - 1 WHERE account = 'mirror:1';
SELECT rule, expected, found FROM lease_verify('mirror:1');
ROLLBACK;
BEGIN;
UPDATE mirror SET entry_id = NULL WHERE account IN ('mirror:1', 'mirror:6');
UPDATE mirror SET included = included + 1, balance = balance - 1 WHERE account = 'mirror:6';
SELECT account, rule, expected, found FROM (VALUES ('mirror:1'), ('mirror:6')) v (name), lease_verify(name);
ROLLBACK;
BEGIN;
UPDATE tranche SET overdrawn = 1 WHERE account = 'mirror:1';
SELECT rule, found FROM lease_verify('mirror:1') ORDER BY 1;
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('mirror:1', 'tokens', 1) $$);
ROLLBACK;
BEGIN;
SELECT available FROM lease_topup('mirror:10', 'usd', 5);
SELECT available FROM lease_reserve('mirror:10', 'usd', 5);
UPDATE tranche SET overdrawn = 1 WHERE account = 'mirror:10' AND credit = 'usd';
SELECT DISTINCT rule FROM lease_verify('mirror:10') ORDER BY 1;
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('mirror:10', 'usd', 1) $$);
ROLLBACK;
BEGIN;
DELETE FROM mirror WHERE account = 'mirror:1';
SELECT rule, found FROM lease_verify('mirror:1');
SELECT code FROM refusal($$ SELECT test.sync('mirror:1', 1, 1) $$);
ROLLBACK;
BEGIN;
UPDATE tranche SET open = false, expires_at = test.at(90) WHERE account = 'mirror:1';
INSERT INTO mirror_entry SELECT 'mirror:1', tranche_id, 0 FROM tranche WHERE account = 'mirror:1';
INSERT INTO mirror_entry VALUES ('mirror:1', 0, 0);
SELECT regexp_replace(rule, '\d+', '#') AS rule, found FROM lease_verify('mirror:1') ORDER BY 1;
ROLLBACK;

-- Nobody has acknowledged more than was reported: what was tracked, before its
-- entry is read; and what was read, and is not on its way any more.
BEGIN;
CREATE FUNCTION test.acknowledge(amount numeric, OUT rule text, OUT expected numeric, OUT found numeric) RETURNS SETOF record
	LANGUAGE plpgsql AS $$
BEGIN
	UPDATE credit_lease.lease_usage u SET acknowledged = amount WHERE u.account = 'mirror:told';
	RETURN QUERY SELECT f.rule, trim_scale(f.expected), trim_scale(f.found) FROM credit_lease.lease_verify('mirror:told') f;
END
$$;
INSERT INTO meter (feature, credit, rate) VALUES ('mirror chat', 'tokens', 2);
SELECT * FROM sync('mirror:told', 100, 1, server => 'mirror_a');
SELECT available FROM lease_consume('mirror:told', 'tokens', 30);
SELECT * FROM acknowledge(1);
SELECT t.consumed FROM lease_check('mirror:told', 'mirror chat', 4) c, lease_track('mirror:told', c.reservation_id, 3) t;
SELECT quantity, credits FROM usage_report WHERE account = 'mirror:told';
SELECT * FROM acknowledge(0);
SELECT * FROM acknowledge(1);
DELETE FROM usage_report WHERE account = 'mirror:told';
SELECT * FROM acknowledge(6);
SELECT * FROM acknowledge(7);
UPDATE lease_usage u SET consumed = 36, entry_id = (SELECT max(l.entry_id) FROM ledger l WHERE l.account = u.account)
 WHERE u.account = 'mirror:told';
INSERT INTO usage_report (account, entry_id, credit, tranche_id, server, company_id, event, quantity, created_at, idempotency_key, lane,
						  credit_type_id, credits, refused_at)
SELECT account, entry_id, credit, tranche_id, 'mirror_a', account, credit, 30, at(1), 'told', 0, credit, 30, at(1)
  FROM lease_usage WHERE account = 'mirror:told';
SELECT * FROM acknowledge(6);
SELECT * FROM acknowledge(7);
-- one that was refused is removed, and what it told is acknowledged by hand
DELETE FROM usage_report WHERE account = 'mirror:told';
SELECT * FROM acknowledge(6);
SELECT * FROM acknowledge(36);
SELECT * FROM acknowledge(37);
-- what is refunded when it has been told is owed
UPDATE lease_usage SET consumed = 26, owed = 10 WHERE account = 'mirror:told';
SELECT available FROM lease_refund('mirror:told', (SELECT entry_id FROM ledger WHERE account = 'mirror:told' AND kind = 'consume'), 10);
UPDATE lease_usage u SET entry_id = (SELECT max(l.entry_id) FROM ledger l WHERE l.account = u.account) WHERE u.account = 'mirror:told';
SELECT * FROM acknowledge(36);
SELECT * FROM acknowledge(37);
-- raised in both places, it is seen in the one
UPDATE mirror SET entry_id = NULL, included = 37, balance = balance - 37 WHERE account = 'mirror:told';
SELECT * FROM acknowledge(37);
SELECT * FROM acknowledge(36);
ROLLBACK;

-- What several have paid is told to each of them in quantities that add up, or
-- where they would be too small, in credits.
BEGIN;
INSERT INTO meter (feature, credit, rate, event) VALUES ('mirror third', 'tokens', 3, 'third'), ('mirror tiny', 'tokens', 1e12, 'tiny');
SELECT * FROM sync('mirror:third', 1, 1, server => 'mirror_a');
SELECT * FROM sync('mirror:third', 10, 1, server => 'mirror_b');
SELECT t.consumed FROM lease_check('mirror:third', 'mirror third', 1) c, lease_track('mirror:third', c.reservation_id, 1) t;
SELECT * FROM sync('mirror:tiny', 0.5, 1, server => 'mirror_a');
SELECT * FROM sync('mirror:tiny', 10, 1, server => 'mirror_b');
SELECT t.consumed FROM lease_check('mirror:tiny', 'mirror tiny', 1e-12) c, lease_track('mirror:tiny', c.reservation_id, 1e-12) t;
SELECT account, server, event, quantity, credits FROM usage_report WHERE account IN ('mirror:third', 'mirror:tiny') ORDER BY 1, 2;
ROLLBACK;

SELECT * FROM lease_verify();
DELETE FROM policy WHERE account LIKE 'mirror:%';
DROP SERVER mirror_a;
DROP SERVER mirror_b;
DROP SERVER mirror_other;
DROP FOREIGN DATA WRAPPER regress_credit_lease_mirror;
DROP FUNCTION mirrors;
DROP FUNCTION sync;
DROP FUNCTION it_is;
DROP FUNCTION at;
