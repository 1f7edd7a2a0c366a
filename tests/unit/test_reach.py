# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The way to an image that is withheld while an attempt to open it is under way."""

from typing import Any, cast

import trio
import trio.testing

from forebay.image.reach import ImageState, Reach


class Opening:
    """An image whose opening takes until `go` is set."""

    def __init__(self) -> None:
        self.go = trio.Event()
        self.let_go = 0
        self.reach = Reach("images:a", self._open, self._compare, self._let_go)

    async def _open(self) -> Any:
        await self.go.wait()
        return cast("Any", self)

    async def _compare(self, _origin: object) -> None:
        await trio.lowlevel.checkpoint()

    async def _let_go(self) -> None:
        self.let_go += 1

    async def close(self) -> None:
        raise AssertionError("it came just now")


async def test_an_image_that_comes_while_it_is_given_up_is_kept() -> None:
    opening, kept = Opening(), list[bool]()

    async def give_up() -> None:
        kept.append(not await opening.reach.withhold_unless_reached("nobody wants it"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(opening.reach.attempt)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(give_up)
        await trio.testing.wait_all_tasks_blocked()
        opening.go.set()
    assert kept == [True]
    assert (opening.reach.state, opening.reach.withheld) == (ImageState.REACHED, "")
    assert opening.let_go == 0


async def test_an_image_that_does_not_come_is_given_up() -> None:
    opening = Opening()
    assert await opening.reach.withhold_unless_reached("nobody wants it")
    opening.go.set()
    await opening.reach.attempt()
    assert (opening.reach.state, opening.reach.unreachable) == (ImageState.AWAY, "nobody wants it")
    assert opening.let_go == 1
