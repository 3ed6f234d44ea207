/*
 * ingest_key.c
 *		The idempotency keys of ingested events: which came before (rule 5).
 *
 * An event is the same as another if it has the account, the key, what was used
 * and the metadata of the other. What was used of a feature is the quantity,
 * whatever it cost; nor does it matter what was to be done where there was too
 * little. An event that names a credit is the same request as lease_consume()
 * is with these arguments, and the ledger has the same of both, unless the
 * event was charged and there was too little: then it is another one to
 * lease_consume(), which spends all or nothing.
 *
 * Takes no lock; whoever looks back has the account's, but for events of which
 * nothing is written in any case.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"

#include "amount.h"
#include "ingest.h"
#include "request.h"
#include "statement.h"

/* As in request.c, of many keys */
static Statement past_statement = {
	.sql = "SELECT i.n::pg_catalog.int4, l.kind, l.credit, l.request, l.metadata,"
	" l.amount + CASE WHEN l.parts IS NULL THEN 0 ELSE"
	" (SELECT coalesce(pg_catalog.sum(p.amount), 0) FROM (SELECT s.amount FROM credit_lease.ledger s"
	"  WHERE s.account = i.account AND s.entry_id > l.entry_id AND s.first_entry_id = l.entry_id"
	"  ORDER BY s.entry_id LIMIT l.parts - 1) p) END"
	" FROM unnest($1, $2) WITH ORDINALITY AS i (account, key, n), credit_lease.ledger l"
	" WHERE l.account = i.account AND l.idempotency_key = i.key",
	.nargs = 2,
	.argtypes = {TEXTARRAYOID, TEXTARRAYOID}
};

#define FEATURE		"feature"
#define QUANTITY	"quantity"
#define ON_SHORT	"on_short"

/*
 * ingest_arguments
 *		Returns what the ledger keeps of an event beside its key and the columns
 *		that it has, NULL for nothing.
 */
Jsonb *
ingest_arguments(const IngestEvent *event, bool is_short)
{
	Request		request = {.key = event->key};

	if (event->feature)
	{
		request_add_text(&request, FEATURE, event->feature);
		request_add_amount(&request, QUANTITY, event->quantity);
	}
	if (is_short)
		request_add_text(&request, ON_SHORT, cstring_to_text("charge"));
	request_end_arguments(&request);
	return request.arguments;
}

static bool
same_text(const text *a, const text *b)
{
	return VARSIZE_ANY_EXHDR(a) == VARSIZE_ANY_EXHDR(b) &&
		memcmp(VARDATA_ANY(a), VARDATA_ANY(b), VARSIZE_ANY_EXHDR(a)) == 0;
}

static JsonbValue *
argument(Jsonb *arguments, const char *name)
{
	return arguments ? getKeyJsonValueFromContainer(&arguments->root, name, strlen(name), NULL) : NULL;
}

/* Returns whether a row of the last result is what an event would have left, or has. */
static bool
is_in_row(const IngestEvent *event, uint64 row)
{
	bool		isnull;
	char	   *kind = TextDatumGetCString(statement_value(row, 2, &isnull));
	Datum		value = statement_value(row, 4, &isnull);
	Jsonb	   *arguments = isnull ? NULL : DatumGetJsonbP(value);
	JsonbValue *feature = argument(arguments, FEATURE);
	JsonbValue *quantity = argument(arguments, QUANTITY);
	bool		is_short = argument(arguments, ON_SHORT) != NULL;

	value = statement_value(row, 5, &isnull);
	if (!request_same_jsonb(event->metadata, isnull ? NULL : DatumGetJsonbP(value)))
		return false;
	if (strcmp(kind, event->feature ? "track" : "consume") != 0 && !(is_short && strcmp(kind, "shortfall") == 0))
		return false;
	if (event->feature)
		return feature && same_text(event->feature, cstring_to_text_with_len(feature->val.string.val, feature->val.string.len)) &&
			amount_compare(event->quantity, quantity->val.numeric) == 0;

	/* other arguments are of what is spent of a chunk */
	return feature == NULL && (arguments == NULL || is_short) &&
		same_text(event->own.credit, DatumGetTextPP(statement_value(row, 3, &isnull))) &&
		amount_compare(event->own.amount, DatumGetNumeric(statement_value(row, 6, &isnull))) == 0;
}

/*
 * ingest_look_back
 *		Finds out for events which of their keys the ledger has, and for what;
 *		returns how many more are known than before.
 */
int
ingest_look_back(IngestEvent **events, int n)
{
	Parameters	parameters = {0};
	IngestEvent **asked = palloc(sizeof(IngestEvent *) * n);
	Datum	   *account = palloc(sizeof(Datum) * n);
	Datum	   *key = palloc(sizeof(Datum) * n);
	int			nasked = 0;
	uint64		found;

	for (int i = 0; i < n; i++)
	{
		if (events[i]->key == NULL || events[i]->past != INGEST_NO_PAST)
			continue;
		account[nasked] = PointerGetDatum(events[i]->account);
		key[nasked] = PointerGetDatum(events[i]->key);
		asked[nasked++] = events[i];
	}
	if (nasked == 0)
		return 0;
	parameter_add_texts(&parameters, account, nasked);
	parameter_add_texts(&parameters, key, nasked);
	found = statement_execute(&past_statement, &parameters);
	for (uint64 row = 0; row < found; row++)
	{
		bool		isnull;
		IngestEvent *event = asked[DatumGetInt32(statement_value(row, 1, &isnull)) - 1];

		event->past = is_in_row(event, row) ? INGEST_SAME : INGEST_OTHER;
	}
	return (int) found;
}

/* Returns whether two events of an account with the same key are the same. */
bool
ingest_is_same(const IngestEvent *a, const IngestEvent *b)
{
	if ((a->feature == NULL) != (b->feature == NULL) || !request_same_jsonb(a->metadata, b->metadata))
		return false;
	if (a->feature)
		return same_text(a->feature, b->feature) && amount_compare(a->quantity, b->quantity) == 0;
	return same_text(a->own.credit, b->own.credit) && amount_compare(a->own.amount, b->own.amount) == 0;
}

/* Notes what comes of an event whose key has had its effect, for the same or for another request. */
void
ingest_repeat(IngestEvent *event, bool same, Numeric available)
{
	event->applied = false;
	event->duplicate = same;
	event->reason = same ? "duplicate" : "key_conflict";
	event->available = available;
}
