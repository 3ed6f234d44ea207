--
-- lease_verify recomputes the books from the ledger; and a negative or
-- impossible stored value is an error, LC009, never clamped (rules 2 and 3).
--
-- What is wrong here was done behind the functions' back, by a superuser, and
-- is undone afterwards.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

-- An account with something of everything: of three tranches one is used up
-- and one has expired; one hold is settled, one cancelled and one still held.
SELECT tranche_id FROM lease_topup('verify:1', 'tokens', 100) \gset
SELECT tranche_id AS used_up FROM lease_topup('verify:1', 'tokens', 3, priority => 1) \gset
SELECT tranche_id AS expired FROM lease_topup('verify:1', 'tokens', 7, expires_at => '2030-01-01 00:00:01+00', priority => 200) \gset
SELECT entry_id FROM lease_consume('verify:1', 'tokens', 37) \gset
SELECT available FROM lease_refund('verify:1', :entry_id, 8);
SELECT refund_of FROM ledger WHERE account = 'verify:1' AND kind = 'refund' \gset
SELECT available FROM lease_adjust('verify:1', 'tokens', -3, 'paid twice');
SELECT reservation_id AS settled FROM lease_reserve('verify:1', 'tokens', 10) \gset
SELECT consumed, refunded FROM lease_settle('verify:1', :settled, 4);
SELECT reservation_id AS cancelled FROM lease_reserve('verify:1', 'tokens', 5) \gset
SELECT lease_cancel('verify:1', :cancelled);
SELECT reservation_id AS held FROM lease_reserve('verify:1', 'tokens', 10, '1 hour') \gset
SET credit_lease.mock_now = '2030-01-01 00:00:01+00';
SELECT lease_reclaim() IS NOT NULL AS swept;
SELECT granted, remaining, reserved, chunked, consumed, expired, returned, revoked, open
  FROM tranche WHERE account = 'verify:1' ORDER BY tranche_id;
SELECT * FROM lease_verify('verify:1');

-- The numbers of those rows, under names that stand for them below.
CREATE TEMPORARY TABLE number AS
SELECT * FROM (VALUES ('TRANCHE', :tranche_id), ('USED_UP', :used_up), ('EXPIRED', :expired), ('ENTRY', :entry_id),
					  ('REFUNDED', :refund_of), ('SETTLED', :settled), ('CANCELLED', :cancelled), ('HELD', :held)) v (name, id);
