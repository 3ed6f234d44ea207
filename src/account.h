#ifndef CREDIT_LEASE_ACCOUNT_H
#define CREDIT_LEASE_ACCOUNT_H

/* How often is tried what must not be waited for */
#define LOCK_POLL_MS	2

typedef enum AccountLock
{
	ACCOUNT_LOCK,				/* waits */
	ACCOUNT_LOCK_OR_CREATE,		/* waits, and creates what is not there */
	ACCOUNT_LOCK_IF_FREE		/* does not wait */
} AccountLock;

/* What is known of an account's pools with its lock */
typedef struct AccountMarks
{
	bool		frozen;			/* something of it is, see admin.c */
	bool		striped;		/* a pool of it is, see stripe.c */
} AccountMarks;

extern bool account_lock(text *account, AccountLock how, AccountMarks *marks);
extern bool account_lock_unless_striped(text *account, AccountMarks *marks);

#endif							/* CREDIT_LEASE_ACCOUNT_H */
