/*
 * balance.c
 *		lease_balance() and lease_verify(): the views of one account.
 *
 * They read with the snapshot of the query that calls them and lock nothing,
 * and so work on a standby and in a read-only transaction.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "funcapi.h"
#include "utils/builtins.h"
#include "utils/tuplestore.h"

#include "argument.h"
#include "statement.h"

static Statement account_balance_statement = {
	.sql = "SELECT b.* FROM credit_lease.balance b WHERE b.account = $1 ORDER BY b.credit",
	.nargs = 1,
	.argtypes = {TEXTOID},
	.read_only = true
};

static Statement pool_balance_statement = {
	.sql = "SELECT b.* FROM credit_lease.balance b WHERE b.account = $1 AND b.credit = $2",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID},
	.read_only = true
};

static Statement account_finding_statement = {
	.sql = "SELECT f.* FROM credit_lease.finding f WHERE f.account = $1",
	.nargs = 1,
	.argtypes = {TEXTOID},
	.read_only = true
};

static Statement finding_statement = {
	.sql = "SELECT f.* FROM credit_lease.finding f",
	.read_only = true
};

/* Runs a statement and makes its rows the function's result. */
static void
return_rows(FunctionCallInfo fcinfo, Statement *statement, Parameters *parameters)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	uint64		rows;

	InitMaterializedSRF(fcinfo, 0);
	statement_begin();
	rows = statement_execute(statement, parameters);
	for (uint64 i = 0; i < rows; i++)
		tuplestore_puttuple(result->setResult, SPI_tuptable->vals[i]);
	SPI_finish();
}

/*
 * lease_balance(account, credit)
 *		Returns what the account has now, a row for each credit or for one.
 */
PG_FUNCTION_INFO_V1(lease_balance);
Datum
lease_balance(PG_FUNCTION_ARGS)
{
	Parameters	parameters = {0};
	text	   *account = argument_text(fcinfo, 0, "account");
	text	   *credit = argument_optional_text(fcinfo, 1, "credit");

	parameter_add_pointer(&parameters, account);
	if (credit)
		parameter_add_pointer(&parameters, credit);
	return_rows(fcinfo, credit ? &pool_balance_statement : &account_balance_statement, &parameters);
	return (Datum) 0;
}

/*
 * lease_verify(account)
 *		Returns what does not hold in the books of an account, or of all.
 */
PG_FUNCTION_INFO_V1(lease_verify);
Datum
lease_verify(PG_FUNCTION_ARGS)
{
	Parameters	parameters = {0};
	text	   *account = argument_optional_text(fcinfo, 0, "account");

	if (account)
		parameter_add_pointer(&parameters, account);
	return_rows(fcinfo, account ? &account_finding_statement : &finding_statement, &parameters);
	return (Datum) 0;
}
