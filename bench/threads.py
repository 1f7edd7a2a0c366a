# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make bench-threads`: what two threads reach against one on the tables of the cache, by three ways to lock them.

Compiles `limit/threads.c`, whose head says what is measured, and prints a table. Each round does all of it once, in
another order; ratios are those of the medians, to one thread without a lock. See cache/THREADS.md.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "limit" / "threads.c"
HEADERS = HERE.parent / "fast" / "forebay_fast"
WORKS = {"read": "4 KiB reads", "write": "4 KiB writes", "mixed": "64 KiB, half of them writes"}
BASE = ("bare", 1, 0)
WAYS = {
    BASE: "one thread, no lock",
    ("one", 1, 0): "one thread, one lock",
    ("pages", 1, 0): "one thread, a lock for each page",
    ("bare", 2, 0): "two, tables of their own, no lock",
    ("one", 2, 0): "two, one lock",
    ("pages", 2, 0): "two, a lock for each page",
    ("pages", 2, 50): "the same, the loop 5 % of the time",
}
"""How it is locked, how many threads, and the microseconds for which the loop closes the gate each time."""


class Sample(NamedTuple):
    """What `threads` printed."""

    rate: float  # requests a second
    cpu: float  # microseconds of processor time for each
    displaced: float  # share of the time in which others had the processor
    again: float  # how often something had to be tried again


def sample(program: Path, way: tuple[str, int, int], work: str, seconds: float) -> Sample:
    how, threads, busy = way
    command = [str(program), how, work, str(threads), str(seconds), str(busy)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=come_first
    )
    return Sample(*map(float, done.stdout.split()))


def compiled(directory: Path) -> Path:
    program = directory / "threads"
    command = [
        "cc",
        "-std=gnu11",
        "-O3",
        "-pthread",
        f"-I{HEADERS}",
        str(SOURCE),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    return program


def report(found: dict[tuple[tuple[str, int, int], str], list[Sample]]) -> str:
    lines = [f"| | {' | '.join(WORKS.values())} |", "| --- |" + " --- |" * len(WORKS)]
    for way, name in WAYS.items():
        cells = []
        for work in WORKS:
            rates = sorted(one.rate for one in found[way, work])
            unit = median([one.rate for one in found[BASE, work]])
            cpu = median([one.cpu for one in found[way, work]])
            if way == BASE:
                cells.append(f"1: {unit / 1000:.0f}k/s, {cpu:.2f} µs")
            else:
                low, middle, high = (r / unit for r in (rates[0], median(rates), rates[-1]))
                cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f}), {cpu:.2f} µs")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for threads in (1, 2):
        some = [
            one.displaced for way, work in found if way[1] == threads for one in found[way, work]
        ]
        lines.append(
            f"With {threads}, others had the processor for {median(some):.0%} of the time."
        )
    return "\n".join(lines)


def come_first() -> None:
    """Have the kernel prefer what is measured to all else, for so short a time. Only root can."""
    with contextlib.suppress(OSError):
        os.setsid()  # a scheduling group of its own
        os.nice(-15)
        Path("/proc/self/autogroup").write_text("-15")


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-threads", description=__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds (11)")
    parser.add_argument("--seconds", type=float, default=0.1, help="of one measurement (0.1)")
    parser.add_argument("--rest", type=float, default=0.4, help="seconds between two of them (0.4)")
    options = parser.parse_args()
    cases = [(way, work) for work in WORKS for way in WAYS]
    found: dict[tuple[tuple[str, int, int], str], list[Sample]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="forebay-threads-") as directory:
        program = compiled(Path(directory))
        for n in range(options.rounds):
            first = n * 5 % len(cases)
            for case in cases[first:] + cases[:first]:
                found[case].append(sample(program, *case, options.seconds))
                time.sleep(options.rest)
            print(f"round {n + 1} of {options.rounds}", file=sys.stderr)
    print(report(found))


if __name__ == "__main__":
    main()
