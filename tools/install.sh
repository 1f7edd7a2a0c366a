#!/bin/bash
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
#
# tools/install.sh install | uninstall: puts Forebay into a host, or takes it out again. `make install` calls it.
#
#   PREFIX=/usr/local   where programs and units go; /usr for packages
#   DESTDIR=DIR         a root to install into, for packagers; nothing is run there
#   ENVIRONMENT=DIR     a virtual environment that has Forebay already, instead of making PREFIX/lib/forebay/venv
#   PYTHON=/usr/bin/python3
#
# What an operator may have changed (in /etc/forebay) is never overwritten and never removed; neither is
# /var/lib/forebay. Installing again is an upgrade: `systemctl restart forebay` then hands all clients over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
ENVIRONMENT=${ENVIRONMENT:-}
PYTHON=${PYTHON:-/usr/bin/python3}
HOME_OF_IT=$PREFIX/lib/forebay
DOC=$PREFIX/share/doc/forebay
VENV=${ENVIRONMENT:-$HOME_OF_IT/venv}
# Read from /usr/lib and /usr/local/lib alike by systemd, and not from elsewhere.
case $PREFIX in /usr | /usr/local) SYSTEMD=$PREFIX/lib ;; *) SYSTEMD=/usr/local/lib ;; esac

fail() { echo "install: $*" >&2; exit 1; }

# mode, file of the checkout, where it goes
files() {
    local unit
    for unit in forebay.service forebay@.service forebay-fuse.service forebay-nbdkit.service forebay-stage.service \
        forebay-page.service forebay.target machine-.scope.d/10-forebay.conf; do
        echo "644 systemd/$unit $SYSTEMD/systemd/system/$unit"
    done
    echo "644 systemd/sysusers.conf $SYSTEMD/sysusers.d/forebay.conf"
    echo "644 systemd/tmpfiles.conf $SYSTEMD/tmpfiles.d/forebay.conf"
    echo "644 systemd/60-forebay.rules $SYSTEMD/udev/rules.d/60-forebay.rules"
    echo "755 systemd/drain $HOME_OF_IT/drain"
    echo "755 systemd/holds-cache $HOME_OF_IT/holds-cache"
    for unit in nbd/nbdkit/*.py; do
        echo "644 $unit $HOME_OF_IT/nbdkit/${unit##*/}"
    done
    echo "644 config/completions/forebay.bash $PREFIX/share/bash-completion/completions/forebay"
    echo "644 config/completions/_forebay $PREFIX/share/zsh/site-functions/_forebay"
    echo "755 config/libvirt/qemu-forebay $PREFIX/bin/qemu-forebay"
    echo "755 config/libvirt/hooks/qemu.d/forebay /etc/libvirt/hooks/qemu.d/forebay"
    # The pages, in their folders, so that links from one to another work; units name them as their documentation.
    find *.md bench cache config docs fast gateway nbd systemd tests/README.md ! -path '*/results/*' \
        \( -name '*.md' -o -name '*.svg' -o -path 'docs/*.png' \) -printf "644 %p $DOC/%p\n"
}

running() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

