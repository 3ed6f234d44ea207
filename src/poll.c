/*
 * poll.c
 *		The worker's side of mirrors: when to ask for a balance, and what to
 *		make of the answer.
 *
 * That it is to be asked for is a row of upstream_request, as leasing.c tells.
 * What an answer includes of our usage has to be known exactly: it is what the
 * upstream had acknowledged when it was asked. That sum is in lease_usage,
 * raised with the removal of the reports that were taken, and is noted with the
 * request before that is sent. What is reported meanwhile is pending until the
 * next answer, also if this one includes it: so less is available for a moment,
 * and never more.
 *
 * A mirror is asked for again when sync_interval has passed, when it runs low,
 * and while a call is short, but not without a pause.
 *
 * Locks: an account, which is never waited for.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "account.h"
#include "clock.h"
#include "mirror.h"
#include "poll.h"
#include "statement.h"

/* How many mirrors are asked for in one transaction */
#define LOOK_ROWS	200

/* A call that is short has its upstream asked again after that. */
#define PAUSE_MS	100

#define REQUEST_COLUMNS \
	"credit_lease.upstream_request AS r (account, credit, kind, server, company_id, credit_type_id, created_at, next_try_at)"

/* What was refused is asked again; what is under way stays. */
#define OR_ASK_AGAIN \
	" ON CONFLICT (account, credit, kind, lease_id) DO UPDATE" \
	" SET server = excluded.server, company_id = excluded.company_id, credit_type_id = excluded.credit_type_id," \
	" next_try_at = excluded.next_try_at, refused = false" \
	" WHERE (r.refused AND r.next_try_at <= excluded.next_try_at) OR r.server <> excluded.server"

/* Mirrors that it is time to ask for, those with the oldest checkpoints first */
static Statement look_statement = {
	.sql = "INSERT INTO " REQUEST_COLUMNS
	" SELECT t.account, t.credit, 'balance', t.server, p.company_id, p.credit_type_id, $1, $1"
	" FROM (SELECT t.account, t.credit, t.server, m.as_of FROM credit_lease.tranche t"
	"  JOIN credit_lease.mirror m ON m.account = t.account AND m.credit = t.credit AND m.tranche_id = t.tranche_id"
	"  WHERE t.kind = 'mirror' AND m.poll_at IS NOT NULL"
	"   AND (m.poll_at <= $1 OR (t.remaining <= t.refill_below AND t.refill_below > 0 AND m.synced_at <= $3))"
	"   AND NOT EXISTS (SELECT FROM credit_lease.upstream_request q WHERE q.account = t.account AND q.credit = t.credit"
	"    AND q.kind = 'balance' AND (NOT q.refused OR q.next_try_at > $1))"
	"  ORDER BY m.as_of LIMIT $2) t, credit_lease.lease_policy(t.account, t.credit) p WHERE p.server = t.server" OR_ASK_AGAIN,
	.nargs = 3,
	.argtypes = {TIMESTAMPTZOID, INT4OID, TIMESTAMPTZOID}
};

static Statement ask_statement = {
	.sql = "INSERT INTO " REQUEST_COLUMNS
	" SELECT $2, $3, 'balance', p.server, p.company_id, p.credit_type_id, $1, $1"
	" FROM credit_lease.lease_policy($2, $3) p" OR_ASK_AGAIN,
	.nargs = 3,
	.argtypes = {TIMESTAMPTZOID, TEXTOID, TEXTOID}
};

static Statement note_statement = {
	.sql = "UPDATE credit_lease.upstream_request r SET asked_at = $3, acknowledged = coalesce((SELECT u.acknowledged"
	"  FROM credit_lease.tranche t JOIN credit_lease.lease_usage u"
	"   ON u.account = t.account AND u.credit = t.credit AND u.tranche_id = t.tranche_id"
	"  WHERE t.account = $1 AND t.credit = $2 AND t.kind = 'mirror' AND t.server = r.server), 0)"
	" WHERE r.account = $1 AND r.credit = $2 AND r.kind = 'balance'",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, TIMESTAMPTZOID}
};

static Statement find_statement = {
	.sql = "SELECT r.server, r.asked_at, r.acknowledged FROM credit_lease.upstream_request r"
	" WHERE r.account = $1 AND r.credit = $2 AND r.kind = 'balance' AND r.asked_at IS NOT NULL",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

/*
 * Mirrors that are asked for by the policies at another time than they say; not
 * those of which a checkpoint is just coming in, as that looks by itself
 */
static Statement follow_statement = {
	.sql = "UPDATE credit_lease.mirror m SET poll_at = d.poll_at"
	" FROM (SELECT k.account, k.credit, k.tranche_id, c.as_of + p.sync_interval AS poll_at"
	"  FROM credit_lease.tranche k JOIN credit_lease.mirror c ON c.account = k.account AND c.credit = k.credit AND c.tranche_id = k.tranche_id"
	"  JOIN credit_lease.upstream u ON u.server = k.server AND u.supply = 'mirror',"
	"  credit_lease.lease_policy(k.account, k.credit) p"
	"  WHERE k.kind = 'mirror' AND p.server = k.server AND c.poll_at IS DISTINCT FROM c.as_of + p.sync_interval"
	"  FOR NO KEY UPDATE OF c SKIP LOCKED) d"
	" WHERE m.account = d.account AND m.credit = d.credit AND m.tranche_id = d.tranche_id"
};

/* ... and those that they do not ask for any more */
static Statement unwanted_statement = {
	.sql = "SELECT k.account, k.credit, k.tranche_id FROM credit_lease.mirror m"
	" JOIN credit_lease.tranche k ON k.account = m.account AND k.credit = m.credit AND k.tranche_id = m.tranche_id,"
	" credit_lease.lease_policy(m.account, m.credit) p"
	" WHERE m.poll_at IS NOT NULL AND p.server IS DISTINCT FROM k.server LIMIT $1",
	.nargs = 1,
	.argtypes = {INT4OID}
};

static Statement give_up_statement = {
	.sql = "WITH m AS (UPDATE credit_lease.mirror m SET poll_at = NULL"
	"  WHERE m.account = $1 AND m.credit = $2 AND m.tranche_id = $3)"
	" UPDATE credit_lease.tranche t SET trusted_until = least(t.trusted_until, $4), refill_below = NULL"
	" WHERE t.account = $1 AND t.credit = $2 AND t.tranche_id = $3",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID}
};

