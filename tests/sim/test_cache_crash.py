# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The power is cut, or the daemon killed, at a random instant; what was flushed, or acknowledged, has to be there.

Guests write to a disk in some mode while it is filled, evicted, committed and written back. At random instants the
state of the host is noted; afterwards, for each of them, several ways are tried in which the media could have come out
of it (fake_device.py, fake_origin.py), and the real recovery and a real disk read everything back:

* a sector holds what it held at the last flush, or something written later; after SIGKILL what was acknowledged last;
* it keeps it: a clean block shows what the origin has, so that eviction never changes it;
* no slot is named twice, and nothing that a commit made durable is damaged;
* in write-back: without the cache, too, the image is what the disk held at one instant.

Each bug that `PLANTED` puts into the code must be found this way; else the test is too weak.

``FOREBAY_SIM_SECONDS=N`` looks for N seconds instead of the default; ``--seed N`` begins elsewhere. A failure names
the history's own seed, and ``FOREBAY_SIM_HISTORY=N`` runs that one alone.
"""

import logging
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing

from forebay.checkpoint.passes import Pass
from forebay.checkpoint.schedule import FREEZE_ROOM
from forebay.checkpoint.snapshots import Snapshot
from forebay.disk.disk import Disk
from forebay.keeping.compact import compact
from forebay.units import Mode
from forebay_cache import View, check
from forebay_cache.device.device import Device
from forebay_cache.durable.journal import Journal
from forebay_cache.errors import CacheFull
from forebay_cache.format.geometry import BLOCK, SECTOR
from forebay_cache.offline.claims import Judge
from forebay_cache.read.plan import ORIGIN
from sim import bugs
from sim.fake_device import TEAR, Recorder, torn
from sim.fake_host import DEVICE_SIZE, Host, Listener, check_cache, nothing, settings
from sim.fake_loop import Dice, simulated
from sim.fake_origin import FakeJournal, FakeOrigin

SECONDS = float(os.environ.get("FOREBAY_SIM_SECONDS", "10"))
ONE_HISTORY = os.environ.get("FOREBAY_SIM_HISTORY")
PLANTED_TRIES = 40

SIZE = 52 * BLOCK
COUNT = SIZE // SECTOR
GUESTS = 3
OPS = 30
CUTS = 6
WAYS = 3

CHUNK = 256

#: A full copy does not fit.
MODES = (Mode.WRITE_BACK, Mode.WRITE_BACK, Mode.WRITE_THROUGH, Mode.WRITE_AROUND, Mode.NONE)

ZERO = bytes(SECTOR)


def content(sector: int, version: int) -> bytes:
    """What a guest writes the ``version``-th time: each 512 bytes of it say so."""
    return struct.pack("<QQ", sector, version) * (SECTOR // 16)


def told(data: bytes) -> str:
    """What a sector holds, in words."""
    parts = [struct.unpack_from("<QQ", data, at) for at in range(0, SECTOR, 512)]
    if len(set(parts)) > 1:
        return f"torn {parts}"
    return f"version {parts[0][1]} of sector {parts[0][0]}" if any(data) else "zeros"


@dataclass
class Ledger:
    """What every sector of a disk has held: the last flushed value and all later ones are legal after a power cut."""

    values: list[list[bytes]]
    acked: list[int] = field(default_factory=lambda: [0] * COUNT)
    flushed: list[int] = field(default_factory=lambda: [0] * COUNT)

    def copy(self) -> "Ledger":
        return Ledger([list(v) for v in self.values], list(self.acked), list(self.flushed))


@dataclass
class Moment:
    """A host as it was at one instant."""

    number: int
    writes: int
    durable: int
    index: bytes
    ledger: Ledger
    mode: Mode
    visible: bytes
    hardened: bytes
    pending: list[tuple[int, bytes]]
    changes: int
    journal: list[tuple[int, bytes]] | None
    instants: list[bytes]  # none where something else than checkpoints may have written the image


CHECKED = 8
"""Of so many states one is looked at by `forebay cache check` as well, which has nothing to say against it."""


def _check_offline(device: Path, boot: str) -> None:
    """After a power cut a clean place under a frozen layer may not fit its checksum, and nobody reads it."""
    report = check(device, device.parent / "index", nothing, boot)
    cut = boot != "first"
    wrong = [x for x in report.faults if not (cut and x.what == "checksum" and not x.private)]
    assert not wrong, f"a check says: {wrong[:3]}"


class Broken(AssertionError):
    """A promise was broken."""


class History:
    """One life of one host, from a seed, and the moments of it that are looked at."""

    def __init__(
        self, seed: str, directory: Path, modes: Sequence[Mode], *, slow: bool = False
    ) -> None:
        """`slow`: the device is one that only threads may write to; else it is now and then."""
        self.seed = seed
        self.modes = modes
        self._slow = slow
        self.dice = Dice(seed)
        self.random = self.dice.random
        self.directory = directory
        self.moments: list[Moment] = []
        self.recorder = Recorder(self._moment)
        self.states = 0
        self._rate = 0.0
        self._disk: Disk | None = None
        self._events = 0

    def run(self) -> None:
        """Raises Broken, or whatever the code under test raises."""
        slow = self._slow or self.random.random() < 0.3
        self.dice.device_scale = self.random.choice((1.0, 1.0, 20.0))
        with simulated(self.dice, slow=slow) as syncer:
            with self.recorder.recording(syncer):
                trio.run(self._live, clock=_clock())
            for moment in self.moments:
                for way in range(WAYS):
                    self._look(moment, way)

    # -- living -----------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        base = [ZERO if s % 7 == 0 else content(s, 0) for s in range(COUNT)]
        self.origin = FakeOrigin(self.dice, b"".join(base), scale=self.random.choice((1.0, 8.0)))
        self.ledger = Ledger([[value] for value in base])
        self.overlay = self.modes is MODES and self.random.random() < 0.15
        self.mode = self.random.choice(self.modes)
        self._only_back = self.overlay or self.mode is Mode.WRITE_BACK
        self.limits: dict[str, Any] = {
            "max_dirty": self.random.choice((1 << 20, 1 << 30)),
            "max_lag": self.random.choice((0.05, 1.0, 30.0)),
        }
        self._whole = self.random.random() < 0.2
        async with trio.open_nursery() as nursery:
            # Whole blocks are written into new slots only while many are free.
            size = DEVICE_SIZE * 4 if self._whole else DEVICE_SIZE
            host = Host(self.directory / "life", self.origin, nursery, size)
            await host.start()
            self._disk = await host.attach(
                "d", settings(self.mode, **self.limits), overlay=self.overlay
            )
            self.recorder.watch(
                host.device_file, host.device_file.parent / "index", host.cache.device.fd
            )
            self.host = host
            self._rate = 0.02
            async with trio.open_nursery() as guests:
                for guest in range(GUESTS):
                    guests.start_soon(self._guest, guest)
                guests.start_soon(self._operator)
            await trio.sleep(self.random.choice((0, 0.1, 3)))
            self._rate = 0.0
            self._disk = None
            await host._end()
            host.cache.release()

    def _moment(self) -> None:
        self._events += 1
        if self._disk is None or len(self.moments) >= CUTS or self.random.random() >= self._rate:
            return
        origin, recorder = self.origin, self.recorder
        self.moments.append(
            Moment(
                self._events,
                len(recorder.writes),
                recorder.durable,
                recorder.index,
                self.ledger.copy(),
                self._disk.mode,
                bytes(origin.visible),
                bytes(origin.durable),
                [(p.offset, p.data) for p in origin.pending],
                origin.changes,
                origin.journal,
                origin.instants[-2:] if self._only_back else [],
            )
        )

    async def _guest(self, guest: int) -> None:
        """Changes only sectors that are its own, so that each has one history."""
        do = [
            self._write,
            self._write,
            self._write,
            self._zero,
            self._flush,
            self._flush,
            self._read,
        ]
        if self._whole:
            do = [self._write, self._write, self._flush]
        for _ in range(self.random.randrange(2 * OPS if self._whole else OPS)):
            try:
                await self.random.choice(do)(guest)
            except (OSError, CacheFull):
                assert self.overlay, "no room, and nothing that cannot be evicted or written back"
            if self.random.random() < 0.3:
                await self.dice.pause(10)

    async def _write(self, guest: int) -> None:
        assert self._disk is not None
        first, count = self._own(guest)
        new = [content(s, len(self.ledger.values[s])) for s in range(first, first + count)]
        self._begin(first, new)
        data = memoryview(b"".join(new))
        fua = self.random.random() < 0.2
        cut = self.random.randrange(len(data) // SECTOR + 1) * SECTOR
        run = [(first * SECTOR, data[:cut]), (first * SECTOR + cut, data[cut:])]
        run = [write for write in run if len(write[1])]
        taken = 0 if fua else self._disk.write_now(run)
        if taken:
            self._disk.publish()
        for offset, part in run[taken:]:
            await self._disk.write(offset, part, fua)
        self._ended(first, count, flushed=fua)

    async def _zero(self, guest: int) -> None:
        assert self._disk is not None
        first, count = self._own(guest)
        self._begin(first, [ZERO] * count)
        if self.random.random() < 0.5:
            await self._disk.trim(first * SECTOR, count * SECTOR, False)
        else:
            await self._disk.zero(first * SECTOR, count * SECTOR, False, True, False)
        self._ended(first, count, flushed=False)

    def _begin(self, first: int, new: list[bytes]) -> None:
        for n, value in enumerate(new):
            self.ledger.values[first + n].append(value)

    def _ended(self, first: int, count: int, *, flushed: bool) -> None:
        ledger = self.ledger
        for s in range(first, first + count):
            ledger.acked[s] = len(ledger.values[s]) - 1
            if flushed:
                ledger.flushed[s] = ledger.acked[s]

    def _own(self, guest: int) -> tuple[int, int]:
        """A run of sectors of this guest's: of each 24 it has 8. Some places are written again and again.

        Where guests write whole blocks, every third block is one's.
        """
        if self._whole:
            block = self.random.choice((0, 0, 0, self.random.randrange(0, COUNT // 16 - 2, 3)))
            first = self.random.choice((0, self.random.randrange(16)))
            return (block + guest) * 16 + first, self.random.choice((16 - first, 16 - first, 1))
        period = self.random.choice((0, 1, 2, 3, 30, 31, self.random.randrange(COUNT // 24)))
        first = self.random.randrange(8)
        return period * 24 + guest * 8 + first, self.random.randrange(1, 9 - first)

    async def _flush(self, guest: int) -> None:
        assert self._disk is not None
        acked = list(self.ledger.acked)
        begun = self._disk.begin_flush() if self.random.random() < 0.5 else None
        done = begun is not None and await begun.wait()
        if not done and not self._disk.flush_now():
            await self._disk.flush()
        self.ledger.flushed = [max(a, b) for a, b in zip(acked, self.ledger.flushed, strict=True)]

    async def _read(self, guest: int) -> None:
        assert self._disk is not None
        first = self.random.randrange(COUNT - 1)
        count = min(self.random.choice((1, 16, 64)), COUNT - first)
        await self._disk.read(first * SECTOR, count * SECTOR)

    async def _operator(self) -> None:
        assert self._disk is not None
        for _ in range(self.random.randrange(8)):
            await trio.sleep(self.random.choice((0.001, 0.01, 0.1, 1.0)))
            what = self.random.randrange(7)
            if what == 0:
                await self._disk.drain(nothing)
            elif what == 1:
                await self.host.cache.commit()
            elif what == 2:
                await self._disk.image.look()
            elif what == 3:
                self.host.cache.ready.forget()
            elif what == 6:
                self.host.cache.threads.pace.note_write(1.0)
            elif what == 4 and not self.overlay:
                mode = self.random.choice(self.modes)
                self._only_back &= mode is Mode.WRITE_BACK
                await self._disk.set_mode(mode, nothing)
            elif self.overlay:
                await self._snapshots(self._disk)

    async def _snapshots(self, disk: Disk) -> None:
        """Take one, or drop one, with which layers are made one."""
        cache, dirty = self.host.cache, disk.dirty
        found = dirty.snapshots.all()
        if len(found) > 3 or (found and self.random.random() < 0.4):
            found.pop(self.random.randrange(len(found)))
            dirty.snapshots.put(found)
            await cache.commit.records()
            await compact(cache, dirty, nothing)
            return
        await cache.journal_room(FREEZE_ROOM)
        generation = dirty.freeze_changes()
        await cache.make_durable()
        dirty.snapshots.put([*found, Snapshot(f"s{generation}", generation, 0)])
        await cache.commit.records()

    # -- looking ----------------------------------------------------------------------------------------------

    def _look(self, moment: Moment, way: int) -> None:
        """One way in which the moment could have been the last."""
        self.states += 1
        killed = way == 0
        recorder = self.recorder
        device = bytearray(recorder.base)
        until = moment.writes if killed else moment.durable
        for offset, data in recorder.writes[:until]:
            device[offset : offset + len(data)] = data
        image = bytearray(moment.visible if killed else moment.hardened)
        if not killed:
            torn(self.random, device, recorder.writes[moment.durable : moment.writes])
            torn(self.random, image, moment.pending)
        origin = FakeOrigin(self.dice, bytes(image), scale=0.0)
        origin.changes, origin.journal = moment.changes, moment.journal
        if moment.instants:
            self._check_without_cache(moment, bytes(image))
        directory = self.directory / f"{self.states}"
        logged: list[logging.LogRecord] = []
        with _listening(logged):
            try:
                trio.run(
                    self._examine, moment, directory, bytes(device), origin, killed, clock=_clock()
                )
            except Exception as error:
                what = "killed" if killed else "power cut"
                raise Broken(
                    f"history {self.seed}, moment {moment.number}, {what}, mode {moment.mode}"
                    f"{', overlay' if self.overlay else ''}: {_first(error)!r}"
                ) from error
            finally:
                shutil.rmtree(directory, ignore_errors=True)
        if logged:
            raise Broken(f"history {self.seed}, moment {moment.number}: {logged[0].getMessage()}")

    def _check_without_cache(self, moment: Moment, image: bytes) -> None:
        """The host is gone for good: the image, recovered, holds what the disk held at one instant."""
        origin = FakeOrigin(self.dice, image)
        origin.journal = moment.journal
        origin.recover()
        found = bytes(origin.visible)
        legal = moment.instants[-1:] if moment.journal is not None else moment.instants
        if found not in legal:
            torn = [s for s in range(COUNT) if _sector(found, s) != _sector(legal[-1], s)]
            raise Broken(
                f"history {self.seed}, moment {moment.number}: without the cache the image is of no instant: "
                f"{len(torn)} sectors differ from the last"
            )

    async def _examine(
        self, moment: Moment, directory: Path, device: bytes, origin: FakeOrigin, killed: bool
    ) -> None:
        async with trio.open_nursery() as nursery:
            host = Host(directory, origin, nursery)
            host.put(device, moment.index)
            boot = "first" if killed else "second"
            if moment.number % CHECKED == 0:
                _check_offline(host.device_file, boot)
            await host.start(boot)
            disk = await host.attach(
                "d", settings(moment.mode, **self.limits), overlay=self.overlay
            )
            ledger = moment.ledger
            floor = ledger.acked if killed else ledger.flushed
            found = await _contents(disk.read)
            for s, data in enumerate(found):
                legal = ledger.values[s][floor[s] :]
                if data not in legal and not _torn_from(data, legal):
                    older = [n for n, v in enumerate(ledger.values[s]) if v == data]
                    raise AssertionError(
                        f"sector {s} holds {told(data)} (its values {older}), "
                        f"not one from {floor[s]} to {len(ledger.values[s]) - 1}"
                    )
            await self._check_clean(disk, origin)
            await check_cache(host.cache)
            if self.random.random() < 0.3 and not self.overlay:
                await disk.drain(nothing)
                assert bytes(origin.visible) == b"".join(found), "what is written back differs"
            again = await _contents(disk.read)
            assert again == found, "a second read differs"
            await host._end()
            host.cache.release()

    async def _check_clean(self, disk: Disk, origin: FakeOrigin) -> None:
        """Where nothing private lies above it, a clean block says what the origin says."""
        view = View(disk.image.cache, [], disk.image.layer, origin.read)
        for first in range(0, COUNT if disk.view.clean is not None else 0, 16):
            await disk.view.load(first * SECTOR, 16 * SECTOR)
            for piece in disk.view.plan(first * SECTOR, 16 * SECTOR):
                if not piece.private and piece.slot != ORIGIN:
                    buffers = await view.read(piece.offset, piece.length)
                    data = b"".join(bytes(b) for b in buffers)
                    image = origin.visible[piece.offset : piece.offset + piece.length]
                    assert data == image, f"at {piece.offset}: clean is {told(data)}"


def _sector(image: bytes, number: int) -> bytes:
    return image[number * SECTOR : (number + 1) * SECTOR]


def _torn_from(data: bytes, legal: list[bytes]) -> bool:
    """Every 512 bytes are those of a legal value: what a disk may do to writes that were not flushed."""
    return all(
        any(data[at : at + TEAR] == value[at : at + TEAR] for value in legal)
        for at in range(0, SECTOR, TEAR)
    )


async def _contents(read: Callable[[int, int], Awaitable[list[Any]]]) -> list[bytes]:
    found: list[bytes] = []
    for first in range(0, COUNT, CHUNK):
        count = min(CHUNK, COUNT - first)
        data = b"".join(bytes(b) for b in await read(first * SECTOR, count * SECTOR))
        found += [data[n : n + SECTOR] for n in range(0, len(data), SECTOR)]
    return found


def _clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextmanager
def _listening(records: list[logging.LogRecord]) -> Iterator[None]:
    handler = Listener(records)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def _directory() -> Iterator[Path]:
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="forebay-", dir=fast) as name:
        yield Path(name)


def run_history(seed: str, modes: Sequence[Mode] = MODES, *, slow: bool = False) -> int:
    """How many states were looked at. Raises Broken."""
    with _directory() as directory:
        history = History(seed, directory, modes, slow=slow)
        try:
            history.run()
        except Broken:
            raise
        except Exception as error:
            raise Broken(f"history {seed}: while alive: {_first(error)!r}") from error
        return history.states


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.expect_log(".*")  # each history looks at its log itself
def test_what_was_flushed_survives(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    if ONE_HISTORY is not None:
        run_history(ONE_HISTORY)
        return
    end = time.monotonic() + SECONDS
    states = histories = 0
    while time.monotonic() < end:
        states += run_history(f"{seed}.{histories}")
        histories += 1
    with capsys.disabled():
        print(f" {states} states of {histories} histories ", end="")


# -- bugs that have to be found ---------------------------------------------------------------------------------


def _no_device_sync(stack: ExitStack) -> None:
    _replace(stack, Device, "sync", lambda self: None)


def _no_journal(stack: ExitStack) -> None:
    _replace(stack, Journal, "replay", lambda self: iter(()))


def _unchecked_replay(stack: ExitStack) -> None:
    _replace(stack, Judge, "holds", lambda self, claim, sector: True)


def _no_redo_journal(stack: ExitStack) -> None:
    async def nothing(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    _replace(stack, Pass, "_write_journal", nothing)


def _journal_removed_early(stack: ExitStack) -> None:
    commit = FakeJournal.commit

    async def commit_and_end(self: FakeJournal) -> None:
        await commit(self)
        await self.end()

    _replace(stack, FakeJournal, "commit", commit_and_end)


def _shared(bug: Callable[[bugs.Replace], None]) -> Callable[[ExitStack], None]:
    return lambda stack: bug(partial(_replace, stack))


def _replace(stack: ExitStack, target: object, name: str, value: object) -> None:
    stack.enter_context(mock.patch.object(target, name, value))


BACK, THROUGH = (Mode.WRITE_BACK,), (Mode.WRITE_THROUGH,)

#: The bug, and the modes in which it does harm.
PLANTED: dict[str, tuple[Callable[[ExitStack], None], Sequence[Mode]]] = {
    "no device sync": (_no_device_sync, BACK),
    "index before data": (_shared(bugs.index_before_data), BACK),
    "freed slots reused at once": (_shared(bugs.slots_reused_early), BACK),
    "overwritten in place": (_shared(bugs.overwritten_in_place), BACK),
    "open sectors kept by a sync": (_shared(bugs.open_sectors_kept), BACK),
    "flush told before its sync has ended": (_shared(bugs.flush_told_early), BACK),
    "no hot regions": (_shared(bugs.no_region_log), THROUGH),
    "journal not replayed": (_no_journal, BACK),
    "origin not flushed": (_shared(bugs.image_not_synced), THROUGH),
    "clean before the origin is durable": (_shared(bugs.image_not_synced), BACK),
    "replay takes torn data": (_unchecked_replay, BACK),
    "no redo journal": (_no_redo_journal, BACK),
    "redo journal removed before the image is durable": (_journal_removed_early, BACK),
    "slow device: words before the data": (_shared(bugs.words_before_data), BACK),
}


@pytest.mark.expect_log(".*")
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_found(bug: str, seed: int) -> None:
    plant, modes = PLANTED[bug]
    for number in range(PLANTED_TRIES):
        with ExitStack() as stack:
            plant(stack)
            try:
                run_history(f"{seed}.planted.{number}", modes, slow="slow device" in bug)
            except Broken as found:
                print(f"found in history {number}: {found}")
                return
    pytest.fail(f"{PLANTED_TRIES} histories, and nothing was found")
