\set account random(1, :accounts)
\set n :n + 1
SELECT reservation_id FROM credit_lease.lease_reserve('acct:' || :account, 'tokens', 10, '1 minute', :run || '-' || :n || '-' || :client_id) \gset
SELECT * FROM credit_lease.lease_settle('acct:' || :account, :reservation_id, 7);
