--
-- Sessions: a deposit of a pool, spent by its cumulative amount as far as that
-- is authorized; lease_session_open, lease_session_topup,
-- lease_session_authorize, lease_session_charge, lease_session_snapshot,
-- lease_session_reconcile and lease_session_close.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-04-01 00:00:00+00';

-- What a pool has, by lease_balance and its tranches; all of it adds up (rule 2).
CREATE FUNCTION pg_temp.pool(of text, OUT available numeric, OUT chunked numeric, OUT consumed numeric, OUT expired numeric,
							 OUT returned numeric, OUT books text) LANGUAGE sql AS $$
	SELECT b.available, b.chunked, b.consumed, b.expired, t.returned,
		   CASE WHEN b.granted = b.available + b.reserved + b.chunked + b.consumed + b.expired + t.returned + t.revoked
				 AND NOT EXISTS (SELECT FROM lease_verify(of)) THEN 'balance' ELSE 'DO NOT BALANCE' END
	  FROM lease_balance(of, 'tokens') b,
		   (SELECT sum(t.returned), sum(t.revoked) FROM whole_tranche t WHERE t.account = of AND t.credit = 'tokens') AS t (returned, revoked)
$$;
-- The parts of a session, by the priority of their tranches, in the order in which it spends them.
CREATE FUNCTION pg_temp.parts(of text, name text) RETURNS text LANGUAGE sql AS $$
	SELECT string_agg(t.priority || ': ' || p.amount, ', ' ORDER BY p.n)
	  FROM chunk c, unnest(c.tranche_ids, c.tranche_amounts) WITH ORDINALITY AS p (tranche_id, amount, n)
	  JOIN tranche t USING (tranche_id)
	 WHERE c.account = of AND c.session = name AND t.account = of
$$;

-- The deposit is carved out of what is available ...
SELECT available FROM lease_topup('session:1', 'tokens', 1000);
SELECT * FROM lease_session_open('session:1', 'tokens', 'call 1', 300, '1 hour');
SELECT * FROM pg_temp.pool('session:1');
SELECT kind, owner, granted, remaining, reserved, lease_id, server, priority, expires_at
  FROM open_lease WHERE account = 'session:1' ORDER BY tranche_id;

-- ... and charged as far as is authorized. A charge beyond that is not applied,
-- and changes nothing, but says what would have to be authorized.
SELECT * FROM lease_session_charge('session:1', 'call 1', 30);
SELECT changed_by($$ SELECT lease_session_charge('session:1', 'call 1', 30) $$);
SELECT * FROM lease_session_authorize('session:1', 'call 1', 100);
SELECT * FROM lease_session_charge('session:1', 'call 1', 30);
SELECT * FROM lease_session_charge('session:1', 'call 1', 70);
SELECT * FROM lease_session_charge('session:1', 'call 1', 0.000000000001);
SELECT * FROM pg_temp.pool('session:1');

-- A charge and an authorization touch the session and the ledger, and nothing
-- else; what was authorized before is authorized already.
SELECT * FROM lease_session_authorize('session:1', 'call 1', 100.0);
SELECT * FROM lease_session_authorize('session:1', 'call 1', 0);
SELECT changed_by($$ SELECT lease_session_authorize('session:1', 'call 1', 99) $$);
SELECT changed_by($$ SELECT lease_session_authorize('session:1', 'call 1', 200) $$);
SELECT changed_by($$ SELECT lease_session_charge('session:1', 'call 1', 50) $$);
SELECT * FROM refused($$ SELECT lease_session_authorize('session:1', 'call 1', 300.000000000001) $$);
SELECT * FROM lease_session_authorize('session:1', 'call 1', 300);

-- A snapshot tells, and changes nothing.
SELECT * FROM lease_session_snapshot('session:1', 'call 1');
SELECT * FROM lease_session_snapshot('session:1', 'call 1', 12.5);
SELECT changed_by($$ SELECT lease_session_snapshot('session:1', 'call 1', 1) $$);

-- The pool cannot spend what is deposited; a session can have more of it.
SELECT * FROM refused($$ SELECT lease_consume('session:1', 'tokens', 701) $$);
SELECT * FROM refused($$ SELECT lease_session_topup('session:1', 'call 1', 701) $$);
SELECT * FROM lease_session_topup('session:1', 'call 1', 100);
SELECT * FROM lease_session_authorize('session:1', 'call 1', 400);
SELECT * FROM pg_temp.pool('session:1');

-- What was spent is spent of the tranches when it is closed, and the rest goes
-- back; once, however often it is asked for.
SELECT * FROM lease_session_close('session:1', 'call 1');
SELECT * FROM pg_temp.pool('session:1');
SELECT * FROM lease_session_close('session:1', 'call 1');
SELECT * FROM lease_session_close('session:1', 'call 1', 150);
SELECT changed_by($$ SELECT lease_session_close('session:1', 'call 1', 150.0) $$);
SELECT * FROM refused($$ SELECT lease_session_close('session:1', 'call 1', 151) $$);
SELECT * FROM lease_session_snapshot('session:1', 'call 1', 5);
SELECT count(*) FROM open_lease WHERE account = 'session:1' AND kind = 'session';

