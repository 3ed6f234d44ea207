/*
 * chunk.c
 *		Chunks, and sessions: the rows of credit_lease.chunk.
 *
 * A chunk is what one owner spends of without meeting anybody: its row is
 * locked alone, and by nobody else but who ends it. What was carved out is
 * CHUNKED in the tranches it came from until then; how much of that is spent
 * only the chunk's row knows, and the tranches learn when it ends. A session is
 * a chunk with a name, which may grow: session.c has what only sessions do.
 *
 * Locks: whoever spends of a chunk or renews it locks its row. Whoever ends it
 * moves amounts of the pool, and locks the account first and the row then. One
 * who has spent of a chunk and goes on to lock the account takes the two the
 * other way round. That can deadlock only with another session of the same
 * owner that releases the chunk: who gives expired chunks back passes over the
 * rows that others have locked, as their owners may be about to commit what
 * they have spent.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "chunk.h"
#include "errors.h"
#include "ledger.h"
#include "statement.h"

static const char *const status_word[] = {"live", "expired", "released"};
static const char *const session_status_word[] = {"open", "expired", "closed"};

/* What is spent of the tranches is their amount, as with a settlement. */
static const EntryKind kind_release = {.name = "chunk_release", .bucket = CONSUMED, .settles = true};
static const EntryKind kind_expire = {.name = "chunk_expire", .bucket = CONSUMED, .settles = true};
static const EntryKind kind_session_close = {.name = "session_close", .bucket = CONSUMED, .settles = true};
static const EntryKind kind_session_expire = {.name = "session_expire", .bucket = CONSUMED, .settles = true};

/* The row comes whole, as in pool.c. */
#define FIND \
	"SELECT c.ctid, c FROM credit_lease.chunk c WHERE c.account = $1 AND c.chunk_id = $2 AND c.session IS NULL"

static Statement find_statement = {
	.sql = FIND,
	.nargs = 2,
	.argtypes = {TEXTOID, INT8OID}
};

static Statement look_statement = {
	.sql = FIND,
	.nargs = 2,
	.argtypes = {TEXTOID, INT8OID},
	.read_only = true
};

static Statement lock_statement = {
	.sql = "SELECT c.ctid, c, (SELECT a.frozen FROM credit_lease.account a WHERE a.account = $1)"
	" FROM credit_lease.chunk c WHERE c.account = $1 AND c.chunk_id = $2 AND c.session IS NULL FOR NO KEY UPDATE OF c",
	.nargs = 2,
	.argtypes = {TEXTOID, INT8OID}
};

static Statement lock_ended_statement = {
	.sql = "SELECT FROM credit_lease.chunk c WHERE c.account = $1 AND c.chunk_id = $2 FOR NO KEY UPDATE",
	.nargs = 2,
	.argtypes = {TEXTOID, INT8OID}
};

static Statement lock_lapsed_statement = {
	.sql = "SELECT c.ctid, c FROM credit_lease.chunk c"
	" WHERE c.account = $1 AND c.credit = $2 AND c.status = 'live' AND c.expires_at <= $3"
	" ORDER BY c.expires_at LIMIT $4 FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 4,
	.argtypes = {TEXTOID, TEXTOID, TIMESTAMPTZOID, INT4OID}
};

/* The columns of credit_lease.chunk, as its script orders them. */
enum
{
	COLUMN_ACCOUNT,
	COLUMN_CHUNK_ID,
	COLUMN_CREDIT,
	COLUMN_OWNER,
	COLUMN_STATUS,
	COLUMN_GRANTED,
	COLUMN_REMAINING,
	COLUMN_CONSUMED,
	COLUMN_RETURNED,
	COLUMN_CREATED_AT,
	COLUMN_EXPIRES_AT,
	COLUMN_ENDED_AT,
	COLUMN_TRANCHE_IDS,
	COLUMN_TRANCHE_AMOUNTS,
	COLUMN_SESSION,
	COLUMN_ACCEPTED,
	COLUMN_UNITS,
	COLUMN_DEPOSITED,
	COLUMNS
};

