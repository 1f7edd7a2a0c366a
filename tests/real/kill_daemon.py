# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A gateway whose daemon is killed very often: `GatewayProcess`, started by kill_launcher.py, and its control API."""

import contextlib
import http.client
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from real import kill_plants
from real.gateway_process import GatewayProcess
from real.processes import accepts

LAUNCHER = Path(__file__).with_name("kill_launcher.py")

START_TIMEOUT = 60.0
"""Seconds a start may take. It needs a tenth of one; these tests run for long, beside others."""

END_TIMEOUT = 60.0
"""Seconds after which a daemon that was killed and does not end is a fault of the test bed."""


class Refused(Exception):
    """The control API answered with a fault, or did not live to answer."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code
        """HTTP status; 0: there was no answer."""


class KillableGateway(GatewayProcess):
    """As GatewayProcess, but that the daemon may end at any moment, and `code` says how it did.

    `plant` is handed to kill_plants.install at the next start; `counters` are what that counts.
    """

    def __init__(
        self, settings: Mapping[str, Mapping[str, Any]] | None = None, parent: Path = Path("/tmp")
    ) -> None:
        super().__init__(settings, parent)
        self.code: int | None = None
        self.running = False
        self.starts = 0
        self._pid = 0
        self._buffer = b""
        self._address = str(self.directory / "notify")
        self._notify = self._listen()
        shared = self.directory / "counters"
        shared.write_bytes(bytes(kill_plants.SHARED_BYTES))
        with shared.open("r+b") as file:
            self.counters = kill_plants.Counters(mmap.mmap(file.fileno(), 0))
        self._shared = shared
        self._launcher = subprocess.Popen(
            [sys.executable, str(LAUNCHER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/"
        )

    # -- life of the daemon

    def _listen(self) -> socket.socket:
        """Where the daemon says READY. A new one for each: nobody answers there when it stops."""
        Path(self._address).unlink(missing_ok=True)
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind(self._address)
        notify.setblocking(False)
        return notify

    @property
    def alive(self) -> bool:
        self._hear(0)
        return self.running

    @property
    def pid(self) -> int:
        return self._pid

    def _tell(self, command: Mapping[str, Any]) -> None:
        assert self._launcher.stdin is not None
        self._launcher.stdin.write(json.dumps(command).encode() + b"\n")
        self._launcher.stdin.flush()

    @property
    def ended_fd(self) -> int:
        """Becomes readable when there is something to hear of the daemon's life."""
        assert self._launcher.stdout is not None
        return self._launcher.stdout.fileno()

    def _hear(self, timeout: float) -> bool:
        """Take in what the launcher says; whether it said anything."""
        if not select.select([self.ended_fd], [], [], timeout)[0]:
            return False
        data = os.read(self.ended_fd, 65536)
        assert data, "the launcher ended"
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "pid" in said:
                self._pid = said["pid"]
            else:
                self.running, self.code = False, said["code"]
        return True

    def launch(
        self,
        *,
        plant: Mapping[str, Any] | None = None,
        kill_after: float | None = None,
        armed: bool = False,
    ) -> None:
        """Fork a daemon, and do not wait for it. With `kill_after` it ends by SIGKILL so many seconds from now."""
        assert not self.running, "the daemon runs already"
        self._notify.close()
        self._notify = self._listen()
        self.counters.reset(armed=armed)
        command: dict[str, Any] = {
            "do": "start",
            "config": str(self.config),
            "log": str(self.log),
            "notify": self._address,
            "kill_after": kill_after,
        }
        if plant is not None:
            command["plant"] = {**plant, "shared": str(self._shared)}
        self.running, self.code, self._pid = True, None, 0
        self.starts += 1
        self._tell(command)

    def ready(self, timeout: float = START_TIMEOUT) -> bool:
        """Wait until it says READY. False: it ended before. RuntimeError with its log when it takes too long."""
        deadline = time.monotonic() + timeout
        while self.running and (left := deadline - time.monotonic()) > 0:
            readable = select.select([self._notify.fileno(), self.ended_fd], [], [], left)[0]
            if (
                self._notify.fileno() in readable
                and b"READY=1" in self._notify.recv(4096).splitlines()
            ):
                self._notify.close()
                return True
            if self.ended_fd in readable:
                self._hear(0)
        if self.running:
            raise self._hangs(f"the daemon is not READY after {timeout} s")
        return False

    def _hangs(self, what: str) -> RuntimeError:
        """With where it hangs, which it writes into its log."""
        self.send(signal.SIGUSR2)
        time.sleep(1.0)
        return RuntimeError(f"{what}\n{self.log_text()}")

    def start(self, under: Sequence[str] = ()) -> None:
        assert not under
        self.launch()
        if not self.ready():
            raise RuntimeError(f"the daemon ended: {self.code}\n{self.log_text()}")
        assert accepts(self.control)

    def wait_ended(self, timeout: float = END_TIMEOUT) -> int:
        """Wait for the daemon's end: its exit code, or minus the signal."""
        deadline = time.monotonic() + timeout
        while self.running:
            left = deadline - time.monotonic()
            if left <= 0 or not self._hear(left):
                raise self._hangs("the daemon does not end")
        assert self.code is not None
        return self.code

    def send(self, number: signal.Signals) -> None:
        if self.running:
            self._tell({"do": "signal", "number": int(number)})

    def kill(self) -> None:
        """SIGKILL, and wait for its end. It may have ended already."""
        self.send(signal.SIGKILL)
        if self.starts:
            self.wait_ended()

    def stop(self) -> int:
        """SIGTERM, as systemd stops it. Its exit code."""
        self.send(signal.SIGTERM)
        return self.wait_ended()

    def end(self) -> None:
        """End daemon and launcher, and keep the directory."""
        assert self._launcher.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._launcher.stdin.close()
        try:
            self._launcher.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._launcher.kill()
            self._launcher.wait()
        self.running = False
        if self._launcher.stdout is not None:
            self._launcher.stdout.close()
        self._notify.close()

    def remove(self) -> None:
        self.end()
        self.starts = 0
        super().remove()

    # -- the control API

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float = 60.0
    ) -> Any:
        """What the control API answers. Raises Refused."""
        return asked(self.control, method, path, body, timeout)

    def attach_disk(self, name: str, image: str, **options: Any) -> Any:
        """Attach by the control API, without starting a command."""
        return self.ask("POST", "/disks", {"name": name, "image": image, **options})


class _Control(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def asked(
    control: Path,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    timeout: float = 60.0,
) -> Any:
    """What the control API at that socket answers. Raises Refused."""
    connection = _Control(control, timeout)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None)
        response = connection.getresponse()
        lines = response.read().splitlines()
    except (OSError, http.client.HTTPException) as fault:
        raise Refused(f"{method} {path}: {fault!r}") from fault
    finally:
        connection.close()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        raise Refused(f"{method} {path}: cut short") from None
    is_state = isinstance(found, dict) and "state" in found  # its `error` is why it is that
    said = found.get("error") if isinstance(found, dict) and not is_state else None
    if response.status >= 400 or said:
        raise Refused(f"{method} {path}: {said}", response.status)
    if isinstance(found, dict) and set(found) == {"result"}:
        return found["result"]
    if isinstance(found, dict) and set(found) == {"done", "total"}:
        raise Refused(f"{method} {path}: cut short")
    return found
