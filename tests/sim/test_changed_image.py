# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image that somebody else changes, while this host's kernel has the old content in memory, as NFS clients do."""

import errno
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import trio
import trio.testing

from forebay.image.reach import LOOK_SHARED_SECONDS, WATCH_SECONDS
from forebay.origin.protocol import Identity
from forebay.units import Mode
from forebay_cache.format.geometry import BLOCK, Buffer
from sim.fake_host import Host, nothing, settings
from sim.fake_loop import Dice, simulated
from sim.fake_origin import FakeOrigin

OLD, NEW = b"o" * BLOCK, b"n" * BLOCK
COUNT = 8


class KeptPages(FakeOrigin):
    """Reads what was there when it was last asked to forget."""

    def __init__(self, dice: Dice, content: bytes) -> None:
        super().__init__(dice, content)
        self.kept = content

    async def read(self, offset: int, length: int, background: bool | trio.Event = False) -> Buffer:
        await super().read(offset, length, background)
        return self.kept[offset : offset + length]

    async def forget(self) -> None:
        await self.dice.pause(self.scale)
        self.kept = bytes(self.visible)

    def change(self) -> None:
        self.visible[:] = NEW * COUNT
        self.changes += 1


def play(directory: Path, story: Callable[[Host, KeptPages], Awaitable[None]]) -> None:
    dice = Dice("story")

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            origin = KeptPages(dice, OLD * COUNT)
            host = Host(directory, origin, nursery)
            await host.start()
            await story(host, origin)
            await host._end()
            host.cache.release()

    with simulated(dice), mock.patch("forebay_cache.layers.registry.PAGES_KEPT", 32768):
        trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.expect_log("was changed by somebody else")
@pytest.mark.parametrize("when", ["running", "stopped", "detached"])
def test_nothing_of_before_is_read_after_a_change(tmp_path: Path, when: str) -> None:
    async def story(host: Host, origin: KeptPages) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert b"".join(map(bytes, await disk.read(0, 2 * BLOCK))) == OLD * 2
        await trio.sleep(10)
        if when == "stopped":
            await host.stop()
        elif when == "detached":
            await host.detach("d", discard=False)
        origin.change()
        if when == "stopped":
            await host.start()
        if when == "running":
            await disk.image.look()
        else:
            disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        assert disk.image.conflict is None
        for at in range(0, COUNT * BLOCK, BLOCK):  # cached before, and never read before
            assert b"".join(map(bytes, await disk.read(at, BLOCK))) == NEW

    play(tmp_path, story)


def test_metadata_alone_is_no_change(tmp_path: Path) -> None:
    """chmod, chown and a second name change when its status changed last, and nothing that it holds."""

    async def story(host: Host, origin: KeptPages) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.read(0, 2 * BLOCK)
        await disk.write(0, memoryview(NEW), False)
        await trio.sleep(10)
        before = await origin.identity()
        after = mock.AsyncMock(return_value=replace(before, ctime_ns=before.ctime_ns + 1))
        with mock.patch.object(origin, "identity", after):
            await disk.image.look()
            assert disk.image.conflict is None, "of metadata"
            assert disk.read_now(BLOCK, BLOCK) is not None, "warm"

    play(tmp_path, story)


@pytest.mark.expect_log("while the cache holds data of a disk on it|dropped as asked")
def test_a_disk_that_stopped_reads_nothing_from_the_cache_either(tmp_path: Path) -> None:
    async def story(host: Host, origin: KeptPages) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.read(0, 2 * BLOCK)
        await disk.write(0, memoryview(NEW), False)
        await trio.sleep(10)
        assert disk.read_now(BLOCK, BLOCK) is not None
        origin.change()
        await disk.image.look()
        assert disk.dirty_bytes == BLOCK
        for at in (0, BLOCK):
            assert disk.read_now(at, BLOCK) is None
            with pytest.raises(OSError, match="'forebay resolve d' keeps that data"):
                await disk.read(at, BLOCK)
        with pytest.raises(OSError, match="forebay resolve"):
            await disk.writeback.checkpoint()
        assert origin.visible == NEW * COUNT
        assert origin.journal is None
        await host.detach("d", discard=True)
        disk = await host.attach("d", settings(Mode.WRITE_BACK))
        assert b"".join(map(bytes, await disk.read(0, 2 * BLOCK))) == NEW * 2

    play(tmp_path, story)


