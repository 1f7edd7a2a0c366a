# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Whose turn it is: each owner of an image has a directory of its own in the one beside the image, named by its token.

In it lie the owner marker (`owner`, record.py) and the redo journal (redo.py), and nobody else ever makes, renames or
removes anything there while that token may still be the highest. So what a host that was cut off had sent, and its
kernel sends again minutes later, meets its own directory, or none. FENCING.md has the argument.

Older versions had these files in the directory beside the image itself: such a marker counts by its token too.

Everything here blocks, and raises OSError.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Self

from forebay.origin.addresses import FileAddress
from forebay.origin.worker import syscalls
from forebay.sidecar import own_files, redo
from forebay.sidecar.record import LARGEST, Owner, UnreadableError

MARKER, NEW_MARKER = "owner", "owner.new"
NAMES = (MARKER, NEW_MARKER, redo.NAME, redo.UNFINISHED)
"""The files of an owner, in the order in which they are removed: once the marker is gone nothing else counts."""

LINKED = (MARKER, redo.NAME)
"""The files to which links lead from the directory beside the image."""

LONGEST_OWNER = 64 << 10
"""Bytes of an owner marker that are read: what is longer was not written by a gateway."""

MOST = 256
"""Directories of owners that are looked at, at most: each owner removes those of before."""


class Tenure:
    """The directory of one owner, open; or that of all owners of before, for the files of older versions.

    `close`, or the end of a `with` block, closes it.
    """

    def __init__(
        self, token: int, fd: int, address: FileAddress, image: os.stat_result | None
    ) -> None:
        """`token` is 0 for the files of older versions. `fd` is the directory. `image` is what lies beside it."""
        self.token = token
        self.fd = fd
        self.owner: Owner | None = None
        """What its marker says, once `read` was called; None where there is none."""
        self._address = address
        self._image = image

    def __enter__(self) -> Self:
        """For `with`: the end of the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the directory. The second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            syscalls.close(fd)

    @property
    def highest(self) -> int:
        """The larger of its token and the one that its marker says."""
        return max(self.token, self.owner.token if self.owner is not None else 0)

    def place(self, name: str) -> str:
        """Where the file of that name lies, as seen from the directory beside the image."""
        return f"{self.token}/{name}" if self.token else name

    def has(self, name: str) -> bool:
        """True if something of that name lies there."""
        try:
            syscalls.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def read(self) -> Owner | None:
        """What the marker says; None if there is none. Raises UnreadableError."""
        self.owner = None
        with contextlib.suppress(FileNotFoundError):
            self.owner = self._read()
        return self.owner

    def _read(self) -> Owner:
        fd = -1
        try:
            fd = own_files.open_existing(self.fd, MARKER, self._image)
            return Owner.parse(syscalls.read(fd, LONGEST_OWNER))
        except ValueError as why:  # DoesNotCountError is one
            raise UnreadableError(self._address, self.place(MARKER), str(why)) from why
        finally:
            if fd >= 0:
                syscalls.close(fd)

    def write(self, owner: Owner) -> None:
        """Make it durable under its temporary name; `show` then gives it the marker's."""
        text = json.dumps(asdict(owner), indent=1) + "\n"
        fd = own_files.make(self.fd, NEW_MARKER, 0o644)
        try:
            syscalls.pwrite_all(fd, text.encode(), 0)
            syscalls.fsync(fd)
        finally:
            syscalls.close(fd)

    def show(self, owner: Owner) -> None:
        """Have the marker be what `write` wrote, durably."""
        own_files.rename(self.fd, NEW_MARKER, MARKER)
        syscalls.fsync(self.fd)
        self.owner = owner

    def empty(self) -> None:
        """Remove the files of this owner, the marker first and durably."""
        for name in NAMES:
            own_files.remove(self.fd, name)
            if name == MARKER:
                syscalls.fsync(self.fd)


def find(top: int, address: FileAddress, image: os.stat_result | None) -> Tenure | None:
    """The one whose token is the highest, read, which the caller closes; None where nobody left anything.

    `top` is the directory beside the image. Where no marker is left a committed journal counts for one. Raises
    UnreadableError for a marker that cannot be read, or cannot be found among too many.
    """
    with contextlib.ExitStack() as undo:
        older = undo.enter_context(Tenure(0, _again(top), address, image))
        if _has_file(top, MARKER):
            older.read()
        newest = _newest(top, address, image)
        if newest is not None:
            undo.enter_context(newest)
            if older.owner is None or older.owner.token <= newest.highest:
                undo.pop_all()
                older.close()
                return newest
        elif older.owner is None and not _has_file(top, redo.NAME):
            return None
        undo.pop_all()
        if newest is not None:
            newest.close()
        return older


