# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""libtorrent as staging uses it: what it is told in numbers that it takes, and of images that it cannot tell apart."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from forebay.errors import ForebayError
from forebay.staging.torrent import LEAF, encoded
from forebay.units import LARGEST_SIZE
from unit.test_torrent import torrent_of

if TYPE_CHECKING:
    from forebay.swarm.engine import Engine

CONTENT = b"a" * LEAF
TORRENT = encoded(torrent_of(CONTENT))


@pytest.fixture
def engine() -> "Iterator[Engine]":
    pytest.importorskip("libtorrent", reason="make setup installs it where it can be had")
    from forebay.swarm.engine import Engine

    engine = Engine("127.0.0.1", 0)
    yield engine
    engine.close()


def image_in(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(CONTENT)
    return path


def test_any_rate_is_one_that_libtorrent_takes(engine: "Engine", tmp_path: Path) -> None:
    engine.add("images:a.raw", TORRENT, image_in(tmp_path, "a.raw"), [], LARGEST_SIZE)
    engine.limit("images:a.raw", LARGEST_SIZE)
    engine.limit("images:a.raw", None)


def test_what_libtorrent_does_not_take_leaves_no_open_file(
    engine: "Engine", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses:
        def add_torrent(self, _wanted: object) -> None:
            raise RuntimeError("planted")

    path = image_in(tmp_path, "a.raw")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_session", Refuses())
        for _ in range(3):
            with pytest.raises(ForebayError, match=r"^images:a.raw cannot be staged: planted$"):
                engine.add("images:a.raw", TORRENT, path, [], None)
    opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors()]
    assert str(path) not in opened
    engine.add("images:a.raw", TORRENT, path, [], None)
    assert engine.images() == ["images:a.raw"]


def _descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def test_images_of_the_same_content_are_staged_one_after_the_other(
    engine: "Engine", tmp_path: Path
) -> None:
    first, second = (image_in(tmp_path, name) for name in ("a.raw", "b.raw"))
    engine.add("images:a.raw", TORRENT, first, [], None)
    with pytest.raises(ForebayError, match=r"^images:b.raw has the same content as images:a.raw"):
        engine.add("images:b.raw", TORRENT, second, [], None)
    assert engine.images() == ["images:a.raw"]
    assert engine.figures("images:a.raw").received == 0
    engine.remove("images:a.raw")
    engine.add("images:b.raw", TORRENT, second, [], None)
    assert engine.figures("images:b.raw").received == 0


def test_the_kernel_keeps_no_more_of_an_image_than_it_may(
    engine: "Engine", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forebay.swarm.engine import KEPT_BYTES, Figures

    dropped: list[int] = []

    def advised(fd: int, _start: int, _length: int, advice: int) -> None:
        assert os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "a.raw")
        dropped.append(advice)

    monkeypatch.setattr(os, "posix_fadvise", advised)
    engine.add("images:a.raw", TORRENT, image_in(tmp_path, "a.raw"), [], None)
    half = KEPT_BYTES // 2
    for received, sent, times in ((half, half, 0), (half, half + 1, 1), (2 * half, 2 * half, 1)):
        engine.bound_memory("images:a.raw", Figures(0, 0, 1, False, received, sent))
        assert dropped == [os.POSIX_FADV_DONTNEED] * times
    engine.remove("images:a.raw")
    assert len(dropped) == 2, "and nothing when it is not staged any more"
