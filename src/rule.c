/*
 * rule.c
 *		Rules: functions of the user's own that decide with lease_check().
 *
 * A rule runs as whoever called lease_check(), never as the extension's owner,
 * and in a subtransaction: one that fails denies, and leaves nothing behind. It
 * is named with its schema, and that is where the names in it are looked up,
 * unless it has a search_path of its own. What it sets is undone when it
 * returns: the statements after it are the owner's. It cannot become anybody
 * else, as no function can in which the user has been changed.
 *
 * It may do what its caller may do, and so may call these functions. Nothing
 * is held in memory meanwhile that it could make wrong, see check.c.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/plancache.h"
#include "utils/regproc.h"
#include "utils/rel.h"

#include "compat.h"
#include "guard.h"
#include "rule.h"

#define NARGS	5

static Oid	argtypes[NARGS] = {TEXTOID, TEXTOID, NUMERICOID, NUMERICOID, JSONBOID};

/* The query that asks a rule, kept for the session; PostgreSQL makes it anew when the function changes. */
typedef struct RulePlan
{
	char	   *rule;
	SPIPlanPtr	plan;
} RulePlan;

static List *plans = NIL;

/* What guard() has to do */
typedef struct Call
{
	const char *rule;
	const Caller *caller;
	const Question *question;
	Answer	   *answer;
	MemoryContext context;		/* of the answer */
} Call;

/* Splits the name of a rule into its schema, which it must have, and the rest. */
static void
split_name(const char *rule, const char **schema, const char **name)
{
	List	   *names = stringToQualifiedNameList(rule, NULL);

	if (list_length(names) != 2)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_NAME),
				 errmsg("rule \"%s\" is not the name of a function with its schema", rule),
				 errhint("Write it as in: myapp.may_use")));
	*schema = strVal(linitial(names));
	*name = strVal(lsecond(names));
	/* the caller's own, in one way or another */
	if (strncmp(*schema, "pg_temp", 7) == 0 || strcmp(*schema, "$user") == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_NAME),
				 errmsg("rule \"%s\" must not be a different function for each caller", rule)));
}

/* Returns the query that asks a rule. */
static char *
query(const char *schema, const char *name)
{
	return psprintf("SELECT r.allowed, r.reason FROM %s($1, $2, $3, $4, $5) AS r",
					quote_qualified_identifier(schema, name));
}

pg_noreturn static void
no_answer(const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_DATA_EXCEPTION),
			 errmsg("it returned %s", what)));
}

static SPIPlanPtr
find_plan(const char *rule, const char *schema, const char *name)
{
	ListCell   *cell;
	RulePlan   *kept;
	SPIPlanPtr	plan;
	MemoryContext old;

	foreach(cell, plans)
	{
		kept = lfirst(cell);
		if (strcmp(kept->rule, rule) == 0)
			return kept->plan;
	}

	plan = SPI_prepare(query(schema, name), NARGS, argtypes);
	if (plan == NULL || SPI_keepplan(plan) != 0)
		elog(ERROR, "could not prepare a rule: %s", SPI_result_code_string(SPI_result));
	old = MemoryContextSwitchTo(TopMemoryContext);
	kept = palloc(sizeof(RulePlan));
	kept->rule = pstrdup(rule);
	kept->plan = plan;
	plans = lappend(plans, kept);
	MemoryContextSwitchTo(old);
	return plan;
}

/* Calls a rule as the caller, and reads its answer. */
static void
call_rule(void *arg)
{
	const Call *call = arg;
	const Question *question = call->question;
	Datum		values[NARGS] = {
		PointerGetDatum(question->account), PointerGetDatum(question->feature),
		NumericGetDatum(question->quantity), NumericGetDatum(question->available),
		PointerGetDatum(question->subject)
	};
	char		nulls[] = "     ";
	Oid			owner;
	int			security;
	int			nest_level = NewGUCNestLevel();
	const char *schema;
	const char *name;
	char	   *reason;
	bool		isnull;

	if (question->available == NULL)
		nulls[3] = 'n';
	if (question->subject == NULL)
		nulls[4] = 'n';
	GetUserIdAndSecContext(&owner, &security);
	SetUserIdAndSecContext(call->caller->user, call->caller->security | SECURITY_LOCAL_USERID_CHANGE);
	split_name(call->rule, &schema, &name);
	SetConfigOption("search_path", psprintf("%s, pg_temp", quote_identifier(schema)),
					PGC_USERSET, PGC_S_SESSION);

	if (SPI_connect() != SPI_OK_CONNECT ||
		SPI_execute_plan(find_plan(call->rule, schema, name), values, nulls, false, 2) != SPI_OK_SELECT)
		elog(ERROR, "could not ask a rule");
	if (SPI_processed != 1)
		no_answer(SPI_processed == 0 ? "no row" : "more than one row");
	if (SPI_gettypeid(SPI_tuptable->tupdesc, 1) != BOOLOID)
		no_answer("something else than a boolean");
	call->answer->allowed = DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	if (isnull)
		no_answer("NULL");
	reason = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2);
	call->answer->reason = reason ? MemoryContextStrdup(call->context, reason) : NULL;
	SPI_finish();

	AtEOXact_GUC(false, nest_level);
	SetUserIdAndSecContext(owner, security);
}

