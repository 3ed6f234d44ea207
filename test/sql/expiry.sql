--
-- What is expired cannot be spent, whether or not anybody has come by to sweep
-- it (rule 7); and credit returns to the tranche it came from, and is gone with
-- it if that has expired (rule 8).
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';

-- A time of its own: what other tests have left behind has expired long ago,
-- and is not to be counted here.
SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
SELECT lease_reclaim() IS NOT NULL AS swept;

--
-- Tranches
--
SELECT available FROM lease_topup('expiry:1', 'tokens', 10, expires_at => '2040-01-01 01:00:00+00');
SELECT available FROM lease_topup('expiry:1', 'tokens', 20, expires_at => '2040-01-01 02:00:00+00');
SELECT applied, available FROM lease_consume('expiry:1', 'tokens', 4);

-- It lives until the microsecond before it expires.
SET credit_lease.mock_now = '2040-01-01 00:59:59.999999+00';
SELECT available, consumed, expired, next_expiry FROM lease_balance('expiry:1');
SET credit_lease.mock_now = '2040-01-01 01:00:00+00';
SELECT available, consumed, expired, next_expiry FROM lease_balance('expiry:1');
SELECT granted, remaining, expires_at FROM open_lease WHERE account = 'expiry:1';

-- No function spends of it, though nobody has swept.
SELECT * FROM refused($$ SELECT lease_consume('expiry:1', 'tokens', 21) $$);
SELECT * FROM refused($$ SELECT lease_reserve('expiry:1', 'tokens', 21) $$);
SELECT * FROM refused($$ SELECT lease_adjust('expiry:1', 'tokens', -21, 'too much') $$);
SELECT applied, amount, available FROM lease_reserve('expiry:1', 'tokens', 30, '1 hour', min_amount => 1);
SELECT remaining, reserved, consumed, expired FROM tranche WHERE account = 'expiry:1' ORDER BY tranche_id;

-- The sweep writes off what was left; the ledger has it. The balance is what
-- it was before. It counts holds, and there were none.
SELECT lease_reclaim();
SELECT remaining, reserved, consumed, expired FROM tranche WHERE account = 'expiry:1' ORDER BY tranche_id;
SELECT available, reserved, consumed, expired, granted, next_expiry FROM lease_balance('expiry:1');
SELECT kind, amount, available, created_at FROM ledger WHERE account = 'expiry:1' AND kind = 'expire';
SELECT changed_by('SELECT lease_reclaim()');

--
-- Holds
--
SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
SELECT available FROM lease_topup('expiry:2', 'tokens', 10);
SELECT reservation_id FROM lease_reserve('expiry:2', 'tokens', 6, '1 minute', metadata => '{"job": 2}') \gset
SET credit_lease.mock_now = '2040-01-01 00:00:59.999999+00';
SELECT available, reserved FROM lease_balance('expiry:2');
SELECT * FROM refused($$ SELECT lease_consume('expiry:2', 'tokens', 5) $$);

-- When it has expired, its credit is available, and nobody had to sweep.
SET credit_lease.mock_now = '2040-01-01 00:01:00+00';
SELECT available, reserved FROM lease_balance('expiry:2');
SELECT count(*) FROM open_reservation WHERE account = 'expiry:2';
SELECT credit, amount, created_at, expires_at, reclaimed_at, returned, metadata FROM expired_hold WHERE account = 'expiry:2';

-- A call that is short of credit first gives it back ...
SELECT applied, available FROM lease_consume('expiry:2', 'tokens', 7);
SELECT amount, expires_at, reclaimed_at, returned FROM expired_hold WHERE account = 'expiry:2';
SELECT kind, amount, available, reservation_id = :reservation_id AS of_the_hold
  FROM ledger WHERE account = 'expiry:2' ORDER BY entry_id;
-- ... and it is over for good.
SELECT code FROM refusal(format($$ SELECT lease_settle('expiry:2', %s) $$, :reservation_id));
SELECT code FROM refusal(format($$ SELECT lease_renew('expiry:2', %s) $$, :reservation_id));
SELECT lease_cancel('expiry:2', :reservation_id);
SELECT changed_by('SELECT lease_reclaim()');

