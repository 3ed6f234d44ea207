/*
 * restripe.c
 *		How the tranches of striped pools are kept: spread over stripes, evened
 *		out, folded back into their own rows; and lease_stripe().
 *
 * A new tranche is spread at once: nobody can have read rows that were not
 * there. All else is changed under the locks of the stripes concerned. None of
 * it changes what the pool has, and the ledger has no entries of it.
 *
 * A tranche that is used up, has expired or is released is folded, so that it
 * can be written off and closed as any other. That takes all locks, as does
 * another number of stripes; evening out takes those that are free.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

#include "account.h"
#include "argument.h"
#include "clock.h"
#include "errors.h"
#include "guard.h"
#include "policy.h"
#include "restripe.h"
#include "statement.h"
#include "stripe.h"

/* Each stripe gets as much as every other, or one more of the amount's last digit. */
#define SHARES(remaining, stripes) \
	"LATERAL (SELECT pg_catalog.scale(" remaining ") AS digits) d," \
	" LATERAL (SELECT " remaining " * ('1e' || d.digits)::pg_catalog.numeric AS units) u," \
	" LATERAL (SELECT pg_catalog.div(u.units, " stripes ") AS each) e"
#define SHARE(n, stripes) \
	"((e.each + CASE WHEN " n " <= u.units - e.each * " stripes " THEN 1 ELSE 0 END) * ('1e-' || d.digits)::pg_catalog.numeric)"

/* ... what remains of tranches in their own rows */
static Statement spread_statement = {
	.sql = "WITH t AS (SELECT r.tranche_id, r.remaining FROM credit_lease.tranche r"
	"  WHERE r.account = $1 AND r.credit = $2 AND r.open AND r.released_at IS NULL AND (r.expires_at IS NULL OR r.expires_at > $4)"
	"  AND ($5 = 0 OR (r.tranche_id = $5 AND NOT EXISTS (SELECT FROM credit_lease.tranche_stripe p"
	"   WHERE p.account = $1 AND p.credit = $2 AND p.tranche_id = $5)))),"
	" i AS (INSERT INTO credit_lease.tranche_stripe AS p (account, credit, tranche_id, stripe, granted, remaining)"
	"  SELECT $1, $2, t.tranche_id, n.stripe, " SHARE("n.stripe", "$3") ", " SHARE("n.stripe", "$3")
	"  FROM t, " SHARES("t.remaining", "$3") ", pg_catalog.generate_series(1, $3) AS n (stripe)"
	"  ON CONFLICT (account, credit, stripe, tranche_id) DO UPDATE SET granted = p.granted + excluded.granted,"
	"   remaining = p.remaining + excluded.remaining)"
	" UPDATE credit_lease.tranche r SET striped = r.striped + t.remaining, remaining = r.remaining - t.remaining"
	" FROM t WHERE r.account = $1 AND r.credit = $2 AND r.tranche_id = t.tranche_id",
	.nargs = 5,
	.argtypes = {TEXTOID, TEXTOID, INT4OID, TIMESTAMPTZOID, INT8OID}
};

/* ... also in stripes that only another pool of the account has */
static Statement fill_statement = {
	.sql = "INSERT INTO credit_lease.tranche_stripe (account, credit, stripe, tranche_id)"
	" SELECT t.account, t.credit, l.stripe, t.tranche_id"
	" FROM credit_lease.striped_pool s, credit_lease.tranche t, credit_lease.stripe l"
	" WHERE s.account = $1 AND t.account = $1 AND t.credit = s.credit AND l.account = $1"
	"  AND t.open AND t.released_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > $2) AND ($3 = 0 OR t.tranche_id = $3)"
	" ON CONFLICT (account, credit, stripe, tranche_id) DO NOTHING",
	.nargs = 3,
	.argtypes = {TEXTOID, TIMESTAMPTZOID, INT8OID}
};

