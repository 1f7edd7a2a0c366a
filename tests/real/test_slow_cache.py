# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A cache device that is slow or hangs, and an index that hangs: the disks that do not need it go on.

Nothing here looks at a clock. A call of the device stands while others are asked, and is let go when they have
answered: where these had to wait for it, they would do so for ever.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import ask_text, cache_info, wait_for
from real.fault_fs import FaultFs
from real.gateway_process import GatewayProcess
from real.processes import MIB
from real.test_failures import Cached

Connect = Callable[..., Any]
MakeGateway = Callable[..., GatewayProcess]

WELL = "cache device .* failed|works again|is damaged|are damaged|write-back failed|index|slow"


@pytest.fixture
def faulty(short_path: Path) -> Iterator[FaultFs]:
    fs = FaultFs(short_path / "fs")
    try:
        yield fs
    finally:
        fs.remove()


@pytest.fixture
def make(
    make_gateway: MakeGateway, faulty: FaultFs, connect: Connect
) -> Iterator[Callable[..., Cached]]:
    """`make(timeout)`: a daemon whose cache device is on the faulty file system; or whose index is (`index=True`)."""
    gateways: list[GatewayProcess] = []

    def made(timeout: str, *, index: bool = False) -> Cached:
        settings: dict[str, Any] = {
            "cache": {
                "device": str((faulty.backing if index else faulty.path) / "cache.img"),
                "size": "32 MiB",
                "timeout": timeout,
            },
            "defaults": {"max_lag": "1h", "origin_timeout": "20s"},
        }
        if index:
            settings["gateway"] = {"state": str(faulty.path / "state")}
        gateway = make_gateway(settings)
        gateways.append(gateway)
        gateway.allow_log(WELL)
        return Cached(gateway, faulty, connect)

    yield made
    for gateway in gateways:
        with contextlib.suppress(OSError):
            faulty.lift()
        gateway.kill()


def hangs(it: Cached, call: str, name: str, begin: Callable[[], None]) -> None:
    """Have a call hang, and return when it does; `begin` leads to it."""
    it.fs.fail(call, name=name, hang=True)
    before = it.fs.counts()[call]
    begin()
    wait_for(lambda: it.fs.counts()[call] > before, f"nobody calls {call}")


def others_go_on(it: Cached) -> None:
    """Hits, a disk that is not cached, `status` and the metrics."""
    for mode in ("write-through", "none"):
        assert it.clients[mode].pread(65536, MIB) == it.models[mode][MIB:][:65536]
    assert "write-through" in it.gateway.cli("status").stdout
    assert "forebay_cache_ok" in ask_text(it.gateway, "/metrics")


def test_other_disks_go_on_while_a_write_of_the_cache_device_stands(
    make: Callable[..., Cached],
) -> None:
    """And it is made when the device goes on; nothing has failed."""
    it = make("10m")
    it.attach("write-back", "write-through", "none")
    data = os.urandom(65536)
    import nbd

    buffer = nbd.Buffer.from_bytearray(bytearray(data))
    cookies: list[int] = []
    client = it.clients["write-back"]
    hangs(it, "write", "cache.img", lambda: cookies.append(client.aio_pwrite(buffer, 0)))
    for _ in range(3):
        others_go_on(it)
    assert not client.aio_command_completed(cookies[0])
    assert cache_info(it.gateway)["state"] == "ok"
    assert cache_info(it.gateway)["slow"]
    it.fs.lift()
    while not client.aio_command_completed(cookies[0]):
        client.poll(-1)
    it.models["write-back"][:65536] = data
    client.flush()
    it.reads_all()
    it.gateway.restart(kill=True)
    for mode in it.clients:
        it.clients[mode] = it.connect(it.gateway.uri(mode))
    it.reads_all()


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_cache_device_that_hangs_counts_as_failed(make: Callable[..., Cached], call: str) -> None:
    """What only it has goes to the image, writes go past it, and it is taken back when it answers again."""
    it = make("3s")
    it.attach("write-back", "write-through", "none")
    it.write("write-back", 0, os.urandom(100_000))
    it.fs.fail(call, name="cache.img", hang=True)
    it.write("write-back", MIB, os.urandom(8192))
    it.clients["write-back"].flush()
    assert it.image("write-back").read_bytes() == it.models["write-back"]
    others_go_on(it)
    status = it.status("write-back")
    assert status["state"] == "pass-through"
    assert "no answer for 3 second" in status["reason"]
    info = cache_info(it.gateway)
    assert info["state"] == "failed"
    done = it.gateway.cli("cache", "repair", check=False)
    assert done.returncode == 1
    assert "it has not answered yet" in done.stderr
    it.write("write-back", 2 * MIB, os.urandom(8192))
    it.reads_all()
    it.fs.lift()
    it.comes_back()


def test_a_read_that_hangs_is_answered_by_the_image(make: Callable[..., Cached]) -> None:
    it = make("3s")
    it.attach("write-through", "none")
    wait_for(lambda: it.is_cached("write-through"), "it is not kept")
    it.gateway.restart()
    it.fs.forget()
    for mode in it.clients:
        it.clients[mode] = it.connect(it.gateway.uri(mode))
    it.fs.fail("read", name="cache.img", hang=True)
    it.reads_all()
    assert cache_info(it.gateway)["state"] == "failed"
    others_go_on(it)
    it.fs.lift()
    it.comes_back()


def test_an_index_that_hangs_stops_only_who_needs_a_commit(make: Callable[..., Cached]) -> None:
    """Writes and flushes go on, and so do all others; what needs a commit is refused; later all of it is there."""
    it = make("3s", index=True)
    it.attach("write-back", "write-through", "none")
    it.fs.fail("fsync", name="data.mdb", hang=True)
    it.write("write-back", 0, os.urandom(65536))
    it.clients["write-back"].flush()
    wait_for(lambda: cache_info(it.gateway)["state"] == "unrecorded", "nothing said")
    assert "no answer" in cache_info(it.gateway)["error"]
    it.write("write-back", MIB, os.urandom(65536))
    it.clients["write-back"].flush()
    others_go_on(it)
    done = it.gateway.cli("mode", "none", "write-around", check=False)
    assert done.returncode == 1
    assert "no answer" in done.stderr
    it.fs.lift()
    wait_for(lambda: cache_info(it.gateway)["state"] == "ok", "it is not tried again")
    it.comes_back()
