# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The device's sync: the kernel's asynchronous way, the thread, and what both do with an error."""

import errno
import os
from pathlib import Path

import pytest
import trio

from forebay_cache.device.syncer import Syncer


class Thread:
    """Counts the syncs that went to a thread."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        os.fdatasync(self.fd)


async def test_syncs_a_file_many_times(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    thread = Thread(fd)
    syncer = Syncer(fd, thread)
    for n in range(50):
        os.pwrite(fd, bytes([n]) * 4096, n * 4096)
        await syncer()
    syncer.close()
    os.close(fd)
    if thread.calls:
        pytest.skip("the kernel refuses asynchronous fdatasync here, so the thread did it")


async def test_slow_device_lets_the_loop_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    syncer = Syncer(fd, Thread(fd))
    monkeypatch.setattr(syncer, "_quick", False)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        for _ in range(20):
            os.pwrite(fd, os.urandom(1 << 20), 0)
            await syncer()
        nursery.cancel_scope.cancel()
    assert ticks
    syncer.close()
    os.close(fd)


async def test_a_descriptor_that_cannot_be_synced_is_an_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    syncer = Syncer(writer, Thread(writer))
    with pytest.raises(OSError, match="Invalid") as caught:
        await syncer()
    assert caught.value.errno == errno.EINVAL
    syncer.close()
    os.close(reader)
    os.close(writer)


async def test_without_the_kernels_way_a_thread_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay_cache.device.syncer._NUMBERS", {})
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    thread = Thread(fd)
    syncer = Syncer(fd, thread)
    await syncer()
    assert thread.calls == 1
    syncer.close()
    os.close(fd)


async def test_now_is_done_in_a_moment_or_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    syncer = Syncer(fd, Thread(fd))
    if not syncer.quick:
        pytest.skip("the kernel refuses asynchronous fdatasync here")
    monkeypatch.setattr(syncer, "_moment", syncer._no_time)  # no device is that quick
    went_on = 0
    for _ in range(20):
        os.pwrite(fd, os.urandom(1 << 20), 0)
        if not syncer.now():
            went_on += 1
            assert syncer.pending
            await syncer.finish()
        assert not syncer.pending
        await syncer()
    assert went_on
    syncer.close()
    os.close(fd)


async def test_now_begins_nothing_where_the_kernel_refuses() -> None:
    reader, writer = os.pipe()
    syncer = Syncer(writer, Thread(writer))
    assert not syncer.now()
    assert not syncer.pending
    with pytest.raises(OSError, match="Invalid"):
        await syncer()
    assert not syncer.quick
    syncer.close()
    os.close(reader)
    os.close(writer)