static Statement fold_statement = {
	.sql = "WITH f AS (DELETE FROM credit_lease.tranche_stripe p"
	"  WHERE p.account = $1 AND p.credit = $2 AND ($3 IS NULL OR p.tranche_id = ANY ($3)) RETURNING p.*),"
	" s AS (SELECT f.tranche_id, pg_catalog.sum(f.granted) AS granted, pg_catalog.sum(f.chunked) AS chunked,"
	"  pg_catalog.sum(f.reserved) AS reserved, pg_catalog.sum(f.remaining) AS remaining, pg_catalog.sum(f.consumed) AS consumed,"
	"  pg_catalog.sum(f.expired) AS expired, pg_catalog.sum(f.returned) AS returned, pg_catalog.sum(f.revoked) AS revoked"
	"  FROM f GROUP BY f.tranche_id)"
	" UPDATE credit_lease.tranche t SET striped = t.striped - s.granted, chunked = t.chunked + s.chunked,"
	"  reserved = t.reserved + s.reserved, remaining = t.remaining + s.remaining, consumed = t.consumed + s.consumed,"
	"  expired = t.expired + s.expired, returned = t.returned + s.returned, revoked = t.revoked + s.revoked,"
	"  open = t.striped <> s.granted OR t.chunked + s.chunked <> 0 OR t.reserved + s.reserved <> 0 OR t.remaining + s.remaining <> 0,"
	"  hold_expires_at = (SELECT pg_catalog.min(r.expires_at) FROM credit_lease.reservation r"
	"   WHERE r.account = $1 AND r.credit = $2 AND r.status = 'held' AND t.tranche_id = ANY (r.tranche_ids))"
	" FROM s WHERE t.account = $1 AND t.credit = $2 AND t.tranche_id = s.tranche_id",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT8ARRAYOID}
};

#define HAS_STRIPES \
	" EXISTS (SELECT FROM credit_lease.tranche_stripe p WHERE p.account = w.account AND p.credit = w.credit AND p.tranche_id = w.tranche_id)"
#define HAS_ENDED(now) \
	"(w.expires_at <= " now " OR w.released_at IS NOT NULL OR (w.remaining = 0 AND w.reserved = 0 AND w.chunked = 0))"

/* ... or, having no stripes, to be written off */
#define IS_TO_BE_FOLDED(now) \
	HAS_ENDED(now) " AND (w.remaining <> 0 OR" HAS_STRIPES ")"

static Statement ended_statement = {
	.sql = "SELECT pg_catalog.array_agg(w.tranche_id) FROM credit_lease.whole_tranche w"
	" WHERE w.account = $1 AND w.credit = $2 AND w.open AND " IS_TO_BE_FOLDED("$3"),
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, TIMESTAMPTZOID}
};

static Statement leases_statement = {
	.sql = "SELECT pg_catalog.array_agg(w.tranche_id) FROM credit_lease.tranche w"
	" WHERE w.account = $1 AND w.credit = $2 AND w.kind = 'upstream' AND ($3 IS NULL OR w.lease_id = $3) AND" HAS_STRIPES,
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID}
};

/*
 * Striped pools with tranches that have ended; those that are uneven, as a
 * stripe has less than half of its share; and pools that are kept in another
 * number of stripes than their policy says, if that may be. Who is set aside
 * waits until that is over.
 */
