--
-- Installing the extension. The other tests run afterwards in the same
-- database, with what this one leaves behind: the extension, and the helpers
-- at the end of this file.
--

-- A schema that somebody has prepared is never trusted: the installation fails.
CREATE SCHEMA credit_lease;
\set VERBOSITY terse
CREATE EXTENSION credit_lease;
\set VERBOSITY default
SELECT count(*) FROM pg_extension WHERE extname = 'credit_lease';
DROP SCHEMA credit_lease;

-- Only a superuser installs it.
CREATE ROLE regress_credit_lease_nobody;
SET ROLE regress_credit_lease_nobody;
CREATE EXTENSION credit_lease;
RESET ROLE;
DROP ROLE regress_credit_lease_nobody;

CREATE EXTENSION credit_lease;

-- The manual: what \df lease_* shows, and the columns of the results.
\pset format unaligned
\pset tuples_only on
SELECT format('%s(%s) returns %s', p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid))
  FROM pg_proc p
 WHERE p.pronamespace = 'credit_lease'::regnamespace AND p.proname LIKE 'lease\_%'
 ORDER BY p.proname COLLATE "C";
SELECT format('%s: %s', c.oid::regclass,
			  string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod), ', ' ORDER BY a.attnum))
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
 WHERE c.relnamespace = 'credit_lease'::regnamespace AND (c.relkind = 'c' OR c.relname IN ('balance', 'finding'))
 GROUP BY c.oid, c.relname
 ORDER BY c.relname COLLATE "C";
\pset format aligned
\pset tuples_only off

-- Everything is in the extension's own schema.
SELECT pg_describe_object(d.classid, d.objid, 0) AS stray
  FROM pg_depend d, LATERAL pg_identify_object(d.classid, d.objid, 0) o
 WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
   AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'credit_lease')
   AND coalesce(o.schema, o.name) <> 'credit_lease';

-- Every object has a comment: what the script creates by name, without the
-- types, constraints and rules that come with a table.
SELECT pg_describe_object(o.classid, o.objid, 0) AS without_comment
  FROM (
	SELECT 'pg_namespace'::regclass, oid FROM pg_namespace WHERE nspname = 'credit_lease'
	UNION ALL
	SELECT 'pg_class'::regclass, c.oid FROM pg_class c
	 WHERE c.relnamespace = 'credit_lease'::regnamespace AND c.relkind NOT IN ('c', 't')
	   AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = c.oid)
	UNION ALL
	SELECT 'pg_proc'::regclass, oid FROM pg_proc WHERE pronamespace = 'credit_lease'::regnamespace
	UNION ALL
	SELECT 'pg_type'::regclass, t.oid FROM pg_type t JOIN pg_class c ON c.oid = t.typrelid
	 WHERE t.typnamespace = 'credit_lease'::regnamespace AND c.relkind = 'c'
	UNION ALL
	SELECT 'pg_foreign_data_wrapper'::regclass, oid FROM pg_foreign_data_wrapper WHERE fdwname = 'credit_lease'
	UNION ALL
	SELECT 'pg_trigger'::regclass, t.oid FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
	 WHERE c.relnamespace = 'credit_lease'::regnamespace AND NOT t.tgisinternal
  ) AS o (classid, objid)
 WHERE obj_description(o.objid, o.classid::name) IS NULL;

-- Every function has a search_path that nobody can put anything on.
SELECT p.oid::regprocedure AS without_search_path
  FROM pg_proc p
 WHERE p.pronamespace = 'credit_lease'::regnamespace
   AND 'search_path=pg_catalog, pg_temp' = ANY (p.proconfig) IS NOT TRUE;

-- Functions run as the extension's owner, so that a role needs no rights on
-- tables. Those that touch no table do not.
SELECT p.proname AS runs_as_its_caller
  FROM pg_proc p
 WHERE p.pronamespace = 'credit_lease'::regnamespace AND NOT p.prosecdef
 ORDER BY p.proname COLLATE "C";

-- What looks is STABLE, so that it works in a read-only transaction.
SELECT p.proname AS stable
  FROM pg_proc p
 WHERE p.pronamespace = 'credit_lease'::regnamespace AND p.provolatile <> 'v'
 ORDER BY p.proname COLLATE "C";

-- Nothing is granted to PUBLIC.
SELECT pg_describe_object(o.classid, o.objid, 0) AS object, a.privilege_type AS granted_to_public
  FROM (
	SELECT 'pg_namespace'::regclass, oid, coalesce(nspacl, acldefault('n', nspowner))
	  FROM pg_namespace WHERE nspname = 'credit_lease'
	UNION ALL
	SELECT 'pg_class'::regclass, oid, coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))
	  FROM pg_class WHERE relnamespace = 'credit_lease'::regnamespace AND relkind NOT IN ('i', 'c')
	UNION ALL
	SELECT 'pg_proc'::regclass, oid, coalesce(proacl, acldefault('f', proowner))
	  FROM pg_proc WHERE pronamespace = 'credit_lease'::regnamespace
	UNION ALL
	SELECT 'pg_type'::regclass, t.oid, coalesce(t.typacl, acldefault('T', t.typowner))
	  FROM pg_type t JOIN pg_class c ON c.oid = t.typrelid
	 WHERE t.typnamespace = 'credit_lease'::regnamespace AND c.relkind = 'c'
	UNION ALL
	SELECT 'pg_foreign_data_wrapper'::regclass, oid, coalesce(fdwacl, acldefault('F', fdwowner))
	  FROM pg_foreign_data_wrapper WHERE fdwname = 'credit_lease'
  ) AS o (classid, objid, acl),
  LATERAL aclexplode(o.acl) a
 WHERE a.grantee = 0;