-- The ledger tells it all; days count it once.
SELECT kind, tranche_id = reservation_id AS of_the_session, amount, released, available FROM ledger
 WHERE account = 'session:1' AND reservation_id IS NOT NULL ORDER BY entry_id;
SELECT kind, chunk_id IS NOT NULL AS of_a_session, reservation_id, remaining, reserved, chunked, consumed FROM movement
 WHERE account = 'session:1' ORDER BY entry_id;
SELECT consumed, calls FROM usage_by_day WHERE account = 'session:1';

-- Closed with a final total: what was not charged yet is, authorized or not,
-- but not above the deposit, nor less than was charged.
SELECT applied FROM lease_session_open('session:1', 'tokens', 'call 2', 100, '1 hour');
SELECT applied FROM lease_session_authorize('session:1', 'call 2', 10);
SELECT applied FROM lease_session_charge('session:1', 'call 2', 10);
SELECT * FROM refused($$ SELECT lease_session_close('session:1', 'call 2', 9.9) $$);
SELECT * FROM refused($$ SELECT lease_session_close('session:1', 'call 2', 100.1) $$);
SELECT * FROM lease_session_close('session:1', 'call 2', 80);
SELECT * FROM lease_session_close('session:1', 'call 2', 80);
SELECT * FROM lease_session_close('session:1', 'call 2');
SELECT * FROM pg_temp.pool('session:1');
-- with what was charged, or with nothing; all of it, or none
SELECT applied FROM lease_session_open('session:1', 'tokens', 'none', 100, '1 hour');
SELECT * FROM lease_session_close('session:1', 'none', 0);
SELECT applied FROM lease_session_open('session:1', 'tokens', 'all', 770, '1 hour');
SELECT * FROM lease_session_close('session:1', 'all', 770);
SELECT * FROM pg_temp.pool('session:1');
SELECT open FROM tranche WHERE account = 'session:1';

--
-- A name stands for one session of its account. Opened again so, it is what it
-- is now; otherwise it is another request (rule 5).
--
SELECT available FROM lease_topup('session:2', 'tokens', 1000);
SELECT available FROM lease_topup('session:2', 'images', 1000);
SELECT applied FROM lease_session_open('session:2', 'tokens', 's', 10, '1 minute');
SELECT applied FROM lease_session_topup('session:2', 's', 5);
SELECT applied FROM lease_session_authorize('session:2', 's', 3);
SELECT * FROM lease_session_open('session:2', 'tokens', 's', 10.00, '1 minute');
SELECT changed_by($$ SELECT lease_session_open('session:2', 'tokens', 's', 10, '2 hours') $$);
SELECT * FROM refused($$ SELECT lease_session_open('session:2', 'tokens', 's', 15, '1 minute') $$);
SELECT * FROM refused($$ SELECT lease_session_open('session:2', 'images', 's', 10, '1 minute') $$);
-- also when there would not be enough
SELECT applied FROM lease_consume('session:2', 'tokens', 985);
SELECT * FROM lease_session_open('session:2', 'tokens', 's', 10);
SELECT code FROM refusal($$ SELECT lease_session_open('session:2', 'tokens', 't', 10) $$);
SELECT available FROM lease_topup('session:2', 'tokens', 1000);
-- another credit has a session of another name, another account one of the same
SELECT * FROM lease_session_open('session:2', 'images', 'S', 10, '1 minute');
SELECT available FROM lease_topup('session:3', 'tokens', 1000);
SELECT * FROM refused($$ SELECT lease_session_charge('session:3', 's', 1) $$);
SELECT * FROM lease_session_open('session:3', 'tokens', 's', 20, '1 minute');
SELECT spent, units FROM lease_session_close('session:3', 's', 20);
SELECT spent, units, status FROM lease_session_snapshot('session:2', 's');

-- What has ended answers how, to everything but a look.
SELECT applied FROM lease_session_open('session:2', 'tokens', 'closed', 10, '1 minute');
SELECT applied FROM lease_session_open('session:2', 'tokens', 'expired', 10, '1 second');
SELECT applied FROM lease_session_open('session:2', 'tokens', 'swept', 10, '1 second');
SELECT applied FROM lease_session_close('session:2', 'closed');
UPDATE chunk SET expires_at = '2030-03-31 00:00:00+00' WHERE account = 'session:2' AND session = 'swept';
SELECT lease_reclaim() >= 1 AS swept;
SET credit_lease.mock_now = '2030-04-01 00:00:01+00';
SELECT c.status, v.name, s.* FROM (VALUES ('closed'), ('expired'), ('swept')) v (name)
  JOIN chunk c ON c.account = 'session:2' AND c.session = v.name, LATERAL lease_session_snapshot('session:2', v.name) s
 ORDER BY v.name;