static Statement candidates_statement = {
	.custom = true,
	.sql = "SELECT c.account, c.credit FROM (SELECT s.account, s.credit FROM credit_lease.striped_pool s"
	" WHERE EXISTS (SELECT FROM credit_lease.whole_tranche w WHERE w.account = s.account AND w.credit = s.credit AND w.open"
	"  AND (" IS_TO_BE_FOLDED("$1")
	"   OR (SELECT coalesce(pg_catalog.min(p.remaining), 0) * 2 * s.stripes < w.remaining AND w.remaining >= s.stripes"
	"    FROM credit_lease.tranche_stripe p WHERE p.account = w.account AND p.credit = w.credit AND p.tranche_id = w.tranche_id"
	"    AND p.stripe <= s.stripes HAVING true)))"
	" UNION SELECT c.account, c.credit FROM (SELECT s.account, s.credit, s.stripes FROM credit_lease.striped_pool s"
	"  UNION ALL SELECT t.account, t.credit, 1 FROM credit_lease.tranche t WHERE t.open AND NOT EXISTS ("
	"   SELECT FROM credit_lease.striped_pool s WHERE s.account = t.account AND s.credit = t.credit) AND NOT EXISTS ("
	"   SELECT FROM credit_lease.tranche m WHERE m.account = t.account AND m.credit = t.credit AND m.kind = 'mirror')) c,"
	"  credit_lease.lease_policy(c.account, c.credit) p WHERE $2 AND p.stripes <> c.stripes) c"
	" WHERE NOT EXISTS (SELECT FROM credit_lease.set_aside a WHERE a.account = c.account AND a.credit = c.credit)",
	.nargs = 2,
	.argtypes = {TIMESTAMPTZOID, BOOLOID}
};

static Statement lock_free_statement = {
	.sql = "SELECT s.stripe FROM credit_lease.stripe s WHERE s.account = $1"
	" AND s.stripe <= (SELECT p.stripes FROM credit_lease.striped_pool p WHERE p.account = $1 AND p.credit = $2)"
	" ORDER BY s.stripe DESC FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

/* What remains of a tranche in locked stripes, and in its own row if that is locked, in equal shares */
static Statement even_statement = {
	.sql = "WITH n AS (SELECT x.stripe, pg_catalog.row_number() OVER () AS n, pg_catalog.count(*) OVER () AS stripes"
	"  FROM unnest($3) AS x (stripe)),"
	" t AS (SELECT r.tranche_id, CASE WHEN $5 THEN r.remaining ELSE 0 END AS own,"
	"  (SELECT coalesce(pg_catalog.sum(p.remaining), 0) FROM credit_lease.tranche_stripe p WHERE p.account = $1 AND p.credit = $2"
	"   AND p.tranche_id = r.tranche_id AND p.stripe = ANY ($3)) + CASE WHEN $5 THEN r.remaining ELSE 0 END AS remaining"
	"  FROM credit_lease.tranche r WHERE r.account = $1 AND r.credit = $2 AND r.open AND r.released_at IS NULL"
	"  AND (r.expires_at IS NULL OR r.expires_at > $4)),"
	" i AS (INSERT INTO credit_lease.tranche_stripe AS p (account, credit, tranche_id, stripe, granted, remaining)"
	"  SELECT $1, $2, t.tranche_id, n.stripe, " SHARE("n.n", "n.stripes") ", " SHARE("n.n", "n.stripes")
	"  FROM t CROSS JOIN n, " SHARES("t.remaining", "n.stripes")
	"  WHERE t.remaining > 0"
	"  ON CONFLICT (account, credit, stripe, tranche_id) DO UPDATE SET granted = p.granted + excluded.remaining - p.remaining,"
	"   remaining = excluded.remaining WHERE p.remaining <> excluded.remaining)"
	" UPDATE credit_lease.tranche r SET striped = r.striped + t.own, remaining = r.remaining - t.own"
	" FROM t WHERE r.account = $1 AND r.credit = $2 AND r.tranche_id = t.tranche_id AND t.own > 0",
	.nargs = 5,
	.argtypes = {TEXTOID, TEXTOID, INT4ARRAYOID, TIMESTAMPTZOID, BOOLOID}
};

static Statement stripe_statement = {
	.sql = "INSERT INTO credit_lease.striped_pool (account, credit, stripes) VALUES ($1, $2, $3)"
	" ON CONFLICT (account, credit) DO UPDATE SET stripes = excluded.stripes",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT4OID}
};

