# A random sequence of calls, each answer and each balance compared with those
# of a plain model (test/perl/LeaseModel.pm): whatever the functions keep for
# speed, they must do what the contract says.
#
# CREDIT_LEASE_MODEL_STEPS	how many steps, 4800 by default
# CREDIT_LEASE_MODEL_SEED	repeats a run that failed; the same steps need the
#							same number of them or fewer

use strict;
use warnings;

use List::Util qw(first max min sum0);
use POSIX qw(strftime);
use Test::More;
use Time::Local qw(timegm);

use PostgreSQL::Test::Utils;
use LeaseModel;
use LeaseTest;

my $steps = $ENV{CREDIT_LEASE_MODEL_STEPS} || 4800;
my $seed = $ENV{CREDIT_LEASE_MODEL_SEED} // int(rand(2**31));

# Steps with the same accounts; then others, with amounts of another size.
my $steps_of_epoch = 400;
my $steps_between_verify = 100;

# Microseconds count from here.
my $epoch_start = 1_900_000_000;
my $second = 1_000_000;

my @credits = ('tokens', 'gpu seconds');
my %metadata = (
	a => [ q('{"a": 1}'), q('{"a":1.0}') ],
	b => [ q('{"a": 2, "b": [1, null]}'), q('{"b":[1,null], "a":2}') ],
	nothing => [q('null')]);

# Arguments in the contract's order, and the types of the result's columns:
# amount, id, boolean, instant, word.
my %function = (
	topup => [ [qw(account credit amount key expires_at priority metadata)], 'iiaab' ],
	adjust => [ [qw(account credit amount reason key metadata)], 'iaab' ],
	refund => [ [qw(account entry_id amount reason key)], 'iaab' ],
	consume => [ [qw(account credit amount key metadata)], 'biaab' ],
	try_consume => [ [qw(account credit amount key metadata)], 'biaab' ],
	reserve => [ [qw(account credit amount ttl key min_amount metadata)], 'biaatb' ],
	try_reserve => [ [qw(account credit amount ttl key min_amount metadata)], 'biaatb' ],
	settle => [ [qw(account reservation_id amount overage metadata)], 'iaaaaab' ],
	cancel => [ [qw(account reservation_id)], 'b' ],
	renew => [ [qw(account reservation_id ttl add_amount)], 'iat' ],
	install => [ [qw(account credit lease_id granted expires_at server)], 'b' ],
	extend => [ [qw(account credit lease_id granted_total expires_at)], 'b' ],
	release => [ [qw(account credit lease_id)], 'b' ],
	freeze => [ [qw(account credit reason)], 'b' ],
	unfreeze => [ [qw(account credit)], 'b' ],
	session_open => [ [qw(account credit session deposit ttl)], 'bwaaaaiw' ],
	session_topup => [ [qw(account session amount)], 'bwaaaaiw' ],
	session_authorize => [ [qw(account session cumulative)], 'bwaaaaiw' ],
	session_charge => [ [qw(account session amount)], 'bwaaaaiw' ],
	session_snapshot => [ [qw(account session next_amount)], 'bwaaaaiw' ],
	session_reconcile => [ [qw(account session snapshot)], 'bwaaaaiw' ],
	session_close => [ [qw(account session cumulative)], 'bwaaaaiw' ]);
my @amounts = qw(amount min_amount add_amount granted granted_total deposit cumulative next_amount);
my %type_of = (
	(map { $_ => 'a' } @amounts),
	(map { $_ => 'i' } qw(entry_id reservation_id priority)),
	(map { $_ => 'text' } qw(account credit key reason overage lease_id session)),
	server => 'name',
	expires_at => 't',
	ttl => 'interval',
	metadata => 'metadata',
	snapshot => 'snapshot');

# Which of them come how often.
my %weight = (
	topup => 9, adjust => 7, refund => 9, consume => 9, try_consume => 7, reserve => 11, try_reserve => 7,
	settle => 12, cancel => 4, renew => 8, freeze => 2, unfreeze => 4, install => 5, extend => 8, release => 2,
	session_open => 6, session_topup => 5, session_authorize => 7, session_charge => 8, session_snapshot => 2,
	session_reconcile => 5, session_close => 4, ingest => 10,
	again => 12, bad => 3, clock => 6, reclaim => 3, stripe => 3, begin => 4, look => 1);

srand($seed);
my $node = lease_cluster('model', conf => 'restart_after_crash = on');
my $session = LeaseTest::Session->new($node);
my $world = LeaseModel->new(now => 0);
my @nested;			# worlds to go back to, one for each BEGIN and SAVEPOINT
my $transaction_left = 0;
my ($exponent, @accounts, @made, $key_number, $session_number, $stripes_change);
my $next_epoch = 1;
my @hot;			# an account, and a hold or a session in it, on which the clock has just moved
my @log;			# the last calls
my %seen;			# what happened how often

# ---------------------------------------------------------------------------
# Between the model's integers and SQL
# ---------------------------------------------------------------------------

# In the model an amount is an integer; in SQL it is that, times ten to the
# epoch's exponent.
sub amount_text
{
	my ($amount, $spelling) = @_;
	my $sign = $amount < 0 ? '-' : '';
	my $digits = abs($amount);

	return $sign . $digits . '0' x $exponent if $exponent >= 0;

	$digits = '0' x (1 - $exponent - length $digits) . $digits if length $digits <= -$exponent;
	$digits = substr($digits, 0, $exponent) . '.' . substr($digits, $exponent);
	$digits =~ s/\.?0+$// if !$spelling;
	return $sign . $digits;
}

