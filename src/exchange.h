#ifndef CREDIT_LEASE_EXCHANGE_H
#define CREDIT_LEASE_EXCHANGE_H

#include "datatype/timestamp.h"
#include "utils/array.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"

#include "http.h"
#include "upstream.h"

typedef enum ExchangeResult
{
	EXCHANGE_OPEN,				/* not answered */
	EXCHANGE_DONE,
	EXCHANGE_REFUSED,			/* the upstream says no */
	EXCHANGE_FAILED				/* not answered, or with something of no use */
} ExchangeResult;

/* What an upstream says of a lease; or the balance alone, if that was asked for. */
typedef struct LeaseTerms
{
	char	   *lease_id;
	Numeric		granted;		/* the lease's total */
	TimestampTz expires_at;
	bool		as_asked;		/* it is not somebody else's */
	Numeric		balance;		/* what there is beyond it; NULL where that is not said */
} LeaseTerms;

/* One request and its reply. */
typedef struct Exchange
{
	MemoryContext context;		/* has all of it */
	char	   *server;
	char	   *operation;		/* acquire, extend, release, balance or report */
	Jsonb	   *request;		/* what the dialect made a request of */
	Upstream   *upstream;
	char	   *url;
	List	   *headers;
	char	   *body;

	/* whose it is: the pool and the lease, or the lane and the reports */
	char	   *account;
	char	   *credit;
	char	   *lease_id;		/* NULL for none */
	int			lane;
	ArrayType  *accounts;
	ArrayType  *entry_ids;
	ArrayType  *keys;
	int			nreports;

	TimestampTz sent_at;		/* 0 before it is */
	ExchangeResult result;
	HttpReply	reply;
	char	   *error;			/* where it was refused or has failed */
	LeaseTerms	terms;			/* where an acquire, extend or balance is done */
} Exchange;

extern Exchange *exchange_prepare(const char *server, const char *operation, Jsonb *request, char **error);
extern void exchange_send(Exchange *exchange, int connect_timeout, int request_timeout);
extern Exchange *exchange_next(void);
extern void exchange_end(Exchange *exchange);
extern void exchange_forget_all(void);
extern char *exchange_asked_company(const Exchange *exchange);
extern Numeric exchange_asked_amount(const Exchange *exchange);
extern int	back_off_ms(int first, int failures, int longest);

#endif							/* CREDIT_LEASE_EXCHANGE_H */
