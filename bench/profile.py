# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make bench-profile`: the daemon under cProfile while fio reads or writes cached blocks; the top functions.

The profiler slows Python down and C not at all, so shares are skewed towards small functions: use it to find what is
called too often, and the bench to see whether a change helped.
"""

import argparse
import contextlib
import pstats
from pathlib import Path

from bench.bed import make_gateway
from bench.measure import copy_out, fio

from real.processes import MIB, random_image

SIZE = 128 * MIB


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-profile", description=__doc__)
    parser.add_argument("--rw", default="randread")
    parser.add_argument("--bs", default="4k")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--mode", default="write-back")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--lines", type=int, default=25)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        gateway = make_gateway(Path("/dev/shm"), 3 * SIZE)
        stack.callback(gateway.remove)
        profile = gateway.directory / "profile"
        gateway.start(under=("-m", "cProfile", "-o", str(profile)))
        random_image(gateway.images / "p.raw", SIZE, seed=1)
        gateway.attach("p", "p.raw", mode=options.mode)
        copy_out(gateway.uri("p"), SIZE)
        job = {
            "rw": options.rw,
            "bs": options.bs,
            "iodepth": options.depth,
            "numjobs": options.jobs,
        }
        sample = fio([gateway.uri("p")], job, options.seconds, SIZE, gateway.pid)
        gateway.stop()
        print(
            f"{sample.iops or 0:.0f} IOPS, {sample.cpu_us_per_request or 0:.1f} µs CPU per request"
        )
        pstats.Stats(str(profile)).sort_stats("tottime").print_stats(options.lines)


if __name__ == "__main__":
    main()
