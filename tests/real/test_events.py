# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay events` with the daemon: what is told, what outlives kill -9 and odd files, who follows."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from real.disk_fixture import wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, random_image

Event = dict[str, Any]


def told(gateway: GatewayProcess, *words: str) -> list[Event]:
    found: list[Event] = json.loads(gateway.cli("events", *words, "--json").stdout)
    return found


def kinds(gateway: GatewayProcess, *words: str) -> list[str]:
    return [one["kind"] for one in told(gateway, *words) if one["kind"] != "command"]


def read_some(gateway: GatewayProcess, name: str) -> None:
    command = ["qemu-io", "-f", "raw", "-c", "write 0 64k", gateway.uri(name)]
    subprocess.run(command, check=True, capture_output=True)


def test_the_life_of_a_disk_is_told_and_outlives_a_kill(
    gateway: GatewayProcess, connect: Callable[..., Any]
) -> None:
    random_image(gateway.images / "a.raw", MIB, 1)
    gateway.cli("attach", "vm1", "images:a.raw", "--mode", "write-back")
    client = connect(gateway.uri("vm1"))
    client.pwrite(b"x" * 4096, 0)
    gateway.cli("flush", "vm1")
    client.shutdown()
    wait_for(lambda: not gateway.status("vm1")["clients"], "it has left")
    gateway.cli("mode", "vm1", "write-through")
    gateway.cli("peer", "vm1", "any")
    gateway.cli("preload", "vm1", "all")
    gateway.kill()
    gateway.start()
    gateway.cli("detach", "vm1")
    expected = ["attach", "client", "checkpoint", "client", "mode", "setting", "detach"]
    assert kinds(gateway, "vm1") == expected
    found = {one["kind"]: one for one in told(gateway, "vm1")}
    for one in found.values():
        assert one["disk"] == "vm1"
        assert one["kind"] == "command" or one["image"] == "images:a.raw"
    for kind in ("attach", "mode", "setting", "detach", "command"):
        assert found[kind]["asked_uid"] == os.getuid()
        assert found[kind]["asked_pid"] > 1
    assert "asked_uid" not in found["client"], "nobody asked for it"
    assert found["client"] | {"action": "disconnect", "client_pid": os.getpid()} == found["client"]
    assert (found["mode"]["was"], found["mode"]["now"]) == ("write-back", "write-through")
    assert found["checkpoint"]["written_bytes"] == 4096
    refused = gateway.cli("attach", "vm2", "images:no.raw", check=False).stderr.strip()
    again = gateway.cli("flush", "vm3", check=False).stderr.strip()
    said = [one["text"] for one in told(gateway) if one.get("ok") is False]
    assert said == [
        f"not done: {one.removeprefix('forebay: ').splitlines()[0]}" for one in (refused, again)
    ]
    everything = told(gateway)
    assert [one["kind"] for one in everything].count("start") == 2
    assert any("POST /disks/vm1/preload" in one["text"] for one in everything)
    assert told(gateway, "-n", "1") == everything[-1:]
    assert told(gateway, "--since", "1h") == everything
    assert told(gateway, "nobody") == []
    assert "no events of 'nobody'" in gateway.cli("events", "nobody").stderr
    lines = gateway.cli("events", "vm1").stdout.splitlines()
    assert len(lines) == len(told(gateway, "vm1"))
    assert "vm1: mode write-through, was write-back (asked by " in "\n".join(lines)


def test_odd_files_stop_no_daemon(gateway: GatewayProcess) -> None:
    random_image(gateway.images / "a.raw", MIB, 1)
    gateway.cli("attach", "vm1", "images:a.raw")
    gateway.kill()
    folder = gateway.state / "events"
    with (folder / "rare").open("ab") as file:
        file.write(b'\xff\x00{"id": 5, "ti')
    (folder / "frequent").unlink()
    os.mkfifo(folder / "frequent")
    gateway.allow_log("events/frequent: events are not kept there")
    gateway.start()
    gateway.cli("mode", "vm1", "none")
    assert kinds(gateway) == ["start", "attach", "start", "mode"]
    wait_for(lambda: b'"mode"' in (folder / "rare").read_bytes(), "it is written")
    gateway.restart()
    assert kinds(gateway) == ["start", "attach", "start", "mode", "stop", "start"]
    assert gateway.log_text().count("events are not kept") == 2, "once for each daemon"


@contextmanager
def following(gateway: GatewayProcess, *words: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "forebay", "events", "--follow", *words]
    command += ["--config", str(gateway.config)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def next_of(process: "subprocess.Popen[str]", kind: str) -> Event:
    assert process.stdout is not None
    for text in process.stdout:
        event: Event = json.loads(text)
        if event["kind"] == kind:
            return event
    raise AssertionError("it has ended")


def test_who_follows_outlives_the_daemon(gateway: GatewayProcess) -> None:
    random_image(gateway.images / "a.raw", MIB, 1)
    with following(gateway, "--json") as process, following(gateway, "vm1", "-n", "5") as other:
        next_of(process, "start")
        gateway.cli("attach", "vm1", "images:a.raw")
        assert next_of(process, "attach")["disk"] == "vm1"
        gateway.restart(kill=True)
        next_of(process, "start")
        gateway.cli("mode", "vm1", "none")
        assert next_of(process, "mode")["now"] == "none"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr is not None
        said = process.stderr.read().splitlines()
        assert said[-1] == "forebay: the daemon is there again"
        assert all(one.endswith("; waiting for it") for one in said[:-1])
        # Who reads no more ends it, with the next event.
        assert other.stdout is not None
        while "vm1: mode none" not in (text := other.stdout.readline()):
            assert text, "it has ended"
        other.stdout.close()
        gateway.cli("mode", "vm1", "write-back")
        gateway.cli("mode", "vm1", "none")
        assert other.wait(20) in (0, 1)
        assert other.stderr is not None
        assert "Traceback" not in other.stderr.read()


def test_states_are_told(gateway: GatewayProcess) -> None:
    image = gateway.images / "a.raw"
    random_image(image, MIB, 1)
    gateway.cli("attach", "vm1", "images:a.raw", "--mode", "write-back")
    read_some(gateway, "vm1")
    image.rename(gateway.images / "b.raw")
    gateway.allow_log("vm1|images:a.raw")
    failed = gateway.cli("flush", "vm1", "--timeout", "2s", check=False)
    assert failed.returncode == 1
    wait_for(lambda: "pass" in kinds(gateway, "vm1"), "the pass has failed")
    states = {"state", "conflict"}
    wait_for(lambda: bool(states & set(kinds(gateway, "vm1"))), "the state is told")
    found = [one for one in told(gateway, "vm1") if one["kind"] in states]
    assert found[0]["was"] == "ready"
    assert found[-1]["now"] == gateway.status("vm1")["state"]
    assert "asked_uid" not in found[0]
