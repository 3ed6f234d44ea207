--
-- Chunks: a part of a pool for one owner, who spends of it without touching
-- the pool; lease_chunk_allocate, lease_chunk, lease_chunk_consume,
-- lease_try_chunk_consume, lease_chunk_renew and lease_chunk_release.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-03-01 00:00:00+00';

-- What a pool has, by lease_balance. The terms that this does not show are in
-- the tranches; and all of them add up (rule 2) at every step.
CREATE FUNCTION pg_temp.pool(of text, OUT available numeric, OUT chunked numeric, OUT consumed numeric, OUT expired numeric,
							 OUT returned numeric, OUT books text) LANGUAGE sql AS $$
	SELECT b.available, b.chunked, b.consumed, b.expired, t.returned,
		   CASE WHEN b.granted = b.available + b.reserved + b.chunked + b.consumed + b.expired + t.returned + t.revoked
				 AND NOT EXISTS (SELECT FROM lease_verify(of)) THEN 'balance' ELSE 'DO NOT BALANCE' END
	  FROM lease_balance(of) b, (SELECT sum(t.returned), sum(t.revoked) FROM tranche t WHERE t.account = of) AS t (returned, revoked)
$$;

-- It is carved out of what is available ...
SELECT available FROM lease_topup('chunk:1', 'tokens', 1000);
SELECT chunk_id AS id, account, credit, owner, granted, remaining, expires_at, status, replayed
  FROM lease_chunk_allocate('chunk:1', 'tokens', 300, 'worker 1', '10 minutes') \gset
SELECT :'account' AS account, :'credit' AS credit, :'owner' AS owner, :granted AS granted, :remaining AS remaining,
	   :'expires_at' AS expires_at, :'status' AS status, :'replayed' AS replayed;
SELECT * FROM pg_temp.pool('chunk:1');
SELECT tranche_id = :id AS is_the_chunk, kind, owner, granted, remaining, reserved, lease_id, server, priority, expires_at
  FROM open_lease WHERE account = 'chunk:1' ORDER BY tranche_id;

-- ... and spent by its owner, which changes its row and the ledger, and nothing
-- else.
SELECT applied, chunk_id = :id AS is_the_chunk, remaining, expires_at, replayed FROM lease_chunk_consume('chunk:1', :id, 100, 'worker 1');
SELECT changed_by(format($$ SELECT lease_chunk_consume('chunk:1', %s, 20, 'worker 1') $$, :id));
SELECT applied, remaining FROM lease_try_chunk_consume('chunk:1', :id, 30, 'worker 1');
SELECT * FROM pg_temp.pool('chunk:1');
SELECT owner, granted, remaining, expires_at, status FROM lease_chunk('chunk:1', :id);
SELECT changed_by(format($$ SELECT lease_chunk('chunk:1', %s) $$, :id));

-- No more than it has, though the pool has more; the twin answers instead.
SELECT * FROM refused(format($$ SELECT lease_chunk_consume('chunk:1', %s, 151, 'worker 1') $$, :id));
SELECT applied, chunk_id = :id AS is_the_chunk, remaining, expires_at, replayed FROM lease_try_chunk_consume('chunk:1', :id, 151, 'worker 1');
SELECT changed_by(format($$ SELECT lease_try_chunk_consume('chunk:1', %s, 151, 'worker 1') $$, :id));
-- Nor can the pool spend what is carved out.
SELECT * FROM refused($$ SELECT lease_consume('chunk:1', 'tokens', 701) $$);
SELECT * FROM refused($$ SELECT lease_chunk_allocate('chunk:1', 'tokens', 701, 'worker 2') $$);

-- The rest goes back when it is released; once, however often it is asked for.
SELECT granted, remaining, expires_at, status, replayed FROM lease_chunk_release('chunk:1', :id, 'worker 1');
SELECT * FROM pg_temp.pool('chunk:1');
SELECT granted, remaining, expires_at, status, replayed FROM lease_chunk_release('chunk:1', :id, 'worker 1');
SELECT changed_by(format($$ SELECT lease_chunk_release('chunk:1', %s, 'worker 1') $$, :id));
SELECT count(*) FROM open_lease WHERE account = 'chunk:1' AND kind = 'chunk';

