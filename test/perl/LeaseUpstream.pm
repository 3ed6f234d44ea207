# LeaseUpstream.pm
#	The reference upstreams as child processes: test/upstream/schematic.py, or
#	metronome.py.
#
# What its control interface takes and returns is told there. Amounts come back
# as Math::BigInt and Math::BigFloat where a Perl number would round them, and
# should be given as texts there.

package LeaseUpstream;

use strict;
use warnings;

use File::Basename qw(dirname);
use HTTP::Tiny;
use JSON::PP;
use Math::BigFloat;
use POSIX qw(WNOHANG);
use Test::More;
use Time::HiRes qw(sleep);

my $programs = dirname(__FILE__) . '/../upstream';
my $json = JSON::PP->new->utf8->canonical->allow_bignum;

# those to end with the test, by process
my %running;

# Starts a server that keeps its state and its log in dir. dialect is what it
# speaks, schematic if it is not said; tls is [certificate, key], or 1 for a
# certificate of its own, which certificate() tells; options go to the program.
sub start
{
	my ($class, %params) = @_;
	my $self = bless {
		dir => $params{dir},
		dialect => $params{dialect} // 'schematic',
		port => 0,
		tls => $params{tls},
		options => $params{options} // [],
		http => HTTP::Tiny->new(
			keep_alive => 0,
			proxy => undef,
			http_proxy => undef,
			timeout => 180)
	}, $class;

	mkdir $self->{dir};
	$self->_make_certificate if $self->{tls} && !ref $self->{tls};
	$self->_run;
	return $self;
}

# Returns the URL of the billing API, and that of the events, which is the same.
sub url
{
	my ($self) = @_;

	return ($self->{tls} ? 'https' : 'http') . "://127.0.0.1:$self->{port}";
}

sub events_url
{
	my ($self) = @_;

	return $self->url;
}

# Returns the file of the certificate, which is its own authority if tls is 1.
sub certificate
{
	my ($self) = @_;

	return $self->{tls}[0];
}

sub log_file
{
	my ($self) = @_;

	return "$self->{dir}/log";
}

sub balance
{
	my ($self, $company, $credit, $amount) = @_;

	$self->_control(
		POST => 'balance',
		{ company_id => $company, credit_type_id => $credit, amount => "$amount" });
	return;
}

