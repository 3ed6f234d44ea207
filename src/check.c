/*
 * check.c
 *		lease_check() and lease_explain(): whether an account may use a
 *		quantity of a feature now.
 *
 * It is found out in this order: what the feature costs, which credit pays for
 * it, whether there is enough, which may have to be leased first; then the
 * rule is asked, with what is available before anything is held; then the
 * amount is held. While the rule runs, the account is locked and nothing of it
 * is in memory: what the rule does to it is there when it is read again.
 *
 * These functions run as their caller, whose rights the rule has, and become
 * the extension's owner for all the rest.
 *
 * lease_explain() is a check that waits for nobody but the account's lock, and
 * is rolled back.
 *
 * Locks: the account, or stripes of it.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "argument.h"
#include "clock.h"
#include "guard.h"
#include "hold.h"
#include "ledger.h"
#include "meter.h"
#include "reclaim.h"
#include "rule.h"
#include "statement.h"
#include "supply.h"

static const EntryKind kind_reserve = {.name = "reserve", .bucket = RESERVED};

typedef enum FailureMode
{
	FAILURE_CLOSED,
	FAILURE_OPEN,
	FAILURE_AS_POLICY
} FailureMode;

static const char *const failure_mode_word[] = {"closed", "open"};

/* What is asked, and of whom */
typedef struct Check
{
	Caller		caller;
	text	   *account;
	text	   *feature;
	Numeric		quantity;		/* NULL for NULL */
	text	   *event;			/* NULL for the meter's */
	FailureMode on_failure;
	Jsonb	   *subject;
	Interval   *ttl;
	bool		explains;		/* is rolled back, and waits for no upstream */
	TimestampTz now;

	/* what it comes to */
	const char *reason;
	const char *error;			/* what failed, also where it did not matter; NULL for nothing */
	Meter	   *meter;			/* NULL for none */
	int			nmeters;
	Meter	   *meters;
	Numeric		available;		/* NULL for a feature that costs nothing */
	bool		holds;
	Hold		hold;
} Check;

static const char *const allowed = "allowed";

/* Goes on as the extension's owner. */
static void
become_owner(FunctionCallInfo fcinfo, Caller *caller)
{
	HeapTuple	function = SearchSysCache1(PROCOID, ObjectIdGetDatum(fcinfo->flinfo->fn_oid));
	Oid			owner;

	if (!HeapTupleIsValid(function))
		elog(ERROR, "cache lookup failed for function %u", fcinfo->flinfo->fn_oid);
	owner = ((Form_pg_proc) GETSTRUCT(function))->proowner;
	ReleaseSysCache(function);

	GetUserIdAndSecContext(&caller->user, &caller->security);
	SetUserIdAndSecContext(owner, caller->security | SECURITY_LOCAL_USERID_CHANGE);
}

static void
become_caller(const Caller *caller)
{
	SetUserIdAndSecContext(caller->user, caller->security);
}

/* Says no, and why. */
static void
deny(Check *check, const char *reason, const char *error)
{
	check->reason = reason;
	check->error = error;
}

static bool
is_quantity(Check *check)
{
	const char *problem = NULL;

	if (check->quantity == NULL)
		problem = "quantity must not be null";
	else if (numeric_is_nan(check->quantity) || numeric_is_inf(check->quantity))
		problem = "quantity must be finite";
	else if (amount_sign(check->quantity) < 0)
		problem = "quantity must not be negative";
	else if (amount_has_too_many_digits(check->quantity))
		problem = "quantity has too many digits";
	if (problem)
		deny(check, "invalid_quantity", problem);
	return problem == NULL;
}

/* Asks the rule, if there is one; returns whether it allows it. */
static bool
ask_rule(Check *check, Numeric available)
{
	Question	question = {check->account, check->feature, check->quantity, available, check->subject};
	Answer		answer;

	if (check->meter->rule == NULL)
		return true;
	rule_ask(check->meter->rule, &check->caller, &question, &answer);
	if (!answer.allowed)
		deny(check, answer.reason && strcmp(answer.reason, allowed) != 0 ? answer.reason : "denied_by_rule",
			 answer.error);
	return answer.allowed;
}

/*
 * Returns whether a meter's pool has enough, in which case the account is
 * locked; so it is where there is no other pool to try.
 */
static bool
lock_pool(const Check *check, const Meter *meter, TimestampTz until, Pool *pool)
{
	const Request request = {.kind = &kind_reserve, .account = check->account};

	*pool = (Pool) {.account = check->account, .credit = meter->credit};
	if (!check->explains && check->nmeters > 1)
		return supply_lock_if_enough(pool, meter->amount, until);

	if (check->explains)
		reclaim_lock(pool, meter->amount);
	else
		supply_lock(pool, &request, meter->amount);
	return reclaim_cover(pool, meter->amount);
}