def test_many_disks_look_at_their_image_no_more_often_than_one(tmp_path: Path) -> None:
    looks = []

    async def story(host: Host, origin: KeptPages) -> None:
        identity = origin.identity

        async def counted() -> Identity:
            looks.append(trio.current_time())
            return await identity()

        for number in range(30):
            await host.attach(f"d{number}", settings(Mode.WRITE_THROUGH), overlay=True)
            await trio.sleep(0.1)
        with mock.patch.object(origin, "identity", counted):
            began = trio.current_time()
            await trio.sleep(60)
            looks[:0] = [began]
            looks.append(trio.current_time())

    play(tmp_path, story)
    assert len(looks) <= 2 + 60 / LOOK_SHARED_SECONDS
    assert max(b - a for a, b in pairwise(looks)) <= WATCH_SECONDS + LOOK_SHARED_SECONDS


@pytest.mark.expect_log("was replaced by another file")
@pytest.mark.parametrize("mode", [Mode.WRITE_THROUGH, Mode.WRITE_BACK])
def test_a_file_put_in_the_place_of_one_that_was_being_written_is_noticed(
    tmp_path: Path, mode: Mode
) -> None:
    """As a backup after the host was lost: what the image looked like last is not on record then, but which it was."""

    async def story(host: Host, origin: KeptPages) -> None:
        disk = await host.attach("d", settings(mode))
        await disk.read(0, 2 * BLOCK)
        await trio.sleep(10)
        await disk.write(2 * BLOCK, memoryview(b"w" * BLOCK), True)
        disk.image.identity.withdraw()  # as before a pass
        await host.cache.commit()
        await host.kill(host.snapshot())
        origin.change()
        origin.inode += 1
        await host.start()
        disk = await host.attach("d", settings(mode))
        if mode is Mode.WRITE_BACK:
            assert disk.image.conflict is not None
            assert origin.visible == NEW * COUNT
        else:
            assert b"".join(map(bytes, await disk.read(0, 3 * BLOCK))) == NEW * 3

    play(tmp_path, story)


@pytest.mark.expect_log("replaced by another file|write-back failed")
def test_what_a_pass_wrote_is_kept_where_the_image_was_replaced_meanwhile(tmp_path: Path) -> None:
    """It went to a file that has no name any more."""

    async def story(host: Host, origin: KeptPages) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(0, memoryview(b"w" * BLOCK), False)
        gone = OSError(errno.ESTALE, f"{disk.image.key} was replaced by another file while in use")
        away = mock.patch.object(origin, "identity", mock.AsyncMock(side_effect=gone))
        with away, pytest.raises(OSError, match="replaced by another file"):
            await disk.drain(nothing)
        assert disk.image.conflict is not None
        assert disk.status()["dirty_bytes"] == BLOCK

    play(tmp_path, story)


@pytest.mark.expect_log("injected|identity")
def test_which_file_it_is_stays_on_record_when_an_image_is_closed_unseen(tmp_path: Path) -> None:
    """Whoever is brought back with data of its own has to notice another file in its place; clean blocks are gone."""

    async def story(host: Host, origin: KeptPages) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        await disk.read(0, 2 * BLOCK)
        await trio.sleep(10)
        await disk.write(2 * BLOCK, memoryview(b"w" * BLOCK), True)
        origin.faults["identity"] = -1
        await disk.image.leave(disk.source, disk.view)
        known = host.cache.records.get("image", disk.image.key)
        assert known is not None
        assert (known["identity"], known["inode"]) == (None, 1)
        assert not disk.image.layer.sectors

    play(tmp_path, story)
