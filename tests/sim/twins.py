# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Two caches that are to go through the same, one served by the compiled core and one by Python."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import trio
from trio.testing import MockClock

import forebay_fast
from forebay_cache import View, open_cache
from forebay_cache.blocks import private
from forebay_cache.blocks.fast import write_run_of
from forebay_cache.blocks.store import store
from forebay_cache.device.pace import SLOW_SECONDS
from forebay_cache.format.geometry import BLOCK, PAGE_BLOCKS, SECTOR
from forebay_cache.format.records import LayerName

SIZE = 4 << 20  # of the device, which has 44 slots then
BLOCKS = 30  # of the image
SECTORS = BLOCKS * BLOCK // SECTOR
Op = tuple[Any, ...]


class Side:
    """One cache with a view of a private layer over a clean one, served by the core or by Python."""

    def __init__(self, home: Path, *, core: bool, size: int = SIZE) -> None:
        with mock.patch.object(uuid, "uuid4", return_value=uuid.UUID(int=7)), serving(core=core):
            self.cache = open_cache(home / "cache", home / "index", size=size, boot="b")
            self.run = write_run_of(self.cache)
            self.generation = 0
            self.clean = self.cache.layers.make(LayerName.of_image("i"))
            self.view = View(self.cache, [], self.clean, self.nothing)
            self.read_now = (forebay_fast.core.Reads(self.view) if core else self.view).read_now
        self.write = self.cache.device.write
        self.fault: tuple[int, int] | None = None  # which write of the next call fails, and how
        self.slow = -1  # which one takes long
        self.freeze()

    async def nothing(self, offset: int, length: int) -> bytes:
        raise AssertionError("the origin is not read")

    def freeze(self) -> None:
        for layer in self.view.private[:1]:
            layer.freeze()
        self.generation += 1
        made = self.cache.layers.make(LayerName.of_disk("d", self.generation, "i"))
        self.view.private = [made, *self.view.private]

    # -- one operation each ---------------------------------------------------------------------------------------

    async def do(self, op: Op) -> object:
        """What it returned, or raised."""
        try:
            found = getattr(self, f"do_{op[0]}")(*op[1:])
            return await found if hasattr(found, "__await__") else found
        except OSError as error:
            return error.errno, str(error)

    def do_writes(self, runs: list[tuple[int, int, int]], odd: int) -> object:
        writes = [
            (
                min(first * SECTOR, BLOCKS * BLOCK - count * SECTOR) + (odd == n) * 512,
                memoryview(content(seed, count))[: count * SECTOR - (odd == n) * 512],
            )
            for n, (first, count, seed) in enumerate(runs)
        ]
        with mock.patch.object(self.cache.device, "write", self.write_with_fault):
            try:
                return self.run(self.view.private[0], writes)
            finally:
                self.fault, self.slow = None, -1
                with contextlib.suppress(OSError):
                    self.cache.intent.publish()  # the caller does, before `writes` change

    def do_by_turns(self, block: int, opened: int, seed: int) -> object:
        """Have the sectors of a block lie on both sides by turns, `opened` of them not yet durable; then write all."""
        first = block * BLOCK // SECTOR
        found: list[object] = []
        for runs in (
            [(first, 16, seed)],
            [(first + n, 1, seed) for n in range(0, 16, 2)],
            [(first + n, 1, seed) for n in range(opened)],
            [(first, 16, seed + 1 & 255)],
        ):
            if self.cache.intent.syncing:
                return found
            if len(found) < 3:
                self.cache.intent.note_durable()
            found.append(self.do_writes(runs, -1))
        return found

    def write_with_fault(self, at: int, data: Any) -> None:
        if self.slow == 0:
            clock = trio.lowlevel.current_clock()
            assert isinstance(clock, MockClock)
            clock.jump(2 * SLOW_SECONDS)
        self.slow -= 1
        if self.fault is not None:
            left, number = self.fault
            self.fault = left - 1, number
            if not left:
                raise OSError(number, "injected")
        self.write(at, data)

    def do_zero(self, first: int, count: int) -> object:
        count = min(count, SECTORS - first)
        keep = bool(count & 1)
        return private.zero(self.cache, self.view.private[0], first * SECTOR, count * SECTOR, keep)

    def do_read(self, offset: int, length: int) -> object:
        found = self.read_now(offset, min(length, BLOCKS * BLOCK - offset))
        return found and bytes(found)

    def do_publish(self) -> None:
        self.cache.intent.publish()

    def do_begin_sync(self) -> None:
        if not self.cache.intent.syncing:
            self.cache.intent.begin_sync()

    def do_end_sync(self) -> None:
        self.cache.intent.end_sync()

    async def do_commit(self) -> None:
        await self.cache.commit()

    async def do_fill(self, block: int, count: int, seed: int) -> None:
        count = min(count, BLOCKS - block)
        with self.cache.in_flight.filling(self.clean, range(block, block + count)) as cells:
            data = bytes(count * BLOCK) if not seed else content(seed, count * BLOCK // SECTOR)
            await store(self.cache, self.clean, block * BLOCK, data, cells)

    def do_freeze(self) -> None:
        if self.generation < 4:
            self.freeze()

    def do_forget_ready(self) -> None:
        self.cache.ready.forget()

    def do_forget_sums(self) -> None:
        sums = self.cache.sums
        for slot, state in enumerate(sums.state):
            if state == 1:  # the index has them as well
                sums.state[slot] = 0

    async def do_load_sums(self) -> None:
        await self.cache.sums.load(range(self.cache.device.slots))

    def do_shed(self) -> None:
        self.clean.pages.shed(100)

    async def do_load(self) -> None:
        await self.clean.pages.load([0])

    def do_fault(self, left: int, number: int) -> None:
        self.fault = left, number

    def do_slow(self, left: int) -> None:
        self.slow = left

    def do_mend(self) -> None:
        if self.cache.failure.error is not None:
            self.cache.failure.end()

    def do_look_beyond(self, offset: int) -> None:
        self.view.lookahead = offset

    def stale(self) -> bool:
        """True if the core takes a page to lie where it does not."""
        for pages in (layer.pages for layer in [*self.view.private, self.clean]):
            held = {n: page.buffer_info()[0] for n, page in pages.by_number.items()}
            known = {
                n: at
                for n, at in enumerate((pages.addresses or [])[: BLOCKS // PAGE_BLOCKS + 1])
                if at
            }
            if not known.items() <= held.items():
                return True
        return False

    # -- what is compared -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        cache = self.cache
        intent, sums, slots = cache.intent, cache.sums, cache.slots
        layers = [*self.view.private, self.clean]
        return {
            "device": cache.device.map[: cache.device.at(cache.index.meta.frontier)].tobytes(),
            "pages": [
                {n: page.tobytes() for n, page in layer.pages.by_number.items()} for layer in layers
            ],
            "dirty": [layer.pages.dirty for layer in layers],
            "totals": [(layer.sectors, layer.slots) for layer in layers],
            "sums": sums.values.tobytes(),
            "sum states": sums.state.tobytes(),
            "sums pending": (sums.pending, sorted(sums.unstored.items())),
            "ready": cache.ready.masks.tobytes(),
            "open": intent.open_sectors,
            "syncing": intent.syncing,
            "records": b"".join(intent._ops),
            "noted": intent.noted_bytes,
            "late": [piece[:3] for one in intent._late for piece in one.pieces()],
            "journal": (intent.journal.head, intent.journal._total, intent.journal._trimmed),
            "placement": (bytes(slots.placement.state), slots.placement.free),
            "owner": slots.owner.tobytes(),
            "frontier": cache.index.meta.frontier,
            "freed": cache.quarantine._freed,
            "slow": (cache.threads.pace.is_slow, cache.threads.pace.slow_writes),
            "failed": str(cache.failure.error),
            "counts": (self.view.hits, self.view.read_bytes),
            "samples": [
                x.tolist() for x in (slots.samples.head, slots.samples.keys, slots.samples.counts)
            ],
            "kinds of samples": bytes(slots.samples.kinds),
        }


def content(seed: int, sectors: int) -> bytes:
    """Sectors that are all different."""
    return b"".join(bytes([seed, n % 256, n >> 8, 1]) * (SECTOR // 4) for n in range(sectors))


@contextlib.contextmanager
def serving(*, core: bool) -> Iterator[None]:
    with mock.patch.object(forebay_fast, "_wanted", core):
        yield


def unlike(one: Side, other: Side) -> list[str]:
    """What of both is not the same."""
    first, second = one.state(), other.state()
    found = [name for name in first if first[name] != second[name]]
    return [*found, "addresses"] if one.stale() or other.stale() else found
