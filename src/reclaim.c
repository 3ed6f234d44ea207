/*
 * reclaim.c
 *		What has expired: holds and chunks that are given back, tranches that
 *		are written off.
 *
 * Calls give back the expired holds of their own pool, and when they are short
 * its expired chunks, under the locks that they have anyway: nobody depends on
 * a sweep having come by (rule 7).
 *
 * lease_reclaim() sweeps every pool. It may run inside somebody's transaction,
 * or against one that locks accounts in any order, so it never waits for one:
 * what is locked is left for the next time.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "chunk.h"
#include "clock.h"
#include "errors.h"
#include "guard.h"
#include "hold.h"
#include "ledger.h"
#include "reclaim.h"
#include "statement.h"

/* A pool that could not be swept is tried again after that. */
#define SET_ASIDE_SECS	60

/* How many holds are given back at a time, and by a call that is not short. */
#define BATCH	1000

static const EntryKind kind_cancel = {.name = "cancel", .bucket = RESERVED, .negated = true};
static const EntryKind kind_expire_hold = {.name = "expire", .bucket = RESERVED, .negated = true};
static const EntryKind kind_expire_tranche = {.name = "expire", .bucket = EXPIRED};

/*
 * Pools with something that has expired by $1, and those that failed before $5
 * and may be tried again; not the pools $3 and $4. The last column tells
 * whether a pool had failed.
 */
#define PASSED_OVER(row) \
	"(" row ".account, " row ".credit) IN (SELECT * FROM unnest($3, $4)) OR EXISTS (" \
	"SELECT FROM credit_lease.set_aside s WHERE s.account = " row ".account AND s.credit = " row ".credit" \
	" AND s.failed_at > $5)"

static Statement expired_pools_statement = {
	.sql = "SELECT p.account, p.credit, EXISTS (SELECT FROM credit_lease.set_aside s"
	"  WHERE s.account = p.account AND s.credit = p.credit)"
	" FROM ((SELECT r.account, r.credit FROM (SELECT h.account, h.credit"
	"  FROM credit_lease.reservation h WHERE h.status = 'held' AND h.expires_at <= $1"
	"  AND NOT (" PASSED_OVER("h") ")"
	"  ORDER BY h.expires_at LIMIT $2) r)"
	" UNION "
	"(SELECT c.account, c.credit FROM (SELECT k.account, k.credit"
	"  FROM credit_lease.chunk k WHERE k.status = 'live' AND k.expires_at <= $1"
	"  AND NOT (" PASSED_OVER("k") ")"
	"  ORDER BY k.expires_at LIMIT $2) c)"
	" UNION "
	"(SELECT t.account, t.credit FROM (SELECT e.account, e.credit"
	"  FROM credit_lease.tranche e WHERE e.open AND e.expires_at <= $1 AND e.remaining <> 0"
	"  AND NOT (" PASSED_OVER("e") ")"
	"  ORDER BY e.expires_at LIMIT $2) t)"
	" UNION "
	"(SELECT f.account, f.credit FROM credit_lease.set_aside f"
	"  WHERE NOT (" PASSED_OVER("f") ") LIMIT $2)) p",
	.nargs = 5,
	.argtypes = {TIMESTAMPTZOID, INT4OID, TEXTARRAYOID, TEXTARRAYOID, TIMESTAMPTZOID}
};

static Statement set_aside_statement = {
	.sql = "INSERT INTO credit_lease.set_aside (account, credit, failed_at, error) VALUES ($1, $2, $3, $4)"
	" ON CONFLICT (account, credit) DO UPDATE SET failed_at = excluded.failed_at, error = excluded.error",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, TIMESTAMPTZOID, TEXTOID}
};

