"""What a disk sees: its private layers, newest first, over the clean layer of its image, over the origin.

:meth:`View.read_now` is the hot path: one page lookup in each layer, two masks, a slice of the map. It serves only
sectors that are *ready*: checked against their checksum, and believed to be in memory. Everything else goes through
:meth:`View.read`, which fetches and checks in a thread.
"""

from __future__ import annotations

import errno
import logging
import resource
from array import array
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

import trio

from forebay_cache.cache import Cache
from forebay_cache.device.device import Buffer
from forebay_cache.format.entry import ALL_ZERO, Entry, entry_at, whole_private_slot, whole_slot
from forebay_cache.format.geometry import (
    BLOCK,
    BLOCK_SHIFT,
    IN_BLOCK,
    IN_PAGE,
    MASKS,
    PAGE_BLOCKS,
    PAGE_SHIFT,
    SECTOR,
    SECTOR_SHIFT,
    SECTORS,
    ZERO_BLOCK,
    block_runs,
    covered,
)
from forebay_cache.index.sums import SIZE, checksums
from forebay_cache.layers.layer import Layer
from forebay_cache.slots.placement import TOUCHED

log = logging.getLogger(__name__)

#: fetch(offset, length) -> the bytes of the origin; it also keeps them in the clean layer
Fetch = Callable[[int, int], Awaitable[Buffer]]


class Piece(NamedTuple):
    """Where a byte range comes from: ``slot`` >= 0 in the cache, -1 nothing but zeros, -2 the origin."""

    offset: int
    length: int
    slot: int
    private: bool


ZEROS, ORIGIN = -1, -2
#: A checksum that does not match may be a write that came in between: look again so often before calling it damage,
#: and as often as it takes where the checksum has changed.
_ATTEMPTS = 3


