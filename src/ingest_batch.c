/*
 * ingest_batch.c
 *		What comes of a batch of events, of any accounts.
 *
 * A statement for each event would cost more than all else. So the accounts
 * are locked by one statement, and the events worked on in parts: one statement
 * reads all their pools, they are decided in memory one after the other, and
 * ingest_write.c writes what was decided. Accounts with which it takes more
 * than that go the ordinary way, event by event (ingest_single.c); the events of
 * an account are decided in their order in any case.
 *
 * That keys are fresh is assumed, and proved by the index when the entries are
 * written. Where one was used before, what was written is rolled back, the keys
 * are looked up, and the part is decided anew. So it is before an event is
 * refused: it may be one that was applied, and comes again.
 *
 * Locks: all accounts in the order of their bytes, by one statement, so that no
 * two batches deadlock: the only one that locks across accounts, as a statement
 * for each would cost as much as all else that is done; then, one by one in the same
 * order, stripes of those that are striped. Who has an account must not wait
 * for its stripes: where one is found to have got some while this waited, all
 * locks are given back and taken anew, without it. So they are, with it, where
 * one has come in or lost its stripes: it is not locked, and may be before one
 * that is. What comes in after that look is not read (pool_lock()). What a
 * charge needs and is not there is created before, in the same order.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/datum.h"
#include "utils/memutils.h"

#include "amount.h"
#include "clock.h"
#include "guard.h"
#include "held.h"
#include "ingest.h"
#include "ingest_label.h"
#include "policy.h"
#include "statement.h"

/* How many events are worked on at a time, at least: what they need of memory is free again after them */
#define PART	5000

/* ... and at most so many parts, as each is a subtransaction */
#define PARTS	50

static Statement create_statement = {
	.sql = "INSERT INTO credit_lease.account (account, created_at)"
	" SELECT i.account, $2 FROM unnest($1) AS i (account)"
	" ON CONFLICT (account) DO NOTHING",
	.nargs = 2,
	.argtypes = {TEXTARRAYOID, TIMESTAMPTZOID}
};

/* Rows are locked after they have been sorted. */
static Statement lock_statement = {
	.sql = "SELECT a.account, a.frozen FROM credit_lease.account a"
	" WHERE a.account = ANY ($1) AND NOT a.striped ORDER BY a.account FOR NO KEY UPDATE",
	.nargs = 1,
	.argtypes = {TEXTARRAYOID},
	.by_index = true
};

static Statement look_statement = {
	.sql = "SELECT a.account, a.striped FROM credit_lease.account a WHERE a.account = ANY ($1) ORDER BY a.account",
	.nargs = 1,
	.argtypes = {TEXTARRAYOID},
	.by_index = true
};

static Statement pools_statement = {
	.sql = "SELECT t.ctid, t, t.account FROM credit_lease.tranche t"
	" WHERE t.account = ANY ($1) AND t.credit = $2 AND t.open ORDER BY t.account",
	.nargs = 2,
	.argtypes = {TEXTARRAYOID, TEXTOID},
	.by_index = true
};

/* An account of the batch */
typedef struct Account
{
	text	   *name;
	bool		used;			/* it has events that may be paid for */
	bool		locked;			/* it was there, and not striped */
	bool		frozen;			/* something of it is */
	bool		striped;
} Account;

typedef struct Batch
{
	IngestEvent **event;		/* by account and ordinal */
	int			nevents;
	Account    *account;
	int			naccounts;
	bool		charge;
} Batch;

/* Events that are worked on together: some of a batch */
typedef struct Part
{
	Batch	   *batch;
	IngestEvent **event;
	int			nevents;
	labels_hash *pools;
	bool	   *single;			/* which of the events go the ordinary way */
	IngestPosting posting;
} Part;

/* Notes that an event is not applied, and why. */
void
ingest_refuse(IngestEvent *event, const char *reason, Numeric available)
{
	event->applied = event->duplicate = false;
	event->reason = reason;
	event->available = available;
}

