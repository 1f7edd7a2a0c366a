# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The files of one import, beside the image that is to be: what a kill leaves is found there by the next run.

They have names of our own, which differ between hosts and between images, so that whoever has the lock on the first of
them is alone with all. What a host leaves for good is removed by the next import into that folder a week later.
"""

import contextlib
import fcntl
import json
import os
import re
import stat
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from forebay.errors import ForebayError
from forebay.image.formats import mark
from forebay.importing.limits import check_room
from forebay.importing.sparse import SparseFile
from forebay.origin.addresses import SIDECAR, FileAddress
from forebay.origin.new_image import check_free, give_name, open_folder_of, temporary_name
from forebay.origin.worker import syscalls
from forebay.sidecar import own_files
from forebay.sidecar.locks import set_lock

IMAGE, SOURCE, INNER, RECORD, NEXT_RECORD = ".image", ".source", ".inner", ".record", ".next"
"""The image; the source as it was fetched; what was packed in it, where that has to be a file; how far they are."""

_KINDS = (IMAGE, SOURCE, INNER, RECORD, NEXT_RECORD)
_OURS = re.compile(rf"\.[0-9a-f]{{32}}(?:{'|'.join(map(re.escape, _KINDS))}){re.escape(SIDECAR)}")
_READ_WRITE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

LEFT_SECONDS = 7 * 86400
"""After which what an import has left, and nobody has gone on with, is removed by another one."""

_LONGEST_RECORD = 64 << 10


@dataclass
class Record:
    """How far an import is, as far as that is durable."""

    source: dict[str, Any] = field(default_factory=dict)
    """What tells the source from another one of that name; empty where nothing is known of it."""
    format: str = ""
    fetched: int = 0
    """Bytes of the source that are in the file beside the image."""
    written: int = 0
    """Bytes of the image, from its start."""

    @classmethod
    def of(cls, text: bytes) -> "Record":
        """The record that a file holds, an empty one where it holds none."""
        try:
            known: dict[str, Any] = json.loads(text)
            found = cls(**known)
        except (ValueError, TypeError, RecursionError):
            return cls()
        right = type(known.get("source")) is dict and type(known.get("format")) is str
        numbers = (known.get("fetched"), known.get("written"))
        right = right and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
        return found if right else cls()


class Work:
    """The open files of an import. `publish`, `keep` or `drop` ends it."""

    def __init__(self, address: FileAddress) -> None:
        """Begin, or go on. Raises ForebayError where the name is taken, or another command has it in work; OSError."""
        self.address = address
        self.folder = open_folder_of(address)
        self._open: list[int] = []
        self._lock = threading.Lock()
        """Of the record: one thread fetches, another writes."""
        try:
            self._check_free()
            self.image = SparseFile(self._locked())
            self.record = Record.of(self._saved())
        except BaseException:
            self._close()
            raise

    # ------------------------------------------------------------------------------------------------- the beginning

    def _check_free(self) -> None:
        try:
            check_free(self.address, self.folder)
        except ForebayError:
            if self._is_finished():
                self._remove_all()
                raise ForebayError(
                    f"{self.address.key} is whole: an import that was killed had just given it its name"
                ) from None
            raise

    def _is_finished(self) -> bool:
        """True if the image has its name, and the one under which it was written as well."""
        found = []
        for name in (os.path.basename(self.address.path), self._name(IMAGE)):
            with contextlib.suppress(OSError):
                found.append(syscalls.stat(name, dir_fd=self.folder, follow_symlinks=False))
        return len(found) == 2 and os.path.samestat(*found)

    def _locked(self) -> int:
        """A descriptor of the image's file, which is ours alone until it is closed."""
        while True:
            fd = self._opened(IMAGE)
            try:
                set_lock(fd, fcntl.F_WRLCK)
            except BlockingIOError:
                raise ForebayError(
                    f"{self.address.key} is being imported by another command: wait for it, or choose another name"
                ) from None
            if self._leads_to(IMAGE, fd):
                return fd
            # another import ended just now, and this is the image that it has made
            self._open.remove(fd)
            syscalls.close(fd)

    def _leads_to(self, kind: str, fd: int) -> bool:
        try:
            named = syscalls.stat(self._name(kind), dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, syscalls.fstat(fd))

    def _name(self, kind: str) -> str:
        return temporary_name(self.address, f"import {_host()}", kind)

    def _opened(self, kind: str) -> int:
        """A descriptor of a file of ours, new or left. What somebody else put there is removed."""
        name = self._name(kind)
        while True:
            with contextlib.suppress(OSError):
                fd = syscalls.open(name, _READ_WRITE, 0o600, dir_fd=self.folder)
                self._open.append(fd)
                found = syscalls.fstat(fd)
                if (
                    stat.S_ISREG(found.st_mode)
                    and found.st_nlink <= 1
                    and found.st_uid == os.geteuid()
                ):
                    return fd
            own_files.remove(self.folder, name)
            new = os.O_EXCL | _READ_WRITE
            with contextlib.suppress(FileExistsError):
                fd = syscalls.open(name, new, 0o600, dir_fd=self.folder)
                self._open.append(fd)
                return fd

    def _saved(self) -> bytes:
        try:
            fd = own_files.open_existing(self.folder, self._name(RECORD), None)
        except (OSError, own_files.DoesNotCountError):
            return b""
        try:
            return syscalls.pread(fd, _LONGEST_RECORD, 0)
        finally:
            syscalls.close(fd)

    def remove_others(self) -> None:
        """Remove what others have left in this folder for more than a week. Raises nothing."""
        with contextlib.suppress(OSError):
            for name in filter(_OURS.fullmatch, syscalls.listdir(self.folder)):
                with contextlib.suppress(OSError):
                    found = syscalls.stat(name, dir_fd=self.folder, follow_symlinks=False)
                    now = syscalls.fstat(self.image.fd).st_mtime  # by the clock of the same server
                    if found.st_mtime < min(now, time.time()) - LEFT_SECONDS:
                        syscalls.unlink(name, dir_fd=self.folder)

    # --------------------------------------------------------------------------------------------------- on the way

    def file(self, kind: str) -> SparseFile:
        """The file of that kind, as it was left."""
        return SparseFile(self._opened(kind))

    def path(self, kind: str) -> Path:
        """Where that file lies."""
        return (self.address.root / self.address.path).parent / self._name(kind)

    def note(self, **changes: Any) -> None:
        """Change the record, durably. The data that it speaks of has to be durable already."""
        with self._lock:
            self.record = replace(self.record, **changes)
            self._save()

    def _save(self) -> None:
        fd = own_files.make(self.folder, self._name(NEXT_RECORD), 0o600)
        try:
            syscalls.pwrite_all(fd, json.dumps(asdict(self.record)).encode(), 0)
            syscalls.fsync(fd)
        finally:
            syscalls.close(fd)
        own_files.rename(self.folder, self._name(NEXT_RECORD), self._name(RECORD))

    def check_room(self, need: int = 0) -> None:
        """Raises ForebayError where the store has no room for so many bytes more."""
        check_room(syscalls.room(self.image.fd), need, str(self.address.root))

    # ------------------------------------------------------------------------------------------------------- its end

    def publish(self, size: int) -> None:
        """Give the image its size and, when it is durable, its name. Raises ForebayError where that was taken."""
        syscalls.ftruncate(self.image.fd, size)
        mark(self.image.fd, size)
        syscalls.fsync(self.image.fd)
        give_name(self.address, self.folder, self._name(IMAGE))
        self.drop()

    def drop(self) -> None:
        """End it, and remove what there is. Raises nothing."""
        self._remove_all()
        self._close()

    def keep(self) -> None:
        """End it, and leave what there is for the next run. Raises nothing."""
        self._close()

    def _remove_all(self) -> None:
        for kind in _KINDS:
            with contextlib.suppress(OSError):
                syscalls.unlink(self._name(kind), dir_fd=self.folder)

    def _close(self) -> None:
        for fd in (*self._open, self.folder):
            with contextlib.suppress(OSError):
                syscalls.close(fd)


def _host() -> str:
    """What tells this host from others that see the store."""
    with contextlib.suppress(OSError):
        return Path("/etc/machine-id").read_text()
    return os.uname().nodename
