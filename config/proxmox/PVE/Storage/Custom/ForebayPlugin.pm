# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: AGPL-3.0-or-later

package PVE::Storage::Custom::ForebayPlugin;

# A storage of Proxmox VE: a directory of raw images on shared storage, which QEMU reaches by NBD through the Forebay
# of its node. README.md beside this file says how it is installed and used.
#
# An activated volume is an attached disk of the daemon, under the name that disk_name() gives it. Volumes are made,
# listed, renamed and removed as files, by the base class, after the daemon has let go of them.

use strict;
use warnings;

use Digest::SHA qw(sha256_hex);
use Encode qw(encode_utf8);
use Fcntl qw(:mode);
use File::Basename qw(dirname);
use File::Path qw(remove_tree);
use File::stat qw(stat);
use JSON qw(decode_json);

use PVE::INotify;
use PVE::Storage::Plugin;
use PVE::Tools qw(run_command);

use base qw(PVE::Storage::Plugin);

# Where Forebay is. Tests set these otherwise, and what follows.
our @COMMANDS = ('/usr/bin/forebay', '/usr/local/bin/forebay');
our $RUN = '/run/forebay';

# Seconds for QEMU's connections to be closed after it has ended.
our $HANG_UP_SECONDS = 5;

# Seconds for questions and changes that the daemon answers from memory.
my $ANSWER_SECONDS = 30;

# How long a start waits while another node writes the image back, in forebay's words; and for all of an attach, in
# seconds.
my $WAIT_FOR_OTHERS = '30s';
my $ATTACH_SECONDS = 90;

# Seconds for a detach to write back what is dirty. A disk that takes longer stays attached, and goes on.
my $DETACH_SECONDS = 300;

# Seconds of QEMU's waiting for a daemon that is restarted or was killed, before the guest gets an error.
my $RECONNECT_SECONDS = 30;

# What to do about answers that nobody understands.
my $OF_ONE_VERSION = 'see that forebay and this plugin are of one version';

# The length of a disk's name at most.
my $LONGEST_NAME = 64;

# The versions of the storage interface that this was written for.
my ($OLDEST_API, $NEWEST_API) = (12, 15);

# States of a disk in which no guest that starts can use it; the daemon says with them what to do.
my %not_served = map { $_ => 1 } qw(failed stopped conflict handed-over);

# Otherwise a live migration would copy the volumes.
push @PVE::Storage::Plugin::SHARED_STORAGE, 'forebay';

# ------------------------------------------------------------------------------------------------------ configuration

sub api {
    my $host = PVE::Storage::APIVER();
    return $host >= $OLDEST_API && $host <= $NEWEST_API ? $host : $NEWEST_API;
}

sub type {
    return 'forebay';
}

sub plugindata {
    return {
        content => [{ images => 1 }, { images => 1 }],
        format => [{ raw => 1 }, 'raw'],
        'sensitive-properties' => {},
    };
}

sub properties {
    my $size = '\d{1,15}(\.\d{1,6})?\s?([kKmMgGtT]([iI]?[bB])?)?';
    return {
        'forebay-mode' => {
            description => 'How disks write. Default: what the configuration of Forebay says.',
            type => 'string',
            enum => ['none', 'write-around', 'write-through', 'write-back', 'full-copy'],
            optional => 1,
        },
        'forebay-cache-size' => {
            description => 'The most that one disk may hold of the cache, as 20G; 0: no limit.',
            type => 'string',
            pattern => $size,
            optional => 1,
        },
        'forebay-preload' => {
            description => "What is brought into the cache at each start: a size, 'trace' or 'all'.",
            type => 'string',
            pattern => "(trace|all|$size)",
            optional => 1,
        },
    };
}

sub options {
    return {
        path => { fixed => 1 },
        nodes => { optional => 1 },
        shared => { optional => 1 },
        disable => { optional => 1 },
        content => { optional => 1 },
        format => { optional => 1 },
        bwlimit => { optional => 1 },
        preallocation => { optional => 1 },
        'forebay-mode' => { optional => 1 },
        'forebay-cache-size' => { optional => 1 },
        'forebay-preload' => { optional => 1 },
    };
}

