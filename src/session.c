/*
 * session.c
 *		Sessions: what their functions have in common.
 *
 * A session is a chunk (chunk.c) that an account has under a name, for ever.
 * Of what was carved out, its deposit, so much can be spent as was accepted:
 * spent <= accepted <= deposit, and each of them only ever rises. So whoever
 * says again what he has said before changes nothing, and needs no key.
 *
 * Locks: the session's row alone, where no amount of the pool moves; where one
 * does, the account or a stripe of it first, and the row last.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "common/int.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/timestamp.h"

#include "clock.h"
#include "errors.h"
#include "ledger.h"
#include "reclaim.h"
#include "session.h"
#include "statement.h"
#include "supply.h"

static bool notify_sessions;

static const EntryKind kind_session = {.name = "session", .bucket = CHUNKED};
static const EntryKind kind_charge = {.name = "session_charge", .bucket = CONSUMED};

#define FIND \
	"SELECT c.ctid, c FROM credit_lease.chunk c WHERE c.account = $1 AND c.session = $2"

static Statement find_statement = {
	.sql = FIND,
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

static Statement look_statement = {
	.sql = FIND,
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID},
	.read_only = true
};

static Statement lock_statement = {
	.sql = "SELECT c.ctid, c, (SELECT a.frozen FROM credit_lease.account a WHERE a.account = $1)"
	" FROM credit_lease.chunk c WHERE c.account = $1 AND c.session = $2 FOR NO KEY UPDATE OF c",
	.nargs = 2,
	.argtypes = {TEXTOID, TEXTOID}
};

/* Names have at most 512 bytes, each of which becomes 6 at most: no payload comes near the 8000 bytes that it may have. */
static Statement notify_statement = {
	.sql = "SELECT pg_catalog.pg_notify('credit_lease_session', pg_catalog.jsonb_build_object('account', $1,"
	" 'session', $2, 'accepted_cumulative', $3, 'deposit', $4, 'status', $5)::pg_catalog.text)",
	.nargs = 5,
	.argtypes = {TEXTOID, TEXTOID, NUMERICOID, NUMERICOID, TEXTOID}
};

void
session_define_settings(void)
{
	DefineCustomBoolVariable("credit_lease.notify_sessions",
							 "Notifies the channel credit_lease_session of what is authorized and deposited, and of sessions that are closed.",
							 NULL,
							 &notify_sessions,
							 false,
							 PGC_USERSET,
							 0,
							 NULL, NULL, NULL);
}

/*
 * session_find
 *		Reads a session, whatever its status, and returns whether the account
 *		has it. read_only is for functions that are STABLE. Raises LC009.
 */
bool
session_find(text *account, text *name, bool read_only, Chunk *session)
{
	Parameters	parameters = {0};

	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, name);
	if (statement_execute(read_only ? &look_statement : &find_statement, &parameters) == 0)
		return false;
	chunk_read(0, session);
	return true;
}

/* Raises LC003. */
void
session_not_found(text *account, text *name)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_NOT_FOUND),
			 errmsg("account \"%s\" has no session \"%s\"",
					text_to_cstring(account), text_to_cstring(name))));
}

/*
 * session_lock
 *		Locks a session's row and reads it, whatever its status. Raises LC003
 *		and LC009.
 */
void
session_lock(text *account, text *name, Chunk *session)
{
	Parameters	parameters = {0};
	bool		isnull;

	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, name);
	if (statement_execute(&lock_statement, &parameters) == 0)
		session_not_found(account, name);
	chunk_read(0, session);
	session->may_be_frozen = DatumGetBool(statement_value(0, 3, &isnull));
}

/*
 * session_require_open
 *		Returns the instant at which a session was open; raises LC004 or LC005
 *		where it has ended. Such a one is never opened again.
 */
TimestampTz
session_require_open(text *account, const Chunk *session)
{
	TimestampTz now = clock_now();

	if (!chunk_is_alive(session, now))
		chunk_has_ended(account, session);
	return now;
}