static Statement take_back_statement = {
	.sql = "DELETE FROM credit_lease.set_aside s WHERE s.account = $1 AND s.credit = $2",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

/*
 * Gives back at most limit expired holds of a locked pool and returns how
 * many. Each has ledger entries of its own; the tranches are written once for
 * all, and know when the next hold expires.
 */
static int
give_back(Pool *pool, int limit)
{
	const Request request = {.kind = &kind_expire_hold, .account = pool->account};
	Hold	   *holds;
	int			n = hold_find_lapsed(pool, limit, &holds);
	TimestampTz next_expiry;

	for (int i = 0; i < n; i++)
	{
		Hold	   *hold = &holds[i];

		CHECK_FOR_INTERRUPTS();
		hold_release(pool, hold, amount_zero());
		hold->status = HOLD_EXPIRED;
		hold->end_entry_id = ledger_append(pool, &request, &hold->reservation_id);
		hold_end(pool, hold);
	}

	next_expiry = hold_next_expiry(pool);
	for (int i = 0; i < pool->ntranches; i++)
	{
		if (pool->tranche[i]->hold_expires_at <= pool->now)
			pool->tranche[i]->hold_expires_at = next_expiry;
	}
	ledger_save(pool);
	return n;
}

/*
 * Gives back a batch, of holds or of chunks, and reads the pool again; returns
 * whether that changed anything. What a batch needs of memory goes with its own
 * SPI connection.
 */
static bool
give_back_batch(Pool *pool, int (*give) (Pool *pool, int limit))
{
	Pool		batch = *pool;
	int			given;

	statement_begin();
	pool_read(&batch);
	given = give(&batch, BATCH);
	SPI_finish();

	pool_read(pool);
	return given > 0;
}

/*
 * reclaim_hold
 *		Gives back all of a hold of a locked pool, which ends so: cancelled, or
 *		expired.
 */
void
reclaim_hold(Pool *pool, Hold *hold, HoldStatus status)
{
	const Request request = {
		.kind = status == HOLD_CANCELLED ? &kind_cancel : &kind_expire_hold,
		.account = pool->account
	};

	hold_release(pool, hold, amount_zero());
	hold->status = status;
	hold->end_entry_id = ledger_post(pool, &request, &hold->reservation_id);
	hold_end(pool, hold);
}

/* Writes off what remains of the pool's expired tranches; returns whether any did. */
static bool
write_off(Pool *pool)
{
	const Request request = {.kind = &kind_expire_tranche, .account = pool->account};
	int64		reservation_id = NO_RESERVATION;
	bool		any = false;

	for (int i = 0; i < pool->ntranches; i++)
	{
		Tranche    *tranche = pool->tranche[i];

		if (tranche->alive || amount_sign(tranche->balance[REMAINING]) == 0)
			continue;
		pool_move(pool, tranche, REMAINING, EXPIRED, tranche->balance[REMAINING]);
		any = true;
	}
	if (any)
		ledger_post(pool, &request, &reservation_id);
	return any;
}

/*
 * reclaim_lapsed
 *		Gives back expired holds of a locked pool, so that its available is
 *		exact; after a long time without a sweep, the first thousand.
 */
void
reclaim_lapsed(Pool *pool)
{
	if (pool->may_have_lapsed)
		give_back_batch(pool, give_back);
}

/*
 * reclaim_lock
 *		Does pool_lock() and reclaim_lapsed().
 */
void
reclaim_lock(Pool *pool, AccountLock how)
{
	pool_lock(pool, how);
	reclaim_lapsed(pool);
}

static bool
has_chunks(const Pool *pool)
{
	for (int i = 0; i < pool->ntranches; i++)
	{
		if (amount_sign(pool->tranche[i]->balance[CHUNKED]) > 0)
			return true;
	}
	return false;
}

/*
 * reclaim_cover
 *		Returns whether a locked pool has an amount available. Before it says
 *		no, it gives all of the pool's expired holds and chunks back. Nothing
 *		may be moved and not saved.
 */
bool
reclaim_cover(Pool *pool, Numeric amount)
{
	while (amount_compare(pool->available, amount) < 0 && pool->may_have_lapsed)
	{
		if (!give_back_batch(pool, give_back))
			break;
	}
	while (amount_compare(pool->available, amount) < 0 && has_chunks(pool))
	{
		if (!give_back_batch(pool, chunk_reclaim))
			break;
	}
	return amount_compare(pool->available, amount) >= 0;
}

/* One pool of a locked account, to be swept: at most limit holds and chunks */
typedef struct Sweep
{
	text	   *account;
	text	   *credit;
	int			limit;
	int			given;			/* those that were given back */
	bool		any;			/* there was something to do */
} Sweep;

/*
 * Gives back holds, also those of nothing, of which no tranche knows, and
 * chunks, and writes off what has expired.
 */
static void
sweep_pool(void *arg)
{
	Sweep	   *sweep = arg;
	Pool		pool = {.account = sweep->account, .credit = sweep->credit};
	bool		written_off;

	statement_begin();
	pool_read(&pool);
	sweep->given = give_back(&pool, sweep->limit);
	sweep->given += chunk_reclaim(&pool, sweep->limit - sweep->given);
	written_off = write_off(&pool);
	SPI_finish();
	sweep->any = sweep->given > 0 || written_off;
}

/*
 * Sets a pool aside for a while and warns: the others must not wait for an
 * operator. Its account is locked.
 */
static void
set_aside(text *account, text *credit, const ErrorData *error)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, credit);
	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	parameter_add_pointer(&parameters, cstring_to_text(error->message));
	statement_execute(&set_aside_statement, &parameters);
	ereport(WARNING,
			(errcode(error->sqlerrcode),
			 errmsg("credit \"%s\" of account \"%s\" was not swept: %s",
					text_to_cstring(credit), text_to_cstring(account), error->message)));
}

