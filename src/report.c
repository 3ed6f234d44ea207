/*
 * report.c
 *		Usage reports: what was spent of leases is told to their upstreams.
 *
 * The ledger is what is reported from: it has what was committed, and nothing
 * that was rolled back (rule 9). lease_usage says how far it has been read for
 * each lease; the entries of an account are numbered in the order in which
 * they are committed, so that none comes in behind. Those of a striped pool are
 * not: they are read up to a number that was drawn before the oldest
 * transaction that is under way began, as PgQ does. What is read becomes a row
 * of usage_report in the same transaction, which leaves when the upstream has
 * taken it. Lease and entry are the key by which the upstream counts it once,
 * however often it is sent. Of a mirror, what the upstream has taken is added up
 * in the same transaction, for poll.c.
 *
 * An entry is reported as it was spent, less what has been refunded before
 * that; what is refunded later is taken off the lease's next reports.
 *
 * What lease_track() is told is reported as it was told, in the transaction
 * that spends it, and its entries are only read: what was used is known as a
 * quantity there, and may be more than there was credit for.
 *
 * The worker takes no locks that a call could wait for.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "clock.h"
#include "policy.h"
#include "report.h"
#include "statement.h"
#include "upstream_state.h"

/* How many leases are read in one transaction, and entries of each. */
#define COLLECT_LEASES	50
#define COLLECT_ENTRIES	1000

/* The most events of one request (DESIGN 5) */
#define BATCH	100

/*
 * How many requests with reports are under way to a server at a time: one in
 * each lane. The reports of an account are all in one, so that they are sent
 * in order. What was refused in company, and may have been in bad company, is
 * sent one by one in a lane beside.
 */
#define LANES	"(VALUES (0), (1), (2), (3), (4), (5), (6), (7))"
#define LANE_OF(account) "(pg_catalog.hashtext(" account ") & 3)"
#define LANES_OF_MANY	4

/* A lane that has failed waits so long, at first and at most. */
#define FIRST_RETRY_MS		100
#define LONGEST_RETRY_MS	10000

/* What a mirror is called, where a lease has its id */
#define MIRROR_NAME(row) "(" row ".account || '/' || " row ".credit || '/' || " row ".tranche_id)"

/* A tranche is closed when nobody is at work in any of its stripes, and stays closed but for refunds. */
#define IN_STRIPES \
	"(t.open AND EXISTS (SELECT FROM credit_lease.striped_pool s WHERE s.account = t.account AND s.credit = t.credit))"

/*
 * Up to each entry so much has to be reported: the least that is spent there
 * or after any later entry, above what is owed. So a refund takes off what was
 * spent before it, as long as that has not been reported. The leases that have
 * not been read for longest come first. As a running total, all of that is one
 * report, in the place of an earlier one that the upstream has not taken: in
 * its lane, so that they are not sent out of order. It has the number of an
 * entry that is not reported by itself, as those of lease_track() are.
 */
