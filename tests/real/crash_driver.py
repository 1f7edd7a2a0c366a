# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The life of one gateway on a recorder: guests with libnbd, an operator, and an end. Its log is what it leaves.

What is asked of the daemon and what it answered goes into the log as marks (`crash_ledger.py`): before a request is
sent, and after its answer has come.
"""

import contextlib
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forebay.client import Client
from forebay.errors import ForebayError
from real.crash_ledger import CELL, SECTOR, content, image_content, told
from real.crash_marks import Marks
from real.crash_oracle import CACHE_SIZE, DISK, IMAGE, STORE
from real.crash_steps import LOG, Steps, nothing
from real.gateway_process import GatewayProcess
from real.processes import START_TIMEOUT, end

SIZE = 18 * 65536
GUESTS = 3
OWN = 8
"""Of each GUESTS * OWN sectors that many are one guest's: what a guest writes nobody else does."""

PERIODS = SIZE // SECTOR // (GUESTS * OWN)
TIMEOUT = "1s"
"""After which a cache device that hangs counts as failed."""

DEVICE_LOG = "cache device .* failed|works again|is damaged|are damaged|write-back failed|index|slow|no answer"
"""What a daemon may say loudly about a device that hangs."""

HOT = (0, 1, PERIODS - 1)
"""Places that are written again and again."""