def _again(directory: int) -> int:
    """Another descriptor of the open directory."""
    return syscalls.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)


def _newest(top: int, address: FileAddress, image: os.stat_result | None) -> Tenure | None:
    """The one of those with a directory that counts and has the highest token, read; None if there is none."""
    for number in numbers(top, address):
        fd = own_files.open_directory(top, str(number), image)
        if fd is None:
            continue
        tenure = Tenure(number, fd, address, image)
        try:
            if tenure.read() is not None or tenure.has(redo.NAME):
                return tenure
        except BaseException:
            tenure.close()
            raise
        tenure.close()  # its owner never came to be
    return None


def numbers(top: int, address: FileAddress) -> list[int]:
    """The tokens that directories, or whatever else lies there, are named by, the highest first.

    Raises UnreadableError where there are too many.
    """
    found = [int(name) for name in syscalls.listdir(top) if _is_token(name)]
    if len(found) > MOST:
        raise UnreadableError(
            address,
            MARKER,
            f"{len(found)} directories of owners lie beside it, and a gateway leaves one",
        )
    return sorted(found, reverse=True)


def _is_token(name: str) -> bool:
    """True if a directory of that name is one of an owner."""
    return (
        0 < len(name) <= len(str(LARGEST))
        and name.isascii()
        and name.isdecimal()
        and name == str(int(name))
        and 0 < int(name) <= LARGEST
    )


def next_token(taken: int) -> int:
    """The token after that one; 0 where there was none.

    It is one larger, so that of two who come after the same owner only one can make the directory of that name. Removed
    files take their token along; then it is the clock that keeps the next one larger.
    """
    return taken + 1 if taken else int(time.time())


# ------------------------------------------------------------------------------------------------------ the links


def _has_file(top: int, name: str) -> bool:
    """True if something of that name lies in that directory, and it is not the link that `point` makes.

    The links are for people, and for older versions, which stop at them. Here they count for nothing.
    """
    try:
        target = syscalls.readlink(name, dir_fd=top)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    number, _, linked = target.partition("/")
    return linked != name or not _is_token(number)


def point(top: int, token: int) -> None:
    """Have the links lead to the marker and the journal of that token. On a store without links: nothing.

    What lies there of an older version, which is beaten, gives way.
    """
    for name in LINKED:
        target = f"{token}/{name}"
        if _has_file(top, name):
            _replace(top, token, name)
            continue
        with contextlib.suppress(OSError):
            if syscalls.readlink(name, dir_fd=top) == target:
                continue
            syscalls.unlink(name, dir_fd=top)
        with contextlib.suppress(OSError):
            syscalls.symlink(target, name, dir_fd=top)


def _replace(top: int, token: int, name: str) -> None:
    """Put the link in the place of an older version's file, which must not be there any more afterwards."""
    temporary = f"{name}.{token}"
    try:
        with contextlib.suppress(FileNotFoundError):
            syscalls.unlink(temporary, dir_fd=top)
        syscalls.symlink(f"{token}/{name}", temporary, dir_fd=top)
        syscalls.rename(temporary, name, src_dir_fd=top, dst_dir_fd=top)
    except OSError:
        syscalls.unlink(name, dir_fd=top)
    syscalls.fsync(top)


def unpoint(top: int, token: int) -> None:
    """Remove the links, if they lead to what is of that token."""
    for name in LINKED:
        with contextlib.suppress(OSError):
            if syscalls.readlink(name, dir_fd=top) == f"{token}/{name}":
                syscalls.unlink(name, dir_fd=top)


# ------------------------------------------------------------------------------------------------ those of before


def sweep(top: int, address: FileAddress, below: int, image: os.stat_result | None) -> None:
    """Remove what owners with a token below that one left, and what older versions did. Raises OSError.

    A directory that does not count stays. So does one, without a marker, in which its owner, who does not know yet that
    it is beaten, goes on making files: it is removed the next time.
    """
    for number in numbers(top, address):
        if number < below:
            fd = own_files.open_directory(top, str(number), image)
            if fd is not None:
                with Tenure(number, fd, address, image) as tenure:
                    tenure.empty()
                with contextlib.suppress(OSError):
                    syscalls.rmdir(str(number), dir_fd=top)
    for name in _of_older_versions(top):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            syscalls.unlink(name, dir_fd=top)
    syscalls.fsync(top)


def _of_older_versions(top: int) -> Iterator[str]:
    """The names that older versions have given their files, and whoever takes over from one."""
    for name in syscalls.listdir(top):
        linked, _, token = name.partition(".")
        is_ours = name in (*NAMES, "lock") or (linked in LINKED and _is_token(token))
        if is_ours and _has_file(top, name):
            yield name
