# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A running VM moves from one gateway to another: nothing acknowledged is missing, and never do two write.

At one call of either host to the store that host is killed, or the call fails, or the host is cut off for a while.
Some of the calls are tried by default, chosen by the seed; ``FOREBAY_MOVES=500`` tries so many.
"""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing

from forebay.boot.encoding import decoded, encoded
from forebay.errors import ForebayError
from forebay.handover import hot
from forebay.units import Mode
from forebay_cache.format.geometry import BLOCK
from real.commands_bed import Bed, nothing
from real.moving_bed import Bed2, Fault, until

LOGGED = "(?s).*"
MOVES = int(os.environ.get("FOREBAY_MOVES", "6"))
KINDS = ("kill before", "kill after", "fail before", "fail after", "cut")


async def lived(bed: Bed2, *, stays: bool, fails: bool, faults: dict[str, Fault]) -> None:
    """A guest writes on A, moves to B (or not), and back."""
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
                await until(lambda: not bed.image.with_name("vm.img.forebay").exists())
            nursery.cancel_scope.cancel()
    whole = bed.image.read_bytes()
    for n, may_be in enumerate(bed.may_be):
        assert whole[n * 4096 : (n + 1) * 4096] in may_be, n
    assert not bed.faults, bed.faults
    assert not bed.image.with_name("vm.img.forebay").exists()


@pytest.mark.parametrize("mode", [Mode.WRITE_BACK, Mode.WRITE_THROUGH, Mode.NONE])
@pytest.mark.parametrize("stays", [False, True], ids=["disconnects", "stays connected"])
@pytest.mark.parametrize("fails", [False, True], ids=["moves", "goes on where it was"])
async def test_a_guest_moves_there_and_back(
    mode: Mode, stays: bool, fails: bool, short_path: Path, rng: random.Random
) -> None:
    await lived(Bed2(short_path, rng, mode), stays=stays, fails=fails, faults={})


@pytest.mark.parametrize("n", range(MOVES))
async def test_a_host_fails_at_one_of_its_calls_while_a_guest_moves(
    n: int, short_path: Path, expect_log: Callable[[str], None], rng: random.Random
) -> None:
    expect_log(LOGGED)
    fault = Fault(rng.randint(1, 80), rng.choice(KINDS))
    side = rng.choice("ab")
    case = {"stays": rng.random() < 0.5, "fails": rng.random() < 0.3}
    print(n, side, fault.number, fault.kind, case)
    await lived(Bed2(short_path, rng), **case, faults={side: fault})


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
            left: list[Mode | None] = []

            async def hold() -> None:
                left.append(await modes.hold(nothing))

            nursery.start_soon(hold)
            await trio.testing.wait_all_tasks_blocked()
            assert not left
        await until(lambda: bool(left))
        assert left == [Mode.WRITE_BACK]
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
