-- What the clients of the soak call. An error would end a client of pgbench:
-- here it is counted.
CREATE EXTENSION credit_lease;
SELECT pg_catalog.format('CREATE SERVER billing FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect %L, url %L)', 'schematic', :'url') \gexec
SELECT pg_catalog.format('CREATE USER MAPPING FOR CURRENT_USER SERVER billing OPTIONS (api_key_file %L)', :'key') \gexec
INSERT INTO credit_lease.policy (credit, server, lease_size, lease_duration)
	VALUES ('tokens', 'billing', :lease_size, :'lease_duration');

INSERT INTO credit_lease.meter (feature, credit, rate, event) VALUES ('chat', 'tokens', 0.25, 'chat.units');

CREATE SCHEMA soak;
CREATE TABLE soak.failure (call text, state text, message text, at timestamptz DEFAULT clock_timestamp());
-- holds that their client settles some time later
CREATE TABLE soak.hold (client int, settle_at timestamptz, account text, reservation_id bigint, amount numeric, checked boolean);
CREATE INDEX ON soak.hold (client, settle_at);

CREATE FUNCTION soak.consume(account text, amount numeric, key text) RETURNS void
	LANGUAGE plpgsql AS $$
BEGIN
	PERFORM credit_lease.lease_consume(account, 'tokens', amount, key);
EXCEPTION WHEN OTHERS THEN
	INSERT INTO soak.failure VALUES ('consume', SQLSTATE, SQLERRM);
END $$;

-- every other hold is a check's, of four units for each token; one in ten is
-- left to expire
CREATE FUNCTION soak.reserve(client int, account text, amount numeric) RETURNS void
	LANGUAGE plpgsql AS $$
DECLARE
	checks boolean := random() < 0.5;
	hold record;
BEGIN
	IF checks THEN
		SELECT c.allowed AS applied, c.reason, c.reservation_id INTO hold
		  FROM credit_lease.lease_check(account, 'chat', 4 * amount, ttl => '10 seconds') c;
	ELSE
		SELECT r.applied, 'not applied' AS reason, r.reservation_id INTO hold
		  FROM credit_lease.lease_try_reserve(account, 'tokens', amount, '2 seconds') r;
	END IF;
	IF NOT hold.applied THEN
		INSERT INTO soak.failure VALUES (CASE WHEN checks THEN 'check' ELSE 'try_reserve' END, 'false', hold.reason);
	ELSIF random() >= 0.1 THEN
		INSERT INTO soak.hold VALUES (client, clock_timestamp() + random() * interval '1.5 seconds', account,
			hold.reservation_id, amount, checks);
	END IF;
EXCEPTION WHEN OTHERS THEN
	INSERT INTO soak.failure VALUES ('reserve', SQLSTATE, SQLERRM);
END $$;

CREATE FUNCTION soak.settle(_client int) RETURNS void
	LANGUAGE plpgsql AS $$
DECLARE
	hold soak.hold;
BEGIN
	DELETE FROM soak.hold h
	 WHERE h.ctid = (SELECT f.ctid FROM soak.hold f WHERE f.client = _client AND f.settle_at <= clock_timestamp()
					  ORDER BY f.settle_at LIMIT 1)
	RETURNING * INTO hold;
	IF hold.account IS NOT NULL THEN
		BEGIN
			IF hold.checked THEN
				PERFORM credit_lease.lease_track(hold.account, hold.reservation_id, trunc(random()::numeric * 4 * hold.amount, 3));
			ELSE
				PERFORM credit_lease.lease_settle(hold.account, hold.reservation_id, trunc(random()::numeric * (hold.amount + 1), 3));
			END IF;
		EXCEPTION WHEN OTHERS THEN
			INSERT INTO soak.failure VALUES ('settle', SQLSTATE, SQLERRM);
		END;
	END IF;
END $$;
