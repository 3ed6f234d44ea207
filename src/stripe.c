/*
 * stripe.c
 *		The locks of a striped account.
 *
 * A durable commit holds a row's lock until the log is flushed: one row allows
 * one transaction for each flush. A striped pool keeps each of its tranches in
 * several rows, its stripes, and a call works in one of them, which nobody else
 * has locked: the rows of credit_lease.stripe are what is locked. They are the
 * account's, not the pool's, so that a transaction that spends of several pools
 * does so in one stripe.
 *
 * A session starts where it last succeeded: soon each has a stripe of its own.
 *
 * Whoever changes which pools are striped, or in how many, has all locks, and
 * makes the rows of credit_lease.stripe anew: who waited for one finds nothing
 * to lock, and looks again. So it is enough to look whether a pool is striped
 * with a stripe locked, and not at all by a row that it was striped by before.
 *
 * The order of locks is in account.c.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "miscadmin.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "account.h"
#include "compat.h"
#include "errors.h"
#include "guard.h"
#include "statement.h"
#include "stripe.h"

/* How many times as much as a call needs is so much that no other takes it just before */
#define PLENTY			64

/* How old what is said of other stripes may be */
#define RECALL_FOR_MS	20

/* The most that a pool can have */
#define MOST_STRIPES	64

/* How often is tried what must not be waited for */
#define POLL_MS			2

/* What a session remembers of so many pools */
#define MEMORIES		64
#define LARGEST_AMOUNT	64

typedef union Remembered
{
	char		bytes[LARGEST_AMOUNT];
	int32		header;
} Remembered;

typedef struct Memory
{
	char	   *pool;			/* the account and the credit; NULL for none */
	Size		length;
	int			stripe;
	StripeRow	row;
	ItemPointerData part;		/* its row of the tranche whose turn it is */
	LocalTransactionId transaction;
	Remembered	elsewhere;		/* what remained in other stripes, when they were looked at */
	TimestampTz looked_at;		/* 0 for never */
	uint32		composition;	/* the pool's, then */
} Memory;

static Memory memories[MEMORIES];

/* The stripe that was locked last, of which account, and by which transaction */
static StripeRow latest;
static uint32 latest_account;
static LocalTransactionId latest_transaction = InvalidLocalTransactionId;

#define SELECT_STRIPE "SELECT s.stripe, s.frozen, s.ctid, s.xmin FROM credit_lease.stripe s WHERE s.account = $1"

