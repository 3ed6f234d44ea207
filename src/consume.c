/*
 * consume.c
 *		lease_consume() and lease_try_consume(): credit that is spent at once.
 *
 * Locks: the account, or stripes of it.
 */
#include "postgres.h"

#include "argument.h"
#include "ledger.h"
#include "reclaim.h"
#include "statement.h"
#include "supply.h"

static const EntryKind kind_consume = {.name = "consume", .bucket = CONSUMED};

static Datum
consume(FunctionCallInfo fcinfo, bool try)
{
	Request		request = {.kind = &kind_consume};
	Pool		pool = {0};
	int64		reservation_id = NO_RESERVATION;
	Numeric		amount;
	int64		entry_id = 0;
	bool		refused;
	bool		replayed = false;
	FirstCall	first = {0};
	MemoryContext caller;
	Datum		values[5];
	bool		nulls[5] = {false};

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	request.credit = pool.credit = argument_text(fcinfo, 1, "credit");
	request.amount = amount = argument_amount(fcinfo, 2, "amount", AMOUNT_POSITIVE);
	request.key = argument_optional_text(fcinfo, 3, "idempotency_key");
	request.metadata = argument_optional_jsonb(fcinfo, 4);
	caller = statement_begin();

	supply_lock(&pool, &request, amount);
	refused = !reclaim_cover(&pool, amount) || pool_is_frozen(&pool);
	if (!refused)
	{
		pool_take(&pool, amount, CONSUMED);
		entry_id = ledger_post(&pool, &request, &reservation_id);
	}
	if (entry_id == 0)
	{
		replayed = request_find_first(&request, !refused, &first);
		if (replayed)
			refused = false;
		else if (!try)
			pool_refuse(&pool, amount);
	}

	values[0] = BoolGetDatum(!refused);
	values[1] = Int64GetDatum(replayed ? first.entry_id : entry_id);
	nulls[1] = refused;
	values[2] = NumericGetDatum(refused ? amount_zero() : amount);
	values[3] = NumericGetDatum(replayed ? first.available : pool.available);
	values[4] = BoolGetDatum(replayed);
	return statement_end(caller, fcinfo, values, nulls);
}

/*
 * lease_consume(account, credit, amount, idempotency_key, metadata)
 *		Spends an amount in burn order and returns what was done. Raises LC001,
 *		LC002, LC007, LC008 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_consume);
Datum
lease_consume(PG_FUNCTION_ARGS)
{
	return consume(fcinfo, false);
}

/*
 * lease_try_consume(account, credit, amount, idempotency_key, metadata)
 *		The same, but returns applied = false where that raises LC001, LC007 or LC008.
 */
PG_FUNCTION_INFO_V1(lease_try_consume);
Datum
lease_try_consume(PG_FUNCTION_ARGS)
{
	return consume(fcinfo, true);
}
