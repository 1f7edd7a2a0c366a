# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a cache of another size would do for this host: asked of `forebay_cache.curve`, and kept over a restart.

No disk depends on it: whatever goes wrong here goes to the log, and the advice begins anew, or is missing.
"""

import logging
import time
from pathlib import Path
from typing import Any

import trio

from forebay_cache import Cache
from forebay_cache.curve.advisor import Advisor
from forebay_cache.curve.kept import load, save
from forebay_cache.format.entry import layer_of_key

log = logging.getLogger("forebay.daemon")

DRAIN_SECONDS = 1.0
"""Between two looks at what was sampled."""
FADE_SECONDS = 60.0
"""How often what was counted is made to count for less."""
HALF_LIFE_SECONDS = 86400.0
"""What was counted so long ago counts for half."""
FILE = "advice"
"""In STATE."""
LAST_SECONDS = 0.25
"""So long the end of the daemon waits for it to be stored."""
SAVE_SECONDS = 300.0
"""How often it is stored: so much is lost when the daemon is killed."""


def forget(state: Path) -> None:
    """Remove what is kept in STATE: the cache that it is about is gone. Raises OSError."""
    for name in (FILE, f"{FILE}.new"):
        (state / name).unlink(missing_ok=True)


class Advice:
    """The advisor of one cache, with its file in STATE."""

    def __init__(self, cache: Cache, state: Path) -> None:
        self._cache = cache
        self._path = state / FILE
        self._advisor: Advisor | None = self._new()
        self._is_complete = False  # it knows what its file knew
        self._saving = trio.Lock()

    def _new(self) -> Advisor:
        return Advisor(self._cache.slots, self._is_held)

    def _is_held(self, key: int) -> bool:
        layer = self._cache.layers.get(layer_of_key(key))
        return layer is None or layer.is_held

    def report(self) -> dict[str, Any]:
        """What `forebay status --advice --json` prints."""
        return (self._advisor or self._new()).report() | {"now": time.time()}

    async def run(self) -> None:
        """Take in what is sampled, until cancelled."""
        try:
            await self._run()
        except Exception:
            log.exception("a fault of Forebay itself: there is no advice until the next start")
            self._advisor = None

    async def _restore(self, advisor: Advisor) -> None:
        try:
            kept = await trio.to_thread.run_sync(load, self._path)
            if kept.uuid == self._cache.uuid:
                await advisor.restore(kept)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as fault:
            log.warning("%s is not used, the advice begins anew: %s", self._path, fault)

    async def _run(self) -> None:
        faded = saved = trio.current_time()
        while self._advisor is not None:
            if self._cache.slots.scan is None:  # else nobody knows yet how much room there is
                await self._take(self._advisor)
            now = trio.current_time()
            if now - faded >= FADE_SECONDS:
                self._advisor.fade(0.5 ** ((now - faded) / HALF_LIFE_SECONDS))
                faded = now
            if now - saved >= SAVE_SECONDS:
                await self.save()
                saved = now
            await trio.sleep(DRAIN_SECONDS)

    async def _take(self, advisor: Advisor) -> None:
        if not self._is_complete:
            await self._restore(advisor)
            self._is_complete = True
        await advisor.drain()

    async def save(self) -> None:
        """Store what is known. The log says so where that fails; cancelled, it may be stored all the same."""
        if self._advisor is None or not self._is_complete:
            return
        async with self._saving:
            kept = await self._advisor.kept(self._cache.uuid)
            try:
                await trio.to_thread.run_sync(save, self._path, kept, abandon_on_cancel=True)
            except OSError as fault:
                log.info("%s cannot be written: %s", self._path, fault.strerror or fault)