-- The ledger tells it all: what was carved out of the tranche, what was spent of
-- the chunk, and what that came to in the tranche. Days count it once.
SELECT kind, tranche_id = :id AS of_the_chunk, amount, released, available FROM ledger
 WHERE account = 'chunk:1' AND reservation_id = :id ORDER BY entry_id;
SELECT kind, chunk_id = :id AS is_the_chunk, reservation_id, remaining, reserved, chunked, consumed FROM movement
 WHERE account = 'chunk:1' ORDER BY entry_id;
SELECT credit, consumed, calls FROM usage_by_day WHERE account = 'chunk:1';

-- Who is not the owner, or has lost it, can do nothing with it.
SELECT chunk_id AS id FROM lease_chunk_allocate('chunk:1', 'tokens', 10, 'worker 1', '1 minute') \gset
SELECT chunk_id AS expired FROM lease_chunk_allocate('chunk:1', 'tokens', 10, 'worker 1', '1 second') \gset
SELECT chunk_id AS released FROM lease_chunk_allocate('chunk:1', 'tokens', 10, 'worker 1') \gset
SELECT status FROM lease_chunk_release('chunk:1', :released, 'worker 1');
SELECT available FROM lease_topup('chunk:2', 'tokens', 10);
SELECT chunk_id AS swept FROM lease_chunk_allocate('chunk:2', 'tokens', 10, 'worker 1', '1 second') \gset
SET credit_lease.mock_now = '2030-03-01 00:00:01+00';
SELECT available FROM lease_consume('chunk:2', 'tokens', 1);
SELECT status, remaining FROM lease_chunk('chunk:1', :expired)
 UNION ALL SELECT status, remaining FROM lease_chunk('chunk:2', :swept);
SELECT v.which, c.call, r.code, r.message, r.detail
  FROM (VALUES (1, 'somebody else''s', 'chunk:1', :id, 'worker 2'), (2, 'expired', 'chunk:1', :expired, 'worker 1'),
			   (3, 'given back', 'chunk:2', :swept, 'worker 1'), (4, 'released', 'chunk:1', :released, 'worker 1'),
			   (5, 'none', 'chunk:1', 0, 'worker 1'), (6, 'another account''s', 'chunk:2', :id, 'worker 1'),
			   (7, 'no account''s', 'chunk:none', :id, 'worker 1')) v (n, which, account, chunk_id, owner),
	   (VALUES (1, 'lease_chunk_consume(%L, %s, 1, %L)'), (2, 'lease_try_chunk_consume(%L, %s, 1, %L)'),
			   (3, 'lease_chunk_renew(%L, %s, %L)'), (4, 'lease_chunk_release(%L, %s, %L)'), (5, 'lease_chunk(%L, %s)')) c (n, call),
	   LATERAL refusal('SELECT ' || format(c.call, v.account, v.chunk_id, v.owner)) r
 WHERE r.code <> 'none'
 ORDER BY v.n, c.n;
SELECT * FROM refused(format($$ SELECT lease_chunk_consume('chunk:1', %s, 1, 'worker 2') $$, :id));
-- a name that begins like his is not his
SELECT owner, r.code FROM (VALUES ('worker'), ('worker 11'), ('WORKER 1')) v (owner),
	LATERAL refusal(format('SELECT lease_chunk_consume(''chunk:1'', %s, 1, %L)', :id, owner)) r;
SELECT * FROM pg_temp.pool('chunk:1');
SELECT * FROM pg_temp.pool('chunk:2');

-- An expired chunk counts as given back, whether or not somebody has; then a
-- call that is short of credit gives it back itself, and so does a sweep.
SELECT available FROM lease_topup('chunk:3', 'tokens', 10);
SELECT chunk_id AS first FROM lease_chunk_allocate('chunk:3', 'tokens', 4, 'a', '1 minute') \gset
SELECT chunk_id AS second FROM lease_chunk_allocate('chunk:3', 'tokens', 4, 'b', '2 minutes') \gset
SELECT remaining FROM lease_chunk_consume('chunk:3', :first, 1, 'a');
SELECT remaining FROM lease_chunk_consume('chunk:3', :second, 3, 'b');
SELECT * FROM pg_temp.pool('chunk:3');
SET credit_lease.mock_now = '2030-03-01 00:01:01+00';
SELECT * FROM pg_temp.pool('chunk:3');
SELECT available FROM lease_consume('chunk:3', 'tokens', 2);
SELECT remaining, chunked, consumed FROM tranche WHERE account = 'chunk:3';
SELECT available FROM lease_consume('chunk:3', 'tokens', 3);
SELECT remaining, chunked, consumed FROM tranche WHERE account = 'chunk:3';
SELECT * FROM pg_temp.pool('chunk:3');
SELECT * FROM refused($$ SELECT lease_consume('chunk:3', 'tokens', 1) $$);
SET credit_lease.mock_now = '2030-03-01 00:02:01+00';
SELECT * FROM pg_temp.pool('chunk:3');
SELECT lease_reclaim(1) AS one;
SELECT lease_reclaim() > 0 AS the_others;
SELECT lease_reclaim() AS none;
SELECT * FROM pg_temp.pool('chunk:3');
SELECT chunk_id = :second AS is_the_second, status, granted, remaining, consumed, returned, expires_at, ended_at
  FROM chunk WHERE account = 'chunk:3' ORDER BY chunk_id;
