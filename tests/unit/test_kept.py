# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is kept of writes until they are durable (image/kept.py)."""

import pytest

from forebay.image.kept import OVERHEAD, Change, KeptInAll, KeptWrites


def kept(*changes: Change) -> KeptWrites:
    found = KeptWrites(KeptInAll())
    for change in changes:
        found.add(change)
    return found


A, B, C = (Change(n * 100, 100, bytes([n]) * 100) for n in range(3))


def test_what_had_ended_by_then_is_let_go_and_nothing_else() -> None:
    it = kept(A, B)
    position = it.position
    it.add(C)
    it.forget(position)
    assert it.ranges() == [(200, 100)]
    assert it.bytes == 100 + OVERHEAD


def test_a_cut_does_not_let_go_what_comes_before_it() -> None:
    it = kept(A)
    position = it.position
    it.add(B)
    it.add(C)
    it.leave_out(220, 10)
    it.forget(position)
    assert it.ranges() == [(100, 100), (200, 20), (230, 70)]
    it.forget(it.position)
    assert it.bytes == 0
    assert it.is_empty


@pytest.mark.parametrize(
    ("start", "length", "left"),
    [
        (0, 100, []),
        (0, 12, [(12, b"23456789")]),
        (15, 100, [(10, b"01234")]),
        (12, 2, [(10, b"01"), (14, b"456789")]),
        (20, 5, [(10, b"0123456789")]),
    ],
)
def test_a_change_without_a_part(start: int, length: int, left: list[tuple[int, bytes]]) -> None:
    change = Change(10, 10, b"0123456789")
    found = [(part.offset, part.data) for part in change.without(start, start + length)]
    assert found == left
