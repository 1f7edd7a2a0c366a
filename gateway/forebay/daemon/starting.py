# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A start that takes long, because the journal has much and the device is slow: what is told of it, and to whom.

The service manager gives a start so long (`TimeoutStartSec=`), and would end one that is only slow, again and again. So
it is told how far the start is, and asked for more time, for as long as that goes on.
"""

import logging
import time

from forebay.systemd import notify

log = logging.getLogger("forebay.daemon")

TOLD_SECONDS = 1.0
"""How often the service manager is told."""
LOGGED_SECONDS = 10.0
"""How often it is logged."""
MORE_SECONDS = 60
"""So much time the next bit of it may take: it is nothing but some reads of the device."""


class Starting:
    """How far the start of a daemon is."""

    def __init__(self) -> None:
        self._clock = time.monotonic
        self._told = self._logged = self._clock()

    def tell(self, what: str, done: int, total: int) -> None:
        """Of so many of `what` the cache is through with so many."""
        now = self._clock()
        if now - self._told < TOLD_SECONDS:
            return
        self._told = now
        text = f"recovering the cache: {done} of {total} {what}"
        notify(f"STATUS={text}\nEXTEND_TIMEOUT_USEC={MORE_SECONDS * 1_000_000}", wait=False)
        if now - self._logged >= LOGGED_SECONDS:
            self._logged = now
            log.info("%s", text)
