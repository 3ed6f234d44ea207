#ifndef CREDIT_LEASE_REQUEST_H
#define CREDIT_LEASE_REQUEST_H

#include "datatype/timestamp.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"

#include "pool.h"

/*
 * What a call does to each tranche it touches: the ledger's word for it, and the
 * change that is the amount of the entry.
 */
typedef struct EntryKind
{
	const char *name;
	Bucket		bucket;
	bool		negated;
	bool		settles;		/* tells what came back apart from its amount */
} EntryKind;

/*
 * A call that writes entries. The key and the arguments stand in its first
 * entry, so that a replay can be told from another request.
 */
typedef struct Request
{
	const EntryKind *kind;
	text	   *account;
	text	   *credit;			/* NULL where it is no argument */
	text	   *key;			/* NULL for none */
	Numeric		amount;			/* done in full or not at all; NULL if there is none */
	Numeric		shortfall;		/* of what was asked for, what is not there and is recorded; NULL for none */
	Jsonb	   *metadata;
	text	   *reason;
	JsonbParseState *state;		/* of the arguments, while they are added */
	Jsonb	   *arguments;		/* NULL without a key */
} Request;

/* What the first call with a key did. */
typedef struct FirstCall
{
	int64		entry_id;
	int64		tranche_id;
	int64		reservation_id; /* 0 for none */
	Numeric		amount;
	Numeric		available;
} FirstCall;

extern void request_add_amount(Request *request, const char *name, Numeric value);
extern void request_add_text(Request *request, const char *name, text *value);
extern void request_add_int64(Request *request, const char *name, int64 value);
extern void request_add_interval(Request *request, const char *name, const Interval *value);
extern void request_add_instant(Request *request, const char *name, TimestampTz value);
extern void request_end_arguments(Request *request);
extern bool request_same_jsonb(Jsonb *a, Jsonb *b);
extern bool request_find_first(const Request *request, bool taken, FirstCall *first);

#endif							/* CREDIT_LEASE_REQUEST_H */
