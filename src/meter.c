/*
 * meter.c
 *		Meters: what a feature costs, and which credits may pay for it.
 *
 * Nothing is locked here: which credit is tried first is no promise.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "amount.h"
#include "meter.h"
#include "statement.h"

/*
 * What is valid of a feature, in the order of preference; what costs nothing
 * comes last.
 */
static Statement meters_statement = {
	.sql = "SELECT m.credit, m.rate, p.smallest_unit, p.failure_mode = 'open', f.frozen,"
	" coalesce(m.event, p.event, m.feature), m.rule"
	" FROM (SELECT DISTINCT ON (v.credit) v.* FROM credit_lease.meter v"
	"  WHERE v.feature = $2 AND v.valid_from <= $3 AND (v.valid_until IS NULL OR v.valid_until > $3)"
	"  ORDER BY v.credit, v.valid_from DESC) m"
	" CROSS JOIN LATERAL credit_lease.lease_policy($1, m.credit) p"
	" CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM credit_lease.frozen_pool z"
	"  WHERE z.account = $1 AND (z.credit IS NULL OR z.credit = m.credit)) AS frozen) f"
	" ORDER BY m.credit IS NULL, m.preference, m.credit",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, TIMESTAMPTZOID}
};

/* ... and of many features, each for an account, by preference alone. */
static Statement many_meters_statement = {
	.sql = "SELECT i.n::pg_catalog.int4, m.credit, m.rate, p.smallest_unit, coalesce(m.event, p.event, m.feature)"
	" FROM unnest($1, $2) WITH ORDINALITY AS i (account, feature, n)"
	" CROSS JOIN LATERAL (SELECT DISTINCT ON (v.credit) v.* FROM credit_lease.meter v"
	"  WHERE v.feature = i.feature AND v.valid_from <= $3 AND (v.valid_until IS NULL OR v.valid_until > $3)"
	"  ORDER BY v.credit, v.valid_from DESC) m"
	" CROSS JOIN LATERAL credit_lease.lease_policy(i.account, m.credit) p"
	" ORDER BY i.n, m.credit IS NULL, m.preference, m.credit",
	.nargs = 3,
	.argtypes = {TEXTARRAYOID, TEXTARRAYOID, TIMESTAMPTZOID}
};

/* Returns what a quantity costs, rounded up to a multiple of the unit. */
Numeric
meter_amount(Numeric quantity, Numeric rate, Numeric unit)
{
	return amount_round_up(amount_multiply(quantity, rate), unit);
}

static Statement balance_statement = {
	.sql = "SELECT b.available, b.leased > 0 FROM credit_lease.balance b WHERE b.account = $1 AND b.credit = $2",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

/* Reads what is valid of a feature; the amount is what the quantity costs. */
static void
read_meter(uint64 row, Numeric quantity, Meter *meter)
{
	Datum		value;
	bool		isnull;

	memset(meter, 0, sizeof(*meter));
	value = statement_value(row, 1, &isnull);
	meter->credit = isnull ? NULL : DatumGetTextPP(value);
	meter->event = DatumGetTextPP(statement_value(row, 6, &isnull));
	value = statement_value(row, 7, &isnull);
	meter->rule = isnull ? NULL : TextDatumGetCString(value);
	if (meter->credit == NULL)
		return;

	meter->rate = DatumGetNumeric(statement_value(row, 2, &isnull));
	meter->unit = DatumGetNumeric(statement_value(row, 3, &isnull));
	meter->open = DatumGetBool(statement_value(row, 4, &isnull));
	meter->frozen = DatumGetBool(statement_value(row, 5, &isnull));
	meter->amount = meter_amount(quantity, meter->rate, meter->unit);
}

/* Looks at what the pool has, by the clock. */
static void
read_balance(text *account, Meter *meter)
{
	Parameters	parameters = {0};
	bool		isnull;

	meter->available = amount_zero();
	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, meter->credit);
	if (statement_execute(&balance_statement, &parameters) == 0)
		return;
	meter->available = DatumGetNumeric(statement_value(0, 1, &isnull));
	meter->leased = DatumGetBool(statement_value(0, 2, &isnull));
}

static bool
would_do(const Meter *meter)
{
	return meter->leased && !meter->frozen && amount_compare(meter->available, meter->amount) >= 0;
}

/*
 * meter_find
 *		Finds the credits that may pay for a quantity of a feature, in the order
 *		in which to try them: those with a live lease and enough first, then by
 *		preference. Returns how many; one without a credit where the feature
 *		costs nothing, none where there is no meter.
 */
int
meter_find(text *account, text *feature, Numeric quantity, TimestampTz now, Meter **meters)
{
	Parameters	parameters = {0};
	Meter	   *found;
	int			n;
	int			next = 0;

	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, feature);
	parameter_add(&parameters, TimestampTzGetDatum(now));
	n = (int) statement_execute(&meters_statement, &parameters);

	found = palloc(sizeof(Meter) * n);
	*meters = palloc(sizeof(Meter) * n);
	for (int i = 0; i < n; i++)
		read_meter(i, quantity, &found[i]);
	if (n > 1 && found[n - 1].credit == NULL)
		n--;
	/* where it does not become known under the lock anyway */
	for (int i = 0; i < n && found[i].credit; i++)
	{
		if (n > 1 || found[i].frozen || amount_sign(quantity) == 0)
			read_balance(account, &found[i]);
	}
	for (int pass = 0; pass < 2; pass++)
	{
		for (int i = 0; i < n; i++)
		{
			if ((found[i].credit && would_do(&found[i])) == (pass == 0))
				(*meters)[next++] = found[i];
		}
	}
	return n;
}

/*
 * meter_find_many
 *		Finds the credits that may pay for each of many features, each for an
 *		account, in the order of preference; returns how many in all, and for
 *		which feature, counted from 1, each is. A feature that costs nothing has
 *		one without a credit. What a quantity costs is not known, nor what pools
 *		have.
 */
int
meter_find_many(Datum *account, Datum *feature, int nfeatures, TimestampTz now, int **which, Meter **meters)
{
	Parameters	parameters = {0};
	int			n;
	int			found = 0;

	parameter_add_texts(&parameters, account, nfeatures);
	parameter_add_texts(&parameters, feature, nfeatures);
	parameter_add(&parameters, TimestampTzGetDatum(now));
	n = (int) statement_execute(&many_meters_statement, &parameters);
	*which = palloc(sizeof(int) * n);
	*meters = palloc0(sizeof(Meter) * n);
	for (int row = 0; row < n; row++)
	{
		Meter	   *meter = &(*meters)[found];
		bool		isnull;
		bool		is_free;
		Datum		credit = statement_value(row, 2, &is_free);

		(*which)[found] = DatumGetInt32(statement_value(row, 1, &isnull));
		if (is_free && found > 0 && (*which)[found - 1] == (*which)[found])
			continue;
		found++;
		if (is_free)
			continue;
		meter->credit = DatumGetTextPP(credit);
		meter->rate = DatumGetNumeric(statement_value(row, 3, &isnull));
		meter->unit = DatumGetNumeric(statement_value(row, 4, &isnull));
		meter->event = DatumGetTextPP(statement_value(row, 5, &isnull));
	}
	return found;
}
