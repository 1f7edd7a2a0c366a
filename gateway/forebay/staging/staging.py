# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the daemon does of staging: it makes torrents, keeps orders, and tells the process that carries them out.

That process, `forebay stager`, is a client: it asks for the orders once a second, and says how far they are.
"""

import base64
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from forebay.checkpoint.counters import Counters
from forebay.checkpoint.steps import Progress
from forebay.config.model import Config
from forebay.errors import ForebayError, advice
from forebay.image.boundary import Boundary
from forebay.origin.threads import StoreThreads
from forebay.sidecar.files import identity
from forebay.staging import files, making, orders
from forebay.staging.orders import MOST_ORDERS, Order, Report
from forebay.staging.served import StagedImage, StagingListener, address_of
from forebay.staging.torrent import encoded
from forebay.stores.served import Attaching
from forebay.units import format_size
from forebay_cache import Cache
from forebay_cache.format.geometry import BLOCK, SECTOR
from forebay_nbd import Budgets, Export, Refused

log = logging.getLogger("forebay.staging")

SILENT_SECONDS = 15.0
"""After so long without a word the process that stages counts as away."""

Told = dict[str, Any]


class _Work:
    """Holds an image for work of the daemon's own, which ends when the image has to be let go."""

    export: Export | None = None

    def __init__(self) -> None:
        self.scope = trio.CancelScope()

    def abort(self) -> None:
        """Implements Holder."""
        self.scope.cancel()


