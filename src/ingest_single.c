/*
 * ingest_single.c
 *		An event that is spent by itself, as lease_consume() would spend it.
 *
 * So go the events of accounts with which it is not enough to look at the open
 * tranches: those that are striped, have expired holds, are short and might
 * have more, or have usage to report in units; and all above READ COMMITTED.
 *
 * It waits for no upstream, as others may wait for the accounts that the batch
 * has locked (rule 12), but has it asked.
 *
 * Locks: the account, or stripes of it, as lease_consume().
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "amount.h"
#include "errors.h"
#include "ingest.h"
#include "ledger.h"
#include "reclaim.h"
#include "settle.h"
#include "supply.h"

static const EntryKind kind_consume = {.name = "consume", .bucket = CONSUMED};
static const EntryKind kind_track = {.name = "track", .bucket = CONSUMED, .settles = true};

/* Locks and reads the pool of a credit; returns whether it has enough. */
static bool
lock_payer(const IngestEvent *event, const IngestPayer *payer, bool charge, Pool *pool)
{
	*pool = (Pool) {.account = event->account, .credit = payer->credit};
	if (charge)
		pool->wanted = payer->amount;
	reclaim_lock(pool, charge ? amount_zero() : payer->amount);
	return reclaim_cover(pool, payer->amount);
}

/*
 * Locks and reads the pool that is to pay: the first that can, or else the
 * first that is not frozen. Sets whether it is frozen, whether it has enough,
 * and whether nobody knows what one that is short could have.
 */
static const IngestPayer *
find_payer(const IngestEvent *event, bool charge, Pool *pool, bool *frozen, bool *enough, bool *unknown)
{
	const IngestPayer *payer = NULL;

	*frozen = *enough = *unknown = false;
	for (int i = 0; i < event->npayers; i++)
	{
		*enough = lock_payer(event, &event->payer[i], charge && event->npayers == 1, pool);
		*frozen = pool_is_frozen(pool);
		if (*enough && !*frozen)
			return &event->payer[i];
		*unknown |= !*frozen && pool_lacks_supply(pool);
		if (!*frozen && payer == NULL)
			payer = &event->payer[i];
	}
	if (payer == NULL)
		payer = event->payer;
	if (event->npayers > 1)
	{
		*enough = lock_payer(event, payer, charge, pool);
		*frozen = pool_is_frozen(pool);
	}
	if (!*enough && !*frozen)
		supply_ask(pool, payer->amount);
	return payer;
}

/* Has what was used of a feature reported, in its own units, and what there was no credit for with it. */
static void
report(const IngestEvent *event, const IngestPayer *payer, const Pool *pool, const Request *request, int64 entry_id)
{
	Hold		usage = {
		.event = payer->reported_as,
		.tracked = event->quantity,
		.track_entry_id = entry_id,
		.consumed = request->amount,
		.shortfall = request->shortfall ? request->shortfall : amount_zero()
	};

	settle_report(pool, &usage, psprintf("%s:entry " INT64_FORMAT ":" INT64_FORMAT,
										 text_to_cstring(event->account), entry_id,
										 pool->now + (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY));
}

/* Spends what is there of an amount and records the rest; returns false where the event's key is taken. */
static bool
spend(const IngestEvent *event, const IngestPayer *payer, Pool *pool, Numeric amount)
{
	Request		request = {.kind = event->feature ? &kind_track : &kind_consume, .account = event->account,
		.credit = payer->credit, .key = event->key, .amount = amount, .metadata = event->metadata};
	int64		reservation_id = NO_RESERVATION;
	int64		entry_id;

	if (amount_compare(amount, payer->amount) < 0)
		request.shortfall = amount_subtract(payer->amount, amount);
	request.arguments = ingest_arguments(event, request.shortfall != NULL);
	pool_take(pool, amount, CONSUMED);
	entry_id = ledger_append(pool, &request, &reservation_id);
	if (entry_id == 0)
		return false;
	/* ahead of what it looks at being saved */
	if (event->feature)
		report(event, payer, pool, &request, entry_id);
	ledger_save(pool);
	return true;
}

/*
 * ingest_single
 *		Spends what an event says, and notes what came of it. What it notes is
 *		in the current memory context.
 */
void
ingest_single(IngestEvent *event, bool charge)
{
	Pool		pool;
	bool		frozen;
	bool		enough;
	bool		unknown;
	const IngestPayer *payer = find_payer(event, charge, &pool, &frozen, &enough, &unknown);
	Numeric		available = pool.available;
	bool		refused = frozen || (!enough && !charge);

	if (event->past == INGEST_NO_PAST && !refused)
	{
		Numeric		amount = enough ? payer->amount : reclaim_reach(&pool, payer->amount);

		if (spend(event, payer, &pool, amount))
		{
			ingest_apply(event, amount_compare(amount, payer->amount) < 0, pool.available);
			return;
		}
	}
	if (event->past == INGEST_NO_PAST && ingest_look_back(&event, 1) == 0)
	{
		if (!refused)
			ereport(ERROR,
					(errcode(ERRCODE_LEASE_BOOKS),
					 errmsg("the ledger of account \"%s\" lacks an entry", text_to_cstring(event->account))));
		ingest_refuse(event, frozen ? "frozen" : unknown ? "lease_acquire_failed" : "insufficient_credit", available);
		return;
	}
	ingest_repeat(event, event->past == INGEST_SAME, available);
}
