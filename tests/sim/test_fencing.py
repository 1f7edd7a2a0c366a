# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A host that is cut off, and another one that takes its image over: whatever arrives late meets nothing of another's.

The first host lives through a disk's life beside one image. At one of its calls that change something its link breaks:
the call has not arrived yet, or its answer is lost, and its kernel sends it again later. Its locks are gone, so that
what it writes to the image fails from then on (FENCING.md says where that holds). The second host takes the image over,
or recovers it, and lives with it. Before one of its own calls the one that was under way arrives, and the first host
goes on: it believes what it sees, or (`stale`) goes on believing what it saw before the link broke.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from forebay.errors import ForebayError
from forebay.origin.addresses import FileAddress
from forebay.origin.opening import OpenImage, open_image
from forebay.sidecar import locks, redo
from forebay.sidecar.files import Sidecar, read_owner
from forebay.sidecar.marker import Marker
from forebay.sidecar.record import Owner
from forebay.sidecar.takeover import recover_image
from forebay.sidecar.tenure import Tenure

SIZE = 1 << 16
ONE, TWO = "gateway-1", "gateway-2"
ALL = bool(os.environ.get("FOREBAY_FENCING_ALL"))
"""Whether all cases are run; half of them by default."""
CHANGES = ("mkdir", "rename", "unlink", "rmdir", "symlink", "open", "pwrite", "pwritev")


class Lost(AssertionError):
    """What must not happen."""


@dataclass
class Case:
    life: str
    """What the first host does."""
    cut: int
    """At which of its calls, from 1."""
    arrives: int
    """Before which call of the second host; beyond its last one: after all of them."""
    again: bool
    """It was done, and is done again; else it is done for the first time when it arrives."""
    stale: bool

    def __str__(self) -> str:
        return (
            f"{self.life}-{self.cut}-{self.arrives}-{'again' if self.again else 'late'}"
            f"{'-stale' if self.stale else ''}"
        )


