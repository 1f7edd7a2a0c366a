# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Layers of an overlay between which there is no snapshot any more, made one: so what only that held comes free."""

from itertools import pairwise

from forebay.checkpoint.dirty import Dirty
from forebay.checkpoint.schedule import FREEZE_ROOM
from forebay.checkpoint.steps import Progress
from forebay_cache import Cache, Layer, join
from forebay_cache.format.geometry import SECTOR
from forebay_cache.turns import next_turn


async def compact(cache: Cache, dirty: Dirty, progress: Progress, *, whole: bool = True) -> None:
    """Join layers of an overlay, two by two, until there is a snapshot between any two of them. Raises OSError.

    `whole`: what is written now is one of them; without it, only what is frozen already. Interrupted, it can be called
    again. The caller sees to it that nothing else is done to the layers meanwhile.
    """
    if whole and dirty.frozen and _is_needless(dirty, dirty.frozen[-1], dirty.layers[0]):
        await cache.journal_room(FREEZE_ROOM)
        dirty.freeze_changes()
    if not _pair(dirty):
        return
    await cache.make_durable()
    total = sum(layer.sectors for layer in dirty.frozen) * SECTOR
    done = 0
    progress(0, total)

    async def turn(moved: int) -> None:
        nonlocal done
        done += moved * SECTOR
        progress(min(done, total), total)
        await next_turn()

    while pair := _pair(dirty):
        gone = await join(cache, *pair, turn, dirty.forget_page)
        dirty.remove(gone)
        cache.layers.drop(gone)
        await cache.commit()


def _pair(dirty: Dirty) -> tuple[Layer, Layer] | None:
    """Two frozen layers, the older one first, without a snapshot between them; None: there are none."""
    frozen = dirty.frozen
    return next((pair for pair in pairwise(frozen) if _is_needless(dirty, *pair)), None)


def _is_needless(dirty: Dirty, older: Layer, newer: Layer) -> bool:
    """True if no snapshot ends between the two."""
    first, end = older.name.generation, newer.name.generation
    return not any(first <= one.generation < end for one in dirty.snapshots.all())
