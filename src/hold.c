/*
 * hold.c
 *		Holds: the rows of credit_lease.reservation.
 *
 * Whoever makes, changes or ends a hold has locked the account; in a striped
 * pool a stripe, and the hold. Every change of the row demands all the same that
 * it is still held, so that it ends once (rule 4).
 *
 * A settlement spends the parts in the order in which their tranches burn and
 * gives the last of them back.
 *
 * A hold may be of nothing: where lease_check() lets somebody pass who has no
 * credit.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"

#include "amount.h"
#include "argument.h"
#include "errors.h"
#include "hold.h"
#include "statement.h"

static const char *const status_word[] = {"held", "settled", "cancelled", "expired"};

#define HOLD_COLUMNS \
	"SELECT r.reservation_id, r.credit, r.status, r.amount, r.expires_at," \
	" r.tranche_ids, r.tranche_amounts," \
	" r.consumed, r.refunded, r.shortfall, r.overage, r.end_entry_id, r.created_at," \
	" r.feature, r.quantity, r.rate, r.unit, r.event, r.tracked, r.traits, r.track_entry_id" \
	" FROM credit_lease.reservation r"

static Statement find_statement = {
	.sql = HOLD_COLUMNS " WHERE r.account = $1 AND r.reservation_id = $2",
	.nargs = 2,
	.argtypes = {TEXTOID, INT8OID}
};

static Statement lock_statement = {
	.sql = "SELECT FROM credit_lease.reservation r"
	" WHERE r.account = $1 AND r.reservation_id = $2 FOR NO KEY UPDATE",
	.nargs = 2,
	.argtypes = {TEXTOID, INT8OID}
};

static Statement find_lapsed_statement = {
	.sql = HOLD_COLUMNS " WHERE r.account = $1 AND r.credit = $2 AND r.status = 'held'"
	" AND r.expires_at <= $3 ORDER BY r.expires_at LIMIT $4",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, TIMESTAMPTZOID, INT4OID}
};

/* ... but for those that somebody is about to end, in another stripe */
static Statement lock_lapsed_statement = {
	.sql = HOLD_COLUMNS " WHERE r.account = $1 AND r.credit = $2 AND r.status = 'held'"
	" AND r.expires_at <= $3 ORDER BY r.expires_at LIMIT $4 FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, TIMESTAMPTZOID, INT4OID}
};

static Statement create_statement = {
	.sql = "INSERT INTO credit_lease.reservation (account, reservation_id, credit,"
	" created_at, expires_at, amount, tranche_ids, tranche_amounts, metadata,"
	" feature, quantity, rate, unit, event)"
	" VALUES ($1, CASE $2 WHEN 0 THEN pg_catalog.nextval('credit_lease.reservation_id_seq') ELSE $2 END,"
	" $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) RETURNING reservation_id",
	.nargs = 14,
	.argtypes = {TEXTOID, INT8OID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID,
		NUMERICOID, INT8ARRAYOID, NUMERICARRAYOID, JSONBOID,
	TEXTOID, NUMERICOID, NUMERICOID, NUMERICOID, TEXTOID}
};

static Statement renew_statement = {
	.sql = "UPDATE credit_lease.reservation r"
	" SET expires_at = $3, amount = $4, tranche_ids = $5, tranche_amounts = $6"
	" WHERE r.account = $1 AND r.reservation_id = $2 AND r.status = 'held'",
	.nargs = 6,
	.argtypes = {TEXTOID, INT8OID, TIMESTAMPTZOID, NUMERICOID, INT8ARRAYOID, NUMERICARRAYOID}
};

