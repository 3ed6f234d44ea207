/*
 * mirror.c
 *		lease_sync(): balances that live elsewhere, and what may be spent of
 *		them here.
 *
 * A billing system that lends nothing says now and then what there is. A
 * mirror is a tranche of that balance, less everything that was spent or held
 * of it here and is not taken off it there: what is left is known at once, and
 * exactly. Of each checkpoint it has to be known what it includes of our usage.
 * Who tells it says so: all until an instant, or what has certain keys. Where
 * the worker has asked, it is what the upstream had acknowledged when it was
 * asked (poll.c).
 *
 * What is included is kept as a sum, up to an entry that all before it are
 * included, and one by one beyond it: the next checkpoint has to look at no
 * more than at what is pending. The entries of a pool that is not striped are
 * numbered in the order in which they are committed, so that none comes in
 * behind; a mirror is never striped.
 *
 * Others may spend of the same balance, also what is held here. Then less than
 * nothing is left, which the tranche keeps beside its terms, as they cannot be
 * negative; what comes back goes there first (pool_give_back()).
 *
 * Locks: the account, which a checkpoint creates.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "argument.h"
#include "clock.h"
#include "errors.h"
#include "ledger.h"
#include "mirror.h"
#include "reclaim.h"
#include "statement.h"
#include "upstream.h"

static const EntryKind kind_more = {.name = "sync", .bucket = GRANTED};
static const EntryKind kind_less = {.name = "sync", .bucket = REVOKED, .negated = true};

static Statement find_statement = {
	.sql = "SELECT t.tranche_id, m.balance, m.as_of, m.included, m.entry_id"
	" FROM credit_lease.tranche t LEFT JOIN credit_lease.mirror m"
	"  ON m.account = $1 AND m.credit = $2 AND m.tranche_id = t.tranche_id"
	" WHERE t.account = $1 AND t.credit = $2 AND t.kind = 'mirror' AND t.server IS NOT DISTINCT FROM $3",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID}
};

static Statement create_statement = {
	.sql = "INSERT INTO credit_lease.tranche (account, credit, kind, priority, created_at, server, open)"
	" VALUES ($1, $2, 'mirror', $4, $5, $3, true) RETURNING tranche_id",
	.nargs = 5,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, INT4OID, TIMESTAMPTZOID}
};

/* From where the worker reads what is spent of it, to report it, and who it is for, if that is known */
static Statement usage_statement = {
	.sql = "INSERT INTO credit_lease.lease_usage AS u (account, credit, tranche_id, company_id) VALUES ($1, $2, $3, $4)"
	" ON CONFLICT (account, credit, tranche_id) DO UPDATE SET company_id = excluded.company_id"
	"  WHERE u.company_id IS DISTINCT FROM excluded.company_id AND excluded.company_id IS NOT NULL",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, INT8OID, TEXTOID}
};

/* All entries of the calls that have a key, and of the end of what they held, or carved out */
static Statement keys_statement = {
	.sql = "SELECT pg_catalog.array_agg(e.entry_id) FROM (SELECT k.entry_id FROM credit_lease.ledger k"
	"   WHERE k.account = $1 AND k.idempotency_key = ANY ($2)"
	"  UNION SELECT r.end_entry_id FROM credit_lease.ledger k"
	"   JOIN credit_lease.reservation r ON r.account = $1 AND r.reservation_id = k.reservation_id"
	"   WHERE k.account = $1 AND k.idempotency_key = ANY ($2) AND k.kind = 'reserve'"
	"  UNION SELECT e.entry_id FROM credit_lease.ledger k JOIN credit_lease.ledger e ON e.account = $1"
	"   AND e.entry_id > k.entry_id AND e.reservation_id = k.reservation_id AND e.kind IN ('chunk_release', 'chunk_expire')"
	"   WHERE k.account = $1 AND k.idempotency_key = ANY ($2) AND k.kind = 'chunk') c (entry_id)"
	" JOIN credit_lease.ledger f ON f.account = $1 AND f.entry_id = c.entry_id"
	" CROSS JOIN LATERAL (SELECT f.entry_id UNION ALL (SELECT s.entry_id FROM credit_lease.ledger s"
	"   WHERE f.parts > 1 AND s.account = $1 AND s.entry_id > f.entry_id AND s.first_entry_id = f.entry_id"
	"   ORDER BY s.entry_id LIMIT f.parts - 1)) e",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTARRAYOID}
};

