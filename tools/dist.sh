#!/bin/bash
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
#
# `make dist`: the sdist, and the wheel that is built from it, in dist/; then a look at what is in them. What builds and
# checks has an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TOOLS=build/release-tools
PYTHON=$TOOLS/bin/python

fail() { echo "dist: $*" >&2; exit 1; }

if ! "$PYTHON" -c 'import build, twine' 2>/dev/null; then
    /usr/bin/python3 -m venv --clear "$TOOLS"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check 'build>=1.2,<2' 'twine>=6,<8'
fi
rm -rf dist
"$PYTHON" -m build --outdir dist . >/dev/null
wheel=(dist/*.whl) sdist=(dist/*.tar.gz)
[ ${#wheel[@]} -eq 1 ] && [ ${#sdist[@]} -eq 1 ] || fail "expected one wheel and one sdist, found: $(ls dist)"
in_wheel=$("$PYTHON" -m zipfile --list "${wheel[0]}" | awk 'NR > 1 { print $1 }')
in_sdist=$(tar --list --file "${sdist[0]}" | cut -d/ -f2-)

for wanted in forebay/py.typed forebay_cache/py.typed forebay_nbd/py.typed forebay_fast/py.typed \
    'forebay_fast/core\.[^/]*\.so' 'forebay-.*/licenses/LICENSE' \
    'forebay-.*/entry_points.txt'; do
    grep -qx "$wanted" <<<"$in_wheel" || fail "$wanted is not in the wheel"
done
! grep -Ev '^(forebay|forebay_cache|forebay_nbd|forebay_fast)/.*\.(py|pyi|typed|so)$|^forebay-[^/]*\.dist-info/' <<<"$in_wheel" ||
    fail "the wheel has what does not belong there"

for wanted in LICENSE README.md CHANGELOG.md Makefile pyproject.toml tools/install.sh systemd/forebay.service \
    config/forebay.toml fast/forebay_fast/core.c fast/forebay_fast/.core.c.of docs/forebay.svg nbd/nbdkit/plugin.py tests/README.md; do
    grep -qx "$wanted" <<<"$in_sdist" || fail "$wanted is not in the sdist"
done
! grep -E '^(\.ci|\.venv|\.git/|bench/results|build|dist)(/|$)|__pycache__|\.(pyc|so)$' <<<"$in_sdist" ||
    fail "the sdist has what does not belong there"

"$PYTHON" -m twine check --strict dist/* >/dev/null || fail "the readme does not render: twine check --strict dist/*"
echo "dist: ${wheel[0]} ${sdist[0]}"