CREATE FUNCTION pg_temp.numbered(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	n record;
BEGIN
	FOR n IN SELECT * FROM number LOOP
		statement := regexp_replace(statement, '\m' || n.name || '\M', n.id::text, 'g');
	END LOOP;
	RETURN statement;
END
$$;

-- What lease_verify finds after a statement, which is undone then.
CREATE FUNCTION pg_temp.findings(statement text) RETURNS TABLE (rule text, expected numeric, found numeric)
	LANGUAGE plpgsql AS $$
DECLARE
	findings jsonb;
BEGIN
	BEGIN
		EXECUTE pg_temp.numbered(statement);
		SELECT jsonb_agg(jsonb_build_array(regexp_replace(v.rule, ' \d+ ', ' # '), v.expected, v.found)) INTO findings
		  FROM credit_lease.lease_verify('verify:1') v;
		RAISE SQLSTATE 'P9999';
	EXCEPTION WHEN SQLSTATE 'P9999' THEN
	END;
	RETURN QUERY SELECT f->>0, (f->>1)::numeric, (f->>2)::numeric
				   FROM jsonb_array_elements(findings) f
				  ORDER BY (f->>0) COLLATE "C", (f->>1)::numeric, (f->>2)::numeric;
END
$$;

-- How calls are answered after a statement, which is undone then.
CREATE FUNCTION pg_temp.answers(statement text, VARIADIC calls text[]) RETURNS TABLE (call text, code text, message text)
	LANGUAGE plpgsql AS $$
DECLARE
	answers jsonb;
BEGIN
	BEGIN
		EXECUTE pg_temp.numbered(statement);
		SELECT jsonb_agg(jsonb_build_array(c.call, r.code, r.message) ORDER BY c.n) INTO answers
		  FROM unnest(calls) WITH ORDINALITY c (call, n),
			   LATERAL test.refusal('SELECT credit_lease.' || pg_temp.numbered(c.call)) r;
		RAISE SQLSTATE 'P9999';
	EXCEPTION WHEN SQLSTATE 'P9999' THEN
	END;
	RETURN QUERY SELECT a->>0, a->>1, a->>2 FROM jsonb_array_elements(answers) a;
END
$$;

--
-- The tranches (rule 2): granted = remaining + reserved + chunked + consumed +
-- expired + returned + revoked, and the ledger's sums are the columns.
--
SELECT term, f.*
  FROM unnest(ARRAY['granted', 'remaining', 'reserved', 'chunked', 'consumed', 'expired', 'returned', 'revoked']) term,
	   LATERAL pg_temp.findings(format('UPDATE tranche SET %I = %1$I + 1 WHERE tranche_id = TRANCHE', term)) f;

-- No term is ever negative (rule 3), though the sum be right.
SELECT term, f.*
  FROM unnest(ARRAY['remaining', 'reserved', 'chunked', 'consumed', 'expired', 'returned', 'revoked']) term,
	   LATERAL pg_temp.findings(format('UPDATE tranche SET %I = -1, granted = granted - %1$I - 1 WHERE tranche_id = TRANCHE', term)) f;
SELECT * FROM pg_temp.findings('UPDATE tranche SET granted = -1, remaining = remaining - granted - 1 WHERE tranche_id = TRANCHE');

-- Nor infinite, nor no number at all.
SELECT * FROM pg_temp.findings($$ UPDATE tranche SET granted = 'Infinity', remaining = 'Infinity' WHERE tranche_id = TRANCHE $$);
SELECT * FROM pg_temp.findings($$ UPDATE tranche SET granted = 'NaN', remaining = 'NaN' WHERE tranche_id = TRANCHE $$);

-- What calls would not see: a tranche that is marked as closed, and a hold
-- that expires before anybody would look for it.
SELECT * FROM pg_temp.findings('UPDATE tranche SET open = false WHERE tranche_id = TRANCHE');
SELECT * FROM pg_temp.findings($$ UPDATE tranche SET hold_expires_at = '2030-01-02' WHERE tranche_id = TRANCHE $$);

-- What is a lease by half, and one that was released and yet has something.
SELECT change, f.* FROM (VALUES
	(1, $$SET kind = 'upstream' WHERE tranche_id = TRANCHE$$),
	(2, $$SET lease_id = 'L1' WHERE tranche_id = TRANCHE$$),
	(3, $$SET released_at = '2030-01-01' WHERE tranche_id = TRANCHE$$)
  ) v (n, change), LATERAL pg_temp.findings('UPDATE tranche ' || change) f
 ORDER BY n, rule COLLATE "C";

-- A tranche that has gone, and one that nobody granted.
SELECT * FROM pg_temp.findings('DELETE FROM tranche WHERE tranche_id = EXPIRED');
SELECT * FROM pg_temp.findings($$ INSERT INTO tranche (account, credit, kind, priority, created_at, open, granted, remaining)
	VALUES ('verify:1', 'tokens', 'grant', 100, now(), true, 5, 5) $$);

-- An account without the row by which it is locked, and freezes that no call
-- would look for.
SELECT * FROM pg_temp.findings($$ DELETE FROM account WHERE account = 'verify:1' $$);
SELECT * FROM pg_temp.findings($$ UPDATE account SET frozen = true WHERE account = 'verify:1' $$);
SELECT * FROM pg_temp.findings($$ INSERT INTO frozen_pool (account, credit, frozen_at) VALUES ('verify:1', 'tokens', now()) $$);

--
-- The holds (rule 4): the parts are what is held, and the entries say how each
-- hold ended.
--
SELECT change, f.* FROM (VALUES
	(1, 'SET amount = 9 WHERE reservation_id = HELD'),
	(2, 'SET tranche_amounts = ARRAY[9] WHERE reservation_id = HELD'),
	(3, 'SET amount = 9, tranche_amounts = ARRAY[9] WHERE reservation_id = HELD'),
	(4, 'SET tranche_ids = ARRAY[EXPIRED] WHERE reservation_id = HELD'),
	(5, $$SET status = 'cancelled' WHERE reservation_id = HELD$$),
	(6, $$SET status = 'held' WHERE reservation_id = CANCELLED$$),
	(7, 'SET consumed = 5, refunded = 5 WHERE reservation_id = SETTLED'),
	(8, 'SET tranche_ids = ARRAY[USED_UP] WHERE reservation_id = SETTLED')
  ) v (n, change), LATERAL pg_temp.findings('UPDATE reservation ' || change) f
 ORDER BY n, rule COLLATE "C", expected;
SELECT * FROM pg_temp.findings('DELETE FROM reservation WHERE reservation_id = SETTLED');

--
-- The refunds: what all refunds of an entry together have given back.
--
SELECT * FROM pg_temp.findings($$ INSERT INTO lease_usage (account, credit, tranche_id, entry_id, consumed)
	VALUES ('verify:1', 'tokens', TRANCHE, ENTRY, 36) $$);
SELECT * FROM pg_temp.findings($$ UPDATE tranche SET kind = 'upstream', lease_id = 'l', server = 's', expires_at = '2031-01-01'
	WHERE tranche_id = TRANCHE $$);
SELECT * FROM pg_temp.findings('UPDATE refund SET amount = 7 WHERE entry_id = REFUNDED');
SELECT * FROM pg_temp.findings('DELETE FROM refund WHERE entry_id = REFUNDED');
SELECT * FROM pg_temp.findings($$ INSERT INTO refund (account, entry_id, amount) VALUES ('verify:1', ENTRY, 1) $$);

--
-- The ledger, without the guard that refuses every change of it.
--
BEGIN;
ALTER TABLE ledger DISABLE TRIGGER ledger_guard;
-- an entry that says another amount
SELECT * FROM pg_temp.findings('UPDATE ledger SET amount = amount + 1 WHERE entry_id = ENTRY');
SELECT * FROM pg_temp.findings($$ UPDATE ledger SET amount = amount + 1 WHERE reservation_id = SETTLED AND kind = 'settle' $$);
SELECT * FROM pg_temp.findings($$ UPDATE ledger SET amount = amount + 1 WHERE reservation_id = HELD AND kind = 'reserve' $$);
-- one that is missing, and a part of one
SELECT * FROM pg_temp.findings($$ DELETE FROM ledger WHERE account = 'verify:1' AND kind = 'adjust' $$);
SELECT * FROM pg_temp.findings('DELETE FROM ledger WHERE first_entry_id = ENTRY');
-- those of a settlement, and of a hold
SELECT * FROM pg_temp.findings($$ DELETE FROM ledger WHERE reservation_id = SETTLED AND kind = 'settle' $$);
SELECT * FROM pg_temp.findings('DELETE FROM ledger WHERE reservation_id = HELD');
-- more refunded than was consumed, though it was counted
SELECT * FROM pg_temp.findings('
	UPDATE ledger SET amount = amount + 30 WHERE refund_of = REFUNDED;
	UPDATE refund SET amount = amount + 30 WHERE entry_id = REFUNDED');
ROLLBACK;

--
-- What does not balance is refused rather than made worse: LC009, from
-- whichever function touches it, and nothing changes.
--
SELECT * FROM refused(pg_temp.numbered($$
	UPDATE tranche SET remaining = remaining + 1 WHERE tranche_id = TRANCHE; SELECT lease_consume('verify:1', 'tokens', 1) $$));

SELECT a.* FROM pg_temp.answers('UPDATE tranche SET remaining = remaining + 1 WHERE tranche_id = TRANCHE',
	$$lease_consume('verify:1', 'tokens', 1)$$, $$lease_try_consume('verify:1', 'tokens', 1)$$,
	$$lease_reserve('verify:1', 'tokens', 1)$$, $$lease_try_reserve('verify:1', 'tokens', 1)$$,
	$$lease_settle('verify:1', HELD)$$, $$lease_cancel('verify:1', HELD)$$, $$lease_renew('verify:1', HELD)$$,
	$$lease_topup('verify:1', 'tokens', 1)$$, $$lease_refund('verify:1', ENTRY)$$,
	$$lease_adjust('verify:1', 'tokens', 1, 'goodwill')$$, $$lease_adjust('verify:1', 'tokens', -1, 'paid twice')$$,
	$$lease_install('verify:1', 'tokens', 'L1', 1, '2031-01-01')$$, $$lease_extend('verify:1', 'tokens', 'L1', 1)$$,
	$$lease_release('verify:1', 'tokens')$$) a;

-- Whatever it is that is impossible.
SELECT change, a.code, a.message FROM (VALUES
	('granted = granted + 1'),
	('granted = -1, remaining = remaining - granted - 1'),
	('remaining = -1, granted = granted - remaining - 1'),
	('reserved = -1, granted = granted - reserved - 1'),
	('chunked = -1, granted = granted - chunked - 1'),
	('consumed = -1, granted = granted - consumed - 1'),
	('expired = -1, granted = granted - expired - 1'),
	('returned = -1, granted = granted - returned - 1'),
	('revoked = -1, granted = granted - revoked - 1'),
	($$granted = 'Infinity', remaining = 'Infinity'$$),
	($$granted = 'NaN', remaining = 'NaN'$$),
	($$released_at = '2030-01-01'$$)
  ) v (change), LATERAL pg_temp.answers(format('UPDATE tranche SET %s WHERE tranche_id = TRANCHE', change),
										$$lease_consume('verify:1', 'tokens', 1)$$) a;

-- It concerns the pool, and no other; nor looking.
SELECT available FROM lease_topup('verify:1', 'images', 1);
SELECT available FROM lease_topup('verify:2', 'tokens', 1);
SELECT a.call, a.code FROM pg_temp.answers('UPDATE tranche SET remaining = remaining + 1 WHERE tranche_id = TRANCHE',
	$$lease_consume('verify:1', 'images', 1)$$, $$lease_consume('verify:2', 'tokens', 1)$$, $$lease_balance('verify:1')$$) a;
BEGIN;
UPDATE tranche SET remaining = remaining + 1 WHERE account = 'verify:1' AND tranche_id = :tranche_id;
SELECT available, reserved, consumed, granted FROM lease_balance('verify:1', 'tokens');
SELECT account, credit, tranche_id = :tranche_id AS is_the_tranche, rule, expected, found FROM lease_verify() ORDER BY rule COLLATE "C";
SELECT count(*) FROM lease_verify('verify:2');
ROLLBACK;

-- A hold that is not the sum of its parts, or whose parts are not there.
SELECT change, a.call, a.code FROM (VALUES
	('amount = 7'), ('amount = 12'), ('tranche_amounts = ARRAY[-1]'), ('tranche_amounts = ARRAY[3, 7]'), ('tranche_ids = ARRAY[0]')
  ) v (change), LATERAL pg_temp.answers(format('UPDATE reservation SET %s WHERE reservation_id = HELD', change),
	$$lease_settle('verify:1', HELD)$$, $$lease_settle('verify:1', HELD, 0)$$,
	$$lease_cancel('verify:1', HELD)$$, $$lease_renew('verify:1', HELD)$$) a;
-- One that has more than its tranche holds.
SELECT a.call, a.code FROM pg_temp.answers('UPDATE reservation SET amount = 11, tranche_amounts = ARRAY[11] WHERE reservation_id = HELD',
	$$lease_settle('verify:1', HELD)$$, $$lease_settle('verify:1', HELD, 0)$$, $$lease_cancel('verify:1', HELD)$$) a;
-- One that has ended, and nobody knows how.
SELECT a.call, a.code FROM pg_temp.answers($$ UPDATE reservation SET status = 'settled' WHERE reservation_id = HELD $$,
	$$lease_settle('verify:1', HELD)$$) a;

-- A refund beyond what was counted, and one to a tranche that is not there.
SELECT change, a.call, a.code FROM (VALUES ('amount = -1'), ('amount = 38')) v (change),
	LATERAL pg_temp.answers(format('UPDATE refund SET %s WHERE entry_id = REFUNDED', change), $$lease_refund('verify:1', ENTRY)$$) a;
SELECT a.call, a.code FROM pg_temp.answers('DELETE FROM tranche WHERE tranche_id = USED_UP', $$lease_refund('verify:1', ENTRY)$$) a;

SELECT * FROM credit_lease.lease_verify();
