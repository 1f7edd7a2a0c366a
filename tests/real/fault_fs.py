# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The other side of fault_server.py: mounts it, and says what is to fail."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from real.fuse_mount import need_fuse
from real.processes import START_TIMEOUT, accepts, end

SERVER = Path(__file__).with_name("fault_server.py")


class FaultFs:
    """`path` is a directory whose content lies in `backing`, which nothing fails in."""

    def __init__(self, directory: Path, *how: str) -> None:
        """`how` are further arguments of fault_server.py."""
        need_fuse()
        self._how = how
        self.path, self.backing = directory / "faulty", directory / "backing"
        self.path.mkdir(parents=True)
        self.backing.mkdir()
        self._address = directory / "faults"
        self._log = directory / "faults.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.mount()

    def mount(self) -> None:
        """Also again, after :meth:`vanish`."""
        self._address.unlink(missing_ok=True)
        command = [
            sys.executable,
            str(SERVER),
            str(self.path),
            str(self.backing),
            str(self._address),
            *self._how,
        ]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        deadline = time.monotonic() + START_TIMEOUT
        while not (os.path.ismount(self.path) and accepts(self._address)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.remove()
                raise RuntimeError(f"no faulty file system:\n{self._log.read_text()}")
            time.sleep(0.01)

    def vanish(self) -> None:
        """The device, or the server, is gone: ENOTCONN for who has a file of it open, and nothing under its name."""
        if self.process is not None:
            end(self.process)
            self.process.kill()
        subprocess.run(["umount", "--lazy", str(self.path)], check=False, capture_output=True)

    def remove(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.lift()
            self.process.kill()
            self.process.wait()
        subprocess.run(["umount", "--lazy", str(self.path)], check=False, capture_output=True)

    def _ask(self, do: str, **rule: Any) -> dict[str, int]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._address))
            sock.sendall(json.dumps({"do": do, **rule}).encode() + b"\n")
            answer = sock.makefile().readline()
        found: dict[str, int] = json.loads(answer)
        return found

    def fail(self, call: str, error: str = "", **rule: Any) -> None:
        """From now on `call` fails so; see fault_server.Rule: name, after, times, delay, hang, short, lose."""
        self._ask("fail", call=call, error=error, **rule)

    def lift(self) -> None:
        """Nothing fails any more, and what hangs goes on."""
        self._ask("lift")

    def lose_locks(self) -> None:
        """As after a lease was lost: each call of a descriptor that is open now fails with EIO for ever."""
        self._ask("lose_locks")

    def forget(self) -> None:
        """What the kernel has of the files in memory is read anew."""
        self._ask("forget")

    def counts(self) -> dict[str, int]:
        """Calls so far."""
        return self._ask("counts")
