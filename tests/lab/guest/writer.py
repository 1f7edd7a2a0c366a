# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Writes step after step of a seed (stamps.py) to a disk or a device, and says what was acknowledged and flushed.

Prints "wrote K", "flushed K" and "error K WHAT ERRNO"; what had an error is asked again until it works, as a VM does
whose QEMU was told to pause and go on. SIGTERM ends it between two requests.
"""

import argparse
import errno
import signal
import sys
import time
from collections.abc import Callable
from functools import partial

from lab.guest.device import opened
from lab.guest.stamps import BLOCK, content, place


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("where", help="the socket of a disk, a block device or a file")
    parser.add_argument("--buffered", action="store_true", help="a file by way of the page cache")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, default=1, help="the first step")
    parser.add_argument("--steps", type=int, default=1 << 40, help="how many")
    parser.add_argument("--flush-every", type=int, default=4, help="steps from flush to flush")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between steps")
    return parser.parse_args()


def insist(step: int, what: str, ask: Callable[[], object]) -> None:
    """Ask until it works, and print each error."""
    while True:
        try:
            ask()
            return
        except OSError as error:
            print("error", step, what, errno.errorcode.get(error.errno or 0, "?"), flush=True)
            time.sleep(0.5)


def main() -> None:
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    disk = opened(given.where, buffered=given.buffered)
    insist(0, "connect", disk.connect)
    blocks = disk.size // BLOCK
    for step in range(given.first, given.first + given.steps):
        first, count = place(given.seed, step, blocks)
        data = content(given.seed, step, first, count)
        insist(step, "write", partial(disk.write, data, first * BLOCK))
        print("wrote", step, flush=True)
        if step % given.flush_every == 0:
            insist(step, "flush", disk.flush)
            print("flushed", step, flush=True)
        time.sleep(given.pause)


if __name__ == "__main__":
    main()
