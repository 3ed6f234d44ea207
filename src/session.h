#ifndef CREDIT_LEASE_SESSION_H
#define CREDIT_LEASE_SESSION_H

#include "chunk.h"

extern void session_define_settings(void);
extern bool session_find(text *account, text *name, bool read_only, Chunk *session);
extern void session_lock(text *account, text *name, Chunk *session);
extern TimestampTz session_require_open(text *account, const Chunk *session);
extern void session_lock_for_more(Pool *pool, text *name, Numeric amount, Chunk *session);
pg_noreturn extern void session_not_found(text *account, text *name);
pg_noreturn extern void session_refuse_above_deposit(const Chunk *session, Numeric cumulative);
extern void session_carve(Pool *pool, Chunk *session, Numeric amount);
extern void session_spend(text *account, Chunk *session, Numeric amount, TimestampTz now);
extern void session_notify(text *account, const Chunk *session, TimestampTz now);
extern Datum session_return(MemoryContext caller, FunctionCallInfo fcinfo, const Chunk *session,
							TimestampTz now, bool applied, Numeric asked);

#endif							/* CREDIT_LEASE_SESSION_H */
