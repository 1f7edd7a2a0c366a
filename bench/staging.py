# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make bench-stage`: an image goes to gateways on this machine, each held to a rate; then a simulation of many more.

One gateway gives it to one other, which is one transfer; then to HOSTS others at the same rate. Each has a daemon, a
mount and a stager of its own. With `--links` each is a host of a network of its own, at a link that holds a rate up and
down (namespaces and `tc tbf`, as root); else it has a loopback address of its own, and the rate is libtorrent's limit.
What counts is the ratio of the two, and what was read of the store. A machine whose processors are full measures these:
lower the rate until they are not; processor time is printed for that, Forebay's and how much nobody used.
"""

import argparse
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import swarm

from real.links import Links
from real.processes import MIB
from real.staging_bed import StagingHost, hosts, linked

IMAGE = "images:a.raw"
BAR, READ_BAR = 1.6, 1.1
"""The longest of all hosts against one transfer, and bytes read of the store against those of the image."""

COSTS = (5, 10)
"""Milliseconds of a processor for each MiB that a host gets: what is measured, and half of it."""

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Given:
    """What is staged, and how."""

    size: int
    rate: int
    """Bytes a second, by libtorrent's limit; 0: none."""
    links: float
    """Mbit/s of each link; 0: loopback."""


@dataclass(frozen=True)
class Found:
    """What came of it."""

    seconds: list[float]
    """After which each host had it, sorted."""
    read: float
    """Images read of the store."""
    spent: dict[str, float]
    """Seconds of processor time, by what they went to; `idle` are those that nobody used."""
    sent: float | None
    """Images that the one that gives has sent, with all that the network adds; None where nobody knows."""
    bytes: int
    """That all hosts together got."""

    def line(self) -> str:
        """The same for a reader."""
        ours = sum(seconds for what, seconds in self.spent.items() if what != "idle")
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in self.spent.items())
        sent = "" if self.sent is None else f"; the first one sent {self.sent:.2f} images"
        last = self.seconds[-1]
        cost = 1000 * ours / (self.bytes / MIB)
        return (
            f"{len(self.seconds)} hosts: first {self.seconds[0]:.1f} s, last {last:.1f} s; {self.read:.2f} images read "
            f"of the store{sent}; {ours / last:.2f} processors busy with it ({parts} s), "
            f"{cost:.1f} ms for each MiB that a host got"
        )


def processor_seconds(staging: list[StagingHost]) -> dict[str, float]:
    """Of all processes, until now."""
    pids = {
        "daemons": [one.gateway.pid for one in staging],
        "mounts": [one.mount.pid for one in staging if one.mount is not None],
        "stagers": [one.stager.pid for one in staging if one.stager is not None],
    }
    spent = {what: sum(map(_ticks, found)) / TICKS for what, found in pids.items()}
    return spent | {"idle": int(Path("/proc/stat").read_text().split()[4]) / TICKS}


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@contextlib.contextmanager
def _running(
    count: int, given: Given, images: Path
) -> Iterator[tuple[list[StagingHost], Links | None]]:
    cache = {"size": given.size + 128 * MIB}
    if not given.links:
        with hosts(count, images, cache=cache) as staging:
            yield staging, None
        return
    with Links(count, given.links) as links, linked(links, images, cache=cache) as staging:
        yield staging, links


def staged(count: int, given: Given) -> Found:
    """Stage to so many hosts."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        images = Path(folder)
        with (images / "a.raw").open("wb") as file:
            for _ in range(given.size // MIB):
                file.write(os.urandom(MIB))
        with _running(count + 1, given, images) as (staging, links):
            source, *others = staging
            peers = ",".join(one.address for one in staging)
            words = ["--peers", peers, *(["--rate", str(given.rate)] if given.rate else [])]
            made = source.make(IMAGE)  # reads the image once
            source.stage(IMAGE, *words, "--source")
            sent = links.sent(source.address) if links is not None else 0
            before, began = processor_seconds(staging), time.monotonic()
            for one in others:
                one.stage(IMAGE, *words)
            found = _waited(others, began)
            spent = processor_seconds(staging)
            read = made["origin_read_bytes"]
            read += sum(one.told_quickly()["origin_read_bytes"] for one in staging)
            return Found(
                found,
                read / given.size,
                {what: spent[what] - before[what] for what in spent},
                (links.sent(source.address) - sent) / given.size if links is not None else None,
                given.size * count,
            )


def _waited(others: list[StagingHost], began: float) -> list[float]:
    found: dict[str, float] = {}
    while len(found) < len(others):
        for one in others:
            if one.address not in found and one.told_quickly()["state"] == "done":
                found[one.address] = time.monotonic() - began
        time.sleep(0.2)
    return sorted(found.values())


def measured(count: int, given: Given) -> int:
    """Measure and print; 1 where a bar is missed."""
    cores = os.cpu_count()
    print(f"load of this machine: {os.getloadavg()[0]:.1f}, {cores} processors; {given}")
    one, many = staged(1, given), staged(count, given)
    for found in (one, many):
        print(found.line())
    ratio = many.seconds[-1] / one.seconds[-1]
    print(f"last of {count} against one transfer: {ratio:.2f} (bar {BAR})")
    return int(ratio > BAR or max(one.read, many.read) > READ_BAR)


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
    print(
        "\neight hosts on one machine:  processors  ms for a MiB  one  eight  ratio  holds the bar up to"
    )
    for processors, cost in itertools.product((2, 4, 8, 16), COSTS):
        each = cost / 1000 / MIB
        one, many = swarm.on_one_machine(8, processors, each, constants)
        link = swarm.fastest_link(8, processors, each, BAR, constants)
        print(
            f"{processors:39}  {cost:12}  {one:3.0f}  {many:5.0f}  {many / one:5.2f}  {link:4.0f} Mbit/s"
        )


def main() -> int:
    """Measure and print; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="MiB of the image (64)")
    parser.add_argument(
        "--rate", type=float, help="MB/s of each host, by libtorrent's limit (2, with --links 0); 0: no limit"
    )  # fmt: skip
    parser.add_argument("--links", type=float, default=0, help="Mbit/s of each host's link")
    parser.add_argument("--only", choices=("measure", "simulate"))
    given = parser.parse_args()
    rate = (0.0 if given.links else 2.0) if given.rate is None else given.rate
    code = 0
    if given.only != "simulate":
        code = measured(given.hosts, Given(given.size * MIB, int(rate * 1e6), given.links))
    if given.only != "measure":
        simulated()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