/*
 * Takes what is included now, and was not, from what is pending: by its time,
 * or by its number. Returns up to where all is included then, and the sum.
 */
static Statement include_statement = {
	.custom = true,
	.sql = "WITH pending AS MATERIALIZED (SELECT v.entry_id, v.consumed,"
	"   CASE WHEN $5 THEN v.entry_id = ANY ($6) ELSE v.created_at <= $4 END AS now"
	"  FROM credit_lease.movement v WHERE v.account = $1 AND v.tranche_id = $2 AND v.entry_id > $3 AND v.consumed <> 0"
	"  AND NOT EXISTS (SELECT FROM credit_lease.mirror_entry e"
	"   WHERE e.account = $1 AND e.tranche_id = $2 AND e.entry_id = v.entry_id)),"
	" up_to AS MATERIALIZED (SELECT coalesce((SELECT pg_catalog.min(p.entry_id) - 1 FROM pending p WHERE p.now IS NOT TRUE),"
	"   (SELECT pg_catalog.max(l.entry_id) FROM credit_lease.ledger l WHERE l.account = $1), 0) AS entry_id),"
	" behind AS (DELETE FROM credit_lease.mirror_entry e USING up_to u"
	"  WHERE e.account = $1 AND e.tranche_id = $2 AND e.entry_id <= u.entry_id),"
	" beyond AS (INSERT INTO credit_lease.mirror_entry (account, tranche_id, entry_id)"
	"  SELECT $1, $2, p.entry_id FROM pending p, up_to u WHERE p.now AND p.entry_id > u.entry_id)"
	" SELECT u.entry_id, (SELECT coalesce(pg_catalog.sum(p.consumed), 0) FROM pending p WHERE p.now) FROM up_to u",
	.nargs = 6,
	.argtypes = {TEXTOID, INT8OID, INT8OID, TIMESTAMPTZOID, BOOLOID, INT8ARRAYOID}
};

static Statement forget_entries_statement = {
	.sql = "DELETE FROM credit_lease.mirror_entry e WHERE e.account = $1 AND e.tranche_id = $2",
	.nargs = 2,
	.argtypes = {TEXTOID, INT8OID}
};

/* Until when the checkpoint is trusted; and if the worker looks after the mirror, when and below what it asks again */
static Statement terms_statement = {
	.sql = "SELECT CASE WHEN p.failure_mode = 'closed' THEN $4 + p.max_staleness END,"
	" CASE WHEN u.server IS NOT NULL THEN $4 + p.sync_interval END,"
	" CASE WHEN u.server IS NOT NULL THEN p.low_water_mark END"
	" FROM credit_lease.lease_policy($1, $2) p"
	" LEFT JOIN credit_lease.upstream u ON u.server = p.server AND u.server = $3 AND u.supply = 'mirror'",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID}
};

static Statement refill_statement = {
	.sql = "UPDATE credit_lease.tranche t SET refill_below = $4"
	" WHERE t.account = $1 AND t.credit = $2 AND t.tranche_id = $3 AND t.refill_below IS DISTINCT FROM $4",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, INT8OID, NUMERICOID}
};

static Statement save_statement = {
	.sql = "INSERT INTO credit_lease.mirror (account, credit, tranche_id, balance, as_of, included, entry_id, synced_at, poll_at)"
	" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)"
	" ON CONFLICT (account, credit, tranche_id) DO UPDATE SET balance = excluded.balance, as_of = excluded.as_of,"
	"  included = excluded.included, entry_id = excluded.entry_id, synced_at = excluded.synced_at, poll_at = excluded.poll_at",
	.nargs = 9,
	.argtypes = {TEXTOID, TEXTOID, INT8OID, NUMERICOID, TIMESTAMPTZOID, NUMERICOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
};

/* What owners have spent of what is carved out of it */
static Statement spent_statement = {
	.sql = "SELECT coalesce(pg_catalog.sum(p.spent), 0) FROM credit_lease.chunk_part p"
	" WHERE p.account = $1 AND p.credit = $2 AND p.tranche_id = $3",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT8OID}
};

/* The mirror that a checkpoint is of, as it is stored */
typedef struct Mirror
{
	int64		tranche_id;
	bool		is_new;			/* there is no checkpoint yet; only the first two are set then */
	Numeric		balance;
	TimestampTz as_of;
	Numeric		included;
	bool		by_entry;		/* what is included are entries */
	int64		entry_id;		/* ... up to this one, and those of mirror_entry */
} Mirror;

