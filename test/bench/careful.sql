\set account random(1, :accounts)
\set n :n + 1
SELECT * FROM careful.consume('acct:' || :account, 'tokens', 1, :run || '-' || :n || '-' || :client_id);
