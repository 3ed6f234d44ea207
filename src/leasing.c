/*
 * leasing.c
 *		The worker's side of leases: what to ask of upstreams, and what to make
 *		of the answers; and its requests, those of poll.c too.
 *
 * What is to be asked is a row of upstream_request, committed before it is
 * asked and removed together with the answer's effect (rule 12). After a
 * crash, or a reply that was lost, the same is asked again, with the same key
 * and for the same expiry. The worker is the only one who writes there, but
 * for releases, which lease_release() leaves in its own transaction.
 *
 * Answers go into the books by the functions of lease.c, which do not care
 * whether they come late or twice.
 *
 * Locks: an account, which is never waited for: an answer for one that is
 * locked is kept for a moment.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"

#include "account.h"
#include "amount.h"
#include "clock.h"
#include "demand.h"
#include "guard.h"
#include "leasing.h"
#include "poll.h"
#include "statement.h"
#include "upstream_state.h"

/* How much is looked at in one transaction */
#define LOOK_ROWS	200

/* A request that failed is tried again after that, at first and at most. */
#define FIRST_RETRY_MS		100
#define LONGEST_RETRY_MS	30000

/* ... and one that was refused, if somebody still needs it. */
#define FIRST_REFUSED_MS	1000

/* Who waits is told that the upstream backs off rather than kept waiting. */
#define SHORT_WAIT_MS	1000

/*
 * The expiry that is asked for differs by some from all others: by it a lease
 * is known to be ours, see exchange.c.
 */
#define ASKED_EXPIRY "$1 + p.lease_duration - (pg_catalog.random() * 0.1) * p.lease_duration"

#define REQUEST_COLUMNS \
	"credit_lease.upstream_request AS r (account, credit, kind, lease_id, server, company_id, credit_type_id," \
	" amount, expires_at, created_at, next_try_at)"

/* What was refused is asked anew, with another key; what is under way stays. */
#define OR_ASK_AGAIN \
	" ON CONFLICT (account, credit, kind, lease_id) DO UPDATE" \
	" SET server = excluded.server, company_id = excluded.company_id, credit_type_id = excluded.credit_type_id," \
	" amount = excluded.amount, expires_at = excluded.expires_at," \
	" idempotency_key = excluded.idempotency_key, next_try_at = excluded.next_try_at, refused = false" \
	" WHERE (r.refused AND r.next_try_at <= excluded.next_try_at) OR r.server <> excluded.server"

/*
 * Requests that nobody needs any more. A lease may live longer upstream than
 * we know, so that its release is asked for beyond its end.
 */
static Statement clean_statement = {
	.sql = "DELETE FROM credit_lease.upstream_request r"
	" WHERE (r.kind = 'acquire' AND r.expires_at <= $1)"
	" OR (r.kind = 'release' AND r.expires_at <= $1 - '1 day'::pg_catalog.interval)"
	" OR (r.refused AND r.next_try_at <= $1 - '1 minute'::pg_catalog.interval)"
	" OR (r.kind = 'extend' AND NOT EXISTS (SELECT FROM credit_lease.tranche t"
	"  WHERE t.account = r.account AND t.credit = r.credit AND t.kind = 'upstream' AND t.lease_id = r.lease_id"
	"  AND t.released_at IS NULL AND t.expires_at > $1))",
	.nargs = 1,
	.argtypes = {TIMESTAMPTZOID}
};

/* ... or was to be supplied with, as their policy has gone */
static Statement give_up_asking_statement = {
	.sql = "DELETE FROM credit_lease.upstream_request r WHERE r.kind <> 'release'"
	" AND r.server IS DISTINCT FROM (SELECT p.server FROM credit_lease.lease_policy(r.account, r.credit) p)"
};

/*
 * Leases that run low, and those in use that will end before long. In use is
 * what has been spent or held within the life of one lease.
 */
static Statement extend_statement = {
	.sql = "INSERT INTO " REQUEST_COLUMNS
	" SELECT t.account, t.credit, 'extend', t.lease_id, t.server, p.company_id, p.credit_type_id,"
	"  CASE WHEN t.remaining <= t.refill_below THEN p.lease_size ELSE greatest(p.lease_size - t.remaining, 0) END,"
	"  " ASKED_EXPIRY ", $1, $1"
	" FROM credit_lease.whole_tranche t, credit_lease.lease_policy(t.account, t.credit) p"
	" WHERE t.kind = 'upstream' AND t.released_at IS NULL AND t.expires_at > $1"
	"  AND (t.remaining <= t.refill_below OR t.refresh_at <= $1)"	/* before its policy is looked up */
	"  AND p.server = t.server AND (t.remaining <= t.refill_below OR (EXISTS ("
	"   SELECT FROM (SELECT l.credit, l.kind, l.created_at FROM credit_lease.ledger l"
	"    WHERE l.account = t.account ORDER BY l.entry_id DESC LIMIT 20) l"
	"   WHERE l.credit = t.credit AND l.kind IN ('consume', 'reserve', 'settle', 'track', 'session_charge') AND l.created_at > $1 - p.lease_duration)))"
	"  AND NOT EXISTS (SELECT FROM credit_lease.upstream_request q WHERE q.account = t.account AND q.credit = t.credit"
	"   AND q.kind = 'extend' AND q.lease_id = t.lease_id AND (NOT q.refused OR q.next_try_at > $1))"
	" LIMIT $2" OR_ASK_AGAIN,
	.nargs = 2,
	.argtypes = {TIMESTAMPTZOID, INT4OID}
};

