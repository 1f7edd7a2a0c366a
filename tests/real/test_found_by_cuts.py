# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What test_power_cuts.py has found by chance, each at its moment and without chance."""

import errno
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing

from forebay.checkpoint.batches import IntoImage
from forebay.checkpoint.passes import Pass
from forebay.errors import ForebayError
from forebay.origin.file import FileOrigin
from forebay.units import Mode
from real.commands_bed import NEW, OLD, SIZE, Bed, nothing, outcome

OWN = 65536


@pytest.fixture(autouse=True)
def _may_say_so(expect_log: Callable[[str], None]) -> None:
    expect_log("(?s).*")


async def test_what_a_pass_takes_past_a_failed_device_does_not_come_to_lie_under_old_blocks(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device had the old data, clean and durably, and never got the new: the image got it, and power fails."""
    bed = Bed(short_path)
    device = short_path / "state" / "cache.img"
    async with bed.life() as gateway:
        bed.image("a.raw")
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_BACK)
        disk = bed.disk("d").disk
        await gateway.preload("d", SIZE, nothing)
        await gateway._cache.commit()
        durable = device.read_bytes()
        await disk.write(0, memoryview(NEW * OWN), False)
        gateway._cache.failure.fail(OSError(errno.EIO, "planted"))

        async def cut(_: Pass) -> None:
            raise OSError(errno.EIO, "planted: the power is cut")

        monkeypatch.setattr(Pass, "_settle", cut)
        with pytest.raises((OSError, ForebayError)):
            await disk.writeback.catch_up()
        assert (bed.images / "a.raw").read_bytes()[:OWN] == NEW * OWN
    monkeypatch.undo()
    device.write_bytes(durable)
    async with bed.life():
        assert bed.told()["d"][1] == "ready"
        await bed.starts_with("d", NEW)


async def test_a_change_that_was_noticed_is_no_conflict_after_a_crash(short_path: Path) -> None:
    """The disk had nothing dirty, went on with the image as it is now, and wrote."""
    bed = Bed(short_path)
    async with bed.life() as gateway:
        path = bed.image("a.raw")
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_BACK)
        await bed.starts_with("d", OLD)
        await bed.disk("d").disk.image.look()
        await gateway._cache.commit()
    with path.open("r+b") as file:
        file.write(b"x" * OWN)
    os.utime(path, ns=(path.stat().st_mtime_ns + 10**9,) * 2)
    async with bed.life():
        await bed.starts_with("d", b"x")
        await bed.write("d")
    async with bed.life() as gateway:
        assert bed.told()["d"][1] == "ready"
        await bed.starts_with("d", NEW)
        await gateway.flush(["d"], progress=nothing)
        assert path.read_bytes()[:OWN] == NEW * OWN


async def _written_and_detached(bed: Bed, how: Callable[[], Awaitable[None]]) -> Path:
    """An image that was written, whose last look then failed; `how` the disk goes."""
    path = bed.image("a.raw")
    await bed.gateway.attach("d", "images:a.raw", mode=Mode.WRITE_THROUGH)
    await bed.starts_with("d", OLD)
    await bed.write("d")
    await bed.gateway._cache.commit()
    await how()
    return path


def _put_a_backup_over(path: Path) -> None:
    path.write_bytes(b"x" * SIZE)


async def test_what_is_restored_after_a_detach_whose_last_look_failed_is_what_is_read(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not known then what the image looks like after our own writes."""
    bed = Bed(short_path)
    async with bed.life() as gateway:

        async def detach() -> None:
            with monkeypatch.context() as patch:
                failing = mock.AsyncMock(side_effect=OSError(errno.EIO, "planted"))
                patch.setattr(FileOrigin, "identity", failing)
                await gateway.detach("d", progress=nothing)

        _put_a_backup_over(await _written_and_detached(bed, detach))
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_THROUGH)
        await bed.starts_with("d", b"x")


async def test_what_is_restored_after_a_detach_that_a_start_finished_is_what_is_read(
    short_path: Path,
) -> None:
    bed = Bed(short_path)
    async with bed.life() as gateway:

        async def detach() -> None:
            records, record = gateway._records, bed.disk("d").record
            await records.change("d", record, record.as_leaving())  # killed right behind that

        path = await _written_and_detached(bed, detach)
    async with bed.life() as gateway:
        assert bed.told() == {}
        _put_a_backup_over(path)
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_THROUGH)
        await bed.starts_with("d", b"x")


async def test_a_discard_waits_for_the_pass_under_way(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image has half of a committed checkpoint: it gets the rest before what is dirty is given up."""
    bed = Bed(short_path)
    write, half, go_on = IntoImage._one, trio.Event(), trio.Event()

    async def held(self: IntoImage, *arguments: Any) -> None:
        half.set()
        await go_on.wait()
        await write(self, *arguments)

    async with bed.life() as gateway:
        path = bed.image("a.raw")
        await gateway.attach("d", "images:a.raw", mode=Mode.WRITE_BACK)
        await bed.write("d")
        monkeypatch.setattr(IntoImage, "_one", held)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome, partial(gateway.flush, ["d"], progress=nothing))
            await half.wait()
            change, decided = gateway._records.change, []

            async def noted(*arguments: Any) -> None:
                decided.append(go_on.is_set())
                await change(*arguments)

            monkeypatch.setattr(gateway._records, "change", noted)
            writeback = bed.disk("d").disk.writeback
            nursery.start_soon(partial(gateway.detach, "d", discard=True, progress=nothing))
            while not writeback.is_given_up:  # noqa: ASYNC110  (nobody tells)
                await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        assert decided == [True], "whether the pass could go on before it was decided"
        assert not bed.told()
        assert path.read_bytes() == NEW * OWN + OLD * (SIZE - OWN)
