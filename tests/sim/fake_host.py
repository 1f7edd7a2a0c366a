# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A host: a cache device and its index in a directory, an origin, the real cache, images and disks on them.

It can end in three ways: cleanly, by SIGKILL at any instant (the kernel keeps what was written), and by a power cut
(see fake_device.py for what is left then).
"""

import logging
import shutil
from pathlib import Path
from typing import Any, cast
from unittest import mock

import trio

import forebay_cache.layers.registry
from forebay.config.model import DiskSettings
from forebay.disk.disk import Disk
from forebay.image.registry import Images
from forebay.image.source import Source
from forebay.units import Mode
from forebay_cache import Cache, come_back, open_cache
from forebay_cache.format.entry import entry_at
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.layers.layer import Layer
from forebay_cache.slots.placement import FREE, HELD, QUARANTINED, TOUCHED, UNSCANNED
from sim.fake_origin import FakeOrigin, FakeSource

DEVICE_SIZE = 4 << 20


def nothing(done: int, total: int) -> None:
    """A progress that nobody watches."""


class Host:
    """One host. ``nursery`` outlives its lives. Attributes are the present life's."""

    def __init__(
        self, directory: Path, origin: FakeOrigin, nursery: trio.Nursery, size: int = DEVICE_SIZE
    ) -> None:
        self.directory = directory
        self.origin = origin
        self.size = size
        self.disks: dict[str, Disk] = {}
        self.sources: dict[str, FakeSource] = {}
        self.cache: Cache
        self.images: Images
        self._nursery = nursery
        self._life = 0
        self._scope = trio.CancelScope()
        self._scopes: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        self._dead: trio.Event = trio.Event()
        self._marks: dict[str, bool] = {}

    @property
    def _home(self) -> Path:
        return self.directory / str(self._life)

    @property
    def device_file(self) -> Path:
        return self._home / "cache.img"

    async def start(self, boot: str = "first") -> None:
        """Open the cache as a daemon does."""
        self._home.mkdir(parents=True, exist_ok=True)
        self.cache = open_cache(self.device_file, self._home / "index", size=self.size, boot=boot)
        await self._nursery.start(self._live)

    async def _live(self, *, task_status: trio.TaskStatus[None]) -> None:
        self._dead = trio.Event()
        try:
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.cache.run)
                    nursery.start_soon(come_back, self.cache)
                    self.images = Images(self.cache, nursery)
                    self._tasks = nursery
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self._dead.set()

    # -- disks ------------------------------------------------------------------------------------------------

    async def attach(
        self, name: str, settings: DiskSettings, *, overlay: bool = False, **of_source: Any
    ) -> Disk:
        source = FakeSource(self.origin, name, overlay=overlay, **of_source)
        if source.claim is not None:
            source.claim.is_dirty = self._marks.get(name, False)
        disk = await Disk.open(self.images, cast("Source", source), settings)
        scope, ended = trio.CancelScope(), trio.Event()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            try:
                with scope:
                    await disk.run(task_status=task_status)
            finally:
                ended.set()

        await self._tasks.start(run)
        self.disks[name], self.sources[name] = disk, source
        self._scopes[name] = scope, ended
        return disk

    async def detach(self, name: str, *, discard: bool) -> None:
        """As the daemon does; drained already unless ``discard``."""
        disk = self.disks[name]
        scope, ended = self._scopes.pop(name)
        scope.cancel()
        await ended.wait()
        self.sources[name].discarding = discard
        await disk.close(discard=discard)
        await self.cache.commit()
        del self.disks[name], self.sources[name]
        self._marks.pop(name, None)

    # -- ends -------------------------------------------------------------------------------------------------

    def _note_marks(self) -> None:
        for name, source in self.sources.items():
            self._marks[name] = source.claim is not None and source.claim.is_dirty

    async def stop(self) -> None:
        """End as on SIGTERM."""
        for scope, ended in self._scopes.values():
            scope.cancel()
            await ended.wait()
        for disk in self.disks.values():
            await disk.image.look()
        await self.cache.commit()
        self._note_marks()
        await self._end()
        await self.cache.close()

    def snapshot(self) -> tuple[bytes, bytes]:
        """What the kernel has at this instant: device and index. For :meth:`kill`."""
        self._note_marks()
        return (
            self.device_file.read_bytes(),
            (self._home / "index" / "data.mdb").read_bytes(),
        )

    async def kill(self, left: tuple[bytes, bytes]) -> None:
        """End as on SIGKILL when ``left`` was taken; nobody may use the disks any more."""
        marks = dict(self._marks)
        await self._end()
        self._marks = marks
        self.cache.release()
        shutil.rmtree(self._home)
        self._life += 1
        self.put(*left)

    def put(self, device: bytes, index: bytes) -> None:
        """Make these the files of the next life."""
        (self._home / "index").mkdir(parents=True)
        self.device_file.write_bytes(device)
        (self._home / "index" / "data.mdb").write_bytes(index)

    async def _end(self) -> None:
        self._scope.cancel()
        await self._dead.wait()
        self.disks.clear()
        self.sources.clear()
        self._scopes.clear()


