# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Applying a committed redo journal: how far that is, noted behind its last record, and whether it may go on.

An image that somebody changed after the commit, or that is a copy at another place, must not be written without
asking. Its times tell, as long as nothing of the journal is applied. Our own writes change them, too, so that it is
noted durably that they may begin, once more right before the first; and every few megabytes, not durably, below which
offset the image has all of it. After a kill of the process that is exact, and what the image holds there is compared.
Of some places all over the checkpoint it is noted what the image held before: they have to hold that, or what the
checkpoint has for them. After a power cut, and on another host, only the times are left.

Everything here blocks, and raises OSError.
"""

import errno
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from forebay.origin.calls import (
    IOV_MAX,
    PUNCH_HOLE,
    UNSUPPORTED,
    ZERO_RANGE,
    SystemCalls,
    written_runs,
)
from forebay.origin.worker import syscalls
from forebay.sidecar.record import boot_id
from forebay_cache.format.geometry import Buffer

SLACK_NS = 60 * 10**9
"""How much later the image may have been written than the journal: a file server gives times when data reaches it."""

BEGUN = 1
"""What is noted right before the first write, as the byte below which all is applied: nothing is."""

PLACES = 16
"""Of so many places of a checkpoint, at least, if it has as many, it is noted what the image held before."""

LONGEST_PLACE = 4096
"""Bytes of such a place: a write is whole in it, or not there."""

_NOTE = struct.Struct("<8s40sQ")
_BEFORE = struct.Struct("<QQQQ")
_FARTHEST = 1 << 62
_SUM = struct.Struct("<Q")
_MAGIC = b"FBAPPLY\0"
_PIECE = 4 << 20
_zeros = bytes(1 << 20)


@dataclass(frozen=True)
class Progress:
    """What is noted once applying has begun."""

    boot: str
    """The boot id of the host; empty where it is not known."""
    below: int
    """Below this byte the image had all of the checkpoint, though not durably; 0: no write had begun."""


@dataclass(frozen=True)
class Place:
    """Some bytes of a checkpoint."""

    offset: int
    """Of the image."""
    length: int
    data: int
    """The byte of the journal at which the checkpoint has them."""


class Places:
    """Some places of a journal that is being written, evenly spread over all that were told."""

    def __init__(self) -> None:
        self.chosen: list[Place] = []
        """At most twice PLACES."""
        self._told = 0
        self._every = 1

    def add(self, offset: int, length: int, data: int) -> None:
        """Tell of a range that has data."""
        if self._told % self._every == 0:
            self.chosen.append(Place(offset, min(length, LONGEST_PLACE), data))
        self._told += 1
        if len(self.chosen) > 2 * PLACES:
            del self.chosen[1::2]
            self._every *= 2


Before = Sequence[tuple[Place, Buffer]]
"""What the image held at some places before any of the checkpoint was applied."""


def write_before(journal: int, at: int, before: Before) -> None:
    """Note behind the note at byte `at` of the open journal what the image held; before that note says BEGUN."""
    body = b"".join(
        _BEFORE.pack(place.offset, place.length, place.data, xxh3_64_intdigest(held))
        for place, held in before
    )
    syscalls.pwrite(journal, body + _SUM.pack(xxh3_64_intdigest(body)), at + _NOTE.size + _SUM.size)


def _holds_else(journal: int, image: int, at: int) -> bool:
    """True if the image holds at one of those places neither what it held before nor what the journal has for it."""
    raw = syscalls.pread(
        journal, _BEFORE.size * 2 * PLACES + _SUM.size, at + _NOTE.size + _SUM.size
    )
    body, end = raw[: -_SUM.size], raw[-_SUM.size :]
    if not body or len(body) % _BEFORE.size or end != _SUM.pack(xxh3_64_intdigest(body)):
        return False  # nothing was noted, or not all of it
    for offset, length, data, held in _BEFORE.iter_unpack(body):
        if length > LONGEST_PLACE or max(offset, data) >= _FARTHEST:
            return False
        now = syscalls.pread(image, length, offset)
        if xxh3_64_intdigest(now) != held and now != syscalls.pread(journal, length, data):
            return True
    return False


def write_note(journal: int, at: int, below: int, *, durable: bool) -> None:
    """Note at byte `at` of the open journal that all below that byte of the image is applied."""
    body = _NOTE.pack(_MAGIC, boot_id().encode()[:40], below)
    syscalls.pwrite(journal, body + _SUM.pack(xxh3_64_intdigest(body)), at)
    if durable:
        syscalls.fdatasync(journal)


def read_note(journal: int, at: int) -> Progress | None:
    """What is noted there; None if applying has not begun."""
    raw = syscalls.pread(journal, _NOTE.size + _SUM.size, at)
    if not raw:
        return None
    body = raw[: _NOTE.size]
    if len(raw) < _NOTE.size + _SUM.size or _SUM.unpack(raw[_NOTE.size :]) != (
        xxh3_64_intdigest(body),
    ):
        return Progress("", 0)  # it was cut off
    _magic, boot, below = _NOTE.unpack(body)
    return Progress(boot.rstrip(b"\0").decode("ascii", "replace"), below)


def has_changed(
    journal: int, image: int, mtime_ns: int, at: int, records: Iterable[tuple[int, int, int]]
) -> bool:
    """True if somebody else has written the open image since a journal was committed.

    `mtime_ns` is the image's at the commit, `at` is where the note lies; `records` are offset in the image, length,
    and the byte of the journal at which the data lies, of each record that has data.
    """
    found = SystemCalls().status(image).mtime_ns
    if found == mtime_ns:
        return False
    progress = read_note(journal, at)
    if progress is None or found < mtime_ns:
        return True
    if found > syscalls.fstat(journal).st_mtime_ns + SLACK_NS:
        return True
    if not progress.boot or progress.boot != boot_id():
        return False
    if progress.below < BEGUN:
        return True
    return _holds_else(journal, image, at) or any(
        not _is_same(journal, image, offset, length, data)
        for offset, length, data in records
        if offset + length <= progress.below
    )


def _is_same(journal: int, image: int, offset: int, length: int, data: int) -> bool:
    """True if the image holds what the journal has for that range."""
    for start in range(0, length, _PIECE):
        part = min(_PIECE, length - start)
        if syscalls.pread(image, part, offset + start) != syscalls.pread(
            journal, part, data + start
        ):
            return False
    return True


def apply(
    fd: int,
    image: int,
    calls: SystemCalls,
    offset: int,
    length: int,
    at: int | None,
    may_trim: bool = True,
) -> None:
    """Write one record, whose data lies at byte `at` of the journal `fd`, to the image; None: zeros, see `_zero`."""
    if at is None:
        _zero(image, calls, offset, length, may_trim=may_trim)
        return
    while length:
        data = syscalls.pread(fd, min(_PIECE, length), at)
        write_all(image, [data], offset)
        at, offset, length = at + len(data), offset + len(data), length - len(data)


def _zero(image: int, calls: SystemCalls, offset: int, length: int, *, may_trim: bool) -> None:
    """Make a range of the image read as zeros. All of it has space then; with `may_trim` none that can do without."""
    try:
        calls.fallocate(image, PUNCH_HOLE if may_trim else ZERO_RANGE, offset, length)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        end = offset + length
        for first, behind in (
            written_runs(calls, image, offset, end) if may_trim else [(offset, end)]
        ):
            for at in range(first, behind, len(_zeros)):
                write_all(image, [_zeros[: min(len(_zeros), behind - at)]], at)


def write_all(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write all of the buffers one after the other."""
    views = [memoryview(buffer) for buffer in buffers]
    while views:
        count = syscalls.pwritev(fd, views[:IOV_MAX], offset)
        if count == 0:
            raise OSError(errno.EIO, "nothing could be written")
        offset += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