SELECT kind, amount, released, available FROM ledger WHERE account = 'chunk:3' AND kind LIKE 'chunk%' ORDER BY entry_id;

-- It spends several tranches in the order in which they burn, and what is left
-- goes back to those that it came from, or is lost with them (rule 8).
SET credit_lease.mock_now = '2030-03-01 01:00:00+00';
SELECT available FROM lease_topup('chunk:4', 'tokens', 10, priority => 1);
SELECT available FROM lease_topup('chunk:4', 'tokens', 10, priority => 2);
SELECT available FROM lease_topup('chunk:4', 'tokens', 10, expires_at => '2030-03-01 02:00:00+00', priority => 3);
-- no chunk outlives what it came from
SELECT chunk_id AS short, expires_at FROM lease_chunk_allocate('chunk:4', 'tokens', 25, 'a', '1 day') \gset
SELECT :'expires_at' AS expires_at;
SELECT remaining FROM lease_chunk_consume('chunk:4', :short, 13, 'a');
SELECT expires_at FROM lease_chunk_renew('chunk:4', :short, 'a', '2 days');
SELECT * FROM pg_temp.pool('chunk:4');
BEGIN;
SELECT status FROM lease_chunk_release('chunk:4', :short, 'a');
SELECT priority, remaining, chunked, consumed, expired FROM tranche WHERE account = 'chunk:4' ORDER BY priority;
SELECT kind, amount, released, lapsed, first_entry_id IS NULL AS is_first, parts FROM ledger WHERE account = 'chunk:4' AND kind LIKE 'chunk%' ORDER BY entry_id;
SELECT * FROM pg_temp.pool('chunk:4');
ROLLBACK;
SET credit_lease.mock_now = '2030-03-01 02:00:00+00';
SELECT * FROM pg_temp.pool('chunk:4');
SELECT lease_reclaim();
SELECT priority, remaining, chunked, consumed, expired FROM tranche WHERE account = 'chunk:4' ORDER BY priority;
SELECT kind, amount, released, lapsed FROM ledger WHERE account = 'chunk:4' AND kind LIKE 'chunk%' ORDER BY entry_id;
SELECT * FROM pg_temp.pool('chunk:4');

-- How long one lives: what the call says, or else what the policy says of
-- holds; a renewal only moves that forward.
SELECT available FROM lease_topup('chunk:5', 'tokens', 100);
SELECT chunk_id AS id, expires_at FROM lease_chunk_allocate('chunk:5', 'tokens', 10, 'a') \gset
SELECT :'expires_at' AS expires_at;
SELECT expires_at FROM lease_chunk_renew('chunk:5', :id, 'a', '1 second');
SELECT changed_by(format($$ SELECT lease_chunk_renew('chunk:5', %s, 'a', '1 second') $$, :id));
SELECT expires_at, status, replayed FROM lease_chunk_renew('chunk:5', :id, 'a', '5 minutes');
SELECT changed_by(format($$ SELECT lease_chunk_renew('chunk:5', %s, 'a', '6 minutes') $$, :id));
INSERT INTO policy (account, hold_ttl) VALUES ('chunk:5', '10 minutes');
SELECT expires_at FROM lease_chunk_renew('chunk:5', :id, 'a');
SELECT expires_at FROM lease_chunk_allocate('chunk:5', 'tokens', 10, 'b');
DELETE FROM policy WHERE account = 'chunk:5';
SELECT * FROM pg_temp.pool('chunk:5');

