# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where the files of the index lie, and whether they are what they were when it was opened.

LMDB reads them by a map, and whoever touches a map behind the end of its file gets SIGBUS. So before each transaction
it is looked whether a file was cut. An index that was is never read again: it gets another name, under which no start
finds it, and from then on nothing has to be on record any more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

import lmdb
from lmdb.verify import VerifyError, verify

from forebay_cache.device.files import sync_directory
from forebay_cache.errors import IndexFault

FILES = DATA, LOCKS = ("data.mdb", "lock.mdb")
"""The files that LMDB maps into memory."""

_CUT = ".cut"
"""What the name of an index that was cut ends with."""


def check_kinds(path: Path) -> None:
    """Raise OSError where a pipe or the like lies in the place of a file of the index: to open it could wait for ever.

    Those that are not there do not matter.
    """
    for name in FILES:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG((path / name).stat().st_mode):
                raise OSError(errno.EINVAL, "not a file", str(path / name))


def check_length(path: Path, env: lmdb.Environment) -> None:
    """Raise OSError where the index that was just opened was cut while nobody had it open: nothing of it is read then.

    LMDB's file is as long as it says that it is, but for pages at the end that hold nothing.
    """
    said = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    size = (path / DATA).stat().st_size
    if size >= said:
        return
    try:
        problems: list[str] = verify(str(path))  # type: ignore[no-untyped-call]  # reads all of it
    except VerifyError as error:
        problems = [str(error)]
    if problems:
        raise OSError(errno.EIO, f"{DATA} has {size} bytes, and should have {said}: it was cut")


class Place:
    """The files of the index at ``path``, which were opened by then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found = self._identity()
        # O_PATH: to close another descriptor of the file of locks would let LMDB's locks go
        self._files = [os.open(path / name, os.O_PATH | os.O_CLOEXEC) for name in FILES]
        self._least = [0] * len(FILES)
        self._cut = ""
        self.is_lost = False
        """True once the index was cut, and no start will find it."""

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = (self._path / DATA).stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def is_kept(self) -> bool:
        """True if the next start would find the same files, none of them cut: neither was removed or replaced."""
        return self.is_whole() and self._identity() == self._found

    def is_whole(self) -> bool:
        """True if no file was cut."""
        try:
            self.check()
        except IndexFault:
            return False
        return True

    def check(self) -> None:
        """Raise IndexFault once a file is shorter than it was, which LMDB never makes it.

        Threads may do so side by side while another one makes a file longer: what it had at least is taken before it is
        looked.
        """
        for n, fd in enumerate(self._files):
            least = self._least[n]
            size = os.fstat(fd).st_size
            if size < least and not self._cut:
                self._cut = f"{FILES[n]} has {size} bytes, and had {least}: it was cut"
                self._set_aside(n)
            self._least[n] = max(self._least[n], size)
        if self._cut:
            raise IndexFault(errno.EIO, f"the index fails: {self._cut}")

    def _set_aside(self, n: int) -> None:
        """Give the index another name, durably, if it is its data that was cut. If that fails it is not lost."""
        if FILES[n] == DATA:
            with contextlib.suppress(OSError):
                (self._path / DATA).rename(self._path / (DATA + _CUT))
                sync_directory(self._path)
                self.is_lost = True

    def close(self) -> None:
        """Close the files."""
        for fd in self._files:
            os.close(fd)
        self._files = []