class View:
    """One disk's way through the layers. ``private`` is ordered newest first; ``clean`` None reads the origin only."""

    def __init__(
        self, cache: Cache, private: list[Layer], clean: Layer | None, fetch: Fetch
    ) -> None:
        self.cache = cache
        self.private = private
        self.clean = clean
        self.fetch = fetch
        self.hits = 0
        self.misses = 0
        self.read_bytes = 0
        #: reads at or beyond this offset take the slow path, so that read-ahead can go on
        self.lookahead = 1 << 63
        self._data = cache.device.data_offset
        self._state = cache.placement.state
        self.follow()
        cache.views.add(self)

    def follow(self) -> None:
        """Take the cache's maps anew: they move when the device grows."""
        self._map = self.cache.device.map
        self._ready = self.cache.ready

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """A range inside one block, if it can be had at once as one buffer; else None."""
        start = offset & IN_BLOCK
        end = start + length
        if end > BLOCK or not length or offset >= self.lookahead:
            return None
        need = MASKS[start >> SECTOR_SHIFT][(end - 1) >> SECTOR_SHIFT]
        number = offset >> PAGE_SHIFT
        i = offset >> BLOCK_SHIFT & IN_PAGE
        for layer in self.private:
            if layer.sectors:
                page = layer.pages.get(number)
                if page is None:
                    if layer.missing is None:
                        return None
                    continue
                word = page[i]
                if word & need:
                    slot = whole_private_slot(word, page[PAGE_BLOCKS + i], need)
                    if slot < 0 or self._ready[slot] & need != need:
                        return self._zeros_now(slot, length)
                    break
        else:
            clean = self.clean
            if clean is None:
                return None
            try:
                slot = whole_slot(clean.pages[number][i], need)
            except KeyError:
                return None
            if slot < 0 or self._ready[slot] & need != need:
                return self._zeros_now(slot, length)
            self._state[slot] |= TOUCHED
        self.hits += 1
        self.read_bytes += length
        at = self._data + (slot << BLOCK_SHIFT) + start
        return self._map[at : at + length]

    def _zeros_now(self, slot: int, length: int) -> Buffer | None:
        """What :meth:`read_now` returns where the sectors are not ready in one ``slot``: zeros if they are that."""
        if slot != ALL_ZERO:
            return None
        self.hits += 1
        self.read_bytes += length
        return ZERO_BLOCK[:length] if length != BLOCK else ZERO_BLOCK

    async def read(self, offset: int, length: int, *, slices: bool = False) -> list[Buffer]:
        """The bytes, from wherever they are.

        With ``slices`` buffers may be slices of the map, which stay valid until the next await, and are for system
        calls only: where the device cannot be read, whoever touches the map gets SIGBUS.

        Raises OSError: EIO for damaged private data, or what the origin answered.
        """
        self.read_bytes += length
        attempts = 0
        while attempts < 2 * _ATTEMPTS:
            await self.load(offset, length)
            pieces = self.plan(offset, length)
            if all(p.slot == ZEROS or self._is_ready(p) for p in pieces):
                found = self._ready_ones(pieces, slices=slices)
                if found is not None:
                    self.hits += 1
                    return found
                continue
            again: list[Piece] = []
            bad: list[Piece] = []
            got = await self._collect(pieces, again, bad)
            if not again:
                missed = any(p.slot == ORIGIN for p in pieces)
                self.misses += missed
                self.hits += not missed
                return got
            attempts += bool(bad)  # else a guest writes there, which makes it ready
            if attempts > _ATTEMPTS:
                self._damaged(bad)
        raise OSError(errno.EIO, "the cache device gives other data at each reading")

    async def load(self, offset: int, length: int) -> None:
        """Bring the pages of a range into memory, in every layer."""
        first, last = offset >> PAGE_SHIFT, (offset + length - 1) >> PAGE_SHIFT
        for layer in [*self.private, *([self.clean] if self.clean else [])]:
            missing = [n for n in range(first, last + 1) if n not in layer.pages]
            if missing and layer.private and not layer.sectors and not layer.slots:
                for number in missing:
                    layer.adopt(number, None)
            elif missing:
                await self.cache.load(layer, missing)

    def plan(self, offset: int, length: int) -> list[Piece]:
        """Cut a range whose pages are loaded by where its bytes come from, neighbours joined."""
        pieces: list[Piece] = []
        for block, start, part in block_runs(offset, length):
            for found in self._plan_block(block, start, part):
                last = pieces[-1] if pieces else None
                if (
                    last
                    and last.slot == found.slot
                    and (found.slot < 0 or _same_block(last, found))
                ):
                    pieces[-1] = last._replace(length=last.length + found.length)
                else:
                    pieces.append(found)
        return pieces

    def _plan_block(self, block: int, start: int, length: int) -> list[Piece]:
        need = covered(start, length)
        sources: list[tuple[int, int, bool]] = []  # (mask, slot, private)
        number, i = divmod(block, PAGE_BLOCKS)
        for layer in self.private:
            if not layer.sectors:
                continue
            entry = entry_at(self.cache.page(layer, number), i)
            if entry.valid & need:
                sources += _sources(entry, need, private=True)
                need &= ~entry.valid
        if self.clean is not None and need:
            entry = entry_at(self.cache.page(self.clean, number), i)
            sources += _sources(entry, need, private=False)
            need &= ~entry.valid
        sources.append((need, ORIGIN, False))
        return _cut(block, start, length, [s for s in sources if s[0]])

    def _is_ready(self, piece: Piece) -> bool:
        if piece.slot < 0:
            return False
        mask = covered(piece.offset & IN_BLOCK, piece.length)
        return self._ready[piece.slot] & mask == mask

    def _slice(self, piece: Piece) -> Buffer:
        if piece.slot == ZEROS:
            return _zeros(piece.length)
        self._state[piece.slot] |= TOUCHED
        at = self._data + (piece.slot << BLOCK_SHIFT) + (piece.offset & IN_BLOCK)
        return self._map[at : at + piece.length]

    def _ready_ones(self, pieces: list[Piece], *, slices: bool) -> list[Buffer] | None:
        """Pieces that are ready, or zeros; None: not all of them are, after all."""
        found: list[Buffer] = []
        for piece in pieces:
            got = self._slice(piece) if slices or piece.slot == ZEROS else self._copy(piece)
            if got is None:
                return None
            found.append(got)
        return found

    def _copy(self, piece: Piece) -> bytes | None:
        """A piece that is ready, copied; None: it was not, for the device had to be read, or cannot be."""
        at = self._data + (piece.slot << BLOCK_SHIFT) + (piece.offset & IN_BLOCK)
        before = _read_from_disks()
        try:
            data = self.cache.device.read(at, piece.length)
        except OSError:
            data = None
        if data is None or _read_from_disks() != before:
            self._ready[piece.slot] &= ~covered(piece.offset & IN_BLOCK, piece.length)
            return None
        self._state[piece.slot] |= TOUCHED
        return data

    async def _collect(
        self, pieces: list[Piece], again: list[Piece], bad: list[Piece]
    ) -> list[Buffer]:
        """Get every piece, the slow ones side by side.

        ``again`` gets those that did not match their checksum, ``bad`` those of them whose checksum stayed the same.
        What is ready now is copied now: it may move meanwhile.
        """
        got: list[Buffer] = [b""] * len(pieces)
        checks: list[tuple[int, Piece]] = []
        misses: list[tuple[int, Piece]] = []
        for n, piece in enumerate(pieces):
            if piece.slot == ORIGIN:
                misses.append((n, piece))
            elif piece.slot == ZEROS:
                got[n] = _zeros(piece.length)
            elif self._is_ready(piece) and (data := self._copy(piece)) is not None:
                got[n] = data
            else:
                checks.append((n, piece))
        tasks = [partial(self._miss, n, piece, got) for n, piece in misses]
        if checks:
            tasks.append(partial(self._check, checks, got, again, bad))
        await _side_by_side(tasks)
        return got

    async def _miss(self, n: int, piece: Piece, got: list[Buffer]) -> None:
        got[n] = await self.fetch(piece.offset, piece.length)

    async def _check(
        self,
        checks: list[tuple[int, Piece]],
        got: list[Buffer],
        again: list[Piece],
        bad: list[Piece],
    ) -> None:
        """Read whole slots from the device, and serve from them what matches its checksum."""
        cache = self.cache
        slots = {piece.slot for _, piece in checks}
        before = {slot: cache.sums.get(slot) for slot in slots}
        token = cache.pin()
        try:
            read = await trio.to_thread.run_sync(read_slots, cache, slots)
        finally:
            cache.unpin(token)
        for _, found, _ in read.values():
            cache.note_reading(good=any(value != -1 for value in found))
        for n, piece in checks:
            data, found, stored = read[piece.slot]
            now = cache.sums.get(piece.slot) or stored
            good = matching(found, now)
            start = piece.offset & IN_BLOCK
            need = covered(start, piece.length)
            if now == (before[piece.slot] or stored):
                self._ready[piece.slot] &= good  # the rest is not what was checked once
            if not cache.failed:
                self._ready[piece.slot] |= good
            if good & need == need:
                self._state[piece.slot] |= TOUCHED
                got[n] = data[start : start + piece.length]
                continue
            again.append(piece)
            if now == (before[piece.slot] or stored):
                bad.append(piece)

    def _damaged(self, bad: list[Piece]) -> None:
        """Give damaged clean blocks up; they are fetched again. Raises OSError(EIO) for private data."""
        cache = self.cache
        for piece in bad:
            block = piece.offset >> BLOCK_SHIFT
            if cache.failed is not None and not piece.private:
                assert self.clean is not None
                cache.retire(self.clean, block, piece.slot)
                continue
            cache.damaged_slots += 1
            log.error(
                "cache device %s: slot %d is damaged (%s data of block %d)",
                cache.device.path,
                piece.slot,
                "private" if piece.private else "clean",
                block,
            )
            if piece.private:
                raise OSError(errno.EIO, "dirty data in the cache is damaged")
            assert self.clean is not None
            cache.retire(self.clean, block, piece.slot)