-- Keys (rule 5). What made a chunk that has ended makes none again.
SELECT chunk_id AS id, replayed FROM lease_chunk_allocate('chunk:5', 'tokens', 10, 'a', '1 minute', 'job 1') \gset
SELECT remaining FROM lease_chunk_consume('chunk:5', :id, 4, 'a', 'unit 1');
SELECT remaining FROM lease_chunk_consume('chunk:5', :id, 3, 'a', 'unit 2');
SELECT chunk_id = :id AS is_the_chunk, remaining, status, replayed FROM lease_chunk_allocate('chunk:5', 'tokens', 10, 'a', '1 minute', 'job 1');
SELECT applied, remaining, replayed FROM lease_chunk_consume('chunk:5', :id, 4.0, 'a', 'unit 1');
SELECT applied, remaining, replayed FROM lease_try_chunk_consume('chunk:5', :id, 3, 'a', 'unit 2');
-- other arguments, and other functions
SELECT c.call, r.code, r.detail FROM (VALUES
	(1, $$lease_chunk_allocate('chunk:5', 'tokens', 11, 'a', '1 minute', 'job 1')$$),
	(2, $$lease_chunk_allocate('chunk:5', 'tokens', 10, 'b', '1 minute', 'job 1')$$),
	(3, $$lease_chunk_allocate('chunk:5', 'tokens', 10, 'a', '2 minutes', 'job 1')$$),
	(4, $$lease_chunk_allocate('chunk:5', 'tokens', 4, 'a', '1 minute', 'unit 1')$$),
	(5, $$lease_chunk_consume('chunk:5', CHUNK, 5, 'a', 'unit 1')$$),
	(6, $$lease_chunk_consume('chunk:5', CHUNK, 100, 'a', 'unit 1')$$),
	(7, $$lease_chunk_consume('chunk:5', CHUNK, 10, 'a', 'job 1')$$),
	(8, $$lease_consume('chunk:5', 'tokens', 4, 'unit 1')$$),
	(9, $$lease_consume('chunk:5', 'tokens', 1000, 'unit 1')$$)
  ) c (n, call), LATERAL refusal('SELECT ' || replace(c.call, 'CHUNK', :id::text)) r ORDER BY c.n;
SELECT applied FROM lease_consume('chunk:5', 'tokens', 4, 'unit 3');
SELECT code, detail FROM refusal(format($$ SELECT lease_chunk_consume('chunk:5', %s, 4, 'a', 'unit 3') $$, :id));
SELECT chunk_id AS other FROM lease_chunk_allocate('chunk:5', 'tokens', 10, 'a', '1 minute', 'job 2') \gset
SELECT code, detail FROM refusal(format($$ SELECT lease_chunk_consume('chunk:5', %s, 4, 'a', 'unit 1') $$, :other));
-- a refusal is not remembered, and what was spent stays spent, whatever becomes of the chunk
SELECT code FROM refusal(format($$ SELECT lease_chunk_consume('chunk:5', %s, 11, 'a', 'unit 4') $$, :other));
SELECT applied FROM lease_chunk_consume('chunk:5', :other, 10, 'a', 'unit 4');
SELECT applied, remaining, replayed FROM lease_chunk_consume('chunk:5', :other, 10, 'a', 'unit 4');
SELECT status FROM lease_chunk_release('chunk:5', :other, 'a');
SELECT applied, remaining, replayed FROM lease_chunk_consume('chunk:5', :other, 10, 'a', 'unit 4');
SELECT * FROM refused($$ SELECT lease_chunk_allocate('chunk:5', 'tokens', 10, 'a', '1 minute', 'job 2') $$);
SET credit_lease.mock_now = '2030-03-01 02:01:00+00';
SELECT applied, remaining, replayed FROM lease_try_chunk_consume('chunk:5', :id, 4, 'a', 'unit 1');
SELECT * FROM refused($$ SELECT lease_chunk_allocate('chunk:5', 'tokens', 10, 'a', '1 minute', 'job 1') $$);
SELECT * FROM pg_temp.pool('chunk:5');

