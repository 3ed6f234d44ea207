#ifndef CREDIT_LEASE_REPORT_H
#define CREDIT_LEASE_REPORT_H

#include "exchange.h"

extern bool report_collect(void);
extern List *report_prepare(List *exchanges, int most, TimestampTz *next_due);
extern void report_take(Exchange *exchange);

#endif							/* CREDIT_LEASE_REPORT_H */
