# The background worker: it sweeps, it is there when it is wanted, it is in
# nobody's way, and what breaks is shown and does not break it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use LeaseTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = lease_cluster(
	'worker',
	allows_streaming => 1,
	conf => "shared_preload_libraries = 'credit_lease'\n"
	  . "credit_lease.databases = 'postgres, \"Other one\"'\n"
	  . "credit_lease.sweep_interval = 100ms\n"
	  . "restart_after_crash = on\n");

# Waits until a query returns t.
sub wait_until
{
	my ($query, $name, %params) = @_;
	my $of = $params{node} // $node;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok($of->poll_query_until($params{dbname} // 'postgres', $query), $name);
}

# Holds for as long as no time at all, which only a sweep gives back.
my $n = 0;
sub abandon
{
	my ($dbname, $of) = @_;
	my $account = 'abandons:' . ++$n;

	($of // $node)->safe_psql($dbname // 'postgres', qq{
		SELECT credit_lease.lease_topup('$account', 'tokens', 10);
		SELECT credit_lease.lease_reserve('$account', 'tokens', 4, '1 ms');});
	return "SELECT status = 'expired' FROM credit_lease.reservation WHERE account = '$account'";
}

my $running = 'SELECT running FROM credit_lease.worker_status';

# ---------------------------------------------------------------------------
# It sweeps, and tells of it.

wait_until($running, 'a worker runs');
wait_until(abandon(), 'an expired hold is given back');
is($node->safe_psql('postgres', "SELECT state, holds, lag, set_aside, last_error FROM credit_lease.worker_status"),
	'running|1|00:00:00|0|', 'the view tells of it');
is($node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'credit_lease worker'"),
	1, 'a database that is not there has none');

# who ends the launcher ends the worker, and not more than one comes back
my $first = $node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE backend_type = 'credit_lease worker'");
$node->safe_psql('postgres', "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'credit_lease launcher'");
wait_until("SELECT count(*) = 1 AND min(pid) <> $first FROM pg_stat_activity WHERE backend_type = 'credit_lease worker'",
	'a launcher that was ended starts another worker');
wait_until(abandon(), 'which sweeps');

# ---------------------------------------------------------------------------
# It comes with the extension and with the database.

$node->safe_psql('postgres', 'DROP EXTENSION credit_lease');
$node->safe_psql('postgres', 'CREATE EXTENSION credit_lease');
wait_until(abandon(), 'it goes on after DROP EXTENSION and CREATE EXTENSION');

$node->safe_psql('postgres', 'CREATE DATABASE "Other one"');
$node->safe_psql('Other one', 'CREATE EXTENSION credit_lease');
wait_until(abandon('Other one'), 'a database that is created later gets one', dbname => 'Other one');

# ---------------------------------------------------------------------------
# It keeps nobody from dropping a database, its own included.

$node->safe_psql('postgres', 'CREATE DATABASE third');
$node->safe_psql('postgres', 'DROP DATABASE third');
pass('another database is dropped');
$node->safe_psql('postgres', 'ALTER DATABASE "Other one" RENAME TO renamed');
is($node->safe_psql('renamed', 'SELECT state FROM credit_lease.worker_status'),
	'no worker: the database is not in credit_lease.databases', 'its database is renamed, and has no worker then');
$node->safe_psql('postgres', 'ALTER DATABASE renamed RENAME TO "Other one"');
wait_until($running, 'it comes back with the name', dbname => 'Other one');
$node->safe_psql('postgres', 'CREATE ROLE nobody');
my ($status, undef, $error) = $node->psql('postgres', 'SET ROLE nobody; DROP DATABASE "Other one"');
like($error, qr/must be owner/, 'who may not drop it does not');
is($node->safe_psql('Other one', $running), 't', 'nor ends its worker');
$node->safe_psql('postgres', 'DROP DATABASE "Other one"');
pass('its own database is dropped');

# ---------------------------------------------------------------------------
# Settings are read again.

$node->safe_psql('postgres', 'CREATE DATABASE late');
$node->safe_psql('late', 'CREATE EXTENSION credit_lease');
is($node->safe_psql('late', 'SELECT running, state FROM credit_lease.worker_status'),
	'f|no worker: the database is not in credit_lease.databases', 'a database that is not listed says so');
$node->append_conf('postgresql.conf', "credit_lease.databases = 'late'");
$node->reload;
wait_until(abandon('late'), 'a database that is listed gets a worker', dbname => 'late');
wait_until('SELECT NOT running FROM credit_lease.worker_status', 'and one that is listed no more loses it');
$node->append_conf('postgresql.conf', "credit_lease.databases = 'postgres'");
$node->reload;
wait_until($running, 'it comes back');
my $pid = $node->safe_psql('postgres', 'SELECT pid FROM credit_lease.worker_status');
$node->safe_psql('postgres', q{
	CREATE ROLE sweeper LOGIN;
	GRANT USAGE ON SCHEMA credit_lease TO sweeper;
	GRANT EXECUTE ON FUNCTION credit_lease.lease_reclaim(integer) TO sweeper;});
