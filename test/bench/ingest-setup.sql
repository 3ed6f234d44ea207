-- What the contenders of ingest work on, beside what all do.

-- a table with the columns and indexes of the ledger
CREATE TABLE bare.copied (LIKE credit_lease.ledger INCLUDING DEFAULTS INCLUDING INDEXES);
CREATE SEQUENCE bare.copied_id;
ALTER TABLE bare.copied ALTER entry_id SET DEFAULT nextval('bare.copied_id');

-- The job of lease_ingest(), by somebody who takes care, for pools that are one
-- row: locks in order, what is there and paid for, each key once. An event that
-- follows one that cannot be paid for is not either.
CREATE FUNCTION careful.ingest(p_account text[], p_credit text[], p_amount numeric[], p_key text[]) RETURNS bigint
	LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
	now timestamptz := clock_timestamp();
	applied bigint;
BEGIN
	IF EXISTS (SELECT FROM unnest(p_account, p_credit, p_amount, p_key) AS e (account, credit, amount, key)
			WHERE account IS NULL OR credit IS NULL OR octet_length(account) > 512 OR octet_length(credit) > 512 OR octet_length(key) > 512
			   OR amount IS NULL OR NOT amount > 0 OR NOT amount < 1e26 OR min_scale(amount) > 12) THEN
		RAISE invalid_parameter_value;
	END IF;
	PERFORM FROM careful.balance b
	  WHERE (b.account, b.credit) IN (SELECT e.account, e.credit FROM unnest(p_account, p_credit) AS e (account, credit))
	  ORDER BY b.account, b.credit FOR NO KEY UPDATE;
	WITH event AS (
		SELECT DISTINCT ON (e.account, e.key) e.*
		  FROM unnest(p_account, p_credit, p_amount, p_key) WITH ORDINALITY AS e (account, credit, amount, key, n)
		 WHERE NOT EXISTS (SELECT FROM careful.ledger l WHERE l.account = e.account AND l.idempotency_key = e.key)
		 ORDER BY e.account, e.key, e.n
	),
	running AS (
		SELECT e.*, sum(e.amount) OVER (PARTITION BY e.account, e.credit ORDER BY e.n) AS total FROM event e
	),
	payable AS (
		SELECT r.*, b.remaining - r.total AS available
		  FROM running r JOIN careful.balance b ON b.account = r.account AND b.credit = r.credit
		 WHERE b.remaining >= r.total AND NOT b.frozen AND (b.expires_at IS NULL OR b.expires_at > now)
	),
	spent AS (
		UPDATE careful.balance b SET remaining = b.remaining - s.amount, consumed = b.consumed + s.amount
		  FROM (SELECT p.account, p.credit, sum(p.amount) AS amount FROM payable p GROUP BY p.account, p.credit) s
		 WHERE b.account = s.account AND b.credit = s.credit
	)
	INSERT INTO careful.ledger (created_at, account, credit, kind, amount, available, idempotency_key)
		SELECT now, p.account, p.credit, 'consume', p.amount, p.available, p.key FROM payable p ORDER BY p.account, p.n;
	GET DIAGNOSTICS applied = ROW_COUNT;
	RETURN applied;
END $$;

CREATE FUNCTION careful.each(p_account text[], p_credit text[], p_amount numeric[], p_key text[]) RETURNS bigint
	LANGUAGE plpgsql AS $$
DECLARE
	applied bigint := 0;
BEGIN
	FOR i IN 1 .. cardinality(p_account) LOOP
		PERFORM FROM credit_lease.lease_consume(p_account[i], p_credit[i], p_amount[i], p_key[i]);
		applied := applied + 1;
	END LOOP;
	RETURN applied;
END $$;
