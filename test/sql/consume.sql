--
-- lease_consume and lease_try_consume: credit that is spent at once.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

SELECT available FROM lease_topup('consume:1', 'tokens', 100);
SELECT applied, amount, available, replayed FROM lease_consume('consume:1', 'tokens', 30);
SELECT applied, amount, available, replayed
  FROM lease_try_consume('consume:1', 'tokens', 1, 'call-2', '{"model": "small"}');

-- The ledger row is the one that the call returns.
SELECT entry_id FROM lease_consume('consume:1', 'tokens', 9) \gset
SELECT kind, credit, amount, available, reservation_id, metadata, created_at
  FROM ledger WHERE account = 'consume:1' AND entry_id = :entry_id;

-- The plain verb raises when there is not enough, so that a forgotten check
-- never gives service away.
SELECT * FROM refused($$ SELECT lease_consume('consume:1', 'tokens', 61) $$);

-- DETAIL and HINT tell what is missing from what is only held.
SELECT amount FROM lease_reserve('consume:1', 'tokens', 20, '1 hour');
SELECT * FROM refused($$ SELECT lease_consume('consume:1', 'tokens', 41) $$);

-- Its twin answers instead, and changes nothing (rule 6).
SELECT applied, entry_id, amount, available, replayed FROM lease_try_consume('consume:1', 'tokens', 41);
SELECT changed_by($$ SELECT lease_try_consume('consume:1', 'tokens', 41, 'too-much') $$);

-- Where there has never been any credit, there is not enough.
SELECT * FROM refused($$ SELECT lease_consume('consume:nobody', 'tokens', 1) $$);
SELECT applied, available FROM lease_try_consume('consume:nobody', 'tokens', 1);
SELECT applied, available FROM lease_try_consume('consume:1', 'images', 1);

-- To the last of it and no further: available is never below zero (rule 1).
SELECT applied, available FROM lease_consume('consume:1', 'tokens', 40);
SELECT * FROM refused($$ SELECT lease_consume('consume:1', 'tokens', 0.000000000001) $$);
SELECT available, reserved, consumed, granted FROM lease_balance('consume:1');

-- A spend may span tranches (rule 10). Each has a row in the ledger, with its
-- part of the amount; all show what the pool had after the call, and the first
-- has the key.
SELECT available FROM lease_topup('consume:2', 'tokens', 10);
SELECT available FROM lease_topup('consume:2', 'tokens', 20);
SELECT available FROM lease_topup('consume:2', 'tokens', 30);
SELECT entry_id, amount, available FROM lease_consume('consume:2', 'tokens', 35, 'wide', '{"n": 1}') \gset
SELECT :amount AS amount, :available AS available;
SELECT l.kind, l.amount, l.available, l.idempotency_key, l.metadata,
	   l.entry_id = :entry_id AS is_first, t.granted, t.consumed, t.remaining
  FROM ledger l JOIN tranche t USING (account, credit, tranche_id)
 WHERE l.account = 'consume:2' AND l.kind = 'consume' ORDER BY l.entry_id;

-- Several calls in one transaction see each other.
BEGIN;
SELECT available FROM lease_topup('consume:3', 'tokens', 5);
SELECT available FROM lease_consume('consume:3', 'tokens', 3);
SELECT applied, available FROM lease_try_consume('consume:3', 'tokens', 3);
SELECT available FROM lease_consume('consume:3', 'tokens', 2);
COMMIT;

-- And so do several in one statement.
SELECT available FROM lease_topup('consume:4', 'tokens', 5);
SELECT n, c.applied, c.available
  FROM generate_series(1, 4) n, LATERAL lease_try_consume('consume:4', 'tokens', n) c;

SELECT * FROM credit_lease.lease_verify();
