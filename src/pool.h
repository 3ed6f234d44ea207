#ifndef CREDIT_LEASE_POOL_H
#define CREDIT_LEASE_POOL_H

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"
#include "storage/itemptr.h"
#include "utils/array.h"

#include "account.h"
#include "amount.h"
#include "compat.h"
#include "statement.h"

/* The terms of rule 2; granted is the sum of the others. In the table's order. */
typedef enum Bucket
{
	GRANTED,
	CHUNKED,
	RESERVED,
	REMAINING,
	CONSUMED,
	EXPIRED,
	RETURNED,
	REVOKED
} Bucket;

#define BUCKETS	(REVOKED + 1)

/* Where the caller does not say. */
#define DEFAULT_PRIORITY	100

/* Why a pool with a mirror that is not trusted any more is short */
#define POOL_STALE	"what it said of its balance is too old"

/*
 * A tranche of a locked account. An amount that did not change is the same pointer in all
 * three arrays.
 */
typedef struct Tranche
{
	int64		tranche_id;		/* 0 until a new one has its ledger entry */
	int32		priority;
	TimestampTz expires_at;		/* DT_NOEND for never */
	TimestampTz stored_expires_at;
	text	   *server;			/* whose lease it is; NULL for none */
	text	   *lease_id;		/* NULL for what is no lease */
	bool		is_mirror;
	TimestampTz released_at;	/* DT_NOEND while it is not */
	TimestampTz stored_released_at;
	Numeric		refill_below;	/* see the table; NULL for none */
	TimestampTz trusted_until;	/* DT_NOEND for ever */
	TimestampTz stored_trusted_until;
	Numeric		overdrawn;		/* by how much less than nothing remains of a mirror */
	Numeric		stored_overdrawn;
	TimestampTz hold_expires_at;	/* none of its holds expires earlier */
	TimestampTz stored_hold_expires_at;
	ItemPointerData tid;		/* of the row */
	ItemPointerData own_tid;	/* ... of the tranche itself, where that is in a stripe */
	bool		alive;			/* by the clock of the call, not released, and trusted */
	bool		is_new;			/* not in the table yet */
	bool		in_stripe;		/* the row and the amounts are of tranche_stripe */
	bool		has_row;		/* ... and it is there */
	int64		refund_of;		/* the entry that a refund gives back, or 0 */
	Numeric		balance[BUCKETS];	/* as it is to be */
	Numeric		logged[BUCKETS];	/* as the ledger has it */
	Numeric		stored[BUCKETS];	/* as the table has it */
	Numeric		striped;		/* of the whole tranche, what is in stripes */
	Numeric		elsewhere;		/* what remains in other rows: its own, or all if the pool has been looked through */
} Tranche;

/* A row of a striped tranche, of which a call has taken to its own stripe what remained. */
typedef struct Donor
{
	const Tranche *tranche;
	int			stripe;			/* 0 for the tranche's own row */
	ItemPointerData tid;
	Numeric		share;			/* granted to the stripe; of the tranche's own row, striped */
	Numeric		remaining;
} Donor;

/* A row of credit_lease.stripe: where it is, and who has made it */
typedef struct StripeRow
{
	ItemPointerData tid;
	TransactionId xmin;
} StripeRow;

/* The tranches of one pool, in the order in which they burn. */
typedef struct Pool
{
	text	   *account;
	text	   *credit;
	ArrayType  *closed_ids;		/* closed ones that are read as well, or NULL */

	bool		striped;
	int			stripe;			/* the one that the call works in, 0 for the account's own rows */
	StripeRow	stripe_row;		/* that was locked */
	bool		has_all;		/* all stripes are locked, and the account */
	bool		is_first;		/* nothing of the account was locked before */
	Numeric		wanted;			/* of which the call takes what there is, beyond what it needs; or NULL */
	bool		looked;			/* what remains elsewhere is known for each tranche */
	TimestampTz looked_at;		/* ... since */
	Numeric		elsewhere;		/* ... or for all that are alive, from a moment ago */
	uint32		composition;	/* changes with what the pool consists of */
	List	   *donors;			/* not saved yet */

	TimestampTz now;			/* when it was first read, under the lock */
	bool		may_be_frozen;	/* something of the account is frozen */
	char	   *upstream_error;	/* why its upstream has not supplied it, or NULL */
	bool		unreachable;	/* ... that being that it could not be asked in time */
	bool		is_stale;		/* ... or that what it has said of a mirror is too old */
	bool		may_have_lapsed;	/* expired holds that are not given back */
	bool		has_lapsed_chunks;	/* of a striped pool: so it was found */
	Numeric		available;
	Numeric		held;
	int			ntranches;
	Tranche   **tranche;
} Pool;

extern Parameters pool_parameters(const Pool *pool);
extern bool pool_lock(Pool *pool, Numeric amount);
extern bool pool_lock_account(Pool *pool, AccountLock how);
extern void pool_read(Pool *pool);
extern void pool_load(Pool *pool, const uint64 *rows, int n);
extern void pool_look(Pool *pool);
extern bool pool_find_freeze(const Pool *pool, char **reason);
extern bool pool_is_frozen(const Pool *pool);
extern bool tranche_is_open(const Tranche *tranche);
extern Tranche *pool_get(const Pool *pool, int64 tranche_id);
extern Tranche *pool_add(Pool *pool, Numeric amount, int32 priority, TimestampTz expires_at);
extern void pool_grant(Pool *pool, Tranche *tranche, Numeric amount);
extern void pool_move(Pool *pool, Tranche *tranche, Bucket from, Bucket to, Numeric amount);
extern Numeric pool_give_back(Pool *pool, Tranche *tranche, Bucket from, Numeric amount);
extern void pool_set_mirror(Pool *pool, Tranche *mirror, Numeric left, TimestampTz trusted_until);
extern Numeric pool_mirrored(const Pool *pool);
extern void pool_take(Pool *pool, Numeric amount, Bucket to);
extern bool pool_lacks_supply(const Pool *pool);
pg_noreturn extern void pool_refuse(const Pool *pool, Numeric requested);
pg_noreturn extern void pool_refuse_frozen(const Pool *pool, const char *reason);
pg_noreturn extern void pool_refuse_short(const Pool *pool, Numeric requested);

#endif							/* CREDIT_LEASE_POOL_H */
