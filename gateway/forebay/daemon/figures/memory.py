# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How much memory the daemon takes at most: one budget for each kind, for all disks together.

A flood of requests, from however many disks and clients, waits or is refused where a budget is used up. A disk has a
small part of each beside it, so that it goes on whatever others do. `MemoryMax=` in systemd/forebay.service follows
from `ceiling`; a test compares them.
"""

from typing import Final

from forebay.image.kept import MOST_IN_ALL, KeptInAll
from forebay_cache import UNSTORED, Cache
from forebay_nbd import Budgets, Limits
from forebay_nbd.server.limits import OWN_CONNECTIONS

MIB: Final = 1 << 20

DISKS: Final = 128
"""So many disks are reckoned with in `ceiling`."""

STORES: Final = 8
"""So many stores, each with a socket."""

STORE_CALLS: Final = 36
"""Calls of one store at one time (`origin/threads.py`), each with at most 1 MiB."""

JOURNAL_MOST: Final = 32 * MIB
"""The largest intent journal, and so the most that records take which wait for the index."""

ITSELF: Final = 256 * MIB
"""Bytes that the daemon takes beside all budgets: interpreter, libraries, threads, disks, records."""

INDEX: Final = 512 * MIB
"""Bytes that it takes for pages of the index and checksums, which follow the size of the cache: those of 1 TiB."""

PAGES: Final = 2048 * MIB
"""Bytes that the kernel should at least have for pages of the cache device and of images: they count as the daemon's,
and are given back whenever memory is needed. What is warm comes from them."""


def budgets() -> Budgets:
    """Those of the clients of all disks."""
    return Budgets()


def figures(clients: Budgets, cache: Cache, kept: KeptInAll) -> dict[str, int]:
    """What is held of each budget, and its limit, in bytes. The keys are a contract."""
    told: dict[str, int] = {}
    for name, budget in (
        ("client_memory", clients.requests),
        ("block_status_memory", clients.status),
        ("connection_memory", clients.connections),
    ):
        told[f"{name}_bytes"] = budget.used + budget.own
        told[f"{name}_limit_bytes"] = budget.limit
    told["fill_memory_bytes"] = cache.in_flight.unstored
    told["fill_memory_limit_bytes"] = UNSTORED
    told["record_memory_bytes"] = cache.intent.noted_bytes
    told["record_memory_limit_bytes"] = cache.intent.journal.size
    told["kept_write_memory_bytes"] = kept.used
    told["kept_write_memory_limit_bytes"] = MOST_IN_ALL
    return told


def ceiling() -> int:
    """Bytes that the daemon takes at most, with DISKS disks on STORES stores, and the kernel's pages for it."""
    limits, clients = Limits(), budgets()
    shared = clients.requests.limit + clients.status.limit + clients.connections.limit
    of_each_server = 2 * limits.own_bytes + OWN_CONNECTIONS * limits.connection_bytes
    reads = UNSTORED + STORES * STORE_CALLS * MIB
    return (
        shared + (DISKS + STORES) * of_each_server + reads + JOURNAL_MOST + ITSELF + INDEX + PAGES
    )
