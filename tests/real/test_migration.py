# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A real guest migrates between two QEMUs, each on a daemon of its own, on one store: it writes all the while.

No libvirt: QEMU's own monitor does what libvirt does, in seconds. The guest counts, with a sync for each number, and
says each number on its console once it is durable: what it said has to be there afterwards, and the longest time that
it said nothing is its pause. ``FOREBAY_MIGRATIONS=20`` moves it so often, and has daemons killed in the middle as well;
``FOREBAY_PAUSES=1`` compares the pause with that of the same move on the plain file.
"""

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from real import libvirt_guest
from real.gateway_process import GatewayProcess
from real.libvirt_host import EMULATOR, Console
from real.processes import end, need

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800 if "FOREBAY_MIGRATIONS" in os.environ else 300),
]

MOVES = int(os.environ.get("FOREBAY_MIGRATIONS", "1"))
COUNTING = (
    "(n=0; while true; do n=$((n+1)); echo $n >/data/new && sync /data/new && mv /data/new /data/count && sync"
    ' && echo "<$n>" || echo "<failed>"; done) &'
)


@pytest.fixture(scope="module")
def guest_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("qemu-system-x86_64")
    directory = tmp_path_factory.mktemp("guest")
    libvirt_guest.make_image(directory / "guest.raw", directory)
    return directory / "guest.raw"


class Qemu:
    """One QEMU with the guest's disk: a blockdev as QMP has it."""

    def __init__(self, directory: Path, blockdev: dict[str, Any], *, incoming: bool) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        command = [
            str(EMULATOR), "-accel", "tcg", "-machine", "pc", "-m", "128", "-nodefaults", "-display", "none",
            "-serial", f"unix:{directory}/console,server=on,wait=off",
            "-qmp", f"unix:{directory}/qmp,server=on,wait=off",
            "-blockdev", json.dumps({**blockdev, "node-name": "d"}),
            "-device", "virtio-blk-pci,drive=d,bootindex=1,werror=report,rerror=report",
            *(["-incoming", "defer"] if incoming else []),
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (directory / "qmp").exists() or not (directory / "console").exists():
            assert self.process.poll() is None and time.monotonic() < deadline  # noqa: PT018
            time.sleep(0.02)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(directory / "qmp"))
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise AssertionError(answer["error"])
            if "return" in answer:
                return answer["return"]

    def wait(self, command: str, key: str, *wanted: str) -> Any:
        deadline = time.monotonic() + 60
        while True:
            found = self.ask(command)
            if found.get(key) in wanted:
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.01)

    def migrate_to(self, other: "Qemu") -> None:
        uri = f"unix:{other.directory}/migration"
        other.ask("migrate-incoming", uri=uri)
        self.ask("migrate", uri=uri)
        found = self.wait("query-migrate", "status", "completed", "failed")
        assert found["status"] == "completed", found
        other.wait("query-status", "status", "running")

    def quit(self) -> None:
        with suppress(OSError, ValueError, AssertionError):
            self.ask("quit")
        with suppress(OSError):
            self._file.close()
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        end(self.process)


