#ifndef CREDIT_LEASE_ACCOUNT_H
#define CREDIT_LEASE_ACCOUNT_H

typedef enum AccountLock
{
	ACCOUNT_LOCK,				/* waits */
	ACCOUNT_LOCK_OR_CREATE,		/* waits, and creates what is not there */
	ACCOUNT_LOCK_IF_FREE		/* does not wait */
} AccountLock;

extern bool account_lock(text *account, AccountLock how, bool *frozen);

#endif							/* CREDIT_LEASE_ACCOUNT_H */
