# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make bench-doors`: one image through every door, on one machine: throughput, and CPU time for each megabyte.

The NBD disk on its socket, its file in the FUSE mount, nbdfuse on the same disk, sshfs with two ciphers over loopback,
and the plain file. Rounds are interleaved; CPU time is that of all processes that took part, fio included.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.bed import room
from bench.doors_bed import CACHE, Door, doors, missing
from bench.doors_report import ROWS, Results, Row, Sample, fill_readme, keep, load, text
from bench.measure import cpu_seconds
from bench.report import PAGE

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
LEAST_DEPTH = 4
"""Of the NBD engine, which has no kernel that reads ahead for it: as many requests as the mounts have out."""
COPIES = 3 + CACHE
"""How many images' worth of room it takes at most: two images, the cache, and air."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-doors", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, 256 MiB")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one timed measurement (2)")
    parser.add_argument("--size", type=int, default=512, help="of the image, MiB (512)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose key contains TEXT")
    parser.add_argument("--doors", default="", metavar="A,B", help="doors whose name contains one")
    parser.add_argument("--dir", type=Path, help="where all lies (/dev/shm if it has room)")
    parser.add_argument("--report", action="store_true", help="no run: print the kept result again")
    parser.add_argument(
        "--readme", action="store_true", help="put the kept result into bench/README.md"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.size, options.seconds = 3, 256, 1.0
    shared = Path("/dev/shm")
    if options.dir is None:
        fits = shared.is_dir() and room(shared) > COPIES * options.size * MIB
        options.dir = shared if fits else Path("/var/tmp")
    return options


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(door: Door, row: Row, size: int, seconds: float) -> Sample:
    """Do the row's work once. Raises RuntimeError with fio's output."""
    job = {
        "name": "doors",
        "size": size,
        "allow_file_create": 0,
        "randrepeat": 0,
        "norandommap": 1,
        "group_reporting": 1,
        **row.job,
        **door.job,
    }
    if row.timed:
        job |= {"time_based": 1, "runtime": f"{seconds * 1000:.0f}ms"}
    if door.job.get("ioengine") == "nbd":
        job["iodepth"] = max(LEAST_DEPTH, int(job.get("iodepth", 1)))
    command = ["fio", "--output-format=json", *(f"--{key}={value}" for key, value in job.items())]
    before = {pid: cpu_seconds(pid) for pid in door.pids()}
    fio_before = _cpu_of_ended_children()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "{" not in done.stdout:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    used = _cpu_of_ended_children() - fio_before
    used += sum(cpu_seconds(pid) - was for pid, was in before.items())
    [result] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    moved = sum(result[side]["io_bytes"] for side in ("read", "write"))
    # the job's whole run, with the fsync at its end; of several jobs fio adds them up
    taken = result["job_runtime"] / 1000 / int(job.get("numjobs", 1))
    return Sample(round(moved / taken / 1e6, 1), round(used * 1000 / (moved / 1e6), 4))


def _cpu_of_ended_children() -> float:
    """Seconds, user and system."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(options: argparse.Namespace, ways: Sequence[Door]) -> dict[str, dict[str, list[Sample]]]:
    """Each row with each door once in every round; every round begins with another door."""
    rows = [row for row in ROWS if options.only in row.key]
    samples: dict[str, dict[str, list[Sample]]] = {
        row.key: {door.name: [] for door in ways} for row in rows
    }
    for number in range(options.rounds):
        first = number % len(ways)
        for row in rows:
            for door in (*ways[first:], *ways[:first]):
                sample = measure(door, row, options.size * MIB, options.seconds)
                samples[row.key][door.name].append(sample)
                if row.writes:
                    door.settle()
                figures = f"{sample.rate:6.0f} MB/s  {sample.cpu:6.2f} ms CPU/MB"
                place = f"{number + 1}/{options.rounds}  {row.key:12}"
                print(f"  {place} {door.name:24} {figures}", flush=True)
    return samples


def conditions(options: argparse.Namespace) -> dict[str, str]:
    """What a reader needs to judge the figures."""
    kind = _first_line("stat", "--file-system", "--format=%T", str(options.dir))
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "forebay": _first_line("git", "-C", str(HERE), "rev-parse", "--short", "HEAD"),
        "machine": f"{os.cpu_count()} CPUs shared by client and servers, Linux {platform.release().partition('-')[0]}",
        "versions": ", ".join(map(_version, ("fio", "nbdfuse", "sshfs"))),
        "image": f"{options.size} MiB of random data on {options.dir} ({kind})",
        "rounds": f"{options.rounds} interleaved rounds",
    }


def _version(program: str) -> str:
    """The line in which it names itself: sshfs lets fusermount3 speak first."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    named = [line for line in done.stdout.splitlines() if line.lower().startswith(program)]
    return named[0] if named else f"{program} unknown"


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0]


def main() -> int:
    options = arguments()
    kept = HERE / "results" / f"{'quick-' if options.quick else ''}doors.json"
    if options.report or options.readme:
        results = load(kept)
        print(text(results))
        if options.readme:
            fill_readme(PAGE, results)
        return 0
    if lacking := missing():
        print(f"not installed: {', '.join(lacking)}", file=sys.stderr)
        return 1
    wanted = options.doors.split(",")
    with contextlib.ExitStack() as stack:
        ways = list(doors(stack, options.dir, options.size * MIB))
        chosen = [door for door in ways if any(word in door.name for word in wanted)]
        samples = run(options, chosen)
    results = Results(conditions(options), samples)
    print("\n" + text(results))
    if options.only or options.doors:
        print("\nnot kept: a run of some rows or some doors is no result")
        return 0
    keep(results, kept)
    print(f"\nkept in {kept.relative_to(HERE.parent)}, with the same name .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
