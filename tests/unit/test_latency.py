# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Histograms, what requests wait for, the log of slow ones, and how both are told."""

import json
import logging
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import trio

import forebay_fast
from forebay.cli.latency.shown import each, heading, histogram, once, totals
from forebay.cli.latency.taken import Look, octaves_of
from forebay.control.prometheus.latency import AT_ONCE, BOUNDS, latency_lines
from forebay.errors import ForebayError
from forebay.events.telling import keep_with
from forebay.latency import requests as requests_module
from forebay.latency import waits as waits_module
from forebay.latency.requests import MOST_LINES, QUIET_SECONDS, Requests, SlowLog
from forebay.latency.waits import DEVICE, ORIGIN, TURN, Waiting, Waits, begin_request
from forebay.units import format_latency
from forebay_fast.latency import (
    BUCKETS,
    DEVICE_KINDS,
    EDGES,
    FLUSH,
    HIT,
    MAX,
    MISS,
    SUM,
    WRITE,
    Latency,
    bucket_of,
    difference,
    edge_of,
    summary_of,
    words_of,
)
from forebay_nbd.protocol.wire import Cmd

AWKWARD = (
    0,
    1,
    249,
    250,
    999,
    1000,
    1001,
    1249,
    1250,
    1999,
    2000,
    10**6,
    10**9,
    134 * 10**9,
    10**15,
)


def times(rng: random.Random) -> list[int]:
    return [*AWKWARD, *(int(2 ** rng.uniform(0, 45)) for _ in range(2000))]


def test_each_time_is_in_its_bucket(rng: random.Random) -> None:
    for nanoseconds in times(rng):
        bucket = bucket_of(nanoseconds)
        assert nanoseconds < edge_of(bucket) * 1e9 * (1 + 1e-12)
        assert bucket == 0 or nanoseconds >= edge_of(bucket - 1) * 1e9 * (1 - 1e-12)


def test_a_bucket_is_at_most_a_quarter_wide() -> None:
    for n in range(1, BUCKETS - 1):
        assert 1 < EDGES[n] / EDGES[n - 1] <= 1.25 + 1e-9
    assert EDGES[0] == 1e-6
    assert EDGES[-1] == math.inf


@pytest.mark.skipif(bool(forebay_fast.missing), reason="no core: make setup")
def test_the_core_counts_as_python_does(rng: random.Random) -> None:
    one, other = Latency(), Latency()
    for nanoseconds in times(rng):
        kind, seconds, count = rng.randrange(4), nanoseconds / 1e9, rng.choice((1, 1, 7))
        one.note(kind, seconds, count)
        forebay_fast.core.note_latency(other.counts, kind, seconds, count)
    for seconds in (-1.0, 1e300, math.inf, *[1e6] * 20_000):  # a sum has no more than 64 bits
        one.note(HIT, seconds)
        forebay_fast.core.note_latency(other.counts, HIT, seconds, 1)
    assert one.counts == other.counts
    with pytest.raises(IndexError):
        forebay_fast.core.note_latency(other.counts, 7, 1.0, 1)


def test_percentiles_are_never_too_low_and_at_most_a_quarter_too_high(rng: random.Random) -> None:
    for _ in range(20):
        latency, found = (
            Latency(),
            [rng.lognormvariate(-8, 2) for _ in range(rng.randrange(1, 900))],
        )
        for seconds in found:
            latency.note(MISS, seconds)
        found.sort()
        told = latency.told()["miss"]
        for key, share in (("p50_seconds", 0.5), ("p99_seconds", 0.99)):
            right = found[math.ceil(share * len(found)) - 1]
            assert right * (1 - 1e-6) <= told[key] <= max(right * 1.25, 1e-6) * (1 + 1e-6)
        assert told["count"] == len(found)
        assert told["max_seconds"] == pytest.approx(found[-1], abs=1e-9)
        assert told["mean_seconds"] == pytest.approx(sum(found) / len(found), rel=1e-3)
    assert Latency().told()["hit"] == {
        "count": 0, "mean_seconds": 0.0, "p50_seconds": 0.0, "p99_seconds": 0.0, "max_seconds": 0.0,
    }  # fmt: skip


