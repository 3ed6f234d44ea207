/*
 * pool.c
 *		The tranches of one pool: reading, checking and moving amounts.
 *
 * pool_lock() locks the account (account.c), or a stripe of it (stripe.c), and
 * copies the open tranches of a pool; pool_move() and its friends change the
 * copies; ledger.c writes what changed. Under the lock the copies are what is
 * committed, and stay it. Above READ COMMITTED the transaction's snapshot may
 * be older than the lock: that a tranche has changed since, or come in, is
 * 40001 (rule 1).
 *
 * In a striped pool a copy is of the tranche's row in the locked stripe;
 * gather.c brings what remains elsewhere here. Whatever is done is done here,
 * also what began in another stripe: what was held there is settled here, so
 * that a term of one stripe can be negative, which the sum over all stripes
 * cannot. To look what remains elsewhere costs as much as all else that is
 * read. Where the call's own stripe has enough, that serves only to say what
 * the pool has available, and what a busy session saw a moment ago does.
 *
 * Every row is proved when it is read and every move when it is made: a
 * negative or unbalanced amount is LC009 (rule 3).
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "amount.h"
#include "clock.h"
#include "errors.h"
#include "held.h"
#include "pool.h"
#include "statement.h"
#include "stripe.h"

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

/* ... with its row in one of the stripes */
#define STRIPED_TRANCHES \
	"SELECT t.ctid, t, p.ctid, p" \
	" FROM credit_lease.tranche t LEFT JOIN credit_lease.tranche_stripe p" \
	"  ON p.account = $1 AND p.credit = $2 AND p.tranche_id = t.tranche_id AND p.stripe = $3" \
	" WHERE t.account = $1 AND t.credit = $2 AND t.open"

static Statement striped_statement = {
	.sql = STRIPED_TRANCHES,
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT4OID}
};

static Statement striped_with_closed_statement = {
	.sql = STRIPED_TRANCHES " UNION ALL "
	"SELECT t.ctid, t, NULL, NULL"
	" FROM credit_lease.tranche t"
	" WHERE t.account = $1 AND t.credit = $2 AND t.tranche_id = ANY ($4) AND NOT t.open",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, INT4OID, INT8ARRAYOID}
};

static Statement with_closed_statement = {
	.sql = OPEN_TRANCHES " UNION ALL "
	"SELECT t.ctid, t FROM credit_lease.tranche t"
	" WHERE t.account = $1 AND t.credit = $2 AND t.tranche_id = ANY ($3) AND NOT t.open",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT8ARRAYOID}
};

static Statement elsewhere_statement = {
	.sql = "SELECT p.tranche_id, p.remaining FROM credit_lease.tranche_stripe p"
	" WHERE p.account = $1 AND p.credit = $2 AND p.stripe <> $3 ORDER BY p.stripe, p.tranche_id",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT4OID}
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
	COLUMN_HOLD_EXPIRES_AT,
	COLUMN_OPEN,
	COLUMN_BALANCE,
	COLUMN_STRIPED = COLUMN_BALANCE + BUCKETS,
	COLUMN_OVERDRAWN,
	COLUMN_TRUSTED_UNTIL,
	COLUMNS
};

/* ... and of credit_lease.tranche_stripe */
enum
{
	STRIPE_COLUMN_BALANCE = 4,
	STRIPE_COLUMNS = STRIPE_COLUMN_BALANCE + BUCKETS
};

static Statement whole_statement = {
	.sql = "SELECT w.chunked, w.reserved, w.consumed FROM credit_lease.whole_tranche w"
	" WHERE w.account = $1 AND w.credit = $2 AND w.tranche_id = $3",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT8OID}
};

static Statement held_statement = {
	.sql = "SELECT coalesce(pg_catalog.sum(w.reserved), 0) FROM credit_lease.whole_tranche w"
	" WHERE w.account = $1 AND w.credit = $2 AND w.open",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

static Statement frozen_statement = {
	.sql = "SELECT f.reason FROM credit_lease.frozen_pool f"
	" WHERE f.account = $1 AND (f.credit = $2 OR f.credit IS NULL)"
	" ORDER BY f.credit NULLS LAST",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

/* Returns what statements about a pool begin with: its account and its credit. */
Parameters
pool_parameters(const Pool *pool)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, pool->credit);
	return parameters;
}