static Statement collect_statement = {
	.custom = true,
	.sql = "WITH lease AS (SELECT u.account, u.credit, u.tranche_id, u.entry_id, u.owed, u.total AS told, u.server, u.lease_id, u.is_mirror, u.striped,"
	"  coalesce(u.company_id, p.company_id) AS company_id, p.event, p.credit_type_id, coalesce(s.usage = 'cumulative', false) AS cumulative"
	"  FROM (SELECT i.*, t.server, t.lease_id, t.kind = 'mirror' AS is_mirror, " IN_STRIPES " AS striped FROM credit_lease.lease_usage i JOIN credit_lease.whole_tranche t"
	"    ON t.account = i.account AND t.credit = i.credit AND t.tranche_id = i.tranche_id"
	"   WHERE NOT i.complete AND t.consumed <> i.consumed AND (i.entry_id < $3 OR NOT " IN_STRIPES ") ORDER BY i.entry_id LIMIT $1) u CROSS JOIN LATERAL credit_lease.lease_policy(u.account, u.credit) p"
	"  LEFT JOIN credit_lease.upstream s ON s.server = u.server),"
	" entry AS (SELECT l.*, m.id, m.kind, m.consumed, m.created_at,"
	"   pg_catalog.sum(m.consumed) OVER lease AS total,"
	"   pg_catalog.sum(m.consumed) FILTER (WHERE m.kind <> 'track') OVER lease AS to_report"
	"  FROM lease l, LATERAL (SELECT v.entry_id AS id, v.kind, v.consumed, v.created_at FROM credit_lease.movement v"
	"   WHERE v.account = l.account AND v.entry_id > l.entry_id AND v.tranche_id = l.tranche_id AND v.consumed <> 0"
	"   AND (NOT l.striped OR v.entry_id <= $3)"
	"   ORDER BY v.entry_id LIMIT $2) m"
	"  WINDOW lease AS (PARTITION BY l.account, l.credit, l.tranche_id ORDER BY m.id)),"
	" due AS (SELECT e.*, greatest(pg_catalog.min(coalesce(e.to_report, 0) - e.owed) OVER (PARTITION BY e.account, e.credit, e.tranche_id"
	"   ORDER BY e.id DESC), 0) AS reported FROM entry e),"
	" last AS (SELECT DISTINCT ON (d.account, d.credit, d.tranche_id) d.* FROM due d ORDER BY d.account, d.credit, d.tranche_id, d.id DESC),"
	" running AS (SELECT DISTINCT ON (d.account, d.credit, d.tranche_id) d.* FROM due d"
	"   WHERE d.cumulative AND d.reported > 0 AND d.kind <> 'track'"
	"   ORDER BY d.account, d.credit, d.tranche_id, d.id DESC),"
	" superseded AS (DELETE FROM credit_lease.usage_report r USING running t"
	"   WHERE r.account = t.account AND r.credit = t.credit AND r.tranche_id = t.tranche_id AND r.cumulative"
	"   RETURNING r.account, r.credit, r.tranche_id, r.credits, CASE WHEN r.refused_at IS NULL THEN r.lane END AS lane),"
	" report AS (INSERT INTO credit_lease.usage_report (account, entry_id, credit, tranche_id, server, lease_id,"
	"   company_id, event, quantity, created_at, idempotency_key, lane, credit_type_id, credits, cumulative)"
	"  SELECT q.account, q.id, q.credit, q.tranche_id, q.server, q.lease_id, q.company_id, q.event, q.quantity,"
	"   q.created_at, coalesce(q.lease_id, " MIRROR_NAME("q") ") || ':' || q.id || ':' || (extract(epoch FROM q.created_at) * 1000000)::pg_catalog.int8,"
	"   coalesce(q.lane, " LANE_OF("q.account") "), q.credit_type_id, CASE WHEN q.is_mirror THEN q.credits END, q.cumulative"
	"  FROM (SELECT e.*, e.credits AS quantity, NULL AS lane FROM (SELECT d.*, d.reported - pg_catalog.lag(d.reported, 1, 0::pg_catalog.numeric)"
	"     OVER (PARTITION BY d.account, d.credit, d.tranche_id ORDER BY d.id) AS credits FROM due d WHERE NOT d.cumulative) e"
	"    WHERE e.credits > 0"
	"   UNION ALL SELECT t.*, t.reported + coalesce(o.credits, 0), t.told + t.reported, o.lane"
	"    FROM running t LEFT JOIN (SELECT r.account, r.credit, r.tranche_id, pg_catalog.sum(r.credits) AS credits, pg_catalog.max(r.lane) AS lane"
	"     FROM superseded r GROUP BY r.account, r.credit, r.tranche_id) o"
	"     ON o.account = t.account AND o.credit = t.credit AND o.tranche_id = t.tranche_id) q)"
	" UPDATE credit_lease.lease_usage u SET entry_id = s.id, consumed = u.consumed + s.total,"
	"  owed = u.owed + s.reported - coalesce(s.to_report, 0), total = u.total + CASE WHEN s.cumulative THEN s.reported ELSE 0 END"
	" FROM last s"
	" WHERE u.account = s.account AND u.credit = s.credit AND u.tranche_id = s.tranche_id",
	.nargs = 3,
	.argtypes = {INT4OID, INT4OID, INT8OID}
};

