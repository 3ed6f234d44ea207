/*
 * request.c
 *		The idempotency key and what it stands for (rule 5).
 *
 * The unique index of the ledger is what makes a key have one effect; here is
 * what tells the same request from another one. The function, the credit, an
 * amount that is done in full or not at all, and the metadata have columns of
 * their own in the ledger; the other arguments are kept as jsonb beside the
 * key. All are compared as values: 5 is 5.00.
 *
 * A key is looked up only after it turned out to be taken, or before a
 * refusal: the usual call pays nothing for it but the unique index.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/date.h"
#include "utils/fmgrprotos.h"
#include "utils/json.h"
#include "utils/timestamp.h"

#include "amount.h"
#include "compat.h"
#include "errors.h"
#include "request.h"
#include "statement.h"

/* The other rows of a call come soon after its first. */
static Statement first_statement = {
	.sql = "SELECT l.kind, l.credit, l.request, l.metadata, l.entry_id, l.tranche_id,"
	" coalesce(l.reservation_id, 0), l.available,"
	" l.amount + CASE WHEN l.parts IS NULL THEN 0 ELSE"
	" (SELECT CASE WHEN count(*) = l.parts - 1 THEN sum(p.amount) END FROM (SELECT s.amount FROM credit_lease.ledger s"
	"  WHERE s.account = $1 AND s.entry_id > l.entry_id AND s.first_entry_id = l.entry_id"
	"  ORDER BY s.entry_id LIMIT l.parts - 1) p) END"
	" FROM credit_lease.ledger l WHERE l.account = $1 AND l.idempotency_key = $2",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

static void
add_value(Request *request, const char *name, JsonbValue *value)
{
	JsonbValue	key = {.type = jbvString};

	key.val.string.val = unconstify(char *, name);
	key.val.string.len = strlen(name);
	if (request->state == NULL)
		pushJsonbValue(&request->state, WJB_BEGIN_OBJECT, NULL);
	pushJsonbValue(&request->state, WJB_KEY, &key);
	pushJsonbValue(&request->state, WJB_VALUE, value);
}

static void
add_string(Request *request, const char *name, char *string, int length)
{
	JsonbValue	value = {.type = jbvString};

	value.val.string.val = string;
	value.val.string.len = length;
	add_value(request, name, &value);
}

static void
add_null(Request *request, const char *name)
{
	add_value(request, name, &(JsonbValue) {.type = jbvNull});
}

/*
 * request_add_amount, and the other request_add functions
 *		Add an argument that no column of the ledger has. They do nothing for a
 *		request without a key; NULL pointers and DT_NOEND stand for NULL.
 */
void
request_add_amount(Request *request, const char *name, Numeric amount)
{
	JsonbValue	value = {.type = jbvNumeric};

	if (request->key == NULL)
		return;
	if (amount == NULL)
	{
		add_null(request, name);
		return;
	}
	value.val.numeric = amount;
	add_value(request, name, &value);
}

void
request_add_text(Request *request, const char *name, text *string)
{
	if (request->key == NULL)
		return;
	if (string)
		add_string(request, name, VARDATA_ANY(string), VARSIZE_ANY_EXHDR(string));
	else
		add_null(request, name);
}

void
request_add_int64(Request *request, const char *name, int64 value)
{
	if (request->key)
		request_add_amount(request, name, int64_to_numeric(value));
}

/* In seconds, so that neither spelling nor IntervalStyle makes a difference. */
void
request_add_interval(Request *request, const char *name, const Interval *interval)
{
	if (request->key == NULL)
		return;
	if (interval)
		request_add_amount(request, name,
						   DatumGetNumeric(DirectFunctionCall2(extract_interval,
															   PointerGetDatum(cstring_to_text("epoch")),
															   IntervalPGetDatum(interval))));
	else
		add_null(request, name);
}

/* In UTC, so that neither TimeZone nor DateStyle makes a difference. */
void
request_add_instant(Request *request, const char *name, TimestampTz instant)
{
	const int	utc = 0;
	char	   *string;

	if (request->key == NULL)
		return;
	if (TIMESTAMP_IS_NOEND(instant))
	{
		add_null(request, name);
		return;
	}
	string = JsonEncodeDateTime(NULL, TimestampTzGetDatum(instant), TIMESTAMPTZOID, &utc);
	add_string(request, name, string, strlen(string));
}

/* Ends what the request_add functions have begun, if they have. */
void
request_end_arguments(Request *request)
{
	if (request->state)
		request->arguments = JsonbValueToJsonb(pushJsonbValue(&request->state, WJB_END_OBJECT, NULL));
}

pg_noreturn static void
key_reused(const Request *request, const char *field)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_KEY_REUSED),
			 errmsg("idempotency key \"%s\" of account \"%s\" was used for another request",
					text_to_cstring(request->key), text_to_cstring(request->account)),
			 errdetail("The two requests differ in \"%s\".", field),
			 errhint("A key stands for one request, for ever.")));
}

