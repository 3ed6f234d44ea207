#ifndef CREDIT_LEASE_RULE_H
#define CREDIT_LEASE_RULE_H

#include "utils/jsonb.h"
#include "utils/numeric.h"

/* Who called: whose rights a rule has. */
typedef struct Caller
{
	Oid			user;
	int			security;		/* see SetUserIdAndSecContext() */
} Caller;

/* What a rule is asked */
typedef struct Question
{
	text	   *account;
	text	   *feature;
	Numeric		quantity;
	Numeric		available;		/* NULL for a feature that costs nothing */
	Jsonb	   *subject;
} Question;

/* What it answers */
typedef struct Answer
{
	bool		allowed;
	char	   *reason;			/* NULL where it gives none */
	char	   *error;			/* why it could not be asked, or NULL */
} Answer;

extern void rule_ask(const char *rule, const Caller *caller, const Question *question, Answer *answer);

#endif							/* CREDIT_LEASE_RULE_H */
