/*
 * account.c
 *		The lock of an account, and the order of all locks.
 *
 * Every call that changes anything of an account, but for the row of a chunk or a
 * session and the entries of what is spent of it (chunk.c), locks the account's row of
 * credit_lease.account first, in a statement of its own, until the end of the
 * transaction. The statements after it see all that others have committed, and
 * nobody else changes anything meanwhile: the rest of a call waits for nothing,
 * whatever it touches and in whatever order, and the entries of an account are
 * numbered in the order in which they are committed. Two transactions can
 * deadlock only when they take two accounts in opposite orders.
 *
 * Nothing but a freeze, or another number of stripes, changes the row, and
 * nothing else that of a stripe. Those who wait for a row that is locked alone
 * go on one by one; for one that its holder has changed, all of them wake at
 * every commit, to wait for its new version.
 *
 * PostgreSQL locks the new version of a row also where it turns out not to be
 * what the statement looks for, and returns nothing. So what such a statement
 * asks for never changes in a row: where it has to, the row is deleted, and
 * made anew. Who waited for the old one then finds nothing, and looks again.
 *
 * In a striped pool a call locks one of the account's stripes in its place
 * (stripe.c). The order is: stripes, the last one first, then the account,
 * then holds. Who locks the account has a stripe first, even for what is not
 * striped: so nobody waits for a stripe who has the account. The worker and a
 * sweep lock an account that is free without one: so who has all stripes lets
 * go of them before he waits for the account. Who has locked nothing of the
 * account may wait for any of these, in this order. Who has, in an earlier call
 * of his transaction, or has been waited for by reason of it (held.c), waits for
 * the account as ever; further stripes he does not wait for, but tries to lock
 * for some time, and does without them then. So no two functions deadlock,
 * called how often and in whatever order; but if two transactions end the same
 * hold of a striped pool, or use the same key, they wait for one another, and
 * deadlock if they do so with two in opposite orders, or with one, when the one
 * that waits has the account, and the other one then wants it. A row of policy
 * is locked before the account by who changes it.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "utils/timestamp.h"

#include "account.h"
#include "clock.h"
#include "compat.h"
#include "held.h"
#include "statement.h"

#define SELECT_ACCOUNT "SELECT a.frozen, a.striped FROM credit_lease.account a WHERE a.account = $1"
#define LOCK SELECT_ACCOUNT " FOR NO KEY UPDATE"

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

static Statement lock_unless_striped_statement = {
	.sql = SELECT_ACCOUNT " AND NOT a.striped FOR NO KEY UPDATE",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement look_statement = {
	.sql = SELECT_ACCOUNT,
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement create_statement = {
	.sql = "INSERT INTO credit_lease.account (account, created_at) VALUES ($1, $2)"
	" ON CONFLICT (account) DO NOTHING",
	.nargs = 2,
	.argtypes = {TEXTOID, TIMESTAMPTZOID}
};

static void
read_marks(AccountMarks *marks)
{
	bool		isnull;

	marks->frozen = DatumGetBool(statement_value(0, 1, &isnull));
	marks->striped = DatumGetBool(statement_value(0, 2, &isnull));
}

/*
 * Tries to lock an account for some time, if somebody waits for the whole
 * transaction: he may do so by reason of a lock of it that was rolled back
 * (held.c), and be ahead in the queue for the row, which somebody else has by
 * now. Who sets lock_timeout has it decide.
 */
static void
try_if_waited_for(Parameters *parameters)
{
	TimestampTz end = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), Max(DeadlockTimeout / 2, 1));

	while (LockTimeout == 0 && held_is_waited_for() && statement_execute(&lock_if_free_statement, parameters) == 0 &&
		   GetCurrentTimestamp() < end)
	{
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, LOCK_POLL_MS, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

/*
 * account_lock
 *		Locks an account and returns whether that has been done: it is not
 *		where the account is not there, or is locked and how says not to wait.
 */
bool
account_lock(text *account, AccountLock how, AccountMarks *marks)
{
	Parameters	parameters = {0};

	memset(marks, 0, sizeof(*marks));
	parameter_add_pointer(&parameters, account);
	if (how != ACCOUNT_LOCK_IF_FREE && held_ever(account))
		try_if_waited_for(&parameters);
	while (statement_execute(how == ACCOUNT_LOCK_IF_FREE ? &lock_if_free_statement : &lock_statement, &parameters) == 0)
	{
		CHECK_FOR_INTERRUPTS();
		if (how == ACCOUNT_LOCK_IF_FREE)
			return false;
		/* it may have been made anew meanwhile */
		if (statement_execute(&look_statement, &parameters) == 0)
		{
			Parameters	creation = parameters;

			if (how != ACCOUNT_LOCK_OR_CREATE)
				return false;
			parameter_add(&creation, TimestampTzGetDatum(clock_now()));
			statement_execute(&create_statement, &creation);
		}
	}
	read_marks(marks);
	held_note(account);
	return true;
}

/*
 * account_lock_unless_striped
 *		Locks an account that has no striped pool, and returns whether it is
 *		there and has none. One that gets a striped pool while this waits is
 *		made anew, and so not locked: who has it must not wait for a stripe.
 */
bool
account_lock_unless_striped(text *account, AccountMarks *marks)
{
	Parameters	parameters = {0};

	memset(marks, 0, sizeof(*marks));
	parameter_add_pointer(&parameters, account);
	while (statement_execute(&lock_unless_striped_statement, &parameters) == 0)
	{
		CHECK_FOR_INTERRUPTS();
		if (statement_execute(&look_statement, &parameters) == 0)
			return false;
		read_marks(marks);
		if (marks->striped)
			return false;
	}
	read_marks(marks);
	held_note(account);
	return true;
}