/* Returns whether an error concerns the transaction more than the rule: it is no answer of the rule's. */
static bool
is_beyond_rule(const ErrorData *error)
{
	switch (ERRCODE_TO_CATEGORY(error->sqlerrcode))
	{
		case ERRCODE_TRANSACTION_ROLLBACK:
		case ERRCODE_INSUFFICIENT_RESOURCES:
		case ERRCODE_OPERATOR_INTERVENTION:
		case ERRCODE_SYSTEM_ERROR:
			return true;
		default:
			return error->sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE;
	}
}

/*
 * rule_ask
 *		Asks a rule as the caller. One that fails denies, and answer->error says
 *		why; but what ends the transaction, as a deadlock or a cancelled query,
 *		is raised.
 */
void
rule_ask(const char *rule, const Caller *caller, const Question *question, Answer *answer)
{
	Call		call = {rule, caller, question, answer, CurrentMemoryContext};
	ErrorData  *error;

	*answer = (Answer) {0};
	error = guard(call_rule, &call);
	if (error == NULL)
		return;
	if (is_beyond_rule(error))
		ReThrowError(error);
	*answer = (Answer) {.error = psprintf("rule %s failed: %s", rule, error->message)};
}

/* Returns the name of a rule as it is kept; raises where it is no such function. */
static char *
require_rule(char *rule)
{
	const char *schema;
	const char *name;
	SPIPlanPtr	plan;
	TupleDesc	result;

	/* as regprocedure spells it, with arguments that have to be these anyway */
	if (rule[0] && rule[strlen(rule) - 1] == ')')
	{
		Oid			function = DatumGetObjectId(DirectFunctionCall1(regprocedurein, CStringGetDatum(rule)));

		rule = quote_qualified_identifier(get_namespace_name(get_func_namespace(function)), get_func_name(function));
	}
	split_name(rule, &schema, &name);

	plan = SPI_prepare(query(schema, name), NARGS, argtypes);
	if (plan == NULL)
		elog(ERROR, "could not prepare a rule: %s", SPI_result_code_string(SPI_result));
	result = ((CachedPlanSource *) linitial(SPI_plan_get_plan_sources(plan)))->resultDesc;
	if (TupleDescAttr(result, 0)->atttypid != BOOLOID || TupleDescAttr(result, 1)->atttypid != TEXTOID)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_FUNCTION_DEFINITION),
				 errmsg("rule \"%s\" does not return (allowed boolean, reason text)", rule)));
	return quote_qualified_identifier(schema, name);
}

/*
 * meter_guard()
 *		The trigger of meter, for a row with a rule: raises an error where that
 *		is no such function (42883, 42703, 42P13) or no name of one, and keeps
 *		its name. Looks at nothing where check_function_bodies is off.
 */
PG_FUNCTION_INFO_V1(meter_guard);
Datum
meter_guard(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;
	TupleDesc	tupdesc;
	HeapTuple	row;
	int			column;
	Datum		name;

	if (!CALLED_AS_TRIGGER(fcinfo))
		elog(ERROR, "meter_guard() was not called as a trigger");
	tupdesc = RelationGetDescr(trigger->tg_relation);
	row = TRIGGER_FIRED_BY_UPDATE(trigger->tg_event) ? trigger->tg_newtuple : trigger->tg_trigtuple;

	/* a dump has to come in whatever has become of the function since */
	if (!check_function_bodies)
		return PointerGetDatum(row);
	SPI_connect();
	column = SPI_fnumber(tupdesc, "rule");
	name = CStringGetTextDatum(require_rule(SPI_getvalue(row, tupdesc, column)));
	row = SPI_modifytuple(trigger->tg_relation, row, 1, &column, &name, NULL);
	SPI_finish();
	return PointerGetDatum(row);
}
