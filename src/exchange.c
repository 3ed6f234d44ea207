/*
 * exchange.c
 *		One exchange with an upstream: from what is to be asked, by way of its
 *		dialect, to what it has answered.
 *
 * A dialect is two SQL functions over jsonb. NAME_request(operation, request)
 * makes an HTTP request, {"url", "headers", "body"}, of what is to be asked;
 * NAME_outcome(operation, request, status, reply) makes {"lease_id",
 * "company_id", "credit_type_id", "granted", "expires_at", "released_at",
 * "balance"} of a reply, or {"error"}; balance, what the upstream has beyond
 * the lease, may be left out; of what was asked about a balance, that and
 * credit_type_id are all there is. What a dialect returns is not trusted: it is checked
 * here, for all of them.
 *
 * The functions run as the owner of the server, who can make them do no more
 * than he could. They get a word that nobody can guess in place of the API
 * key; it is replaced after they have returned, so that the key is in no
 * parameter, plan or error of SQL. An upstream could send it back in what it
 * answers: errors are cleared of it.
 *
 * Takes no locks.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "common/pg_prng.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/json.h"
#include "utils/memutils.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "amount.h"
#include "argument.h"
#include "compat.h"
#include "exchange.h"
#include "guard.h"
#include "statement.h"
#include "upstream_state.h"

/* Replies are waited for so long at most, whatever an upstream asks for. */
#define LONGEST_RETRY_AFTER_MS	(3600 * 1000)

/* A function of a dialect must not take longer: everything else waits for it. */
#define DIALECT_TIMEOUT_MS	1000

/* How long nothing is sent to an upstream that does not accept the key. */
#define PAUSE_MS	60000

/* How long it is left alone after that many failures in a row, and at most. */
#define FAILURES_IN_A_ROW	3
#define FIRST_BACK_OFF_MS	200
#define LONGEST_BACK_OFF_MS	10000

/* The parent of their contexts */
static MemoryContext all_exchanges = NULL;

static Statement complete_statement = {
	.sql = "SELECT $1 || pg_catalog.jsonb_strip_nulls("
	"pg_catalog.jsonb_build_object('url', $2, 'events_url', $3, 'api_key', $4))",
	.nargs = 4,
	.argtypes = {JSONBOID, TEXTOID, TEXTOID, TEXTOID}
};

pg_noreturn static void
bad_dialect(const char *why)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("what the dialect returned is of no use: its %s", why)));
}

/* Calls a function of the dialect as the server's owner, and returns its jsonb. */
static Jsonb *
call_dialect(const Upstream *upstream, Oid function, int nargs, Datum *args)
{
	LOCAL_FCINFO(fcinfo, 4);
	FmgrInfo	flinfo;
	volatile Datum result = 0;
	Oid			user;
	int			security;
	int			nest_level;

	if (object_aclcheck(ProcedureRelationId, function, upstream->owner, ACL_EXECUTE) != ACLCHECK_OK)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("the owner of the server may not execute the functions of its dialect")));

	fmgr_info(function, &flinfo);
	InitFunctionCallInfoData(*fcinfo, &flinfo, nargs, InvalidOid, NULL, NULL);
	for (int i = 0; i < nargs; i++)
	{
		fcinfo->args[i].value = args[i];
		fcinfo->args[i].isnull = false;
	}

	/* settings are undone with its rights: the next statement is the worker's own */
	GetUserIdAndSecContext(&user, &security);
	SetUserIdAndSecContext(upstream->owner,
						   security | SECURITY_LOCAL_USERID_CHANGE | SECURITY_RESTRICTED_OPERATION);
	nest_level = NewGUCNestLevel();
	PG_TRY();
	{
		enable_timeout_after(STATEMENT_TIMEOUT, DIALECT_TIMEOUT_MS);
		result = FunctionCallInvoke(fcinfo);
	}
	PG_FINALLY();
	{
		disable_timeout(STATEMENT_TIMEOUT, false);
	}
	PG_END_TRY();
	AtEOXact_GUC(false, nest_level);
	SetUserIdAndSecContext(user, security);

	if (fcinfo->isnull || !JB_ROOT_IS_OBJECT(DatumGetJsonbP(result)))
		bad_dialect("value is no object");
	return DatumGetJsonbP(result);
}

/* Returns a member of an object, NULL where it is not there or null. */
static JsonbValue *
member(Jsonb *object, const char *name)
{
	JsonbValue *value = getKeyJsonValueFromContainer(&object->root, name, strlen(name), NULL);

	return value && value->type != jbvNull ? value : NULL;
}

