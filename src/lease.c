/*
 * lease.c
 *		lease_install(), lease_extend() and lease_release(): what an upstream
 *		has answered, put into the books. Nothing here talks to one.
 *
 * A lease is a tranche with the upstream's id. A pool has a slot for each
 * server, and one for leases without a server; the lease that is alive fills
 * it, used up or not. Replies may come late, twice and out of order: an id is
 * installed once, for ever, and extended by the difference to the upstream's
 * total (rule 11), so that none of them mints credit.
 *
 * A lease that is released serves nobody from then on, while what its holds
 * have can still be settled; what they give back is returned as well.
 *
 * Locks: the account, which installing creates.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "argument.h"
#include "clock.h"
#include "demand.h"
#include "ledger.h"
#include "reclaim.h"
#include "restripe.h"
#include "statement.h"
#include "upstream.h"
#include "worker_state.h"

static const EntryKind kind_install = {.name = "install", .bucket = GRANTED};
static const EntryKind kind_extend = {.name = "extend", .bucket = GRANTED};
static const EntryKind kind_release = {.name = "release", .bucket = RETURNED};

/*
 * The leases that a call may be about: those with the id, whatever has become
 * of them, and those that have not expired. Above READ COMMITTED they are read
 * as they are committed, so that pool_read() sees what the snapshot lacks.
 */
static Statement candidates_statement = {
	.sql = "SELECT t.tranche_id FROM credit_lease.tranche t"
	" WHERE t.account = $1 AND t.credit = $2 AND t.kind = 'upstream' AND t.lease_id = $3"
	" UNION SELECT t.tranche_id FROM credit_lease.tranche t"
	" WHERE t.account = $1 AND t.credit = $2 AND t.kind = 'upstream' AND t.expires_at > $4",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID}
};

/* From where the worker reads what is spent of a lease, to report it. */
static Statement usage_statement = {
	.sql = "INSERT INTO credit_lease.lease_usage (account, credit, tranche_id) VALUES ($1, $2, $3)",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT8OID}
};

/* What the worker is to tell the upstream, when this has committed (rule 9) */
static Statement release_statement = {
	.sql = "INSERT INTO credit_lease.upstream_request (account, credit, kind, lease_id, server, company_id, credit_type_id,"
	"  expires_at, created_at, next_try_at)"
	" SELECT $1, $2, 'release', $3, $4, coalesce(u.company_id, p.company_id), p.credit_type_id, $6, $7, $7"
	" FROM credit_lease.lease_usage u, credit_lease.lease_policy($1, $2) p"
	" WHERE u.account = $1 AND u.credit = $2 AND u.tranche_id = $5"
	" ON CONFLICT (account, credit, kind, lease_id) DO NOTHING",
	.nargs = 7,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
};

static bool
same_text(const text *a, const text *b)
{
	if (a == NULL || b == NULL)
		return a == b;
	return VARSIZE_ANY_EXHDR(a) == VARSIZE_ANY_EXHDR(b) &&
		memcmp(VARDATA_ANY(a), VARDATA_ANY(b), VARSIZE_ANY_EXHDR(a)) == 0;
}

/* Returns when a lease expires; one that never does is none. */
static TimestampTz
argument_expiry(FunctionCallInfo fcinfo, int n)
{
	TimestampTz expires_at = PG_GETARG_TIMESTAMPTZ(n);

	if (TIMESTAMP_NOT_FINITE(expires_at))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("expires_at must be finite")));
	return expires_at;
}

static void
require_future(TimestampTz expires_at, TimestampTz now)
{
	if (expires_at <= now)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("expires_at must be in the future")));
}

/*
 * Locks the account, and reads the pool with its candidates, used up ones too.
 * The pool of an account that is not there has none.
 */
