/*
 * policy.c
 *		Whether pools may have an upstream, and the guard of the policies.
 *
 * The settings of a pool are resolved in SQL, by lease_policy(). What every
 * call needs to know of them is only whether any has a server: a session
 * remembers that until a policy changes, which the guard tells all sessions,
 * when it is committed, as an invalidation of the table.
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"

#include "demand.h"
#include "policy.h"
#include "statement.h"
#include "upstream.h"
#include "worker_state.h"

static Statement any_statement = {
	.sql = "SELECT EXISTS (SELECT FROM credit_lease.policy p WHERE p.server IS NOT NULL)"
};

/* What this session remembers, and how often it was told of changes */
static bool known = false;
static bool has_server;
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

/* Returns whether any policy has a server; what is remembered costs nothing. */
bool
policy_has_server(void)
{
	static bool registered = false;
	Parameters	parameters = {0};
	bool		isnull;
	uint64		changes_before;

	if (known)
		return has_server;

	if (!registered)
		CacheRegisterRelcacheCallback(forget, (Datum) 0);
	registered = true;
	policy_table = get_relname_relid("policy", get_namespace_oid("credit_lease", false));
	changes_before = changes;
	statement_execute(&any_statement, &parameters);
	has_server = DatumGetBool(statement_value(0, 1, &isnull));
	known = changes == changes_before;
	return has_server;
}

/*
 * policy_guard()
 *		The triggers of policy: for each row with a server, raises 42704 or
 *		42809 where that is none; for each statement, lets all sessions and the
 *		worker know.
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
	column = SPI_fnumber(RelationGetDescr(trigger->tg_relation), "server");
	upstream_require(SPI_getvalue(row, RelationGetDescr(trigger->tg_relation), column));
	return PointerGetDatum(row);
}
