# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Settings that live: `forebay get` and `set` on the real daemon, while clients read and write."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from real.gateway_process import GatewayProcess
from real.processes import MIB, random_image


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    found = GatewayProcess(
        {"defaults": {"max_lag": "20s"}, "stores.images": {"mode": "write-back"}}
    )
    try:
        for name in ("a.raw", "b.raw"):
            random_image(found.images / name, 8 * MIB, 1)
        found.start()
        found.cli("attach", "vm1", "images:a.raw")
        found.cli("attach", "vm2", "images:b.raw")
        yield found
    finally:
        found.remove()


def told(gateway: GatewayProcess, *words: str) -> dict[str, tuple[Any, str]]:
    """By setting, value and who says so."""
    rows = json.loads(gateway.cli("get", *words, "--json").stdout)
    return {row["key"]: (row["value"], row["from"]) for row in rows}


def test_a_setting_is_set_shown_kept_and_given_back(gateway: GatewayProcess) -> None:
    before = told(gateway, "vm1")
    assert before["mode"] == ("write-back", "store")
    assert before["max_lag"] == ("20s", "defaults")
    assert before["max_dirty"] == ("1 GiB", "built in")
    text = gateway.cli("set", "vm1", "max_lag=5s", "max_dirty=64M", "origin_timeout=7s").stdout
    assert "max_dirty       64 MiB  disk" in text
    assert gateway.status("vm1")["max_lag_seconds"] == 5
    assert told(gateway, "vm2") == before, "of that disk only"
    gateway.restart(kill=True)
    after = told(gateway, "vm1")
    assert after == before | {
        "max_lag": ("5s", "disk"),
        "max_dirty": ("64 MiB", "disk"),
        "origin_timeout": ("7s", "disk"),
    }
    gateway.cli("set", "vm1", "max_lag=", "max_dirty=", "origin_timeout=")
    assert told(gateway, "vm1") == before
    assert gateway.status("vm1")["max_lag_seconds"] == 20


def test_a_call_sets_all_or_nothing(gateway: GatewayProcess) -> None:
    before = told(gateway, "vm1")
    wrong = gateway.cli("set", "vm1", "max_lag=5s", "max_dirty=lots", check=False)
    assert wrong.returncode == 2
    gateway.cli("set", "vm1", "cache_size=1M")
    # what only the daemon can know: a full copy does not fit into that
    refused = gateway.cli("set", "vm1", "max_lag=5s", "mode=full-copy", check=False)
    assert refused.returncode == 1
    assert "cache_size" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert told(gateway, "vm1") == before | {"cache_size": ("1 MiB", "disk")}
    gateway.cli("set", "vm1", "cache_size=", "mode=full-copy")
    assert gateway.status("vm1")["mode"] == "full-copy"
    refused = gateway.cli("set", "vm1", "cache_size=1M", check=False)
    assert refused.returncode == 1, "not with a full copy there"
    gateway.cli("set", "vm1", "cache_size=1M", "mode=")
    assert gateway.status("vm1")["mode"] == "write-back"
    gateway.cli("set", "vm1", "cache_size=")
    assert told(gateway, "vm1") == before


def test_one_setting_of_all_disks(gateway: GatewayProcess) -> None:
    rows = json.loads(gateway.cli("get", "max_lag", "--json").stdout)
    assert [(row["name"], row["key"]) for row in rows] == [("vm1", "max_lag"), ("vm2", "max_lag")]
    assert gateway.cli("get", "vm2", "mode").stdout.splitlines()[1].split() == [
        *("vm2", "mode", "write-back", "store")
    ]
    nobody = gateway.cli("get", "nobody", check=False)
    assert (nobody.returncode, "no disk 'nobody'" in nobody.stderr) == (1, True)
