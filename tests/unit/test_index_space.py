# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The index has room for the worst that a device of its size can hold, and for writing all of it back."""

import os
import threading
from array import array
from pathlib import Path

import pytest

import forebay_cache.index.index
from forebay_cache import CacheError, format_device, open_cache
from forebay_cache.format.checksum import GROUP
from forebay_cache.format.entry import pack
from forebay_cache.format.geometry import FULL, PAGE_BLOCKS, SECTORS
from forebay_cache.format.records import PAGE_KEY, LayerName, LayerRecord
from forebay_cache.index.changes import Changes, Taken
from forebay_cache.index.index import Index

SLOTS = 4096


def _page(slot: int, *, private: bool) -> bytes:
    words = array("Q", bytes((16 if private else 8) * PAGE_BLOCKS))
    words[slot % PAGE_BLOCKS] = pack(slot, 0, FULL)
    return words.tobytes()


def test_the_map_holds_the_worst_case_and_what_writing_it_back_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dirty block in each page, all slots used; then all of them change layers, in one commit."""
    monkeypatch.setattr(forebay_cache.index.index, "_MAP_LEAST", 0)
    index = Index(tmp_path / "index", SLOTS)
    order = [
        n * 1237 % SLOTS for n in range(SLOTS)
    ]  # pages half full, as they are when keys come in any order
    for start in range(0, SLOTS, 256):
        changes = Changes(index.meta)
        changes.layers = {
            1: LayerRecord(LayerName.of_disk("d", 1, "i")),
            2: LayerRecord(LayerName.of_image("i")),
        }
        some = sorted(order[start : start + 256])
        changes.pages = [(PAGE_KEY.pack(1, n), _page(n, private=True)) for n in some]
        if not start:
            raw = bytes(4 * SECTORS * GROUP)
            changes.sums = [Taken(g, (1 << GROUP) - 1, raw) for g in range(SLOTS // GROUP)]
        index.commit_now(changes)
    changes = Changes(index.meta)
    moved = [(PAGE_KEY.pack(1, n), bytes(16 * PAGE_BLOCKS)) for n in range(SLOTS)]
    moved += [(PAGE_KEY.pack(2, n), _page(n, private=False)) for n in range(SLOTS)]
    changes.pages = sorted(moved)
    index.commit_now(changes)
    info = index._env.info()
    used = (info["last_pgno"] + 1) * index._env.stat()["psize"]
    assert used < info["map_size"] / 2
    assert not index.pages(1, 0, 1)
    assert len(index.pages(2, 0, 2 * SLOTS)) == SLOTS
    index.close()


def test_a_format_that_is_refused_leaves_nothing_open(tmp_path: Path) -> None:
    device, index = tmp_path / "cache.img", tmp_path / "index"
    cache = open_cache(device, index, size=4 << 20)
    cache.release()
    with device.open("r+b") as file:
        file.write(bytes(8192))  # as blank as a new one, but for the index
        file.truncate(0)
        file.truncate(4 << 20)
    with pytest.raises(CacheError, match="in use"):
        format_device(device, index)
    left = [
        os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)
    ]
    assert not [name for name in left if name.startswith(str(tmp_path))]
    assert not [thread for thread in threading.enumerate() if thread.name == "index-writer"]
    Index(index, 0).close()


def _is_open(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")
