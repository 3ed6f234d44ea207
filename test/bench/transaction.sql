\set account random(1, :accounts)
\set n :n + 1
BEGIN;
UPDATE bare.balance SET remaining = remaining - 1 WHERE account = 'acct:' || :account;
INSERT INTO bare.ledger (account, amount, key) VALUES ('acct:' || :account, 1, :run || '-' || :n || '-' || :client_id);
COMMIT;
