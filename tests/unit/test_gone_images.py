# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Images that were deleted: when one is gone for good, and what is dropped of it then."""

import errno
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from forebay.config.model import Config
from forebay.image.gone import AWAY_SECONDS, KIND, MOST_SECONDS, START_SECONDS, GoneImages
from forebay_cache import Cache, open_cache
from forebay_cache.format.records import LayerName

Clock = trio.testing.MockClock


class Threads:
    """Stands for those of a store: what is asked of them is done at once, or not at all."""

    looks = 0
    error: OSError | None = None

    def __init__(self, *_: object) -> None:
        pass

    def apart(self, foreground: int, background: int) -> "Threads":
        assert (foreground, background) == (1, 1), "a look takes no place from a guest"
        return self

    async def run(self, do: Callable[[], Any], *, background: bool) -> Any:
        assert background, "nobody waits for a look"
        await trio.lowlevel.checkpoint()
        type(self).looks += 1
        if Threads.error is not None:
            raise Threads.error
        return do()


class Place:
    """A store with images, a cache that has something of each, and who looks for them."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "store"
        self.store.mkdir()
        self.config = Config.model_validate({"stores": {"s": {"path": str(self.store)}}})
        self.cache: Cache = open_cache(directory / "c.img", directory / "index", size=16 << 20)
        self.used: set[str] = set()
        self.gone = GoneImages(
            self.config, self.cache, lambda key: key in self.used, cast("Any", Threads)
        )

    def make(self, name: str, *, file: bool = True, sectors: int = 5) -> str:
        key = name if ":" in name or name.startswith("/") else f"s:{name}"
        if file and key.startswith("s:"):
            (self.store / name).write_bytes(b"x" * 4096)
        self.cache.layers.make(LayerName.of_image(key)).sectors = sectors
        self.cache.records.put("image", key, {"identity": None})
        return key

    def kept(self) -> list[str]:
        return [x.name.image for x in self.cache.layers if not x.is_dead]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    Threads.looks, Threads.error = 0, None
    made = Place(tmp_path)
    yield made
    made.cache.release()


@asynccontextmanager
async def looking(place: Place) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place.gone.run)
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


async def test_what_the_cache_has_of_an_image_that_was_deleted_is_dropped(
    autojump_clock: Clock, place: Place
) -> None:
    deleted, other = place.make("a.raw"), place.make("b.raw")
    async with looking(place):
        place.gone.note_unused(deleted)
        await trio.sleep(0.1)
        (place.store / "a.raw").unlink()
        await trio.sleep(2)
        assert place.kept() == [other]
        assert place.cache.records.get("image", deleted) is None
        assert place.cache.records.get("image", other) is not None
        assert place.gone.reclaimed == 1


async def test_images_of_an_earlier_life_are_looked_for_too(
    autojump_clock: Clock, place: Place
) -> None:
    place.make("a.raw")
    gone = [place.make(f"gone{n}.raw", file=False) for n in range(20)]
    place.used.add(gone[3])  # its disk is on record, and could not be brought back
    async with looking(place):
        await trio.sleep(START_SECONDS / 2)
        assert len(place.kept()) == 21
        await trio.sleep(10 * START_SECONDS)
        assert place.kept() == ["s:a.raw", gone[3]]


async def test_a_store_that_is_not_mounted_has_lost_nothing(
    autojump_clock: Clock, place: Place
) -> None:
    keys = [place.make("a.raw"), place.make("b.raw")]
    async with looking(place):
        for key in keys:
            place.gone.note_unused(key)
        await trio.sleep(1)
        place.store.rename(place.store.with_name("elsewhere"))
        await trio.sleep(100)
        place.store.mkdir()  # the mount point, which is empty
        await trio.sleep(3 * MOST_SECONDS)
        assert place.kept() == keys
        place.store.rmdir()
        place.store.with_name("elsewhere").rename(place.store)
        (place.store / "b.raw").unlink()
        await trio.sleep(3 * MOST_SECONDS)
        assert place.kept() == keys[:1]


async def test_where_nobody_has_seen_the_store_nothing_is_gone(
    autojump_clock: Clock, place: Place
) -> None:
    key = place.make("a.raw", file=False)
    async with looking(place):
        place.gone.note_unused(key)
        await trio.sleep(3 * MOST_SECONDS)
        assert place.kept() == [key]
        assert place.cache.records.get(KIND, "s") is None


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
async def test_an_error_says_nothing_of_an_image(
    autojump_clock: Clock, place: Place, error: int
) -> None:
    keys = [place.make(f"{n}.raw") for n in range(10)]
    async with looking(place):
        for key in keys:
            place.gone.note_unused(key)
        await trio.sleep(1)
        for n in range(10):
            (place.store / f"{n}.raw").unlink()
        Threads.error, Threads.looks = OSError(error, "away"), 0
        await trio.sleep(10 * AWAY_SECONDS)
        assert place.kept() == keys
        if error == errno.ETIMEDOUT:
            assert Threads.looks <= 10, "a store that does not answer is left alone for a while"
        Threads.error = None
        await trio.sleep(2 * MOST_SECONDS)
        assert place.kept() == []


async def test_an_image_that_comes_back_was_only_moved(autojump_clock: Clock, place: Place) -> None:
    key = place.make("a.raw")
    async with looking(place):
        place.gone.note_unused(key)
        await trio.sleep(0.1)
        (place.store / "a.raw").rename(place.store / "b.raw")
        await trio.sleep(0.5)
        (place.store / "b.raw").rename(place.store / "a.raw")
        await trio.sleep(2 * MOST_SECONDS)
        assert place.kept() == [key]


async def test_one_that_is_attached_meanwhile_is_kept(
    autojump_clock: Clock, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = place.make("a.raw")
    async with looking(place):
        place.gone.note_unused(key)
        await trio.sleep(0.1)
        (place.store / "a.raw").unlink()
        plain = Threads.run

        async def run(self: Threads, do: Callable[[], Any], *, background: bool) -> Any:
            found = await plain(self, do, background=background)
            place.used.add(key)
            return found

        monkeypatch.setattr(Threads, "run", run)
        await trio.sleep(MOST_SECONDS)
        assert place.kept() == [key]


async def test_servers_and_devices_are_never_gone_and_what_is_empty_is_dropped(
    autojump_clock: Clock,
    place: Place,
) -> None:
    keys = [place.make("nbd://host/x"), place.make("/dev/gone/lv"), place.make("other:a.raw")]
    empty = [place.make("nbd://host/y", sectors=0), place.make("b.raw", sectors=0)]
    async with looking(place):
        for key in keys + empty:
            place.gone.note_unused(key)
        await trio.sleep(3 * MOST_SECONDS)
        assert place.kept() == keys
        assert all(place.cache.records.get("image", key) for key in keys + empty)


async def test_looks_become_seldom(autojump_clock: Clock, place: Place) -> None:
    key = place.make("a.raw")
    async with looking(place):
        place.gone.note_unused(key)
        await trio.sleep(100 * MOST_SECONDS)
        assert 100 < Threads.looks < 130
