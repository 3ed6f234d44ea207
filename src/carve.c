/*
 * carve.c
 *		lease_chunk_allocate(), lease_chunk(), lease_chunk_renew() and
 *		lease_chunk_release(): a chunk of a pool, but for what is spent of it.
 *
 * Locks: the account, or a stripe of it, where amounts of the pool move, that
 * is to allocate and to release, and the chunk after it; to renew, the chunk alone; to look,
 * nothing.
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "argument.h"
#include "chunk.h"
#include "clock.h"
#include "hold.h"
#include "ledger.h"
#include "reclaim.h"
#include "statement.h"
#include "supply.h"

static const EntryKind kind_chunk = {.name = "chunk", .bucket = CHUNKED};

/* Returns a chunk as it is by the clock. */
static Datum
return_chunk(MemoryContext caller, FunctionCallInfo fcinfo, text *account,
			 const Chunk *chunk, TimestampTz now, bool replayed)
{
	Datum		values[9];
	bool		nulls[9] = {false};

	values[0] = Int64GetDatum(chunk->chunk_id);
	values[1] = PointerGetDatum(account);
	values[2] = PointerGetDatum(chunk->credit);
	values[3] = PointerGetDatum(chunk->owner);
	values[4] = NumericGetDatum(chunk->granted);
	values[5] = NumericGetDatum(chunk_is_alive(chunk, now) ? chunk->remaining : amount_zero());
	values[6] = TimestampTzGetDatum(chunk->expires_at);
	values[7] = CStringGetTextDatum(chunk_status(chunk, now));
	values[8] = BoolGetDatum(replayed);
	return statement_end(caller, fcinfo, values, nulls);
}

/*
 * lease_chunk_allocate(account, credit, amount, owner, ttl, idempotency_key)
 *		Carves an amount out of a pool, in burn order, as a chunk that lives
 *		until ttl from now, or as long as all of what it came from. Raises
 *		LC001, LC002, LC007, LC008 and LC009, and LC004 or LC005 where the key
 *		made a chunk that has ended.
 */
PG_FUNCTION_INFO_V1(lease_chunk_allocate);
Datum
lease_chunk_allocate(PG_FUNCTION_ARGS)
{
	Request		request = {.kind = &kind_chunk};
	Pool		pool = {0};
	Chunk		chunk = {0};
	Numeric		amount;
	Interval   *ttl;
	int64		entry_id = 0;
	bool		refused;
	bool		replayed = false;
	FirstCall	first = {0};
	MemoryContext caller;

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	request.credit = pool.credit = argument_text(fcinfo, 1, "credit");
	request.amount = amount = argument_amount(fcinfo, 2, "amount", AMOUNT_POSITIVE);
	chunk.owner = argument_text(fcinfo, 3, "owner");
	ttl = argument_optional_ttl(fcinfo, 4, "ttl", clock_now());
	request.key = argument_optional_text(fcinfo, 5, "idempotency_key");
	caller = statement_begin();
	request_add_text(&request, "owner", chunk.owner);
	request_add_interval(&request, "ttl", ttl);
	request_end_arguments(&request);

	supply_lock(&pool, &request, amount);
	refused = !reclaim_cover(&pool, amount) || pool_is_frozen(&pool);
	if (!refused)
	{
		pool_take(&pool, amount, CHUNKED);
		chunk_collect(&pool, &chunk, hold_expiry(&pool, ttl));
		chunk.credit = pool.credit;
		chunk.chunk_id = chunk_draw_number();
		entry_id = ledger_post(&pool, &request, &chunk.chunk_id);
		if (entry_id != 0)
			chunk_create(&pool, &chunk);
	}
	if (entry_id == 0)
	{
		replayed = request_find_first(&request, !refused, &first);
		if (!replayed)
			pool_refuse(&pool, amount);
		if (!chunk_find(pool.account, first.reservation_id, false, &chunk))
			chunk_not_found(pool.account, first.reservation_id);
		if (!chunk_is_alive(&chunk, pool.now))
			chunk_has_ended(pool.account, &chunk);
	}
	return return_chunk(caller, fcinfo, pool.account, &chunk, pool.now, replayed);
}

