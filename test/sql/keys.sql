--
-- Idempotency keys (rule 5): a key has at most one effect in its account, for
-- ever.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

SELECT available FROM lease_topup('keys:1', 'tokens', 1000);
SELECT available FROM lease_topup('keys:1', 'images', 1000);

--
-- The same key with the same arguments: the first result again.
--
SELECT * FROM lease_topup('keys:1', 'tokens', 100, 'topup', '2031-01-01', 50, '{"a": 1, "b": [2]}') \gset topup_
SELECT * FROM lease_consume('keys:1', 'tokens', 10, 'consume', '{"a": 1}') \gset consume_
SELECT * FROM lease_reserve('keys:1', 'tokens', 10, '1 hour', 'reserve', 5, '{"a": 1}') \gset reserve_
SELECT * FROM lease_adjust('keys:1', 'tokens', 10, 'goodwill', 'adjust', '{"a": 1}') \gset adjust_
SELECT * FROM lease_refund('keys:1', :consume_entry_id, 4, 'slow answer', 'refund') \gset refund_

SELECT amount, available, replayed, (entry_id, tranche_id) = (:topup_entry_id, :topup_tranche_id) AS same_ids
  FROM lease_topup('keys:1', 'tokens', 100, 'topup', '2031-01-01', 50, '{"a": 1, "b": [2]}');
SELECT applied, amount, available, replayed, entry_id = :consume_entry_id AS same_id
  FROM lease_consume('keys:1', 'tokens', 10, 'consume', '{"a": 1}');
SELECT applied, amount, available, expires_at, replayed, reservation_id = :reserve_reservation_id AS same_id
  FROM lease_reserve('keys:1', 'tokens', 10, '1 hour', 'reserve', 5, '{"a": 1}');
SELECT amount, available, replayed, entry_id = :adjust_entry_id AS same_id
  FROM lease_adjust('keys:1', 'tokens', 10, 'goodwill', 'adjust', '{"a": 1}');
SELECT amount, available, replayed, entry_id = :refund_entry_id AS same_id
  FROM lease_refund('keys:1', :consume_entry_id, 4, 'slow answer', 'refund');

-- Nothing is written for a replay. Values are compared, not how they are
-- written; and the twin of a function is the same function.
SELECT call, changed_by('SELECT ' || call) FROM (VALUES
	($$ lease_topup('keys:1', 'tokens', 100.00, 'topup', '2030-12-31 16:00:00-08', 50, '{"b": [2.0], "a": 1}') $$),
	($$ lease_consume('keys:1', 'tokens', 10.0, 'consume', '{"a": 1.0}') $$),
	($$ lease_try_consume('keys:1', 'tokens', 10, 'consume', '{"a": 1}') $$),
	($$ lease_reserve('keys:1', 'tokens', 10.0, '60 minutes', 'reserve', 5.0, '{"a": 1}') $$),
	($$ lease_try_reserve('keys:1', 'tokens', 10, '3600 seconds', 'reserve', 5, '{"a": 1}') $$),
	($$ lease_adjust('keys:1', 'tokens', 10.0, 'goodwill', 'adjust', '{"a": 1}') $$)
  ) c (call);
SELECT changed_by(format($$ SELECT lease_refund('keys:1', %s, 4.0, 'slow answer', 'refund') $$, :consume_entry_id));

-- A call that spanned tranches replays as a whole.
SELECT available FROM lease_topup('keys:2', 'tokens', 10);
SELECT available FROM lease_topup('keys:2', 'tokens', 20);
SELECT available FROM lease_topup('keys:2', 'tokens', 30);
SELECT amount, available, replayed FROM lease_consume('keys:2', 'tokens', 35, 'wide');
SELECT available FROM lease_topup('keys:2', 'tokens', 5);
SELECT amount, available, replayed FROM lease_consume('keys:2', 'tokens', 35, 'wide');
SELECT amount, available, replayed FROM lease_adjust('keys:2', 'tokens', -27, 'paid twice', 'wide down');
SELECT amount, available, replayed FROM lease_adjust('keys:2', 'tokens', -27, 'paid twice', 'wide down');
SELECT entry_id FROM lease_consume('keys:2', 'tokens', 35, 'wide') \gset
SELECT amount, available, replayed FROM lease_refund('keys:2', :entry_id, 27, idempotency_key => 'wide back');
SELECT amount, available, replayed FROM lease_refund('keys:2', :entry_id, 27, idempotency_key => 'wide back');

