# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The compiled core does what Python does: the same history on two caches, one with each, and all of both is compared.

That is: every byte of the device, journal included; pages, sums, ready bits, open sectors, records that wait; the
placement of slots; and what each call returned or raised. Both caches have the same uuid, so their frames are equal to
the byte. Each bug that can be planted in the core is found.
"""

import contextlib
import errno
import gc
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

import forebay_fast
from forebay_cache import View, open_cache
from forebay_cache.blocks import private
from forebay_cache.blocks.fast import write_run_of
from forebay_cache.blocks.store import store
from forebay_cache.device.pace import QUIET_MOST, SLOW_SECONDS
from forebay_cache.format.geometry import BLOCK, SECTOR
from forebay_cache.format.records import LayerName
from sim.fake_loop import Dice, Loop, simulated

pytestmark = pytest.mark.skipif(bool(forebay_fast.missing), reason="no core: make setup")

SIZE = 4 << 20  # of the device, which has 44 slots then
BLOCKS = 30  # of the image
SECTORS = BLOCKS * BLOCK // SECTOR
PAST_CORE = Path("/dev/shm") if Path("/dev/shm").is_dir() else None

Op = tuple[Any, ...]


class Side:
    """One cache with a view of a private layer over a clean one, served by the core or by Python."""

    def __init__(self, home: Path, *, core: bool) -> None:
        with mock.patch.object(uuid, "uuid4", return_value=uuid.UUID(int=7)), serving(core=core):
            self.cache = open_cache(home / "cache", home / "index", size=SIZE, boot="b")
            self.run = write_run_of(self.cache)
            self.generation = 0
            self.clean = self.cache.layers.make(LayerName.of_image("i"))
            self.view = View(self.cache, [], self.clean, self.nothing)
            self.read_now = (forebay_fast.core.Reads(self.view) if core else self.view).read_now
        self.write = self.cache.device.write
        self.fault: tuple[int, int] | None = None  # which write of the next call fails, and how
        self.slow = -1  # which one takes long
        self.freeze()

    async def nothing(self, offset: int, length: int) -> bytes:
        raise AssertionError("the origin is not read")

    def freeze(self) -> None:
        for layer in self.view.private[:1]:
            layer.freeze()
        self.generation += 1
        made = self.cache.layers.make(LayerName.of_disk("d", self.generation, "i"))
        self.view.private = [made, *self.view.private]

    # -- one operation each ---------------------------------------------------------------------------------------

    async def do(self, op: Op) -> object:
        """What it returned, or raised."""
        try:
            found = getattr(self, f"do_{op[0]}")(*op[1:])
            return await found if hasattr(found, "__await__") else found
        except OSError as error:
            return error.errno, str(error)

    def do_writes(self, runs: list[tuple[int, int, int]], odd: int) -> object:
        writes = [
            (
                min(first * SECTOR, BLOCKS * BLOCK - count * SECTOR) + (odd == n) * 512,
                memoryview(content(seed, count))[: count * SECTOR - (odd == n) * 512],
            )
            for n, (first, count, seed) in enumerate(runs)
        ]
        with mock.patch.object(self.cache.device, "write", self.write_with_fault):
            try:
                return self.run(self.view.private[0], writes)
            finally:
                self.fault, self.slow = None, -1
                with contextlib.suppress(OSError):
                    self.cache.intent.publish()  # the caller does, before `writes` change

    def write_with_fault(self, at: int, data: Any) -> None:
        if self.slow == 0:
            clock = trio.lowlevel.current_clock()
            assert isinstance(clock, MockClock)
            clock.jump(2 * SLOW_SECONDS)
        self.slow -= 1
        if self.fault is not None:
            left, number = self.fault
            self.fault = left - 1, number
            if not left:
                raise OSError(number, "injected")
        self.write(at, data)

    def do_zero(self, first: int, count: int) -> object:
        count = min(count, SECTORS - first)
        return private.zero(self.cache, self.view.private[0], first * SECTOR, count * SECTOR)

    def do_read(self, offset: int, length: int) -> object:
        found = self.read_now(offset, min(length, BLOCKS * BLOCK - offset))
        return found and bytes(found)

    def do_publish(self) -> None:
        self.cache.intent.publish()

    def do_begin_sync(self) -> None:
        if not self.cache.intent.syncing:
            self.cache.intent.begin_sync()

    def do_end_sync(self) -> None:
        self.cache.intent.end_sync()

    async def do_commit(self) -> None:
        await self.cache.commit()

    async def do_fill(self, block: int, count: int, seed: int) -> None:
        count = min(count, BLOCKS - block)
        with self.cache.in_flight.filling(self.clean, range(block, block + count)) as cells:
            data = bytes(count * BLOCK) if not seed else content(seed, count * BLOCK // SECTOR)
            await store(self.cache, self.clean, block * BLOCK, data, cells)

    def do_freeze(self) -> None:
        if self.generation < 4:
            self.freeze()

    def do_forget_ready(self) -> None:
        self.cache.ready.forget()

    def do_forget_sums(self) -> None:
        sums = self.cache.sums
        for slot, state in enumerate(sums.state):
            if state == 1:  # the index has them as well
                sums.state[slot] = 0

    async def do_load_sums(self) -> None:
        await self.cache.sums.load(range(self.cache.device.slots))

    def do_shed(self) -> None:
        self.clean.pages.shed(100)

    async def do_load(self) -> None:
        await self.clean.pages.load([0])

    def do_fault(self, left: int, number: int) -> None:
        self.fault = left, number

    def do_slow(self, left: int) -> None:
        self.slow = left

    def do_mend(self) -> None:
        if self.cache.failure.error is not None:
            self.cache.failure.end()

    def do_look_beyond(self, offset: int) -> None:
        self.view.lookahead = offset

    # -- what is compared -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        cache = self.cache
        intent, sums, slots = cache.intent, cache.sums, cache.slots
        layers = [*self.view.private, self.clean]
        return {
            "device": cache.device.map[: cache.device.at(cache.index.meta.frontier)].tobytes(),
            "pages": [
                {n: page.tobytes() for n, page in layer.pages.by_number.items()} for layer in layers
            ],
            "dirty": [layer.pages.dirty for layer in layers],
            "totals": [(layer.sectors, layer.slots) for layer in layers],
            "sums": sums.values.tobytes(),
            "sum states": sums.state.tobytes(),
            "sums pending": (sums.pending, sums.changed()),
            "ready": cache.ready.masks.tobytes(),
            "open": intent.open_sectors,
            "syncing": intent.syncing,
            "records": b"".join(intent._ops),
            "noted": intent.noted_bytes,
            "late": len(intent._late),
            "journal": (intent.journal.head, intent.journal._total, intent.journal._trimmed),
            "placement": (bytes(slots.placement.state), slots.placement.free),
            "owner": slots.owner.tobytes(),
            "frontier": cache.index.meta.frontier,
            "freed": cache.quarantine._freed,
            "slow": (cache.threads.pace.is_slow, cache.threads.pace.slow_writes),
            "failed": str(cache.failure.error),
            "counts": (self.view.hits, self.view.read_bytes),
        }


def content(seed: int, sectors: int) -> bytes:
    """Sectors that are all different."""
    return b"".join(bytes([seed, n % 256, n >> 8, 1]) * (SECTOR // 4) for n in range(sectors))


@contextlib.contextmanager
def serving(*, core: bool) -> Iterator[None]:
    with mock.patch.object(forebay_fast, "_wanted", core):
        yield


# -- histories --------------------------------------------------------------------------------------------------------

sectors = st.integers(0, SECTORS - 1)
seeds = st.integers(0, 255)
lengths = st.sampled_from([1, 1, 1, 2, 3, 7, 16, 16, 20, 33])
near = st.sampled_from([0, 1, 2, 3, 14, 15, 16, 17, 30, 31, 32])  # so that writes meet
runs = st.lists(st.tuples(st.one_of(near, near, sectors), lengths, seeds), min_size=1, max_size=8)
writes = st.tuples(st.just("writes"), runs, st.sampled_from([-1] * 9 + [0, 1]))
reads = st.tuples(
    st.just("read"),
    st.one_of(near, near, near, sectors).map(lambda n: n * SECTOR)
    | st.integers(0, SECTORS * SECTOR - 1),
    st.sampled_from([1, 512, SECTOR, SECTOR, 4 * SECTOR, BLOCK, BLOCK, 2 * BLOCK]),
)


KINDS: dict[str, tuple[int, st.SearchStrategy[Op]]] = {
    "writes": (12, writes),
    "read": (12, reads),
    "zero": (2, st.tuples(st.just("zero"), st.one_of(near, sectors), lengths)),
    "fill": (
        4,
        st.tuples(
            st.just("fill"), st.integers(0, BLOCKS - 1), st.integers(1, 3), st.integers(0, 3)
        ),
    ),
    "look_beyond": (1, st.tuples(st.just("look_beyond"), st.sampled_from([0, 1 << 63, 1 << 19]))),
    **{
        name: (often, st.just((name,)))
        for name, often in {
            "begin_sync": 2,
            "end_sync": 2,
            "commit": 4,
            "publish": 1,
            "freeze": 1,
            "forget_ready": 3,
            "forget_sums": 1,
            "load_sums": 2,
            "shed": 1,
            "load": 2,
        }.items()
    },
}
"""How often each operation comes, of so many in all, and what it is like."""

TROUBLE: dict[str, tuple[int, st.SearchStrategy[Op]]] = {
    "fault": (
        4,
        st.tuples(
            st.just("fault"),
            st.integers(0, 6),
            st.sampled_from([errno.ENOSPC, errno.ENOSPC, errno.EIO]),
        ),
    ),
    "slow": (2, st.tuples(st.just("slow"), st.integers(0, 4))),
    "mend": (4, st.just(("mend",))),
    "wait": (3, st.just(("wait",))),
}


def histories(
    kinds: dict[str, tuple[int, st.SearchStrategy[Op]]],
) -> st.SearchStrategy[list[Op]]:
    choice = [strategy for often, strategy in kinds.values() for _ in range(often)]
    return st.lists(st.sampled_from(choice).flatmap(lambda one: one), min_size=25, max_size=60)


def play(history: list[Op], *, by_python: bool) -> None:
    """Do it on both sides; an AssertionError says where they differ."""
    dice = Dice("twins")
    home = Path(tempfile.mkdtemp(prefix="forebay-twins-", dir=PAST_CORE))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home)
        with mock.patch.object(gc, "collect"):  # a tenth of a second each time
            stack.enter_context(simulated(dice))
        forebay_fast.core.write_by_python(by_python)
        loop = Loop()
        stack.callback(loop.close)
        both: list[Side] = []
        for name in ("python", "core"):
            (home / name).mkdir()
            both.append(Side(home / name, core=name == "core"))
            stack.callback(both[-1].cache.release)
        for n, op in enumerate(history):
            if op[0] == "wait":
                loop.run(trio.sleep, 2 * QUIET_MOST)
                continue
            told = [loop.run(side.do, op) for side in both]
            assert told[0] == told[1], f"step {n}, {op}: {told}"
            one, other = both[0].state(), both[1].state()
            unlike = [name for name in one if one[name] != other[name]]
            assert not unlike, f"step {n}, {op}: not the same {unlike}"


HISTORIES = int(os.environ.get("FOREBAY_SIM_EXAMPLES", "15"))
"""So many for each test; `FOREBAY_SIM_EXAMPLES=1000` looks longer."""


def quickly(*phases: Phase) -> Callable[..., Any]:
    return settings(
        max_examples=HISTORIES,
        deadline=None,
        derandomize=True,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )


@pytest.mark.expect_log("cache device .* failed")
@quickly(Phase.generate, Phase.shrink)
@given(histories(KINDS | TROUBLE))
def test_both_do_the_same_with_faults_and_slow_writes(history: list[Op]) -> None:
    play(history, by_python=True)


@quickly(Phase.generate, Phase.shrink)
@given(histories(KINDS))
def test_both_do_the_same_when_the_core_writes_itself(history: list[Op]) -> None:
    play(history, by_python=False)


@pytest.mark.parametrize("bug", ["wrong side", "stale ready"])
def test_a_bug_in_the_core_is_found(bug: str) -> None:
    if not forebay_fast.core.has_plants:
        pytest.skip("compiled without plants: make setup")

    @quickly(Phase.generate)
    @given(histories(KINDS))
    def look(history: list[Op]) -> None:
        play(history, by_python=False)

    with (
        mock.patch.object(forebay_fast.core, "bugs", frozenset({bug})),
        pytest.raises(AssertionError, match="not the same|read"),
    ):
        look()
