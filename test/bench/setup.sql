-- What the contenders work on. autovacuum is off for the session, so that it
-- falls on none of them.

CREATE EXTENSION credit_lease;

-- the ceiling: two bare tables
CREATE SCHEMA bare;
CREATE TABLE bare.balance (account text COLLATE "C" PRIMARY KEY, remaining numeric) WITH (fillfactor = 70);
CREATE TABLE bare.ledger (account text COLLATE "C", entry_id bigint GENERATED ALWAYS AS IDENTITY, amount numeric, key text,
						  PRIMARY KEY (account, entry_id));

CREATE FUNCTION bare.consume(p_account text, p_amount numeric, p_key text) RETURNS void
	LANGUAGE plpgsql AS $$
BEGIN
	UPDATE bare.balance SET remaining = remaining - p_amount WHERE account = p_account;
	INSERT INTO bare.ledger (account, amount, key) VALUES (p_account, p_amount, p_key);
END $$;

-- lease_consume's job, in PL/pgSQL by somebody who takes care: the same
-- arguments and checks, the same rights, the same facts recorded, for a pool
-- that is one row
CREATE SCHEMA careful;
CREATE TABLE careful.balance (
	account text COLLATE "C", credit text COLLATE "C",
	expires_at timestamptz, frozen boolean NOT NULL DEFAULT false,
	remaining numeric NOT NULL, consumed numeric NOT NULL DEFAULT 0,
	PRIMARY KEY (account, credit)) WITH (fillfactor = 70);
CREATE TABLE careful.ledger (
	entry_id bigint NOT NULL GENERATED ALWAYS AS IDENTITY, created_at timestamptz NOT NULL,
	account text COLLATE "C" NOT NULL, credit text COLLATE "C" NOT NULL, kind text NOT NULL,
	amount numeric NOT NULL, available numeric NOT NULL, idempotency_key text COLLATE "C",
	metadata jsonb, created_by text NOT NULL DEFAULT SESSION_USER,
	PRIMARY KEY (account, entry_id));
CREATE UNIQUE INDEX ON careful.ledger (account, idempotency_key) WHERE idempotency_key IS NOT NULL;

CREATE FUNCTION careful.consume(p_account text, p_credit text, p_amount numeric, p_key text DEFAULT NULL, p_metadata jsonb DEFAULT NULL,
								OUT applied boolean, OUT entry_id bigint, OUT amount numeric, OUT available numeric, OUT replayed boolean)
	LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
	now timestamptz := clock_timestamp();
	pool careful.balance;
	first careful.ledger;
BEGIN
	IF p_account IS NULL OR p_credit IS NULL OR octet_length(p_account) > 512 OR octet_length(p_credit) > 512 OR octet_length(p_key) > 512
	   OR p_amount IS NULL OR NOT p_amount > 0 OR NOT p_amount < 1e26 OR min_scale(p_amount) > 12 THEN
		RAISE invalid_parameter_value;
	END IF;
	SELECT * INTO pool FROM careful.balance b WHERE b.account = p_account AND b.credit = p_credit FOR NO KEY UPDATE;
	IF p_key IS NOT NULL THEN
		SELECT * INTO first FROM careful.ledger l WHERE l.account = p_account AND l.idempotency_key = p_key;
		IF FOUND THEN
			IF first.kind <> 'consume' OR first.credit <> p_credit OR first.amount <> p_amount OR first.metadata IS DISTINCT FROM p_metadata THEN
				RAISE EXCEPTION 'key was used for another request' USING ERRCODE = 'LC002';
			END IF;
			applied := true; entry_id := first.entry_id; amount := first.amount; available := first.available; replayed := true;
			RETURN;
		END IF;
	END IF;
	IF pool.account IS NULL OR pool.frozen OR pool.expires_at <= now OR pool.remaining < p_amount THEN
		RAISE EXCEPTION 'not enough credit' USING ERRCODE = 'LC001';
	END IF;
	UPDATE careful.balance b SET remaining = b.remaining - p_amount, consumed = b.consumed + p_amount
	 WHERE b.account = p_account AND b.credit = p_credit RETURNING b.remaining INTO available;
	INSERT INTO careful.ledger AS l (created_at, account, credit, kind, amount, available, idempotency_key, metadata)
		VALUES (now, p_account, p_credit, 'consume', p_amount, available, p_key, p_metadata) RETURNING l.entry_id INTO entry_id;
	applied := true; amount := p_amount; replayed := false;
END $$;

CREATE FUNCTION careful.rule(account text, feature text, quantity numeric, available numeric, subject jsonb,
		OUT allowed boolean, OUT reason text)
	BEGIN ATOMIC
	SELECT available > 5, 'too little';
	END;
INSERT INTO credit_lease.meter (feature, credit, rate, rule)
	VALUES ('call', 'tokens', 0.5, NULL), ('ruled call', 'tokens', 0.5, 'careful.rule');

INSERT INTO bare.balance SELECT 'acct:' || i, 1e12 FROM generate_series(1, :accounts) AS i;
INSERT INTO careful.balance (account, credit, remaining) SELECT 'acct:' || i, 'tokens', 1e12 FROM generate_series(1, :accounts) AS i;
SELECT count(credit_lease.lease_topup('acct:' || i, 'tokens', 1e12)) FROM generate_series(1, :accounts) AS i;
VACUUM ANALYZE;
CHECKPOINT;
