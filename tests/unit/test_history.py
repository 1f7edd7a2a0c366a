# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The last 24 hours: rings of steps, what disks and host did in them, and the file that a restart reads."""

import json
import random
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from forebay.errors import ForebayError
from forebay.history import history as history_module
from forebay.history.history import MOST_DISKS, History
from forebay.history.kept import copied, fill, load, save
from forebay.history.ring import OF_DISKS, OF_HOST, Ring
from forebay_fast.latency import HIT, ORIGIN_READ, Latency
from unit.control_fake import disk

START = 1_700_000_000.0
"""Where a step of ten seconds begins, and one of five minutes does not."""

# ------------------------------------------------------------------------------------------------------------ the ring


def told(ring: Ring, key: str, now: float, seconds: float, points: int) -> list[float]:
    return ring.told(key, ring.span(now, seconds, points))


def test_counters_add_up_and_of_the_rest_the_largest_counts() -> None:
    ring = Ring(10, ("read_hits", "dirty_bytes"))
    for now, hits, dirty in (
        (START, 1, 5),
        (START + 9, 2, 3),
        (START + 10, 4, 7),
        (START + 30, 8, 1),
    ):
        ring.add(now, {"read_hits": hits, "dirty_bytes": dirty, "unknown": 1})
    assert told(ring, "read_hits", START + 30, 50, 5) == [0, 3, 4, 0, 8]
    assert told(ring, "dirty_bytes", START + 30, 50, 5) == [0, 5, 7, 0, 1]
    assert told(ring, "read_hits", START + 30, 40, 2) == [7, 8]
    assert told(ring, "dirty_bytes", START + 30, 40, 2) == [7, 1]


def test_what_is_older_than_a_day_is_gone_and_what_comes_is_not_there_yet() -> None:
    ring = Ring(10, ("read_hits",))
    ring.add(START, {"read_hits": 1})
    ring.add(START + 86400 - 10, {"read_hits": 2})
    assert sum(told(ring, "read_hits", START + 86390, 86400, 1000)) == 3
    ring.add(START + 86400, {"read_hits": 4})  # in the place of the first one
    assert sum(told(ring, "read_hits", START + 86400, 86400, 1000)) == 6
    assert sum(told(ring, "read_hits", START + 3 * 86400, 86400, 7)) == 0
    ring.add(START + 9 * 86400, {"read_hits": 8})  # more than one turn later
    assert sum(told(ring, "read_hits", START + 9 * 86400, 86400, 288)) == 8


