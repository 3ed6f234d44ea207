/*
 * ledger.c
 *		Writes what was moved in a pool: entries first, tranches after them.
 *
 * Both come from the same amounts in memory, so that the books cannot differ
 * from the balances. The entry comes first because its key decides whether the
 * call happens at all: where the key is taken, nothing has been written yet.
 * That insert waits for a transaction in progress that uses the same key, and
 * is 40001 above READ COMMITTED if that one commits.
 *
 * A tranche is written only where the row is still the one that was locked:
 * a trigger on the ledger that spends from the same pool makes the call fail
 * with LC009, and never spends more credit than there is.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "amount.h"
#include "demand.h"
#include "errors.h"
#include "gather.h"
#include "ledger.h"
#include "statement.h"
#include "stripe.h"
#include "worker_state.h"

/* A number is drawn in the statement that needs it, and in no other. */
#define APPEND(tranche_id, reservation_id) \
	{ \
		.sql = "INSERT INTO credit_lease.ledger (account, credit, kind, amount, released, lapsed, available," \
		" tranche_id, reservation_id, idempotency_key, request, metadata, reason, created_at," \
		" first_entry_id, parts, refund_of, returned)" \
		" VALUES ($1, $2, $3, $4, $5, $6, $7, " tranche_id ", " reservation_id "," \
		" $10, $11, $12, $13, $14, $15, $16, $17, $18)" \
		" ON CONFLICT (account, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING" \
		" RETURNING entry_id, tranche_id, reservation_id", \
		.nargs = 18, \
		.argtypes = {TEXTOID, TEXTOID, TEXTOID, NUMERICOID, NUMERICOID, NUMERICOID, NUMERICOID, \
			INT8OID, INT8OID, TEXTOID, JSONBOID, JSONBOID, TEXTOID, TIMESTAMPTZOID, \
			INT8OID, INT4OID, INT8OID, NUMERICOID} \
	}

static Statement append_statement = APPEND("$8", "$9");
static Statement append_new_tranche_statement =
APPEND("pg_catalog.nextval('credit_lease.tranche_id_seq')", "$9");
static Statement append_new_reservation_statement =
APPEND("$8", "pg_catalog.nextval('credit_lease.reservation_id_seq')");

#define STRIPE_TYPES \
	NUMERICOID, NUMERICOID, NUMERICOID, NUMERICOID, \
	NUMERICOID, NUMERICOID, NUMERICOID, NUMERICOID
#define STATE_TYPES BOOLOID, TIMESTAMPTZOID, STRIPE_TYPES

static Statement change_statement = {
	.sql = "UPDATE credit_lease.tranche t SET open = $3, hold_expires_at = $4,"
	" granted = $5, chunked = $6, reserved = $7, remaining = $8,"
	" consumed = $9, expired = $10, returned = $11, revoked = $12"
	" WHERE t.account = $1 AND t.ctid = $2 RETURNING t.ctid",
	.nargs = 12,
	.argtypes = {TEXTOID, TIDOID, STATE_TYPES}
};

static Statement create_statement = {
	.sql = "INSERT INTO credit_lease.tranche (account, credit, tranche_id, open, hold_expires_at,"
	" granted, chunked, reserved, remaining, consumed, expired, returned, revoked,"
	" priority, expires_at, created_at, kind, server, lease_id)"
	" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)"
	" RETURNING ctid",
	.nargs = 19,
	.argtypes = {TEXTOID, TEXTOID, INT8OID, STATE_TYPES,
	INT4OID, TIMESTAMPTZOID, TIMESTAMPTZOID, TEXTOID, TEXTOID, TEXTOID}
};

static Statement change_stripe_statement = {
	.sql = "UPDATE credit_lease.tranche_stripe p SET"
	" granted = $3, chunked = $4, reserved = $5, remaining = $6,"
	" consumed = $7, expired = $8, returned = $9, revoked = $10"
	" WHERE p.account = $1 AND p.ctid = $2 RETURNING p.ctid",
	.nargs = 10,
	.argtypes = {TEXTOID, TIDOID, STRIPE_TYPES}
};

static Statement create_stripe_statement = {
	.sql = "INSERT INTO credit_lease.tranche_stripe AS p (account, credit, tranche_id, stripe,"
	" granted, chunked, reserved, remaining, consumed, expired, returned, revoked)"
	" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) RETURNING p.ctid",
	.nargs = 12,
	.argtypes = {TEXTOID, TEXTOID, INT8OID, INT4OID, STRIPE_TYPES}
};

