"""The daemon's wiring: which disks there are, how they come, change and go."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import trio

from forebay.checkpoint.dirty import left_dirty
from forebay.config.model import Config, DiskSettings
from forebay.control.metrics import metrics_text
from forebay.daemon.attached import Absent, Attached, Record
from forebay.daemon.process import run_process
from forebay.daemon.together import Progress, Shares, together
from forebay.disk.disk import Disk
from forebay.doors.listener import Listener, socket_path
from forebay.doors.restart import EarlierSockets, Sockets, leave_sockets
from forebay.errors import ForebayError
from forebay.image.image import Images
from forebay.image.source import Source
from forebay.image.use import Use
from forebay.origin.addresses import resolve
from forebay.origin.threads import StoreThreads, bounded
from forebay.storage.upkeep import Upkeep
from forebay.units import Mode, did_you_mean, format_size, parse_name
from forebay_cache import Cache, CacheError, extend

log = logging.getLogger("forebay.daemon")

Status = dict[str, Any]

CLIENTS_SECONDS = 20.0
"""How long requests in flight have at detach and at stop. Then their clients are cut off; they repeat what was not
answered. Below systemd's usual 90 s for the whole stop."""

RESTART_SECONDS = 0.25
"""How long a restart waits for requests in flight, and for stores: guests wait meanwhile, and what has no answer then
is done by the next process."""

RELEASE_SECONDS = 10.0
"""How long a store may take to give an image back. The marker that stays behind then is ours to take again."""


@dataclass(eq=False)
class _Coming:
    """An attach on its way."""

    source: Source
    ended: trio.Event = field(default_factory=trio.Event)


def _exclude(one: Source, other: Source) -> bool:
    """Whether only one of the two can be served: both are of one image, and one of them writes it."""
    return (one.use.writes or other.use.writes) and one.same_image(other)


