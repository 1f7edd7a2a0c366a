# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The gateway: all disks over one cache, as the control API asks for them."""

import logging
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import trio

import forebay_fast
from forebay.boot.boots import Boots
from forebay.boot.disk_boot import boot_of
from forebay.boot.files import TraceFiles
from forebay.catalogue.catalogue import Catalogue
from forebay.config.model import Config
from forebay.control.prometheus.latency import latency_lines
from forebay.control.prometheus.metrics import label, metrics_lines
from forebay.daemon.arrivals import Arrivals
from forebay.daemon.attached import Absent, Attached
from forebay.daemon.committing import Committing
from forebay.daemon.departures import Departures
from forebay.daemon.disks import Disks, attach_once, still_dirty
from forebay.daemon.ending import stop
from forebay.daemon.figures import memory
from forebay.daemon.figures.loop_meter import METER
from forebay.daemon.parallel import Progress, Shares, run_all, told_of
from forebay.daemon.record import DiskRecord, DiskRecords
from forebay.daemon.reloading import Reloading
from forebay.daemon.resolving import Keeps, Resolving
from forebay.daemon.saving import Saving, Wanted
from forebay.doors.restart import EarlierSockets
from forebay.doors.returns import Returns
from forebay.doors.tenant import Rule
from forebay.errors import ForebayError
from forebay.events.telling import tell
from forebay.handover.evacuation import Evacuation
from forebay.handover.moves import Moves
from forebay.image.gone import GoneImages
from forebay.image.registry import Images
from forebay.keeping.kept import KeptOverlays
from forebay.keeping.overlays import Overlays
from forebay.origin.threads import StoreThreads
from forebay.overview.summary import Summary
from forebay.staging.staging import Staging
from forebay.storage.advice import LAST_SECONDS, Advice
from forebay.storage.state import index_path
from forebay.storage.upkeep import Upkeep
from forebay.stores.served import Attaching
from forebay.stores.sockets import StoreSockets
from forebay.units import Mode
from forebay_cache import Cache

log = logging.getLogger("forebay.daemon")

Status = dict[str, Any]
"""What is told about one disk: the keys of `forebay status --json`."""

_AT_ONCE = 16
"""Disks whose status is told between two turns of others: about a millisecond."""

BY_SETTINGS = Rule()
"""Which processes may use a disk, where only the store's settings say so."""


