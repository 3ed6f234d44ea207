#ifndef CREDIT_LEASE_LEDGER_H
#define CREDIT_LEASE_LEDGER_H

#include "pool.h"
#include "request.h"

/* In place of a reservation's number: none, or one that is to be made. */
#define NO_RESERVATION	INT64CONST(-1)
#define NEW_RESERVATION	INT64CONST(0)

extern int64 ledger_append(Pool *pool, const Request *request, int64 *reservation_id);
extern void ledger_save(Pool *pool);
extern void ledger_ask_for_more(const Pool *pool, const Tranche *tranche);
extern int64 ledger_draw_number(void);
extern int64 ledger_post(Pool *pool, const Request *request, int64 *reservation_id);

#endif							/* CREDIT_LEASE_LEDGER_H */
