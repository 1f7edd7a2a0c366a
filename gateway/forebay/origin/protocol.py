# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the rest of the gateway asks of an image where it lives: the protocol `Origin`, and what an image looked like.

`FileOrigin` (file.py), `BlockOrigin` (block.py) and `NbdOrigin` (nbd.py) implement it, and so does `Nothing`, the image
of a disk that has none.
"""

import contextlib
import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from forebay.origin.calls import Buffer
from forebay.origin.threads import Background

HOLE, ZERO = 1, 2
"""Flags of an extent: it takes no space, it reads as zeros. The numbers are those of NBD's base:allocation
(NBD_STATE_HOLE, NBD_STATE_ZERO)."""

MOST_EXTENTS = 4096
"""Extents that one call reports. The rest of a badly fragmented image counts as data, which is always true enough."""


@dataclass(frozen=True)
class Identity:
    """What an image looked like at some time. Another identity later means that somebody changed the image.

    An NBD export and a block device have nothing but a size: all else is 0.
    """

    size: int
    """Bytes."""
    mtime_ns: int = 0
    """Nanoseconds since the epoch, as `ctime_ns`."""
    ctime_ns: int = 0
    inode: int = 0

    @property
    def content(self) -> tuple[int, int, int]:
        """What differs after every change of what the image holds: size, time of the last write, inode."""
        return self.size, self.mtime_ns, self.inode


class Origin(Protocol):
    """An open image where it lives. All offsets and lengths are bytes.

    Every method raises OSError: ETIMEDOUT when the storage did not answer in time. Calls with `background` let the
    others of the same store go first; see `Background` in threads.py.
    """

    size: int
    read_only: bool
    label: str
    """The image as the operator wrote it, for messages."""
    timeout: float
    """How long a call may take, seconds. It may be changed at any time, for calls that begin then."""

    @property
    def sync_failures(self) -> int:
        """How many flushes so far ended without anybody knowing what they made durable.

        When the number has grown, everything since the last good flush has to be written again.
        """
        ...

    async def read(self, offset: int, length: int, background: Background = False) -> Buffer:
        """Exactly `length` bytes. What lies beyond the end of the image is zeros."""
        ...

    async def write(self, offset: int, data: Sequence[Buffer], background: bool = False) -> None:
        """Write the buffers one after the other from `offset`. Not durable before `flush`.

        After an error the range holds what was there before, the new data, or a mix.
        """
        ...

    async def write_ranges(
        self, ranges: Sequence[tuple[int, Buffer]], background: bool = False
    ) -> None:
        """Write several (offset, data), a few megabytes together. The buffers must not change any more.

        After an error each range holds what was there before, the new data, or a mix.
        """
        ...

    async def flush(self, *, times: bool = False) -> None:
        """Make durable every write that returned before; with `times`, the times that `identity` reports as well.

        After an error everything since the last good flush has to be written again.
        """
        ...

    @property
    def punches(self) -> bool | None:
        """Whether space can be given back; None until `ask_punches` was called. A refusal that comes later counts."""
        ...

    async def ask_punches(self) -> bool:
        """Whether space can be given back. To find out may change the times of the image, and nothing else of it."""
        ...

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Make a range read as zeros. All of it has space then; with `may_trim` none of it that can do without.

        Where space cannot be given back, `may_trim` leaves holes alone, and the rest keeps the space that it has.
        """
        ...

    async def trim(self, offset: int, length: int) -> None:
        """Give the space of a range back where that can be done. The range reads as zeros afterwards, always."""
        ...

    async def extents(
        self, offset: int, length: int, background: Background = False
    ) -> list[tuple[int, int]]:
        """(length, flags) of the extents one after the other, covering the range; the flags are HOLE and ZERO.

        What an NBD server tells may be a HOLE alone, which reads as anything; a file has both, or none.
        """
        ...

    async def identity(self) -> Identity:
        """What the image looks like now. ESTALE: it was deleted, or its name leads to another file now."""
        ...

    async def is_dead(self) -> bool:
        """True if all that is asked of this origin fails, and opening the image anew would help."""
        ...

    async def forget(self) -> None:
        """From now on read what is there now, and nothing that was kept in memory here: somebody else changed it."""
        ...

    async def quiesce(self) -> None:
        """Wait until no call that was given up can change the image any more. ETIMEDOUT: one still can."""
        ...

    async def close(self) -> None:
        """Let go of the image, without a flush."""
        ...


class Nothing:
    """Zeros that lie nowhere, and that nobody writes: under a disk that lies in the cache only."""

    read_only = True
    sync_failures = 0
    punches: bool | None = False
    timeout = 0.0

    def __init__(self, size: int, label: str) -> None:
        self.size = size
        self.label = label

    async def read(self, offset: int, length: int, background: Background = False) -> Buffer:
        """Zeros."""
        return bytes(length)

    async def write(self, offset: int, data: Sequence[Buffer], background: bool = False) -> None:
        """Refused."""
        raise OSError(errno.EROFS, f"{self.label} is not written")

    async def write_ranges(
        self, ranges: Sequence[tuple[int, Buffer]], background: bool = False
    ) -> None:
        """Refused."""
        raise OSError(errno.EROFS, f"{self.label} is not written")

    async def flush(self, *, times: bool = False) -> None:
        """Nothing was written."""

    async def ask_punches(self) -> bool:
        """There is no space to give back."""
        return False

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Refused."""
        raise OSError(errno.EROFS, f"{self.label} is not written")

    async def trim(self, offset: int, length: int) -> None:
        """Refused."""
        raise OSError(errno.EROFS, f"{self.label} is not written")

    async def extents(
        self, offset: int, length: int, background: Background = False
    ) -> list[tuple[int, int]]:
        """One hole."""
        return [(length, HOLE | ZERO)]

    async def identity(self) -> Identity:
        """Always the same."""
        return Identity(self.size)

    async def is_dead(self) -> bool:
        """Never."""
        return False

    async def forget(self) -> None:
        """Nothing was kept."""

    async def quiesce(self) -> None:
        """No call can be under way."""

    async def close(self) -> None:
        """Nothing is open."""


async def close_quietly(origin: Origin) -> None:
    """Close an origin that is of no use any more: not cancelled, and without an error."""
    with trio.CancelScope(shield=True), contextlib.suppress(OSError):
        await origin.close()
