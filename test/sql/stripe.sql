--
-- Striped pools: each tranche is kept in several rows, and whatever looks at it
-- sees one tranche.
--
-- In which stripe a session works depends on its process, so that nothing here
-- shows that. \c begins another session.
--
\set begin 'SET search_path = credit_lease, test; SET timezone = ''UTC''; SET datestyle = ''ISO'';'
\set noon 'SET credit_lease.mock_now = ''2030-01-01 12:00:00+00'';'
:begin :noon

-- What an account has: of each tranche, in burn order, what is left + held -
-- consumed / granted; and whether its books balance.
CREATE FUNCTION test.state(name text, OUT credit text, OUT tranches text, OUT available numeric, OUT reserved numeric,
		OUT consumed numeric, OUT expired numeric, OUT balances boolean, OUT findings bigint) RETURNS SETOF record
	LANGUAGE sql AS $$
	SELECT b.credit, w.tranches, trim_scale(b.available), trim_scale(b.reserved), trim_scale(b.consumed), trim_scale(b.expired), w.balances,
		   (SELECT count(*) FROM credit_lease.lease_verify(name))
	  FROM credit_lease.lease_balance(name) b,
		   LATERAL (SELECT string_agg(trim_scale(t.remaining) || CASE WHEN t.reserved <> 0 THEN '+' || trim_scale(t.reserved) ELSE '' END
					|| CASE WHEN t.consumed <> 0 THEN '-' || trim_scale(t.consumed) ELSE '' END || '/' || trim_scale(t.granted), ' '
					ORDER BY t.priority, t.expires_at, t.tranche_id) AS tranches,
				bool_and(t.granted = t.remaining + t.reserved + t.chunked + t.consumed + t.expired + t.returned + t.revoked) AS balances
			  FROM credit_lease.whole_tranche t WHERE t.account = name AND t.credit = b.credit) w
	 ORDER BY b.credit
$$;

-- How a pool is kept: what remains in each row of each tranche, the most first.
CREATE FUNCTION test.shares(name text) RETURNS SETOF text
	LANGUAGE sql AS $$
	SELECT trim_scale(t.remaining) || ' | ' || coalesce(string_agg(trim_scale(p.remaining)::text, ' ' ORDER BY p.remaining DESC), '')
	  FROM credit_lease.tranche t LEFT JOIN credit_lease.tranche_stripe p USING (account, credit, tranche_id)
	 WHERE t.account = name
	 GROUP BY t.credit, t.priority, t.expires_at, t.tranche_id, t.remaining
	 ORDER BY t.credit, t.priority, t.expires_at, t.tranche_id
$$;

--
-- How many
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:1', 'tokens', 10);
SELECT shares('stripe:1');
SELECT lease_stripe('stripe:1', 'tokens', 4);
SELECT lease_stripe('stripe:1', 'tokens', 4);
SELECT shares('stripe:1');
SELECT * FROM state('stripe:1');
SELECT account, credit, stripes FROM policy WHERE account = 'stripe:1';
SELECT (lease_policy('stripe:1', 'tokens')).stripes;
SELECT credit, stripes FROM striped_pool WHERE account = 'stripe:1';
SELECT count(*), min(stripe), max(stripe), bool_or(frozen) FROM stripe WHERE account = 'stripe:1';
SELECT striped FROM account WHERE account = 'stripe:1';
-- more, fewer, one
SELECT lease_stripe('stripe:1', 'tokens', 7);
SELECT shares('stripe:1');
SELECT lease_stripe('stripe:1', 'tokens', 2);
SELECT shares('stripe:1');
SELECT lease_stripe('stripe:1', 'tokens', 64);
SELECT shares('stripe:1');
SELECT * FROM state('stripe:1');
SELECT lease_stripe('stripe:1', 'tokens', 1);
SELECT lease_stripe('stripe:1', 'tokens', 1);
SELECT shares('stripe:1');
SELECT striped, (SELECT count(*) FROM stripe s WHERE s.account = a.account) AS stripes FROM account a WHERE account = 'stripe:1';
SELECT * FROM state('stripe:1');
-- It is no movement of credit.
SELECT kind, trim_scale(amount) AS amount FROM ledger WHERE account = 'stripe:1';
-- every number there is
DO $$
BEGIN
	FOR stripes IN 2 .. 64 LOOP
		IF NOT credit_lease.lease_stripe('stripe:1', 'tokens', stripes) THEN
			RAISE '% stripes were there', stripes;
		END IF;
		PERFORM credit_lease.lease_consume('stripe:1', 'tokens', 0.1);
		IF (SELECT (count(*), sum(p.remaining)) <> (stripes, 10 - (stripes - 1) * 0.1)
			  FROM credit_lease.tranche_stripe p WHERE p.account = 'stripe:1') OR
			EXISTS (SELECT FROM credit_lease.lease_verify('stripe:1')) THEN
			RAISE '% stripes are not right', stripes;
		END IF;
	END LOOP;
END
$$;
SELECT * FROM state('stripe:1');

SELECT call, r.code, r.message
  FROM (VALUES ($$NULL, 'tokens', 2$$), ($$'stripe:1', NULL, 2$$), ($$'stripe:1', 'tokens', NULL$$), ($$'', 'tokens', 2$$), ($$'stripe:1', '', 2$$),
			   ($$'stripe:1', 'tokens', 0$$), ($$'stripe:1', 'tokens', -1$$), ($$'stripe:1', 'tokens', 65$$)) v (call),
	   LATERAL refusal('SELECT credit_lease.lease_stripe(' || call || ')') r;
SELECT code FROM unnest(ARRAY[0, 65, -1]) n, LATERAL refusal('INSERT INTO credit_lease.policy (account, stripes) VALUES (''stripe:no'', ' || n || ')');

-- A pool that has nothing yet, and an account that is not there.
SELECT lease_stripe('stripe:1', 'images', 3);
SELECT lease_stripe('stripe:new', 'tokens', 3);
SELECT count(*) FROM account WHERE account = 'stripe:new';
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:new', 'tokens', 1) $$);
SELECT applied, trim_scale(available) AS available FROM lease_try_consume('stripe:1', 'images', 1);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:1', 'images', 3);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:new', 'tokens', 30);
SELECT shares('stripe:new');
SELECT applied, trim_scale(available) AS available FROM lease_consume('stripe:1', 'images', 3);
SELECT applied, trim_scale(available) AS available FROM lease_consume('stripe:new', 'tokens', 29);
SELECT * FROM state('stripe:1');
SELECT * FROM state('stripe:new');
-- With two striped pools there are as many locks as the larger has.
SELECT count(*) FROM stripe WHERE account = 'stripe:1';
SELECT lease_stripe('stripe:1', 'tokens', 1);
SELECT count(*) FROM stripe WHERE account = 'stripe:1';
SELECT credit, stripes FROM striped_pool WHERE account = 'stripe:1';

--
-- Shares: of whatever digits
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:2', 'a', 3);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:2', 'b', 0.000000000001);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:2', 'c', 1.000000000001);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:2', 'd', 99999999999999999999999999.999999999999);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:2', 'e', 0.5);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:2', 'f', 12.00);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:2', 'g', 1e20);
SELECT c.credit, lease_stripe('stripe:2', c.credit, 4) FROM unnest('{a,b,c,d,e,f,g}'::text[]) c (credit);
SELECT shares('stripe:2');
SELECT * FROM state('stripe:2');
-- What no row has alone
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_consume('stripe:2', 'a', 3);
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_consume('stripe:2', 'b', 0.000000000001);
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_consume('stripe:2', 'c', 1);
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_consume('stripe:2', 'c', 0.000000000001);
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_consume('stripe:2', 'd', 99999999999999999999999999);
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_consume('stripe:2', 'e', 0.45);
SELECT * FROM state('stripe:2');

