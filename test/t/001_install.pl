# The extension as an object of the database: what it must refuse to install
# over, what sessions that have used it survive, and where its rows have to go
# with a dump and a standby.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use LeaseTest;

# Something of every kind: tranches that differ, holds in each state, refunds,
# a freeze, a policy, keys.
my $fill = q{
	SET search_path = credit_lease, public;
	INSERT INTO policy (account, credit, hold_ttl) VALUES ('a', NULL, '1 hour'), (NULL, 'tokens', '2 hours');
	SELECT lease_topup('a', 'tokens', 100, 'top 1');
	SELECT lease_topup('a', 'tokens', 50.000000000001, 'top 2', expires_at => now() + interval '1 day', priority => 5,
		metadata => '{"invoice": 17}');
	SELECT lease_topup('a', 'seconds', 7.5);
	SELECT lease_topup('b', 'tokens', 99999999999999999999999999.999999999999);
	SELECT lease_consume('a', 'tokens', 60.5, 'spend 1', '{"for": "a \"b\" c"}');
	SELECT lease_refund('a', (lease_consume('a', 'tokens', 10)).entry_id, 3, 'it was not so good', 'refund 1');
	SELECT lease_reserve('a', 'tokens', 10, '1 day', 'hold 1');
	SELECT lease_settle('a', (lease_reserve('a', 'tokens', 5, '1 day')).reservation_id, 2);
	SELECT lease_cancel('a', (lease_reserve('a', 'tokens', 5, '1 day')).reservation_id);
	SELECT lease_reserve('a', 'tokens', 1, '1 microsecond');
	SELECT lease_adjust('a', 'seconds', -0.5, 'never given', 'adjust 1');
	SELECT lease_topup('c', 'tokens', 10);
	SELECT chunk_id FROM lease_chunk_allocate('c', 'tokens', 5, 'worker', '1 hour', 'chunk 1') \gset
	SELECT lease_chunk_consume('c', :chunk_id, 1.5, 'worker', 'unit 1');
	SELECT lease_chunk_release('c', (lease_chunk_allocate('c', 'tokens', 2, 'worker')).chunk_id, 'worker');
	SELECT lease_session_open('c', 'tokens', 'session', 1, '1 hour'), lease_session_authorize('c', 'session', 1);
	SELECT lease_session_charge('c', 'session', 0.25);
	SELECT lease_session_open('c', 'tokens', 'closed', 0.5), lease_session_close('c', 'closed', 0.5);
	SELECT lease_freeze('b', 'tokens', 'a dispute');
	SELECT lease_sync('d', 'tokens', 100, now() - interval '1 hour');
	SELECT lease_consume('d', 'tokens', 5, 'told 1'), lease_consume('d', 'tokens', 6, 'told 2');
	SELECT lease_sync('d', 'tokens', 94, now(), acknowledged => ARRAY['told 2']);
};

