# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""File and block device origins: real files and loop devices, and a kernel that hangs or lies where none will."""

# ruff: noqa: ASYNC240  (nothing else runs on the loop while a test looks at its file)

import errno
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from forebay.errors import ForebayError
from forebay.origin.addresses import DeviceAddress, FileAddress
from forebay.origin.block import BlockOrigin
from forebay.origin.calls import PUNCH_HOLE, ZERO_RANGE, Buffer, SystemCalls
from forebay.origin.file import FileOrigin
from forebay.origin.opening import OpenImage, open_device, open_image
from forebay.origin.pieces import WRITE_PIECE
from forebay.origin.protocol import HOLE, ZERO
from forebay.origin.threads import StoreThreads
from real.processes import loop_device

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
PATIENT, SHORT = 30.0, 0.1


class Faulty(SystemCalls):
    """A kernel that hangs, fails and cuts short where the test says so.

    `hang[name]`: the next call of that name waits for the event. `fail[name]`: errors for the next calls, in order.
    """

    def __init__(self) -> None:
        self.hang: dict[str, threading.Event] = {}
        self.fail: dict[str, list[int]] = {}
        self.most = 1 << 30  # bytes that one read or write moves
        self.made: list[str] = []

    def _before(self, name: str) -> None:
        self.made.append(name)
        event = self.hang.pop(name, None)
        if event is not None:
            event.wait(20)
        if self.fail.get(name):
            number = self.fail[name].pop(0)
            if number:
                raise OSError(number, os.strerror(number))

    def preadv(self, fd: int, buffers: list[bytearray | memoryview], offset: int) -> int:
        self._before("preadv")
        return super().preadv(fd, [memoryview(buffers[0])[: self.most]], offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        self._before("pwritev")
        if self.most < 1 << 30:
            buffers = [memoryview(buffers[0])[: self.most]]
        return super().pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        self._before("fdatasync")
        super().fdatasync(fd)

    def fsync(self, fd: int) -> None:
        self._before("fsync")
        super().fsync(fd)

    def forget(self, fd: int, offset: int = 0, length: int = 0) -> None:
        self._before("forget")
        super().forget(fd, offset, length)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self._before(f"fallocate {mode}")
        super().fallocate(fd, mode, offset, length)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm.img"


@pytest.fixture
def content(path: Path, random_image: Callable[..., bytes]) -> bytearray:
    return bytearray(random_image(path, SIZE))


def opened(path: Path, read_only: bool = False) -> OpenImage:
    return open_image(FileAddress("images", path.parent, path.name), read_only=read_only)


@asynccontextmanager
async def origin_of(
    file: OpenImage,
    kind: type[FileOrigin] = FileOrigin,
    *,
    calls: SystemCalls | None = None,
    timeout: float = PATIENT,
    threads: StoreThreads | None = None,
) -> AsyncIterator[FileOrigin]:
    origin = kind(
        file, "images:vm.img", threads=threads or StoreThreads("s"), timeout=timeout, calls=calls
    )
    try:
        yield origin
    finally:
        origin.timeout = PATIENT
        await origin.close()


@asynccontextmanager
async def kinds(kind: str, path: Path) -> AsyncIterator[FileOrigin]:
    if kind == "file":
        async with origin_of(opened(path)) as origin:
            yield origin
        return
    with loop_device(path, int(kind)) as device:
        file = open_device(DeviceAddress(str(device)), read_only=False)
        async with origin_of(file, BlockOrigin) as origin:
            yield origin


every_kind = pytest.mark.parametrize("kind", ["file", "512", "4096"])


# ------------------------------------------------------------------------------------ content, against a bytearray


@every_kind
async def test_the_same_as_a_bytearray(
    kind: str, path: Path, content: bytearray, rng: random.Random
) -> None:
    async with kinds(kind, path) as origin:
        assert origin.size == SIZE
        for _ in range(60):
            offset = rng.randrange(SIZE)
            length = min(SIZE - offset, rng.choice([1, 511, 4096, 65536, MIB, WRITE_PIECE + 3]))
            what = rng.choice(["write", "zero", "trim", "punch"])
            if what == "write":
                data = rng.randbytes(length)
                cut = rng.randrange(length + 1)
                await origin.write(offset, [data[:cut], memoryview(bytearray(data[cut:]))])
                content[offset : offset + length] = data
            else:
                if what == "trim":
                    await origin.trim(offset, length)
                else:
                    await origin.zero(offset, length, may_trim=what == "punch")
                content[offset : offset + length] = bytes(length)
            low = max(0, offset - 5000)
            high = min(SIZE, offset + length + 5000)
            assert await origin.read(low, high - low) == content[low:high]
        await origin.flush()
    assert path.read_bytes() == content


@every_kind
async def test_what_lies_beyond_the_end_is_not_ours(
    kind: str, path: Path, content: bytearray
) -> None:
    async with kinds(kind, path) as origin:
        tail = await origin.read(SIZE - 100, 4096)
        assert tail == content[-100:] + bytes(3996)
        for call in (
            lambda: origin.write(SIZE - 1, [b"xx"]),
            lambda: origin.zero(SIZE, 1, may_trim=False),
            lambda: origin.trim(SIZE - 1, 2),
            lambda: origin.read(-1, 1),
            lambda: origin.extents(SIZE - 1, 2),
        ):
            with pytest.raises(OSError, match="images:vm.img has 8388608 bytes") as refused:
                await call()
            assert refused.value.errno == errno.EINVAL
    assert path.stat().st_size == SIZE


async def test_an_image_that_ends_inside_a_sector(path: Path) -> None:
    path.write_bytes(b"a" * 5000)
    async with origin_of(opened(path)) as origin:
        assert origin.size == 5000
        assert await origin.read(4096, 4096) == b"a" * 904 + bytes(3192)
        await origin.write(4999, [b"b"])
        await origin.trim(4096, 900)
        assert await origin.read(4990, 10) == b"\0" * 6 + b"aaab"
    assert path.stat().st_size == 5000


async def test_an_image_that_shrank_is_an_error_with_its_name(
    path: Path, content: bytearray
) -> None:
    async with origin_of(opened(path)) as origin:
        os.truncate(path, SIZE - 10)
        assert await origin.read(0, 4096) == content[:4096]
        for call in (origin.read, origin.extents):
            with pytest.raises(OSError, match="images:vm.img ends at byte 8388598") as failed:
                await call(SIZE - 4096, 4096)
            assert failed.value.errno == errno.EIO


async def test_short_reads_and_writes_are_continued(path: Path, content: bytearray) -> None:
    calls = Faulty()
    calls.most = 1000
    async with origin_of(opened(path), calls=calls) as origin:
        assert await origin.read(7, 65536) == content[7 : 7 + 65536]
        await origin.write(7, [b"a" * 2500, b"b" * 2500, b"", b"c"])
    assert (
        path.read_bytes()[:5010]
        == content[:7] + b"a" * 2500 + b"b" * 2500 + b"c" + (content[5008:5010])
    )


async def test_more_buffers_than_one_call_takes(path: Path, content: bytearray) -> None:
    async with origin_of(opened(path)) as origin:
        await origin.write(1, [bytes([index % 251]) for index in range(3000)])
    assert path.read_bytes()[1:3001] == bytes(index % 251 for index in range(3000))


async def test_a_read_only_image_is_not_changed(path: Path, content: bytearray) -> None:
    async with origin_of(opened(path, read_only=True)) as origin:
        for call in (
            partial(origin.write, 0, [b"x"]),
            partial(origin.zero, 0, 1, may_trim=True),
            partial(origin.trim, 0, 1),
        ):
            with pytest.raises(OSError, match="for reading only") as refused:
                await call()
            assert refused.value.errno == errno.EROFS
        assert await origin.read(0, SIZE) == content


# --------------------------------------------------------------------------------------------------- holes


def total(extents: list[tuple[int, int]]) -> int:
    return sum(length for length, _ in extents)


async def test_a_sparse_image_stays_sparse(path: Path) -> None:
    with path.open("wb") as made:
        made.truncate(16 * MIB)
        os.pwrite(made.fileno(), b"x" * 65536, 4 * MIB)
    async with origin_of(opened(path)) as origin:
        assert await origin.extents(0, 16 * MIB) == [
            (4 * MIB, HOLE | ZERO),
            (65536, 0),
            (12 * MIB - 65536, HOLE | ZERO),
        ]
        assert await origin.extents(4 * MIB + 100, 1000) == [(1000, 0)]
        assert await origin.extents(5 * MIB, 0) == []
        await origin.trim(4 * MIB, 65536)
        assert await origin.extents(0, 16 * MIB) == [(16 * MIB, HOLE | ZERO)]
        await origin.zero(0, MIB, may_trim=False)
    assert path.stat().st_blocks * 512 >= MIB, "kept its space"


async def test_a_badly_fragmented_image_is_covered(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.origin.blocking.MOST_EXTENTS", 3)
    with path.open("wb") as made:
        made.truncate(MIB)
        for index in range(8):
            os.pwrite(made.fileno(), b"x" * 4096, index * 65536)
    async with origin_of(opened(path)) as origin:
        found = await origin.extents(0, MIB)
    assert total(found) == MIB
    assert found == [(4096, 0), (61440, HOLE | ZERO), (4096, 0), (MIB - 69632, 0)]


class NoHoles(Faulty):
    """A file system on which no hole can be punched; it tells those that there are."""

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self.made.append(f"fallocate {mode}")
        raise OSError(errno.EOPNOTSUPP, "no fallocate here")


class AllData(NoHoles):
    """One that tells no holes either: `how` it says so."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how

    def seek_data(self, fd: int, offset: int) -> int:
        if self._how == "refuses":
            raise OSError(errno.EINVAL, "no such whence")
        return offset

    def seek_hole(self, fd: int, offset: int) -> int:
        del offset
        return os.fstat(fd).st_size


def sparse(path: Path) -> int:
    """Make it 16 MiB with 16 runs of data of 64 KiB; the bytes that it occupies."""
    with path.open("wb") as made:
        made.truncate(16 * MIB)
        for index in range(16):
            os.pwrite(made.fileno(), b"x" * 65536, index * MIB)
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("most", [4096, 3])
async def test_zeros_leave_holes_alone_where_none_can_be_punched(
    path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.origin.blocking.MOST_EXTENTS", most)
    before = sparse(path)
    calls = NoHoles()
    async with origin_of(opened(path), calls=calls) as origin:
        assert not await origin.ask_punches()
        assert origin.punches is False
        await origin.zero(1000, 16 * MIB - 1000, may_trim=True)
        assert calls.made.count(f"fallocate {PUNCH_HOLE}") == 1, "asked once"
        assert calls.made.count("pwritev") == 16
        assert path.read_bytes() == b"x" * 1000 + bytes(16 * MIB - 1000)
        assert path.stat().st_blocks * 512 == before
        await origin.zero(5 * MIB + 65536, MIB, may_trim=False)
    assert path.stat().st_blocks * 512 >= before + MIB - 65536, "provisioned"


@pytest.mark.parametrize("how", ["all is data", "refuses"])
@pytest.mark.parametrize("first", [0, 65536 + 1000])
async def test_zeros_are_not_written_over_zeros_where_no_hole_is_told(
    path: Path, how: str, first: int
) -> None:
    """As on NFS before 4.2, where a guest's mkfs would fill the store."""
    before = sparse(path)
    content = path.read_bytes()
    async with origin_of(opened(path), calls=AllData(how)) as origin:
        await origin.zero(first, 16 * MIB - first - 7, may_trim=True)
    assert path.read_bytes() == content[:first] + bytes(16 * MIB - first)
    assert path.stat().st_blocks * 512 == before


@pytest.mark.parametrize("size", [16 * MIB, 16 * MIB - 5])
async def test_asking_for_holes_changes_nothing(path: Path, size: int) -> None:
    before = sparse(path)
    os.truncate(path, size)
    content = path.read_bytes()
    async with origin_of(opened(path)) as origin:
        assert await origin.ask_punches()
        assert origin.punches
    assert path.read_bytes() == content
    assert path.stat().st_blocks * 512 == before


async def test_a_store_that_does_not_answer_is_not_known_to_have_no_holes(
    path: Path, content: bytearray
) -> None:
    calls = Faulty()
    calls.fail[f"fallocate {PUNCH_HOLE}"] = [errno.EIO]
    async with origin_of(opened(path), calls=calls) as origin:
        with pytest.raises(OSError, match="Input/output"):
            await origin.ask_punches()
        assert origin.punches is None
        assert await origin.ask_punches()


@pytest.mark.parametrize("sector", [512, 4096])
async def test_a_device_says_whether_it_can_zero_without_being_written(
    path: Path, content: bytearray, sector: int
) -> None:
    """A loop device on a file system with holes can."""
    async with kinds(str(sector), path) as origin:
        assert await origin.ask_punches()
        await origin.zero(MIB, 4 * MIB, may_trim=True)
        await origin.flush()
        content[MIB : 5 * MIB] = bytes(4 * MIB)
        assert await origin.read(0, SIZE) == content


@pytest.mark.parametrize("sector", [512, 4096])
async def test_a_device_is_all_data(path: Path, content: bytearray, sector: int) -> None:
    async with kinds(str(sector), path) as origin:
        assert await origin.extents(1, 70000) == [(70000, 0)]
        assert (await origin.identity()).size == SIZE


async def test_a_device_in_use_is_refused(path: Path, content: bytearray) -> None:
    with loop_device(path, 512) as device:
        image = DeviceAddress(str(device))
        file = open_device(image, read_only=False)
        with pytest.raises(ForebayError, match="in use"):
            open_device(image, read_only=False)
        os.close(file.fd)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, 524])
