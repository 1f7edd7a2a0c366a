# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The failure table (gateway/FAILURES.md), row by row, on a file system that fails on command.

The store lies on it, or the cache device, or the index. Nothing of what fails is told to the daemon by any other way
than the errors of its own calls.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from forebay.control.prometheus.metrics import DISK_METRICS
from forebay_cache.offline.formatting import format_device
from real.disk_fixture import OneDisk, ask, cache_info, wait_for
from real.fault_fs import FaultFs
from real.gateway_process import GatewayProcess
from real.processes import MIB, random_image

Connect = Callable[..., Any]
MakeGateway = Callable[..., GatewayProcess]

LOST = "its descriptor fails|cannot be reached|can be reached again|a flush failed|write-back failed|looked at"

SIZE = 8 * MIB
ORIGIN = {"defaults": {"origin_timeout": "2s", "max_dirty": "2 MiB", "max_lag": "1h"}}


@pytest.fixture
def faulty(short_path: Path) -> Iterator[FaultFs]:
    fs = FaultFs(short_path / "fs")
    try:
        yield fs
    finally:
        fs.remove()


class Bed:
    """A daemon whose store is faulty, with one disk."""

    def __init__(self, gateway: GatewayProcess, fs: FaultFs, mode: str, connect: Connect) -> None:
        self.gateway = gateway
        self.fs = fs
        self.image = fs.backing / "image.raw"
        self.content = bytearray(random_image(self.image, SIZE, 7))
        gateway.attach("d", "image.raw", mode=mode)
        self.disk = OneDisk(gateway, "d", self.image, bytes(self.content))
        self._connect = connect
        self.client = connect(gateway.uri("d"))

    def connect(self) -> None:
        """Anew, to a daemon that was started again."""
        self.client = self._connect(self.gateway.uri("d"))

    def write(self, at: int, data: bytes) -> None:
        """Acknowledged."""
        self.client.pwrite(data, at)
        self.content[at : at + len(data)] = data

    def reads_all(self) -> None:
        assert self.client.pread(SIZE, 0) == self.content

    def status(self) -> dict[str, Any]:
        return self.disk.status()

    def is_well(self) -> None:
        wait_for(lambda: self.status()["state"] == "ready", f"not ready: {self.status()}", 60)
        self.gateway.cli("flush", "d")
        assert self.image.read_bytes() == self.content
        self.reads_all()


@pytest.fixture
def bed(
    make_gateway: MakeGateway, faulty: FaultFs, connect: Connect
) -> Iterator[Callable[..., Bed]]:
    """`bed("write-back")`: a disk whose image lies on the faulty file system."""
    gateways: list[GatewayProcess] = []

    def make(mode: str, **defaults: Any) -> Bed:
        settings = {**ORIGIN["defaults"], **defaults}
        gateway = make_gateway(
            {
                "defaults": settings,
                "stores.images": {"path": str(faulty.path)},
                "cache": {"size": "64 MiB"},
            }
        )
        gateways.append(gateway)
        return Bed(gateway, faulty, mode, connect)

    yield make
    for gateway in gateways:
        faulty.lift()
        gateway.kill()


def fails(client: Any, do: str, *arguments: Any, why: str | None = None) -> None:
    import nbd

    with pytest.raises(nbd.Error, match=why):
        getattr(client, do)(*arguments)


# ------------------------------------------------------------------------------------------------- the origin


@pytest.mark.parametrize("error", ["ENOSPC", "ESTALE"])
def test_a_store_that_takes_no_writes(bed: Callable[..., Bed], error: str) -> None:
    """Write-back: nothing is lost, the guest waits and then hears ENOSPC, the state says why; lifted, it drains."""
    it = bed("write-back")
    it.gateway.allow_log("write-back failed|its marker stays as it is")
    it.write(MIB, b"a" * MIB)
    it.client.flush()
    it.fs.fail("write", error, name="*")
    assert it.gateway.cli("flush", "d", check=False).returncode == 1
    status = it.status()
    assert (status["state"], status["dirty_bytes"]) == ("lagging", MIB)
    assert os.strerror(getattr(errno, error)) in status["reason"]
    it.write(4 * MIB, b"b" * MIB)
    fails(it.client, "pwrite", b"c" * 4096, 6 * MIB, why="space")
    assert it.client.pread(MIB, MIB) == b"a" * MIB
    it.gateway.restart(kill=True)
    it.gateway.allow_log("cannot be reached|can be reached again")
    it.fs.lift()
    it.connect()
    it.is_well()


