# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The redo journal: applied whole or not at all."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from forebay.errors import ForebayError
from forebay.origin.addresses import FileAddress
from forebay.origin.calls import SystemCalls
from forebay.sidecar import applying, redo, redo_header
from forebay.sidecar.record import ChangedError
from forebay.sidecar.tenure import Tenure
from forebay_cache.blocks.frozen import Range

SIZE = 1 << 20
OLD = b"o" * SIZE


class Beside:
    """An image and the directory beside it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "i.raw"
        self.path.write_bytes(OLD)
        self.folder = directory / "i.raw.forebay"
        self.folder.mkdir()
        self.sidecar = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        self.image = os.open(self.path, os.O_RDWR)

    def begin(self) -> redo.RedoFile:
        found = os.fstat(self.image)
        return redo.RedoFile(
            self.sidecar,
            redo_header.Checkpoint(
                "g", "h", "d", found.st_size, found.st_ino, "2026-01-02T03:04:05+00:00"
            ),
        )

    def recover(self, *, sure: bool = False) -> redo_header.Checkpoint | None:
        """As the next owner does."""
        found = redo.recover(self.sidecar, self.image, "images:i.raw", SystemCalls(), sure=sure)
        Tenure(0, self.sidecar, FileAddress("images", self.folder, "i.raw"), None).empty()
        return found

    def names(self) -> set[str]:
        return {x.name for x in self.folder.iterdir()}


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Beside]:
    made = Beside(tmp_path)
    yield made
    os.close(made.sidecar)
    os.close(made.image)


def fill(journal: redo.RedoFile) -> bytes:
    """Adds some ranges; what the image is to hold afterwards."""
    new = bytearray(OLD)
    for offset, length, data in (
        (0, 4096, b"a" * 4096),
        (70000, 130000, None),
        (SIZE - 10, 10, b"z" * 10),
    ):
        journal.add(offset, length, None if data is None else [data[:7], memoryview(data)[7:]])
        new[offset : offset + length] = data or bytes(length)
    return bytes(new)


def test_a_committed_checkpoint_is_applied_and_removed(beside: Beside) -> None:
    journal = beside.begin()
    new = fill(journal)
    assert beside.names() == {"redo.new"}
    journal.commit()
    assert beside.names() == {"redo"}
    assert beside.path.read_bytes() == OLD
    found = beside.recover()
    assert found is not None
    assert (found.disk, found.as_of) == ("d", "2026-01-02T03:04:05+00:00")
    assert beside.path.read_bytes() == new
    assert beside.names() == set()
    assert beside.recover() is None


class NoHoles(SystemCalls):
    """A file system on which no hole can be punched."""

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no fallocate here")


@pytest.mark.parametrize("calls", [SystemCalls(), NoHoles()])
def test_zeros_that_keep_their_space_are_told_from_holes(
    beside: Beside, calls: SystemCalls
) -> None:
    os.truncate(beside.image, 0)
    os.truncate(beside.image, SIZE)
    journal = beside.begin()
    journal.add_all([Range(0, 65536, None), Range(65536, 65536, None, is_provisioned=True)])
    found = beside.path.stat()
    journal.note_times(found.st_mtime_ns, found.st_ctime_ns)
    journal.commit()
    checkpoint = redo.recover(beside.sidecar, beside.image, "images:i.raw", calls)
    assert checkpoint is not None
    assert checkpoint.format == redo_header.FORMAT, "an older version refuses it"
    assert 65536 <= beside.path.stat().st_blocks * 512 < 2 * 65536
    assert beside.path.read_bytes() == bytes(SIZE)


def test_a_journal_without_such_zeros_is_one_that_older_versions_know(beside: Beside) -> None:
    journal = beside.begin()
    fill(journal)
    found = beside.path.stat()
    journal.note_times(found.st_mtime_ns, found.st_ctime_ns)
    journal.commit()
    checkpoint = beside.recover()
    assert checkpoint is not None
    assert checkpoint.format == redo_header.PLAIN == 3


def test_applied_again_after_half_of_it_the_result_is_the_same(beside: Beside) -> None:
    journal = beside.begin()
    new = fill(journal)
    journal.commit()
    os.pwrite(beside.image, b"a" * 4096, 0)
    assert beside.recover() is not None
    assert beside.path.read_bytes() == new


def test_an_unfinished_checkpoint_is_dropped(beside: Beside) -> None:
    journal = beside.begin()
    fill(journal)
    journal.close()  # as a crash does
    assert beside.recover() is None
    assert beside.path.read_bytes() == OLD
    assert beside.names() == set()


def test_a_new_checkpoint_takes_the_place_of_an_unfinished_one(beside: Beside) -> None:
    fill(beside.begin())
    journal = beside.begin()
    new = fill(journal)
    journal.commit()
    beside.recover()
    assert beside.path.read_bytes() == new


def test_cut_anywhere_it_is_refused_and_nothing_is_written(beside: Beside) -> None:
    journal = beside.begin()
    fill(journal)
    journal.commit()
    whole = (beside.folder / "redo").read_bytes()
    for cut in (*range(0, 4096, 512), *range(4096, len(whole), 97), len(whole) - 1):
        (beside.folder / "redo").write_bytes(whole[:cut])
        with pytest.raises(ForebayError, match="cannot be read"):
            beside.recover()
    assert beside.path.read_bytes() == OLD
    assert beside.names() == {"redo"}


def test_damaged_anywhere_it_is_refused_and_nothing_is_written(beside: Beside) -> None:
    journal = beside.begin()
    fill(journal)
    journal.commit()
    whole = (beside.folder / "redo").read_bytes()
    for at in (
        *range(0, len(whole), 41),
        *range(4096, 4096 + 32),
        *range(len(whole) - 32, len(whole)),
    ):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        (beside.folder / "redo").write_bytes(damaged)
        with pytest.raises(ForebayError, match="cannot be read"):
            beside.recover()
    assert beside.path.read_bytes() == OLD


def test_records_that_are_missing_are_missed(beside: Beside) -> None:
    journal = beside.begin()
    fill(journal)
    journal.commit()
    whole = (beside.folder / "redo").read_bytes()
    (beside.folder / "redo").write_bytes(whole[:4096] + whole[4096 + 32 + 4096 :])
    with pytest.raises(ForebayError, match="records are missing"):
        beside.recover()


def test_another_files_journal_is_refused(beside: Beside) -> None:
    journal = beside.begin()
    fill(journal)
    journal.commit()
    os.ftruncate(beside.image, SIZE * 2)
    with pytest.raises(ForebayError, match="beside it belongs to a file of"):
        beside.recover()
    assert beside.names() == {"redo"}


def test_ranges_may_be_added_side_by_side(beside: Beside) -> None:
    journal = beside.begin()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: journal.add(n * 4096, 4096, [bytes([n]) * 4096]), range(256)))
    assert journal.length == SIZE
    journal.commit()
    beside.recover()
    assert beside.path.read_bytes() == b"".join(bytes([n]) * 4096 for n in range(256))


# --------------------------------------------------------------------------------- an image that is not what it was


def commit(beside: Beside) -> tuple[redo.RedoFile, bytes]:
    """A journal that is committed as a pass does it: with the image's times, and noted that applying begins."""
    journal = beside.begin()
    new = fill(journal)
    found = os.fstat(beside.image)
    journal.note_times(found.st_mtime_ns, found.st_ctime_ns)
    journal.commit()
    return journal, new


