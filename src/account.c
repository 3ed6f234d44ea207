/*
 * account.c
 *		The lock of an account.
 *
 * Every call that changes anything of an account, but for the row of a chunk and
 * the entries of what is spent of it (chunk.c), locks the account's row of
 * credit_lease.account first, in a statement of its own, until the end of the
 * transaction. The statements after it see all that others have committed, and
 * nobody else changes anything meanwhile: the rest of a call waits for nothing,
 * whatever it touches and in whatever order, and the entries of an account are
 * numbered in the order in which they are committed. Two transactions can
 * deadlock only when they take two accounts in opposite orders.
 *
 * Nothing but a freeze changes the row. Those who wait for a row that is locked
 * alone go on one by one; for one that its holder has changed, all of them wake
 * at every commit, to wait for its new version.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/timestamp.h"

#include "account.h"
#include "clock.h"
#include "statement.h"

#define LOCK "SELECT a.frozen FROM credit_lease.account a WHERE a.account = $1 FOR NO KEY UPDATE"

static Statement lock_statement = {
	.sql = LOCK,
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement lock_if_free_statement = {
	.sql = LOCK " SKIP LOCKED",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement create_statement = {
	.sql = "INSERT INTO credit_lease.account (account, created_at) VALUES ($1, $2)"
	" ON CONFLICT (account) DO NOTHING",
	.nargs = 2,
	.argtypes = {TEXTOID, TIMESTAMPTZOID}
};

/*
 * account_lock
 *		Locks an account and returns whether that has been done: it is not
 *		where the account is not there, or is locked and how says not to wait.
 *		*frozen is whether something of it is, see admin.c.
 */
bool
account_lock(text *account, AccountLock how, bool *frozen)
{
	Statement  *statement = how == ACCOUNT_LOCK_IF_FREE ? &lock_if_free_statement : &lock_statement;
	Parameters	parameters = {0};
	bool		isnull;

	*frozen = false;
	parameter_add_pointer(&parameters, account);
	if (statement_execute(statement, &parameters) == 0)
	{
		Parameters	creation = parameters;

		if (how != ACCOUNT_LOCK_OR_CREATE)
			return false;
		parameter_add(&creation, TimestampTzGetDatum(clock_now()));
		statement_execute(&create_statement, &creation);
		if (statement_execute(statement, &parameters) == 0)
			elog(ERROR, "could not lock the account that was created");
	}
	*frozen = DatumGetBool(statement_value(0, 1, &isnull));
	return true;
}
