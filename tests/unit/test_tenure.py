# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The directories of owners beside an image: which counts, what was planted, and what older versions left."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from forebay.errors import ForebayError
from forebay.origin.addresses import FileAddress
from forebay.origin.opening import OpenImage, open_image
from forebay.origin.worker import syscalls
from forebay.sidecar import redo, redo_header
from forebay.sidecar.files import read_owner
from forebay.sidecar.marker import Marker
from forebay.sidecar.record import LARGEST, Owner, TakenOver, UnreadableError
from forebay.sidecar.takeover import recover_image
from forebay.sidecar.tenure import MOST

US, THEM, STRANGER = "gateway-a", "gateway-b", 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")


class Bed:
    """An image, and the directory beside it."""

    def __init__(self, root: Path) -> None:
        self.path = root / "vm.img"
        self.path.write_bytes(bytes(4096))
        self.address = FileAddress("images", root, "vm.img")
        self.side = root / "vm.img.forebay"
        self.file: OpenImage = open_image(self.address, read_only=False)

    def take(self, gateway: str = US, *, again: bool = False) -> Marker:
        me = Owner.of_this_process(gateway, "d")
        return Marker.take(self.address, self.file, me, again=again)

    def older(self, gateway: str = US, token: int = 7, **fields: object) -> Owner:
        """Leave the marker of an older version, which renamed it into place."""
        owner = replace(Owner.of_this_process(gateway, "d"), token=token, **fields)  # type: ignore[arg-type]
        self.side.mkdir(exist_ok=True)
        (self.side / "owner.new").write_text(json.dumps(asdict(owner)))
        (self.side / "owner.new").rename(self.side / "owner")
        return owner

    def journal(self, folder: Path, gateway: str, token: int) -> None:
        """Leave a committed journal."""
        found = os.stat(self.path)
        directory = os.open(folder, os.O_RDONLY)
        made = redo.RedoFile(
            directory,
            redo_header.Checkpoint(gateway, "h", "d", 4096, found.st_ino, "", token=token),
        )
        made.add(0, 4096, [b"j" * 4096])
        made.note_times(found.st_mtime_ns, found.st_ctime_ns)
        made.commit()
        os.close(directory)

    def names(self) -> set[str]:
        return set(os.listdir(self.side))


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path)
    yield made
    os.close(made.file.fd)


def token(marker: Marker) -> int:
    assert marker.owner is not None
    return marker.owner.token


def test_each_owner_has_a_directory_and_the_one_before_is_gone(bed: Bed) -> None:
    first = bed.take()
    assert bed.names() == {"owner", "redo", str(token(first))}
    before = token(first)
    first.close()
    second = bed.take(again=True)
    assert token(second) == before + 1
    assert bed.names() == {"owner", "redo", str(token(second))}
    assert os.readlink(bed.side / "owner") == f"{token(second)}/owner"
    second.close()


@needs_root
@pytest.mark.parametrize("what", ["directory", "with a marker", "file", "link"])
@pytest.mark.parametrize("number", [99999999999999, LARGEST])
def test_a_token_that_a_stranger_planted_does_not_count(bed: Bed, what: str, number: int) -> None:
    bed.side.mkdir()
    planted = bed.side / str(number)
    if what == "link":
        planted.symlink_to(bed.path.parent)
    elif what == "file":
        planted.touch()
    else:
        planted.mkdir()
        if what == "with a marker":
            text = json.dumps(asdict(replace(Owner.of_this_process(THEM, "d"), token=number)))
            (planted / "owner").write_text(text)
            os.chown(planted / "owner", STRANGER, -1)
        os.chown(planted, STRANGER, -1)
    marker = bed.take()
    assert token(marker) < number
    marker.set_state("dirty")
    marker.close()
    again = bed.take(again=True)
    assert token(again) < number
    again.set_state("clean")
    again.release()
    assert bed.names() == {str(number)}


@needs_root
def test_a_name_that_a_stranger_planted_in_the_place_of_the_next_token_is_passed_over(
    bed: Bed,
) -> None:
    first = bed.take()
    number = token(first)
    for planted in (number + 1, number + 2):
        (bed.side / str(planted)).mkdir()
        os.chown(bed.side / str(planted), STRANGER, -1)
    first.close()
    assert token(bed.take()) == number + 3