/* Raises LC009: an entry that must be there is not. */
pg_noreturn static void
incomplete(const Request *request)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_BOOKS),
			 errmsg("the ledger of account \"%s\" lacks an entry", text_to_cstring(request->account))));
}

/* Returns whether two values, or NULLs, are the same. */
bool
request_same_jsonb(Jsonb *a, Jsonb *b)
{
	if (a == NULL || b == NULL)
		return a == b;
	return compareJsonbContainers(&a->root, &b->root) == 0;
}

/* Raises LC002 that names the argument in which two requests differ, if any. */
static void
compare_arguments(const Request *request, Jsonb *first)
{
	JsonbIterator *iterator = JsonbIteratorInit(&request->arguments->root);
	JsonbIteratorToken token;
	JsonbValue	name;

	while ((token = JsonbIteratorNext(&iterator, &name, true)) != WJB_DONE)
	{
		JsonbValue	now;
		JsonbValue *then;

		if (token != WJB_KEY)
			continue;
		JsonbIteratorNext(&iterator, &now, true);
		then = getKeyJsonValueFromContainer(&first->root, name.val.string.val,
											name.val.string.len, NULL);
		if (then == NULL ||
			!request_same_jsonb(JsonbValueToJsonb(&now), JsonbValueToJsonb(then)))
			key_reused(request, pnstrdup(name.val.string.val, name.val.string.len));
	}
}

/*
 * request_find_first
 *		Returns whether the request's key has had its effect already, and what
 *		that was. Raises LC002 where it was another request's, and LC009 where
 *		the key is known to be taken and is not there. Takes no lock.
 */
bool
request_find_first(const Request *request, bool taken, FirstCall *first)
{
	Parameters	parameters = {0};
	bool		isnull;
	Datum		value;

	if (request->key)
	{
		parameter_add_pointer(&parameters, request->account);
		parameter_add_pointer(&parameters, request->key);
	}
	if (request->key == NULL || statement_execute(&first_statement, &parameters) == 0)
	{
		if (taken)
			incomplete(request);
		return false;
	}

	if (strcmp(TextDatumGetCString(statement_value(0, 1, &isnull)), request->kind->name) != 0)
		key_reused(request, "function");

	value = statement_value(0, 2, &isnull);
	if (request->credit &&
		strcmp(TextDatumGetCString(value), text_to_cstring(request->credit)) != 0)
		key_reused(request, "credit");

	value = statement_value(0, 9, &isnull);
	if (isnull)
		incomplete(request);
	first->amount = DatumGetNumeric(value);
	if (request->amount && amount_compare(request->amount, first->amount) != 0)
		key_reused(request, "amount");

	/* what is spent of a chunk is told from what is spent of the pool by what it has to say */
	value = statement_value(0, 3, &isnull);
	if (isnull != (request->arguments == NULL))
		key_reused(request, "function");
	if (!isnull)
		compare_arguments(request, DatumGetJsonbP(value));

	value = statement_value(0, 4, &isnull);
	if (!request_same_jsonb(request->metadata, isnull ? NULL : DatumGetJsonbP(value)))
		key_reused(request, "metadata");

	first->entry_id = DatumGetInt64(statement_value(0, 5, &isnull));
	first->tranche_id = DatumGetInt64(statement_value(0, 6, &isnull));
	first->reservation_id = DatumGetInt64(statement_value(0, 7, &isnull));
	first->available = DatumGetNumeric(statement_value(0, 8, &isnull));
	return true;
}
