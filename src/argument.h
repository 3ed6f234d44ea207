#ifndef CREDIT_LEASE_ARGUMENT_H
#define CREDIT_LEASE_ARGUMENT_H

#include "datatype/timestamp.h"
#include "fmgr.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"

/* The longest text that a caller may pass, in bytes. */
#define ARGUMENT_MAX_TEXT	512

/* The longest life that a caller may ask for. */
#define ARGUMENT_MAX_TTL_YEARS	10

typedef enum AmountRange
{
	AMOUNT_POSITIVE,
	AMOUNT_NOT_NEGATIVE,
	AMOUNT_NOT_ZERO
} AmountRange;

extern text *argument_text(FunctionCallInfo fcinfo, int n, const char *name);
extern text *argument_optional_text(FunctionCallInfo fcinfo, int n, const char *name);
extern int64 argument_id(FunctionCallInfo fcinfo, int n, const char *name);
extern Numeric argument_amount(FunctionCallInfo fcinfo, int n, const char *name, AmountRange range);
extern Numeric argument_optional_amount(FunctionCallInfo fcinfo, int n, const char *name, AmountRange range);
extern Numeric argument_check_amount(Numeric value, const char *name, AmountRange range);
extern Interval *argument_optional_ttl(FunctionCallInfo fcinfo, int n, const char *name, TimestampTz now);
extern Jsonb *argument_optional_jsonb(FunctionCallInfo fcinfo, int n);
extern int	argument_word(text *value, const char *name, const char *const *words, int nwords);
extern TimestampTz instant_add(TimestampTz instant, const Interval *span);

#endif							/* CREDIT_LEASE_ARGUMENT_H */
