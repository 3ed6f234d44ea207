#ifndef CREDIT_LEASE_INGEST_LABEL_H
#define CREDIT_LEASE_INGEST_LABEL_H

#include "common/hashfn.h"

/* What is found by an account's number and a name: its pools, its events by their keys, its features */
typedef struct Label
{
	int			account;
	const text *name;
} Label;

typedef struct LabelEntry
{
	Label		label;
	void	   *value;
	uint32		hash;
	char		status;
} LabelEntry;

static inline uint32
hash_label(Label label)
{
	return hash_combine(hash_bytes((const unsigned char *) VARDATA_ANY(label.name), VARSIZE_ANY_EXHDR(label.name)),
						murmurhash32((uint32) label.account));
}

static inline bool
same_label(Label a, Label b)
{
	return a.account == b.account && VARSIZE_ANY_EXHDR(a.name) == VARSIZE_ANY_EXHDR(b.name) &&
		memcmp(VARDATA_ANY(a.name), VARDATA_ANY(b.name), VARSIZE_ANY_EXHDR(a.name)) == 0;
}

#define SH_PREFIX labels
#define SH_ELEMENT_TYPE LabelEntry
#define SH_KEY_TYPE Label
#define SH_KEY label
#define SH_HASH_KEY(table, label) hash_label(label)
#define SH_EQUAL(table, a, b) same_label(a, b)
#define SH_STORE_HASH
#define SH_GET_HASH(table, entry) (entry)->hash
#define SH_SCOPE static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

#endif							/* CREDIT_LEASE_INGEST_LABEL_H */
