# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A committed journal beside an image: whatever the operator does next, no image is left torn or overwritten."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB

Connect = Callable[..., Any]
Make = Callable[..., GatewayProcess]

SETTINGS = {"cache": {"size": "1 GiB"}, "defaults": {"max_lag": "1h"}}
"""No pass begins by itself."""

SIZE = 96 * MIB
"""Of the checkpoints: a pass over it takes some tenths of a second."""


def dirty(gateway: GatewayProcess, connect: Connect) -> Path:
    """An image of zeros and a disk on it, all of whose bytes are dirty; the directory beside the image."""
    with open(gateway.images / "a.raw", "wb") as file:
        file.truncate(SIZE)
    gateway.attach("vm", "a.raw", mode="write-back")
    client = connect(gateway.uri("vm"))
    for at in range(0, SIZE, MIB):
        client.pwrite(bytes([1 + at // MIB]) * MIB, at)
    client.flush()
    client.shutdown()
    return gateway.images / "a.raw.forebay"


def flushing(gateway: GatewayProcess) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "forebay", "flush", "vm", "--config", str(gateway.config)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def begin_pass(gateway: GatewayProcess, side: Path) -> "subprocess.Popen[bytes]":
    """`forebay flush` in the background, as soon as its journal is committed."""
    flush = flushing(gateway)
    while not (side / "redo").exists():
        assert flush.poll() is None, "the pass was over before it was seen"
        time.sleep(0.001)
    return flush


def holds(path: Path) -> str:
    """What the image holds: `new` and `old` for all of it, or a mixture."""
    data = path.read_bytes()
    found = {
        "new" if data[at : at + MIB] == bytes([1 + at // MIB]) * MIB
        else "old" if not any(data[at : at + MIB]) else "torn"
        for at in range(0, SIZE, MIB)
    }  # fmt: skip
    return " and ".join(sorted(found))


@pytest.mark.parametrize("when", ["before the commit", "after the commit"])
def test_dirty_data_that_is_given_up_in_the_middle_of_a_pass(
    make_gateway: Make, connect: Connect, when: str
) -> None:
    gateway = make_gateway(SETTINGS)
    gateway.allow_log("dropped as asked|given up|its cached blocks are dropped")
    side = dirty(gateway, connect)
    if when == "before the commit":
        flush = flushing(gateway)
        while not list(side.glob("*/redo.new")):
            time.sleep(0.001)
    else:
        flush = begin_pass(gateway, side)
    gateway.cli("detach", "vm", "--discard", "--force")
    assert holds(gateway.images / "a.raw") in ("new", "old"), "of one instant"
    if when == "after the commit":
        assert holds(gateway.images / "a.raw") == "new"
    assert [x.name for x in gateway.images.iterdir()] == ["a.raw"]
    flush.wait(60)
    (gateway.images / "a.raw").write_bytes(b"w" * SIZE)  # by a VM without Forebay
    assert "nothing to recover" in gateway.cli("recover", "images:a.raw").stdout
    gateway.attach("vm", "a.raw", mode="write-back")
    assert connect(gateway.uri("vm")).pread(MIB, 0) == b"w" * MIB


def killed_in_a_pass(gateway: GatewayProcess, connect: Connect) -> Path:
    side = dirty(gateway, connect)
    flush = begin_pass(gateway, side)
    gateway.kill()
    flush.wait(60)
    assert (side / "redo").exists()
    return side


def test_a_kill_in_the_middle_of_a_pass_is_finished_at_the_next_start(
    make_gateway: Make, connect: Connect
) -> None:
    gateway = make_gateway(SETTINGS)
    killed_in_a_pass(gateway, connect)
    gateway.start()
    assert holds(gateway.images / "a.raw") == "new"
    assert gateway.status("vm")["state"] == "ready"


def test_a_backup_that_is_restored_in_place_is_not_overwritten(
    make_gateway: Make, connect: Connect
) -> None:
    gateway = make_gateway(SETTINGS)
    gateway.allow_log("was changed by somebody else after the checkpoint|dropped as asked|flush")
    side = killed_in_a_pass(gateway, connect)
    image = gateway.images / "a.raw"
    time.sleep(1)
    with open(image, "r+b") as file:
        file.write(b"B" * SIZE)
    refused = gateway.cli("recover", "images:a.raw", check=False)
    assert refused.returncode == 1
    assert "changed by somebody else after" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    gateway.start()
    status = gateway.status("vm")
    assert status["state"] == "conflict"
    assert status["dirty_bytes"] == SIZE
    assert gateway.cli("flush", "vm", check=False).returncode == 1
    gateway.cli("detach", "vm", "--discard", "--force")
    assert image.read_bytes() == b"B" * SIZE
    assert not side.exists(), "no journal without an owner"
    gateway.attach("vm", "a.raw", mode="write-back")
    assert connect(gateway.uri("vm")).pread(MIB, 0) == b"B" * MIB


def test_a_store_that_was_copied_is_recovered_when_the_operator_says_so(
    make_gateway: Make, connect: Connect
) -> None:
    gateway = make_gateway(SETTINGS)
    killed_in_a_pass(gateway, connect)
    there = gateway.directory / "there"
    shutil.copytree(gateway.images, there)
    assert gateway.cli("recover", there / "a.raw", check=False).returncode == 1
    assert "was finished" in gateway.cli("recover", there / "a.raw", "--yes").stdout
    assert holds(there / "a.raw") == "new"


def is_ready(gateway: GatewayProcess, name: str) -> bool:
    return bool(gateway.status(name)["state"] == "ready")


def test_metadata_alone_is_no_change_of_an_image(make_gateway: Make, connect: Connect) -> None:
    """chmod, chown, a second name, away and back: libvirt does that by itself."""
    gateway = make_gateway(SETTINGS)
    data = os.urandom(4 * MIB)
    clients = {}
    for name, options in (("golden", ["--overlay"]), ("vm", []), ("cached", ["--read-only"])):
        (gateway.images / f"{name}.raw").write_bytes(data)
        gateway.attach(name, f"{name}.raw", *options, mode=None if options else "write-back")
        clients[name] = connect(gateway.uri(name))
        assert clients[name].pread(MIB, MIB) == data[MIB : 2 * MIB]
        if name != "cached":
            clients[name].pwrite(b"w" * MIB, 0)
            clients[name].flush()
    time.sleep(1)
    for name in clients:
        path = gateway.images / f"{name}.raw"
        path.chmod(0o664)
        os.link(path, path.with_suffix(".other"))
        path.with_suffix(".other").unlink()
        path.rename(path.with_suffix(".away"))
        path.with_suffix(".away").rename(path)
    read = gateway.status("cached")["origin_read_bytes"]
    time.sleep(7)  # two looks of the watch
    for again in (False, True):
        if again:
            (gateway.images / "vm.raw").chmod(0o660)
            gateway.restart()
            clients = {name: connect(gateway.uri(name)) for name in clients}
        for name, client in clients.items():
            wait_for(partial(is_ready, gateway, name), f"{name} is not ready", 20)
            expected = data[:MIB] if name == "cached" else b"w" * MIB
            assert client.pread(MIB, MIB) == data[MIB : 2 * MIB]
            if name != "cached":
                assert client.pread(MIB, 0) == expected
        assert gateway.status("cached")["origin_read_bytes"] == (0 if again else read), "warm"
    gateway.cli("flush", "vm")
    assert (gateway.images / "vm.raw").read_bytes() == b"w" * MIB + data[MIB:]
