# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a case says to the file server and to the hosts, and what it asks them."""

import json
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lab.console import ANSWER_SECONDS, Answer, Console, Job
from lab.machine import Machine
from lab.models import SERVER, address
from lab.outcome import Failure, demand

LEASE_SECONDS = 15
"""Of the NFS server, as short as it makes sense: much of a case is waiting for it."""

STORE = "/srv/store/images"
MOUNT = "/mnt/nfs"
CONFIGURATION = """\
[cache]
device = "/dev/vg0/forebay"

[defaults]
origin_timeout = "20s"

[stores.images]
path = "/mnt/nfs/images"
mode = "write-back"
max_lag = "{lag}"
max_dirty = "128 MiB"
{more}"""

RECONNECTS = {"ENOTCONN", "ECONNREFUSED", "ECONNRESET", "EPIPE", "ENOENT", "ESHUTDOWN", "?"}
"""What a client hears when its connection is gone, or cannot be made; QEMU tries again by itself, and no VM hears of
it."""

AS_DAEMON = "runuser -u forebay -- "
"""Before a command that is to run as the daemon's user."""


def until(what: str, ask: Callable[[], object], seconds: float, pause: float = 1.0) -> float:
    """Ask until the answer is true; the seconds that it took.

    Failure with `what` and the last answer, if it does not become so.
    """
    began = time.monotonic()
    while not (answer := ask()):
        if time.monotonic() - began > seconds:
            more = f": {answer}" if isinstance(answer, Answer) else ""
            raise Failure(f"not within {seconds:.0f} s: {what}{more}")
        time.sleep(pause)
    return time.monotonic() - began


class Computer:
    """A machine and what can be run on it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def console(self) -> Console:
        assert self.machine.console is not None
        return self.machine.console

    def run(self, command: str, seconds: float = ANSWER_SECONDS) -> Answer:
        """Run a command, whatever comes of it."""
        return self.console.run(command, seconds)

    def do(self, command: str, seconds: float = ANSWER_SECONDS) -> str:
        """Run a command that has to work; what it prints."""
        answer = self.run(command, seconds)
        demand(answer, f"{self.name}: {command}: {answer}")
        return answer.output

    def check(
        self, where: str, seed: int, flushed: int = 0, asked: int = 1 << 40, skip: int = 0
    ) -> dict[str, Any]:
        """What an image, a disk or a device has of a writer's steps: see guest/check.py."""
        words = f"--seed {seed} --flushed {flushed} --asked {asked} --skip {skip}"
        found: dict[str, Any] = json.loads(self.do(f"python3 -m lab.guest.check {where} {words}"))
        return found


class Server(Computer):
    """The file server."""

    def image(self, name: str, mebibytes: int = 8) -> None:
        """A new image of zeros, all of it a hole."""
        self.do(f"cd {STORE} && truncate -s {mebibytes}M {name} && chown forebay:forebay {name}")

    def path(self, name: str) -> str:
        """Where an image lies."""
        return f"{STORE}/{name}"

    def fill(self, left: int = 0) -> None:
        """Take the room of the store, but for so many bytes."""
        self.do(
            "free=$(df --output=avail -B1 /srv/store | tail -n 1);"
            f" fallocate -l $((free - {left})) /srv/store/filler"
        )
        if left == 0:
            self.run("dd if=/dev/zero of=/srv/store/filler.rest bs=4k")

    def make_room(self) -> None:
        """Give back what `fill` took."""
        self.do("rm -f /srv/store/filler*")

    def has_sidecar(self, image: str) -> bool:
        """Whether anything lies beside the image."""
        return bool(self.run(f"test -e {self.path(image)}.forebay"))


@dataclass(frozen=True)
class Written:
    """How far a writer has come: its last steps flushed and acknowledged, its errors."""

    flushed: int
    acknowledged: int
    errors: list[str]

    @property
    def heard(self) -> list[str]:
        """The errors that a VM would have heard of, whose QEMU connects again."""
        return [line for line in self.errors if line.split()[-1] not in RECONNECTS]


