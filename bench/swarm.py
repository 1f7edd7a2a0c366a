# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Staging to more hosts than one machine can run: a simulation, with constants that were measured.

Time goes in steps, in which a host may send one chunk and receive one. A host knows PEERS others at random, asks some
of them in each step, and takes a chunk that it lacks. It takes part from when it was told. Beside it stand `scp-wave`,
where each host that has all of the image copies it to one that has nothing, and one store from which all read.
"""

import random
from dataclasses import dataclass, replace

CHUNKS = 64
"""Parts of the image. Real pieces are smaller; a step would be too."""

PEERS = 48
"""Hosts that one host is connected to."""

ASKED = 12
"""Of these, how many a host asks in one step before it waits for the next one."""


@dataclass(frozen=True)
class Constants:
    """What the time of a host follows from."""

    size: int = 4 << 30
    """Bytes of the image."""
    link: float = 117.5e6
    """Bytes a second of one host, each way: 1 Gbit/s without what TCP and IP take."""
    store: float = 1.175e9
    """The same of the store: 10 Gbit/s."""
    start_seconds: float = 3.0
    """From the order of a host to its first byte; measured."""
    told_a_second: float = 16 / 0.5
    """Hosts that are told in a second: 16 at a time, half a second each; measured on loopback."""
    efficiency: float = 0.8
    """How much of its link a host uses in a swarm of libtorrent's; measured with eight hosts."""

    @property
    def one(self) -> float:
        """Seconds of one transfer from host to host."""
        return self.size / self.link


def swarm(hosts: int, constants: Constants, seed: int = 1) -> list[float]:
    """Seconds after which each of so many hosts has all of the image, sorted. One more has it from the start."""
    rng = random.Random(seed)
    count = hosts + 1
    whole = (1 << CHUNKS) - 1
    has = [whole] + [0] * hosts
    peers: list[set[int]] = [set() for _ in range(count)]
    for me in range(count):
        for other in rng.sample(range(count), min(count, PEERS // 2 + 1)):
            if other != me:
                peers[me].add(other)
                peers[other].add(me)
    lists = [list(x) for x in peers]
    step = constants.one / CHUNKS / constants.efficiency
    told = [0.0, *(constants.start_seconds + n / constants.told_a_second for n in range(hosts))]
    done: list[float] = []
    waiting = list(range(1, count))
    now = 0.0
    while waiting:
        now += step
        before = has[:]
        busy = bytearray(count)
        rng.shuffle(waiting)
        for me in waiting:
            if told[me] > now:
                continue
            for other in rng.sample(lists[me], min(ASKED, len(lists[me]))):
                useful = before[other] & ~has[me]
                if useful and not busy[other] and told[other] <= now:
                    busy[other] = 1
                    has[me] |= _one_of(useful, rng)
                    break
        ended = [me for me in waiting if has[me] == whole]
        done += [now] * len(ended)
        waiting = [me for me in waiting if has[me] != whole]
    return done


def _one_of(bits: int, rng: random.Random) -> int:
    """One bit of those that are set, at random."""
    turn = rng.randrange(CHUNKS)
    turned = (bits >> turn | bits << CHUNKS - turn) & (1 << CHUNKS) - 1
    low = turned & -turned
    return (low << turn | low >> CHUNKS - turn) & (1 << CHUNKS) - 1


def scp_wave(hosts: int, constants: Constants) -> list[float]:
    """The same for copies of the whole image, from each host that has it to one that has not."""
    done: list[float] = []
    now, copies = 0.0, 1
    while len(done) < hosts:
        now += constants.one + constants.start_seconds
        new = min(copies, hosts - len(done))
        done += [now] * new
        copies += new
    return done


def one_store(hosts: int, constants: Constants) -> list[float]:
    """The same where all read from the store at once, and share what it gives."""
    rate = min(constants.link, constants.store / hosts)
    return [constants.start_seconds + constants.size / rate] * hosts


def shares(times: list[float]) -> tuple[float, float, float]:
    """When 50, 95 and 100 % of the hosts have it."""
    last = len(times) - 1
    return times[last // 2], times[int(last * 0.95)], times[last]


def on_one_machine(
    hosts: int, processors: int, cost: float, constants: Constants
) -> tuple[float, float]:
    """Seconds of one transfer, and until the last of `hosts` has it, where all of them share some processors.

    `cost` are seconds of a processor for each byte that a host gets, those of who gives it included. Two processors at
    most work on one transfer: what gets it and what gives it wait for each other.
    """
    work = constants.size * cost
    one = max(constants.one / constants.efficiency, work / min(processors, 2))
    return one, max(swarm(hosts, constants)[-1], hosts * work / processors)


def fastest_link(
    hosts: int, processors: int, cost: float, bar: float, constants: Constants
) -> float:
    """Mbit/s of a link, the fastest of some, at which they hold the bar there; 0: at none."""
    held = 0.0
    for mbit in range(20, 1001, 20):
        slower = replace(constants, link=constants.link * mbit / 1000)
        one, many = on_one_machine(hosts, processors, cost, slower)
        if many / one <= bar:
            held = float(mbit)
    return held
