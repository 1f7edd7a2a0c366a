# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Images without disks: what is on record of them, what is purged and in which order, what is pinned and how much."""

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from forebay.boot.boots import Boots
from forebay.boot.files import TraceFiles
from forebay.catalogue import entries as entries_module
from forebay.catalogue.catalogue import Catalogue
from forebay.catalogue.entries import KIND, MOST_TAGS, NOTED_AGAIN, Entry
from forebay.catalogue.purge import LOOK_SECONDS, START_SECONDS, Purge, Selection
from forebay.catalogue.warm import Rate, Warming
from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.image.registry import Images
from forebay.image.source import Source
from forebay_cache import Cache, open_cache
from forebay_cache.format.geometry import BLOCK, SECTORS
from forebay_cache.format.records import LayerName

Clock = trio.testing.MockClock
DAY = 86400.0
CACHE_SIZE = 16 << 20


class Place:
    """A cache with images, and the catalogue of them; `disks` are those on record, with the keys of their images."""

    def __init__(self, directory: Path, clock: "Wall") -> None:
        self.directory = directory
        self.clock = clock
        stores = {
            "s": {"path": str(directory / "s"), "purge_after": "2d"},
            "t": {"path": str(directory / "t"), "purge_after": "2d"},
            "kept": {"path": str(directory / "kept")},
        }
        self.config = Config.model_validate({"stores": stores, "origins": {"nbd": ["*"]}})
        self.disks: dict[str, str] = {}
        self.open()

    def open(self) -> None:
        size = None if (self.directory / "c.img").exists() else CACHE_SIZE
        self.cache: Cache = open_cache(
            self.directory / "c.img", self.directory / "index", size=size
        )
        self.images = Images(self.cache, cast("Any", None))
        nobody = cast("Any", None)
        self.catalogue = Catalogue(
            self.config,
            self.cache,
            self.images,
            self.directory / "index",
            nobody,
            nobody,
            lambda: self.disks,
            Boots(TraceFiles(self.directory, "here"), nobody, nobody),
        )

    @property
    def purge(self) -> Purge:
        return self.catalogue._purge

    def make(self, key: str, *, used: float = 0.0, slots: int = 1, **marks: Any) -> str:
        """An image of which the cache has some blocks, and which was used so many seconds ago."""
        layer = self.cache.layers.make(LayerName.of_image(key))
        layer.slots, layer.sectors = slots, slots * SECTORS
        entry = Entry(size=slots * BLOCK, used=int(self.clock.now - used), **marks)
        self.catalogue.entries.put(key, entry)
        return key

    def kept(self) -> list[str]:
        return sorted(x.name.image for x in self.cache.layers if not x.is_dead and not x.private)

    async def told(self) -> dict[str, dict[str, Any]]:
        return {one["image"]: one async for one in self.catalogue.images(None)}


async def comes(is_so: Callable[[], bool]) -> None:
    """Wait until it is so: what a thread does takes no time on the mock clock, and may take some on another."""
    for _ in range(500):
        if is_so():
            return
        await trio.to_thread.run_sync(time.sleep, 0.02)
    assert is_so()


class Wall:
    """The clock on the wall: stands, unless it is moved."""

    def __init__(self) -> None:
        self.now = 1_000_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    clock = Wall()
    monkeypatch.setattr("time.time", clock.time)
    return clock


@pytest.fixture
def place(tmp_path: Path, wall: Wall) -> Iterator[Place]:
    made = Place(tmp_path, wall)
    yield made
    made.cache.release()


@pytest.fixture
async def running(place: Place, nursery: trio.Nursery) -> Place:
    """The same with a cache whose commits are made."""
    nursery.start_soon(place.cache.run)
    await trio.testing.wait_all_tasks_blocked()
    return place


# ------------------------------------------------------------------------------------------------------------ on record


