# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What lives longer than the daemon: disks, their settings, what was acknowledged, and the warm cache."""

import errno
import json
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from forebay_cache import Cache, Layer, View, open_cache
from forebay_cache.blocks import private
from forebay_cache.format.records import LayerName
from real.disk_fixture import MODES, PRIVATE_MODES, OneDisk, ask, run, wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, accepts, random_image

SIZE = 4 * MIB
SECTOR = 4096

Connect = Callable[..., Any]
MakeGateway = Callable[..., GatewayProcess]


def attach(gateway: GatewayProcess, mode: str, *options: str, name: str = "d") -> OneDisk:
    path = gateway.images / f"{name}.raw"
    content = random_image(path, SIZE, sum(name.encode()))
    gateway.attach(name, path.name, *options, mode=mode)
    return OneDisk(gateway, name, path, content)


# ------------------------------------------------------------------- a writer through many kills


class Writer(threading.Thread):
    """A guest on its own half of the disk: it writes, and repeats after a reconnect what was not answered.

    Every sector says whose it is, which it is and how often it was written, so that neither another sector's
    content nor an older one can be taken for it. `known` has the count each sector must show; `pending` those of
    the write without an answer yet, which may show one more.
    """

    def __init__(self, disk: OneDisk, number: int, first: int, seed: int) -> None:
        super().__init__()
        self.disk, self.number, self.first = disk, number, first
        self.known = dict.fromkeys(range(first, first + SIZE // SECTOR // 2), 0)
        self.pending: range | None = None
        self.writes = self.target = 0
        self.faults: list[BaseException] = []
        self.over = threading.Event()
        self.rng = random.Random(seed)
        self.reconnected = 0

    @property
    def there(self) -> bool:
        return self.writes >= self.target

    def content(self, sector: int, count: int) -> bytes:
        if not count:
            return self.disk.content[sector * SECTOR : (sector + 1) * SECTOR]
        return (f"{self.number} {sector} {count}\n".encode() * SECTOR)[:SECTOR]

    def run(self) -> None:
        import nbd

        try:
            while not self.over.is_set():
                client = nbd.NBD()
                try:
                    client.connect_uri(self.disk.uri)
                    self.check(client)
                    self.reconnected += 1
                    self.work(client)
                except nbd.Error as fault:
                    if fault.errnum == errno.EIO:
                        raise  # an answer, and not a connection that broke
                time.sleep(0.01)
        except BaseException as fault:  # noqa: BLE001  (told by the test)
            self.faults.append(fault)

    def check(self, client: Any) -> None:
        """Every sector, as it must be."""
        self.compare(client.pread(len(self.known) * SECTOR, self.first * SECTOR))

    def compare(self, data: bytes) -> None:
        for i, (sector, count) in enumerate(self.known.items()):
            found = data[i * SECTOR : (i + 1) * SECTOR]
            if found != self.content(sector, count):
                unanswered = self.pending is not None and sector in self.pending
                assert unanswered, (sector, count, found[:40])
                assert found == self.content(sector, count + 1), (sector, count, found[:40])

    def work(self, client: Any) -> None:
        while not self.over.is_set():
            if self.pending is None:
                length = self.rng.choice([1, 1, 1, 2, 16, 40])
                start = self.first + self.rng.randrange(len(self.known) - length)
                self.pending = range(start, start + length)
            data = b"".join(self.content(x, self.known[x] + 1) for x in self.pending)
            client.pwrite(data, self.pending.start * SECTOR)
            for sector in self.pending:
                self.known[sector] += 1
            self.pending = None
            self.writes += 1
            if self.rng.random() < 0.02:
                client.flush()


def arrived(writers: list[Writer]) -> bool:
    return any(w.faults for w in writers) or all(w.there for w in writers)


def opened(directory: Path) -> Cache:
    """A cache that was never closed is open again as after a kill."""
    return open_cache(directory / "cache", directory / "index", size=16 * MIB, block_size=65536)


async def keep(cache: Cache, layer: Layer, data: bytes) -> None:
    """Write to the start of a private layer, up to where it would be acknowledged."""
    await private.prepare(cache, layer, 0, len(data))
    assert private.write(cache, layer, 0, memoryview(data))
    cache.intent.publish()


async def kept(cache: Cache, layer: Layer, length: int) -> bytes:
    """What the layer alone has there; OSError when it is damaged."""

    async def nothing(offset: int, length: int) -> bytes:
        raise AssertionError(f"the layer lost {length} bytes at {offset}")

    return b"".join(await View(cache, [layer], None, nothing).read(0, length))


async def test_a_kill_between_data_and_record_leaves_the_sector_readable(tmp_path: Path) -> None:
    """What the test below finds at random, step by step: either content may be there, an error may not."""
    cache = opened(tmp_path)
    layer = cache.layers.make(LayerName.of_disk("d", 1, "i"))
    await keep(cache, layer, b"a" * SECTOR)
    assert private.write(cache, layer, 0, memoryview(b"b" * SECTOR))
    cache.release()  # as a kill at this moment does
    cache = opened(tmp_path)
    try:
        [layer] = cache.layers.private_of("d")
        assert await kept(cache, layer, SECTOR) in (b"a" * SECTOR, b"b" * SECTOR)
    finally:
        cache.release()


@pytest.mark.parametrize(
    "lag", ["300ms", "1h"], ids=["written back meanwhile", "never written back"]
)
def test_no_acknowledged_write_is_lost_to_kill_9(
    lag: str, make_gateway: MakeGateway, rng: random.Random
) -> None:
    """A dozen kills at random moments. The guests never flush on purpose before one."""
    pytest.importorskip("libnbdmod")
    gateway = make_gateway({"defaults": {"max_lag": lag}})
    disk = attach(gateway, "write-back")
    half = SIZE // SECTOR // 2
    writers = [Writer(disk, n, n * half, rng.getrandbits(32)) for n in range(2)]
    for writer in writers:
        writer.start()
    try:
        for number in range(6):
            for writer in writers:
                writer.target = writer.writes + rng.randrange(1, 120)
            wait_for(partial(arrived, writers), "the writers make no progress")
            assert not any(w.faults for w in writers), (number, [w.faults for w in writers])
            gateway.restart(kill=True)
    finally:
        for writer in writers:
            writer.over.set()
        for writer in writers:
            writer.join()
    assert not any(w.faults for w in writers), [w.faults for w in writers]
    assert all(w.reconnected > 3 for w in writers)
    on_disk = disk.reads()
    assert disk.file_after_flush() == on_disk
    for writer in writers:
        writer.compare(on_disk[writer.first * SECTOR :])


@pytest.mark.parametrize("kill", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_every_mode_keeps_what_it_acknowledged(
    kill: bool, gateway: GatewayProcess, connect: Connect
) -> None:
    """Nothing was flushed; zeros, trims and odd offsets too."""
    disks = [attach(gateway, mode, name=mode) for mode in MODES]
    models = {}
    for disk in disks:
        client = connect(disk.uri)
        client.pread(MIB, MIB)
        model = models[disk.name] = bytearray(disk.content)
        for offset, length in ((0, 1), (777, 5000), (MIB, 65536), (SIZE - 3, 3)):
            client.pwrite(b"n" * length, offset)
            model[offset : offset + length] = b"n" * length
        client.zero(70_000, MIB + 1000)
        model[MIB + 1000 : MIB + 71_000] = bytes(70_000)
        client.trim(MIB, 2 * MIB)
        model[2 * MIB : 3 * MIB] = bytes(MIB)
    gateway.restart(kill=kill)
    for disk in disks:
        assert disk.reads() == models[disk.name], disk.name
    gateway.cli("flush", "--all")
    for disk in disks:
        assert disk.path.read_bytes() == models[disk.name], disk.name


# --------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kill", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_disks_keep_their_settings(kill: bool, gateway: GatewayProcess, connect: Connect) -> None:
    for mode in MODES:
        attach(gateway, mode, name=mode)
    attach(gateway, "write-back", "--cache-size", "1M", name="small")
    attach(gateway, "write-through", "--read-only", name="ro")
    attach(gateway, "write-through", "--overlay", name="ov")
    attach(gateway, "none", name="changed")
    gateway.cli("mode", "changed", "write-around")
    gateway.cli("detach", "none")
    keys = ("name", "image", "mode", "read_only", "overlay", "size", "socket", "dirty_bytes")

    def listed() -> list[dict[str, Any]]:
        return [{key: disk[key] for key in keys} for disk in ask(gateway, "/disks")]

    before = listed()
    assert len(before) == len(MODES) - 1 + 4
    gateway.restart(kill=kill)
    assert listed() == before
    assert all(accepts(gateway.sock(disk["name"])) for disk in before)
    assert not gateway.sock("none").exists(), "detached is detached"
    client = connect(gateway.uri("small"))
    for at in range(0, SIZE, 65536):
        client.pread(65536, at)
    assert ask(gateway, "/disks/small")["cached_bytes"] <= MIB


def test_a_disk_keeps_to_its_cache_size(gateway: GatewayProcess) -> None:
    disk = attach(gateway, "write-through", "--cache-size", "1M")
    for _ in range(3):
        assert disk.reads() == disk.content
        wait_for(lambda: disk.status()["cached_bytes"] <= MIB, "it holds more than it may", 5)


def test_a_warm_cache_is_warm_at_once_after_a_kill(
    gateway: GatewayProcess, connect: Connect
) -> None:
    disk = attach(gateway, "write-through")
    connect(disk.uri).pread(2 * MIB, 0)
    # A fill is stored after its reader has been answered.
    wait_for(lambda: disk.status()["cached_bytes"] >= 2 * MIB, "not stored", 10)
    disk.commit()
    for _ in range(2):
        gateway.restart(kill=True)
        assert disk.status()["cached_bytes"] >= 2 * MIB, "known before anybody reads"
        client = connect(disk.uri)
        assert client.pread(2 * MIB, 0) == disk.content[: 2 * MIB]
        status = disk.status()
        assert status["origin_read_bytes"] == status["read_misses"] == 0
        assert status["read_hits"] > 0


def test_clean_blocks_outlive_the_disk(gateway: GatewayProcess) -> None:
    disk = attach(gateway, "write-back")
    assert disk.reads() == disk.content
    gateway.cli("detach", "d")
    gateway.attach("again", disk.path.name, mode="write-through")
    again = OneDisk(gateway, "again", disk.path, disk.content)
    assert again.reads() == disk.content
    assert again.status()["origin_read_bytes"] == 0


def test_a_full_copy_goes_on_where_it_was(gateway: GatewayProcess, connect: Connect) -> None:
    disk = attach(gateway, "full-copy")
    connect(disk.uri).pwrite(b"x" * 10_000, 5000)
    gateway.restart(kill=True)
    wait_for(lambda: disk.status()["state"] != "copying", "the copy does not end")
    model = disk.content[:5000] + b"x" * 10_000 + disk.content[15_000:]
    disk.path.rename(disk.path.with_suffix(".away"))
    assert disk.reads() == model, "all of it is here"
    disk.path.with_suffix(".away").rename(disk.path)
    gateway.cli("detach", "d")
    assert disk.path.read_bytes() == model


# ------------------------------------------------------------------------------------ detaching


@pytest.mark.parametrize("mode", PRIVATE_MODES)
def test_detach_drains(mode: str, gateway: GatewayProcess) -> None:
    disk = attach(gateway, mode)
    run("qemu-io", "-f", "raw", "-c", "write -P 7 100k 1M", disk.uri)
    assert disk.status()["dirty_bytes"] >= MIB
    assert disk.path.read_bytes() == disk.content
    gateway.cli("detach", "d")
    expected = disk.content[: 100 << 10] + b"\7" * MIB + disk.content[(100 << 10) + MIB :]
    assert disk.path.read_bytes() == expected
    assert sorted(path.name for path in gateway.images.iterdir()) == ["d.raw"]
    assert not disk.gateway.sock("d").exists()


@pytest.mark.parametrize("mode", PRIVATE_MODES)
def test_detach_with_discard_drops(mode: str, gateway: GatewayProcess) -> None:
    gateway.allow_log("dropped as asked")
    disk = attach(gateway, mode)
    run("qemu-io", "-f", "raw", "-c", "write -P 7 100k 1M", "-c", "flush", disk.uri)
    gateway.cli("detach", "d", "--discard")
    assert disk.path.read_bytes() == disk.content
    gateway.attach("d", disk.path.name, mode=mode)
    assert disk.reads() == disk.content, "nothing of it comes back"
    assert disk.status()["dirty_bytes"] == 0


@pytest.mark.parametrize("options", [[], ["--discard"]], ids=["drain", "discard"])
def test_detach_refuses_while_a_client_is_connected(
    options: list[str], gateway: GatewayProcess, connect: Connect
) -> None:
    gateway.allow_log("dropped as asked")
    disk = attach(gateway, "write-back")
    clients = [connect(disk.uri) for _ in range(2)]
    clients[0].pwrite(b"x" * SECTOR, 0)
    refused = gateway.cli("detach", "d", *options, check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "2 clients" in refused.stderr
    assert "--force" in refused.stderr
    for client in clients:
        assert client.pread(SECTOR, 0) == b"x" * SECTOR, "it goes on as if nothing had been asked"
    assert disk.status()["dirty_bytes"] == SECTOR
    gateway.cli("detach", "d", "--force", *options)
    expected = disk.content if options else b"x" * SECTOR + disk.content[SECTOR:]
    assert disk.path.read_bytes() == expected
    with pytest.raises(Exception, match="rror|closed|EOF|not connected|ENOTCONN|dead"):
        clients[0].pread(SECTOR, 0)
    assert json.loads(gateway.cli("status", "--json").stdout) == []


def test_detach_is_possible_when_the_last_client_has_gone(
    gateway: GatewayProcess, connect: Connect
) -> None:
    disk = attach(gateway, "write-back")
    client = connect(disk.uri)
    assert disk.status()["clients"] == 1
    client.shutdown()
    wait_for(lambda: disk.status()["clients"] == 0, "the client is still counted")
    gateway.cli("detach", "d")