# Calls of everything that writes, in an account of its own.
my $calls = q{
	SELECT lease_topup('calls', 'tokens', 100);
	SELECT lease_consume('calls', 'tokens', 10);
	SELECT lease_try_consume('calls', 'tokens', 10);
	SELECT lease_refund('calls', (lease_consume('calls', 'tokens', 5)).entry_id);
	SELECT lease_adjust('calls', 'tokens', -1, 'so');
	SELECT lease_settle('calls', (lease_reserve('calls', 'tokens', 10)).reservation_id, 4);
	SELECT lease_cancel('calls', (lease_try_reserve('calls', 'tokens', 10)).reservation_id);
	SELECT lease_renew('calls', (lease_reserve('calls', 'tokens', 10)).reservation_id, '1 hour', 5);
	SELECT chunk_id FROM lease_chunk_allocate('calls', 'tokens', 10, 'worker') \gset
	SELECT lease_chunk_consume('calls', :chunk_id, 2, 'worker'), lease_try_chunk_consume('calls', :chunk_id, 2, 'worker');
	SELECT lease_chunk_renew('calls', :chunk_id, 'worker', '1 hour');
	SELECT lease_chunk_release('calls', :chunk_id, 'worker');
	SELECT lease_session_open('calls', 'tokens', 'session', 5), lease_session_topup('calls', 'session', 1);
	SELECT lease_session_authorize('calls', 'session', 3), lease_session_charge('calls', 'session', 2);
	SELECT lease_session_reconcile('calls', 'session', to_jsonb(lease_session_snapshot('calls', 'session')));
	SELECT lease_session_close('calls', 'session', 4);
	SELECT ordinal, applied FROM lease_ingest(ARRAY['calls'], ARRAY['tokens'], ARRAY[1], ARRAY['bulk']);
	SELECT lease_freeze('calls'), lease_unfreeze('calls');
	SELECT available, pending FROM lease_sync('calls', 'mirrored', 10, now());
	SELECT lease_consume('calls', 'mirrored', 1, 'told');
	SELECT available, pending FROM lease_sync('calls', 'mirrored', 9, clock_timestamp(), acknowledged => ARRAY['told']);
	SELECT lease_reclaim();
	SELECT count(*) FROM lease_verify();
	SELECT available, reserved, consumed FROM lease_balance('calls', 'tokens');
};

# Returns every row of every table of the extension, and how far the sequences
# have come.
sub contents
{
	my ($node, $dbname) = @_;
	my @relations = split /\n/, $node->safe_psql($dbname, q{
		SELECT concat_ws(' ', c.relkind, c.oid::regclass) FROM pg_class c
		 WHERE c.relnamespace = 'credit_lease'::regnamespace AND c.relkind IN ('r', 'S')
		 ORDER BY c.oid::regclass::text COLLATE "C"});
	my $contents = '';

	for my $relation (@relations)
	{
		my ($kind, $name) = split / /, $relation;

		$contents .= "$name:\n";
		$contents .= $node->safe_psql($dbname, $kind eq 'S'
			? "SELECT last_value, is_called FROM $name"
			: qq{SELECT x FROM (SELECT t::text COLLATE "C" AS x FROM $name t) s ORDER BY x});
		$contents .= "\n";
	}
	return $contents;
}

# Tests that a database has the same rows as the one that it was restored from,
# and that life goes on there.
sub same_and_alive
{
	my ($node, $from, $dbname, $how) = @_;

	is(contents($node, $dbname), contents($node, $from), "$how: every row and every sequence is there");
	# a checkpoint becomes older meanwhile
	my $balances = q{SELECT to_jsonb(b) - 'checkpoint_age' FROM credit_lease.balance b ORDER BY account, credit};
	is($node->safe_psql($dbname, $balances), $node->safe_psql($from, $balances), "$how: the balances are the same");
	books_balance($node, $how, dbname => $dbname);

	is($node->safe_psql($dbname, q{
		SELECT replayed FROM credit_lease.lease_consume('a', 'tokens', 60.50, 'spend 1', '{"for": "a \"b\" c"}')}),
		't', "$how: a key has had its effect");
	is($node->safe_psql($dbname, q{
		SELECT max(entry_id) AS entry_id, greatest(max(tranche_id), (SELECT max(chunk_id) FROM credit_lease.chunk)) AS tranche_id,
			   (SELECT max(reservation_id) FROM credit_lease.reservation) AS reservation_id
		  FROM credit_lease.ledger \gset
		SELECT tranche_id > :tranche_id AND entry_id > :entry_id FROM credit_lease.lease_topup('new', 'tokens', 10);
		SELECT reservation_id > :reservation_id FROM credit_lease.lease_reserve('new', 'tokens', 4);
		SELECT entry_id > :entry_id FROM credit_lease.lease_consume('new', 'tokens', 1);}),
		"t\nt\nt", "$how: new numbers go on where the old ones ended");
	is($node->safe_psql($dbname, q{SELECT tgenabled FROM pg_trigger WHERE tgname = 'ledger_guard'}),
		'A', "$how: the guard stands");
	books_balance($node, "$how, and some calls", dbname => $dbname);
	return;
}

