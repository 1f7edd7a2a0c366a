# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What lies beside an image while another host asks for it: read as text that anybody may have written."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from forebay.errors import InUseError
from forebay.handover.giving import Beats
from forebay.handover.looks import Looks
from forebay.origin.addresses import FileAddress
from forebay.origin.file import FreshFile
from forebay.origin.threads import StoreThreads
from forebay.origin.worker import syscalls
from forebay.sidecar.files import Sidecar, read_owner
from forebay.sidecar.incoming import STALE_SECONDS, Asking, Incoming, who_asks
from forebay.sidecar.record import Owner

GOOD: dict[str, Any] = {
    "gateway": "g2",
    "host": "ham2",
    "disk": "vm1",
    "beat": 7,
    "wants": False,
    "format": 1,
}


@pytest.fixture
def image(tmp_path: Path) -> FileAddress:
    (tmp_path / "vm.img").write_bytes(bytes(range(256)) * 32 + b"tail")
    (tmp_path / "vm.img.forebay").mkdir()
    return FileAddress("images", tmp_path, "vm.img")


def asking(image: FileAddress, gateway: str) -> Asking:
    return Asking(image, gateway=gateway, disk="d", threads=StoreThreads("images"), timeout=5.0)


@pytest.mark.parametrize(
    "change",
    [
        {"gateway": ""},
        {"gateway": "g" * 65},
        {"gateway": 1},
        {"host": "h" * 256},
        {"host": "a\nb"},
        {"disk": None},
        {"beat": -1},
        {"beat": 1 << 63},
        {"beat": True},
        {"beat": 1.5},
        {"wants": 1},
        {"format": 2},
    ],
)
def test_a_field_that_cannot_be_has_nobody_ask(change: dict[str, Any], image: FileAddress) -> None:
    path = image.root / "vm.img.forebay" / "incoming"
    path.write_text(json.dumps(GOOD))
    assert who_asks(image) == Incoming(**GOOD)
    path.write_text(json.dumps(GOOD | change))
    assert who_asks(image) is None


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"{" * 5000, b"9" * 5000])
def test_what_is_no_object_has_nobody_ask(text: bytes, image: FileAddress) -> None:
    (image.root / "vm.img.forebay" / "incoming").write_bytes(text)
    assert who_asks(image) is None


def test_a_link_a_pipe_and_a_second_name_have_nobody_ask(image: FileAddress) -> None:
    path, elsewhere = image.root / "vm.img.forebay" / "incoming", image.root / "elsewhere"
    elsewhere.write_text(json.dumps(GOOD))
    path.symlink_to(elsewhere)
    assert who_asks(image) is None
    path.unlink()
    os.mkfifo(path)
    assert who_asks(image) is None
    path.unlink()
    os.link(elsewhere, path)
    assert who_asks(image) is None


async def test_who_asks_first_is_not_disturbed_and_gives_way_once_it_is_gone(
    image: FileAddress,
) -> None:
    first, second = asking(image, "g1"), asking(image, "g2")
    await first.beat()
    with pytest.raises(InUseError, match="asks for it already"):
        await second.beat()
    found = who_asks(image)
    assert found is not None
    assert found.gateway == "g1"
    path = image.root / "vm.img.forebay" / "incoming"
    long_ago = time.time() - STALE_SECONDS - 1
    os.utime(path, (long_ago, long_ago))
    await second.beat(wants=True)
    found = who_asks(image)
    assert found is not None
    assert (found.gateway, found.wants) == ("g2", True)
    await first.withdraw()  # what is another's stays
    assert who_asks(image) == found
    await second.withdraw()
    assert not (image.root / "vm.img.forebay").exists()


async def test_an_image_that_nobody_has_is_not_asked_for(image: FileAddress) -> None:
    assert await asking(image, "g2").ask(0.0) is None
    assert who_asks(image) is None


