# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Boots, recorded and replayed, on the simulated host, whose clock costs no time."""

import errno
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import trio
import trio.testing

from forebay.boot import boots as boots_module
from forebay.boot.boots import Boots
from forebay.boot.disk_boot import ELSEWHERE, DiskBoot
from forebay.boot.files import Found, TraceFiles
from forebay.boot.recording import MOST_SECONDS, QUIET_SECONDS
from forebay.boot.trace import LEAST_BLOCKS, Boot, Trace
from forebay.disk.disk import Disk
from forebay.origin.addresses import FileAddress
from forebay.origin.protocol import Identity
from forebay.units import Mode
from forebay_cache.format.geometry import BLOCK
from sim.fake_host import Host, check_cache, settings
from sim.fake_loop import Dice, simulated
from sim.fake_origin import FakeOrigin

T = TypeVar("T")
Expect = Callable[[str], None]

BLOCKS = 256
SIZE = BLOCKS * BLOCK
READ = [n * 97 % BLOCKS for n in range(40)]
"""The blocks of a boot: none of them is read ahead."""
OTHERS = sorted(set(range(BLOCKS)) - set(READ))
ADDRESS = FileAddress("images", Path("/store"), "fake.raw")


class FakeFiles:
    """Stands for TraceFiles: one trace, in memory. `fault` is raised by what is asked of it."""

    def __init__(self, now: Identity) -> None:
        self.trace: Trace | None = None
        self.now = now
        self.fault: Exception | None = None
        self.kept = trio.Event()
        self.dropped = 0

    def _now(self) -> Identity:
        if self.fault is not None:
            raise self.fault
        return self.now

    def identity(self, _address: object) -> Identity:
        return self._now()

    def find(self, _address: object, now: Identity | None) -> Found | None:
        now = now or self._now()
        self._now()
        return None if self.trace is None else Found.of("i", self.trace, "there", now)

    def add(self, _address: object, before: Trace, boot: Boot) -> Found:
        now = self._now()
        self.trace = before.with_boot(boot, 1.0)
        self.kept.set()
        return Found.of("i", self.trace, "there", now)

    def drop(self, _address: object) -> bool:
        self._now()
        self.trace, had = None, self.trace is not None
        self.dropped += had
        return had


class FakeThreads:
    """Stands for StoreThreads."""

    def __init__(self, dice: Dice) -> None:
        self._dice = dice

    async def run(self, do: Callable[[], T]) -> T:
        await self._dice.pause()
        return do()


class Bed:
    """A host on which boots are recorded and replayed."""

    def __init__(self, host: Host, nursery: trio.Nursery, dice: Dice) -> None:
        self.host = host
        self.files = FakeFiles(Identity(SIZE, inode=host.origin.inode))
        self.nursery = nursery
        threads = cast("Any", FakeThreads(dice))
        self.boots = Boots(cast("TraceFiles", self.files), nursery, lambda _store: threads)
        self._booting: dict[str, tuple[DiskBoot, trio.CancelScope]] = {}

    async def attach(self, name: str, preload: Any = "trace", **others: Any) -> Disk:
        """An overlay, and what is to happen of its boot before a client comes."""
        wanted = settings(Mode.WRITE_THROUGH, preload=preload, **others)
        disk = await self.host.attach(name, wanted, overlay=True, resumed=False)
        cast("Any", self.host.sources[name]).address = ADDRESS
        boot, scope = DiskBoot(self.boots, disk), trio.CancelScope()
        self._booting[name] = boot, scope

        async def run() -> None:
            with scope:
                await boot.run()

        self.nursery.start_soon(run)
        return disk

    def before(self) -> Trace:
        """An empty trace of the image."""
        return Trace.of_image(self.files.now)

    async def detach(self, name: str) -> None:
        boot, scope = self._booting.pop(name)
        scope.cancel()
        boot.leave()
        await self.host.detach(name, discard=True)

    def told(self, name: str) -> dict[str, Any]:
        status: dict[str, Any] = self._booting[name][0].status()["boot"]
        return status

    async def purge(self) -> None:
        """Have nothing of the image in the cache."""
        while self.host.cache.in_flight.is_filling:  # noqa: ASYNC110
            await trio.sleep(0.01)
        await self.host.cache.evictor.evict(
            self.host.cache.slots.placement.victims(self.host.cache.device.slots)
        )

    async def booted(self, name: str, blocks: Iterable[int] = READ, **how: Any) -> Disk:
        """A disk whose guest has read these blocks and is quiet since; what was there to record is kept."""
        disk = await self.attach(name, **how)
        await trio.sleep(5)
        await read(disk, blocks)
        await trio.sleep(MOST_SECONDS + 30)
        return disk


