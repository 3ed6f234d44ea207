#ifndef CREDIT_LEASE_STRIPE_H
#define CREDIT_LEASE_STRIPE_H

#include "pool.h"

extern int	stripe_count(const Pool *pool);
extern bool stripe_is_known(const Pool *pool);
extern void stripe_remember(const Pool *pool, bool gathered);
extern void stripe_forget(const Pool *pool);
extern void stripe_forget_elsewhere(const Pool *pool);
extern void stripe_forget_all(void);
extern bool stripe_recall(Pool *pool);
extern bool stripe_lock_free(Pool *pool);
extern bool stripe_lock_any(Pool *pool);
extern bool stripe_lock_all(Pool *pool, bool (*work) (void *), void *arg);
extern bool stripe_lock_all_if_free(Pool *pool);
extern bool stripe_lock_if_free(const Pool *pool, int stripe);
extern void stripe_lock_account(text *account);

#endif							/* CREDIT_LEASE_STRIPE_H */
