-- What came of the hour, for a person.

\pset footer off

\echo 'What became of the requests, and of the tokens they asked for (prompt + longest answer):'
SELECT coalesce(outcome, 'all') AS outcome,
	   to_char(count(*), 'FM999,999,999') AS requests,
	   to_char(sum(asked), 'FM999,999,999,999') AS "asked for",
	   to_char(sum(spent), 'FM999,999,999,999') AS spent,
	   to_char(sum(given_back), 'FM999,999,999,990') AS "given back",
	   to_char(sum(expired), 'FM999,999,999,999') AS expired,
	   to_char(sum(refused), 'FM999,999,999,999') AS refused
  FROM trace.outcome
 GROUP BY ROLLUP (outcome)
 ORDER BY array_position(ARRAY['served', 'failed', 'abandoned', 'refused', NULL], outcome);

\echo 'How it went:'
SELECT :clients AS "clients at once",
	   round(:requests / extract(epoch FROM max(coalesce(ended_at, started_at)) - min(started_at))) AS "requests a second",
	   (SELECT count(*) FROM trace.outcome WHERE sent_twice AND outcome <> 'refused') AS "sent twice",
	   (SELECT count(*) FROM credit_lease.ledger) AS "ledger entries",
	   pg_size_pretty(pg_total_relation_size('credit_lease.ledger')) AS "ledger size",
	   current_setting('fsync') AS fsync,
	   current_setting('synchronous_commit') AS synchronous_commit
  FROM app.request;

\echo 'The proof (trace.proof):'
SELECT check_name AS "check", expected, found, CASE WHEN holds THEN 'equal' ELSE 'NOT EQUAL' END AS "so"
  FROM trace.proof;

-- an account in whose last entries much has happened, a call over several tranches among it
SELECT account
  FROM (SELECT account, kind, parts, row_number() OVER (PARTITION BY account ORDER BY entry_id DESC)
		  FROM credit_lease.ledger) AS l (account, kind, parts, back)
 WHERE back <= 12
 GROUP BY account
 ORDER BY count(parts) > 0 DESC, count(DISTINCT kind) DESC, count(*) DESC, account
 LIMIT 1
\gset
\echo 'The last of the ledger of' :account:
SELECT entry_id, to_char(created_at, 'HH24:MI:SS.MS') AS "at", kind, amount, available, tranche_id AS tranche,
	   reservation_id AS reservation, created_by AS "by"
  FROM (SELECT * FROM credit_lease.ledger WHERE account = :'account' ORDER BY entry_id DESC LIMIT 12) AS l
 ORDER BY entry_id;
\echo 'and its balance:'
SELECT * FROM credit_lease.lease_balance(:'account');

\echo 'All was leased (trace.lease). What the upstream granted is what was spent here, is held and was returned:'
SELECT to_char(count(*), 'FM999,999,999') AS leases,
	   to_char(sum(granted_there), 'FM999,999,999,999') AS "granted upstream",
	   to_char(sum(consumed), 'FM999,999,999,999') AS "spent here",
	   to_char(sum(reserved + remaining), 'FM999,999,999,990') AS held,
	   to_char(sum(returned), 'FM999,999,999,999') AS returned,
	   to_char(sum(granted_there) - sum(consumed + reserved + remaining + returned), 'FM999,999,999,990') AS difference
  FROM trace.lease;
