# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How disks come: an image is attached, or a disk on record is brought back after a restart."""

import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import trio

from forebay.boot.boots import Boots
from forebay.catalogue.warm import WARMING
from forebay.checkpoint.dirty import left_dirty
from forebay.config.model import Config, DiskSettings
from forebay.daemon.attached import Absent, Attached
from forebay.daemon.disks import Disks
from forebay.daemon.opening import (
    abandoned_on_fault,
    add_handover,
    bring_in,
    check_configured,
    check_kinds,
    check_may_come,
    format_of,
    prepared,
    tell_not_served,
)
from forebay.daemon.parallel import run_all
from forebay.daemon.record import DiskRecord, DiskRecords, in_conflict
from forebay.disk.disk import Disk
from forebay.doors.accepting import socket_path
from forebay.doors.listener import Listener
from forebay.doors.restart import EarlierSockets
from forebay.doors.returns import Owed, Returns
from forebay.doors.tenant import Rule, Tenant
from forebay.errors import ForebayError
from forebay.events.telling import tell
from forebay.formats.magic import RAW
from forebay.handover.phase import Phase
from forebay.image.boundary import breaks_the_cache, in_short
from forebay.image.formats import Formats
from forebay.image.registry import Images
from forebay.image.source import Source
from forebay.image.use import Use
from forebay.keeping.kept import Kept, KeptOverlays
from forebay.origin.addresses import FileAddress, ScratchAddress, in_format, resolve
from forebay.origin.mounts import is_local
from forebay.origin.threads import StoreThreads
from forebay.origin.virtual.servers import Servers, Web
from forebay.origin.worker.process import StoreProcess
from forebay.units import Mode, parse_name
from forebay_cache import Cache, CacheError
from forebay_cache.turns import next_turn
from forebay_nbd import Budgets

log = logging.getLogger("forebay.daemon")


async def _nobody_gives_way(_disk: Attached) -> None:
    """What a gateway does that detaches nothing: the attach is refused."""