/* Leases that the worker has acquired for a policy that is not there any more */
static Statement unwanted_statement = {
	.sql = "SELECT t.account, t.credit, t.lease_id"
	" FROM credit_lease.tranche t, credit_lease.lease_policy(t.account, t.credit) p"
	" WHERE t.kind = 'upstream' AND t.released_at IS NULL AND t.expires_at > $1 AND t.refill_below IS NOT NULL"
	" AND p.server IS DISTINCT FROM t.server LIMIT $2",
	.nargs = 2,
	.argtypes = {TIMESTAMPTZOID, INT4OID}
};

static Statement release_statement = {
	.sql = "SELECT credit_lease.lease_release($1, $2, $3)",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID}
};

/*
 * Who has to be asked for a pool, what it has, and what is being asked
 * already. As long as a lease of the pool is to be released, the upstream
 * would hand that one back, until that has ended there. Of a mirror the last
 * columns tell: whether it is trusted, and when it was told.
 */
static Statement pool_statement = {
	.sql = "SELECT p.server, s.available, t.lease_id, r.next_try_at, r.refused, r.error,"
	" u.supply = 'mirror', m.trusted, m.synced_at"
	" FROM credit_lease.lease_policy($1, $2) p"
	" LEFT JOIN credit_lease.upstream u ON u.server = p.server"
	" LEFT JOIN (SELECT k.server, k.trusted_until IS NULL OR k.trusted_until > $3 AS trusted, c.synced_at"
	"  FROM credit_lease.tranche k JOIN credit_lease.mirror c ON c.account = $1 AND c.credit = $2 AND c.tranche_id = k.tranche_id"
	"  WHERE k.account = $1 AND k.credit = $2 AND k.kind = 'mirror') m ON m.server = p.server"
	" CROSS JOIN (SELECT coalesce(pg_catalog.sum(o.remaining), 0) AS available FROM credit_lease.whole_tranche o"
	"  WHERE o.account = $1 AND o.credit = $2 AND o.open AND o.released_at IS NULL"
	"  AND (o.expires_at IS NULL OR o.expires_at > $3) AND (o.trusted_until IS NULL OR o.trusted_until > $3)) s"
	" LEFT JOIN credit_lease.tranche t ON t.account = $1 AND t.credit = $2 AND t.kind = 'upstream'"
	"  AND t.server = p.server AND t.released_at IS NULL AND t.expires_at > $3"
	" LEFT JOIN credit_lease.upstream_request r ON r.account = $1 AND r.credit = $2 AND r.server = p.server"
	"  AND (CASE WHEN u.supply = 'mirror' THEN r.kind = 'balance' WHEN t.lease_id IS NULL"
	"    THEN r.kind = 'acquire' OR (r.kind = 'release' AND r.expires_at > $3)"
	"   ELSE r.kind = 'extend' AND r.lease_id = t.lease_id END)"
	" ORDER BY r.kind DESC LIMIT 1",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, TIMESTAMPTZOID}
};

static Statement ask_statement = {
	.sql = "INSERT INTO " REQUEST_COLUMNS
	" SELECT $2, $3, CASE WHEN $4::pg_catalog.text IS NULL THEN 'acquire' ELSE 'extend' END, $4, p.server,"
	"  p.company_id, p.credit_type_id, greatest(p.lease_size, $5), " ASKED_EXPIRY ", $1, $1"
	" FROM credit_lease.lease_policy($2, $3) p" OR_ASK_AGAIN,
	.nargs = 5,
	.argtypes = {TIMESTAMPTZOID, TEXTOID, TEXTOID, TEXTOID, NUMERICOID}
};

/*
 * What is to be sent now, no more to one server than its share, so that one
 * that hangs does not keep others waiting. A lease is given back upstream when
 * all of its usage has been reported and nothing of it is held or carved out.
 * What is refunded when that has been read is not read any more.
 */
