-- one in twenty sends the same again
\set account random(1, :accounts)
\set amount random(1, 20)
\set key random(1, 1000000000000)
\set again random(1, 20)
SELECT soak.consume('acct:' || :account, :amount + 0.001, 'key:' || :key);
\if :again = 1
SELECT soak.consume('acct:' || :account, :amount + 0.001, 'key:' || :key);
\endif
