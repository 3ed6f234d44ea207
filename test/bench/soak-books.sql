-- Compares the upstream's books with ours: a row for each rule, and all counts
-- but the first group's are to be 0.
CREATE TEMP TABLE book AS SELECT pg_read_file(:'file')::jsonb AS b;
CREATE TEMP TABLE theirs AS
	SELECT l.* FROM book, jsonb_to_recordset(b->'leases')
		AS l (id text, company_id text, credit_type_id text, state text, granted numeric, used numeric, released numeric, out numeric);
CREATE TEMP TABLE ours AS
	SELECT t.*, u.complete FROM credit_lease.tranche t LEFT JOIN credit_lease.lease_usage u USING (account, credit, tranche_id)
	 WHERE t.kind = 'upstream';
CREATE TEMP TABLE pair AS
	SELECT o.account, o.credit, o.lease_id, o.granted, o.consumed, t.granted AS their_granted, t.used, t.state, t.company_id,
		   o.released_at IS NOT NULL AS released
	  FROM ours o LEFT JOIN theirs t ON t.id = o.lease_id;

SELECT 'leases here', count(*) FROM ours
UNION ALL SELECT 'leases upstream', count(*) FROM theirs
UNION ALL SELECT 'leases upstream that never came here', count(*) FROM theirs WHERE id NOT IN (SELECT lease_id FROM ours)
UNION ALL SELECT 'expired leases with more granted upstream than here', count(*) FROM pair WHERE their_granted > granted AND NOT released
UNION ALL SELECT 'consumed here of leases', sum(consumed) FROM ours
UNION ALL SELECT 'used upstream', sum(used) FROM theirs
UNION ALL SELECT 'events', (b->'events'->>'accepted')::numeric FROM book
UNION ALL SELECT 'events sent more than once', (b->'events'->>'duplicates')::numeric FROM book;

\echo to be 0:
SELECT 'books that are not consistent', (NOT (b->>'consistent')::boolean)::int::numeric FROM book
UNION ALL SELECT 'events in conflict', (b->'events'->>'conflicts')::numeric FROM book
UNION ALL SELECT 'events of no lease', (b->'events'->>'uncharged')::numeric FROM book
UNION ALL SELECT 'companies whose usage differs', count(*) FROM
	(SELECT company_id AS c, credit_type_id AS k, sum(used) AS s FROM theirs GROUP BY 1, 2) t
	FULL JOIN (SELECT account AS c, credit AS k, sum(consumed) AS s FROM ours GROUP BY 1, 2) o USING (c, k)
	WHERE coalesce(t.s, 0) <> coalesce(o.s, 0)
UNION ALL SELECT 'leases whose usage differs', count(*) FROM pair WHERE consumed <> used
UNION ALL SELECT 'leases that the upstream does not know', count(*) FROM pair WHERE their_granted IS NULL
UNION ALL SELECT 'leases of another company', count(*) FROM pair WHERE company_id <> account
UNION ALL SELECT 'leases of more than one account', count(*) FROM (SELECT lease_id FROM ours GROUP BY 1 HAVING count(*) > 1) d
UNION ALL SELECT 'leases with more granted here than upstream', count(*) FROM pair WHERE granted > their_granted
UNION ALL SELECT 'released leases with another grant upstream', count(*) FROM pair WHERE granted <> their_granted AND released
UNION ALL SELECT 'unknown leases with usage', count(*) FROM theirs WHERE used <> 0 AND id NOT IN (SELECT lease_id FROM ours)
UNION ALL SELECT 'leases alive upstream', count(*) FROM theirs WHERE state = 'live'
UNION ALL SELECT 'leases released here alone', count(*) FROM pair WHERE released AND state = 'live'
UNION ALL SELECT 'leases alive here', count(*) FROM ours WHERE released_at IS NULL AND expires_at > clock_timestamp()
UNION ALL SELECT 'leases used beyond what was granted', count(*) FROM theirs WHERE used > granted;
