--
-- Bad arguments: 22023, with a message that names the argument, before
-- anything is looked at; and nothing changes.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-02-01 00:00:00+00';

-- All of these calls would do what they are asked but for the one argument.
SELECT available FROM lease_topup('arguments:1', 'tokens', 100);
SELECT entry_id FROM lease_consume('arguments:1', 'tokens', 10) \gset
SELECT reservation_id FROM lease_reserve('arguments:1', 'tokens', 10, '1 hour') \gset
SET test.entry = :entry_id;
SET test.hold = :reservation_id;
CREATE FUNCTION pg_temp.refusal(call text, OUT code text, OUT message text, OUT detail text) LANGUAGE sql
	RETURN (SELECT (r.code, r.message, r.detail)
			  FROM test.refusal('SELECT ' || replace(replace(call, 'ENTRY', current_setting('test.entry')),
													 'HOLD', current_setting('test.hold'))) r);

-- Amounts: positive, finite, at most 38 digits of which 12 after the point.
SELECT amount, r.* FROM (VALUES
	('NULL'), ('0'), ('-1'), ($$'NaN'$$), ($$'Infinity'$$), ($$'-Infinity'$$), ('1e26'), ('1e-13'), ('1.0000000000001'), ('1e1000')
  ) v (amount), LATERAL pg_temp.refusal(format($$lease_topup('arguments:1', 'tokens', %s)$$, amount)) r;

SELECT call, r.code, r.message FROM (VALUES
	($$lease_topup(NULL, 'tokens', 1)$$),
	($$lease_topup('', 'tokens', 1)$$),
	($$lease_topup(repeat('x', 513), 'tokens', 1)$$),
	($$lease_topup(repeat(convert_from('\xc3a9', getdatabaseencoding()), 257), 'tokens', 1)$$),
	($$lease_topup('arguments:1', NULL, 1)$$),
	($$lease_topup('arguments:1', '', 1)$$),
	($$lease_topup('arguments:1', repeat('x', 513), 1)$$),
	($$lease_topup('arguments:1', 'tokens', 1, '')$$),
	($$lease_topup('arguments:1', 'tokens', 1, repeat('x', 513))$$),
	($$lease_topup('arguments:1', 'tokens', 1, expires_at => '-infinity')$$),
	($$lease_topup('arguments:1', 'tokens', 1, expires_at => '2030-02-01 00:00:00+00')$$),
	($$lease_topup('arguments:1', 'tokens', 1, priority => NULL)$$)
  ) v (call), LATERAL pg_temp.refusal(call) r;

SELECT call, r.code, r.message FROM (VALUES
	($$lease_adjust(NULL, 'tokens', 1, 'why')$$),
	($$lease_adjust('', 'tokens', 1, 'why')$$),
	($$lease_adjust(repeat('x', 513), 'tokens', 1, 'why')$$),
	($$lease_adjust('arguments:1', NULL, 1, 'why')$$),
	($$lease_adjust('arguments:1', '', 1, 'why')$$),
	($$lease_adjust('arguments:1', repeat('x', 513), 1, 'why')$$),
	($$lease_adjust('arguments:1', 'tokens', NULL, 'why')$$),
	($$lease_adjust('arguments:1', 'tokens', 0, 'why')$$),
	($$lease_adjust('arguments:1', 'tokens', 'NaN', 'why')$$),
	($$lease_adjust('arguments:1', 'tokens', '-Infinity', 'why')$$),
	($$lease_adjust('arguments:1', 'tokens', -1e26, 'why')$$),
	($$lease_adjust('arguments:1', 'tokens', -1e-13, 'why')$$),
	($$lease_adjust('arguments:1', 'tokens', 1, NULL)$$),
	($$lease_adjust('arguments:1', 'tokens', 1, '')$$),
	($$lease_adjust('arguments:1', 'tokens', 1, repeat('x', 513))$$),
	($$lease_adjust('arguments:1', 'tokens', 1, 'why', '')$$),
	($$lease_adjust('arguments:1', 'tokens', 1, 'why', repeat('x', 513))$$)
  ) v (call), LATERAL pg_temp.refusal(call) r;

