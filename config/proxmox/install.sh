#!/bin/bash
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: AGPL-3.0-or-later
#
# install.sh install | uninstall | deb: puts the plugin into this node of Proxmox VE, takes it out again, or makes a
# Debian package of it, ./forebay-proxmox_VERSION_all.deb. DESTDIR=DIR: into that root, and nothing is restarted.
set -euo pipefail
from=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

DESTDIR=${DESTDIR:-}
PLUGIN=PVE/Storage/Custom/ForebayPlugin.pm
PERL=/usr/share/perl5
DOC=/usr/share/doc/forebay-proxmox
# All that has loaded the storages.
SERVICES=(pvedaemon pveproxy pvestatd pvescheduler pve-ha-lrm)

fail() { echo "install.sh: $*" >&2; exit 1; }

running() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

reload() {
    local service
    for service in "${SERVICES[@]}"; do
        systemctl try-reload-or-restart "$service.service" || echo "install.sh: restart $service by hand" >&2
    done
}

put() {
    install -D -m 644 "$from/$PLUGIN" "$1$PERL/$PLUGIN"
    install -D -m 644 "$from/README.md" "$1$DOC/README.md"
    install -D -m 644 "$from/LICENSE" "$1$DOC/copyright"
}

make_deb() {
    local version root
    version=${VERSION:-$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$from/../../gateway/forebay/__init__.py")}
    [ -n "$version" ] || fail "no version: say VERSION="
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT      # no local: it outlives the function
    root=$work/root
    mkdir "$root"
    put "$root"
    mkdir "$root/DEBIAN"
    cat >"$root/DEBIAN/control" <<CONTROL
Package: forebay-proxmox
Version: $version
Architecture: all
Maintainer: Forebay developers <forebay@localhost>
Depends: libpve-storage-perl (>= 9.0), libjson-perl
Section: admin
Priority: optional
Description: Forebay as a storage of Proxmox VE
 A storage plugin: VMs reach raw images on a share through the Forebay of their
 node, a persistent block cache. Forebay itself is installed apart from it.
CONTROL
    echo 'activate-noawait pve-api-updates' >"$root/DEBIAN/triggers"    # as the storages of Proxmox VE itself
    dpkg-deb --root-owner-group --build "$root" "forebay-proxmox_${version}_all.deb" >/dev/null
    echo "forebay-proxmox_${version}_all.deb"
}

case ${1:-} in
install)
    running && ! [ -e $PERL/PVE/Storage/Plugin.pm ] && fail "this is no node of Proxmox VE: $PERL/PVE/Storage is missing"
    put "$DESTDIR"
    ! running || reload
    ;;
uninstall)
    running && grep -qs '^forebay:' /etc/pve/storage.cfg && fail "storages use it: 'pvesm remove' them first"
    rm -f "$DESTDIR$PERL/$PLUGIN" "$DESTDIR$DOC"/{README.md,copyright}
    [ ! -d "$DESTDIR$DOC" ] || rmdir --ignore-fail-on-non-empty "$DESTDIR$DOC"
    ! running || reload
    ;;
deb) make_deb ;;
*) fail "say install, uninstall or deb" ;;
esac
