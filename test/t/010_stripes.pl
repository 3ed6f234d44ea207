# Striped pools under fire: many clients spend to the last unit, while the
# number of stripes is changed, and whatever is evened out. Nothing is overspent,
# nothing is refused that is there, and nobody sees an error that the contract
# does not have.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use LeaseTest;

my $clients = 64;

# PostgreSQL::Test::Cluster turns restart_after_crash off.
my $node = lease_cluster('main', conf => qq{
	shared_preload_libraries = 'credit_lease'
	credit_lease.databases = 'postgres'
	credit_lease.sweep_interval = 100ms
	restart_after_crash = on
	max_connections = @{[ $clients + 20 ]}
	log_line_prefix = '%m [%p] %q%e '
});

# What was asked for, and what the answer was. A row is written in the
# transaction of its call; alone, if that is the only one of it.
$node->safe_psql('postgres', q{
	CREATE TABLE told (account text, credit text, asked numeric, applied boolean, available numeric,
		replayed boolean, alone boolean, began timestamptz, ended timestamptz)});

# Returns SQL that asks and records the answer.
sub ask
{
	my ($account, $credit, $amount, %params) = @_;
	my $alone = $params{alone} ? 'true' : 'false';
	my $key = $params{key} ? ", $params{key}" : '';

	return "INSERT INTO public.told SELECT '$account', '$credit', $amount, r.applied, r.available, r.replayed, $alone,"
	  . " statement_timestamp(), clock_timestamp() FROM lease_try_consume('$account', '$credit', $amount$key) AS r;\n";
}

# Scripts that change the number of stripes of pools, also to 1, and sweep.
sub disturbances
{
	my ($account, @credits) = @_;
	my $n = '\set n random(1, 80)' . "\n";

	return (
		'sweep@1' => "SELECT lease_reclaim();\n",
		map {
			("stripe_$_\@1" => $n . "SELECT lease_stripe('$account', '$_', CASE WHEN :n > 64 THEN 1 ELSE :n END);\n")
		} @credits);
}

