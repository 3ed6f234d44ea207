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
 * Whoever changes which pools are striped, or in how many, or what is frozen,
 * has all locks, and makes the rows of credit_lease.stripe anew: who waited for
 * one finds nothing to lock, and looks again. So it is enough to look whether a
 * pool is striped with a stripe locked, and not at all by a row that it was
 * striped by before.
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
#include "held.h"
#include "statement.h"
#include "stripe.h"

/* How old what is said of other stripes may be */
#define RECALL_FOR_MS	100

/* How many calls may look all the same, before others that come as fast do not: who rests is told what is */
#define SPARE_LOOKS		10

/* The most that a pool can have */
#define MOST_STRIPES	64

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
	Remembered	elsewhere;		/* what remained in other stripes, when they were looked at */
	TimestampTz looked_at;		/* 0 for never */
	TimestampTz due;			/* when as much time has passed as is to pass for its looks */
	uint32		composition;	/* the pool's, then */
} Memory;

static Memory memories[MEMORIES];

/* The stripe that was locked last, and of which account */
static StripeRow latest;
static uint32 latest_account;

#define SELECT_STRIPE "SELECT s.stripe, s.frozen, s.ctid, s.xmin FROM credit_lease.stripe s WHERE s.account = $1"

static Statement count_statement = {
	.sql = "SELECT p.stripes, (SELECT pg_catalog.count(*) FROM credit_lease.stripe s WHERE s.account = $1)"
	" FROM credit_lease.striped_pool p WHERE p.account = $1 AND p.credit = $2",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

static Statement lock_same_statement = {
	.sql = SELECT_STRIPE " AND s.ctid = $2 FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 2,
	.argtypes = {TEXTOID, TIDOID}
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

/* Forgets a pool that is not striped. */
void
stripe_forget(const Pool *pool)
{
	Memory	   *memory = find_memory(pool);

	if (memory == NULL)
		return;
	pfree(memory->pool);
	memset(memory, 0, sizeof(Memory));
}

/* Forgets what remained of a pool in other stripes, as the session itself adds to them. */
void
stripe_forget_elsewhere(const Pool *pool)
{
	Memory	   *memory = find_memory(pool);

	if (memory)
		memory->looked_at = 0;
}

/* Forgets all pools, as those of an account may not be striped any more. */
void
stripe_forget_all(void)
{
	for (int i = 0; i < MEMORIES; i++)
	{
		if (memories[i].pool)
			pfree(memories[i].pool);
		memset(&memories[i], 0, sizeof(Memory));
	}
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
 *		others, unless it or an earlier call of its transaction may have changed
 *		that: it may be rolled back.
 */
void
stripe_remember(const Pool *pool, bool gathered)
{
	Memory	   *memory = find_memory(pool);

	if (memory == NULL)
		memory = make_memory(pool);
	if (pool->looked)
	{
		bool		keeps = !gathered && pool->is_first && keep(&memory->elsewhere, pool->elsewhere);

		memory->looked_at = keeps ? pool->looked_at : 0;
		memory->composition = pool->composition;
		memory->due = TimestampTzPlusMilliseconds(Max(memory->due, pool->looked_at), RECALL_FOR_MS);
	}
	memory->stripe = pool->stripe;
	memory->row = pool->stripe_row;
}

/*
 * stripe_recall
 *		Sets what remains of a pool in other stripes than the locked one, if the
 *		session looked a moment ago, and often of late, and the pool consists of
 *		the same; returns whether it did.
 */
bool
stripe_recall(Pool *pool)
{
	Memory	   *memory = find_memory(pool);
	TimestampTz now = GetCurrentTimestamp();

	if (memory == NULL || memory->row.xmin != pool->stripe_row.xmin ||
		!ItemPointerEquals(&memory->row.tid, &pool->stripe_row.tid) ||
		memory->looked_at == 0 || memory->composition != pool->composition ||
		TimestampDifferenceExceeds(memory->looked_at, now, RECALL_FOR_MS) ||
		!TimestampDifferenceExceeds(now, memory->due, SPARE_LOOKS * RECALL_FOR_MS))
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
	Parameters	parameters = pool_parameters(pool);
	bool		isnull;
	int			stripes;

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
	held_note(pool->account);
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

/* Locks the stripe that is where one was locked before, if one is, and free. */
static bool
lock_same(Pool *pool, const StripeRow *row)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, &row->tid);
	if (statement_execute(&lock_same_statement, &parameters) == 0)
		return false;
	take(pool, 0);
	return true;
}

/* Locks the stripe that the transaction has locked before, if it has. */
static bool
lock_latest(Pool *pool)
{
	return latest_account == hash_text(pool->account) && held_now(pool->account) && lock_same(pool, &latest);
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
		pool->stripe = 0;
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
 *		Locks all stripes of a pool's account, and the account; returns false,
 *		and keeps what it has got, where one of them is locked by others. An
 *		account without stripes it waits for.
 */
bool
stripe_lock_all_if_free(Pool *pool)
{
	Parameters	parameters = {0};
	AccountMarks marks;
	uint64		n = 0;

	parameter_add_pointer(&parameters, pool->account);
	for (int i = 0; i < 2; i++)
	{
		/* once more with the account locked: they may have been made anew before */
		if (i > 0 && !account_lock(pool->account, n > 0 ? ACCOUNT_LOCK_IF_FREE : ACCOUNT_LOCK, &marks) && n > 0)
			return false;
		n = count_all(pool->account);
		if (statement_execute(&lock_all_free_statement, &parameters) != n)
			return false;
	}
	take_one_of_all(pool, n);
	return true;
}

/*
 * Tries to lock something until that succeeds; returns false after half the
 * time in which others would take it for a deadlock. Raises 55P03 where
 * lock_timeout is over before.
 */
static bool
poll(bool (*lock) (Pool *), Pool *pool)
{
	int			limit = Max(DeadlockTimeout / 2, 1);
	bool		is_users = LockTimeout > 0 && LockTimeout < limit;
	TimestampTz end = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), is_users ? LockTimeout : limit);

	while (!lock(pool))
	{
		if (GetCurrentTimestamp() >= end)
		{
			if (is_users)
				could_not_lock(pool->account);
			return false;
		}
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, LOCK_POLL_MS, PG_WAIT_EXTENSION);
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
 *		and no stripe finds none in time; one that has let go of all that it
 *		had waits, unless somebody waits for it for that reason.
 */
bool
stripe_lock_any(Pool *pool)
{
	pool->stripe = 0;
	if (lock_free(pool))
		return true;
	if (!held_ever(pool->account))
		wait_for_one(pool);
	else if (count_all(pool->account) > 0 && !poll(lock_free, pool))
	{
		/* whoever does was to be seen in the time that has passed */
		if (held_now(pool->account) || held_is_waited_for())
			could_not_lock(pool->account);
		wait_for_one(pool);
	}
	return pool->stripe != 0;
}

/* What is to be done with all stripes locked */
typedef struct Work
{
	Pool	   *pool;
	bool		waits;
	bool		(*work) (void *);
	void	   *arg;
} Work;

static bool
do_with_all(void *arg)
{
	Work	   *work = arg;
	Pool	   *pool = work->pool;

	if (work->waits)
	{
		Parameters	parameters = {0};

		parameter_add_pointer(&parameters, pool->account);
		statement_execute(&lock_all_statement, &parameters);
		pool->has_all = stripe_lock_all_if_free(pool);
	}
	else
		pool->has_all = poll(stripe_lock_all_if_free, pool);
	return pool->has_all && (work->work == NULL || work->work(work->arg));
}

static bool
wait_for_account(void *account)
{
	AccountMarks marks;

	if (!account_lock(account, ACCOUNT_LOCK, &marks))
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("account \"%s\" is missing, but not its stripes", text_to_cstring(account)),
				 errhint("See credit_lease.lease_verify(); nothing was changed.")));
	return false;
}

/*
 * stripe_lock_all
 *		Locks all stripes of a pool's account, and the account, and does some
 *		work, NULL for none; returns whether that succeeded, in guard_attempt().
 *		Waits for all, but where the transaction has locked something of the
 *		account before: then pool->has_all is false if it does not get them in
 *		time. pool->stripe is 0 where the pool is not striped.
 */
bool
stripe_lock_all(Pool *pool, bool (*work) (void *), void *arg)
{
	Pool		before = *pool;
	bool		waits = !held_ever(pool->account);
	bool		done;

	for (;;)
	{
		done = guard_attempt(do_with_all, &(Work) {pool, waits, work, arg});
		if (pool->has_all || !waits)
			return done;
		/* stripes were made anew, or somebody has the account, and may need one */
		CHECK_FOR_INTERRUPTS();
		*pool = before;
		guard_attempt(wait_for_account, pool->account);
	}
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

	if (!stripe_lock_all(&pool, NULL, NULL))
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