/* Notes that an event is applied. */
void
ingest_apply(IngestEvent *event, bool is_short, Numeric available)
{
	event->applied = true;
	event->duplicate = false;
	event->reason = is_short ? "shortfall" : NULL;
	event->available = available;
}

static int
compare_text(const text *a, const text *b)
{
	int			a_length = VARSIZE_ANY_EXHDR(a);
	int			b_length = VARSIZE_ANY_EXHDR(b);
	int			order = memcmp(VARDATA_ANY(a), VARDATA_ANY(b), Min(a_length, b_length));

	return order != 0 ? order : a_length - b_length;
}

static int
compare_events(const void *a, const void *b)
{
	const IngestEvent *x = *(IngestEvent *const *) a;
	const IngestEvent *y = *(IngestEvent *const *) b;
	int			order = compare_text(x->account, y->account);

	return order != 0 ? order : x->ordinal - y->ordinal;
}

/* Sorts the events, and numbers their accounts. */
static void
sort_events(Batch *batch)
{
	qsort(batch->event, batch->nevents, sizeof(IngestEvent *), compare_events);
	batch->account = palloc(sizeof(Account) * Max(batch->nevents, 1));
	for (int i = 0; i < batch->nevents; i++)
	{
		IngestEvent *event = batch->event[i];

		if (batch->naccounts == 0 ||
			compare_text(batch->account[batch->naccounts - 1].name, event->account) != 0)
			batch->account[batch->naccounts++] = (Account) {.name = event->account};
		event->account_number = batch->naccounts - 1;
	}
}

/* Returns the names of used accounts that are not known to be striped, in order: all, or those that are not locked. */
static Datum *
list_accounts(const Batch *batch, bool locked_too, int *n)
{
	Datum	   *name = palloc(sizeof(Datum) * Max(batch->naccounts, 1));

	*n = 0;
	for (int i = 0; i < batch->naccounts; i++)
	{
		const Account *account = &batch->account[i];

		if (account->used && !account->striped && (locked_too || !account->locked))
			name[(*n)++] = PointerGetDatum(account->name);
	}
	return name;
}

static void
create_accounts(Batch *batch)
{
	Parameters	parameters = {0};
	int			n;
	Datum	   *name = list_accounts(batch, true, &n);

	parameter_add_texts(&parameters, name, n);
	parameter_add(&parameters, TimestampTzGetDatum(clock_now()));
	statement_execute(&create_statement, &parameters);
}

/* Returns the account of a row of the last result, which has them in order; *next is where to look. */
static Account *
account_of_row(Batch *batch, uint64 row, int *next)
{
	bool		isnull;
	text	   *name = DatumGetTextPP(statement_value(row, 1, &isnull));

	while (*next < batch->naccounts && compare_text(batch->account[*next].name, name) != 0)
		(*next)++;
	if (*next == batch->naccounts)
		elog(ERROR, "found an account that was not asked for");
	return &batch->account[*next];
}

/*
 * Locks the accounts that are there and not striped. Returns false, and the
 * locks are to be given back, where others turn out to be there: the lock sees
 * what was committed before it waited.
 */
static bool
lock_accounts(void *arg)
{
	Batch	   *batch = arg;
	Parameters	lock = {0};
	Parameters	look = {0};
	int			n;
	Datum	   *name;
	uint64		rows;
	int			next = 0;

	for (int i = 0; i < batch->naccounts; i++)
		batch->account[i].locked = false;
	name = list_accounts(batch, true, &n);
	parameter_add_texts(&lock, name, n);
	rows = statement_execute(&lock_statement, &lock);
	for (uint64 row = 0; row < rows; row++)
	{
		Account    *account = account_of_row(batch, row, &next);
		bool		isnull;

		account->locked = true;
		account->frozen = DatumGetBool(statement_value(row, 2, &isnull));
		held_note(account->name);
	}
	if ((int) rows == n)
		return true;

	name = list_accounts(batch, false, &n);
	parameter_add_texts(&look, name, n);
	rows = statement_execute(&look_statement, &look);
	next = 0;
	for (uint64 row = 0; row < rows; row++)
	{
		bool		isnull;

		account_of_row(batch, row, &next)->striped = DatumGetBool(statement_value(row, 2, &isnull));
	}
	return rows == 0;
}