--
-- Spending: out of one row, out of several, and out of all
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:3', 'tokens', 100);
SELECT lease_stripe('stripe:3', 'tokens', 8);
SELECT applied, trim_scale(amount) AS amount, trim_scale(available) AS available, replayed FROM lease_consume('stripe:3', 'tokens', 1);
SELECT applied, trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_consume('stripe:3', 'tokens', 40);
SELECT kind, trim_scale(amount) AS amount, trim_scale(available) AS available FROM ledger WHERE account = 'stripe:3' ORDER BY entry_id;
SELECT * FROM refused($$ SELECT credit_lease.lease_consume('stripe:3', 'tokens', 59.1) $$);
SELECT applied, trim_scale(amount) AS amount, trim_scale(available) AS available, entry_id FROM lease_try_consume('stripe:3', 'tokens', 60);
SELECT changed_by($$ SELECT lease_try_consume('stripe:3', 'tokens', 60) $$);
SELECT * FROM state('stripe:3');
SELECT applied, trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_try_consume('stripe:3', 'tokens', 58.5);
SELECT applied, trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_consume('stripe:3', 'tokens', 0.5);
SELECT * FROM refused($$ SELECT credit_lease.lease_consume('stripe:3', 'tokens', 0.000000000001) $$);
SELECT * FROM state('stripe:3');
-- one by one, to the last, by several sessions
SELECT trim_scale(available) AS available FROM lease_topup('stripe:3', 'tokens', 30);
SELECT count(*) FROM generate_series(1, 13) n, LATERAL lease_try_consume('stripe:3', 'tokens', 1) c WHERE c.applied;
\c -
:begin :noon
SELECT count(*) FROM generate_series(1, 13) n, LATERAL lease_try_consume('stripe:3', 'tokens', 1) c WHERE c.applied;
\c -
:begin :noon
SELECT count(*) FROM generate_series(1, 13) n, LATERAL lease_try_consume('stripe:3', 'tokens', 1) c WHERE c.applied;
SELECT * FROM state('stripe:3');

-- Several calls in one transaction, which is rolled back to a savepoint
SELECT trim_scale(available) AS available FROM lease_topup('stripe:3', 'tokens', 20);
BEGIN;
SELECT applied FROM lease_consume('stripe:3', 'tokens', 3);
SAVEPOINT s;
SELECT applied FROM lease_consume('stripe:3', 'tokens', 17);
SELECT applied FROM lease_try_consume('stripe:3', 'tokens', 1);
ROLLBACK TO s;
SELECT trim_scale(available) AS available, trim_scale(consumed) AS consumed FROM lease_balance('stripe:3');
SELECT applied FROM lease_consume('stripe:3', 'tokens', 16);
COMMIT;
SELECT * FROM state('stripe:3');
-- What a transaction saw that was rolled back is no reason to refuse.
-- Twice, the second time with plans at hand.
SELECT available FROM (VALUES ('stripe:3a'), ('stripe:3b')) v (name), LATERAL lease_topup(name, 'tokens', 5);
SELECT lease_stripe(name, 'tokens', 4) FROM (VALUES ('stripe:3a'), ('stripe:3b')) v (name);
SELECT amount FROM (VALUES ('stripe:3a'), ('stripe:3b')) v (name), LATERAL lease_reserve(name, 'tokens', 1, '1 minute');
SET credit_lease.mock_now = '2030-01-01 13:00:00+00';
BEGIN\; SELECT applied FROM lease_consume('stripe:3a', 'tokens', 2)\; SELECT applied FROM lease_try_consume('stripe:3a', 'tokens', 4)\; ROLLBACK\; SELECT applied FROM lease_try_consume('stripe:3a', 'tokens', 5);
BEGIN\; SELECT applied FROM lease_consume('stripe:3b', 'tokens', 2)\; SELECT applied FROM lease_try_consume('stripe:3b', 'tokens', 4)\; ROLLBACK\; SELECT applied FROM lease_try_consume('stripe:3b', 'tokens', 5);
:noon

--
-- Burn order (rule 10): nothing of a tranche burns while one before it has
-- credit in any stripe
--
SELECT lease_stripe('stripe:4', 'tokens', 4);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:4', 'tokens', 10, priority => 100);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:4', 'tokens', 10, priority => 50);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:4', 'tokens', 10, priority => 100, expires_at => '2031-01-01');
SELECT trim_scale(available) AS available FROM lease_topup('stripe:4', 'tokens', 1, priority => 1);
SELECT spend, c.available, (SELECT tranches FROM state(left('stripe:4' || c.available, 8)))
  FROM unnest(ARRAY[0.5, 1, 6, 2, 1.5, 5, 7, 8]) spend, LATERAL lease_consume('stripe:4', 'tokens', spend) c;
SELECT kind, trim_scale(amount) AS amount, trim_scale(available) AS available FROM ledger WHERE account = 'stripe:4' AND kind = 'consume' ORDER BY entry_id;
-- A later one that burns first
SELECT applied, trim_scale(available) AS available FROM lease_try_consume('stripe:4', 'tokens', 1);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:4', 'tokens', 1000, priority => 100);
SELECT applied FROM lease_consume('stripe:4', 'tokens', 1);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:4', 'tokens', 2, priority => 10);
SELECT applied FROM lease_consume('stripe:4', 'tokens', 1);
SELECT tranches, findings FROM state('stripe:4');
\c -
:begin :noon
SELECT applied FROM lease_consume('stripe:4', 'tokens', 1);
SELECT applied FROM lease_consume('stripe:4', 'tokens', 1);
SELECT tranches, findings FROM state('stripe:4');
-- A refund goes back to where it burns first.
SELECT entry_id FROM ledger WHERE account = 'stripe:4' AND kind = 'consume' ORDER BY entry_id LIMIT 1 \gset
SELECT trim_scale(amount) AS amount FROM lease_refund('stripe:4', :entry_id);
SELECT tranches FROM state('stripe:4');
SELECT applied FROM lease_consume('stripe:4', 'tokens', 1);
SELECT tranches, findings FROM state('stripe:4');

