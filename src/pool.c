/*
 * pool.c
 *		The tranches of one pool: reading, checking and moving amounts.
 *
 * pool_lock() locks the account (account.c) and copies the open tranches of a
 * pool; pool_move() and its friends change the copies; ledger.c writes what
 * changed. Under the account's lock the copies are what is committed, and stay
 * it. Above READ COMMITTED the transaction's snapshot may be older than the
 * lock: that a tranche has changed since, or come in, is 40001 (rule 1).
 *
 * Every row is proved when it is read and every move when it is made: a
 * negative or unbalanced amount is LC009 (rule 3).
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

#include "amount.h"
#include "clock.h"
#include "errors.h"
#include "pool.h"
#include "statement.h"

/*
 * The row comes whole, as one column: the executor sets a statement up anew at
 * each call, and what that costs grows with the number of columns.
 */
#define OPEN_TRANCHES \
	"SELECT t.ctid, t FROM credit_lease.tranche t" \
	" WHERE t.account = $1 AND t.credit = $2 AND t.open"

static Statement open_statement = {
	.sql = OPEN_TRANCHES,
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

static Statement with_closed_statement = {
	.sql = OPEN_TRANCHES " UNION ALL "
	"SELECT t.ctid, t FROM credit_lease.tranche t"
	" WHERE t.account = $1 AND t.credit = $2 AND t.tranche_id = ANY ($3) AND NOT t.open",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT8ARRAYOID}
};

/* The columns of credit_lease.tranche, as its script orders them. */
enum
{
	COLUMN_ACCOUNT,
	COLUMN_CREDIT,
	COLUMN_TRANCHE_ID,
	COLUMN_KIND,
	COLUMN_PRIORITY,
	COLUMN_CREATED_AT,
	COLUMN_EXPIRES_AT,
	COLUMN_SERVER,
	COLUMN_LEASE_ID,
	COLUMN_RELEASED_AT,
	COLUMN_REFILL_BELOW,
	COLUMN_REFRESH_AT,
	COLUMN_OWNER,
	COLUMN_HOLD_EXPIRES_AT,
	COLUMN_OPEN,
	COLUMN_BALANCE,
	COLUMNS = COLUMN_BALANCE + BUCKETS
};

static Statement frozen_statement = {
	.sql = "SELECT f.reason FROM credit_lease.frozen_pool f"
	" WHERE f.account = $1 AND (f.credit = $2 OR f.credit IS NULL)"
	" ORDER BY f.credit NULLS LAST",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

/*
 * pool_find_freeze
 *		Returns whether spending and holding are stopped in a pool, and the
 *		reason or NULL. That costs a look only where a freeze concerns the
 *		account.
 */
bool
pool_find_freeze(const Pool *pool, char **reason)
{
	Parameters	parameters = {0};
	bool		isnull;
	Datum		value;

	if (!pool->may_be_frozen)
		return false;
	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, pool->credit);
	if (statement_execute(&frozen_statement, &parameters) == 0)
		return false;

	value = statement_value(0, 1, &isnull);
	*reason = isnull ? NULL : TextDatumGetCString(value);
	return true;
}

pg_noreturn static void
books_do_not_balance(const Pool *pool, const Tranche *tranche)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_BOOKS),
			 errmsg("the books of tranche " INT64_FORMAT " of account \"%s\" do not balance",
					tranche->tranche_id, text_to_cstring(pool->account)),
			 errdetail("Granted: %s, remaining: %s, reserved: %s, chunked: %s, consumed: %s, expired: %s, returned: %s, revoked: %s.",
					   amount_out(tranche->balance[GRANTED]),
					   amount_out(tranche->balance[REMAINING]),
					   amount_out(tranche->balance[RESERVED]),
					   amount_out(tranche->balance[CHUNKED]),
					   amount_out(tranche->balance[CONSUMED]),
					   amount_out(tranche->balance[EXPIRED]),
					   amount_out(tranche->balance[RETURNED]),
					   amount_out(tranche->balance[REVOKED])),
			 errhint("See credit_lease.lease_verify(); nothing was changed.")));
}

static bool
is_released(const Tranche *tranche)
{
	return !TIMESTAMP_IS_NOEND(tranche->released_at);
}

