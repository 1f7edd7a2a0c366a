# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an image or a disk has of a writer's steps (stamps.py), as one JSON object.

`lost`: blocks that are older than what was flushed. `future`: newer than what was asked for. `foreign`: with something
else in them. `torn`: sectors of more than one step. `instant`: the newest step; `unfit`: blocks that are not as they
were right after that step.
"""

import argparse
import json
from pathlib import Path

from lab.guest.disk import Disk
from lab.guest.stamps import BLOCK, newest, survey


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("where", type=Path, help="an image, or the socket of a disk")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--flushed", type=int, default=0, help="the last step that was flushed")
    parser.add_argument("--asked", type=int, default=1 << 40, help="the last step that was begun")
    return parser.parse_args()


def surveyed(where: Path, seed: int) -> list[set[int]]:
    if where.is_socket():
        disk = Disk(str(where))
        return survey(disk.read, seed, disk.size // BLOCK)
    with where.open("rb") as file:
        blocks = where.stat().st_size // BLOCK

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        return survey(read, seed, blocks)


def main() -> None:
    given = arguments()
    found = surveyed(given.where, given.seed)
    want = newest(given.seed, given.flushed, len(found))
    instant = max((max(steps) for steps in found), default=0)
    fit = newest(given.seed, max(instant, 0), len(found))
    lost = [block for block, steps in enumerate(found) if want[block] > min(steps)]
    print(
        json.dumps(
            {
                "lost": len(lost),
                "examples": [(block, sorted(found[block]), want[block]) for block in lost[:4]],
                "future": sum(max(steps) > given.asked for steps in found),
                "foreign": sum(-1 in steps for steps in found),
                "torn": sum(len(steps) > 1 for steps in found),
                "instant": max(instant, 0),
                "unfit": sum(steps != {fit[block]} for block, steps in enumerate(found)),
            }
        )
    )


if __name__ == "__main__":
    main()
