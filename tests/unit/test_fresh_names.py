# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Names in a store, as an NFS client has them: it believes what it knew until the directory is asked for anew."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay.errors import ForebayError
from forebay.origin import opening
from forebay.origin.addresses import FileAddress
from forebay.origin.calls import Status, SystemCalls, open_beneath
from forebay.origin.opening import look, open_image
from forebay.origin.worker import syscalls


class Client:
    """What the client knows of the names in one directory: as they were, until its status is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known = self._names()

    def _names(self) -> dict[str, int]:
        return {x.name: x.stat().st_ino for x in self.folder.iterdir()}

    def status(self, found: Status) -> Status:
        if found.inode == self.folder.stat().st_ino:
            self.known = self._names()
        return found

    def opening(self, open_beneath: Callable[..., int]) -> Callable[..., int]:
        def opened(root: int, path: str, flags: int) -> int:
            name = os.path.basename(path)
            if path not in (".", self.folder.name):
                if name not in self.known:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                for other in self.folder.iterdir():
                    if other.stat().st_ino == self.known[name]:
                        path = os.path.join(os.path.dirname(path), other.name)
            return open_beneath(root, path, flags)

        return opened


@pytest.fixture(params=["", "deep"])
def address(tmp_path: Path, request: pytest.FixtureRequest) -> FileAddress:
    (tmp_path / request.param).mkdir(exist_ok=True)
    return FileAddress("images", tmp_path, os.path.join(request.param, "vm.img"))


@pytest.fixture
def path(address: FileAddress) -> Path:
    return address.root / address.path


@pytest.fixture
def make_client(monkeypatch: pytest.MonkeyPatch, path: Path) -> Callable[[], Client]:
    def make() -> Client:
        client = Client(path.parent)
        status = SystemCalls.status
        monkeypatch.setattr(SystemCalls, "status", lambda self, fd: client.status(status(self, fd)))
        monkeypatch.setattr(opening, "open_beneath", client.opening(open_beneath))
        return client

    return make


def test_an_image_that_was_just_made_at_the_server_is_found(
    address: FileAddress, path: Path, make_client: Callable[[], Client]
) -> None:
    make_client()
    path.write_bytes(bytes(4096))
    file = open_image(address, read_only=True)
    assert file.size == 4096
    syscalls.close(file.fd)
    path.unlink()
    with pytest.raises(ForebayError, match="no such image"):
        open_image(FileAddress(address.store, address.root, address.path + "x"), read_only=True)


@pytest.mark.parametrize("moved", [True, False])
def test_an_image_that_was_moved_at_the_server_is_noticed_at_the_next_look(
    address: FileAddress, path: Path, make_client: Callable[[], Client], moved: bool
) -> None:
    path.write_bytes(bytes(4096))
    before = path.stat().st_ino
    make_client()
    os.rename(path, path.with_name("moved"))
    if moved:
        with pytest.raises(FileNotFoundError):
            look(address, SystemCalls())
    else:
        path.write_bytes(bytes(8192))
        assert look(address, SystemCalls()).inode != before