async def read(disk: Disk, blocks: Iterable[int], pause: float = 0.1) -> None:
    """What a guest does that boots: as the NBD server asks for it."""
    disk.opened()
    for block in blocks:
        for start in range(0, BLOCK, BLOCK // 4):
            offset, length = block * BLOCK + start, BLOCK // 4
            if disk.read_now(offset, length) is None:
                found = b"".join(map(bytes, await disk.read(offset, length)))
                assert found == bytes(disk.source.origin.visible[offset : offset + length])  # type: ignore[attr-defined]
        await trio.sleep(pause)


def play(
    directory: Path,
    story: Callable[[Bed], Awaitable[None]],
    size: int = 32 << 20,
    seed: object = "boots",
) -> None:
    """Tell a story on a host whose image is all data."""
    dice = Dice(seed)

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            origin = FakeOrigin(dice, b"".join(bytes([n % 255 + 1]) * BLOCK for n in range(BLOCKS)))
            host = Host(directory, origin, nursery, size=size)
            await host.start()
            async with trio.open_nursery() as tasks:
                await story(Bed(host, tasks, dice))
                tasks.cancel_scope.cancel()
            await check_cache(host.cache)
            await host._end()
            host.cache.release()

    with simulated(dice):
        trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("seed", range(5))
def test_a_boot_is_recorded_and_the_next_one_waits_for_nothing(tmp_path: Path, seed: int) -> None:
    async def story(bed: Bed) -> None:
        disk = await bed.booted("a")
        assert bed.told("a")["state"] == "over"
        assert bed.files.trace is not None
        assert bed.files.trace.usual() == sorted(READ)
        assert not bed.boots._recordings
        await bed.detach("a")
        await bed.purge()
        disk = await bed.attach("b")
        await trio.sleep(5)
        misses = disk.view.misses
        await read(disk, READ)
        assert disk.view.misses == misses
        told = bed.told("b")
        assert (told["trace"], told["ready_percent"], told["waited_bytes"]) == ("replayed", 100, 0)
        assert told["read_bytes"] == len(READ) * BLOCK
        assert disk.counters.origin_read_bytes == len(READ) * BLOCK

    play(tmp_path, story, seed=seed)


def test_what_was_fetched_ahead_and_not_read_is_usual_no_more(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        first = [*READ, *OTHERS[::10]]
        for name, blocks in (("a", first), ("b", READ)):
            await bed.booted(name, blocks)
            await bed.detach(name)
            await bed.purge()
        assert bed.files.trace is not None
        assert bed.files.trace.boots == 2
        assert bed.files.trace.usual() == sorted(READ)
        assert {bed.files.trace.blocks[n][1:] for n in READ} == {(2, 2)}
        assert {bed.files.trace.blocks[n][1:] for n in OTHERS[::10]} == {(1, 2)}

    play(tmp_path, story)


def test_what_read_ahead_brought_counts_where_it_was_read(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        disk = await bed.booted("a", range(64))
        assert disk.view.misses < 64 * 2  # read-ahead was at work
        assert bed.files.trace is not None
        assert bed.files.trace.usual() == list(range(64))

    play(tmp_path, story)


def test_what_was_warm_before_tells_nothing(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        await bed.booted("a")
        before = bed.files.trace
        await bed.booted("b", READ[:20])
        assert bed.files.trace is before
        await bed.detach("a")
        await bed.detach("b")
        await bed.booted("c", [*READ[:10], *OTHERS[::10]])
        assert bed.files.trace is not None
        assert {bed.files.trace.blocks[n][1:] for n in READ} == {(1, 1)}
        assert bed.files.trace.usual() == sorted([*READ, *OTHERS[::10]])

    play(tmp_path, story)


def test_disks_that_boot_together_are_one_boot_and_each_block_is_read_once(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        disks = [await bed.attach(f"d{n}") for n in range(10)]
        async with trio.open_nursery() as nursery:
            for disk in disks:
                nursery.start_soon(read, disk, READ)
        await trio.sleep(QUIET_SECONDS + 30)
        assert sum(disk.counters.origin_read_bytes for disk in disks) == len(READ) * BLOCK
        assert bed.files.trace is not None
        assert bed.files.trace.boots == 1
        assert bed.files.trace.usual() == sorted(READ)
        for n in range(10):
            await bed.detach(f"d{n}")
        await bed.purge()
        disks = [await bed.attach(f"e{n}") for n in range(10)]
        async with trio.open_nursery() as nursery:
            for disk in disks:
                nursery.start_soon(read, disk, READ)
        assert sum(disk.counters.origin_read_bytes for disk in disks) == len(READ) * BLOCK

    play(tmp_path, story)


def test_a_guest_that_goes_elsewhere_ends_the_replay(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        bed.host.origin.scale = 2000  # a second or so for each fetch
        usual = range(128, 256, 2)
        bed.files.trace = bed.before().with_boot(Boot(dict.fromkeys(usual, 0)), 1.0)
        disk = await bed.attach("a")
        while bed.told("a")["trace"] != "replaying":  # noqa: ASYNC110
            await trio.sleep(0.01)
        async with trio.open_nursery() as nursery:
            for n in range(ELSEWHERE + 4):
                nursery.start_soon(disk.read, n * 37 % 128 * BLOCK, 4096)
        await trio.sleep(1000)
        assert bed.told("a")["trace"] == "not all replayed: the guest reads something else"
        left = [n for n in usual if await disk.image.filler.missing(n * BLOCK, BLOCK)]
        assert len(left) > 8

    play(tmp_path, story)


def test_a_detach_ends_the_replay_and_the_recording(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        bed.host.origin.scale = 2000
        bed.files.trace = before = bed.before().with_boot(Boot(dict.fromkeys(READ, 0)), 1.0)
        disk = await bed.attach("a")
        await trio.sleep(0.5)
        disk.opened()
        await bed.detach("a")
        await trio.sleep(1000)
        assert bed.files.trace is before
        assert not bed.boots._recordings
        assert not bed.boots._images
        layer = bed.host.cache.layers.clean_of("images:fake.raw")
        assert layer is not None
        assert layer.slots < len(READ)

    play(tmp_path, story)


@pytest.mark.parametrize("count", [LEAST_BLOCKS, 9, 10])
def test_a_boot_that_was_cut_off_counts_only_with_a_quarter_of_the_usual(
    tmp_path: Path, count: int
) -> None:
    async def story(bed: Bed) -> None:
        many = [*READ, *OTHERS[: 4 * count - len(READ)]] if count > 10 else READ
        bed.files.trace = before = bed.before().with_boot(Boot(dict.fromkeys(many, 0)), 1.0)
        disk = await bed.attach("a", preload=0)
        await read(disk, [*READ[:count], *OTHERS[-LEAST_BLOCKS:]])
        await bed.detach("a")
        await trio.sleep(10)
        assert (bed.files.trace is before) is (4 * count < len(many))

    play(tmp_path, story)


def test_a_megabyte_is_no_boot_however_long_it_takes(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        await bed.booted("a", READ[: LEAST_BLOCKS - 1])
        assert bed.files.trace is None
        await bed.detach("a")
        await bed.purge()
        await bed.booted("b", READ[:LEAST_BLOCKS])
        assert bed.files.trace is not None

    play(tmp_path, story)


def test_a_guest_that_is_paused_before_it_boots_is_waited_for(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        disk = await bed.attach("a")
        await read(disk, OTHERS[:1])
        await trio.sleep(2 * QUIET_SECONDS)
        await read(disk, READ)
        await trio.sleep(QUIET_SECONDS + 20)
        assert bed.files.trace is not None
        assert bed.files.trace.usual() == sorted([*READ, OTHERS[0]])

    play(tmp_path, story)


def test_what_is_read_after_the_boot_is_not_recorded(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        disk = await bed.booted("a")
        waited = bed.told("a")["waited_bytes"]
        await read(disk, OTHERS[:40])
        await trio.sleep(MOST_SECONDS)
        assert bed.files.trace is not None
        assert bed.files.trace.usual() == sorted(READ)
        assert bed.told("a")["waited_bytes"] == waited

    play(tmp_path, story)


def test_a_disk_that_came_back_after_a_restart_is_in_no_boot(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        disk = await bed.host.attach("a", settings(Mode.WRITE_THROUGH), overlay=True)
        cast("Any", bed.host.sources["a"]).address = ADDRESS
        boot = DiskBoot(bed.boots, disk)
        bed.nursery.start_soon(boot.run)
        await read(disk, READ)
        await trio.sleep(2 * MOST_SECONDS)
        assert bed.files.trace is None
        assert boot.status()["boot"]["state"] == "not begun"

    play(tmp_path, story)


def test_a_trace_of_another_content_is_dropped_and_not_replayed(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        bed.files.trace = Trace(SIZE, 77).with_boot(Boot(dict.fromkeys(READ, 0)), 1.0)
        disk = await bed.attach("a")
        await trio.sleep(10)
        assert bed.files.dropped == 1
        assert disk.counters.origin_read_bytes == 0
        assert bed.told("a")["trace"] == "none"

    play(tmp_path, story)


def test_an_image_that_changes_during_a_boot_is_not_recorded(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        disk = await bed.attach("a")
        await read(disk, READ)
        disk.image.clean.refresh()
        await trio.sleep(MOST_SECONDS + 30)
        assert bed.files.trace is None
        assert not bed.boots._recordings

    play(tmp_path, story)


def test_an_image_that_changes_right_behind_a_boot_is_not_recorded(
    tmp_path: Path, expect_log: Expect
) -> None:
    expect_log("images:fake.raw was changed by somebody else")

    async def story(bed: Bed) -> None:
        disk = await bed.attach("a")
        await read(disk, READ)
        bed.host.origin.changes += 1
        bed.files.now = await bed.host.origin.identity()
        await bed.detach("a")
        await trio.sleep(10)
        assert bed.files.trace is None
        assert not bed.boots._recordings

    play(tmp_path, story)


def test_a_trace_for_which_the_cache_is_too_small_is_not_replayed(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        bed.files.trace = bed.before().with_boot(Boot(dict.fromkeys(READ, 0)), 1.0)
        disk = await bed.attach("a", cache_size=2 * (len(READ) - 1) * BLOCK)
        await trio.sleep(10)
        assert disk.counters.origin_read_bytes == 0
        assert bed.told("a")["trace"].startswith("not replayed: the boot of images:fake.raw reads")
        await bed.detach("a")
        await bed.attach("b", cache_size=2 * len(READ) * BLOCK)
        await trio.sleep(10)
        assert bed.told("b")["trace"] == "replayed"

    play(tmp_path, story)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ETIMEDOUT])
def test_a_store_that_takes_no_trace_is_a_line_in_the_log(
    tmp_path: Path, expect_log: Expect, number: int
) -> None:
    expect_log("images:fake.raw: its boot is not recorded")

    async def story(bed: Bed) -> None:
        bed.files.fault = OSError(number, "as planted")
        await bed.booted("a")
        assert bed.told("a")["trace"] == "not replayed: as planted"
        assert bed.files.trace is None
        assert not bed.boots._recordings
        bed.files.fault = None
        await bed.detach("a")
        await bed.purge()
        await bed.booted("b")
        assert bed.files.trace is not None

    play(tmp_path, story)


def test_a_fault_of_forebay_itself_in_a_recording_stops_no_disk(
    tmp_path: Path, expect_log: Expect
) -> None:
    expect_log("its boot is (not|neither) recorded")

    async def story(bed: Bed) -> None:
        bed.files.fault = ZeroDivisionError("as planted")
        disk = await bed.booted("a")
        await read(disk, range(10))

    play(tmp_path, story)


def test_a_bad_place_is_passed_over_and_many_end_the_replay(tmp_path: Path) -> None:
    async def story(bed: Bed) -> None:
        bed.files.trace = bed.before().with_boot(Boot(dict.fromkeys(range(0, 80, 2), 0)), 1.0)
        bed.host.origin.faults["read"] = 3
        disk = await bed.attach("a")
        await trio.sleep(10)
        assert bed.told("a")["trace"] == "replayed"
        assert disk.image.layer.slots == 37
        await bed.detach("a")
        await bed.purge()
        bed.host.origin.faults["read"] = -1
        await bed.attach("b")
        await trio.sleep(10)
        assert bed.told("b")["trace"] == "not replayed: injected: read"
        bed.host.origin.faults.clear()

    play(tmp_path, story)


def test_recordings_have_a_bound_in_number_and_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(bed: Bed) -> None:
        monkeypatch.setattr(boots_module, "MOST_RECORDINGS", 0)
        await bed.booted("a")
        assert bed.files.trace is None
        await bed.detach("a")
        await bed.purge()
        monkeypatch.setattr(boots_module, "MOST_RECORDINGS", 1)
        monkeypatch.setattr(boots_module, "MOST_IN_ALL", 30)
        await bed.booted("b")
        assert bed.files.trace is None
        await bed.detach("b")
        await bed.purge()
        monkeypatch.setattr(boots_module, "MOST_IN_ALL", 100)
        await bed.booted("c")
        assert bed.files.trace is not None

    play(tmp_path, story)
