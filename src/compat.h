/*
 * compat.h
 *		Differences between PostgreSQL 15 and later, so that the rest of the
 *		code is written for the newest.
 *
 * Every test of PG_VERSION_NUM stands here.
 */
#ifndef CREDIT_LEASE_COMPAT_H
#define CREDIT_LEASE_COMPAT_H

#include "storage/latch.h"
#include "utils/acl.h"
#include "utils/datetime.h"
#include "utils/guc.h"
#include "utils/wait_event.h"

#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#else
#define guc_malloc(elevel, size) malloc(size)

#define object_ownercheck(classid, objectid, roleid) pg_database_ownercheck(objectid, roleid)
#define object_aclcheck(classid, objectid, roleid, mode) \
	((classid) == ForeignServerRelationId ? pg_foreign_server_aclcheck(objectid, roleid, mode) : \
	 pg_proc_aclcheck(objectid, roleid, mode))

#define stringToQualifiedNameList(string, escontext) \
	((void) (escontext), stringToQualifiedNameList(string))

typedef struct DateTimeErrorExtra
{
	const char *dummy;
} DateTimeErrorExtra;

#define DecodeDateTime(field, ftype, nf, dtype, tm, fsec, tzp, extra) \
	((void) (extra), DecodeDateTime(field, ftype, nf, dtype, tm, fsec, tzp))
#endif

#if PG_VERSION_NUM >= 170000
#define MyProcLxid (MyProc->vxid.lxid)
#else
#define MyProcLxid (MyProc->lxid)
#endif

#if PG_VERSION_NUM < 180000
#define pg_noreturn pg_attribute_noreturn()
#endif

#if PG_VERSION_NUM < 170000
#define WaitEventExtensionNew(name) ((void) (name), PG_WAIT_EXTENSION)

#define CreateWaitEventSet(resowner, nevents) \
	((void) (resowner), CreateWaitEventSet(TopMemoryContext, nevents))
#endif

#endif							/* CREDIT_LEASE_COMPAT_H */
