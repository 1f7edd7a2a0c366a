# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Connections at rest, served by the core while trio's loop waits: no task runs for what needs none.

Trio waits in the `poll` of an epoll object, which is its own business. The core has an object with the same methods
that serves connections meanwhile, and this module puts it there. Where trio keeps that object elsewhere, or a loop is
run in guest mode, connections wait as all tasks do, and are served by turns from there.
"""

import math
import select
import time
from typing import Any

import outcome
import trio

from forebay_fast import core

_wait: trio.lowlevel.RunVar["core.Wait | None"] = trio.lowlevel.RunVar("forebay_fast.wait")


def wait_of_loop() -> "core.Wait | None":
    """What connections of the running loop may rest in; None where they cannot."""
    try:
        return _wait.get()
    except LookupError:
        found = _put_in_place()
        _wait.set(found)
        return found


def epoll_of_loop() -> tuple[Any, select.epoll] | None:
    """The object of the running loop that keeps the epoll object as `_epoll`, and that; None where there is none."""
    try:
        runner = trio._core._run.GLOBAL_RUN_CONTEXT.runner  # noqa: SLF001
        manager, is_guest = runner.io_manager, runner.is_guest
        epoll = manager._epoll  # noqa: SLF001
    except AttributeError:
        return None
    if is_guest or not isinstance(epoll, select.epoll):
        return None
    return manager, epoll


def offset_of_clock() -> float:
    """Seconds that trio's time is ahead of CLOCK_MONOTONIC; not a number where trio has another clock, as in tests."""
    system = getattr(trio._core._run, "SystemClock", None)  # noqa: SLF001
    try:
        if type(trio.lowlevel.current_clock()) is system:
            return trio.current_time() - time.perf_counter()
    except RuntimeError:  # no loop
        pass
    return math.nan


def _put_in_place() -> "core.Wait | None":
    found = epoll_of_loop()
    if found is None:
        return None
    manager, epoll = found
    manager._epoll = wait = core.Wait(epoll)  # noqa: SLF001
    return wait


async def rest(wait: "core.Wait", turn: "core.Rest") -> int:
    """Have it served until Python has to look at something: a status of its `run`, not WAIT or YIELD.

    Raises what an export raised. Cancelled, it leaves what was received to whoever goes on.
    """
    task = trio.lowlevel.current_task()

    def woken(told: int | Exception) -> None:
        found = outcome.Error(told) if isinstance(told, Exception) else outcome.Value(told)
        trio.lowlevel.reschedule(task, found)

    def abort(_: Any) -> trio.lowlevel.Abort:
        wait.remove(turn)
        return trio.lowlevel.Abort.SUCCEEDED

    wait.add(turn, woken)
    status: int = await trio.lowlevel.wait_task_rescheduled(abort)
    return status
