/*
 * chunk_consume.c
 *		lease_chunk_consume() and lease_try_chunk_consume(): what an owner
 *		spends of his chunk.
 *
 * Three statements: lock the chunk's row, append the ledger's entry, write the
 * row. The entry comes before the row because its key decides whether the call
 * happens, as in ledger.c.
 *
 * Locks: the chunk. Neither the account nor its tranches, so that owners of
 * chunks of one pool do not meet; but where two requests of an account use one
 * key at a time, which only a mistake makes them do if they are not about the
 * same chunk, the second waits for the first to end.
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "argument.h"
#include "chunk.h"
#include "clock.h"
#include "errors.h"
#include "request.h"
#include "statement.h"

/* As far as keys are concerned, the same as what consume.c does. */
static const EntryKind kind_consume = {.name = "consume", .bucket = CONSUMED};

/*
 * Spends an amount that a locked chunk has and returns true; returns false, and
 * nothing has happened, where the request's key is taken.
 */
static bool
spend(const Request *request, Chunk *chunk, TimestampTz now)
{
	if (!chunk_append(request, chunk, now))
		return false;
	chunk_spend(request->account, chunk, request->amount);
	return true;
}

pg_noreturn static void
refuse_short(const Chunk *chunk, Numeric requested)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_INSUFFICIENT_CREDIT),
			 errmsg("not enough credit in chunk " INT64_FORMAT, chunk->chunk_id),
			 errdetail("Available: %s, requested: %s.",
					   amount_out(chunk->remaining), amount_out(requested)),
			 errhint("Allocate another chunk with credit_lease.lease_chunk_allocate().")));
}

static Datum
consume(FunctionCallInfo fcinfo, bool try)
{
	Request		request = {.kind = &kind_consume};
	Chunk		chunk;
	int64		chunk_id;
	text	   *owner;
	TimestampTz now;
	char	   *reason;
	bool		alive;
	bool		frozen;
	bool		covered;
	bool		applied;
	FirstCall	first = {0};
	bool		replayed = false;
	MemoryContext caller;
	Datum		values[5];
	bool		nulls[5] = {false};

	request.account = argument_text(fcinfo, 0, "account");
	chunk_id = argument_id(fcinfo, 1, "chunk_id");
	request.amount = argument_amount(fcinfo, 2, "amount", AMOUNT_POSITIVE);
	owner = argument_text(fcinfo, 3, "owner");
	request.key = argument_optional_text(fcinfo, 4, "idempotency_key");
	caller = statement_begin();
	request_add_int64(&request, "chunk_id", chunk_id);
	request_add_text(&request, "owner", owner);
	request_end_arguments(&request);

	chunk_lock(request.account, chunk_id, owner, &chunk);
	now = clock_now();
	alive = chunk_is_alive(&chunk, now);
	frozen = alive && chunk_is_frozen(request.account, &chunk, &reason);
	covered = alive && !frozen && amount_compare(request.amount, chunk.remaining) <= 0;
	applied = covered && spend(&request, &chunk, now);
	if (!applied)
	{
		replayed = request_find_first(&request, covered, &first);
		if (!replayed && !alive)
			chunk_has_ended(request.account, &chunk);
		if (!replayed && !try)
		{
			if (frozen)
				pool_refuse_frozen(&(Pool) {.account = request.account, .credit = chunk.credit}, reason);
			refuse_short(&chunk, request.amount);
		}
	}

	values[0] = BoolGetDatum(applied || replayed);
	values[1] = Int64GetDatum(chunk_id);
	values[2] = NumericGetDatum(replayed ? first.available : chunk.remaining);
	values[3] = TimestampTzGetDatum(chunk.expires_at);
	values[4] = BoolGetDatum(replayed);
	return statement_end(caller, fcinfo, values, nulls);
}

/*
 * lease_chunk_consume(account, chunk_id, amount, owner, idempotency_key)
 *		Spends an amount of a chunk and returns what remains of it. Raises
 *		LC001, LC002, LC003, LC004, LC005, LC006, LC007 and LC009. A replay is
 *		answered even when the chunk has ended since: it was spent.
 */
PG_FUNCTION_INFO_V1(lease_chunk_consume);
Datum
lease_chunk_consume(PG_FUNCTION_ARGS)
{
	return consume(fcinfo, false);
}

/*
 * lease_try_chunk_consume(account, chunk_id, amount, owner, idempotency_key)
 *		The same, but returns applied = false where that raises LC001 or LC007.
 */
PG_FUNCTION_INFO_V1(lease_try_chunk_consume);
Datum
lease_try_chunk_consume(PG_FUNCTION_ARGS)
{
	return consume(fcinfo, true);
}