-- Every function that looks at what is available does so: it is exact then.
SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
SELECT account, (lease_topup(account, 'tokens', 10)).available, (lease_reserve(account, 'tokens', 8, '1 minute')).available
  FROM (SELECT 'expiry:3:' || n AS account FROM generate_series(1, 8) n) a;
SELECT entry_id FROM lease_consume('expiry:3:6', 'tokens', 1) \gset
SELECT reservation_id AS held_7 FROM lease_reserve('expiry:3:7', 'tokens', 1, '1 hour') \gset
SELECT reservation_id AS held_8 FROM lease_reserve('expiry:3:8', 'tokens', 1, '1 hour') \gset
SET credit_lease.mock_now = '2040-01-01 00:01:00+00';
SELECT applied, available FROM lease_consume('expiry:3:1', 'tokens', 1);
SELECT applied, available FROM lease_reserve('expiry:3:2', 'tokens', 1);
SELECT available FROM lease_topup('expiry:3:3', 'tokens', 1);
SELECT amount, available FROM lease_adjust('expiry:3:4', 'tokens', 1, 'goodwill');
SELECT amount, available FROM lease_adjust('expiry:3:5', 'tokens', -9, 'paid twice');
SELECT amount, available FROM lease_refund('expiry:3:6', :entry_id);
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('expiry:3:7', :held_7, 5);
SELECT amount FROM lease_renew('expiry:3:8', :held_8, add_amount => 9);
SELECT account, available, reserved FROM balance WHERE account LIKE 'expiry:3:%' ORDER BY account;

-- A twin that cannot do it all the same changes nothing but that (rule 6).
SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
SELECT available FROM lease_topup('expiry:4', 'tokens', 10);
SELECT available FROM lease_reserve('expiry:4', 'tokens', 8, '1 minute');
SET credit_lease.mock_now = '2040-01-01 00:01:00+00';
SELECT applied, available FROM lease_try_consume('expiry:4', 'tokens', 11, 'too much');
SELECT kind, amount, available, idempotency_key FROM ledger WHERE account = 'expiry:4' ORDER BY entry_id;
SELECT changed_by($$ SELECT lease_try_consume('expiry:4', 'tokens', 11, 'too much') $$);

-- However many there are.
SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
SELECT available FROM lease_topup('expiry:5', 'tokens', 300);
SELECT count(lease_reserve('expiry:5', 'tokens', 1, '1 minute')) FROM generate_series(1, 300);
SET credit_lease.mock_now = '2040-01-01 00:01:00+00';
SELECT applied, available FROM lease_consume('expiry:5', 'tokens', 300);

--
-- The sweep
--
SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
SELECT lease_reclaim() IS NOT NULL AS swept;
SELECT n, (lease_topup('expiry:6:' || n, 'tokens', 10)).available FROM generate_series(1, 3) n;
SELECT account, (lease_reserve(account, 'tokens', m, m * interval '1 minute')).expires_at
  FROM (SELECT 'expiry:6:' || n AS account, m FROM generate_series(1, 3) n, generate_series(1, 3) m) h
 ORDER BY account, m;
SELECT lease_reclaim();

-- It gives back what has expired and nothing else, and says how many it was.
SET credit_lease.mock_now = '2040-01-01 00:01:00+00';
SELECT lease_reclaim();
SELECT lease_reclaim();
SELECT account, available, reserved FROM balance WHERE account LIKE 'expiry:6:%' ORDER BY account;
-- At most so many at once, if it is told.
SET credit_lease.mock_now = '2040-01-01 00:03:00+00';
SELECT lease_reclaim(4);
SELECT lease_reclaim(4);
SELECT lease_reclaim(4);
SELECT account, available, reserved FROM balance WHERE account LIKE 'expiry:6:%' ORDER BY account;
SELECT account, amount, expires_at, reclaimed_at, returned
  FROM expired_hold WHERE account LIKE 'expiry:6:%' ORDER BY account, expires_at;

