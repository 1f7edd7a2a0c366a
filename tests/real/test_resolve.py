# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Out of every conflict there is a way that keeps the data: `forebay resolve`, also failing, and killed."""

import os
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from forebay.errors import ForebayError
from forebay.origin.worker import syscalls
from forebay.units import Mode
from real.commands_bed import NEW, OLD, SIZE, Bed, Faults, nothing, outcome
from real.test_nth_command import SHARE

THEIRS = b"x"
AT = SIZE // 2
"""From where on somebody else writes; the disk wrote the first 64 KiB."""

OWN = 65536


def in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(AT)
        file.write(THEIRS * AT)


def truncated(path: Path) -> None:
    os.truncate(path, AT)


def grown(path: Path) -> None:
    in_place(path)
    os.truncate(path, SIZE + OWN)


def replaced(path: Path) -> None:
    path.rename(path.with_suffix(".away"))
    path.write_bytes(OLD * AT + THEIRS * AT)


CHANGES: dict[str, Callable[[Path], None]] = {
    "in place": in_place,
    "truncated": truncated,
    "grown": grown,
    "replaced": replaced,
}


async def conflict(bed: Bed, change: Callable[[Path], None], *names: str) -> Path:
    """Disks with data of their own, whose image somebody changes."""
    path = bed.image("a.raw") if not (bed.images / "a.raw").exists() else bed.images / "a.raw"
    for name in names or ("d",):
        overlay = name != "d"
        mode = None if overlay else Mode.WRITE_BACK
        await bed.gateway.attach(name, "images:a.raw", mode=mode, overlay=overlay)
        await bed.disk(name).disk.read(SIZE - OWN, OWN)  # is in the cache
        await bed.write(name)
    await trio.testing.wait_all_tasks_blocked()  # what was read is stored
    await bed.gateway._cache.commit()
    change(path)
    await bed.disk(names[0] if names else "d").disk.image.look()
    for name in names or ("d",):
        assert bed.told()[name][1] == "conflict"
        assert f"forebay resolve {name if len(names) < 2 else 'DISK'}" in reason(bed, name)
    return path


def reason(bed: Bed, name: str) -> str:
    return str(bed.gateway.status(name)[0]["reason"])


def resolve(bed: Bed, name: str, keeps: Any, *, sure: bool = True) -> Any:
    return bed.gateway.resolve(name, keeps, sure=sure, progress=nothing)


def theirs(change: str) -> bytes:
    """What lies behind the middle of the image after the change, up to where the disk ended."""
    return b"" if change == "truncated" else THEIRS * AT


@pytest.fixture(autouse=True)
def _may_say_so(expect_log: Callable[[str], None]) -> None:
    expect_log("(?s).*")


@pytest.mark.parametrize("change", CHANGES)
async def test_what_the_cache_has_is_kept(change: str, short_path: Path) -> None:
    bed = Bed(short_path)
    async with bed.life():
        path = await conflict(bed, CHANGES[change])
        with pytest.raises(ForebayError, match=r"64K of 'd' would be written over .* say --yes"):
            await resolve(bed, "d", "mine", sure=False)
        await resolve(bed, "d", "mine")
        assert bed.told()["d"] == ("write-back", "ready")
        data = path.read_bytes()
        assert data[: 2 * OWN] == NEW * OWN + OLD * OWN
        assert data[AT:SIZE] == (theirs(change) or bytes(AT))
        status = bed.gateway.status("d")[0]
        assert (status["size"], status["dirty_bytes"]) == (len(data), 0)
        disk = bed.disk("d").disk
        assert b"".join(bytes(x) for x in await disk.read(AT, OWN)) == data[AT : AT + OWN]
        await bed.gateway.detach("d", progress=nothing)
        assert not (bed.images / "a.raw.forebay").exists()


@pytest.mark.parametrize("change", CHANGES)
async def test_the_image_is_kept(change: str, short_path: Path) -> None:
    bed = Bed(short_path)
    async with bed.life():
        path = await conflict(bed, CHANGES[change])
        before = path.read_bytes()
        with pytest.raises(ForebayError, match="64K that only the cache has .* --save them first"):
            await resolve(bed, "d", "image", sure=False)
        await resolve(bed, "d", "image")
        await bed.starts_with("d", OLD)
        disk = bed.disk("d").disk
        assert disk.size == len(before)
        at = len(before) - OWN
        assert b"".join(bytes(x) for x in await disk.read(at, OWN)) == before[at:]
        await bed.write("d")
        await bed.gateway.flush(["d"], progress=nothing)
        assert path.read_bytes() == NEW * OWN + before[OWN:]
    async with bed.life():
        assert bed.told()["d"][1] == "ready"
        await bed.starts_with("d", NEW)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("restart", [False, True])
async def test_what_the_disk_shows_is_saved(change: str, restart: bool, short_path: Path) -> None:
    bed = Bed(short_path)
    async with bed.life():
        await conflict(bed, CHANGES[change])
        if not restart:
            await _save_all(bed)
    if restart:
        async with bed.life():
            assert bed.told()["d"][1] == "conflict"
            await _save_all(bed)


