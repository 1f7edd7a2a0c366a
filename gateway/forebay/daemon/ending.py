# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How the daemon ends: a stop, or a planned restart, in which the sockets are left for the next process."""

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import trio

from forebay.daemon.attached import Attached
from forebay.daemon.departures import CLIENTS_SECONDS, RELEASE_SECONDS
from forebay.daemon.parallel import run_all
from forebay.daemon.record import DiskRecords
from forebay.doors.restart import Sockets, leave_sockets
from forebay.errors import ForebayError
from forebay.events.telling import tell
from forebay.stores.sockets import StoreSockets

log = logging.getLogger("forebay.daemon")

RESTART_SECONDS = 0.25
"""How long a restart waits for requests in flight, and for stores: guests wait meanwhile, and what has no answer then
is done by the next process."""


async def stop(
    disks: list[Attached], stores: StoreSockets, records: DiskRecords, *, restart: bool
) -> bool:
    """Answer what is in flight, hang up, end all work. Bounded; what is dirty stays in the cache, durably.

    `restart`: do not hang up, but leave the sockets with the service manager; clients wait, so it takes no longer than
    it must. True if the manager took them. Raises ForebayError where the index cannot be written.
    """
    patience = RESTART_SECONDS if restart else RELEASE_SECONDS
    if restart:
        await records.commit()  # most of it while clients are served
        restart = await _leave_sockets(disks, stores)
    else:
        await run_all(
            [
                *_of_all(disks, lambda one: one.listener.shut(CLIENTS_SECONDS)),
                *stores.shutting(CLIENTS_SECONDS),
            ]
        )
    for one in disks:
        await one.rest()
        one.leave()
    with trio.move_on_after(patience):
        await _of_each(disks, _look_last)
    await records.commit()
    with trio.move_on_after(patience):
        await _of_each(disks, _let_go)
    return restart


async def _of_each(disks: Iterable[Attached], do: Callable[[Attached], Awaitable[object]]) -> None:
    """Do it for all disks at once. A fault of Forebay itself with one of them goes to the log, and stops no other's."""
    await run_all(_of_all(disks, do))


def _of_all(
    disks: Iterable[Attached], do: Callable[[Attached], Awaitable[object]]
) -> list[Callable[[], Awaitable[object]]]:
    """What `_of_each` does, to be called for each disk."""

    async def of_one(one: Attached) -> None:
        try:
            await do(one)
        except Exception:
            log.exception("disk '%s': a fault of Forebay itself at the end", one.name)

    return [partial(of_one, one) for one in disks]


async def _leave_sockets(disks: list[Attached], stores: StoreSockets) -> bool:
    """What was acknowledged is in the journal: whatever happens from here on, the next process finds it."""
    began = trio.current_time()
    suspended: dict[str, Sockets] = {}

    async def suspend(one: Attached) -> None:
        suspended[one.name] = await one.listener.suspend(RESTART_SECONDS)

    await run_all([*_of_all(disks, suspend), *stores.suspending(RESTART_SECONDS, suspended)])
    count = sum(len(sockets.clients) for sockets in suspended.values())
    if not leave_sockets(suspended):
        return False
    took = 1000 * (trio.current_time() - began)
    tell("restart", f"handed over: {len(disks)} disks, {count} clients, in {took:.0f} ms")
    return True


async def _look_last(one: Attached) -> None:
    """Take down what the image looks like after our own writes, so that the next start notices those of others."""
    try:
        await one.disk.image.look()
    except OSError as fault:
        log.info("%s: its image could not be looked at: %s", one.name, fault)


async def _let_go(one: Attached) -> None:
    """Close what holds the image; its marker stays, and says whose it is."""
    with contextlib.suppress(OSError, ForebayError):  # the lock ends with the process
        await one.source.leave()