static char *
string_of(const JsonbValue *value)
{
	return pnstrdup(value->val.string.val, value->val.string.len);
}

/* Returns a text with a word replaced wherever it stands. */
static char *
replace(char *string, const char *word, const char *by)
{
	return TextDatumGetCString(DirectFunctionCall3Coll(replace_text, DEFAULT_COLLATION_OID,
													   CStringGetTextDatum(string),
													   CStringGetTextDatum(word),
													   CStringGetTextDatum(by)));
}

static void
add_headers(Exchange *exchange, Jsonb *made, const char *placeholder)
{
	JsonbValue *headers = member(made, "headers");
	JsonbIterator *iterator;
	JsonbIteratorToken token;
	JsonbValue	name;
	JsonbValue	value;

	exchange->headers = list_make1(pstrdup("Content-Type: application/json"));
	if (headers == NULL)
		return;
	if (headers->type != jbvBinary || !JsonContainerIsObject(headers->val.binary.data))
		bad_dialect("headers are no object");
	iterator = JsonbIteratorInit(headers->val.binary.data);
	while ((token = JsonbIteratorNext(&iterator, &name, true)) != WJB_DONE)
	{
		char	   *header;

		if (token != WJB_KEY)
			continue;
		JsonbIteratorNext(&iterator, &value, true);
		if (value.type == jbvNull)
			continue;
		if (value.type != jbvString)
			bad_dialect("headers are not all strings");
		header = psprintf("%s: %s", string_of(&name), string_of(&value));
		for (const char *c = header; *c != '\0'; c++)
		{
			if (*c < ' ' || *c > '~')
				bad_dialect("headers have characters that a header must not have");
		}
		exchange->headers = lappend(exchange->headers,
									replace(header, placeholder, exchange->upstream->key));
	}
}

/* Makes the HTTP request of an exchange, in the exchange's memory context. */
static void
make_request(void *arg)
{
	Exchange   *exchange = arg;
	MemoryContext old = MemoryContextSwitchTo(exchange->context);
	char	   *placeholder = DatumGetCString(DirectFunctionCall1(uuid_out,
																  DirectFunctionCall1(gen_random_uuid, (Datum) 0)));
	Upstream   *upstream = exchange->upstream = upstream_load(exchange->server);
	Parameters	parameters = {0};
	Datum		args[2];
	bool		isnull;
	Jsonb	   *made;
	JsonbValue *url;
	JsonbValue *body;
	StringInfoData key;

	parameter_add_pointer(&parameters, exchange->request);
	parameter_add(&parameters, CStringGetTextDatum(upstream->url));
	parameter_add_pointer(&parameters, upstream->events_url ? cstring_to_text(upstream->events_url) : NULL);
	parameter_add(&parameters, CStringGetTextDatum(placeholder));
	statement_execute(&complete_statement, &parameters);
	MemoryContextSwitchTo(exchange->context);	/* SPI leaves its own */
	exchange->request = DatumGetJsonbPCopy(statement_value(0, 1, &isnull));

	args[0] = CStringGetTextDatum(exchange->operation);
	args[1] = JsonbPGetDatum(exchange->request);
	made = call_dialect(upstream, upstream->request_function, 2, args);

	url = member(made, "url");
	if (url == NULL || url->type != jbvString)
		bad_dialect("url is no string");
	exchange->url = string_of(url);
	upstream_require_url(exchange->url);
	add_headers(exchange, made, placeholder);
	body = member(made, "body");
	if (body == NULL || body->type != jbvBinary)
		bad_dialect("body is neither an object nor an array");
	initStringInfo(&key);
	escape_json(&key, upstream->key);
	exchange->body = replace(JsonbToCString(NULL, body->val.binary.data, 0),
							 psprintf("\"%s\"", placeholder), key.data);
	exchange->body = pg_server_to_any(exchange->body, strlen(exchange->body), PG_UTF8);
	MemoryContextSwitchTo(old);
}

/*
 * exchange_prepare
 *		Returns an exchange for an operation, in a memory context of its own,
 *		which is current then. Returns NULL where the server cannot be asked,
 *		with *error; it is left alone for a while.
 */