--
-- Holds, which end in other sessions than they began in
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:5', 'tokens', 20);
SELECT lease_stripe('stripe:5', 'tokens', 5);
SELECT reservation_id AS r1, applied, trim_scale(amount) AS amount, trim_scale(available) AS available, expires_at, replayed FROM lease_reserve('stripe:5', 'tokens', 2, '1 hour') \gset r1_
\set r1 :r1_r1
\echo :r1_applied :r1_amount :r1_available :r1_expires_at :r1_replayed
SELECT reservation_id AS r2 FROM lease_reserve('stripe:5', 'tokens', 11, '1 hour') \gset
SELECT * FROM state('stripe:5');
-- as much as there is
SELECT * FROM refused($$ SELECT credit_lease.lease_reserve('stripe:5', 'tokens', 8) $$);
SELECT applied, trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_try_reserve('stripe:5', 'tokens', 9, min_amount => 8);
SELECT reservation_id AS r3 FROM lease_reserve('stripe:5', 'tokens', 50, '1 hour', min_amount => 7) \gset
SELECT trim_scale(amount) AS amount FROM open_reservation WHERE account = 'stripe:5' ORDER BY reservation_id;
SELECT * FROM state('stripe:5');
SELECT * FROM refused($$ SELECT credit_lease.lease_reserve('stripe:5', 'tokens', 1, min_amount => 0.1) $$);
\c -
:begin :noon
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(shortfall) AS shortfall, trim_scale(available) AS available, replayed FROM lease_settle('stripe:5', :r2, 4);
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(shortfall) AS shortfall, trim_scale(available) AS available, replayed FROM lease_settle('stripe:5', :r2, 4);
SELECT code FROM refusal(format($$ SELECT credit_lease.lease_settle('stripe:5', %s, 5) $$, :r2));
SELECT code FROM refusal(format($$ SELECT credit_lease.lease_renew('stripe:5', %s) $$, :r2));
SELECT lease_cancel('stripe:5', :r2);
SELECT * FROM state('stripe:5');
\c -
:begin :noon
-- more of it, out of several stripes
SELECT trim_scale(amount) AS amount, expires_at FROM lease_renew('stripe:5', :r1, '2 hours', 5);
SELECT * FROM refused(format($$ SELECT credit_lease.lease_renew('stripe:5', %s, '3 hours', 3) $$, :r1));
SELECT * FROM state('stripe:5');
\c -
:begin :noon
-- above the hold
SELECT * FROM refused(format($$ SELECT credit_lease.lease_settle('stripe:5', %s, 8, 'refuse') $$, :r1));
SELECT lease_cancel('stripe:5', :r3);
SELECT lease_cancel('stripe:5', :r3);
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(shortfall) AS shortfall, trim_scale(available) AS available FROM lease_settle('stripe:5', :r1, 15, 'charge');
SELECT * FROM state('stripe:5');
SELECT reservation_id AS r4 FROM lease_reserve('stripe:5', 'tokens', 0.5) \gset
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(shortfall) AS shortfall, trim_scale(available) AS available FROM lease_settle('stripe:5', :r4, 2, 'clamp');
SELECT reservation_id AS r5 FROM lease_reserve('stripe:5', 'tokens', 0.25) \gset
\c -
:begin :noon
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(shortfall) AS shortfall, trim_scale(available) AS available FROM lease_settle('stripe:5', :r5, 3, 'charge');
SELECT * FROM state('stripe:5');
SELECT status, trim_scale(amount) AS amount, trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(shortfall) AS shortfall FROM reservation WHERE account = 'stripe:5' ORDER BY reservation_id;
SELECT code FROM refusal($$ SELECT credit_lease.lease_settle('stripe:5', 0) $$);
SELECT code FROM refusal($$ SELECT credit_lease.lease_cancel('stripe:5', 0) $$);
SELECT code FROM refusal($$ SELECT credit_lease.lease_renew('stripe:nobody', 1) $$);

-- A hold of several tranches is settled in burn order, wherever.
SELECT t.available FROM (VALUES (3), (4), (5)) v (amount), LATERAL lease_topup('stripe:5', 'wide', v.amount, priority => v.amount) t;
SELECT lease_stripe('stripe:5', 'wide', 3);
SELECT reservation_id AS r6 FROM lease_reserve('stripe:5', 'wide', 10) \gset
\c -
:begin :noon
SELECT tranches FROM state('stripe:5') WHERE credit = 'wide';
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(shortfall) AS shortfall, trim_scale(available) AS available FROM lease_settle('stripe:5', :r6, 4);
SELECT * FROM state('stripe:5');

--
-- Expired holds are there for whoever needs them, and not before (rule 7)
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:6', 'tokens', 12);
SELECT lease_stripe('stripe:6', 'tokens', 3);
SELECT reservation_id AS r1 FROM lease_reserve('stripe:6', 'tokens', 3, '1 minute') \gset
\c -
:begin :noon
SELECT reservation_id AS r2 FROM lease_reserve('stripe:6', 'tokens', 3, '1 minute') \gset
SELECT reservation_id AS r3 FROM lease_reserve('stripe:6', 'tokens', 3, '1 hour') \gset
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:6', 'tokens', 4) $$);
SET credit_lease.mock_now = '2030-01-01 12:01:00+00';
SELECT trim_scale(available) AS available, trim_scale(reserved) AS reserved FROM lease_balance('stripe:6');
SELECT code FROM refusal(format($$ SELECT credit_lease.lease_settle('stripe:6', %s) $$, :r1));
SELECT code FROM refusal(format($$ SELECT credit_lease.lease_renew('stripe:6', %s) $$, :r1));
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:6', 'tokens', 9.5) $$);
SELECT applied FROM lease_consume('stripe:6', 'tokens', 4);
SELECT * FROM state('stripe:6');
SELECT applied FROM lease_consume('stripe:6', 'tokens', 5);
SELECT * FROM state('stripe:6');
SELECT status, trim_scale(refunded) AS refunded FROM reservation WHERE account = 'stripe:6' ORDER BY reservation_id;
SELECT lease_cancel('stripe:6', :r1), lease_cancel('stripe:6', :r3);
-- The sweep gives back what no call needed.
SELECT trim_scale(amount) AS amount FROM lease_reserve('stripe:6', 'tokens', 1, '1 minute');
SELECT trim_scale(amount) AS amount FROM lease_reserve('stripe:6', 'tokens', 1, '1 minute');
SET credit_lease.mock_now = '2030-01-01 12:02:00+00';
SELECT lease_reclaim() >= 1 AS given_back;
SELECT * FROM state('stripe:6');
-- One that is cancelled late has expired.
SELECT reservation_id AS r4 FROM lease_reserve('stripe:6', 'tokens', 1, '1 minute') \gset
SET credit_lease.mock_now = '2030-01-01 12:03:00+00';
SELECT lease_cancel('stripe:6', :r4);
SELECT status FROM reservation WHERE account = 'stripe:6' AND reservation_id = :r4;
SELECT * FROM state('stripe:6');
:noon

--
-- Expired tranches are no credit, and what comes back to them is gone (rule 8)
--
SELECT lease_stripe('stripe:7', 'tokens', 4);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:7', 'tokens', 20, expires_at => '2030-01-01 13:00:00+00');
SELECT trim_scale(available) AS available FROM lease_topup('stripe:7', 'tokens', 5);
SELECT entry_id FROM lease_consume('stripe:7', 'tokens', 6) \gset
SELECT reservation_id AS r1 FROM lease_reserve('stripe:7', 'tokens', 8, '2 hours') \gset
SELECT reservation_id AS r2 FROM lease_reserve('stripe:7', 'tokens', 2, '2 hours') \gset
SELECT * FROM state('stripe:7');
SET credit_lease.mock_now = '2030-01-01 13:00:00+00';
SELECT trim_scale(available) AS available, trim_scale(reserved) AS reserved, trim_scale(expired) AS expired FROM lease_balance('stripe:7');
SELECT code, detail FROM refusal($$ SELECT credit_lease.lease_consume('stripe:7', 'tokens', 6) $$);
\c -
:begin
SET credit_lease.mock_now = '2030-01-01 13:00:00+00';
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(available) AS available FROM lease_settle('stripe:7', :r1, 3);
SELECT lease_cancel('stripe:7', :r2);
SELECT trim_scale(amount) AS amount FROM lease_refund('stripe:7', :entry_id, 4);
SELECT * FROM state('stripe:7');
SELECT applied FROM lease_consume('stripe:7', 'tokens', 5);
SELECT applied FROM lease_try_consume('stripe:7', 'tokens', 0.1);
SELECT * FROM state('stripe:7');
-- The sweep writes them off.
SELECT lease_reclaim() IS NOT NULL AS swept;
SELECT kind, trim_scale(amount) AS amount, trim_scale(lapsed) AS lapsed FROM ledger WHERE account = 'stripe:7' AND (kind = 'expire' OR lapsed IS NOT NULL) ORDER BY entry_id;
SELECT trim_scale(granted) AS granted, trim_scale(remaining) AS remaining, trim_scale(consumed) AS consumed, trim_scale(expired) AS expired FROM whole_tranche WHERE account = 'stripe:7' ORDER BY tranche_id;
SELECT * FROM state('stripe:7');
SELECT count(*) FROM open_lease WHERE account = 'stripe:7';
:noon

