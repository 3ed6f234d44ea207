/*
 * ingest.c
 *		lease_ingest(): usage in bulk, as arrays or as jsonb.
 *
 * Here the events are read and checked, before anything is locked: one that is
 * malformed fails all of them, and is named by its ordinal. What an event
 * cannot be paid for is no such fault, but its result.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/timestamp.h"

#include "amount.h"
#include "argument.h"
#include "clock.h"
#include "compat.h"
#include "ingest.h"
#include "statement.h"

typedef enum OnShort
{
	SHORT_REFUSE,
	SHORT_CHARGE
} OnShort;

static const char *const on_short_word[] = {"refuse", "charge"};

/* Raises 22023 about an event's field. */
pg_noreturn static void
malformed(int ordinal, const char *field, const char *problem)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("event %d: %s %s", ordinal, field, problem)));
}

/* Returns a text that an event must have, of 1 to 512 bytes. */
static text *
check_text(int ordinal, const char *field, text *value)
{
	if (value == NULL)
		malformed(ordinal, field, "must not be null");
	if (VARSIZE_ANY_EXHDR(value) == 0)
		malformed(ordinal, field, "must not be empty");
	if (VARSIZE_ANY_EXHDR(value) > ARGUMENT_MAX_TEXT)
		malformed(ordinal, field, "must not be longer than " CppAsString2(ARGUMENT_MAX_TEXT) " bytes");
	return value;
}

static text *
check_optional_text(int ordinal, const char *field, text *value)
{
	return value ? check_text(ordinal, field, value) : NULL;
}

/* Returns an amount that an event must have, as argument_amount() does. */
static Numeric
check_amount(int ordinal, const char *field, Numeric value)
{
	if (value == NULL)
		malformed(ordinal, field, "must not be null");
	if (numeric_is_nan(value) || numeric_is_inf(value))
		malformed(ordinal, field, "must be finite");
	if (amount_sign(value) <= 0)
		malformed(ordinal, field, "must be positive");
	if (amount_has_too_many_digits(value))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("event %d: %s has too many digits", ordinal, field),
				 errdetail("An amount has at most %d digits before the point and %d after it.",
						   AMOUNT_MAX_INTEGER_DIGITS, AMOUNT_MAX_SCALE)));
	return amount_without_excess(value);
}

/* Makes an event one that names its credit. */
static void
set_credit(IngestEvent *event, text *credit, Numeric amount)
{
	event->own.credit = check_text(event->ordinal, "credit", credit);
	event->own.amount = check_amount(event->ordinal, "amount", amount);
	event->payer = &event->own;
	event->npayers = 1;
}

static Datum
ingest(FunctionCallInfo fcinfo, IngestEvent *events, int n, OnShort on_short)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;

	InitMaterializedSRF(fcinfo, 0);
	statement_begin();
	ingest_batch(events, n, on_short == SHORT_CHARGE);
	for (int i = 0; i < n; i++)
	{
		const IngestEvent *event = &events[i];
		Datum		values[5];
		bool		nulls[5] = {false};

		values[0] = Int32GetDatum(event->ordinal);
		values[1] = BoolGetDatum(event->applied);
		values[2] = BoolGetDatum(event->duplicate);
		values[3] = event->reason ? CStringGetTextDatum(event->reason) : (Datum) 0;
		nulls[3] = event->reason == NULL;
		values[4] = PointerGetDatum(event->available);
		nulls[4] = event->available == NULL;
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	SPI_finish();
	return (Datum) 0;
}

static OnShort
argument_on_short(FunctionCallInfo fcinfo, int n)
{
	return argument_word(argument_text(fcinfo, n, "on_short"), "on_short", on_short_word, lengthof(on_short_word));
}

/* An array that was passed, with the name of its argument; of no elements where it is NULL and may be */
typedef struct Column
{
	const char *name;
	Datum	   *value;
	bool	   *null;
	int			n;
} Column;

