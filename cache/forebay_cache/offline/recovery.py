"""Opening a cache: match device and index, replay the intent journal, find out which slots are free.

A record of the journal is a claim. For each sector the newest claim whose data matches its checksum is taken, down to
what the index says. Same boot id as the last run: the kernel still has every page that was written, so the newest claim
holds, or the one before where the daemon was killed between a record and its data; anything else is damage, and is
kept as such. Another boot id: the machine went down. Everything that was flushed is there, whole; of what was not,
data may be missing or torn; and clean blocks of hot regions are dropped, because nobody knows which of the writes to
their origin arrived.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import struct
import uuid
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from forebay_cache.cache import Cache, boot_id
from forebay_cache.device.device import (
    Device,
    Superblock,
    format_was_cut,
    is_blank,
    open_device,
    read_superblock,
    size_of,
    write_format,
)
from forebay_cache.durable.journal import Journal, Position
from forebay_cache.errors import CacheError
from forebay_cache.format import ops
from forebay_cache.format.entry import (
    NO_SLOT,
    Entry,
    block_key,
    entry_at,
    pack,
    pack_second,
    put_entry,
    side_of,
    slot_of,
    slots_in,
    valid_of,
    zero_of,
)
from forebay_cache.format.geometry import FULL, PAGE_BLOCKS, SECTOR, SECTORS
from forebay_cache.index.index import PAGE_KEY, Index, LayerRecord, create
from forebay_cache.index.sums import checksum
from forebay_cache.layers.layer import Layer
from forebay_cache.slots.placement import TOUCHED, UNSCANNED, Placement

log = logging.getLogger(__name__)

#: No claim of the journal holds for a sector.
OLDER = (-1, -1, -1)

DEFAULT_SIZE = 20 << 30
#: Up to here the scan for free slots (0.25 s for a million) is done before the cache is open; above, behind its back.
SCAN_AT_ONCE = 1 << 18
#: The memory that reading the index takes is given back after so many pieces of it: 32 MB.
SCAN_ROUNDS = 64
#: After a replay sequence numbers go on from here on, so that frames behind a torn one are never taken for new ones.
SEQUENCE_GAP = 1 << 20


def open_cache(
    device: Path,
    index: Path,
    *,
    size: int | None = None,
    block_size: int = 65536,
    boot: str | None = None,
) -> Cache:
    """Open, create or recover a cache.

    ``size`` (bytes) is for a device that is a file and does not exist yet. ``boot`` stands for the kernel's boot id.
    Raises :class:`CacheError` when that is not possible without losing something: the text says what to do.
    """
    if block_size != 65536:
        raise CacheError(f"block_size {block_size} is not supported: 64 KiB is the only one yet")
    index.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        fd = open_device(device, create_size=size or DEFAULT_SIZE)
        undo.callback(os.close, fd)
        undo.callback(fcntl.flock, fd, fcntl.LOCK_UN)  # a map has a duplicate of the descriptor
        layout = _layout(fd, device, index)
        try:
            opened = Index(index, layout.slots if layout else size_of(fd) // 65536)
            undo.callback(opened.close)
            found = Device(fd, device, _match(fd, device, layout, opened))
            cache = _start(found, opened, boot or boot_id())
        except (ValueError, TypeError, LookupError, struct.error) as fault:
            raise CacheError(
                f"{device}: what it or its index says makes no sense ({fault}): see 'forebay cache check'"
            ) from fault
        undo.pop_all()
        return cache


def _layout(fd: int, device: Path, index: Path) -> Superblock | None:
    """What the superblock says, if there is one. Raises CacheError where that cannot be gone on with."""
    try:
        layout = read_superblock(fd, device)
    except CacheError:
        if not index.exists():
            raise
        return None  # the index knows whether the format was cut short
    if layout is not None and size_of(fd) < layout.size:
        raise CacheError(
            f"{device}: {size_of(fd)} bytes, but the cache on it has {layout.size}: it was made smaller; "
            f"give it its size back, or drop the cache with 'forebay cache format --force'"
        )
    if layout is not None and not index.exists():
        raise CacheError(
            f"{device}: holds a cache whose index is not at {index}; point 'state' to it, or drop what the "
            "cache holds with 'forebay cache format --force'"
        )
    return layout


def _match(fd: int, path: Path, layout: Superblock | None, index: Index) -> Superblock:
    """Device and index belong together, or the device is blank and the index has never been used.

    As good as blank is one whose format a power cut interrupted.
    """
    ident = uuid.UUID(index.meta.uuid)
    if layout is None:
        cut_short = index.meta.fresh and format_was_cut(fd, ident)
        if not cut_short and not is_blank(fd):
            read_superblock(fd, path)  # it has its own words for one that is damaged
            raise CacheError(
                f"{path}: holds something that is not a Forebay cache; choose another device, or overwrite it "
                "with 'forebay cache format --force'"
            )
        if not index.meta.fresh:
            raise CacheError(
                f"{path}: is blank, but the index at {index.path} describes a cache; bring back the device "
                f"{index.meta.uuid}, or start over with 'forebay cache format --force'"
            )
        return write_format(fd, path, ident)
    if layout.uuid != ident:
        raise CacheError(
            f"{path}: is cache {layout.uuid}, but the index at {index.path} belongs to {ident}; correct "
            "'device' or 'state', or drop what it holds with 'forebay cache format --force'"
        )
    return layout


def _start(device: Device, index: Index, boot: str) -> Cache:
    meta = index.meta
    journal = Journal(device, Position(meta.journal_offset, meta.journal_sequence))
    known = index.layers()
    replay = _Replay(index, known)
    for payload in journal.replay():
        replay.take(ops.unpack(payload))
    device.read_nothing_ahead()
    survived = meta.boot_id == boot
    frontier = max(meta.frontier, replay.frontier)
    placement = Placement(device.slots, frontier=frontier)
    cache = Cache(device, index, journal, placement)
    meta.frontier = frontier
    meta.next_layer = max(meta.next_layer, *(x + 1 for x in replay.known), 1)
    cache.adopt_records(index.records())
    for ident, record in replay.known.items():
        layer = Layer(ident, record)
        layer.changed = ident in replay.made
        cache.register(layer)
    replay.apply(cache, survived=survived)
    known_hot = set(index.hot()) | replay.hot
    alive = {ident for ident, x in cache.layers.items() if not x.dead}
    hot = {region for region in known_hot if region[0] in alive}
    if survived:
        cache.hot = hot
    else:
        _drop_hot(cache, hot)
    cache.adopt_hot(known_hot - hot, keep=False)
    cache.adopt_hot(hot, keep=survived)
    _commit_start(cache, boot)
    if frontier <= SCAN_AT_ONCE:
        scan_now(cache)
    else:
        cache.scan = partial(scan_slowly, cache)
    return cache


def _commit_start(cache: Cache, boot: str) -> None:
    """Make what was recovered durable before anything new: the device's data first, as always."""
    head = cache.journal.head
    cache.journal.head = Position(head.offset, head.sequence + SEQUENCE_GAP)
    cache.meta.boot_id = boot
    cache.meta.clean = False
    cache.meta.fresh = False
    changes, succeeded, _ = cache.snapshot()
    cache.device.sync()
    cache.index.commit_now(changes)
    succeeded()


