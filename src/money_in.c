/*
 * money_in.c
 *		lease_topup(), lease_adjust() and lease_refund(): credit that comes in,
 *		is corrected, or comes back.
 *
 * Locks: the account, which topping up creates.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "account.h"
#include "argument.h"
#include "clock.h"
#include "errors.h"
#include "ledger.h"
#include "reclaim.h"
#include "restripe.h"
#include "statement.h"

static const EntryKind kind_topup = {.name = "topup", .bucket = GRANTED};
static const EntryKind kind_adjust_up = {.name = "adjust", .bucket = GRANTED};
static const EntryKind kind_adjust_down = {.name = "adjust", .bucket = REVOKED, .negated = true};
static const EntryKind kind_refund = {.name = "refund", .bucket = CONSUMED, .negated = true};

/*
 * Every entry of the call to which entry $2 belongs, in burn order, with what
 * it consumed and how much of that was refunded.
 */
static Statement consumed_statement = {
	.sql = "SELECT l.entry_id, l.credit, l.tranche_id,"
	" CASE WHEN l.kind IN ('consume', 'settle', 'track') THEN l.amount ELSE 0 END, coalesce(r.amount, 0), l.kind = 'track',"
	" l.kind IN ('chunk_release', 'chunk_expire', 'session_charge', 'session_close', 'session_expire') OR (l.kind = 'consume' AND l.reservation_id IS NOT NULL)"
	" FROM (SELECT coalesce(e.first_entry_id, e.entry_id) AS entry_id FROM credit_lease.ledger e"
	"  WHERE e.account = $1 AND e.entry_id = $2) c"
	" JOIN credit_lease.ledger f ON f.account = $1 AND f.entry_id = c.entry_id"
	" CROSS JOIN LATERAL (SELECT f.*"
	"  UNION ALL (SELECT s.* FROM credit_lease.ledger s WHERE f.parts > 1"
	"   AND s.account = $1 AND s.entry_id > f.entry_id AND s.first_entry_id = f.entry_id"
	"   ORDER BY s.entry_id LIMIT f.parts - 1)) l"
	" LEFT JOIN credit_lease.refund r ON r.account = $1 AND r.entry_id = l.entry_id"
	" ORDER BY l.entry_id",
	.nargs = 2,
	.argtypes = {TEXTOID, INT8OID}
};

static Statement count_refund_statement = {
	.sql = "INSERT INTO credit_lease.refund AS r (account, entry_id, amount) VALUES ($1, $2, $3)"
	" ON CONFLICT (account, entry_id) DO UPDATE SET amount = r.amount + excluded.amount",
	.nargs = 3,
	.argtypes = {TEXTOID, INT8OID, NUMERICOID}
};

/* An entry that consumed something, while it is being refunded. */
typedef struct ConsumedEntry
{
	int64		entry_id;
	int64		tranche_id;
	Numeric		consumed;
	Numeric		refunded;		/* before this call */
	Numeric		refund;			/* by this call */
	bool		tracked;
	bool		of_chunk;
} ConsumedEntry;

/*
 * lease_topup(account, credit, amount, idempotency_key, expires_at, priority, metadata)
 *		Grants an amount as a new tranche. Raises LC002 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_topup);
Datum
lease_topup(PG_FUNCTION_ARGS)
{
	Request		request = {.kind = &kind_topup};
	Pool		pool = {0};
	Tranche    *tranche;
	Numeric		amount;
	TimestampTz expires_at;
	int32		priority;
	int64		reservation_id = NO_RESERVATION;
	FirstCall	first = {0};
	bool		replayed;
	MemoryContext caller;
	Datum		values[5];
	bool		nulls[5] = {false};

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	request.credit = pool.credit = argument_text(fcinfo, 1, "credit");
	request.amount = amount = argument_amount(fcinfo, 2, "amount", AMOUNT_POSITIVE);
	request.key = argument_optional_text(fcinfo, 3, "idempotency_key");
	expires_at = PG_ARGISNULL(4) ? DT_NOEND : PG_GETARG_TIMESTAMPTZ(4);
	if (PG_ARGISNULL(5))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("priority must not be null")));
	priority = PG_GETARG_INT32(5);
	request.metadata = argument_optional_jsonb(fcinfo, 6);
	caller = statement_begin();
	request_add_instant(&request, "expires_at", expires_at);
	request_add_int64(&request, "priority", priority);
	request_end_arguments(&request);

	/* a replay is answered even when what it made has expired since */
	replayed = expires_at <= clock_now() && request_find_first(&request, false, &first);
	if (!replayed)
	{
		if (expires_at <= clock_now())
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("expires_at must be in the future")));
		reclaim_lock_account(&pool);
		tranche = pool_add(&pool, amount, priority, expires_at);
		first.entry_id = ledger_post(&pool, &request, &reservation_id);
		if (first.entry_id != 0)
			restripe_spread(&pool, tranche);
		first.tranche_id = tranche->tranche_id;
		first.amount = amount;
		first.available = pool.available;
		replayed = first.entry_id == 0 && request_find_first(&request, true, &first);
	}

	values[0] = Int64GetDatum(first.entry_id);
	values[1] = Int64GetDatum(first.tranche_id);
	values[2] = NumericGetDatum(first.amount);
	values[3] = NumericGetDatum(first.available);
	values[4] = BoolGetDatum(replayed);
	return statement_end(caller, fcinfo, values, nulls);
}