async def _side_by_side(tasks: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run the tasks at once; the first OSError of any of them is raised, bare."""
    if len(tasks) == 1:
        await tasks[0]()
        return
    errors: list[OSError] = []

    async def one(task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except OSError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(one, task)
    if errors:
        raise errors[0]


def read_slots(cache: Cache, slots: set[int]) -> dict[int, tuple[memoryview, list[int], bytes]]:
    """In a thread: content, checksums as computed and (u32[16]) as stored, of each slot."""
    stored = cache.index.sums(slots)
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
            sums = [-1 if unreadable >> s & 1 else value for s, value in enumerate(sums)]
        found[slot] = (view, sums, stored.get(slot, bytes(SIZE)))
    return found


def matching(sums: list[int], stored: bytes) -> int:
    """Mask of the sectors whose checksum is the one that is stored."""
    return sum(1 << s for s, value in enumerate(array("I", stored)) if sums[s] == value)


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


def _read_from_disks() -> int:
    """Changes when the calling thread had to wait for a disk: what it read was not in memory."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


def _same_block(a: Piece, b: Piece) -> bool:
    return a.offset >> BLOCK_SHIFT == b.offset >> BLOCK_SHIFT


def _zeros(length: int) -> Buffer:
    return ZERO_BLOCK[:length] if length <= BLOCK else bytes(length)


def _sources(entry: Entry, need: int, *, private: bool) -> list[tuple[int, int, bool]]:
    """Which of the sectors ``need`` an entry has: (mask, slot or ZEROS, private)."""
    (first, second), (data, side) = entry.slots, entry.sides
    return [
        (entry.zero & entry.valid & need, ZEROS, private),
        (side & need, second, private),
        (data & need, first, private),
    ]


def _cut(block: int, start: int, length: int, sources: list[tuple[int, int, bool]]) -> list[Piece]:
    """Pieces of one block, in order, from disjoint masks that together cover the range."""
    if len(sources) == 1:
        _, slot, private = sources[0]
        return [Piece((block << BLOCK_SHIFT) + start, length, slot, private)]
    pieces: list[Piece] = []
    at, end = start, start + length
    while at < end:
        sector = at >> SECTOR_SHIFT
        slot, private = next((s, p) for mask, s, p in sources if mask >> sector & 1)
        stop = min(end, (sector + 1) << SECTOR_SHIFT)
        last = pieces[-1] if pieces else None
        if last and last.slot == slot:
            pieces[-1] = last._replace(length=last.length + stop - at)
        else:
            pieces.append(Piece((block << BLOCK_SHIFT) + at, stop - at, slot, private))
        at = stop
    return pieces