async def _save_all(bed: Bed) -> None:
    gateway = bed.gateway
    with pytest.raises(ForebayError, match=r"neither in the cache nor in the image .* --partial"):
        await gateway.save("d", "images:saved.raw", partial=False, progress=nothing)
    assert sorted(x.name for x in bed.images.iterdir() if not x.name.startswith("a.")) == []
    told: list[tuple[int, int]] = []
    found = await gateway.save(
        "d", "images:saved.raw", partial=True, progress=lambda *x: told.append(x)
    )
    missing = sum(length for _, length in found["missing"])
    assert found["missing_bytes"] == missing == SIZE - 2 * OWN
    saved = bed.images / "saved.raw"
    assert saved.read_bytes() == NEW * OWN + bytes(SIZE - 2 * OWN) + OLD * OWN
    assert saved.stat().st_blocks * 512 < SIZE, "sparse"
    assert told[-1] == (SIZE, SIZE)
    assert bed.told()["d"][1] == "conflict"
    assert bed.gateway.status("d")[0]["dirty_bytes"] == OWN
    for taken in ("images:saved.raw", "images:a.raw"):
        with pytest.raises(ForebayError, match="is there already"):
            await gateway.save("d", taken, partial=True, progress=nothing)
    for wrong in ("images:nowhere/saved.raw", "nostore:a.raw", "images:../a.raw", "saved.raw"):
        with pytest.raises(ForebayError):
            await gateway.save("d", wrong, partial=True, progress=nothing)
    assert not [x for x in bed.images.iterdir() if x.name.startswith(".")]


@pytest.mark.parametrize("mode", [*Mode, "overlay"])
async def test_a_disk_that_is_well_is_saved_whole(mode: str, short_path: Path) -> None:
    bed = Bed(short_path)
    async with bed.life() as gateway:
        bed.image("a.raw")
        overlay = mode == "overlay"
        await gateway.attach(
            "d", "images:a.raw", mode=None if overlay else Mode(mode), overlay=overlay
        )
        await bed.write("d")
        found = await gateway.save("d", "images:saved.raw", partial=False, progress=nothing)
        assert found["missing_bytes"] == 0
        assert (bed.images / "saved.raw").read_bytes() == NEW * OWN + OLD * (SIZE - OWN)
        with pytest.raises(ForebayError, match="is in no conflict"):
            await resolve(bed, "d", "mine")
        await bed.write("d")  # goes on


async def test_a_disk_whose_image_is_gone_and_one_that_is_stopped_are_saved(
    short_path: Path,
) -> None:
    bed = Bed(short_path)
    async with bed.life() as gateway:
        path = await conflict(bed, lambda path: path.unlink())
        for keeps in ("mine", "image"):
            refused = await outcome(partial(resolve, bed, "d", keeps))
            assert "--save STORE:NEW" in refused
        assert bed.told()["d"][1] == "conflict"
        found = await gateway.save("d", "images:b.raw", partial=True, progress=nothing)
        assert found["missing_bytes"] == SIZE - 2 * OWN
        (bed.images / "b.raw").rename(path)
        await resolve(bed, "d", "mine")
        assert bed.told()["d"][1] == "ready"
        await bed.write("d")
        bed.disk("d").stop(RuntimeError("planted"))
        assert bed.told()["d"][1] == "stopped"
        await gateway.save("d", "images:c.raw", partial=False, progress=nothing)
        assert (bed.images / "c.raw").read_bytes()[:OWN] == NEW * OWN


async def test_an_image_of_another_gateway_is_refused(short_path: Path) -> None:
    bed = Bed(short_path)
    async with bed.life():
        path = await conflict(bed, in_place)
        marker = bed.images / "a.raw.forebay" / "owner"
        uuid = bed.gateway._cache.uuid
        marker.write_text(marker.read_text().replace(uuid, "0" * len(uuid)))
        for keeps in ("mine", "image"):
            refused = await outcome(partial(resolve, bed, "d", keeps))
            assert "belongs to host" in refused
            assert "forebay takeover" in refused
        assert bed.told()["d"][1] == "conflict"
        assert bed.gateway.status("d")[0]["dirty_bytes"] == OWN
        assert path.read_bytes()[:OWN] == OLD * OWN


