# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Hosts of a network of their own: namespaces that one bridge connects, each by a link that holds a rate both ways."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from real.processes import need

BURST, WAIT = "256k", "50ms"
"""What a link lets pass at once, and how long a packet waits for it at most."""

_NUMBERS = itertools.count()


def need_links() -> None:
    """Skip the test, with the reason, where there are no such networks."""
    need("ip")
    need("tc")
    if os.geteuid() != 0 or shutil.which("nsenter") is None:
        pytest.skip("namespaces of networks need root, and nsenter of util-linux")


class Links:
    """So many hosts, the first one `addresses[0]`, each with a link of `rate` Mbit/s, up and down."""

    def __init__(self, count: int, rate: float) -> None:
        self.name = f"fb{os.getpid()}-{next(_NUMBERS)}"
        self.addresses = [f"10.77.{1 + n // 250}.{1 + n % 250}" for n in range(count)]
        self._rate = f"{rate:g}mbit"
        self._namespaces: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._hub = self._namespace("hub")
            self._in(self._hub, "ip", "link", "add", "bridge", "type", "bridge")
            self._in(self._hub, "ip", "link", "set", "bridge", "up")
            for n, address in enumerate(self.addresses):
                self._link(n, address)
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _fault: BaseException | None,
        _at: TracebackType | None,
    ) -> None:
        self.remove()

    def _link(self, n: int, address: str) -> None:
        host, port = self._namespace(str(n)), f"port{n}"
        _run(
            "ip",
            "link",
            "add",
            "eth0",
            "netns",
            host,
            "type",
            "veth",
            "peer",
            port,
            "netns",
            self._hub,
        )
        self._in(self._hub, "ip", "link", "set", port, "master", "bridge", "up")
        self._in(host, "ip", "address", "add", f"{address}/16", "dev", "eth0")
        self._in(host, "ip", "link", "set", "eth0", "up")
        self._in(host, "ip", "link", "set", "lo", "up")
        for namespace, device in ((host, "eth0"), (self._hub, port)):
            limit = ["root", "tbf", "rate", self._rate, "burst", BURST, "latency", WAIT]
            self._in(namespace, "tc", "qdisc", "add", "dev", device, *limit)

    def _namespace(self, what: str) -> str:
        name = f"{self.name}-{what}"
        _run("ip", "netns", "add", name)
        self._namespaces.append(name)
        return name

    def _in(self, namespace: str, *command: str) -> None:
        _run(*self._under(namespace), *command)

    @staticmethod
    def _under(namespace: str) -> list[str]:
        # unlike `ip netns exec` this leaves mounts as they are
        return ["nsenter", f"--net=/run/netns/{namespace}"]

    def under(self, address: str) -> Sequence[str]:
        """What a process of that host is started with."""
        return self._under(f"{self.name}-{self.addresses.index(address)}")

    def sent(self, address: str) -> int:
        """Bytes that the host has sent, with all that the network adds."""
        command = [*self.under(address), "cat", "/proc/net/dev"]
        lines = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        [found] = [line.split(":")[1].split() for line in lines if line.strip().startswith("eth0:")]
        return int(found[8])

    def remove(self) -> None:
        """Take all of it away."""
        while self._namespaces:
            name = self._namespaces.pop()
            if Path("/run/netns", name).exists():
                _run("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
