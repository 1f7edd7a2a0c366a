"""Wakes a FUSE process out of a read that nothing comes to.

pyfuse3 reads /dev/fuse when it is readable, and the read waits when the request that made it so is gone: its caller was
killed in between. Then the event loop stands until some other request comes, with all that it owes to others; if these
are what everybody waits for, for ever. It stands with Python's lock held, so that no thread can help: a timer of the
kernel interrupts it, which the loop puts off as long as it turns. libfuse then says EINTR, and pyfuse3 begins anew.
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
    """Within it the calling thread, the main one, is interrupted whenever its event loop stands. Takes SIGALRM."""

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