def test_what_came_between_two_looks() -> None:
    latency = Latency()
    latency.note(HIT, 2.0)
    before = latency.of(HIT)
    latency.note(HIT, 0.0011, 3)
    between = difference(before, latency.of(HIT))
    assert sum(between[:BUCKETS]) == 3
    assert 0.0011 <= between[MAX] / 1e9 <= 0.0011 * 1.25, "not the two seconds of before"
    latency.note(HIT, 5.0)
    assert difference(before, latency.of(HIT))[MAX] == 5 * 10**9, "exact, since it has grown"
    assert difference(latency.of(HIT), before) == before, "the daemon began anew"
    assert difference(None, before) == before
    assert sum(difference(before, before)[:BUCKETS]) == difference(before, before)[MAX] == 0


def test_what_is_told_can_be_read() -> None:
    latency = Latency()
    for n in range(200):
        latency.note(WRITE, 1.2**n * 1e-6, n + 1)
    told = json.loads(json.dumps(latency.buckets_told()))
    for kind, name in enumerate(latency.kinds):
        words = words_of(told[name])
        assert words[:BUCKETS] == latency.of(kind)[:BUCKETS]
        assert words[SUM] == pytest.approx(latency.of(kind)[SUM])
    assert words_of({"buckets": [[9999, 1]], "sum_seconds": 0, "max_seconds": 0})[BUCKETS - 1] == 0
    for odd in ({}, {"buckets": 1}, {"buckets": [[0, -1]], "sum_seconds": 0, "max_seconds": 0}):
        with pytest.raises(ValueError, match="histogram"):
            words_of(odd)


# --------------------------------------------------------------------------------------------- what is waited for


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waits_module, "perf_counter", clock)
    monkeypatch.setattr(requests_module, "perf_counter", clock)
    return clock


def test_what_lies_within_counts_there_alone(clock: Clock) -> None:
    waits = Waits("read", 0, 1)
    begin_request(waits)
    with Waiting(DEVICE):
        clock.now += 1
        with Waiting(ORIGIN):
            clock.now += 2
            assert waits.now() == ORIGIN
        clock.now += 4
    assert waits.seconds == {ORIGIN: 2.0, DEVICE: 5.0}
    assert waits.now() == "other"


async def test_what_goes_on_side_by_side_counts_once(clock: Clock) -> None:
    waits = Waits("read", 0, 1)
    begin_request(waits)
    ended = trio.Event()

    async def part() -> None:
        with Waiting(ORIGIN):
            await ended.wait()

    with Waiting(DEVICE):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(part)
            await trio.testing.wait_all_tasks_blocked()
            clock.now += 3
            ended.set()
        clock.now += 1
    assert waits.seconds == {ORIGIN: 3.0, DEVICE: 1.0}


async def test_who_is_no_request_is_not_counted() -> None:
    with Waiting(TURN):
        await trio.lowlevel.checkpoint()


# --------------------------------------------------------------------------------------------------- slow requests


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Handler()
    logging.getLogger("forebay.disk").addHandler(handler)
    yield found
    logging.getLogger("forebay.disk").removeHandler(handler)


def read(requests: Requests, clock: Clock, seconds: float, *, missed: bool = True) -> None:
    with requests.one("read", 1 << 20, 65536):
        began = clock.now
        with Waiting(ORIGIN if missed else DEVICE):
            clock.now += seconds
        assert requests.depth == 1
    requests.carried_out(Cmd.READ, 1 << 20, 65536, clock.now - began)


@pytest.mark.expect_log("vm1: slow")
async def test_a_slow_request_is_told_of_with_what_it_waited_for(
    clock: Clock, lines: list[str]
) -> None:
    requests = Requests("vm1", Latency(), 1.0, SlowLog())
    read(requests, clock, 0.5)
    assert lines == []
    read(requests, clock, 2.5)
    assert lines == ["vm1: slow: a read of 64K at 1.0M took 2.5s: origin 2.5s"]
    read(requests, clock, 3.0)
    read(requests, clock, 1.2, missed=False)
    assert len(lines) == 1, "a disk has one line in ten seconds"
    clock.now += QUIET_SECONDS
    kept: list[dict[str, object]] = []
    with keep_with(kept.append):
        read(requests, clock, 1.0)
        read(requests, clock, 1.0)
    assert lines[1].endswith("; 2 more since the last such line, up to 3.0s")
    (event,) = kept
    assert (event["kind"], event["disk"], event["untold"]) == ("slow", "vm1", 2)
    assert event["took_seconds"] == 1.0
    assert lines[1] == f"vm1: slow: {event['text']}"
    told = requests.status()
    assert told["slow_requests"] == 5
    assert told["queue_depth"] == 0
    assert (told["latency"]["miss"]["count"], told["latency"]["hit"]["count"]) == (5, 1)


