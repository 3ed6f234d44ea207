#ifndef CREDIT_LEASE_GUARD_H
#define CREDIT_LEASE_GUARD_H

#include "utils/elog.h"

extern ErrorData *guard(void (*work) (void *), void *arg);
extern bool guard_attempt(bool (*work) (void *), void *arg);

#endif							/* CREDIT_LEASE_GUARD_H */
