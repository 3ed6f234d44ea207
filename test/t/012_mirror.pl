# Balances that live in a billing system without leases: the worker asks for
# them and reports what is spent, whatever becomes of requests and replies. What
# may be spent here is never more than is there less what is spent here, and the
# two are the same when traffic stops.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use JSON::PP;
use LeaseTest;
use LeaseUpstream;
use Math::BigFloat;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $node = lease_cluster(
	'mirror',
	conf => "shared_preload_libraries = 'credit_lease'\n"
	  . "credit_lease.databases = 'postgres, leases'\n"
	  . "credit_lease.sweep_interval = 100ms\n"
	  . "credit_lease.request_timeout = 1500ms\n"
	  . "credit_lease.acquire_timeout = 60s\n"
	  . "max_connections = 50\n"
	  . "restart_after_crash = on\n");
my $upstream = LeaseUpstream->start(dir => $node->basedir . '/metronome', dialect => 'metronome');
my $session = LeaseTest::Session->new($node);

# Runs statements in the session; returns what they return.
sub sql
{
	my ($sql) = @_;

	return $session->run_safe($sql);
}

# Gives a customer credit upstream, and its account a policy of its own with
# these settings, if there are any.
sub account
{
	my ($account, $amount, %policy) = @_;
	my $credit = delete $policy{credit} // 'tokens';

	$upstream->balance($policy{company_id} // $account, $policy{credit_type_id} // $credit, $amount) if defined $amount;
	sql("INSERT INTO policy (account, credit, " . join(', ', sort keys %policy) . ") VALUES ("
		. join(', ', map { quoted($_) } $account, $credit, map { $policy{$_} } sort keys %policy) . ");")
	  if %policy;
	return;
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

# What an account has, as a condition: of its mirror's checkpoint nothing is
# pending, and it is what there is upstream.
sub same
{
	my ($account) = @_;
	my $customer = $upstream->customer($account);

	return "SELECT available = greatest($customer->{balance}, 0) AND checkpoint = $customer->{balance} AND pending = 0"
	  . " FROM credit_lease.lease_balance('$account', 'tokens')";
}

# What is spent of an account's leases and mirrors was read and told, as a condition.
sub all_reported
{
	my ($account) = @_;

	return "SELECT NOT EXISTS (SELECT FROM credit_lease.usage_report WHERE account = '$account')
		AND NOT EXISTS (SELECT FROM credit_lease.lease_usage u JOIN credit_lease.tranche t USING (account, credit, tranche_id)
			WHERE u.account = '$account' AND t.consumed <> u.consumed)";
}

# Tests that the two are the same in the end, and that nothing was lost or
# counted twice.
sub converges
{
	my ($account, $name) = @_;
	my $consumed;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	becomes($node, all_reported($account), "$name: all is reported");
	becomes($node, same($account), "$name: the balances are the same");
	$consumed = sql("SELECT trim_scale(consumed) FROM lease_balance('$account', 'tokens');");
	is($upstream->customer($account)->{used}, $consumed, "$name: and so is what was spent");
	ok($upstream->books->{consistent}, "$name: the upstream's books are consistent");
	return;
}

# How often the balance of a customer was asked for
sub polls
{
	my ($account) = @_;

	return scalar $upstream->asked('balance', $account);
}

# Waits until so many more have been.
sub until_polled
{
	my ($account, $times, $name) = @_;
	my $before = polls($account);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return until_true(sub { polls($account) >= $before + $times }, $name);
}

# ---------------------------------------------------------------------------
# The first call has the balance asked for, and waits.

sql($upstream->server('billing'));
sql(q{INSERT INTO policy (credit, server, sync_interval) VALUES ('tokens', 'billing', '1 second');});
account('acct:1', 100);
is(sql(q{SELECT applied, trim_scale(available) FROM lease_consume('acct:1', 'tokens', 10);}), 't|90', 'the first call waits for the balance');
is(sql(q{SELECT kind, server, lease_id FROM tranche WHERE account = 'acct:1';}), 'mirror|billing|~', 'of which there is a mirror');
my ($asked) = $upstream->asked('balance', 'acct:1');
is_deeply($asked->{body}, { customer_id => 'acct:1', credit_type_id => 'tokens' }, 'what was asked');
converges('acct:1', 'a first call');
my ($told) = map { $upstream->events_of('acct:1', $_) } $upstream->asked('ingest', 'acct:1');
my ($tranche, $entry, $at) = split /\|/, sql(q{SELECT tranche_id, entry_id, (extract(epoch FROM created_at) * 1000000)::int8 FROM ledger
	WHERE account = 'acct:1' AND kind = 'consume';});
is($told->{transaction_id}, "acct:1/tokens/$tranche:$entry:$at", 'what it is told: the key');
is($told->{event_type}, 'tokens', 'the event');
is_deeply($told->{properties}, { quantity => '10', credit_type_id => 'tokens' }, 'the properties');

sql(q{SELECT lease_consume('acct:1', 'tokens', 0.1 * n) FROM generate_series(1, 30) n;});
is(sql(q{SELECT trim_scale(available) FROM lease_balance('acct:1');}), '43.5', 'what is spent counts at once');
converges('acct:1', 'many calls');

# other names upstream, and a customer that nobody knows
account('acct:names', 50, company_id => 'cust_1', credit_type_id => 'ct_1', event => 'llm');
is(sql(q{SELECT trim_scale(available) FROM lease_consume('acct:names', 'tokens', 1);}), '49', 'other names upstream');
until_true(sub { $upstream->customer('cust_1')->{used} == 1 }, 'by which it is charged');
fails(q{SELECT lease_consume('acct:nobody', 'tokens', 1);}, 'LC001', qr/upstream: status 404: there is no such customer/, 'nobody knows the customer');
is(sql(q{SELECT status FROM lease_prewarm('acct:nobody', '{tokens}');}), 'refused', 'which lease_prewarm() says, too');
account('acct:warm', 5);
is(sql(q{SELECT credit, lease_id, trim_scale(available), status FROM lease_prewarm('acct:warm', '{tokens}');}), 'tokens|~|5|live', 'lease_prewarm()');

# a hold, and what is settled of it
account('acct:hold', 100);
my ($hold) = sql(q{SELECT reservation_id FROM lease_reserve('acct:hold', 'tokens', 40, '1 hour');});
until_polled('acct:hold', 2, 'a hold: it is asked for');
is(sql(q{SELECT trim_scale(available), trim_scale(reserved), trim_scale(checkpoint) FROM lease_balance('acct:hold');}), '60|40|100',
	'what is held is not available');
sql("SELECT lease_settle('acct:hold', $hold, 25);");
converges('acct:hold', 'a hold that was settled');

# what lease_track() tells costs upstream what it does here
sql(q{INSERT INTO meter (feature, credit, rate, event) VALUES ('chat', 'tokens', 0.5, 'chat');});
$upstream->rate('chat', '0.5', 'tokens');
account('acct:track', 100);
($hold) = sql(q{SELECT reservation_id FROM lease_check('acct:track', 'chat', 60);});
sql("SELECT lease_track('acct:track', $hold, 41, '{\"model\": \"m\"}');");
converges('acct:track', 'what was tracked');
($told) = map { $upstream->events_of('acct:track', $_) } $upstream->asked('ingest', 'acct:track');
is_deeply($told->{properties}, { model => 'm', quantity => '41', credit_type_id => 'tokens' }, 'in units of the feature');
fails(q{SELECT lease_refund('acct:track', (SELECT entry_id FROM ledger WHERE account = 'acct:track' AND kind = 'track'));}, '0A000', undef,
	'which cannot be refunded here');

# ... to each upstream what it has paid for
sql($upstream->server('other'));
account('acct:both', 20);
sql(q{SELECT lease_consume('acct:both', 'tokens', 5);});
sql(q{SELECT lease_sync('acct:both', 'tokens', 10, clock_timestamp(), 'other');});
sql(q{SELECT * FROM lease_ingest('[{"account": "acct:both", "feature": "chat", "quantity": 41}]');});
is(sql(q{SELECT string_agg(server || ' ' || trim_scale(t.consumed), ', ' ORDER BY server) FROM tranche t WHERE account = 'acct:both';}),
	'billing 20, other 5.5', 'of two upstreams');
becomes($node, all_reported('acct:both'), 'all of that is reported');
is(sql(q{SELECT string_agg(trim_scale(acknowledged)::text, ' ' ORDER BY tranche_id) FROM lease_usage WHERE account = 'acct:both';}), '20 5.5',
	'to each what it has paid for');
is($upstream->customer('acct:both')->{used}, '25.5', 'and of nothing twice');
sql(q{DROP SERVER other CASCADE;});

# what is spent in bulk, of chunks and of sessions, of which it is told when they end
account('acct:mixed', 100);
sql(q{SELECT lease_consume('acct:mixed', 'tokens', 1);});
sql(q{SELECT * FROM lease_ingest('[{"account": "acct:mixed", "credit": "tokens", "amount": 3, "key": "i1"},
	{"account": "acct:mixed", "feature": "chat", "quantity": 5, "key": "i2"},
	{"account": "acct:mixed", "credit": "tokens", "amount": 3, "key": "i1"}]');});
sql(q{SELECT * FROM lease_ingest('[{"account": "acct:mixed", "credit": "tokens", "amount": 3, "key": "i1"},
	{"account": "acct:mixed", "feature": "chat", "quantity": 5, "key": "i2"},
	{"account": "acct:mixed", "credit": "tokens", "amount": 4, "key": "i3"}]');});
sql(q{SELECT lease_session_open('acct:mixed', 'tokens', 'call', 30, '1 hour');});
sql(q{SELECT lease_session_authorize('acct:mixed', 'call', 20);});
sql(q{SELECT lease_session_charge('acct:mixed', 'call', 7);});
my ($chunk) = sql(q{SELECT chunk_id FROM lease_chunk_allocate('acct:mixed', 'tokens', 20, 'me', '1 hour');});
sql("SELECT lease_chunk_consume('acct:mixed', $chunk, 8, 'me');");
until_polled('acct:mixed', 2, 'beside a chunk and a session');
is(sql(q{SELECT trim_scale(available), trim_scale(chunked) FROM lease_balance('acct:mixed');}), '39.5|35', 'what they have is not available');
sql(q{SELECT lease_session_close('acct:mixed', 'call', 9);});
sql("SELECT lease_chunk_release('acct:mixed', $chunk, 'me');");
converges('acct:mixed', 'in bulk, of chunks and sessions');

# what is refunded is taken off what is reported next
account('acct:refund', 100);
($entry) = sql(q{SELECT entry_id FROM lease_consume('acct:refund', 'tokens', 30);});
converges('acct:refund', 'before a refund');
is(sql("SELECT trim_scale(available) FROM lease_refund('acct:refund', $entry, 20);"), '90', 'a refund counts at once');
until_polled('acct:refund', 2, 'a refund: it is asked for');
is(sql(q{SELECT trim_scale(available), trim_scale(checkpoint), trim_scale(pending) FROM lease_balance('acct:refund');}), '90|70|-20',
	'and stays, though nobody was told');
is(sql(q{SELECT trim_scale(available) FROM lease_consume('acct:refund', 'tokens', 90);}), '0', 'all of it can be spent');
converges('acct:refund', 'after a refund');

# ---------------------------------------------------------------------------
# A call that is short waits for as long as it may, and is served when somebody
# tops up there.

account('acct:short', 5);
my $waiting = LeaseTest::Session->new($node);
$waiting->begin(q{SELECT applied, trim_scale(available) FROM lease_consume('acct:short', 'tokens', 50);});
until_polled('acct:short', 3, 'short: it is asked for again and again');
$upstream->balance('acct:short', 'tokens', 100);
is($waiting->finish, 't|55', 'short: it is served when there is more');
my @asked = $upstream->asked('balance', 'acct:short');
my @apart = map { seconds($asked[$_]{at}) - seconds($asked[ $_ - 1 ]{at}) } 1 .. $#asked;
cmp_ok((sort { $a <=> $b } @apart)[0], '>', 0.09, 'but not without a pause');
converges('acct:short', 'short');

# of several, those for whom it is enough go on
my $other = LeaseTest::Session->new($node);
$waiting->begin(q{SELECT applied, trim_scale(available) FROM lease_consume('acct:short', 'tokens', 500);});
$other->begin(q{SELECT applied, trim_scale(available) FROM lease_consume('acct:short', 'tokens', 60);});
until_polled('acct:short', 3, 'two are short');
$upstream->balance('acct:short', 'tokens', 10);
is($other->finish, 't|5', 'it is enough for one of them');
$upstream->balance('acct:short', 'tokens', 500);
is($waiting->finish, 't|5', 'and later for the other');
$upstream->balance('acct:short', 'tokens', 50);
$other->quit;
converges('acct:short', 'two that were short');

# there is no more: that is no failure of the upstream, and nobody asks on
my $begun = time;
sql(q{SET credit_lease.acquire_timeout = '500ms';});
fails(q{SELECT lease_consume('acct:short', 'tokens', 1000);}, 'LC001', qr/Available: 55, held: 0, requested: 1000\.$/m, 'too little');
cmp_ok(time - $begun, '>=', 0.5, 'after it has waited');
is(sql(q{SELECT applied FROM lease_try_consume('acct:short', 'tokens', 1000);}), 'f', 'lease_try_consume()');
my $polls = polls('acct:short');
until_polled('acct:short', 3, 'later it is asked for as ever');
@asked = ($upstream->asked('balance', 'acct:short'))[ $polls .. $polls + 2 ];
cmp_ok(seconds($asked[2]{at}) - seconds($asked[1]{at}), '>', 0.9, 'when sync_interval has passed');
sql(q{RESET credit_lease.acquire_timeout;});

# sooner when it runs low
account('acct:low', 100, sync_interval => '1 hour', low_water_mark => '0.5');
sql(q{SELECT lease_consume('acct:low', 'tokens', 40);});
$upstream->balance('acct:low', 'tokens', 1000);
is(polls('acct:low'), 1, 'it has plenty');
sql(q{SELECT lease_consume('acct:low', 'tokens', 20);});
becomes($node, q{SELECT available > 900 FROM credit_lease.lease_balance('acct:low')}, 'it runs low, and is asked for');
# ... and when the policy says so
$upstream->balance('acct:low', 'tokens', 1000);
sql(q{UPDATE policy SET sync_interval = '1 second' WHERE account = 'acct:low';});
becomes($node, q{SELECT available > 1900 FROM credit_lease.lease_balance('acct:low')}, 'the interval is another');

# ---------------------------------------------------------------------------
# What can become of a request for a balance.

sub over_it
{
	my ($account, $name) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	becomes($node, "SELECT count(*) = 0 FROM credit_lease.upstream_request WHERE account = '$account'", "$name: it is over");
	converges($account, $name);
	return;
}

my $faults = 0;
for (
	[ { fault => 'status', code => 500 }, qr/^status 500: scripted fault$/ ],
	[ { fault => 'status', code => 403, error => 'not today' }, qr/^status 403: not today$/ ],
	[ { fault => 'status', code => 422, error => 'no' }, qr/^status 422: no$/ ],
	[ { fault => 'hang' }, qr/./ ],
	[ { fault => 'reset' }, qr/./ ],
	[ { fault => 'close' }, qr/./ ],
	[ { fault => 'malformed' }, qr/^invalid input syntax for type json/ ],
	[ { fault => 'mistyped' }, qr/^the reply lacks balance$/ ],
	[ { fault => 'mistyped', value => '12' }, qr/^balance in the reply is no number$/ ],
	[ { fault => 'absurd' }, qr/^balance in the reply is no amount$/ ],
	[ { fault => 'mistyped', value => Math::BigFloat->new('0.0000000000001') }, qr/^balance in the reply is no amount$/ ],
	[ { fault => 'other_credit' }, qr/^credit_type_id in the reply is another one than was asked about$/ ],
	[ { fault => 'mistyped', field => 'credit_type_id' }, qr/^the reply lacks credit_type_id$/ ],
	[ { fault => 'huge' }, qr/./ ],
	[ { fault => 'redirect' }, qr/^status 302/ ])
{
	my ($fault, $error) = @$_;
	my $account = 'acct:fault' . ++$faults;
	my $name = join ' ', map { "$_ $fault->{$_}" } sort keys %$fault;

	account($account, 100);
	sql("SELECT lease_consume('$account', 'tokens', 30);");
	$upstream->fault(%$fault, match => 'balance', company_id => $account, times => undef);
	$upstream->balance($account, 'tokens', 1000);
	sql("SELECT lease_consume('$account', 'tokens', 1);");
	until_true(sub { sql("SELECT coalesce(error, '') FROM upstream_request WHERE account = '$account' AND attempts > 0;") =~ $error },
		"$name: it is told");
	ok(sql("SELECT failures > 0 AND last_error IS NOT NULL FROM upstream_status WHERE server = 'billing';") eq 't', "$name: it is shown");
	is(sql("SELECT trim_scale(checkpoint), trim_scale(available) FROM lease_balance('$account');"), '100|69', "$name: the balance stays");
	$upstream->clear;
	# a server that has no access is left alone for a minute, or until this
	$node->reload;
	over_it($account, $name);
}

# less than nothing is a balance, too
account('acct:negative', 100);
sql(q{SELECT lease_consume('acct:negative', 'tokens', 30);});
converges('acct:negative', 'a balance');
$upstream->balance('acct:negative', 'tokens', -77.5);
becomes($node, q{SELECT checkpoint = -7.5 AND available = 0 FROM credit_lease.lease_balance('acct:negative')}, 'less than nothing');
is(sql(q{SELECT trim_scale(remaining), trim_scale(overdrawn) FROM tranche WHERE account = 'acct:negative';}), '0|7.5', 'is kept exactly');
$upstream->balance('acct:negative', 'tokens', 10);
is(sql(q{SELECT applied FROM lease_consume('acct:negative', 'tokens', 2);}), 't', 'until there is more');
converges('acct:negative', 'less than nothing');

# a reply that comes when others hold the account
account('acct:locked', 100);
sql(q{SELECT lease_consume('acct:locked', 'tokens', 1);});
$waiting->run_safe(q{BEGIN; SELECT lease_consume('acct:locked', 'tokens', 2);});
until_polled('acct:locked', 1, 'locked: it is asked for');
is(sql(q{SELECT applied FROM lease_consume('acct:1', 'tokens', 1);}), 't', 'others are served');
$waiting->run_safe(q{COMMIT;});
$waiting->quit;
converges('acct:locked', 'locked');

# ---------------------------------------------------------------------------
# What can become of a report.

for (
	[ 'slow', seconds => 0.3 ], [ 'status', code => 503 ], [ 'hang' ], [ 'hang', after_effect => JSON::PP::true ],
	[ 'close' ], [ 'close', after_effect => JSON::PP::true ], [ 'reset' ])
{
	my ($fault, %fault) = @$_;
	my $account = 'acct:report' . ++$faults;
	my $name = "$fault of a report" . ($fault{after_effect} ? ', taken' : '');

	account($account, 100);
	sql("SELECT lease_consume('$account', 'tokens', 1);");
	converges($account, "$name: before");
	$upstream->fault(fault => $fault, match => 'ingest', company_id => $account, times => 2, %fault);
	sql("SELECT lease_consume('$account', 'tokens', 2);");
	cmp_ok(sql("SELECT available FROM lease_balance('$account');"), '<=', 97, "$name: it is pending");
	sql("SELECT lease_consume('$account', 'tokens', 3);");
	cmp_ok(sql("SELECT max(available) FROM lease_balance('$account');"), '<=', 94, "$name: never more than there is");
	converges($account, $name);
}

# what is taken while a balance is under way is not in that
account('acct:way', 100, sync_interval => '1 hour');
sql(q{SELECT lease_consume('acct:way', 'tokens', 1);});
becomes($node, q{SELECT acknowledged = 1 FROM credit_lease.lease_usage WHERE account = 'acct:way'}, 'under way: the first is taken');
$upstream->fault(fault => 'slow', seconds => 1.2, match => 'balance', company_id => 'acct:way', after_effect => JSON::PP::true, times => undef);
sql(q{UPDATE policy SET sync_interval = '1 second' WHERE account = 'acct:way';});
until_true(sub { grep { !defined $_->{status} } $upstream->asked('balance', 'acct:way') }, 'under way: it is asked for');
sql(q{UPDATE policy SET sync_interval = '1 hour' WHERE account = 'acct:way';});
$upstream->clear;
sql(q{SELECT lease_consume('acct:way', 'tokens', 30);});
becomes($node, q{SELECT acknowledged = 31 FROM credit_lease.lease_usage WHERE account = 'acct:way'}, 'under way: the second is taken');
becomes($node, q{SELECT count(*) = 0 FROM credit_lease.upstream_request WHERE account = 'acct:way'}, 'under way: it has come');
is(sql(q{SELECT trim_scale(checkpoint), trim_scale(pending), trim_scale(available) FROM lease_balance('acct:way');}), '99|30|69', 'under way: it includes the first');
sql(q{UPDATE policy SET sync_interval = '1 second' WHERE account = 'acct:way';});
converges('acct:way', 'under way');

# what is refused for good stays pending until somebody sees to it
account('acct:refused', 100);
sql(q{SELECT lease_consume('acct:refused', 'tokens', 1);});
converges('acct:refused', 'before a refusal');
$upstream->fault(fault => 'status', code => 400, error => 'we do not know that', match => 'ingest', company_id => 'acct:refused', times => undef);
sql(q{SELECT lease_consume('acct:refused', 'tokens', 2);});
becomes($node, q{SELECT refused_reports = 1 FROM credit_lease.upstream_status WHERE server = 'billing'}, 'a report is refused');
until_polled('acct:refused', 2, 'refused: it is asked for');
is(sql(q{SELECT trim_scale(checkpoint), trim_scale(pending), trim_scale(available) FROM lease_balance('acct:refused');}), '99|2|97', 'refused: it is pending');
$upstream->clear;
sql(q{UPDATE usage_report SET refused_at = NULL;});
converges('acct:refused', 'what is sent again');

# more than a request can take
account('acct:many', 1000);
sql(q{SELECT count(*) FROM (SELECT lease_consume('acct:many', 'tokens', 0.25) FROM generate_series(1, 350)) n;});
converges('acct:many', '350 events');
cmp_ok((sort { $b <=> $a } map { scalar @{ $_->{body} } } $upstream->asked('ingest', 'acct:many'))[0], '<=', 100, 'at most 100 at a time');

# ---------------------------------------------------------------------------
# How long a checkpoint is trusted.

account('acct:closed', 100, max_staleness => '3 seconds');
account('acct:open', 100, max_staleness => '3 seconds', failure_mode => 'open');
sql("SELECT lease_consume('$_', 'tokens', 1);") for qw(acct:closed acct:open);
$upstream->stop;
becomes($node, q{SELECT available = 0 AND checkpoint_age > '3 seconds' FROM credit_lease.lease_balance('acct:closed')}, 'closed: it is too old');
sql(q{SET credit_lease.acquire_timeout = '2s';});
fails(q{SELECT lease_consume('acct:closed', 'tokens', 1);}, 'LC008', qr/upstream: ./, 'closed: nobody can be asked');
is(sql(q{SELECT allowed, reason FROM lease_check('acct:closed', 'chat', 1);}), 'f|lease_acquire_failed', 'closed: nor for a feature');
is(sql(q{SELECT trim_scale(available) FROM lease_consume('acct:open', 'tokens', 2);}), '97', 'open: it is trusted all the same');
sql(q{RESET credit_lease.acquire_timeout;});
$upstream->restart;
until_true(sub { ($session->run(q{SELECT lease_consume('acct:closed', 'tokens', 2, 'once');}))[1] eq '00000' }, 'closed: until it can be asked again');
converges($_, 'after the upstream was gone') for qw(acct:closed acct:open acct:1);

# nobody asks for it any more: it is not known what is spent there
account('acct:policy', 100, server => 'billing');
sql(q{SELECT lease_consume('acct:policy', 'tokens', 1);});
sql(q{UPDATE policy SET server = NULL WHERE account = 'acct:policy' OR account IS NULL;});
becomes($node, q{SELECT available = 0 FROM credit_lease.lease_balance('acct:policy')}, 'a policy without the server: it is not trusted');
fails(q{SELECT lease_consume('acct:policy', 'tokens', 1);}, 'LC008', undef, 'and nobody can spend of it');
$polls = polls('acct:policy');
sql(q{UPDATE policy SET server = 'billing' WHERE account IS NULL;});
is(sql(q{SELECT trim_scale(available) FROM lease_consume('acct:policy', 'tokens', 1);}), '98', 'a policy with it: it is asked for');
converges('acct:policy', 'a policy that came and went');

# told by hand, beside the worker
account('acct:hand', 100);
sql(q{SELECT lease_consume('acct:hand', 'tokens', 1);});
sql(q{SELECT * FROM lease_sync('acct:hand', 'tokens', 50, clock_timestamp(), 'billing');});
converges('acct:hand', 'told by hand');
fails(q{SELECT * FROM lease_sync('acct:hand', 'tokens', 50, clock_timestamp(), 'billing', '{k}');}, '0A000', undef, 'but not by keys');

# ---------------------------------------------------------------------------
# Crashes between a report and its acknowledgement, and between a request and
# the reply.

sub worker_pid
{
	return $node->safe_psql('postgres', 'SELECT pid FROM credit_lease.worker_status WHERE running');
}

my %crash = (
	'the worker is terminated' => sub { $node->safe_psql('postgres', 'SELECT pg_terminate_backend(' . worker_pid() . ')') },
	'the worker is killed' => sub { PostgreSQL::Test::Utils::system_log('kill', '-9', worker_pid()) },
	'the server is stopped at once' => sub { $node->stop('immediate'); $node->start });
for my $crash (sort keys %crash)
{
	for my $kind (qw(ingest balance))
	{
		my $account = 'acct:crash' . ++$faults;
		my $name = "$crash, $kind";

		account($account, 100);
		sql("SELECT lease_consume('$account', 'tokens', 1);");
		converges($account, "$name: before");
		$upstream->fault(fault => 'hang', match => $kind, company_id => $account, after_effect => JSON::PP::true);
		sql("SELECT lease_consume('$account', 'tokens', 2);");
		until_true(sub { grep { !defined $_->{status} } $upstream->asked($kind, $account) }, "$name: it hangs");
		$session->quit;
		$crash{$crash}->();
		$upstream->clear;
		$node->poll_query_until('postgres', 'SELECT running FROM credit_lease.worker_status');
		$session = LeaseTest::Session->new($node);
		converges($account, $name);
	}
}
is($upstream->books->{events}{conflicts}, 0, 'no key stood for two events');

# ---------------------------------------------------------------------------
# Running totals.

sub totals
{
	my ($account) = @_;

	return map { $_->{properties} } map { $upstream->events_of($account, $_) } $upstream->asked('ingest', $account);
}

account('acct:total', 1000);
sql(q{SELECT lease_consume('acct:total', 'tokens', 7);});
converges('acct:total', 'one by one');
sql(q{ALTER SERVER billing OPTIONS (ADD usage 'cumulative');});
sql(q{SELECT count(*) FROM (SELECT lease_consume('acct:total', 'tokens', 0.5) FROM generate_series(1, 50)) n;});
converges('acct:total', 'a running total');
($tranche) = sql(q{SELECT tranche_id FROM tranche WHERE account = 'acct:total';});
is_deeply((totals('acct:total'))[-1], { quantity => '25', credit_type_id => 'tokens', cumulative => 'true', mirror => "acct:total/tokens/$tranche" },
	'what it is told');
cmp_ok(scalar totals('acct:total'), '<', 25, 'in fewer events');

# a later one takes the place of one that was not taken
$upstream->fault(fault => 'hang', match => 'ingest', company_id => 'acct:total', after_effect => JSON::PP::true, times => undef);
sql(q{SELECT lease_consume('acct:total', 'tokens', 1);});
until_true(sub { grep { !defined $_->{status} } $upstream->asked('ingest', 'acct:total') }, 'a running total hangs');
for my $n (1 .. 3)
{
	sql(q{SELECT lease_consume('acct:total', 'tokens', 1);});
	becomes($node, qq{SELECT count(*) = 1 AND max(quantity) = 26 + $n FROM credit_lease.usage_report WHERE account = 'acct:total'},
		"there is one to be sent, the last: $n");
}
$upstream->clear;
converges('acct:total', 'a running total that hung');
is((totals('acct:total'))[-1]{quantity}, '29', 'the last one');

# what is refunded is taken off what it grows by
($entry) = sql(q{SELECT entry_id FROM lease_consume('acct:total', 'tokens', 10);});
converges('acct:total', 'before a refund of a total');
sql("SELECT lease_refund('acct:total', $entry, 6);");
sql(q{SELECT lease_consume('acct:total', 'tokens', 4);});
becomes($node, q{SELECT owed = 2 FROM credit_lease.lease_usage WHERE account = 'acct:total'}, 'a refund is owed');
sql(q{SELECT lease_consume('acct:total', 'tokens', 5);});
converges('acct:total', 'after a refund of a total');
is((totals('acct:total'))[-1]{quantity}, '42', 'it never falls');

# what is refused, and sent again with the next one
$upstream->fault(fault => 'status', code => 400, error => 'we do not know that', match => 'ingest', company_id => 'acct:total', times => undef);
sql(q{SELECT lease_consume('acct:total', 'tokens', 1);});
becomes($node, q{SELECT count(*) = 1 AND bool_and(refused_at IS NOT NULL) FROM credit_lease.usage_report WHERE account = 'acct:total'}, 'a total is refused');
$upstream->clear;
sql(q{SELECT lease_consume('acct:total', 'tokens', 1);});
converges('acct:total', 'the next total');

# a crash between a total and its acknowledgement
$upstream->fault(fault => 'hang', match => 'ingest', company_id => 'acct:total', after_effect => JSON::PP::true);
sql(q{SELECT lease_consume('acct:total', 'tokens', 1);});
until_true(sub { grep { !defined $_->{status} } $upstream->asked('ingest', 'acct:total') }, 'a total hangs');
$session->quit;
$node->stop('immediate');
$upstream->clear;
$node->start;
$session = LeaseTest::Session->new($node);
sql(q{SELECT lease_consume('acct:total', 'tokens', 1);});
converges('acct:total', 'a total and a crash');

# what was tracked is told as ever, also while a total up to there is
($hold) = sql(q{SELECT reservation_id FROM lease_check('acct:total', 'chat', 60);});
$upstream->fault(fault => 'hang', match => 'ingest', company_id => 'acct:total', after_effect => JSON::PP::true, times => undef);
sql("BEGIN; SELECT lease_consume('acct:total', 'tokens', 1); SELECT lease_track('acct:total', $hold, 41); COMMIT;");
becomes($node, q{SELECT array_agg(cumulative ORDER BY entry_id) = '{t,f}' FROM credit_lease.usage_report WHERE account = 'acct:total'},
	'a total and what was tracked after it');
sql(q{SELECT lease_ingest('[{"account": "acct:total", "feature": "chat", "quantity": 3}]');});
becomes($node, q{SELECT t.consumed = u.consumed FROM credit_lease.tranche t JOIN credit_lease.lease_usage u USING (account, credit, tranche_id)
	WHERE account = 'acct:total'}, 'where there is nothing more, the total stays');
is(sql(q{SELECT array_agg(cumulative ORDER BY entry_id) FROM usage_report WHERE account = 'acct:total';}), '{t,f,f}', 'as it was');
$upstream->clear;
converges('acct:total', 'tracked beside totals');

# one by one again
sql(q{ALTER SERVER billing OPTIONS (SET usage 'events');});
sql(q{SELECT lease_consume('acct:total', 'tokens', 3);});
converges('acct:total', 'one by one again');
is($upstream->books->{events}{late}, 0, 'no total came after a later one');
is($upstream->books->{events}{conflicts}, 0, 'no key stood for two events');

# the same of leases
my $leasing = LeaseUpstream->start(dir => $node->basedir . '/schematic');
$node->safe_psql('postgres', 'CREATE DATABASE leases');
$node->safe_psql('leases', 'CREATE EXTENSION credit_lease');
my $of_leases = LeaseTest::Session->new($node, 'leases');
$of_leases->run_safe($leasing->server('leasing', options => { usage => 'cumulative' }));
$leasing->balance('acct:lease', 'images', 1000);
$of_leases->run_safe(q{INSERT INTO policy (credit, server, lease_size, low_water_mark) VALUES ('images', 'leasing', 100, 0);});
$of_leases->run_safe(q{SELECT count(*) FROM (SELECT lease_consume('acct:lease', 'images', 0.5) FROM generate_series(1, 50)) n;});
$leasing->same_books('running totals of leases', [ $node, 'leases' ]);
$leasing->fault(fault => 'hang', match => 'events', company_id => 'acct:lease', after_effect => JSON::PP::true, times => undef);
$of_leases->run_safe(q{SELECT lease_consume('acct:lease', 'images', 2);});
until_true(sub { grep { !defined $_->{status} } $leasing->asked('events', 'acct:lease') }, 'a total of a lease hangs');
$of_leases->run_safe(q{SELECT lease_consume('acct:lease', 'images', 3);});
becomes($node, q{SELECT count(*) = 1 AND max(quantity) = 30 FROM credit_lease.usage_report}, 'a later one takes its place', dbname => 'leases');
$leasing->clear;
$leasing->same_books('totals of a lease that hung', [ $node, 'leases' ]);
($told) = (map { $leasing->events_of('acct:lease', $_) } $leasing->asked('events', 'acct:lease'))[-1];
is_deeply([ @{ $told->{body} }{qw(quantity cumulative)} ], [ 30, JSON::PP::true ], 'what it is told');
$of_leases->run_safe(q{INSERT INTO meter (feature, credit, rate, event) VALUES ('image', 'images', 2, 'image');});
$leasing->rate('image', 2, 'images');
$leasing->fault(fault => 'hang', match => 'events', company_id => 'acct:lease', after_effect => JSON::PP::true, times => undef);
($hold) = $of_leases->run_safe(q{SELECT reservation_id FROM lease_check('acct:lease', 'image', 5);});
$of_leases->run_safe("BEGIN; SELECT lease_consume('acct:lease', 'images', 4); SELECT lease_track('acct:lease', $hold, 5); COMMIT;");
becomes($node, q{SELECT array_agg(cumulative ORDER BY entry_id) = '{t,f}' FROM credit_lease.usage_report}, 'a total, and what was tracked after it',
	dbname => 'leases');
$leasing->clear;
$leasing->same_books('tracked beside totals of leases', [ $node, 'leases' ]);
$of_leases->run_safe(q{SELECT lease_release('acct:lease', 'images');});
until_true(sub { $leasing->asked('release', 'acct:lease') }, 'it is released');
$leasing->same_books('totals of a lease that was released', [ $node, 'leases' ]);
$of_leases->quit;

# ---------------------------------------------------------------------------
# Many at once, and all of it in the end.

account('acct:hot', 100000);
my $scripts = {
	'spend@6' => q{SELECT lease_try_consume('acct:hot', 'tokens', 0.5);},
	'hold@3' => q{SELECT applied, reservation_id FROM lease_try_reserve('acct:hot', 'tokens', 2, '1 hour') \gset
\if :applied
SELECT lease_settle('acct:hot', :reservation_id, 1);
\endif
},
	'refund@1' => q{SELECT applied, entry_id FROM lease_try_consume('acct:hot', 'tokens', 2) \gset
\if :applied
SELECT lease_refund('acct:hot', :entry_id, 1);
\endif
} };
my ($status, undef, $errors) = pgbench($node, '-c 6 -j 2 -T 4', $scripts);
is($status, 0, 'many at once') or diag $errors;
sql(q{SELECT lease_consume('acct:hot', 'tokens', 100);});
converges('acct:hot', 'many at once');

# every call there is, beside checkpoints by time and by key
sql(q{INSERT INTO policy (account, credit) VALUES (NULL, 'other');});
sql(q{DELETE FROM policy WHERE account IS NULL;});
sql(qq{SELECT * FROM lease_sync('acct:$_', 'tokens', 1000, clock_timestamp());}) for 1 .. 4;
$session->quit;
$scripts = any_calls($node);
$scripts->{'sync@4'} = q{
\set a random(1, 3)
\set n random(1, 2000)
\set k random(1, 300)
SELECT lease_sync('acct:' || :a, 'tokens', :n, clock_timestamp() - :k * interval '1 ms',
	acknowledged => CASE WHEN :k % 3 = 0 THEN ARRAY['key ' || :k, 'key ' || :k + 1] END);
};
($status, undef, $errors) = pgbench($node, '-c 8 -j 2 -T 5', $scripts);
is($status, 0, 'any calls at once') or diag $errors;
books_balance($node, 'in the end');
done_testing();
