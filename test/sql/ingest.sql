--
-- lease_ingest: usage in bulk.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

SELECT available FROM lease_topup('ingest:1', 'tokens', 100);
SELECT available FROM lease_topup('ingest:1', 'images', 10);
SELECT available FROM lease_topup('ingest:2', 'tokens', 50);

-- A row for each event, in their order, whatever their accounts; available is
-- what the pool has after the event.
SELECT * FROM lease_ingest(
	ARRAY['ingest:2', 'ingest:1', 'ingest:1', 'ingest:2', 'ingest:1'],
	ARRAY['tokens', 'tokens', 'images', 'tokens', 'tokens'],
	ARRAY[5, 10, 1, 2.5, 20],
	ARRAY['a', 'a', 'b', NULL, 'c'],
	ARRAY['{"n": 1}', NULL, NULL, NULL, '{"n": 5}']::jsonb[]);
SELECT kind, account, credit, amount, available, idempotency_key, request, metadata, created_at, created_by = session_user AS ours
  FROM ledger WHERE account LIKE 'ingest:%' AND kind <> 'topup' ORDER BY entry_id;
SELECT account, credit, available, consumed FROM balance WHERE account LIKE 'ingest:%' ORDER BY account, credit;
SELECT account, credit, consumed, calls FROM usage_by_day WHERE account LIKE 'ingest:%' ORDER BY account, credit;

-- The same as jsonb, whose members may have any order; key is short for
-- idempotency_key. The time of an event goes into the metadata, in UTC.
SELECT * FROM lease_ingest('[
	{"account": "ingest:1", "credit": "tokens", "amount": 1, "idempotency_key": "j1", "time": "2029-12-31T23:00:00+01:00", "metadata": {"n": 1}},
	{"key": "j2", "amount": 1.50, "credit": "tokens", "account": "ingest:1"},
	{"account": "ingest:1", "credit": "tokens", "amount": 2, "key": null, "metadata": null, "time": "2030-01-01 00:00:00Z"},
	{"account": "ingest:1", "credit": "tokens", "amount": 3, "metadata": [1]}]');
SELECT amount, idempotency_key, metadata, created_at FROM ledger WHERE account = 'ingest:1' AND kind = 'consume' ORDER BY entry_id DESC LIMIT 4;

-- No events, no rows.
SELECT * FROM lease_ingest('[]');
SELECT * FROM lease_ingest('{}', '{}', '{}');

-- What came before is marked and not charged, in the batch and in the past,
-- also where there is too little by now.
SELECT * FROM lease_ingest(
	ARRAY['ingest:2', 'ingest:1', 'ingest:1', 'ingest:1', 'ingest:1', 'ingest:1'],
	ARRAY['tokens', 'tokens', 'tokens', 'tokens', 'tokens', 'tokens'],
	ARRAY[5, 10.00, 7, 7, 7, 1],
	ARRAY['a', 'a', 'd', 'd', 'd', 'e'],
	ARRAY['{"n": 1}', NULL, NULL, NULL, NULL, NULL]::jsonb[]);
SELECT * FROM lease_ingest('[{"account": "ingest:1", "credit": "tokens", "amount": 1, "key": "j1", "time": "2029-12-31T22:00:00Z", "metadata": {"n": 1.0}}]');
BEGIN;
SELECT applied FROM lease_consume('ingest:1', 'tokens', 53.5);
SELECT * FROM lease_ingest(ARRAY['ingest:1', 'ingest:1'], ARRAY['tokens', 'tokens'], ARRAY[7, 7], ARRAY['d', 'f']);
SELECT * FROM lease_ingest(ARRAY['ingest:1', 'ingest:1'], ARRAY['tokens', 'tokens'], ARRAY[7, 7], ARRAY['d', 'f'], on_short => 'charge');
ROLLBACK;

