# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A command that waited: it is done to the disk that it was said of, or to none."""

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from forebay.errors import ForebayError
from forebay.units import Mode
from real.commands_bed import NEW, Bed, nothing

Do = Callable[[Bed], Awaitable[object]]

TURNS: dict[str, Do] = {
    "detach": lambda bed: bed.gateway.detach("d", progress=nothing),
    "detach --force": lambda bed: bed.gateway.detach("d", force=True, progress=nothing),
    "detach --discard": lambda bed: bed.gateway.detach("d", discard=True, progress=nothing),
    "mode": lambda bed: bed.gateway.set_mode("d", Mode.WRITE_THROUGH, nothing),
}
"""Commands that wait for their turn."""

USES: dict[str, Do] = {
    "flush": lambda bed: bed.gateway.flush(["d"], progress=nothing),
    "flush --all": lambda bed: bed.gateway.flush(None, progress=nothing),
    "preload": lambda bed: bed.gateway.preload("d", "all", nothing),
}
"""Commands that work beside others."""


async def refused(do: Do, bed: Bed, told: list[str]) -> None:
    with pytest.raises(ForebayError) as fault:
        await do(bed)
    told.append(str(fault.value))


@pytest.mark.parametrize("command", TURNS)
async def test_a_command_that_waited_leaves_another_disk_of_that_name_alone(
    command: str, short_path: Path
) -> None:
    bed = Bed(short_path)
    for name in ("a.raw", "b.raw"):
        bed.image(name)
    told: list[str] = []
    async with bed.life() as gateway:
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_BACK)
        await gateway.attach("e", "images:b.raw", mode=Mode.WRITE_BACK)
        await bed.write("e")
        old, new = bed.disk("d"), bed.disk("e")
        async with trio.open_nursery() as nursery, old.busy:
            nursery.start_soon(refused, TURNS[command], bed, told)
            await trio.testing.wait_all_tasks_blocked()
            gateway._disks._known["d"] = new  # the one before was detached, and this one came
        assert told == [
            "'d' was detached while this waited, and nothing was done: see forebay status"
        ]
        assert gateway._disks.find("d") is new
        assert (new.disk.mode, new.disk.dirty_bytes) == (Mode.WRITE_BACK, 65536)
        gateway._disks._known["d"] = old
        await bed.starts_with("e", NEW)


@pytest.mark.parametrize("command", TURNS)
async def test_a_command_that_waited_for_a_detach_finds_no_disk(
    command: str, short_path: Path
) -> None:
    bed = Bed(short_path)
    bed.image("a.raw")
    told: list[str] = []
    async with bed.life() as gateway:
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_BACK)
        async with trio.open_nursery() as nursery, bed.disk("d").busy:
            nursery.start_soon(partial(gateway.detach, "d", progress=nothing))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(refused, TURNS[command], bed, told)
            await trio.testing.wait_all_tasks_blocked()
        assert len(told) == 1
        assert not bed.told()


@pytest.mark.parametrize("command", USES)
async def test_what_a_command_does_with_a_disk_ends_with_the_disk(
    command: str, short_path: Path
) -> None:
    bed = Bed(short_path)
    bed.image("a.raw")
    told: list[str] = []
    async with bed.life() as gateway:
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_BACK)
        old: Any = bed.disk("d")
        drain = old.drain

        async def for_ever(*_: object) -> None:
            old.drain = drain  # for the detach
            await trio.sleep_forever()

        old.drain = old.disk.preload = for_ever
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(refused, USES[command], bed, told)
                await trio.testing.wait_all_tasks_blocked()
                old.drain = drain
                await gateway.detach("d", progress=nothing)
        assert told == ["'d' was detached meanwhile: see forebay status"]


async def test_a_disk_that_is_just_coming_is_detached_once_it_is_there(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed = Bed(short_path)
    bed.image("a.raw")
    async with bed.life() as gateway:
        go_on = trio.Event()
        commit = gateway._records.commit

        async def held() -> None:
            await go_on.wait()
            await commit()

        monkeypatch.setattr(gateway._records, "commit", held)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.attach, "d", "images:a.raw")
            with trio.fail_after(10):
                while not bed.told():  # noqa: ASYNC110  (nobody tells)
                    await trio.sleep(0.01)
            nursery.start_soon(partial(gateway.detach, "d", progress=nothing))
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        assert not bed.told()


async def test_an_operators_mode_is_not_undone_by_one_that_a_start_was_still_leaving(
    short_path: Path,
) -> None:
    bed = Bed(short_path)
    bed.image("a.raw")
    async with bed.life() as gateway:
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_BACK)
        watch = bed.disk("d").disk._watch
        watch.target = Mode.WRITE_THROUGH  # the start found it so
        await gateway.set_mode("d", Mode.WRITE_BACK, nothing)
        await watch._change_over(Mode.WRITE_THROUGH)
        assert bed.told()["d"][0] == "write-back"