static Statement next_expiry_statement = {
	.sql = "SELECT min(r.expires_at) FROM credit_lease.reservation r"
	" WHERE r.account = $1 AND r.credit = $2 AND r.status = 'held'",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

static Statement end_statement = {
	.sql = "UPDATE credit_lease.reservation r SET status = $3, ended_at = $4,"
	" consumed = $5, refunded = $6, shortfall = $7, overage = $8, end_entry_id = $9,"
	" tracked = $10, traits = $11, track_entry_id = $12"
	" WHERE r.account = $1 AND r.reservation_id = $2 AND r.status = 'held'",
	.nargs = 12,
	.argtypes = {TEXTOID, INT8OID, TEXTOID, TIMESTAMPTZOID,
		NUMERICOID, NUMERICOID, NUMERICOID, TEXTOID, INT8OID,
	NUMERICOID, JSONBOID, INT8OID}
};

static Statement track_late_statement = {
	.sql = "UPDATE credit_lease.reservation r SET consumed = $3, shortfall = $4,"
	" tracked = $5, traits = $6, track_entry_id = $7"
	" WHERE r.account = $1 AND r.reservation_id = $2 AND r.status = 'expired' AND r.track_entry_id IS NULL",
	.nargs = 7,
	.argtypes = {TEXTOID, INT8OID, NUMERICOID, NUMERICOID, NUMERICOID, JSONBOID, INT8OID}
};

/* How long a hold lives where neither the call nor a policy says. */
static const Interval default_ttl = {.time = 60 * USECS_PER_SEC};

static Statement ttl_statement = {
	.sql = "SELECT p.hold_ttl FROM credit_lease.policy p"
	" WHERE (p.account = $1 OR p.account IS NULL) AND (p.credit = $2 OR p.credit IS NULL)"
	" AND p.hold_ttl IS NOT NULL"
	" ORDER BY p.account NULLS LAST, p.credit NULLS LAST LIMIT 1",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

pg_noreturn static void
not_the_sum(const Hold *hold)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_BOOKS),
			 errmsg("reservation " INT64_FORMAT " is not the sum of its parts",
					hold->reservation_id)));
}

/* Rule 3: a hold whose parts do not add up is refused. */
static void
read_parts(Hold *hold, Datum ids, Datum amounts)
{
	Datum	   *id;
	Datum	   *amount;
	int			nids;
	int			namounts;
	Numeric		sum = amount_zero();

	deconstruct_array(DatumGetArrayTypeP(ids), INT8OID, sizeof(int64), FLOAT8PASSBYVAL,
					  TYPALIGN_DOUBLE, &id, NULL, &nids);
	deconstruct_array(DatumGetArrayTypeP(amounts), NUMERICOID, -1, false,
					  TYPALIGN_INT, &amount, NULL, &namounts);
	if (nids != namounts)
		not_the_sum(hold);

	hold->nparts = nids;
	hold->tranche_id = palloc(sizeof(int64) * nids);
	hold->part = palloc(sizeof(Numeric) * nids);
	for (int i = 0; i < nids; i++)
	{
		hold->tranche_id[i] = DatumGetInt64(id[i]);
		hold->part[i] = DatumGetNumeric(amount[i]);
		if (amount_sign(hold->part[i]) <= 0)
			not_the_sum(hold);
		sum = amount_add(sum, hold->part[i]);
	}
	if (amount_compare(sum, hold->amount) != 0)
		not_the_sum(hold);
}

static Numeric
read_amount(uint64 row, int column)
{
	bool		isnull;
	Datum		value = statement_value(row, column, &isnull);

	return isnull ? NULL : DatumGetNumeric(value);
}

static text *
read_text(uint64 row, int column)
{
	bool		isnull;
	Datum		value = statement_value(row, column, &isnull);

	return isnull ? NULL : DatumGetTextPP(value);
}

static Jsonb *
read_jsonb(uint64 row, int column)
{
	bool		isnull;
	Datum		value = statement_value(row, column, &isnull);

	return isnull ? NULL : DatumGetJsonbP(value);
}

static int64
read_id(uint64 row, int column)
{
	bool		isnull;
	Datum		value = statement_value(row, column, &isnull);

	return isnull ? 0 : DatumGetInt64(value);
}

