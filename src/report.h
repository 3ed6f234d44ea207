#ifndef CREDIT_LEASE_REPORT_H
#define CREDIT_LEASE_REPORT_H

#include "exchange.h"
#include "hold.h"

extern void report_usage(const Pool *pool, const Hold *hold, int64 tranche_id, Numeric credits,
						 Numeric quantity, const char *key);
extern bool report_collect(void);
extern List *report_prepare(List *exchanges, int most, TimestampTz *next_due);
extern void report_take(Exchange *exchange);

#endif							/* CREDIT_LEASE_REPORT_H */
