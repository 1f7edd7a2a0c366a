# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A running VM moves from one gateway to another: nothing acknowledged is missing, and never do two write.

At one call of either host to the store that host is killed, or the call fails, or the host is cut off for a while, or
both are; or its clock jumps, or somebody gives a command once more. Every call, on either host, with every fault, is a
case. Some are tried by default, chosen by the seed; ``FOREBAY_MOVES=500`` tries so many, ``FOREBAY_MOVES=all`` all of
them, and ``FOREBAY_MOVE_CASE`` the one that a failure names.
"""

import errno
import itertools
import os
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing

from forebay.boot.encoding import decoded, encoded
from forebay.errors import ForebayError
from forebay.handover import giving, hot
from forebay.handover.giving import Giving
from forebay.image.reach import Reach
from forebay.origin.addresses import FileAddress
from forebay.sidecar import incoming
from forebay.sidecar.files import read_owner
from forebay.sidecar.marker import Marker
from forebay.sidecar.record import Owner
from forebay.sidecar.tenure import Tenure
from forebay.units import Mode
from forebay_cache.format.geometry import BLOCK
from real.commands_bed import Bed, nothing
from real.moving_bed import Bed2, Fault, until

LOGGED = "(?s).*"
MOVES = os.environ.get("FOREBAY_MOVES", "8")
KINDS = (
    "kill before", "kill after", "fail before", "fail after", "cut", "away", "clock", "again"
)  # fmt: skip
CALLS = 80
"""More than either host makes while the guest moves."""

CASES = [
    ".".join(case)
    for case in itertools.product(
        "ab", map(str, range(1, CALLS + 1)), KINDS, ("leaves", "stays"), ("moves", "fails")
    )
]


@asynccontextmanager
async def both(bed: Bed2) -> AsyncIterator[trio.Nursery]:
    """Both hosts, the disk on A with a guest that has written something."""
    async with trio.open_nursery() as nursery:
        bed.nursery = nursery
        nursery.start_soon(bed.a.run)
        nursery.start_soon(bed.b.run)
        await bed.a.up.wait()
        await bed.b.up.wait()
        await bed.a.gateway.attach("d", "images:vm.img")
        bed.a.clients = 1
        await bed.write(bed.a)
        yield nursery


def owner_of(bed: Bed2) -> str:
    """The gateway whose marker lies beside the image; empty if none does."""
    owner = read_owner(FileAddress("images", bed.image.parent, bed.image.name))
    return owner.gateway if owner is not None else ""


async def lived(bed: Bed2, *, stays: bool, fails: bool, faults: dict[str, Fault]) -> None:
    """A guest writes on A, moves to B (or not), and back."""
    # A host that was killed or cut off may have left its list of hot blocks, which the next one reads, and its wish,
    # which is removed when it has not changed for a minute. Never a marker, a lock or a journal.
    hit = any(fault.kind.startswith(("kill", "cut")) for fault in faults.values())
    may_stay = {hot.NAME, hot.NEW, incoming.NAME} if hit else set()
    with bed.planted():
        async with trio.open_nursery() as nursery:
            bed.nursery = nursery
            nursery.start_soon(bed.a.run)
            nursery.start_soon(bed.b.run)
            await bed.a.up.wait()
            await bed.b.up.wait()
            await bed.a.gateway.attach("d", "images:vm.img")
            bed.a.clients = 1
            for _ in range(4):
                await bed.write(bed.a)
            await bed.flush(bed.a)
            await bed.write(bed.a)
            bed.a.fault, bed.b.fault = faults.get("a", bed.a.fault), faults.get("b", bed.b.fault)
            now = await bed.move(bed.a, bed.b, stays=stays, fails=fails)
            await bed.check(now)
            other = bed.a if now is bed.b else bed.b
            await bed.detach(other)
            back = await bed.move(now, other, stays=not stays, fails=False)
            await bed.check(back)
            back.clients = now.clients = 0
            await bed.detach(now)
            await bed.detach(back)
            with trio.move_on_after(10):  # what a store did not take then is given back later
                await until(lambda: left(bed) <= may_stay)
            nursery.cancel_scope.cancel()
    whole = bed.image.read_bytes()
    for n, may_be in enumerate(bed.may_be):
        assert whole[n * 4096 : (n + 1) * 4096] in may_be, n
    assert not bed.faults, bed.faults
    assert left(bed) <= may_stay


def left(bed: Bed2) -> set[str]:
    """What lies beside the image; an empty directory has one name."""
    beside = bed.image.with_name("vm.img.forebay")
    try:
        return {one.name for one in beside.iterdir()} or {"."}
    except FileNotFoundError:
        return set()


@pytest.mark.parametrize("mode", [Mode.WRITE_BACK, Mode.WRITE_THROUGH, Mode.NONE])
@pytest.mark.parametrize("stays", [False, True], ids=["disconnects", "stays connected"])
@pytest.mark.parametrize("fails", [False, True], ids=["moves", "goes on where it was"])
async def test_a_guest_moves_there_and_back(
    mode: Mode, stays: bool, fails: bool, short_path: Path, rng: random.Random
) -> None:
    await lived(Bed2(short_path, rng, mode), stays=stays, fails=fails, faults={})


def chosen(rng: random.Random) -> list[str]:
    """The cases that are tried: of each kind of fault as many."""
    if one := os.environ.get("FOREBAY_MOVE_CASE"):
        return [one]
    if MOVES == "all":
        return CASES
    of = {kind: [case for case in CASES if f".{kind}." in case] for kind in KINDS}
    return [rng.choice(of[KINDS[n % len(KINDS)]]) for n in range(int(MOVES))]


@pytest.mark.timeout(86400 if MOVES == "all" else 60 + 20 * int(MOVES))
async def test_a_host_fails_at_one_of_its_calls_while_a_guest_moves(
    short_path: Path, expect_log: Callable[[str], None], rng: random.Random
) -> None:
    expect_log(LOGGED)
    hit = 0
    for n, case in enumerate(chosen(rng)):
        side, call, kind, stays, fails = case.split(".")
        fault = Fault(int(call), kind)
        print(case)
        bed = Bed2(short_path / str(n), random.Random(case))
        bed.a.skew, bed.b.skew = 3600.0, -86400.0  # no host's clock is right
        await lived(bed, stays=stays == "stays", fails=fails == "fails", faults={side: fault})
        hit += fault.hit
    assert hit or "FOREBAY_MOVE_CASE" in os.environ


@pytest.mark.parametrize("hostile", [b"", b"garbage", b"{}\n" + bytes(100)])
async def test_what_the_old_host_had_cached_is_brought_in_on_the_new_one(
    hostile: bytes, short_path: Path, rng: random.Random
) -> None:
    bed, threads = Bed2(short_path, rng), set[threading.Thread]()

    def noted(do: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any) -> Any:
            threads.add(threading.current_thread())
            return do(*args)

        return noting

    with (
        bed.planted(),
        mock.patch.object(hot, "encoded", noted(encoded)),
        mock.patch.object(hot, "decoded", noted(decoded)),
    ):
        async with trio.open_nursery() as nursery:
            bed.nursery = nursery
            nursery.start_soon(bed.a.run)
            nursery.start_soon(bed.b.run)
            await bed.a.up.wait()
            await bed.b.up.wait()
            await bed.a.gateway.attach("d", "images:vm.img")
            await bed.a.disk("d").disk.read(0, 2 * BLOCK)
            bed.a.clients = 1
            await bed.write(bed.a)
            await bed.attach_incoming(bed.b)
            bed.b.clients = 1
            beside = bed.image.with_name("vm.img.forebay") / "hot"
            await until(beside.exists)
            if hostile:
                beside.write_bytes(hostile)
            bed.a.clients = 0
            await bed.write(bed.b)
            await until(lambda: not beside.exists())
            with trio.move_on_after(0.2 if hostile else 10) as waited:
                await until(lambda: bed.b.disk("d").status()["cached_bytes"] >= 2 * BLOCK)
            assert waited.cancelled_caught == bool(hostile)
            await bed.check(bed.b)
            await bed.detach(bed.a)
            await bed.detach(bed.b)
            nursery.cancel_scope.cancel()
    assert not bed.image.with_name("vm.img.forebay").exists()
    assert threads, "the list was made"
    assert threading.main_thread() not in threads, "65536 blocks would hold the loop"


async def test_a_mode_that_is_being_changed_when_a_handover_begins_is_left_for_it(
    short_path: Path,
) -> None:
    bed = Bed(short_path)
    bed.image("vm.img")
    async with bed.life() as gateway, trio.open_nursery() as nursery:
        await gateway.attach("d", "images:vm.img", mode=Mode.WRITE_THROUGH)
        modes = bed.disk("d").disk.modes
        async with modes.gate.passing():  # a write is under way
            nursery.start_soon(gateway.set_mode, "d", Mode.WRITE_BACK, nothing)
            await until(lambda: modes.gate.shut)
            nursery.start_soon(modes.hold, nothing)
            await trio.testing.wait_all_tasks_blocked()
            assert modes.returns_to is None
        await until(lambda: modes.returns_to is Mode.WRITE_BACK)
        assert modes.mode is Mode.WRITE_THROUGH


async def test_a_mode_is_refused_where_a_handover_begins_while_it_is_put_on_record(
    short_path: Path,
) -> None:
    bed = Bed(short_path)
    bed.image("vm.img")
    async with bed.life() as gateway:
        await gateway.attach("d", "images:vm.img", mode=Mode.WRITE_THROUGH)
        modes, records = bed.disk("d").disk.modes, gateway._records
        change = records.change

        async def changed(*args: Any) -> None:
            await change(*args)
            await modes.hold(nothing)

        with mock.patch.object(records, "change", changed), pytest.raises(ForebayError) as refused:
            await gateway.set_mode("d", Mode.WRITE_BACK, nothing)
        assert "is being handed over" in str(refused.value)
        assert modes.mode is Mode.WRITE_THROUGH
        assert bed.disk("d").record.mode == Mode.WRITE_THROUGH.value


@pytest.mark.parametrize("wanted", [Mode.WRITE_THROUGH, Mode.WRITE_BACK])
async def test_the_mode_that_an_operator_asks_for_in_a_handover_is_the_one_after_it(
    wanted: Mode, short_path: Path
) -> None:
    bed = Bed(short_path)
    bed.image("vm.img")
    async with bed.life() as gateway:
        await gateway.attach("d", "images:vm.img", mode=Mode.WRITE_BACK)
        modes = bed.disk("d").disk.modes
        await modes.hold(nothing)
        with pytest.raises(ForebayError, match="is being handed over"):
            await gateway.set_mode("d", Mode.NONE, nothing)
        await gateway.set_mode("d", wanted, nothing)
        assert modes.mode is Mode.WRITE_THROUGH, "until it is over"
        await modes.let_go()
        assert modes.mode is wanted
        assert bed.disk("d").record.mode == wanted.value


async def test_an_image_that_came_behind_our_back_is_given_back_at_detach(
    short_path: Path, rng: random.Random, expect_log: Callable[[str], None]
) -> None:
    """An attempt to take it was given up, or failed late: it has left our marker."""
    expect_log("cannot be reached")
    bed = Bed2(short_path, rng)
    with bed.planted():
        async with both(bed) as nursery:
            await bed.attach_incoming(bed.b)
            bed.a.clients = 0
            take = Marker.take.__func__  # type: ignore[attr-defined]

            def late(kind: type[Marker], *args: Any, **how: Any) -> Marker:
                take(kind, *args, **how).close()
                raise OSError(errno.EIO, "it came too late")

            write = partial(bed.b.disk("d").disk.write, 0, memoryview(bytes(4096)), False)
            with mock.patch.object(Marker, "take", classmethod(late)):
                async with trio.open_nursery() as writing:
                    writing.start_soon(write)
                    await until(lambda: owner_of(bed) == bed.b.gateway._cache.uuid)
                    writing.cancel_scope.cancel()
                await until(lambda: bool(bed.b.disk("d").disk.image.reach.withheld))
            await bed.detach(bed.b)
            assert owner_of(bed) == ""
            nursery.cancel_scope.cancel()


async def test_an_overlay_that_was_written_to_at_the_last_moment_stays(short_path: Path) -> None:
    bed = Bed(short_path)
    bed.image("vm.img")
    async with bed.life() as gateway:
        await gateway.attach("d", "images:vm.img", overlay=True)
        attached = bed.disk("d")

        async def shut(_seconds: float) -> None:
            await bed.write(
                "d"
            )  # of a client that came and went while the detach waited for its turn

        with (
            mock.patch.object(attached.listener, "shut", shut),
            pytest.raises(ForebayError, match="what it wrote lies here only"),
        ):
            await gateway.detach("d", spare=True, progress=nothing)
        assert attached.status()["state"] == "ready"
        await gateway.detach("d", progress=nothing)


async def test_a_write_that_waits_finds_the_marker_dirty_and_what_was_before_goes_later(
    short_path: Path, rng: random.Random
) -> None:
    """What is made durable while a VM waits: one marker, not two, and nothing is cleaned up."""
    bed, shown = Bed2(short_path, rng), list[Owner]()
    show = Tenure.show

    def noted(own: Tenure, owner: Owner) -> None:
        show(own, owner)
        if owner.gateway == bed.b.gateway._cache.uuid:
            shown.append(owner)

    with bed.planted(), mock.patch.object(Tenure, "show", noted):
        async with both(bed) as nursery:
            await bed.attach_incoming(bed.b)
            bed.b.clients = 1
            bed.a.clients = 0
            with mock.patch.object(Reach, "is_look_due", return_value=False):
                await bed.write(bed.b)
                assert [one.state for one in shown] == ["dirty"]
                before = bed.image.with_name("vm.img.forebay") / str(shown[0].token - 1)
                assert before.exists()
            await bed.b.disk("d").disk.image.look()
            assert not before.exists()
            await bed.check(bed.b)
            await bed.detach(bed.a)
            await bed.detach(bed.b)
            nursery.cancel_scope.cancel()
    assert not bed.image.with_name("vm.img.forebay").exists()


async def test_an_image_that_its_host_has_is_looked_at_and_not_tried_for(
    short_path: Path, rng: random.Random
) -> None:
    bed, tried = Bed2(short_path, rng), list[str]()
    take = Marker.take.__func__  # type: ignore[attr-defined]

    def noted(kind: type[Marker], /, where: Any, file: Any, me: Owner, **how: Any) -> Marker:
        tried.append(me.gateway)
        return take(kind, where, file, me, **how)  # type: ignore[no-any-return]

    with bed.planted():
        async with both(bed) as nursery:
            await bed.attach_incoming(bed.b)
            with mock.patch.object(Marker, "take", classmethod(noted)):
                bed.b.clients = 1
                await bed.flush(bed.a)
                await bed.write(bed.b)  # A's client stays, so that A has to see that it is wanted
            assert len(tried) <= 2, "each try that fails looks at all processes of the host"
            bed.a.clients = 0
            await bed.check(bed.b)
            await bed.detach(bed.a)
            await bed.detach(bed.b)
            nursery.cancel_scope.cancel()


async def test_an_overlay_does_not_move_without_its_data_and_the_line_says_what_does(
    short_path: Path,
) -> None:
    bed = Bed(short_path)
    bed.image("vm.img")
    async with bed.life() as gateway:
        with pytest.raises(
            ForebayError,
            match="does not move: add --with-data, and it goes along; or 'forebay save' there",
        ) as refused:
            await gateway.attach("d", "images:vm.img", overlay=True, incoming=True)
        with pytest.raises(ForebayError, match="needs no handover: attach it without --incoming"):
            await gateway.attach("d", "images:vm.img", read_only=True, incoming=True)
        await gateway.attach("d", "images:vm.img", overlay=True)
        with pytest.raises(
            ForebayError, match="add --with-data, .* 'forebay save d NEW' makes"
        ) as kept:
            await gateway.moves.prepare("d", "", 1.0, nothing)
        assert "\n" not in str(refused.value) + str(kept.value)
        assert bed.disk("d").status()["state"] == "ready"


async def test_an_image_that_cannot_be_let_go_is_not_tried_for_all_the_time(
    short_path: Path, rng: random.Random, expect_log: Callable[[str], None]
) -> None:
    expect_log("its handover waits: planted")
    bed, looked = Bed2(short_path, rng), 0

    async def failing(_giving: Giving, _asked: object) -> None:
        nonlocal looked
        looked += 1
        raise OSError(errno.EIO, "planted")

    with bed.planted(), mock.patch.object(giving, "PREPARED_SECONDS", 0.1):
        async with both(bed) as nursery:
            await bed.attach_incoming(bed.b)
            with mock.patch.object(Giving, "_release", failing):
                bed.a.clients = 0
                await until(lambda: looked > 0)
                await trio.sleep(0.5)
                assert looked < 10
                with pytest.raises(ForebayError, match="'d' has not come: host .* has not let it"):
                    await bed.b.gateway.moves.finish("d", 0.2)
            await bed.b.gateway.moves.finish("d", 20.0)
            await bed.check(bed.b)
            await bed.detach(bed.a)
            await bed.detach(bed.b)
            nursery.cancel_scope.cancel()