static Statement count_statement = {
	.sql = "SELECT p.stripes, (SELECT pg_catalog.count(*) FROM credit_lease.stripe s WHERE s.account = $1)"
	" FROM credit_lease.striped_pool p WHERE p.account = $1 AND p.credit = $2",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

static Statement lock_same_statement = {
	.sql = SELECT_STRIPE " AND s.ctid = $2 AND s.xmin = $3 FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 3,
	.argtypes = {TEXTOID, TIDOID, XIDOID}
};

/*
 * ... if it has plenty: then it may be locked for good before it is read. As
 * long as nobody else has worked there, what remains is where it was.
 */
static Statement lock_same_plenty_statement = {
	.sql = "SELECT s.stripe, s.frozen, s.ctid, s.xmin FROM credit_lease.stripe s, credit_lease.tranche_stripe p"
	" WHERE s.account = $1 AND s.ctid = $2 AND s.xmin = $3"
	" AND p.account = $1 AND p.credit = $4 AND p.stripe = s.stripe AND p.ctid = $5 AND p.remaining >= $6"
	" FOR NO KEY UPDATE OF s SKIP LOCKED",
	.nargs = 6,
	.argtypes = {TEXTOID, TIDOID, XIDOID, TEXTOID, TIDOID, NUMERICOID}
};

static Statement lock_next_plenty_statement = {
	.sql = SELECT_STRIPE " AND s.stripe > $2 AND s.xmin = $3"
	" AND (SELECT pg_catalog.sum(p.remaining) FROM credit_lease.tranche_stripe p"
	"  WHERE p.account = $1 AND p.credit = $4 AND p.stripe = s.stripe) >= $5"
	" ORDER BY s.stripe LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 5,
	.argtypes = {TEXTOID, INT4OID, XIDOID, TEXTOID, NUMERICOID}
};

static Statement lock_next_statement = {
	.sql = SELECT_STRIPE " AND s.stripe > $2 ORDER BY s.stripe LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 2,
	.argtypes = {TEXTOID, INT4OID}
};

static Statement wait_statement = {
	.sql = SELECT_STRIPE " AND s.stripe = (SELECT x.stripe FROM credit_lease.stripe x WHERE x.account = $1"
	"  ORDER BY x.stripe < $2, x.stripe LIMIT 1) FOR NO KEY UPDATE",
	.nargs = 2,
	.argtypes = {TEXTOID, INT4OID}
};

static Statement lock_one_statement = {
	.sql = "SELECT FROM credit_lease.stripe s WHERE s.account = $1 AND s.stripe = $2 FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 2,
	.argtypes = {TEXTOID, INT4OID}
};

static Statement lock_all_statement = {
	.sql = SELECT_STRIPE " ORDER BY s.stripe DESC FOR NO KEY UPDATE",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement lock_all_free_statement = {
	.sql = SELECT_STRIPE " ORDER BY s.stripe DESC FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement count_all_statement = {
	.sql = "SELECT pg_catalog.count(*) FROM credit_lease.stripe s WHERE s.account = $1",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static uint32
hash_text(const text *string)
{
	return hash_bytes((const unsigned char *) VARDATA_ANY(string), VARSIZE_ANY_EXHDR(string));
}

/* Returns where a pool is remembered, or is to be; another may be there. */
static Memory *
find_place(const Pool *pool)
{
	return &memories[hash_combine(hash_text(pool->account), hash_text(pool->credit)) % MEMORIES];
}

/* Returns what is remembered of a pool, NULL for nothing. */
static Memory *
find_memory(const Pool *pool)
{
	Memory	   *memory = find_place(pool);
	Size		length = VARSIZE_ANY_EXHDR(pool->account);

	if (memory->pool == NULL || memory->length != length + 1 + VARSIZE_ANY_EXHDR(pool->credit) ||
		memcmp(memory->pool, VARDATA_ANY(pool->account), length) != 0 || memory->pool[length] != '\0' ||
		memcmp(memory->pool + length + 1, VARDATA_ANY(pool->credit), VARSIZE_ANY_EXHDR(pool->credit)) != 0)
		return NULL;
	return memory;
}

static void
forget(const Pool *pool)
{
	Memory	   *memory = find_memory(pool);

	if (memory == NULL)
		return;
	pfree(memory->pool);
	memset(memory, 0, sizeof(Memory));
}

/* Begins to remember a pool, in place of another one. */
static Memory *
make_memory(const Pool *pool)
{
	Memory	   *memory = find_place(pool);
	Size		length = VARSIZE_ANY_EXHDR(pool->account);
	char	   *name = MemoryContextAllocZero(TopMemoryContext, length + 1 + VARSIZE_ANY_EXHDR(pool->credit));

	memcpy(name, VARDATA_ANY(pool->account), length);
	memcpy(name + length + 1, VARDATA_ANY(pool->credit), VARSIZE_ANY_EXHDR(pool->credit));
	if (memory->pool)
		pfree(memory->pool);
	memset(memory, 0, sizeof(Memory));
	memory->pool = name;
	memory->length = length + 1 + VARSIZE_ANY_EXHDR(pool->credit);
	return memory;
}

/* Returns whether the session has worked in a stripe of the pool. */
bool
stripe_is_known(const Pool *pool)
{
	return find_memory(pool) != NULL;
}

/* Keeps an amount; returns whether it fits. */
static bool
keep(Remembered *remembered, Numeric amount)
{
	bool		fits = VARSIZE_ANY(amount) <= LARGEST_AMOUNT;

	if (!fits)
		amount = amount_zero();
	memcpy(remembered->bytes, amount, VARSIZE_ANY(amount));
	return fits;
}

/*
 * stripe_remember
 *		Remembers the stripe in which a call has worked, and what it saw in
 *		others, unless it or an earlier call of its
 *		transaction may have changed that: it may be rolled back.
 */
void
stripe_remember(const Pool *pool, bool gathered)
{
	Memory	   *memory = find_memory(pool);
	bool		is_first;

	if (memory == NULL)
		memory = make_memory(pool);
	is_first = memory->transaction != MyProcLxid;
	if (pool->looked || gathered || memory->stripe != pool->stripe)
		memory->looked_at = 0;
	if (pool->looked && !gathered && is_first && keep(&memory->elsewhere, pool->elsewhere))
	{
		memory->looked_at = GetCurrentTimestamp();
		memory->composition = pool->composition;
	}
	memory->stripe = pool->stripe;
	memory->row = pool->stripe_row;
	ItemPointerSetInvalid(&memory->part);
	if (pool->ntranches > 0 && pool->tranche[0]->in_stripe && pool->tranche[0]->has_row)
		memory->part = pool->tranche[0]->tid;
	memory->transaction = MyProcLxid;
}

/*
 * stripe_recall
 *		Sets what remains of a pool in other stripes than the locked one, if the
 *		session looked a moment ago, and the pool consists of the same; returns
 *		whether it did.
 */
bool
stripe_recall(Pool *pool)
{
	Memory	   *memory = find_memory(pool);

	if (memory == NULL || !ItemPointerEquals(&memory->row.tid, &pool->stripe_row.tid) ||
		memory->looked_at == 0 || memory->composition != pool->composition ||
		TimestampDifferenceExceeds(memory->looked_at, GetCurrentTimestamp(), RECALL_FOR_MS))
		return false;
	pool->elsewhere = palloc(LARGEST_AMOUNT);
	memcpy(pool->elsewhere, memory->elsewhere.bytes, LARGEST_AMOUNT);
	return true;
}

/*
 * stripe_count
 *		Returns in how many stripes a pool is kept; 0 for none. Raises LC009
 *		where the account has fewer.
 */
int
stripe_count(const Pool *pool)
{
	Parameters	parameters = {0};
	bool		isnull;
	int			stripes;

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, pool->credit);
	if (statement_execute(&count_statement, &parameters) == 0)
		return 0;
	stripes = DatumGetInt32(statement_value(0, 1, &isnull));
	if (DatumGetInt64(statement_value(0, 2, &isnull)) < stripes)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("stripes of account \"%s\" are missing", text_to_cstring(pool->account)),
				 errhint("See credit_lease.lease_verify(); nothing was changed.")));
	return stripes;
}

