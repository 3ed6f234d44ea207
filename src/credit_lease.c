/*
 * credit_lease.c
 *		The module: magic block and initialization.
 *
 * How the sources hang together, from the caller down:
 *
 *	money_in.c, consume.c, reservation.c, settle.c, carve.c, chunk_consume.c, check.c, lease.c,
 *	mirror.c, ingest.c, reclaim.c, balance.c, admin.c
 *				the SQL functions; reclaim.c also what calls give back themselves
 *	session_deposit.c, session_charge.c, session_snapshot.c
 *				the SQL functions of sessions
 *	supply.c	the wait of a call for its upstream, and lease_prewarm()
 *	policy.c	the settings of a pool, and whether pools may have an upstream
 *	meter.c, rule.c
 *				what features cost, and the user's own functions that decide about them
 *	ingest_batch.c, ingest_price.c, ingest_key.c, ingest_write.c, ingest_single.c, rows.c
 *				usage in bulk: what it costs, its keys, and its entries; what cannot be done so,
 *				by itself; arrays of rows
 *	argument.c	checks of what the caller passed, before anything is locked
 *	request.c	the idempotency key and what it stands for
 *	account.c, stripe.c, held.c
 *				the lock of an account, and of its stripes, and which of them the transaction has
 *	pool.c		the tranches of one pool: reading, deciding, moving amounts
 *	gather.c, restripe.c
 *				what a call brings to its stripe from others, and how tranches come into stripes
 *	hold.c		the rows of reservations
 *	chunk.c		the rows of chunks, and of sessions
 *	session.c	what the functions of sessions have in common
 *	ledger.c	writing what was moved, to the ledger and to the tranches
 *	statement.c	kept SPI plans
 *	worker.c, launcher.c, worker_state.c
 *				the background worker of each database, who starts it, and what it tells
 *	leasing.c, poll.c, report.c
 *				what the worker asks of upstreams, for leases and for balances, and makes of the
 *				answers, and what it reports
 *	exchange.c, http.c, upstream.c, upstream_state.c
 *				a request and its reply; HTTP; what a server is; how it is getting on
 *	demand.c, shared_memory.c, guard.c
 *				what sessions and their worker tell each other, and where; subtransactions
 *	amount.c, clock.c
 *				exact amounts, and the time
 *
 * Locks: a call locks the row of its account, in credit_lease.account, or
 * stripes of it, in an order that account.c has; who spends of a chunk or a
 * session locks that in place of the account, and who ends one locks it after
 * the account (chunk.c). Whoever sweeps several accounts (reclaim.c) never waits.
 */
#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"

#include "clock.h"
#include "compat.h"
#include "demand.h"
#include "launcher.h"
#include "session.h"
#include "supply.h"
#include "upstream_state.h"
#include "worker.h"
#include "worker_state.h"

PG_MODULE_MAGIC;

void		_PG_init(void);

void
_PG_init(void)
{
	clock_define_settings();
	worker_define_settings();
	worker_state_define_settings();
	supply_define_settings();
	session_define_settings();
	MarkGUCPrefixReserved("credit_lease");

	if (process_shared_preload_libraries_in_progress && !IsBinaryUpgrade)
	{
		worker_state_request();
		upstream_state_request();
		demand_request();
		launcher_register();
	}
}
