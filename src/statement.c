/*
 * statement.c
 *		SQL statements with kept plans.
 *
 * All access to tables is SQL through SPI, so that triggers and logical
 * decoding see everything and the same statements run on a distributed table.
 * A plan is made at its first use in a session and kept; PostgreSQL replans it
 * when what it depends on changes. Generic plans, but where a statement says
 * otherwise: it names its keys with equality, so no parameter's value makes
 * another plan better.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "funcapi.h"
#include "nodes/parsenodes.h"
#include "utils/array.h"
#include "utils/guc.h"
#include "utils/snapmgr.h"
#include "utils/typcache.h"

#include "statement.h"

void
parameter_add(Parameters *parameters, Datum value)
{
	Assert(parameters->n < STATEMENT_MAX_ARGS);
	parameters->null[parameters->n] = ' ';
	parameters->value[parameters->n++] = value;
}

void
parameter_add_null(Parameters *parameters)
{
	Assert(parameters->n < STATEMENT_MAX_ARGS);
	parameters->null[parameters->n] = 'n';
	parameters->value[parameters->n++] = (Datum) 0;
}

/* Adds a pass-by-reference value, or NULL for a null pointer. */
void
parameter_add_pointer(Parameters *parameters, const void *pointer)
{
	if (pointer)
		parameter_add(parameters, PointerGetDatum(pointer));
	else
		parameter_add_null(parameters);
}

/* Adds some texts as an array. */
void
parameter_add_texts(Parameters *parameters, Datum *text, int n)
{
	parameter_add_pointer(parameters, construct_array(text, n, TEXTOID, -1, false, TYPALIGN_INT));
}

/*
 * statement_begin
 *		Makes statements possible and returns the caller's memory context, in
 *		which the result is to be made. What is allocated between here and
 *		statement_end() goes with SPI's own context.
 */
MemoryContext
statement_begin(void)
{
	MemoryContext caller = CurrentMemoryContext;

	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	return caller;
}

/*
 * statement_end
 *		Forms the function's row in the caller's memory context and ends what
 *		statement_begin() began.
 */
Datum
statement_end(MemoryContext caller, FunctionCallInfo fcinfo, Datum *values, bool *nulls)
{
	MemoryContext old = MemoryContextSwitchTo(caller);
	TupleDesc	tupdesc;
	Datum		result;

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	result = HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(tupdesc), values, nulls));

	MemoryContextSwitchTo(old);
	SPI_finish();
	return result;
}

static void
make_plan(Statement *statement)
{
	SPIPlanPtr	plan;

	if (statement->plan)
		return;
	plan = SPI_prepare_cursor(statement->sql, statement->nargs, statement->argtypes,
							  statement->custom ? CURSOR_OPT_CUSTOM_PLAN : CURSOR_OPT_GENERIC_PLAN);
	if (plan == NULL)
		elog(ERROR, "could not prepare \"%s\": %s", statement->sql,
			 SPI_result_code_string(SPI_result));
	SPI_keepplan(plan);
	statement->plan = plan;
}

/*
 * statement_execute
 *		Runs a statement and returns the number of rows it touched or
 *		returned; those are in SPI_tuptable. Unless it is read-only, it sees
 *		what the call has done so far and, at READ COMMITTED, what others have
 *		committed.
 */
uint64
statement_execute(Statement *statement, Parameters *parameters)
{
	int			result;
	int			level = 0;

	Assert(parameters->n == statement->nargs);

	make_plan(statement);
	if (statement->by_index)
	{
		level = NewGUCNestLevel();
		(void) set_config_option("enable_seqscan", "off", PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	}
	result = SPI_execute_plan(statement->plan, parameters->value, parameters->null,
							  statement->read_only, 0);
	if (statement->by_index)
		AtEOXact_GUC(true, level);
	if (result < 0)
		elog(ERROR, "could not execute \"%s\": %s", statement->sql,
			 SPI_result_code_string(result));
	return SPI_processed;
}

/*
 * statement_execute_now
 *		Runs a query that sees what is committed now, and what the call has
 *		done so far, at every isolation level.
 */
uint64
statement_execute_now(Statement *statement, Parameters *parameters)
{
	int			result;

	make_plan(statement);
	result = SPI_execute_snapshot(statement->plan, parameters->value, parameters->null,
								  GetLatestSnapshot(), InvalidSnapshot, false, false, 0);
	if (result < 0)
		elog(ERROR, "could not execute \"%s\": %s", statement->sql,
			 SPI_result_code_string(result));
	return SPI_processed;
}

/* Returns a column, counted from 1, of a row, counted from 0, of the last result. */
Datum
statement_value(uint64 row, int column, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, column, isnull);
}

/*
 * statement_row
 *		Takes a row apart that is a column of a result, and has at least so many
 *		columns; returns their values and which are null.
 */
Datum *
statement_row(Datum column, int least, bool **null)
{
	HeapTupleHeader header = DatumGetHeapTupleHeader(column);
	HeapTupleData row = {.t_len = HeapTupleHeaderGetDatumLength(header), .t_data = header};
	TupleDesc	tupdesc = lookup_rowtype_tupdesc(HeapTupleHeaderGetTypeId(header),
												 HeapTupleHeaderGetTypMod(header));
	Datum	   *value = palloc(sizeof(Datum) * tupdesc->natts);

	Assert(tupdesc->natts >= least);
	(void) least;
	*null = palloc(sizeof(bool) * tupdesc->natts);
	heap_deform_tuple(&row, tupdesc, value, *null);
	ReleaseTupleDesc(tupdesc);
	return value;
}
