# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The source of a disk: opened when it can be, claimed while it writes, given back when nothing can be written late."""

import json
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from forebay.errors import ForebayError, InUseError
from forebay.image.source import Source
from forebay.image.use import Use
from forebay.origin.addresses import DeviceAddress, FileAddress
from forebay.origin.calls import Buffer, SystemCalls
from forebay.origin.opening import open_image
from forebay.origin.threads import StoreThreads
from forebay.sidecar.claim import Claim
from forebay.sidecar.locks import WRITES, take_locks
from forebay.sidecar.marker import Marker
from forebay.sidecar.record import Owner, TakenOver
from forebay_cache.blocks.frozen import Range
from real.processes import loop_device

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> FileAddress:
    (tmp_path / "vm.img").write_bytes(b"x" * SIZE)
    return FileAddress("images", tmp_path, "vm.img")


@asynccontextmanager
async def sources(image: FileAddress, timeout: float = 30) -> AsyncIterator[Callable[..., Source]]:
    """`make(size=..., read_only=..., overlay=..., gateway=...)` makes a source of the image."""
    async with trio.open_nursery() as nursery:
        threads = StoreThreads("s")

        def make(size: int | None = None, gateway: str = "us", **how: Any) -> Source:
            use = Use("d", gateway, **how)
            return Source(
                image, "vm", use, threads=threads, timeout=timeout, nursery=nursery, size=size
            )

        yield make
        nursery.cancel_scope.cancel()


def claim_of(source: Source) -> Claim:
    assert source.claim is not None
    return source.claim


def marker(image: FileAddress) -> dict[str, Any] | None:
    path = image.root / "vm.img.forebay" / "owner"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


async def test_a_source_from_attach_to_detach(image: FileAddress) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    async with sources(image) as make:
        source = make()
        await source.prepare()
        assert source.size == SIZE
        origin = await source.open()
        await claim_of(source).mark_dirty()
        assert (marker(image) or {})["state"] == "dirty"
        await origin.close()
        again = await source.open()  # after the origin broke, say: the claim is still ours
        await again.close()
        await source.release()
        assert marker(image) is None
        assert os.listdir(image.root) == ["vm.img"]
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_what_a_restart_left_is_given_back_although_it_was_not_opened_since(
    image: FileAddress,
) -> None:
    async with sources(image) as make:
        first = make()
        await first.prepare()
        await claim_of(first).mark_dirty()
        await first.leave()
        await first.close_prepared()
        assert marker(image) is not None
        second = make(size=SIZE)
        with pytest.raises(OSError, match="not reached yet"):
            await claim_of(second).mark_dirty()
        await second.release()
        assert os.listdir(image.root) == ["vm.img"]


async def test_an_attach_that_fails_gives_back_what_it_took(image: FileAddress) -> None:
    async with sources(image) as make:
        source = make()
        await source.prepare()
        await source.abandon()
        assert os.listdir(image.root) == ["vm.img"]


