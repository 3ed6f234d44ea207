--
-- Dialects: what becomes of a request and of a reply, and a dialect of
-- somebody's own, as the README has it. And policies, with no worker to act on
-- them.
--
SET search_path = credit_lease, test;

SELECT url_encode('lease_1.2~3-4'), url_encode('../a b?c=d&e#f%2F"é'), url_encode('');

-- schematic: leases
\set request '{"url": "https://api.example.com/v1/", "api_key": "KEY", "idempotency_key": "k", "account": "acct:1", "credit": "tokens", "company_id": "comp_1", "credit_type_id": "bilcr_1", "amount": 10000.5, "expires_at": "2026-01-01T00:05:00.000Z"}'
SELECT jsonb_pretty(schematic_request('acquire', :'request'));
SELECT jsonb_pretty(schematic_request('extend', :'request'::jsonb || '{"lease_id": "lease/1"}'));
SELECT jsonb_pretty(schematic_request('release', :'request'::jsonb || '{"lease_id": "lease/1"}'));

-- schematic: reports, to the other URL if there is one
\set events '{"events": [{"idempotency_key": "l:7", "event": "tokens", "quantity": 0.0000015, "lease_id": "l", "company_id": "comp_1", "created_at": "2026-01-01T00:00:01.000001Z"}, {"idempotency_key": "l:8", "event": "tokens", "quantity": 12, "lease_id": "l", "company_id": "comp_1", "created_at": "2026-01-01T00:00:02.000001Z"}]}'
SELECT jsonb_pretty(schematic_request('report', :'request'::jsonb || :'events'));
SELECT schematic_request('report', :'request'::jsonb || :'events' || '{"events_url": "https://events.example.com"}')->'url' AS url;

-- schematic: replies
SELECT schematic_outcome('acquire', :'request', 200, '{"data": {"id": "l", "company_id": "comp_1", "credit_type_id": "bilcr_1", "granted_amount": 5, "expires_at": "2026-01-01T00:05:00Z", "released_at": null, "more": 1}, "params": {}}');
SELECT schematic_outcome('extend', :'request', 404, '{"error": "there is no such lease"}');
SELECT schematic_outcome('acquire', :'request', 200, '{"data": null}'), schematic_outcome('acquire', :'request', 200, '[]');
SELECT schematic_outcome('report', :'request', 200, '{"data": {"events": null}}'), schematic_outcome('report', :'request', 500, 'null');

-- schematic: a running total
SELECT schematic_request('report', :'request'::jsonb || '{"events": [{"idempotency_key": "l:9", "event": "tokens", "quantity": 12.5, "lease_id": "l", "cumulative": true, "company_id": "comp_1", "created_at": "2026-01-01T00:00:02.000001Z"}]}')->'body'->'events'->0->'body' AS event;

-- metronome: balances
SELECT jsonb_pretty(metronome_request('balance', :'request'));
SELECT metronome_outcome('balance', :'request', 200, '{"data": {"balance": 12.5, "credit_type_id": "bilcr_1", "more": 1}}');
SELECT metronome_outcome('balance', :'request', 200, '{"data": null}'), metronome_outcome('balance', :'request', 200, 'null');
SELECT metronome_outcome('balance', :'request', 404, '{"message": "there is no such customer"}'), metronome_outcome('report', :'request', 500, 'null');

-- metronome: reports; what is measured is not what traits say
\set told '{"events": [{"idempotency_key": "a/t/1:7", "event": "tokens", "quantity": 0.0000015, "credit_type_id": "bilcr_1", "company_id": "comp_1", "created_at": "2026-01-01T00:00:01.000001Z"}, {"idempotency_key": "a:8", "event": "chat", "quantity": 12345678901234567890.5, "credit_type_id": "bilcr_1", "traits": {"model": "m", "quantity": 1, "cumulative": "true"}, "company_id": "comp_1", "created_at": "2026-01-01T00:00:02.000001Z"}, {"idempotency_key": "a/t/1:9", "event": "tokens", "quantity": 40, "cumulative": true, "mirror": "a/t/1", "credit_type_id": "bilcr_1", "company_id": "comp_1", "created_at": "2026-01-01T00:00:03.000001Z"}]}'
SELECT jsonb_pretty(metronome_request('report', :'request'::jsonb || :'told'));
SELECT metronome_request('report', :'request'::jsonb || :'told' || '{"events_url": "https://events.example.com"}')->'url' AS url;
SELECT metronome_outcome('report', :'request', 200, 'null');

