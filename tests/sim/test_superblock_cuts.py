# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Power cuts while a superblock is replaced: every one that there can be, by 512 bytes."""

import itertools
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import forebay_cache.device.superblock
from forebay_cache import CacheError, open_cache
from forebay_cache.device.superblock import read_superblock, write_format, write_superblock
from forebay_cache.format.superblock import COPY_OFFSET, SUPERBLOCK, Superblock, plan
from forebay_cache.index.index import create

TEAR = 512
SIZE = 8 << 20
IDENT = uuid.UUID("5d1f3c52-7a0e-4c6c-9d3c-0f1b2a3c4d5e")

Event = tuple[int, bytes] | None
"""A write, as (offset, data), or None for a sync."""


class _System:
    """The module os; keeps what is written and synced."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self.events.append((offset, bytes(data)))
        return os.pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        self.events.append(None)
        os.fdatasync(fd)


def cuts(before: bytes, events: list[Event]) -> Iterator[bytes]:
    """What may be there after a cut: all that was synced, and of what was not any subset of its pieces."""
    durable = bytearray(before)
    for event in events:
        if event is None:
            continue
        offset, data = event
        changed = [
            n
            for n in range(0, len(data), TEAR)
            if data[n : n + TEAR] != durable[offset + n : offset + n + TEAR]
        ]
        for count in range(len(changed) + 1):
            for some in itertools.combinations(changed, count):
                medium = bytearray(durable)
                for n in some:
                    medium[offset + n : offset + n + TEAR] = data[n : n + TEAR]
                yield bytes(medium)
        durable[offset : offset + len(data)] = data  # a sync follows each write, as asserted below


def in_place(fd: int, layout: Superblock) -> None:
    """What does not work: the one superblock, written over."""
    system: Any = vars(forebay_cache.device.superblock)["os"]
    system.pwrite(fd, layout.pack(), 0)
    system.fdatasync(fd)


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "made before there was a copy"])
@pytest.mark.parametrize(("write", "works"), [(write_superblock, True), (in_place, False)])
def test_old_or_new_after_any_cut(
    write: Callable[[int, Superblock], None],
    works: bool,
    copy: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "device"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, SIZE)
    old = write_format(fd, path, IDENT)
    os.ftruncate(fd, 2 * SIZE)
    if not copy:
        os.pwrite(fd, bytes(SUPERBLOCK), COPY_OFFSET)
    before = os.pread(fd, COPY_OFFSET + SUPERBLOCK, 0)
    system = _System()
    monkeypatch.setattr(forebay_cache.device.superblock, "os", system)
    new = old.grown(2 * SIZE)
    write(fd, new)
    assert [event is None for event in system.events] == [False, True] * (len(system.events) // 2)
    found = set()
    damaged = 0
    for medium in cuts(before, system.events):
        os.pwrite(fd, medium, 0)
        try:
            found.add(read_superblock(fd, path))
        except CacheError:
            damaged += 1
    os.close(fd)
    assert found == {old, new}
    assert bool(damaged) == (not works and not copy)


def test_a_layout_that_grew_keeps_everything_where_it_is() -> None:
    old = plan(SIZE, IDENT)
    new = old.grown(1 << 40)
    assert (new.journal_size, new.data_offset, new.uuid) == (
        old.journal_size,
        old.data_offset,
        old.uuid,
    )
    assert new.slots == ((1 << 40) - old.data_offset) // 65536
    assert Superblock.unpack(new.pack(), Path("x")) == new


def test_a_format_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    """The first start of a daemon: nothing was ever stored, so nobody has to be asked."""
    index, device = tmp_path / "index", tmp_path / "cache.img"
    superblock = plan(SIZE, IDENT).pack()
    cut = [*cuts(bytes(SUPERBLOCK), [(0, superblock), None])]
    both = [*(first + bytes(SUPERBLOCK) for first in cut), *(superblock + copy for copy in cut)]
    for found in both:
        device.write_bytes(found + bytes(SIZE - len(found)))
        shutil.rmtree(index, ignore_errors=True)
        create(index, IDENT)
        open_cache(device, index, boot="this").release()
        with device.open("rb") as file:
            assert read_superblock(file.fileno(), device) == plan(SIZE, IDENT)


@pytest.mark.parametrize("foreign", [b"\1", b"FOREBAY\0" + b"\1" * 600])
def test_what_is_not_ours_is_not_formatted(tmp_path: Path, foreign: bytes) -> None:
    index, device = tmp_path / "index", tmp_path / "cache.img"
    create(index)
    for offset in (0, COPY_OFFSET, SIZE // 2):
        content = bytearray(SIZE)
        content[offset : offset + len(foreign)] = foreign
        device.write_bytes(content)
        with pytest.raises(CacheError, match="format --force"):
            open_cache(device, index, boot="this")
        assert device.read_bytes() == content
