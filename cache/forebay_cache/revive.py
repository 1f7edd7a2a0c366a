"""A cache device that failed and works again: taken back into use without a restart.

A failed write or sync leaves unknown what of all that was written since the last good one has arrived, and a later
sync that succeeds says nothing about it: the kernel counts what it could not write as written. So everything that
changed since the last commit is written again, from what the kernel still has of it, and only what matches its
checksum. What does not: a clean block is dropped, private data stays damaged, which its readers are told.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from forebay_cache.cache import Cache
from forebay_cache.geometry import PAGE_BLOCKS, SECTOR, SECTORS, sector_runs
from forebay_cache.layer import Layer
from forebay_cache.medium import UNREADABLE, matching
from forebay_cache.scrub import held
from forebay_cache.sums import SIZE, checksums

_STORING_STEP = 0.01


@dataclass
class Revived:
    """What bringing a device back took: bytes written again, clean blocks dropped, private blocks that are damaged."""

    rewritten_bytes: int = 0
    dropped_clean: int = 0
    damaged_private: int = 0


async def revive(cache: Cache) -> Revived:
    """Use a device that has failed again. Raises OSError when it still fails: then nothing has changed.

    Where it has not failed this does nothing.
    """
    done = Revived()
    if cache.failed is not None:
        await cache.revive(lambda: _rewrite_all(cache, done))
    return done


async def _rewrite_all(cache: Cache, done: Revived) -> None:
    for slot in cache.sums.changed():
        while slot in cache.storing:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(_STORING_STEP)
        key = cache.owner[slot]
        layer = cache.layers.get(key >> 32)
        if layer is not None and not layer.dead:
            await _rewrite(cache, layer, key & 0xFFFFFFFF, slot, done)


async def _rewrite(cache: Cache, layer: Layer, block: int, slot: int, done: Revived) -> None:
    number, i = divmod(block, PAGE_BLOCKS)
    await cache.load(layer, [number])
    mask = dict(held(layer, number, i)).get(slot, 0)
    if not mask:
        return
    stored = cache.sums.get(slot) or bytes(SIZE)
    token = cache.pin()
    try:
        good = await trio.to_thread.run_sync(_write_again, cache, slot, mask, stored)
    finally:
        cache.unpin(token)
    done.rewritten_bytes += good.bit_count() * SECTOR
    bad = mask & ~good
    if not bad:
        return
    cache.damaged_slots += 1
    if layer.private:
        done.damaged_private += 1
    else:
        done.dropped_clean += 1
        cache.retire(layer, block, slot)


def _write_again(cache: Cache, slot: int, mask: int, stored: bytes) -> int:
    """In a thread: the mask of the sectors that matched. Raises OSError where the device refuses."""
    good = 0
    for first, count in sector_runs(mask):
        data = bytearray(count * SECTOR)
        try:
            cache.device.read_into(cache.device.at(slot, first * SECTOR), [data])
        except OSError:
            continue
        sums = [UNREADABLE] * SECTORS
        sums[first : first + count] = checksums(data)
        matched = matching(sums, stored) & mask
        for start, length in sector_runs(matched):
            part = memoryview(data)[(start - first) * SECTOR :][: length * SECTOR]
            cache.device.write(cache.device.at(slot, start * SECTOR), part)
        good |= matched
    return good
