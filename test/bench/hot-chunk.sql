-- a client looks its chunk up once, in a transaction of its own
\if :chunk = 0
SELECT c.chunk_id AS chunk FROM careful.chunk c WHERE c.client = :client_id \gset
\endif
\set n :n + 1
\if :work
BEGIN;
\endif
SELECT * FROM credit_lease.lease_chunk_consume('chunk:1', :chunk, 1, 'client ' || :client_id, :run || '-' || :n || '-' || :client_id);
\if :work
SELECT pg_sleep(0.005);
COMMIT;
\endif