static Statement due_statement = {
	.sql = "SELECT d.* FROM (SELECT r.account, r.credit, r.kind, r.lease_id, r.server,"
	" pg_catalog.jsonb_strip_nulls(pg_catalog.jsonb_build_object('account', r.account, 'credit', r.credit,"
	"  'idempotency_key', r.idempotency_key, 'lease_id', r.lease_id,"
	"  'company_id', r.company_id, 'credit_type_id', r.credit_type_id, 'amount', pg_catalog.trim_scale(r.amount),"
	"  'expires_at', pg_catalog.to_char(r.expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'))) AS request,"
	" r.next_try_at, pg_catalog.row_number() OVER (PARTITION BY r.server ORDER BY r.next_try_at) AS place"
	" FROM credit_lease.upstream_request r"
	" WHERE r.next_try_at <= $1 AND NOT r.refused"
	" AND r.server <> ALL ($6)"
	" AND NOT EXISTS (SELECT FROM unnest($3, $4, $5) AS f (account, credit, kind)"
	"  WHERE f.account = r.account AND f.credit = r.credit AND f.kind = r.kind)"
	" AND (r.kind <> 'release' OR NOT EXISTS (SELECT FROM credit_lease.whole_tranche t"
	"  JOIN credit_lease.lease_usage u ON u.account = t.account AND u.credit = t.credit AND u.tranche_id = t.tranche_id"
	"  WHERE t.account = r.account AND t.credit = r.credit AND t.kind = 'upstream' AND t.lease_id = r.lease_id"
	"  AND (t.reserved > 0 OR t.chunked > 0 OR (NOT u.complete AND t.consumed <> u.consumed)"
	"   OR EXISTS (SELECT FROM credit_lease.usage_report q WHERE q.account = t.account AND q.credit = t.credit"
	"    AND q.tranche_id = t.tranche_id AND q.refused_at IS NULL))))"
	" ) d WHERE d.place + (SELECT pg_catalog.count(*) FROM unnest($7) AS f (server) WHERE f.server = d.server) <= $8"
	" ORDER BY d.next_try_at LIMIT $2",
	.nargs = 8,
	.argtypes = {TIMESTAMPTZOID, INT4OID, TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID, INT4OID}
};

static Statement next_due_statement = {
	.sql = "SELECT pg_catalog.min(r.next_try_at) FROM credit_lease.upstream_request r"
	" WHERE r.next_try_at > $1 AND NOT r.refused",
	.nargs = 1,
	.argtypes = {TIMESTAMPTZOID}
};

static Statement try_again_statement = {
	.sql = "UPDATE credit_lease.upstream_request r SET attempts = 0, next_try_at = $1"
	" WHERE r.next_try_at > $1 AND NOT r.refused",
	.nargs = 1,
	.argtypes = {TIMESTAMPTZOID}
};

static Statement postpone_statement = {
	.sql = "UPDATE credit_lease.upstream_request r"
	" SET attempts = r.attempts + 1, next_try_at = $5 + pg_catalog.make_interval(secs =>"
	"  least($6 * 2 ^ least(r.attempts, 20), $7) * (0.5 + pg_catalog.random() / 2) / 1000.0), refused = $8, error = $9"
	" WHERE r.account = $1 AND r.credit = $2 AND r.kind = $3 AND r.lease_id IS NOT DISTINCT FROM $4",
	.nargs = 9,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, INT4OID, INT4OID, BOOLOID, TEXTOID}
};

/* More than a lease's usual size was refused: others need less. */
static Statement ask_less_statement = {
	.sql = "UPDATE credit_lease.upstream_request r"
	" SET amount = p.lease_size, idempotency_key = pg_catalog.gen_random_uuid(), error = $5"
	" FROM credit_lease.lease_policy($1, $2) p"
	" WHERE r.account = $1 AND r.credit = $2 AND r.kind = $3 AND r.lease_id IS NOT DISTINCT FROM $4"
	" AND r.amount > p.lease_size",
	.nargs = 5,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID}
};

static Statement remove_statement = {
	.sql = "DELETE FROM credit_lease.upstream_request r"
	" WHERE r.account = $1 AND r.credit = $2 AND r.kind = $3 AND r.lease_id IS NOT DISTINCT FROM $4",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TEXTOID}
};

static Statement account_statement = {
	.sql = "SELECT FROM credit_lease.account a WHERE a.account = $1",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

/*
 * A lease stops serving a safety margin before its end. An extension also says
 * by how much the total is higher than it was, as the statement's snapshot has
 * it.
 */
static Statement install_statement = {
	.sql = "SELECT credit_lease.lease_install($1, $2, $3, $4, $5 - p.safety_margin, $6)"
	" FROM credit_lease.lease_policy($1, $2) p",
	.nargs = 6,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, NUMERICOID, TIMESTAMPTZOID, NAMEOID}
};