static Statement account_statement = {
	.sql = "SELECT a.ctid FROM credit_lease.account a WHERE a.account = $1",
	.nargs = 1,
	.argtypes = {TEXTOID}
};

static Statement draw_statement = {
	.sql = "SELECT pg_catalog.nextval('credit_lease.tranche_id_seq')"
};

static Statement create_statement = {
	.sql = "INSERT INTO credit_lease.chunk (account, chunk_id, credit, owner, granted, remaining,"
	" created_at, expires_at, tranche_ids, tranche_amounts, session, accepted, units, deposited)"
	" VALUES ($1, $2, $3, $4, $5, $5, $6, $7, $8, $9, $10, $11, $12, $13)"
	" ON CONFLICT (account, session) WHERE session IS NOT NULL DO NOTHING",
	.nargs = 13,
	.argtypes = {TEXTOID, INT8OID, TEXTOID, TEXTOID, NUMERICOID, TIMESTAMPTZOID, TIMESTAMPTZOID,
	INT8ARRAYOID, NUMERICARRAYOID, TEXTOID, NUMERICOID, INT8OID, NUMERICOID}
};

static Statement latest_statement = {
	.sql = "SELECT pg_catalog.min(t.expires_at) FROM credit_lease.tranche t"
	" WHERE t.account = $1 AND t.credit = $2 AND t.tranche_id = ANY ($3)",
	.nargs = 3,
	.argtypes = {TEXTOID, TEXTOID, INT8ARRAYOID}
};

static Statement renew_statement = {
	.sql = "UPDATE credit_lease.chunk c SET expires_at = $3 WHERE c.account = $1 AND c.ctid = $2 RETURNING c.ctid",
	.nargs = 3,
	.argtypes = {TEXTOID, TIDOID, TIMESTAMPTZOID}
};

static Statement spend_statement = {
	.sql = "UPDATE credit_lease.chunk c SET remaining = $3, consumed = $4"
	" WHERE c.account = $1 AND c.ctid = $2 RETURNING c.ctid",
	.nargs = 4,
	.argtypes = {TEXTOID, TIDOID, NUMERICOID, NUMERICOID}
};

static Statement save_statement = {
	.sql = "UPDATE credit_lease.chunk c SET granted = $3, remaining = $4, consumed = $5, accepted = $6, units = $7,"
	" expires_at = $8, tranche_ids = $9, tranche_amounts = $10 WHERE c.account = $1 AND c.ctid = $2 RETURNING c.ctid",
	.nargs = 10,
	.argtypes = {TEXTOID, TIDOID, NUMERICOID, NUMERICOID, NUMERICOID, NUMERICOID, INT8OID,
	TIMESTAMPTZOID, INT8ARRAYOID, NUMERICARRAYOID}
};

#define APPEND \
	"INSERT INTO credit_lease.ledger (account, credit, kind, amount, available, tranche_id, reservation_id," \
	" created_at, idempotency_key, request) VALUES ($1, $2, $3, $4, $5, $6, $6, $7, $8, $9)"

static Statement append_with_key_statement = {
	.sql = APPEND " ON CONFLICT (account, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING",
	.nargs = 9,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, NUMERICOID, NUMERICOID, INT8OID, TIMESTAMPTZOID, TEXTOID, JSONBOID}
};

/* Without a key there is no conflict, and looking for one would be written to the WAL. */
static Statement append_statement = {
	.sql = APPEND,
	.nargs = 9,
	.argtypes = {TEXTOID, TEXTOID, TEXTOID, NUMERICOID, NUMERICOID, INT8OID, TIMESTAMPTZOID, TEXTOID, JSONBOID}
};

