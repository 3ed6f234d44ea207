/*
 * worker.c
 *		The background worker of one database: gives back what has expired,
 *		leases what is needed, reports what was used.
 *
 * It goes round: sweeps when it is time to, in batches; takes in what
 * upstreams have answered; looks what is to be asked and reported; sends it,
 * after that has been committed; and waits for its latch, the upstreams and
 * the time. Every step is a short transaction of its own, and none is open
 * while anything is waited for (rule 12).
 *
 * An error ends the step, not the worker: it is logged and shown in
 * worker_status, and the next try comes later and later. Nothing depends on
 * the worker but the supply from upstreams (rule 7).
 *
 * What it does with the extension's tables it does as the extension's owner,
 * as the SQL functions do; so its role needs no rights but to call
 * lease_reclaim(), and USAGE of the servers with a user mapping.
 *
 * SIGTERM is die(), which ends it at the next CHECK_FOR_INTERRUPTS() with an
 * exit code that lets the launcher start it again.
 */
#include "postgres.h"

#include <setjmp.h>

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "catalog/namespace.h"
#include "catalog/pg_namespace.h"
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
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "exchange.h"
#include "leasing.h"
#include "reclaim.h"
#include "report.h"
#include "restripe.h"
#include "statement.h"
#include "upstream_state.h"
#include "worker.h"
#include "worker_state.h"

/* How often it looks whether the extension is there; the longest wait after errors. */
#define LOOK_MS			500
#define LONGEST_WAIT_MS	60000

/*
 * What must not depend on the defaults of a database or a role. No lock is
 * waited for long: somebody's transaction must not stop the worker. What is
 * told to upstreams must be on disk, whatever the transactions that it is
 * about have asked for (rule 9).
 */
static const char *const own_settings[][2] = {
	{"search_path", "pg_catalog, pg_temp"},
	{"synchronous_commit", "on"},
	{"default_transaction_isolation", "read committed"},
	{"default_transaction_read_only", "off"},
	{"statement_timeout", "0"},
	{"lock_timeout", "100ms"},
	{"jit", "off"}
};

/* Leases and reports are looked at as often at least, however seldom it sweeps. */
#define LONGEST_LOOK_MS	1000

/* An answer for an account that is locked is tried again after that. */
#define TAKE_AGAIN_MS	10

static char *role;
static int	sweep_interval;
static int	sweep_batch;
static int	connect_timeout;
static int	request_timeout;
static int	max_requests;
static uint32 wait_event;

/* What is under way, and what was answered and is not taken in yet; of Exchange */
static List *exchanges = NIL;
static List *answered = NIL;

/* How pools are to be striped may have changed. */
static bool policies_changed = true;