SELECT code, message FROM refusal($$ SELECT lease_session_open('session:none', 'tokens', 's', 1) $$);
SELECT code, message FROM refusal($$ SELECT lease_session_close('session:none', 's') $$);
SELECT v.name, c.call, r.code, r.message, r.detail
  FROM (VALUES (1, 'expired', 'session:2'), (2, 'swept', 'session:2'), (3, 'closed', 'session:2'), (4, 'none', 'session:2'),
			   (5, 'S', 'session:3')) v (n, name, account),
	   (VALUES (1, 'lease_session_open(%L, ''tokens'', %L, 10)'), (2, 'lease_session_topup(%L, %L, 1)'),
			   (3, 'lease_session_authorize(%L, %L, 1)'), (4, 'lease_session_authorize(%L, %L, 0)'),
			   (5, 'lease_session_charge(%L, %L, 1)'),
			   (6, 'lease_session_reconcile(%1$L, %2$L, ''{"session": "%2$s", "deposit": 1, "accepted_cumulative": 0, "spent": 0}'')'),
			   (7, 'lease_session_close(%L, %L, 1)'), (8, 'lease_session_snapshot(%L, %L)')) c (n, call),
	   LATERAL refusal('SELECT ' || format(c.call, v.account, v.name)) r
 WHERE r.code <> 'none'
 ORDER BY v.n, c.n;

--
-- The functions of chunks do not know sessions, nor those of sessions chunks.
--
SELECT chunk_id AS id FROM chunk WHERE account = 'session:2' AND session = 's' \gset
SELECT c.call, r.code FROM (VALUES
	(1, 'lease_chunk_consume(''session:2'', %s, 1, ''s'')'), (2, 'lease_try_chunk_consume(''session:2'', %s, 1, ''s'')'),
	(3, 'lease_chunk_renew(''session:2'', %s, ''s'')'), (4, 'lease_chunk_release(''session:2'', %s, ''s'')'),
	(5, 'lease_chunk(''session:2'', %s)')) c (n, call), LATERAL refusal('SELECT ' || format(c.call, :id)) r ORDER BY c.n;
SELECT granted FROM lease_chunk_allocate('session:2', 'tokens', 10, 'plain', '1 hour');
SELECT code FROM refusal($$ SELECT lease_session_charge('session:2', 'plain', 1) $$);
SELECT * FROM pg_temp.pool('session:2');

--
-- An expired session counts as given back, whether or not somebody has; what
-- was spent of it is spent. A call that is short gives it back itself, and so
-- does a sweep.
--
SELECT available FROM lease_topup('session:4', 'tokens', 10);
SELECT applied FROM lease_session_open('session:4', 'tokens', 'a', 4, '1 minute');
SELECT applied FROM lease_session_open('session:4', 'tokens', 'b', 4, '2 minutes');
SELECT applied FROM lease_session_authorize('session:4', 'a', 4);
SELECT applied FROM lease_session_charge('session:4', 'a', 1);
SELECT applied FROM lease_session_authorize('session:4', 'b', 4);
SELECT applied FROM lease_session_charge('session:4', 'b', 3);
SELECT * FROM pg_temp.pool('session:4');
SET credit_lease.mock_now = '2030-04-01 00:01:02+00';
SELECT * FROM pg_temp.pool('session:4');
SELECT available FROM lease_consume('session:4', 'tokens', 5);
SELECT * FROM pg_temp.pool('session:4');
SET credit_lease.mock_now = '2030-04-01 00:02:02+00';
-- a topup of one that has expired is refused, also where another call has to give it back to have enough
SELECT * FROM refused($$ SELECT lease_session_topup('session:4', 'b', 1) $$);
SELECT applied FROM lease_session_open('session:4', 'tokens', 'c', 1, '1 hour');
SELECT * FROM pg_temp.pool('session:4');
SELECT session, status, granted, remaining, consumed, returned, accepted, units FROM chunk WHERE account = 'session:4' ORDER BY chunk_id;
SELECT kind, amount, released, available FROM ledger WHERE account = 'session:4' AND kind LIKE 'session%' ORDER BY entry_id;
SELECT applied FROM lease_session_close('session:4', 'c');

-- What is available then counts holds that have expired.
SELECT available FROM lease_topup('session:13', 'tokens', 10);
SELECT available FROM lease_reserve('session:13', 'tokens', 3, '1 second');
SELECT applied FROM lease_session_open('session:13', 'tokens', 's', 5, '1 hour');
SET credit_lease.mock_now = '2030-04-01 00:02:04+00';
SELECT applied FROM lease_session_close('session:13', 's');
SELECT kind, available FROM ledger WHERE account = 'session:13' ORDER BY entry_id;

