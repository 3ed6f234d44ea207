/*
 * guard.c
 *		Work in a subtransaction: what may fail without failing what is round
 *		it, as one bad row must not keep the worker from all the others, and
 *		what may turn out to be in vain.
 *
 * What may be rolled back has no other one within it that is committed, unless
 * the transaction ends soon: who waits for a row that the inner one has locked
 * would go on to wait for the whole transaction.
 *
 * A subtransaction has to be ended by who began it, also when an error passes
 * through: whoever catches that further out would end the inner one in place of
 * its own, and be left with the user and the settings that were valid inside.
 */
#include "postgres.h"

#include "access/xact.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#include "guard.h"

/* Ends the subtransaction in which an error was raised; returns the error. */
static ErrorData *
take_error(MemoryContext context)
{
	ErrorData  *error;

	MemoryContextSwitchTo(context);
	error = CopyErrorData();
	FlushErrorState();
	RollbackAndReleaseCurrentSubTransaction();
	return error;
}

/*
 * guard
 *		Does some work in a subtransaction and returns NULL. If it has failed,
 *		nothing of it is left but the error, which is returned in the current
 *		memory context.
 */
ErrorData *
guard(void (*work) (void *), void *arg)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	ErrorData  *volatile error = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		work(arg);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		error = take_error(context);
	}
	PG_END_TRY();

	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
	return error;
}

/*
 * guard_attempt
 *		Does some work in a subtransaction and returns whether it says that it
 *		succeeded. If not, nothing of it is left; what it locked is free again.
 *		An error is raised, once the subtransaction is over.
 */
bool
guard_attempt(bool (*work) (void *), void *arg)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	ErrorData  *volatile error = NULL;
	volatile bool done = false;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		done = work(arg);
		if (done)
			ReleaseCurrentSubTransaction();
		else
			RollbackAndReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		error = take_error(context);
	}
	PG_END_TRY();

	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
	if (error)
		ReThrowError(error);
	return done;
}
