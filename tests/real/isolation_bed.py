# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A daemon with one disk of each kind that have to notice nothing, and the disk that something goes wrong at."""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real import isolation_client, isolation_daemon
from real.fault_fs import FaultFs
from real.gateway_process import GatewayProcess
from real.isolation_client import FLUSH, READ, WRITE, Client
from real.isolation_daemon import ARMED
from real.processes import MIB, random_image

NEIGHBOURS = {
    "none": ("none", False),
    "around": ("write-around", False),
    "through": ("write-through", False),
    "back": ("write-back", False),
    "full": ("full-copy", False),
    "overlay": ("write-through", True),
}
"""By name, the mode of each disk that has to notice nothing, and whether it is an overlay."""

WARM = 2 * MIB
SIZE = 4 * MIB
"""Bytes of each neighbour that are in the cache and read all the time, and of its image. The rest is written."""

HIT = slice(0, MIB)
DIRTY = slice(2 * MIB, 3 * MIB)
COLD = slice(3 * MIB, 4 * MIB)
"""What of a bad disk is in the cache, what is written, and what is neither before the fault."""

ANSWER = 0.1
"""Seconds within which the median of the neighbours' cached reads is answered, whatever happens (promise 4): without
the share of the time in which daemon and reader waited for a processor that others had."""
TAIL = 0.02
"""Seconds for 99 of 100 of them, where the machine is idle."""
IDLE = 0.02
"""The machine is idle if daemon and reader wait less than this share of the time for a processor."""
BUSY = 0.5
"""Beyond this share of the time a short round may end before each neighbour has had a turn."""
TOLD = 2.0
"""Seconds within which the control API answers, however busy the machine is."""
MEMORY = 160 * MIB
"""Bytes by which the daemon's own memory may grow in one row: a disk's clients may hold 64 MiB, its fills as much."""
SHOWN = 20.0
"""Seconds within which a disk shows what is wrong with it; and within which it comes back."""

Check = Callable[[], bool]


class Control(http.client.HTTPConnection):
    """The control API; each request on a connection of its own."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=SHOWN)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass
class Round:
    """What was seen of everybody else while something was wrong with one disk."""

    seconds: float
    readers: dict[str, dict[str, Any]]
    told: list[float]
    """Seconds that each answer of the control API took."""
    states: dict[str, set[str]]
    waited: float
    """Share of the time that the daemon and the reader waited for a processor: most of the two."""
    stalls: int
    """Turns of the daemon's event loop beyond 0.1 s."""
    grown: int
    """Bytes by which the daemon's memory grew, at the end of the round."""

    @property
    def tail(self) -> float:
        """The worst p99 of the neighbours that read from the cache."""
        return max(float(one["p99"]) for name, one in self.readers.items() if name != "none")

    def line(self) -> str:
        median = max(one["median"] for one in self.readers.values())
        return (
            f"median {median * 1e3:.2f} ms, p99 {self.tail * 1e3:.1f} ms, longest "
            f"{max(one['longest'] for one in self.readers.values()) * 1e3:.0f} ms, told in "
            f"{max(self.told) * 1e3:.0f} ms, +{self.grown / MIB:.0f} MiB, "
            f"waited {self.waited:.1%} in {self.seconds:.1f} s"
        )


