# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

import errno
import fcntl
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from forebay.errors import ForebayError, InUseError
from forebay.origin.addresses import FileAddress
from forebay.origin.opening import OpenImage, open_image
from forebay.origin.threads import StoreThreads
from forebay.sidecar.claim import Claim
from forebay.sidecar.files import Sidecar, lock_image, read_owner
from forebay.sidecar.locks import WRITES, set_lock, take_locks
from forebay.sidecar.marker import Marker
from forebay.sidecar.record import Owner, State, TakenOver
from forebay.sidecar.takeover import recover_image

US, THEM = "gateway-a", "gateway-b"


@pytest.fixture
def image(tmp_path: Path) -> FileAddress:
    (tmp_path / "vm.img").write_bytes(bytes(4096))
    return FileAddress("images", tmp_path, "vm.img")


@pytest.fixture
def file(image: FileAddress) -> Iterator[OpenImage]:
    opened = open_image(image, read_only=False)
    yield opened
    os.close(opened.fd)


@pytest.fixture
def take(image: FileAddress, file: OpenImage) -> Iterator[Callable[..., Marker]]:
    taken: list[Marker] = []

    def taker(gateway: str = US, disk: str = "d", by: OpenImage = file) -> Marker:
        marker = Marker.take(image, by, Owner.of_this_process(gateway, disk))
        taken.append(marker)
        return marker

    yield taker
    for marker in taken:
        marker.close()


def sidecar(image: FileAddress) -> Path:
    return image.root / "vm.img.forebay"


def own(image: FileAddress) -> Path:
    """The directory of the owner, to whose marker the link leads."""
    return sidecar(image) / os.path.dirname(os.readlink(sidecar(image) / "owner"))


def test_the_marker_says_who(image: FileAddress, take: Callable[..., Marker]) -> None:
    take(disk="web1")
    found = json.loads((sidecar(image) / "owner").read_text())
    assert found["gateway"] == US
    assert found["disk"] == "web1"
    assert found["state"] == "clean"
    assert found["pid"] == os.getpid()
    assert set(found) == {
        "format", "gateway", "host", "pid", "boot_id", "disk", "since", "state", "token", "as_of",
        "dirty_since", "dirty_bytes", "image_format", "phase", "to"
    }  # fmt: skip
    assert read_owner(image) == Owner.parse((sidecar(image) / "owner").read_bytes())


def test_a_clean_release_leaves_nothing(image: FileAddress, take: Callable[..., Marker]) -> None:
    take().release()
    assert os.listdir(image.root) == ["vm.img"]
    assert read_owner(image) is None


def test_a_release_leaves_what_others_keep_there(
    image: FileAddress, take: Callable[..., Marker]
) -> None:
    marker = take()
    (sidecar(image) / "trace").touch()
    marker.release()
    assert os.listdir(sidecar(image)) == ["trace"]
    take(THEM)


def test_a_held_lock_keeps_everybody_out(image: FileAddress, take: Callable[..., Marker]) -> None:
    marker = take(disk="web1")
    marker.set_state("dirty")
    host = Owner.of_this_process(US, "").host
    other = open_image(image, read_only=False)
    for gateway in (US, THEM):  # also a copy of our own state directory on another host
        with pytest.raises(ForebayError, match="in use by") as refused:
            take(gateway, by=other)
        for part in (f"host {host}", "disk 'web1'", "dirty", "since 20", "detach it there"):
            assert part in str(refused.value)
    os.close(other.fd)


@pytest.mark.parametrize("state", ["clean", "dirty"])
def test_what_another_gateway_left_behind_is_refused_after_its_lock_is_gone(
    image: FileAddress, take: Callable[..., Marker], state: State
) -> None:
    marker = take(disk="web1")
    marker.set_state(state)
    marker.close()
    with pytest.raises(ForebayError, match=f"belongs to .*disk 'web1', {state}, since"):
        take(THEM)
    assert read_owner(image) is not None, "a refusal changes nothing"


def test_our_own_marker_is_taken_back_with_its_state_and_a_larger_token(
    image: FileAddress, take: Callable[..., Marker]
) -> None:
    marker = take()
    assert marker.owner is not None
    token = marker.owner.token
    marker.set_state("dirty")
    marker.close()
    again = take()
    assert again.owner is not None
    assert again.owner.state == "dirty", "what a crash left is still only ours"
    assert again.owner.token > token


