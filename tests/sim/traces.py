# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Block traces for the placement policy, each made from a seed.

A trace is a list of requests. A request is a block's key (int >= 0) when a reader comes to the block, and `~key` for
each further request of the same reader within that block (a reader that asks for 4 or 16 KiB at a time comes to a
64 KiB block once and sends several requests). Only the first kind is counted as hit or miss; the second would make the
hit ratio of any policy look good, and makes a scan look popular to a policy that counts touches.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from random import Random

IMAGE_BLOCKS = 3000
BOOT_BLOCKS = 500
_IMAGE_KEYS = (
    1 << 24
)  # keys of image i start at i * _IMAGE_KEYS, as an index by image would number them


def zipf(random: Random, population: Sequence[int], count: int, skew: float) -> list[int]:
    """`count` draws from `population`, whose n-th member is drawn in proportion to 1 / n ** skew."""
    weights = list(accumulate(1 / rank**skew for rank in range(1, len(population) + 1)))
    return random.choices(population, cum_weights=weights, k=count)


def _requests(keys: Iterable[int], per_block: int) -> Iterator[int]:
    for key in keys:
        yield key
        for _ in range(per_block - 1):
            yield ~key


def _interleaved(random: Random, streams: Sequence[Iterable[int]]) -> Iterator[int]:
    """All requests of all streams, each stream in its own order, up to 16 at a time."""
    running = [iter(stream) for stream in streams]
    while running:
        stream = random.choice(running)
        for _ in range(random.randint(1, 16)):
            request = next(stream, None)
            if request is None:
                running.remove(stream)
                break
            yield request


