/*
 * admin.c
 *		lease_freeze(), lease_unfreeze(), lease_grant_access(), and the guard
 *		of the ledger.
 *
 * A freeze is a row of frozen_pool, and a mark on the account that makes calls
 * look for it.
 *
 * Locks: the account, which a freeze creates, and all its stripes.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "account.h"
#include "argument.h"
#include "clock.h"
#include "restripe.h"
#include "statement.h"
#include "stripe.h"

static Statement freeze_statement = {
	.sql = "INSERT INTO credit_lease.frozen_pool (account, credit, reason, frozen_at)"
	" VALUES ($1, $2, $3, $4) ON CONFLICT (account, credit) DO NOTHING",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID}
};

static Statement unfreeze_statement = {
	.sql = "DELETE FROM credit_lease.frozen_pool f"
	" WHERE f.account = $1 AND ($2 IS NULL OR f.credit = $2)",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

static Statement mark_statement = {
	.sql = "UPDATE credit_lease.account a SET frozen ="
	" EXISTS (SELECT FROM credit_lease.frozen_pool f WHERE f.account = $1)"
	" WHERE a.account = $1",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static const char *const level_word[] = {"spend", "read", "admin"};

/* What every level needs: to name the schema, and what functions return. */
#define GRANT_NAMES \
	"SELECT pg_catalog.format('GRANT USAGE ON SCHEMA credit_lease TO %I', $1)" \
	" UNION ALL SELECT pg_catalog.format('GRANT USAGE ON TYPE %s TO %I', t.oid::pg_catalog.regtype, $1)" \
	"  FROM pg_catalog.pg_type t JOIN pg_catalog.pg_class c ON c.oid = t.typrelid" \
	"  WHERE t.typnamespace = 'credit_lease'::pg_catalog.regnamespace AND c.relkind = 'c'" \
	" UNION ALL "

/* What the levels may do, as statements for the role %I. */
static const char *const level_grants[] = {
	GRANT_NAMES "SELECT pg_catalog.format('GRANT EXECUTE ON FUNCTION %s TO %I', p.oid::pg_catalog.regprocedure, $1)"
	"  FROM pg_catalog.pg_proc p WHERE p.pronamespace = 'credit_lease'::pg_catalog.regnamespace"
	"  AND p.proname IN ('lease_balance', 'lease_consume', 'lease_try_consume', 'lease_reserve',"
	"   'lease_try_reserve', 'lease_settle', 'lease_cancel', 'lease_renew',"
	"   'lease_chunk_allocate', 'lease_chunk', 'lease_chunk_renew', 'lease_chunk_release',"
	"   'lease_chunk_consume', 'lease_try_chunk_consume',"
	"   'lease_session_open', 'lease_session_topup', 'lease_session_authorize', 'lease_session_charge',"
	"   'lease_session_snapshot', 'lease_session_reconcile', 'lease_session_close',"
	"   'lease_check', 'lease_track', 'lease_explain', 'lease_ingest')",


	GRANT_NAMES "SELECT pg_catalog.format('GRANT SELECT ON ALL TABLES IN SCHEMA credit_lease TO %I', $1)"
	" UNION ALL SELECT pg_catalog.format('GRANT EXECUTE ON FUNCTION %s TO %I', p.oid::pg_catalog.regprocedure, $1)"
	"  FROM pg_catalog.pg_proc p WHERE p.pronamespace = 'credit_lease'::pg_catalog.regnamespace"
	"  AND p.proname IN ('lease_balance', 'lease_verify', 'lease_clock', 'lease_worker', 'lease_upstreams', 'lease_policy')",

	GRANT_NAMES "SELECT pg_catalog.format('GRANT SELECT ON ALL TABLES IN SCHEMA credit_lease TO %I', $1)"
	" UNION ALL SELECT pg_catalog.format('GRANT INSERT, UPDATE, DELETE ON credit_lease.policy, credit_lease.meter TO %I', $1)"
	" UNION ALL SELECT pg_catalog.format('GRANT EXECUTE ON FUNCTION %s TO %I', p.oid::pg_catalog.regprocedure, $1)"
	"  FROM pg_catalog.pg_proc p WHERE p.pronamespace = 'credit_lease'::pg_catalog.regnamespace"
	"  AND p.proname LIKE 'lease\\_%'"
};