/* What only a lease or a mirror changes is no part of the statement that every spend runs. */
static Statement change_lease_statement = {
	.sql = "UPDATE credit_lease.tranche t SET expires_at = $3, released_at = $4, trusted_until = $5, overdrawn = $6"
	" WHERE t.account = $1 AND t.ctid = $2 RETURNING t.ctid",
	.nargs = 6,
	.argtypes = {TEXTOID, TIDOID, TIMESTAMPTZOID, TIMESTAMPTZOID, TIMESTAMPTZOID, NUMERICOID}
};

static Statement draw_statement = {
	.sql = "SELECT pg_catalog.nextval('credit_lease.entry_id_seq')"
};

/* Returns what the ledger does not know yet of a term's change, NULL for none. */
static Numeric
change(const Tranche *tranche, Bucket bucket)
{
	if (tranche->balance[bucket] == tranche->logged[bucket])
		return NULL;
	return amount_subtract(tranche->balance[bucket], tranche->logged[bucket]);
}

static bool
is_changed(const Tranche *tranche, const Numeric *from)
{
	return memcmp(tranche->balance, from, sizeof(tranche->balance)) != 0;
}

/*
 * Raises LC009: something that the call itself set off, a trigger for instance,
 * has changed a tranche that the call has locked.
 */
pg_noreturn static void
changed_behind(const Pool *pool, const Tranche *tranche)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_BOOKS),
			 errmsg("tranche " INT64_FORMAT " of account \"%s\" was changed behind this call",
					tranche->tranche_id, text_to_cstring(pool->account))));
}

/* Adds what an entry says of a tranche; NULL for what no tranche had. */
static void
add_amounts(Parameters *parameters, const Pool *pool, const Request *request, const Tranche *tranche)
{
	const EntryKind *kind = request->kind;
	Numeric		amount = tranche ? change(tranche, kind->bucket) : request->shortfall;

	if (amount == NULL)
		amount = amount_zero();
	else if (kind->negated)
		amount = amount_negate(amount);

	parameter_add_pointer(parameters, cstring_to_text(tranche ? kind->name : "shortfall"));
	parameter_add_pointer(parameters, amount);
	parameter_add_pointer(parameters, tranche && kind->settles ? change(tranche, REMAINING) : NULL);
	parameter_add_pointer(parameters, tranche && kind->bucket != EXPIRED ? change(tranche, EXPIRED) : NULL);
	parameter_add_pointer(parameters, pool->available);
	if (tranche)
		parameter_add(parameters, Int64GetDatum(tranche->tranche_id));
	else
		parameter_add_null(parameters);
}

/*
 * Adds the parameters of APPEND. The view credit_lease.movement is the inverse:
 * it tells from the kind and these amounts what changed.
 */
static void
add_entry(Parameters *parameters, const Pool *pool, const Request *request,
		  const Tranche *tranche, int64 reservation_id, int64 first_entry_id, int parts)
{
	bool		first = first_entry_id == 0;

	parameter_add_pointer(parameters, pool->account);
	parameter_add_pointer(parameters, pool->credit);
	add_amounts(parameters, pool, request, tranche);
	if (reservation_id == NO_RESERVATION)
		parameter_add_null(parameters);
	else
		parameter_add(parameters, Int64GetDatum(reservation_id));
	parameter_add_pointer(parameters, first ? request->key : NULL);
	parameter_add_pointer(parameters, first ? request->arguments : NULL);
	parameter_add_pointer(parameters, request->metadata);
	parameter_add_pointer(parameters, request->reason);
	parameter_add(parameters, TimestampTzGetDatum(pool->now));
	if (first)
		parameter_add_null(parameters);
	else
		parameter_add(parameters, Int64GetDatum(first_entry_id));
	if (first && parts > 1)
		parameter_add(parameters, Int32GetDatum(parts));
	else
		parameter_add_null(parameters);
	if (tranche && tranche->refund_of != 0)
		parameter_add(parameters, Int64GetDatum(tranche->refund_of));
	else
		parameter_add_null(parameters);
	parameter_add_pointer(parameters, tranche && request->kind->bucket != RETURNED ? change(tranche, RETURNED) : NULL);
}