class Writer:
    """A client that writes to a disk's socket, a device or a file, and remembers what was acknowledged: see
    guest/writer.py.
    """

    def __init__(self, host: "Host", where: str, seed: int, words: str = "") -> None:
        self.seed = seed
        self._job: Job = host.console.start(
            f"exec python3 -m lab.guest.writer {where} --seed {seed} {words}"
        )

    @property
    def now(self) -> Written:
        """What it has said so far."""
        last = {"wrote": 0, "flushed": 0}
        errors = []
        for line in list(self._job.lines):
            what, _, rest = line.partition(" ")
            if what in last:
                last[what] = int(rest)
            else:
                errors.append(line)
        return Written(last["flushed"], last["wrote"], errors)

    def until_flushed(self, more: int, seconds: float = ANSWER_SECONDS) -> Written:
        """Return once it has flushed so many further steps."""
        goal = self.now.flushed + more
        try:
            until(f"step {goal} flushed", lambda: self.now.flushed >= goal, seconds, 0.2)
        except Failure as failure:
            raise Failure(f"{failure}; {self.now}") from None
        return self.now

    def pause(self) -> None:
        """Let it stand still: `forebay flush` cannot end well while somebody writes."""
        self._job.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it write again."""
        self._job.signal(signal.SIGCONT)

    def stop(self) -> Written:
        """End it; what it had done."""
        self._job.stop()
        return self.now


class Host(Computer):
    """A host with the gateway."""

    def mount(self, options: str, at: str = MOUNT) -> None:
        """The server's export, as an operator mounts it."""
        server = address(SERVER, self.machine.model.wires[0])
        self.do(
            f"mkdir -p {at} && echo '{server}:/srv/store {at} nfs hard,{options},_netdev 0 0' >>/etc/fstab"
        )
        self.do(f"systemctl daemon-reload; mount {at}")

    def configure(self, lag: str = "300s", more: str = "") -> None:
        """Write the configuration; a daemon that runs has to be told."""
        text = CONFIGURATION.format(lag=lag, more=more)
        self.do(f"printf %s {shlex.quote(text)} >/etc/forebay/forebay.toml; forebay check-config")

    def socket(self, disk: str) -> str:
        """Where the disk's clients connect."""
        return f"/run/forebay/disks/{disk}.sock"

    def attach(
        self, disk: str, image: str, mode: str = "write-back", store: str = "images"
    ) -> None:
        """Attach an image, which was made on the server a moment ago."""
        self.run(f"ls {MOUNT}/images")
        self.do(f"forebay attach {disk} {store}:{image} --mode {mode}")

    def writer(self, disk: str, seed: int, words: str = "") -> Writer:
        """Start a client that writes."""
        return Writer(self, self.socket(disk), seed, words)

    def status(self, disk: str, seconds: float = 30.0) -> dict[str, Any]:
        """The keys of `forebay status --json` for a disk; none where the daemon does not answer."""
        answer = self.console.get(f"/disks/{disk}", seconds)
        return dict(json.loads(answer.output)) if answer else {}

    def state(self, disk: str) -> str:
        """In which state a disk is, by `forebay status`."""
        return str(self.status(disk).get("state"))

    def until_state(self, disk: str, wanted: str, seconds: float) -> None:
        """Return once the disk is in that state; Failure with the state that it is in."""
        try:
            until(f"{disk} {wanted}", lambda: self.state(disk) == wanted, seconds)
        except Failure as failure:
            shown = self.status(disk)
            raise Failure(f"{failure}; {shown.get('state')}: {shown.get('reason')}") from None

    def until_flushed(self, disk: str, seconds: float) -> None:
        """Return once `forebay flush` works; Failure with its last answer."""
        deadline = time.monotonic() + seconds
        while not (answer := self.run(f"forebay flush {disk}", seconds)):
            if time.monotonic() > deadline:
                shown = self.status(disk)
                raise Failure(
                    f"flush of {disk}: {answer}; {shown.get('state')}: {shown.get('reason')}"
                )
            time.sleep(1.0)

    def flush(self, disk: str, seconds: float = ANSWER_SECONDS) -> None:
        """Write back what is dirty; Failure where that fails."""
        self.do(f"forebay flush {disk}", seconds)

    def flush_beside(self, writers: Sequence[Writer], seconds: float = ANSWER_SECONDS) -> None:
        """Write everything back while these clients stand still; tried again until it works."""
        for writer in writers:
            writer.pause()
        self.until_flushed("--all", seconds)
        for writer in writers:
            writer.go_on()

    def checked(self, disk: str, writer: Writer) -> dict[str, Any]:
        """What the disk has, seen by a client, of what a writer wrote, which has ended."""
        done = writer.now
        return self.check(self.socket(disk), writer.seed, done.flushed, done.acknowledged + 1)
