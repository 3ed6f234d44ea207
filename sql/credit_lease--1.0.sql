/*
 * credit_lease 1.0
 *
 * Rules of this script: the schema is created bare, so that a schema which
 * somebody has prepared makes the installation fail instead of being trusted;
 * nothing is created IF NOT EXISTS or OR REPLACE; every name is qualified;
 * every routine has a fixed search_path; nothing is granted to PUBLIC; every
 * table and sequence is dumped with its rows; every object has a comment.
 *
 * Every statement of a call names account with equality, and account is in
 * every key: it is the lock scope, the idempotency scope and the shard key.
 * What sweeps or supplies all accounts lists candidates first, and then takes
 * them one by one.
 */

-- complain if the script is sourced in psql rather than by CREATE EXTENSION
\echo Use "CREATE EXTENSION credit_lease" to load this file. \quit

CREATE SCHEMA credit_lease;
COMMENT ON SCHEMA credit_lease IS 'prepaid credits: tranches, holds and the ledger';

----------------------------------------------------------------------
-- Storage
----------------------------------------------------------------------

CREATE SEQUENCE credit_lease.tranche_id_seq;
COMMENT ON SEQUENCE credit_lease.tranche_id_seq IS 'numbers tranches, and chunks with them';
CREATE SEQUENCE credit_lease.reservation_id_seq;
COMMENT ON SEQUENCE credit_lease.reservation_id_seq IS 'numbers reservations';
CREATE SEQUENCE credit_lease.entry_id_seq;
COMMENT ON SEQUENCE credit_lease.entry_id_seq IS 'numbers ledger entries; rises within an account';

CREATE TABLE credit_lease.account (
	account text COLLATE "C" PRIMARY KEY,
	frozen boolean NOT NULL DEFAULT false,
	striped boolean NOT NULL DEFAULT false,
	created_at timestamptz NOT NULL
);
COMMENT ON TABLE credit_lease.account IS 'accounts that have or had credit; every call that changes anything of an account locks its row first, or one of its stripes';
COMMENT ON COLUMN credit_lease.account.frozen IS 'frozen_pool has rows of it';
COMMENT ON COLUMN credit_lease.account.striped IS 'striped_pool has rows of it';

CREATE TABLE credit_lease.striped_pool (
	account text COLLATE "C" NOT NULL,
	credit text COLLATE "C" NOT NULL,
	stripes integer NOT NULL CHECK (stripes BETWEEN 2 AND 64),
	PRIMARY KEY (account, credit)
);
COMMENT ON TABLE credit_lease.striped_pool IS 'pools whose tranches are kept in several rows, so that as many calls can spend at a time';
COMMENT ON COLUMN credit_lease.striped_pool.stripes IS 'how many; what was asked for is in policy';

CREATE TABLE credit_lease.stripe (
	account text COLLATE "C" NOT NULL,
	stripe integer NOT NULL,
	frozen boolean NOT NULL,
	room character(800) NOT NULL DEFAULT '',
	PRIMARY KEY (account, stripe)
) WITH (fillfactor = 10);
COMMENT ON TABLE credit_lease.stripe IS 'what calls lock in place of the account in its striped pools, one of them each; as many as the pool with the most has';
COMMENT ON COLUMN credit_lease.stripe.frozen IS 'as account.frozen';
COMMENT ON COLUMN credit_lease.stripe.room IS 'keeps each row on a page of its own: sessions that lock different rows of one page queue for the page';

-- No CHECK on the amounts, on purpose: every call proves the equation of the
-- rows that it reads and of those that it writes (LC009), and lease_verify()
-- names whoever went round it; a constraint would prove it a third time, on
-- the hottest row there is.
CREATE TABLE credit_lease.tranche (
	account text COLLATE "C" NOT NULL,
	credit text COLLATE "C" NOT NULL,
	tranche_id bigint NOT NULL DEFAULT pg_catalog.nextval('credit_lease.tranche_id_seq'),
	kind text NOT NULL,
	priority integer NOT NULL,
	created_at timestamptz NOT NULL,
	expires_at timestamptz,
	server text COLLATE "C",
	lease_id text COLLATE "C",
	released_at timestamptz,
	refill_below numeric,
	refresh_at timestamptz,
	hold_expires_at timestamptz,
	open boolean NOT NULL,
	granted numeric NOT NULL DEFAULT 0,
	chunked numeric NOT NULL DEFAULT 0,
	reserved numeric NOT NULL DEFAULT 0,
	remaining numeric NOT NULL DEFAULT 0,
	consumed numeric NOT NULL DEFAULT 0,
	expired numeric NOT NULL DEFAULT 0,
	returned numeric NOT NULL DEFAULT 0,
	revoked numeric NOT NULL DEFAULT 0,
	striped numeric NOT NULL DEFAULT 0,
	overdrawn numeric NOT NULL DEFAULT 0,
	trusted_until timestamptz,
	PRIMARY KEY (account, credit, tranche_id)
) WITH (fillfactor = 70);	-- room for HOT updates
ALTER SEQUENCE credit_lease.tranche_id_seq OWNED BY credit_lease.tranche.tranche_id;
-- No index holds a column that a spend changes, so that spends stay HOT.
CREATE INDEX tranche_open ON credit_lease.tranche (account, credit, tranche_id) WHERE open;
CREATE INDEX tranche_expiry ON credit_lease.tranche (expires_at) WHERE open;
CREATE UNIQUE INDEX tranche_lease ON credit_lease.tranche (lease_id, account, credit) WHERE kind = 'upstream';
CREATE INDEX tranche_leased ON credit_lease.tranche (expires_at) WHERE kind = 'upstream' AND released_at IS NULL;
CREATE INDEX tranche_slot ON credit_lease.tranche (account, credit, expires_at) WHERE kind = 'upstream';
CREATE UNIQUE INDEX tranche_mirror ON credit_lease.tranche (account, credit, server) NULLS NOT DISTINCT WHERE kind = 'mirror';

COMMENT ON TABLE credit_lease.tranche IS 'amounts of credit that pools draw on: granted = remaining + reserved + chunked + consumed + expired + returned + revoked + striped';
COMMENT ON COLUMN credit_lease.tranche.kind IS 'grant: topped up here; upstream: a lease, set aside for us by an upstream; mirror: a balance that lives elsewhere, see mirror';
COMMENT ON COLUMN credit_lease.tranche.priority IS 'the lowest burns first, then the soonest expiry, then the oldest';
COMMENT ON COLUMN credit_lease.tranche.expires_at IS 'from this instant nothing of it can be spent; NULL for never';
COMMENT ON COLUMN credit_lease.tranche.server IS 'the foreign server that a lease or a balance came from; NULL for one that was told without';
COMMENT ON COLUMN credit_lease.tranche.lease_id IS 'the upstream''s name of a lease; NULL for any other kind';
COMMENT ON COLUMN credit_lease.tranche.released_at IS 'when a lease was released: since then nothing of it can be spent but what was held';
COMMENT ON COLUMN credit_lease.tranche.refill_below IS 'the worker asks for more of the lease, or for the balance of the mirror, when no more than this remains; NULL for one that it does not look after';
COMMENT ON COLUMN credit_lease.tranche.refresh_at IS 'the worker asks from then on that a lease in use may live longer';
COMMENT ON COLUMN credit_lease.tranche.hold_expires_at IS 'none of its holds expires earlier; NULL when it never had one';
COMMENT ON COLUMN credit_lease.tranche.open IS 'something is left, held or carved out, or it is a mirror; only open tranches are read by calls';
COMMENT ON COLUMN credit_lease.tranche.remaining IS 'can be spent or held, until expires_at';
COMMENT ON COLUMN credit_lease.tranche.reserved IS 'in holds';
COMMENT ON COLUMN credit_lease.tranche.chunked IS 'carved out for owners';
COMMENT ON COLUMN credit_lease.tranche.consumed IS 'spent, less refunds';
COMMENT ON COLUMN credit_lease.tranche.expired IS 'was left when the tranche expired';
COMMENT ON COLUMN credit_lease.tranche.returned IS 'given back to where it was leased: what remained at the release, and what came back later; or came back to a mirror that was overdrawn';
COMMENT ON COLUMN credit_lease.tranche.revoked IS 'taken away by an adjustment, or by a checkpoint';
COMMENT ON COLUMN credit_lease.tranche.striped IS 'kept in tranche_stripe: there, too, are terms of it; see whole_tranche';
COMMENT ON COLUMN credit_lease.tranche.overdrawn IS 'mirror: by how much less than nothing remains, as others have spent of the same balance; no term of the sum';
COMMENT ON COLUMN credit_lease.tranche.trusted_until IS 'mirror: from this instant nothing of it can be spent, as its checkpoint is too old; NULL for never';
COMMENT ON INDEX credit_lease.tranche_open IS 'the hot path: the tranches a pool can draw on';
COMMENT ON INDEX credit_lease.tranche_expiry IS 'the sweep: what has expired';
COMMENT ON INDEX credit_lease.tranche_lease IS 'a lease is installed once in its pool, for ever; and is not for two pools';
COMMENT ON INDEX credit_lease.tranche_leased IS 'the leases that are alive';
COMMENT ON INDEX credit_lease.tranche_slot IS 'the leases of a pool that are alive, used up or not';
COMMENT ON INDEX credit_lease.tranche_mirror IS 'a pool has one mirror of each server, and one of none';

-- What was held in one stripe may be settled in another, and refunded in a
-- third: of a stripe alone those terms say what was done there, and can be
-- negative. Their sums cannot, nor can what remains.
CREATE TABLE credit_lease.tranche_stripe (
	account text COLLATE "C" NOT NULL,
	credit text COLLATE "C" NOT NULL,
	stripe integer NOT NULL,
	tranche_id bigint NOT NULL,
	granted numeric NOT NULL DEFAULT 0,
	chunked numeric NOT NULL DEFAULT 0,
	reserved numeric NOT NULL DEFAULT 0,
	remaining numeric NOT NULL DEFAULT 0,
	consumed numeric NOT NULL DEFAULT 0,
	expired numeric NOT NULL DEFAULT 0,
	returned numeric NOT NULL DEFAULT 0,
	revoked numeric NOT NULL DEFAULT 0,
	PRIMARY KEY (account, credit, stripe, tranche_id)
) WITH (fillfactor = 10);	-- room for HOT updates, and few rows on a page, as for stripe
COMMENT ON TABLE credit_lease.tranche_stripe IS 'the parts of the tranches of striped pools, a row for each open tranche and each stripe of the account; changed under the lock of its stripe';
COMMENT ON COLUMN credit_lease.tranche_stripe.granted IS 'the share of the tranche that was moved here: the sum of the other terms; the shares of all stripes are tranche.striped';
COMMENT ON COLUMN credit_lease.tranche_stripe.remaining IS 'can be spent or held by a call that has locked the stripe';
COMMENT ON COLUMN credit_lease.tranche_stripe.reserved IS 'was held here, less what of any hold was ended here';

CREATE VIEW credit_lease.whole_tranche AS
SELECT t.account, t.credit, t.tranche_id, t.kind, t.priority, t.created_at, t.expires_at, t.server, t.lease_id, t.released_at,
	   t.refill_below, t.refresh_at, t.open, t.granted,
	   t.chunked + s.chunked AS chunked, t.reserved + s.reserved AS reserved, t.remaining + s.remaining AS remaining,
	   t.consumed + s.consumed AS consumed, t.expired + s.expired AS expired, t.returned + s.returned AS returned,
	   t.revoked + s.revoked AS revoked, t.overdrawn, t.trusted_until
  FROM credit_lease.tranche t,
	   LATERAL (SELECT coalesce(sum(p.chunked), 0) AS chunked, coalesce(sum(p.reserved), 0) AS reserved,
			coalesce(sum(p.remaining), 0) AS remaining, coalesce(sum(p.consumed), 0) AS consumed,
			coalesce(sum(p.expired), 0) AS expired, coalesce(sum(p.returned), 0) AS returned, coalesce(sum(p.revoked), 0) AS revoked
		  FROM credit_lease.tranche_stripe p
		 WHERE p.account = t.account AND p.credit = t.credit AND p.tranche_id = t.tranche_id) s;
COMMENT ON VIEW credit_lease.whole_tranche IS 'tranches with all that is kept in their stripes: granted = remaining + reserved + chunked + consumed + expired + returned + revoked';

CREATE TABLE credit_lease.reservation (
	account text COLLATE "C" NOT NULL,
	reservation_id bigint NOT NULL DEFAULT pg_catalog.nextval('credit_lease.reservation_id_seq'),
	credit text COLLATE "C" NOT NULL,
	status text NOT NULL DEFAULT 'held',
	amount numeric NOT NULL,
	tranche_ids bigint[] NOT NULL,
	tranche_amounts numeric[] NOT NULL,
	created_at timestamptz NOT NULL,
	expires_at timestamptz NOT NULL,
	metadata jsonb,
	ended_at timestamptz,
	consumed numeric,
	refunded numeric,
	shortfall numeric,
	overage text,
	end_entry_id bigint,
	feature text,
	quantity numeric,
	rate numeric,
	unit numeric,
	event text,
	tracked numeric,
	traits jsonb,
	track_entry_id bigint,
	PRIMARY KEY (account, reservation_id),
	CHECK (status IN ('held', 'settled', 'cancelled', 'expired')),
	CHECK (num_nulls(feature, quantity, rate, unit, event) IN (0, 5)),
	CHECK ((tracked IS NULL) = (track_entry_id IS NULL))
);
ALTER SEQUENCE credit_lease.reservation_id_seq OWNED BY credit_lease.reservation.reservation_id;
CREATE INDEX reservation_held ON credit_lease.reservation (account, credit, expires_at) WHERE status = 'held';
CREATE INDEX reservation_expiry ON credit_lease.reservation (expires_at) WHERE status = 'held';

COMMENT ON TABLE credit_lease.reservation IS 'holds and how each ended: settled, cancelled or expired, exactly once';
COMMENT ON COLUMN credit_lease.reservation.amount IS 'what is or was held, added amounts included';
COMMENT ON COLUMN credit_lease.reservation.tranche_ids IS 'the tranches it came from';
COMMENT ON COLUMN credit_lease.reservation.tranche_amounts IS 'how much came from each of them';
COMMENT ON COLUMN credit_lease.reservation.consumed IS 'spent by the settlement, overage included; or by lease_track() after it had expired';
COMMENT ON COLUMN credit_lease.reservation.refunded IS 'came back to what the pool can spend; what came back to an expired or released tranche, or to an overdrawn mirror, did not';
COMMENT ON COLUMN credit_lease.reservation.shortfall IS 'asked for at settlement and not there';
COMMENT ON COLUMN credit_lease.reservation.overage IS 'the overage word of the settlement';
COMMENT ON COLUMN credit_lease.reservation.end_entry_id IS 'the first ledger entry of the call that ended it';
COMMENT ON COLUMN credit_lease.reservation.feature IS 'what lease_check() was asked for; NULL for any other hold';
COMMENT ON COLUMN credit_lease.reservation.quantity IS 'how much of it, in units of the feature';
COMMENT ON COLUMN credit_lease.reservation.rate IS 'what a unit costs, from the check to the end';
COMMENT ON COLUMN credit_lease.reservation.unit IS 'what the cost is rounded up to a multiple of';
COMMENT ON COLUMN credit_lease.reservation.event IS 'what the usage is reported as';
COMMENT ON COLUMN credit_lease.reservation.tracked IS 'the quantity that lease_track() was told; NULL until then';
COMMENT ON COLUMN credit_lease.reservation.track_entry_id IS 'the first ledger entry of lease_track(), or a number between those before and after it';
COMMENT ON INDEX credit_lease.reservation_held IS 'the holds of a pool by expiry';
COMMENT ON INDEX credit_lease.reservation_expiry IS 'the sweep: expired holds of every pool';