Exchange *
exchange_prepare(const char *server, const char *operation, Jsonb *request, char **error)
{
	MemoryContext old = CurrentMemoryContext;
	MemoryContext context;
	Exchange   *exchange;
	ErrorData  *failure;

	if (all_exchanges == NULL)
		all_exchanges = AllocSetContextCreate(TopMemoryContext, "credit_lease exchanges",
											  ALLOCSET_DEFAULT_SIZES);
	context = AllocSetContextCreate(all_exchanges, "credit_lease exchange", ALLOCSET_SMALL_SIZES);
	MemoryContextSwitchTo(context);
	exchange = palloc0(sizeof(Exchange));
	exchange->context = context;
	exchange->server = pstrdup(server);
	exchange->operation = pstrdup(operation);
	exchange->request = request;
	MemoryContextSwitchTo(old);
	failure = guard(make_request, exchange);
	if (failure == NULL)
	{
		MemoryContextSwitchTo(context);
		return exchange;
	}

	*error = failure->message;
	MemoryContextDelete(context);
	upstream_state_note(server, *error);
	for (int reports = 0; reports <= 1; reports++)
		upstream_state_back_off(server, reports, TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
																			 LONGEST_BACK_OFF_MS));
	ereport(WARNING,
			(errcode(ERRCODE_FDW_UNABLE_TO_ESTABLISH_CONNECTION),
			 errmsg("upstream \"%s\" cannot be asked: %s", server, *error)));
	return NULL;
}

/* Sends a request that has been prepared; the timeouts are in milliseconds. */
void
exchange_send(Exchange *exchange, int connect_timeout, int request_timeout)
{
	exchange->sent_at = GetCurrentTimestamp();
	http_send(exchange->url, exchange->headers, exchange->body,
			  connect_timeout, request_timeout, exchange);
	upstream_state_sent(exchange->server);
}

void
exchange_end(Exchange *exchange)
{
	MemoryContextDelete(exchange->context);
}

/* Ends all exchanges there are; what they were about is asked again. */
void
exchange_forget_all(void)
{
	http_forget_all();
	if (all_exchanges)
		MemoryContextReset(all_exchanges);
	upstream_state_clear();
}

/* A required member of an outcome */
static JsonbValue *
required(Jsonb *outcome, const char *name, enum jbvType type, const char *what)
{
	JsonbValue *value = member(outcome, name);

	if (value == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("the reply lacks %s", name)));
	if (value->type != type)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("%s in the reply is no %s", name, what)));
	return value;
}

/* Raises unless a member of the outcome is what was asked about. */
static void
require_same(Jsonb *outcome, Jsonb *request, const char *name)
{
	JsonbValue *value = required(outcome, name, jbvString, "string");
	JsonbValue *asked = member(request, name);

	if (asked == NULL || strcmp(string_of(value), string_of(asked)) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("%s in the reply is another one than was asked about", name)));
}

static TimestampTz
instant_of(const JsonbValue *value, const char *name)
{
	char	   *string = string_of(value);

	/* neither infinity nor tomorrow */
	if (strspn(string, "0123456789-+T:.Z") != strlen(string))
		ereport(ERROR,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("%s in the reply is no time", name)));
	return DatumGetTimestampTz(DirectFunctionCall3(timestamptz_in, CStringGetDatum(string),
												   ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1)));
}

/*
 * An upstream hands the lease that fills a slot back to whoever asks. Two
 * clusters, or two accounts, that have one slot between them would both spend
 * it: a lease is the one that was asked for only if it ends at the instant
 * that was, which nobody else has. Upstreams may keep no more than
 * milliseconds.
 */
static bool
is_as_asked(TimestampTz expires_at, Jsonb *request)
{
	TimestampTz asked = instant_of(required(request, "expires_at", jbvString, "string"), "expires_at");

	return expires_at == asked || expires_at == asked - asked % 1000;
}

