/*
 * amount.c
 *		Exact amounts: what the ledger needs of numeric.
 *
 * All results are allocated in the current memory context, but for
 * amount_zero(). NaN and infinity are ordinary arguments here; argument.c
 * keeps them out and pool.c refuses them where they are stored.
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/memutils.h"

#include "amount.h"

static Numeric
constant(const char *digits)
{
	MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);
	Datum		value = DirectFunctionCall3(numeric_in,
											CStringGetDatum(digits),
											ObjectIdGetDatum(InvalidOid),
											Int32GetDatum(-1));

	MemoryContextSwitchTo(old);
	return DatumGetNumeric(value);
}

/* Returns 0; never to be freed. */
Numeric
amount_zero(void)
{
	static Numeric zero = NULL;

	if (zero == NULL)
		zero = constant("0");
	return zero;
}

Numeric
amount_add(Numeric a, Numeric b)
{
	return DatumGetNumeric(DirectFunctionCall2(numeric_add,
											   NumericGetDatum(a),
											   NumericGetDatum(b)));
}

Numeric
amount_subtract(Numeric a, Numeric b)
{
	return DatumGetNumeric(DirectFunctionCall2(numeric_sub,
											   NumericGetDatum(a),
											   NumericGetDatum(b)));
}

Numeric
amount_negate(Numeric a)
{
	return DatumGetNumeric(DirectFunctionCall1(numeric_uminus,
											   NumericGetDatum(a)));
}

Numeric
amount_multiply(Numeric a, Numeric b)
{
	return DatumGetNumeric(DirectFunctionCall2(numeric_mul,
											   NumericGetDatum(a),
											   NumericGetDatum(b)));
}

/*
 * amount_round_up
 *		Returns the lowest multiple of a unit that is no less than an amount
 *		that is not negative. The quotient is a whole number, so that nothing
 *		is rounded on the way.
 */
Numeric
amount_round_up(Numeric a, Numeric unit)
{
	Datum		whole = DirectFunctionCall2(numeric_div_trunc, NumericGetDatum(a), NumericGetDatum(unit));
	Numeric		rounded = amount_multiply(DatumGetNumeric(whole), unit);

	if (amount_compare(rounded, a) < 0)
		rounded = amount_add(rounded, unit);
	return DatumGetNumeric(DirectFunctionCall1(numeric_trim_scale, NumericGetDatum(rounded)));
}

/* Returns as much of an amount as a part is of the whole, or less by no more than the smallest amount there is. */
Numeric
amount_part(Numeric a, Numeric part, Numeric whole)
{
	Datum		quotient = DirectFunctionCall2(numeric_div,
											   NumericGetDatum(amount_multiply(a, part)),
											   NumericGetDatum(whole));

	return DatumGetNumeric(DirectFunctionCall1(numeric_trim_scale,
											   DirectFunctionCall2(numeric_trunc, quotient,
																   Int32GetDatum(AMOUNT_MAX_SCALE))));
}

/* Returns the lower of the two, itself and not a copy. */
Numeric
amount_min(Numeric a, Numeric b)
{
	return amount_compare(a, b) <= 0 ? a : b;
}

/* Returns less than, equal to or more than 0, as a is to b. */
int
amount_compare(Numeric a, Numeric b)
{
	return DatumGetInt32(DirectFunctionCall2(numeric_cmp,
											 NumericGetDatum(a),
											 NumericGetDatum(b)));
}

/* Returns -1, 0 or 1; NaN counts as positive, as it sorts. */
int
amount_sign(Numeric a)
{
	return amount_compare(a, amount_zero());
}

/*
 * amount_has_too_many_digits
 *		Returns whether a finite number does not fit the digits that an
 *		amount may have. Zeros at the end of the fraction do not count.
 */
bool
amount_has_too_many_digits(Numeric a)
{
	static Numeric bound = NULL;
	Datum		size = DirectFunctionCall1(numeric_abs, NumericGetDatum(a));

	if (bound == NULL)
		bound = constant("1e" CppAsString2(AMOUNT_MAX_INTEGER_DIGITS));

	return amount_compare(DatumGetNumeric(size), bound) >= 0 ||
		DatumGetInt32(DirectFunctionCall1(numeric_min_scale,
										  NumericGetDatum(a))) > AMOUNT_MAX_SCALE;
}

/*
 * amount_without_excess
 *		Returns an amount without the zeros that a computation has left behind
 *		the digits it may have: balances would show them for ever.
 */
Numeric
amount_without_excess(Numeric a)
{
	if (DatumGetInt32(DirectFunctionCall1(numeric_scale, NumericGetDatum(a))) <= AMOUNT_MAX_SCALE)
		return a;
	return DatumGetNumeric(DirectFunctionCall1(numeric_trim_scale, NumericGetDatum(a)));
}

/* Returns the digits, for messages. */
char *
amount_out(Numeric a)
{
	return DatumGetCString(DirectFunctionCall1(numeric_out, NumericGetDatum(a)));
}