-- A tranche of its own, in a table of its own: it is locked by itself, and what
-- is carved out of other tranches is not granted twice. As with tranches, no
-- CHECK on the amounts, and no index on a column that a spend changes.
CREATE TABLE credit_lease.chunk (
	account text COLLATE "C" NOT NULL,
	chunk_id bigint NOT NULL,
	credit text COLLATE "C" NOT NULL,
	owner text NOT NULL,
	status text NOT NULL DEFAULT 'live',
	granted numeric NOT NULL,
	remaining numeric NOT NULL,
	consumed numeric NOT NULL DEFAULT 0,
	returned numeric NOT NULL DEFAULT 0,
	created_at timestamptz NOT NULL,
	expires_at timestamptz NOT NULL,
	ended_at timestamptz,
	tranche_ids bigint[] NOT NULL,
	tranche_amounts numeric[] NOT NULL,
	session text COLLATE "C",
	accepted numeric,
	units bigint,
	deposited numeric,
	PRIMARY KEY (account, chunk_id),
	CHECK (status IN ('live', 'expired', 'released'))
) WITH (fillfactor = 50);	-- room for HOT updates of all that share a page
CREATE INDEX chunk_live ON credit_lease.chunk (account, credit, expires_at) WHERE status = 'live';
CREATE INDEX chunk_expiry ON credit_lease.chunk (expires_at) WHERE status = 'live';
CREATE UNIQUE INDEX chunk_session ON credit_lease.chunk (account, session) WHERE session IS NOT NULL;

COMMENT ON TABLE credit_lease.chunk IS 'amounts carved out of tranches, each for one owner or as the deposit of a session, and how each ended: released or expired, exactly once; granted = remaining + consumed + returned';
COMMENT ON COLUMN credit_lease.chunk.chunk_id IS 'a number that no tranche has';
COMMENT ON COLUMN credit_lease.chunk.owner IS 'who alone can spend of it; the name of a session';
COMMENT ON COLUMN credit_lease.chunk.remaining IS 'can be spent by the owner, until expires_at; 0 once it has ended';
COMMENT ON COLUMN credit_lease.chunk.returned IS 'what was not spent when it ended, and went back to its tranches';
COMMENT ON COLUMN credit_lease.chunk.tranche_ids IS 'the tranches it came from, in the order in which it spends them';
COMMENT ON COLUMN credit_lease.chunk.tranche_amounts IS 'how much came from each of them';
COMMENT ON COLUMN credit_lease.chunk.session IS 'the name of a session, a chunk for cumulative spending: consumed <= accepted <= granted, its deposit; NULL for a plain chunk';
COMMENT ON COLUMN credit_lease.chunk.accepted IS 'session: how much of it may be spent in all; only ever rises';
COMMENT ON COLUMN credit_lease.chunk.units IS 'session: how many charges were applied';
COMMENT ON COLUMN credit_lease.chunk.deposited IS 'session: what it was opened with';
COMMENT ON INDEX credit_lease.chunk_session IS 'a name stands for one session of its account, for ever';
COMMENT ON INDEX credit_lease.chunk_live IS 'the chunks of a pool by expiry';
COMMENT ON INDEX credit_lease.chunk_expiry IS 'the sweep: expired chunks of every pool';

CREATE TABLE credit_lease.ledger (
	entry_id bigint NOT NULL DEFAULT pg_catalog.nextval('credit_lease.entry_id_seq'),
	created_at timestamptz NOT NULL,
	tranche_id bigint,
	reservation_id bigint,
	first_entry_id bigint,
	refund_of bigint,
	parts integer,
	account text COLLATE "C" NOT NULL,
	credit text COLLATE "C" NOT NULL,
	kind text NOT NULL,
	amount numeric NOT NULL,
	released numeric,
	lapsed numeric,
	returned numeric,
	available numeric NOT NULL,
	idempotency_key text COLLATE "C",
	request jsonb,
	metadata jsonb,
	reason text,
	created_by text NOT NULL DEFAULT SESSION_USER,
	PRIMARY KEY (account, entry_id)
);
ALTER SEQUENCE credit_lease.entry_id_seq OWNED BY credit_lease.ledger.entry_id;
CREATE UNIQUE INDEX ledger_key ON credit_lease.ledger (account, idempotency_key) WHERE idempotency_key IS NOT NULL;

COMMENT ON TABLE credit_lease.ledger IS 'append-only: one row for each tranche that a call touched';
COMMENT ON COLUMN credit_lease.ledger.kind IS 'topup, consume, reserve, renew, settle, track, cancel, expire, refund, adjust, install, extend, release, sync, chunk, chunk_release, chunk_expire, session, session_charge, session_close or session_expire; shortfall for what could not be spent and was recorded';
COMMENT ON COLUMN credit_lease.ledger.tranche_id IS 'the tranche; the chunk or the session, where it was spent of one; NULL for a shortfall';
COMMENT ON COLUMN credit_lease.ledger.reservation_id IS 'the hold; the chunk or the session, for what was carved out as one, spent of it, or came back from it';
COMMENT ON COLUMN credit_lease.ledger.amount IS 'what the call did to this tranche, in its own word: granted, consumed, held, given back, returned, carved out; negative only where an adjustment, or a checkpoint, took away';
COMMENT ON COLUMN credit_lease.ledger.released IS 'settle, track, and the end of a chunk or a session: what came back to the pool; negative for what was taken from it above the hold';
COMMENT ON COLUMN credit_lease.ledger.lapsed IS 'what came back to the tranche after it had expired, and expired with it';
COMMENT ON COLUMN credit_lease.ledger.returned IS 'what came back to the tranche after its lease was released, and was returned with it; or while the mirror was overdrawn';
COMMENT ON COLUMN credit_lease.ledger.available IS 'what the pool could spend after the call; the chunk or the session, where it was spent of one';
COMMENT ON COLUMN credit_lease.ledger.idempotency_key IS 'on the first row of a call';
COMMENT ON COLUMN credit_lease.ledger.request IS 'the arguments of a call with a key, as far as no other column has them';
COMMENT ON COLUMN credit_lease.ledger.first_entry_id IS 'the first row of the call, where this is another';
COMMENT ON COLUMN credit_lease.ledger.parts IS 'how many rows the call wrote, on the first where there are several';
COMMENT ON COLUMN credit_lease.ledger.refund_of IS 'the entry of which this gives back';
COMMENT ON INDEX credit_lease.ledger_key IS 'a key has at most one effect in its account, for ever';

CREATE TABLE credit_lease.refund (
	account text COLLATE "C" NOT NULL,
	entry_id bigint NOT NULL,
	amount numeric NOT NULL,
	PRIMARY KEY (account, entry_id)
);
COMMENT ON TABLE credit_lease.refund IS 'how much of an entry all its refunds together have given back';

CREATE TABLE credit_lease.frozen_pool (
	account text COLLATE "C" NOT NULL,
	credit text COLLATE "C",
	reason text,
	frozen_at timestamptz NOT NULL,
	frozen_by text NOT NULL DEFAULT SESSION_USER,
	UNIQUE NULLS NOT DISTINCT (account, credit)
);
COMMENT ON TABLE credit_lease.frozen_pool IS 'pools that lease_freeze() has stopped; credit NULL for the whole account';

CREATE TABLE credit_lease.set_aside (
	account text COLLATE "C" NOT NULL,
	credit text COLLATE "C" NOT NULL,
	failed_at timestamptz NOT NULL,
	error text NOT NULL,
	PRIMARY KEY (account, credit)
);
COMMENT ON TABLE credit_lease.set_aside IS 'pools that could not be swept because their books do not balance; tried again after a minute';

CREATE TABLE credit_lease.policy (
	account text COLLATE "C" CHECK (account <> ''),
	credit text COLLATE "C" CHECK (credit <> ''),
	server text COLLATE "C",
	company_id text CHECK (length(company_id) > 0),
	credit_type_id text CHECK (length(credit_type_id) > 0),
	event text CHECK (length(event) > 0),
	lease_size numeric CHECK (lease_size > 0 AND lease_size < 1e26),
	lease_duration interval CHECK (lease_duration >= '1 second' AND lease_duration <= '1 year'),
	low_water_mark numeric CHECK (low_water_mark >= 0 AND low_water_mark < 1),
	safety_margin interval CHECK (safety_margin >= '0' AND safety_margin <= '1 day'),
	hold_ttl interval CHECK (hold_ttl > '0' AND hold_ttl <= '10 years'),
	failure_mode text CHECK (failure_mode IN ('closed', 'open')),
	smallest_unit numeric CHECK (smallest_unit >= 1e-12 AND smallest_unit < 1e26 AND min_scale(smallest_unit) <= 12),
	stripes integer CHECK (stripes BETWEEN 1 AND 64),
	sync_interval interval CHECK (sync_interval >= '1 second' AND sync_interval <= '1 year'),
	max_staleness interval CHECK (max_staleness > '0' AND max_staleness <= '10 years'),
	UNIQUE NULLS NOT DISTINCT (account, credit)
);
COMMENT ON TABLE credit_lease.policy IS 'settings by pool: NULL stands for every account, every credit; for each setting the most specific row that has a value decides, the account before the credit; see lease_policy()';
COMMENT ON COLUMN credit_lease.policy.server IS 'the upstream that the pool is supplied from, a foreign server; from none where no row has one';
COMMENT ON COLUMN credit_lease.policy.company_id IS 'the upstream''s name of the account; the account''s own where no row has one';
COMMENT ON COLUMN credit_lease.policy.credit_type_id IS 'the upstream''s name of the credit; the credit''s own where no row has one';
COMMENT ON COLUMN credit_lease.policy.event IS 'what usage is reported as; the credit''s name where no row has one';
COMMENT ON COLUMN credit_lease.policy.lease_size IS 'how much to lease at a time; 10000 where no row says';
COMMENT ON COLUMN credit_lease.policy.lease_duration IS 'for how long; 5 minutes where no row says';
COMMENT ON COLUMN credit_lease.policy.low_water_mark IS 'more is asked for when no more than this part of what the last grant left remains; 0.25 where no row says';
COMMENT ON COLUMN credit_lease.policy.safety_margin IS 'how long before its end a lease stops serving, for clocks that disagree; 0 where no row says';
COMMENT ON COLUMN credit_lease.policy.hold_ttl IS 'how long a hold lives when the call does not say; 60 seconds where no row does';
COMMENT ON COLUMN credit_lease.policy.failure_mode IS 'closed: lease_check() denies who has not enough credit; open: it lets them pass; closed where no row says';
COMMENT ON COLUMN credit_lease.policy.smallest_unit IS 'lease_check() and lease_track() round amounts up to a multiple of it; 0.000000000001 where no row says';
COMMENT ON COLUMN credit_lease.policy.stripes IS 'in how many rows each tranche of the pool is kept, so that as many calls can spend of it at a time; 1 where no row says; 1 for a pool with a mirror';
COMMENT ON COLUMN credit_lease.policy.sync_interval IS 'how often the worker asks for the balance of a mirror, at least; 1 minute where no row says';
COMMENT ON COLUMN credit_lease.policy.max_staleness IS 'how old the checkpoint of a mirror may be, if failure_mode is closed; as old as can be where no row says; counts from the next checkpoint on';

-- A rule is kept by its name: a regprocedure would stand in the way of
-- pg_upgrade.
CREATE TABLE credit_lease.meter (
	feature text COLLATE "C" NOT NULL CHECK (octet_length(feature) BETWEEN 1 AND 512),
	credit text COLLATE "C" CHECK (octet_length(credit) BETWEEN 1 AND 512),
	rate numeric CHECK (rate > 0 AND rate < 1e26 AND min_scale(rate) <= 24),
	event text CHECK (octet_length(event) BETWEEN 1 AND 512),
	preference integer NOT NULL DEFAULT 100,
	valid_from timestamptz NOT NULL DEFAULT '-infinity',
	valid_until timestamptz,
	rule text,
	UNIQUE NULLS NOT DISTINCT (feature, credit, valid_from),
	CHECK ((credit IS NULL) = (rate IS NULL)),
	CHECK (valid_from < valid_until)
);
COMMENT ON TABLE credit_lease.meter IS 'what a unit of a feature costs: a row for each credit that may pay for it; of rows for the same credit the latest that is valid counts';
COMMENT ON COLUMN credit_lease.meter.credit IS 'NULL for a feature that costs nothing, where the rule alone decides';
COMMENT ON COLUMN credit_lease.meter.rate IS 'credits for one unit';
COMMENT ON COLUMN credit_lease.meter.event IS 'what the usage is reported as; what the policy says where it is NULL';
COMMENT ON COLUMN credit_lease.meter.preference IS 'where several credits would do, the lowest pays';
COMMENT ON COLUMN credit_lease.meter.valid_from IS 'from this instant on it is what new holds are made by';
COMMENT ON COLUMN credit_lease.meter.valid_until IS 'until before this instant; NULL for ever';
COMMENT ON COLUMN credit_lease.meter.rule IS 'a function, with its schema: (account text, feature text, quantity numeric, available numeric, subject jsonb) returning (allowed boolean, reason text); it runs as whoever calls lease_check()';