/* Returns whether an account's events may be decided in memory. */
static bool
is_plain(const Account *account)
{
	return !account->striped && !IsolationUsesXactSnapshot();
}

static IngestPool *
add_pool(Part *part, const IngestEvent *event, text *credit)
{
	IngestPool *pool = &part->posting.pool[part->posting.npools++];

	*pool = (IngestPool) {
		.pool = {.account = event->account, .credit = credit, .now = part->posting.now}
	};
	pool->pool.may_be_frozen = part->batch->account[event->account_number].frozen;
	pool->locked = part->batch->account[event->account_number].locked;
	return pool;
}

static IngestPool *
find_pool(Part *part, const IngestEvent *event, text *credit)
{
	bool		found;
	LabelEntry *entry = labels_insert(part->pools, (Label) {event->account_number, credit}, &found);

	if (!found)
		entry->value = add_pool(part, event, credit);
	return entry->value;
}

/* Returns whether an event is the only one of its account, and has one pool: then there is nothing to look for. */
static bool
is_alone(const Part *part, int i)
{
	int			account = part->event[i]->account_number;

	return part->event[i]->npayers == 1 &&
		(i == 0 || part->event[i - 1]->account_number != account) &&
		(i + 1 == part->nevents || part->event[i + 1]->account_number != account);
}

/* Finds out which pools the events are about, and which events have the same key. */
static void
find_pools(Part *part)
{
	labels_hash *keys = labels_create(CurrentMemoryContext, 256, NULL);
	int			npayers = 0;

	for (int i = 0; i < part->nevents; i++)
		npayers += part->event[i]->npayers;
	part->posting.pool = palloc(sizeof(IngestPool) * npayers);
	part->pools = labels_create(CurrentMemoryContext, 256, NULL);

	for (int i = 0; i < part->nevents; i++)
	{
		IngestEvent *event = part->event[i];

		if (part->single[i])
			continue;
		event->twin = NULL;
		if (is_alone(part, i))
		{
			event->payer->pool = add_pool(part, event, event->payer->credit);
			continue;
		}
		for (int p = 0; p < event->npayers; p++)
			event->payer[p].pool = find_pool(part, event, event->payer[p].credit);
		if (event->key)
		{
			bool		found;
			LabelEntry *entry = labels_insert(keys, (Label) {event->account_number, event->key}, &found);

			if (!found)
				entry->value = event;
			event->twin = entry->value;
		}
	}
}

/*
 * Reads the open tranches of the pools of a credit, which are in the order of
 * their accounts; those whose account is not locked are empty.
 */
static void
read_credit(IngestPool **pool, int n)
{
	Parameters	parameters = {0};
	Datum	   *account = palloc(sizeof(Datum) * n);
	int			nlocked = 0;
	uint64	   *row;
	uint64		rows;
	uint64		next = 0;

	for (int i = 0; i < n; i++)
	{
		if (pool[i]->locked)
			account[nlocked++] = PointerGetDatum(pool[i]->pool.account);
	}
	parameter_add_texts(&parameters, account, nlocked);
	parameter_add_pointer(&parameters, pool[0]->pool.credit);
	rows = statement_execute(&pools_statement, &parameters);
	row = palloc(sizeof(uint64) * Max(rows, 1));
	for (uint64 i = 0; i < rows; i++)
		row[i] = i;
	for (int i = 0; i < n; i++)
	{
		uint64		first = next;
		bool		isnull;

		while (next < rows && compare_text(DatumGetTextPP(statement_value(next, 3, &isnull)), pool[i]->pool.account) == 0)
			next++;
		pool_load(&pool[i]->pool, &row[first], (int) (next - first));
		pool[i]->available = pool[i]->pool.available;
	}
	if (next < rows)
		elog(ERROR, "read a pool that was not asked for");
}