async def test_an_image_of_another_size_is_not_opened_under_a_disk(image: FileAddress) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    async with sources(image) as make:
        source = make(size=SIZE // 2, read_only=True)
        with pytest.raises(TakenOver, match="1048576 bytes and had 524288"):
            await source.open()
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_an_image_that_is_taken_meanwhile_is_not_written(image: FileAddress) -> None:
    async with sources(image) as make:
        ours = make()
        await ours.prepare()
        await ours.leave()
        await ours.close_prepared()
        path = image.root / "vm.img.forebay" / "owner"
        text = path.read_text()
        path.write_text(json.dumps({**json.loads(text), "gateway": "them"}))
        again = make(size=SIZE)
        with pytest.raises(TakenOver, match="was taken over by host"):
            await again.open()
        await again.begin_anew()
        with pytest.raises(OSError, match="belongs to host"):
            await again.open()
        path.resolve().unlink()
        with pytest.raises(TakenOver, match="was taken over$"):
            await make(size=SIZE).open()
        path.write_text(json.dumps({**json.loads(text), "gateway": "them"}))
        with pytest.raises(ForebayError, match="overlay needs an image that stays"):
            await make(overlay=True).prepare()


@pytest.mark.expect_log("is written by host .* 'd' may read old data")
async def test_reading_what_another_gateway_writes_is_told(image: FileAddress) -> None:
    file = open_image(image, read_only=False)
    held = Marker.take(image, file, Owner.of_this_process("them", "theirs"))
    async with sources(image) as make:
        source = make(read_only=True)
        await source.prepare()
        await source.release()
    held.release()
    os.close(file.fd)


async def test_gateways_that_read_an_image_share_it_and_keep_writers_out(
    image: FileAddress,
) -> None:
    async with sources(image) as make:
        ours, theirs = make(overlay=True), make(gateway="them", read_only=True)
        await ours.prepare()
        await theirs.prepare()
        with pytest.raises(InUseError, match="is held unchanged by"):
            await make(gateway="a third").prepare()
        assert os.listdir(image.root) == ["vm.img"]
        await ours.release()
        await theirs.release()
        writer = make(gateway="a third")
        await writer.prepare()
        await writer.release()


@pytest.mark.expect_log("is written by host .* 'd' may read old data")
async def test_who_reads_what_another_gateway_writes_does_not_keep_that_from_coming_back(
    image: FileAddress,
) -> None:
    async with sources(image) as make:
        theirs = make(gateway="them")
        await theirs.prepare()
        await theirs.leave()  # it restarts
        await theirs.close_prepared()
        ours = make(read_only=True)
        await ours.prepare()
        again = make(gateway="them", size=SIZE)
        origin = await again.open()
        await origin.close()
        await again.release()
        await ours.release()


async def test_a_device_is_locked_too(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with loop_device(tmp_path / "disk", 512) as device:
        async with trio.open_nursery() as nursery:
            use, threads = Use("d", "us"), StoreThreads("s")
            source = Source(
                DeviceAddress(str(device)), "dev", use, threads=threads, timeout=30, nursery=nursery
            )
            fd = os.open(device, os.O_RDWR)
            take_locks(fd, WRITES)
            with pytest.raises(InUseError, match="is being written by"):
                await source.prepare()
            os.close(fd)
            await source.prepare()
            await source.release()


async def test_the_marker_tells_how_much_is_dirty(
    image: FileAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.sidecar.marker.COUNT_SECONDS", 0.0)
    async with sources(image) as make:
        source = make()
        claim_of(source).dirty_bytes = lambda: 8192
        await source.prepare()
        await source.check()
        assert (marker(image) or {})["dirty_bytes"] == 0, "clean"
        await claim_of(source).mark_dirty()
        await source.check()
        assert (marker(image) or {})["dirty_bytes"] == 8192
        journal = await claim_of(source).begin_redo("2026-01-02T03:04:05+00:00")
        await journal.add([Range(0, 4096, None)])
        await journal.commit()
        await journal.end()
        assert (marker(image) or {})["dirty_bytes"] == 4096, "what came after the checkpoint"
        await source.release()


@pytest.mark.parametrize("gone", [True, False])
async def test_what_was_lost_is_told_once_and_refused_ever_after(
    image: FileAddress, gone: bool
) -> None:
    told: list[str] = []
    async with sources(image) as make:
        source = make()
        claim_of(source).on_lost = told.append
        await source.prepare()
        await claim_of(source).mark_dirty()
        path = (image.root / "vm.img.forebay" / "owner").resolve()
        text = json.dumps({**json.loads(path.read_text()), "gateway": "them"})
        path.unlink()
        if not gone:
            path.write_text(text)
        for _ in range(2):
            with pytest.raises(OSError, match="was taken over"):
                await source.check()
            with pytest.raises(OSError, match="was taken over"):
                await claim_of(source).begin_redo("")
        assert len(told) == 1
        await source.release()
        assert path.exists() is not gone
        assert gone or path.read_text() == text


async def test_a_write_that_hangs_keeps_the_marker(
    image: FileAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another gateway must not begin to write while one of our writes may still arrive."""
    back = threading.Event()
    real = SystemCalls.pwritev

    def hang(self: SystemCalls, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        back.wait(20)
        return real(self, fd, buffers, offset)

    monkeypatch.setattr(SystemCalls, "pwritev", hang)
    async with sources(image, timeout=0.2) as make:
        source = make()
        await source.prepare()
        origin = await source.open()
        with pytest.raises(TimeoutError):
            await origin.write(0, [b"late"])
        await origin.close()
        with pytest.raises(TimeoutError, match="hung write"):
            await source.release()
        assert marker(image) is not None
        back.set()
        origin.timeout = 20
        await source.release()
        assert marker(image) is None


async def test_the_first_attempt_after_a_restart_is_short(
    image: FileAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.image.source.START_SECONDS", 0.1)
    back = threading.Event()

    def hang(*_: object, **__: object) -> object:
        back.wait(20)
        raise OSError("late")

    descriptors = len(os.listdir("/proc/self/fd"))
    async with sources(image) as make:
        before = make()
        await before.prepare()
        await before.leave()
        await before.close_prepared()
        source = make(size=SIZE)
        with monkeypatch.context() as patch:
            patch.setattr("forebay.image.opener.open_image", hang)
            with trio.fail_after(10), pytest.raises(TimeoutError, match="opening vm"):
                await source.open()
        back.set()
        origin = await source.open()
        assert origin.size == SIZE
        await origin.close()
        await source.release()
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_one_image_by_two_names(image: FileAddress, tmp_path: Path) -> None:
    async with sources(image) as make:
        ours = make(read_only=True)
        threads = StoreThreads("t")

        def other(name: FileAddress) -> Source:
            use = Use("e", "us", read_only=True)
            return Source(name, "e", use, threads=threads, timeout=9, nursery=ours._opener._nursery)

        assert ours.is_same_image(
            other(FileAddress("parent", tmp_path.parent, f"{tmp_path.name}/vm.img"))
        )
        (tmp_path / "mount").mkdir()
        os.link(tmp_path / "vm.img", tmp_path / "mount" / "vm.img")  # as a bind mount shows it
        mounted = other(FileAddress("mount", tmp_path / "mount", "vm.img"))
        assert not ours.is_same_image(mounted), "not known before it is open"
        for one in (ours, mounted):
            await one.prepare()
        assert ours.is_same_image(mounted)
        for one in (ours, mounted):
            await one.release()