-- What is to be asked of an upstream: committed before it is asked, removed
-- with the transaction that takes in the answer.
CREATE TABLE credit_lease.upstream_request (
	account text COLLATE "C" NOT NULL,
	credit text COLLATE "C" NOT NULL,
	kind text NOT NULL CHECK (kind IN ('acquire', 'extend', 'release', 'balance')),
	lease_id text COLLATE "C",
	server text COLLATE "C" NOT NULL,
	company_id text NOT NULL,
	credit_type_id text NOT NULL,
	amount numeric,
	expires_at timestamptz,
	idempotency_key uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
	created_at timestamptz NOT NULL,
	next_try_at timestamptz NOT NULL,
	attempts integer NOT NULL DEFAULT 0,
	refused boolean NOT NULL DEFAULT false,
	error text,
	asked_at timestamptz,
	acknowledged numeric,
	UNIQUE NULLS NOT DISTINCT (account, credit, kind, lease_id)
);
CREATE INDEX upstream_request_due ON credit_lease.upstream_request (next_try_at);
COMMENT ON TABLE credit_lease.upstream_request IS 'what the worker is to ask of upstreams, and has no answer to yet; also what was refused, for about a minute';
COMMENT ON COLUMN credit_lease.upstream_request.expires_at IS 'until when the lease is asked for; release: until when it lives anyway';
COMMENT ON COLUMN credit_lease.upstream_request.idempotency_key IS 'is sent again with each try';
COMMENT ON COLUMN credit_lease.upstream_request.refused IS 'the upstream has refused it, or what it answered was of no use; it is not asked again before next_try_at, nor unless somebody needs it then';
COMMENT ON COLUMN credit_lease.upstream_request.error IS 'how the last try failed';
COMMENT ON COLUMN credit_lease.upstream_request.asked_at IS 'balance: when it was asked for last';
COMMENT ON COLUMN credit_lease.upstream_request.acknowledged IS 'balance: what lease_usage had there then, so that the answer includes that much';
COMMENT ON INDEX credit_lease.upstream_request_due IS 'the worker: what to ask next';

CREATE TABLE credit_lease.lease_usage (
	account text COLLATE "C" NOT NULL,
	credit text COLLATE "C" NOT NULL,
	tranche_id bigint NOT NULL,
	company_id text,
	entry_id bigint NOT NULL DEFAULT 0,
	consumed numeric NOT NULL DEFAULT 0,
	owed numeric NOT NULL DEFAULT 0,
	upstream_balance numeric,
	complete boolean NOT NULL DEFAULT false,
	total numeric NOT NULL DEFAULT 0,
	acknowledged numeric NOT NULL DEFAULT 0,
	PRIMARY KEY (account, credit, tranche_id)
);
CREATE INDEX lease_usage_incomplete ON credit_lease.lease_usage (account, credit, tranche_id) WHERE NOT complete;
COMMENT ON TABLE credit_lease.lease_usage IS 'how far the ledger has been read for reports, for each lease and mirror of a server';
COMMENT ON COLUMN credit_lease.lease_usage.company_id IS 'the upstream''s name of the account; NULL for a lease or a mirror that was told by hand';
COMMENT ON COLUMN credit_lease.lease_usage.entry_id IS 'entries up to this one have been read';
COMMENT ON COLUMN credit_lease.lease_usage.consumed IS 'their sum: what was spent of the lease, less refunds';
COMMENT ON COLUMN credit_lease.lease_usage.owed IS 'refunded after it was reported: taken off the next reports of the lease';
COMMENT ON COLUMN credit_lease.lease_usage.upstream_balance IS 'what the upstream had beyond the lease when it last said so; 0 when it granted less than it was asked for';
COMMENT ON COLUMN credit_lease.lease_usage.complete IS 'the lease has ended and all its usage has been read';
COMMENT ON COLUMN credit_lease.lease_usage.total IS 'what of it was, or is to be, reported as a running total';
COMMENT ON COLUMN credit_lease.lease_usage.acknowledged IS 'mirror: what the upstream has taken of its usage, in credits';
COMMENT ON INDEX credit_lease.lease_usage_incomplete IS 'the worker: leases that may have usage to report';

CREATE TABLE credit_lease.usage_report (
	account text COLLATE "C" NOT NULL,
	entry_id bigint NOT NULL,
	credit text COLLATE "C" NOT NULL,
	tranche_id bigint,
	server text COLLATE "C" NOT NULL,
	lease_id text COLLATE "C",
	company_id text NOT NULL,
	event text NOT NULL,
	quantity numeric NOT NULL CHECK (quantity > 0),
	traits jsonb,
	created_at timestamptz NOT NULL,
	idempotency_key text NOT NULL,
	lane integer NOT NULL,
	refused_at timestamptz,
	error text,
	credit_type_id text NOT NULL,
	credits numeric,
	cumulative boolean NOT NULL DEFAULT false,
	PRIMARY KEY (account, entry_id)
);
CREATE INDEX usage_report_due ON credit_lease.usage_report (server, lane, entry_id) WHERE refused_at IS NULL;
CREATE INDEX usage_report_tranche ON credit_lease.usage_report (account, credit, tranche_id) WHERE refused_at IS NULL;
COMMENT ON TABLE credit_lease.usage_report IS 'usage that is to be reported to an upstream; a row leaves when the upstream has taken it, and stays when it has refused it for good';
COMMENT ON COLUMN credit_lease.usage_report.entry_id IS 'the ledger entry; or what reservation.track_entry_id has';
COMMENT ON COLUMN credit_lease.usage_report.lease_id IS 'the lease that has paid, or the first of them; NULL where none has, or a mirror';
COMMENT ON COLUMN credit_lease.usage_report.quantity IS 'credits; units of the feature for what lease_track() was told, unless the part is too small for any; the running total, where it is one';
COMMENT ON COLUMN credit_lease.usage_report.traits IS 'what lease_track() was told of it';
COMMENT ON COLUMN credit_lease.usage_report.idempotency_key IS 'by this the upstream counts it once: made of the lease, or of the account, the credit and the mirror, the entry and its time; or of the account, the reservation and its time';
COMMENT ON COLUMN credit_lease.usage_report.lane IS 'one request of each lane is under way to a server at a time; from 4 on it is sent alone, as it was in one that was refused';
COMMENT ON COLUMN credit_lease.usage_report.refused_at IS 'when it was refused for good';
COMMENT ON COLUMN credit_lease.usage_report.credits IS 'mirror: what of its usage the upstream has taken with it; what it refuses stays pending';
COMMENT ON COLUMN credit_lease.usage_report.cumulative IS 'the quantity is a running total of the lease or the mirror; a later one takes its place';
COMMENT ON INDEX credit_lease.usage_report_due IS 'the worker: what to report next';
COMMENT ON INDEX credit_lease.usage_report_tranche IS 'whether all usage of a lease has been reported, before it is released';

-- What is known of a balance that lives elsewhere. What the checkpoint
-- includes of what was spent here is kept as a sum, so that the next one has to
-- look only at what it does not.
CREATE TABLE credit_lease.mirror (
	account text COLLATE "C" NOT NULL,
	credit text COLLATE "C" NOT NULL,
	tranche_id bigint NOT NULL,
	balance numeric NOT NULL,
	as_of timestamptz NOT NULL,
	included numeric NOT NULL,
	entry_id bigint,
	synced_at timestamptz NOT NULL,
	poll_at timestamptz,
	PRIMARY KEY (account, credit, tranche_id)
);
COMMENT ON TABLE credit_lease.mirror IS 'the checkpoint of each mirror: remaining - overdrawn = balance - (consumed - included) - reserved - chunked';
COMMENT ON COLUMN credit_lease.mirror.balance IS 'what there was elsewhere';
COMMENT ON COLUMN credit_lease.mirror.as_of IS 'when';
COMMENT ON COLUMN credit_lease.mirror.included IS 'what of the usage of the tranche is taken off the balance already; the rest is pending';
COMMENT ON COLUMN credit_lease.mirror.entry_id IS 'usage up to this entry is included, and that of mirror_entry; NULL where it is what the upstream has acknowledged';
COMMENT ON COLUMN credit_lease.mirror.synced_at IS 'when the checkpoint came in';
COMMENT ON COLUMN credit_lease.mirror.poll_at IS 'the worker asks for the balance from then on; NULL for never';

CREATE TABLE credit_lease.mirror_entry (
	account text COLLATE "C" NOT NULL,
	tranche_id bigint NOT NULL,
	entry_id bigint NOT NULL,
	PRIMARY KEY (account, tranche_id, entry_id)
);
COMMENT ON TABLE credit_lease.mirror_entry IS 'entries beyond mirror.entry_id that the checkpoint includes all the same';

SELECT pg_catalog.pg_extension_config_dump('credit_lease.mirror', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.mirror_entry', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.account', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.striped_pool', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.stripe', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.tranche', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.tranche_stripe', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.reservation', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.chunk', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.ledger', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.refund', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.frozen_pool', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.set_aside', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.policy', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.meter', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.upstream_request', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.lease_usage', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.usage_report', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.tranche_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.reservation_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('credit_lease.entry_id_seq', '');

-- The guard fires in every session_replication_role. It protects the rows
-- against mistakes; whoever distributes the table may drop it.
CREATE FUNCTION credit_lease.ledger_guard() RETURNS trigger
	LANGUAGE c AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.ledger_guard() IS 'trigger: refuses every change of the ledger but appending';
CREATE TRIGGER ledger_guard BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_lease.ledger
	FOR EACH STATEMENT EXECUTE FUNCTION credit_lease.ledger_guard();
ALTER TABLE credit_lease.ledger ENABLE ALWAYS TRIGGER ledger_guard;
COMMENT ON TRIGGER ledger_guard ON credit_lease.ledger IS 'the ledger is append-only, even for its owner';

CREATE FUNCTION credit_lease.policy_guard() RETURNS trigger
	LANGUAGE c AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.policy_guard() IS 'trigger: refuses a server that is no upstream; lets sessions and the worker know that policies have changed';
CREATE TRIGGER policy_server BEFORE INSERT OR UPDATE OF server ON credit_lease.policy
	FOR EACH ROW WHEN (NEW.server IS NOT NULL) EXECUTE FUNCTION credit_lease.policy_guard();
COMMENT ON TRIGGER policy_server ON credit_lease.policy IS 'a server is a foreign server of the wrapper credit_lease';
CREATE TRIGGER policy_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON credit_lease.policy
	FOR EACH STATEMENT EXECUTE FUNCTION credit_lease.policy_guard();
ALTER TABLE credit_lease.policy ENABLE ALWAYS TRIGGER policy_changed;
COMMENT ON TRIGGER policy_changed ON credit_lease.policy IS 'sessions remember whether any policy has a server, or stripes';

CREATE FUNCTION credit_lease.policy_stripes() RETURNS trigger
	LANGUAGE c SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.policy_stripes() IS 'trigger: keeps a pool in as many stripes as its policy says';
CREATE TRIGGER policy_stripes AFTER INSERT OR UPDATE OR DELETE ON credit_lease.policy
	FOR EACH ROW EXECUTE FUNCTION credit_lease.policy_stripes();
COMMENT ON TRIGGER policy_stripes ON credit_lease.policy IS 'what is said of one pool is done at once';

CREATE FUNCTION credit_lease.meter_guard() RETURNS trigger
	LANGUAGE c AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.meter_guard() IS 'trigger: refuses a rule that is no such function';
CREATE TRIGGER meter_rule BEFORE INSERT OR UPDATE OF rule ON credit_lease.meter
	FOR EACH ROW WHEN (NEW.rule IS NOT NULL) EXECUTE FUNCTION credit_lease.meter_guard();
COMMENT ON TRIGGER meter_rule ON credit_lease.meter IS 'a rule is a function with the arguments and results of one';

----------------------------------------------------------------------
-- What people read
----------------------------------------------------------------------

CREATE FUNCTION credit_lease.lease_clock() RETURNS timestamptz
	LANGUAGE c STABLE PARALLEL RESTRICTED AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_clock() IS 'the instant by which everything expires: the server''s clock, or credit_lease.mock_now';

-- An expired hold or chunk that nobody has given back yet is counted as if
-- somebody had.
CREATE VIEW credit_lease.chunk_part AS
SELECT c.account, c.credit, c.chunk_id, c.expires_at, p.tranche_id, p.amount, p.spent
  FROM credit_lease.chunk c,
	   LATERAL (SELECT u.tranche_id, u.amount,
					   least(u.amount, greatest(c.consumed - (sum(u.amount) OVER (ORDER BY u.n) - u.amount), 0)) AS spent
				  FROM unnest(c.tranche_ids, c.tranche_amounts) WITH ORDINALITY AS u (tranche_id, amount, n)) AS p
 WHERE c.status = 'live';
COMMENT ON VIEW credit_lease.chunk_part IS 'which tranches live chunks and sessions are of: how much came from each, and how much of that is spent, though the tranche learns of it only at the end';

CREATE VIEW credit_lease.balance AS
WITH clock AS MATERIALIZED (SELECT credit_lease.lease_clock() AS now),
lapsed AS (
	SELECT r.account, r.credit, p.tranche_id, sum(p.amount) AS amount
	  FROM credit_lease.reservation r,
		   unnest(r.tranche_ids, r.tranche_amounts) AS p (tranche_id, amount)
	 WHERE r.status = 'held' AND r.expires_at <= (SELECT now FROM clock)
	 GROUP BY r.account, r.credit, p.tranche_id
),
carved AS (
	SELECT p.account, p.credit, p.tranche_id, sum(p.spent) AS spent,
		   coalesce(sum(p.amount - p.spent) FILTER (WHERE p.expires_at <= (SELECT now FROM clock)), 0) AS lapsed
	  FROM credit_lease.chunk_part p
	 GROUP BY p.account, p.credit, p.tranche_id
),
tranche AS (
	SELECT t.*, u.upstream_balance, coalesce(l.amount, 0) AS held, coalesce(c.spent, 0) AS spent, coalesce(c.lapsed, 0) AS carved,
		   greatest(t.remaining + coalesce(l.amount, 0) + coalesce(c.lapsed, 0) - t.overdrawn, 0) AS left_over,
		   m.balance AS checkpoint, m.included, m.as_of,
		   t.released_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > (SELECT now FROM clock))
			AND (t.trusted_until IS NULL OR t.trusted_until > (SELECT now FROM clock)) AS alive
	  FROM credit_lease.whole_tranche t
	  LEFT JOIN lapsed l ON l.account = t.account AND l.credit = t.credit AND l.tranche_id = t.tranche_id
	  LEFT JOIN carved c ON c.account = t.account AND c.credit = t.credit AND c.tranche_id = t.tranche_id
	  LEFT JOIN credit_lease.lease_usage u ON u.account = t.account AND u.credit = t.credit AND u.tranche_id = t.tranche_id
	  LEFT JOIN credit_lease.mirror m ON m.account = t.account AND m.credit = t.credit AND m.tranche_id = t.tranche_id
)
SELECT account, credit,
	   coalesce(sum(left_over) FILTER (WHERE alive), 0) AS available,
	   sum(reserved - held) AS reserved,
	   sum(chunked - spent - carved) AS chunked,
	   sum(consumed + spent) AS consumed,
	   sum(expired) + coalesce(sum(left_over) FILTER (WHERE NOT alive AND released_at IS NULL AND kind <> 'mirror'), 0) AS expired,
	   sum(granted) AS granted,
	   min(expires_at) FILTER (WHERE alive AND left_over > 0) AS next_expiry,
	   coalesce(sum(left_over) FILTER (WHERE alive AND kind = 'upstream'), 0) AS leased,
	   sum(upstream_balance) FILTER (WHERE alive) AS upstream_balance,
	   sum(checkpoint) AS checkpoint, sum(consumed + spent - included) AS pending,
	   min(as_of) AS checkpoint_as_of, (SELECT now FROM clock) - min(as_of) AS checkpoint_age
  FROM tranche
 GROUP BY account, credit;
