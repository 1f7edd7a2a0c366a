# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How often the store is asked while a VM may be waiting: one look takes several calls of NFS."""

import trio

AT_ONCE = 20
"""Looks that may follow each other quickly: a VM that moves waits for a few of them."""

IN_A_SECOND = 20.0
"""After that, so many: a move that waits for long, or a VM that rests again and again, is no load to a server."""


class Looks:
    """Counts looks. Call it on the event loop."""

    def __init__(self) -> None:
        self._left = float(AT_ONCE)
        self._at = float("-inf")

    def may(self) -> bool:
        """True if there may be one now, which counts then."""
        now = trio.current_time()
        if self._left < AT_ONCE:
            self._left = min(AT_ONCE, self._left + (now - self._at) * IN_A_SECOND)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
