/*
 * hold.c
 *		Holds: the rows of credit_lease.reservation.
 *
 * Whoever makes, changes or ends a hold has locked the account. Every change of
 * the row demands all the same that it is still held, so that it ends once
 * (rule 4).
 *
 * A settlement spends the parts in the order in which their tranches burn and
 * gives the last of them back.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"

#include "amount.h"
#include "compat.h"
#include "errors.h"
#include "hold.h"
#include "statement.h"

static const char *const status_word[] = {"held", "settled", "cancelled", "expired"};

#define HOLD_COLUMNS \
	"SELECT r.reservation_id, r.credit, r.status, r.amount, r.expires_at," \
	" r.tranche_ids, r.tranche_amounts," \
	" r.consumed, r.refunded, r.shortfall, r.overage, r.end_entry_id" \
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

static Statement create_statement = {
	.sql = "INSERT INTO credit_lease.reservation (account, reservation_id, credit,"
	" created_at, expires_at, amount, tranche_ids, tranche_amounts, metadata)"
	" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
	.nargs = 9,
	.argtypes = {TEXTOID, INT8OID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID,
	NUMERICOID, INT8ARRAYOID, NUMERICARRAYOID, JSONBOID}
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
	" consumed = $5, refunded = $6, shortfall = $7, overage = $8, end_entry_id = $9"
	" WHERE r.account = $1 AND r.reservation_id = $2 AND r.status = 'held'",
	.nargs = 9,
	.argtypes = {TEXTOID, INT8OID, TEXTOID, TIMESTAMPTZOID,
	NUMERICOID, NUMERICOID, NUMERICOID, TEXTOID, INT8OID}
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

static void
read_hold(uint64 row, Hold *hold)
{
	char	   *status;
	Datum		value;
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

	value = statement_value(row, 8, &isnull);
	hold->consumed = isnull ? NULL : DatumGetNumeric(value);
	value = statement_value(row, 9, &isnull);
	hold->refunded = isnull ? NULL : DatumGetNumeric(value);
	value = statement_value(row, 10, &isnull);
	hold->shortfall = isnull ? NULL : DatumGetNumeric(value);
	value = statement_value(row, 11, &isnull);
	hold->overage = isnull ? NULL : DatumGetTextPP(value);
	value = statement_value(row, 12, &isnull);
	hold->end_entry_id = isnull ? 0 : DatumGetInt64(value);
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

/* Locks a hold's row, which is 40001 if it has changed since the snapshot. */
void
hold_lock(const Pool *pool, const Hold *hold)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int64GetDatum(hold->reservation_id));
	statement_execute(&lock_statement, &parameters);
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
	n = (int) statement_execute(&find_lapsed_statement, &parameters);

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

/* Inserts a hold; its tranches are still to be saved or have been. */
void
hold_create(const Pool *pool, const Hold *hold, Jsonb *metadata)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int64GetDatum(hold->reservation_id));
	parameter_add_pointer(&parameters, pool->credit);
	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	add_life(&parameters, hold);
	parameter_add_pointer(&parameters, metadata);
	statement_execute(&create_statement, &parameters);
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
		pool_give_back(pool, tranche, RESERVED, rest);
		left = amount_subtract(left, spent);
		if (tranche->alive)
			hold->refunded = amount_add(hold->refunded, rest);
	}
	Assert(amount_sign(left) == 0);
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
	parameter_add(&parameters, Int64GetDatum(hold->end_entry_id));
	require_one(statement_execute(&end_statement, &parameters), hold->reservation_id);
}
