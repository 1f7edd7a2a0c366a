# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

package PVE::Storage::Plugin;

# Stands in for the base class of Proxmox VE's storages: keeps which of its methods were called, and does with files what
# it would do.

use strict;
use warnings;

use File::Basename qw(dirname);
use File::Path qw(make_path);

our @SHARED_STORAGE = qw(nfs);
our @CALLS;

sub called {
    my ($method, @arguments) = @_;
    push @CALLS, [$method, map { ref($_) ? 'scfg' : $_ } @arguments];
    return;
}

sub parse_volname {
    my ($class, $volname) = @_;

    if ($volname =~ m!^(?:(\d+)/(\S+)/)?(\d+)/([^/\s]+\.(raw|qcow2))$!) {
        my ($basevmid, $basename, $vmid, $name, $format) = ($1, $2, $3, $4, $5);
        return ('images', $name, $vmid, $basename, $basevmid, $name =~ m/^base-/ ? 'base-' : undef, $format);
    }
    return ('iso', $1, undef, undef, undef, undef, 'raw') if $volname =~ m!^iso/([^/]+\.iso)$!;
    die "unable to parse directory volume name '$volname'\n";
}

sub get_subdir {
    my ($class, $scfg, $vtype) = @_;
    return "$scfg->{path}/$vtype";
}

sub filesystem_path {
    my ($class, $scfg, $volname, $snapname) = @_;
    my ($vtype, $name, $vmid) = $class->parse_volname($volname);
    return $class->get_subdir($scfg, $vtype) . "/$vmid/$name";
}

sub alloc_image {
    my ($class, $storeid, $scfg, $vmid, $fmt, $name, $size) = @_;

    called('alloc_image', $storeid, $scfg, $vmid, $fmt, $name, $size);
    my $volname = "$vmid/" . ($name // "vm-$vmid-disk-0.$fmt");
    my $file = $class->filesystem_path($scfg, $volname);
    make_path(dirname($file));
    open my $made, '>', $file or die "unable to create image: $!\n";
    truncate $made, $size * 1024;
    close $made;
    return $volname;
}

sub free_image {
    my ($class, $storeid, $scfg, $volname, $isbase, $format) = @_;

    called('free_image', $storeid, $scfg, $volname);
    my $file = $class->filesystem_path($scfg, $volname);
    unlink $file or die "unlink '$file' failed - $!\n";
    rmdir dirname($file);
    return;
}

sub moved {
    my ($class, $scfg, $from, $to) = @_;

    my ($old, $new) = map { $class->filesystem_path($scfg, $_) } ($from, $to);
    make_path(dirname($new));
    rename $old, $new or die "rename '$old' to '$new' failed - $!\n";
    return;
}

sub create_base {
    my ($class, $storeid, $scfg, $volname) = @_;

    called('create_base', $storeid, $scfg, $volname);
    my $base = $volname =~ s!/vm-!/base-!r;
    $class->moved($scfg, $volname, $base);
    chmod 0444, $class->filesystem_path($scfg, $base);
    return $base;
}

sub rename_volume {
    my ($class, $scfg, $storeid, $volname, $vmid, $name) = @_;

    called('rename_volume', $scfg, $storeid, $volname, $vmid, $name);
    $name //= "vm-$vmid-disk-0.raw";
    $class->moved($scfg, $volname, "$vmid/$name");
    return "$storeid:$vmid/$name";
}

sub volume_resize {
    my ($class, $scfg, $storeid, $volname, $size, $running, $snapname) = @_;

    called('volume_resize', $scfg, $storeid, $volname, $size, $running);
    truncate $class->filesystem_path($scfg, $volname), $size or die "resize failed - $!\n";
    return;
}

1;