static void
read_hold(uint64 row, Hold *hold)
{
	char	   *status;
	bool		isnull;

	memset(hold, 0, sizeof(*hold));
	hold->reservation_id = DatumGetInt64(statement_value(row, 1, &isnull));
	hold->credit = DatumGetTextPP(statement_value(row, 2, &isnull));
	status = TextDatumGetCString(statement_value(row, 3, &isnull));
	while (strcmp(status, status_word[hold->status]) != 0)
	{
		if (++hold->status == lengthof(status_word))
			elog(ERROR, "unrecognized reservation status: \"%s\"", status);
	}
	hold->amount = DatumGetNumeric(statement_value(row, 4, &isnull));
	hold->expires_at = DatumGetTimestampTz(statement_value(row, 5, &isnull));
	read_parts(hold, statement_value(row, 6, &isnull), statement_value(row, 7, &isnull));

	hold->consumed = read_amount(row, 8);
	hold->refunded = read_amount(row, 9);
	hold->shortfall = read_amount(row, 10);
	hold->overage = read_text(row, 11);
	hold->end_entry_id = read_id(row, 12);
	hold->created_at = DatumGetTimestampTz(statement_value(row, 13, &isnull));

	hold->feature = read_text(row, 14);
	hold->quantity = read_amount(row, 15);
	hold->rate = read_amount(row, 16);
	hold->unit = read_amount(row, 17);
	hold->event = read_text(row, 18);
	hold->tracked = read_amount(row, 19);
	hold->traits = read_jsonb(row, 20);
	hold->track_entry_id = read_id(row, 21);
	if (hold->feature && !(hold->quantity && hold->rate && hold->unit && hold->event))
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("reservation " INT64_FORMAT " does not say what it was made for",
						hold->reservation_id)));
}

/* Reads a hold, whatever its status; returns whether the account has it. */
bool
hold_find(text *account, int64 reservation_id, Hold *hold)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, account);
	parameter_add(&parameters, Int64GetDatum(reservation_id));
	if (statement_execute(&find_statement, &parameters) == 0)
		return false;
	read_hold(0, hold);
	return true;
}

/* Raises LC003. */
void
hold_not_found(text *account, int64 reservation_id)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_NOT_FOUND),
			 errmsg("account \"%s\" has no reservation " INT64_FORMAT,
					text_to_cstring(account), reservation_id)));
}

/* Locks and reads a hold whose account is not locked, but a stripe of it. */
void
hold_lock(Pool *pool, int64 reservation_id, Hold *hold)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int64GetDatum(reservation_id));
	statement_execute(&lock_statement, &parameters);
	hold_find(pool->account, reservation_id, hold);
}

bool
hold_is_alive(const Pool *pool, const Hold *hold)
{
	return hold->status == HOLD_HELD && hold->expires_at > pool->now;
}

/*
 * hold_has_ended
 *		Raises what a hold that is no more is answered with: LC004 or LC005.
 *		Above READ COMMITTED it may have been renewed since the snapshot; then
 *		locking its row is 40001.
 */
void
hold_has_ended(const Pool *pool, const Hold *hold)
{
	if (IsolationUsesXactSnapshot())
	{
		Parameters	parameters = {0};

		parameter_add_pointer(&parameters, pool->account);
		parameter_add(&parameters, Int64GetDatum(hold->reservation_id));
		statement_execute(&lock_statement, &parameters);
	}

	if (hold->status == HOLD_HELD || hold->status == HOLD_EXPIRED)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_EXPIRED),
				 errmsg("reservation " INT64_FORMAT " has expired", hold->reservation_id),
				 errdetail("It expired at %s.", timestamptz_to_str(hold->expires_at))));
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_ENDED),
			 hold->status == HOLD_SETTLED ?
			 errmsg("reservation " INT64_FORMAT " is already settled", hold->reservation_id) :
			 errmsg("reservation " INT64_FORMAT " is already cancelled", hold->reservation_id)));
}

/* Returns when a hold that begins or is renewed now expires; ttl NULL is what the policy says. */
TimestampTz
hold_expiry(const Pool *pool, const Interval *ttl)
{
	if (ttl == NULL)
	{
		Parameters	parameters = {0};
		bool		isnull;

		parameter_add_pointer(&parameters, pool->account);
		parameter_add_pointer(&parameters, pool->credit);
		if (statement_execute(&ttl_statement, &parameters) == 1)
			ttl = DatumGetIntervalP(statement_value(0, 1, &isnull));
		else
			ttl = &default_ttl;
	}
	return instant_add(pool->now, ttl);
}

