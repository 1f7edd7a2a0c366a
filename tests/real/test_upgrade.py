# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Caches of an older version, as its daemon left them, opened with today's code (old_cache.py, tests/data/README.md).

Nothing that it held is lost: not what was dirty, and not the warmth. Until the first commit of a start the index is as
it was; from then on it is of today's format.
"""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forebay_cache.index.index
from forebay_cache import Cache, CacheError, View, check, open_cache, repair
from forebay_cache.cache import boot_id
from forebay_cache.format.records import FORMAT, NAMES_ARE_TEXT, LayerName
from forebay_cache.index.changes import Changes
from forebay_cache.index.index import Index
from real.gateway_process import GatewayProcess
from real.old_cache import (
    BLOCK,
    DISKS,
    IMAGES,
    SECTOR,
    SETTINGS,
    SIZE,
    WARM,
    disk_content,
    image_content,
    index_tables,
    unpack,
)

OLD_BOOT = "the kernel of then"
KINDS = ("stopped", "killed")
KEYS = {disk.name: f"images:{disk.image}" for disk in DISKS}


def device(root: Path) -> Path:
    return root / "state" / "cache.img"


def index(root: Path) -> Path:
    return root / "state" / "index"


def index_format(root: Path) -> int:
    state = json.loads(index_tables(index(root))["meta"][b"state"])
    assert isinstance(state["format"], int)
    return state["format"]


def nothing(_done: int, _total: int) -> None:
    pass


@pytest.fixture(params=KINDS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Which one it is, and where."""
    unpack(request.param, tmp_path, OLD_BOOT)
    return request.param, tmp_path


# -- the cache alone --------------------------------------------------------------------------------------------------


async def read(cache: Cache, disk: str, missed: list[tuple[int, int]]) -> bytes:
    """All of a disk; what the cache does not have is taken from its image, and noted in `missed`."""
    key = KEYS[disk]
    clean = cache.layers.clean_of(key)
    assert clean is not None
    image = image_content(key.removeprefix("images:"), "killed" if is_frozen(cache) else "stopped")

    async def fetch(offset: int, length: int) -> bytes:
        missed.append((offset, length))
        return image[offset : offset + length]

    view = View(cache, cache.layers.private_of(disk)[::-1], clean, fetch)
    return b"".join([bytes(part) for part in await view.read(0, SIZE)])


def is_frozen(cache: Cache) -> bool:
    """Whether a pass had begun, and got no further."""
    return len(cache.layers.private_of("d")) > 1


@pytest.mark.parametrize("boot", [OLD_BOOT, "another"])
async def test_what_an_old_cache_holds_is_all_there(old: tuple[str, Path], boot: str) -> None:
    kind, root = old
    for start in ("the first", "the second"):
        cache = open_cache(device(root), index(root), boot=boot)
        try:
            for disk in DISKS:
                missed: list[tuple[int, int]] = []
                assert await read(cache, disk.name, missed) == disk_content(disk.name), disk.name
                cold = [(offset, length) for offset, length in missed if offset < WARM]
                if (kind, disk.name) != ("killed", "t"):
                    assert not cold, disk.name
                elif boot == OLD_BOOT:  # what was to be written to the image was dropped first
                    assert cold == [(2 * BLOCK, 4 * SECTOR)]
                else:  # nobody knows what of it arrived there
                    assert cold == [(0, SIZE)]
            generations = [layer.name.generation for layer in cache.layers.private_of("d")]
            assert generations == ([1, 2] if kind == "killed" else [2])
            assert {layer.name.image for layer in cache.layers.private_of("d")} == {KEYS["d"]}
            [overlay] = cache.layers.private_of("overlay")
            assert overlay.name == LayerName.of_disk("overlay", 1, KEYS["overlay"])
        finally:
            await cache.close()
        assert index_format(root) == FORMAT, start


def test_looking_at_an_old_cache_changes_nothing(old: tuple[str, Path]) -> None:
    kind, root = old
    before = (device(root).read_bytes(), index_tables(index(root)))
    report = check(device(root), index(root), nothing, OLD_BOOT)
    assert not report.faults
    assert not report.hopeless
    counts = (report.layers, report.clean_slots, report.private_slots, report.journal_records)
    assert counts == {"stopped": (5, 24, 6, 0), "killed": (6, 24, 8, 10)}[kind]
    assert repair(device(root), index(root), nothing, boot=OLD_BOOT).after is not None
    Index(index(root), report.slots).close()
    assert (device(root).read_bytes(), index_tables(index(root))) == before
    assert index_format(root) == NAMES_ARE_TEXT


