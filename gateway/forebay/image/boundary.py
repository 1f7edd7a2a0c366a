# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where a fault of Forebay itself ends: tasks of a disk or of an image, whose exceptions reach nobody else.

Each disk, and each image, has one :class:`Boundary` around all of its tasks. Whatever exception a task ends with, the
disk (or every disk of the image) stops with that as its reason, and all others go on. What comes out of the tasks of
the cache itself ends the process, and so does an assertion that failed in the cache's code when a task of a disk called
it: what all disks share may be wrong then. The journal of the cache has what was acknowledged.
"""

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import trio

from forebay.events.telling import by_itself

log = logging.getLogger("forebay.daemon")

Task = Callable[..., Awaitable[object]]

LONGEST_TEXT = 200
"""Characters of what an exception says that are told; the log has all of it."""

CACHE = "forebay_cache"
"""The package whose assertions are about the state that all disks share."""

_MACHINES = "forebay_cache.states"
"""Raises for whoever has a state: it is the caller that counts."""


class Boundary:
    """Starts tasks in a nursery, and keeps their exceptions from it.

    An exception of a task that was started is logged with its traceback, and handed to `on_fault`; the other tasks are
    for `on_fault` to end. Cancellation passes, as do KeyboardInterrupt, SystemExit, and what `breaks_the_cache`.
    """

    def __init__(
        self, nursery: trio.Nursery, what: str, on_fault: Callable[[Exception], None]
    ) -> None:
        """`what` names in the log whose tasks they are. `on_fault` is called from the task, and must not raise."""
        self._nursery = nursery
        self._what = what
        self._on_fault = on_fault

    def start_soon(self, task: Task, *args: object) -> None:
        """As `trio.Nursery.start_soon`."""
        self._nursery.start_soon(self._run, task, args, name=task)

    async def start(self, task: Task, *args: object) -> Any:
        """As `trio.Nursery.start`: what `task` raises before it says that it has started is raised here."""
        return await self._nursery.start(self._run_started, task, args, name=task)

    async def _run(self, task: Task, args: tuple[object, ...]) -> None:
        by_itself()
        try:
            await task(*args)
        except BaseException as fault:
            if not self._keeps(fault):
                raise

    async def _run_started(
        self, task: Task, args: tuple[object, ...], *, task_status: trio.TaskStatus[Any]
    ) -> None:
        by_itself()
        status = _Status(task_status)
        try:
            await task(*args, task_status=status)
        except BaseException as fault:
            if not status.has_started or not self._keeps(fault):
                raise

    def _keeps(self, fault: BaseException) -> bool:
        """True if nothing of what a task ended with is to reach the nursery. Raises what of it is, if it is a part."""
        ours, others = _split(fault)
        if ours is None or breaks_the_cache(ours):
            return False
        log.error("%s: stopped by a fault of Forebay itself", self._what, exc_info=ours)
        self._on_fault(ours)
        if others is not None:
            raise others
        return True


class _Status:
    """Tells whoever started a task that it has started, and remembers that."""

    def __init__(self, status: trio.TaskStatus[Any]) -> None:
        self._status = status
        self.has_started = False

    def started(self, value: object = None) -> None:
        """As trio.TaskStatus."""
        self.has_started = True
        self._status.started(value)


def _split(fault: BaseException) -> tuple[Exception | None, BaseException | None]:
    """The exceptions in it, and what is none: cancellation and the like."""
    if isinstance(fault, Exception):
        return fault, None
    if isinstance(fault, BaseExceptionGroup):
        ours, others = fault.split(Exception)
        assert ours is None or isinstance(ours, Exception)
        return ours, others
    return None, fault


def leaves(fault: BaseException) -> list[BaseException]:
    """The exceptions of a group, however deep in it; the exception itself where it is no group."""
    if isinstance(fault, BaseExceptionGroup):
        return [leaf for inner in fault.exceptions for leaf in leaves(inner)]
    return [fault]


@contextlib.contextmanager
def sole_fault() -> Iterator[None]:
    """Where a nursery in the body raises a group of one exception, that is raised: who expects its kind catches it."""
    try:
        yield
    except BaseExceptionGroup as group:
        inner = leaves(group)
        if len(inner) > 1:
            raise
        raise inner[0] from None


def breaks_the_cache(fault: BaseException) -> bool:
    """True for an assertion that failed in the code of the cache: its invariants hold no more."""
    return any(isinstance(one, AssertionError) and _is_of_the_cache(one) for one in leaves(fault))


def _is_of_the_cache(fault: BaseException) -> bool:
    """True if it was raised in the package of the cache."""
    module = ""
    trace = fault.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        module = module if name == _MACHINES else name
        trace = trace.tb_next
    return module.partition(".")[0] == CACHE


def in_short(fault: BaseException) -> str:
    """The kind of an exception and what it says, in one printable line of bounded length."""
    first = leaves(fault)[0]
    said = " ".join(str(first).split())
    text = "".join(c if c.isprintable() else "?" for c in said)
    text = text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
    return f"{type(first).__name__}: {text}" if text else type(first).__name__
