# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The replies that the server makes: success, errors, the data of a READ, extents. Nothing here awaits."""

from collections.abc import Callable

from forebay_nbd.protocol.events import ErrorChunk, NoneChunk, Request, SimpleReply
from forebay_nbd.protocol.requests import encode_reply
from forebay_nbd.protocol.wire import (
    CHUNK_DONE,
    CHUNK_HEADER,
    MAX_EXTENTS,
    STRUCTURED_REPLY_MAGIC,
    U64,
    Buffer,
    Chunk,
    Cmd,
    wire_errno,
)


def error_reply(request: Request, structured: bool, error: OSError) -> list[Buffer]:
    """The buffers of the reply to a request that failed; a structured one carries the text of `error`."""
    code = wire_errno(error.errno)
    if structured:
        return encode_reply(ErrorChunk(request.cookie, code, error.strerror or ""))
    return encode_reply(SimpleReply(request.cookie, code))


def refusal(structured: bool) -> Callable[[int, OSError], bytes]:
    """Makes the reply, to be sent as it is, to a WRITE that failed: (cookie, error)."""

    def made(cookie: int, error: OSError) -> bytes:
        return b"".join(error_reply(Request(Cmd.WRITE, 0, cookie), structured, error))

    return made


def success_reply(request: Request, structured: bool) -> list[Buffer]:
    """The buffers of the reply to a request that is done, and whose reply carries no data."""
    # "a read request MUST result in a structured reply"
    if structured and request.command == Cmd.READ:
        return encode_reply(NoneChunk(request.cookie))
    return encode_reply(SimpleReply(request.cookie))


def data_header(request: Request, structured: bool) -> bytes:
    """The bytes before the data in the reply to a READ; the data must be all that was asked for, and more than none."""
    if not structured:
        return bytes(encode_reply(SimpleReply(request.cookie))[0])
    size = U64.size + request.length
    head = CHUNK_HEADER.pack(
        STRUCTURED_REPLY_MAGIC, CHUNK_DONE, Chunk.OFFSET_DATA, request.cookie, size
    )
    return head + U64.pack(request.offset)


def clip_extents(
    found: list[tuple[int, int]],
    offset: int,
    length: int,
    size: int,
    one: bool,
    most: int = MAX_EXTENTS,
) -> tuple[tuple[int, int], ...]:
    """The extents (length, flags) to be sent in reply to a BLOCK_STATUS of [offset, offset + length).

    `found` are those that the export returned. Neighbours with equal flags become one, and at most `most` are returned.
    All but the last end inside the request ("the sum of the first N-1 extents MUST be less than the requested length"),
    the last one inside the export of `size` bytes and, with `one`, inside the request. Lengths fit 32 bits
    (CVE-2025-47711, CVE-2025-47712). Raises RuntimeError if nothing is left: that is a bug of the export.
    """
    merged: list[tuple[int, int]] = []
    covered = 0
    for extent, flags in found:
        count = min(extent, (length if one else size - offset) - covered)
        if count <= 0 or covered >= length:
            break
        covered += count
        if merged and merged[-1][1] == flags:
            merged[-1] = (merged[-1][0] + count, flags)
        elif len(merged) >= most:
            break
        else:
            merged.append((count, flags))
    if not merged:
        raise RuntimeError("the export told no extent")
    # A multiple of 64 KiB below 2^32, so that what follows a shortened extent stays aligned.
    whole = next((i for i, (count, _) in enumerate(merged) if count >> 32), None)
    if whole is not None:
        merged[whole:] = [((1 << 32) - (64 << 10), merged[whole][1])]
    return tuple(merged)
