# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Rates of disks on the real daemon: what they let through, while they change, and what goes on while requests wait."""

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import ask, ask_text, wait_for
from real.fault_fs import FaultFs
from real.fuse_mount import FuseMount, need_fuse
from real.gateway_process import GatewayProcess
from real.processes import MIB, random_image

Connect = Callable[[str], Any]
SIZE = 16 * MIB


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    found = GatewayProcess({"stores.images": {"mode": "write-back", "iops_burst": 10}})
    try:
        for name in ("a.raw", "b.raw"):
            random_image(found.images / name, SIZE, 1)
        found.start()
        found.allow_log("dirty bytes are dropped as asked")
        yield found
        assert not found.unexpected_log()
    finally:
        found.remove()


@pytest.fixture
def disks(gateway: GatewayProcess) -> Iterator[None]:
    """vm1, which waits for its rates, and vm2, which has none."""
    gateway.cli("attach", "vm1", "images:a.raw")
    gateway.cli("attach", "vm2", "images:b.raw")
    yield
    for one in ask(gateway, "/disks"):
        gateway.cli("detach", one["name"], "--force", "--discard")


@pytest.fixture
def client() -> Iterator[Connect]:
    """Connects, and hangs up at the end: a client that says that it disconnects is answered all before that first."""
    pytest.importorskip(
        "libnbdmod", reason="python3-libnbd is not installed: `make setup` installs it"
    )
    import nbd

    made: list[nbd.NBD] = []

    def connect(uri: str) -> Any:
        made.append(nbd.NBD())
        made[-1].connect_uri(uri)
        return made[-1]

    yield connect
    for handle in made:
        with socket.socket(fileno=os.dup(handle.aio_get_fd())) as sock:
            sock.shutdown(socket.SHUT_RDWR)


def told_of(gateway: GatewayProcess, name: str) -> dict[str, Any]:
    """The disk's status."""
    found = ask(gateway, f"/disks/{name}")
    assert isinstance(found, dict)
    return found


class Asking:
    """A client with requests under way. It reads places that lie so far `apart`, without end."""

    def __init__(self, handle: Any, depth: int, apart: int = 4096) -> None:
        import nbd

        self.handle, self.done = handle, 0
        self._apart, self._asked = apart, 0
        self._most = 256 if apart == 4096 else 1 << 19
        self._again: list[int] = []
        self._buffers = [nbd.Buffer(4096) for _ in range(depth)]
        for n in range(depth):
            self._ask(n)

    def _ask(self, n: int) -> None:
        def completed(error: Any) -> int:
            if not error.value:  # else the test has ended the daemon, or the disk
                self.done += 1
                self._again.append(n)
            return 1

        self._asked += 1
        self.handle.aio_pread(self._buffers[n], self._asked % self._most * self._apart, completed)

    def run(self, seconds: float, most: int = 1 << 30) -> int:
        """Ask for so many seconds: how many requests were answered."""
        until, before = time.monotonic() + seconds, self.done
        while (left := until - time.monotonic()) > 0 and self.done - before < most:
            self.handle.poll(max(1, int(left * 1000)))
            again, self._again = self._again, []
            for n in again:
                self._ask(n)
        return self.done - before


def waits(gateway: GatewayProcess, name: str = "vm1") -> int:
    return int(told_of(gateway, name)["throttled_waits"])


def in_debt(gateway: GatewayProcess, handle: Any) -> Asking:
    """A client whose requests wait, for a minute and longer."""
    gateway.cli("set", "vm1", "bps=64K")
    handle.pwrite(bytes(4 * MIB), 0)
    before = waits(gateway)
    asking = Asking(handle, 4)
    asking.run(0.05)
    wait_for(lambda: waits(gateway) > before, "a request waits")
    assert not asking.done
    return asking


@pytest.mark.parametrize("connections", [1, 2])
def test_500_requests_a_second_are_400_to_600(
    gateway: GatewayProcess, disks: None, client: Connect, connections: int
) -> None:
    gateway.cli("set", "vm1", "iops=500")
    clients = [Asking(client(gateway.uri("vm1")), 16) for _ in range(connections)]
    began, done = time.monotonic(), 0
    while time.monotonic() - began < 3:
        done += sum(one.run(0.02) for one in clients)
    assert 400 * 3 <= done <= 600 * (time.monotonic() - began)
    told = told_of(gateway, "vm1")
    assert told["iops"] == 500
    assert told["throttled_waits"] > 10
    assert 1 < told["throttled_seconds"] < 60
    assert told["reads"] >= done
    other = told_of(gateway, "vm2")
    assert (other["iops"], other["throttled_waits"], other["throttled_seconds"]) == (0, 0, 0)
    page = gateway.cli("status", "vm1").stdout
    assert re.search(
        r"^rates +500 requests a second; clients waited for .*s, \d+ times$", page, re.MULTILINE
    )
    metrics = ask_text(gateway, "/metrics")
    assert 'forebay_iops_limit{disk="vm1"} 500' in metrics
    assert float(re.findall(r'throttled_seconds_total{disk="vm1"} (\S+)', metrics)[0]) > 1