--
-- Expired credit never inflates a successor (rule 8): a hold, a settlement or a
-- refund gives back to the tranche that it came from, or to nobody.
--
SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
SELECT account, (lease_topup(account, 'tokens', 10, expires_at => '2040-01-01 00:10:00+00')).available
  FROM (SELECT 'expiry:7:' || n AS account FROM generate_series(1, 4) n) a;
SELECT reservation_id AS held_1 FROM lease_reserve('expiry:7:1', 'tokens', 10, '1 hour') \gset
SELECT reservation_id AS held_2 FROM lease_reserve('expiry:7:2', 'tokens', 10, '1 hour') \gset
SELECT reservation_id AS held_3 FROM lease_reserve('expiry:7:3', 'tokens', 10, '20 minutes') \gset
SELECT entry_id FROM lease_consume('expiry:7:4', 'tokens', 10) \gset

-- The tranche expires while the hold is alive, and another one takes its place.
SET credit_lease.mock_now = '2040-01-01 00:10:00+00';
SELECT account, (lease_topup(account, 'tokens', 100, expires_at => '2040-01-01 02:00:00+00')).available
  FROM (SELECT 'expiry:7:' || n AS account FROM generate_series(1, 4) n) a;
SELECT lease_reclaim();

-- What was held before may be settled; the rest of it comes back to nobody,
-- and refunded counts what came back to the pool.
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('expiry:7:1', :held_1, 4);
SELECT lease_cancel('expiry:7:2', :held_2);
SET credit_lease.mock_now = '2040-01-01 00:20:00+00';
SELECT lease_reclaim();
SELECT amount, available FROM lease_refund('expiry:7:4', :entry_id);
SELECT account, granted, remaining, reserved, consumed, expired FROM tranche WHERE account LIKE 'expiry:7:%' ORDER BY account, tranche_id;
SELECT account, available, reserved, consumed, expired, granted FROM balance WHERE account LIKE 'expiry:7:%' ORDER BY account;
SELECT amount, returned FROM expired_hold WHERE account = 'expiry:7:3';
SELECT account, status, amount, consumed, refunded FROM reservation WHERE account LIKE 'expiry:7:%' ORDER BY account;
SELECT account, code FROM generate_series(1, 4) n, concat('expiry:7:', n) account,
	   LATERAL refusal(format($$ SELECT lease_consume(%L, 'tokens', 101) $$, account));

-- Nor does a hold that spans an expired tranche and one that is not.
SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
SELECT available FROM lease_topup('expiry:8', 'tokens', 10, expires_at => '2040-01-01 00:10:00+00');
SELECT available FROM lease_topup('expiry:8', 'tokens', 10, expires_at => '2040-01-01 02:00:00+00');
SELECT reservation_id FROM lease_reserve('expiry:8', 'tokens', 15, '1 hour') \gset
SET credit_lease.mock_now = '2040-01-01 00:10:00+00';
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('expiry:8', :reservation_id, 3);
SELECT granted, remaining, reserved, consumed, expired FROM tranche WHERE account = 'expiry:8' ORDER BY tranche_id;

-- By the clock, a hold that expired together with its tranche is expired
-- credit before anybody sweeps, and the same after.
SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
SELECT available FROM lease_topup('expiry:9', 'tokens', 10, expires_at => '2040-01-01 00:10:00+00');
SELECT available FROM lease_reserve('expiry:9', 'tokens', 4, '10 minutes');
SELECT available FROM lease_reserve('expiry:9', 'tokens', 3, '20 minutes');
SET credit_lease.mock_now = '2040-01-01 00:10:00+00';
SELECT available, reserved, expired, granted FROM lease_balance('expiry:9');
SELECT lease_reclaim();
SELECT available, reserved, expired, granted FROM lease_balance('expiry:9');

-- The clock may be set back: what was given back stays so.
SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
SELECT available, reserved, expired, granted FROM lease_balance('expiry:9');

SELECT * FROM credit_lease.lease_verify();
