# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The real daemon in a throw-away directory, as its users have it: a process, a command, sockets.

Nothing of Forebay is imported here: these tests know the contract only.
"""

import grp
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from real.processes import START_TIMEOUT, accepts, end, pid_descriptor

COMMAND_TIMEOUT = 60.0
"""Seconds one command may take. Tests that drain much give their own."""

COMPILED = {
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONPYCACHEPREFIX": str(Path(__file__).parents[2] / ".pytest_cache" / "pyc"),
}
"""Compiled modules, as an installation has them, wherever the tests run: compiling is half of a start."""

LOUD = re.compile(
    r"\b(WARNING|ERROR|CRITICAL)\b|^Traceback|Task exception|never retrieved", re.MULTILINE
)
"""What a daemon that nothing bad happened to does not write to its log."""


def toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """The sections as TOML. JSON's strings, numbers, booleans and lists of these are TOML's too."""
    text = ""
    for name, values in sections.items():
        text += f"[{name}]\n"
        text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    return text


class GatewayProcess:
    """One `forebay serve` with a state, a run and a store directory of its own.

    `settings` are sections of the configuration, merged over defaults that fit a test: a small cache, every origin
    allowed, the store `images` at `self.images`.
    """

    def __init__(
        self, settings: Mapping[str, Mapping[str, Any]] | None = None, parent: Path = Path("/tmp")
    ) -> None:
        # short, because a Unix socket's address holds 107 bytes
        self.directory = Path(tempfile.mkdtemp(prefix="fb-", dir=parent))
        self.images = self.directory / "images"
        self.images.mkdir()
        self.state = self.directory / "state"
        self.run = self.directory / "run"
        self.config = self.directory / "forebay.toml"
        self.log = self.directory / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.allowed: list[re.Pattern[str]] = []
        self.configure(settings or {})

    # -- configuration

    def configure(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the configuration; a running daemon does not notice."""
        group = grp.getgrgid(os.getgid()).gr_name
        base: dict[str, dict[str, Any]] = {
            "gateway": {"state": str(self.state), "run": str(self.run), "socket_group": group},
            "cache": {"size": "256 MiB"},
            "defaults": {},
            "origins": {"nbd": ["*"], "devices": ["*"]},
            "stores.images": {"path": str(self.images)},
        }
        for name, values in settings.items():
            base.setdefault(name, {}).update(values)
        self.config.write_text(toml(base))

    # -- life of the process

    @property
    def pid(self) -> int:
        assert self.process is not None, "the daemon was not started"
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def control(self) -> Path:
        return self.run / "control.sock"

    def start(self, under: Sequence[str] = ()) -> None:
        """Start the daemon and return when it says READY; `under` are Python's own options, as `-m cProfile`.

        Raises RuntimeError with the log when it ends instead, or takes too long.
        """
        assert not self.alive, "the daemon runs already"
        command = [sys.executable, *under, "-m", "forebay", "serve", "--config", str(self.config)]
        address = self.directory / "notify"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log.open("ab") as log:
            notify.bind(str(address))
            environment = {**os.environ, "NOTIFY_SOCKET": str(address), "PYTHONUNBUFFERED": "1"}
            environment |= COMPILED
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, cwd="/"
            )
            try:
                self._wait_ready(self.process, notify)
            except BaseException:
                self.kill()
                raise

    def _wait_ready(self, process: subprocess.Popen[bytes], notify: socket.socket) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        with pid_descriptor(process) as ended:
            while (left := deadline - time.monotonic()) > 0:
                readable = select.select([notify.fileno(), ended], [], [], left)[0]
                if notify.fileno() in readable and b"READY=1" in notify.recv(4096).splitlines():
                    assert accepts(self.control), "READY, but the control socket does not accept"
                    return
                if ended in readable:
                    raise RuntimeError(
                        f"the daemon ended: exit {process.wait()}\n{self.log_text()}"
                    )
        raise RuntimeError(f"the daemon is not READY after {START_TIMEOUT} s\n{self.log_text()}")

    def stop(self) -> int:
        """SIGTERM, as systemd stops it. Its exit code."""
        return end(self.process) if self.process else 0

    def kill(self) -> None:
        """SIGKILL: nothing in its memory survives."""
        if self.process:
            end(self.process, signal.SIGKILL)

    def restart(self, *, kill: bool = False) -> None:
        """Stop it, or kill it, and start it on the same directories."""
        if kill:
            self.kill()
        else:
            code = self.stop()
            assert code == 0, f"SIGTERM: exit {code}\n{self.log_text()}"
        self.start()

    def remove(self) -> None:
        """End the daemon and remove everything it made."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- the log

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def allow_log(self, pattern: str) -> None:
        """Loud lines of the log that match this regular expression belong to the test."""
        self.allowed.append(re.compile(pattern))

    def unexpected_log(self) -> list[str]:
        return [
            line
            for line in self.log_text().splitlines()
            if LOUD.search(line) and not any(pattern.search(line) for pattern in self.allowed)
        ]

    # -- the command

    def cli(
        self, *arguments: str | Path, check: bool = True, timeout: float = COMMAND_TIMEOUT
    ) -> subprocess.CompletedProcess[str]:
        """Run `forebay ARGUMENTS` with this gateway's configuration.

        Raises AssertionError with its output when `check` and the exit code is not 0.
        """
        command = [
            sys.executable,
            "-m",
            "forebay",
            *map(str, arguments),
            "--config",
            str(self.config),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **COMPILED},
        )
        assert not check or done.returncode == 0, (
            f"forebay {' '.join(map(str, arguments))}: exit {done.returncode}\n"
            f"{done.stdout}{done.stderr}--- log\n{self.log_text()}"
        )
        return done

    def attach(self, name: str, image: str | Path, *options: str, mode: str | None = None) -> Path:
        """Attach a disk; `image` is as the command takes it, or a name in the store `images`. Its socket."""
        text = str(image)
        if ":" not in text and "/" not in text:
            text = f"images:{text}"
        self.cli("attach", name, text, *(("--mode", mode) if mode else ()), *options)
        return self.sock(name)

    def status(self, name: str) -> dict[str, Any]:
        """The disk's object from `forebay status --json`."""
        [disk] = json.loads(self.cli("status", name, "--json").stdout)
        assert isinstance(disk, dict)
        return disk

    # -- sockets

    def sock(self, name: str) -> Path:
        return self.run / "disks" / f"{name}.sock"

    def uri(self, name: str, export: str | None = None) -> str:
        """What NBD tools take; the export is NAME unless another (or "" for the default) is given."""
        return f"nbd+unix:///{name if export is None else export}?socket={self.sock(name)}"