def test_the_largest_token_has_none_after_it(bed: Bed) -> None:
    bed.older(token=LARGEST)
    with pytest.raises(ForebayError, match="no token after .*: remove what says so") as told:
        bed.take()
    assert len(str(told.value).splitlines()) == 1
    (bed.side / "owner").unlink()
    bed.take()


def test_more_names_than_there_can_be_are_refused_in_one_line(bed: Bed) -> None:
    bed.side.mkdir()
    for number in range(1, MOST + 2):
        (bed.side / str(number)).mkdir()
    for attempt in (bed.take, lambda: read_owner(bed.address)):
        with pytest.raises(UnreadableError, match="directories of owners lie beside it") as told:
            attempt()
        assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["0", "01", "-1", "1.5", "1 ", "\u0661", "9" * 19, "9" * 100, "0x10", "1_0"]
)
def test_other_names_are_no_tokens(bed: Bed, name: str) -> None:
    bed.side.mkdir()
    (bed.side / name).mkdir()
    (bed.side / name / "owner").write_text("x")
    bed.take().release()
    assert bed.names() == {name}


def test_one_who_began_and_never_came_to_be_the_owner_is_passed_over(bed: Bed) -> None:
    first = bed.take()
    number = token(first)
    first.close()
    (bed.side / str(number + 1)).mkdir()
    (bed.side / str(number + 1) / "owner.new").write_text("{}")
    second = bed.take()
    assert token(second) == number + 2
    assert bed.names() == {"owner", "redo", str(number + 2)}
    second.check()


def test_a_higher_token_stops_the_owner_before_a_checkpoint_is_committed(bed: Bed) -> None:
    marker = bed.take()
    marker.set_state("dirty")
    journal = marker.begin_redo("")
    other = replace(Owner.of_this_process(THEM, "d"), token=token(marker) + 1)
    (bed.side / str(other.token)).mkdir()
    (bed.side / str(other.token) / "owner").write_text(json.dumps(asdict(other)))
    with pytest.raises(TakenOver, match="taken over by host"):
        marker.commit_redo(journal)
    assert not list(bed.side.glob("*/redo"))


@pytest.mark.parametrize("of", ["the owner", "one before it", "another gateway"])
def test_only_the_journal_of_the_owner_is_applied(bed: Bed, of: str) -> None:
    marker = bed.take()
    number = token(marker)
    marker.close()
    gateway = THEM if of == "another gateway" else US
    bed.journal(bed.side / str(number), gateway, number - (of == "one before it"))
    found = recover_image(bed.address, bed.file)
    assert (found.finished is not None) == (of == "the owner")
    assert bed.path.read_bytes()[:1] == (b"j" if of == "the owner" else b"\0")
    assert not list(bed.side.glob("*/redo"))
    bed.take(again=True).release()
    assert not bed.side.exists()


def test_recover_is_the_next_owner_in_the_name_of_the_gateway_it_helps(bed: Bed) -> None:
    """One that was only cut off learns of it, and comes back after a restart."""
    marker = bed.take()
    marker.set_state("dirty")
    journal = marker.begin_redo("")
    journal.add(0, 4096, [b"e" * 4096])
    marker.commit_redo(journal)
    before = token(marker)
    assert recover_image(bed.address, bed.file).finished is not None
    found = read_owner(bed.address)
    assert found is not None
    assert (found.gateway, found.state, found.token) == (US, "dirty", before + 1)
    with pytest.raises(TakenOver):
        marker.check()
    marker.close()
    bed.take(again=True).check()


# ------------------------------------------------------------------------------------------------- older versions


def test_the_marker_of_an_older_version_is_carried_over(bed: Bed) -> None:
    old = bed.older(state="dirty", dirty_since="2026-01-01T00:00:00+00:00", dirty_bytes=4096)
    (bed.side / "lock").touch()
    with pytest.raises(ForebayError, match="belongs to host"):
        bed.take(THEM)
    marker = bed.take(again=True)
    assert marker.owner is not None
    assert marker.owner.token == old.token + 1
    assert (marker.owner.state, marker.owner.dirty_bytes) == ("dirty", 4096)
    assert bed.names() == {"owner", "redo", str(old.token + 1)}
    marker.set_state("clean")
    marker.release()
    assert not bed.side.exists()


@pytest.mark.parametrize("how", ["attach", "recover", "takeover"])
def test_the_journal_of_an_older_version_is_applied(bed: Bed, how: str) -> None:
    bed.older(state="dirty")
    bed.journal(bed.side, US, 0)
    if how == "attach":
        bed.take(again=True)
    else:
        assert recover_image(bed.address, bed.file, take_over=how == "takeover").finished
    assert bed.path.read_bytes() == b"j" * 4096
    assert (bed.side / "redo").is_symlink()
    assert not (bed.side / "redo").exists()


