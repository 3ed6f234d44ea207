# Checks and tracks of pools that are leased from an upstream: who asks is
# supplied while he waits; where the upstream is down, the failure mode decides;
# and whatever happens on the way, what was used is told once, in the units in
# which it was used.

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

# what no call may take that waits for a fraction of a second; those that wait
# for a request by mistake take a minute
my $no_wait = 25;
my $json = JSON::PP->new->canonical->allow_bignum;

my $node = lease_cluster(
	'check',
	conf => "shared_preload_libraries = 'credit_lease'\n"
	  . "credit_lease.databases = 'postgres'\n"
	  . "credit_lease.sweep_interval = 100ms\n"
	  . "credit_lease.request_timeout = 60s\n"
	  . "credit_lease.acquire_timeout = 60s\n");
my $upstream = LeaseUpstream->start(dir => $node->basedir . '/schematic');
my $session = LeaseTest::Session->new($node);

# Runs statements in the session; returns what they return.
sub sql
{
	my ($sql) = @_;

	return $session->run_safe($sql);
}

# Runs something and tests that it does not wait for a request.
sub at_once
{
	my ($name, $do) = @_;
	my $begun = time;

	$do->();
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return cmp_ok(time - $begun, '<', $no_wait, "$name: in time");
}

# Gives companies, which are called as their accounts, tokens upstream; and their
# accounts a policy of their own with these settings, if there are any.
sub account
{
	my ($accounts, $amount, %policy) = @_;

	for my $account (@$accounts)
	{
		$upstream->balance($account, 'tokens', $amount);
		sql("INSERT INTO policy (account, credit, " . join(', ', sort keys %policy) . ") VALUES ("
			. join(', ', map { quoted($_) } $account, 'tokens', map { $policy{$_} } sort keys %policy) . ");")
		  if %policy;
	}
	return;
}

