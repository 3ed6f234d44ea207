/*
 * session_charge.c
 *		lease_session_authorize() and lease_session_charge(): how much of a
 *		session can be spent, and what is.
 *
 * Locks: the session's row. Neither the account nor its tranches, so that
 * sessions of one pool do not meet.
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "argument.h"
#include "clock.h"
#include "session.h"
#include "statement.h"

/*
 * lease_session_authorize(account, session, cumulative)
 *		Lets so much in all be spent of a session; the same or less than before
 *		changes nothing. Raises LC001 above the deposit, LC003, LC004, LC005 and
 *		LC009.
 */
PG_FUNCTION_INFO_V1(lease_session_authorize);
Datum
lease_session_authorize(PG_FUNCTION_ARGS)
{
	text	   *account = argument_text(fcinfo, 0, "account");
	text	   *name = argument_text(fcinfo, 1, "session");
	Numeric		cumulative = argument_amount(fcinfo, 2, "cumulative", AMOUNT_NOT_NEGATIVE);
	Chunk		session;
	TimestampTz now;
	bool		applied;
	MemoryContext caller = statement_begin();

	session_lock(account, name, &session);
	now = session_require_open(account, &session);
	if (amount_compare(cumulative, session.granted) > 0)
		session_refuse_above_deposit(&session, cumulative);
	applied = amount_compare(cumulative, session.accepted) > 0;
	if (applied)
	{
		session.accepted = cumulative;
		chunk_save(account, &session);
		session_notify(account, &session, now);
	}
	return session_return(caller, fcinfo, &session, now, applied, amount_zero());
}

/*
 * lease_session_charge(account, session, amount)
 *		Spends an amount of what was authorized of a session; where that is
 *		less, spends nothing and returns applied = false and how much would have
 *		to be authorized. Raises LC003, LC004, LC005, LC007 and LC009.
 */
PG_FUNCTION_INFO_V1(lease_session_charge);
Datum
lease_session_charge(PG_FUNCTION_ARGS)
{
	text	   *account = argument_text(fcinfo, 0, "account");
	text	   *name = argument_text(fcinfo, 1, "session");
	Numeric		amount = argument_amount(fcinfo, 2, "amount", AMOUNT_POSITIVE);
	Chunk		session;
	TimestampTz now;
	char	   *reason;
	bool		applied;
	MemoryContext caller = statement_begin();

	session_lock(account, name, &session);
	now = session_require_open(account, &session);
	if (chunk_is_frozen(account, &session, &reason))
		pool_refuse_frozen(&(Pool) {.account = account, .credit = session.credit}, reason);
	applied = amount_compare(amount_add(session.consumed, amount), session.accepted) <= 0;
	if (applied)
	{
		session_spend(account, &session, amount, now);
		chunk_save(account, &session);
	}
	return session_return(caller, fcinfo, &session, now, applied, applied ? amount_zero() : amount);
}