--
-- Of several tranches: in burn order, and what was spent of one stays spent of
-- it when more comes in, though that burns before.
--
SET credit_lease.mock_now = '2030-04-01 01:00:00+00';
SELECT available FROM lease_topup('session:5', 'tokens', 10, priority => 20);
SELECT available FROM lease_topup('session:5', 'tokens', 100, priority => 30);
SELECT applied FROM lease_session_open('session:5', 'tokens', 's', 15, '1 hour');
SELECT pg_temp.parts('session:5', 's');
SELECT applied FROM lease_session_authorize('session:5', 's', 15);
SELECT applied FROM lease_session_charge('session:5', 's', 8);
SELECT available FROM lease_topup('session:5', 'tokens', 5, priority => 10);
SELECT applied FROM lease_session_topup('session:5', 's', 6);
SELECT pg_temp.parts('session:5', 's');
SELECT applied FROM lease_session_charge('session:5', 's', 6);
SELECT applied FROM lease_session_topup('session:5', 's', 4);
SELECT pg_temp.parts('session:5', 's');
SELECT applied FROM lease_session_topup('session:5', 's', 5);
SELECT pg_temp.parts('session:5', 's');
SELECT available FROM lease_topup('session:5', 'tokens', 1, priority => 5);
SELECT applied FROM lease_session_topup('session:5', 's', 1);
SELECT pg_temp.parts('session:5', 's');
SELECT * FROM pg_temp.pool('session:5');
SELECT * FROM lease_session_close('session:5', 's', 16);
SELECT priority, remaining, chunked, consumed FROM tranche WHERE account = 'session:5' ORDER BY priority;
SELECT * FROM pg_temp.pool('session:5');

-- However often it is topped up, it has no more parts than it needs.
SELECT applied FROM lease_session_open('session:5', 'tokens', 't', 1, '1 hour');
DO $$
BEGIN
	FOR i IN 1..20 LOOP
		PERFORM credit_lease.lease_session_topup('session:5', 't', 1);
		PERFORM credit_lease.lease_session_authorize('session:5', 't', i);
		PERFORM credit_lease.lease_session_charge('session:5', 't', 1);
	END LOOP;
END
$$;
SELECT pg_temp.parts('session:5', 't');
SELECT * FROM lease_session_close('session:5', 't');

-- How long one lives: what the call says, or else what the policy says of
-- holds; never longer than what it came from, topped up or not.
SELECT applied FROM lease_session_open('session:5', 'tokens', 'u', 1);
INSERT INTO policy (account, hold_ttl) VALUES ('session:5', '10 minutes');
SELECT applied FROM lease_session_open('session:5', 'tokens', 'v', 1);
DELETE FROM policy WHERE account = 'session:5';
SELECT applied FROM lease_session_open('session:5', 'tokens', 'w', 1, '1 day');
SELECT available FROM lease_topup('session:5', 'tokens', 10, expires_at => '2030-04-01 05:00:00+00', priority => 1);
SELECT session, expires_at FROM chunk WHERE account = 'session:5' AND status = 'live' ORDER BY session;
SELECT applied FROM lease_session_topup('session:5', 'v', 1);
SELECT applied FROM lease_session_topup('session:5', 'w', 1);
SELECT applied FROM lease_session_open('session:5', 'tokens', 'x', 1, '1 day');
SELECT session, expires_at FROM chunk WHERE account = 'session:5' AND status = 'live' ORDER BY session;
SET credit_lease.mock_now = '2030-04-01 05:00:00+00';
SELECT lease_reclaim() > 0 AS swept;
SELECT session, status FROM chunk WHERE account = 'session:5' ORDER BY session;
SELECT * FROM pg_temp.pool('session:5');

-- Of a lease that is released meanwhile: it still pays, the session can still
-- have more, of another; and what comes back is returned.
SELECT lease_install('session:6', 'tokens', 'L1', 100, '2030-04-01 09:00:00+00');
SELECT applied FROM lease_session_open('session:6', 'tokens', 's', 40, '1 hour');
SELECT applied FROM lease_session_authorize('session:6', 's', 40);
SELECT applied FROM lease_session_charge('session:6', 's', 5);
SELECT lease_release('session:6', 'tokens');
SELECT lease_install('session:6', 'tokens', 'L2', 100, '2030-04-01 08:00:00+00');
SELECT applied FROM lease_session_charge('session:6', 's', 5);
SELECT applied FROM lease_session_topup('session:6', 's', 10);
SELECT applied FROM lease_session_charge('session:6', 's', 11);
SELECT * FROM pg_temp.pool('session:6');
SELECT spent, deposit FROM lease_session_close('session:6', 's');
SELECT lease_id, remaining, chunked, consumed, returned, open FROM tranche WHERE account = 'session:6' ORDER BY tranche_id;
SELECT * FROM pg_temp.pool('session:6');

-- What was spent of a session is not refunded.
SELECT string_agg(DISTINCT kind || ': ' || r.code || ' ' || r.message, chr(10)) FROM ledger,
	LATERAL refusal(format('SELECT lease_refund(''session:6'', %s)', entry_id)) r WHERE account = 'session:6' AND kind LIKE 'session%';

