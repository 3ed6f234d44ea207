#ifndef CREDIT_LEASE_METER_H
#define CREDIT_LEASE_METER_H

#include "datatype/timestamp.h"
#include "utils/numeric.h"

/* What a quantity of a feature costs in one of the credits that may pay for it. */
typedef struct Meter
{
	text	   *credit;			/* NULL for a feature that costs nothing, as are those up to event then */
	Numeric		rate;
	Numeric		unit;
	Numeric		amount;			/* the quantity's */
	bool		open;			/* who has not enough credit may pass */
	bool		frozen;
	bool		leased;			/* something of what is available is from a lease */
	Numeric		available;		/* in the pool, as it is seen without a lock; NULL where nobody has looked */
	text	   *event;
	char	   *rule;			/* NULL for none */
} Meter;

extern int	meter_find(text *account, text *feature, Numeric quantity, TimestampTz now, Meter **meters);
extern int	meter_find_many(Datum *account, Datum *feature, int nfeatures, TimestampTz now, int **which, Meter **meters);
extern Numeric meter_amount(Numeric quantity, Numeric rate, Numeric unit);

#endif							/* CREDIT_LEASE_METER_H */