static Statement end_statement = {
	.sql = "UPDATE credit_lease.chunk c SET status = $3, remaining = $4, returned = $5, ended_at = $6"
	" WHERE c.account = $1 AND c.ctid = $2 RETURNING c.ctid",
	.nargs = 6,
	.argtypes = {TEXTOID, TIDOID, TEXTOID, NUMERICOID, NUMERICOID, TIMESTAMPTZOID}
};

/* Raises LC009 unless the amounts are what rules 2 and 3 allow. */
static void
check_chunk(const Chunk *chunk)
{
	Numeric		sum = amount_add(chunk->remaining, chunk->consumed);

	if (amount_sign(chunk->returned) != 0)
		sum = amount_add(sum, chunk->returned);
	if (amount_sign(chunk->remaining) < 0 || amount_sign(chunk->consumed) < 0 ||
		amount_sign(chunk->returned) < 0 || amount_sign(chunk->granted) <= 0 ||
		amount_compare(sum, chunk->granted) != 0 ||
		numeric_is_nan(sum) || numeric_is_inf(sum) ||
		amount_sign(chunk->status == CHUNK_LIVE ? chunk->returned : chunk->remaining) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("the books of chunk " INT64_FORMAT " do not balance", chunk->chunk_id),
				 errdetail("Status: %s, granted: %s, remaining: %s, consumed: %s, returned: %s.",
						   status_word[chunk->status], amount_out(chunk->granted),
						   amount_out(chunk->remaining), amount_out(chunk->consumed),
						   amount_out(chunk->returned)),
				 errhint("See credit_lease.lease_verify(); nothing was changed.")));
}

/* Returns what messages call it. */
static const char *
name_of(const Chunk *chunk)
{
	return chunk->session ? psprintf("session \"%s\"", text_to_cstring(chunk->session)) :
		psprintf("chunk " INT64_FORMAT, chunk->chunk_id);
}

/* Raises LC009 unless spent <= accepted <= deposit, and that no less than a session was opened with. */
static void
check_session(const Chunk *chunk)
{
	if (amount_compare(chunk->consumed, chunk->accepted) > 0 || amount_compare(chunk->accepted, chunk->granted) > 0 ||
		amount_sign(chunk->deposited) <= 0 || amount_compare(chunk->deposited, chunk->granted) > 0 || chunk->units < 0)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("the books of %s do not balance", name_of(chunk)),
				 errdetail("Opened with: %s, deposit: %s, accepted: %s, spent: %s, units: " INT64_FORMAT ".",
						   amount_out(chunk->deposited), amount_out(chunk->granted), amount_out(chunk->accepted),
						   amount_out(chunk->consumed), chunk->units),
				 errhint("See credit_lease.lease_verify(); nothing was changed.")));
}

/*
 * chunk_read
 *		Reads a chunk from a row of the last result: where it is, and all of it.
 *		Raises LC009.
 */
