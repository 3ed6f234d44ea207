/*
 * supply.c
 *		The wait of a call that is short of credit for its upstream, and
 *		lease_prewarm().
 *
 * Nothing is locked while a call waits (rule 12). Whether it has to is known
 * for sure only when the account is locked, and a lock ends with the
 * transaction: where a pool has an upstream, and not plenty, the account is
 * locked in a subtransaction, which is rolled back if there is too little, as
 * a striped pool always is (reclaim.c). In another pool that has plenty no call
 * pays for that: the statement that locks the account locks it only if there is.
 *
 * No call waits that could not be helped by it: one whose own transaction
 * holds the account, which the worker then cannot supply, or reads a snapshot
 * in which a new lease would not be.
 *
 * Locks: the account, or stripes of it, after the wait.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/timestamp.h"

#include "argument.h"
#include "clock.h"
#include "demand.h"
#include "held.h"
#include "policy.h"
#include "reclaim.h"
#include "statement.h"
#include "stripe.h"
#include "supply.h"

static int	acquire_timeout;

/* How many calls that come at once may take as much without one of them being short */
#define PLENTY	"64"

#define ALIVE \
	"t.account = $1 AND t.credit = $2 AND t.released_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > $3)" \
	" AND (t.trusted_until IS NULL OR t.trusted_until > $3)"

static Statement lock_if_plenty_statement = {
	.sql = "SELECT a.frozen FROM credit_lease.account a WHERE a.account = $1"
	" AND (SELECT pg_catalog.sum(t.remaining) FROM credit_lease.tranche t WHERE " ALIVE " AND t.open)"
	"  >= $4 * " PLENTY
	" AND NOT a.striped FOR NO KEY UPDATE OF a",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, TIMESTAMPTZOID, NUMERICOID}
};

static Statement server_statement = {
	.sql = "SELECT p.server FROM credit_lease.lease_policy($1, $2) p WHERE p.server IS NOT NULL",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

static Statement lease_statement = {
	.sql = "SELECT t.lease_id, (SELECT coalesce(pg_catalog.sum(t.remaining), 0) FROM credit_lease.whole_tranche t WHERE " ALIVE " AND t.open),"
	" t.kind IS NOT NULL"
	" FROM (SELECT) one LEFT JOIN credit_lease.tranche t ON " ALIVE " AND t.kind IN ('upstream', 'mirror') AND t.server IS NOT NULL LIMIT 1",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, TIMESTAMPTZOID}
};

void
supply_define_settings(void)
{
	DefineCustomIntVariable("credit_lease.acquire_timeout",
							"Sets how long a call that is short of credit waits for an upstream.",
							"0 lets no call wait.",
							&acquire_timeout,
							2000, 0, 600 * 1000,
							PGC_USERSET,
							GUC_UNIT_MS,
							NULL, NULL, NULL);
}

static void
add_pool(Parameters *parameters, text *account, text *credit)
{
	parameter_add_pointer(parameters, account);
	parameter_add_pointer(parameters, credit);
}

static bool
has_upstream(text *account, text *credit)
{
	Parameters	parameters = {0};

	add_pool(&parameters, account, credit);
	return statement_execute(&server_statement, &parameters) > 0;
}

/*
 * supply_ask
 *		Has the upstream asked, if the pool has one, by a call that cannot wait
 *		for it: for those that come after it.
 */
void
supply_ask(const Pool *pool, Numeric needed)
{
	char		error[DEMAND_MAX_ERROR];

	if (has_upstream(pool->account, pool->credit))
		demand_wait(text_to_cstring(pool->account), text_to_cstring(pool->credit), needed,
					GetCurrentTimestamp(), error);
}

/*
 * Locks the account and returns whether the pool has an amount; if it has not,
 * the account is not locked any more, and the pool is as it was, but for what
 * was seen of it.
 */
static bool
lock_if_enough(Pool *pool, Numeric needed)
{
	Pool		before = *pool;
	bool		enough = reclaim_lock_if_enough(pool, needed);

	if (!enough)
	{
		before.available = pool->available;
		before.may_be_frozen = pool->may_be_frozen;
		before.is_stale = pool->is_stale;
		*pool = before;
	}
	return enough;
}

/*
 * Locks the account if the pool seems to have many times an amount, or a
 * striped pool if it has the amount, and reads the pool.
 */
static bool
lock_if_plenty(Pool *pool, Numeric needed)
{
	Parameters	parameters = {0};
	bool		isnull;

	if (stripe_is_known(pool))
		return !held_ever(pool->account) && lock_if_enough(pool, needed);
	add_pool(&parameters, pool->account, pool->credit);
	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	parameter_add_pointer(&parameters, needed);
	if (statement_execute(&lock_if_plenty_statement, &parameters) == 0)
		return false;
	held_note(pool->account);
	pool->may_be_frozen = DatumGetBool(statement_value(0, 1, &isnull));
	pool_read(pool);
	reclaim_lapsed(pool);
	return true;
}

/*
 * Waits until the pool has an amount, and returns whether it has, and the
 * account is locked. If it has not, the pool knows why.
 */
static bool
wait_for_supply(Pool *pool, Numeric needed, TimestampTz until)
{
	char	   *account = text_to_cstring(pool->account);
	char	   *credit = text_to_cstring(pool->credit);
	char		error[DEMAND_MAX_ERROR];

	while (!lock_if_enough(pool, needed))
	{
		DemandAnswer answer = demand_wait(account, credit, needed, until, error);

		if (answer == DEMAND_SUPPLIED && GetCurrentTimestamp() < until)
			continue;
		pool->unreachable = acquire_timeout > 0 &&
			(answer == DEMAND_PENDING || answer == DEMAND_UNREACHABLE);
		if (error[0])
			pool->upstream_error = pstrdup(error);
		else if (pool->unreachable)
			pool->upstream_error = "there was no answer in time";
		return false;
	}
	return true;
}

