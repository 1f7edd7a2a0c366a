#!/bin/bash
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
#
# `make lock`: writes requirements.lock anew, from what pyproject.toml asks for. pip-tools has an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TOOLS=build/lock-tools
[ -x "$TOOLS/bin/pip-compile" ] || {
    /usr/bin/python3 -m venv --clear "$TOOLS"
    "$TOOLS/bin/python" -m pip install --quiet --disable-pip-version-check 'pip-tools>=7.4,<8'
}
new=$(mktemp)
trap 'rm -f "$new"' EXIT
"$TOOLS/bin/pip-compile" --quiet --generate-hashes --strip-extras --no-header --no-annotate --no-emit-index-url \
    --no-emit-find-links --no-emit-trusted-host --upgrade --output-file "$new" pyproject.toml >/dev/null
{ sed -n '/^#/p;/^$/q' requirements.lock; echo; cat "$new"; } >requirements.lock.new
mv requirements.lock.new requirements.lock
echo "lock: $(grep -c == requirements.lock) packages in requirements.lock"
