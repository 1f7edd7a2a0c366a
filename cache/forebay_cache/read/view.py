# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a disk sees: its private layers, newest first, over the clean layer of its image, over the origin.

:meth:`View.read_now` is the hot path: one page lookup in each layer, two masks, a slice of the map. It serves only
sectors that are *ready*: checked against their checksum, and believed to be in memory. Everything else goes through
:meth:`View.read`, which fetches (``fill``) and checks (``check``) what is missing, side by side.
"""

from __future__ import annotations

import errno
import resource
from array import array
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

import trio

from forebay_cache.cache import Cache
from forebay_cache.errors import NO_ANSWER, IndexFault
from forebay_cache.format.entry import ALL_ZERO, block_key, whole_private_slot, whole_slot
from forebay_cache.format.geometry import (
    BLOCK,
    BLOCK_SHIFT,
    IN_BLOCK,
    IN_PAGE,
    MASKS,
    PAGE_BLOCKS,
    PAGE_SHIFT,
    SECTOR_SHIFT,
    ZERO_BLOCK,
    Buffer,
    covered,
)
from forebay_cache.layers.layer import Layer
from forebay_cache.read.check import check, report_damage
from forebay_cache.read.plan import ORIGIN, ZEROS, Piece, plan
from forebay_cache.slots.placement import TOUCHED
from forebay_cache.slots.samples import HIT, MISS, MISSES, VISITS
from forebay_cache.turns import next_turn

Fetch = Callable[[int, int], Awaitable[Buffer]]
"""``fetch(offset, length)``: the bytes of the origin, which it also keeps in the clean layer. Raises OSError."""

HITS, READ_BYTES = 0, 1

NEVER = 1 << 63
"""An offset that no read reaches."""

_PART = 2 << 20
"""A longer range is read by parts of this size: to find where its bytes are is a slice of work for each of them."""

_ATTEMPTS = 3
"""A checksum that does not match may be a write that came in between. So often a place is read again before that counts
as damage, and as often as it takes where the checksum has changed meanwhile."""


class View:
    """One disk's way through the layers. ``clean`` None: what is in no private layer is read from the origin."""

    def __init__(
        self, cache: Cache, private: list[Layer], clean: Layer | None, fetch: Fetch
    ) -> None:
        self.cache = cache
        self.private = private
        """The private layers, newest first. The gateway replaces the list when it freezes a layer, or drops one."""
        self.clean = clean
        self.fetch = fetch
        self.misses = 0
        self.counted = array("Q", [0, 0])
        """HITS and READ_BYTES. The compiled core counts there."""
        self.lookahead = NEVER
        """Reads at or beyond this offset take the slow path, so that read-ahead can go on."""
        self._data = cache.device.data_offset
        self._state = cache.slots.placement.state
        self._samples = cache.slots.samples
        self.follow()
        cache.views.add(self)

    @property
    def hits(self) -> int:
        """Reads that needed nothing of the origin."""
        return self.counted[HITS]

    @property
    def read_bytes(self) -> int:
        """Bytes of all reads."""
        return self.counted[READ_BYTES]

    def follow(self) -> None:
        """Take the map of the device and the ready masks anew: they are other objects when it has grown."""
        self._map = self.cache.device.map
        self._ready = self.cache.ready.masks

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """Bytes of one block, if they can be had at once as one buffer; else None: then :meth:`read` has to do it.

        A slice of the map stays valid until the next await, and is for system calls only: see :meth:`read`.
        """
        start = offset & IN_BLOCK
        end = start + length
        if end > BLOCK or not length or offset >= self.lookahead:
            return None
        need = MASKS[start >> SECTOR_SHIFT][(end - 1) >> SECTOR_SHIFT]
        number = offset >> PAGE_SHIFT
        i = offset >> BLOCK_SHIFT & IN_PAGE
        try:
            for layer in self.private:
                if layer.sectors:
                    page = layer.pages.by_number[number]
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
                slot = whole_slot(clean.pages.by_number[number][i], need)
                if slot < 0 or self._ready[slot] & need != need:
                    return self._zeros_now(slot, length)
                self._state[slot] |= TOUCHED
                self._samples.note(block_key(clean.id, offset >> BLOCK_SHIFT), HIT)
        except KeyError:  # a page that is not loaded
            return None
        self.counted[HITS] += 1
        self._samples.head[VISITS] += 1
        self.counted[READ_BYTES] += length
        at = self._data + (slot << BLOCK_SHIFT) + start
        return self._map[at : at + length]

    def _zeros_now(self, slot: int, length: int) -> Buffer | None:
        """What :meth:`read_now` returns where the sectors are not ready in one ``slot``: zeros if they are that."""
        if slot != ALL_ZERO:
            return None
        self.counted[HITS] += 1
        self._samples.head[VISITS] += 1
        self.counted[READ_BYTES] += length
        return ZERO_BLOCK[:length] if length != BLOCK else ZERO_BLOCK

    async def read(self, offset: int, length: int, *, slices: bool = False) -> list[Buffer]:
        """The bytes of a range, from wherever they are, in buffers that together have its length.

        With ``slices`` buffers may be slices of the map, which stay valid until the next await, and are for system
        calls only: where the device cannot be read, whoever touches the map gets SIGBUS.

        Raises OSError: EIO for damaged private data, or what the origin answered.
        """
        self.counted[READ_BYTES] += length
        if length <= _PART:
            found, missed = await self._read(offset, length, slices=slices)
        else:
            found, missed = await self._read_parts(offset, length)
        self.misses += missed
        self.counted[HITS] += not missed
        return found

    async def _read_parts(self, offset: int, length: int) -> tuple[list[Buffer], bool]:
        """As `_read`, of a long range: by parts, side by side, each of them copied while others are waited for."""
        starts = range(offset, offset + length, _PART)
        parts: list[tuple[list[Buffer], bool]] = [([], False)] * len(starts)

        async def part(n: int) -> None:
            await next_turn()
            left = offset + length - starts[n]
            parts[n] = await self._read(starts[n], min(_PART, left), slices=False)

        await _side_by_side([partial(part, n) for n in range(len(starts))])
        return [data for found, _ in parts for data in found], any(missed for _, missed in parts)

    async def _read(self, offset: int, length: int, *, slices: bool) -> tuple[list[Buffer], bool]:
        """The buffers that `read` returns, and whether something had to come from the origin. Raises OSError."""
        attempts = 0
        is_first = True
        while attempts < 2 * _ATTEMPTS:
            pieces = await self._find(offset, length)
            if is_first:
                self._sample(pieces)
            if all(p.slot == ZEROS or self._is_ready(p) for p in pieces):
                found = self._ready_ones(pieces, slices=slices)
                if found is not None:
                    return found, False
                is_first = False
                continue
            again: list[Piece] = []
            bad: list[Piece] = []
            got = await self._collect(pieces, again, bad, looks_again=is_first)
            is_first = False
            if not again:
                return got, any(p.slot == ORIGIN for p in pieces)
            attempts += bool(bad)  # else a guest writes there, which makes it ready
            if attempts > _ATTEMPTS:
                report_damage(self.cache, self.clean, bad)
        raise OSError(errno.EIO, "the cache device gives other data at each reading")

    async def _find(self, offset: int, length: int) -> list[Piece]:
        """Where the bytes of a range come from: all that is clean from the image, where the index cannot be read.

        Raises IndexFault.
        """
        try:
            await self.load(offset, length)
            return self.plan(offset, length)
        except IndexFault:
            await self._load(self.private, offset, length)
            return plan(self.private, None, offset, length)

    async def load(self, offset: int, length: int) -> None:
        """Have the pages of a range loaded, in every layer. Raises IndexFault."""
        layers = [*self.private, *([self.clean] if self.clean else [])]
        await self._load(layers, offset, length)

    async def _load(self, layers: Iterable[Layer], offset: int, length: int) -> None:
        first, last = offset >> PAGE_SHIFT, (offset + length - 1) >> PAGE_SHIFT
        for layer in layers:
            missing = [n for n in range(first, last + 1) if n not in layer.pages]
            if missing and layer.private and not layer.sectors and not layer.slots:
                for number in missing:
                    layer.pages.adopt(number, None)
            elif missing:
                await layer.pages.load(missing)

    def plan(self, offset: int, length: int) -> list[Piece]:
        """Where the bytes of a range come from. The pages have to be loaded; see ``plan.plan``. Raises IndexFault."""
        return plan(self.private, self.clean, offset, length)

    def _sample(self, pieces: list[Piece]) -> None:
        """Count the blocks that a read comes to, and those that it misses; see ``slots.samples``."""
        clean = self.clean
        if clean is None:
            return
        found: dict[int, int] = {}
        for piece in pieces:
            block = piece.offset >> BLOCK_SHIFT
            if piece.slot == ORIGIN:
                found[block] = MISS
            elif not piece.private and piece.slot != ZEROS:
                found.setdefault(block, HIT)
        samples = self._samples
        for block, kind in found.items():
            samples.note(block_key(clean.id, block), kind)
        samples.head[VISITS] += len({piece.offset >> BLOCK_SHIFT for piece in pieces})
        samples.head[MISSES] += sum(kind == MISS for kind in found.values())

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
        """The bytes of pieces that are ready, or zeros. None if not all of them are, after all."""
        found: list[Buffer] = []
        for piece in pieces:
            got = self._slice(piece) if slices or piece.slot == ZEROS else self._copy(piece)
            if got is None:
                return None
            found.append(got)
        return found

    def _copy(self, piece: Piece) -> bytes | None:
        """A copy of a piece that is ready. None if it was not, because the device had to be read, or cannot be."""
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
        self, pieces: list[Piece], again: list[Piece], bad: list[Piece], *, looks_again: bool
    ) -> list[Buffer]:
        """Get every piece, the slow ones side by side. Raises OSError.

        ``again`` gets those that did not match their checksum, ``bad`` those of them whose checksum stayed the same;
        ``again`` also those, if it ``looks_again``, that were fetched for others before they were asked for here.
        What is ready now is copied now: it may move meanwhile.
        """
        got: list[Buffer] = [b""] * len(pieces)
        checks: list[int] = []
        misses: list[int] = []
        for n, piece in enumerate(pieces):
            if piece.slot == ORIGIN:
                misses.append(n)
            elif piece.slot == ZEROS:
                got[n] = _zeros(piece.length)
            elif self._is_ready(piece) and (data := self._copy(piece)) is not None:
                got[n] = data
            else:
                checks.append(n)

        async def check_all() -> None:
            found = await check(self.cache, [pieces[n] for n in checks])
            for n, (data, steady) in zip(checks, found, strict=True):
                if data is not None:
                    got[n] = data
                    continue
                again.append(pieces[n])
                if steady:
                    bad.append(pieces[n])

        tasks: list[Callable[[], Awaitable[None]]] = [
            partial(self._fetch_all, pieces, got, run, again if looks_again else None)
            for run in _by_block(pieces, misses)
        ]
        if checks:
            tasks.append(check_all)
        await _side_by_side(tasks)
        return got

    async def _fetch_all(
        self, pieces: list[Piece], got: list[Buffer], run: list[int], again: list[Piece] | None
    ) -> None:
        """Get the pieces of one block that the cache has not, given by their numbers. Raises OSError."""
        first, last = pieces[run[0]], pieces[run[-1]]
        ends = (first.offset, last.offset + last.length - 1)
        if again is not None and any(self._has_come(offset) for offset in ends):
            again += [pieces[n] for n in run]
            return
        try:
            data = await self.fetch(first.offset, last.offset + last.length - first.offset)
        except OSError as error:
            if len(run) == 1 or error.errno in NO_ANSWER:
                raise
            for n in run:  # what failed may lie between them, where nobody asked for it
                got[n] = await self.fetch(pieces[n].offset, pieces[n].length)
            return
        for n in run:
            start = pieces[n].offset - first.offset
            got[n] = memoryview(data)[start : start + pieces[n].length]

    def _has_come(self, offset: int) -> bool:
        """True if the clean layer has that byte: since it was looked for, a whole turn of the loop may have gone by."""
        block = offset >> BLOCK_SHIFT
        page = None if self.clean is None else self.clean.pages.look(block // PAGE_BLOCKS)
        sector = (offset & BLOCK - 1) >> SECTOR_SHIFT
        return page is not None and bool(page[block % PAGE_BLOCKS] >> sector & 1)


def _by_block(pieces: list[Piece], numbers: list[int]) -> list[list[int]]:
    """Some of the pieces, by their numbers, which are in order: those of one block together."""
    runs: list[list[int]] = []
    for n in numbers:
        block = pieces[n].offset + pieces[n].length - 1 >> BLOCK_SHIFT
        if runs and pieces[runs[-1][0]].offset >> BLOCK_SHIFT == block:
            runs[-1].append(n)
        else:
            runs.append([n])
    return runs


async def _side_by_side(tasks: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run some tasks at once. The first OSError of any of them is raised, and not in a group, when all have ended."""
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


def _read_from_disks() -> int:
    """Changes when the calling thread had to wait for a disk: what it read was not in memory."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


def _zeros(length: int) -> Buffer:
    return ZERO_BLOCK[:length] if length <= BLOCK else bytes(length)
