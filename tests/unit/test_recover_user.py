# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay recover` and `takeover` that root runs: as the user whose files they are, also where root may do nothing."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.origin.addresses import FileAddress
from forebay.origin.opening import open_image
from forebay.origin.worker import syscalls
from forebay.sidecar import recover
from forebay.sidecar.marker import Marker
from forebay.sidecar.record import Owner

DAEMON = 12345
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of the daemon's user, which another gateway had when its host was lost in the middle of a checkpoint."""
    for folder in (*tmp_path.parents, tmp_path):
        if folder != Path("/") and folder.stat().st_uid == 0:
            folder.chmod(folder.stat().st_mode | 0o055)
    store = tmp_path / "images"
    store.mkdir()
    (store / "vm.img").write_bytes(bytes(4096))
    for path in (store, store / "vm.img"):
        os.chown(path, DAEMON, DAEMON)
    address = FileAddress("images", store, "vm.img")
    os.setegid(DAEMON)
    os.seteuid(DAEMON)
    try:
        file = open_image(address, read_only=False)
        marker = Marker.take(address, file, Owner.of_this_process("g", "d"))
        marker.set_state("dirty")
        journal = marker.begin_redo("")
        journal.add(0, 4096, [b"j" * 4096])
        marker.commit_redo(journal)
        marker.close()
        os.close(file.fd)
    finally:
        os.seteuid(0)
        os.setegid(0)
    return store / "vm.img"


@pytest.fixture
def squashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server with root_squash does to root: it may look at names, and no more."""
    opened = syscalls.open

    def refused(path: str, *args: Any, **how: Any) -> int:
        if os.geteuid() == 0 and not args[0] & os.O_PATH:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, *args, **how)

    monkeypatch.setattr(syscalls, "open", refused)
    monkeypatch.setattr(syscalls, "openat2", _refusing(syscalls.openat2))


def _refusing(opened: Callable[..., int]) -> Callable[..., int]:
    def refused(root: int, path: str, flags: int, resolve: int) -> int:
        if os.geteuid() == 0 and not flags & os.O_PATH:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(root, path, flags, resolve)

    return refused


@pytest.mark.usefixtures("squashed")
@pytest.mark.parametrize("take_over", [False, True])
def test_root_works_as_the_user_whose_the_files_are(image: Path, take_over: bool) -> None:
    report = recover.run(Config(), str(image), take_over=take_over)
    assert report.json()["finished"]
    assert image.read_bytes() == b"j" * 4096
    assert (os.geteuid(), os.getegid()) == (0, 0)
    beside = image.with_name("vm.img.forebay")
    for path in beside.rglob("*"):
        assert path.lstat().st_uid == DAEMON, path


@pytest.mark.usefixtures("squashed")
@pytest.mark.parametrize("take_over", [False, True])
def test_where_nobody_can_tell_who_that_is_one_line_says_what_to_do(
    image: Path, monkeypatch: pytest.MonkeyPatch, take_over: bool
) -> None:
    monkeypatch.setattr("forebay.sidecar.user._owner", lambda config, image: None)
    with pytest.raises(ForebayError, match=r"run it as the user .* \(sudo -u .* forebay") as told:
        recover.run(Config(), str(image), take_over=take_over)
    assert len(str(told.value).splitlines()) == 1
    assert image.read_bytes() == bytes(4096)


def test_an_image_that_roots_own_daemon_wrote_is_recovered_as_root(tmp_path: Path) -> None:
    path = tmp_path / "vm.img"
    path.write_bytes(bytes(4096))
    os.chown(path, DAEMON, DAEMON)
    path.with_name("vm.img.forebay").mkdir()
    assert recover.run(Config(), str(path)).json()["owner"] is None