-- metronome: what it does not know
SELECT metronome_request('acquire', :'request')->'url' AS url;

-- one of somebody's own
CREATE SCHEMA acme;
CREATE FUNCTION acme.api_request(operation text, request jsonb) RETURNS jsonb LANGUAGE sql
BEGIN ATOMIC
  SELECT jsonb_build_object(
    'url', (request->>'url') || '/v2/' || operation,
    'headers', jsonb_build_object('Authorization', 'Bearer ' || (request->>'api_key')),
    'body', request - 'api_key' - 'url' - 'events_url');
END;
CREATE FUNCTION acme.api_outcome(operation text, request jsonb, status integer, reply jsonb) RETURNS jsonb LANGUAGE sql
BEGIN ATOMIC
  SELECT CASE WHEN status NOT BETWEEN 200 AND 299 THEN jsonb_build_object('error', reply->'message')
    ELSE jsonb_build_object('lease_id', reply->'lease', 'company_id', reply->'customer', 'credit_type_id', reply->'unit',
      'granted', reply->'total', 'expires_at', reply->'until', 'released_at', reply->'ended') END;
END;
CREATE SERVER acme FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'acme.api', url 'https://billing.acme.example');
SELECT server, dialect, supply, usage FROM upstream WHERE server = 'acme';
SELECT jsonb_pretty(acme.api_request('acquire', :'request'));
SELECT acme.api_outcome('acquire', :'request', 200, '{"lease": "l", "customer": "comp_1", "unit": "bilcr_1", "total": 5, "until": "2026-01-01T00:05:00Z"}');

-- policies: each setting by itself, the most specific that has it
INSERT INTO policy (account, credit, server, lease_size, company_id) VALUES
	(NULL, NULL, 'acme', 5, NULL),
	(NULL, 'tokens', NULL, 7, NULL),
	('acct:1', NULL, NULL, NULL, 'comp_1'),
	('acct:1', 'tokens', NULL, NULL, NULL);
SELECT * FROM lease_policy('acct:1', 'tokens');
SELECT * FROM lease_policy('acct:2', 'other');
SELECT code, message FROM refusal($$ INSERT INTO credit_lease.policy (account, server) VALUES ('acct:3', 'nowhere') $$);
SELECT code FROM refusal($$ UPDATE credit_lease.policy SET server = 'nowhere' WHERE account IS NULL $$);
SELECT setting, r.code FROM (VALUES ('lease_size = 0'), ('lease_size = ''NaN'''), ('lease_duration = ''0'''), ('low_water_mark = 1'),
	('low_water_mark = -0.1'), ('safety_margin = ''-1 s'''), ('company_id = '''''), ('event = '''''),
	('sync_interval = ''999 ms'''), ('sync_interval = ''2 years'''), ('max_staleness = ''0'''), ('max_staleness = ''11 years''')) v (setting),
	LATERAL refusal('UPDATE credit_lease.policy SET ' || setting) r;
-- without a worker, nobody can be asked
SELECT code, message, detail FROM refusal($$ SELECT credit_lease.lease_consume('acct:1', 'tokens', 1) $$);
SELECT applied, available FROM lease_try_reserve('acct:1', 'tokens', 1);
SELECT * FROM lease_prewarm('acct:1', '{tokens,other}', '1 s');
SELECT code, message FROM refusal($$ SELECT * FROM credit_lease.lease_prewarm('acct:1', '{tokens,NULL}') $$);
DELETE FROM policy;
SELECT * FROM lease_prewarm('acct:1', '{tokens}');
SELECT code FROM refusal($$ SELECT credit_lease.lease_consume('acct:1', 'tokens', 1) $$);

SET client_min_messages = warning;
DROP SERVER acme;
DROP SCHEMA acme CASCADE;