def test_the_token_grows_although_a_clean_release_removed_it(
    take: Callable[..., Marker], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 2_000_000_000.0
    monkeypatch.setattr("forebay.sidecar.tenure.time.time", lambda: now)
    first = take()
    assert first.owner is not None
    token = first.owner.token
    first.release()
    now += 1
    second = take()
    assert second.owner is not None
    assert second.owner.token > token


def test_a_dirty_release_keeps_the_marker(image: FileAddress, take: Callable[..., Marker]) -> None:
    marker = take()
    marker.set_state("dirty")
    marker.release()
    found = read_owner(image)
    assert found is not None
    assert found.state == "dirty"
    take()  # the lock is free again, for us


@pytest.mark.parametrize(("first", "then"), [("clean", "dirty"), ("dirty", "clean")])
def test_a_marker_of_which_nobody_knows_what_it_says_is_written_again(
    image: FileAddress,
    take: Callable[..., Marker],
    monkeypatch: pytest.MonkeyPatch,
    first: State,
    then: State,
) -> None:
    """The new one was renamed into place and the folder could not be synced: going back is no news to us, but is."""
    marker = take()
    marker.set_state(then)
    sync, calls = os.fsync, 0

    def fails(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(5, "injected")
        sync(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="injected"):
            marker.set_state(first)
    found = read_owner(image)
    assert found is not None
    assert found.state == first, "the fault has to come late"
    assert marker.is_dirty
    marker.set_state(then)
    found = read_owner(image)
    assert found is not None
    assert found.state == then
    assert marker.is_dirty == (then == "dirty")


def test_a_marker_that_was_not_written_at_all_is_what_it_was(
    image: FileAddress, take: Callable[..., Marker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it need not be written where it says what is to be said: its store may be full."""
    marker = take()
    marker.set_state("dirty")

    def full(_fd: int) -> None:
        raise OSError(28, "injected")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="injected"):
        marker.set_state("clean")
    marker.set_state("dirty")
    found = read_owner(image)
    assert found is not None
    assert found.state == "dirty"
    assert marker.is_dirty


def test_a_directory_that_its_last_owner_removes_meanwhile_is_made_again(
    image: FileAddress, take: Callable[..., Marker], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = Sidecar.make, 0

    def make(self: Sidecar) -> None:
        nonlocal removed
        real(self)
        removed += 1
        if removed == 1:
            sidecar(image).rmdir()

    monkeypatch.setattr(Sidecar, "make", make)
    take(US)
    assert removed == 2
    assert read_owner(image) is not None


def test_whoever_comes_after_an_owner_who_just_left_looks_again(
    image: FileAddress, take: Callable[..., Marker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it knew of the image, and of its journal, is not to be believed any more."""
    first = take()
    real = Sidecar.make

    def make(self: Sidecar) -> None:
        real(self)
        if first.owner is not None:
            first.release()

    with monkeypatch.context() as patched:
        patched.setattr(Sidecar, "make", make)
        with pytest.raises(ForebayError, match="just changing: try again"):
            take(US)
    assert os.listdir(image.root) == ["vm.img"]
    take(THEM)


def test_lost_ownership_is_noticed(image: FileAddress, take: Callable[..., Marker]) -> None:
    marker = take()
    marker.check()
    assert marker.owner is not None
    other = replace(marker.owner, gateway=THEM, host="elsewhere", token=marker.owner.token + 1)
    path = own(image) / "owner"
    path.write_text(json.dumps(asdict(other)))
    with pytest.raises(ForebayError, match="taken over by host elsewhere"):
        marker.check()
    path.unlink()
    with pytest.raises(ForebayError, match="was taken over$"):
        marker.check()


@pytest.mark.parametrize("gone", ["removed", "leads elsewhere"])
def test_the_link_to_the_marker_counts_for_nothing_and_is_made_again(
    image: FileAddress, take: Callable[..., Marker], gone: str
) -> None:
    marker = take()
    there = own(image)
    (sidecar(image) / "owner").unlink()
    if gone != "removed":
        (sidecar(image) / "owner").symlink_to("17/owner")
    marker.check()
    assert own(image) == there


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"format": 2}',
        b'{"format": 1, "gateway": "x"}',
    ],
)
def test_a_marker_that_cannot_be_read_is_not_overwritten(
    image: FileAddress, take: Callable[..., Marker], text: bytes
) -> None:
    sidecar(image).mkdir()
    (sidecar(image) / "owner").write_bytes(text)
    with pytest.raises(ForebayError, match="cannot be read"):
        take()
    assert (sidecar(image) / "owner").read_bytes() == text


def test_links_in_the_place_of_our_files_are_not_followed(
    image: FileAddress, take: Callable[..., Marker], tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    sidecar(image).symlink_to(victim)
    with pytest.raises((ForebayError, OSError)):
        take()
    sidecar(image).unlink()
    sidecar(image).mkdir()
    for name in ("lock", "redo.new", "owner.new"):
        (sidecar(image) / name).symlink_to(victim / "file")
    take().release()
    assert os.listdir(victim) == []
    assert os.listdir(tmp_path) == ["vm.img", "victim"] or not sidecar(image).exists()


def test_the_marker_belongs_to_the_file_that_is_open(
    image: FileAddress, take: Callable[..., Marker], tmp_path: Path
) -> None:
    (tmp_path / "new.img").write_bytes(bytes(4096))
    os.rename(tmp_path / "new.img", tmp_path / "vm.img")
    with pytest.raises(ForebayError, match="replaced"):
        take()


def test_nothing_stays_open(image: FileAddress, take: Callable[..., Marker]) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    take().release()
    marker = take()
    with pytest.raises(ForebayError):
        take(THEM)
    marker.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_what_is_dirty_stands_in_the_marker_and_in_the_refusal(
    image: FileAddress, take: Callable[..., Marker], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = take(disk="web1")
    marker.set_state("dirty")
    marker.count(12 << 20)
    assert marker.owner is not None
    assert marker.owner.dirty_bytes == 0, "not so soon again"
    monkeypatch.setattr("forebay.sidecar.marker.COUNT_SECONDS", 0.0)
    marker.count(12 << 20)
    since = marker.owner.dirty_since
    marker.close()
    with pytest.raises(
        InUseError, match=re.escape(f"has 12M (at the last count) written since {since}")
    ) as refused:
        take(THEM)
    assert refused.value.holder["dirty_bytes"] == 12 << 20
    marker = take(disk="web1")
    marker.commit_redo(marker.begin_redo("2026-01-02T03:04:05+00:00"))
    marker.end_redo("2026-01-02T03:04:05+00:00", 5 << 20)
    marker.close()
    with pytest.raises(
        InUseError, match=r"has 5.0M .* written since 2026-01-02T03:04:05\+00:00 that"
    ):
        take(THEM)
    marker = take()
    marker.set_state("clean")
    assert marker.owner is not None
    assert (marker.owner.dirty_since, marker.owner.dirty_bytes) == ("", 0)


@pytest.mark.parametrize("theirs", [True, False], ids=["another's", "gone"])
def test_a_marker_that_is_not_ours_any_more_is_left_as_it_is(
    image: FileAddress, take: Callable[..., Marker], theirs: bool
) -> None:
    marker = take()
    marker.set_state("dirty")
    journal = marker.begin_redo("")
    assert marker.owner is not None
    (own(image) / "owner").unlink()
    if theirs:
        other = replace(marker.owner, gateway=THEM, token=marker.owner.token + 1)
        (sidecar(image) / str(other.token)).mkdir()
        (sidecar(image) / str(other.token) / "owner").write_text(json.dumps(asdict(other)))

    def files() -> dict[Path, bytes]:
        return {x: x.read_bytes() for x in sidecar(image).rglob("*") if x.is_file()}

    before = files()
    for change in (
        marker.check,
        lambda: marker.set_state("clean"),
        lambda: marker.begin_redo(""),
        lambda: marker.commit_redo(journal),
        lambda: marker.end_redo(""),
    ):
        with pytest.raises(TakenOver):
            change()
    assert files() == before
    journal.close()
    marker.owner = replace(marker.owner, state="clean")
    with pytest.raises(TakenOver):
        marker.release()
    assert files() == before


@pytest.mark.parametrize("how", ["replaced", "deleted", "cut"])
def test_no_checkpoint_is_committed_for_another_file(
    image: FileAddress, take: Callable[..., Marker], how: str
) -> None:
    marker = take()
    marker.set_state("dirty")
    journal = marker.begin_redo("")
    path = image.root / "vm.img"
    if how == "cut":
        os.truncate(path, 512)
    else:
        path.unlink()
    if how == "replaced":
        path.write_bytes(bytes(4096))
    said = {
        "cut": "has 512 bytes and had 4096",
        "replaced": "by another file",
        "deleted": "deleted",
    }
    with pytest.raises(TakenOver, match=said[how]):
        marker.commit_redo(journal)
    journal.drop()
    assert "redo" not in os.listdir(own(image))


@pytest.mark.expect_log("has no file locks: only the marker")
def test_a_store_without_locks_is_refused_unless_it_is_allowed(
    image: FileAddress,
    file: OpenImage,
    take: Callable[..., Marker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*_: object) -> bytes:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("forebay.sidecar.locks.fcntl.fcntl", none)
    with pytest.raises(ForebayError, match="no file locks .* require_locks = false") as refused:
        take()
    assert len(str(refused.value).splitlines()) == 1
    assert not (sidecar(image) / "owner").exists()
    marker = Marker.take(image, file, Owner.of_this_process(US, "d"), need_locks=False)
    with pytest.raises(ForebayError, match="belongs to"):
        Marker.take(image, file, Owner.of_this_process(THEM, "d"), need_locks=False)
    with pytest.raises(ForebayError, match="no file locks"):
        recover_image(image, file)
    marker.release()
    assert os.listdir(image.root) == ["vm.img"]


def test_qemu_is_seen_before_anything_is_changed(
    image: FileAddress, file: OpenImage, take: Callable[..., Marker]
) -> None:
    """A program that locks as QEMU does keeps out a gateway, and one that would recover the image."""
    marker = take()
    marker.set_state("dirty")
    marker.commit_redo(marker.begin_redo(""))
    marker.close()
    set_lock(file.fd, fcntl.F_UNLCK)
    journal = own(image) / "redo"
    marker_before = (sidecar(image) / "owner").read_bytes()
    fd = os.open(image.root / "vm.img", os.O_RDWR)
    take_locks(fd, WRITES)
    ours = open_image(image, read_only=False)
    me = Owner.of_this_process(US, "d")
    for attempt in (
        lambda: Marker.take(image, ours, me),
        lambda: recover_image(image, ours),
        lambda: recover_image(image, ours, take_over=True),
    ):
        set_lock(ours.fd, fcntl.F_UNLCK)
        with pytest.raises(InUseError, match="is being written by"):
            attempt()
    assert (sidecar(image) / "owner").read_bytes() == marker_before
    assert journal.exists()
    os.close(fd)
    os.close(ours.fd)


# ------------------------------------------------------------------------------------ off the event loop


def claim_of(image: FileAddress, timeout: float) -> Claim:
    """A claim that is not held yet."""
    threads = StoreThreads("s")
    return Claim(image, "vm", gateway=US, disk="d", threads=threads, timeout=timeout)


def test_an_image_that_another_had_just_before_we_locked_it_is_not_taken_again(
    image: FileAddress,
    file: OpenImage,
    take: Callable[..., Marker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another gateway takes it and gives it back between our look and our lock."""
    before = open_image(image, read_only=False)
    take(by=before).close()
    os.close(before.fd)
    place = "forebay.sidecar.marker.lock_image"

    def locked(*args: Any, **how: Any) -> None:
        with monkeypatch.context() as alone:
            alone.setattr(place, lock_image)
            other = open_image(image, read_only=False)
            recover_image(image, other, take_over=True)
            take(THEM, by=other).release()
            os.close(other.fd)
        lock_image(*args, **how)

    monkeypatch.setattr(place, locked)
    with pytest.raises(TakenOver):
        Marker.take(image, file, Owner.of_this_process(US, "d"), again=True)
    assert read_owner(image) is None


async def test_a_claim_goes_through_its_states(image: FileAddress, file: OpenImage) -> None:
    claim = claim_of(image, 10)
    await claim.take(file)
    for change, state in (
        (claim.mark_dirty, "dirty"),
        (claim.mark_dirty, "dirty"),
        (claim.mark_clean, "clean"),
    ):
        await change()
        assert claim.is_dirty == (state == "dirty")
        found = read_owner(image)
        assert found is not None
        assert found.state == state
    await claim.check()
    await claim.release()
    assert not claim.is_dirty
    assert read_owner(image) is None


async def test_a_mark_that_hangs_is_not_overtaken(
    image: FileAddress, file: OpenImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dirty` hangs and is given up; `clean` after it must not be undone by `dirty` ending late."""
    claim = claim_of(image, 10)
    await claim.take(file)
    claim.timeout = 0.1
    hang = threading.Event()
    real = Marker.set_state
    order: list[str] = []

    def slow(self: Marker, state: State) -> None:
        if state == "dirty":
            hang.wait(10)
        real(self, state)
        order.append(state)

    monkeypatch.setattr(Marker, "set_state", slow)
    with pytest.raises(TimeoutError, match="marking images:"):
        await claim.mark_dirty()
    with pytest.raises(TimeoutError):
        await claim.mark_clean()
    claim.timeout = 10
    async with trio.open_nursery() as nursery:
        nursery.start_soon(claim.mark_clean)
        await trio.testing.wait_all_tasks_blocked()
        hang.set()
    assert order == ["dirty", "clean"]
    await claim.release()


async def test_a_claim_that_came_too_late_is_given_back(
    image: FileAddress, file: OpenImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang, done = threading.Event(), threading.Event()
    real_take, real_close = Marker.take.__func__, Marker.close  # type: ignore[attr-defined]

    def slow(cls: type[Marker], /, *arguments: object, **options: object) -> Marker:
        hang.wait(10)
        return real_take(cls, *arguments, **options)  # type: ignore[no-any-return]

    def close(self: Marker) -> None:
        real_close(self)
        done.set()

    monkeypatch.setattr(Marker, "take", classmethod(slow))
    monkeypatch.setattr(Marker, "close", close)
    with pytest.raises(TimeoutError, match="claiming"):
        await claim_of(image, 0.1).take(file)
    hang.set()
    assert await trio.to_thread.run_sync(done.wait, 10)
    claim = claim_of(image, 10)
    await claim.take(file)
    await claim.release()
