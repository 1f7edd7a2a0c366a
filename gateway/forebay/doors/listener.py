# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A disk's own NBD socket."""

import logging
from pathlib import Path

import trio

from forebay.config.sections import GatewaySection
from forebay.doors.accepting import Accepting, tell_client
from forebay.doors.restart import Client, Sockets
from forebay.doors.tenant import Rule, Tenant
from forebay_nbd import Budgets, Export, KnownExports, Server

log = logging.getLogger("forebay.daemon")


class Listener(Accepting):
    """The NBD socket of one disk: accepts clients while it is open, and serves them.

    The disk is the export of the name `export.name`, and the default export.
    """

    def __init__(
        self,
        export: Export,
        path: Path,
        section: GatewaySection,
        tenant: Tenant | None = None,
        memory: Budgets | None = None,
    ) -> None:
        """`path` is where the socket is to lie; nothing is there before `open`.

        `tenant` says which process may use the disk, of those that may connect; without it all of them.

        `memory` is what the clients of all disks together may hold; without it this disk's have budgets of their own.
        """
        self._export = export
        tenant = tenant or Tenant(export.name, section.run, Rule("any"))
        server = Server(
            lambda _connection: KnownExports(
                lambda name: export if name in ("", export.name) else None, lambda: [export.name]
            ),
            may_connect=tenant.may_connect,
            budgets=memory,
            on_session=lambda connection, begins: tell_client(connection, begins, export.name),
        )
        super().__init__(server, path, section, tenant)

    def _go_on(self, client: Client, nursery: trio.Nursery) -> None:
        """Serve a client of the process before, if the disk still is what it was told."""
        if (client.size, client.read_only) == (self._export.size, self._export.read_only):
            self.tenant.go_on(client.sock)
            nursery.start_soon(self._server.resume, client.sock, client.session)
        else:
            log.error(
                "%s: its size or access changed: a client has to reconnect", self._export.name
            )
            Sockets(clients=[client]).hang_up()
