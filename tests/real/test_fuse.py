# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The FUSE door: what needs a path, what happens when one side dies, and what it refuses."""

import contextlib
import ctypes
import errno
import grp
import json
import os
import pwd
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import forebay_fast
from real.fuse_mount import FuseMount, need_fuse
from real.gateway_process import GatewayProcess
from real.processes import end, need

KIB, MIB = 1 << 10, 1 << 20
SIZE = 16 * MIB

MakeMount = Callable[..., FuseMount]
MakeSteady = Callable[[Path], "Steady"]


@pytest.fixture
def make_mount(gateway: GatewayProcess) -> Iterator[MakeMount]:
    """`make_mount("--wait", "1s")`: mounted until the end of the test, which fails on errors in its log."""
    need_fuse()
    made: list[FuseMount] = []

    def make(*options: str, **settings: Any) -> FuseMount:
        mount = FuseMount(gateway, *options, start=False, **settings)
        made.append(mount)
        mount.start()
        return mount

    yield make
    for mount in made:
        mount.remove()
    faults = [line for mount in made for line in mount.loud() if "WARNING" not in line]
    assert not faults, "\n".join(faults)


@pytest.fixture
def mount(make_mount: MakeMount) -> FuseMount:
    return make_mount()


@pytest.fixture
def content(gateway: GatewayProcess, random_image: Any) -> bytes:
    made: bytes = random_image(gateway.images / "a.raw", SIZE, holes=[(5 * MIB, 2 * MIB)])
    return made


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


# --------------------------------------------------------------------------------------------- what is there, and how


def test_disks_and_images_are_files(
    gateway: GatewayProcess, mount: FuseMount, content: bytes
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    (gateway.images / "sub").mkdir()
    (gateway.images / "sub" / "b.raw").write_bytes(content[:MIB])
    (gateway.images / "link.raw").symlink_to(gateway.images / "a.raw")
    (gateway.images / "empty.raw").touch()
    os.mkfifo(gateway.images / "fifo")
    assert sorted(os.listdir(mount.path)) == ["disks", "images", "stage"]
    assert os.listdir(mount.path / "disks") == ["d"]
    # neither links, nor fifos, nor what Forebay itself keeps beside an image
    assert (gateway.images / "a.raw.forebay").is_dir()
    assert sorted(os.listdir(mount.image("."))) == ["a.raw", "empty.raw", "sub"]
    assert os.listdir(mount.image("sub")) == ["b.raw"]
    for hidden in ("link.raw", "fifo", "a.raw.forebay", "a.raw.forebay/owner", "../x"):
        with pytest.raises(FileNotFoundError):
            mount.image(hidden).stat()
    assert mount.image("sub/b.raw").read_bytes() == content[:MIB]
    assert mount.image("empty.raw").read_bytes() == b""
    found = mount.disk("d").stat()
    socket = gateway.sock("d").stat()
    assert found.st_size == SIZE
    assert stat.S_ISREG(found.st_mode)
    mode = stat.S_IMODE(socket.st_mode) & 0o600
    assert stat.S_IMODE(found.st_mode) == mode, "for others the directories above are shut"
    assert (found.st_uid, found.st_gid) == (socket.st_uid, socket.st_gid)
    assert found.st_blocks * 512 == SIZE
    assert abs(found.st_mtime - time.time()) < 60
    assert stat.S_IMODE(mount.image("sub/b.raw").stat().st_mode) & 0o222 == 0
    space = os.statvfs(mount.path)
    assert space.f_blocks * space.f_frsize >= SIZE
    assert space.f_bavail == 0


def test_times_stand_still_until_something_is_written(
    gateway: GatewayProcess, mount: FuseMount, content: bytes
) -> None:
    """The kernel drops its copies of the pages when the time changes."""
    gateway.attach("d", "a.raw", mode="write-back")
    before = mount.disk("d").stat().st_mtime_ns
    with mount.disk("d").open("rb+", buffering=0) as file:
        assert file.read(MIB) == content[:MIB]
        time.sleep(1.1)  # as long as the kernel believes what it was told
        assert os.fstat(file.fileno()).st_mtime_ns == before
        file.write(b"x")
        os.fsync(file.fileno())
    time.sleep(1.1)
    assert mount.disk("d").stat().st_mtime_ns > before


def test_attributes_of_an_open_file_are_those_of_one_that_is_not(
    gateway: GatewayProcess, mount: FuseMount, content: bytes
) -> None:
    """While it is open the core tells them; after a flush the new time."""
    gateway.attach("d", "a.raw", mode="write-back")
    before = mount.disk("d").stat()
    with mount.disk("d").open("rb+", buffering=0) as file:
        time.sleep(1.1)  # as long as the kernel believes what it was told
        found = os.fstat(file.fileno())
        assert found == before
        assert (found.st_blocks, found.st_blksize) == (before.st_blocks, before.st_blksize)
        file.write(b"x" * 4096)
        os.fsync(file.fileno())
        time.sleep(1.1)
        assert os.fstat(file.fileno()).st_mtime_ns > before.st_mtime_ns
    after = mount.disk("d").stat()
    assert abs(after.st_mtime_ns - time.time_ns()) < 60e9


@pytest.mark.parametrize(("core", "server"), [("1", "the core"), ("0", "Python")])
def test_the_log_says_who_serves(
    make_mount: MakeMount, monkeypatch: pytest.MonkeyPatch, core: str, server: str
) -> None:
    if forebay_fast.missing:
        pytest.skip("no core: make setup")
    monkeypatch.setenv("FOREBAY_CORE", core)
    assert f"mounted, served by {server}" in make_mount().log_text()


READER = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY)
print("open", flush=True)
while True:
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(fd, 65536, 0)
    except OSError as fault:
        sys.exit(fault.errno)
