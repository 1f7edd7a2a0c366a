# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Cutting what is to be written into calls of a bounded size, and the check of a range that all origins make."""

import errno
from collections.abc import Iterator, Sequence

from forebay.origin.calls import IOV_MAX, Buffer

WRITE_PIECE = 4 << 20
"""Bytes of one write call: a copy of it is made on the event loop, which takes under a millisecond."""

ZERO_PIECE = 1 << 20
"""Bytes of one call where zeros have to be written: each piece has the whole time-out for itself."""


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