static void
lock_leases(Pool *pool, AccountLock how, text *lease_id)
{
	Parameters	parameters = {0};
	Datum	   *id;
	int			n;

	if (!pool_lock_account(pool, how))
		return;
	pool->now = clock_now();
	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, pool->credit);
	parameter_add_pointer(&parameters, lease_id);
	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	n = (int) statement_execute_now(&candidates_statement, &parameters);
	if (n > 0)
	{
		id = palloc(sizeof(Datum) * n);
		for (int i = 0; i < n; i++)
		{
			bool		isnull;

			id[i] = statement_value(i, 1, &isnull);
		}
		pool->closed_ids = construct_array(id, n, INT8OID, sizeof(int64), FLOAT8PASSBYVAL,
										   TYPALIGN_DOUBLE);
	}
	pool_read(pool);
	reclaim_lapsed(pool);
}

static bool
is_live_lease(const Tranche *tranche)
{
	return tranche->lease_id && tranche->alive;
}

/* Returns whether a lease may not be installed: see lease_install(). */
static bool
is_taken(const Pool *pool, const text *server, const text *lease_id)
{
	for (int i = 0; i < pool->ntranches; i++)
	{
		const Tranche *tranche = pool->tranche[i];

		if (tranche->lease_id &&
			(same_text(tranche->lease_id, lease_id) ||
			 (tranche->alive && same_text(tranche->server, server))))
			return true;
	}
	return false;
}

/*
 * lease_install(account, credit, lease_id, granted, expires_at, server)
 *		Adds a lease to a pool, a frozen one too. Returns false, and leaves all
 *		as it is, where a lease that is alive fills the server's slot, or where
 *		the pool has had that id before, from whichever server: two of
 *		them may be one upstream. Raises 42704 for an
 *		unknown server, and LC009.
 */
PG_FUNCTION_INFO_V1(lease_install);
Datum
lease_install(PG_FUNCTION_ARGS)
{
	Request		request = {.kind = &kind_install};
	Pool		pool = {0};
	text	   *lease_id;
	Numeric		granted;
	TimestampTz expires_at;
	text	   *server = NULL;
	int64		reservation_id = NO_RESERVATION;
	bool		taken;

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	request.credit = pool.credit = argument_text(fcinfo, 1, "credit");
	lease_id = argument_text(fcinfo, 2, "lease_id");
	granted = argument_amount(fcinfo, 3, "granted", AMOUNT_POSITIVE);
	if (PG_ARGISNULL(4))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("expires_at must not be null")));
	expires_at = argument_expiry(fcinfo, 4);
	require_future(expires_at, clock_now());
	if (!PG_ARGISNULL(5))
	{
		upstream_require(NameStr(*PG_GETARG_NAME(5)));
		server = cstring_to_text(NameStr(*PG_GETARG_NAME(5)));
	}
	statement_begin();

	lock_leases(&pool, ACCOUNT_LOCK_OR_CREATE, lease_id);
	taken = is_taken(&pool, server, lease_id);
	if (!taken)
	{
		Tranche    *tranche;

		/* it may have expired while the account was somebody else's */
		require_future(expires_at, pool.now);
		tranche = pool_add(&pool, granted, DEFAULT_PRIORITY, expires_at);
		tranche->server = server;
		tranche->lease_id = lease_id;
		ledger_post(&pool, &request, &reservation_id);
		if (server)
		{
			Parameters	parameters = {0};

			parameter_add_pointer(&parameters, pool.account);
			parameter_add_pointer(&parameters, pool.credit);
			parameter_add(&parameters, Int64GetDatum(tranche->tranche_id));
			statement_execute(&usage_statement, &parameters);
		}
		restripe_spread(&pool, tranche);
	}
	SPI_finish();
	PG_RETURN_BOOL(!taken);
}

/* Returns the pool's live lease with an id, NULL for none. */
static Tranche *
find_live(const Pool *pool, const text *lease_id)
{
	for (int i = 0; i < pool->ntranches; i++)
	{
		if (is_live_lease(pool->tranche[i]) && same_text(pool->tranche[i]->lease_id, lease_id))
			return pool->tranche[i];
	}
	return NULL;
}

