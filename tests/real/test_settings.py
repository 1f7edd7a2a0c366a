# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Settings that live: `forebay get` and `set` on the real daemon, while clients read and write."""

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from real.disk_fixture import wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, random_image
from real.steady_guest import SteadyGuest


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


def test_a_guest_that_reads_and_writes_notices_nothing(gateway: GatewayProcess) -> None:
    """It compares all that it reads; a request that fails is an error of its own."""
    pytest.importorskip("libnbdmod", reason="python3-libnbd is not installed")
    changes = [
        ("max_lag=1s", "max_dirty=1M"),
        ("mode=write-through",),
        ("cache_size=2M", "origin_timeout=5s"),
        ("mode=write-back", "max_lag=1h"),
        ("mode=none", "max_dirty=", "cache_size="),
        ("mode=", "max_lag=", "origin_timeout="),
    ]
    with SteadyGuest(gateway.uri("vm2"), length=4 * MIB, depth=4) as guest:
        for change in changes:
            gateway.cli("set", "vm2", *change)
            gateway.cli("reload")
        assert guest.finish()["errors"] == []
    assert {said for _, said in told(gateway, "vm2").values()} <= {"built in", "defaults", "store"}


# ------------------------------------------------------------------------------------------------------------- reload


@pytest.fixture
def own() -> Iterator[GatewayProcess]:
    """A daemon of the test's own, with a folder conf.d."""
    found = GatewayProcess({"stores.images": {"mode": "write-through"}})
    try:
        (found.directory / "conf.d").mkdir()
        (found.directory / "two").mkdir()
        random_image(found.images / "a.raw", 4 * MIB, 1)
        random_image(found.directory / "two" / "b.raw", 4 * MIB, 2)
        found.start()
        yield found
    finally:
        found.remove()


def write(gateway: GatewayProcess, name: str, text: str) -> None:
    (gateway.directory / "conf.d" / name).write_text(text)


def test_a_reload_is_all_or_nothing_and_no_client_notices(own: GatewayProcess) -> None:
    nbd = pytest.importorskip("libnbdmod") and pytest.importorskip("nbd")
    own.cli("attach", "vm1", "images:a.raw")
    two = f'[stores.two]\npath = "{own.directory}/two"\nsocket = true\n'
    client = nbd.NBD()
    client.connect_uri(own.uri("vm1"))
    before = own.cli("dump-config", "--running").stdout

    write(own, "10-two.toml", two + 'max_lag = "never"\n[defaults]\nfast = 1\n')
    own.allow_log("the configuration is not taken")
    wrong = own.cli("reload", check=False)
    assert wrong.returncode == 1
    assert [line.split(": ")[1].rpartition(":")[0] for line in wrong.stderr.splitlines()] == [
        str(own.directory / "conf.d" / "10-two.toml")
    ] * 2
    assert own.cli("dump-config", "--running").stdout == before
    assert own.cli("attach", "vm2", "two:b.raw", check=False).returncode == 1

    write(own, "10-two.toml", two + '[defaults]\nmax_lag = "9s"\n[stores.images]\nmode = "wb"\n')
    assert "stores new: two" in own.cli("reload").stdout
    assert told(own, "vm1")["max_lag"] == ("9s", "defaults")
    own.cli("attach", "vm2", "two:b.raw", "--read-only")
    assert (own.run / "stores" / "two.sock").is_socket()
    wait_for(lambda: own.status("vm1")["mode"] == "write-back", "the mode does not follow")
    client.pwrite(b"x" * 4096, 0)  # on the connection of before
    client.flush()

    # what a disk needs is not taken from under it
    write(own, "10-two.toml", "")
    refused = own.cli("reload", check=False)
    assert (refused.returncode, "vm2" in refused.stderr) == (1, True)
    assert own.status("vm2")["state"] == "ready"
    own.cli("detach", "vm2")
    assert "stores gone: two" in own.cli("reload").stdout
    assert not (own.run / "stores" / "two.sock").exists()
    wait_for(lambda: own.status("vm1")["mode"] == "write-through", "the mode does not follow")
    assert client.pread(4096, 0) == b"x" * 4096
    client.shutdown()
    assert (own.images / "a.raw").read_bytes()[:4096] == b"x" * 4096


def test_a_signal_reloads_and_a_wrong_file_is_one_line_of_the_log(own: GatewayProcess) -> None:
    write(own, "a.toml", "[defaults]\nmax_lag = 0\nmax_dirty = -1\n")
    own.allow_log("the configuration is not taken")
    assert own.process is not None
    own.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "is not taken" in own.log_text(), "nothing in the log")
    [line] = [x for x in own.log_text().splitlines() if "is not taken" in x]
    assert "a.toml:2: defaults.max_lag" in line
    assert "a.toml:3: defaults.max_dirty" in line
    write(own, "a.toml", '[defaults]\nmax_lag = "4s"\n')
    own.process.send_signal(signal.SIGHUP)
    wait_for(lambda: 'max_lag = "4s"' in own.cli("dump-config", "--running").stdout, "not taken")
    assert own.stop() == 0


def test_a_disk_whose_store_comes_back_is_served_again(own: GatewayProcess) -> None:
    two = f'[stores.two]\npath = "{own.directory}/two"\n'
    write(own, "10-two.toml", two)
    own.cli("reload")
    own.cli("attach", "vm2", "two:b.raw")
    own.cli("set", "vm2", "max_lag=3s")
    write(own, "10-two.toml", "")
    own.allow_log("disk 'vm2' is not served")
    own.restart()
    assert own.status("vm2")["state"] == "failed"
    refused = own.cli("set", "vm2", "max_lag=4s", check=False)
    assert (refused.returncode, "not served" in refused.stderr) == (1, True)
    write(own, "10-two.toml", two)
    own.cli("reload")
    wait_for(lambda: own.status("vm2")["state"] == "ready", "it does not come back")
    assert told(own, "vm2")["max_lag"] == ("3s", "disk")