def restore(beside: Beside, seconds: float = 1.0) -> bytes:
    """What `cp` of a backup in place does, so many seconds after the commit."""
    backup = b"B" * SIZE
    os.pwrite(beside.image, backup, 0)
    at = os.fstat(beside.image).st_mtime_ns + int(seconds * 1e9)
    os.utime(beside.image, ns=(at, at))
    return backup


@pytest.mark.parametrize("told", [0, 1, 16, 17, 33, 1000, 12345])
def test_places_are_spread_over_all_of_a_checkpoint(told: int) -> None:
    places = applying.Places()
    for n in range(told):
        places.add(n, 65536, n)
    chosen = [x.offset for x in places.chosen]
    assert min(told, applying.PLACES) <= len(chosen) <= 2 * applying.PLACES
    steps = {b - a for a, b in pairwise(chosen)}
    assert len(steps) <= 1, "evenly"
    assert not told or told - chosen[-1] <= max(steps, default=1)


def held(beside: Beside, journal: redo.RedoFile) -> list[tuple[applying.Place, bytes]]:
    """What the image holds at the places of a checkpoint."""
    return [(x, os.pread(beside.image, x.length, x.offset)) for x in journal.places]


@pytest.mark.parametrize("began", ["not", "nearly", "just", "first batch", "after minutes"])
def test_an_image_that_was_restored_is_not_written_unless_the_operator_says_so(
    beside: Beside, began: str
) -> None:
    journal, new = commit(beside)
    if began != "not":
        journal.note_applied(0, durable=True)
    if began == "just":
        journal.note_applied(applying.BEGUN, held(beside, journal))
    if began == "first batch":
        os.pwrite(beside.image, b"a" * 4096, 0)
        journal.note_applied(4096)
    backup = restore(beside, 300 if began == "after minutes" else 1)
    for _ in range(2):
        with pytest.raises(ChangedError, match="changed by somebody else after .* --yes") as told:
            beside.recover()
        assert len(str(told.value).splitlines()) == 1
    assert beside.path.read_bytes() == backup
    assert beside.names() == {"redo"}
    assert beside.recover(sure=True) is not None
    found = beside.path.read_bytes()
    assert found[:4096] == new[:4096]
    assert beside.names() == set()