-- A key stands for one request: in any other way it is a conflict, which does
-- not spoil the rest. Amount, credit, metadata and what is charged for differ:
SELECT * FROM lease_ingest('[
	{"account": "ingest:1", "credit": "tokens", "amount": 8, "key": "d"},
	{"account": "ingest:1", "credit": "images", "amount": 7, "key": "d"},
	{"account": "ingest:1", "credit": "tokens", "amount": 7, "key": "d", "metadata": {}},
	{"account": "ingest:1", "credit": "tokens", "amount": 1, "key": "g"},
	{"account": "ingest:1", "credit": "tokens", "amount": 2, "key": "g"},
	{"account": "ingest:1", "credit": "tokens", "amount": 1, "key": "g"}]');

-- A refusal is not remembered: neither a later event of the batch with the key
-- is a duplicate, nor the same event after a top-up.
SELECT * FROM lease_ingest(ARRAY['ingest:3', 'ingest:2', 'ingest:2', 'ingest:2'], ARRAY['tokens', 'tokens', 'tokens', 'none'],
						   ARRAY[1, 1000, 2, 1], ARRAY['h', 'h', 'h', 'i']);
SELECT changed_by($$ SELECT lease_ingest(ARRAY['ingest:2', 'ingest:3'], ARRAY['tokens', 'tokens'], ARRAY[1000, 1], ARRAY['k', 'k']) $$);
SELECT available FROM lease_topup('ingest:3', 'tokens', 10);
SELECT * FROM lease_ingest(ARRAY['ingest:3'], ARRAY['tokens'], ARRAY[1], ARRAY['h']);

-- Keys are the same as lease_consume's.
SELECT applied, replayed, available FROM lease_consume('ingest:3', 'tokens', 1, 'h');
SELECT * FROM refused($$ SELECT lease_consume('ingest:3', 'tokens', 2, 'h') $$);
SELECT applied FROM lease_consume('ingest:3', 'tokens', 2, 'consumed', '{"a": 1}');
SELECT reservation_id FROM lease_reserve('ingest:3', 'tokens', 2, NULL, 'held') \gset
SELECT chunk_id FROM lease_chunk_allocate('ingest:3', 'tokens', 2, 'me', NULL, 'carved') \gset
SELECT applied FROM lease_chunk_consume('ingest:3', :chunk_id, 1, 'me', 'of a chunk');
SELECT * FROM lease_ingest('[
	{"account": "ingest:3", "credit": "tokens", "amount": 2, "key": "consumed", "metadata": {"a": 1}},
	{"account": "ingest:3", "credit": "tokens", "amount": 2, "key": "consumed"},
	{"account": "ingest:3", "credit": "tokens", "amount": 2, "key": "held"},
	{"account": "ingest:3", "credit": "tokens", "amount": 2, "key": "carved"},
	{"account": "ingest:3", "credit": "tokens", "amount": 1, "key": "of a chunk"}]');

-- Several tranches: burned in order (rule 10), an entry for each, the first of
-- which has the key; what has expired is not spent.
SELECT available FROM lease_topup('ingest:4', 'tokens', 10, priority => 2);
SELECT available FROM lease_topup('ingest:4', 'tokens', 10, priority => 1);
SELECT available FROM lease_topup('ingest:4', 'tokens', 5, expires_at => '2030-01-02', priority => 0);
SELECT available FROM lease_topup('ingest:4', 'tokens', 10, priority => 3);
SELECT * FROM lease_ingest(array_fill('ingest:4'::text, ARRAY[4]), array_fill('tokens'::text, ARRAY[4]), ARRAY[3, 15, 10, 8], ARRAY['a', 'b', 'c', 'd']);
SELECT l.amount, l.available, t.priority, l.idempotency_key, l.parts,
	   l.first_entry_id IS NOT DISTINCT FROM lag(coalesce(l.first_entry_id, l.entry_id)) OVER (ORDER BY l.entry_id) AS same_call
  FROM ledger l JOIN tranche t USING (account, credit, tranche_id)
 WHERE l.account = 'ingest:4' AND l.kind = 'consume' ORDER BY l.entry_id;