static void
add_instant(Parameters *parameters, TimestampTz instant)
{
	if (TIMESTAMP_IS_NOEND(instant))
		parameter_add_null(parameters);
	else
		parameter_add(parameters, TimestampTzGetDatum(instant));
}

static void
add_balance(Parameters *parameters, const Tranche *tranche)
{
	for (int b = 0; b < BUCKETS; b++)
		parameter_add_pointer(parameters, tranche->balance[b]);
}

/* Adds the columns of a tranche that calls change. */
static void
add_state(Parameters *parameters, const Tranche *tranche)
{
	parameter_add(parameters, BoolGetDatum(tranche_is_open(tranche)));
	add_instant(parameters, tranche->hold_expires_at);
	add_balance(parameters, tranche);
}

/*
 * Runs a statement that appends an entry, with its parameters; returns whether
 * it was accepted, which only the first of a request with a key need not be.
 */
static bool
append(Statement *statement, Parameters *parameters, const Request *request, int64 *first_entry_id)
{
	bool		isnull;

	if (statement_execute(statement, parameters) == 0)
	{
		if (request->key && *first_entry_id == 0)
			return false;
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("the ledger did not accept an entry of account \"%s\"",
						text_to_cstring(request->account))));
	}
	if (*first_entry_id == 0)
		*first_entry_id = DatumGetInt64(statement_value(0, 1, &isnull));
	return true;
}

/*
 * ledger_append
 *		Appends an entry for each tranche that was moved since the last time,
 *		in burn order, and one for what was not there; returns the first one's
 *		number; 0 if none was, or the request's key is taken, in which case
 *		nothing was appended.
 *
 * *reservation_id is what the entries belong to; NEW_RESERVATION is replaced
 * by the number that was drawn.
 */
int64
ledger_append(Pool *pool, const Request *request, int64 *reservation_id)
{
	int64		first_entry_id = 0;
	int			parts = request->shortfall ? 1 : 0;

	for (int i = 0; i < pool->ntranches; i++)
		parts += is_changed(pool->tranche[i], pool->tranche[i]->logged);

	for (int i = 0; i < pool->ntranches; i++)
	{
		Tranche    *tranche = pool->tranche[i];
		Statement  *statement = &append_statement;
		Parameters	parameters = {0};
		bool		isnull;

		if (!is_changed(tranche, tranche->logged))
			continue;
		if (tranche->is_new)
			statement = &append_new_tranche_statement;
		else if (*reservation_id == NEW_RESERVATION)
			statement = &append_new_reservation_statement;

		add_entry(&parameters, pool, request, tranche, *reservation_id, first_entry_id, parts);
		if (!append(statement, &parameters, request, &first_entry_id))
			return 0;
		tranche->tranche_id = DatumGetInt64(statement_value(0, 2, &isnull));
		if (*reservation_id == NEW_RESERVATION)
			*reservation_id = DatumGetInt64(statement_value(0, 3, &isnull));
		memcpy(tranche->logged, tranche->balance, sizeof(tranche->logged));
	}
	if (request->shortfall)
	{
		Parameters	parameters = {0};

		add_entry(&parameters, pool, request, NULL, *reservation_id, first_entry_id, parts);
		append(&append_statement, &parameters, request, &first_entry_id);
	}

	return first_entry_id;
}

/* Runs a statement that writes a tranche, and keeps where its row is now. */
static void
write_tranche(const Pool *pool, Tranche *tranche, Statement *statement, Parameters *parameters)
{
	bool		isnull;

	if (statement_execute(statement, parameters) != 1)
		changed_behind(pool, tranche);
	tranche->tid = *(ItemPointer) DatumGetPointer(statement_value(0, 1, &isnull));
}

static void
create_tranche(const Pool *pool, Tranche *tranche)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, pool->credit);
	parameter_add(&parameters, Int64GetDatum(tranche->tranche_id));
	add_state(&parameters, tranche);
	parameter_add(&parameters, Int32GetDatum(tranche->priority));
	add_instant(&parameters, tranche->expires_at);
	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	parameter_add_pointer(&parameters, cstring_to_text(tranche->lease_id ? "upstream" : "grant"));
	parameter_add_pointer(&parameters, tranche->server);
	parameter_add_pointer(&parameters, tranche->lease_id);
	write_tranche(pool, tranche, &create_statement, &parameters);
	tranche->is_new = false;
}

