# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is offered of an image that is staged: taken when all of a piece is there and right, aside until then."""

import itertools
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.disk.disk import Disk
from forebay.staging.aside import MOST_PARTS, Room
from forebay.staging.pieces import Pieces
from forebay.staging.torrent import LEAF, Torrent, piece_hash, width_of

PIECE = 256 << 10
SIZE = 3 * PIECE + 5000
CONTENT = random.Random(1).randbytes(SIZE)


class Image:
    """What pieces need of a disk, and of its image; `taken` is what became clean data, `read` what was read of it."""

    def __init__(self) -> None:
        self.taken: dict[int, bytes] = {}
        self.read_at: list[int] = []
        image = SimpleNamespace(
            key="images:a.raw",
            layer=object(),
            conflict=None,
            filler=SimpleNamespace(take=self.take),
        )
        self.disk = SimpleNamespace(
            name="a", size=SIZE, image=image, read=self.read, unreadable=None, pin=None, unpin=None
        )

    async def take(self, _layer: object, offset: int, data: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.taken[offset] = bytes(data)

    async def read(self, offset: int, length: int) -> list[bytes]:
        self.read_at.append(offset)
        return [CONTENT[offset : offset + length]]


def pieces_of(image: Image, room: Room | None = None) -> Pieces:
    width = width_of(SIZE, PIECE)
    hashes = [
        piece_hash(memoryview(CONTENT)[at : at + PIECE], width) for at in range(0, SIZE, PIECE)
    ]
    torrent = Torrent(SIZE, PIECE, b"".join(hashes), 1, 1)
    return Pieces(cast("Disk", image.disk), torrent, room or Room())


async def offer(pieces: Pieces, start: int, stop: int, content: bytes = CONTENT) -> None:
    await pieces.write(start, memoryview(content)[start:stop], False)


async def read(pieces: Pieces, offset: int, length: int) -> bytes:
    return b"".join(map(bytes, await pieces.read(offset, length)))


def spans() -> list[tuple[int, int]]:
    return [(at, min(at + PIECE, SIZE)) for at in range(0, SIZE, PIECE)]


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_piece_that_comes_in_parts_is_taken_wherever_they_end(data: st.DataObject) -> None:
    """The kernel cuts a large write where a page of the writer's memory ends: at any byte of the file."""
    cuts = sorted({0, SIZE, *data.draw(st.lists(st.integers(1, SIZE - 1), max_size=20))})
    parts = data.draw(st.permutations(list(itertools.pairwise(cuts))))

    async def main() -> None:
        image = Image()
        pieces = pieces_of(image)
        for start, stop in parts:
            await offer(pieces, start, stop)
        assert image.taken == {start: CONTENT[start:stop] for start, stop in spans()}
        assert (pieces.refused_pieces, pieces.aside.bytes, image.read_at) == (0, 0, [])

    trio.run(main)


async def test_what_is_aside_is_read_as_it_was_written_and_the_rest_as_the_image_is() -> None:
    image = Image()
    pieces = pieces_of(image)
    wrong = bytes(byte ^ 0xFF for byte in CONTENT)
    await offer(pieces, LEAF + 10, 4 * LEAF, wrong)
    assert await read(pieces, 0, 4 * LEAF) == CONTENT[: 2 * LEAF] + wrong[2 * LEAF : 4 * LEAF]
    assert image.read_at == [0, LEAF]
    assert image.taken == {}


async def test_a_wrong_piece_counts_once_and_is_looked_at_again_when_all_of_it_has_come_again() -> (
    None
):
    image = Image()
    pieces = pieces_of(image)
    wrong = bytes(byte ^ 0xFF for byte in CONTENT)
    middle = PIECE // 2 + 7
    for start, stop in ((0, middle), (middle, PIECE)):
        await offer(pieces, start, stop, wrong)
    assert (pieces.refused_pieces, image.taken) == (1, {})
    assert await read(pieces, 0, PIECE) == wrong[:PIECE]
    await offer(pieces, 0, middle)
    assert (pieces.refused_pieces, image.taken) == (1, {})
    assert await read(pieces, 0, LEAF) == CONTENT[:LEAF]
    assert await read(pieces, PIECE - LEAF, LEAF) == wrong[PIECE - LEAF : PIECE]
    await offer(pieces, middle, PIECE)
    assert (pieces.refused_pieces, image.taken) == (1, {0: CONTENT[:PIECE]})
    assert pieces.aside.bytes == 0


async def test_all_images_together_keep_no_more_aside_than_there_is_room_for() -> None:
    room = Room(4 * PIECE)
    images = [Image() for _ in range(5)]
    found = [pieces_of(image, room) for image in images]
    for pieces in found[:2]:
        for at in range(0, 3 * PIECE, PIECE):
            await offer(pieces, at, at + 10)
    assert [pieces.aside.bytes // PIECE for pieces in found] == [2, 2, 0, 0, 0]
    for pieces in found[2:]:
        await offer(pieces, 0, 10)
    kept = [pieces.aside.bytes // PIECE for pieces in found]
    assert (sum(kept), max(kept)) == (4, 1), "those that had most have given way"
    del pieces, found[:2]
    for at in (PIECE, 2 * PIECE):
        await offer(found[-1], at, at + 10)
    assert sum(pieces.aside.bytes for pieces in found) <= 4 * PIECE
    assert found[-1].aside.bytes >= 2 * PIECE, "an image that is gone takes no room"


async def test_a_piece_in_very_many_parts_is_not_kept() -> None:
    image = Image()
    pieces = pieces_of(image)
    for at in range(0, 2 * (MOST_PARTS + 1), 2):
        await offer(pieces, at, at + 1)
    assert pieces.aside.bytes == 0
    await offer(pieces, 0, PIECE)
    assert image.taken == {0: CONTENT[:PIECE]}


async def test_nothing_is_taken_of_an_image_that_has_changed() -> None:
    image = Image()
    pieces = pieces_of(image)
    await offer(pieces, 0, 10)
    cast("Any", image.disk.image).conflict = "changed"
    for start, stop in ((10, PIECE), (PIECE, 2 * PIECE)):
        with pytest.raises(OSError, match="changed"):
            await offer(pieces, start, stop)
    assert (image.taken, pieces.aside.bytes) == ({}, 0)
