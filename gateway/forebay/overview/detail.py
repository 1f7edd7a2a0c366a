# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is told of one disk where it alone is asked for: its settings with where each is said, and who is connected."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from forebay.config.model import Config, DiskSettings
from forebay.doors.peers import Connected, Peer

Told = dict[str, Any]

MOST_CONNECTIONS = 64
"""That are told one by one."""


def settings_told(
    config: Config, store: str | None, settings: DiskSettings, own: Mapping[str, Any]
) -> list[Told]:
    """Each setting of a disk in `store`, as the configuration writes it, and where it is said. `own` has what was asked
    for of the disk; None for what was not.
    """
    of_store = config.stores.get(store) if store else None
    in_file = config.defaults.model_fields_set

    def said(key: str) -> str:
        if own.get(key) is not None:
            return "disk"
        if of_store is not None and getattr(of_store, key, None) is not None:
            return "store"
        return "defaults" if key in in_file else "built in"

    values = settings.model_dump(mode="json")
    return [{"key": key, "value": value, "from": said(key)} for key, value in values.items()]


def connected(sockets: Iterable[Connected]) -> list[Told]:
    """Which processes are connected, one for each connection; those that are gone are left out."""
    found: list[Told] = []
    for sock in sockets:
        if len(found) == MOST_CONNECTIONS:
            break
        with suppress(OSError):
            peer = Peer.of(sock)
            found.append({"pid": peer.pid, "uid": peer.uid})
    return found