"""


def test_it_unmounts_while_requests_are_in_flight(
    gateway: GatewayProcess, make_mount: MakeMount, content: bytes
) -> None:
    """The daemon hangs: readers get an error, and SIGTERM is obeyed."""
    if not forebay_fast.serves():
        pytest.skip("Python waits for the daemon, as long as --patience says")
    gateway.attach("d", "a.raw", mode="write-back")
    mount = make_mount()
    command = [sys.executable, "-c", READER, str(mount.disk("d"))]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    try:
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"open\n"
        os.kill(gateway.pid, signal.SIGSTOP)
        try:
            assert mount.stop() == 0
        finally:
            os.kill(gateway.pid, signal.SIGCONT)
        gone = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}
        assert {reader.wait(20) for reader in readers} <= gone
        assert not mount.mounted
    finally:
        for reader in readers:
            end(reader, signal.SIGKILL)
            assert reader.stdout is not None
            reader.stdout.close()


def test_what_would_change_a_file_is_refused_as_libvirt_tolerates_it(
    gateway: GatewayProcess, mount: FuseMount, content: bytes
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    path, found = mount.disk("d"), mount.disk("d").stat()
    os.chown(path, found.st_uid, found.st_gid)  # nothing changes
    os.chmod(path, stat.S_IMODE(found.st_mode))
    os.truncate(path, SIZE)
    os.utime(path)
    refused: list[tuple[Callable[[], Any], int]] = [
        (lambda: os.chown(path, found.st_uid + 1, -1), errno.EPERM),
        (lambda: os.chmod(path, 0o777), errno.EPERM),
        (lambda: os.truncate(path, 0), errno.EPERM),
        (lambda: os.truncate(path, SIZE + 1), errno.EPERM),
        (lambda: os.setxattr(path, "trusted.libvirt.security.dac", b"+0:+0"), errno.EOPNOTSUPP),
        (lambda: os.unlink(path), errno.EROFS),
        ((mount.path / "disks" / "new").touch, errno.EROFS),
        (partial(os.mkdir, mount.path / "disks" / "new"), errno.EROFS),
        (lambda: os.rename(path, mount.path / "disks" / "new"), errno.EROFS),
        (lambda: os.open(mount.image("a.raw"), os.O_RDWR), errno.EROFS),
        (lambda: os.open(path, os.O_RDWR | os.O_TRUNC), errno.EPERM),
    ]
    for number, (act, expected) in enumerate(refused):
        found_errno = 0
        try:
            act()
        except OSError as fault:
            found_errno = fault.errno or 0
        assert found_errno == expected, number
    assert path.read_bytes() == content


def test_a_disk_may_be_detached_after_the_last_close(
    gateway: GatewayProcess, mount: FuseMount, content: bytes
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    with mount.disk("d").open("rb") as file:
        file.read(1)
        assert gateway.status("d")["clients"] == 1
        assert "connected" in gateway.cli("detach", "d", check=False).stderr
    wait_for(lambda: gateway.status("d")["clients"] == 0)
    gateway.cli("detach", "d")
    with pytest.raises(FileNotFoundError):
        mount.disk("d").open("rb")
    assert os.listdir(mount.path / "disks") == []


def wait_for(holds: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------- images


def test_images_are_read_through_the_cache_and_let_go(
    gateway: GatewayProcess, mount: FuseMount, content: bytes
) -> None:
    def attached() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(gateway.cli("status", "--json").stdout)
        return found

    with mount.image("a.raw").open("rb") as file, mount.image("a.raw").open("rb") as again:
        assert file.read() == again.read() == content
        [disk] = attached()
        assert disk["read_only"]
        assert disk["cached_bytes"] > 0
        assert os.listdir(mount.path / "disks") == [], (
            "the disk that serves an image is no disk of the user's"
        )
    wait_for(lambda: not attached())
    gateway.attach("d", "a.raw", mode="write-back")  # nothing is in the way


def test_the_image_of_a_disk_reads_as_the_disk_has_it(
    gateway: GatewayProcess, mount: FuseMount, content: bytes
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    with mount.disk("d").open("rb+", buffering=0) as disk, mount.image("a.raw").open("rb") as image:
        assert image.read(4096) == content[:4096]
        disk.write(b"n" * 4096)
        assert os.pread(image.fileno(), 4096, 0) == b"n" * 4096, "dirty, and not yet in the image"


def test_an_image_that_changed_is_read_anew(
    gateway: GatewayProcess, mount: FuseMount, content: bytes, rng: random.Random
) -> None:
    gateway.allow_log("changed by somebody else|replaced by another file")
    path = gateway.images / "a.raw"
    assert mount.image("a.raw").read_bytes() == content
    wait_for(lambda: gateway.cli("status", "--json").stdout.strip() == "[]")
    new = rng.randbytes(SIZE // 2)
    path.write_bytes(new)
    time.sleep(1.1)  # as long as the kernel believes what it was told
    assert mount.image("a.raw").read_bytes() == new


def test_what_a_killed_mount_left_attached_goes_when_the_next_one_comes(
    gateway: GatewayProcess, mount: FuseMount, content: bytes
) -> None:
    fd = os.open(mount.image("a.raw"), os.O_RDONLY)
    assert os.pread(fd, 1, 0) == content[:1]
    mount.kill()
    assert "fuse-a.raw" in gateway.cli("status").stdout
    with contextlib.suppress(OSError):  # nobody is there to be told
        os.close(fd)
    mount.start()
    wait_for(lambda: gateway.cli("status", "--json").stdout.strip() == "[]")


def test_the_end_of_the_mount_lets_images_go_at_once(
    gateway: GatewayProcess, mount: FuseMount, content: bytes
) -> None:
    assert mount.image("a.raw").read_bytes() == content
    assert mount.stop() == 0
    assert gateway.cli("status", "--json").stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------------------- reading, writing


def test_fsx(gateway: GatewayProcess, mount: FuseMount, content: bytes, rng: random.Random) -> None:
    """Reads, writes, mapped reads and writes, O_DIRECT, truncates and holes that are refused, fsync and reopening."""
    gateway.attach("d", "a.raw", mode="write-back")
    model, path = bytearray(content), mount.disk("d")
    fsx = Fsx(path, model, rng)
    for step in range(500):
        fsx.step(step)
    fsx.close()
    assert path.read_bytes() == model
    gateway.cli("flush", "d")
    assert (gateway.images / "a.raw").read_bytes() == model


class Fsx:
    """Random work on one file, compared with `model` at each step."""

    def __init__(self, path: Path, model: bytearray, rng: random.Random) -> None:
        self.path, self.model, self.rng = path, model, rng
        self.fd = os.open(path, os.O_RDWR)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.libc = ctypes.CDLL(None, use_errno=True)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.direct)

    def step(self, step: int) -> None:
        acts = {
            "read": 6,
            "write": 6,
            "mapped": 3,
            "direct": 3,
            "refused": 1,
            "fsync": 1,
            "reopen": 0.5,
        }
        [what] = self.rng.choices(list(acts), list(acts.values()))
        length = self.rng.choice([1, 512, 4096, self.rng.randrange(1, 300 * KIB)])
        offset = self.rng.randrange(SIZE - length + 1)
        getattr(self, f"_{what}")(offset, length, f"step {step}: {what} {length} at {offset}")

    def _read(self, offset: int, length: int, step: str) -> None:
        assert os.pread(self.fd, length, offset) == self.model[offset : offset + length], step

    def _write(self, offset: int, length: int, step: str) -> None:
        data = bytes(length) if self.rng.random() < 0.2 else self.rng.randbytes(length)
        assert os.pwrite(self.fd, data, offset) == length, step
        self.model[offset : offset + length] = data

    def _mapped(self, offset: int, length: int, step: str) -> None:
        import mmap

        with mmap.mmap(self.fd, SIZE) as memory:
            assert memory[offset : offset + length] == self.model[offset : offset + length], step
            if self.rng.random() < 0.5:
                data = self.rng.randbytes(length)
                memory[offset : offset + length] = data
                self.model[offset : offset + length] = data
                memory.flush()

    def _direct(self, offset: int, length: int, step: str) -> None:
        import mmap

        offset, length = offset // 4096 * 4096, -(-length // 4096) * 4096
        length = min(length, SIZE - offset)
        with mmap.mmap(-1, length) as memory:  # aligned, as O_DIRECT wants it
            if self.rng.random() < 0.5:
                assert os.preadv(self.direct, [memory], offset) == length, step
                assert memory[:] == self.model[offset : offset + length], step
            else:
                memory[:] = self.rng.randbytes(length)
                assert os.pwrite(self.direct, memory, offset) == length, step
                self.model[offset : offset + length] = memory[:]

    def _refused(self, offset: int, length: int, step: str) -> None:
        with pytest.raises(PermissionError):
            os.ftruncate(self.fd, offset)
        punch = 1 | 2  # KEEP_SIZE, PUNCH_HOLE: not passed on by pyfuse3
        done = self.libc.fallocate(
            self.fd, punch, ctypes.c_longlong(offset), ctypes.c_longlong(length)
        )
        assert (done, ctypes.get_errno()) == (-1, errno.EOPNOTSUPP), step

    def _fsync(self, _offset: int, _length: int, _step: str) -> None:
        os.fsync(self.fd)

    def _reopen(self, _offset: int, _length: int, _step: str) -> None:
        self.close()
        self.__init__(self.path, self.model, self.rng)  # type: ignore[misc]


def test_written_zeros_are_zeroes_to_the_daemon(
    gateway: GatewayProcess, mount: FuseMount, content: bytes
) -> None:
    """Programs that would punch a hole write zeros here; they cost no room in the cache and are a hole in the image."""
    gateway.attach("d", "a.raw", mode="write-back")
    with mount.disk("d").open("rb+", buffering=0) as file:
        for at in range(8):
            os.pwrite(file.fileno(), bytes(MIB), at * MIB)
        os.fsync(file.fileno())
    wait_for(lambda: gateway.status("d")["clients"] == 0)
    gateway.cli("flush", "d")
    used = (gateway.images / "a.raw").stat().st_blocks * 512
    assert (gateway.images / "a.raw").read_bytes() == bytes(8 * MIB) + content[8 * MIB :]
    assert used < 10 * MIB


def test_fsync_is_a_flush_of_the_disk(
    gateway: GatewayProcess, mount: FuseMount, content: bytes
) -> None:
    gateway.attach("d", "a.raw", mode="write-through")
    with mount.disk("d").open("rb+", buffering=0) as file:
        os.pwrite(file.fileno(), b"z" * 9000, 1000)
        os.fsync(file.fileno())
        # in this mode a guest's FLUSH returns when the origin has it
        assert (gateway.images / "a.raw").read_bytes()[1000:10000] == b"z" * 9000


@pytest.mark.parametrize("direct", [0, 1])
def test_fio_verifies(
    gateway: GatewayProcess, mount: FuseMount, content: bytes, direct: int, tmp_path: Path
) -> None:
    need("fio")
    gateway.attach("d", "a.raw", mode="write-back")
    subprocess.run(
        [
            "fio", "--name=v", f"--filename={mount.disk('d')}", f"--size={SIZE}", "--rw=randwrite",
            "--bsrange=4k-128k", "--bs_unaligned=0", "--ioengine=libaio", "--iodepth=8", f"--direct={direct}",
            "--verify=crc32c", "--verify_fatal=1", "--fsync=64", "--allow_file_create=0", "--allow_mounted_write=1",
        ],
        check=True, capture_output=True, timeout=100, cwd=tmp_path,
    )  # fmt: skip


def test_sixteen_readers_at_once(
    gateway: GatewayProcess, mount: FuseMount, content: bytes, rng: random.Random
) -> None:
    gateway.attach("d", "a.raw", "--read-only")
    seeds = [rng.getrandbits(32) for _ in range(16)]
    wrong: list[str] = []

    def read(number: int) -> None:
        own = random.Random(seeds[number])
        path = mount.disk("d") if number % 2 else mount.image("a.raw")
        fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if number % 4 == 1 else 0))
        try:
            for _ in range(60):
                length = 4096 * own.randrange(1, 64)
                offset = 4096 * own.randrange((SIZE - length) // 4096)
                data = aligned_pread(fd, length, offset)
                if data != content[offset : offset + length]:
                    wrong.append(f"reader {number}: {length} at {offset}")
        finally:
            os.close(fd)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert mount.image("a.raw").read_bytes() == content


def aligned_pread(fd: int, length: int, offset: int) -> bytes:
    """As O_DIRECT wants it."""
    import mmap

    with mmap.mmap(-1, length) as memory:
        return memory[: os.preadv(fd, [memory], offset)]


# -------------------------------------------------------------------------------------------------------------- QEMU


def test_qemu_tools_on_a_disk_and_an_overlay_on_an_image(
    gateway: GatewayProcess, mount: FuseMount, content: bytes, tmp_path: Path
) -> None:
    need("qemu-img", "qemu-io")
    gateway.attach("d", "a.raw", mode="write-back")
    (gateway.images / "base.raw").write_bytes(content)
    told = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", mount.disk("d")))
    assert told["virtual-size"] == SIZE
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", mount.disk("d"), copy)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", mount.disk("d"), copy)
    # direct I/O, native AIO, and zeroes and discards, which the file does not know and QEMU replaces
    for cache in (["-t", "none", "-n"], ["-t", "writethrough"], ["-t", "none", "-i", "threads"]):
        words = [
            "write -P 7 64k 300k",
            "flush",
            "write -z 1M 1M",
            "discard 3M 64k",
            "read -P 7 64k 300k",
            "read -P 0 1M 1M",
        ]
        commands = [word for one in words for word in ("-c", one)]
        run("qemu-io", "-f", "raw", "-d", "unmap", *cache, *commands, mount.disk("d"))
    overlay = tmp_path / "overlay.qcow2"
    base = mount.image("base.raw")
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", "-c", "read -P 9 0 1M", overlay)
    flat = tmp_path / "flat.raw"
    run("qemu-img", "convert", "-O", "raw", overlay, flat)
    assert flat.read_bytes() == b"\x09" * MIB + content[MIB:]
    assert (gateway.images / "base.raw").read_bytes() == content
    # and the other way: a whole image written onto the disk
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-t", "none", flat, mount.disk("d"))
    assert mount.disk("d").read_bytes() == flat.read_bytes()


# ------------------------------------------------------------------------------------------------- when one side dies


STEADY = """
import json, os, signal, sys, time
path, told, size = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY), 1 << 20
fd = os.open(path, os.O_RDWR | os.O_DSYNC)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
state = {"done": 0, "errors": 0, "numbers": [], "longest": 0.0}
at = 0
while not stop:
    start = time.monotonic()
    try:
        data = os.urandom(4096)
        os.pwrite(fd, data, at)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 4096, at) == data
        state["done"] += 1
    except OSError as fault:
        state["errors"] += 1
        state["numbers"] = sorted({*state["numbers"], fault.errno})
        time.sleep(0.01)
    state["longest"] = max(state["longest"], time.monotonic() - start)
    os.pwrite(told, json.dumps(state).ljust(1000).encode(), 0)
    at = (at + 4096) % size
