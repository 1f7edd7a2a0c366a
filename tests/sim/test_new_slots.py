# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Whole blocks written over sectors that lie on both sides, which takes a new slot: kills and power cuts in between.

A few private blocks, written to in part and as a whole, synced and committed now and then. The fault model is that of
fake_device.py. After each cut a start may be cut as well, before its commit; then every sector holds what it held at
the last sync, or something later, and after a kill what was acknowledged last. `forebay cache check` says the same.
"""

import contextlib
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import trio
from trio.testing import MockClock

import forebay_fast
from forebay_cache import Cache, LayerName, View, check, open_cache
from forebay_cache.blocks import private
from forebay_cache.blocks.fast import write_run_of
from forebay_cache.format.geometry import SECTOR, SECTORS
from forebay_cache.offline import recovery, replay
from sim import bugs
from sim.fake_device import Recorder, torn
from sim.fake_host import check_cache, nothing
from sim.fake_loop import Dice, simulated
from sim.twins import serving

SIZE = 4 << 20
BLOCKS = 2
COUNT = BLOCKS * SECTORS
LIVES = int(os.environ.get("FOREBAY_SIM_EXAMPLES", "10"))
STEPS = 30
CUTS = 6
NAME = LayerName.of_disk("d", 1, "i")


class CutError(Exception):
    """The power went while a cache was started."""


class Moment(NamedTuple):
    """A cache as it was at one instant. The lists are numbers of values, by sector."""

    writes: int
    durable: int
    stored: bytes  # the index
    acknowledged: list[int]  # when the last step began
    synced: list[int]
    newest: list[int]


class Life:
    """One cache with a private layer, and what each of its sectors has held."""

    def __init__(self, home: Path, seed: str, *, core: bool) -> None:
        self.home = home
        self.core = core
        self.dice = Dice(seed)
        self.random = self.dice.random
        self.recorder = Recorder(lambda: None)
        self.values = [[bytes(SECTOR)] for _ in range(COUNT)]
        self.synced = [0] * COUNT
        self.moments: list[Moment] = []
        self.replaced = self.states = 0

    def run(self) -> None:
        with simulated(self.dice) as syncer, serving(core=self.core):
            with self.recorder.recording(syncer):
                trio.run(self._live, clock=MockClock(autojump_threshold=0))
            for moment in self.moments:
                for killed in (True, False, False):
                    trio.run(self._look, moment, killed, clock=MockClock(autojump_threshold=0))

    async def _live(self) -> None:
        home = self.home / "life"
        home.mkdir()
        self.cache = cache = open_cache(home / "cache", home / "index", size=SIZE, boot="first")
        self.layer = cache.layers.make(NAME)
        self.write_run = write_run_of(cache)
        await cache.commit()
        self.recorder.watch(home / "cache", home / "index", cache.device.fd)
        cuts = set(self.random.sample(range(STEPS), CUTS))
        for step in range(STEPS):
            before = self._newest()
            await self._step()
            if step in cuts:
                writes, index = len(self.recorder.writes), self.recorder.index
                durable, synced = self.recorder.durable, list(self.synced)
                self.moments.append(Moment(writes, durable, index, before, synced, self._newest()))
        cache.release()

    def _newest(self) -> list[int]:
        return [len(values) - 1 for values in self.values]

    async def _step(self) -> None:
        what = self.random.randrange(12)
        if what < 4:
            for _ in range(self.random.randrange(1, 5)):
                await self._change(self.random.randrange(COUNT), self.random.choice((1, 1, 2, 3)))
        elif what < 7:
            had = self.cache.quarantine.leaving
            await self._change(self.random.randrange(BLOCKS) * SECTORS, SECTORS)
            self.replaced += self.cache.quarantine.leaving > had
        elif what < 8:
            await self._change(self.random.randrange(COUNT), 1, blank=True)
        elif what < 11:
            await self.cache.make_durable()
            self.synced = self._newest()
        else:
            await self.cache.commit()
            self.synced = self._newest()

    async def _change(self, first: int, count: int, *, blank: bool = False) -> None:
        count = min(count, COUNT - first)
        new = [bytes(SECTOR) if blank else self._content(first + n) for n in range(count)]
        for n, value in enumerate(new):
            self.values[first + n].append(value)
        offset, data = first * SECTOR, memoryview(b"".join(new))
        while not self._done(offset, data, blank=blank):
            await private.prepare(self.cache, self.layer, offset, len(data), zeros=blank)
        self.cache.intent.publish()

    def _done(self, offset: int, data: memoryview, *, blank: bool) -> bool:
        if blank:
            return private.zero(self.cache, self.layer, offset, len(data))
        return bool(self.write_run(self.layer, [(offset, data)]))

    def _content(self, sector: int) -> bytes:
        return struct.pack("<QQ", sector, len(self.values[sector])) * (SECTOR // 16)

    async def _look(self, moment: Moment, killed: bool) -> None:
        """One way in which the moment could have been the last."""
        self.states += 1
        writes = self.recorder.writes
        device = bytearray(self.recorder.base)
        for offset, data in writes[: moment.writes if killed else moment.durable]:
            device[offset : offset + len(data)] = data
        if not killed:
            torn(self.random, device, writes[moment.durable : moment.writes])
        home = self.home / f"{self.states}"
        (home / "index").mkdir(parents=True)
        (home / "cache").write_bytes(device)
        (home / "index" / "data.mdb").write_bytes(moment.stored)
        boot = "first" if killed else "second"
        report = check(home / "cache", home / "index", nothing, boot)
        assert not report.faults, report.faults[:3]
        if self.random.random() < 0.5:
            self._cut_the_start(home, boot)
        cache = open_cache(home / "cache", home / "index", boot=boot)
        try:
            await self._compare(cache, moment.acknowledged if killed else moment.synced, moment)
            await check_cache(cache)
        finally:
            cache.release()

    def _cut_the_start(self, home: Path, boot: str) -> None:
        """Have a start be the last that was done to it, without its commit; any of its writes may have arrived."""
        before = (home / "cache").read_bytes()
        with (
            mock.patch.object(recovery, "_commit_start", side_effect=CutError),
            pytest.raises(CutError),
        ):
            open_cache(home / "cache", home / "index", boot=boot)
        after = (home / "cache").read_bytes()
        mixed = bytearray(before)
        for at in range(0, len(before), SECTOR):
            if before[at : at + SECTOR] != after[at : at + SECTOR] and self.random.random() < 0.5:
                torn(self.random, mixed, [(at, after[at : at + SECTOR])])
        (home / "cache").write_bytes(mixed)

    async def _compare(self, cache: Cache, first: list[int], moment: Moment) -> None:
        layer = next(x for x in cache.layers if x.name == NAME)
        view = View(cache, [layer], None, zeros)
        for sector, values in enumerate(self.values):
            found = b"".join(bytes(x) for x in await view.read(sector * SECTOR, SECTOR))
            legal = range(first[sector], moment.newest[sector] + 1)
            older = [n for n, value in enumerate(values) if value == found]
            assert set(older) & set(legal), f"sector {sector} is {older}, which is not in {legal}"


async def zeros(offset: int, length: int) -> bytes:
    """Reads an image that has no data."""
    return bytes(length)


def live(home: Path, seed: str, *, core: bool = False) -> Life:
    home.mkdir()
    life = Life(home, seed, core=core)
    life.run()
    shutil.rmtree(home)
    return life


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """In memory, where there is some."""
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(prefix="forebay-", dir=fast) as name:
        yield Path(name)


@pytest.mark.parametrize("core", [False, True], ids=["python", "core"])
def test_what_was_synced_survives_a_new_slot(home: Path, seed: int, *, core: bool) -> None:
    if core and forebay_fast.missing:
        pytest.skip("no core: make setup")
    lives = [live(home / f"{n}", f"{seed}.{n}", core=core) for n in range(LIVES)]
    assert sum(life.replaced for life in lives) > LIVES


def _not_brought(cache: Cache, old: int, slot: int, sector: int, value: int) -> None:
    replay._take_sum(cache, slot, sector, value)


PLANTED: dict[str, Callable[[bugs.Replace], None]] = {
    "what a new slot lacks is left in the old one": lambda replace: replace(
        replay, "_bring", _not_brought
    ),
    "an old slot is given out at once": bugs.slots_reused_early,
}


def _live_on(home: Path, seed: int) -> None:
    for n in range(100):
        live(home / f"{n}", f"{seed}.{n}")


@pytest.mark.expect_log(".*")
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_found(home: Path, seed: int, bug: str) -> None:
    with contextlib.ExitStack() as stack:

        def replace(target: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        PLANTED[bug](replace)
        with pytest.raises((AssertionError, OSError)):
            _live_on(home, seed)