async def test_zeros_where_fallocate_is_missing(
    path: Path, content: bytearray, number: int
) -> None:
    calls = Faulty()
    for mode in (PUNCH_HOLE, ZERO_RANGE):
        calls.fail[f"fallocate {mode}"] = [number] * 2
    async with origin_of(opened(path), calls=calls) as origin:
        await origin.trim(100, 2 * MIB)
        await origin.zero(4 * MIB, 10, may_trim=False)
    content[100 : 100 + 2 * MIB] = bytes(2 * MIB)
    content[4 * MIB : 4 * MIB + 10] = bytes(10)
    assert path.read_bytes() == content
    assert [name for name in calls.made if name.startswith("fall")] == [
        f"fallocate {PUNCH_HOLE}",
        f"fallocate {ZERO_RANGE}",
    ], "asked once, not every time"


async def test_a_full_store_is_no_reason_to_write_zeros(path: Path, content: bytearray) -> None:
    calls = Faulty()
    calls.fail[f"fallocate {ZERO_RANGE}"] = [errno.ENOSPC]
    async with origin_of(opened(path), calls=calls) as origin:
        with pytest.raises(OSError, match="No space"):
            await origin.zero(0, 4096, may_trim=False)
    assert "pwritev" not in calls.made


# ------------------------------------------------------------------------------------------------ identity