my $node = PostgreSQL::Test::Cluster->new('main');
$node->init(allows_streaming => 1);
$node->append_conf('postgresql.conf', 'log_statement = none');
$node->start;

# ---------------------------------------------------------------------------
# Who has prepared the schema, and what is in it, is not to be trusted.

$node->safe_psql('postgres', q{
	CREATE ROLE mallory;
	CREATE SCHEMA credit_lease AUTHORIZATION mallory;
	CREATE FUNCTION credit_lease.lease_clock() RETURNS timestamptz LANGUAGE sql AS $$ SELECT now() $$;
	ALTER FUNCTION credit_lease.lease_clock() OWNER TO mallory;
});
my ($status, $stdout, $stderr) = $node->psql('postgres', "\\set VERBOSITY verbose\nCREATE EXTENSION credit_lease");
isnt($status, 0, 'a schema that is there already makes the installation fail');
like($stderr, qr/42P06: .*schema "credit_lease" already exists/, '... and says why');
is($node->safe_psql('postgres', q{
	SELECT count(*) FROM pg_proc WHERE pronamespace = 'credit_lease'::regnamespace}),
	'1', '... and leaves nothing behind');
$node->safe_psql('postgres', 'DROP SCHEMA credit_lease CASCADE');

# What lies in other schemas is not looked at, however tempting its name.
$node->safe_psql('postgres', q{
	CREATE SCHEMA trap AUTHORIZATION mallory;
	CREATE TABLE trap.tranche (account text);
	CREATE FUNCTION trap.sum(numeric) RETURNS numeric LANGUAGE plpgsql AS
		$$ BEGIN RAISE 'trapped'; END $$;
	CREATE FUNCTION trap.differ(numeric, numeric) RETURNS boolean LANGUAGE plpgsql AS
		$$ BEGIN RAISE 'trapped'; END $$;
	CREATE OPERATOR trap.<> (LEFTARG = numeric, RIGHTARG = numeric, FUNCTION = trap.differ);
	CREATE FUNCTION trap.nextval(text) RETURNS bigint LANGUAGE plpgsql AS
		$$ BEGIN RAISE 'trapped'; END $$;
});
my $session = LeaseTest::Session->new($node);
my $other = LeaseTest::Session->new($node);

# Makes the calls with a search_path, and an instant for the clock, and returns
# the answers.
sub all_calls
{
	my ($in, $search_path) = @_;

	$in->run_safe("SET search_path = $search_path; SET credit_lease.mock_now = '2040-01-01 00:00+00';");
	return join "\n", map { scalar $in->run("$_;") } grep { /\S/ } split /;\s*/, $calls;
}
$session->run_safe('SET search_path = trap, pg_catalog, public; CREATE EXTENSION credit_lease;');
my $answers = all_calls($session, 'trap, pg_catalog, credit_lease');
like($answers, qr/^\(1,1,100,100,f\)\n.*\n0\n51\|15\|33$/s, 'names of other schemas are not used');

# ---------------------------------------------------------------------------
# A session that has kept plans goes on when the extension is made anew.

my $anew = 'DROP EXTENSION credit_lease; CREATE EXTENSION credit_lease;';
my $path = 'credit_lease, public';
$session->run_safe('DROP EXTENSION credit_lease; DROP SCHEMA trap CASCADE;');
is(($session->run(q{SELECT credit_lease.lease_consume('a', 'tokens', 1);}))[1],
	'3F000', 'without the extension there is no call');
$session->run_safe('CREATE EXTENSION credit_lease;');
is(all_calls($session, $path), $answers, 'the calls answer the same once it is there again');
$session->run_safe($anew);
is(all_calls($other, $path), $answers, '... in another session');
$other->run_safe($anew);
is(all_calls($session, $path), $answers, '... where another session has made it anew');

