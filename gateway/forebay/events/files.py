# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The newest events in two files of a folder: lines of JSON, the newer file taking the place of the older one.

Whatever lies there is read as far as it makes sense, and passed over else. Not durable: what a power cut takes of the
last seconds is in the journal. For one thread, which may wait for the disk.
"""

import errno
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from forebay.events.kinds import checked
from forebay.events.ring import MOST_BYTES, Entry

FOLDER = "events"
"""In STATE."""

LONGEST_LINE = 8192
"""Bytes of an event: sixteen keys, of which two may be long."""

_OLD = ".old"
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_AT_ONCE = 32
_REST_SECONDS = 0.001
"""After so many lines that were read, others have the interpreter for so long."""


class Files:
    """Two files, `name` and `name.old`, of half of `most` bytes each."""

    def __init__(self, state: Path, name: str, most: int = MOST_BYTES) -> None:
        self._folder = state / FOLDER
        self._name = name
        self.path = self._folder / name
        """The newer one."""
        self._half = most // 2
        self._begun = False
        """True once this process has written: what was there before may end in the middle of a line."""

    def read(self) -> list[Entry]:
        """What is there, in no certain order. Raises OSError."""
        folder = self._open_folder()
        try:
            return [
                entry
                for name in (self._name + _OLD, self._name)
                for entry in entries_of(self._content(folder, name))
            ]
        finally:
            os.close(folder)

    def write(self, lines: list[bytes]) -> None:
        """Add lines. Raises OSError; some of them may be there then, and part of one."""
        data = b"".join(line + b"\n" for line in lines)
        folder = self._open_folder()
        try:
            self._append(folder, data if self._begun else b"\n" + data)
        finally:
            os.close(folder)
        self._begun = True

    def _open_folder(self) -> int:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        return os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)

    def _append(self, folder: int, data: bytes) -> None:
        file = self._open(folder, os.O_WRONLY | os.O_CREAT | os.O_APPEND, self._name)
        try:
            if os.fstat(file).st_size + len(data) > self._half:
                os.rename(self._name, self._name + _OLD, src_dir_fd=folder, dst_dir_fd=folder)
                os.close(file)
                file = self._open(folder, os.O_WRONLY | os.O_CREAT | os.O_APPEND, self._name)
            self._begun = False  # until all of it is there
            written = os.write(file, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)

    def _content(self, folder: int, name: str) -> bytes:
        """The end of a file, as much as may be in one; empty where there is none. Raises OSError."""
        try:
            file = self._open(folder, os.O_RDONLY, name)
        except FileNotFoundError:
            return b""
        try:
            return os.pread(file, self._half, max(0, os.fstat(file).st_size - self._half))
        finally:
            os.close(file)

    def _open(self, folder: int, flags: int, name: str) -> int:
        """Raises OSError, also for what is no regular file, or has another name as well."""
        file = os.open(name, flags | _FLAGS, 0o600, dir_fd=folder)
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            return file
        os.close(file)
        raise OSError(errno.EINVAL, "no file of Forebay's: remove it")


def entries_of(content: bytes) -> Iterator[Entry]:
    """The events in some bytes; lines that are none are passed over."""
    for n, line in enumerate(content.split(b"\n"), 1):
        if n % _AT_ONCE == 0:
            time.sleep(_REST_SECONDS)
        if not 0 < len(line) <= LONGEST_LINE:
            continue
        try:
            event = checked(json.loads(line))
        except (ValueError, RecursionError):
            continue
        if event is not None:
            yield Entry(event["id"], event["time"], event["disk"], line_of(event))


def line_of(event: dict[str, object]) -> bytes:
    """The event as JSON, without a line feed."""
    return json.dumps(event, separators=(",", ":")).encode()
