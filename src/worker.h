#ifndef CREDIT_LEASE_WORKER_H
#define CREDIT_LEASE_WORKER_H

extern void worker_define_settings(void);

#endif							/* CREDIT_LEASE_WORKER_H */
