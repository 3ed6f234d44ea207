# Many at once: nothing is overspent, counted twice or lost, and nobody sees
# an error that the contract does not have.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use LeaseTest;

my $clients = 200;
my $node = lease_cluster('main', conf => qq{
	max_connections = @{[ $clients + 20 ]}
	max_prepared_transactions = 10
	autovacuum_naptime = 1s
});

# ---------------------------------------------------------------------------
# Clients do everything to a few pools.

my $any_calls = any_calls($node);
for my $round (
	# a transaction with several calls may have to be retried, where refunds come back to emptied tranches
	[ 'READ COMMITTED', '-c 8 -j 2 -t 300 -M prepared --max-tries=20', '' ],
	[ 'READ COMMITTED, simple protocol', '-c 12 -j 2 -t 100 -M simple --max-tries=20', '' ],
	[ 'REPEATABLE READ', '-c 6 -j 2 -t 100 -M extended', '-c default_transaction_isolation=repeatable\ read' ],
	[ 'SERIALIZABLE', '-c 6 -j 2 -t 100 -M prepared', '-c default_transaction_isolation=serializable' ])
{
	my ($name, $options, $pgoptions) = @$round;
	my ($status, $out, $err) = pgbench($node, "$options --failures-detailed", $any_calls, $pgoptions);

	is($status, 0, "$name: pgbench ends well");
	is(join("\n", grep { !/^pgbench: hint|^$/ } split /\n/, $err), '', "$name: without an unexpected error");
	is(($out =~ /^number of deadlock failures: (\d+)/m)[0], '0', "$name: without a deadlock that is not retried");
	is(($out =~ /^number of serialization failures: (\d+)/m)[0], '0', "$name: without a serialization failure")
	  if $name =~ /COMMITTED/;
	books_balance($node, $name);
}
is($node->safe_psql('postgres', q{
	SELECT count(*) FROM (SELECT FROM credit_lease.ledger WHERE idempotency_key IS NOT NULL
		GROUP BY account, idempotency_key HAVING count(*) > 1) k}), '0', 'a key has one effect');
is($node->safe_psql('postgres', q{
	SET search_path = credit_lease;
	SET credit_lease.mock_now = '2100-01-01 00:00+00';
	SELECT lease_reclaim() > 0;
	SELECT count(*) FROM reservation WHERE status = 'held';
	SELECT count(*) FROM tranche WHERE expires_at IS NOT NULL AND (remaining <> 0 OR reserved <> 0)}),
	"t\n0\n0", 'a sweep leaves nothing that has expired');
books_balance($node, 'after a sweep');

# ---------------------------------------------------------------------------
# 200 clients at once, and room for exactly 100 of them.

my $half = $clients / 2;
my $try = "SELECT lease_try_consume(:account, 'tokens', 1);\n";
my $raise = "SELECT lease_consume(:account, 'tokens', 1);\n";
my $keyed = "\\set k :client_id % $half\nSELECT lease_try_consume(:account, 'tokens', 1, 'key ' || :k);\n";
my $hold = "SELECT lease_try_reserve(:account, 'tokens', 1, '1 day');\n";
my $consumed = q{
	SELECT count(*) FILTER (WHERE first_entry_id IS NULL), sum(amount)::int
	  FROM credit_lease.ledger WHERE account = :account AND kind = 'consume'};
my $held = q{
	SELECT count(*), sum(amount)::int
	  FROM credit_lease.reservation WHERE account = :account AND status = 'held'};

for my $round (
	# how the pool is filled, what each client does, what is to be 100
	[ 'one tranche', q{lease_topup(:account, 'tokens', 100)}, $try, $consumed ],
	[ 'one tranche and a rest', q{lease_topup(:account, 'tokens', 100.999999999999)}, $try, $consumed ],
	[
		'ten tranches',
		q{lease_topup(:account, 'tokens', 10, priority => i) FROM generate_series(1, 10) i},
		$try, $consumed
	],
	[
		'tranches of fractions',
		q{lease_topup(:account, 'tokens', 14.3, expires_at => now() + i * interval '1 day') FROM generate_series(1, 7) i},
		$try, $consumed
	],
	[
		'expired holds',
		q{lease_topup(:account, 'tokens', 50) FROM generate_series(1, 2);
		SELECT lease_reserve(:account, 'tokens', 2.5, '1 us') FROM generate_series(1, 40)},
		$try, $consumed
	],
	[ 'the call that raises', q{lease_topup(:account, 'tokens', 100)}, $raise, $consumed ],
	[
		'the call that raises, ten tranches',
		q{lease_topup(:account, 'tokens', 10) FROM generate_series(1, 10)},
		$raise, $consumed
	],
	[ 'holds', q{lease_topup(:account, 'tokens', 100)}, $hold, $held ],
	[ 'each key twice', q{lease_topup(:account, 'tokens', 150)}, $keyed, $consumed ],
	[
		'each key twice, ten tranches',
		q{lease_topup(:account, 'tokens', 20) FROM generate_series(1, 10)},
		$keyed, $consumed
	])
{
	my ($name, $fill, $script, $effect) = @$round;
	my $raises = $script eq $raise;

	s/:account/quoted("room: $name")/ge for $fill, $script, $effect;
	$node->safe_psql('postgres', "SET search_path = credit_lease; SELECT $fill");
	my ($status, $out, $err) = pgbench($node, "-c $clients -j 2 -t 1", { room => $script });
	my @errors = grep {
		!/: ERROR:  not enough credit |^DETAIL:  Available: 0(\.0+)?, held: |^HINT: |^pgbench: |^\s*$/
	} split /\n/, $err;

	is($node->safe_psql('postgres', $effect), '100|100', "200 clients, $name: exactly 100 have an effect");
	is(join("\n", @errors), '', "200 clients, $name: no unexpected error");
	if ($raises)
	{
		my $refused = () = $err =~ /not enough credit/g;

		is($status, 2, "200 clients, $name: pgbench tells of refusals");
		is($refused, 100, "200 clients, $name: exactly 100 are refused");
	}
	else
	{
		is($status, 0, "200 clients, $name: pgbench ends well");
	}
}
books_balance($node, '200 clients');

