#ifndef CREDIT_LEASE_DEMAND_H
#define CREDIT_LEASE_DEMAND_H

#include "datatype/timestamp.h"
#include "utils/numeric.h"

/* What the worker answers. In this order: what a waiter can hope for, falling. */
typedef enum DemandAnswer
{
	DEMAND_PENDING,				/* nothing yet */
	DEMAND_SUPPLIED,
	DEMAND_NO_UPSTREAM,
	DEMAND_REFUSED,				/* the upstream does not give that much */
	DEMAND_UNREACHABLE			/* nobody can be asked just now */
} DemandAnswer;

#define DEMAND_MAX_NAME		512
#define DEMAND_MAX_ERROR	256

/* What one session waits for, as the worker sees it. */
typedef struct Demand
{
	char	   *account;
	char	   *credit;
	Numeric		amount;			/* what has to be available; 0 for any live lease, or mirror */
	TimestampTz until;			/* how long it waits */
} Demand;

/* The waiting session's side */
extern DemandAnswer demand_wait(const char *account, const char *credit, Numeric amount,
								TimestampTz until, char *error);
extern void demand_ask(const char *account, const char *credit, Numeric amount, TimestampTz until);
extern void demand_at_commit(int reason);

/* The worker's side */
extern void demand_request(void);
extern List *demand_collect(void);
extern void demand_answer(const char *account, const char *credit, DemandAnswer answer,
						  const char *error);
extern void demand_hint_short(const char *account, const char *credit);

#endif							/* CREDIT_LEASE_DEMAND_H */