COMMENT ON VIEW credit_lease.balance IS 'what every pool has, by the clock: what has expired is not counted, swept or not';
COMMENT ON COLUMN credit_lease.balance.available IS 'can be spent or held now';
COMMENT ON COLUMN credit_lease.balance.chunked IS 'can be spent by the owners of chunks, and of sessions';
COMMENT ON COLUMN credit_lease.balance.consumed IS 'spent, less refunds; of chunks and sessions too, as it happens';
COMMENT ON COLUMN credit_lease.balance.next_expiry IS 'when the first of it expires; NULL for never';
COMMENT ON COLUMN credit_lease.balance.leased IS 'the part of available that is from leases';
COMMENT ON COLUMN credit_lease.balance.upstream_balance IS 'what the upstream has beyond the leases that are alive, as it last said; NULL where it has not said';
COMMENT ON COLUMN credit_lease.balance.checkpoint IS 'the last balances that were told of its mirrors; NULL where it has none';
COMMENT ON COLUMN credit_lease.balance.pending IS 'what was spent of its mirrors here, and is not taken off their checkpoints yet';
COMMENT ON COLUMN credit_lease.balance.checkpoint_as_of IS 'when the oldest of the checkpoints was true';

CREATE VIEW credit_lease.open_lease AS
SELECT t.account, t.credit, t.tranche_id, t.kind, t.lease_id, NULL::text AS owner, t.server,
	   t.granted, t.remaining, t.reserved, t.priority, t.expires_at
  FROM credit_lease.whole_tranche t
 WHERE ((t.open AND (t.remaining <> 0 OR t.reserved <> 0 OR t.chunked <> 0)) OR t.kind = 'upstream') AND t.released_at IS NULL
   AND (t.expires_at IS NULL OR t.expires_at > (SELECT credit_lease.lease_clock()))
   AND (t.trusted_until IS NULL OR t.trusted_until > (SELECT credit_lease.lease_clock()))
UNION ALL
SELECT c.account, c.credit, c.chunk_id, CASE WHEN c.session IS NULL THEN 'chunk' ELSE 'session' END, NULL, c.owner, NULL, c.granted, c.remaining, 0, NULL, c.expires_at
  FROM credit_lease.chunk c
 WHERE c.status = 'live' AND c.expires_at > (SELECT credit_lease.lease_clock());
COMMENT ON VIEW credit_lease.open_lease IS 'every tranche that is alive by the clock and not used up, and leases that are, since they fill their slot; chunks and sessions too, as tranches of the kinds chunk and session';

-- A server has leases or mirrors; where it does not say, its dialect does.
CREATE VIEW credit_lease.upstream AS
SELECT s.srvname::text COLLATE "C" AS server, o.dialect,
	   coalesce(o.supply, CASE o.dialect WHEN 'metronome' THEN 'mirror' ELSE 'lease' END) AS supply,
	   coalesce(o.usage, 'events') AS usage
  FROM pg_foreign_server s
  JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw AND w.fdwname = 'credit_lease',
	   LATERAL (SELECT max(p.option_value) FILTER (WHERE p.option_name = 'dialect'),
					   max(p.option_value) FILTER (WHERE p.option_name = 'supply'),
					   max(p.option_value) FILTER (WHERE p.option_name = 'usage')
				  FROM pg_options_to_table(s.srvoptions) p) AS o (dialect, supply, usage);
COMMENT ON VIEW credit_lease.upstream IS 'every upstream, and how it supplies pools and is told of usage';
COMMENT ON COLUMN credit_lease.upstream.supply IS 'lease: it sets credit aside for us; mirror: it says what there is';
COMMENT ON COLUMN credit_lease.upstream.usage IS 'events: it is told of what was spent one by one; cumulative: as a running total';

CREATE VIEW credit_lease.open_reservation AS
SELECT r.account, r.reservation_id, r.credit, r.amount, r.created_at, r.expires_at, r.metadata, r.feature, r.quantity
  FROM credit_lease.reservation r
 WHERE r.status = 'held' AND r.expires_at > (SELECT credit_lease.lease_clock());
COMMENT ON VIEW credit_lease.open_reservation IS 'every hold that is alive by the clock';

CREATE VIEW credit_lease.expired_hold AS
SELECT r.account, r.reservation_id, r.credit, r.amount, r.created_at, r.expires_at,
	   r.ended_at AS reclaimed_at, r.refunded AS returned, r.metadata
  FROM credit_lease.reservation r
 WHERE r.status = 'expired'
	OR (r.status = 'held' AND r.expires_at <= (SELECT credit_lease.lease_clock()));
COMMENT ON VIEW credit_lease.expired_hold IS 'holds that expired, whose, and how much came back';
COMMENT ON COLUMN credit_lease.expired_hold.reclaimed_at IS 'when it was given back; NULL while nobody has come by';
COMMENT ON COLUMN credit_lease.expired_hold.returned IS 'what came back to the pool; the rest was of tranches that had expired too, been released or overdrawn';

CREATE TYPE credit_lease.worker_result AS (running boolean, state text, pid integer, started_at timestamptz,
	last_sweep timestamptz, holds bigint, last_error_at timestamptz, last_error text);
COMMENT ON TYPE credit_lease.worker_result IS 'what lease_worker() returns';
CREATE FUNCTION credit_lease.lease_worker() RETURNS credit_lease.worker_result
	LANGUAGE c VOLATILE PARALLEL RESTRICTED AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_worker() IS 'what the background worker of this database tells of itself, or why there is none';

CREATE VIEW credit_lease.worker_status AS
SELECT w.running, w.state, w.pid, w.started_at, w.last_sweep, w.holds,
	   coalesce(greatest(credit_lease.lease_clock() - o.expires_at, '0'), '0') AS lag,
	   (SELECT count(*) FROM credit_lease.set_aside) AS set_aside,
	   w.last_error_at, w.last_error
  FROM credit_lease.lease_worker() w,
	   (SELECT min(r.expires_at) FROM credit_lease.reservation r WHERE r.status = 'held') AS o (expires_at);
COMMENT ON VIEW credit_lease.worker_status IS 'the background worker of this database: what it did last, or why none runs';
COMMENT ON COLUMN credit_lease.worker_status.holds IS 'how many expired holds and chunks it has given back since it started';
COMMENT ON COLUMN credit_lease.worker_status.lag IS 'how long ago the oldest hold expired that nobody has given back; 0 for none';
COMMENT ON COLUMN credit_lease.worker_status.set_aside IS 'how many pools it leaves out because their books do not balance';

CREATE TYPE credit_lease.upstream_result AS (server text, in_flight integer, successes bigint, failures bigint,
	latency interval, back_off_until timestamptz, last_success_at timestamptz, last_error_at timestamptz, last_error text);
COMMENT ON TYPE credit_lease.upstream_result IS 'what lease_upstreams() returns';
CREATE FUNCTION credit_lease.lease_upstreams() RETURNS SETOF credit_lease.upstream_result
	LANGUAGE c VOLATILE PARALLEL RESTRICTED ROWS 4 AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_upstreams() IS 'what the worker of this database tells of the upstreams that it has asked since it started';

CREATE VIEW credit_lease.upstream_status AS
SELECT s.srvname AS server, coalesce(u.in_flight, 0) AS in_flight,
	   coalesce(u.successes, 0) AS successes, coalesce(u.failures, 0) AS failures, u.latency,
	   CASE WHEN u.back_off_until > pg_catalog.clock_timestamp() THEN u.back_off_until END AS back_off_until,
	   u.last_success_at, u.last_error_at, u.last_error,
	   (SELECT count(*) FROM credit_lease.upstream_request r WHERE r.server = s.srvname) AS requests,
	   (SELECT count(*) FROM credit_lease.usage_report r WHERE r.server = s.srvname AND r.refused_at IS NULL) AS reports,
	   (SELECT count(*) FROM credit_lease.usage_report r WHERE r.server = s.srvname AND r.refused_at IS NOT NULL) AS refused_reports
  FROM (SELECT f.srvname::text COLLATE "C" AS srvname
		  FROM pg_catalog.pg_foreign_server f
		  JOIN pg_catalog.pg_foreign_data_wrapper w ON w.oid = f.srvfdw AND w.fdwname = 'credit_lease'
		UNION
		SELECT q.server FROM credit_lease.upstream_request q
		UNION
		SELECT r.server FROM credit_lease.usage_report r) s
  LEFT JOIN credit_lease.lease_upstreams() u ON u.server = s.srvname;
COMMENT ON VIEW credit_lease.upstream_status IS 'every upstream, and how the worker of this database gets on with it; also those that are gone and were to be told something';
COMMENT ON COLUMN credit_lease.upstream_status.in_flight IS 'requests that wait for their reply';
COMMENT ON COLUMN credit_lease.upstream_status.latency IS 'from request to reply, of the last that was answered';
COMMENT ON COLUMN credit_lease.upstream_status.back_off_until IS 'nothing is sent to it before';
COMMENT ON COLUMN credit_lease.upstream_status.requests IS 'requests for leases and balances that have no answer yet, or were refused lately';
COMMENT ON COLUMN credit_lease.upstream_status.reports IS 'usage that it has not taken yet';
COMMENT ON COLUMN credit_lease.upstream_status.refused_reports IS 'usage that it has refused for good, see usage_report';

-- Who waits for a row has, or waits for, its tuple lock, by which PostgreSQL
-- keeps those who wait in order; the first of them, who has it, waits for the
-- transaction that has the row.
CREATE VIEW credit_lease.hot_pool AS
WITH queue AS MATERIALIZED (
	SELECT l.relation, format('(%s,%s)', l.page, l.tuple)::tid AS row, count(*) AS waiting
	  FROM pg_locks l
	 WHERE l.locktype = 'tuple' AND l.relation IN ('credit_lease.account'::regclass, 'credit_lease.stripe'::regclass)
	   AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
	 GROUP BY l.relation, l.page, l.tuple
),
account AS (
	SELECT w.account, sum(w.waiting) AS waiting
	  FROM (SELECT a.account, q.waiting
			  FROM queue q
			  JOIN credit_lease.account a ON q.relation = 'credit_lease.account'::regclass AND a.ctid = q.row
			UNION ALL
			SELECT s.account, q.waiting
			  FROM queue q
			  JOIN credit_lease.stripe s ON q.relation = 'credit_lease.stripe'::regclass AND s.ctid = q.row) AS w
	 GROUP BY w.account
),
pool AS (
	SELECT a.account, u.credit, a.waiting, coalesce(p.stripes, 1) AS stripes, u.calls,
		   sum(u.calls) OVER (PARTITION BY a.account) AS all_calls
	  FROM account a
	 CROSS JOIN LATERAL (
			SELECT e.credit, count(*) AS calls
			  FROM (SELECT l.credit, l.first_entry_id
					  FROM credit_lease.ledger l
					 WHERE l.account = a.account
					 ORDER BY l.entry_id DESC
					 LIMIT 1000) AS e
			 WHERE e.first_entry_id IS NULL
			 GROUP BY e.credit) AS u
	  LEFT JOIN credit_lease.striped_pool p ON p.account = a.account AND p.credit = u.credit
)
SELECT p.account, p.credit, p.waiting, p.stripes, s.advised
  FROM pool p,
	   LATERAL (SELECT min(n.power) FROM (VALUES (2), (4), (8), (16), (32), (64)) AS n (power)
				 WHERE n.power >= p.waiting + p.stripes OR n.power = 64) AS s (advised)
 WHERE p.calls >= p.all_calls / 10
 ORDER BY p.waiting DESC, p.account, p.calls DESC;
COMMENT ON VIEW credit_lease.hot_pool IS 'pools for whose account sessions wait at this instant, and how many stripes would let them go on: no row means that nobody waits now, so look again and again while the load is on, by \watch for instance';
COMMENT ON COLUMN credit_lease.hot_pool.credit IS 'a row for each credit with a tenth of the account''s last calls, of about a thousand; most calls first';
COMMENT ON COLUMN credit_lease.hot_pool.waiting IS 'sessions that wait for the account, or a stripe of it, now, whatever their credit';
COMMENT ON COLUMN credit_lease.hot_pool.stripes IS 'in how many the pool is kept';
COMMENT ON COLUMN credit_lease.hot_pool.advised IS 'for those who wait and those who are at work, rounded up to a power of two, at most 64; see lease_stripe()';

-- The kind of an entry says from where to where its amount moves. What is spent
-- of a chunk moves in the chunk, and when that ends in the tranches it came from.
CREATE VIEW credit_lease.movement AS
SELECT l.account, l.entry_id, l.credit, l.kind, l.tranche_id,
	   CASE WHEN NOT c.chunked THEN l.reservation_id END AS reservation_id,
	   CASE WHEN c.chunked THEN l.reservation_id END AS chunk_id, l.first_entry_id, l.refund_of, l.created_at,
	   CASE WHEN l.kind IN ('topup', 'install', 'extend') OR (l.kind IN ('adjust', 'sync') AND l.amount > 0) THEN l.amount ELSE 0 END AS granted,
	   CASE WHEN l.kind IN ('reserve', 'renew') THEN l.amount
			WHEN l.kind IN ('settle', 'track') THEN - (l.amount + a.released + a.lapsed + a.returned)
			WHEN l.reservation_id IS NOT NULL AND NOT c.chunked THEN - l.amount
			ELSE 0 END AS reserved,
	   CASE WHEN l.kind IN ('chunk', 'session') THEN l.amount
			WHEN l.kind IN ('chunk_release', 'chunk_expire', 'session_close', 'session_expire') THEN - (l.amount + a.released + a.lapsed + a.returned)
			ELSE 0 END AS chunked,
	   CASE WHEN l.kind IN ('topup', 'adjust', 'install', 'extend', 'sync') THEN l.amount
			WHEN l.kind IN ('settle', 'track', 'chunk_release', 'chunk_expire', 'session_close', 'session_expire') THEN a.released
			WHEN l.kind IN ('cancel', 'refund') OR (l.kind = 'expire' AND l.reservation_id IS NOT NULL) THEN l.amount - a.lapsed - a.returned
			ELSE - l.amount END AS remaining,
	   CASE WHEN l.kind IN ('consume', 'settle', 'track', 'chunk_release', 'chunk_expire', 'session_charge', 'session_close', 'session_expire') THEN l.amount
			WHEN l.kind = 'refund' THEN - l.amount
			ELSE 0 END AS consumed,
	   CASE WHEN l.kind = 'expire' AND l.reservation_id IS NULL THEN l.amount ELSE a.lapsed END AS expired,
	   CASE WHEN l.kind = 'release' THEN l.amount ELSE a.returned END AS returned,
	   CASE WHEN l.kind IN ('adjust', 'sync') AND l.amount < 0 THEN - l.amount ELSE 0 END AS revoked
  FROM credit_lease.ledger l,
	   LATERAL (SELECT coalesce(l.released, 0), coalesce(l.lapsed, 0), coalesce(l.returned, 0)) AS a (released, lapsed, returned),
	   LATERAL (SELECT l.kind IN ('chunk', 'chunk_release', 'chunk_expire', 'session', 'session_charge', 'session_close', 'session_expire') OR (l.kind = 'consume' AND l.reservation_id IS NOT NULL)) AS c (chunked)
 WHERE l.kind <> 'shortfall';
