# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an overlay has, as the file of its move: however it is cut, and whatever is wrong with it."""

import pytest

from forebay.carrying.pieces import BadPieceError, Parser, Piece, encoded
from forebay.libvirt import hook
from forebay.libvirt.domain import WantedDisk

MOVE, SIZE = "0123456789abcdef", 1 << 20
PIECES = [Piece(0, 4, memoryview(b"data")), Piece(4096, 8192), Piece(2, 3, memoryview(b"new"))]
WHOLE = b"".join(b"".join(encoded(MOVE, n, piece)) for n, piece in enumerate(PIECES))


@pytest.mark.parametrize("step", [1, 7, 52, len(WHOLE)])
def test_pieces_come_back_as_they_were(step: int) -> None:
    parser = Parser(MOVE, SIZE)
    found = [x for at in range(0, len(WHOLE), step) for x in parser.feed(WHOLE[at : at + step])]
    assert [(x.offset, x.length, x.data) for x in found] == [
        (x.offset, x.length, x.data) for x in PIECES
    ]
    assert parser.is_between_pieces()


def test_each_byte_that_is_changed_is_found() -> None:
    for at in range(len(WHOLE)):
        wrong = bytearray(WHOLE)
        wrong[at] ^= 1
        with pytest.raises(BadPieceError):
            Parser(MOVE, SIZE).feed(bytes(wrong))


def test_what_is_of_another_move_or_another_disk_is_refused() -> None:
    with pytest.raises(BadPieceError, match="another move"):
        Parser("f" * 16, SIZE).feed(WHOLE)
    with pytest.raises(BadPieceError, match="no range"):
        Parser(MOVE, 8192).feed(WHOLE)


def test_a_domain_says_that_its_overlay_takes_its_data_along() -> None:
    disk = WantedDisk("d", "images:d.raw", overlay=True, with_data=True)
    assert hook._coming(disk, 1e12)["with_data"] is True
    assert "with_data" not in hook._arguments(disk)
