# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image that cannot be reached, step by step on the simulated host: who waits for it, and for how long."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest import mock

import pytest
import trio

from forebay.daemon.attached import Attached
from forebay.disk.disk import Disk
from forebay.units import Mode
from forebay_cache.format.geometry import BLOCK
from sim.fake_host import Host, nothing, settings
from sim.fake_origin import FakeOrigin, FakeSource
from sim.test_data_safety import NEW, OLD, play, read


async def away(host: Host, mode: Mode, *, unsure: bool = False) -> Disk:
    """A disk as after a kill without its store; with `unsure`, nobody knows if a write to it is durable."""
    disk = await host.attach("d", settings(mode))
    if unsure:
        await disk.write(BLOCK, memoryview(NEW), False)
    await host.kill(host.snapshot())
    await host.start()
    host.origin.faults["open"] = -1
    disk = await host.attach("d", settings(mode))
    assert disk.report.state() == "degraded"
    return disk


@pytest.mark.expect_log("cannot be reached|can be reached again")
@pytest.mark.parametrize("comes", [True, False])
@pytest.mark.parametrize(
    ("mode", "call"),
    [
        (Mode.NONE, "read"),
        (Mode.WRITE_THROUGH, "read"),
        (Mode.WRITE_BACK, "read"),
        (Mode.WRITE_BACK, "cache"),
        (Mode.WRITE_THROUGH, "write"),
        (Mode.WRITE_THROUGH, "zero"),
        (Mode.WRITE_BACK, "write"),
        (Mode.WRITE_THROUGH, "flush"),
    ],
)
def test_what_needs_an_image_that_cannot_be_reached_waits_for_it(
    tmp_path: Path, mode: Mode, call: str, comes: bool
) -> None:
    """As for one that hangs: the guests are there already, of a restart, and are not to hear what passes."""

    async def story(host: Host) -> None:
        disk = await away(host, mode, unsure=call == "flush")
        answer: list[str] = []

        async def ask() -> None:
            try:
                match call:
                    case "read":
                        assert await read(disk) == OLD
                    case "cache":
                        await disk.cache(0, BLOCK)
                    case "write":
                        await disk.write(0, memoryview(NEW), True)
                    case "zero":
                        await disk.zero(0, BLOCK, False, False, False)
                    case "flush":
                        await disk.flush()
            except OSError as error:
                answer.append(str(error))
            else:
                answer.append("done")

        host._tasks.start_soon(ask)
        await trio.sleep(2.5)
        assert not answer
        if comes:
            host.origin.heal()
            await trio.sleep(1)
            assert answer == ["done"]
        else:
            await trio.sleep(disk.settings.origin_timeout - 2.6)
            assert not answer
            await trio.sleep(0.2)
            assert "cannot be reached" in answer[0]

    play(tmp_path, story)