/* Reads and checks the terms of a lease. */
static void
read_terms(Exchange *exchange, Jsonb *outcome, LeaseTerms *terms)
{
	JsonbValue *granted = required(outcome, "granted", jbvNumeric, "number");
	JsonbValue *expires_at = required(outcome, "expires_at", jbvString, "string");
	JsonbValue *balance = member(outcome, "balance");

	terms->lease_id = string_of(required(outcome, "lease_id", jbvString, "string"));
	if (terms->lease_id[0] == '\0' || strlen(terms->lease_id) > ARGUMENT_MAX_TEXT ||
		strstr(terms->lease_id, exchange->upstream->key))
		ereport(ERROR,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("lease_id in the reply is empty, too long, or has the API key in it")));
	if (exchange->lease_id)
		require_same(outcome, exchange->request, "lease_id");
	require_same(outcome, exchange->request, "company_id");
	require_same(outcome, exchange->request, "credit_type_id");

	terms->granted = granted->val.numeric;
	if (amount_sign(terms->granted) <= 0 || numeric_is_nan(terms->granted) ||
		numeric_is_inf(terms->granted) || amount_has_too_many_digits(terms->granted))
		ereport(ERROR,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("granted in the reply is no amount")));
	terms->granted = DatumGetNumericCopy(NumericGetDatum(terms->granted));
	if (balance && balance->type == jbvNumeric && amount_sign(balance->val.numeric) >= 0 &&
		!numeric_is_nan(balance->val.numeric) && !numeric_is_inf(balance->val.numeric) &&
		!amount_has_too_many_digits(balance->val.numeric))
		terms->balance = DatumGetNumericCopy(NumericGetDatum(balance->val.numeric));

	terms->expires_at = instant_of(expires_at, "expires_at");
	terms->as_asked = exchange->lease_id || is_as_asked(terms->expires_at, exchange->request);
	if (terms->expires_at <= GetCurrentTimestamp())
		ereport(ERROR,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("the lease in the reply has expired")));
	if (member(outcome, "released_at"))
		ereport(ERROR,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("the lease in the reply is released")));
}

/* Reads and checks a balance, which may be less than nothing. */
static void
read_balance(Exchange *exchange, Jsonb *outcome, LeaseTerms *terms)
{
	Numeric		balance = required(outcome, "balance", jbvNumeric, "number")->val.numeric;

	require_same(outcome, exchange->request, "credit_type_id");
	if (numeric_is_nan(balance) || numeric_is_inf(balance) || amount_has_too_many_digits(balance))
		ereport(ERROR,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("balance in the reply is no amount")));
	terms->balance = DatumGetNumericCopy(NumericGetDatum(amount_without_excess(balance)));
}

static bool
is_success(const HttpReply *reply)
{
	return reply->status >= 200 && reply->status <= 299;
}

static bool
is_about_balance(const Exchange *exchange)
{
	return strcmp(exchange->operation, "balance") == 0;
}

/* Whether what the reply says is needed: of a report or a release, that it was taken is enough. */
static bool
is_about_terms(const Exchange *exchange)
{
	return strcmp(exchange->operation, "acquire") == 0 || strcmp(exchange->operation, "extend") == 0 ||
		is_about_balance(exchange);
}

/* Has the dialect read the reply, and takes over what it says. */
static void
read_reply(void *arg)
{
	Exchange   *exchange = arg;
	MemoryContext old = MemoryContextSwitchTo(exchange->context);
	Datum		args[4];
	Jsonb	   *outcome;
	JsonbValue *error;
	const HttpReply *reply = &exchange->reply;
	char	   *body = reply->length > 0 ? reply->body : "null";

	args[0] = CStringGetTextDatum(exchange->operation);
	args[1] = JsonbPGetDatum(exchange->request);
	args[2] = Int32GetDatum(exchange->reply.status);
	if (reply->length != strlen(reply->body))
		ereport(ERROR,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("the reply has a zero byte in it")));
	args[3] = DirectFunctionCall1(jsonb_in,
								  CStringGetDatum(pg_any_to_server(body, strlen(body), PG_UTF8)));
	outcome = call_dialect(exchange->upstream, exchange->upstream->outcome_function, 4, args);

	error = member(outcome, "error");
	if (error && error->type == jbvString)
		exchange->error = psprintf("status %d: %s", exchange->reply.status, string_of(error));
	else if (error)
		bad_dialect("error is no string");
	if (is_success(reply) && !error && is_about_balance(exchange))
		read_balance(exchange, outcome, &exchange->terms);
	else if (is_success(reply) && !error && is_about_terms(exchange))
		read_terms(exchange, outcome, &exchange->terms);
	MemoryContextSwitchTo(old);
}

/*
 * Whether the same would be refused again. Of a report only what says so of
 * its contents: nobody would send again what a proxy has refused.
 */
static bool
is_refusal(const Exchange *exchange)
{
	switch (exchange->reply.status)
	{
		case 400:
		case 413:
		case 422:
			return true;
		case 401:
		case 403:
		case 408:
		case 425:
		case 429:
			return false;
		default:
			return exchange->nreports == 0 &&
				exchange->reply.status >= 400 && exchange->reply.status <= 499;
	}
}

