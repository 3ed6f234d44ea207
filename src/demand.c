/*
 * demand.c
 *		How a session that is short of credit waits for the worker.
 *
 * Every session has one place in shared memory, in which it says what it waits
 * for; the worker of its database reads all of them, and answers there. What
 * is said is a hint: the worker looks into the tables for what to do, and the
 * session, once answered, for what there is. Lost with the memory, it costs a
 * wait that ends by time.
 *
 * What is not answered in time stays there until it is, or until the session
 * waits again: what comes late serves the next call.
 *
 * What a transaction leaves to be done by the worker, because a lease is
 * running low or a policy has changed, is told when it commits.
 *
 * Locks: the named LWLock credit_lease_demand, for an instant, within which
 * nothing is allocated and nothing can fail.
 */
#include "postgres.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "demand.h"
#include "shared_memory.h"
#include "worker_state.h"

#define LOCK_NAME	"credit_lease_demand"

/* An amount as text: no more digits than an amount may have, a sign and a point. */
#define MAX_AMOUNT	64

/* A worker that is longer at one thing is not waited for. */
#define LONGEST_NOTICE_MS	1000

typedef struct Place
{
	Oid			database;		/* of the session; InvalidOid while none has waited */
	bool		seen;			/* the worker knows */
	bool		is_short;		/* the upstream was asked, and has too little so far */
	TimestampTz until;			/* how long the session waits */
	DemandAnswer answer;
	char		account[DEMAND_MAX_NAME + 1];
	char		credit[DEMAND_MAX_NAME + 1];
	char		amount[MAX_AMOUNT];
	char		error[DEMAND_MAX_ERROR];
} Place;

static Place *places = NULL;	/* one for each process that can be connected */
static LWLock *lock;

/* What the transaction leaves to the worker */
static int	wake_for = 0;

static Size
size(void)
{
	return mul_size(sizeof(Place), MaxBackends);
}

/* Asks for the shared memory; to be called while the library is preloaded. */
void
demand_request(void)
{
	shared_memory_request(LOCK_NAME, size, (void **) &places, &lock);
}

static Place *
my_place(void)
{
	return &places[MyProc - ProcGlobal->allProcs];
}

/*
 * Waits for the answer, which stays DEMAND_PENDING if there is none in time,
 * but DEMAND_REFUSED if all that was said is that there is too little; or only
 * until the worker knows.
 */
static DemandAnswer
wait_for_answer(TimestampTz until, bool until_seen, char *error)
{
	Place	   *place = my_place();
	uint32		wait_event = WaitEventExtensionNew("CreditLeaseSupply");

	for (;;)
	{
		DemandAnswer answer;
		bool		seen;
		long		milliseconds;

		LWLockAcquire(lock, LW_SHARED);
		answer = place->answer;
		seen = place->seen;
		if (answer == DEMAND_PENDING && place->is_short && until <= GetCurrentTimestamp())
			answer = DEMAND_REFUSED;
		strlcpy(error, place->error, DEMAND_MAX_ERROR);
		LWLockRelease(lock);
		milliseconds = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), until);
		if (answer != DEMAND_PENDING || (until_seen && seen) || milliseconds <= 0)
			return answer;

		WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, milliseconds, wait_event);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

/* Tells the worker what this session waits for; returns whether there is one. */
static bool
post(const char *account, const char *credit, Numeric amount, TimestampTz until)
{
	char	   *digits = DatumGetCString(DirectFunctionCall1(numeric_out, NumericGetDatum(amount)));
	Place	   *place;

	if (places == NULL || !worker_state_wake(0))
		return false;

	place = my_place();
	LWLockAcquire(lock, LW_EXCLUSIVE);
	place->database = MyDatabaseId;
	place->seen = place->is_short = false;
	place->until = until;
	place->answer = DEMAND_PENDING;
	place->error[0] = '\0';
	strlcpy(place->account, account, sizeof(place->account));
	strlcpy(place->credit, credit, sizeof(place->credit));
	strlcpy(place->amount, digits, sizeof(place->amount));
	LWLockRelease(lock);
	return worker_state_wake(0);
}

/*
 * demand_wait
 *		Asks the worker for an amount to be available in a pool and waits for
 *		its answer, at most until an instant of the server's clock. Returns
 *		DEMAND_PENDING where there was none in time, DEMAND_UNREACHABLE where
 *		no worker runs. *error, of DEMAND_MAX_ERROR bytes, is set to why there
 *		is no supply, or empty. Holds no lock while it waits.
 */
