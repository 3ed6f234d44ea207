#ifndef CREDIT_LEASE_RECLAIM_H
#define CREDIT_LEASE_RECLAIM_H

#include "hold.h"
#include "pool.h"

extern void reclaim_lock(Pool *pool, AccountLock how);
extern void reclaim_lapsed(Pool *pool);
extern bool reclaim_cover(Pool *pool, Numeric amount);
extern void reclaim_hold(Pool *pool, Hold *hold, HoldStatus status);

#endif							/* CREDIT_LEASE_RECLAIM_H */