class _Host:
    """A hypervisor with virtual machines on golden images.

    A boot reads the image's boot set file by file, and the machine's private blocks (what its own
    disk has in place of the image's). By day a machine reads a working set, in part shared.
    """

    def __init__(self, seed: int, images: int, machines: int, scale: int) -> None:
        """`scale`: how many times larger than IMAGE_BLOCKS and BOOT_BLOCKS an image is, and what a boot reads of it."""
        self.random = Random(seed)
        self.images = [_image(i, scale) for i in range(images)]
        self.machines = range(machines)
        self._scale = scale
        self._private = [_image(images + machine, scale)[:40] for machine in self.machines]
        self._boot_files = [self._files(image) for image in self.images]

    def _files(self, image: range) -> list[range]:
        files: list[range] = []
        left = BOOT_BLOCKS * self._scale
        while left:
            start = self.random.randrange(len(image) - 32)
            length = min(left, self.random.randint(1, 32))
            files.append(image[start : start + length])
            left -= length
        return files

    def boot(self, machine: int) -> Iterator[int]:
        files = self._boot_files[machine % len(self.images)]
        read = [key for file in files if self.random.random() < 0.95 for key in file]
        per_block = self.random.choice((1, 2, 4))
        return _requests([*read, *self._private[machine]], per_block)

    def day(self, machine: int, visits: int) -> Iterator[int]:
        image = machine % len(self.images)
        shared = [key for file in self._boot_files[image][::4] for key in file]
        own = Random(machine).sample(self.images[image], 60)
        wanted = [*shared, *own, *self._private[machine]]
        return _requests(zipf(self.random, wanted, visits, 0.8), 2)

    def backup(self, image: int) -> Iterator[int]:
        return _requests(self.images[image], self.random.choice((1, 4)))

    def virus_scan(self, image: int) -> Iterator[int]:
        blocks = self.images[image]
        extents = [blocks[start : start + 16] for start in range(0, len(blocks), 16)]
        self.random.shuffle(extents)
        chosen = extents[: len(extents) * 6 // 10]
        return _requests([key for extent in chosen for key in extent], 4)


def _image(number: int, scale: int) -> range:
    return range(number * _IMAGE_KEYS, number * _IMAGE_KEYS + IMAGE_BLOCKS * scale)


def boot(seed: int, scale: int = 1) -> list[int]:
    """Four golden images, 16 machines, four days: boot storms and daily work, no scans."""
    return list(_days(_Host(seed, images=4, machines=16, scale=scale), scans=False))


def boot_and_scan(seed: int, scale: int = 1) -> list[int]:
    """The same with what hosts do at night: whole images read for a backup, most of one for viruses."""
    return list(_days(_Host(seed, images=4, machines=16, scale=scale), scans=True))


def boot_and_scan_whole_blocks(seed: int, scale: int = 1) -> list[int]:
    """The same as every policy would like it: no reader sends a second request to a block."""
    return [request for request in boot_and_scan(seed, scale) if request >= 0]


def _days(host: _Host, *, scans: bool) -> Iterator[int]:
    random = host.random
    for _ in range(4):
        order = random.sample(host.machines, len(host.machines))
        for start in range(0, len(order), 4):  # four at a time
            yield from _interleaved(
                random, [host.boot(machine) for machine in order[start : start + 4]]
            )
        day: list[Iterator[int]] = [host.day(machine, 150) for machine in host.machines]
        if scans:
            day.append(host.virus_scan(random.randrange(len(host.images))))
        yield from _interleaved(random, day)
        if scans:
            images = range(len(host.images))
            yield from _interleaved(random, [host.backup(image) for image in images])


def loop(seed: int, blocks: int = 3000, rounds: int = 15) -> list[int]:
    """The same blocks in the same order over and over: the worst case of LRU when they do not fit."""
    start = Random(seed).randrange(1 << 20)
    return list(_requests(range(start, start + blocks), 1)) * rounds


def popularity(seed: int, blocks: int = 12_000, visits: int = 60_000) -> list[int]:
    """Independent draws, some blocks always more popular than others (zipf, skew 0.9)."""
    random = Random(seed)
    return list(_requests(zipf(random, random.sample(range(blocks), blocks), visits, 0.9), 2))


def shifting(seed: int, working_set: int = 1500, visits: int = 60_000) -> list[int]:
    """A working set of which a fifth is replaced twenty times over: what is old must be let go."""
    random = Random(seed)
    wanted = list(range(working_set))
    following = working_set
    trace: list[int] = []
    for _ in range(20):
        trace += zipf(random, wanted, visits // 20, 0.6)
        for place in random.sample(range(working_set), working_set // 5):
            wanted[place] = following
            following += 1
    return trace


def one_hit_wonders(seed: int, blocks: int = 3000, visits: int = 60_000) -> list[int]:
    """Half of all visits are to blocks that are never asked for again (but sent in four requests)."""
    random = Random(seed)
    popular = iter(zipf(random, range(blocks), visits, 0.8))
    never_seen = iter(range(1 << 30, (1 << 30) + visits))
    keys = [next(popular) if random.random() < 0.5 else next(never_seen) for _ in range(visits)]
    return list(_requests(keys, 4))


def recency(seed: int, visits: int = 60_000) -> list[int]:
    """A block is asked for again soon or never (reuse distances of a log-uniform law): LRU's own case."""
    random = Random(seed)
    trace: list[int] = [0]
    following = 1
    for _ in range(visits):
        if random.random() < 0.3:
            trace.append(following)
            following += 1
        else:
            distance = int(4000 ** random.random())
            trace.append(trace[-min(distance, len(trace))])
    return trace


def zipf_and_scans(seed: int, blocks: int = 30_000, visits: int = 150_000) -> list[int]:
    """Independent draws (zipf, skew 0.9), and five times a reader that goes once through what nobody else wants."""
    random = Random(seed)
    drawn = zipf(random, random.sample(range(blocks), blocks), visits, 0.9)
    scan = visits // 10
    trace: list[int] = []
    for turn in range(5):
        start = (1 << 30) + turn * scan
        trace += drawn[turn * visits // 5 : (turn + 1) * visits // 5]
        trace += _requests(range(start, start + scan), 2)
    return trace
