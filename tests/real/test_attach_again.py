# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An attach of the very same thing once more is done, in whatever state the disk is; of another thing it is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from forebay.checkpoint.dirty import left_dirty
from forebay.daemon import disks
from forebay.daemon.attached import Absent, Attached
from forebay.daemon.gateway import Gateway
from forebay.errors import ForebayError
from forebay.image.image import Image
from forebay.units import MIB, Mode
from real.commands_bed import Bed, nothing, outcome
from real.gateway_process import GatewayProcess

A: dict[str, Any] = {"name": "d", "image": "images:a.raw", "mode": Mode.WRITE_BACK}

SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"image": "images:a.raw"}, {"image": "images:./a.raw"}),
    ({"mode": None}, {"mode": Mode.WRITE_THROUGH}),  # what its store says
    ({"overlay": True, "keep": True}, {"overlay": True}),
    ({"image": "scratch:4M"}, {"image": "scratch:4 MiB", "overlay": True}),
    ({"cache_size": 0}, {"cache_size": None}),
    ({"rates": {"iops": 5}}, {"rates": {"iops": 5, "bps": 0}}),
]
OTHER: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"image": "images:b.raw"}, "of images:a.raw"),
    ({}, {"image": "scratch:4M"}, "of images:a.raw"),
    ({}, {"mode": Mode.NONE}, "with another mode"),
    ({}, {"mode": None}, "with another mode"),
    ({}, {"cache_size": MIB}, "with another cache size"),
    ({}, {"preload": "all"}, "with another preload"),
    ({}, {"rates": {"iops_burst": 5}}, "with another iops burst"),
    ({}, {"read_only": True}, "which is not read-only"),
    ({"overlay": True}, {}, "which is an overlay"),
    ({"overlay": True}, {"overlay": True, "keep": True}, "whose changes are not kept"),
    ({"read_only": True}, {"read_only": True, "gives_way": True}, "which is not one that gives"),
    ({}, {"image_format": "raw"}, "which shows its image in another way"),
]


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    bed = Bed(tmp_path)
    for name in ("a.raw", "b.raw"):
        bed.image(name)
    return bed


def attach(gateway: Gateway, **changed: Any) -> Any:
    """Attach what A says, changed so."""
    return gateway.attach(**(A | changed))


async def somebody_waits_for(disk: Attached) -> None:
    """Return when somebody waits for the turn of the disk."""
    while not disk.busy.statistics().tasks_waiting:  # noqa: ASYNC110
        await trio.sleep(0.001)


async def test_the_same_is_done_and_anything_else_is_refused(bed: Bed) -> None:
    async with bed.life() as gateway:
        for first, then in SAME:
            assert not (await attach(gateway, **first))["attached_already"]
            told = await attach(gateway, **then)
            assert told["attached_already"], then
            await gateway.detach("d", discard=True, progress=nothing)
        for first, then, says in OTHER:
            await attach(gateway, **first)
            before = bed.told()
            said = await outcome(partial(attach, gateway, **then))
            assert f"'d' already, {says}" in said
            assert bed.told() == before
            await gateway.detach("d", progress=nothing)


async def test_of_many_at_once_one_attaches_and_the_others_find_that(bed: Bed) -> None:
    told: list[bool] = []

    async def one(gateway: Gateway) -> None:
        told.append((await attach(gateway))["attached_already"])

    async with bed.life() as gateway:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one, gateway)
        assert sorted(told) == [False] + 7 * [True]
        assert bed.told() == {"d": ("write-back", "ready")}


