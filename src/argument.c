/*
 * argument.c
 *		Checks of what a caller passed, made before anything is locked.
 *
 * Each function takes an argument's number and its name in SQL, returns its
 * value, and raises 22023 with a message that names it. The optional ones
 * return NULL for NULL.
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"

#include "amount.h"
#include "argument.h"
#include "compat.h"

static void
require(FunctionCallInfo fcinfo, int n, const char *name)
{
	if (PG_ARGISNULL(n))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not be null", name)));
}

pg_noreturn static void
must_be_positive(const char *name)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("%s must be positive", name)));
}

/* Returns a text of 1 to 512 bytes. */
text *
argument_text(FunctionCallInfo fcinfo, int n, const char *name)
{
	require(fcinfo, n, name);
	return argument_optional_text(fcinfo, n, name);
}

text *
argument_optional_text(FunctionCallInfo fcinfo, int n, const char *name)
{
	text	   *value;

	if (PG_ARGISNULL(n))
		return NULL;

	value = PG_GETARG_TEXT_PP(n);
	if (VARSIZE_ANY_EXHDR(value) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not be empty", name)));
	if (VARSIZE_ANY_EXHDR(value) > ARGUMENT_MAX_TEXT)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not be longer than %d bytes", name, ARGUMENT_MAX_TEXT)));
	return value;
}

int64
argument_id(FunctionCallInfo fcinfo, int n, const char *name)
{
	require(fcinfo, n, name);
	return PG_GETARG_INT64(n);
}

/* Returns a finite amount of the digits that DESIGN allows, within range. */
Numeric
argument_amount(FunctionCallInfo fcinfo, int n, const char *name, AmountRange range)
{
	require(fcinfo, n, name);
	return argument_optional_amount(fcinfo, n, name, range);
}

Numeric
argument_optional_amount(FunctionCallInfo fcinfo, int n, const char *name, AmountRange range)
{
	if (PG_ARGISNULL(n))
		return NULL;
	return argument_check_amount(PG_GETARG_NUMERIC(n), name, range);
}

/* The same of an amount that is a part of an argument. */
Numeric
argument_check_amount(Numeric value, const char *name, AmountRange range)
{
	int			sign;

	if (numeric_is_nan(value) || numeric_is_inf(value))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must be finite", name)));

	sign = amount_sign(value);
	if (range == AMOUNT_POSITIVE && sign <= 0)
		must_be_positive(name);
	if (range == AMOUNT_NOT_NEGATIVE && sign < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not be negative", name)));
	if (range == AMOUNT_NOT_ZERO && sign == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not be zero", name)));

	if (amount_has_too_many_digits(value))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s has too many digits", name),
				 errdetail("An amount has at most %d digits before the point and %d after it.",
						   AMOUNT_MAX_INTEGER_DIGITS, AMOUNT_MAX_SCALE)));
	return amount_without_excess(value);
}

/*
 * Returns an interval that ends after now, and not absurdly late: of mixed
 * signs, it may be positive and still end before it began.
 */
Interval *
argument_optional_ttl(FunctionCallInfo fcinfo, int n, const char *name, TimestampTz now)
{
	const Interval longest = {.month = ARGUMENT_MAX_TTL_YEARS * MONTHS_PER_YEAR};
	const Interval absurd = {.month = 2 * ARGUMENT_MAX_TTL_YEARS * MONTHS_PER_YEAR};
	Interval   *value;

	if (PG_ARGISNULL(n))
		return NULL;

	value = PG_GETARG_INTERVAL_P(n);
	if (!DatumGetBool(DirectFunctionCall2(interval_gt,
										  IntervalPGetDatum(value),
										  IntervalPGetDatum(&(Interval) {0}))))
		must_be_positive(name);
	/* what is absurd cannot even be added to a time */
	if (DatumGetBool(DirectFunctionCall2(interval_gt,
										 IntervalPGetDatum(value),
										 IntervalPGetDatum(&absurd))) ||
		instant_add(now, value) > instant_add(now, &longest))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not be longer than %d years", name, ARGUMENT_MAX_TTL_YEARS)));
	if (instant_add(now, value) <= now)
		must_be_positive(name);
	return value;
}

Jsonb *
argument_optional_jsonb(FunctionCallInfo fcinfo, int n)
{
	return PG_ARGISNULL(n) ? NULL : PG_GETARG_JSONB_P(n);
}

/* Returns which of the words an option is. */
int
argument_word(text *value, const char *name, const char *const *words, int nwords)
{
	char	   *given = text_to_cstring(value);

	for (int i = 0; i < nwords; i++)
	{
		if (strcmp(given, words[i]) == 0)
			return i;
	}
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("unrecognized %s: \"%s\"", name, given)));
}

/* Returns the instant a span later, in the session's time zone where it has days. */
TimestampTz
instant_add(TimestampTz instant, const Interval *span)
{
	return DatumGetTimestampTz(DirectFunctionCall2(timestamptz_pl_interval,
												   TimestampTzGetDatum(instant),
												   IntervalPGetDatum(span)));
}
