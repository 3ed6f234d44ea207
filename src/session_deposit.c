/*
 * session_deposit.c
 *		lease_session_open(), lease_session_topup() and lease_session_close():
 *		what is put into a session, and what comes back.
 *
 * Locks: the account, or a stripe of it, and the session after it. Two calls
 * that open a session of one name in stripes of their own meet at the unique
 * index: the second waits for the first to end.
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "argument.h"
#include "clock.h"
#include "errors.h"
#include "hold.h"
#include "ledger.h"
#include "reclaim.h"
#include "session.h"
#include "statement.h"
#include "supply.h"

static const EntryKind kind_session = {.name = "session", .bucket = CHUNKED};

pg_noreturn static void
opened_otherwise(text *account, const Chunk *session, const char *field)
{
	ereport(ERROR,
			(errcode(ERRCODE_LEASE_KEY_REUSED),
			 errmsg("session \"%s\" of account \"%s\" was opened otherwise",
					text_to_cstring(session->session), text_to_cstring(account)),
			 errdetail("The two requests differ in \"%s\".", field),
			 errhint("A session's name stands for one session of its account, for ever.")));
}

/*
 * Returns whether the account has a session of that name, opened with the same;
 * raises LC002 where with something else, and LC004 or LC005 where it has ended.
 */
static bool
find_opened(const Pool *pool, text *name, Numeric deposit, Chunk *session)
{
	if (!session_find(pool->account, name, false, session))
		return false;
	if (strcmp(text_to_cstring(session->credit), text_to_cstring(pool->credit)) != 0)
		opened_otherwise(pool->account, session, "credit");
	if (amount_compare(session->deposited, deposit) != 0)
		opened_otherwise(pool->account, session, "deposit");
	session_require_open(pool->account, session);
	return true;
}

/* Carves a deposit out of a locked pool that has it, and returns true; false where there is a session of that name. */
static bool
open_session(Pool *pool, text *name, Numeric deposit, const Interval *ttl, Chunk *session)
{
	const Request request = {.kind = &kind_session, .account = pool->account};

	pool_take(pool, deposit, CHUNKED);
	chunk_collect(pool, session, hold_expiry(pool, ttl));
	session->credit = pool->credit;
	session->session = session->owner = name;
	session->accepted = amount_zero();
	session->units = 0;
	session->deposited = deposit;
	session->chunk_id = chunk_draw_number();
	/* the row comes first, as its name decides whether the call happens */
	if (!chunk_create(pool, session))
		return false;
	ledger_post(pool, &request, &session->chunk_id);
	return true;
}

/*
 * lease_session_open(account, credit, session, deposit, ttl)
 *		Carves a deposit out of a pool, in burn order, as a session that lives
 *		until ttl from now, or as long as all of what it came from. One that was
 *		opened so before is returned as it is now. Raises LC001, LC002, LC004,
 *		LC005, LC007, LC008 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_session_open);
Datum
lease_session_open(PG_FUNCTION_ARGS)
{
	Request		request = {.kind = &kind_session};
	Pool		pool = {0};
	Chunk		session = {0};
	text	   *name;
	Numeric		deposit;
	Interval   *ttl;
	bool		applied = false;
	MemoryContext caller;

	request.account = pool.account = argument_text(fcinfo, 0, "account");
	pool.credit = argument_text(fcinfo, 1, "credit");
	name = argument_text(fcinfo, 2, "session");
	deposit = argument_amount(fcinfo, 3, "deposit", AMOUNT_POSITIVE);
	ttl = argument_optional_ttl(fcinfo, 4, "ttl", clock_now());
	caller = statement_begin();

	/* who says it again waits for nothing; and again where it was opened meanwhile */
	if (!find_opened(&pool, name, deposit, &session))
	{
		supply_lock(&pool, &request, deposit);
		applied = reclaim_cover(&pool, deposit) && !pool_is_frozen(&pool) &&
			open_session(&pool, name, deposit, ttl, &session);
		if (!applied && !find_opened(&pool, name, deposit, &session))
			pool_refuse(&pool, deposit);
	}
	return session_return(caller, fcinfo, &session, applied ? pool.now : clock_now(), applied, amount_zero());
}