def test_the_journal_of_an_older_version_that_another_gateway_has_given_up_is_dropped(
    bed: Bed,
) -> None:
    """It was committed by a rename that came after a takeover."""
    bed.older(THEM)
    bed.journal(bed.side, US, 0)
    assert recover_image(bed.address, bed.file).finished is None
    assert bed.path.read_bytes() == bytes(4096)


def test_an_older_version_stops_at_the_link(bed: Bed) -> None:
    """It opens markers with O_NOFOLLOW, and refuses what it cannot read."""
    bed.take()
    for name in ("owner", "redo"):
        with pytest.raises(OSError, match="symbolic") as refused:
            os.open(bed.side / name, os.O_RDONLY | os.O_NOFOLLOW)
        assert refused.value.errno == errno.ELOOP


def test_the_marker_of_an_older_version_that_comes_late_counts_for_nothing(bed: Bed) -> None:
    marker = bed.take()
    bed.older(THEM, token=token(marker) - 1)
    marker.check()
    assert os.readlink(bed.side / "owner") == f"{token(marker)}/owner"
    bed.older(THEM, token=token(marker) + 1)
    with pytest.raises(TakenOver, match="taken over by host"):
        marker.check()


@pytest.mark.parametrize("what", ["directory", "link", "text"])
def test_what_no_version_would_leave_in_the_place_of_the_link_stops_the_owner(
    bed: Bed, what: str
) -> None:
    marker = bed.take()
    (bed.side / "owner").unlink()
    if what == "directory":
        (bed.side / "owner").mkdir()
    elif what == "link":
        (bed.side / "owner").symlink_to("elsewhere")
    else:
        (bed.side / "owner").write_text("{}")
    with pytest.raises(UnreadableError, match="cannot be read"):
        marker.check()


# ------------------------------------------------------------------------------------------------ a store that is full


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has a call fail for want of room."""

    def fill(call: str) -> None:
        def refuse(what: object, *_: object, **__: object) -> None:
            if what == "vm.img.forebay":  # which is there
                raise FileExistsError
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(syscalls, call, refuse)

    return fill


@pytest.mark.expect_log("No space left on device: its marker stays as it is")
@pytest.mark.parametrize("call", ["mkdir", "pwrite_all"])
def test_who_comes_after_itself_on_a_full_store_goes_on_as_it_was(
    bed: Bed, full: Callable[[str], None], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bed.take()
    number = token(first)
    first.set_state("dirty")
    first.close()
    left = (bed.side / str(number) / "owner").read_bytes()
    bed.journal(bed.side / str(number), US, number)
    full(call)
    second = bed.take(again=True)
    assert (token(second), second.is_dirty) == (number, True)
    assert (bed.side / str(number) / "owner").read_bytes() == left
    assert bed.path.read_bytes() == b"j" * 4096, "what was committed is in the image"
    assert os.listdir(bed.side / str(number)) == ["owner"], "and is not written over it once more"
    second.check()
    monkeypatch.undo()
    second.set_state("clean")
    second.release()
    assert not bed.side.exists()


@pytest.mark.parametrize("other", ["gateway", "boot_id", "disk"])
def test_nobody_else_goes_on_as_an_owner_on_a_full_store(
    bed: Bed, full: Callable[[str], None], other: str
) -> None:
    bed.take().close()
    me = replace(Owner.of_this_process(US, "d"), **{other: "another"})  # type: ignore[arg-type]
    full("mkdir")
    with pytest.raises((OSError, ForebayError)):
        Marker.take(bed.address, bed.file, me)


def test_without_locks_nobody_goes_on_as_an_owner_on_a_full_store(
    bed: Bed, full: Callable[[str], None]
) -> None:
    bed.take().close()
    full("mkdir")
    with pytest.raises(OSError, match="No space left"):
        Marker.take(bed.address, bed.file, Owner.of_this_process(US, "d"), need_locks=False)


def test_on_a_full_store_nobody_goes_on_below_one_who_began(
    bed: Bed, full: Callable[[str], None]
) -> None:
    first = bed.take()
    number = token(first)
    first.close()
    (bed.side / str(number + 1)).mkdir()
    full("mkdir")
    with pytest.raises(ForebayError, match="just changing"):
        bed.take()
