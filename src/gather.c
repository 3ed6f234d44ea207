/*
 * gather.c
 *		What a call needs and its stripe has not is brought there from others.
 *
 * What remains of a tranche moves from row to row with its share of what was
 * granted: no balance of the tranche changes, and the ledger has no entry. Only
 * rows whose stripe this call can lock without waiting give anything, or all,
 * when all are locked. So that few calls have to gather, a row gives half of
 * what it has.
 *
 * Nothing is written before the ledger has its entries: a call that is refused
 * leaves every row as it was.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"

#include "account.h"
#include "errors.h"
#include "gather.h"
#include "statement.h"
#include "stripe.h"

/* Those that have most, first; 0 stands for the tranche's own row. */
static Statement donors_statement = {
	.sql = "SELECT p.stripe FROM (SELECT o.stripe, o.remaining FROM credit_lease.tranche_stripe o"
	"  WHERE o.account = $1 AND o.credit = $2 AND o.tranche_id = $3 AND o.stripe <> $4"
	" UNION ALL SELECT 0, t.remaining FROM credit_lease.tranche t"
	"  WHERE t.account = $1 AND t.credit = $2 AND t.tranche_id = $3) p"
	" WHERE p.remaining > 0 ORDER BY p.remaining DESC",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, INT8OID, INT4OID}
};

#define TERMS(row) \
	row ".remaining + " row ".reserved + " row ".chunked + " row ".consumed + " row ".expired + " row ".returned + " row ".revoked"

static Statement stripe_statement = {
	.sql = "SELECT o.ctid, o.granted, o.remaining, o.granted = " TERMS("o") " FROM credit_lease.tranche_stripe o"
	" WHERE o.account = $1 AND o.credit = $2 AND o.tranche_id = $3 AND o.stripe = $4",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, INT8OID, INT4OID}
};

static Statement own_row_statement = {
	.sql = "SELECT t.ctid, t.striped, t.remaining, t.granted = t.striped + " TERMS("t") " FROM credit_lease.tranche t"
	" WHERE t.account = $1 AND t.credit = $2 AND t.tranche_id = $3",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT8OID}
};

static Statement change_stripe_statement = {
	.sql = "UPDATE credit_lease.tranche_stripe o SET granted = $3, remaining = $4"
	" WHERE o.account = $1 AND o.ctid = $2",
	.nargs = 4,
	.argtypes = {TEXTOID, TIDOID, NUMERICOID, NUMERICOID}
};

static Statement change_own_row_statement = {
	.sql = "UPDATE credit_lease.tranche t SET striped = $3, remaining = $4"
	" WHERE t.account = $1 AND t.ctid = $2",
	.nargs = 4,
	.argtypes = {TEXTOID, TIDOID, NUMERICOID, NUMERICOID}
};

static void
add_tranche(Parameters *parameters, const Pool *pool, const Tranche *tranche)
{
	parameter_add_pointer(parameters, pool->account);
	parameter_add_pointer(parameters, pool->credit);
	parameter_add(parameters, Int64GetDatum(tranche->tranche_id));
}

/* Returns a donor from whom the call has taken before, NULL for none. */
static Donor *
find_donor(const Pool *pool, const Tranche *tranche, int stripe)
{
	ListCell   *cell;

	foreach(cell, pool->donors)
	{
		Donor	   *donor = lfirst(cell);

		if (donor->tranche == tranche && donor->stripe == stripe)
			return donor;
	}
	return NULL;
}

static bool
lock_donor(const Pool *pool, int stripe)
{
	AccountMarks marks;

	if (pool->has_all)
		return true;
	if (stripe == 0)
		return account_lock(pool->account, ACCOUNT_LOCK_IF_FREE, &marks);
	return stripe_lock_if_free(pool, stripe);
}

/* Reads a row whose lock the call has, and proves it (rule 3); returns whether something remains there. */
static bool
read_donor(Pool *pool, const Tranche *tranche, int stripe, Donor *donor)
{
	Parameters	parameters = {0};
	bool		isnull;

	add_tranche(&parameters, pool, tranche);
	if (stripe != 0)
		parameter_add(&parameters, Int32GetDatum(stripe));
	if (statement_execute(stripe == 0 ? &own_row_statement : &stripe_statement, &parameters) == 0)
		return false;
	donor->tranche = tranche;
	donor->stripe = stripe;
	donor->tid = *(ItemPointer) DatumGetPointer(statement_value(0, 1, &isnull));
	donor->share = DatumGetNumeric(statement_value(0, 2, &isnull));
	donor->remaining = DatumGetNumeric(statement_value(0, 3, &isnull));
	if (!DatumGetBool(statement_value(0, 4, &isnull)))
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("the books of tranche " INT64_FORMAT " of account \"%s\" do not balance in stripe %d",
						tranche->tranche_id, text_to_cstring(pool->account), stripe),
				 errhint("See credit_lease.lease_verify(); nothing was changed.")));
	return amount_sign(donor->remaining) > 0;
}