/*
 * lease_chunk(account, chunk_id)
 *		Returns what a chunk is now. Raises LC003 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_chunk);
Datum
lease_chunk(PG_FUNCTION_ARGS)
{
	text	   *account = argument_text(fcinfo, 0, "account");
	int64		chunk_id = argument_id(fcinfo, 1, "chunk_id");
	Chunk		chunk;
	MemoryContext caller = statement_begin();

	if (!chunk_find(account, chunk_id, true, &chunk))
		chunk_not_found(account, chunk_id);
	return return_chunk(caller, fcinfo, account, &chunk, clock_now(), false);
}

/*
 * lease_chunk_renew(account, chunk_id, owner, ttl)
 *		Lets a chunk live until ttl from now, if that is later than it would
 *		have, and as long as all of what it came from. Raises LC003, LC004,
 *		LC005, LC006, LC007 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_chunk_renew);
Datum
lease_chunk_renew(PG_FUNCTION_ARGS)
{
	Pool		pool = {0};
	int64		chunk_id;
	Chunk		chunk;
	text	   *owner;
	Interval   *ttl;
	TimestampTz expires_at;
	char	   *reason;
	MemoryContext caller;

	pool.account = argument_text(fcinfo, 0, "account");
	chunk_id = argument_id(fcinfo, 1, "chunk_id");
	owner = argument_text(fcinfo, 2, "owner");
	ttl = argument_optional_ttl(fcinfo, 3, "ttl", clock_now());
	caller = statement_begin();

	chunk_lock(pool.account, chunk_id, owner, &chunk);
	pool.now = clock_now();
	pool.credit = chunk.credit;
	if (!chunk_is_alive(&chunk, pool.now))
		chunk_has_ended(pool.account, &chunk);
	if (chunk_is_frozen(pool.account, &chunk, &reason))
		pool_refuse_frozen(&pool, reason);

	expires_at = Min(hold_expiry(&pool, ttl), chunk_latest_expiry(pool.account, &chunk));
	if (expires_at > chunk.expires_at)
	{
		chunk.expires_at = expires_at;
		chunk_renew(pool.account, &chunk);
	}
	return return_chunk(caller, fcinfo, pool.account, &chunk, pool.now, false);
}

/*
 * lease_chunk_release(account, chunk_id, owner)
 *		Ends a chunk: what was spent of it is spent of the tranches that it came
 *		from, and the rest goes back to them. A chunk that was released before
 *		is replayed. Raises LC003, LC004, LC006 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_chunk_release);
Datum
lease_chunk_release(PG_FUNCTION_ARGS)
{
	Pool		pool = {0};
	AccountMarks marks;
	int64		chunk_id;
	Chunk		chunk;
	text	   *owner;
	bool		replayed;
	MemoryContext caller;

	pool.account = argument_text(fcinfo, 0, "account");
	chunk_id = argument_id(fcinfo, 1, "chunk_id");
	owner = argument_text(fcinfo, 2, "owner");
	caller = statement_begin();

	if (!account_lock_unless_striped(pool.account, &marks))
	{
		if (!chunk_find(pool.account, chunk_id, false, &chunk))
			chunk_not_found(pool.account, chunk_id);
		pool.credit = chunk.credit;
		pool_lock(&pool, NULL);
	}
	chunk_lock(pool.account, chunk_id, owner, &chunk);
	pool.credit = chunk.credit;
	/* by the clock before a wait for the chunk, it might not have expired */
	pool.now = clock_now();
	pool_read(&pool);
	replayed = chunk.status == CHUNK_RELEASED;
	if (!replayed)
	{
		if (!chunk_is_alive(&chunk, pool.now))
			chunk_has_ended(pool.account, &chunk);
		reclaim_lapsed(&pool);
		chunk_release(&pool, &chunk);
	}
	return return_chunk(caller, fcinfo, pool.account, &chunk, pool.now, replayed);
}
