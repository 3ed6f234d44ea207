#ifndef CREDIT_LEASE_CHUNK_H
#define CREDIT_LEASE_CHUNK_H

#include "storage/itemptr.h"
#include "utils/array.h"

#include "compat.h"
#include "pool.h"
#include "request.h"

typedef enum ChunkStatus
{
	CHUNK_LIVE,
	CHUNK_EXPIRED,
	CHUNK_RELEASED
} ChunkStatus;

/* A row of credit_lease.chunk. */
typedef struct Chunk
{
	int64		chunk_id;
	text	   *credit;
	text	   *owner;
	ChunkStatus status;
	Numeric		granted;
	Numeric		remaining;
	Numeric		consumed;
	Numeric		returned;
	TimestampTz expires_at;
	ArrayType  *tranche_ids;	/* what it came from, in the order in which it spends that */
	ArrayType  *tranche_amounts;	/* ... and how much from each */
	ItemPointerData tid;		/* of the row */
	bool		may_be_frozen;	/* something of the account is frozen; known of a locked one */

	/* of a session; NULL and 0 for a plain chunk */
	text	   *session;
	Numeric		accepted;		/* may be spent, of what is granted */
	int64		units;			/* how often it was charged */
	Numeric		deposited;		/* what it was opened with */
} Chunk;

extern void chunk_read(uint64 row, Chunk *chunk);
extern bool chunk_find(text *account, int64 chunk_id, bool read_only, Chunk *chunk);
extern void chunk_lock(text *account, int64 chunk_id, const text *owner, Chunk *chunk);
extern bool chunk_is_frozen(text *account, const Chunk *chunk, char **reason);
extern bool chunk_is_alive(const Chunk *chunk, TimestampTz now);
extern const char *chunk_status(const Chunk *chunk, TimestampTz now);
pg_noreturn extern void chunk_not_found(text *account, int64 chunk_id);
pg_noreturn extern void chunk_has_ended(text *account, const Chunk *chunk);
extern void chunk_collect(const Pool *pool, Chunk *chunk, TimestampTz expires_at);
extern int64 chunk_draw_number(void);
extern void chunk_grow(const Pool *pool, Chunk *chunk);
extern bool chunk_create(const Pool *pool, const Chunk *chunk);
extern TimestampTz chunk_latest_expiry(text *account, const Chunk *chunk);
extern void chunk_renew(text *account, Chunk *chunk);
extern bool chunk_append(const Request *request, const Chunk *chunk, TimestampTz now);
extern void chunk_spend(text *account, Chunk *chunk, Numeric amount);
extern void chunk_save(text *account, Chunk *chunk);
extern void chunk_release(Pool *pool, Chunk *chunk);
extern int	chunk_reclaim(Pool *pool, int limit);

#endif							/* CREDIT_LEASE_CHUNK_H */
