# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A VM on an overlay moves from one daemon to another, with what the overlay has: by commands, and clients of NBD."""

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from real.gateway_process import GatewayProcess
from real.processes import MIB

SIZE = 8 * MIB
BLOCK = 4096


@pytest.fixture
def hosts(
    make_gateway: Callable[..., GatewayProcess], rng: random.Random
) -> tuple[GatewayProcess, GatewayProcess]:
    """Two daemons on one store, with a base image in it."""
    cache = {"size": "128 MiB"}
    one = make_gateway({"cache": cache})
    (one.images / "base.raw").write_bytes(rng.randbytes(SIZE))
    return one, make_gateway({"cache": cache, "stores.images": {"path": str(one.images)}})


class Writer:
    """Writes blocks at random, and knows which of them was acknowledged."""

    def __init__(self, vm: Any, rng: random.Random) -> None:
        self.vm = vm
        self.known: dict[int, bytes] = {}
        self._rng = rng
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def write(self, count: int) -> None:
        for _ in range(count):
            at, data = self._rng.randrange(SIZE // BLOCK) * BLOCK, self._rng.randbytes(BLOCK)
            self.vm.pwrite(data, at)
            self.known[at] = data

    def _run(self) -> None:
        while not self._stop.is_set():
            self.write(1)

    def begin(self) -> None:
        self._thread.start()

    def pause(self) -> None:
        """As QEMU does when it pauses."""
        self._stop.set()
        self._thread.join()
        self.vm.flush()
        self.vm.shutdown()


def move(here: GatewayProcess, there: GatewayProcess) -> None:
    """The two commands, which wait for each other."""
    failed: list[BaseException] = []

    def prepare() -> None:
        try:
            here.cli("handover", "prepare", "d", "--with-data")
        except BaseException as fault:  # noqa: BLE001
            failed.append(fault)

    thread = threading.Thread(target=prepare)
    thread.start()
    there.cli("attach", "d", "images:base.raw", "--overlay", "--incoming", "--with-data")
    thread.join()
    assert not failed, failed


def check(vm: Any, known: dict[int, bytes], base: bytes, rng: random.Random) -> None:
    for at, data in known.items():
        assert vm.pread(BLOCK, at) == data, at
    for at in (rng.randrange(SIZE // BLOCK) * BLOCK for _ in range(200)):
        assert vm.pread(BLOCK, at) == known.get(at, base[at : at + BLOCK]), at


def test_an_overlay_moves_with_what_it_has_while_its_vm_writes(
    hosts: tuple[GatewayProcess, GatewayProcess], connect: Callable[..., Any], rng: random.Random
) -> None:
    here, there = hosts
    base = (here.images / "base.raw").read_bytes()
    here.cli("attach", "d", "images:base.raw", "--overlay")
    writer = Writer(connect(here.uri("d")), rng)
    writer.write(300)
    writer.vm.trim(MIB, 2 * MIB)
    writer.known = {x: y for x, y in writer.known.items() if not 2 * MIB <= x < 3 * MIB}
    writer.known |= {x: bytes(BLOCK) for x in range(2 * MIB, 3 * MIB, BLOCK)}
    writer.begin()
    move(here, there)
    assert here.status("d")["handover"] == "prepared"
    probe = connect(there.uri("d"))  # what QEMU does before the VM comes
    probe.pread(512, 0)
    assert there.status("d")["state"] == "incoming"
    assert here.cli("snapshot", "d", "s", check=False).returncode == 1
    writer.pause()
    check(probe, writer.known, base, rng)
    assert there.status("d")["state"] == "incoming", "reads do not take it"
    at, data = 5 * BLOCK, rng.randbytes(BLOCK)
    probe.pwrite(data, at)
    assert there.status("d")["state"] == "ready"
    check(probe, writer.known | {at: data}, base, rng)
    assert here.status("d")["state"] == "handed-over"
    here.cli("detach", "d")
    there.kill()
    there.start()
    again = connect(there.uri("d"))
    check(again, writer.known | {at: data}, base, rng)
    again.shutdown()
    there.cli("detach", "d")
    assert not (here.images / "base.raw.forebay").exists()


def test_an_overlay_whose_host_detached_it_is_taken_from_beside_its_image(
    hosts: tuple[GatewayProcess, GatewayProcess], connect: Callable[..., Any], rng: random.Random
) -> None:
    here, there = hosts
    base = (here.images / "base.raw").read_bytes()
    here.cli("attach", "d", "images:base.raw", "--overlay")
    writer = Writer(connect(here.uri("d")), rng)
    writer.write(100)
    move(here, there)
    writer.vm.shutdown()
    here.cli("detach", "d")  # at once, as a hook does: the VM has not written there
    assert here.cli("status", "d", check=False).returncode == 1
    there.cli("detach", "d")
    (left,) = (here.images / "base.raw.forebay").glob("*.data")
    assert left.stat().st_size >= 100 * BLOCK
    here.cli("attach", "d", "images:base.raw", "--overlay", "--incoming", "--with-data")
    here.cli("handover", "finish", "d")
    vm = connect(here.uri("d"))
    check(vm, writer.known, base, rng)
    vm.shutdown()
    here.cli("detach", "d")
    assert not (here.images / "base.raw.forebay").exists()


def test_an_overlay_stays_where_the_other_host_gives_up(
    hosts: tuple[GatewayProcess, GatewayProcess], connect: Callable[..., Any], rng: random.Random
) -> None:
    here, there = hosts
    base = (here.images / "base.raw").read_bytes()
    here.cli("attach", "d", "images:base.raw", "--overlay")
    writer = Writer(connect(here.uri("d")), rng)
    writer.write(100)
    move(here, there)
    writer.vm.shutdown()
    while here.status("d")["handover"] != "released":
        pass
    there.cli("handover", "abort", "d")
    vm = connect(here.uri("d"))
    check(vm, writer.known, base, rng)
    assert here.status("d")["state"] == "ready"
    vm.shutdown()
    here.cli("snapshot", "d", "s")
    here.allow_log("its handover waits: .d. has snapshots")
    refused = there.cli(
        "attach", "d", "images:base.raw", "--overlay", "--incoming", "--wait", "1s", check=False
    )
    assert "add --with-data, and it goes along" in refused.stderr
    with suppress(AssertionError):
        move(here, there)
        raise ValueError("it has a snapshot")
    here.cli("detach", "d")
    assert not Path(here.images / "base.raw.forebay" / "d.asks").exists()
