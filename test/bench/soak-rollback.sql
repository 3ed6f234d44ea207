-- half of it to a savepoint
\set account random(1, :accounts)
\set whole random(0, 1)
BEGIN;
SELECT soak.consume('acct:' || :account, 3, NULL);
SAVEPOINT here;
SELECT soak.reserve(:client_id, 'acct:' || :account, 5);
ROLLBACK TO here;
\if :whole
ROLLBACK;
\else
COMMIT;
\endif
