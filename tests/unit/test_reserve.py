# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The index keeps room for itself, and gives it up when a commit finds none."""

from pathlib import Path
from typing import Any
from unittest import mock

import lmdb
import pytest

from forebay_cache.errors import IndexFault
from forebay_cache.index.changes import Changes
from forebay_cache.index.index import Index
from forebay_cache.index.reserve import SIZE, Reserve


def test_a_commit_that_finds_no_room_takes_the_reserve(tmp_path: Path) -> None:
    """As on a file system that has no more room than that, whether this process has made it or one before."""
    index = Index(tmp_path / "index", 64)
    index.reserve.keep()
    file = tmp_path / "index" / "reserve"
    assert file.stat().st_blocks * 512 >= SIZE
    index.close()
    index = Index(tmp_path / "index", 64)
    store = index._commit

    def full(changes: Any) -> None:
        if file.exists():
            raise IndexFault(28, "full")
        store(changes)

    changes = Changes(None, records={("test", "x"): {"kept": True}})
    with mock.patch.object(index, "_commit", full):
        index.commit_now(changes)
    assert index.records() == {("test", "x"): {"kept": True}}
    assert not file.exists()
    index.close()


def test_a_fault_of_another_kind_leaves_it(tmp_path: Path) -> None:
    index = Index(tmp_path / "index", 64)
    index.reserve.keep()
    with (
        mock.patch.object(index, "_transaction", side_effect=lmdb.PanicError),
        pytest.raises(lmdb.Error),
    ):
        index.commit_now(Changes(None))
    assert (tmp_path / "index" / "reserve").exists()
    index.close()


def test_it_is_made_where_there_is_plenty_of_room_only(tmp_path: Path) -> None:
    with mock.patch("os.statvfs") as room:
        room.return_value.f_bavail, room.return_value.f_frsize = SIZE // 4096 + 1, 4096
        Reserve(tmp_path).keep()
    assert not (tmp_path / "reserve").exists()
    Reserve(tmp_path).keep()
    assert (tmp_path / "reserve").exists()
    assert not (tmp_path / "reserve.new").exists()