@pytest.mark.expect_log("slow")
async def test_one_that_has_not_ended_is_told_of_once(clock: Clock, lines: list[str]) -> None:
    requests = Requests("vm1", Latency(), 1.0, SlowLog())
    with requests.one("flush"), Waiting(DEVICE):
        clock.now += 0.9
        requests.look()
        assert lines == []
        clock.now += 0.2
        requests.look()
        requests.look()
        assert lines == ["vm1: slow: a flush waits for 1.1s: device 1.1s"]
        clock.now += QUIET_SECONDS
    requests.carried_out(Cmd.FLUSH, 0, 0, 11.1)
    assert lines[1] == "vm1: slow: a flush took 11s: device 11s"
    assert requests.slow_requests == 1


@pytest.mark.expect_log("slow")
async def test_a_store_that_hangs_does_not_fill_the_log(clock: Clock, lines: list[str]) -> None:
    shared = SlowLog()
    for n in range(200):
        read(Requests(f"vm{n}", Latency(), 1.0, shared), clock, 0.0)
        requests = Requests(f"vm{n}", Latency(), 1.0, shared)
        requests.held_up(1.5)
    assert len(lines) == MOST_LINES


async def test_nothing_is_slow_where_that_is_off(clock: Clock, lines: list[str]) -> None:
    requests = Requests("vm1", Latency(), 0.0, SlowLog())
    read(requests, clock, 1e6)
    assert lines == []
    requests.follow(1.0)
    assert requests.slow_seconds == 1.0


async def test_what_makes_zeros_of_a_trim_is_one_request() -> None:
    requests = Requests("vm1", Latency(), 0.0)
    with requests.one("trim", 0, 4096), requests.one("zero", 0, 4096):
        assert requests.depth == 1
    assert requests.depth == 0
    requests.carried_out(Cmd.TRIM, 0, 4096, 0.1)
    assert requests.latency.told()["write"]["count"] == 0


# ------------------------------------------------------------------------------------------------------ Prometheus


def test_prometheus_histograms_are_exact_and_come_in_slices() -> None:
    latency, device = Latency(), Latency(DEVICE_KINDS)
    for seconds in (15e-6, 17e-6, 1.0, 20.0, 500.0):
        latency.note(HIT, seconds)
    device.note(1, 0.001, 3)
    slices = list(latency_lines([(f'disk="vm{n}"', latency) for n in range(20)], device))
    assert [sum('le="+Inf"' in line for line in part) for part in slices] == [
        0,
        8,
        8,
        4,
        *[0] * 5,
        1,
    ]
    found = [line for part in slices for line in part]
    one = [line for line in found if 'disk="vm3"' in line]
    assert one[0] == 'forebay_request_seconds_bucket{disk="vm3",kind="hit",le="0.000016"} 1'
    counts = [int(line.rpartition(" ")[2]) for line in one if "_bucket" in line]
    assert counts == [1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 5]
    assert one[-1] == 'forebay_request_seconds_count{disk="vm3",kind="hit"} 5'
    assert float(one[-2].rpartition(" ")[2]) == pytest.approx(521.000032)
    assert 'forebay_device_seconds_count{op="sync"} 3' in found
    assert sum(line.startswith("# TYPE") for line in found) == 3
    assert not any("origin_seconds_" in line for line in found), "of what never came there is none"
    assert [float(bound) for bound in BOUNDS] == sorted(float(bound) for bound in BOUNDS)


def test_a_scrape_of_many_disks_is_bounded() -> None:
    """What a slice may be: a few hundred lines, each some tenths of a microsecond."""
    latency = Latency()
    for kind in range(len(latency.kinds)):
        latency.note(kind, 0.01)
    slices = list(
        latency_lines([(f'disk="vm{n}"', latency) for n in range(200)], Latency(DEVICE_KINDS))
    )
    assert max(map(len, slices)) <= AT_ONCE * 4 * 14 + 2
    assert sum(map(len, slices)) == 200 * 7 * 14 + 6