class Bed:
    """One daemon for as many rows as it lives through."""

    def __init__(self) -> None:
        self.gateway = GatewayProcess(start_settings())
        self.directory = self.gateway.directory
        self.armed = self.directory / "armed"
        self.here = self.directory / "here"
        self.there = self.directory / "there"
        for one in (self.armed, self.here, self.there):
            one.mkdir()
        (self.armed / ARMED).write_bytes(b"\0")
        self.fs = FaultFs(self.directory / "fs")
        limits = {"max_lag": "0.4s", "origin_timeout": "1s"}
        self.gateway.configure(
            {
                **start_settings(),
                "stores.here": {"path": str(self.here), **limits},
                "stores.faulty": {"path": str(self.fs.path), **limits},
            }
        )
        self.reader: subprocess.Popen[bytes] | None = None
        self.count = 0
        self.writes = 0

    def start(self) -> None:
        """The daemon and the neighbours, warm, with their reader."""
        self.gateway.start([isolation_daemon.__file__, str(self.armed)])
        specification = []
        for name, (mode, overlay) in NEIGHBOURS.items():
            image = self.gateway.images / f"{name}.raw"
            random_image(image, SIZE, sum(name.encode()))
            content = self.there / name
            shutil.copyfile(image, content)
            self.post("/disks", name=name, image=f"images:{name}.raw", mode=mode, overlay=overlay)
            client = Client(self.gateway.sock(name))
            client.read(0, WARM)
            client.close()
            specification.append(
                {
                    "name": name,
                    "socket": str(self.gateway.sock(name)),
                    "content": str(content),
                    "warm": WARM,
                }
            )
        self.wait(lambda: set(self.states().values()) == {"ready"}, "the neighbours are not ready")
        self.reader = subprocess.Popen(
            [sys.executable, isolation_client.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._tell(json.dumps(specification))

    def _tell(self, line: str) -> str:
        """Say something to the reader; its answer."""
        assert self.reader is not None
        assert self.reader.stdin is not None
        assert self.reader.stdout is not None
        self.reader.stdin.write(line.encode() + b"\n")
        self.reader.stdin.flush()
        answer = self.reader.stdout.readline().decode()
        assert answer, "the reader of the neighbours has ended: its connections were hung up on"
        return answer

    def remove(self) -> None:
        for process in (self.reader, self.gateway.process):
            if process is not None:
                process.kill()
                process.communicate()
        self.fs.remove()
        self.gateway.remove()

    # -- the control API

    def ask(self, method: str, path: str, **body: Any) -> tuple[int, str]:
        """Status and text of the answer."""
        with contextlib.closing(Control(self.gateway.control)) as control:
            control.request(method, path, json.dumps(body) if body else None)
            answer = control.getresponse()
            return answer.status, answer.read().decode()

    def post(self, path: str, *, method: str = "POST", **body: Any) -> dict[str, Any]:
        """The result; AssertionError with the text of a refusal."""
        text = self.refused(path, method=method, **body)
        assert text is None, f"{method} {path} {body}: {text}"
        return {}

    def refused(self, path: str, *, method: str = "POST", **body: Any) -> str | None:
        """Why the request was refused; None if it was done."""
        status, text = self.ask(method, path, **body)
        last = json.loads(text.splitlines()[-1])
        if status < 400 and "error" not in last:
            return None
        assert set(last) <= {"error", "holder"}, f"no error in one line: {text}"
        found: str = last["error"]
        assert "\n" not in found
        return found

    def status(self) -> dict[str, dict[str, Any]]:
        """All disks, by name."""
        code, text = self.ask("GET", "/disks")
        assert code == 200, f"status: {code} {text}"
        return {one["name"]: one for one in json.loads(text)}

    def states(self) -> dict[str, str]:
        """Those of the neighbours."""
        return {name: one["state"] for name, one in self.status().items() if name in NEIGHBOURS}

    def metric(self, name: str) -> float:
        """The value of a sample, its labels with it."""
        _, text = self.ask("GET", "/metrics")
        found = re.search(rf"^forebay_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, f"/metrics has no {name}: {text[:200]}"
        return float(found[1])

    def wait(self, true: Check, what: str, seconds: float = SHOWN) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"after {seconds:g} s: {what}"
            time.sleep(0.02)

    def arm(self, task: str, disk: str) -> None:
        """Have a function of isolation_daemon.TASKS raise when it is called for that disk the next time."""
        (self.armed / task).write_text(disk)
        self._set_armed(True)

    def is_armed(self, task: str) -> bool:
        return (self.armed / task).exists()

    def disarm(self) -> None:
        self._set_armed(False)
        for task in isolation_daemon.TASKS:
            (self.armed / task).unlink(missing_ok=True)

    def _set_armed(self, armed: bool) -> None:
        with (self.armed / ARMED).open("r+b") as file:  # the daemon has it in its memory
            file.write(bytes([armed]))

    # -- what may be seen of a fault

    def memory(self) -> int:
        """Bytes of the daemon's own memory: without the pages of the cache device, which are the kernel's."""
        text = Path(f"/proc/{self.gateway.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", text)
        assert found
        return int(found[1]) * 1024

    def _waited(self) -> float:
        """Seconds for which the daemon or the reader waited for a processor so far: most of the two."""
        assert self.reader is not None
        return max(
            int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
            for pid in (self.gateway.pid, self.reader.pid)
        )

    @contextlib.contextmanager
    def round(self, least: float) -> Iterator[list[Round]]:
        """Watch the neighbours while the body runs, and at least so many seconds. What was seen is in the list then."""
        stalls = 'loop_stalls_total{longer_than="0.1"}'
        before = (time.monotonic(), self._waited(), self.metric(stalls), self.memory())
        seen = Round(0, {}, [], {}, 0, 0, 0)
        found: list[Round] = []
        self._tell("begin")
        self.seen = seen
        try:
            yield found
            while time.monotonic() < before[0] + least:
                self.look()
                time.sleep(0.02)
        finally:
            self.seen = None
        seen.readers = json.loads(self._tell("end"))
        seen.seconds = time.monotonic() - before[0]
        seen.waited = (self._waited() - before[1]) / seen.seconds
        seen.stalls = int(self.metric(stalls) - before[2])
        seen.grown = self.memory() - before[3]
        found.append(seen)

    seen: Round | None = None

    def look(self) -> dict[str, dict[str, Any]]:
        """The disks by name; in a round what the neighbours show is noted, and how long it took to be told."""
        began = time.monotonic()
        found = self.status()
        if self.seen is not None:
            self.seen.told.append(time.monotonic() - began)
            for name in NEIGHBOURS:
                shown = found[name]["state"] if name in found else "not listed"
                self.seen.states.setdefault(name, set()).add(shown)
        return found

    def check(self, seen: Round, idle: Round) -> None:
        """AssertionError where somebody has noticed. `idle` was seen while nothing was wrong."""
        assert seen.states == {name: {"ready"} for name in NEIGHBOURS}
        for name, one in seen.readers.items():
            assert one["faults"] == [], f"{name}: {one['faults']}"
            assert one["reads"] > 0 or seen.waited > BUSY, f"{name} got no answer"
            assert one["median"] * (1 - seen.waited) < ANSWER, f"{name}: {seen.line()}"
        assert max(seen.told) < TOLD, seen.line()
        assert seen.grown < MEMORY, seen.line()
        if seen.waited < IDLE and idle.waited < IDLE:
            assert seen.tail < max(TAIL, 4 * idle.tail), seen.line()
            assert seen.stalls == 0, f"the event loop stood still: {seen.line()}"

    def check_neighbours(self) -> None:
        """Each is written, flushed and read back; the command and the metrics tell of all."""
        self.writes += 1
        for name in NEIGHBOURS:
            client = Client(self.gateway.sock(name))
            data = f"{name} {self.writes}\n".encode().ljust(4096, b".") * 16
            at = WARM + self.writes % 16 * 65536
            client.write(at, data)
            client.flush()
            assert client.read(at, 65536) == data, name
            client.close()
        assert set(self.states().values()) == {"ready"}
        _, text = self.ask("GET", "/metrics")
        for name in NEIGHBOURS:
            assert re.search(
                rf'^forebay_disk_info{{disk="{name}".*state="ready"', text, re.MULTILINE
            ), text
        assert self.gateway.alive

    def log_since(self, at: int) -> list[str]:
        """Lines of the log from that byte on that a daemon writes when it is not well itself."""
        text = self.gateway.log.read_bytes()[at:].decode(errors="replace")
        loud = re.compile(r"CRITICAL|^Traceback|Task exception|never retrieved|^\w*Error")
        return [line for line in text.splitlines() if loud.search(line)]


def _removed(folder: Path) -> None:
    """Remove a folder in which the daemon may still be writing what it knows of a boot."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
            return
        time.sleep(0.1)
    shutil.rmtree(folder)


def start_settings() -> dict[str, dict[str, Any]]:
    return {"cache": {"size": "384 MiB"}}


@dataclass
class Bad:
    """The disk that something goes wrong at, and its image."""

    bed: Bed
    store: str
    mode: str
    size: int = SIZE
    overlay: bool = False
    clients: list[Client] = field(default_factory=list)
    sockets: list[socket.socket] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    patience: float = SHOWN
    answers: list[str] = field(default_factory=list)
    """What requests of the fault were told."""

    def __post_init__(self) -> None:
        self.bed.count += 1
        self.name = f"bad{self.bed.count}-"
        self.folder = self.bed.here if self.store == "here" else self.bed.fs.path
        self.path = self.folder / f"{self.name}.dsk"
        self.side = self.folder / f"{self.name}.dsk.forebay"
        self.content = bytearray(random_image(self.below / self.path.name, SIZE, self.bed.count))
        if self.size > SIZE:
            os.truncate(self.below / self.path.name, self.size)

    @property
    def below(self) -> Path:
        """Where the store's files lie, which nothing fails in."""
        return self.bed.here if self.store == "here" else self.bed.fs.backing

    def beside(self, name: str) -> Path:
        """Where a file beside the image lies: in the directory of the newest owner, if there is one."""
        tokens = [one for one in self.side.iterdir() if one.name.isdigit()]
        return max(tokens, key=lambda one: int(one.name), default=self.side) / name

    # -- its life

    def attach(self, **more: Any) -> None:
        self.bed.post("/disks", **self.wanted(), **more)

    def wanted(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "image": f"{self.store}:{self.path.name}",
            "mode": self.mode,
            "overlay": self.overlay,
        }

    def make_ready(self, *, dirty: bool) -> None:
        """Attached, part of it cached, part of it written: to the image already, unless it is `dirty`."""
        self.attach()
        if self.mode == "full-copy":
            self.bed.wait(lambda: self.shown().startswith("ready"), "it is not copied")
        client = self.connect()
        client.read(HIT.start, HIT.stop - HIT.start)
        if dirty:
            self.write(client)

    def connect(self, patience: float = 10.0, *, structured: bool = False) -> Client:
        client = Client(self.bed.gateway.sock(self.name), patience, structured=structured)
        self.clients.append(client)
        return client

    def write(self, client: Client) -> None:
        """Acknowledged and flushed."""
        data = os.urandom(DIRTY.stop - DIRTY.start)
        client.write(DIRTY.start, data)
        client.flush()
        self.content[DIRTY] = data

    def try_all(self) -> None:
        """Reads and writes of a guest, whose answers are kept."""
        written = b"t" * 4096
        for command, at, length, data in (
            (READ, HIT.start, 4096, b""),
            (READ, COLD.start, 4096, b""),
            (WRITE, DIRTY.start, len(written), written),
            (FLUSH, 0, 0, b""),
        ):
            try:
                client = self.clients[-1] if self.clients else self.connect()
                client.ask(command, at, length, data)
                self.answers.append("done")
            except OSError as error:
                self.answers.append(str(error))
                if error.errno is None:  # hung up on, or no answer
                    self.leave()

    def leave(self) -> None:
        """Its clients hang up."""
        for sock in (*self.sockets, *(client.sock for client in self.clients)):
            sock.close()
        self.clients.clear()
        self.sockets.clear()

    def shown(self) -> str:
        """State and reason, as the operator is told."""
        found = self.bed.look().get(self.name)
        return "gone" if found is None else f"{found['state']}: {found.get('reason') or ''}"

    def wait_shown(self, pattern: str) -> None:
        """Return once its state and reason match."""
        seconds = self.patience
        until = time.monotonic() + seconds
        while not re.search(pattern, last := self.shown()):
            assert time.monotonic() < until, (
                f"after {seconds:g} s it shows {last!r}, not {pattern!r}"
            )
            time.sleep(0.02)

    def detach(self, *, discard: bool = True) -> None:
        self.leave()
        self.bed.post(f"/disks/{self.name}", method="DELETE", discard=discard, force=True)

    def remove(self) -> None:
        """Whatever has happened to it."""
        self.leave()
        self.end_processes()
        self.bed.disarm()
        with contextlib.suppress(OSError):
            self.bed.fs.lift()
        if self.name in self.bed.status():
            self.bed.refused(f"/disks/{self.name}", method="DELETE", discard=True, force=True)
        for one in self.below.iterdir():
            _removed(one) if one.is_dir() and not one.is_symlink() else one.unlink()

    # -- how it comes back

    def by_itself(self) -> None:
        """What was wrong is so no more, and the disk goes on."""
        self.bed.fs.lift()
        self.leave()
        self.wait_shown("^(ready|copying)")

    def anew(self) -> None:
        """As the reason says: detached, what is wrong with the files put right, and attached again."""
        self.detach()
        for one in (self.path, self.side):
            if one.is_dir() and not one.is_symlink():
                shutil.rmtree(one)
            elif os.path.lexists(one):
                one.unlink()
        (self.below / self.path.name).write_bytes(self.content)
        self.attach()

    def attached_again(self) -> None:
        """Nothing is wrong any more, and it is there already, or attached."""
        self.bed.fs.lift()
        self.leave()
        # As one is told to: a store that has just hung may still refuse the first attempt.
        self.bed.wait(self._is_there, "it cannot be attached again")
        self.wait_shown("^(ready|copying)")

    def _is_there(self) -> bool:
        if self.name in self.bed.status():
            return True
        return self.bed.refused("/disks", **self.wanted()) is None

    def rewritten(self) -> None:
        """Nothing was wrong; all of the image was written with what it had before."""
        self.by_itself()

    def vm_gone(self) -> None:
        """The processes of its VM are killed, if they are not yet."""
        self.end_processes()
        self.by_itself()

    def end_processes(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def whatever(self) -> None:
        """It goes on, or is attached again, as the state says that it shows."""
        self.bed.fs.lift()
        self.leave()
        shown = self.shown()
        if shown.startswith("stopped"):
            self.again()
        elif shown.startswith("conflict"):
            self.anew()
        elif shown == "gone":
            self.attach()
        self.wait_shown("^(ready|copying)")

    def here_away(self) -> None:
        """The directory of the store is renamed, and another is in its place."""
        self.folder.rename(self.bed.there / self.name)
        self.folder.mkdir()

    def again(self) -> None:
        """A stopped disk: detached, which writes back what is dirty, and attached again."""
        self.detach(discard=self.overlay)
        self.attach()

    def is_well(self) -> None:
        """All of it is as it has to be, through a new client, and it is written."""
        self.leave()
        client = self.connect()
        with contextlib.suppress(OSError):
            self.write(client)  # a flush that failed is told once
        self.write(client)
        for at in range(0, SIZE, MIB):
            assert client.read(at, MIB) == self.content[at : at + MIB], f"wrong data at {at}"
        self.leave()
