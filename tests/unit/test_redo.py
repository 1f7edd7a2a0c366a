"""The redo journal: applied whole or not at all."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from forebay.errors import ForebayError
from forebay.origin.calls import SystemCalls
from forebay.sidecar import redo

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
            redo.Checkpoint(
                "g", "h", "d", found.st_size, found.st_ino, "2026-01-02T03:04:05+00:00"
            ),
        )

    def recover(self) -> redo.Checkpoint | None:
        return redo.recover(self.sidecar, self.image, "images:i.raw", SystemCalls())

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
    with pytest.raises(ForebayError, match="belongs to another file"):
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