-- So does a hold of less than was asked for: its amount is what was held.
SELECT available FROM lease_topup('keys:3', 'tokens', 7);
SELECT applied, amount, available, replayed FROM lease_reserve('keys:3', 'tokens', 10, '1 hour', 'some', 5);
SELECT available FROM lease_topup('keys:3', 'tokens', 7);
SELECT applied, amount, available, replayed FROM lease_reserve('keys:3', 'tokens', 10, '1 hour', 'some', 5);

-- A replay needs no credit.
SELECT available FROM lease_topup('keys:4', 'tokens', 10);
SELECT applied, amount, available, replayed FROM lease_consume('keys:4', 'tokens', 10, 'all of it');
SELECT applied, amount, available, replayed FROM lease_consume('keys:4', 'tokens', 10, 'all of it');
SELECT applied, amount, available, replayed FROM lease_try_consume('keys:4', 'tokens', 10, 'all of it');

-- A top-up that has expired meanwhile is answered like any other.
SELECT amount, available, replayed FROM lease_topup('keys:5', 'tokens', 10, 'short', '2030-01-02');
SET credit_lease.mock_now = '2030-01-02';
SELECT amount, available, replayed FROM lease_topup('keys:5', 'tokens', 10, 'short', '2030-01-02');
SELECT available FROM lease_balance('keys:5');
SET credit_lease.mock_now = '2030-01-01';

--
-- The same key with other arguments is LC002: never retried, and never
-- applied. DETAIL names the difference, for every single argument.
--
SELECT * FROM refused($$ SELECT lease_consume('keys:1', 'tokens', 11, 'consume', '{"a": 1}') $$);

SELECT c.call, r.code, r.detail FROM (VALUES
	($$ lease_topup('keys:1', 'images', 100, 'topup', '2031-01-01', 50, '{"a": 1, "b": [2]}') $$),
	($$ lease_topup('keys:1', 'tokens', 101, 'topup', '2031-01-01', 50, '{"a": 1, "b": [2]}') $$),
	($$ lease_topup('keys:1', 'tokens', 100, 'topup', '2031-01-02', 50, '{"a": 1, "b": [2]}') $$),
	($$ lease_topup('keys:1', 'tokens', 100, 'topup', NULL, 50, '{"a": 1, "b": [2]}') $$),
	($$ lease_topup('keys:1', 'tokens', 100, 'topup', '2031-01-01', 51, '{"a": 1, "b": [2]}') $$),
	($$ lease_topup('keys:1', 'tokens', 100, 'topup', '2031-01-01', 50, '{"a": 1, "b": [3]}') $$),
	($$ lease_topup('keys:1', 'tokens', 100, 'topup', '2031-01-01', 50, '{"a": 1}') $$),
	($$ lease_topup('keys:1', 'tokens', 100, 'topup', '2031-01-01', 50, 'null') $$),
	($$ lease_topup('keys:1', 'tokens', 100, 'topup', '2031-01-01', 50) $$),
	($$ lease_topup('keys:1', 'tokens', 10, 'consume', metadata => '{"a": 1}') $$),
	($$ lease_topup('keys:1', 'tokens', 10, 'reserve', metadata => '{"a": 1}') $$),
	($$ lease_topup('keys:1', 'tokens', 10, 'adjust', metadata => '{"a": 1}') $$),
	($$ lease_topup('keys:1', 'tokens', 4, 'refund') $$)
  ) c (call), LATERAL refusal('SELECT ' || c.call) r;

