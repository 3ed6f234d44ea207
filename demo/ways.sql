-- The requests of the hour that were served once more, paid for in three other
-- ways, each of accounts of its own: all end with the same totals.

CREATE TABLE trace.way (
	way text NOT NULL,
	account text NOT NULL,
	tokens numeric NOT NULL,
	PRIMARY KEY (way, account)
);
COMMENT ON TABLE trace.way IS 'what each account has spent, by the way in which it was paid for';

CREATE TABLE trace.used AS
SELECT row_number() OVER (ORDER BY t.request_id) AS n, t.account, t.at,
	   (t.prompt_tokens + t.answer_tokens)::numeric AS tokens
  FROM trace.request t
  JOIN app.request r ON r.request_id = t.request_id AND r.status = 'served';
COMMENT ON TABLE trace.used IS 'what the requests used that were served';
ALTER TABLE trace.used ADD PRIMARY KEY (n);
INSERT INTO trace.way SELECT 'the requests themselves', account, sum(tokens) FROM trace.used GROUP BY account;

-- The balance lives elsewhere: in a billing system that hears of what was spent
-- every thousand requests, and says what is left then.
CREATE TABLE trace.elsewhere AS SELECT account, 2 * sum(tokens) AS deposit, 2 * sum(tokens) AS balance FROM trace.used GROUP BY account;
COMMENT ON TABLE trace.elsewhere IS 'the balances of a billing system that lends nothing';
SELECT count(lease_sync('mirror ' || account, 'tokens', balance, clock_timestamp())) FROM trace.elsewhere \g /dev/null
DO $$
DECLARE
	used record;
	heard_at timestamptz;
BEGIN
	FOR used IN SELECT * FROM trace.used ORDER BY n LOOP
		PERFORM lease_consume('mirror ' || used.account, 'tokens', used.tokens, 'request ' || used.n);
		CONTINUE WHEN used.n % 1000 <> 0;
		heard_at := clock_timestamp();
		UPDATE trace.elsewhere e SET balance = e.deposit - coalesce((SELECT sum(m.consumed) FROM credit_lease.movement m
			WHERE m.account = 'mirror ' || e.account AND m.created_at <= heard_at), 0);
		-- what is spent before it is heard of here, it does not know of
		PERFORM lease_consume('mirror ' || e.account, 'tokens', 1, 'meanwhile ' || used.n) FROM trace.elsewhere e;
		PERFORM lease_sync('mirror ' || e.account, 'tokens', e.balance, heard_at) FROM trace.elsewhere e;
		PERFORM lease_refund('mirror ' || e.account, l.entry_id) FROM trace.elsewhere e
			JOIN credit_lease.ledger l ON l.account = 'mirror ' || e.account AND l.idempotency_key = 'meanwhile ' || used.n;
		COMMIT;
	END LOOP;
END $$;
INSERT INTO trace.way
SELECT 'a mirror', e.account, e.deposit - b.available
  FROM trace.elsewhere e, LATERAL lease_balance('mirror ' || e.account, 'tokens') b;

-- A session for each account: a deposit, of which ever more is authorized.
SELECT count(lease_topup('session ' || account, 'tokens', deposit)) FROM trace.elsewhere \g /dev/null
SELECT count(lease_session_open('session ' || account, 'tokens', 'hour', deposit / 4, '1 hour')) FROM trace.elsewhere \g /dev/null
DO $$
DECLARE
	used record;
	answer record;
BEGIN
	FOR used IN SELECT * FROM trace.used ORDER BY n LOOP
		LOOP
			SELECT * INTO answer FROM lease_session_charge('session ' || used.account, 'hour', used.tokens);
			EXIT WHEN answer.applied;
			IF answer.required_cumulative > answer.deposit THEN
				PERFORM lease_session_topup('session ' || used.account, 'hour', answer.required_cumulative - answer.deposit);
			END IF;
			-- twice, as who does not hear of it does
			PERFORM lease_session_authorize('session ' || used.account, 'hour',
				least(answer.required_cumulative + 20000, greatest(answer.deposit, answer.required_cumulative)))
				FROM generate_series(1, 2);
		END LOOP;
	END LOOP;
END $$;
SELECT count(lease_session_close('session ' || account, 'hour')) FROM trace.elsewhere \g /dev/null
INSERT INTO trace.way
SELECT 'a session', e.account, e.deposit - b.available
  FROM trace.elsewhere e, LATERAL lease_balance('session ' || e.account, 'tokens') b;

-- In bulk, a thousand at a time, and the last hundred of each once more.
SELECT count(lease_topup('bulk ' || account, 'tokens', deposit)) FROM trace.elsewhere \g /dev/null
SELECT count(i)
  FROM (SELECT jsonb_agg(jsonb_build_object('account', 'bulk ' || account, 'credit', 'tokens', 'amount', tokens,
				'key', 'request ' || n, 'metadata', jsonb_build_object('at', at)) ORDER BY n) AS events
		  FROM trace.used, generate_series(0, (SELECT max(used.n) FROM trace.used) / 1000) AS batch
		 WHERE n > 1000 * batch - 100 AND n <= 1000 * (batch + 1)
		 GROUP BY batch
		 ORDER BY batch) AS b,
	   LATERAL lease_ingest(b.events) AS i \g /dev/null
INSERT INTO trace.way
SELECT 'in bulk', e.account, e.deposit - b.available
  FROM trace.elsewhere e, LATERAL lease_balance('bulk ' || e.account, 'tokens') b;


CREATE VIEW trace.same_way AS
SELECT w.way, count(*) AS accounts, sum(w.tokens) AS tokens, count(*) FILTER (WHERE w.tokens = r.tokens) = max(n.accounts) AS holds
  FROM trace.way w
  JOIN trace.way r ON r.account = w.account AND r.way = 'the requests themselves',
	   LATERAL (SELECT count(*) FROM trace.elsewhere) AS n (accounts)
 GROUP BY w.way;
COMMENT ON VIEW trace.same_way IS 'what was spent in each way, and whether each account has spent the same';

\echo 'The served requests once more, paid for in other ways (trace.same_way):'
SELECT way, accounts, to_char(tokens, 'FM999,999,999,999') AS tokens, CASE WHEN holds THEN 'equal' ELSE 'NOT EQUAL' END AS so
  FROM trace.same_way
 ORDER BY way <> 'the requests themselves', way;
SELECT count(*) AS "rows of lease_verify()" FROM lease_verify();