static Statement drawn_statement = {
	.sql = "SELECT q.last_value FROM credit_lease.entry_id_seq q WHERE EXISTS (SELECT FROM credit_lease.striped_pool)"
};

/* Every transaction that has drawn a number by now is older than this one. */
static Statement transactions_statement = {
	.sql = "SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text::pg_catalog.int8,"
	" pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::pg_catalog.text::pg_catalog.int8"
};

static Statement complete_statement = {
	.custom = true,
	.sql = "UPDATE credit_lease.lease_usage u SET complete = true FROM credit_lease.tranche t"
	" WHERE t.account = u.account AND t.credit = u.credit AND t.tranche_id = u.tranche_id"
	" AND NOT u.complete AND NOT t.open AND t.consumed = u.consumed"
	" AND (t.released_at IS NOT NULL OR t.expires_at <= $1)",
	.nargs = 1,
	.argtypes = {TIMESTAMPTZOID}
};

/*
 * What was used is told to whom the lease is from that has paid, or who
 * supplies the pool. Of less than the smallest quantity the credits are told
 * that it has cost, as of other spending.
 */
static Statement usage_statement = {
	.sql = "INSERT INTO credit_lease.usage_report (account, entry_id, credit, tranche_id, server, lease_id,"
	" company_id, event, quantity, traits, created_at, idempotency_key, lane, credit_type_id, credits)"
	" SELECT $1, $3, $2, t.tranche_id, coalesce(t.server, p.server), t.lease_id,"
	"  coalesce(u.company_id, p.company_id), CASE WHEN $6 > 0 THEN $5 ELSE p.event END,"
	"  CASE WHEN $6 > 0 THEN $6 ELSE $10 END, $7, $8, $9, " LANE_OF("$1") ", p.credit_type_id,"
	"  CASE WHEN t.kind = 'mirror' THEN $10 END"
	" FROM credit_lease.lease_policy($1, $2) p"
	" LEFT JOIN credit_lease.tranche t ON t.account = $1 AND t.credit = $2 AND t.tranche_id = $4"
	" LEFT JOIN credit_lease.lease_usage u ON u.account = $1 AND u.credit = $2 AND u.tranche_id = t.tranche_id"
	" WHERE coalesce(t.server, p.server) IS NOT NULL AND greatest($6, $10) > 0",
	.nargs = 10,
	.argtypes = {TEXTOID, TEXTOID, INT8OID, INT8OID, TEXTOID, NUMERICOID, JSONBOID, TIMESTAMPTZOID, TEXTOID, NUMERICOID}
};

