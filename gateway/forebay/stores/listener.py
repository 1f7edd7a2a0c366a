# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The socket of one store: its images are the exports, by their paths below the store."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import trio

from forebay.config.model import Config
from forebay.doors.accepting import Accepting, socket_path, tell_client
from forebay.doors.restart import Client, Sockets
from forebay.doors.tenant import Rule, Tenant
from forebay.errors import ForebayError
from forebay.formats.magic import RAW
from forebay.image.boundary import Boundary
from forebay.origin.addresses import FileAddress, resolve
from forebay.stores.listing import MOST_LISTED
from forebay.stores.served import Holder, ServedImage
from forebay_nbd import Budgets, Connection, Export, Limits, Refused, Server
from forebay_nbd.protocol.wire import Rep

log = logging.getLogger("forebay.stores")

FOLDER = "stores"
"""Below RUN: the sockets of stores."""

MOST_IMAGES = 256
"""Images of one store that are attached at one time. One that nobody reads any more makes room for another."""

ATTEMPTS = 3
"""How often an image is attached for a client, where it is let go at the same moment."""

LIMITS = Limits(
    connections=MOST_IMAGES,
    options=4 * MOST_LISTED,
    receive_buffer=64 << 10,
    in_place_bytes=32 << 10,
)
"""Those of a store's socket: hundreds of VMs connect to it, and what they send are requests to read. `nbdinfo --list`
asks for three things of each image that is listed, over one connection."""

SHARE = 2
"""One part of so many of the memory for connections is as much as a store gets of it: so many VMs fit into that."""

MakeImage = Callable[[str, int | None], ServedImage]
"""Makes what serves the image of a key; its size in bytes is given where clients were told one before."""


class Lists(Protocol):
    """What LIST shows."""

    async def names(self) -> list[str]:
        """Names of exports. Raises Refused."""


