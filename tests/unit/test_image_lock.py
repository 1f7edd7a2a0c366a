# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""QEMU's locks, between two descriptors of one process: OFD locks are theirs, not the process's."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forebay.origin.mounts import has_local_locks, parse
from forebay.sidecar.locks import (
    LOOKS,
    READS,
    WRITES,
    Access,
    InUse,
    NoLocks,
    set_lock,
    take_locks,
)

NAMES = {id(WRITES): "writes", id(READS): "reads", id(LOOKS): "looks"}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[], int]]:
    path = tmp_path / "a.raw"
    path.write_bytes(b"x")  # the locked bytes lie beyond the end
    found: list[int] = []

    def opener(flags: int = os.O_RDWR) -> int:
        found.append(os.open(path, flags))
        return found[-1]

    yield opener
    for fd in found:
        os.close(fd)


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        (WRITES, WRITES, False),
        (WRITES, READS, False),
        (WRITES, LOOKS, True),
        (READS, WRITES, False),
        (READS, READS, True),
        (READS, LOOKS, True),
        (LOOKS, WRITES, True),
        (LOOKS, READS, True),
    ],
    ids=lambda x: NAMES.get(id(x), str(x)),
)
def test_who_may_meet(opened: Callable[[], int], first: Access, second: Access, meet: bool) -> None:
    one, other = opened(), opened()
    take_locks(one, first)
    if meet:
        take_locks(other, second)
        return
    with pytest.raises(InUse) as refused:
        take_locks(other, second)
    assert refused.value.written == (first is WRITES)
    assert refused.value.by == ["a call of this daemon that still hangs"]
    give_up(one)
    take_locks(other, second)  # nothing else was in the way


def give_up(fd: int) -> None:
    set_lock(fd, fcntl.F_UNLCK)


def test_a_descriptor_may_ask_again_and_a_closed_one_lets_go(opened: Callable[[], int]) -> None:
    one = opened()
    take_locks(one, WRITES)
    take_locks(one, WRITES)
    other = opened()
    with pytest.raises(InUse):
        take_locks(other, WRITES)
    os.close(os.dup(one))  # POSIX locks would be gone with that
    with pytest.raises(InUse):
        take_locks(other, WRITES)
    give_up(one)
    take_locks(other, WRITES)


def test_a_lock_on_all_of_it_counts_too(opened: Callable[[], int]) -> None:
    set_lock(opened(), fcntl.F_WRLCK)
    for access in (WRITES, READS, LOOKS):
        with pytest.raises(InUse):
            take_locks(opened(), access)


def test_reading_needs_no_more_than_a_descriptor_for_reading(
    opened: Callable[[int], int],
) -> None:
    take_locks(opened(os.O_RDONLY), READS)
    with pytest.raises(InUse) as refused:
        take_locks(opened(os.O_RDWR), WRITES)
    assert not refused.value.written


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_apart(
    opened: Callable[[], int], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def none(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("forebay.sidecar.locks.fcntl.fcntl", none)
    with pytest.raises(NoLocks):
        take_locks(opened(), WRITES)


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:41 / /mnt/a rw,relatime shared:9 - nfs4 s:/a rw,vers=4.2,hard,local_lock=none,addr=10.0.0.1
41 22 0:42 / /mnt/b rw,relatime - nfs s:/b rw,vers=3,hard,nolock,local_lock=all,addr=10.0.0.1
42 22 0:43 / /mnt/c rw,relatime - nfs s:/c rw,vers=3,hard,local_lock=posix,addr=10.0.0.1
43 22 0:44 / /mnt/d rw,relatime - nfs s:/d rw,vers=3,hard,local_lock=flock,addr=10.0.0.1
"""


@pytest.mark.parametrize(
    ("device", "local"),
    [
        ("254:0", False),
        ("0:41", False),
        ("0:42", True),
        ("0:43", True),
        ("0:44", False),
        ("0:45", False),
    ],
)
def test_an_nfs_client_that_keeps_its_locks_to_itself(device: str, local: bool) -> None:
    major, minor = map(int, device.split(":"))
    assert has_local_locks(parse(MOUNTS), os.makedev(major, minor)) is local
