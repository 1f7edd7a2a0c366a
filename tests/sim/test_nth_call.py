# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Every call that can fail, failing: the n-th one, once or for ever, with each error that fits it, for all n.

A short life of a disk (cold and warm reads, writes, zeros, flushes, passes of write-back, a change of mode, a restart)
is told again and again on the simulated host. Each time one of its calls fails: of the cache device (a read, a write
whole or in part, a sync, which may lose what it was to make durable and says so once), of the index (a read, a commit,
one that was done although it failed), of the image, of the marker and of the redo journal beside it. It is over when a
life comes to its end before the call that was to fail.

What has to hold, each time:

* nothing raises but OSError and ForebayError, and only while something fails;
* a read gives what was acknowledged last, or an error; where a write was answered with an error, the old or the new;
* the disk's state is one of `STATES`, with a reason wherever it is not well;
* killed while it fails, or with the fault lifted and some time: what was flushed is there, reads are stable, and the
  disk is well again without anybody's doing, but for what `EXCUSED` says.

Some of them run by default, chosen by the seed. ``FOREBAY_NTH_SHARE=1`` runs all; ``FOREBAY_NTH_CASE=`` with what a
failure printed runs that one.
"""

import contextlib
import errno
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lmdb
import pytest
import trio
from trio.testing import MockClock

import forebay_cache.device.device
import forebay_cache.device.superblock
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.units import Mode
from forebay_cache.format.geometry import BLOCK, SECTOR
from forebay_cache.index.changes import Changes
from forebay_cache.index.index import Index
from sim.fake_host import Host, check_cache, nothing, settings
from sim.fake_loop import Dice, simulated
from sim.fake_origin import FakeOrigin

SHARE = float(os.environ.get("FOREBAY_NTH_SHARE", "0.01"))
ONLY = os.environ.get("FOREBAY_NTH_CASE", "")

SIZE = 20 * BLOCK
UNIT = 512
"""Bytes. An image's sector that a failed write touched may be a mix of such parts."""
STATES = {"ready", "degraded", "lagging", "pass-through", "broken", "conflict", "copying"}
"""What FAILURES.md lists; "failed" is a disk that is not served at all."""

ERRORS: dict[str, tuple[str, ...]] = {
    "device.read": ("EIO",),
    "device.write": ("EIO", "ENOSPC", "short"),
    "device.sync": ("EIO", "EIO lost", "ENOSPC"),
    "index.read": ("EIO",),
    "index.commit": ("ENOSPC", "EIO", "done"),
    "origin.open": ("EIO", "ESTALE"),
    "origin.read": ("EIO", "ESTALE", "ETIMEDOUT"),
    "origin.write": ("EIO", "ENOSPC", "EDQUOT", "ESTALE", "ETIMEDOUT"),
    "origin.zero": ("EIO", "ENOSPC"),
    "origin.flush": ("EIO lost", "ENOSPC", "EDQUOT lost"),
    "origin.extents": ("EIO",),
    "origin.identity": ("EIO", "ESTALE"),
    "origin.journal": ("EIO", "ENOSPC"),
    "origin.marker": ("EIO", "ENOSPC"),
}


class Injected(OSError):
    """One of ours."""


@dataclass
class Case:
    """The n-th call (from 1) fails with `error`, which is one of those of its kind, once or from then on."""

    mode: str
    number: int
    error: int
    for_ever: bool
    killed: bool

    def __str__(self) -> str:
        how = "ever" if self.for_ever else "once"
        return (
            f"{self.mode}.{self.number}.{self.error}.{how}.{'killed' if self.killed else 'lifted'}"
        )

    @classmethod
    def read(cls, text: str) -> "Case":
        mode, number, error, how, end = text.split(".")
        return cls(mode, int(number), int(error), how == "ever", end == "killed")


