/*
 * worker.c
 *		The background worker of one database: gives back what has expired.
 *
 * It calls lease_reclaim() in SQL, in batches that are a short transaction
 * each. An error ends the batch, not the worker: it is logged and shown in
 * worker_status, and the next try comes later and later. Nothing depends on
 * the worker (rule 7); it keeps the tables small and the balances fresh.
 *
 * SIGTERM is die(), which ends it at the next CHECK_FOR_INTERRUPTS() with an
 * exit code that lets the launcher start it again.
 */
#include "postgres.h"

#include <setjmp.h>

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "commands/extension.h"
#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "statement.h"
#include "worker.h"
#include "worker_state.h"

/* How often it looks whether the extension is there; the longest wait after errors. */
#define LOOK_MS			500
#define LONGEST_WAIT_MS	60000

static char *role;
static int	sweep_interval;
static int	sweep_batch;
static uint32 wait_event;

static Statement sweep_statement = {
	.sql = "SELECT credit_lease.lease_reclaim($1)",
	.nargs = 1,
	.argtypes = {INT4OID}
};

PGDLLEXPORT void worker_main(Datum arg);

void
worker_define_settings(void)
{
	DefineCustomStringVariable("credit_lease.role",
							   "Sets the role that the workers run as.",
							   "Empty for the superuser that the cluster was made with.",
							   &role,
							   "",
							   PGC_SIGHUP,
							   0,
							   NULL, NULL, NULL);
	DefineCustomIntVariable("credit_lease.sweep_interval",
							"Sets how often a worker looks for what has expired.",
							NULL,
							&sweep_interval,
							1000, 10, 3600 * 1000,
							PGC_SIGHUP,
							GUC_UNIT_MS,
							NULL, NULL, NULL);
	DefineCustomIntVariable("credit_lease.sweep_batch",
							"Sets how many expired holds a worker gives back in one transaction.",
							NULL,
							&sweep_batch,
							200, 1, 100000,
							PGC_SIGHUP,
							0,
							NULL, NULL, NULL);
}

static bool
is_installed(void)
{
	bool		installed;

	StartTransactionCommand();
	installed = OidIsValid(get_extension_oid("credit_lease", true));
	CommitTransactionCommand();
	return installed;
}

/* Sweeps a batch in a transaction of its own; returns how many holds it gave back. */
static int64
sweep(void)
{
	Parameters	parameters = {0};
	bool		isnull;
	int64		holds;

	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	pgstat_report_activity(STATE_RUNNING, "giving back what has expired");
	statement_begin();
	parameter_add(&parameters, Int32GetDatum(sweep_batch));
	PushActiveSnapshot(GetTransactionSnapshot());
	statement_execute(&sweep_statement, &parameters);
	holds = DatumGetInt64(statement_value(0, 1, &isnull));
	PopActiveSnapshot();
	SPI_finish();
	CommitTransactionCommand();
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);
	return holds;
}

static void
reload(void)
{
	char	   *old_role = MemoryContextStrdup(TopMemoryContext, role);

	ConfigReloadPending = false;
	ProcessConfigFile(PGC_SIGHUP);
	if (strcmp(role, old_role) != 0)
		proc_exit(1);			/* the launcher starts another one */
	pfree(old_role);
}

/* Waits, for at most so many milliseconds, and does what was asked for meanwhile. */
static void
pause_for(int milliseconds)
{
	WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, milliseconds,
			  wait_event);
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
		reload();
}

/* Ends what an error has interrupted, and tells of it. */
static void
recover(int slot, MemoryContext context)
{
	ErrorData  *error;

	error_context_stack = NULL;
	HOLD_INTERRUPTS();
	EmitErrorReport();
	MemoryContextSwitchTo(context);
	error = CopyErrorData();
	worker_state_failed(slot, error->message);
	AbortCurrentTransaction();
	FlushErrorState();
	pgstat_report_activity(STATE_IDLE, NULL);
	RESUME_INTERRUPTS();
}

void
worker_main(Datum arg)
{
	int			slot = DatumGetInt32(arg);
	volatile int failures = 0;
	MemoryContext loop;
	sigjmp_buf	failed;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	wait_event = WaitEventExtensionNew("CreditLeaseWorker");
	BackgroundWorkerInitializeConnection(worker_state_database(slot), role[0] ? role : NULL, 0);
	worker_state_started(slot);
	loop = AllocSetContextCreate(TopMemoryContext, "credit_lease worker", ALLOCSET_DEFAULT_SIZES);

	if (sigsetjmp(failed, 1) != 0)
	{
		recover(slot, loop);
		failures = Min(failures + 1, 7);
	}
	PG_exception_stack = &failed;

	for (;;)
	{
		int64		holds = 0;
		bool		installed;

		MemoryContextSwitchTo(loop);
		MemoryContextReset(loop);
		if (failures > 0)
			pause_for(Min(500 << failures, LONGEST_WAIT_MS));

		installed = is_installed();
		if (installed)
		{
			holds = sweep();
			worker_state_swept(slot, holds);
		}
		failures = 0;
		if (!installed)
			pause_for(LOOK_MS);
		else
			pause_for(holds < sweep_batch ? sweep_interval : 0);
	}
}