static Statement extend_lease_statement = {
	.sql = "SELECT credit_lease.lease_extend($1, $2, $3, $4, $5 - p.safety_margin),"
	" coalesce($4 - (SELECT t.granted FROM credit_lease.tranche t"
	"  WHERE t.account = $1 AND t.credit = $2 AND t.kind = 'upstream' AND t.lease_id = $3), 0)"
	" FROM credit_lease.lease_policy($1, $2) p",
	.nargs = 5,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, NUMERICOID, TIMESTAMPTZOID}
};

/* From now on the worker looks after the lease. Its policy may have gone meanwhile. */
static Statement look_after_statement = {
	.sql = "UPDATE credit_lease.tranche t"
	" SET refill_below = CASE WHEN $5 THEN w.remaining * p.low_water_mark ELSE t.refill_below END,"
	" refresh_at = t.expires_at - (t.expires_at - $4) / 4"
	" FROM credit_lease.lease_policy($1, $2) p, credit_lease.whole_tranche w"
	" WHERE w.account = t.account AND w.credit = t.credit AND w.tranche_id = t.tranche_id AND t.account = $1 AND t.credit = $2 AND t.kind = 'upstream' AND t.lease_id = $3"
	" RETURNING p.server IS DISTINCT FROM t.server",
	.nargs = 5,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, BOOLOID}
};

static Statement note_statement = {
	.sql = "UPDATE credit_lease.lease_usage u SET company_id = $4, upstream_balance = $5"
	" FROM credit_lease.tranche t"
	" WHERE t.account = $1 AND t.credit = $2 AND t.kind = 'upstream' AND t.lease_id = $3"
	" AND u.account = $1 AND u.credit = $2 AND u.tranche_id = t.tranche_id",
	.nargs = 5,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TEXTOID, NUMERICOID}
};

#define RELEASE_ACQUIRED \
	"INSERT INTO credit_lease.upstream_request AS r (account, credit, kind, lease_id, server, company_id," \
	" credit_type_id, expires_at, created_at, next_try_at)" \
	" SELECT q.account, q.credit, 'release', $3, q.server, q.company_id, q.credit_type_id, $5, $4, $4" \
	" FROM credit_lease.upstream_request q WHERE q.account = $1 AND q.credit = $2 AND q.kind = 'acquire'"

/* Whether another pool has or had a lease: whatever it says of itself, it is not for two. */
static Statement owner_statement = {
	.sql = "SELECT FROM credit_lease.tranche t WHERE t.kind = 'upstream' AND t.lease_id = $1 AND t.server = $2"
	" AND (t.account <> $3 OR t.credit <> $4)",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TEXTOID}
};

/* An acquire that lost the race: another lease fills the slot. */
static Statement give_up_statement = {
	.sql = RELEASE_ACQUIRED
	" AND NOT EXISTS (SELECT FROM credit_lease.tranche t WHERE t.account = $1 AND t.credit = $2"
	"  AND t.kind = 'upstream' AND t.lease_id = $3)"
	" AND EXISTS (SELECT FROM credit_lease.tranche t WHERE t.account = $1 AND t.credit = $2"
	"  AND t.kind = 'upstream' AND t.server = q.server AND t.released_at IS NULL AND t.expires_at > $4)"
	" ON CONFLICT (account, credit, kind, lease_id) DO NOTHING",
	.nargs = 5,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID}
};

/* By the old key, an upstream would give the old answer for ever. */
static Statement ask_anew_statement = {
	.sql = "UPDATE credit_lease.upstream_request r"
	" SET idempotency_key = pg_catalog.gen_random_uuid(), expires_at = " ASKED_EXPIRY
	" FROM credit_lease.lease_policy($2, $3) p"
	" WHERE r.account = $2 AND r.credit = $3 AND r.kind = 'acquire'",
	.nargs = 3,
	.argtypes = {TIMESTAMPTZOID, TEXTOID, TEXTOID}
};

/*
 * An earlier lease of the pool that is over here and not upstream, as when the
 * answer to its last extension was lost
 */
static Statement give_back_statement = {
	.sql = RELEASE_ACQUIRED
	" AND EXISTS (SELECT FROM credit_lease.tranche t WHERE t.account = $1 AND t.credit = $2"
	"  AND t.kind = 'upstream' AND t.lease_id = $3 AND t.server = q.server"
	"  AND (t.released_at IS NOT NULL OR t.expires_at <= $4))"
	" ON CONFLICT (account, credit, kind, lease_id) DO UPDATE SET expires_at = excluded.expires_at",
	.nargs = 5,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID}
};

/* There are leases to release that could not be, or not be seen, when policies changed. */
static bool some_unwanted = false;

static void
add_text(Parameters *parameters, const char *string)
{
	parameter_add_pointer(parameters, string ? cstring_to_text(string) : NULL);
}

