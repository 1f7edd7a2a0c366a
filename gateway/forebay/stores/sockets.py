# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The sockets of all stores that have one: opened at the start, left for the next process at a restart."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from forebay.config.model import Config
from forebay.doors.restart import EarlierSockets, Sockets
from forebay.errors import ForebayError
from forebay.image.boundary import Boundary, in_short
from forebay.image.image import Image
from forebay.origin.threads import StoreThreads
from forebay.stores.listener import StoreListener
from forebay.stores.listing import Listing
from forebay.stores.served import Attaching, ServedImage
from forebay_nbd import Budgets

log = logging.getLogger("forebay.stores")

MARK = "@"
"""What the name of a store begins with, among those of disks, for whoever keeps sockets over a restart."""


class StoreSockets:
    """Of all stores. A store whose socket cannot be made has none, and keeps no other from having one."""

    def __init__(
        self,
        config: Config,
        nursery: trio.Nursery,
        attaching: Attaching,
        threads_of: Callable[[str], StoreThreads],
        memory: Budgets,
    ) -> None:
        """`nursery` is the one long-lived nursery of the process. `memory` is what all clients together may hold."""
        self._config = config
        self._nursery = nursery
        self._attaching = attaching
        self._threads_of = threads_of
        self._memory = memory
        self._listeners: dict[str, StoreListener] = {}
        self._roots: dict[str, Path] = {}
        """By store, the directory that is shown there."""
        self._failed: dict[str, str] = {}
        """By store, why it has no socket."""

    # -- from start to end

    def take(self, earlier: EarlierSockets) -> dict[str, Sockets]:
        """The sockets that the process before has left, by store."""
        wanted = (name for name, store in self._config.stores.items() if store.socket)
        return {name: earlier.take(MARK + name) for name in wanted}

    async def open(self, earlier: dict[str, Sockets]) -> None:
        """Accept clients, and go on with those of the process before. Raises nothing that is expected."""
        for name, sockets in earlier.items():
            try:
                await self._open(name, sockets)
            except ForebayError as fault:
                self._failed[name] = str(fault)
                log.error("store '%s' has no socket: %s", name, fault)

    async def _open(self, name: str, sockets: Sockets) -> None:
        root = self._roots[name] = self._config.store(name).path
        listing = Listing(root, self._threads_of(name))
        make = partial(_made, self._attaching)
        try:
            listener = StoreListener(self._config, name, listing, make, self._nursery, self._memory)
        except ForebayError:
            sockets.hang_up()
            raise
        boundary = Boundary(self._nursery, f"store '{name}'", partial(self._fail, name))
        self._listeners[name] = listener
        try:
            await listener.open(boundary, sockets)
        except ForebayError:
            del self._listeners[name]
            raise

    # -- the configuration changes

    def check(self, new: Config) -> None:
        """Raise ForebayError where clients read by a socket that goes with that configuration."""
        for name, listener in self._listeners.items():
            if listener.clients and not self._stays(name, new):
                raise ForebayError(
                    f"clients read images of store '{name}' by its socket ('forebay stores' shows them): end these "
                    "first, or keep the store as it is"
                )

    def _stays(self, name: str, new: Config) -> bool:
        """True if the socket that the store has now is right in that configuration."""
        store = new.stores.get(name)
        return store is not None and store.socket and store.path == self._roots[name]

    async def follow(self) -> None:
        """Close and open sockets, as the configuration says now. Raises nothing that is expected."""
        for name in [x for x in self._listeners if not self._stays(x, self._config)]:
            listener = self._listeners.pop(name)
            await listener.shut(0)
            for image in listener.served():
                image.leave_at_once()
        wanted = [name for name, store in self._config.stores.items() if store.socket]
        self._failed = {name: why for name, why in self._failed.items() if name in wanted}
        await self.open({name: Sockets() for name in wanted if name not in self._listeners})

    def _fail(self, name: str, fault: Exception) -> None:
        """A fault of Forebay itself has ended the socket of that store."""
        self._failed[name] = (
            f"a fault of Forebay itself ({in_short(fault)}): restart the daemon; the log says more"
        )
        listener = self._listeners.pop(name, None)
        if listener is not None:
            listener.hang_up()

    def hang_up(self) -> None:
        """Give up on all clients, and on what they wait for, at once."""
        for one in self._listeners.values():
            one.hang_up()
            one.leave_to_the_end()

    def shutting(self, seconds: float) -> list[Callable[[], Any]]:
        """What has to be called and awaited, for each store, to end it: clients have so many seconds."""
        return [partial(_shut, one, seconds) for one in self._listeners.values()]

    def suspending(self, seconds: float, found: dict[str, Sockets]) -> list[Callable[[], Any]]:
        """What has to be called and awaited, for each store, to leave its sockets in `found` for another process."""
        return [partial(_suspend, one, seconds, found) for one in self._listeners.values()]

    # -- what is told

    def served(self) -> list[ServedImage]:
        """The images that are attached for clients of any store's socket, or about to be."""
        return [image for one in self._listeners.values() for image in one.served()]

    def images(self) -> Iterable[Image]:
        """The images behind them, as far as they are attached."""
        return [one.disk.image for one in self.served() if one.disk is not None]

    def status(self) -> list[dict[str, Any]]:
        """All stores, in the order of the configuration: the keys of `forebay stores --json`."""
        return [self._told(name) for name in self._config.stores]

    def _told(self, name: str) -> dict[str, Any]:
        listener = self._listeners.get(name)
        told = {
            "store": name,
            "path": str(self._config.store(name).path),
            "socket": str(listener.path) if listener is not None else "",
            "reason": self._failed.get(name),
        }
        if listener is None:
            return told | {"clients": 0, "refused_clients": 0, "images": []}
        return told | listener.status()


def _made(attaching: Attaching, key: str, size: int | None) -> ServedImage:
    return ServedImage(key, attaching, size)


async def _shut(listener: StoreListener, seconds: float) -> None:
    await listener.shut(seconds)
    listener.leave_to_the_end()


async def _suspend(listener: StoreListener, seconds: float, found: dict[str, Sockets]) -> None:
    found[MARK + listener.store] = await listener.suspend(seconds)
    listener.leave_to_the_end()