static const char *
verb(const Exchange *exchange)
{
	return is_about_balance(exchange) ? "tell a balance" : exchange->operation;
}

/* Decides what a reply means, and how long to leave the upstream alone. */
static void
judge(Exchange *exchange)
{
	const HttpReply *reply = &exchange->reply;
	bool		no_access = reply->status == 401 || reply->status == 403;
	bool		reports = exchange->nreports > 0;
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz try_after = 0;
	ErrorData  *unreadable;
	int			failures;

	if (reply->status == 0)
		exchange->error = reply->error;
	else if ((unreadable = guard(read_reply, exchange)) && is_success(reply) && is_about_terms(exchange))
		exchange->error = unreadable->message;
	else if (!is_success(reply) && exchange->error == NULL)
		exchange->error = psprintf("status %d", reply->status);

	if (exchange->error == NULL)
	{
		exchange->result = EXCHANGE_DONE;
		upstream_state_succeeded(exchange->server, reports, reply->latency_us);
		return;
	}

	exchange->error = replace(exchange->error, exchange->upstream->key, "(the API key)");
	exchange->error[pg_mbcliplen(exchange->error, strlen(exchange->error), 255)] = '\0';
	exchange->result = is_refusal(exchange) ? EXCHANGE_REFUSED : EXCHANGE_FAILED;
	if (exchange->result == EXCHANGE_REFUSED)
	{
		upstream_state_refused(exchange->server, reports, exchange->error, reply->latency_us);
		ereport(LOG,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("upstream \"%s\" refused to %s: %s", exchange->server, verb(exchange), exchange->error)));
		return;
	}

	failures = upstream_state_failed(exchange->server, reports, exchange->error, exchange->sent_at);
	if (reply->retry_after_ms >= 0)
		try_after = TimestampTzPlusMilliseconds(now, Min(reply->retry_after_ms, LONGEST_RETRY_AFTER_MS));
	else if (no_access)
		try_after = TimestampTzPlusMilliseconds(now, PAUSE_MS);
	else if (failures >= FAILURES_IN_A_ROW)
		try_after = TimestampTzPlusMilliseconds(now, back_off_ms(FIRST_BACK_OFF_MS,
																		   failures - FAILURES_IN_A_ROW,
																		   LONGEST_BACK_OFF_MS));
	if (try_after != 0)
		upstream_state_back_off(exchange->server, reports, try_after);
	if (no_access)
		ereport(WARNING,
				(errcode(ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION),
				 errmsg("upstream \"%s\" does not accept the API key: %s", exchange->server, exchange->error),
				 errhint("It is left alone for a while, or until its options change or the settings are reloaded.")));
	else
		ereport(LOG,
				(errcode(ERRCODE_FDW_REPLY_HANDLE),
				 errmsg("upstream \"%s\" failed to %s: %s", exchange->server, verb(exchange), exchange->error)));
}

/*
 * exchange_next
 *		Returns an exchange that has been answered or has failed, NULL if there
 *		is none, with its result. To be called within a transaction.
 */
Exchange *
exchange_next(void)
{
	HttpReply	reply;
	Exchange   *exchange;
	MemoryContext old;

	if (!http_next(&reply))
		return NULL;
	exchange = reply.owner;
	old = MemoryContextSwitchTo(exchange->context);
	exchange->reply = reply;
	exchange->reply.body = reply.body ? pstrdup(reply.body) : NULL;
	exchange->reply.error = reply.error ? pstrdup(reply.error) : NULL;
	judge(exchange);
	MemoryContextSwitchTo(old);
	return exchange;
}

/* Return what an acquire or an extend was about. */
char *
exchange_asked_company(const Exchange *exchange)
{
	return string_of(member(exchange->request, "company_id"));
}

Numeric
exchange_asked_amount(const Exchange *exchange)
{
	return member(exchange->request, "amount")->val.numeric;
}

/*
 * back_off_ms
 *		Returns how long to wait after a number of failures: twice as long
 *		after each, up to the longest, and less by up to a half at random, so
 *		that what failed together is not tried again together.
 */
int
back_off_ms(int first, int failures, int longest)
{
	int			full = (int) Min((int64) first << Min(failures, 20), longest);

	return full / 2 + (int) pg_prng_uint64_range(&pg_global_prng_state, 0, full / 2);
}
