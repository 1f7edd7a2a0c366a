# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which blocks somebody has asked for, as far as the placement can tell: what a hit leaves behind anyway."""

from collections.abc import AsyncIterator, Callable, Iterable
from enum import Enum

import trio

from forebay_cache.cache import Cache
from forebay_cache.format.entry import block_of_key, layer_of_key, slot_of, valid_of
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.layers.layer import Layer
from forebay_cache.slots.placement import TOUCHED


class Use(Enum):
    """What is known of a block of a clean layer."""

    ASKED = "asked for since it came in, or since a hand of the placement passed it"
    UNASKED = "there, and not asked for"
    ABSENT = "not there"
    UNKNOWN = "zeros without a slot"


_AT_ONCE = 1024
"""Blocks that are looked at between two turns of others: half a millisecond."""


async def uses_of(
    cache: Cache, layer: Layer, blocks: Iterable[int]
) -> AsyncIterator[tuple[int, Use]]:
    """(number of the block, what is known of it at this instant), in the order of `blocks`. Raises IndexFault.

    `watch_uses` tells of what is forgotten meanwhile.
    """
    for n, block in enumerate(blocks):
        if n % _AT_ONCE == 0:
            await trio.lowlevel.checkpoint()
        number, i = divmod(block, PAGE_BLOCKS)
        if layer.pages.look(number) is None:
            await layer.pages.load([number])
        word = layer.pages.page(number)[i]
        slot = slot_of(word)
        if slot < 0:
            yield block, Use.UNKNOWN if valid_of(word) else Use.ABSENT
        elif cache.slots.placement.state[slot] & TOUCHED:
            yield block, Use.ASKED
        else:
            yield block, Use.UNASKED


def watch_uses(cache: Cache, told: Callable[[int, int], None] | None) -> None:
    """Have ``told(layer, block)``, both by number, be called for each block that was asked for when the placement
    forgets that: of a new block it does so when some hundred others have come in. None: not any more.
    """
    if told is None:
        cache.slots.placement.on_forgotten = None
        return

    def forgotten(slot: int) -> None:
        key = cache.slots.owner[slot]
        told(layer_of_key(key), block_of_key(key))

    cache.slots.placement.on_forgotten = forgotten
