# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Two frozen private layers made one: nobody needs the boundary between them any more.

Where both have a sector that of the upper one counts, and the other's place comes free. A block goes from the layer
that holds less to the other one, slots and all, between two awaits, so that one commit stores both sides of it; both
layers are read, the upper one first, so that a reader finds the same at any time. A block has two slots: where more are
needed, sectors of the lower one are copied into a slot of the upper one first, to places that no state ever named.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from forebay_cache.blocks.settle import Job, copy_all
from forebay_cache.cache import Cache
from forebay_cache.format.entry import (
    NO_SLOT,
    Entry,
    block_key,
    entry_at,
    pack,
    pack_second,
    put_entry,
)
from forebay_cache.format.geometry import FULL, PAGE_BLOCKS, SECTOR
from forebay_cache.layers.layer import Layer

_DROPS = 2 * PAGE_BLOCKS * SECTOR
"""As room in the journal and in the commit: see settle.py."""
_STRETCH = 32
"""Blocks that change layers in one go."""

Parts = dict[int, int]
"""Of one block: by slot, the mask of the sectors that are taken from there."""


async def join(
    cache: Cache,
    lower: Layer,
    upper: Layer,
    turn: Callable[[int], Awaitable[None]],
    changed: Callable[[int], None],
) -> Layer:
    """Have one of two layers, neighbours that nobody writes, hold what both show; the other one, which holds nothing.

    Both have to be durable. ``turn`` is called between two stretches, each of which keeps the event loop for a fraction
    of a millisecond, with the number of sectors that it has moved; ``changed`` with the number of each page of which
    something has moved, before the next await. Interrupted, it can be called again. Raises OSError.
    """
    source, target = (upper, lower) if upper.slots <= lower.slots else (lower, upper)
    for layer in (lower, upper):
        await cache.in_flight.no_writes(layer)
    for number in await source.pages.numbers():
        for start in range(0, PAGE_BLOCKS, _STRETCH):
            for layer in (lower, upper):
                await layer.pages.load([number])
            page = source.pages.page(number)
            blocks = [i for i in range(start, start + _STRETCH) if page[i] or page[i + PAGE_BLOCKS]]
            if blocks:
                before = source.sectors
                await _join(cache, lower, upper, source, target, number, blocks, changed)
                await turn(before - source.sectors)
    assert not source.slots, "a page of it was not looked at"
    assert not source.sectors, "a page of it was not looked at"
    return source


async def _join(
    cache: Cache,
    lower: Layer,
    upper: Layer,
    source: Layer,
    target: Layer,
    number: int,
    blocks: list[int],
    changed: Callable[[int], None],
) -> None:
    """The same for some blocks of one page."""
    await cache.journal_room(_DROPS)
    cache.failure.check()  # no commit bounds any more what changes
    jobs = [job for i in blocks for job in _jobs(lower, upper, number, i)]
    await copy_all(cache, jobs)
    for i in blocks:
        _hand_over(cache, lower, upper, source, target, number, i, jobs)
    changed(number)


def _entries(lower: Layer, upper: Layer, number: int, i: int) -> tuple[Entry, Entry]:
    return entry_at(lower.pages.page(number), i), entry_at(upper.pages.page(number), i)


def _parts(entry: Entry, need: int) -> Parts:
    return {slot: mask & need for slot, mask in entry.places() if mask & need}


def _jobs(lower: Layer, upper: Layer, number: int, i: int) -> list[Job]:
    """What has to be copied so that the block has no more than two slots."""
    below, above = _entries(lower, upper, number, i)
    mine, others = _parts(above, FULL), _parts(below, FULL & ~above.valid)
    jobs: list[Job] = []
    for slot in sorted(others, key=lambda one: others[one].bit_count()):
        if len(mine) + len(others) - len(jobs) <= 2:
            break
        to = max(mine, key=lambda one: mine[one].bit_count())
        jobs.append(Job(i, slot, to, others[slot]))
    return jobs


def _hand_over(
    cache: Cache,
    lower: Layer,
    upper: Layer,
    source: Layer,
    target: Layer,
    number: int,
    i: int,
    jobs: list[Job],
) -> None:
    """Have the target hold one block of both; both pages go into the same commit. A critical section: not to be split.

    ``jobs`` were done.
    """
    below, above = _entries(lower, upper, number, i)
    need = FULL & ~above.valid
    parts = _parts(above, FULL) | _parts(below, need)
    for job in jobs:
        if job.i == i:
            del parts[job.source]
            parts[job.to] |= job.mask
    (first, one), (second, two) = [*parts.items(), (NO_SLOT, 0), (NO_SLOT, 0)][:2]
    zero = above.zero & above.valid | below.zero & need
    provisioned = above.provisioned | below.provisioned & need
    made = Entry(pack(first, zero, one | two | zero), pack_second(second, two, provisioned))
    key = block_key(target.id, number * PAGE_BLOCKS + i)
    for layer, entry in ((lower, below), (upper, above)):
        layer.sectors -= entry.valid.bit_count()
        for slot, _ in entry.places():
            if slot < 0:  # it is damaged, and stays so
                continue
            if slot not in parts:
                cache.removal.free(layer, slot)
            elif layer is source:
                layer.slots -= 1
                target.slots += 1
                cache.slots.owner[slot] = key
                cache.slots.placement.adopt(
                    slot, held=True
                )  # the scan after a start may be past it
        put_entry(layer.pages.writable(number), i, made if layer is target else Entry(0))
    target.sectors += made.valid.bit_count()