SELECT priority, remaining, consumed, open FROM tranche WHERE account = 'ingest:4' ORDER BY priority;
SELECT applied, amount, replayed FROM lease_consume('ingest:4', 'tokens', 15, 'b');
SELECT applied, amount FROM lease_consume('ingest:4', 'tokens', 2);
SELECT available FROM lease_topup('ingest:4', 'tokens', 5, expires_at => '2030-01-02');
SET credit_lease.mock_now = '2030-01-02 00:00:00+00';
SELECT * FROM lease_ingest(ARRAY['ingest:4', 'ingest:4'], ARRAY['tokens', 'tokens'], ARRAY[6, 5], ARRAY['e', 'f']);
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

-- With on_short => 'charge' what is there is spent, and the rest recorded, also
-- where there is nothing: the key holds (rule 5), and nothing is below zero.
SELECT available FROM lease_topup('ingest:5', 'tokens', 10);
SELECT * FROM lease_ingest(ARRAY['ingest:5', 'ingest:5', 'ingest:5', 'ingest:6'], ARRAY['tokens', 'tokens', 'tokens', 'tokens'], ARRAY[4, 8, 1, 3],
						   ARRAY['a', 'b', 'c', 'd'], ARRAY[NULL, '{"of": "b"}', NULL, NULL]::jsonb[], on_short => 'charge');
SELECT account, kind, amount, available, tranche_id IS NULL AS no_tranche, idempotency_key, request, parts, metadata
  FROM ledger WHERE account IN ('ingest:5', 'ingest:6') ORDER BY account, entry_id;
SELECT account, credit, amount, reservation_id, idempotency_key, metadata, created_at FROM shortfall WHERE account LIKE 'ingest:%' ORDER BY account, entry_id;
SELECT account, available, consumed, granted FROM balance WHERE account IN ('ingest:5', 'ingest:6') ORDER BY account;
SELECT account, consumed, calls FROM usage_by_day WHERE account IN ('ingest:5', 'ingest:6');
SELECT available FROM lease_topup('ingest:5', 'tokens', 100);
-- the same events again, charged or not, are duplicates; to lease_consume, which
-- spends all or nothing, they are others
SELECT * FROM lease_ingest(ARRAY['ingest:5', 'ingest:5', 'ingest:5', 'ingest:6'], ARRAY['tokens', 'tokens', 'tokens', 'tokens'], ARRAY[4, 8, 1, 3],
						   ARRAY['a', 'b', 'c', 'd'], ARRAY[NULL, '{"of": "b"}', NULL, NULL]::jsonb[]);
SELECT * FROM lease_ingest(ARRAY['ingest:5', 'ingest:6'], ARRAY['tokens', 'tokens'], ARRAY[6, 4], ARRAY['b', 'd'], ARRAY['{"of": "b"}', NULL]::jsonb[]);
SELECT * FROM refused($$ SELECT lease_consume('ingest:5', 'tokens', 8, 'b', '{"of": "b"}') $$);
SELECT * FROM refused($$ SELECT lease_consume('ingest:5', 'tokens', 1, 'c') $$);
-- what was spent of it is refunded as any spend; what was not cannot be
SELECT r.amount, r.available FROM ledger l, LATERAL lease_refund('ingest:5', l.entry_id) r WHERE l.account = 'ingest:5' AND l.idempotency_key = 'b';
SELECT * FROM refused($$ SELECT lease_refund('ingest:5', (SELECT entry_id FROM credit_lease.ledger WHERE account = 'ingest:5' AND idempotency_key = 'c')) $$);
-- a settlement's shortfall is there as well
SELECT reservation_id FROM lease_reserve('ingest:5', 'tokens', 106) \gset
SELECT shortfall FROM lease_settle('ingest:5', :reservation_id, 110);
SELECT account, credit, amount, reservation_id = :reservation_id AS settled FROM shortfall WHERE account = 'ingest:5' AND reservation_id IS NOT NULL;

