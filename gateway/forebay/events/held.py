# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""All events of this daemon: kept in memory and, by a thread of their own, in STATE."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from forebay.events.files import Files, line_of
from forebay.events.kinds import KINDS
from forebay.events.ring import MOST_EVENTS, Entry, Ring

log = logging.getLogger("forebay.daemon")

AGAIN_SECONDS = 1.0
"""After a write that failed, the next one is tried so much later."""

LOAD_SECONDS = 5.0
"""So long whoever asks waits for what was kept before: STATE may be slow, or hang."""

_LOOK_SECONDS = 0.02

_RARE, _FREQUENT = False, True
_NAMES = {_RARE: "rare", _FREQUENT: "frequent"}


class Events:
    """What has happened, the newest of it. What is frequent has room of its own, and drives nothing else out."""

    def __init__(self, state: Path | None = None) -> None:
        """Kept under `state`, once `begin` was called; without that in memory only."""
        self._lock = threading.Lock()
        """Around the rings: events come in any thread."""
        self._rings = {which: Ring() for which in _NAMES}
        self._last = 0
        self._moved = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        """Of the event loop, once somebody waits in it."""
        self._keeper = None if state is None else Keeper(state, self._take_in)
        self.followers = 0
        """How many follow."""

    # -- the process

    def begin(self) -> None:
        """Read what was kept before, and write what comes, in a thread."""
        if self._keeper is not None:
            self._keeper.start()

    def close(self, seconds: float) -> None:
        """Have the last ones written, as far as that is done within so many seconds."""
        if self._keeper is not None and self._keeper.is_alive():
            self._keeper.close(seconds)

    def keep(self, event: dict[str, Any]) -> None:
        """Keep an event; it gets its time and its id."""
        which = KINDS[event["kind"]].is_frequent
        with self._lock:
            now = time.time()
            self._last = max(self._last + 1, int(now * 1e6))
            event = {"id": self._last, "time": round(now, 3), **event}
            line = line_of(event)
            self._rings[which].add(Entry(self._last, now, event["disk"], line))
            if self._keeper is not None:
                self._keeper.put(which, line)
        self._wake()

    def _take_in(self, which: bool, found: list[Entry]) -> None:
        with self._lock:
            self._rings[which].take_in(found)
            self._last = max([self._last, *(entry.id for entry in found)])

    # -- who asks

    async def loaded(self) -> None:
        """Return when what was kept before is known, or when that takes too long."""
        self._token = trio.lowlevel.current_trio_token()
        keeper = self._keeper
        with trio.move_on_after(LOAD_SECONDS):
            while keeper is not None and keeper.is_alive() and not keeper.has_read:  # noqa: ASYNC110 - a thread
                await trio.sleep(_LOOK_SECONDS)

    @property
    def last(self) -> int:
        """The id of the newest one; 0 if there is none."""
        return self._last

    def after(self, number: int, most: int | None = None) -> list[Entry]:
        """Those with a larger id, oldest first, and of these the first so many."""
        with self._lock:
            found = [ring.after(number, most) for ring in self._rings.values()]
        return sorted(entry for entries in found for entry in entries)[:most]

    @property
    def dropped(self) -> int:
        """The id of the newest one that is not kept any more; 0 if all are."""
        return max(ring.dropped for ring in self._rings.values())

    def moved(self) -> trio.Event:
        """Set when there is another one, or may be."""
        return self._moved

    def _wake(self) -> None:
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._wake_now, idempotent=True)

    def _wake_now(self) -> None:
        moved, self._moved = self._moved, trio.Event()
        moved.set()


class Keeper(threading.Thread):
    """Writes events to STATE. Where that fails they are lost there, which is said once."""

    def __init__(self, state: Path, take_in: Callable[[bool, list[Entry]], None]) -> None:
        """`take_in` is given what was kept before."""
        super().__init__(name="events", daemon=True)
        self._files = {which: Files(state, name) for which, name in _NAMES.items()}
        self._take_in = take_in
        self._come = threading.Condition()
        self._waiting: dict[bool, deque[bytes]] = {which: deque() for which in _NAMES}
        """What is to be written. What is frequent has room of its own here as well."""
        self._ends = False
        self._lost = dict.fromkeys(_NAMES, 0)
        """How many were not written since they could be."""
        self._failing: set[bool] = set()
        self.has_read = False
        self.is_busy = False
        """While it writes."""

    def put(self, which: bool, line: bytes) -> None:
        """Have a line written. Does not wait."""
        with self._come:
            waiting = self._waiting[which]
            if len(waiting) >= MOST_EVENTS:
                waiting.popleft()
                self._lost[which] += 1
            waiting.append(line)
            self._come.notify()

    def close(self, seconds: float) -> None:
        """Have it end when all is written; returns then, or after so many seconds."""
        with self._come:
            self._ends = True
            self._come.notify()
        self.join(seconds)

    def run(self) -> None:
        """Until `close`."""
        for which, files in self._files.items():
            try:
                self._take_in(which, files.read())
            except Exception as fault:  # noqa: BLE001 - no disk depends on it
                self._failed(which, 0, fault)
        self.has_read = True
        while self._next():
            pass

    def _next(self) -> bool:
        """Write what is there; False at the end."""
        with self._come:
            while not any(self._waiting.values()) and not self._ends:
                self._come.wait()
            ends = self._ends
            found = {which: list(waiting) for which, waiting in self._waiting.items()}
            for waiting in self._waiting.values():
                waiting.clear()
            self.is_busy = True
        is_written = True
        for which, lines in found.items():
            is_written = self._write(which, lines) and is_written
        if not is_written and not ends:
            time.sleep(AGAIN_SECONDS)
        self.is_busy = False
        return not ends

    def _write(self, which: bool, lines: list[bytes]) -> bool:
        """False if they are lost. Raises nothing."""
        if not lines:
            return True
        try:
            self._files[which].write(lines)
        except Exception as fault:  # noqa: BLE001 - no disk depends on it
            self._failed(which, len(lines), fault)
            return False
        if which in self._failing or self._lost[which]:
            place = self._files[which].path
            log.info("%s: events are kept there again; %d were not", place, self._lost[which])
            self._failing.discard(which)
            self._lost[which] = 0
        return True

    def _failed(self, which: bool, lost: int, fault: Exception) -> None:
        self._lost[which] += lost
        if which not in self._failing:
            why = getattr(fault, "strerror", None) or f"{type(fault).__name__}: {fault}"
            place = self._files[which].path
            log.warning("%s: events are not kept there, and end with the daemon: %s", place, why)
        self._failing.add(which)
