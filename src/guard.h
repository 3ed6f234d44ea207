#ifndef CREDIT_LEASE_GUARD_H
#define CREDIT_LEASE_GUARD_H

extern bool guard(void (*work) (void *), void *arg, char **error);

#endif							/* CREDIT_LEASE_GUARD_H */
