# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Pieces of a mebibyte, each of one byte's value: written to a disk, flushed, looked for on the disk or in the image.

Prints "wrote N", "flushed", "error WHAT ERRNO", "missing N"; exit code 1 if there was an error or something is missing.
"""

import argparse
import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lab.guest.disk import Disk

SIZE = 1 << 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("where", type=Path, help="the socket of a disk, or an image to look at")
    parser.add_argument("actions", nargs="+", choices=("write", "flush", "look"))
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--only", default="", help="numbers of pieces, or none")
    return parser.parse_args()


def piece(number: int) -> bytes:
    """What piece `number` holds."""
    return bytes([0xA0 + number]) * SIZE


def tried(what: str, ask: Callable[[], object], done: str) -> bool:
    """Ask, and print how it went."""
    try:
        ask()
    except OSError as error:
        print("error", what, errno.errorcode.get(error.errno or 0, "?"), flush=True)
        return False
    print(done, flush=True)
    return True


def read(where: Path, offset: int) -> bytes:
    if where.is_socket():
        return Disk(str(where)).read(offset, SIZE)
    with where.open("rb") as file:
        file.seek(offset)
        return file.read(SIZE)


def look(where: Path, numbers: list[int]) -> bool:
    missing = [number for number in numbers if read(where, number * SIZE) != piece(number)]
    for number in missing:
        print("missing", number)
    return not missing


def main() -> int:
    given = arguments()
    if given.only:
        numbers = [] if given.only == "none" else [int(word) for word in given.only.split(",")]
    else:
        numbers = list(range(given.pieces))
    good = True
    disk = Disk(str(given.where))
    for action in given.actions:
        if action == "write":
            for number in numbers:
                write = partial(disk.write, piece(number), number * SIZE)
                good &= tried(f"write {number}", write, f"wrote {number}")
        elif action == "flush":
            good &= tried("flush", disk.flush, "flushed")
        else:
            good &= look(given.where, numbers)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
