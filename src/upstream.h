#ifndef CREDIT_LEASE_UPSTREAM_H
#define CREDIT_LEASE_UPSTREAM_H

typedef struct Upstream
{
	Oid			owner;			/* as whom the dialect runs */
	char	   *url;
	char	   *events_url;		/* NULL for the same */
	char	   *key;			/* the secret */
	Oid			request_function;	/* the dialect */
	Oid			outcome_function;
} Upstream;

extern void upstream_require(const char *server);
extern Upstream *upstream_load(const char *server);
extern void upstream_require_url(const char *url);

#endif							/* CREDIT_LEASE_UPSTREAM_H */
