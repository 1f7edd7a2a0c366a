# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Wakes a FUSE process out of a read that nothing comes to.

pyfuse3 reads /dev/fuse when that is readable. If the caller of the request is killed in between, the request is gone,
and the read blocks until another one comes, and with it the event loop, which holds Python's lock, so that no thread
can help. If all others wait for an answer from this very process, no request ever comes. So a timer of the kernel
interrupts the read; the loop puts the timer off as long as it turns. libfuse then says EINTR, and pyfuse3 begins anew.
Python's own calls are repeated (PEP 475).
"""

import contextlib
import signal
from collections.abc import AsyncIterator

import trio

TURN_SECONDS = 0.2
"""How often the loop shows that it turns."""

STILL_SECONDS = 0.6
"""After how long without a turn it is interrupted, and then again."""


@contextlib.asynccontextmanager
async def kept_awake() -> AsyncIterator[None]:
    """While the body runs, interrupt the calling (main) thread whenever its event loop stands. Takes SIGALRM."""

    def put_off() -> None:
        signal.setitimer(signal.ITIMER_REAL, STILL_SECONDS, STILL_SECONDS)

    async def turn() -> None:
        while True:
            put_off()
            await trio.sleep(TURN_SECONDS)

    before = signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    try:
        put_off()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(turn)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