sub on_add_hook {
    my ($class, $storeid, $scfg, %sensitive) = @_;

    return if $scfg->{nodes} && !$scfg->{nodes}->{ PVE::INotify::nodename() };
    my $settings = decoded(run_forebay($ANSWER_SECONDS, 'dump-config', '--json'));
    die "the answer of 'forebay dump-config' is no configuration: $OF_ONE_VERSION\n"
        if ref($settings) ne 'HASH' || ref($settings->{stores}) ne 'HASH';
    for my $store (grep { ref($_) eq 'HASH' } values %{ $settings->{stores} }) {
        my $above = without_slashes($store->{path} // next);
        return if (without_slashes($scfg->{path}) . '/') =~ m!^\Q$above\E/!;
    }
    die "storage '$storeid': forebay has no store that holds '$scfg->{path}': add one with this path to its"
        . " configuration on each node, and restart it\n";
}

# ------------------------------------------------------------------------------------------------------------- storage

# Nothing is created: where the share is not mounted, a new 'images' would lie on the node's own disk.
sub activate_storage {
    my ($class, $storeid, $scfg, $cache) = @_;

    my $images = $class->get_subdir($scfg, 'images');
    return if PVE::Tools::run_fork_with_timeout(2, sub { -d $images });
    die "storage '$storeid': directory '$images' does not exist or is unreachable: mount the share, and make it once\n";
}

# ------------------------------------------------------------------------------------------------------------- volumes

sub parse_volname {
    my ($class, $volname) = @_;

    my @parts = $class->SUPER::parse_volname($volname);
    die "a forebay storage holds raw disk images only, not '" . one_line($volname) . "'\n"
        if $parts[0] ne 'images' || $parts[6] ne 'raw';
    return @parts;
}

# The name of a volume's disk: PVE's own names as they are, so that people know them, and any other with a hash, so that
# no two volumes have one name.
sub disk_name {
    my ($class, $storeid, $volname) = @_;

    my ($name, $vmid) = ($class->parse_volname($volname))[1, 2];
    my $shown = "pve-$storeid-$vmid-$name";
    return $1
        if $name =~ m/^(?:vm|base)-\Q$vmid\E-(?:disk-\d+|cloudinit)\.raw$/
        && $shown =~ m/^([A-Za-z0-9._-]{1,$LONGEST_NAME})$/;

    my $hash = substr(sha256_hex(encode_utf8("$storeid:$vmid/$name")), 0, 16);
    $shown =~ s/[^A-Za-z0-9._-]/-/g;
    my ($front) = $shown =~ m/^(.{1,@{[$LONGEST_NAME - 17]}})/;
    return "$front-$hash";
}

sub path {
    my ($class, $scfg, $volname, $storeid, $snapname) = @_;

    refuse_snapshot($snapname);
    my ($vtype, undef, $vmid) = $class->parse_volname($volname);
    my $disk = $class->disk_name($storeid, $volname);
    my $path = "nbd+unix:///$disk?socket=" . socket_path($disk);
    return wantarray ? ($path, $vmid, $vtype) : $path;
}

sub qemu_blockdev_options {
    my ($class, $scfg, $storeid, $volname, $machine_version, $options) = @_;

    refuse_snapshot($options->{'snapshot-name'});
    my $disk = $class->disk_name($storeid, $volname);
    return {
        driver => 'nbd',
        server => { type => 'unix', path => socket_path($disk) },
        export => "$disk",
        'reconnect-delay' => int($RECONNECT_SECONDS),
    };
}

# It may be active already: backups, clones and moves of a running guest activate it once more. For one that comes by
# live migration, the other node's daemon is asked to hand the image over, and does that while QEMU moves.
sub activate_volume {
    my ($class, $storeid, $scfg, $volname, $snapname, $cache, $hints) = @_;

    refuse_snapshot($snapname);
    my $isbase = ($class->parse_volname($volname))[5];
    my $disk = $class->disk_name($storeid, $volname);
    in_volume($storeid, $volname, sub {
        my $file = $class->filesystem_path($scfg, $volname);
        my @attach = ('attach', $disk, $file, '--wait', $WAIT_FOR_OTHERS);
        push @attach, $isbase ? '--read-only' : $ENV{PVE_MIGRATED_FROM} ? '--incoming' : ();
        for my $key (qw(mode cache-size preload)) {
            push @attach, "--$key", $scfg->{"forebay-$key"} if defined($scfg->{"forebay-$key"});
        }
        eval { run_forebay($ATTACH_SECONDS, @attach) };
        my $refusal = $@ or return;
        my $found = eval { attached($disk) } // die $refusal;
        take_as_found($disk, $found, $file, $isbase, $scfg->{'forebay-mode'});
    });
    return;
}

# A disk that is attached already, in place of one that could not be attached. Dies where it is another one.
sub take_as_found {
    my ($disk, $found, $file, $isbase, $mode) = @_;

    my $below = ($found->{image} // '') =~ m/^[^:]+:(.+)$/s ? $1 : '';
    die "disk '$disk' is attached to another image, '$found->{image}': 'forebay detach $disk'\n"
        if $below eq '' || substr("/$file", -length("/$below")) ne "/$below";
    die "disk '$disk' is attached " . ($isbase ? '' : 'not ') . "to be written: 'forebay detach $disk'\n"
        if !$found->{read_only} != !$isbase || $found->{overlay};
    die "disk '$disk' is not served: " . ($found->{reason} // "it is $found->{state}: 'forebay detach $disk'") . "\n"
        if $not_served{ $found->{state} };
    run_forebay($DETACH_SECONDS, 'mode', $disk, $mode) if defined($mode) && $mode ne $found->{mode} && !$isbase;
    return;
}

# Done when the image has all that the guest wrote.
sub deactivate_volume {
    my ($class, $storeid, $scfg, $volname, $snapname, $cache) = @_;

    return if defined($snapname);
    my $disk = $class->disk_name($storeid, $volname);
    in_volume($storeid, $volname, sub { detach($disk) });
    return;
}

# Have the daemon let go of a volume whose file is about to be changed. Dies where another node's has it.
sub release {
    my ($class, $storeid, $scfg, $volname) = @_;

    my $file = $class->filesystem_path($scfg, $volname);
    my $disk = $class->disk_name($storeid, $volname);
    in_volume($storeid, $volname, sub {
        detach($disk);
        die "another node has it, or was lost while it had: shut its guest down there, or 'forebay takeover $file'\n"
            if -e "$file.forebay/owner";
    });
    return $file;
}

sub alloc_image {
    my ($class, $storeid, $scfg, $vmid, $fmt, $name, $size) = @_;

    die "storage '$storeid': images are raw, not '$fmt'\n" if $fmt ne 'raw';
    my $volname = $class->SUPER::alloc_image($storeid, $scfg, $vmid, $fmt, $name, $size);
    my $file = $class->filesystem_path($scfg, $volname);
    give_group($class->get_subdir($scfg, 'images'), dirname($file), $file);
    return $volname;
}

sub free_image {
    my ($class, $storeid, $scfg, $volname, $isbase, $format) = @_;

    my $file = $class->release($storeid, $scfg, $volname);
    $class->SUPER::free_image($storeid, $scfg, $volname, $isbase, $format);
    remove_tree("$file.forebay", { error => \my $left });    # what it could not remove does no harm
    rmdir dirname($file);
    return;
}

sub create_base {
    my ($class, $storeid, $scfg, $volname) = @_;

    $class->release($storeid, $scfg, $volname);
    return $class->SUPER::create_base($storeid, $scfg, $volname);
}

sub rename_volume {
    my ($class, $scfg, $storeid, $source_volname, $target_vmid, $target_volname) = @_;

    $class->release($storeid, $scfg, $source_volname);
    my $volid = $class->SUPER::rename_volume($scfg, $storeid, $source_volname, $target_vmid, $target_volname);
    my $file = $class->filesystem_path($scfg, $volid =~ s/^\Q$storeid\E://r);
    give_group($class->get_subdir($scfg, 'images'), dirname($file), $file);
    return $volid;
}

sub volume_resize {
    my ($class, $scfg, $storeid, $volname, $size, $running, $snapname) = @_;

    refuse_snapshot($snapname);
    die "storage '$storeid': QEMU cannot grow a disk that it reaches by NBD: shut the guest down first\n" if $running;
    $class->release($storeid, $scfg, $volname);
    return $class->SUPER::volume_resize($scfg, $storeid, $volname, $size, $running, $snapname);
}

sub volume_has_feature {
    my ($class, $scfg, $feature, $storeid, $volname, $snapname, $running, $opts) = @_;

    my $state = ($class->parse_volname($volname))[5] ? 'base' : 'current';
    my $features = {
        copy => { base => 1, current => 1 },
        sparseinit => { base => 1, current => 1 },
        rename => { current => 1 },
        template => { current => 1 },
    };
    return defined($snapname) ? undef : $features->{$feature}->{$state};
}

# ------------------------------------------------------------------------------------------------- what there is not

sub clone_image {
    my ($class, $scfg, $storeid, $volname, $vmid, $snap) = @_;
    die "storage '$storeid': there are no linked clones: make a full clone\n";
}

sub volume_snapshot {
    my ($class, $scfg, $storeid, $volname, $snap) = @_;
    die "storage '$storeid': there are no snapshots\n";
}

sub volume_snapshot_rollback {
    my ($class, $scfg, $storeid, $volname, $snap) = @_;
    die "storage '$storeid': there are no snapshots\n";
}

sub volume_snapshot_delete {
    my ($class, $scfg, $storeid, $volname, $snap, $running) = @_;
    die "storage '$storeid': there are no snapshots\n";
}

sub volume_snapshot_info {
    return {};
}

sub map_volume {
    my ($class, $storeid, $scfg, $volname, $snapname, $hints) = @_;
    die "storage '$storeid': its volumes are no files: put TPM state on another storage\n";
}

sub volume_export {
    my ($class, $scfg, $storeid) = @_;
    die "storage '$storeid': volumes are not exported as streams: move the disk, or copy the image file\n";
}

sub volume_export_formats {
    return ();
}

sub volume_import {
    my ($class, $scfg, $storeid) = @_;
    die "storage '$storeid': volumes are not imported as streams: use 'qm disk import'\n";
}

sub volume_import_formats {
    return ();
}

sub refuse_snapshot {
    my ($snapname) = @_;
    die "a forebay storage has no snapshots\n" if defined($snapname);
    return;
}

# ---------------------------------------------------------------------------------------------------------- the daemon

sub socket_path {
    my ($disk) = @_;
    return "$RUN/disks/$disk.sock";
}

# Runs the code; what it dies of says which volume that was.
sub in_volume {
    my ($storeid, $volname, $code) = @_;

    return if eval { $code->(); 1 };
    die "storage '$storeid', volume '" . one_line("$volname': $@" =~ s/\n$//r) . "\n";
}

# The command's output. Dies with the one line that it says on stderr.
sub run_forebay {
    my ($seconds, @arguments) = @_;

    my ($command) = grep { -x } @COMMANDS;
    die "forebay is not installed on this node: see its README\n" if !$command;
    my ($output, $fault) = ('', '');
    my $code = eval {
        run_command(
            [$command, @arguments],
            timeout => $seconds,
            noerr => 1,
            outfunc => sub { $output .= "$_[0]\n" },
            errfunc => sub { $fault = $_[0] if $_[0] !~ m/^forebay: warning: / },
        );
    };
    die $@ =~ m/got timeout/ ? "'forebay $arguments[0]' is not done after $seconds s: see 'forebay status'\n" : $@ if $@;
    return $output if $code == 0;
    $fault =~ s/^forebay: //;
    die one_line($fault || "'forebay $arguments[0]' failed") . "\n";
}

# The status of the disk of that name, if there is one.
sub attached {
    my ($disk) = @_;

    my $disks = decoded(run_forebay($ANSWER_SECONDS, 'status', '--json'));
    die "the answer of 'forebay status' is no list of disks: $OF_ONE_VERSION\n"
        if ref($disks) ne 'ARRAY' || grep { ref($_) ne 'HASH' || !defined($_->{name}) } @{$disks};
    my ($found) = grep { $_->{name} eq $disk } @{$disks};
    return $found;
}

# Detach the disk, if it is there, as soon as QEMU's connections are closed. Somebody else may do the same meanwhile.
sub detach {
    my ($disk) = @_;

    for my $second (0 .. $HANG_UP_SECONDS) {
        my $found = attached($disk) or return;
        last if !$found->{clients} || $second == $HANG_UP_SECONDS;
        sleep 1;
    }
    return if eval { run_forebay($DETACH_SECONDS, 'detach', $disk); 1 };
    my $refusal = $@;
    die $refusal if !eval { !attached($disk) };
    return;
}

# ---------------------------------------------------------------------------------------------------------------- small

# The value of a JSON text; nothing where it is none.
sub decoded {
    my ($text) = @_;
    return scalar(eval { decode_json($text) });
}

sub without_slashes {
    my ($path) = @_;
    return $path =~ s!/+!/!gr =~ s!/$!!r;
}

sub one_line {
    my ($text) = @_;
    return $text =~ s/[^\x20-\x7e]/?/gr;
}

# What was made belongs to the group of the directory of images, and that may write it, where it may write there: the
# daemon is in that group.
sub give_group {
    my ($images, $directory, $file) = @_;

    my $model = stat($images);
    return if !$model || !($model->mode & S_IWGRP);
    for my $path ($directory, $file) {
        my $made = stat($path) // next;
        my $more = $path eq $directory ? $model->mode & (S_IRWXG | S_ISGID) : S_IRGRP | S_IWGRP;
        next if chown(-1, $model->gid, $path) && chmod(S_IMODE($made->mode) | $more, $path);
        warn "'$path' could not be given to the group of '$images': $!\n";
    }
    return;
}

1;
