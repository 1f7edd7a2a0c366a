# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A cache device that failed and works again: taken back into use without a restart.

A failed write or sync leaves unknown what of all that was written since the last good one has arrived, and a later
sync that succeeds says nothing about it: the kernel counts what it could not write as written. So everything that
changed since the last commit is written again, from what the kernel still has of it, and only what matches its
checksum. What does not: a clean block is dropped, private data stays damaged, which its readers are told.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from functools import partial

import trio

from forebay_cache.cache import Cache
from forebay_cache.device.device import Device
from forebay_cache.device.files import open_device, size_of
from forebay_cache.device.superblock import read_superblock, write_copy
from forebay_cache.errors import CacheError
from forebay_cache.format.checksum import SIZE, UNREADABLE, checksums, matching
from forebay_cache.format.entry import block_of_key, layer_of_key
from forebay_cache.format.geometry import PAGE_BLOCKS, SECTOR, SECTORS, sector_runs
from forebay_cache.layers.layer import Layer
from forebay_cache.upkeep.scrub import held

log = logging.getLogger(__name__)

AGAIN_SECONDS = 5.0
"""How soon a device that failed is tried again; doubled each time ..."""
AGAIN_MOST = 60.0
"""... up to so many seconds."""
_STORING_STEP = 0.01


@dataclass
class Revived:
    """What bringing a device back took: bytes written again, clean blocks dropped, private blocks that are damaged."""

    rewritten_bytes: int = 0
    dropped_clean: int = 0
    damaged_private: int = 0


async def revive(cache: Cache) -> Revived:
    """Take a device that has failed back into use. Where it has not failed this does nothing.

    Raises OSError when it still fails, and CacheError when another one is in its place: then nothing has changed.
    """
    done = Revived()

    async def rewrite() -> None:
        if cache.failure.error is not None:
            await _find(cache)
            await _rewrite_all(cache, done)
        cache.invalidations.revoke()  # no await from here to the snapshot

    if cache.failure.error is not None:
        if cache.threads.lost or cache.sync.hangs:  # it may write at any time, over what is newer
            raise OSError(errno.ETIMEDOUT, "it has not answered yet")
        if not await trio.to_thread.run_sync(cache.index.place.is_kept):
            raise CacheError(f"the index at {cache.index.path} is not the one that was there")
        await cache.commit.revive(rewrite)
    return done


async def come_back(cache: Cache) -> None:
    """Each time the device has failed, try now and then to take it back into use. Runs until cancelled."""
    pause, back_at = AGAIN_SECONDS, -AGAIN_MOST
    while True:
        await cache.failure.broke.wait()
        if trio.current_time() - back_at > AGAIN_MOST:
            pause = AGAIN_SECONDS
        await trio.sleep(pause)
        pause = min(2 * pause, AGAIN_MOST)
        try:
            done = await revive(cache)
        except (OSError, CacheError) as error:
            log.info("cache device %s still fails: %s", cache.device.path, error)
            continue
        back_at = trio.current_time()
        log.warning("cache device %s works again", cache.device.path)
        if done.damaged_private:
            log.error("%d blocks that only it has are damaged", done.damaged_private)


async def _find(cache: Cache) -> None:
    """See that the device takes a write, and have it under its descriptor again if it was away.

    Raises OSError and CacheError.
    """
    device = cache.device
    if await cache.threads.writes.run(_found, device):
        device.adopt(device.layout)
        device.read_nothing_ahead()
        cache.follow()


def _found(device: Device) -> bool:
    """In a thread. True if the name leads to another file now, with the same cache on it: the descriptor is that one's.

    Raises OSError and CacheError.
    """
    named = os.stat(device.path)
    try:
        ours = os.fstat(device.fd)
    except OSError:  # its file system is gone
        ours = None
    if ours and (named.st_dev, named.st_ino, named.st_rdev) == (
        ours.st_dev,
        ours.st_ino,
        ours.st_rdev,
    ):
        _try(device.fd, device)
        return False
    fd = open_device(device.path)
    try:
        _try(fd, device)
        os.dup2(fd, device.fd, inheritable=False)
    finally:
        os.close(fd)
    return True


def _try(fd: int, device: Device) -> None:
    """In a thread: raise OSError or CacheError unless the cache is there and takes a write."""
    if read_superblock(fd, device.path) != device.layout:
        raise CacheError(f"{device.path}: is not the cache that was there: bring that back")
    if size_of(fd) < device.layout.size:
        raise CacheError(
            f"{device.path}: was cut: it has {size_of(fd)} bytes, and had {device.layout.size}"
        )
    write_copy(fd, device.layout)


async def _rewrite_all(cache: Cache, done: Revived) -> None:
    """Write everything again that was written since the last commit, and count in ``done`` what came of it."""
    for slot in await cache.sums.changed():
        while slot in cache.in_flight.storing:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(_STORING_STEP)
        key = cache.slots.owner[slot]
        layer = cache.layers.get(layer_of_key(key))
        if layer is not None and not layer.is_dead:
            await _rewrite(cache, layer, block_of_key(key), slot, done)


async def _rewrite(cache: Cache, layer: Layer, block: int, slot: int, done: Revived) -> None:
    number, i = divmod(block, PAGE_BLOCKS)
    await layer.pages.load([number])
    mask = dict(held(layer, number, i)).get(slot, 0)
    if not mask:
        return
    stored = cache.sums.get(slot) or bytes(SIZE)
    token = cache.quarantine.pin()
    try:
        good = await cache.threads.writes.run(_write_again, cache, slot, mask, stored)
    finally:
        cache.threads.writes.when_ended(partial(cache.quarantine.unpin, token))
    done.rewritten_bytes += good.bit_count() * SECTOR
    bad = mask & ~good
    if not bad:
        return
    cache.slots.damaged_slots += 1
    if layer.private:
        done.damaged_private += 1
    else:
        done.dropped_clean += 1
        cache.removal.retire(layer, block, slot)


def _write_again(cache: Cache, slot: int, mask: int, stored: bytes) -> int:
    """In a thread: write the sectors ``mask`` of a slot that match their checksums ``stored``. Returns their mask.

    Raises OSError where the device refuses.
    """
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