/* By credit, and within it in the order in which they were found, which is that of their accounts */
static int
compare_pools(const void *a, const void *b)
{
	const IngestPool *x = *(IngestPool *const *) a;
	const IngestPool *y = *(IngestPool *const *) b;
	int			order = compare_text(x->pool.credit, y->pool.credit);

	return order != 0 ? order : x < y ? -1 : 1;
}

/* Reads the open tranches of all pools. */
static void
read_pools(Part *part)
{
	int			n = part->posting.npools;
	IngestPool **pool = palloc(sizeof(IngestPool *) * n);
	int			first = 0;

	for (int i = 0; i < n; i++)
		pool[i] = &part->posting.pool[i];
	qsort(pool, n, sizeof(IngestPool *), compare_pools);
	for (int i = 1; i <= n; i++)
	{
		if (i < n && compare_text(pool[i]->pool.credit, pool[first]->pool.credit) == 0)
			continue;
		read_credit(&pool[first], i - first);
		first = i;
	}
}

static bool
is_frozen(IngestPool *pool)
{
	if (!pool->looked)
	{
		pool->frozen = pool_is_frozen(&pool->pool);
		pool->looked = true;
	}
	return pool->frozen;
}

/* Returns whether a pool that is short may have more, is to be asked for, or nobody knows what it has. */
static bool
may_have_more(const Pool *pool)
{
	for (int i = 0; i < pool->ntranches; i++)
	{
		if (amount_sign(pool->tranche[i]->balance[CHUNKED]) != 0)
			return true;
	}
	return pool->is_stale || policy_has_server();
}

/* Returns whether usage of a pool may have to be reported in units. */
static bool
is_reported(const Pool *pool)
{
	for (int i = 0; i < pool->ntranches; i++)
	{
		if (pool->tranche[i]->server)
			return true;
	}
	return policy_has_server();
}

/* Returns the place of a new entry. */
static IngestEntry *
add_entry(IngestPosting *posting)
{
	if (posting->nentries == posting->size)
	{
		posting->size *= 2;
		posting->entry = repalloc_huge(posting->entry, sizeof(IngestEntry) * posting->size);
	}
	return &posting->entry[posting->nentries++];
}

/* Spends an amount that a pool has, in burn order, for an event, and the entries for it; and for what is missing. */
static void
spend(IngestPosting *posting, IngestEvent *event, IngestPool *payer, Numeric amount, Numeric shortfall)
{
	Pool	   *pool = &payer->pool;
	int			first = posting->nentries;
	Jsonb	   *arguments = event->key && (event->feature || shortfall) ? ingest_arguments(event, shortfall != NULL) : NULL;

	while (amount_sign(amount) > 0)
	{
		Tranche    *tranche;
		Numeric		part;

		if (payer->next == pool->ntranches)
			elog(ERROR, "took more credit than was available");
		tranche = pool->tranche[payer->next];
		part = tranche->alive ? amount_min(amount, tranche->balance[REMAINING]) : amount_zero();
		if (amount_sign(part) > 0)
		{
			pool_move(pool, tranche, REMAINING, CONSUMED, part);
			*add_entry(posting) = (IngestEntry) {
				.tranche = tranche, .amount = part
			};
		}
		if (part == amount)
			break;
		amount = amount_subtract(amount, part);
		payer->next++;
	}
	if (shortfall)
		*add_entry(posting) = (IngestEntry) {
		.amount = shortfall
	};
	for (int i = first; i < posting->nentries; i++)
	{
		IngestEntry *entry = &posting->entry[i];

		entry->event = event;
		entry->pool = pool;
		entry->available = pool->available;
		entry->nth = i - first;
		entry->parts = posting->nentries - first;
		entry->arguments = arguments;
	}
	ingest_apply(event, shortfall != NULL, pool->available);
	if (event->twin)
		event->twin->taker = event;
}

