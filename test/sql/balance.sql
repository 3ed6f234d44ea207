--
-- What people look at: lease_balance and the views.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 20:00:00+00';

-- A day of an account.
SELECT available FROM lease_topup('balance:1', 'tokens', 100);
SELECT available FROM lease_topup('balance:1', 'tokens', 50, expires_at => '2030-01-02 00:00:00+00', priority => 10);
SELECT available FROM lease_topup('balance:1', 'images', 5, expires_at => '2030-02-01 00:00:00+00');
SELECT entry_id FROM lease_consume('balance:1', 'tokens', 20) \gset
SELECT available FROM lease_consume('balance:1', 'images', 1);
SELECT available FROM lease_refund('balance:1', :entry_id, 5);
SELECT available FROM lease_reserve('balance:1', 'tokens', 40, '1 hour', metadata => '{"job": 1}');
SELECT available FROM lease_reserve('balance:1', 'tokens', 10, '30 hours', metadata => '{"job": 2}');
SELECT reservation_id FROM lease_reserve('balance:1', 'tokens', 15, '1 hour', metadata => '{"job": 3}') \gset
SELECT consumed, refunded, available FROM lease_settle('balance:1', :reservation_id, 9);
SELECT available FROM lease_adjust('balance:1', 'tokens', -6, 'paid twice');

-- One row for each credit; or for one.
SELECT * FROM lease_balance('balance:1');
SELECT * FROM lease_balance('balance:1', 'images');
SELECT * FROM lease_balance('balance:1', 'nothing');
SELECT * FROM lease_balance('balance:nobody');
-- The view is the same for everyone.
SELECT * FROM balance WHERE account = 'balance:1' ORDER BY credit;

-- Every tranche and every hold that is alive.
SELECT account, credit, kind, lease_id, owner, server, granted, remaining, reserved, priority, expires_at
  FROM open_lease WHERE account = 'balance:1' ORDER BY tranche_id;
SELECT account, credit, amount, created_at, expires_at, metadata
  FROM open_reservation WHERE account = 'balance:1' ORDER BY reservation_id;
SELECT count(*) FROM expired_hold WHERE account = 'balance:1';

-- The next day: one tranche and one hold have expired, and another hold
-- outlives its tranche. Nobody has swept.
SET credit_lease.mock_now = '2030-01-02 20:00:00+00';
SELECT * FROM lease_balance('balance:1');
SELECT credit, kind, granted, remaining, reserved, priority, expires_at
  FROM open_lease WHERE account = 'balance:1' ORDER BY tranche_id;
SELECT credit, amount, expires_at, metadata FROM open_reservation WHERE account = 'balance:1' ORDER BY reservation_id;
SELECT account, credit, amount, created_at, expires_at, reclaimed_at, returned, metadata
  FROM expired_hold WHERE account = 'balance:1' ORDER BY reservation_id;

-- The sweep changes nothing of the balance, and the views know that it came.
SELECT lease_reclaim() IS NOT NULL AS swept;
SELECT * FROM lease_balance('balance:1');
SELECT credit, amount, expires_at, reclaimed_at, returned FROM expired_hold WHERE account = 'balance:1' ORDER BY reservation_id;

-- For each credit granted = available + reserved + chunked + consumed +
-- expired + what was revoked.
SELECT credit, granted - available - reserved - chunked - consumed - expired AS revoked
  FROM lease_balance('balance:1') ORDER BY credit;

-- Usage by day, in UTC, wherever one looks from: what was spent, less what came
-- back that day. A call counts once, however many tranches it spanned.
SELECT applied, available FROM lease_consume('balance:1', 'tokens', 3);
SELECT available FROM lease_topup('balance:1', 'tokens', 20);
SELECT applied, available FROM lease_consume('balance:1', 'tokens', 50);
SELECT amount, available FROM lease_refund('balance:1', :entry_id, 10);
SET credit_lease.mock_now = '2030-01-03 20:00:00+00';
SELECT amount, available FROM lease_refund('balance:1', :entry_id, 5);
SELECT day, account, credit, consumed, calls FROM usage_by_day WHERE account = 'balance:1' ORDER BY day, credit;
SET timezone = 'Asia/Tokyo';
SELECT day, account, credit, consumed, calls FROM usage_by_day WHERE account = 'balance:1' ORDER BY day, credit;
SET timezone = 'UTC';

-- A pool that is used up, and one that has only ever been empty.
SELECT available FROM lease_topup('balance:2', 'tokens', 1);
SELECT available FROM lease_consume('balance:2', 'tokens', 1);
SELECT applied FROM lease_try_consume('balance:2', 'images', 1);
SELECT * FROM lease_balance('balance:2');

SELECT * FROM credit_lease.lease_verify();
