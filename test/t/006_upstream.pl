# Pools that are leased from an upstream, which is well, slow, down, lies or
# refuses: whoever asks for credit gets it or is told why not, nothing is
# minted, all usage is told once, and what is wrong is shown.

use strict;
use warnings;
use feature qw(state);

use FindBin;
use lib "$FindBin::RealBin/../perl";
use IO::Socket::INET;
use JSON::PP;
use LeaseTest;
use LeaseUpstream;
use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

# what no call may take that is to answer at once, or in a fraction of a second;
# those that wait by mistake take a minute
my $no_wait = 25;
my $api_key = 'sk_test_6f1f0c2e9d';

my $node = lease_cluster(
	'upstream',
	conf => "shared_preload_libraries = 'credit_lease'\n"
	  . "credit_lease.databases = 'postgres, second'\n"
	  . "credit_lease.sweep_interval = 100ms\n"
	  . "credit_lease.request_timeout = 1500ms\n"
	  . "credit_lease.acquire_timeout = 60s\n"
	  . "max_connections = 100\n");
my $upstream = LeaseUpstream->start(
	dir => $node->basedir . '/schematic',
	options => [ '--key', $api_key ]);
$upstream->{key_file} = $upstream->key_file($api_key);

my @databases = ('postgres');
my $session = LeaseTest::Session->new($node);

# Runs statements in the session; returns what they return.
sub sql
{
	my ($sql) = @_;

	return $session->run_safe($sql);
}