# Checks; returns allowed, reason and amount, and the reservation.
sub check
{
	my ($account, $feature, $quantity, $options) = @_;
	my ($id, $answer) = split /\|/, sql("SELECT reservation_id, allowed, reason, trim_scale(amount)
		FROM lease_check('$account', '$feature', $quantity" . ($options ? ", $options" : '') . ");"), 2;

	return wantarray ? ($answer, $id) : $answer;
}

# Tracks; returns settled, consumed, refunded and shortfall.
sub track
{
	my ($account, $id, $quantity, $traits) = @_;

	return sql("SELECT settled, trim_scale(consumed), trim_scale(refunded), trim_scale(shortfall) FROM lease_track('$account', $id, $quantity, "
		. quoted($traits) . ");");
}

# Checks and tracks; returns what lease_track() does.
sub use_it
{
	my ($account, $feature, $quantity, $traits) = @_;
	my ($answer, $id) = check($account, $feature, $quantity);

	return $id eq '~' ? $answer : track($account, $id, $quantity, $traits);
}

# Returns the events, of a company, in the order in which they came: those that
# the upstream has taken, and those that nobody has heard about.
sub events
{
	my ($company) = @_;

	return grep { !defined $company || $_->{body}{company}{id} eq $company }
	  map { @{ $_->{body}{events} } } grep { $_->{kind} eq 'events' && ($_->{status} // 200) == 200 }
	  $upstream->requests;
}

# Returns the events of a company as words, each as often as it came.
sub told
{
	my ($company) = @_;

	return join ', ', map { "$_->{event} $_->{quantity}" } map { $_->{body} } events($company);
}

sub last_track
{
	my ($account) = @_;

	return sql("SELECT account || ':' || reservation_id || ':' || (extract(epoch FROM created_at) * 1000000)::bigint
		FROM reservation WHERE account = '$account' ORDER BY track_entry_id DESC NULLS LAST LIMIT 1;");
}

# Tests that both books agree, and that exactly what was tracked has been told:
# under its own key, as a quantity in units, with its traits. What came again
# was the same. Of accounts "local ..." not all has to be told.
sub all_is_told
{
	my ($name) = @_;
	my (%event, %differs);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	books_balance($node, $name);
	$upstream->same_books($name, [ $node, 'postgres' ]);

	for my $event (events())
	{
		my $told = $json->encode({ map { $_ => $event->{body}{$_} } qw(event quantity company lease_id traits) });

		$differs{ $event->{idempotency_key} } = 1 if ($event{ $event->{idempotency_key} } //= $told) ne $told;
	}
	is(join(', ', sort keys %differs), '', "$name: what is told again is the same");

	my @tracked = map { $json->decode($_) } split /\n/, $node->safe_psql('postgres', q{
		SELECT jsonb_build_object('key', account || ':' || reservation_id || ':' || (extract(epoch FROM created_at) * 1000000)::bigint,
			   'body', jsonb_build_object('event', event, 'quantity', trim_scale(tracked),
				'company', jsonb_build_object('id', account), 'traits', traits))
		  FROM credit_lease.reservation WHERE tracked > 0 AND account NOT LIKE 'local%'});
	my %tracked = map { $_->{key} => $json->encode($_->{body}) } @tracked;
	my %told;
	for (grep { exists $tracked{$_} || /^(?!local|lease_)/ } keys %event)
	{
		my $body = $json->decode($event{$_});

		delete $body->{lease_id};
		$told{$_} = $json->encode($body);
	}
	is(join("\n", map { "$_ $told{$_}" } sort keys %told), join("\n", map { "$_ $tracked{$_}" } sort keys %tracked),
		"$name: what was tracked is told, and nothing else");
	return;
}

# ---------------------------------------------------------------------------
# What features cost, here and there.

sql($upstream->server('billing') . q{
	INSERT INTO policy (credit, server, lease_size) VALUES (NULL, NULL, 100), ('tokens', 'billing', NULL), ('images', 'billing', NULL);
	CREATE SCHEMA rules;
	CREATE FUNCTION rules.small(account text, feature text, quantity numeric, available numeric, subject jsonb,
			OUT allowed boolean, OUT reason text) LANGUAGE plpgsql AS $$
	BEGIN
		allowed := quantity <= 10 AND available > 0;
		reason := 'too much of ' || feature;
	END $$;
	INSERT INTO meter (feature, credit, rate, event, preference, rule) VALUES
		('chat', 'tokens', 0.25, 'chat', 1, NULL), ('byte', 'tokens', 0.0000015, 'byte', 1, NULL),
		('ruled', 'tokens', 2, 'ruled', 1, 'rules.small'),
		('image', 'images', 1, 'image', 1, NULL), ('image', 'tokens', 4, 'image', 2, NULL);});
$upstream->rate($_ => '0.25', 'tokens') for qw(chat chatter);
$upstream->rate(byte => '0.0000015', undef, '0.01');
$upstream->rate(ruled => 2, 'tokens');
$upstream->rate(image => 4, 'tokens');
$upstream->rate(image => 1, 'images');

# ---------------------------------------------------------------------------
# An empty account is supplied while its check waits.

account([qw(empty explained round)], 1000);
is(sql("SELECT allowed, reason, error, credit, trim_scale(amount), rate, event, trim_scale(available) FROM lease_check('empty', 'chat', 10);"),
	't|allowed|~|tokens|2.5|0.25|chat|97.5', 'a check on an empty account is served');
is(join(' ', map { "$_->{body}{credit_type_id} $_->{body}{requested_amount}" } $upstream->asked('acquire', 'empty')), 'tokens 100', 'by one acquire');
is(sql("SELECT trim_scale(available), trim_scale(reserved), trim_scale(leased), upstream_balance FROM lease_balance('empty');"), '97.5|2.5|97.5|~', 'and holds some of the lease');
my $id = sql("SELECT reservation_id FROM open_reservation WHERE account = 'empty';");
is(track('empty', $id, 8, '{"model": "small", "n": 1.25}'), 't|2|0.5|0', 'what was used is settled');
is(sql("SELECT reason FROM lease_explain('explained', 'chat', 10);"), 'insufficient_credit', 'who asks what a check would say does not wait');

# by a policy that rounds up, as the upstream does
sql("INSERT INTO policy (account, smallest_unit) VALUES ('round', 0.01);");
is(use_it('round', 'byte', 1000001), 't|1.51|0|0', 'what is rounded up here');
all_is_told('a check');
is(told('empty'), 'chat 8', 'what is reported is the quantity that was used');
is((events('empty'))[0]{idempotency_key}, last_track('empty'), 'by its key');
is((events('empty'))[0]{body}{lease_id}, ($upstream->leases('empty'))[0]{id}, 'with the lease');
is($json->encode((events('empty'))[0]{body}{traits}), '{"model":"small","n":1.25}', 'and the traits');
cmp_ok(($upstream->leases('empty'))[0]{used}, '==', 2, 'and costs there what it does here');
cmp_ok(($upstream->leases('round'))[0]{used}, '==', 1.51, 'rounded up there, too');

# ---------------------------------------------------------------------------
# Of several credits it is the preferred one that has enough, and of those, one
# that is leased already.

account([qw(both second only)], 1000);
$upstream->balance('both', 'images', 1000);
$upstream->balance('second', 'images', 0);
$upstream->balance('only', 'images', 1000);
is(sql("SELECT credit, amount FROM lease_check('both', 'image', 5);"), 'images|5', 'the preferred credit is leased');
is(scalar $upstream->asked('acquire', 'both'), 1, 'and no other');
is(sql("SELECT credit, amount, reason, error FROM lease_check('second', 'image', 5);"), 'tokens|20|allowed|~',
	'the other one where the upstream has none of it');
is(join(' ', map { $_->{body}{credit_type_id} } $upstream->asked('acquire', 'second')), 'images tokens', 'which was asked');
sql("SELECT lease_prewarm('only', '{tokens}');");
is(sql("SELECT credit, amount FROM lease_check('only', 'image', 5);"), 'tokens|20', 'a credit that is leased pays before one that is not');
is(scalar $upstream->asked('acquire', 'only'), 1, 'which is not leased then');
is(sql("SELECT credit, amount FROM lease_check('only', 'image', 25);"), 'images|25', 'but is where the lease has too little');
for my $account (qw(both second only))
{
	track($account, $_, 3, qq({"reservation": $_}))
	  for split /\n/, sql("SELECT reservation_id FROM open_reservation WHERE account = '$account';");
}
all_is_told('several credits');
is(join(' ', sort map { "$_->{credit_type_id} $_->{used}" } $upstream->leases('only')), 'images 3 tokens 12', 'each costs its own rate');

# a check that cannot wait has the upstream asked all the same, for the next one
account(['held'], 1000);
$upstream->balance('held', 'images', 1000);
sql("BEGIN; SELECT lease_topup('held', 'other', 1);");
is(check('held', 'image', 5), 'f|insufficient_credit|5', 'a check whose transaction has the account is denied');
sql('ROLLBACK;');
becomes($node, "SELECT count(*) > 0 FROM credit_lease.open_lease WHERE account = 'held'", 'but there is a lease then');

# ---------------------------------------------------------------------------
# An upstream that has no more: that is an answer, and no failure.

account(['poor'], 0);
account(['poor and open'], 0, failure_mode => 'open');
like(sql("SELECT allowed, reason, error FROM lease_check('poor', 'chat', 10);"),
	qr/^f\|insufficient_credit\|status 400: the company has no credit left$/, 'an upstream that has no credit: a check is denied');
like(sql("SELECT allowed, reason, error, amount FROM lease_check('poor and open', 'chat', 10);"),
	qr/^t\|allowed\|status 400: the company has no credit left\|0$/, 'it is not where the failure mode is open');
$id = sql("SELECT reservation_id FROM open_reservation WHERE account = 'poor and open';");
is(track('poor and open', $id, 6), 't|0|0|1.5', 'what is used all the same is missing');

# one that grants less than it was asked for has no more
account(['partial'], 30);
is(check('partial', 'chat', 40), 't|allowed|10', 'an upstream that grants a part');
is(sql("SELECT trim_scale(leased), upstream_balance FROM lease_balance('partial');"), '20|0', 'has no more, and the balance says so');
is(check('partial', 'chat', 100), 'f|insufficient_credit|25', 'nor grants more to who needs it');
is(check('partial', 'chat', 100, "on_failure => 'open'"), 't|allowed|20', 'who may pass holds what there is');
is(track('partial', $_, 100), 't|20|0|5', 'and is charged what there is') for sql("SELECT max(reservation_id) FROM open_reservation WHERE account = 'partial';");
all_is_told('no credit');
is(told('poor and open'), 'chat 6', 'the upstream is told all');
ok(!exists((events('poor and open'))[0]{body}{lease_id}), 'without a lease where there is none');
cmp_ok((grep { $_->{company_id} eq 'poor and open' } @{ $upstream->books->{companies} })[0]{balance}, '==', -1.5, 'and charges it');
cmp_ok(($upstream->leases('partial'))[0]{used}, '==', 25, 'or to the lease that has paid a part');

# What a grant of our own has paid is none of its business.
account(['local'], 0, failure_mode => 'open');
sql("SELECT lease_topup('local', 'tokens', 10);");
is(use_it('local', 'chat', 40, '{"a": 1}'), 't|10|0|0', 'a grant of our own pays');
sql("SELECT lease_topup('local', 'tokens', 2);");
is(use_it('local', 'chat', 32), 't|2|0|6', 'or pays a part');
account(['local and leased'], 1000);
sql("SELECT lease_prewarm('local and leased', '{tokens}'); SELECT lease_topup('local and leased', 'tokens', 2, priority => 1);");
is(use_it('local and leased', 'chat', 16), 't|4|0|0', 'or another part than a lease');
all_is_told('a grant of our own');
is(told('local'), 'chat 24', 'which is not reported');
is(told('local and leased'), 'chat 8', '... nor then');

# ---------------------------------------------------------------------------
# The upstream is down: closed denies, open allows, and both in time.

my @down = qw(hangs 500 401 stopped);
my $bad_key = $upstream->key_file('another-key');
for my $down (@down)
{
	sql($upstream->server($down));
	account([ "$down: closed", "$down: leased", "$down: quiet" ], 1000, server => $down);
	account([ "$down: open", "local $down" ], 1000, server => $down, failure_mode => 'open');
	sql("SELECT lease_prewarm('$down: leased', '{tokens}'); SELECT lease_topup('local $down', 'tokens', 1);");
}

# Tests how checks are answered while an upstream is down.
sub while_down
{
	my ($down) = @_;
	my ($answer, $open);

	at_once("$down: who is denied", sub {
		like(sql("SELECT allowed, reason, error, reservation_id, available FROM lease_check('$down: closed', 'chat', 10);"),
			qr/^f\|lease_acquire_failed\|[^|~]+\|~\|0$/, "$down: closed denies, and says why");
		is(check("$down: open", 'chat', 10, "on_failure => 'closed'"), 'f|lease_acquire_failed|2.5', "$down: so it does by the call");
		is(sql("SELECT count(*) FROM reservation WHERE account IN ('$down: closed', '$down: open');"), 0, "$down: nothing is held for that");
	});
	at_once("$down: who may pass", sub {
		like(sql("SELECT allowed, reason, error, amount FROM lease_check('$down: open', 'chat', 10);"),
			qr/^t\|allowed\|[^|~]+\|0$/, "$down: open allows, and says why there is nothing");
		($answer, $open) = check("$down: closed", 'chat', 20, "on_failure => 'open'");
		is($answer, 't|allowed|0', "$down: so it does by the call");
		is(check("$down: open", 'ruled', 11), 'f|too much of ruled|22', "$down: but does not overrule a rule");
		is(check("$down: open", 'ruled', 10), 't|allowed|0', "$down: which is asked as if there was enough");
		is(check("local $down", 'chat', 16), 't|allowed|1', "$down: what there is is held");
	});
	at_once("$down: who has a lease", sub {
		is(use_it("$down: leased", 'chat', 2.5, qq({"down": "$down"})), 't|0.625|0|0', "$down: who has a lease is not concerned");
		is(track("$down: closed", $open, 21, '{}'), 't|0|0|5.25', "$down: what was used without credit is missing");
		track("$down: open", $_, 7, qq({"hold": $_})) for split /\n/, sql("SELECT reservation_id FROM open_reservation WHERE account = '$down: open';");
		($answer, $open) = check("$down: leased", 'chat', 400, "on_failure => 'open'");
		is(track("$down: leased", $open, 400), 't|99.375|0|0.625', "$down: or is when it has too little");
		is(track("local $down", sql("SELECT reservation_id FROM open_reservation WHERE account = 'local $down';"), 16), 't|1|0|3',
			"$down: what a grant of our own has paid for is not missing");
	});
	return;
}

sql("SET credit_lease.acquire_timeout = '300ms';");
for my $who (qw(closed open leased))
{
	$upstream->fault(fault => 'hang', company_id => "hangs: $who", times => undef);
	$upstream->fault(fault => 'status', code => 500, company_id => "500: $who", times => undef);
}
$upstream->fault(fault => 'hang', company_id => 'local hangs', times => undef);
$upstream->fault(fault => 'status', code => 500, company_id => 'local 500', times => undef);
sql("ALTER USER MAPPING FOR CURRENT_USER SERVER \"401\" OPTIONS (SET api_key_file '$bad_key');");
while_down($_) for qw(hangs 500 401);
$upstream->stop('KILL');
while_down('stopped');
sql('RESET credit_lease.acquire_timeout;');
cmp_ok(sql("SELECT count(*) FROM usage_report WHERE server = '$_';"), '>=', 6, "$_: what was used is to be reported") for @down;

# It comes back.
$upstream->restart;
sql("ALTER USER MAPPING FOR CURRENT_USER SERVER \"401\" OPTIONS (SET api_key_file '$upstream->{key_file}');");
all_is_told('an upstream that is back');
for my $down (@down)
{
	my %told = map { $_ => [ map { "$_->{body}{event} $_->{body}{quantity}" } values %{ { map { $_->{idempotency_key} => $_ } events($_) } } ] }
	  "$down: closed", "$down: open", "$down: leased", "local $down";

	is(join(', ', map { join ' + ', sort @{ $told{$_} } } "$down: closed", "$down: leased", "$down: open", "local $down"), 'chat 21, chat 2.5 + chat 400, chat 7 + ruled 7, chat 12',
		"$down: each unit was reported");
	becomes($node, "SELECT allowed FROM credit_lease.lease_check('$down: closed', 'chat', 10)", "$down: checks go on");
}

# ---------------------------------------------------------------------------
# A hold that has expired is charged all the same, swept or not, once.

account([ 'late', map { "race $_" } 1 .. 4 ], 1000);
account(['locked'], 1000);
(undef, $id) = check('late', 'chat', 10, "ttl => '1 ms'");
becomes($node, "SELECT status = 'expired' FROM credit_lease.reservation WHERE account = 'late'", 'a hold expires and is swept');
is(track('late', $id, 12, '{"late": true}'), 'f|3|2.5|0', 'what was used is charged then');
is(sql("SELECT status, tracked FROM reservation WHERE account = 'late';"), 'expired|12', 'and it has expired all the same');

# the worker does not get at this one before it is tracked
(undef, $id) = check('locked', 'chat', 10, "ttl => '1 minute'");
sql("BEGIN; SELECT lease_topup('locked', 'other', 1);
	SET LOCAL credit_lease.mock_now = '" . sql("SELECT expires_at + interval '1 s' FROM reservation WHERE account = 'locked';") . "';");
is(track('locked', $id, 12), 'f|3|2.5|0', 'what nobody has swept yet is charged as well');
sql('COMMIT;');

# Nor does the end of its lease concern a hold: it is released when all is told.
account(['released'], 1000);
(undef, $id) = check('released', 'chat', 10);
is(sql("SELECT lease_release('released', 'tokens');"), 't', 'a lease is released of which something is held');
is(track('released', $id, 8), 't|2|0|0', 'the hold is tracked');
becomes($node, "SELECT count(*) = 0 FROM credit_lease.upstream_request WHERE account = 'released'", 'then the upstream hears of the release');
is(join(' ', map { $_->{kind} } grep { ($_->{company_id} // '') eq 'released' } $upstream->requests), 'acquire events release', 'after what was used');

my ($status) = pgbench($node, '-c 4 -t 40', { 'track' => q{
\set a random(1, 4)
\set n random(1, 40)
\set m random(1, 60)
SELECT reservation_id FROM lease_check('race ' || :a, 'chat', 2, ttl => :n * interval '1 ms') \gset
\sleep :m ms
SELECT lease_track('race ' || :a, :reservation_id, 1, jsonb_build_object('hold', :reservation_id));
SELECT lease_track('race ' || :a, :reservation_id, 1, jsonb_build_object('hold', :reservation_id));
} });
is($status, 0, 'holds are tracked while the worker sweeps');
is(sql("SELECT count(*), sum(tracked), trim_scale(sum(consumed)), trim_scale(sum(shortfall)) FROM reservation WHERE account LIKE 'race %';"),
	'160|160|40|0', 'all are charged');
all_is_told('holds that expire');

# ---------------------------------------------------------------------------
# What is told twice here is told once there, and what is undone is not.

account([qw(twice undone)], 1000);
(undef, $id) = check('twice', 'chat', 10);
is(join(' ', map { track('twice', $id, 6, '{"n": 1}') } 1 .. 3), 't|1.5|1|0 t|1.5|1|0 t|1.5|1|0', 'tracked again: the same answer');
is(($session->run("SELECT lease_track('twice', $id, 7, '{\"n\": 1}');"))[1], 'LC005', 'with another quantity: none');
is(($session->run("SELECT lease_track('twice', $id, 6, '{\"n\": 2}');"))[1], 'LC005', 'nor with other traits');

(undef, $id) = check('undone', 'chat', 10);
sql("BEGIN; SELECT lease_track('undone', $id, 1); ROLLBACK;
	BEGIN; SELECT lease_track('undone', reservation_id, 2) FROM lease_check('undone', 'chat', 10); ROLLBACK;
	BEGIN; SELECT lease_topup('undone', 'other', 1); SAVEPOINT s; SELECT lease_track('undone', $id, 3); ROLLBACK TO s; COMMIT;");
is(track('undone', $id, 4), 't|1|1.5|0', 'a hold whose track was rolled back is tracked');
all_is_told('once');
is(told('twice'), 'chat 6', 'what is tracked again is told once');
is(told('undone'), 'chat 4', 'what is rolled back is not told');

# ---------------------------------------------------------------------------
# Credits and units on one lease, and a refund.

account([qw(mixed refunded)], 1000);
sql("SELECT lease_prewarm('$_', '{tokens}');") for qw(mixed refunded);
sql("SELECT lease_consume('mixed', 'tokens', 2.5);");
(undef, $id) = check('mixed', 'chat', 10);
sql("SELECT lease_consume('mixed', 'tokens', 1.25); SELECT lease_settle('mixed', reservation_id, 2) FROM lease_reserve('mixed', 'tokens', 3);");
track('mixed', $id, 7);
sql("SELECT lease_consume('mixed', 'tokens', 0.5);");
all_is_told('credits and units');
is(join(', ', sort split /, /, told('mixed')), 'chat 7, tokens 0.5, tokens 1.25, tokens 2, tokens 2.5',
	'what is spent is told in credits, what is tracked in units');
cmp_ok(($upstream->leases('mixed'))[0]{used}, '==', 8, 'and together they cost what was spent');

# What was tracked of a lease is reported as used, and so not given back.
is(use_it('refunded', 'chat', 40), 't|10|0|0', 'before a refund');
my (undef, undef, $refusal) = $node->psql('postgres', "SELECT credit_lease.lease_refund('refunded', track_entry_id, 4)
	FROM credit_lease.reservation WHERE account = 'refunded'");
like($refusal, qr/was tracked, and is reported to upstream "billing"/, 'what was tracked is not refunded');
all_is_told('after a refund');
is(told('refunded'), 'chat 40', 'and is told as it was');

# ---------------------------------------------------------------------------
# A dump has it all: what features cost, rules, and holds that are to be tracked.

account([qw(dumped)], 1000);
(undef, $id) = check('dumped', 'chat', 10, "event => 'chatter', ttl => '1 hour'");
my (undef, $nothing) = check('dumped', 'chat', 4000, "on_failure => 'open', ttl => '1 hour'");
my $dir = PostgreSQL::Test::Utils::tempdir();
$node->command_ok([ 'pg_dump', '-f', "$dir/dump.sql", 'postgres' ], 'pg_dump');
$node->safe_psql('postgres', 'CREATE DATABASE restored TEMPLATE template0');
$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', 'restored', '-f', "$dir/dump.sql" ], 'psql restores it');
my $restored = LeaseTest::Session->new($node, 'restored');
my $meters = "SELECT * FROM meter ORDER BY feature, credit, valid_from;";
is($restored->run_safe($meters), sql($meters), 'a dump has the meters');
is($restored->run_safe("SELECT allowed, reason FROM lease_check('dumped', 'ruled', 11, on_failure => 'open');"), 'f|too much of ruled', 'and their rules');
my $tracks = "SELECT * FROM lease_track('dumped', $id, 9, '{\"dumped\": 1}'); SELECT * FROM lease_track('dumped', $nothing, 4000);";
is($restored->run_safe($tracks), sql($tracks), 'holds are tracked there as here');
is($restored->run_safe("SELECT event, trim_scale(quantity), traits, idempotency_key FROM usage_report WHERE account = 'dumped' ORDER BY entry_id LIMIT 1;"),
	'chatter|9|{"dumped": 1}|' . sql("SELECT usage_key FROM lease_track('dumped', $id, 9, '{\"dumped\": 1}');"), 'and reported the same');
books_balance($node, 'a dump', dbname => 'restored');
$restored->quit;

# ---------------------------------------------------------------------------
# The server is killed between a track and what the upstream answers to its
# report: it is reported again, by the same key.

account([ 'crash: taken', 'crash: not taken' ], 1000);
all_is_told('before a crash');
sql("SELECT lease_prewarm('$_', '{tokens}');") for 'crash: taken', 'crash: not taken';
my ($taken) = (check('crash: taken', 'chat', 10))[1];
my ($not_taken) = (check('crash: not taken', 'chat', 10))[1];
$upstream->fault(fault => 'hang', match => 'events', company_id => 'crash: taken', after_effect => JSON::PP::true);
$upstream->fault(fault => 'hang', match => 'events', company_id => 'crash: not taken');

# at once, as both may have to go in one request
sql("BEGIN; SELECT lease_track('crash: taken', $taken, 7, '{\"crash\": 1}');
	SELECT lease_track('crash: not taken', $not_taken, 9, '{\"crash\": 2}'); COMMIT;");
until_true(sub { told('crash: taken') && told('crash: not taken') }, 'reports are under way');
is(told('crash: taken'), 'chat 7', 'one that the upstream takes');
is(told('crash: not taken'), 'chat 9', 'and one that it does not');

my @pids = split /\n/, sql('SELECT pid FROM pg_stat_activity;');
$node->kill9;
until_true(sub { !grep { kill 0, $_ } @pids }, 'the server is killed');
$upstream->clear;
$node->start;
$session = LeaseTest::Session->new($node);
all_is_told('a crash');
for my $company ('crash: taken', 'crash: not taken')
{
	my %keys = map { $_->{idempotency_key} => 1 } events($company);

	cmp_ok(scalar events($company), '>=', 2, "$company: is reported again");
	is(join(' ', keys %keys), last_track($company), "$company: by its key");
}
cmp_ok(($upstream->leases('crash: taken'))[0]{used}, '==', 1.75, 'what it had taken is charged once');
cmp_ok(($upstream->leases('crash: not taken'))[0]{used}, '==', 2.25, 'and so is the other one');
is(scalar $upstream->asked('acquire', 'explained'), 0, 'nobody has asked for what was only to be explained');
is(sql('SELECT count(*) FROM usage_report;'), 0, 'nothing is left to be reported');

$session->quit;
$node->stop;

done_testing();
