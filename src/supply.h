#ifndef CREDIT_LEASE_SUPPLY_H
#define CREDIT_LEASE_SUPPLY_H

#include "pool.h"
#include "request.h"

extern void supply_define_settings(void);
extern TimestampTz supply_deadline(void);
extern bool supply_lock_if_enough(Pool *pool, Numeric needed, TimestampTz until);
extern void supply_ask(const Pool *pool, Numeric needed);
extern void supply_lock(Pool *pool, const Request *request, Numeric needed);

#endif							/* CREDIT_LEASE_SUPPLY_H */
