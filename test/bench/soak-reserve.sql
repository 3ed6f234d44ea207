\set account random(1, :accounts)
\set amount random(1, 20)
SELECT soak.reserve(:client_id, 'acct:' || :account, :amount + 0.125);
