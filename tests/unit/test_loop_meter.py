# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The meter of the event loop notices a task that runs for long, and who it is."""

import gc
import logging
import time

import pytest
import trio

import forebay.process.process
from forebay.control.prometheus.metrics import metrics_text
from forebay.daemon.figures.loop_meter import LoopMeter
from forebay.process.process import Survivors


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


@pytest.mark.parametrize(("seconds", "is_left_out"), [(-1.0, True), (1e9, False)])
def test_what_a_long_look_for_garbage_found_alive_is_left_out_of_the_next(
    monkeypatch: pytest.MonkeyPatch, seconds: float, is_left_out: bool
) -> None:
    monkeypatch.setattr(forebay.process.process, "LOOK_SECONDS", seconds)
    note = Survivors().note
    gc.disable()  # one that comes by itself looks through all objects, too
    gc.unfreeze()  # what was left out before, and has gone since, would count against it
    before = gc.get_freeze_count()
    gc.callbacks.append(note)
    try:
        gc.collect(1)
        assert gc.get_freeze_count() == before, "that was no look through all objects"
        gc.collect()
        assert (gc.get_freeze_count() > before) == is_left_out
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
        gc.enable()
