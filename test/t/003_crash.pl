# Crashes in the middle of everything: what a client was told is committed is
# there, once, and the books balance.

use strict;
use warnings;

use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use LeaseTest;

my $nclients = 3;
my $acknowledged_per_round = 40;	# of each client, before the crash

# PostgreSQL::Test::Cluster turns restart_after_crash off.
my $node = lease_cluster('main', conf => q{
	restart_after_crash = on
	max_connections = 40
	checkpoint_timeout = 30s
	autovacuum_naptime = 1s
});
$node->safe_psql('postgres', q{SELECT credit_lease.lease_topup('crash', 'tokens', 1000000)});

# Returns requests of one client in one round: each is a statement or a
# transaction, and the keys that it uses. A statement returns its key, the
# number of what it made, and whether that was a replay.
sub requests
{
	my ($round, $client) = @_;
	my @requests;

	for my $n (1 .. 2000)
	{
		my $key = "$round.$client.$n";
		my $pool = "'crash', 'tokens'";
		my $topup = "SELECT '$key.t', entry_id, replayed FROM lease_topup($pool, 0.25, '$key.t');";
		my $consume = "SELECT '$key.c', entry_id, replayed FROM lease_consume($pool, 0.5, '$key.c');";
		my $reserve = "SELECT '$key.r', reservation_id, replayed"
		  . " FROM lease_reserve($pool, 0.125, '1 year', '$key.r');";
		my $adjust = "SELECT '$key.a', entry_id, replayed FROM lease_adjust($pool, -0.0625, 'crash', '$key.a');";

		push @requests,
			$n % 10 == 1 ? $topup
		  : $n % 3 == 0 ? "BEGIN; $consume $reserve $adjust COMMIT;"
		  :				  $consume;
	}
	return @requests;
}

# Starts psql on requests. Whatever stands before a line of = in its output was
# acknowledged: it stops at the first error, and a lost connection is one.
my $nfiles = 0;
sub start_client
{
	my (@requests) = @_;
	my $self = { out => '', err => '' };
	my $file = $node->basedir . '/requests-' . ++$nfiles;

	append_to_file($file, join '', "SET search_path = credit_lease;\n", map { "$_\n\\echo =\n" } @requests);
	$self->{timeout} = IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default);
	$self->{run} = IPC::Run::start(
		[
			$node->installed_command('psql'), '-XAtq',
			'-v', 'ON_ERROR_STOP=1',
			'-d', $node->connstr('postgres'),
			'-f', $file
		],
		'>', \$self->{out},
		'2>', \$self->{err},
		$self->{timeout});
	return $self;
}

# Returns [key, number, replayed] of what was acknowledged.
sub acknowledged
{
	my ($client) = @_;

	return if $client->{out} !~ /^(.*)^=\n/ms;
	return map { [ split /\|/ ] } grep { $_ ne '=' } split /\n/, $1;
}

my $any_calls = any_calls($node);
my %first;		# the number that a key's effect has, by key
my @all;		# all requests that may have been made

