--
-- lease_reserve and lease_try_reserve: credit that is held until it is
-- settled, cancelled or expires.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

SELECT available FROM lease_topup('reserve:1', 'tokens', 100);

-- A hold takes credit out of what is available, and nothing is spent.
SELECT applied, amount, available, expires_at, replayed
  FROM lease_reserve('reserve:1', 'tokens', 30, '10 minutes', metadata => '{"job": 1}');
SELECT available, reserved, consumed FROM lease_balance('reserve:1');
SELECT credit, amount, created_at, expires_at, metadata FROM open_reservation WHERE account = 'reserve:1';

-- The number it returns is the reservation's, and stands in the ledger.
SELECT reservation_id FROM lease_reserve('reserve:1', 'tokens', 5, '10 minutes') \gset
SELECT kind, amount, available FROM ledger WHERE account = 'reserve:1' AND reservation_id = :reservation_id;
SELECT amount FROM open_reservation WHERE account = 'reserve:1' AND reservation_id = :reservation_id;

-- What is held cannot be spent or held again.
SELECT * FROM refused($$ SELECT lease_consume('reserve:1', 'tokens', 66) $$);
SELECT * FROM refused($$ SELECT lease_reserve('reserve:1', 'tokens', 66) $$);

-- The twin answers instead, and changes nothing (rule 6).
SELECT applied, reservation_id, amount, available, expires_at, replayed FROM lease_try_reserve('reserve:1', 'tokens', 66);
SELECT changed_by($$ SELECT lease_try_reserve('reserve:1', 'tokens', 66, '1 hour', 'too-much') $$);

-- With min_amount a hold is as much as there is between the two.
SELECT applied, amount, available FROM lease_reserve('reserve:1', 'tokens', 40, min_amount => 10);
SELECT applied, amount, available FROM lease_reserve('reserve:1', 'tokens', 40, min_amount => 10);
SELECT * FROM refused($$ SELECT lease_reserve('reserve:1', 'tokens', 40, min_amount => 10) $$);
SELECT applied, amount, available FROM lease_try_reserve('reserve:1', 'tokens', 40, min_amount => 10);
SELECT available FROM lease_topup('reserve:1', 'tokens', 10);
SELECT applied, amount, available FROM lease_try_reserve('reserve:1', 'tokens', 40, min_amount => 10);

-- A hold may span tranches (rule 10); it remembers how much came from which.
SELECT available FROM lease_topup('reserve:2', 'tokens', 10);
SELECT available FROM lease_topup('reserve:2', 'tokens', 20);
SELECT reservation_id FROM lease_reserve('reserve:2', 'tokens', 25, '1 hour', 'wide') \gset
SELECT l.kind, l.amount, l.available, l.idempotency_key, t.granted, t.reserved, t.remaining
  FROM ledger l JOIN tranche t USING (account, credit, tranche_id)
 WHERE l.account = 'reserve:2' AND l.reservation_id = :reservation_id ORDER BY l.entry_id;

-- How long a hold lives: what the call says; or else what a policy says for
-- the account and the credit, for the account, for the credit, for all; or
-- else 60 seconds.
SELECT available FROM lease_topup('reserve:3', 'tokens', 100);
SELECT expires_at FROM lease_reserve('reserve:3', 'tokens', 1);
BEGIN;
INSERT INTO policy (account, credit, hold_ttl) VALUES (NULL, NULL, '2 minutes');
SELECT expires_at FROM lease_reserve('reserve:3', 'tokens', 1);
INSERT INTO policy (account, credit, hold_ttl) VALUES (NULL, 'tokens', '3 minutes'), (NULL, 'images', '9 minutes');
SELECT expires_at FROM lease_reserve('reserve:3', 'tokens', 1);
INSERT INTO policy (account, credit, hold_ttl) VALUES ('reserve:3', NULL, '4 minutes'), ('reserve:4', NULL, '9 minutes');
SELECT expires_at FROM lease_reserve('reserve:3', 'tokens', 1);
INSERT INTO policy (account, credit, hold_ttl) VALUES ('reserve:3', 'tokens', '5 minutes'), ('reserve:3', 'images', '9 minutes');
SELECT expires_at FROM lease_reserve('reserve:3', 'tokens', 1);
SELECT expires_at FROM lease_reserve('reserve:3', 'tokens', 1, '1 second');
-- a row without a value leaves it to the next one
UPDATE policy SET hold_ttl = NULL WHERE account = 'reserve:3' AND credit = 'tokens';
SELECT expires_at FROM lease_reserve('reserve:3', 'tokens', 1);
ROLLBACK;

-- A policy cannot make holds that are over before they begin, nor speak twice
-- of the same pools.
SELECT code, message FROM refusal($$ INSERT INTO policy (hold_ttl) VALUES ('0') $$);
SELECT code, message FROM refusal($$ INSERT INTO policy (hold_ttl) VALUES ('-1 minute') $$);
SELECT code, message FROM refusal($$
	INSERT INTO policy (credit, hold_ttl) VALUES ('tokens', '1 minute'), ('tokens', '2 minutes') $$);

SELECT * FROM credit_lease.lease_verify();