void
chunk_read(uint64 row, Chunk *chunk)
{
	Datum	   *value;
	bool	   *null;
	char	   *status;
	bool		isnull;

	memset(chunk, 0, sizeof(*chunk));
	chunk->tid = *(ItemPointer) DatumGetPointer(statement_value(row, 1, &isnull));
	value = statement_row(statement_value(row, 2, &isnull), COLUMNS, &null);

	chunk->chunk_id = DatumGetInt64(value[COLUMN_CHUNK_ID]);
	chunk->credit = DatumGetTextPP(value[COLUMN_CREDIT]);
	chunk->owner = DatumGetTextPP(value[COLUMN_OWNER]);
	status = TextDatumGetCString(value[COLUMN_STATUS]);
	while (strcmp(status, status_word[chunk->status]) != 0)
	{
		if (++chunk->status == lengthof(status_word))
			elog(ERROR, "unrecognized chunk status: \"%s\"", status);
	}
	chunk->granted = DatumGetNumeric(value[COLUMN_GRANTED]);
	chunk->remaining = DatumGetNumeric(value[COLUMN_REMAINING]);
	chunk->consumed = DatumGetNumeric(value[COLUMN_CONSUMED]);
	chunk->returned = DatumGetNumeric(value[COLUMN_RETURNED]);
	chunk->expires_at = DatumGetTimestampTz(value[COLUMN_EXPIRES_AT]);
	chunk->tranche_ids = DatumGetArrayTypeP(value[COLUMN_TRANCHE_IDS]);
	chunk->tranche_amounts = DatumGetArrayTypeP(value[COLUMN_TRANCHE_AMOUNTS]);
	check_chunk(chunk);
	if (null[COLUMN_SESSION])
		return;

	chunk->session = DatumGetTextPP(value[COLUMN_SESSION]);
	if (null[COLUMN_ACCEPTED] || null[COLUMN_UNITS] || null[COLUMN_DEPOSITED])
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("the books of %s are incomplete", name_of(chunk))));
	chunk->accepted = DatumGetNumeric(value[COLUMN_ACCEPTED]);
	chunk->units = DatumGetInt64(value[COLUMN_UNITS]);
	chunk->deposited = DatumGetNumeric(value[COLUMN_DEPOSITED]);
	check_session(chunk);
}

/*
 * chunk_find
 *		Reads a chunk, whatever its status, and returns whether the account has
 *		it. read_only is for functions that are STABLE. Raises LC009.
 */
bool
chunk_find(text *account, int64 chunk_id, bool read_only, Chunk *chunk)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, account);
	parameter_add(&parameters, Int64GetDatum(chunk_id));
	if (statement_execute(read_only ? &look_statement : &find_statement, &parameters) == 0)
		return false;
	chunk_read(0, chunk);
	return true;
}

/* Raises LC003. */
void
chunk_not_found(text *account, int64 chunk_id)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_NOT_FOUND),
			 errmsg("account \"%s\" has no chunk " INT64_FORMAT,
					text_to_cstring(account), chunk_id)));
}

/*
 * chunk_lock
 *		Locks a chunk's row and reads it, whatever its status. Raises LC003,
 *		LC006 where it is not this owner's, and LC009.
 */
void
chunk_lock(text *account, int64 chunk_id, const text *owner, Chunk *chunk)
{
	Parameters	parameters = {0};
	bool		isnull;

	parameter_add_pointer(&parameters, account);
	parameter_add(&parameters, Int64GetDatum(chunk_id));
	if (statement_execute(&lock_statement, &parameters) == 0)
		chunk_not_found(account, chunk_id);
	chunk_read(0, chunk);
	chunk->may_be_frozen = DatumGetBool(statement_value(0, 3, &isnull));

	if (VARSIZE_ANY_EXHDR(chunk->owner) != VARSIZE_ANY_EXHDR(owner) ||
		memcmp(VARDATA_ANY(chunk->owner), VARDATA_ANY(owner), VARSIZE_ANY_EXHDR(owner)) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_NOT_OWNER),
				 errmsg("chunk " INT64_FORMAT " is owned by somebody else", chunk_id)));
}

/*
 * Raises 40001 where the account's marks may have changed since the
 * transaction's snapshot: who does not lock the account would not be told.
 */
static void
require_current_marks(text *account)
{
	Parameters	parameters = {0};
	ItemPointerData then;
	ItemPointer now;
	bool		isnull;

	parameter_add_pointer(&parameters, account);
	if (statement_execute(&account_statement, &parameters) != 1)
		return;
	then = *(ItemPointer) DatumGetPointer(statement_value(0, 1, &isnull));
	if (statement_execute_now(&account_statement, &parameters) == 1)
	{
		now = (ItemPointer) DatumGetPointer(statement_value(0, 1, &isnull));
		if (ItemPointerEquals(&then, now))
			return;
	}
	ereport(ERROR,
			(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
			 errmsg("could not serialize access due to concurrent update")));
}

