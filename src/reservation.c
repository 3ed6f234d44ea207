/*
 * reservation.c
 *		lease_reserve(), lease_try_reserve(), lease_settle(), lease_cancel()
 *		and lease_renew(): a hold from its beginning to its end.
 *
 * Locks: the account.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "argument.h"
#include "clock.h"
#include "errors.h"
#include "hold.h"
#include "ledger.h"
#include "reclaim.h"
#include "statement.h"
#include "supply.h"

static const EntryKind kind_reserve = {.name = "reserve", .bucket = RESERVED};
static const EntryKind kind_renew = {.name = "renew", .bucket = RESERVED};
static const EntryKind kind_settle = {.name = "settle", .bucket = CONSUMED, .settles = true};
static const EntryKind kind_cancel = {.name = "cancel", .bucket = RESERVED, .negated = true};

typedef enum Overage
{
	OVERAGE_CHARGE,
	OVERAGE_CLAMP,
	OVERAGE_REFUSE
} Overage;

static const char *const overage_word[] = {"charge", "clamp", "refuse"};

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

static Statement settled_statement = {
	.sql = "SELECT l.available FROM credit_lease.ledger l"
	" WHERE l.account = $1 AND l.entry_id = $2 AND l.metadata IS NOT DISTINCT FROM $3",
	.nargs = 3,
	.argtypes = {TEXTOID, INT8OID, JSONBOID}
};

/* Returns when a hold that begins or is renewed now expires. */
static TimestampTz
expiry(const Pool *pool, const Interval *ttl)
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

pg_noreturn static void
no_such_reservation(text *account, int64 reservation_id)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_NOT_FOUND),
			 errmsg("account \"%s\" has no reservation " INT64_FORMAT,
					text_to_cstring(account), reservation_id)));
}

/*
 * Raises what a hold that is no more is answered with: LC004 or LC005. Above
 * READ COMMITTED it may have been renewed since; then locking it is 40001.
 */