COMMENT ON VIEW credit_lease.movement IS 'what each ledger entry changed in each term of its tranche, or of its chunk or session where it was spent of one; nothing of a shortfall';
COMMENT ON COLUMN credit_lease.movement.reservation_id IS 'the hold';
COMMENT ON COLUMN credit_lease.movement.chunk_id IS 'the chunk, or the session: that was carved out, spent of, or given back';

CREATE VIEW credit_lease.usage_by_day AS
SELECT (m.created_at AT TIME ZONE 'UTC')::date AS day, m.account, m.credit,
	   sum(m.consumed) AS consumed,
	   count(*) FILTER (WHERE m.first_entry_id IS NULL AND m.consumed > 0) AS calls
  FROM credit_lease.movement m
 WHERE m.kind IN ('consume', 'settle', 'track', 'refund', 'session_charge')
 GROUP BY 1, 2, 3;
COMMENT ON VIEW credit_lease.usage_by_day IS 'what was spent, less what was refunded, by day (UTC); of a chunk or a session when it was spent, not when that ended';
COMMENT ON COLUMN credit_lease.usage_by_day.calls IS 'calls that spent something';

CREATE VIEW credit_lease.shortfall AS
SELECT s.account, s.credit, s.amount, s.entry_id, NULL::bigint AS reservation_id,
	   coalesce(s.idempotency_key, f.idempotency_key) AS idempotency_key, s.metadata, s.created_at
  FROM credit_lease.ledger s
  LEFT JOIN credit_lease.ledger f ON f.account = s.account AND f.entry_id = s.first_entry_id
 WHERE s.kind = 'shortfall'
UNION ALL
SELECT r.account, r.credit, r.shortfall, NULL, r.reservation_id, NULL, r.metadata, r.ended_at
  FROM credit_lease.reservation r
 WHERE r.shortfall > 0;
COMMENT ON VIEW credit_lease.shortfall IS 'usage that there was no credit for: of lease_ingest(), and of settlements';
COMMENT ON COLUMN credit_lease.shortfall.amount IS 'what was missing; what could be spent has entries of its own';
COMMENT ON COLUMN credit_lease.shortfall.entry_id IS 'the ledger entry; NULL for a settlement';
COMMENT ON COLUMN credit_lease.shortfall.reservation_id IS 'the hold that was settled; NULL for others';
COMMENT ON COLUMN credit_lease.shortfall.created_at IS 'when it was recorded; of a hold, when that ended';

-- Every branch groups by account, so that one account is checked by index.
CREATE VIEW credit_lease.finding AS
-- rule 2, each row: the equation, and no negative term (rule 3)
SELECT t.account, t.credit, t.tranche_id, f.rule, f.expected, f.found
  FROM credit_lease.tranche t,
	   LATERAL (VALUES
		('tranche balances', t.granted, t.remaining + t.reserved + t.chunked + t.consumed + t.expired + t.returned + t.revoked + t.striped),
		('granted is not negative', greatest(t.granted, 0), t.granted),
		('remaining is not negative', greatest(t.remaining, 0), t.remaining),
		('reserved is not negative', greatest(t.reserved, 0), t.reserved),
		('chunked is not negative', greatest(t.chunked, 0), t.chunked),
		('consumed is not negative', greatest(t.consumed, 0), t.consumed),
		('expired is not negative', greatest(t.expired, 0), t.expired),
		('returned is not negative', greatest(t.returned, 0), t.returned),
		('revoked is not negative', greatest(t.revoked, 0), t.revoked),
		('striped is not negative', greatest(t.striped, 0), t.striped),
		('open while something is left', (t.remaining <> 0 OR t.reserved <> 0 OR t.chunked <> 0 OR t.striped <> 0 OR t.kind = 'mirror')::integer, t.open::integer),
		('a lease and nothing else has an id', (t.kind = 'upstream')::integer, (t.lease_id IS NOT NULL)::integer),
		('a lease expires', (t.kind = 'upstream')::integer, (t.kind = 'upstream' AND t.expires_at IS NOT NULL)::integer),
		('nothing remains of what is released', CASE WHEN t.released_at IS NULL THEN t.remaining ELSE 0 END, t.remaining)
	   ) AS f (rule, expected, found)
 WHERE f.expected <> f.found
UNION ALL
-- ... and of its stripes, whose shares are what the tranche knows to be there
SELECT p.account, p.credit, p.tranche_id, 'stripe ' || p.stripe || ' ' || f.rule, f.expected, f.found
  FROM credit_lease.tranche_stripe p,
	   LATERAL (VALUES
		('balances', p.granted, p.remaining + p.reserved + p.chunked + p.consumed + p.expired + p.returned + p.revoked),
		('remaining is not negative', greatest(p.remaining, 0), p.remaining),
		('is there', 1, (SELECT count(*) FROM credit_lease.stripe l WHERE l.account = p.account AND l.stripe = p.stripe)),
		('is of a striped pool', 1, (SELECT count(*) FROM credit_lease.striped_pool s WHERE s.account = p.account AND s.credit = p.credit))
	   ) AS f (rule, expected, found)
 WHERE f.expected <> f.found
UNION ALL
SELECT s.account, s.credit, s.tranche_id, 'stripes sum to striped', coalesce(s.shares, 0), s.striped
  FROM (
	SELECT u.account, u.credit, u.tranche_id, sum(u.share) AS shares, sum(u.striped) AS striped
	  FROM (
		SELECT p.account, p.credit, p.tranche_id, p.granted, NULL::numeric FROM credit_lease.tranche_stripe p
		UNION ALL
		SELECT t.account, t.credit, t.tranche_id, NULL, t.striped FROM credit_lease.tranche t
	  ) AS u (account, credit, tranche_id, share, striped)
	 GROUP BY u.account, u.credit, u.tranche_id
  ) AS s
 WHERE coalesce(s.shares, 0) IS DISTINCT FROM s.striped
UNION ALL
SELECT t.account, t.credit, t.tranche_id, 'has a row in every stripe', l.stripes,
	   (SELECT count(*) FROM credit_lease.tranche_stripe p WHERE p.account = t.account AND p.credit = t.credit AND p.tranche_id = t.tranche_id)
  FROM credit_lease.striped_pool s,
	   credit_lease.tranche t,
	   LATERAL (SELECT count(*) FROM credit_lease.stripe l WHERE l.account = s.account) AS l (stripes)
 WHERE t.account = s.account AND t.credit = s.credit AND t.open AND t.released_at IS NULL
   AND (t.expires_at IS NULL OR t.expires_at > (SELECT credit_lease.lease_clock()))
   AND l.stripes <> (SELECT count(*) FROM credit_lease.tranche_stripe p
		WHERE p.account = t.account AND p.credit = t.credit AND p.tranche_id = t.tranche_id)
UNION ALL
SELECT w.account, w.credit, w.tranche_id, f.rule || ', stripes included', f.expected, f.found
  FROM credit_lease.whole_tranche w,
	   LATERAL (VALUES
		('chunked is not negative', greatest(w.chunked, 0), w.chunked), ('reserved is not negative', greatest(w.reserved, 0), w.reserved),
		('consumed is not negative', greatest(w.consumed, 0), w.consumed), ('expired is not negative', greatest(w.expired, 0), w.expired),
		('returned is not negative', greatest(w.returned, 0), w.returned), ('revoked is not negative', greatest(w.revoked, 0), w.revoked),
		('nothing remains of what is released', CASE WHEN w.released_at IS NULL THEN w.remaining ELSE 0 END, w.remaining)
	   ) AS f (rule, expected, found)
 WHERE f.expected <> f.found
   AND EXISTS (SELECT FROM credit_lease.tranche_stripe p
		WHERE p.account = w.account AND p.credit = w.credit AND p.tranche_id = w.tranche_id)
UNION ALL
-- what has a tranche, a hold, a chunk or a freeze has an account, by which it is locked
SELECT s.account, s.credit, NULL, 'account ' || f.rule, f.expected, f.found
  FROM (
	SELECT u.account, max(u.credit) AS credit, count(u.marked) AS accounts,
		   coalesce(bool_or(u.marked), false) AS marked, bool_or(u.frozen) AS frozen,
		   coalesce(bool_or(u.marked_striped), false) AS marked_striped,
		   coalesce(max(u.stripes), 0) AS stripes, count(u.stripe) AS locks, coalesce(max(u.stripe), 0) AS last_lock,
		   count(*) FILTER (WHERE u.stripe_frozen) AS frozen_locks
	  FROM (
		SELECT a.account, NULL, a.frozen, false, a.striped, NULL::integer, NULL::integer, NULL::boolean FROM credit_lease.account a
		UNION ALL
		SELECT t.account, t.credit, NULL, false, NULL, NULL, NULL, NULL FROM credit_lease.tranche t
		UNION ALL
		SELECT r.account, r.credit, NULL, false, NULL, NULL, NULL, NULL FROM credit_lease.reservation r
		UNION ALL
		SELECT c.account, c.credit, NULL, false, NULL, NULL, NULL, NULL FROM credit_lease.chunk c
		UNION ALL
		SELECT f.account, f.credit, NULL, true, NULL, NULL, NULL, NULL FROM credit_lease.frozen_pool f
		UNION ALL
		SELECT s.account, s.credit, NULL, false, NULL, s.stripes, NULL, NULL FROM credit_lease.striped_pool s
		UNION ALL
		SELECT l.account, NULL, NULL, false, NULL, NULL, l.stripe, l.frozen FROM credit_lease.stripe l
	  ) AS u (account, credit, marked, frozen, marked_striped, stripes, stripe, stripe_frozen)
	 GROUP BY u.account
  ) AS s,
  LATERAL (VALUES
	('exists', 1::numeric, s.accounts::numeric),
	('is marked while something is frozen', s.frozen::integer, s.marked::integer),
	('is marked while something is striped', (s.stripes > 0)::integer, s.marked_striped::integer),
	('has its stripes', s.stripes, s.locks),
	('has its last stripe', s.stripes, s.last_lock),
	('has its stripes marked while something is frozen', CASE WHEN s.frozen THEN s.locks ELSE 0 END, s.frozen_locks)
  ) AS f (rule, expected, found)
 WHERE f.expected <> f.found
UNION ALL
-- a call looks for expired holds only where the tranche says that there may be
-- some; in a striped pool it does whenever it is short
SELECT t.account, t.credit, t.tranche_id, 'expiry of reservation ' || r.reservation_id || ' is known',
	   extract(epoch FROM r.expires_at), extract(epoch FROM t.hold_expires_at)
  FROM credit_lease.reservation r,
	   unnest(r.tranche_ids) AS p (tranche_id),
	   credit_lease.tranche t
 WHERE r.status = 'held'
   AND t.account = r.account AND t.credit = r.credit AND t.tranche_id = p.tranche_id
   AND (t.hold_expires_at <= r.expires_at) IS NOT TRUE
   AND NOT EXISTS (SELECT FROM credit_lease.striped_pool s WHERE s.account = t.account AND s.credit = t.credit)
UNION ALL
-- rule 2, across tables: the ledger's sums are the tranches' columns, the
-- holds' parts are what is reserved, the chunks' what is carved out
SELECT s.account, s.credit, s.tranche_id, f.rule, f.expected, f.found
  FROM (
	SELECT u.account, u.credit, u.tranche_id,
		   sum(u.l1) AS l1, sum(u.l2) AS l2, sum(u.l3) AS l3, sum(u.l4) AS l4, sum(u.l5) AS l5, sum(u.l6) AS l6, sum(u.l7) AS l7, sum(u.l8) AS l8,
		   sum(u.held) AS held, sum(u.carved) AS carved,
		   sum(u.t1) AS t1, sum(u.t2) AS t2, sum(u.t3) AS t3, sum(u.t4) AS t4, sum(u.t5) AS t5, sum(u.t6) AS t6, sum(u.t7) AS t7, sum(u.t8) AS t8
	  FROM (
		SELECT m.account, m.credit, m.tranche_id,
			   m.granted, m.reserved, m.remaining, m.consumed, m.expired, m.returned, m.revoked, m.chunked,
			   NULL::numeric, NULL::numeric,
			   NULL::numeric, NULL::numeric, NULL::numeric, NULL::numeric, NULL::numeric, NULL::numeric, NULL::numeric, NULL::numeric
		  FROM credit_lease.movement m
		 WHERE m.tranche_id IS DISTINCT FROM m.chunk_id
		UNION ALL
		SELECT r.account, r.credit, p.tranche_id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
			   p.amount, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
		  FROM credit_lease.reservation r,
			   unnest(r.tranche_ids, r.tranche_amounts) AS p (tranche_id, amount)
		 WHERE r.status = 'held'
		UNION ALL
		SELECT c.account, c.credit, p.tranche_id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
			   NULL, p.amount, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
		  FROM credit_lease.chunk c,
			   unnest(c.tranche_ids, c.tranche_amounts) AS p (tranche_id, amount)
		 WHERE c.status = 'live'
		UNION ALL
		SELECT t.account, t.credit, t.tranche_id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
			   NULL, NULL, t.granted, t.reserved, t.remaining, t.consumed, t.expired, t.returned, t.revoked, t.chunked
		  FROM credit_lease.whole_tranche t
	  ) AS u (account, credit, tranche_id, l1, l2, l3, l4, l5, l6, l7, l8, held, carved, t1, t2, t3, t4, t5, t6, t7, t8)
	 GROUP BY u.account, u.credit, u.tranche_id
  ) AS s,
  LATERAL (VALUES
	('ledger sums to granted', coalesce(s.l1, 0), s.t1),
	('ledger sums to reserved', coalesce(s.l2, 0), s.t2),
	('ledger sums to remaining', coalesce(s.l3, 0), s.t3),
	('ledger sums to consumed', coalesce(s.l4, 0), s.t4),
	('ledger sums to expired', coalesce(s.l5, 0), s.t5),
	('ledger sums to returned', coalesce(s.l6, 0), s.t6),
	('ledger sums to revoked', coalesce(s.l7, 0), s.t7),
	('ledger sums to chunked', coalesce(s.l8, 0), s.t8),
	('holds sum to reserved', coalesce(s.held, 0), s.t2),
	('chunks sum to chunked', coalesce(s.carved, 0), s.t8)
  ) AS f (rule, expected, found)
 WHERE f.expected IS DISTINCT FROM f.found