/* Raises LC009 unless the tranche's amounts are what rules 2 and 3 allow. */
static void
check_tranche(const Pool *pool, const Tranche *tranche)
{
	Numeric		sum = amount_zero();

	for (int i = GRANTED + 1; i < BUCKETS; i++)
	{
		if (amount_sign(tranche->balance[i]) != 0)
			sum = amount_add(sum, tranche->balance[i]);
	}
	for (int i = 0; i < BUCKETS; i++)
	{
		if (amount_sign(tranche->balance[i]) < 0)
			books_do_not_balance(pool, tranche);
	}
	if (amount_compare(sum, tranche->balance[GRANTED]) != 0 ||
		numeric_is_nan(sum) || numeric_is_inf(sum) ||
		(is_released(tranche) && amount_sign(tranche->balance[REMAINING]) != 0))
		books_do_not_balance(pool, tranche);
}

/* Returns a column's instant, DT_NOEND for null. */
static TimestampTz
read_instant(const Datum *value, const bool *null, int column)
{
	return null[column] ? DT_NOEND : DatumGetTimestampTz(value[column]);
}

static text *
read_text(const Datum *value, const bool *null, int column)
{
	return null[column] ? NULL : DatumGetTextPP(value[column]);
}

static Tranche *
read_tranche(const Pool *pool, uint64 row)
{
	Tranche    *tranche = palloc0(sizeof(Tranche));
	HeapTupleData row_tuple;
	TupleDesc	tupdesc;
	Datum	   *value;
	bool	   *null;
	bool		isnull;

	tranche->tid = *(ItemPointer) DatumGetPointer(statement_value(row, 1, &isnull));
	row_tuple.t_data = DatumGetHeapTupleHeader(statement_value(row, 2, &isnull));
	row_tuple.t_len = HeapTupleHeaderGetDatumLength(row_tuple.t_data);
	tupdesc = lookup_rowtype_tupdesc(HeapTupleHeaderGetTypeId(row_tuple.t_data),
									 HeapTupleHeaderGetTypMod(row_tuple.t_data));
	Assert(tupdesc->natts >= COLUMNS);
	value = palloc(sizeof(Datum) * tupdesc->natts);
	null = palloc(sizeof(bool) * tupdesc->natts);
	heap_deform_tuple(&row_tuple, tupdesc, value, null);
	ReleaseTupleDesc(tupdesc);

	tranche->tranche_id = DatumGetInt64(value[COLUMN_TRANCHE_ID]);
	tranche->priority = DatumGetInt32(value[COLUMN_PRIORITY]);
	tranche->expires_at = tranche->stored_expires_at =
		read_instant(value, null, COLUMN_EXPIRES_AT);
	tranche->server = read_text(value, null, COLUMN_SERVER);
	tranche->lease_id = read_text(value, null, COLUMN_LEASE_ID);
	tranche->released_at = tranche->stored_released_at =
		read_instant(value, null, COLUMN_RELEASED_AT);
	tranche->refill_below = null[COLUMN_REFILL_BELOW] ? NULL :
		DatumGetNumeric(value[COLUMN_REFILL_BELOW]);
	tranche->alive = tranche->expires_at > pool->now && !is_released(tranche);
	tranche->hold_expires_at = tranche->stored_hold_expires_at =
		read_instant(value, null, COLUMN_HOLD_EXPIRES_AT);
	for (int i = 0; i < BUCKETS; i++)
		tranche->balance[i] = DatumGetNumeric(value[COLUMN_BALANCE + i]);
	memcpy(tranche->logged, tranche->balance, sizeof(tranche->logged));
	memcpy(tranche->stored, tranche->balance, sizeof(tranche->stored));
	check_tranche(pool, tranche);
	return tranche;
}

/* Rule 10: lowest priority number, then soonest expiry, then oldest. */
static int
compare_burn_order(const void *a, const void *b)
{
	const Tranche *x = *(Tranche *const *) a;
	const Tranche *y = *(Tranche *const *) b;

	if (x->priority != y->priority)
		return x->priority < y->priority ? -1 : 1;
	if (x->expires_at != y->expires_at)
		return x->expires_at < y->expires_at ? -1 : 1;
	return x->tranche_id < y->tranche_id ? -1 : 1;
}

/*
 * Raises 40001 unless the tranches that were read are what is committed: a
 * snapshot that was taken before the account was locked may be out of date.
 */
static void
require_current(const Pool *pool, Statement *statement, Parameters *parameters)
{
	bool		current = (int) statement_execute_now(statement, parameters) == pool->ntranches;

	for (int i = 0; current && i < pool->ntranches; i++)
	{
		bool		isnull;
		ItemPointer tid = (ItemPointer) DatumGetPointer(statement_value(i, 1, &isnull));
		int			n = 0;

		while (n < pool->ntranches && !ItemPointerEquals(tid, &pool->tranche[n]->tid))
			n++;
		current = n < pool->ntranches;
	}
	if (!current)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("could not serialize access due to concurrent update")));
}