pg_noreturn static void
could_not_lock(text *account)
{
	ereport(ERROR,
			(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
			 errmsg("could not lock the stripes of account \"%s\"", text_to_cstring(account)),
			 errdetail("Others have locked them, and this transaction has locked something of the account before, for which they may wait."),
			 errhint("Try again, or in a transaction of its own.")));
}

/* Makes a stripe that was locked the one that the call works in. */
static void
take(Pool *pool, uint64 row)
{
	bool		isnull;

	pool->stripe = DatumGetInt32(statement_value(row, 1, &isnull));
	pool->may_be_frozen = DatumGetBool(statement_value(row, 2, &isnull));
	pool->stripe_row.tid = *(ItemPointer) DatumGetPointer(statement_value(row, 3, &isnull));
	pool->stripe_row.xmin = DatumGetTransactionId(statement_value(row, 4, &isnull));
	latest = pool->stripe_row;
	latest_account = hash_text(pool->account);
	latest_transaction = MyProcLxid;
	account_note_held(pool->account);
}

/* Runs a statement that locks a stripe; returns whether the call has one now. */
static bool
lock(Pool *pool, Statement *statement, int stripe)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int32GetDatum(stripe));
	if (statement_execute(statement, &parameters) == 0)
		return false;
	take(pool, 0);
	return true;
}

/* Locks a row that was locked before, if it is still there, and free. */
static bool
lock_same(Pool *pool, const StripeRow *row)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, &row->tid);
	parameter_add(&parameters, TransactionIdGetDatum(row->xmin));
	if (statement_execute(&lock_same_statement, &parameters) == 0)
		return false;
	take(pool, 0);
	return true;
}

