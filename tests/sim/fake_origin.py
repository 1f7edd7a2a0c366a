# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image that lives nowhere: what is durable, what is not yet, and what fails on command.

The fault model. A write lands in pieces, in order, some time between its call and its return; other calls see what
has landed. It is durable once a flush that began after the write returned has returned. A power cut of the origin's
host leaves what is durable and any subset, by 512 bytes, of the rest. A flush that fails may (``lose``) have thrown
the data away as kernels do: it is read back until the power goes, and no later flush makes it durable or says so.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import trio

from forebay.image.use import Use
from forebay.origin.protocol import Identity
from forebay.sidecar.applying import Before, Place
from forebay_cache.blocks.frozen import Range
from sim.fake_loop import Dice

SECTOR = 4096
Buffer = bytes | bytearray | memoryview


@dataclass
class Piece:
    """Something that landed and is not durable. ``returned``: its write has been answered."""

    offset: int
    data: bytes
    returned: bool = False

    def overlaps(self, other: "Piece") -> bool:
        return self.offset < other.offset + len(other.data) and other.offset < self.offset + len(
            self.data
        )


class FakeOrigin:
    """Implements forebay.origin.protocol.Origin. ``scale`` stretches its latencies."""

    read_only = False
    label = "fake"
    timeout = 5.0

    def __init__(self, dice: Dice, content: bytes, scale: float = 4.0) -> None:
        self.dice = dice
        self.scale = scale
        self.size = len(content)
        self.visible = bytearray(content)
        self.durable = bytearray(content)
        self.pending: list[Piece] = []
        self.lost: list[Piece] = []
        self.inode = 1
        #: whether space can be given back, and what is known of that
        self.punchable = True
        self.punches: bool | None = None
        self.changes = 0
        self.durable_changes = 0  # what its times say after a power cut of its host
        self.written = 0
        self.sync_failures = 0
        #: how many of the next calls fail, by method; -1: all
        self.faults: dict[str, int] = {}
        self.lose = False
        #: the committed redo journal beside the image, if there is one
        self.journal: list[tuple[int, bytes]] | None = None
        #: what the image held at the first instant and at each checkpoint that was committed
        self.instants: list[bytes] = [bytes(content)]
        self.allocated = bytearray(
            content[at : at + SECTOR].count(0) < SECTOR or dice.random.random() < 0.5
            for at in range(0, self.size, SECTOR)
        )

    # -- faults -----------------------------------------------------------------------------------------------

    def heal(self) -> None:
        self.faults.clear()

    def _fault(self, call: str) -> None:
        left = self.faults.get(call, 0)
        if left:
            self.faults[call] = left - 1
            if not self.faults[call]:
                del self.faults[call]
            raise OSError(errno.EIO, f"injected: {call}")

    # -- Origin -----------------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int, background: bool | trio.Event = False) -> Buffer:
        self._check(offset, length)
        await self.dice.pause(self.scale)
        self._fault("read")
        data = bytes(self.visible[offset : offset + length])
        await self.dice.pause(self.scale)
        return data

    async def write(self, offset: int, data: Sequence[Buffer], background: bool = False) -> None:
        whole = b"".join(
            data
        )  # before anything else: slices of the map may change at the next await
        self._check(offset, len(whole))
        await self._change(offset, whole, "write", allocate=True)

    async def write_ranges(
        self, ranges: Sequence[tuple[int, Buffer]], background: bool = False
    ) -> None:
        for offset, data in ranges:
            await self.write(offset, [data], background)

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        self._check(offset, length)
        await self._change(offset, bytes(length), "zero", allocate=self._space(may_trim))

    async def ask_punches(self) -> bool:
        await self.dice.pause(self.scale)
        self._fault("punch")
        self.punches = self.punchable
        self.changes += 1
        return self.punches

    async def trim(self, offset: int, length: int) -> None:
        self._check(offset, length)
        await self._change(offset, bytes(length), "zero", allocate=self._space(may_trim=True))

    def _space(self, may_trim: bool) -> bool | None:
        """What becomes of the space of zeros: True if all of them get some, None if they keep what they have."""
        return not may_trim if self.punchable or not may_trim else None

    async def flush(self, *, times: bool = False) -> None:
        changes = self.changes
        covered = [piece for piece in self.pending if piece.returned]
        await self.dice.pause(self.scale)
        try:
            self._fault("flush")
            if (
                not times and "flush of data" in self.faults
            ):  # as after a pass has written the image
                self._fault("flush of data")
        except OSError:
            self.sync_failures += 1
            if self.lose:
                self.lost += covered
                self._forget(covered)
            raise
        self._harden(covered)
        if times:
            self.durable_changes = changes
        await self.dice.pause(self.scale)

    async def extents(
        self, offset: int, length: int, background: bool | trio.Event = False
    ) -> list[tuple[int, int]]:
        self._check(offset, length)
        await self.dice.pause(self.scale)
        self._fault("extents")
        found: list[tuple[int, int]] = []
        at = offset
        while at < offset + length:
            stop = min(offset + length, (at // SECTOR + 1) * SECTOR)
            flags = 0 if self.allocated[at // SECTOR] else 3
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + stop - at, flags)
            else:
                found.append((stop - at, flags))
            at = stop
        return found

    def recover(self) -> None:
        """What `forebay recover`, or the next owner, does with a committed journal."""
        for offset, data in self.journal or ():
            self.visible[offset : offset + len(data)] = data
            self.durable[offset : offset + len(data)] = data
            for sector in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)):
                self.allocated[sector] = 1
        self.changes += self.journal is not None
        self.durable_changes = self.changes
        self.journal = None

    async def identity(self) -> Identity:
        await self.dice.pause(self.scale)
        self._fault("identity")
        return Identity(self.size, mtime_ns=self.changes, ctime_ns=self.changes, inode=self.inode)

    async def is_dead(self) -> bool:
        return False

    async def forget(self) -> None:
        pass

    async def quiesce(self) -> None:
        pass

    async def close(self) -> None:
        pass

    # -- the medium -------------------------------------------------------------------------------------------

    def _check(self, offset: int, length: int) -> None:
        assert 0 <= offset < offset + length <= self.size, (offset, length, self.size)

    async def _change(self, offset: int, data: bytes, call: str, *, allocate: bool | None) -> None:
        await self.dice.pause(self.scale)
        random = self.dice.random
        pieces: list[Piece] = []
        cuts = sorted(
            random.randrange(0, len(data) + 1) // 512 * 512
            for _ in range(random.choice((0, 0, 1, 2)))
        )
        try:
            for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
                if random.random() < 0.5:  # before the last piece has landed, or any
                    self._fault(call)
                if start < stop:
                    pieces.append(self._land(offset + start, data[start:stop], allocate=allocate))
                if cuts:
                    await self.dice.pause(self.scale)
            self._fault(call)
            await self.dice.pause(self.scale)
        finally:
            for piece in pieces:
                piece.returned = True
        self.written += len(data)

    def _land(self, offset: int, data: bytes, *, allocate: bool | None) -> Piece:
        self.visible[offset : offset + len(data)] = data
        end = offset + len(data)
        for sector in range(offset // SECTOR, -(-end // SECTOR)):
            whole = offset <= sector * SECTOR and min((sector + 1) * SECTOR, self.size) <= end
            if allocate:
                self.allocated[sector] = 1
            elif whole and allocate is False:
                self.allocated[sector] = 0
        self.changes += 1
        piece = Piece(offset, data)
        self.pending.append(piece)
        return piece

    def _harden(self, covered: list[Piece]) -> None:
        for n, piece in enumerate(self.pending):
            # What is older than something durable in the same place can never come back.
            if any(piece is c or (piece.overlaps(c) and c in self.pending[n:]) for c in covered):
                self.durable[piece.offset : piece.offset + len(piece.data)] = piece.data
        self._forget(covered)

    def _forget(self, covered: list[Piece]) -> None:
        last = {id(c): n for n, c in enumerate(self.pending)}
        self.pending = [
            p
            for n, p in enumerate(self.pending)
            if not any(p is c or (p.overlaps(c) and last.get(id(c), -1) > n) for c in covered)
        ]

    def undurable(self) -> list[tuple[int, int]]:
        """(offset, length) of all that a power cut could take."""
        return [(p.offset, len(p.data)) for p in [*self.pending, *self.lost]]


class FakeClaim:
    """What lies beside the image: whether it lacks data."""

    def __init__(self, source: "FakeSource") -> None:
        self._source = source
        self.is_dirty = False

    async def mark_dirty(self) -> None:
        await self._source.dice.pause()
        self._source.origin._fault("marker")
        self.is_dirty = True
        self._source.origin._fault("marker")
        await self._source.dice.pause()

    async def mark_clean(self) -> None:
        if not self.is_dirty:
            return
        source, origin = self._source, self._source.origin
        durable = origin.lost or source.discarding or origin.visible == origin.durable
        assert durable, "called mark_clean before it was durable"
        await self._source.dice.pause()
        self._source.origin._fault("marker")
        self.is_dirty = False
        self._source.origin._fault("marker")
        await self._source.dice.pause()

    async def begin_redo(self, as_of: str) -> "FakeJournal":
        del as_of
        await self._source.dice.pause()
        self._source.origin._fault("journal")
        return FakeJournal(self._source.origin)


class FakeJournal:
    """A redo journal beside the image. A crash finds what ``origin.journal`` says: all of it, or nothing."""

    def __init__(self, origin: FakeOrigin) -> None:
        self._origin = origin
        self._records: list[tuple[int, bytes]] = []

    async def add(self, ranges: list[Range]) -> None:
        await self._origin.dice.pause()
        for part in ranges:
            self._origin._fault("journal")
            data = bytes(part.length) if part.data is None else bytes(part.data)
            self._records.append((part.offset, data))

    async def commit(self) -> None:
        origin = self._origin
        await origin.dice.pause()
        origin._fault("journal")
        instant = bytearray(origin.instants[-1])
        for offset, data in self._records:
            instant[offset : offset + len(data)] = data
        if origin.journal is not None:
            del origin.instants[
                -1
            ]  # the pass is done once more, and this journal takes that one's place
        origin.journal = self._records
        origin.instants.append(bytes(instant))
        origin._fault("journal")
        await origin.dice.pause()

    places: ClassVar[list[Place]] = []

    async def note_applied(self, below: int, before: Before = ()) -> None:
        """Nobody else changes this image."""

    async def drop(self) -> None:
        await self._origin.dice.pause()
        self._origin._fault("journal")

    async def end(self) -> None:
        await self._origin.dice.pause()
        self._origin._fault("journal")
        self._origin.journal = None
        self._origin._fault("journal")
        await self._origin.dice.pause()


class FakeSource:
    """Implements what Disk and Image use of forebay.image.source.Source."""

    def __init__(
        self,
        origin: FakeOrigin,
        disk: str,
        *,
        overlay: bool,
        key: str = "images:fake.raw",
        resumed: bool = True,
    ) -> None:
        self.origin = origin
        self.dice = origin.dice
        self.key = self.label = key
        self.use = Use(disk, "gateway", read_only=False, overlay=overlay)
        self.size = origin.size
        self.allocated: int | None = None
        self.format: str | None = None
        self.shown_format = "raw"
        self.discarding = False  # the operator gives up what the image lacks
        self.claim = FakeClaim(self) if self.use.writes else None
        self.resumed = resumed
        self.opened = False
        self.withheld = self.kept_back = ""
        self.comes = False
        self.asking = self.fresh = None
        self.timeout = 5.0

    def bind(self, **_: object) -> None:
        """Nothing of that is asked for here."""

    async def check(self) -> None:
        """It stays ours: who else would take it."""

    async def leave(self) -> None:
        """Nobody else would take it."""

    def check_safe(self, mode: object) -> None:
        del mode

    async def open(self) -> FakeOrigin:
        await self.dice.pause()
        self.origin._fault("open")
        if self.use.writes:
            self.origin.recover()
        self.opened = True
        return self.origin
