# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A guest that never stops: writes, reads back and compares, many requests in flight, and never reconnects by itself.

    python steady_client.py URI FIRST LENGTH DEPTH [--reconnect]

It works on its own LENGTH bytes from FIRST, DEPTH requests at a time; each 4 KiB sector says whose it is and how often
it was written. It says "ready" when its requests are on their way, goes on until its standard input ends, and then
prints one JSON object: `requests` answered, `flushes`, `errors`, `pauses` (times of CLOCK_MONOTONIC in seconds, from
when to when nothing was answered, for more than 50 ms), `reconnected`. With --reconnect a broken connection is made
anew and what was not answered is asked again, as QEMU does it; then everything that was ever acknowledged is compared
at each reconnect.
"""

import json
import os
import random
import select
import sys
import time
from typing import Any

import nbd

SECTOR = 4096
PAUSE = 0.05


class Guest:
    """One connection. `counts`: how often each sector was written and acknowledged; `busy`: not answered yet."""

    def __init__(self, uri: str, first: int, length: int, depth: int, reconnect: bool) -> None:
        self.uri, self.first, self.depth, self.reconnect = uri, first, depth, reconnect
        self.rng = random.Random(first)
        self.counts = [0] * (length // SECTOR)
        self.busy: dict[int, int] = {}  # sector -> the count being written
        self.reading: set[int] = set()
        self.flushing = False
        self.requests = self.flushes = self.reconnected = 0
        self.errors: list[str] = []
        self.pauses: list[tuple[float, float]] = []
        self.last = time.monotonic()
        self.handle = self.connect()

    def connect(self) -> Any:
        handle = nbd.NBD()
        handle.connect_uri(self.uri)
        return handle

    def content(self, sector: int, count: int) -> bytes:
        return (f"{self.first} {sector} {count}\n".encode() * SECTOR)[:SECTOR]

    # -- requests

    def fill(self) -> None:
        while len(self.busy) + len(self.reading) < self.depth:
            sector = self.rng.randrange(len(self.counts))
            if sector in self.busy or sector in self.reading:
                continue
            if self.counts[sector] and self.rng.random() < 0.5:
                self.read(sector)
            else:
                self.busy[sector] = self.counts[sector] + 1
                self.write(sector)
        if not self.flushing and self.rng.random() < 0.01:
            self.flushing = True
            self.handle.aio_flush(completion=self.flushed)

    def write(self, sector: int) -> None:
        data = nbd.Buffer.from_bytearray(bytearray(self.content(sector, self.busy[sector])))

        def done(error: int) -> int:
            if error:
                self.errors.append(f"write of sector {sector}: error {error}")
            else:
                self.counts[sector] = self.busy.pop(sector)
                self.answered()
            return 1

        self.handle.aio_pwrite(data, self.first + sector * SECTOR, completion=done)

    def read(self, sector: int) -> None:
        data = nbd.Buffer(SECTOR)
        self.reading.add(sector)

        def done(error: int) -> int:
            self.reading.discard(sector)
            if error:
                self.errors.append(f"read of sector {sector}: error {error}")
            else:
                self.compare(sector, bytes(data.to_bytearray()))
                self.answered()
            return 1

        self.handle.aio_pread(data, self.first + sector * SECTOR, completion=done)

    def flushed(self, error: int) -> int:
        self.flushing = False
        self.flushes += 1
        if error:
            self.errors.append(f"flush: error {error}")
        self.answered()
        return 1

    def compare(self, sector: int, data: bytes, *also: int) -> None:
        counts = (self.counts[sector], *also)
        if not any(data == self.content(sector, count) for count in counts):
            self.errors.append(f"sector {sector} is not as written {counts}: {data[:40]!r}")

    def answered(self) -> None:
        now = time.monotonic()
        if now - self.last > PAUSE:
            self.pauses.append((self.last, now))
        self.last = now
        self.requests += 1

    # -- life

    def run(self) -> None:
        self.fill()
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 0)[0] and not self.lost():
            try:
                self.handle.poll(100)
                self.fill()
            except nbd.Error as fault:
                self.broken(fault)
        while (self.busy or self.reading or self.flushing) and not self.lost():
            try:
                self.handle.poll(1000)
            except nbd.Error as fault:
                self.broken(fault)

    def lost(self) -> bool:
        if self.reconnect:
            self.errors = [e for e in self.errors if "not as written" in e]
        return bool(self.errors)

    def broken(self, fault: Any) -> None:
        if not self.reconnect:
            self.errors.append(str(fault))
            return
        self.lost()
        deadline = time.monotonic() + 30
        while True:
            try:
                self.handle = self.connect()
                self.verify()
                break
            except nbd.Error:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.reconnected += 1
        self.reading, self.flushing = set(), False
        for sector in list(self.busy):
            self.write(sector)

    def verify(self) -> None:
        """All of it. What was not answered may be there or not."""
        step = 1 << 20
        for at in range(0, len(self.counts) * SECTOR, step):
            data = self.handle.pread(step, self.first + at)
            for i in range(0, step, SECTOR):
                sector = (at + i) // SECTOR
                if self.counts[sector]:
                    also = (self.busy[sector],) if sector in self.busy else ()
                    self.compare(sector, bytes(data[i : i + SECTOR]), *also)


def main() -> None:
    uri, first, length, depth = sys.argv[1], *map(int, sys.argv[2:5])
    guest = Guest(uri, first, length, depth, "--reconnect" in sys.argv)
    guest.run()
    if not guest.lost():  # what was in flight on a connection that broke tells so late
        guest.verify()
    keys = ("requests", "flushes", "errors", "pauses", "reconnected")
    print(json.dumps({key: getattr(guest, key) for key in keys}), flush=True)
    os._exit(0)  # a handle with requests under way is not worth waiting for


if __name__ == "__main__":
    main()
