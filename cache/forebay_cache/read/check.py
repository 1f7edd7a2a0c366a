# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Checking: slots are read from the device and compared with their checksums before anything of them is served."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from forebay_cache.cache import Cache
from forebay_cache.format.checksum import SIZE, UNREADABLE, checksums, matching
from forebay_cache.format.geometry import (
    BLOCK,
    BLOCK_SHIFT,
    IN_BLOCK,
    SECTOR,
    SECTORS,
    Buffer,
    covered,
)
from forebay_cache.layers.layer import Layer
from forebay_cache.read.plan import Piece
from forebay_cache.slots.placement import TOUCHED

log = logging.getLogger(__name__)


class Checked(NamedTuple):
    """What came of one piece."""

    data: Buffer | None  # None: something of it does not have its checksum
    steady: bool  # its checksum was not changed while it was read, so nobody wrote there meanwhile


async def check(cache: Cache, pieces: Sequence[Piece]) -> list[Checked]:
    """Read the slots of some pieces from the device. What fits its checksum becomes ready; what does not is so no more.

    What the device does not give in time counts as clean data that does not fit, and has failed the device. Raises
    IndexFault, and OSError where that is private data.
    """
    slots = {piece.slot for piece in pieces}
    before = {slot: cache.sums.get(slot) for slot in slots}
    token = cache.quarantine.pin()
    try:
        read = await cache.threads.reads.run(read_slots, cache, before)
    except OSError as error:
        if error.errno != errno.ETIMEDOUT or any(piece.private for piece in pieces):
            raise
        return [Checked(None, steady=True) for _ in pieces]
    finally:
        cache.quarantine.unpin(token)
    for _, found, _ in read.values():
        cache.failure.note_reading(good=any(value != UNREADABLE for value in found))
    return [_judge(cache, piece, before[piece.slot], *read[piece.slot]) for piece in pieces]


def _judge(
    cache: Cache,
    piece: Piece,
    before: bytes | None,
    data: memoryview,
    found: list[int],
    stored: bytes,
) -> Checked:
    """Compare a slot that was read with its checksums. ``before``: as they were in memory when the reading began."""
    slot, masks = piece.slot, cache.ready.masks
    now = cache.sums.get(slot) or stored
    good = matching(found, now)
    steady = now == (before or stored)
    if steady:
        masks[slot] &= good  # the rest is not what was checked once
    if cache.failure.error is None:
        masks[slot] |= good
    start = piece.offset & IN_BLOCK
    need = covered(start, piece.length)
    if good & need != need:
        return Checked(None, steady)
    cache.slots.placement.state[slot] |= TOUCHED
    return Checked(data[start : start + piece.length], steady)


def read_slots(
    cache: Cache, slots: Mapping[int, bytes | None]
) -> dict[int, tuple[memoryview, list[int], bytes]]:
    """In a thread: the content of each slot, its checksums as computed, and (u32[16]) as they are known.

    ``slots`` has what memory knows of them; the index is asked for the rest, and raises IndexFault. UNREADABLE stands
    for the checksum of a sector that cannot be read.
    """
    stored = {slot: known for slot, known in slots.items() if known is not None}
    unknown = [slot for slot, known in slots.items() if known is None]
    if unknown:
        stored |= cache.index.sums(unknown)
    found = {}
    for slot in slots:
        data = bytearray(BLOCK)
        view = memoryview(data)
        unreadable = 0
        try:
            cache.device.read_into(cache.device.at(slot), [data])
        except OSError:
            unreadable = _read_sectors(cache, slot, view)
        sums = checksums(view)
        if unreadable:
            sums = [UNREADABLE if unreadable >> s & 1 else value for s, value in enumerate(sums)]
        found[slot] = (view, sums, stored.get(slot, bytes(SIZE)))
    return found


def _read_sectors(cache: Cache, slot: int, view: memoryview) -> int:
    """Read a slot sector by sector; returns the mask of those that could not be read."""
    unreadable = 0
    for s in range(SECTORS):
        try:
            cache.device.read_into(
                cache.device.at(slot, s * SECTOR), [view[s * SECTOR : (s + 1) * SECTOR]]
            )
        except OSError:
            unreadable |= 1 << s
    return unreadable


def report_damage(cache: Cache, clean: Layer | None, bad: Iterable[Piece]) -> None:
    """Take damaged clean blocks out of the cache, so that they are fetched again.

    Raises OSError(EIO) for private data, of which there is no other copy. While the device has failed, damage to clean
    data is expected and not counted.
    """
    for piece in bad:
        block = piece.offset >> BLOCK_SHIFT
        if cache.failure.error is None or piece.private:
            cache.slots.damaged_slots += 1
            log.error(
                "cache device %s: slot %d is damaged (%s data of block %d)",
                cache.device.path,
                piece.slot,
                "private" if piece.private else "clean",
                block,
            )
        if piece.private:
            raise OSError(errno.EIO, "dirty data in the cache is damaged")
        assert clean is not None
        cache.removal.retire(clean, block, piece.slot)