/* The options of a server or of a user mapping have changed, or the settings have. */
static bool upstreams_changed = false;
static bool settings_changed = false;

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
	DefineCustomIntVariable("credit_lease.connect_timeout",
							"Sets how long a worker waits for a connection to an upstream.",
							NULL,
							&connect_timeout,
							2000, 1, 600 * 1000,
							PGC_SIGHUP,
							GUC_UNIT_MS,
							NULL, NULL, NULL);
	DefineCustomIntVariable("credit_lease.request_timeout",
							"Sets how long a worker waits for the answer of an upstream, the connection included.",
							NULL,
							&request_timeout,
							5000, 1, 600 * 1000,
							PGC_SIGHUP,
							GUC_UNIT_MS,
							NULL, NULL, NULL);
	DefineCustomIntVariable("credit_lease.max_requests",
							"Sets how many requests to upstreams a worker has under way at a time.",
							NULL,
							&max_requests,
							32, 1, 200,
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

/* Begins a step; the activity is what pg_stat_activity shows. */
static void
begin_step(const char *activity)
{
	SetCurrentStatementStartTimestamp();
	pgstat_report_activity(STATE_RUNNING, activity);
	StartTransactionCommand();
	statement_begin();
	PushActiveSnapshot(GetTransactionSnapshot());
}

static void
end_step(void)
{
	PopActiveSnapshot();
	SPI_finish();
	CommitTransactionCommand();
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/* Sweeps a batch; returns how many holds it gave back. */
static int64
sweep(void)
{
	Parameters	parameters = {0};
	bool		isnull;
	int64		holds;

	begin_step("giving back what has expired");
	parameter_add(&parameters, Int32GetDatum(sweep_batch));
	statement_execute(&sweep_statement, &parameters);
	holds = DatumGetInt64(statement_value(0, 1, &isnull));
	end_step();
	return holds;
}

/* Takes the extension owner's rights until the end of the step, or of what fails. */
static Oid
become_owner(int *security)
{
	Oid			user;
	Oid			schema = get_namespace_oid("credit_lease", false);
	HeapTuple	tuple = SearchSysCache1(NAMESPACEOID, ObjectIdGetDatum(schema));

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for schema %u", schema);
	GetUserIdAndSecContext(&user, security);
	SetUserIdAndSecContext(((Form_pg_namespace) GETSTRUCT(tuple))->nspowner,
						   *security | SECURITY_LOCAL_USERID_CHANGE);
	ReleaseSysCache(tuple);
	return user;
}

/* Tidies the striped pools that need it, each in a transaction of its own. */
static void
tidy(MemoryContext context)
{
	List	   *pools;
	ListCell   *cell;
	int			security;
	Oid			user;

	begin_step("looking for stripes to tidy");
	user = become_owner(&security);
	pools = restripe_candidates(context, policies_changed);
	SetUserIdAndSecContext(user, security);
	end_step();
	policies_changed = false;

	foreach(cell, pools)
	{
		Pool	   *pool = lfirst(cell);

		begin_step("tidying stripes");
		user = become_owner(&security);
		if (!reclaim_tidy(pool->account, pool->credit))
			policies_changed = true;
		SetUserIdAndSecContext(user, security);
		end_step();
	}
}

/* Takes in what upstreams have answered; one whose account is locked stays. */
static void
take_answers(void)
{
	Exchange   *exchange;
	ListCell   *cell;

	if (http_in_flight() > 0)
	{
		begin_step("reading answers of upstreams");
		while ((exchange = exchange_next()) != NULL)
		{
			MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

			answered = lappend(answered, exchange);
			MemoryContextSwitchTo(old);
		}
		end_step();
	}

	foreach(cell, answered)
	{
		bool		taken = true;
		int			security;
		Oid			user;

		exchange = lfirst(cell);
		begin_step("taking in the answer of an upstream");
		user = become_owner(&security);
		if (exchange->nreports > 0)
			report_take(exchange);
		else
			taken = leasing_take(exchange);
		SetUserIdAndSecContext(user, security);
		end_step();
		if (!taken)
			continue;
		answered = foreach_delete_current(answered, cell);
		exchanges = list_delete_ptr(exchanges, exchange);
		exchange_end(exchange);
	}
}

/*
 * Finds what is to be asked and reported, and sends it after that has been
 * committed; looks through all leases and policies only if it is time to, or
 * if it was woken to. Whether there may be more to collect is the result.
 */
static bool
ask(int slot, bool look, bool collect, TimestampTz *next_due)
{
	List	   *prepared;
	ListCell   *cell;
	int			woken_for = worker_state_woken_for(slot);
	bool		more = false;
	int			security;
	Oid			user;

	begin_step("looking what to ask of upstreams");
	user = become_owner(&security);
	if (upstreams_changed)
	{
		upstream_state_try_again();
		leasing_try_again();
		upstreams_changed = false;
	}
	policies_changed |= (woken_for & WAKE_FOR_POLICIES) != 0;
	if (look || (woken_for & WAKE_FOR_POLICIES))
		leasing_clean(woken_for & WAKE_FOR_POLICIES);
	if (look || (woken_for & WAKE_FOR_LEASES))
		leasing_look();
	leasing_meet_demand(exchanges, next_due);
	if (collect)
		more = report_collect();
	SetUserIdAndSecContext(user, security);
	end_step();

	begin_step("asking upstreams");
	user = become_owner(&security);
	prepared = leasing_prepare(exchanges, max_requests - http_in_flight(), (max_requests + 1) / 2, next_due);
	prepared = list_concat(prepared,
						   report_prepare(exchanges, max_requests - http_in_flight() - list_length(prepared),
										  next_due));
	MemoryContextSwitchTo(TopMemoryContext);
	exchanges = list_concat(exchanges, prepared);
	SetUserIdAndSecContext(user, security);
	end_step();

	foreach(cell, exchanges)
	{
		Exchange   *exchange = lfirst(cell);

		if (exchange->sent_at == 0)
			exchange_send(exchange, connect_timeout, request_timeout);
	}
	return more;
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
pause_for(long milliseconds)
{
	http_wait(milliseconds, wait_event);
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		reload();
		upstreams_changed = settings_changed = true;
	}
}

/* Waits for all of that time, whoever wakes the worker. */
static void
pause_through(long milliseconds)
{
	TimestampTz end = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), milliseconds);

	while ((milliseconds = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), end)) > 0)
		pause_for(milliseconds);
}

