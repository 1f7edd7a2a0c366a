# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay fuse` as a process, mounted on a throw-away directory, for the tests and the bench."""

import importlib.util
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from real.gateway_process import LOUD, GatewayProcess
from real.processes import START_TIMEOUT, end, need, pid_descriptor


def need_fuse() -> None:
    """Skip the test, with the reason, where nothing can be mounted."""
    need("fusermount3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened here: load the module fuse")
    if importlib.util.find_spec("pyfuse3") is None:
        pytest.skip("python3-pyfuse3 is not installed: `make setup` installs it")


class FuseMount:
    """The mount of one gateway. `under` is what the process is started with, as `["setpriv", ...]`."""

    def __init__(
        self, gateway: GatewayProcess, *options: str, under: Sequence[str] = (), start: bool = True
    ) -> None:
        self.gateway = gateway
        self.options = options
        self.under = under
        self.path = Path(tempfile.mkdtemp(prefix="mnt-", dir=gateway.directory))
        self.path.chmod(0o755)
        self.log = self.path.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        if start:
            self.start()

    # -- life

    def start(self) -> None:
        """Mount, and return when it says READY. Raises RuntimeError with the log when it ends instead."""
        command = [*self.under, sys.executable, "-m", "forebay", "fuse", str(self.path)]
        command += ["--config", str(self.gateway.config), *self.options]
        address = self.path.with_suffix(".notify")
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log.open("ab") as log:
            notify.bind(str(address))
            address.chmod(0o777)
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "NOTIFY_SOCKET": str(address)},
                cwd="/",
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
                    return
                if ended in readable:
                    raise RuntimeError(f"it ended: exit {process.wait()}\n{self.log_text()}")
        raise RuntimeError(f"not READY after {START_TIMEOUT} s\n{self.log_text()}")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def stop(self) -> int:
        """SIGTERM, as systemd stops it. Its exit code."""
        return end(self.process) if self.process else 0

    def kill(self) -> None:
        """SIGKILL; the mount stays and answers nobody."""
        if self.process:
            end(self.process, signal.SIGKILL)

    def remove(self) -> None:
        """End it and leave no mount behind."""
        self.kill()
        if self.mounted:
            subprocess.run(["fusermount3", "-u", "-z", str(self.path)], check=False)
        shutil.rmtree(self.path, ignore_errors=True)

    # -- what is there

    @property
    def mounted(self) -> bool:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        return any(line.split()[1] == str(self.path) for line in mounts)

    def disk(self, name: str) -> Path:
        """A disk's file."""
        return self.path / "disks" / name

    def image(self, name: str, store: str = "images") -> Path:
        """An image's file."""
        return self.path / "images" / store / name

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def loud(self) -> list[str]:
        """What nothing bad would not have written."""
        return [line for line in self.log_text().splitlines() if LOUD.search(line)]
