/*
 * errors.h
 *		The SQLSTATEs that callers branch on. Bad arguments are 22023.
 */
#ifndef CREDIT_LEASE_ERRORS_H
#define CREDIT_LEASE_ERRORS_H

#include "utils/elog.h"

#define ERRCODE_LEASE_INSUFFICIENT_CREDIT	MAKE_SQLSTATE('L','C','0','0','1')
#define ERRCODE_LEASE_KEY_REUSED			MAKE_SQLSTATE('L','C','0','0','2')
#define ERRCODE_LEASE_NOT_FOUND				MAKE_SQLSTATE('L','C','0','0','3')
#define ERRCODE_LEASE_EXPIRED				MAKE_SQLSTATE('L','C','0','0','4')
#define ERRCODE_LEASE_ENDED					MAKE_SQLSTATE('L','C','0','0','5')
#define ERRCODE_LEASE_NOT_OWNER				MAKE_SQLSTATE('L','C','0','0','6')
#define ERRCODE_LEASE_FROZEN				MAKE_SQLSTATE('L','C','0','0','7')
#define ERRCODE_LEASE_UNREACHABLE			MAKE_SQLSTATE('L','C','0','0','8')
#define ERRCODE_LEASE_BOOKS					MAKE_SQLSTATE('L','C','0','0','9')

#endif							/* CREDIT_LEASE_ERRORS_H */
