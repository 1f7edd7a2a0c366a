# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an image or a disk has of a writer's steps, as one JSON object: see `verdict` in stamps.py."""

import argparse
import json
from pathlib import Path

from lab.guest.disk import Disk
from lab.guest.stamps import BLOCK, survey, verdict


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
    print(json.dumps(verdict(found, given.seed, given.flushed, given.asked)))


if __name__ == "__main__":
    main()