/* The next reports of each lane that is free. */
static Statement due_statement = {
	.custom = true,
	.sql = "SELECT s.server, n.lane, b.accounts, b.entry_ids, b.keys, b.n,"
	" pg_catalog.jsonb_build_object('idempotency_key', pg_catalog.gen_random_uuid(), 'events', b.events)"
	" FROM (SELECT p.srvname::pg_catalog.text COLLATE \"C\" AS server FROM pg_catalog.pg_foreign_server p"
	"  WHERE p.srvname <> ALL ($3::pg_catalog.name[])) s"
	" CROSS JOIN " LANES " AS n (lane)"
	" CROSS JOIN LATERAL (SELECT pg_catalog.array_agg(r.account) AS accounts, pg_catalog.array_agg(r.entry_id) AS entry_ids,"
	"   pg_catalog.array_agg(r.idempotency_key) AS keys,"
	"   pg_catalog.count(*)::pg_catalog.int4 AS n,"
	"   pg_catalog.jsonb_agg((pg_catalog.jsonb_build_object('idempotency_key', r.idempotency_key,"
	"    'event', r.event, 'quantity', pg_catalog.trim_scale(r.quantity), 'account', r.account, 'credit', r.credit,"
	"    'company_id', r.company_id, 'credit_type_id', r.credit_type_id,"
	"    'created_at', pg_catalog.to_char(r.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'))"
	"    || CASE WHEN r.lease_id IS NULL THEN '{}' ELSE pg_catalog.jsonb_build_object('lease_id', r.lease_id) END"
	"    || CASE WHEN r.traits IS NULL THEN '{}' ELSE pg_catalog.jsonb_build_object('traits', r.traits) END"
	"    || CASE WHEN r.cumulative THEN pg_catalog.jsonb_build_object('cumulative', true) ELSE '{}' END"
	"    || CASE WHEN r.cumulative AND r.lease_id IS NULL THEN pg_catalog.jsonb_build_object('mirror', " MIRROR_NAME("r") ") ELSE '{}' END)"
	"    ORDER BY r.entry_id) AS events"
	"  FROM (SELECT q.* FROM credit_lease.usage_report q"
	"   WHERE q.server = s.server AND q.lane = n.lane AND q.refused_at IS NULL"
	"   ORDER BY q.entry_id LIMIT CASE WHEN n.lane < $2 THEN $1 ELSE 1 END) r) b"
	" WHERE b.n > 0 AND n.lane || ' ' || s.server <> ALL ($4) LIMIT $5",
	.nargs = 5,
	.argtypes = {INT4OID, INT4OID, TEXTARRAYOID, TEXTARRAYOID, INT4OID}
};

/*
 * The key tells a report from one that has its number by now, as where the
 * extension was dropped and created again while it was under way.
 */
#define REPORTS "unnest($1, $2, $3) AS t (account, entry_id, idempotency_key)" \
	" WHERE r.account = t.account AND r.entry_id = t.entry_id AND r.idempotency_key = t.idempotency_key"

/* ... and what of a mirror's usage the upstream has then */
static Statement taken_statement = {
	.custom = true,
	.sql = "WITH r AS (DELETE FROM credit_lease.usage_report r USING " REPORTS
	"  RETURNING r.account, r.credit, r.tranche_id, r.credits)"
	" UPDATE credit_lease.lease_usage u SET acknowledged = u.acknowledged + s.credits"
	" FROM (SELECT r.account, r.credit, r.tranche_id, pg_catalog.sum(r.credits) AS credits FROM r"
	"  WHERE r.credits IS NOT NULL GROUP BY r.account, r.credit, r.tranche_id) s"
	" WHERE u.account = s.account AND u.credit = s.credit AND u.tranche_id = s.tranche_id",
	.nargs = 3,
	.argtypes = {TEXTARRAYOID, INT8ARRAYOID, TEXTARRAYOID}
};

static Statement refused_statement = {
	.custom = true,
	.sql = "UPDATE credit_lease.usage_report r SET lane = $5, error = $4, refused_at = $6 FROM " REPORTS,
	.nargs = 6,
	.argtypes = {TEXTARRAYOID, INT8ARRAYOID, TEXTARRAYOID, TEXTOID, INT4OID, TIMESTAMPTZOID}
};

/* A lane that has failed, while it waits */
typedef struct Lane
{
	char		server[NAMEDATALEN];
	int			number;
	int			failures;
	TimestampTz retry_at;
} Lane;

static List *failed_lanes = NIL;

/*
 * Returns up to which number all entries of striped pools are committed, or
 * never will be: transactions have an id before they draw a number, since they
 * lock a stripe first.
 */
static int64
settled_up_to(void)
{
	static int64 settled = 0;
	static int64 drawn = 0;
	static int64 drawn_before = 0;
	Parameters	none = {0};
	int64		last;
	int64		ours;
	int64		oldest;
	bool		isnull;

	if (statement_execute(&drawn_statement, &none) == 0)
		return 0;
	last = DatumGetInt64(statement_value(0, 1, &isnull));
	/* the extension was created anew */
	if (last < drawn)
		settled = drawn = 0;

	statement_execute(&transactions_statement, &none);
	ours = DatumGetInt64(statement_value(0, 1, &isnull));
	oldest = DatumGetInt64(statement_value(0, 2, &isnull));
	if (drawn == 0 || oldest >= drawn_before)
	{
		settled = drawn;
		drawn = last;
		drawn_before = ours;
	}
	return settled;
}

