# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an image or a disk has of a writer's steps, as one JSON object: see `verdict` in stamps.py."""

import argparse
import json
import os
from pathlib import Path

from lab.guest.disk import Disk
from lab.guest.stamps import BLOCK, survey, verdict


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("where", type=Path, help="an image, a device, or the socket of a disk")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--flushed", type=int, default=0, help="the last step that was flushed")
    parser.add_argument("--asked", type=int, default=1 << 40, help="the last step that was begun")
    parser.add_argument("--skip", type=int, default=0, help="bytes before the first block")
    return parser.parse_args()


def surveyed(where: Path, seed: int, skip: int) -> list[set[int]]:
    if where.is_socket():
        disk = Disk(str(where))
        return survey(disk.read, seed, disk.size // BLOCK)
    with where.open("rb") as file:
        blocks = (file.seek(0, os.SEEK_END) - skip) // BLOCK

        def read(offset: int, length: int) -> bytes:
            file.seek(skip + offset)
            return file.read(length)

        return survey(read, seed, blocks)


def main() -> None:
    given = arguments()
    found = surveyed(given.where, given.seed, given.skip)
    print(json.dumps(verdict(found, given.seed, given.flushed, given.asked)))


if __name__ == "__main__":
    main()
