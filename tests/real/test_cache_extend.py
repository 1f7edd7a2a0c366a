# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay cache extend`: under a client that reads and writes, and killed at every step."""

import contextlib
import json
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import cache_info
from real.gateway_process import GatewayProcess
from real.processes import MIB, loop_device, random_image

MakeGateway = Callable[..., GatewayProcess]
Connect = Callable[..., Any]

SMALL, LARGE = 8 * MIB, 40 * MIB
IMAGE = 24 * MIB
"""Does not fit into the small cache, and fits into the large one."""


class Guest(threading.Thread):
    """Writes and reads at random until told to end; whatever it reads must be what it wrote."""

    def __init__(self, client: Any, model: bytearray, seed: int) -> None:
        super().__init__()
        self.client, self.model, self.rng = client, model, random.Random(seed)
        self.over = threading.Event()
        self.steps = 0
        self.faults: list[BaseException] = []

    def run(self) -> None:
        try:
            while not self.over.is_set():
                self.step()
        except BaseException as fault:  # noqa: BLE001  (told by ended())
            self.faults.append(fault)

    def step(self) -> None:
        rng, size = self.rng, len(self.model)
        data = rng.randbytes(rng.choice([4096, 65536, 300_000]))
        at = rng.randrange(size - len(data))
        self.client.pwrite(data, at)
        self.model[at : at + len(data)] = data
        length = rng.choice([4096, 1_000_000])
        at = rng.randrange(size - length)
        assert self.client.pread(length, at) == self.model[at : at + length], at
        if rng.random() < 0.1:
            self.client.flush()
        self.steps += 1

    def ended(self) -> int:
        self.over.set()
        self.join(60)
        assert not self.is_alive(), "the client hangs"
        assert not self.faults, self.faults
        return self.steps

    def wait_steps(self, more: int) -> None:
        target = self.steps + more
        while self.steps < target and self.is_alive():
            self.join(0.01)


def whole(client: Any, size: int = IMAGE) -> bytes:
    return b"".join(client.pread(min(MIB, size - at), at) for at in range(0, size, MIB))


@contextlib.contextmanager
def cache_on(
    kind: str, directory: Path
) -> Iterator[tuple[dict[str, Any], Callable[[int], list[str]]]]:
    """Settings for a small cache, and a function that makes its device larger: what to tell `extend` then."""
    if kind == "file":
        yield {"size": f"{SMALL}"}, lambda size: ["--size", str(size)]
        return
    backing = directory / "backing"
    with backing.open("wb") as file:
        file.truncate(SMALL)
    with loop_device(backing, 512) as device:

        def enlarge(size: int) -> list[str]:
            with backing.open("r+b") as file:
                file.truncate(size)
            subprocess.run(["losetup", "--set-capacity", str(device)], check=True)
            return []

        yield {"device": str(device)}, enlarge


@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_cache_grows_under_a_client(
    kind: str, make_gateway: MakeGateway, connect: Connect, tmp_path: Path
) -> None:
    with cache_on(kind, tmp_path) as (settings, enlarge):
        gateway = make_gateway({"cache": settings})
        model = bytearray(random_image(gateway.images / "a.raw", IMAGE, 1))
        gateway.attach("d", "a.raw", mode="write-back")
        assert cache_info(gateway)["size"] == SMALL
        guest = Guest(connect(gateway.uri("d")), model, 1)
        guest.start()
        guest.wait_steps(20)
        for size in (SMALL + 3 * MIB + 4096, LARGE):
            done = gateway.cli("cache", "extend", "--json", *enlarge(size))
            assert json.loads(done.stdout)["size"] == size
            guest.wait_steps(20)
        assert guest.ended() >= 60
        client = connect(gateway.uri("d"))
        gateway.cli("flush", "d")
        assert whole(client) == model
        info = cache_info(gateway)
        assert info["slots"] > 500
        _read_from_the_cache_alone(gateway, client, model)
        # commits: else what was filled in the last seconds is fetched again
        gateway.cli("mode", "d", "write-back")
        gateway.restart(kill=True)
        client = connect(gateway.uri("d"))
        _read_from_the_cache_alone(gateway, client, model)
        assert cache_info(gateway)["slots"] == info["slots"]
        client.shutdown()
        gateway.cli("detach", "d")
        assert (gateway.images / "a.raw").read_bytes() == model
        assert gateway.stop() == 0


def _read_from_the_cache_alone(gateway: GatewayProcess, client: Any, model: bytearray) -> None:
    """The whole image is larger than the cache was: it is in the new slots too, and they are right."""
    before = gateway.status("d")["origin_read_bytes"]
    assert whole(client) == model
    assert gateway.status("d")["origin_read_bytes"] == before


