/*
 * clock.c
 *		The time by which everything expires.
 *
 * It is the server's clock at the moment of the call, taken once for each
 * call and passed into its statements. credit_lease.mock_now stands in for it
 * in tests; only a superuser can set it.
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/timestamp.h"

#include "clock.h"
#include "compat.h"

static char *mock_now_string = NULL;

/* Set together with mock_now_string; NULL while the setting is empty. */
static const TimestampTz *mock_now = NULL;

/* Returns whether a word stands for another instant each time. */
static bool
is_moving(int n, char *word)
{
	int			value;

	return DecodeSpecial(n, word, &value) == RESERV &&
		(value == DTK_NOW || value == DTK_YESTERDAY || value == DTK_TODAY || value == DTK_TOMORROW);
}

/*
 * clock_parse
 *		Reads one fixed instant, and returns whether the string is one. Raises
 *		no error, which rules timestamptz_in() out.
 */
bool
clock_parse(const char *string, TimestampTz *instant)
{
	char		workbuf[MAXDATELEN + MAXDATEFIELDS];
	char	   *field[MAXDATEFIELDS];
	int			ftype[MAXDATEFIELDS];
	int			nfields;
	int			dtype;
	int			tz;
	fsec_t		fsec;
	struct pg_tm tm;
	DateTimeErrorExtra error;

	if (ParseDateTime(string, workbuf, sizeof(workbuf), field, ftype, MAXDATEFIELDS, &nfields) != 0)
		return false;
	for (int i = 0; i < nfields; i++)
	{
		if (is_moving(i, field[i]))
			return false;
	}
	return DecodeDateTime(field, ftype, nfields, &dtype, &tm, &fsec, &tz, &error) == 0 &&
		dtype == DTK_DATE &&
		tm2timestamp(&tm, fsec, &tz, instant) == 0;
}

/*
 * Accepts an empty string or one fixed instant. It reports instead of raising,
 * as a check hook must where the postmaster reads its files.
 */
static bool
check_mock_now(char **newval, void **extra, GucSource source)
{
	TimestampTz instant;

	if ((*newval)[0] == '\0')
	{
		*extra = NULL;
		return true;
	}

	if (!clock_parse(*newval, &instant))
	{
		GUC_check_errdetail("It must be empty or one timestamp with time zone.");
		return false;
	}

	*extra = guc_malloc(LOG, sizeof(TimestampTz));
	if (*extra == NULL)
		return false;
	memcpy(*extra, &instant, sizeof(TimestampTz));
	return true;
}

static void
assign_mock_now(const char *newval, void *extra)
{
	mock_now = (const TimestampTz *) extra;
}

void
clock_define_settings(void)
{
	DefineCustomStringVariable("credit_lease.mock_now",
							   "Sets the instant that stands for the clock, for tests.",
							   "Empty for the server's clock.",
							   &mock_now_string,
							   "",
							   PGC_SUSET,
							   GUC_NOT_IN_SAMPLE,
							   check_mock_now,
							   assign_mock_now,
							   NULL);
}

/*
 * clock_now
 *		Returns the instant at which this call decides.
 */
TimestampTz
clock_now(void)
{
	return mock_now ? *mock_now : GetCurrentTimestamp();
}

/*
 * lease_clock() -> timestamptz
 *		SQL's view of clock_now(), for the views.
 */
PG_FUNCTION_INFO_V1(lease_clock);
Datum
lease_clock(PG_FUNCTION_ARGS)
{
	PG_RETURN_TIMESTAMPTZ(clock_now());
}
