# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Finding out at the start which slots are free: all pages of the index are read, and the placement is told."""

from __future__ import annotations

import trio

from forebay_cache.cache import Cache
from forebay_cache.format.entry import block_key, slots_in
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.format.records import PAGE_KEY
from forebay_cache.slots.placement import TOUCHED, UNSCANNED

_ROUNDS = 64
"""The memory that reading the index takes is given back after so many pieces of it: 32 MB."""
_PAGES = 512
"""Pages of one piece."""
_SLICE = 16
"""Pages of which the placement is told without a pause: half a millisecond."""


def scan_now(cache: Cache) -> None:
    """Tell the placement which slots are occupied. That is stored nowhere else, so nothing can disagree with it.

    Raises IndexFault.
    """
    key = b""
    while found := cache.index.all_pages(key, _PAGES):
        _adopt(cache, found)
        key = found[-1][0] + b"\0"
    cache.slots.placement.scanned()


async def scan_slowly(cache: Cache) -> None:
    """The same for a large index, while guests are served: pages are read in a thread. Raises IndexFault."""
    key = b""
    rounds = 0
    while found := await trio.to_thread.run_sync(cache.index.all_pages, key, _PAGES):
        rounds += 1
        if rounds % _ROUNDS == 0:
            cache.index.give_back()
        for n in range(0, len(found), _SLICE):
            _adopt(cache, found[n : n + _SLICE])
            await trio.lowlevel.checkpoint()
        key = found[-1][0] + b"\0"
    cache.index.give_back()
    cache.slots.placement.scanned()


def _adopt(cache: Cache, found: list[tuple[bytes, bytes]]) -> None:
    placement, owner = cache.slots.placement, cache.slots.owner
    state = placement.state
    for key, raw in found:
        ident, number = PAGE_KEY.unpack(key)
        layer = cache.layers.get(ident)
        held = layer is not None and layer.is_held
        first = block_key(ident, number * PAGE_BLOCKS)
        for i, slot in slots_in(raw):
            # What is known by now is newer than what the index said when it was read.
            if state[slot] & ~TOUCHED == UNSCANNED:
                owner[slot] = first + i
                placement.adopt(slot, held=held)