class Store:
    """The store, as two hosts see it. The first one's calls come from a thread of its own."""

    def __init__(self, directory: Path, case: Case) -> None:
        self.case = case
        self.path = directory / "vm.img"
        self.path.write_bytes(bytes(SIZE))
        self.image = FileAddress("images", directory, "vm.img")
        self.real = {name: getattr(os, name) for name in CHANGES}
        self.first: OpenImage = open_image(self.image, read_only=False)
        self.second: OpenImage = open_image(self.image, read_only=False)
        self.is_cut, self.arrived, self.over = (threading.Event() for _ in range(3))
        self.calls = {True: 0, False: 0}
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.fault: BaseException | None = None

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        check = Sidecar.check_ours
        with contextlib.ExitStack() as undo:
            for name in CHANGES:
                undo.enter_context(mock.patch.object(os, name, self._changing(name)))
            undo.enter_context(mock.patch.object(os, "fsync"))
            undo.enter_context(mock.patch.object(os, "fdatasync"))

            def checked(sidecar: Sidecar, me: Owner) -> None:
                if not (self.case.stale and self._is_first() and self.is_cut.is_set()):
                    check(sidecar, me)

            undo.enter_context(mock.patch.object(Sidecar, "check_ours", checked))
            yield
        os.close(self.first.fd)
        os.close(self.second.fd)

    def _is_first(self) -> bool:
        return threading.current_thread() is self.thread

    def _changing(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def call(*args: Any, **how: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **how)
            first = self._is_first()
            self.calls[first] += 1
            if first:
                return self._of_first(name, real, args, how)
            if self.calls[False] == self.case.arrives:
                self.arrive()
            return real(*args, **how)

        return call

    def _of_first(self, name: str, real: Callable[..., Any], args: Any, how: Any) -> Any:
        to_image = args[0] == self.first.fd
        if self.is_cut.is_set():
            if to_image:
                raise OSError(errno.EIO, "the lock is lost")
            return real(*args, **how)
        if self.calls[True] != self.case.cut:
            return real(*args, **how)
        done = self.case.again and name != "open"
        result: Any = None
        if done:
            try:
                result = real(*args, **how)
            except OSError as fault:
                result = fault
        locks.set_lock(self.first.fd, fcntl.F_UNLCK)
        self.is_cut.set()
        self.arrived.wait(30)
        if to_image:
            raise OSError(errno.EIO, "the lock is lost")
        if not done:
            return real(*args, **how)
        with contextlib.suppress(OSError):
            real(*args, **how)
        if isinstance(result, OSError):
            raise result
        return result

    def arrive(self) -> None:
        """What was under way arrives, and the first host goes on until it ends or gives up."""
        self.arrived.set()
        self.thread.join(30)
        assert not self.thread.is_alive()
        locks.set_lock(self.first.fd, fcntl.F_UNLCK)  # its process ends with it

    # ------------------------------------------------------------------------------------------------ the two hosts

    def _live(self) -> None:
        try:
            with contextlib.suppress(OSError, ForebayError):
                LIVES[self.case.life](self)
        except BaseException as fault:  # noqa: BLE001  (told in the other thread)
            self.fault = fault
        finally:
            self.is_cut.set()

    def write(self, file: OpenImage, marker: Marker, byte: bytes) -> None:
        """A pass: the first half of the image becomes that byte."""
        journal = marker.begin_redo("")
        journal.add(0, SIZE // 2, [byte * (SIZE // 2)])
        marker.commit_redo(journal)
        os.pwritev(file.fd, [byte * (SIZE // 2)], 0)
        marker.end_redo("")


def _is_first_of_all(store: Store) -> None:
    """The life of a disk, from attach to detach."""
    marker = Marker.take(store.image, store.first, Owner.of_this_process(ONE, "d"))
    marker.set_state("dirty")
    store.write(store.first, marker, b"1")
    store.write(store.first, marker, b"2")
    marker.check()
    marker.set_state("clean")
    marker.release()


def _comes_back(store: Store) -> None:
    """A crash in the middle of a pass, and the start after it."""
    me = Owner.of_this_process(ONE, "d")
    marker = Marker.take(store.image, store.first, me)
    marker.set_state("dirty")
    journal = marker.begin_redo("")
    journal.add(0, SIZE // 2, [b"1" * (SIZE // 2)])
    marker.commit_redo(journal)
    marker.close()
    marker = Marker.take(store.image, store.first, me, again=True)
    marker.count(1)
    store.write(store.first, marker, b"2")
    marker.close()


def _helps(take_over: bool) -> Callable[[Store], None]:
    def live(store: Store) -> None:
        """The first host is the one where an operator runs `recover`, or `takeover`; the disk was another's."""
        marker = Marker.take(store.image, store.first, Owner.of_this_process("gateway-0", "d"))
        marker.set_state("dirty")
        journal = marker.begin_redo("")
        journal.add(0, SIZE // 2, [b"0" * (SIZE // 2)])
        marker.commit_redo(journal)
        marker.close()
        recover_image(store.image, store.first, take_over=take_over, sure=True)

    return live


LIVES: dict[str, Callable[[Store], None]] = {
    "whole life": _is_first_of_all,
    "start after a crash": _comes_back,
    "recover": _helps(take_over=False),
    "takeover": _helps(take_over=True),
}


def second_host(store: Store) -> None:
    """It takes the image over and lives with it. Raises Lost where anything of it is not as it left it."""
    for _ in range(4):
        try:
            recover_image(store.image, store.second, take_over=True, sure=True)
            me = Owner.of_this_process(TWO, "e")
            marker = Marker.take(store.image, store.second, me)
        except ForebayError as fault:
            if "just changing" not in str(fault) and "in use by" not in str(fault):
                raise
        else:
            break
    else:
        raise Lost("the image cannot be taken over")
    token = _is_its_own(store, marker, "after it was taken over")
    marker.set_state("dirty")
    os.pwritev(store.second.fd, [b"t" * SIZE], 0)
    journal = marker.begin_redo("")
    journal.add(0, SIZE, [b"T" * SIZE])
    marker.commit_redo(journal)
    own = store.path.with_name("vm.img.forebay") / str(token)
    kept = (own / redo.NAME).read_bytes() if own.is_dir() else b""
    os.pwritev(store.second.fd, [b"T" * SIZE], 0)
    if own.is_dir() and (own / redo.NAME).read_bytes() != kept:
        raise Lost("its journal is another one")
    marker.end_redo("")
    _is_its_own(store, marker, "while it served the image")
    if store.calls[False] < store.case.arrives:
        store.arrive()
    _is_its_own(store, marker, "after all arrived")
    found = store.path.read_bytes()
    if found != b"T" * SIZE:
        raise Lost(f"{sum(x != ord('T') for x in found)} bytes of the new owner are lost")
    marker.set_state("clean")
    marker.release()
    if read_owner(store.image) is not None:
        raise Lost("what was beaten counts again")
    assert store.fault is None, store.fault


def _is_its_own(store: Store, marker: Marker, when: str) -> int:
    try:
        marker.check()
    except (ForebayError, OSError) as fault:
        raise Lost(f"{when}: {fault}") from fault
    found = read_owner(store.image)
    assert marker.owner is not None
    if found != marker.owner:
        raise Lost(f"{when}: the marker says {found}")
    return marker.owner.token


def run(directory: Path, case: Case) -> bool:
    """One case. False if the first host's life has no such call."""
    directory.mkdir()
    store = Store(directory, case)
    with store.planted():
        store.thread.start()
        store.is_cut.wait(30)
        if store.calls[True] < case.cut:
            store.thread.join()
            return False
        try:
            second_host(store)
        finally:
            store.arrive()
    return True


def cases(life: str) -> Iterator[Case]:
    """Every call of the first host, with arrivals all over the life of the second one."""
    for cut in itertools.count(1):
        for number, (again, stale) in enumerate(itertools.product((False, True), repeat=2)):
            if ALL or (number + cut) % 4 in (0, 3):
                arrives = 1 + (7 * cut + 3 * again + 17 * stale) % 56
                yield Case(life, cut, 1000 if arrives > 48 else arrives, again, stale)


@pytest.mark.parametrize("life", LIVES)
def test_nothing_of_the_new_owner_is_replaced_by_what_arrives_late(
    tmp_path: Path, life: str
) -> None:
    ran = 0
    for number, case in enumerate(cases(life)):
        try:
            if not run(tmp_path / str(number), case):
                break
        except (Lost, OSError, ForebayError) as fault:
            raise AssertionError(f"{case}: {fault}") from fault
        ran += 1
    assert ran > 40, "each of the calls, late and again"


def _one_directory_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker is renamed over that of the owner before, as it once was."""

    def shared(sidecar: Sidecar, before: Tenure | None) -> tuple[int, int]:
        with contextlib.suppress(FileExistsError):
            os.mkdir("1", dir_fd=sidecar.fd)
        fd = os.open("1", os.O_RDONLY | os.O_DIRECTORY, dir_fd=sidecar.fd)
        return (before.highest if before is not None else 1) + 1, fd

    monkeypatch.setattr(Sidecar, "_take_token", shared)
    monkeypatch.setattr(Sidecar, "_check_next", lambda sidecar, before: None)
    monkeypatch.setattr("forebay.sidecar.tenure.sweep", lambda *_: None)


def _any_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal counts whoever wrote it: that of an owner who is beaten, too."""
    monkeypatch.setattr(
        "forebay.sidecar.tenure._newest",
        _lowest,
    )


def _lowest(top: int, address: FileAddress, image: os.stat_result | None) -> Tenure | None:
    from forebay.sidecar import own_files, tenure

    for number in reversed(tenure.numbers(top, address)):
        fd = own_files.open_directory(top, str(number), image)
        if fd is not None:
            found = Tenure(number, fd, address, image)
            if found.read() is not None or found.has(redo.NAME):
                return found
            found.close()
    return None


@pytest.mark.parametrize("plant", [_one_directory_for_all, _any_journal])
def test_a_planted_bug_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    for number, case in enumerate(cases("whole life")):
        try:
            if not run(tmp_path / str(number), case):
                break
        except (Lost, OSError, ForebayError, AssertionError):
            return
    pytest.fail("it was not found")