/*
 * pool_find_freeze
 *		Returns whether spending and holding are stopped in a pool, and the
 *		reason or NULL. That costs a look only where a freeze concerns the
 *		account.
 */
bool
pool_find_freeze(const Pool *pool, char **reason)
{
	Parameters	parameters = pool_parameters(pool);
	bool		isnull;
	Datum		value;

	if (!pool->may_be_frozen)
		return false;
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
			 errdetail("Granted: %s, remaining: %s, reserved: %s, chunked: %s, consumed: %s, expired: %s, returned: %s, revoked: %s%s.",
					   amount_out(tranche->balance[GRANTED]),
					   amount_out(tranche->balance[REMAINING]),
					   amount_out(tranche->balance[RESERVED]),
					   amount_out(tranche->balance[CHUNKED]),
					   amount_out(tranche->balance[CONSUMED]),
					   amount_out(tranche->balance[EXPIRED]),
					   amount_out(tranche->balance[RETURNED]),
					   amount_out(tranche->balance[REVOKED]),
					   tranche->in_stripe ? psprintf("; in stripe %d", pool->stripe) :
					   amount_sign(tranche->striped) ? psprintf("; in stripes: %s", amount_out(tranche->striped)) : ""),
			 errhint("See credit_lease.lease_verify(); nothing was changed.")));
}

static bool
is_released(const Tranche *tranche)
{
	return !TIMESTAMP_IS_NOEND(tranche->released_at);
}

/*
 * Raises LC009 unless the tranche's amounts are what rules 2 and 3 allow: of
 * one stripe, the equation, and that what remains is not negative.
 */
