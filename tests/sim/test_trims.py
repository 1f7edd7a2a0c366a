# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""When a store is asked whether it can give space back, and what a TRIM does until it has answered."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest import mock

import pytest
import trio
import trio.testing

from forebay.disk.disk import Disk
from forebay.image.writes import ASK_AGAIN_SECONDS, ASK_SECONDS
from forebay.units import Mode
from forebay_cache.format.geometry import BLOCK
from sim.fake_host import Host, nothing, settings
from sim.fake_loop import Dice, simulated
from sim.fake_origin import FakeOrigin

OLD, SIZE = b"o", 24 * BLOCK


class Asked(FakeOrigin):
    """Counts the questions, and answers them when it is let."""

    def __init__(self, dice: Dice) -> None:
        super().__init__(dice, OLD * SIZE, scale=0.1)
        self.asked = 0
        self.answers = trio.Event()
        self.answers.set()

    async def ask_punches(self) -> bool:
        self.asked += 1
        await self.answers.wait()
        return await super().ask_punches()


def play(directory: Path, story: Callable[[Host, Asked], Awaitable[None]]) -> None:
    """Tell a story on a host with a cache of its own. All in it follows from one seed."""
    dice = Dice("trims")

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            origin = Asked(dice)
            host = Host(directory, origin, nursery)
            await host.start()
            await story(host, origin)
            await host._end()
            host.cache.release()

    with simulated(dice):
        trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))


async def read(disk: Disk, offset: int = 0) -> bytes:
    return b"".join(bytes(x) for x in await disk.read(offset, BLOCK))


@pytest.mark.expect_log("copying paused")
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("punches", [True, False])
def test_a_store_is_asked_once(tmp_path: Path, mode: Mode, punches: bool) -> None:
    async def story(host: Host, origin: Asked) -> None:
        origin.punchable = punches
        disk = await host.attach("d", settings(mode, max_lag=1000.0))
        for n in range(4):
            assert await read(disk, n * BLOCK) == OLD * BLOCK
            await disk.trim(n * BLOCK, BLOCK, False)
            assert await read(disk, n * BLOCK) == (bytes(BLOCK) if punches else OLD * BLOCK)
        assert disk.status()["trims_ignored"] == (0 if punches else 4)
        assert origin.asked == 1
        await disk.drain(nothing)
        assert bytes(origin.visible[:BLOCK]) == (bytes(BLOCK) if punches else OLD * BLOCK)

    play(tmp_path, story)


def test_disks_on_one_image_ask_together_and_overlays_not_at_all(tmp_path: Path) -> None:
    async def story(host: Host, origin: Asked) -> None:
        overlay = await host.attach("o", settings(Mode.WRITE_BACK), overlay=True)
        await overlay.trim(0, BLOCK, False)
        assert await read(overlay) == bytes(BLOCK)
        assert origin.punches is None
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        async with trio.open_nursery() as nursery:
            for n in range(5):
                nursery.start_soon(disk.trim, n * BLOCK, BLOCK, False)
        assert origin.asked == 1

    play(tmp_path, story)


@pytest.mark.parametrize("mode", [Mode.WRITE_THROUGH, Mode.WRITE_BACK])
def test_a_trim_does_not_wait_for_a_store_that_hangs(tmp_path: Path, mode: Mode) -> None:
    """It is ignored, so are the next ones, and later the store is asked again."""

    async def story(host: Host, origin: Asked) -> None:
        disk = await host.attach("d", settings(mode, max_lag=1000.0))
        origin.answers = trio.Event()
        began = trio.current_time()
        await disk.trim(0, BLOCK, False)
        assert trio.current_time() - began <= ASK_SECONDS + 0.5
        for _ in range(10):
            await disk.trim(0, BLOCK, False)
        assert origin.asked == 1
        assert disk.status()["trims_ignored"] == 11
        assert await read(disk) == OLD * BLOCK
        origin.answers.set()
        await trio.sleep(ASK_AGAIN_SECONDS)
        await disk.trim(0, BLOCK, False)
        assert origin.asked == 2
        assert await read(disk) == bytes(BLOCK)

    play(tmp_path, story)


@pytest.mark.parametrize("mode", [Mode.WRITE_THROUGH, Mode.WRITE_BACK])
def test_a_store_that_fails_is_asked_again_later(tmp_path: Path, mode: Mode) -> None:
    async def story(host: Host, origin: Asked) -> None:
        disk = await host.attach("d", settings(mode, max_lag=1000.0))
        origin.faults["punch"] = 1
        await disk.trim(0, BLOCK, False)
        assert await read(disk) == OLD * BLOCK
        await trio.sleep(ASK_AGAIN_SECONDS)
        await disk.trim(0, BLOCK, False)
        assert await read(disk) == bytes(BLOCK)
        assert disk.status()["trims_ignored"] == 1

    play(tmp_path, story)


def test_a_store_is_not_asked_while_the_times_of_the_image_are_compared(tmp_path: Path) -> None:
    """From the flush before the commit of a redo journal until it says that the image is being written."""

    async def story(host: Host, origin: Asked) -> None:
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.write(0, memoryview(b"w" * BLOCK), False)
        identity = disk.image.identity
        states: list[bool] = []
        ask = origin.ask_punches

        async def watched() -> bool:
            states.append(identity.is_committing)
            return await ask()

        async with trio.open_nursery() as nursery:
            with mock.patch.object(origin, "ask_punches", watched):
                nursery.start_soon(disk.drain, nothing)
                while not identity.is_committing:  # noqa: ASYNC110
                    await trio.sleep(0.0001)
                await disk.trim(4 * BLOCK, BLOCK, False)
                assert states == [False]
        assert await read(disk, 4 * BLOCK) == bytes(BLOCK)

    play(tmp_path, story)


def test_zeroes_that_keep_their_space_survive_a_kill(tmp_path: Path) -> None:
    """Told from others in the journal and in the index of the cache, sector by sector."""

    async def story(host: Host, origin: Asked) -> None:
        origin.allocated = bytearray(len(origin.allocated))
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.zero(0, 4 * BLOCK, False, no_hole=True, fast=False)
        await disk.trim(BLOCK, 4096, False)
        await disk.zero(2 * BLOCK, BLOCK, False, no_hole=False, fast=False)
        await disk.write(3 * BLOCK, memoryview(b"w" * 8192), False)
        await disk.trim(3 * BLOCK, 8192, False)
        await disk.flush()
        await host.kill(host.snapshot())
        await host.start()
        disk = await host.attach("d", settings(Mode.WRITE_BACK, max_lag=1000.0))
        await disk.drain(nothing)
        assert bytes(origin.visible[: 4 * BLOCK]) == bytes(4 * BLOCK)
        wanted = [1] * 16 + [0] + [1] * 15 + [0] * 16 + [0] * 2 + [1] * 14
        assert list(origin.allocated[:64]) == wanted

    play(tmp_path, story)
