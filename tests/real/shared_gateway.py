# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Gateways that the tests of one file share, one for each configuration: each test gets one that has nothing yet.

A start takes longer than many a test. A test may kill, restart and stop its gateway; the next one finds it running.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from real.disk_fixture import wait_for
from real.gateway_process import GatewayProcess
from real.kill_daemon import asked

Settings = Mapping[str, Mapping[str, Any]]


class SharedGateways:
    """`with gateways.emptied(settings) as gateway:` for each test; `remove` at the end of all."""

    def __init__(self) -> None:
        self._made: dict[str, GatewayProcess] = {}

    @contextlib.contextmanager
    def emptied(self, settings: Settings | None = None) -> Iterator[GatewayProcess]:
        """A running gateway with these settings, and no disks, images, blocks, log. Its log is looked at afterwards."""
        key = json.dumps(settings or {}, sort_keys=True)
        gateway = self._made.get(key)
        if gateway is None:
            gateway = self._made[key] = GatewayProcess(settings)
        if not gateway.alive:
            gateway.start()
        try:
            yield gateway
            loud = gateway.unexpected_log()
            assert not loud, "unexpected in the daemon's log:\n" + "\n".join(loud)
            _empty(gateway)
        except BaseException:
            gateway.remove()
            del self._made[key]
            raise

    def remove(self) -> None:
        """End them."""
        for gateway in self._made.values():
            gateway.remove()


def _empty(gateway: GatewayProcess) -> None:
    if not gateway.alive:
        gateway.start()
    for disk in asked(gateway.control, "GET", "/disks"):
        asked(gateway.control, "DELETE", f"/disks/{disk['name']}?force=1&discard=1")
    for store in asked(gateway.control, "GET", "/stores"):
        for image in store[
            "images"
        ]:  # one that nobody reads any more gives way to a disk that writes
            asked(
                gateway.control,
                "POST",
                "/disks",
                {"name": "way", "image": image["image"], "format": "raw"},
            )
            asked(gateway.control, "DELETE", "/disks/way?force=1&discard=1")
    wait_for(lambda: not _purged(gateway)["kept"], "what was used is let go")
    for path in gateway.images.iterdir():
        _remove(path)
    gateway.allowed.clear()
    gateway.log.write_bytes(b"")  # the daemon appends


def _purged(gateway: GatewayProcess) -> dict[str, Any]:
    found: dict[str, Any] = asked(gateway.control, "POST", "/images/purge", {"older_than": 0})
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
