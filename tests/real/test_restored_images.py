# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A backup that is written into the image's own file after a kill: it is what is read then, or the disk stops."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from forebay.checkpoint.batches import IntoJournal
from forebay.units import Mode
from real.commands_bed import NEW, OLD, SIZE, Bed

BACKUP = b"b"


@pytest.fixture(autouse=True)
def _may_say_so(expect_log: Callable[[str], None]) -> None:
    expect_log("was changed by somebody else|write-back failed")


def _restore(path: Path, age: float) -> None:
    """Write a backup into the file, whose time is kept if it has an `age` in seconds: ``cp -p`` and ``rsync -t``."""
    with path.open("r+b") as file:
        file.write(BACKUP * SIZE)
    os.utime(path, (time.time() + 1 - age,) * 2)  # 1: the clock of a file system has steps


async def test_one_restored_after_a_kill_while_a_journal_was_written_is_noticed(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the pass has reached the image by then, so that no other times than those on record are ours."""
    bed = Bed(short_path)
    begun = trio.Event()

    async def put_all(_: IntoJournal) -> None:
        begun.set()
        await trio.sleep_forever()

    async with bed.life() as gateway:
        path = bed.image("a.raw")
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_BACK)
        await bed.starts_with("d", OLD)
        await bed.disk("d").disk.image.look()
        await bed.write("d")
        monkeypatch.setattr(IntoJournal, "put_all", put_all)
        bed.disk("d").disk.writeback.want()
        await begun.wait()
        await gateway._cache.commit()
    monkeypatch.undo()
    _restore(path, age=0)
    async with bed.life():
        assert bed.told()["d"][1] == "conflict"
        assert path.read_bytes() == BACKUP * SIZE


@pytest.mark.parametrize("mode", [Mode.WRITE_THROUGH, Mode.WRITE_AROUND])
async def test_one_that_keeps_its_time_is_noticed_after_a_kill_while_the_image_was_written(
    short_path: Path, mode: Mode
) -> None:
    bed = Bed(short_path)
    async with bed.life() as gateway:
        path = bed.image("a.raw")
        await gateway.attach("d", "images:a.raw", mode=mode)
        await bed.starts_with("d", OLD)
        await bed.disk("d").disk.image.look()
        await bed.write("d")
        await bed.starts_with("d", NEW)
        await gateway._cache.commit()
    _restore(path, age=3600)
    async with bed.life() as gateway:
        await bed.starts_with("d", BACKUP)
        assert bed.told()["d"][1] == "ready"
        await bed.write("d")
    async with bed.life():  # our own writes of the life before are ours
        await bed.starts_with("d", NEW)
        assert bed.told()["d"][1] == "ready"


@pytest.mark.parametrize("age", [0, 3600])
async def test_one_restored_after_a_kill_right_behind_a_pass_stops_a_disk_with_dirty_data(
    short_path: Path, age: float
) -> None:
    bed = Bed(short_path)
    async with bed.life() as gateway:
        path = bed.image("a.raw")
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_BACK)
        await bed.starts_with("d", OLD)
        await bed.disk("d").disk.image.look()
        await bed.write("d")
        await bed.disk("d").disk.writeback.catch_up()
        await bed.write("d", b"m")
    _restore(path, age)
    async with bed.life():
        assert bed.told()["d"][1] == "conflict"
        assert path.read_bytes() == BACKUP * SIZE


async def test_another_mode_of_the_file_is_no_change_after_a_kill(short_path: Path) -> None:
    bed = Bed(short_path)
    async with bed.life() as gateway:
        path = bed.image("a.raw")
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_THROUGH)
        await bed.starts_with("d", OLD)
        await bed.disk("d").disk.image.look()
        await bed.write("d")
        await gateway._cache.commit()
    await trio.sleep(1.1)
    path.chmod(0o600)
    async with bed.life():
        read = bed.disk("d").disk.status()["origin_read_bytes"]
        await bed.starts_with("d", NEW)
        assert bed.disk("d").disk.status()["origin_read_bytes"] == read, "the cache is warm"
