-- The application's own table, the hour of requests that is replayed, and
-- what must hold when it is over.

CREATE ROLE app LOGIN;

CREATE EXTENSION credit_lease;
SELECT credit_lease.lease_grant_access('app', 'spend') \g /dev/null

CREATE SCHEMA app;
COMMENT ON SCHEMA app IS 'what the application stores, in the same transactions that hold and spend credit';
GRANT USAGE ON SCHEMA app TO app;

CREATE TABLE app.request (
	request_id bigint PRIMARY KEY,
	account text NOT NULL,
	status text NOT NULL CHECK (status IN ('running', 'served', 'failed', 'refused')),
	reservation_id bigint,
	prompt_tokens integer NOT NULL,
	answer_tokens integer,
	started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
	ended_at timestamptz
);
COMMENT ON TABLE app.request IS 'a request that is running and whose hold has expired was abandoned';
GRANT SELECT, INSERT, UPDATE ON app.request TO app;

-- The table of application.py
CREATE TABLE app.chat (
	request text PRIMARY KEY,
	account text NOT NULL,
	reservation_id bigint,
	expires_at timestamptz,
	tokens integer,
	answer text
);
GRANT SELECT, INSERT, UPDATE ON app.chat TO app;

-- What is going to happen. The application learns how long an answer is, and
-- whether there is one, only when the request has ended.
CREATE SCHEMA trace;
COMMENT ON SCHEMA trace IS 'the requests that the demo replays';
GRANT USAGE ON SCHEMA trace TO app;

CREATE TABLE trace.loaded (
	at timestamp NOT NULL,
	prompt_tokens integer NOT NULL CHECK (prompt_tokens > 0),
	answer_tokens integer NOT NULL CHECK (answer_tokens >= 0)
);

CREATE TABLE trace.request (
	request_id bigint PRIMARY KEY,
	at timestamp NOT NULL,
	account text NOT NULL,
	prompt_tokens integer NOT NULL,
	answer_limit integer NOT NULL CHECK (answer_limit >= answer_tokens),
	answer_tokens integer NOT NULL,
	ending text NOT NULL CHECK (ending IN ('served', 'failed', 'abandoned')),
	sent_twice boolean NOT NULL
);
GRANT SELECT ON trace.request TO app;

CREATE SEQUENCE trace.next;
COMMENT ON SEQUENCE trace.next IS 'the request that the next free client takes';
GRANT USAGE ON SEQUENCE trace.next TO app;

-- Draws from (0, 1) that depend on their arguments alone: the same hour comes
-- out on every machine, whatever the plan.
CREATE FUNCTION trace.draw(n bigint, salt bigint) RETURNS double precision
	LANGUAGE sql IMMUTABLE PARALLEL SAFE
	RETURN ((hashint8extended(n, salt) & 1048575) + 0.5) / 1048576;

CREATE FUNCTION trace.draw_log_normal(n bigint, salt bigint, median double precision, sigma double precision)
	RETURNS double precision
	LANGUAGE sql IMMUTABLE PARALLEL SAFE
	RETURN median * exp(sigma * sqrt(-2 * ln(trace.draw(n, salt))) * cos(2 * pi() * trace.draw(n, salt + 1)));

-- What became of each request, as the application's table, the holds and the
-- ledger tell it.
CREATE VIEW trace.outcome AS
SELECT t.request_id, t.sent_twice,
	   CASE WHEN a.status = 'running' AND r.status = 'expired' THEN 'abandoned' ELSE a.status END AS outcome,
	   t.prompt_tokens + t.answer_limit AS asked,
	   t.prompt_tokens + t.answer_tokens AS used,
	   nullif(r.consumed, 0) AS spent,
	   CASE WHEN r.status <> 'expired' THEN r.refunded END AS given_back,
	   CASE WHEN r.status = 'expired' THEN r.refunded END AS expired,
	   CASE WHEN a.status = 'refused' THEN t.prompt_tokens + t.answer_limit END AS refused
  FROM trace.request t
  LEFT JOIN app.request a USING (request_id)
  LEFT JOIN credit_lease.reservation r ON r.account = a.account AND r.reservation_id = a.reservation_id;

