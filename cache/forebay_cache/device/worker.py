# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One thread that does one job after another for the event loop: index commits, device syncs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import trio


class Worker:
    """One thread, named ``name``. It is not one of trio's pool, in which jobs that hang could delay a guest's flush."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    async def run(self, job: Callable[[], None]) -> None:
        """Run ``job`` in the thread, after the jobs before it, and raise what it raises. Not cancellable."""
        finished = trio.Event()
        token = trio.lowlevel.current_trio_token()
        failure: list[BaseException] = []

        def work() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001  (raised where run() was called)
                failure.append(error)
            token.run_sync_soon(finished.set)

        self._jobs.put(work)
        with trio.CancelScope(shield=True):
            await finished.wait()
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
        """Wait until the thread has done what it was given, and end it."""
        self._jobs.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
