# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Overlays that stay, by the gateway's own commands, on real files: commits that fail or are killed, bases that change.

``FOREBAY_NTH_SHARE=1`` tries the failure of every call instead of some.
"""

import errno
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import trio

from forebay.daemon.committing import Committing
from forebay.daemon.resolving import Keeps
from forebay.errors import ForebayError
from forebay.image.source import Source
from forebay.origin.new_image import NewImage
from forebay.units import MIB, Mode
from real.commands_bed import NEW, OLD, SIZE, Bed, Faults, nothing, outcome

SHARE = min(1.0, 20 * float(os.environ.get("FOREBAY_NTH_SHARE", "0.01")))
CHANGED = 65536
"""Bytes that `Bed.write` changes."""


async def attach(bed: Bed, name: str = "d", *, keep: bool = False) -> None:
    await bed.gateway.attach(name, "images:a.img", overlay=True, keep=keep)


async def detach(bed: Bed, name: str = "d") -> None:
    await bed.gateway.detach(name, progress=nothing)


async def commit(bed: Bed) -> None:
    await bed.gateway.overlays.commit("d", nothing)


def committed() -> bytes:
    return NEW * CHANGED + OLD * (SIZE - CHANGED)


async def test_what_is_kept_comes_back_after_detach_and_a_kill(short_path: Path) -> None:
    bed = Bed(short_path)
    path = bed.image("a.img")
    async with bed.life() as gateway:
        await attach(bed, keep=True)
        await bed.write("d")
        await detach(bed)
        assert not bed.told()
        [told] = gateway.overlays.all()
        assert (told["name"], told["attached"], told["private_bytes"]) == ("d", False, CHANGED)
        await attach(bed)
        await bed.starts_with("d", NEW)
        await detach(bed)
    async with bed.life() as gateway:
        await attach(bed)
        await bed.starts_with("d", NEW)
        await gateway.detach("d", discard=True, progress=nothing)
        assert not gateway.overlays.all()
        await attach(bed)
        await bed.starts_with("d", OLD)
    assert path.read_bytes() == OLD * SIZE


async def test_a_kept_overlay_is_joined_with_no_other_image(short_path: Path) -> None:
    bed = Bed(short_path)
    bed.image("a.img")
    bed.image("b.img")
    async with bed.life() as gateway:
        await attach(bed, keep=True)
        await bed.write("d")
        await detach(bed)
        for read_only in (False, True):
            with pytest.raises(ForebayError, match="is an overlay on images:a.img that is kept"):
                await gateway.attach("d", "images:a.img", read_only=read_only)
        with pytest.raises(ForebayError, match="is an overlay on images:a.img that is kept"):
            await gateway.attach("d", "images:b.img", overlay=True)
        with pytest.raises(ForebayError, match="is the base of 'd'"):
            await gateway.attach("other", "images:a.img")
        await gateway.attach("other", "images:a.img", read_only=True)
        with pytest.raises(ForebayError, match="would be given up: say --yes"):
            await gateway.overlays.revert("d", sure=False, force=False)
        await gateway.overlays.revert("d", sure=True, force=False)
        await detach(bed, "other")
        await gateway.attach("d", "images:b.img")


@pytest.mark.parametrize("others", [False, True], ids=["alone", "others went on"])
@pytest.mark.parametrize("keeps", ["mine", "image"])
async def test_a_base_that_was_changed_meanwhile_is_a_conflict(
    keeps: Keeps, others: bool, short_path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("(?s).*")
    bed = Bed(short_path)
    path = bed.image("a.img")
    async with bed.life():
        await attach(bed, keep=True)
        await bed.write("d")
        await detach(bed)
        copy = path.with_suffix(".new")
        copy.write_bytes(b"t" * SIZE)
        copy.rename(path)
        if others:
            await attach(bed, "other")
            await bed.starts_with("other", b"t")
        with pytest.raises(ForebayError, match="was changed while 'd' was detached: 'forebay reso"):
            await attach(bed)
        assert bed.told()["d"][1] == "conflict"
        told = {one["name"]: one["served"] for one in bed.gateway.overlays.all()}
        assert told == {"d": False, **({"other": True} if others else {})}
    async with bed.life() as gateway:
        assert bed.told()["d"][1] == "conflict"
        await gateway.resolve("d", keeps, sure=True, progress=nothing)
        await bed.starts_with("d", NEW if keeps == "mine" else b"t")
        got = b"".join(bytes(x) for x in await bed.disk("d").disk.read(MIB, 4096))
        assert got == b"t" * 4096
        if others:
            await bed.starts_with("other", b"t")
        await detach(bed)
        kept = [one["name"] for one in gateway.overlays.all() if not one["attached"]]
        assert kept == (["d"] if keeps == "mine" else []), (
            "without changes there is nothing to keep"
        )


async def test_a_disk_that_lies_in_the_cache_only(short_path: Path) -> None:
    bed = Bed(short_path)
    async with bed.life() as gateway:
        for size in ("", "0", "5000", "-1G", "1e9", "9000P", "300T", "20G/x", "../x"):
            with pytest.raises(ForebayError):
                await gateway.attach("d", f"scratch:{size}")
        await gateway.attach("d", "scratch:20G")
        await gateway.attach("kept", "scratch:8M", keep=True, overlay=True)
        assert gateway.status("d")[0]["size"] == 20 << 30
        assert await outcome(lambda: gateway.attach("e", "scratch:1M", read_only=True))
        await bed.starts_with("d", b"\0")
        await bed.write("d")
        await bed.write("kept")
        with pytest.raises(ForebayError, match="has no image"):
            await commit(bed)
        assert [one async for one in gateway.catalogue.images(None)] == []
    async with bed.life() as gateway:
        await bed.starts_with("d", NEW)
        await detach(bed)
        await detach(bed, "kept")
        assert [one["name"] for one in gateway.overlays.all()] == ["kept"]
        await gateway.attach("d", "scratch:20G")
        await bed.starts_with("d", b"\0")
        await gateway.attach("kept", "scratch:8M")
        await bed.starts_with("kept", NEW)


async def test_a_commit_is_refused_while_others_are_on_the_image(short_path: Path) -> None:
    bed = Bed(short_path)
    path = bed.image("a.img")
    async with bed.life() as gateway:
        await attach(bed)
        await bed.write("d")
        await attach(bed, "other", keep=True)
        with pytest.raises(ForebayError, match="is also the image of other"):
            await commit(bed)
        await bed.write("other")
        await detach(bed, "other")
        with pytest.raises(ForebayError, match="is also the image of other"):
            await commit(bed)
        await gateway.overlays.revert("other", sure=True, force=False)
        await gateway.overlays.snapshot("d", "one")
        with pytest.raises(ForebayError, match="has snapshots"):
            await commit(bed)
        await gateway.overlays.drop("d", "one", nothing)
        shutil.copy(path, path.with_suffix(".b"))
        await gateway.attach("w", "images:a.b", mode=Mode.WRITE_BACK)
        with pytest.raises(ForebayError, match="is no overlay"):
            await gateway.overlays.commit("w", nothing)
        assert path.read_bytes() == OLD * SIZE
        await commit(bed)
        assert path.read_bytes() == committed()
        assert not path.with_name("a.img.forebay").exists()
        assert gateway.status("d")[0]["overlay"]
        assert gateway.status("d")[0]["private_bytes"] == 0
        await bed.write("d", b"x")
        await commit(bed)
        assert path.read_bytes()[:CHANGED] == b"x" * CHANGED


async def test_no_disk_comes_to_an_image_while_a_commit_writes_it(short_path: Path) -> None:
    """Whoever tries is told of the commit, and not of a lock."""
    bed = Bed(short_path)
    path = bed.image("a.img")
    async with bed.life():
        await attach(bed)
        await bed.write("d")
        refused: list[str] = []

        async def another(source: Source, *_: object) -> None:
            refused.append(await outcome(partial(attach, bed, "other")))
            await write(source, *_)

        write = bed.gateway.overlays._committing._write  # type: ignore[attr-defined]
        with mock.patch.object(bed.gateway.overlays._committing, "_write", another):
            await commit(bed)
        [why] = refused
        assert "is being written by a commit or a resolve of disk 'd': wait" in why
        assert path.read_bytes() == committed()
        await attach(bed, "other")


@pytest.mark.parametrize("after", [False, True], ids=["before it is made", "after it was made"])
async def test_a_commit_that_fails_or_is_killed_anywhere_loses_nothing_and_can_be_done_again(
    after: bool, short_path: Path, expect_log: Callable[[str], None], rng: random.Random
) -> None:
    expect_log("(?s).*")
    n = 0
    while True:
        n += 1 if SHARE >= 1 else rng.randint(1, round(2 / SHARE) - 1)
        bed, faults = Bed(short_path / str(n)), Faults()
        path = bed.image("a.img")
        with faults.planted():
            async with bed.life():
                await attach(bed, keep=True)
                await bed.write("d")
                faults.number, faults.after = n, after
                refused = await outcome(partial(commit, bed))
                faults.number = 0
                told = f"call {n} ({faults.hit}): {refused or 'done'}"
                assert refused or path.read_bytes() == committed(), told
                if bed.told()["d"][1] != "failed":
                    await bed.starts_with("d", NEW)
                    assert bed.gateway.status("d")[0]["overlay"], told
            async with bed.life():  # killed right there
                assert await outcome(partial(commit, bed)) == "", told
                assert path.read_bytes() == committed(), told
                with trio.fail_after(
                    20
                ):  # given back in the background, if it was not before the kill
                    while path.with_name("a.img.forebay").exists():  # noqa: ASYNC110
                        await trio.sleep(0.01)
                await bed.starts_with("d", NEW)
                [status] = bed.gateway.status("d")
                assert (status["overlay"], status["private_bytes"]) == (True, 0), told
        if not faults.hit:
            assert not refused
            return


@pytest.mark.parametrize("by", ["nobody", "another", "its end"])
async def test_a_commit_that_is_killed_when_its_image_was_given_back_is_done(
    by: str, short_path: Path, expect_log: Callable[[str], None]
) -> None:
    """... whoever has changed the image since then."""
    expect_log("a.img was changed by somebody else|no such image")
    bed = Bed(short_path)
    path = bed.image("a.img")
    async with bed.life() as gateway:
        await attach(bed)
        await bed.write("d")
        killed = mock.patch.object(Committing, "_note", side_effect=RuntimeError("killed"))
        with killed, pytest.raises(RuntimeError, match="killed"):
            await commit(bed)
        assert path.read_bytes() == committed()
        assert not path.with_name("a.img.forebay").exists()
    if by == "another":
        path.write_bytes(b"x" * SIZE)
    elif by == "its end":
        path.unlink()
    async with bed.life() as gateway:
        with trio.fail_after(30):
            while gateway.status("d")[0]["state"] == "failed":  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.01)
        [status] = gateway.status("d")
        assert (status["overlay"], status["private_bytes"]) == (True, 0)
        assert not path.with_name("a.img.forebay").exists()
        if by != "its end":
            await bed.starts_with("d", b"x" if by == "another" else NEW)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "images:new.img: No space left on device: make room there, and try again"),
        (errno.EACCES, "images:new.img: Permission denied: let the daemon's user write there"),
        (errno.EIO, "images:new.img: Input/output error: see that the storage answers"),
    ],
)
async def test_a_save_that_its_store_refuses_says_which_image_and_what_to_do(
    number: int, says: str, short_path: Path
) -> None:
    bed = Bed(short_path)
    bed.image("a.img")
    async with bed.life() as gateway:
        await attach(bed)
        with mock.patch.object(NewImage, "write", side_effect=OSError(number, os.strerror(number))):
            save = partial(gateway.save, "d", "images:new.img", partial=False, progress=nothing)
            assert (await outcome(save)).startswith(says)
        assert sorted(os.listdir(bed.images)) == ["a.img"]


async def test_a_trace_of_an_image_that_is_not_there_says_so(short_path: Path) -> None:
    bed = Bed(short_path)
    bed.image("a.img")
    (bed.images / "link").symlink_to(".")
    async with bed.life() as gateway:
        traces = gateway.catalogue.traces
        for name, says in (
            ("no.img", "no such image: check"),
            ("link/a.img", "a symbolic link is"),
        ):
            told = await outcome(partial(traces.find, f"images:{name}"))
            assert told.startswith(f"images:{name}: {says}"), told
        told = await outcome(partial(traces.drop, "images:link/a.img"))
        assert told.startswith("images:link/a.img: a symbolic link is"), told


async def test_a_flush_that_fails_says_of_which_disk(short_path: Path) -> None:
    bed = Bed(short_path)
    bed.image("a.img")
    async with bed.life() as gateway:
        await attach(bed)
        full = OSError(errno.ENOSPC, "No space left on device")
        with (
            mock.patch.object(bed.disk("d"), "drain", side_effect=full),
            pytest.raises(OSError, match="'d': No space left on device"),
        ):
            await gateway.flush(None, progress=nothing)


async def test_snapshots_of_a_thousand_are_the_most(short_path: Path) -> None:
    bed = Bed(short_path)
    bed.image("a.img")
    async with bed.life() as gateway:
        await attach(bed)
        for n in range(1000):
            await bed.write("d", bytes([n % 251])) if n % 50 == 0 else None
            await gateway.overlays.snapshot("d", f"s{n}")
        with pytest.raises(ForebayError, match="has 1000 snapshots: drop some"):
            await gateway.overlays.snapshot("d", "one-more")
        with pytest.raises(ForebayError, match="has a snapshot 's3' already"):
            await gateway.overlays.snapshot("d", "s3")
        with pytest.raises(ForebayError, match="has no snapshot 's3000'"):
            await gateway.overlays.drop("d", "s3000", nothing)
        with pytest.raises(ForebayError, match="has 489 snapshots that are newer than 's510'"):
            await gateway.overlays.rollback("d", "s510", drop_newer=False, force=False)
        await gateway.overlays.rollback("d", "s510", drop_newer=True, force=False)
        await bed.starts_with("d", bytes([500 % 251]))
        assert len(gateway.overlays.snapshots("d")) == 511
