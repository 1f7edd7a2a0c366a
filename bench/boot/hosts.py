# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Several hosts on one store, simulated: the recorded boot by guests that are spread over them.

What is simulated: the store's link, which all hosts share, and a link of each host, that pass one answer after the
other; the daemon of each host, a processor that takes so long for each request as was measured; a guest's pauses. What
is not: the guests' own processors, disks (a local copy is read and written in no time), and failures. With one host and
its store's link it has to come out as what was measured, which the report shows.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from bench.boot.recording import BLOCK, Recording
from bench.boot.replay import followers_of
from bench.boot.store import LATENCY, RATE

FETCH_BLOCKS = 16
"""Of one fetch of a replay, and so many fetches are under way at once (`forebay.boot.replay`)."""
FETCHES = 4


@dataclass(frozen=True)
class Site:
    """What there is, bits per second, and seconds."""

    hosts: int
    store_rate: float
    host_rate: float
    request: float
    """What a host's daemon computes for a request."""
    latency: float = LATENCY


SITE = (4, 4 * RATE, RATE)
"""Four hosts with a gigabit each on one store of four."""


class Passage:
    """Passes one thing after the other."""

    def __init__(self) -> None:
        self._free = 0.0

    def passes(self, now: float, seconds: float) -> float:
        """When something that comes now has passed."""
        self._free = max(self._free, now) + seconds
        return self._free


class Clock:
    """What happens, in the order of its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Have it happen then."""
        heapq.heappush(self._due, (when, next(self._order), what))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._due:
            self.now, _, what = heapq.heappop(self._due)
            what()


class Host:
    """A host: its link, its daemon, what its cache has or will have, by block. `store`: the link that all share."""

    def __init__(self, clock: Clock, site: Site, store: Passage) -> None:
        self._clock = clock
        self._site = site
        self._store = store
        self._link = Passage()
        self.daemon = Passage()
        self.there: dict[int, float] = {}
        self.taken = 0

    def fetch(self, length: int) -> float:
        """Have so many bytes sent by the store; when they are here."""
        self.taken += length
        now, site = self._clock.now, self._site
        of_store = self._store.passes(now, 8 * length / site.store_rate)
        of_host = self._link.passes(now, 8 * length / site.host_rate)
        return max(of_store, of_host) + site.latency

    def shared(self, blocks: range) -> float:
        """When these blocks are in the cache, and whether one had to be fetched: each once, whoever asks."""
        lacking = [block for block in blocks if block not in self.there]
        if lacking:
            arrives = self.fetch(len(lacking) * BLOCK)
            self.there.update(dict.fromkeys(lacking, arrives))
        return max(self.there[block] for block in blocks)

    def replay(self, order: list[int]) -> None:
        """Fetch what boots read, in this order, some blocks after the others."""
        left = iter(order)

        def go_on() -> None:
            some = [b for b in itertools.islice(left, FETCH_BLOCKS) if b not in self.there]
            if some:
                arrives = self.fetch(len(some) * BLOCK)
                self.there.update(dict.fromkeys(some, arrives))
                self._clock.at(arrives, go_on)

        for _ in range(FETCHES):
            self._clock.at(self._clock.now, go_on)


Answer = Callable[[Host, float, int, range], float]
"""When a request of so many bytes in these blocks, made at that time, is answered."""


def cached(site: Site) -> Answer:
    """Through the host's daemon."""

    def answered(host: Host, now: float, _length: int, blocks: range) -> float:
        return max(host.shared(blocks), host.daemon.passes(now, site.request))

    return answered


def alone(host: Host, _now: float, length: int, _blocks: range) -> float:
    """From the store, for this guest only."""
    return host.fetch(length)


def copied(_host: Host, now: float, _length: int, _blocks: range) -> float:
    """From the guest's own copy."""
    return now


@dataclass(frozen=True)
class Simulated:
    """How it went: until the last guest had booted, and half of them; bytes that the store gave."""

    seconds: float
    median: float
    store_bytes: int


def simulate(
    site: Site,
    vms: int,
    recording: Recording,
    answer: Answer,
    *,
    replays: bool = False,
    copy_bytes: int = 0,
) -> Simulated:
    """Boot guests on the hosts of a site, all at once; with `copy_bytes` each when its copy of so many is there."""
    clock, store = Clock(), Passage()
    hosts = [Host(clock, site, store) for _ in range(site.hosts)]
    if replays:
        for host in hosts:
            host.replay(order_of(recording))
    ends: list[float] = []
    followers = followers_of(recording)
    copies = vms * copy_bytes
    begins = max(
        8 * copies / site.store_rate, 8 * -(-vms // site.hosts) * copy_bytes / site.host_rate
    )
    for n in range(vms):
        _boot(clock, hosts[n % site.hosts], recording, followers, answer, begins, ends)
    clock.run()
    ends.sort()
    return Simulated(ends[-1], ends[len(ends) // 2], copies + sum(host.taken for host in hosts))


def _boot(
    clock: Clock,
    host: Host,
    recording: Recording,
    followers: list[list[int]],
    answer: Answer,
    begins: float,
    ends: list[float],
) -> None:
    """Have one guest boot; `ends` gets when it has."""
    left = len(recording.reads)

    def go_on(answered: int, now: float) -> None:
        nonlocal left
        for number in followers[answered]:
            clock.at(now + recording.reads[number].think, lambda number=number: ask(number))  # type: ignore[misc]
        if answered >= 0:
            left -= 1
        if not left:
            ends.append(now + recording.tail)

    def ask(number: int) -> None:
        offset, length, _, _ = recording.reads[number]
        blocks = range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
        when = answer(host, clock.now, length, blocks)
        clock.at(when, lambda: go_on(number, when))

    clock.at(begins, lambda: go_on(-1, begins))


def order_of(recording: Recording) -> list[int]:
    """The blocks of a boot as they are read first."""
    found: dict[int, None] = {}
    for offset, length, _, _ in recording.reads:
        found |= dict.fromkeys(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
    return list(found)
