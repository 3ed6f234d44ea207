# LeaseModel.pm
#	What credit_lease is to do, a second time and in the plainest way: the
#	reference of the model test.
#
# It is written from the contract and shares nothing with the C sources: no
# kept plans, no lazy sweep, no locks. Whatever has expired is swept before
# each call; amounts are integers, times are microseconds. Numbers of entries,
# tranches and reservations are not predicted but taken from what the database
# answered, and must be new and rising.
#
# A world is a plain structure, so that a transaction that rolls back is a copy
# that is put back.

package LeaseModel;

use strict;
use warnings;

use List::Util qw(min max sum0);
use Storable qw(dclone);

use constant DEFAULT_TTL => 60_000_000;

sub new
{
	my ($class, %params) = @_;

	return bless {
		now => $params{now},
		account => {},
		kept => {},
		highest => { entry => 0, tranche => 0, reservation => 0 }
	}, $class;
}

sub copy
{
	my ($self) = @_;

	return dclone($self);
}

sub account
{
	my ($self, $name) = @_;

	return $self->{account}{$name} //= {
		tranche => {},
		hold => {},
		session => {},
		key => {},
		call => {},
		frozen => {},
		last_entry => 0
	};
}

# ---------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------

# Returns the tranches of a pool in burn order (rule 10).
sub _pool
{
	my ($account, $credit) = @_;

	return sort {
			 $a->{priority} <=> $b->{priority}
		  || ($a->{expires_at} // 9e18) <=> ($b->{expires_at} // 9e18)
		  || $a->{id} <=> $b->{id}
	} grep { $_->{credit} eq $credit } values %{ $account->{tranche} };
}

# Gives back what holds have let expire and writes off expired tranches
# (rules 7 and 8); after it, all that remains can be spent. A call that is not
# short of credit may leave expired sessions for others, and expired holds of a
# striped pool: those are kept, but of the credit that a call is short of, given
# by hold and session.
sub _sweep
{
	my ($self, $account, %short) = @_;

	for my $hold (values %{ $account->{hold} })
	{
		next if $hold->{status} ne 'held' || $hold->{expires_at} > $self->{now};
		next if $self->{kept}{ $hold->{id} } && $hold->{credit} ne ($short{hold} // '');
		$hold->{status} = 'expired';
		_give_back($account, $hold, 0);
	}
	for my $session (values %{ $account->{session} })
	{
		next if $session->{status} ne 'open' || $session->{expires_at} > $self->{now};
		next if $self->{kept}{ $session->{name} } && $session->{credit} ne ($short{session} // '');
		_end_session($account, $session, 'expired');
	}
	for my $tranche (values %{ $account->{tranche} })
	{
		next if $self->_alive($tranche);
		$tranche->{ $tranche->{released} ? 'returned' : 'expired' } += $tranche->{remaining};
		$tranche->{remaining} = 0;
	}
	return;
}

sub _alive
{
	my ($self, $tranche) = @_;

	return !$tranche->{released} && (!defined $tranche->{expires_at} || $tranche->{expires_at} > $self->{now});
}

# What a hold is, given back or not.
sub _status
{
	my ($self, $hold) = @_;

	return $hold->{status} eq 'held' && $hold->{expires_at} <= $self->{now} ? 'expired' : $hold->{status};
}

# Ends a hold: spends an amount of it in burn order, the rest returns to the
# tranches that it came from. Returns [tranche, spent, given back] for each.
sub _give_back
{
	my ($account, $hold, $spend) = @_;
	my @parts;

	for my $tranche (grep { $hold->{part}{ $_->{id} } } _pool($account, $hold->{credit}))
	{
		my $part = $hold->{part}{ $tranche->{id} };
		my $spent = min($part, $spend);

		$spend -= $spent;
		$tranche->{reserved} -= $part;
		$tranche->{consumed} += $spent;
		$tranche->{remaining} += $part - $spent;
		push @parts, [ $tranche, $spent, $part - $spent ];
	}
	die 'the model is wrong: a hold is not the sum of its parts' if $spend != 0;
	return @parts;
}

sub available
{
	my ($self, $name, $credit) = @_;

	return sum0 map { $_->{remaining} } _pool($self->account($name), $credit);
}

# Returns whether a call can take an amount; before it cannot, it gives all holds
# back that have expired, and then all sessions.
sub _covers
{
	my ($self, $name, $credit, $amount) = @_;

	for my $kind ('hold', 'session')
	{
		last if $self->available($name, $credit) >= $amount;
		$self->_sweep($self->account($name), $kind => $credit);
	}
	return $self->available($name, $credit) >= $amount;
}

# Returns why a call cannot take an amount, or nothing.
sub _refusal
{
	my ($self, $name, $credit, $amount) = @_;
	my $covered = $self->_covers($name, $credit, $amount);

	return _refused('LC007') if _is_frozen($self->account($name), $credit);
	return _refused('LC001') if !$covered;
	return;
}

# Gives back and writes off what has expired in an account, but for some holds.
sub sweep
{
	my ($self, $name, $kept) = @_;

	local $self->{kept} = $kept;
	$self->_sweep($self->account($name));
	return;
}

# Returns the expired holds and sessions of an account that nobody has given back
# yet, but no holds of some credits.
sub lapsed
{
	my ($self, $name, %not_held) = @_;
	my $account = $self->account($name);

	return {
		map { ($_->{name} // $_->{id}) => 1 }
		  grep { $_->{status} =~ /^(held|open)$/ && $_->{expires_at} <= $self->{now} }
		  (grep { !$not_held{ $_->{credit} } } values %{ $account->{hold} }), values %{ $account->{session} }
	};
}

# Returns the sessions of a pool that nobody has ended.
sub open_sessions
{
	my ($account, $credit) = @_;

	return grep { $_->{status} eq 'open' && $_->{credit} eq $credit } values %{ $account->{session} };
}

# Returns a row for each credit, as lease_balance() does.
sub balance
{
	my ($self, $name) = @_;
	my $account = $self->account($name);
	my %seen = map { $_->{credit} => 1 } values %{ $account->{tranche} };
	my @rows;

	$self->sweep($name, {});
	for my $credit (sort keys %seen)
	{
		my @pool = _pool($account, $credit);
		my @expiry = map { $_->{expires_at} } grep { $_->{remaining} > 0 && defined $_->{expires_at} } @pool;
		my $spent = sum0 map { $_->{spent} } open_sessions($account, $credit);
		my %sum;

		for my $term (qw(remaining reserved chunked consumed expired granted))
		{
			$sum{$term} = sum0 map { $_->{$term} } @pool;
		}
		push @rows, [
			$credit, @sum{qw(remaining reserved)}, $sum{chunked} - $spent,
			$sum{consumed} + $spent, @sum{qw(expired granted)}, min(@expiry)
		];
	}
	return @rows;
}

# ---------------------------------------------------------------------------
# Helpers of the calls
# ---------------------------------------------------------------------------

sub _refused
{
	my (@sqlstates) = @_;

	return { error => \@sqlstates };
}

# Takes an amount that is there, in burn order; returns [tranche, part] pairs.
sub _take
{
	my ($account, $credit, $amount, $to) = @_;
	my @taken;

	for my $tranche (_pool($account, $credit))
	{
		my $part = min($amount, $tranche->{remaining});

		next if $part == 0;
		$tranche->{remaining} -= $part;
		$tranche->{$to} += $part;
		$amount -= $part;
		push @taken, [ $tranche, $part ];
	}
	die 'the model is wrong: took what is not there' if $amount != 0;
	return @taken;
}

# Checks a number that the database has drawn; a wrong one is negative, so that
# the comparison shows it.
sub _number
{
	my ($self, $of, $number) = @_;

	return -1 if !defined $number || $number !~ /^\d+$/ || $number <= $self->{highest}{$of};
	return $self->{highest}{$of} = $number;
}

sub _grant
{
	my ($self, $account, $id, %params) = @_;

	$id = $self->_number('tranche', $id);
	return $account->{tranche}{$id} = {
		id => $id,
		granted => $params{amount},
		remaining => $params{amount},
		reserved => 0,
		chunked => 0,
		consumed => 0,
		expired => 0,
		returned => 0,
		revoked => 0,
		%params
	};
}

# Records the next entries of a call: rows are [tranche, amount in the call's
# word, consumed], and perhaps a kind of their own. Returns the number that the
# call returns.
sub _entries
{
	my ($self, $account, $got, $kind, $rows, %params) = @_;
	my $call = { parts => [], of_session => $kind =~ /^session_/ };
	my $available = $params{available} // sum0 map { $_->{remaining} } _pool($account, $params{credit});
	my @numbers = splice @{ $got->{numbers} }, 0, scalar @$rows;

	for my $row (@$rows)
	{
		my ($tranche, $amount, $consumed, $own_kind) = @$row;

		push @{ $call->{parts} }, { tranche => $tranche, consumed => $consumed, refunded => 0 };
		push @{ $got->{expected} },
		  {
			kind => $own_kind // $kind,
			credit => $params{credit},
			amount => $amount,
			available => $available,
			tranche_id => $tranche->{id},
			reservation_id => $params{reservation_id},
		  };
	}
	for my $number (@numbers)
	{
		$account->{call}{ $self->_number('entry', $number) } = $call;
	}
	return @numbers ? $numbers[0] : -1;
}

# Rule 5: what a key that was used before makes of a call. Returns the first
# call, a refusal, or nothing.
sub _key
{
	my ($account, $call) = @_;
	my $key = $call->{key};

	return if !defined $key || !$account->{key}{$key};
	return $account->{key}{$key} if $account->{key}{$key}{signature} eq _signature($call) && !$account->{key}{$key}{short};
	return _refused('LC002');
}

# Two calls with the same signature are the same request. Plain and trying are
# the same function, and so is an event; instants and amounts are numbers here.
sub _signature
{
	my ($call) = @_;
	my $function = $call->{function} =~ s/^(try_|event$)//r || 'consume';

	return join '|', $function, map { "$_=$call->{$_}" }
	  grep { !/^(function|account|key|spelling|ordinal|charge)$/ && defined $call->{$_} } sort keys %$call;
}

sub _remember
{
	my ($account, $call, %first) = @_;

	$account->{key}{ $call->{key} } = { signature => _signature($call), %first }
	  if defined $call->{key};
	return;
}

sub _is_frozen
{
	my ($account, $credit) = @_;

	return $account->{frozen}{''} || $account->{frozen}{$credit};
}

# ---------------------------------------------------------------------------
# The calls. A call is a hash of its arguments; got is what the database
# answered, for the numbers in it, and which expired holds it has left (kept). The result is {error => [sqlstates]} or
# {row => [columns]}; got->{expected} has the ledger entries.
# ---------------------------------------------------------------------------

sub call
{
	my ($self, $call, $got) = @_;
	my $function = $call->{function};
	my $method = "_$function";
	my ($before, $result);

	$got->{expected} = [];
	$got->{numbers} = [ map { $_->{entry_id} } @{ $got->{entries} } ];
	return _refused('22023') if $call->{bad};
	$method =~ s/^_try_/_/;
	$self->{kept} = $got->{kept};
	if (defined $call->{account})
	{
		my $account = $self->account($call->{account});

		$before = dclone($account) if %{ $self->{kept} };
		$self->_sweep($account);
	}
	$result = $self->$method($call, $got);

	# the twins differ in nothing but how they say no
	if ($function =~ /^try_/ && $result->{error} && $result->{error}[0] =~ /^LC00[17]$/)
	{
		$result = { row => [
			'f', undef, 0, $self->available($call->{account}, $call->{credit}),
			$function eq 'try_reserve' ? undef : (), 'f'
		] };
	}
	# what it gave back on the way is rolled back with it
	$self->{account}{ $call->{account} } = $before if $before && $result->{error};
	return $result;
}

sub _topup
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $first = _key($account, $call);
	my ($tranche, $entry);

	# both refusals are true of a past expiry with another request's key
	return _refused('22023', $first ? 'LC002' : ())
	  if (!$first || $first->{error}) && defined $call->{expires_at} && $call->{expires_at} <= $self->{now};
	return $first if $first && $first->{error};
	return { row => [ @{ $first->{row} }, 't' ] } if $first;

	$tranche = $self->_grant($account, $got->{row}[1],
		credit => $call->{credit},
		amount => $call->{amount},
		priority => $call->{priority},
		expires_at => $call->{expires_at});
	$entry = $self->_entries($account, $got, 'topup', [ [ $tranche, $call->{amount}, 0 ] ], credit => $call->{credit});

	my @row = ($entry, $tranche->{id}, $call->{amount}, $self->available($call->{account}, $call->{credit}));
	_remember($account, $call, row => \@row);
	return { row => [ @row, 'f' ] };
}

sub _adjust
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $first = _key($account, $call);
	my @rows;

	return $first if $first && $first->{error};
	return { row => [ @{ $first->{row} }, 't' ] } if $first;

	if ($call->{amount} > 0)
	{
		my $id = $got->{entries}[0] ? $got->{entries}[0]{tranche_id} : undef;

		@rows = [
			$self->_grant($account, $id,
				credit => $call->{credit},
				amount => $call->{amount},
				priority => 100,
				expires_at => undef),
			$call->{amount},
			0
		];
	}
	else
	{
		return _refused('LC001') if !$self->_covers($call->{account}, $call->{credit}, -$call->{amount});
		@rows = map { [ $_->[0], -$_->[1], 0 ] } _take($account, $call->{credit}, -$call->{amount}, 'revoked');
	}

	my $entry = $self->_entries($account, $got, 'adjust', \@rows, credit => $call->{credit});
	my @row = ($entry, $call->{amount}, $self->available($call->{account}, $call->{credit}));
	_remember($account, $call, row => \@row);
	return { row => [ @row, 'f' ] };
}

sub _refund
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $of = $account->{call}{ $call->{entry_id} };
	my $first = _key($account, $call);
	my ($consumed, $left, $amount, @rows);

	# of a key that is another request's, and an entry that is not there, both
	# refusals are true
	return _refused('LC003', $first ? 'LC002' : ()) if !$of;
	return _refused('0A000') if $of->{of_session};
	return $first if $first && $first->{error};
	return { row => [ @{ $first->{row} }, 't' ] } if $first;

	$consumed = sum0 map { $_->{consumed} } @{ $of->{parts} };
	$left = sum0 map { $_->{consumed} - $_->{refunded} } @{ $of->{parts} };
	return _refused('22023') if $consumed <= 0 || ($call->{amount} // 0) > $consumed;
	$amount = $call->{amount} // $left;
	return _refused('LC005') if $left == 0 || $amount > $left;

	my $rest = $amount;
	for my $part (reverse @{ $of->{parts} })
	{
		my $back = min($rest, $part->{consumed} - $part->{refunded});
		my $tranche = $part->{tranche};

		next if $back == 0;
		$rest -= $back;
		$part->{refunded} += $back;
		$tranche->{consumed} -= $back;
		$tranche->{remaining} += $back;
		push @rows, [ $tranche, $back, -$back ];
	}

	my $credit = $of->{parts}[0]{tranche}{credit};
	$self->_sweep($account);	# what returned to an expired tranche
	my $entry = $self->_entries($account, $got, 'refund', \@rows, credit => $credit);
	my @row = ($entry, $amount, $self->available($call->{account}, $credit));
	_remember($account, $call, row => \@row);
	return { row => [ @row, 'f' ] };
}

sub _consume
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $first = _key($account, $call);

	return $first if $first && $first->{error};
	return { row => [ @{ $first->{row} }, 't' ] } if $first;
	my $refusal = $self->_refusal(@$call{qw(account credit amount)});
	return $refusal if $refusal;

	my @rows = map { [ @$_, $_->[1] ] } _take($account, $call->{credit}, $call->{amount}, 'consumed');
	my $entry = $self->_entries($account, $got, 'consume', \@rows, credit => $call->{credit});
	my @row = ('t', $entry, $call->{amount}, $self->available($call->{account}, $call->{credit}));
	_remember($account, $call, row => \@row);
	return { row => [ @row, 'f' ] };
}

sub _reserve
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $first = _key($account, $call);
	my $hold;

	return $first if $first && $first->{error};
	if ($first)
	{
		# the first result again, but for when the hold expires by now
		$hold = $account->{hold}{ $first->{row}[1] };
		return _ended($hold) if $self->_status($hold) ne 'held';
		return { row => [ @{ $first->{row} }, $hold->{expires_at}, 't' ] };
	}
	$self->_covers($call->{account}, $call->{credit}, $call->{amount});
	my $available = $self->available($call->{account}, $call->{credit});

	return _refused('LC007') if _is_frozen($account, $call->{credit});
	return _refused('LC001') if $available < ($call->{min_amount} // $call->{amount});

	my $amount = min($call->{amount}, $available);
	my @taken = _take($account, $call->{credit}, $amount, 'reserved');
	$hold = {
		id => $self->_number('reservation', $got->{row}[1]),
		credit => $call->{credit},
		status => 'held',
		amount => $amount,
		expires_at => $self->{now} + ($call->{ttl} // DEFAULT_TTL),
		part => { map { $_->[0]{id} => $_->[1] } @taken }
	};
	$account->{hold}{ $hold->{id} } = $hold;
	$self->_entries($account, $got, 'reserve', [ map { [ @$_, 0 ] } @taken ],
		credit => $call->{credit},
		reservation_id => $hold->{id});

	my @row = ('t', $hold->{id}, $amount, $available - $amount);
	_remember($account, $call, row => \@row);
	return { row => [ @row, $hold->{expires_at}, 'f' ] };
}

sub _ended
{
	my ($hold) = @_;

	return _refused($hold->{status} =~ /^(held|expired)$/ ? 'LC004' : 'LC005');
}

sub _settle
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $hold = $account->{hold}{ $call->{reservation_id} };
	my $overage = $call->{overage} // 'charge';
	my %row;

	return _refused('LC003') if !$hold;

	my $amount = $call->{amount} // $hold->{amount};
	my $signature = join '|', $amount, $overage, $call->{metadata} // 'null';

	if ($hold->{status} eq 'settled')
	{
		return _refused('LC005') if $hold->{signature} ne $signature;
		return { row => [ @{ $hold->{row} }, 't' ] };
	}
	return _ended($hold) if $self->_status($hold) ne 'held';
	return _refused('LC001') if $overage eq 'refuse' && $amount > $hold->{amount};

	my $spent = min($amount, $hold->{amount});
	my $above = $amount - $spent;
	my $charged = 0;
	my $refunded = 0;
	my (%consumed, %touched);

	$self->_covers($call->{account}, $hold->{credit}, $above) if $overage eq 'charge';
	for my $part (_give_back($account, $hold, $spent))
	{
		my ($tranche, $consumed, $returned) = @$part;

		$touched{ $tranche->{id} } = $tranche;
		$consumed{ $tranche->{id} } = $consumed;
		$refunded += $returned if $self->_alive($tranche);
	}
	$hold->{status} = 'settled';
	$self->_sweep($account);	# what returned to an expired tranche

	if ($overage eq 'charge' && !_is_frozen($account, $hold->{credit}))
	{
		$charged = min($above, $self->available($call->{account}, $hold->{credit}));
		for my $taken (_take($account, $hold->{credit}, $charged, 'consumed'))
		{
			$touched{ $taken->[0]{id} } = $taken->[0];
			$consumed{ $taken->[0]{id} } += $taken->[1];
		}
	}

	$self->_entries($account, $got, 'settle',
		[ map { [ $_, $consumed{ $_->{id} }, $consumed{ $_->{id} } ] }
		  grep { $touched{ $_->{id} } } _pool($account, $hold->{credit}) ],
		credit => $hold->{credit},
		reservation_id => $hold->{id});
	$hold->{signature} = $signature;
	$hold->{row} = [
		$hold->{id}, $hold->{amount}, $spent + $charged, $refunded, $above - $charged,
		$self->available($call->{account}, $hold->{credit})
	];
	return { row => [ @{ $hold->{row} }, 'f' ] };
}

sub _cancel
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $hold = $account->{hold}{ $call->{reservation_id} };

	return _refused('LC003') if !$hold;
	return { row => ['f'] } if $hold->{status} eq 'settled';
	if ($hold->{status} eq 'held')
	{
		my @parts = _give_back($account, $hold, 0);

		$hold->{status} = 'cancelled';
		$self->_sweep($account);
		$self->_entries($account, $got, 'cancel', [ map { [ $_->[0], $_->[2], 0 ] } @parts ],
			credit => $hold->{credit},
			reservation_id => $hold->{id});
	}
	return { row => ['t'] };
}

sub _renew
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $hold = $account->{hold}{ $call->{reservation_id} };
	my $add = $call->{add_amount} // 0;

	return _refused('LC003') if !$hold;
	return _ended($hold) if $self->_status($hold) ne 'held';
	return _refused('LC007') if _is_frozen($account, $hold->{credit});
	return _refused('LC001') if !$self->_covers($call->{account}, $hold->{credit}, $add);

	my @taken = _take($account, $hold->{credit}, $add, 'reserved');
	$hold->{part}{ $_->[0]{id} } += $_->[1] for @taken;
	$hold->{amount} += $add;
	$hold->{expires_at} = max($hold->{expires_at}, $self->{now} + ($call->{ttl} // DEFAULT_TTL));
	$self->_entries($account, $got, 'renew', [ map { [ @$_, 0 ] } @taken ],
		credit => $hold->{credit},
		reservation_id => $hold->{id});
	return { row => [ $hold->{id}, $hold->{amount}, $hold->{expires_at} ] };
}

# Returns the leases of a pool that are alive, with an id if there is one.
sub _leases
{
	my ($self, $account, $call) = @_;

	return grep {
			 defined $_->{lease_id}
		  && $self->_alive($_)
		  && (!defined $call->{lease_id} || $_->{lease_id} eq $call->{lease_id})
	} _pool($account, $call->{credit});
}

sub _install
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $id = $got->{entries}[0] ? $got->{entries}[0]{tranche_id} : undef;

	return _refused('22023') if $call->{expires_at} <= $self->{now};
	for my $tranche (grep { defined $_->{lease_id} } _pool($account, $call->{credit}))
	{
		return { row => ['f'] } if $tranche->{lease_id} eq $call->{lease_id};
		return { row => ['f'] }
		  if $self->_alive($tranche) && ($tranche->{server} // '') eq ($call->{server} // '');
	}

	my $tranche = $self->_grant($account, $id,
		credit => $call->{credit},
		amount => $call->{granted},
		priority => 100,
		map { $_ => $call->{$_} } qw(lease_id server expires_at));
	$self->_entries($account, $got, 'install', [ [ $tranche, $call->{granted}, 0 ] ], credit => $call->{credit});
	return { row => ['t'] };
}

sub _extend
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my ($lease) = $self->_leases($account, $call);
	my $changed = 'f';

	return { row => ['f'] } if !$lease;
	if (($call->{expires_at} // 0) > $lease->{expires_at})
	{
		$lease->{expires_at} = $call->{expires_at};
		$changed = 't';
	}
	my $more = $call->{granted_total} - $lease->{granted};
	if ($more > 0)
	{
		$lease->{$_} += $more for qw(granted remaining);
		$self->_entries($account, $got, 'extend', [ [ $lease, $more, 0 ] ], credit => $call->{credit});
		$changed = 't';
	}
	return { row => [$changed] };
}

sub _release
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my @leases = $self->_leases($account, $call);
	my @rows = map { [ $_, $_->{remaining}, 0 ] } grep { $_->{remaining} > 0 } @leases;

	$_->{released} = 1 for @leases;
	$self->_sweep($account);
	$self->_entries($account, $got, 'release', \@rows, credit => $call->{credit}) if @rows;
	return { row => [ @leases ? 't' : 'f' ] };
}

# ---------------------------------------------------------------------------
# Sessions. What a session has taken is chunked in its tranches until it ends;
# of which of them it has been spent (paid), and is to be (left, in their
# order), it knows by itself.
# ---------------------------------------------------------------------------

# Returns the session of a call, and why that cannot be changed, if so.
sub _session
{
	my ($self, $call) = @_;
	my $session = $self->account($call->{account})->{session}{ $call->{session} };
	my $status = $session ? $self->_session_status($session) : 'none';
	my %refusal = (none => 'LC003', expired => 'LC004', closed => 'LC005');

	return ($session, $status eq 'open' ? undef : _refused($refusal{$status}));
}

sub _session_status
{
	my ($self, $session) = @_;

	return $session->{status} eq 'open' && $session->{expires_at} <= $self->{now} ? 'expired' : $session->{status};
}

sub _session_row
{
	my ($self, $session, $applied, $asked) = @_;

	return { row => [
		$applied ? 't' : 'f', @$session{qw(name deposit accepted spent)}, $session->{spent} + ($asked // 0),
		$session->{units}, $self->_session_status($session)
	] };
}

# Carves an amount that is there out of the pool for a session. What was spent
# of a tranche before stays spent of it; the rest is in burn order again.
sub _carve
{
	my ($self, $account, $session, $amount, $got) = @_;
	my @taken = _take($account, $session->{credit}, $amount, 'chunked');

	for my $taken (@taken)
	{
		my ($tranche, $part) = @$taken;

		$session->{left}{ $tranche->{id} } += $part;
		$session->{paid}{ $tranche->{id} } += 0;
		$session->{expires_at} = min($session->{expires_at}, $tranche->{expires_at} // ());
	}
	$session->{order} = [ grep { $session->{left}{$_} } map { $_->{id} } _pool($account, $session->{credit}) ];
	$session->{deposit} += $amount;
	$self->_entries($account, $got, 'session', [ map { [ @$_, 0 ] } @taken ],
		credit => $session->{credit},
		reservation_id => $session->{id});
	return;
}

sub _charge
{
	my ($self, $account, $session, $amount, $got) = @_;
	my $rest = $amount;

	for my $id (@{ $session->{order} })
	{
		my $part = min($rest, $session->{left}{$id});

		$session->{left}{$id} -= $part;
		$session->{paid}{$id} += $part;
		$rest -= $part;
	}
	die 'the model is wrong: a session is not the sum of its parts' if $rest != 0;
	$session->{spent} += $amount;
	$session->{units}++;
	$self->_entries($account, $got, 'session_charge', [ [ $session, $amount, 0 ] ],
		credit => $session->{credit},
		available => $session->{deposit} - $session->{spent},
		reservation_id => $session->{id});
	return;
}

# Ends a session: what was spent of its tranches is consumed there, the rest
# returns to them. Returns [tranche, spent, 0] for each.
sub _end_session
{
	my ($account, $session, $status) = @_;
	my @parts;

	for my $tranche (grep { defined $session->{left}{ $_->{id} } } _pool($account, $session->{credit}))
	{
		my ($paid, $left) = ($session->{paid}{ $tranche->{id} }, $session->{left}{ $tranche->{id} });

		$tranche->{chunked} -= $paid + $left;
		$tranche->{consumed} += $paid;
		$tranche->{remaining} += $left;
		push @parts, [ $tranche, $paid, 0 ];
	}
	$session->{status} = $status;
	return @parts;
}

sub _session_open
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my ($session, $refusal) = $self->_session($call);

	if ($session)
	{
		return _refused('LC002') if $session->{credit} ne $call->{credit} || $session->{opened} != $call->{deposit};
		return $refusal // $self->_session_row($session, 0);
	}
	$refusal = $self->_refusal(@$call{qw(account credit deposit)});
	return $refusal if $refusal;

	$session = $account->{session}{ $call->{session} } = {
		id => $self->_number('tranche', $got->{entries}[0] ? $got->{entries}[0]{reservation_id} : undef),
		name => $call->{session},
		credit => $call->{credit},
		status => 'open',
		opened => $call->{deposit},
		expires_at => $self->{now} + ($call->{ttl} // DEFAULT_TTL),
		map { $_ => 0 } qw(deposit accepted spent units)
	};
	$self->_carve($account, $session, $call->{deposit}, $got);
	return $self->_session_row($session, 1);
}

sub _session_topup
{
	my ($self, $call, $got) = @_;
	my ($session, $refusal) = $self->_session($call);

	$refusal //= $self->_refusal($call->{account}, $session->{credit}, $call->{amount});
	return $refusal if $refusal;
	$self->_carve($self->account($call->{account}), $session, $call->{amount}, $got);
	return $self->_session_row($session, 1);
}

sub _session_authorize
{
	my ($self, $call, $got) = @_;
	my ($session, $refusal) = $self->_session($call);

	return $refusal if $refusal;
	return _refused('LC001') if $call->{cumulative} > $session->{deposit};
	my $more = $call->{cumulative} > $session->{accepted};
	$session->{accepted} = $call->{cumulative} if $more;
	return $self->_session_row($session, $more);
}

sub _session_charge
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my ($session, $refusal) = $self->_session($call);

	return $refusal if $refusal;
	return _refused('LC007') if _is_frozen($account, $session->{credit});
	return $self->_session_row($session, 0, $call->{amount})
	  if $session->{spent} + $call->{amount} > $session->{accepted};
	$self->_charge($account, $session, $call->{amount}, $got);
	return $self->_session_row($session, 1);
}

sub _session_snapshot
{
	my ($self, $call, $got) = @_;
	my ($session, $refusal) = $self->_session($call);

	return $refusal if !$session;
	return $self->_session_row($session, 0, $call->{next_amount});
}

sub _session_reconcile
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $told = $call->{snapshot};

	return _refused('22023') if $told->{spent} > $told->{accepted} || $told->{accepted} > $told->{deposit};
	my ($session, $refusal) = $self->_session($call);
	return $refusal if $refusal;

	my $units = max($session->{units}, $told->{units} // 0);
	my %more = map { $_ => $told->{$_} - $session->{$_} } qw(deposit accepted spent);
	$refusal = $self->_refusal($call->{account}, $session->{credit}, $more{deposit}) if $more{deposit} > 0;
	$refusal //= _refused('LC007') if $more{spent} > 0 && _is_frozen($account, $session->{credit});
	return $refusal if $refusal;

	my $applied = $units > $session->{units} || grep { $_ > 0 } values %more;
	$self->_carve($account, $session, $more{deposit}, $got) if $more{deposit} > 0;
	$session->{accepted} = max($session->{accepted}, $told->{accepted});
	$self->_charge($account, $session, $more{spent}, $got) if $more{spent} > 0;
	$session->{units} = $units;
	return $self->_session_row($session, $applied);
}

sub _session_close
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my ($session, $refusal) = $self->_session($call);

	return $refusal if !$session;
	my $total = $call->{cumulative} // $session->{spent};
	return $self->_session_row($session, 0) if $session->{status} eq 'closed' && $total == $session->{spent};
	return $refusal if $refusal;
	return _refused('22023') if $total < $session->{spent};
	return _refused('LC001') if $total > $session->{deposit};
	if ($total > $session->{spent})
	{
		return _refused('LC007') if _is_frozen($account, $session->{credit});
		$session->{accepted} = max($session->{accepted}, $total);
		$self->_charge($account, $session, $total - $session->{spent}, $got);
	}

	my @rows = _end_session($account, $session, 'closed');
	$self->_sweep($account);	# what returned to an expired tranche
	$self->_entries($account, $got, 'session_close', \@rows,
		credit => $session->{credit},
		reservation_id => $session->{id});
	return $self->_session_row($session, 1);
}

# An event of lease_ingest(), which is never an error.
sub _event
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $first = defined $call->{key} ? $account->{key}{ $call->{key} } : undef;
	my $frozen = _is_frozen($account, $call->{credit});

	# whether anything was given back for one that cannot be spent in any case, its answer tells
	my $covered = $self->_covers(@$call{qw(account credit)}, $first || $frozen ? $got->{row}[4] : $call->{amount});
	my $available = $self->available(@$call{qw(account credit)});
	my $reason =
		$first ? ($first->{signature} eq _signature($call) ? 'duplicate' : 'key_conflict')
	  : $frozen ? 'frozen'
	  : $covered ? undef
	  : $call->{charge} ? 'shortfall'
	  : 'insufficient_credit';

	return { row => [ $call->{ordinal}, 'f', $reason eq 'duplicate' ? 't' : 'f', $reason, $available ] }
	  if defined $reason && $reason ne 'shortfall';

	my $amount = min($call->{amount}, $available);
	my @rows = map { [ @$_, $_->[1] ] } _take($account, $call->{credit}, $amount, 'consumed');
	push @rows, [ undef, $call->{amount} - $amount, 0, 'shortfall' ] if $reason;
	my $entry = $self->_entries($account, $got, 'consume', \@rows, credit => $call->{credit});
	_remember($account, $call, row => [ 't', $entry, $call->{amount}, $available - $amount ], short => $reason);
	return { row => [ $call->{ordinal}, 't', 'f', $reason, $available - $amount ] };
}

sub _freeze
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my $pool = $call->{credit} // '';
	my $new = !$account->{frozen}{$pool};

	$account->{frozen}{$pool} = 1;
	return { row => [ $new ? 't' : 'f' ] };
}

sub _unfreeze
{
	my ($self, $call, $got) = @_;
	my $account = $self->account($call->{account});
	my @lifted = grep { !defined $call->{credit} || $_ eq $call->{credit} } keys %{ $account->{frozen} };

	delete @{ $account->{frozen} }{@lifted};
	return { row => [ @lifted ? 't' : 'f' ] };
}

1;