/* Reads the pool's expired holds that nobody has given back, at most limit. */
int
hold_find_lapsed(const Pool *pool, int limit, Hold **holds)
{
	Parameters	parameters = {0};
	int			n;

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, pool->credit);
	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	parameter_add(&parameters, Int32GetDatum(limit));
	n = (int) statement_execute(pool->striped ? &lock_lapsed_statement : &find_lapsed_statement, &parameters);

	*holds = palloc(sizeof(Hold) * n);
	for (int i = 0; i < n; i++)
		read_hold(i, &(*holds)[i]);
	return n;
}

/* Adds the columns of a hold that may change during its life. */
static void
add_life(Parameters *parameters, const Hold *hold)
{
	Datum	   *id = palloc(sizeof(Datum) * hold->nparts);
	Datum	   *part = palloc(sizeof(Datum) * hold->nparts);

	for (int i = 0; i < hold->nparts; i++)
	{
		id[i] = Int64GetDatum(hold->tranche_id[i]);
		part[i] = NumericGetDatum(hold->part[i]);
	}
	parameter_add(parameters, TimestampTzGetDatum(hold->expires_at));
	parameter_add_pointer(parameters, hold->amount);
	parameter_add_pointer(parameters,
						  construct_array(id, hold->nparts, INT8OID, sizeof(int64),
										  FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	parameter_add_pointer(parameters,
						  construct_array(part, hold->nparts, NUMERICOID, -1, false,
										  TYPALIGN_INT));
}

/* Rule 3: what a hold came from is open as long as it is held. */
static void
require_tranches(const Pool *pool, const Hold *hold)
{
	for (int i = 0; i < hold->nparts; i++)
		pool_get(pool, hold->tranche_id[i]);
}

/*
 * hold_collect
 *		Adds to a hold what was moved to RESERVED in the pool and is not saved
 *		yet, and lets it, and what its tranches know of it, expire then.
 */
void
hold_collect(Pool *pool, Hold *hold, TimestampTz expires_at)
{
	int64	   *tranche_id = palloc(sizeof(int64) * (hold->nparts + pool->ntranches));
	Numeric    *part = palloc(sizeof(Numeric) * (hold->nparts + pool->ntranches));

	require_tranches(pool, hold);
	for (int i = 0; i < hold->nparts; i++)
	{
		tranche_id[i] = hold->tranche_id[i];
		part[i] = hold->part[i];
	}

	for (int i = 0; i < pool->ntranches; i++)
	{
		Tranche    *tranche = pool->tranche[i];
		Numeric		added;
		int			n = 0;

		if (tranche->balance[RESERVED] == tranche->stored[RESERVED])
			continue;
		if (amount_sign(tranche->stored[RESERVED]) == 0)
			tranche->hold_expires_at = expires_at;
		else
			tranche->hold_expires_at = Min(tranche->hold_expires_at, expires_at);

		added = amount_subtract(tranche->balance[RESERVED], tranche->stored[RESERVED]);
		hold->amount = hold->amount ? amount_add(hold->amount, added) : added;
		while (n < hold->nparts && tranche_id[n] != tranche->tranche_id)
			n++;
		if (n < hold->nparts)
			part[n] = amount_add(part[n], added);
		else
		{
			tranche_id[n] = tranche->tranche_id;
			part[n] = added;
			hold->nparts++;
		}
	}
	if (hold->amount == NULL)
		hold->amount = amount_zero();
	hold->tranche_id = tranche_id;
	hold->part = part;
	hold->expires_at = expires_at;
}

static void
require_one(uint64 rows, int64 reservation_id)
{
	if (rows != 1)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("reservation " INT64_FORMAT " was changed behind this call",
						reservation_id)));
}

/* Inserts a hold, and draws its number if that is 0; its tranches are still to be saved or have been. */
void
hold_create(const Pool *pool, Hold *hold, Jsonb *metadata)
{
	Parameters	parameters = {0};
	bool		isnull;

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int64GetDatum(hold->reservation_id));
	parameter_add_pointer(&parameters, pool->credit);
	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	add_life(&parameters, hold);
	parameter_add_pointer(&parameters, metadata);
	parameter_add_pointer(&parameters, hold->feature);
	parameter_add_pointer(&parameters, hold->quantity);
	parameter_add_pointer(&parameters, hold->rate);
	parameter_add_pointer(&parameters, hold->unit);
	parameter_add_pointer(&parameters, hold->event);
	statement_execute(&create_statement, &parameters);
	hold->created_at = pool->now;
	hold->reservation_id = DatumGetInt64(statement_value(0, 1, &isnull));
}

