/*
 * ingest_write.c
 *		Writes what was decided of a part of a batch: entries first, tranches
 *		after them, each by one statement over arrays.
 *
 * What ledger.c says of entries and tranches holds here as well. The numbers of
 * the entries are drawn before, since the other entries of an event name its
 * first. A key that was used before is an error here, and not a row less: to
 * have the conflict looked for is half as dear again as to insert.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/builtins.h"

#include "amount.h"
#include "errors.h"
#include "ingest.h"
#include "ledger.h"
#include "rows.h"
#include "statement.h"

static Statement draw_statement = {
	.sql = "SELECT pg_catalog.array_agg(pg_catalog.nextval('credit_lease.entry_id_seq')) FROM pg_catalog.generate_series(1, $1)",
	.nargs = 1,
	.argtypes = {INT4OID}
};

static Statement append_statement = {
	.sql = "INSERT INTO credit_lease.ledger (entry_id, created_at, tranche_id, first_entry_id, parts, account, credit, kind,"
	" amount, released, available, idempotency_key, request, metadata, created_by)"
	" SELECT i.entry_id, $2, i.tranche_id, i.first_entry_id, i.parts, i.account, i.credit, i.kind,"
	"  i.amount, i.released, i.available, i.idempotency_key, i.request, i.metadata, (SELECT SESSION_USER)"
	" FROM unnest($1) AS i (entry_id bigint, tranche_id bigint, first_entry_id bigint, parts integer,"
	"  account text, credit text, kind text, amount numeric, released numeric, available numeric,"
	"  idempotency_key text, request jsonb, metadata jsonb)",
	.nargs = 2,
	.argtypes = {RECORDARRAYOID, TIMESTAMPTZOID}
};

/* The columns of its rows */
enum
{
	ENTRY_ID,
	TRANCHE_ID,
	FIRST_ENTRY_ID,
	ENTRY_PARTS,
	ENTRY_ACCOUNT,
	ENTRY_CREDIT,
	KIND,
	AMOUNT,
	RELEASED,
	AVAILABLE,
	KEY,
	ARGUMENTS,
	METADATA,
	ENTRY_COLUMNS
};

static const Oid entry_type[ENTRY_COLUMNS] = {
	INT8OID, INT8OID, INT8OID, INT4OID, TEXTOID, TEXTOID, TEXTOID,
	NUMERICOID, NUMERICOID, NUMERICOID, TEXTOID, JSONBOID, JSONBOID
};

static Statement change_statement = {
	.sql = "UPDATE credit_lease.tranche t SET open = i.open, remaining = i.remaining, consumed = i.consumed"
	" FROM unnest($1) AS i (account text, tid tid, open boolean, remaining numeric, consumed numeric)"
	" WHERE t.ctid = i.tid AND t.account = i.account",
	.nargs = 1,
	.argtypes = {RECORDARRAYOID}
};

static const Oid change_type[] = {TEXTOID, TIDOID, BOOLOID, NUMERICOID, NUMERICOID};

/* Returns as many numbers of entries, rising. */
static Datum *
draw_numbers(int n)
{
	Parameters	parameters = {0};
	bool		isnull;
	Datum	   *number;
	int			drawn;

	parameter_add(&parameters, Int32GetDatum(n));
	statement_execute(&draw_statement, &parameters);
	deconstruct_array(DatumGetArrayTypeP(statement_value(0, 1, &isnull)), INT8OID, sizeof(int64), FLOAT8PASSBYVAL,
					  TYPALIGN_DOUBLE, &number, NULL, &drawn);
	if (drawn != n)
		elog(ERROR, "could not draw %d numbers", n);
	return number;
}

/* Puts a pointer in a column, or null for none. */
static void
put(Datum *values, bool *nulls, int column, const void *pointer)
{
	values[column] = PointerGetDatum(pointer);
	nulls[column] = pointer == NULL;
}