@pytest.mark.parametrize("mode", ["write-back", "write-through"])
@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
def test_a_store_that_is_full_when_the_daemon_is_restarted(
    bed: Callable[..., Bed], mode: str, error: str
) -> None:
    """There is no room for the marker of the next owner: guests go on with what the image has all the same."""
    it = bed(mode)
    it.gateway.allow_log("write-back failed|its marker stays as it is")
    it.write(MIB, b"a" * MIB)
    it.client.flush()
    it.fs.fail("mkdir", error)
    it.fs.fail(
        "write", error, name="[or]*"
    )  # markers and journals: the blocks of the image are there
    it.gateway.restart(kill=True)
    it.connect()
    it.reads_all()
    it.write(5 * MIB, b"b" * 65536)
    it.client.flush()
    it.reads_all()
    it.fs.lift()
    it.is_well()
    it.gateway.restart()
    it.gateway.cli("detach", "d")
    assert os.listdir(it.fs.backing) == ["image.raw"]


@pytest.mark.parametrize(("name", "after"), [("image.raw", 0), ("redo*", 0), ("redo*", 1)])
def test_a_store_that_does_not_take_one_write_of_many(
    bed: Callable[..., Bed], name: str, after: int
) -> None:
    """All that comes after it goes well: the pass has failed all the same, and is done again, whole."""
    it = bed("write-back")
    it.gateway.allow_log("write-back failed")
    it.write(MIB, os.urandom(MIB // 2))
    it.client.flush()
    it.fs.fail("write", "EIO", name=name, after=after, times=1)
    assert it.gateway.cli("flush", "d", check=False).returncode == 1
    it.gateway.cli("flush", "d")
    assert it.image.read_bytes() == it.content
    it.is_well()


@pytest.mark.parametrize("mode", ["write-back", "write-through", "none"])
def test_locks_that_were_lost_are_taken_again(bed: Callable[..., Bed], mode: str) -> None:
    """Each call of the descriptor fails for ever, and what was not durable is gone. No restart is needed."""
    it = bed(mode)
    it.gateway.allow_log(LOST)
    it.write(MIB, b"a" * 65536)
    it.fs.lose_locks()
    assert it.client.pread(4096, 5 * MIB) == it.content[5 * MIB :][:4096]
    it.write(2 * MIB, b"b" * 65536)
    it.client.flush()
    it.fs.lose_locks()
    it.write(3 * MIB, b"c" * 65536)
    it.client.flush()
    it.is_well()


@pytest.mark.parametrize("how", ["stale for a while", "mounted anew"])
@pytest.mark.parametrize("mode", ["write-back", "none"])
def test_a_store_that_went_away_and_is_back(bed: Callable[..., Bed], mode: str, how: str) -> None:
    """Its server forgot what was open, or its file system is another mount: the same image is opened anew."""
    it = bed(mode)
    it.gateway.allow_log(f"{LOST}|trying again|flush")
    it.write(MIB, b"a" * 65536)
    it.client.flush()
    if how == "mounted anew":
        it.fs.vanish()
    else:
        for call in ("read", "write", "fsync", "getattr", "open"):
            it.fs.fail(call, "ESTALE")
    time.sleep(6)  # a look of the watch
    if mode != "none":
        assert it.client.pread(65536, MIB) == b"a" * 65536, "what is cached is read all the time"
    fails(it.client, "pread", 4096, 5 * MIB)
    assert it.status()["state"] != "conflict"
    if how == "mounted anew":
        it.fs.mount()
    it.fs.lift()
    assert it.client.pread(4096, 5 * MIB) == it.content[5 * MIB :][:4096]
    it.write(2 * MIB, b"b" * 65536)
    it.client.flush()
    it.is_well()


@pytest.mark.parametrize("mode", ["write-back", "write-through"])
def test_locks_that_were_lost_to_another_owner(bed: Callable[..., Bed], mode: str) -> None:
    """Somebody else has the image by then: nothing is written to it, and what is dirty is kept."""
    it = bed(mode)
    it.gateway.allow_log(f"{LOST}|conflict|taken over|taken by|belongs|detach with --discard")
    it.write(MIB, b"a" * 65536)
    beside = it.fs.backing / "image.raw.forebay"
    [ours] = beside.glob("*/owner")
    owner = json.loads(ours.read_text())
    owner.update(gateway="00000000-0000-4000-8000-000000000000", token=owner["token"] + 1)
    own = beside / str(owner["token"])
    own.mkdir()
    (own / "owner").write_text(json.dumps(owner))
    it.fs.lose_locks()
    before = it.image.read_bytes()
    fails(it.client, "pread", 4096, 5 * MIB)
    assert it.status()["state"] == "conflict"
    if mode == "write-back":
        assert it.status()["dirty_bytes"] == 65536
    fails(it.client, "flush")
    assert it.image.read_bytes() == before


def test_a_store_that_takes_no_writes_of_a_disk_that_writes_through(
    bed: Callable[..., Bed],
) -> None:
    """The guest is told: its own kind of error for a store that is full."""
    it = bed("write-through")
    it.reads_all()
    for error, why in (("ENOSPC", "ENOSPC"), ("EDQUOT", "ENOSPC"), ("EIO", "EIO")):
        it.fs.fail("write", error, name="image.raw")
        fails(it.client, "pwrite", b"c" * 4096, MIB, why=why)
        it.reads_all()  # from the image, where it was to be written
        it.fs.lift()
    it.write(MIB, b"c" * 4096)
    it.client.flush()
    it.is_well()


def test_writes_that_are_cut_short(bed: Callable[..., Bed]) -> None:
    it = bed("write-back")
    for mode in ("write-back", "write-through"):
        it.gateway.cli("mode", "d", mode)
        it.fs.fail("write", short=True, name="image.raw")
        it.fs.fail("write", short=True, name="redo*")
        it.write(MIB, os.urandom(200_000))
        it.client.flush()
        it.gateway.cli("flush", "d")
        it.fs.lift()
        it.is_well()


@pytest.mark.parametrize("short", [False, True])
def test_the_journal_is_all_that_is_left(bed: Callable[..., Bed], short: bool) -> None:
    """The host is lost before the image has any of what was written. A journal whose writes are cut short is whole."""
    it = bed("write-back")
    it.gateway.allow_log("write-back failed")
    it.write(MIB, os.urandom(MIB // 2))
    it.client.zero(70_000, 4096)
    it.content[4096 : 4096 + 70_000] = bytes(70_000)
    if short:
        it.fs.fail("write", short=True, name="redo*")
    it.fs.fail("write", "EIO", name="image.raw")
    assert it.gateway.cli("flush", "d", check=False).returncode == 1
    it.gateway.kill()
    it.fs.lift()
    assert it.image.read_bytes() != it.content
    it.gateway.cli("recover", "images:image.raw")
    assert it.image.read_bytes() == it.content


def test_an_fsync_that_fails_once_and_then_lies(bed: Callable[..., Bed]) -> None:
    """Write-back writes all of it again; the second fsync is not believed."""
    it = bed("write-back")
    it.gateway.allow_log("write-back failed")
    it.write(MIB, os.urandom(MIB))
    it.client.flush()
    it.fs.fail("fsync", "EIO", name="image.raw", times=1, lose=True)
    it.gateway.cli("flush", "d", check=False)
    it.gateway.cli("flush", "d")
    assert it.image.read_bytes() == it.content
    it.is_well()


def test_an_fsync_that_fails_once_loses_nothing_of_a_guest_that_writes_through(
    bed: Callable[..., Bed],
) -> None:
    """The store has thrown the data away; it is written again before the guest hears anything."""
    it = bed("write-through")
    it.gateway.allow_log("a flush failed")
    it.write(MIB, b"n" * 65536)
    it.fs.fail("fsync", "ENOSPC", name="image.raw", times=1, lose=True)
    it.client.flush()
    it.fs.forget()
    assert it.image.read_bytes() == it.content
    it.is_well()


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EIO"])
@pytest.mark.parametrize("mode", ["none", "write-around", "write-through"])
def test_a_store_that_is_full_at_the_flush(bed: Callable[..., Bed], mode: str, error: str) -> None:
    """Eight writes are taken, and the flush says that there is no room. When there is, QEMU sends only the flush again:
    it fails, or all eight are there."""
    it = bed(mode)
    it.gateway.allow_log("a flush failed|cannot be reached|can be reached again")
    for n in range(8):
        it.write(n * MIB, bytes([65 + n]) * (MIB // 8))
    it.fs.fail("fsync", error, name="image.raw", times=1, lose=True)
    it.fs.fail("write", error, name="image.raw")  # no room for what is written again either
    for _ in range(2):
        fails(it.client, "flush", why="ENOSPC" if error != "EIO" else "EIO")
        assert it.status()["state"] == "lagging"
        assert os.strerror(getattr(errno, error)) in it.status()["reason"]
    assert it.status()["origin_errors"] >= 2
    it.fs.lift()
    it.client.flush()
    it.fs.forget()
    assert it.image.read_bytes() == it.content
    it.is_well()


def test_a_store_that_cannot_be_read(bed: Callable[..., Bed]) -> None:
    """Misses fail, hits do not; lifted, all is well without anybody's doing."""
    it = bed("write-through")
    warm = it.client.pread(MIB, 0)
    for error, at in (("EIO", 5 * MIB), ("ESTALE", 6 * MIB)):
        it.fs.fail("read", error, name="image.raw")
        it.fs.forget()
        fails(it.client, "pread", 4096, at)
        assert it.client.pread(MIB, 0) == warm
        it.fs.lift()
        assert it.client.pread(4096, at) == it.content[at : at + 4096]
    found = it.status()
    assert found["origin_errors"] >= 2
    exported = {key for metric in DISK_METRICS for _, key in metric.samples}
    assert exported <= set(found), "a metric that no status has is never exported"
    it.is_well()


def test_a_store_that_hangs(bed: Callable[..., Bed]) -> None:
    """Hits, writes and flushes in write-back go on; a miss fails in time; the daemon ends when told to."""
    it = bed("write-back")
    it.gateway.allow_log("write-back failed|cannot be reached|can be reached again|cut short|still")
    warm = it.client.pread(MIB, 0)
    it.write(2 * MIB, b"v" * 4096)
    for call in ("read", "write", "fsync", "getattr", "open"):
        it.fs.fail(call, hang=True)
    fails(it.client, "pread", 4096, 5 * MIB)
    assert it.client.pread(MIB, 0) == warm
    it.write(MIB, b"w" * 65536)
    it.client.flush()
    assert it.gateway.cli("flush", "d", "--timeout", "1", check=False).returncode == 1
    assert it.gateway.process is not None
    it.gateway.process.terminate()
    assert it.gateway.process.wait(60) == 0
    it.fs.lift()
    it.gateway.start()
    it.connect()
    it.is_well()


def test_a_store_that_cannot_be_reached_at_the_start(bed: Callable[..., Bed]) -> None:
    """What is cached is served, and written where the image is known to lack something. The end comes by itself."""
    it = bed("write-back")
    it.gateway.allow_log("cannot be reached|can be reached again|write-back failed")
    warm = it.client.pread(MIB, 0)
    it.write(2 * MIB, os.urandom(4096))
    it.disk.commit()
    it.gateway.stop()
    for call in ("open", "getattr"):
        it.fs.fail(call, "EIO")
    it.gateway.start()
    it.connect()
    assert it.status()["state"] == "degraded"
    assert "image.raw" in it.status()["reason"]
    assert it.client.pread(MIB, 0) == warm
    it.write(MIB, os.urandom(65536))
    it.client.flush()
    fails(it.client, "pread", 4096, 5 * MIB, why="EIO")
    it.fs.lift()
    it.is_well()


def test_a_store_that_is_slow_slows_nothing_but_its_misses(bed: Callable[..., Bed]) -> None:
    import nbd

    it = bed("write-back")
    warm = it.client.pread(65536, 0)
    it.write(2 * MIB, b"v" * 4096)
    it.fs.fail("read", hang=True)  # as slow as the test likes
    it.fs.forget()
    buffer = nbd.Buffer(4096)
    cookie = it.client.aio_pread(buffer, 5 * MIB)
    assert it.client.pread(65536, 0) == warm
    it.write(MIB, b"w" * 65536)
    it.client.flush()
    assert not it.client.aio_command_completed(cookie)
    it.fs.lift()
    while it.client.aio_in_flight():
        it.client.poll(-1)
    assert it.client.aio_command_completed(cookie)
    assert bytes(buffer.to_bytearray()) == it.content[5 * MIB : 5 * MIB + 4096]
    it.is_well()


def change(it: Bed, how: str) -> None:
    path = it.fs.path / "image.raw"
    if how == "unlinked":
        path.unlink()
    elif how == "replaced":
        random_image(it.fs.backing / "new", SIZE, 9)
        (it.fs.path / "new").rename(path)
    else:
        os.truncate(path, SIZE // 2)


@pytest.mark.parametrize("how", ["unlinked", "replaced", "truncated"])
def test_an_image_that_is_taken_away_under_dirty_data(bed: Callable[..., Bed], how: str) -> None:
    """The disk stops: neither old nor new data, nothing written to whatever lies there; what is dirty is kept."""
    it = bed("write-back")
    it.gateway.allow_log(
        "changed by somebody|replaced by another|forebay resolve|write-back failed|dropped as asked|marker"
    )
    it.write(MIB, b"d" * MIB)
    it.client.flush()
    change(it, how)
    wait_for(lambda: it.status()["state"] == "conflict", f"not noticed: {it.status()}")
    assert it.status()["reason"]
    fails(it.client, "pread", 4096, 0)
    fails(it.client, "pwrite", b"x" * 4096, 0)
    fails(it.client, "flush")
    there = it.image.read_bytes() if how != "unlinked" else None
    assert it.gateway.cli("flush", "d", check=False).returncode == 1
    assert it.status()["dirty_bytes"] == MIB
    assert there is None or it.image.read_bytes() == there
    it.gateway.cli("detach", "d", "--discard", "--force")


# ------------------------------------------------------------------------------------------------- the cache device


@pytest.fixture
def cached(
    make_gateway: MakeGateway, faulty: FaultFs, connect: Connect
) -> Iterator[Callable[..., "Cached"]]:
    """`cached()`: a daemon whose cache device is a file on the faulty file system."""
    gateways: list[GatewayProcess] = []

    def make() -> Cached:
        gateway = make_gateway(
            {
                "cache": {"device": str(faulty.path / "cache.img"), "size": "32 MiB"},
                "defaults": {"max_lag": "1h", "origin_timeout": "5s"},
            }
        )
        gateways.append(gateway)
        gateway.allow_log(
            "cache device .* failed|works again|is damaged|are damaged|write-back failed"
        )
        return Cached(gateway, faulty, connect)

    yield make
    for gateway in gateways:
        with contextlib.suppress(OSError):
            faulty.lift()
        gateway.kill()


class Cached:
    """Disks of several modes over one faulty cache device; their images are well."""

    def __init__(self, gateway: GatewayProcess, fs: FaultFs, connect: Connect) -> None:
        self.gateway = gateway
        self.fs = fs
        self.connect = connect
        self.models: dict[str, bytearray] = {}
        self.clients: dict[str, Any] = {}

    def attach(self, *modes: str) -> None:
        for mode in modes:
            self.models[mode] = bytearray(random_image(self.image(mode), 4 * MIB, len(mode)))
            self.gateway.attach(mode, f"{mode}.raw", mode=mode)
            self.clients[mode] = self.connect(self.gateway.uri(mode))
            self.clients[mode].pread(4 * MIB, 0)

    def image(self, mode: str) -> Path:
        return self.gateway.images / f"{mode}.raw"

    def write(self, mode: str, at: int, data: bytes) -> None:
        self.clients[mode].pwrite(data, at)
        self.models[mode][at : at + len(data)] = data

    def status(self, mode: str) -> dict[str, Any]:
        found = ask(self.gateway, f"/disks/{mode}")
        assert isinstance(found, dict)
        return found

    def fetched(self, mode: str) -> int:
        """Bytes that were read from the image so far."""
        return int(self.status(mode)["origin_read_bytes"])

    def is_cached(self, mode: str) -> bool:
        return bool(self.status(mode)["cached_bytes"] == 4 * MIB)

    def is_ready(self, mode: str) -> bool:
        return bool(self.status(mode)["state"] == "ready")

    def reads_all(self) -> None:
        for mode, client in self.clients.items():
            assert client.pread(4 * MIB, 0) == self.models[mode], mode

    def comes_back(self) -> None:
        """By itself; and then everything is as ever, also for who starts anew."""
        wait_for(lambda: cache_info(self.gateway)["state"] == "ok", "the device stays failed", 90)
        for mode in self.clients:
            wait_for(partial(self.is_ready, mode), f"{self.status(mode)}")
            self.write(mode, 2 * MIB, os.urandom(8192))
            self.clients[mode].flush()
            for _ in range(2):  # the second one finds it ready, and takes the shortest way
                assert (
                    self.clients[mode].pread(4096, 2 * MIB) == self.models[mode][2 * MIB :][:4096]
                )
        self.reads_all()
        self.gateway.restart(kill=True)
        for mode in self.clients:
            self.clients[mode] = self.connect(self.gateway.uri(mode))
        self.reads_all()
        self.gateway.cli("flush", "--all")
        for mode, model in self.models.items():
            assert self.image(mode).read_bytes() == model, mode


def test_a_cache_device_that_takes_no_writes_breaks_no_guest(cached: Callable[..., Cached]) -> None:
    """No request fails, in any mode; what was dirty goes to the images; the operator is told."""
    it = cached()
    it.attach("write-back", "full-copy", "write-through", "write-around")
    it.write("write-back", 0, os.urandom(100_000))  # dirty, and only in the cache
    for call in ("write", "fsync"):
        it.fs.fail(call, "EIO", name="cache.img")
    for mode in it.clients:
        it.clients[mode].flush()
        it.write(mode, MIB, os.urandom(50_001))
        it.clients[mode].zero(8192, 3 * MIB)
        it.models[mode][3 * MIB : 3 * MIB + 8192] = bytes(8192)
        it.clients[mode].flush()
        assert it.image(mode).read_bytes() == it.models[mode], "flushed, and the cache has failed"
        status = it.status(mode)
        assert status["state"] == "pass-through"
        assert "cache.img" in status["reason"]
    it.reads_all()
    assert cache_info(it.gateway)["state"] == "failed"
    it.fs.lift()
    it.comes_back()


def test_a_kill_while_the_cache_device_fails_leaves_nothing_stale(
    cached: Callable[..., Cached],
) -> None:
    """What it had cached is void: the images were written past it, and it could not be told."""
    it = cached()
    it.attach("write-through", "write-back")
    for mode in it.clients:
        OneDisk(it.gateway, mode, it.image(mode), b"").commit()
    it.fs.fail("write", "EIO", name="cache.img")
    it.fs.fail("fsync", "EIO", name="cache.img")
    for mode in it.clients:
        it.write(mode, MIB, os.urandom(MIB))
        it.clients[mode].flush()
    it.gateway.kill()
    it.fs.lift()
    it.gateway.start()
    for mode in it.clients:
        it.clients[mode] = it.connect(it.gateway.uri(mode))
    it.reads_all()


def test_a_sync_that_fails_once_and_then_lies(cached: Callable[..., Cached]) -> None:
    """The guest's flush succeeds, for its data is in the image by then."""
    it = cached()
    it.attach("write-back")
    it.write("write-back", MIB, os.urandom(100_000))
    it.fs.fail("fsync", "EIO", name="cache.img", times=1, lose=True)
    it.clients["write-back"].flush()
    assert it.image("write-back").read_bytes() == it.models["write-back"]
    it.fs.forget()  # what the kernel had of the cache in memory, for which there is nothing on the device
    it.reads_all()
    it.comes_back()


def test_dirty_data_that_cannot_be_read_fails_its_disk_and_no_other(
    cached: Callable[..., Cached],
) -> None:
    import nbd

    it = cached()
    it.attach("write-back", "write-through")
    it.write("write-back", MIB, os.urandom(65536))
    it.clients["write-back"].flush()
    for call in ("read", "write", "fsync"):
        it.fs.fail(call, "EIO", name="cache.img")
    it.fs.forget()
    with pytest.raises(nbd.Error):  # a reply whose data cannot be sent is none: the connection ends
        it.clients["write-back"].pread(65536, MIB)
    it.clients = {mode: it.connect(it.gateway.uri(mode)) for mode in it.clients}
    fails(it.clients["write-back"], "pread", 65536, MIB, why="EIO")
    fails(it.clients["write-back"], "pwrite", b"x" * 4096, 0, why="EIO")
    fails(it.clients["write-back"], "flush", why="EIO")
    it.write("write-through", MIB, os.urandom(65536))
    it.clients["write-through"].flush()
    assert it.clients["write-through"].pread(4 * MIB, 0) == it.models["write-through"]
    wait_for(lambda: it.status("write-back")["state"] == "broken", str(it.status("write-back")))
    assert "--discard" in it.status("write-back")["reason"]
    assert it.status("write-through")["state"] == "pass-through"
    image = it.image("write-back").read_bytes()
    it.fs.lift()
    it.fs.forget()
    done = it.gateway.cli("cache", "repair", check=False)
    assert done.returncode == 0, done.stderr
    assert it.image("write-back").read_bytes() in (image, bytes(it.models["write-back"]))
    it.comes_back()


def test_a_cache_device_that_disappears_and_comes_back(cached: Callable[..., Cached]) -> None:
    it = cached()
    it.attach("write-back", "write-through", "write-around")
    it.clients["write-back"].flush()
    for mode in it.clients:
        wait_for(partial(it.is_cached, mode), f"{it.status(mode)}")
    it.fs.vanish()
    for mode in ("write-back", "write-through"):
        it.write(mode, MIB, os.urandom(65536))
        it.clients[mode].flush()
        assert it.status(mode)["state"] == "pass-through"
        assert it.clients[mode].pread(4 * MIB, 0) == it.models[mode]
    it.fs.mount()
    wait_for(lambda: cache_info(it.gateway)["state"] == "ok", "the device stays failed", 90)
    before = it.fetched("write-around")
    it.reads_all()
    assert it.fetched("write-around") == before, "its clean blocks are gone"
    it.comes_back()


def test_another_cache_in_the_place_of_one_that_disappeared(
    cached: Callable[..., Cached], tmp_path: Path
) -> None:
    """It is left as it is, and the disks go on past it, until the right one is there again."""
    it = cached()
    it.attach("write-back")
    mine, kept = it.fs.backing / "cache.img", it.fs.backing / "kept"
    it.fs.vanish()
    it.write("write-back", MIB, os.urandom(65536))
    mine.rename(kept)
    format_device(mine, tmp_path / "index", size=32 * MIB)
    it.fs.mount()
    before = mine.read_bytes()
    done = it.gateway.cli("cache", "repair", check=False)
    assert done.returncode == 1
    assert "is not the cache that was there" in done.stderr
    it.reads_all()
    assert mine.read_bytes() == before
    kept.rename(mine)
    it.comes_back()


# ------------------------------------------------------------------------------------------------- the index


def index_on(faulty: FaultFs) -> dict[str, dict[str, str]]:
    """Settings of a gateway whose index lies on the faulty file system, and nothing else."""
    return {
        "gateway": {"state": str(faulty.path / "state")},
        "cache": {"size": "32 MiB", "device": str(faulty.backing / "cache.img")},
        "defaults": {"max_lag": "1h"},
    }


def test_an_index_that_cannot_be_written(
    make_gateway: MakeGateway, faulty: FaultFs, connect: Connect
) -> None:
    """Guests do not notice; the operator does; killed or not, nothing is lost."""
    gateway = make_gateway(index_on(faulty))
    gateway.allow_log("index")
    it = Cached(gateway, faulty, connect)

    def counted(text: str, times: int) -> bool:
        return gateway.log_text().count(text) >= times

    try:
        it.attach("write-back", "write-through")
        for kept in (False, True):
            faulty.fail("write", "ENOSPC", name="data.mdb")
            faulty.fail("fsync", "EIO", name="data.mdb")
            for mode in it.clients:
                it.write(mode, MIB, os.urandom(65536))
                it.clients[mode].flush()
            wait_for(lambda: cache_info(gateway)["state"] == "unrecorded", "nothing said")
            assert "index" in it.status("write-back")["reason"]
            told = 2 if kept else 1
            wait_for(partial(counted, "index commit failed", told), "nothing in the log")
            for mode in it.clients:
                it.write(mode, 3 * MIB, os.urandom(65536))
            it.reads_all()
            done = gateway.cli("mode", "write-through", "none", check=False)
            assert done.returncode == 1
            assert "index" in done.stderr
            assert gateway.log_text().count("index commit failed") == told, "once, not each time"
            if not kept:
                faulty.lift()
                wait_for(lambda: cache_info(gateway)["state"] == "ok", "it is not tried again")
                assert it.status("write-back")["reason"] is None
        gateway.kill()
        faulty.lift()
        gateway.start()
        for mode in it.clients:
            it.clients[mode] = connect(gateway.uri(mode))
        it.comes_back()
    finally:
        faulty.lift()
        gateway.kill()


@pytest.mark.parametrize(("name", "left"), [("data.mdb", 0), ("data.mdb", 8192), ("lock.mdb", 0)])
def test_an_index_that_is_cut_ends_no_daemon(
    make_gateway: MakeGateway, connect: Connect, name: str, left: int
) -> None:
    """LMDB would touch its map behind the end of the file. What is dirty is written back, or is there after a start."""
    gateway = make_gateway({"defaults": {"max_lag": "1h"}, "cache": {"size": "32 MiB"}})
    gateway.allow_log("index|write-back failed")
    images, models, clients = {}, {}, {}
    for mode in ("write-back", "write-through"):
        images[mode] = gateway.images / f"{mode}.raw"
        models[mode] = bytearray(random_image(images[mode], 12 * MIB, 5))
        gateway.attach(mode, f"{mode}.raw", mode=mode)
        clients[mode] = connect(gateway.uri(mode))
        clients[mode].pread(4 * MIB, 0)
        clients[mode].pwrite(b"d" * MIB, MIB)
        clients[mode].flush()
        models[mode][MIB : 2 * MIB] = b"d" * MIB
    os.truncate(gateway.state / "index" / name, left)
    wait_for(lambda: cache_info(gateway)["state"] == "failed", "not noticed")
    assert "index" in cache_info(gateway)["error"]
    for mode, client in clients.items():
        assert client.pread(12 * MIB, 0) == models[mode], "what was never looked up, too"
    if name == "data.mdb":
        wait_for(lambda: images["write-back"].read_bytes() == models["write-back"], "not saved")
        for client in clients.values():
            client.pwrite(b"n" * MIB, 8 * MIB)
            client.flush()
        assert gateway.stop() == 0
        for mode, image in images.items():
            models[mode][8 * MIB : 9 * MIB] = b"n" * MIB
            assert image.read_bytes() == models[mode]
        with pytest.raises(Exception, match="cannot open the index"):
            gateway.start()
    else:
        gateway.restart(kill=True)
        gateway.cli("flush", "write-back")
        assert images["write-back"].read_bytes() == models["write-back"]


@pytest.mark.parametrize(
    "fault", [{"call": "write", "error": "ENOSPC"}, {"call": "fsync", "delay": 1}]
)
def test_a_journal_that_is_full_while_the_index_takes_nothing(
    make_gateway: MakeGateway, faulty: FaultFs, connect: Connect, fault: dict[str, Any]
) -> None:
    """Writes go on as long as it has room. Then they fail, where the index does, or wait, where it is slow.

    Killed, nothing that was acknowledged is lost.
    """
    import nbd

    gateway = make_gateway(index_on(faulty))
    gateway.allow_log("index|write-back failed")
    it = Cached(gateway, faulty, connect)
    try:
        it.attach("write-back")
        faulty.fail(**fault, name="data.mdb")
        told, written = None, 0
        while told is None and written < 16_384:
            at = written * 5 % 1024 * 4096
            try:
                it.write("write-back", at, written.to_bytes(8, "little") * 512)
                written += 1
            except nbd.Error as error:
                told = error.errno
        assert told in (("ENOSPC", "EIO") if "error" in fault else (None,))
        assert written > 1024, "it has room for more than that"
        it.reads_all()
        gateway.kill()
        faulty.lift()
        gateway.start()
        it.clients = {"write-back": connect(gateway.uri("write-back"))}
        it.comes_back()
    finally:
        faulty.lift()
        gateway.kill()


def test_a_cache_full_of_overlays_breaks_no_other_guest(
    make_gateway: MakeGateway, connect: Connect
) -> None:
    """An overlay that finds no room is told so; a disk whose data has a home writes past the cache."""
    gateway = make_gateway({"cache": {"size": "16 MiB"}})
    content = bytearray(random_image(gateway.images / "home.raw", SIZE, 3))
    random_image(gateway.images / "golden.raw", 2 * SIZE, 4)
    gateway.attach("home", "home.raw", mode="write-back")
    gateway.attach("own", "golden.raw", "--overlay")
    guest, greedy = connect(gateway.uri("home")), connect(gateway.uri("own"))
    kept = 0
    with contextlib.suppress(Exception):
        while kept < 2 * SIZE:
            greedy.pwrite(b"o" * 65536, kept)
            kept += 65536
    assert 0 < kept < 2 * SIZE
    fails(greedy, "pwrite", b"o" * 65536, kept, why="No space left")
    for at, data in ((0, b"1" * MIB), (MIB + 100, b"2" * 70000), (5 * MIB, b"3" * 512)):
        guest.pwrite(data, at)
        content[at : at + len(data)] = data
        assert guest.pread(len(data), at) == data
    guest.zero(8192, 512)
    content[512 : 512 + 8192] = bytes(8192)
    guest.flush()
    assert guest.pread(SIZE, 0) == content
    assert greedy.pread(kept, 0) == b"o" * kept
    assert gateway.status("home")["state"] == "ready"
    gateway.cli("detach", "own", "--force")
    guest.pwrite(b"4" * MIB, 2 * MIB)
    content[2 * MIB : 3 * MIB] = b"4" * MIB
    assert guest.pread(SIZE, 0) == content
    gateway.kill()
    gateway.start()
    gateway.cli("flush", "home")
    assert (gateway.images / "home.raw").read_bytes() == content
