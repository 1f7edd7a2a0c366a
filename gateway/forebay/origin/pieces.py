# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Cutting what is to be written into calls of a bounded size; ranges of bytes, and the check that all origins make."""

import errno
from collections.abc import Iterable, Iterator, Sequence

from forebay.origin.calls import IOV_MAX, Buffer

WRITE_PIECE = 4 << 20
"""Bytes of one write call: a copy of it is made on the event loop, which takes under a millisecond."""

ZERO_PIECE = 1 << 20
"""Bytes of one call where zeros have to be written: each piece has the whole time-out for itself."""


SPARSE = 64 << 10
"""Bytes that are left out of a new image together where they are zeros, and lie at a multiple of that."""

_ZEROS = bytes(SPARSE)


def data_in(offset: int, data: bytes) -> Iterator[tuple[int, memoryview]]:
    """(offset, data) of what is to be written of it: without blocks that are zeros, and what lies side by side as one.

    A comparison with zeros looks at 40 GB in a second, and ends at the first byte that is none.
    """
    view, start, at = memoryview(data), 0, 0
    while at < len(data):
        end = min(at + SPARSE - (offset + at) % SPARSE, len(data))
        if data.startswith(_ZEROS if end - at == SPARSE else _ZEROS[: end - at], at):
            if start < at:
                yield offset + start, view[start:at]
            start = end
        at = end
    if start < at:
        yield offset + start, view[start:]


def check_range(label: str, size: int, offset: int, length: int) -> None:
    """Raise OSError(EINVAL) unless the range lies in an image of `size` bytes. `label` names the image."""
    if offset < 0 or length < 0 or offset + length > size:
        raise OSError(errno.EINVAL, f"{label} has {size} bytes: none at {offset} + {length}")


def pieces(data: Sequence[Buffer]) -> Iterator[tuple[list[Buffer], int]]:
    """The data again, in lists of at most WRITE_PIECE bytes and IOV_MAX buffers, each with its length in bytes.

    Buffers that could change later are copied, just before their list is asked for.
    """
    piece: list[Buffer] = []
    room = WRITE_PIECE
    for buffer in data:
        view = memoryview(buffer).cast("B")
        fixed = isinstance(view.obj, bytes)
        while len(view):
            part, view = view[:room], view[room:]
            piece.append(part if fixed else bytes(part))
            room -= len(part)
            if room == 0 or len(piece) == IOV_MAX:
                yield piece, WRITE_PIECE - room
                piece, room = [], WRITE_PIECE
    if piece:
        yield piece, WRITE_PIECE - room


def views_after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` without their first `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges, each (first byte, byte behind the last), in order, those that touch made one; no empty ones."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif start < end:
            found.append((start, end))
    return found


def overlap(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> bool:
    """True if a byte lies in ranges of both lists, each as `joined` returns them."""
    i = j = 0
    while i < len(one) and j < len(other):
        if one[i][1] <= other[j][0]:
            i += 1
        elif other[j][1] <= one[i][0]:
            j += 1
        else:
            return True
    return False
