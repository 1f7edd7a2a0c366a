# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image whose disk is gone is given back, whatever its store and the daemon do meanwhile: no other host waits for it
for ever.
"""

import errno
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import pytest
import trio

from forebay.daemon.committing import Committing
from forebay.daemon.gateway import Gateway
from forebay.daemon.record import DiskRecord
from forebay.doors.returns import KIND
from forebay.image.source import Source
from real.commands_bed import NEW, OLD, Bed, nothing, outcome

Leave = Callable[[Gateway], Awaitable[None]]


async def detach(gateway: Gateway) -> None:
    await gateway.detach("d", progress=nothing)


async def discard(gateway: Gateway) -> None:
    await gateway.detach("d", discard=True, progress=nothing)


async def commit(gateway: Gateway) -> None:
    await gateway.overlays.commit("d", nothing)


def refuses() -> AbstractContextManager[object]:
    """The store takes no image back."""
    return mock.patch.object(Source, "release", side_effect=OSError(errno.EIO, "the store is away"))


def owed(gateway: Gateway) -> list[object]:
    return list(gateway._cache.records.all(KIND).values())


async def is_paid(gateway: Gateway) -> None:
    with trio.fail_after(20):
        while owed(gateway):  # noqa: ASYNC110 - nobody tells when
            await trio.sleep(0.01)


@pytest.mark.expect_log("its owner marker stays for now")
@pytest.mark.parametrize("leave", [detach, discard, commit], ids=lambda leave: leave.__name__)
async def test_what_could_not_be_given_back_before_a_kill_is_given_back_after_it(
    leave: Leave, short_path: Path
) -> None:
    bed = Bed(short_path)
    beside = bed.image("a.img").with_name("a.img.forebay")
    async with bed.life() as gateway:
        await gateway.attach("d", "images:a.img", overlay=leave is commit)
        await bed.write("d")
        with refuses():
            await leave(gateway)
        assert len(owed(gateway)) == 1
        assert beside.exists()
    for _ in range(2):  # that it was done may not be durable yet, and is done again then
        async with bed.life() as gateway:
            await is_paid(gateway)
            assert not beside.exists()


@pytest.mark.expect_log("its owner marker stays for now")
async def test_a_new_disk_on_the_image_takes_over_what_is_owed(short_path: Path) -> None:
    """A start does not take the marker away from it then."""
    bed = Bed(short_path)
    beside = bed.image("a.img").with_name("a.img.forebay")
    async with bed.life() as gateway:
        await gateway.attach("d", "images:a.img")
        with refuses():
            await detach(gateway)
        await gateway.attach("e", "images:a.img")
        assert not owed(gateway)
    async with bed.life() as gateway:
        assert not owed(gateway)
        await bed.write("e")
        assert beside.exists()
        await gateway.detach("e", progress=nothing)
        assert not beside.exists()


async def test_a_new_disk_does_not_meet_a_return_that_is_still_under_way(short_path: Path) -> None:
    """It ends before the image is claimed: late, it would forget what that disk comes to owe."""
    bed = Bed(short_path)
    bed.image("a.img")
    begun, ended = trio.Event(), []

    async def hangs(_source: Source, **_how: bool) -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.append(True)

    async with bed.life() as gateway:
        await gateway.attach("d", "images:a.img")
        async with trio.open_nursery() as nursery:
            with mock.patch.object(Source, "release", hangs):
                nursery.start_soon(detach, gateway)
                await begun.wait()
                await gateway.attach("e", "images:a.img")
                assert ended
                assert not owed(gateway)
        await bed.write("e")


async def test_an_image_that_is_given_back_at_once_is_owed_no_more(short_path: Path) -> None:
    bed = Bed(short_path)
    bed.image("a.img")
    async with bed.life() as gateway:
        await gateway.attach("d", "images:a.img")
        await detach(gateway)
        assert not owed(gateway)
        await gateway.attach("o", "images:a.img", overlay=True)
        await gateway.detach("o", progress=nothing)
        assert not owed(gateway), "it was never ours"


async def test_a_commit_that_is_refused_leaves_the_image_alone(short_path: Path) -> None:
    """Another gateway has an overlay on it as well: nothing of the image is ours to give back."""
    bed, other = Bed(short_path / "one"), Bed(short_path / "two")
    beside = bed.image("a.img").with_name("a.img.forebay")
    other.config = other.config.model_copy(update={"stores": bed.config.stores})
    async with bed.life() as gateway:
        await gateway.attach("d", "images:a.img", overlay=True)
        await bed.write("d")
        async with other.life() as elsewhere:
            await elsewhere.attach("o", "images:a.img", overlay=True)
            assert "shut that down first" in await outcome(lambda: commit(gateway))
            assert not owed(gateway)
            assert not beside.exists()
            await bed.starts_with("d", NEW)
            await other.starts_with("o", OLD)


@pytest.mark.expect_log("its owner marker stays for now")
async def test_what_is_owed_when_a_disk_that_only_reads_comes_is_still_owed(
    short_path: Path,
) -> None:
    bed = Bed(short_path)
    beside = bed.image("a.img").with_name("a.img.forebay")
    async with bed.life() as gateway:
        await gateway.attach("d", "images:a.img")
        with refuses():
            await detach(gateway)
        await gateway.attach("o", "images:a.img", overlay=True)
        assert beside.exists()
        assert len(owed(gateway)) == 1
    async with bed.life() as gateway:
        assert not owed(gateway), "given back before the disk was on it again"
        assert not beside.exists()


@pytest.mark.expect_log("its changes are not in its image yet")
async def test_a_fault_of_a_commit_that_is_gone_on_with_is_its_disks(
    short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bed = Bed(short_path)
    bed.image("a.img")
    bed.image("b.img")
    async with bed.life() as gateway:
        await gateway.attach("d", "images:a.img", overlay=True)
        await gateway.attach("other", "images:b.img")
        await bed.write("d")
        record = gateway._records.all()["d"]
        gateway._records.put("d", DiskRecord.read({**record.write(), "committing": True}))
        await gateway._records.commit()
    with mock.patch.object(Committing, "_commit", side_effect=RuntimeError("planted")):
        async with bed.life():
            with trio.fail_after(20):
                while "planted" not in caplog.text:  # noqa: ASYNC110 - nobody tells when
                    await trio.sleep(0.01)
            await bed.write("other")
