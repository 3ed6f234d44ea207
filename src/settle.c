/*
 * settle.c
 *		lease_settle() and lease_track(): what was spent of a hold.
 *
 * A hold is settled by an amount of credit, and its usage reported as such. One
 * of lease_check() is better tracked, by a quantity, which costs what it did
 * when the hold was made, and is reported as a quantity, once. That it was used
 * is a fact, whatever has become of the hold: when it has expired, the pool is
 * charged what it still has.
 *
 * Locks: the account, or stripes of it, and the hold.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"

#include "argument.h"
#include "clock.h"
#include "errors.h"
#include "hold.h"
#include "ledger.h"
#include "meter.h"
#include "reclaim.h"
#include "report.h"
#include "settle.h"
#include "statement.h"

static const EntryKind kind_settle = {.name = "settle", .bucket = CONSUMED, .settles = true};
static const EntryKind kind_track = {.name = "track", .bucket = CONSUMED, .settles = true};

typedef enum Overage
{
	OVERAGE_CHARGE,
	OVERAGE_CLAMP,
	OVERAGE_REFUSE
} Overage;

static const char *const overage_word[] = {"charge", "clamp", "refuse"};

static Statement first_statement = {
	.sql = "SELECT l.available, l.metadata FROM credit_lease.ledger l"
	" WHERE l.account = $1 AND l.entry_id = $2",
	.nargs = 2,
	.argtypes = {TEXTOID, INT8OID}
};

/*
 * Returns what the pool had available after the call whose first entry it is,
 * and its metadata; or what it has now, if that call left no entry.
 */
static Numeric
find_first_available(const Pool *pool, int64 entry_id, Jsonb **metadata)
{
	Parameters	parameters = {0};
	bool		isnull;
	Datum		value;

	*metadata = NULL;
	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int64GetDatum(entry_id));
	if (statement_execute(&first_statement, &parameters) == 0)
		return pool->available;
	value = statement_value(0, 2, &isnull);
	if (!isnull)
		*metadata = DatumGetJsonbP(value);
	return DatumGetNumeric(statement_value(0, 1, &isnull));
}

/* Spends an amount that no hold has, as far as it goes, and records the rest. */
static void
charge_pool(Pool *pool, Hold *hold, Numeric amount)
{
	Numeric		charged = amount_zero();

	if (!pool_is_frozen(pool))
	{
		charged = reclaim_reach(pool, amount);
		pool_take(pool, charged, CONSUMED);
	}
	hold->consumed = amount_add(hold->consumed, charged);
	hold->shortfall = amount_subtract(amount, charged);
}

/* Spends an amount out of a hold that is alive, and gives the rest back. */
static void
spend(Pool *pool, Hold *hold, Numeric amount, Overage overage)
{
	Numeric		held = amount_min(amount, hold->amount);
	Numeric		excess = amount_subtract(amount, held);

	reclaim_lapsed(pool);
	if (overage == OVERAGE_CHARGE)
		reclaim_cover(pool, excess);
	hold_release(pool, hold, held);
	if (overage == OVERAGE_CHARGE)
		charge_pool(pool, hold, excess);
	else
		hold->shortfall = excess;
	hold->status = HOLD_SETTLED;
	hold->overage = cstring_to_text(overage_word[overage]);
}

static void
require_settlement(const Hold *hold)
{
	if (!hold->consumed || !hold->refunded || !hold->shortfall)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("reservation " INT64_FORMAT " does not say how it was settled",
						hold->reservation_id)));
}

/* Returns what is above a hold of what is to be spent of it, NULL for all. */
static Numeric
excess_amount(const Hold *hold, const void *amount)
{
	return amount ? amount_subtract((Numeric) amount, hold->amount) : amount_zero();
}

