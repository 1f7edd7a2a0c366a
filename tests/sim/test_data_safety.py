# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Faults that cost data or a daemon once, each step by step on the simulated host."""

import errno
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import lmdb
import pytest
import trio
import trio.lowlevel
import trio.testing

import forebay.checkpoint.passes
import forebay_cache.layers.registry
import forebay_cache.offline.recovery
import forebay_cache.read.check
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.image import kept as kept_writes
from forebay.image.image import Image
from forebay.units import Mode
from forebay_cache import mark_hot, open_cache, pin_layer, scrub, settle
from forebay_cache.blocks import private, store
from forebay_cache.format.entry import NO_SLOT, slot_of, slots_in
from forebay_cache.format.geometry import BLOCK, SECTOR, SECTORS
from forebay_cache.index.changes import Changes
from forebay_cache.index.sums import UNKNOWN
from forebay_cache.read.check import read_slots
from forebay_cache.slots.placement import TOUCHED, UNSCANNED
from forebay_cache.upkeep.revive import revive
from sim.fake_host import Host, check_cache, nothing, settings
from sim.fake_loop import Dice, simulated
from sim.fake_origin import FakeOrigin, FakeSource

# The package has functions of these names.
SCRUB, SETTLE = (
    import_module("forebay_cache.upkeep.scrub"),
    import_module("forebay_cache.blocks.settle"),
)

SIZE = 24 * BLOCK
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK


