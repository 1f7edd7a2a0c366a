# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The daemon as a process, by the contract alone: what the other tests of the whole daemon stand on."""

import json
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from real.gateway_process import GatewayProcess
from real.processes import MIB, need, random_image

CONTRACT_KEYS = {
    "name",
    "image",
    "mode",
    "state",
    "read_only",
    "overlay",
    "size",
    "cached_bytes",
    "dirty_bytes",
    "lag_seconds",
    "read_hits",
    "read_misses",
    "write_hits",
    "write_misses",
    "origin_read_bytes",
    "origin_written_bytes",
    "clients",
    "socket",
}


@pytest.fixture
def content(gateway: GatewayProcess) -> bytes:
    return random_image(gateway.images / "a.raw", 4 * MIB, seed=1)


def test_attached_disk_reads_as_its_image(
    gateway: GatewayProcess, content: bytes, connect: Callable[..., Any]
) -> None:
    gateway.attach("d", "a.raw", mode="write-through")
    for export in ("d", ""):
        assert bytes(connect(gateway.uri("d", export)).pread(len(content), 0)) == content


def test_status_has_the_keys_of_the_contract(gateway: GatewayProcess, content: bytes) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    status = gateway.status("d")
    assert set(status) >= CONTRACT_KEYS
    assert (status["name"], status["mode"], status["size"]) == ("d", "write-back", len(content))
    assert status["socket"] == str(gateway.sock("d"))
    assert json.loads(gateway.cli("status", "--json").stdout)[0]["name"] == "d"


def test_control_api_answers_curl(gateway: GatewayProcess) -> None:
    need("curl")
    command = ["curl", "-sS", "--unix-socket", str(gateway.control), "http://localhost/metrics"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "# TYPE forebay_" in text


@pytest.mark.parametrize("kill", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_a_restart_finds_disks_and_acknowledged_writes(
    gateway: GatewayProcess, content: bytes, connect: Callable[..., Any], kill: bool
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    disk = connect(gateway.uri("d"))
    assert bytes(disk.pread(len(content), 0)) == content
    disk.pwrite(b"new" * 1000, 12345)
    gateway.restart(kill=kill)
    expected = content[:12345] + b"new" * 1000 + content[15345:]
    assert bytes(connect(gateway.uri("d")).pread(len(content), 0)) == expected
    assert gateway.status("d")["mode"] == "write-back"
    gateway.cli("flush", "d")
    assert (gateway.images / "a.raw").read_bytes() == expected


def test_garbage_on_a_disk_socket_hurts_nobody_else(
    gateway: GatewayProcess, content: bytes, connect: Callable[..., Any]
) -> None:
    gateway.attach("d", "a.raw", mode="write-through")
    disk = connect(gateway.uri("d"))
    with socket.socket(socket.AF_UNIX) as hostile:
        hostile.connect(str(gateway.sock("d")))
        hostile.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        hostile.settimeout(10)
        try:
            while hostile.recv(4096):
                pass
        except ConnectionError:
            pass
    assert bytes(disk.pread(4096, 0)) == content[:4096]
    gateway.allow_log("protocol|magic|flags")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["attach", "d", "images:missing.raw"], 1),
        (["attach", "d", "images:../../etc/passwd"], 1),
        (["attach", "../d", "images:a.raw"], None),
        (["attach", "d", "images:a.raw", "--mode", "fast"], 2),
        (["detach", "nobody"], 1),
        (["no-such-command"], 2),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    gateway: GatewayProcess, content: bytes, arguments: list[str], code: int | None
) -> None:
    done = gateway.cli(*arguments, check=False)
    assert done.returncode == code or (code is None and done.returncode in {1, 2})
    if done.returncode == 1:
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(gateway.cli("status", "--json").stdout) == []


def test_a_second_daemon_on_the_same_state_is_refused(
    gateway: GatewayProcess, make_gateway: Callable[..., GatewayProcess]
) -> None:
    second = make_gateway({"gateway": {"state": str(gateway.state)}}, start=False)
    with pytest.raises(RuntimeError, match="exit 1"):
        second.start()
    second.allow_log(".")
    assert gateway.cli("status").returncode == 0


def test_without_a_daemon_the_command_says_so(make_gateway: Callable[..., GatewayProcess]) -> None:
    done = make_gateway(start=False).cli("status", check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
