#ifndef CREDIT_LEASE_UPSTREAM_H
#define CREDIT_LEASE_UPSTREAM_H

extern void upstream_require(const char *server);

#endif							/* CREDIT_LEASE_UPSTREAM_H */