--
-- A frozen pool gives nothing of its sessions, nor to them; it takes them back.
--
SELECT available FROM lease_topup('session:7', 'tokens', 100);
SELECT applied FROM lease_session_open('session:7', 'tokens', 's', 10, '1 hour');
SELECT lease_freeze('session:7', 'images');
SELECT applied FROM lease_session_authorize('session:7', 's', 5);
SELECT applied FROM lease_session_charge('session:7', 's', 2);
SELECT lease_freeze('session:7', 'tokens', 'looks like fraud');
SELECT * FROM refused($$ SELECT lease_session_charge('session:7', 's', 1) $$);
SELECT c.call, r.code FROM (VALUES
	(1, $$lease_session_open('session:7', 'tokens', 't', 10)$$),
	(2, $$lease_session_topup('session:7', 's', 10)$$),
	(3, $$lease_session_charge('session:7', 's', 100)$$),
	(4, $$lease_session_reconcile('session:7', 's', '{"session": "s", "deposit": 11, "accepted_cumulative": 0, "spent": 0}')$$),
	(5, $$lease_session_reconcile('session:7', 's', '{"session": "s", "deposit": 10, "accepted_cumulative": 3, "spent": 3}')$$),
	(6, $$lease_session_close('session:7', 's', 3)$$)
  ) c (n, call), LATERAL refusal('SELECT ' || c.call) r ORDER BY c.n;
SELECT * FROM lease_session_open('session:7', 'tokens', 's', 10);
SELECT * FROM lease_session_authorize('session:7', 's', 10);
SELECT * FROM lease_session_reconcile('session:7', 's', '{"session": "s", "deposit": 10, "accepted_cumulative": 10, "spent": 2, "units": 3}');
SELECT * FROM lease_session_close('session:7', 's', 2);
SELECT * FROM pg_temp.pool('session:7');

--
-- Reconciled: each figure is the higher of the two, whoever has it.
--
SELECT available FROM lease_topup('session:8', 'tokens', 1000);
SELECT applied FROM lease_session_open('session:8', 'tokens', 's', 100, '1 hour');
SELECT applied FROM lease_session_authorize('session:8', 's', 50);
SELECT applied FROM lease_session_charge('session:8', 's', 20);
-- of itself, and of what it was before
SELECT changed_by($$ SELECT lease_session_reconcile('session:8', 's', to_jsonb(lease_session_snapshot('session:8', 's'))) $$);
SELECT * FROM lease_session_reconcile('session:8', 's', '{"session": "s", "deposit": 90, "accepted_cumulative": 10, "spent": 10, "units": 0}');
-- one by one
SELECT * FROM lease_session_reconcile('session:8', 's', '{"session": "s", "deposit": 90, "accepted_cumulative": 60, "spent": 10}');
SELECT * FROM lease_session_reconcile('session:8', 's', '{"session": "s", "deposit": 90, "accepted_cumulative": 30, "spent": 30}');
SELECT * FROM lease_session_reconcile('session:8', 's', '{"session": "s", "deposit": 90, "accepted_cumulative": 1, "spent": 1, "units": 7}');
SELECT * FROM lease_session_reconcile('session:8', 's', '{"session": "s", "deposit": 120, "accepted_cumulative": 1, "spent": 0}');
SELECT * FROM pg_temp.pool('session:8');
-- and all together, twice
SELECT * FROM lease_session_reconcile('session:8', 's', '{"status": "closed", "session": "s", "deposit": 150.5, "accepted_cumulative": 150.5,
	"spent": 99, "units": 11, "required_cumulative": -4, "applied": null, "more": [1]}');
SELECT * FROM lease_session_reconcile('session:8', 's', '{"session": "s", "deposit": 150.5, "accepted_cumulative": 150.5, "spent": 99, "units": 11}');
SELECT kind, amount, available FROM ledger WHERE account = 'session:8' ORDER BY entry_id;
SELECT * FROM pg_temp.pool('session:8');
SELECT * FROM refused($$ SELECT lease_session_reconcile('session:8', 's', '{"session": "s", "deposit": 1001, "accepted_cumulative": 0, "spent": 0}') $$);

