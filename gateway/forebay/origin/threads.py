# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Blocking storage calls, off the event loop, with limits of their own for each store.

A call that hangs in the kernel (an NFS server that is down) cannot be stopped. It is given up: whoever asked gets an
error in time, the thread stays where it is and keeps its place in the limit, so that at most `FOREGROUND_THREADS`
threads of one store ever hang. Other stores have limits of their own and do not notice. What hangs in the kernel is the
store's process (worker/process.py): the thread waits for its answer, and that wait ends when the daemon ends.

A thread touches what it was handed: an open descriptor (`Descriptor` keeps its number from being reused) and buffers
that nobody changes any more.
"""

import contextlib
import errno
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

import trio

from forebay.origin.sharing.places import FairPlaces
from forebay.origin.worker import syscalls
from forebay.origin.worker.process import StoreProcess, here

T = TypeVar("T")

FOREGROUND_THREADS = 32
"""Calls of one store at a time that a guest waits for: what an NFS mount keeps in flight usefully, and few enough
threads that some ten hung stores stay below any limit of processes."""

BACKGROUND_THREADS = 4
"""Calls of one store at a time for write-back, and as many for preload and read-ahead: enough to fill a gigabit link
with 1 MiB calls, and too few to fill the store's queue in front of a guest's miss."""

BACKGROUND_PATIENCE = 0.1
"""Seconds that one background call waits for a moment without foreground calls. After that it goes ahead: write-back
that never moves would stop the guest's writes in the end."""


Background = bool | trio.Event
"""Whether a call lets those go first that guests wait for. An event: it does until that is set, because somebody has
come to need it."""


def is_foreground(background: Background) -> bool:
    """True if somebody waits for the call now."""
    return background.is_set() if isinstance(background, trio.Event) else not background


@contextlib.contextmanager
def bounded(seconds: float, what: str) -> Iterator[None]:
    """Cancel the body after `seconds`, and raise OSError(ETIMEDOUT) then. `what` names in it what took too long."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise OSError(errno.ETIMEDOUT, f"{what}: no answer within {seconds:g} s")


class Descriptor:
    """A file descriptor that threads share: a context manager, whose body may use the number that it gives.

    The number stays taken until the last body has ended. Without that, a thread that was given up could wake after
    `close` and write into whatever file got the number next. Entering raises OSError(EBADF) after `close`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._users = 0
        self._closing = False
        self._lock = threading.Lock()

    def __enter__(self) -> int:
        with self._lock:
            if self._closing:
                raise OSError(errno.EBADF, "closed")
            self._users += 1
        return self._fd

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            last = self._closing and self._users == 0
        if last:
            syscalls.close(self._fd)

    def close(self) -> None:
        """Close it now, or in the thread that leaves its body last. May block. The second call does nothing."""
        with self._lock:
            first, self._closing = not self._closing, True
            now = first and self._users == 0
        if now:
            syscalls.close(self._fd)


class Call(Generic[T]):
    """One blocking call in a thread, begun at most once. `StoreThreads.wait_for` makes it.

    The call is given up when whoever waits for it stops waiting: a time-out, or a cancelled task. Its thread goes on.
    """

    def __init__(
        self,
        do: Callable[[], T],
        *,
        on_end: Callable[["Call[T]"], None] | None = None,
        drop: Callable[[T], object] | None = None,
    ) -> None:
        """`do` blocks. `on_end` runs on the event loop, once, when `ended` is set. `drop` is called in a thread with a
        result that came too late for anyone to take: an open descriptor, say.
        """
        self._do = do
        self._on_end = on_end
        self._drop = drop
        self._lock = threading.Lock()
        self._token = trio.lowlevel.current_trio_token()
        self._stopped = False
        """True once nobody waits any more: the call is not to begin then."""
        self._over = False
        """True once the thread has done its work."""
        self._drop_result: Callable[[], object] | None = None
        self.begun = False
        self.error: BaseException | None = None
        """What `do` raised."""
        self.ended = trio.Event()
        """Set when the thread has ended, or when the call was given up before it began."""

    @property
    def given_up(self) -> bool:
        """True while the thread runs on and nobody waits for it."""
        return self._stopped and not self.ended.is_set()

    def in_thread(self) -> T:
        """Make the call, and return or raise what it does. Runs in the thread. ECANCELED: it was given up before."""
        with self._lock:
            if self._stopped:
                raise OSError(errno.ECANCELED, "given up before it began")
            self.begun = True
        try:
            result = self._do()
            if self._drop is not None:
                self._drop_result = functools.partial(self._drop, result)
            return result
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._leave_thread()

    def _leave_thread(self) -> None:
        with self._lock:
            self._over = True
            late = self._stopped
        if late:
            if self._drop_result is not None:
                self._drop_result()
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._finish)

    def stop_waiting(self, *, taken: bool) -> None:
        """Say that nobody waits any more; with `taken`, because the result was taken. Runs on the event loop, once."""
        with self._lock:
            self._stopped = True
            over = self._over
        if over and not taken and self._drop_result is not None:
            trio.lowlevel.start_thread_soon(self._drop_result, lambda _: None)
        if over or not self.begun:
            self._finish()

    def _finish(self) -> None:
        self.ended.set()
        if self._on_end is not None:
            self._on_end(self)


