# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The reads of one boot, with the time that the guest computes in between: recorded once, kept as a file of text."""

import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

KEPT = Path(__file__).resolve().parents[1] / "results" / "debian12.reads"
"""The boot of `linux.py`'s guest."""

BLOCK = 64 << 10
SECTOR = 512
HEADER = "# offset and length in sectors of 512 bytes, after which read, microseconds between"
_LINE = re.compile(
    r"(?P<at>[-0-9]+ [0-9:.]+) connection=\d+ "
    r"(?:(?P<read>Read) id=(?P<id>\d+) offset=(?P<offset>\S+) count=(?P<count>\S+) |\.\.\.Read id=(?P<done>\d+) )"
)
"""Of nbdkit's log filter: a READ that begins, or one that ends."""


class Read(NamedTuple):
    """One request of the guest, `think` seconds after the one of number `after` was answered (-1: after the start)."""

    offset: int
    length: int
    after: int
    think: float


class Recording(NamedTuple):
    """A boot: its requests in the order in which they were made, and what it computes after the last answer."""

    reads: list[Read]
    tail: float

    @property
    def blocks(self) -> set[int]:
        """Numbers of the blocks that it reads, of 64 KiB."""
        return {
            block
            for read in self.reads
            for block in range(read.offset // BLOCK, (read.offset + read.length - 1) // BLOCK + 1)
        }

    @property
    def bytes(self) -> int:
        """Of all requests."""
        return sum(read.length for read in self.reads)

    @property
    def seconds(self) -> float:
        """What the boot takes if every request is answered at once."""
        ends: list[float] = []
        for read in self.reads:
            ends.append((ends[read.after] if read.after >= 0 else 0.0) + read.think)
        return max(ends, default=0.0) + self.tail

    def faster(self, factor: float) -> "Recording":
        """The same boot on a processor so many times as fast."""
        reads = [read._replace(think=read.think / factor) for read in self.reads]
        return Recording(reads, self.tail / factor)


def of_log(lines: Iterable[str], seconds: float, began: float) -> Recording:
    """What nbdkit's log filter has written of one client. `began`: when the guest was switched on, as time.time() has
    it, and `seconds`: what it took until it had booted."""
    reads: list[Read] = []
    numbers: dict[str, int] = {}
    last, last_at = -1, began
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        at = seconds_of(found["at"])
        if found["read"]:
            numbers[found["id"]] = len(reads)
            offset, count = int(found["offset"], 16), int(found["count"], 16)
            reads.append(Read(offset, count, last, max(0.0, at - last_at)))
        elif found["done"] in numbers:
            last, last_at = numbers[found["done"]], at
    return Recording(reads, max(0.0, began + seconds - last_at))


def seconds_of(stamp: str) -> float:
    """A time of the log, which is local, as time.time() has it."""
    return datetime.fromisoformat(stamp).timestamp()


def save(recording: Recording, path: Path) -> None:
    """Write it to a file."""
    lines = [HEADER, f"tail {recording.tail * 1e6:.0f}"]
    lines += [
        f"{read.offset // SECTOR} {read.length // SECTOR} {read.after} {read.think * 1e6:.0f}"
        for read in recording.reads
    ]
    path.write_text("\n".join(lines) + "\n")


def load(path: Path = KEPT) -> Recording:
    """What `save` has written. Raises ValueError with the line that is none."""
    lines = path.read_text().splitlines()
    if lines[:1] != [HEADER] or not lines[1].startswith("tail "):
        raise ValueError(f"{path}: no recording of a boot: record one with --record")
    reads: list[Read] = []
    for number, line in enumerate(lines[2:], 3):
        try:
            offset, length, after, think = map(int, line.split())
        except ValueError:
            raise ValueError(f"{path}:{number}: not four numbers: {line[:60]}") from None
        if not (offset >= 0 < length and -1 <= after < len(reads) and think >= 0):
            raise ValueError(f"{path}:{number}: no request that can be made: {line[:60]}")
        reads.append(Read(offset * SECTOR, length * SECTOR, after, think / 1e6))
    return Recording(reads, int(lines[1].split()[1]) / 1e6)
