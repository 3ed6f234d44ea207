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
 * what is locked is left for the next time. An expired tranche of a striped
 * pool is written off when all of its stripes are free; the worker waits for
 * them, in a transaction for each pool.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "account.h"
#include "chunk.h"
#include "clock.h"
#include "errors.h"
#include "gather.h"
#include "guard.h"
#include "held.h"
#include "hold.h"
#include "ledger.h"
#include "reclaim.h"
#include "restripe.h"
#include "statement.h"
#include "stripe.h"

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
	"  FROM credit_lease.tranche e WHERE e.open AND e.expires_at <= $1 AND (e.remaining <> 0 OR e.striped <> 0)"
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

static Statement lapsed_statement = {
	.sql = "SELECT EXISTS (SELECT FROM credit_lease.reservation r WHERE r.account = $1 AND r.credit = $2"
	"  AND r.status = 'held' AND r.expires_at <= $3),"
	" EXISTS (SELECT FROM credit_lease.chunk c WHERE c.account = $1 AND c.credit = $2"
	"  AND c.status = 'live' AND c.expires_at <= $3)",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, TIMESTAMPTZOID}
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

		if (tranche->alive || tranche->is_mirror || amount_sign(tranche->balance[REMAINING]) == 0)
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
	if (pool->may_have_lapsed && !pool->striped)
		give_back_batch(pool, give_back);
}

/*
 * reclaim_lock_account
 *		Does pool_lock_account(), pool_read() and reclaim_lapsed(), for a call
 *		that grants.
 */
void
reclaim_lock_account(Pool *pool)
{
	pool_lock_account(pool, ACCOUNT_LOCK_OR_CREATE);
	pool_read(pool);
	reclaim_lapsed(pool);
}

/* Looks whether a striped pool has expired holds, or chunks: a stripe does not know of others'. */
static void
look_for_lapsed(Pool *pool)
{
	Parameters	parameters = pool_parameters(pool);
	bool		isnull;

	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	statement_execute(&lapsed_statement, &parameters);
	pool->may_have_lapsed = DatumGetBool(statement_value(0, 1, &isnull));
	pool->has_lapsed_chunks = DatumGetBool(statement_value(0, 2, &isnull));
}

static bool
may_have_lapsed(Pool *pool)
{
	if (pool->striped)
		look_for_lapsed(pool);
	return pool->may_have_lapsed;
}

static bool
may_have_chunks(Pool *pool)
{
	if (pool->striped)
	{
		look_for_lapsed(pool);
		return pool->has_lapsed_chunks;
	}
	for (int i = 0; i < pool->ntranches; i++)
	{
		if (amount_sign(pool->tranche[i]->balance[CHUNKED]) > 0)
			return true;
	}
	return false;
}

/* Returns whether a call can take an amount from a locked pool with the locks that are free. */
static bool
cover_freely(Pool *pool, Numeric amount)
{
	/* what the session saw a moment ago refuses nobody */
	if (pool->stripe != 0 && !pool->looked && amount_compare(pool->available, amount) < 0)
		pool_look(pool);
	while (amount_compare(pool->available, amount) < 0 && may_have_lapsed(pool))
	{
		if (!give_back_batch(pool, give_back))
			break;
	}
	while (amount_compare(pool->available, amount) < 0 && may_have_chunks(pool))
	{
		if (!give_back_batch(pool, chunk_reclaim))
			break;
	}
	return amount_compare(pool->available, amount) >= 0 && (pool->stripe == 0 || gather(pool, amount));
}

/*
 * reclaim_cover
 *		Returns whether a locked pool has an amount available, and the call can
 *		take it. Before it says no, it gives all of the pool's expired holds
 *		and chunks back; in a striped pool it looks into all stripes, and tries
 *		to lock what others have locked, see stripe_lock_all(). Nothing may be
 *		moved and not saved.
 */
