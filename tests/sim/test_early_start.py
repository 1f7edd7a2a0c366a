# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is begun before a flush asks for it: whose habit it is, what is begun, and when it is left alone."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from trio.testing import MockClock

from forebay.disk.disk import Disk
from forebay.units import Mode
from forebay_cache.blocks.early import FLUSHES_WITHOUT, LONG_IN_A_ROW, LONG_SECONDS, PAYS_SECONDS
from forebay_cache.device.device import Device
from forebay_cache.format.geometry import BLOCK, SECTOR
from sim.fake_host import Host, settings
from sim.fake_loop import Dice, simulated
from sim.fake_origin import FakeOrigin

SIZE = 16 * BLOCK
Story = Callable[["Guest"], None]


class Guest:
    """Writes and flushes as a server has it done, and sees what is begun."""

    def __init__(self, host: Host, disk: Disk) -> None:
        self.host = host
        self.disk = disk
        self.begun: list[tuple[int, int]] = []
        self.does: Callable[[], object] = lambda: None
        self._number = 0

    def begin_writing(self, offset: int, length: int) -> None:
        self.begun.append((offset, length))
        self.does()

    def write(self, offset: int = 0, count: int = 1, length: int = SECTOR) -> bytes:
        self._number += 1
        data = bytes([self._number % 256]) * length
        writes = [(offset + n * length, memoryview(data)) for n in range(count)]
        assert self.disk.write_now(writes) == count
        self.disk.publish()
        self.disk.answered()
        return data

    def flush(self) -> None:
        with mock.patch.object(type(self.host.cache.sync._syncer), "quick", True):
            assert self.disk.flush_now()

    def pairs(self, count: int) -> int:
        """So many times a write and a flush; how often something was begun."""
        self.begun.clear()
        for _ in range(count):
            self.write()
            self.flush()
        return len(self.begun) // 2


@pytest.fixture
def tell(tmp_path: Path) -> Iterator[Callable[[Story], None]]:
    dice = Dice("early")

    async def live(story: Story) -> None:
        async with trio.open_nursery() as nursery:
            host = Host(tmp_path, FakeOrigin(dice, bytes(SIZE)), nursery)
            await host.start()
            disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
            await disk.write(0, memoryview(bytes(SIZE)), True)
            guest = Guest(host, disk)
            with mock.patch.object(
                Device, "begin_writing", lambda _, *at: guest.begin_writing(*at)
            ):
                story(guest)
            await host._end()
            host.cache.release()

    with simulated(dice):
        yield lambda story: trio.run(live, story, clock=MockClock(autojump_threshold=0))


def test_the_third_of_three_pairs_is_begun_data_and_record(tell: Callable[[Story], None]) -> None:
    def story(guest: Guest) -> None:
        assert guest.pairs(2) == 0
        data = guest.write(3 * SECTOR)
        device = guest.host.cache.device
        (place, length), (frame, frame_length) = guest.begun
        assert device.read(place, length) == data
        assert device.read(frame, 4) == b"FBJL"
        assert guest.host.cache.intent.journal.last_frame == (frame, frame_length)

    tell(story)


def test_all_of_a_write_over_two_blocks_is_begun(tell: Callable[[Story], None]) -> None:
    def story(guest: Guest) -> None:
        guest.pairs(2)
        data = guest.write(BLOCK - 2 * SECTOR, length=4 * SECTOR)
        device = guest.host.cache.device
        assert b"".join(device.read(*piece) for piece in guest.begun[:-1]) == data

    tell(story)


def test_nothing_is_begun_for_who_writes_much_before_a_flush(tell: Callable[[Story], None]) -> None:
    def story(guest: Guest) -> None:
        for _ in range(5):
            guest.write(count=3)
            guest.flush()
        assert not guest.begun
        assert guest.pairs(2) == 0, "the habit begins anew"
        assert guest.pairs(1) == 1
        guest.write()
        guest.write()
        guest.begun.clear()
        for _ in range(5):
            guest.write()  # no flush comes
        assert not guest.begun

    tell(story)


def test_flushes_without_writes_say_nothing(tell: Callable[[Story], None]) -> None:
    def story(guest: Guest) -> None:
        for _ in range(5):
            guest.flush()
        assert guest.pairs(3) == 1

    tell(story)


def test_nothing_is_begun_on_a_slow_device(tell: Callable[[Story], None]) -> None:
    def story(guest: Guest) -> None:
        guest.pairs(2)
        with mock.patch.object(guest.disk, "answered", return_value=None):
            guest.write()
        with mock.patch.object(guest.host.cache.threads.pace, "is_slow", True):
            guest.disk.answered()
        assert not guest.begun
        guest.disk.answered()
        assert guest.begun

    tell(story)


def test_nothing_is_begun_where_a_sync_takes_no_time(tell: Callable[[Story], None]) -> None:
    def story(guest: Guest) -> None:
        syncer = type(guest.host.cache.sync._syncer)
        with mock.patch.object(syncer, "seconds", PAYS_SECONDS / 2):
            assert guest.pairs(5) == 0
        assert guest.pairs(1) == 1

    tell(story)


@pytest.mark.parametrize("fault", ["long", "error"])
def test_where_it_takes_long_or_fails_it_is_left_alone_for_long(
    tell: Callable[[Story], None], fault: str
) -> None:
    def long() -> None:
        clock: Any = trio.lowlevel.current_clock()
        clock.jump(2 * LONG_SECONDS)

    def error() -> None:
        raise OSError(errno.EIO, "injected")

    def story(guest: Guest) -> None:
        assert guest.pairs(3) == 1
        guest.does = long if fault == "long" else error
        guest.pairs(LONG_IN_A_ROW)
        guest.does = lambda: None
        assert guest.pairs(FLUSHES_WITHOUT - LONG_IN_A_ROW) == 0
        assert guest.pairs(10) >= 5

    tell(story)
