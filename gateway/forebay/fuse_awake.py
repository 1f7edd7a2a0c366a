"""Wakes a FUSE process out of a read that nothing comes to.

pyfuse3 reads /dev/fuse when it is readable, and the read waits when the request that made it so is gone: its caller was
killed in between. Then the event loop stands until some other request comes, with all that it owes to others; if these
are what everybody waits for, for ever. A thread looks whether the loop turns, and if it does not, interrupts its system
call with a signal: libfuse then says EINTR, and pyfuse3 begins anew. Python's own calls are repeated (PEP 475).
"""

import contextlib
import signal
import threading
from collections.abc import AsyncIterator

import trio

TURN_SECONDS = 0.2
"""How often the loop shows that it turns."""

STILL_SECONDS = 0.6
"""After how long without a turn it is interrupted, and then again."""

SIGNAL = signal.SIGUSR2


@contextlib.asynccontextmanager
async def kept_awake() -> AsyncIterator[None]:
    """Within it the calling thread, the main one, is interrupted whenever its event loop stands."""
    turned, over = threading.Event(), threading.Event()
    main = threading.get_ident()

    def watch() -> None:
        while not over.is_set():
            if turned.wait(STILL_SECONDS):
                turned.clear()
                over.wait(TURN_SECONDS)
            else:
                signal.pthread_kill(main, SIGNAL)

    async def turn() -> None:
        while True:
            turned.set()
            await trio.sleep(TURN_SECONDS)

    before = signal.signal(SIGNAL, lambda _number, _frame: None)
    thread = threading.Thread(target=watch, name="awake", daemon=True)
    thread.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(turn)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()
    finally:
        over.set()
        turned.set()
        thread.join()
        signal.signal(SIGNAL, before)