static Statement unstripe_statement = {
	.sql = "DELETE FROM credit_lease.striped_pool s WHERE s.account = $1 AND s.credit = $2",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

static Statement pools_statement = {
	.sql = "SELECT s.credit, s.stripes FROM credit_lease.striped_pool s WHERE s.account = $1",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement remove_locks_statement = {
	.sql = "DELETE FROM credit_lease.stripe s WHERE s.account = $1",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement make_locks_statement = {
	.sql = "INSERT INTO credit_lease.stripe (account, stripe, frozen)"
	" SELECT $1, n.stripe, a.frozen FROM credit_lease.account a, pg_catalog.generate_series(1,"
	"  (SELECT pg_catalog.max(s.stripes) FROM credit_lease.striped_pool s WHERE s.account = $1)) AS n (stripe)"
	" WHERE a.account = $1",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

/* The row is made anew, see account.c. */
static Statement mark_statement = {
	.sql = "WITH a AS (DELETE FROM credit_lease.account a WHERE a.account = $1"
	"  AND a.striped <> EXISTS (SELECT FROM credit_lease.striped_pool s WHERE s.account = $1) RETURNING a.*)"
	" INSERT INTO credit_lease.account (account, frozen, striped, created_at)"
	" SELECT a.account, a.frozen, NOT a.striped, a.created_at FROM a",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement policy_statement = {
	.sql = "SELECT p.stripes FROM credit_lease.lease_policy($1, $2) p",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

static Statement set_policy_statement = {
	.sql = "INSERT INTO credit_lease.policy AS p (account, credit, stripes) VALUES ($1, $2, $3)"
	" ON CONFLICT (account, credit) DO UPDATE SET stripes = excluded.stripes"
	" WHERE p.stripes IS DISTINCT FROM excluded.stripes",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT4OID}
};

static Statement mirror_statement = {
	.sql = "SELECT FROM credit_lease.tranche t WHERE t.account = $1 AND t.credit = $2 AND t.kind = 'mirror'",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

/*
 * Spreads what remains in the own row of a tranche that has no stripes, or with
 * 0 of all tranches of a pool, whose rows nobody else can change. Every open
 * tranche of a striped pool has a row in every stripe of the account.
 */
static void
spread(const Pool *pool, int stripes, int64 tranche_id)
{
	Parameters	parameters = pool_parameters(pool);
	Parameters	account = {0};

	parameter_add(&parameters, Int32GetDatum(stripes));
	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	parameter_add(&parameters, Int64GetDatum(tranche_id));
	statement_execute(&spread_statement, &parameters);
	parameter_add_pointer(&account, pool->account);
	parameter_add(&account, TimestampTzGetDatum(clock_now()));
	parameter_add(&account, Int64GetDatum(tranche_id));
	statement_execute(&fill_statement, &account);
}

/* Folds tranches of a pool, or all for NULL. All must be locked. */
static void
fold(const Pool *pool, ArrayType *tranche_ids)
{
	Parameters	parameters = pool_parameters(pool);

	parameter_add_pointer(&parameters, tranche_ids);
	statement_execute(&fold_statement, &parameters);
}

/* Folds or spreads all tranches of every striped pool of an account. */
static void
keep_pools(text *account, bool folded)
{
	Parameters	parameters = {0};
	uint64		n;
	SPITupleTable *rows;

	parameter_add_pointer(&parameters, account);
	n = statement_execute(&pools_statement, &parameters);
	rows = SPI_tuptable;
	for (uint64 i = 0; i < n; i++)
	{
		bool		isnull;
		Pool		pool = {.account = account};

		pool.credit = DatumGetTextPP(SPI_getbinval(rows->vals[i], rows->tupdesc, 1, &isnull));
		if (folded)
			fold(&pool, NULL);
		else
			spread(&pool, DatumGetInt32(SPI_getbinval(rows->vals[i], rows->tupdesc, 2, &isnull)), 0);
	}
}

/*
 * restripe_make_locks
 *		Makes the stripes of an account anew, as many as its pools need, and
 *		marked as the account is; all must be locked.
 */
void
restripe_make_locks(text *account)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, account);
	statement_execute(&remove_locks_statement, &parameters);
	statement_execute(&make_locks_statement, &parameters);
	/* by who has made them, rows that one transaction makes twice are not told apart */
	stripe_forget_all();
}

/*
 * Keeps a pool in so many stripes; all must be locked. The account's other
 * pools have rows in the stripes that are made anew, too.
 */
static void
change_stripes(const Pool *pool, int stripes)
{
	Parameters	parameters = pool_parameters(pool);
	Parameters	account = {0};

	parameter_add_pointer(&account, pool->account);
	keep_pools(pool->account, true);
	if (stripes > 1)
		parameter_add(&parameters, Int32GetDatum(stripes));
	statement_execute(stripes > 1 ? &stripe_statement : &unstripe_statement, &parameters);
	restripe_make_locks(pool->account);
	statement_execute(&mark_statement, &account);
	keep_pools(pool->account, false);
}

static int
stripes_of_policy(const Pool *pool)
{
	Parameters	parameters = pool_parameters(pool);
	bool		isnull;

	statement_execute(&policy_statement, &parameters);
	return DatumGetInt32(statement_value(0, 1, &isnull));
}

/* Returns whether a pool has a mirror, which is never striped: as it is committed, whatever the snapshot. */
static bool
has_mirror(const Pool *pool)
{
	Parameters	parameters = pool_parameters(pool);

	return statement_execute_now(&mirror_statement, &parameters) > 0;
}

static bool
lock_all_if_free(void *arg)
{
	return stripe_lock_all_if_free(arg);
}

/* Returns whether a pool is to be kept in another number of stripes, and which. A pool with a mirror has one. */
static bool
is_to_change(const Pool *pool, int *stripes)
{
	*stripes = stripes_of_policy(pool);
	return Max(stripe_count(pool), 1) != *stripes && (*stripes == 1 || !has_mirror(pool));
}

/*
 * Keeps a pool in as many stripes as its policy says. Locks the account and all
 * its stripes, if there is something to do; or leaves that to the worker, where
 * they would have to be waited for. Returns whether that changed anything.
 */
static bool
follow_policy(text *account, text *credit, bool wait)
{
	Pool		pool = {.account = account, .credit = credit};
	AccountMarks marks;
	int			stripes;

	if (!is_to_change(&pool, &stripes))
		return false;
	if (wait)
		stripe_lock_account(account);
	else if (!guard_attempt(lock_all_if_free, &pool))
		return false;
	/* the policy may have changed meanwhile */
	if (!account_lock(account, ACCOUNT_LOCK, &marks) || !is_to_change(&pool, &stripes))
		return false;
	change_stripes(&pool, stripes);
	return true;
}

/*
 * restripe_spread
 *		Spreads a tranche of a pool whose account is locked, if it has no
 *		stripes, as it was added, or is open again; and all of a pool of which
 *		the policy says something else by now.
 */
void
restripe_spread(Pool *pool, const Tranche *tranche)
{
	stripe_forget_elsewhere(pool);
	if ((pool->striped || policy_has_stripes()) && follow_policy(pool->account, pool->credit, false))
		pool->striped = stripe_count(pool) > 0;
	else if (pool->striped)
		spread(pool, stripe_count(pool), tranche->tranche_id);
}

/* Returns the ids that a statement finds in a pool by a further parameter, NULL for none. */
static ArrayType *
find_ids(const Pool *pool, Statement *statement, Datum value, bool isnull)
{
	Parameters	parameters = pool_parameters(pool);
	Datum		ids;

	if (isnull)
		parameter_add_null(&parameters);
	else
		parameter_add(&parameters, value);
	statement_execute(statement, &parameters);
	ids = statement_value(0, 1, &isnull);
	return isnull ? NULL : DatumGetArrayTypeP(ids);
}

/*
 * restripe_fold_leases
 *		Locks an account, and all its stripes if it has any, and folds the lease
 *		with an id, or all leases of a pool. Raises 55P03 where a transaction
 *		that has locked something of the account before does not get the rest in
 *		time.
 */
void
restripe_fold_leases(Pool *pool, text *lease_id)
{
	ArrayType  *ids;
	AccountMarks marks;

	/* once it is locked, it does not become striped */
	if (account_lock_unless_striped(pool->account, &marks))
		return;
	stripe_lock_account(pool->account);
	account_lock(pool->account, ACCOUNT_LOCK, &marks);
	pool->may_be_frozen = marks.frozen;
	pool->striped = stripe_count(pool) > 0;
	ids = find_ids(pool, &leases_statement, PointerGetDatum(lease_id), lease_id == NULL);
	if (ids)
		fold(pool, ids);
}

/* Evens out what is free of a pool. */
static void
even_out(const Pool *pool)
{
	Parameters	parameters = pool_parameters(pool);
	int			n = (int) statement_execute(&lock_free_statement, &parameters);
	Datum	   *stripe = palloc(sizeof(Datum) * n);
	AccountMarks marks;
	bool		own;

	for (int i = 0; i < n; i++)
	{
		bool		isnull;

		stripe[i] = statement_value(i, 1, &isnull);
	}
	own = account_lock(pool->account, ACCOUNT_LOCK_IF_FREE, &marks);
	parameter_add_pointer(&parameters, construct_array(stripe, n, INT4OID, sizeof(int32), true, TYPALIGN_INT));
	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	parameter_add(&parameters, BoolGetDatum(own));
	if (n > 0)
		statement_execute(&even_statement, &parameters);
}

static ArrayType *
find_ended(const Pool *pool)
{
	return find_ids(pool, &ended_statement, TimestampTzGetDatum(clock_now()), false);
}

/*
 * restripe_fold_ended
 *		Folds what has ended of a striped pool, if anything has, and nothing of
 *		the account is locked by others, or after a wait for them. Returns
 *		whether something was folded, which is still to be written off: all is
 *		locked then, and the pool is to be read as it is in its own rows.
 */
bool
restripe_fold_ended(Pool *pool, bool wait)
{
	ArrayType  *ids;

	if (find_ended(pool) == NULL)
		return false;
	if (wait)
		stripe_lock_account(pool->account);
	else if (!stripe_lock_all_if_free(pool))
		return false;
	/* what is not at its end any more by then keeps its stripes */
	ids = find_ended(pool);
	if (ids == NULL)
		return false;
	fold(pool, ids);
	pool->striped = true;
	pool->stripe = 0;
	return true;
}

/*
 * restripe_tidy
 *		Keeps a pool in as many stripes as its policy says, and folds what has
 *		ended, see restripe_fold_ended(), or evens it out.
 */
bool
restripe_tidy(Pool *pool)
{
	follow_policy(pool->account, pool->credit, true);
	if (stripe_count(pool) == 0)
		return false;
	if (restripe_fold_ended(pool, true))
		return true;
	even_out(pool);
	return false;
}

/*
 * restripe_candidates
 *		Returns the striped pools that are to be tidied, and, if policies have
 *		changed, those that are to be striped, as Pools in a memory context.
 */
List *
restripe_candidates(MemoryContext context, bool policies_changed)
{
	MemoryContext old;
	Parameters	parameters = {0};
	List	   *pools = NIL;
	uint64		n;

	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	parameter_add(&parameters, BoolGetDatum(policies_changed));
	n = statement_execute(&candidates_statement, &parameters);
	old = MemoryContextSwitchTo(context);
	for (uint64 i = 0; i < n; i++)
	{
		Pool	   *pool = palloc0(sizeof(Pool));
		bool		isnull;

		pool->account = DatumGetTextPCopy(statement_value(i, 1, &isnull));
		pool->credit = DatumGetTextPCopy(statement_value(i, 2, &isnull));
		pools = lappend(pools, pool);
	}
	MemoryContextSwitchTo(old);
	return pools;
}

/*
 * lease_stripe(account, credit, stripes)
 *		Sets the policy of a pool to so many stripes, and does it at once;
 *		returns whether that changed anything. Raises 55P03 as
 *		stripe_lock_account() does, and 0A000 for a pool with a mirror.
 */
PG_FUNCTION_INFO_V1(lease_stripe);
Datum
lease_stripe(PG_FUNCTION_ARGS)
{
	Pool		pool = {0};
	Parameters	parameters;
	int32		stripes = PG_ARGISNULL(2) ? 0 : PG_GETARG_INT32(2);
	bool		changed;

	pool.account = argument_text(fcinfo, 0, "account");
	pool.credit = argument_text(fcinfo, 1, "credit");
	if (stripes < 1 || stripes > 64)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("stripes must be between 1 and 64")));
	statement_begin();
	parameters = pool_parameters(&pool);
	parameter_add(&parameters, Int32GetDatum(stripes));
	changed = statement_execute(&set_policy_statement, &parameters) > 0;
	SPI_finish();
	PG_RETURN_BOOL(changed);
}

/* Does what the policy says now for a pool that a row of policy names, if it names one. */
static void
follow_row(HeapTuple row, TupleDesc tupdesc)
{
	char	   *account = row ? SPI_getvalue(row, tupdesc, SPI_fnumber(tupdesc, "account")) : NULL;
	char	   *credit = row ? SPI_getvalue(row, tupdesc, SPI_fnumber(tupdesc, "credit")) : NULL;

	if (account && credit)
		follow_policy(cstring_to_text(account), cstring_to_text(credit), true);
}

/* Raises 0A000 where a row of policy asks for stripes of one pool that cannot have them. */
static void
require_no_mirror(HeapTuple row, TupleDesc tupdesc)
{
	char	   *account = SPI_getvalue(row, tupdesc, SPI_fnumber(tupdesc, "account"));
	char	   *credit = SPI_getvalue(row, tupdesc, SPI_fnumber(tupdesc, "credit"));
	char	   *stripes = SPI_getvalue(row, tupdesc, SPI_fnumber(tupdesc, "stripes"));
	Pool		pool = {0};

	if (account == NULL || credit == NULL || stripes == NULL || atoi(stripes) == 1)
		return;
	pool.account = cstring_to_text(account);
	pool.credit = cstring_to_text(credit);
	if (has_mirror(&pool))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("credit \"%s\" of account \"%s\" has a balance that lives elsewhere, and cannot be striped",
						credit, account),
				 errhint("Split it among its owners with credit_lease.lease_chunk_allocate().")));
}

/*
 * policy_stripes()
 *		Trigger of policy: a row for one pool is followed at once. What stands
 *		for many pools, the worker follows, or their next top-up. A dump brings
 *		its stripes along.
 */
PG_FUNCTION_INFO_V1(policy_stripes);
Datum
policy_stripes(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo))
		elog(ERROR, "policy_stripes() was not called as a trigger");
	if (check_function_bodies)
	{
		statement_begin();
		follow_row(trigger->tg_trigtuple, RelationGetDescr(trigger->tg_relation));
		follow_row(trigger->tg_newtuple, RelationGetDescr(trigger->tg_relation));
		if (!TRIGGER_FIRED_BY_DELETE(trigger->tg_event))
			require_no_mirror(TRIGGER_FIRED_BY_UPDATE(trigger->tg_event) ? trigger->tg_newtuple : trigger->tg_trigtuple,
							  RelationGetDescr(trigger->tg_relation));
		SPI_finish();
	}
	return PointerGetDatum(NULL);
}
