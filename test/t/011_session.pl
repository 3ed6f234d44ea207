# Sessions: whoever waits for a higher authorization is woken when it commits,
# and many calls at once, of sessions that expire and are closed meanwhile, with
# a crash in the middle of them.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use LeaseTest;

my $node = lease_cluster('main', conf => "max_connections = 40\n");
my $payer = LeaseTest::Session->new($node);
my $worker = LeaseTest::Session->new($node);

# ---------------------------------------------------------------------------
# LISTEN and NOTIFY

# Returns what psql has told of notifications since the last time, their payloads and a comma between them.
sub woken
{
	my ($session) = @_;

	return join ', ', $session->run_safe('SELECT 1 WHERE false;') =~ /with payload "(.*)" received from/g;
}

$payer->run_safe(q{SELECT lease_topup('acct', 'tokens', 100); SELECT lease_session_open('acct', 'tokens', 's', 10, '1 hour');});
$worker->run_safe('LISTEN credit_lease_session;');
is($worker->run_safe(q{SELECT applied, required_cumulative FROM lease_session_charge('acct', 's', 4);}), 'f|4', 'a charge has to wait');

$payer->run_safe(q{SELECT lease_session_authorize('acct', 's', 3);});
is(woken($worker), '', 'nobody is woken by who has not asked for it');

$payer->run_safe(q{SET credit_lease.notify_sessions = on; BEGIN; SELECT lease_session_authorize('acct', 's', 5);});
is(woken($worker), '', 'nor before the authorization commits');
$payer->run_safe('ROLLBACK; BEGIN;');
is(woken($worker), '', 'nor by one that is rolled back');
$payer->run_safe(q{SELECT lease_session_authorize('acct', 's', 4); COMMIT;});
is(woken($worker), '{"status": "open", "account": "acct", "deposit": 10, "session": "s", "accepted_cumulative": 4}',
	'the commit wakes who waits');
is($worker->run_safe(q{SELECT applied, spent FROM lease_session_charge('acct', 's', 4);}), 't|4', '... and the charge is applied');

$payer->run_safe(q{SELECT lease_session_authorize('acct', 's', 4); SELECT lease_session_authorize('acct', 's', 1);});
is($payer->run(q{SELECT lease_session_authorize('acct', 's', 11);}), '', 'an authorization is refused');
$payer->run_safe(q{SELECT lease_session_charge('acct', 's', 10); SELECT lease_session_snapshot('acct', 's');
	SELECT lease_session_open('acct', 'tokens', 's', 10, '1 hour'); SELECT lease_session_open('acct', 'tokens', 'silent', 1);
	SELECT lease_session_reconcile('acct', 's', '{"session": "s", "deposit": 10, "accepted_cumulative": 4, "spent": 4, "units": 9}');});
is(woken($worker), '', 'what raises nothing wakes nobody');

$payer->run_safe(q{SELECT lease_session_topup('acct', 's', 2);});
is(woken($worker), '{"status": "open", "account": "acct", "deposit": 12, "session": "s", "accepted_cumulative": 4}', 'a topup does');
$payer->run_safe(q{SELECT lease_session_reconcile('acct', 's', '{"session": "s", "deposit": 13, "accepted_cumulative": 5, "spent": 4}');});
is(woken($worker), '{"status": "open", "account": "acct", "deposit": 13, "session": "s", "accepted_cumulative": 5}',
	'what is raised to a snapshot does, once');
$payer->run_safe(q{SELECT lease_session_close('acct', 's', 6); SELECT lease_session_close('acct', 's', 6);});
is(woken($worker), '{"status": "closed", "account": "acct", "deposit": 13, "session": "s", "accepted_cumulative": 6}', 'and so does the end, once');
$_->quit for $payer, $worker;
books_balance($node, 'after notifications');

# ---------------------------------------------------------------------------
# Many at once. After a few hundred calls they go on to other sessions.