--
-- Refunds
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:8', 'tokens', 12, priority => 1);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:8', 'tokens', 12, priority => 2);
SELECT lease_stripe('stripe:8', 'tokens', 4);
SELECT entry_id AS e1 FROM lease_consume('stripe:8', 'tokens', 2) \gset
SELECT entry_id AS e2 FROM lease_consume('stripe:8', 'tokens', 13) \gset
SELECT * FROM state('stripe:8');
\c -
:begin :noon
SELECT trim_scale(amount) AS amount, replayed FROM lease_refund('stripe:8', :e1, 1.5, 'slow', 'refund');
SELECT trim_scale(amount) AS amount, replayed FROM lease_refund('stripe:8', :e1, 1.5, 'slow', 'refund');
SELECT code FROM refusal(format($$ SELECT credit_lease.lease_refund('stripe:8', %s, 1, 'slow', 'refund') $$, :e1));
SELECT * FROM refused(format($$ SELECT credit_lease.lease_refund('stripe:8', %s, 1) $$, :e1));
SELECT code FROM refusal(format($$ SELECT credit_lease.lease_refund('stripe:8', %s, 3) $$, :e1));
SELECT trim_scale(amount) AS amount FROM lease_refund('stripe:8', :e1);
SELECT code FROM refusal(format($$ SELECT credit_lease.lease_refund('stripe:8', %s) $$, :e1));
SELECT code FROM refusal($$ SELECT credit_lease.lease_refund('stripe:8', 0) $$);
SELECT * FROM state('stripe:8');
-- of both tranches, the last burned first
SELECT trim_scale(amount) AS amount FROM lease_refund('stripe:8', :e2, 5);
SELECT * FROM state('stripe:8');
\c -
:begin :noon
SELECT trim_scale(amount) AS amount FROM lease_refund('stripe:8', :e2);
SELECT * FROM state('stripe:8');
SELECT kind, trim_scale(amount) AS amount FROM ledger WHERE account = 'stripe:8' AND refund_of IS NOT NULL ORDER BY entry_id;
-- to a tranche that was used up, and closed
SELECT entry_id AS e3 FROM lease_consume('stripe:8', 'tokens', 24) \gset
SELECT lease_stripe('stripe:8', 'tokens', 3);
SELECT granted, open FROM tranche WHERE account = 'stripe:8' ORDER BY tranche_id;
SELECT trim_scale(amount) AS amount FROM lease_refund('stripe:8', :e3, 18);
SELECT granted, open FROM tranche WHERE account = 'stripe:8' ORDER BY tranche_id;
SELECT shares('stripe:8');
SELECT * FROM state('stripe:8');
SELECT applied FROM lease_consume('stripe:8', 'tokens', 18);
SELECT * FROM state('stripe:8');

--
-- Adjustments, and what comes in
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:9', 'tokens', 10);
SELECT lease_stripe('stripe:9', 'tokens', 4);
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_adjust('stripe:9', 'tokens', 6, 'goodwill');
SELECT shares('stripe:9');
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available, replayed FROM lease_adjust('stripe:9', 'tokens', -12, 'paid twice', 'k');
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available, replayed FROM lease_adjust('stripe:9', 'tokens', -12, 'paid twice', 'k');
SELECT * FROM refused($$ SELECT credit_lease.lease_adjust('stripe:9', 'tokens', -4.5, 'paid twice') $$);
SELECT trim_scale(granted) AS granted, trim_scale(remaining) AS remaining, revoked FROM whole_tranche WHERE account = 'stripe:9' ORDER BY tranche_id;
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available, replayed FROM lease_topup('stripe:9', 'tokens', 3, 'top');
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available, replayed FROM lease_topup('stripe:9', 'tokens', 3, 'top');
SELECT code FROM refusal($$ SELECT credit_lease.lease_topup('stripe:9', 'tokens', 4, 'top') $$);
SELECT shares('stripe:9');
SELECT trim_scale(amount) AS amount, trim_scale(available) AS available FROM lease_adjust('stripe:9', 'tokens', -7, 'all of it');
SELECT * FROM state('stripe:9');

--
-- Keys (rule 5): a replay touches nothing
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:10', 'tokens', 9);
SELECT lease_stripe('stripe:10', 'tokens', 3);
SELECT applied, trim_scale(amount) AS amount, trim_scale(available) AS available, replayed FROM lease_consume('stripe:10', 'tokens', 4, 'k1');
SELECT reservation_id AS r1, trim_scale(amount) AS amount, trim_scale(available) AS available, replayed FROM lease_reserve('stripe:10', 'tokens', 4, '1 hour', 'k2') \gset
\c -
:begin :noon
SELECT changed_by($$ SELECT lease_consume('stripe:10', 'tokens', 4, 'k1') $$);
SELECT applied, trim_scale(amount) AS amount, trim_scale(available) AS available, replayed FROM lease_consume('stripe:10', 'tokens', 4, 'k1');
SELECT applied, trim_scale(amount) AS amount, trim_scale(available) AS available, replayed FROM lease_try_consume('stripe:10', 'tokens', 4, 'k1');
SELECT reservation_id = :r1 AS same, trim_scale(amount) AS amount, trim_scale(available) AS available, replayed FROM lease_reserve('stripe:10', 'tokens', 4, '1 hour', 'k2');
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:10', 'tokens', 1, 'k1') $$);
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:10', 'images', 4, 'k1') $$);
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:10', 'tokens', 4, 'k2') $$);
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:10', 'tokens', 2, 'k3') $$);
SELECT * FROM state('stripe:10');

--
-- Freezes: every stripe
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:11', 'tokens', 9);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:11', 'images', 9);
SELECT lease_stripe('stripe:11', 'tokens', 3);
SELECT reservation_id AS r1 FROM lease_reserve('stripe:11', 'tokens', 2, '1 hour') \gset
SELECT entry_id FROM lease_consume('stripe:11', 'tokens', 1) \gset
SELECT lease_freeze('stripe:11', 'tokens', 'chargeback'), lease_freeze('stripe:11', 'tokens');
SELECT * FROM refused($$ SELECT credit_lease.lease_consume('stripe:11', 'tokens', 1) $$);
SELECT applied FROM lease_try_reserve('stripe:11', 'tokens', 1);
SELECT applied FROM lease_consume('stripe:11', 'images', 1);
\c -
:begin :noon
SELECT code FROM refusal($$ SELECT credit_lease.lease_reserve('stripe:11', 'tokens', 1) $$);
SELECT code FROM refusal(format($$ SELECT credit_lease.lease_renew('stripe:11', %s) $$, :r1));
-- it settles what it has held, and nothing above it; money comes in
SELECT trim_scale(consumed) AS consumed, trim_scale(shortfall) AS shortfall FROM lease_settle('stripe:11', :r1, 3);
SELECT trim_scale(amount) AS amount FROM lease_refund('stripe:11', :entry_id);
SELECT trim_scale(amount) AS amount FROM lease_adjust('stripe:11', 'tokens', -1, 'paid twice');
SELECT trim_scale(amount) AS amount FROM lease_topup('stripe:11', 'tokens', 1);
SELECT * FROM state('stripe:11');
-- stripes that are made anew are frozen as well
SELECT lease_stripe('stripe:11', 'tokens', 2), lease_stripe('stripe:11', 'images', 5);
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:11', 'tokens', 1) $$);
SELECT applied FROM lease_consume('stripe:11', 'images', 1);
SELECT lease_freeze('stripe:11', NULL, 'all');
SELECT code, detail FROM refusal($$ SELECT credit_lease.lease_consume('stripe:11', 'images', 1) $$);
SELECT count(*) FROM lease_verify('stripe:11');
SELECT lease_unfreeze('stripe:11'), lease_unfreeze('stripe:11');
SELECT applied FROM lease_consume('stripe:11', 'tokens', 7);
SELECT applied FROM lease_consume('stripe:11', 'images', 7);
SELECT * FROM state('stripe:11');
-- a freeze before there is anything
SELECT lease_freeze('stripe:12', 'tokens'), lease_stripe('stripe:12', 'tokens', 2);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:12', 'tokens', 4);
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:12', 'tokens', 1) $$);
SELECT lease_unfreeze('stripe:12', 'tokens');
SELECT applied FROM lease_consume('stripe:12', 'tokens', 4);
SELECT * FROM state('stripe:12');