SELECT call, r.code, r.message FROM (VALUES
	($$lease_refund(NULL, ENTRY)$$),
	($$lease_refund('', ENTRY)$$),
	($$lease_refund(repeat('x', 513), ENTRY)$$),
	($$lease_refund('arguments:1', NULL)$$),
	($$lease_refund('arguments:1', ENTRY, 0)$$),
	($$lease_refund('arguments:1', ENTRY, -1)$$),
	($$lease_refund('arguments:1', ENTRY, 'NaN')$$),
	($$lease_refund('arguments:1', ENTRY, 'Infinity')$$),
	($$lease_refund('arguments:1', ENTRY, 1e-13)$$),
	($$lease_refund('arguments:1', ENTRY, 11)$$),
	($$lease_refund('arguments:1', ENTRY, 1, '')$$),
	($$lease_refund('arguments:1', ENTRY, 1, repeat('x', 513))$$),
	($$lease_refund('arguments:1', ENTRY, 1, 'why', '')$$),
	($$lease_refund('arguments:1', ENTRY, 1, 'why', repeat('x', 513))$$)
  ) v (call), LATERAL pg_temp.refusal(call) r;

-- A twin refuses what its verb refuses.
SELECT verb, arguments, r.code, r.message FROM (VALUES ('lease_consume'), ('lease_try_consume')) f (verb), (VALUES
	($$NULL, 'tokens', 1$$),
	($$'', 'tokens', 1$$),
	($$repeat('x', 513), 'tokens', 1$$),
	($$'arguments:1', NULL, 1$$),
	($$'arguments:1', '', 1$$),
	($$'arguments:1', repeat('x', 513), 1$$),
	($$'arguments:1', 'tokens', NULL$$),
	($$'arguments:1', 'tokens', 0$$),
	($$'arguments:1', 'tokens', -1$$),
	($$'arguments:1', 'tokens', 'NaN'$$),
	($$'arguments:1', 'tokens', 'Infinity'$$),
	($$'arguments:1', 'tokens', 1e26$$),
	($$'arguments:1', 'tokens', 1e-13$$),
	($$'arguments:1', 'tokens', 1, ''$$),
	($$'arguments:1', 'tokens', 1, repeat('x', 513)$$)
  ) v (arguments), LATERAL pg_temp.refusal(format('%s(%s)', verb, arguments)) r;

-- A ttl is positive, at most 10 years, and ends after it began: a month less
-- 29 days does not, in February.
SELECT verb, arguments, r.code, r.message FROM (VALUES ('lease_reserve'), ('lease_try_reserve')) f (verb), (VALUES
	($$NULL, 'tokens', 1$$),
	($$'', 'tokens', 1$$),
	($$repeat('x', 513), 'tokens', 1$$),
	($$'arguments:1', NULL, 1$$),
	($$'arguments:1', '', 1$$),
	($$'arguments:1', repeat('x', 513), 1$$),
	($$'arguments:1', 'tokens', NULL$$),
	($$'arguments:1', 'tokens', 0$$),
	($$'arguments:1', 'tokens', -1$$),
	($$'arguments:1', 'tokens', 'NaN'$$),
	($$'arguments:1', 'tokens', 'Infinity'$$),
	($$'arguments:1', 'tokens', 1e26$$),
	($$'arguments:1', 'tokens', 1e-13$$),
	($$'arguments:1', 'tokens', 1, '0'$$),
	($$'arguments:1', 'tokens', 1, '-1 second'$$),
	($$'arguments:1', 'tokens', 1, '-300000 years'$$),
	($$'arguments:1', 'tokens', 1, '1 month -29 days'$$),
	($$'arguments:1', 'tokens', 1, '10 years 1 day'$$),
	($$'arguments:1', 'tokens', 1, '170000000 years'$$),
	($$'arguments:1', 'tokens', 1, '1 hour', ''$$),
	($$'arguments:1', 'tokens', 1, '1 hour', repeat('x', 513)$$),
	($$'arguments:1', 'tokens', 1, min_amount => 0$$),
	($$'arguments:1', 'tokens', 1, min_amount => -1$$),
	($$'arguments:1', 'tokens', 1, min_amount => 'NaN'$$),
	($$'arguments:1', 'tokens', 1, min_amount => 'Infinity'$$),
	($$'arguments:1', 'tokens', 1, min_amount => 1e-13$$),
	($$'arguments:1', 'tokens', 1, min_amount => 2$$)
  ) v (arguments), LATERAL pg_temp.refusal(format('%s(%s)', verb, arguments)) r;

