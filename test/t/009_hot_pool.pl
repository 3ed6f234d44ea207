# hot_pool with more sessions than stripes can help, in one of two databases whose
# tables have the same numbers, for whoever may read.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use LeaseTest;

my $clients = 70;
my $node = lease_cluster('main', conf => "max_connections = @{[ $clients + 20 ]}\n");

$node->safe_psql('postgres', q{
	SELECT credit_lease.lease_topup('hot', 'tokens', 1000);
	CREATE ROLE reader;
	SELECT credit_lease.lease_grant_access('reader', 'read')});
$node->safe_psql('template1', 'CREATE DATABASE twin TEMPLATE postgres');
is($node->safe_psql('twin', q{SELECT 'credit_lease.account'::regclass::oid}),
	$node->safe_psql('postgres', q{SELECT 'credit_lease.account'::regclass::oid}),
	'another database has a table of the same number');

my $holder = LeaseTest::Session->new($node);
my $call = "SELECT credit_lease.lease_consume('hot', 'tokens', 1);";

$holder->run_safe("BEGIN; $call");
my $waiters = start_pgbench($node, "-c $clients -j 2 -t 1", { call => $call });

becomes($node, "SELECT waiting = $clients FROM credit_lease.hot_pool", 'all who wait are counted');
is($node->safe_psql('postgres', 'SET ROLE reader; SELECT * FROM credit_lease.hot_pool'),
	"hot|tokens|$clients|1|64", 'who may read sees them, and that 64 stripes are the most');
is($node->safe_psql('twin', 'SELECT count(*) FROM credit_lease.hot_pool'), '0', 'in the other database nobody waits');

$holder->run_safe('COMMIT;');
is((finish_pgbench($waiters))[0], 0, 'they go on');
is($node->safe_psql('postgres', 'SELECT count(*) FROM credit_lease.hot_pool'), '0', 'and nobody waits');
books_balance($node, 'after waiting');

$holder->quit;
$node->stop;
done_testing();
