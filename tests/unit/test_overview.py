# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The summary of a host: what was found in the cache lately, how stores stand, what it all comes to."""

import gc
import json
import os
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from forebay.cli.hosts.summary import opennebula, text
from forebay.config.model import Config, DiskSettings, Store
from forebay.config.sections import GatewaySection
from forebay.origin.threads import StoreThreads
from forebay.overview import health
from forebay.overview.detail import MOST_CONNECTIONS, connected, settings_told
from forebay.overview.hits import AT_ONCE, LOOK_SECONDS, WINDOW_SECONDS, RecentHits
from forebay.overview.remembered import FILE, MOST, Remembered
from forebay.overview.summary import MOST_IMAGES, MOST_REASONS, Summary, Warmest, judged
from forebay.units import GIB, MIB, Mode
from unit.control_fake import CACHE, disk

# --------------------------------------------------------------------------------------------------------- recent hits


class Reader:
    def __init__(self) -> None:
        self.hits = self.misses = 0


async def test_hits_are_counted_over_the_last_minutes_and_older_ones_are_not() -> None:
    reader = Reader()
    recent = RecentHits([reader])
    assert (await recent.told(0))["hit_percent"] is None
    reader.hits, reader.misses = 90, 10
    assert (await recent.told(10))["hit_percent"] == 90.0
    reader.misses += 100
    assert (await recent.told(200)) == {
        "hit_percent": 45.0,
        "recent_hits": 90,
        "recent_misses": 110,
    }
    assert (await recent.told(10 + WINDOW_SECONDS + 1))["hit_percent"] == 0.0
    assert (await recent.told(200 + WINDOW_SECONDS + 1))["hit_percent"] is None


async def test_what_a_reader_that_is_gone_has_found_still_counts() -> None:
    readers = [Reader()]
    recent = RecentHits(readers)
    readers[0].hits = 5
    await recent.look(0)
    readers.clear()
    gc.collect()
    readers.append(Reader())
    readers[0].misses = 5
    assert (await recent.told(LOOK_SECONDS))["hit_percent"] == 50.0


async def test_hits_are_looked_at_now_and_then(autojump_clock: trio.testing.MockClock) -> None:
    reader = Reader()
    recent = RecentHits([reader])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recent.run)
        reader.hits = 1
        await trio.sleep(LOOK_SECONDS + 1)
        reader.misses = 1
        await trio.sleep(WINDOW_SECONDS - LOOK_SECONDS)
        assert (await recent.told(trio.current_time()))["recent_misses"] == 1
        nursery.cancel_scope.cancel()
    del autojump_clock


async def test_very_many_readers_are_not_looked_at_in_one_go() -> None:
    readers = [Reader() for _ in range(10 * AT_ONCE)]
    for reader in readers:
        reader.hits = 1
    recent = RecentHits(readers)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        assert (await recent.told(0))["recent_hits"] == len(readers)
        nursery.cancel_scope.cancel()
    assert turns >= 5


# -------------------------------------------------------------------------------------------------------------- stores


def config(folder: Path, *stores: str) -> Config:
    gateway = GatewaySection(state=folder / "state", run=folder)
    return Config(gateway=gateway, stores={name: Store(path=folder / name) for name in stores})


async def test_stores_are_ok_slow_or_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    threads = {name: StoreThreads(name) for name in ("here", "nowhere")}
    async with trio.open_nursery() as nursery:
        stores = health.StoreHealth(config(tmp_path, *threads), nursery, threads.__getitem__)
        here, nowhere = await stores.look()
        assert (here["store"], here["state"], here["reason"]) == ("here", "ok", None)
        assert 0 < here["free_bytes"] <= here["size"]
        assert (nowhere["state"], nowhere["reason"]) == ("away", "No such file or directory")
        monkeypatch.setattr(health, "SLOW_SECONDS", -1.0)
        here = (await stores.look())[0]
        assert (here["state"], here["reason"][:5]) == ("slow", "took ")