async def test_overlays_of_one_image_are_resolved_one_by_one(short_path: Path) -> None:
    bed = Bed(short_path)
    async with bed.life():
        path = await conflict(bed, in_place, "o1", "o2", "o3")
        await resolve(bed, "o1", "mine")
        assert {one: state for one, (_, state) in bed.told().items()} == {
            "o1": "ready", "o2": "conflict", "o3": "conflict",
        }  # fmt: skip
        await bed.starts_with("o1", NEW)
        disk = bed.disk("o1").disk
        assert b"".join(bytes(x) for x in await disk.read(AT, OWN)) == THEIRS * OWN
    async with bed.life() as gateway:
        assert bed.told()["o2"][1] == "conflict", "after a restart, too"
        await bed.starts_with("o1", NEW)
        found = await gateway.save("o3", "images:o3.raw", partial=True, progress=nothing)
        assert found["missing_bytes"] == SIZE - OWN
        await resolve(bed, "o2", "image")
        await bed.starts_with("o2", OLD)
        await resolve(bed, "o3", "mine")
        await bed.starts_with("o3", NEW)
        assert {state for _, state in bed.told().values()} == {"ready"}
    assert path.read_bytes()[:OWN] == OLD * OWN


@pytest.mark.parametrize("after", [False, True], ids=["before it is made", "after it was made"])
@pytest.mark.parametrize("keeps", ["mine", "image"])
async def test_a_resolve_that_fails_or_is_killed_anywhere_can_be_done_again(
    keeps: str, after: bool, short_path: Path, rng: random.Random
) -> None:
    n = 0
    while True:
        n += 1 if SHARE >= 1 else rng.randint(1, round(2 / SHARE) - 1)
        bed, faults = Bed(short_path / str(n)), Faults()
        with faults.planted():
            async with bed.life():
                path = await conflict(bed, in_place)
                faults.number, faults.after = n, after
                refused = await outcome(partial(resolve, bed, "d", keeps))
                faults.number = 0
                told = f"call {n} ({faults.hit}): {refused or 'done'}"
                _nothing_is_lost(bed, keeps, path, told)
            async with bed.life():  # killed right there
                _nothing_is_lost(bed, keeps, path, f"killed after {told}")
                if bed.told()["d"][1] == "conflict":
                    await resolve(bed, "d", keeps)
                await bed.gateway.flush(["d"], progress=nothing)
                own = NEW if keeps == "mine" else OLD
                await bed.starts_with("d", own)
                assert path.read_bytes() == own * OWN + OLD * (AT - OWN) + THEIRS * AT, told
        if not faults.hit:
            assert not refused
            return


def _nothing_is_lost(bed: Bed, keeps: str, path: Path, told: str) -> None:
    """It is in conflict, with all of its data; or it is resolved, and the data is where it was to go."""
    [status] = bed.gateway.status("d")
    in_image = path.read_bytes()[:OWN] == NEW * OWN
    if status["state"] == "conflict":
        assert status["dirty_bytes"] == OWN, told
    elif keeps == "mine":
        assert in_image or status["dirty_bytes"] == OWN, told
    else:
        assert not in_image, told
        assert status["dirty_bytes"] == 0, told


@pytest.mark.parametrize("after", [False, True], ids=["before it is made", "after it was made"])
async def test_a_save_that_fails_or_is_killed_leaves_nothing(
    after: bool, short_path: Path, rng: random.Random
) -> None:
    n = 0
    while True:
        n += 1 if SHARE >= 1 else rng.randint(1, round(2 / SHARE) - 1)
        bed, faults = Bed(short_path / str(n)), Faults()
        with faults.planted():
            async with bed.life() as gateway:
                await conflict(bed, in_place)
                faults.number, faults.after = n, after
                save = partial(gateway.save, "d", "images:new.raw", partial=True, progress=nothing)
                refused = await outcome(save)
                faults.number = 0
            async with bed.life():
                await bed.gateway._saving.remove_left()
                found = {x.name for x in bed.images.iterdir()} - {"a.raw", "a.raw.forebay"}
                assert found <= {"new.raw"}, f"call {n} ({faults.hit}): {refused or 'done'}"
                if found:
                    data = (bed.images / "new.raw").read_bytes()
                    assert data == NEW * OWN + bytes(SIZE - 2 * OWN) + OLD * OWN
        if not faults.hit:
            assert found
            return


@pytest.mark.parametrize("call", ["open", "ftruncate", "pwrite_all", "fsync", "link", "unlink"])
async def test_a_store_that_hangs_ends_a_save_and_not_the_disk(
    call: str, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk's writes wait for a save, but for no longer than a call to a store may take."""
    bed, hung = Bed(short_path), threading.Event()
    real, armed = getattr(syscalls, call), False

    def hang(*args: Any, **how: Any) -> Any:
        if armed:
            hung.wait(30)
        return real(*args, **how)

    monkeypatch.setattr(f"forebay.origin.new_image.syscalls.{call}", hang)
    async with bed.life() as gateway:
        bed.image("a.raw")
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_BACK)
        await bed.write("d")
        monkeypatch.setattr(gateway._saving, "_patience", lambda _: 0.3)
        armed = True
        with pytest.raises(ForebayError, match=r"images:new\.raw: .*no answer within"):
            await gateway.save("d", "images:new.raw", partial=False, progress=nothing)
        with trio.fail_after(5):
            await bed.write("d")
        armed = False
        hung.set()
        await gateway.flush(["d"], progress=nothing)
        assert (bed.images / "a.raw").read_bytes()[:OWN] == NEW * OWN