SELECT c.call, r.code, r.detail FROM (VALUES
	($$ lease_consume('keys:1', 'images', 10, 'consume', '{"a": 1}') $$),
	($$ lease_consume('keys:1', 'tokens', 11, 'consume', '{"a": 1}') $$),
	($$ lease_consume('keys:1', 'tokens', 10, 'consume', '{"a": 2}') $$),
	($$ lease_consume('keys:1', 'tokens', 10, 'consume') $$),
	($$ lease_consume('keys:1', 'tokens', 100, 'topup', '{"a": 1, "b": [2]}') $$),
	($$ lease_consume('keys:1', 'tokens', 10, 'reserve', '{"a": 1}') $$),
	($$ lease_consume('keys:1', 'tokens', 10, 'adjust', '{"a": 1}') $$),
	($$ lease_consume('keys:1', 'tokens', 4, 'refund') $$),
	($$ lease_try_consume('keys:1', 'tokens', 11, 'consume', '{"a": 1}') $$),
	($$ lease_try_consume('keys:1', 'tokens', 10, 'adjust', '{"a": 1}') $$)
  ) c (call), LATERAL refusal('SELECT ' || c.call) r;

SELECT c.call, r.code, r.detail FROM (VALUES
	($$ lease_reserve('keys:1', 'images', 10, '1 hour', 'reserve', 5, '{"a": 1}') $$),
	($$ lease_reserve('keys:1', 'tokens', 11, '1 hour', 'reserve', 5, '{"a": 1}') $$),
	($$ lease_reserve('keys:1', 'tokens', 10, '2 hours', 'reserve', 5, '{"a": 1}') $$),
	($$ lease_reserve('keys:1', 'tokens', 10, NULL, 'reserve', 5, '{"a": 1}') $$),
	($$ lease_reserve('keys:1', 'tokens', 10, '1 hour', 'reserve', 6, '{"a": 1}') $$),
	($$ lease_reserve('keys:1', 'tokens', 10, '1 hour', 'reserve', NULL, '{"a": 1}') $$),
	($$ lease_reserve('keys:1', 'tokens', 10, '1 hour', 'reserve', 5, '{"a": 2}') $$),
	($$ lease_reserve('keys:1', 'tokens', 10, '1 hour', 'reserve', 5) $$),
	($$ lease_reserve('keys:1', 'tokens', 100, NULL, 'topup', metadata => '{"a": 1, "b": [2]}') $$),
	($$ lease_reserve('keys:1', 'tokens', 10, NULL, 'consume', metadata => '{"a": 1}') $$),
	($$ lease_reserve('keys:1', 'tokens', 10, NULL, 'adjust', metadata => '{"a": 1}') $$),
	($$ lease_reserve('keys:1', 'tokens', 4, NULL, 'refund') $$),
	($$ lease_try_reserve('keys:1', 'tokens', 11, '1 hour', 'reserve', 5, '{"a": 1}') $$),
	($$ lease_try_reserve('keys:1', 'tokens', 10, NULL, 'adjust', metadata => '{"a": 1}') $$)
  ) c (call), LATERAL refusal('SELECT ' || c.call) r;

SELECT c.call, r.code, r.detail FROM (VALUES
	($$ lease_adjust('keys:1', 'images', 10, 'goodwill', 'adjust', '{"a": 1}') $$),
	($$ lease_adjust('keys:1', 'tokens', 11, 'goodwill', 'adjust', '{"a": 1}') $$),
	($$ lease_adjust('keys:1', 'tokens', -10, 'goodwill', 'adjust', '{"a": 1}') $$),
	($$ lease_adjust('keys:1', 'tokens', 10, 'bad will', 'adjust', '{"a": 1}') $$),
	($$ lease_adjust('keys:1', 'tokens', 10, 'goodwill', 'adjust', '{"a": 2}') $$),
	($$ lease_adjust('keys:1', 'tokens', 10, 'goodwill', 'adjust') $$),
	($$ lease_adjust('keys:1', 'tokens', 100, 'goodwill', 'topup', '{"a": 1, "b": [2]}') $$),
	($$ lease_adjust('keys:1', 'tokens', 10, 'goodwill', 'consume', '{"a": 1}') $$),
	($$ lease_adjust('keys:1', 'tokens', 10, 'goodwill', 'reserve', '{"a": 1}') $$),
	($$ lease_adjust('keys:1', 'tokens', 4, 'slow answer', 'refund') $$)
  ) c (call), LATERAL refusal('SELECT ' || c.call) r;