static void
check_tranche(const Pool *pool, const Tranche *tranche)
{
	Numeric		sum = tranche->in_stripe ? amount_zero() : tranche->striped;

	for (int i = 0; i < BUCKETS; i++)
	{
		int			sign = amount_sign(tranche->balance[i]);

		if (sign < 0 && (!tranche->in_stripe || i == REMAINING))
			books_do_not_balance(pool, tranche);
		if (sign != 0 && i != GRANTED)
			sum = amount_add(sum, tranche->balance[i]);
	}
	if (amount_compare(sum, tranche->balance[GRANTED]) != 0 ||
		numeric_is_nan(sum) || numeric_is_inf(sum) ||
		(is_released(tranche) && amount_sign(tranche->balance[REMAINING]) != 0))
		books_do_not_balance(pool, tranche);
	if (amount_sign(tranche->overdrawn) != 0 &&
		(!tranche->is_mirror || amount_sign(tranche->overdrawn) < 0 || amount_sign(tranche->balance[REMAINING]) != 0))
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

static bool
is_word(Datum value, const char *word)
{
	const text *string = DatumGetTextPP(value);

	return VARSIZE_ANY_EXHDR(string) == strlen(word) && memcmp(VARDATA_ANY(string), word, strlen(word)) == 0;
}

/* Puts the row that a tranche has in the locked stripe, or an empty one, in place of its own. */
static void
read_stripe(Tranche *tranche, uint64 row)
{
	bool		isnull;
	Datum		column = statement_value(row, 4, &isnull);
	bool	   *null;
	Datum	   *value;

	tranche->elsewhere = tranche->balance[REMAINING];
	tranche->in_stripe = true;
	tranche->has_row = !isnull;
	if (isnull)
	{
		for (int i = 0; i < BUCKETS; i++)
			tranche->balance[i] = amount_zero();
		return;
	}
	value = statement_row(column, STRIPE_COLUMNS, &null);
	for (int i = 0; i < BUCKETS; i++)
		tranche->balance[i] = DatumGetNumeric(value[STRIPE_COLUMN_BALANCE + i]);
	tranche->tid = *(ItemPointer) DatumGetPointer(statement_value(row, 3, &isnull));
}

static Tranche *
read_tranche(const Pool *pool, uint64 row)
{
	Tranche    *tranche = palloc0(sizeof(Tranche));
	Datum	   *value;
	bool	   *null;
	bool		isnull;

	tranche->tid = tranche->own_tid = *(ItemPointer) DatumGetPointer(statement_value(row, 1, &isnull));
	value = statement_row(statement_value(row, 2, &isnull), COLUMNS, &null);
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
	tranche->is_mirror = is_word(value[COLUMN_KIND], "mirror");
	tranche->overdrawn = tranche->stored_overdrawn = DatumGetNumeric(value[COLUMN_OVERDRAWN]);
	tranche->trusted_until = tranche->stored_trusted_until =
		read_instant(value, null, COLUMN_TRUSTED_UNTIL);
	tranche->alive = tranche->expires_at > pool->now && !is_released(tranche) && tranche->trusted_until > pool->now;
	tranche->hold_expires_at = tranche->stored_hold_expires_at =
		read_instant(value, null, COLUMN_HOLD_EXPIRES_AT);
	for (int i = 0; i < BUCKETS; i++)
		tranche->balance[i] = DatumGetNumeric(value[COLUMN_BALANCE + i]);
	tranche->striped = DatumGetNumeric(value[COLUMN_STRIPED]);
	tranche->elsewhere = amount_zero();
	if (pool->striped)
	{
		check_tranche(pool, tranche);
		/* closed, it has no stripes */
		if (pool->stripe != 0 && DatumGetBool(value[COLUMN_OPEN]))
			read_stripe(tranche, row);
	}
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

pg_noreturn static void
could_not_serialize(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
			 errmsg("could not serialize access due to concurrent update")));
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
		ItemPointer own = (ItemPointer) DatumGetPointer(statement_value(i, 1, &isnull));
		ItemPointer tid = own;
		int			n = 0;

		if (pool->stripe != 0)
		{
			Datum		column = statement_value(i, 3, &isnull);

			if (!isnull)
				tid = (ItemPointer) DatumGetPointer(column);
		}
		while (n < pool->ntranches &&
			   !(ItemPointerEquals(own, &pool->tranche[n]->own_tid) && ItemPointerEquals(tid, &pool->tranche[n]->tid)))
			n++;
		current = n < pool->ntranches;
	}
	if (!current)
		could_not_serialize();
}

pg_noreturn static void
stripes_do_not_balance(const Pool *pool, int64 tranche_id)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_BOOKS),
			 errmsg("the books of tranche " INT64_FORMAT " of account \"%s\" do not balance in its stripes",
					tranche_id, text_to_cstring(pool->account)),
			 errhint("See credit_lease.lease_verify(); nothing was changed.")));
}

/* Raises 40001 unless what remains elsewhere is what is committed, see require_current(). */
static void
require_current_elsewhere(Parameters *parameters, uint64 n)
{
	SPITupleTable *then = SPI_tuptable;
	bool		current = statement_execute_now(&elsewhere_statement, parameters) == n;

	for (uint64 row = 0; current && row < n; row++)
	{
		bool		isnull;
		Datum		tranche_id = SPI_getbinval(then->vals[row], then->tupdesc, 1, &isnull);
		Datum		remaining = SPI_getbinval(then->vals[row], then->tupdesc, 2, &isnull);

		current = DatumGetInt64(tranche_id) == DatumGetInt64(statement_value(row, 1, &isnull)) &&
			amount_compare(DatumGetNumeric(remaining), DatumGetNumeric(statement_value(row, 2, &isnull))) == 0;
	}
	if (!current)
		could_not_serialize();
}

/*
 * pool_look
 *		Looks how much of each tranche remains in other stripes, as of now.
 */