/*
 * chunk_is_frozen
 *		Returns whether spending is stopped in the pool of a locked chunk, and
 *		the reason or NULL. The account is not locked: a freeze stops who comes
 *		after it, and not who is about to commit, or waits for the chunk.
 */
bool
chunk_is_frozen(text *account, const Chunk *chunk, char **reason)
{
	const Pool	pool = {
		.account = account,
		.credit = chunk->credit,
		.may_be_frozen = chunk->may_be_frozen
	};

	if (IsolationUsesXactSnapshot())
		require_current_marks(account);
	return pool_find_freeze(&pool, reason);
}

/* Returns whether a chunk can be spent of. */
bool
chunk_is_alive(const Chunk *chunk, TimestampTz now)
{
	return chunk->status == CHUNK_LIVE && chunk->expires_at > now;
}

/*
 * Returns the word for what a chunk or a session is by the clock, whether or not
 * somebody has come by.
 */
const char *
chunk_status(const Chunk *chunk, TimestampTz now)
{
	const char *const *word = chunk->session ? session_status_word : status_word;

	if (chunk->status == CHUNK_LIVE && chunk->expires_at <= now)
		return word[CHUNK_EXPIRED];
	return word[chunk->status];
}

/*
 * chunk_has_ended
 *		Raises what a chunk or a session that is no more is answered with: LC004
 *		or LC005.
 *		Above READ COMMITTED it may have been renewed since the snapshot; then
 *		locking its row is 40001.
 */
void
chunk_has_ended(text *account, const Chunk *chunk)
{
	if (IsolationUsesXactSnapshot())
	{
		Parameters	parameters = {0};

		parameter_add_pointer(&parameters, account);
		parameter_add(&parameters, Int64GetDatum(chunk->chunk_id));
		statement_execute(&lock_ended_statement, &parameters);
	}

	if (chunk->status == CHUNK_RELEASED)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_ENDED),
				 errmsg(chunk->session ? "%s is already closed" : "%s is already released", name_of(chunk))));
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_EXPIRED),
			 errmsg("%s has expired", name_of(chunk)),
			 errdetail("It expired at %s.", timestamptz_to_str(chunk->expires_at))));
}

/* The tranches that a chunk came from, and how much from each */
typedef struct Parts
{
	int			n;
	Datum	   *tranche_id;
	Datum	   *amount;
} Parts;

/* Adds an amount to the part of a tranche, if it is among those from the first on, or else as a new one. */
static void
add_part(Parts *parts, int first, int64 tranche_id, Numeric amount)
{
	int			i = first;

	if (amount_sign(amount) == 0)
		return;
	while (i < parts->n && DatumGetInt64(parts->tranche_id[i]) != tranche_id)
		i++;
	if (i < parts->n)
		amount = amount_add(DatumGetNumeric(parts->amount[i]), amount);
	else
		parts->n++;
	parts->tranche_id[i] = Int64GetDatum(tranche_id);
	parts->amount[i] = NumericGetDatum(amount);
}

pg_noreturn static void
not_the_sum(const Chunk *chunk)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_BOOKS),
			 errmsg("%s is not the sum of its parts", name_of(chunk))));
}

/* Takes the parts of a chunk apart. Raises LC009 where they do not add up. */
static void
read_parts(const Chunk *chunk, Parts *parts)
{
	Numeric		sum = amount_zero();
	int			nids;

	deconstruct_array(chunk->tranche_ids, INT8OID, sizeof(int64), FLOAT8PASSBYVAL,
					  TYPALIGN_DOUBLE, &parts->tranche_id, NULL, &nids);
	deconstruct_array(chunk->tranche_amounts, NUMERICOID, -1, false,
					  TYPALIGN_INT, &parts->amount, NULL, &parts->n);
	if (nids != parts->n)
		not_the_sum(chunk);
	for (int i = 0; i < parts->n; i++)
		sum = amount_add(sum, DatumGetNumeric(parts->amount[i]));
	if (amount_compare(sum, chunk->granted) != 0)
		not_the_sum(chunk);
}

