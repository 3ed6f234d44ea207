#ifndef CREDIT_LEASE_INGEST_H
#define CREDIT_LEASE_INGEST_H

#include "datatype/timestamp.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"

#include "pool.h"

/* What the ledger knows of an event's key from before the call, as far as it was looked up */
typedef enum IngestPast
{
	INGEST_NO_PAST,
	INGEST_SAME,
	INGEST_OTHER
} IngestPast;

/* A pool, while a part of a batch is worked on */
typedef struct IngestPool
{
	Pool		pool;
	Numeric		available;		/* when it was read */
	int			next;			/* nothing that can be spent is left of the tranches before this one */
	bool		locked;			/* its account is; else it is taken to be empty */
	bool		looked;			/* whether it is frozen is known */
	bool		frozen;
} IngestPool;

/* A credit that may pay for an event */
typedef struct IngestPayer
{
	text	   *credit;
	Numeric		amount;
	text	   *reported_as;	/* the usage, NULL for what is not of a feature */
	IngestPool *pool;
} IngestPayer;

typedef struct IngestEvent
{
	int			ordinal;
	text	   *account;
	text	   *feature;		/* NULL where the event names a credit */
	Numeric		quantity;
	text	   *key;			/* NULL for none */
	Jsonb	   *metadata;
	int			npayers;		/* those that may pay, in the order in which they are tried */
	IngestPayer *payer;
	IngestPayer own;			/* the one of an event that names a credit */

	IngestPast	past;
	int			account_number;
	struct IngestEvent *twin;	/* the first of the events with its key; of that one itself ... */
	struct IngestEvent *taker;	/* ... which of them has the key */

	/* what comes of it */
	bool		applied;
	bool		duplicate;
	const char *reason;			/* NULL for none */
	Numeric		available;		/* NULL where there is no pool */
} IngestEvent;

/* A ledger entry to be */
typedef struct IngestEntry
{
	const IngestEvent *event;
	const Pool *pool;
	const Tranche *tranche;		/* NULL for what was not there */
	Numeric		amount;
	Numeric		available;
	int			nth;			/* of the event's, from 0 */
	int			parts;			/* of the event */
	Jsonb	   *arguments;
} IngestEntry;

/* What a part of a batch comes to, to be written together */
typedef struct IngestPosting
{
	IngestEntry *entry;
	int			nentries;
	int			size;
	IngestPool *pool;
	int			npools;
	TimestampTz now;
} IngestPosting;

extern void ingest_refuse(IngestEvent *event, const char *reason, Numeric available);
extern void ingest_apply(IngestEvent *event, bool is_short, Numeric available);
extern int	ingest_price(IngestEvent **event, int n);
extern void ingest_batch(IngestEvent *events, int n, bool charge);
extern void ingest_single(IngestEvent *event, bool charge);
extern void ingest_write(void *posting);

extern Jsonb *ingest_arguments(const IngestEvent *event, bool is_short);
extern int	ingest_look_back(IngestEvent **events, int n);
extern bool ingest_is_same(const IngestEvent *a, const IngestEvent *b);
extern void ingest_repeat(IngestEvent *event, bool same, Numeric available);

#endif							/* CREDIT_LEASE_INGEST_H */
