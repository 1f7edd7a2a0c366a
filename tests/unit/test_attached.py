# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The life of an attached disk: when it is served, what stops it, and how it goes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from forebay.daemon.attached import Attached
from forebay.daemon.record import DiskRecord
from forebay.doors.tenant import Rule, Tenant
from forebay.errors import ForebayError

LOGGED = "disk 'd': stopped by a fault of Forebay itself"


class FakeDisk:
    """Its background work waits until it is told to fail."""

    overlay = False

    def __init__(self) -> None:
        self.fails = trio.Event()
        self.fault: Exception = RuntimeError("planted")
        self.drains: list[Exception | None] = []

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._work)
            task_status.started()

    async def _work(self) -> None:
        await self.fails.wait()
        raise self.fault

    async def drain(self, progress: Any) -> None:
        del progress
        await trio.lowlevel.checkpoint()
        if fault := self.drains.pop(0):
            raise fault

    def status(self) -> dict[str, Any]:
        return {"state": "ready", "reason": None}


class FakeListener:
    """Open from `open` on, until it is hung up."""

    path = "/run/d.sock"
    clients = 0
    answered = 0
    tenant = Tenant("d", Path("/run"), Rule("first"))

    def __init__(self) -> None:
        self.is_open = False
        self.opened = 0
        self.on_open: Callable[[], None] = lambda: None

    async def open(self, nursery: object, earlier: object = None) -> None:
        del nursery, earlier
        self.on_open()
        await trio.testing.wait_all_tasks_blocked()
        self.is_open = True
        self.opened += 1

    async def shut(self, seconds: float) -> None:
        del seconds
        await trio.lowlevel.checkpoint()
        self.is_open = False

    def hang_up(self) -> None:
        self.is_open = False


class Bed:
    """An attached disk over fakes."""

    def __init__(self) -> None:
        self.disk, self.listener = FakeDisk(), FakeListener()
        source = SimpleNamespace(use=SimpleNamespace(disk="d"))
        self.attached = Attached(
            DiskRecord("i", "i", 0),
            cast("Any", source),
            cast("Any", self.disk),
            cast("Any", self.listener),
        )

    def fail(self) -> None:
        self.disk.fails.set()


@pytest.fixture
def bed() -> Bed:
    return Bed()


async def test_a_disk_is_served_until_it_rests(bed: Bed, nursery: trio.Nursery) -> None:
    await bed.attached.start(nursery)
    assert bed.listener.is_open
    assert bed.attached.status() == {
        "state": "ready",
        "reason": None,
        "cache_size": None,
        "preload": None,
        "clients": 0,
        "socket": "/run/d.sock",
        **bed.listener.tenant.status(),
    }
    await bed.attached.end()
    assert not bed.listener.is_open


async def test_a_fault_stops_it(
    bed: Bed, nursery: trio.Nursery, expect_log: Callable[[str], None]
) -> None:
    expect_log(LOGGED)
    await bed.attached.start(nursery)
    bed.attached.check_serves()
    bed.fail()
    await trio.testing.wait_all_tasks_blocked()
    assert not bed.listener.is_open
    status = bed.attached.status()
    assert status["state"] == "stopped"
    assert "RuntimeError: planted" in status["reason"]
    with pytest.raises(ForebayError, match="'d' is stopped: a fault of Forebay itself"):
        bed.attached.check_serves()
    await bed.attached.rest()


async def test_one_whose_status_cannot_be_told_says_so_once_in_the_log(
    bed: Bed,
    nursery: trio.Nursery,
    expect_log: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expect_log("disk 'd': its status cannot be told")
    await bed.attached.start(nursery)
    with monkeypatch.context() as planted:
        planted.setattr(bed.disk, "status", None)
        told = [bed.attached.status() for _ in range(3)]
        moved = bed.attached.pulse()
        bed.listener.answered += 1
        assert bed.attached.pulse() != moved, "the watchdog still sees it move"
    assert told[0] == told[2]
    assert (told[0]["name"], told[0]["state"], told[0]["socket"]) == ("d", "failed", "/run/d.sock")
    assert "TypeError: 'NoneType' object is not callable" in told[0]["reason"]
    assert len(caplog.records) == 1
    assert bed.attached.status()["state"] == "ready"
    await bed.attached.end()


async def test_the_first_fault_is_told(
    bed: Bed, nursery: trio.Nursery, expect_log: Callable[[str], None]
) -> None:
    expect_log(LOGGED)
    await bed.attached.start(nursery)
    bed.fail()
    await trio.testing.wait_all_tasks_blocked()
    bed.attached.stop(KeyError("later"))
    assert "planted" in bed.attached.reason


async def test_a_disk_that_fails_while_its_socket_is_opened_is_stopped(
    bed: Bed, nursery: trio.Nursery, expect_log: Callable[[str], None]
) -> None:
    expect_log(LOGGED)
    bed.listener.on_open = bed.fail
    await bed.attached.start(nursery)
    assert not bed.listener.is_open
    assert bed.attached.status()["state"] == "stopped"


async def test_a_detach_that_is_given_up_goes_on_serving(bed: Bed, nursery: trio.Nursery) -> None:
    await bed.attached.start(nursery)
    bed.attached.begin_detach()
    await bed.listener.shut(1)
    await bed.attached.accept_again()
    bed.attached.give_up_detach()
    assert bed.listener.is_open
    await bed.attached.end()


async def test_a_detach_of_a_stopped_disk_that_is_given_up_leaves_it_stopped(
    bed: Bed, nursery: trio.Nursery, expect_log: Callable[[str], None]
) -> None:
    expect_log(LOGGED)
    await bed.attached.start(nursery)
    bed.fail()
    await trio.testing.wait_all_tasks_blocked()
    bed.attached.begin_detach()
    await bed.attached.accept_again()
    bed.attached.give_up_detach()
    assert bed.listener.opened == 1
    assert not bed.listener.is_open
    assert bed.attached.status()["state"] == "stopped"


async def test_a_detach_under_way_when_the_daemon_ends_opens_nothing(
    bed: Bed, nursery: trio.Nursery
) -> None:
    await bed.attached.start(nursery)
    bed.attached.begin_detach()
    await bed.attached.end()
    await bed.attached.accept_again()
    bed.attached.give_up_detach()
    assert not bed.listener.is_open


async def test_what_goes_wrong_while_a_stopped_disk_is_drained_says_what_to_do(
    bed: Bed, nursery: trio.Nursery, expect_log: Callable[[str], None]
) -> None:
    expect_log(LOGGED)
    bed.disk.drains = [KeyError("x"), OSError(5, "store"), KeyError("y"), None]

    def nothing(done: int, total: int) -> None:
        del done, total

    await bed.attached.start(nursery)
    with pytest.raises(KeyError):
        await bed.attached.drain(nothing)
    bed.fail()
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(OSError, match="store"):
        await bed.attached.drain(nothing)
    with pytest.raises(ForebayError, match=r"cannot be written back \(KeyError: 'y'\).*--discard"):
        await bed.attached.drain(nothing)
    await bed.attached.drain(nothing)


async def test_one_that_was_never_started_has_nothing_to_wait_for(bed: Bed) -> None:
    with trio.fail_after(1):
        await bed.attached.rest()
