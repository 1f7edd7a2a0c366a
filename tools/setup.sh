#!/bin/bash
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
#
# Leaves a working .venv/bin/forebay: system packages (only those that are missing), a virtual environment of the
# system's Python, and this checkout installed into it, editable. The second run is done as soon as it has compared
# one checksum. VENV=DIR puts the environment elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
PYTHON=/usr/bin/python3     # libnbd's binding exists for the system's Python only
STAMP=$VENV/.forebay-setup

# What the tests, the demo and the bench run as real clients and servers, and what the core is compiled with. All Python
# dependencies come as wheels: pyfuse3, which has none, is the distribution's here and not the extra `fuse`.
PACKAGES=(gcc libc6-dev python3-dev python3-venv python3-libnbd libnbd-bin nbdkit nbdkit-plugin-python qemu-utils qemu-system-common fio curl python3-pyfuse3 fuse3
    systemd-container perl libjson-perl libperl-critic-perl)

fail() { echo "setup: $*" >&2; exit 1; }

fingerprint() { { echo "$PWD $VENV"; cat pyproject.toml hatch_build.py Makefile tools/*; } | sha256sum; }

# With what tests need to plant bugs; done at once where the sources are those of the last time.
compile_core() { "$VENV/bin/python" fast/build.py --plants || echo "setup: Forebay serves without its compiled core" >&2; }

missing_packages() {
    local package
    for package in "${PACKAGES[@]}"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || echo "$package"
    done
}

install_packages() {
    if ! command -v apt-get >/dev/null; then
        echo "setup: no apt-get here; install the equivalents of: ${PACKAGES[*]}" >&2
        return
    fi
    local missing root=()
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || fail "run as root, or install these first: ${missing[*]}"
        root=(sudo)
    fi
    echo "setup: installing ${missing[*]}"
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
        >/dev/null
}

# Prometheus and promtool, which read what is exported and config/prometheus in the tests. Their programs alone: the
# package would start a server on this host.
fetch_prometheus() {
    [ ! -x "$VENV/prometheus/promtool" ] && command -v apt-get >/dev/null || return 0
    local work; work=$(mktemp -d)
    chmod 755 "$work"
    if (cd "$work" && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb .) >/dev/null 2>&1; then
        mkdir -p "$VENV/prometheus"
        mv "$work"/usr/bin/{prometheus,promtool} "$VENV/prometheus/"
    else
        echo "setup: prometheus could not be fetched: what needs it is not tested" >&2
    fi
    rm -rf "$work"
}

# A browser without a screen, 100 MB, in which tests look at `forebay page`.
install_browser() {
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null && ! command -v chromium-headless-shell >/dev/null || return 0
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium-headless-shell >/dev/null 2>&1 ||
        echo "setup: without chromium-headless-shell, so the page is not tested in a browser" >&2
}

# An environment that does not see the system's packages, belongs to another Python or has no pip is made anew. Without
# python3-venv, `python3 -m venv` leaves one that has everything but pip.
usable_venv() {
    [ -x "$VENV/bin/python" ] || return 1
    grep -qx 'include-system-site-packages = true' "$VENV/pyvenv.cfg" || return 1
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || return 1
    [ "$("$VENV/bin/python" -c 'import sys; print(sys.version_info[:3])' 2>/dev/null)" = \
        "$("$PYTHON" -c 'import sys; print(sys.version_info[:3])')" ]
}

if [ -x "$VENV/bin/forebay" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint)" ]; then
    compile_core
    exit 0
fi

install_packages
[ -x "$PYTHON" ] || fail "$PYTHON is missing: install python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is older than 3.11"
"$PYTHON" -c 'import ensurepip' 2>/dev/null || fail "$PYTHON cannot make environments: install python3-venv"
usable_venv || "$PYTHON" -m venv --system-site-packages --clear "$VENV"
echo "setup: installing forebay and its dependencies into $VENV"
FOREBAY_CORE_PLANTS=1 "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[stage]' ||
    echo "setup: without libtorrent, so tests of staging are skipped" >&2
compile_core
fetch_prometheus
install_browser
"$VENV/bin/python" -c 'import libnbdmod, nbd' || fail "libnbd's Python binding is not importable in $VENV"
fingerprint >"$STAMP"
echo "setup: $VENV/bin/forebay is ready"