DemandAnswer
demand_wait(const char *account, const char *credit, Numeric amount, TimestampTz until, char *error)
{
	if (!post(account, credit, amount, until))
	{
		strlcpy(error, "no worker runs in this database", DEMAND_MAX_ERROR);
		return DEMAND_UNREACHABLE;
	}
	return wait_for_answer(until, false, error);
}

/*
 * demand_ask
 *		Does not wait for the answer, but until the worker knows of the demand,
 *		so that the session can make another one; that takes it no longer than
 *		what it is doing.
 */
void
demand_ask(const char *account, const char *credit, Numeric amount, TimestampTz until)
{
	char		error[DEMAND_MAX_ERROR];

	if (post(account, credit, amount, until))
		wait_for_answer(TimestampTzPlusMilliseconds(GetCurrentTimestamp(), LONGEST_NOTICE_MS),
						true, error);
}

static void
at_end(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT && wake_for != 0)
		worker_state_wake(wake_for);
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE)
		wake_for = 0;
}

/* Wakes the worker when the transaction commits, for WAKE_FOR_... */
void
demand_at_commit(int reason)
{
	static bool registered = false;

	if (!registered)
		RegisterXactCallback(at_end, NULL);
	registered = true;
	wake_for |= reason;
}

/*
 * demand_collect
 *		Returns what sessions of this database wait for, as a list of Demand.
 */
List *
demand_collect(void)
{
	List	   *demands = NIL;
	Place	   *copy = palloc(sizeof(Place));

	for (int i = 0; i < MaxBackends; i++)
	{
		Demand	   *demand;

		/* a glance without the lock: who has just come wakes the worker after it */
		if (places[i].database != MyDatabaseId)
			continue;
		LWLockAcquire(lock, LW_EXCLUSIVE);
		*copy = places[i];
		places[i].seen = true;
		LWLockRelease(lock);
		if (copy->database != MyDatabaseId || copy->answer != DEMAND_PENDING)
			continue;
		if (!copy->seen)
			SetLatch(&ProcGlobal->allProcs[i].procLatch);

		demand = palloc(sizeof(Demand));
		demand->account = pstrdup(copy->account);
		demand->credit = pstrdup(copy->credit);
		demand->amount = DatumGetNumeric(DirectFunctionCall3(numeric_in,
															 CStringGetDatum(copy->amount),
															 ObjectIdGetDatum(InvalidOid),
															 Int32GetDatum(-1)));
		demand->until = copy->until;
		demands = lappend(demands, demand);
	}
	pfree(copy);
	return demands;
}

/* Answers every session of this database that waits for a pool; error may be NULL. */
void
demand_answer(const char *account, const char *credit, DemandAnswer answer, const char *error)
{
	for (int i = 0; i < MaxBackends; i++)
	{
		Place	   *place = &places[i];
		bool		mine;

		if (place->database != MyDatabaseId)
			continue;
		LWLockAcquire(lock, LW_EXCLUSIVE);
		mine = place->database == MyDatabaseId && place->answer == DEMAND_PENDING &&
			strcmp(place->account, account) == 0 && strcmp(place->credit, credit) == 0;
		if (mine)
		{
			place->answer = answer;
			shared_memory_keep_text(place->error, sizeof(place->error), error ? error : "");
		}
		LWLockRelease(lock);
		if (mine)
			SetLatch(&ProcGlobal->allProcs[i].procLatch);
	}
}

/*
 * demand_hint_short
 *		Lets every session of this database that waits for a pool know that the
 *		upstream has too little so far. It goes on waiting, as somebody may top
 *		up there.
 */
void
demand_hint_short(const char *account, const char *credit)
{
	for (int i = 0; i < MaxBackends; i++)
	{
		Place	   *place = &places[i];

		if (place->database != MyDatabaseId)
			continue;
		LWLockAcquire(lock, LW_EXCLUSIVE);
		if (place->database == MyDatabaseId && place->answer == DEMAND_PENDING &&
			strcmp(place->account, account) == 0 && strcmp(place->credit, credit) == 0)
			place->is_short = true;
		LWLockRelease(lock);
	}
}