def test_rates_are_set_raised_kept_and_given_back(
    gateway: GatewayProcess, disks: None, client: Connect
) -> None:
    handle = client(gateway.uri("vm1"))
    asking = in_debt(gateway, handle)
    gateway.cli("set", "vm1", "bps=1G")
    assert asking.run(20, 100) >= 100
    gateway.cli("set", "vm1", "bps=", "iops=50", "iops_burst=20")
    gateway.restart(kill=True)
    told = told_of(gateway, "vm1")
    assert (told["iops"], told["bps"], told["iops_burst"]) == (50, 0, 20)
    done = Asking(client(gateway.uri("vm1")), 8).run(1)
    assert 20 <= done <= 200
    gateway.cli("set", "vm1", "iops=", "iops_burst=")
    told = told_of(gateway, "vm1")
    assert (told["iops"], told["iops_burst"]) == (0, 10), "of its store"
    wrong = gateway.cli("attach", "vm3", "images:b.raw", "--iops", "lots", check=False)
    assert (wrong.returncode, len(wrong.stderr.splitlines()[-1]) < 200) == (2, True)
    gateway.cli("detach", "vm2")
    rates = ["--iops", "7", "--bps", "1M", "--weight", "300"]
    gateway.cli("attach", "vm2", "images:b.raw", *rates)
    assert (told_of(gateway, "vm2")["iops"], told_of(gateway, "vm2")["weight"]) == (7, 300)
    assert " iops='7' bps='1 MiB' weight='300'" in gateway.cli("xml", "vm2", "--metadata").stdout


def test_flush_mode_and_detach_go_on_while_requests_wait(
    gateway: GatewayProcess, disks: None, client: Connect
) -> None:
    handle = client(gateway.uri("vm1"))
    in_debt(gateway, handle)
    handle.flush()  # behind them on the same connection
    second = client(gateway.uri("vm1"))
    second.flush()
    gateway.cli("flush", "vm1")
    for mode in ("write-through", "none", "write-back"):
        gateway.cli("mode", "vm1", mode)
    handle.flush()
    gateway.cli("detach", "vm1", "--force")
    assert [one["name"] for one in ask(gateway, "/disks")] == ["vm2"]


def test_one_that_floods_its_disk_does_not_hold_up_others(
    gateway: GatewayProcess, disks: None, client: Connect
) -> None:
    gateway.cli("set", "vm1", "iops=100")
    began = time.monotonic()
    hostile = [Asking(client(gateway.uri("vm1")), 1500) for _ in range(4)]
    done = 0
    good = Asking(client(gateway.uri("vm2")), 1)
    while done < 2000:
        done += good.run(5, 100)
        for one in hostile:
            one.run(0.001)
    assert sum(one.done for one in hostile) <= 10 + 20 + 120 * (time.monotonic() - began)
    assert told_of(gateway, "vm2")["throttled_waits"] == 0
    assert ask(gateway, "/gateway")["client_memory_bytes"] < MIB


def test_where_requests_wait_for_the_store_disks_have_them_carried_out_by_weight(
    short_path: Path, client: Connect
) -> None:
    with contextlib.ExitStack() as stack:
        stack.callback((store := FaultFs(short_path / "fs")).remove)
        gateway = GatewayProcess({"stores.images": {"path": str(store.path), "mode": "none"}})
        stack.callback(gateway.remove)
        gateway.start()
        for name in ("vm1", "vm2"):
            with (store.backing / f"{name}.raw").open("wb") as image:
                image.truncate(1 << 40)
            gateway.cli("attach", name, f"images:{name}.raw", "--weight", "100")
        store.fail("read", delay=0.01)  # so that 32 calls at a time are 3,200 a second
        # each place once: what was read the kernel has in memory
        floods = [Asking(client(gateway.uri(n)), 64, 1 << 20) for n in ("vm1", "vm2")]

        def both(seconds: float) -> list[int]:
            before, until = [one.done for one in floods], time.monotonic() + seconds
            while time.monotonic() < until:
                for one in floods:
                    one.run(0.002)
            return [one.done - was for one, was in zip(floods, before, strict=True)]

        equal = both(0.7)
        assert 0.5 < equal[0] / equal[1] < 2
        gateway.cli("set", "vm1", "weight=50")
        gateway.cli("set", "vm2", "weight=500")
        both(0.2)
        light, heavy = both(1.2)
        assert 5 < heavy / light < 20
        assert floods[0].run(1.2) > 2 * light, "alone it has everything"
        assert [told_of(gateway, name)["weight"] for name in ("vm1", "vm2")] == [50, 500]
        assert 'forebay_weight{disk="vm2"} 500' in ask_text(gateway, "/metrics")
        wrong = gateway.cli("set", "vm1", "weight=0", check=False)
        assert (wrong.returncode, "from 1 to 10000" in wrong.stderr) == (2, True)
        gateway.cli("set", "vm1", "weight=")
        assert told_of(gateway, "vm1")["weight"] == 100
        gateway.kill()


def test_files_of_the_mount_count_for_the_disk(gateway: GatewayProcess, disks: None) -> None:
    need_fuse()
    with contextlib.ExitStack() as stack:
        mount = FuseMount(gateway)
        stack.callback(mount.remove)
        gateway.cli("set", "vm1", "bps=2M")
        subprocess.run(
            ["dd", f"if={mount.disk('vm1')}", "of=/dev/null", "bs=256K", "count=12", "status=none"],
            check=True,
            timeout=60,
        )
        assert waits(gateway) > 0
