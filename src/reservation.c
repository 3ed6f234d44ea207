/*
 * reservation.c
 *		lease_reserve(), lease_try_reserve(), lease_renew() and lease_cancel():
 *		a hold, until something is spent of it.
 *
 * Locks: the account, or stripes of it.
 */
#include "postgres.h"

#include "utils/timestamp.h"

#include "argument.h"
#include "clock.h"
#include "hold.h"
#include "ledger.h"
#include "reclaim.h"
#include "statement.h"
#include "supply.h"

static const EntryKind kind_reserve = {.name = "reserve", .bucket = RESERVED};
static const EntryKind kind_renew = {.name = "renew", .bucket = RESERVED};

static Datum
reserve(FunctionCallInfo fcinfo, bool try)
{
	Request		request = {.kind = &kind_reserve};
	Pool		pool = {0};
	Hold		hold = {.reservation_id = NEW_RESERVATION};
	Numeric		amount;
	Numeric		least;
	Numeric		min_amount;
	Interval   *ttl;
	int64		entry_id = 0;
	bool		refused;
	bool		replayed = false;
	FirstCall	first = {0};
	MemoryContext caller;
	Datum		values[6];
	bool		nulls[6] = {false};

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	request.credit = pool.credit = argument_text(fcinfo, 1, "credit");
	amount = argument_amount(fcinfo, 2, "amount", AMOUNT_POSITIVE);
	ttl = argument_optional_ttl(fcinfo, 3, "ttl", clock_now());
	request.key = argument_optional_text(fcinfo, 4, "idempotency_key");
	min_amount = argument_optional_amount(fcinfo, 5, "min_amount", AMOUNT_POSITIVE);
	least = min_amount ? min_amount : amount;
	if (amount_compare(least, amount) > 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("min_amount must not be more than amount")));
	request.metadata = argument_optional_jsonb(fcinfo, 6);
	caller = statement_begin();
	request_add_amount(&request, "amount", amount);
	request_add_interval(&request, "ttl", ttl);
	request_add_amount(&request, "min_amount", min_amount);
	request_end_arguments(&request);

	pool.wanted = amount;
	supply_lock(&pool, &request, least);
	refused = !(reclaim_cover(&pool, amount) || reclaim_cover(&pool, least)) ||
		pool_is_frozen(&pool);
	if (!refused)
	{
		pool_take(&pool, reclaim_reach(&pool, amount), RESERVED);
		hold_collect(&pool, &hold, hold_expiry(&pool, ttl));
		entry_id = ledger_post(&pool, &request, &hold.reservation_id);
		if (entry_id != 0)
			hold_create(&pool, &hold, request.metadata);
	}
	if (entry_id == 0)
	{
		replayed = request_find_first(&request, !refused, &first);
		if (!replayed && !try)
			pool_refuse(&pool, least);
		refused = !replayed;
	}
	if (replayed)
	{
		if (!hold_find(pool.account, first.reservation_id, &hold))
			hold_not_found(pool.account, first.reservation_id);
		if (!hold_is_alive(&pool, &hold))
			hold_has_ended(&pool, &hold);
		hold.amount = first.amount;
	}

	values[0] = BoolGetDatum(!refused);
	values[1] = Int64GetDatum(hold.reservation_id);
	nulls[1] = refused;
	values[2] = NumericGetDatum(refused ? amount_zero() : hold.amount);
	values[3] = NumericGetDatum(replayed ? first.available : pool.available);
	values[4] = TimestampTzGetDatum(hold.expires_at);
	nulls[4] = refused;
	values[5] = BoolGetDatum(replayed);
	return statement_end(caller, fcinfo, values, nulls);
}

/*
 * lease_reserve(account, credit, amount, ttl, idempotency_key, min_amount, metadata)
 *		Holds an amount, or with min_amount as much of it as there is, and
 *		returns the hold. Raises LC001, LC002, LC007, LC008 and LC009, and LC004 or
 *		LC005 where the key made a hold that has ended.
 */
PG_FUNCTION_INFO_V1(lease_reserve);
Datum
lease_reserve(PG_FUNCTION_ARGS)
{
	return reserve(fcinfo, false);
}

/*
 * lease_try_reserve(account, credit, amount, ttl, idempotency_key, min_amount, metadata)
 *		The same, but returns applied = false where that raises LC001, LC007 or LC008.
 */
PG_FUNCTION_INFO_V1(lease_try_reserve);
Datum
lease_try_reserve(PG_FUNCTION_ARGS)
{
	return reserve(fcinfo, true);
}

/*
 * lease_cancel(account, reservation_id)
 *		Gives a hold back and returns true, also where that has happened
 *		before; returns false where it was settled. Raises LC003 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_cancel);
Datum
lease_cancel(PG_FUNCTION_ARGS)
{
	Pool		pool = {0};
	int64		reservation_id;
	Hold		hold;
	bool		given_back;

	pool.account = argument_text(fcinfo, 0, "account");
	reservation_id = argument_id(fcinfo, 1, "reservation_id");
	statement_begin();

	reclaim_lock_hold(&pool, reservation_id, &hold, NULL, NULL, true);
	if (hold_is_alive(&pool, &hold))
	{
		reclaim_lapsed(&pool);
		reclaim_hold(&pool, &hold, HOLD_CANCELLED);
	}
	else if (hold.status == HOLD_HELD)
		reclaim_hold(&pool, &hold, HOLD_EXPIRED);
	given_back = hold.status != HOLD_SETTLED;
	SPI_finish();
	PG_RETURN_BOOL(given_back);
}

static Numeric
added_amount(const Hold *hold, const void *added)
{
	return (Numeric) added;
}

/*
 * lease_renew(account, reservation_id, ttl, add_amount)
 *		Lets a hold live until ttl from now, if that is later than it would
 *		have, and adds an amount to it. Raises LC001, LC003, LC004, LC005,
 *		LC007 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_renew);
Datum
lease_renew(PG_FUNCTION_ARGS)
{
	Request		request = {.kind = &kind_renew};
	Pool		pool = {0};
	int64		reservation_id;
	Hold		hold;
	Numeric		added;
	Interval   *ttl;
	MemoryContext caller;
	Datum		values[3];
	bool		nulls[3] = {false};

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	reservation_id = argument_id(fcinfo, 1, "reservation_id");
	ttl = argument_optional_ttl(fcinfo, 2, "ttl", clock_now());
	added = argument_amount(fcinfo, 3, "add_amount", AMOUNT_NOT_NEGATIVE);
	caller = statement_begin();

	reclaim_lock_hold(&pool, reservation_id, &hold, added_amount, added, true);
	if (!hold_is_alive(&pool, &hold))
		hold_has_ended(&pool, &hold);
	reclaim_lapsed(&pool);
	if (!reclaim_cover(&pool, added) || pool_is_frozen(&pool))
		pool_refuse(&pool, added);

	pool_take(&pool, added, RESERVED);
	hold_collect(&pool, &hold, Max(hold.expires_at, hold_expiry(&pool, ttl)));
	if (amount_sign(added) > 0)
		ledger_post(&pool, &request, &hold.reservation_id);
	hold_renew(&pool, &hold);

	values[0] = Int64GetDatum(hold.reservation_id);
	values[1] = NumericGetDatum(hold.amount);
	values[2] = TimestampTzGetDatum(hold.expires_at);
	return statement_end(caller, fcinfo, values, nulls);
}