/* What guard() has to do: a lease as three texts */
static void
release(void *lease)
{
	Parameters	parameters = {0};

	for (int i = 0; i < 3; i++)
		parameter_add(&parameters, ((Datum *) lease)[i]);
	statement_execute(&release_statement, &parameters);
}

/* Returns whether all are released; those of a locked account, and those above a number, are not. */
static bool
release_unwanted(TimestampTz now)
{
	Parameters	parameters = {0};
	SPITupleTable *rows;
	uint64		n;
	bool		all;

	parameter_add(&parameters, TimestampTzGetDatum(now));
	parameter_add(&parameters, Int32GetDatum(LOOK_ROWS));
	n = statement_execute(&unwanted_statement, &parameters);
	rows = SPI_tuptable;
	all = n < LOOK_ROWS;
	for (uint64 i = 0; i < n; i++)
	{
		Datum		lease[3];
		bool		isnull;
		AccountMarks marks;
		ErrorData  *error;

		for (int k = 0; k < 3; k++)
			lease[k] = SPI_getbinval(rows->vals[i], rows->tupdesc, k + 1, &isnull);
		if (!account_lock(DatumGetTextPP(lease[0]), ACCOUNT_LOCK_IF_FREE, &marks))
			all = false;
		else if ((error = guard(release, lease)) && error->sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE)
			all = false;
		else if (error)
			ereport(WARNING,
					(errcode(error->sqlerrcode),
					 errmsg("lease \"%s\" was not released: %s",
							TextDatumGetCString(lease[2]), error->message)));
	}
	return all;
}

/*
 * leasing_look
 *		Looks through the leases for those that need more, or more time, and
 *		through the mirrors.
 */
void
leasing_look(void)
{
	Parameters	parameters = {0};

	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	parameter_add(&parameters, Int32GetDatum(LOOK_ROWS));
	statement_execute(&extend_statement, &parameters);
	poll_look();
}

/* Lets what has failed be tried again now: what was wrong may have been mended. */
void
leasing_try_again(void)
{
	Parameters	parameters = {0};

	parameter_add(&parameters, TimestampTzGetDatum(GetCurrentTimestamp()));
	statement_execute(&try_again_statement, &parameters);
}

/*
 * leasing_clean
 *		Removes requests that nobody needs any more, and if policies have
 *		changed, releases the leases of those that are gone.
 */
void
leasing_clean(bool policies_changed)
{
	TimestampTz now = clock_now();
	Parameters	parameters = {0};
	Parameters	none = {0};

	parameter_add(&parameters, TimestampTzGetDatum(now));
	statement_execute(&clean_statement, &parameters);
	if (policies_changed)
		statement_execute(&give_up_asking_statement, &none);
	if (policies_changed || some_unwanted)
		some_unwanted = !release_unwanted(now);
	poll_follow_policies(policies_changed);
}

static bool
is_under_way(List *exchanges, const char *account, const char *credit)
{
	ListCell   *cell;

	foreach(cell, exchanges)
	{
		Exchange   *exchange = lfirst(cell);

		if (exchange->account && strcmp(exchange->account, account) == 0 &&
			strcmp(exchange->credit, credit) == 0 && strcmp(exchange->operation, "release") != 0)
			return true;
	}
	return false;
}

/* What all who wait for a pool need */
typedef struct Need
{
	Numeric		sum;
	Numeric		least;			/* that any of them needs; 0 if all would have any lease */
	TimestampTz until;			/* how long the last of them waits */
} Need;

static void
add_need(Need *need, const Demand *demand)
{
	need->sum = amount_add(need->sum, demand->amount);
	need->until = Max(need->until, demand->until);
	if (amount_sign(demand->amount) > 0)
		need->least = amount_sign(need->least) > 0 ? amount_min(need->least, demand->amount) : demand->amount;
}

/*
 * Asks for what a pool lacks, or answers those who wait for it. A balance is
 * not more for being asked for: whoever it is enough for goes on, and for the
 * others it is asked for again, at *next_due, as it may be more the next time.
 */
