--
-- Burn order (rule 10): the lowest priority number first, then the soonest
-- expiry, then the oldest.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

-- The amounts tell the tranches apart. Neither the order in which they came
-- nor their ids follow the order in which they are to burn.
SELECT available FROM lease_topup('burn:1', 'tokens', 6, priority => 100);
SELECT available FROM lease_topup('burn:1', 'tokens', 5, expires_at => '2030-03-01', priority => 100);
SELECT available FROM lease_topup('burn:1', 'tokens', 7, priority => 100);
SELECT available FROM lease_topup('burn:1', 'tokens', 8, expires_at => '2030-02-01', priority => 200);
SELECT available FROM lease_topup('burn:1', 'tokens', 3, expires_at => '2030-02-01', priority => 100);
SELECT available FROM lease_topup('burn:1', 'tokens', 4, expires_at => '2030-02-01', priority => 100);
SELECT available FROM lease_topup('burn:1', 'tokens', 2, priority => 0);
SELECT available FROM lease_topup('burn:1', 'tokens', 1, expires_at => '2040-01-01', priority => -1);

-- The tranches of an account by size, each as what it has left, + what is held
-- of it, / what it was granted. Of burn:1 the smallest is to burn first.
CREATE FUNCTION pg_temp.left_of(account text) RETURNS text LANGUAGE sql AS $$
	SELECT string_agg(t.remaining || CASE WHEN t.reserved > 0 THEN '+' || t.reserved ELSE '' END || '/' || t.granted, ' ' ORDER BY t.granted)
	  FROM credit_lease.tranche t WHERE t.account = left_of.account
$$;

-- One at a time.
BEGIN;
SELECT spend, c.available, pg_temp.left_of('burn:1')
  FROM unnest(ARRAY[1, 2, 3, 4, 5, 6, 7, 8]) spend, LATERAL lease_consume('burn:1', 'tokens', spend) c;
ROLLBACK;

-- A spend may span them; so may a hold, and an adjustment.
BEGIN;
SELECT available, pg_temp.left_of('burn:1') FROM lease_consume('burn:1', 'tokens', 12);
SELECT available, pg_temp.left_of('burn:1') FROM lease_consume('burn:1', 'tokens', 20);
ROLLBACK;
BEGIN;
SELECT available, pg_temp.left_of('burn:1') FROM lease_reserve('burn:1', 'tokens', 12, '1 hour');
SELECT available, pg_temp.left_of('burn:1') FROM lease_consume('burn:1', 'tokens', 20);
ROLLBACK;
BEGIN;
SELECT available, pg_temp.left_of('burn:1') FROM lease_adjust('burn:1', 'tokens', -12, 'correction');
SELECT available, pg_temp.left_of('burn:1') FROM lease_adjust('burn:1', 'tokens', -24, 'correction');
ROLLBACK;

-- What has expired is passed over, though it is still there.
SET credit_lease.mock_now = '2030-02-01';
SELECT available, pg_temp.left_of('burn:1') FROM lease_consume('burn:1', 'tokens', 10);
SET credit_lease.mock_now = '2030-01-01';

-- A settlement spends of its hold what burns first, and gives back what burns
-- last; what it charges above the hold burns in the same order.
SELECT account, (lease_topup(account, 'tokens', 3, priority => 3)).available,
	   (lease_topup(account, 'tokens', 1, priority => 1)).available,
	   (lease_topup(account, 'tokens', 2, priority => 2)).available,
	   (lease_topup(account, 'tokens', 4, priority => 4)).available
  FROM (VALUES ('burn:2'), ('burn:3'), ('burn:4')) a (account);
SELECT reservation_id FROM lease_reserve('burn:2', 'tokens', 5) \gset
SELECT pg_temp.left_of('burn:2');
SELECT consumed, refunded, available, pg_temp.left_of('burn:2') FROM lease_settle('burn:2', :reservation_id, 2);
SELECT reservation_id FROM lease_reserve('burn:3', 'tokens', 2) \gset
SELECT consumed, refunded, available, pg_temp.left_of('burn:3') FROM lease_settle('burn:3', :reservation_id, 7);

-- A hold that was renewed is settled in burn order too, whatever it held first.
SELECT available FROM lease_topup('burn:5', 'tokens', 10, priority => 100);
SELECT reservation_id FROM lease_reserve('burn:5', 'tokens', 5) \gset
SELECT available FROM lease_topup('burn:5', 'tokens', 8, priority => 1);
SELECT amount, pg_temp.left_of('burn:5') FROM lease_renew('burn:5', :reservation_id, add_amount => 8);
SELECT consumed, refunded, available, pg_temp.left_of('burn:5') FROM lease_settle('burn:5', :reservation_id, 8);

-- An overdraft is a grant with a late priority, so that nothing is ever
-- negative (rule 1).
SELECT available FROM lease_topup('burn:4', 'tokens', 50, priority => 1000000, metadata => '{"overdraft": true}');
SELECT available, pg_temp.left_of('burn:4') FROM lease_consume('burn:4', 'tokens', 12);

SELECT * FROM credit_lease.lease_verify();
