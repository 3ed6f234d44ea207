/*
 * session_snapshot.c
 *		lease_session_snapshot() and lease_session_reconcile(): how far a session
 *		has come, here and on another side.
 *
 * Each side may have missed what the other one has seen, but neither has seen
 * anything that did not happen, and every figure only ever rises: the higher of
 * the two is right.
 *
 * Locks: nothing to look; to reconcile, the session's row, and before it the
 * account or a stripe of it where the deposit is to rise.
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"

#include "argument.h"
#include "clock.h"
#include "session.h"
#include "statement.h"

/* What another side tells of a session */
typedef struct Told
{
	Numeric		deposit;
	Numeric		accepted;
	Numeric		spent;
	int64		units;			/* 0 where it does not say */
} Told;

/*
 * lease_session_snapshot(account, session, next_amount)
 *		Returns what a session is now, and how much would have to be authorized
 *		to charge an amount. Raises LC003 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_session_snapshot);
Datum
lease_session_snapshot(PG_FUNCTION_ARGS)
{
	text	   *account = argument_text(fcinfo, 0, "account");
	text	   *name = argument_text(fcinfo, 1, "session");
	Numeric		next_amount = argument_amount(fcinfo, 2, "next_amount", AMOUNT_NOT_NEGATIVE);
	Chunk		session;
	MemoryContext caller = statement_begin();

	if (!session_find(account, name, true, &session))
		session_not_found(account, name);
	return session_return(caller, fcinfo, &session, clock_now(), false, next_amount);
}

static JsonbValue *
find_member(Jsonb *snapshot, const char *name)
{
	return getKeyJsonValueFromContainer(&snapshot->root, name, strlen(name), NULL);
}

/* Returns a member that is an amount. */
static Numeric
read_amount(Jsonb *snapshot, const char *name, AmountRange range)
{
	JsonbValue *member = find_member(snapshot, name);

	if (member == NULL || member->type != jbvNumeric)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("snapshot.%s must be a number", name)));
	return argument_check_amount(member->val.numeric, psprintf("snapshot.%s", name), range);
}

static int64
read_units(Jsonb *snapshot)
{
	JsonbValue *member = find_member(snapshot, "units");

	if (member == NULL)
		return 0;
	if (member->type != jbvNumeric || amount_sign(member->val.numeric) < 0 ||
		amount_compare(member->val.numeric, int64_to_numeric(PG_INT64_MAX)) > 0 ||
		DatumGetInt32(DirectFunctionCall1(numeric_min_scale, NumericGetDatum(member->val.numeric))) > 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("snapshot.units must be a whole number that is not negative")));
	return DatumGetInt64(DirectFunctionCall1(numeric_int8, NumericGetDatum(member->val.numeric)));
}

/* Reads a snapshot of a session; raises 22023 where it cannot be one. Members that it does not need are ignored. */
static void
read_snapshot(Jsonb *json, text *name, Told *told)
{
	JsonbValue *session;

	if (json == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("snapshot must not be null")));
	if (!JB_ROOT_IS_OBJECT(json))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("snapshot must be an object")));
	session = find_member(json, "session");
	if (session == NULL || session->type != jbvString ||
		session->val.string.len != (int) VARSIZE_ANY_EXHDR(name) ||
		memcmp(session->val.string.val, VARDATA_ANY(name), session->val.string.len) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("snapshot.session must be \"%s\"", text_to_cstring(name))));

	told->deposit = read_amount(json, "deposit", AMOUNT_POSITIVE);
	told->accepted = read_amount(json, "accepted_cumulative", AMOUNT_NOT_NEGATIVE);
	told->spent = read_amount(json, "spent", AMOUNT_NOT_NEGATIVE);
	told->units = read_units(json);
	if (amount_compare(told->spent, told->accepted) > 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("snapshot.spent must not be more than snapshot.accepted_cumulative")));
	if (amount_compare(told->accepted, told->deposit) > 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("snapshot.accepted_cumulative must not be more than snapshot.deposit")));
}

/* Spends of a locked session what the other side has spent beyond it. */
static void
catch_up(const Pool *pool, Chunk *session, Numeric spent, TimestampTz now)
{
	char	   *reason;

	if (chunk_is_frozen(pool->account, session, &reason))
		pool_refuse_frozen(&(Pool) {.account = pool->account, .credit = session->credit}, reason);
	session_spend(pool->account, session, amount_subtract(spent, session->consumed), now);
}

/*
 * lease_session_reconcile(account, session, snapshot)
 *		Raises the figures of a session to those of a snapshot where they are
 *		lower: a deposit by carving the difference out of the pool, what was
 *		spent by a charge of the difference. Raises LC001, LC003, LC004, LC005,
 *		LC007, LC008 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_session_reconcile);
Datum
lease_session_reconcile(PG_FUNCTION_ARGS)
{
	Pool		pool = {0};
	Chunk		session;
	Told		told;
	text	   *name;
	TimestampTz now;
	int64		units;
	bool		raised = false;
	bool		applied;
	MemoryContext caller;

	pool.account = argument_text(fcinfo, 0, "account");
	name = argument_text(fcinfo, 1, "session");
	read_snapshot(argument_optional_jsonb(fcinfo, 2), name, &told);
	caller = statement_begin();

	if (!session_find(pool.account, name, false, &session))
		session_not_found(pool.account, name);
	if (amount_compare(told.deposit, session.granted) > 0)
		session_lock_for_more(&pool, name, amount_subtract(told.deposit, session.granted), &session);
	else
		session_lock(pool.account, name, &session);
	now = session_require_open(pool.account, &session);

	units = Max(session.units, told.units);
	applied = units > session.units;
	/* somebody else may have raised it meanwhile */
	if (amount_compare(told.deposit, session.granted) > 0)
	{
		session_carve(&pool, &session, amount_subtract(told.deposit, session.granted));
		raised = true;
	}
	if (amount_compare(told.accepted, session.accepted) > 0)
	{
		session.accepted = told.accepted;
		raised = true;
	}
	if (amount_compare(told.spent, session.consumed) > 0)
	{
		catch_up(&pool, &session, told.spent, now);
		applied = true;
	}
	applied |= raised;
	if (applied)
	{
		session.units = units;
		chunk_save(pool.account, &session);
	}
	if (raised)
		session_notify(pool.account, &session, now);
	return session_return(caller, fcinfo, &session, now, applied, amount_zero());
}