@dataclass
class _Block:
    """What the journal claims of one private block."""

    slots: list[int] = field(default_factory=lambda: [-1, -1])
    #: per sector: (side, slot, crc), or None for zeros, oldest first
    claims: dict[int, list[tuple[int, int, int] | None]] = field(default_factory=dict)
    replaced: bool = (
        False  # zeroed as a whole at some time: what the index says of it no longer counts
    )
    #: sectors that the last frame names: killed behind it, their data may not have been written, nor answered for
    last: int = 0


class _Replay:
    """Collects the records of the journal, then applies them to the layers."""

    def __init__(self, index: Index, known: dict[int, LayerRecord]) -> None:
        self.index = index
        self.known = known
        self.made: set[int] = set()
        self.hot: set[tuple[int, int]] = set()
        self.frontier = 0
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._last: list[_Block] = []
        self._drops: dict[tuple[int, int], int] = {}
        self.records = 0

    def take(self, records: Iterable[ops.Op]) -> None:
        """The records of the next frame."""
        for block in self._last:
            block.last = 0
        self._last.clear()
        for op in records:
            self.records += 1
            if op.kind == ops.LAYER:
                if op.layer not in self.known:
                    self.known[op.layer] = LayerRecord(op.name, bool(op.side))
                    self.made.add(op.layer)
            elif op.kind == ops.HOT:
                self.hot.add((op.layer, op.a))
            elif op.kind == ops.DROP:
                key = (op.layer, op.a)
                self._drops[key] = self._drops.get(key, 0) | op.mask
            else:
                self._private(op)

    def _private(self, op: ops.Op) -> None:
        block = self._blocks.setdefault((op.layer, op.a), _Block())
        if op.kind == ops.ZERO:
            if op.mask == FULL:
                block.slots = [-1, -1]
                block.replaced = True
            for sector in _bits(op.mask):
                block.claims.setdefault(sector, []).append(None)
            return
        block.slots[op.side] = op.b
        block.last |= op.mask
        self._last.append(block)
        self.frontier = max(self.frontier, op.b + 1)
        for sector, crc in zip(_bits(op.mask), op.crcs, strict=True):
            block.claims.setdefault(sector, []).append((op.side, op.b, crc))

    def apply(self, cache: Cache, *, survived: bool) -> None:
        for (ident, block), mask in self._drops.items():
            layer = cache.layers.get(ident)
            if layer is not None:
                _drop_sectors(cache, layer, block, mask)
        for (ident, block), claimed in self._blocks.items():
            layer = cache.layers.get(ident)
            if layer is not None and not layer.dead:
                _apply_block(cache, layer, block, claimed, survived=survived)
        if self.records:
            log.info(
                "recovered %d journal records%s",
                self.records,
                "" if survived else " after a power loss",
            )


