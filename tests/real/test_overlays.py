# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Many machines from one image: each with its own writes, all with the image's blocks, none with the image."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import OneDisk, ask, cache_info, run, run_together, wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, NbdServer, random_image

Connect = Callable[..., Any]

COUNT = 20
SIZE = 16 * MIB
BLOCK = 65536


@pytest.fixture
def image(gateway: GatewayProcess) -> bytes:
    return random_image(gateway.images / "base.raw", SIZE, 1, [(8 * MIB, MIB)])


def attach_all(gateway: GatewayProcess, image: bytes, count: int = COUNT) -> list[OneDisk]:
    path = gateway.images / "base.raw"
    for number in range(count):
        gateway.attach(f"vm{number}", path.name, "--overlay")
    return [OneDisk(gateway, f"vm{number}", path, image) for number in range(count)]


def test_twenty_overlays_cost_what_they_change(
    gateway: GatewayProcess, image: bytes, connect: Connect, rng: random.Random
) -> None:
    path = gateway.images / "base.raw"
    before = path.stat()
    disks = attach_all(gateway, image)
    clients = [connect(disk.uri) for disk in disks]
    models = [bytearray(image) for _ in disks]
    for client in clients:
        assert client.pread(4 * MIB, 0) == image[: 4 * MIB]
    shared = cache_info(gateway)
    assert shared["clean_bytes"] < 6 * MIB, "once, not twenty times (and some read ahead)"
    assert shared["private_bytes"] == 0
    for number, (client, model) in enumerate(zip(clients, models, strict=True)):
        for offset, length in ((MIB, 4096), (2 * MIB + 7, 100), (8 * MIB + 4096, 8192)):
            data = bytes([number + 1]) * length
            client.pwrite(data, offset)
            model[offset : offset + length] = data
        client.zero(65536, 4 * MIB)
        model[4 * MIB : 4 * MIB + 65536] = bytes(65536)
        client.trim(MIB, 5 * MIB)
        model[5 * MIB : 6 * MIB] = bytes(MIB)
        client.flush()
    info = cache_info(gateway)
    assert info["private_bytes"] == COUNT * 3 * BLOCK, "zeros and trims need no room"
    assert info["clean_bytes"] < 8 * MIB
    for client, model in zip(clients, models, strict=True):
        assert client.pread(SIZE, 0) == model
    for disk in disks:
        status = disk.status()
        assert status["overlay"]
        assert status["dirty_bytes"] == status["origin_written_bytes"] == 0
    gateway.cli("flush", "--all")
    assert path.read_bytes() == image
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert [entry.name for entry in gateway.images.iterdir()] == ["base.raw"]


def test_overlays_live_through_a_kill_and_are_gone_at_detach(
    gateway: GatewayProcess, image: bytes, connect: Connect
) -> None:
    disks = attach_all(gateway, image, 3)
    for number, disk in enumerate(disks):
        connect(disk.uri).pwrite(bytes([number + 1]) * 5000, MIB)
    gateway.restart(kill=True)
    for number, disk in enumerate(disks):
        assert disk.reads()[MIB : MIB + 5000] == bytes([number + 1]) * 5000
    private = cache_info(gateway)["private_bytes"]
    assert private
    clean = cache_info(gateway)["clean_bytes"]
    gateway.cli("detach", "vm0")
    gateway.cli("detach", "vm1", "--discard")
    wait_for(lambda: cache_info(gateway)["private_bytes"] == private // 3, "their room is not free")
    assert disks[2].reads()[MIB : MIB + 5000] == b"\3" * 5000, "the others keep theirs"
    gateway.attach("vm0", "base.raw", "--overlay")
    assert disks[0].reads() == image
    gateway.cli("detach", "vm2")
    wait_for(lambda: not cache_info(gateway)["private_bytes"], "their room is not free")
    assert cache_info(gateway)["clean_bytes"] >= clean, "the image's blocks stay"
    gateway.restart(kill=True)
    assert disks[0].reads() == image
    assert (gateway.images / "base.raw").read_bytes() == image


def test_a_read_only_disk_beside_overlays_sees_the_image(
    gateway: GatewayProcess, image: bytes, connect: Connect
) -> None:
    disks = attach_all(gateway, image, 2)
    gateway.attach("ro", "base.raw", "--read-only")
    for disk in disks:
        run("qemu-io", "-f", "raw", "-c", "write -P 9 0 16M", disk.uri)
    assert connect(gateway.uri("ro")).pread(SIZE, 0) == image
    assert all(disk.reads() == b"\x09" * SIZE for disk in disks)


def test_a_boot_storm_reads_each_block_from_the_origin_once(
    start_nbdkit: Callable[..., NbdServer], gateway: GatewayProcess, tmp_path: Path
) -> None:
    """Twenty machines read the same image at the same time; the origin's own log says what it was asked for."""
    path, log = tmp_path / "base.raw", tmp_path / "log"
    random_image(path, 4 * MIB, 1)
    server = start_nbdkit("file", path, f"logfile={log}", "rdelay=5ms", filters=["log", "delay"])
    for number in range(COUNT):
        gateway.attach(f"vm{number}", server.uri, "--overlay")
    skipped = len(log.read_text())
    run_together(
        *(
            ["nbdcopy", "--requests=8", "--connections=2", gateway.uri(f"vm{number}"), "null:"]
            for number in range(COUNT)
        )
    )
    reads = re.findall(
        r" Read id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", log.read_text()[skipped:]
    )
    asked = sorted((int(offset, 16), int(count, 16)) for offset, count in reads)
    assert sum(count for _, count in asked) == 4 * MIB
    at = 0
    for offset, count in asked:
        assert offset == at, "no block twice, none left out"
        at += count
    counted = [disk["origin_read_bytes"] for disk in ask(gateway, "/disks")]
    assert sum(counted) == 4 * MIB


def test_an_overlay_that_fills_the_cache_fails_alone(
    make_gateway: Callable[..., GatewayProcess], connect: Connect
) -> None:
    """There is nowhere to write its data back to: ENOSPC, and everybody reads on."""
    import nbd

    gateway = make_gateway({"cache": {"size": "16 MiB"}})
    image = random_image(gateway.images / "base.raw", 32 * MIB, 1)
    greedy, other = attach_all(gateway, image, 2)
    client, reader = connect(greedy.uri), connect(other.uri)
    written = 0
    with pytest.raises(nbd.Error, match="space|ENOSPC"):  # noqa: PT012  (at which write is open)
        while written < 32 * MIB:
            client.pwrite(bytes([written // MIB + 1]) * MIB, written)
            written += MIB
    assert written
    for at in range(0, written, MIB):
        assert client.pread(MIB, at) == bytes([at // MIB + 1]) * MIB, "what was acknowledged stays"
    assert reader.pread(30 * MIB, 0) == image[: 30 * MIB]
    client.shutdown()
    gateway.cli("detach", "vm0", "--force")
    wait_for(lambda: not cache_info(gateway)["private_bytes"], "its room is not free")
    reader.pwrite(b"x" * MIB, 0)
    assert reader.pread(2 * MIB, 0) == b"x" * MIB + image[MIB : 2 * MIB]
