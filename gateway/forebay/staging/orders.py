# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What this host is to stage, and with whom. It is kept in STATE, and gone on with after a start."""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forebay.errors import ForebayError
from forebay.storage.owner import check_is_file
from forebay.units import parse_peer

FILE = "staging.json"
"""In STATE."""

MOST_ORDERS = 64
"""Images that one host stages at one time."""

MOST_PEERS = 1001
"""Hosts of one order, as the control API takes them: those of one command, and the one that gives."""

LONGEST = 32 << 20
"""Bytes of the file: so many orders with so many hosts, each of the longest name, are 17 MiB."""


_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""What else may lie there is not waited for."""


@dataclass(frozen=True)
class Order:
    """One image. `peers` are (host, port); a `source` has all of it to give, from its cache or from the store."""

    image: str
    size: int
    peers: tuple[tuple[str, int], ...]
    source: bool = False
    rate: int | None = None
    """Most bytes a second that the host sends, and as many that it receives; None: as many as it can."""

    def after(self, before: "Order | None") -> "Order":
        """The same, with the hosts of the order before, if there is one. Raises ForebayError for too many."""
        if before is None:
            return self
        peers = tuple(dict.fromkeys((*before.peers, *self.peers)))
        if len(peers) > MOST_PEERS:
            raise ForebayError(
                f"{self.image} is staged with {len(before.peers)} hosts here already, and {MOST_PEERS} are the most: "
                "wait for them, or end that with 'forebay stage IMAGE --end'"
            )
        return replace(self, peers=peers, source=self.source or before.source)

    def told(self) -> dict[str, Any]:
        """The same as JSON has it. The process that stages asks once a second: what may be long is not copied."""
        return dict(vars(self))


@dataclass
class Report:
    """What the process that stages said of an order last."""

    state: str = "waiting"
    reason: str | None = None
    down: int = 0
    up: int = 0
    connected: int = 0
    at: float = field(default=float("-inf"))
    """Trio time of that."""


def load(state: Path) -> list[Order]:
    """The orders that are kept. Blocks. Raises OSError, and ValueError for what cannot be used."""
    try:
        fd = os.open(state / FILE, os.O_RDONLY | _FLAGS)
        with open(fd, "rb") as file:
            check_is_file(fd, state / FILE)
            data = file.read(LONGEST + 1)
    except FileNotFoundError:
        return []
    if len(data) > LONGEST:
        raise ValueError(f"longer than {LONGEST} bytes")
    try:
        return [_order(one) for one in json.loads(data)][:MOST_ORDERS]
    except (TypeError, KeyError, RecursionError) as fault:
        raise ValueError(f"not a list of orders ({fault})") from None


def _order(found: dict[str, Any]) -> Order:
    peers = tuple(parse_peer(f"[{host}]:{port}") for host, port in found["peers"][:MOST_PEERS])
    size, rate, image = found["size"], found["rate"], found["image"]
    if type(size) is not int or not isinstance(image, str):
        raise ValueError("an order without image and size")
    if rate is not None and (type(rate) is not int or rate <= 0):
        raise ValueError("an order with a rate that cannot be")
    return Order(image, size, peers, bool(found["source"]), rate)


def save(state: Path, orders: Iterable[Order]) -> None:
    """Keep the orders, durably. Blocks. Raises OSError; what was kept before is kept then, whatever came in between."""
    new = state / f"{FILE}.new"
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAGS, 0o600)
        with open(fd, "wb") as file:
            file.write(json.dumps([one.told() for one in orders]).encode())
            file.flush()
            os.fsync(file.fileno())
        new.rename(state / FILE)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    folder = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
