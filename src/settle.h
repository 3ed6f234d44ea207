#ifndef CREDIT_LEASE_SETTLE_H
#define CREDIT_LEASE_SETTLE_H

#include "hold.h"
#include "pool.h"

extern void settle_report(const Pool *pool, const Hold *hold, const char *key);

#endif							/* CREDIT_LEASE_SETTLE_H */
