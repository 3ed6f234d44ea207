#ifndef CREDIT_LEASE_RESTRIPE_H
#define CREDIT_LEASE_RESTRIPE_H

#include "pool.h"

extern void restripe_make_locks(text *account);
extern void restripe_spread(Pool *pool, const Tranche *tranche);
extern void restripe_fold_leases(Pool *pool, text *lease_id);
extern bool restripe_fold_ended(Pool *pool, bool wait);
extern bool restripe_tidy(Pool *pool);
extern List *restripe_candidates(MemoryContext context, bool policies_changed);

#endif							/* CREDIT_LEASE_RESTRIPE_H */
