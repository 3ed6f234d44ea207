#ifndef CREDIT_LEASE_RECLAIM_H
#define CREDIT_LEASE_RECLAIM_H

#include "pool.h"
#include "request.h"

extern const EntryKind kind_expire_hold;

extern void reclaim_lock(Pool *pool, AccountLock how);
extern void reclaim_lapsed(Pool *pool);
extern bool reclaim_cover(Pool *pool, Numeric amount);

#endif							/* CREDIT_LEASE_RECLAIM_H */
