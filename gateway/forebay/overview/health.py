# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Whether the stores answer: each is asked when somebody wants to know, and one question waits at a store at a time."""

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from forebay.config.model import Config
from forebay.origin.threads import StoreThreads
from forebay.origin.worker import syscalls
from forebay.units import format_duration

log = logging.getLogger("forebay.overview")

SLOW_SECONDS = 0.5
"""A store that takes longer to say how much room it has is slow."""
PATIENCE_SECONDS = 2.0
"""So long an answer is waited for. A store that takes longer is told as it stands."""
AWAY_SECONDS = 10.0
"""A store that has not answered for so long is away."""

Told = dict[str, Any]
"""What is told about one store."""


def room_in(path: str) -> tuple[int, int]:
    """Bytes that a store's file system still takes, and that it has in all. Blocks; raises OSError."""
    fd = syscalls.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return syscalls.room(fd)
    finally:
        syscalls.close(fd)


class Question:
    """One question to a store: how much room is there?"""

    def __init__(self, path: str, threads: StoreThreads) -> None:
        """`threads` are for such questions alone, so that none waits behind guests."""
        self._path = path
        self._threads = threads
        self._clock = time.monotonic
        self._began = self._clock()
        self._took = 0.0
        self._room: tuple[int, int] | None = None
        self._error = ""
        self.answered = trio.Event()

    async def ask(self) -> None:
        """Ask. Raises nothing: what went wrong is told."""
        try:
            self._room = await self._threads.run(partial(room_in, self._path))
        except OSError as fault:
            self._error = fault.strerror or str(fault)
        except Exception as fault:
            log.exception("store at %s: how it stands cannot be found out", self._path)
            self._error = f"a fault of Forebay itself ({type(fault).__name__})"
        finally:
            self._took = self._clock() - self._began
            self.answered.set()

    def told(self) -> Told:
        """How the store stands, by the answer, or by how long there was none."""
        if not self.answered.is_set():
            age = self._clock() - self._began
            state = "away" if age >= AWAY_SECONDS else "slow"
            return _told(state, f"no answer for {format_duration(age)}")
        if self._room is None:
            return _told("away", self._error)
        if self._took > SLOW_SECONDS:
            return _told("slow", f"took {format_duration(self._took)} to answer", self._room)
        return _told("ok", None, self._room)


def _told(state: str, reason: str | None, room: tuple[int, int] | None = None) -> Told:
    told: Told = {"state": state, "reason": reason}
    return told if room is None else told | {"free_bytes": room[0], "size": room[1]}


class StoreHealth:
    """How all stores of the configuration stand."""

    def __init__(
        self, config: Config, nursery: trio.Nursery, threads_of: Callable[[str], StoreThreads]
    ) -> None:
        """`nursery` outlives all questions. `threads_of` gives the threads of the store with that name."""
        self._config = config
        self._nursery = nursery
        self._threads_of = threads_of
        self._threads: dict[str, StoreThreads] = {}
        self._questions: dict[str, Question] = {}
        """By store: the last one."""

    async def look(self) -> list[Told]:
        """Each store, in the order of the configuration: ok, slow or away, and why. Takes PATIENCE_SECONDS at most."""
        asked = {name: self._asked(name) for name in self._config.stores}
        with trio.move_on_after(PATIENCE_SECONDS):
            for question in asked.values():
                await question.answered.wait()
        return [{"store": name, **question.told()} for name, question in asked.items()]

    def _asked(self, store: str) -> Question:
        """The question that a store has not answered yet, or a new one."""
        question = self._questions.get(store)
        if question is None or question.answered.is_set():
            if store not in self._threads:
                self._threads[store] = self._threads_of(store).apart(1, 1)
            path = str(self._config.store(store).path)
            question = self._questions[store] = Question(path, self._threads[store])
            self._nursery.start_soon(question.ask)
        return question