"""


class Steady:
    """A process that writes and reads a file until told to stop, and tells what came of it.

    A process of its own, because closing the file waits for the daemon like everything else, and a test that starts the
    daemon closes it in the child.
    """

    def __init__(self, path: Path, told: Path) -> None:
        told.write_bytes(b"{}".ljust(1000))
        self._told = told
        self._process = subprocess.Popen([sys.executable, "-c", STEADY, str(path), str(told)])

    def _get(self, key: str, without: Any) -> Any:
        return json.loads(self._told.read_text()).get(key, without)

    @property
    def done(self) -> int:
        """Rounds without an error."""
        return int(self._get("done", 0))

    @property
    def errors(self) -> int:
        return int(self._get("errors", 0))

    @property
    def numbers(self) -> list[int]:
        """The errnos that came."""
        return list(self._get("numbers", []))

    @property
    def longest(self) -> float:
        """Seconds of the longest round."""
        return float(self._get("longest", 0.0))

    def stop(self) -> None:
        """SIGTERM; it has to end by itself."""
        self._process.terminate()
        try:
            assert self._process.wait(20) == 0
        finally:
            end(self._process, signal.SIGKILL)


@pytest.fixture
def steady(tmp_path: Path) -> Iterator[Callable[[Path], Steady]]:
    """`steady(path)`: started; stopped after the test."""
    made: list[Steady] = []

    def make(path: Path) -> Steady:
        made.append(Steady(path, tmp_path / f"steady{len(made)}"))
        wait_for(lambda: made[-1].done > 3)
        return made[-1]

    yield make
    for one in made:
        one.stop()


def test_a_daemon_that_is_killed_and_comes_back_in_time_is_not_noticed(
    gateway: GatewayProcess, mount: FuseMount, content: bytes, steady: MakeSteady
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    work = steady(mount.disk("d"))
    for kill in (True, False, True):
        before = work.done
        gateway.restart(kill=kill)
        wait_for(lambda before=before: work.done > before + 3)  # type: ignore[misc]
    work.stop()
    assert work.errors == 0


def test_a_daemon_that_stays_away_is_an_error_and_no_hang_and_it_comes_back(
    gateway: GatewayProcess, make_mount: MakeMount, content: bytes, steady: MakeSteady
) -> None:
    mount = make_mount("--wait", "1s")
    gateway.attach("d", "a.raw", mode="write-back")
    work = steady(mount.disk("d"))
    gateway.kill()
    wait_for(lambda: work.errors > 3)
    assert work.numbers == [errno.EIO]
    assert work.longest < 5
    # what needs the daemon says so at once; what does not goes on
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is compared
        os.listdir(mount.path / "disks")
    assert caught.value.errno == errno.EIO
    assert sorted(os.listdir(mount.path)) == ["disks", "images", "stage"]
    os.statvfs(mount.path)
    gateway.start()
    before = work.done
    wait_for(lambda: work.done > before + 10)
    work.stop()
    assert os.listdir(mount.path / "disks") == ["d"]


def test_it_unmounts_while_the_daemon_is_dead(
    gateway: GatewayProcess, make_mount: MakeMount, content: bytes, steady: MakeSteady
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    by_signal, by_command = make_mount("--wait", "1s"), make_mount("--wait", "1s")
    work = steady(by_signal.disk("d"))
    assert by_command.disk("d").read_bytes()[:10] is not None
    gateway.kill()
    run("fusermount3", "-u", by_command.path)
    assert by_command.process is not None
    assert by_command.process.wait(20) == 0
    start = time.monotonic()
    assert by_signal.stop() == 0, "although a file is open"
    assert time.monotonic() - start < 15
    assert not by_signal.mounted
    assert not by_command.mounted
    work.stop()


def test_a_daemon_that_hangs_is_an_error_after_a_while(
    gateway: GatewayProcess, make_mount: MakeMount, content: bytes, steady: MakeSteady
) -> None:
    mount = make_mount("--wait", "1s", "--patience", "2s")
    gateway.attach("d", "a.raw", mode="write-back")
    work = steady(mount.disk("d"))
    os.kill(gateway.pid, signal.SIGSTOP)
    try:
        wait_for(lambda: work.errors)
        assert work.numbers == [errno.EIO]
    finally:
        os.kill(gateway.pid, signal.SIGCONT)
    before = work.done
    wait_for(lambda: work.done > before + 10)
    work.stop()


def test_a_killed_mount_is_an_error_and_mounts_again(
    gateway: GatewayProcess, mount: FuseMount, content: bytes, steady: MakeSteady
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    work = steady(mount.disk("d"))
    mount.kill()
    wait_for(lambda: work.errors)
    assert set(work.numbers) <= {errno.ENOTCONN, errno.ECONNABORTED}
    with pytest.raises(OSError, match="Transport endpoint"):
        os.listdir(mount.path)
    work.stop()
    mount.start()  # over the dead mount
    assert mount.disk("d").stat().st_size == SIZE
    mount.kill()
    run("fusermount3", "-u", mount.path)
    assert not mount.mounted


def test_a_disk_that_came_back_as_another_is_stale(
    gateway: GatewayProcess, make_mount: MakeMount, content: bytes
) -> None:
    mount = make_mount("--wait", "5s")
    (gateway.images / "other.raw").write_bytes(bytes(SIZE))
    gateway.attach("d", "a.raw", mode="write-back")
    fd = os.open(mount.disk("d"), os.O_RDONLY | os.O_DIRECT)
    assert aligned_pread(fd, 4096, 0) == content[:4096]
    gateway.cli("detach", "d", "--force")
    gateway.attach("d", "other.raw", mode="write-back")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is compared
        aligned_pread(fd, 4096, 4096)
    assert caught.value.errno == errno.ESTALE
    os.close(fd)
    assert mount.disk("d").read_bytes() == bytes(SIZE)
    mount.log.write_text("")  # it has said so, as an error


# ------------------------------------------------------------------------------------------- who may, and bad commands


@pytest.fixture
def as_nobody(gateway: GatewayProcess) -> list[str]:
    """What to start a command with so that an unprivileged user runs it. Root has to ask."""
    need("setpriv")
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    gateway.directory.chmod(0o755)
    nobody = pwd.getpwnam("nobody")
    return ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]


def test_an_unprivileged_user_mounts(
    gateway: GatewayProcess, as_nobody: list[str], rng: random.Random
) -> None:
    """In a mount namespace whose /dev/fuse is open to all, as it is on hosts with udev."""
    need_fuse()
    need("unshare", "nsenter")
    device = gateway.directory / "fuse"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(10, 229))
    except OSError as fault:
        pytest.skip(f"no device node can be made here: {fault.strerror}")
    device.chmod(0o666)
    nobody = pwd.getpwnam("nobody")
    group = grp.getgrgid(nobody.pw_gid).gr_name
    gateway.configure({"gateway": {"socket_group": group, "control_group": group}})
    gateway.restart()
    content = rng.randbytes(MIB)
    (gateway.images / "a.raw").write_bytes(content)
    gateway.attach("d", "a.raw", mode="write-back")
    script = f'mount --bind "{device}" /dev/fuse && exec {" ".join(as_nobody)} "$@"'
    mount = FuseMount(gateway, under=["unshare", "--mount", "sh", "-c", script, "sh"], start=False)
    os.chown(mount.path, nobody.pw_uid, nobody.pw_gid)
    try:
        mount.start()
        inside = ["nsenter", "--mount", f"--target={mount.pid}"]
        run(*inside, *as_nobody, "cmp", mount.disk("d"), gateway.images / "a.raw")
        zeros = ["dd", "if=/dev/zero", "bs=4k", "count=1", "conv=notrunc,fsync"]
        run(*inside, *as_nobody, *zeros, f"of={mount.disk('d')}")
        other = subprocess.run(
            [*inside, "ls", mount.path], capture_output=True, text=True, check=False
        )
        assert "Permission denied" in other.stderr, "not even root, without --allow-other"
        assert mount.stop() == 0
    finally:
        mount.remove()
    assert not mount.loud()
    gateway.cli("flush", "d")
    assert (gateway.images / "a.raw").read_bytes() == bytes(4096) + content[4096:]


def test_allow_other_lets_others_in_as_far_as_modes_say(
    gateway: GatewayProcess, as_nobody: list[str]
) -> None:
    need_fuse()
    (gateway.images / "a.raw").write_bytes(bytes(MIB))
    (gateway.images / "a.raw").chmod(0o644)
    gateway.attach("d", "a.raw", "--read-only")
    gateway.configure({"fuse": {"mode": "0444"}})
    mount = FuseMount(gateway, "--allow-other")
    try:
        run(*as_nobody, "cmp", mount.image("a.raw"), gateway.images / "a.raw")
        refused = subprocess.run(
            [*as_nobody, "cat", str(mount.disk("d"))], capture_output=True, check=False
        )
        assert b"Permission denied" in refused.stderr, "its socket is 0660"
    finally:
        mount.remove()


@pytest.mark.parametrize("case", ["nowhere", "a file", "mounted"])
def test_a_wrong_mount_point_is_one_line(
    gateway: GatewayProcess, tmp_path: Path, case: str
) -> None:
    need_fuse()
    where = tmp_path / "m"
    if case == "a file":
        where.touch()
    mounted = FuseMount(gateway) if case == "mounted" else None
    try:
        done = gateway.cli("fuse", mounted.path if mounted else where, check=False)
    finally:
        if mounted:
            mounted.remove()
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("forebay: ")


def test_a_missing_pyfuse3_is_one_line(gateway: GatewayProcess, tmp_path: Path) -> None:
    (tmp_path / "pyfuse3.py").write_text("raise ImportError('no such thing here')")
    old = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{tmp_path}:{old}"
    try:
        done = gateway.cli("fuse", tmp_path, check=False)
    finally:
        os.environ["PYTHONPATH"] = old
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "install python3-pyfuse3" in done.stderr