async def test_where_the_first_of_two_fails_the_second_tries_itself(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bed.life() as gateway:
        begun, tries = trio.Event(), []
        really = gateway._arrivals.attach

        async def fails_once(*arguments: Any, **how: Any) -> Any:
            tries.append(arguments)
            if len(tries) == 1:
                begun.set()
                await trio.testing.wait_all_tasks_blocked()
                raise ForebayError("planted")
            return await really(*arguments, **how)

        monkeypatch.setattr(gateway._arrivals, "attach", fails_once)
        results: list[str] = []

        async def one() -> None:
            results.append(await outcome(lambda: attach(gateway)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            await begun.wait()
            nursery.start_soon(one)
            refused = await outcome(lambda: attach(gateway, image="images:b.raw"))
            assert "'d' already, of images:a.raw" in refused, "it need not wait"
        assert (sorted(results), len(tries)) == (["", "planted"], 2)


async def test_while_it_is_detached_the_same_waits_and_is_attached_anew(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bed.life() as gateway:
        await attach(gateway)
        await bed.write("d")
        going, go_on = trio.Event(), trio.Event()
        first = bed.disk("d")
        really = first.drain

        async def slow(progress: Callable[[int, int], None]) -> None:
            going.set()
            await go_on.wait()
            await really(progress)

        monkeypatch.setattr(first, "drain", slow)
        told: list[Any] = []

        async def again() -> None:
            told.append(await attach(gateway))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(gateway.detach, "d", progress=nothing))
            await going.wait()
            nursery.start_soon(again)
            await somebody_waits_for(first)
            assert not told
            go_on.set()
        assert not told[0]["attached_already"]
        assert bed.disk("d") is not first
        await bed.starts_with("d", b"n")


async def test_a_detach_that_does_not_end_is_told(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bed.life() as gateway:
        await attach(gateway)
        monkeypatch.setattr(disks, "WAIT_SECONDS", 0.01)
        held, go_on = trio.Event(), trio.Event()

        async def change() -> None:
            async with bed.disk("d").busy:
                held.set()
                await go_on.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await held.wait()
            said = await outcome(lambda: attach(gateway))
            assert said.startswith(
                "'d' is being attached, detached or changed, for 0.01 s already: "
            )
            go_on.set()
        assert (await attach(gateway))["attached_already"]


async def test_a_detach_that_fails_leaves_the_disk_for_the_same(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bed.life() as gateway:
        await attach(gateway)
        going, go_on = trio.Event(), trio.Event()

        async def fails(_progress: object) -> None:
            going.set()
            await go_on.wait()
            raise OSError(5, "planted")

        monkeypatch.setattr(bed.disk("d"), "drain", fails)
        told: list[Any] = []

        async def again() -> None:
            told.append(await attach(gateway))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome, partial(gateway.detach, "d", progress=nothing))
            await going.wait()
            nursery.start_soon(again)
            await somebody_waits_for(bed.disk("d"))
            go_on.set()
        assert told[0]["attached_already"]


async def test_what_cannot_be_used_is_told_instead(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bed.life() as gateway:
        await attach(gateway)
        attached = bed.disk("d")
        with monkeypatch.context() as planted:
            planted.setattr(Image, "conflict", "planted")
            assert await outcome(lambda: attach(gateway)) == (
                "'d' is attached already, and is in conflict: planted"
            )
        attached.stop(ValueError("planted"))
        assert "'d' is stopped" in await outcome(lambda: attach(gateway))
        record = replace(attached.record, conflict="planted")
        await gateway.detach("d", progress=nothing)
        gateway._disks.add(Absent("d", record, "planted", lambda: left_dirty(gateway._cache, "d")))
        assert (
            await outcome(lambda: attach(gateway))
            == "'d' is attached already, and is not served: planted"
        )
        assert "of images:a.raw" in await outcome(lambda: attach(gateway, image="images:b.raw"))


@pytest.mark.parametrize("kill", [False, True])
def test_after_a_restart_it_is_still_the_same(gateway: GatewayProcess, kill: bool) -> None:
    (gateway.images / "a.raw").write_bytes(bytes(MIB))
    words = ["attach", "d", "images:a.raw", "--mode", "wb", "--cache-size", "1 MiB"]
    first = gateway.cli(*words)
    assert first.stderr.count("attached already") == 0
    gateway.restart(kill=kill)
    again = gateway.cli(*words)
    assert again.stdout == first.stdout
    assert "forebay: 'd' is attached already, just so" in again.stderr
    done = gateway.cli(*words[:3], check=False)
    assert done.returncode == 1
    assert "with another mode" in done.stderr
