# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How many requests of 4 KiB a device or a file does in a second, one after the other. Prints that number.

`read` reads one of each of so many pieces of 64 KiB, in a random order, so that none of them is brought in by another;
the same ones whenever it is called with the same seed. `write` and `sync` write at random places for so many seconds,
`sync` with a flush after each.
"""

import argparse
import os
import random
import time

from lab.guest.device import Device

LENGTH, PIECE = 4096, 1 << 16


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("what", choices=("read", "write", "sync"))
    parser.add_argument("--buffered", action="store_true", help="by way of the page cache")
    parser.add_argument("--count", type=int, default=200, help="reads")
    parser.add_argument("--rounds", type=int, default=1, help="all reads so often; the last counts")
    parser.add_argument("--seconds", type=float, default=10.0, help="of writing")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def reads(device: Device, given: argparse.Namespace) -> float:
    """Reads in a second, in the last round."""
    dice = random.Random(given.seed)
    pieces = dice.sample(range(device.size // PIECE), given.count)
    places = [piece * PIECE + dice.randrange(PIECE // LENGTH) * LENGTH for piece in pieces]
    os.posix_fadvise(device.fd, 0, 0, os.POSIX_FADV_RANDOM)
    began = 0.0
    for _ in range(given.rounds):
        began = time.monotonic()
        for place in places:
            device.read(place, LENGTH)
    return len(places) / (time.monotonic() - began)


def writes(device: Device, given: argparse.Namespace) -> float:
    """Writes in a second."""
    dice = random.Random(given.seed)
    data = dice.randbytes(LENGTH)
    done, began = 0, time.monotonic()
    while (took := time.monotonic() - began) < given.seconds:
        device.write(data, dice.randrange(device.size // LENGTH) * LENGTH)
        if given.what == "sync":
            device.flush()
        done += 1
    return done / took


def main() -> None:
    given = arguments()
    with Device(given.path, buffered=given.buffered) as device:
        print(reads(device, given) if given.what == "read" else writes(device, given))


if __name__ == "__main__":
    main()