class Arrivals:
    """Makes disks, and adds them to `disks`."""

    def __init__(
        self,
        config: Config,
        cache: Cache,
        nursery: trio.Nursery,
        images: Images,
        disks: Disks,
        records: DiskRecords,
        memory: Budgets,
        returns: Returns,
        give_way: Callable[[Attached], Awaitable[None]] = _nobody_gives_way,
        kept: KeptOverlays | None = None,
        boots: Boots | None = None,
    ) -> None:
        """`nursery` is the one long-lived nursery of the process: the tasks of disks and of connections live in it.
        `memory` is what the clients of all disks together may hold. `give_way` detaches a disk that is to keep no other
        out of its image. `boots` records the boots of disks, and replays them; None: nobody does.
        """
        self._config = config
        self._cache = cache
        self._nursery = nursery
        self._images = images
        self._disks = disks
        self._records = records
        self._memory = memory
        self._give_way = give_way
        self._boots = boots
        self._returns = returns
        self._formats = Formats(cache)
        web = lambda: Web(config.origins.https, config.origins.ca_file)  # noqa: E731
        self._servers = Servers(config.gateway.run, web, partial(resolve, config), images.is_open)
        self._kept = KeptOverlays(cache) if kept is None else kept
        self._threads: dict[str, StoreThreads] = {}
        """By store, or by image where that lies in none."""

    # -- a new disk

    async def attach(
        self, name: str, wanted: DiskRecord, patience: float = 0.0, *, with_data: bool = False
    ) -> Attached:
        """Serve an image as a disk; of `wanted`, key and size are found out here. `patience`: seconds for another host
        to hand it over, an overlay `with_data`. Raises ForebayError and OSError.
        """
        if isinstance(resolve(self._config, wanted.image), ScratchAddress):
            wanted = replace(wanted, overlay=True)  # there is no image to be written
        self._check_new(name, wanted)
        kept = self._kept.get(name)
        if wanted.format is None:
            source, _ = self.source(name, wanted, None)
            wanted = wanted.in_format(await format_of(source))
        wanted = replace(wanted, keep=wanted.keep or kept is not None)
        source, settings = self.source(name, wanted, None, comes_back=kept is not None)
        self._kept.check(name, source)
        if wanted.handover == Phase.INCOMING:
            check_may_come(source, settings, with_data=with_data, is_kept=kept is not None)
        async with self._disks.arriving(name, source, self._give_way), abandoned_on_fault(source):
            check_configured(self._config, wanted, source)
            if self._kept.get(name) != kept:
                raise ForebayError(f"what was kept of '{name}' has changed meanwhile: try again")
            await self._returns.call_off(source)
            await prepared(source, patience)
            if source.asking is None and not source.comes:
                wanted = wanted.coming(False)
            source.check_safe(settings.mode)
            if kept is not None:
                await self._check_unchanged(name, wanted, kept, source)
            self._disks.check_alone(source)
            record = wanted.of_image(source.key, source.size)
            attached = await self._opened(record, source, settings)
            attached.listener.tenant.forget()
            await self._put_to_use(attached, kept)
        tell("attach", f"{source.key} attached, {settings.mode}", name, now=settings.mode.value)
        return attached

    def _check_new(self, name: str, wanted: DiskRecord) -> None:
        try:
            parse_name(name)
        except ValueError as fault:
            raise ForebayError(str(fault)) from None
        self._disks.check_name_free(name)
        check_kinds(wanted)

    async def _check_unchanged(
        self, name: str, wanted: DiskRecord, kept: Kept, source: Source
    ) -> None:
        """Raise ForebayError where the image is not what the overlay was detached from: it is in conflict then."""
        record = await in_conflict(name, wanted, kept, source, self._cache)
        if record is not None:
            await self._records.take_over(name, record, self._kept)
            self._disks.add(self._absent(name, record, record.conflict))
            raise ForebayError(record.conflict)

    async def _put_to_use(self, attached: Attached, kept: Kept | None) -> None:
        """Put the disk on record, durably, then serve it. If that fails, nothing of it is left."""
        self._disks.add(attached)
        async with attached.busy:  # whoever wants to change it waits until it is there
            await self._served_first(attached, kept)

    async def _served_first(self, attached: Attached, kept: Kept | None) -> None:
        try:
            await attached.source.close_prepared()
            self._records.put(attached.name, attached.record)
            self._returns.take_over(attached.source)
            self._kept.put(attached.name, None)
            await self._records.commit()
            await bring_in(attached)
            await attached.start(self._nursery)
            if attached.fault is not None:
                await attached.end()
                raise ForebayError(
                    f"'{attached.name}' cannot be attached: a fault of Forebay itself "
                    f"({in_short(attached.fault)}): the log says more"
                )
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._undo(attached, kept)
            raise

    async def _undo(self, attached: Attached, kept: Kept | None) -> None:
        self._disks.remove(attached)
        self._records.put(attached.name, None)
        self._kept.put(attached.name, kept)
        with contextlib.suppress(OSError, CacheError):
            await attached.disk.close(discard=True, keep=kept is not None)
        with contextlib.suppress(ForebayError):
            await self._records.commit()

    # -- a disk on record

    async def resume(self, earlier: EarlierSockets) -> None:
        """Bring back the disks on record, each whether or not its origin can be reached, and their clients."""
        self._kept.finish()
        known = self._records.all()
        left = {name: record for name, record in known.items() if record.leaving}
        await self._finish_leaving(left)
        for name in left:
            del known[name]
        for name, record in known.items():
            if record.keeps:
                await self.follow(name, record)
                known[name] = record.followed()
        await run_all(partial(self._resume, *one, earlier) for one in known.items())
        earlier.drop_rest("it is not served")

    async def bring_back(self, name: str, record: DiskRecord) -> None:
        """Bring back a disk that was taken down. One that cannot be, or whose conflict stands, is shown as such."""
        await self._resume(name, record, EarlierSockets())

    async def follow(self, name: str, record: DiskRecord) -> None:
        """Have the cache follow what was decided about a conflict, and is on record.

        No disk is on the image, unless others have gone on with it before.
        """
        drops_own, has_moved = record.keeps == "image", not record.is_behind
        self._images.follow(name, record.key, drops_own=drops_own, has_moved=has_moved)
        self._records.put(name, record.followed())
        try:
            await self._records.commit()
        except ForebayError as fault:
            log.warning("%s: what was resolved is not on record yet: %s", name, fault)

    async def _finish_leaving(self, left: dict[str, DiskRecord]) -> None:
        """Forget the disks whose detach was decided in the process before this one, and give back what that owed."""
        for name, record in left.items():
            tell("detach", "detached, as was begun before", name, image=record.key)
            self._images.drop_disk(name, record.key)
            self._records.put(name, None)
            if record.writes:
                with contextlib.suppress(ForebayError):  # of a store that is no longer configured
                    self._returns.owe(self.source_of(name, record), record.write())
        if left:
            try:
                await self._records.commit()
            except ForebayError as fault:
                log.warning("the disks that were detached are still on record: %s", fault)
        await run_all(partial(self._give_back, owed) for owed in self._returns.owed())

    async def _give_back(self, owed: Owed) -> None:
        """One try before disks are on their images again, which would keep it from being done; the rest later."""
        with contextlib.suppress(ForebayError):  # of a store that is no longer configured
            source = self.source_of(owed.disk, DiskRecord.read(dict(owed.record)))
            await self._returns.give_back(source, drop_checkpoint=owed.drop_checkpoint)

    async def _resume(self, name: str, record: DiskRecord, earlier: EarlierSockets) -> None:
        """A disk that cannot be brought back is shown as such; the others are not kept from coming."""
        await next_turn()  # after a start many come at once
        if record.conflict:
            self._disks.add(self._absent(name, record, record.conflict))
            return
        if record.committing:
            why = f"its changes are being written to its image: 'forebay commit {name}' waits for that"
            self._disks.add(self._absent(name, record, why))
            return
        try:
            await self._bring_back(name, record, earlier)
        except (ForebayError, OSError, CacheError) as fault:
            tell_not_served(name, record, str(fault))
            self._disks.add(self._absent(name, record, str(fault)))
        except Exception as fault:
            if breaks_the_cache(fault):
                raise
            why = f"a fault of Forebay itself ({in_short(fault)}): its data is kept, and the log says more"
            tell_not_served(name, record, why, fault)
            self._disks.add(self._absent(name, record, why))

    def _absent(self, name: str, record: DiskRecord, why: str) -> Absent:
        return Absent(name, record, why, partial(left_dirty, self._cache, name))

    async def _bring_back(self, name: str, record: DiskRecord, earlier: EarlierSockets) -> None:
        source, settings = self.source(name, record, record.size)
        if source.key != record.key:
            raise ForebayError(
                f"{record.image} now means {source.key} and meant {record.key}: "
                "give the store its old name and path, or detach the disk"
            )
        is_file = isinstance(source.address, FileAddress)
        if is_file and source.shown_format == RAW and source.use.shows_raw:
            self._formats.remember(source.key, source.size)
        attached = await self._opened(record, source, settings)
        await next_turn()
        attached.listener.tenant.recall()
        await attached.start(self._nursery, earlier.take(name))
        self._disks.add(attached)

    async def set_rule(self, attached: Attached, rule: Rule) -> None:
        """Have the disk be for the processes that `rule` names, and put that on record. Raises ForebayError."""
        record = attached.record.with_rule(rule)
        image = resolve(self._config, record.image)
        await self._records.change(attached.name, attached.record, record)
        attached.disk.adopt(record.settings(self._config, image.store))
        tenant = attached.listener.tenant
        tenant.rule = record.rule(attached.disk.settings)
        tenant.release()
        attached.record = record

    # -- both

    def source(
        self,
        name: str,
        record: DiskRecord,
        size: int | None,
        *,
        is_base: bool = False,
        comes_back: bool = False,
    ) -> tuple[Source, DiskSettings]:
        """The source of the disk, and its settings. `size` in bytes, as recorded; None: not known yet. `is_base` and
        `comes_back`: as `Use` has it.

        Raises ForebayError for an image that may not be attached.
        """
        image = in_format(resolve(self._config, record.image), record.format)
        settings = record.settings(self._config, image.store)
        use = Use(
            name,
            self._cache.uuid,
            record.read_only,
            record.overlay and not record.committing,
            record.keep,
            comes_back,
            need_locks=settings.require_locks,
            refresh=settings.on_change == "refresh",
            as_bytes=record.format == RAW,
            is_coming=record.comes(self._left_by(name)),
            is_base=is_base,
        )
        source = Source(
            image,
            record.image,
            use,
            threads=self.threads_of(image.store or image.key),
            timeout=settings.origin_timeout,
            nursery=self._nursery,
            size=size,
            left_by=self._left_by,
            formats=self._formats,
            servers=self._servers,
        )
        if record.handover == Phase.RELEASED and not (record.overlay or self._left_by(name)):
            source.withheld = "it was handed over to another host"
        return source, settings

    async def reader_of(self, image: str) -> Source:
        """The source of a warm, which reads the image as an overlay does. Raises ForebayError."""
        wanted = DiskRecord(image, "", 0, overlay=True)
        found = await format_of(self.source(WARMING, wanted, None)[0])
        return self.source(WARMING, wanted.in_format(found), None)[0]

    def base(self, image: str, size: int | None) -> tuple[Source, DiskSettings]:
        """The source of an image for who reads it by its store's socket, and its settings. `size` as in `source`.

        Unless the configuration says something else, what boots read of it is brought in. Raises ForebayError.
        """
        store = resolve(self._config, image).store
        preload = None if self._config.says_preload(store) else "trace"
        record = DiskRecord(image, "", 0, read_only=True, format="raw")
        record = record.with_settings({"preload": preload})
        source, settings = self.source(image, record, size, is_base=True)
        mode = Mode.NONE if settings.mode is Mode.NONE else Mode.WRITE_THROUGH
        return source, settings.model_copy(update={"mode": mode})

    def threads_of(self, store: str) -> StoreThreads:
        """The threads of a store, or of a device, and its process."""
        if store not in self._threads:
            process = StoreProcess(store, self._config.gateway.run, is_local)
            self._threads[store] = StoreThreads(store, process=process)
        return self._threads[store]

    def source_of(self, name: str, record: DiskRecord) -> Source:
        """The source of a disk on record. Raises ForebayError."""
        return self.source(name, record, record.size)[0]

    def _left_by(self, disk: str) -> int:
        """Bytes that the cache has of a disk of that name which is not attached."""
        return 0 if self._disks.is_attached(disk) else left_dirty(self._cache, disk)[0]

    async def _opened(self, record: DiskRecord, source: Source, settings: DiskSettings) -> Attached:
        disk = await Disk.open(self._images, source, settings)
        disk.adopt(record.settings(self._config, source.address.store))  # it may be another by now
        gateway = self._config.gateway
        tenant = Tenant(source.use.disk, gateway.run, record.rule(settings))
        path = socket_path(gateway.run, source.use.disk)
        listener = Listener(disk, path, gateway, tenant, self._memory)
        boots = (
            None if source.withheld or source.kept_back else self._boots
        )  # no VM boots that comes from elsewhere
        attached = Attached(record, source, disk, listener, boots)
        detach = lambda one: self._nursery.start_soon(self._give_way, one)  # noqa: E731
        add_handover(attached, self._records, detach)
        return attached