@pytest.mark.expect_log("cannot be reached|taken over")
def test_nobody_waits_for_an_image_that_is_lost(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        disk = await away(host, Mode.WRITE_THROUGH)
        ended = trio.Event()

        async def ask() -> None:
            with pytest.raises(OSError, match="taken over"):
                await read(disk)
            ended.set()

        host._tasks.start_soon(ask)
        await trio.sleep(0.1)
        disk.image.stop("it was taken over")
        with trio.fail_after(0.1):
            await ended.wait()

    play(tmp_path, story)


@pytest.mark.expect_log("can(not)? be reached")
def test_a_mode_is_changed_while_a_write_waits_for_the_image(tmp_path: Path) -> None:
    """It is not held up by what waits, and what waits goes the way of the new mode."""

    async def story(host: Host) -> None:
        disk = await away(host, Mode.WRITE_THROUGH)
        ended = trio.Event()

        async def write() -> None:
            await disk.write(0, memoryview(NEW), False)
            ended.set()

        host._tasks.start_soon(write)
        await trio.sleep(0.1)
        with trio.fail_after(0.1):
            await disk.set_mode(Mode.WRITE_BACK, nothing)
        host.origin.heal()
        await ended.wait()
        assert disk.dirty_bytes == BLOCK
        assert host.origin.visible[:BLOCK] == OLD

    play(tmp_path, story)


async def slowly(source: FakeSource) -> FakeOrigin:
    """In the place of FakeSource.open: nothing of it may be left where it is given up."""
    await trio.sleep(4)
    source.opened = True
    return source.origin


@pytest.mark.expect_log("can(not)? be reached")
def test_a_disk_is_detached_while_its_image_is_being_reached(tmp_path: Path) -> None:
    """A read waits for it as well; nobody goes on trying, and all others are served on."""

    async def story(host: Host) -> None:
        disk = await away(host, Mode.WRITE_THROUGH)
        source = host.sources["d"]
        host.origin.heal()
        with mock.patch.object(FakeSource, "open", slowly):
            with trio.move_on_after(1.5):
                await read(disk)
            assert disk.image.reach.is_being_attempted
            await host.detach("d", discard=False)
            await trio.sleep(30)
        assert disk.image.origin is None
        assert not source.opened
        assert await read(await host.attach("e", settings(Mode.WRITE_THROUGH))) == OLD

    play(tmp_path, story)


@pytest.mark.expect_log("can(not)? be reached")
def test_a_disk_comes_up_while_another_one_waits_for_the_image(tmp_path: Path) -> None:
    """What it has in the cache is served at once; the image, when it is there, is there for both."""

    async def story(host: Host) -> None:
        assert await read(await host.attach("d", settings(Mode.WRITE_THROUGH), overlay=True)) == OLD
        await trio.sleep(1)  # it is kept
        await host.stop()
        await host.start()
        host.origin.faults["open"] = 1
        first = await host.attach("d", settings(Mode.WRITE_THROUGH), overlay=True)
        with mock.patch.object(FakeSource, "open", slowly):
            await trio.sleep(1.5)
            assert first.image.reach.is_being_attempted
            with trio.fail_after(1):
                second = await host.attach("e", settings(Mode.WRITE_THROUGH), overlay=True)
                assert await read(second) == OLD
            await trio.sleep(4)
        assert await read(second, BLOCK) == await read(first, BLOCK) == OLD

    play(tmp_path, story)


@pytest.mark.expect_log("can(not)? be reached")
def test_the_watchdog_sees_that_an_image_came(tmp_path: Path) -> None:
    """A request may wait as long for it, and then as long again for what it answers."""

    async def story(host: Host) -> None:
        disk = await away(host, Mode.WRITE_THROUGH)
        listener = SimpleNamespace(answered=0)
        seen = cast("Attached", SimpleNamespace(status=disk.status, listener=listener))
        before = Attached.pulse(seen)
        host.origin.heal()
        await trio.sleep(3)
        assert disk.image.origin is not None
        assert Attached.pulse(seen) != before

    play(tmp_path, story)


@pytest.mark.expect_log("can(not)? be reached")
def test_who_asks_for_the_same_block_later_waits_longer(tmp_path: Path) -> None:
    """Each guest for its own time, not for what is left of the first one's."""

    async def story(host: Host) -> None:
        disk = await away(host, Mode.WRITE_THROUGH)
        first = trio.Event()

        async def ask() -> None:
            with pytest.raises(OSError, match="cannot be reached"):
                await read(disk)
            host.origin.heal()
            first.set()

        host._tasks.start_soon(ask)
        await trio.sleep(disk.settings.origin_timeout - 1)
        assert await read(disk) == OLD
        assert first.is_set()

    play(tmp_path, story)


@pytest.mark.expect_log("its descriptor fails|can be reached again")
def test_a_descriptor_that_is_dead_is_replaced(tmp_path: Path) -> None:
    """As on NFS, whose locks are lost with the lease: each call fails by it, and a fresh one works."""

    async def story(host: Host) -> None:
        origin = host.origin
        disk = await host.attach("d", settings(Mode.WRITE_THROUGH))
        fresh = FakeOrigin(origin.dice, bytes(origin.visible))
        origin.faults["read"] = -1
        with (
            mock.patch.object(origin, "is_dead", mock.AsyncMock(return_value=True)),
            mock.patch.object(
                disk.image.sources.latest, "open", mock.AsyncMock(return_value=fresh)
            ),
        ):
            data = bytes(await disk.image.read(0, BLOCK))
        assert data == bytes(fresh.visible[:BLOCK])
        origin.faults.clear()

    play(tmp_path, story)
