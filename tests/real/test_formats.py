# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Images in the formats of virtual machines: the guest sees the disk in them, in every mode, whatever dies."""

import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import MODES, run, wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, need
from real.shared_gateway import SharedGateways

pytestmark = pytest.mark.usefixtures("tools")

Connect = Callable[..., Any]

SIZE = 24 * MIB
FORMATS = ("qcow2", "vmdk", "vdi", "vhdx")
LATE = {"defaults": {"max_lag": "1h"}}
"""No pass begins by itself."""


@pytest.fixture(scope="module")
def gateways() -> Iterator[SharedGateways]:
    shared = SharedGateways()
    yield shared
    shared.remove()


@pytest.fixture
def gateway(gateways: SharedGateways) -> Iterator[GatewayProcess]:
    with gateways.emptied() as gateway:
        yield gateway


@pytest.fixture
def late(gateways: SharedGateways) -> Iterator[GatewayProcess]:
    with gateways.emptied(LATE) as gateway:
        yield gateway


@pytest.fixture
def tools() -> None:
    need("qemu-img", "qemu-io", "qemu-storage-daemon")


def make(gateway: GatewayProcess, content: bytes, image_format: str = "qcow2") -> Path:
    """An image in the store whose guest sees `content`."""
    raw, path = gateway.directory / "content", gateway.images / f"a.{image_format}"
    raw.write_bytes(content)
    run("qemu-img", "convert", "-f", "raw", "-O", image_format, raw, path)
    return path


def shown(path: Path, image_format: str | None = None) -> bytes:
    """What a guest of QEMU sees of an image."""
    raw = path.parent.parent / "shown"
    run("qemu-img", "convert", "-f", image_format or path.suffix[1:], "-O", "raw", path, raw)
    return raw.read_bytes()


