# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How long cached reads of a disk take: reads all of it, then 4 KiB at random places, one after the other.

Prints JSON: how many there were, and milliseconds: the median, the 99th percentile and the longest.
"""

import argparse
import json
import random
import time

from lab.guest.disk import LONGEST, Disk

LENGTH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket")
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    disk, dice = Disk(given.socket), random.Random(1)
    for offset in range(0, disk.size, LONGEST):
        disk.read(offset, LONGEST)
    taken: list[float] = []
    ends = time.monotonic() + given.seconds
    while time.monotonic() < ends:
        offset = dice.randrange(disk.size // LENGTH) * LENGTH
        began = time.perf_counter()
        disk.read(offset, LENGTH)
        taken.append((time.perf_counter() - began) * 1000)
    taken.sort()
    found = {"p50": taken[len(taken) // 2], "p99": taken[len(taken) * 99 // 100], "max": taken[-1]}
    print(json.dumps({"reads": len(taken), **found}))


if __name__ == "__main__":
    main()
