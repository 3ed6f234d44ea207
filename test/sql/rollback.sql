--
-- Everything happens in the application's own transaction: rolling back undoes
-- all of it (rule 9).
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

SELECT available FROM lease_topup('rollback:1', 'tokens', 100, 'topup');
SELECT entry_id FROM lease_consume('rollback:1', 'tokens', 10, 'consume') \gset
SELECT reservation_id AS held_1 FROM lease_reserve('rollback:1', 'tokens', 10, '1 hour') \gset
SELECT reservation_id AS held_2 FROM lease_reserve('rollback:1', 'tokens', 10, '1 hour') \gset
SELECT reservation_id AS held_3 FROM lease_reserve('rollback:1', 'tokens', 10, '1 hour') \gset
SELECT reservation_id AS held_4 FROM lease_reserve('rollback:1', 'tokens', 10, '1 minute') \gset
SELECT available, reserved, consumed, granted FROM lease_balance('rollback:1');
SELECT test.rows() AS before \gset

-- Every function once.
BEGIN;
SELECT available FROM lease_topup('rollback:1', 'tokens', 5);
SELECT available FROM lease_consume('rollback:1', 'tokens', 1);
SELECT available FROM lease_try_consume('rollback:1', 'tokens', 1);
SELECT available FROM lease_reserve('rollback:1', 'tokens', 1);
SELECT available FROM lease_try_reserve('rollback:1', 'tokens', 1);
SELECT available FROM lease_settle('rollback:1', :held_1, 12);
SELECT lease_cancel('rollback:1', :held_2);
SELECT amount, expires_at FROM lease_renew('rollback:1', :held_3, '2 hours', 5);
SELECT available FROM lease_refund('rollback:1', :entry_id, 3);
SELECT available FROM lease_adjust('rollback:1', 'tokens', 7, 'goodwill');
SELECT available FROM lease_adjust('rollback:1', 'tokens', -2, 'paid twice');
SELECT lease_freeze('rollback:1', 'tokens');
SET LOCAL credit_lease.mock_now = '2030-01-01 00:02:00+00';
SELECT lease_reclaim() >= 1 AS swept;
SELECT available, reserved, consumed, granted FROM lease_balance('rollback:1');
SELECT * FROM lease_verify('rollback:1');
ROLLBACK;
SELECT available, reserved, consumed, granted FROM lease_balance('rollback:1');
SELECT test.rows() = :'before' AS as_it_was;

-- A part of it, to a savepoint.
BEGIN;
SELECT available FROM lease_consume('rollback:1', 'tokens', 1);
SAVEPOINT s;
SELECT available FROM lease_consume('rollback:1', 'tokens', 20);
SELECT consumed, available FROM lease_settle('rollback:1', :held_1, 4);
ROLLBACK TO s;
SELECT available FROM lease_consume('rollback:1', 'tokens', 2);
SELECT consumed, available FROM lease_settle('rollback:1', :held_1, 5);
COMMIT;
SELECT available, reserved, consumed, granted FROM lease_balance('rollback:1');

-- An error in what the application does besides.
BEGIN;
SELECT available FROM lease_consume('rollback:1', 'tokens', 20);
SELECT 1 / 0;
COMMIT;
SELECT available, reserved, consumed, granted FROM lease_balance('rollback:1');

-- A refusal that the application catches undoes nothing but itself.
DO $$
BEGIN
	PERFORM lease_consume('rollback:1', 'tokens', 2);
	BEGIN
		PERFORM lease_consume('rollback:1', 'tokens', 3);
		PERFORM lease_consume('rollback:1', 'tokens', 1000);
	EXCEPTION WHEN SQLSTATE 'LC001' THEN
		RAISE NOTICE 'caught %', SQLSTATE;
	END;
END
$$;
SELECT available, reserved, consumed, granted FROM lease_balance('rollback:1');

SELECT * FROM credit_lease.lease_verify();