/*
 * Returns whether a locked pool has an amount that can be taken away: not of
 * mirrors, to which what has lapsed may come back while it is looked for.
 */
static bool
cover_revocation(Pool *pool, Numeric amount)
{
	Numeric		mirrored;
	bool		covered;

	do
	{
		mirrored = pool_mirrored(pool);
		covered = reclaim_cover(pool, amount_add(amount, mirrored));
	} while (amount_compare(pool_mirrored(pool), mirrored) != 0);
	return covered;
}

/* Raises LC001, or 0A000 where only a mirror has that much. */
pg_noreturn static void
refuse_revocation(const Pool *pool, Numeric amount)
{
	if (amount_compare(pool->available, amount) >= 0 && amount_sign(pool_mirrored(pool)) > 0)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("a balance that lives elsewhere cannot be adjusted"),
				 errdetail("Available: %s, of which elsewhere: %s, requested: %s.",
						   amount_out(pool->available), amount_out(pool_mirrored(pool)), amount_out(amount)),
				 errhint("Correct it there; the next checkpoint brings it along.")));
	pool_refuse_short(pool, amount);
}

/*
 * lease_adjust(account, credit, amount, reason, idempotency_key, metadata)
 *		Grants a positive amount as a new tranche, or takes a negative one away
 *		in burn order, from a frozen pool as well. Raises LC001, LC002, LC009,
 *		and 0A000 where that would have to be taken from a mirror.
 */
PG_FUNCTION_INFO_V1(lease_adjust);
Datum
lease_adjust(PG_FUNCTION_ARGS)
{
	Request		request = {0};
	Pool		pool = {0};
	Tranche    *granted = NULL;
	Numeric		amount;
	int64		reservation_id = NO_RESERVATION;
	FirstCall	first = {0};
	bool		refused = false;
	bool		replayed = false;
	MemoryContext caller;
	Datum		values[4];
	bool		nulls[4] = {false};

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	request.credit = pool.credit = argument_text(fcinfo, 1, "credit");
	request.amount = amount = argument_amount(fcinfo, 2, "amount", AMOUNT_NOT_ZERO);
	request.reason = argument_text(fcinfo, 3, "reason");
	request.key = argument_optional_text(fcinfo, 4, "idempotency_key");
	request.metadata = argument_optional_jsonb(fcinfo, 5);
	caller = statement_begin();
	request_add_text(&request, "reason", request.reason);
	request_end_arguments(&request);

	if (amount_sign(amount) > 0)
	{
		request.kind = &kind_adjust_up;
		reclaim_lock_account(&pool);
		granted = pool_add(&pool, amount, DEFAULT_PRIORITY, DT_NOEND);
	}
	else
	{
		request.kind = &kind_adjust_down;
		reclaim_lock(&pool, amount_negate(amount));
		refused = !cover_revocation(&pool, amount_negate(amount));
		if (!refused)
			pool_take(&pool, amount_negate(amount), REVOKED);
	}
	if (!refused)
	{
		first.entry_id = ledger_post(&pool, &request, &reservation_id);
		first.amount = amount;
		first.available = pool.available;
		if (granted && first.entry_id != 0)
			restripe_spread(&pool, granted);
	}
	if (first.entry_id == 0)
	{
		replayed = request_find_first(&request, !refused, &first);
		if (!replayed)
			refuse_revocation(&pool, amount_negate(amount));
	}

	values[0] = Int64GetDatum(first.entry_id);
	values[1] = NumericGetDatum(first.amount);
	values[2] = NumericGetDatum(first.available);
	values[3] = BoolGetDatum(replayed);
	return statement_end(caller, fcinfo, values, nulls);
}

