#ifndef CREDIT_LEASE_GATHER_H
#define CREDIT_LEASE_GATHER_H

#include "pool.h"

extern bool gather(Pool *pool, Numeric amount);
extern void gather_save(Pool *pool);

#endif							/* CREDIT_LEASE_GATHER_H */
