# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where the bytes come from: what a file on this host and one on a web server have in common; the former."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from forebay.errors import ForebayError
from forebay.importing.sparse import STEP, data_of
from forebay.origin.worker import syscalls

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Source(Protocol):
    """One file that is imported."""

    name: str
    """What the operator wrote."""
    size: int | None
    """Bytes, if that is known; only after `begin`."""
    identity: dict[str, Any]
    """What tells this file from another one of that name, likewise. Empty where nothing does."""
    is_here: bool
    """True for a LocalFile, of which any part can be read; others come in their order only."""

    def begin(self, known: dict[str, Any], at: int) -> bool:
        """Begin to read. True if it is the file that `known` is the identity of: then from byte `at`, else from 0.

        Raises ForebayError, and OSError.
        """

    def chunks(self) -> Iterator[bytes]:
        """The bytes from there on. Raises ForebayError, and OSError."""

    def check_unchanged(self) -> None:
        """Raises ForebayError where it was changed meanwhile."""

    def close(self) -> None:
        """End it."""


class LocalFile:
    """A file on this host."""

    is_here = True

    def __init__(self, path: str) -> None:
        """Open it. Raises ForebayError, and OSError."""
        self.name = path
        fd = os.open(path, _FLAGS)
        self._fd = fd
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise ForebayError(f"{path} is not a regular file: name the file of an image")
        self._size = found.st_size
        self.size: int | None = found.st_size
        self.identity = self._identity()
        self._at = 0

    def _identity(self) -> dict[str, Any]:
        found = os.fstat(self._fd)
        return {
            "path": os.path.abspath(self.name),
            "size": found.st_size,
            "inode": [found.st_dev, found.st_ino],
            "changed": found.st_mtime_ns,
        }

    def begin(self, known: dict[str, Any], at: int) -> bool:
        """Implements Source."""
        same = known == self.identity
        self._at = at if same else 0
        return same

    def chunks(self) -> Iterator[bytes]:
        """Implements Source."""
        while found := os.pread(self._fd, STEP, self._at):
            yield found
            self._at += len(found)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at any place, less than `length` only at the end."""
        return syscalls.pread(self._fd, length, offset)

    def pieces(self, start: int) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of all that is no hole from `start` on."""
        return data_of(self._fd, self._size, start)

    def path(self) -> Path:
        """Where it lies now. Raises ForebayError where that is another file."""
        path = Path(self.name).resolve()
        if not os.path.samestat(path.stat(), os.fstat(self._fd)):
            raise ForebayError(f"{self.name} is another file by now: import it when it is at rest")
        return path

    @property
    def allocated(self) -> int:
        """Bytes of it that take space, at most."""
        found = os.fstat(self._fd)
        return min(found.st_size, found.st_blocks * 512)

    def check_unchanged(self) -> None:
        """Implements Source."""
        if self._identity() != self.identity:
            raise ForebayError(
                f"{self.name} was changed while it was read: import it when it is at rest"
            )

    def close(self) -> None:
        """Implements Source."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
