\set account random(1, :accounts)
\set n :n + 1
SELECT bare.consume('acct:' || :account, 1, :run || '-' || :n || '-' || :client_id);