/* Changes what is frozen of an account, and marks it; returns whether anything changed. */
static bool
change_freeze(text *account, AccountLock how, Statement *change, Parameters *parameters)
{
	Parameters	mark = {0};
	AccountMarks marks;
	bool		changed;

	statement_begin();
	stripe_lock_account(account);
	changed = account_lock(account, how, &marks) && statement_execute(change, parameters) > 0;
	if (changed)
	{
		parameter_add_pointer(&mark, account);
		statement_execute(&mark_statement, &mark);
		restripe_make_locks(account);
	}
	SPI_finish();
	return changed;
}

/*
 * lease_freeze(account, credit, reason)
 *		Stops spending and holding in a pool, or in all of an account, now and
 *		in future; returns false where exactly that was stopped already.
 */
PG_FUNCTION_INFO_V1(lease_freeze);
Datum
lease_freeze(PG_FUNCTION_ARGS)
{
	Parameters	parameters = {0};
	text	   *account = argument_text(fcinfo, 0, "account");

	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, argument_optional_text(fcinfo, 1, "credit"));
	parameter_add_pointer(&parameters, argument_optional_text(fcinfo, 2, "reason"));
	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	PG_RETURN_BOOL(change_freeze(account, ACCOUNT_LOCK_OR_CREATE, &freeze_statement, &parameters));
}

/*
 * lease_unfreeze(account, credit)
 *		Lifts the freeze of a pool, or every freeze of an account; returns false
 *		where there was none. The freeze of an account is not lifted for one of
 *		its pools alone.
 */
PG_FUNCTION_INFO_V1(lease_unfreeze);
Datum
lease_unfreeze(PG_FUNCTION_ARGS)
{
	Parameters	parameters = {0};
	text	   *account = argument_text(fcinfo, 0, "account");

	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, argument_optional_text(fcinfo, 1, "credit"));
	PG_RETURN_BOOL(change_freeze(account, ACCOUNT_LOCK, &unfreeze_statement, &parameters));
}

/*
 * lease_grant_access(role, level)
 *		Grants a role what it needs to spend (the functions under "Spending",
 *		"Chunks", "Sessions" and "Features", and lease_balance), to read (tables, views, lease_verify), or to admin
 *		(everything). Takes the locks of GRANT. Raises 42704 for an unknown
 *		role; PUBLIC is none.
 */
PG_FUNCTION_INFO_V1(lease_grant_access);
Datum
lease_grant_access(PG_FUNCTION_ARGS)
{
	Name		role;
	text	   *level = argument_text(fcinfo, 1, "level");
	int			word = argument_word(level, "level", level_word, lengthof(level_word));
	Oid			argtypes[] = {NAMEOID};
	Datum		values[1];
	SPITupleTable *grants;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("role must not be null")));
	role = PG_GETARG_NAME(0);
	get_role_oid(NameStr(*role), false);

	statement_begin();
	values[0] = NameGetDatum(role);
	if (SPI_execute_with_args(level_grants[word], 1, argtypes, values, NULL, true, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not list the grants of level \"%s\"", level_word[word]);
	grants = SPI_tuptable;
	for (uint64 i = 0; i < grants->numvals; i++)
	{
		if (SPI_execute(SPI_getvalue(grants->vals[i], grants->tupdesc, 1), false, 0) != SPI_OK_UTILITY)
			elog(ERROR, "could not grant level \"%s\"", level_word[word]);
	}
	SPI_finish();
	PG_RETURN_VOID();
}

/*
 * ledger_guard()
 *		Trigger function that refuses what it is fired for.
 */
PG_FUNCTION_INFO_V1(ledger_guard);
Datum
ledger_guard(PG_FUNCTION_ARGS)
{
	if (!CALLED_AS_TRIGGER(fcinfo))
		elog(ERROR, "ledger_guard() was not called as a trigger");

	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("the ledger is append-only"),
			 errhint("Correct a balance with credit_lease.lease_adjust() or credit_lease.lease_refund().")));
}
