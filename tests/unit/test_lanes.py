# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The queue in front of a store: who goes first, and what becomes of a call that somebody comes to need."""

import trio
import trio.testing

from forebay.origin.threads import BACKGROUND_PATIENCE, Background, Lanes


class Calls:
    """Calls that go on until they are let end."""

    def __init__(self, nursery: trio.Nursery, foreground: int = 1, background: int = 1) -> None:
        self.lanes = Lanes(foreground, background)
        self.at_work: list[str] = []
        self._ends: dict[str, trio.Event] = {}
        self._nursery = nursery

    async def begin(self, name: str, background: Background) -> None:
        self._ends[name] = trio.Event()
        self._nursery.start_soon(self._run, name, background)
        await trio.testing.wait_all_tasks_blocked()

    async def _run(self, name: str, background: Background) -> None:
        with self.lanes.queue(background) as place:
            async with place:
                self.at_work.append(name)
                await self._ends[name].wait()
                self.at_work.remove(name)

    async def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()
        await trio.testing.wait_all_tasks_blocked()


async def test_reads_ahead_take_no_place_of_those_that_guests_wait_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        calls = Calls(nursery, foreground=2, background=2)
        for n in range(8):
            await calls.begin(f"ahead {n}", trio.Event())
        await trio.sleep(BACKGROUND_PATIENCE)
        await calls.begin("guest", background=False)
        assert calls.at_work == ["ahead 0", "ahead 1", "guest"]
        assert calls.lanes.busy == (1, 2)
        nursery.cancel_scope.cancel()


async def test_what_somebody_comes_to_need_waits_behind_nobody_else(
    autojump_clock: trio.testing.MockClock,
) -> None:
    needed = trio.Event()
    async with trio.open_nursery() as nursery:
        calls = Calls(nursery)
        for n in range(3):
            await calls.begin(f"ahead {n}", trio.Event())
        await calls.begin("needed", needed)
        needed.set()
        await trio.testing.wait_all_tasks_blocked()
        assert calls.at_work == ["ahead 0", "needed"]
        assert calls.lanes.busy == (1, 1)
        await calls.begin("late", background=True)
        await calls.end("needed", "ahead 0", "ahead 1", "ahead 2")
        assert calls.at_work == ["late"], "nothing is held any more by who has changed the lane"
        await calls.end("late")
    assert calls.lanes.busy == (0, 0)


async def test_a_read_ahead_goes_when_guests_have_gone_or_after_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        calls = Calls(nursery)
        await calls.begin("guest", background=False)
        await calls.begin("ahead", trio.Event())
        assert calls.at_work == ["guest"]
        await trio.sleep(BACKGROUND_PATIENCE * 1.01)
        assert calls.at_work == ["guest", "ahead"]
        await calls.end("guest", "ahead")


async def test_reads_ahead_do_not_keep_write_back_from_going_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        calls = Calls(nursery)
        for n in range(8):
            await calls.begin(f"ahead {n}", trio.Event())
        await calls.begin("write-back", background=True)
        assert calls.at_work == ["ahead 0", "write-back"]
        nursery.cancel_scope.cancel()


async def test_a_call_that_is_given_up_while_it_waits_leaves_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    for needed in (False, True):
        event = trio.Event()
        async with trio.open_nursery() as nursery:
            calls = Calls(nursery)
            await calls.begin("guest", background=False)
            await calls.begin("first", trio.Event())
            await calls.begin("ahead", event)
            if needed:
                event.set()
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert calls.lanes.busy == (0, 0)
        async with trio.open_nursery() as calls._nursery:
            await calls.begin("guest 2", background=False)
            await calls.end("guest 2")
