# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Who may read what through the mount: no more than who could reach it without."""

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay.doors.fuse.daemon import Served
from forebay.doors.fuse.places import Found, ImagesPlace, Shown, passable

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give directories away")

DAEMON, MAIL, OTHER = 1, 8, 4242
OURS = -1
"""Stands for the number of the process that runs the test."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may pass: those above `tmp_path` are pytest's, and other runs of it close them."""
    with tempfile.TemporaryDirectory() as name:
        found = Path(name).resolve()
        for one in (found, *found.parents):
            if not one.stat().st_mode & stat.S_IXOTH:
                one.chmod(0o755)
        yield found


@needs_root
@pytest.mark.parametrize(
    ("owner", "group", "mode", "left"),
    [
        (0, 0, 0o755, 0o555),
        (0, 0, 0o711, 0o555),
        (0, 0, 0o700, 0o000),
        (OTHER, 0, 0o700, 0o500),  # of the store's owner alone
        (0, MAIL, 0o750, 0o050),  # of the store's group
        (0, DAEMON, 0o750, 0o000),
        (OTHER, MAIL, 0o750, 0o550),
        (OTHER, MAIL, 0o705, 0o500),  # the group is kept out, and others may be of it
        (0, MAIL, 0o701, 0o500),
        (OTHER, MAIL, 0o071, 0o050),  # the owner is kept out
        (0, MAIL, 0o755, 0o555),
    ],
)
def test_directories_above_keep_out_whom_they_did(
    place: Path, owner: int, group: int, mode: int, left: int
) -> None:
    above = place / "above"
    store = above / "store"
    store.mkdir(parents=True)
    os.chown(above, owner, group)
    above.chmod(mode)
    assert passable(store, OTHER, MAIL, 0o555) == left


@needs_root
def test_a_link_on_the_way_counts_where_it_lies_and_where_it_leads(place: Path) -> None:
    (place / "real" / "store").mkdir(parents=True)
    (place / "links").mkdir()
    link = place / "links" / "store"
    link.symlink_to(place / "real" / "store")
    assert passable(link, OTHER, MAIL, 0o555) == 0o555
    for closed in ("real", "links"):
        (place / closed).chmod(0o700)
        assert passable(link, OTHER, MAIL, 0o555) == 0
        (place / closed).chmod(0o755)


@pytest.mark.parametrize(
    ("shown", "folder", "found", "mode"),
    [
        (Shown(), False, 0o444, 0o440),
        (Shown(), True, 0o555, 0o550),
        (Shown(0o444), False, 0o444, 0o444),
        (Shown(0o444), True, 0o555, 0o555),
        (Shown(0o444), False, 0o400, 0o400),
        (Shown(0o777), False, 0o644, 0o444),
        (Shown(0o440, gid=7), False, 0o400, 0o440),
        (Shown(0o440, uid=7), True, 0o000, 0o550),
    ],
)
def test_what_the_configuration_shows(shown: Shown, folder: bool, found: int, mode: int) -> None:
    told = shown.of(Found(folder, found, 1, 2))
    assert told.mode == mode
    if shown.uid is None and shown.gid is None:
        assert (told.uid, told.gid) == (1, 2)
    else:
        assert (told.uid, told.gid) == (shown.uid or 0, shown.gid or 0)


UNNAMEABLE = ["two\nlines.raw", "tab\t.raw", "no-text-\udcff.raw", "a.raw?format=qcow2"]


async def test_what_has_a_name_that_no_image_can_have_is_not_there(tmp_path: Path) -> None:
    """Whoever opens each file that is listed, as libvirt does for a pool, would fail at it."""
    for name in (*UNNAMEABLE, "odd é.raw", "a?format=x.raw"):
        (tmp_path / name).write_bytes(bytes(1))
    place = ImagesPlace({"images": tmp_path}, 0)
    assert sorted(await place.names(("images",))) == ["a?format=x.raw", "odd é.raw"]
    for name in UNNAMEABLE:
        with pytest.raises(FileNotFoundError):
            await place.look(("images", name))
    assert (await place.look(("images", "odd é.raw"))).size == 1


async def test_a_sparse_image_takes_the_room_that_it_takes_in_its_store(tmp_path: Path) -> None:
    with (tmp_path / "sparse.raw").open("wb") as file:
        file.truncate(1 << 30)
    place = ImagesPlace({"images": tmp_path}, 0)
    assert (await place.look(("images", "sparse.raw"))).blocks == 1


@pytest.mark.parametrize(
    ("size", "allocated", "blocks"),
    [(0, 0, 0), (1, 0, 1), (513, None, 2), (1 << 20, 1 << 10, 2), (1 << 10, 1 << 20, 2)],
)
def test_no_file_with_a_size_takes_no_room(size: int, allocated: int | None, blocks: int) -> None:
    """`tar` reads no file of no blocks, and the cache may have what the store lacks."""
    assert Found(False, 0, size=size, allocated=allocated).blocks == blocks


@pytest.mark.parametrize(
    ("peer", "user", "process", "uid", "pid", "may"),
    [
        ("any", None, 99999999, OTHER, 5, True),
        ("first", None, None, OTHER, 5, True),
        ("first", None, 5, OTHER, 5, True),
        ("first", None, 6, OTHER, 99999999, False),
        ("first", None, OURS, OTHER, OURS, True),
        ("first", 7, None, OTHER, 5, False),
        ("first", OTHER, None, OTHER, 5, True),
        ("label", None, None, OTHER, 5, False),
        ("label", None, 6, 0, 5, True),
        ("first", 7, 6, 0, 5, True),
    ],
)
def test_a_disk_of_another_is_not_opened(
    peer: str, user: int | None, process: int | None, uid: int, pid: int, may: bool
) -> None:
    holder = os.getpid() if process == OURS else process
    disk = Served("d", 1, False, False, "images:a", "/s", 1, peer, user, holder)
    assert disk.is_for(uid, os.getpid() if pid == OURS else pid) is may
