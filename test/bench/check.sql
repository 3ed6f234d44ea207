\set account random(1, :accounts)
SELECT reservation_id FROM credit_lease.lease_check('acct:' || :account, 'call', 10) \gset
SELECT * FROM credit_lease.lease_track('acct:' || :account, :reservation_id, 7);
