# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make soak`: kills, faults and changes for as long as it is told, with guests that check everything they read."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from real.kill_checker import Tally
from real.kill_plants import SIDES
from real.kill_steps import LIVES, kill_everywhere
from soak.kills import many_kills
from soak.soak import soak
from soak.store import why_not

PROGRESS_SECONDS = 5.0


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long (3600)")
    parser.add_argument("--kills", type=int, default=0, help="only kills, and so many of them")
    parser.add_argument("--points", action="store_true", help="only kills, at all named points")
    parser.add_argument("--gateways", type=int, default=2, help="at the same time, of --kills (2)")
    parser.add_argument("--seed", type=int, help="of everything; printed (by the clock)")
    parser.add_argument("--dir", type=Path, default=Path("/tmp"), help="where to work (/tmp)")
    return parser.parse_args(words)


class Progress:
    """A line now and then: over the last one at a terminal, else below it."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._last = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def __call__(self, tally: Tally, more: str = "") -> None:
        if time.monotonic() - self._last < PROGRESS_SECONDS:
            return
        self._last = time.monotonic()
        text = f"{self.seconds:6.0f} s  {tally.line()}{more}"
        with contextlib.suppress(OSError):
            if sys.stdout.isatty():
                print(f"\r{text:<{os.get_terminal_size().columns - 1}}", end="", flush=True)
                return
        print(text, flush=True)


def all_points(seed: int, told: Progress) -> tuple[Tally, dict[str, int]]:
    """A kill at every named point that a mode passes, in every mode. What was counted, and points by mode."""
    tally, counts, reached = Tally(), {}, set()
    for life in LIVES:
        found, kept = kill_everywhere(life, seed, tally, told=told)
        counts[life] = len(found)
        reached |= set(found)
        if kept:
            break
    else:
        missed = sorted(set(SIDES) - reached)
        print(
            f"\n{len(reached)} of {len(SIDES)} points reached; not: {', '.join(missed) or 'none'}"
        )
    return tally, counts


def main() -> int:
    given = arguments()
    seed = given.seed if given.seed is not None else time.time_ns() & 0xFFFFFFFF
    print(f"seed {seed}: the same again with --seed {seed}", flush=True)
    progress = Progress()
    counts: dict[str, int] = {}
    if given.points:
        tally, counts = all_points(seed, progress)
    elif given.kills:
        tally = many_kills(given.kills, given.gateways, seed, given.dir, progress)
    else:
        if why_not():
            print(f"no store that fails: {why_not()}")
        tally, counts = soak(given.seconds, seed, given.dir, progress)
    print(f"\n{tally.more()}")
    if counts:
        print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    for line in tally.lost[:20]:
        print(f"LOST: {line}")
    print(f"{tally.line()}, in {progress.seconds:.0f} s, seed {seed}")
    return 1 if tally.lost else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: everything was removed")