class Gateway:
    """All disks over one cache. Methods raise ForebayError (one line: what, and what to do) and OSError."""

    def __init__(self, config: Config, cache: Cache, nursery: trio.Nursery) -> None:
        """`nursery` is the one long-lived nursery of the process; `cache` is running in it."""
        self.config = config
        self._cache = cache
        images = Images(cache, nursery)
        returns = Returns(nursery, cache.records)
        self._disks = Disks()
        self._records = DiskRecords(cache, index_path(config))
        kept = KeptOverlays(cache)
        budgets = memory.budgets()
        self._figures = partial(memory.figures, budgets, cache, images.kept)
        self._gone = GoneImages(config, cache, partial(self._is_in_use, images), self._threads_of)
        images.on_unused = self._note_unused
        files = TraceFiles(config.gateway.state, cache.uuid)
        boots = Boots(files, nursery, self._threads_of)
        self._departures = Departures(
            images,
            self._disks,
            self._records,
            returns,
            lambda name, record: self._arrivals.source_of(name, record),  # noqa: PLW0108 (made later)
            kept,
        )
        self._arrivals = Arrivals(
            config,
            cache,
            nursery,
            images,
            self._disks,
            self._records,
            budgets,
            returns,
            self._departures.give_way,
            kept,
            boots,
        )
        self.catalogue = Catalogue(
            config,
            cache,
            images,
            index_path(config),
            self._disks,
            self._arrivals.reader_of,
            self._records.keys,
            boots,
        )
        self._gone.on_gone = self.catalogue.traces.forget
        self._resolving = Resolving(self._arrivals, self._disks, self._records)
        self._saving = Saving(config, cache, self._disks, self._arrivals.threads_of)
        committing = Committing(self._arrivals, self._disks, self._records, images, returns, kept)
        self.overlays = Overlays(
            cache,
            index_path(config),
            kept,
            self._disks.turn_attached,
            self._disks.all_attached,
            committing,
            self._disks.is_attached,
            lambda: [x.status() for x in self._disks if isinstance(x, Absent) and x.record.overlay],
        )
        evacuation = Evacuation(self.attached, self.status, self.detach, self.set_mode)
        self.moves = Moves(self._disks.attached, evacuation.run)
        self.advice = Advice(cache, config.gateway.state)
        attaching = Attaching(
            images,
            self._disks,
            self._arrivals.base,
            self.catalogue.cached_size,
            lambda disk: boot_of(disk, boots),
        )
        threads_of = self._arrivals.threads_of
        self.stores = StoreSockets(config, nursery, attaching, threads_of, budgets)
        self.reloading = Reloading(
            config, nursery, self._disks, self._records, self.stores, self._arrivals
        )
        self.staging = Staging(config, cache, nursery, attaching, threads_of, budgets)
        self._upkeep = Upkeep(
            cache, lambda: [*(one.disk.image for one in self.attached()), *self.stores.images()]
        )
        self.summary = Summary(
            config,
            cache,
            nursery,
            self._threads_of,
            self.statuses,
            self.catalogue.images,
            lambda: ((one.name, one.disk.timing) for one in self.attached()),
        )

        tasks = (
            self._saving.remove_left,
            self._gone.run,
            self.catalogue.run,
            self.advice.run,
            self.summary.run,
            committing.run,
        )
        self._background = [partial(nursery.start_soon, task) for task in tasks]

    def _note_unused(self, key: str) -> None:
        self.catalogue.note_unused(key)
        self._gone.note_unused(key)

    # -- disks come and go

    async def attach(
        self,
        name: str,
        image: str,
        *,
        mode: Mode | None = None,
        cache_size: int | None = None,
        preload: int | str | None = None,
        rates: Mapping[str, int] = MappingProxyType({}),
        read_only: bool = False,
        overlay: bool = False,
        keep: bool = False,
        rule: Rule = BY_SETTINGS,
        gives_way: bool = False,
        image_format: str | None = None,
        incoming: bool = False,
        with_data: bool = False,
        patience: float = 0.0,
    ) -> Status:
        """Serve an image as a disk: see `Answers.attach`."""
        chosen = mode.value if mode else None
        if gives_way and not read_only:
            raise ForebayError("a disk that gives way is read-only: leave one of the two out")
        wanted = DiskRecord(image, "", 0, read_only, overlay, chosen)
        wanted = wanted.with_settings({"cache_size": cache_size, "preload": preload, **rates})
        wanted = replace(wanted, gives_way=gives_way, format=image_format, keep=keep)
        wanted = wanted.with_rule(rule).coming(incoming)
        attach = partial(self._arrivals.attach, patience=patience, with_data=with_data)
        attached, again = await attach_once(self.config, self._disks, attach, name, wanted)
        return {**attached.status(), "attached_already": again}

    async def resume(self, earlier: EarlierSockets) -> None:
        """Bring back the disks on record, each whether or not its origin can be reached, and their clients."""
        of_stores = self.stores.take(earlier)
        # before stores: no base is to be read that a disk on record writes
        await self._arrivals.resume(earlier)
        await self.stores.open(of_stores)
        await self.staging.resume()
        for work in self._background:
            work()

    def _threads_of(self, store: str) -> StoreThreads:
        return self._arrivals.threads_of(store)

    def _is_in_use(self, images: Images, key: str) -> bool:
        """True if a disk is on the image with that key, served or only on record, or the cache has data for it."""
        if images.is_open(key) or key in self._records.keys().values():
            return True
        return self._cache.layers.has_private_on(key)

    async def detach(
        self,
        name: str,
        *,
        discard: bool = False,
        force: bool = False,
        spare: bool = False,
        progress: Progress,
    ) -> None:
        """Write back what is dirty (or drop it, `discard`), stop serving, forget the disk: see `Departures.detach`."""
        await self._departures.detach(
            name, discard=discard, force=force, spare=spare, progress=progress
        )

    def hang_up(self) -> None:
        """Give up on all clients, and on what they wait for, at once: nothing of it can be answered any more."""
        for one in self.attached():
            one.listener.hang_up()
        self.stores.hang_up()
        self.staging.hang_up()

    async def stop(self, *, restart: bool = False) -> bool:
        """End all work at the end of the process. True if the sockets were left for the next one; see `ending.stop`."""
        self.staging.hang_up()  # who stages comes back, with what it has
        with trio.move_on_after(LAST_SECONDS):  # while guests are served: a restart is to be short
            await self.advice.save()
        await self.summary.history.save_at_last()
        return await stop(self.attached(), self.stores, self._records, restart=restart)

    # -- asking about them, and changing them

    def attached(self) -> list[Attached]:
        """The disks that are attached."""
        return self._disks.all_attached()

    def status(self, name: str | None = None) -> list[Status]:
        """All disks by name, or the one, in detail; each with `gateway`, what `info` tells."""
        info = self.info()
        if name is not None:
            one = self._disks.find(name)
            return [{**one.status(), **one.detail(self.config), "gateway": info}]
        return [{**one.status(), "gateway": info} for one in self._disks]

    async def statuses(self) -> AsyncIterator[Status]:
        """As `status` of all disks, in slices: there may be a thousand."""
        info = self.info()
        for n, one in enumerate(list(self._disks)):
            if n % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            yield {**one.status(), "gateway": info}

    async def flush(
        self, names: list[str] | None, *, timeout: float | None = None, progress: Progress
    ) -> None:
        """Return when each of these disks (None: all) has written back what was dirty. `timeout` in seconds."""
        if names is None:
            disks = self.attached()
        else:
            disks = [self._disks.attached(name) for name in names]
        shares = Shares(len(disks), progress)
        with trio.move_on_after(timeout if timeout is not None else float("inf")) as scope:
            await run_all(partial(_drain, one, shares.of(i)) for i, one in enumerate(disks))
        if scope.cancelled_caught:
            raise still_dirty([one.status() for one in disks], timeout)

    async def set_mode(self, name: str, mode: Mode, progress: Progress) -> Status:
        """Change how a disk reads and writes, also while clients are connected. The disk's status."""
        return await self.reloading.settings.set(name, {"mode": mode.value}, progress)

    async def set_peer(self, name: str, rule: Rule, *, evict: bool = False) -> Status:
        """Change which processes may use a disk. Whoever has it loses it, unless connected; `evict`: in any case.

        The disk's status.
        """
        async with self._disks.turn_attached(name) as attached:
            if evict:
                attached.listener.evict()
            await self._arrivals.set_rule(attached, rule)
            tell("setting", f"peer {rule.peer or 'as its store has it'}", name)
        return attached.status()

    async def resolve(self, name: str, keeps: Keeps, *, sure: bool, progress: Progress) -> Status:
        """Go on with an image that was changed, with the disk's own data or without it. The disk's status."""
        return await self._resolving.keep(name, keeps, sure=sure, progress=progress)

    async def save(
        self,
        name: str,
        to: str,
        *,
        partial: bool,
        form: str = "raw",
        snapshot: str | None = None,
        progress: Progress,
    ) -> Status:
        """Make a new image of what the disk shows, or showed at a snapshot; what was saved. `form`: raw or qcow2."""
        wanted = Wanted(to, form, snapshot, partial=partial)
        return await self._saving.save(name, wanted, progress)

    async def preload(self, name: str, amount: int | str, progress: Progress) -> None:
        """Bring in bytes from the start, `trace`, or `all`."""
        attached = self._disks.attached(name)
        attached.check_serves()
        with attached.used():
            if amount == "trace":
                await attached.preload_trace(progress)
            else:
                await attached.disk.preload(amount, progress)

    def info(self) -> dict[str, Any]:
        """What belongs to no disk, and not to the cache: see "Memory" and "The compiled core" in gateway/README.md."""
        return {"core": forebay_fast.serves(), **self._figures()}

    # -- the cache

    def cache_info(self) -> dict[str, Any]:
        """The cache device and what it holds."""
        return self._cache.info() | {"reclaimed_images": self._gone.reclaimed}

    async def extend_cache(self, size: int | None, progress: Progress) -> dict[str, Any]:
        """Use all of the cache device, after making it `size` bytes where it is a file. What the cache is then."""
        return await self._upkeep.extend(size, progress)

    async def release_cache(self, progress: Progress) -> dict[str, Any]:
        """Write back all that is dirty, and make sure that nobody needs this cache; whom to end then."""
        busy = [one["name"] for one in self.status() if one["clients"]]
        busy += [one.key for one in self.stores.served() if one.listener.clients]
        if busy:
            raise ForebayError(f"in use: {', '.join(busy)}: stop the VMs and detach these disks")
        await self.flush(None, progress=progress)
        names = sorted(self._disks.names())
        if kept := sorted(one["name"] for one in self.overlays.all() if not one["attached"]):
            raise ForebayError(
                f"overlays that are kept: {', '.join(kept)}: save them, or give their changes up with "
                "'forebay revert NAME' first"
            )
        if names:
            raise ForebayError(
                f"attached: {', '.join(names)}: detach them with 'forebay detach NAME' first"
            )
        return {"pid": os.getpid()}

    async def scrub(self, progress: Progress) -> dict[str, Any]:
        """Check everything on the cache device, and fetch again what is damaged and clean; what was found."""
        return await self._upkeep.scrub(progress)

    async def repair_cache(self, progress: Progress) -> dict[str, Any]:
        """Use a cache device again that has failed, then scrub; what was found."""
        return await self._upkeep.repair(progress)

    async def metrics(self) -> str:
        """Prometheus text, made in slices."""
        disks = [one async for one in self.statuses()]
        cache = self.cache_info() | METER.figures()
        found: list[str] = []
        for lines in metrics_lines(disks, cache, self.info(), self.stores.status()):
            await trio.lowlevel.checkpoint()
            found += lines
        latency = self.summary.latency
        labelled = [(label("disk", name), of_disk) for name, of_disk in latency.each()]
        for lines in latency_lines(labelled, latency.device):
            await trio.lowlevel.checkpoint()
            found += lines
        return "\n".join(found) + "\n"


async def _drain(attached: Attached, progress: Progress) -> None:
    with attached.used(), told_of(attached.name):
        await attached.drain(progress)
