#ifndef CREDIT_LEASE_POLICY_H
#define CREDIT_LEASE_POLICY_H

extern bool policy_has_server(void);
extern bool policy_has_stripes(void);

#endif							/* CREDIT_LEASE_POLICY_H */