# Tests what a statement that fails reports: its SQLSTATE, and its DETAIL.
sub fails
{
	my ($sql, $sqlstate, $detail, $name, $of) = @_;
	my (undef, $found) = ($of // $session)->run($sql);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is($found, $sqlstate, $name);
	like(($of // $session)->messages, $detail, "$name: DETAIL") if $detail;
	return;
}

# Runs something and tests that it does not wait.
sub at_once
{
	my ($name, $do) = @_;
	my $begun = time;

	$do->();
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	cmp_ok(time - $begun, '<', $no_wait, "$name: at once");
	return;
}

# Waits until something is true, at most so many seconds; returns whether it is.
sub soon
{
	my ($is_true, $seconds) = @_;
	my $deadline = time + ($seconds // $PostgreSQL::Test::Utils::timeout_default);

	until ($is_true->())
	{
		return 0 if time > $deadline;
		sleep 0.1;
	}
	return 1;
}

# Gives a company credit upstream, and its account a policy of its own with
# these settings, if there are any.
sub account
{
	my ($account, $amount, %policy) = @_;
	my $company = $policy{company_id} // $account;
	my $credit = delete $policy{credit} // 'tokens';
	state $policies = 0;

	# every second pool is striped: that must make no difference to upstreams
	$policy{stripes} //= 4 if %policy && $policies++ % 2;
	$upstream->balance($company, $policy{credit_type_id} // $credit, $amount) if defined $amount;
	sql("INSERT INTO policy (account, credit, " . join(', ', sort keys %policy) . ") VALUES ("
		. join(', ', map { quoted($_) } $account, $credit, map { $policy{$_} } sort keys %policy) . ");")
	  if %policy;
	return;
}

sub last_error
{
	my ($server) = @_;

	return sql("SELECT last_error FROM upstream_status WHERE server = '$server';");
}

sub all_is_well
{
	my ($name) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	books_balance($node, $name);
	$upstream->same_books($name, map { [ $node, $_ ] } @databases);
	return;
}

my $worker = $node->safe_psql('postgres', 'SELECT pid FROM credit_lease.worker_status');

# ---------------------------------------------------------------------------
# An empty pool is supplied while its first request waits.

sql($upstream->server('billing'));
sql(q{INSERT INTO policy (credit, server, lease_size) VALUES (NULL, NULL, 100), ('tokens', 'billing', NULL);});

account('acct:1', 1000);
is(sql("SELECT * FROM lease_consume('acct:1', 'tokens', 10);"), 't|2|10|90|f', 'the first request of a pool is served');
my @asked = $upstream->asked('acquire', 'acct:1');
is(scalar @asked, 1, 'by one acquire');
my $body = $asked[0]{body};
is(join(' ', map { "$_=$body->{$_}" } grep { $_ ne 'expires_at' } sort keys %$body),
	'company_id=acct:1 credit_type_id=tokens requested_amount=100', 'that says who, what and how much');
is(sql("SELECT '$body->{expires_at}'::timestamptz BETWEEN clock_timestamp() + '4 min' AND clock_timestamp() + '5 min';"),
	't', 'and until when');
is($asked[0]{authorized}, 1, 'with the API key');
my ($lease) = $upstream->leases('acct:1');
is(sql("SELECT kind, lease_id, server, granted, remaining, expires_at = '$lease->{expires_at}' FROM open_lease;"),
	"upstream|$lease->{id}|billing|100|90|t", 'and installs what was granted');
is(sql("SELECT lease_id FROM lease_prewarm('acct:1', '{tokens}');"), $lease->{id}, 'which serves the next');
is(scalar $upstream->asked('acquire', 'acct:1'), 1, 'without another request');

# Several that wait for one pool: one request at a time, and all are served.
account('acct:many', 1000);
my @waiting = map { LeaseTest::Session->new($node) } 1 .. 5;
$_->begin("SELECT applied FROM lease_consume('acct:many', 'tokens', 60);") for @waiting;
is(join(' ', map { scalar $_->finish } @waiting), 't t t t t', 'all that wait for a pool are served');
is(join(' ', map { $_->{in_flight} } $upstream->asked('acquire', 'acct:many'), $upstream->asked('extend', 'acct:many')) =~ /^1( 1)*$/, 1,
	'with one request under way at a time');
$_->quit for @waiting;

# One that waits for another transaction, and finds little left, is served, too.
account('acct:queue', 1000);
my $first = LeaseTest::Session->new($node);
$first->run_safe("SELECT lease_prewarm('acct:queue', '{tokens}'); BEGIN; SELECT lease_consume('acct:queue', 'tokens', 60);");
$session->begin("SELECT applied FROM lease_consume('acct:queue', 'tokens', 60);");
becomes($node, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'}, 'a call waits for another one');
$first->run_safe('COMMIT;');
is(scalar $session->finish, 't', 'and is supplied with what is missing then');
$first->quit;

# ---------------------------------------------------------------------------
# More is asked for before it is used up, and nobody waits for that.

is(sql("SELECT available FROM lease_consume('acct:1', 'tokens', 65);"), '25', 'spent down to the low water mark');
becomes($node, "SELECT granted = 200 FROM credit_lease.open_lease WHERE account = 'acct:1'", 'the lease is extended');
($body) = map { $_->{body} } $upstream->asked('extend', 'acct:1');
is($body->{additional_amount}, 100, 'by the size of a lease');
is(sql("SELECT '$body->{expires_at}'::timestamptz BETWEEN clock_timestamp() + '4 min' AND clock_timestamp() + '5 min';"),
	't', 'to live as long as a new one');
is(sql("SELECT available FROM lease_consume('acct:1', 'tokens', 400);"), '0', 'a call that needs more gets that much');

# A company that has run out is asked again, without anybody waiting; also when
# the extension that granted nothing has let the lease live longer.
account('acct:out', 100, lease_duration => '1 minute');
sql("SELECT lease_prewarm('acct:out', '{tokens}');");
soon(sub { sql("SELECT expires_at < clock_timestamp() + '58.8 s' FROM open_lease WHERE account = 'acct:out';") eq 't' });
is(sql("SELECT available FROM lease_consume('acct:out', 'tokens', 80);"), '20', 'spent nearly all there is');
becomes($node, "SELECT error = 'the upstream granted no more' FROM credit_lease.upstream_request WHERE account = 'acct:out'", 'there is no more');
$upstream->balance('acct:out', 'tokens', 1000);
becomes($node, "SELECT granted = 200 FROM credit_lease.open_lease WHERE account = 'acct:out'", 'when there is, it is granted');

# ---------------------------------------------------------------------------
# A lease lives on while it is used, and ends when it is not.

account('acct:short', 100000, lease_duration => '2 seconds', lease_size => 1000);
sql("SELECT lease_consume('acct:short', 'tokens', 1);");
becomes($node, q{
	SELECT EXISTS (SELECT FROM credit_lease.whole_tranche
		WHERE account = 'acct:short' AND expires_at > created_at + '3 seconds')
	  FROM credit_lease.lease_consume('acct:short', 'tokens', 1)}, 'a lease that is used is renewed before it ends');
becomes($node, q{SELECT count(*) = 0 FROM credit_lease.open_lease WHERE account = 'acct:short'}, 'one that is idle is not');
is(sql("SELECT applied FROM lease_consume('acct:short', 'tokens', 1);"), 't', 'and is replaced when it is needed');
cmp_ok($upstream->leases('acct:short'), '>=', 2, 'by another one');

# ---------------------------------------------------------------------------
# The most specific row of the policy decides, for each setting.

account('acct:p', undef, credit => 'images', company_id => 'company p', server => 'billing');
sql("INSERT INTO policy (credit, credit_type_id, event, lease_size, safety_margin)
	VALUES ('images', 'ct images', 'image', 50, '10 seconds');
	INSERT INTO policy (account, lease_duration) VALUES ('acct:p', '1 hour');");
$upstream->balance('company p', 'ct images', 1000);
is(sql("SELECT available FROM lease_consume('acct:p', 'images', 2);"), '48', 'a pool with settings of several rows is served');
($body) = map { $_->{body} } $upstream->asked('acquire', 'company p');
is("$body->{company_id}, $body->{credit_type_id}, $body->{requested_amount}", 'company p, ct images, 50',
	'under the names that the upstream knows');
($lease) = $upstream->leases('company p');
is(sql("SELECT '$lease->{expires_at}'::timestamptz - expires_at, expires_at > clock_timestamp() + '50 min'
	FROM open_lease WHERE account = 'acct:p';"), '00:00:10|t', 'for as long as it says, less the safety margin');
becomes($node, q{SELECT reports = 0 AND NOT EXISTS (SELECT FROM credit_lease.lease_usage u JOIN credit_lease.whole_tranche t
	USING (account, credit, tranche_id) WHERE t.account = 'acct:p' AND t.consumed <> u.consumed)
	FROM credit_lease.upstream_status}, 'its usage is reported');
my ($event) = map { $_->{body} } map { $upstream->events_of('company p', $_) } $upstream->asked('events', 'company p');
is(join(' ', $event->{event}, $event->{quantity}, $event->{company}{id}, $event->{lease_id}),
	"image 2 company p $lease->{id}", 'by the name that the policy gives it');

# ---------------------------------------------------------------------------
# A lease is given back when its policy is gone, or by hand; the upstream hears
# of it when all usage has been reported and no hold has any of it.

account('acct:gone', 1000, server => 'billing', credit => 'coins');
sql("SELECT lease_consume('acct:gone', 'coins', 10);");
sql("DELETE FROM policy WHERE account = 'acct:gone';");
becomes($node, q{SELECT released_at IS NOT NULL AND returned = 90 FROM credit_lease.whole_tranche WHERE account = 'acct:gone'},
	'a lease is released when its policy is deleted');

# ... also when somebody has the account just then, or the lease is still to come
account("acct:$_", 1000, server => 'billing', credit => 'coins') for qw(held coming);
sql("SELECT lease_prewarm('acct:held', '{coins}');");
$first = LeaseTest::Session->new($node);
$first->run_safe("BEGIN; SELECT lease_topup('acct:held', 'coins', 1);");
$upstream->fault(fault => 'hang', match => 'acquire', company_id => 'acct:coming', after_effect => JSON::PP::true);
sql("SELECT lease_prewarm('acct:coming', '{coins}', '100 ms');");
sql("DELETE FROM policy WHERE account IN ('acct:held', 'acct:coming');");
$upstream->clear;
$first->run_safe('COMMIT;');
$first->quit;
becomes($node, "SELECT released_at IS NOT NULL FROM credit_lease.whole_tranche WHERE account = '$_' AND kind = 'upstream'",
	"$_: that lease is released, too") for qw(acct:held acct:coming);

account('acct:back', 1000);
$upstream->fault(fault => 'hang', match => 'events', company_id => 'acct:back', times => undef);
my $hold = sql("SELECT lease_consume('acct:back', 'tokens', 10);
	SELECT reservation_id FROM lease_reserve('acct:back', 'tokens', 20, '1 hour');") =~ s/.*\n//sr;
is(sql("SELECT lease_release('acct:back', 'tokens');"), 't', 'a lease is released by hand');
becomes($node, q{SELECT count(*) = 1 FROM credit_lease.usage_report WHERE account = 'acct:back'}, 'with usage to be reported');
$upstream->clear;
becomes($node, q{SELECT count(*) = 0 FROM credit_lease.usage_report WHERE account = 'acct:back'}, 'which is reported');
is(scalar $upstream->asked('release', 'acct:back'), 0, 'while a hold has some of it, the upstream does not hear of the release');
is(sql("SELECT consumed, refunded FROM lease_settle('acct:back', $hold, 5);"), '5|0', 'the hold is settled');
becomes($node, q{SELECT count(*) = 0 FROM credit_lease.upstream_request WHERE account = 'acct:back'}, 'then it does');
my @order = map { $_->{kind} } grep { ($_->{status} // 0) == 200 && ($_->{company_id} // '') eq 'acct:back' } $upstream->requests;
is("@order", 'acquire events events release', 'after all usage');
($lease) = $upstream->leases('acct:back');
is("$lease->{state} $lease->{used} $lease->{released}", 'released 15 85', 'and has the rest back');

# what is refunded when all is read is told to nobody, and keeps nobody waiting
account('acct:refunded', 1000);
$upstream->fault(fault => 'hang', match => 'events', company_id => 'acct:refunded', times => undef);
my $spent = sql("SELECT entry_id FROM lease_consume('acct:refunded', 'tokens', 7);");
sql("SELECT lease_release('acct:refunded', 'tokens');");
becomes($node, q{SELECT complete FROM credit_lease.lease_usage WHERE account = 'acct:refunded'}, 'all usage of a lease that was released is read');
sql("SELECT lease_refund('acct:refunded', $spent, 3);");
$upstream->clear;
becomes($node, q{SELECT count(*) = 0 FROM credit_lease.upstream_request WHERE account = 'acct:refunded'}, 'after a refund, too, it hears of the release');
($lease) = $upstream->leases('acct:refunded');
is("$lease->{state} $lease->{used} $lease->{released}", 'released 7 93', 'and has been told all that was read');

# ... and while it does not hear of it, the pool is supplied when the lease has ended there
for my $account (qw(acct:kept_1 acct:kept_2))
{
	account($account, 1000, lease_duration => '5 seconds');
	my $kept = sql("SELECT reservation_id FROM lease_reserve('$account', 'tokens', 20, '2 days');");
	is(sql("SELECT lease_release('$account', 'tokens');"), 't', 'a lease is released that is held for long');
	is(sql("SELECT available FROM lease_consume('$account', 'tokens', 1);"), '99', 'a call waits for the next one');
	is(join(' ', map { $_->{state} } $upstream->leases($account)), 'expired live', 'until the upstream has no other');
	is(scalar $upstream->asked('acquire', $account), 2, 'and is not asked in vain');
	sql("SELECT lease_cancel('$account', $kept);");
}

# what is spent of a chunk is reported when the chunk ends
account('acct:chunk', 1000);
my $chunk = sql("SELECT chunk_id FROM lease_chunk_allocate('acct:chunk', 'tokens', 20, 'worker', '1 hour');");
sql("SELECT lease_consume('acct:chunk', 'tokens', 10); SELECT lease_chunk_consume('acct:chunk', $chunk, 5, 'worker');");
is(sql("SELECT lease_release('acct:chunk', 'tokens');"), 't', 'a lease is released while a chunk of it lives');
becomes($node, q{SELECT u.consumed = 10 AND NOT EXISTS (SELECT FROM credit_lease.usage_report WHERE account = 'acct:chunk')
	FROM credit_lease.lease_usage u WHERE u.account = 'acct:chunk'}, 'what the pool has spent of it is reported');
is(scalar $upstream->asked('release', 'acct:chunk'), 0, 'while the chunk lives, the upstream does not hear of the release');
is(sql("SELECT remaining FROM lease_chunk_consume('acct:chunk', $chunk, 3, 'worker');"), '12', 'of which can be spent');
is(sql("SELECT status FROM lease_chunk_release('acct:chunk', $chunk, 'worker');"), 'released', 'the chunk is released');
becomes($node, q{SELECT count(*) = 0 FROM credit_lease.upstream_request WHERE account = 'acct:chunk'}, 'then it does');
($lease) = $upstream->leases('acct:chunk');
is("$lease->{state} $lease->{used} $lease->{released}", 'released 18 82', 'and has been told what was spent of the chunk');

# a session of a pool that is empty waits for a lease, as what is added to it does; it is reported when it ends
account('acct:session', 1000);
is(sql("SELECT deposit, status FROM lease_session_open('acct:session', 'tokens', 's', 90, '1 hour');"), '90|open',
	'a session waits for credit');
is(sql("SELECT deposit FROM lease_session_topup('acct:session', 's', 60);"), '150', 'and for more of it');
sql("SELECT lease_session_authorize('acct:session', 's', 30); SELECT lease_session_charge('acct:session', 's', 25);");
is(sql("SELECT spent FROM lease_session_close('acct:session', 's', 30);"), '30', 'it is charged and closed');
becomes($node, q{SELECT sum(u.consumed) = 30 AND NOT EXISTS (SELECT FROM credit_lease.usage_report WHERE account = 'acct:session')
	FROM credit_lease.lease_usage u WHERE u.account = 'acct:session'}, 'what was spent of it is reported');
is(eval { my $used = 0; $used += $_->{used} for $upstream->leases('acct:session'); $used }, 30, 'once');
all_is_well('releases');

# ---------------------------------------------------------------------------
# lease_prewarm() says how things are.

sql($upstream->server('hangs') . $upstream->server('down', url => 'http://127.0.0.1:1')
	. $upstream->server('no key', key_file => '/nowhere/key'));
account('acct:w', 1000, credit => 'well', server => 'billing');
account('acct:w', 1000, credit => 'hangs', server => 'hangs', company_id => 'hangs');
account('acct:w', 0, credit => 'poor', server => 'billing', company_id => 'poor');
account('acct:w', undef, credit => 'unknown', server => 'billing', company_id => 'nobody');
account('acct:w', undef, credit => 'no key', server => 'no key');
$upstream->fault(fault => 'hang', company_id => 'hangs', times => undef);
is(sql("SELECT credit, lease_id IS NOT NULL, available, status
	FROM lease_prewarm('acct:w', '{well,none,poor,unknown,no key}', '1 minute');"),
	join("\n", 'well|t|100|live', 'none|f|0|no upstream', 'poor|f|0|refused', 'unknown|f|0|refused', 'no key|f|0|unreachable'),
	'each has a word');
is(sql("SELECT status FROM lease_prewarm('acct:w', '{hangs}', '100 ms');"), 'pending', 'so has what is to come');
$upstream->clear;
is(sql("SELECT status FROM lease_prewarm('acct:w', '{hangs}', '1 minute');"), 'live', 'and it comes');
is(sql("SELECT status, available FROM lease_prewarm('acct:w', '{well}');"), 'live|100', 'what is there is not asked for again');
is(scalar(grep { $_->{body}{credit_type_id} eq 'well' } $upstream->asked('acquire', 'acct:w')), 1, '... at all');

# ---------------------------------------------------------------------------
# No call waits that this could not help, and none longer than it may.

account("acct:$_", 1000) for qw(held rr zero try replay);
at_once('a call whose transaction has the account', sub {
	sql("BEGIN; SELECT lease_topup('acct:held', 'tokens', 1);");
	fails("SELECT lease_consume('acct:held', 'tokens', 10);", 'LC001', qr/Available: 1, held: 0, requested: 10\./,
		'a call whose transaction has the account is refused');
	sql('ROLLBACK;');
});
becomes($node, "SELECT count(*) = 1 FROM credit_lease.open_lease WHERE account = 'acct:held' AND kind = 'upstream'",
	'but the upstream is asked, for the next one');
at_once('a call above READ COMMITTED', sub {
	sql('BEGIN ISOLATION LEVEL REPEATABLE READ;');
	fails("SELECT lease_consume('acct:rr', 'tokens', 10);", 'LC001', undef, 'a call above READ COMMITTED is refused');
	sql('ROLLBACK;');
});
becomes($node, "SELECT count(*) = 1 FROM credit_lease.open_lease WHERE account = 'acct:rr' AND kind = 'upstream'",
	'but the upstream is asked, for the next one');
at_once('a call that may not wait', sub {
	sql('SET credit_lease.acquire_timeout = 0;');
	is(sql("SELECT applied, available FROM lease_try_consume('acct:try', 'tokens', 10);"), 'f|0', 'a call that may not wait returns so');
	fails("SELECT lease_consume('acct:zero', 'tokens', 10);", 'LC001', undef, '... or is refused');
	sql('RESET credit_lease.acquire_timeout;');
});
# a session has one place to say what it waits for: the last of the two is asked for sure
becomes($node, "SELECT count(*) = 1 FROM credit_lease.open_lease WHERE account = 'acct:zero' AND kind = 'upstream'",
	'but the upstream is asked, for the next one');
at_once('what was done before', sub {
	sql("SELECT lease_consume('acct:replay', 'tokens', 100, 'key');");
	$upstream->fault(fault => 'hang', company_id => 'acct:replay', times => undef);
	is(sql("SELECT applied, replayed FROM lease_consume('acct:replay', 'tokens', 100, 'key');"), 't|t',
		'what was done before is replayed, whatever the upstream does');
	$upstream->clear;
});

account('acct:hangs', 1000, server => 'hangs');
account('acct:down', 1000, server => 'down');
$upstream->fault(fault => 'hang', company_id => 'acct:hangs', times => undef);
sql("SET credit_lease.acquire_timeout = '300ms';");
for my $server (qw(hangs down))
{
	at_once("an upstream that is not well ($server)", sub {
		my $begun = time;
		fails("SELECT lease_consume('acct:$server', 'tokens', 10);", 'LC008',
			qr/^DETAIL:  Available: 0, held: 0, requested: 10; upstream: .+\.$/m, "$server: a call fails");
		cmp_ok(time - $begun, '>', 0.25, "$server: after it has waited") if $server eq 'hangs';
		is(sql("SELECT applied, reservation_id, available FROM lease_try_reserve('acct:$server', 'tokens', 10);"), 'f|~|0',
			"$server: another returns so");
	});
}
sql("RESET credit_lease.acquire_timeout;");
$upstream->clear;
like(last_error('down'), qr/^could not connect$/, 'the status says what is wrong');
is(sql("SELECT applied FROM lease_reserve('acct:hangs', 'tokens', 10, min_amount => 1);"), 't', 'it goes on when it is well');

at_once('a refusal', sub {
	account('acct:poor', 0);
	fails("SELECT lease_consume('acct:poor', 'tokens', 10);", 'LC001', qr/Available: 0, held: 0, requested: 10; upstream: status 400: the company has no credit left\./,
		'a call is refused as the upstream refuses');
	is(sql("SELECT applied FROM lease_try_consume('acct:poor', 'tokens', 10);"), 'f', 'or returns so');
});
like(last_error('billing'), qr/^status 400: the company has no credit left$/, 'the status says why');
$upstream->balance('acct:poor', 'tokens', 30);
ok($node->poll_query_until('postgres', "SELECT applied FROM credit_lease.lease_try_consume('acct:poor', 'tokens', 10)"),
	'it is asked again after a while, and what there is is granted');
is(sql("SELECT granted, remaining FROM open_lease WHERE account = 'acct:poor';"), '30|20', 'which may be less than was asked for');
all_is_well('waits');

# ---------------------------------------------------------------------------
# Whatever goes wrong on the way, once or twice for each kind of request, is
# shown and mended. Each has an account, a company and a server of its own, so
# that all of it happens at once.

my $status_500 = qr/^status 500: scripted fault$/;
my $closed = qr/^(the connection was closed|the reply was cut short)$/;
my $no_json = qr/^invalid input syntax for type json$/;
my $no_amount = qr/^granted in the reply is no amount$/;
my $too_long = qr/^(the reply is longer than 256 kB|timed out)$/;
my @faults = (

	# fault, further fields, the error for each kind of request (none if it is not there)
	[ slow => { seconds => 0.3 }, {} ],
	[ status => {}, { map { $_ => $status_500 } qw(acquire extend release events) } ],
	[ status => { code => 429, retry_after => 1, error => 'slowly' },
		{ map { $_ => qr/^status 429: slowly$/ } qw(extend release events) }, qw(extend release events) ],
	[ status => { code => 503, after_effect => JSON::PP::true },
		{ map { $_ => qr/^status 503/ } qw(acquire extend release events) } ],
	[ hang => {}, { map { $_ => qr/^timed out$/ } qw(acquire extend release events) } ],
	[ hang => { after_effect => JSON::PP::true }, { map { $_ => qr/^timed out$/ } qw(acquire extend release events) } ],
	[ reset => { times => 2 }, { map { $_ => $closed } qw(acquire extend release events) } ],

	# up to six times, libcurl takes it for a connection that was kept too long
	[ close => { times => 7 }, { map { $_ => $closed } qw(acquire extend release events) } ],
	[ malformed => {}, { map { $_ => $no_json } qw(acquire extend) } ],
	[ malformed => { body => '[]' }, { map { $_ => qr/^the reply lacks granted$/ } qw(acquire extend) } ],
	[ malformed => { body => '{"data": null, "params": null}' }, { map { $_ => qr/^the reply lacks granted$/ } qw(acquire extend) } ],
	[ mistyped => {}, { map { $_ => qr/^the reply lacks granted$/ } qw(acquire extend) } ],
	[ mistyped => { value => '100' }, { map { $_ => qr/^granted in the reply is no number$/ } qw(acquire extend) } ],
	[ mistyped => { field => 'id' }, { map { $_ => qr/^the reply lacks lease_id$/ } qw(acquire extend) } ],
	[ mistyped => { field => 'id', value => 'x' x 513 }, { acquire => qr/^lease_id in the reply is empty, too long/,
		extend => qr/^lease_id in the reply is empty, too long/ } ],
	[ mistyped => { field => 'id', value => 'another' }, { extend => qr/^lease_id in the reply is another one than was asked about$/ },
		'extend', 'release' ],
	[ mistyped => { field => 'expires_at', value => 'infinity' }, { map { $_ => qr/^expires_at in the reply is no time$/ } qw(acquire extend) } ],
	[ mistyped => { field => 'credit_type_id', value => 'gold' },
		{ map { $_ => qr/^credit_type_id in the reply is another one than was asked about$/ } qw(acquire extend) } ],
	[ mistyped => { field => 'released_at', value => '2026-01-01T00:00:00Z' },
		{ map { $_ => qr/^the lease in the reply is released$/ } qw(acquire extend) } ],
	[ negative => {}, { map { $_ => $no_amount } qw(acquire extend) } ],
	[ absurd => {}, { map { $_ => $no_amount } qw(acquire extend) } ],
	[ other_company => {}, { map { $_ => qr/^company_id in the reply is another one than was asked about$/ } qw(acquire extend) } ],
	[ past_expiry => {}, { map { $_ => qr/^the lease in the reply has expired$/ } qw(acquire extend) } ],
	[ null_lists => {}, {} ],
	[ huge => { mib => 1 }, { map { $_ => $too_long } qw(acquire extend release events) } ],
	[ huge => { mib => 1, chunked => JSON::PP::true }, { map { $_ => $too_long } qw(acquire extend release events) } ],
	[ stale_total => {}, { extend => qr/^the upstream granted no more$/ } ],
	[ redirect => {}, { map { $_ => qr/^status 302$/ } qw(acquire extend release events) } ]);

my @ill;
for my $kind (qw(acquire extend release events))
{
	for my $n (0 .. $#faults)
	{
		my ($fault, $fields, $error, @kinds) = @{ $faults[$n] };
		my $name = join ' ', $kind, $n, $fault, map { "$_=" . substr $fields->{$_}, 0, 20 } sort keys %$fields;
		$name =~ s/[^\w= ]//g;

		next if @kinds && !grep { $_ eq $kind } @kinds;
		push @ill, { kind => $kind, name => substr($name, 0, 63), error => $error->{$kind} };
		sql($upstream->server($ill[-1]{name}));
		account($ill[-1]{name}, 1000, server => $ill[-1]{name});
		$upstream->fault(fault => $fault, match => $kind, company_id => $ill[-1]{name}, %$fields);
	}
}

# Tests that those of a kind have had their errors, and are over them.
sub over_it
{
	my ($kind, $query) = @_;

	for my $ill (grep { $_->{kind} eq $kind } @ill)
	{
		my $account = quoted($ill->{name});

		ok(soon(sub { sql($query =~ s/ACCOUNT/$account/gr) eq 't' }), "$ill->{name}: it is mended");
		if ($ill->{error})
		{
			like(last_error($ill->{name}), $ill->{error}, "$ill->{name}: and shown");
			ok(slurp_file($node->logfile) =~ /LOG:  .*upstream "\Q$ill->{name}\E" .*(failed to|was not taken)/, "$ill->{name}: and logged");
		}
		else
		{
			is(last_error($ill->{name}), '~', "$ill->{name}: and no error");
		}
	}
	return;
}

my @sessions;
for my $ill (grep { $_->{kind} eq 'acquire' } @ill)
{
	push @sessions, LeaseTest::Session->new($node);
	$sessions[-1]->begin("SELECT applied FROM lease_consume(" . quoted($ill->{name}) . ", 'tokens', 5);");
}
$_->{kind} eq 'acquire' || sql("SELECT lease_consume(" . quoted($_->{name}) . ", 'tokens', 5);") for @ill;
is(join('', map { scalar $_->finish } @sessions), 't' x @sessions, 'faults of acquire: every call that waits is served');
$_->quit for @sessions;
over_it('acquire', 'SELECT granted = 100 FROM open_lease WHERE account = ACCOUNT;');
over_it('events', q{SELECT t.consumed = u.consumed AND NOT EXISTS (SELECT FROM usage_report r WHERE r.account = ACCOUNT)
	FROM lease_usage u JOIN whole_tranche t USING (account, credit, tranche_id) WHERE t.account = ACCOUNT;});

# 20 are left, so that more is asked for at once, and again when somebody needs it
sql("SELECT lease_consume(" . quoted($_->{name}) . ", 'tokens', 75);") for grep { $_->{kind} eq 'extend' } @ill;
over_it('extend', "SELECT applied FROM lease_try_consume(ACCOUNT, 'tokens', 21);");

sql("SELECT lease_release(" . quoted($_->{name}) . ", 'tokens');") for @ill;
over_it('release', 'SELECT count(*) = 0 FROM upstream_request WHERE account = ACCOUNT;');
all_is_well('faults');
is(sql(q{SELECT count(*) FROM upstream_status WHERE in_flight <> 0;}), 0, 'nothing is under way');

# Replies that come when the lease has ended.
account('acct:late', 1000, lease_duration => '1 second');
$upstream->fault(fault => 'late', match => 'acquire', company_id => 'acct:late');
is(sql("SELECT applied FROM lease_consume('acct:late', 'tokens', 80);"), 't', 'late acquire: the call gets the next lease');
like(last_error('billing'), qr/^the lease in the reply has expired$/, 'late acquire: shown');
account('acct:later', 1000, lease_duration => '1 second');
$upstream->fault(fault => 'late', match => 'extend', company_id => 'acct:later');
is(sql("SELECT applied FROM lease_consume('acct:later', 'tokens', 80);"), 't', 'late extend: spent down to the low water mark');
becomes($node, q{SELECT count(*) = 0 FROM credit_lease.open_lease WHERE account = 'acct:later'}, 'late extend: the lease ends');
is(sql("SELECT available FROM lease_consume('acct:later', 'tokens', 30);"), '70', 'late extend: nothing is added to the next');
cmp_ok(($upstream->leases('acct:later'))[0]{granted}, '==', 200, 'late extend: the upstream had done it');

# An upstream that gives the same reply twice.
account('acct:twice', 1000);
$upstream->fault(fault => 'twice', match => 'acquire', company_id => 'acct:twice');
sql("SELECT lease_consume('acct:twice', 'tokens', 10); SELECT lease_release('acct:twice', 'tokens');");
is(sql("SELECT available FROM lease_consume('acct:twice', 'tokens', 80);"), '20', 'twice acquire: a lease is installed once');
$upstream->fault(fault => 'twice', match => 'extend', company_id => 'acct:twice');
becomes($node, q{SELECT granted = 200 FROM credit_lease.open_lease WHERE account = 'acct:twice'}, 'twice extend: it is extended');
sql("SELECT lease_consume('acct:twice', 'tokens', 95);");
becomes($node, q{SELECT granted = 300 FROM credit_lease.open_lease WHERE account = 'acct:twice'}, 'twice extend: once');
all_is_well('old replies');

# An upstream that asks for patience.
sql($upstream->server('patience'));
account('acct:patience', 1000, server => 'patience');
$upstream->fault(fault => 'status', code => 429, retry_after => 2, error => 'not now', company_id => 'acct:patience');
at_once('an upstream that asks for patience', sub {
	fails("SELECT lease_consume('acct:patience', 'tokens', 10);", 'LC008', qr/upstream: status 429: not now\./,
		'an upstream that asks for patience: who waits is told');
});
is(sql("SELECT back_off_until BETWEEN last_error_at + '1900 ms' AND last_error_at + '2100 ms' FROM upstream_status WHERE server = 'patience';"),
	't', 'and the status says how long');
becomes($node, q{SELECT available = 100 FROM credit_lease.lease_prewarm('acct:patience', '{tokens}', '1 minute')}, 'then it is asked again');
is(scalar $upstream->asked('acquire', 'acct:patience'), 2, 'and not before');
is($node->safe_psql('postgres', 'SELECT pid, last_error FROM credit_lease.worker_status'), "$worker|",
	'nothing of this is an error of the worker');

# ---------------------------------------------------------------------------
# A key that is of no use stops the server, and no other; the right one makes it
# go on.

my %bad_key = (
	'wrong key' => [ $upstream->key_file('sk_other'), qr/^status 401: the API key is missing or unknown$/ ],
	'forbidden key' => [ $upstream->key_file('forbidden-key'), qr/^status 403: the API key has no access$/ ],
	'empty key' => [ $upstream->key_file(''), qr/^the API key file is empty$/ ],
	'two words' => [ $upstream->key_file('a key'), qr/^the API key file must be one line of visible ASCII characters$/ ],
	'public key' => [ $upstream->key_file($api_key), qr/^the API key file must not be accessible by group or others$/ ],
	'missing key' => [ '/nowhere/key', qr/^the API key file could not be opened: No such file or directory$/ ],
	'directory' => [ $node->basedir, qr/^the API key file is not a regular file$/ ]);
chmod 0640, $bad_key{'public key'}[0];
for my $server (sort keys %bad_key)
{
	my ($key_file, $error) = @{ $bad_key{$server} };

	sql($upstream->server($server, key_file => $key_file));
	account($server, 1000, server => $server);
	at_once($server, sub {
		fails("SELECT lease_consume('$server', 'tokens', 10);", 'LC008', qr/upstream: .+\.$/m, "$server: a call fails");
	});
	like(last_error($server), $error, "$server: the status says why");
	like(slurp_file($node->logfile), qr/WARNING:  upstream "$server" /, "$server: and the log");
	is(sql("SELECT back_off_until > clock_timestamp() + '1 second' FROM upstream_status WHERE server = '$server';"), 't',
		"$server: it is left alone");
	sql("ALTER USER MAPPING FOR CURRENT_USER SERVER \"$server\" OPTIONS (SET api_key_file '$upstream->{key_file}');");
	ok(soon(sub { sql("SELECT applied FROM lease_try_consume('$server', 'tokens', 10);") eq 't' }), "$server: with the right one it goes on");
}

# ---------------------------------------------------------------------------
# The certificate of an upstream is verified.

my $tls = LeaseUpstream->start(dir => $node->basedir . '/tls', tls => 1, options => [ '--key', $api_key ]);
sql($upstream->server('untrusted', url => $tls->url));
$tls->balance('acct:tls', 'tokens', 1000);
account('acct:tls', undef, server => 'untrusted');
sql("SELECT lease_prewarm('acct:tls', '{tokens}', '100 ms');");
becomes($node, q{SELECT last_error = 'the certificate is not trusted' FROM credit_lease.upstream_status WHERE server = 'untrusted'},
	'a certificate of nobody is not trusted');
is(scalar $tls->requests, 0, 'and nothing is sent');
sql("DELETE FROM policy WHERE account = 'acct:tls';");

# ---------------------------------------------------------------------------
# Accounts, and databases, that have one company between them: one of them has
# its lease at a time, and nobody spends what another one has.

$node->safe_psql('postgres', 'CREATE DATABASE second');
$node->safe_psql('second', 'CREATE EXTENSION credit_lease');
my $second = LeaseTest::Session->new($node, 'second');
$second->run_safe($upstream->server('shared')
	. q{INSERT INTO policy (server, company_id, lease_size) VALUES ('shared', 'shared', 100);});
sql($upstream->server('shared'));
account($_, undef, server => 'shared', company_id => 'shared') for qw(one two);
$upstream->balance('shared', 'tokens', 1000);
becomes($node, 'SELECT running FROM credit_lease.worker_status', 'another database has a worker', dbname => 'second');

# Returns who has a lease of the company now, and how much all have together.
sub who_has_it
{
	my $live = "SELECT account FROM open_lease WHERE server = 'shared' ORDER BY account;";
	my $granted = "SELECT coalesce(sum(granted), 0) FROM tranche WHERE server = 'shared';";

	return ([ split(/\n/, sql($live)), split(/\n/, $second->run_safe($live)) ], sql($granted) + $second->run_safe($granted));
}

my @race = ($second, map { LeaseTest::Session->new($node) } 1 .. 2);
$race[$_]->begin("SELECT status FROM lease_prewarm('" . (qw(three one two))[$_] . "', '{tokens}', '1 second');") for 0 .. 2;
my @status = map { scalar $_->finish } @race;
is(scalar(grep { $_ eq 'live' } @status), 1, 'of three that lease for one company, one has its lease') or diag("@status");
my ($who, $granted) = who_has_it();
is(scalar @$who, 1, 'and no other');
cmp_ok($granted, '==', ($upstream->leases('shared'))[0]{granted}, 'nothing is minted');
like(join('', map { $_->run_safe("SELECT last_error FROM upstream_status WHERE server = 'shared';") } $second, $session),
	qr/the lease in the reply is not the one that was asked for/, 'the status says why the others have none');

my $holder = $who->[0] eq 'three' ? $second : $session;
is($holder->run_safe("SELECT applied FROM lease_consume('$who->[0]', 'tokens', 10);"), 't', 'who has it spends');
is($holder->run_safe("SELECT lease_release('$who->[0]', 'tokens');"), 't', 'and gives it back');
ok(soon(sub { @{ (who_has_it())[0] } == 1 }), 'then another one gets it');
push @databases, 'second';
books_balance($node, 'one company', dbname => 'second');
all_is_well('one company');
$_->quit for @race;

# A company of several accounts is in nobody else's way.
sql($upstream->server('busy'));
account("busy $_", undef, server => 'busy', company_id => 'busy') for 1 .. 10;
account('neighbour', 1000, server => 'busy');
$upstream->balance('busy', 'tokens', 1000);
@sessions = map { LeaseTest::Session->new($node) } 1 .. 10;
$sessions[ $_ - 1 ]->begin("SELECT status FROM lease_prewarm('busy $_', '{tokens}', '1 second');") for 1 .. 10;
is(scalar(grep { $_->finish eq 'live' } @sessions), 1, 'of ten that lease for one company, one has its lease');
$_->quit for @sessions;
is(sql("SELECT back_off_until FROM upstream_status WHERE server = 'busy';"), '~', 'which does not stop the server');
is($session->run("SELECT applied FROM lease_try_consume('neighbour', 'tokens', 10);"), 't', 'nor keep another company from its credit');
sql("DELETE FROM policy WHERE server = 'busy';");

# ---------------------------------------------------------------------------
# Usage: what is committed is told once, and nothing else.

account("acct:$_", 1000) for qw(undone reply batch early after part);
sql("BEGIN; SELECT lease_topup('acct:undone', 'other', 1); ROLLBACK; SELECT lease_consume('acct:undone', 'tokens', 1);
	BEGIN; SELECT lease_consume('acct:undone', 'tokens', 10); SAVEPOINT s; ROLLBACK;
	BEGIN; SELECT lease_consume('acct:undone', 'tokens', 2); SAVEPOINT s; SELECT lease_consume('acct:undone', 'tokens', 20); ROLLBACK TO s; COMMIT;");
$upstream->fault(fault => 'reset', match => 'events', company_id => 'acct:reply', times => 2);
sql("SELECT lease_consume('acct:reply', 'tokens', 7);");
all_is_well('usage');
cmp_ok(($upstream->leases('acct:undone'))[0]{used}, '==', 3, 'what was rolled back is not reported');
cmp_ok(($upstream->leases('acct:reply'))[0]{used}, '==', 7, 'what was reported is charged once');
cmp_ok($upstream->books->{events}{duplicates}, '>=', 1, '... though it came again, as the reply was lost');

sql("SELECT lease_prewarm('acct:batch', '{tokens}');");
sql("SELECT count(lease_consume('acct:batch', 'tokens', 0.125)) FROM generate_series(1, 250);");
all_is_well('batches');
my @n = map { scalar @{ $_->{body}{events} } } $upstream->asked('events', 'acct:batch');
cmp_ok(scalar @n, '>=', 3, 'many events come in several requests');
is(scalar(grep { $_ > 100 } @n), 0, "no request has more than 100 events (@n)");
cmp_ok(($upstream->leases('acct:batch'))[0]{used}, '==', 31.25, 'and all of them come');

# A refund of what is not reported yet takes it off; a later one is taken off
# what is reported next.
sql("SELECT lease_prewarm('acct:early', '{tokens}'); SELECT lease_prewarm('acct:after', '{tokens}');");
sql("SELECT lease_refund('acct:early', entry_id, 4) FROM lease_consume('acct:early', 'tokens', 10);");
my $entry = sql("SELECT entry_id FROM lease_consume('acct:after', 'tokens', 10);");
all_is_well('before the refund');
cmp_ok(($upstream->leases('acct:early'))[0]{used}, '==', 6, 'what is refunded before is not reported');
sql("SELECT lease_refund('acct:after', $entry, 4); SELECT lease_consume('acct:after', 'tokens', 3);");
all_is_well('after the refund');
cmp_ok(($upstream->leases('acct:after'))[0]{used}, '==', 10, 'what is refunded later is owed');
sql("SELECT lease_consume('acct:after', 'tokens', 8);");
all_is_well('after some more usage');
cmp_ok(($upstream->leases('acct:after'))[0]{used}, '==', 17, 'and taken off what is reported next');

# A report that the upstream refuses for good is kept, and keeps no other.
sql("SELECT lease_prewarm('acct:part', '{tokens}');");
$upstream->fault(fault => 'status', code => 400, error => 'we do not know that', match => 'events', company_id => 'acct:part', times => 2);
sql("SELECT lease_consume('acct:part', 'tokens', n) FROM generate_series(1, 3) n;");
all_is_well('a report that is refused');
is(sql("SELECT trim_scale(quantity), error, refused_at IS NOT NULL FROM usage_report;"), '1|status 400: we do not know that|t',
	'a report that is refused is kept');
is(sql("SELECT refused_reports, reports FROM upstream_status WHERE server = 'billing';"), '1|0', 'and shown');
cmp_ok(($upstream->leases('acct:part'))[0]{used}, '==', 5, 'the others of its request go on');
sql("UPDATE usage_report SET refused_at = NULL;");
becomes($node, 'SELECT count(*) = 0 FROM credit_lease.usage_report', 'it can be sent again');
cmp_ok(($upstream->leases('acct:part'))[0]{used}, '==', 6, 'and is charged then');

# ---------------------------------------------------------------------------
# A dialect of one's own: two functions, of a server's owner who is nobody in
# particular, and run as such.

$node->safe_psql('postgres', q{
	CREATE ROLE acme LOGIN;
	GRANT USAGE ON FOREIGN DATA WRAPPER credit_lease TO acme;
	CREATE SCHEMA acme AUTHORIZATION acme;
	SET ROLE acme;
	CREATE TABLE acme.seen (who text, what text);
	CREATE FUNCTION acme.plain_request(operation text, request jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO acme.seen VALUES (current_user, request::text);
		RETURN jsonb_build_object(
			'url', (request->>'url') || CASE operation WHEN 'report' THEN '/batch' ELSE '/billing/credits/lease' END
				|| CASE operation WHEN 'extend' THEN '/' || (request->>'lease_id') || '/extend' ELSE '' END,
			'headers', jsonb_build_object('X-Schematic-Api-Key', request->>'api_key'),
			'body', CASE operation WHEN 'report' THEN jsonb_build_object('events', (
				SELECT jsonb_agg(jsonb_build_object('type', 'track', 'api_key', request->'api_key',
						'idempotency_key', e->'idempotency_key', 'sent_at', e->'created_at',
						'body', jsonb_build_object('event', 'acme', 'quantity', e->'quantity', 'lease_id', e->'lease_id')))
				  FROM jsonb_array_elements(request->'events') e))
				ELSE jsonb_build_object('company_id', request->'company_id', 'credit_type_id', request->'credit_type_id',
					'requested_amount', request->'amount', 'expires_at', request->'expires_at', 'additional_amount', 1) END);
	END $$;
	CREATE FUNCTION acme.plain_outcome(operation text, request jsonb, status integer, reply jsonb) RETURNS jsonb LANGUAGE sql
		RETURN CASE WHEN status <> 200 THEN jsonb_build_object('error', 'acme: ' || (reply->>'error'))
			ELSE (reply->'data') || jsonb_build_object('lease_id', reply->'data'->'id', 'granted', reply->'data'->'granted_amount') END;});

# Has acme make a server with a dialect of plpgsql bodies; NULL for the plain one's.
sub acme_server
{
	my ($name, $request, $outcome) = @_;
	my $plain = "RETURN acme.plain_request(operation, request);";
	my $plain_outcome = "RETURN acme.plain_outcome(operation, request, status, reply);";
	my $url = $upstream->url;

	$node->safe_psql('postgres', qq{
		SET ROLE acme;
		CREATE FUNCTION acme.${name}_request(operation text, request jsonb) RETURNS jsonb LANGUAGE plpgsql AS
			\$\$ BEGIN ${\($request // $plain)} END \$\$;
		CREATE FUNCTION acme.${name}_outcome(operation text, request jsonb, status integer, reply jsonb) RETURNS jsonb LANGUAGE plpgsql AS
			\$\$ BEGIN ${\($outcome // $plain_outcome)} END \$\$;
		CREATE SERVER "$name" FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'acme.$name', url '$url');
		RESET ROLE;
		CREATE USER MAPPING FOR CURRENT_USER SERVER "$name" OPTIONS (api_key_file '$upstream->{key_file}');});
	account("acct:$name", 1000, server => $name, lease_duration => '1 second');
	return;
}

acme_server('own');
is(sql("SELECT available FROM lease_consume('acct:own', 'tokens', 10);"), 90, 'a dialect of one\'s own serves');
all_is_well('a dialect of one\'s own');
is(sql("SELECT DISTINCT who FROM acme.seen;"), 'acme', 'its functions run as the owner of the server');
acme_server('refuses');
$upstream->fault(fault => 'status', code => 400, error => 'no', company_id => 'acct:refuses', times => undef);
fails("SELECT lease_consume('acct:refuses', 'tokens', 10);", 'LC001', undef, 'and its refusals are refusals');
is(last_error('refuses'), 'status 400: acme: no', 'in its words');
$upstream->clear;

my %rubbish = (
	raises => [ "RAISE EXCEPTION 'this cannot be';", undef, qr/^this cannot be$/ ],
	writes => [ "CREATE TABLE acme.t (); RETURN '{}';", undef, qr/^cannot execute|its url is no string$/ ],
	nothing => [ 'RETURN NULL;', undef, qr/its value is no object$/ ],
	array => [ "RETURN '[]';", undef, qr/its value is no object$/ ],
	no_url => [ "RETURN '{}';", undef, qr/its url is no string$/ ],
	scheme => [ q{RETURN '{"url": "file:///etc/passwd", "body": {}}';}, undef, qr/^invalid URL in option "url"$/ ],
	elsewhere => [ q{RETURN '{"url": "http://192.0.2.1/", "body": {}}';}, undef, qr/^invalid URL in option "url"$/ ],
	no_body => [ q{RETURN '{"url": "https://localhost"}';}, undef, qr/its body is neither an object nor an array$/ ],
	header => [ q{RETURN '{"url": "https://localhost", "headers": {"A": "b\nC: d"}, "body": {}}';}, undef,
		qr/its headers have characters that a header must not have$/ ],
	headers => [ q{RETURN '{"url": "https://localhost", "headers": ["A"], "body": {}}';}, undef, qr/its headers are no object$/ ],
	baffled => [ undef, "RAISE EXCEPTION 'what is this?';", qr/^what is this\?$/ ],
	silent => [ undef, 'RETURN NULL;', qr/its value is no object$/ ],
	wrong => [ undef, q{RETURN '{"error": 1}';}, qr/its error is no string$/ ],
	empty => [ undef, q{RETURN '{}';}, qr/^the reply lacks granted$/ ]);
acme_server($_, @{ $rubbish{$_} }[ 0, 1 ]) for sort keys %rubbish;
sql("SELECT lease_prewarm('acct:$_', '{tokens}', '50 ms');") for sort keys %rubbish;
for my $name (sort keys %rubbish)
{
	becomes($node, "SELECT failures > 0 FROM credit_lease.upstream_status WHERE server = '$name'", "a dialect that makes rubbish ($name) has failed");
	like(last_error($name), $rubbish{$name}[2], '... and the status says why');
}
is(sql("SELECT available FROM lease_consume('acct:1', 'tokens', 1);") >= 0, 1, 'nobody else is in trouble');

# What it sets does not outlive its call: the worker has more rights than it.
acme_server('cuckoo', q{PERFORM set_config('search_path', 'acme, pg_catalog', false); RETURN acme.plain_request(operation, request);});
$node->safe_psql('postgres', q{
	SET ROLE acme;
	CREATE FUNCTION acme.same(text, text) RETURNS boolean LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO acme.seen VALUES (current_user, 'cuckoo');
		RETURN $1 OPERATOR(pg_catalog.=) $2;
	END $$;
	CREATE OPERATOR acme.= (LEFTARG = text, RIGHTARG = text, FUNCTION = acme.same);});
sql("SELECT lease_consume('acct:cuckoo', 'tokens', 1);");
all_is_well('a dialect that changes settings');
is(sql("SELECT count(*) FROM acme.seen WHERE who <> 'acme';"), 0, 'what a dialect sets does not make others run its functions');
sql("DROP OPERATOR acme.= (text, text);");

# ---------------------------------------------------------------------------
# The API key is nowhere but in its file and in requests, even when an upstream
# says it back.

my @echo = (error => "the key $api_key is bad", times => undef);
account("acct:$_", 1000) for qw(echo told);
sql("SELECT lease_prewarm('acct:told', '{tokens}');");
$upstream->fault(fault => 'status', code => 400, match => 'acquire', company_id => 'acct:echo', @echo);
fails("SELECT lease_consume('acct:echo', 'tokens', 10);", 'LC001', undef, 'an upstream says the API key back');
is(last_error('billing'), 'status 400: the key (the API key) is bad', 'it is cut out');
is(sql("SELECT error FROM upstream_request WHERE account = 'acct:echo';"), 'status 400: the key (the API key) is bad', 'here, too');
$upstream->fault(fault => 'status', code => 400, match => 'events', company_id => 'acct:told', @echo);
sql("SELECT lease_consume('acct:told', 'tokens', 10);");
becomes($node, "SELECT error = 'status 400: the key (the API key) is bad' FROM credit_lease.usage_report WHERE account = 'acct:told'", 'and here');
$upstream->clear;
$upstream->fault(fault => 'hang', times => undef);
account('acct:hush', 1000);
sql("SELECT lease_prewarm('acct:hush', '{tokens}', '100 ms');");
is(sql("SELECT count(*) FROM pg_stat_activity a WHERE position('$api_key' IN a::text || a.query) > 0 AND pid <> pg_backend_pid();"),
	0, 'pg_stat_activity has no API key');
$upstream->clear;
my @with_key = grep { sql("SELECT EXISTS (SELECT FROM $_ x WHERE position('$api_key' IN x::text) > 0);") eq 't' }
  split /\n/, sql(q{SELECT oid::regclass FROM pg_class WHERE relnamespace IN ('credit_lease'::regnamespace, 'acme'::regnamespace)
	AND relkind IN ('r', 'v');});
is("@with_key", '', 'no table or view has it');
unlike(slurp_file($node->logfile), qr/$api_key/, 'nor has the log');

# ---------------------------------------------------------------------------
# What an upstream says is text before it is kept.

sub canned
{
	my ($body) = @_;
	my $listening = IO::Socket::INET->new(Listen => 5, LocalAddr => '127.0.0.1') or die "could not listen: $!";
	my $pid = fork // die "could not fork: $!";

	return ($pid, 'http://127.0.0.1:' . $listening->sockport) if $pid;
	while (my $client = $listening->accept)
	{
		my ($request, $length) = ('');

		while ($request !~ /\r\n\r\n/ || length $' < ($request =~ /Content-Length: (\d+)/i)[0])
		{
			sysread $client, $request, 65536, length $request or last;
		}
		syswrite $client, "HTTP/1.1 400 Bad\r\nContent-Length: " . length($body) . "\r\nConnection: close\r\n\r\n$body";
	}
	POSIX::_exit(0);
}
my ($canned, $url) = canned(qq({"error": "caf\xe9 \xff"}));
sql($upstream->server('latin', url => $url));
account('acct:latin', undef, server => 'latin');
sql("SELECT lease_prewarm('acct:latin', '{tokens}');");
becomes($node, q{SELECT failures > 0 FROM credit_lease.upstream_status WHERE server = 'latin'}, 'a reply that is not UTF-8 is an error');
is(($session->run(q{SELECT convert_from(convert_to(last_error, 'UTF8'), 'UTF8') IS NULL FROM upstream_status WHERE server = 'latin';}))[1],
	'00000', 'and the status is UTF-8');
is(($session->run(q{SELECT convert_from(convert_to(error, 'UTF8'), 'UTF8') IS NULL FROM upstream_request WHERE account = 'acct:latin';}))[1],
	'00000', 'as is what is kept');
kill 'KILL', $canned;
waitpid $canned, 0;
sql("DELETE FROM policy WHERE account = 'acct:latin'; DELETE FROM upstream_request WHERE account = 'acct:latin';");

# ---------------------------------------------------------------------------
# The worker can be a role of its own, whose user mapping it is then.

sql(qq{
	CREATE ROLE billing_worker LOGIN;
	GRANT USAGE ON SCHEMA credit_lease TO billing_worker;
	GRANT EXECUTE ON FUNCTION lease_reclaim(integer) TO billing_worker;
	CREATE SERVER roles FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url '${\($upstream->url)}');
	GRANT USAGE ON FOREIGN SERVER roles TO billing_worker;
	CREATE USER MAPPING FOR billing_worker SERVER roles OPTIONS (api_key_file '$upstream->{key_file}');});
account('acct:role', 1000, server => 'roles');
$node->append_conf('postgresql.conf', 'credit_lease.role = billing_worker');
$node->reload;
becomes($node, "SELECT usename = 'billing_worker' FROM pg_stat_activity JOIN credit_lease.worker_status USING (pid)", 'the worker is another role');
is(sql("SELECT available FROM lease_consume('acct:role', 'tokens', 10);"), 90, 'it leases with its own user mapping');
becomes($node, "SELECT t.consumed = u.consumed FROM credit_lease.lease_usage u JOIN credit_lease.whole_tranche t USING (account, credit, tranche_id)
	WHERE account = 'acct:role'", 'and reads what to report');
is($node->safe_psql('postgres', 'SELECT last_error FROM credit_lease.worker_status'), '', 'without an error');

books_balance($node, 'at the end');
$session->quit;
$second->quit;

# ---------------------------------------------------------------------------
# A call that turns out to be short lets those go on who queued with it, while it
# waits for the upstream (rule 12).

$node->append_conf('postgresql.conf', 'credit_lease.request_timeout = 100s');
$node->restart;
$session = LeaseTest::Session->new($node);
for my $stripes (1, 4)
{
	my $account = "acct:queue_$stripes";
	my ($holder, $short, $small) = map { LeaseTest::Session->new($node) } 1 .. 3;
	my $waiting = sub {
		"SELECT count(DISTINCT pid) = $_[0] FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
	};

	account($account, 1000, server => 'roles', stripes => $stripes);
	sql("SELECT lease_prewarm('$account', '{tokens}');");
	# it gives these back before it knows, which takes it a while
	$holder->run_safe("BEGIN; SELECT lease_unfreeze('$account');
		SELECT count(lease_reserve('$account', 'tokens', 0.25, '1 ms')) FROM generate_series(1, 300);");
	$upstream->fault(fault => 'hang', match => 'extend', company_id => $account, times => undef);
	$short->begin("SELECT applied FROM lease_try_consume('$account', 'tokens', 500);");
	becomes($node, $waiting->(1), "$stripes stripes: a call waits for another one");
	$small->begin("SELECT applied FROM lease_try_consume('$account', 'tokens', 1);");
	becomes($node, $waiting->(2), '... and one with it');
	$holder->run_safe('COMMIT;');
	is(scalar $small->finish, 't', 'which goes on');
	is($node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%500);%' AND pid <> pg_backend_pid()"),
		'1', 'while the other waits for the upstream');
	$upstream->clear;
	is(scalar $short->finish, 't', 'which supplies that');
	$_->quit for $holder, $short, $small;
}

# An answer that comes while others have all stripes waits for them.
account('acct:busy', 1000, server => 'roles', stripes => 2);
$holder = LeaseTest::Session->new($node);
my $taking = q{FROM pg_stat_activity WHERE query = 'taking in the answer of an upstream' AND state = 'active'};
$holder->run_safe("SELECT lease_topup('acct:busy', 'tokens', 10); BEGIN; SELECT lease_consume('acct:busy', 'tokens', 8);");
$session->begin("SELECT status FROM lease_prewarm('acct:busy', '{tokens}');");
becomes($node, "SELECT count(*) = 1 $taking", 'an answer comes while all stripes are locked');
my $since = $node->safe_psql('postgres', "SELECT coalesce(max(xact_start), clock_timestamp()) $taking");
becomes($node, "SELECT count(*) = 1 $taking AND xact_start > '$since'", 'and is tried again');
$holder->run_safe('COMMIT;');
is(scalar $session->finish, 'live', 'until it is taken');
is(last_error('roles'), '~', 'without an error');
$holder->quit;
all_is_well('those who queue');
$session->quit;
$node->stop;

done_testing();