$session->run_safe("BEGIN; $anew");
is(all_calls($session, $path), $answers, '... in the transaction that makes it anew');
$session->run_safe('ROLLBACK;');
is($session->run_safe(q{SELECT available, reserved, consumed FROM lease_balance('calls', 'tokens');}),
	'51|15|33', '... and after its rollback');
$session->run_safe(q{SELECT lease_consume('calls', 'tokens', 51);});
is(($session->run(q{SELECT lease_consume('calls', 'tokens', 1);}))[1], 'LC001', '... with what there was before');
$session->run_safe($anew);

# ---------------------------------------------------------------------------
# Dump and restore.

$node->safe_psql('postgres', $fill);
books_balance($node, 'before the dump');
is($node->safe_psql('postgres', q{
	SELECT c.oid::regclass FROM pg_class c
	 WHERE c.relnamespace = 'credit_lease'::regnamespace AND c.relkind IN ('r', 'S')
	   AND NOT c.oid = ANY (SELECT unnest(extconfig) FROM pg_extension WHERE extname = 'credit_lease')}),
	'', 'every table and sequence is marked for pg_dump');
$node->safe_psql('postgres', q{
	CREATE ROLE app;
	SELECT credit_lease.lease_grant_access('app', 'spend');
});

my $dir = PostgreSQL::Test::Utils::tempdir();
$node->command_ok([ 'pg_dump', '-f', "$dir/plain.sql", 'postgres' ], 'pg_dump, plain');
$node->safe_psql('postgres', 'CREATE DATABASE plain TEMPLATE template0');
my @psql = ('psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1');
$node->command_ok([ @psql, '-d', 'plain', '-f', "$dir/plain.sql" ], 'psql restores it');
same_and_alive($node, 'postgres', 'plain', 'plain dump');
is($node->safe_psql('plain', q{
	SELECT has_function_privilege('app', p.oid, 'execute') FROM pg_proc p
	 WHERE p.pronamespace = 'credit_lease'::regnamespace AND p.proname IN ('lease_consume', 'lease_topup')
	 ORDER BY p.proname}),
	"t\nf", 'what was granted goes with the dump');

$node->command_ok([ 'pg_dump', '-Fc', '-f', "$dir/custom", 'postgres' ], 'pg_dump, custom');
$node->safe_psql('postgres', 'CREATE DATABASE custom TEMPLATE template0');
$node->command_ok([ 'pg_restore', '-e', '-j', '2', '-d', 'custom', "$dir/custom" ], 'pg_restore restores it');
same_and_alive($node, 'postgres', 'custom', 'custom dump');

# Rows alone, into an extension that was installed before.
$node->command_ok([ 'pg_dump', '-a', '-f', "$dir/data.sql", 'postgres' ], 'pg_dump, data only');
$node->safe_psql('postgres', 'CREATE DATABASE data TEMPLATE template0');
$node->safe_psql('data', 'CREATE EXTENSION credit_lease');
$node->command_ok([ @psql, '-d', 'data', '-f', "$dir/data.sql" ], 'psql restores it');
same_and_alive($node, 'postgres', 'data', 'data-only dump');

# ---------------------------------------------------------------------------
# A hot standby reads and says no.

$node->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'backup', has_streaming => 1);
$standby->start;
$node->safe_psql('postgres', q{
	SELECT credit_lease.lease_consume('a', 'tokens', 1.25, 'after the backup');
	SELECT credit_lease.lease_reserve('a', 'tokens', 2, '1 microsecond');
});
$node->wait_for_catchup($standby);