pg_noreturn static void
no_such_entry(text *account, int64 entry_id)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_NOT_FOUND),
			 errmsg("account \"%s\" has no entry " INT64_FORMAT,
					text_to_cstring(account), entry_id)));
}

/* Reads the entries of a call, with the credit; raises LC003 where there is none. */
static int
find_consumed(text *account, int64 entry_id, ConsumedEntry **entries, text **credit)
{
	Parameters	parameters = {0};
	bool		isnull;
	int			n;

	parameter_add_pointer(&parameters, account);
	parameter_add(&parameters, Int64GetDatum(entry_id));
	n = (int) statement_execute(&consumed_statement, &parameters);
	if (n == 0)
		no_such_entry(account, entry_id);

	*credit = DatumGetTextPP(statement_value(0, 2, &isnull));
	*entries = palloc(sizeof(ConsumedEntry) * n);
	for (int i = 0; i < n; i++)
	{
		ConsumedEntry *entry = &(*entries)[i];

		entry->entry_id = DatumGetInt64(statement_value(i, 1, &isnull));
		entry->tranche_id = DatumGetInt64(statement_value(i, 3, &isnull));
		entry->consumed = DatumGetNumeric(statement_value(i, 4, &isnull));
		entry->refunded = DatumGetNumeric(statement_value(i, 5, &isnull));
		entry->refund = amount_zero();
		entry->tracked = DatumGetBool(statement_value(i, 6, &isnull));
		entry->of_chunk = DatumGetBool(statement_value(i, 7, &isnull));
		if (amount_sign(entry->refunded) < 0 ||
			amount_compare(entry->refunded, entry->consumed) > 0)
			ereport(ERROR,
					(errcode(ERRCODE_LEASE_BOOKS),
					 errmsg("entry " INT64_FORMAT " consumed %s and %s of it is refunded",
							entry->entry_id, amount_out(entry->consumed),
							amount_out(entry->refunded))));
	}
	return n;
}

static ArrayType *
tranche_ids(const ConsumedEntry *entries, int n)
{
	Datum	   *id = palloc(sizeof(Datum) * n);

	for (int i = 0; i < n; i++)
		id[i] = Int64GetDatum(entries[i].tranche_id);
	return construct_array(id, n, INT8OID, sizeof(int64), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE);
}

/*
 * Decides which entries an amount is refunded of, the last burned first, and
 * returns it; NULL stands for all that is left. Raises where a call that
 * consumed nothing, or less, is to be refunded.
 */
static Numeric
spread_refund(ConsumedEntry *entries, int n, int64 entry_id, Numeric amount)
{
	Numeric		consumed = amount_zero();
	Numeric		left = amount_zero();
	Numeric		rest;

	for (int i = 0; i < n; i++)
	{
		consumed = amount_add(consumed, entries[i].consumed);
		left = amount_add(left, amount_subtract(entries[i].consumed, entries[i].refunded));
	}
	if (amount_sign(consumed) <= 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("entry_id " INT64_FORMAT " consumed nothing that could be refunded",
						entry_id)));
	if (amount && amount_compare(amount, consumed) > 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("amount must not be more than entry " INT64_FORMAT " consumed", entry_id),
				 errdetail("Consumed: %s, requested: %s.",
						   amount_out(consumed), amount_out(amount))));
	if (amount_sign(left) == 0 || (amount && amount_compare(amount, left) > 0))
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_ENDED),
				 errmsg("entry " INT64_FORMAT " is already refunded", entry_id),
				 errdetail("Consumed: %s, left to refund: %s, requested: %s.",
						   amount_out(consumed), amount_out(left),
						   amount ? amount_out(amount) : "all")));
	if (amount == NULL)
		amount = left;

	rest = amount;
	for (int i = n - 1; i >= 0; i--)
	{
		entries[i].refund = amount_min(rest, amount_subtract(entries[i].consumed,
															 entries[i].refunded));
		rest = amount_subtract(rest, entries[i].refund);
	}
	return amount;
}

/*
 * What was tracked has been reported as so many units, which no later report
 * takes off: given back here as well, it would be spent twice.
 */
pg_noreturn static void
refuse_reported(const ConsumedEntry *entry, const Tranche *tranche)
{
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("entry " INT64_FORMAT " was tracked, and is reported to upstream \"%s\"",
					entry->entry_id, text_to_cstring(tranche->server)),
			 errhint("Correct it there, or top up.")));
}