UNION ALL
-- rule 4: the parts of a hold add up, and its entries say how it ended
SELECT r.account, r.credit, NULL, 'reservation ' || r.reservation_id || ' is the sum of its parts', r.amount, f.found
  FROM credit_lease.reservation r,
	   LATERAL (SELECT coalesce(sum(p.amount), 0) FROM unnest(r.tranche_amounts) AS p (amount)) AS f (found)
 WHERE r.amount IS DISTINCT FROM f.found
UNION ALL
SELECT s.account, s.credit, s.tranche_id, 'reservation ' || s.reservation_id || ' came from here', s.was_held, s.part
  FROM (
	SELECT u.account, u.credit, u.reservation_id, u.tranche_id,
		   coalesce(sum(u.was_held), 0) AS was_held, coalesce(sum(u.part), 0) AS part
	  FROM (
		SELECT r.account, r.credit, r.reservation_id, p.tranche_id, NULL::numeric, p.amount
		  FROM credit_lease.reservation r,
			   unnest(r.tranche_ids, r.tranche_amounts) AS p (tranche_id, amount)
		UNION ALL
		SELECT m.account, m.credit, m.reservation_id, m.tranche_id, m.reserved, NULL
		  FROM credit_lease.movement m
		 WHERE m.reservation_id IS NOT NULL AND m.reserved > 0
	  ) AS u (account, credit, reservation_id, tranche_id, was_held, part)
	 GROUP BY u.account, u.credit, u.reservation_id, u.tranche_id
  ) AS s
 WHERE s.was_held IS DISTINCT FROM s.part
UNION ALL
SELECT s.account, s.credit, NULL, 'reservation ' || s.reservation_id || ' ' || f.rule, f.expected, f.found
  FROM (
	SELECT u.account, u.credit, u.reservation_id, count(u.amount) AS holds, max(u.amount) AS amount,
		   bool_or(u.held) AS held, coalesce(max(u.consumed), 0) AS consumed, coalesce(max(u.refunded), 0) AS refunded,
		   coalesce(sum(u.is_held), 0) AS is_held,
		   coalesce(sum(u.was_consumed), 0) AS was_consumed, coalesce(sum(u.was_refunded), 0) AS was_refunded
	  FROM (
		SELECT r.account, r.credit, r.reservation_id, r.amount, r.status = 'held', r.consumed, r.refunded,
			   NULL::numeric, NULL::numeric, NULL::numeric
		  FROM credit_lease.reservation r
		UNION ALL
		SELECT m.account, m.credit, m.reservation_id, NULL, NULL, NULL, NULL,
			   m.reserved, m.consumed, CASE WHEN m.reserved <= 0 THEN greatest(m.remaining, 0) END
		  FROM credit_lease.movement m
		 WHERE m.reservation_id IS NOT NULL
	  ) AS u (account, credit, reservation_id, amount, held, consumed, refunded, is_held, was_consumed, was_refunded)
	 GROUP BY u.account, u.credit, u.reservation_id
  ) AS s,
  LATERAL (VALUES
	('exists', 1::numeric, s.holds::numeric),
	('is held', s.is_held, CASE WHEN s.held THEN s.amount ELSE 0 END),
	('was consumed', s.was_consumed, s.consumed),
	('was refunded', s.was_refunded, s.refunded)
  ) AS f (rule, expected, found)
 WHERE f.expected IS DISTINCT FROM f.found
UNION ALL
-- a chunk: the equation, no negative term, and nothing remains of what has
-- ended, or is returned before
SELECT c.account, c.credit, c.chunk_id, 'chunk ' || f.rule, f.expected, f.found
  FROM credit_lease.chunk c,
	   LATERAL (VALUES
		('balances', c.granted, c.remaining + c.consumed + c.returned),
		('granted is positive', CASE WHEN c.granted > 0 THEN c.granted ELSE 1 END, c.granted),
		('remaining is not negative', greatest(c.remaining, 0), c.remaining),
		('consumed is not negative', greatest(c.consumed, 0), c.consumed),
		('returned is not negative', greatest(c.returned, 0), c.returned),
		('has nothing left but while it lives', CASE WHEN c.status = 'live' THEN c.remaining ELSE 0 END, c.remaining),
		('returns nothing while it lives', CASE WHEN c.status = 'live' THEN 0 ELSE c.returned END, c.returned),
		('has ended once', (c.status <> 'live')::integer, (c.ended_at IS NOT NULL)::integer),
		('is the sum of its parts', c.granted, (SELECT sum(p.amount) FROM unnest(c.tranche_amounts) AS p (amount))),
		('has a part of each tranche', cardinality(c.tranche_ids), cardinality(c.tranche_amounts)),
		('has no part that is not positive', 0, (SELECT count(*) FROM unnest(c.tranche_amounts) AS p (amount) WHERE p.amount <= 0))
	   ) AS f (rule, expected, found)
 WHERE f.expected IS DISTINCT FROM f.found
UNION ALL
-- ... and its entries: what was carved out of each tranche, and how it ended there
SELECT s.account, s.credit, s.tranche_id, 'chunk ' || s.chunk_id || ' ' || f.rule, f.expected, f.found
  FROM (
	SELECT u.account, u.credit, u.chunk_id, u.tranche_id, coalesce(sum(u.part), 0) AS part,
		   coalesce(sum(u.live), 0) AS live, coalesce(sum(u.carved), 0) AS carved, coalesce(sum(u.chunked), 0) AS chunked
	  FROM (
		SELECT c.account, c.credit, c.chunk_id, p.tranche_id, p.amount, CASE WHEN c.status = 'live' THEN p.amount END, NULL::numeric, NULL::numeric
		  FROM credit_lease.chunk c,
			   unnest(c.tranche_ids, c.tranche_amounts) AS p (tranche_id, amount)
		UNION ALL
		SELECT m.account, m.credit, m.chunk_id, m.tranche_id, NULL, NULL, greatest(m.chunked, 0), m.chunked
		  FROM credit_lease.movement m
		 WHERE m.chunk_id IS NOT NULL AND m.chunk_id <> m.tranche_id
	  ) AS u (account, credit, chunk_id, tranche_id, part, live, carved, chunked)
	 GROUP BY u.account, u.credit, u.chunk_id, u.tranche_id
  ) AS s,
  LATERAL (VALUES
	('was carved out of here', s.carved, s.part),
	('is carved out of here', s.chunked, s.live)
  ) AS f (rule, expected, found)
 WHERE f.expected <> f.found
UNION ALL
-- ... what was spent of it, by its own entries, and by those of its end
SELECT s.account, s.credit, s.chunk_id, 'chunk ' || f.rule, f.expected, f.found
  FROM (
	SELECT u.account, u.credit, u.chunk_id, count(u.consumed) AS chunks, bool_or(u.ended) AS ended, max(u.consumed) AS consumed,
		   coalesce(sum(u.spent), 0) AS spent, coalesce(sum(u.settled), 0) AS settled
	  FROM (
		SELECT c.account, c.credit, c.chunk_id, c.status <> 'live', c.consumed, NULL::numeric, NULL::numeric
		  FROM credit_lease.chunk c
		UNION ALL
		SELECT m.account, m.credit, m.chunk_id, NULL, NULL,
			   CASE WHEN m.tranche_id = m.chunk_id THEN m.consumed END, CASE WHEN m.tranche_id <> m.chunk_id THEN m.consumed END
		  FROM credit_lease.movement m
		 WHERE m.chunk_id IS NOT NULL
	  ) AS u (account, credit, chunk_id, ended, consumed, spent, settled)
	 GROUP BY u.account, u.credit, u.chunk_id
  ) AS s,
  LATERAL (VALUES
	('exists', 1::numeric, s.chunks::numeric),
	('ledger sums to consumed', s.spent, s.consumed),
	('consumed of its tranches', CASE WHEN s.ended THEN s.consumed ELSE 0 END, s.settled)
  ) AS f (rule, expected, found)
 WHERE f.expected IS DISTINCT FROM f.found
UNION ALL
-- a session: spent <= accepted <= deposit, which is no less than at first; and
-- its entries are a session's, as a chunk's are a chunk's
SELECT c.account, c.credit, c.chunk_id, 'session ' || f.rule, f.expected, f.found
  FROM credit_lease.chunk c,
	   LATERAL (VALUES
		('accepts what is spent', greatest(c.accepted, c.consumed), c.accepted),
		('accepts no more than the deposit', least(c.accepted, c.granted), c.accepted),
		('was opened with something', CASE WHEN c.deposited > 0 THEN c.deposited ELSE 1 END, c.deposited),
		('has what it was opened with', least(c.deposited, c.granted), c.deposited),
		('units are not negative', greatest(c.units, 0), c.units)
	   ) AS f (rule, expected, found)
 WHERE c.session IS NOT NULL AND f.expected IS DISTINCT FROM f.found
UNION ALL
SELECT c.account, c.credit, c.chunk_id, 'chunk is a session, or has nothing of one', 0, num_nonnulls(c.accepted, c.units, c.deposited)
  FROM credit_lease.chunk c
 WHERE c.session IS NULL AND num_nonnulls(c.accepted, c.units, c.deposited) <> 0
UNION ALL
SELECT c.account, c.credit, c.chunk_id, 'chunk has its own entries', 0, count(*)
  FROM credit_lease.chunk c
  JOIN credit_lease.movement m ON m.account = c.account AND m.chunk_id = c.chunk_id
 WHERE (c.session IS NOT NULL) <> (m.kind LIKE 'session%')
 GROUP BY c.account, c.credit, c.chunk_id
UNION ALL
-- what was tracked costs what it did when the hold was made
SELECT r.account, r.credit, NULL, 'reservation ' || r.reservation_id || ' costs what was tracked',
	   u.units * r.unit + CASE WHEN u.units * r.unit < r.tracked * r.rate THEN r.unit ELSE 0 END, r.consumed + r.shortfall
  FROM credit_lease.reservation r,
	   LATERAL (SELECT div(r.tracked * r.rate, r.unit)) AS u (units)
 WHERE r.tracked IS NOT NULL
   AND u.units * r.unit + CASE WHEN u.units * r.unit < r.tracked * r.rate THEN r.unit ELSE 0 END
	   IS DISTINCT FROM r.consumed + r.shortfall
UNION ALL
-- refunds give back at most what was consumed, and are counted
SELECT s.account, s.credit, s.tranche_id, 'entry ' || s.entry_id || ' ' || f.rule, f.expected, f.found
  FROM (
	SELECT u.account, u.entry_id, max(u.credit) AS credit, max(u.tranche_id) AS tranche_id,
		   coalesce(max(u.consumed), 0) AS consumed, coalesce(sum(u.given), 0) AS given, coalesce(max(u.counted), 0) AS counted
	  FROM (
		SELECT m.account, m.entry_id, m.credit, m.tranche_id, m.consumed, NULL::numeric, NULL::numeric
		  FROM credit_lease.movement m
		 WHERE m.consumed > 0
		UNION ALL
		SELECT l.account, l.refund_of, NULL, NULL, NULL, l.amount, NULL
		  FROM credit_lease.ledger l
		 WHERE l.refund_of IS NOT NULL
		UNION ALL
		SELECT r.account, r.entry_id, NULL, NULL, NULL, NULL, r.amount
		  FROM credit_lease.refund r
	  ) AS u (account, entry_id, credit, tranche_id, consumed, given, counted)
	 GROUP BY u.account, u.entry_id
  ) AS s,
  LATERAL (VALUES
	('was refunded', s.given, s.counted),
	('consumed what was refunded', greatest(s.consumed, s.given), s.consumed)
  ) AS f (rule, expected, found)
 WHERE f.expected <> f.found
UNION ALL
SELECT s.account, max(s.credit), NULL, 'entry ' || s.entry_id || ' has all its parts', max(s.parts), count(*)
  FROM (SELECT l.account, coalesce(l.first_entry_id, l.entry_id) AS entry_id, l.credit, l.parts
		  FROM credit_lease.ledger l
		 WHERE l.parts IS NOT NULL OR l.first_entry_id IS NOT NULL) AS s
 GROUP BY s.account, s.entry_id
HAVING max(s.parts) IS DISTINCT FROM count(*)
UNION ALL
SELECT l.account, l.credit, l.tranche_id, 'entry ' || l.entry_id || ' is of a tranche, or a shortfall', 1, 0
  FROM credit_lease.ledger l
 WHERE (l.kind = 'shortfall') <> (l.tranche_id IS NULL) OR (l.kind = 'shortfall' AND l.amount <= 0)
UNION ALL
-- rule 9: what was read of the ledger, to report it, is what it has up to there
SELECT u.account, u.credit, u.tranche_id, 'usage read sums to consumed', coalesce(sum(m.consumed), 0), u.consumed
  FROM credit_lease.lease_usage u
  LEFT JOIN credit_lease.movement m
	ON m.account = u.account AND m.credit = u.credit AND m.tranche_id = u.tranche_id AND m.entry_id <= u.entry_id
 GROUP BY u.account, u.credit, u.tranche_id, u.consumed
HAVING coalesce(sum(m.consumed), 0) <> u.consumed
UNION ALL
SELECT t.account, t.credit, t.tranche_id, 'usage of a lease from a server is read', 1, 0
  FROM credit_lease.tranche t
 WHERE t.kind IN ('upstream', 'mirror') AND t.server IS NOT NULL
   AND NOT EXISTS (SELECT FROM credit_lease.lease_usage u
		WHERE u.account = t.account AND u.credit = t.credit AND u.tranche_id = t.tranche_id)
UNION ALL
-- a mirror: what remains is what its checkpoint leaves, and what that includes
-- are entries of it, or what the upstream has acknowledged
SELECT s.account, s.credit, s.tranche_id, 'mirror ' || f.rule, f.expected, f.found
  FROM (
	SELECT u.account, u.credit, u.tranche_id, bool_or(u.is_mirror) AS is_mirror, bool_or(u.dies) AS dies,
		   max(u.remaining) AS remaining, max(u.overdrawn) AS overdrawn, max(u.taken) AS taken,
		   count(u.balance) AS checkpoints, max(u.balance) AS balance, max(u.included) AS included
	  FROM (
		SELECT t.account, t.credit, t.tranche_id, t.kind = 'mirror', t.expires_at IS NOT NULL OR t.striped <> 0,
			   t.remaining, t.overdrawn, t.consumed + t.reserved + t.chunked, NULL::numeric, NULL::numeric
		  FROM credit_lease.tranche t
		 WHERE t.kind = 'mirror' OR t.overdrawn <> 0 OR t.trusted_until IS NOT NULL
		UNION ALL
		SELECT m.account, m.credit, m.tranche_id, NULL, NULL, NULL, NULL, NULL, m.balance, m.included
		  FROM credit_lease.mirror m
	  ) AS u (account, credit, tranche_id, is_mirror, dies, remaining, overdrawn, taken, balance, included)
	 GROUP BY u.account, u.credit, u.tranche_id
  ) AS s,
  LATERAL (VALUES
	('is one', 1::numeric, coalesce(s.is_mirror, false)::integer),
	('has a checkpoint', 1, s.checkpoints),
	('neither expires nor is striped', 0, s.dies::integer),
	('overdrawn is not negative', greatest(s.overdrawn, 0), s.overdrawn),
	('has nothing left while it is overdrawn', CASE WHEN s.overdrawn <> 0 THEN 0 ELSE s.remaining END, s.remaining),
	('remains as its checkpoint says', s.balance - (s.taken - s.included), s.remaining - s.overdrawn)
  ) AS f (rule, expected, found)
 WHERE f.expected <> f.found