static void
meet(const char *account, const char *credit, const Need *need, TimestampTz *next_due)
{
	TimestampTz now = clock_now();
	TimestampTz soon = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), SHORT_WAIT_MS);
	Parameters	parameters = {0};
	Parameters	ask = {0};
	bool		no_server;
	bool		no_lease;
	bool		no_request;
	bool		no_error;
	bool		isnull;
	char	   *server;
	Numeric		available;
	Datum		lease_id;
	TimestampTz next_try_at;
	bool		refused;
	Datum		error;
	char	   *server_error;
	bool		mirrors;
	bool		trusted;
	TimestampTz synced_at;

	add_text(&parameters, account);
	add_text(&parameters, credit);
	parameter_add(&parameters, TimestampTzGetDatum(now));
	if (statement_execute(&pool_statement, &parameters) == 0)
		elog(ERROR, "a pool has no policy");

	server = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	no_server = server == NULL;
	available = DatumGetNumeric(statement_value(0, 2, &isnull));
	lease_id = statement_value(0, 3, &no_lease);
	next_try_at = DatumGetTimestampTz(statement_value(0, 4, &no_request));
	refused = DatumGetBool(statement_value(0, 5, &isnull));
	error = statement_value(0, 6, &no_error);
	mirrors = DatumGetBool(statement_value(0, 7, &isnull)) && !isnull;
	trusted = DatumGetBool(statement_value(0, 8, &isnull)) && !isnull;
	synced_at = DatumGetTimestampTz(statement_value(0, 9, &isnull));

	if (amount_sign(need->sum) > 0 ? amount_compare(available, mirrors ? need->least : need->sum) >= 0 :
		mirrors ? trusted : !no_lease)
		demand_answer(account, credit, DEMAND_SUPPLIED, NULL);
	else if (no_server)
		demand_answer(account, credit, DEMAND_NO_UPSTREAM, NULL);
	else if (!no_request && refused && next_try_at > now)
		demand_answer(account, credit, DEMAND_REFUSED, no_error ? NULL : TextDatumGetCString(error));
	else if (!no_request && !refused && next_try_at > soon)
		demand_answer(account, credit, DEMAND_UNREACHABLE, no_error ? NULL : TextDatumGetCString(error));
	else if (upstream_state_backs_off_until(server, &server_error) > soon)
		demand_answer(account, credit, DEMAND_UNREACHABLE, server_error);
	else if ((no_request || refused) && mirrors)
	{
		if (poll_ask(account, credit, synced_at, next_due))
			return;
		if (need->until <= GetCurrentTimestamp())
			demand_answer(account, credit, DEMAND_REFUSED, NULL);
		else
			demand_hint_short(account, credit);
	}
	else if (no_request || refused)
	{
		parameter_add(&ask, TimestampTzGetDatum(now));
		add_text(&ask, account);
		add_text(&ask, credit);
		if (no_lease)
			parameter_add_null(&ask);
		else
			parameter_add(&ask, lease_id);
		parameter_add_pointer(&ask, amount_sign(need->sum) > 0 ? amount_subtract(need->sum, available) : need->sum);
		statement_execute(&ask_statement, &ask);
	}
}

/*
 * leasing_meet_demand
 *		Asks for what sessions wait for, all that wait for a pool together,
 *		and answers them where that is there, or will not come; *next_due is
 *		when there is more to do, if it is earlier.
 */
void
leasing_meet_demand(List *exchanges, TimestampTz *next_due)
{
	List	   *demands = demand_collect();
	ListCell   *cell;

	foreach(cell, demands)
	{
		Demand	   *demand = lfirst(cell);
		Need		need = {.sum = amount_zero(), .least = amount_zero()};
		ListCell   *other;

		if (demand->account == NULL)
			continue;			/* with an earlier one of its pool */
		add_need(&need, demand);
		for_each_cell(other, demands, lnext(demands, cell))
		{
			Demand	   *same = lfirst(other);

			if (same->account && strcmp(same->account, demand->account) == 0 &&
				strcmp(same->credit, demand->credit) == 0)
			{
				add_need(&need, same);
				same->account = NULL;
			}
		}
		if (!is_under_way(exchanges, demand->account, demand->credit))
			meet(demand->account, demand->credit, &need, next_due);
	}
}

/* Adds what is under way: the pools and kinds, the servers that back off, the servers. */
static void
add_under_way(Parameters *parameters, List *exchanges, ArrayType *backing_off)
{
	int			n = 0;
	Datum	   *text[4];
	ListCell   *cell;

	for (int i = 0; i < 4; i++)
		text[i] = palloc(sizeof(Datum) * (list_length(exchanges) + 1));
	foreach(cell, exchanges)
	{
		Exchange   *exchange = lfirst(cell);

		if (exchange->account == NULL)
			continue;
		text[0][n] = CStringGetTextDatum(exchange->account);
		text[1][n] = CStringGetTextDatum(exchange->credit);
		text[2][n] = CStringGetTextDatum(exchange->operation);
		text[3][n] = CStringGetTextDatum(exchange->server);
		n++;
	}
	for (int i = 0; i < 4; i++)
	{
		if (i == 3)
			parameter_add_pointer(parameters, backing_off);
		parameter_add_texts(parameters, text[i], n);
	}
}

