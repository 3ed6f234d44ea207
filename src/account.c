/*
 * account.c
 *		The lock of an account, and the order of all locks.
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
 * Nothing but a freeze, or another number of stripes, changes the row, and
 * nothing else that of a stripe. Those who wait for a row that is locked alone
 * go on one by one; for one that its holder has changed, all of them wake at
 * every commit, to wait for its new version.
 *
 * In a striped pool a call locks one of the account's stripes in its place
 * (stripe.c). The order is: stripes, the last one first, then the account,
 * then holds. Who locks the account has a stripe first, even for what is not
 * striped: so nobody waits for a stripe who has the account. Who has locked
 * nothing of the account may wait for any of these, in this order. Who has, in
 * an earlier call of his transaction, waits for the account as ever; further
 * stripes he does not wait for, but tries to lock for some time, and does
 * without them then. So no two functions deadlock, called how often and in
 * whatever order; but if two transactions end the same hold of a striped pool,
 * or use the same key, they wait for one another, and deadlock if they do so
 * with two in opposite orders. Known and not understood yet: beside
 * transactions of several calls, some of which lock everything, one that locks
 * everything may be thrown out as a deadlock's victim.
 */
#include "postgres.h"

#include "access/transam.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "utils/timestamp.h"

#include "account.h"
#include "clock.h"
#include "guard.h"
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
	.sql = SELECT_ACCOUNT " AND NOT a.striped FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement look_statement = {
	.sql = SELECT_ACCOUNT,
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement holder_statement = {
	.sql = "SELECT a.xmin, a.xmax FROM credit_lease.account a WHERE a.account = $1"
	" UNION ALL SELECT s.xmin, s.xmax FROM credit_lease.stripe s WHERE s.account = $1",
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
 * What was locked lately, and by which transaction or subtransaction: from a
 * row that was locked by several of them one cannot read that.
 */
#define NOTES	64

static struct
{
	uint32		account;		/* a hash of it */
	TransactionId transaction;
}			notes[NOTES];
static int	next_note = 0;

static uint32
hash_account(const text *account)
{
	return hash_bytes((const unsigned char *) VARDATA_ANY(account), VARSIZE_ANY_EXHDR(account));
}

/* Notes that this transaction has locked an account, or a stripe of it. */
void
account_note_held(text *account)
{
	notes[next_note].account = hash_account(account);
	notes[next_note].transaction = GetCurrentTransactionIdIfAny();
	next_note = (next_note + 1) % NOTES;
}

static bool
is_noted(const text *account)
{
	uint32		hash = hash_account(account);

	for (int i = 0; i < NOTES; i++)
	{
		if (notes[i].account == hash && TransactionIdIsValid(notes[i].transaction) &&
			TransactionIdIsCurrentTransactionId(notes[i].transaction))
			return true;
	}
	return false;
}

static void
read_marks(AccountMarks *marks)
{
	bool		isnull;

	marks->frozen = DatumGetBool(statement_value(0, 1, &isnull));
	marks->striped = DatumGetBool(statement_value(0, 2, &isnull));
}

/*
 * account_lock
 *		Locks an account and returns whether that has been done: it is not
 *		where the account is not there, or is locked and how says not to wait.
 */
bool
account_lock(text *account, AccountLock how, AccountMarks *marks)
{
	Statement  *statement = how == ACCOUNT_LOCK_IF_FREE ? &lock_if_free_statement : &lock_statement;
	Parameters	parameters = {0};

	memset(marks, 0, sizeof(*marks));
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
	read_marks(marks);
	account_note_held(account);
	return true;
}

/* What is to be locked unless it is striped, and what is known of it then */
typedef struct Candidate
{
	text	   *account;
	AccountMarks *marks;
} Candidate;

static bool
wait_for_unstriped(void *arg)
{
	Candidate  *candidate = arg;

	return account_lock(candidate->account, ACCOUNT_LOCK, candidate->marks) && !candidate->marks->striped;
}

/*
 * account_lock_unless_striped
 *		Locks an account that has no striped pool, and returns whether it is
 *		there and has none. One that gets a striped pool while this waits is
 *		not locked: who has it must not wait for a stripe.
 */
bool
account_lock_unless_striped(text *account, AccountMarks *marks)
{
	Parameters	parameters = {0};

	memset(marks, 0, sizeof(*marks));
	parameter_add_pointer(&parameters, account);
	if (statement_execute(&lock_unless_striped_statement, &parameters) > 0)
	{
		read_marks(marks);
		account_note_held(account);
		return true;
	}
	if (statement_execute(&look_statement, &parameters) == 0)
		return false;
	read_marks(marks);
	return !marks->striped && guard_attempt(wait_for_unstriped, &(Candidate) {account, marks});
}

/* Returns whether this transaction has created, changed or locked the account, or a stripe of it. */
bool
account_is_held(text *account)
{
	Parameters	parameters = {0};
	uint64		n;
	bool		held = false;

	if (is_noted(account))
		return true;
	parameter_add_pointer(&parameters, account);
	n = statement_execute(&holder_statement, &parameters);
	for (uint64 i = 0; i < n && !held; i++)
	{
		bool		isnull;

		held = TransactionIdIsCurrentTransactionId(DatumGetTransactionId(statement_value(i, 1, &isnull))) ||
			TransactionIdIsCurrentTransactionId(DatumGetTransactionId(statement_value(i, 2, &isnull)));
	}
	return held;
}
