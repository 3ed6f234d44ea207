#ifndef CREDIT_LEASE_POLL_H
#define CREDIT_LEASE_POLL_H

#include "exchange.h"

extern void poll_look(void);
extern void poll_follow_policies(bool policies_changed);
extern bool poll_ask(const char *account, const char *credit, TimestampTz synced_at, TimestampTz *next_poll);
extern void poll_note(const Exchange *exchange);
extern void poll_take(void *exchange);

#endif							/* CREDIT_LEASE_POLL_H */