/*
 * report_collect
 *		Reads what was spent of some leases since the last time; returns
 *		whether there was anything, so that there may be more.
 */
bool
report_collect(void)
{
	Parameters	parameters = {0};
	Parameters	clock = {0};

	parameter_add(&parameters, Int32GetDatum(COLLECT_LEASES));
	parameter_add(&parameters, Int32GetDatum(COLLECT_ENTRIES));
	parameter_add(&parameters, Int64GetDatum(settled_up_to()));
	if (statement_execute(&collect_statement, &parameters) > 0)
		return true;
	parameter_add(&clock, TimestampTzGetDatum(clock_now()));
	statement_execute(&complete_statement, &clock);
	return false;
}

/*
 * report_usage
 *		Has a quantity reported of what a hold was made for: to the upstream of
 *		a lease or a mirror, which it has cost so many credits, or where the
 *		tranche is 0, of the pool, if it has one. The key is what the upstream
 *		counts it once by.
 */
void
report_usage(const Pool *pool, const Hold *hold, int64 tranche_id, Numeric credits, Numeric quantity, const char *key)
{
	Parameters	parameters = {0};

	/* an old snapshot is nothing to remember policies by */
	if (tranche_id == 0 && !IsolationUsesXactSnapshot() && !policy_has_server())
		return;
	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, pool->credit);
	parameter_add(&parameters, Int64GetDatum(hold->track_entry_id));
	parameter_add(&parameters, Int64GetDatum(tranche_id));
	parameter_add_pointer(&parameters, hold->event);
	parameter_add_pointer(&parameters, quantity);
	parameter_add_pointer(&parameters, hold->traits);
	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	parameter_add_pointer(&parameters, cstring_to_text(key));
	parameter_add_pointer(&parameters, credits);
	statement_execute(&usage_statement, &parameters);
}

/* Returns the place of a lane among those that have failed, NULL if it is not there. */
static Lane *
find_failed(const char *server, int number)
{
	ListCell   *cell;

	foreach(cell, failed_lanes)
	{
		Lane	   *lane = lfirst(cell);

		if (lane->number == number && strcmp(lane->server, server) == 0)
			return lane;
	}
	return NULL;
}

static Datum
lane_name(const char *server, int number)
{
	return CStringGetTextDatum(psprintf("%d %s", number, server));
}

/* Adds the lanes that are busy, or wait after a failure. */
static void
add_busy_lanes(Parameters *parameters, List *exchanges, TimestampTz now, TimestampTz *next_due)
{
	Datum	   *name = palloc(sizeof(Datum) * (list_length(exchanges) + list_length(failed_lanes)));
	int			n = 0;
	ListCell   *cell;

	foreach(cell, exchanges)
	{
		Exchange   *exchange = lfirst(cell);

		if (exchange->nreports > 0)
			name[n++] = lane_name(exchange->server, exchange->lane);
	}
	foreach(cell, failed_lanes)
	{
		Lane	   *lane = lfirst(cell);

		if (lane->retry_at <= now)
			continue;
		name[n++] = lane_name(lane->server, lane->number);
		*next_due = Min(*next_due, lane->retry_at);
	}
	parameter_add_texts(parameters, name, n);
}

/*
 * report_prepare
 *		Returns the reports to be sent when the transaction has committed, as
 *		at most so many exchanges beside those that are under way; *next_due
 *		is when there is more to do, if it is earlier.
 */