$node->safe_psql('postgres', q{
	SELECT credit_lease.lease_topup(a, 'tokens', 2000, priority => p)
	  FROM unnest(ARRAY['plain', 'striped']) a, generate_series(1, 3) p;
	SELECT credit_lease.lease_stripe('striped', 'tokens', 4);

	CREATE SEQUENCE generation;

	CREATE FUNCTION only_rises() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF (NEW.granted >= OLD.granted AND NEW.accepted >= OLD.accepted AND NEW.consumed >= OLD.consumed AND NEW.units >= OLD.units)
			IS NOT TRUE OR NEW.consumed > NEW.accepted OR NEW.accepted > NEW.granted THEN
			RAISE 'from % to %', OLD, NEW;
		END IF;
		RETURN NEW;
	END $$;
	CREATE TRIGGER only_rises BEFORE UPDATE ON credit_lease.chunk FOR EACH ROW WHEN (NEW.session IS NOT NULL)
		EXECUTE FUNCTION only_rises();

	CREATE FUNCTION use_session(account text, n int, m int) RETURNS text LANGUAGE plpgsql AS $$
	DECLARE
		name text := m % 4 || ' of ' || (SELECT last_value FROM public.generation);
	BEGIN
		CASE n
			WHEN 0 THEN PERFORM credit_lease.lease_session_topup(account, name, 1 + m);
			WHEN 1 THEN PERFORM credit_lease.lease_session_close(account, name, CASE m % 3 WHEN 0 THEN m / 2.0 END);
			WHEN 2 THEN PERFORM credit_lease.lease_session_reconcile(account, name, jsonb_build_object('session', name,
				'deposit', 30 + m, 'accepted_cumulative', m * 1.5, 'spent', m / 1.5, 'units', m));
			WHEN 3, 4 THEN PERFORM credit_lease.lease_session_open(account, 'tokens', name, 10 + m % 4,
				CASE m % 2 WHEN 0 THEN interval '200 ms' ELSE '1 hour' END);
			WHEN 5 THEN PERFORM credit_lease.lease_try_consume(account, 'tokens', m / 100.0);
			WHEN 6, 7 THEN PERFORM credit_lease.lease_session_authorize(account, name, m);
			WHEN 8 THEN PERFORM credit_lease.lease_reclaim(5);
			WHEN 9 THEN PERFORM nextval('public.generation') WHERE m = 1;
			ELSE PERFORM credit_lease.lease_session_charge(account, name, m / 8.0);
		END CASE;
		RETURN NULL;
	EXCEPTION WHEN SQLSTATE 'LC001' OR SQLSTATE 'LC003' OR SQLSTATE 'LC004' OR SQLSTATE 'LC005' OR SQLSTATE '22023' THEN
		RETURN SQLSTATE;
	END $$});
my $scripts = { use => q{
\set a random(0, 1)
\set n random(0, 15)
\set m random(0, 20)
SELECT public.use_session(CASE :a WHEN 0 THEN 'plain' ELSE 'striped' END, :n, 1 + :m);
} };

my ($status, undef, $err) = pgbench($node, '-c 8 -j 2 -t 400', $scripts);
is($status, 0, 'many calls at once, and each figure only rises') or diag($err);
books_balance($node, 'after many calls');
$node->safe_psql('postgres', q{
	SELECT credit_lease.lease_session_open('plain', 'tokens', 'lapses', 0.5, '1 microsecond'); SELECT credit_lease.lease_reclaim()});
is($node->safe_psql('postgres', q{
	SELECT string_agg(DISTINCT kind, ' ' ORDER BY kind) FROM credit_lease.ledger WHERE kind LIKE 'session%'}),
	'session session_charge session_close session_expire', 'something of everything has happened');
is($node->safe_psql('postgres', q{
	SELECT count(*) FROM (SELECT l.account, count(*) FILTER (WHERE kind = 'topup') FROM credit_lease.ledger l
		WHERE l.account IN ('plain', 'striped') GROUP BY 1) x (account, n),
		LATERAL (SELECT sum(consumed) FROM credit_lease.lease_balance(x.account)) b (consumed),
		LATERAL (SELECT sum(amount) FROM credit_lease.ledger l WHERE l.account = x.account AND (kind = 'consume' OR kind = 'session_charge')) s (spent)
	 WHERE n = 3 AND b.consumed = s.spent}), '2', 'what was charged is what was spent');

my $entries = $node->safe_psql('postgres', 'SELECT count(*) FROM credit_lease.ledger');
my $running = start_pgbench($node, '-c 8 -j 2 -T 3600', $scripts);
becomes($node, "SELECT count(*) > $entries + 300 FROM credit_lease.ledger", 'and they go on');
$node->stop('immediate');
finish_pgbench($running);
$node->start;
books_balance($node, 'after the crash');
is((pgbench($node, '-c 8 -j 2 -t 50', $scripts))[0], 0, 'they begin again');
books_balance($node, 'after all');

$node->stop;
done_testing();