static void
read_column(FunctionCallInfo fcinfo, int argument, const char *name, Oid type, bool optional, Column *column)
{
	ArrayType  *array;

	*column = (Column) {.name = name};
	if (PG_ARGISNULL(argument))
	{
		if (!optional)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("%s must not be null", name)));
		return;
	}
	array = PG_GETARG_ARRAYTYPE_P(argument);
	if (ARR_NDIM(array) > 1)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must have one dimension", name)));
	deconstruct_array(array, type, -1, false, TYPALIGN_INT, &column->value, &column->null, &column->n);
}

/* Raises 22023 unless an array has as many elements as there are accounts. */
static void
require_length(FunctionCallInfo fcinfo, int argument, const Column *column, int n)
{
	if (!PG_ARGISNULL(argument) && column->n != n)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must have as many elements as account", column->name),
				 errdetail("It has %d, and account has %d.", column->n, n)));
}

/* Returns the bytes of an element, NULL for null. */
static void *
element(const Column *column, int i)
{
	return column->n == 0 || column->null[i] ? NULL : DatumGetPointer(column->value[i]);
}

static text *
text_element(const Column *column, int i)
{
	void	   *value = element(column, i);

	return value ? DatumGetTextPP(PointerGetDatum(value)) : NULL;
}

/*
 * lease_ingest(account, credit, amount, idempotency_key, metadata, on_short)
 *		Spends what events say was used, and returns what came of each. Raises
 *		22023 for what is malformed, LC009, and 40001 above READ COMMITTED; an
 *		event that cannot be paid for, or came before, does not spoil the rest.
 */
PG_FUNCTION_INFO_V1(lease_ingest_arrays);
Datum
lease_ingest_arrays(PG_FUNCTION_ARGS)
{
	Column		account;
	Column		credit;
	Column		amount;
	Column		key;
	Column		metadata;
	OnShort		on_short = argument_on_short(fcinfo, 5);
	IngestEvent *events;

	read_column(fcinfo, 0, "account", TEXTOID, false, &account);
	read_column(fcinfo, 1, "credit", TEXTOID, false, &credit);
	read_column(fcinfo, 2, "amount", NUMERICOID, false, &amount);
	read_column(fcinfo, 3, "idempotency_key", TEXTOID, true, &key);
	read_column(fcinfo, 4, "metadata", JSONBOID, true, &metadata);
	require_length(fcinfo, 1, &credit, account.n);
	require_length(fcinfo, 2, &amount, account.n);
	require_length(fcinfo, 3, &key, account.n);
	require_length(fcinfo, 4, &metadata, account.n);

	events = MemoryContextAllocExtended(CurrentMemoryContext, sizeof(IngestEvent) * Max(account.n, 1),
										MCXT_ALLOC_HUGE | MCXT_ALLOC_ZERO);
	for (int i = 0; i < account.n; i++)
	{
		IngestEvent *event = &events[i];
		void	   *value;

		CHECK_FOR_INTERRUPTS();
		event->ordinal = i + 1;
		event->account = check_text(i + 1, "account", text_element(&account, i));
		value = element(&amount, i);
		set_credit(event, text_element(&credit, i), value ? DatumGetNumeric(PointerGetDatum(value)) : NULL);
		event->key = check_optional_text(i + 1, "idempotency_key", text_element(&key, i));
		value = element(&metadata, i);
		event->metadata = value ? DatumGetJsonbP(PointerGetDatum(value)) : NULL;
	}
	return ingest(fcinfo, events, account.n, on_short);
}

/* The members that an event may have */
typedef enum Member
{
	MEMBER_ACCOUNT,
	MEMBER_CREDIT,
	MEMBER_AMOUNT,
	MEMBER_FEATURE,
	MEMBER_QUANTITY,
	MEMBER_KEY,
	MEMBER_SHORT_KEY,
	MEMBER_TIME,
	MEMBER_METADATA
} Member;

#define MEMBERS	(MEMBER_METADATA + 1)