-- A snapshot that is none, of another session, or cannot be: what it is that is wrong.
SELECT v.snapshot, r.code, r.message FROM (VALUES
	(1, NULL), (2, 'null'), (3, '1'), (4, '"s"'), (5, '[]'), (6, '{}'),
	(7, '{"session": "t", "deposit": 1, "accepted_cumulative": 0, "spent": 0}'),
	(8, '{"session": 1, "deposit": 1, "accepted_cumulative": 0, "spent": 0}'),
	(9, '{"session": "s", "accepted_cumulative": 0, "spent": 0}'),
	(10, '{"session": "s", "deposit": 1, "spent": 0}'),
	(11, '{"session": "s", "deposit": 1, "accepted_cumulative": 0}'),
	(12, '{"session": "s", "deposit": "1", "accepted_cumulative": 0, "spent": 0}'),
	(13, '{"session": "s", "deposit": 1, "accepted_cumulative": null, "spent": 0}'),
	(14, '{"session": "s", "deposit": 0, "accepted_cumulative": 0, "spent": 0}'),
	(15, '{"session": "s", "deposit": 1, "accepted_cumulative": -1, "spent": 0}'),
	(16, '{"session": "s", "deposit": 1, "accepted_cumulative": 0, "spent": -1}'),
	(17, '{"session": "s", "deposit": 1e40, "accepted_cumulative": 0, "spent": 0}'),
	(18, '{"session": "s", "deposit": 1, "accepted_cumulative": 0, "spent": 1e-13}'),
	(19, '{"session": "s", "deposit": 1, "accepted_cumulative": 2, "spent": 0}'),
	(20, '{"session": "s", "deposit": 1000, "accepted_cumulative": 200, "spent": 200.1}'),
	(21, '{"session": "s", "deposit": 1, "accepted_cumulative": 0, "spent": 0, "units": -1}'),
	(22, '{"session": "s", "deposit": 1, "accepted_cumulative": 0, "spent": 0, "units": 1.5}'),
	(23, '{"session": "s", "deposit": 1, "accepted_cumulative": 0, "spent": 0, "units": 9223372036854775808}'),
	(24, '{"session": "s", "deposit": 1, "accepted_cumulative": 0, "spent": 0, "units": "1"}')
  ) v (n, snapshot), LATERAL refusal(format($$ SELECT lease_session_reconcile('session:8', 's', %L) $$, v.snapshot)) r ORDER BY v.n;
SELECT applied, units FROM lease_session_reconcile('session:8', 's', '{"session": "s", "deposit": 1, "accepted_cumulative": 0, "spent": 0, "units": 9223372036854775807}');
-- more cannot be counted, but it can be closed
SELECT applied FROM lease_session_authorize('session:8', 's', 150);
SELECT * FROM refused($$ SELECT lease_session_charge('session:8', 's', 1) $$);
SELECT spent, status FROM lease_session_close('session:8', 's');

--
-- Rolled back, nothing has happened (rule 9); begun and ended in one
-- transaction, it has.
--
SELECT available FROM lease_topup('session:9', 'tokens', 100);
BEGIN;
SELECT applied FROM lease_session_open('session:9', 'tokens', 'a', 60, '1 hour');
SELECT applied FROM lease_session_authorize('session:9', 'a', 30);
SAVEPOINT s;
SELECT applied FROM lease_session_topup('session:9', 'a', 40);
SELECT applied FROM lease_session_authorize('session:9', 'a', 100);
SELECT applied FROM lease_session_charge('session:9', 'a', 70);
ROLLBACK TO s;
SELECT * FROM lease_session_snapshot('session:9', 'a');
SELECT applied FROM lease_session_open('session:9', 'tokens', 'b', 40, '1 hour');
ROLLBACK TO s;
SELECT applied FROM lease_session_charge('session:9', 'a', 30);
SELECT * FROM lease_session_close('session:9', 'a');
SELECT applied FROM lease_session_open('session:9', 'tokens', 'b', 70, '1 hour');
COMMIT;
SELECT * FROM pg_temp.pool('session:9');
BEGIN;
SELECT applied FROM lease_session_close('session:9', 'b', 70);
ROLLBACK;
SELECT * FROM lease_session_snapshot('session:9', 'b');

-- Exactly, and as large as amounts get.
SELECT available FROM lease_topup('session:10', 'tokens', 99999999999999999999999999.999999999999);
SELECT applied FROM lease_session_open('session:10', 'tokens', 's', 99999999999999999999999999.999999999998, '1 hour');
SELECT applied FROM lease_session_topup('session:10', 's', 0.000000000001);
SELECT applied FROM lease_session_authorize('session:10', 's', 99999999999999999999999999.999999999999);
SELECT applied FROM lease_session_charge('session:10', 's', 0.000000000001);
SELECT * FROM lease_session_charge('session:10', 's', 99999999999999999999999999.999999999999);
SELECT * FROM lease_session_charge('session:10', 's', 99999999999999999999999999.999999999998);
SELECT * FROM lease_session_close('session:10', 's', 99999999999999999999999999.999999999999);
SELECT * FROM pg_temp.pool('session:10');