/*
 * lease_extend(account, credit, lease_id, granted_total, expires_at)
 *		Grants what the upstream's total exceeds that of the live lease by, if
 *		it does, and lets the lease live until then, if that is later; a frozen
 *		pool's too. Returns whether anything changed, which it does not where
 *		no live lease has the id. A change of the expiry alone has no entry, as
 *		it moves no credit. Raises LC009.
 */
PG_FUNCTION_INFO_V1(lease_extend);
Datum
lease_extend(PG_FUNCTION_ARGS)
{
	Request		request = {.kind = &kind_extend};
	Pool		pool = {0};
	Tranche    *lease;
	text	   *lease_id;
	Numeric		total;
	TimestampTz expires_at = DT_NOBEGIN;
	int64		reservation_id = NO_RESERVATION;
	bool		extended = false;

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	request.credit = pool.credit = argument_text(fcinfo, 1, "credit");
	lease_id = argument_text(fcinfo, 2, "lease_id");
	total = argument_amount(fcinfo, 3, "granted_total", AMOUNT_POSITIVE);
	if (!PG_ARGISNULL(4))
		expires_at = argument_expiry(fcinfo, 4);
	statement_begin();

	lock_leases(&pool, ACCOUNT_LOCK, lease_id);
	lease = find_live(&pool, lease_id);
	if (lease && expires_at > lease->expires_at)
	{
		lease->expires_at = expires_at;
		extended = true;
	}
	if (lease && amount_compare(total, lease->balance[GRANTED]) > 0)
	{
		pool_grant(&pool, lease, amount_subtract(total, lease->balance[GRANTED]));
		ledger_append(&pool, &request, &reservation_id);
		extended = true;
	}
	ledger_save(&pool);
	if (extended && pool.striped)
		restripe_spread(&pool, lease);
	SPI_finish();
	PG_RETURN_BOOL(extended);
}

static void
tell_upstream(const Pool *pool, const Tranche *lease)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, pool->credit);
	parameter_add_pointer(&parameters, lease->lease_id);
	parameter_add_pointer(&parameters, lease->server);
	parameter_add(&parameters, Int64GetDatum(lease->tranche_id));
	parameter_add(&parameters, TimestampTzGetDatum(lease->expires_at));
	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	statement_execute(&release_statement, &parameters);
	demand_at_commit(WAKE_FOR_LEASES);
}

/*
 * lease_release(account, credit, lease_id)
 *		Returns what remains of the live lease with an id, or of all of the
 *		pool's, which serve nobody from then on; returns false where there is
 *		none. A lease of which nothing remains has no entry. The worker tells the
 *		server, when all that was spent has been reported and no hold or chunk has
 *		any of the lease. Raises LC009.
 */
PG_FUNCTION_INFO_V1(lease_release);
Datum
lease_release(PG_FUNCTION_ARGS)
{
	Request		request = {.kind = &kind_release};
	Pool		pool = {0};
	text	   *lease_id;
	int64		reservation_id = NO_RESERVATION;
	bool		released = false;
	bool		moved = false;

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	request.credit = pool.credit = argument_text(fcinfo, 1, "credit");
	lease_id = argument_optional_text(fcinfo, 2, "lease_id");
	statement_begin();

	restripe_fold_leases(&pool, lease_id);
	lock_leases(&pool, ACCOUNT_LOCK, lease_id);
	for (int i = 0; i < pool.ntranches; i++)
	{
		Tranche    *tranche = pool.tranche[i];
		Numeric		remaining = tranche->balance[REMAINING];

		if (!is_live_lease(tranche) || (lease_id && !same_text(tranche->lease_id, lease_id)))
			continue;
		pool_move(&pool, tranche, REMAINING, RETURNED, remaining);
		tranche->released_at = pool.now;
		tranche->alive = false;
		released = true;
		if (tranche->server)
			tell_upstream(&pool, tranche);
		moved = moved || amount_sign(remaining) > 0;
	}
	if (moved)
		ledger_append(&pool, &request, &reservation_id);
	ledger_save(&pool);
	SPI_finish();
	PG_RETURN_BOOL(released);
}
