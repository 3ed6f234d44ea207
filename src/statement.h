#ifndef CREDIT_LEASE_STATEMENT_H
#define CREDIT_LEASE_STATEMENT_H

#include "executor/spi.h"
#include "fmgr.h"

#define STATEMENT_MAX_ARGS	19

/*
 * One SQL statement and its kept plan. Declared static where it is used; what
 * is not named starts as zero. read_only is for functions that are STABLE:
 * the statement then sees what the query that called them sees. custom is for
 * statements about many rows, whose best plan depends on how many there are.
 * by_index is for queries of as many keys as their array has, which are to be
 * looked up one by one, also in a table that was small when the plan was made:
 * a scan would compare each row with each key.
 */
typedef struct Statement
{
	const char *sql;
	int			nargs;
	Oid			argtypes[STATEMENT_MAX_ARGS];
	bool		read_only;
	bool		custom;
	bool		by_index;
	SPIPlanPtr	plan;
} Statement;

/* Values for a statement's parameters. */
typedef struct Parameters
{
	int			n;
	Datum		value[STATEMENT_MAX_ARGS];
	char		null[STATEMENT_MAX_ARGS];
} Parameters;

extern void parameter_add(Parameters *parameters, Datum value);
extern void parameter_add_null(Parameters *parameters);
extern void parameter_add_pointer(Parameters *parameters, const void *pointer);
extern void parameter_add_texts(Parameters *parameters, Datum *text, int n);

extern MemoryContext statement_begin(void);
extern Datum statement_end(MemoryContext caller, FunctionCallInfo fcinfo,
						   Datum *values, bool *nulls);
extern uint64 statement_execute(Statement *statement, Parameters *parameters);
extern uint64 statement_execute_now(Statement *statement, Parameters *parameters);
extern Datum *statement_row(Datum column, int least, bool **null);
extern Datum statement_value(uint64 row, int column, bool *isnull);

#endif							/* CREDIT_LEASE_STATEMENT_H */