def settings(mode: Mode, **others: Any) -> DiskSettings:
    return DiskSettings(**{"mode": mode, "origin_timeout": 5.0, **others})


class Listener(logging.Handler):
    """Keeps records of level WARNING and above."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.WARNING)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


# -- what has to be true of a cache at any time ----------------------------------------------------------------


async def check_cache(cache: Cache) -> None:
    """Totals agree with pages, no slot is named twice, placement agrees with both."""
    with mock.patch.object(
        forebay_cache.layers.registry, "PAGES_KEPT", 1 << 30
    ):  # all stay once loaded
        await _check_cache(cache)


async def _check_cache(cache: Cache) -> None:
    while cache.in_flight.is_filling or any(x.is_dead for x in cache.layers):  # noqa: ASYNC110
        await trio.sleep(0.01)
    for layer in list(cache.layers):
        await layer.pages.load(await layer.pages.numbers())
    if any(x.is_dead for x in cache.layers):
        return
    named: dict[int, tuple[str, int]] = {}
    for layer in cache.layers:
        _check_layer(cache, layer, named)
    state = cache.slots.placement.state
    free = sum(s & ~TOUCHED in (FREE, UNSCANNED) for s in state)
    assert cache.slots.placement.free == free, (cache.slots.placement.free, free)
    quarantine = cache.quarantine
    leaving = {*quarantine._freed, *(s for _, many in quarantine._waiting for s in many)}
    assert len(leaving) <= quarantine.leaving, "a slot was given up twice"
    for slot, (name, block) in named.items():
        where = f"slot {slot} of {name} block {block}"
        assert slot not in leaving, f"{where} is to be reused"
        assert not state[slot] & QUARANTINED or cache.slots.is_evicting(slot), (
            f"{where} is quarantined"
        )
        assert state[slot] & ~TOUCHED not in (FREE, UNSCANNED), f"{where} is free"


def _check_layer(cache: Cache, layer: Layer, named: dict[int, tuple[str, int]]) -> None:
    slots = sectors = 0
    for number, page in layer.pages.held():
        for i in range(PAGE_BLOCKS):
            entry = entry_at(page, i)
            block = number * PAGE_BLOCKS + i
            assert not entry.fault(), f"{layer.name} block {block}: {entry.fault()}"
            sectors += entry.valid.bit_count()
            for slot, _ in entry.places():
                slots += 1
                assert slot not in named, f"slot {slot}: {named[slot]} and {layer.name} {block}"
                named[slot] = str(layer.name), block
                held = bool(cache.slots.placement.state[slot] & HELD)
                assert held == layer.is_held or cache.slots.is_evicting(slot), (
                    f"slot {slot} of {layer.name} block {block}: held is {held}"
                )
    assert (slots, sectors) == (layer.slots, layer.sectors), (
        f"{layer.name}: counted {slots} slots, {sectors} sectors; "
        f"kept {layer.slots} and {layer.sectors}"
    )