class Staging:
    """All that is staged on this host. Methods raise ForebayError and OSError."""

    def __init__(
        self,
        config: Config,
        cache: Cache,
        nursery: trio.Nursery,
        attaching: Attaching,
        threads_of: Callable[[str], StoreThreads],
        memory: Budgets,
    ) -> None:
        """`nursery` is the one long-lived nursery of the process; `memory` is what all clients together may hold."""
        self._config = config
        self._cache = cache
        self._nursery = nursery
        self._listener = StagingListener(config, threads_of, attaching, nursery, memory)
        self._orders: dict[str, Order] = {}
        self._reports: dict[str, Report] = {}
        self._changed = random.getrandbits(40)
        """Another number whenever the orders change, and after each start."""
        self._saving = trio.Lock()
        self._is_open = False

    # -- from start to end

    async def resume(self) -> None:
        """Go on with what was ordered before. Raises nothing that is expected."""
        try:
            found = await trio.to_thread.run_sync(orders.load, self._state)
        except (OSError, ValueError) as fault:
            log.warning("%s is not used: %s", self._state / orders.FILE, fault)
            return
        self._orders = {one.image: one for one in found}
        if found:
            try:
                await self._open()
            except ForebayError as fault:
                log.error("nothing is staged: %s", fault)

    @property
    def _state(self) -> Path:
        return self._config.gateway.state

    async def _open(self) -> None:
        """Have the socket there: it is made when something is staged for the first time."""
        if not self._is_open:
            self._is_open = True
            boundary = Boundary(self._nursery, "staging", lambda _fault: self.hang_up())
            try:
                await self._listener.open(boundary)
            except BaseException:
                self._is_open = False
                raise

    def hang_up(self) -> None:
        """Give up on the clients, and on what they wait for, at once."""
        self._listener.hang_up()
        self._listener.leave_to_the_end()

    # -- torrents

    async def make(self, image: str, progress: Progress) -> Told:
        """Have a torrent beside the image that fits, made if there is none; what is told of it."""
        async with self._held(image) as held, held.making:
            made = held.pieces is None or held.pieces.why_stale() is not None
            counters = Counters()
            if made:
                await self._make(held, counters, progress)
            pieces = held.require_pieces()
            torrent = pieces.torrent
            return {
                "image": held.key,
                "size": torrent.size,
                "path": files.place(held.address),
                "pieces": torrent.pieces,
                "piece_bytes": torrent.piece_length,
                "made": made,
                "origin_read_bytes": counters.origin_read_bytes,
            }

    async def _make(self, held: StagedImage, counters: Counters, progress: Progress) -> None:
        assert held.disk is not None
        before = await held.in_thread(partial(identity, held.address))
        torrent = await making.make(held.disk, before, counters, progress)
        keep = partial(files.keep, held.address, torrent, self._cache.uuid)
        try:
            await held.in_thread(keep)
        except OSError as fault:
            raise ForebayError(
                f"{files.place(held.address)} cannot be written: {fault.strerror or fault}: stage from a host whose "
                "daemon may write beside the image"
            ) from fault
        await held.opened(held.disk)

    async def torrent(self, image: str) -> Told:
        """The torrent of an image, for the process that stages."""
        async with self._held(image) as held:
            torrent = held.require_pieces().torrent
            data = await trio.to_thread.run_sync(encoded, torrent)
            return {"image": held.key, "torrent": base64.b64encode(data).decode()}

    async def lacking(self, image: str) -> Told:
        """The runs of pieces, [first, how many], that the cache lacks."""
        async with self._held(image) as held:
            pieces = held.require_pieces()
            lacking = await pieces.lacking()
            return {"image": held.key, "pieces": pieces.torrent.pieces, "lacking": lacking}

    @contextlib.asynccontextmanager
    async def _held(self, image: str) -> AsyncIterator[StagedImage]:
        """Around work with an image, attached."""
        key = address_of(self._config, image).key
        work = _Work()
        try:
            held = await self._listener.hold(key, work)
        except Refused as refused:
            raise ForebayError(refused.reason) from None
        assert isinstance(held, StagedImage)
        try:
            with work.scope:
                try:
                    yield held
                except Refused as refused:
                    raise ForebayError(refused.reason) from None
                except OSError as fault:
                    raise ForebayError(
                        f"{key}: {fault.strerror or fault}: {advice(fault, 'try again')}"
                    ) from fault
        finally:
            held.release(work)
        if work.scope.cancelled_caught:
            raise ForebayError(f"{key} was wanted by a disk meanwhile: stage it again later")

    # -- orders

    async def order(
        self, image: str, peers: Iterable[tuple[str, int]], *, source: bool, rate: int | None
    ) -> Told:
        """Stage an image with these hosts from now on; or go on with it, with these as well. What is told of it.

        Two commands may stage it at one time, each to hosts of its own: neither takes those of the other away.
        """
        await self._open()
        async with self._held(image) as held:
            await held.look_again()
            pieces = held.require_pieces()
            key, size = held.key, pieces.size
            lacking = sum(count for _, count in await pieces.lacking())
            # what lacks is not to drive out what is there; who only gives has the store for that
            there = 0 if source else pieces.stored_bytes
            self._check_room(key, there + lacking * pieces.torrent.piece_length)
        order = Order(key, size, tuple(peers), source, rate).after(self._orders.get(key))
        await self._keep(key, order)
        return self._told(order)

    def _check_room(self, key: str, needed: int) -> None:
        """Raise ForebayError where the cache cannot hold so many bytes."""
        room = self._cache.device.slots * BLOCK
        if needed > room:
            raise ForebayError(
                f"{key} needs {format_size(needed)} of the cache here, which has {format_size(room)}: make it larger "
                "('forebay cache extend')"
            )

    async def end(self, image: str) -> Told:
        """Stage an image no more. What came stays in the cache."""
        # an order may be for a store that the configuration does not have any more
        key = image if image in self._orders else address_of(self._config, image).key
        ended = await self._keep(key, None)
        self._reports.pop(key, None)
        return {"image": key, "ended": ended}

    async def _keep(self, key: str, order: Order | None) -> bool:
        """Have that order for an image, or none, when that is kept; where it cannot be, all stays as it was.

        False where there was none before either. What is so already is not written. Raises ForebayError.
        """
        async with self._saving:
            if order is None and key not in self._orders:
                return False
            if order is not None and self._orders.get(key) == order:
                return True
            changed = {one: it for one, it in self._orders.items() if one != key}
            if order is not None:
                changed[key] = order
            if len(changed) > max(MOST_ORDERS, len(self._orders)):
                raise ForebayError(
                    f"{MOST_ORDERS} images are staged: end one with 'forebay stage IMAGE --end'"
                )
            try:
                await trio.to_thread.run_sync(orders.save, self._state, list(changed.values()))
            except OSError as fault:
                raise ForebayError(
                    f"{self._state / orders.FILE} cannot be written: {fault.strerror or fault}: "
                    f"{advice(fault, 'nothing is changed, try again')}"
                ) from fault
            self._orders, self._changed = changed, self._changed + 1
            return True

    def report(self, rows: Iterable[Told], known: int | None) -> Told:
        """Take in what the process that stages says of each order; the orders.

        Without their hosts, which may be many, where nothing has changed since the answer that had the number `known`.
        """
        for row in rows:
            if row["image"] in self._orders:
                facts = {key: row[key] for key in ("state", "reason", "down", "up", "connected")}
                self._reports[row["image"]] = Report(**facts, at=trio.current_time())
        told = [one.told() | {"stale": self._why_stale(one)} for one in self._orders.values()]
        if known == self._changed:
            for one in told:
                del one["peers"]
        return {"orders": told, "known": self._changed}

    def _served(self, order: Order) -> StagedImage | None:
        """The image, while somebody has it."""
        served = (x for x in self._listener.served() if x.key == order.image)
        return next((x for x in served if isinstance(x, StagedImage)), None)

    def _why_stale(self, order: Order) -> str | None:
        """Why whoever has its pieces has to let them go."""
        held = self._served(order)
        return held.pieces.why_stale() if held is not None and held.pieces is not None else None

    # -- what is told

    def status(self) -> list[Told]:
        """What is told of each order: the keys of `forebay stage --json`."""
        return [self._told(one) for _, one in sorted(self._orders.items())]

    def _told(self, order: Order) -> Told:
        layer = self._cache.layers.clean_of(order.image)
        cached = min(layer.sectors * SECTOR, order.size) if layer is not None else 0
        report = self._reports.get(order.image, Report())
        state, reason = report.state, report.reason
        if trio.current_time() - report.at > SILENT_SECONDS:
            report = Report()
            state, reason = "waiting", "nothing stages here: start forebay-stage.service"
        if cached >= order.size:
            state = "done"
        held = self._served(order)
        pieces = held.pieces if held is not None else None
        return {
            "image": order.image,
            "size": order.size,
            "state": state,
            "reason": None if state == "done" else reason,
            "cached_bytes": cached,
            "down_bytes_a_second": report.down,
            "up_bytes_a_second": report.up,
            "hosts": len(order.peers),
            "connected": report.connected,
            "source": order.source,
            "origin_read_bytes": held.disk.counters.origin_read_bytes if held and held.disk else 0,
            "refused_pieces": pieces.refused_pieces if pieces is not None else 0,
        }