class RecorderProcess:
    """A recorder that is mounted; :meth:`stop` unmounts it, and then its log is whole."""

    def __init__(self, directory: Path, seed: str) -> None:
        self.mount = directory / "mount"
        self.backing = directory / "backing"
        self.log = directory / "record"
        self.mount.mkdir()
        script = Path(__file__).with_name("recorder.py")
        command = [sys.executable, script, self.mount, self.backing, self.log, seed]
        self.process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"READY\n":
            self.stop()
            raise RuntimeError("the recorder does not run")

    def stop(self) -> None:
        if os.path.ismount(self.mount):
            subprocess.run(["umount", "--lazy", str(self.mount)], check=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(START_TIMEOUT)
        end(self.process)
        if self.process.stdout is not None:
            self.process.stdout.close()


@dataclass
class Known:
    """What a guest's cells have to read as; `unsure` are those of an operation that was not answered."""

    base: bytes
    """What the disk held at its beginning."""
    holds: dict[int, bytes] = field(default_factory=dict)
    unsure: set[int] = field(default_factory=set)


class Guest(threading.Thread):
    """One connection. Ends after `operations`, when the daemon dies, or when something read is not what was written."""

    def __init__(
        self, number: int, uri: str, marks: Marks, rng: random.Random, ops: int, known: Known
    ) -> None:
        super().__init__(name=f"guest {number}")
        self._number = number
        self._uri = uri
        self._marks = marks
        self._random = rng
        self._operations = ops
        self._known = known
        self.wrong: str | None = None

    def run(self) -> None:
        import nbd

        self._nbd = nbd
        self._client = nbd.NBD()
        # The daemon is killed on purpose; what it says otherwise when it must not is found in its log.
        with contextlib.suppress(nbd.Error):
            self._client.connect_uri(self._uri)
            do: list[Callable[[], None]] = [self._write] * 4
            do += [self._part, self._zero, self._flush, self._flush, self._read, self._look]
            for _ in range(self._operations):
                self._random.choice(do)()
                if self._random.random() < 0.1:
                    time.sleep(self._random.choice((0.001, 0.01)))
            self._client.shutdown()

    # -- where ------------------------------------------------------------------------------------------------

    def _own(self) -> tuple[int, int]:
        """First sector and number of sectors of a run that is ours."""
        period = self._random.choice((*HOT, self._random.randrange(PERIODS)))
        first = self._random.randrange(OWN)
        count = self._random.randrange(1, OWN + 1 - first)
        return (period * GUESTS + self._number) * OWN + first, count

    @contextlib.contextmanager
    def _change(self, first: int, count: int, *, zero: bool, fua: bool = False) -> Iterator[int]:
        """Around an operation on cells: the log knows of it before and after."""
        number, marks = self._marks.number(), self._marks
        cells = range(first, first + count)
        self._known.unsure.update(cells)
        marks.say("begin", number, first, count, zero, fua, time.time())
        yield number
        marks.say("end", number, time.time())
        for cell in cells:
            self._known.holds[cell] = bytes(CELL) if zero else content(cell, number)
        self._known.unsure.difference_update(cells)

    # -- what -------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        first, count = self._own()
        self._put(first * 8, count * 8)

    def _part(self) -> None:
        """Not whole sectors."""
        first, count = self._own()
        cut = self._random.randrange(8)
        self._put(first * 8 + cut, self._random.randrange(1, count * 8 - cut + 1))

    def _put(self, first: int, count: int) -> None:
        fua = self._random.random() < 0.15
        with self._change(first, count, zero=False, fua=fua) as number:
            data = b"".join(content(cell, number) for cell in range(first, first + count))
            self._client.pwrite(data, first * CELL, self._nbd.CMD_FLAG_FUA if fua else 0)

    def _zero(self) -> None:
        first, count = self._own()
        if self._random.random() < 0.2:  # a whole block, where there is one
            first, count = first // 16 * 16, 16
            if not all(self._is_ours(sector) for sector in range(first, first + count)):
                first, count = self._own()
        if self._random.random() < 0.2:  # changes nothing: the recorder cannot punch holes
            self._client.trim(count * SECTOR, first * SECTOR)
            return
        no_hole = self._nbd.CMD_FLAG_NO_HOLE if self._random.random() < 0.5 else 0
        with self._change(first * 8, count * 8, zero=True):
            self._client.zero(count * SECTOR, first * SECTOR, no_hole)

    def _is_ours(self, sector: int) -> bool:
        return sector // OWN % GUESTS == self._number

    def _flush(self) -> None:
        number = self._marks.number()
        self._marks.say("flush", number)
        self._client.flush()
        self._marks.say("flushed", number)

    def _read(self) -> None:
        """Anything: what is not there yet is brought in, and something else may have to leave."""
        at = self._random.randrange(SIZE // SECTOR) * SECTOR
        self._client.pread(min(SIZE - at, self._random.choice((1, 16, 64)) * SECTOR), at)

    def _look(self) -> None:
        """What is ours reads as it was written last."""
        first, count = self._own()
        data = self._client.pread(count * SECTOR, first * SECTOR)
        for n, cell in enumerate(range(first * 8, (first + count) * 8)):
            known = self._known.holds.get(cell, self._known.base[cell * CELL : (cell + 1) * CELL])
            found = bytes(data[n * CELL : (n + 1) * CELL])
            if cell not in self._known.unsure and found != known:
                self.wrong = f"cell {cell} holds {told(found, cell)}, not {told(known, cell)}"
                self._marks.say("wrong", self.wrong)


@dataclass
class Life:
    """What one life is to be like."""

    seed: str
    mode: str
    modes: Sequence[str] = ()
    """What the operator changes to. A change to what it is already commits the index, and no more."""
    operations: int = 80
    """Of each guest."""
    pause: float = 0.05
    """Seconds between two things that the operator does."""
    restarts: bool = True
    """Whether the daemon may be killed in the middle, and come back."""
    step: str = ""
    """One of `crash_steps.STEPS`, in the middle."""
    device: str = ""
    """Of the cache: `slow`, or `hangs` for longer than `cache.timeout`."""
    bug: str | None = None
    """One of `planted.BUGS`."""


class Living:
    """One life in a directory on a memory file system: :meth:`run`; then `log` and `image` are there."""

    def __init__(self, directory: Path, life: Life) -> None:
        self.life = life
        self.random = random.Random(f"{life.seed} driver")
        backing = directory / "backing"
        for name in ("state", STORE):
            (backing / name).mkdir(parents=True)
        self.image = backing / STORE / IMAGE
        self.image.write_bytes(image_content(SIZE))
        self._directory = directory
        self.log = directory / "record"
        self.wrong: list[str] = []
        self._begin_anew(image_content(SIZE))

    def _begin_anew(self, base: bytes) -> None:
        self._known = [Known(base) for _ in range(GUESTS)]

    def run(self, gateway: GatewayProcess) -> None:
        """Live, until the daemon is killed or stopped; `gateway` is not started yet, and removed by the caller."""
        recorder = RecorderProcess(self._directory, self.life.seed)
        try:
            self._configure(gateway, recorder.mount)
            marks = Marks(recorder.mount)
            try:
                self._live(gateway, marks, recorder.mount)
            finally:
                marks.say("order", "device", 0.0)
                marks.close()
                gateway.kill()
        finally:
            recorder.stop()

    def _configure(self, gateway: GatewayProcess, mount: Path) -> None:
        timeout = TIMEOUT if self.life.device == "hangs" else "30s"
        gateway.configure(
            {
                "gateway": {"state": str(mount / "state")},
                "cache": {"size": str(CACHE_SIZE), "timeout": timeout},
                "defaults": {
                    "max_lag": self.random.choice(("100ms", "300ms", "30s")),
                    "max_dirty": self.random.choice(("256 KiB", "1 MiB")),
                },
                f"stores.{STORE}": {"path": str(mount / STORE)},
            }
        )

    def _start(self, gateway: GatewayProcess) -> None:
        gateway.start(["-m", "real.planted", self.life.bug] if self.life.bug else [])

    def _live(self, gateway: GatewayProcess, marks: Marks, mount: Path) -> None:
        self._start(gateway)
        self._attach(gateway, marks)
        if self.life.device:
            gateway.allow_log(DEVICE_LOG)
        restarts = self.life.restarts and self.random.random() < 0.5
        if restarts:
            killer = threading.Timer(self.random.uniform(0.05, 0.4), gateway.kill)
            killer.start()
            self._work(gateway, marks, self.life.operations)
            killer.join()
            gateway.kill()
            self._start(gateway)
        if self.life.step:
            self._step(gateway, marks, mount)
        self._work(gateway, marks, self.life.operations // (2 if restarts else 1))
        if self.life.bug is None:
            self._end(gateway, marks)

    def _attach(self, gateway: GatewayProcess, marks: Marks) -> None:
        marks.say("change", self.life.mode)
        full = "full-copy" in (self.life.mode, *self.life.modes)  # it takes what it takes
        marks.say("say", "attaching")
        Client(str(gateway.control)).post(
            "/disks",
            {
                "name": DISK,
                "image": f"{STORE}:{IMAGE}",
                "mode": self.life.mode,
                "cache_size": 0 if full else self.random.choice((0, 0, 5 * 65536)),
            },
        )
        marks.say("say", "attached")

    def _step(self, gateway: GatewayProcess, marks: Marks, mount: Path) -> None:
        """Guests at work, whom the life's step interrupts."""
        gateway.allow_log(LOG)
        steps = Steps(
            gateway,
            marks,
            mount,
            self.image,
            random.Random(self.random.getrandbits(32)),
            start=lambda: self._start(gateway),
            attach=lambda: self._attach(gateway, marks),
        )
        self._work(gateway, marks, self.life.operations, lambda: steps.begin(self.life.step))
        held = {
            cell: data
            for known in self._known
            for cell, data in known.holds.items()
            if cell not in known.unsure
        }
        found = steps.end(self.life.step, held)
        self.wrong += steps.wrong
        if found is not None:
            self._begin_anew(found)

    def _work(
        self,
        gateway: GatewayProcess,
        marks: Marks,
        operations: int,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Guests at work, an operator beside them. The daemon may be killed under them."""
        uri = gateway.uri(DISK)
        guests = [
            Guest(n, uri, marks, random.Random(self.random.getrandbits(32)), operations, known)
            for n, known in enumerate(self._known)
        ]
        done = threading.Event()
        operator = threading.Thread(target=self._operate, args=(gateway, marks, done))
        for thread in (*guests, operator):
            thread.start()
        try:
            self._trouble(marks)
            meanwhile()
        finally:
            for guest in guests:
                guest.join()
                if guest.wrong is not None:
                    self.wrong.append(guest.wrong)
            done.set()
            operator.join()

    def _trouble(self, marks: Marks) -> None:
        """What the cache device does to those at work."""
        if self.life.device == "slow":
            marks.say("order", "device", self.random.choice((0.001, 0.005, 0.03)))
        elif self.life.device == "hangs":
            time.sleep(self.random.uniform(0.02, 0.2))
            marks.say("order", "device", math.inf)
            time.sleep(self.random.uniform(1.0, 2.5))
            marks.say("order", "device", 0.0)

    def _operate(self, gateway: GatewayProcess, marks: Marks, done: threading.Event) -> None:
        client = Client(str(gateway.control))
        while not done.wait(self.random.uniform(0, 2 * self.life.pause)):
            with contextlib.suppress(ForebayError):  # busy, or just killed
                if self.life.modes and self.random.random() < 0.4:
                    mode = self.random.choice(self.life.modes)
                    marks.say("change", mode)
                    client.follow("POST", f"/disks/{DISK}/mode", {"mode": mode}, nothing)
                else:
                    self._drain(client, marks)

    def _drain(self, client: Client, marks: Marks) -> None:
        number = marks.number()
        marks.say("drain", number)
        client.follow("POST", f"/disks/{DISK}/flush", {}, nothing)
        marks.say("drained", number)

    def _end(self, gateway: GatewayProcess, marks: Marks) -> None:
        how = self.random.random()
        if how < 0.2:
            marks.say("say", "detaching")
            client = Client(str(gateway.control))
            client.follow("DELETE", f"/disks/{DISK}?force=true", None, nothing)
            marks.say("say", "detached")
        if how < 0.5:
            gateway.stop()
