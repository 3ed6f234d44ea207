# LeaseTest.pm
#	What the TAP tests share: a cluster with the extension, and a session.
#
# The session is psql through IPC::Run. PostgreSQL's own BackgroundPsql notes
# every query and its output, which is too much for tests of thousands of
# steps, and does not tell SQLSTATEs.

package LeaseTest;

use strict;
use warnings;

use Exporter 'import';
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);
use Time::Local qw(timegm);

our @EXPORT = qw(lease_cluster books_balance becomes until_true seconds quoted pgbench start_pgbench finish_pgbench any_calls);

# Returns a started cluster, with the extension in its database postgres. conf
# is appended to postgresql.conf; other parameters go to init().
sub lease_cluster
{
	my ($name, %params) = @_;
	my $conf = delete $params{conf} // '';
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init(%params);
	$node->append_conf('postgresql.conf', "log_statement = none\n$conf");
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION credit_lease');
	return $node;
}

# Tests that lease_verify() finds nothing.
sub books_balance
{
	my ($node, $name, %params) = @_;
	my $found = $node->safe_psql($params{dbname} // 'postgres',
		'SELECT * FROM credit_lease.lease_verify() LIMIT 20');

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is($found, '', "$name: the books balance");
}

# Waits until a query returns t, and tests that it does.
sub becomes
{
	my ($node, $query, $name, %params) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok($node->poll_query_until($params{dbname} // 'postgres', $query), $name);
}

# Waits until something is true, and tests that it is.
sub until_true
{
	my ($is_true, $name) = @_;
	my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;
	my $true;

	# asked once a round: what was true for a moment has been seen
	sleep 0.05 until ($true = $is_true->()) || time > $deadline;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok($true, $name);
}

# Returns a time that an upstream has logged, in seconds.
sub seconds
{
	my ($year, $month, $day, $hour, $minute, $second) = $_[0] =~ /^(\d+)-(\d+)-(\d+)T(\d+):(\d+):([\d.]+)Z$/;

	return timegm(0, $minute, $hour, $day, $month - 1, $year) + $second;
}

# Returns a text as an SQL literal.
sub quoted
{
	my ($text) = @_;

	return 'NULL' unless defined $text;
	$text =~ s/'/''/g;
	return "'$text'";
}

# Starts pgbench with scripts, given as name@weight => text.
my $runs = 0;
sub start_pgbench
{
	my ($node, $options, $scripts, $pgoptions) = @_;
	my $self = { out => '', err => '', options => $options };
	my @files;

	$runs++;
	for my $name (sort keys %$scripts)
	{
		my ($plain, $weight) = split /@/, $name;
		my $file = $node->basedir . "/$runs-$plain";

		append_to_file($file, $scripts->{$name});
		push @files, '-f', $file . ($weight ? "\@$weight" : '');
	}

	local $ENV{PGOPTIONS} = '-c search_path=credit_lease,pg_catalog ' . ($pgoptions // '');
	$self->{run} = IPC::Run::start(
		[
			$node->installed_command('pgbench'), '-n',
			'-h', $node->host, '-p', $node->port,
			split(/ /, $options), @files, 'postgres'
		],
		'>', \$self->{out},
		'2>', \$self->{err});
	return $self;
}

# Waits for it to end and returns its status, its output and its errors.
sub finish_pgbench
{
	my ($self) = @_;

	$self->{run}->finish;
	my $status = $self->{run}->result(0);
	note("pgbench $self->{options}: status $status\n$self->{out}");
	return ($status, @$self{qw(out err)});
}

sub pgbench
{
	return finish_pgbench(start_pgbench(@_));
}

# Returns scripts that call everything, in four accounts. No answer is an
# error: acct:3 is frozen now and then, so nothing is called there that raises
# LC007.
sub any_calls
{
	my ($node) = @_;

	# where several fight for one hold or one refund, somebody has to lose; it
	# has metadata, so that nobody else's is taken
	$node->safe_psql('postgres', q{
		CREATE FUNCTION fight(name text, n int) RETURNS text LANGUAGE plpgsql AS $$
		DECLARE
			hold bigint := (SELECT reservation_id FROM credit_lease.open_reservation
				WHERE account = name AND metadata = '"for all"' ORDER BY reservation_id DESC OFFSET n % 3 LIMIT 1);
			entry bigint := (SELECT entry_id FROM credit_lease.ledger
				WHERE account = name AND metadata = '"for all"' AND kind = 'consume' ORDER BY entry_id DESC OFFSET n % 3 LIMIT 1);
		BEGIN
			CASE n % 5
				WHEN 0 THEN PERFORM credit_lease.lease_settle(name, hold, n / 4.0) WHERE hold IS NOT NULL;
				WHEN 1 THEN PERFORM credit_lease.lease_cancel(name, hold) WHERE hold IS NOT NULL;
				WHEN 2 THEN PERFORM credit_lease.lease_renew(name, hold, '2 hours', n % 4) WHERE hold IS NOT NULL;
				WHEN 3 THEN PERFORM credit_lease.lease_refund(name, entry) WHERE entry IS NOT NULL;
				ELSE PERFORM credit_lease.lease_refund(name, entry, 0.125) WHERE entry IS NOT NULL;
			END CASE;
			RETURN NULL;
		EXCEPTION WHEN SQLSTATE 'LC001' OR SQLSTATE 'LC004' OR SQLSTATE 'LC005' OR SQLSTATE 'LC007' OR SQLSTATE 'LC008' THEN
			RETURN SQLSTATE;
		END $$;
		-- likewise for sessions; one name is everybody's for a moment
		CREATE FUNCTION fight_session(name text, n int, k int) RETURNS text LANGUAGE plpgsql AS $$
		DECLARE
			fresh text := 'session ' || (extract(epoch FROM clock_timestamp()) * 20)::bigint;
			live text := coalesce((SELECT owner FROM credit_lease.open_lease
				WHERE account = name AND kind = 'session' ORDER BY tranche_id DESC OFFSET n % 3 LIMIT 1), fresh);
		BEGIN
			CASE k % 7
				WHEN 0 THEN PERFORM credit_lease.lease_session_open(name, 'tokens', fresh, 5 + n % 2, n * interval '100 ms');
				WHEN 1 THEN PERFORM credit_lease.lease_session_topup(name, live, n / 8.0);
				WHEN 2 THEN PERFORM credit_lease.lease_session_authorize(name, live, n / 4.0);
				WHEN 3 THEN PERFORM credit_lease.lease_session_reconcile(name, live, jsonb_build_object(
					'session', live, 'deposit', n / 2.0, 'accepted_cumulative', n / 3.0, 'spent', n / 5.0, 'units', n));
				WHEN 4 THEN PERFORM credit_lease.lease_session_close(name, live, CASE WHEN n % 2 = 0 THEN n / 5.0 END);
				ELSE PERFORM credit_lease.lease_session_charge(name, live, n / 16.0);
			END CASE;
			RETURN NULL;
		EXCEPTION WHEN SQLSTATE 'LC001' OR SQLSTATE 'LC002' OR SQLSTATE 'LC003' OR SQLSTATE 'LC004' OR SQLSTATE 'LC005'
			OR SQLSTATE 'LC007' OR SQLSTATE 'LC008' OR SQLSTATE '22023' THEN
			RETURN SQLSTATE;
		END $$});

	my $any = q{
\set a random(1, 3)
\set n random(1, 40)
\set m random(0, 50)
};
	my $unfrozen = $any =~ s/3/2/r;
	return {
		'consume@8' => $any . q{
SELECT lease_try_consume('acct:' || :a, 'tokens', :n / 8.0, metadata => '"for all"');
},
		# the same request whoever makes it
		'key@4' => $any . q{
\set k random(1, 300)
SELECT lease_try_consume('acct:' || :a, 'tokens', 0.5 + :k % 3, 'key ' || :k);
},
		'topup@3' => $any . q{
SELECT lease_topup('acct:' || :a, 'tokens', :n, priority => :n % 3,
	expires_at => CASE :n % 4 WHEN 0 THEN NULL ELSE clock_timestamp() + interval '1 hour' END);
},
		# clocks that differ by hours, so that holds and tranches expire, and are alive again
		'clock@4' => $any . q{
BEGIN;
SELECT lease_topup('acct:4', 'tokens', :n,
	expires_at => clock_timestamp() + :m * interval '1 min' + interval '1 hour');
SELECT lease_try_reserve('acct:4', 'tokens', :n, '30 min', min_amount => 1);
SELECT set_config('credit_lease.mock_now', (clock_timestamp() + :m * interval '3 min')::text, true);
SELECT lease_try_consume('acct:4', 'tokens', :m + 0.5);
SELECT lease_try_reserve('acct:4', 'tokens', :n, '30 min', min_amount => 1);
COMMIT;
},
		'topup_key@2' => $any . q{
\set k random(1, 100)
SELECT lease_topup('acct:' || :a, 'tokens', :k, 'topup ' || :k);
},
		'settle@8' => $any . q{
SELECT applied, reservation_id FROM lease_try_reserve('acct:' || :a, 'tokens', :n, '1 hour', min_amount => 1) \gset
\if :applied
SELECT lease_settle('acct:' || :a, :reservation_id, :m);
SELECT lease_settle('acct:' || :a, :reservation_id, :m);
\endif
},
		'cancel@4' => $any . q{
SELECT applied, reservation_id FROM lease_try_reserve('acct:' || :a, 'tokens', :n, '1 hour') \gset
\if :applied
SELECT lease_cancel('acct:' || :a, :reservation_id);
\endif
},
		'renew@3' => $unfrozen . q{
SELECT applied, reservation_id FROM lease_try_reserve('acct:' || :a, 'tokens', :n, '1 hour') \gset
\if :applied
SELECT lease_renew('acct:' || :a, :reservation_id, '2 hours');
SELECT lease_settle('acct:' || :a, :reservation_id, :m, 'clamp');
\endif
},
		# holds that lapse at once, and some that nobody ends
		'lapse@4' => $any . q{
SELECT lease_try_reserve('acct:' || :a, 'tokens', :n, :n * interval '1 ms');
},
		'refund@4' => $any . q{
SELECT applied, entry_id FROM lease_try_consume('acct:' || :a, 'tokens', :n) \gset
\if :applied
SELECT lease_refund('acct:' || :a, :entry_id, :n / 4.0);
SELECT lease_refund('acct:' || :a, :entry_id);
\endif
},
		'hold@3' => $any . q{
SELECT lease_try_reserve('acct:' || :a, 'tokens', :n, '1 hour', min_amount => 0.5, metadata => '"for all"');
},
		'fight@10' => $any . q{
SELECT public.fight('acct:' || :a, :n);
},
		'session@10' => $any . q{
\set k random(1, 700)
SELECT public.fight_session('acct:' || :a, :n, :k);
},
		# of several accounts, with the keys of the other scripts
		'ingest@5' => $any . q{
\set k random(1, 300)
SELECT count(*) FROM lease_ingest(ARRAY['acct:' || :a, 'acct:' || :a % 3 + 1, 'acct:' || :a, 'acct:4', 'nobody:' || :m],
	ARRAY['tokens', 'tokens', 'tokens', 'tokens', 'tokens'], ARRAY[:n / 8.0, 0.25, 0.5 + :k % 3, 1, 1],
	ARRAY[NULL, 'event ' || :k, 'key ' || :k, 'topup ' || :m, 'key ' || :k]);
},
		'charge@2' => $any . q{
\set k random(1, 300)
SELECT count(*) FROM lease_ingest(jsonb_build_array(
	jsonb_build_object('account', 'acct:' || :a, 'credit', 'tokens', 'amount', :k::int, 'key', 'charge ' || :k),
	jsonb_build_object('account', 'acct:' || :a % 2 + 1, 'credit', 'tokens', 'amount', 0.25, 'key', 'event ' || :k),
	jsonb_build_object('account', 'acct:4', 'credit', 'tokens', 'amount', :n::int)), 'charge');
},
		'rollback@3' => $any . q{
BEGIN;
SELECT lease_try_consume('acct:' || :a, 'tokens', :n);
SAVEPOINT s;
SELECT lease_try_reserve('acct:' || :a, 'tokens', :n);
ROLLBACK TO s;
SELECT lease_try_reserve('acct:' || :a, 'tokens', :n, '1 ms');
ROLLBACK;
},
		'transaction@3' => $any . q{
BEGIN;
SELECT lease_try_consume('acct:' || :a, 'tokens', 0.25);
SELECT lease_try_reserve('acct:' || :a, 'tokens', 0.25, '1 ms');
SELECT lease_topup('acct:' || :a, 'tokens', 1);
COMMIT;
},
		# answers of an upstream: late, twice and out of order, while leases expire and
		# are released
		'install@3' => $any . q{
SELECT lease_install('acct:' || :a, 'tokens', 'lease ' || :m, :n, clock_timestamp() + :n * interval '50 ms');
},
		'extend@4' => $any . q{
SELECT lease_extend('acct:' || :a, 'tokens', 'lease ' || :m, :n * 2, clock_timestamp() + :n * interval '50 ms');
SELECT lease_extend('acct:' || :a, 'tokens', lease_id, greatest(granted + :n - 10, 1), expires_at + interval '10 ms')
	FROM (SELECT lease_id, granted, expires_at FROM open_lease WHERE account = 'acct:' || :a AND kind = 'upstream' LIMIT 1) l;
},
		'release@1' => $any . q{
SELECT lease_release('acct:' || :a, 'tokens', CASE WHEN :n % 2 = 0 THEN 'lease ' || :m END);
},
		'sweep@2' => q{
SELECT lease_reclaim(50);
},
		'freeze@1' => q{
SELECT lease_freeze('acct:3', 'tokens');
SELECT lease_unfreeze('acct:3');
},
		'look@2' => $any . q{
SELECT lease_balance('acct:' || :a);
SELECT count(*) FROM lease_verify('acct:' || :a);
}
	};
}

package LeaseTest::Session;

# Connects; fields of a row are separated by |, null is ~.
sub new
{
	my ($class, $node, $dbname) = @_;
	my $self = bless { in => '', out => '', err => '', n => 0 }, $class;

	$self->{timeout} = IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default);
	$self->{run} = IPC::Run::start(
		[
			$node->installed_command('psql'), '-XAtq',
			'-P', 'null=~',
			'-d', $node->connstr($dbname // 'postgres')
		],
		'<', \$self->{in},
		'>', \$self->{out},
		'2>', \$self->{err},
		$self->{timeout});
	$self->run("SET search_path = credit_lease, public; SET timezone = 'UTC';");
	return $self;
}

# Begins to run statements, each ended by a semicolon. Nothing but finish()
# may be called then.
sub begin
{
	my ($self, $sql) = @_;

	$self->{out} = '';
	$self->{err} = '';
	$self->{n}++;
	$self->{timeout}->start;
	$self->{in} .= "$sql\n\\echo = $self->{n} :SQLSTATE\n";
	$self->{run}->pump_nb;
	return;
}

# Returns the output and the SQLSTATE of the last of the statements.
sub finish
{
	my ($self) = @_;
	my $end = qr/^= $self->{n} (\w{5})\n/m;

	$self->{run}->pump until $self->{out} =~ $end;
	my ($out, $sqlstate) = ($`, $1);
	chomp $out;
	return wantarray ? ($out, $sqlstate) : $out;
}

sub run
{
	my ($self, $sql) = @_;

	$self->begin($sql);
	return $self->finish;
}

# Runs statements and dies if the last of them fails.
sub run_safe
{
	my ($self, $sql) = @_;
	my ($out, $sqlstate) = $self->run($sql);

	die "\"$sql\" failed: $sqlstate $self->{err}" if $sqlstate ne '00000';
	return $out;
}

# Returns what the statements of the last begin() have written to stderr so far.
sub messages
{
	my ($self) = @_;

	return $self->{err};
}

sub quit
{
	my ($self) = @_;

	$self->{in} .= "\\q\n";
	return $self->{run}->finish;
}

1;
