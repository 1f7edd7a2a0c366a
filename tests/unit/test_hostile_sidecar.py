# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What anybody may have put beside an image: markers, journals and locks that are not to be believed."""

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from forebay.errors import ForebayError
from forebay.origin.addresses import FileAddress
from forebay.origin.calls import SystemCalls
from forebay.origin.opening import OpenImage, open_image
from forebay.origin.threads import StoreThreads
from forebay.sidecar import own_files, redo, redo_header
from forebay.sidecar.claim import Claim
from forebay.sidecar.files import read_owner
from forebay.sidecar.marker import Marker
from forebay.sidecar.record import (
    Owner,
    TakenOver,
    UnreadableError,
    in_use_by_gateway,
    left_behind,
)
from forebay.sidecar.takeover import recover_image
from forebay.sidecar.tenure import MOST

US, STRANGER = "gateway-a", 12345
GOOD = asdict(Owner(US, "h", 1, "b", "d", "2026-01-01T00:00:00+00:00", "dirty", 7))


class Bed:
    """An image, and the directory beside it."""

    def __init__(self, root: Path) -> None:
        self.path = root / "vm.img"
        self.path.write_bytes(bytes(4096))
        self.address = FileAddress("images", root, "vm.img")
        self.side = root / "vm.img.forebay"
        self.file: OpenImage = open_image(self.address, read_only=False)

    @property
    def own(self) -> Path:
        """The directory of the owner with the highest token."""
        return max(
            (x for x in self.side.iterdir() if x.name.isdecimal()), key=lambda x: int(x.name)
        )

    def take(self, gateway: str = US, *, again: bool = False) -> Marker:
        me = Owner.of_this_process(gateway, "d")
        return Marker.take(self.address, self.file, me, again=again)

    def claim(self) -> Claim:
        threads = StoreThreads("s")
        return Claim(self.address, "vm", gateway=US, disk="d", threads=threads, timeout=10)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path)
    yield made
    os.close(made.file.fd)


# ----------------------------------------------------------------------------------------------------------- markers

_anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=100)
    | st.sampled_from(["h" * 60000, "\x1b[31m", "yesterday <b>", "a\nb", "\u202e", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*GOOD, "other"]), _anything, max_size=3))
@example({"dirty_bytes": 10**400})
@example({"token": 10**4299, "gateway": ""})
@example({"token": (1 << 63) - 1})
@example({"dirty_bytes": -5})
@example({"host": "h" * 60000})
@example({"dirty_since": "yesterday <b>"})
@example({"pid": True})
@example({"pid": math.nan})
@example({"format": True})
@example({"format": "\x1b[31m"})
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_marker_is_within_bounds_or_refused_in_one_short_line(changes: dict[str, Any]) -> None:
    text = json.dumps({**GOOD, **changes}) if "token" not in changes else _with_long(changes)
    address = FileAddress("images", Path("/nowhere"), "vm.img")
    owner = _parsed(text.encode("utf-8", "surrogatepass"))
    if owner is None:
        return
    for told in (
        in_use_by_gateway(address, owner),
        left_behind(address, owner),
        UnreadableError(address, "7/owner", "x"),
    ):
        assert str(told).isprintable()
        assert len(str(told)) < 1500
    assert 0 <= owner.dirty_bytes < 1 << 63
    after = Owner(US, "h", 1, "b", "d", "", "clean", owner.token)
    assert Owner.parse(json.dumps(asdict(after)).encode()) == after, "we read what we write"


def _parsed(text: bytes) -> Owner | None:
    """The owner; None where it was refused, in one short line."""
    try:
        return Owner.parse(text)
    except ValueError as fault:
        why = str(fault)
    assert why.isprintable()
    assert len(why) < 200
    return None


def _with_long(changes: dict[str, Any]) -> str:
    """JSON with a number that Python does not turn into text by itself."""
    token = changes["token"]
    if isinstance(token, int) and token == 10**4299:
        return json.dumps({**GOOD, **changes, "token": 0}).replace(
            '"token": 0', '"token": 1' + "0" * 4299
        )
    return json.dumps({**GOOD, **changes})