/*
 * chunk_collect
 *		Makes a chunk of what was moved to CHUNKED in the pool and is not saved
 *		yet. It expires then, or with the first of its tranches: what has
 *		expired cannot be spent (rule 7).
 */
void
chunk_collect(const Pool *pool, Chunk *chunk, TimestampTz expires_at)
{
	chunk->status = CHUNK_LIVE;
	chunk->granted = chunk->remaining = chunk->consumed = chunk->returned = amount_zero();
	chunk->expires_at = expires_at;
	chunk->tranche_ids = construct_empty_array(INT8OID);
	chunk->tranche_amounts = construct_empty_array(NUMERICOID);
	chunk_grow(pool, chunk);
}

/*
 * chunk_grow
 *		Adds to a chunk what was moved to CHUNKED in the pool and is not saved
 *		yet; it expires with the first of its tranches, if not before. What was
 *		spent of a tranche stays spent of it; what was not is in burn order, so
 *		that a tranche may have two parts. The tranches that it came from are to
 *		be among the pool's. Raises LC009.
 */
void
chunk_grow(const Pool *pool, Chunk *chunk)
{
	Numeric		left = chunk->consumed;
	Parts		had;
	Parts		parts = {0};

	read_parts(chunk, &had);
	parts.tranche_id = palloc(sizeof(Datum) * (had.n + pool->ntranches));
	parts.amount = palloc(sizeof(Datum) * (had.n + pool->ntranches));
	for (int i = 0; i < had.n; i++)
	{
		Numeric		spent = amount_min(left, DatumGetNumeric(had.amount[i]));

		add_part(&parts, 0, pool_get(pool, DatumGetInt64(had.tranche_id[i]))->tranche_id, spent);
		had.amount[i] = NumericGetDatum(amount_subtract(DatumGetNumeric(had.amount[i]), spent));
		left = amount_subtract(left, spent);
	}

	for (int i = 0; i < pool->ntranches; i++)
	{
		const Tranche *tranche = pool->tranche[i];
		Numeric		carved;

		/* what is spent next may go on with what was spent last */
		for (int j = 0; j < had.n; j++)
		{
			if (DatumGetInt64(had.tranche_id[j]) == tranche->tranche_id)
				add_part(&parts, Max(parts.n - 1, 0), tranche->tranche_id, DatumGetNumeric(had.amount[j]));
		}
		if (tranche->balance[CHUNKED] == tranche->stored[CHUNKED])
			continue;
		carved = amount_subtract(tranche->balance[CHUNKED], tranche->stored[CHUNKED]);
		add_part(&parts, Max(parts.n - 1, 0), tranche->tranche_id, carved);
		chunk->granted = amount_add(chunk->granted, carved);
		chunk->remaining = amount_add(chunk->remaining, carved);
		chunk->expires_at = Min(chunk->expires_at, tranche->expires_at);
	}
	chunk->tranche_ids = construct_array(parts.tranche_id, parts.n, INT8OID, sizeof(int64), FLOAT8PASSBYVAL,
										 TYPALIGN_DOUBLE);
	chunk->tranche_amounts = construct_array(parts.amount, parts.n, NUMERICOID, -1, false, TYPALIGN_INT);
}

/* Returns a number for a chunk that is to be made. */
int64
chunk_draw_number(void)
{
	Parameters	parameters = {0};
	bool		isnull;

	statement_execute(&draw_statement, &parameters);
	return DatumGetInt64(statement_value(0, 1, &isnull));
}

/*
 * chunk_create
 *		Inserts a chunk, or a session, and returns true; false where the account
 *		has had a session of that name. Its tranches are still to be saved or
 *		have been.
 */
