# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Each call that a command makes to the index or to a store, failing: the command is done, or nothing has changed.

The n-th call fails, before it is made or after, for all n, in attach, detach and change of mode. What has to hold: a
command that is refused has changed nothing, now and after a kill; a disk that is gone holds no image, and leaves
nothing beside it for long.

Some of the calls are tried by default, chosen by the seed, and ``FOREBAY_NTH_SHARE=1`` tries all.
"""

import os
import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from forebay.units import Mode
from real.commands_bed import NEW, OLD, Bed, Faults, nothing, outcome

Command = Callable[[Bed], Awaitable[object]]
LOGGED = "(?s).*"

SHARE = min(1.0, 20 * float(os.environ.get("FOREBAY_NTH_SHARE", "0.01")))


async def attach(bed: Bed) -> object:
    return await bed.gateway.attach("d", "images:a.img", mode=Mode.WRITE_BACK)


async def attach_overlay(bed: Bed) -> object:
    return await bed.gateway.attach("d", "images:a.img", overlay=True)


async def detach(bed: Bed) -> object:
    await bed.gateway.detach("d", progress=nothing)
    return None


async def discard(bed: Bed) -> object:
    await bed.gateway.detach("d", discard=True, progress=nothing)
    return None


async def write_through(bed: Bed) -> object:
    return await bed.gateway.set_mode("d", Mode.WRITE_THROUGH, nothing)


async def write_back(bed: Bed) -> object:
    return await bed.gateway.set_mode("d", Mode.WRITE_BACK, nothing)


async def clean(bed: Bed) -> None:
    """A disk whose image has everything."""
    await attach(bed)


async def dirty(bed: Bed) -> None:
    await attach(bed)
    await bed.write("d")


async def over(bed: Bed) -> None:
    await attach_overlay(bed)
    await bed.write("d")


async def through(bed: Bed) -> None:
    await bed.gateway.attach("d", "images:a.img", mode=Mode.WRITE_THROUGH)
    await bed.write("d")


async def attach_kept(bed: Bed) -> object:
    return await bed.gateway.attach("d", "images:a.img", overlay=True, keep=True)


async def kept(bed: Bed) -> None:
    """An overlay that stays, with something in it."""
    await attach_kept(bed)
    await bed.write("d")


async def away(bed: Bed) -> None:
    """The same, detached."""
    await kept(bed)
    await detach(bed)


async def snapped(bed: Bed) -> None:
    """An overlay that was written to after a snapshot of the image as it is."""
    await attach_kept(bed)
    await bed.gateway.overlays.snapshot("d", "first")
    await bed.write("d")


async def twice(bed: Bed) -> None:
    """An overlay with a snapshot between two writes."""
    await kept(bed)
    await bed.gateway.overlays.snapshot("d", "first")
    await bed.write("d", OLD)
    await bed.write("d", NEW)


async def snapshot(bed: Bed) -> object:
    return await bed.gateway.overlays.snapshot("d", "second")


async def rollback(bed: Bed) -> object:
    return await bed.gateway.overlays.rollback("d", "first", drop_newer=True, force=False)


async def revert(bed: Bed) -> object:
    return await bed.gateway.overlays.revert("d", sure=True, force=False)


async def drop(bed: Bed) -> object:
    return await bed.gateway.overlays.drop("d", "first", nothing)


async def nobody(bed: Bed) -> None:
    """No disk at all."""
    assert not bed.told()


CASES: dict[str, tuple[Command, Command, bytes, bytes]] = {
    "attach": (nobody, attach, b"", OLD),
    "attach an overlay": (nobody, attach_overlay, b"", OLD),
    "detach a clean disk": (clean, detach, OLD, b""),
    "detach a dirty disk": (dirty, detach, NEW, b""),
    "detach an overlay": (over, detach, NEW, b""),
    "discard": (dirty, discard, NEW, b""),
    "leave write-back": (dirty, write_through, NEW, NEW),
    "attach an overlay that was kept": (away, attach_kept, b"", NEW),
    "detach an overlay that stays": (kept, detach, NEW, b""),
    "take a snapshot": (kept, snapshot, NEW, NEW),
    "go back to a snapshot": (snapped, rollback, NEW, OLD),
    "give up the changes": (twice, revert, NEW, OLD),
    "drop a snapshot": (twice, drop, NEW, NEW),
    "enter write-back": (through, write_back, NEW, NEW),
}
"""By name: what there is before, the command, and what the disk reads before and after it; empty: there is none."""


@pytest.mark.parametrize("after", [False, True], ids=["before it is made", "after it was made"])
@pytest.mark.parametrize("name", CASES)
async def test_a_command_is_done_or_nothing_has_changed(
    name: str, after: bool, short_path: Path, expect_log: Callable[[str], None], rng: random.Random
) -> None:
    expect_log(LOGGED)
    before, command, reads_before, reads_after = CASES[name]
    n = 0
    while True:
        n += 1 if SHARE >= 1 else rng.randint(1, round(2 / SHARE) - 1)
        bed, faults = Bed(short_path / str(n)), Faults()
        bed.image("a.img")
        with faults.planted():
            async with bed.life():
                await before(bed)
                was = bed.told()
                faults.number, faults.after = n, after
                refused = await outcome(partial(command, bed))
                faults.number = 0
                now = bed.told()
                if refused:
                    assert {d: mode for d, (mode, _) in now.items()} == {
                        d: mode for d, (mode, _) in was.items()
                    }, f"call {n} ({faults.hit}): {refused}"
                reads = reads_before if refused else reads_after
                await _is(bed, reads, f"call {n} ({faults.hit}): {refused or 'done'}")
            async with bed.life():
                told = f"after a kill, call {n} ({faults.hit}): {refused or 'done'}"
                if not (refused and faults.hit == "index" and after):
                    assert set(bed.told()) == set(now), told
                    await _is(bed, reads, told)
        if not faults.hit:
            assert not refused
            return


async def _is(bed: Bed, reads: bytes, told: str) -> None:
    """The disk reads so; or (empty) there is none, and the image is anybody's."""
    if reads:
        await bed.starts_with("d", reads)
        return
    assert not bed.told(), told
    if bed.gateway.overlays.all():  # kept: it is nobody else's until it is given up
        assert await outcome(lambda: attach_kept(bed)) == "", told
        await bed.starts_with("d", NEW)
        assert await outcome(lambda: detach(bed)) == "", told
        return
    assert await outcome(lambda: bed.gateway.attach("other", "images:a.img")) == "", told
    assert await outcome(lambda: bed.gateway.detach("other", progress=nothing)) == "", told
    assert not (bed.images / "a.img.forebay").exists(), told
