# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make bench-stage`: an image goes to gateways on this machine, each held to a rate; then a simulation of many more.

One gateway gives it to one other, which is one transfer; then to HOSTS others at the same rate. Each has a daemon, a
mount and a stager of its own, at a loopback address of its own; the rate is libtorrent's own limit, up and down. What
counts is the ratio of the two, and what was read of the store. A machine whose processors are full measures these:
lower the rate until they are not, the seconds of processor time are printed for that.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from bench import swarm

from real.processes import MIB
from real.staging_bed import StagingHost, hosts

IMAGE = "images:a.raw"
BAR, READ_BAR = 1.6, 1.1
"""The longest of all hosts against one transfer, and bytes read of the store against those of the image."""


def processor_seconds(staging: list[StagingHost]) -> float:
    """Of all processes, until now."""
    pids = [one.gateway.pid for one in staging]
    pids += [one.mount.pid for one in staging if one.mount is not None]
    pids += [one.stager.pid for one in staging if one.stager is not None]
    return sum(_ticks(pid) for pid in pids) / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def staged(count: int, size: int, rate: int, cache: int) -> tuple[list[float], float, float]:
    """Seconds of each of so many hosts; what was read of the store, in images; processor seconds."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        images = Path(folder)
        with (images / "a.raw").open("wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
        with hosts(count + 1, images, cache={"size": cache}) as staging:
            source, *others = staging
            peers = ",".join(one.address for one in staging)
            words = ["--peers", peers, *(["--rate", str(rate)] if rate else [])]
            made = source.make(IMAGE)  # reads the image once
            source.stage(IMAGE, *words, "--source")
            before, began = processor_seconds(staging), time.monotonic()
            for one in others:
                one.stage(IMAGE, *words)
            found = _waited(others, began)
            spent = processor_seconds(staging) - before
            read = made["origin_read_bytes"]
            read += sum(one.told_quickly()["origin_read_bytes"] for one in staging)
            return found, read / size, spent


def _waited(others: list[StagingHost], began: float) -> list[float]:
    found: dict[str, float] = {}
    while len(found) < len(others):
        for one in others:
            if one.address not in found and one.told_quickly()["state"] == "done":
                found[one.address] = time.monotonic() - began
        time.sleep(0.2)
    return sorted(found.values())


def simulated() -> None:
    """Print the table of the simulation."""
    constants = swarm.Constants()
    print(f"\nsimulated: {constants}")
    print(f"{'hosts':>6}  {'way':10}  {'50 %':>7}  {'95 %':>7}  {'100 %':>7}   seconds")
    for count in (8, 100, 500, 1000, 10_000):
        ways = {
            "swarm": swarm.swarm(count, constants),
            "scp-wave": swarm.scp_wave(count, constants),
            "one store": swarm.one_store(count, constants),
        }
        for way, times in ways.items():
            half, most, all_of_them = swarm.shares(times)
            print(f"{count:6}  {way:10}  {half:7.0f}  {most:7.0f}  {all_of_them:7.0f}")


def main() -> int:
    """Measure and print; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="MiB of the image (64)")
    parser.add_argument(
        "--rate", type=float, default=2.0, help="MB/s of each host (2); 0: no limit"
    )
    parser.add_argument("--only", choices=("measure", "simulate"))
    given = parser.parse_args()
    code = 0
    if given.only != "simulate":
        size, rate = given.size * MIB, int(given.rate * 1e6)
        print(f"load of this machine: {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
        results = {}
        for count in (1, given.hosts):
            found, read, spent = staged(count, size, rate, size + 128 * MIB)
            results[count] = found[-1]
            share = spent / found[-1]
            print(
                f"{count} hosts: first {found[0]:.1f} s, last {found[-1]:.1f} s; {read:.2f} images read of the store; "
                f"{spent:.1f} s of processor, {share:.2f} at a time"
            )
            code |= read > READ_BAR
        ratio = results[given.hosts] / results[1]
        print(f"last of {given.hosts} against one transfer: {ratio:.2f} (bar {BAR})")
        code |= ratio > BAR
    if given.only != "measure":
        simulated()
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
