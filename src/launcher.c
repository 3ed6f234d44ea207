/*
 * launcher.c
 *		Keeps one worker running in each database of credit_lease.databases.
 *
 * The launcher is a background worker that is connected to no database. A
 * worker that ends is started again, later and later if it keeps failing. One
 * for a database that is not there is not started, so that the log stays quiet
 * until somebody creates it.
 *
 * A worker is a connection, which would keep its database from being dropped:
 * where that is asked for, the worker leaves first.
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "commands/dbcommands.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "launcher.h"
#include "worker_state.h"

/* How often it looks whether a database has come, or may be entered again. */
#define LOOK_MS			500

/* A worker that has lived as long as this is started again at once. */
#define HEALTHY_MS		10000
#define LONGEST_WAIT_MS	60000

/* What the launcher knows of the worker in a slot. */
typedef struct Child
{
	BackgroundWorkerHandle *handle; /* NULL while there is none */
	TimestampTz started_at;
	TimestampTz next_start;
	int			wait_ms;
} Child;

static Child children[WORKER_SLOTS];

static ProcessUtility_hook_type previous_utility = NULL;

PGDLLEXPORT void launcher_main(Datum arg);

static void
start_worker(int slot, Child *child)
{
	BackgroundWorker worker = {
		.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION,
		.bgw_start_time = BgWorkerStart_RecoveryFinished,
		.bgw_restart_time = BGW_NEVER_RESTART,
		.bgw_main_arg = Int32GetDatum(slot),
		.bgw_notify_pid = MyProcPid
	};

	snprintf(worker.bgw_name, BGW_MAXLEN, "credit_lease worker for database \"%s\"",
			 worker_state_database(slot));
	strlcpy(worker.bgw_type, "credit_lease worker", BGW_MAXLEN);
	strlcpy(worker.bgw_library_name, "credit_lease", BGW_MAXLEN);
	strlcpy(worker.bgw_function_name, "worker_main", BGW_MAXLEN);

	child->started_at = GetCurrentTimestamp();
	child->wait_ms = Min(Max(child->wait_ms * 2, LOOK_MS), LONGEST_WAIT_MS);
	child->next_start = TimestampTzPlusMilliseconds(child->started_at, child->wait_ms);
	MemoryContextSwitchTo(TopMemoryContext);	/* where the handle is to live */
	if (!RegisterDynamicBackgroundWorker(&worker, &child->handle))
	{
		child->handle = NULL;
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("could not start the credit_lease worker for database \"%s\"",
						worker_state_database(slot)),
				 errhint("You might need to increase max_worker_processes.")));
	}
}

/* Forgets a worker that has ended, and lets the next one wait, or not. */
static void
look_after(Child *child)
{
	TimestampTz now = GetCurrentTimestamp();
	pid_t		pid;

	if (child->handle == NULL || GetBackgroundWorkerPid(child->handle, &pid) != BGWH_STOPPED)
		return;
	pfree(child->handle);
	child->handle = NULL;
	if (TimestampDifferenceExceeds(child->started_at, now, HEALTHY_MS))
		child->wait_ms = 0;
	child->next_start = TimestampTzPlusMilliseconds(now, child->wait_ms);
}

/* Without a database of its own, this process can read no index. */
static bool
database_exists(const char *database)
{
	Relation	relation;
	TableScanDesc scan;
	HeapTuple	tuple;
	bool		exists = false;

	StartTransactionCommand();
	GetTransactionSnapshot();
	relation = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(relation, 0, NULL);
	while (!exists && (tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
		exists = strcmp(NameStr(((Form_pg_database) GETSTRUCT(tuple))->datname), database) == 0;
	table_endscan(scan);
	table_close(relation, AccessShareLock);
	CommitTransactionCommand();
	return exists;
}

/* Starts what is missing and ends what is not wanted any more. */
static void
launch(void)
{
	bool		wanted[WORKER_SLOTS] = {false};
	TimestampTz now = GetCurrentTimestamp();
	ListCell   *cell;

	foreach(cell, worker_state_databases())
	{
		const char *database = lfirst(cell);
		int			slot = worker_state_claim(database);

		if (slot < 0)
			continue;			/* others were listed before, until the next restart */
		wanted[slot] = true;
		if (children[slot].handle == NULL && children[slot].next_start <= now &&
			!worker_state_is_held_off(database) && database_exists(database))
			start_worker(slot, &children[slot]);
	}
	for (int i = 0; i < WORKER_SLOTS; i++)
	{
		if (!wanted[i] && children[i].handle)
			TerminateBackgroundWorker(children[i].handle);
	}
}

/* Nobody knows the workers of a launcher that has ended. */
static void
end_workers(int code, Datum arg)
{
	for (int i = 0; i < WORKER_SLOTS; i++)
	{
		if (children[i].handle)
			TerminateBackgroundWorker(children[i].handle);
	}
}

void
launcher_main(Datum arg)
{
	uint32		wait_event = WaitEventExtensionNew("CreditLeaseLauncher");
	MemoryContext loop = AllocSetContextCreate(TopMemoryContext, "credit_lease launcher",
											   ALLOCSET_DEFAULT_SIZES);

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	before_shmem_exit(end_workers, 0);

	for (;;)
	{
		for (int i = 0; i < WORKER_SLOTS; i++)
			look_after(&children[i]);
		MemoryContextSwitchTo(loop);
		launch();
		MemoryContextReset(loop);

		WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, LOOK_MS, wait_event);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
		}
	}
}

/* Returns the database that a command needs for itself, NULL for none. */
static const char *
database_that_must_be_free(Node *statement)
{
	if (IsA(statement, DropdbStmt))
		return castNode(DropdbStmt, statement)->dbname;
	if (IsA(statement, RenameStmt) && castNode(RenameStmt, statement)->renameType == OBJECT_DATABASE)
		return castNode(RenameStmt, statement)->subname;
	return NULL;
}

/* The server itself gives a connection five seconds to leave. */
static void
utility(PlannedStmt *pstmt, const char *queryString, bool readOnlyTree,
		ProcessUtilityContext context, ParamListInfo params,
		QueryEnvironment *queryEnv, DestReceiver *dest, QueryCompletion *qc)
{
	const char *database = database_that_must_be_free(pstmt->utilityStmt);
	Oid			oid = database ? get_database_oid(database, true) : InvalidOid;

	if (OidIsValid(oid) && object_ownercheck(DatabaseRelationId, oid, GetUserId()))
		worker_state_make_leave(database);

	if (previous_utility)
		previous_utility(pstmt, queryString, readOnlyTree, context, params, queryEnv, dest, qc);
	else
		standard_ProcessUtility(pstmt, queryString, readOnlyTree, context, params, queryEnv, dest, qc);
}

/* Registers the launcher; to be called while the library is preloaded. */
void
launcher_register(void)
{
	BackgroundWorker launcher = {
		.bgw_name = "credit_lease launcher",
		.bgw_type = "credit_lease launcher",
		.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION,
		.bgw_start_time = BgWorkerStart_RecoveryFinished,
		.bgw_restart_time = 1,
		.bgw_library_name = "credit_lease",
		.bgw_function_name = "launcher_main"
	};

	RegisterBackgroundWorker(&launcher);
	previous_utility = ProcessUtility_hook;
	ProcessUtility_hook = utility;
}
