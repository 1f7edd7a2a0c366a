# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the tests with real clients share: tools that are run to their end, and one disk on a fresh image."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from real.gateway_process import GatewayProcess
from real.processes import MIB, need

MODES = ("none", "write-around", "write-through", "write-back", "full-copy")
CACHED_MODES = MODES[1:]
PRIVATE_MODES = ("write-back", "full-copy")

TOOL_TIMEOUT = 60.0
"""Seconds one client may take; they take one or two where nothing else runs."""


def run(*command: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run a client to its end; skips where it is not installed. AssertionError with its output when it fails."""
    need(str(command[0]))
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=TOOL_TIMEOUT,
        stdin=subprocess.DEVNULL,
    )
    assert not check or done.returncode == 0, (
        f"{command[0]}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done


def run_together(*commands: list[str]) -> None:
    """Run several clients at the same time, each to its end. AssertionError with the output of who failed."""
    for command in commands:
        need(command[0])
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        for process in running:
            text, _ = process.communicate(timeout=TOOL_TIMEOUT)
            assert process.returncode == 0, f"{process.args!r}: {process.returncode}\n{text}"
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def allocated(path: Path) -> int:
    """Bytes that a file occupies."""
    return path.stat().st_blocks * 512


@dataclass
class OneDisk:
    """A disk and the image below it."""

    gateway: GatewayProcess
    name: str
    path: Path
    content: bytes

    @property
    def uri(self) -> str:
        return self.gateway.uri(self.name)

    def status(self) -> dict[str, Any]:
        """The object of `forebay status --json`."""
        found = ask(self.gateway, f"/disks/{self.name}")
        assert isinstance(found, dict)
        return found

    def commit(self) -> None:
        """Have the index on disk at once: with a change of the record of a disk, all before it is durable.

        Without it, what was filled in the last seconds before a kill may be fetched again.
        """
        self.gateway.cli("mode", self.name, self.status()["mode"])

    def flush(self) -> None:
        self.gateway.cli("flush", self.name)
        assert self.status()["dirty_bytes"] == 0

    def file_after_flush(self) -> bytes:
        self.flush()
        return self.path.read_bytes()

    def reads(self) -> bytes:
        """The whole disk, by a client of its own."""
        done = subprocess.run(
            ["nbdcopy", self.uri, "-"], capture_output=True, check=False, timeout=TOOL_TIMEOUT
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout


class _Control(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TOOL_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def ask(gateway: GatewayProcess, path: str) -> Any:
    """What the control API answers to GET `path`: what the command shows, without starting it."""
    return json.loads(ask_text(gateway, path))


def ask_text(gateway: GatewayProcess, path: str) -> str:
    """The same as text, of what is no JSON."""
    with contextlib.closing(_Control(gateway.control)) as control:
        control.request("GET", path)
        return control.getresponse().read().decode()


def cache_info(gateway: GatewayProcess) -> dict[str, Any]:
    """The object of `forebay cache info --json`."""
    found = ask(gateway, "/cache")
    assert isinstance(found, dict)
    return found


def wait_for(true: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Ask until it holds. For what the contract lets happen in the background and no event tells."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"after {seconds:g} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def small_tmpfs(directory: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes; skips where none can be mounted."""
    need("mount", "umount")
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "forebay-test", str(directory)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        why = "needs root" if os.getuid() else made.stderr.strip()
        pytest.skip(f"no small file system to have here: {why}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


__all__ = ["MIB", "MODES", "OneDisk"]