/*
 * Makes the first credit that has enough the meter, and locks the account. If
 * none has, it is the first that is not frozen, and the reason is why not.
 */
static bool
find_credit(Check *check, Pool *pool)
{
	TimestampTz until = supply_deadline();
	bool		unreachable = false;

	check->meter = NULL;
	for (int i = 0; i < check->nmeters; i++)
	{
		Meter	   *meter = &check->meters[i];

		if (meter->frozen)
			continue;
		if (lock_pool(check, meter, until, pool) && !pool_is_frozen(pool))
		{
			check->meter = meter;
			check->error = NULL;
			return true;
		}
		meter->frozen = pool_is_frozen(pool);
		if (pool->available)
			meter->available = pool->available;
		unreachable |= pool_lacks_supply(pool);
		if (check->error == NULL)
			check->error = pool->upstream_error;
		if (check->error == NULL && pool->is_stale)
			check->error = POOL_STALE;
		if (check->meter == NULL && !meter->frozen)
			check->meter = meter;
	}

	if (check->meter == NULL)
	{
		check->meter = check->meters;
		check->reason = "frozen";
	}
	else
		check->reason = unreachable ? "lease_acquire_failed" : "insufficient_credit";
	check->available = check->meter->available;
	return false;
}

/* Returns whether somebody without enough credit may pass. */
static bool
may_pass(const Check *check)
{
	return !check->meter->frozen &&
		(check->on_failure == FAILURE_AS_POLICY ? check->meter->open : check->on_failure == FAILURE_OPEN);
}

/* Holds what the quantity costs; where somebody may pass without, what there is of it. */
static void
hold(Check *check, Pool *pool)
{
	const Request request = {.kind = &kind_reserve, .account = check->account};
	const Meter *meter = check->meter;
	Hold	   *hold = &check->hold;

	hold->reservation_id = NEW_RESERVATION;
	hold->feature = check->feature;
	hold->quantity = check->quantity;
	hold->rate = meter->rate;
	hold->unit = meter->unit;
	hold->event = check->event ? check->event : meter->event;

	pool_take(pool, reclaim_reach(pool, meter->amount), RESERVED);
	hold_collect(pool, hold, hold_expiry(pool, check->ttl));
	ledger_post(pool, &request, &hold->reservation_id);
	hold_create(pool, hold, NULL);
	check->holds = true;
	check->available = pool->available;
}

/* Locks and reads the pool that is to pay; returns whether it may. */
static bool
read_pool(Check *check, Pool *pool)
{
	bool		passes = may_pass(check);
	bool		enough;

	*pool = (Pool) {.account = check->account, .credit = check->meter->credit};
	if (passes)
		pool->wanted = check->meter->amount;
	if (!reclaim_lock(pool, passes ? amount_zero() : check->meter->amount) && passes)
		reclaim_lock_account(pool);
	enough = reclaim_cover(pool, check->meter->amount);
	check->available = pool->available;
	if (pool_is_frozen(pool))
	{
		deny(check, "frozen", NULL);
		return false;
	}
	if (enough)
		check->error = NULL;
	else if (!passes)
		deny(check, "insufficient_credit", NULL);
	else if (check->error == NULL)
		check->error = "insufficient_credit";
	return enough || passes;
}

/* Decides about a quantity that has its price. */
static void
decide(Check *check)
{
	Pool		pool;
	Numeric		assumed;

	if (!find_credit(check, &pool))
	{
		if (!may_pass(check))
			return;
		if (check->error == NULL)
			check->error = check->reason;
		if (!read_pool(check, &pool))
			return;
	}
	check->available = assumed = pool.available;
	if (amount_compare(assumed, check->meter->amount) < 0)
		assumed = check->meter->amount;
	if (!ask_rule(check, assumed) ||
		(check->meter->rule && !read_pool(check, &pool)))	/* the rule may have changed it */
		return;
	hold(check, &pool);
	check->reason = allowed;
}

/* Leaves out the credits of which the quantity costs more than an amount can be. */
static void
leave_out_dear(Check *check)
{
	int			n = 0;

	for (int i = 0; i < check->nmeters; i++)
	{
		const Meter *meter = &check->meters[i];

		if (meter->credit == NULL || !amount_has_too_many_digits(meter->amount))
			check->meters[n++] = *meter;
	}
	check->nmeters = n;
}