async def test_one_question_at_a_time_waits_at_a_store_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, free = list[str](), threading.Event()

    def hang(path: str) -> tuple[int, int]:
        asked.append(path)
        free.wait()
        return 1, 2

    now = 100.0
    monkeypatch.setattr(health, "room_in", hang)
    monkeypatch.setattr(health, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr("forebay.overview.health.time.monotonic", lambda: now)
    async with trio.open_nursery() as nursery:
        threads = StoreThreads("far")
        stores = health.StoreHealth(config(tmp_path, "far"), nursery, lambda _: threads)
        assert await stores.look() == [
            {"store": "far", "state": "slow", "reason": "no answer for 0s"}
        ]
        now += health.AWAY_SECONDS + 30
        assert await stores.look() == [
            {"store": "far", "state": "away", "reason": "no answer for 40s"}
        ]
        assert len(asked) == 1
        free.set()
        monkeypatch.setattr(health, "PATIENCE_SECONDS", 60.0)
        assert (await stores.look())[0]["reason"] == "took 40s to answer"
        assert (await stores.look())[0]["state"] == "ok"
        assert len(asked) == 2


# ------------------------------------------------------------------------------------------------------------ one disk


def test_each_setting_is_told_with_where_it_is_said() -> None:
    store = Store(path=Path("/s"), mode=Mode.WRITE_BACK)
    found = Config(defaults=DiskSettings(max_lag=5.0), stores={"s": store})
    own = {"mode": None, "cache_size": GIB, "preload": None, "peer": None}
    settings = found.disk_settings("s", own)
    told = {one["key"]: one for one in settings_told(found, "s", settings, own)}
    assert told["mode"] == {"key": "mode", "value": "write-back", "from": "store"}
    assert told["max_lag"] == {"key": "max_lag", "value": "5s", "from": "defaults"}
    assert told["cache_size"] == {"key": "cache_size", "value": "1 GiB", "from": "disk"}
    assert told["max_dirty"]["from"] == "built in"
    outside = settings_told(found, None, found.disk_settings(None), {})
    assert {one["key"]: one["from"] for one in outside}["mode"] == "built in"


def test_who_is_connected_is_told_of_a_bounded_number() -> None:
    here, there = socket.socketpair()
    with here, there:
        assert connected([here]) == [{"pid": os.getpid(), "uid": os.geteuid()}]
        assert len(connected([here] * 1000)) == MOST_CONNECTIONS
    assert connected([here]) == []


# --------------------------------------------------------------------------------------------------------- remembered


async def test_an_image_that_is_cold_again_is_told_also_after_a_restart(tmp_path: Path) -> None:
    first = Remembered(tmp_path)
    assert await first.gone(["a", "b"]) == []
    assert await first.gone(["b", "c"]) == ["a"]
    assert await Remembered(tmp_path).gone([]) == ["c", "b", "a"]
    assert await Remembered(tmp_path).gone(["a"]) == ["c", "b"]


@pytest.mark.parametrize("text", ["", "{", "5", '{"a": 1}', "[" * 100_000, "[1, null, [2]]"])
async def test_what_cannot_be_read_of_it_is_forgotten(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert await Remembered(tmp_path).gone(["a"]) == []
    assert json.loads((tmp_path / FILE).read_text()) == ["a"]


async def test_a_bounded_number_of_images_is_remembered(tmp_path: Path) -> None:
    remembered = Remembered(tmp_path)
    for part in range(3):
        await remembered.gone(f"{part}.{n}" for n in range(MOST))
    assert len(await remembered.gone([])) == MOST
    await Remembered(tmp_path / "not there").gone(["a"])  # cannot be written: the log says so


# ------------------------------------------------------------------------------------------------------------- summary


def test_the_worst_of_what_was_found_says_how_the_host_is() -> None:
    assert judged([]) == ("ok", [])
    assert judged([("slow", "a"), ("degraded", "b"), ("slow", "c")]) == (
        "degraded",
        ["b", "a", "c"],
    )
    state, lines = judged(("degraded", str(n)) for n in range(100))
    assert (state, len(lines), lines[-1]) == ("degraded", MOST_REASONS, "and 85 more")


async def summary_of(
    folder: Path, disks: list[dict[str, Any]], cache: dict[str, Any], *images: dict[str, Any]
) -> dict[str, Any]:
    async def all_of(found: Any) -> AsyncIterator[dict[str, Any]]:
        for one in found:
            yield one

    told = CACHE | {"clean_bytes": 0, "private_bytes": GIB} | cache
    fake: Any = SimpleNamespace(views=[], info=lambda: told)
    async with trio.open_nursery() as nursery:
        summary = Summary(
            config(folder),
            fake,
            nursery,
            StoreThreads,
            lambda: all_of(disks),
            lambda _store: all_of(images),
            list,
        )
        return await summary.report()


async def test_the_summary_of_a_host_that_is_well(tmp_path: Path) -> None:
    images = [
        {"image": f"images:{name}", "size": GIB, "cached_bytes": cached, "tags": []}
        for name, cached in (("a", MIB), ("b", GIB), ("cold", 0))
    ]
    disks = [disk("vm1", dirty_bytes=MIB, lag_seconds=3.0), disk("vm2", state="copying")]
    told = await summary_of(tmp_path, disks, {}, *images)
    assert (told["state"], told["reasons"]) == ("ok", [])
    assert (told["disk_count"], told["client_count"], told["dirty_bytes"]) == (2, 2, MIB)
    assert told["lag_seconds"] == 3.0
    assert [one["image"] for one in told["images"]] == ["images:b", "images:a"]
    assert (told["image_count"], told["cold_images"]) == (2, [])
    lines = "\n".join(text(told))
    assert "state   ok" in lines
    assert "warm    images:b: 1.0G, 100%" in lines


def test_of_very_many_images_those_are_told_of_which_the_cache_has_most() -> None:
    warmest = Warmest()
    for n in range(3 * MOST_IMAGES):
        cached = (n * 7919) % (3 * MOST_IMAGES)
        warmest.add({"image": f"images:{n}", "size": GIB, "cached_bytes": cached})
    told = [one["cached_bytes"] for one in warmest.told()]
    assert told == list(range(3 * MOST_IMAGES - 1, 2 * MOST_IMAGES - 1, -1))
    assert warmest.count == 3 * MOST_IMAGES - 1


@pytest.mark.parametrize(
    ("differs", "state", "why"),
    [
        ({"state": "conflict", "reason": "changed"}, "degraded", "vm1: conflict: changed"),
        ({"state": "failed"}, "degraded", "vm1: failed: see 'forebay status'"),
        ({"lag_seconds": 61.0, "max_lag_seconds": 30.0}, "slow", "vm1: 1m01s behind, with max_lag 30s"),
        ({"lag_seconds": 59.0, "max_lag_seconds": 30.0}, "ok", None),
        ({"lag_seconds": 9e9, "max_lag_seconds": 30.0, "mode": "full-copy"}, "ok", None),
    ],
)  # fmt: skip
async def test_a_disk_that_needs_a_look_is_named(
    tmp_path: Path, differs: dict[str, Any], state: str, why: str | None
) -> None:
    told = await summary_of(tmp_path, [disk("vm1", **differs), disk("vm2")], {})
    assert (told["state"], told["reasons"]) == (state, [why] if why else [])


async def test_a_cache_device_that_has_failed_is_named(tmp_path: Path) -> None:
    failed = {"state": "failed", "error": "Input/output error"}
    told = await summary_of(tmp_path, [], failed)
    assert told["state"] == "degraded"
    assert told["reasons"] == ["cache device /dev/vg0/forebay: failed: Input/output error"]


# ---------------------------------------------------------------------------------------------------------- OpenNebula

HASH = "0123456789abcdef0123456789abcdef"


def told(**differs: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "version": "0.1.0",
        "state": "ok",
        "reasons": [],
        "cache": {"device": "/dev/vg0/forebay", "size": 200 * GIB, "private_bytes": 50 * GIB},
        "caches_by_default": True,
        "hit_percent": 97.1,
        "dirty_bytes": 8 * MIB,
        "lag_seconds": 2.4,
        "images": [],
        "cold_images": [],
    }
    return base | differs


def test_opennebula_is_told_in_megabytes_seconds_and_percent() -> None:
    images = [
        {"image": f"one-100:{HASH}", "size": 4 * GIB, "cached_bytes": 3 * GIB},
        {"image": "one-100:by-name.raw", "size": GIB, "cached_bytes": GIB},
    ]
    lines = list(opennebula(told(images=images, cold_images=["one-100:" + "f" * 32])))
    assert lines == [
        'FOREBAY_VERSION="0.1.0"',
        'FOREBAY_STATE="ok"',
        'LS_MAD="lvm"',
        'LS_PATH="/dev/vg0/forebay"',
        "LS_MAX=204800",
        "LS_FREE=153600",
        "FOREBAY_DIRTY=8",
        "FOREBAY_LAG=2",
        "FOREBAY_HIT=97",
        "FOREBAY_WARM_0123456789AB=75",
        "FOREBAY_WARM_FFFFFFFFFFFF=0",
    ]


def test_opennebula_is_told_of_a_host_without_a_daemon_and_of_kinds_of_storage() -> None:
    down = list(opennebula({"version": "0.1.0", "state": "down", "reasons": ["no daemon"]}))
    assert down == ['FOREBAY_VERSION="0.1.0"', 'FOREBAY_STATE="down"', "LS_FREE=0"]
    assert 'LS_MAD="dummy"' in opennebula(told(caches_by_default=False))
    file = {"device": '/var/a"b\\c', "size": MIB, "private_bytes": 2 * MIB}
    lines = list(opennebula(told(cache=file)))
    assert 'LS_PATH="/var/a\\"b\\\\c"' in lines
    assert 'LS_MAD="file"' in lines
    assert "LS_FREE=0" in lines


def test_opennebula_is_told_of_a_bounded_number_of_images() -> None:
    many = [
        {"image": f"one-1:{n:032x}"[:6] + f"{n:012x}" + "0" * 20, "size": 1, "cached_bytes": 1}
        for n in range(1000)
    ]
    cold = [f"one-1:{n:012x}" for n in range(5000, 6000)]
    lines = list(opennebula(told(images=many, cold_images=cold)))
    assert sum(line.endswith("=100") for line in lines) == 64
    assert sum(line.startswith("FOREBAY_WARM_") and line.endswith("=0") for line in lines) == 64
    assert len("\n".join(lines)) < 8192