/* Notes that a request was not of use, and when it may be made again. */
static void
postpone(const char *account, const char *credit, const char *kind, const char *lease_id,
		 bool refused, const char *error)
{
	Parameters	parameters = {0};
	Parameters	less = {0};

	add_text(&parameters, account);
	add_text(&parameters, credit);
	add_text(&parameters, kind);
	add_text(&parameters, lease_id);
	less = parameters;
	add_text(&less, error);
	if (refused && statement_execute(&ask_less_statement, &less) > 0)
		return;
	parameter_add(&parameters, TimestampTzGetDatum(GetCurrentTimestamp()));
	parameter_add(&parameters, Int32GetDatum(refused ? FIRST_REFUSED_MS : FIRST_RETRY_MS));
	parameter_add(&parameters, Int32GetDatum(LONGEST_RETRY_MS));
	parameter_add(&parameters, BoolGetDatum(refused));
	add_text(&parameters, error);
	statement_execute(&postpone_statement, &parameters);
}

static bool
is_about_balance(const Exchange *exchange)
{
	return strcmp(exchange->operation, "balance") == 0;
}

/*
 * leasing_prepare
 *		Returns what is to be sent when the transaction has committed, at most
 *		so many beside what is under way, and at most a share of all to one
 *		server; *next_due is when there is more to do, if it is earlier. A
 *		server that cannot be asked is left alone.
 */
List *
leasing_prepare(List *exchanges, int most, int share, TimestampTz *next_due)
{
	TimestampTz now = GetCurrentTimestamp();
	Parameters	parameters = {0};
	List	   *prepared = NIL;
	SPITupleTable *rows;
	uint64		n;
	bool		isnull;
	Datum		due;

	parameter_add(&parameters, TimestampTzGetDatum(now));
	parameter_add(&parameters, Int32GetDatum(most));
	add_under_way(&parameters, exchanges, upstream_state_backing_off(false, now, next_due));
	parameter_add(&parameters, Int32GetDatum(share));
	n = most > 0 ? statement_execute(&due_statement, &parameters) : 0;
	rows = SPI_tuptable;

	for (uint64 i = 0; i < n; i++)
	{
		MemoryContext old = CurrentMemoryContext;
		char	   *column[5];
		char	   *error;
		Exchange   *exchange;

		for (int k = 0; k < 5; k++)
			column[k] = SPI_getvalue(rows->vals[i], rows->tupdesc, k + 1);
		exchange = exchange_prepare(column[4], column[2],
									DatumGetJsonbP(SPI_getbinval(rows->vals[i], rows->tupdesc, 6, &isnull)),
									&error);
		if (exchange == NULL)
		{
			postpone(column[0], column[1], column[2], column[3], false, error);
			continue;
		}
		exchange->account = pstrdup(column[0]);
		exchange->credit = pstrdup(column[1]);
		exchange->lease_id = column[3] ? pstrdup(column[3]) : NULL;
		MemoryContextSwitchTo(old);
		if (is_about_balance(exchange))
			poll_note(exchange);
		prepared = lappend(prepared, exchange);
	}

	parameters = (Parameters) {0};
	parameter_add(&parameters, TimestampTzGetDatum(now));
	statement_execute(&next_due_statement, &parameters);
	due = statement_value(0, 1, &isnull);
	if (!isnull)
		*next_due = Min(*next_due, DatumGetTimestampTz(due));
	return prepared;
}

static void
add_lease(Parameters *parameters, const Exchange *exchange, const char *lease_id)
{
	add_text(parameters, exchange->account);
	add_text(parameters, exchange->credit);
	add_text(parameters, lease_id);
}

static void
remove_request(const Exchange *exchange)
{
	Parameters	parameters = {0};

	add_text(&parameters, exchange->account);
	add_text(&parameters, exchange->credit);
	add_text(&parameters, exchange->operation);
	add_text(&parameters, exchange->lease_id);
	statement_execute(&remove_statement, &parameters);
}

static bool
is_of_another_pool(const Exchange *exchange)
{
	Parameters	parameters = {0};

	add_text(&parameters, exchange->terms.lease_id);
	add_text(&parameters, exchange->server);
	add_text(&parameters, exchange->account);
	add_text(&parameters, exchange->credit);
	return statement_execute(&owner_statement, &parameters) > 0;
}

/* Does not take a lease that is not ours to spend. If it was, it is released upstream. */
static void
refuse_other_lease(Exchange *exchange)
{
	Parameters	parameters = {0};
	Parameters	anew = {0};

	parameter_add(&anew, TimestampTzGetDatum(clock_now()));
	add_text(&anew, exchange->account);
	add_text(&anew, exchange->credit);
	add_lease(&parameters, exchange, exchange->terms.lease_id);
	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	parameter_add(&parameters, TimestampTzGetDatum(exchange->terms.expires_at));
	if (statement_execute(&give_back_statement, &parameters) > 0)
	{
		/* what is asked next has another key, and waits for that */
		remove_request(exchange);
		exchange->error = "an earlier lease of the pool is still alive upstream; it is released first";
	}
	else
	{
		statement_execute(&ask_anew_statement, &anew);
		exchange->error = "the lease in the reply is not the one that was asked for, as it ends at another time:"
			" somebody else may lease for the same company, or the upstream does not grant lease_duration";
	}
}