-- A frozen pool is not charged, whatever on_short says.
SELECT available FROM lease_topup('ingest:7', 'tokens', 10);
SELECT available FROM lease_topup('ingest:7', 'images', 10);
SELECT lease_freeze('ingest:7', 'tokens', 'fraud');
SELECT * FROM lease_ingest(ARRAY['ingest:7', 'ingest:7', 'ingest:2'], ARRAY['tokens', 'images', 'tokens'], ARRAY[1, 1, 1], ARRAY['a', 'b', 'after']);
SELECT * FROM lease_ingest(ARRAY['ingest:7', 'ingest:7'], ARRAY['tokens', 'images'], ARRAY[100, 1], ARRAY['a', 'b'], on_short => 'charge');

-- Features: priced by their meters, in the first credit by preference that can
-- pay. A key stands for a quantity, whatever it costs.
INSERT INTO policy (credit, smallest_unit) VALUES ('cents', 1);
INSERT INTO meter (feature, credit, rate, preference, valid_from, valid_until) VALUES
	('page', 'pages', 1, 1, '-infinity', NULL), ('page', 'cents', 0.3, 2, '-infinity', NULL),
	('map', 'cents', 5, 1, '-infinity', '2030-01-01'), ('sound', 'cents', 2, 1, '-infinity', NULL), ('sound', 'cents', 3, 1, '2030-01-01', NULL),
	('huge', 'cents', 1e25, 1, '-infinity', NULL);
INSERT INTO meter (feature, rule) VALUES ('air', NULL);
SELECT available FROM lease_topup('ingest:8', 'pages', 10);
SELECT available FROM lease_topup('ingest:8', 'cents', 20);
SELECT * FROM lease_ingest('[
	{"account": "ingest:8", "feature": "page", "quantity": 8, "key": "a", "time": "2029-01-01T00:00:00Z"},
	{"account": "ingest:8", "feature": "page", "quantity": 4, "key": "b"},
	{"account": "ingest:8", "feature": "page", "quantity": 2, "key": "c"},
	{"account": "ingest:8", "feature": "page", "quantity": 8, "key": "a", "time": "2029-01-01T00:00:00Z"},
	{"account": "ingest:8", "feature": "page", "quantity": 8, "key": "a"},
	{"account": "ingest:8", "credit": "pages", "amount": 8, "key": "a"},
	{"account": "ingest:8", "feature": "map", "quantity": 1, "key": "d"},
	{"account": "ingest:8", "feature": "sound", "quantity": 1, "key": "e"},
	{"account": "ingest:8", "feature": "air", "quantity": 1, "key": "f"},
	{"account": "ingest:8", "feature": "huge", "quantity": 100, "key": "g"},
	{"account": "ingest:8", "feature": "page", "quantity": 1000, "key": "h"},
	{"account": "ingest:9", "feature": "page", "quantity": 1, "key": "a"}]');
SELECT kind, credit, amount, released, available, idempotency_key, request, metadata FROM ledger
 WHERE account = 'ingest:8' AND kind <> 'topup' ORDER BY entry_id;
UPDATE meter SET rate = 7 WHERE feature = 'sound';
SELECT * FROM lease_ingest('[
	{"account": "ingest:8", "feature": "sound", "quantity": 1.0, "key": "e"},
	{"account": "ingest:8", "feature": "sound", "quantity": 2, "key": "e"},
	{"account": "ingest:8", "feature": "page", "quantity": 1, "key": "e"},
	{"account": "ingest:8", "feature": "page", "quantity": 1000, "key": "h"}]', 'charge');
