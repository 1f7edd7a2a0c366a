# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A torrent is made: the image is brought into the cache, and its pieces are hashed as the cache has them.

So the store is read once, by the host that stages; that host has all of the image then, and gives it to the others.
"""

import trio

from forebay.checkpoint.counters import Counters
from forebay.checkpoint.steps import Progress
from forebay.disk.copy import STEP, Unread, bring_in
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.origin.protocol import Identity
from forebay.staging.torrent import (
    HASH,
    Torrent,
    piece_hash,
    piece_length_of,
    width_of,
    zero_hash,
)

AT_ONCE = 1 << 20
"""Bytes that are copied out of the cache in one go, for a thread to hash."""


async def make(disk: Disk, identity: Identity, counters: Counters, progress: Progress) -> Torrent:
    """The torrent of an image that looks like that. Raises ForebayError and OSError; also where it has changed.

    `counters` are charged with what is read of the store.
    """
    image, size = disk.image, disk.size
    try:
        length = piece_length_of(size)
    except ValueError as fault:
        raise ForebayError(f"{image.key}: {fault}") from None
    layer, width, hashes, unread = image.layer, width_of(size, length), [], Unread()
    zeros = zero_hash(length, width)
    progress(0, size)
    for start in range(0, size, max(STEP, length)):
        step = min(max(STEP, length), size - start)
        await bring_in(image, counters, start, step, unread)
        if unread.bytes:
            raise OSError(5, unread.text(image.key))
        data = await _read(disk, start, step)
        hashes.append(await trio.to_thread.run_sync(_hashed, data, length, width, zeros))
        progress(start + step, size)
    await image.look()
    if image.conflict is not None:
        raise ForebayError(image.conflict)
    found = Torrent(size, length, b"".join(hashes), identity.mtime_ns, identity.inode)
    known = image.identity
    if image.layer is not layer or not known.is_on_record() or known.differs_from(found.identity):
        raise ForebayError(f"{image.key} was changed while it was read: stage it again")
    assert len(found.hashes) == HASH * -(-size // length)
    return found


async def _read(disk: Disk, offset: int, length: int) -> bytearray:
    """Bytes of the image, from the cache, copied. Raises OSError."""
    found = bytearray()
    for at in range(offset, offset + length, AT_ONCE):
        for buffer in await disk.read(at, min(AT_ONCE, offset + length - at)):
            found += buffer
        await trio.lowlevel.checkpoint()
    return found


def _hashed(data: bytearray, length: int, width: int, zeros: bytes) -> bytes:
    """The hashes of pieces, one behind the other. For a thread."""
    view, none = memoryview(data), bytes(length)
    return b"".join(
        zeros if view[at : at + length] == none else piece_hash(view[at : at + length], width)
        for at in range(0, len(view), length)
    )
