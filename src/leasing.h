#ifndef CREDIT_LEASE_LEASING_H
#define CREDIT_LEASE_LEASING_H

#include "exchange.h"

extern void leasing_look(void);
extern void leasing_try_again(void);
extern void leasing_clean(bool policies_changed);
extern void leasing_meet_demand(List *exchanges, TimestampTz *next_due);
extern List *leasing_prepare(List *exchanges, int most, int share, TimestampTz *next_due);
extern bool leasing_take(Exchange *exchange);

#endif							/* CREDIT_LEASE_LEASING_H */