-- Every table and sequence is dumped with all its rows, or pg_dump would
-- silently leave the ledger out.
SELECT c.oid::regclass AS not_dumped
  FROM pg_class c
 WHERE c.relnamespace = 'credit_lease'::regnamespace AND c.relkind IN ('r', 'p', 'S')
   AND NOT EXISTS (SELECT FROM pg_extension e, unnest(e.extconfig, e.extcondition) AS d (relation, condition)
					WHERE e.extname = 'credit_lease' AND d.relation = c.oid AND d.condition = '');

-- account is in every primary and unique key of what is an account's: it is
-- the shard key.
SELECT i.indexrelid::regclass AS unique_without_account
  FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
 WHERE c.relnamespace = 'credit_lease'::regnamespace AND i.indisunique AND c.relkind = 'r'
   AND EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'account')
   AND NOT EXISTS (SELECT FROM pg_attribute a
					WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey) AND a.attname = 'account');

-- The ledger's guard fires in every session_replication_role.
SELECT tgname, tgenabled AS always FROM pg_trigger
 WHERE tgrelid = 'credit_lease.ledger'::regclass AND NOT tgisinternal;

-- It goes without a trace, and comes again.
DROP EXTENSION credit_lease;
SELECT count(*) FROM pg_namespace WHERE nspname = 'credit_lease';
CREATE EXTENSION credit_lease;

--
-- Helpers of the tests that follow
--
CREATE SCHEMA test;

-- All rows of all tables of the extension, byte for byte, as a hash for each
-- table: where two of these are equal, nothing has been written in between.
CREATE FUNCTION test.rows() RETURNS jsonb
	LANGUAGE plpgsql AS $$
DECLARE
	tab regclass;
	hash text;
	hashes jsonb := '{}';
BEGIN
	FOR tab IN SELECT oid FROM pg_class WHERE relnamespace = 'credit_lease'::regnamespace AND relkind IN ('r', 'p')
	LOOP
		EXECUTE format('SELECT md5(string_agg(concat(t.ctid, t.xmin, t), chr(10) ORDER BY t.ctid)) FROM %s t', tab)
			INTO hash;
		hashes := hashes || jsonb_build_object(tab, hash);
	END LOOP;
	RETURN hashes;
END
$$;

-- The tables in which a call has changed something.
CREATE FUNCTION test.changed_by(call text) RETURNS text
	LANGUAGE plpgsql AS $$
DECLARE
	before jsonb := test.rows();
BEGIN
	EXECUTE call;
	RETURN coalesce((SELECT string_agg(split_part(b.key, '.', -1), ', ' ORDER BY b.key COLLATE "C")
					   FROM jsonb_each(before) b JOIN jsonb_each(test.rows()) a USING (key)
					  WHERE a.value <> b.value), 'nothing');
END
$$;

-- How a call is refused; and that it has changed nothing then (rule 6).
-- Numbers of rows depend on what has run before, and stand as #.
CREATE FUNCTION test.refusal(call text, OUT code text, OUT message text, OUT detail text, OUT hint text)
	LANGUAGE plpgsql AS $$
DECLARE
	before jsonb := test.rows();
BEGIN
	EXECUTE call;
	code := 'none';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, message = MESSAGE_TEXT,
		detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
	message := regexp_replace(message, '(reservation|chunk|tranche|entry|entry_id) \d+', '\1 #', 'g');
	detail := regexp_replace(detail, '(reservation|chunk|tranche|entry|entry_id) \d+', '\1 #', 'g');
	IF test.rows() <> before THEN
		message := message || ', AND YET SOMETHING CHANGED';
	END IF;
END
$$;

-- The same, as one reads it.
CREATE FUNCTION test.refused(call text) RETURNS SETOF text
	LANGUAGE sql AS $$
	SELECT line
	  FROM test.refusal(call) r,
		   LATERAL (VALUES (1, r.code || ': ' || coalesce(r.message, 'it was not refused')),
						   (2, 'DETAIL: ' || nullif(r.detail, '')),
						   (3, 'HINT: ' || nullif(r.hint, ''))) AS l (n, line)
	 WHERE line IS NOT NULL
	 ORDER BY n
$$;

-- The books balance.
SELECT * FROM credit_lease.lease_verify();