SELECT call, r.code, r.message FROM (VALUES
	($$lease_settle(NULL, HOLD)$$),
	($$lease_settle('', HOLD)$$),
	($$lease_settle(repeat('x', 513), HOLD)$$),
	($$lease_settle('arguments:1', NULL)$$),
	($$lease_settle('arguments:1', HOLD, -1)$$),
	($$lease_settle('arguments:1', HOLD, 'NaN')$$),
	($$lease_settle('arguments:1', HOLD, 'Infinity')$$),
	($$lease_settle('arguments:1', HOLD, 1e26)$$),
	($$lease_settle('arguments:1', HOLD, 1e-13)$$),
	($$lease_settle('arguments:1', HOLD, 1, NULL)$$),
	($$lease_settle('arguments:1', HOLD, 1, '')$$),
	($$lease_settle('arguments:1', HOLD, 1, 'Charge')$$),
	($$lease_settle('arguments:1', HOLD, 1, 'maybe')$$),
	($$lease_settle('arguments:1', HOLD, 1, repeat('x', 513))$$),
	($$lease_cancel(NULL, HOLD)$$),
	($$lease_cancel('', HOLD)$$),
	($$lease_cancel(repeat('x', 513), HOLD)$$),
	($$lease_cancel('arguments:1', NULL)$$),
	($$lease_renew(NULL, HOLD)$$),
	($$lease_renew('', HOLD)$$),
	($$lease_renew(repeat('x', 513), HOLD)$$),
	($$lease_renew('arguments:1', NULL)$$),
	($$lease_renew('arguments:1', HOLD, '0')$$),
	($$lease_renew('arguments:1', HOLD, '-1 second')$$),
	($$lease_renew('arguments:1', HOLD, '1 month -29 days')$$),
	($$lease_renew('arguments:1', HOLD, '10 years 1 day')$$),
	($$lease_renew('arguments:1', HOLD, '1 hour', NULL)$$),
	($$lease_renew('arguments:1', HOLD, '1 hour', -1)$$),
	($$lease_renew('arguments:1', HOLD, '1 hour', 'NaN')$$),
	($$lease_renew('arguments:1', HOLD, '1 hour', 'Infinity')$$),
	($$lease_renew('arguments:1', HOLD, '1 hour', 1e26)$$),
	($$lease_renew('arguments:1', HOLD, '1 hour', 1e-13)$$)
  ) v (call), LATERAL pg_temp.refusal(call) r;

-- A lease expires, and has not.
SELECT call, r.code, r.message FROM (VALUES
	($$lease_install(NULL, 'tokens', 'L1', 1, '2031-01-01')$$),
	($$lease_install('', 'tokens', 'L1', 1, '2031-01-01')$$),
	($$lease_install(repeat('x', 513), 'tokens', 'L1', 1, '2031-01-01')$$),
	($$lease_install('arguments:1', NULL, 'L1', 1, '2031-01-01')$$),
	($$lease_install('arguments:1', '', 'L1', 1, '2031-01-01')$$),
	($$lease_install('arguments:1', repeat('x', 513), 'L1', 1, '2031-01-01')$$),
	($$lease_install('arguments:1', 'tokens', NULL, 1, '2031-01-01')$$),
	($$lease_install('arguments:1', 'tokens', '', 1, '2031-01-01')$$),
	($$lease_install('arguments:1', 'tokens', repeat('x', 513), 1, '2031-01-01')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', NULL, '2031-01-01')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', 0, '2031-01-01')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', -1, '2031-01-01')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', 'NaN', '2031-01-01')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', 'Infinity', '2031-01-01')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', 1e26, '2031-01-01')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', 1e-13, '2031-01-01')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', 1, NULL)$$),
	($$lease_install('arguments:1', 'tokens', 'L1', 1, 'infinity')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', 1, '-infinity')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', 1, '2030-02-01 00:00:00+00')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', 1, '2031-01-01', '')$$),
	($$lease_install('arguments:1', 'tokens', 'L1', 1, '2031-01-01', 'no such server')$$),
	($$lease_extend(NULL, 'tokens', 'L1', 1)$$),
	($$lease_extend('', 'tokens', 'L1', 1)$$),
	($$lease_extend(repeat('x', 513), 'tokens', 'L1', 1)$$),
	($$lease_extend('arguments:1', NULL, 'L1', 1)$$),
	($$lease_extend('arguments:1', '', 'L1', 1)$$),
	($$lease_extend('arguments:1', repeat('x', 513), 'L1', 1)$$),
	($$lease_extend('arguments:1', 'tokens', NULL, 1)$$),
	($$lease_extend('arguments:1', 'tokens', '', 1)$$),
	($$lease_extend('arguments:1', 'tokens', repeat('x', 513), 1)$$),
	($$lease_extend('arguments:1', 'tokens', 'L1', NULL)$$),
	($$lease_extend('arguments:1', 'tokens', 'L1', 0)$$),
	($$lease_extend('arguments:1', 'tokens', 'L1', -1)$$),
	($$lease_extend('arguments:1', 'tokens', 'L1', 'NaN')$$),
	($$lease_extend('arguments:1', 'tokens', 'L1', 'Infinity')$$),
	($$lease_extend('arguments:1', 'tokens', 'L1', 1e26)$$),
	($$lease_extend('arguments:1', 'tokens', 'L1', 1e-13)$$),
	($$lease_extend('arguments:1', 'tokens', 'L1', 1, 'infinity')$$),
	($$lease_extend('arguments:1', 'tokens', 'L1', 1, '-infinity')$$),
	($$lease_release(NULL, 'tokens')$$),
	($$lease_release('', 'tokens')$$),
	($$lease_release(repeat('x', 513), 'tokens')$$),
	($$lease_release('arguments:1', NULL)$$),
	($$lease_release('arguments:1', '')$$),
	($$lease_release('arguments:1', repeat('x', 513))$$),
	($$lease_release('arguments:1', 'tokens', '')$$),
	($$lease_release('arguments:1', 'tokens', repeat('x', 513))$$)
  ) v (call), LATERAL pg_temp.refusal(call) r;

