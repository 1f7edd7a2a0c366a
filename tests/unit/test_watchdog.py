# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""When the watchdog is fed: as long as requests get answers, whatever the event loop does."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import pytest
import trio
import trio.testing

from forebay.daemon.attached import Attached
from forebay.process import watchdog
from forebay.process.watchdog import MARGIN_SECONDS, Watch, feed

TIMEOUT = 60.0
PATIENCE = TIMEOUT + MARGIN_SECONDS


@dataclass
class Listener:
    unanswered_since: float | None = None
    clients: int = 1


@dataclass
class Settings:
    origin_timeout: float = TIMEOUT


@dataclass
class Timing:
    looks: int = 0

    def look(self) -> None:
        self.looks += 1


@dataclass
class Block:
    timing: Timing = field(default_factory=Timing)
    settings: Settings = field(default_factory=Settings)
    dirty_bytes: int = 0


@dataclass
class Fake:
    """What the watch sees of a disk."""

    name: str = "d"
    moved: int = 0
    listener: Listener = field(default_factory=Listener)
    disk: Block = field(default_factory=Block)

    def pulse(self) -> tuple[int, ...]:
        return (self.moved,)


async def stuck(watch: Watch, *disks: Fake) -> str | None:
    return await watch.stuck(cast("list[Attached]", disks))


async def test_a_request_without_answer_counts_when_nothing_moves(
    autojump_clock: trio.testing.MockClock,
) -> None:
    watch, disk, other = Watch(), Fake(), Fake("other")
    assert await stuck(watch, disk, other) is None
    disk.listener.unanswered_since = trio.current_time()
    for _ in range(int(PATIENCE // 10)):
        await trio.sleep(10)
        assert await stuck(watch, disk, other) is None
    await trio.sleep(10)
    found = await stuck(watch, disk, other)
    assert found is not None
    assert "'d'" in found
    disk.listener.unanswered_since = None
    assert await stuck(watch, disk, other) is None


async def test_a_slow_request_is_none_that_hangs(autojump_clock: trio.testing.MockClock) -> None:
    """Zeroing a terabyte on a slow store: minutes for one answer, and something moves all the time."""
    watch, disk = Watch(), Fake()
    disk.listener.unanswered_since = trio.current_time()
    for _ in range(100):
        await trio.sleep(PATIENCE - 1)
        disk.moved += 1
        assert await stuck(watch, disk) is None


async def test_an_idle_disk_is_none_that_hangs(autojump_clock: trio.testing.MockClock) -> None:
    watch, disk = Watch(), Fake()
    for _ in range(10):
        await trio.sleep(PATIENCE * 2)
        assert await stuck(watch, disk) is None
    disk.listener.unanswered_since = trio.current_time()
    assert await stuck(watch, disk) is None, "it counts from when the request came"


@pytest.mark.expect_log("the watchdog is not fed any more")
async def test_it_is_fed_until_then(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[float, str]] = []

    def notify(state: str, *, wait: bool) -> bool:
        said.append((trio.current_time(), state))
        return True

    monkeypatch.setattr(watchdog, "notify", notify)
    monkeypatch.setattr(watchdog, "watchdog_seconds", lambda: 30.0)
    disk = Fake()
    begin = trio.current_time()
    disk.listener.unanswered_since = begin
    with trio.move_on_after(10 * PATIENCE):
        await feed(lambda: cast("Any", [disk]))
    fed = [at - begin for at, state in said if state == "WATCHDOG=1"]
    assert fed[0] == 0
    assert max(b - a for a, b in pairwise(fed)) <= 15
    assert PATIENCE - 15 <= fed[-1] <= PATIENCE
    assert "answers nothing" in said[-1][1]
    assert said[1][1] == "STATUS=1 disks, 1 clients, 0 dirty"


@pytest.mark.expect_log("the disks cannot be looked at")
async def test_a_disk_that_cannot_be_looked_at_is_no_reason_to_stop_feeding(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    said: list[str] = []

    def notify(state: str, *, wait: bool) -> bool:
        said.append(state)
        return True

    monkeypatch.setattr(watchdog, "notify", notify)
    monkeypatch.setattr(watchdog, "watchdog_seconds", lambda: 30.0)
    disk = Fake()
    monkeypatch.setattr(disk, "pulse", None)
    with trio.move_on_after(100):
        await feed(lambda: cast("Any", [disk]))
    assert said.count("WATCHDOG=1") > 5
    assert "STATUS=the state of the disks cannot be told: see the log" in said
    assert len(caplog.records) == 1, "it is said once"