async def test_tags_are_kept_sorted_and_bounded(running: Place) -> None:
    key = running.make("s:a.raw")
    told = await running.catalogue.tag(key, ["b", "a", "b"])
    assert told["tags"] == ["a", "b"]
    many = [f"t{n}" for n in range(MOST_TAGS - 1)]
    with pytest.raises(ForebayError, match=f"at most {MOST_TAGS} tags"):
        await running.catalogue.tag(key, many)
    assert (await running.catalogue.untag(key, ["a", "never"]))["tags"] == ["b"]


async def test_no_more_images_than_there_may_be_have_tags_or_a_pin(
    running: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries_module, "MOST_MARKED", 2)
    a, b, c = (running.make(f"s:{n}.raw") for n in "abc")
    await running.catalogue.tag(a, ["x"])
    await running.catalogue.pin(b)
    with pytest.raises(ForebayError, match="2 images have tags or are pinned: take these from"):
        await running.catalogue.tag(c, ["x"])
    assert running.catalogue.entries.get(c) == Entry(size=BLOCK, used=int(running.clock.now))
    await running.catalogue.pin(a)  # one of them already
    await running.catalogue.untag(a, ["x"])
    await running.catalogue.unpin(a)
    await running.catalogue.tag(c, ["x"])


async def test_nothing_is_said_about_an_image_that_nobody_has_used(running: Place) -> None:
    for ask in (running.catalogue.pin, running.catalogue.unpin):
        with pytest.raises(ForebayError, match="nothing is known of s:a.raw: bring it in"):
            await ask("s:./a.raw")
    with pytest.raises(ForebayError, match="leads out of its store"):
        await running.catalogue.pin("s:../a.raw")


async def test_an_image_of_a_store_that_is_gone_from_the_configuration_can_be_let_go(
    running: Place,
) -> None:
    key = running.make("old:a.raw", pinned=True)
    await running.catalogue.unpin(key)
    await running.catalogue.purge([key], tag=None, older_than=None, dry_run=False)
    assert running.kept() == []


async def test_a_hundred_uses_within_a_minute_are_noted_once(place: Place) -> None:
    entries = place.catalogue.entries
    entries.note_used("s:a.raw", 4096, 512)
    first = place.cache.records.get(KIND, "s:a.raw")
    place.clock.now += NOTED_AGAIN - 1
    entries.note_used("s:a.raw")
    assert place.cache.records.get(KIND, "s:a.raw") is first
    place.clock.now += 1
    entries.note_used("s:a.raw")
    assert entries.get("s:a.raw") == Entry(size=4096, allocated=512, used=int(place.clock.now))
    place.clock.now -= DAY  # the clock was put right
    entries.note_used("s:a.raw")
    assert cast("Entry", entries.get("s:a.raw")).used == int(place.clock.now)