SELECT entry_id AS other_id FROM lease_consume('keys:1', 'tokens', 10) \gset
SELECT c.call, r.code, r.detail FROM (VALUES
	($$ lease_refund('keys:1', OTHER, 4, 'slow answer', 'refund') $$),
	($$ lease_refund('keys:1', ENTRY, 5, 'slow answer', 'refund') $$),
	($$ lease_refund('keys:1', ENTRY, NULL, 'slow answer', 'refund') $$),
	($$ lease_refund('keys:1', ENTRY, 4, 'no answer', 'refund') $$),
	($$ lease_refund('keys:1', ENTRY, 4, NULL, 'refund') $$),
	($$ lease_refund('keys:1', ENTRY, 4, 'slow answer', 'topup') $$),
	($$ lease_refund('keys:1', ENTRY, 4, 'slow answer', 'consume') $$),
	($$ lease_refund('keys:1', ENTRY, 4, 'slow answer', 'reserve') $$),
	($$ lease_refund('keys:1', ENTRY, 4, 'slow answer', 'adjust') $$)
  ) c (call), LATERAL refusal('SELECT ' || replace(replace(c.call, 'OTHER', :'other_id'), 'ENTRY', :'consume_entry_id')) r;

-- It is LC002 even where the other request could not be met for want of credit.
SELECT c.call, r.code, r.detail FROM (VALUES
	($$ lease_consume('keys:1', 'tokens', 1000000, 'consume', '{"a": 1}') $$),
	($$ lease_try_consume('keys:1', 'tokens', 1000000, 'consume', '{"a": 1}') $$),
	($$ lease_reserve('keys:1', 'tokens', 1000000, '1 hour', 'reserve', 5, '{"a": 1}') $$),
	($$ lease_try_reserve('keys:1', 'nothing', 10, '1 hour', 'reserve', 5, '{"a": 1}') $$),
	($$ lease_adjust('keys:1', 'tokens', -1000000, 'goodwill', 'adjust', '{"a": 1}') $$)
  ) c (call), LATERAL refusal('SELECT ' || c.call) r;

--
-- A key belongs to its account; and is compared byte by byte.
--
SELECT available FROM lease_topup('keys:6', 'tokens', 10, 'topup');
SELECT applied, available, replayed FROM lease_consume('keys:6', 'tokens', 1, 'consume');
SELECT applied, available, replayed FROM lease_consume('keys:6', 'tokens', 1, 'Consume');
SELECT applied, available, replayed FROM lease_consume('keys:6', 'tokens', 1, 'consume ');

-- Without a key every call has its effect.
SELECT applied, available, replayed FROM lease_consume('keys:6', 'tokens', 1);
SELECT applied, available, replayed FROM lease_consume('keys:6', 'tokens', 1);

--
-- A refusal is not remembered: a retry after a top-up succeeds.
--
SELECT * FROM refused($$ SELECT lease_consume('keys:7', 'tokens', 5, 'retry-1') $$);
SELECT applied, available, replayed FROM lease_try_consume('keys:7', 'tokens', 5, 'retry-2');
SELECT * FROM refused($$ SELECT lease_reserve('keys:7', 'tokens', 5, NULL, 'retry-3') $$);
SELECT applied, available, replayed FROM lease_try_reserve('keys:7', 'tokens', 5, NULL, 'retry-4');
SELECT * FROM refused($$ SELECT lease_adjust('keys:7', 'tokens', -5, 'paid twice', 'retry-5') $$);
SELECT available FROM lease_topup('keys:7', 'tokens', 25);
SELECT applied, available, replayed FROM lease_consume('keys:7', 'tokens', 5, 'retry-1');
SELECT applied, available, replayed FROM lease_try_consume('keys:7', 'tokens', 5, 'retry-2');
SELECT applied, available, replayed FROM lease_reserve('keys:7', 'tokens', 5, NULL, 'retry-3');
SELECT applied, available, replayed FROM lease_try_reserve('keys:7', 'tokens', 5, NULL, 'retry-4');
SELECT amount, available, replayed FROM lease_adjust('keys:7', 'tokens', -5, 'paid twice', 'retry-5');