def _bits(mask: int) -> list[int]:
    return [s for s in range(SECTORS) if mask >> s & 1]


def _load(cache: Cache, layer: Layer, number: int) -> array[int]:
    if number not in layer.pages:
        layer.adopt(number, cache.index.page(layer.id, number))
    return layer.writable(number)


def _drop_sectors(cache: Cache, layer: Layer, block: int, mask: int) -> None:
    number, i = divmod(block, PAGE_BLOCKS)
    if number not in layer.pages:
        layer.adopt(number, cache.index.page(layer.id, number))
    word = layer.pages[number][i]
    hit = word & mask
    if not hit:
        return
    page = layer.writable(number)
    layer.sectors -= hit.bit_count()
    slot, valid, zero = slot_of(word), valid_of(word) & ~mask, zero_of(word) & ~mask
    if slot >= 0 and not valid & ~zero:
        layer.slots -= 1
        slot = NO_SLOT
    page[i] = pack(slot, zero, valid)


def _apply_block(
    cache: Cache, layer: Layer, block: int, claimed: _Block, *, survived: bool
) -> None:
    number, i = divmod(block, PAGE_BLOCKS)
    page = _load(cache, layer, number)
    before = entry_at(page, i)
    entry = Entry(0) if claimed.replaced else before
    slots = [new if new >= 0 else old for new, old in zip(claimed.slots, entry.slots, strict=True)]
    valid, zero, side = entry.valid, entry.zero, side_of(entry.second)
    for sector, claims in claimed.claims.items():
        bit = 1 << sector
        chosen = _choose(cache, sector, claims)
        answered = not claimed.last & bit
        if chosen == OLDER and survived and not _fits(cache, sector, before, answered):
            chosen = claims[-1]  # damaged: whoever reads it shall hear of it
        if chosen == OLDER:
            continue
        valid |= bit
        if chosen is None:
            zero |= bit
        else:
            zero &= ~bit
            side = side | bit if chosen[0] else side & ~bit
            _set_sum(cache, chosen[1], sector, chosen[2])
    data = valid & ~zero
    used = [bool(data & ~side), bool(data & side)]
    final = [slot if use else -1 for slot, use in zip(slots, used, strict=True)]
    layer.slots += sum(s >= 0 for s in final) - sum(s >= 0 for s in before.slots)
    layer.sectors += valid.bit_count() - before.valid.bit_count()
    put_entry(page, i, Entry(pack(final[0], zero, valid), pack_second(final[1], side)))


def _choose(
    cache: Cache, sector: int, claims: list[tuple[int, int, int] | None]
) -> tuple[int, int, int] | None:
    """The newest claim that holds; OLDER when none does and the index has the last word."""
    for claim in reversed(claims):
        if claim is None or _crc_at(cache, claim[1], sector) == claim[2]:
            return claim
    return OLDER