/*
 * Notes who the lease was asked for, and what the upstream has beyond it: who
 * grants less than is asked for has no more.
 */
static void
note_upstream(const Exchange *exchange, Parameters lease, Numeric raised)
{
	Numeric		asked = exchange_asked_amount(exchange);
	Numeric		balance = exchange->terms.balance;

	if (balance == NULL && amount_sign(asked) == 0)
		return;
	if (balance == NULL && amount_sign(raised) >= 0 && amount_compare(raised, asked) < 0)
		balance = amount_zero();
	add_text(&lease, exchange_asked_company(exchange));
	parameter_add_pointer(&lease, balance);
	statement_execute(&note_statement, &lease);
}

/* Installs the lease that was acquired, or gives it up; or extends the one there is. */
static void
take_terms(void *arg)
{
	Exchange   *exchange = arg;
	const LeaseTerms *terms = &exchange->terms;
	bool		acquired = exchange->lease_id == NULL;
	Parameters	parameters = {0};
	Parameters	lease = {0};
	bool		isnull;
	bool		changed;
	Numeric		raised;
	bool		in_vain;

	if (acquired && (!terms->as_asked || is_of_another_pool(exchange)))
	{
		refuse_other_lease(exchange);
		return;
	}
	add_lease(&parameters, exchange, terms->lease_id);
	parameter_add_pointer(&parameters, terms->granted);
	parameter_add(&parameters, TimestampTzGetDatum(terms->expires_at));
	if (acquired)
		parameter_add(&parameters, DirectFunctionCall1(namein, CStringGetDatum(exchange->server)));
	statement_execute(acquired ? &install_statement : &extend_lease_statement, &parameters);
	changed = DatumGetBool(statement_value(0, 1, &isnull));
	raised = acquired ? terms->granted : DatumGetNumeric(statement_value(0, 2, &isnull));
	in_vain = amount_sign(raised) <= 0;

	add_lease(&lease, exchange, terms->lease_id);
	if (changed)
	{
		Parameters	look_after = lease;

		parameter_add(&look_after, TimestampTzGetDatum(clock_now()));
		parameter_add(&look_after, BoolGetDatum(!in_vain));
		statement_execute(&look_after_statement, &look_after);
		some_unwanted |= DatumGetBool(statement_value(0, 1, &isnull));
	}
	if (changed || !acquired)
		note_upstream(exchange, lease, raised);
	else
	{
		parameter_add(&lease, TimestampTzGetDatum(clock_now()));
		parameter_add(&lease, TimestampTzGetDatum(terms->expires_at));
		statement_execute(&give_up_statement, &lease);
	}
	/* asking for more again at once would be in vain */
	if (in_vain && amount_sign(exchange_asked_amount(exchange)) > 0)
		exchange->error = "the upstream granted no more";
}

/*
 * leasing_take
 *		Takes an answer into the books. Returns false where the account, or all
 *		of its stripes, are locked: it is to be tried again, in another
 *		transaction.
 */
bool
leasing_take(Exchange *exchange)
{
	text	   *account = cstring_to_text(exchange->account);
	Parameters	parameters = {0};
	bool		releases = strcmp(exchange->operation, "release") == 0;
	char	   *error = exchange->error;
	bool		refused = exchange->result == EXCHANGE_REFUSED;
	ErrorData  *failure;
	AccountMarks marks;

	parameter_add_pointer(&parameters, account);
	if (exchange->result == EXCHANGE_DONE && !releases)
	{
		/* an account that is not there is made by lease_install() */
		if (!account_lock(account, ACCOUNT_LOCK_IF_FREE, &marks) &&
			statement_execute(&account_statement, &parameters) > 0)
			return false;
		failure = guard(is_about_balance(exchange) ? poll_take : take_terms, exchange);
		if (failure && failure->sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE)
			return false;
		error = failure ? failure->message : exchange->error;
		refused = failure == NULL && error != NULL && exchange->lease_id;
		if (error)
		{
			upstream_state_note(exchange->server, error);
			ereport(LOG,
					(errcode(failure ? failure->sqlerrcode : ERRCODE_FDW_REPLY_HANDLE),
					 errmsg("an answer of upstream \"%s\" for credit \"%s\" of account \"%s\" was not taken: %s",
							exchange->server, exchange->credit, exchange->account, error)));
		}
	}

	/* a lease that the upstream does not know, or not any more, is given back */
	if (error == NULL || (releases && exchange->result == EXCHANGE_REFUSED))
		remove_request(exchange);
	else
		postpone(exchange->account, exchange->credit, exchange->operation, exchange->lease_id,
				 refused, error);
	return true;
}