async def test_what_a_commit_cannot_store_is_as_it_was(
    running: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = running.make("s:a.raw")

    async def full() -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(running.cache.commit, "records", full)
    for change in (running.catalogue.pin(key), running.catalogue.tag(key, ["x"])):
        with pytest.raises(ForebayError, match="cannot be written"):
            await change
    told = (await running.told())[key]
    assert (told["pinned"], told["tags"]) == (False, [])
    layer = running.cache.layers.clean_of(key)
    assert layer is not None
    assert not layer.pinned


# ---------------------------------------------------------------------------------------------------------------- purge


async def test_those_go_first_that_were_used_longest_ago(running: Place) -> None:
    order = [
        running.make("s:old.raw", used=9 * DAY),
        running.make("s:a.raw", used=5 * DAY),
        running.make("s:b.raw", used=5 * DAY),
    ]
    new = running.make("s:0.raw", used=DAY)
    found = await running.purge.purge(Selection(older_than=2 * DAY))
    assert [one["image"] for one in found["purged"]] == order
    assert found["freed_bytes"] == 3 * BLOCK
    assert running.kept() == [new]


@pytest.mark.parametrize("why", ["disk", "open", "private", "pinned"])
async def test_what_somebody_needs_is_kept(running: Place, why: str) -> None:
    key = running.make("s:a.raw", used=9 * DAY, pinned=why == "pinned")
    if why == "disk":
        running.disks = {f"vm{n}": key for n in range(5)}
    if why == "open":
        running.images._open[key] = cast("Any", None)
    if why == "private":
        running.cache.layers.make(LayerName.of_disk("vm", 1, key))
    found = await running.purge.purge(Selection(older_than=0.0))
    said = {
        "disk": "in use by vm0, vm1, vm2 and others",
        "open": "read by the socket of its store, being warmed, or let go just now",
        "private": "the cache has data of a disk for it",
        "pinned": "pinned",
    }
    assert (found["purged"], found["kept"]) == ([], [{"image": key, "why": said[why]}])
    assert running.kept() == [key]
    running.images._open.clear()


async def test_an_image_to_which_a_disk_comes_while_others_are_purged_is_kept(
    running: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        running.make(f"s:{n}.raw", used=9 * DAY)
    drop = running.purge._drop

    def with_a_disk(key: str, *, dry_run: bool) -> int | str:
        running.disks = {"vm": "s:2.raw"}
        return drop(key, dry_run=dry_run)

    monkeypatch.setattr(running.purge, "_drop", with_a_disk)
    await running.purge.purge(Selection(older_than=DAY))
    assert running.kept() == ["s:2.raw"]


async def test_a_change_that_fails_takes_back_no_other_one(
    running: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = running.make("s:a.raw")
    go, commit = trio.Event(), running.cache.commit.records

    async def fails_late() -> None:
        monkeypatch.setattr(running.cache.commit, "records", commit)  # of this one alone
        await go.wait()
        raise OSError(errno.ENOSPC, "no space")

    async def tag_in_vain() -> None:
        with pytest.raises(ForebayError, match="cannot be written"):
            await running.catalogue.tag(key, ["x"])

    monkeypatch.setattr(running.cache.commit, "records", fails_late)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tag_in_vain)
        await trio.testing.wait_all_tasks_blocked()
        await running.catalogue.tag(key, ["y"])
        go.set()
    assert "y" in (await running.told())[key]["tags"]


async def test_tags_outlive_a_purge_and_all_else_on_record_goes(running: Place) -> None:
    for key, tags in (("s:a.raw", ["x"]), ("s:b.raw", [])):
        running.make(key, used=9 * DAY, tags=tags)
        running.cache.records.put("image", key, {"identity": None})
    await running.purge.purge(Selection(store="s", older_than=DAY))
    assert await running.told() == {
        "s:a.raw": (await running.told())["s:a.raw"] | {"tags": ["x"], "cached_bytes": 0}
    }
    assert running.cache.records.all("image") == {}


async def test_images_of_a_store_are_purged_by_themselves_when_they_are_old(
    running: Place, autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    gone = [running.make("s:a.raw", used=3 * DAY), running.make("t:b.raw", used=3 * DAY)]
    kept = [
        running.make("s:young.raw", used=DAY),
        running.make("s:pinned.raw", used=9 * DAY, pinned=True),
        running.make("kept:a.raw", used=9 * DAY),
        running.make("nbd://host/a", used=9 * DAY),
    ]
    earlier = running.make("s:earlier.raw", used=9 * DAY)
    running.catalogue.entries.put(earlier, None)  # of a version that wrote no entries
    nursery.start_soon(running.purge.run)
    await trio.sleep(START_SECONDS - 1)
    assert set(gone) <= set(running.kept())
    await trio.sleep(LOOK_SECONDS)
    await comes(lambda: running.kept() == sorted([*kept, earlier]))
    running.clock.now += 2 * DAY
    await trio.sleep(LOOK_SECONDS)
    await comes(lambda: running.kept() == sorted(kept[1:]))


# ----------------------------------------------------------------------------------------------------------------- pins


async def test_a_pinned_image_counts_with_what_it_takes_and_all_that_may_come(
    running: Place,
) -> None:
    half = running.cache.device.slots // 2
    whole = running.make("s:whole.raw", slots=half - 1)
    other = running.make("s:other.raw", slots=1)
    thin = running.make("s:thin.raw", slots=1)
    entries = running.catalogue.entries
    entries.put(thin, Entry(size=1 << 40))
    with pytest.raises(ForebayError, match="s:thin.raw may come to take 1.0T of the cache"):
        await running.catalogue.pin(thin)
    layer = running.cache.layers.clean_of(thin)
    assert layer is not None
    layer.sectors = (1 << 40) // 4096  # all else is known to be zeros
    for key in (whole, other):
        await running.catalogue.pin(key)
    with pytest.raises(ForebayError, match="unpin others, or make the cache larger"):
        await running.catalogue.pin(thin)
    await running.catalogue.unpin(other)
    await running.catalogue.pin(thin)
    assert sorted(entries.pinned()) == [thin, whole]


@pytest.mark.expect_log("s:grown.raw has grown, and is not pinned any more")
async def test_a_pinned_image_that_comes_back_too_large_is_not_pinned_any_more(
    running: Place, caplog: pytest.LogCaptureFixture
) -> None:
    room = running.cache.device.slots // 2 * BLOCK
    grown = running.make("s:grown.raw", slots=1)
    other = running.make("s:other.raw", slots=1)
    for key in (grown, other):
        await running.catalogue.pin(key)
    assert running.images.is_pinned(grown, room - BLOCK)  # just fits
    assert not caplog.records
    assert not running.images.is_pinned(grown, room)
    assert "s:grown.raw has grown, and is not pinned any more" in caplog.text
    assert running.catalogue.entries.pinned() == [other]
    layer = running.cache.layers.clean_of(grown)
    assert layer is not None
    assert not layer.pinned


async def test_an_image_whose_size_nobody_knows_is_not_pinned(running: Place) -> None:
    key = running.make("s:a.raw")
    running.catalogue.entries.put(key, None)
    with pytest.raises(ForebayError, match="the size of s:a.raw is not known yet: warm it first"):
        await running.catalogue.pin(key)


async def test_a_start_pins_what_is_on_record_and_unpins_what_nobody_wants(running: Place) -> None:
    wanted = running.make("s:wanted.raw", pinned=True)
    left = running.make("s:left.raw")  # by a full copy whose disk is gone
    copied = running.make("s:copied.raw")
    running.disks = {"vm": copied}
    for key in (left, copied):
        layer = running.cache.layers.clean_of(key)
        assert layer is not None
        layer.pinned = True
    await running.catalogue._settle_pins()
    pinned = {x.name.image for x in running.cache.layers if x.pinned}
    assert pinned == {wanted, copied}


# ----------------------------------------------------------------------------------------------------------------- warm


async def test_all_warms_together_keep_to_the_lowest_rate_while_that_one_is_under_way(
    autojump_clock: Clock,
) -> None:
    rate = Rate()

    async def spend(count: int) -> float:
        began = trio.current_time()
        for _ in range(count):
            await rate.spend(1 << 20)
        return trio.current_time() - began

    assert await spend(100) == 0
    with rate.at_most(1 << 20), rate.at_most(4 << 20):
        await spend(1)  # the first one waits for nothing
        assert await spend(10) == pytest.approx(10)
        async with trio.open_nursery() as nursery:
            began = trio.current_time()
            for _ in range(4):
                nursery.start_soon(spend, 5)
        assert trio.current_time() - began == pytest.approx(20)
    with rate.at_most(4 << 20):
        await spend(1)
        assert await spend(8) == pytest.approx(2)
    assert await spend(100) == 0


async def test_no_more_warms_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay.catalogue.warm.MOST_WARMS", 1)

    class Readers:
        def reading(self, source: object) -> AbstractAsyncContextManager[None]:
            return contextlib.nullcontext()

    async def reads(*_: object) -> None:
        await trio.sleep_forever()

    async def no_source(_image: str) -> Source:
        return cast("Source", None)

    nobody = cast("Any", None)
    warming = Warming(nobody, cast("Any", Readers()), no_source, nobody)
    monkeypatch.setattr(warming, "_through", reads)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(warming.warm, "s:a.raw", "all", None, cast("Any", None))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ForebayError, match="1 images are being warmed"):
            await warming.warm("s:b.raw", "all", None, cast("Any", None))
        nursery.cancel_scope.cancel()
    assert warming._under_way == 0