SELECT * FROM lease_ingest('[{"account": "ingest:8", "feature": "page", "quantity": 1000, "key": "h"}]');
SELECT * FROM refused($$ SELECT lease_consume('ingest:8', 'pages', 8, 'a') $$);
SELECT account, credit, amount, idempotency_key FROM shortfall WHERE account = 'ingest:8';
SELECT account, credit, consumed, calls FROM usage_by_day WHERE account = 'ingest:8' ORDER BY credit;
-- ... also when nobody can pay for it any more, or it is free: a key that has
-- had its effect does not have another, nor in the same batch
DELETE FROM meter WHERE feature = 'sound';
SELECT * FROM lease_ingest('[
	{"account": "ingest:8", "feature": "sound", "quantity": 1, "key": "e"},
	{"account": "ingest:8", "feature": "sound", "quantity": 2, "key": "e"},
	{"account": "ingest:8", "feature": "sound", "quantity": 2, "key": "f"},
	{"account": "ingest:8", "feature": "huge", "quantity": 100, "key": "e"}]');
INSERT INTO meter (feature) VALUES ('sound');
SELECT available FROM lease_topup('ingest:41', 'tokens', 10);
SELECT * FROM lease_ingest('[
	{"account": "ingest:8", "feature": "sound", "quantity": 1, "key": "e"},
	{"account": "ingest:8", "feature": "sound", "quantity": 2, "key": "e"},
	{"account": "ingest:8", "feature": "sound", "quantity": 2, "key": "f"},
	{"account": "ingest:41", "credit": "tokens", "amount": 1, "key": "e"},
	{"account": "ingest:41", "feature": "sound", "quantity": 1, "key": "e"},
	{"account": "ingest:8", "feature": "sound", "quantity": 1}]');
-- what is not charged makes no account
SELECT ordinal, applied, reason FROM lease_ingest('[
	{"account": "ingest:41", "credit": "tokens", "amount": 10},
	{"account": "ingest:42", "feature": "none", "quantity": 1},
	{"account": "ingest:43", "feature": "sound", "quantity": 1},
	{"account": "ingest:44", "feature": "huge", "quantity": 100}]', 'charge');
SELECT account FROM account WHERE account BETWEEN 'ingest:41' AND 'ingest:44';
-- a frozen credit is passed over
SELECT available FROM lease_topup('ingest:8', 'pages', 10);
SELECT available FROM lease_topup('ingest:8', 'cents', 10);
SELECT lease_freeze('ingest:8', 'pages');
SELECT * FROM lease_ingest('[{"account": "ingest:8", "feature": "page", "quantity": 3}]');
SELECT lease_freeze('ingest:8', 'cents');
SELECT * FROM lease_ingest('[{"account": "ingest:8", "feature": "page", "quantity": 3}]', 'charge');
DELETE FROM meter;
DELETE FROM policy;

-- A call that is short gives back what has expired of the pool, and what is
-- available is exact in any case.
SELECT available FROM lease_topup('ingest:10', 'tokens', 10);
SELECT available FROM lease_topup('ingest:11', 'tokens', 10);
SELECT amount FROM lease_reserve('ingest:10', 'tokens', 6, '1 minute');
SELECT granted FROM lease_chunk_allocate('ingest:11', 'tokens', 6, 'me', '1 minute');
SELECT * FROM lease_ingest(ARRAY['ingest:10', 'ingest:11'], ARRAY['tokens', 'tokens'], ARRAY[5, 5], ARRAY['a', 'a']);
SET credit_lease.mock_now = '2030-01-01 00:02:00+00';
SELECT * FROM lease_ingest(ARRAY['ingest:11', 'ingest:10', 'ingest:11', 'ingest:10'], ARRAY['tokens', 'tokens', 'tokens', 'tokens'],
						   ARRAY[1, 1, 5, 5], ARRAY['a', 'a', 'b', 'b']);
SELECT kind, amount, available FROM ledger WHERE account IN ('ingest:10', 'ingest:11') ORDER BY account, entry_id;
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

