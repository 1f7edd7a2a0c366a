#!/bin/bash
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

# What a host tells OpenNebula of its cache. A probe that fails would fail the whole host, so this one never does; and
# what was told once stays until something else is told.
told=$(timeout 5 forebay summary --opennebula 2>/dev/null) || told=
if [ -n "$told" ]; then
    printf '%s\n' "$told"
elif command -v forebay >/dev/null; then
    printf '%s\n' 'FOREBAY_STATE="down"' LS_FREE=0
else
    printf '%s\n' 'FOREBAY_STATE="none"' LS_FREE=0
fi
exit 0
