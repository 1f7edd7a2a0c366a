# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Hosts that stage, each with a daemon, a mount and `forebay stager` of its own, at a loopback address of its own."""

import contextlib
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from forebay.client import Client
from real.disk_fixture import ask
from real.fuse_mount import FuseMount, need_fuse
from real.gateway_process import GatewayProcess
from real.links import Links
from real.processes import end

WAIT_SECONDS = 60.0
"""For what takes a few seconds on a machine that has nothing else to do."""

_ADDRESSES = itertools.count(1)


def need_staging() -> None:
    """Skip the test, with the reason, where nothing can be staged."""
    need_fuse()
    if importlib.util.find_spec("libtorrent") is None:
        pytest.skip("libtorrent is not installed: make setup installs it where it can be had")


def free_address() -> str:
    """A loopback address at which nobody of ours listens."""
    return f"127.{os.getpid() % 200 + 20}.{next(_ADDRESSES)}.{os.getpid() // 200 % 200 + 1}"


class StagingHost:
    """One host. `images` is the directory of the store, which all hosts share."""

    def __init__(
        self,
        images: Path,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        address: str | None = None,
        under: Sequence[str] = (),
    ) -> None:
        """`under` is what the process is started with that talks to other hosts, where `address` is on a network."""
        self.address = address or free_address()
        self._under = under
        self.gateway = GatewayProcess(
            {
                "stores.images": {"path": str(images)},
                "staging": {"listen": self.address},
                **(settings or {}),
            }
        )
        self.mount: FuseMount | None = None
        self.stager: subprocess.Popen[bytes] | None = None
        self.log = self.gateway.directory / "stager.log"

    # -- life

    def start(self) -> None:
        """Start all three."""
        self.gateway.start()
        self.mount = FuseMount(self.gateway)
        self.start_stager()

    def start_stager(self) -> None:
        """Start `forebay stager` alone."""
        assert self.mount is not None
        command = [*self._under, sys.executable, "-m", "forebay", "stager", str(self.mount.path)]
        command += ["--config", str(self.gateway.config)]
        with self.log.open("ab") as log:
            self.stager = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/"
            )

    def kill_stager(self) -> None:
        """SIGKILL."""
        if self.stager is not None:
            end(self.stager, signal.SIGKILL)

    def remove(self) -> None:
        """End all three, and remove everything."""
        self.kill_stager()
        if self.mount is not None:
            self.mount.remove()
        self.gateway.remove()

    # -- what is asked

    def stage(self, *words: str) -> list[dict[str, Any]]:
        """What `forebay stage --json` says."""
        found = json.loads(self.gateway.cli("stage", "--json", *words).stdout)
        assert isinstance(found, list)
        return found

    def make(self, image: str) -> dict[str, Any]:
        """Have the daemon make a torrent; what is told of it."""
        client = Client(str(self.gateway.control))
        made = client.follow("POST", "/stages/torrent", {"image": image}, lambda _done, _all: None)
        assert isinstance(made, dict)
        return made

    def told(self) -> dict[str, Any]:
        """What is told of the one image."""
        [one] = self.stage()
        return one

    def told_quickly(self) -> dict[str, Any]:
        """The same, without a process for each question."""
        [one] = ask(self.gateway, "/stages")
        assert isinstance(one, dict)
        return one

    def wait_state(self, state: str) -> dict[str, Any]:
        """Wait until the one image is in that state; what is told of it then."""
        return self._wait(lambda told: told["state"] == state, state)

    def wait_reason(self, text: str) -> dict[str, Any]:
        """Wait until that is in the reason of its state; what is told of it then."""
        return self._wait(lambda told: text in (told["reason"] or ""), text)

    def _wait(self, is_so: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_so(told := self.told_quickly()):
            assert time.monotonic() < deadline, f"not {what}: {told}\n{self.log_text()}"
            time.sleep(0.2)
        return told

    def read(self, name: str) -> bytes:
        """An image, as programs read it by the mount."""
        assert self.mount is not None
        return self.mount.image(name).read_bytes()

    def staged(self, name: str) -> Path:
        """The file that libtorrent writes."""
        assert self.mount is not None
        return self.mount.path / "stage" / "images" / name

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def hosts(
    count: int, images: Path, **settings: Mapping[str, Any]
) -> "contextlib.AbstractContextManager[list[StagingHost]]":
    """So many, started at the same time; ended in the end."""
    need_staging()
    return running([StagingHost(images, settings) for _ in range(count)])


def linked(
    links: Links, images: Path, **settings: Mapping[str, Any]
) -> "contextlib.AbstractContextManager[list[StagingHost]]":
    """The same, one at each of these links."""
    need_staging()
    return running(
        [StagingHost(images, settings, one, links.under(one)) for one in links.addresses]
    )


@contextlib.contextmanager
def running(found: list[StagingHost]) -> Iterator[list[StagingHost]]:
    """Hosts while they run."""
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(StagingHost.start, found))
        yield found
    finally:
        for one in found:
            one.remove()


class Liar:
    """A host that is named, has a torrent, and sends something else: a real libtorrent that trusts its wrong file."""

    def __init__(self, torrent: bytes, content: bytes, directory: Path) -> None:
        from forebay.swarm.engine import Engine

        self.address = free_address()
        directory.mkdir()
        (directory / "wrong").write_bytes(content)
        self._engine = Engine(self.address, 10881)
        self._engine.allow([self.address])
        self._directory, self._torrent = directory, torrent

    def lie_to(self, addresses: list[str]) -> None:
        """Offer it to these."""
        self._engine.allow(addresses)
        self._engine.add("lie", self._torrent, self._directory / "wrong", [], None)

    def connect(self, address: str) -> None:
        """Have that one as a peer."""
        self._engine.connect("lie", address, 10881)

    @property
    def sent(self) -> int:
        """Bytes."""
        return int(self._engine._handles["lie"].status().total_payload_upload)

    def close(self) -> None:
        self._engine.close()


def is_reachable(address: str) -> bool:
    """True if somebody listens there."""
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex((address, 10881)) == 0
