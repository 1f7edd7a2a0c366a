# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The real gateway on sparse files: a cache of 1 TiB, images of 4 TiB, 10 million slots in use, or a part of all that.

What is in the slots is put into the index between two lives, and is zeros.
"""

import gc
import json
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from unittest import mock

import lmdb
import trio

import forebay_cache.upkeep.revive
from forebay.daemon.gateway import Gateway
from forebay.process.process import Survivors
from forebay.storage.state import index_path
from forebay.units import Mode
from forebay_cache import Cache
from forebay_cache.device.pace import Pace
from forebay_cache.format.checksum import GROUP, ZERO_SECTOR_SUM
from forebay_cache.format.entry import pack
from forebay_cache.format.geometry import PAGE_BLOCKS, PAGE_SHIFT, SECTORS
from forebay_cache.format.records import GROUP_KEY, LAYER_KEY, PAGE_KEY, TABLES, LayerRecord
from real.commands_bed import Bed

CACHE, IMAGE = 1 << 40, 4 << 40
GIB = 1 << 30

PARTS = (256, 64)
"""By how much less there is than in a cache of 10 million slots."""
SLICE = 30_000
"""Lines in one step of a task: 2 ms."""
SNAPSHOT = 80_000
"""Lines in the snapshot of a commit: less than 20 ms."""
MORE = 8_000
"""By so many lines the longest step of all may be longer with four times as many slots."""

DISKS = {
    "dense": (Mode.WRITE_THROUGH, 4_000_000, 64),
    "sparse": (Mode.WRITE_THROUGH, 1_000_000, 1),
    "changed": (Mode.WRITE_THROUGH, 3_500_000, 64),
    "dirty": (Mode.WRITE_BACK, 200_000, 2),
    "conflict": (Mode.WRITE_BACK, 800_000, 2),
    "overlay": (Mode.WRITE_BACK, 500_000, 16),
    "other": (Mode.WRITE_BACK, 0, 1),
}
"""By name: the mode, how many slots the layer in question has, and how many of them are in one page of 64."""

Disks = dict[str, tuple[Mode, int, int]]


class Big(Bed):
    """A gateway with a part of the 10 million slots."""

    both: tuple[str, ...] = ()
    """Disks that have the same in their private layer and in the clean one below."""

    def __init__(self, directory: Path, part: int, disks: Disks = DISKS) -> None:
        super().__init__(directory)
        self.part = part
        self.page = 0
        self.disks = disks
        self.device = directory / "cache.img"
        with self.device.open("wb") as file:
            file.truncate(CACHE // part)
        cache = self.config.cache.model_copy(update={"device": self.device})
        defaults = self.config.defaults.model_copy(update={"max_dirty": IMAGE})
        self.config = self.config.model_copy(update={"cache": cache, "defaults": defaults})

    async def make(self) -> None:
        """One life, in which the disks are attached and have a layer each. The slots come between two lives."""
        async with self.life() as gateway:
            for name, (mode, _, _) in self.disks.items():
                with (self.images / name).open("wb") as file:
                    file.truncate(IMAGE)
                await gateway.attach(
                    name, f"images:{name}", mode=mode, overlay=name == "overlay", read_only=False
                )
                if mode is Mode.WRITE_BACK:
                    await self.write(name)
            await gateway.stop()
            await self.cache.commit()

    @property
    def cache(self) -> Cache:
        return self.gateway._cache

    def fill(self) -> None:
        """Put the slots into the index."""
        path = str(index_path(self.config))
        with lmdb.open(path, map_size=1 << 40, max_dbs=len(TABLES), sync=False) as env:
            db = {name: env.open_db(name.encode(), create=False) for name in TABLES}
            with env.begin(write=True) as txn:
                slot = len(self.disks) * GROUP
                for key, raw in list(txn.cursor(db=db["layers"])):
                    record = LayerRecord.unpack(raw)
                    name = record.name.disk or record.name.image[7:]
                    mode, slots, in_page = self.disks[name]
                    if record.private == (mode is Mode.WRITE_BACK) or name in self.both:
                        pages = slots // self.part // in_page
                        layer = LAYER_KEY.unpack(key)[0]
                        items = _pages(layer, slot, pages, in_page, private=record.private)
                        txn.cursor(db=db["pages"]).putmulti(items)
                        slot += pages * in_page
                        record.slots += pages * in_page
                        record.sectors += pages * in_page
                        txn.put(key, record.pack(), db=db["layers"])
                sums = array("I", [ZERO_SECTOR_SUM] * SECTORS * GROUP).tobytes()
                groups = range(len(self.disks), slot // GROUP + 1)
                txn.cursor(db=db["sums"]).putmulti((GROUP_KEY.pack(n), sums) for n in groups)
                meta = json.loads(txn.get(b"state", db=db["meta"]) or b"") | {"frontier": slot}
                txn.put(b"state", json.dumps(meta).encode(), db=db["meta"])

    @asynccontextmanager
    async def served(self, cache: Cache) -> AsyncIterator[Gateway]:
        """The device is as quick as it is, however busy the machine, and is taken back when that is asked for."""
        with (
            mock.patch.object(Pace, "note_write", return_value=False),
            mock.patch.object(Pace, "look"),
            mock.patch.object(forebay_cache.upkeep.revive, "AGAIN_SECONDS", 3600.0),
        ):
            async with super().served(cache) as gateway:
                yield gateway

    async def reclaimed(self) -> None:
        while any(x.is_dead for x in self.cache.layers) or self.cache.quarantine.leaving:  # noqa: ASYNC110
            await trio.sleep(0.05)


def _pages(
    layer: int, slot: int, pages: int, in_page: int, *, private: bool
) -> Iterator[tuple[bytes, bytes]]:
    """So many pages of a layer, spread over the image, with one sector in each slot from `slot` on."""
    apart = 1 if in_page == PAGE_BLOCKS else max(1, (IMAGE >> PAGE_SHIFT) // (pages + 1))
    for n in range(pages):
        words = array("Q", bytes(8 * PAGE_BLOCKS * (1 + private)))
        for i in range(in_page):
            words[i] = pack(slot + n * in_page + i, 0, 1)
        yield PAGE_KEY.pack(layer, 1 + n * apart), words.tobytes()


@contextmanager
def collected() -> Iterator[None]:
    """Garbage is collected as in the daemon, where that is measured."""
    note = Survivors().note
    gc.collect()
    gc.freeze()
    gc.callbacks.append(note)
    try:
        yield
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
