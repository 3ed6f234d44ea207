/*
 * upstream_state.c
 *		How a worker gets on with each upstream, in shared memory: counters and
 *		back-off, written by the worker of a database and read by anybody.
 *
 * Nothing that matters is lost with it: a worker that starts anew asks at once.
 *
 * Locks: the named LWLock credit_lease_upstream, for an instant, within which
 * nothing is allocated and nothing can fail.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/lwlock.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "shared_memory.h"
#include "upstream_state.h"

#define LOCK_NAME	"credit_lease_upstream"

/* How many upstreams all databases together can have. */
#define UPSTREAMS	256

typedef struct UpstreamSlot
{
	Oid			database;		/* InvalidOid for a free slot */
	NameData	server;
	int			in_flight;
	int64		successes;
	int64		failures;
	int64		latency_us;		/* -1 while none was answered */
	/* of leases and of reports, which may go to different machines */
	int			failures_in_a_row[2];
	TimestampTz failure_counted_at[2];
	TimestampTz back_off_until[2];
	TimestampTz last_success_at;	/* 0 for never */
	TimestampTz last_error_at;	/* 0 for never */
	char		error[256];
} UpstreamSlot;

static UpstreamSlot *slots = NULL;
static LWLock *lock;

static Size
size(void)
{
	return sizeof(UpstreamSlot) * UPSTREAMS;
}

/* Asks for the shared memory; to be called while the library is preloaded. */
void
upstream_state_request(void)
{
	shared_memory_request(LOCK_NAME, size, (void **) &slots, &lock);
}

/*
 * Returns the slot of a server of this database, a free one if it has none;
 * the last one is for all that find none. The lock is held.
 */
static UpstreamSlot *
slot_of(const char *server)
{
	UpstreamSlot *slot = &slots[UPSTREAMS - 1];

	for (int i = UPSTREAMS - 2; i >= 0; i--)
	{
		if (slots[i].database == MyDatabaseId && strcmp(NameStr(slots[i].server), server) == 0)
			return &slots[i];
		if (!OidIsValid(slots[i].database))
			slot = &slots[i];
	}
	if (!OidIsValid(slot->database))
	{
		slot->database = MyDatabaseId;
		strlcpy(NameStr(slot->server), server, NAMEDATALEN);
		slot->latency_us = -1;
	}
	return slot;
}

/* Forgets the upstreams of this database: its worker has just started. */
void
upstream_state_clear(void)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	for (int i = 0; i < UPSTREAMS; i++)
	{
		if (slots[i].database == MyDatabaseId)
			memset(&slots[i], 0, sizeof(slots[i]));
	}
	LWLockRelease(lock);
}

/* Notes that a request is on its way. */
void
upstream_state_sent(const char *server)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot_of(server)->in_flight++;
	LWLockRelease(lock);
}

/* Notes a reply that was of use. */
void
upstream_state_succeeded(const char *server, bool reports, int64 latency_us)
{
	UpstreamSlot *slot;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = slot_of(server);
	slot->in_flight--;
	slot->successes++;
	slot->failures_in_a_row[reports] = 0;
	slot->latency_us = latency_us;
	slot->last_success_at = GetCurrentTimestamp();
	LWLockRelease(lock);
}

static void
note_error(UpstreamSlot *slot, const char *error)
{
	slot->failures++;
	slot->last_error_at = GetCurrentTimestamp();
	shared_memory_keep_text(slot->error, sizeof(slot->error), error);
}

/* Notes a request that the upstream has refused: it is well, so that others may be sent. */
void
upstream_state_refused(const char *server, bool reports, const char *error, int64 latency_us)
{
	UpstreamSlot *slot;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = slot_of(server);
	slot->in_flight--;
	slot->failures_in_a_row[reports] = 0;
	slot->latency_us = latency_us;
	note_error(slot, error);
	LWLockRelease(lock);
}

/* Notes what is wrong with a server or with what it has answered. */
void
upstream_state_note(const char *server, const char *error)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	note_error(slot_of(server), error);
	LWLockRelease(lock);
}

/*
 * upstream_state_failed
 *		Notes a request that failed; returns how many have in a row. Those that
 *		were under way together count as one.
 */
