# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""No long stop of the loop: a cache of 1 TiB, images of 4 TiB, 10 million slots in use, and everything that is asked.

The real gateway on sparse files. What is in the slots is put into the index between two lives, and is zeros. By
default all is done with a 256th and with a 64th of the slots, and no step may be longer than a slice, nor grow with
their number. ``FOREBAY_BIG_CACHE=1`` does it with all of them, and tells how long each step was (tests/README.md).
"""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import trio

import forebay_cache.blocks.pin
import forebay_cache.durable.intent
import forebay_cache.index.pages
import forebay_cache.layers.eviction
import forebay_cache.layers.reclaim
import forebay_cache.layers.registry
import forebay_cache.layers.shedding
import forebay_cache.offline.recovery
from forebay.disk.modes import Modes
from forebay.units import Mode
from forebay_cache import mark_hot, pin_layer
from forebay_cache.durable.intent import MOST_PAGES
from forebay_cache.format.geometry import BLOCK, PAGE_SHIFT, SECTOR
from real.commands_bed import nothing
from sim.big_bed import GIB, IMAGE, MORE, PARTS, SLICE, SNAPSHOT, Big, collected
from sim.steps import Milliseconds, Steps

# -- what is done ---------------------------------------------------------------------------------------------------


async def scanned(it: Big) -> None:
    while it.cache.slots.scan is not None:  # noqa: ASYNC110
        await trio.sleep(0.05)


async def told(it: Big) -> None:
    assert [one async for one in it.gateway.statuses()]
    await it.gateway.metrics()
    it.gateway.cache_info()


async def loaded(it: Big) -> None:
    """All private pages are in memory from then on, as they are where they were written in this life."""
    for name in ("conflict", "overlay"):
        pages = it.disk(name).disk.view.private[0].pages
        numbers = await pages.numbers()
        for n in range(0, len(numbers), 128):
            await pages.load_all(numbers[n : n + 128])


async def mapped(it: Big) -> None:
    for name in ("dense", "sparse", "dirty", "conflict"):
        for at in range(0, IMAGE, IMAGE // 8):
            await it.disk(name).disk.extents("base:allocation", at, (4 * GIB) - SECTOR, one=False)


async def pinned(it: Big) -> None:
    layer = it.disk("sparse").disk.image.layer
    await pin_layer(it.cache, layer, pinned=True)
    await pin_layer(it.cache, layer, pinned=False)


async def evicted(it: Big) -> None:
    slots = it.cache.slots
    before, slots.low = slots.evicted_blocks, slots.placement.free + 2048
    slots.want_eviction()
    while slots.evicted_blocks < before + 2048:  # noqa: ASYNC110
        await trio.sleep(0.05)


async def shed(it: Big) -> None:
    with mock.patch.object(forebay_cache.layers.registry, "PAGES_KEPT", 0):
        while sum(len(x.pages) for x in it.cache.layers if not x.private) > 100:  # noqa: ASYNC110
            await trio.sleep(0.05)


async def cooled(it: Big) -> None:
    image = it.disk("dense").disk.image
    await mark_hot(it.cache, image.layer, 0, IMAGE // it.part)
    image.clean.cool()
    await it.cache.commit()


async def hot_dropped(it: Big) -> None:
    image = it.disk("dense").disk.image
    await mark_hot(it.cache, image.layer, 0, 2 * GIB)
    await image.clean.drop_hot()
    image.clean.cool()


async def burst(it: Big) -> None:
    """Writes as fast as the cache takes them while no commit is made: then all that may wait is in one commit."""
    await it.gateway.flush(
        ["other"], progress=nothing
    )  # the layer from now on was made in this life
    await it.write("other")
    write = it.disk("other").disk.write_now
    data = memoryview(bytes(SECTOR))
    page = 1
    async with it.cache.commit.suspended():
        while write([(page << PAGE_SHIFT, data)]):
            page += 1
            if page % 16 == 0:
                await trio.lowlevel.checkpoint()
    assert page > 1000
    await it.cache.commit()


async def trimmed(it: Big) -> None:
    await it.disk("other").disk.trim(IMAGE // 2, GIB // 2, False)


async def mode_changed(it: Big) -> None:
    for mode in (Mode.WRITE_BACK, Mode.NONE, Mode.WRITE_AROUND):
        await it.gateway.set_mode("dense", mode, nothing)


async def copied(it: Big) -> None:
    """In full, which there is no room for: it goes on for a moment."""
    allowed = mock.Mock()
    with mock.patch.multiple(Modes, check_fits=allowed, check_may_enter=allowed):
        await it.gateway.set_mode("sparse", Mode.FULL_COPY, nothing)
        await trio.sleep(0.3)
    await it.gateway.set_mode("sparse", Mode.NONE, nothing)


async def preloaded(it: Big) -> None:
    await it.gateway.preload("changed", GIB, nothing)


async def image_changed(it: Big) -> None:
    os.utime(it.images / "changed")
    await it.disk("changed").disk.image.look()
    await it.reclaimed()


async def flushed(it: Big) -> None:
    """A pass: frozen, into the journal, into the image, settled, committed, dropped."""
    await it.gateway.flush(["dirty"], progress=nothing)
    await it.reclaimed()


async def detached(it: Big) -> None:
    await it.gateway.detach("dirty", progress=nothing)


async def resolved(it: Big) -> None:
    os.utime(it.images / "conflict")
    await it.disk("conflict").disk.image.look()
    await it.gateway.resolve("conflict", "image", sure=True, progress=nothing)
    await it.reclaimed()


async def discarded(it: Big) -> None:
    await it.gateway.detach("overlay", discard=True, progress=nothing)
    await it.reclaimed()


async def scrubbed(it: Big) -> None:
    with trio.move_on_after(1):
        await it.gateway.scrub(nothing)


async def extended(it: Big) -> None:
    os.truncate(it.device, it.device.stat().st_size * 9 // 8)
    await it.gateway.extend_cache(None, nothing)


async def stopped(it: Big) -> None:
    await it.gateway.stop()


Do = Callable[[Big], Awaitable[None]]

DONE: tuple[Do, ...] = (
    scanned,
    told,
    loaded,
    told,
    mapped,
    pinned,
    evicted,
    shed,
    cooled,
    hot_dropped,
    burst,
    trimmed,
    mode_changed,
    copied,
    preloaded,
    image_changed,
    flushed,
    detached,
    resolved,
    discarded,
    scrubbed,
    extended,
    stopped,
)


# -- how long the steps are -----------------------------------------------------------------------------------------


def played(
    directory: Path, part: int, done: tuple[Do, ...] = DONE, meter: type[Steps] = Steps
) -> dict[str, Steps]:
    """Do it all with a part of the slots. Returns the longest steps of each thing that was done."""
    found: dict[str, Steps] = {}

    async def life() -> None:
        async with it.life():
            for do in done:
                steps = found.setdefault(do.__name__, meter())
                with steps.counting():
                    await trio.lowlevel.checkpoint()
                    await do(it)
                    await trio.lowlevel.checkpoint()

    it = Big(directory, part)
    trio.run(it.make)
    it.fill()
    with mock.patch.object(forebay_cache.offline.recovery, "SCAN_AT_ONCE", 0), collected():
        trio.run(life)
    return found


EXPECTED = pytest.mark.expect_log(
    "was changed by somebody else|its conflict was resolved|copying paused"
)


@EXPECTED
@pytest.mark.timeout(300)
def test_no_step_is_longer_than_a_slice_or_grows_with_the_cache(quick: Path) -> None:
    small, large = (played(quick / str(part), part) for part in PARTS)
    for name, steps in large.items():
        assert steps.most[0] <= SLICE, (name, steps.most)
        assert steps.snapshot <= SNAPSHOT, (name, steps.snapshot)
    few, many = (max(steps.most for steps in found.values()) for found in (small, large))
    assert many[0] <= few[0] + MORE, (few, many)


@EXPECTED
@pytest.mark.timeout(0)
@pytest.mark.skipif(
    "FOREBAY_BIG_CACHE" not in os.environ, reason="FOREBAY_BIG_CACHE=1: an hour or more"
)
def test_the_whole_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    took = played(tmp_path / "took", 1, meter=Milliseconds)
    found = played(tmp_path / "steps", 1)
    with capsys.disabled():
        for name, steps in found.items():
            ms = took[name]
            assert isinstance(ms, Milliseconds)
            print(f"{name:16}{steps.most[0]:8} lines{steps.snapshot:8} in a snapshot", end="")
            print(f"{ms.most[0]:8.1f} ms{ms.snapshot:8.1f}, collection {ms.collection:.1f}", end="")
            print(f"   {steps.most[1]}")
    for name, steps in found.items():
        assert steps.most[0] <= SLICE, (name, steps.most)
        assert steps.snapshot <= SNAPSHOT, (name, steps.snapshot)


async def _without_a_pause() -> None:
    pass


@pytest.mark.parametrize(
    ("module", "done"),
    [
        (forebay_cache.layers.reclaim, (scanned, image_changed)),
        (forebay_cache.layers.eviction, (scanned, mapped, evicted)),
        (forebay_cache.layers.shedding, (scanned, pinned, shed)),
        (forebay_cache.blocks.pin, (scanned, pinned)),
        (forebay_cache.index.pages, (scanned, pinned)),
    ],
    ids=lambda x: x.__name__.rpartition(".")[2] if hasattr(x, "__name__") else "",
)
@EXPECTED
def test_a_slice_that_was_made_long_is_found(
    quick: Path, module: Any, done: tuple[Do, ...]
) -> None:
    """Planted: one kind of long work does not let others go on."""
    planted = SimpleNamespace(**vars(trio))
    planted.lowlevel = SimpleNamespace(checkpoint=_without_a_pause)
    with mock.patch.object(module, "trio", planted):
        found = played(quick, PARTS[1], done)
    assert max(steps.most[0] for steps in found.values()) > SLICE


def test_a_commit_that_takes_in_too_much_is_found(quick: Path) -> None:
    """Planted: whoever changes something waits for a commit only when it has twice as much to store."""
    with mock.patch.object(forebay_cache.durable.intent, "MOST_PAGES", 2 * MOST_PAGES):
        found = played(quick, PARTS[1], (scanned, burst))
    assert found["burst"].snapshot > SNAPSHOT


def test_whoever_would_change_more_checksums_than_a_commit_takes_in_waits_for_it(
    quick: Path,
) -> None:
    async def full(it: Big) -> None:
        cache, disk = it.cache, it.disk("other").disk
        await it.gateway.flush(["other"], progress=nothing)
        await it.write("other")
        data = memoryview(bytes(BLOCK))
        async with cache.commit.suspended():
            blocks = iter(range(1, 1000))
            while disk.write_now([(next(blocks) * BLOCK, data)]):
                pass
            assert len(cache.sums.unstored) == 4
        await cache.commit()
        assert disk.write_now([(next(blocks) * BLOCK, data)])

    with mock.patch.object(forebay_cache.durable.intent, "MOST_SUMS", 4):
        played(quick, PARTS[0], (scanned, full))