/*
 * What was spent of a chunk, or of a session, is spent of its tranches only
 * when that ends, and then in one sum for all its entries.
 */
pg_noreturn static void
refuse_of_chunk(int64 entry_id)
{
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("entry " INT64_FORMAT " was spent of a chunk or of a session", entry_id),
			 errhint("Correct the pool with credit_lease.lease_adjust().")));
}

/*
 * lease_refund(account, entry_id, amount, reason, idempotency_key)
 *		Gives back an amount of what the call of an entry consumed, to the
 *		tranches that it came from, see pool_give_back(). Raises LC002, LC003,
 *		LC005 where that much is not left to refund, LC009, and 0A000 for what
 *		was tracked of an upstream's lease or spent of a chunk or of a session.
 */
PG_FUNCTION_INFO_V1(lease_refund);
Datum
lease_refund(PG_FUNCTION_ARGS)
{
	Request		request = {.kind = &kind_refund};
	Pool		pool = {0};
	AccountMarks marks;
	ConsumedEntry *entries;
	int			n;
	int64		entry_id;
	Numeric		amount;
	int64		reservation_id = NO_RESERVATION;
	FirstCall	first = {0};
	bool		replayed;
	MemoryContext caller;
	Datum		values[4];
	bool		nulls[4] = {false};

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	entry_id = argument_id(fcinfo, 1, "entry_id");
	amount = argument_optional_amount(fcinfo, 2, "amount", AMOUNT_POSITIVE);
	request.reason = argument_optional_text(fcinfo, 3, "reason");
	request.key = argument_optional_text(fcinfo, 4, "idempotency_key");
	caller = statement_begin();
	request_add_int64(&request, "entry_id", entry_id);
	request_add_amount(&request, "amount", amount);
	request_add_text(&request, "reason", request.reason);
	request_end_arguments(&request);

	if (!account_lock_unless_striped(pool.account, &marks))
	{
		/* the account's lock as well, so that nobody else refunds the same, and what is closed stays it */
		find_consumed(pool.account, entry_id, &entries, &pool.credit);
		pool_lock(&pool, NULL);
		account_lock(pool.account, ACCOUNT_LOCK, &marks);
	}
	n = find_consumed(pool.account, entry_id, &entries, &pool.credit);
	if (entries[0].of_chunk)
		refuse_of_chunk(entry_id);
	pool.closed_ids = tranche_ids(entries, n);
	/* by the clock before a wait for the account, a tranche might not have expired */
	pool.now = clock_now();
	pool_read(&pool);
	reclaim_lapsed(&pool);

	/* whether the key has been used must be known before there is too little left */
	replayed = request_find_first(&request, false, &first);
	if (!replayed)
	{
		amount = spread_refund(entries, n, entry_id, amount);
		for (int i = 0; i < n; i++)
		{
			Tranche    *tranche;

			if (amount_sign(entries[i].refund) == 0)
				continue;
			tranche = pool_get(&pool, entries[i].tranche_id);
			if (entries[i].tracked && tranche->server)
				refuse_reported(&entries[i], tranche);
			pool_give_back(&pool, tranche, CONSUMED, entries[i].refund);
			tranche->refund_of = entries[i].entry_id;
		}
		first.entry_id = ledger_post(&pool, &request, &reservation_id);
		for (int i = 0; i < pool.ntranches && pool.striped && first.entry_id != 0; i++)
		{
			if (!pool.tranche[i]->in_stripe)
				restripe_spread(&pool, pool.tranche[i]);
		}
		first.amount = amount;
		first.available = pool.available;
		replayed = first.entry_id == 0 && request_find_first(&request, true, &first);
	}
	for (int i = 0; i < n && !replayed; i++)
	{
		Parameters	parameters = {0};

		if (amount_sign(entries[i].refund) == 0)
			continue;
		parameter_add_pointer(&parameters, pool.account);
		parameter_add(&parameters, Int64GetDatum(entries[i].entry_id));
		parameter_add_pointer(&parameters, entries[i].refund);
		statement_execute(&count_refund_statement, &parameters);
	}

	values[0] = Int64GetDatum(first.entry_id);
	values[1] = NumericGetDatum(first.amount);
	values[2] = NumericGetDatum(first.available);
	values[3] = BoolGetDatum(replayed);
	return statement_end(caller, fcinfo, values, nulls);
}
