# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where a fault of Forebay itself ends: what a boundary keeps, what passes, and what is told of it."""

from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
import trio

from forebay.errors import ForebayError
from forebay.image.boundary import (
    LONGEST_TEXT,
    Boundary,
    breaks_the_cache,
    in_short,
    sole_fault,
)
from forebay_cache.states import Machine

EXPECTED = "d: stopped by a fault of Forebay itself"


def raised_in(module: str, code: str) -> Exception:
    """The exception that `code` raises, in a module of that name."""
    names: dict[str, Any] = {"__name__": module}
    exec(f"def fail():\n    {code}\n", names)
    try:
        names["fail"]()
    except Exception as fault:  # noqa: BLE001
        return fault
    raise AssertionError("it raised nothing")


async def fails(fault: BaseException) -> None:
    await trio.lowlevel.checkpoint()
    raise fault


async def fails_started(
    fault: BaseException, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    task_status.started("yes")
    await fails(fault)


async def test_an_exception_of_a_task_is_kept_and_the_others_go_on(
    expect_log: Callable[[str], None],
) -> None:
    expect_log(EXPECTED)
    faults: list[Exception] = []
    fault = ValueError("x")
    ended = trio.Event()

    async def other() -> None:
        await trio.testing.wait_all_tasks_blocked()
        ended.set()

    async with trio.open_nursery() as nursery:
        boundary = Boundary(nursery, "d", faults.append)
        boundary.start_soon(fails, fault)
        nursery.start_soon(other)
    assert faults == [fault]
    assert ended.is_set()


async def test_what_a_nursery_of_a_task_raises_is_kept(expect_log: Callable[[str], None]) -> None:
    expect_log(EXPECTED)
    faults: list[Exception] = []

    async def task(*, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as inner:
            inner.start_soon(fails, ValueError("x"))
            task_status.started()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await Boundary(nursery, "d", faults.append).start(task)
    [group] = faults
    assert isinstance(group, ExceptionGroup)
    assert in_short(group) == "ValueError: x"


async def test_a_task_that_fails_before_it_has_started_fails_who_starts_it() -> None:
    faults: list[Exception] = []

    async def task(*, task_status: trio.TaskStatus[None]) -> None:
        del task_status
        await fails(ValueError("x"))

    async with trio.open_nursery() as nursery:
        with pytest.raises(ValueError, match="x"):
            await Boundary(nursery, "d", faults.append).start(task)
    assert faults == []


async def test_what_it_has_started_with_is_returned(expect_log: Callable[[str], None]) -> None:
    expect_log(EXPECTED)
    faults: list[Exception] = []
    async with trio.open_nursery() as nursery:
        boundary = Boundary(nursery, "d", faults.append)
        assert await boundary.start(fails_started, ValueError("x")) == "yes"
    assert len(faults) == 1


async def test_cancellation_passes_and_what_came_with_it_is_kept(
    expect_log: Callable[[str], None],
) -> None:
    expect_log(EXPECTED)
    faults: list[Exception] = []

    async def fails_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("x")

    async def task() -> None:
        async with trio.open_nursery() as inner:
            inner.start_soon(fails_when_cancelled)
            inner.start_soon(trio.sleep_forever)

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            Boundary(nursery, "d", faults.append).start_soon(task)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert [in_short(fault) for fault in faults] == ["ValueError: x"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), SystemExit(3)])
async def test_what_ends_a_program_passes(fault: BaseException) -> None:
    faults: list[Exception] = []
    with pytest.raises(BaseExceptionGroup) as found:
        async with trio.open_nursery() as nursery:
            Boundary(nursery, "d", faults.append).start_soon(fails, fault)
    assert found.value.exceptions == (fault,)
    assert faults == []


@pytest.mark.parametrize("inside", [False, True])
async def test_a_broken_cache_passes(inside: bool) -> None:
    """Also in a group, beside something else."""
    fault: Exception = raised_in("forebay_cache.blocks.settle", "assert False, 'x'")
    if inside:
        fault = ExceptionGroup("", [ValueError(), ExceptionGroup("", [fault])])
    faults: list[Exception] = []
    with pytest.raises(ExceptionGroup):
        async with trio.open_nursery() as nursery:
            Boundary(nursery, "d", faults.append).start_soon(fails, fault)
    assert faults == []


@pytest.mark.parametrize(
    ("module", "code", "breaks"),
    [
        ("forebay_cache.cache", "assert False", True),
        ("forebay_cache", "assert False", True),
        ("forebay_cache.cache", "raise ValueError", False),
        ("forebay_cache_of_another", "assert False", False),
        ("forebay.disk.disk", "assert False", False),
    ],
)
def test_which_faults_are_of_what_all_disks_share(module: str, code: str, breaks: bool) -> None:
    assert breaks_the_cache(raised_in(module, code)) is breaks


class Lamp(Enum):
    OFF = "off"
    ON = "on"


def illegal_move(module: str, lamp: Machine[Lamp]) -> Exception:
    names: dict[str, Any] = {"__name__": module, "lamp": lamp, "on": Lamp.ON}
    exec("def fail():\n    lamp.become(on)\n", names)
    try:
        names["fail"]()
    except AssertionError as fault:
        return fault
    raise ValueError("it was legal")


@pytest.mark.parametrize("module", ["forebay.disk.disk", "forebay_cache.layers.layer"])
def test_an_illegal_move_is_a_fault_of_who_makes_it(module: str) -> None:
    lamp = Machine({Lamp.OFF: {}, Lamp.ON: {}}, Lamp.OFF, "the lamp")
    assert breaks_the_cache(illegal_move(module, lamp)) is module.startswith("forebay_cache")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (ValueError(), "ValueError"),
        (KeyError("x"), "KeyError: 'x'"),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (RuntimeError("two\n  lines\tand \x1b[31m colours"), "RuntimeError: two lines and ?[31m colours"),
        (ExceptionGroup("many", [ValueError("first"), KeyError("second")]), "ValueError: first"),
    ],
)  # fmt: skip
def test_a_fault_in_short_is_one_printable_line(fault: Exception, told: str) -> None:
    assert in_short(fault) == told


def test_a_fault_in_short_is_short() -> None:
    told = in_short(ValueError("x" * 10000))
    assert len(told) == len("ValueError: ") + LONGEST_TEXT


async def together(*faults: Exception | None) -> None:
    """Tasks beside each other: each fails so, or (None) goes on until it is cancelled."""

    async def task(fault: Exception | None) -> None:
        if fault is not None:
            raise fault
        await trio.sleep_forever()

    with sole_fault():
        async with trio.open_nursery() as nursery:
            for fault in faults:
                nursery.start_soon(task, fault)


@pytest.mark.parametrize("fault", [OSError("away"), ForebayError("refused")], ids=type)
async def test_the_fault_of_one_task_beside_another_keeps_its_kind(fault: Exception) -> None:
    with pytest.raises(type(fault)) as raised:
        await together(None, fault)
    assert raised.value is fault


async def test_two_faults_stay_a_group_and_cancelling_is_none() -> None:
    with pytest.raises(ExceptionGroup):
        await together(OSError(), OSError())
    with trio.move_on_after(0) as scope:
        await together(None, None)
    assert scope.cancelled_caught
