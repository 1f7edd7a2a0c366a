# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Work that reads an image without a disk, a warm say, and the disks that come to that image meanwhile."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from forebay.daemon.disks import Disks
from forebay.errors import ForebayError


class FakeSource:
    """Of a disk, or of a warm, on the image with that key."""

    def __init__(self, key: str, *, writes: bool = False) -> None:
        self.key = key
        self.use = SimpleNamespace(disk="d", writes=writes)

    def is_same_image(self, other: "FakeSource") -> bool:
        return self.key == other.key


def source(key: str = "s:a.raw", *, writes: bool = False) -> Any:
    return FakeSource(key, writes=writes)


async def nobody(_disk: object) -> None:
    """No disk gives way."""


async def warm(disks: Disks, told: list[str]) -> None:
    """A warm that never ends by itself, and takes a while to let the image go."""
    try:
        async with disks.reading(source()) as writer:
            assert writer is None
            told.append("reads")
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(1)
                told.append("let go")
    except ForebayError as fault:
        told.append(str(fault))


@pytest.mark.parametrize("how", ["writer", "alone"])
async def test_a_disk_that_needs_the_image_alone_has_a_warm_let_it_go_first(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, how: str
) -> None:
    disks, told = Disks(), cast("list[str]", [])
    nursery.start_soon(warm, disks, told)
    await trio.testing.wait_all_tasks_blocked()
    other: Any = disks.arriving("vm", source(writes=True), nobody)
    async with other if how == "writer" else disks.alone(source()):
        assert told[:2] == ["reads", "let go"]
        nursery.start_soon(warm, disks, again := cast("list[str]", []))
        await trio.sleep(10)
        assert again == [], "it has to wait"
        assert "wanted by a disk meanwhile" in told[2]
    await trio.testing.wait_all_tasks_blocked()
    assert again == ["reads"]
    nursery.cancel_scope.cancel()


async def test_an_overlay_and_other_images_disturb_no_warm(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    disks, told = Disks(), cast("list[str]", [])
    nursery.start_soon(warm, disks, told)
    await trio.testing.wait_all_tasks_blocked()
    async with (
        disks.arriving("vm1", source(), nobody),
        disks.arriving("vm2", source("s:b.raw", writes=True), nobody),
        disks.alone(source("s:c.raw")),
    ):
        await trio.sleep(10)
    assert told == ["reads"]
    nursery.cancel_scope.cancel()


async def test_work_that_needs_the_image_as_it_is_keeps_a_writer_out_as_long_as_it_is_busy(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    disks, busy = Disks(), ["3 clients read it"]
    ended = trio.Event()

    async def read() -> None:
        with pytest.raises(ForebayError, match="wanted by a disk"):
            async with disks.reading(source(), lambda: busy[0] if busy else None):
                await trio.sleep_forever()
        ended.set()

    nursery.start_soon(read)
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(ForebayError, match="3 clients read it"):
        async with disks.arriving("vm", source(writes=True), nobody):
            raise AssertionError("it must not get here")
    assert not ended.is_set()
    async with disks.arriving("overlay", source(), nobody):
        pass
    busy.clear()
    async with disks.arriving("vm", source(writes=True), nobody):
        await ended.wait()


@pytest.mark.parametrize("writes", [False, True], ids=["overlay", "writer"])
async def test_no_disk_comes_to_an_image_that_a_commit_or_a_resolve_writes(writes: bool) -> None:
    """Not even where the image has no locks: it is an NBD server's, say."""
    disks = Disks()
    async with disks.alone(source()):
        with pytest.raises(
            ForebayError, match="being written by a commit or a resolve of disk 'd'"
        ):
            async with disks.arriving("vm", source(writes=writes), nobody):
                raise AssertionError("it must not get here")
        async with disks.arriving("vm", source("s:b.raw", writes=writes), nobody):
            assert disks.coming_to(source("s:b.raw")) == ["vm"]
    async with disks.arriving("vm", source(writes=writes), nobody):
        assert disks.coming_to(source()) == ["vm"]
    assert disks.coming_to(source()) == []