bool
chunk_create(const Pool *pool, const Chunk *chunk)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, pool->account);
	parameter_add(&parameters, Int64GetDatum(chunk->chunk_id));
	parameter_add_pointer(&parameters, pool->credit);
	parameter_add_pointer(&parameters, chunk->owner);
	parameter_add_pointer(&parameters, chunk->granted);
	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	parameter_add(&parameters, TimestampTzGetDatum(chunk->expires_at));
	parameter_add_pointer(&parameters, chunk->tranche_ids);
	parameter_add_pointer(&parameters, chunk->tranche_amounts);
	parameter_add_pointer(&parameters, chunk->session);
	parameter_add_pointer(&parameters, chunk->accepted);
	if (chunk->session)
		parameter_add(&parameters, Int64GetDatum(chunk->units));
	else
		parameter_add_null(&parameters);
	parameter_add_pointer(&parameters, chunk->deposited);
	return statement_execute(&create_statement, &parameters) > 0;
}

/*
 * chunk_latest_expiry
 *		Returns when the first of a chunk's tranches expires, DT_NOEND for
 *		never. They are not locked: that only ever moves forward.
 */
TimestampTz
chunk_latest_expiry(text *account, const Chunk *chunk)
{
	Parameters	parameters = {0};
	Datum		value;
	bool		isnull;

	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, chunk->credit);
	parameter_add_pointer(&parameters, chunk->tranche_ids);
	statement_execute(&latest_statement, &parameters);
	value = statement_value(0, 1, &isnull);
	return isnull ? DT_NOEND : DatumGetTimestampTz(value);
}

/*
 * Runs a statement that changes the row of a locked chunk, and keeps where that
 * is now. Raises LC009 where something that the call itself set off, a trigger
 * for instance, has changed it before.
 */
static void
change_chunk(Chunk *chunk, Statement *statement, Parameters *parameters)
{
	bool		isnull;

	if (statement_execute(statement, parameters) != 1)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("%s was changed behind this call", name_of(chunk))));
	chunk->tid = *(ItemPointer) DatumGetPointer(statement_value(0, 1, &isnull));
}

/* Writes the expiry of a locked chunk. */
void
chunk_renew(text *account, Chunk *chunk)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, &chunk->tid);
	parameter_add(&parameters, TimestampTzGetDatum(chunk->expires_at));
	change_chunk(chunk, &renew_statement, &parameters);
}

/*
 * chunk_append
 *		Appends the entry of what a request is about to spend of a locked chunk,
 *		which has that much, and returns true; false, and nothing has happened,
 *		where the request's key is taken.
 */
bool
chunk_append(const Request *request, const Chunk *chunk, TimestampTz now)
{
	Statement  *statement = request->key ? &append_with_key_statement : &append_statement;
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, request->account);
	parameter_add_pointer(&parameters, chunk->credit);
	parameter_add_pointer(&parameters, cstring_to_text(request->kind->name));
	parameter_add_pointer(&parameters, request->amount);
	parameter_add_pointer(&parameters, amount_subtract(chunk->remaining, request->amount));
	parameter_add(&parameters, Int64GetDatum(chunk->chunk_id));
	parameter_add(&parameters, TimestampTzGetDatum(now));
	parameter_add_pointer(&parameters, request->key);
	parameter_add_pointer(&parameters, request->arguments);
	if (statement_execute(statement, &parameters) > 0)
		return true;
	if (request->key)
		return false;
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_BOOKS),
			 errmsg("the ledger did not accept an entry of account \"%s\"",
					text_to_cstring(request->account))));
}

/* Spends an amount that a locked chunk has, and writes that. */
void
chunk_spend(text *account, Chunk *chunk, Numeric amount)
{
	Parameters	parameters = {0};

	chunk->remaining = amount_subtract(chunk->remaining, amount);
	chunk->consumed = amount_add(chunk->consumed, amount);
	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, &chunk->tid);
	parameter_add_pointer(&parameters, chunk->remaining);
	parameter_add_pointer(&parameters, chunk->consumed);
	change_chunk(chunk, &spend_statement, &parameters);
}