-- A frozen pool gives nothing of its chunks either; it takes them back.
SELECT available FROM lease_topup('chunk:6', 'tokens', 100);
SELECT chunk_id AS id FROM lease_chunk_allocate('chunk:6', 'tokens', 10, 'a', '1 hour') \gset
SELECT applied FROM lease_chunk_consume('chunk:6', :id, 2, 'a', 'before');
SELECT lease_freeze('chunk:6', 'images');
SELECT applied FROM lease_chunk_consume('chunk:6', :id, 2, 'a');
SELECT lease_freeze('chunk:6', 'tokens', 'looks like fraud');
SELECT * FROM refused(format($$ SELECT lease_chunk_consume('chunk:6', %s, 2, 'a') $$, :id));
SELECT * FROM refused(format($$ SELECT lease_chunk_renew('chunk:6', %s, 'a', '2 hours') $$, :id));
SELECT * FROM refused($$ SELECT lease_chunk_allocate('chunk:6', 'tokens', 10, 'a') $$);
SELECT applied, remaining, replayed FROM lease_try_chunk_consume('chunk:6', :id, 2, 'a');
SELECT applied, remaining, replayed FROM lease_chunk_consume('chunk:6', :id, 2, 'a', 'before');
SELECT status FROM lease_chunk_release('chunk:6', :id, 'a');
SELECT * FROM pg_temp.pool('chunk:6');

-- Of a lease: released meanwhile, it still pays for what is spent of the chunk,
-- and what comes back is returned. Its usage is what the end entry says.
SELECT lease_install('chunk:7', 'tokens', 'L1', 100, '2030-03-01 03:00:00+00');
SELECT chunk_id AS id FROM lease_chunk_allocate('chunk:7', 'tokens', 40, 'a', '10 minutes') \gset
SELECT applied FROM lease_chunk_consume('chunk:7', :id, 5, 'a');
SELECT lease_release('chunk:7', 'tokens');
SELECT open FROM tranche WHERE account = 'chunk:7';
SELECT applied, remaining FROM lease_chunk_consume('chunk:7', :id, 5, 'a');
SELECT * FROM pg_temp.pool('chunk:7');
SELECT status FROM lease_chunk_release('chunk:7', :id, 'a');
SELECT * FROM pg_temp.pool('chunk:7');
SELECT open FROM tranche WHERE account = 'chunk:7';
SELECT kind, remaining, chunked, consumed, returned FROM movement WHERE account = 'chunk:7' AND chunk_id <> tranche_id ORDER BY entry_id;

-- What was spent of a chunk is not refunded.
SELECT entry_id FROM ledger WHERE account = 'chunk:7' AND kind = 'consume' LIMIT 1 \gset
SELECT entry_id AS end_entry_id FROM ledger WHERE account = 'chunk:7' AND kind = 'chunk_release' \gset
SELECT entry_id AS carve_entry_id FROM ledger WHERE account = 'chunk:7' AND kind = 'chunk' \gset
SELECT * FROM refused(format($$ SELECT lease_refund('chunk:7', %s) $$, :entry_id));
SELECT * FROM refused(format($$ SELECT lease_refund('chunk:7', %s) $$, :end_entry_id));
SELECT * FROM refused(format($$ SELECT lease_refund('chunk:7', %s) $$, :carve_entry_id));

-- Rolled back, nothing has happened (rule 9).
SELECT available FROM lease_topup('chunk:8', 'tokens', 100);
SELECT chunk_id AS id FROM lease_chunk_allocate('chunk:8', 'tokens', 10, 'a', '1 hour') \gset
BEGIN;
SELECT applied FROM lease_chunk_consume('chunk:8', :id, 2, 'a', 'again');
SELECT status FROM lease_chunk_release('chunk:8', :id, 'a');
SELECT remaining FROM lease_chunk_allocate('chunk:8', 'tokens', 50, 'a', '1 hour', 'once more');
ROLLBACK;
SELECT * FROM pg_temp.pool('chunk:8');
SELECT applied, remaining, replayed FROM lease_chunk_consume('chunk:8', :id, 2, 'a', 'again');
SELECT remaining, replayed FROM lease_chunk_allocate('chunk:8', 'tokens', 50, 'a', '1 hour', 'once more');

-- Exactly: all of a chunk, and all of a pool.
SELECT available FROM lease_topup('chunk:9', 'tokens', 0.000000000002);
SELECT chunk_id AS id, remaining FROM lease_chunk_allocate('chunk:9', 'tokens', 0.000000000002, 'a') \gset
SELECT applied, remaining FROM lease_chunk_consume('chunk:9', :id, 0.000000000001, 'a');
SELECT applied, remaining FROM lease_chunk_consume('chunk:9', :id, 0.000000000001, 'a');
SELECT * FROM pg_temp.pool('chunk:9');
SELECT status FROM lease_chunk_release('chunk:9', :id, 'a');
SELECT remaining, chunked, consumed, open FROM tranche WHERE account = 'chunk:9';
SELECT * FROM pg_temp.pool('chunk:9');