static const struct
{
	const char *name;
	enum jbvType type;			/* jbvBinary for any */
	const char *problem;
}			member_kind[MEMBERS] = {
	{"account", jbvString, "must be a string"},
	{"credit", jbvString, "must be a string"},
	{"amount", jbvNumeric, "must be a number"},
	{"feature", jbvString, "must be a string"},
	{"quantity", jbvNumeric, "must be a number"},
	{"idempotency_key", jbvString, "must be a string"},
	{"key", jbvString, "must be a string"},
	{"time", jbvString, "must be a string"},
	{"metadata", jbvBinary, NULL}
};

static Member
find_member(int ordinal, const JsonbValue *name)
{
	for (int i = 0; i < MEMBERS; i++)
	{
		if ((int) strlen(member_kind[i].name) == name->val.string.len &&
			memcmp(member_kind[i].name, name->val.string.val, name->val.string.len) == 0)
			return i;
	}
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("event %d: unrecognized member \"%s\"", ordinal,
					pnstrdup(name->val.string.val, name->val.string.len)),
			 errhint("What is not for credit_lease goes into \"metadata\".")));
}

/* Reads the members of an object; those that are missing or null are of type jbvNull. */
static void
read_members(int ordinal, JsonbContainer *object, JsonbValue *value)
{
	JsonbIterator *iterator = JsonbIteratorInit(object);
	JsonbIteratorToken token;
	JsonbValue	name;

	for (int i = 0; i < MEMBERS; i++)
		value[i].type = jbvNull;
	while ((token = JsonbIteratorNext(&iterator, &name, true)) != WJB_DONE)
	{
		Member		member;

		if (token != WJB_KEY)
			continue;
		member = find_member(ordinal, &name);
		JsonbIteratorNext(&iterator, &value[member], true);
		if (value[member].type != jbvNull && member_kind[member].type != jbvBinary &&
			value[member].type != member_kind[member].type)
			malformed(ordinal, member_kind[member].name, member_kind[member].problem);
	}
}

static text *
text_member(const JsonbValue *value, Member member)
{
	if (value[member].type == jbvNull)
		return NULL;
	return cstring_to_text_with_len(value[member].val.string.val, value[member].val.string.len);
}

static Numeric
number_member(const JsonbValue *value, Member member)
{
	return value[member].type == jbvNull ? NULL : value[member].val.numeric;
}

/* Refuses two members of which only one can be meant. */
static void
exclude(int ordinal, const JsonbValue *value, Member member, Member other)
{
	if (value[member].type != jbvNull && value[other].type != jbvNull)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("event %d: %s and %s exclude each other", ordinal,
						member_kind[member].name, member_kind[other].name)));
}

/* Returns the metadata with the event's time, in UTC. */
static Jsonb *
add_time(int ordinal, Jsonb *metadata, const JsonbValue *member, TimestampTz now)
{
	const int	utc = 0;
	JsonbParseState *state = NULL;
	JsonbValue	name = {.type = jbvString};
	JsonbValue	time = {.type = jbvString};
	TimestampTz instant;

	if (!clock_parse(pnstrdup(member->val.string.val, member->val.string.len), &instant))
		malformed(ordinal, "time", "must be a timestamp");
	if (instant > now)
		malformed(ordinal, "time", "must not be in the future");
	if (metadata && !JB_ROOT_IS_OBJECT(metadata))
		malformed(ordinal, "metadata", "must be an object where there is a time");

	name.val.string.val = unconstify(char *, member_kind[MEMBER_TIME].name);
	name.val.string.len = strlen(name.val.string.val);
	if (metadata && getKeyJsonValueFromContainer(&metadata->root, name.val.string.val, name.val.string.len, NULL))
		malformed(ordinal, "metadata", "must not have a time where the event has one");
	time.val.string.val = JsonEncodeDateTime(NULL, TimestampTzGetDatum(instant), TIMESTAMPTZOID, &utc);
	time.val.string.len = strlen(time.val.string.val);

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	if (metadata)
	{
		JsonbIterator *iterator = JsonbIteratorInit(&metadata->root);
		JsonbIteratorToken token;
		JsonbValue	value;

		while ((token = JsonbIteratorNext(&iterator, &value, true)) != WJB_DONE)
		{
			if (token == WJB_KEY || token == WJB_VALUE)
				pushJsonbValue(&state, token, &value);
		}
	}
	pushJsonbValue(&state, WJB_KEY, &name);
	pushJsonbValue(&state, WJB_VALUE, &time);
	return JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL));
}

