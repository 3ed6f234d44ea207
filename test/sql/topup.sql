--
-- lease_topup: credit comes in, as a tranche with its own expiry and priority.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

-- Every top-up is a tranche of its own; what the pool can spend is their sum.
SELECT amount, available, replayed FROM lease_topup('topup:1', 'tokens', 100);
SELECT amount, available, replayed FROM lease_topup('topup:1', 'tokens', 50, 'invoice-7',
	expires_at => '2030-02-01', priority => 10, metadata => '{"invoice": 7}');
SELECT credit, kind, granted, remaining, reserved, priority, expires_at
  FROM open_lease WHERE account = 'topup:1' ORDER BY tranche_id;

-- The ledger has a row for each, with the words of the call.
SELECT kind, credit, amount, available, idempotency_key, metadata, created_at
  FROM ledger WHERE account = 'topup:1' ORDER BY entry_id;

-- The row and the tranche are the ones that the call returns.
SELECT entry_id, tranche_id FROM lease_topup('topup:1', 'tokens', 1) \gset
SELECT kind, amount, tranche_id = :tranche_id AS is_the_tranche
  FROM ledger WHERE account = 'topup:1' AND entry_id = :entry_id;
SELECT granted FROM open_lease WHERE account = 'topup:1' AND tranche_id = :tranche_id;

-- A pool is an account's credit: others do not notice.
SELECT available FROM lease_topup('topup:1', 'images', 3);
SELECT available FROM lease_topup('topup:2', 'tokens', 4);
SELECT account, credit, available FROM balance WHERE account LIKE 'topup:%' ORDER BY account, credit;

-- infinity is no expiry at all.
SELECT available FROM lease_topup('topup:3', 'tokens', 5, expires_at => 'infinity');
SELECT next_expiry IS NULL AS never_expires FROM lease_balance('topup:3');

-- What has expired before it is there is refused; a moment later is not.
SELECT * FROM refused($$ SELECT lease_topup('topup:3', 'tokens', 5, expires_at => '2030-01-01 00:00:00+00') $$);
SELECT available FROM lease_topup('topup:3', 'tokens', 5, expires_at => '2030-01-01 00:00:00.000001+00');

-- Amounts are exact, up to 38 digits of which 12 after the point.
SELECT available FROM lease_topup('topup:exact', 'tokens', 0.1);
SELECT available FROM lease_topup('topup:exact', 'tokens', 0.2);
SELECT available FROM lease_topup('topup:exact', 'tokens', 99999999999999999999999999.999999999999);
SELECT available FROM lease_topup('topup:exact', 'tokens', 0.000000000001);
SELECT applied, available FROM lease_consume('topup:exact', 'tokens', 99999999999999999999999999.999999999999);
SELECT available = 0.300000000001 AS exact FROM lease_balance('topup:exact');

SELECT * FROM credit_lease.lease_verify();