/*
 * session_lock_for_more
 *		Locks the pool of a session that was found, after a wait for its upstream
 *		to supply an amount if need be, and the session. Raises LC003, LC004,
 *		LC005 and LC009.
 */
void
session_lock_for_more(Pool *pool, text *name, Numeric amount, Chunk *session)
{
	const Request request = {.kind = &kind_session, .account = pool->account};

	/* nothing is waited for in vain */
	session_require_open(pool->account, session);
	pool->credit = session->credit;
	supply_lock(pool, &request, amount);
	session_lock(pool->account, name, session);
	/* by the clock before a wait for the session, tranches that have expired would be alive */
	pool->now = session_require_open(pool->account, session);
	pool_read(pool);
}

/* Raises LC001. */
void
session_refuse_above_deposit(const Chunk *session, Numeric cumulative)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_INSUFFICIENT_CREDIT),
			 errmsg("not enough credit in session \"%s\"", text_to_cstring(session->session)),
			 errdetail("Deposit: %s, requested: %s.", amount_out(session->granted), amount_out(cumulative)),
			 errhint("Raise the deposit with credit_lease.lease_session_topup().")));
}

/*
 * session_carve
 *		Carves an amount out of a locked pool, for a locked session whose row is
 *		still to be written. Raises LC001, LC007 and LC008.
 */
void
session_carve(Pool *pool, Chunk *session, Numeric amount)
{
	const Request request = {.kind = &kind_session, .account = pool->account};

	if (!reclaim_cover(pool, amount) || pool_is_frozen(pool))
		pool_refuse(pool, amount);
	pool_take(pool, amount, CHUNKED);
	chunk_grow(pool, session);
	ledger_post(pool, &request, &session->chunk_id);
}

/*
 * session_spend
 *		Spends an amount that a locked session has, accepted or not, as one
 *		charge; the row is still to be written. Raises 22003 where a snapshot
 *		has told of as many charges as can be counted.
 */
void
session_spend(text *account, Chunk *session, Numeric amount, TimestampTz now)
{
	const Request request = {.kind = &kind_charge, .account = account, .amount = amount};

	if (pg_add_s64_overflow(session->units, 1, &session->units))
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg("units of session \"%s\" out of range", text_to_cstring(session->session))));
	chunk_append(&request, session, now);
	session->remaining = amount_subtract(session->remaining, amount);
	session->consumed = amount_add(session->consumed, amount);
}

/*
 * session_notify
 *		Lets those who listen know, at commit, how far a session can be spent,
 *		if the caller has asked for that.
 */
void
session_notify(text *account, const Chunk *session, TimestampTz now)
{
	Parameters	parameters = {0};

	if (!notify_sessions)
		return;
	parameter_add_pointer(&parameters, account);
	parameter_add_pointer(&parameters, session->session);
	parameter_add_pointer(&parameters, session->accepted);
	parameter_add_pointer(&parameters, session->granted);
	parameter_add(&parameters, CStringGetTextDatum(chunk_status(session, now)));
	statement_execute(&notify_statement, &parameters);
}

/* Returns a session as it is by the clock, and what spent comes to with the amount that was asked about. */
Datum
session_return(MemoryContext caller, FunctionCallInfo fcinfo, const Chunk *session,
			   TimestampTz now, bool applied, Numeric asked)
{
	Datum		values[8];
	bool		nulls[8] = {false};

	values[0] = BoolGetDatum(applied);
	values[1] = PointerGetDatum(session->session);
	values[2] = NumericGetDatum(session->granted);
	values[3] = NumericGetDatum(session->accepted);
	values[4] = NumericGetDatum(session->consumed);
	values[5] = NumericGetDatum(amount_add(session->consumed, asked));
	values[6] = Int64GetDatum(session->units);
	values[7] = CStringGetTextDatum(chunk_status(session, now));
	return statement_end(caller, fcinfo, values, nulls);
}
