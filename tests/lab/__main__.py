# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make lab`: what only a real NFS server, its client and systemd show, on emulated machines."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lab.build import build
from lab.case import Case, chosen
from lab.cases import (
    cache_volume,
    comparison,
    full_store,
    hung_server,
    lost_locks,
    mounts,
    moving,
    no_holes,
    power_cut,
    service,
    slow_device,
    smoke,
    squashed_root,
    store_faults,
    two_hosts,
)
from lab.debian import install_needed
from lab.machine import Parts
from lab.outcome import Failure, Lacking
from lab.place import ready, switched_on
from lab.steps import ROOT

CASES: list[Case] = [
    *smoke.CASES,
    *squashed_root.CASES,
    *full_store.CASES,
    *no_holes.CASES,
    *lost_locks.CASES,
    *hung_server.CASES,
    *slow_device.CASES,
    *two_hosts.CASES,
    *moving.CASES,
    *mounts.CASES,
    *store_faults.CASES,
    *cache_volume.CASES,
    *power_cut.CASES,
    *service.CASES,
    *comparison.CASES,
]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make lab", description=__doc__)
    parser.add_argument("cases", nargs="*", help="words of cases' names, or 'all' (the short form)")
    parser.add_argument("--list", action="store_true", help="say which cases there are")
    parser.add_argument("--seconds", type=float, help="begin no case after so long")
    parser.add_argument("--rounds", type=int, default=1, help="do it all so often (1)")
    parser.add_argument(
        "--place",
        type=Path,
        default=Path(os.environ.get("LAB_DIR", ROOT / ".lab" / "lab")),
        help="where images and logs are kept (LAB_DIR, or .lab/lab)",
    )
    return parser.parse_args(words)


def told(text: str) -> None:
    print(text, flush=True)


def tried(case: Case, parts: Parts, saved: Path, place: Path) -> bool:
    """Try one case on machines of its own, and say in a line how it went."""
    began = time.monotonic()
    with switched_on(parts, place / "work", saved) as lab:
        try:
            more = case.does(lab)
        except Failure as failure:
            logs = place / "logs" / case.name.replace(" ", "-").replace("%", "").replace(",", "")
            lab.keep_logs(logs)
            told(
                f"FAIL {case.name} ({time.monotonic() - began:.0f} s): {failure}\n     logs: {logs}"
            )
            return False
    told(f"ok   {case.name} ({time.monotonic() - began:.0f} s){f': {more}' if more else ''}")
    return True


def run(given: argparse.Namespace) -> int:
    """All chosen cases; how many of them failed."""
    began = time.monotonic()
    cases = chosen(CASES, given.cases)
    place = given.place.resolve()
    install_needed(told)
    parts, builder = build(place, told)
    saved = ready(parts, builder)
    told(f"{len(cases)} cases, machines ready after {time.monotonic() - began:.0f} s")
    failed = left = done = 0
    for case in cases * given.rounds:
        if given.seconds is not None and time.monotonic() - began > given.seconds:
            told(f"left out: {case.name}")
            left += 1
        else:
            done += 1
            failed += not tried(case, parts, saved, place)
    total = (
        f"{done - failed} of {done} hold, {left} left out"
        if left
        else f"{done - failed} of {done} hold"
    )
    told(f"make lab: {total}, {time.monotonic() - began:.0f} s")
    return failed


def main() -> int:
    given = arguments()
    if given.list:
        for case in CASES:
            told(f"{case.name}{'' if case.short else '    (LAB=all)'}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return 1 if run(given) else 0
    except Lacking as reason:
        told(f"make lab: skipped: {reason}")
        return 0
    except Failure as failure:
        told(f"make lab: no machines: {failure}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