class Faults:
    """Counts calls, and fails those that the case says. `kind`, `text`: what was failed."""

    last = ""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.count = 0
        self.kind = self.text = ""
        self.active = False
        self.lifted = False
        self.fd = -1
        self._unsynced: list[tuple[int, bytes]] = []
        self.lost = False  # the device lost what it had taken

    def call(self, kind: str) -> str:
        """What is to happen to this call; empty: nothing."""
        if self.lifted:
            return ""
        self.count += 1
        if self.count == self.case.number:
            known = ERRORS[kind]
            self.kind, self.text = kind, known[self.case.error % len(known)]
            self.active = self.case.for_ever
            Faults.last = f"{self.kind} {self.text}"
            return self.text
        return self.text if self.active and kind == self.kind else ""

    def check(self, kind: str) -> str:
        """Raise what is to be raised; whatever else is wrong with the call."""
        text = self.call(kind)
        name = text.partition(" ")[0]
        if name.startswith("E"):
            if kind == "device.sync" and text.endswith("lost"):
                self._lose()
            raise Injected(getattr(errno, name), f"injected: {kind} {text}")
        return text

    # -- the module os, as forebay_cache.device sees it

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        if fd != self.fd:
            return os.pwrite(fd, data, offset)
        if self.check("device.write") == "short":
            data = memoryview(data)[: max(1, len(data) // 2)]
        self._unsynced.append((offset, os.pread(fd, len(data), offset)))
        return os.pwrite(fd, data, offset)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        if fd == self.fd:
            self.check("device.read")
        return os.pread(fd, length, offset)

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        if fd == self.fd:
            self.check("device.read")
        return os.preadv(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        if fd == self.fd:
            self.check("device.sync")
            self._unsynced.clear()

    def _lose(self) -> None:
        """As a kernel does with pages that it could not write."""
        self.lost = self.lost or bool(self._unsynced)
        for offset, data in reversed(self._unsynced):
            os.pwrite(self.fd, data, offset)
        self._unsynced.clear()

    # -- the rest

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        commit, begun, fault = Index._commit, Index._begun, FakeOrigin._fault

        def committed(index: Index, changes: Changes) -> None:
            text = self.call("index.commit")
            if text in ("EIO", "ENOSPC"):
                raise forebay_cache.index.index._fault(
                    lmdb.MapFullError("injected") if text == "ENOSPC" else lmdb.Error("injected")
                )
            commit(index, changes)
            if text == "done":
                raise forebay_cache.index.index._fault(lmdb.Error("injected, after it was done"))

        def began(index: Index, write: bool) -> Any:
            if not write and self.call("index.read"):
                index._enter()
                raise lmdb.Error("injected")
            return begun(index, write)

        def origin(fake: FakeOrigin, call: str) -> None:
            try:
                self.check(f"origin.{call}")
            except OSError:
                if call == "flush":
                    fake.lose = self.text.endswith("lost")
                raise
            fault(fake, call)

        with (
            mock.patch.object(forebay_cache.device.device, "os", self),
            mock.patch.object(forebay_cache.device.superblock, "os", self),
            mock.patch.object(Index, "_commit", committed),
            mock.patch.object(Index, "_begun", began),
            mock.patch.object(FakeOrigin, "_fault", origin),
        ):
            yield


class Life:
    """One disk from its attachment on. `legal` is what each part of UNIT bytes may read as."""

    def __init__(self, host: Host, mode: Mode, faults: Faults) -> None:
        self.host = host
        self.mode = mode
        self.faults = faults
        content = bytes(host.origin.visible)
        self.legal = [{content[at : at + UNIT]} for at in range(0, SIZE, UNIT)]
        self.flushed: list[set[bytes]] = [set(x) for x in self.legal]
        self.told = False  # a flush, or a pass of write-back, failed: what was written since the last may be lost
        self.counter = 0
        self.disk: Disk | None = None

    async def attach(self) -> Disk:
        limits = {"max_lag": 1000.0, "max_dirty": 8 * BLOCK}
        self.disk = await self.host.attach("d", settings(self.mode, **limits))
        return self.disk

    def data(self, length: int) -> bytes:
        self.counter += 1
        return random.Random(self.counter).randbytes(length)

    async def read(self, offset: int, length: int) -> None:
        assert self.disk is not None
        now = self.disk.read_now(offset, length)
        got = bytes(now) if now is not None else b""
        if now is None:
            try:
                got = b"".join(bytes(x) for x in await self.disk.read(offset, length))
            except OSError as error:
                self.excuse(error, "read")
                return
        assert len(got) == length
        for at in range(0, length, UNIT):
            number = (offset + at) // UNIT
            part = got[at : at + UNIT]
            assert part in self.legal[number], f"byte {offset + at} reads {part[:8].hex()}"
            self.legal[number] = {part}  # and from now on it stays that

    def excuse(self, error: OSError | ForebayError, what: str) -> None:
        """An error is fine while something fails, or has failed and the device was not taken back yet."""
        assert self.disk is not None
        failing = self.faults.kind and not self.well
        assert failing, f"{what} failed and nothing is wrong: {error!r}"

    well = False  # the fault was lifted, and there was time

    async def change(
        self, do: Callable[[], Any], offset: int, new: bytes, *, fua: bool = False
    ) -> None:
        """Whole sectors become `new`, or may have."""
        first = offset // UNIT
        parts = [new[at : at + UNIT] for at in range(0, len(new), UNIT)]
        try:
            await do()
        except OSError as error:
            self.excuse(error, "write")
            for n, part in enumerate(parts, first):
                self.legal[n].add(part)
                self.flushed[n].add(part)
            return
        for n, part in enumerate(parts, first):
            self.legal[n] = {part}
            self.flushed[n].add(part)
        if fua:
            self._durable()

    async def write(self, offset: int, length: int, *, fua: bool = False) -> None:
        disk, data = self.disk, self.data(length)
        assert disk is not None

        async def do() -> None:
            if not fua and disk.write_now([(offset, memoryview(data))]):
                disk.publish()
            else:
                await disk.write(offset, memoryview(data), fua)

        await self.change(do, offset, data, fua=False)

    async def zero(self, offset: int, length: int) -> None:
        disk = self.disk
        assert disk is not None
        await self.change(
            lambda: disk.zero(offset, length, False, False, False), offset, bytes(length)
        )

    async def flush(self) -> None:
        disk = self.disk
        assert disk is not None
        try:
            if not disk.flush_now():
                await disk.flush()
        except OSError as error:
            self.excuse(error, "flush")
            self.told = True
        else:
            self._durable()

    def _durable(self) -> None:
        self.flushed = [set(x) for x in self.legal]

    async def may_fail(self, what: str, do: Callable[[], Any]) -> bool:
        try:
            await do()
        except (OSError, ForebayError) as error:
            self.excuse(error, what)
            self.told = True
            return False
        return True

    def look(self) -> None:
        assert self.disk is not None
        status = self.disk.status()
        assert status["state"] in STATES, status["state"]
        assert status["state"] in ("ready", "copying") or status["reason"], status["state"]

    # -- the story

    async def story(self) -> None:
        disk = self.disk
        assert disk is not None
        await self.read(0, 3 * BLOCK)
        await self.read(0, BLOCK)
        await self.write(BLOCK, 2 * SECTOR)
        await self.write(2 * BLOCK, 2 * BLOCK)
        await self.flush()
        await self.write(BLOCK, SECTOR)
        await self.zero(5 * BLOCK, BLOCK + SECTOR)
        await self.read(BLOCK, 5 * BLOCK)
        self.look()
        await self.may_fail("drain", lambda: disk.drain(nothing))
        await self.write(7 * BLOCK, SECTOR, fua=True)
        await self.write(BLOCK, 2 * SECTOR)
        await self.read(0, 8 * BLOCK)
        await trio.sleep(7)
        await self.flush()
        if self.mode in (Mode.WRITE_BACK, Mode.WRITE_THROUGH):
            other = Mode.WRITE_THROUGH if self.mode is Mode.WRITE_BACK else Mode.WRITE_BACK
            if await self.may_fail("mode", lambda: disk.set_mode(other, nothing)):
                self.mode = other
        await self.write(BLOCK + SECTOR, SECTOR)
        await self.read(8 * BLOCK, 4 * BLOCK)
        await self.write(9 * BLOCK, SECTOR)
        await self.read(BLOCK, SECTOR)
        self.look()


async def live(case: Case, directory: Path, dice: Dice, faults: Faults) -> None:
    content = random.Random(1).randbytes(SIZE - 2 * BLOCK) + bytes(2 * BLOCK)
    origin = FakeOrigin(dice, content)
    async with trio.open_nursery() as nursery:
        host = Host(directory, origin, nursery)
        await host.start()
        faults.fd = host.cache.device.fd
        life = Life(host, Mode(case.mode), faults)
        with faults.planted():
            try:
                await life.attach()
            except (OSError, ForebayError):
                faults.lifted = bool(faults.kind)
                await life.attach()
            await life.story()
            if case.killed and faults.kind:
                await _after_a_kill(host, life, faults)
            else:
                await _after_a_while(host, life, faults)
        await host._end()
        host.cache.release()


async def _after_a_kill(host: Host, life: Life, faults: Faults) -> None:
    """While it fails; the next life has a host that works."""
    left = host.snapshot()
    await host.kill(left)
    faults.lifted = True
    await host.start()
    faults.fd = host.cache.device.fd
    await life.attach()
    await _all_well(host, life, faults)


async def _after_a_while(host: Host, life: Life, faults: Faults) -> None:
    life.look()
    faults.lifted = True
    await trio.sleep(70)
    await _all_well(host, life, faults)


async def _all_well(host: Host, life: Life, faults: Faults) -> None:
    disk = life.disk
    assert disk is not None
    if faults.lost:
        await _as_far_as_it_can_be_read(life, killed=faults.case.killed)
        return
    life.well = True
    life.look()
    if disk.report.state() == "conflict":  # said what to do: ESTALE is the end of a descriptor
        assert faults.text == "ESTALE", disk.report.reason()
        assert disk.report.reason()
        life.well = False
        await host.stop()
        await host.start()
        faults.fd = host.cache.device.fd
        disk = await life.attach()
        life.well = True
    for _ in range(2):
        for at in range(0, SIZE, 4 * BLOCK):
            await life.read(at, 4 * BLOCK)
    await life.write(3 * BLOCK, SECTOR)
    await disk.drain(nothing)
    await disk.flush()
    assert disk.report.state() == "ready", (disk.report.state(), disk.report.reason())
    want = b"".join(next(iter(x)) for x in life.legal)
    n = next((n for n in range(SIZE) if host.origin.durable[n] != want[n]), -1)
    assert n < 0 or host.origin.lost, f"byte {n} is not durable in the image"
    await check_cache(host.cache)


async def _as_far_as_it_can_be_read(life: Life, *, killed: bool) -> None:
    """The device lost what was written since its last sync: an error, or what was written, and nothing else.

    Killed, nobody knows any more what that was, unless the index does: then it may be what was flushed last, provided
    that somebody was told.
    """
    life.well = False
    if killed and life.told:
        life.legal = [now | before for now, before in zip(life.legal, life.flushed, strict=True)]
    for at in range(0, SIZE, SECTOR):
        await life.read(at, SECTOR)


def run(case: Case) -> Faults:
    """Raises AssertionError, or whatever was not handled. What was failed; nothing, if the life was shorter."""
    dice = Dice(("nth", case.mode))
    faults = Faults(case)
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="forebay-", dir=base) as directory, simulated(dice):
        trio.run(live, case, Path(directory), dice, faults, clock=MockClock(autojump_threshold=0))
    return faults


MODES = ("write-back", "write-through", "write-around", "none", "full-copy")


@pytest.mark.timeout(0 if SHARE > 0.2 else 300)
@pytest.mark.expect_log(".*")  # what is logged is looked at in tests/real/test_failures.py
@pytest.mark.parametrize("mode", MODES)
def test_the_nth_call_fails(mode: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    chosen = random.Random(f"{seed} {mode}")
    if ONLY:
        case = Case.read(ONLY)
        if case.mode == mode:
            print(run(case).last)
        return
    calls = run(Case(mode, 1 << 60, 0, for_ever=False, killed=False)).count
    runs = 0
    for number in range(1, calls + 1):
        for for_ever in (False, True):
            for killed in (False, True):
                for error in range(max(map(len, ERRORS.values()))):
                    if chosen.random() >= SHARE:
                        continue
                    case = Case(mode, number, error, for_ever, killed)
                    caplog.clear()
                    try:
                        run(case)
                    except BaseException as fault:
                        fault.add_note(f"FOREBAY_NTH_CASE={case} {Faults.last}")
                        raise
                    runs += 1
    print(f"{mode}: {runs} runs over {calls} calls")
