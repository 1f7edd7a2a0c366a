# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How long requests take, by a whole daemon: each request counts once, in its kind, with the core and without."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from forebay.client import Client
from forebay_fast.latency import BUCKETS
from real.gateway_process import GatewayProcess
from real.processes import MIB, NbdServer, random_image

Connect = Callable[..., Any]
Make = Callable[..., GatewayProcess]
StartNbdkit = Callable[..., NbdServer]
BLOCK = 65536


def counts(gateway: GatewayProcess, disk: str) -> dict[str, int]:
    """By kind, by what `status` says."""
    return {kind: of["count"] for kind, of in gateway.status(disk)["latency"].items()}


@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize("mode", ["write-back", "write-through"])
def test_each_request_counts_once(
    make_gateway: Make, connect: Connect, mode: str, *, core: bool
) -> None:
    gateway = make_gateway({"gateway": {"core": core}})
    random_image(gateway.images / "a.raw", 8 * MIB, 1)
    gateway.attach("a", "a.raw", mode=mode)
    client = connect(gateway.uri("a"))
    for n in range(10):
        client.pread(4096, n * BLOCK)
    for n in range(10):
        client.pread(4096, n * BLOCK)
    client.pread(3 * BLOCK, 0)
    for n in range(5):
        client.pwrite(bytes(4096), n * 4096)
    client.zero(BLOCK, 2 * MIB)
    client.flush()
    client.pwrite(b"x" * 4096, 4 * MIB)
    client.flush()
    told = gateway.status("a")
    found = counts(gateway, "a")
    assert found["hit"] == told["read_hits"]
    assert found["miss"] == told["read_misses"]
    assert found["hit"] + found["miss"] == 21
    assert 1 <= found["miss"] <= 10
    assert (found["write"], found["flush"]) == (7, 2)
    assert found["origin_read"] > 0, "one may be for several misses"
    if mode == "write-through":
        assert found["origin_write"] == 7
        assert found["origin_sync"] >= 2
    else:
        gateway.cli("flush", "a")
        assert counts(gateway, "a")["origin_write"] > 0
        device = json.loads(gateway.cli("cache", "--json").stdout)["latency"]
        assert device["device_write"]["count"] >= 6
        assert device["device_sync"]["count"] > 0
    for of in told["latency"].values():
        assert of["p50_seconds"] <= of["p99_seconds"] <= of["max_seconds"] or not of["count"]
    assert told["queue_depth"] == 0


def test_all_that_tells_of_it_agrees(make_gateway: Make, connect: Connect) -> None:
    gateway = make_gateway()
    random_image(gateway.images / "a.raw", 8 * MIB, 1)
    gateway.attach("a", "a.raw")
    random_image(gateway.images / "b.raw", 8 * MIB, 2)
    gateway.attach("b", "b.raw", "--overlay")
    for disk in ("a", "b"):
        client = connect(gateway.uri(disk))
        for n in range(20):
            client.pread(4096, n * BLOCK)
            client.pread(4096, n * BLOCK)
    api = Client(str(gateway.run / "control.sock"))
    everything, one = api.get("/latency"), api.get("/disks/a/latency")
    assert [disk["name"] for disk in everything["disks"]] == ["a", "b"]
    assert one["disks"] == everything["disks"][:1]
    assert len(everything["edges"]) == BUCKETS
    hits = counts(gateway, "a")["hit"]
    told = one["disks"][0]["latency"]["hit"]
    assert told["count"] == sum(count for _, count in told["buckets"]) == hits
    assert "not served" in gateway.cli("stats", "-l", "nobody", check=False).stderr

    with api._exchange("GET", "/metrics", None, 10.0) as answer:
        metrics = bytes(answer.read()).decode()
    assert f'forebay_request_seconds_count{{disk="a",kind="hit"}} {hits}\n' in metrics
    for family in ("request", "origin", "device"):
        assert metrics.count(f"# TYPE forebay_{family}_seconds histogram") == 1
    below: dict[str, int] = {}
    for labels, count in re.findall(r"seconds_bucket\{(.*),le=.*\} (\d+)", metrics):
        assert int(count) >= below.get(labels, 0), "they are cumulative"
        below[labels] = int(count)

    table = gateway.cli("stats", "-l").stdout.splitlines()
    assert ["a", "hit", str(hits)] in [line.split()[:3] for line in table]
    listed = json.loads(gateway.cli("stats", "-l", "--json").stdout)
    assert [disk["name"] for disk in listed] == ["a", "b", None]
    assert listed[0]["latency"]["hit"]["count"] == hits
    both = hits + counts(gateway, "b")["hit"]
    wide = json.loads(gateway.cli("stats", "-w", "--json").stdout)
    assert wide["histograms"]["hit"]["count"] == both
    rows = [line.split() for line in gateway.cli("stats", "-w").stdout.splitlines()]
    assert rows[0][:2] == ["LATENCY", "HIT"]
    assert sum(int(row[1]) for row in rows[1:] if row[1] != "-") == both
    assert len(gateway.cli("stats", "-l", "a", "0.05", "3").stdout.splitlines()) == 5
    assert re.search(
        r"^latency +hit \S+/\S+, miss", gateway.cli("status", "a").stdout, re.MULTILINE
    )


@pytest.mark.parametrize("core", [True, False])
def test_a_slow_request_says_what_it_waited_for(
    make_gateway: Make, connect: Connect, start_nbdkit: StartNbdkit, *, core: bool
) -> None:
    """And the limit changes while a client is connected."""
    server = start_nbdkit("memory", "8M", "rdelay=300ms", filters=["delay"])
    gateway = make_gateway({"origins": {"nbd": [server.uri]}, "gateway": {"core": core}})
    gateway.allow_log("slow: ")
    gateway.cli("attach", "a", server.uri)
    client = connect(gateway.uri("a"))
    client.pread(4096, 0)
    assert gateway.status("a")["slow_requests"] == 0
    assert "slow: " not in gateway.log.read_text()
    gateway.cli("set", "a", "slow=200ms")
    client.pread(4096, 4 * MIB)
    told = gateway.status("a")
    assert told["slow_requests"] == 1
    assert told["latency"]["miss"]["max_seconds"] >= 0.3
    assert told["latency"]["origin_read"]["p50_seconds"] >= 0.3
    line = next(line for line in gateway.log.read_text().splitlines() if "slow: " in line)
    assert re.search(
        r"a: slow: a read of 4.0K at 4.0M took \S+: origin [3-9]\d\dms|origin \d", line
    )
