-- One request, as an application serves it that calls a model: check, call the
-- model, track. No transaction is open while the model answers.

SELECT coalesce(t.request_id, 0) AS request_id, t.account, t.prompt_tokens, t.answer_tokens,
	   t.prompt_tokens + t.answer_limit AS most, t.prompt_tokens + t.answer_tokens AS used,
	   -- abandoned holds end soon, so that the demo need not wait a minute for them
	   CASE t.ending WHEN 'abandoned' THEN '1 second' ELSE '1 minute' END AS ttl,
	   t.ending = 'served' AS served, t.ending = 'failed' AS failed, t.sent_twice
  FROM (SELECT nextval('trace.next')) AS q (n)
  LEFT JOIN trace.request t ON t.request_id = q.n
\gset

\if :request_id
-- The check has no key: the application's own row is what a request has once.
BEGIN;
INSERT INTO app.request (request_id, account, status, prompt_tokens)
	VALUES (:request_id, :account, 'running', :prompt_tokens);
SELECT allowed, coalesce(reservation_id, 0) AS reservation_id
  FROM credit_lease.lease_check(:account, 'chat', :most, ttl => :ttl)
\gset
UPDATE app.request
   SET reservation_id = nullif(:reservation_id, 0), status = CASE WHEN :allowed THEN 'running' ELSE 'refused' END
 WHERE request_id = :request_id;
COMMIT;

-- The reply was lost on its way, say, and the client sends it again: the row is
-- there, and has the hold.
\if :sent_twice
BEGIN;
INSERT INTO app.request (request_id, account, status, prompt_tokens)
	VALUES (:request_id, :account, 'running', :prompt_tokens)
	ON CONFLICT DO NOTHING;
SELECT status = 'running' AS allowed, coalesce(reservation_id, 0) AS reservation_id
  FROM app.request
 WHERE request_id = :request_id
\gset
COMMIT;
\endif

\if :allowed
\if :served
BEGIN;
SELECT consumed FROM credit_lease.lease_track(:account, :reservation_id, :used);
UPDATE app.request SET status = 'served', answer_tokens = :answer_tokens, ended_at = clock_timestamp()
 WHERE request_id = :request_id;
COMMIT;
-- the reply to that was lost too: what is tracked twice counts once
\if :sent_twice
SELECT consumed FROM credit_lease.lease_track(:account, :reservation_id, :used);
\endif
\elif :failed
BEGIN;
SELECT credit_lease.lease_cancel(:account, :reservation_id);
UPDATE app.request SET status = 'failed', ended_at = clock_timestamp()
 WHERE request_id = :request_id;
COMMIT;
\endif
\endif
\endif