-- Bad arguments.
SELECT chunk_id AS id FROM lease_chunk_allocate('chunk:5', 'tokens', 10, 'a', '1 hour') \gset
SELECT c.call, r.code, r.message FROM (VALUES
	(1, $$lease_chunk_allocate(NULL, 'tokens', 1, 'a')$$),
	(2, $$lease_chunk_allocate('chunk:5', '', 1, 'a')$$),
	(3, $$lease_chunk_allocate('chunk:5', 'tokens', 0, 'a')$$),
	(4, $$lease_chunk_allocate('chunk:5', 'tokens', 'NaN', 'a')$$),
	(5, $$lease_chunk_allocate('chunk:5', 'tokens', 1, NULL)$$),
	(6, $$lease_chunk_allocate('chunk:5', 'tokens', 1, '')$$),
	(7, $$lease_chunk_allocate('chunk:5', 'tokens', 1, repeat('x', 513))$$),
	(8, $$lease_chunk_allocate('chunk:5', 'tokens', 1, 'a', '0')$$),
	(9, $$lease_chunk_allocate('chunk:5', 'tokens', 1, 'a', '11 years')$$),
	(10, $$lease_chunk_allocate('chunk:5', 'tokens', 1, 'a', NULL, '')$$),
	(11, $$lease_chunk_consume(NULL, CHUNK, 1, 'a')$$),
	(12, $$lease_chunk_consume('chunk:5', NULL, 1, 'a')$$),
	(13, $$lease_chunk_consume('chunk:5', CHUNK, NULL, 'a')$$),
	(14, $$lease_chunk_consume('chunk:5', CHUNK, -1, 'a')$$),
	(15, $$lease_chunk_consume('chunk:5', CHUNK, 1e-13, 'a')$$),
	(16, $$lease_chunk_consume('chunk:5', CHUNK, 1, NULL)$$),
	(17, $$lease_try_chunk_consume('chunk:5', CHUNK, 0, 'a')$$),
	(18, $$lease_chunk_renew('chunk:5', CHUNK, NULL)$$),
	(19, $$lease_chunk_renew('chunk:5', CHUNK, 'a', '-1 minute')$$),
	(20, $$lease_chunk_release('chunk:5', CHUNK, NULL)$$),
	(21, $$lease_chunk_release('chunk:5', NULL, 'a')$$),
	(22, $$lease_chunk('chunk:5', NULL)$$),
	(23, $$lease_chunk('', CHUNK)$$)
  ) c (n, call), LATERAL refusal('SELECT ' || replace(c.call, 'CHUNK', :id::text)) r ORDER BY c.n;

--
-- Books that were changed behind the functions' back: lease_verify names what
-- does not hold, and calls refuse it rather than make it worse (rule 3).
--
SELECT tranche_id, available FROM lease_topup('chunk:0', 'tokens', 100) \gset
SELECT chunk_id AS id FROM lease_chunk_allocate('chunk:0', 'tokens', 10, 'a', '1 hour') \gset
SELECT applied FROM lease_chunk_consume('chunk:0', :id, 4, 'a');
SELECT chunk_id AS ended FROM lease_chunk_allocate('chunk:0', 'tokens', 10, 'a', '1 hour') \gset
SELECT applied FROM lease_chunk_consume('chunk:0', :ended, 4, 'a');
SELECT status FROM lease_chunk_release('chunk:0', :ended, 'a');
SET test.live = :id;
SET test.ended = :ended;
SET test.tranche = :tranche_id;
CREATE FUNCTION pg_temp.after(statement text, OUT findings text, OUT consumes text, OUT releases text, OUT allocates text) LANGUAGE plpgsql AS $$
BEGIN
	statement := replace(replace(replace(statement, 'LIVE', current_setting('test.live')), 'ENDED', current_setting('test.ended')),
						 'TRANCHE', current_setting('test.tranche'));
	BEGIN
		EXECUTE statement;
		SELECT string_agg(regexp_replace(v.rule, ' \d+ ', ' # ') || ': ' || v.expected || ', not ' || coalesce(v.found::text, 'null'), chr(10)
						  ORDER BY v.rule COLLATE "C", v.found)
		  INTO findings FROM lease_verify('chunk:0') v;
		SELECT r.code INTO consumes FROM refusal(format('SELECT lease_chunk_consume(''chunk:0'', %s, 1, ''a'')', current_setting('test.live'))) r;
		SELECT r.code INTO releases FROM refusal(format('SELECT lease_chunk_release(''chunk:0'', %s, ''a'')', current_setting('test.live'))) r;
		SELECT r.code INTO allocates FROM refusal('SELECT lease_chunk_allocate(''chunk:0'', ''tokens'', 1, ''a'')') r;
		RAISE SQLSTATE 'P9999';
	EXCEPTION WHEN SQLSTATE 'P9999' THEN
	END;