UNION ALL
SELECT m.account, m.credit, m.tranche_id, 'mirror includes entries of it', e.consumed, m.included
  FROM credit_lease.mirror m,
	   LATERAL (SELECT coalesce(sum(v.consumed), 0) FROM credit_lease.movement v
				 WHERE v.account = m.account AND v.tranche_id = m.tranche_id
				   AND (v.entry_id <= m.entry_id OR EXISTS (SELECT FROM credit_lease.mirror_entry e
						WHERE e.account = m.account AND e.tranche_id = m.tranche_id AND e.entry_id = v.entry_id))) AS e (consumed)
 WHERE m.entry_id IS NOT NULL AND e.consumed <> m.included
UNION ALL
SELECT m.account, m.credit, m.tranche_id, 'mirror includes what was acknowledged', coalesce(u.acknowledged, 0), m.included
  FROM credit_lease.mirror m
  LEFT JOIN credit_lease.lease_usage u ON u.account = m.account AND u.credit = m.credit AND u.tranche_id = m.tranche_id
 WHERE m.entry_id IS NULL AND (m.included <= u.acknowledged) IS NOT TRUE
UNION ALL
-- ... which is no more than it was told and is not telling any more: what was
-- read, and what was tracked since; a report may have been removed by hand
SELECT s.account, s.credit, s.tranche_id, 'acknowledged was reported', s.told - s.under_way, s.acknowledged
  FROM (
	SELECT u.account, u.credit, u.tranche_id, u.acknowledged,
		   u.consumed + u.owed
			+ (SELECT coalesce(sum(v.consumed), 0) FROM credit_lease.movement v
				WHERE v.account = u.account AND v.tranche_id = u.tranche_id AND v.entry_id > u.entry_id AND v.kind = 'track') AS told,
		   (SELECT coalesce(sum(r.credits), 0) FROM credit_lease.usage_report r
			 WHERE r.account = u.account AND r.credit = u.credit AND r.tranche_id = u.tranche_id) AS under_way
	  FROM credit_lease.lease_usage u
	 WHERE u.acknowledged <> 0
  ) AS s
 WHERE s.acknowledged > s.told - s.under_way
UNION ALL
SELECT e.account, t.credit, e.tranche_id, 'mirror entry ' || e.entry_id || ' is beyond the others', 1, 0
  FROM credit_lease.mirror_entry e
  LEFT JOIN credit_lease.tranche t ON t.account = e.account AND t.tranche_id = e.tranche_id
 WHERE NOT EXISTS (SELECT FROM credit_lease.mirror m
	WHERE m.account = e.account AND m.tranche_id = e.tranche_id AND m.entry_id < e.entry_id);
COMMENT ON VIEW credit_lease.finding IS 'what lease_verify() finds, for every account; empty when the books balance';

----------------------------------------------------------------------
-- Results. Types of their own, because arguments and results share names.
----------------------------------------------------------------------

CREATE TYPE credit_lease.topup_result AS (entry_id bigint, tranche_id bigint, amount numeric, available numeric, replayed boolean);
COMMENT ON TYPE credit_lease.topup_result IS 'what lease_topup() returns';
CREATE TYPE credit_lease.entry_result AS (entry_id bigint, amount numeric, available numeric, replayed boolean);
COMMENT ON TYPE credit_lease.entry_result IS 'what lease_adjust() and lease_refund() return';
CREATE TYPE credit_lease.consume_result AS (applied boolean, entry_id bigint, amount numeric, available numeric, replayed boolean);
COMMENT ON TYPE credit_lease.consume_result IS 'what lease_consume() and lease_try_consume() return';
CREATE TYPE credit_lease.reserve_result AS (applied boolean, reservation_id bigint, amount numeric, available numeric, expires_at timestamptz, replayed boolean);
COMMENT ON TYPE credit_lease.reserve_result IS 'what lease_reserve() and lease_try_reserve() return';
CREATE TYPE credit_lease.settle_result AS (reservation_id bigint, reserved numeric, consumed numeric, refunded numeric, shortfall numeric, available numeric, replayed boolean);
COMMENT ON TYPE credit_lease.settle_result IS 'what lease_settle() returns';
CREATE TYPE credit_lease.renew_result AS (reservation_id bigint, amount numeric, expires_at timestamptz);
COMMENT ON TYPE credit_lease.renew_result IS 'what lease_renew() returns';
CREATE TYPE credit_lease.chunk_result AS (chunk_id bigint, account text, credit text, owner text, granted numeric,
	remaining numeric, expires_at timestamptz, status text, replayed boolean);
COMMENT ON TYPE credit_lease.chunk_result IS 'what lease_chunk_allocate(), lease_chunk(), lease_chunk_renew() and lease_chunk_release() return; status: live, expired or released';
CREATE TYPE credit_lease.chunk_consume_result AS (applied boolean, chunk_id bigint, remaining numeric, expires_at timestamptz, replayed boolean);
COMMENT ON TYPE credit_lease.chunk_consume_result IS 'what lease_chunk_consume() and lease_try_chunk_consume() return';
CREATE TYPE credit_lease.session_result AS (applied boolean, session text, deposit numeric, accepted_cumulative numeric,
	spent numeric, required_cumulative numeric, units bigint, status text);
COMMENT ON TYPE credit_lease.session_result IS 'what the functions of sessions return; applied: the call has changed something; status: open, closed or expired';
CREATE TYPE credit_lease.check_result AS (allowed boolean, reason text, error text, reservation_id bigint, credit text,
	amount numeric, rate numeric, event text, available numeric, expires_at timestamptz);
COMMENT ON TYPE credit_lease.check_result IS 'what lease_check() returns; reason: allowed, insufficient_credit, lease_acquire_failed, denied_by_rule or what the rule says, not_metered, frozen or invalid_quantity';
CREATE TYPE credit_lease.explain_result AS (allowed boolean, reason text, error text, credit text,
	amount numeric, rate numeric, event text, available numeric, tranches jsonb, limits jsonb);
COMMENT ON TYPE credit_lease.explain_result IS 'what lease_explain() returns';
CREATE TYPE credit_lease.track_result AS (settled boolean, consumed numeric, refunded numeric, shortfall numeric,
	available numeric, usage_key text);
COMMENT ON TYPE credit_lease.track_result IS 'what lease_track() returns; settled is false where the hold had expired';
CREATE TYPE credit_lease.ingest_result AS (ordinal integer, applied boolean, duplicate boolean, reason text, available numeric);
COMMENT ON TYPE credit_lease.ingest_result IS 'what lease_ingest() returns; reason: NULL, shortfall or free where it was applied; duplicate, key_conflict, insufficient_credit, lease_acquire_failed, frozen, not_metered or invalid_quantity where it was not';

CREATE TYPE credit_lease.policy_result AS (server text, company_id text, credit_type_id text, event text,
	lease_size numeric, lease_duration interval, low_water_mark numeric, safety_margin interval, hold_ttl interval,
	failure_mode text, smallest_unit numeric, stripes integer, sync_interval interval, max_staleness interval);
COMMENT ON TYPE credit_lease.policy_result IS 'what lease_policy() returns';
CREATE TYPE credit_lease.sync_result AS (available numeric, pending numeric, as_of timestamptz);
COMMENT ON TYPE credit_lease.sync_result IS 'what lease_sync() returns: what the pool has, what the mirror''s checkpoint does not include, and of when that is';
CREATE TYPE credit_lease.prewarm_result AS (credit text, lease_id text, available numeric, status text);
COMMENT ON TYPE credit_lease.prewarm_result IS 'what lease_prewarm() returns; status: live, pending, refused, unreachable or no upstream';

----------------------------------------------------------------------
-- Functions. They run as the extension's owner, so that a role needs EXECUTE
-- and no rights on tables; the ledger records session_user.
----------------------------------------------------------------------

-- Money in

CREATE FUNCTION credit_lease.lease_topup(account text, credit text, amount numeric, idempotency_key text DEFAULT NULL,
		expires_at timestamptz DEFAULT NULL, priority integer DEFAULT 100, metadata jsonb DEFAULT NULL)
	RETURNS credit_lease.topup_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_topup(text, text, numeric, text, timestamptz, integer, jsonb) IS
	'grants credit to a pool, as a tranche with its own expiry and priority';

CREATE FUNCTION credit_lease.lease_adjust(account text, credit text, amount numeric, reason text,
		idempotency_key text DEFAULT NULL, metadata jsonb DEFAULT NULL)
	RETURNS credit_lease.entry_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_adjust(text, text, numeric, text, text, jsonb) IS
	'corrects a pool by a signed amount: grants it, or revokes it in burn order';

CREATE FUNCTION credit_lease.lease_refund(account text, entry_id bigint, amount numeric DEFAULT NULL,
		reason text DEFAULT NULL, idempotency_key text DEFAULT NULL)
	RETURNS credit_lease.entry_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_refund(text, bigint, numeric, text, text) IS
	'gives back what the call of a ledger entry consumed, or a part of it, to the tranches it came from';

-- Spending

CREATE FUNCTION credit_lease.lease_consume(account text, credit text, amount numeric,
		idempotency_key text DEFAULT NULL, metadata jsonb DEFAULT NULL)
	RETURNS credit_lease.consume_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_consume(text, text, numeric, text, jsonb) IS
	'spends credit at once; raises when it cannot';

CREATE FUNCTION credit_lease.lease_try_consume(account text, credit text, amount numeric,
		idempotency_key text DEFAULT NULL, metadata jsonb DEFAULT NULL)
	RETURNS credit_lease.consume_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_try_consume(text, text, numeric, text, jsonb) IS
	'spends credit at once; applied is false when there is not enough or the pool is frozen';

CREATE FUNCTION credit_lease.lease_reserve(account text, credit text, amount numeric, ttl interval DEFAULT NULL,
		idempotency_key text DEFAULT NULL, min_amount numeric DEFAULT NULL, metadata jsonb DEFAULT NULL)
	RETURNS credit_lease.reserve_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_reserve(text, text, numeric, interval, text, numeric, jsonb) IS
	'holds credit until it is settled, cancelled or expires; raises when it cannot';

CREATE FUNCTION credit_lease.lease_try_reserve(account text, credit text, amount numeric, ttl interval DEFAULT NULL,
		idempotency_key text DEFAULT NULL, min_amount numeric DEFAULT NULL, metadata jsonb DEFAULT NULL)
	RETURNS credit_lease.reserve_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_try_reserve(text, text, numeric, interval, text, numeric, jsonb) IS
	'holds credit until it is settled, cancelled or expires; applied is false when there is not enough or the pool is frozen';

CREATE FUNCTION credit_lease.lease_settle(account text, reservation_id bigint, amount numeric DEFAULT NULL,
		overage text DEFAULT 'charge', metadata jsonb DEFAULT NULL)
	RETURNS credit_lease.settle_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_settle(text, bigint, numeric, text, jsonb) IS
	'ends a hold by spending amount of it (NULL for all) and giving the rest back; overage: charge, clamp or refuse';

CREATE FUNCTION credit_lease.lease_cancel(account text, reservation_id bigint)
	RETURNS boolean
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_cancel(text, bigint) IS
	'ends a hold by giving it back; true when it is or was already given back, false when it was settled';

CREATE FUNCTION credit_lease.lease_renew(account text, reservation_id bigint, ttl interval DEFAULT NULL,
		add_amount numeric DEFAULT 0)
	RETURNS credit_lease.renew_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_renew(text, bigint, interval, numeric) IS
	'lets a hold live until ttl from now, never shorter than it would, and may hold more';

-- Chunks

CREATE FUNCTION credit_lease.lease_chunk_allocate(account text, credit text, amount numeric, owner text,
		ttl interval DEFAULT NULL, idempotency_key text DEFAULT NULL)
	RETURNS credit_lease.chunk_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_chunk_allocate(text, text, numeric, text, interval, text) IS
	'carves an amount out of a pool for one owner, who spends of it without touching the pool';

CREATE FUNCTION credit_lease.lease_chunk(account text, chunk_id bigint)
	RETURNS credit_lease.chunk_result
	LANGUAGE c STABLE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_chunk(text, bigint) IS
	'what a chunk has now, or how it has ended';

CREATE FUNCTION credit_lease.lease_chunk_renew(account text, chunk_id bigint, owner text, ttl interval DEFAULT NULL)
	RETURNS credit_lease.chunk_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_chunk_renew(text, bigint, text, interval) IS
	'lets a chunk live until ttl from now, never shorter than it would, nor longer than the tranches that it came from';

CREATE FUNCTION credit_lease.lease_chunk_release(account text, chunk_id bigint, owner text)
	RETURNS credit_lease.chunk_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_chunk_release(text, bigint, text) IS
	'ends a chunk: what was not spent of it goes back to the tranches that it came from';

CREATE FUNCTION credit_lease.lease_chunk_consume(account text, chunk_id bigint, amount numeric, owner text,
		idempotency_key text DEFAULT NULL)
	RETURNS credit_lease.chunk_consume_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_chunk_consume(text, bigint, numeric, text, text) IS
	'spends of a chunk; raises when it cannot';

CREATE FUNCTION credit_lease.lease_try_chunk_consume(account text, chunk_id bigint, amount numeric, owner text,
		idempotency_key text DEFAULT NULL)
	RETURNS credit_lease.chunk_consume_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_try_chunk_consume(text, bigint, numeric, text, text) IS
	'spends of a chunk; applied is false when it has not enough or the pool is frozen';

-- Sessions

CREATE FUNCTION credit_lease.lease_session_open(account text, credit text, session text, deposit numeric,
		ttl interval DEFAULT NULL)
	RETURNS credit_lease.session_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_session_open(text, text, text, numeric, interval) IS
	'carves a deposit out of a pool, to be authorized and spent by its cumulative amount';

CREATE FUNCTION credit_lease.lease_session_topup(account text, session text, amount numeric)
	RETURNS credit_lease.session_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_session_topup(text, text, numeric) IS
	'raises the deposit of a session by an amount from its pool';

CREATE FUNCTION credit_lease.lease_session_authorize(account text, session text, cumulative numeric)
	RETURNS credit_lease.session_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_session_authorize(text, text, numeric) IS
	'lets so much in all be spent of a session; the same or less than before changes nothing';

CREATE FUNCTION credit_lease.lease_session_charge(account text, session text, amount numeric)
	RETURNS credit_lease.session_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_session_charge(text, text, numeric) IS
	'spends of a session; applied is false when too little is authorized, and required_cumulative what would be enough';