/*
 * Sweeps one pool unless its account is locked, and sets it aside instead of
 * failing where its books do not balance. Returns whether there was anything
 * that it could do.
 */
static bool
sweep_pool_safely(text *account, text *credit, bool was_set_aside, int limit, int64 *given)
{
	Sweep		sweep = {.account = account, .credit = credit, .limit = limit};
	ErrorData  *error;
	bool		frozen;

	if (!account_lock(account, ACCOUNT_LOCK_IF_FREE, &frozen))
		return false;
	error = guard(sweep_pool, &sweep);
	if (error)
	{
		if (error->sqlerrcode != ERRCODE_LEASE_BOOKS)
			ReThrowError(error);
		set_aside(account, credit, error);
		return false;
	}

	*given += sweep.given;
	if (was_set_aside)
	{
		Parameters	parameters = {0};

		parameter_add_pointer(&parameters, account);
		parameter_add_pointer(&parameters, credit);
		statement_execute(&take_back_statement, &parameters);
	}
	return sweep.any;
}

/*
 * lease_reclaim(max_rows)
 *		Gives back the expired holds and chunks of every pool, at most
 *		max_rows, and writes expired tranches off; returns how many it gave
 *		back. Accounts and chunks that others have locked, and pools whose books
 *		do not balance, are left out.
 */
PG_FUNCTION_INFO_V1(lease_reclaim);
Datum
lease_reclaim(PG_FUNCTION_ARGS)
{
	TimestampTz now = clock_now();
	int64		most = PG_INT64_MAX;
	int64		given = 0;
	MemoryContext context = CurrentMemoryContext;
	ArrayBuildState *accounts = initArrayResult(TEXTOID, context, false);
	ArrayBuildState *credits = initArrayResult(TEXTOID, context, false);
	int			npools;

	if (!PG_ARGISNULL(0))
	{
		most = PG_GETARG_INT32(0);
		if (most <= 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("max_rows must be positive")));
	}

	/* one SPI connection for each batch, so that its memory goes with it */
	do
	{
		Parameters	parameters = {0};
		SPITupleTable *pools;

		statement_begin();
		parameter_add(&parameters, TimestampTzGetDatum(now));
		parameter_add(&parameters, Int32GetDatum(Min(most - given, BATCH)));
		parameter_add(&parameters, makeArrayResult(accounts, CurrentMemoryContext));
		parameter_add(&parameters, makeArrayResult(credits, CurrentMemoryContext));
		parameter_add(&parameters, TimestampTzGetDatum(now - SET_ASIDE_SECS * USECS_PER_SEC));
		npools = (int) statement_execute(&expired_pools_statement, &parameters);
		pools = SPI_tuptable;

		for (int i = 0; i < npools && given < most; i++)
		{
			bool		isnull;
			Datum		account = SPI_getbinval(pools->vals[i], pools->tupdesc, 1, &isnull);
			Datum		credit = SPI_getbinval(pools->vals[i], pools->tupdesc, 2, &isnull);
			Datum		was_set_aside = SPI_getbinval(pools->vals[i], pools->tupdesc, 3, &isnull);

			CHECK_FOR_INTERRUPTS();
			if (!sweep_pool_safely(DatumGetTextPP(account), DatumGetTextPP(credit),
								   DatumGetBool(was_set_aside), (int) Min(most - given, BATCH), &given))
			{
				accumArrayResult(accounts, account, false, TEXTOID, context);
				accumArrayResult(credits, credit, false, TEXTOID, context);
			}
		}
		SPI_finish();
	} while (npools > 0 && given < most);

	PG_RETURN_INT64(given);
}
