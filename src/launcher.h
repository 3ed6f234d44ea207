#ifndef CREDIT_LEASE_LAUNCHER_H
#define CREDIT_LEASE_LAUNCHER_H

extern void launcher_register(void);

#endif							/* CREDIT_LEASE_LAUNCHER_H */