put_files() {
    local mode from to
    while read -r mode from to; do
        install -D -m "$mode" "$from" "$DESTDIR$to"
        # Units and scripts name the default prefix.
        case $from in systemd/*) sed -i "s#/usr/local/#$PREFIX/#g" "$DESTDIR$to" ;; esac
    done < <(files)
    local file
    for file in forebay.toml nbdkit.toml; do
        [ -e "$DESTDIR/etc/forebay/$file" ] || install -D -m 644 "config/$file" "$DESTDIR/etc/forebay/$file"
    done
    install -d "$DESTDIR$PREFIX/bin"
    ln -sfn "$VENV/bin/forebay" "$DESTDIR$PREFIX/bin/forebay"
}

# Debian has what `python3 -m venv` needs in a package of its own. A packager's build (DESTDIR) installs nothing.
need_venv() {
    [ -x "$PYTHON" ] || fail "$PYTHON is missing: install python3 and python3-venv"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is older than 3.11"
    ! "$PYTHON" -c 'import ensurepip' 2>/dev/null || return 0
    [ -z "$DESTDIR" ] && [ "$(id -u)" -eq 0 ] && [ "$PYTHON" = /usr/bin/python3 ] && command -v apt-get >/dev/null ||
        fail "$PYTHON cannot make environments: install python3-venv"
    echo "install: installing python3-venv"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
}

# What is in the environment is of these files; the second run compares them, and is done.
fingerprint() {
    { echo "$VENV"; "$PYTHON" --version; find pyproject.toml requirements.lock requirements-stage.lock hatch_build.py README.md gateway nbd cache fast -type f \
        ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum; } | sha256sum
}

# An environment of the system's Python, which sees libnbd's and pyfuse3's bindings. One without a working pip, as
# `python3 -m venv` leaves behind where python3-venv is missing, is made anew. Scripts in it have to name the place
# where it will be.
make_environment() {
    local place=$DESTDIR$VENV stamp=$DESTDIR$VENV/.forebay-install
    need_venv
    [ ! -x "$place/bin/forebay" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$(fingerprint)" ] || return 0
    "$place/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --system-site-packages --clear "$place"
    rm -f "$stamp"
    "$place/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
    # there are no wheels of it for some machines
    "$place/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes \
        --requirement requirements-stage.lock ||
        echo "install: without libtorrent, so 'forebay stage' cannot get images from other hosts here" >&2
    "$place/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade .
    # pip has compiled what it installed: a restart must not wait for that
    [ -z "$DESTDIR" ] || grep -rlIZ "$place" "$place/bin" "$place/pyvenv.cfg" | xargs -0r sed -i "s#$place#$VENV#g"
    fingerprint >"$stamp"
}

# The unit has a /tmp and /var/tmp of its own.
check_environment() {
    case $(realpath -m "$VENV") in
    /tmp/* | /var/tmp/*) fail "$VENV: the service would not see it there: put it elsewhere" ;;
    esac
}

install_it() {
    check_environment
    [ -n "$ENVIRONMENT" ] || make_environment
    put_files
    if running; then
        systemd-sysusers "$SYSTEMD/sysusers.d/forebay.conf"
        systemd-tmpfiles --create "$SYSTEMD/tmpfiles.d/forebay.conf"
        systemctl daemon-reload
        [ ! -S /run/udev/control ] || udevadm control --reload
        if systemctl --quiet is-active 'forebay*.service'; then
            echo "install: running daemons are of the old version until: systemctl restart 'forebay*.service'"
        else
            echo "install: say where images are in /etc/forebay/forebay.toml, then: systemctl enable --now forebay"
        fi
    fi
}

uninstall_it() {
    if running; then
        ! systemctl --quiet is-active 'forebay*.service' ||
            fail "Forebay runs: shut the VMs down, then: systemctl disable --now forebay 'forebay@*' forebay-fuse"
        systemctl --quiet disable forebay.service forebay-fuse.service forebay-nbdkit.service forebay-stage.service forebay-page.service 2>/dev/null || true
    fi
    local _ to
    while read -r _ _ to; do
        rm -f "$DESTDIR$to"
        rmdir --ignore-fail-on-non-empty "$DESTDIR${to%/*}" 2>/dev/null || true
    done < <(files)
    [ ! -L "$DESTDIR$PREFIX/bin/forebay" ] || rm "$DESTDIR$PREFIX/bin/forebay"
    rm -rf "$DESTDIR$HOME_OF_IT" "$DESTDIR$DOC"
    ! running || systemctl daemon-reload
    echo "uninstall: kept: /etc/forebay, /var/lib/forebay (what is dirty there is nowhere else), the user forebay"
}

case ${1:-} in
install) install_it ;;
uninstall) uninstall_it ;;
*) fail "say install or uninstall" ;;
esac
