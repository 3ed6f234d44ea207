/*
 * rows.c
 *		Many rows as one parameter of a statement: record[], which unnest()
 *		makes rows again.
 *
 * One array of rows costs a statement much less than an array for each column:
 * for each of those it would have to keep a set of its own.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "funcapi.h"

#include "rows.h"

/* Begins to collect at most so many rows of some columns, in the current memory context. */
void
rows_begin(Rows *rows, const Oid *types, int ncolumns, int size)
{
	rows->tupdesc = CreateTemplateTupleDesc(ncolumns);
	for (int i = 0; i < ncolumns; i++)
		TupleDescInitEntry(rows->tupdesc, i + 1, NULL, types[i], -1, 0);
	BlessTupleDesc(rows->tupdesc);
	rows->row = palloc(sizeof(Datum) * size);
	rows->n = 0;
}

void
rows_add(Rows *rows, Datum *values, bool *nulls)
{
	rows->row[rows->n++] = HeapTupleGetDatum(heap_form_tuple(rows->tupdesc, values, nulls));
}

/* Returns the rows as a value of type record[]. */
ArrayType *
rows_end(const Rows *rows)
{
	return construct_array(rows->row, rows->n, RECORDOID, -1, false, TYPALIGN_DOUBLE);
}