/*
 * Decides about an event. Returns false where it has to go the ordinary way,
 * with all of its account in this part.
 */
static bool
decide_event(Part *part, IngestEvent *event)
{
	IngestPool *payer = NULL;
	Numeric		amount = NULL;

	for (int i = 0; i < event->npayers; i++)
	{
		const Pool *pool = &event->payer[i].pool->pool;

		if (pool->may_have_lapsed || (event->feature && is_reported(pool)))
			return false;
	}
	if (event->past != INGEST_NO_PAST)
	{
		ingest_repeat(event, event->past == INGEST_SAME, event->payer->pool->pool.available);
		return true;
	}
	if (event->twin && event->twin->taker)
	{
		ingest_repeat(event, ingest_is_same(event, event->twin->taker), event->payer->pool->pool.available);
		return true;
	}
	for (int i = 0; i < event->npayers; i++)
	{
		IngestPool *pool = event->payer[i].pool;

		if (is_frozen(pool))
			continue;
		if (amount_compare(pool->pool.available, event->payer[i].amount) >= 0)
		{
			spend(&part->posting, event, pool, event->payer[i].amount, NULL);
			return true;
		}
		if (may_have_more(&pool->pool))
			return false;
		if (payer == NULL)
		{
			payer = pool;
			amount = event->payer[i].amount;
		}
	}
	if (payer == NULL)
		ingest_refuse(event, "frozen", event->payer->pool->pool.available);
	else if (!part->batch->charge)
		ingest_refuse(event, "insufficient_credit", payer->pool.available);
	else
		spend(&part->posting, event, payer, payer->pool.available, amount_subtract(amount, payer->pool.available));
	return true;
}

/* Makes the pools of some events what was read. */
static void
reset(Part *part, int first, int end)
{
	for (int i = first; i < end; i++)
	{
		IngestEvent *event = part->event[i];

		if (event->twin)
			event->twin->taker = NULL;
		for (int p = 0; p < event->npayers && !part->single[i]; p++)
		{
			IngestPool *pool = event->payer[p].pool;

			for (int t = 0; t < pool->pool.ntranches; t++)
				memcpy(pool->pool.tranche[t]->balance, pool->pool.tranche[t]->stored, sizeof(pool->pool.tranche[t]->stored));
			pool->pool.available = pool->available;
			pool->next = 0;
		}
	}
}

/* Decides about the events from one to before another, which are those of an account. */
static void
decide_account(Part *part, int first, int end)
{
	int			nentries = part->posting.nentries;

	for (int i = first; i < end; i++)
	{
		CHECK_FOR_INTERRUPTS();
		if (part->single[i])
			return;
		if (!decide_event(part, part->event[i]))
		{
			reset(part, first, end);
			part->posting.nentries = nentries;
			for (i = first; i < end; i++)
				part->single[i] = true;
			return;
		}
	}
}

/* Decides about all events, and collects what is to be written. */
static void
decide(Part *part)
{
	int			first = 0;

	part->posting.nentries = 0;
	reset(part, 0, part->nevents);
	for (int i = 1; i <= part->nevents; i++)
	{
		if (i < part->nevents && part->event[i]->account_number == part->event[first]->account_number)
			continue;
		CHECK_FOR_INTERRUPTS();
		decide_account(part, first, i);
		first = i;
	}
}

/* Returns whether an event that was refused is known from before. */
static bool
look_back_at_refused(Part *part)
{
	IngestEvent **refused = palloc(sizeof(IngestEvent *) * part->nevents);
	int			n = 0;

	for (int i = 0; i < part->nevents; i++)
	{
		if (!part->single[i] && !part->event[i]->applied)
			refused[n++] = part->event[i];
	}
	return ingest_look_back(refused, n) > 0;
}