/* Returns as much as is wanted, or half of what the donor has, if that is more. */
static Numeric
donation(const Donor *donor, Numeric wanted)
{
	Datum		half = DirectFunctionCall2(numeric_div_trunc, NumericGetDatum(donor->remaining),
										   NumericGetDatum(int64_to_numeric(2)));

	if (amount_compare(wanted, DatumGetNumeric(half)) < 0)
		wanted = DatumGetNumeric(half);
	return amount_min(wanted, donor->remaining);
}

/* Adds to a term what is no change of the tranche, for the ledger. */
static void
add(Tranche *tranche, Bucket bucket, Numeric amount)
{
	bool		same = tranche->balance[bucket] == tranche->logged[bucket];

	tranche->balance[bucket] = amount_add(tranche->balance[bucket], amount);
	tranche->logged[bucket] = same ? tranche->balance[bucket] : amount_add(tranche->logged[bucket], amount);
}

/* Moves an amount from a donor to the call's own row. */
static void
take(Tranche *tranche, Donor *donor, Numeric amount)
{
	donor->remaining = amount_subtract(donor->remaining, amount);
	donor->share = donor->stripe == 0 ? amount_add(donor->share, amount) : amount_subtract(donor->share, amount);
	tranche->elsewhere = amount_subtract(tranche->elsewhere, amount);
	add(tranche, GRANTED, amount);
	add(tranche, REMAINING, amount);
}

/*
 * Brings what the call's own row of a tranche lacks of an amount, as far as
 * other rows have it that nobody has locked.
 */
static void
gather_tranche(Pool *pool, Tranche *tranche, Numeric amount)
{
	Parameters	parameters = {0};
	SPITupleTable *rows;
	uint64		n;

	add_tranche(&parameters, pool, tranche);
	parameter_add(&parameters, Int32GetDatum(pool->stripe));
	n = statement_execute(&donors_statement, &parameters);
	rows = SPI_tuptable;

	for (uint64 i = 0; i < n && amount_compare(tranche->balance[REMAINING], amount) < 0; i++)
	{
		bool		isnull;
		int			stripe = DatumGetInt32(SPI_getbinval(rows->vals[i], rows->tupdesc, 1, &isnull));
		Donor	   *donor = find_donor(pool, tranche, stripe);

		if (donor == NULL)
		{
			donor = palloc0(sizeof(Donor));
			if (!lock_donor(pool, stripe) || !read_donor(pool, tranche, stripe, donor))
				continue;
			pool->donors = lappend(pool->donors, donor);
		}
		take(tranche, donor, donation(donor, amount_subtract(amount, tranche->balance[REMAINING])));
	}
}

/*
 * gather
 *		Sees to it that a striped pool's available amount can be taken from the
 *		rows of the call's own stripe, in burn order; returns whether it can.
 *		What others have locked is passed over.
 */
bool
gather(Pool *pool, Numeric amount)
{
	for (int i = 0; i < pool->ntranches && amount_sign(amount) > 0; i++)
	{
		Tranche    *tranche = pool->tranche[i];

		if (!tranche->alive)
			continue;
		if (amount_compare(tranche->balance[REMAINING], amount) < 0 && !pool->looked)
			pool_look(pool);
		if (amount_compare(tranche->balance[REMAINING], amount) < 0 && amount_sign(tranche->elsewhere) > 0)
			gather_tranche(pool, tranche, amount);
		amount = amount_subtract(amount, amount_min(tranche->balance[REMAINING], amount));
	}
	return amount_sign(amount) == 0;
}

/* Writes what the donors have left. Raises LC009 where one was changed behind the call. */
void
gather_save(Pool *pool)
{
	ListCell   *cell;

	foreach(cell, pool->donors)
	{
		Donor	   *donor = lfirst(cell);
		Parameters	parameters = {0};

		parameter_add_pointer(&parameters, pool->account);
		parameter_add_pointer(&parameters, &donor->tid);
		parameter_add_pointer(&parameters, donor->share);
		parameter_add_pointer(&parameters, donor->remaining);
		if (statement_execute(donor->stripe == 0 ? &change_own_row_statement : &change_stripe_statement,
							  &parameters) != 1)
			ereport(ERROR,
					(errcode(ERRCODE_LEASE_BOOKS),
					 errmsg("stripe %d of tranche " INT64_FORMAT " was changed behind this call",
							donor->stripe, donor->tranche->tranche_id)));
	}
	pool->donors = NIL;
}
