# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""As much of systemd as a planned restart needs, in this process: sd_notify with descriptors, kept over a restart.

`test_systemd.py` has the real one, where a container can be booted. This one is everywhere, and can be made to fail.
"""

import array
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from real.gateway_process import COMPILED, GatewayProcess
from real.processes import START_TIMEOUT, end, pid_descriptor

MOST_FDS = 253  # of one message (SCM_MAX_FD)

_START = """
import os, sys
fds = [int(x) for x in sys.argv[1].split(",") if x]
high = [os.dup2(fd, 200 + i) for i, fd in enumerate(fds)]
for i, fd in enumerate(high):
    os.dup2(fd, 3 + i, inheritable=True)
    os.close(fd)
os.closerange(3 + len(fds), 1024)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


class ManagedGateway(GatewayProcess):
    """A daemon under a service manager. `store` is what it gave: (name, descriptor)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.store: list[tuple[str, int]] = []
        self.said: list[str] = []
        self.environment = dict(COMPILED)
        self.refusing = False
        self._ready = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.directory / "notify"))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    # -- what it says

    def _listen(self) -> None:
        size = MOST_FDS * array.array("i").itemsize
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(size))
            fds = array.array("i")
            for _, _, raw in ancillary:
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
            lines = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "END" in lines:
                return
            self._hear(lines, list(fds))

    def _hear(self, lines: dict[str, str], fds: list[int]) -> None:
        name = lines.get("FDNAME", "stored")
        if "FDSTORE" in lines and not self.refusing:
            self.store += [(name, fd) for fd in fds]
            fds = []
        if "FDSTOREREMOVE" in lines:
            for gone in [one for one in self.store if one[0] == name]:
                self.store.remove(gone)
                fds.append(gone[1])
        for fd in fds:
            os.close(fd)
        self.said += [f"{key}={value}" for key, value in lines.items()]
        if "READY" in lines:
            self._ready.set()

    # -- life of the process

    def start(self, under: Sequence[str] = ()) -> None:
        assert not self.alive, "the daemon runs already"
        self._ready.clear()
        serve = [sys.executable, *under, "-m", "forebay", "serve", "--config", str(self.config)]
        names, fds = [name for name, _ in self.store], [fd for _, fd in self.store]
        command = [sys.executable, "-S", "-c", _START, ",".join(map(str, fds)), *serve]
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(self.directory / "notify"),
            "PYTHONUNBUFFERED": "1",
            **self.environment,
        }
        if fds:
            environment |= {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd="/",
                pass_fds=fds,
            )
        self._wait(self.process)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        with pid_descriptor(process) as ended:
            while not self._ready.wait(0.005):
                if select.select([ended], [], [], 0)[0]:
                    raise RuntimeError(f"the daemon ended: {process.wait()}\n{self.log_text()}")
                assert time.monotonic() < deadline, self.log_text()

    def stop(self) -> int:
        """As `systemctl stop`: what is stored is closed when the daemon has ended."""
        code = super().stop()
        self.close_store()
        return code

    def restart(self, *, kill: bool = False) -> None:
        """As `systemctl restart`, or as after a crash: what is stored is handed to the next process."""
        self.end(kill=kill)
        self.start()

    def end(self, *, kill: bool = False) -> None:
        """The first half of a restart."""
        assert self.process is not None
        code = end(self.process, signal.SIGKILL if kill else signal.SIGTERM)
        assert kill or code == 0, self.log_text()

    def stored(self, prefix: str) -> list[int]:
        """Descriptors whose name begins so."""
        return [fd for name, fd in self.store if name.startswith(prefix)]

    def drop(self, prefix: str) -> None:
        """Lose what is stored under names that begin so."""
        for one in [one for one in self.store if one[0].startswith(prefix)]:
            self.store.remove(one)
            os.close(one[1])

    def close_store(self) -> None:
        for _, fd in self.store:
            os.close(fd)
        self.store = []

    def remove(self) -> None:
        self.kill()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last, contextlib.suppress(OSError):
            last.connect(str(self.directory / "notify"))
            last.send(b"END=1")
        self._thread.join(5)
        self._socket.close()
        self.close_store()
        super().remove()