bool
reclaim_cover(Pool *pool, Numeric amount)
{
	if (cover_freely(pool, amount))
		return true;
	/* where too little is committed, nobody has to be waited for */
	if (pool->stripe == 0 || pool->has_all || amount_compare(pool->available, amount) < 0 ||
		!stripe_lock_all(pool, NULL, NULL))
		return false;
	pool_read(pool);
	return cover_freely(pool, amount);
}

/*
 * reclaim_reach
 *		Returns how much of an amount a call can take from a locked pool that
 *		may not have all of it, see reclaim_cover().
 */
Numeric
reclaim_reach(Pool *pool, Numeric amount)
{
	Numeric		reach = amount_zero();

	amount = amount_min(amount, pool->available);
	if (pool->stripe == 0 || gather(pool, amount))
		return amount;
	for (int i = 0; i < pool->ntranches; i++)
	{
		if (pool->tranche[i]->alive)
			reach = amount_add(reach, pool->tranche[i]->balance[REMAINING]);
	}
	return amount_min(amount, reach);
}

/* What a call is to take from a pool */
typedef struct Need
{
	Pool	   *pool;
	Numeric		amount;
	bool		in_full;		/* or it needs no lock */
	bool		is_locked;		/* it is there, but others have it locked */
} Need;

/* Returns whether the locks that a call has are all that it needs. */
static bool
suffices(Need *need)
{
	Pool	   *pool = need->pool;
	bool		enough = cover_freely(pool, need->amount);
	bool		reached = enough;

	/* what there is of the rest, it is to have as well */
	if (enough && pool->wanted && amount_compare(pool->wanted, need->amount) > 0)
		reached = cover_freely(pool, pool->wanted) || cover_freely(pool, amount_min(pool->wanted, pool->available));
	need->is_locked = !reached && !pool->has_all && amount_compare(pool->available, need->amount) >= 0;
	return reached || (!need->in_full && !need->is_locked);
}

static bool
lock_some(void *arg)
{
	Need	   *need = arg;

	need->is_locked = false;
	if (!pool_lock(need->pool, need->amount))
		return false;
	reclaim_lapsed(need->pool);
	return suffices(need);
}

static bool
read_all(void *arg)
{
	Need	   *need = arg;

	if (need->pool->stripe == 0)
		return false;
	need->pool->striped = true;
	pool_read(need->pool);
	return suffices(need);
}

/*
 * Locks a stripe of a striped pool, and those that it can be gathered from, if
 * the pool has an amount that nobody has locked; or one stripe, if it does not
 * have that much; or all, after whoever has locked one, and so that no two calls
 * that need more than one stripe wait for each other: what was locked on the
 * way is free again by then. Or the account. Returns false where that is not
 * there, or too little is and the call needs it in full.
 */
static bool
lock(Need *need)
{
	Pool		before = *need->pool;

	while (!guard_attempt(lock_some, need))
	{
		if (!need->is_locked)
			return false;
		*need->pool = before;
		if (stripe_lock_all(need->pool, read_all, need))
			return true;
		if (!need->is_locked || !need->pool->has_all)
			return false;
		/* it is not striped any more */
		*need->pool = before;
	}
	return true;
}

/*
 * Does lock() for a transaction that has locked nothing of the account. Where
 * the call is to be refused, the error may end a savepoint, of which nothing is
 * to be left that others go on to wait for: guard_attempt() is not committed
 * there.
 */
static bool
lock_unheld(Pool *pool, Numeric amount)
{
	bool		is_nested = GetCurrentTransactionNestLevel() > 1;
	Pool		before = *pool;

	if (lock(&(Need) {.pool = pool, .amount = amount, .in_full = is_nested}))
		return true;
	if (!is_nested)
		return false;
	*pool = before;
	if (!pool_lock(pool, amount))
		return false;
	reclaim_lapsed(pool);
	return true;
}

/*
 * reclaim_lock
 *		Locks a pool, for a call that is to take an amount if it is there, and
 *		reads it; returns whether the account is there.
 */