# Makes a pool of an amount, in one tranche or more, and stripes it.
sub fill
{
	my ($account, $credit, $amount, %params) = @_;
	my $tranches = $params{tranches} // 1;
	my $part = $amount / $tranches;

	$node->safe_psql('postgres', qq{
		SET search_path = credit_lease;
		SELECT lease_topup('$account', '$credit', $part, priority => i) FROM generate_series(1, $tranches) i;
		SELECT lease_stripe('$account', '$credit', @{[ $params{stripes} // 16 ]});});
	return;
}

# Returns what the log has of errors since an offset, but for expected ones.
sub unexpected_errors
{
	my ($offset, @expected) = @_;
	my $expected = join '|', 'LC001', @expected;

	return join "\n", grep { /\] (\w{5}) (ERROR|FATAL|PANIC): / && $1 !~ /^(?:$expected)$/ }
	  split /\n/, slurp_file($node->logfile, $offset);
}

# Runs scripts until all clients have made so many transactions, and tests that
# they have, without an error.
sub run_clients
{
	my ($name, $transactions, @scripts) = @_;
	my $params = ref $scripts[0] ? shift @scripts : {};
	my $n = $params->{clients} // $clients;
	my %scripts = @scripts;
	my $offset = -s $node->logfile;
	my ($status, $out, $err) =
	  pgbench($node, "-c $n -j 2 -t $transactions -M prepared -D i=0 -D hold=0", \%scripts, $params->{settings});

	is($status, 0, "$name: pgbench ends well");
	is(join("\n", grep { !/^$/ } split /\n/, $err), '', "$name: without an error");
	is(($out =~ /^number of failed transactions: (\d+)/m)[0] // 'none told', '0', "$name: and no transaction fails");
	is(unexpected_errors($offset), '', "$name: nor is there one in the log");
	books_balance($node, $name);
	return;
}

# Tests that as much was spent as clients were told, and that nobody else spent.
sub spent_is_told
{
	my ($name, $account, $credit) = @_;

	is($node->safe_psql('postgres', qq{
		SELECT trim_scale(sum(asked) FILTER (WHERE applied AND NOT replayed)) FROM told
		 WHERE account = '$account' AND credit = '$credit'}),
		$node->safe_psql('postgres', qq{
		SELECT trim_scale(sum(amount)) FROM credit_lease.ledger
		 WHERE account = '$account' AND credit = '$credit' AND kind = 'consume'}),
		"$name: of $credit, what clients were told is what was spent");
	return;
}

# Tests that a pool that was only drawn on is drained: whoever was refused,
# alone in his transaction, asked for more than was left when all was over, and
# was told so; nor did those who asked later get as much in all, unless something
# may have come back. Then it is spent to the last unit.
sub is_drained
{
	my ($name, $account, $credit, $granted, %params) = @_;
	my ($left, $gone) = split /\|/, $node->safe_psql('postgres', qq{
		SELECT trim_scale(available), trim_scale(available + consumed + reserved)
		  FROM credit_lease.lease_balance('$account', '$credit')});
	my ($refused, $wrongly) = split /\|/, $node->safe_psql('postgres', qq{
		SELECT count(*), count(*) FILTER (WHERE asked <= $left OR asked <= available OR available < $left)
		  FROM told WHERE account = '$account' AND credit = '$credit' AND alone AND NOT applied});

	is($gone, $granted, "$name: of $credit, what is spent, held and left is what was granted");
	cmp_ok($refused, '>', 0, "$name: $refused draws of $credit were refused");
	is($wrongly, 0, "$name: ... none that could have been served with the $left that were left");
	is($node->safe_psql('postgres', qq{
		SELECT count(*) FROM told r WHERE account = '$account' AND credit = '$credit' AND alone AND NOT applied
		   AND asked <= (SELECT sum(asked) FROM told g WHERE g.account = '$account' AND g.credit = '$credit'
				AND g.applied AND NOT g.replayed AND g.began > r.ended)}),
		0, "$name: ... nor with what others got later")
	  if !$params{comes_back};
	spend_the_rest($name, $account, $credit, $left);
	return;
}

# Tests that one client alone gets all that is left, and no more.
sub spend_the_rest
{
	my ($name, $account, $credit, $left) = @_;

	is($node->safe_psql('postgres', qq{
		SELECT applied, trim_scale(available) FROM credit_lease.lease_try_consume('$account', '$credit', $left)}),
		't|0', "$name: the rest of $credit can be spent")
	  if $left > 0;
	is($node->safe_psql('postgres', qq{
		SELECT applied, trim_scale(available) FROM credit_lease.lease_try_consume('$account', '$credit', 1e-12)}),
		'f|0', "$name: ... and no more");
	return;
}

# Waits until the worker has come by twice from now on: once it has seen all there is.
sub worker_comes_by
{
	for (1 .. 2)
	{
		my $now = $node->safe_psql('postgres', 'SELECT clock_timestamp()');

		$node->poll_query_until('postgres', "SELECT last_sweep > '$now' FROM credit_lease.worker_status")
		  or die 'the worker does not come by';
	}
	return;
}

my $any_amount = '\set a random(1, 199)' . "\n" . '\set b random(1, 199)' . "\n";

# ---------------------------------------------------------------------------
# Draws, each alone in its transaction: they wait for one another for as long as
# it takes, and not only for half of deadlock_timeout.

for my $round (
	# stripes, tranches, how many stripes change, how amounts are written
	[ 'one tranche', 16, 1, 0, ':a' ],
	[ 'five tranches', 7, 5, 0, ':a' ],
	[ 'another number of stripes', 64, 1, 1, ':a' ],
	[ 'fractions', 3, 4, 1, '(:a / 7.0)::numeric(20,12) * 7' ])
{
	my ($name, $stripes, $tranches, $changes, $amount) = @$round;
	my $account = "drained: $name";

	fill($account, 'tokens', 100_000, stripes => $stripes, tranches => $tranches);
	run_clients($name, 25,
		{ settings => '-c deadlock_timeout=10ms' },
		'draw@40' => $any_amount . ask($account, 'tokens', $amount, alone => 1),
		$changes ? disturbances($account, 'tokens') : ());
	spent_is_told($name, $account, 'tokens');
	is_drained($name, $account, 'tokens', 100_000);
}

# ---------------------------------------------------------------------------
# Two clients each use the same keys.

{
	my $name = 'keys';
	my $account = 'keys';
	my $of_key = '\set i :i + 1' . "\n" . '\set k :client_id / 2 * 1000 + :i' . "\n" . '\set a 1 + hash(:k) % 100 + 99' . "\n";

	fill($account, 'tokens', 100_000);
	run_clients($name, 50,
		'draw@40' => $of_key . ask($account, 'tokens', ':a', alone => 1, key => q{'key ' || :k}),
		disturbances($account, 'tokens'));
	spent_is_told($name, $account, 'tokens');
	is_drained($name, $account, 'tokens', 100_000);
	is($node->safe_psql('postgres', qq{
		SELECT count(*) FROM (SELECT FROM credit_lease.ledger WHERE account = '$account' AND idempotency_key IS NOT NULL
			GROUP BY idempotency_key HAVING count(*) > 1) k}), '0', "$name: each has one effect");
	is($node->safe_psql('postgres', qq{SELECT count(*) > 0 FROM told WHERE account = '$account' AND replayed}),
		't', "$name: ... and is used again");
}

# ---------------------------------------------------------------------------
# Transactions of several calls, and those that are rolled back.

{
	my $name = 'transactions';
	my $account = 'transactions';
	my $pool = "'$account', 'tokens'";

	fill($account, 'tokens', 60_000, tranches => 2);
	run_clients($name, 15,
		'draw@12' => $any_amount . ask($account, 'tokens', ':a', alone => 1),
		'two@6' => $any_amount . "BEGIN;\n" . ask($account, 'tokens', ':a') . ask($account, 'tokens', ':b') . "COMMIT;\n",
		# what was held in an earlier transaction is spent
		'hold@6' => $any_amount . qq{
\\if :hold
BEGIN;
SELECT lease_settle('$account', :hold);
SELECT coalesce(reservation_id, 0) AS hold FROM lease_try_reserve($pool, :a, '1 year') \\gset
COMMIT;
\\else
SELECT coalesce(reservation_id, 0) AS hold FROM lease_try_reserve($pool, :a, '1 year') \\gset
\\endif
},
		'rollback@4' => $any_amount . "BEGIN;\n"
		  . ask($account, 'tokens', ':a')
		  . "SAVEPOINT s;\n"
		  . ask($account, 'tokens', ':b')
		  . "ROLLBACK TO s;\nSELECT lease_try_reserve($pool, :b);\nROLLBACK;\n",
		disturbances($account, 'tokens'));
	spent_is_told($name, $account, 'tokens');
	is_drained($name, $account, 'tokens', 60_000, comes_back => 1);
}

# ---------------------------------------------------------------------------
# Two credits of an account, in both orders.

{
	my $name = 'two credits';
	my $account = 'two credits';
	my @credits = ('seconds', 'tokens');

	fill($account, 'tokens', 30_000, stripes => 5);
	fill($account, 'seconds', 30_000, stripes => 20);
	run_clients($name, 15,
		'tokens@12' => $any_amount . ask($account, 'tokens', ':a', alone => 1),
		'seconds@12' => $any_amount . ask($account, 'seconds', ':a', alone => 1),
		'there@6' => $any_amount . "BEGIN;\n" . ask($account, 'tokens', ':a') . ask($account, 'seconds', ':b') . "COMMIT;\n",
		'back@6' => $any_amount . "BEGIN;\n" . ask($account, 'seconds', ':a') . ask($account, 'tokens', ':b') . "COMMIT;\n",
		disturbances($account, @credits));
	for my $credit (@credits)
	{
		spent_is_told($name, $account, $credit);
		is_drained($name, $account, $credit, 30_000);
	}
}

# ---------------------------------------------------------------------------
# There is always enough for everybody, and not a unit more: each client has at
# most 20 at a time and gives them back. Nobody is ever refused.

{
	my $name = 'just enough';
	my $account = 'just enough';
	my $pool = "'$account', 'tokens'";
	my $some = '\set a random(1, 20)' . "\n";

	fill($account, 'tokens', 20 * $clients, stripes => 8);
	run_clients($name, 8,
		'refund@12' => $some . qq{
SELECT entry_id FROM lease_consume($pool, :a) \\gset
SELECT lease_refund('$account', :entry_id);
},
		'in_parts@6' => $some . qq{
SELECT entry_id FROM lease_consume($pool, :a) \\gset
SELECT lease_refund('$account', :entry_id, :a / 4.0);
SELECT lease_refund('$account', :entry_id);
},
		'cancel@6' => $some . qq{
SELECT reservation_id FROM lease_reserve($pool, :a, '1 year') \\gset
SELECT lease_cancel('$account', :reservation_id);
},
		'settle@6' => $some . qq{
SELECT reservation_id FROM lease_reserve($pool, 1, '1 year') \\gset
SELECT lease_renew('$account', :reservation_id, '1 year', :a - 1);
SELECT lease_settle('$account', :reservation_id, 0);
},
		'topup@3' => $some . qq{
SELECT reservation_id FROM lease_reserve($pool, :a, '1 year') \\gset
SELECT lease_settle('$account', :reservation_id);
SELECT lease_topup($pool, :a);
},
		'rollback@4' => $some . "BEGIN;\nSELECT lease_consume($pool, :a);\nROLLBACK;\n",
		disturbances($account, 'tokens'));
	is($node->safe_psql('postgres', qq{SELECT trim_scale(available) FROM credit_lease.lease_balance('$account')}),
		20 * $clients, "$name: all of it is back");
	spend_the_rest($name, $account, 'tokens', 20 * $clients);
}

# ---------------------------------------------------------------------------
# Credit comes and goes meanwhile, also in the transactions that spend.

{
	my $name = 'top-ups';
	my $account = 'top-ups';
	my $pool = "'$account', 'tokens'";

	fill($account, 'tokens', 20_000, stripes => 12);
	run_clients($name, 15,
		'draw@20' => $any_amount . ask($account, 'tokens', ':a', alone => 1),
		'topup@2' => $any_amount . "SELECT lease_topup($pool, :a, priority => :b % 5);\n",
		'spend_and_topup@2' => $any_amount . "BEGIN;\n" . ask($account, 'tokens', ':a') . "SELECT lease_topup($pool, :b);\nCOMMIT;\n",
		'refund@6' => $any_amount . qq{
SELECT applied AS refundable, entry_id FROM lease_try_consume($pool, :a, metadata => '"refunded"') \\gset
\\if :refundable
SELECT lease_refund('$account', :entry_id, (:a + 1) / 2);
\\endif
},
		'adjust@1' => $any_amount . "SELECT lease_adjust($pool, :a, 'so');\n",
		disturbances($account, 'tokens'));
	is($node->safe_psql('postgres', qq{
		SELECT count(*) FROM told WHERE account = '$account' AND alone AND NOT applied AND asked <= available}),
		'0', "$name: nobody was refused what was there");
	is($node->safe_psql('postgres', qq{
		SELECT sum(amount) FILTER (WHERE kind = 'consume' AND metadata IS NULL) = (
				SELECT sum(asked) FROM told WHERE account = '$account' AND applied)
		   AND sum(amount) FILTER (WHERE kind IN ('topup', 'adjust', 'refund'))
				- sum(amount) FILTER (WHERE kind = 'consume') = (SELECT available FROM credit_lease.lease_balance('$account'))
		  FROM credit_lease.ledger WHERE account = '$account'}),
		't', "$name: what came in and did not go out is left");
	spend_the_rest($name, $account, 'tokens', $node->safe_psql('postgres', qq{
		SELECT available FROM credit_lease.lease_balance('$account')}));
}

# ---------------------------------------------------------------------------
# The worker, beside calls that are not done when it comes by.

{
	my $sql = sub { return $node->safe_psql('postgres', "SET search_path = credit_lease; $_[0]") };
	my $waits = q{SELECT count(*) = 1 FROM pg_stat_activity
		WHERE backend_type = 'credit_lease worker' AND wait_event_type = 'Lock'};
	my $one = LeaseTest::Session->new($node);
	my $other = LeaseTest::Session->new($node);

	# what had come to its end and has something again by the time that all locks are there
	$sql->("SELECT lease_topup('revived', 'tokens', 1); SELECT lease_stripe('revived', 'tokens', 2);");
	$one->run_safe("BEGIN; SELECT FROM stripe WHERE account = 'revived' AND stripe = 2 FOR NO KEY UPDATE;");
	my $entry = $sql->("SELECT entry_id FROM lease_consume('revived', 'tokens', 1)");
	ok($node->poll_query_until('postgres', $waits), 'the worker waits to fold what is used up');
	$sql->("SELECT lease_refund('revived', $entry)");
	$one->run_safe('COMMIT;');
	worker_comes_by();
	books_balance($node, 'a refund while the worker waited');
	is($sql->("SELECT applied, available FROM lease_consume('revived', 'tokens', 1)"), 't|0', '... can be spent');

	# a lease of which something is in the tranche's own row, from where somebody has just taken it
	$sql->(q{
		SELECT lease_install('taken', 'tokens', 'lease', 8, clock_timestamp() + '1 day');
		SELECT lease_stripe('taken', 'tokens', 2);
		SELECT lease_extend('taken', 'tokens', 'lease', 12);});
	$other->run_safe("BEGIN; SELECT FROM stripe WHERE account = 'taken' AND stripe = 2 FOR NO KEY UPDATE;");
	$one->run_safe("BEGIN; SELECT FROM lease_consume('taken', 'tokens', 7);");
	$other->run_safe('COMMIT;');
	is($sql->("SELECT applied FROM lease_consume('taken', 'tokens', 4)"), 't', 'a stripe is used up while another one is locked');
	worker_comes_by();
	$one->run_safe('COMMIT;');
	worker_comes_by();
	books_balance($node, 'evening out beside a call that had taken from the own row');
	is($sql->("SELECT applied, available FROM lease_consume('taken', 'tokens', 1)"), 't|0', '... what is left can be spent');

	$one->quit;
	$other->quit;
}

# ---------------------------------------------------------------------------
# Everything at once, in transactions of up to three calls on one account. Each
# client ends its own holds and refunds what it has spent itself: no two wait for
# one another in opposite orders.

$node->safe_psql('postgres', q{
	CREATE FUNCTION any_call(name text, client int, later boolean DEFAULT false) RETURNS text LANGUAGE plpgsql SET search_path = credit_lease AS $$
	DECLARE
		which int := floor(random() * 24);
		unit text := CASE WHEN random() < 0.5 THEN 'seconds' ELSE 'tokens' END;
		part numeric := 1 + floor(random() * 300) / 4;
		mine jsonb := to_jsonb(client);
		lease text := 'lease ' || client || ' ' || floor(random() * 3);
		hold bigint := (SELECT reservation_id FROM reservation
			WHERE account = name AND metadata = mine AND status = 'held' ORDER BY random() LIMIT 1);
		entry bigint := (SELECT l.entry_id FROM ledger l
			WHERE l.account = name AND l.metadata = mine AND l.kind = 'consume' AND l.first_entry_id IS NULL
			ORDER BY entry_id DESC OFFSET floor(random() * 5) LIMIT 1);
	BEGIN
		CASE which
			WHEN 0 THEN PERFORM lease_topup(name, unit, part * 4, priority => part::int % 3);
			WHEN 1 THEN PERFORM lease_topup(name, unit, part, expires_at => clock_timestamp() + (0.1 + random()) * interval '2 s');
			WHEN 2 THEN PERFORM lease_adjust(name, unit, part, 'so');
			WHEN 3 THEN PERFORM lease_adjust(name, unit, -part, 'so');
			WHEN 4 THEN PERFORM lease_refund(name, entry) WHERE entry IS NOT NULL;
			WHEN 5 THEN PERFORM lease_refund(name, entry, 0.25) WHERE entry IS NOT NULL;
			WHEN 6 THEN PERFORM lease_settle(name, hold) WHERE hold IS NOT NULL;
			WHEN 7 THEN PERFORM lease_settle(name, hold, part) WHERE hold IS NOT NULL;
			WHEN 8 THEN PERFORM lease_settle(name, hold, part * 2, 'clamp') WHERE hold IS NOT NULL;
			WHEN 9 THEN PERFORM lease_settle(name, hold, part * 2, 'refuse') WHERE hold IS NOT NULL;
			WHEN 10 THEN PERFORM lease_cancel(name, hold) WHERE hold IS NOT NULL;
			WHEN 11 THEN PERFORM lease_renew(name, hold, '1 hour', part) WHERE hold IS NOT NULL;
			WHEN 12, 13 THEN PERFORM lease_reserve(name, unit, part, '1 hour', metadata => mine);
			WHEN 14 THEN PERFORM lease_try_reserve(name, unit, part, '50 ms', min_amount => 1, metadata => mine);
			WHEN 15 THEN PERFORM lease_install(name, unit, lease, part, clock_timestamp() + random() * interval '1 s');
			WHEN 16 THEN PERFORM lease_extend(name, unit, lease, part * 2, clock_timestamp() + random() * interval '1 s');
			WHEN 17 THEN PERFORM lease_release(name, unit, lease);
			WHEN 18 THEN PERFORM lease_freeze(name, CASE WHEN random() < 0.5 THEN unit END);
			WHEN 19, 20 THEN PERFORM lease_unfreeze(name);
			WHEN 21 THEN PERFORM lease_try_consume(name, unit, part, metadata => mine);
			ELSE PERFORM lease_consume(name, unit, part, metadata => mine);
		END CASE;
		RETURN NULL;
	EXCEPTION WHEN SQLSTATE 'LC001' OR SQLSTATE 'LC003' OR SQLSTATE 'LC004' OR SQLSTATE 'LC005' OR SQLSTATE 'LC007'
		-- the call has come too late for the instant that it names
		OR SQLSTATE '22023' THEN
		RETURN SQLSTATE;
	-- what a call needs more than its transaction has, only the first one waits for
	WHEN SQLSTATE '55P03' THEN
		IF NOT later THEN
			RAISE;
		END IF;
		RETURN SQLSTATE;
	END $$});
for my $account ('storm:1', 'storm:2')
{
	fill($account, $_, 2000, stripes => 4) for 'tokens', 'seconds';
}
{
	my $call = "SELECT public.any_call('storm:' || :account, :client_id);\n";
	my $later = "SELECT public.any_call('storm:' || :account, :client_id, true);\n";
	my $account = '\set account random(1, 2)' . "\n" . '\set n random(1, 64)' . "\n";
	my $of = "'storm:' || :account, CASE WHEN :n % 2 = 0 THEN 'tokens' ELSE 'seconds' END";

	run_clients('everything', 120,
		{ clients => 8 },
		'one@12' => $account . $call,
		'two@6' => "${account}BEGIN;\n$call${later}COMMIT;\n",
		'three@4' => "${account}BEGIN;\n$call$later${later}COMMIT;\n",
		'rollback@2' => "${account}BEGIN;\n$call$later${later}ROLLBACK;\n",
		'stripe@1' => "${account}SELECT lease_stripe($of, CASE WHEN :n > 8 THEN 1 + :n % 8 ELSE :n END);\n",
		'look@1' => "${account}SELECT count(*) FROM lease_balance('storm:' || :account);\n",
		'sweep@1' => "SELECT lease_reclaim();\n");
}

# ---------------------------------------------------------------------------
# Backends are killed in the middle of it.

{
	my $name = 'crashes';
	my $account = 'crashes';
	my $offset = -s $node->logfile;
	my $told = "SELECT count(*) FROM told WHERE account = '$account' AND applied";
	my %scripts = (
		'draw@20' => $any_amount . ask($account, 'tokens', ':a', alone => 1),
		'two@10' => $any_amount . "BEGIN;\n" . ask($account, 'tokens', ':a') . ask($account, 'tokens', ':b') . "COMMIT;\n",
		disturbances($account, 'tokens'));

	fill($account, 'tokens', 100_000, stripes => 9);
	for my $crash (1 .. 2)
	{
		my $at = $node->safe_psql('postgres', $told) + 150;
		my $from = -s $node->logfile;
		my $pgbench = start_pgbench($node, "-c $clients -j 2 -T 3600 -M prepared", \%scripts);

		$node->poll_query_until('postgres', "SELECT ($told) >= $at");
		my $pid = $node->safe_psql('postgres', q{
			SELECT pid FROM pg_stat_activity
			 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND query LIKE '%lease_%'
			 ORDER BY state = 'active' DESC, random() LIMIT 1});
		is(kill('KILL', $pid), 1, "$name: a backend is killed");
		$node->wait_for_log(qr/database system is ready to accept connections/, $from);
		my (undef, undef, $err) = finish_pgbench($pgbench);
		is(join("\n", grep { /ERROR/ } split /\n/, $err), '', "$name: pgbench lost its connections and no more");
		$node->poll_query_until('postgres', 'SELECT NOT pg_is_in_recovery()');
		books_balance($node, "$name: after one");
		spent_is_told($name, $account, 'tokens');
	}
	run_clients($name, 25, %scripts);
	is(unexpected_errors($offset, '57P0\d'), '', "$name: the log has no other errors");
	spent_is_told($name, $account, 'tokens');
	is_drained($name, $account, 'tokens', 100_000);
}

books_balance($node, 'after it all');
$node->stop;
done_testing();