async def test_a_change_shows_in_the_identity(path: Path, content: bytearray) -> None:
    async with origin_of(opened(path)) as origin:
        before = await origin.identity()
        assert (before.size, before.inode) == (SIZE, path.stat().st_ino)
        assert await origin.identity() == before
        os.utime(path, ns=(1, before.mtime_ns + 1))
        assert (await origin.identity()).mtime_ns == before.mtime_ns + 1
        os.truncate(path, SIZE + 4096)
        assert (await origin.identity()).size == SIZE + 4096


def replace(path: Path) -> None:
    other = path.with_name("new.img")
    other.write_bytes(b"new")
    other.rename(path)


def replace_and_keep(path: Path) -> None:
    os.link(path, path.with_name("old.img"))
    replace(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.unlink(), "was deleted or replaced"),
        (replace, "was deleted or replaced"),
        (replace_and_keep, "replaced by another file"),
        (lambda path: path.rename(path.with_name("old.img")), "was renamed"),
    ],
)
async def test_an_image_that_is_no_longer_the_one_of_that_name(
    path: Path, content: bytearray, change: Callable[[Path], None], says: str
) -> None:
    async with origin_of(opened(path)) as origin:
        change(path)
        with pytest.raises(OSError, match=says) as stale:
            await origin.identity()
        assert stale.value.errno == errno.ESTALE


