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
# short of a striped pool's credit may leave expired holds for others: those
# are kept, but of the credit that a call is short of.
sub _sweep
{
	my ($self, $account, $short) = @_;

	for my $hold (values %{ $account->{hold} })
	{
		next if $hold->{status} ne 'held' || $hold->{expires_at} > $self->{now};
		next if $self->{kept}{ $hold->{id} } && $hold->{credit} ne ($short // '');
		$hold->{status} = 'expired';
		_give_back($account, $hold, 0);
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

# Returns whether a call can take an amount; before it cannot, it gives all back
# that has expired.
sub _covers
{
	my ($self, $name, $credit, $amount) = @_;

	$self->_sweep($self->account($name), $credit) if $self->available($name, $credit) < $amount;
	return $self->available($name, $credit) >= $amount;
}

# Gives back and writes off what has expired in an account, but for some holds.
sub sweep
{
	my ($self, $name, $kept) = @_;

	local $self->{kept} = $kept;
	$self->_sweep($self->account($name));
	return;
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
		my %sum;

		for my $term (qw(remaining reserved consumed expired granted))
		{
			$sum{$term} = sum0 map { $_->{$term} } @pool;
		}
		push @rows, [ $credit, @sum{qw(remaining reserved)}, 0, @sum{qw(consumed expired granted)}, min(@expiry) ];
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
		consumed => 0,
		expired => 0,
		returned => 0,
		revoked => 0,
		%params
	};
}

# Records the entries of a call: rows are [tranche, amount in the call's word,
# consumed]. Returns the number that the call returns.
sub _entries
{
	my ($self, $account, $got, $kind, $rows, %params) = @_;
	my $call = { parts => [] };
	my $available = sum0 map { $_->{remaining} } _pool($account, $params{credit});
	my @numbers = map { $_->{entry_id} } @{ $got->{entries} };
	my @entries;

	for my $row (@$rows)
	{
		my ($tranche, $amount, $consumed) = @$row;

		push @{ $call->{parts} }, { tranche => $tranche, consumed => $consumed, refunded => 0 };
		push @entries,
		  {
			kind => $kind,
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
	$got->{expected} = \@entries;
	return @numbers ? $numbers[0] : -1;
}

# Rule 5: what a key that was used before makes of a call. Returns the first
# call, a refusal, or nothing.
sub _key
{
	my ($account, $call) = @_;
	my $key = $call->{key};

	return if !defined $key || !$account->{key}{$key};
	return $account->{key}{$key} if $account->{key}{$key}{signature} eq _signature($call);
	return _refused('LC002');
}

# Two calls with the same signature are the same request. Plain and trying are
# the same function; instants and amounts are numbers here.
sub _signature
{
	my ($call) = @_;
	(my $function = $call->{function}) =~ s/^try_//;

	return join '|', $function, map { "$_=$call->{$_}" }
	  grep { !/^(function|account|key|spelling)$/ && defined $call->{$_} } sort keys %$call;
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
	my $covered = $self->_covers($call->{account}, $call->{credit}, $call->{amount});

	return _refused('LC007') if _is_frozen($account, $call->{credit});
	return _refused('LC001') if !$covered;

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