/* Finds out whether the account may use what is asked for. */
static void
answer(Check *check)
{
	if (!is_quantity(check))
		return;
	check->nmeters = meter_find(check->account, check->feature, check->quantity, check->now, &check->meters);
	if (check->nmeters == 0)
	{
		deny(check, "not_metered", NULL);
		return;
	}
	leave_out_dear(check);
	if (check->nmeters == 0)
	{
		deny(check, "invalid_quantity", "the quantity costs more than an amount can be");
		return;
	}

	check->meter = check->meters;
	check->available = check->meter->available;
	if (check->meter->credit && amount_sign(check->quantity) > 0)
		decide(check);
	else if (ask_rule(check, check->available))
		check->reason = allowed;
}

static Datum
optional(const void *pointer, bool *isnull)
{
	*isnull = pointer == NULL;
	return PointerGetDatum(pointer);
}

static Datum
optional_string(const char *string, bool *isnull)
{
	*isnull = string == NULL;
	return string ? CStringGetTextDatum(string) : (Datum) 0;
}

/* Puts in the columns that both functions return. */
static void
put_columns(const Check *check, Datum *value, bool *null)
{
	static const Meter none = {0};
	const Meter *meter = check->meter ? check->meter : &none;

	value[0] = optional(meter->credit, &null[0]);
	value[1] = optional(check->holds ? check->hold.amount : meter->amount, &null[1]);
	value[2] = optional(meter->rate, &null[2]);
	value[3] = optional(check->event ? check->event : meter->event, &null[3]);
	value[4] = optional(check->available, &null[4]);
}

/*
 * lease_check(account, feature, quantity, event, on_failure, subject, ttl)
 *		Returns whether an account may use a quantity of a feature; if it may,
 *		what that costs is held until lease_track(). Raises 22023, LC009, and
 *		nothing else but what has another cause than the business.
 */
PG_FUNCTION_INFO_V1(lease_check);
Datum
lease_check(PG_FUNCTION_ARGS)
{
	Check		check = {.now = clock_now()};
	MemoryContext caller;
	text	   *word;
	Datum		result;
	Datum		values[10];
	bool		nulls[10] = {false};

	check.account = argument_text(fcinfo, 0, "account");
	check.feature = argument_text(fcinfo, 1, "feature");
	check.quantity = PG_ARGISNULL(2) ? NULL : PG_GETARG_NUMERIC(2);
	check.event = argument_optional_text(fcinfo, 3, "event");
	word = argument_optional_text(fcinfo, 4, "on_failure");
	check.on_failure = word == NULL ? FAILURE_AS_POLICY :
		argument_word(word, "on_failure", failure_mode_word, lengthof(failure_mode_word));
	check.subject = argument_optional_jsonb(fcinfo, 5);
	check.ttl = argument_optional_ttl(fcinfo, 6, "ttl", check.now);

	become_owner(fcinfo, &check.caller);
	caller = statement_begin();
	answer(&check);

	values[0] = BoolGetDatum(check.reason == allowed);
	values[1] = optional_string(check.reason, &nulls[1]);
	values[2] = optional_string(check.error, &nulls[2]);
	values[3] = Int64GetDatum(check.hold.reservation_id);
	nulls[3] = !check.holds;
	put_columns(&check, &values[4], &nulls[4]);
	values[9] = TimestampTzGetDatum(check.hold.expires_at);
	nulls[9] = !check.holds;
	result = statement_end(caller, fcinfo, values, nulls);
	become_caller(&check.caller);
	return result;
}

static Statement limits_statement = {
	.sql = "SELECT $1 || pg_catalog.jsonb_build_object('credit', $3, 'rate', $4, 'amount', $5,"
	" 'available', coalesce(b.available, 0), 'held', coalesce(b.reserved, 0), 'frozen', $6, 'rule', $7, 'failure_mode', p.failure_mode,"
	" 'smallest_unit', p.smallest_unit, 'hold_ttl', p.hold_ttl, 'server', p.server, 'leased', coalesce(b.leased, 0),"
	" 'upstream_balance', b.upstream_balance, 'lease_size', CASE WHEN p.server IS NOT NULL THEN p.lease_size END)"
	" FROM credit_lease.lease_policy($2, $3) p LEFT JOIN credit_lease.balance b ON b.account = $2 AND b.credit = $3",
	.nargs = 7,
	.argtypes = {JSONBOID, TEXTOID, TEXTOID, NUMERICOID, NUMERICOID, BOOLOID, TEXTOID}
};

