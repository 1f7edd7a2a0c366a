# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A store that hangs while the daemon ends: the process that hangs with it is the store's, and not the daemon."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import OneDisk, wait_for
from real.fault_fs import FaultFs
from real.gateway_process import GatewayProcess
from real.processes import MIB, loop_device, random_image

Connect = Callable[..., Any]

SIZE = 8 * MIB
REGION = 4 * MIB
"""What is cached of one that was written since a flush went well is dropped if the next fails, or takes too long."""

CALLS = ("read", "write", "fsync", "flush", "getattr", "open")
STOP_SECONDS = 30
"""How long a stop may take while a store hangs: 20 s for its clients' requests, 2 s for its disks, and some."""

LOG = "its descriptor fails|cannot be reached|can be reached again|cut short|still|write-back failed|given up|hung up"
LOG += "|a flush failed|could not be"


@pytest.fixture
def faulty(short_path: Path, request: pytest.FixtureRequest) -> Iterator[FaultFs]:
    """With dirty pages of this host, where the test asks for them."""
    fs = FaultFs(short_path / "fs", *getattr(request, "param", ()))
    try:
        yield fs
    finally:
        fs.remove()


@pytest.fixture
def bed(make_gateway: Callable[..., GatewayProcess], faulty: FaultFs) -> Iterator[GatewayProcess]:
    gateway = make_gateway(
        {
            "defaults": {"origin_timeout": "2s"},
            "stores.images": {"path": str(faulty.path)},
            "cache": {"size": "64 MiB"},
        }
    )
    gateway.allow_log(LOG)
    yield gateway
    faulty.lift()
    gateway.kill()


@pytest.fixture
def local(make_gateway: Callable[..., GatewayProcess]) -> GatewayProcess:
    """A daemon whose store lies on a file system of this host."""
    return make_gateway()


def workers(gateway: GatewayProcess) -> list[int]:
    """Those that make calls for stores of this daemon: they hold its lock files."""
    locks = {
        (one.stat().st_dev, one.stat().st_ino) for one in (gateway.run / "processes").iterdir()
    }
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            fds = [os.stat(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        if any((one.st_dev, one.st_ino) in locks for one in fds):
            found.append(int(pid))
    return found


@pytest.mark.parametrize(
    ("faulty", "number", "mode"),
    [
        (("writeback",), signal.SIGKILL, "write-through"),
        (("writeback",), signal.SIGTERM, "write-through"),
        ((), signal.SIGKILL, "write-back"),
        ((), signal.SIGTERM, "write-back"),
    ],
    indirect=["faulty"],
    ids=[
        "killed with dirty pages",
        "stopped with dirty pages",
        "killed in a pass",
        "stopped in a pass",
    ],
)
def test_the_daemon_ends_and_comes_back_while_the_store_hangs(
    bed: GatewayProcess, faulty: FaultFs, connect: Connect, number: signal.Signals, mode: str
) -> None:
    import nbd

    random_image(faulty.backing / "d.raw", SIZE, 7)
    bed.attach("d", "d.raw", mode=mode)
    client = connect(bed.uri("d"))
    warm = bytes(client.pread(MIB, REGION))
    client.pwrite(b"w" * MIB, 2 * MIB)
    bed.cli("flush", "d")
    OneDisk(bed, "d", faulty.backing / "d.raw", b"").commit()  # what was read is in the index
    for call in CALLS:
        faulty.fail(call, hang=True)
    client.aio_pread(nbd.Buffer(65536), 6 * MIB)
    client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"x" * MIB)), MIB)
    push(client, 0.5)
    client.aio_flush()
    push(client, 0.5)
    assert bed.process is not None
    bed.process.send_signal(number)
    bed.process.wait(STOP_SECONDS if number == signal.SIGTERM else 2)
    bed.start()
    began = time.monotonic()
    again = connect(bed.uri("d"))
    assert bytes(again.pread(MIB, REGION)) == warm
    assert time.monotonic() - began < 10, "hits wait for the store"
    assert bed.status("d")["state"] == "degraded"
    faulty.lift()
    wait_for(lambda: bed.status("d")["state"] == "ready", f"{bed.status('d')}", 60)
    again.pwrite(b"y" * MIB, 2 * MIB)
    again.flush()
    bed.cli("flush", "d")
    assert (faulty.backing / "d.raw").read_bytes()[2 * MIB :][:MIB] == b"y" * MIB
    assert len(workers(bed)) == 1, "that of the daemon before has ended"


def push(client: Any, seconds: float) -> None:
    """Let a client send what it was asked for: it does so as it is polled."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        client.poll(max(1, int(left * 1000)))


def test_a_store_of_this_host_needs_no_process(local: GatewayProcess) -> None:
    random_image(local.images / "d.raw", MIB, 7)
    local.attach("d", "d.raw")
    assert not (local.run / "processes").exists()


def test_a_process_that_was_killed_is_started_again(
    bed: GatewayProcess, faulty: FaultFs, connect: Connect
) -> None:
    """Its calls fail with EIO; the image is opened anew, and nothing has to be restarted."""
    content = random_image(faulty.backing / "d.raw", SIZE, 7)
    bed.attach("d", "d.raw", mode="write-back")
    client = connect(bed.uri("d"))
    client.pwrite(b"w" * MIB, 0)
    [worker] = workers(bed)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: workers(bed) not in ([], [worker]), "no other one was started", 60)
    wait_for(lambda: bed.status("d")["state"] == "ready", f"{bed.status('d')}", 60)
    assert bytes(client.pread(MIB, 4 * MIB)) == content[4 * MIB : 5 * MIB]
    bed.cli("flush", "d")
    [worker] = workers(bed)
    os.kill(worker, signal.SIGKILL)
    client.pwrite(b"v" * MIB, MIB)  # the marker has to say so first
    bed.cli("flush", "d")
    assert (faulty.backing / "d.raw").read_bytes() == b"w" * MIB + b"v" * MIB + content[2 * MIB :]


@pytest.mark.parametrize("mode", ["write-through", "write-back"])
def test_a_block_device_comes_back_after_its_process_was_killed(
    local: GatewayProcess, connect: Connect, tmp_path: Path, mode: str
) -> None:
    content = random_image(tmp_path / "device", SIZE, 7)
    local.allow_log(LOG)
    with loop_device(tmp_path / "device", 512) as device:
        local.attach("d", device, mode=mode)
        client = connect(local.uri("d"))
        client.pwrite(b"w" * MIB, 0)
        [worker] = workers(local)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: readable(client, 4 * MIB), f"{local.status('d')}", 60)
        assert bytes(client.pread(MIB, 4 * MIB)) == content[4 * MIB : 5 * MIB]
        assert workers(local) not in ([], [worker])
        client.pwrite(b"v" * MIB, MIB)
        client.flush()
        local.cli("flush", "d")
        assert local.status("d")["state"] == "ready"
        client.shutdown()
        local.cli("detach", "d")
        local.stop()
    assert (tmp_path / "device").read_bytes() == b"w" * MIB + b"v" * MIB + content[2 * MIB :]


def readable(client: Any, offset: int) -> bool:
    """Whether a byte there is answered with data."""
    import nbd

    try:
        client.pread(1, offset)
    except nbd.Error:
        return False
    return True
