#!/bin/bash
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
#
# `make try-install SUITE=trixie`: a minimal Debian of that suite, made by debootstrap in build/, with `make install` and
# the demo in it. Needs root, debootstrap and systemd-nspawn; five minutes for a new suite. `make clean` removes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "try-install: $*" >&2; exit 1; }

SUITE=${SUITE:-trixie}
PLACE=$PWD/build/install
ROOT=$PLACE/$SUITE
# What `make install` says that it needs; a compiler for the core; what the demo runs.
PACKAGES=systemd,python3,make,ca-certificates,gcc,libc6-dev,python3-dev,qemu-utils,libnbd-bin,e2fsprogs

[ "$(id -u)" -eq 0 ] || fail "run it as root"
[[ $SUITE =~ ^[a-z]+$ ]] || fail "'$SUITE' is no suite of Debian: say bookworm or trixie"
for tool in debootstrap systemd-nspawn git; do
    command -v "$tool" >/dev/null || fail "$tool is missing: apt install debootstrap systemd-container git"
done

if [ ! -e "$ROOT/.made" ]; then
    rm -rf "$ROOT"
    mkdir -p "$PLACE"
    echo "try-install: making a Debian $SUITE"
    debootstrap --variant=minbase --include="$PACKAGES" "$SUITE" "$ROOT" >"$PLACE/$SUITE.log" 2>&1 ||
        fail "debootstrap failed: $(tail -1 "$PLACE/$SUITE.log")"
    touch "$ROOT/.made"
fi

# The files of the checkout as they are now, without what was built in it.
rm -rf "$ROOT/root/forebay" "$ROOT/usr/local/lib/forebay"
mkdir -p "$ROOT/root/forebay"
git ls-files -z --cached --others --exclude-standard | xargs -0 tar -c | tar -x -C "$ROOT/root/forebay"
# pip finds packages as this host's does.
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/xdg/pip /etc/ssl/certs/ca-certificates.crt; do
    [ ! -e "$file" ] || { mkdir -p "$ROOT$(dirname "$file")" && cp -rL "$file" "$ROOT$(dirname "$file")"; }
done
mapfile -t settings < <(env | grep '^PIP_' | sed 's/^/--setenv=/')

inside() { systemd-nspawn --quiet --register=no --keep-unit --pipe "${settings[@]}" -D "$ROOT" "$@"; }

inside make -C /root/forebay install
inside /usr/local/bin/forebay --version
inside /usr/local/bin/forebay check-config
inside /usr/local/lib/forebay/venv/bin/python -c 'import sys, forebay_fast
print("Python", sys.version.split()[0], forebay_fast.missing or "with the compiled core")'
inside /usr/local/bin/forebay demo
echo "try-install: $SUITE is good"