-- In a striped pool: topped up and closed in another stripe, folded meanwhile,
-- and of a lease that is released there.
SELECT available FROM lease_topup('session:11', 'tokens', 100, priority => 2);
SELECT lease_stripe('session:11', 'tokens', 4);
SELECT applied FROM lease_session_open('session:11', 'tokens', 's', 60, '1 hour');
SELECT applied FROM lease_session_topup('session:11', 's', 30);
SELECT * FROM refused($$ SELECT lease_session_topup('session:11', 's', 30) $$);
SELECT applied FROM lease_session_authorize('session:11', 's', 90);
SELECT applied FROM lease_session_charge('session:11', 's', 25);
SELECT lease_install('session:11', 'tokens', 'L1', 40, '2030-04-01 09:00:00+00');
SELECT applied FROM lease_session_topup('session:11', 's', 20);
SELECT pg_temp.parts('session:11', 's');
SELECT lease_release('session:11', 'tokens');
SELECT available FROM lease_topup('session:11', 'tokens', 8, priority => 1);
SELECT applied FROM lease_session_topup('session:11', 's', 4);
SELECT pg_temp.parts('session:11', 's');
SELECT * FROM pg_temp.pool('session:11');
SELECT lease_stripe('session:11', 'tokens', 1);
SELECT applied FROM lease_session_topup('session:11', 's', 2);
SELECT lease_stripe('session:11', 'tokens', 2);
SELECT * FROM lease_session_reconcile('session:11', 's', '{"session": "s", "deposit": 118, "accepted_cumulative": 105, "spent": 105}');
SELECT lease_freeze('session:11', 'tokens');
SELECT code FROM refusal($$ SELECT lease_session_charge('session:11', 's', 1) $$);
SELECT code FROM refusal($$ SELECT lease_session_topup('session:11', 's', 1) $$);
SELECT code FROM refusal($$ SELECT lease_session_close('session:11', 's', 106) $$);
SELECT * FROM lease_session_close('session:11', 's');
SELECT * FROM lease_session_close('session:11', 's');
SELECT priority, remaining, chunked, consumed, returned FROM whole_tranche WHERE account = 'session:11' ORDER BY tranche_id;
SELECT * FROM pg_temp.pool('session:11');

-- Where a stripe has plenty, nobody looks further, not even for what a session
-- came from: and yet it is there.
SELECT available FROM lease_topup('session:12', 'tokens', 10000, priority => 200);
SELECT lease_stripe('session:12', 'tokens', 2);
SELECT lease_install('session:12', 'tokens', 'L2', 40, '2030-04-01 09:00:00+00');
SELECT applied FROM lease_session_open('session:12', 'tokens', 's', 10, '1 hour');
SELECT lease_release('session:12', 'tokens');
SELECT applied FROM lease_consume('session:12', 'tokens', 1), generate_series(1, 3);
SELECT applied FROM lease_session_topup('session:12', 's', 1);
SELECT pg_temp.parts('session:12', 's');
SELECT spent FROM lease_session_close('session:12', 's', 10.5);
SELECT * FROM pg_temp.pool('session:12');

-- Who listens is told when the caller has asked for it, and of what rises alone;
-- of names that are as long in JSON as names can get.
SHOW credit_lease.notify_sessions;
SELECT available FROM lease_topup(repeat(chr(1), 512), 'tokens', 100);
SET credit_lease.notify_sessions = on;
SELECT applied FROM lease_session_open(repeat(chr(1), 512), 'tokens', repeat(chr(2), 512), 50);
SELECT applied FROM lease_session_topup(repeat(chr(1), 512), repeat(chr(2), 512), 49.999999999999);
SELECT applied FROM lease_session_authorize(repeat(chr(1), 512), repeat(chr(2), 512), 99.999999999999);
SELECT applied FROM lease_session_close(repeat(chr(1), 512), repeat(chr(2), 512));
RESET credit_lease.notify_sessions;

-- Bad arguments.
SELECT c.call, r.code, r.message FROM (VALUES
	(1, $$lease_session_open(NULL, 'tokens', 's', 1)$$),
	(2, $$lease_session_open('session:9', '', 's', 1)$$),
	(3, $$lease_session_open('session:9', 'tokens', NULL, 1)$$),
	(4, $$lease_session_open('session:9', 'tokens', '', 1)$$),
	(5, $$lease_session_open('session:9', 'tokens', repeat('x', 513), 1)$$),
	(6, $$lease_session_open('session:9', 'tokens', 's', 0)$$),
	(7, $$lease_session_open('session:9', 'tokens', 's', 'NaN')$$),
	(8, $$lease_session_open('session:9', 'tokens', 's', 1, '0')$$),
	(9, $$lease_session_open('session:9', 'tokens', 's', 1, '11 years')$$),
	(10, $$lease_session_topup('session:9', NULL, 1)$$),
	(11, $$lease_session_topup('session:9', 'b', 0)$$),
	(12, $$lease_session_topup('session:9', 'b', NULL)$$),
	(13, $$lease_session_authorize('session:9', 'b', -1)$$),
	(14, $$lease_session_authorize('session:9', 'b', 'NaN')$$),
	(15, $$lease_session_authorize('session:9', 'b', 'Infinity')$$),
	(16, $$lease_session_authorize('session:9', 'b', NULL)$$),
	(17, $$lease_session_authorize('', 'b', 1)$$),
	(18, $$lease_session_charge('session:9', 'b', 0)$$),
	(19, $$lease_session_charge('session:9', 'b', -1)$$),
	(20, $$lease_session_charge('session:9', 'b', 1e-13)$$),
	(21, $$lease_session_charge('session:9', NULL, 1)$$),
	(22, $$lease_session_snapshot('session:9', 'b', -1)$$),
	(23, $$lease_session_snapshot('session:9', 'b', NULL)$$),
	(24, $$lease_session_snapshot(NULL, 'b')$$),
	(25, $$lease_session_close('session:9', NULL)$$),
	(26, $$lease_session_close('session:9', 'b', -1)$$),
	(27, $$lease_session_close('session:9', 'b', 'NaN')$$)
  ) c (n, call), LATERAL refusal('SELECT ' || c.call) r ORDER BY c.n;

