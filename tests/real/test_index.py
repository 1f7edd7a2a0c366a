# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The index on a real LMDB whose file cannot be written, at one place or at all."""

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from forebay_cache import CacheError, format_device
from forebay_cache.errors import IndexFault
from forebay_cache.format.records import PAGE_KEY
from forebay_cache.index.changes import Changes
from forebay_cache.index.index import Index

PAGE = b"\1" * 512


def pages(index: Index, first: int, count: int) -> Changes:
    changes = Changes(index.meta)
    changes.pages = [(PAGE_KEY.pack(1, n), PAGE) for n in range(first, first + count)]
    return changes


def root_writer(index: Index) -> int:
    """LMDB's descriptor for the root of its tree: the one of the two that is synchronous."""
    data = (index.path / "data.mdb").stat()
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            found = os.fstat(number)
        except OSError:
            continue
        same = (found.st_dev, found.st_ino) == (data.st_dev, data.st_ino)
        if same and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DSYNC:
            return number
    raise AssertionError("not found")


def test_a_full_map_is_an_oserror(tmp_path: Path) -> None:
    index = Index(tmp_path / "index", 64)
    try:
        index._env.set_mapsize(1 << 17)
        with pytest.raises(IndexFault) as raised:
            index.commit_now(pages(index, 0, 1024))
        assert raised.value.errno == errno.ENOSPC
        assert index.page(1, 0) is None
        index._env.set_mapsize(16 << 20)
        index.commit_now(pages(index, 0, 1024))
        assert index.page(1, 1023) == PAGE
    finally:
        index.close()


def test_an_index_that_was_looked_at_is_closed(tmp_path: Path) -> None:
    """Before a device is formatted: the directory may be moved away, and no thread is left."""
    index = tmp_path / "index"
    opened = Index(index, 64)
    opened.meta.fresh = False
    opened.commit_now(Changes(opened.meta))
    opened.close()
    before = threading.active_count()
    with pytest.raises(CacheError, match="an index that is in use"):
        format_device(tmp_path / "device", index, size=8 << 20)
    assert threading.active_count() == before


def test_the_index_is_opened_anew_when_lmdb_has_given_up(tmp_path: Path) -> None:
    """Its root cannot be written: MDB_PANIC from then on, for readers too."""
    index = Index(tmp_path / "index", 64)
    try:
        index.commit_now(pages(index, 0, 1))
        number = root_writer(index)
        kept = os.dup(number)
        full = os.open("/dev/full", os.O_WRONLY)
        try:
            os.dup2(full, number)
            with pytest.raises(IndexFault):
                index.commit_now(pages(index, 1, 1))
        finally:
            os.dup2(kept, number)
            os.close(kept)
            os.close(full)
        assert index.page(1, 0) == PAGE
        assert index.page(1, 1) is None
        index.commit_now(pages(index, 2, 1))
        assert index.page(1, 2) == PAGE
    finally:
        index.close()