pg_noreturn static void
has_ended(const Pool *pool, const Hold *hold)
{
	if (IsolationUsesXactSnapshot())
		hold_lock(pool, hold);

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

static bool
is_alive(const Pool *pool, const Hold *hold)
{
	return hold->status == HOLD_HELD && hold->expires_at > pool->now;
}

/* Locks the account, and reads a hold and its pool. Raises LC003. */
static void
lock_hold(Pool *pool, int64 reservation_id, Hold *hold)
{
	if (!account_lock(pool->account, ACCOUNT_LOCK, &pool->may_be_frozen) ||
		!hold_find(pool->account, reservation_id, hold))
		no_such_reservation(pool->account, reservation_id);
	pool->credit = hold->credit;
	pool_read(pool);
}

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

	supply_lock(&pool, &request, least);
	refused = !(reclaim_cover(&pool, amount) || reclaim_cover(&pool, least)) ||
		pool_is_frozen(&pool);
	if (!refused)
	{
		pool_take(&pool, amount_min(amount, pool.available), RESERVED);
		hold_collect(&pool, &hold, expiry(&pool, ttl));
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
			no_such_reservation(pool.account, first.reservation_id);
		if (!is_alive(&pool, &hold))
			has_ended(&pool, &hold);
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

/* Spends what is asked above the hold, as far as it goes, and records the rest. */
static void
charge_overage(Pool *pool, Hold *hold, Numeric excess, Overage overage)
{
	Numeric		charged = amount_zero();

	if (overage == OVERAGE_CHARGE && !pool_is_frozen(pool))
	{
		charged = amount_min(excess, pool->available);
		pool_take(pool, charged, CONSUMED);
	}
	hold->consumed = amount_add(hold->consumed, charged);
	hold->shortfall = amount_subtract(excess, charged);
}

/*
 * lease_settle(account, reservation_id, amount, overage, metadata)
 *		Spends an amount out of a hold and gives the rest back; see DESIGN 3
 *		for what is asked above the hold. Raises LC001 (overage refuse), LC003,
 *		LC004, LC005 and LC009. A frozen pool settles what it has held: that
 *		was set aside before; it gives nothing above it.
 */
PG_FUNCTION_INFO_V1(lease_settle);
Datum
lease_settle(PG_FUNCTION_ARGS)
{
	Request		request = {.kind = &kind_settle};
	Pool		pool = {0};
	int64		reservation_id;
	Hold		hold;
	Numeric		amount;
	Numeric		available;
	Overage		overage;
	text	   *word;
	bool		replayed;
	MemoryContext caller;
	Datum		values[7];
	bool		nulls[7] = {false};

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	reservation_id = argument_id(fcinfo, 1, "reservation_id");
	amount = argument_optional_amount(fcinfo, 2, "amount", AMOUNT_NOT_NEGATIVE);
	word = argument_text(fcinfo, 3, "overage");
	overage = argument_word(word, "overage", overage_word, lengthof(overage_word));
	request.metadata = argument_optional_jsonb(fcinfo, 4);
	caller = statement_begin();

	lock_hold(&pool, reservation_id, &hold);
	if (amount == NULL)
		amount = hold.amount;

	replayed = hold.status == HOLD_SETTLED;
	if (replayed)
	{
		Parameters	parameters = {0};
		bool		isnull;

		parameter_add_pointer(&parameters, pool.account);
		parameter_add(&parameters, Int64GetDatum(hold.end_entry_id));
		parameter_add_pointer(&parameters, request.metadata);
		if (!hold.consumed || !hold.refunded || !hold.shortfall || !hold.overage)
			ereport(ERROR,
					(errcode(ERRCODE_LEASE_BOOKS),
					 errmsg("reservation " INT64_FORMAT " does not say how it was settled",
							hold.reservation_id)));
		if (amount_compare(amount, amount_add(hold.consumed, hold.shortfall)) != 0 ||
			strcmp(text_to_cstring(hold.overage), overage_word[overage]) != 0 ||
			statement_execute(&settled_statement, &parameters) == 0)
			has_ended(&pool, &hold);
		available = DatumGetNumeric(statement_value(0, 1, &isnull));
	}
	else
	{
		Numeric		spent = amount_min(amount, hold.amount);
		Numeric		excess = amount_subtract(amount, spent);

		if (!is_alive(&pool, &hold))
			has_ended(&pool, &hold);
		if (overage == OVERAGE_REFUSE && amount_sign(excess) > 0)
			ereport(ERROR,
					(errcode(ERRCODE_LEASE_INSUFFICIENT_CREDIT),
					 errmsg("reservation " INT64_FORMAT " holds less than is to be settled",
							hold.reservation_id),
					 errdetail("Held: %s, requested: %s.",
							   amount_out(hold.amount), amount_out(amount)),
					 errhint("Hold more with credit_lease.lease_renew(), or let overage be charged.")));

		reclaim_lapsed(&pool);
		if (overage == OVERAGE_CHARGE)
			reclaim_cover(&pool, excess);
		hold_release(&pool, &hold, spent);
		charge_overage(&pool, &hold, excess, overage);
		hold.status = HOLD_SETTLED;
		hold.overage = word;
		hold.end_entry_id = ledger_post(&pool, &request, &hold.reservation_id);
		hold_end(&pool, &hold);
		available = pool.available;
	}

	values[0] = Int64GetDatum(hold.reservation_id);
	values[1] = NumericGetDatum(hold.amount);
	values[2] = NumericGetDatum(hold.consumed);
	values[3] = NumericGetDatum(hold.refunded);
	values[4] = NumericGetDatum(hold.shortfall);
	values[5] = NumericGetDatum(available);
	values[6] = BoolGetDatum(replayed);
	return statement_end(caller, fcinfo, values, nulls);
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
	Request		request = {0};
	Pool		pool = {0};
	int64		reservation_id;
	Hold		hold;
	bool		given_back;

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	reservation_id = argument_id(fcinfo, 1, "reservation_id");
	statement_begin();

	lock_hold(&pool, reservation_id, &hold);
	if (is_alive(&pool, &hold))
		reclaim_lapsed(&pool);
	if (hold.status == HOLD_HELD)
	{
		bool		alive = is_alive(&pool, &hold);

		request.kind = alive ? &kind_cancel : &kind_expire_hold;
		hold_release(&pool, &hold, amount_zero());
		hold.status = alive ? HOLD_CANCELLED : HOLD_EXPIRED;
		hold.end_entry_id = ledger_post(&pool, &request, &hold.reservation_id);
		hold_end(&pool, &hold);
	}
	given_back = hold.status != HOLD_SETTLED;
	SPI_finish();
	PG_RETURN_BOOL(given_back);
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

	lock_hold(&pool, reservation_id, &hold);
	if (!is_alive(&pool, &hold))
		has_ended(&pool, &hold);
	reclaim_lapsed(&pool);
	if (!reclaim_cover(&pool, added) || pool_is_frozen(&pool))
		pool_refuse(&pool, added);

	pool_take(&pool, added, RESERVED);
	hold_collect(&pool, &hold, Max(hold.expires_at, expiry(&pool, ttl)));
	if (amount_sign(added) > 0)
		ledger_post(&pool, &request, &hold.reservation_id);
	hold_renew(&pool, &hold);

	values[0] = Int64GetDatum(hold.reservation_id);
	values[1] = NumericGetDatum(hold.amount);
	values[2] = TimestampTzGetDatum(hold.expires_at);
	return statement_end(caller, fcinfo, values, nulls);
}