async def test_an_owner_that_does_not_prepare_is_named_and_no_longer_asked(
    image: FileAddress,
) -> None:
    with Sidecar(image) as sidecar:
        sidecar.make()
        sidecar.begin(Owner.of_this_process("g1", "vm1"), None)
    with pytest.raises(InUseError, match="disk 'vm1'.*has not prepared to hand it over for 0.1 s"):
        await asking(image, "g2").ask(0.1)
    assert who_asks(image) is None


def test_only_who_is_named_and_only_a_clean_image_is_given() -> None:
    owner = Owner.of_this_process("g1", "vm1")
    given = Owner.parse(
        json.dumps(vars(owner) | {"phase": "prepared", "to": "g2", "token": 1}).encode()
    )
    assert [given.is_for(x) for x in ("g2", "g3", "")] == [True, False, False]
    assert not owner.is_for("")
    dirty = Owner.parse(json.dumps(vars(given) | {"state": "dirty"}).encode())
    assert not dirty.is_for("g2")
    with pytest.raises(ValueError, match="'phase' is none"):
        Owner.parse(json.dumps(vars(given) | {"phase": "taken"}).encode())
    with pytest.raises(ValueError, match="'to' is not text"):
        Owner.parse(json.dumps(vars(given) | {"to": "g" * 65}).encode())


async def test_a_file_is_read_as_it_is_now(image: FileAddress) -> None:
    fresh = FreshFile(image, StoreThreads("images"), 5.0)
    assert bytes(await fresh.read(10, 20)) == bytes(range(10, 30))
    (image.root / "vm.img").write_bytes(b"x" * 9000)
    assert bytes(await fresh.read(8990, 20)) == b"x" * 10 + bytes(10)
    assert bytes(await fresh.read(0, 9000)) == b"x" * 9000


def test_what_does_not_grow_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("forebay.handover.giving.trio.current_time", lambda: now[0])
    beats, found = Beats(), Incoming(**GOOD)
    assert not beats.is_live(found), "it may be years old"
    now[0] += 5
    assert not beats.is_live(found)
    later = Incoming(**GOOD | {"beat": 8})
    assert beats.is_live(later)
    now[0] += STALE_SECONDS - 1
    assert (beats.is_live(later), beats.is_stale()) == (True, False)
    now[0] += 2
    assert (beats.is_live(later), beats.is_stale()) == (False, True)
    assert beats.is_live(Incoming(**GOOD | {"beat": 9}))
    assert not beats.is_live(Incoming(**GOOD | {"gateway": "g3", "beat": 10}))
    assert not beats.is_live(None)


def test_a_move_that_waits_asks_quickly_at_first_and_less_often_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("forebay.handover.looks.trio.current_time", lambda: now[0])
    looks = Looks()
    found = []
    for _ in range(1000):
        now[0] += 0.01
        found.append(looks.may())
    assert all(found[:20]), "a VM may be waiting"
    assert 20 + 180 <= sum(found) <= 20 + 210
    now[0] += 2
    assert [looks.may() for _ in range(25)] == [True] * 20 + [False] * 5


@pytest.mark.parametrize("what", ["owner", "incoming"])
async def test_what_another_host_replaces_while_it_is_read_is_read_anew(
    image: FileAddress, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """NFS says ESTALE then, of a file that was opened a moment ago."""
    with Sidecar(image) as sidecar:
        sidecar.make()
        sidecar.begin(Owner.of_this_process("g1", "vm1"), None)
    await asking(image, "g2").beat()
    stale = [errno.ESTALE] * 3

    def planted(name: str) -> None:
        plain = getattr(syscalls, name)

        def read(*arguments: int) -> bytes:
            if stale:
                raise OSError(stale.pop(), "Stale file handle")
            return bytes(plain(*arguments))

        monkeypatch.setattr(syscalls, name, read)

    planted("read")
    planted("pread")
    if what == "owner":
        owner = read_owner(image)
        assert owner is not None
        assert owner.gateway == "g1"
    else:
        asked = who_asks(image)
        assert asked is not None
        assert asked.gateway == "g2"
    assert not stale
    stale += [errno.ESTALE] * 1000
    with pytest.raises(OSError, match="Stale file handle"):
        read_owner(image) if what == "owner" else who_asks(image)
