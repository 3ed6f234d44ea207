/*
 * worker_state.c
 *		What the workers tell of themselves, in shared memory: one slot for
 *		each database that has or had one.
 *
 * It is there only where the library is preloaded, and it only informs: nothing
 * that matters is lost with it.
 *
 * Locks: the named LWLock credit_lease, for an instant, within which nothing
 * is allocated and nothing can fail.
 */
#include "postgres.h"

#include <signal.h>

#include "commands/dbcommands.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/timestamp.h"
#include "utils/varlena.h"

#include "compat.h"
#include "shared_memory.h"
#include "worker_state.h"

/* How long a worker keeps away from a database that is about to be dropped. */
#define HOLD_OFF_MS		10000

typedef struct WorkerSlot
{
	NameData	database;		/* empty for a free slot */
	pid_t		pid;			/* 0 while no worker runs */
	Oid			oid;			/* of the database, while a worker runs */
	int			procno;			/* of the worker */
	int			wake_for;		/* what was asked for since the worker last looked */
	TimestampTz held_off_until;
	TimestampTz started_at;
	TimestampTz swept_at;		/* 0 for never */
	int64		holds;			/* given back since it started */
	TimestampTz failed_at;		/* 0 for never */
	char		error[256];
} WorkerSlot;

static WorkerSlot *slots = NULL;
static LWLock *lock;
static char *databases;

static Size
size(void)
{
	return sizeof(WorkerSlot) * WORKER_SLOTS;
}

/* Asks for the shared memory; to be called while the library is preloaded. */
void
worker_state_request(void)
{
	shared_memory_request("credit_lease", size, (void **) &slots, &lock);
}

/* Returns the names in a list of databases; false where it is none, or too long. */
static bool
parse_databases(const char *value, List **names)
{
	return SplitIdentifierString(pstrdup(value), ',', names) && list_length(*names) <= WORKER_SLOTS;
}

static bool
check_databases(char **newval, void **extra, GucSource source)
{
	List	   *names;

	if (parse_databases(*newval, &names))
		return true;
	GUC_check_errdetail("It must be a list of at most %d names of databases.", WORKER_SLOTS);
	return false;
}

void
worker_state_define_settings(void)
{
	DefineCustomStringVariable("credit_lease.databases",
							   "Lists the databases that have a worker.",
							   NULL,
							   &databases,
							   "postgres",
							   PGC_SIGHUP,
							   GUC_LIST_INPUT,
							   check_databases,
							   NULL,
							   NULL);
}

/* Returns the names of the databases that are to have a worker. */
List *
worker_state_databases(void)
{
	List	   *names;

	return parse_databases(databases, &names) ? names : NIL;
}

/* Returns the slot of a database, NULL for none. The lock is held. */
static WorkerSlot *
find(const char *database)
{
	for (int i = 0; i < WORKER_SLOTS; i++)
	{
		if (strncmp(NameStr(slots[i].database), database, NAMEDATALEN - 1) == 0)
			return &slots[i];
	}
	return NULL;
}

/*
 * worker_state_claim
 *		Returns the number of a database's slot, which is made if there is none;
 *		-1 where all are in use.
 */
int
worker_state_claim(const char *database)
{
	WorkerSlot *slot;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = find(database);
	if (slot == NULL && (slot = find("")) != NULL)
		namestrcpy(&slot->database, database);
	LWLockRelease(lock);
	return slot ? (int) (slot - slots) : -1;
}

/* Returns the name of a slot's database, which never changes. */
const char *
worker_state_database(int slot)
{
	return NameStr(slots[slot].database);
}

/* Returns whether a database is to be left alone for a while. */
bool
worker_state_is_held_off(const char *database)
{
	WorkerSlot *slot;
	bool		held_off;

	LWLockAcquire(lock, LW_SHARED);
	slot = find(database);
	held_off = slot && slot->held_off_until > GetCurrentTimestamp();
	LWLockRelease(lock);
	return held_off;
}

/*
 * worker_state_make_leave
 *		Ends the worker of a database, if it has one, and keeps it away for ten
 *		seconds. Does not wait for it.
 */
void
worker_state_make_leave(const char *database)
{
	WorkerSlot *slot;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = find(database);
	if (slot)
	{
		slot->held_off_until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), HOLD_OFF_MS);
		if (slot->pid != 0)
			kill(slot->pid, SIGTERM);
	}
	LWLockRelease(lock);
}