/* ... or of what was used; all of that, where the hold has ended. */
static Numeric
excess_of_quantity(const Hold *hold, const void *quantity)
{
	Numeric		amount;

	if (hold->feature == NULL)
		return amount_zero();
	amount = meter_amount((Numeric) quantity, hold->rate, hold->unit);
	return hold->status == HOLD_HELD && hold->expires_at > clock_now() ? amount_subtract(amount, hold->amount) : amount;
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
	bool		replayed;
	Jsonb	   *metadata;
	MemoryContext caller;
	Datum		values[7];
	bool		nulls[7] = {false};

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	reservation_id = argument_id(fcinfo, 1, "reservation_id");
	amount = argument_optional_amount(fcinfo, 2, "amount", AMOUNT_NOT_NEGATIVE);
	overage = argument_word(argument_text(fcinfo, 3, "overage"), "overage",
							overage_word, lengthof(overage_word));
	request.metadata = argument_optional_jsonb(fcinfo, 4);
	caller = statement_begin();

	reclaim_lock_hold(&pool, reservation_id, &hold, overage == OVERAGE_CHARGE ? excess_amount : NULL, amount, false);
	if (amount == NULL)
		amount = hold.amount;

	replayed = hold.status == HOLD_SETTLED;
	if (replayed)
	{
		require_settlement(&hold);
		available = find_first_available(&pool, hold.end_entry_id, &metadata);
		if (amount_compare(amount, amount_add(hold.consumed, hold.shortfall)) != 0 ||
			!hold.overage || strcmp(text_to_cstring(hold.overage), overage_word[overage]) != 0 ||
			(hold.end_entry_id != 0 && !request_same_jsonb(metadata, request.metadata)))
			hold_has_ended(&pool, &hold);
	}
	else
	{
		if (!hold_is_alive(&pool, &hold))
			hold_has_ended(&pool, &hold);
		if (overage == OVERAGE_REFUSE && amount_compare(amount, hold.amount) > 0)
			ereport(ERROR,
					(errcode(ERRCODE_LEASE_INSUFFICIENT_CREDIT),
					 errmsg("reservation " INT64_FORMAT " holds less than is to be settled",
							hold.reservation_id),
					 errdetail("Held: %s, requested: %s.",
							   amount_out(hold.amount), amount_out(amount)),
					 errhint("Hold more with credit_lease.lease_renew(), or let overage be charged.")));

		spend(&pool, &hold, amount, overage);
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
 * Charges what a hold was made for after it has expired: nothing is held for
 * it any more.
 */
static void
charge_late(Pool *pool, Hold *hold, Numeric amount)
{
	if (hold->status == HOLD_HELD)
		reclaim_hold(pool, hold, HOLD_EXPIRED);
	reclaim_cover(pool, amount);
	charge_pool(pool, hold, amount);
}

/* Returns what is charged of a tranche, and not saved yet. */
static Numeric
unsaved(const Tranche *tranche)
{
	return amount_subtract(tranche->balance[CONSUMED], tranche->stored[CONSUMED]);
}

/* Returns whether two tranches of servers are reported as one: leases of the same are. */
static bool
is_told_with(const Tranche *a, const Tranche *b)
{
	return a == b || (!a->is_mirror && !b->is_mirror && b->server &&
					  strcmp(text_to_cstring(a->server), text_to_cstring(b->server)) == 0);
}

/* Returns what a tranche of a server is reported for; nothing where another one before it is. */
static Numeric
paid_by(const Pool *pool, int payer)
{
	Numeric		paid = amount_zero();

	for (int i = 0; i < pool->ntranches; i++)
	{
		Numeric		spent = unsaved(pool->tranche[i]);

		if (amount_sign(spent) == 0 || !is_told_with(pool->tranche[payer], pool->tranche[i]))
			continue;
		if (i < payer)
			return amount_zero();
		paid = amount_add(paid, spent);
	}
	return paid;
}

/*
 * settle_report
 *		Has the usage reported that is to be charged and not saved yet, once:
 *		where several leases of a server have paid, as that of the first; where
 *		several servers have, or a mirror beside them, to each of them its part,
 *		and with the first what was missing and what does not divide. A part of
 *		less than the smallest quantity is reported as credits. What a grant of
 *		our own has paid is no business of the upstream's: where it has paid a
 *		part, so much less is reported.
 */
void
settle_report(const Pool *pool, const Hold *hold, const char *key)
{
	Numeric		amount = amount_add(hold->consumed, hold->shortfall);
	Numeric		owed = amount;
	Numeric		told = amount_zero();
	Numeric		first_paid = amount_zero();
	const Tranche *first = NULL;
	Numeric		quantity;

	for (int i = 0; i < pool->ntranches; i++)
	{
		const Tranche *tranche = pool->tranche[i];
		Numeric		paid = tranche->server ? paid_by(pool, i) : unsaved(tranche);
		Numeric		part;

		if (amount_sign(paid) == 0)
			continue;
		if (tranche->server && first == NULL)
		{
			first = tranche;
			first_paid = paid;
			continue;
		}
		part = tranche->server ? amount_part(hold->tracked, paid, amount) : amount_zero();
		told = amount_add(told, part);
		if (amount_sign(part) == 0)
			owed = amount_subtract(owed, paid);
		if (tranche->server)
		{
			Hold		other = *hold;

			other.track_entry_id = ledger_draw_number();
			report_usage(pool, &other, tranche->tranche_id, paid, part,
						 psprintf("%s:" INT64_FORMAT, key, tranche->tranche_id));
		}
	}
	if (amount_sign(owed) == 0)
		return;
	quantity = amount_compare(owed, amount) == 0 ? hold->tracked : amount_part(hold->tracked, owed, amount);
	report_usage(pool, hold, first ? first->tranche_id : 0, first_paid, amount_subtract(quantity, told), key);
}

/*
 * Returns the key by which the upstream counts what was used of a hold once,
 * with the hold's time in microseconds of the Unix epoch.
 */
static char *
usage_key(const Pool *pool, const Hold *hold)
{
	return psprintf("%s:" INT64_FORMAT ":" INT64_FORMAT, text_to_cstring(pool->account), hold->reservation_id,
					hold->created_at + (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY);
}

/*
 * lease_track(account, reservation_id, quantity, traits)
 *		Settles a hold of lease_check() with what was used, by the rate at which
 *		it was made: above it the pool is charged as far as it goes. Where it
 *		has expired, the pool is charged for all. What was used is reported
 *		once. Raises LC003, LC005 where the hold has been cancelled, settled, or
 *		tracked with something else, and LC009; and 22023 for other holds.
 */
PG_FUNCTION_INFO_V1(lease_track);
Datum
lease_track(PG_FUNCTION_ARGS)
{
	Request		request = {.kind = &kind_track};
	Pool		pool = {0};
	int64		reservation_id;
	Hold		hold;
	Numeric		quantity;
	Numeric		available;
	Jsonb	   *metadata;
	char	   *key;
	MemoryContext caller;
	Datum		values[6];
	bool		nulls[6] = {false};

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	reservation_id = argument_id(fcinfo, 1, "reservation_id");
	quantity = argument_amount(fcinfo, 2, "quantity", AMOUNT_NOT_NEGATIVE);
	request.metadata = argument_optional_jsonb(fcinfo, 3);
	if (request.metadata && !JB_ROOT_IS_OBJECT(request.metadata))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("traits must be a JSON object")));
	caller = statement_begin();

	reclaim_lock_hold(&pool, reservation_id, &hold, excess_of_quantity, quantity, false);
	if (hold.feature == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("reservation_id " INT64_FORMAT " was not made by lease_check()", reservation_id),
				 errhint("Settle it with credit_lease.lease_settle().")));
	key = usage_key(&pool, &hold);

	if (hold.track_entry_id != 0)
	{
		require_settlement(&hold);
		available = find_first_available(&pool, hold.track_entry_id, &metadata);
		if (!hold.tracked || amount_compare(quantity, hold.tracked) != 0 ||
			!request_same_jsonb(hold.traits, request.metadata))
			ereport(ERROR,
					(errcode(ERRCODE_LEASE_ENDED),
					 errmsg("reservation " INT64_FORMAT " is already tracked", reservation_id)));
	}
	else
	{
		Numeric		amount = meter_amount(quantity, hold.rate, hold.unit);
		bool		alive = hold_is_alive(&pool, &hold);

		if (amount_has_too_many_digits(amount))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("quantity costs more than an amount can be")));
		if (alive)
			spend(&pool, &hold, amount, OVERAGE_CHARGE);
		else if (hold.status == HOLD_HELD || hold.status == HOLD_EXPIRED)
			charge_late(&pool, &hold, amount);
		else
			hold_has_ended(&pool, &hold);
		hold.tracked = quantity;
		hold.traits = request.metadata;

		/* ahead of what it looks at being saved */
		hold.track_entry_id = ledger_append(&pool, &request, &hold.reservation_id);
		if (alive)
			hold.end_entry_id = hold.track_entry_id;
		if (hold.track_entry_id == 0)
			hold.track_entry_id = ledger_draw_number();
		settle_report(&pool, &hold, key);
		ledger_save(&pool);
		if (alive)
			hold_end(&pool, &hold);
		else
			hold_track_late(&pool, &hold);
		available = pool.available;
	}

	values[0] = BoolGetDatum(hold.status == HOLD_SETTLED);
	values[1] = NumericGetDatum(hold.consumed);
	values[2] = NumericGetDatum(hold.refunded);
	values[3] = NumericGetDatum(hold.shortfall);
	values[4] = NumericGetDatum(available);
	values[5] = CStringGetTextDatum(key);
	nulls[5] = amount_sign(quantity) == 0;
	return statement_end(caller, fcinfo, values, nulls);
}