/* There are mirrors that could not be given up, or not be seen, when policies changed; or nobody has looked yet. */
static bool some_unwanted = true;

static Parameters
pool_parameters(const char *account, const char *credit)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, cstring_to_text(account));
	parameter_add_pointer(&parameters, cstring_to_text(credit));
	return parameters;
}

/* Looks through the mirrors for those that it is time to ask for. */
void
poll_look(void)
{
	Parameters	parameters = {0};

	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	parameter_add(&parameters, Int32GetDatum(LOOK_ROWS));
	parameter_add(&parameters, TimestampTzGetDatum(TimestampTzPlusMilliseconds(GetCurrentTimestamp(), -PAUSE_MS)));
	statement_execute(&look_statement, &parameters);
}

/* Returns whether all are given up; those of a locked account, and those above a number, are not. */
static bool
give_up_unwanted(void)
{
	Parameters	parameters = {0};
	SPITupleTable *rows;
	uint64		n;
	bool		all;

	parameter_add(&parameters, Int32GetDatum(LOOK_ROWS));
	n = statement_execute(&unwanted_statement, &parameters);
	rows = SPI_tuptable;
	all = n < LOOK_ROWS;
	for (uint64 i = 0; i < n; i++)
	{
		Parameters	mirror = {0};
		bool		isnull;
		AccountMarks marks;

		for (int k = 1; k <= 3; k++)
			parameter_add(&mirror, SPI_getbinval(rows->vals[i], rows->tupdesc, k, &isnull));
		parameter_add(&mirror, TimestampTzGetDatum(clock_now()));
		if (account_lock(DatumGetTextPP(mirror.value[0]), ACCOUNT_LOCK_IF_FREE, &marks))
			statement_execute(&give_up_statement, &mirror);
		else
			all = false;
	}
	return all;
}

/*
 * poll_follow_policies
 *		If policies have changed, asks for mirrors when they say. One that
 *		nobody asks for any more is not trusted any more, as if its checkpoint
 *		were too old: what is spent there is not known.
 */
void
poll_follow_policies(bool policies_changed)
{
	Parameters	none = {0};

	if (!policies_changed && !some_unwanted)
		return;
	statement_execute(&follow_statement, &none);
	some_unwanted = !give_up_unwanted();
}

/*
 * poll_ask
 *		Asks for the balance of a pool in which a call is short, and returns
 *		true; or false where it was told just before (0 for never), with when to
 *		ask again.
 */
bool
poll_ask(const char *account, const char *credit, TimestampTz synced_at, TimestampTz *next_poll)
{
	TimestampTz again = synced_at == 0 ? 0 : TimestampTzPlusMilliseconds(synced_at, PAUSE_MS);
	Parameters	parameters = {0};

	if (again > GetCurrentTimestamp())
	{
		*next_poll = Min(*next_poll, again);
		return false;
	}
	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	parameter_add_pointer(&parameters, cstring_to_text(account));
	parameter_add_pointer(&parameters, cstring_to_text(credit));
	statement_execute(&ask_statement, &parameters);
	return true;
}

/* Notes what the answer to what is about to be sent will include: see above. */
void
poll_note(const Exchange *exchange)
{
	Parameters	parameters = pool_parameters(exchange->account, exchange->credit);

	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	statement_execute(&note_statement, &parameters);
}

/*
 * poll_take
 *		Takes a balance into the books, if it is still wanted. For guard(); the
 *		account is locked.
 */
void
poll_take(void *arg)
{
	const Exchange *exchange = arg;
	Parameters	parameters = pool_parameters(exchange->account, exchange->credit);
	Checkpoint	checkpoint = {0};
	MirrorState state;
	bool		isnull;

	if (statement_execute(&find_statement, &parameters) == 0)
		return;
	checkpoint.account = cstring_to_text(exchange->account);
	checkpoint.credit = cstring_to_text(exchange->credit);
	checkpoint.server = DatumGetTextPP(statement_value(0, 1, &isnull));
	checkpoint.balance = exchange->terms.balance;
	checkpoint.as_of = DatumGetTimestampTz(statement_value(0, 2, &isnull));
	checkpoint.included = DatumGetNumeric(statement_value(0, 3, &isnull));
	checkpoint.company_id = cstring_to_text(exchange_asked_company(exchange));
	mirror_record(&checkpoint, &state);
}