static void
worker_exit(int code, Datum slot)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	slots[DatumGetInt32(slot)].pid = 0;
	LWLockRelease(lock);
}

/*
 * worker_state_started
 *		Notes that this process is the worker of a slot, until it ends; returns
 *		false where another one still is.
 */
bool
worker_state_started(int slot)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	if (slots[slot].pid != 0)
	{
		LWLockRelease(lock);
		return false;
	}
	slots[slot].pid = MyProcPid;
	slots[slot].oid = MyDatabaseId;
	slots[slot].procno = MyProc - ProcGlobal->allProcs;
	slots[slot].wake_for = WAKE_FOR_LEASES | WAKE_FOR_POLICIES;
	slots[slot].started_at = GetCurrentTimestamp();
	slots[slot].swept_at = 0;
	slots[slot].holds = 0;
	LWLockRelease(lock);
	before_shmem_exit(worker_exit, Int32GetDatum(slot));
	return true;
}

/*
 * worker_state_wake
 *		Wakes the worker of this database, for the reasons that are given as
 *		bits, and returns whether there is one. Reads no catalog, so that it
 *		can be called when a transaction has ended.
 */
bool
worker_state_wake(int wake_for)
{
	int			procno = -1;

	if (slots == NULL)
		return false;
	LWLockAcquire(lock, LW_EXCLUSIVE);
	for (int i = 0; i < WORKER_SLOTS; i++)
	{
		if (slots[i].pid == 0 || slots[i].oid != MyDatabaseId)
			continue;
		procno = slots[i].procno;
		slots[i].wake_for |= wake_for;
	}
	LWLockRelease(lock);
	if (procno >= 0)
		SetLatch(&ProcGlobal->allProcs[procno].procLatch);
	return procno >= 0;
}

/* Returns what the worker was woken for since the last time. */
int
worker_state_woken_for(int slot)
{
	int			wake_for;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	wake_for = slots[slot].wake_for;
	slots[slot].wake_for = 0;
	LWLockRelease(lock);
	return wake_for;
}

/* Notes a sweep and how many holds it gave back. */
void
worker_state_swept(int slot, int64 holds)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	slots[slot].swept_at = GetCurrentTimestamp();
	slots[slot].holds += holds;
	LWLockRelease(lock);
}

/* Notes an error. */
void
worker_state_failed(int slot, const char *message)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	slots[slot].failed_at = GetCurrentTimestamp();
	shared_memory_keep_text(slots[slot].error, sizeof(slots[slot].error), message);
	LWLockRelease(lock);
}

/*
 * lease_worker() -> running, state, pid, started_at, last_sweep, holds,
 *		last_error_at, last_error
 *		What the worker of this database tells, or why there is none.
 */
PG_FUNCTION_INFO_V1(lease_worker);
Datum
lease_worker(PG_FUNCTION_ARGS)
{
	WorkerSlot	copy = {0};
	char	   *database = get_database_name(MyDatabaseId);
	bool		listed = false;
	const char *state;
	TupleDesc	tupdesc;
	Datum		values[8];
	bool		nulls[8] = {false};
	ListCell   *cell;

	foreach(cell, worker_state_databases())
		listed |= strcmp(lfirst(cell), database) == 0;
	if (slots)
	{
		WorkerSlot *slot;

		LWLockAcquire(lock, LW_SHARED);
		slot = find(database);
		if (slot)
			copy = *slot;
		LWLockRelease(lock);
	}

	if (slots == NULL)
		state = "no worker: credit_lease is not in shared_preload_libraries";
	else if (copy.pid != 0)
		state = "running";
	else if (!listed)
		state = "no worker: the database is not in credit_lease.databases";
	else
		state = "no worker: it has not started yet, or has failed; see the server's log";

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	values[0] = BoolGetDatum(copy.pid != 0);
	values[1] = CStringGetTextDatum(state);
	values[2] = Int32GetDatum(copy.pid);
	nulls[2] = nulls[3] = copy.pid == 0;
	values[3] = TimestampTzGetDatum(copy.started_at);
	values[4] = TimestampTzGetDatum(copy.swept_at);
	nulls[4] = copy.swept_at == 0;
	values[5] = Int64GetDatum(copy.holds);
	values[6] = TimestampTzGetDatum(copy.failed_at);
	values[7] = CStringGetTextDatum(copy.error);
	nulls[6] = nulls[7] = copy.failed_at == 0;
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(tupdesc), values, nulls)));
}