/* Writes what hold_collect() has changed of a hold. */
void
hold_renew(const Pool *pool, const Hold *hold)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int64GetDatum(hold->reservation_id));
	add_life(&parameters, hold);
	require_one(statement_execute(&renew_statement, &parameters), hold->reservation_id);
}

/* Returns when the first of the pool's holds expires or has expired, DT_NOEND for none. */
TimestampTz
hold_next_expiry(const Pool *pool)
{
	Parameters	parameters = {0};
	Datum		value;
	bool		isnull;

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, pool->credit);
	statement_execute(&next_expiry_statement, &parameters);
	value = statement_value(0, 1, &isnull);
	return isnull ? DT_NOEND : DatumGetTimestampTz(value);
}

/* Returns how much of a hold came from a tranche, NULL for nothing. */
static Numeric
find_part(const Hold *hold, int64 tranche_id)
{
	for (int i = 0; i < hold->nparts; i++)
	{
		if (hold->tranche_id[i] == tranche_id)
			return hold->part[i];
	}
	return NULL;
}

/*
 * hold_release
 *		Moves an amount of what is held to CONSUMED and gives the rest back to
 *		the tranches that it came from, see pool_give_back(). Sets
 *		hold->consumed and hold->refunded.
 *		Raises LC009 where one of those tranches is not open.
 */
void
hold_release(Pool *pool, Hold *hold, Numeric consumed)
{
	Numeric		left = consumed;

	require_tranches(pool, hold);
	hold->consumed = consumed;
	hold->refunded = amount_zero();
	for (int i = 0; i < pool->ntranches; i++)
	{
		Tranche    *tranche = pool->tranche[i];
		Numeric		part = find_part(hold, tranche->tranche_id);
		Numeric		spent;
		Numeric		rest;

		if (part == NULL)
			continue;
		spent = amount_min(left, part);
		rest = amount_subtract(part, spent);
		pool_move(pool, tranche, RESERVED, CONSUMED, spent);
		hold->refunded = amount_add(hold->refunded, pool_give_back(pool, tranche, RESERVED, rest));
		left = amount_subtract(left, spent);
	}
	Assert(amount_sign(left) == 0);
}

static void
add_id(Parameters *parameters, int64 id)
{
	if (id == 0)
		parameter_add_null(parameters);
	else
		parameter_add(parameters, Int64GetDatum(id));
}

/* Writes how a hold ended, as its fields say. */
void
hold_end(const Pool *pool, const Hold *hold)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int64GetDatum(hold->reservation_id));
	parameter_add_pointer(&parameters, cstring_to_text(status_word[hold->status]));
	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	parameter_add_pointer(&parameters, hold->consumed);
	parameter_add_pointer(&parameters, hold->refunded);
	parameter_add_pointer(&parameters, hold->shortfall);
	parameter_add_pointer(&parameters, hold->overage);
	add_id(&parameters, hold->end_entry_id);
	parameter_add_pointer(&parameters, hold->tracked);
	parameter_add_pointer(&parameters, hold->traits);
	add_id(&parameters, hold->track_entry_id);
	require_one(statement_execute(&end_statement, &parameters), hold->reservation_id);
}

/* Writes what was charged for a hold that had expired. */
void
hold_track_late(const Pool *pool, const Hold *hold)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int64GetDatum(hold->reservation_id));
	parameter_add_pointer(&parameters, hold->consumed);
	parameter_add_pointer(&parameters, hold->shortfall);
	parameter_add_pointer(&parameters, hold->tracked);
	parameter_add_pointer(&parameters, hold->traits);
	add_id(&parameters, hold->track_entry_id);
	require_one(statement_execute(&track_late_statement, &parameters), hold->reservation_id);
}