int
upstream_state_failed(const char *server, bool reports, const char *error, TimestampTz sent_at)
{
	UpstreamSlot *slot;
	int			failures;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = slot_of(server);
	slot->in_flight--;
	if (sent_at >= slot->failure_counted_at[reports])
	{
		slot->failures_in_a_row[reports]++;
		slot->failure_counted_at[reports] = GetCurrentTimestamp();
	}
	failures = slot->failures_in_a_row[reports];
	note_error(slot, error);
	LWLockRelease(lock);
	return failures;
}

/* Lets no leases, or no reports, be sent to a server before an instant. */
void
upstream_state_back_off(const char *server, bool reports, TimestampTz until)
{
	UpstreamSlot *slot;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = slot_of(server);
	slot->back_off_until[reports] = Max(slot->back_off_until[reports], until);
	LWLockRelease(lock);
}

/* Ends every back-off of this database: what was wrong may have been mended. */
void
upstream_state_try_again(void)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	for (int i = 0; i < UPSTREAMS; i++)
	{
		if (slots[i].database == MyDatabaseId)
			memset(slots[i].back_off_until, 0, sizeof(slots[i].back_off_until));
	}
	LWLockRelease(lock);
}

/*
 * upstream_state_backing_off
 *		Returns the names of the servers to which no leases, or no reports, may
 *		be sent, as an array of text; *first_end is set to when the first of them may be sent
 *		something again, if that is earlier.
 */
ArrayType *
upstream_state_backing_off(bool reports, TimestampTz now, TimestampTz *first_end)
{
	Datum		names[UPSTREAMS];
	int			n = 0;

	for (int i = 0; i < UPSTREAMS; i++)
	{
		/* nobody else writes what is of this database */
		if (slots[i].database != MyDatabaseId || slots[i].back_off_until[reports] <= now)
			continue;
		names[n++] = CStringGetTextDatum(NameStr(slots[i].server));
		*first_end = Min(*first_end, slots[i].back_off_until[reports]);
	}
	return construct_array(names, n, TEXTOID, -1, false, TYPALIGN_INT);
}

/* Returns when a server may be asked for leases again, which may be past, and its last error. */
TimestampTz
upstream_state_backs_off_until(const char *server, char **error)
{
	UpstreamSlot copy;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	copy = *slot_of(server);
	LWLockRelease(lock);
	*error = pstrdup(copy.error);
	return copy.back_off_until[false];
}

/*
 * lease_upstreams() -> setof server, in_flight, successes, failures, latency,
 *		back_off_until, last_success_at, last_error_at, last_error
 *		What the worker of this database tells of the upstreams it has asked.
 */
PG_FUNCTION_INFO_V1(lease_upstreams);
Datum
lease_upstreams(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;

	InitMaterializedSRF(fcinfo, 0);
	for (int i = 0; slots && i < UPSTREAMS; i++)
	{
		UpstreamSlot copy;
		Interval	latency = {0};
		Datum		values[9];
		bool		nulls[9] = {false};

		LWLockAcquire(lock, LW_SHARED);
		copy = slots[i];
		LWLockRelease(lock);
		if (copy.database != MyDatabaseId)
			continue;

		latency.time = copy.latency_us;
		values[0] = CStringGetTextDatum(NameStr(copy.server));
		values[1] = Int32GetDatum(copy.in_flight);
		values[2] = Int64GetDatum(copy.successes);
		values[3] = Int64GetDatum(copy.failures);
		values[4] = IntervalPGetDatum(&latency);
		nulls[4] = copy.latency_us < 0;
		values[5] = TimestampTzGetDatum(Max(copy.back_off_until[false], copy.back_off_until[true]));
		nulls[5] = DatumGetTimestampTz(values[5]) == 0;
		values[6] = TimestampTzGetDatum(copy.last_success_at);
		nulls[6] = copy.last_success_at == 0;
		values[7] = TimestampTzGetDatum(copy.last_error_at);
		values[8] = CStringGetTextDatum(copy.error);
		nulls[7] = nulls[8] = copy.last_error_at == 0;
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	return (Datum) 0;
}
