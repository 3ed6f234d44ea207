\set account random(1, :accounts)
\set n :n + 1
\if :work
BEGIN;
\endif
SELECT * FROM credit_lease.lease_consume(:pool || ':' || :account, 'tokens', 1, :run || '-' || :n || '-' || :client_id);
\if :work
SELECT pg_sleep(0.005);
COMMIT;
\endif
