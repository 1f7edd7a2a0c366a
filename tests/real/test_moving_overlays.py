# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A running VM whose disk is an overlay moves from one gateway to another, with what the overlay has.

As `test_moving.py` has it for disks that write their image: at one call of either host to the store it is killed, or
the call fails, or comes late, or the host is cut off for a while. ``FOREBAY_MOVES=500`` tries so many
cases, ``all`` all of them, and ``FOREBAY_MOVE_CASE`` the one that a failure names.
"""

import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from forebay.units import Mode
from real.moving_bed import Bed2, Fault, Host

LOGGED = "(?s).*"
MOVES = os.environ.get("FOREBAY_MOVES", "2")
KINDS = (
    "kill before", "kill after", "fail before", "fail after", "cut", "away", "clock", "again", "late"
)  # fmt: skip
CALLS = 90
"""More than either host makes while the guest moves."""

CASES = [
    ".".join(case)
    for case in itertools.product(
        "ab", map(str, range(1, CALLS + 1)), KINDS, ("leaves", "stays"), ("moves", "fails")
    )
]


class Overlays(Bed2):
    """Both hosts, an overlay on one of them, and never two that take its writes."""

    def __init__(self, directory: Path, rng: random.Random) -> None:
        super().__init__(directory, rng, Mode.WRITE_THROUGH)
        self.is_overlay = True

    def takes_writes(self, host: Host) -> bool:
        """True if a write there would be acknowledged."""
        served = host.gateway.attached() if host.up.is_set() and not host.killed.is_set() else []
        return any(one.name == "d" and one.disk.modes.veil is None for one in served)

    async def watch(self) -> None:
        """Never do two take writes."""
        while True:
            if self.takes_writes(self.a) and self.takes_writes(self.b):
                self.faults.append("two take writes")
            await trio.sleep(0.001)


async def lived(bed: Overlays, *, stays: bool, fails: bool, faults: dict[str, Fault]) -> None:
    """A guest writes on A, moves to B (or not), and back."""
    with bed.planted():
        async with trio.open_nursery() as nursery:
            bed.nursery = nursery
            nursery.start_soon(bed.a.run)
            nursery.start_soon(bed.b.run)
            await bed.a.up.wait()
            await bed.b.up.wait()
            await bed.a.gateway.attach("d", "images:vm.img", overlay=True)
            nursery.start_soon(bed.watch)
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
            await bed.check(now)
            # nothing is read before the first write: what was written last comes with the last round
            back = await bed.move(now, other, stays=not stays, fails=False, reads=False)
            await bed.check(back)
            back.clients = now.clients = 0
            await bed.detach(now)
            await bed.check(back)
            await bed.detach(back)
            nursery.cancel_scope.cancel()
    assert not bed.faults, bed.faults
    assert bed.image.read_bytes() == bytes(len(bed.image.read_bytes())), (
        "the image is never written"
    )


@pytest.mark.parametrize("stays", [False, True], ids=["disconnects", "stays connected"])
@pytest.mark.parametrize("fails", [False, True], ids=["moves", "goes on where it was"])
async def test_a_guest_moves_there_and_back_with_its_overlay(
    stays: bool, fails: bool, short_path: Path, rng: random.Random
) -> None:
    bed = Overlays(short_path, rng)
    await lived(bed, stays=stays, fails=fails, faults={})
    assert not bed.image.with_name("vm.img.forebay").exists()


def chosen(rng: random.Random) -> list[str]:
    """The cases that are tried: of each kind of fault as many."""
    if one := os.environ.get("FOREBAY_MOVE_CASE"):
        return [one]
    if MOVES == "all":
        return CASES
    of = {kind: [case for case in CASES if f".{kind}." in case] for kind in KINDS}
    first = rng.randrange(len(KINDS))
    return [rng.choice(of[KINDS[(first + n) % len(KINDS)]]) for n in range(int(MOVES))]


@pytest.mark.timeout(86400 if MOVES == "all" else 60 + 20 * int(MOVES))
async def test_a_host_fails_at_one_of_its_calls_while_an_overlay_moves(
    short_path: Path, expect_log: Callable[[str], None], rng: random.Random
) -> None:
    expect_log(LOGGED)
    hit = 0
    for n, case in enumerate(chosen(rng)):
        side, call, kind, stays, fails = case.split(".")
        fault = Fault(int(call), kind)
        print(case)
        bed = Overlays(short_path / str(n), random.Random(case))
        bed.a.skew, bed.b.skew = 3600.0, -86400.0  # no host's clock is right
        await lived(bed, stays=stays == "stays", fails=fails == "fails", faults={side: fault})
        hit += fault.hit
    assert hit or "FOREBAY_MOVE_CASE" in os.environ