def _crc_at(cache: Cache, slot: int, sector: int) -> int:
    """Checksum of what lies on the device; -1 when it cannot be read."""
    data = bytearray(SECTOR)
    try:
        cache.device.read_into(cache.device.at(slot, sector * SECTOR), [data])
    except OSError:
        return -1
    return checksum(data)


def _fits(cache: Cache, sector: int, entry: Entry, answered: bool) -> bool:
    """Whether what the index says of a sector of a private block holds.

    Nothing, or zeros, was true only before the first claim: not where that was ``answered``.
    """
    if not entry.data >> sector & 1:
        return not answered
    slot = entry.slots[entry.side >> sector & 1]
    stored = cache.index.sums([slot]).get(slot, bytes(4 * SECTORS))
    return _crc_at(cache, slot, sector) == array("I", stored)[sector]


def _set_sum(cache: Cache, slot: int, sector: int, crc: int) -> None:
    cache.load_sums_now(slot)
    cache.sums.change(slot)
    cache.sums.values[slot * SECTORS + sector] = crc


def _drop_hot(cache: Cache, regions: set[tuple[int, int]]) -> None:
    """Drop the clean blocks of regions whose origin was being written when the machine went down."""
    for ident, region in regions:
        layer = cache.layers.get(ident)
        if layer is None or layer.private:
            continue
        for block in range(region * PAGE_BLOCKS, (region + 1) * PAGE_BLOCKS):
            _drop_sectors(cache, layer, block, FULL)


def scan_now(cache: Cache) -> None:
    """Tell the placement which slots are occupied: that is stored nowhere else, so it cannot disagree."""
    key = b""
    while found := cache.index.all_pages(key, 512):
        _adopt(cache, found)
        key = found[-1][0] + b"\0"
    cache.placement.scanned()


async def scan_slowly(cache: Cache) -> None:
    """The same for a large index while guests are served: read in a thread, adopted in slices of half a millisecond."""
    key = b""
    rounds = 0
    while found := await trio.to_thread.run_sync(cache.index.all_pages, key, 512):
        rounds += 1
        if rounds % SCAN_ROUNDS == 0:
            cache.index.give_back()
        for n in range(0, len(found), 16):
            _adopt(cache, found[n : n + 16])
            await trio.lowlevel.checkpoint()
        key = found[-1][0] + b"\0"
    cache.index.give_back()
    cache.placement.scanned()


def _adopt(cache: Cache, found: list[tuple[bytes, bytes]]) -> None:
    placement, owner, state = cache.placement, cache.owner, cache.placement.state
    for key, raw in found:
        ident, number = PAGE_KEY.unpack(key)
        layer = cache.layers.get(ident)
        held = layer is not None and layer.held
        first = block_key(ident, number * PAGE_BLOCKS)
        for i, slot in slots_in(raw):
            # What is known by now is newer than what the index said when it was read.
            if state[slot] & ~TOUCHED == UNSCANNED:
                owner[slot] = first + i
                placement.adopt(slot, held=held)


def format_device(
    path: Path,
    index: Path,
    *,
    size: int | None = None,
    force: bool = False,
    ident: uuid.UUID | None = None,
) -> None:
    """Make an empty cache, device and index, with that uuid or one of its own.

    Raises :class:`CacheError` when something would be lost, unless forced.
    """
    fd = open_device(path, create_size=size or DEFAULT_SIZE)
    try:
        if not force:
            _refuse_loss(fd, path, index)
        shutil.rmtree(index, ignore_errors=True)
        create(index, ident)
        fresh = Index(index, size_of(fd) // 65536)
        ident = uuid.UUID(fresh.meta.uuid)
        fresh.close()
        write_format(fd, path, ident)
    finally:
        os.close(fd)


def _refuse_loss(fd: int, path: Path, index: Path) -> None:
    if not is_blank(fd):
        what = "a Forebay cache" if read_superblock(fd, path) else "data that is not Forebay's"
        raise CacheError(f"{path}: holds {what}; use --force to overwrite it")
    if index.exists() and not _is_fresh(index):
        raise CacheError(f"{index}: an index that is in use; use --force to drop it")


def _is_fresh(index: Path) -> bool:
    opened = Index(index, 0)
    opened.close()
    return opened.meta.fresh
