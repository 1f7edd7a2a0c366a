# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which domain a disk was attached for: `/run/libvirt-forebay/NAME`, one file a disk.

The file names the domain. While a process detaches the disk it holds a lock on the file and has its process id in it,
so that the next start of the domain can call that off. A reboot ends all domains and removes all holds. The directory
lies beside RUN and is root's, as the hook is: RUN itself belongs to the daemon's user.
"""

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from forebay.errors import ForebayError

CALL_OFF_SECONDS = 10.0
"""How long a process that was told to leave a disk alone may take to end."""

_LOOK_AGAIN = 0.02
"""Seconds."""


class Hold:
    """The hold on a disk of the daemon whose gateway.run is `run`. Methods raise OSError."""

    def __init__(self, run: str, disk: str) -> None:
        beside = Path(run)
        self.path = beside.with_name(f"libvirt-{beside.name}") / disk
        self._kept = self.path.with_name(f".{disk}.kept")

    def domain(self) -> tuple[str, str] | None:
        """UUID and name of the domain that the disk was attached for; None where it is nobody's."""
        try:
            uuid, _, name = self.path.read_text().partition("\n")[0].partition(" ")
        except FileNotFoundError:
            return None
        return (uuid, name) if uuid else None

    def take(self, uuid: str, name: str) -> None:
        """Note that the disk is attached for this domain."""
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}.new")
        new.write_text(f"{uuid} {name}\n")
        new.rename(self.path)
        self._kept.unlink(missing_ok=True)

    def drop(self) -> None:
        """Note that the disk is attached for no domain."""
        self.path.unlink(missing_ok=True)
        self._kept.unlink(missing_ok=True)

    def keep(self) -> None:
        """Note that what the domain wrote to the disk is for its next run, too: until `take` or `drop`."""
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        self._kept.touch()

    def is_kept(self) -> bool:
        """True after `keep`."""
        return self._kept.exists()

    @contextlib.contextmanager
    def detaching(self) -> Iterator[bool]:
        """While the body runs, be the process that detaches the disk. The body gets False if another one is."""
        with self.path.open("r+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            after = len(file.readline())
            file.truncate(after)
            file.write(b"%d\n" % os.getpid())
            yield True

    def call_off(self) -> bool:
        """End the process that detaches the disk. True if there was one. Raises ForebayError when it does not end."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return False
        with file:
            deadline = time.monotonic() + CALL_OFF_SECONDS
            called = False
            while not _unlocked(file.fileno()):
                if time.monotonic() > deadline:
                    raise ForebayError(
                        f"'{self.path.name}' is still being detached: try again when it is done"
                    )
                if not called:
                    called = _end(os.pread(file.fileno(), 4096, 0))
                time.sleep(_LOOK_AGAIN)
            return called


def _unlocked(descriptor: int) -> bool:
    """True if nobody holds the lock on the file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end(content: bytes) -> bool:
    """Send SIGTERM to the process on the second line of the file. False if it has not put itself there yet."""
    lines = content.split(b"\n")
    if len(lines) < 3 or not lines[1].isdigit():
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(lines[1]), signal.SIGTERM)
    return True