/*
 * Reads the mirror of a server in a pool whose account is locked; makes an
 * empty tranche where there is none. Above READ COMMITTED it is read as it is
 * committed, so that pool_read() sees what the snapshot lacks.
 */
static void
find_mirror(const Pool *pool, const Checkpoint *checkpoint, Mirror *mirror)
{
	Parameters	parameters = pool_parameters(pool);
	bool		isnull;

	memset(mirror, 0, sizeof(*mirror));
	parameter_add_pointer(&parameters, checkpoint->server);
	if (statement_execute_now(&find_statement, &parameters) == 0)
	{
		parameter_add(&parameters, Int32GetDatum(DEFAULT_PRIORITY));
		parameter_add(&parameters, TimestampTzGetDatum(pool->now));
		statement_execute(&create_statement, &parameters);
		mirror->tranche_id = DatumGetInt64(statement_value(0, 1, &isnull));
		mirror->is_new = true;
		return;
	}
	mirror->tranche_id = DatumGetInt64(statement_value(0, 1, &isnull));
	mirror->as_of = DatumGetTimestampTz(statement_value(0, 3, &mirror->is_new));
	if (mirror->is_new)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("mirror " INT64_FORMAT " of account \"%s\" has no checkpoint",
						mirror->tranche_id, text_to_cstring(pool->account)),
				 errhint("See credit_lease.lease_verify(); nothing was changed.")));
	mirror->balance = DatumGetNumeric(statement_value(0, 2, &isnull));
	mirror->included = DatumGetNumeric(statement_value(0, 4, &isnull));
	mirror->entry_id = DatumGetInt64(statement_value(0, 5, &isnull));
	mirror->by_entry = !isnull;
}

/* Returns what is left of a balance, less than nothing if others have spent what is held here. */
static Numeric
what_is_left(const Tranche *tranche, Numeric balance, Numeric included)
{
	Numeric		taken = amount_add(amount_subtract(tranche->balance[CONSUMED], included),
								   amount_add(tranche->balance[RESERVED], tranche->balance[CHUNKED]));

	return amount_subtract(balance, taken);
}

/* Rule 3: what is stored must be what the checkpoint leaves, before another takes its place. */
static void
require_checkpoint(const Pool *pool, const Tranche *tranche, const Mirror *mirror)
{
	Numeric		left = amount_subtract(tranche->balance[REMAINING], tranche->overdrawn);

	if (amount_compare(left, what_is_left(tranche, mirror->balance, mirror->included)) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("mirror " INT64_FORMAT " of account \"%s\" is not what its checkpoint leaves",
						tranche->tranche_id, text_to_cstring(pool->account)),
				 errhint("See credit_lease.lease_verify(); nothing was changed.")));
}

static void
forget_entries(const Pool *pool, Mirror *mirror)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int64GetDatum(mirror->tranche_id));
	statement_execute(&forget_entries_statement, &parameters);
}

/* Returns the numbers of the entries that have certain keys, NULL for none. */
static ArrayType *
find_entries(const Pool *pool, ArrayType *keys)
{
	Parameters	parameters = {0};
	bool		isnull;
	Datum		ids;

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, keys);
	statement_execute(&keys_statement, &parameters);
	ids = statement_value(0, 1, &isnull);
	return isnull ? NULL : DatumGetArrayTypeP(ids);
}

/* Lets a mirror include the entries until as_of, or beside what it did those that have the keys. */
static void
include_entries(const Pool *pool, const Checkpoint *checkpoint, Mirror *mirror)
{
	Parameters	parameters = {0};
	ArrayType  *ids = NULL;
	bool		isnull;

	/* what the upstream had acknowledged were no entries: all are looked at again */
	if (!mirror->by_entry)
	{
		mirror->by_entry = true;
		mirror->entry_id = 0;
		mirror->included = amount_zero();
	}
	if (checkpoint->keys)
		ids = find_entries(pool, checkpoint->keys);

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int64GetDatum(mirror->tranche_id));
	parameter_add(&parameters, Int64GetDatum(mirror->entry_id));
	parameter_add(&parameters, TimestampTzGetDatum(checkpoint->as_of));
	parameter_add(&parameters, BoolGetDatum(checkpoint->keys != NULL));
	parameter_add_pointer(&parameters, ids);
	statement_execute(&include_statement, &parameters);
	mirror->entry_id = DatumGetInt64(statement_value(0, 1, &isnull));
	mirror->included = amount_add(mirror->included, DatumGetNumeric(statement_value(0, 2, &isnull)));
}