--
-- Books that were changed behind the functions' back: lease_verify names what
-- does not hold, and calls refuse it rather than make it worse (rule 3).
--
SELECT available FROM lease_topup('session:0', 'tokens', 100);
SELECT applied FROM lease_session_open('session:0', 'tokens', 's', 10, '1 hour');
SELECT applied FROM lease_session_authorize('session:0', 's', 6);
SELECT applied FROM lease_session_charge('session:0', 's', 4);
SELECT chunk_id FROM lease_chunk_allocate('session:0', 'tokens', 5, 'w', '1 hour') \gset
CREATE FUNCTION pg_temp.after(statement text, OUT findings text, OUT charges text, OUT looks text, OUT closes text, OUT opens text) LANGUAGE plpgsql AS $$
BEGIN
	BEGIN
		EXECUTE statement;
		SELECT string_agg(regexp_replace(v.rule, ' \d+ ', ' # ') || ': ' || v.expected || ', not ' || coalesce(v.found::text, 'null'), chr(10)
						  ORDER BY v.rule COLLATE "C", v.found)
		  INTO findings FROM lease_verify('session:0') v;
		SELECT r.code INTO charges FROM refusal('SELECT lease_session_charge(''session:0'', ''s'', 1)') r;
		SELECT r.code INTO looks FROM refusal('SELECT lease_session_snapshot(''session:0'', ''s'')') r;
		SELECT r.code INTO closes FROM refusal('SELECT lease_session_close(''session:0'', ''s'')') r;
		SELECT r.code INTO opens FROM refusal('SELECT lease_session_open(''session:0'', ''tokens'', ''s'', 10)') r;
		RAISE SQLSTATE 'P9999';
	EXCEPTION WHEN SQLSTATE 'P9999' THEN
	END;
END
$$;
BEGIN;
ALTER TABLE ledger DISABLE TRIGGER ledger_guard;
SELECT v.statement, a.* FROM (VALUES
	(1, 'SELECT'),
	(2, 'UPDATE chunk SET accepted = 3 WHERE session = ''s'''),
	(3, 'UPDATE chunk SET accepted = 11 WHERE session = ''s'''),
	(4, 'UPDATE chunk SET accepted = ''NaN'' WHERE session = ''s'''),
	(5, 'UPDATE chunk SET accepted = NULL WHERE session = ''s'''),
	(6, 'UPDATE chunk SET units = -1 WHERE session = ''s'''),
	(7, 'UPDATE chunk SET units = NULL WHERE session = ''s'''),
	(8, 'UPDATE chunk SET deposited = 11 WHERE session = ''s'''),
	(9, 'UPDATE chunk SET deposited = 0 WHERE session = ''s'''),
	(10, 'UPDATE chunk SET deposited = NULL WHERE session = ''s'''),
	(11, 'UPDATE chunk SET consumed = 5, remaining = 5 WHERE session = ''s'''),
	(12, 'UPDATE chunk SET remaining = 7 WHERE session = ''s'''),
	(13, 'UPDATE chunk SET session = NULL WHERE session = ''s'''),
	(14, 'UPDATE chunk SET session = NULL, accepted = NULL, units = NULL, deposited = NULL WHERE session = ''s'''),
	(15, 'UPDATE chunk SET session = owner, accepted = 0, units = 0, deposited = 5 WHERE owner = ''w'''),
	(16, 'UPDATE chunk SET tranche_amounts = ARRAY[9] WHERE session = ''s'''),
	(17, 'DELETE FROM ledger WHERE account = ''session:0'' AND kind = ''session_charge''')
  ) v (n, statement), LATERAL pg_temp.after(replace(v.statement, 'WHERE', 'WHERE account = ''session:0'' AND')) a ORDER BY v.n;
ROLLBACK;

-- A trigger on the ledger that charges the same session makes the call fail.
CREATE FUNCTION pg_temp.charge_more() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NEW.amount = 1 THEN
		PERFORM credit_lease.lease_session_charge('session:0', 's', 0.5);
	END IF;
	RETURN NEW;
END
$$;
BEGIN;
CREATE TRIGGER charge_more BEFORE INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION pg_temp.charge_more();
SELECT code, message FROM refusal($$ SELECT lease_session_charge('session:0', 's', 1) $$);
ROLLBACK;

SELECT * FROM credit_lease.lease_verify();