def test_a_backup_with_its_old_times_is_noticed_too(beside: Beside) -> None:
    journal, _new = commit(beside)
    journal.note_applied(0, durable=True)
    backup = restore(beside, -3600)
    with pytest.raises(ChangedError):
        beside.recover()
    assert beside.path.read_bytes() == backup


@pytest.mark.parametrize("boot", ["this one", "another"])
@pytest.mark.parametrize("done", [0, 4096, 200000])
def test_a_crash_in_the_middle_of_applying_is_finished(
    beside: Beside, monkeypatch: pytest.MonkeyPatch, done: int, boot: str
) -> None:
    """Whatever part of it the image has: after a power cut less than is noted may be there."""
    journal, new = commit(beside)
    journal.note_applied(0, durable=True)
    journal.note_applied(applying.BEGUN, held(beside, journal))
    os.pwrite(beside.image, new[:done] if boot == "this one" else new[: done // 2], 0)
    os.utime(beside.image)
    journal.note_applied(max(done, applying.BEGUN))
    if boot == "another":
        monkeypatch.setattr("forebay.sidecar.applying.boot_id", lambda: "another")
    assert beside.recover() is not None
    assert beside.path.read_bytes() == new


def test_a_crash_while_a_crash_is_finished_is_finished(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    _journal, new = commit(beside)
    calls = 0

    def fails(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(5, "injected")
        applying.apply(*arguments)
        os.utime(beside.image)

    with monkeypatch.context() as patched:
        patched.setattr("forebay.sidecar.redo.apply", fails)
        with pytest.raises(OSError, match="injected"):
            beside.recover()
    assert beside.recover() is not None
    assert beside.path.read_bytes() == new


def test_metadata_alone_is_no_change(beside: Beside) -> None:
    _journal, new = commit(beside)
    beside.path.chmod(0o600)
    os.link(beside.path, beside.path.with_name("other"))
    assert beside.recover() is not None
    assert beside.path.read_bytes() == new


def test_a_copy_at_another_place_is_recovered_when_the_operator_says_so(
    beside: Beside, tmp_path: Path
) -> None:
    _journal, new = commit(beside)
    copy = tmp_path / "copy.raw"
    copy.write_bytes(beside.path.read_bytes())
    image = os.open(copy, os.O_RDWR)
    try:
        with pytest.raises(ChangedError, match="another file .*--yes"):
            redo.recover(beside.sidecar, image, "i", SystemCalls())
        os.truncate(copy, SIZE - 4096)
        with pytest.raises(ForebayError, match="has .* bytes, and"):
            redo.recover(beside.sidecar, image, "i", SystemCalls(), sure=True)
        os.truncate(copy, SIZE)
        os.pwrite(image, OLD[-4096:], SIZE - 4096)
        assert redo.recover(beside.sidecar, image, "i", SystemCalls(), sure=True) is not None
    finally:
        os.close(image)
    assert copy.read_bytes() == new


def test_a_journal_of_the_first_format_is_read(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = os.fstat(beside.image)
    old = {
        "gateway": "g", "host": "h", "disk": "d", "size": found.st_size, "inode": found.st_ino,
        "as_of": "", "format": 1,
    }  # fmt: skip
    monkeypatch.setattr(redo_header, "asdict", lambda _: old)
    journal = beside.begin()
    new = fill(journal)
    journal.commit()
    assert beside.recover() is not None
    assert beside.path.read_bytes() == new
