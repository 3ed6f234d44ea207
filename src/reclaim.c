/*
 * reclaim.c
 *		What has expired: holds that are given back, tranches that are written
 *		off.
 *
 * Calls give back the expired holds of their own pool, under the locks that
 * they have anyway: nobody depends on a sweep having come by (rule 7).
 *
 * lease_reclaim() sweeps every pool. It may run inside somebody's transaction,
 * or against one that locks pools in any order, so it never waits for a row:
 * what is locked is left for the next time.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "clock.h"
#include "hold.h"
#include "ledger.h"
#include "reclaim.h"
#include "statement.h"

/* How many holds a call gives back on its way, while it is not short. */
#define LAPSED_BATCH	100

/* How many holds or tranches a sweep looks for at a time. */
#define SWEEP_BATCH		1000

static const EntryKind kind_expire_hold = {.name = "expire", .bucket = RESERVED, .negated = true};
static const EntryKind kind_expire_tranche = {.name = "expire", .bucket = EXPIRED};

/* $3 and $4 are the pools that were found locked. */
static Statement expired_pools_statement = {
	.sql = "(SELECT r.account, r.credit FROM (SELECT h.account, h.credit"
	"  FROM credit_lease.reservation h WHERE h.status = 'held' AND h.expires_at <= $1"
	"  AND (h.account, h.credit) NOT IN (SELECT * FROM unnest($3, $4))"
	"  ORDER BY h.expires_at LIMIT $2) r)"
	" UNION "
	"(SELECT t.account, t.credit FROM (SELECT e.account, e.credit"
	"  FROM credit_lease.tranche e WHERE e.open AND e.expires_at <= $1 AND e.remaining <> 0"
	"  AND (e.account, e.credit) NOT IN (SELECT * FROM unnest($3, $4))"
	"  ORDER BY e.expires_at LIMIT $2) t)",
	.nargs = 4,
	.argtypes = {TIMESTAMPTZOID, INT4OID, TEXTARRAYOID, TEXTARRAYOID}
};

/*
 * Gives back at most limit expired holds of a locked pool and returns how
 * many. One that came from a tranche that is not locked is passed over. Each
 * has ledger entries of its own; the tranches are written once for all, and
 * know when the next hold expires.
 */
static int
give_back(Pool *pool, int limit)
{
	const Request request = {
		.kind = &kind_expire_hold,
		.now = pool->now,
		.account = pool->account
	};
	Hold	   *holds;
	int			n = hold_find_lapsed(pool, limit, &holds);
	int			given = 0;
	TimestampTz next_expiry;

	for (int i = 0; i < n; i++)
	{
		Hold	   *hold = &holds[i];

		if (!hold_is_locked(pool, hold))
			continue;
		hold_release(pool, hold, amount_zero());
		hold->status = HOLD_EXPIRED;
		hold->end_entry_id = ledger_append(pool, &request, &hold->reservation_id);
		hold_end(pool, hold);
		given++;
	}

	next_expiry = hold_next_expiry(pool);
	for (int i = 0; i < pool->ntranches; i++)
	{
		if (pool->tranche[i]->hold_expires_at <= pool->now)
			pool->tranche[i]->hold_expires_at = next_expiry;
	}
	pool->may_have_lapsed = next_expiry <= pool->now;
	ledger_save(pool);
	return given;
}

/* Writes off what remains of the pool's expired tranches; returns whether any did. */
static bool
write_off(Pool *pool)
{
	const Request request = {
		.kind = &kind_expire_tranche,
		.now = pool->now,
		.account = pool->account
	};
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
 *		exact; after a long time without a sweep, the first of them.
 */
void
reclaim_lapsed(Pool *pool)
{
	if (pool->may_have_lapsed)
		give_back(pool, LAPSED_BATCH);
}

/*
 * reclaim_lock
 *		Locks a pool, see pool_lock(), and gives its expired holds back.
 */
void
reclaim_lock(Pool *pool)
{
	pool_lock(pool);
	reclaim_lapsed(pool);
}

/*
 * reclaim_cover
 *		Returns whether a locked pool has an amount available. Before it says
 *		no, it looks for what others have committed since, and gives all of
 *		the pool's expired holds back. Nothing may be moved and not saved.
 */
bool
reclaim_cover(Pool *pool, Numeric amount)
{
	if (amount_compare(pool->available, amount) >= 0)
		return true;

	pool_lock(pool);
	while (amount_compare(pool->available, amount) < 0 && pool->may_have_lapsed)
	{
		if (give_back(pool, LAPSED_BATCH) == 0)
			break;
	}
	return amount_compare(pool->available, amount) >= 0;
}

/*
 * lease_reclaim(max_rows)
 *		Gives back the expired holds of every pool, at most max_rows, and
 *		writes expired tranches off; returns the number of holds.
 */
PG_FUNCTION_INFO_V1(lease_reclaim);
Datum
lease_reclaim(PG_FUNCTION_ARGS)
{
	TimestampTz now = clock_now();
	int64		left = PG_INT64_MAX;
	int64		given = 0;
	MemoryContext context = CurrentMemoryContext;
	ArrayBuildState *accounts = initArrayResult(TEXTOID, context, false);
	ArrayBuildState *credits = initArrayResult(TEXTOID, context, false);
	int			npools;

	if (!PG_ARGISNULL(0))
	{
		left = PG_GETARG_INT32(0);
		if (left <= 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("max_rows must be positive")));
	}

	/* one SPI connection for each batch, so that its memory goes with it */
	do
	{
		Parameters	parameters = {0};
		Datum	   *account;
		Datum	   *credit;
		bool		isnull;

		statement_begin();
		parameter_add(&parameters, TimestampTzGetDatum(now));
		parameter_add(&parameters, Int32GetDatum(Min(left, SWEEP_BATCH)));
		parameter_add(&parameters, makeArrayResult(accounts, CurrentMemoryContext));
		parameter_add(&parameters, makeArrayResult(credits, CurrentMemoryContext));
		npools = (int) statement_execute(&expired_pools_statement, &parameters);

		account = palloc(sizeof(Datum) * npools);
		credit = palloc(sizeof(Datum) * npools);
		for (int i = 0; i < npools; i++)
		{
			account[i] = statement_value(i, 1, &isnull);
			credit[i] = statement_value(i, 2, &isnull);
		}

		for (int i = 0; i < npools && left > 0; i++)
		{
			Pool		pool = {
				.lock = POOL_SKIP_LOCKED,
				.account = DatumGetTextPP(account[i]),
				.credit = DatumGetTextPP(credit[i]),
				.now = now
			};
			int			holds = 0;
			bool		tranches;

			CHECK_FOR_INTERRUPTS();
			pool_lock(&pool);
			if (pool.may_have_lapsed)
				holds = give_back(&pool, (int) Min(left, SWEEP_BATCH));
			tranches = write_off(&pool);
			if (holds == 0 && !tranches)
			{
				accumArrayResult(accounts, account[i], false, TEXTOID, context);
				accumArrayResult(credits, credit[i], false, TEXTOID, context);
			}
			given += holds;
			left -= holds;
		}
		SPI_finish();
	} while (npools > 0 && left > 0);

	PG_RETURN_INT64(given);
}
