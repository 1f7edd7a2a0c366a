#!/bin/bash
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
#
# install.sh [--edit] [--persistent] | --uninstall: puts Forebay's drivers into an OpenNebula front-end, or takes them out.
#
#   --edit         write what OpenNebula's configuration needs as well, and keep a copy of each file; otherwise it is printed
#   --persistent   with it: persistent disks through the cache, too (deploy and attach_disk of all KVM hosts)
#   ONE_LOCATION   where a self-contained OpenNebula lies
#   ONE_USER, ONE_GROUP   whose the files are: oneadmin
#   DESTDIR        a root to install into, for packagers; nothing is run or edited there
#
# What is OpenNebula's is linked to, never copied. It may be run as often as one likes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

DESTDIR=${DESTDIR:-}
ONE_LOCATION=${ONE_LOCATION:-}
ONE_USER=${ONE_USER:-oneadmin}
ONE_GROUP=${ONE_GROUP:-oneadmin}
VAR=${ONE_LOCATION:+$ONE_LOCATION/var}
VAR=${VAR:-/var/lib/one}
BIN=${ONE_LOCATION:-/usr}/bin
ETC=${ONE_LOCATION:+$ONE_LOCATION/etc}
ETC=${ETC:-/etc/one}
R=$DESTDIR$VAR/remotes
TM=$R/tm/forebay
LAST_TRIED=7.4      # a newer one may have changed what the scripts rely on

fail() { echo "install: $*" >&2; exit 1; }

# link in tm/forebay, what it points to
links() {
    local name action
    echo "clone.ssh clone"
    echo "clone.local clone"
    for name in ln ln.ssh ln.local mv; do echo "$name ../shared/${name%%.*}"; done
    for name in mv.ssh mv.local; do echo "$name ../ssh/mv"; done
    for name in delete resize premigrate postmigrate failmigrate; do echo "$name ../common/$name"; done
    echo "cpds ../qcow2/cpds"
    for name in cpds.ssh cpds.local; do echo "$name ../qcow2/cpds.ssh"; done
    for action in snap_create snap_create_live snap_delete snap_revert; do
        echo "$action ../qcow2/$action"
        for name in "$action.ssh" "$action.local"; do echo "$name ../qcow2/$action.ssh"; done
    done
}

# mode, file of this folder, where it goes
files() {
    local file
    echo "755 remotes/tm/forebay/clone $TM/clone"
    echo "755 remotes/tm/forebay/mvds $TM/mvds"
    for file in remotes/tm/forebay/forebay_one/*.py; do echo "644 $file $TM/forebay_one/${file##*/}"; done
    echo "755 remotes/vmm/kvm/deploy.forebay $R/vmm/kvm/deploy.forebay"
    echo "755 remotes/vmm/kvm/attach_disk.forebay $R/vmm/kvm/attach_disk.forebay"
    echo "755 remotes/im/kvm-probes.d/host/system/forebay.sh $R/im/kvm-probes.d/host/system/forebay.sh"
    echo "755 bin/forebay-one $DESTDIR$BIN/forebay-one"
}

check_version() {
    local version
    if [ ! -e "$R/VERSION" ]; then
        [ -n "$DESTDIR" ] || fail "no OpenNebula at $R: run this on the front-end, or set ONE_LOCATION"
        return 0
    fi
    version=$(head -n 1 "$R/VERSION")
    [[ $version =~ ^([0-9]{1,3})\.([0-9]{1,3}) ]] || fail "$R/VERSION says no version: '$version'"
    [ "${BASH_REMATCH[1]}" -ge 7 ] || fail "OpenNebula $version is too old: these drivers need 7.0 or newer"
    if [ "$(printf '%s\n' "${BASH_REMATCH[1]}.${BASH_REMATCH[2]}" "$LAST_TRIED" | sort -V | tail -n 1)" != "$LAST_TRIED" ]; then
        echo "install: warning: OpenNebula $version is newer than $LAST_TRIED, with which this was tried last" >&2
    fi
}

put_files() {
    local mode from to name target
    while read -r mode from to; do
        install -D -m "$mode" "$from" "$to"
    done < <(files)
    [ -e "$TM/driver.conf" ] || install -m 644 remotes/tm/forebay/driver.conf "$TM/driver.conf"
    while read -r name target; do
        ln -sfn "$target" "$TM/$name"
        if [ -z "$DESTDIR" ] && [ ! -e "$TM/$name" ]; then
            echo "install: warning: OpenNebula has no $TM/$target: what needs it fails" >&2
        fi
    done < <(links)
}

# Not on each start of a driver, which writes nothing; for another Python than the one that runs them it is not used.
compile_files() {
    [ -n "$DESTDIR" ] || /usr/bin/python3 -m compileall -q "$TM/forebay_one" >/dev/null 2>&1 || true
}

