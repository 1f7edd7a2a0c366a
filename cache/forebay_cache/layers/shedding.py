# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Shedding: pages of clean layers that are more than are kept in memory leave it, in slices."""

from __future__ import annotations

import trio

from forebay_cache.durable.commit import Committer
from forebay_cache.layers.registry import Layers

SHED_SECONDS = 0.5
"""How often it looks whether there are too many pages."""
_AT_ONCE = 2048
"""Pages that are forgotten between two turns of others."""


async def shed_pages(layers: Layers, commit: Committer) -> None:
    """Keep pages from becoming many more than are kept, until cancelled.

    A page that is in a commit under way must not be forgotten: the index does not have it yet. So there is none then.
    """
    while True:
        await trio.sleep(SHED_SECONDS)
        if layers.has_too_many():
            async with commit.suspended():
                while layers.shed(_AT_ONCE):
                    await trio.lowlevel.checkpoint()
