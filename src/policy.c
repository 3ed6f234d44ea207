/*
 * policy.c
 *		The settings of a pool, whether pools may have an upstream, and the
 *		guard of the policies.
 *
 * What every call needs to know of the policies is only whether any has a
 * server, or stripes: a session remembers that until a policy changes, which
 * the guard tells all sessions, when it is committed, as an invalidation of the
 * table.
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"

#include "demand.h"
#include "policy.h"
#include "statement.h"
#include "upstream.h"
#include "worker_state.h"

static Statement any_statement = {
	.sql = "SELECT EXISTS (SELECT FROM credit_lease.policy p WHERE p.server IS NOT NULL),"
	" EXISTS (SELECT FROM credit_lease.policy p WHERE p.stripes > 1)"
};

/*
 * What holds for a pool, the most specific first; what holds where nobody says
 * is the last row, so that every setting but the server and max_staleness has a value.
 */
static Statement policy_statement = {
	.sql = "SELECT r.* FROM (SELECT 1, p.account, p.credit, p.server, p.company_id, p.credit_type_id, p.event,"
	"  p.lease_size, p.lease_duration, p.low_water_mark, p.safety_margin, p.hold_ttl, p.failure_mode, p.smallest_unit, p.stripes,"
	"  p.sync_interval, p.max_staleness"
	"  FROM credit_lease.policy p WHERE (p.account = $1 OR p.account IS NULL) AND (p.credit = $2 OR p.credit IS NULL)"
	" UNION ALL SELECT 2, NULL, NULL, NULL, $1, $2, $2,"
	"  10000, '5 minutes', 0.25, '0', '60 seconds', 'closed', 1e-12, 1, '1 minute', NULL) AS r (n, account, credit)"
	" ORDER BY r.n, r.account, r.credit",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID},
	.read_only = true
};

/* ... the number of its columns, and of those that are no settings */
#define COLUMNS		17
#define NO_SETTINGS	3

/*
 * lease_policy(account, credit)
 *		Returns the settings of a pool: each from the most specific row that
 *		has a value for it, the account before the credit.
 */
PG_FUNCTION_INFO_V1(lease_policy);
Datum
lease_policy(PG_FUNCTION_ARGS)
{
	Parameters	parameters = {0};
	MemoryContext caller = statement_begin();
	uint64		rows;
	Datum		values[COLUMNS - NO_SETTINGS];
	bool		nulls[COLUMNS - NO_SETTINGS];

	for (int i = 0; i < 2; i++)
		parameter_add_pointer(&parameters, PG_ARGISNULL(i) ? NULL : PG_GETARG_TEXT_PP(i));
	rows = statement_execute(&policy_statement, &parameters);
	for (int i = 0; i < COLUMNS - NO_SETTINGS; i++)
	{
		nulls[i] = true;
		for (uint64 row = 0; row < rows && nulls[i]; row++)
			values[i] = statement_value(row, NO_SETTINGS + 1 + i, &nulls[i]);
	}
	return statement_end(caller, fcinfo, values, nulls);
}

/* What this session remembers, and how often it was told of changes */
static bool known = false;
static bool has_server;
static bool has_stripes;
static uint64 changes = 0;
static Oid	policy_table = InvalidOid;

static void
forget(Datum arg, Oid relation)
{
	if (relation == policy_table || !OidIsValid(relation))
	{
		known = false;
		changes++;
	}
}

static void
know(void)
{
	static bool registered = false;
	Parameters	parameters = {0};
	bool		isnull;
	uint64		changes_before;

	if (known)
		return;
	if (!registered)
		CacheRegisterRelcacheCallback(forget, (Datum) 0);
	registered = true;
	policy_table = get_relname_relid("policy", get_namespace_oid("credit_lease", false));
	changes_before = changes;
	statement_execute(&any_statement, &parameters);
	has_server = DatumGetBool(statement_value(0, 1, &isnull));
	has_stripes = DatumGetBool(statement_value(0, 2, &isnull));
	known = changes == changes_before;
}

/* Returns whether any policy has a server; what is remembered costs nothing. */
bool
policy_has_server(void)
{
	know();
	return has_server;
}

/* Returns whether any policy has several stripes. */
bool
policy_has_stripes(void)
{
	know();
	return has_stripes;
}

/*
 * policy_guard()
 *		The triggers of policy: for each row with a server, raises 42704 or
 *		42809 where that is none, unless check_function_bodies is off; for each
 *		statement, lets all sessions and the worker know.
 */
PG_FUNCTION_INFO_V1(policy_guard);
Datum
policy_guard(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;
	HeapTuple	row;
	int			column;

	if (!CALLED_AS_TRIGGER(fcinfo))
		elog(ERROR, "policy_guard() was not called as a trigger");
	if (!TRIGGER_FIRED_FOR_ROW(trigger->tg_event))
	{
		CacheInvalidateRelcache(trigger->tg_relation);
		demand_at_commit(WAKE_FOR_POLICIES);
		return PointerGetDatum(NULL);
	}

	row = TRIGGER_FIRED_BY_UPDATE(trigger->tg_event) ? trigger->tg_newtuple : trigger->tg_trigtuple;
	/* a dump has to come in whatever has become of the server since */
	if (!check_function_bodies)
		return PointerGetDatum(row);
	column = SPI_fnumber(RelationGetDescr(trigger->tg_relation), "server");
	upstream_require(SPI_getvalue(row, RelationGetDescr(trigger->tg_relation), column));
	return PointerGetDatum(row);
}
