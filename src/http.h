#ifndef CREDIT_LEASE_HTTP_H
#define CREDIT_LEASE_HTTP_H

#include "nodes/pg_list.h"

/* How a request has ended. */
typedef struct HttpReply
{
	void	   *owner;			/* what http_send() was given */
	int			status;			/* HTTP status; 0 where there was no complete reply */
	char	   *error;			/* why not, NULL where there was one; tells nothing of what was sent */
	char	   *body;			/* NUL-terminated; empty where there was no complete reply */
	size_t		length;
	int64		retry_after_ms; /* from Retry-After, -1 for none */
	int64		latency_us;
} HttpReply;

extern void http_begin(void);
extern void http_send(const char *url, List *headers, const char *body,
					  int connect_timeout_ms, int request_timeout_ms, void *owner);
extern int	http_in_flight(void);
extern void http_wait(long timeout_ms, uint32 wait_event);
extern bool http_next(HttpReply *reply);
extern void http_forget_all(void);

#endif							/* CREDIT_LEASE_HTTP_H */