class Gateway:
    """All disks over one cache. Methods raise ForebayError (one line: what, and what to do) and OSError."""

    def __init__(self, config: Config, cache: Cache, nursery: trio.Nursery) -> None:
        """`nursery` is the one long-lived nursery of the process; `cache` is running in it."""
        self.config = config
        self._cache = cache
        self._nursery = nursery
        self._images = Images(cache, nursery)
        self._disks: dict[str, Attached | Absent] = {}
        self._coming: dict[str, _Coming] = {}
        self._threads: dict[str, StoreThreads] = {}
        self._extending = trio.Lock()
        self._upkeep = Upkeep(cache, lambda: [one.disk.image for one in self.attached()])

    # ------------------------------------------------------------------------------------------------------ attaching

    async def attach(
        self,
        name: str,
        image: str,
        *,
        mode: Mode | None = None,
        cache_size: int | None = None,
        preload: int | str | None = None,
        read_only: bool = False,
        overlay: bool = False,
    ) -> Status:
        """Serve an image as a disk; None stands for what the store says. The disk's status."""
        self._check_new(name, read_only, overlay)
        path = socket_path(self.config.gateway.run, name)
        chosen = mode.value if mode else None
        record = Record(image, "", 0, read_only, overlay, chosen, cache_size, preload)
        source, settings = self._source(name, record, None)
        async with self._arriving(name, source):
            await _prepared(source)
            source.check_safe(settings.mode)
            self._check_alone(source)
            record = Record(
                image, source.key, source.size, read_only, overlay, chosen, cache_size, preload
            )
            attached = await self._opened(record, source, settings, path)
            self._disks[name] = attached
            try:
                await source.close_prepared()
                self._cache.records.put("disk", name, record.write())
                await self._commit()
                await attached.start(self._nursery)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._undo(attached)
                raise
        log.info("%s: %s attached, %s", name, source.key, settings.mode)
        return attached.status()

    def _check_new(self, name: str, read_only: bool, overlay: bool) -> None:
        try:
            parse_name(name)
        except ValueError as fault:
            raise ForebayError(str(fault)) from None
        self._check_name_free(name)
        if read_only and overlay:
            raise ForebayError("a disk is either read-only or an overlay: leave one of the two out")

    def _check_name_free(self, name: str) -> None:
        if name in self._disks or name in self._coming:
            raise ForebayError(
                f"there is a disk '{name}' already: detach it, or choose another name"
            )

    @contextlib.asynccontextmanager
    async def _arriving(self, name: str, source: Source) -> AsyncIterator[None]:
        """Hold name and image against another attach meanwhile; let the image go if this one fails.

        Another one that is on its way to the same image has to come to its end first: it may fail.
        """
        while others := [one for one in self._coming.values() if _exclude(one.source, source)]:
            await others[0].ended.wait()
        self._check_name_free(name)
        self._check_alone(source)
        coming = self._coming[name] = _Coming(source)
        try:
            yield
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(OSError):
                await source.abandon()
            raise
        finally:
            del self._coming[name]
            coming.ended.set()

    def _check_alone(self, source: Source) -> None:
        """Within this gateway an image has one writing disk, or any number of others."""
        attached = [one.source for one in self._disks.values() if isinstance(one, Attached)]
        for other in (*attached, *(one.source for one in self._coming.values())):
            if other is source or not _exclude(other, source):
                continue
            if other.use.writes:
                raise ForebayError(
                    f"{source.key} is written by disk '{other.use.disk}': detach that first"
                )
            raise ForebayError(
                f"{source.key} is in use by disk '{other.use.disk}', which needs it unchanged: "
                "detach that first, or attach with --overlay or --read-only"
            )

    def _source(self, name: str, record: Record, size: int | None) -> tuple[Source, DiskSettings]:
        image = resolve(self.config, record.image)
        settings = record.settings(self.config, image.store)
        place = image.store or image.key
        threads = self._threads.setdefault(place, StoreThreads(place))
        use = Use(
            name,
            self._cache.uuid,
            record.read_only,
            record.overlay,
            need_locks=settings.require_locks,
            refresh=settings.on_change == "refresh",
        )
        source = Source(
            image,
            record.image,
            use,
            threads=threads,
            timeout=settings.origin_timeout,
            nursery=self._nursery,
            size=size,
            left_by=self._left_by,
        )
        return source, settings

    def _left_by(self, disk: str) -> int:
        served = isinstance(self._disks.get(disk), Attached) or disk in self._coming
        return 0 if served else left_dirty(self._cache, disk)[0]

    async def _opened(
        self, record: Record, source: Source, settings: DiskSettings, path: Path
    ) -> Attached:
        disk = await Disk.open(self._images, source, settings)
        return Attached(record, source, disk, Listener(disk, path, self.config.gateway))

    async def _undo(self, attached: Attached) -> None:
        del self._disks[attached.name]
        self._cache.records.put("disk", attached.name, None)
        with contextlib.suppress(OSError, CacheError, ForebayError):
            await attached.disk.close(discard=True)
            await self._commit()

    async def resume(self, earlier: EarlierSockets) -> None:
        """Bring back the disks on record, each whether or not its origin can be reached, and their clients."""
        known = self._cache.records.all("disk")
        await together(
            partial(self._resume, name, Record.read(known[name]), earlier) for name in sorted(known)
        )
        earlier.drop_rest("it is not served")

    async def _resume(self, name: str, record: Record, earlier: EarlierSockets) -> None:
        try:
            await self._bring_back(name, record, earlier)
        except (ForebayError, OSError, CacheError) as fault:
            log.error("disk '%s' is not served: %s", name, fault)
            self._disks[name] = Absent(
                name, record, str(fault), partial(left_dirty, self._cache, name)
            )

    async def _bring_back(self, name: str, record: Record, earlier: EarlierSockets) -> None:
        path = socket_path(self.config.gateway.run, name)
        source, settings = self._source(name, record, record.size)
        if source.key != record.key:
            raise ForebayError(
                f"{record.image} now means {source.key} and meant {record.key}: "
                "give the store its old name and path, or detach the disk"
            )
        attached = await self._opened(record, source, settings, path)
        await attached.start(self._nursery, earlier.take(name))
        self._disks[name] = attached

    # ------------------------------------------------------------------------------------------------------ detaching

    async def detach(
        self, name: str, *, discard: bool = False, force: bool = False, progress: Progress
    ) -> None:
        """Write back what is dirty (or drop it, `discard`), stop serving, forget the disk."""
        disk = self._disks.get(name)
        if isinstance(disk, Absent):
            await self._forget_absent(disk, discard)
            return
        attached = self._attached(name)
        async with attached.busy:
            self._attached(name)
            _check_unused(attached, force)
            if not discard:
                await attached.disk.drain(progress)
                _check_unused(attached, force)
            await self._shut(attached, discard)
            with trio.CancelScope(shield=True):
                await self._forget(attached, discard)
        log.info("%s: detached", name)

    async def _shut(self, attached: Attached, discard: bool) -> None:
        """Hang up, and write back what came until then. If that fails, accept clients again."""
        try:
            with trio.CancelScope(shield=True):
                await attached.listener.shut(CLIENTS_SECONDS)
            if not discard and attached.disk.status()["dirty_bytes"]:
                await attached.disk.drain(lambda _done, _total: None)
        except BaseException:
            with trio.CancelScope(shield=True):
                await attached.listener.open(self._nursery)
            raise

    async def _forget(self, attached: Attached, discard: bool) -> None:
        await attached.rest()
        await attached.disk.close(discard=discard)
        del self._disks[attached.name]
        self._cache.records.put("disk", attached.name, None)
        await self._commit()
        try:
            with bounded(RELEASE_SECONDS, "giving the image back"):
                await attached.source.release()
        except (OSError, ForebayError) as fault:
            log.warning("%s: its owner marker stays: %s", attached.name, fault)

    async def _forget_absent(self, disk: Absent, discard: bool) -> None:
        if not discard:
            raise ForebayError(
                f"'{disk.name}' is not served ({disk.why}): put that right and restart, "
                "or detach it with --discard and lose what only the cache has"
            )
        del self._disks[disk.name]
        self._images.drop_disk(disk.name, disk.record.key)
        self._cache.records.put("disk", disk.name, None)
        await self._commit()

    # ------------------------------------------------------------------------------------------- asking and changing

    def _attached(self, name: str) -> Attached:
        found = self._disks.get(name)
        if isinstance(found, Attached):
            return found
        if found is not None:
            raise ForebayError(f"'{name}' is not served: {found.why}")
        raise ForebayError(f"no disk '{name}'{did_you_mean(name, self._disks)}: see forebay status")

    def attached(self) -> list[Attached]:
        """The disks that are served."""
        return [one for one in self._disks.values() if isinstance(one, Attached)]

    def status(self, name: str | None = None) -> list[Status]:
        """All disks by name, or the one."""
        if name is None:
            return [self._disks[one].status() for one in sorted(self._disks)]
        if name not in self._disks:
            self._attached(name)
        return [self._disks[name].status()]

    async def flush(
        self, names: list[str] | None, *, timeout: float | None = None, progress: Progress
    ) -> None:
        """Return when each of these disks (None: all) has written back what was dirty. `timeout` in seconds."""
        if names is None:
            disks = [one for one in self._disks.values() if isinstance(one, Attached)]
        else:
            disks = [self._attached(name) for name in names]
        shares = Shares(len(disks), progress)
        with trio.move_on_after(timeout if timeout is not None else float("inf")) as scope:
            await together(partial(one.disk.drain, shares.of(i)) for i, one in enumerate(disks))
        if scope.cancelled_caught:
            left = sum(one.disk.status()["dirty_bytes"] for one in disks)
            raise ForebayError(
                f"{format_size(left)} are still dirty after {timeout:g} s: give it more time"
            )

    async def set_mode(self, name: str, mode: Mode, progress: Progress) -> Status:
        """Change how a disk reads and writes, also while clients are connected. The disk's status."""
        attached = self._attached(name)
        async with attached.busy:
            self._attached(name)
            await attached.disk.set_mode(mode, progress)
            attached.record = attached.record.with_mode(mode)
            self._cache.records.put("disk", name, attached.record.write())
            await self._commit()
        return attached.status()

    async def preload(self, name: str, amount: int | str, progress: Progress) -> None:
        """Bring in bytes from the start, `trace`, or `all`."""
        await self._attached(name).disk.preload(amount, progress)

    def cache_info(self) -> dict[str, Any]:
        """The cache device and what it holds."""
        return self._cache.info()

    async def extend_cache(self, size: int | None, progress: Progress) -> dict[str, Any]:
        """Use all of the cache device, after making it `size` bytes where it is a file. What the cache is then."""
        async with self._extending:
            try:
                await extend(self._cache, size, progress)
            except CacheError as fault:
                raise ForebayError(str(fault)) from None
        log.info("the cache has %s now", format_size(self._cache.device.layout.size))
        return self._cache.info()

    async def release_cache(self, progress: Progress) -> dict[str, Any]:
        """Write back all that is dirty, and make sure that nobody needs this cache; whom to end then."""
        busy = [one["name"] for one in self.status() if one["clients"]]
        if busy:
            raise ForebayError(f"in use: {', '.join(busy)}: stop the VMs and detach these disks")
        await self.flush(None, progress=progress)
        names = sorted({*self._disks, *self._coming})
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

    def metrics(self) -> str:
        """Prometheus text."""
        return metrics_text(self.status(), self.cache_info())

    async def _commit(self) -> None:
        try:
            await self._cache.commit.records()
        except (OSError, CacheError, lmdb.Error) as fault:
            raise ForebayError(
                f"{self.config.gateway.state / 'index'} cannot be written ({fault}): make room there"
            ) from fault

    # ------------------------------------------------------------------------------------------------------- the end

    async def stop(self, *, restart: bool = False) -> bool:
        """Answer what is in flight, hang up, end all work. Bounded; what is dirty stays in the cache, durably.

        `restart`: do not hang up, but leave the sockets with the service manager; clients wait, so it takes no longer
        than it must. Whether the manager took them.
        """
        disks = self.attached()
        patience = RESTART_SECONDS if restart else RELEASE_SECONDS
        if restart:
            await self._commit()  # most of it while clients are served
            restart = await self._leave_sockets(disks)
        else:
            await together(partial(one.listener.shut, CLIENTS_SECONDS) for one in disks)
        for one in disks:
            await one.rest()
        with trio.move_on_after(patience):
            await together(partial(self._last_look, one) for one in disks)
        await self._commit()
        with trio.move_on_after(patience):
            await together(partial(self._let_go, one) for one in disks)
        return restart

    async def _leave_sockets(self, disks: list[Attached]) -> bool:
        """What was acknowledged is in the journal: whatever happens from here on, the next process finds it."""
        began = trio.current_time()
        suspended: dict[str, Sockets] = {}

        async def suspend(one: Attached) -> None:
            suspended[one.name] = await one.listener.suspend(RESTART_SECONDS)

        await together(partial(suspend, one) for one in disks)
        count = sum(len(sockets.clients) for sockets in suspended.values())
        if not leave_sockets(suspended):
            return False
        took = 1000 * (trio.current_time() - began)
        log.info("handed over: %d disks, %d clients, in %.0f ms", len(disks), count, took)
        return True

    async def _last_look(self, one: Attached) -> None:
        """Take down what the image looks like after our own writes, so that the next start notices those of others."""
        try:
            await one.disk.image.look()
        except OSError as fault:
            log.info("%s: its image could not be looked at: %s", one.name, fault)

    async def _let_go(self, one: Attached) -> None:
        with contextlib.suppress(OSError, ForebayError):  # the lock ends with the process
            await one.source.leave()


async def _prepared(source: Source) -> None:
    try:
        await source.prepare()
    except OSError as fault:
        raise ForebayError(
            f"{source.label}: {fault.strerror or fault}: see that its storage answers, then try again"
        ) from fault


def _check_unused(attached: Attached, force: bool) -> None:
    clients = attached.listener.clients
    if clients and not force:
        plural = "client is" if clients == 1 else "clients are"
        raise ForebayError(
            f"{clients} {plural} connected to '{attached.name}': shut the VM down, or use --force"
        )


# ---------------------------------------------------------------------------------------- the process


def serve(config: Config, state: Path | None = None, run: Path | None = None) -> int:
    """Run the daemon until SIGTERM or SIGINT; 0. `state` and `run` overrule the configuration.

    Raises ForebayError when it cannot start.
    """
    return run_process(config, state, run, Gateway)