-- A role is one that exists; PUBLIC is none.
SELECT call, r.code, r.message FROM (VALUES
	($$lease_balance(NULL)$$),
	($$lease_balance('')$$),
	($$lease_balance(repeat('x', 513))$$),
	($$lease_balance('arguments:1', '')$$),
	($$lease_balance('arguments:1', repeat('x', 513))$$),
	($$lease_verify('')$$),
	($$lease_verify(repeat('x', 513))$$),
	($$lease_reclaim(0)$$),
	($$lease_reclaim(-1)$$),
	($$lease_freeze(NULL)$$),
	($$lease_freeze('')$$),
	($$lease_freeze(repeat('x', 513))$$),
	($$lease_freeze('arguments:1', '')$$),
	($$lease_freeze('arguments:1', repeat('x', 513))$$),
	($$lease_freeze('arguments:1', 'tokens', '')$$),
	($$lease_freeze('arguments:1', 'tokens', repeat('x', 513))$$),
	($$lease_unfreeze(NULL)$$),
	($$lease_unfreeze('')$$),
	($$lease_unfreeze(repeat('x', 513))$$),
	($$lease_unfreeze('arguments:1', '')$$),
	($$lease_unfreeze('arguments:1', repeat('x', 513))$$),
	($$lease_grant_access(NULL, 'read')$$),
	($$lease_grant_access(current_user, NULL)$$),
	($$lease_grant_access(current_user, '')$$),
	($$lease_grant_access(current_user, 'write')$$),
	($$lease_grant_access(current_user, 'Read')$$),
	($$lease_grant_access('regress_credit_lease_nobody', 'read')$$),
	($$lease_grant_access('public', 'read')$$)
  ) v (call), LATERAL pg_temp.refusal(call) r;

-- What is just right is taken: 512 bytes of text, 26 digits and 12, 10 years.
SELECT available
  FROM lease_topup(repeat(convert_from('\xc3a9', getdatabaseencoding()), 256), repeat('x', 512),
				   99999999999999999999999999, repeat('k', 512));
SELECT available FROM lease_topup('arguments:1', 'tokens', 0.000000000001);
SELECT available = 81.000000000001 AS taken FROM lease_topup('arguments:1', 'tokens', 1.0000000000000000000000);
SELECT amount, expires_at FROM lease_reserve('arguments:1', 'tokens', 1, '10 years');
SELECT amount, expires_at FROM lease_reserve('arguments:1', 'tokens', 1, '1 microsecond');

SELECT * FROM credit_lease.lease_verify();
