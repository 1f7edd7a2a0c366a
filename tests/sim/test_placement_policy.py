# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The placement policy against others on the traces of sim/traces.py, every trace from a fixed seed.

The other policies are written here from their papers, in the plainest form that is right.
`python -m sim.test_placement_policy` (with `tests` on the path) prints the table of cache/PLACEMENT.md.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import pytest

from forebay_cache.curve.miniature import Miniature
from sim import traces


class Policy(Protocol):
    """A cache of so many blocks."""

    def __init__(self, size: int) -> None: ...

    def visit(self, key: int) -> bool:
        """Ask for a block, which is in the cache afterwards; whether it was before."""
        ...


class Forebay:
    """Our placement."""

    def __init__(self, size: int) -> None:
        self.blocks = Miniature(size)

    def visit(self, key: int) -> bool:
        return self.blocks.read(key)


class Lru:
    def __init__(self, size: int) -> None:
        self.size = size
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def visit(self, key: int) -> bool:
        if key in self.blocks:
            self.blocks.move_to_end(key)
            return True
        if len(self.blocks) >= self.size:
            self.blocks.popitem(last=False)
        self.blocks[key] = None
        return False


class Fifo:
    def __init__(self, size: int) -> None:
        self.size = size
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def visit(self, key: int) -> bool:
        if key in self.blocks:
            return True
        if len(self.blocks) >= self.size:
            self.blocks.popitem(last=False)
        self.blocks[key] = None
        return False


class Clock:
    """FIFO with a second chance for what was touched."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.blocks: OrderedDict[int, bool] = OrderedDict()

    def visit(self, key: int) -> bool:
        if key in self.blocks:
            self.blocks[key] = True
            return True
        if len(self.blocks) >= self.size:
            while (oldest := self.blocks.popitem(last=False))[1]:
                self.blocks[oldest[0]] = False
        self.blocks[key] = False
        return False


class Sieve:
    """SIEVE (Zhang and others, NSDI 2024): the hand stays where it is, new blocks come in at the head."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.visited: dict[int, bool] = {}
        self.newer: dict[int, int] = {}
        self.older: dict[int, int] = {}
        self.head = self.tail = self.hand = -1

    def visit(self, key: int) -> bool:
        if key in self.visited:
            self.visited[key] = True
            return True
        if len(self.visited) >= self.size:
            self._evict()
        self.newer[key], self.older[key] = -1, self.head
        if self.head >= 0:
            self.newer[self.head] = key
        else:
            self.tail = key
        self.head = key
        self.visited[key] = False
        return False

    def _evict(self) -> None:
        key = self.hand if self.hand >= 0 else self.tail
        while self.visited[key]:
            self.visited[key] = False
            key = self.newer[key] if self.newer[key] >= 0 else self.tail
        newer, older = self.newer.pop(key), self.older.pop(key)
        self.hand = newer
        if newer >= 0:
            self.older[newer] = older
        else:
            self.head = older
        if older >= 0:
            self.newer[older] = newer
        else:
            self.tail = newer
        del self.visited[key]