/*
 * lease_session_topup(account, session, amount)
 *		Carves an amount more out of the session's pool for it. It lives as long
 *		as before, but no longer than what that comes from. Raises LC001, LC003,
 *		LC004, LC005, LC007, LC008 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_session_topup);
Datum
lease_session_topup(PG_FUNCTION_ARGS)
{
	Pool		pool = {0};
	Chunk		session;
	text	   *name;
	Numeric		amount;
	MemoryContext caller;

	pool.account = argument_text(fcinfo, 0, "account");
	name = argument_text(fcinfo, 1, "session");
	amount = argument_amount(fcinfo, 2, "amount", AMOUNT_POSITIVE);
	caller = statement_begin();

	if (!session_find(pool.account, name, false, &session))
		session_not_found(pool.account, name);
	session_lock_for_more(&pool, name, amount, &session);
	session_carve(&pool, &session, amount);
	chunk_save(pool.account, &session);
	session_notify(pool.account, &session, pool.now);
	return session_return(caller, fcinfo, &session, pool.now, true, amount_zero());
}

/* Locks the pool of a session, and the session, and reads both. */
static void
lock_to_close(Pool *pool, text *name, Chunk *session)
{
	AccountMarks marks;

	if (account_lock_unless_striped(pool->account, &marks))
		pool->may_be_frozen = marks.frozen;
	else
	{
		if (!session_find(pool->account, name, false, session))
			session_not_found(pool->account, name);
		pool->credit = session->credit;
		pool_lock(pool, NULL);
	}
	session_lock(pool->account, name, session);
	pool->credit = session->credit;
	/* by the clock before a wait for the session, it might not have expired */
	pool->now = clock_now();
	pool_read(pool);
}

/* Lets a locked session have spent so much in all when it ends. */
static void
spend_finally(Pool *pool, Chunk *session, Numeric cumulative)
{
	char	   *reason;

	if (amount_compare(cumulative, session->consumed) < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("cumulative must not be less than was spent"),
				 errdetail("Spent: %s, requested: %s.", amount_out(session->consumed), amount_out(cumulative))));
	if (amount_compare(cumulative, session->granted) > 0)
		session_refuse_above_deposit(session, cumulative);
	if (amount_compare(cumulative, session->consumed) == 0)
		return;
	if (pool_find_freeze(pool, &reason))
		pool_refuse_frozen(pool, reason);
	if (amount_compare(cumulative, session->accepted) > 0)
		session->accepted = cumulative;
	session_spend(pool->account, session, amount_subtract(cumulative, session->consumed), pool->now);
	chunk_save(pool->account, session);
}

/*
 * lease_session_close(account, session, cumulative)
 *		Ends a session, of which cumulative was spent in all; NULL for what was
 *		charged. That is spent of the tranches that it came from, and the rest
 *		goes back to them. One that was closed so before is replayed. Raises
 *		LC001, LC003, LC004, LC005, LC007 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_session_close);
Datum
lease_session_close(PG_FUNCTION_ARGS)
{
	Pool		pool = {0};
	Chunk		session;
	text	   *name;
	Numeric		cumulative;
	bool		applied = false;
	MemoryContext caller;

	pool.account = argument_text(fcinfo, 0, "account");
	name = argument_text(fcinfo, 1, "session");
	cumulative = argument_optional_amount(fcinfo, 2, "cumulative", AMOUNT_NOT_NEGATIVE);
	caller = statement_begin();

	lock_to_close(&pool, name, &session);
	if (session.status != CHUNK_RELEASED || (cumulative && amount_compare(cumulative, session.consumed) != 0))
	{
		session_require_open(pool.account, &session);
		if (cumulative)
			spend_finally(&pool, &session, cumulative);
		reclaim_lapsed(&pool);
		chunk_release(&pool, &session);
		session_notify(pool.account, &session, pool.now);
		applied = true;
	}
	return session_return(caller, fcinfo, &session, pool.now, applied, amount_zero());
}