void
pool_look(Pool *pool)
{
	Parameters	parameters = pool_parameters(pool);
	uint64		n;
	Numeric		elsewhere = amount_zero();

	parameter_add(&parameters, Int32GetDatum(pool->stripe));
	pool->looked_at = GetCurrentTimestamp();
	n = statement_execute(&elsewhere_statement, &parameters);
	if (IsolationUsesXactSnapshot())
		require_current_elsewhere(&parameters, n);
	for (uint64 row = 0; row < n; row++)
	{
		bool		isnull;
		int64		tranche_id = DatumGetInt64(statement_value(row, 1, &isnull));
		Numeric		remaining = DatumGetNumeric(statement_value(row, 2, &isnull));

		if (numeric_is_nan(remaining) || numeric_is_inf(remaining) || amount_sign(remaining) < 0)
			stripes_do_not_balance(pool, tranche_id);
		for (int i = 0; i < pool->ntranches; i++)
		{
			Tranche    *tranche = pool->tranche[i];

			if (tranche->tranche_id == tranche_id)
				tranche->elsewhere = amount_add(tranche->elsewhere, remaining);
		}
	}
	for (int i = 0; i < pool->ntranches; i++)
	{
		if (pool->tranche[i]->alive)
			elsewhere = amount_add(elsewhere, pool->tranche[i]->elsewhere);
	}
	pool->available = amount_add(pool->available, amount_subtract(elsewhere, pool->elsewhere));
	pool->elsewhere = elsewhere;
	pool->looked = true;
}

/* Notes what the pool consists of, and that nobody has looked further. */
static void
begin_to_look(Pool *pool)
{
	pool->looked = false;
	pool->elsewhere = amount_zero();
	pool->composition = 0;
	for (int i = 0; i < pool->ntranches; i++)
	{
		if (pool->tranche[i]->alive)
			pool->composition = hash_combine(pool->composition, (uint32) pool->tranche[i]->tranche_id);
	}
}

/* Reads the tranches of a pool from so many rows of the last result; rows says which, or NULL for all. */
static void
read_tranches(Pool *pool, const uint64 *rows, int n)
{
	/* one instant for the whole call: by a later one, its own hold might expire */
	if (pool->now == 0)
		pool->now = clock_now();
	pool->ntranches = n;
	/* one to spare, for pool_add() */
	pool->tranche = palloc(sizeof(Tranche *) * (n + 1));
	pool->may_have_lapsed = false;
	pool->is_stale = false;
	pool->available = amount_zero();
	pool->held = amount_zero();

	for (int i = 0; i < n; i++)
	{
		Tranche    *tranche = read_tranche(pool, rows ? rows[i] : (uint64) i);

		pool->tranche[i] = tranche;
		if (!pool->striped && tranche->hold_expires_at <= pool->now && amount_sign(tranche->balance[RESERVED]) > 0)
			pool->may_have_lapsed = true;
		pool->held = amount_add(pool->held, tranche->balance[RESERVED]);
		pool->is_stale |= tranche->trusted_until <= pool->now;
		if (tranche->alive)
			pool->available = amount_add(pool->available, tranche->balance[REMAINING]);
	}
}

static void
sort_tranches(Pool *pool)
{
	if (pool->ntranches > 1)
		qsort(pool->tranche, pool->ntranches, sizeof(Tranche *), compare_burn_order);
}

/*
 * pool_load
 *		Does what pool_read() does for a pool that is not striped, from rows of
 *		the last result: its open tranches, by ctid and as a whole. The snapshot
 *		must be younger than the lock.
 */
void
pool_load(Pool *pool, const uint64 *rows, int n)
{
	read_tranches(pool, rows, n);
	sort_tranches(pool);
}

/*
 * Returns whether the locked stripe is enough to take an amount from: the
 * tranche whose turn it is has it there, and what remains elsewhere need not be
 * known but by what the session saw a moment ago.
 */
static bool
own_is_enough(Pool *pool, Numeric amount)
{
	int			turn = 0;

	while (turn < pool->ntranches && !pool->tranche[turn]->alive)
		turn++;
	return turn < pool->ntranches && amount_compare(pool->tranche[turn]->balance[REMAINING], amount) >= 0 &&
		stripe_recall(pool);
}