for my $round (1 .. 6)
{
	my @requests = map { [ requests($round, $_) ] } 1 .. $nclients;
	my @clients = map { start_client(@$_) } @requests;
	my $pgbench = start_pgbench($node, '-c 4 -j 2 -T 3600 -M prepared --max-tries=10', $any_calls);

	for my $client (@clients)
	{
		$client->{run}->pump until ($client->{out} =~ tr/=//) >= $acknowledged_per_round;
	}

	# the crash: one backend of those that are at work, or the server
	my $how = $round % 3 == 0 ? 'an immediate shutdown' : 'a killed backend';
	my $offset = -s $node->logfile;
	if ($round % 3 == 0)
	{
		$node->stop('immediate');
		$node->start;
	}
	else
	{
		my $of = $round % 3 == 1 ? 'psql' : 'pgbench';
		my @pids = split /\n/, $node->safe_psql('postgres', qq{
			SELECT pid FROM pg_stat_activity
			 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND query LIKE '%lease_%'
			 ORDER BY application_name = '$of' DESC, state = 'active' DESC, random()});

		is(kill('KILL', $pids[0]), 1, "round $round: a backend is killed");
		$node->wait_for_log(qr/database system is ready to accept connections/, $offset);
	}
	ok($node->poll_query_until('postgres', 'SELECT NOT pg_is_in_recovery()'),
		"round $round: the server is back after $how");

	for my $i (0 .. $#clients)
	{
		my $client = $clients[$i];

		$client->{run}->finish;
		my @made = acknowledged($client);
		my $n = $client->{out} =~ tr/=//;

		cmp_ok($n, '>=', $acknowledged_per_round, "round $round: $n requests of a client were acknowledged");
		is(join("\n", grep { /ERROR/ } split /\n/, $client->{err}), '', "round $round: and none was refused");
		$first{ $_->[0] } = $_->[1] for @made;
		push @all, splice @{ $requests[$i] }, 0, $n + 5;	# and some that it may not have come to
	}
	my (undef, undef, $err) = finish_pgbench($pgbench);
	is(join("\n", grep { /ERROR/ } split /\n/, $err), '', "round $round: pgbench lost its connections and no more");

	books_balance($node, "round $round: after $how");
	my %there = map { split /\|/ } split /\n/, $node->safe_psql('postgres', q{
		SELECT idempotency_key, CASE kind WHEN 'reserve' THEN reservation_id ELSE entry_id END
		  FROM credit_lease.ledger WHERE account = 'crash' AND idempotency_key IS NOT NULL});
	my @lost = grep { ($there{$_} // 'nothing') ne $first{$_} } sort keys %first;
	is(scalar @lost, 0, "round $round: all " . keys(%first) . ' acknowledged keys have had their effect')
	  or diag("not these: @lost");

	# a transaction is there as a whole or not at all
	my @torn = grep { /(.*)\.r$/ && !(exists $there{"$1.c"} && exists $there{"$1.a"}) } sort keys %there;
	is("@torn", '', "round $round: no transaction is there in part");
}

# ---------------------------------------------------------------------------
# All of it again: whatever had its effect is a replay, the rest has it now.

my $again = start_client(@all);
$again->{run}->finish;
is($again->{err}, '', 'all requests are made again without an error');
my @made = acknowledged($again);
my %key = map { $_->[0] => 1 } @made;
cmp_ok(scalar @made, '>', 6 * $nclients * $acknowledged_per_round, scalar @made . ' keys were used again');
is(scalar keys %key, scalar @made, 'each once');
is(scalar(grep { exists $first{ $_->[0] } && $_->[2] ne 't' } @made), 0, 'what was acknowledged is not done again');
is(scalar(grep { ($first{ $_->[0] } // $_->[1]) ne $_->[1] } @made), 0, '... and has the same numbers');
is($node->safe_psql('postgres', q{
	SELECT count(*) FROM credit_lease.ledger WHERE account = 'crash' AND idempotency_key IS NOT NULL}),
	scalar @made, 'each key has one effect');

my %n;
$n{ substr($_->[0], -1) }++ for @made;
my ($granted, $consumed, $reserved, $revoked) = (1000000 + $n{t} * 0.25, $n{c} * 0.5, $n{r} * 0.125, $n{a} * 0.0625);
is($node->safe_psql('postgres', q{
	SELECT trim_scale(granted), trim_scale(consumed), trim_scale(reserved), trim_scale(available)
	  FROM credit_lease.lease_balance('crash')}),
	join('|', $granted, $consumed, $reserved, $granted - $consumed - $reserved - $revoked),
	'the balance is their sum');
books_balance($node, 'after it all');

SKIP:
{
	skip 'amcheck is not installed', 1
	  if $node->safe_psql('postgres', q{SELECT count(*) FROM pg_available_extensions WHERE name = 'amcheck'}) eq '0';

	$node->safe_psql('postgres', 'CREATE EXTENSION IF NOT EXISTS amcheck');
	$node->command_ok([ 'pg_amcheck', '--heapallindexed', '--parent-check', '-d', 'postgres' ],
		'pg_amcheck finds nothing');
}
$node->stop;
done_testing();