# ------------------------------------------------------------------------------- a store that hangs


async def test_a_hung_store_stops_only_itself(tmp_path: Path) -> None:
    names = ("dead", "well")
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 1024)
    calls = Faulty()
    back = threading.Event()
    hung = StoreThreads("dead", foreground=2)

    def hang(fd: int, buffers: object, offset: int) -> int:
        back.wait(20)
        return 0

    calls.preadv = hang  # type: ignore[method-assign]
    async with (
        origin_of(opened(tmp_path / "dead"), calls=calls, timeout=SHORT, threads=hung) as dead,
        origin_of(opened(tmp_path / "well")) as well,
    ):
        try:
            for _ in range(5):  # more than it has threads: the wait for a thread is bounded too
                with pytest.raises(TimeoutError, match="reading images:"):
                    await dead.read(0, 4096)
                assert await well.read(0, 4) == b"well"
            assert hung.busy == (2, 0), "a hung call keeps its place"
        finally:
            back.set()


async def test_a_hung_store_does_not_hold_up_its_background_work_for_ever(
    path: Path, content: bytearray
) -> None:
    calls = Faulty()
    back = calls.hang["preadv"] = threading.Event()
    async with origin_of(opened(path), calls=calls) as origin, trio.open_nursery() as nursery:
        nursery.start_soon(origin.read, 0, 4096)
        await trio.testing.wait_all_tasks_blocked()
        assert await origin.read(0, 10, background=True) == content[:10]
        back.set()


