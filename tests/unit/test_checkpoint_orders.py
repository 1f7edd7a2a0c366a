# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What becomes of a checkpoint whose host was lost: every cell of "A checkpoint beside an image" in FAILURES.md.

Each cell is done on real files with what the daemon and the commands use for it. In none is newer data overwritten
without asking, and none is a dead end: what is said names a way out, the test takes it, and afterwards the image can be
attached.
"""

import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay.config.model import Config
from forebay.origin.addresses import FileAddress
from forebay.origin.calls import SystemCalls
from forebay.origin.opening import open_image
from forebay.sidecar import recover, redo
from forebay.sidecar.applying import apply
from forebay.sidecar.marker import Marker
from forebay.sidecar.record import ChangedError, Owner, TakenOver

SIZE = 1 << 16
OLD, NEW, LATER = b"o" * SIZE, b"n" * SIZE, b"L" * SIZE
PAGE = (Path(__file__).parents[2] / "gateway/FAILURES.md").read_text()

JOURNALS = ("absent", "written", "committed", "half applied", "applied")
IMAGES = (
    "same", "changed in place", "replaced", "truncated", "copied elsewhere", "restored with the sidecar",
    "restored without it",
)  # fmt: skip
ACTIONS = ("attach", "recover", "takeover", "detach --discard", "start")


class Bed:
    """An image and what its lost host left beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root / "images"
        self.root.mkdir()
        self.path.write_bytes(OLD)

    @property
    def path(self) -> Path:
        return self.root / "vm.img"

    @property
    def side(self) -> Path:
        return self.root / "vm.img.forebay"

    @property
    def address(self) -> FileAddress:
        return FileAddress("", self.root, "vm.img")

    def take(self, *, again: bool, drop: bool = False) -> Marker:
        """As the disk does that is attached, or comes back at the start."""
        self.file = open_image(self.address, read_only=False)
        try:
            me = Owner.of_this_process("g", "vm")
            return Marker.take(self.address, self.file, me, again=again, drop_checkpoint=drop)
        except BaseException:
            os.close(self.file.fd)
            raise

    def leave(self, marker: Marker, *, clean: bool = False) -> None:
        if clean:
            marker.set_state("clean")
            marker.release()
        marker.close()
        os.close(self.file.fd)

    def serve_until(self, journal: str) -> None:
        """A disk's life, up to the loss of its host in that state of its checkpoint."""
        marker = self.take(again=False)
        marker.set_state("dirty")
        if journal != "absent":
            file = marker.begin_redo("")
            file.add(0, SIZE // 2, [NEW[: SIZE // 2]])
            file.add(SIZE // 2, SIZE // 2, [NEW[SIZE // 2 :]])
            if journal == "written":
                file.close()
            else:
                marker.commit_redo(file)
                self._apply(file, {"committed": 0, "half applied": 1, "applied": 2}[journal])
        self.leave(marker)

    def _apply(self, file: redo.RedoFile, parts: int) -> None:
        source = os.open(self.side / "redo", os.O_RDONLY)
        records = list(redo._data_of(source, SIZE))[:parts]
        for offset, length, at in records:
            apply(source, self.file.fd, SystemCalls(), offset, length, at)
            file.note_applied(offset + length)
        os.close(source)

    def happen(self, image: str, backup: Path) -> None:
        """What the operator, or somebody else, does then; some minutes later."""
        if image == "changed in place":
            with self.path.open("r+b") as file:
                file.write(LATER)
        elif image == "replaced":
            self.path.rename(self.root / "before")
            self.path.write_bytes(LATER)
            (self.root / "before").unlink()
        elif image == "truncated":
            os.truncate(self.path, SIZE // 2)
        elif image == "copied elsewhere":
            there = self.root.with_name("there")
            shutil.copytree(self.root, there, symlinks=True)
            self.root = there
        elif image == "restored with the sidecar":
            shutil.copytree(self.root, backup, symlinks=True)
            gone = self.root.rename(self.root.with_name("gone"))
            shutil.copytree(backup, self.root, symlinks=True)
            shutil.rmtree(
                gone
            )  # only now: no file of the copy gets the number of one that was there
        elif image == "restored without it":
            shutil.rmtree(self.side)
            self.path.write_bytes(LATER)
        if image not in ("same", "copied elsewhere", "restored with the sidecar"):
            at = self.path.stat().st_mtime_ns + 300 * 10**9
            os.utime(self.path, ns=(at, at))


# ---------------------------------------------------------------------------------------------------- the actions


def _attach(bed: Bed) -> str:
    bed.leave(bed.take(again=False))
    return "goes on"


def _start(bed: Bed) -> str:
    bed.leave(bed.take(again=True))
    return "goes on"


def _recover(bed: Bed, *, sure: bool = False) -> str:
    recover.run(Config(), str(bed.path), sure=sure)
    return "goes on"


def _takeover(bed: Bed) -> str:
    recover.run(Config(), str(bed.path), take_over=True, sure=True)
    return "goes on"


def _discard(bed: Bed) -> str:
    """As `Source.release`: a checkpoint is finished first; one that cannot be is dropped where the image changed."""
    try:
        marker = bed.take(again=True)
    except ChangedError:
        marker = bed.take(again=False, drop=True)
        bed.leave(marker, clean=True)
        return "dropped"
    except TakenOver:
        return "goes on"  # what is beside it, if anything, is another's
    bed.leave(marker, clean=True)
    return "goes on"


DO: dict[str, Callable[[Bed], str]] = {
    "attach": _attach,
    "recover": _recover,
    "takeover": _takeover,
    "detach --discard": _discard,
    "start": _start,
}


def outcome(bed: Bed, action: str) -> tuple[str, str]:
    """What happens, in the words of the table, and what was said."""
    before = bed.path.read_bytes()
    try:
        what, text = DO[action](bed), ""
    except ChangedError as fault:
        text = str(fault)
        what = "asks" if "--yes" in text else "refused"
    except TakenOver as fault:
        what, text = "conflict", str(fault)
    after = bed.path.read_bytes()
    if what == "goes on" and after != before:
        what = "finished"
    assert what == "finished" or after == before, "it was written, and nobody was asked"
    return what, text


def take_a_way_out(bed: Bed, action: str, what: str, text: str) -> None:
    """What the message says; afterwards the image can be attached."""
    before = bed.path.read_bytes()
    assert len(text.splitlines()) == 1
    if what == "conflict":
        _discard(bed)  # Image.stop: "detach with --discard"
        assert bed.path.read_bytes() == before
        return
    ways = []
    if re.search(r"'forebay recover \S+ --yes' finishes", text):
        ways.append("finish")
    if found := re.search(r"remove (\d+/redo)", text):
        ways.append("remove")
    assert ways, text
    if "finish" in ways and action in ("recover", "start"):
        _recover(bed, sure=True)
        assert bed.path.read_bytes() == NEW
    else:
        assert found is not None
        (bed.side / found[1]).unlink()
        outcome(bed, action)
        assert bed.path.read_bytes() == before


# ------------------------------------------------------------------------------------------------------- the table


def table() -> dict[tuple[str, str, str], str]:
    """What the page says, for each cell."""
    part = PAGE.split("\n## A checkpoint beside an image")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    assert rows[0][2:-1] == [f"`{action}`" for action in ACTIONS]
    found = {}
    for journals, images, *cells, _test in rows[2:]:
        every = JOURNALS if journals == "any" else journals.split("; ")
        for journal, image in itertools.product(every, images.split("; ")):
            for action, cell in zip(ACTIONS, cells, strict=True):
                assert (journal, image, action) not in found, "two rows for one cell"
                found[journal, image, action] = cell
    return found


TABLE = table()


def test_the_table_has_every_order() -> None:
    assert set(TABLE) == set(itertools.product(JOURNALS, IMAGES, ACTIONS))


@pytest.mark.parametrize(("journal", "image", "action"), list(TABLE))
def test_a_cell_of_the_table(tmp_path: Path, journal: str, image: str, action: str) -> None:
    bed = Bed(tmp_path)
    bed.serve_until(journal)
    bed.happen(image, tmp_path / "backup")
    given = bed.path.read_bytes()
    what, text = outcome(bed, action)
    if journal == "applied" and what == "goes on" and image == "same":
        what = "finished"  # the image has all of it
    assert what == TABLE[journal, image, action], text
    if what == "finished":
        assert bed.path.read_bytes() == NEW
    elif image == "same" or what in ("goes on", "dropped"):
        assert bed.path.read_bytes() == given
    if what in ("asks", "refused", "conflict"):
        take_a_way_out(bed, action, what, text)
    _attach(bed)
    bed.leave(bed.take(again=False), clean=True)
    assert not bed.side.exists(), "nothing stays beside it"
