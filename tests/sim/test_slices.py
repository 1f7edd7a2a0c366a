# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Long work on the event loop is done in slices: counted in calls, not in time, on a large sparse image."""

import sys
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import trio
import trio.testing

import forebay_cache.layers.registry
from forebay.checkpoint.counters import Counters
from forebay.disk.private_writes import PIECE, PrivateWrites
from forebay.disk.ranges import Ranges
from forebay.units import Mode
from forebay_cache import (
    Cache,
    Filler,
    Layer,
    View,
    invalidate,
    mark_hot,
    open_cache,
    pin_layer,
    survey,
)
from forebay_cache.blocks.store import store
from forebay_cache.format.entry import NO_SLOT, block_key, pack
from forebay_cache.format.geometry import BLOCK, PAGE_BLOCKS
from forebay_cache.format.records import LayerName
from forebay_cache.read.flight import Flight
from forebay_cache.slots.placement import TOUCHED
from sim.fake_host import Host, settings
from sim.fake_loop import Dice, simulated
from sim.fake_origin import FakeOrigin

IMAGE = 4 << 40
SLOTS = 100_000
MOST = 40_000
"""Calls of functions in one step of a task, whatever the size of the image: some milliseconds. Most of it is for the
snapshot of a commit, which is one piece, and has the more to store the longer ago the last one was. Work that is not
done in slices makes several hundred thousand."""

MANY = 48
"""Requests that one client may have under way."""


class Steps(trio.abc.Instrument):
    """Counts the calls of functions in each step of each task."""

    def __init__(self) -> None:
        self.most = (0, "")
        self._calls = 0

    def _count(self, frame: object, event: str, arg: object) -> None:
        del frame, arg
        self._calls += event.endswith("call")

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._calls = 0
        sys.setprofile(self._count)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        sys.setprofile(None)
        self.most = max(self.most, (self._calls, task.name))


class Turns(Steps):
    """Counts them in each turn of the event loop, in which each task has a step that can go on."""

    def after_io_wait(self, timeout: float) -> None:
        del timeout
        self._calls = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        sys.setprofile(self._count)


def fill(cache: Cache, layer: Layer) -> None:
    """Give the layer SLOTS blocks, as if one sector of each had been written."""
    for block in range(SLOTS):
        number, i = divmod(block, PAGE_BLOCKS)
        slot = cache.slots.take(block_key(layer.id, block), held=layer.is_held)
        assert slot >= 0
        layer.pages.look(number) or layer.pages.adopt(number, None)
        layer.pages.writable(number)[i] = pack(slot, 0, 1)
        layer.slots += 1
        layer.sectors += 1


def played(
    tmp_path: Path,
    do: Callable[[Cache, Layer], Awaitable[None]],
    *,
    private: bool,
    count: type[Steps] = Steps,
) -> None:
    """Do something to a layer that holds much, and look how long the longest step was, or turn."""

    async def story() -> None:
        size = (SLOTS + 4096) * BLOCK + (64 << 20)
        with (tmp_path / "c.img").open("wb") as file:
            file.truncate(size)
        cache = open_cache(tmp_path / "c.img", tmp_path / "index", size=size, boot="a")
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            name = LayerName.of_disk("x", 1, "i") if private else LayerName.of_image("i")
            layer = cache.layers.make(name)
            fill(cache, layer)
            await cache.commit()
            await cache.commit()
            steps = count()
            trio.lowlevel.add_instrument(steps)
            await do(cache, layer)
            await cache.commit()
            trio.lowlevel.remove_instrument(steps)
            sys.setprofile(None)
            nursery.cancel_scope.cancel()
        cache.release()
        assert steps.most[0] <= MOST, steps.most

    trio.run(story)


async def _reclaimed(cache: Cache, layer: Layer) -> None:
    cache.layers.drop(layer)
    while any(x.is_dead for x in cache.layers) or cache.quarantine.leaving:  # noqa: ASYNC110
        await trio.sleep(0.05)
    assert not layer.slots
    assert cache.slots.placement.free == cache.device.slots


async def _zeroed(cache: Cache, layer: Layer) -> None:
    async def nothing(*_: object) -> None:
        pass

    view = SimpleNamespace(cache=cache, private=[layer])
    dirty = SimpleNamespace(mark=SimpleNamespace(set=nothing))
    admission = SimpleNamespace(
        must_wait=lambda _: False, note_written=lambda *_: None, admit=nothing
    )
    writes = PrivateWrites(
        cast("Any", view), IMAGE, cast("Any", dirty), cast("Any", admission), Ranges(), Counters()
    )
    await writes.zero(0, 4 << 30, may_trim=True)
    await writes.zero(IMAGE - (2 << 30), 2 << 30, may_trim=True)


async def _overwritten(cache: Cache, layer: Layer) -> None:
    await mark_hot(cache, layer, 0, 16 << 30)
    await invalidate(cache, layer, 0, 4 << 30)
    await mark_hot(cache, layer, IMAGE - (2 << 30), 2 << 30)
    await invalidate(cache, layer, IMAGE - (2 << 30), 2 << 30)