END
$$;
BEGIN;
ALTER TABLE ledger DISABLE TRIGGER ledger_guard;
SELECT v.statement, a.* FROM (VALUES
	(1, 'SELECT'),
	(2, 'UPDATE chunk SET remaining = remaining + 1 WHERE chunk_id = LIVE'),
	(3, 'UPDATE chunk SET remaining = remaining + 1, consumed = consumed - 1 WHERE chunk_id = LIVE'),
	(4, 'UPDATE chunk SET consumed = 11, remaining = -1 WHERE chunk_id = LIVE'),
	(5, 'UPDATE chunk SET consumed = -1, remaining = 11 WHERE chunk_id = LIVE'),
	(6, 'UPDATE chunk SET returned = 1, remaining = 5 WHERE chunk_id = LIVE'),
	(7, 'UPDATE chunk SET granted = 11, remaining = 7 WHERE chunk_id = LIVE'),
	(8, $$UPDATE chunk SET granted = 'NaN', remaining = 'NaN' WHERE chunk_id = LIVE$$),
	(9, 'UPDATE chunk SET tranche_amounts = ARRAY[9] WHERE chunk_id = LIVE'),
	(10, 'UPDATE chunk SET tranche_ids = ARRAY[0] WHERE chunk_id = LIVE'),
	(11, 'UPDATE chunk SET tranche_amounts = ARRAY[4, 6] WHERE chunk_id = LIVE'),
	(12, 'UPDATE chunk SET tranche_ids = ARRAY[TRANCHE, TRANCHE] WHERE chunk_id = LIVE'),
	(13, 'UPDATE chunk SET tranche_ids = ARRAY[TRANCHE, TRANCHE], tranche_amounts = ARRAY[-1, 11] WHERE chunk_id = LIVE'),
	(14, $$UPDATE chunk SET status = 'expired' WHERE chunk_id = LIVE$$),
	(15, 'DELETE FROM chunk WHERE chunk_id = LIVE'),
	(16, 'UPDATE chunk SET remaining = 1, returned = 5 WHERE chunk_id = ENDED'),
	(17, 'UPDATE chunk SET consumed = 5, returned = 5 WHERE chunk_id = ENDED'),
	(18, $$UPDATE chunk SET status = 'live' WHERE chunk_id = ENDED$$),
	(19, 'UPDATE tranche SET chunked = 9, remaining = remaining + 1 WHERE tranche_id = TRANCHE'),
	(20, $$UPDATE ledger SET amount = 5 WHERE reservation_id = ENDED AND kind = 'chunk_release'$$),
	(21, $$DELETE FROM ledger WHERE reservation_id = LIVE AND kind = 'consume'$$),
	(22, $$DELETE FROM ledger WHERE reservation_id = LIVE AND kind = 'chunk'$$)
  ) v (n, statement), LATERAL pg_temp.after(v.statement) a ORDER BY v.n;
ROLLBACK;

-- A trigger on the ledger that spends of the same chunk makes the call fail.
CREATE FUNCTION pg_temp.spend_more() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NEW.amount = 1 THEN
		PERFORM credit_lease.lease_chunk_consume('chunk:0', NEW.reservation_id, 2, 'a');
	END IF;
	RETURN NEW;
END
$$;
BEGIN;
CREATE TRIGGER spend_more BEFORE INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION pg_temp.spend_more();
SELECT code, message FROM refusal(format($$ SELECT lease_chunk_consume('chunk:0', %s, 1, 'a') $$, :id));
ROLLBACK;

SELECT * FROM credit_lease.lease_verify();
