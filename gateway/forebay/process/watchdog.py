# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The watchdog (`WatchdogSec=`): fed for as long as requests get answers, not for as long as a timer ticks.

It is fed from the event loop, so a loop that stands still is noticed by itself. What else can hang is a request: each
wait in the data path is bounded (`origin_timeout`), so one that has no answer for longer than that, on a disk where
nothing else moves either, will never get one. Then the feeding stops, and systemd starts the daemon anew. A store that
hangs is not such a case: its requests fail in time.
"""

import logging
from collections.abc import Callable, Iterable

import trio

from forebay.daemon.attached import Attached
from forebay.stores.served import ServedImage
from forebay.systemd import notify, watchdog_seconds
from forebay.units import format_size

log = logging.getLogger("forebay.daemon")

MARGIN_SECONDS = 30.0
"""What a request may take beyond `origin_timeout` without any sign of life of its disk."""

STATUS_SECONDS = 10.0
"""How often `systemctl status` is told how the disks are, where no watchdog asks more often."""


_AT_ONCE = 64
"""Disks that are looked at between two turns of others."""

Watched = Attached | ServedImage
"""What answers requests: a disk, or an image of a store's socket."""


class Watch:
    """Judges at each look whether disks move."""

    def __init__(self) -> None:
        self._moved: dict[str, tuple[object, float]] = {}
        """By disk: its pulse at the last look, and the trio time since when that is the same."""

    async def stuck(self, disks: Iterable[Watched]) -> str | None:
        """Why the daemon has to be started anew, in one line; None if it has not. `disks` are all that are served.

        One look at a time.
        """
        now = trio.current_time()
        found = None
        moved: dict[str, tuple[object, float]] = {}
        for n, one in enumerate(disks, 1):
            if n % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            pulse = one.pulse()
            last, since = self._moved.get(one.name, (None, now))
            moved[one.name] = (pulse, since if pulse == last else now)
            waiting = one.listener.unanswered_since
            if waiting is None or one.disk is None:
                continue
            still = now - max(waiting, moved[one.name][1])
            if still > one.disk.settings.origin_timeout + MARGIN_SECONDS:
                found = f"disk '{one.name}' answers nothing and has moved nothing for {still:.0f} s"
        self._moved = moved
        return found


async def feed(
    disks: Callable[[], list[Attached]], others: Callable[[], Iterable[ServedImage]] = list
) -> None:
    """Feed the watchdog, if there is one, twice as often as asked, and tell the manager how the disks are.

    `others` answer requests as well. A fault of Forebay itself in looking at one of them is logged, and is no reason to
    stop feeding: the loop turns.
    """
    asked = watchdog_seconds()
    pause = min(STATUS_SECONDS, asked / 2 if asked else STATUS_SECONDS)
    watch = Watch()
    told: str | None = None
    is_blind = False
    while True:
        stuck, summary = None, "the state of the disks cannot be told: see the log"
        try:
            found = disks()
            served: list[Watched] = [*found, *others()]
            stuck, summary = await watch.stuck(served), await _summary(found)
            await _tell_slow(served)
            is_blind = False
        except Exception:
            if not is_blind:
                log.exception("the disks cannot be looked at")
            is_blind = True
        if stuck is not None and told is None:
            log.error("%s: the watchdog is not fed any more", stuck)
        told = stuck
        if stuck is None and asked:
            notify("WATCHDOG=1", wait=False)
        notify(f"STATUS={stuck or summary}", wait=False)
        await trio.sleep(pause)


async def _tell_slow(disks: list[Watched]) -> None:
    """Have the log say which requests take long and have not ended."""
    for n, one in enumerate(disks, 1):
        if n % _AT_ONCE == 0:
            await trio.lowlevel.checkpoint()
        if one.disk is not None:
            one.disk.timing.look()


async def _summary(disks: list[Attached]) -> str:
    """One line for `systemctl status`."""
    clients = dirty = 0
    for n, one in enumerate(disks, 1):
        if n % _AT_ONCE == 0:
            await trio.lowlevel.checkpoint()
        clients += one.listener.clients
        dirty += one.disk.dirty_bytes
    return f"{len(disks)} disks, {clients} clients, {format_size(dirty)} dirty"
