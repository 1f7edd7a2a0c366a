# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the daemon takes of the host's limits, and what it says where one is too low."""

import errno
import os
import resource
from pathlib import Path

import lmdb
import pytest

from forebay.process import process
from forebay_cache import CacheError
from forebay_cache.index import index


def test_the_daemon_may_have_as_many_descriptors_as_the_host_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        process._raise_limits()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOMEM, "more address space"),
        (errno.ENOSPC, "make room there"),
        (errno.EROFS, "mount it for writing"),
        (errno.EMFILE, "more descriptors"),
        (errno.EIO, "see the kernel's log"),
        (errno.EBADMSG, "see 'The index is damaged' in RECOVERY.md"),
    ],
)
@pytest.mark.parametrize("by_lmdb", [True, False])
def test_an_index_that_cannot_be_opened_says_what_to_do(
    number: int, said: str, by_lmdb: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = OSError(number, os.strerror(number))
    error = lmdb.Error(f"{tmp_path}: {os.strerror(number)}") if by_lmdb else fault

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(lmdb, "open", fail)
    monkeypatch.setattr(lmdb, "Environment", fail)
    with pytest.raises(CacheError, match=said) as refused:
        index.Index(tmp_path / "index", 100)
    assert len(str(refused.value).splitlines()) == 1
