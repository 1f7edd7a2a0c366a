# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is written again after a flush that failed: of each byte what was written last, and nothing twice."""

import random
from collections.abc import Iterable, Sequence
from typing import cast

import pytest
import trio

from forebay.image import kept
from forebay.image.kept import Change
from forebay.origin.protocol import Origin

SIZE = 64


def play(changes: Iterable[Change], content: bytearray) -> bytearray:
    for change in changes:
        content[change.offset : change.offset + change.length] = change.data or bytes(change.length)
    return content


def some_changes(dice: random.Random) -> list[Change]:
    changes = []
    for number in range(dice.randrange(1, 24)):
        offset = dice.randrange(SIZE)
        length = dice.randrange(1, SIZE - offset + 1)
        data = None if dice.random() < 0.3 else bytes([number + 1]) * length
        changes.append(Change(offset, length, data))
    return changes


class Image:
    """An origin that notes each thing that is written to it."""

    def __init__(self) -> None:
        self.done: list[Change] = []

    async def write_ranges(
        self, ranges: Sequence[tuple[int, bytes]], background: bool = False
    ) -> None:
        self.done += [Change(offset, len(data), data) for offset, data in ranges]

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        self.done.append(Change(offset, length, None, may_trim))


@pytest.mark.parametrize("together", [1, 8, 1 << 20])
@pytest.mark.parametrize("seed", range(60))
async def test_older_data_never_takes_the_place_of_newer(
    seed: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "TOGETHER", together)
    changes = some_changes(random.Random(seed))
    now = play(changes, bytearray(b"\xff" * SIZE))
    writes, image = kept.KeptWrites(kept.KeptInAll()), Image()
    for change in changes:
        writes.add(change)
    await writes.write_again(cast("Origin", image))
    for until in range(len(image.done) + 1):  # a kill after each
        assert play(image.done[:until], bytearray(now)) == now
    assert play(image.done, bytearray(b"\xff" * SIZE)) == now, "all of it was lost"
    touched = {at for c in changes for at in range(c.offset, c.offset + c.length)}
    assert sum(change.length for change in image.done) == len(touched), "nothing twice"


async def test_looking_for_what_is_newest_gives_others_their_turn() -> None:
    changes = [Change(n * 4096, 4096, bytes(4096)) for n in range(3 * kept.SLICE)]
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        assert len(await kept.newest_only(changes)) == len(changes)
        nursery.cancel_scope.cancel()
    assert turns >= 2
