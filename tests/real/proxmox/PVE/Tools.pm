# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

package PVE::Tools;

# Runs commands as Proxmox VE does, as far as the plugin asks for it, and keeps what was run.

use strict;
use warnings;

use base qw(Exporter);
use IO::File;
use IPC::Open3 qw(open3);

our @EXPORT_OK = qw(run_command);
our @RAN;

my $TAINTED = substr($ENV{PATH}, 0, 0);

my %known = map { $_ => 1 } qw(timeout noerr outfunc errfunc);

sub run_command {
    my ($command, %param) = @_;

    $known{$_} or die "got unknown parameter '$_' for run_command\n" for keys %param;
    push @RAN, [@{$command}];
    my $error = IO::File->new_tmpfile();
    my ($pid, $out);
    eval {
        local $SIG{ALRM} = sub { die "got timeout\n" };
        alarm($ENV{SECONDS_FOR_ALL} // $param{timeout});
        $pid = open3(my $in, $out, '>&' . fileno($error), @{$command});
        close $in;
        while (defined(my $line = <$out>)) {
            chomp $line;
            $param{outfunc}->($line . $TAINTED);
        }
        waitpid($pid, 0);
        alarm(0);
        1;
    } or do {
        my $fault = $@;
        kill 9, $pid if $pid;
        waitpid($pid, 0) if $pid;
        die "command '@{$command}' failed: $fault";
    };
    my $code = $?;
    seek $error, 0, 0;
    while (defined(my $line = <$error>)) {
        chomp $line;
        $param{errfunc}->($line . $TAINTED);
    }
    die "command '@{$command}' failed: got signal $code\n" if $code & 127;
    return $code >> 8;
}

sub run_fork_with_timeout {
    my ($seconds, $code) = @_;
    return $code->();
}

1;