class StoreListener(Accepting):
    """The NBD socket of one store."""

    def __init__(
        self,
        config: Config,
        store: str,
        listing: Lists,
        make: MakeImage,
        nursery: trio.Nursery,
        memory: Budgets,
        folder: str = FOLDER,
    ) -> None:
        """`nursery` outlives the images. `memory` is what the clients of all sockets together may hold. `folder` is
        the one of RUN.

        Raises ForebayError where no socket can have the path.
        """
        section = config.gateway
        path = socket_path(section.run, store, folder)
        tenant = Tenant(f"store {store}", section.run, Rule("any"))
        server = Server(
            lambda connection: _Asked(self, connection), LIMITS, tenant.may_connect, memory, SHARE,
            self._tell,
        )  # fmt: skip
        super().__init__(server, path, section, tenant)
        self.store = store
        self.listing = listing
        self._config = config
        self._make = make
        self._nursery = nursery
        self._served: dict[str, ServedImage] = {}
        self._sizes: dict[str, int] = {}
        """By image, what clients of the process before were told, bytes, until it was attached once: it comes up with
        that whether or not it can be reached."""

    def _tell(self, connection: Connection, begins: bool) -> None:
        name = connection.session.export_name if connection.session is not None else ""
        tell_client(connection, begins, "", image=f"{self.store}:{name}", store=self.store)

    # -- images

    def served(self) -> list[ServedImage]:
        """Those that are attached, or about to be."""
        return list(self._served.values())

    async def hold(self, name: str, connection: Holder) -> ServedImage:
        """The image at the path `name` of the store, attached and held for the connection: the caller releases it.

        Raises Refused.
        """
        key = self._key(name)
        for _ in range(ATTEMPTS):
            one = self._served.get(key) or await self._new(key)
            was_there = one.ready.is_set()
            if await one.hold(connection):
                return one
            if one.refusal is not None and not was_there:
                raise one.refusal
            if one.conflict is not None and not one.is_idle:
                raise Refused(one.conflict)
            await one.ended.wait()
        raise Refused(f"{key} comes and goes: try again")

    def _key(self, name: str) -> str:
        """The key of the image that a client has named. Raises Refused."""
        if not name:
            raise Refused(
                f"there is no default export: name an image by its path in the store '{self.store}'",
                Rep.ERR_UNKNOWN,
            )
        try:
            address = resolve(self._config, f"{self.store}:{name}")
        except ForebayError as fault:
            raise Refused(str(fault), Rep.ERR_UNKNOWN) from None
        if not isinstance(address, FileAddress) or address.format != RAW:
            raise Refused(
                f"{name}: files are served here, as they are: name one by its path in the store '{self.store}'",
                Rep.ERR_UNKNOWN,
            )
        return address.key

    async def _new(self, key: str) -> ServedImage:
        """One that begins to be attached. Raises Refused where too many are."""
        if len(self._served) >= MOST_IMAGES:
            await self._make_room()
            if key in self._served:
                return self._served[key]
            if len(self._served) >= MOST_IMAGES:
                raise Refused(
                    f"{MOST_IMAGES} images of store '{self.store}' are read at this moment: try again later"
                )
        one = self._served[key] = self._make(key, self._sizes.get(key))
        boundary = Boundary(self._nursery, f"image {key} on its store's socket", one.stop)
        boundary.start_soon(self._run, one)
        return one

    async def _run(self, one: ServedImage) -> None:
        try:
            await one.run()
        finally:
            del self._served[one.key]
            self._sizes.pop(one.key, None)

    async def _make_room(self) -> None:
        """Have the image let go that nobody has read for longest, if there is one."""
        idle = [one for one in self._served.values() if one.is_idle]
        if idle:
            oldest = min(idle, key=lambda one: one.idle_since)
            oldest.leave_at_once()
            await oldest.ended.wait()

    # -- a restart

    def _go_on(self, client: Client, nursery: trio.Nursery) -> None:
        try:
            key = self._key(client.session.export_name)
        except Refused as refused:
            log.error("store '%s': a client has to reconnect: %s", self.store, refused)
            Sockets(clients=[client]).hang_up()
            return
        if self._sizes.setdefault(key, client.size) != client.size or not client.read_only:
            log.error("%s: its size or access changed: a client has to reconnect", key)
            Sockets(clients=[client]).hang_up()
            return
        nursery.start_soon(self._server.resume, client.sock, client.session)

    # -- the end

    def leave_to_the_end(self) -> None:
        """The daemon ends: so do the images, which are not given back one by one."""
        for one in self.served():
            one.leave_to_the_end()

    # -- what is told

    def status(self) -> dict[str, Any]:
        """The keys of `forebay stores --json`, but for what the configuration says."""
        return {
            "clients": self.clients,
            "refused_clients": self.tenant.refused,
            "images": [one.status() for one in sorted(self.served(), key=lambda one: one.key)],
        }


class _Asked:
    """What one client asks a store's socket for. Implements forebay_nbd.Exports."""

    def __init__(self, listener: StoreListener, connection: Connection) -> None:
        self._listener = listener
        self._connection = connection
        self._held: ServedImage | None = None
        self._refused: Refused | None = None
        self._names: list[str] | Refused = []

    async def look(self, name: str) -> None:
        """Attach the image of that name. The one before is held until then, since it may be the same."""
        try:
            found, self._refused = await self._listener.hold(name, self._connection), None
        except Refused as refused:
            found, self._refused = None, refused
        before, self._held = self._held, found
        if before is not None:
            before.release(self._connection)

    async def look_around(self) -> None:
        """Find out which images there are."""
        try:
            self._names = await self._listener.listing.names()
        except Refused as refused:
            self._names = refused

    def find(self, name: str) -> Export | None:  # noqa: ARG002 - the server has given it to `look`
        """What `look` has found; the name is the one that it was given."""
        if self._refused is not None:
            raise self._refused
        return self._held.export if self._held is not None else None

    def names(self) -> list[str]:
        """What `look_around` has found. Raises Refused."""
        if isinstance(self._names, Refused):
            raise self._names
        return self._names

    def close(self) -> None:
        """The client is gone."""
        if self._held is not None:
            self._held.release(self._connection)
            self._held = None
