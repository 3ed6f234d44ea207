# Crashes, a promotion, and what is dropped, in the middle of what the worker
# asks of an upstream and reports to it: the same is asked again, it has its
# effect once, and nobody waits for a network.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use JSON::PP;
use LeaseTest;
use LeaseUpstream;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

# what no command may take; those that wait for a request take a minute
my $no_wait = 25;

my $node = lease_cluster(
	'primary',
	allows_streaming => 1,
	conf => "shared_preload_libraries = 'credit_lease'\n"
	  . "credit_lease.databases = 'postgres, app'\n"
	  . "credit_lease.sweep_interval = 100ms\n"
	  . "credit_lease.request_timeout = 60s\n"
	  . "credit_lease.acquire_timeout = 60s\n"
	  . "restart_after_crash = on\n");
my $upstream = LeaseUpstream->start(dir => $node->basedir . '/schematic');

# Runs statements; returns what they return.
sub sql
{
	my ($sql, $dbname) = @_;

	return $node->safe_psql($dbname // 'postgres', "SET search_path = credit_lease, public; $sql");
}

# Returns the keys of a company's events, as often as they came.
sub reported
{
	my ($company) = @_;

	return map { $_->{idempotency_key} } map { $upstream->events_of($company, $_) } $upstream->asked('events', $company);
}

# Waits until a company's request of a kind hangs.
sub until_it_hangs
{
	my ($kind, $company) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return until_true(sub { grep { !defined $_->{status} } $upstream->asked($kind, $company) }, "$company: the $kind hangs");
}

sub hang
{
	my ($kind, $company) = @_;

	$upstream->fault(fault => 'hang', match => $kind, company_id => $company, after_effect => JSON::PP::true);
	return;
}

# Runs something and tests that it does not wait for a request.
sub at_once
{
	my ($name, $do) = @_;
	my $begun = time;

	$do->();
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return cmp_ok(time - $begun, '<', $no_wait, $name);
}

# ---------------------------------------------------------------------------
# What brings the worker down.

sub kill_worker
{
	my $pid = sql('SELECT pid FROM worker_status');
	my $offset = -s $node->logfile;

	kill 'KILL', $pid;
	$node->wait_for_log(qr/database system is ready to accept connections/, $offset);
	return;
}

sub stop_immediately
{
	$node->stop('immediate');
	$node->start;
	return;
}

sub kill_postmaster
{
	my @pids = split /\n/, sql('SELECT pid FROM pg_stat_activity');

	$node->kill9;
	until_true(sub { !grep { kill 0, $_ } @pids }, 'everything ends with the postmaster');
	$node->start;
	return;
}

my $standby;

sub promote
{
	$node->wait_for_catchup($standby, 'replay', $node->lsn('insert'));
	$node->stop('immediate');
	$standby->promote;
	$node = $standby;
	return;
}

# Makes accounts, each with a request that is under way, and one whose request
# has not been sent. Returns their names by the kind of request.
sub begin_requests
{
	my ($round) = @_;
	my %of = map { $_ => "$round: $_" } qw(acquire extend release events done intent);

	$upstream->balance($_, 'tokens', 1000) for values %of;
	sql("INSERT INTO policy (account, server) VALUES ('$of{intent}', 'not there');");
	sql("SELECT lease_consume('$of{$_}', 'tokens', 1)") for qw(extend release done);
	sql("SELECT lease_prewarm('$of{events}', '{tokens}')");
	becomes($node, "SELECT NOT EXISTS (SELECT FROM credit_lease.usage_report) AND NOT EXISTS (SELECT FROM credit_lease.whole_tranche t
		JOIN credit_lease.lease_usage u USING (account, credit, tranche_id) WHERE t.consumed <> u.consumed)", "$round: all is reported");

	hang($_, $of{$_}) for qw(acquire extend release events);
	sql("SELECT lease_consume('$of{extend}', 'tokens', 80)");
	sql("SELECT lease_release('$of{release}', 'tokens')");
	sql("SELECT lease_consume('$of{events}', 'tokens', 10)");
	sql("SELECT lease_prewarm('$of{$_}', '{tokens}', '100 ms')") for qw(acquire intent);
	until_it_hangs($_, $of{$_}) for qw(acquire extend release events);
	becomes($node, "SELECT count(*) = 1 FROM credit_lease.upstream_request WHERE account = '$of{intent}'",
		"$of{intent}: is in the table");
	return %of;
}

# Tests that all of it is asked again and done once.
sub finish_requests
{
	my ($round, %of) = @_;
	my ($intent) = sql("SELECT idempotency_key FROM upstream_request WHERE account = '$of{intent}'");

	sql("ALTER SERVER \"not there\" OPTIONS (SET url '${\($upstream->url)}')");
	becomes($node, 'SELECT count(*) = 0 FROM credit_lease.upstream_request', "$round: all requests are answered");
	for my $kind (qw(acquire extend release))
	{
		my %key = map { $_->{idempotency_key} => 1 } $upstream->asked($kind, $of{$kind});

		cmp_ok(scalar $upstream->asked($kind, $of{$kind}), '>=', 2, "$of{$kind}: is asked again");
		is(scalar keys %key, 1, "$of{$kind}: with the same key");
	}
	my @events = reported($of{events});
	cmp_ok(scalar @events, '>=', 2, "$of{events}: are told again");
	is(scalar(grep { $_ ne $events[0] } @events), 0, "$of{events}: with the same key");
	is(join(' ', map { $_->{idempotency_key} } $upstream->asked('acquire', $of{intent})), $intent, "$of{intent}: is asked with its key");
	is(scalar $upstream->asked('acquire', $of{done}), 1, "$of{done}: is not asked again");
	is(scalar reported($of{done}), 1, "$of{done}: nor told");

	is(sql("SELECT granted FROM open_lease WHERE account IN (" . join(', ', map { "'$of{$_}'" } qw(acquire extend events)) . ') ORDER BY account'),
		"100\n100\n200", "$round: each had its effect once");
	books_balance($node, $round);
	$upstream->same_books($round, [ $node, 'postgres' ]);
	sql("ALTER SERVER \"not there\" OPTIONS (SET url 'http://127.0.0.1:1')");
	return;
}

sql($upstream->server('billing') . $upstream->server('not there', url => 'http://127.0.0.1:1')
	. "INSERT INTO policy (server, lease_size) VALUES ('billing', 100);");
$node->backup('base');
$standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->start;

for (
	[ 'a killed worker' => \&kill_worker ],
	[ 'an immediate shutdown' => \&stop_immediately ],
	[ 'a killed postmaster' => \&kill_postmaster ],
	[ 'a promotion' => \&promote ])
{
	my ($round, $crash) = @$_;
	my %of = begin_requests($round);

	$crash->();
	$upstream->clear;
	becomes($node, 'SELECT running FROM credit_lease.worker_status', "$round: a worker is there again");
	finish_requests($round, %of);
}

# ---------------------------------------------------------------------------
# An upstream that is killed has kept what it has answered; what it has not is
# asked again.

$upstream->balance('company', 'tokens', 1000);
is(sql("SELECT available FROM lease_consume('company', 'tokens', 10)"), 90, 'before the upstream is killed');
$upstream->stop('KILL');
is(sql("SELECT applied FROM lease_consume('company', 'tokens', 70)"), 't', 'what is leased can be spent without it');
is(sql("SET credit_lease.acquire_timeout = '200ms'; SELECT applied FROM lease_try_consume('company', 'tokens', 70)"), 'f',
	'and no more');
$upstream->restart;
becomes($node, "SELECT applied FROM credit_lease.lease_try_consume('company', 'tokens', 70)", 'it goes on when it is back');
$upstream->same_books('an upstream that was killed', [ $node, 'postgres' ]);

# ---------------------------------------------------------------------------
# Nothing that is dropped waits for a request that hangs.

# Makes a database with an upstream, of which an acquire hangs.
sub app
{
	my ($company) = @_;

	$upstream->balance($company, 'tokens', 1000);
	$node->safe_psql('postgres', 'CREATE DATABASE app') if sql("SELECT count(*) FROM pg_database WHERE datname = 'app'") == 0;
	sql("CREATE EXTENSION credit_lease; " . $upstream->server('billing')
		. "INSERT INTO policy (server, company_id, lease_size) VALUES ('billing', '$company', 100);", 'app');
	becomes($node, 'SELECT running FROM credit_lease.worker_status', "$company: a worker is there", dbname => 'app');
	return;
}

app('dropped');
hang('acquire', 'dropped');
sql("SELECT lease_prewarm('a', '{tokens}', '100 ms')", 'app');
until_it_hangs('acquire', 'dropped');
at_once('the server is dropped', sub { sql('DROP SERVER billing CASCADE', 'app') });
$upstream->clear;
becomes($node, "SELECT error LIKE '%does not exist' FROM credit_lease.upstream_request", 'its lease is not taken', dbname => 'app');
sql($upstream->server('billing'), 'app');
is(sql("SELECT available FROM lease_consume('a', 'tokens', 10)", 'app'), 90, 'it is when there is such a server again');

# The extension is dropped while a report is under way, and made again: what is
# answered to the old one is nothing to the new one, though its entries have the
# same numbers.
hang('events', 'dropped');
sql("SELECT lease_consume('a', 'tokens', 10)", 'app');
until_it_hangs('events', 'dropped');
my $entry = sql('SELECT max(entry_id) FROM ledger', 'app');
at_once('the extension is dropped', sub { sql('DROP EXTENSION credit_lease CASCADE', 'app') });
app('made again');
is(sql("SELECT setval('entry_id_seq', $entry - 2); SELECT available FROM lease_consume('a', 'tokens', 10)", 'app') =~ s/.*\n//sr,
	90, 'one that is made again leases');
is(sql('SELECT max(entry_id) FROM ledger', 'app'), $entry, 'and has an entry of the same number');
becomes($node, 'SELECT consumed = 10 FROM credit_lease.lease_usage', 'which is to be told', dbname => 'app');
$upstream->clear;
until_true(sub { grep { $_->{company_id} eq 'made again' && $_->{used} == 10 } @{ $upstream->books->{leases} } }, 'and is told');
books_balance($node, 'an extension that was made again', dbname => 'app');

# A database, and one that is nothing to the worker.
hang('acquire', 'its own');
$upstream->balance('its own', 'tokens', 1000);
sql("INSERT INTO policy (account, company_id) VALUES ('b', 'its own'); SELECT lease_prewarm('b', '{tokens}', '100 ms')", 'app');
until_it_hangs('acquire', 'its own');
sql('CREATE DATABASE another');
at_once('another database is dropped', sub { sql('DROP DATABASE another') });
at_once('its own database is dropped', sub { sql('DROP DATABASE app') });

# ---------------------------------------------------------------------------
# Nor does a shutdown.

hang('acquire', 'last');
$upstream->balance('last', 'tokens', 1000);
sql("SELECT lease_prewarm('last', '{tokens}', '100 ms')");
until_it_hangs('acquire', 'last');
at_once('a fast shutdown', sub { $node->stop });

done_testing();