# ---------------------------------------------------------------------------------------------------- the command


def told_of(*disks: tuple[str, Latency]) -> dict[str, Any]:
    device = Latency(DEVICE_KINDS)
    device.note(0, 3e-6)
    found = [
        {"name": name, "queue_depth": 2, "latency": latency.buckets_told()}
        for name, latency in disks
    ]
    told = {"edges": [], "disks": found, "cache_device": device.buckets_told()}
    answer: dict[str, Any] = json.loads(json.dumps(told))
    return answer


def test_the_table_has_a_line_for_what_there_was() -> None:
    latency = Latency()
    latency.note(HIT, 12e-6, 3)
    latency.note(FLUSH, 0.25)
    found = totals(Look(told_of(("vm10", latency), ("vm9", latency))))
    assert [line.split() for line in found] == [
        ["NAME", "KIND", "COUNT", "MEAN", "P50", "P99", "MAX"],
        ["vm9", "hit", "3", "12us", "12us", "12us", "12us"],
        ["vm9", "flush", "1", "250ms", "250ms", "250ms", "250ms"],
        ["vm10", "hit", "3", "12us", "12us", "12us", "12us"],
        ["vm10", "flush", "1", "250ms", "250ms", "250ms", "250ms"],
        ["cache", "device", "device_write", "1", "3us", "3us", "3us", "3us"],
    ]


def test_intervals_have_what_came_between() -> None:
    latency = Latency()
    latency.note(HIT, 1.0)
    first = Look(told_of(("vm1", latency)))
    latency.note(HIT, 0.001, 4)
    second = Look(told_of(("vm1", latency)))
    first.at, second.at = 10.0, 12.0
    (lines,) = each("vm1", [first, second], wide=False, json_lines=False, every=20)
    assert lines[:2] == heading()
    assert lines[2].split() == ["0.0", "1.0ms", "1.0ms", "1.0ms", *["-"] * 9]
    assert {len(line) for line in lines[1:]} == {77}, "it fits into 80 columns"
    ((line,),) = each("vm1", [first, second], wide=False, json_lines=True, every=20)
    told = json.loads(line)
    assert (told["seconds"], told["mean_depth"], told["queue_depth"]) == (2.0, 0.002, 2)
    assert told["latency"]["hit"]["count"] == 4
    restarted = Look(told_of(("vm1", Latency())))
    assert len(list(each(None, [second, restarted], wide=True, json_lines=False, every=1))) == 1


def test_the_histogram_has_octaves() -> None:
    latency = Latency()
    for seconds, count in ((5e-7, 1), (1.9e-6, 2), (0.9, 3), (1e6, 4)):
        latency.note(MISS, seconds, count)
    octaves = octaves_of(latency.of(MISS))
    assert (octaves[0], octaves[1], octaves[20], octaves[-1]) == (1, 2, 3, 4)
    assert sum(octaves) == 10
    found = [line.split() for line in histogram(Look(told_of(("d", latency))).summed())]
    assert found[0][:3] == ["LATENCY", "HIT", "MISS"]
    assert (found[1][0], found[1][2]) == ("<1us", "1")
    assert (found[-1][0], found[-1][2]) == (">2m", "4")
    assert len(histogram(Look(told_of()).summed())) == 2
    (text,) = once(Look(told_of(("d", latency))), None, wide=True, json_lines=True)
    assert json.loads(text)["histograms"]["miss"]["count"] == 10


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"disks": 3},
        {"disks": [{}], "cache_device": {}},
        {"disks": [], "cache_device": {"x": 1}},
    ],
)
def test_what_no_daemon_says_is_one_line(odd: dict[str, Any]) -> None:
    with pytest.raises(ForebayError, match="one version"):
        Look(odd)


def test_times_have_five_characters_at_most(rng: random.Random) -> None:
    for _ in range(2000):
        assert len(format_latency(10 ** rng.uniform(-9, 5))) <= 5
    for seconds, text in (
        (0, "0us"),
        (999.6e-6, "1.0ms"),
        (0.00995, "10ms"),
        (0.9996, "1.0s"),
        (99.6, "2m"),
    ):
        assert format_latency(seconds) == text


def test_a_summary_is_of_plain_numbers() -> None:
    assert set(map(type, summary_of(Latency().of(HIT)).values())) <= {int, float}