async def test_background_reads_let_foreground_reads_go_first(
    path: Path, content: bytearray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.origin.threads.BACKGROUND_PATIENCE", 20)
    calls = Faulty()
    back = calls.hang["preadv"] = threading.Event()
    order: list[str] = []
    async with origin_of(opened(path), calls=calls) as origin:

        async def read(name: str, background: bool) -> None:
            await origin.read(0, 10, background=background)
            order.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, "miss", False)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(read, "preload", True)
            await trio.testing.wait_all_tasks_blocked()
            assert len(calls.made) <= 1, "the preload has not begun"
            back.set()
    assert order == ["miss", "preload"]


async def test_eight_misses_take_the_time_of_one(path: Path, content: bytearray) -> None:
    calls = Faulty()
    together = threading.Barrier(8)
    real = SystemCalls().preadv

    def read(fd: int, buffers: list[bytearray | memoryview], offset: int) -> int:
        together.wait(10)
        return real(fd, buffers, offset)

    calls.preadv = read  # type: ignore[method-assign]
    async with origin_of(opened(path), calls=calls) as origin, trio.open_nursery() as nursery:
        for index in range(8):
            nursery.start_soon(origin.read, index * 65536, 65536)


async def test_a_late_write_never_lands_on_a_newer_one(path: Path, content: bytearray) -> None:
    calls = Faulty()
    back = calls.hang["pwritev"] = threading.Event()
    async with origin_of(opened(path), calls=calls, timeout=SHORT) as origin:
        with pytest.raises(TimeoutError, match="writing images:"):
            await origin.write(4096, [b"old" * 1000])
        for call in (
            lambda: origin.write(4096 + 2999, [b"new"]),
            lambda: origin.read(4096, 1),
            lambda: origin.trim(0, 4097),
            lambda: origin.extents(0, SIZE),
            origin.quiesce,
        ):
            with pytest.raises(TimeoutError):
                await call()
        await origin.write(0, [b"free"])  # its neighbours are
        await origin.read(4096 + 3000, 10)
        origin.timeout = PATIENT
        async with trio.open_nursery() as nursery:
            nursery.start_soon(origin.write, 4096, [b"new" * 1000])
            nursery.start_soon(origin.quiesce)
            await trio.testing.wait_all_tasks_blocked()
            back.set()
        assert await origin.read(4096, 3000) == b"new" * 1000


async def test_writes_that_were_given_up_keep_others_from_what_they_change_and_from_nothing_else(
    path: Path, content: bytearray
) -> None:
    calls = Faulty()
    back = calls.hang["pwritev"] = threading.Event()
    ranges = [(8192, b"a" * 4096), (65536, b"b" * 100), (SIZE - 4096, b"c" * 4096)]
    async with origin_of(opened(path), calls=calls, timeout=SHORT) as origin:
        with pytest.raises(TimeoutError, match="writing images:"):
            await origin.write_ranges(ranges)
        for at in (0, 8191 - 4095, 12288, 65536 - 1, 65636, SIZE - 8192):
            await origin.read(at, 1)
        for at in (8192, 12287, 65536, 65635, SIZE - 1):
            with pytest.raises(TimeoutError):
                await origin.read(at, 1)
        origin.timeout = PATIENT
        back.set()
        await origin.quiesce()
        assert await origin.read(65536, 100) == b"b" * 100


async def test_a_late_write_has_what_it_was_given(path: Path, content: bytearray) -> None:
    """The cache hands out slices of its memory, which soon hold another block."""
    calls = Faulty()
    back = calls.hang["pwritev"] = threading.Event()
    slot = bytearray(b"mine" * 1024)
    async with origin_of(opened(path), calls=calls, timeout=SHORT) as origin:
        with pytest.raises(TimeoutError):
            await origin.write(0, [memoryview(slot)])
        slot[:] = b"else" * 1024
        origin.timeout = PATIENT
        back.set()
        await origin.quiesce()
        assert await origin.read(0, 4096) == b"mine" * 1024