static void
include(const Pool *pool, const Checkpoint *checkpoint, Mirror *mirror)
{
	if (checkpoint->included)
	{
		if (mirror->by_entry)
			forget_entries(pool, mirror);
		mirror->by_entry = false;
		mirror->included = checkpoint->included;
		return;
	}
	if (checkpoint->keys && !mirror->is_new && !mirror->by_entry)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("acknowledged cannot be told of a mirror that the worker keeps"),
				 errdetail("What the upstream has acknowledged is known from its replies.")));
	include_entries(pool, checkpoint, mirror);
}

/* Puts a checkpoint in place of the one before. The mirror is one of the pool's tranches. */
static void
apply(Pool *pool, const Checkpoint *checkpoint, Mirror *mirror, Tranche *tranche)
{
	Parameters	parameters = pool_parameters(pool);
	Parameters	terms = parameters;
	Parameters	refill = parameters;
	Request		request = {.account = pool->account};
	int64		reservation_id = NO_RESERVATION;
	bool		isnull;
	Datum		value;
	TimestampTz trusted_until;
	TimestampTz poll_at;
	Numeric		low_water_mark;

	include(pool, checkpoint, mirror);
	parameter_add_pointer(&terms, checkpoint->server);
	parameter_add(&terms, TimestampTzGetDatum(checkpoint->as_of));
	statement_execute(&terms_statement, &terms);
	value = statement_value(0, 1, &isnull);
	trusted_until = isnull ? DT_NOEND : DatumGetTimestampTz(value);
	value = statement_value(0, 2, &isnull);
	poll_at = isnull ? DT_NOEND : DatumGetTimestampTz(value);
	value = statement_value(0, 3, &isnull);
	low_water_mark = isnull ? NULL : DatumGetNumeric(value);

	pool_set_mirror(pool, tranche, what_is_left(tranche, checkpoint->balance, mirror->included), trusted_until);
	request.kind = tranche->balance[REVOKED] == tranche->stored[REVOKED] ? &kind_more : &kind_less;
	ledger_append(pool, &request, &reservation_id);
	ledger_save(pool);

	parameter_add(&refill, Int64GetDatum(mirror->tranche_id));
	parameter_add_pointer(&refill, low_water_mark ? amount_multiply(tranche->balance[REMAINING], low_water_mark) : NULL);
	statement_execute(&refill_statement, &refill);

	parameter_add(&parameters, Int64GetDatum(mirror->tranche_id));
	parameter_add_pointer(&parameters, checkpoint->balance);
	parameter_add(&parameters, TimestampTzGetDatum(checkpoint->as_of));
	parameter_add_pointer(&parameters, mirror->included);
	if (mirror->by_entry)
		parameter_add(&parameters, Int64GetDatum(mirror->entry_id));
	else
		parameter_add_null(&parameters);
	parameter_add(&parameters, TimestampTzGetDatum(GetCurrentTimestamp()));
	if (TIMESTAMP_IS_NOEND(poll_at))
		parameter_add_null(&parameters);
	else
		parameter_add(&parameters, TimestampTzGetDatum(poll_at));
	statement_execute(&save_statement, &parameters);
	mirror->as_of = checkpoint->as_of;
}

static void
note_usage(const Pool *pool, const Checkpoint *checkpoint, const Mirror *mirror)
{
	Parameters	parameters = pool_parameters(pool);

	parameter_add(&parameters, Int64GetDatum(mirror->tranche_id));
	parameter_add_pointer(&parameters, checkpoint->company_id);
	statement_execute(&usage_statement, &parameters);
}

/*
 * Returns what was spent of a mirror and is not included; of what is carved out
 * of it, too, as it happens, though that is moved only when it ends.
 */
static Numeric
find_pending(const Pool *pool, const Tranche *tranche, const Mirror *mirror)
{
	Numeric		pending = amount_subtract(tranche->balance[CONSUMED], mirror->included);
	Parameters	parameters = pool_parameters(pool);
	bool		isnull;

	if (amount_sign(tranche->balance[CHUNKED]) == 0)
		return pending;
	parameter_add(&parameters, Int64GetDatum(tranche->tranche_id));
	statement_execute(&spent_statement, &parameters);
	return amount_add(pending, DatumGetNumeric(statement_value(0, 1, &isnull)));
}