--
-- Leases
--
SELECT lease_stripe('stripe:13', 'tokens', 4);
SELECT lease_install('stripe:13', 'tokens', 'L1', 40, '2030-01-01 12:10:00+00');
SELECT lease_install('stripe:13', 'tokens', 'L2', 40, '2030-01-01 12:10:00+00');
SELECT shares('stripe:13');
SELECT trim_scale(available) AS available FROM lease_topup('stripe:13', 'tokens', 1000, expires_at => '2030-01-01 14:00:00+00');
SELECT entry_id FROM lease_consume('stripe:13', 'tokens', 25) \gset
SELECT lease_extend('stripe:13', 'tokens', 'L1', 40), lease_extend('stripe:13', 'tokens', 'L1', 44), lease_extend('stripe:13', 'tokens', 'L1', 44);
SELECT applied FROM lease_consume('stripe:13', 'tokens', 18);
SELECT * FROM state('stripe:13');
SELECT lease_id, trim_scale(granted) AS granted, trim_scale(remaining) AS remaining FROM open_lease WHERE account = 'stripe:13' ORDER BY expires_at;
-- used up, kept anew, and extended, it burns first as before
SELECT applied FROM lease_consume('stripe:13', 'tokens', 1);
SELECT lease_stripe('stripe:13', 'tokens', 3);
SELECT applied FROM lease_consume('stripe:13', 'tokens', 1);
SELECT lease_extend('stripe:13', 'tokens', 'L1', 50);
SELECT applied FROM lease_consume('stripe:13', 'tokens', 1);
SELECT * FROM state('stripe:13');
-- and when it lives longer than the other, after it
SELECT lease_extend('stripe:13', 'tokens', 'L1', 50, '2030-01-01 15:00:00+00');
SELECT applied FROM lease_consume('stripe:13', 'tokens', 1);
SELECT applied FROM lease_consume('stripe:13', 'tokens', 1);
SELECT * FROM state('stripe:13');
-- after the expiry that it had at first
SET credit_lease.mock_now = '2030-01-01 12:30:00+00';
SELECT trim_scale(available) AS available FROM lease_balance('stripe:13');
SELECT applied FROM lease_try_consume('stripe:13', 'tokens', 1000);
SELECT * FROM state('stripe:13');
-- released: what is held can be settled, the rest is returned
SELECT reservation_id AS r1 FROM lease_reserve('stripe:13', 'tokens', 1, '1 hour') \gset
SELECT lease_release('stripe:13', 'tokens', 'nothing'), lease_release('stripe:13', 'tokens', 'L1'), lease_release('stripe:13', 'tokens', 'L1');
SELECT trim_scale(granted) AS granted, trim_scale(remaining) AS remaining, trim_scale(reserved) AS reserved, trim_scale(consumed) AS consumed, returned FROM whole_tranche WHERE account = 'stripe:13' AND lease_id = 'L1';
SELECT * FROM state('stripe:13');
\c -
:begin
SET credit_lease.mock_now = '2030-01-01 12:30:00+00';
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(available) AS available FROM lease_settle('stripe:13', :r1, 0.5);
SELECT trim_scale(amount) AS amount FROM lease_refund('stripe:13', :entry_id, 5);
SELECT trim_scale(granted) AS granted, trim_scale(remaining) AS remaining, trim_scale(reserved) AS reserved, trim_scale(consumed) AS consumed, returned FROM whole_tranche WHERE account = 'stripe:13' AND lease_id = 'L1';
SELECT * FROM state('stripe:13');
SELECT lease_install('stripe:13', 'tokens', 'L1', 5, '2030-01-01 16:00:00+00'), lease_install('stripe:13', 'tokens', 'L2', 5, '2030-01-01 16:00:00+00');
SELECT applied FROM lease_consume('stripe:13', 'tokens', 5);
SELECT lease_release('stripe:13', 'tokens'), lease_release('stripe:13', 'tokens');
SELECT * FROM state('stripe:13');
:noon

--
-- Features
--
INSERT INTO meter (feature, credit, rate, preference) VALUES ('stripe.call', 'tokens', 0.5, 1), ('stripe.any', 'tokens', 1, 1), ('stripe.any', 'images', 2, 2);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:14', 'tokens', 10);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:14', 'images', 10);
SELECT lease_stripe('stripe:14', 'tokens', 4), lease_stripe('stripe:14', 'images', 2);
SELECT allowed, reason, reservation_id AS r1, credit, trim_scale(amount) AS amount FROM lease_check('stripe:14', 'stripe.call', 7) \gset c_
\echo :c_allowed :c_reason :c_credit :c_amount
SELECT allowed, reason, credit, trim_scale(amount) AS amount FROM lease_check('stripe:14', 'stripe.call', 14);
SELECT allowed, credit, trim_scale(amount) AS amount FROM lease_explain('stripe:14', 'stripe.any', 5);
SELECT allowed, credit, trim_scale(amount) AS amount, reservation_id AS r2 FROM lease_check('stripe:14', 'stripe.any', 5) \gset d_
\echo :d_allowed :d_credit :d_amount
SELECT * FROM state('stripe:14');
\c -
:begin :noon
SELECT settled, trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(shortfall) AS shortfall FROM lease_track('stripe:14', :c_r1, 9);
SELECT settled, trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(shortfall) AS shortfall FROM lease_track('stripe:14', :c_r1, 9);
SELECT code FROM refusal(format($$ SELECT credit_lease.lease_track('stripe:14', %s, 8) $$, :c_r1));
SELECT settled, trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(shortfall) AS shortfall FROM lease_track('stripe:14', :d_r2, 2);
SELECT * FROM state('stripe:14');
-- late, and more than there is
SELECT reservation_id AS r3 FROM lease_check('stripe:14', 'stripe.call', 2, ttl => '1 minute') \gset
SET credit_lease.mock_now = '2030-01-01 12:05:00+00';
\c -
:begin
SET credit_lease.mock_now = '2030-01-01 12:05:00+00';
SELECT settled, trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(shortfall) AS shortfall FROM lease_track('stripe:14', :r3, 20);
SELECT * FROM state('stripe:14');
-- somebody passes without credit, and holds what there is
SELECT allowed, reason, error, trim_scale(amount) AS amount, reservation_id AS r4 FROM lease_check('stripe:14', 'stripe.any', 6, on_failure => 'open') \gset f_
\echo :f_allowed :f_reason :f_error :f_amount
SELECT * FROM state('stripe:14');
:noon