# ---------------------------------------------------------------------------
# A call that has waited sees what came in meanwhile.

my $one = LeaseTest::Session->new($node);
my $two = LeaseTest::Session->new($node);

# Waits until a session waits for a lock of another.
sub wait_for_lock
{
	my ($query) = @_;

	ok($node->poll_query_until('postgres', qq{
		SELECT count(*) = 1 FROM pg_stat_activity
		 WHERE wait_event_type = 'Lock' AND query LIKE '%$query%' AND pid <> pg_backend_pid()}),
		"another session waits: $query");
	return;
}

for my $round (
	# what comes in, what waits, its answer, and what it spent of which priority
	[ 'credit that burns first', q{lease_topup('w', 'tokens', 5, priority => 1)}, 4, 't|4|11', '1|4' ],
	[ 'credit that was short', q{lease_topup('w', 'tokens', 5, priority => 200)}, 12, 't|12|3', '100|10 200|2' ],
	[
		'all that there is now',
		q{lease_consume('w', 'tokens', 10), lease_topup('w', 'tokens', 5, priority => 200)},
		4, 't|4|1', '200|4'
	],
	[
		'a refund',
		q{lease_refund('w', (SELECT max(entry_id) FROM ledger WHERE account = 'w' AND kind = 'consume'))},
		12, 't|12|8', '50|10 100|2'
	])
{
	my ($name, $call, $amount, $answer, $spent) = @$round;
	my $account = quoted("waits for $name");

	$call =~ s/'w'/$account/g;
	$one->run_safe("SELECT lease_topup($account, 'tokens', 10, priority => 50);"
		. "SELECT lease_consume($account, 'tokens', 10), lease_topup($account, 'tokens', 10);");
	$one->run_safe("BEGIN; SELECT $call;");
	$two->begin("SELECT applied, amount, available FROM lease_try_consume($account, 'tokens', $amount, 'waits');");
	wait_for_lock('lease_try_consume');
	$one->run_safe('COMMIT;');
	is(scalar $two->finish, $answer, "$name comes in: the answer");
	is($two->run_safe(qq{
		SELECT string_agg(t.priority || '|' || l.amount, ' ' ORDER BY t.priority)
		  FROM ledger l JOIN tranche t USING (account, tranche_id)
		 WHERE l.account = $account AND l.available = split_part('$answer', '|', 3)::numeric AND l.kind = 'consume';}),
		$spent, "$name comes in: what was spent");
}
books_balance($node, 'after waiting');

# ---------------------------------------------------------------------------
# A transaction may end in PREPARE.

my $everything = q{
	SELECT lease_consume(:account, 'tokens', 10, 'spend');
	SELECT lease_topup(:account, 'tokens', 5, 'top');
	SELECT lease_settle(:account, (lease_reserve(:account, 'tokens', 20)).reservation_id, 7);
	SELECT lease_cancel(:account, (lease_reserve(:account, 'tokens', 20)).reservation_id);
	SELECT lease_refund(:account, (lease_consume(:account, 'tokens', 20)).entry_id);
	SELECT lease_reserve(:account, 'tokens', 3, '1 day', 'hold');
	SELECT lease_adjust(:account, 'tokens', -1, 'so');
};
my $balance = "SELECT available, reserved, consumed FROM lease_balance(:account, 'tokens');";
my $spend = "SELECT replayed FROM lease_consume(:account, 'tokens', 10, 'spend');";

for my $end ('ROLLBACK', 'COMMIT')
{
	my $of = sub { return $_[0] =~ s/:account/'prepared $end'/gr };

	$one->run_safe($of->("SELECT lease_topup(:account, 'tokens', 100); BEGIN;"));
	$one->run_safe($of->($everything));
	$one->run_safe("PREPARE TRANSACTION 'lease';");
	is($two->run_safe($of->($balance)), '100|0|0', "prepared: nothing is visible before $end PREPARED");

	# the other session waits for the pool, and then finds the key used or free
	$two->begin($of->($spend));
	wait_for_lock('lease_consume');

	# a prepared transaction outlives the server
	if ($end eq 'COMMIT')
	{
		$node->stop('immediate');
		$node->start;
		eval { $_->quit } for $one, $two;
		$one = LeaseTest::Session->new($node);
		$two = LeaseTest::Session->new($node);
		$two->begin($of->($spend));
		wait_for_lock('lease_consume');
	}
	$one->run_safe("$end PREPARED 'lease';");
	is(scalar $two->finish, $end eq 'COMMIT' ? 't' : 'f', "prepared: $end PREPARED decides whether the key was used");
	is($two->run_safe($of->($balance)),
		$end eq 'COMMIT' ? '84|3|17' : '90|0|10',
		"prepared: the balance after $end PREPARED");
	books_balance($node, "prepared: $end");
}
$_->quit for $one, $two;
$node->stop;
done_testing();