class Place:
    """The way of one call through the queue in front of a store: `trio.to_thread.run_sync` takes it as its limiter.

    As an async context manager it takes its place when it is entered.
    """

    def __init__(self, lanes: "Lanes", background: Background) -> None:
        self._lanes = lanes
        self._needed = background if isinstance(background, trio.Event) else None
        self._limiter: FairPlaces | trio.CapacityLimiter | None = None
        """Where it has its place; None while it waits."""
        self._is_foreground = is_foreground(background)
        if self._is_foreground:
            lanes.enter_foreground()

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        """Wait for a place, with what guests wait for as soon as somebody needs the call. Part of trio's interface."""
        if not self._is_foreground:
            with trio.CancelScope() as scope:
                await self._take_behind(borrower, scope)
        if self._limiter is None:
            if not self._is_foreground:
                self._is_foreground = True
                self._lanes.enter_foreground()
            await self._lanes.foreground.acquire_on_behalf_of(borrower)
            self._limiter = self._lanes.foreground

    async def _take_behind(self, borrower: object, scope: trio.CancelScope) -> None:
        """Take a place behind the foreground calls, unless somebody needs the call before it is its turn."""
        limiter = self._lanes.background if self._needed is None else self._lanes.ahead
        async with trio.open_nursery() as nursery:
            if self._needed is not None:
                nursery.start_soon(_cancel_when, self._needed, scope)
            await self._lanes.let_foreground_go()
            await limiter.acquire_on_behalf_of(borrower)
            self._limiter = limiter
            nursery.cancel_scope.cancel()

    def release_on_behalf_of(self, borrower: object) -> None:
        """Give the place back. Part of trio's interface."""
        assert self._limiter is not None, "it has no place"
        self._limiter.release_on_behalf_of(borrower)

    async def __aenter__(self) -> None:
        await self.acquire_on_behalf_of(self)

    async def __aexit__(self, *_: object) -> None:
        self.release_on_behalf_of(self)

    def leave(self) -> None:
        """The call has ended, or nobody waits for it any more."""
        if self._is_foreground:
            self._lanes.leave_foreground()


async def _cancel_when(needed: trio.Event, scope: trio.CancelScope) -> None:
    await needed.wait()
    scope.cancel()


class Lanes:
    """The queue in front of one store. A guest waits for foreground calls, in the order that the weights of disks give
    them; all others let them go first.

    Of these, reads ahead of guests and writes behind their backs have places of their own, so that neither keeps the
    other from going on.
    """

    def __init__(self, foreground: int, background: int) -> None:
        """How many calls of each kind are made at a time; `background` is that of reads and of writes."""
        self.foreground = FairPlaces(foreground)
        self.background = trio.CapacityLimiter(background)
        self.ahead = trio.CapacityLimiter(background)
        """For calls that somebody may come to need."""
        self._waiting = 0
        """Foreground calls that wait for a place or have one."""
        self._quiet = trio.Event()
        self._quiet.set()

    @property
    def busy(self) -> tuple[int, int]:
        """How many places are taken: (foreground, all others)."""
        others = int(self.background.borrowed_tokens) + int(self.ahead.borrowed_tokens)
        return self.foreground.borrowed_tokens, others

    @contextlib.contextmanager
    def queue(self, background: Background) -> Iterator[Place]:
        """Queue up. The body takes the place that this gives, and counts as waiting until it ends."""
        place = Place(self, background)
        try:
            yield place
        finally:
            place.leave()

    def enter_foreground(self) -> None:
        """One more call that a guest waits for."""
        if self._waiting == 0:
            self._quiet = trio.Event()
        self._waiting += 1

    def leave_foreground(self) -> None:
        """One less."""
        self._waiting -= 1
        if self._waiting == 0:
            self._quiet.set()

    async def let_foreground_go(self) -> None:
        """Wait for a moment without foreground calls, BACKGROUND_PATIENCE at most."""
        with trio.move_on_after(BACKGROUND_PATIENCE):
            while self._waiting:
                await self._quiet.wait()


class StoreThreads:
    """The threads that make the blocking calls of one store, with limits of their own."""

    def __init__(
        self,
        name: str,
        foreground: int = FOREGROUND_THREADS,
        background: int = BACKGROUND_THREADS,
        process: StoreProcess | None = None,
    ) -> None:
        """`process` makes the calls on file systems that may hang; without one the threads make all of them."""
        self.name = name
        self._process = process
        self._lanes = Lanes(foreground, background)

    def apart(self, foreground: int, background: int) -> "StoreThreads":
        """Threads with limits of their own, whose calls are made by the same process."""
        return StoreThreads(self.name, foreground, background, self._process)

    @property
    def busy(self) -> tuple[int, int]:
        """How many threads are at work or hung: (foreground, background)."""
        return self._lanes.busy

    async def run(
        self,
        do: Callable[[], T],
        *,
        background: Background = False,
        drop: Callable[[T], object] | None = None,
    ) -> T:
        """Call `do` in a thread and return what it returns. Raises what it raises.

        Cancellation gives the call up at once; its thread goes on, and what `do` returns then goes to `drop`.
        """
        return await self.wait_for(Call(do, drop=drop), background=background)

    async def wait_for(self, call: Call[T], *, background: Background = False) -> T:
        """As `run`, for a call that the caller has made, and may look at later."""
        taken = False
        try:
            with self._lanes.queue(background) as place:
                result = await trio.to_thread.run_sync(
                    self._in_thread,
                    call,
                    abandon_on_cancel=True,
                    limiter=cast("trio.CapacityLimiter", place),  # anything with its two methods
                )
            taken = True
            return result
        finally:
            call.stop_waiting(taken=taken)

    def _in_thread(self, call: Call[T]) -> T:
        """Make the call, in the thread, with the process of this store at hand."""
        here.process = self._process
        try:
            return call.in_thread()
        finally:
            here.process = None
