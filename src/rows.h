#ifndef CREDIT_LEASE_ROWS_H
#define CREDIT_LEASE_ROWS_H

#include "access/tupdesc.h"
#include "utils/array.h"

/* Rows that a statement gets as one parameter */
typedef struct Rows
{
	TupleDesc	tupdesc;
	Datum	   *row;
	int			n;
} Rows;

extern void rows_begin(Rows *rows, const Oid *types, int ncolumns, int size);
extern void rows_add(Rows *rows, Datum *values, bool *nulls);
extern ArrayType *rows_end(const Rows *rows);

#endif							/* CREDIT_LEASE_ROWS_H */