static void
change_tranche(const Pool *pool, Tranche *tranche)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, &tranche->tid);
	add_state(&parameters, tranche);
	write_tranche(pool, tranche, &change_statement, &parameters);
}

/* Writes the row that a tranche has in the call's own stripe. */
static void
save_stripe(const Pool *pool, Tranche *tranche)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	if (tranche->has_row)
		parameter_add_pointer(&parameters, &tranche->tid);
	else
	{
		parameter_add_pointer(&parameters, pool->credit);
		parameter_add(&parameters, Int64GetDatum(tranche->tranche_id));
		parameter_add(&parameters, Int32GetDatum(pool->stripe));
	}
	add_balance(&parameters, tranche);
	write_tranche(pool, tranche, tranche->has_row ? &change_stripe_statement : &create_stripe_statement, &parameters);
	tranche->has_row = true;
}

/*
 * ledger_ask_for_more
 *		Has more asked for once a lease falls below what it should have, when
 *		the transaction commits; the worker looks by itself as well. To be
 *		called before what is stored is what is in memory.
 */
void
ledger_ask_for_more(const Pool *pool, const Tranche *tranche)
{
	Numeric		below = tranche->refill_below;

	if (below && (!pool->striped || pool->looked) && amount_compare(amount_add(tranche->balance[REMAINING], tranche->elsewhere), below) <= 0 &&
		amount_compare(amount_add(tranche->stored[REMAINING], tranche->elsewhere), below) > 0)
		demand_at_commit(WAKE_FOR_LEASES);
}

static void
change_lease(const Pool *pool, Tranche *tranche)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, &tranche->tid);
	add_instant(&parameters, tranche->expires_at);
	add_instant(&parameters, tranche->released_at);
	add_instant(&parameters, tranche->trusted_until);
	parameter_add_pointer(&parameters, tranche->overdrawn);
	write_tranche(pool, tranche, &change_lease_statement, &parameters);
	tranche->stored_expires_at = tranche->expires_at;
	tranche->stored_released_at = tranche->released_at;
	tranche->stored_trusted_until = tranche->trusted_until;
	tranche->stored_overdrawn = tranche->overdrawn;
}

/*
 * ledger_save
 *		Writes the tranches that have changed since they were read or saved,
 *		or their rows in the call's stripe, and what was gathered from others.
 *		What was moved must have been appended to the ledger.
 */
void
ledger_save(Pool *pool)
{
	for (int i = 0; i < pool->ntranches; i++)
	{
		Tranche    *tranche = pool->tranche[i];

		Assert(!is_changed(tranche, tranche->logged));
		if (is_changed(tranche, tranche->stored) ||
			(!tranche->in_stripe && tranche->hold_expires_at != tranche->stored_hold_expires_at))
		{
			if (tranche->in_stripe)
				save_stripe(pool, tranche);
			else if (tranche->is_new)
				create_tranche(pool, tranche);
			else
				change_tranche(pool, tranche);
			ledger_ask_for_more(pool, tranche);
			memcpy(tranche->stored, tranche->balance, sizeof(tranche->stored));
			tranche->stored_hold_expires_at = tranche->hold_expires_at;
		}
		if (tranche->expires_at != tranche->stored_expires_at ||
			tranche->released_at != tranche->stored_released_at ||
			tranche->trusted_until != tranche->stored_trusted_until ||
			tranche->overdrawn != tranche->stored_overdrawn)
			change_lease(pool, tranche);
	}
	if (pool->stripe != 0)
	{
		stripe_remember(pool, pool->donors != NIL);
		gather_save(pool);
	}
}

/* Returns a number between those of the entries before it and after it, for what is no entry. */
int64
ledger_draw_number(void)
{
	Parameters	parameters = {0};
	bool		isnull;

	statement_execute(&draw_statement, &parameters);
	return DatumGetInt64(statement_value(0, 1, &isnull));
}

/* Appends and saves; see ledger_append(). */
int64
ledger_post(Pool *pool, const Request *request, int64 *reservation_id)
{
	int64		entry_id = ledger_append(pool, request, reservation_id);

	if (entry_id != 0)
		ledger_save(pool);
	return entry_id;
}
