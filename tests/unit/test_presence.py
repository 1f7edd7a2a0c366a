# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A file of the cache that is removed, cut or replaced is noticed at once, and nothing blank comes into its place."""

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import trio

import forebay_cache.upkeep.presence
from forebay_cache import CacheError, open_cache, revive, watch_files
from forebay_cache.errors import IndexFault
from forebay_cache.index.changes import Changes
from forebay_cache.index.index import Index, create
from forebay_cache.index.place import Place

SIZE = 4 << 20


def _remove(device: Path, index: Path) -> None:
    device.rename(device.with_name("kept"))


def _remove_for_good(device: Path, index: Path) -> None:
    device.with_name("kept").hardlink_to(device)
    device.unlink()


def _replace(device: Path, index: Path) -> None:
    device.rename(device.with_name("kept"))
    device.write_bytes(bytes(SIZE))


def _cut(device: Path, index: Path) -> None:
    device.with_name("kept").write_bytes(device.read_bytes())
    os.truncate(device, SIZE // 2)


def _empty(device: Path, index: Path) -> None:
    kept = device.with_name("kept")
    kept.write_bytes(device.read_bytes())
    os.truncate(device, 0)
    os.truncate(device, SIZE)


def _remove_index(device: Path, index: Path) -> None:
    (index / "data.mdb").rename(index / "kept")


@pytest.mark.expect_log("failed: .*written back now")
@pytest.mark.parametrize("do", [_remove, _remove_for_good, _replace, _cut, _empty, _remove_index])
def test_what_happens_to_a_file_is_noticed(
    tmp_path: Path, do: Callable[[Path, Path], None]
) -> None:
    device, index = tmp_path / "cache.img", tmp_path / "index"

    async def story() -> None:
        cache = open_cache(device, index, size=SIZE, boot="a")
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            nursery.start_soon(watch_files, cache)
            await cache.commit()
            await trio.sleep(0.2)
            assert cache.failed is None
            do(device, index)
            with trio.fail_after(10):
                await cache.failure.broke.wait()
            with pytest.raises((OSError, CacheError)):
                await revive(cache)
            if (index / "kept").exists():
                (index / "kept").rename(index / "data.mdb")
            else:
                (tmp_path / "kept").replace(device)
            await revive(cache)
            assert cache.failed is None
            await trio.sleep(0.2)
            assert cache.failed is None
            nursery.cancel_scope.cancel()
        cache.release()

    with mock.patch.object(forebay_cache.upkeep.presence, "LOOK_SECONDS", 0.02):
        trio.run(story)


def test_a_device_that_an_index_describes_is_not_made_anew(tmp_path: Path) -> None:
    device, index = tmp_path / "cache.img", tmp_path / "index"

    async def story() -> None:
        await open_cache(device, index, size=SIZE, boot="a").close()

    trio.run(story)
    device.unlink()
    with pytest.raises(CacheError, match="is gone"):
        open_cache(device, index, size=SIZE, boot="a")
    assert not device.exists()


@pytest.mark.parametrize(("name", "is_lost"), [("data.mdb", True), ("lock.mdb", False)])
def test_an_index_that_was_cut_is_not_touched_any_more_and_found_by_no_start(
    tmp_path: Path, name: str, is_lost: bool
) -> None:
    for file in ("data.mdb", "lock.mdb"):
        (tmp_path / file).write_bytes(bytes(8192))
    place = Place(tmp_path)
    assert place.is_kept()
    (tmp_path / name).write_bytes(bytes(16384))
    place.check()
    fd = os.open(tmp_path / name, os.O_RDWR)
    for length in (8192, 16384):  # cut, and made as long as it was
        os.ftruncate(fd, length)
        with pytest.raises(IndexFault, match=f"{name} has 8192 bytes, and had 16384: it was cut"):
            place.check()
        assert (place.is_kept(), place.is_lost) == (False, is_lost)
    os.close(fd)
    assert (tmp_path / name).exists() != is_lost
    place.close()


def test_an_index_that_grows_while_two_threads_look_was_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("data.mdb", "lock.mdb"):
        (tmp_path / file).write_bytes(bytes(8192))
    place = Place(tmp_path)
    look, data = os.fstat, place._files[0]

    def slow_look(fd: int) -> os.stat_result:
        """What it was; before that is compared the file has grown, and another thread has seen that."""
        found = look(fd)
        if fd == data and found.st_size == 8192:
            with (tmp_path / "data.mdb").open("ab") as file:
                file.write(bytes(8192))
            place.check()
        return found

    monkeypatch.setattr(os, "fstat", slow_look)
    place.check()
    assert place.is_kept()
    assert not place.is_lost
    os.truncate(tmp_path / "data.mdb", 12288)
    assert not place.is_whole(), "what was seen last counts"
    place.close()


@pytest.mark.parametrize("left", [0.3, 0.9, 0.999])
def test_an_index_that_was_cut_while_nobody_had_it_is_one_line(tmp_path: Path, left: float) -> None:
    path = tmp_path / "index"
    create(path)
    index = Index(path, 100)
    records = {("disk", f"d{n}"): {"text": "x" * 400} for n in range(200)}
    index.commit_now(Changes(None, records=dict(records)))
    index.close()
    size = (path / "data.mdb").stat().st_size
    os.truncate(path / "data.mdb", int(size * left) & ~4095)
    with pytest.raises(CacheError, match="cannot open the index: .*: it was cut"):
        Index(path, 100)


def test_a_pipe_in_the_place_of_the_index_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.mdb")
    with pytest.raises(CacheError, match="not a file"):
        Index(tmp_path, 100)
