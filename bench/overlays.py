# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make bench-overlays`: what many overlays of one image cost the daemon.

One daemon, one image, COUNT overlays, some of them busy: reading at random and writing, with a flush now and then.
Prints what an attach took by how many there were, memory, what `forebay status` took, and what first writes read from
the image. Exit code 1 where one of the bars is missed.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from real.gateway_process import GatewayProcess
from real.processes import MIB, random_image

SIZE = 256 * MIB
LAST = 50
"""Attaches that one figure is the median of."""
ATTACH_SECONDS, MEMORY_BYTES = 0.05, 400e6
"""The bars."""


class Control(http.client.HTTPConnection):
    """The control API on its socket, without a process for each call."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        """Implements HTTPConnection."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))

    def ask(self, method: str, path: str, content: Any = None) -> Any:
        """What it answers; raises RuntimeError for an error."""
        self.close()  # the daemon does not wait long for another request
        body = json.dumps(content) if content is not None else None
        self.request(method, path, body, {"Content-Type": "application/json"})
        answer = self.getresponse()
        text = answer.read().decode()
        if answer.status >= 400:
            raise RuntimeError(text)
        return json.loads(text) if path != "/metrics" else text


def cpu(pid: int) -> float:
    """Seconds of CPU of the event loop's thread so far."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def memory(pid: int) -> dict[str, float]:
    """Resident bytes by kind: RssAnon, and with what is mapped from files VmRSS."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {
        name: int(re.findall(rf"{name}:\s+(\d+) kB", text)[0]) * 1024
        for name in ("RssAnon", "VmRSS")
    }


@contextlib.contextmanager
def bed() -> Iterator[tuple[GatewayProcess, Control]]:
    """A daemon with an image."""
    gateway = GatewayProcess({"cache": {"size": "1 GiB"}})
    try:
        random_image(gateway.images / "base.raw", SIZE, 1)
        gateway.start()
        yield gateway, Control(gateway.control)
    finally:
        gateway.remove()


def attach(gateway: GatewayProcess, control: Control, count: int) -> list[tuple[float, float]]:
    """Attach that many overlays, one after the other: (seconds until it answers, CPU of the loop) of each."""
    took = []
    for number in range(count):
        began, before = time.perf_counter(), cpu(gateway.pid)
        wanted = {"name": f"vm{number}", "image": "images:base.raw", "overlay": True}
        control.ask("POST", "/disks", wanted)
        took.append((time.perf_counter() - began, cpu(gateway.pid) - before))
    return took


def first_writes(gateway: GatewayProcess, control: Control, count: int) -> int:
    """Bytes read from the image by the first 4 KiB write of some overlays, and by reading that again."""
    import nbd  # noqa: PLC0415 (of Debian)

    read = 0
    for number in range(count):
        name = f"vm{number}"
        handle = nbd.NBD()
        handle.connect_uri(gateway.uri(name))
        offset = SIZE // 2 + number * MIB
        handle.pwrite(b"w" * 4096, offset)
        handle.flush()
        assert handle.pread(4096, offset) == b"w" * 4096
        read += control.ask("GET", f"/disks/{name}")["origin_read_bytes"]
        handle.shutdown()
    return read


def be_busy(gateway: GatewayProcess, names: list[str], seconds: float) -> int:
    """Have a client on each of the disks read and write in turns, for so long; how many requests that were."""
    import nbd  # noqa: PLC0415

    dice, handles = random.Random(1), []
    for name in names:
        handle = nbd.NBD()
        handle.connect_uri(gateway.uri(name))
        handles.append(handle)
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        handle = dice.choice(handles)
        offset = dice.randrange(SIZE // 4096) * 4096
        handle.pread(65536, min(offset, SIZE - 65536))
        handle.pwrite(b"b" * 4096, offset)
        done += 2
        if done % 64 == 0:
            handle.flush()
    for handle in handles:
        handle.shutdown()
    return done


def told_status(gateway: GatewayProcess, control: Control) -> dict[str, float]:
    """Seconds that the status of all disks takes the loop, and until the command has printed it."""
    before = cpu(gateway.pid)
    control.ask("GET", "/disks")
    loop = cpu(gateway.pid) - before
    began = time.perf_counter()
    gateway.cli("status")
    return {"loop": loop, "command": time.perf_counter() - began}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="overlays")
    parser.add_argument("--busy", type=int, default=100, help="those of them that are busy")
    parser.add_argument("--seconds", type=float, default=20.0, help="for how long")
    options = parser.parse_args()
    with bed() as (gateway, control):
        empty = memory(gateway.pid)
        took = attach(gateway, control, options.count)
        attached = memory(gateway.pid)
        writes = first_writes(gateway, control, min(20, options.count))
        names = [f"vm{number}" for number in range(options.count)]
        done = be_busy(gateway, names[-options.busy :], options.seconds)
        busy = memory(gateway.pid)
        status = told_status(gateway, control)
        held = re.findall(
            r"(?m)^forebay_loop_stall_seconds_max (\S+)", control.ask("GET", "/metrics")
        )
        began = time.perf_counter()
        gateway.restart()
        restart = time.perf_counter() - began
    first, last = took[:LAST], took[-LAST:]
    print(
        f"overlays {options.count}, busy {options.busy}, {os.cpu_count()} processors, {done} requests"
    )
    for what, some in ((f"first {LAST}", first), (f"last {LAST}", last)):
        seconds, loop = (1000 * median(values) for values in zip(*some, strict=True))
        print(f"attach, {what}: {seconds:.1f} ms until it is answered, {loop:.1f} ms of the loop")
    for what, found in (("empty", empty), ("attached", attached), ("busy", busy)):
        print(
            f"memory, {what}: {found['RssAnon'] / 1e6:.0f} MB of its own, {found['VmRSS'] / 1e6:.0f} MB with files"
        )
    print(f"first 4 KiB writes, flushed and read again: {writes} bytes read from the image")
    print(
        f"status: {1000 * status['loop']:.0f} ms of the loop, {1000 * status['command']:.0f} ms the command"
    )
    print(f"restart with all of them: {restart:.1f} s")
    print(
        f"longest turn of the loop: {1000 * float(held[0]):.0f} ms" if held else "no stall figure"
    )
    missed = (
        median(loop for _, loop in last) > ATTACH_SECONDS
        or busy["RssAnon"] > MEMORY_BYTES
        or writes
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
