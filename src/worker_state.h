#ifndef CREDIT_LEASE_WORKER_STATE_H
#define CREDIT_LEASE_WORKER_STATE_H

#include "datatype/timestamp.h"

/* How many databases can have a worker. */
#define WORKER_SLOTS	64

/* What a worker is woken for, beside demand, as bits */
#define WAKE_FOR_LEASES		1	/* some run low, or are to be released */
#define WAKE_FOR_POLICIES	2	/* some have changed */

extern void worker_state_request(void);
extern void worker_state_define_settings(void);
extern List *worker_state_databases(void);

extern int	worker_state_claim(const char *database);
extern const char *worker_state_database(int slot);
extern bool worker_state_is_held_off(const char *database);
extern void worker_state_make_leave(const char *database);

extern bool worker_state_wake(int wake_for);

extern bool worker_state_started(int slot);
extern int	worker_state_woken_for(int slot);
extern void worker_state_swept(int slot, int64 holds);
extern void worker_state_failed(int slot, const char *message);

#endif							/* CREDIT_LEASE_WORKER_STATE_H */
