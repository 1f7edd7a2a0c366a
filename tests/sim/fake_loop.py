# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A trio loop in which nothing depends on anything but a seed: one thread, a clock of its own, latencies by dice.

What the code under test hands to threads (origin calls, index commits, device syncs, slow reads) is run here by the
loop itself, at a moment drawn at random between the call and its return. So every interleaving that threads could
bring can come up, time costs nothing, and a seed replays to the byte.
"""

import contextlib
import gc
import math
import os
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeVar, TypeVarTuple, Unpack
from unittest import mock

import outcome
import trio
from trio.testing import MockClock

import forebay.checkpoint.ages
import forebay_cache.cache
import forebay_cache.device.pace
import forebay_cache.index.index
import forebay_cache.layers.registry
import forebay_cache.slots.ready
import forebay_cache.upkeep.medium
import forebay_fast
from forebay_cache.device.syncer import Run
from forebay_cache.device.worker import timed_out

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: Seconds that a call may take before and after it does its work. 0 is no time, but others may run.
LATENCIES = (0.0, 0.0, 0.0, 0.0001, 0.0003, 0.001, 0.004)


class Dice:
    """All randomness of one run."""

    def __init__(self, seed: object) -> None:
        self.random = random.Random(repr(seed))
        self.device_scale = 1.0
        """How slow the threads are that read and write a cache device."""
        self.hang: trio.Event | None = None
        """What they hang in before they do anything, until it is set; None: in nothing."""
        self.index_hang: trio.Event | None = None
        """The same of the thread that commits."""

    async def pause(self, scale: float = 1.0) -> None:
        """Let some time pass, or none; others may run in any case."""
        await trio.sleep(self.random.choice(LATENCIES) * scale)


class FakeWorker:
    """Stands for device.worker.Worker: the job is done by the loop, some time after it was handed over."""

    dice: Dice

    def __init__(self, name: str) -> None:
        self._last = trio.Event()
        self._last.set()
        self._lost = 0

    @property
    def is_hanging(self) -> bool:
        return self._lost > 0

    async def run(self, job: Callable[[], None], limit: float = math.inf) -> None:
        if self.is_hanging:
            raise timed_out(limit)
        got: list[outcome.Outcome[None]] = []
        before, self._last = self._last, trio.Event()
        done = self._last
        given_up = False

        async def thread() -> None:
            await before.wait()  # in the order of the calls
            await self.dice.pause()
            if self.dice.index_hang is not None:
                await self.dice.index_hang.wait()
            got.append(outcome.capture(job))
            await self.dice.pause()
            done.set()
            self._lost -= given_up

        trio.lowlevel.spawn_system_task(thread)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + limit):
            await done.wait()
        if not done.is_set():
            given_up = True
            self._lost += 1
            raise timed_out(limit)
        got[0].unwrap()

    def run_now(self, job: Callable[[], None]) -> None:
        job()

    def close(self) -> None:
        pass


class FakeSyncer:
    """Stands for forebay_cache.device.syncer.Syncer: a sync takes in what was written before it was asked for.

    A kernel may also take in what is written while it is at it. Nobody may rely on that, so ``begin``, if set, is told
    where to draw the line.
    """

    dice: Dice
    begin: Callable[[], None] | None = None
    hangs = False
    seconds = 1e-3

    def __init__(self, fd: int, sync: Callable[[], None], *_: object) -> None:
        self._sync = sync
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._done = trio.Event()
        self._got: outcome.Outcome[None] = outcome.Value(None)
        self.run = Run()
        self.pending = False

    def look(self) -> None:
        pass

    def start(self) -> bool:
        if self.dice.random.random() < 0.2:
            return False  # a thread would have to do it
        if self.begin is not None:
            self.begin()
        self.run, self.pending, self._done = Run(), True, trio.Event()
        trio.lowlevel.spawn_system_task(self._kernel)
        return True

    async def _kernel(self) -> None:
        await self.dice.pause()
        self._got = outcome.capture(self._sync)
        await self.dice.pause()
        os.eventfd_write(self._event, 1)
        self._done.set()

    def fileno(self) -> int:
        return self._event

    def collect(self) -> None:
        if self.pending and self._done.is_set():
            os.eventfd_read(self._event)
            self.pending, self.run.has_ended = False, True
            if isinstance(self._got, outcome.Error):
                assert isinstance(self._got.error, OSError)
                self.run.error = self._got.error
            self._got.unwrap()

    async def finish(self) -> None:
        with trio.CancelScope(shield=True):
            await self._done.wait()
        self.collect()

    @property
    def quick(self) -> bool:
        return self.dice.random.random() < 0.3

    def now(self) -> bool:
        if self.begin is not None:
            self.begin()
        self._sync()
        return True

    async def __call__(self) -> None:
        if self.begin is not None:
            self.begin()
        if self.dice.random.random() < 0.3:  # done before anybody else had a turn
            self._sync()
            return
        with trio.CancelScope(shield=True):
            await self.dice.pause()
            try:
                self._sync()
            finally:
                await self.dice.pause()

    def close(self) -> None:
        if not self.pending:
            os.close(self._event)


async def _in_thread(dice: Dice, job: Callable[[], T]) -> T:
    """A call that goes on when whoever waits for it is cancelled: those of a cache device."""
    got: list[outcome.Outcome[T]] = []
    done = trio.Event()

    async def thread() -> None:
        await dice.pause(dice.device_scale)
        while dice.hang is not None and not dice.hang.is_set():
            await dice.hang.wait()
        got.append(outcome.capture(job))
        await dice.pause(dice.device_scale)
        done.set()

    trio.lowlevel.spawn_system_task(thread)
    await done.wait()
    return got[0].unwrap()


@contextlib.contextmanager
def simulated(dice: Dice, *, slow: bool = False) -> Iterator[type[FakeSyncer]]:
    """Within it, threads are fake and trio's scheduler follows the dice. Gives the class of the fake syncers.

    ``slow``: cache devices are such that only threads may write to them.
    """
    gc.collect()  # devices and images of the last one, which cycles of tasks hold: a hundred megabytes at times

    async def run_sync(
        job: Callable[[Unpack[Ts]], T],
        *args: *Ts,
        abandon_on_cancel: bool = False,
        limiter: trio.CapacityLimiter | None = None,
    ) -> T:
        if abandon_on_cancel:
            return await _in_thread(dice, partial(job, *args))
        await dice.pause()
        result = job(*args)
        with trio.CancelScope(shield=True):
            await dice.pause()
        return result

    worker = type("SeededWorker", (FakeWorker,), {"dice": dice})
    syncer = type("SeededSyncer", (FakeSyncer,), {"dice": dice})
    scheduler = random.Random(dice.random.random())
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (trio.to_thread, "run_sync", run_sync),
            (forebay.checkpoint.ages, "wall_clock", trio.current_time),
            (forebay_cache.device.pace, "clock", trio.current_time),
            (forebay_cache.device.pace, "waited", lambda: 0.0),
            (forebay_cache.cache, "Syncer", syncer),
            (forebay_cache.cache, "is_kept_in_memory", lambda fd: not slow),
            (forebay_cache.index.index, "Worker", worker),
            (forebay_cache.upkeep.medium, "Worker", worker),
            (forebay_cache.slots.ready, "RESIDENCY_SECONDS", 1e9),
            (forebay_cache.layers.registry, "PAGES_KEPT", dice.random.choice((0, 1, 32768))),
            (trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
            (trio._core._run, "_r", scheduler),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(core_by_python())
        yield syncer


@contextlib.contextmanager
def core_by_python() -> Iterator[None]:
    """Within it the compiled core, if there is one, has `Device` write, as Python does: fakes see each write."""
    if forebay_fast.missing:
        yield
        return
    forebay_fast.core.write_by_python(True)
    try:
        yield
    finally:
        forebay_fast.core.write_by_python(False)


class Loop:
    """A trio run that goes on between calls from plain code: time stands still while nobody calls.

    trio's guest mode, with this object as the host. With a clock that jumps, trio never has to wait for anything, so
    it never uses the thread that guest mode has for that.
    """

    def __init__(self) -> None:
        self._queue: deque[Callable[[], object]] = deque()
        self._ended: outcome.Outcome[Any] | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self.clock = MockClock(autojump_threshold=0)
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self._queue.append,
            done_callback=self._done,
            host_uses_signal_set_wakeup_fd=True,
            clock=self.clock,
        )
        self._pump(lambda: self._nursery is not None)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    def _done(self, result: outcome.Outcome[Any]) -> None:
        self._ended = result

    def _pump(self, until: Callable[[], bool]) -> None:
        while not until():
            if self._ended is not None:
                self._ended.unwrap()
                raise AssertionError("the loop has ended")
            self._queue.popleft()()

    @property
    def nursery(self) -> trio.Nursery:
        """For background tasks; an exception of theirs ends the loop and is raised by :meth:`run`."""
        assert self._nursery is not None
        return self._nursery

    def run(self, do: Callable[[Unpack[Ts]], Awaitable[T]], *args: *Ts) -> T:
        """Call an async function in the loop; what it returns or raises."""
        got: list[outcome.Outcome[T]] = []

        async def call() -> None:
            got.append(await outcome.acapture(do, *args))

        def start() -> None:
            self.nursery.start_soon(call)

        assert self._token is not None
        self._token.run_sync_soon(start)
        self._pump(lambda: bool(got))
        return got[0].unwrap()

    @property
    def ended(self) -> bool:
        """Whether nothing can be run any more: a background task has raised something."""
        return self._ended is not None

    def close(self) -> None:
        """Cancel everything and end. Raises what a background task raises then."""
        if self._ended is not None:
            return
        assert self._token is not None
        self._token.run_sync_soon(self.nursery.cancel_scope.cancel)
        while not self.ended:
            self._queue.popleft()()
        self._outcome().unwrap()

    def _outcome(self) -> outcome.Outcome[Any]:
        assert self._ended is not None
        return self._ended
