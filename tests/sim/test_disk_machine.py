# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A disk against a bytearray: every command, every mode, mode changes, restarts, kills, evictions, origin faults.

Real Disk, Image and Cache on real files and a real LMDB, with room for 44 blocks so that eviction never stops; a fake
origin; fake threads (fake_loop.py), so that a failing example replays exactly and shrinks.

``FOREBAY_SIM_EXAMPLES=N`` runs N examples instead of the default, ``--seed N`` other ones.
"""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import trio
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from forebay.disk.disk import Disk
from forebay.disk.modes import PRIVATE_MODES
from forebay.errors import ForebayError
from forebay.image.reach import RETRY_MOST
from forebay.keeping.kept import KeptOverlays
from forebay.keeping.overlays import Overlays
from forebay.units import Mode
from forebay_cache.format.entry import data_of, has_slot, slot_of
from forebay_cache.format.geometry import BLOCK, PAGE_BLOCKS, SECTOR, sector_runs
from forebay_cache.read.plan import ORIGIN
from sim.fake_host import Host, Listener, check_cache, nothing, settings
from sim.fake_loop import Dice, Loop, simulated
from sim.fake_origin import FakeOrigin

EXAMPLES = int(os.environ.get("FOREBAY_SIM_EXAMPLES", "40"))
STEPS = 40
PHASES = [p for p in hypothesis.Phase if p is not hypothesis.Phase.explain]
if os.environ.get("FOREBAY_SIM_SHRINK") == "0":
    PHASES.remove(hypothesis.Phase.shrink)

#: Bytes of the image: one page, whose full copy fits; two pages; three, and no whole number of sectors.
SIZES = (1_500_672, (5 << 20) + 3 * SECTOR, (9 << 20) + 1234)

PRIVATE_FLAG, HOLE, ZERO = 2, 1, 2

places = st.integers(0, (1 << 24) - 1) | st.integers(0, 150).map(lambda n: n * BLOCK)
lengths = (
    st.integers(1, 2 * SECTOR)
    | st.sampled_from((512, SECTOR, 4 * SECTOR, BLOCK))
    | st.integers(1, 6 * BLOCK)
)
modes = st.sampled_from(list(Mode))
guest_ops = st.one_of(
    st.tuples(st.just("read"), places, lengths),
    st.tuples(st.just("read"), places, lengths),
    st.tuples(st.just("write"), places, lengths, st.booleans()),
    st.tuples(st.just("write"), places, lengths, st.booleans()),
    st.tuples(st.just("zero"), places, lengths, st.booleans()),
    st.tuples(st.just("trim"), places, lengths, st.booleans()),
    st.tuples(st.just("cache"), places, lengths),
    st.tuples(st.just("flush")),
)
other_ops = st.one_of(st.tuples(st.just("drain")), st.tuples(st.just("mode"), modes))
Op = tuple[Any, ...]


Bytes = bytes | bytearray


class Change:
    """A write that may have happened: what is there before and after it."""

    def __init__(self, offset: int, old: bytes, new: bytes) -> None:
        self.offset = offset
        self.old = old
        self.new = new
        self.done = False

    @property
    def end(self) -> int:
        return self.offset + len(self.new)


def _nobody(_name: str) -> bool:
    return False


def differs(got: Bytes, want: Bytes) -> int:
    """Where the first difference is, or -1."""
    if got == want:
        return -1
    return next(n for n in range(len(want)) if n >= len(got) or got[n] != want[n])


class DiskMachine(RuleBasedStateMachine):
    """``model`` is what each disk must read, by name; ``snapshots`` what it showed at each, and what may be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.records: list[logging.LogRecord] = []
        self.expected: set[str] = set()
        self.loop: Loop | None = None

    # -- life -------------------------------------------------------------------------------------------------

    @initialize(
        seed=st.integers(0, 1 << 30),
        size=st.sampled_from(SIZES),
        mode=modes,
        cap=st.sampled_from((0, 0, 12 * BLOCK)),
        max_dirty=st.sampled_from((1 << 30, 512 << 10)),
        device=st.sampled_from(("quick", "quick", "slow", "slower")),
        punches=st.booleans(),
    )
    def begin(
        self,
        seed: int,
        size: int,
        mode: Mode,
        cap: int,
        max_dirty: int,
        device: str,
        punches: bool,
    ) -> None:
        self.dice = Dice(seed)
        self.dice.device_scale = 50.0 if device == "slower" else 1.0
        self.size = size
        self.limits: dict[str, Any] = {"cache_size": cap, "max_dirty": max_dirty, "max_lag": 2.0}
        self.counter = 0
        self.told: list[tuple[int, int]] = []
        self.failures = 0  # of the origin's flushes, how many the guest knows of
        self.directory = Path(tempfile.mkdtemp(prefix="forebay-", dir=_fast_directory()))
        self.stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        handler = Listener(self.records)
        logging.getLogger().addHandler(handler)
        self.stack.callback(logging.getLogger().removeHandler, handler)
        self.stack.enter_context(simulated(self.dice, slow=device != "quick"))
        content = bytearray(self.dice.random.randbytes(size))
        for start, length in ((200_000, 300_000), (BLOCK * 30, BLOCK * 3), (size - 9000, 5000)):
            content[start : start + length] = bytes(min(length, max(0, size - start)))
        self.origin = FakeOrigin(self.dice, bytes(content[:size]))
        self.origin.punchable = punches
        self.trimming = trio.Lock()
        self.model = {"d": bytearray(self.origin.visible)}
        self.snapshots: dict[str, list[tuple[str, bytes, list[Change]]]] = {}
        self.loop = Loop()
        self.host = Host(self.directory, self.origin, self.loop.nursery)
        self.loop.run(self._start, mode if self._fits(mode) else Mode.WRITE_BACK)

    def _fits(self, mode: Mode) -> bool:
        cap = self.limits["cache_size"]
        return mode is not Mode.FULL_COPY or (self.size < 2 << 20 and not 0 < cap < self.size)

    async def _start(self, mode: Mode) -> None:
        self.mode = mode
        await self.host.start()
        await self._attach()

    async def _attach(self) -> None:
        for name in self.model:
            overlay = name != "d"
            mode = Mode.WRITE_THROUGH if overlay else self.mode
            await self.host.attach(name, settings(mode, **self.limits), overlay=overlay)

    def teardown(self) -> None:
        try:
            if self.loop is not None:
                try:
                    if not self.loop.ended and not self._failed():
                        self.loop.run(self._verify)
                        self._check_log()
                finally:
                    self.loop.close()
        finally:
            self.stack.close()

    def _failed(self) -> bool:
        return getattr(self, "failed", False)

    def run_op(self, do: Any, *args: Any) -> None:
        assert self.loop is not None
        try:
            self.loop.run(do, *args)
        except BaseException:
            self.failed = True
            raise

    # -- rules ------------------------------------------------------------------------------------------------

    @rule(op=guest_ops, disk=st.booleans())
    def one(self, op: Op, disk: bool) -> None:
        self.run_op(self._together, [op], disk)

    @rule(ops=st.lists(guest_ops, min_size=2, max_size=6), disk=st.booleans())
    def several(self, ops: list[Op], disk: bool) -> None:
        self.run_op(self._together, ops, disk)

    @rule(ops=st.lists(guest_ops, max_size=4), other=other_ops)
    def several_and(self, ops: list[Op], other: Op) -> None:
        self.run_op(self._together, [*ops, other], False)

    @rule(mode=modes)
    def change_mode(self, mode: Mode) -> None:
        self.run_op(self._together, [("mode", mode)], False)

    @rule()
    def drain(self) -> None:
        self.run_op(self._together, [("drain",)], False)

    @rule(place=places, length=lengths | st.just(1 << 24), disk=st.booleans())
    def block_status(self, place: int, length: int, disk: bool) -> None:
        self.run_op(self._block_status, self._name(disk), *self._range(place, length))

    @rule()
    def verify(self) -> None:
        self.run_op(self._verify)

    @rule(seconds=st.sampled_from((0.01, 1.0, 3.0, 11.0)))
    def idle(self, seconds: float) -> None:
        self.run_op(trio.sleep, seconds)

    @rule()
    def a_write_of_the_device_takes_long(self) -> None:
        """From here on threads write to it, for a while."""
        self.run_op(self._slow_down)

    async def _slow_down(self) -> None:
        self.host.cache.threads.pace.note_write(1.0)

    @rule()
    def forget_ready(self) -> None:
        self.host.cache.ready.forget()

    @rule()
    def restart(self) -> None:
        self.run_op(self._restart)

    @rule(
        ops=st.lists(guest_ops, max_size=4),
        after=st.sampled_from((0.0, 0.001, 0.005, 0.02, 0.1)),
        disk=st.booleans(),
    )
    def kill(self, ops: list[Op], after: float, disk: bool) -> None:
        self.run_op(self._kill, ops, after, disk)

    @precondition(lambda self: "d" in self.model)
    @rule(discard=st.booleans())
    def to_overlays(self, discard: bool) -> None:
        self.run_op(self._to_overlays, discard)

    @precondition(lambda self: "d" not in self.model)
    @rule(mode=modes)
    def to_direct(self, mode: Mode) -> None:
        self.run_op(self._to_direct, mode)

    @precondition(lambda self: "d" not in self.model)
    @rule(disk=st.booleans(), ops=st.lists(guest_ops, max_size=3))
    def snapshot(self, disk: bool, ops: list[Op]) -> None:
        self.run_op(self._snapshot, self._name(disk), ops)

    @precondition(lambda self: "d" not in self.model)
    @rule(disk=st.booleans(), pick=st.integers(0, 99), what=st.sampled_from(("go", "drop", "drop")))
    def of_a_snapshot(self, disk: bool, pick: int, what: str) -> None:
        name = self._name(disk)
        if self.snapshots.get(name):
            at = pick % len(self.snapshots[name])
            self.run_op(self._go_back if what == "go" else self._drop, name, at)

    @precondition(lambda self: "d" not in self.model)
    @rule(disk=st.booleans())
    def revert(self, disk: bool) -> None:
        self.run_op(self._revert, self._name(disk))

    @rule(
        call=st.sampled_from(
            ("read", "write", "zero", "flush", "flush", "identity", "extents", "punch")
        ),
        times=st.sampled_from((1, 2, -1)),
        lose=st.booleans(),
    )
    def break_origin(self, call: str, times: int, lose: bool) -> None:
        self.origin.faults[call] = times
        self.origin.lose = lose
        self.expected |= {"write-back failed", "copying paused", "fake.raw: injected"}
        self.expected |= {"cannot be reached", "can be reached again", "a flush failed"}

    @rule()
    def heal_origin(self) -> None:
        self.run_op(self._heal)

    @rule(pick=st.integers(0, 1 << 20))
    def damage_clean(self, pick: int) -> None:
        self.run_op(self._damage_clean, pick)

    @invariant()
    def sane(self) -> None:
        if self.loop is None or self._failed():
            return
        self._check_log()
        for name, disk in self.host.disks.items():
            status = disk.status()
            assert 0 <= status["cached_bytes"] <= self.size, status
            assert 0 <= status["dirty_bytes"] <= 3 * self.size, status
            assert (status["lag_seconds"] == 0) or status["dirty_bytes"], status
            if status["dirty_bytes"]:
                marker = self.host.sources[name].claim
                assert marker is None or marker.is_dirty, "dirty, and nothing says so"

    def _check_log(self) -> None:
        for record in self.records:
            text = record.getMessage()
            assert any(one in text for one in self.expected), f"unexpected in the log: {text}"
        self.records.clear()

    # -- guests -----------------------------------------------------------------------------------------------

    def _name(self, second: bool) -> str:
        names = sorted(self.model)
        return names[second and len(names) > 1]

    def _range(self, place: int, length: int) -> tuple[int, int]:
        offset = place % self.size
        return offset, min(length, self.size - offset)

    def _may_fail(self) -> bool:
        """The origin fails, or a flush of it failed and somebody has yet to be told."""
        untold = self.origin.sync_failures != self.failures
        return (
            bool(self.origin.faults)
            or untold
            or any(disk.image.origin is None for disk in self.host.disks.values())
        )

    async def _together(self, ops: list[Op], second: bool) -> None:
        """All at once; each op checks itself, and everything that was written is checked afterwards."""
        name = self._name(second)
        planned = self._plan(name, ops)
        changes = [change for _, change in planned if change is not None]
        self.changing = bool(changes)
        async with trio.open_nursery() as nursery:
            for op, change in planned:
                nursery.start_soon(self._do, name, op, change, changes)
        self.changing = False
        await self._adopt(name, changes)

    def _plan(self, name: str, ops: list[Op]) -> list[tuple[Op, Change | None]]:
        """Ops with the change each makes; of changes that overlap, the first stays."""
        planned: list[tuple[Op, Change | None]] = []
        changes: list[Change] = []
        for op in ops:
            if op[0] not in ("write", "zero", "trim"):
                planned.append((op, None))
                continue
            change = self._change(name, op)
            if all(change.end <= c.offset or c.end <= change.offset for c in changes):
                changes.append(change)
                planned.append((op, change))
        return planned

    def _change(self, name: str, op: Op) -> Change:
        offset, length = self._range(op[1], op[2])
        old = bytes(self.model[name][offset : offset + length])
        if op[0] == "write":
            self.counter += 1
            return Change(offset, old, Dice(self.counter).random.randbytes(length))
        if op[0] == "zero":
            return Change(offset, old, bytes(length))
        first = -(-offset // SECTOR) * SECTOR
        last = max(first, (offset + length) // SECTOR * SECTOR)
        new = bytearray(old)
        if first < last:
            new[first - offset : last - offset] = bytes(last - first)
        return Change(offset, old, bytes(new))

    async def _do(self, name: str, op: Op, change: Change | None, changes: list[Change]) -> None:
        disk = self.host.disks[name]
        kind, may_fail = op[0], self._may_fail()
        faults = dict(self.origin.faults)
        full = False
        try:
            if kind == "read":
                await self._read(name, *self._range(op[1], op[2]), changes)
            elif kind == "cache":
                await disk.cache(*self._range(op[1], op[2]))
            elif kind == "flush":
                await self._flush(name)
            elif kind == "drain":
                await self._drain(name)
            elif kind == "mode":
                await self._set_mode(op[1])
            else:
                assert change is not None
                await self._write(disk, op, change)
                change.done = True
        except OSError as error:
            full = error.errno == errno.ENOSPC and self._crowded(disk)
            if kind in ("write", "zero", "trim") and self.mode not in PRIVATE_MODES:
                self._tell()  # FUA's flush may have failed
            if not (may_fail or self._may_fail() or full):
                raise AssertionError(f"{op} failed: {error!r}, faults {faults}") from error

    def _crowded(self, disk: Disk) -> bool:
        """Whether most of the cache holds what cannot be evicted or written back."""
        held = sum(bool(s & 0x02) for s in self.host.cache.slots.placement.state)
        return (disk.overlay or self.mode is Mode.FULL_COPY) and held > 20

    async def _write(self, disk: Disk, op: Op, change: Change) -> None:
        offset, new = change.offset, change.new
        if op[0] == "zero":
            fast = op[3] and disk.modes.writes_private
            await disk.zero(offset, len(new), False, op[3], fast)
        elif op[0] == "trim":
            await self._trim(disk, change, op[3])
        elif not op[3] and disk.write_now([(offset, memoryview(new))]):
            disk.publish()
        else:
            await disk.write(offset, memoryview(new), op[3])

    async def _trim(self, disk: Disk, change: Change, fua: bool) -> None:
        """One that is ignored, which is counted, changes nothing."""
        async with self.trimming:
            ignored = disk.counters.trims_ignored
            await disk.trim(change.offset, len(change.new), fua)
            if disk.counters.trims_ignored != ignored:
                assert not disk.overlay
                change.new = change.old
            elif change.new != change.old:
                assert disk.overlay or self.origin.punchable, "zeros for a store without holes"

    async def _read(self, name: str, offset: int, length: int, changes: list[Change]) -> None:
        disk = self.host.disks[name]
        model = self.model[name]
        now = disk.read_now(offset, length)
        try:
            if now is not None:
                got = bytes(now)
            else:
                buffers = await disk.read(offset, length)
                got = b"".join(bytes(b) for b in buffers)
        except OSError:
            await disk.view.load(offset, length)
            assert any(p.slot == ORIGIN for p in disk.view.plan(offset, length)), "was cached"
            raise
        want = bytes(model[offset : offset + length])
        if got == want:
            return
        assert len(got) == length
        touching = [c for c in changes if c.offset < offset + length and offset < c.end]
        self._explain(name, offset, got, want, touching)

    def _explain(
        self, name: str, offset: int, got: bytes, want: bytes, changes: list[Change]
    ) -> None:
        """Every byte is the old or the new one of a change, or the one and only."""
        legal = bytearray(want)
        for change in changes:
            start, stop = max(change.offset, offset), min(change.end, offset + len(got))
            for n in range(start, stop):
                byte = got[n - offset]
                if byte in (change.old[n - change.offset], change.new[n - change.offset]):
                    legal[n - offset] = byte
        n = differs(got, legal)
        if n >= 0:
            raise AssertionError(self._story(name, offset + n, got[n : n + 8], legal[n : n + 8]))

    def _story(self, name: str, at: int, got: bytes, want: Bytes) -> str:
        lines = [f"{name}: byte {at} (block {at >> 16}, sector {at >> 12 & 15}) reads {got.hex()}"]
        lines.append(f"and should be {bytes(want).hex()}; mode {self.mode}")
        lines.append(f"origin has {self.origin.visible[at : at + 8].hex()}")
        number, i = divmod(at >> 16, PAGE_BLOCKS)
        for layer in self.host.cache.layers:
            page = layer.pages.look(number)
            if page is not None:
                words = [f"{page[i]:x}"] + ([f"{page[64 + i]:x}"] if layer.private else [])
                lines.append(f"  {layer.name} {layer.id} dead={layer.is_dead}: {' '.join(words)}")
        return "\n".join(lines)

    async def _adopt(self, name: str, changes: list[Change]) -> None:
        """Changes that were done are what the disk reads from now on; of others find out."""
        model = self.model[name]
        for change in changes:
            if change.done:
                model[change.offset : change.end] = change.new
        for change in changes:
            if change.done or not change.new:
                continue
            await self._heal()
            buffers = await self.host.disks[name].read(change.offset, len(change.new))
            got = b"".join(bytes(b) for b in buffers)
            self._explain(name, change.offset, got, change.old, [change])
            model[change.offset : change.end] = got

    # -- durability -------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """A guest was told that its flush failed: what was lost by then is its own to write again."""
        self.told = self.origin.undurable()
        self.failures = self.origin.sync_failures

    def _check_durable(self, name: str, what: str) -> None:
        want, got = bytearray(self.model[name]), bytearray(self.origin.durable)
        for offset, length in self.told:
            want[offset : offset + length] = got[offset : offset + length] = bytes(length)
        n = differs(got, want)
        lost = [x for x in self.origin.undurable() if x[0] <= n < x[0] + x[1]]
        assert n < 0, f"{what} returned and byte {n} (block {n >> 16}) is not durable: {lost}"

    async def _flush(self, name: str) -> None:
        mode = self.mode
        alone = self._quiet()
        try:
            await self.host.disks[name].flush()
        except OSError:
            if mode not in PRIVATE_MODES:
                self._tell()
            raise
        if name == "d" and mode is self.mode and mode not in PRIVATE_MODES and alone:
            self._check_durable(name, f"flush in mode {mode}")

    def _quiet(self) -> bool:
        """No change is under way that the model does not have yet."""
        return not self.changing

    changing = False

    async def _drain(self, name: str) -> None:
        await self.host.disks[name].drain(nothing)
        if name == "d" and self._quiet():
            self._check_durable(name, "drain")
            assert not self.host.disks[name].dirty_bytes

    async def _set_mode(self, mode: Mode) -> None:
        disk = self.host.disks.get("d")
        if disk is None:
            return
        was = self.mode
        try:
            await disk.set_mode(mode, nothing)
        except ForebayError:
            assert not self._fits(mode)
            return
        except OSError:
            if was not in PRIVATE_MODES:
                self._tell()
            raise
        self.mode = mode
        if (
            self._quiet()
            and not (was in PRIVATE_MODES and mode in PRIVATE_MODES)
            and was is not mode
        ):
            self._check_durable("d", f"mode {was} to {mode}")

    # -- ends -------------------------------------------------------------------------------------------------

    async def _restart(self) -> None:
        await self.host.stop()
        await self.host.start()
        await self._attach()

    async def _kill(self, ops: list[Op], after: float, second: bool) -> None:
        name = self._name(second)
        planned = self._plan(name, ops)
        changes = [change for _, change in planned if change is not None]
        self.changing = bool(changes)
        async with trio.open_nursery() as nursery:
            for op, change in planned:
                nursery.start_soon(self._do, name, op, change, changes)
            await trio.sleep(after)
            ended = {c: c.done for c in changes}
            left = self.host.snapshot()
            nursery.cancel_scope.cancel()
        await self.host.kill(left)
        self.changing = False
        for change in changes:
            change.done = ended[change]
        await self.host.start()
        await self._attach()
        await self._adopt(name, changes)

    async def _to_overlays(self, discard: bool) -> None:
        await self._heal()
        disk = self.host.disks["d"]
        if discard:
            self.expected.add("are dropped as asked")
        else:
            await disk.drain(nothing)
            self._check_durable("d", "drain")
        await self.host.detach("d", discard=discard)
        image = bytes(self.origin.visible)
        if not discard:
            assert image == self.model["d"]
        self.untouched = self.origin.changes
        self.model = {"o1": bytearray(image), "o2": bytearray(image)}
        await self._attach()

    # -- snapshots --------------------------------------------------------------------------------------------

    def _overlays(self) -> Overlays:
        cache, served = self.host.cache, self._served
        index = self.directory / "index"
        return Overlays(cache, index, KeptOverlays(cache), served, list, None, _nobody)  # type: ignore[arg-type]

    @asynccontextmanager
    async def _served(self, name: str) -> AsyncIterator[SimpleNamespace]:
        disk = self.host.disks[name]
        yield SimpleNamespace(name=name, disk=disk, clients=0, check_serves=lambda: None)

    async def _snapshot(self, name: str, ops: list[Op]) -> None:
        """One while the guest goes on: each of its changes is in it, as a whole or not."""
        self.counter += 1
        label, before = f"s{self.counter}", bytes(self.model[name])
        planned = self._plan(name, ops)
        changes = [change for _, change in planned if change is not None]
        async with trio.open_nursery() as nursery:
            for op, change in planned:
                nursery.start_soon(self._do, name, op, change, changes)
            await self._overlays().snapshot(name, label)
        await self._adopt(name, changes)
        self.snapshots.setdefault(name, []).append((label, before, changes))

    async def _go_back(self, name: str, at: int) -> None:
        label, shown, changes = self.snapshots[name][at]
        del self.snapshots[name][at + 1 :]
        await self._overlays().rollback(name, label, drop_newer=True, force=False)
        self.model[name] = bytearray(shown)
        await self._find_out(name, changes)
        self.snapshots[name][at] = label, bytes(self.model[name]), []

    async def _find_out(self, name: str, changes: list[Change]) -> None:
        """Which of these were made before the snapshot, sector by sector."""
        await self._heal()
        for change in changes:
            if change.new:
                found = await self.host.disks[name].read(change.offset, len(change.new))
                got = b"".join(bytes(b) for b in found)
                old = bytes(self.model[name][change.offset : change.end])
                self._explain(name, change.offset, got, old, [change])
                self.model[name][change.offset : change.end] = got

    async def _drop(self, name: str, at: int) -> None:
        label, _, _ = self.snapshots[name].pop(at)
        await self._overlays().drop(name, label, nothing)
        frozen = self.host.disks[name].dirty.frozen
        assert len(frozen) <= len(self.snapshots[name]) + 1, "what nobody needs is made one"

    async def _revert(self, name: str) -> None:
        await self._overlays().revert(name, sure=True, force=False)
        self.snapshots.pop(name, None)
        self.model[name] = bytearray(self.origin.visible)
        assert not self.host.disks[name].dirty.private_bytes

    async def _to_direct(self, mode: Mode) -> None:
        for name in list(self.model):
            await self.host.detach(name, discard=False)
        assert self.origin.changes == self.untouched, "an overlay wrote to its image"
        self.snapshots.clear()
        self.model = {"d": bytearray(self.origin.visible)}
        self.mode = mode if self._fits(mode) else Mode.WRITE_BACK
        await self._attach()

    async def _heal(self) -> None:
        """The origin works again, and whoever gave it up for a while has noticed."""
        self.origin.heal()
        while any(x.image.origin is None for x in self.host.disks.values()):  # noqa: ASYNC110
            await trio.sleep(RETRY_MOST)

    # -- looking ----------------------------------------------------------------------------------------------

    async def _verify(self) -> None:
        """Everything, twice, and what the cache thinks of itself."""
        await self._heal()
        for _ in range(2):
            for name in self.model:
                for offset in range(0, self.size, 4 * BLOCK):
                    await self._read(name, offset, min(4 * BLOCK, self.size - offset), [])
        await check_cache(self.host.cache)

    async def _block_status(self, name: str, offset: int, length: int) -> None:
        may_fail = self._may_fail()
        try:
            for context in ("base:allocation", "x-forebay:cached"):
                await self._walk(name, context, offset, length)
        except OSError:
            assert may_fail

    async def _walk(self, name: str, context: str, offset: int, length: int) -> None:
        disk, model, end = self.host.disks[name], self.model[name], offset + length
        while offset < end:
            found = await disk.extents(context, offset, end - offset, False)
            assert found
            for part, flags in found:
                assert part > 0
                assert offset + part <= end, "beyond what was asked for"
                content = model[offset : offset + part]
                if context == "base:allocation":
                    assert not flags or not any(content), f"data at {offset} is called {flags}"
                elif flags != PRIVATE_FLAG:
                    image = self.origin.visible[offset : offset + part]
                    assert content == image, f"private data at {offset} is called {flags}"
                offset += part

    async def _damage_clean(self, pick: int) -> None:
        """Flip a bit in a sector of the clean layer, as a failing device would."""
        cache = self.host.cache
        layer = cache.layers.clean_of("images:fake.raw")
        assert layer is not None
        there = [
            (slot_of(page[i]), first)
            for _, page in layer.pages.held()
            for i in range(PAGE_BLOCKS)
            for first, _ in sector_runs(data_of(page[i]))
            if has_slot(page[i])
        ]
        if not there or self.damaged > 5:
            return
        self.damaged += 1
        slot, sector = there[pick % len(there)]
        at = cache.device.at(slot, sector * SECTOR + pick % SECTOR)
        old = os.pread(cache.device.fd, 1, at)
        os.pwrite(cache.device.fd, bytes([old[0] ^ 0x10]), at)
        cache.ready.forget()
        self.expected.add("is damaged (clean data")

    damaged = 0


def _fast_directory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.mark.timeout(0 if EXAMPLES > 200 else 300)
@pytest.mark.expect_log(".*")  # the machine looks at its log itself, step by step
def test_disk_is_a_bytearray(seed: int) -> None:
    machine = hypothesis.seed(seed)(DiskMachine)
    run_state_machine_as_test(
        machine,
        settings=hypothesis.settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            print_blob=True,
            phases=PHASES,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