own_files() {
    local to
    [ "$(id -u)" -eq 0 ] || return 0
    getent passwd "$ONE_USER" >/dev/null || { [ -n "$DESTDIR" ] && return 0; fail "no user '$ONE_USER': set ONE_USER"; }
    chown -hR "$ONE_USER:$ONE_GROUP" "$TM"
    while read -r _ _ to; do
        case $to in "$R"/*) chown -h "$ONE_USER:$ONE_GROUP" "$to" ;; esac
    done < <(files)
}

remove_files() {
    local name target to
    while read -r name target; do
        if [ "$(readlink "$TM/$name")" = "$target" ]; then rm -f "$TM/$name"; fi
    done < <(links)
    while read -r _ _ to; do rm -f "$to"; done < <(files)
    ! cmp -s remotes/tm/forebay/driver.conf "$TM/driver.conf" || rm -f "$TM/driver.conf"
    rm -rf "$TM/forebay_one/__pycache__"
    rmdir "$TM/forebay_one" "$TM" 2>/dev/null || true
    [ ! -e "$TM" ] || echo "install: $TM is kept, with what was changed in it"
}

BEGIN='# forebay: begin'
END='# forebay: end'

oned_lines() {
    local system
    echo "$BEGIN"
    echo 'TM_MAD_CONF = ['
    echo '    NAME = "forebay", LN_TARGET = "NONE", CLONE_TARGET = "SYSTEM", SHARED = "YES", ALLOW_ORPHANS = "FORMAT",'
    echo -n '    TM_MAD_SYSTEM = "shared,qcow2,ssh,local"'
    for system in SHARED QCOW2 SSH LOCAL; do
        printf ',\n    LN_TARGET_%s = "NONE", CLONE_TARGET_%s = "SYSTEM", DISK_TYPE_%s = "FILE"' $system $system $system
    done
    printf '\n]\n'
    for system in CACHE_MODE CACHE_SIZE PRELOAD_SIZE CACHE_WEIGHT; do
        printf 'INHERIT_IMAGE_ATTR     = "%s"\nINHERIT_DATASTORE_ATTR = "%s"\n' $system $system
    done
    echo "$END"
}

show_lines() {
    cat <<LINES
These lines make it work ($ETC/oned.conf; --edit writes them):

  in TM_MAD, to the list after -d:               ,forebay
  in VM_MAD "kvm", for persistent disks only:    -l deploy=deploy.forebay,attach_disk=attach_disk.forebay
  in $ETC/vmm_exec/vmm_execrc, in LIVE_DISK_SNAPSHOTS:  kvm-forebay qemu-forebay

$(oned_lines)
LINES
}

# a copy beside the file, once
keep_copy() { [ -e "$1.before-forebay" ] || cp -p "$1" "$1.before-forebay"; }

# file, a word that shows that it is done, sed's commands
edit() {
    local file=$1 done_already=$2
    shift 2
    if ! grep -Eq -- "$done_already" "$file"; then
        keep_copy "$file"
        sed -i -E "$@" "$file"
        grep -Eq -- "$done_already" "$file" || fail "$file is not as OpenNebula's: write this in by hand: ${done_already//\\/}"
    fi
}

edit_configuration() {
    local oned=$ETC/oned.conf rc=$ETC/vmm_exec/vmm_execrc
    [ -z "$DESTDIR" ] || fail "--edit changes a front-end's configuration: leave DESTDIR out"
    [ -w "$oned" ] || fail "$oned cannot be written: run this as root on the front-end"
    edit "$oned" '-d [^"]*,forebay' '/^TM_MAD *= *\[/,/\]/ s/(ARGUMENTS *= *"[^"]*-d [^" ]*)/\1,forebay/'
    if ! grep -q "^$BEGIN" "$oned"; then
        keep_copy "$oned"
        oned_lines >>"$oned"
    fi
    if [ -n "$PERSISTENT" ]; then
        edit "$oned" 'deploy=deploy\.forebay,attach_disk=attach_disk\.forebay' \
            '/^VM_MAD *= *\[/,/\]/ { /NAME *= *"kvm"/,/\]/ { / -l /! s/(ARGUMENTS *= *"[^"]*)"/\1 -l deploy=deploy.forebay,attach_disk=attach_disk.forebay"/ } }'
    fi
    [ ! -w "$rc" ] || edit "$rc" 'kvm-forebay' 's/^(LIVE_DISK_SNAPSHOTS="[^"]*)"/\1 kvm-forebay qemu-forebay"/'
    echo "install: $oned is edited; the file as it was: $oned.before-forebay"
}

unedit() {
    local oned=$ETC/oned.conf rc=$ETC/vmm_exec/vmm_execrc
    if [ -z "$DESTDIR" ] && [ -w "$oned" ] && grep -Eq ',forebay|deploy\.forebay|^# forebay: begin' "$oned"; then
        sed -i -E -e "/^$BEGIN/,/^$END/d" -e '/^TM_MAD *= *\[/,/\]/ s/,forebay//' \
            -e 's/ -l deploy=deploy\.forebay,attach_disk=attach_disk\.forebay//' "$oned"
        [ ! -w "$rc" ] || sed -i 's/ kvm-forebay qemu-forebay//' "$rc"
        echo "install: $oned is without Forebay"
    fi
}

EDIT='' PERSISTENT='' ACTION=install
for word; do
    case $word in
    --edit) EDIT=yes ;;
    --persistent) PERSISTENT=yes ;;
    --uninstall) ACTION=uninstall ;;
    -h | --help) sed -n '5,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]##*/}"; exit 0 ;;
    *) echo "install: unknown: '$word': see --help" >&2; exit 2 ;;
    esac
done

if [ "$ACTION" = uninstall ]; then
    unedit
    remove_files
    echo "install: Forebay's drivers are removed; restart opennebula"
    exit 0
fi
check_version
put_files
compile_files
own_files
if [ -n "$EDIT" ]; then edit_configuration; else show_lines; fi
[ -n "$DESTDIR" ] || echo "Now: su - $ONE_USER -c 'onehost sync --force'; systemctl restart opennebula"
