#ifndef CREDIT_LEASE_RECLAIM_H
#define CREDIT_LEASE_RECLAIM_H

#include "hold.h"
#include "pool.h"

/* Returns what a call is to take beyond a hold. */
typedef Numeric (*HoldNeed) (const Hold *hold, const void *arg);

extern void reclaim_lock_account(Pool *pool);
extern bool reclaim_lock(Pool *pool, Numeric amount);
extern bool reclaim_lock_if_enough(Pool *pool, Numeric amount);
extern void reclaim_lock_hold(Pool *pool, int64 reservation_id, Hold *hold, HoldNeed need, const void *arg,
							  bool in_full);
extern Numeric reclaim_reach(Pool *pool, Numeric amount);
extern bool reclaim_tidy(text *account, text *credit);
extern void reclaim_lapsed(Pool *pool);
extern bool reclaim_cover(Pool *pool, Numeric amount);
extern void reclaim_hold(Pool *pool, Hold *hold, HoldStatus status);

#endif							/* CREDIT_LEASE_RECLAIM_H */