async def _changed(cache: Cache, layer: Layer) -> None:
    """All of the image is overtaken while some of it is fetched."""
    filler = Filler(cache, layer, cast("Any", SimpleNamespace(size=IMAGE)), cast("Any", None))
    flight = Flight(5 * BLOCK, 16 * BLOCK)
    filler._flights.update(dict.fromkeys(flight.blocks(), flight))
    with (
        cache.in_flight.overwriting(layer, 0, IMAGE),
        cache.in_flight.filling(layer, flight.blocks()) as cells,
    ):
        assert all(cell == [0xFFFF] for cell in cells.values())
    with cache.in_flight.filling(layer, flight.blocks()) as cells:
        filler.overtaken(6 * BLOCK + 4096, IMAGE // 2)
        assert [cell[0] for cell in cells.values()][:3] == [0, 0xFFFE, 0xFFFF]
    assert not filler._flights
    await _reclaimed(cache, layer)


async def _looked_through(cache: Cache, layer: Layer) -> None:
    """What a full copy asks of all of an image: where it ends, nothing is missing but what was never there."""
    size = 16 << 30
    filler = Filler(cache, layer, cast("Any", SimpleNamespace(size=size)), cast("Any", None))
    gaps = await filler.missing(0, size)
    assert sum(part for _, part in gaps) == size, "of each block there is one sector"


async def _pinned(cache: Cache, layer: Layer) -> None:
    await pin_layer(cache, layer, pinned=True)
    assert not cache.slots.placement.evictable()
    await pin_layer(cache, layer, pinned=False)
    assert cache.slots.placement.evictable() == SLOTS


async def _at_its_cap(cache: Cache, layer: Layer) -> None:
    """A block is to be kept of an image that has all that it may have, and each of them was asked for."""
    layer.cap = SLOTS
    state = cache.slots.placement.state
    for slot in range(SLOTS):
        state[slot] |= TOUCHED
    block = 5 * SLOTS
    await trio.lowlevel.checkpoint()
    with cache.in_flight.filling(layer, [block]) as cells:
        await store(cache, layer, block * BLOCK, b"x" * BLOCK, cells)
    assert layer.pages.page(block // PAGE_BLOCKS)[block % PAGE_BLOCKS] & 0xFFFF == 0xFFFF
    assert layer.slots == SLOTS


async def _shed(cache: Cache, layer: Layer) -> None:
    """There are more pages in memory than are kept."""
    with mock.patch.object(forebay_cache.layers.registry, "PAGES_KEPT", 16):
        while len(layer.pages) > 16:  # noqa: ASYNC110
            await trio.sleep(0.05)


@pytest.mark.parametrize(
    ("do", "private"),
    [
        (_looked_through, False),
        (_pinned, False),
        (_shed, False),
        (_at_its_cap, False),
        (_reclaimed, True),
        (_reclaimed, False),
        (_zeroed, True),
        (_overwritten, False),
        (_changed, False),
    ],
)
def test_no_step_is_longer_than_a_slice(
    tmp_path: Path, do: Callable[[Cache, Layer], Awaitable[None]], private: bool
) -> None:
    played(tmp_path, do, private=private)


async def _all_at_once(task: Callable[[int], Awaitable[object]]) -> None:
    async with trio.open_nursery() as nursery:
        for n in range(MANY):
            nursery.start_soon(task, n)


def _view(cache: Cache, layer: Layer) -> View:
    async def fetch(offset: int, length: int) -> bytes:
        del offset
        await trio.lowlevel.checkpoint()
        return bytes(length)

    return View(cache, [], layer, fetch)


async def _surveyed(cache: Cache, layer: Layer) -> None:
    view = _view(cache, layer)
    await _all_at_once(lambda n: survey(view, n << 26, 1 << 26, 4096))


async def _read(cache: Cache, layer: Layer) -> None:
    """Two sectors of each block are zeros, and the image has the others."""
    words = array("Q", [pack(NO_SLOT, 0x110, 0x110)] * PAGE_BLOCKS)
    for page in layer.pages.by_number.values():
        page[:PAGE_BLOCKS] = words
    view = _view(cache, layer)

    async def read(n: int) -> None:
        found = await view.read(n << 24, 1 << 24, slices=True)
        assert sum(map(len, found)) == 1 << 24

    await _all_at_once(read)


async def _invalidated(cache: Cache, layer: Layer) -> None:
    await _all_at_once(lambda n: invalidate(cache, layer, n << 25, 1 << 25))


@pytest.mark.parametrize("do", [_surveyed, _read, _invalidated])
def test_no_turn_is_longer_however_many_ask(
    tmp_path: Path, do: Callable[[Cache, Layer], Awaitable[None]]
) -> None:
    played(tmp_path, do, private=False, count=Turns)


class Own(trio.abc.Instrument):
    """Counts the steps of one task."""

    def __init__(self, task: trio.lowlevel.Task) -> None:
        self.steps = 0
        self._task = task

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += task is self._task


def test_a_long_write_is_stored_by_parts(tmp_path: Path) -> None:
    size = 8 << 20
    dice = Dice("parts")

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            host = Host(tmp_path, FakeOrigin(dice, bytes(size)), nursery, 4 * size)
            await host.start()
            disk = await host.attach("d", settings(Mode.WRITE_BACK))
            await disk.write(0, memoryview(b"a" * 4096), False)
            assert disk.write_now([(0, memoryview(b"w" * PIECE))]) == 1
            assert disk.write_now([(0, memoryview(b"w" * size))]) == 0
            own = Own(trio.lowlevel.current_task())
            trio.lowlevel.add_instrument(own)
            await disk.write(0, memoryview(b"w" * size), False)
            trio.lowlevel.remove_instrument(own)
            assert own.steps >= size // PIECE
            await host._end()
            host.cache.release()

    with simulated(dice):
        trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))