# both by the same instant
my $mock = 'SET credit_lease.mock_now = ' . quoted($node->safe_psql('postgres', 'SELECT clock_timestamp()'));
for my $query (
	"SELECT * FROM credit_lease.lease_balance('a')",
	"SELECT * FROM credit_lease.lease_balance('a', 'tokens')",
	q{SELECT to_jsonb(b) - 'checkpoint_age' FROM credit_lease.balance b ORDER BY account, credit},
	'SELECT * FROM credit_lease.open_lease ORDER BY 1, 2, 3',
	'SELECT * FROM credit_lease.open_reservation ORDER BY 1, 2',
	'SELECT * FROM credit_lease.expired_hold ORDER BY 1, 2',
	'SELECT c.* FROM credit_lease.chunk k, credit_lease.lease_chunk(k.account, k.chunk_id) c WHERE k.session IS NULL ORDER BY 1',
	'SELECT s.* FROM credit_lease.chunk k, credit_lease.lease_session_snapshot(k.account, k.session, 1) s WHERE k.session IS NOT NULL ORDER BY 2',
	'SELECT * FROM credit_lease.usage_by_day ORDER BY 1, 2, 3')
{
	is($standby->safe_psql('postgres', "$mock; $query"),
		$node->safe_psql('postgres', "$mock; $query"),
		"on the standby: $query");
}
books_balance($standby, 'on the standby');

my $hold = $node->safe_psql('postgres', q{
	SELECT reservation_id FROM credit_lease.open_reservation WHERE account = 'a' LIMIT 1});
my $entry = $node->safe_psql('postgres', q{
	SELECT entry_id FROM credit_lease.ledger WHERE idempotency_key = 'after the backup'});
my $chunk = $node->safe_psql('postgres', q{
	SELECT chunk_id FROM credit_lease.chunk WHERE account = 'c' AND status = 'live' AND session IS NULL});
my $reader = LeaseTest::Session->new($node);
my $on_standby = LeaseTest::Session->new($standby);
$reader->run_safe('SET default_transaction_read_only = on;');
for my $call (
	q{lease_topup('a', 'tokens', 1)},
	q{lease_adjust('a', 'tokens', -1, 'so')},
	qq{lease_refund('a', $entry)},
	q{lease_consume('a', 'tokens', 1)},
	q{lease_try_consume('a', 'tokens', 1)},
	q{lease_reserve('a', 'tokens', 1)},
	q{lease_try_reserve('a', 'tokens', 1)},
	qq{lease_settle('a', $hold)},
	qq{lease_cancel('a', $hold)},
	qq{lease_renew('a', $hold)},
	q{lease_chunk_allocate('c', 'tokens', 1, 'worker')},
	qq{lease_chunk_consume('c', $chunk, 1, 'worker')},
	qq{lease_try_chunk_consume('c', $chunk, 1, 'worker')},
	qq{lease_chunk_renew('c', $chunk, 'worker')},
	qq{lease_chunk_release('c', $chunk, 'worker')},
	q{lease_session_open('c', 'tokens', 'another', 1)},
	q{lease_session_topup('c', 'session', 1)},
	q{lease_session_authorize('c', 'session', 1)},
	q{lease_session_charge('c', 'session', 0.25)},
	q{lease_session_reconcile('c', 'session', '{"session": "session", "deposit": 1, "accepted_cumulative": 1, "spent": 1}')},
	q{lease_session_close('c', 'session')},
	q{lease_reclaim()},
	q{lease_freeze('a')},
	q{lease_unfreeze('b')})
{
	is(($on_standby->run("SELECT $call;"))[1], '25006', "on the standby: $call is refused");
	is(($reader->run("SELECT $call;"))[1], '25006', "in a read-only transaction: $call is refused");
}
is($reader->run_safe('SELECT count(*) FROM lease_verify();'),
	'0', 'in a read-only transaction: lease_verify() works');
$_->quit for $session, $other, $reader, $on_standby;

# The standby takes over.
$node->stop;
$standby->promote;
is($standby->safe_psql('postgres', q{
	SELECT max(entry_id) AS entry_id FROM credit_lease.ledger \gset
	SELECT entry_id > :entry_id, replayed FROM credit_lease.lease_consume('a', 'tokens', 1, 'promoted')}),
	't|f', 'the promoted standby spends');
is($standby->safe_psql('postgres', q{
	SELECT replayed FROM credit_lease.lease_consume('a', 'tokens', 1.25, 'after the backup')}),
	't', '... and knows the keys');
books_balance($standby, 'on the promoted standby');
$standby->stop;

done_testing();
