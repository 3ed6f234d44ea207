/*
 * held.c
 *		Which accounts this transaction has locked, or stripes of them.
 *
 * From a row that was locked by several subtransactions one cannot read that.
 * Nor does it say who waits for whom: PostgreSQL lets those who wait for a
 * subtransaction that was committed wait for the whole transaction, even if
 * what it was committed to is rolled back. So a transaction can be waited for
 * by reason of locks that it has not any more. What a subtransaction has locked
 * that is rolled back itself is free, and forgotten.
 */
#include "postgres.h"

#include "access/xact.h"
#include "common/hashfn.h"
#include "storage/lock.h"
#include "storage/proc.h"

#include "compat.h"
#include "held.h"

/* A transaction that has locked more accounts is taken to have locked all. */
#define MOST_NOTES	1024

/* An account, by a hash of it */
typedef struct Note
{
	uint32		account;
	TransactionId locked_by;	/* the outermost (sub)transaction that has; invalid for none */
	bool		waited_for;		/* by reason of another one, perhaps */
} Note;

static Note notes[MOST_NOTES];
static int	nnotes = 0;
static LocalTransactionId transaction = InvalidLocalTransactionId;

static uint32
hash_account(const text *account)
{
	return hash_bytes((const unsigned char *) VARDATA_ANY(account), VARSIZE_ANY_EXHDR(account));
}

/* Returns what is noted of an account, NULL for nothing. */
static Note *
find_note(const text *account)
{
	uint32		hash = hash_account(account);

	for (int i = 0; i < nnotes && transaction == MyProcLxid; i++)
	{
		if (notes[i].account == hash)
			return &notes[i];
	}
	return NULL;
}

/* Forgets what a subtransaction has locked that is rolled back. */
static void
at_subtransaction(SubXactEvent event, SubTransactionId id, SubTransactionId parent, void *arg)
{
	TransactionId xid = GetCurrentTransactionIdIfAny();

	if (event != SUBXACT_EVENT_ABORT_SUB || !TransactionIdIsValid(xid) || transaction != MyProcLxid)
		return;
	for (int i = 0; i < nnotes; i++)
	{
		if (notes[i].locked_by == xid)
			notes[i].locked_by = InvalidTransactionId;
	}
}

/* Notes that an account, or a stripe of it, is locked. */
void
held_note(const text *account)
{
	static bool registered = false;
	TransactionId xid = GetCurrentTransactionIdIfAny();
	Note	   *note = find_note(account);

	if (!registered)
		RegisterSubXactCallback(at_subtransaction, NULL);
	registered = true;
	if (transaction != MyProcLxid)
		nnotes = 0;
	transaction = MyProcLxid;
	if (note == NULL)
	{
		if (nnotes < MOST_NOTES)
			notes[nnotes++] = (Note) {.account = hash_account(account), .locked_by = xid};
	}
	else if (TransactionIdIsValid(note->locked_by) && note->locked_by != xid)
	{
		note->waited_for = true;
		if (!TransactionIdIsCurrentTransactionId(note->locked_by))
			note->locked_by = xid;
	}
	else
		note->locked_by = xid;
}

/* Returns whether the transaction has an account locked, or a stripe of it. */
bool
held_now(const text *account)
{
	const Note *note = find_note(account);

	if (note == NULL)
		return nnotes == MOST_NOTES && transaction == MyProcLxid;
	return TransactionIdIsValid(note->locked_by) && TransactionIdIsCurrentTransactionId(note->locked_by);
}

/* ... or has had, so that others may wait for the transaction. */
bool
held_ever(const text *account)
{
	const Note *note = find_note(account);

	return held_now(account) || (note && (note->waited_for || TransactionIdIsValid(note->locked_by)));
}

/*
 * held_is_waited_for
 *		Returns whether somebody waits for the whole transaction. Who waits for a
 *		subtransaction that is just being committed is not seen.
 */
bool
held_is_waited_for(void)
{
	TransactionId xid = GetTopTransactionIdIfAny();
	LOCKTAG		tag;

	if (!TransactionIdIsValid(xid))
		return false;
	SET_LOCKTAG_TRANSACTION(tag, xid);
	return LockHasWaiters(&tag, ExclusiveLock, false);
}