sub amount_parse
{
	my ($text) = @_;

	my ($sign, $whole, $fraction) = $text =~ /^(-?)(\d+)(?:\.(\d+))?$/ or return "no amount: $text";
	($fraction //= '') =~ s/0+$//;
	if ($exponent < 0)
	{
		return "too fine: $text" if length $fraction > -$exponent;
		$whole .= $fraction . '0' x (-$exponent - length $fraction);
	}
	elsif ($fraction ne '' || ($whole ne '0' && $whole !~ s/0{$exponent}$//))
	{
		return "too fine: $text";
	}
	$whole =~ s/^0+(?=\d)//;
	return "too big: $text" if length $whole > 18;
	return $sign ? -$whole : $whole + 0;
}

sub instant_text
{
	my ($instant) = @_;
	my $seconds = int($instant / $second);

	return strftime('%Y-%m-%d %H:%M:%S', gmtime($epoch_start + $seconds))
	  . sprintf('.%06d+00', $instant - $seconds * $second);
}

sub instant_parse
{
	my ($text) = @_;

	my ($year, $month, $day, $hour, $minute, $seconds, $fraction) =
	  $text =~ /^(\d+)-(\d+)-(\d+) (\d+):(\d+):(\d+)(?:\.(\d+))?\+00$/ or return "no instant: $text";
	return (timegm($seconds, $minute, $hour, $day, $month - 1, $year) - $epoch_start) * $second
	  + substr(($fraction // '') . '000000', 0, 6);
}

# In SQL: the model's number for an instant.
sub instant_sql
{
	my ($expression) = @_;

	return "((extract(epoch FROM $expression) - $epoch_start) * $second)::bigint";
}

sub argument_text
{
	my ($name, $value, $spelling) = @_;
	my $type = $type_of{$name};

	return 'NULL' if !defined $value;
	return $value if $type eq 'i';
	return amount_text($value, $spelling) if $type eq 'a';
	return quoted($value) if $type eq 'text' || $type eq 'name';
	return quoted(instant_text($value)) if $type eq 't';
	return quoted($spelling ? "$value us" : sprintf('%.6f seconds', $value / $second)) if $type eq 'interval';
	return snapshot_text($value, $spelling) if $type eq 'snapshot';
	return $metadata{$value}[ $spelling % @{ $metadata{$value} } ];
}

sub snapshot_text
{
	my ($told, $spelling) = @_;
	my %member = (deposit => 'deposit', accepted => 'accepted_cumulative', spent => 'spent');

	return quoted('{"session": ' . json_string($told->{session})
		  . join('', map { qq{, "$member{$_}": } . ($told->{$_} && amount_text($told->{$_}, $spelling)) } sort keys %member)
		  . (defined $told->{units} ? qq{, "units": $told->{units}} : '') . '}');
}

# Returns a text as JSON.
sub json_string
{
	my ($text) = @_;

	return '"' . $text =~ s/(["\\])/\\$1/gr . '"';
}

# The SQL of a call; arguments are left out now and then where NULL, or their
# default, is meant.
sub call_text
{
	my ($call) = @_;
	my ($arguments, $columns) = @{ $function{ $call->{function} } };
	my $spelling = $call->{spelling};
	my %given = %{ $call->{given} // {} };
	my @texts;

	for my $name (@$arguments)
	{
		my $text = $given{$name} // argument_text($name, $call->{$name}, $spelling);

		next if $text eq 'NULL' && ($spelling || $name =~ /^(overage|add_amount|next_amount)$/) && !$given{$name};
		push @texts, ($name eq 'key' ? 'idempotency_key' : $name) . " => $text";
	}
	my $list = join ', ', @texts;
	return "SELECT " . ($columns eq 'b' ? 'r' : 'r.*') . " FROM lease_$call->{function}($list) AS r";
}

# The SQL of a batch of events, as arrays or as jsonb.
sub batch_text
{
	my ($batch) = @_;
	my @events = @{ $batch->{events} };
	my $field = sub {
		my ($event, $name) = @_;

		return ($event->{given} // {})->{$name} // argument_text($name, $event->{$name}, $event->{spelling});
	};
	my @arguments;

	if ($batch->{json})
	{
		for my $event (@events)
		{
			my %member = (
				credit => json_string($event->{credit}),
				account => json_string($event->{account}),
				amount => $field->($event, 'amount'));

			$member{ $event->{spelling} ? 'key' : 'idempotency_key' } = json_string($event->{key}) if defined $event->{key};
			$member{metadata} = $field->($event, 'metadata') =~ s/^'|'$//gr if defined $event->{metadata};
			push @arguments, '{' . join(', ', map { qq{"$_": $member{$_}} } sort keys %member) . '}';
		}
		@arguments = quoted('[' . join(', ', @arguments) . ']');
	}
	else
	{
		my %column = (account => 'text', credit => 'text', amount => 'numeric', key => 'text', metadata => 'jsonb');

		for my $name (qw(account credit amount key metadata))
		{
			next if $name =~ /key|metadata/ && !grep { defined $_->{$name} } @events;
			push @arguments, ($name eq 'key' ? 'idempotency_key' : $name) . ' => ARRAY['
			  . join(', ', map { $field->($_, $name) } @events) . "]::$column{$name}\[]";
		}
	}
	push @arguments, "on_short => '$batch->{on_short}'" if $batch->{on_short};
	return 'SELECT r.* FROM lease_ingest(' . join(', ', @arguments) . ') AS r';
}

# The columns of an answer as the model has them.
sub parse_row
{
	my ($text, $columns) = @_;
	my @values = split /\|/, $text, -1;
	my @types = split //, $columns;

	return [ "columns: $text" ] if @values != @types;
	return [
		map {
			my ($value, $type) = ($values[$_], $types[$_]);
			$value eq '~' ? undef
			  : $type eq 'a' ? amount_parse($value)
			  : $type eq 't' ? instant_parse($value)
			  : $value
		} 0 .. $#types
	];
}

# ---------------------------------------------------------------------------
# What may be called next
# ---------------------------------------------------------------------------

sub pick { return $_[ int(rand(@_)) ] }
sub chance { return rand(100) < $_[0] }

sub start_epoch
{
	my ($number) = @_;

	do_look($number) if @accounts;
	verify($number);
	$world->{account} = {};

	# twelve digits after the point, none, and 26 before it
	$exponent = pick(-12, -12, -12, -2, 0, 11);
	$stripes_change = chance(60);
	@accounts = map { "$number$_" } ('/acct:1', "/it's \"Zo\x{c3}\x{ab}\" \\", '/' . 'x' x 40);
	$next_epoch = $number + $steps_of_epoch;
	@made = ();
	@hot = ();
	$key_number = $session_number = 0;
	return;
}

# Returns a positive amount up to 400 of something, of 0 to 12 digits.
sub any_amount
{
	my $unit = pick(1, 10**6, 10**10, 10**12, 10**12);

	return $unit * (1 + int(rand(min(400 * 10**12 / $unit, 10**9))));
}

# Returns an amount that is likely to be near a limit.
sub near
{
	my ($limit) = @_;

	return any_amount() if $limit <= 0 || chance(10);
	return $limit + pick(0, 0, 1, $limit > 1 ? -1 : 0) if chance(25);
	return 1 + int($limit / pick(2, 3, 7, 9, 100, 1 + rand(10)));
}

sub any_ttl
{
	return pick(undef, 1, map { $_ * $second } 1, 10, 60, 60, 300, 300, 3600, 3600, 1 + int(rand(900)));
}

sub add_key
{
	my ($call) = @_;
	my $account = $world->account($call->{account});
	my @used = sort keys %{ $account->{key} };

	if (chance(5) && @used)
	{
		$call->{key} = pick(@used);
	}
	elsif (chance(45))
	{
		$call->{key} = 'key ' . ++$key_number;
		$call->{key} = "k'\x{e2}\x{82}\x{ac}" . $call->{key} if chance(10);
	}
	return;
}

# Returns the number of a hold of the account, or of nobody.
sub any_hold
{
	my ($account) = @_;
	my @held = sort grep { $account->{hold}{$_}{status} eq 'held' } keys %{ $account->{hold} };
	my @all = sort keys %{ $account->{hold} };
	my $other = $world->account(pick(@accounts));

	return $hot[1] if @hot && $hot[1] && $account->{hold}{ $hot[1] } && chance(50);
	return pick(@held) if @held && chance(85);
	return pick(@all) if @all && chance(90);
	return pick(0, -1, 999999999, sort keys %{ $other->{hold} });
}

sub live_leases
{
	my ($account) = @_;

	return grep { defined $_->{lease_id} && $world->_alive($_) }
	  map { $account->{tranche}{$_} } sort { $a <=> $b } keys %{ $account->{tranche} };
}

# Returns the id of a lease of the pool, or of none; few, so that servers share them.
sub any_lease
{
	my ($account, $credit) = @_;
	my @live = map { $_->{lease_id} } grep { $_->{credit} eq $credit } live_leases($account);

	return pick(@live) if @live && chance(70);
	return "lease '" . int(rand(30));
}

# Returns the sessions of an account that have not ended, by the clock.
sub live_sessions
{
	my ($account) = @_;

	return grep { $_->{status} eq 'open' && $_->{expires_at} > $world->{now} }
	  map { $account->{session}{$_} } sort keys %{ $account->{session} };
}

# Returns the name of a session of the account, or of none.
sub any_session
{
	my ($account) = @_;
	my @live = map { $_->{name} } live_sessions($account);
	my @all = sort keys %{ $account->{session} };

	return $hot[1] if @hot && $account->{session}{ $hot[1] } && chance(50);
	return pick(@live) if @live && chance(85);
	return pick(@all) if @all && chance(90);
	return 'nobody\'s "session" \\';
}

# Returns what another side may know of a session: often more than there is here.
sub any_snapshot
{
	my ($name, $session_name) = @_;
	my $session = $world->account($name)->{session}{$session_name};
	my %here = $session ? %$session : (deposit => 0, accepted => 0, spent => 0, units => 0);
	my %told = (session => $session_name, units => pick(undef, $here{units}, $here{units} + 2, 0));
	my $more = $session ? $world->available($name, $session->{credit}) : 0;

	$told{deposit} = max(1, chance(40) ? $here{deposit} + near($more) : $here{deposit} - pick(0, 0, 1));
	$told{accepted} = chance(60) ? $here{accepted} : near($told{deposit});
	$told{spent} = chance(50) ? $here{spent} : near($told{accepted});
	return \%told;
}

sub any_entry
{
	my ($account) = @_;
	my @consumed = sort grep {
		sum0(map { $_->{consumed} - $_->{refunded} } @{ $account->{call}{$_}{parts} }) > 0
	} keys %{ $account->{call} };
	my @partly = grep {
		grep { $_->{refunded} } @{ $account->{call}{$_}{parts} }
	} @consumed;
	my @all = sort keys %{ $account->{call} };
	my $other = $world->account(pick(@accounts));

	return pick(@partly) if @partly && chance(30);
	return pick(@consumed) if @consumed && chance(80);
	return pick(@all) if @all && chance(85);
	return pick(0, -1, 999999999, sort keys %{ $other->{call} });
}

# Returns a random call of a function.
sub any_call
{
	my ($function) = @_;
	my $name = @hot && chance(50) ? $hot[0] : pick(@accounts);
	my %has = map { $_ => 1 } @{ $function{$function}[0] };

	if ($has{reservation_id} && chance(80))
	{
		# where there is something to do
		$name = pick($name, grep {
			grep { $_->{status} eq 'held' } values %{ $world->account($_)->{hold} }
		} @accounts);
	}
	elsif ($function =~ /^(extend|release)$/ && chance(80))
	{
		$name = pick($name, grep { live_leases($world->account($_)) } @accounts);
	}
	elsif ($function =~ /^session_(?!open)/ && chance(85))
	{
		$name = pick(grep { live_sessions($world->account($_)) } @accounts) // $name
		  if !live_sessions($world->account($name));
		$function = 'session_open' if !live_sessions($world->account($name));
		%has = map { $_ => 1 } @{ $function{$function}[0] };
	}
	elsif ($function eq 'unfreeze' && chance(70))
	{
		$name = pick($name, grep { %{ $world->account($_)->{frozen} } } @accounts);
	}
	my $account = $world->account($name);
	my %call = (function => $function, account => $name, spelling => int(rand(2)));

	$call{credit} = pick(@credits) if $has{credit};
	$call{credit} = pick(grep { $world->available($name, $_) > 0 } @credits) // $call{credit}
	  if $function =~ /consume|reserve|open/ && chance(80);
	$call{credit} = undef if $function =~ /freeze/ && chance($function eq 'freeze' ? 30 : 60);
	$call{metadata} = pick(sort keys %metadata) if $has{metadata} && chance(15);
	$call{reason} = 'because' if $function eq 'adjust' || ($has{reason} && chance(20));
	$call{reservation_id} = any_hold($account) if $has{reservation_id};
	if ($has{lease_id})
	{
		$call{credit} = pick(map { $_->{credit} } live_leases($account)) // $call{credit} if chance(80);
		$call{lease_id} = any_lease($account, $call{credit});
	}
	$call{session} = $function eq 'session_open' && chance(85) ? q(s') . ++$session_number : any_session($account)
	  if $has{session};
	my $session = $has{session} ? $account->{session}{ $call{session} } : undef;
	add_key(\%call) if $has{key};
	my $available = defined $call{credit} ? $world->available($name, $call{credit}) : 0;

	if ($function eq 'topup')
	{
		$call{amount} = any_amount();
		$call{priority} = pick(100, 100, 100, 1, 2, -5, 200);
		# two of the same instant, too: the older burns first
		$call{expires_at} = pick(
			undef, undef, expiries($account),
			map { $world->{now} + $_ } 1, $second, 60 * $second, 3600 * $second, 1 + int(rand(2000 * $second)));
	}
	elsif ($function eq 'adjust')
	{
		$call{amount} = chance(30) ? any_amount() : -near($available);
	}
	elsif ($function eq 'refund')
	{
		$call{entry_id} = any_entry($account);
		my $of = $account->{call}{ $call{entry_id} };
		my $left = $of ? sum0(map { $_->{consumed} - $_->{refunded} } @{ $of->{parts} }) : 0;
		my $consumed = $of ? sum0(map { $_->{consumed} } @{ $of->{parts} }) : 0;
		$call{amount} = near(pick($left, $left, $consumed)) if chance(75);
	}
	elsif ($function =~ /consume/)
	{
		$call{amount} = near($available);
	}
	elsif ($function eq 'session_open')
	{
		$call{deposit} = $session && chance(70) ? $session->{opened} : near($available);
		$call{credit} = $session->{credit} if $session && chance(80);
		$call{ttl} = pick(any_ttl(), map { $_ * 3600 * $second } 1, 24);
	}
	elsif ($function eq 'session_topup')
	{
		$call{amount} = near($session ? $world->available($name, $session->{credit}) : 0);
	}
	elsif ($function eq 'session_authorize')
	{
		$call{cumulative} = $session && chance(70)
		  ? $session->{accepted} + near($session->{deposit} - $session->{accepted})
		  : pick(0, near($session ? $session->{deposit} : 0));
	}
	elsif ($function =~ /session_(charge|snapshot)/)
	{
		my $amount = near($session ? $session->{accepted} - $session->{spent} : 0);

		if ($1 eq 'charge') { $call{amount} = $amount }
		elsif (chance(50)) { $call{next_amount} = pick(0, $amount) }
	}
	elsif ($function eq 'session_reconcile')
	{
		$call{snapshot} = any_snapshot($name, $call{session});
	}
	elsif ($function eq 'session_close' && chance(60))
	{
		$call{cumulative} = !$session || chance(20) ? near(0)
		  : $session->{spent} + (chance(20) ? 0 : near($session->{deposit} - $session->{spent}));
	}
	elsif ($function =~ /reserve/)
	{
		$call{amount} = near($available);
		$call{ttl} = any_ttl();
		$call{min_amount} = min($call{amount}, near($available)) if chance(40);
	}
	elsif ($function eq 'settle')
	{
		my $hold = $account->{hold}{ $call{reservation_id} };

		$call{amount} = chance(15) ? 0 : near($hold ? $hold->{amount} : 0) if chance(85);
		$call{amount} += near($world->available($name, $hold->{credit}))
		  if $call{amount} && $hold && chance(%{ $account->{frozen} } ? 60 : 25);
		$call{overage} = pick('charge', 'clamp', 'refuse') if chance(60);
	}
	elsif ($function eq 'install')
	{
		$call{granted} = any_amount();
		$call{server} = pick(undef, 'server_a', 'server_b');
		$call{expires_at} = pick(expiries($account),
			map { $world->{now} + $_ } 0, 1, 60 * $second, 300 * $second, 3600 * $second, 1 + int(rand(1000 * $second)));
	}
	elsif ($function eq 'extend')
	{
		my ($lease) = grep { ($_->{lease_id} // '') eq $call{lease_id} } values %{ $account->{tranche} };
		my $granted = $lease ? $lease->{granted} : 0;

		$call{granted_total} = chance(40) ? max(1, near($granted)) : $granted + any_amount();
		$call{expires_at} = pick(undef, expiries($account), $world->{now} + int(rand(900 * $second)));
	}
	elsif ($function eq 'release')
	{
		$call{lease_id} = undef if chance(40);
	}
	elsif ($function eq 'renew')
	{
		my $hold = $account->{hold}{ $call{reservation_id} };

		$call{ttl} = any_ttl();
		$call{add_amount} = near($hold ? $world->available($name, $hold->{credit}) : 0) if chance(60);
	}
	return \%call;
}

# Returns events, of any accounts and of one that may not be there, with some
# that come again, or came before as calls.
sub any_batch
{
	my %batch = (json => chance(50), on_short => pick(undef, 'refuse', 'charge'));
	my @events;

	for (1 .. pick(1, 2, 3, 5, 8))
	{
		my $event = any_call('consume');

		if (chance(30))
		{
			my @again = grep { defined $_->{key} && $_->{function} =~ /consume|event/ } chance(50) ? @events : @made;

			$event = { %{ pick(@again) }, spelling => int(rand(2)) } if @again;
			$event->{amount}++ if chance(15);
			$event->{metadata} = 'a' if chance(10);
		}
		elsif (chance(8)) { $event->{account} = "$next_epoch/somebody \\ " . int(rand(20)) }
		delete $event->{metadata} if ($event->{metadata} // '') eq 'nothing' && $batch{json};
		push @events, { %$event, function => 'event', ordinal => @events + 1, charge => ($batch{on_short} // '') eq 'charge' };
	}
	pick(@events)->{given} = { amount => pick('0', '-1', '0.0000000000001', '1' . '0' x 26) } if chance(5);
	return { %batch, events => \@events };
}

# Returns when the tranches of an account expire that have not.
sub expiries
{
	my ($account) = @_;

	return grep { $_ > $world->{now} }
	  map { $account->{tranche}{$_}{expires_at} // 0 } sort keys %{ $account->{tranche} };
}

# Returns an earlier call once more, as it was or with something changed.
sub same_call
{
	my @again = grep { defined $_->{key} || $_->{function} =~ /settle|cancel|renew|install|extend|release|session/ } @made;

	return any_call('consume') if !@again;
	splice @again, 0, -25 if @again > 25 && chance(60);
	my %call = (%{ pick(@again) }, spelling => int(rand(2)));
	return \%call if chance(65);

	my ($arguments) = @{ $function{ $call{function} } };
	my $name = pick(grep { !/account|key|entry_id|reservation_id/ } @$arguments, 'function');
	my $type = $type_of{ $name // '' } // '';
	if (defined $name && $name =~ /^(granted|deposit|cumulative|next_amount)/) { $call{$name}++ }
	elsif (!defined $name || $type eq 'a')
	{
		$call{amount} = ($call{amount} // 1) + ($call{amount} && $call{amount} < 0 ? -1 : 1);
		delete $call{min_amount};
	}
	elsif ($name eq 'function')
	{
		$call{function} =~ s/^(try_)?(?=consume|reserve)/$1 ? '' : 'try_'/e;
		return other_function(\%call) if $call{credit} && $call{amount} && chance(50);
	}
	elsif ($name eq 'credit')
	{
		$call{credit} = first { $_ ne $call{credit} } @credits;
	}
	elsif ($name eq 'metadata')
	{
		$call{metadata} = pick(grep { $_ ne ($call{metadata} // '') } sort keys %metadata);
	}
	elsif ($name eq 'reason') { $call{reason} = 'something else' }
	elsif ($name eq 'overage') { $call{overage} = pick('charge', 'clamp', 'refuse') }
	elsif ($name eq 'priority') { $call{priority}++ }
	elsif ($type eq 't') { $call{$name} = ($call{$name} // $world->{now}) + $second }
	elsif ($type eq 'interval') { $call{$name} = ($call{$name} // $second) + 1 }
	return \%call;
}

# Returns a call of another function with the arguments that both have.
sub other_function
{
	my ($call) = @_;
	my $other = pick(qw(topup adjust consume reserve));
	my %has = map { $_ => 1 } @{ $function{$other}[0] }, 'spelling';
	my %call = map { $_ => $call->{$_} } grep { $has{$_} } keys %$call;

	$call{amount} = abs($call{amount}) if $other ne 'adjust';
	$call{reason} = 'because' if $other eq 'adjust';
	$call{priority} //= 100 if $other eq 'topup';
	return { %call, function => $other };
}

# Returns a call with an argument that is not allowed.
sub bad_call
{
	my $call = any_call(pick(sort keys %function));
	my @bad;

	for my $name (@{ $function{ $call->{function} }[0] })
	{
		my $type = $type_of{$name};
		my @texts;

		push @texts, "'NaN'", "'Infinity'", "'-Infinity'", '0.0000000000001', '1' . '0' x 26 if $type eq 'a';
		push @texts, '-1', '-0.000000000001' if $type eq 'a' && $call->{function} ne 'adjust';
		push @texts, '0' if $name =~ /^(min_amount|granted|granted_total|deposit)$/ || ($name eq 'amount' && $call->{function} ne 'settle');
		push @texts, "''", "repeat('x', 513)" if $type eq 'text';
		push @texts, "'0'", "'-1 second'", "'11 years'", "'1 month -31 days'" if $type eq 'interval';
		push @texts, "'Charge'", "'x'" if $name eq 'overage';
		push @texts, "'[]'", "'{}'" if $name eq 'snapshot';
		push @texts, 'NULL'
		  if $name =~ /^(account|overage|priority|add_amount|granted|granted_total|entry_id|reservation_id)$/
		  || $name =~ /^(session|deposit|next_amount|snapshot)$/
		  || ($name eq 'cumulative' && $call->{function} ne 'session_close')
		  || ($name eq 'lease_id' && $call->{function} ne 'release')
		  || ($name eq 'reason' && $call->{function} eq 'adjust')
		  || ($name eq 'credit' && $call->{function} !~ /freeze/)
		  || ($name eq 'amount' && $call->{function} !~ /settle|refund/);
		push @bad, map { [ $name, $_ ] } @texts;
	}
	my ($name, $text) = @{ pick(@bad) };
	$call->{given} = { $name => $text };
	$call->{bad} = 1;
	return $call;
}

# ---------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------

# What is compared after each step, of one account: lease_balance(), tranches,
# holds, sessions, and the ledger after some entry. Each row begins with a letter.
my @state = (
	[
		"'B', credit, available, reserved, chunked, consumed, expired, granted, " . instant_sql('next_expiry'),
		'lease_balance($1) WHERE account = $1'
	],
	[
		"'T', credit, tranche_id, granted, remaining, reserved, chunked, consumed, expired, returned, revoked",
		'whole_tranche WHERE account = $1'
	],
	[ "'S', credit", 'striped_pool WHERE account = $1' ],
	[
		"'H', reservation_id, status, amount, " . instant_sql('expires_at')
		  . ", array_to_string(tranche_ids, ','), array_to_string(tranche_amounts, ','), credit",
		'reservation WHERE account = $1'
	],
	[
		"'C', session, credit, chunk_id, units, " . instant_sql('expires_at') . ", status, granted, remaining, consumed,"
		  . " returned, accepted, deposited, array_to_string(tranche_ids, ','), array_to_string(tranche_amounts, ',')",
		'chunk WHERE account = $1'
	],
	[
		"'L', entry_id, kind, credit, amount, available, tranche_id, reservation_id, idempotency_key, "
		  . instant_sql('created_at'),
		'(SELECT * FROM ledger WHERE account = $1 AND entry_id > $2 ORDER BY entry_id) l'
	]);
my $prepare = 'PREPARE state (text, bigint) AS ' . join ' UNION ALL ',
  map { "SELECT array_to_string(ARRAY[$_->[0]]::text[], '|', '~') FROM $_->[1]" } @state;

sub fail_step
{
	my ($step, @why) = @_;

	diag("step $step of seed $seed, CREDIT_LEASE_MODEL_STEPS=$steps CREDIT_LEASE_MODEL_SEED=$seed repeats it");
	diag(join "\n", 'the last calls:', @log);
	diag(join "\n", @why);
	fail('every answer and every balance is the model\'s');
	done_testing();
	exit 1;
}

sub shown
{
	my ($values) = @_;

	return join ' | ', map { $_ // '~' } @$values;
}

sub same
{
	my ($x, $y) = @_;

	return shown($x) eq shown($y);
}

# Sorts the rows of the state query by what they are of.
sub parse_state
{
	my ($text) = @_;
	my %state = map { $_ => [] } qw(B T S H C L);

	for my $line (split /\n/, $text)
	{
		my ($letter, @values) = split /\|/, $line, -1;
		$_ = $_ eq '~' ? undef : $_ for @values;
		push @{ $state{$letter} }, \@values;
	}
	return \%state;
}

# Compares an account with the model's; returns what differs.
sub compare_account
{
	my ($name, $state) = @_;
	my $swept = %{ kept($state) } ? $world->copy : $world;
	my @balance = $swept->balance($name);
	my $account = $swept->account($name);
	my (@why, %change);

	# lease_balance()
	my @found = sort map { shown([ $_->[0], (map { amount_parse($_) } @$_[ 1 .. 6 ]), $_->[7] ]) } @{ $state->{B} };
	my @expected = sort map { shown($_) } @balance;
	push @why, 'balance, found and expected:', @found, '--', @expected if "@found" ne "@expected";

	# holds; one that has lapsed has expired, given back or not
	my %hold = map { $_->[0] => $_ } @{ $state->{H} };
	for my $id (sort keys %{ { %hold, %{ $account->{hold} } } })
	{
		my ($row, $hold) = ($hold{$id}, $account->{hold}{$id});

		push(@why, "hold $id exists on one side only"), next if !$row || !$hold;
		my ($status, $amount, $expires_at) = ($row->[1], amount_parse($row->[2]), $row->[3]);
		my @ids = split /,/, $row->[4];
		my @amounts = map { amount_parse($_) } split /,/, $row->[5];

		if ($status eq 'held' && $expires_at <= $world->{now})
		{
			$status = 'expired';
			$change{ $ids[$_] }{reserved} -= $amounts[$_], $change{ $ids[$_] }{remaining} += $amounts[$_] for 0 .. $#ids;
		}
		my @is = ($status, $amount, $expires_at, sort map { "$ids[$_]:$amounts[$_]" } 0 .. $#ids);
		my @ought = (
			@$hold{qw(status amount expires_at)},
			sort map { "$_:$hold->{part}{$_}" } keys %{ $hold->{part} });
		push @why, "hold $id: found " . shown(\@is) . ', expected ' . shown(\@ought) if !same(\@is, \@ought);
	}

	# sessions, likewise
	my %session = map { $_->[0] => $_ } @{ $state->{C} };
	for my $name (sort keys %{ { %session, %{ $account->{session} } } })
	{
		my ($row, $session) = ($session{$name}, $account->{session}{$name});

		push(@why, "session $name exists on one side only"), next if !$row || !$session;
		my ($credit, $id, $units, $expires_at, $status, @amounts) = @$row[ 1 .. 11 ];
		my ($deposit, $remaining, $spent, $returned, $accepted, $opened) = map { amount_parse($_) } @amounts;
		my @ids = split /,/, $row->[12];
		my @parts = map { amount_parse($_) } split /,/, $row->[13];
		my $rest = $spent;
		my (%paid, %left);

		for my $i (0 .. $#ids)
		{
			my $part = min($rest, $parts[$i]);

			$rest -= $part;
			$paid{ $ids[$i] } += $part;
			$left{ $ids[$i] } += $parts[$i] - $part;
		}
		$status = { live => 'open', expired => 'expired', released => 'closed' }->{$status};
		if ($status eq 'open' && $expires_at <= $world->{now})
		{
			$status = 'expired';
			($remaining, $returned) = (0, $remaining);
			for my $id (keys %paid)
			{
				$change{$id}{chunked} -= $paid{$id} + $left{$id};
				$change{$id}{consumed} += $paid{$id};
				$change{$id}{remaining} += $left{$id};
			}
		}
		my $unspent = $session->{deposit} - $session->{spent};
		my @is = ($credit, $id, $status, $units, $expires_at, $opened, $deposit, $accepted, $spent, $remaining, $returned,
			map { "$_:$paid{$_}:$left{$_}" } sort keys %paid);
		my @ought = (@$session{qw(credit id status units expires_at opened deposit accepted spent)},
			$session->{status} eq 'open' ? ($unspent, 0) : (0, $unspent),
			map { "$_:$session->{paid}{$_}:$session->{left}{$_}" } sort keys %{ $session->{paid} });
		push @why, "session $name: found " . shown(\@is) . ', expected ' . shown(\@ought) if !same(\@is, \@ought);
	}

	# the terms of rule 2, as they are once everything has been swept
	my %row = map { $_->[1] => $_ } @{ $state->{T} };
	for my $id (sort keys %{ { %row, %{ $account->{tranche} } } })
	{
		my ($row, $tranche) = ($row{$id}, $account->{tranche}{$id});

		push(@why, "tranche $id exists on one side only"), next if !$row || !$tranche;
		my %is;
		@is{qw(granted remaining reserved chunked consumed expired returned revoked)} =
		  map { amount_parse($_) } @$row[ 2 .. 9 ];
		$is{$_} += $change{$id}{$_} for keys %{ $change{$id} // {} };
		@is{qw(returned remaining)} = ($is{returned} + $is{remaining}, 0) if $tranche->{released};
		@is{qw(expired remaining)} = ($is{expired} + $is{remaining}, 0)
		  if defined $tranche->{expires_at} && $tranche->{expires_at} <= $world->{now};
		my @is = ($row->[0], @is{ sort keys %is });
		my @ought = @$tranche{ 'credit', sort keys %is };
		push @why, "tranche $id: found " . shown(\@is) . ', expected ' . shown(\@ought) if !same(\@is, \@ought);
	}
	return @why;
}

# Sorts the new entries into those of the call and those of what was swept on
# the way; returns what is wrong with them.
sub split_entries
{
	my ($state, $got) = @_;
	my @why;

	for my $row (@{ $state->{L} })
	{
		my %entry;
		@entry{qw(entry_id kind credit amount available tranche_id reservation_id key created_at)} = @$row;
		$entry{$_} = amount_parse($entry{$_}) for qw(amount available);

		push @why, "entry $entry{entry_id} is of the time $entry{created_at}" if $entry{created_at} != $world->{now};
		push @{ $got->{ $entry{kind} =~ /expire$/ ? 'swept' : 'entries' } }, \%entry;
	}
	return @why;
}

# Returns the expired holds and sessions that nobody has given back yet. A call
# that says what is available may leave no hold of its own pool, unless that is
# striped.
sub kept
{
	my ($state, @told) = @_;
	my $told = exactly_told($state, @told);

	return {
		map { $_->[0] => 1 }
		  (grep { $_->[1] eq 'held' && $_->[3] <= $world->{now} && !$told->{ $_->[6] } } @{ $state->{H} }),
		  grep { $_->[5] eq 'live' && $_->[4] <= $world->{now} } @{ $state->{C} }
	};
}

# Returns those of the credits that a call has told of which are not striped.
sub exactly_told
{
	my ($state, @told) = @_;
	my %striped = map { $_->[0] => 1 } @{ $state->{S} };

	return { map { $_ => 1 } grep { !$striped{$_} } @told };
}

# Whether what was swept had expired: a part of a hold or of a session, or the
# rest of a tranche.
sub check_swept
{
	my ($name, $got) = @_;
	my $account = $world->account($name);
	my @why;

	for my $entry (@{ $got->{swept} })
	{
		my $of_session = $entry->{kind} eq 'session_expire';
		my $hold = $account->{hold}{ $entry->{reservation_id} // 0 };
		my ($session) = grep { $of_session && $_->{id} == $entry->{reservation_id} } values %{ $account->{session} };
		my $tranche = $account->{tranche}{ $entry->{tranche_id} };
		my $of_tranche = !defined $entry->{reservation_id};
		my $right =
			 $tranche
		  && $tranche->{credit} eq $entry->{credit}
		  && ($entry->{amount} > 0 || $of_session)
		  && !defined $entry->{key};

		$right &&= defined $tranche->{expires_at} && $tranche->{expires_at} <= $world->{now} if $of_tranche;
		$right &&= $hold && $hold->{status} eq 'expired' && $hold->{part}{ $tranche->{id} } == $entry->{amount}
		  if !$of_tranche && !$of_session;
		$right &&= $session && $session->{status} eq 'expired' && $session->{paid}{ $tranche->{id} } == $entry->{amount}
		  if $of_session;
		push @why, "entry $entry->{entry_id} swept what had not expired" if !$right;
		$account->{call}{ $entry->{entry_id} } = { parts => [], of_session => $of_session };
	}
	return @why;
}

# The entries of a call against the model's, in whatever order of tranches.
sub compare_entries
{
	my ($call, $got) = @_;
	my @fields = qw(kind credit amount available tranche_id reservation_id);
	my @is = sort map { shown([ @$_{@fields} ]) } @{ $got->{entries} };
	my @ought = sort map { shown([ @$_{@fields} ]) } @{ $got->{expected} };
	my @keys = map { $_->{key} // '' } @{ $got->{entries} };
	my @why;

	push @why, 'entries, found and expected:', @is, '--', @ought if "@is" ne "@ought";
	push @why, 'the key is not on the first entry alone'
	  if @keys && ((shift @keys) ne ($call->{key} // '') || grep { $_ ne '' } @keys);
	return @why;
}

# Keeps the last calls, for who has to find out.
sub note_call
{
	my ($step, $sql) = @_;

	push @log, "[$step] " . ('  ' x @nested) . "$sql;";
	shift @log if @log > 40;
	return;
}

# Runs SQL and returns what LeaseTest::Session::finish() does; a server that is
# gone is a failure like any other.
sub ask
{
	my ($step, $sql) = @_;
	my @answer = eval { $session->run("$sql;") };

	fail_step($step, "the session broke: $@" . $session->messages) if $@;
	return @answer;
}

# Returns whether an amount has more than 26 digits before the point; none may.
sub is_too_big
{
	my ($call) = @_;
	my $told = $call->{snapshot} // {};

	return grep { abs($_ // 0) >= 10**min(26 - $exponent, 18) } @$call{@amounts}, @$told{qw(deposit accepted spent)};
}

# Makes a call, in the database and in the model, and compares all there is.
sub do_call
{
	my ($step, $call) = @_;
	my $name = $call->{account};
	my $account = $world->account($name);
	my $sql = call_text($call);

	$call->{bad} = 1 if is_too_big($call);

	my %got = (entries => [], swept => [], row => []);
	my @why;

	note_call($step, $sql);
	my ($out, $state_ok) =
	  ask($step, "$sql;\n\\echo = :SQLSTATE\nEXECUTE state(" . quoted($name) . ", $account->{last_entry})");
	my ($answer, $sqlstate, $text) = $out =~ /^(.*?)\n?^= (\w{5})\n?(.*)$/ms or fail_step($step, "no answer: $out");
	$log[-1] .= " -- $sqlstate $answer";
	fail_step($step, 'the state could not be read: ' . $session->messages) if $state_ok ne '00000';

	my $state = parse_state($text);
	$got{row} = parse_row($answer, $function{ $call->{function} }[1]) if $sqlstate eq '00000';
	push @why, split_entries($state, \%got);
	$got{kept} = kept($state, (map { $_->{credit} } grep { $_->{kind} ne 'session_charge' } @{ $got{entries} }),
		$call->{function} =~ /^try/ ? $call->{credit} : ());
	my $expected = $world->call($call, \%got);
	note_entries($name, $state);

	if ($expected->{error})
	{
		push @why, "found $sqlstate " . shown($got{row}) . ", expected @{ $expected->{error} }"
		  if !grep { $_ eq $sqlstate } @{ $expected->{error} };
		push @why, 'a refused call wrote entries' if @{ $got{entries} } || @{ $got{swept} };
	}
	else
	{
		push @why, "found $sqlstate " . shown($got{row}) . ', expected ' . shown($expected->{row})
		  if $sqlstate ne '00000' || !same($got{row}, $expected->{row});
		push @why, compare_entries($call, \%got);
	}
	push @why, check_swept($name, \%got), compare_account($name, $state);
	fail_step($step, @why, $session->messages) if @why;

	my $outcome =
		$sqlstate ne '00000' ? $sqlstate
	  : $got{row}[0] eq 'f' ? 'f'
	  : @{ $got{row} } > 1 && $got{row}[-1] eq 't' ? 'replayed'
	  : 'done';
	$seen{"$call->{function} $outcome"}++;
	push @made, { map { $_ => $call->{$_} } grep { !/given|bad/ } keys %$call } if !$call->{bad};
	return;
}

# Ingests a batch, and compares what comes of each event, and all its accounts.
sub do_ingest
{
	my ($step, $batch) = @_;
	my $sql = batch_text($batch);
	my %bad = map { $_->{ordinal} => 1 } grep { $_->{given} || is_too_big($_) } @{ $batch->{events} };

	note_call($step, $sql);
	my ($out, $sqlstate) = ask($step, $sql);
	$log[-1] .= " -- $sqlstate " . $out =~ tr/\n/,/r;
	my @rows = map { parse_row($_, 'ibbwa') } split /\n/, $out;
	my @why;

	push @why, "found $sqlstate, expected " . (%bad ? '22023' : '00000') if $sqlstate ne (%bad ? '22023' : '00000');
	push @why, 'found ' . @rows . ' rows, expected ' . @{ $batch->{events} } if !%bad && @rows != @{ $batch->{events} };
	fail_step($step, @why, $session->messages) if @why;

	my (%state, %got);
	for my $name (map { $_->{account} } @{ $batch->{events} })
	{
		$state{$name} //= state_of($step, $name);
		next if $got{$name};
		$got{$name} = { entries => [], swept => [] };
		push @why, split_entries($state{$name}, $got{$name});
	}

	# numbers of entries rise from account to account
	for my $name (sort { first_entry($got{$a}) <=> first_entry($got{$b}) } keys %got)
	{
		my ($state, $got) = ($state{$name}, $got{$name});
		my @events = grep { $_->{account} eq $name } @{ $batch->{events} };
		my @told = map { $_->{credit} } @events;
		my $lapsed = $world->lapsed($name, %{ exactly_told($state, @told) });

		for my $event (%bad ? () : @events)
		{
			my %part = (row => $rows[ $event->{ordinal} - 1 ], entries => $got->{entries}, kept => $lapsed);
			my $expected = $world->call($event, \%part)->{row};

			$part{entries} = [ splice @{ $got->{entries} }, 0, scalar @{ $part{expected} } ];
			push @why, "event $event->{ordinal}: found " . shown($part{row}) . ', expected ' . shown($expected)
			  if !same($part{row}, $expected);
			push @why, map { "event $event->{ordinal}: $_" } compare_entries($event, \%part);
			$seen{ 'ingest ' . ($expected->[3] // 'done') }++;
			push @made, { (map { $_ => $event->{$_} } qw(account credit amount key metadata)), function => 'consume' };
		}
		push @why, "$name: entries of no event" if @{ $got->{entries} };
		push @why, "$name: a refused call wrote entries" if %bad && @{ $got->{swept} };
		$world->sweep($name, kept($state, %bad ? () : @told));
		note_entries($name, $state);
		push @why, check_swept($name, $got), map { "$name: $_" } compare_account($name, $state);
	}
	$seen{'ingest 22023'}++ if %bad;
	fail_step($step, @why, $session->messages) if @why;
	return;
}

sub first_entry
{
	my ($got) = @_;

	return @{ $got->{entries} } ? $got->{entries}[0]{entry_id} : 0;
}

# Runs what must not fail and returns its output; logs what changes something.
sub say_sql
{
	my ($step, $sql) = @_;

	note_call($step, $sql) if $sql !~ /^(SELECT|EXECUTE)/ || $sql =~ /lease_(reclaim|stripe)/;
	my ($out, $sqlstate) = ask($step, $sql);
	fail_step($step, "$sqlstate " . $session->messages) if $sqlstate ne '00000';
	return $out;
}

# Moves the clock: some time, or exactly to where something expires or to the
# instant before. It never goes back.
sub do_clock
{
	my ($step) = @_;
	my @expiry;

	for my $name (@accounts)
	{
		my $account = $world->account($name);
		my @held = grep { $_->{status} eq 'held' } values %{ $account->{hold} };
		my @open = grep { $_->{status} eq 'open' } values %{ $account->{session} };

		push @expiry, map { [ $_->{expires_at}, $name, $_->{name} // ($_->{part} ? $_->{id} : 0) ] }
		  grep { ($_->{expires_at} // 0) > $world->{now} + 1 } values %{ $account->{tranche} }, @held, @open;
	}
	@expiry = sort { $a->[0] <=> $b->[0] || $a->[2] cmp $b->[2] } @expiry;
	@hot = ();
	if (@expiry && chance(70))
	{
		my $expiry = $expiry[ int(rand(min(3, scalar @expiry))) ];

		$world->{now} = $expiry->[0] - int(rand(2));
		@hot = @$expiry[ 1, 2 ];
	}
	else
	{
		$world->{now} += 1 + int(rand(30 * $second));
	}
	say_sql($step, 'SET credit_lease.mock_now = ' . quoted(instant_text($world->{now})));
	do_reclaim($step) if chance(15);
	return;
}

# lease_reclaim() is of all accounts. How many holds and sessions are left for it
# depends on what the calls before have given back on their way.
sub do_reclaim
{
	my ($step) = @_;
	my $max = chance(50) ? undef : pick(1, 1, 2, 5);
	my $now = quoted(instant_text($world->{now}));
	my $holds = "SELECT (SELECT count(*) FROM reservation WHERE status = 'held' AND expires_at <= $now)"
	  . " + (SELECT count(*) FROM chunk WHERE status = 'live' AND expires_at <= $now)";
	my $tranches = "SELECT count(*) FROM tranche WHERE remaining <> 0 AND expires_at <= $now";
	my $reclaim = 'SELECT lease_reclaim(' . ($max // '') . ')';
	my ($before, $swept, @left) = split /\n/, say_sql($step, "$holds; $reclaim; $holds; $tranches");

	fail_step($step, "lease_reclaim: found $swept of $before") if $swept != min($before, $max // $before);
	fail_step($step, "lease_reclaim left @left") if !defined $max && grep { $_ != 0 } @left;
	look_at_account($step, $_) for @accounts;
	$seen{'reclaim ' . ($swept > 0 ? 'done' : 'f')}++;
	return;
}

# Keeps a pool in another number of rows: of that nothing is to be seen.
sub do_stripe
{
	my ($step) = @_;
	my $name = pick(@accounts);

	return if !$stripes_change;
	say_sql($step, 'SELECT lease_stripe(' . quoted($name) . ', ' . quoted(pick(@credits)) . ', ' . pick(1, 2, 2, 3, 8, 64) . ')');
	look_at_account($step, $name);
	$seen{'stripe'}++;
	return;
}

# Begins a transaction or, inside one, a savepoint.
sub do_begin
{
	my ($step) = @_;

	say_sql($step, @nested
		? 'SAVEPOINT s' . @nested
		: 'BEGIN ISOLATION LEVEL ' . pick('READ COMMITTED', 'REPEATABLE READ', 'SERIALIZABLE'));
	push @nested, $world->copy;
	$transaction_left += 1 + int(rand(6));
	return;
}

# Ends the innermost of them, one way or the other.
sub do_end
{
	my ($step) = @_;
	my $copy = pop @nested;
	my $savepoint = @nested ? 's' . @nested : undef;

	if (chance(50))
	{
		say_sql($step, $savepoint ? "ROLLBACK TO $savepoint" : 'ROLLBACK');
		$world = $copy;
		$seen{'rollback'}++;
	}
	else
	{
		say_sql($step, $savepoint ? "RELEASE $savepoint" : 'COMMIT');
		$seen{'commit'}++;
	}
	return;
}

sub state_of
{
	my ($step, $name) = @_;

	return parse_state(say_sql($step, 'EXECUTE state(' . quoted($name) . ', ' . $world->account($name)->{last_entry} . ')'));
}

# Notes that the entries of a state have been seen.
sub note_entries
{
	my ($name, $state) = @_;
	my $account = $world->account($name);

	$account->{last_entry} = max($account->{last_entry}, map { $_->[0] } @{ $state->{L} });
	return;
}

# Compares an account outside a call: nothing but a sweep has touched it.
sub look_at_account
{
	my ($step, $name) = @_;
	my $state = state_of($step, $name);
	my %got = (entries => [], swept => []);
	my @why = split_entries($state, \%got);

	$world->sweep($name, kept($state));
	note_entries($name, $state);
	push @why, 'entries of nobody' if @{ $got{entries} };
	push @why, check_swept($name, \%got), compare_account($name, $state);
	fail_step($step, @why) if @why;
	return;
}

# All accounts of the epoch, their books and the views.
sub do_look
{
	my ($step) = @_;

	look_at_account($step, $_), verify($step, $_), look_at_views($step, $_) for @accounts;
	return;
}

# Compares what the views say of an account.
sub look_at_views
{
	my ($step, $name) = @_;
	my $swept = $world->copy;
	# an expired session is out of its tranches until somebody gives it back
	$swept->sweep($name, $swept->lapsed($name, map { $_ => 1 } @credits));
	my $account = $swept->account($name);
	my @holds = map { $account->{hold}{$_} } sort { $a <=> $b } keys %{ $account->{hold} };
	my @tranches = map { $account->{tranche}{$_} } sort { $a <=> $b } keys %{ $account->{tranche} };
	my $where = 'WHERE account = ' . quoted($name);
	my $compare = sub {
		my ($what, $found, @expected) = @_;
		my $expected = join "\n", @expected;

		fail_step($step, "$what: found $found, expected $expected") if $found ne $expected;
	};

	for my $is ([ 'open_reservation', 'held' ], [ 'expired_hold', 'expired' ])
	{
		my ($view, $status) = @$is;

		$compare->($view, say_sql($step, "SELECT reservation_id FROM $view $where ORDER BY 1"),
			map { $_->{id} } grep { $_->{status} eq $status } @holds);
	}

	# an expired hold may still be reserved here, until somebody gives it back
	my $rest = say_sql($step, "SELECT tranche_id, remaining + reserved FROM open_lease $where ORDER BY 1");
	$compare->('open_lease', join("\n", map { s/\|(.*)/'|' . amount_parse($1)/er } split /\n/, $rest),
		map { "$_->[0]|$_->[1]" } sort { $a->[0] <=> $b->[0] }
		(map { [ $_->{id}, $_->{deposit} - $_->{spent} ] } live_sessions($account)),
		map { [ $_->{id}, $_->{remaining} + $_->{reserved} ] }
		grep { ($_->{remaining} + $_->{reserved} + $_->{chunked} > 0 || defined $_->{lease_id}) && $world->_alive($_) } @tranches);

	for my $credit (@credits)
	{
		my $pool = "$where AND credit = " . quoted($credit);
		my $consumed = say_sql($step, "SELECT coalesce(sum(consumed), 0) FROM usage_by_day $pool");

		$compare->('usage_by_day', amount_parse($consumed),
			sum0((map { $_->{consumed} } grep { $_->{credit} eq $credit } @tranches),
				map { $_->{spent} } LeaseModel::open_sessions($account, $credit)));
		$compare->('lease_balance() of a pool',
			say_sql($step, 'SELECT * FROM lease_balance(' . quoted($name) . ', ' . quoted($credit) . ')'),
			say_sql($step, "SELECT * FROM balance $pool"));
	}
	return;
}

# The books of an account, or of all.
sub verify
{
	my ($step, @account) = @_;
	my $found = say_sql($step, 'SELECT * FROM lease_verify(' . join('', map { quoted($_) } @account) . ') LIMIT 20');

	fail_step($step, "lease_verify: $found") if $found ne '';
	return;
}

# ---------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------

note("CREDIT_LEASE_MODEL_STEPS=$steps CREDIT_LEASE_MODEL_SEED=$seed");
$session->run_safe("\\set ON_ERROR_ROLLBACK on\n$prepare;");
$session->run_safe("CREATE SERVER $_ FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://a.example');")
  for qw(server_a server_b);
say_sql(0, 'SET credit_lease.mock_now = ' . quoted(instant_text($world->{now})));

my @wheel = map { ($_) x $weight{$_} } sort keys %weight;
for my $step (1 .. $steps)
{
	my $what = pick(@wheel);

	if (@nested && --$transaction_left <= 0)
	{
		do_end($step) while @nested;
	}
	start_epoch($step) if !@nested && $step >= $next_epoch;

	if ($what eq 'clock') { do_clock($step) }
	elsif ($what eq 'reclaim') { do_reclaim($step) }
	elsif ($what eq 'stripe') { do_stripe($step) }
	elsif ($what eq 'look') { do_look($step) }
	elsif ($what eq 'begin' && @nested < 4) { do_begin($step) }
	elsif ($what eq 'begin') { do_end($step) }
	elsif ($what eq 'again') { do_call($step, same_call()) }
	elsif ($what eq 'bad') { do_call($step, bad_call()) }
	elsif ($what eq 'ingest') { do_ingest($step, any_batch()) }
	else { do_call($step, any_call($what)) }

	do_look($step) if $step % $steps_between_verify == 0;
}
do_end($steps) while @nested;
do_look($steps);
verify($steps);
$session->quit;

pass('every answer and every balance is the model\'s');
note(join "\n", map { "$_: $seen{$_}" } sort keys %seen);
$node->stop;
done_testing();