def play(
    directory: Path,
    story: Callable[[Host], Awaitable[None]],
) -> None:
    """Tell a story on a host whose image holds nothing but ``OLD``. Everything in it follows from one seed."""
    dice = Dice("story")

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            host = Host(directory, FakeOrigin(dice, OLD * (SIZE // BLOCK)), nursery)
            await host.start()
            await story(host)
            await host._end()
            host.cache.release()

    with simulated(dice), mock.patch.object(forebay_cache.layers.registry, "PAGES_KEPT", 32768):
        trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))


async def read(disk: Disk, offset: int = 0, length: int = BLOCK) -> bytes:
    """As a guest does."""
    return b"".join(bytes(part) for part in await disk.read(offset, length))


# -- what is given up leaves nothing behind ---------------------------------------------------------------------


@pytest.mark.expect_log("write-back failed|dropped as asked")
@pytest.mark.parametrize("restarted", [False, True])
def test_what_an_unfinished_pass_wrote_is_read_after_a_discard(
    tmp_path: Path, restarted: bool
) -> None:
    """The frozen layer hid the clean blocks of before; they must not be served once it is dropped."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        assert await read(disk) == OLD
        await disk.write(0, memoryview(NEW), False)
        host.origin.faults["flush of data"] = -1
        with pytest.raises(OSError, match="injected"):
            await disk.writeback.checkpoint()
        assert host.origin.visible[:BLOCK] == NEW
        if restarted:
            await host.stop()
            await host.start()
            disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        assert disk.dirty_bytes
        host.origin.heal()
        await host.detach("d", discard=True)
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert await read(disk) == NEW

    play(tmp_path, story)


@pytest.mark.expect_log("dropped as asked")
def test_the_marker_goes_after_what_it_tells_of(tmp_path: Path) -> None:
    """A daemon killed in between finds both, or neither."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(0, memoryview(NEW), True)
        await host.cache.commit()
        layer = disk.view.private[0].id
        marker = host.sources["d"].claim
        assert marker is not None
        clean = marker.mark_clean

        async def watched() -> None:
            assert host.cache.index.layers()[layer].dead, "the data would be back after a kill"
            await clean()

        marker.mark_clean = watched  # type: ignore[method-assign]
        await host.detach("d", discard=True)
        assert not marker.is_dirty

    play(tmp_path, story)


@pytest.mark.expect_log("write-back failed")
@pytest.mark.parametrize("killed", [False, True])
def test_a_marker_that_could_not_be_cleared_is_cleared_later(tmp_path: Path, killed: bool) -> None:
    """Or that a kill came before: nothing is dirty any more, and nothing is written again."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(0, memoryview(NEW), True)
        marker = host.sources["d"].claim
        assert marker is not None
        host.origin.faults["marker"] = 1
        with pytest.raises(OSError, match="marker"):
            await disk.drain(nothing)
        assert disk.dirty_bytes == 0
        assert marker.is_dirty
        if killed:
            await host.kill(host.snapshot())
            await host.start()
            disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
            marker = host.sources["d"].claim
            assert marker is not None
            assert marker.is_dirty
        await trio.sleep(5)
        assert not marker.is_dirty
        assert disk.report.state() == "ready"
        await disk.write(0, memoryview(OLD), True)
        assert marker.is_dirty, "that it was cleared was noted"

    play(tmp_path, story)


@pytest.mark.expect_log("write-back failed")
@pytest.mark.parametrize("fails", ["flush", "commit", "late"])
def test_what_fails_before_the_marker_is_cleared_is_done_again(tmp_path: Path, fails: str) -> None:
    """All of the pass went well but its very end. `late`: given up, and done all the same."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        marker, cache, calls = host.sources["d"].claim, host.cache, 0
        assert marker is not None
        await disk.write(0, memoryview(NEW), True)
        whole: tuple[Any, str] = {
            "flush": (disk.image, "flush"),
            "commit": (cache.commit, "records"),
            "late": (marker, "mark_clean"),
        }[fails]
        do = getattr(*whole)

        async def once(*arguments: Any, **options: Any) -> None:
            nonlocal calls
            calls += disk.dirty_bytes == 0
            if fails == "late" and calls == 1:
                await do()
            if calls == 1:
                raise OSError(errno.EIO, "injected")
            await do(*arguments, **options)

        with mock.patch.object(*whole, once):
            with pytest.raises(OSError, match="injected"):
                await disk.drain(nothing)
            assert disk.report.state() == "lagging"
            await trio.sleep(5)  # sooner than for a marker that nobody needs
        assert disk.report.state() == "ready"
        assert not marker.is_dirty

    play(tmp_path, story)


def test_a_marker_with_nothing_dirty_behind_it_is_cleared(tmp_path: Path) -> None:
    """It was set for a write that could not be made."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        marker = host.sources["d"].claim
        assert marker is not None
        found = []
        await disk.dirty.mark.set()
        await trio.sleep(5)
        found.append(marker.is_dirty)  # one that is used all the time is not written time and again
        await trio.sleep(10)
        found.append(marker.is_dirty)
        await disk.write(0, memoryview(NEW), True)
        found.append(marker.is_dirty)
        assert found == [True, False, True]

    play(tmp_path, story)


@pytest.mark.expect_log("write-back failed")
def test_a_marker_that_cannot_be_reached_is_not_asked_for_time_and_again(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(0, memoryview(NEW), True)
        host.origin.faults["marker"] = 1
        with pytest.raises(OSError, match="marker"):
            await disk.drain(nothing)
        checkpoint, passes = disk.writeback.checkpoint, 0

        async def counted(*arguments: Any) -> None:
            nonlocal passes
            passes += 1
            await checkpoint(*arguments)

        with (
            mock.patch.object(Image, "origin", None),
            mock.patch.object(disk.writeback, "checkpoint", counted),
        ):
            await trio.sleep(3)
        assert passes <= 3

    play(tmp_path, story)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_write_that_had_to_wait_is_announced_again(tmp_path: Path, zeros: bool) -> None:
    """A pass ends while it waits for room, say, and notes beside the image that this has everything."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        marker = host.sources["d"].claim
        assert marker is not None
        name = "zero" if zeros else "write"
        store, prepare = getattr(private, name), private.prepare

        def refused(*_: object) -> bool:
            setattr(private, name, store)
            return False

        async def a_pass_ends(*args: Any, **options: Any) -> None:
            await prepare(*args, **options)
            await disk.dirty.mark.clear()
            assert not marker.is_dirty

        with (
            mock.patch.object(private, name, refused),
            mock.patch.object(private, "prepare", a_pass_ends),
        ):
            if zeros:
                await disk.zero(0, BLOCK, True, True, False)
            else:
                await disk.write(0, memoryview(NEW), True)
        assert disk.dirty_bytes == BLOCK
        assert marker.is_dirty, "only the cache has it, and nothing says so"

    play(tmp_path, story)


def test_a_disk_never_takes_what_was_written_for_another_image(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(0, memoryview(NEW), True)
        await host.stop()
        await host.start()
        with pytest.raises(ForebayError, match=r"'d' wrote for images:fake\.raw"):
            await host.attach("d", settings(Mode.WRITE_BACK), key="images:other.raw")
        await host.attach("e", settings(Mode.WRITE_BACK), key="images:other.raw")
        disk = await host.attach("d", settings(Mode.WRITE_BACK))
        assert await read(disk) == NEW

    play(tmp_path, story)


@pytest.mark.expect_log(
    "write-back failed|its cached blocks are dropped"
)  # the journal is applied at the end
def test_a_disk_that_is_not_served_is_given_up_whole(tmp_path: Path) -> None:
    """With it go the clean blocks under a pass that was not finished, for the other disks on the image too."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        assert await read(disk) == OLD
        await disk.write(0, memoryview(NEW), False)
        host.origin.faults["flush of data"] = -1
        with pytest.raises(OSError, match="injected"):
            await disk.writeback.checkpoint()
        await host.stop()
        host.origin.heal()
        for other in (False, True):
            await host.start()
            overlay = await host.attach("o", settings(Mode.WRITE_BACK), overlay=True)
            if other:
                host.images.drop_disk("d", "images:fake.raw")
                assert await read(overlay) == NEW
                assert not host.cache.layers.private_of("d")
            else:
                assert await read(overlay) == OLD
            await host.stop()
        await host.start()
        host.images.drop_disk("d", "images:fake.raw")
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert await read(disk) == NEW

    play(tmp_path, story)


# -- what looks like damage and is none -------------------------------------------------------------------------


@pytest.mark.parametrize("paged_out", [False, True])
def test_a_sector_that_is_overwritten_again_and_again_can_be_read(
    tmp_path: Path, paged_out: bool
) -> None:
    """Together with one that has to be checked, while each check comes too late for the first."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(0, memoryview(NEW), False)
        host.cache.ready.forget()
        version = 0

        def overwritten_meanwhile(*args: Any) -> object:
            nonlocal version
            found = read_slots(*args)
            if version < 9:
                version += 1
                assert disk.write_now([(0, memoryview(bytes([version]) * SECTOR))])
                disk.publish()
            if version < 9 and paged_out:
                host.cache.ready.forget()
            return found

        with mock.patch.object(forebay_cache.read.check, "read_slots", overwritten_meanwhile):
            got = await read(disk, 0, 2 * SECTOR)
        assert got == bytes([version]) * SECTOR + NEW[:SECTOR]
        assert version == (9 if paged_out else 1)

    play(tmp_path, story)


def test_scrub_does_not_judge_what_changes_under_it(tmp_path: Path) -> None:
    """Sums that nobody had in memory before, and a sector that moved away and came back."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        cache = host.cache

        def write(data: bytes) -> None:
            """Acknowledged and, as if by a guest's flush, durable: the next version goes to the other place."""
            for slot in range(cache.index.meta.frontier):
                cache.sums.load_now(slot)
            assert disk.write_now([(0, memoryview(data))])
            disk.publish()
            cache.device.sync()
            cache.intent.open_sectors.clear()

        await disk.write(0, memoryview(NEW), True)
        for data in (b"1", b"2"):
            write(data * SECTOR)
        await cache.commit()
        cache.sums.state[:] = bytes([UNKNOWN]) * cache.device.slots

        read_slot = SCRUB.read_slot

        def changed_meanwhile(*args: Any) -> object:
            found = read_slot(*args)
            for data in (b"3", b"4"):
                write(data * SECTOR)
            return found

        with mock.patch.object(SCRUB, "read_slot", changed_meanwhile):
            found = await scrub(cache, lambda *_: None)
        assert (found.damaged_private, found.checked_bytes) == (0, BLOCK)

    play(tmp_path, story)


@pytest.mark.expect_log("write-back failed")
def test_a_settled_block_that_was_copied_in_part_is_not_damaged(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        assert await read(disk) == OLD
        await disk.write(0, memoryview(NEW[:SECTOR]), False)
        copy = SETTLE._copy_sectors

        def interrupted(*args: Any) -> None:
            copy(*args)
            raise OSError("injected")

        with (
            mock.patch.object(SETTLE, "_copy_sectors", interrupted),
            pytest.raises(OSError, match="injected"),
        ):
            await disk.writeback.checkpoint()
        found = await scrub(host.cache, lambda *_: None)
        assert (found.damaged_clean, found.damaged_private) == (0, 0)
        assert await read(disk) == NEW[:SECTOR] + OLD[SECTOR:]
        await disk.writeback.checkpoint()
        assert await read(disk) == NEW[:SECTOR] + OLD[SECTOR:]
        assert disk.view.misses == 1

    play(tmp_path, story)


@pytest.mark.expect_log("write-back failed|is damaged")
def test_damaged_dirty_data_is_not_written_back(tmp_path: Path) -> None:
    """Nor is anything else of that instant: the image stays what it was, and all of it stays dirty."""

    async def story(host: Host) -> None:
        cache, disk = host.cache, await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        for block in range(3):
            await disk.write(block * BLOCK, memoryview(NEW), False)
        await disk.flush()
        slot = slot_of(disk.view.private[0].pages.page(0)[1])
        cache.device.write(cache.device.at(slot, 5 * SECTOR), b"x")
        with pytest.raises(OSError, match="damaged"):
            await disk.writeback.checkpoint()
        assert host.origin.visible == OLD * (SIZE // BLOCK)
        assert disk.dirty_bytes == 3 * BLOCK

    play(tmp_path, story)


@pytest.mark.expect_log("is damaged")
def test_a_damaged_block_that_is_about_to_be_evicted_is_fetched_again(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        cache, disk = host.cache, await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert await read(disk) == OLD
        await trio.sleep(1)  # until it is stored
        clean = disk.image.clean.layer
        slot = slot_of(clean.pages.page(0)[0])
        cache.device.write(cache.device.at(slot, 5 * SECTOR), b"x")
        cache.ready.forget()
        cache.slots.placement.victims(1)  # it is the only one
        cache.slots.evicting.add(slot)  # as Evictor.evict() before it has the page
        assert await read(disk) == OLD
        assert not cache.slots.is_evicting(slot)
        await cache.evictor.evict([])
        await trio.sleep(1)
        assert slot_of(clean.pages.page(0)[0]) not in (slot, NO_SLOT)
        assert await read(disk) == OLD
        assert cache.info()["damaged_slots"] == 1
        assert disk.view.misses == 2

    play(tmp_path, story)


@pytest.mark.expect_log("is damaged")
def test_a_sector_that_was_seen_not_to_fit_is_not_believed(tmp_path: Path) -> None:
    """It was ready. Then its neighbour is read from the device, and it with it."""

    async def story(host: Host) -> None:
        cache, disk = host.cache, await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(0, memoryview(NEW), False)
        await disk.flush()
        slot = slot_of(disk.view.private[0].pages.page(0)[0])
        cache.device.write(cache.device.at(slot, 5 * SECTOR), b"x")
        cache.ready.masks[slot] &= ~1
        assert await read(disk, 0, SECTOR) == NEW[:SECTOR]
        with pytest.raises(OSError, match="damaged"):
            await read(disk, 5 * SECTOR, SECTOR)

    play(tmp_path, story)


@pytest.mark.parametrize("power", [False, True])
def test_what_was_written_through_is_not_cached_after_a_power_cut(
    tmp_path: Path, power: bool
) -> None:
    """The image may have lost it: nobody asked for a flush."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        await disk.write(0, memoryview(NEW), False)
        await host.cache.commit()
        await host.kill(host.snapshot())
        if power:
            host.origin.visible[:] = host.origin.durable
        await host.start(boot="second" if power else "first")
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert await read(disk) == (OLD if power else NEW)
        assert disk.counters.origin_read_bytes == (BLOCK if power else 0)

    play(tmp_path, story)


# -- an origin that loses what it was given ---------------------------------------------------------------------


WRITING_MODES = [Mode.NONE, Mode.WRITE_AROUND, Mode.WRITE_THROUGH]


@pytest.mark.expect_log("a flush failed")
@pytest.mark.parametrize("mode", WRITING_MODES)
def test_a_flush_that_failed_goes_on_failing_until_all_is_in_the_image(
    tmp_path: Path, mode: Mode
) -> None:
    """The kernel of the image's host says so once; every later flush of it goes well and means nothing.

    The guest asks for nothing but the flush again, as QEMU does after a pause.
    """

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(mode))
        origin = host.origin
        await disk.write(0, memoryview(NEW), False)
        await disk.write(BLOCK // 2, memoryview(OLD), False)
        await disk.zero(4096, 4096, False, no_hole=True, fast=False)
        wanted = await read(disk)
        origin.faults["flush"], origin.lose = 3, True
        with pytest.raises(OSError, match="injected"):
            await disk.flush()  # and once more, for what was written again
        assert disk.status()["state"] == "lagging"
        assert "injected" in disk.status()["reason"]
        origin.faults["write"] = 1
        with pytest.raises(OSError, match="injected"):
            await disk.flush()
        assert origin.durable[:BLOCK] == OLD
        origin.visible[:] = origin.durable  # the memory there was needed for something else
        await disk.flush()
        assert origin.durable[:BLOCK] == wanted
        assert await read(disk) == wanted
        assert disk.status()["state"] == "ready"
        assert disk.image.writes.kept.is_empty
        await disk.write(0, memoryview(OLD), False)
        await disk.flush()
        assert origin.durable[:BLOCK] == OLD

    play(tmp_path, story)


@pytest.mark.expect_log("a flush failed")
def test_what_a_failed_flush_may_have_lost_is_not_cached(tmp_path: Path) -> None:
    """Power fails before it could be written again."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        origin = host.origin
        await disk.write(0, memoryview(NEW), False)
        origin.faults["flush"], origin.lose = 1000, True
        with pytest.raises(OSError, match="injected"):
            await disk.flush()
        assert await read(disk) == NEW  # cached again
        await trio.sleep(20)  # looked at
        await host.cache.commit()
        left = host.snapshot()
        await host.kill(left)
        origin.faults.clear()
        origin.visible[:] = origin.durable
        await host.start(boot="second")
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert await read(disk) == OLD

    play(tmp_path, story)


@pytest.mark.expect_log("a flush failed")
@pytest.mark.parametrize("mode", WRITING_MODES)
def test_what_is_kept_of_an_image_has_a_bound(tmp_path: Path, mode: Mode) -> None:
    """A flush comes by itself before a write that would go beyond; where it fails, so does the write."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(mode))
        kept = disk.image.writes.kept
        with mock.patch.object(kept_writes, "MOST", 3 * BLOCK):
            for _ in range(10):
                await disk.write(0, memoryview(NEW), False)
                assert kept.bytes <= 4 * BLOCK
            host.origin.faults["flush"] = 1000
            while not kept.is_full:
                await disk.write(0, memoryview(OLD), False)
            with pytest.raises(OSError, match="injected"):
                await disk.write(0, memoryview(NEW), False)
            host.origin.faults.clear()
            await disk.flush()
        assert kept.bytes == host.images.kept.used == 0
        assert host.origin.durable[:BLOCK] == OLD

    play(tmp_path, story)


def test_what_a_flush_that_was_given_up_lost_is_not_cached(tmp_path: Path) -> None:
    """It fails in the end, with nobody waiting; and there is always a write under way, so no other flush comes."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        origin, image = host.origin, disk.image
        await disk.write(0, memoryview(NEW), False)
        async with image.writing():
            origin.sync_failures += 1
            origin.visible[:] = origin.durable
            assert await read(disk) == NEW, "the fault has to be one of the cache"
            await image.look()
            assert await read(disk) == OLD

    play(tmp_path, story)


def test_what_a_flush_lost_that_nobody_waited_for_is_written_again(tmp_path: Path) -> None:
    """The daemon flushes an image for itself, too, and one that was given up can fail later: no later one says so."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        await disk.write(0, memoryview(NEW), False)
        host.origin.sync_failures += 1
        host.origin.visible[:] = host.origin.durable
        await disk.flush()
        assert host.origin.durable[:BLOCK] == NEW
        assert await read(disk) == NEW

    play(tmp_path, story)


@pytest.mark.expect_log("write-back failed")
def test_a_flush_that_fails_beside_a_pass_has_the_pass_begin_again(tmp_path: Path) -> None:
    """What the pass had written by then may be lost, and the pass's own flush would not say so."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        origin = host.origin
        await disk.write(0, memoryview(NEW), False)
        write_ranges = origin.write_ranges

        async def beside(ranges: Any, background: bool = False) -> None:
            await write_ranges(ranges, background)
            origin.faults["flush"], origin.lose = 1, True
            with pytest.raises(OSError, match="injected"):
                await disk.image.flush()

        with (
            mock.patch.object(origin, "write_ranges", beside),
            pytest.raises(OSError, match="all is written again"),
        ):
            await disk.writeback.checkpoint()
        assert origin.durable[:BLOCK] == OLD
        assert disk.dirty_bytes == BLOCK
        await disk.drain(nothing)
        assert origin.durable[:BLOCK] == NEW

    play(tmp_path, story)


# -- a cache device that fails ----------------------------------------------------------------------------------


@pytest.mark.expect_log("cache device .* failed")
@pytest.mark.parametrize("marked", [False, True])
def test_what_went_past_the_cache_is_durable_after_a_drain(tmp_path: Path, marked: bool) -> None:
    """As `forebay flush` promises, whether the guest flushes or not; and before the marker says so, if it is set."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        if marked:
            await disk.dirty.mark.set()
        host.cache.failure.fail(OSError(errno.EIO, "injected"))
        await disk.write(0, memoryview(NEW), False)
        assert host.origin.visible[:BLOCK] == NEW
        assert host.origin.durable[:BLOCK] == OLD
        await disk.drain(nothing)
        assert host.origin.durable[:BLOCK] == NEW

    play(tmp_path, story)


@pytest.mark.expect_log("cache device .* failed|works again")
@pytest.mark.parametrize("works_again", [False, True])
def test_what_went_past_the_cache_is_durable_after_a_flush(
    tmp_path: Path, works_again: bool
) -> None:
    """Also of a guest that flushes only when the device works again."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        host.cache.failure.fail(OSError(errno.EIO, "injected"))
        await disk.write(0, memoryview(NEW), False)
        assert host.origin.durable[:BLOCK] == OLD
        if works_again:
            await revive(host.cache)
            assert host.cache.failed is None
        with mock.patch.object(host.cache.sync, "now", return_value=True):
            assert not disk.flush_now()
        await disk.flush()
        assert host.origin.durable[:BLOCK] == NEW

    play(tmp_path, story)


@pytest.mark.expect_log("cache device .* failed|works again")
def test_a_pass_that_hears_of_a_failure_when_it_is_over_goes_on(tmp_path: Path) -> None:
    """One sync serves all who asked for it, and tells them one after the other; a revival may come in between."""

    async def story(host: Host) -> None:
        cache = host.cache
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(0, memoryview(NEW), False)

        async def flush_of_an_overlay() -> None:
            with pytest.raises(OSError, match="injected"):
                await cache.sync()

        waiting = cache.sync._lock.statistics
        asked: list[Callable[[], Awaitable[object]]]
        asked = [flush_of_an_overlay, partial(revive, cache), partial(disk.drain, nothing)]
        async with trio.open_nursery() as guests:
            async with cache.sync.suspended():  # one is under way, and takes long
                for number, do in enumerate(asked, 1):
                    guests.start_soon(do)
                    while waiting().tasks_waiting < number:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                    if number == 1:
                        cache.failure.fail(OSError(errno.EIO, "injected"))
            await trio.sleep(1)
        assert cache.failed is None
        assert host.origin.durable[:BLOCK] == NEW
        assert disk.writeback.error is None

    play(tmp_path, story)


@pytest.mark.expect_log("cache device .* failed")
@pytest.mark.parametrize("zeros", [False, True])
def test_a_change_of_which_no_record_can_be_kept_goes_to_the_image(
    tmp_path: Path, zeros: bool
) -> None:
    """The device has room for the data and none for the journal: in memory alone it would be gone with a kill."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(8 * BLOCK, memoryview(NEW), False)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "injected")

        with mock.patch.object(host.cache.intent.journal, "write", full):
            if zeros:
                await disk.zero(0, BLOCK, False, True, False)
            else:
                await disk.write(0, memoryview(NEW), False)
        new = bytes(BLOCK) if zeros else NEW
        assert host.origin.visible[:BLOCK] == new
        await host.kill(host.snapshot())
        await host.start()
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        assert await read(disk) == new
        assert await read(disk, 8 * BLOCK) == NEW

    play(tmp_path, story)


@pytest.mark.expect_log("cache device .* failed|is damaged")
@pytest.mark.parametrize("failed", ["before", "meanwhile", "meanwhile, and works again"])
def test_what_was_stored_while_the_device_failed_is_not_believed(
    tmp_path: Path, failed: str
) -> None:
    """The kernel throws away what it could not write, and says so to a sync: also of a block that is being stored."""
    module = import_module("forebay_cache.blocks.store")
    write, prepare = module._write, module._prepare

    async def story(host: Host) -> None:
        cache = host.cache
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))

        def late(*arguments: Any) -> Any:
            if failed == "before":
                cache.failure.fail(OSError(errno.EIO, "injected"))
            return prepare(*arguments)

        def lost(_: Any, parts: list[Any], *others: Any) -> None:
            write(cache, parts, *others)
            for part in parts:
                cache.device.write(cache.device.at(part.slot), b"x" * BLOCK)
            cache.failure.fail(OSError(errno.EIO, "injected"))
            if "again" in failed:
                cache.failure.error = None
                cache.ready.forget()

        with mock.patch.object(module, "_write", lost), mock.patch.object(module, "_prepare", late):
            assert await read(disk) == OLD
            await trio.sleep(1)
        assert await read(disk) == OLD
        assert await read(disk) == OLD

    play(tmp_path, story)


@pytest.mark.expect_log("cache device .* failed")
@pytest.mark.parametrize("works_again", [False, True])
def test_what_is_dropped_while_the_device_fails_may_be_in_the_index_before_it_works_again(
    tmp_path: Path, works_again: bool
) -> None:
    """The commit that takes it back would have all of it. Until then the layer is dead in the index."""

    async def story(host: Host) -> None:
        cache = host.cache
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        await read(disk, 0, SIZE)
        await trio.sleep(1)
        await cache.commit()
        layer = disk.image.layer
        cached = layer.sectors
        cache.failure.fail(OSError(errno.EIO, "injected"))
        await disk.write(0, memoryview(NEW), False)
        cache.invalidations._most = 0
        await cache.invalidations.make_room(layer)
        assert layer.pages.first_key not in cache.layers.dirty
        stored = cache.index.page(layer.id, 0)
        assert stored == layer.pages.page(0).tobytes()
        assert cache.index.layers()[layer.id].dead
        await disk.write(BLOCK, memoryview(NEW), False)
        if works_again:
            await revive(cache)
            await check_cache(cache)
        await host.kill(host.snapshot())
        await host.start()
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert disk.image.layer.sectors == (cached - SECTORS * 2 if works_again else 0)
        assert await read(disk, 0, 3 * BLOCK) == NEW + NEW + OLD
        await check_cache(host.cache)

    play(tmp_path, story)


@pytest.mark.expect_log("cache device .* failed|is full")
def test_a_page_is_stored_while_the_device_fails_only_if_it_names_no_other_slot(
    tmp_path: Path,
) -> None:
    """A slot that was handed over is still the private block's in the index, and dead layers free theirs."""

    async def story(host: Host) -> None:
        cache = host.cache
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(0, memoryview(NEW), False)
        await cache.commit()

        async def then_it_fails(*of: Any) -> None:
            await settle(*of)
            cache.failure.fail(OSError(errno.EIO, "injected"))

        with mock.patch.object(forebay.checkpoint.passes, "settle", then_it_fails):
            await disk.drain(nothing)
        layer = disk.image.layer
        cache.invalidations._most = 0
        await cache.invalidations.make_room(layer)
        assert slot_of(layer.pages.page(0)[0]) != NO_SLOT, "it was handed over"
        assert layer.pages.first_key in cache.layers.dirty
        assert cache.index.page(layer.id, 0) is None
        await host.kill(host.snapshot())
        await host.start()
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        assert await read(disk) == NEW
        await trio.sleep(1)
        await check_cache(host.cache)

    play(tmp_path, story)


# -- who changed the image --------------------------------------------------------------------------------------

LAZY = settings(Mode.WRITE_BACK, max_lag=1000.0)


@pytest.mark.expect_log("write-back failed")
@pytest.mark.parametrize("mode", [Mode.WRITE_BACK, Mode.WRITE_THROUGH])
def test_a_write_that_was_given_up_and_arrives_late_is_ours(tmp_path: Path, mode: Mode) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(mode, max_lag=1000.0))
        origin, layer = host.origin, disk.image.layer
        late: list[tuple[int, bytes]] = []

        async def given_up(offset: int, data: Any, background: bool = False) -> None:
            del background
            late.append((offset, b"".join(data)))
            raise TimeoutError(errno.ETIMEDOUT, "injected")

        async def arrives() -> None:
            for offset, data in late:
                origin._land(offset, data, allocate=True)
            late.clear()

        async def write() -> None:
            await disk.write(0, memoryview(NEW), False)
            await disk.writeback.checkpoint()

        with (
            mock.patch.object(origin, "write", given_up),
            mock.patch.object(origin, "quiesce", arrives),
        ):
            with pytest.raises(OSError, match="injected"):
                await write()
            await disk.image.look()
            await arrives()
        await disk.image.look()
        assert disk.image.conflict is None
        assert disk.image.layer is layer, "what is cached of it was dropped"
        await disk.drain(nothing)

    play(tmp_path, story)


@pytest.mark.parametrize("killed", [False, True])
def test_a_power_cut_that_takes_the_times_back_is_no_change(tmp_path: Path, killed: bool) -> None:
    """The image's times are noted when they are durable: after our writes, and after the start that follows a kill."""

    async def story(host: Host) -> None:
        origin = host.origin
        disk = await host.attach("d", LAZY)
        await disk.write(0, memoryview(NEW), True)
        await disk.drain(nothing)
        if killed:
            await host.kill(host.snapshot())
            await host.start(boot="first")
            disk = await host.attach("d", LAZY)
        else:
            await trio.sleep(20)
        await disk.write(BLOCK, memoryview(NEW), True)
        await host.cache.commit()
        await host.kill(host.snapshot())
        origin.changes = origin.durable_changes
        await host.start(boot="second")
        disk = await host.attach("d", LAZY)
        assert disk.image.conflict is None
        assert await read(disk, 0, 2 * BLOCK) == NEW + NEW

    play(tmp_path, story)


@pytest.mark.expect_log("was changed by somebody else")
def test_a_change_just_before_the_detach_is_noticed(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert await read(disk) == OLD
        await trio.sleep(1)
        assert disk.read_now(0, BLOCK) is not None
        host.origin.visible[:BLOCK] = NEW
        host.origin.changes += 1
        await host.detach("d", discard=False)
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert await read(disk) == NEW

    play(tmp_path, story)


# -- an index that fails ----------------------------------------------------------------------------------------


class FailingEnvironment:
    """Stands for lmdb's, whose transactions fail while ``fails`` has their kind: True for those that write."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self.fails: set[bool] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def begin(self, write: bool = False) -> Any:
        if write in self.fails:
            raise lmdb.DiskError("injected")
        return self._env.begin(write=write)


@pytest.mark.expect_log("write-back failed|index commit failed|injected")
def test_write_back_goes_on_when_the_index_can_be_written_again(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=2.0))
        env = host.cache.index._env = cast("Any", FailingEnvironment(host.cache.index._env))
        await disk.write(0, memoryview(NEW), False)
        env.fails = {True}
        with pytest.raises(OSError, match="injected"):
            await disk.drain(nothing)
        await trio.sleep(100)
        assert disk.dirty_bytes
        assert disk.report.state() == "lagging"
        env.fails = set()
        await trio.sleep(100)
        assert not disk.dirty_bytes
        assert host.origin.durable[:BLOCK] == NEW

    play(tmp_path, story)


@pytest.mark.expect_log("nothing can be evicted")
def test_eviction_goes_on_when_the_index_can_be_read_again(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        cache, layer = host.cache, disk.image.layer
        await read(disk, 0, SIZE)
        await trio.sleep(1)  # what was read is stored behind the reader's back
        await cache.commit()
        env = cache.index._env = cast("Any", FailingEnvironment(cache.index._env))
        env.fails = {False}
        assert not layer.pages.dirty
        layer.pages.shed(len(layer.pages))
        cache.slots.low = cache.device.slots
        cache.slots.want_eviction()
        await trio.sleep(3)
        assert cache.slots.evicted_blocks == 0
        env.fails = set()
        await trio.sleep(3)
        assert cache.slots.evicted_blocks > 0
        assert await read(disk, 0, SIZE) == OLD * (SIZE // BLOCK)
        await check_cache(cache)

    play(tmp_path, story)


@pytest.mark.expect_log("index commit failed")
def test_what_a_commit_had_that_failed_is_in_the_next(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_AROUND))
        cache = host.cache
        await read(disk, 0, 4 * BLOCK)
        await disk.write(8 * BLOCK, memoryview(NEW), False)
        await trio.sleep(1)  # what was read is stored by then
        cache.records.put("test", "x", {"kept": True})
        env = cache.index._env = cast("Any", FailingEnvironment(cache.index._env))
        env.fails = {True}
        with pytest.raises(OSError, match="injected"):
            await cache.commit()
        env.fails = set()
        await cache.commit()
        assert cache.index.hot() == [(disk.image.layer.id, 0)]
        await host.kill(host.snapshot())
        await host.start()
        assert host.cache.records.get("test", "x") == {"kept": True}
        disk = await host.attach("d", settings(Mode.WRITE_AROUND))
        assert await read(disk, 0, 4 * BLOCK) == 4 * OLD
        assert disk.counters.origin_read_bytes == 0, "it is not warm"
        await check_cache(host.cache)

    play(tmp_path, story)


def test_the_index_never_names_what_the_device_may_lose(tmp_path: Path) -> None:
    """A commit is made durable behind the data that it names, and behind nothing else's back."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        cache, seen = host.cache, []
        commit = cache.index.commit

        async def watched(changes: Changes) -> None:
            seen.append((len(changes.pages), {**cache.intent.open_sectors, **cache.intent.syncing}))
            await commit(changes)

        await disk.write(0, memoryview(NEW), False)
        assert cache.intent.open_sectors
        with mock.patch.object(cache.index, "commit", watched):
            await cache.commit()
        assert [(pages > 0, undurable) for pages, undurable in seen] == [(True, {})]

    play(tmp_path, story)


@pytest.mark.expect_log("index commit failed")
def test_slots_given_up_are_free_only_after_a_commit_that_succeeds(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_AROUND))
        cache = host.cache
        await read(disk, 0, 4 * BLOCK)
        await cache.commit()
        await disk.write(0, memoryview(NEW), False)
        free = cache.slots.placement.free
        env = cache.index._env = cast("Any", FailingEnvironment(cache.index._env))
        env.fails = {True}
        with pytest.raises(OSError, match="injected"):
            await cache.commit()
        assert cache.slots.placement.free == free
        env.fails = set()
        await cache.commit()
        assert cache.slots.placement.free == free + 1

    play(tmp_path, story)


def test_what_was_fetched_is_served_and_not_kept_while_the_index_fails(tmp_path: Path) -> None:
    """Its page cannot be looked up, or the checksums of the slot that the block has already; nor read ahead."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        cache, layer, filler = host.cache, disk.image.layer, disk.image.filler
        await read(disk, 0, 2 * BLOCK)
        await disk.write(0, memoryview(b"x" * 512), False)  # takes a sector away
        await cache.commit()
        env = cache.index._env = cast("Any", FailingEnvironment(cache.index._env))
        env.fails = {False}
        cache.sums.state[:] = bytes(cache.device.slots)
        with cache.in_flight.filling(layer, [0]) as cells:
            await store.store(cache, layer, 0, NEW[:SECTOR], cells)
        assert not layer.pages.page(0)[0] & 1
        layer.pages.shed(len(layer.pages))
        with cache.in_flight.filling(layer, [0]) as cells:
            await store.store(cache, layer, 0, NEW[:SECTOR], cells)
        filler.ahead(0, SIZE, disk.counters)
        await trio.sleep(1)
        env.fails = set()
        assert await read(disk) == b"x" * 512 + OLD[512:]
        await check_cache(cache)

    play(tmp_path, story)


def test_what_is_clean_is_read_from_the_image_while_the_index_cannot_be_read(
    tmp_path: Path,
) -> None:
    """And what is private, of which all is in memory, from the cache."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        overlay = await host.attach("o", settings(Mode.WRITE_BACK), overlay=True)
        await read(disk, 0, 2 * BLOCK)
        await overlay.write(0, memoryview(NEW[:SECTOR]), True)
        await host.cache.commit()
        env = host.cache.index._env = cast("Any", FailingEnvironment(host.cache.index._env))
        env.fails = {False}
        host.cache.ready.forget()
        disk.image.layer.pages.shed(len(disk.image.layer.pages))
        assert await read(disk) == OLD
        assert await read(overlay) == NEW[:SECTOR] + OLD[SECTOR:]
        env.fails = set()

    play(tmp_path, story)


# -- what the cache thinks of itself ----------------------------------------------------------------------------


def test_slots_of_a_layer_that_is_being_reclaimed_are_room(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        first = await host.attach("o1", settings(Mode.WRITE_BACK), overlay=True)
        second = await host.attach("o2", settings(Mode.WRITE_BACK), overlay=True)
        blocks = NEW * (SIZE // BLOCK)
        await first.write(0, memoryview(blocks), True)
        with pytest.raises(OSError, match="full"):
            await second.write(0, memoryview(blocks), True)
        await host.detach("o1", discard=True)
        await second.write(0, memoryview(blocks), True)

    play(tmp_path, story)


def test_a_layer_that_is_pinned_while_slots_are_looked_for_is_known(tmp_path: Path) -> None:
    """Else nobody can say later whose slots they are, and they are chosen to be evicted for ever."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        await read(disk, 0, SIZE)
        key = disk.image.key
        await host.stop()
        with mock.patch.object(forebay_cache.offline.recovery, "SCAN_AT_ONCE", 0):
            cache = open_cache(host.device_file, host.device_file.parent / "index", boot="first")
        layer = cache.layers.clean_of(key)
        assert layer is not None
        assert cache.slots.scan is not None
        await pin_layer(cache, layer, pinned=True)
        await cache.slots.scan()
        cache.slots.scan = None
        await pin_layer(cache, layer, pinned=False)
        await cache.evictor.evict(cache.slots.placement.victims(cache.device.slots))
        assert cache.slots.evicted_blocks == SIZE // BLOCK
        cache.release()
        await host.start()

    play(tmp_path, story)


@pytest.mark.parametrize("pinned", [False, True])
def test_what_settles_in_a_layer_behind_the_scan_is_known_to_be_in_use(
    tmp_path: Path, pinned: bool
) -> None:
    """Else it counts as free when the scan after a start has ended."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK))
        await disk.write(0, memoryview(NEW), True)
        key = disk.image.key
        await host.stop()
        with mock.patch.object(forebay_cache.offline.recovery, "SCAN_AT_ONCE", 0):
            cache = open_cache(host.device_file, host.device_file.parent / "index", boot="first")
        clean = cache.layers.clean_of(key)
        assert clean is not None
        [frozen] = [layer for layer in cache.layers if layer.private and layer.sectors]
        await pin_layer(cache, clean, pinned=pinned)
        frozen.freeze()
        filler = cast("Any", SimpleNamespace(layer=clean, cache=cache, overtaken=lambda *_: None))
        await settle(cache, frozen, filler, trio.lowlevel.checkpoint)
        state = cache.slots.placement.state
        named = [slot for _, page in clean.pages.held() for _, slot in slots_in(page)]
        assert named
        assert [hex(state[slot]) for slot in named if state[slot] & ~TOUCHED == UNSCANNED] == []
        cache.release()
        await host.start()

    play(tmp_path, story)


def test_a_region_heated_during_a_commit_that_fails_is_hot(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        cache, layer = host.cache, disk.image.layer
        region = (layer.id, 0)
        await disk.write(0, memoryview(NEW), True)
        await cache.commit()
        assert region in cache.index.hot()
        cache.hot.cool(layer.id)
        snapshot = cache.commit.snapshot()
        await mark_hot(cache, layer, 0, BLOCK)
        snapshot.failed()
        await cache.commit()
        assert region in cache.index.hot()
        # and the other way round
        await mark_hot(cache, layer, 1 << 22, BLOCK)
        snapshot = cache.commit.snapshot()
        cache.hot.cool(layer.id)
        snapshot.failed()
        await cache.commit()
        assert not cache.index.hot()

    play(tmp_path, story)


def test_no_region_of_a_dropped_layer_stays_hot(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        await disk.write(0, memoryview(NEW), True)
        await host.cache.commit()
        dropped = disk.image.layer
        assert host.cache.hot.of(dropped.id)
        assert host.cache.index.hot()
        disk.image.clean.refresh()
        assert not host.cache.hot.of(dropped.id)
        await host.cache.commit()
        assert not host.cache.index.hot()

    play(tmp_path, story)


@pytest.mark.parametrize("clean", [False, True])
def test_a_kill_while_the_clean_blocks_are_dropped_leaves_one_layer(
    tmp_path: Path, clean: bool
) -> None:
    """The new layer is in the journal, the old one in the index, as alive as before."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        if clean:
            await read(disk, 0, SIZE)
        else:
            await disk.write(0, memoryview(NEW), True)
        await host.cache.commit()
        disk.image.clean.refresh()
        host.cache.intent.publish()
        await host.kill(host.snapshot())
        await host.start()
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        await trio.sleep(5)
        assert list(host.cache.layers) == [disk.image.layer]
        assert {layer for layer, _ in host.cache.index.hot()} <= {disk.image.layer.id}
        await check_cache(host.cache)

    play(tmp_path, story)


# -- a store that may lose what it took ------------------------------------------------------------------------


@pytest.mark.expect_log("in write-through until the next restart|can(not)? be reached")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dirty", [False, True])
def test_a_disk_leaves_write_back_where_the_mount_became_unsafe(
    tmp_path: Path, dirty: bool, late: bool
) -> None:
    """It is served all the same; what was dirty goes to the image first. And it does not come back to that mode."""

    async def story(host: Host) -> None:
        disk = await host.attach("d", LAZY)
        if dirty:
            await disk.write(0, memoryview(NEW), True)
        await host.stop()
        await host.start()
        with mock.patch.object(FakeSource, "check_safe", unsafe):
            if late:
                host.origin.faults["open"] = 1
            disk = await host.attach("d", LAZY)
            assert (disk.image.origin is None) == late
            await trio.sleep(3)
            assert disk.mode is Mode.WRITE_THROUGH
            assert (await read(disk)) == (NEW if dirty else OLD)
            assert host.origin.durable[:BLOCK] == (NEW if dirty else OLD)
            await disk.write(BLOCK, memoryview(NEW), True)
            assert host.origin.durable[BLOCK : 2 * BLOCK] == NEW
            with pytest.raises(ForebayError, match="soft"):
                await disk.set_mode(Mode.WRITE_BACK, nothing)

    play(tmp_path, story)


def unsafe(source: FakeSource, mode: Mode) -> None:
    """As Source.check_safe of an image on a soft mount: nobody knows before it was opened."""
    if source.opened and mode in (Mode.WRITE_BACK, Mode.FULL_COPY):
        raise ForebayError("soft")


@pytest.mark.expect_log("can(not)? be reached")
def test_a_disk_does_not_enter_write_back_where_the_mount_turns_out_unsafe(tmp_path: Path) -> None:
    """The image comes while the change of mode is under way."""

    async def story(host: Host) -> None:
        host.origin.faults["open"] = 1
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert disk.report.state() == "degraded"

        async def flush() -> None:
            await trio.sleep(3)

        with (
            mock.patch.object(FakeSource, "check_safe", unsafe),
            mock.patch.object(disk.modes.policy, "flush", flush),
            pytest.raises(ForebayError, match="soft"),
        ):
            await disk.set_mode(Mode.WRITE_BACK, nothing)
        assert disk.report.state() == "ready"
        assert disk.mode is Mode.WRITE_THROUGH

    play(tmp_path, story)