--
-- Holds that were there before the stripes, and after them
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:15', 'tokens', 9);
SELECT reservation_id AS r1 FROM lease_reserve('stripe:15', 'tokens', 2, '1 hour') \gset
SELECT reservation_id AS r2 FROM lease_reserve('stripe:15', 'tokens', 2, '1 minute') \gset
SELECT entry_id FROM lease_consume('stripe:15', 'tokens', 1) \gset
SELECT lease_stripe('stripe:15', 'tokens', 3);
SELECT * FROM state('stripe:15');
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(available) AS available FROM lease_settle('stripe:15', :r1, 1);
SELECT trim_scale(amount) AS amount FROM lease_refund('stripe:15', :entry_id);
SELECT reservation_id AS r3 FROM lease_reserve('stripe:15', 'tokens', 4, '1 minute') \gset
SELECT reservation_id AS r4 FROM lease_reserve('stripe:15', 'tokens', 1, '1 hour') \gset
SELECT * FROM state('stripe:15');
SELECT lease_stripe('stripe:15', 'tokens', 1);
SELECT shares('stripe:15');
SELECT * FROM state('stripe:15');
SELECT hold_expires_at FROM tranche WHERE account = 'stripe:15';
-- expired ones are found as ever
SET credit_lease.mock_now = '2030-01-01 12:01:00+00';
SELECT applied, trim_scale(available) AS available FROM lease_consume('stripe:15', 'tokens', 7);
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(available) AS available FROM lease_settle('stripe:15', :r4);
SELECT status FROM reservation WHERE account = 'stripe:15' ORDER BY reservation_id;
SELECT * FROM state('stripe:15');
:noon
-- a tranche of which nothing remains, but what is held
SELECT trim_scale(available) AS available FROM lease_topup('stripe:16', 'tokens', 6);
SELECT reservation_id AS r1 FROM lease_reserve('stripe:16', 'tokens', 6, '1 hour') \gset
SELECT lease_stripe('stripe:16', 'tokens', 3);
SELECT * FROM state('stripe:16');
SELECT lease_stripe('stripe:16', 'tokens', 2);
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded, trim_scale(available) AS available FROM lease_settle('stripe:16', :r1, 2);
SELECT * FROM state('stripe:16');
SELECT applied, trim_scale(available) AS available FROM lease_consume('stripe:16', 'tokens', 4);
SELECT lease_stripe('stripe:16', 'tokens', 1);
SELECT remaining, consumed, open FROM tranche WHERE account = 'stripe:16';
SELECT * FROM state('stripe:16');

--
-- Policies by hand
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:17', 'tokens', 10);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:17', 'images', 10);
INSERT INTO policy (account, credit, stripes) VALUES ('stripe:17', 'tokens', 2);
SELECT credit, stripes FROM striped_pool WHERE account = 'stripe:17';
UPDATE policy SET stripes = 3 WHERE account = 'stripe:17';
SELECT credit, stripes FROM striped_pool WHERE account = 'stripe:17';
UPDATE policy SET hold_ttl = '1 hour' WHERE account = 'stripe:17';
UPDATE policy SET credit = 'images' WHERE account = 'stripe:17';
SELECT credit, stripes FROM striped_pool WHERE account = 'stripe:17';
SELECT * FROM state('stripe:17');
DELETE FROM policy WHERE account = 'stripe:17';
SELECT credit, stripes FROM striped_pool WHERE account = 'stripe:17';
SELECT striped FROM account WHERE account = 'stripe:17';
SELECT * FROM state('stripe:17');
-- what stands for many is followed at the next top-up
INSERT INTO policy (account, stripes) VALUES ('stripe:17', 4);
SELECT credit, stripes FROM striped_pool WHERE account = 'stripe:17';
SELECT trim_scale(available) AS available FROM lease_topup('stripe:17', 'tokens', 1);
SELECT trim_scale(available) AS available FROM lease_adjust('stripe:17', 'images', 1, 'goodwill');
SELECT lease_install('stripe:17', 'leased', 'L1', 8, '2030-01-01 12:10:00+00');
SELECT credit, stripes FROM striped_pool WHERE account = 'stripe:17' ORDER BY credit;
SELECT shares('stripe:17');
-- one pool's own word goes before it
SELECT lease_stripe('stripe:17', 'images', 1);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:17', 'images', 1);
SELECT credit, stripes FROM striped_pool WHERE account = 'stripe:17' ORDER BY credit;
SELECT applied FROM lease_consume('stripe:17', 'images', 11);
SELECT applied FROM lease_consume('stripe:17', 'tokens', 11);
SELECT * FROM state('stripe:17');
DELETE FROM policy WHERE account = 'stripe:17';
SELECT credit, stripes FROM striped_pool WHERE account = 'stripe:17' ORDER BY credit;
SELECT * FROM state('stripe:17');
-- rolled back, it is as it was, for the session too
BEGIN;
SELECT lease_stripe('stripe:17', 'tokens', 2);
SELECT applied FROM lease_try_consume('stripe:17', 'tokens', 1);
ROLLBACK;
SELECT trim_scale(available) AS available FROM lease_topup('stripe:17', 'tokens', 5);
SELECT credit, stripes FROM striped_pool WHERE account = 'stripe:17' ORDER BY credit;
SELECT applied, trim_scale(available) AS available FROM lease_consume('stripe:17', 'tokens', 1);
BEGIN;
SELECT lease_stripe('stripe:17', 'tokens', 2);
SELECT applied FROM lease_consume('stripe:17', 'tokens', 3);
SELECT lease_stripe('stripe:17', 'tokens', 1);
SELECT applied FROM lease_consume('stripe:17', 'tokens', 1);
SELECT lease_stripe('stripe:17', 'tokens', 3);
SELECT * FROM state('stripe:17') WHERE credit = 'tokens';
ROLLBACK;
SELECT * FROM state('stripe:17') WHERE credit = 'tokens';
SELECT applied, trim_scale(available) AS available FROM lease_consume('stripe:17', 'tokens', 4);

--
-- What a session remembers of a pool is where to begin, and no more, also
-- when it has looked so often that it does not look again at once
--
SELECT trim_scale(available) AS available FROM (VALUES ('tokens'), ('images')) v (credit), LATERAL lease_topup('stripe:20', credit, 100000);
SELECT lease_stripe('stripe:20', credit, 4) FROM (VALUES ('tokens'), ('images')) v (credit);
SELECT applied FROM lease_consume('stripe:20', 'tokens', 1);
CREATE PROCEDURE test.look_often(account text, credit text) LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. 20 LOOP
		PERFORM credit_lease.lease_consume(look_often.account, look_often.credit, 0.1);
		COMMIT;
	END LOOP;
END
$$;
-- another tranche, and other stripes, while it remembers what the others have
DO $$
DECLARE
	before numeric;
BEGIN
	CALL look_often('stripe:20', 'tokens');
	before := (SELECT available FROM credit_lease.lease_consume('stripe:20', 'tokens', 1));
	PERFORM credit_lease.lease_topup('stripe:20', 'tokens', 100);
	IF (SELECT available FROM credit_lease.lease_consume('stripe:20', 'tokens', 1)) <> before + 99 THEN
		RAISE 'a tranche that came in was passed over';
	END IF;
	PERFORM credit_lease.lease_stripe('stripe:20', 'tokens', 3);
	IF (SELECT available FROM credit_lease.lease_consume('stripe:20', 'tokens', 1)) <> before + 98 THEN
		RAISE 'stripes that are no more were taken into account';
	END IF;
END
$$;
-- what others have is not remembered of a call that took of them, nor of one
-- whose transaction did, which may be rolled back
DO $$
DECLARE
	before numeric;