class TwoQueues:
    """2Q (Johnson and Shasha, VLDB 1994) with a quarter for A1in and ghosts for half of the cache."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fresh: OrderedDict[int, None] = OrderedDict()
        self.ghosts: OrderedDict[int, None] = OrderedDict()
        self.main: OrderedDict[int, None] = OrderedDict()

    def visit(self, key: int) -> bool:
        if key in self.main:
            self.main.move_to_end(key)
            return True
        if key in self.fresh:
            return True
        if len(self.fresh) + len(self.main) >= self.size:
            self._evict()
        if key in self.ghosts:
            del self.ghosts[key]
            self.main[key] = None
        else:
            self.fresh[key] = None
        return False

    def _evict(self) -> None:
        if len(self.fresh) > self.size // 4 or not self.main:
            self.ghosts[self.fresh.popitem(last=False)[0]] = None
            if len(self.ghosts) > self.size // 2:
                self.ghosts.popitem(last=False)
        else:
            self.main.popitem(last=False)


class Arc:
    """ARC (Megiddo and Modha, FAST 2003)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.target = 0
        self.once: OrderedDict[int, None] = OrderedDict()
        self.twice: OrderedDict[int, None] = OrderedDict()
        self.once_ghosts: OrderedDict[int, None] = OrderedDict()
        self.twice_ghosts: OrderedDict[int, None] = OrderedDict()

    def visit(self, key: int) -> bool:
        if key in self.once or key in self.twice:
            self.once.pop(key, None)
            self.twice[key] = None
            self.twice.move_to_end(key)
            return True
        if key in self.once_ghosts or key in self.twice_ghosts:
            self._remembered(key)
        else:
            self._new(key)
        return False

    def _remembered(self, key: int) -> None:
        once, twice = len(self.once_ghosts), len(self.twice_ghosts)
        if key in self.once_ghosts:
            self.target = min(self.size, self.target + max(1, twice // once))
            self._replace(in_twice_ghosts=False)
            del self.once_ghosts[key]
        else:
            self.target = max(0, self.target - max(1, once // twice))
            self._replace(in_twice_ghosts=True)
            del self.twice_ghosts[key]
        self.twice[key] = None

    def _new(self, key: int) -> None:
        if len(self.once) + len(self.once_ghosts) == self.size:
            if len(self.once) < self.size:
                self.once_ghosts.popitem(last=False)
                self._replace(in_twice_ghosts=False)
            else:
                self.once.popitem(last=False)
        elif (
            total := len(self.once)
            + len(self.twice)
            + len(self.once_ghosts)
            + len(self.twice_ghosts)
        ) >= self.size:
            if total == 2 * self.size:
                self.twice_ghosts.popitem(last=False)
            self._replace(in_twice_ghosts=False)
        self.once[key] = None

    def _replace(self, *, in_twice_ghosts: bool) -> None:
        held = len(self.once)
        if held and (held > self.target or (in_twice_ghosts and held == self.target)):
            self.once_ghosts[self.once.popitem(last=False)[0]] = None
        elif self.twice:
            self.twice_ghosts[self.twice.popitem(last=False)[0]] = None
        else:
            self.once_ghosts[self.once.popitem(last=False)[0]] = None


class S3Fifo:
    """S3-FIFO (Yang and others, SOSP 2023): a tenth for the small queue, ghosts for nine tenths."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.ghosts: OrderedDict[int, None] = OrderedDict()
        self.uses: dict[int, int] = {}

    def visit(self, key: int) -> bool:
        if key in self.uses:
            self.uses[key] = min(3, self.uses[key] + 1)
            return True
        while len(self.uses) >= self.size:
            self._evict()
        if key in self.ghosts:
            del self.ghosts[key]
            self.main.appendleft(key)
        else:
            self.small.appendleft(key)
        self.uses[key] = 0
        return False

    def _evict(self) -> None:
        if len(self.small) > self.size // 10 or not self.main:
            key = self.small.pop()
            if self.uses[key] > 1:
                self.uses[key] = 0
                self.main.appendleft(key)
                return
            self.ghosts[key] = None
            if len(self.ghosts) > self.size * 9 // 10:
                self.ghosts.popitem(last=False)
        else:
            key = self.main.pop()
            if self.uses[key]:
                self.uses[key] -= 1
                self.main.appendleft(key)
                return
        del self.uses[key]


POLICIES: dict[str, type[Policy]] = {
    "Forebay": Forebay,
    "LRU": Lru,
    "FIFO": Fifo,
    "CLOCK": Clock,
    "SIEVE": Sieve,
    "2Q": TwoQueues,
    "ARC": Arc,
    "S3-FIFO": S3Fifo,
}
TRACES: dict[str, Callable[[int], list[int]]] = {
    "boot and scan": traces.boot_and_scan,
    "the same, one request a block": traces.boot_and_scan_whole_blocks,
    "boot": traces.boot,
    "loop": traces.loop,
    "popularity": traces.popularity,
    "shifting": traces.shifting,
    "one-hit wonders": traces.one_hit_wonders,
    "recency": traces.recency,
}


def hit_ratio(policy: Policy, trace: Sequence[int]) -> float:
    """The share of visits that found their block in the cache."""
    visits = hits = 0
    for request in trace:
        if request >= 0:
            visits += 1
            hits += policy.visit(request)
        else:
            policy.visit(~request)
    return hits / visits


def ratios(trace: Sequence[int], size: int, *policies: str) -> list[float]:
    """Hit ratios in percent, in the order of the policies."""
    return [100 * hit_ratio(POLICIES[policy](size), trace) for policy in policies]


@cache
def made(name: str, seed: int) -> list[int]:
    return TRACES[name](seed)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("size", "factor"), [(600, 1.1), (1200, 1.3), (2400, 1.2)])
def test_boot_and_scan_is_served_clearly_better_than_by_lru(
    seed: int, size: int, factor: float
) -> None:
    ours, lru = ratios(made("boot and scan", seed), size, "Forebay", "LRU")
    assert ours >= factor * lru


def test_boot_and_scan_is_served_better_than_by_any_other() -> None:
    ours, *others = ratios(made("boot and scan", 1), 1200, *POLICIES)
    assert ours > max(others)


@pytest.mark.parametrize(
    ("name", "size", "margin"),
    [
        # points of hit ratio at least won, or (negative) at most lost against LRU
        ("the same, one request a block", 1200, 5),
        ("boot", 1200, 11),
        ("boot", 4800, 0),
        ("loop", 1200, 0),
        ("loop", 2400, 30),
        ("loop", 4800, 0),
        ("popularity", 600, 5),
        ("popularity", 2400, 2),
        ("one-hit wonders", 1200, 5),
        ("shifting", 1200, -7),
        ("shifting", 2400, -4),
        ("recency", 600, -5),
        ("recency", 1200, -6),
    ],
)
def test_no_trace_is_served_much_worse_than_by_lru(name: str, size: int, margin: float) -> None:
    ours, lru = ratios(made(name, 1), size, "Forebay", "LRU")
    assert ours - lru >= margin


def test_a_boot_after_a_night_of_backups_finds_its_blocks() -> None:
    ours, lru = Forebay(1600), Lru(1600)
    boot = range(600)
    backup = [request for key in range(20_000, 28_000) for request in (key, ~key, ~key, ~key)]
    for policy in (ours, lru):
        for day in range(3):
            hit_ratio(policy, boot)
            hit_ratio(policy, range(10_000 + 500 * day, 10_500 + 500 * day))
        hit_ratio(policy, backup)
    assert hit_ratio(lru, boot) == 0
    assert hit_ratio(ours, boot) > 0.99


def table(sizes: Sequence[int] = (600, 1200, 2400), seed: int = 1) -> str:
    """Hit ratios in percent as a Markdown table."""
    lines = [
        "| trace | cache | " + " | ".join(POLICIES) + " |",
        "| --- | ---: |" + " ---: |" * len(POLICIES),
    ]
    for name, make in TRACES.items():
        trace = make(seed)
        for size in sizes:
            found = [f"{ratio:.1f}" for ratio in ratios(trace, size, *POLICIES)]
            lines.append(f"| {name} | {size} | " + " | ".join(found) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