/* Decides and writes, again and again until every key that was used before is known. */
static void
post(Part *part)
{
	for (;;)
	{
		ErrorData  *error;

		CHECK_FOR_INTERRUPTS();
		decide(part);
		if (look_back_at_refused(part))
			continue;
		if (part->posting.nentries == 0)
			return;
		error = guard(ingest_write, &part->posting);
		if (error == NULL)
			return;
		if (error->sqlerrcode != ERRCODE_UNIQUE_VIOLATION || ingest_look_back(part->event, part->nevents) == 0)
			ReThrowError(error);
	}
}

/* Copies what was noted of an event to where it lives on. */
static void
keep(IngestEvent *event, MemoryContext context)
{
	MemoryContext old;

	if (event->available == NULL)
		return;
	old = MemoryContextSwitchTo(context);
	event->available = DatumGetNumeric(datumCopy(NumericGetDatum(event->available), false, -1));
	MemoryContextSwitchTo(old);
}

/* Works on the events from one to before another. */
static void
work(Batch *batch, int first, int end)
{
	Part		part = {.batch = batch, .event = &batch->event[first], .nevents = end - first};
	MemoryContext context = statement_begin();

	part.single = palloc(sizeof(bool) * part.nevents);
	for (int i = 0; i < part.nevents; i++)
		part.single[i] = !is_plain(&batch->account[part.event[i]->account_number]);
	part.posting.now = clock_now();
	part.posting.size = part.nevents;
	part.posting.entry = palloc(sizeof(IngestEntry) * part.nevents);
	find_pools(&part);
	if (part.posting.npools > 0)
	{
		read_pools(&part);
		post(&part);
	}
	for (int i = 0; i < part.nevents; i++)
	{
		if (part.single[i])
		{
			CHECK_FOR_INTERRUPTS();
			statement_begin();
			ingest_single(part.event[i], batch->charge);
			keep(part.event[i], context);
			SPI_finish();
		}
		else
			keep(part.event[i], context);
	}
	SPI_finish();
}

/* Locks what a batch needs, and works on all of it. */
static void
work_on_all(Batch *batch)
{
	int			size = Max(PART, batch->nevents / PARTS + 1);

	for (int i = 0; i < batch->nevents; i++)
		batch->account[batch->event[i]->account_number].used = true;
	if (batch->charge)
		create_accounts(batch);
	while (!guard_attempt(lock_accounts, batch))
		CHECK_FOR_INTERRUPTS();
	for (int first = 0; first < batch->nevents; first += size)
		work(batch, first, Min(first + size, batch->nevents));
}

/*
 * Finds those of the events that nobody can pay for whose key has had its
 * effect all the same (rule 5), before the batch or in it.
 */
static void
look_back_at_unpaid(IngestEvent *events, int n)
{
	IngestEvent **unpaid = MemoryContextAllocHuge(CurrentMemoryContext, sizeof(IngestEvent *) * Max(n, 1));
	int			nunpaid = 0;

	for (int i = 0; i < n; i++)
	{
		if (events[i].npayers == 0 && events[i].key)
			unpaid[nunpaid++] = &events[i];
	}
	ingest_look_back(unpaid, nunpaid);
	for (int i = 0; i < nunpaid; i++)
	{
		if (unpaid[i]->past != INGEST_NO_PAST)
			ingest_repeat(unpaid[i], unpaid[i]->past == INGEST_SAME, NULL);
	}
}

/*
 * ingest_batch
 *		Spends what events say that have been read and checked, and notes what
 *		came of each. What it notes is in the current memory context.
 */
void
ingest_batch(IngestEvent *events, int n, bool charge)
{
	Batch		batch = {.nevents = n, .charge = charge};

	batch.event = MemoryContextAllocHuge(CurrentMemoryContext, sizeof(IngestEvent *) * Max(n, 1));
	for (int i = 0; i < n; i++)
		batch.event[i] = &events[i];
	sort_events(&batch);
	batch.nevents = ingest_price(batch.event, n);
	if (batch.nevents > 0)
		work_on_all(&batch);
	look_back_at_unpaid(events, n);
}