/* Does pool_read(), for a call that is to take an amount, NULL for none. */
static void
read_pool(Pool *pool, Numeric amount)
{
	Statement  *statement = pool->closed_ids ? &with_closed_statement : &open_statement;
	Parameters	parameters = pool_parameters(pool);
	bool		old_snapshot = IsolationUsesXactSnapshot();

	if (pool->striped)
	{
		statement = pool->closed_ids ? &striped_with_closed_statement : &striped_statement;
		parameter_add(&parameters, Int32GetDatum(pool->stripe));
	}
	pool->donors = NIL;
	if (pool->closed_ids)
		parameter_add_pointer(&parameters, pool->closed_ids);

	read_tranches(pool, NULL, (int) statement_execute(statement, &parameters));
	sort_tranches(pool);
	if (pool->striped)
	{
		begin_to_look(pool);
		if (amount && !old_snapshot && own_is_enough(pool, amount))
			pool->available = amount_add(pool->available, pool->elsewhere);
		else
			pool_look(pool);
	}
	if (old_snapshot)
		require_current(pool, statement, &parameters);
}

/*
 * pool_read
 *		Reads the tranches of a pool whose account, or a stripe of it, is
 *		locked. What was moved and not yet written is forgotten.
 */
void
pool_read(Pool *pool)
{
	read_pool(pool, NULL);
}

/* Raises LC009 where stripes are not there, though the account says so again and again. */
static void
require_progress(const Pool *pool, int tries)
{
	CHECK_FOR_INTERRUPTS();
	if (tries > 1000)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("stripes of account \"%s\" are missing", text_to_cstring(pool->account)),
				 errhint("See credit_lease.lease_verify(); nothing was changed.")));
}

/*
 * Locks a pool's account, or a stripe of it where the pool is striped; returns
 * whether it is there. Where another pool of the account is striped, both: who
 * has the account has a stripe as well, and need not wait for one later.
 */
static bool
lock_one(Pool *pool)
{
	AccountMarks marks;

	pool->is_first = !held_ever(pool->account);
	if (stripe_is_known(pool) && stripe_lock_free(pool))
		return pool->striped = true;
	for (int tries = 0; !account_lock_unless_striped(pool->account, &marks); tries++)
	{
		require_progress(pool, tries);
		if (!marks.striped)
			return false;
		if (!stripe_lock_any(pool))
			continue;
		if (stripe_count(pool) > 0)
			return pool->striped = true;
		pool->stripe = 0;
		account_lock(pool->account, ACCOUNT_LOCK, &marks);
		break;
	}
	stripe_forget(pool);
	pool->may_be_frozen = marks.frozen;
	return true;
}

/*
 * pool_lock
 *		Locks what a call changes of a pool that is there already, the account
 *		or a stripe of it, and reads the pool, for a call that is to take an
 *		amount of it, NULL for none: where the stripe is enough for that, it
 *		need not look into others. Returns whether the account is there. One
 *		that is not has an empty pool: what comes in after that look is not
 *		locked, and must not be read.
 */
bool
pool_lock(Pool *pool, Numeric amount)
{
	if (lock_one(pool))
	{
		read_pool(pool, amount);
		return true;
	}
	pool->now = clock_now();
	pool->available = pool->held = amount_zero();
	return false;
}

/*
 * pool_lock_account
 *		Locks the account itself, which is enough for what adds to a pool, and
 *		returns whether that has been done, see account_lock(); but a stripe
 *		before it, see lock_one(). The pool is still to be read.
 */
bool
pool_lock_account(Pool *pool, AccountLock how)
{
	AccountMarks marks;

	for (int tries = 0; !account_lock_unless_striped(pool->account, &marks); tries++)
	{
		require_progress(pool, tries);
		if (marks.striped && !stripe_lock_any(pool))
			continue;
		pool->stripe = 0;
		if (!account_lock(pool->account, how, &marks))
			return false;
		break;
	}
	pool->may_be_frozen = marks.frozen;
	pool->striped = marks.striped && stripe_count(pool) > 0;
	return true;
}

