# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Pinning: all of a clean layer stays in the cache, because a disk wants a full copy of its image."""

from __future__ import annotations

import trio

from forebay_cache.cache import Cache
from forebay_cache.format.entry import block_key, slots_in
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.layers.layer import Layer

_LOADED_AT_ONCE = 64
"""Pages that are brought into memory by one call of a thread."""
_PAGES_AT_ONCE = 16
"""Pages whose slots are held, or are not any more, between two turns of others."""


async def pin_layer(cache: Cache, layer: Layer, pinned: bool) -> None:
    """Keep all of a clean layer from being evicted, or no longer. Raises IndexFault; it can be called again then.

    If it is called with the opposite meanwhile, the call that came last counts.
    """
    layer.pinned = pinned
    layer.changed = True
    slots = cache.slots
    change = slots.placement.hold if pinned else slots.placement.unhold
    numbers = await layer.pages.numbers()
    for n, number in enumerate(numbers):
        if n % _LOADED_AT_ONCE == 0:
            await layer.pages.load_all(numbers[n : n + _LOADED_AT_ONCE])
        if n % _PAGES_AT_ONCE == 0:
            await trio.lowlevel.checkpoint()  # a page that is loaded already awaits nothing
        if layer.pinned != pinned:
            return
        for i, slot in slots_in(layer.pages.page(number)):
            if not slots.is_evicting(slot):
                slots.owner[slot] = block_key(layer.id, number * PAGE_BLOCKS + i)  # unless scanned
                change(slot)
