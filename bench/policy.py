# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make bench-policy`: the placement against others of the field, and how far off the advice about sizes is.

The placement is the real one (`forebay_cache.slots.placement`), run without data by `forebay_cache.curve.miniature`;
the others are those of libCacheSim, from PyPI. What it prints is in POLICY.md, which `--readme` writes anew.
"""

import argparse
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import trio

from forebay_cache.curve.advisor import FACTORS, Advisor
from forebay_cache.curve.miniature import Miniature
from forebay_cache.slots.placement import Placement
from forebay_cache.slots.samples import HIT, LIMIT, MISS, MISSES, ROOM, USED, VISITS, WHOLE, Samples
from sim import traces

PAGE = Path(__file__).resolve().parent / "POLICY.md"
SIZES = (1, 5, 10, 20)
"""Percent of the footprint: of all blocks that are ever asked for."""
OTHERS = ("LRU", "ARC", "S3FIFO", "Sieve", "LHD")
SHARES = (4, 16, 64)
"""One block in so many is sampled."""
_SEED = 1
_HASH_BITS = 17  # of libCacheSim's table, which else takes 128 MB

Trace = list[int]
"""As in `sim.traces`: a key, or `~key` for a further request of the same reader to that block."""


def _popularity(skew: float) -> Trace:
    dice = Random(_SEED)
    return traces.zipf(dice, dice.sample(range(30_000), 30_000), 150_000, skew)


TRACES: dict[str, Callable[[], Trace]] = {
    "zipf 0.8": lambda: _popularity(0.8),
    "zipf 1.0": lambda: _popularity(1.0),
    "zipf and scans": lambda: traces.zipf_and_scans(_SEED),
    "boot storms": lambda: traces.boot(_SEED, scale=3),
    "boot storms and scans": lambda: traces.boot_and_scan(_SEED, scale=3),
    "the same, one request a block": lambda: traces.boot_and_scan_whole_blocks(_SEED, scale=3),
    "one-hit wonders": lambda: traces.one_hit_wonders(_SEED, blocks=20_000, visits=80_000),
    "shifting set": lambda: traces.shifting(_SEED, working_set=6000, visits=150_000),
    "recency": lambda: traces.recency(_SEED, visits=150_000),
}


class Row(NamedTuple):
    """Hit ratios in percent of visits, by the name of the policy."""

    trace: str
    percent: int
    blocks: int
    hits: dict[str, float]


def footprint(trace: Trace) -> int:
    """How many blocks are ever asked for."""
    return len({request if request >= 0 else ~request for request in trace})


def hit_ratio(ask: Callable[[int], Any], trace: Trace) -> float:
    """The share of visits, in percent, that found their block."""
    visits = hits = 0
    for request in trace:
        if request >= 0:
            visits += 1
            hits += bool(ask(request))
        else:
            ask(~request)
    return 100 * hits / visits


def other(name: str, blocks: int) -> Callable[[int], bool]:
    """A policy of libCacheSim in front of that many blocks."""
    import libcachesim  # noqa: PLC0415 (for this bench only)

    cache = getattr(libcachesim, name)(blocks, hashpower=_HASH_BITS)
    request = libcachesim.Request()
    request.obj_size = 1

    def ask(key: int) -> bool:
        request.obj_id = key
        return bool(cache.get(request))

    return ask


def rows(names: Sequence[str]) -> Iterator[Row]:
    """Every trace at every size, under every policy."""
    for name in names:
        trace = TRACES[name]()
        whole = footprint(trace)
        for percent in SIZES:
            blocks = whole * percent // 100
            hits = {"Forebay": hit_ratio(Miniature(blocks).read, trace)}
            hits |= {policy: hit_ratio(other(policy, blocks), trace) for policy in OTHERS}
            yield Row(name, percent, blocks, hits)


def policy_table(found: Sequence[Row]) -> list[str]:
    """The lines of the table of hit ratios; the best of each row is bold."""
    policies = ("Forebay", *OTHERS)
    lines = [
        f"| trace | cache | blocks | {' | '.join(policies)} | to the best |",
        f"| --- | ---: | ---: |{' ---: |' * (len(policies) + 1)}",
    ]
    for row in found:
        best = max(row.hits.values())
        cells = [_bold(f"{row.hits[name]:.1f}", row.hits[name] > best - 0.05) for name in policies]
        left = row.hits["Forebay"] - max(row.hits[name] for name in OTHERS)
        lines.append(
            f"| {row.trace} | {row.percent} % | {row.blocks} | {' | '.join(cells)} | {left:+.1f} |"
        )
    return lines


def _bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


# ------------------------------------------------------------------------------------- the advice


class Error(NamedTuple):
    """How far off the advice was, in points of hit ratio, at all its sizes."""

    trace: str
    one_in: int
    blocks: int  # of the miniature of the present size
    policy: tuple[float, float]  # mean, largest
    lru: tuple[float, float]
    gap: float  # how far LRU itself is from the policy at most
    cost: float  # microseconds of CPU for a sample


def exact(trace: Trace, sizes: Sequence[int]) -> tuple[list[float], list[float]]:
    """Hit ratios of the placement and of LRU at these sizes."""
    ours = [hit_ratio(Miniature(blocks).read, trace) for blocks in sizes]
    return ours, [hit_ratio(_lru(blocks), trace) for blocks in sizes]


def _lru(blocks: int) -> Callable[[int], bool]:
    there: OrderedDict[int, None] = OrderedDict()

    def ask(key: int) -> bool:
        found = key in there
        there[key] = None
        there.move_to_end(key)
        if len(there) > blocks:
            there.popitem(last=False)
        return found

    return ask


async def advised(trace: Trace, blocks: int, one_in: int) -> tuple[Advisor, float]:
    """What an advisor makes of the trace, and the CPU seconds that it took."""
    pool: Any = SimpleNamespace(samples=Samples(), placement=Placement(blocks), low=0)
    advisor = Advisor(pool, lambda _: False)
    samples, took = pool.samples, 0.0
    samples.head[LIMIT] = WHOLE // one_in
    for n, request in enumerate(trace):
        if request >= 0:
            samples.head[VISITS] += 1
            samples.head[MISSES] += 1
        samples.note(*((request, MISS) if request >= 0 else (~request, HIT)))
        if samples.head[USED] >= ROOM - 1 or n == len(trace) - 1:
            began = time.process_time()
            await advisor.drain()
            took += time.process_time() - began
    return advisor, took


def errors(names: Sequence[str]) -> Iterator[Error]:
    """Every trace, for a cache of a tenth of the footprint, at every share."""
    for name in names:
        trace = TRACES[name]()
        blocks = footprint(trace) // 10
        ours, lru = exact(trace, [round(blocks * factor) for factor in FACTORS])
        gap = max(abs(one - two) for one, two in zip(ours, lru, strict=True))
        for one_in in SHARES:
            advisor, took = trio.run(advised, trace, blocks, one_in)
            told = advisor.report()
            yield Error(
                name,
                one_in,
                round(blocks / one_in),
                _off(told, "hit_ratio", ours),
                _off(told, "lru_hit_ratio", lru),
                gap,
                1e6 * took / max(1, told["sampled_reads"]),
            )


def _off(told: dict[str, Any], key: str, wanted: Sequence[float]) -> tuple[float, float]:
    off = [abs(100 * size[key] - one) for size, one in zip(told["sizes"], wanted, strict=True)]
    return sum(off) / len(off), max(off)


def error_table(found: Sequence[Error]) -> list[str]:
    """The lines of the table of errors."""
    return [
        "| trace | sampled | blocks in small | policy: mean, most | LRU: mean, most | LRU to policy | us a sample |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {one.trace} | 1 in {one.one_in} | {one.blocks} | {one.policy[0]:.1f}, {one.policy[1]:.1f} "
            f"| {one.lru[0]:.1f}, {one.lru[1]:.1f} | {one.gap:.1f} | {one.cost:.0f} |"
            for one in found
        ),
    ]


# --------------------------------------------------------------------------------------- the page


def put(page: str, mark: str, lines: Sequence[str]) -> str:
    """The page with these lines between its comments `<!-- mark -->` and `<!-- end -->`."""
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- end -->)"
    text = "\n".join(lines)
    made, count = re.subn(
        pattern, lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{PAGE.name} has no place marked '{mark}'")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="traces whose names have this")
    parser.add_argument("--readme", action="store_true", help=f"put the tables into {PAGE.name}")
    options = parser.parse_args()
    names = [name for name in TRACES if options.only in name]
    if not names:
        parser.error(f"no trace has '{options.only}' in its name: {', '.join(TRACES)}")
    tables = {
        "policy": policy_table(_told(rows(names))),
        "advice": error_table(_told(errors(names))),
    }
    print("\n\n".join("\n".join(table) for table in tables.values()))
    if options.readme:
        page = PAGE.read_text()
        for mark, lines in tables.items():
            page = put(page, mark, lines)
        PAGE.write_text(page)
    return 0


def _told(found: Iterator[Any]) -> list[Any]:
    """All of them, each on stderr as it comes, for it takes minutes."""
    made = []
    for one in found:
        made.append(one)
        print(*one, file=sys.stderr, flush=True)
    return made


if __name__ == "__main__":
    sys.exit(main())