/* Writes all that may change of a locked session while it is open. */
void
chunk_save(text *account, Chunk *chunk)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, &chunk->tid);
	parameter_add_pointer(&parameters, chunk->granted);
	parameter_add_pointer(&parameters, chunk->remaining);
	parameter_add_pointer(&parameters, chunk->consumed);
	parameter_add_pointer(&parameters, chunk->accepted);
	parameter_add(&parameters, Int64GetDatum(chunk->units));
	parameter_add(&parameters, TimestampTzGetDatum(chunk->expires_at));
	parameter_add_pointer(&parameters, chunk->tranche_ids);
	parameter_add_pointer(&parameters, chunk->tranche_amounts);
	change_chunk(chunk, &save_statement, &parameters);
}

/*
 * Moves what was spent of a chunk to CONSUMED in its tranches, in the order in
 * which they burned when it was carved out, and gives the rest back, see
 * pool_give_back(). Raises LC009 where the parts do not add up, or one of the
 * tranches is not open.
 */
static void
give_back(Pool *pool, const Chunk *chunk)
{
	Numeric		left = chunk->consumed;
	Parts		parts;

	read_parts(chunk, &parts);
	for (int i = 0; i < parts.n; i++)
	{
		Tranche    *tranche = pool_get(pool, DatumGetInt64(parts.tranche_id[i]));
		Numeric		part = DatumGetNumeric(parts.amount[i]);
		Numeric		spent = amount_min(left, part);

		pool_move(pool, tranche, CHUNKED, CONSUMED, spent);
		pool_give_back(pool, tranche, CHUNKED, amount_subtract(part, spent));
		left = amount_subtract(left, spent);
	}
}

/* Ends a locked chunk of a locked pool, whose tranches are still to be saved. */
static void
end_chunk(Pool *pool, Chunk *chunk, ChunkStatus status)
{
	const Request request = {
		.kind = chunk->session ?
		(status == CHUNK_RELEASED ? &kind_session_close : &kind_session_expire) :
		(status == CHUNK_RELEASED ? &kind_release : &kind_expire),
		.account = pool->account
	};
	Parameters	parameters = {0};

	give_back(pool, chunk);
	ledger_append(pool, &request, &chunk->chunk_id);
	chunk->status = status;
	chunk->returned = chunk->remaining;
	chunk->remaining = amount_zero();

	parameter_add_pointer(&parameters, pool->account);
	parameter_add_pointer(&parameters, &chunk->tid);
	parameter_add_pointer(&parameters, cstring_to_text(status_word[status]));
	parameter_add_pointer(&parameters, chunk->remaining);
	parameter_add_pointer(&parameters, chunk->returned);
	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	change_chunk(chunk, &end_statement, &parameters);
}

/* Ends a locked chunk of a locked pool, whose owner does not want it any more. */
void
chunk_release(Pool *pool, Chunk *chunk)
{
	end_chunk(pool, chunk, CHUNK_RELEASED);
	ledger_save(pool);
}

/*
 * chunk_reclaim
 *		Gives back at most limit expired chunks of a locked pool and returns how
 *		many; not those of which their owner is just spending.
 */
int
chunk_reclaim(Pool *pool, int limit)
{
	Parameters	parameters = pool_parameters(pool);
	Chunk	   *chunk;
	int			n;

	parameter_add(&parameters, TimestampTzGetDatum(pool->now));
	parameter_add(&parameters, Int32GetDatum(limit));
	n = (int) statement_execute(&lock_lapsed_statement, &parameters);
	chunk = palloc(sizeof(Chunk) * n);
	for (int i = 0; i < n; i++)
		chunk_read(i, &chunk[i]);

	for (int i = 0; i < n; i++)
	{
		CHECK_FOR_INTERRUPTS();
		end_chunk(pool, &chunk[i], CHUNK_EXPIRED);
	}
	ledger_save(pool);
	return n;
}