static void
append_entries(const IngestPosting *posting)
{
	Parameters	parameters = {0};
	Rows		rows;
	Datum	   *number = draw_numbers(posting->nentries);
	text	   *consume = cstring_to_text("consume");
	text	   *track = cstring_to_text("track");
	text	   *shortfall = cstring_to_text("shortfall");

	rows_begin(&rows, entry_type, ENTRY_COLUMNS, posting->nentries);
	for (int i = 0; i < posting->nentries; i++)
	{
		const IngestEntry *entry = &posting->entry[i];
		const IngestEvent *event = entry->event;
		bool		first = entry->nth == 0;
		Datum		values[ENTRY_COLUMNS];
		bool		nulls[ENTRY_COLUMNS] = {false};

		values[ENTRY_ID] = number[i];
		values[TRANCHE_ID] = entry->tranche ? Int64GetDatum(entry->tranche->tranche_id) : (Datum) 0;
		nulls[TRANCHE_ID] = entry->tranche == NULL;
		values[FIRST_ENTRY_ID] = number[i - entry->nth];
		nulls[FIRST_ENTRY_ID] = first;
		values[ENTRY_PARTS] = Int32GetDatum(entry->parts);
		nulls[ENTRY_PARTS] = !first || entry->parts == 1;
		values[ENTRY_ACCOUNT] = PointerGetDatum(entry->pool->account);
		values[ENTRY_CREDIT] = PointerGetDatum(entry->pool->credit);
		values[KIND] = PointerGetDatum(entry->tranche == NULL ? shortfall : event->feature ? track : consume);
		values[AMOUNT] = NumericGetDatum(entry->amount);
		/* what is tracked was not held: all of it is from what remained */
		put(values, nulls, RELEASED, entry->tranche && event->feature ? amount_negate(entry->amount) : NULL);
		values[AVAILABLE] = NumericGetDatum(entry->available);
		put(values, nulls, KEY, first ? event->key : NULL);
		put(values, nulls, ARGUMENTS, first ? entry->arguments : NULL);
		put(values, nulls, METADATA, event->metadata);
		rows_add(&rows, values, nulls);
	}

	parameter_add_pointer(&parameters, rows_end(&rows));
	parameter_add(&parameters, TimestampTzGetDatum(posting->now));
	if ((int) statement_execute(&append_statement, &parameters) != posting->nentries)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("the ledger did not accept an entry of an ingested event")));
}

static void
change_tranches(const IngestPosting *posting)
{
	Parameters	parameters = {0};
	Rows		rows;

	/* no more have changed than there are entries */
	rows_begin(&rows, change_type, lengthof(change_type), posting->nentries);
	for (int i = 0; i < posting->npools; i++)
	{
		const Pool *pool = &posting->pool[i].pool;

		for (int t = 0; t < pool->ntranches; t++)
		{
			const Tranche *tranche = pool->tranche[t];
			Datum		values[lengthof(change_type)];
			bool		nulls[lengthof(change_type)] = {false};

			if (tranche->balance[REMAINING] == tranche->stored[REMAINING])
				continue;
			values[0] = PointerGetDatum(pool->account);
			values[1] = PointerGetDatum(&tranche->tid);
			values[2] = BoolGetDatum(tranche_is_open(tranche));
			values[3] = NumericGetDatum(tranche->balance[REMAINING]);
			values[4] = NumericGetDatum(tranche->balance[CONSUMED]);
			rows_add(&rows, values, nulls);
			ledger_ask_for_more(pool, tranche);
		}
	}
	if (rows.n == 0)
		return;
	parameter_add_pointer(&parameters, rows_end(&rows));
	if ((int) statement_execute(&change_statement, &parameters) != rows.n)
		ereport(ERROR,
				(errcode(ERRCODE_LEASE_BOOKS),
				 errmsg("a tranche was changed behind the ingestion of events")));
}

/*
 * ingest_write
 *		Writes a posting's entries, and the tranches that it has changed. Raises
 *		23505 where a key was used before; all is to be rolled back then.
 */
void
ingest_write(void *posting)
{
	append_entries(posting);
	change_tranches(posting);
}