-- What is spent of leases: in credits, the worker reads it from the ledger; of
-- a feature, it is reported in units, also what there was no credit for, and
-- not what grants of our own have paid.
CREATE SERVER ingest_a FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://a.example');
INSERT INTO policy (account, credit, server, company_id) VALUES ('ingest:15', 'tokens', 'ingest_a', 'Acme');
INSERT INTO meter (feature, credit, rate, event) VALUES ('call', 'tokens', 2, 'calls');
SELECT lease_install('ingest:15', 'tokens', 'L15', 20, '2030-01-01 01:00:00+00', 'ingest_a');
SELECT available FROM lease_topup('ingest:15', 'tokens', 10, priority => 1);
SELECT * FROM lease_ingest('[
	{"account": "ingest:15", "feature": "call", "quantity": 3, "key": "a"},
	{"account": "ingest:15", "feature": "call", "quantity": 4, "key": "b", "metadata": {"secret": 1}},
	{"account": "ingest:15", "credit": "tokens", "amount": 6, "key": "c"},
	{"account": "ingest:15", "feature": "call", "quantity": 10, "key": "d"},
	{"account": "ingest:15", "feature": "call", "quantity": 10, "key": "d"},
	{"account": "ingest:15", "credit": "tokens", "amount": 1, "key": "e"}]', 'charge');
SELECT l.kind, l.amount, l.released, l.available, l.idempotency_key, l.parts FROM ledger l WHERE l.account = 'ingest:15' AND l.kind NOT IN ('topup', 'install') ORDER BY l.entry_id;
SELECT l.idempotency_key, u.event, u.quantity, u.lease_id, u.company_id, u.traits,
	   u.idempotency_key = 'ingest:15:entry ' || u.entry_id || ':1893456000000000' AS keyed
  FROM usage_report u JOIN ledger l USING (account, entry_id) WHERE u.account = 'ingest:15' ORDER BY u.entry_id;
SELECT amount, idempotency_key FROM shortfall WHERE account = 'ingest:15' ORDER BY entry_id;
SELECT * FROM refused($$ SELECT lease_refund('ingest:15', (SELECT entry_id FROM credit_lease.ledger WHERE account = 'ingest:15' AND idempotency_key = 'd')) $$);
-- ... of a pool in stripes as well
INSERT INTO policy (account, credit, server, company_id) VALUES ('ingest:40', 'tokens', 'ingest_a', 'Acme');
SELECT lease_install('ingest:40', 'tokens', 'L40', 20, '2030-01-01 01:00:00+00', 'ingest_a');
SELECT lease_stripe('ingest:40', 'tokens', 2);
SELECT i.applied, i.available FROM generate_series(2, 3) n, lease_ingest(jsonb_build_array(jsonb_build_object('account', 'ingest:40', 'feature', 'call', 'quantity', n))) i;
SELECT event, quantity, lease_id, company_id FROM usage_report WHERE account = 'ingest:40' ORDER BY entry_id;
DELETE FROM usage_report WHERE account IN ('ingest:15', 'ingest:40');
DELETE FROM meter;
DELETE FROM policy;

-- A pool in stripes, beside one that is not.
SELECT available FROM lease_topup('ingest:12', 'tokens', 40);
SELECT available FROM lease_topup('ingest:12', 'images', 5);
SELECT lease_stripe('ingest:12', 'tokens', 4);
SELECT * FROM lease_ingest(array_fill('ingest:12'::text, ARRAY[6]), ARRAY['tokens', 'tokens', 'images', 'tokens', 'tokens', 'images'],
						   ARRAY[5, 30, 4, 10, 1, 4], ARRAY['a', 'b', 'c', 'd', 'a', 'e']);
SELECT * FROM lease_ingest(array_fill('ingest:12'::text, ARRAY[3]), ARRAY['tokens', 'tokens', 'images'],
						   ARRAY[5, 10, 4], ARRAY['a', 'd', 'e'], on_short => 'charge');
SELECT credit, available, consumed FROM lease_balance('ingest:12');
SELECT credit, amount, idempotency_key FROM shortfall WHERE account = 'ingest:12' ORDER BY entry_id;