bool
reclaim_lock(Pool *pool, Numeric amount)
{
	AccountMarks marks;

	if (!stripe_is_known(pool) && account_lock_unless_striped(pool->account, &marks))
	{
		pool->may_be_frozen = marks.frozen;
		pool_read(pool);
	}
	else if (!held_ever(pool->account))
		return lock_unheld(pool, amount);
	else if (!pool_lock(pool, amount))
		return false;
	reclaim_lapsed(pool);
	return true;
}

/*
 * reclaim_lock_if_enough
 *		Does reclaim_lock() if the pool has an amount, and returns whether it
 *		has, and the call can take it. If not, nothing is locked.
 */
bool
reclaim_lock_if_enough(Pool *pool, Numeric amount)
{
	return lock(&(Need) {.pool = pool, .amount = amount, .in_full = true});
}

/*
 * reclaim_lock_hold
 *		Locks a pool, and reads it and one of its holds, for a call that ends
 *		or changes the hold; need tells what it is to take beyond it, NULL for
 *		nothing: in full, or as far as there is any. Raises LC003.
 */
void
reclaim_lock_hold(Pool *pool, int64 reservation_id, Hold *hold, HoldNeed need, const void *arg, bool in_full)
{
	AccountMarks marks;
	Numeric		amount;

	if (account_lock_unless_striped(pool->account, &marks))
	{
		if (!hold_find(pool->account, reservation_id, hold))
			hold_not_found(pool->account, reservation_id);
		pool->may_be_frozen = marks.frozen;
		pool->credit = hold->credit;
		pool_read(pool);
		return;
	}

	if (!hold_find(pool->account, reservation_id, hold))
		hold_not_found(pool->account, reservation_id);
	pool->credit = hold->credit;
	amount = need ? need(hold, arg) : amount_zero();
	if (!in_full)
		pool->wanted = amount;
	if (amount_sign(amount) > 0)
		reclaim_lock(pool, in_full ? amount : amount_zero());
	else
		pool_lock(pool, NULL);
	hold_lock(pool, reservation_id, hold);
	/* by the clock before a wait for the hold, it might not have expired */
	pool->now = clock_now();
	pool_read(pool);
}

/* One pool of a locked account, to be swept: at most limit holds and chunks */
typedef struct Sweep
{
	text	   *account;
	text	   *credit;
	int			limit;
	int			given;			/* those that were given back */
	bool		any;			/* there was something to do */
	bool		striped;		/* a pool of the account is */
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

	statement_begin();
	pool.striped = sweep->striped && stripe_count(&pool) > 0;
	if (!pool.striped || stripe_lock_free(&pool))
	{
		pool_read(&pool);
		sweep->given = give_back(&pool, sweep->limit);
		sweep->given += chunk_reclaim(&pool, sweep->limit - sweep->given);
	}
	if (pool.striped && restripe_fold_ended(&pool, false))
		pool_read(&pool);
	sweep->any = sweep->given > 0 || (pool.stripe == 0 && write_off(&pool));
	SPI_finish();
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
	AccountMarks marks;

	if (!account_lock(account, ACCOUNT_LOCK_IF_FREE, &marks))
		return false;
	sweep.striped = marks.striped;
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

static void
tidy_pool(void *arg)
{
	Pool	   *pool = arg;

	if (restripe_tidy(pool))
	{
		pool_read(pool);
		write_off(pool);
	}
}

/*
 * reclaim_tidy
 *		Tidies a pool that is or was striped, see restripe_tidy(), and writes
 *		off what has expired of it. Returns false where something was locked
 *		for too long, and sets a pool aside whose books do not balance.
 */
bool
reclaim_tidy(text *account, text *credit)
{
	Pool		pool = {.account = account, .credit = credit};
	ErrorData  *error = guard(tidy_pool, &pool);

	if (error && error->sqlerrcode == ERRCODE_LEASE_BOOKS)
		set_aside(account, credit, error);
	else if (error && error->sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE)
		ReThrowError(error);
	return error == NULL || error->sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE;
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