BEGIN
	CALL look_often('stripe:20', 'images');
	before := (SELECT available FROM credit_lease.lease_consume('stripe:20', 'images', 1));
	COMMIT;
	PERFORM credit_lease.lease_consume('stripe:20', 'images', 50000);
	COMMIT;
	IF (SELECT available FROM credit_lease.lease_consume('stripe:20', 'images', 1)) <> before - 50001 THEN
		RAISE 'what was gathered was counted twice';
	END IF;
	COMMIT;
	PERFORM credit_lease.lease_consume('stripe:20', 'images', 40000);
	PERFORM credit_lease.lease_consume('stripe:20', 'images', 1);
	ROLLBACK;
	IF (SELECT available FROM credit_lease.lease_consume('stripe:20', 'images', 1)) <> before - 50002 THEN
		RAISE 'what was rolled back was remembered';
	END IF;
	BEGIN
		PERFORM credit_lease.lease_consume('stripe:20', 'images', 40000);
		PERFORM credit_lease.lease_consume('stripe:20', 'images', 1);
		RAISE SQLSTATE 'P9999';
	EXCEPTION WHEN SQLSTATE 'P9999' THEN
	END;
	IF (SELECT available FROM credit_lease.lease_consume('stripe:20', 'images', 1)) <> before - 50003 THEN
		RAISE 'what was rolled back to a savepoint was remembered';
	END IF;
END
$$;
-- nor of another stripe: of its own no session has enough for the last call
SELECT trim_scale(available) AS available FROM lease_topup('stripe:20', 'other', 4000);
SELECT lease_stripe('stripe:20', 'other', 4);
DO $$
BEGIN
	CALL look_often('stripe:20', 'other');
	PERFORM credit_lease.lease_consume('stripe:20', 'other', 898);
	COMMIT;
	IF (SELECT available FROM credit_lease.lease_consume('stripe:20', 'other', 10)) <> 3090 THEN
		RAISE 'what others than another stripe had was remembered';
	END IF;
END
$$;
-- a pool that is not striped any more, in an account that is
SELECT lease_stripe('stripe:20', 'tokens', 1);
BEGIN;
SELECT applied FROM lease_consume('stripe:20', 'images', 1);
SELECT applied, trim_scale(available) AS available FROM lease_consume('stripe:20', 'tokens', 1);
COMMIT;
SELECT * FROM state('stripe:20');

--
-- What has ended is not spread, and what has expired covers whoever is short
--
SELECT lease_install('stripe:21', 'tokens', 'L', 5, '2030-01-01 12:10:00+00');
SELECT trim_scale(amount) AS amount FROM lease_reserve('stripe:21', 'tokens', 2, '2 hours');
SELECT lease_release('stripe:21', 'tokens');
SELECT trim_scale(available) AS available FROM lease_topup('stripe:21', 'tokens', 6, expires_at => '2030-01-01 12:05:00+00');
SELECT trim_scale(available) AS available FROM lease_topup('stripe:21', 'tokens', 8);
SET credit_lease.mock_now = '2030-01-01 12:05:00+00';
SELECT lease_stripe('stripe:21', 'tokens', 2);
SELECT shares('stripe:21');
SELECT trim_scale(amount) AS amount FROM lease_reserve('stripe:21', 'tokens', 4, '1 minute');
SELECT trim_scale(granted) AS granted FROM lease_chunk_allocate('stripe:21', 'tokens', 2, 'w', '1 minute');
SET credit_lease.mock_now = '2030-01-01 12:06:00+00';
SELECT allowed, reason, credit, trim_scale(amount) AS amount FROM lease_check('stripe:21', 'stripe.any', 5);
SELECT applied FROM lease_consume('stripe:21', 'tokens', 3);
SELECT * FROM state('stripe:21');
:noon

--
-- A call that goes on in a stripe that its transaction has locked looks no
-- further than it has to, and no less far
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:22', 'images', 8);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:22', 'tokens', 8, priority => 1);
SELECT trim_scale(available) AS available FROM lease_topup('stripe:22', 'tokens', 40, expires_at => '2030-01-01 14:00:00+00');
SELECT lease_install('stripe:22', 'tokens', 'L', 40, '2030-01-01 12:10:00+00');
SELECT lease_stripe('stripe:22', credit, 2) FROM (VALUES ('images'), ('tokens')) v (credit);
SELECT lease_extend('stripe:22', 'tokens', 'L', 40, '2030-01-01 15:00:00+00');
-- the second in burn order is the one that expires before the lease, whatever a stripe knows of that
BEGIN;
SELECT applied, trim_scale(available) AS available FROM lease_consume('stripe:22', 'tokens', 1);
SELECT applied, trim_scale(available) AS available FROM lease_consume('stripe:22', 'tokens', 8);
COMMIT;
SELECT tranches FROM state('stripe:22') WHERE credit = 'tokens';
-- a tranche expires within the transaction
SELECT trim_scale(available) AS available FROM lease_topup('stripe:22', 'images', 20, priority => 1, expires_at => '2030-01-01 12:30:00+00');
CALL look_often('stripe:22', 'images');
BEGIN;
SELECT applied, trim_scale(available) AS available FROM lease_consume('stripe:22', 'images', 1);
SET LOCAL credit_lease.mock_now = '2030-01-01 12:30:00+00';
SELECT applied, trim_scale(available) AS available FROM lease_consume('stripe:22', 'images', 1);
COMMIT;
SELECT * FROM state('stripe:22');
:noon

--
-- REPEATABLE READ, alone
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:18', 'tokens', 12);
SELECT lease_stripe('stripe:18', 'tokens', 4);
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT applied FROM lease_consume('stripe:18', 'tokens', 2);
SELECT reservation_id AS r1 FROM lease_reserve('stripe:18', 'tokens', 5, '1 hour') \gset
SELECT trim_scale(consumed) AS consumed, trim_scale(refunded) AS refunded FROM lease_settle('stripe:18', :r1, 6);
SELECT applied FROM lease_try_consume('stripe:18', 'tokens', 5);
SELECT applied FROM lease_consume('stripe:18', 'tokens', 4);
COMMIT;
SELECT * FROM state('stripe:18');

--
-- What somebody has done behind the functions' back (rule 3)
--
SELECT trim_scale(available) AS available FROM lease_topup('stripe:19', 'tokens', 40);
SELECT lease_stripe('stripe:19', 'tokens', 2);
SELECT reservation_id AS held FROM lease_reserve('stripe:19', 'tokens', 4, '1 hour') \gset
-- OWN is the stripe in which this session works.
SELECT applied FROM lease_consume('stripe:19', 'tokens', 1);
CREATE FUNCTION test.tampered(statement text) RETURNS TABLE (rule text, difference numeric, code text)
	LANGUAGE plpgsql AS $$
DECLARE
	findings jsonb;
	consumed text;
BEGIN
	BEGIN
		EXECUTE replace(replace(statement, 'OWN', 'account = ''stripe:19'' AND consumed > 0'), 'OTHER', 'account = ''stripe:19'' AND consumed = 0');
		SELECT jsonb_agg(DISTINCT jsonb_build_array(regexp_replace(v.rule, ' \d+ ', ' # '), v.found - v.expected)) INTO findings
		  FROM credit_lease.lease_verify('stripe:19') v;
		SELECT r.code INTO consumed FROM test.refusal('SELECT credit_lease.lease_consume(''stripe:19'', ''tokens'', 30)') r;
		RAISE SQLSTATE 'P9999';
	EXCEPTION WHEN SQLSTATE 'P9999' THEN
	END;
	RETURN QUERY SELECT f->>0, (f->>1)::numeric, consumed
				   FROM jsonb_array_elements(coalesce(findings, '[["nothing", 0]]')) f
				  ORDER BY (f->>0) COLLATE "C", 2;
END
$$;
SELECT v.change, v.stripe, t.* FROM (VALUES
	(1, 'remaining = remaining + 1'),
	(2, 'remaining = -1, granted = granted - remaining - 1'),
	(3, 'consumed = consumed - 1'),
	(4, $$granted = 'NaN', remaining = 'NaN'$$)
  ) c (n, change), LATERAL (VALUES (c.n, c.change, 'OTHER'), (c.n, c.change, 'OWN')) v (n, change, stripe),
  LATERAL tampered('UPDATE credit_lease.tranche_stripe SET ' || v.change || ' WHERE ' || v.stripe) t
 ORDER BY v.n, v.stripe, t.rule COLLATE "C";