List *
report_prepare(List *exchanges, int most, TimestampTz *next_due)
{
	TimestampTz now = GetCurrentTimestamp();
	Parameters	parameters = {0};
	List	   *prepared = NIL;
	SPITupleTable *rows;
	uint64		n;

	parameter_add(&parameters, Int32GetDatum(BATCH));
	parameter_add(&parameters, Int32GetDatum(LANES_OF_MANY));
	parameter_add_pointer(&parameters, upstream_state_backing_off(true, now, next_due));
	add_busy_lanes(&parameters, exchanges, now, next_due);
	parameter_add(&parameters, Int32GetDatum(most));
	n = most > 0 ? statement_execute(&due_statement, &parameters) : 0;
	rows = SPI_tuptable;

	for (uint64 i = 0; i < n; i++)
	{
		HeapTuple	row = rows->vals[i];
		MemoryContext old = CurrentMemoryContext;
		char	   *error;
		bool		isnull;
		Exchange   *exchange = exchange_prepare(SPI_getvalue(row, rows->tupdesc, 1), "report",
												DatumGetJsonbP(SPI_getbinval(row, rows->tupdesc, 7, &isnull)),
												&error);

		if (exchange == NULL)
			continue;
		exchange->lane = DatumGetInt32(SPI_getbinval(row, rows->tupdesc, 2, &isnull));
		exchange->accounts = DatumGetArrayTypePCopy(SPI_getbinval(row, rows->tupdesc, 3, &isnull));
		exchange->entry_ids = DatumGetArrayTypePCopy(SPI_getbinval(row, rows->tupdesc, 4, &isnull));
		exchange->keys = DatumGetArrayTypePCopy(SPI_getbinval(row, rows->tupdesc, 5, &isnull));
		exchange->nreports = DatumGetInt32(SPI_getbinval(row, rows->tupdesc, 6, &isnull));
		MemoryContextSwitchTo(old);
		prepared = lappend(prepared, exchange);
	}
	return prepared;
}

/* Lets a lane wait after a failure, longer after each. */
static void
note_failure(const Exchange *exchange)
{
	Lane	   *lane = find_failed(exchange->server, exchange->lane);
	MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

	if (lane == NULL)
	{
		lane = palloc0(sizeof(Lane));
		strlcpy(lane->server, exchange->server, NAMEDATALEN);
		lane->number = exchange->lane;
		failed_lanes = lappend(failed_lanes, lane);
	}
	lane->retry_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
												 back_off_ms(FIRST_RETRY_MS, lane->failures++, LONGEST_RETRY_MS));
	MemoryContextSwitchTo(old);
}

/*
 * report_take
 *		Removes the reports that an upstream has taken, or notes that it has
 *		refused them; what has failed is sent again.
 */
void
report_take(Exchange *exchange)
{
	Lane	   *lane = find_failed(exchange->server, exchange->lane);
	Parameters	parameters = {0};

	if (exchange->result == EXCHANGE_FAILED)
	{
		note_failure(exchange);
		return;
	}
	if (lane)
	{
		failed_lanes = list_delete_ptr(failed_lanes, lane);
		pfree(lane);
	}

	parameter_add_pointer(&parameters, exchange->accounts);
	parameter_add_pointer(&parameters, exchange->entry_ids);
	parameter_add_pointer(&parameters, exchange->keys);
	if (exchange->result == EXCHANGE_REFUSED)
	{
		bool		in_company = exchange->nreports > 1;

		parameter_add_pointer(&parameters, cstring_to_text(exchange->error));
		parameter_add(&parameters, Int32GetDatum(exchange->lane + (in_company ? LANES_OF_MANY : 0)));
		if (in_company)
			parameter_add_null(&parameters);
		else
		{
			parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
			ereport(WARNING,
					(errcode(ERRCODE_FDW_REPLY_HANDLE),
					 errmsg("upstream \"%s\" has refused a usage report for good: %s",
							exchange->server, exchange->error),
					 errhint("See credit_lease.usage_report.")));
		}
	}
	statement_execute(exchange->result == EXCHANGE_REFUSED ? &refused_statement : &taken_statement, &parameters);
}
