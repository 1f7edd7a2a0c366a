# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Who else has the cache device: a daemon, or only the memory of one that was killed."""

import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay_cache.device import files
from forebay_cache.errors import CacheError
from forebay_cache.offline.check import _opened

OPENING: list[Callable[[Path], int]] = [files.open_device, _opened]


def mapped(path: Path) -> mmap.mmap:
    """The file, locked as a daemon does, by a map alone: what is left of one whose descriptors are closed."""
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    found = mmap.mmap(fd, 1 << 20)
    os.close(fd)
    return found


@pytest.mark.parametrize("opened", OPENING)
def test_what_is_left_of_a_killed_daemon_is_waited_for(
    tmp_path: Path, opened: Callable[[Path], int]
) -> None:
    """A start right after a kill, while somebody looks at the dead process, is no second daemon."""
    left = mapped(tmp_path / "cache.img")
    refused = threading.Event()

    def goes(seconds: float) -> None:
        refused.set()
        left.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", goes)
        os.close(opened(tmp_path / "cache.img"))
    assert refused.is_set(), "it was not locked at first"


@pytest.mark.parametrize("opened", OPENING)
def test_a_daemon_that_stays_is_told_of(
    tmp_path: Path, opened: Callable[[Path], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.1)
    left = mapped(tmp_path / "cache.img")
    with pytest.raises(CacheError, match=r"cache\.img: .* uses this cache"):
        opened(tmp_path / "cache.img")
    left.close()