-- What balances is not noticed by a call, but by lease_verify.
SELECT v.change, t.rule, t.difference FROM (VALUES
	(1, 'remaining = remaining + 1, granted = granted + 1'),
	(2, 'reserved = reserved + 1, consumed = consumed - 1'),
	(4, $$credit = 'images'$$),
	(5, 'tranche_id = 0'),
	(6, 'chunked = -1, remaining = remaining + 1'),
	(7, 'reserved = reserved - 9, remaining = remaining + 9'),
	(8, 'consumed = consumed - 9, remaining = remaining + 9'),
	(9, 'expired = -1, remaining = remaining + 1'),
	(10, 'returned = -1, remaining = remaining + 1'),
	(11, 'revoked = -1, remaining = remaining + 1')
  ) v (n, change), LATERAL tampered('UPDATE credit_lease.tranche_stripe SET ' || change || ' WHERE OWN') t
 ORDER BY v.n, t.rule COLLATE "C";
SELECT v.n, t.rule, t.difference FROM (VALUES
	(1, $$DELETE FROM credit_lease.tranche_stripe WHERE OWN$$),
	(2, $$INSERT INTO credit_lease.tranche_stripe (account, credit, stripe, tranche_id) VALUES ('stripe:19', 'tokens', 1, 0)$$),
	(3, $$UPDATE credit_lease.tranche SET striped = striped + 1 WHERE account = 'stripe:19'$$),
	(4, $$UPDATE credit_lease.tranche SET striped = striped + 1, granted = granted + 1 WHERE account = 'stripe:19'$$),
	(5, $$UPDATE credit_lease.tranche SET striped = -1, remaining = 41 WHERE account = 'stripe:19'$$),
	(6, $$UPDATE credit_lease.tranche SET open = false WHERE account = 'stripe:19'$$),
	(7, $$UPDATE credit_lease.tranche SET released_at = '2030-01-01' WHERE account = 'stripe:19'$$),
	(9, $$DELETE FROM credit_lease.stripe WHERE account = 'stripe:19' AND stripe = 1$$),
	(10, $$UPDATE credit_lease.stripe SET stripe = 3 WHERE account = 'stripe:19' AND stripe = 2$$),
	(11, $$UPDATE credit_lease.stripe SET frozen = true WHERE account = 'stripe:19' AND stripe = 1$$),
	(12, $$DELETE FROM credit_lease.striped_pool WHERE account = 'stripe:19'$$),
	(13, $$UPDATE credit_lease.striped_pool SET stripes = 3 WHERE account = 'stripe:19'$$),
	(14, $$UPDATE credit_lease.account SET striped = false WHERE account = 'stripe:19'$$)
  ) v (n, statement), LATERAL tampered(v.statement) t
 ORDER BY v.n, t.rule COLLATE "C";
-- Without anything to lock a call does not look for it for ever: the brake is
-- there in case it does.
SET statement_timeout = '3 s';
SELECT code FROM tampered($$DELETE FROM credit_lease.stripe WHERE account = 'stripe:19'$$) LIMIT 1;
RESET statement_timeout;
-- a session that does not know the pool counts them
\c -
:begin :noon
BEGIN;
DELETE FROM credit_lease.stripe WHERE account = 'stripe:19' AND stripe = 1;
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:19', 'tokens', 1) $$);
ROLLBACK;
-- A hold that says that it has more than was held does not give it back.
BEGIN;
UPDATE reservation SET amount = 5, tranche_amounts = ARRAY[5] WHERE account = 'stripe:19';
SELECT code FROM refusal(format($$ SELECT credit_lease.lease_cancel('stripe:19', %s) $$, :held));
ROLLBACK;
-- ... nor do several that say so together
BEGIN;
SELECT trim_scale(amount) AS amount FROM generate_series(2, 3) n, lease_reserve('stripe:19', 'tokens', n, '1 minute');
UPDATE reservation SET amount = 6, tranche_amounts = ARRAY[6] WHERE account = 'stripe:19' AND amount < 4;
SET LOCAL credit_lease.mock_now = '2030-01-01 12:30:00+00';
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:19', 'tokens', 36) $$);
ROLLBACK;
-- Nor does a call spend of a tranche that is not the sum of its rows.
BEGIN;
UPDATE tranche SET striped = striped + 1 WHERE account = 'stripe:19';
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:19', 'tokens', 30) $$);
ROLLBACK;
-- Nor does a call take of a row that something has changed which it set off itself.
CREATE FUNCTION test.meddle() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	UPDATE credit_lease.tranche_stripe SET granted = granted - 1, remaining = remaining - 1
	 WHERE account = 'stripe:19' AND (consumed = 0 OR TG_ARGV[0] = 'all');
	RETURN NEW;
END
$$;
BEGIN;
CREATE TRIGGER meddle BEFORE INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION test.meddle('other');
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:19', 'tokens', 30) $$);
ROLLBACK;
BEGIN;
CREATE TRIGGER meddle BEFORE INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION test.meddle('all');
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('stripe:19', 'tokens', 1) $$);
ROLLBACK;
DROP FUNCTION test.meddle;
SELECT * FROM state('stripe:19');

-- What one transaction does to stripes, it does not take for what it has done before.
SELECT available FROM (VALUES ('tokens'), ('images')) v (credit), lease_topup('stripe:40', v.credit, 100);
BEGIN;
SELECT lease_stripe('stripe:40', 'tokens', 4);
SELECT available FROM lease_consume('stripe:40', 'tokens', 1);
SELECT lease_stripe('stripe:40', 'tokens', 1), lease_stripe('stripe:40', 'images', 4);
SELECT available FROM lease_consume('stripe:40', 'tokens', 10);
COMMIT;
SELECT available FROM lease_consume('stripe:40', 'tokens', 80);
SELECT * FROM credit_lease.lease_verify('stripe:40');

-- A refund to several tranches that are closed, of which the first finds another policy.
DELETE FROM policy WHERE stripes IS NOT NULL;
INSERT INTO policy (credit, stripes) VALUES ('stripe.refund', 4);
SELECT available FROM generate_series(1, 3) n, lease_topup('stripe:41', 'stripe.refund', 5, priority => n);
SELECT entry_id AS spent FROM lease_consume('stripe:41', 'stripe.refund', 10) \gset
SELECT amount FROM lease_reserve('stripe:41', 'stripe.refund', 1, '1 minute');
SET credit_lease.mock_now = '2030-01-02 00:00:00+00';
SELECT credit_lease.lease_reclaim() > 0 AS reclaimed;
SELECT open, remaining, striped FROM tranche WHERE account = 'stripe:41' ORDER BY priority;
UPDATE policy SET stripes = 1 WHERE credit = 'stripe.refund';
SELECT amount, available FROM lease_refund('stripe:41', :spent);
SELECT open, remaining, striped FROM tranche WHERE account = 'stripe:41' ORDER BY priority;
SELECT available FROM lease_consume('stripe:41', 'stripe.refund', 15);
SELECT * FROM credit_lease.lease_verify('stripe:41');

DROP FUNCTION test.tampered;
DROP FUNCTION test.state;
DROP FUNCTION test.shares;
DROP PROCEDURE test.look_often;
DELETE FROM policy WHERE stripes IS NOT NULL;
DELETE FROM meter WHERE feature LIKE 'stripe.%';
SELECT * FROM credit_lease.lease_verify();
