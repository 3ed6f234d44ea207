-- One request, as an application serves it that calls a model: hold, call the
-- model, settle. No transaction is open while the model answers.

SELECT coalesce(t.request_id, 0) AS request_id, t.account, t.prompt_tokens, t.answer_tokens,
	   t.prompt_tokens + t.answer_limit AS hold, t.prompt_tokens + t.answer_tokens AS used,
	   -- abandoned holds end soon, so that the demo need not wait a minute for them
	   CASE t.ending WHEN 'abandoned' THEN '1 second' ELSE '1 minute' END AS ttl,
	   t.ending = 'served' AS served, t.ending = 'failed' AS failed, t.sent_twice
  FROM (SELECT nextval('trace.next')) AS q (n)
  LEFT JOIN trace.request t ON t.request_id = q.n
\gset

\if :request_id
BEGIN;
SELECT applied, reservation_id
  FROM credit_lease.lease_try_reserve(:account, 'tokens', :hold, :ttl, 'request:' || :request_id)
\gset
\if :applied
INSERT INTO app.request (request_id, account, status, reservation_id, prompt_tokens)
	VALUES (:request_id, :account, 'running', :reservation_id, :prompt_tokens);
\else
INSERT INTO app.request (request_id, account, status, prompt_tokens)
	VALUES (:request_id, :account, 'refused', :prompt_tokens);
\endif
COMMIT;

\if :applied
-- the reply was lost on its way, say, and the client sends it again
\if :sent_twice
SELECT replayed
  FROM credit_lease.lease_try_reserve(:account, 'tokens', :hold, :ttl, 'request:' || :request_id);
\endif

\if :served
BEGIN;
SELECT consumed FROM credit_lease.lease_settle(:account, :reservation_id, :used);
UPDATE app.request SET status = 'served', answer_tokens = :answer_tokens, ended_at = clock_timestamp()
 WHERE request_id = :request_id;
COMMIT;
\elif :failed
BEGIN;
SELECT credit_lease.lease_cancel(:account, :reservation_id);
UPDATE app.request SET status = 'failed', ended_at = clock_timestamp()
 WHERE request_id = :request_id;
COMMIT;
\endif
\endif
\endif
