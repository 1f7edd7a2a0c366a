# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make bench-boot`: boots from a store of 1 Gbit/s that is half a millisecond away.

A real Linux under QEMU, alone; the reads that it was recorded to make, by many guests at once; several hosts, simulated
from what was measured. bench/README.md says how, and has what the last run kept.
"""

import argparse
import datetime as dt
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.boot import recording
from bench.boot.forebay import COLD, REPLAY, WARM
from bench.boot.guests import boot_each_way, record
from bench.boot.hosts import SITE, Answer, Site, alone, cached, copied, simulate
from bench.boot.linux import build
from bench.boot.recording import BLOCK, Recording
from bench.boot.report import Kept, Section, fill_page, keep, load, markdown
from bench.boot.rows import Row
from bench.boot.store import RATE
from bench.boot.storms import COPY, Storms

from lab.outcome import Failure, Lacking

IMAGE_BYTES = 1 << 30
FASTER = 8.0
"""QEMU without KVM takes about so many times what a processor takes for a boot."""
TOOLS = ("nbdkit", "nbdcopy", "qemu-img", "qemu-nbd")
PARTS = ("guest", "storm", "fast", "peers", "hosts")
SITES = (100, 200)
"""Guests on the hosts that are simulated: as many as BonFIRE booted on four of them."""

Note = Callable[[Row], None]


class Run:
    """One run: what it measures goes to `kept`, in place of what an earlier one measured."""

    def __init__(self, kept: Kept, directory: Path, storms: list[int], parts: list[str]) -> None:
        self._kept = kept
        self._directory = directory
        self._storms = storms
        self._parts = parts

    def guest(self) -> None:
        """A real guest in each way."""
        rows: list[Row] = []
        try:
            guest = build(told)
            boot_each_way(guest, self._directory, noting(rows))
        except Lacking as lacking:
            told(f"no real guest: {lacking}")
            return
        self._keep("guest", rows, recording.load())

    def storm(self, key: str, boot: Recording) -> None:
        """Storms of a recording, on Forebay and on others."""
        rows: list[Row] = []
        storms, note = Storms(self._directory, boot, IMAGE_BYTES), noting(rows)
        storms.from_the_store(note)
        storms.on_forebay(self._storms, note)
        storms.from_copies(self._storms, note)
        if "peers" in self._parts:
            storms.on_peers(self._storms, note)
        self._keep(key, rows, boot)

    def hosts(self, key: str, measured: str, boot: Recording) -> None:
        """Several hosts, with what a request costs the daemon by the storms that were measured."""
        section = self._kept.sections.get(measured)
        if section is None:
            told(f"no hosts are simulated without storms: --only {measured},hosts")
            return
        costs = {what: cost_of(section, what, len(boot.reads)) for what in (COLD, REPLAY, WARM)}
        rows: list[Row] = []
        note = noting(rows)
        for vms in SITES:
            note(self._simulated(COPY, vms, boot, copied, 0.0, copy_bytes=IMAGE_BYTES))
            note(self._simulated("from the store", vms, boot, alone, 0.0))
            for what in (COLD, REPLAY):
                note(self._simulated(what, vms, boot, None, costs[what], replays=what == REPLAY))
        self._keep(key, rows, boot)
        if measured == "storm":
            self._check(section, costs, boot)

    def _check(self, section: Section, costs: dict[str, float], boot: Recording) -> None:
        rows: list[Row] = []
        for what, cost in costs.items():
            for row in (row for row in section.rows if row.what == what and row.vms > 1):
                site = (1, RATE, RATE)
                found = self._simulated(
                    what, row.vms, boot, None, cost, site, replays=what == REPLAY
                )
                found.what += f"; measured: {row.seconds:.1f}"
                if what != WARM:
                    rows.append(found)
        self._keep("check", rows, boot)

    def _simulated(
        self,
        what: str,
        vms: int,
        boot: Recording,
        answer: Answer | None,
        cost: float,
        links: tuple[int, float, float] = SITE,
        *,
        replays: bool = False,
        copy_bytes: int = 0,
    ) -> Row:
        site = Site(*links, cost)
        found = simulate(
            site, vms, boot, answer or cached(site), replays=replays, copy_bytes=copy_bytes
        )
        return Row(what, vms, found.seconds, found.median, found.store_bytes, is_computed=True)

    def _keep(self, key: str, rows: list[Row], boot: Recording) -> None:
        today, load_average = dt.datetime.now(dt.UTC).date(), os.getloadavg()[0]
        system = f"Linux {platform.release().partition('-')[0]}"
        distinct = len(boot.blocks) * BLOCK
        conditions = (
            f"{today}; {os.cpu_count()} processors, load {load_average:.0f}, {system};\n"
            f"one boot: {len(boot.reads)} requests, {boot.bytes / 1e6:.0f} MB, "
            f"{distinct / 1e6:.0f} MB of blocks, {boot.seconds:.1f} s that waits for nothing."
        )
        self._kept.sections[key] = Section(rows, conditions, distinct)
        keep(self._kept)


def cost_of(section: Section, what: str, requests: int) -> float:
    """CPU seconds of the daemon for a request, by the largest storm of one way. 0 where none was measured."""
    rows = [row for row in section.rows if row.what == what and row.daemon_cpu is not None]
    largest = max(rows, key=lambda row: row.vms, default=None)
    return (largest.daemon_cpu or 0.0) / largest.vms / requests if largest else 0.0


def told(text: str) -> None:
    print(text, flush=True)


def noting(rows: list[Row]) -> Note:
    """Keeps a row, and says it."""

    def note(row: Row) -> None:
        rows.append(row)
        told(f"{row.vms:4} {row.what}: {row.seconds:.1f} s")

    return note


def sizes(text: str) -> list[int]:
    """Of storms, from a list of numbers. Raises ValueError."""
    found = [int(word) for word in text.split(",")]
    if not all(0 < number <= 500 for number in found):
        raise ValueError(text)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-boot", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument(
        "--storms",
        type=sizes,
        default=[1, 25, 50, 100, 200],
        help="guests at once (1,25,50,100,200)",
    )
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where all lies")
    parser.add_argument("--record", action="store_true", help="record the real guest's boot anew")
    parser.add_argument("--readme", action="store_true", help="put the kept result into the page")
    options = parser.parse_args()
    parts = options.only.split(",")
    if wrong := set(parts) - set(PARTS):
        parser.error(f"--only {','.join(sorted(wrong))}: there are {', '.join(PARTS)}")
    kept = load()
    if options.readme:
        fill_page(kept)
        return 0
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        parser.error(f"not installed: {' '.join(missing)}: `make setup` installs them")
    if not options.dir.is_dir():
        parser.error(f"--dir {options.dir}: there is no such directory")
    signal.signal(
        signal.SIGTERM, lambda _number, _frame: sys.exit(143)
    )  # what it started ends, too
    with tempfile.TemporaryDirectory(prefix="fbb-", dir=options.dir) as directory:
        try:
            if options.record:
                recording.save(record(build(told), Path(directory)), recording.KEPT)
            run(Run(kept, Path(directory), options.storms, parts), parts)
        except (Failure, Lacking) as error:
            print(f"bench-boot: {error}", file=sys.stderr)
            return 1
    told(markdown(kept))
    return 0


def run(one: Run, parts: list[str]) -> None:
    boot = recording.load()
    fast = boot.faster(FASTER)
    if "guest" in parts:
        one.guest()
    if "storm" in parts:
        one.storm("storm", boot)
    if "fast" in parts:
        one.storm("fast", fast)
    if "hosts" in parts:
        one.hosts("hosts", "storm", boot)
        one.hosts("hosts-fast", "fast", fast)


if __name__ == "__main__":
    sys.exit(main())