/*
 * pool_read
 *		Reads the tranches of a pool whose account is locked. What was moved
 *		and not yet written is forgotten.
 */
void
pool_read(Pool *pool)
{
	Statement  *statement = pool->closed_ids ? &with_closed_statement : &open_statement;
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, pool->credit);
	if (pool->closed_ids)
		parameter_add_pointer(&parameters, pool->closed_ids);

	pool->ntranches = (int) statement_execute(statement, &parameters);
	/* one instant for the whole call: by a later one, its own hold might expire */
	if (pool->now == 0)
		pool->now = clock_now();
	/* one to spare, for pool_add() */
	pool->tranche = palloc(sizeof(Tranche *) * (pool->ntranches + 1));
	pool->may_have_lapsed = false;
	pool->available = amount_zero();
	pool->held = amount_zero();

	for (int i = 0; i < pool->ntranches; i++)
	{
		Tranche    *tranche = read_tranche(pool, i);

		pool->tranche[i] = tranche;
		if (tranche->hold_expires_at <= pool->now && amount_sign(tranche->balance[RESERVED]) > 0)
			pool->may_have_lapsed = true;
		pool->held = amount_add(pool->held, tranche->balance[RESERVED]);
		if (tranche->alive)
			pool->available = amount_add(pool->available, tranche->balance[REMAINING]);
	}
	if (pool->ntranches > 1)
		qsort(pool->tranche, pool->ntranches, sizeof(Tranche *), compare_burn_order);
	if (IsolationUsesXactSnapshot())
		require_current(pool, statement, &parameters);
}

/*
 * pool_lock
 *		Locks the account, see account_lock(), and reads the pool. An account
 *		that is not there has an empty pool: what comes in after that look is
 *		not locked, and must not be read.
 */
void
pool_lock(Pool *pool, AccountLock how)
{
	if (account_lock(pool->account, how, &pool->may_be_frozen))
		pool_read(pool);
	else
	{
		pool->now = clock_now();
		pool->available = pool->held = amount_zero();
	}
}

/* Returns whether something of a tranche is left, held or carved out. */
bool
tranche_is_open(const Tranche *tranche)
{
	return amount_sign(tranche->balance[REMAINING]) != 0 ||
		amount_sign(tranche->balance[RESERVED]) != 0 ||
		amount_sign(tranche->balance[CHUNKED]) != 0;
}

/* Returns whether spending and holding are stopped in a locked pool. */
bool
pool_is_frozen(const Pool *pool)
{
	char	   *reason;

	return pool_find_freeze(pool, &reason);
}

/* Returns one of the pool's locked tranches; raises LC009 if it is none of them. */
Tranche *
pool_get(const Pool *pool, int64 tranche_id)
{
	for (int i = 0; i < pool->ntranches; i++)
	{
		if (pool->tranche[i]->tranche_id == tranche_id)
			return pool->tranche[i];
	}
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_BOOKS),
			 errmsg("account \"%s\" has no tranche " INT64_FORMAT,
					text_to_cstring(pool->account), tranche_id)));
}

/*
 * pool_add
 *		Grants an amount as a new tranche, at most one for each pool_read().
 *		The burn order takes no account of it. It is no lease, unless the
 *		caller makes it one.
 */
Tranche *
pool_add(Pool *pool, Numeric amount, int32 priority, TimestampTz expires_at)
{
	Tranche    *tranche = palloc0(sizeof(Tranche));

	tranche->priority = priority;
	tranche->expires_at = tranche->stored_expires_at = expires_at;
	tranche->released_at = tranche->stored_released_at = DT_NOEND;
	tranche->hold_expires_at = tranche->stored_hold_expires_at = DT_NOEND;
	tranche->alive = true;
	tranche->is_new = true;
	for (int i = 0; i < BUCKETS; i++)
		tranche->balance[i] = tranche->logged[i] = tranche->stored[i] = amount_zero();
	pool->tranche[pool->ntranches++] = tranche;
	pool_grant(pool, tranche, amount);
	return tranche;
}

/* Grants an amount to a tranche that is alive. */
void
pool_grant(Pool *pool, Tranche *tranche, Numeric amount)
{
	tranche->balance[GRANTED] = amount_add(tranche->balance[GRANTED], amount);
	tranche->balance[REMAINING] = amount_add(tranche->balance[REMAINING], amount);
	pool->available = amount_add(pool->available, amount);
}