CREATE FUNCTION credit_lease.lease_session_snapshot(account text, session text, next_amount numeric DEFAULT 0)
	RETURNS credit_lease.session_result
	LANGUAGE c STABLE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_session_snapshot(text, text, numeric) IS
	'what a session has come to, or how it has ended, and what would have to be authorized for the next amount';

CREATE FUNCTION credit_lease.lease_session_reconcile(account text, session text, snapshot jsonb)
	RETURNS credit_lease.session_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_session_reconcile(text, text, jsonb) IS
	'raises the figures of a session to those of a snapshot that another side has of it, and lowers none';

CREATE FUNCTION credit_lease.lease_session_close(account text, session text, cumulative numeric DEFAULT NULL)
	RETURNS credit_lease.session_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_session_close(text, text, numeric) IS
	'ends a session, of which cumulative (NULL for what was charged) is spent; the rest of the deposit goes back to where it came from';

-- Features. lease_check() and lease_explain() become the extension's owner by
-- themselves, and are who called them again while the rule is asked.

CREATE FUNCTION credit_lease.lease_check(account text, feature text, quantity numeric, event text DEFAULT NULL,
		on_failure text DEFAULT NULL, subject jsonb DEFAULT NULL, ttl interval DEFAULT NULL)
	RETURNS credit_lease.check_result
	LANGUAGE c VOLATILE AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_check(text, text, numeric, text, text, jsonb, interval) IS
	'whether an account may use a quantity of a feature; if so, holds what it costs until lease_track()';

CREATE FUNCTION credit_lease.lease_track(account text, reservation_id bigint, quantity numeric, traits jsonb DEFAULT NULL)
	RETURNS credit_lease.track_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_track(text, bigint, numeric, jsonb) IS
	'ends a hold of lease_check() by what was used: spends what that costs, gives the rest back and has it reported';

CREATE FUNCTION credit_lease.lease_explain(account text, feature text, quantity numeric)
	RETURNS credit_lease.explain_result
	LANGUAGE c VOLATILE AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_explain(text, text, numeric) IS
	'what lease_check() would answer now, and why; holds nothing and asks no upstream';

-- Usage in bulk

CREATE FUNCTION credit_lease.lease_ingest(events jsonb, on_short text DEFAULT 'refuse')
	RETURNS SETOF credit_lease.ingest_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME', 'lease_ingest_events'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_ingest(jsonb, text) IS
	'spends what many events say was used, of any accounts, and tells of each what came of it; on_short: refuse or charge';

CREATE FUNCTION credit_lease.lease_ingest(account text[], credit text[], amount numeric[],
		idempotency_key text[] DEFAULT NULL, metadata jsonb[] DEFAULT NULL, on_short text DEFAULT 'refuse')
	RETURNS SETOF credit_lease.ingest_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME', 'lease_ingest_arrays'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_ingest(text[], text[], numeric[], text[], jsonb[], text) IS
	'the same, of events in arrays, an element of each for an event';

-- Looking

CREATE FUNCTION credit_lease.lease_balance(account text, credit text DEFAULT NULL)
	RETURNS SETOF credit_lease.balance
	LANGUAGE c STABLE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_balance(text, text) IS
	'what an account has now, a row for each credit';

CREATE FUNCTION credit_lease.lease_verify(account text DEFAULT NULL)
	RETURNS SETOF credit_lease.finding
	LANGUAGE c STABLE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp
	SET jit = off;		-- to compile its hundreds of expressions takes longer than most books
COMMENT ON FUNCTION credit_lease.lease_verify(text) IS
	'recomputes an account, or all of them, from the ledger; no row means that the books balance';

CREATE FUNCTION credit_lease.lease_reclaim(max_rows integer DEFAULT NULL)
	RETURNS bigint
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_reclaim(integer) IS
	'sweeps now: gives expired holds and chunks back and writes expired tranches off; the number of those given back';

-- Upstream

CREATE FUNCTION credit_lease.lease_install(account text, credit text, lease_id text, granted numeric,
		expires_at timestamptz, server name DEFAULT NULL)
	RETURNS boolean
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_install(text, text, text, numeric, timestamptz, name) IS
	'adds a lease to a pool; false when a live one fills the server''s slot, or the pool has had this one';

CREATE FUNCTION credit_lease.lease_extend(account text, credit text, lease_id text, granted_total numeric,
		expires_at timestamptz DEFAULT NULL)
	RETURNS boolean
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_extend(text, text, text, numeric, timestamptz) IS
	'raises a live lease to the upstream''s total and lets it live longer; false when that changes nothing';

CREATE FUNCTION credit_lease.lease_release(account text, credit text, lease_id text DEFAULT NULL)
	RETURNS boolean
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_release(text, text, text) IS
	'returns what remains of a live lease, or of all of a pool; false when there is none';

CREATE FUNCTION credit_lease.lease_sync(account text, credit text, balance numeric, as_of timestamptz,
		server name DEFAULT NULL, acknowledged text[] DEFAULT NULL)
	RETURNS credit_lease.sync_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_sync(text, text, numeric, timestamptz, name, text[]) IS
	'records a balance that lives elsewhere: what was spent here until then is taken off it already, or else what has the acknowledged keys; an older one than is known changes nothing';

CREATE FUNCTION credit_lease.lease_policy(account text, credit text)
	RETURNS credit_lease.policy_result
	LANGUAGE c STABLE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_policy(text, text) IS
	'the settings that hold for a pool, from all rows of policy and the defaults';

CREATE FUNCTION credit_lease.lease_prewarm(account text, credits text[], wait interval DEFAULT NULL)
	RETURNS SETOF credit_lease.prewarm_result
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_prewarm(text, text[], interval) IS
	'has leases acquired for pools that have none, and waits for them: as long as it says, or as acquire_timeout does';

-- The dialect "schematic": what is asked becomes an HTTP request, a reply
-- becomes an outcome. Both run as the owner of the server.
CREATE FUNCTION credit_lease.url_encode(value text)
	RETURNS text
	LANGUAGE sql IMMUTABLE STRICT
	SET search_path = pg_catalog, pg_temp
	BEGIN ATOMIC
	SELECT coalesce(string_agg(CASE WHEN chr(b.byte) ~ '[A-Za-z0-9._~-]' AND b.byte < 128 THEN chr(b.byte)
			ELSE '%' || upper(lpad(to_hex(b.byte), 2, '0')) END, '' ORDER BY b.n), '')
	  FROM (SELECT g.n, get_byte(convert_to($1, 'UTF8'), g.n)
			  FROM generate_series(0, octet_length(convert_to($1, 'UTF8')) - 1) AS g (n)) AS b (n, byte);
	END;
COMMENT ON FUNCTION credit_lease.url_encode(text) IS 'a text as a part of a URL''s path (RFC 3986)';

CREATE FUNCTION credit_lease.schematic_request(operation text, request jsonb)
	RETURNS jsonb
	LANGUAGE sql STABLE
	SET search_path = pg_catalog, pg_temp
	BEGIN ATOMIC
	SELECT jsonb_build_object(
		'url', CASE WHEN $1 = 'report' THEN rtrim(coalesce($2->>'events_url', $2->>'url'), '/') || '/batch'
			ELSE rtrim($2->>'url', '/') || '/billing/credits/lease'
				|| coalesce('/' || credit_lease.url_encode($2->>'lease_id') || '/' || nullif($1, 'acquire'), '') END,
		'headers', jsonb_build_object('X-Schematic-Api-Key', $2->'api_key', 'Idempotency-Key', $2->'idempotency_key'),
		'body', CASE $1
			WHEN 'acquire' THEN jsonb_build_object('company_id', $2->'company_id', 'credit_type_id', $2->'credit_type_id',
				'requested_amount', $2->'amount', 'expires_at', $2->'expires_at')
			WHEN 'extend' THEN jsonb_build_object('additional_amount', $2->'amount', 'expires_at', $2->'expires_at')
			WHEN 'release' THEN jsonb_build_object()
			WHEN 'report' THEN jsonb_build_object('events', (
				SELECT jsonb_agg(jsonb_build_object('api_key', $2->'api_key', 'type', 'track',
						'idempotency_key', e.event->'idempotency_key', 'sent_at', e.event->'created_at',
						'body', jsonb_build_object('event', e.event->'event', 'quantity', e.event->'quantity',
							'company', jsonb_build_object('id', e.event->'company_id'))
							|| (SELECT coalesce(jsonb_object_agg(o.key, o.value), '{}')
								  FROM jsonb_each(e.event) AS o (key, value) WHERE o.key IN ('lease_id', 'traits', 'cumulative'))) ORDER BY e.n)
				  FROM jsonb_array_elements($2->'events') WITH ORDINALITY AS e (event, n)))
			END);
	END;
COMMENT ON FUNCTION credit_lease.schematic_request(text, jsonb) IS 'dialect schematic: the HTTP request for an operation (acquire, extend, release or report)';

CREATE FUNCTION credit_lease.schematic_outcome(operation text, request jsonb, status integer, reply jsonb)
	RETURNS jsonb
	LANGUAGE sql STABLE
	SET search_path = pg_catalog, pg_temp
	BEGIN ATOMIC
	SELECT CASE WHEN $3 NOT BETWEEN 200 AND 299 THEN jsonb_build_object('error', $4->'error')
		WHEN $1 = 'report' THEN jsonb_build_object()
		ELSE jsonb_build_object('lease_id', d.data->'id', 'company_id', d.data->'company_id',
			'credit_type_id', d.data->'credit_type_id', 'granted', d.data->'granted_amount',
			'expires_at', d.data->'expires_at', 'released_at', d.data->'released_at') END
	  FROM (SELECT $4->'data') AS d (data);
	END;
COMMENT ON FUNCTION credit_lease.schematic_outcome(text, jsonb, integer, jsonb) IS 'dialect schematic: what a reply says';

-- The dialect "metronome": it knows balances and no leases. Quantities are
-- strings there, as a number could be read as a floating point number.
CREATE FUNCTION credit_lease.metronome_request(operation text, request jsonb)
	RETURNS jsonb
	LANGUAGE sql STABLE
	SET search_path = pg_catalog, pg_temp
	BEGIN ATOMIC
	SELECT jsonb_build_object(
		'url', CASE $1 WHEN 'report' THEN rtrim(coalesce($2->>'events_url', $2->>'url'), '/') || '/v1/ingest'
			WHEN 'balance' THEN rtrim($2->>'url', '/') || '/v1/contracts/customerBalances/getNetBalance' END,
		'headers', jsonb_build_object('Authorization', 'Bearer ' || ($2->>'api_key')),
		'body', CASE $1
			WHEN 'balance' THEN jsonb_build_object('customer_id', $2->'company_id', 'credit_type_id', $2->'credit_type_id')
			WHEN 'report' THEN (
				SELECT jsonb_agg(jsonb_build_object('transaction_id', e.event->'idempotency_key', 'customer_id', e.event->'company_id',
						'event_type', e.event->'event', 'timestamp', e.event->'created_at',
						'properties', coalesce(e.event->'traits', '{}') - '{cumulative,mirror}'::text[]
							|| jsonb_build_object('quantity', e.event->>'quantity', 'credit_type_id', e.event->'credit_type_id')
							|| CASE WHEN e.event->'cumulative' = 'true'
								THEN jsonb_build_object('cumulative', 'true', 'mirror', e.event->'mirror') ELSE '{}' END) ORDER BY e.n)
				  FROM jsonb_array_elements($2->'events') WITH ORDINALITY AS e (event, n))
			END);
	END;
COMMENT ON FUNCTION credit_lease.metronome_request(text, jsonb) IS 'dialect metronome: the HTTP request for an operation (balance or report)';

CREATE FUNCTION credit_lease.metronome_outcome(operation text, request jsonb, status integer, reply jsonb)
	RETURNS jsonb
	LANGUAGE sql STABLE
	SET search_path = pg_catalog, pg_temp
	BEGIN ATOMIC
	SELECT CASE WHEN $3 NOT BETWEEN 200 AND 299 THEN jsonb_build_object('error', coalesce($4->'message', $4->'error'))
		WHEN $1 = 'balance' THEN jsonb_build_object('balance', $4->'data'->'balance', 'credit_type_id', $4->'data'->'credit_type_id')
		ELSE jsonb_build_object() END;
	END;
COMMENT ON FUNCTION credit_lease.metronome_outcome(text, jsonb, integer, jsonb) IS 'dialect metronome: what a reply says';

-- Runs as whoever sets the options: it asks for his rights. CREATE SERVER calls
-- it without EXECUTE.
CREATE FUNCTION credit_lease.upstream_validator(text[], oid)
	RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.upstream_validator(text[], oid) IS
	'checks the options of upstreams and of user mappings for them';

CREATE FOREIGN DATA WRAPPER credit_lease VALIDATOR credit_lease.upstream_validator;
COMMENT ON FOREIGN DATA WRAPPER credit_lease IS 'upstreams: the billing APIs that credit is leased from';

-- Administration

CREATE FUNCTION credit_lease.lease_freeze(account text, credit text DEFAULT NULL, reason text DEFAULT NULL)
	RETURNS boolean
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_freeze(text, text, text) IS
	'stops spending and holding in a pool, or in all of an account; false when it was stopped already';

CREATE FUNCTION credit_lease.lease_unfreeze(account text, credit text DEFAULT NULL)
	RETURNS boolean
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_unfreeze(text, text) IS
	'lifts the freeze of a pool, or every freeze of an account; false when there was none';

CREATE FUNCTION credit_lease.lease_stripe(account text, credit text, stripes integer)
	RETURNS boolean
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_stripe(text, text, integer) IS
	'keeps each tranche of a pool in so many rows (1 to 64), as its policy says from now on; false when it did already';

CREATE FUNCTION credit_lease.lease_grant_access(role name, level text)
	RETURNS void
	LANGUAGE c VOLATILE SECURITY DEFINER AS 'MODULE_PATHNAME'
	SET search_path = pg_catalog, pg_temp;
COMMENT ON FUNCTION credit_lease.lease_grant_access(name, text) IS
	'grants a role what it needs to spend, to read, or to admin';

REVOKE ALL ON ALL TABLES IN SCHEMA credit_lease FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA credit_lease FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA credit_lease FROM PUBLIC;
REVOKE ALL ON TYPE credit_lease.topup_result, credit_lease.entry_result, credit_lease.consume_result,
	credit_lease.reserve_result, credit_lease.settle_result, credit_lease.renew_result,
	credit_lease.chunk_result, credit_lease.chunk_consume_result, credit_lease.session_result, credit_lease.check_result,
	credit_lease.explain_result, credit_lease.track_result, credit_lease.worker_result,
	credit_lease.upstream_result, credit_lease.policy_result, credit_lease.prewarm_result,
	credit_lease.sync_result, credit_lease.ingest_result FROM PUBLIC;
REVOKE ALL ON SCHEMA credit_lease FROM PUBLIC;