/* Returns whether something of a tranche is left, held or carved out, or may be put there again. */
bool
tranche_is_open(const Tranche *tranche)
{
	return tranche->is_mirror ||
		amount_sign(tranche->balance[REMAINING]) != 0 ||
		amount_sign(tranche->balance[RESERVED]) != 0 ||
		amount_sign(tranche->balance[CHUNKED]) != 0 ||
		amount_sign(tranche->striped) != 0;
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
	tranche->trusted_until = tranche->stored_trusted_until = DT_NOEND;
	tranche->alive = true;
	tranche->is_new = true;
	tranche->striped = tranche->elsewhere = amount_zero();
	tranche->overdrawn = tranche->stored_overdrawn = tranche->striped;
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

/* Returns whether all stripes of a tranche together have an amount of a term. */
static bool
has_elsewhere(const Pool *pool, const Tranche *tranche, Bucket bucket, Numeric amount)
{
	Parameters	parameters = pool_parameters(pool);
	Numeric		unsaved = amount_subtract(tranche->balance[bucket], tranche->stored[bucket]);
	bool		isnull;
	int			column = bucket == CHUNKED ? 1 : bucket == RESERVED ? 2 : 3;

	Assert(bucket == CHUNKED || bucket == RESERVED || bucket == CONSUMED);
	parameter_add(&parameters, Int64GetDatum(tranche->tranche_id));
	return statement_execute(&whole_statement, &parameters) == 1 &&
		amount_compare(amount_add(DatumGetNumeric(statement_value(0, column, &isnull)), unsaved), amount) >= 0;
}

/*
 * pool_move
 *		Moves an amount from one term of a tranche to another. Raises LC009
 *		where it is not there: whoever decides has looked before. But for what
 *		remains, it may be in another stripe.
 */
void
pool_move(Pool *pool, Tranche *tranche, Bucket from, Bucket to, Numeric amount)
{
	if (amount_sign(amount) == 0)
		return;
	if (amount_sign(amount) < 0 ||
		(amount_compare(tranche->balance[from], amount) < 0 &&
		 (from == REMAINING || !tranche->in_stripe || !has_elsewhere(pool, tranche, from, amount))))
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
 *		Moves an amount back to what a tranche has left (rule 8), and returns
 *		how much of it that now has. To one that has expired it comes back too
 *		late, and expires; to a lease that was released it comes back to be
 *		returned, as the rest of it was, and is no more ours to spend; and so it
 *		is with a mirror, as far as others have spent of the same balance what
 *		was held here.
 */
Numeric
pool_give_back(Pool *pool, Tranche *tranche, Bucket from, Numeric amount)
{
	if (tranche->is_mirror)
	{
		Numeric		spent = amount_min(tranche->overdrawn, amount);

		if (amount_sign(spent) > 0)
		{
			pool_move(pool, tranche, from, RETURNED, spent);
			tranche->overdrawn = amount_subtract(tranche->overdrawn, spent);
			amount = amount_subtract(amount, spent);
		}
		pool_move(pool, tranche, from, REMAINING, amount);
		return amount;
	}
	if (tranche->alive)
	{
		pool_move(pool, tranche, from, REMAINING, amount);
		return amount;
	}
	pool_move(pool, tranche, from, is_released(tranche) ? RETURNED : EXPIRED, amount);
	return amount_zero();
}

/*
 * pool_set_mirror
 *		Lets so much be left of a mirror, which is less than nothing where it
 *		is overdrawn, and may be spent until an instant.
 */
void
pool_set_mirror(Pool *pool, Tranche *mirror, Numeric left, TimestampTz trusted_until)
{
	Numeric		remaining = amount_sign(left) > 0 ? left : amount_zero();
	Numeric		more = amount_subtract(remaining, mirror->balance[REMAINING]);
	Numeric		overdrawn = amount_subtract(remaining, left);

	if (mirror->alive)
		pool->available = amount_subtract(pool->available, mirror->balance[REMAINING]);
	if (amount_sign(more) != 0)
		mirror->balance[REMAINING] = remaining;
	if (amount_sign(more) > 0)
		mirror->balance[GRANTED] = amount_add(mirror->balance[GRANTED], more);
	else if (amount_sign(more) < 0)
		mirror->balance[REVOKED] = amount_subtract(mirror->balance[REVOKED], more);
	if (amount_compare(overdrawn, mirror->overdrawn) != 0)
		mirror->overdrawn = overdrawn;
	mirror->trusted_until = trusted_until;
	mirror->alive = trusted_until > pool->now;
	if (mirror->alive)
		pool->available = amount_add(pool->available, remaining);
}

/* Returns how much of what a locked pool has available is of mirrors. */
Numeric
pool_mirrored(const Pool *pool)
{
	Numeric		mirrored = amount_zero();

	for (int i = 0; i < pool->ntranches; i++)
	{
		const Tranche *tranche = pool->tranche[i];

		if (tranche->is_mirror && tranche->alive)
			mirrored = amount_add(mirrored, tranche->balance[REMAINING]);
	}
	return mirrored;
}

/*
 * pool_take
 *		Moves an amount that the pool has available to another term, from as
 *		many tranches as it takes, in burn order. Of a mirror nothing can be
 *		revoked: that balance is not ours.
 */
void
pool_take(Pool *pool, Numeric amount, Bucket to)
{
	for (int i = 0; i < pool->ntranches && amount_sign(amount) > 0; i++)
	{
		Tranche    *tranche = pool->tranche[i];
		Numeric		part;

		if (!tranche->alive || (tranche->is_mirror && to == REVOKED))
			continue;
		part = amount_min(tranche->balance[REMAINING], amount);
		pool_move(pool, tranche, REMAINING, to, part);
		amount = amount_subtract(amount, part);
	}
	if (amount_sign(amount) != 0)
		elog(ERROR, "took more credit than was available");
}

/* Returns what is held in all of a pool. */
static Numeric
find_held(const Pool *pool)
{
	Parameters	parameters = pool_parameters(pool);
	bool		isnull;

	if (!pool->striped)
		return pool->held;
	statement_execute(&held_statement, &parameters);
	return DatumGetNumeric(statement_value(0, 1, &isnull));
}

static int
detail(const Pool *pool, Numeric requested, Numeric all_held)
{
	char	   *available = amount_out(pool->available);
	char	   *held = amount_out(all_held);

	if (pool->upstream_error || pool->is_stale)
		return errdetail("Available: %s, held: %s, requested: %s; upstream: %s.",
						 available, held, amount_out(requested),
						 pool->upstream_error ? pool->upstream_error : POOL_STALE);
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
			 detail(pool, requested, find_held(pool)),
			 errhint("Try again later; credit_lease.upstream_status tells how the upstream does.")));
}

/* Returns whether nobody knows what a pool that is short could have. */
bool
pool_lacks_supply(const Pool *pool)
{
	return pool->unreachable || pool->is_stale;
}

/* Raises LC007 where the pool is frozen, and LC008 or LC001 where it is not. */
void
pool_refuse(const Pool *pool, Numeric requested)
{
	char	   *reason;

	if (pool_find_freeze(pool, &reason))
		pool_refuse_frozen(pool, reason);
	if (pool_lacks_supply(pool))
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
	Numeric		held = find_held(pool);

	ereport(ERROR,
			(errcode(ERRCODE_LEASE_INSUFFICIENT_CREDIT),
			 errmsg("not enough credit \"%s\" in account \"%s\"",
					text_to_cstring(pool->credit), text_to_cstring(pool->account)),
			 detail(pool, requested, held),
			 amount_compare(pool->available, requested) >= 0 ?
			 errhint("Transactions in progress have locked some of it; try again in a new one.") :
			 amount_sign(held) > 0 ?
			 errhint("Top up, or wait until holds are settled or expire.") :
			 errhint("Top up.")));
}