async def test_closing_does_not_let_a_late_write_into_another_file(
    path: Path, content: bytearray
) -> None:
    """A closed descriptor's number goes to the next file that anyone opens."""
    calls = Faulty()
    back = calls.hang["pwritev"] = threading.Event()
    file = opened(path)
    async with origin_of(file, calls=calls, timeout=SHORT) as origin:
        with pytest.raises(TimeoutError):
            await origin.write(0, [b"late"])
        await origin.close()
        assert os.fstat(file.fd).st_ino == path.stat().st_ino, "the number is still taken"
        origin.timeout = PATIENT
        back.set()
        await origin.quiesce()
        with pytest.raises(OSError, match="closed"):
            await origin.read(0, 1)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(file.fd)


async def test_a_write_that_never_began_is_forgotten(path: Path, content: bytearray) -> None:
    calls = Faulty()
    back = calls.hang["preadv"] = threading.Event()
    threads = StoreThreads("s", foreground=1)
    async with origin_of(opened(path), calls=calls, threads=threads) as origin:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(origin.read, 0, 10)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(SHORT):
                await origin.write(0, [b"x"])
            back.set()
        await origin.quiesce()
        assert calls.made == ["preadv"]
        assert await origin.read(0, 10) == content[:10]


# ------------------------------------------------------------------------------------------- durability


async def test_a_flush_that_failed_is_told_to_all_that_waited(
    path: Path, content: bytearray
) -> None:
    """The kernel tells one caller. Everyone whose data it may have been hears of it."""
    calls = Faulty()
    back = calls.hang["fdatasync"] = threading.Event()
    calls.fail["fdatasync"] = [errno.ENOSPC]
    failed: list[int | None] = []
    async with origin_of(opened(path), calls=calls) as origin:

        async def flush() -> None:
            try:
                await origin.flush()
            except OSError as error:
                failed.append(error.errno)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(flush)
            await trio.testing.wait_all_tasks_blocked()
            back.set()
        assert failed[0] == errno.ENOSPC
        assert len(failed) == 3
        assert origin.sync_failures == 1
        assert calls.made.count("forget") == 1, "what the medium has is what is read"
        await origin.write(0, [content[:4096]])
        await origin.flush()
        assert origin.sync_failures == 1


async def test_the_times_are_flushed_where_they_are_asked_for(
    path: Path, content: bytearray
) -> None:
    """By the sync that serves whoever asked, also where that is not his own."""
    calls = Faulty()
    back = calls.hang["fdatasync"] = threading.Event()
    async with origin_of(opened(path), calls=calls) as origin, trio.open_nursery() as nursery:
        nursery.start_soon(origin.flush)
        while not calls.made:  # noqa: ASYNC110  (else its thread could take the wish of the third along)
            await trio.sleep(0.001)
        nursery.start_soon(origin.flush)
        nursery.start_soon(partial(origin.flush, times=True))
        nursery.start_soon(origin.flush)
        await trio.testing.wait_all_tasks_blocked()
        back.set()
    assert calls.made == ["fdatasync", "fsync"]


async def test_flushes_that_come_together_share_one(path: Path, content: bytearray) -> None:
    calls = Faulty()
    back = calls.hang["fdatasync"] = threading.Event()
    async with origin_of(opened(path), calls=calls) as origin, trio.open_nursery() as nursery:
        nursery.start_soon(origin.flush)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(10):
            nursery.start_soon(origin.flush)
        await trio.testing.wait_all_tasks_blocked()
        back.set()
    assert calls.made.count("fdatasync") == 2, "one that ran, and one for all that came meanwhile"


async def test_an_error_that_came_after_the_time_out_is_not_swallowed(
    path: Path, content: bytearray
) -> None:
    calls = Faulty()
    back = calls.hang["fdatasync"] = threading.Event()
    calls.fail["fdatasync"] = [errno.EIO]
    async with origin_of(opened(path), calls=calls, timeout=SHORT) as origin:
        with pytest.raises(TimeoutError, match="flushing images:"):
            await origin.flush()
        await origin.write(0, [b"written again"])  # may be what the hung fdatasync fails on
        with pytest.raises(TimeoutError):
            await origin.flush()
        origin.timeout = PATIENT
        back.set()
        with pytest.raises(OSError, match="an earlier flush failed"):
            await origin.flush()
        await origin.flush()


async def test_a_flush_whose_task_went_away_counts_for_others(
    path: Path, content: bytearray
) -> None:
    calls = Faulty()
    back = calls.hang["fdatasync"] = threading.Event()
    calls.fail["fdatasync"] = [errno.EIO]
    async with origin_of(opened(path), calls=calls) as origin:
        with trio.move_on_after(SHORT):
            await origin.flush()
        back.set()
        with pytest.raises(OSError, match="an earlier flush failed"):
            await origin.flush()
        await origin.flush()
