# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How long the steps of tasks are: counted in lines of code that run, exact whatever else the machine does."""

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import trio

from forebay_cache.durable.commit import Committer, Snapshot

_snapshot = Committer.snapshot


class Steps(trio.abc.Instrument):
    """Counts the lines that run in each step of each task, between two turns of others; one each time round a loop.

    The snapshot of a commit, which is one piece by its nature, is counted apart.
    """

    def __init__(self) -> None:
        self.most: tuple[float, str] = (0, "")
        """The longest step without snapshots, and the name of its task."""
        self.snapshot: float = 0
        """The longest snapshot."""
        self._lines = 0
        self._apart: float = 0  # of the step, what was counted apart
        self._began: float = 0

    def _count(self, frame: FrameType, event: str, arg: object) -> Any:
        del frame, event, arg
        self._lines += 1
        return self._count

    def _now(self) -> float:
        return self._lines

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Implements Instrument."""
        self._apart, self._began = 0, self._now()
        sys.settrace(self._count)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Implements Instrument."""
        sys.settrace(None)
        self.most = max(self.most, (self._now() - self._began - self._apart, task.name))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within it steps are counted."""

        def snapshot(committer: Committer) -> Snapshot:
            began = self._now()
            taken = _snapshot(committer)
            took = self._now() - began
            self._apart += took
            self.snapshot = max(self.snapshot, took)
            return taken

        self._began = self._now()
        trio.lowlevel.add_instrument(self)
        try:
            with mock.patch.object(Committer, "snapshot", snapshot):
                yield
        finally:
            trio.lowlevel.remove_instrument(self)
            sys.settrace(None)


class Milliseconds(Steps):
    """The same in milliseconds of processor time: for people, no test asserts it."""

    collection = 0.0
    """The longest garbage collection; it is part of the step in which it was."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within it steps are timed."""
        began = 0.0

        def note(phase: str, info: dict[str, int]) -> None:
            nonlocal began
            if phase == "start":
                began = self._now()
            else:
                self.collection = max(self.collection, self._now() - began)

        gc.callbacks.append(note)
        try:
            with super().counting():
                yield
        finally:
            gc.callbacks.remove(note)

    def _now(self) -> float:
        return 1000 * time.thread_time()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Implements Instrument."""
        self._apart, self._began = 0, self._now()
