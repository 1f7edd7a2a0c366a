# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One thread that does one job after another for the event loop: index commits, device syncs."""

from __future__ import annotations

import errno
import math
import queue
import threading
from collections.abc import Callable
from typing import Final

import trio

TIMEOUT: Final = 30.0
"""Seconds after which a call to the device, or to the index, is given up, unless somebody says something else."""


def timed_out(seconds: float) -> OSError:
    """What is raised where something has not answered for so long."""
    return OSError(errno.ETIMEDOUT, f"no answer for {seconds:g} seconds")


class Worker:
    """One thread, named ``name``. It is not one of trio's pool, in which jobs that hang could delay a guest's flush."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lost = 0  # jobs that were given up and have not ended
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def is_hanging(self) -> bool:
        """True while a job is under way that was given up: it may do its work at any time."""
        return self._lost > 0

    async def run(self, job: Callable[[], None], limit: float = math.inf) -> None:
        """Run ``job`` in the thread, after the jobs before it, and raise what it raises. Not cancellable.

        Raises OSError(ETIMEDOUT) if it has not ended after ``limit`` seconds, and at once while such a job is under
        way.
        """
        if self.is_hanging:
            raise timed_out(limit)
        finished = trio.Event()
        token = trio.lowlevel.current_trio_token()
        failure: list[BaseException] = []

        def work() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001  (raised where run() was called)
                failure.append(error)
            token.run_sync_soon(over)

        given_up = False

        def over() -> None:
            finished.set()
            self._lost -= given_up

        self._jobs.put(work)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + limit):
            await finished.wait()
        if not finished.is_set():
            given_up = True
            self._lost += 1
            raise timed_out(limit)
        if failure:
            raise failure[0]

    def run_now(self, job: Callable[[], None]) -> None:
        """The same for plain code: it blocks. For before the event loop runs, or after it has ended."""
        done = threading.Event()
        failure: list[BaseException] = []

        def work() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001  (raised where run_now() was called)
                failure.append(error)
            done.set()

        self._jobs.put(work)
        done.wait()
        if failure:
            raise failure[0]

    def close(self) -> None:
        """Wait until the thread has done what it was given, and end it. One that hangs is left alone."""
        self._jobs.put(None)
        if not self.is_hanging:
            self._thread.join()

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