$node->append_conf('postgresql.conf', 'credit_lease.role = sweeper');
$node->reload;
wait_until(q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'credit_lease worker' AND usename = 'sweeper'},
	'it runs as another role');
wait_until(abandon(), 'which needs no more than to call lease_reclaim()');

# ---------------------------------------------------------------------------
# What fails is shown.

$node->safe_psql('postgres', 'REVOKE EXECUTE ON FUNCTION credit_lease.lease_reclaim(integer) FROM sweeper');
my $abandoned = abandon();
wait_until(q{SELECT last_error = 'permission denied for function lease_reclaim' AND lag > '0'
	FROM credit_lease.worker_status}, 'an error is shown, and that holds wait');
$node->safe_psql('postgres', 'GRANT EXECUTE ON FUNCTION credit_lease.lease_reclaim(integer) TO sweeper');
wait_until($abandoned, 'it goes on when the cause is gone');

$node->safe_psql('postgres', q{
	BEGIN;
	SELECT credit_lease.lease_topup('broken', 'tokens', 10);
	SELECT credit_lease.lease_reserve('broken', 'tokens', 4, '1 ms');
	UPDATE credit_lease.tranche SET remaining = remaining - 1 WHERE account = 'broken';
	COMMIT;});
wait_until(abandon(), 'a pool whose books do not balance does not keep it from others');
wait_until('SELECT set_aside = 1 FROM credit_lease.worker_status', 'and is set aside');
is($node->safe_psql('postgres', 'SELECT account, credit FROM credit_lease.set_aside'), 'broken|tokens', 'by name');
my @warnings = slurp_file($node->logfile) =~ /was not swept/g;
is(scalar @warnings, 1, 'with one line in the log');
$node->safe_psql('postgres', q{
	UPDATE credit_lease.tranche SET remaining = remaining + 1 WHERE account = 'broken';
	UPDATE credit_lease.set_aside SET failed_at = failed_at - interval '1 minute';});
wait_until(q{SELECT set_aside = 0 FROM credit_lease.worker_status}, 'after a minute it is tried again');

# ---------------------------------------------------------------------------
# A backlog is cleared while traffic goes on.

$node->safe_psql('postgres', q{
	DO $$
	BEGIN
		FOR i IN 1 .. 200 LOOP
			PERFORM credit_lease.lease_topup('backlog:' || i, 'tokens', 1000000);
			FOR j IN 1 .. 20 LOOP
				PERFORM credit_lease.lease_reserve('backlog:' || i, 'tokens', 1, '1 ms');
			END LOOP;
		END LOOP;
	END $$;});
my $traffic = start_pgbench($node, '-c 4 -t 500',
	{ 'consume' => q{
		\set i random(1, 200)
		SELECT lease_consume('backlog:' || :i, 'tokens', 1);} });
wait_until(q{SELECT count(*) = 0 FROM credit_lease.reservation WHERE status = 'held'}, 'a backlog is cleared');
my ($traffic_status) = finish_pgbench($traffic);
is($traffic_status, 0, 'while traffic goes on');
is($node->safe_psql('postgres', q{SELECT sum(consumed) FROM credit_lease.balance WHERE account LIKE 'backlog:%'}),
	2000, 'which gets all that it asks for');
books_balance($node, 'after the backlog');

# ---------------------------------------------------------------------------
# It survives its own end, and the server's.

$pid = $node->safe_psql('postgres', 'SELECT pid FROM credit_lease.worker_status');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
wait_until("SELECT pid <> $pid FROM credit_lease.worker_status", 'a worker that was terminated is started again');
wait_until(abandon(), 'and sweeps');
$pid = $node->safe_psql('postgres', 'SELECT pid FROM credit_lease.worker_status');
kill 'KILL', $pid;
wait_until("SELECT pid <> $pid FROM credit_lease.worker_status", 'so is one that was killed, with all the others');
wait_until(abandon(), 'and sweeps');

# ---------------------------------------------------------------------------
# On a standby it waits for the promotion.

$node->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->start;
$node->wait_for_catchup($standby, 'replay', $node->lsn('insert'));
is($standby->safe_psql('postgres', $running), 'f', 'a standby has no worker');
$standby->promote;
wait_until($running, 'a promoted one has', node => $standby);
wait_until(abandon('postgres', $standby), 'which sweeps', node => $standby);
books_balance($standby, 'the standby');
books_balance($node, 'the primary');
$standby->stop;
$node->stop;

# ---------------------------------------------------------------------------
# Without the library preloaded, everything but the worker is there.

$node->adjust_conf('postgresql.conf', 'shared_preload_libraries', "''");
$node->start;
is($node->safe_psql('postgres', 'SELECT running, state FROM credit_lease.worker_status'),
	'f|no worker: credit_lease is not in shared_preload_libraries', 'without the library preloaded, the view says so');
is($node->safe_psql('postgres', "SELECT applied FROM credit_lease.lease_consume('backlog:1', 'tokens', 1)"),
	't', 'and the functions work');
$node->stop;

done_testing();
