"""One thread that does one job after another for the event loop: index commits, device syncs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import trio


class Worker:
    """A thread of its own instead of a shared pool: a stuck pool elsewhere cannot delay a guest's flush."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    async def run(self, job: Callable[[], None]) -> None:
        """Run ``job`` in the thread and raise what it raises. Not cancellable: what was begun is waited for."""
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
        """The same from plain code, before the event loop runs or after it ended."""
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
        """End the thread when it has done what it was given."""
        self._jobs.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
