# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Kills alone, many of them: several gateways at once, each hunted by a process of its own."""

import multiprocessing
import queue
import random
import time
from collections.abc import Callable, Iterable
from multiprocessing.queues import Queue
from pathlib import Path

from real.kill_checker import Tally
from real.kill_hunt import hunt

News = tuple[int, Tally, bool]
"""Whose, what it counted so far, and whether that was all."""

TOLD_SECONDS = 1.0


def _hunter(number: int, kills: int, seed: int, parent: Path, news: "Queue[News]") -> None:
    tally, last = Tally(), 0.0

    def told(now: Tally) -> None:
        nonlocal last
        if time.monotonic() - last > TOLD_SECONDS:
            last = time.monotonic()
            news.put((number, now, False))

    try:
        hunt(kills, seed, tally, parent=parent, told=told)
    except Exception as fault:  # noqa: BLE001  (told by the parent)
        notes = " ".join(getattr(fault, "__notes__", []))
        tally.lost.append(f"the harness ended: {fault!r:.3000} {notes}")
    news.put((number, tally, True))


def many_kills(
    wanted: int, gateways: int, seed: int, parent: Path, told: Callable[[Tally], None]
) -> Tally:
    """So many kills, divided among gateways. What all of them counted."""
    context = multiprocessing.get_context("spawn")
    news: Queue[News] = context.Queue()
    rng = random.Random(seed)
    shares = [wanted // gateways + (i < wanted % gateways) for i in range(gateways)]
    hunters = [
        context.Process(target=_hunter, args=(i, share, rng.getrandbits(32), parent, news))
        for i, share in enumerate(shares)
    ]
    for hunter in hunters:
        hunter.start()
    tallies: dict[int, Tally] = {}
    at_work = set(range(gateways))
    while at_work:
        try:
            number, tally, over = news.get(timeout=60)
        except queue.Empty:
            for number in [n for n in at_work if not hunters[n].is_alive()]:
                tallies.setdefault(number, Tally()).lost.append("a hunter ended without a word")
                at_work.discard(number)
            continue
        tallies[number] = tally
        if over:
            at_work.discard(number)
        told(_sum(tallies.values()))
    for hunter in hunters:
        hunter.join()
    return _sum(tallies.values())


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total
