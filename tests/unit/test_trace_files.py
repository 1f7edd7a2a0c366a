# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where traces are kept: beside the image, or under STATE where that cannot be; what is planted is passed over."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from forebay.boot import files as files_module
from forebay.boot.encoding import encoded
from forebay.boot.files import Found, TraceFiles
from forebay.boot.trace import Boot, Trace
from forebay.origin.addresses import FileAddress, NbdAddress
from forebay.origin.protocol import Identity
from forebay.origin.worker import syscalls
from forebay_cache.format.geometry import BLOCK

Expect = Callable[[str], None]
SIZE = 64 * BLOCK
READ = Boot({n: n for n in range(20)})


class Place:
    """An image in a store, and STATE."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.state.mkdir()
        root = directory / "store"
        root.mkdir()
        self.image = root / "a.raw"
        self.image.write_bytes(bytes(SIZE))
        self.address = FileAddress("images", root, "a.raw")
        self.files = TraceFiles(self.state, "here")

    @property
    def side(self) -> Path:
        return self.image.with_name("a.raw.forebay")

    def before(self) -> Trace:
        now = self.files.identity(self.address)
        assert now is not None
        return Trace.of_image(now)

    def add(self) -> Found:
        return self.files.add(self.address, self.before(), READ)

    def find(self) -> Found | None:
        return self.files.find(self.address, None)

    def in_state(self) -> list[Path]:
        folder = self.state / "traces"
        return sorted(folder.iterdir()) if folder.exists() else []


def fits(found: Found | None) -> bool | None:
    assert found is not None
    return found.fits


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def fail(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Have a call on the store fail from now on."""

    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(syscalls, call, failing)


def test_a_trace_lies_beside_its_image_and_every_host_finds_it(place: Place) -> None:
    assert place.find() is None
    kept = place.add()
    assert kept.path == "images:a.raw.forebay/trace"
    assert [x.name for x in place.side.iterdir()] == ["trace"]
    assert place.in_state() == []
    there = TraceFiles(place.state / "of another host", "there").find(place.address, None)
    assert there == kept == place.find()
    assert fits(there)
    assert kept.usual == frozenset(READ.read)


