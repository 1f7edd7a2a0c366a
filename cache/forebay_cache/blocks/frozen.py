# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Reading a frozen layer in bulk, for write-back. Nothing in it changes any more, so a thread can do it.

The event loop says which blocks, where they lie and what their checksums are; the thread reads the device, compares,
and makes byte ranges of it, neighbours joined.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple, Protocol

from forebay_cache.cache import Cache
from forebay_cache.device.device import Device
from forebay_cache.format.checksum import checksums
from forebay_cache.format.entry import Entry, entry_at, valid_of
from forebay_cache.format.geometry import BLOCK, PAGE_BLOCKS, SECTOR, Buffer, sector_runs

_DATA, _ZEROS, _PROVISIONED = 0, -1, -2
"""What a range holds; zeros stand in the place of a slot as well."""

_Parts = list[tuple[int, int, int]]
"""Of one block: (first sector, count, slot)."""


class Block(NamedTuple):
    """One block of a frozen layer: its number and what its page says of it."""

    number: int
    entry: Entry

    @property
    def stored(self) -> int:
        """How many bytes of data it has; zeros count for none."""
        return self.entry.data.bit_count() * SECTOR


class Range(NamedTuple):
    """A range of a disk, in bytes, and what it holds; None: zeros."""

    offset: int
    length: int
    data: Buffer | None
    is_provisioned: bool = False
    """Of zeros: True if the image has to keep space for them."""


class LayerReader(Protocol):
    """Reads one layer alone, and checks what it reads: see read.view.View."""

    async def read(self, offset: int, length: int) -> list[Buffer]:
        """The bytes of a range. Raises OSError."""


class _Doubtful(Exception):
    """Something that was read does not have its checksum."""


def blocks_of(page: array[int], number: int) -> list[Block]:
    """The blocks of which a page of a private layer holds anything."""
    first = number * PAGE_BLOCKS
    return [Block(first + i, entry_at(page, i)) for i in range(PAGE_BLOCKS) if valid_of(page[i])]


async def read_blocks(
    cache: Cache, reader: LayerReader, blocks: list[Block], size: int
) -> list[Range]:
    """What blocks of a frozen layer hold, in order, neighbours joined; nothing beyond ``size`` bytes of the disk.

    ``reader`` reads that layer alone: it takes over where a checksum does not fit, and finds out what that means.
    Raises OSError.
    """
    parts = [_parts(block) for block in blocks]
    slots = {slot for of_block in parts for _, _, slot in of_block if slot >= 0}
    await cache.sums.load(slots)
    sums: dict[int, bytes] = {}
    for slot in slots:
        cache.sums.load_now(slot)  # unless loaded just now
        sums[slot] = cache.sums.get(slot) or b""
    token = cache.quarantine.pin()
    try:
        return await cache.threads.reads.run(_read, cache.device, blocks, parts, sums, size)
    except (_Doubtful, OSError):
        for slot in slots:
            cache.ready.masks[slot] = 0  # it is not what was checked once
        return [await _read_again(reader, *part) for part in _ranges(blocks, parts, size)]
    finally:
        cache.quarantine.unpin(token)


async def _read_again(reader: LayerReader, offset: int, length: int, kind: int) -> Range:
    data = b"".join(await reader.read(offset, length)) if kind == _DATA else None
    return Range(offset, length, data, kind == _PROVISIONED)


def _read(
    device: Device, blocks: list[Block], parts: list[_Parts], sums: dict[int, bytes], size: int
) -> list[Range]:
    """In a thread: read the blocks. Raises _Doubtful where a checksum does not fit, and OSError."""
    buffer = memoryview(bytearray(sum(block.stored for block in blocks)))
    at = 0
    for of_block in parts:
        for first, count, slot in of_block:
            if slot >= 0:
                piece = buffer[at : at + count * SECTOR]
                device.read_into(device.at(slot, first * SECTOR), [piece])
                wanted = memoryview(sums[slot]).cast("I")[first : first + count].tolist()
                if checksums(piece) != wanted:
                    raise _Doubtful
                at += count * SECTOR
    found: list[Range] = []
    at = 0
    for offset, length, kind in _ranges(blocks, parts, size):
        data = buffer[at : at + length] if kind == _DATA else None
        found.append(Range(offset, length, data, kind == _PROVISIONED))
        at += length if kind == _DATA else 0
    return found


def _parts(block: Block) -> _Parts:
    """(first sector, count, slot) of a block's data and zeros, in order; of zeros, their kind in place of a slot."""
    entry = block.entry
    (first, second), (data, side) = entry.slots, entry.sides
    zero = entry.zero & entry.valid
    provisioned = entry.provisioned & zero
    parts = [(*run, first) for run in sector_runs(data)]
    if side:
        parts += [(*run, second) for run in sector_runs(side)]
    if zero:
        parts += [(*run, _ZEROS) for run in sector_runs(zero & ~provisioned)]
        parts += [(*run, _PROVISIONED) for run in sector_runs(provisioned)]
    return sorted(parts) if side or zero else parts


def _ranges(blocks: list[Block], parts: list[_Parts], size: int) -> list[tuple[int, int, int]]:
    """(offset, length, kind) of what the blocks hold up to ``size``, in bytes, neighbours joined."""
    found: list[tuple[int, int, int]] = []
    for block, of_block in zip(blocks, parts, strict=True):
        for first, count, slot in of_block:
            offset, kind = block.number * BLOCK + first * SECTOR, min(slot, _DATA)
            length = min(count * SECTOR, size - offset)  # an image may end inside a sector
            if found and found[-1][2] == kind and found[-1][0] + found[-1][1] == offset:
                found[-1] = (found[-1][0], found[-1][1] + length, kind)
            else:
                found.append((offset, length, kind))
    return found