/*
 * mirror_record
 *		Records a checkpoint, if it is a later one than the pool's mirror of
 *		that server has, and sets *state to what there is then. Locks the
 *		account, and makes it and the mirror if they are not there. Raises 0A000
 *		in a striped pool, and for keys where the mirror is kept by what the
 *		upstream has acknowledged; and LC009.
 */
void
mirror_record(const Checkpoint *checkpoint, MirrorState *state)
{
	Pool		pool = {.account = checkpoint->account, .credit = checkpoint->credit};
	Mirror		mirror;
	Tranche    *tranche;

	pool_lock_account(&pool, ACCOUNT_LOCK_OR_CREATE);
	if (pool.striped)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("credit \"%s\" of account \"%s\" is striped, and cannot have a balance that lives elsewhere",
						text_to_cstring(pool.credit), text_to_cstring(pool.account)),
				 errhint("Undo that with credit_lease.lease_stripe(..., 1); a pool can also be split by credit_lease.lease_chunk_allocate().")));
	pool.now = clock_now();
	find_mirror(&pool, checkpoint, &mirror);
	pool_read(&pool);
	reclaim_lapsed(&pool);
	tranche = pool_get(&pool, mirror.tranche_id);
	if (!mirror.is_new)
		require_checkpoint(&pool, tranche, &mirror);
	if (checkpoint->server && (mirror.is_new || checkpoint->company_id))
		note_usage(&pool, checkpoint, &mirror);
	if (mirror.is_new || checkpoint->as_of > mirror.as_of)
		apply(&pool, checkpoint, &mirror, tranche);

	state->available = pool.available;
	state->pending = find_pending(&pool, tranche, &mirror);
	state->as_of = mirror.as_of;
}

/* Returns when a checkpoint was true: not in future. */
static TimestampTz
argument_as_of(FunctionCallInfo fcinfo, int n)
{
	TimestampTz as_of;

	if (PG_ARGISNULL(n))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("as_of must not be null")));
	as_of = PG_GETARG_TIMESTAMPTZ(n);
	if (TIMESTAMP_NOT_FINITE(as_of))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("as_of must be finite")));
	if (as_of > clock_now())
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("as_of must not be in the future")));
	return as_of;
}

/*
 * lease_sync(account, credit, balance, as_of, server, acknowledged)
 *		Records a checkpoint of a balance that lives elsewhere. It includes all
 *		usage until as_of; or with acknowledged, what the one before did and
 *		what has these keys, of those that are of the mirror. Returns what the
 *		pool has then. One that is not later than the one before changes
 *		nothing. Raises 22023, 42704 or 42809 for a server that is no upstream,
 *		and what mirror_record() does.
 */
PG_FUNCTION_INFO_V1(lease_sync);
Datum
lease_sync(PG_FUNCTION_ARGS)
{
	Checkpoint	checkpoint = {0};
	MirrorState state;
	MemoryContext caller;
	Datum		values[3];
	bool		nulls[3] = {false};

	checkpoint.account = argument_text(fcinfo, 0, "account");
	checkpoint.credit = argument_text(fcinfo, 1, "credit");
	checkpoint.balance = argument_amount(fcinfo, 2, "balance", AMOUNT_NOT_NEGATIVE);
	checkpoint.as_of = argument_as_of(fcinfo, 3);
	if (!PG_ARGISNULL(4))
	{
		upstream_require(NameStr(*PG_GETARG_NAME(4)));
		checkpoint.server = cstring_to_text(NameStr(*PG_GETARG_NAME(4)));
	}
	if (!PG_ARGISNULL(5))
		checkpoint.keys = PG_GETARG_ARRAYTYPE_P(5);
	if (checkpoint.keys && array_contains_nulls(checkpoint.keys))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("acknowledged must not contain nulls")));
	caller = statement_begin();

	mirror_record(&checkpoint, &state);
	values[0] = NumericGetDatum(state.available);
	values[1] = NumericGetDatum(state.pending);
	values[2] = TimestampTzGetDatum(state.as_of);
	return statement_end(caller, fcinfo, values, nulls);
}