def test_while_the_daemon_is_stopped(make_gateway: MakeGateway, connect: Connect) -> None:
    gateway = make_gateway({"cache": {"size": f"{SMALL}"}})
    model = bytearray(random_image(gateway.images / "a.raw", IMAGE, 1))
    gateway.attach("d", "a.raw", mode="write-back")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * MIB, 5 * MIB)
    model[5 * MIB : 6 * MIB] = b"x" * MIB
    gateway.kill()
    done = gateway.cli("cache", "extend", "--size", str(LARGE))
    assert done.stdout == f"{gateway.state / 'cache.img'}: 40M\n"
    gateway.start()
    client = connect(gateway.uri("d"))
    assert whole(client) == model
    _read_from_the_cache_alone(gateway, client, model)
    gateway.kill()


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", str(SMALL - MIB)], "a cache only grows"),
        (["--size", str(SMALL)], "takes all of its"),
        ([], "takes all of its"),
        (["--size", "FREE"], "no space left: make room there, or say less"),
    ],
)
def test_a_wrong_size_is_one_line_and_changes_nothing(
    words: list[str], said: str, running: bool, make_gateway: MakeGateway
) -> None:
    gateway = make_gateway({"cache": {"size": f"{SMALL}"}})
    if not running:
        gateway.stop()
    before = (gateway.state / "cache.img").read_bytes()
    room = shutil.disk_usage(gateway.state).free
    if words[-1:] == ["FREE"] and room > 1 << 40:
        pytest.skip("more than 1 TiB is free: so much is not reserved at once")
    words = [str(room + (2 << 30)) if word == "FREE" else word for word in words]
    done = gateway.cli("cache", "extend", *words, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert done.stdout == ""
    after = (gateway.state / "cache.img").read_bytes()
    assert len(after) == len(before)
    assert after[:8192] == before[:8192]


def test_a_block_device_is_not_ours_to_make_larger(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    with cache_on("device", tmp_path) as (settings, _):
        gateway = make_gateway({"cache": settings})
        done = gateway.cli("cache", "extend", "--size", "1G", check=False)
        assert done.returncode == 1
        assert re.search(r"not ours to make larger: do so, then run .*\n$", done.stderr)
        gateway.kill()


# ------------------------------------------------------------------------------------------- kills

KILLER = """
import os, signal, sys
import forebay_cache.device.extend, forebay_cache.device.superblock, forebay_cache.upkeep.growth
from forebay_cache.cache import Cache

target, when, trail = sys.argv[1:4]
seen = 0

def point(name, work):
    def call(*words, **more):
        global seen
        seen += 1
        with open(trail, "a") as file:
            file.write(name + "\\n")
        if (str(seen), "before") == (target, when):
            os.kill(os.getpid(), signal.SIGKILL)
        result = work(*words, **more)
        if (str(seen), "after") == (target, when):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

class System:
    def __getattr__(self, name):
        found = getattr(os, name)
        named = ("posix_fallocate", "fsync", "pwrite", "fdatasync")
        return point(name, found) if name in named else found

whole = forebay_cache.upkeep.growth.grow

def grow(*words):
    modules = forebay_cache.device.extend, forebay_cache.device.superblock
    for module in modules:
        module.os = System()
    try:
        return whole(*words)
    finally:
        for module in modules:
            module.os = os

forebay_cache.upkeep.growth.grow = grow
Cache.grow = point("grow", Cache.grow)
sys.argv[1:] = sys.argv[6:]
from forebay.cli.main import main
sys.exit(main())
"""
"""Runs `forebay serve`, and kills it before or after the n-th step of extending the cache."""

STEPS = ["posix_fallocate", "fsync", "pwrite", "fdatasync", "pwrite", "fdatasync", "grow"]
"""Space for the file, made durable; the copy of the superblock, and the superblock; then in memory."""

KILLS = [*((n, "before") for n in range(1, len(STEPS) + 1)), (len(STEPS), "after")]


def test_a_kill_at_any_step_leaves_a_cache_that_works(
    make_gateway: MakeGateway, connect: Connect, tmp_path: Path
) -> None:
    """One cache goes through all of them: each time it comes back, with all that was acknowledged, and grows."""
    gateway = make_gateway({"cache": {"size": f"{SMALL}"}}, start=False)
    model = bytearray(random_image(gateway.images / "a.raw", IMAGE, 1))
    rng = random.Random(2)
    size, outcomes = SMALL, set()
    for step, when in KILLS:
        trail = tmp_path / f"{step}{when}"
        # `-c` takes the words behind it, and `-m forebay serve` after these, as its own
        gateway.start(under=("-c", KILLER, str(step), when, str(trail)))
        if size == SMALL:
            gateway.attach("d", "a.raw", mode="write-back")
        client = connect(gateway.uri("d"))
        for _ in range(10):
            at, data = rng.randrange(IMAGE - 70_000), rng.randbytes(rng.choice([4096, 70_000]))
            client.pwrite(data, at)
            model[at : at + len(data)] = data
        size += 2 * MIB
        done = gateway.cli("cache", "extend", "--size", str(size), check=False)
        assert done.returncode == 1, "it was not killed"
        assert "went away in the middle" in done.stderr
        assert gateway.process is not None
        assert gateway.process.wait(10) == -9
        assert trail.read_text().split() == STEPS[:step]
        gateway.start()
        client = connect(gateway.uri("d"))
        assert whole(client) == model, (step, when)
        grown = cache_info(gateway)["size"] == size
        outcomes.add(grown)
        if not grown:
            gateway.cli("cache", "extend", "--size", str(size))
        assert whole(client) == model, (step, when)
        assert cache_info(gateway)["size"] == size
        client.shutdown()
        assert gateway.stop() == 0
    assert outcomes == {True, False}
