#ifndef CREDIT_LEASE_HOLD_H
#define CREDIT_LEASE_HOLD_H

#include "utils/jsonb.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "pool.h"

typedef enum HoldStatus
{
	HOLD_HELD,
	HOLD_SETTLED,
	HOLD_CANCELLED,
	HOLD_EXPIRED
} HoldStatus;

/* A row of credit_lease.reservation. */
typedef struct Hold
{
	int64		reservation_id;
	text	   *credit;
	HoldStatus	status;
	Numeric		amount;
	TimestampTz created_at;
	TimestampTz expires_at;
	int			nparts;			/* the tranches it came from, and how much from each */
	int64	   *tranche_id;
	Numeric    *part;

	/* how it ended; NULL and 0 while it is held */
	Numeric		consumed;
	Numeric		refunded;
	Numeric		shortfall;
	text	   *overage;
	int64		end_entry_id;	/* also 0 where it left no entry, as nothing was held */

	/* what lease_check() was asked; NULL for any other hold */
	text	   *feature;
	Numeric		quantity;
	Numeric		rate;
	Numeric		unit;
	text	   *event;

	/* what lease_track() was told; NULL and 0 until then */
	Numeric		tracked;
	Jsonb	   *traits;
	int64		track_entry_id;
} Hold;

extern bool hold_find(text *account, int64 reservation_id, Hold *hold);
extern void hold_lock(Pool *pool, int64 reservation_id, Hold *hold);
extern bool hold_is_alive(const Pool *pool, const Hold *hold);
pg_noreturn extern void hold_not_found(text *account, int64 reservation_id);
pg_noreturn extern void hold_has_ended(const Pool *pool, const Hold *hold);
extern int	hold_find_lapsed(const Pool *pool, int limit, Hold **holds);
extern void hold_collect(Pool *pool, Hold *hold, TimestampTz expires_at);
extern TimestampTz hold_expiry(const Pool *pool, const Interval *ttl);
extern void hold_create(const Pool *pool, Hold *hold, Jsonb *metadata);
extern void hold_renew(const Pool *pool, const Hold *hold);
extern TimestampTz hold_next_expiry(const Pool *pool);
extern void hold_release(Pool *pool, Hold *hold, Numeric consumed);
extern void hold_end(const Pool *pool, const Hold *hold);
extern void hold_track_late(const Pool *pool, const Hold *hold);

#endif							/* CREDIT_LEASE_HOLD_H */