/*
 * pool_move
 *		Moves an amount from one term of a tranche to another. Raises LC009
 *		where it is not there: whoever decides has looked before.
 */
void
pool_move(Pool *pool, Tranche *tranche, Bucket from, Bucket to, Numeric amount)
{
	if (amount_sign(amount) == 0)
		return;
	if (amount_sign(amount) < 0 || amount_compare(tranche->balance[from], amount) < 0)
		books_do_not_balance(pool, tranche);

	tranche->balance[from] = amount_subtract(tranche->balance[from], amount);
	tranche->balance[to] = amount_add(tranche->balance[to], amount);

	if (tranche->alive && from == REMAINING)
		pool->available = amount_subtract(pool->available, amount);
	if (tranche->alive && to == REMAINING)
		pool->available = amount_add(pool->available, amount);
	if (from == RESERVED)
		pool->held = amount_subtract(pool->held, amount);
}

/*
 * pool_give_back
 *		Moves an amount back to what a tranche has left (rule 8). To one that
 *		has expired it comes back too late, and expires; to a lease that was
 *		released it comes back to be returned, as the rest of it was, and is
 *		no more ours to spend.
 */
void
pool_give_back(Pool *pool, Tranche *tranche, Bucket from, Numeric amount)
{
	Bucket		to = EXPIRED;

	if (is_released(tranche))
		to = RETURNED;
	else if (tranche->alive)
		to = REMAINING;
	pool_move(pool, tranche, from, to, amount);
}

/*
 * pool_take
 *		Moves an amount that the pool has available to another term, from as
 *		many tranches as it takes, in burn order.
 */
void
pool_take(Pool *pool, Numeric amount, Bucket to)
{
	for (int i = 0; i < pool->ntranches && amount_sign(amount) > 0; i++)
	{
		Tranche    *tranche = pool->tranche[i];
		Numeric		part;

		if (!tranche->alive)
			continue;
		part = amount_min(tranche->balance[REMAINING], amount);
		pool_move(pool, tranche, REMAINING, to, part);
		amount = amount_subtract(amount, part);
	}
	if (amount_sign(amount) != 0)
		elog(ERROR, "took more credit than was available");
}

static int
detail(const Pool *pool, Numeric requested)
{
	char	   *available = amount_out(pool->available);
	char	   *held = amount_out(pool->held);

	if (pool->upstream_error)
		return errdetail("Available: %s, held: %s, requested: %s; upstream: %s.",
						 available, held, amount_out(requested), pool->upstream_error);
	return errdetail("Available: %s, held: %s, requested: %s.",
					 available, held, amount_out(requested));
}

pg_noreturn static void
refuse_unsupplied(const Pool *pool, Numeric requested)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_UNREACHABLE),
			 errmsg("credit \"%s\" of account \"%s\" could not be supplied in time",
					text_to_cstring(pool->credit), text_to_cstring(pool->account)),
			 detail(pool, requested),
			 errhint("Try again later; credit_lease.upstream_status tells how the upstream does.")));
}

/* Raises LC007 where the pool is frozen, and LC008 or LC001 where it is not. */
void
pool_refuse(const Pool *pool, Numeric requested)
{
	char	   *reason;

	if (pool_find_freeze(pool, &reason))
		pool_refuse_frozen(pool, reason);
	if (pool->unreachable)
		refuse_unsupplied(pool, requested);
	pool_refuse_short(pool, requested);
}

/* Raises LC007. */
void
pool_refuse_frozen(const Pool *pool, const char *reason)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_FROZEN),
			 errmsg("credit \"%s\" of account \"%s\" is frozen",
					text_to_cstring(pool->credit), text_to_cstring(pool->account)),
			 reason ? errdetail("Reason: %s", reason) : 0,
			 errhint("An operator must lift the freeze with credit_lease.lease_unfreeze().")));
}

/* Raises LC001. */
void
pool_refuse_short(const Pool *pool, Numeric requested)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_INSUFFICIENT_CREDIT),
			 errmsg("not enough credit \"%s\" in account \"%s\"",
					text_to_cstring(pool->credit), text_to_cstring(pool->account)),
			 detail(pool, requested),
			 amount_sign(pool->held) > 0 ?
			 errhint("Top up, or wait until holds are settled or expire.") :
			 errhint("Top up.")));
}
