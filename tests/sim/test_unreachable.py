"""An image that cannot be reached, step by step on the simulated host: who waits for it, and for how long."""

from pathlib import Path

import pytest
import trio

from forebay.disk import Disk
from forebay.sizes import Mode
from forebay_cache.geometry import BLOCK
from sim.fake_host import Host, nothing, settings
from sim.test_data_safety import NEW, OLD, play, read


async def away(host: Host, mode: Mode) -> Disk:
    """A disk as after a restart without its store."""
    await host.attach("d", settings(mode))
    await host.kill(host.snapshot())
    await host.start()
    host.origin.faults["open"] = -1
    return await host.attach("d", settings(mode))


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
        disk = await host.attach("d", settings(mode, max_lag=1000.0))
        if call == "flush":
            await disk.write(
                BLOCK, memoryview(NEW), False
            )  # after a kill nobody knows if it is durable
        await host.kill(host.snapshot())
        await host.start()
        host.origin.faults["open"] = -1
        disk = await host.attach("d", settings(mode, max_lag=1000.0))
        assert disk.state() == "degraded"
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


@pytest.mark.expect_log("can(not)? be reached")
def test_a_disk_is_detached_while_a_read_waits_for_the_image(tmp_path: Path) -> None:
    """Its guest is gone before; nobody goes on trying, and all others are served on."""

    async def story(host: Host) -> None:
        disk = await away(host, Mode.WRITE_THROUGH)
        with trio.move_on_after(1.5):
            await read(disk)
        await host.detach("d", discard=False)
        host.origin.heal()
        await trio.sleep(30)
        assert disk.image.origin is None
        assert await read(await host.attach("e", settings(Mode.WRITE_THROUGH))) == OLD

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