CREATE TABLE trace.upstream_books (
	books jsonb NOT NULL
);
COMMENT ON TABLE trace.upstream_books IS 'what the upstream has in its own books when all is over';

-- Each lease by the upstream's books and by ours
CREATE VIEW trace.lease AS
SELECT lease_id, t.account IS NOT NULL AS is_ours, u.granted AS granted_there, u.used AS used_there,
	   u.released + u.out AS returned_there,
	   t.granted, t.consumed, t.reserved, t.remaining, t.returned + t.expired AS returned
  FROM (SELECT l.*
		  FROM trace.upstream_books b,
			   jsonb_to_recordset(b.books->'leases') AS l (id text, granted numeric, used numeric, released numeric, "out" numeric)
	   ) AS u (lease_id, granted, used, released, "out")
  FULL JOIN (SELECT * FROM credit_lease.tranche WHERE kind = 'upstream') AS t USING (lease_id);

CREATE VIEW trace.proof AS
SELECT check_name, expected, found, expected IS NOT DISTINCT FROM found AS holds
  FROM (VALUES
	('requests that ended, of those in the trace',
	 (SELECT count(*) FROM trace.request),
	 (SELECT count(*) FROM trace.outcome WHERE outcome IN ('served', 'failed', 'abandoned', 'refused'))),
	('holds made, of requests not refused (some were sent twice)',
	 (SELECT count(*) FROM app.request WHERE status <> 'refused'),
	 (SELECT count(*) FROM credit_lease.reservation WHERE account IN (SELECT account FROM trace.request))),
	('tokens charged in the ledger, of prompt + answer of those served',
	 (SELECT sum(used) FROM trace.outcome WHERE outcome = 'served'),
	 (SELECT sum(consumed) FROM credit_lease.movement WHERE account IN (SELECT account FROM trace.request))),
	('the same by the accounts'' balances',
	 (SELECT sum(used) FROM trace.outcome WHERE outcome = 'served'),
	 (SELECT sum(consumed) FROM credit_lease.balance WHERE account IN (SELECT account FROM trace.request))),
	('served requests charged anything but that',
	 0,
	 (SELECT count(*) FROM trace.outcome WHERE outcome = 'served' AND spent IS DISTINCT FROM used)),
	('tokens charged for the requests of application.py',
	 (SELECT sum(tokens) FROM app.chat), (SELECT consumed FROM credit_lease.balance WHERE account = 'acct:app')),
	('reports that the upstream counted: one of each request served',
	 (SELECT count(*) FROM trace.outcome WHERE outcome = 'served') + (SELECT count(answer) FROM app.chat),
	 (SELECT (books->'events'->'accepted')::bigint FROM trace.upstream_books)),
	('reports that it could not charge, or got twice and different',
	 0, (SELECT (books->'events'->'uncharged')::bigint + (books->'events'->'conflicts')::bigint FROM trace.upstream_books)),
	('leases that either of the two does not know',
	 0, (SELECT count(*) FROM trace.lease WHERE granted_there IS NULL OR NOT is_ours)),
	('granted here, of what the upstream granted',
	 (SELECT sum(granted_there) FROM trace.lease), (SELECT sum(granted) FROM trace.lease)),
	('spent here, of what was reported to the upstream',
	 (SELECT sum(used_there) FROM trace.lease), (SELECT sum(consumed) FROM trace.lease)),
	('leases of which the two have different books',
	 0, (SELECT count(*) FROM trace.lease
		  WHERE granted_there <> granted OR used_there <> consumed OR returned_there <> returned)),
	('holds still open', 0, (SELECT count(*) FROM credit_lease.reservation WHERE status = 'held')),
	('rows of lease_verify()', 0, (SELECT count(*) FROM credit_lease.lease_verify()))
  ) AS p (check_name, expected, found);