/* Returns until when a call that begins to wait now does so. */
TimestampTz
supply_deadline(void)
{
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), acquire_timeout);
}

/*
 * supply_lock_if_enough
 *		Does reclaim_lock() and returns true if the pool has
 *		an amount, after a wait for its upstream if need be. If it has not, the
 *		account is not locked, so that another pool of it can be tried.
 */
bool
supply_lock_if_enough(Pool *pool, Numeric needed, TimestampTz until)
{
	if (!IsolationUsesXactSnapshot() && policy_has_server() &&
		has_upstream(pool->account, pool->credit) && !held_now(pool->account))
		return wait_for_supply(pool, needed, until);
	if (lock_if_enough(pool, needed))
		return true;
	supply_ask(pool, needed);
	return false;
}

/*
 * supply_lock
 *		Does reclaim_lock() for a call that needs an amount,
 *		after it has waited, if need be, for the pool's upstream to supply it:
 *		at most as long as credit_lease.acquire_timeout says. A request whose
 *		key has had its effect does not wait. One that cannot has the upstream
 *		asked all the same, for the next one.
 */
void
supply_lock(Pool *pool, const Request *request, Numeric needed)
{
	bool		old_snapshot = IsolationUsesXactSnapshot();
	FirstCall	first;

	/* an old snapshot is nothing to remember policies by */
	if (!old_snapshot && !policy_has_server())
	{
		reclaim_lock(pool, needed);
		return;
	}
	if (!old_snapshot &&
		(lock_if_plenty(pool, needed) ||
		 (has_upstream(pool->account, pool->credit) && !held_now(pool->account) &&
		  !request_find_first(request, false, &first) && wait_for_supply(pool, needed, supply_deadline()))))
		return;

	reclaim_lock(pool, needed);
	if (!reclaim_cover(pool, needed))
		supply_ask(pool, needed);
}

static const char *const answer_word[] = {"pending", "live", "no upstream", "refused", "unreachable"};

/* Waits for a live lease of a pool, or the balance of its mirror. */
static DemandAnswer
prewarm(text *account, text *credit, TimestampTz until)
{
	DemandAnswer answer = DEMAND_NO_UPSTREAM;
	char		error[DEMAND_MAX_ERROR];

	statement_begin();
	if (has_upstream(account, credit))
		answer = demand_wait(text_to_cstring(account), text_to_cstring(credit), amount_zero(), until, error);
	SPI_finish();
	return answer;
}

/*
 * lease_prewarm(account, credits, wait) -> setof credit, lease_id, available, status
 *		Has leases acquired, or balances asked for, for those of an account's
 *		pools that have none that is alive, and waits for them: for all of them together no longer than
 *		it says, or than credit_lease.acquire_timeout. What is pending then
 *		still comes.
 */
PG_FUNCTION_INFO_V1(lease_prewarm);
Datum
lease_prewarm(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	text	   *account = argument_text(fcinfo, 0, "account");
	TimestampTz until;
	Datum	   *credit;
	bool	   *null;
	int			ncredits;

	if (PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("credits must not be null")));
	deconstruct_array(PG_GETARG_ARRAYTYPE_P(1), TEXTOID, -1, false, TYPALIGN_INT, &credit, &null, &ncredits);
	for (int i = 0; i < ncredits; i++)
	{
		if (null[i] || VARSIZE_ANY_EXHDR(DatumGetPointer(credit[i])) == 0 ||
			VARSIZE_ANY_EXHDR(DatumGetPointer(credit[i])) > ARGUMENT_MAX_TEXT)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("credits must be of 1 to %d bytes each", ARGUMENT_MAX_TEXT)));
	}
	if (PG_ARGISNULL(2))
		until = supply_deadline();
	else
		until = instant_add(GetCurrentTimestamp(), argument_optional_ttl(fcinfo, 2, "wait", clock_now()));

	/* first let the worker know of all, so that they are asked for at once */
	statement_begin();
	for (int i = 0; i < ncredits; i++)
	{
		text	   *name = DatumGetTextPP(credit[i]);

		if (has_upstream(account, name))
			demand_ask(text_to_cstring(account), text_to_cstring(name), amount_zero(), until);
	}
	if (IsolationUsesXactSnapshot() || held_now(account))
		until = GetCurrentTimestamp();
	SPI_finish();
	InitMaterializedSRF(fcinfo, 0);
	for (int i = 0; i < ncredits; i++)
	{
		text	   *name = DatumGetTextPP(credit[i]);
		DemandAnswer answer = prewarm(account, name, until);
		Parameters	parameters = {0};
		Datum		values[4];
		bool		nulls[4] = {false};
		bool		live;

		statement_begin();
		add_pool(&parameters, account, name);
		parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
		statement_execute(&lease_statement, &parameters);
		values[0] = PointerGetDatum(name);
		values[1] = statement_value(0, 1, &nulls[1]);
		values[2] = statement_value(0, 2, &nulls[2]);
		live = DatumGetBool(statement_value(0, 3, &nulls[3]));
		values[3] = CStringGetTextDatum(answer_word[live && answer != DEMAND_NO_UPSTREAM ? DEMAND_SUPPLIED : answer]);
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
		SPI_finish();
	}
	return (Datum) 0;
}
