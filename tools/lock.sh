#!/bin/bash
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
#
# `make lock`: writes requirements.lock anew, from what pyproject.toml asks for, and requirements-stage.lock, of its extra
# `stage`. pip-tools has an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TOOLS=build/lock-tools
[ -x "$TOOLS/bin/pip-compile" ] || {
    /usr/bin/python3 -m venv --clear "$TOOLS"
    "$TOOLS/bin/python" -m pip install --quiet --disable-pip-version-check 'pip-tools>=7.4,<8'
}
new=$(mktemp)
trap 'rm -f "$new"' EXIT

# what to look for ("-": stdin), and the file to write, whose first lines stay
lock() {
    "$TOOLS/bin/pip-compile" --quiet --generate-hashes --strip-extras --no-header --no-annotate --no-emit-index-url \
        --no-emit-find-links --no-emit-trusted-host --upgrade --output-file "$new" "$1" >/dev/null
    { sed -n '/^#/p;/^$/q' "$2"; echo; cat "$new"; } >"$2.new"
    mv "$2.new" "$2"
    echo "lock: $(grep -c == "$2") packages in $2"
}

lock pyproject.toml requirements.lock
/usr/bin/python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["stage"])' |
    lock - requirements-stage.lock
