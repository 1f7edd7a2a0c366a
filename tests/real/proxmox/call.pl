# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

# Calls methods of the plugin, as Proxmox VE would, under -T as its daemons run. On stdin a JSON object: `plugin` (the
# file), `commands`, `run`, `api` (the host's), `calls` (lists of a method and its arguments). On stdout a list with an
# object for each call: `result` or `died`, `warned`, `ran` (commands) and `base` (methods of the base class).

use strict;
use warnings;

use JSON;
use PVE::Storage;
use PVE::Storage::Plugin;
use PVE::Tools;

my $asked = decode_json(do { local $/ = undef; <STDIN> });
$ENV{PATH} = '/usr/bin:/bin';
delete @ENV{qw(IFS CDPATH ENV BASH_ENV)};

# Proxmox VE has taken apart what it passes on; the output of commands is nothing that it trusts.
sub trusted {
    return map {
        my $value = $_;
        !defined($value) ? undef
            : ref($value) eq 'HASH' ? { map { $_ => (trusted($value->{$_}))[0] } keys %{$value} }
            : ref($value) ? $value
            : ($value =~ m/(.*)/s)[0];
    } @_;
}

require((trusted($asked->{plugin}))[0]);
my $class = 'PVE::Storage::Custom::ForebayPlugin';
@PVE::Storage::Custom::ForebayPlugin::COMMANDS = trusted(@{ $asked->{commands} });
($PVE::Storage::Custom::ForebayPlugin::RUN) = trusted($asked->{run});
$PVE::Storage::Custom::ForebayPlugin::HANG_UP_SECONDS = 2;
$PVE::Storage::VERSION_OF_HOST = $asked->{api} if $asked->{api};

my @told;
for my $call (@{ $asked->{calls} }) {
    my ($method, @arguments) = @{$call};
    my %done = (warned => []);
    (@PVE::Tools::RAN, @PVE::Storage::Plugin::CALLS) = ();
    local $SIG{__WARN__} = sub { push @{ $done{warned} }, $_[0] };
    my $result = eval { [$class->$method(trusted(@arguments))] };
    $done{defined($result) ? 'result' : 'died'} = $result // $@;
    push @told, { %done, ran => [@PVE::Tools::RAN], base => [@PVE::Storage::Plugin::CALLS] };
}
print encode_json(\@told);