@pytest.mark.parametrize("version", ["old", "new"])
def test_damage_is_told_with_disk_and_image_alike(version: str, tmp_path: Path) -> None:
    unpack("stopped", tmp_path, OLD_BOOT)
    if version == "new":
        open_cache(device(tmp_path), index(tmp_path), boot=OLD_BOOT).release()
        assert index_format(tmp_path) == FORMAT
    with device(tmp_path).open("r+b") as file:
        file.seek((1 << 20) + (256 << 10))
        file.write(b"?" * (SIZE // 4))
    report = check(device(tmp_path), index(tmp_path), nothing, OLD_BOOT)
    texts = {fault.text.partition(" of ")[2] for fault in report.faults}
    assert texts == {f"block {n} of 'image:images:own.raw'" for n in range(4)}
    json.dumps(report.json())
    assert all(told["layer"]["image"] == KEYS["d"] for told in report.json()["faults"])
    done = repair(device(tmp_path), index(tmp_path), nothing, boot=OLD_BOOT)
    assert not done.after.damaged
    assert done.dropped_clean == 4
    assert index_format(tmp_path) == FORMAT


def test_an_index_is_of_one_format_as_a_whole(
    old: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit of the start that makes it one of today fails at its end: it is the old one, and all of it."""
    _, root = old
    before = index_tables(index(root))

    def fail(_: object) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(forebay_cache.index.index, "asdict", fail)  # of the state, which goes in last
        with pytest.raises(OSError, match="injected"):
            open_cache(device(root), index(root), boot=OLD_BOOT)
    assert index_tables(index(root)) == before
    open_cache(device(root), index(root), boot=OLD_BOOT).release()
    tables = index_tables(index(root))
    assert all(b'"kind"' in record for record in tables["layers"].values())
    assert index_format(root) == FORMAT


def test_a_commit_that_names_no_layer_and_no_state_makes_all_of_it_new(
    old: tuple[str, Path],
) -> None:
    """As one does while the device has failed. Then again, as if the commit had gone well and said that it did not."""
    _, root = old
    opened = Index(index(root), 44)
    layers = opened.layers()
    for _ in range(2):
        opened.commit_now(Changes(None, records={("disk", "x"): {}}))
        assert opened.layers() == layers
        opened._is_current = False
    opened.close()
    assert index_format(root) == FORMAT
    reopened = Index(index(root), 44)
    assert reopened.layers() == layers
    reopened.close()


def test_an_index_of_the_format_before_is_taken_over(old: tuple[str, Path]) -> None:
    """Format 3 differs in what its pages do not say yet."""
    _, root = old
    open_cache(device(root), index(root), boot=OLD_BOOT).release()
    opened = Index(index(root), 44)
    layers = opened.layers()
    opened.meta.format = FORMAT - 1
    opened.commit_now(Changes(opened.meta))
    opened.close()
    assert index_format(root) == FORMAT - 1
    assert not check(device(root), index(root), nothing, OLD_BOOT).hopeless
    assert index_format(root) == FORMAT - 1, "a check changes nothing"
    reopened = Index(index(root), 44)
    assert reopened.layers() == layers
    reopened.commit_now(Changes(None))
    reopened.close()
    assert index_format(root) == FORMAT


def test_an_index_of_a_later_format_is_refused(old: tuple[str, Path]) -> None:
    _, root = old
    opened = Index(index(root), 44)
    opened.meta.format = FORMAT + 1
    opened.commit_now(Changes(opened.meta))
    opened.close()
    with pytest.raises(CacheError, match=f"index format {FORMAT + 1}, this version knows only"):
        open_cache(device(root), index(root))


# -- the daemon -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_daemon_goes_on_with_an_old_cache(
    kind: str, make_gateway: Callable[..., GatewayProcess], connect: Callable[..., Any]
) -> None:
    """Disks are there, warm; what is dirty is read, and comes home."""
    settings = SETTINGS | {"defaults": {"max_lag": "3650d", "mode": "write-back"}}  # they are old
    gateway = make_gateway(settings, start=False)
    unpack(kind, gateway.directory, boot_id())
    assert index_format(gateway.directory) == NAMES_ARE_TEXT
    gateway.start()
    for disk in DISKS:
        guest = connect(gateway.uri(disk.name))
        content = disk_content(disk.name)
        assert guest.pread(WARM, 0) == content[:WARM]
        fetched = BLOCK if (kind, disk.name) == ("killed", "t") else 0
        assert gateway.status(disk.name)["origin_read_bytes"] == fetched, disk.name
        assert guest.pread(SIZE - WARM, WARM) == content[WARM:]
        guest.shutdown()
    assert gateway.status("d")["dirty_bytes"] >= 38 * SECTOR
    gateway.cli("flush", "d")
    assert (gateway.images / "own.raw").read_bytes() == disk_content("d")
    gateway.restart()
    assert gateway.status("d")["dirty_bytes"] == 0
    guest = connect(gateway.uri("overlay"))
    assert guest.pread(SIZE, 0) == disk_content("overlay")
    guest.shutdown()
    gateway.cli("detach", "d")
    gateway.stop()
    assert index_format(gateway.directory) == FORMAT
    for image in IMAGES:
        wanted = disk_content("d") if image == "own.raw" else image_content(image, kind)
        assert (gateway.images / image).read_bytes() == wanted
    report = json.loads(gateway.cli("cache", "check", "--json").stdout)
    assert not report["damaged"]