/* What a hold has taken of each tranche, in burn order */
static Statement burned_statement = {
	.sql = "SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('tranche_id', t.tranche_id, 'kind', t.kind,"
	" 'lease_id', t.lease_id, 'priority', t.priority, 'expires_at', t.expires_at,"
	" 'remaining', t.remaining + h.amount, 'amount', h.amount) ORDER BY h.n)"
	" FROM credit_lease.reservation r,"
	"  unnest(r.tranche_ids, r.tranche_amounts) WITH ORDINALITY AS h (tranche_id, amount, n),"
	"  credit_lease.whole_tranche t"
	" WHERE r.account = $1 AND r.reservation_id = $2"
	"  AND t.account = $1 AND t.credit = r.credit AND t.tranche_id = h.tranche_id",
	.nargs = 2,
	.argtypes = {TEXTOID, INT8OID}
};

/* Returns what limits each credit that may pay, in the order in which they are tried. */
static Jsonb *
limits(const Check *check)
{
	JsonbParseState *state = NULL;
	Jsonb	   *list;
	Meter	   *meters;
	int			n = meter_find(check->account, check->feature, check->quantity, check->now, &meters);

	pushJsonbValue(&state, WJB_BEGIN_ARRAY, NULL);
	list = JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_ARRAY, NULL));
	for (int i = 0; i < n; i++)
	{
		const Meter *meter = &meters[i];
		Parameters	parameters = {0};
		bool		isnull;

		parameter_add_pointer(&parameters, list);
		parameter_add_pointer(&parameters, check->account);
		parameter_add_pointer(&parameters, meter->credit);
		parameter_add_pointer(&parameters, meter->rate);
		parameter_add_pointer(&parameters, meter->amount);
		parameter_add(&parameters, BoolGetDatum(meter->frozen));
		parameter_add_pointer(&parameters, meter->rule ? cstring_to_text(meter->rule) : NULL);
		statement_execute(&limits_statement, &parameters);
		list = DatumGetJsonbPCopy(statement_value(0, 1, &isnull));
	}
	return list;
}

/* Returns which tranches have paid for the hold, NULL for none. */
static Datum
burned(const Check *check, bool *isnull)
{
	Parameters	parameters = {0};

	*isnull = true;
	if (!check->holds)
		return (Datum) 0;
	parameter_add_pointer(&parameters, check->account);
	parameter_add(&parameters, Int64GetDatum(check->hold.reservation_id));
	statement_execute(&burned_statement, &parameters);
	return statement_value(0, 1, isnull);
}

/* What guard_attempt() has to do, and to roll back */
typedef struct Explanation
{
	Check	   *check;
	Jsonb	   *limits;
	TupleDesc	tupdesc;
	MemoryContext context;		/* of the result */
	Datum		result;
} Explanation;

static bool
explain(void *arg)
{
	Explanation *explanation = arg;
	Check	   *check = explanation->check;
	Datum		values[10];
	bool		nulls[10] = {false};

	answer(check);
	values[0] = BoolGetDatum(check->reason == allowed);
	values[1] = optional_string(check->reason, &nulls[1]);
	values[2] = optional_string(check->error, &nulls[2]);
	put_columns(check, &values[3], &nulls[3]);
	values[8] = burned(check, &nulls[8]);
	values[9] = optional(explanation->limits, &nulls[9]);

	MemoryContextSwitchTo(explanation->context);
	explanation->result = HeapTupleGetDatum(heap_form_tuple(explanation->tupdesc, values, nulls));
	return false;
}

/*
 * lease_explain(account, feature, quantity)
 *		Returns what lease_check() would answer, and what decides: which
 *		tranches would burn, and the limits of each credit that may pay. Nothing
 *		is left of it; the rule is asked, and what it does is undone as well.
 */
PG_FUNCTION_INFO_V1(lease_explain);
Datum
lease_explain(PG_FUNCTION_ARGS)
{
	Check		check = {.now = clock_now(), .on_failure = FAILURE_AS_POLICY, .explains = true};
	Explanation explanation = {.check = &check};

	check.account = argument_text(fcinfo, 0, "account");
	check.feature = argument_text(fcinfo, 1, "feature");
	check.quantity = PG_ARGISNULL(2) ? NULL : PG_GETARG_NUMERIC(2);
	if (get_call_result_type(fcinfo, NULL, &explanation.tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	BlessTupleDesc(explanation.tupdesc);

	become_owner(fcinfo, &check.caller);
	explanation.context = statement_begin();
	if (is_quantity(&check))
		explanation.limits = limits(&check);
	guard_attempt(explain, &explanation);
	SPI_finish();
	become_caller(&check.caller);
	return explanation.result;
}