static void
read_event(IngestEvent *event, JsonbContainer *object, TimestampTz now)
{
	int			ordinal = event->ordinal;
	JsonbValue	value[MEMBERS];

	read_members(ordinal, object, value);
	exclude(ordinal, value, MEMBER_CREDIT, MEMBER_FEATURE);
	exclude(ordinal, value, MEMBER_CREDIT, MEMBER_QUANTITY);
	exclude(ordinal, value, MEMBER_FEATURE, MEMBER_AMOUNT);
	exclude(ordinal, value, MEMBER_KEY, MEMBER_SHORT_KEY);
	event->account = check_text(ordinal, "account", text_member(value, MEMBER_ACCOUNT));
	if (value[MEMBER_FEATURE].type == jbvNull && value[MEMBER_QUANTITY].type == jbvNull)
		set_credit(event, text_member(value, MEMBER_CREDIT), number_member(value, MEMBER_AMOUNT));
	else
	{
		event->feature = check_text(ordinal, "feature", text_member(value, MEMBER_FEATURE));
		event->quantity = check_amount(ordinal, "quantity", number_member(value, MEMBER_QUANTITY));
	}
	for (Member key = MEMBER_KEY; key <= MEMBER_SHORT_KEY; key++)
	{
		if (value[key].type != jbvNull)
			event->key = check_text(ordinal, member_kind[key].name, text_member(value, key));
	}
	if (value[MEMBER_METADATA].type != jbvNull)
		event->metadata = JsonbValueToJsonb(&value[MEMBER_METADATA]);
	if (value[MEMBER_TIME].type != jbvNull)
		event->metadata = add_time(ordinal, event->metadata, &value[MEMBER_TIME], now);
}

/*
 * lease_ingest(events, on_short)
 *		The same, of a jsonb array of objects. An event may name a feature and a
 *		quantity in place of a credit and an amount.
 */
PG_FUNCTION_INFO_V1(lease_ingest_events);
Datum
lease_ingest_events(PG_FUNCTION_ARGS)
{
	TimestampTz now = clock_now();
	OnShort		on_short = argument_on_short(fcinfo, 1);
	Jsonb	   *array = argument_optional_jsonb(fcinfo, 0);
	JsonbIterator *iterator;
	JsonbIteratorToken token;
	JsonbValue	value;
	IngestEvent *events;
	int			n = 0;

	if (array == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("events must not be null")));
	if (!JB_ROOT_IS_ARRAY(array) || JB_ROOT_IS_SCALAR(array))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("events must be a JSON array")));

	events = MemoryContextAllocExtended(CurrentMemoryContext, sizeof(IngestEvent) * Max(JB_ROOT_COUNT(array), 1),
										MCXT_ALLOC_HUGE | MCXT_ALLOC_ZERO);
	iterator = JsonbIteratorInit(&array->root);
	JsonbIteratorNext(&iterator, &value, false);
	while ((token = JsonbIteratorNext(&iterator, &value, true)) == WJB_ELEM)
	{
		IngestEvent *event = &events[n++];

		CHECK_FOR_INTERRUPTS();
		event->ordinal = n;
		if (value.type != jbvBinary || !JsonContainerIsObject(value.val.binary.data))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("event %d must be a JSON object", n)));
		read_event(event, value.val.binary.data, now);
	}
	return ingest(fcinfo, events, n, on_short);
}
