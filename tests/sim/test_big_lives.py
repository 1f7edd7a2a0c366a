# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""No long stop of the loop, part two: starts after a stop, a kill and a power cut, a device that fails and is taken
back, an index that fails, and the commands that `test_big_cache` does not ask.

See `big_bed` for the gateway. What comes before the disks are served, `open_cache`, may take as long as it takes, but
must not take longer on a larger cache: the search for free slots goes on beside guests.
"""

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import trio

import forebay_cache
import forebay_cache.durable.hot
import forebay_cache.durable.intent
import forebay_cache.layers.invalidation
import forebay_cache.offline.opening
import forebay_cache.offline.recovery
from forebay.doors.tenant import Rule
from forebay.errors import ForebayError
from forebay.process.watchdog import Watch, _summary
from forebay.storage.state import open_cache
from forebay.units import Mode
from forebay_cache import Cache, mark_hot
from forebay_cache.durable.intent import MOST_PAGES
from forebay_cache.errors import IndexFault
from forebay_cache.format.geometry import PAGE_SHIFT, SECTOR
from forebay_cache.index.index import Index
from forebay_cache.layers.invalidation import Invalidations
from real.commands_bed import nothing
from sim.big_bed import GIB, IMAGE, MORE, SLICE, SNAPSHOT, Big, Disks, collected
from sim.steps import Steps

DISKS: Disks = {
    "dense": (Mode.WRITE_THROUGH, 4_000_000, 64),
    "sparse": (Mode.WRITE_THROUGH, 1_000_000, 1),
    "shadowed": (Mode.WRITE_BACK, 250_000, 2),
    "conflict": (Mode.WRITE_BACK, 50_000, 2),
    "overlay": (Mode.WRITE_BACK, 500_000, 16),
    "other": (Mode.WRITE_BACK, 0, 1),
}


PARTS = (512, 128)
MOST = 512
"""So many pages, and groups of checksums, a commit takes in here: a sixteenth, so that there is less to do."""
SMALL_SNAPSHOT = SNAPSHOT * MOST // MOST_PAGES + 3000
"""Lines in the snapshot of such a commit."""
HOT = GIB // 2
"""So much of an image may be written when a life ends."""


async def scanned(it: Big) -> None:
    while it.cache.slots.scan is not None:  # noqa: ASYNC110
        await trio.sleep(0.05)


async def told(it: Big) -> None:
    it.gateway.status()
    it.gateway.info()
    disks = it.gateway.attached()
    assert await Watch().stuck(disks) is None
    assert (await _summary(disks)).startswith(f"{len(DISKS)} disks")


async def attached(it: Big) -> None:
    os.truncate(it.image("late"), IMAGE)
    await it.gateway.attach("late", "images:late", mode=Mode.WRITE_BACK)
    await it.write("late")
    await it.gateway.set_peer("late", Rule("first"), evict=True)
    await it.gateway.detach("late", force=True, progress=nothing)
    await it.gateway.attach("second", "images:overlay", overlay=True)
    await it.write("second")
    await it.gateway.detach("second", progress=nothing)


async def saved(it: Big) -> None:
    with trio.move_on_after(1):
        await it.gateway.save("overlay", "images:copy", partial=True, progress=nothing)


async def preloaded(it: Big) -> None:
    with trio.move_on_after(0.5):
        await it.gateway.preload("sparse", "all", nothing)


async def anew(it: Big) -> None:
    """Have writes go to a layer that was made in this life: its pages do not have to be loaded."""
    await it.gateway.flush(["other"], progress=nothing)
    await it.write("other")


async def burst(it: Big) -> None:
    """As many writes as a commit takes in, to other pages each time."""
    write, data = it.disk("other").disk.write_now, memoryview(bytes(SECTOR))
    for page in range(it.page, it.page + 2 * MOST):
        if page % 16 == 0:
            await trio.lowlevel.checkpoint()
        it.page += write([(page << PAGE_SHIFT, data)])


async def uncommitted(it: Big) -> None:
    """A commit fails that had as much as it takes in, while as much as possible has come for the next one."""
    goes_on, may_fail, token = trio.Event(), threading.Event(), trio.lowlevel.current_trio_token()

    def fails(_index: Index, _changes: object) -> None:
        token.run_sync_soon(goes_on.set)
        may_fail.wait()
        raise IndexFault(errno.ENOSPC, "planted: the index is full")

    async def commit() -> None:
        with pytest.raises(IndexFault):
            await it.cache.commit()

    await anew(it)
    async with it.cache.commit.suspended():
        await burst(it)
    with mock.patch.object(Index, "_commit", fails):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(commit)
            await goes_on.wait()
            await burst(it)
            may_fail.set()
    await it.cache.commit()


async def released(it: Big) -> None:
    with pytest.raises(ForebayError, match="attached"):
        await it.gateway.release_cache(nothing)


async def repaired(it: Big) -> None:
    with trio.move_on_after(1):
        await it.gateway.repair_cache(nothing)


async def resolved(it: Big) -> None:
    os.utime(it.images / "conflict")
    await it.disk("conflict").disk.image.look()
    await it.gateway.resolve("conflict", "mine", sure=True, progress=nothing)
    await it.reclaimed()


async def failed(it: Big) -> None:
    await anew(it)
    async with it.cache.commit.suspended():
        await burst(it)
        it.cache.failure.fail(OSError(errno.EIO, "planted: the device fails"))
    await trio.sleep(0.3)


async def uncovered(it: Big) -> None:
    """A pass while the device fails: what lies below what it takes to the image is out of date."""
    await it.gateway.flush(["shadowed"], progress=nothing)


async def overwritten(it: Big) -> None:
    """Writes to an image that go past the cache while the device fails."""
    disk = it.disk("sparse").disk
    data = memoryview(bytes(SECTOR))
    numbers = await disk.image.layer.pages.numbers()
    for number in numbers[: 2 * MOST]:
        await disk.write(number << PAGE_SHIFT, data, False)


async def revived(it: Big) -> None:
    await forebay_cache.revive(it.cache)
    assert it.cache.failed is None
    await it.cache.commit()
    await it.reclaimed()


async def dirtied(it: Big) -> None:
    """What a start finds in the journal: writes, and regions whose origin may be written."""
    await mark_hot(it.cache, it.disk("dense").disk.image.layer, 0, HOT)
    await it.cache.commit()
    await anew(it)
    await burst(it)


async def stopped(it: Big) -> None:
    await it.gateway.stop()
    await it.cache.commit.close()


async def restarted(it: Big) -> None:
    await it.gateway.stop(restart=True)


Do = Callable[[Big], Awaitable[None]]


def opened(it: Big) -> tuple[Cache, int]:
    """The cache, and how many lines that took."""
    lines = 0

    def count(_frame: FrameType, _event: str, _arg: object) -> Any:
        nonlocal lines
        lines += 1
        return count

    sys.settrace(count)
    try:
        return open_cache(it.config), lines
    finally:
        sys.settrace(None)


class Life(NamedTuple):
    """One life of the gateway, ended as by a kill."""

    name: str
    boot: str
    done: Sequence[Do]


LIVES = (
    Life(
        "first", "A", (scanned, told, attached, saved, preloaded, resolved, uncommitted, repaired)
    ),
    Life("failing", "A", (scanned, failed, uncovered, overwritten, revived, told, dirtied)),
    Life("killed", "A", (scanned, told, dirtied)),
    Life("cut", "B", (scanned, dirtied, restarted)),
    Life("restarted", "B", (scanned, stopped)),
    Life("stopped", "B", (scanned, released)),
)


@contextlib.contextmanager
def small_commits() -> Iterator[None]:
    with (
        mock.patch.object(forebay_cache.durable.intent, "MOST_PAGES", MOST),
        mock.patch.object(forebay_cache.durable.intent, "MOST_SUMS", MOST),
        mock.patch.object(forebay_cache.layers.invalidation, "MOST_PAGES", MOST),
        mock.patch.object(forebay_cache.layers.invalidation, "_MORE_PAGES", MOST // 8),
        mock.patch.object(forebay_cache.durable.hot, "MOST_NEW", MOST // 4),
        mock.patch.object(forebay_cache.durable.hot, "_GONE_AT_ONCE", MOST // 2),
        mock.patch.object(forebay_cache.offline.recovery, "SCAN_AT_ONCE", 0),
    ):
        yield


def lived(
    directory: Path, part: int, lives: Sequence[Life] = LIVES, meter: type[Steps] = Steps
) -> tuple[dict[str, Steps], dict[str, int]]:
    """One life after the other.

    Returns the longest steps of each start and of each thing that was done, and how many lines each opening took.
    """
    found: dict[str, Steps] = {}
    openings: dict[str, int] = {}
    it = Big(directory, part, DISKS)
    it.both = ("shadowed",)
    trio.run(it.make)
    it.fill()

    async def live(one: Life) -> None:
        cache, openings[one.name] = opened(it)
        start = found[one.name] = meter()
        async with contextlib.AsyncExitStack() as stack:
            with start.counting():
                await trio.lowlevel.checkpoint()
                await stack.enter_async_context(it.served(cache))
                await trio.lowlevel.checkpoint()
            for do in one.done:
                steps = found[f"{one.name}: {do.__name__}"] = meter()
                with steps.counting():
                    await trio.lowlevel.checkpoint()
                    await do(it)
                    await trio.lowlevel.checkpoint()

    with small_commits(), collected():
        for one in lives:
            with mock.patch.object(forebay_cache.offline.opening, "boot_id", return_value=one.boot):
                trio.run(live, one)
    return found, openings


EXPECTED = pytest.mark.expect_log(
    "was changed by somebody else|its conflict was resolved|planted: the |did not take the sockets"
)


def check(found: dict[str, Steps]) -> None:
    for name, steps in found.items():
        assert steps.most[0] <= SLICE, (name, steps.most)
        assert steps.snapshot <= SMALL_SNAPSHOT, (name, steps.snapshot)


@EXPECTED
@pytest.mark.timeout(300)
def test_no_step_is_longer_than_a_slice_or_grows_with_the_cache(quick: Path) -> None:
    (small, few), (large, many) = (lived(quick / str(part), part) for part in PARTS)
    check(large)
    shorter, longer = (max(x.most for x in found.values()) for found in (small, large))
    assert longer[0] <= shorter[0] + MORE, (shorter, longer)
    for name in (
        "first",
        "restarted",
        "stopped",
    ):  # the others have as much to do as is in the journal
        assert many[name] <= few[name] + MORE, (name, many[name], few[name])


FAILING = (Life("failing", "A", (scanned, failed, uncovered, overwritten, revived)),)


async def _nothing_is_stored(_: Invalidations) -> None:
    pass


@EXPECTED
def test_a_revival_with_too_much_to_commit_is_found(
    quick: Path,
) -> None:
    """Planted: what was dropped while the device failed waits for one commit."""
    with mock.patch.object(Invalidations, "_store_pages", _nothing_is_stored):
        found, _ = lived(quick, PARTS[1], FAILING)
    assert found["failing: revived"].snapshot > SMALL_SNAPSHOT