@pytest.mark.parametrize("step", [10, 300])
def test_a_step_that_nobody_looked_at_is_empty_wherever_in_the_ring_it_lies(step: int) -> None:
    ring, dice = Ring(step, ["clients"]), random.Random(step)
    seen: set[int] = set()
    now = 1e9
    for _ in range(100):
        ring.add(now, {"clients": 1.0})
        seen.add(int(now // step))
        kept = range(ring.newest - ring.length + 1, ring.newest + 1)
        column = ring.columns["clients"]
        assert [column[n % ring.length] == 1 for n in kept] == [n in seen for n in kept]
        now += step * dice.choice([0.3, 1, 2, 7, ring.length // 2, ring.length, 3 * ring.length])


@pytest.mark.parametrize(
    ("seconds", "points"), [(1, 1), (86400, 288), (86400, 1000), (3605, 7), (1e9, 1), (30, 9)]
)
def test_a_span_has_no_more_buckets_than_were_asked_for_and_covers_all(
    seconds: float, points: int
) -> None:
    ring = Ring(10, ("read_hits",))
    span = ring.span(START, seconds, points)
    assert 1 <= span.buckets <= points
    assert span.first + span.buckets * span.steps == START // 10 + 1
    assert span.buckets * span.steps * 10 >= min(seconds, 86400) - 5
    assert len(ring.told("read_hits", span)) == span.buckets


def test_a_clock_that_goes_back_a_little_is_waited_for_and_one_that_was_wrong_is_forgotten() -> (
    None
):
    ring = Ring(10, ("read_hits",))
    ring.add(START, {"read_hits": 1})
    ring.add(START - 60, {"read_hits": 2})
    assert told(ring, "read_hits", START, 10, 1) == [3]
    ring.add(START - 7200, {"read_hits": 4})
    assert sum(told(ring, "read_hits", START - 7200, 86400, 288)) == 4
    assert sum(told(ring, "read_hits", START, 86400, 288)) == 4


# --------------------------------------------------------------------------------------------------- what is looked at


class Host:
    """A history on disks that a test changes, with a clock that it moves."""

    def __init__(self, state: Path, *names: str) -> None:
        self.disks = {name: disk(name) for name in names}
        self.now = START
        self.latencies: dict[str, Latency] = {}
        self.history = History(
            state, self._statuses, lambda: {"used_bytes": 77}, self.latencies.items
        )
        self.history._clock = lambda: self.now

    async def _statuses(self) -> AsyncIterator[dict[str, Any]]:
        for one in list(self.disks.values()):
            yield dict(one)

    async def look(self, seconds: float = 10.0) -> None:
        self.now += seconds
        await self.history.look()

    async def series(
        self, name: str | None = None, seconds: float = 10.0
    ) -> dict[str, list[float]]:
        told = (await self.history.report(seconds, 1, name))["series"]
        return {one["figure"]: one["values"] for one in told}


async def test_what_disks_did_since_the_last_look_is_summed_and_lag_is_the_longest(
    tmp_path: Path,
) -> None:
    host = Host(tmp_path, "vm1", "vm2")
    await host.look()
    for one, hits, lag in (("vm1", 10, 3.0), ("vm2", 5, 9.0)):
        host.disks[one]["read_hits"] += hits
        host.disks[one] |= {"lag_seconds": lag, "dirty_bytes": 100, "clients": 2}
    await host.look()
    series = await host.series()
    assert series["read_hits"] == [15]
    assert series["lag_seconds"] == [9]
    assert series["dirty_bytes"] == [200]
    assert series["clients"] == [4]
    assert series["disks"] == [2]
    assert series["cache_used_bytes"] == [77]
    assert (await host.series("vm1", 300))["lag_seconds"] == [3]


async def test_a_disk_that_came_back_counts_from_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path, "vm1")
    host.disks["vm1"]["read_bytes"] = 1000
    await host.look()
    host.disks["vm1"]["read_bytes"] = 30
    await host.look()
    assert (await host.series())["read_bytes"] == [30]


async def test_how_long_reads_took_is_told_of_each_step_of_disks_and_of_all(tmp_path: Path) -> None:
    host = Host(tmp_path, "vm1", "vm2", "vm3")
    host.latencies |= {"vm1": Latency(), "vm2": Latency()}
    host.latencies["vm1"].note(HIT, 0.0001, 1000)
    await host.look()
    host.latencies["vm1"].note(HIT, 0.0002, 10)
    host.latencies["vm2"].note(HIT, 0.05, 10)
    host.latencies["vm2"].note(ORIGIN_READ, 0.004)
    await host.look()
    series = await host.series()
    assert series["hit_p50_seconds"] == [pytest.approx(0.0002, rel=0.25)]
    assert series["hit_p99_seconds"] == [pytest.approx(0.05, rel=0.25)]
    assert series["origin_read_p99_seconds"] == [pytest.approx(0.004, rel=0.25)]
    assert (await host.series("vm2", 300))["hit_p50_seconds"] == [pytest.approx(0.05, rel=0.25)]
    assert (await host.series("vm1", 300))["origin_read_p50_seconds"] == [0]
    await host.look()
    assert (await host.series())["hit_p99_seconds"] == [0]
    assert (await host.series("vm3", 300))["hit_p99_seconds"] == [0]


@pytest.mark.parametrize(
    ("changes", "troubled", "conflicts"),
    [
        ({}, 0, 0),
        ({"state": "degraded"}, 1, 0),
        ({"state": "conflict"}, 1, 1),
        ({"mode": "write-back", "lag_seconds": 61, "max_lag_seconds": 30}, 1, 0),
        ({"mode": "write-back", "lag_seconds": 59, "max_lag_seconds": 30}, 0, 0),
    ],
)
async def test_disks_that_need_a_look_are_counted(
    tmp_path: Path, changes: dict[str, Any], troubled: int, conflicts: int
) -> None:
    host = Host(tmp_path, "vm1", "vm2")
    host.disks["vm1"] |= changes
    await host.look()
    series = await host.series()
    assert (series["troubled"], series["conflicts"]) == ([troubled], [conflicts])


async def test_the_disks_with_most_to_tell_have_a_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "MOST_DISKS", 2)
    host = Host(tmp_path, "a", "b", "c")
    await host.look()
    assert set(host.history.disks) == {"a", "b"}
    host.disks["a"]["read_bytes"] = 1 << 40
    host.disks["c"]["read_bytes"] = 1 << 40
    await host.look()
    assert set(host.history.disks) == {"a", "c"}
    with pytest.raises(ForebayError, match="nothing is known of 'b'"):
        await host.series("b")
    del host.disks["c"]
    await host.look()
    assert "c" in host.history.disks
    await host.look(2 * 86400)
    await host.look()
    assert set(host.history.disks) == {"a", "b"}
    assert set(host.history._weights) == {"a", "b"}


async def test_a_thousand_disks_take_bounded_memory(tmp_path: Path) -> None:
    host = Host(tmp_path, *(f"vm{n}" for n in range(1000)))
    await host.look()
    assert len(host.history.disks) == MOST_DISKS
    rings = [host.history.host, *host.history.disks.values()]
    held = sum(4 * ring.length * len(ring.columns) for ring in rings)
    assert held < 4.6e6, "the docs say 4.6 MB"


async def test_it_looks_by_itself_and_stores_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(history_module, "SAVE_SECONDS", 0.05)
    host = Host(tmp_path, "vm1")
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.history.run)
            while not (tmp_path / "history").exists():  # noqa: ASYNC110  (there is no event of it)
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert set(load(tmp_path / "history")) == {"", "vm1"}
    assert (await host.series())["seconds"][0] > 0


# ------------------------------------------------------------------------------------------------------- over restarts


async def test_a_restart_goes_on_with_what_there_was(tmp_path: Path) -> None:
    host = Host(tmp_path, "vm1")
    host.history._is_complete = True
    host.disks["vm1"]["read_hits"] = 7
    await host.look()
    await host.history.save()
    again = Host(tmp_path, "vm1")
    again.now = host.now
    await again.history._restore()
    assert (await again.series())["read_hits"] == [7]
    assert (await again.series("vm1", 300))["read_hits"] == [7]


def damaged(data: bytes) -> list[bytes]:
    head, _, body = data.partition(b"\n")
    other = json.loads(head)
    other["rings"][0]["newest"] = -7
    nameless = json.loads(head)
    nameless["rings"].append({"name": "../x", "newest": 1, "keys": {}})
    return [
        b"",
        b"{}\n",
        b"[" * 100_000,
        data[:-1],
        data[:-1] + b"\xff",
        data + b"x",
        json.dumps(other).encode() + b"\n" + body,
        json.dumps(nameless).encode() + b"\n" + body,
        head.replace(b'"format": 1', b'"format": 2') + b"\n" + body,
        bytes(17 << 20),
    ]


@pytest.mark.parametrize("which", range(10))
@pytest.mark.expect_log("is not used, the history begins anew")
async def test_a_file_that_is_damaged_is_told_and_not_used(tmp_path: Path, which: int) -> None:
    path = tmp_path / "history"
    save(path, {"": copied(Ring(10, OF_HOST))})
    path.write_bytes(damaged(path.read_bytes())[which])
    host = Host(tmp_path, "vm1")
    await host.history._restore()
    await host.look()
    assert (await host.series())["disks"] == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_is_no_figure_is_not_taken(value: float) -> None:
    ring = Ring(300, OF_DISKS)
    newest, columns = copied(ring)
    columns["read_hits"] = struct.pack("f", value) + columns["read_hits"][4:]
    assert not fill(ring, (newest, columns))
    columns["read_hits"] = b""
    assert not fill(ring, (newest, columns))
    assert max(ring.columns["read_hits"]) == 0


def test_a_figure_that_an_older_version_did_not_have_stays_empty_and_others_are_passed_over() -> (
    None
):
    ring = Ring(300, OF_DISKS)
    ring.add(START, {"read_hits": 3})
    newest, columns = copied(ring)
    del columns["read_misses"]
    columns["from_the_future"] = b"1234"
    other = Ring(300, OF_DISKS)
    assert fill(other, (newest, columns))
    assert told(other, "read_hits", START, 300, 1) == [3]
    assert set(other.columns) == set(OF_DISKS)