/* Locks the stripe that the transaction has locked before, if it has. */
static bool
lock_latest(Pool *pool)
{
	return latest_transaction == MyProcLxid && latest_account == hash_text(pool->account) &&
		lock_same(pool, &latest);
}

/* Locks a stripe of a pool's account that is free: the transaction's, if it has one, or the session's. */
static bool
lock_free(Pool *pool)
{
	Memory	   *memory = find_memory(pool);

	return lock_latest(pool) || (memory && lock_same(pool, &memory->row)) ||
		lock(pool, &lock_next_statement, memory ? memory->stripe : MyProcPid % MOST_STRIPES) ||
		lock(pool, &lock_next_statement, 0);
}

/* Returns whether a pool is striped, one of whose account's stripes is locked. */
static bool
is_striped(const Pool *pool)
{
	Memory	   *memory = find_memory(pool);

	/* it was, by the same rows */
	return (memory && memory->row.xmin == pool->stripe_row.xmin) || stripe_count(pool) > 0;
}

/*
 * stripe_lock_plenty
 *		Locks a stripe that is free and has many times as much as a call needs,
 *		or that the transaction has locked before; returns whether it did, and
 *		the pool is striped. Only for a pool that the session knows.
 */
bool
stripe_lock_plenty(Pool *pool, Numeric needed)
{
	Memory	   *memory = find_memory(pool);
	Parameters	same = {0};
	Parameters	next = {0};
	Numeric		plenty;

	if (memory == NULL)
		return false;
	if (lock_latest(pool))
		return is_striped(pool);
	plenty = amount_multiply(needed, int64_to_numeric(PLENTY));
	parameter_add_pointer(&same, pool->account);
	parameter_add_pointer(&same, &memory->row.tid);
	parameter_add(&same, TransactionIdGetDatum(memory->row.xmin));
	parameter_add_pointer(&same, pool->credit);
	parameter_add_pointer(&same, &memory->part);
	parameter_add_pointer(&same, plenty);
	if (statement_execute(&lock_same_plenty_statement, &same) == 0)
	{
		parameter_add_pointer(&next, pool->account);
		parameter_add(&next, Int32GetDatum(memory->stripe));
		parameter_add(&next, TransactionIdGetDatum(memory->row.xmin));
		parameter_add_pointer(&next, pool->credit);
		parameter_add_pointer(&next, plenty);
		if (statement_execute(&lock_next_plenty_statement, &next) == 0)
			return false;
	}
	take(pool, 0);
	return true;
}

/*
 * stripe_lock_free
 *		Locks a stripe of a pool's account, if one is free, and returns whether
 *		that has been done, and the pool is striped. It stays so as long as the
 *		stripe is locked.
 */
bool
stripe_lock_free(Pool *pool)
{
	return lock_free(pool) && is_striped(pool);
}

/* Waits for a stripe; it may not be there any more by then. */
static void
wait_for_one(Pool *pool)
{
	const Memory *memory = find_memory(pool);

	lock(pool, &wait_statement, memory ? memory->stripe : MyProcPid % MOST_STRIPES);
}

/* Makes one of the stripes of the last result, which are all, the one that the call works in. */
static void
take_one_of_all(Pool *pool, uint64 n)
{
	const Memory *memory = find_memory(pool);
	uint64		own = 0;

	for (uint64 row = 0; row < n; row++)
	{
		bool		isnull;

		if (memory && DatumGetInt32(statement_value(row, 1, &isnull)) == memory->stripe)
			own = row;
	}
	if (n > 0)
		take(pool, own);
	if (n == 0 || stripe_count(pool) == 0)
	{
		pool->stripe = 0;
		forget(pool);
	}
}

static int64
count_all(text *account)
{
	Parameters	parameters = {0};
	bool		isnull;

	parameter_add_pointer(&parameters, account);
	statement_execute(&count_all_statement, &parameters);
	return DatumGetInt64(statement_value(0, 1, &isnull));
}