def test_a_trace_has_nothing_of_what_is_in_the_image(place: Place) -> None:
    place.image.write_bytes(b"secret! " * (SIZE // 8))
    place.add()
    assert b"secret!" not in (place.side / "trace").read_bytes()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_store_that_is_not_ours_to_write_has_its_traces_in_state(
    place: Place, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fail(monkeypatch, "mkdir", number)
    kept = place.add()
    assert not place.side.exists()
    assert [str(path) for path in place.in_state()] == [kept.path]
    assert place.find() == kept


@pytest.mark.parametrize("call", ["mkdir", "pwritev", "fsync", "rename"])
def test_a_store_that_is_full_leaves_nothing_half_done_and_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch, expect_log: Expect, call: str
) -> None:
    expect_log("its boot trace is kept on this host only: .*No space left")
    real = getattr(syscalls, call)

    def failing(*args: object, **how: object) -> object:
        is_beside = place.side.exists() or call == "mkdir"
        if is_beside and not (place.state / "traces").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **how)

    monkeypatch.setattr(syscalls, call, failing)
    kept = place.add()
    assert not place.side.exists()
    assert [str(path) for path in place.in_state()] == [kept.path]


def test_no_room_anywhere_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "mkdir", errno.EROFS)
    fail(monkeypatch, "pwritev", errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        place.add()
    assert place.in_state() == []
    assert place.find() is None


def test_of_two_that_fit_the_later_one_counts_and_one_that_fits_before_one_that_does_not(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = place.add()
    with monkeypatch.context() as patched:
        fail(patched, "mkdir", errno.EROFS)
        patched.setattr("time.time", lambda: beside.trace.recorded + 10.0)
        later = place.files.add(place.address, beside.trace, READ)
    assert place.find() == later
    assert later.trace.boots == 2
    os.utime(place.image, (1, 1))
    monkeypatch.setattr("time.time", lambda: beside.trace.recorded - 10.0)
    place.files.keep(place.address, place.before().with_boot(READ, 5.0))  # beside it: STATE's goes
    found = place.find()
    assert fits(found)
    assert found is not None
    assert found.trace.recorded == 5
    assert place.in_state() == []


@pytest.mark.parametrize("change", ["size", "time", "inode"])
def test_a_trace_of_another_content_does_not_fit(place: Place, change: str) -> None:
    place.add()
    status = place.image.stat()
    if change == "size":
        os.truncate(place.image, SIZE + BLOCK)
        os.utime(place.image, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(place.image)
    else:
        other = place.image.with_name("b")
        other.write_bytes(bytes(SIZE))
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.rename(place.image)
    assert fits(place.find()) is False
    assert place.before().boots == 0


def test_a_trace_is_dropped_wherever_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.add()
    assert place.files.drop(place.address)
    assert not place.side.exists()
    assert not place.files.drop(place.address)
    with monkeypatch.context() as patched:
        fail(patched, "mkdir", errno.EROFS)
        place.add()
    assert place.files.drop(place.address)
    assert (place.in_state(), place.find()) == ([], None)


def test_what_else_lies_beside_the_image_stays(place: Place) -> None:
    place.side.mkdir()
    (place.side / "owner").write_text("{}")
    place.add()
    assert place.files.drop(place.address)
    assert [x.name for x in place.side.iterdir()] == ["owner"]


def plant(place: Place, what: str) -> None:
    """Put something in the place of a trace."""
    trace, other = place.side / "trace", place.side / "other"
    place.side.mkdir(exist_ok=True)
    trace.unlink(missing_ok=True)
    good = encoded(place.before().with_boot(READ, 1.0), "images:a.raw")
    match what:
        case "a link":
            other.write_bytes(good)
            trace.symlink_to("other")
        case "a second name":
            other.write_bytes(good)
            os.link(other, trace)
        case "a directory":
            trace.mkdir()
        case "a pipe":
            os.mkfifo(trace)
        case "a stranger's":
            trace.write_bytes(good)
            os.chown(trace, 12345, 12345)
        case "a long one":
            with trace.open("wb") as file:
                file.truncate(1 << 40)
        case "nonsense":
            trace.write_bytes(b"{}\n" * 1000)
        case _:
            trace.write_bytes(b"")


PLANTED = (
    "a link",
    "a second name",
    "a directory",
    "a pipe",
    "a stranger's",
    "a long one",
    "nonsense",
    "nothing",
)


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_beside_an_image_is_passed_over_and_told(
    place: Place, caplog: pytest.LogCaptureFixture, expect_log: Expect, what: str
) -> None:
    if what == "a stranger's" and os.geteuid():
        pytest.skip("only root gives files away")
    expect_log("is passed over|is kept on this host only: .* is a directory: remove it")
    plant(place, what)
    assert place.find() is None
    assert caplog.text.count("is passed over") == 1
    target = place.side / "other"
    before = target.read_bytes() if target.exists() else None
    kept = place.add()
    assert place.find() == kept
    assert (target.read_bytes() if target.exists() else None) == before


def test_an_image_that_is_no_file_has_its_trace_in_state_and_fits_by_its_size(place: Place) -> None:
    export = NbdAddress("x", "host")
    kept = place.files.add(export, Trace(SIZE), READ)
    assert [str(path) for path in place.in_state()] == [kept.path]
    found = place.files.find(export, Identity(SIZE))
    assert found == kept
    assert fits(place.files.find(export, Identity(SIZE + 1))) is False
    assert fits(place.files.find(export, None)) is None
    assert place.files.drop(export)


def test_a_virtual_disk_has_a_trace_beside_that_of_its_bytes(place: Place) -> None:
    virtual = replace(place.address, format="qcow2")
    looks = Identity(1 << 40, 5, 6, 7)
    kept = place.files.add(virtual, Trace.of_image(looks), Boot({n: n for n in range(99, 120)}))
    assert kept.path == "images:a.raw.forebay/trace.qcow2"
    place.add()
    assert sorted(x.name for x in place.side.iterdir()) == ["trace", "trace.qcow2"]
    assert place.files.find(virtual, looks) == kept
    assert fits(place.files.find(virtual, None)) is None
    assert place.files.drop(place.address)
    assert place.files.find(virtual, looks) == kept


def test_state_has_a_bound_and_the_oldest_go(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MOST_KEPT", 3)
    exports = [NbdAddress(f"x{n}", "host") for n in range(5)]
    for n, export in enumerate(exports):
        kept = place.files.add(export, Trace(SIZE), READ)
        os.utime(kept.path, (n, n))
    assert [place.files.find(x, Identity(SIZE)) is not None for x in exports] == [0, 0, 1, 1, 1]


def test_a_trace_of_another_image_in_state_is_passed_over(place: Place, expect_log: Expect) -> None:
    expect_log("is passed over: of another image")
    export = NbdAddress("x", "host")
    kept = place.files.add(export, Trace(SIZE), READ)
    Path(kept.path).write_bytes(encoded(Trace(SIZE), "images:b.raw"))
    assert place.files.find(export, Identity(SIZE)) is None


def test_what_a_kill_left_in_the_middle_of_keeping_is_not_in_the_way(place: Place) -> None:
    place.side.mkdir()
    (place.side / "trace.here").write_bytes(b"half")
    place.add()
    assert [x.name for x in place.side.iterdir()] == ["trace"]


def test_an_image_that_is_gone_is_an_error(place: Place) -> None:
    place.image.unlink()
    with pytest.raises(OSError, match="a.raw is gone"):
        place.find()