-- What an event cannot be is said before anything is done: by its ordinal.
SELECT e.n, r FROM (VALUES (1, '1'), (2, 'null'), (3, '[]'), (4, '{}'),
	(5, '{"account": null, "credit": "t", "amount": 1}'), (6, '{"account": 1, "credit": "t", "amount": 1}'),
	(7, '{"account": "", "credit": "t", "amount": 1}'), (8, '{"account": "a", "amount": 1}'), (9, '{"account": "a", "credit": {}, "amount": 1}'),
	(10, '{"account": "a", "credit": "t"}'), (11, '{"account": "a", "credit": "t", "amount": "1"}'),
	(12, '{"account": "a", "credit": "t", "amount": 0}'), (13, '{"account": "a", "credit": "t", "amount": -1}'),
	(14, '{"account": "a", "credit": "t", "amount": 1e26}'), (15, '{"account": "a", "credit": "t", "amount": 0.1234567890123}'),
	(16, '{"account": "a", "credit": "t", "amount": 1, "kye": "k"}'), (17, '{"account": "a", "credit": "t", "amount": 1, "key": 5}'),
	(18, '{"account": "a", "credit": "t", "amount": 1, "key": ""}'), (19, '{"account": "a", "credit": "t", "amount": 1, "key": "k", "idempotency_key": "k"}'),
	(20, '{"account": "a", "credit": "t", "amount": 1, "time": 5}'), (21, '{"account": "a", "credit": "t", "amount": 1, "time": "soon"}'),
	(22, '{"account": "a", "credit": "t", "amount": 1, "time": "infinity"}'), (23, '{"account": "a", "credit": "t", "amount": 1, "time": "2030-01-01T00:00:00.000001Z"}'),
	(24, '{"account": "a", "credit": "t", "amount": 1, "time": "2029-01-01T00:00:00Z", "metadata": 1}'),
	(25, '{"account": "a", "credit": "t", "amount": 1, "time": "2029-01-01T00:00:00Z", "metadata": {"time": 1}}'),
	(26, '{"account": "a", "feature": "f"}'), (27, '{"account": "a", "feature": "f", "quantity": 0}'), (28, '{"account": "a", "feature": "f", "amount": 1}'),
	(29, '{"account": "a", "credit": "t", "feature": "f", "quantity": 1}'), (30, '{"account": "a", "credit": "t", "quantity": 1}'),
	(31, '{"account": "a", "quantity": 1}'),
	(32, '{"account": "a", "credit": "t", "amount": 1, "time": "Yesterday 12:00Z"}'), (33, '{"account": "a", "credit": "t", "amount": 1, "time": "now"}'),
	(34, '{"account": "a", "credit": "t", "amount": 1, "time": "UTC today"}')) e (n, event),
	LATERAL refused(format('SELECT credit_lease.lease_ingest(%L::jsonb)', '[{"account": "ingest:2", "credit": "tokens", "amount": 1}, ' || e.event || ']')) r ORDER BY e.n;
SELECT r.* FROM (VALUES (1, 'NULL'), (2, '''{}'''), (3, '''1'''), (4, '''null''')) e (n, events), LATERAL refused(format('SELECT credit_lease.lease_ingest(%s::jsonb)', e.events)) r ORDER BY e.n;
SELECT r.* FROM (VALUES (1, $$NULL, '{t}', '{1}'$$), (2, $$'{a}', NULL, '{1}'$$), (3, $$'{a}', '{t}', NULL$$),
	(4, $$'{a,b}', '{t}', '{1,1}'$$), (5, $$'{a,b}', '{t,t}', '{1}'$$), (6, $$'{a,b}', '{t,t}', '{1,1}', '{k}'$$), (7, $$'{a}', '{t}', '{1}', NULL, '{}'$$),
	(8, $$'{{a,b}}', '{t,t}', '{1,1}'$$), (9, $$'{a,NULL}', '{t,t}', '{1,1}'$$), (10, $$'{a,b}', '{t,NULL}', '{1,1}'$$), (11, $$'{a,b}', '{t,t}', '{1,NULL}'$$),
	(12, $$'{a,b}', '{t,t}', '{1,NaN}'$$), (13, $$'{a,b}', '{t,t}', '{1,Infinity}'$$), (14, $$'{a,b}', '{t,t}', '{1,0}'$$),
	(15, $$'{a,""}', '{t,t}', '{1,1}'$$), (16, $$'{a,b}', '{t,t}', '{1,1}', '{k,""}'$$),
	(17, $$ARRAY['a', repeat('b', 513)], '{t,t}', '{1,1}'$$), (18, $$'{a}', '{t}', '{1}', on_short => 'perhaps'$$), (19, $$'{a}', '{t}', '{1}', on_short => NULL$$)) e (n, arguments),
	LATERAL refused(format('SELECT credit_lease.lease_ingest(%s)', e.arguments)) r ORDER BY e.n;