# Says what events of a name cost from now on, in one credit if it is said, and
# what that is rounded up to a multiple of: by itself to what amounts are here.
sub rate
{
	my ($self, $event, $rate, $credit, $unit) = @_;

	$self->_control(
		POST => 'rate',
		{ event => $event, credit_type_id => $credit, rate => "$rate", unit => '' . ($unit // '0.000000000001') });
	return;
}

# Adds a fault, given by the fields the program lists; undef is null.
sub fault
{
	my ($self, %fault) = @_;

	$self->_control(POST => 'fault', \%fault);
	return;
}

# Ends all faults.
sub clear
{
	my ($self) = @_;

	$self->_control(DELETE => 'fault');
	return;
}

sub books
{
	my ($self) = @_;

	return $self->_control(GET => 'books');
}

# Returns the requests logged, those after number $since.
sub requests
{
	my ($self, $since) = @_;

	return @{ $self->_control(GET => 'requests?since=' . ($since // 0))->{requests} };
}

# Returns a company's events among those of a request.
sub events_of
{
	my ($self, $company, $request) = @_;

	return grep { $_->{customer_id} eq $company } @{ $request->{body} } if $self->{dialect} eq 'metronome';
	return grep { $_->{body}{company}{id} eq $company } @{ $request->{body}{events} };
}

# Returns the requests of a kind that concern a company. Events may come
# together with those of others.
sub asked
{
	my ($self, $kind, $company) = @_;

	return grep {
		$_->{kind} eq $kind && ($kind =~ /^(events|ingest)$/ ? $self->events_of($company, $_) : ($_->{company_id} // '') eq $company)
	} $self->requests;
}

# Returns a customer: total, balance and used.
sub customer
{
	my ($self, $customer) = @_;

	return (grep { $_->{customer_id} eq $customer } @{ $self->books->{customers} })[0];
}

# Returns the leases of a company.
sub leases
{
	my ($self, $company) = @_;

	return grep { $_->{company_id} eq $company } @{ $self->books->{leases} };
}

sub reset
{
	my ($self) = @_;

	$self->_control(POST => 'reset');
	return;
}

# Kills the server, unless it is stopped already, and starts it again with the
# same port and state.
sub restart
{
	my ($self) = @_;

	$self->stop('KILL');
	$self->_run;
	return;
}

sub stop
{
	my ($self, $signal) = @_;

	_end(delete $self->{pid}, $signal // 'TERM') if $self->{pid};
	return;
}

# Returns a file that has a key, "test-key" if it is not said, and that nobody
# else may read.
sub key_file
{
	my ($self, $key) = @_;
	my $file = "$self->{dir}/key." . $self->{keys}++;

	open my $out, '>', $file or die "could not create $file: $!";
	print $out $key // 'test-key', "\n";
	close $out;
	chmod 0600, $file or die "could not chmod $file: $!";
	return $file;
}

# Returns the SQL that makes the upstream known, as a foreign server of a name.
# url and key_file stand for its own; options are further ones of the server.
sub server
{
	my ($self, $name, %params) = @_;
	my $url = $params{url} // $self->url;
	my $key_file = $params{key_file} // ($self->{key_file} //= $self->key_file);
	my $options = join '', map { ", $_ '$params{options}{$_}'" } sort keys %{ $params{options} // {} };

	return qq{
		CREATE SERVER "$name" FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect '$self->{dialect}', url '$url'$options);
		CREATE USER MAPPING FOR CURRENT_USER SERVER "$name" OPTIONS (api_key_file '$key_file');};
}

# Tests that its books are ours, those of the databases given as [node, name],
# within half a minute. A lease that has ended may have been granted more than
# we have heard of. One that we have not heard of was not used and has ended.
#
# What lease_track() was told is charged there to the first lease that has paid,
# all of it; and to the company if no lease has. So that this can be compared,
# events have to cost there what they do here, and what a grant of our own has
# paid a part of, has to be divisible.
sub same_books
{
	my ($self, $name, @databases) = @_;
	my $deadline = time + 30;
	my @wrong;

	while (@wrong = $self->_differences(@databases))
	{
		last if time > $deadline;
		sleep 0.1;
	}
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(join("\n", @wrong), '', "$name: the upstream's books are ours");
}

# What lease_track() was told, what it costs upstream and which lease it is
# charged to; reported is what was not refused
my $reported = q{
	WITH tracked AS (
		SELECT r.account, r.credit, r.track_entry_id,
			   r.consumed + r.shortfall - coalesce(sum(l.amount) FILTER (WHERE t.server IS NULL), 0) AS cost,
			   (array_agg(t.tranche_id ORDER BY l.entry_id) FILTER (WHERE t.server IS NOT NULL AND l.amount > 0))[1] AS tranche_id
		  FROM credit_lease.reservation r
		  LEFT JOIN credit_lease.ledger l
			ON l.account = r.account AND l.reservation_id = r.reservation_id AND l.kind = 'track'
		  LEFT JOIN credit_lease.whole_tranche t
			ON t.account = l.account AND t.credit = l.credit AND t.tranche_id = l.tranche_id
		 WHERE r.tracked > 0 GROUP BY r.account, r.reservation_id
	),
	reported AS (
		SELECT * FROM tracked t WHERE cost > 0 AND NOT EXISTS (SELECT FROM credit_lease.usage_report r
			WHERE r.account = t.account AND r.entry_id = t.track_entry_id)
	)};

# Returns what is not as same_books() wants it, in words.
sub _differences
{
	my ($self, @databases) = @_;
	my (%ours, %companies, @wrong);

	for (@databases)
	{
		my ($node, $dbname) = @$_;

		push @wrong, "$dbname has something to tell" if $node->safe_psql($dbname, q{
			SELECT EXISTS (SELECT FROM credit_lease.usage_report WHERE refused_at IS NULL)
				OR EXISTS (SELECT FROM credit_lease.upstream_request WHERE kind <> 'acquire' AND NOT refused)
				OR EXISTS (SELECT FROM credit_lease.lease_usage u JOIN credit_lease.whole_tranche t
					USING (account, credit, tranche_id) WHERE t.consumed <> u.consumed AND NOT u.complete)}) eq 't';
		for (split /\n/, $node->safe_psql($dbname, $reported . q{
			SELECT t.lease_id, t.granted,
				   u.consumed + u.owed - coalesce((SELECT sum(r.quantity) FROM credit_lease.usage_report r
					WHERE r.account = t.account AND r.credit = t.credit AND r.tranche_id = t.tranche_id
					  AND r.entry_id NOT IN (SELECT track_entry_id FROM tracked)), 0)
				   - coalesce((SELECT sum(l.amount) FROM credit_lease.ledger l
					WHERE l.account = t.account AND l.tranche_id = t.tranche_id AND l.kind = 'track'), 0)
				   + coalesce((SELECT sum(r.cost) FROM reported r WHERE r.tranche_id = t.tranche_id), 0),
				   CASE WHEN t.released_at IS NOT NULL THEN 'released' WHEN t.expires_at > clock_timestamp() THEN 'live'
					ELSE 'expired' END
			  FROM credit_lease.whole_tranche t JOIN credit_lease.lease_usage u USING (account, credit, tranche_id)}))
		{
			my ($id, $granted, $used, $state) = split /\|/;

			push @wrong, "$id is there twice" if exists $ours{$id};
			$ours{$id} = { granted => $granted, used => $used, state => $state };
		}
		for (split /\n/, $node->safe_psql($dbname, $reported . q{
			SELECT p.company_id || ' ' || p.credit_type_id, sum(r.cost)
			  FROM reported r, credit_lease.lease_policy(r.account, r.credit) p
			 WHERE r.tranche_id IS NULL AND p.server IS NOT NULL GROUP BY 1}))
		{
			my ($company, $used) = split /\|/;

			$companies{$company} = Math::BigFloat->new($used) + ($companies{$company} // 0);
		}
	}

	my $books = $self->books;
	for my $theirs (@{ $books->{leases} })
	{
		my $lease = delete $ours{ $theirs->{id} } // { granted => 0, used => 0, state => 'unknown' };

		push @wrong, "$theirs->{id} of $theirs->{company_id}: $theirs->{state}, granted $theirs->{granted},"
		  . " used $theirs->{used}; here $lease->{state}, granted $lease->{granted}, used $lease->{used}"
		  if $theirs->{used} != $lease->{used}
		  || $theirs->{granted} < $lease->{granted}
		  || ($theirs->{state} eq 'live' && $theirs->{granted} != $lease->{granted})
		  || ($theirs->{state} eq 'live' && $lease->{state} eq 'released')
		  || ($theirs->{state} eq 'released' && $lease->{state} eq 'live');
	}
	push @wrong, "$_ is not there" for sort keys %ours;
	for my $theirs (@{ $books->{companies} })
	{
		my $company = "$theirs->{company_id} $theirs->{credit_type_id}";
		my $used = delete $companies{$company} // 0;

		push @wrong, "$company: used $theirs->{used} without a lease; here $used" if $theirs->{used} != $used;
	}
	push @wrong, "$_: used $companies{$_} here without a lease" for sort keys %companies;
	push @wrong, 'they are not consistent' unless $books->{consistent};
	push @wrong, "$books->{events}{$_} events are $_" for grep { $books->{events}{$_} } qw(conflicts uncharged);
	return @wrong;
}

sub _run
{
	my ($self) = @_;
	my $port_file = "$self->{dir}/port";
	my @command = (
		'python3', '-B', "$programs/$self->{dialect}.py",
		'--port', $self->{port},
		'--port-file', $port_file,
		'--file', "$self->{dir}/state",
		($self->{tls} ? ('--tls', @{ $self->{tls} }) : ()),
		@{ $self->{options} });

	unlink $port_file;
	my $pid = fork // die "could not fork: $!";
	if ($pid == 0)
	{
		# what the test has open is nobody else's: a psql would miss the end of its input
		POSIX::close($_) for 3 .. 255;
		open STDIN, '<', '/dev/null' or POSIX::_exit(127);
		open STDOUT, '>>', $self->log_file or POSIX::_exit(127);
		open STDERR, '>&', \*STDOUT or POSIX::_exit(127);
		{ exec @command };
		POSIX::_exit(127);
	}
	$self->{pid} = $pid;
	$running{$pid} = $$;

	my $deadline = time + 180;
	until (-e $port_file)
	{
		if (waitpid($pid, WNOHANG) == $pid)
		{
			delete $running{ delete $self->{pid} };
			die "the upstream did not start: see " . $self->log_file;
		}
		die "the upstream is not ready" if time > $deadline;
		sleep 0.01;
	}
	open my $file, '<', $port_file or die "could not open $port_file: $!";
	chomp($self->{port} = <$file>);
	return;
}

sub _make_certificate
{
	my ($self) = @_;
	my @files = ("$self->{dir}/server.crt", "$self->{dir}/server.key");

	system('openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes',
		'-days', '2', '-subj', '/CN=127.0.0.1', '-addext', 'subjectAltName=IP:127.0.0.1',
		'-out', $files[0], '-keyout', $files[1], '-batch') == 0
	  or die 'could not make a certificate';
	$self->{tls} = \@files;
	return;
}

# The control interface is plain http even where the API is not.
sub _control
{
	my ($self, $method, $path, $body) = @_;
	my $reply = $self->{http}->request($method, "http://127.0.0.1:$self->{port}/_/$path",
		{ defined $body ? (content => $json->encode($body)) : () });

	die "$method $path: $reply->{status} $reply->{content}" unless $reply->{success};
	return $json->decode($reply->{content});
}

# Ends a child of this process.
sub _end
{
	my ($pid, $signal) = @_;

	return if (delete $running{$pid} // 0) != $$;
	local ($?, $!);
	kill $signal, $pid;
	waitpid $pid, 0;
	return;
}

sub DESTROY
{
	my ($self) = @_;

	$self->stop;
	return;
}

END
{
	_end($_, 'TERM') for keys %running;
}

1;