/*
 * stripe_lock_all_if_free
 *		Locks all stripes of a pool's account, and the account, which may have
 *		to be waited for; returns false, and keeps what it has got, where a
 *		stripe is locked by others.
 */
bool
stripe_lock_all_if_free(Pool *pool)
{
	Parameters	parameters = {0};
	AccountMarks marks;
	uint64		n;

	parameter_add_pointer(&parameters, pool->account);
	for (int i = 0; i < 2; i++)
	{
		/* once more with the account locked: they may have been made anew before */
		if (i > 0)
			account_lock(pool->account, ACCOUNT_LOCK, &marks);
		n = count_all(pool->account);
		if (statement_execute(&lock_all_free_statement, &parameters) != n)
			return false;
	}
	take_one_of_all(pool, n);
	return true;
}

static bool
wait_in_order(void *arg)
{
	Pool	   *pool = arg;
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	statement_execute(&lock_all_statement, &parameters);
	return stripe_lock_all_if_free(pool);
}

/* Waits for all locks of an account; begins anew where stripes were made anew before the account was locked. */
static void
wait_for_all(Pool *pool)
{
	while (!guard_attempt(wait_in_order, pool))
		CHECK_FOR_INTERRUPTS();
}

/* What is tried again and again */
typedef struct Attempt
{
	bool		(*lock) (Pool *);
	Pool	   *pool;
} Attempt;

/*
 * Tries to lock something until that succeeds; returns false after half the
 * time in which others would take it for a deadlock. Raises 55P03 where
 * lock_timeout is over before.
 */
static bool
poll(void *arg)
{
	Attempt    *attempt = arg;
	int			limit = Max(DeadlockTimeout / 2, 1);
	bool		is_users = LockTimeout > 0 && LockTimeout < limit;
	TimestampTz end = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), is_users ? LockTimeout : limit);

	while (!attempt->lock(attempt->pool))
	{
		if (GetCurrentTimestamp() >= end)
		{
			if (is_users)
				could_not_lock(attempt->pool->account);
			return false;
		}
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, POLL_MS, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	return true;
}

/*
 * stripe_lock_any
 *		Locks a stripe of a pool's account, and waits for one if need be.
 *		Returns false where there is none, or they have been made anew
 *		meanwhile. Raises 55P03 where a transaction that has locked the account
 *		and no stripe finds none in time.
 */
bool
stripe_lock_any(Pool *pool)
{
	pool->stripe = 0;
	if (lock_free(pool))
		return true;
	if (!account_is_held(pool->account))
		wait_for_one(pool);
	else if (count_all(pool->account) > 0 && !guard_attempt(poll, &(Attempt) {lock_free, pool}))
		could_not_lock(pool->account);
	return pool->stripe != 0;
}

/*
 * stripe_lock_all
 *		Locks all stripes of a pool's account, and the account. Returns false
 *		where the pool is not striped, and where the transaction, which has
 *		locked something of the account before, does not get them in time: it
 *		has what it had before.
 */
bool
stripe_lock_all(Pool *pool)
{
	Pool		before = *pool;

	if (!account_is_held(pool->account))
		wait_for_all(pool);
	else if (!guard_attempt(poll, &(Attempt) {stripe_lock_all_if_free, pool}))
		pool->stripe = 0;
	if (pool->stripe == 0)
	{
		*pool = before;
		return false;
	}
	pool->has_all = true;
	return true;
}

/*
 * stripe_lock_account
 *		Locks an account, if it is there, and all its stripes, for what concerns
 *		all its pools. Raises 55P03 as stripe_lock_any() does.
 */
void
stripe_lock_account(text *account)
{
	Pool		pool = {.account = account, .credit = cstring_to_text("")};

	if (!account_is_held(account))
		wait_for_all(&pool);
	else if (!guard_attempt(poll, &(Attempt) {stripe_lock_all_if_free, &pool}))
		could_not_lock(account);
}

/* Locks one more stripe of a pool's account, if it is free. */
bool
stripe_lock_if_free(const Pool *pool, int stripe)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int32GetDatum(stripe));
	return statement_execute(&lock_one_statement, &parameters) > 0;
}
