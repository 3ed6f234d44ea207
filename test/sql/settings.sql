--
-- credit_lease.mock_now, an instant that stands for the clock in tests.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';

-- Without it, it is the server's clock, at the moment of the call: not the
-- transaction's start.
SELECT lease_clock() BETWEEN transaction_timestamp() AND clock_timestamp() AS is_the_clock;
SHOW credit_lease.mock_now;
BEGIN;
SELECT lease_clock() AS earlier \gset
SELECT pg_sleep(0.01);
SELECT lease_clock() > :'earlier' AS moves_on;
COMMIT;
SELECT available FROM lease_topup('settings:1', 'tokens', 10);
SELECT expires_at - clock_timestamp() BETWEEN interval '55 seconds' AND interval '60 seconds' AS a_minute_from_now
  FROM lease_reserve('settings:1', 'tokens', 1);

-- With it, time stands still.
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
SHOW credit_lease.mock_now;
SELECT lease_clock();
SELECT expires_at FROM lease_reserve('settings:1', 'tokens', 1);
SELECT created_at FROM ledger WHERE account = 'settings:1' ORDER BY entry_id DESC LIMIT 1;
-- The session's time zone counts where the value has none.
SET credit_lease.mock_now = '2030-01-01 12:00';
SELECT lease_clock();
SET timezone = 'Asia/Tokyo';
SET credit_lease.mock_now = '2030-01-01 12:00';
SET timezone = 'UTC';
SELECT lease_clock();

-- It comes and goes with its transaction, and empty means the server's clock.
BEGIN;
SET LOCAL credit_lease.mock_now = '2031-01-01 00:00:00+00';
SELECT lease_clock();
ROLLBACK;
SELECT lease_clock();
SET credit_lease.mock_now = '';
SELECT lease_clock() BETWEEN transaction_timestamp() AND clock_timestamp() AS is_the_clock;
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
RESET credit_lease.mock_now;
SELECT lease_clock() BETWEEN transaction_timestamp() AND clock_timestamp() AS is_the_clock;

-- Anything but an instant is refused, and changes nothing.
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
SELECT v.value, r.code, r.detail FROM (VALUES
	('soon'), ('2030-13-01'), ('2030-01-01 25:00'), ('12:00'), ('infinity'), ('-infinity'), ('1 hour'), ('2030'), (' '),
	('294277-01-01 00:00:00+00'), ('2030-01-01 00:00:00+00 and more'), ('now'), ('tomorrow 12:00')
  ) v (value), LATERAL refusal(format('SET credit_lease.mock_now = %L', v.value)) r;
SELECT r.code, r.detail FROM refusal(format('SET credit_lease.mock_now = %L', repeat('2030-01-01 ', 1000))) r;
SELECT lease_clock();

-- Only a superuser may move the clock.
CREATE ROLE regress_credit_lease_app;
SELECT lease_grant_access('regress_credit_lease_app', 'admin');
SET ROLE regress_credit_lease_app;
SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
RESET credit_lease.mock_now;
SELECT set_config('credit_lease.mock_now', '', false);
SELECT lease_clock();
RESET ROLE;

-- Not even in a session that has not loaded the extension yet, where
-- PostgreSQL does not know whose setting it is to be: it is dropped then, with
-- a warning.
\c -
SET timezone = 'UTC';
SET client_min_messages = error;
SET ROLE regress_credit_lease_app;
DO $$
BEGIN
	SET credit_lease.mock_now = '2040-01-01 00:00:00+00';
EXCEPTION WHEN insufficient_privilege THEN	-- it was loaded at the server's start
END
$$;
SELECT credit_lease.lease_clock() < '2040-01-01' AS not_moved;
SHOW credit_lease.mock_now;
RESET ROLE;
-- A superuser may.
\c -
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';
SELECT credit_lease.lease_clock();

-- Misspelt settings are noticed.
SET credit_lease.mock_then = '2030-01-01 00:00:00+00';

DROP OWNED BY regress_credit_lease_app;
DROP ROLE regress_credit_lease_app;

SELECT * FROM credit_lease.lease_verify();
