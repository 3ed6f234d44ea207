#ifndef CREDIT_LEASE_AMOUNT_H
#define CREDIT_LEASE_AMOUNT_H

#include "fmgr.h"
#include "utils/numeric.h"

/* Digits of an amount that a caller may pass, before and after the point. */
#define AMOUNT_MAX_INTEGER_DIGITS	26
#define AMOUNT_MAX_SCALE			12

extern Numeric amount_zero(void);
extern Numeric amount_add(Numeric a, Numeric b);
extern Numeric amount_subtract(Numeric a, Numeric b);
extern Numeric amount_negate(Numeric a);
extern Numeric amount_multiply(Numeric a, Numeric b);
extern Numeric amount_round_up(Numeric a, Numeric unit);
extern Numeric amount_part(Numeric a, Numeric part, Numeric whole);
extern Numeric amount_min(Numeric a, Numeric b);
extern int	amount_compare(Numeric a, Numeric b);
extern int	amount_sign(Numeric a);
extern bool amount_has_too_many_digits(Numeric a);
extern Numeric amount_without_excess(Numeric a);
extern char *amount_out(Numeric a);

#endif							/* CREDIT_LEASE_AMOUNT_H */