static void
note_upstreams_changed(Datum arg, int cache, uint32 hash)
{
	upstreams_changed = true;
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
	AbortOutOfAnyTransaction();
	FlushErrorState();
	worker_state_failed(slot, error->message);

	/* what it was woken for may not have been done */
	worker_state_wake(WAKE_FOR_LEASES | WAKE_FOR_POLICIES);
	policies_changed = true;

	/* what is under way is in the tables, and is asked again */
	exchange_forget_all();
	list_free(exchanges);
	list_free(answered);
	exchanges = answered = NIL;
	pgstat_report_activity(STATE_IDLE, NULL);
	RESUME_INTERRUPTS();
}

void
worker_main(Datum arg)
{
	int			slot = DatumGetInt32(arg);
	volatile int failures = 0;
	volatile TimestampTz next_sweep = 0;
	volatile TimestampTz next_look = 0;
	volatile bool collect = false;
	MemoryContext loop;
	sigjmp_buf	failed;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	wait_event = WaitEventExtensionNew("CreditLeaseWorker");
	BackgroundWorkerInitializeConnection(worker_state_database(slot), role[0] ? role : NULL, 0);
	if (!worker_state_started(slot))
		proc_exit(0);			/* of a launcher that has ended; the new one tries again */
	for (int i = 0; i < (int) lengthof(own_settings); i++)
		SetConfigOption(own_settings[i][0], own_settings[i][1], PGC_USERSET, PGC_S_OVERRIDE);
	http_begin();
	upstream_state_clear();
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, note_upstreams_changed, (Datum) 0);
	CacheRegisterSyscacheCallback(USERMAPPINGOID, note_upstreams_changed, (Datum) 0);
	loop = AllocSetContextCreate(TopMemoryContext, "credit_lease worker", ALLOCSET_DEFAULT_SIZES);

	if (sigsetjmp(failed, 1) != 0)
	{
		recover(slot, loop);
		failures = Min(failures + 1, 7);
	}
	PG_exception_stack = &failed;

	for (;;)
	{
		TimestampTz now;
		TimestampTz next_due;
		int64		holds = 0;

		MemoryContextSwitchTo(loop);
		MemoryContextReset(loop);
		if (failures > 0)
			pause_through(Min(500 << failures, LONGEST_WAIT_MS));
		if (!is_installed())
		{
			failures = 0;
			pause_for(LOOK_MS);
			continue;
		}

		now = GetCurrentTimestamp();
		if (settings_changed)
			next_sweep = next_look = 0;
		settings_changed = false;
		if (now >= next_sweep)
		{
			holds = sweep();
			worker_state_swept(slot, holds);
			if (holds < sweep_batch)
				next_sweep = TimestampTzPlusMilliseconds(now, sweep_interval);
			tidy(loop);
		}
		take_answers();
		next_due = next_sweep;
		collect = collect || now >= next_look;
		collect = ask(slot, now >= next_look, collect, &next_due);
		if (now >= next_look)
			next_look = TimestampTzPlusMilliseconds(now, Min(sweep_interval, LONGEST_LOOK_MS));
		if (collect)
			next_due = now;
		failures = 0;

		next_due = Min(next_due, next_look);
		if (answered != NIL)
			next_due = Min(next_due, TimestampTzPlusMilliseconds(now, TAKE_AGAIN_MS));
		pause_for(TimestampDifferenceMilliseconds(GetCurrentTimestamp(), next_due));
	}
}
