# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How far a pass over one frozen layer is: it tells those who wait for it, and takes its time while nobody does."""

from collections.abc import Callable

import trio

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, as work goes on."""

SPREAD = 0.4
"""Of `max_lag`, over how much a pass is spread while guests are served: it begins at half of it."""

TURN_SECONDS = 0.05
"""How long it takes at most until a pass that is being spread notices that it is waited for, or that guests rest."""

ASIDE_SECONDS = 0.001
"""Between two pieces of settling, while guests are served: each of these takes some tenths of it."""


class Steps:
    """Of a pass that writes `whole` bytes `times` times: to the journal and to the image, or to the image alone."""

    def __init__(
        self,
        whole: int,
        times: int,
        spread_seconds: Callable[[], float],
        *,
        served: Callable[[], int],
        is_urgent: Callable[[], bool],
        advanced: Callable[[int, float], None],
    ) -> None:
        """`spread_seconds` returns how long all of it may take while guests are served.

        `served` counts what guests were served; `is_urgent` says that the pass is waited for. `advanced` is told, after
        each piece, its bytes and which part of the pass is done, 0 to 1; of the bytes it is told no more than `whole`
        in all.
        """
        self._whole = max(1, whole)
        self._times = times
        self._spread_seconds = spread_seconds
        self._count_served = served
        self._is_urgent = is_urgent
        self._advanced = advanced
        self._began = trio.current_time()
        self._done = 0
        self._served = 0

    @property
    def _share(self) -> float:
        return self._done / self._times / self._whole

    async def wait_for_turn(self) -> None:
        """Before the next batch: wait while guests are served and there is time left, so that they notice little.

        It looks again every TURN_SECONDS, for the pass may become urgent meanwhile.
        """
        while (left := self._seconds_left()) > 0 and self._may_wait():  # noqa: ASYNC110  (no one event)
            await trio.sleep(min(left, TURN_SECONDS))

    def _seconds_left(self) -> float:
        """Until the next batch, unless it becomes urgent."""
        return self._began + self._share * self._spread_seconds() - trio.current_time()

    async def stand_aside(self) -> None:
        """Let others go on, between two pieces of work that the event loop does itself."""
        if self._may_wait():
            await trio.sleep(ASIDE_SECONDS)
        else:
            await trio.lowlevel.checkpoint()

    def _may_wait(self) -> bool:
        before, self._served = self._served, self._count_served()
        is_idle = before == self._served
        return not (is_idle or self._is_urgent())

    def advance(self, length: int) -> None:
        """So many bytes more are written, to the journal or to the image."""
        self._done += length
        self._advanced(length // self._times, min(1.0, self._share))
