#ifndef CREDIT_LEASE_MIRROR_H
#define CREDIT_LEASE_MIRROR_H

#include "datatype/timestamp.h"
#include "utils/array.h"
#include "utils/numeric.h"

/* What is known of a balance that lives elsewhere: how much it was, when, and what of our usage is taken off it already. */
typedef struct Checkpoint
{
	text	   *account;
	text	   *credit;
	text	   *server;			/* NULL for none */
	Numeric		balance;
	TimestampTz as_of;
	Numeric		included;		/* so much of the usage; NULL where that is told by keys or by time */
	ArrayType  *keys;			/* ... what was included before, and what has these keys; NULL for all until as_of */
	text	   *company_id;		/* the upstream's name of the account; NULL where it was not asked */
} Checkpoint;

/* What that comes to */
typedef struct MirrorState
{
	Numeric		available;		/* of the pool */
	Numeric		pending;
	TimestampTz as_of;
} MirrorState;

extern void mirror_record(const Checkpoint *checkpoint, MirrorState *state);

#endif							/* CREDIT_LEASE_MIRROR_H */