-- Neither is what was rolled back.
BEGIN;
SELECT available FROM lease_topup('keys:7', 'tokens', 10, 'undone');
SAVEPOINT s;
SELECT applied, available, replayed FROM lease_consume('keys:7', 'tokens', 10, 'undone too');
ROLLBACK TO s;
SELECT applied, available, replayed FROM lease_consume('keys:7', 'tokens', 9, 'undone too');
SELECT applied, available, replayed FROM lease_consume('keys:7', 'tokens', 9, 'undone too');
ROLLBACK;
SELECT available, replayed FROM lease_topup('keys:7', 'tokens', 11, 'undone');

--
-- Replaying what made a hold that has ended holds nothing any more, and says
-- so: LC005 when it was settled or cancelled, LC004 when it expired.
--
SELECT available FROM lease_topup('keys:8', 'tokens', 40);
SELECT reservation_id FROM lease_reserve('keys:8', 'tokens', 10, '1 hour', 'to be settled') \gset
SELECT consumed FROM lease_settle('keys:8', :reservation_id, 5);
SELECT * FROM refused($$ SELECT lease_reserve('keys:8', 'tokens', 10, '1 hour', 'to be settled') $$);
SELECT code, message FROM refusal($$ SELECT lease_try_reserve('keys:8', 'tokens', 10, '1 hour', 'to be settled') $$);
SELECT reservation_id FROM lease_reserve('keys:8', 'tokens', 10, '1 hour', 'to be cancelled') \gset
SELECT lease_cancel('keys:8', :reservation_id);
SELECT * FROM refused($$ SELECT lease_reserve('keys:8', 'tokens', 10, '1 hour', 'to be cancelled') $$);
SELECT code, message FROM refusal($$ SELECT lease_try_reserve('keys:8', 'tokens', 10, '1 hour', 'to be cancelled') $$);
SELECT reservation_id FROM lease_reserve('keys:8', 'tokens', 10, '1 minute', 'to expire') \gset
SET credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT * FROM refused($$ SELECT lease_reserve('keys:8', 'tokens', 10, '1 minute', 'to expire') $$);
SELECT code, message FROM refusal($$ SELECT lease_try_reserve('keys:8', 'tokens', 10, '1 minute', 'to expire') $$);
SELECT lease_reclaim() >= 1 AS swept;
SELECT * FROM refused($$ SELECT lease_reserve('keys:8', 'tokens', 10, '1 minute', 'to expire') $$);
-- another request is still another request
SELECT code, detail FROM refusal($$ SELECT lease_reserve('keys:8', 'tokens', 11, '1 minute', 'to expire') $$);
SET credit_lease.mock_now = '2030-01-01';

-- While it is held it is replayed, with the amount of the first result; also
-- when it has been renewed.
SELECT reservation_id FROM lease_reserve('keys:8', 'tokens', 10, '1 hour', 'renewed') \gset
SELECT amount, expires_at FROM lease_renew('keys:8', :reservation_id, '2 hours', 3);
SELECT applied, amount, available, replayed, reservation_id = :reservation_id AS same_id
  FROM lease_reserve('keys:8', 'tokens', 10, '1 hour', 'renewed');

-- One row of the ledger for each key.
SELECT count(*) = count(DISTINCT (account, idempotency_key)) AS one_each
  FROM ledger WHERE account LIKE 'keys:%' AND idempotency_key IS NOT NULL;

SELECT * FROM credit_lease.lease_verify();
