# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Overlays that stay, by the command and by real clients: kept, snapshots, saved, committed, reverted."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from real.disk_fixture import OneDisk, allocated, cache_info, run, wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, random_image

Connect = Callable[..., Any]

SIZE = 16 * MIB


@pytest.fixture
def image(gateway: GatewayProcess) -> bytes:
    return random_image(gateway.images / "base.raw", SIZE, 1, [(8 * MIB, MIB)])


@pytest.fixture
def disk(gateway: GatewayProcess, image: bytes) -> OneDisk:
    gateway.attach("vm", "base.raw", "--overlay", "--keep")
    return OneDisk(gateway, "vm", gateway.images / "base.raw", image)


def listed(gateway: GatewayProcess, *command: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gateway.cli(*command, "--json").stdout)
    return found


def write(disk: OneDisk, model: bytearray, offset: int, data: bytes, connect: Connect) -> None:
    with_client = connect(disk.uri)
    with_client.pwrite(data, offset)
    with_client.flush()
    with_client.shutdown()
    model[offset : offset + len(data)] = data


def test_what_a_vm_wrote_is_there_at_the_next_attach_whatever_happened_meanwhile(
    gateway: GatewayProcess, disk: OneDisk, image: bytes, connect: Connect
) -> None:
    model = bytearray(image)
    write(disk, model, MIB, b"a" * 70000, connect)
    gateway.cli("snapshot", "vm", "one")
    then = bytes(model)
    write(disk, model, MIB + 4096, b"b" * 70000, connect)
    gateway.restart(kill=True)
    assert disk.reads() == model
    gateway.cli("detach", "vm")
    gateway.restart(kill=True)
    [told] = listed(gateway, "overlays")
    assert (told["name"], told["attached"], told["snapshots"]) == ("vm", False, 1)
    assert told["private_bytes"] > 140000
    gateway.attach("vm", "base.raw", "--overlay")
    assert disk.reads() == model
    gateway.cli("rollback", "vm", "one")
    gateway.restart(kill=True)
    assert disk.reads() == then
    assert [x["name"] for x in listed(gateway, "snapshots", "vm")] == ["one"]
    gateway.cli("revert", "vm", "--yes")
    gateway.restart(kill=True)
    assert disk.reads() == image
    assert listed(gateway, "snapshots", "vm") == []
    assert (gateway.images / "base.raw").read_bytes() == image
    wait_for(lambda: not cache_info(gateway)["private_bytes"], "its room is not free")


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_save_is_of_one_instant_while_a_client_writes(
    form: str, gateway: GatewayProcess, disk: OneDisk, image: bytes, connect: Connect
) -> None:
    """Two places are always written one after the other with the same number; a save has them at most one apart."""
    script = (
        "import nbd, sys\n"
        "h = nbd.NBD(); h.connect_uri(sys.argv[1])\n"
        "print('begun', flush=True)\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    for at in (4096, 15 << 20):\n"
        "        h.pwrite(n.to_bytes(4096, 'big'), at)\n"
    )
    writer = subprocess.Popen(
        ["/usr/bin/python3", "-c", script, disk.uri], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
        for n in range(3):
            path = gateway.images / f"{n}.{form}"
            gateway.cli("save", "vm", f"images:{path.name}", "--format", form)
            if form == "qcow2":
                run("qemu-img", "check", path)
                run("qemu-img", "convert", "-O", "raw", path, path.with_suffix(".out"))
                path = path.with_suffix(".out")
            data = path.read_bytes()
            first = int.from_bytes(data[4096:8192], "big")
            second = int.from_bytes(data[15 << 20 : (15 << 20) + 4096], "big")
            assert 0 <= first - second <= 1, (first, second)
            assert data[8192 : 15 << 20] == image[8192 : 15 << 20]
    finally:
        writer.kill()
        writer.wait()
        if writer.stdout is not None:
            writer.stdout.close()


def test_what_is_saved_is_sparse_and_every_snapshot_can_be_had(
    gateway: GatewayProcess, connect: Connect
) -> None:
    path = gateway.images / "base.raw"
    path.write_bytes(b"")
    os.truncate(path, 700 * MIB + 512)
    gateway.attach("vm", "base.raw", "--overlay")
    disk = OneDisk(gateway, "vm", path, b"")
    shown: dict[str, dict[int, bytes]] = {}
    now: dict[int, bytes] = {}
    for n, offset in enumerate((0, 511 * MIB, 512 * MIB, 700 * MIB + 512 - 100, 65536 + 100)):
        client = connect(disk.uri)
        now[offset] = bytes([n + 1]) * 100
        client.pwrite(now[offset], offset)
        client.shutdown()
        gateway.cli("snapshot", "vm", f"s{n}")
        shown[f"s{n}"] = dict(now)
    for name, parts in shown.items():
        for form in ("raw", "qcow2"):
            made = gateway.images / f"{name}.{form}"
            gateway.cli("save", "vm", f"images:{made.name}", "--format", form, "--snapshot", name)
            assert allocated(made) < 2 * MIB
            if form == "qcow2":
                run("qemu-img", "check", made)
                run(
                    "qemu-img",
                    "compare",
                    "-f",
                    "raw",
                    "-F",
                    "qcow2",
                    made.with_suffix(".raw"),
                    made,
                )
            else:
                with made.open("rb") as file:
                    for offset, data in parts.items():
                        file.seek(offset)
                        assert file.read(100) == data
    refused = gateway.cli("save", "vm", "images:s0.raw", check=False)
    assert (refused.returncode, "is there already" in refused.stderr) == (1, True)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_disk_of_terabytes_with_little_in_it_is_saved(
    form: str, gateway: GatewayProcess, connect: Connect
) -> None:
    """Step by step through its holes that would take hours."""
    size = (4 << 40) + 4097
    base = gateway.images / "large.raw"
    with base.open("wb") as file:
        file.truncate(size)
        for at, data in ((5 * MIB - 100, b"a" * 200), (size - 4097, b"e" * 4097)):
            file.seek(at)
            file.write(data)
    gateway.attach("vm", "large.raw", "--overlay")
    client = connect(f"nbd+unix:///vm?socket={gateway.run}/disks/vm.sock")
    client.pwrite(b"b" * 70000, (3 << 40) + 12288)
    client.pwrite(bytes(200), 5 * MIB - 100)
    client.pwrite(b"c" * 512, 9 * MIB)
    client.shutdown()
    new = gateway.images / f"new.{form}"
    gateway.cli("save", "vm", f"images:{new.name}", "--format", form)
    want = {5 * MIB - 100: bytes(200), 9 * MIB: b"c" * 512, size - 4097: b"e" * 4097}
    want |= {(3 << 40) + 12288: b"b" * 70000, 2 << 40: bytes(4096)}
    if form == "raw":
        assert new.stat().st_size == size
        assert allocated(new) < MIB
        with new.open("rb") as file:
            for at, data in want.items():
                assert os.pread(file.fileno(), len(data), at) == data
        return
    steps = [f"read -P {data[0]} {at} {len(data)}" for at, data in want.items()]
    run("qemu-io", "-r", "-f", "qcow2", *[word for step in steps for word in ("-c", step)], new)


def test_a_commit_puts_the_changes_into_the_image_and_goes_on_empty(
    gateway: GatewayProcess, disk: OneDisk, image: bytes, connect: Connect
) -> None:
    model = bytearray(image)
    client = connect(disk.uri)
    client.pwrite(b"c" * 200000, 3 * MIB + 512)
    model[3 * MIB + 512 : 3 * MIB + 512 + 200000] = b"c" * 200000
    client.zero(2 * MIB, 5 * MIB)
    model[5 * MIB : 7 * MIB] = bytes(2 * MIB)
    refused = gateway.cli("commit", "vm", check=False)
    assert (refused.returncode, "is in use" in refused.stderr) == (1, True)
    client.shutdown()
    wait_for(lambda: not disk.status()["clients"], "it does not leave")
    gateway.cli("commit", "vm")
    assert disk.path.read_bytes() == model
    assert not (gateway.images / "base.raw.forebay").exists()
    assert disk.reads() == model
    status = disk.status()
    assert (status["overlay"], status["keep"], status["private_bytes"]) == (True, True, 0)
    gateway.cli("detach", "vm")
    gateway.attach("vm", "base.raw", "--mode", "write-through")
    assert disk.reads() == model


def test_a_commit_that_is_killed_is_gone_on_with_by_the_next_start(
    gateway: GatewayProcess, disk: OneDisk, image: bytes, connect: Connect, rng: random.Random
) -> None:
    model = bytearray(image)
    for n in range(2):
        write(disk, model, n * 4 * MIB, rng.randbytes(3 * MIB), connect)
        command = subprocess.Popen(
            [sys.executable, "-m", "forebay", "commit", "vm", "--config", str(gateway.config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for((gateway.images / "base.raw.forebay").exists, "it does not begin")
        os.kill(gateway.pid, signal.SIGKILL)
        command.wait()
        gateway.kill()
        gateway.start()
        gateway.cli("commit", "vm")
        assert disk.path.read_bytes() == model
        assert disk.reads() == model
    assert disk.status()["overlay"]


def test_an_overlay_that_is_not_served_is_still_listed(
    gateway: GatewayProcess, disk: OneDisk, image: bytes, connect: Connect
) -> None:
    """It holds room in the cache, and what its page says is why, and what to do."""
    write(disk, bytearray(image), MIB, b"a" * 70000, connect)
    gateway.cli("snapshot", "vm", "one")
    gateway.cli("detach", "vm")
    os.truncate(gateway.images / "base.raw", SIZE // 2)
    refused = gateway.cli("attach", "vm", "images:base.raw", "--overlay", check=False)
    assert "was changed while 'vm' was detached" in refused.stderr
    for _ in range(2):
        [told] = listed(gateway, "overlays")
        assert (told["name"], told["attached"], told["served"]) == ("vm", True, False)
        assert (told["snapshots"], told["keep"]) == (1, True)
        assert told["private_bytes"] > 70000
        assert gateway.cli("overlays").stdout.splitlines()[1].endswith(" not served")
        page = gateway.cli("status", "vm").stdout
        assert "state      conflict: images:base.raw was changed while" in page
        assert "snapshots  one" in page
        assert [x["name"] for x in listed(gateway, "snapshots", "vm")] == ["one"]
        gateway.restart()


def test_a_full_cache_loses_nothing_that_is_kept(
    make_gateway: Callable[..., GatewayProcess], connect: Connect
) -> None:
    import nbd

    gateway = make_gateway({"cache": {"size": "16 MiB"}})
    random_image(gateway.images / "base.raw", SIZE, 1)
    gateway.attach("vm", "base.raw", "--overlay", "--keep")
    client = connect(gateway.uri("vm"))
    written = 0
    for written in range(0, SIZE, 65536):
        try:
            client.pwrite(bytes([written >> 16 & 255 or 1]) * 65536, written)
        except nbd.Error as full:
            assert full.errno == "ENOSPC"  # noqa: PT017 (how far it comes is what is asked)
            break
    assert written > 8 * MIB
    client.shutdown()
    wait_for(lambda: not listed(gateway, "status")[0]["clients"], "it does not leave")
    gateway.cli("snapshot", "vm", "full")
    gateway.cli("detach", "vm")
    random_image(gateway.images / "other.raw", SIZE, 2)
    gateway.attach("other", "other.raw")
    other = OneDisk(gateway, "other", gateway.images / "other.raw", b"")
    assert other.reads() == other.path.read_bytes(), "it is read past the full cache"
    gateway.restart(kill=True)
    gateway.attach("vm", "base.raw", "--overlay")
    got = OneDisk(gateway, "vm", gateway.images / "base.raw", b"").reads()
    for offset in range(0, written, 65536):
        want = bytes([offset >> 16 & 255 or 1]) * 65536
        assert got[offset : offset + 65536] == want, offset
    gateway.cli("save", "vm", "images:saved.raw")
    assert (gateway.images / "saved.raw").read_bytes() == got
    gateway.cli("drop", "vm", "full")
    gateway.cli("revert", "vm", "--yes")
    wait_for(lambda: not cache_info(gateway)["private_bytes"], "its room is not free")


def test_a_scratch_disk_is_empty_and_lives_through_a_kill(
    gateway: GatewayProcess, connect: Connect
) -> None:
    gateway.attach("tmp", "scratch:20G")
    uri = gateway.uri("tmp")
    client = connect(uri)
    assert client.get_size() == 20 << 30
    assert client.pread(MIB, 5 << 30) == bytes(MIB)
    client.pwrite(b"s" * MIB, 5 << 30)
    client.shutdown()
    gateway.restart(kill=True)
    client = connect(uri)
    assert client.pread(MIB, 5 << 30) == b"s" * MIB
    assert client.pread(MIB, 7 << 30) == bytes(MIB)
    client.shutdown()
    info = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri).stdout)
    assert sum(x["length"] for x in info if x["data"]) == MIB
    wait_for(lambda: not listed(gateway, "status")[0]["clients"], "it does not leave")
    gateway.cli("detach", "tmp")
    assert listed(gateway, "overlays") == []
    for word in ("scratch:0", "scratch:x", "scratch:", "scratch:-5G", "scratch:5000"):
        refused = gateway.cli("attach", "tmp", word, check=False)
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1
