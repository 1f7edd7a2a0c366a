# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A disk's socket: opened, shut in time whatever clients wait for, and opened again."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from forebay.config.sections import GatewaySection
from forebay.doors.accepting import make_folder, socket_path
from forebay.doors.listener import Listener
from forebay.errors import ForebayError
from forebay_nbd import Timing
from forebay_nbd.client.client import Client


class Memory:
    """An export that holds 1 MiB of memory; reads wait while `hang` is set."""

    name = "d"
    size = 1 << 20
    read_only = False
    rotational = False
    preferred_block = 4096
    contexts: tuple[str, ...] = ()
    throttle = None

    def __init__(self) -> None:
        self.content = bytearray(os.urandom(self.size))
        self.timing = Timing()
        self.hang: trio.Event | None = None

    def read_now(self, offset: int, length: int) -> bytes | None:
        return None

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        return 0

    def publish(self) -> None:
        pass

    def answered(self) -> None:
        pass

    def join_read(self, offset: int, length: int, wake: Callable[[], None]) -> bool:
        return False

    def begin_flush(self) -> None:
        pass

    def flush_now(self) -> bool:
        return False

    def unreadable(self) -> None:
        pass

    def pin(self) -> int:
        return 0

    def unpin(self, token: int) -> None:
        pass

    async def read(self, offset: int, length: int) -> list[bytes | bytearray | memoryview]:
        if self.hang is not None:
            await self.hang.wait()
        return [bytes(self.content[offset : offset + length])]

    async def write(self, offset: int, data: memoryview, fua: bool) -> None:
        self.content[offset : offset + len(data)] = data

    async def flush(self) -> None:
        pass

    async def trim(self, offset: int, length: int, fua: bool) -> None:
        pass

    async def zero(self, offset: int, length: int, fua: bool, no_hole: bool, fast: bool) -> None:
        raise OSError(errno.ENOTSUP, "no")

    async def cache(self, offset: int, length: int) -> None:
        pass

    async def extents(
        self, context: str, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        return [(length, 0)]

    def opened(self) -> None:
        pass

    def closed(self) -> None:
        pass


@pytest.fixture
def run(short_path: Path) -> Path:
    (short_path / "disks").mkdir()
    return short_path


def section(run: Path) -> GatewaySection:
    return GatewaySection(run=run, socket_group=None)


async def test_a_listener_opens_and_shuts_and_opens_again(run: Path) -> None:
    disk = Memory()
    path = socket_path(run, "d")
    listener = Listener(disk, path, section(run))
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            await listener.open(nursery)
            assert os.listdir(run / "disks") == ["d.sock"]
            client = await Client.connect(nursery, str(path), "d")
            assert listener.clients == 1
            assert await client.pread(5, 100) == disk.content[5:105]
            await listener.shut(5)
            assert os.listdir(run / "disks") == []
            assert listener.clients == 0
            with pytest.raises(ConnectionError):
                await client.pread(5, 100)
        await listener.shut(5)  # once more does no harm


def test_a_folder_of_sockets_is_made_so_that_clients_can_reach_them(short_path: Path) -> None:
    """Also where systemd-tmpfiles has made none, as for a further instance; one that is there keeps its mode."""
    before = os.umask(0o027)  # that of the unit
    try:
        for mode in (0o755, 0o711):
            make_folder(short_path / "stores")
            assert stat.S_IMODE((short_path / "stores").stat().st_mode) == mode
            (short_path / "stores").chmod(0o711)
    finally:
        os.umask(before)


@pytest.mark.expect_log("somebody removed .*d.sock: made anew")
@pytest.mark.parametrize("removed", ["the socket", "its directory"])
async def test_a_socket_that_somebody_removed_is_made_anew(
    run: Path, removed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is connected stays so, and others find it again; so does the process after a planned restart."""
    monkeypatch.setattr("forebay.doors.named.LOOK_SECONDS", 0.05)
    disk = Memory()
    listener = Listener(disk, socket_path(run, "d"), section(run))
    async with trio.open_nursery() as nursery:
        await listener.open(nursery)
        client = await Client.connect(nursery, str(listener.path), "d")
        listener.path.unlink()
        if removed == "its directory":
            listener.path.parent.rmdir()
        with trio.fail_after(20):
            while not listener.path.exists():  # noqa: ASYNC110 - a directory tells nobody
                await trio.sleep(0.01)
        other = await Client.connect(nursery, str(listener.path), "d")
        for one in (client, other):
            assert await one.pread(5, 100) == disk.content[5:105]
        found = await listener.suspend(5)
        assert len(found.clients) == 2
        listener.path.unlink()
        after = Listener(disk, listener.path, section(run))
        await after.open(nursery, found)
        last = await Client.connect(nursery, str(listener.path), "d")
        for one in (client, other, last):
            assert await one.pread(5, 100) == disk.content[5:105]
        await after.shut(5)
        assert os.listdir(run / "disks") == []
        nursery.cancel_scope.cancel()


async def test_what_lies_in_the_place_of_a_socket_is_left_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.doors.named.LOOK_SECONDS", 0.01)
    listener = Listener(Memory(), socket_path(run, "d"), section(run))
    async with trio.open_nursery() as nursery:
        await listener.open(nursery)
        listener.path.unlink()
        listener.path.write_text("mine")
        await trio.sleep(0.1)
        assert listener.path.read_text() == "mine"
        await listener.shut(5)
    assert listener.path.read_text() == "mine"


@pytest.mark.expect_log("made anew")
async def test_a_socket_that_cannot_be_made_anew_is_told_of_once_and_tried_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("forebay.doors.named.LOOK_SECONDS", 0.01)
    listener = Listener(Memory(), socket_path(run, "d"), section(run))
    async with trio.open_nursery() as nursery:
        await listener.open(nursery)
        listener.path.unlink()
        listener.path.parent.rmdir()
        listener.path.parent.write_text("in the way")
        with trio.fail_after(20):
            while "cannot be made anew" not in caplog.text:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await trio.sleep(0.1)
        assert caplog.text.count("cannot be made anew") == 1
        listener.path.parent.unlink()
        with trio.fail_after(20):
            while not listener.path.exists():  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_requests_in_flight_are_answered_before_the_socket_is_shut(run: Path) -> None:
    disk = Memory()
    disk.hang = trio.Event()
    listener = Listener(disk, socket_path(run, "d"), section(run))
    answers: list[bytearray] = []
    async with trio.open_nursery() as nursery:
        await listener.open(nursery)
        client = await Client.connect(nursery, str(listener.path), "")

        async def read() -> None:
            answers.append(await client.pread(0, 4096))

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.start_soon(listener.shut, 20)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not answers
        disk.hang.set()
    assert answers == [disk.content[:4096]]


async def test_a_request_that_hangs_does_not_keep_the_door_open(run: Path) -> None:
    disk = Memory()
    disk.hang = trio.Event()
    listener = Listener(disk, socket_path(run, "d"), section(run))
    async with trio.open_nursery() as nursery:
        await listener.open(nursery)
        client = await Client.connect(nursery, str(listener.path), "")

        async def read() -> None:
            with pytest.raises(ConnectionError):
                await client.pread(0, 4096)

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.fail_after(5):
            await listener.shut(0.1)


async def test_a_door_that_cannot_be_made_says_so(run: Path) -> None:
    (run / "none").touch()
    listener = Listener(Memory(), run / "none" / "d.sock", section(run))
    async with trio.open_nursery() as nursery:
        with pytest.raises(ForebayError, match=r"cannot make the socket .*none/d\.sock"):
            await listener.open(nursery)


async def test_a_socket_that_is_not_ours_is_left_alone(run: Path) -> None:
    listener = Listener(Memory(), socket_path(run, "d"), section(run))
    async with trio.open_nursery() as nursery:
        await listener.open(nursery)
        listener.path.unlink()
        listener.path.touch()
        await listener.shut(5)
    assert os.listdir(run / "disks") == ["d.sock"]


async def test_hanging_up_ends_requests_that_wait(run: Path) -> None:
    disk = Memory()
    disk.hang = trio.Event()
    listener = Listener(disk, socket_path(run, "d"), section(run))
    async with trio.open_nursery() as nursery:
        await listener.open(nursery)
        client = await Client.connect(nursery, str(listener.path), "")

        async def read() -> None:
            with pytest.raises(ConnectionError):
                await client.pread(0, 4096)

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked(0.05)
        listener.hang_up()
        with trio.fail_after(5):
            await listener.shut(60)
    assert os.listdir(run / "disks") == []


async def test_a_fault_of_the_client_itself_ends_its_connection(
    run: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    """And nothing else: the next connection works."""
    expect_log("the connection failed")
    disk = Memory()
    listener = Listener(disk, socket_path(run, "d"), section(run))
    async with trio.open_nursery() as nursery:
        await listener.open(nursery)
        client = await Client.connect(nursery, str(listener.path), "")
        with monkeypatch.context() as planted:
            planted.setattr(client, "_handle_reply", None)
            with pytest.raises(
                ConnectionError, match=r"a fault of the client itself \(TypeError\)"
            ):
                await client.pread(0, 4096)
        client = await Client.connect(nursery, str(listener.path), "")
        assert await client.pread(0, 4096) == disk.content[:4096]
        await client.aclose()
        await listener.shut(5)
