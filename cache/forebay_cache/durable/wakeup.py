# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How one task is told that there is something to do."""

from __future__ import annotations

import trio


class Wakeup:
    """Wakes the one task that waits for it. A call that comes while that task works is not lost."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def call(self) -> None:
        """Let the present :meth:`wait` return, or the next one."""
        self._event.set()

    async def wait(self) -> None:
        """Return at once if :meth:`call` was called since the last wait returned, else when it is."""
        await self._event.wait()
        self._event = trio.Event()
