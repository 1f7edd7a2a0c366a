# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an image in some format says of itself, read by us before any other program sees it, with bounds on all of it.

Whoever may write to a store may make such a file, and a guest may make of a raw disk what looks like one. So every
number is checked before it is used, and a file that would have its reader open other files is refused.

Everything here reads storage, so it blocks, and raises OSError.
"""

from dataclasses import dataclass

from forebay.errors import ForebayError
from forebay.origin.worker import syscalls

CONVERT = "convert it with qemu-img convert"

LARGEST = 1 << 46
"""Bytes of the largest virtual disk."""

SECTOR = 512
"""Every virtual disk is a multiple of so many bytes."""


@dataclass(frozen=True)
class Header:
    """What counts of what a file says."""

    format: str
    size: int
    """Bytes of the virtual disk."""
    backing: str | None = None
    """The name of the file that has what this one lacks, as it stands in this one."""
    backing_format: str | None = None
    """The format of that file; None where this one does not say."""
    not_writable: str | None = None
    """Why the image is only to be read, as the end of a sentence, and what to do; None if it may be written."""


class File:
    """An open file that is looked at."""

    def __init__(self, key: str, fd: int, length: int) -> None:
        """`key` names the image for messages; `length` in bytes."""
        self.key = key
        self.length = length
        self._fd = fd

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Exactly these bytes. Raises ForebayError where the file ends before: `what` is cut off."""
        if not 0 <= offset <= self.length - length:
            raise self.bad(f"{what} lies beyond its end")
        found = syscalls.pread(self._fd, length, offset)
        if len(found) != length:
            raise self.bad(f"{what} is cut off")
        return found

    def check_inside(self, offset: int, length: int, what: str) -> None:
        """Raise ForebayError unless so many bytes at that offset are in the file."""
        if not 0 <= offset <= self.length - length:
            raise self.bad(f"{what} lies beyond its end")

    def check_size(self, size: int) -> int:
        """The size of a virtual disk, if it can be that of one. Raises ForebayError."""
        if not SECTOR <= size <= LARGEST or size % SECTOR:
            raise self.bad(
                f"its virtual disk has {size} bytes: it has to be {SECTOR} bytes to 64 TiB"
            )
        return size

    def bad(self, why: str) -> ForebayError:
        """What to raise for a file that cannot be what it says, or is damaged."""
        return ForebayError(
            f"{self.key} is not a sound image: {why}: see qemu-img check, or restore it"
        )

    def text(self, raw: bytes, what: str) -> str:
        """Text that stands in the file. Raises ForebayError for what is none."""
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = ""
        if not text or not text.isprintable():
            raise self.bad(f"{what} has no name that can be read")
        return text

    def refused(self, what: str, instead: str) -> ForebayError:
        """What to raise for a file that is as it should be, and not served."""
        return ForebayError(f"{self.key} {what}: {instead}")