SELECT count(*) FROM account WHERE account IN ('a', 'b');

-- What is rolled back was not ingested.
BEGIN;
SAVEPOINT s;
SELECT applied FROM lease_ingest(ARRAY['ingest:2', 'ingest:13'], ARRAY['tokens', 'tokens'], ARRAY[1, 1], ARRAY['back', 'back'], on_short => 'charge');
ROLLBACK TO s;
SELECT applied, available FROM lease_ingest(ARRAY['ingest:2', 'ingest:2'], ARRAY['tokens', 'tokens'], ARRAY[1, 1], ARRAY['back', 'after']);
COMMIT;
SELECT count(*) FROM account WHERE account = 'ingest:13';

-- At REPEATABLE READ as well.
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT * FROM lease_ingest(ARRAY['ingest:2', 'ingest:1', 'ingest:2', 'ingest:14'], ARRAY['tokens', 'tokens', 'tokens', 'tokens'], ARRAY[1, 1, 1, 2],
						   ARRAY['rr', 'rr', 'back', 'rr'], on_short => 'charge');
COMMIT;

-- Something that the call itself sets off must not spend of the same tranches,
-- nor keep entries out.
CREATE FUNCTION test.meddle() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NEW.idempotency_key = 'meddle' THEN
		PERFORM credit_lease.lease_consume('ingest:2', 'tokens', 1);
	END IF;
	RETURN CASE WHEN NEW.idempotency_key = 'vanish' THEN NULL ELSE NEW END;
END $$;
CREATE TRIGGER meddle BEFORE INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION test.meddle();
SELECT * FROM refused($$ SELECT lease_ingest(ARRAY['ingest:2', 'ingest:1'], ARRAY['tokens', 'tokens'], ARRAY[1, 1], ARRAY['meddle', NULL]) $$);
SELECT * FROM refused($$ SELECT lease_ingest(ARRAY['ingest:2', 'ingest:1'], ARRAY['tokens', 'tokens'], ARRAY[1, 1], ARRAY['vanish', NULL]) $$);
DROP TRIGGER meddle ON ledger;
DROP FUNCTION test.meddle();

-- Many more than are worked on at a time, of few accounts and of many, with
-- duplicates that are far apart.
SELECT count(lease_topup('ingest:many:' || i, 'tokens', 1000)) FROM generate_series(1, 50) i;
SELECT reason, count(*), count(*) FILTER (WHERE applied) AS applied, min(ordinal), max(ordinal)
  FROM (SELECT array_agg('ingest:many:' || i % 60) AS accounts, array_agg('tokens'::text) AS credits, array_agg(1::numeric) AS amounts,
			   array_agg('key ' || i % 12000) AS keys FROM generate_series(1, 13000) i) e,
	   LATERAL lease_ingest(e.accounts, e.credits, e.amounts, e.keys) r
 GROUP BY reason ORDER BY reason;
SELECT count(*), sum(available), sum(consumed) FROM balance WHERE account LIKE 'ingest:many:%';

SELECT * FROM credit_lease.lease_verify();
DROP SERVER ingest_a;