@pytest.mark.parametrize(
    "text", [b"[" * 100000, b'{"a":' * 100000, b"\xff\xfe\x00", b'{"format": 1e400}', b"NaN"]
)
def test_a_text_that_is_no_marker_at_all_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".") as why:
        Owner.parse(text)
    assert str(why.value).isprintable()


def _spoil(owner: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(owner, 0)
    elif how == "newer":
        owner.write_text(owner.read_text().replace('"format": 1', '"format": 3'))
    elif how == "with another name":
        os.link(owner, owner.with_name("other"))
    elif how == "a stranger's":
        os.chown(owner, STRANGER, -1)
    elif how == "among many":
        for number in range(1, MOST + 1):
            (owner.parent.parent / str(number)).mkdir()
    else:
        owner.unlink()
        if how == "directory":
            owner.mkdir()
        elif how == "link":
            owner.symlink_to(owner.parent / "lock")
        else:
            os.mkfifo(owner)


HOW = [
    "truncated",
    "newer",
    "directory",
    "link",
    "fifo",
    "with another name",
    "a stranger's",
    "among many",
]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")


@needs_root
@pytest.mark.parametrize("how", HOW)
def test_a_marker_that_does_not_count_is_one_line_for_everybody(bed: Bed, how: str) -> None:
    bed.take().close()
    _spoil(bed.own / "owner", how)
    for attempt in (
        bed.take,
        lambda: bed.take(again=True),
        lambda: bed.take("gateway-b"),
        lambda: read_owner(bed.address),
        lambda: recover_image(bed.address, bed.file),
        lambda: recover_image(bed.address, bed.file, take_over=True),
    ):
        with pytest.raises(UnreadableError, match="cannot be read") as told:
            attempt()
        assert len(str(told.value).splitlines()) == 1
    assert os.path.lexists(bed.own / "owner")


@needs_root
@pytest.mark.parametrize("how", HOW)
async def test_a_claim_whose_marker_becomes_unreadable_is_lost(bed: Bed, how: str) -> None:
    claim, told = bed.claim(), list[str]()
    claim.on_lost = told.append
    await claim.take(bed.file)
    await claim.mark_dirty()
    journal = await claim.begin_redo("")
    _spoil(bed.own / "owner", how)
    for change in (claim.check, claim.mark_clean, lambda: claim.begin_redo(""), journal.commit):
        with pytest.raises(OSError, match="so another gateway may have the image by now"):
            await change()
    assert len(told) == 1
    assert "redo" not in os.listdir(bed.own), "no checkpoint was committed"
    with pytest.raises(UnreadableError):
        await claim.mark_clean_to_release()
    assert not claim.is_held
    assert "owner" in os.listdir(bed.own)


# ------------------------------------------------------------------------------------------------- planted files


@pytest.mark.parametrize("name", ["owner.new", "redo.new", "lock"])
@pytest.mark.parametrize("how", ["hard link", "link"])
def test_nothing_is_written_through_a_name_that_was_planted(
    bed: Bed, tmp_path: Path, name: str, how: str
) -> None:
    victim = tmp_path / "victim.raw"
    victim.write_bytes(b"V" * 4096)
    bed.side.mkdir()
    (os.link if how == "hard link" else os.symlink)(victim, bed.side / name)
    marker = bed.take()
    marker.set_state("dirty")
    marker.begin_redo("").drop()
    assert victim.read_bytes() == b"V" * 4096
    assert victim.stat().st_nlink == 1
    marker.close()


@pytest.mark.parametrize("name", ["owner.new", "redo.new", "redo"])
def test_a_directory_in_the_place_of_a_file_is_named_and_what_to_do(bed: Bed, name: str) -> None:
    told = f"'{name}' beside the image is a directory: remove it"
    marker = bed.take()
    marker.set_state("dirty")
    (bed.own / name).mkdir()
    with pytest.raises(IsADirectoryError, match=told):
        _change(marker)
    marker.close()
    if name != "redo":  # which counts for a journal
        with pytest.raises(IsADirectoryError, match=told):
            bed.take()


def _change(marker: Marker) -> None:
    marker.commit_redo(marker.begin_redo(""))
    marker.set_state("clean")


def _commit(bed: Bed) -> None:
    marker = bed.take()
    marker.set_state("dirty")
    journal = marker.begin_redo("")
    journal.add(0, 4096, [b"e" * 4096])
    marker.commit_redo(journal)
    marker.close()


@needs_root
@pytest.mark.parametrize("how", ["a stranger's", "with another name", "link", "fifo"])
def test_a_planted_journal_is_not_applied(bed: Bed, how: str) -> None:
    _commit(bed)
    path = bed.own / "redo"
    if how == "link":
        os.rename(path, bed.own / "there")
        path.symlink_to("there")
    else:
        _spoil(path, how)
    for attempt in (bed.take, lambda: recover_image(bed.address, bed.file)):
        with pytest.raises(ForebayError, match="its redo journal is .*remove [0-9]+/redo"):
            attempt()
    assert bed.path.read_bytes() == bytes(4096)


@needs_root
@pytest.mark.parametrize("who", ["the image's owner", "one who may write it", "ours"])
def test_a_journal_of_somebody_who_may_write_the_image_is_applied(bed: Bed, who: str) -> None:
    _commit(bed)
    if who != "ours":
        os.chown(bed.own / "redo", STRANGER, -1)
        if who == "the image's owner":
            os.chown(bed.path, STRANGER, -1)
        else:
            bed.path.chmod(0o666)
    recover_image(bed.address, bed.file)
    assert bed.path.read_bytes() == b"e" * 4096


def test_who_may_write_follows_the_mode() -> None:
    def image(mode: int, user: int, group: int) -> os.stat_result:
        return os.stat_result((stat.S_IFREG | mode, 1, 1, 1, user, group, 0, 0, 0, 0))

    nobody = 65534
    may = own_files.may_write
    assert may(nobody, image(0o600, nobody, 0))
    assert not may(nobody, image(0o644, 0, 0))
    assert may(nobody, image(0o666, 0, 0))
    group = own_files._groups(nobody)[0]
    assert may(nobody, image(0o660, 0, group))
    assert not may(nobody, image(0o640, 0, group))
    assert not may(STRANGER, image(0o660, 0, group))
    assert not may(nobody, None)
    assert may(os.geteuid(), None)


@pytest.mark.parametrize(
    "fields",
    [{"inode": 10**30}, {"size": -1}, {"as_of": "\x1b[31m"}, {"host": "h" * 300}, {"size": True}],
)
def test_a_header_that_makes_no_sense_is_refused(bed: Bed, fields: dict[str, Any]) -> None:
    bed.side.mkdir()
    folder = os.open(bed.side, os.O_RDONLY)
    good = asdict(redo_header.Checkpoint(US, "h", "d", 4096, 1, ""))
    try:
        journal = redo.RedoFile(folder, redo_header.Checkpoint(**{**good, **fields}))
        journal.commit()
        with pytest.raises(ForebayError, match="cannot be read") as told:
            redo.recover(folder, bed.file.fd, "vm", SystemCalls())
        assert str(told.value).isprintable()
        assert len(str(told.value)) < 400
    finally:
        os.close(folder)


async def test_a_claim_that_was_lost_at_the_second_attempt_can_begin_anew(bed: Bed) -> None:
    """The first attempt took the marker, and what came after it failed; then another gateway took the image."""
    claim = bed.claim()
    await claim.take(bed.file)
    (bed.own / "owner").unlink()
    with pytest.raises(TakenOver):
        await claim.take(bed.file)
    await claim.leave()
    claim.begin_anew()
    await claim.take(bed.file)
    await claim.release()
    await trio.lowlevel.checkpoint()