class Listener:
    """What the guest says on a console, and when."""

    def __init__(self, path: Path, said: list[tuple[float, str]]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._said = said
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        text = ""
        while data := self._socket.recv(65536):
            text += data.decode(errors="replace")
            found = list(re.finditer(r"<(\w+)>", text))
            self._said.extend((time.monotonic(), match[1]) for match in found)
            text = text[found[-1].end() :] if found else text[-100:]

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


Place = Callable[[bool], dict[str, Any]]
"""The blockdev of the disk on one host; True: for a guest that comes."""


class Guest:
    """A guest that counts, moved from place to place."""

    def __init__(self, directory: Path) -> None:
        self.said: list[tuple[float, str]] = []
        self._directory = directory
        self._n = 0
        self.qemu: Qemu
        self._listener: Listener

    def start(self, place: Place) -> None:
        self.qemu = self._qemu(place(False), incoming=False)
        console = Console(self.qemu.directory / "console")
        console.wait_up(120.0)
        console.run("mount -o remount,rw / ; mkdir -p /data")
        console.run(f"{{ {COUNTING} }}")
        console.close()
        self._listener = Listener(self.qemu.directory / "console", self.said)
        self.counts(3)

    def _qemu(self, blockdev: dict[str, Any], *, incoming: bool) -> Qemu:
        self._n += 1
        return Qemu(self._directory / str(self._n), blockdev, incoming=incoming)

    def counts(self, more: int) -> None:
        """Wait until it has counted so much further."""
        goal, deadline = len(self.said) + more, time.monotonic() + 60
        while len(self.said) < goal:
            assert time.monotonic() < deadline, self.said[-3:]
            time.sleep(0.02)

    def move(self, place: Place) -> float:
        """Move it; how long it said nothing at most, in seconds."""
        other = self._qemu(place(True), incoming=True)
        listener = Listener(other.directory / "console", self.said)
        self.counts(3)
        began = len(self.said) - 1
        self.qemu.migrate_to(other)
        self.counts(3)
        self._listener.close()
        self.qemu.quit()
        self.qemu, self._listener = other, listener
        times = sorted(at for at, _ in self.said[began:])
        return max(b - a for a, b in pairwise(times))

    def leave(self) -> None:
        """End its QEMU, if that has not ended."""
        self._listener.close()
        self.qemu.quit()

    def end(self) -> int:
        """End it; the last number that it said."""
        self.qemu.ask("stop")
        self.leave()
        words = [word for _, word in self.said]
        assert "failed" not in words
        numbers = [int(word) for word in words]
        assert sorted(numbers) == list(range(1, len(numbers) + 1)), "it began anew, or lost some"
        return numbers[-1]


def counted(image: Path) -> int:
    """The number in the image, after its journal was replayed."""
    part = image.with_name("root.ext4")
    with image.open("rb") as source, part.open("wb") as copy:
        source.seek(libvirt_guest.ROOT_START * libvirt_guest.SECTOR)
        shutil.copyfileobj(source, copy)
    checked = subprocess.run(["/usr/sbin/e2fsck", "-fy", part], capture_output=True, check=False)
    assert checked.returncode in (0, 1), checked.stdout
    found = subprocess.run(
        ["/usr/sbin/debugfs", "-R", "cat /data/count", part], check=True, capture_output=True
    )
    return int(found.stdout)


@pytest.fixture
def hosts(
    make_gateway: Callable[..., GatewayProcess], guest_image: Path
) -> tuple[GatewayProcess, GatewayProcess]:
    """Two daemons on one store, with the guest's image in it."""
    one = make_gateway({"stores.images": {"mode": "write-back"}})
    shutil.copy(guest_image, one.images / "guest.raw")
    two = make_gateway({"stores.images": {"mode": "write-back", "path": str(one.images)}})
    return one, two


def disk_of(gateway: GatewayProcess) -> dict[str, Any]:
    address = {"type": "unix", "path": str(gateway.sock("g"))}
    return {"driver": "nbd", "server": address, "export": "g", "reconnect-delay": 30}


def place_of(gateway: GatewayProcess) -> Place:
    def place(comes: bool) -> dict[str, Any]:
        gateway.cli("attach", "g", "images:guest.raw", *(["--incoming"] if comes else []))
        return disk_of(gateway)

    return place


@contextmanager
def moving(directory: Path, place: Place) -> Iterator[Guest]:
    guest = Guest(directory)
    guest.start(place)
    try:
        yield guest
    finally:
        guest.leave()


def test_a_guest_that_writes_moves_to_and_fro(
    hosts: tuple[GatewayProcess, GatewayProcess], short_path: Path
) -> None:
    here, there = hosts
    with moving(short_path, place_of(here)) as guest:
        for _ in range(MOVES):
            here, there = there, here
            pause = guest.move(place_of(here))
            print(f"pause: {pause:.3f} s")
            assert there.status("g")["state"] == "handed-over"
            there.cli("detach", "g")
        last = guest.end()
    here.cli("detach", "g")
    image = here.directory / "copy.raw"
    shutil.copy(hosts[0].images / "guest.raw", image)
    assert last <= counted(image) <= last + 1
    assert not (hosts[0].images / "guest.raw.forebay" / "owner").exists()


@pytest.mark.skipif("FOREBAY_MIGRATIONS" not in os.environ, reason="FOREBAY_MIGRATIONS=20")
@pytest.mark.parametrize("which", ["source", "destination"])
def test_a_guest_moves_although_a_daemon_is_killed(
    which: str, hosts: tuple[GatewayProcess, GatewayProcess], short_path: Path
) -> None:
    here, there = hosts
    with moving(short_path, place_of(here)) as guest:
        place = place_of(there)

        def killed(comes: bool) -> dict[str, Any]:
            found = place(comes)
            victim = here if which == "source" else there
            victim.kill()
            victim.start()
            return found

        guest.move(killed)
        last = guest.end()
    here.cli("detach", "g")
    there.cli("detach", "g")
    image = here.directory / "copy.raw"
    shutil.copy(hosts[0].images / "guest.raw", image)
    assert last <= counted(image) <= last + 1


@pytest.mark.timeout(1800)
@pytest.mark.skipif("FOREBAY_PAUSES" not in os.environ, reason="minutes: FOREBAY_PAUSES=1")
def test_the_pause_is_not_much_longer_than_on_the_plain_file(
    hosts: tuple[GatewayProcess, GatewayProcess], short_path: Path
) -> None:
    ours, plain = [], []
    file = hosts[0].images / "plain.raw"
    shutil.copy(hosts[0].images / "guest.raw", file)
    here, there = hosts
    with (
        moving(short_path / "a", place_of(here)) as guest,
        moving(short_path / "b", lambda _: {"driver": "file", "filename": str(file)}) as other,
    ):
        for _ in range(10):
            here, there = there, here
            ours.append(guest.move(place_of(here)))
            there.cli("detach", "g")
            plain.append(other.move(lambda _: {"driver": "file", "filename": str(file)}))
    ratio = statistics.median(ours) / statistics.median(plain)
    print(f"pauses: {ours}, on the plain file {plain}: {ratio:.2f} times")
