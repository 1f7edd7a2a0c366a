# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A daemon whose disks are booted from: cold, with the trace of an earlier boot, warm."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.boot.linux import cpu_seconds
from bench.boot.replay import Disk
from bench.boot.rows import Row
from bench.boot.store import Store

from forebay.client import Client
from real.gateway_process import GatewayProcess

COLD, REPLAY, WARM = "Forebay, cold, no trace", "Forebay, cold, replay", "Forebay, warm"
PRELOADS = {COLD: "0", REPLAY: "trace", WARM: "0"}
"""In this order: the boot of one is recorded for the next, which leaves the cache warm."""


class Daemon:
    """A daemon with a cache of its own."""

    def __init__(self, gateway: GatewayProcess, store: Store) -> None:
        self._gateway = gateway
        self._store = store
        self._control = Client(str(gateway.control))

    @contextlib.contextmanager
    def disks(self, row: Row, names: Sequence[str], **settings: Any) -> Iterator[list[Disk]]:
        """Attach disks of these names, and detach them at the end; `row` gets what was measured meanwhile.

        What the attach fetches is part of that.
        """
        before = self._store.taken()
        for name in names:
            self._control.post("/disks", {"name": name, "image": self._store.uri, **settings})
        cpu = cpu_seconds(self._gateway.pid)
        yield [(self._gateway.sock(name), name) for name in names]
        row.daemon_cpu = cpu_seconds(self._gateway.pid) - cpu
        boots = [self._control.get(f"/disks/{name}")["boot"] for name in names]
        if read := sum(boot["read_bytes"] for boot in boots):
            row.waited_percent = 100 * sum(boot["waited_bytes"] for boot in boots) / read
        taken = self._store.taken().since(before)
        row.store_requests, row.store_bytes = taken
        for name in names:
            self._control.follow(
                "DELETE", f"/disks/{name}?force=1&discard=1", None, lambda _done, _total: None
            )
        time.sleep(1)  # the boot is recorded

    def uri(self, name: str) -> str:
        """What QEMU takes."""
        return self._gateway.uri(name)

    def purge(self) -> None:
        """Let the cache have nothing of the image."""
        self._gateway.cli("purge", self._store.uri)


@contextlib.contextmanager
def daemon(directory: Path, store: Store) -> Iterator[Daemon]:
    """A fresh one."""
    gateway = GatewayProcess({"cache": {"size": "4 GiB"}}, parent=directory)
    try:
        gateway.start()
        yield Daemon(gateway, store)
    finally:
        gateway.remove()