def overwrite(client: Any, content: bytes, rng: random.Random, count: int = 40) -> bytes:
    """Write here and there; what the disk holds then."""
    after = bytearray(content)
    for n in range(count):
        at = rng.randrange(SIZE // 512) * 512
        length = min(SIZE - at, rng.choice((512, 4096, 70_000 // 512 * 512, MIB)))
        if n % 7 == 6:
            client.zero(length, at)
            after[at : at + length] = bytes(length)
        else:
            data = rng.randbytes(length)
            client.pwrite(data, at)
            after[at : at + length] = data
    return bytes(after)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def servers(gateway: GatewayProcess) -> list[int]:
    """The storage daemons of a gateway."""
    return [
        grandchild
        for child in children(gateway.pid)
        for grandchild in children(child)
        if "qemu-storage" in Path(f"/proc/{grandchild}/comm").read_text()
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WAYS = ("--read-only", "--overlay", "write-through", "write-back")


@pytest.mark.parametrize(
    ("image_format", "way"),
    [("qcow2", way) for way in WAYS] + [(other, "write-back") for other in FORMATS[1:]],
)
def test_a_guest_sees_the_disk_in_an_image(
    gateway: GatewayProcess,
    connect: Connect,
    rng: random.Random,
    image_format: str,
    way: str,
) -> None:
    content = rng.randbytes(SIZE // 2) + bytes(SIZE // 4) + rng.randbytes(SIZE // 4)
    path = make(gateway, content, image_format)
    before = path.read_bytes()
    if way.startswith("--"):
        gateway.attach("d", path.name, way)
    else:
        gateway.attach("d", path.name, mode=way)
    assert (gateway.status("d")["format"], gateway.status("d")["size"]) == (image_format, SIZE)
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(SIZE, 0)) == content
    after = content
    if way != "--read-only":
        after = overwrite(client, content, rng)
        assert bytes(client.pread(SIZE, 0)) == after
        client.flush()
    client.shutdown()
    gateway.cli("detach", "d")
    if way.startswith("--"):
        assert path.read_bytes() == before
    else:
        assert shown(path) == after
    beside = gateway.images / f"{path.name}.forebay"  # where a boot trace may lie
    assert not beside.exists() or not list(beside.glob("**/owner"))


@pytest.mark.parametrize("mode", ["write-through", "write-back"])
def test_what_was_acknowledged_survives_a_kill_of_the_daemon(
    late: GatewayProcess, connect: Connect, rng: random.Random, mode: str
) -> None:
    gateway = late
    content = rng.randbytes(SIZE)
    path = make(gateway, content)
    gateway.attach("d", path.name, mode=mode)
    client = connect(gateway.uri("d"))
    after = overwrite(client, content, rng)  # and no flush
    [server] = servers(gateway)
    gateway.restart(kill=True)
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(SIZE, 0)) == after
    after = overwrite(client, after, rng)
    client.flush()
    client.shutdown()
    gateway.cli("flush", "d")
    gateway.cli("detach", "d")
    assert shown(path) == after
    assert not is_running(server)
    run("qemu-img", "check", "-q", path)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_that_was_flushed_is_lost_when_the_server_of_an_image_is_killed(
    late: GatewayProcess, connect: Connect, rng: random.Random, mode: str
) -> None:
    gateway = late
    gateway.allow_log(r"WARNING .*(opened anew|reached|a flush failed|closing it)")
    content = rng.randbytes(SIZE)
    path = make(gateway, content)
    gateway.attach("d", path.name, mode=mode)
    client = connect(gateway.uri("d"))
    for _ in range(3):
        content = overwrite(client, content, rng, 15)
        for server in servers(gateway):
            os.kill(server, signal.SIGKILL)
        content = overwrite(client, content, rng, 15)
        client.flush()
        assert bytes(client.pread(SIZE, 0)) == content
    client.shutdown()
    gateway.cli("flush", "d")
    gateway.cli("detach", "d")
    assert shown(path) == content


def test_a_checkpoint_that_was_committed_is_finished_by_recover(
    late: GatewayProcess, connect: Connect, rng: random.Random
) -> None:
    gateway = late
    content = rng.randbytes(SIZE)
    path = make(gateway, content)
    gateway.attach("d", path.name, mode="write-back")
    client = connect(gateway.uri("d"))
    after = overwrite(client, content, rng, 200)
    client.flush()
    client.shutdown()
    side = gateway.images / "a.qcow2.forebay"
    command = [sys.executable, "-m", "forebay", "flush", "d", "--config", str(gateway.config)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as flush:
        while not list(side.glob("**/redo")) and flush.poll() is None:
            time.sleep(0.001)
        gateway.kill()
    refused = gateway.cli("recover", str(path), check=False)
    if "in use" in refused.stderr:  # the server of before has not ended yet
        wait_for(
            lambda: not gateway.cli("recover", str(path), check=False).returncode, "it is recovered"
        )
    assert shown(path) in (content, after)
    gateway.start()
    assert gateway.status("d")["state"] in ("ready", "away")
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(SIZE, 0)) == after


def test_overlays_share_the_server_and_the_blocks_of_their_image(
    gateway: GatewayProcess, connect: Connect, rng: random.Random
) -> None:
    content = rng.randbytes(SIZE)
    path = make(gateway, content)
    for n in range(5):
        gateway.attach(f"d{n}", path.name, "--overlay")
    clients = [connect(gateway.uri(f"d{n}")) for n in range(5)]
    for n, client in enumerate(clients):
        client.pwrite(bytes([n]) * 4096, 4096)
    for n, client in enumerate(clients):
        assert bytes(client.pread(SIZE, 0)) == content[:4096] + bytes([n]) * 4096 + content[8192:]
    assert len(servers(gateway)) == 1
    fetched = sum(gateway.status(f"d{n}")["origin_read_bytes"] for n in range(5))
    assert fetched <= SIZE
    assert shown(path) == content


def test_a_planned_restart_loses_nothing_and_knows_the_image_again(
    late: GatewayProcess, connect: Connect, rng: random.Random
) -> None:
    gateway = late
    gateway.allow_log(r"WARNING .*reached")  # on a busy host its processes start slowly
    content = rng.randbytes(SIZE)
    path = make(gateway, content)
    gateway.attach("d", path.name, mode="write-back")
    client = connect(gateway.uri("d"))
    after = overwrite(client, content, rng)
    client.shutdown()
    gateway.restart()
    wait_for(lambda: gateway.status("d")["state"] == "ready", "the image is reached")
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(SIZE, 0)) == after
    client.shutdown()
    gateway.cli("detach", "d")
    assert shown(path) == after


def test_a_change_behind_our_back_is_noticed(
    gateway: GatewayProcess, connect: Connect, rng: random.Random
) -> None:
    content = rng.randbytes(SIZE)
    path = make(gateway, content)
    gateway.attach("d", path.name, "--read-only")
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(SIZE, 0)) == content
    client.shutdown()
    gateway.cli("detach", "d")
    run("qemu-io", "-c", "write -P 77 1M 1M", path)
    gateway.allow_log(
        r"WARNING .*(was changed|was replaced|opened anew|reached again|closing it|not recorded)"
    )
    gateway.attach("d", path.name, "--read-only")
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(MIB, MIB)) == bytes([77]) * MIB


def test_nobody_writes_what_an_image_in_use_lies_on(
    gateway: GatewayProcess, connect: Connect, rng: random.Random
) -> None:
    content = rng.randbytes(SIZE)
    (gateway.images / "base.raw").write_bytes(content)
    words = ["-f", "qcow2", "-b", "base.raw", "-F", "raw"]
    run("qemu-img", "create", "-q", *words, gateway.images / "top.qcow2")
    gateway.attach("base", "base.raw")
    refused = gateway.cli("attach", "top", "images:top.qcow2", "--overlay", check=False)
    assert "lies on images:base.raw, which is written by" in refused.stderr
    gateway.cli("detach", "base")
    for way in ("--overlay", "--read-only", None):
        gateway.attach("top", "top.qcow2", *([way] if way else []))
        refused = gateway.cli("attach", "base", "images:base.raw", check=False)
        assert "lies on it" in refused.stderr
        assert run(
            "qemu-io", "-c", "write 0 4k", gateway.images / "base.raw", check=False
        ).returncode
        client = connect(gateway.uri("top"))
        assert bytes(client.pread(SIZE, 0)) == content
        client.shutdown()
        gateway.cli("detach", "top")
    gateway.attach("base", "base.raw")


def test_what_is_written_into_a_header_later_is_not_followed(
    gateway: GatewayProcess, connect: Connect, rng: random.Random
) -> None:
    """Not while the image is in use, and not when its server is started again."""
    content, secret = rng.randbytes(SIZE), gateway.directory / "secret"
    secret.write_bytes(b"s" * SIZE)
    (gateway.images / "base.raw").write_bytes(content)
    path = gateway.images / "top.qcow2"
    words = ["-f", "qcow2", "-b", "base.raw", "-F", "raw"]
    run("qemu-img", "create", "-q", *words, path)
    gateway.attach("d", "top.qcow2", "--overlay")
    gateway.allow_log("WARNING|ERROR")
    stamp = path.stat()
    name = os.fsencode(secret)
    with path.open("r+b") as file:
        at = struct.unpack(">Q", file.read(16)[8:])[0]
        file.write(struct.pack(">I", len(name)))
        file.seek(at)
        file.write(name)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(MIB, 0)) == content[:MIB]
    [server] = servers(gateway)
    os.kill(server, signal.SIGKILL)
    with pytest.raises(Exception, match="Input/output error"):
        client.pread(MIB, SIZE - MIB)
    assert "in no store" in gateway.status("d")["reason"]


def test_an_image_is_free_when_its_disk_is_detached(
    gateway: GatewayProcess, connect: Connect, rng: random.Random
) -> None:
    gateway.allow_log(
        "WARNING .*(was changed|opened anew|reached again|not recorded)"
    )  # we do that
    path = make(gateway, rng.randbytes(SIZE))
    for n in range(4):
        gateway.attach("d", path.name)
        client = connect(gateway.uri("d"))
        client.pwrite(bytes([n]) * MIB, n * MIB)
        client.shutdown()
        [server] = servers(gateway)
        gateway.cli("detach", "d")
        assert not is_running(server)
        run("qemu-io", "-c", f"read -P {n} {n}M 1M", "-c", f"write -P {n} {n}M 64k", path)
