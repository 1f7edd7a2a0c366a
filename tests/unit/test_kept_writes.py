# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is written again after a flush that failed: of each byte what was written last, and nothing twice."""

import random
from collections.abc import Iterable

import pytest

from forebay.image.kept import Change, newest_only

SIZE = 64


def play(changes: Iterable[Change], content: bytearray) -> bytearray:
    for change in changes:
        content[change.offset : change.offset + change.length] = change.data or bytes(change.length)
    return content


@pytest.mark.parametrize("seed", range(100))
def test_older_data_never_takes_the_place_of_newer(seed: int) -> None:
    dice = random.Random(seed)
    changes = []
    for number in range(dice.randrange(1, 24)):
        offset = dice.randrange(SIZE)
        length = dice.randrange(1, SIZE - offset + 1)
        data = None if dice.random() < 0.3 else bytes([number + 1]) * length
        changes.append(Change(offset, length, data))
    now = play(changes, bytearray(b"\xff" * SIZE))
    again = newest_only(changes)
    dice.shuffle(again)  # they do not overlap
    for until in range(len(again) + 1):  # a kill after each
        assert play(again[:until], bytearray(now)) == now
    assert play(again, bytearray(b"\xff" * SIZE)) == now
    touched = {at for c in changes for at in range(c.offset, c.offset + c.length)}
    assert sum(change.length for change in again) == len(touched)
