# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The meter of the event loop notices a task that runs for long, and who it is."""

import logging
import time

import pytest
import trio

from forebay.control.metrics import metrics_text
from forebay.daemon.loop_meter import LoopMeter


async def hold_up(seconds: float) -> None:
    await trio.lowlevel.checkpoint()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    await trio.lowlevel.checkpoint()


def measured(seconds: float) -> LoopMeter:
    meter = LoopMeter()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(meter.run)
            await trio.sleep(0.01)
            await hold_up(seconds)
            nursery.cancel_scope.cancel()

    trio.run(run)
    return meter


def test_a_long_turn_is_measured_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        meter = measured(0.5)
    assert 0.5 <= meter.longest < 5
    assert meter.stalls >= meter.long_stalls >= 1
    (line,) = [r.getMessage() for r in caplog.records if "hold_up" in r.getMessage()]
    assert "in the task " in line
    text = metrics_text([], meter.figures())
    assert f"forebay_loop_stall_seconds_max {meter.longest}" in text
    assert 'forebay_loop_stalls_total{longer_than="0.1"} ' in text


def test_waiting_is_no_stall() -> None:
    meter = LoopMeter()

    async def run() -> None:
        with trio.move_on_after(1):
            await meter.run()

    trio.run(run)
    assert meter.longest < 0.9
