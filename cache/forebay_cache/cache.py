"""The block cache: slots, layers, and what makes their changes durable.

All state is changed on the event loop, between two awaits; threads only move bytes. What is durable when, and in
which order, is written down in ``cache/README.md``: read it before adding an ``await`` here.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import resource
import weakref
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import trio

from forebay_cache.device.device import Device, Superblock
from forebay_cache.device.syncer import Syncer
from forebay_cache.durable.journal import Journal, JournalFull
from forebay_cache.errors import CacheFull, IndexFault
from forebay_cache.format import ops
from forebay_cache.format.entry import (
    Entry,
    block_key,
    block_of_key,
    data_of,
    entry_at,
    layer_of_key,
    put_entry,
    slot_of,
    zeros_only,
)
from forebay_cache.format.geometry import BLOCK, PAGE_BLOCKS, SECTOR, SECTORS
from forebay_cache.index.index import PAGE_KEY, Changes, Index, LayerRecord, Meta
from forebay_cache.index.sums import UNKNOWN, Sums, checksums
from forebay_cache.layers.layer import ABSENT, Layer
from forebay_cache.slots.placement import TOUCHED, Placement

log = logging.getLogger(__name__)

#: A commit is made this long after the first change that it takes in: what a killed daemon loses of a warm cache.
COMMIT_SECONDS = 2.0
#: ... or when so many slots have new checksums; bounds memory and the length of a commit.
COMMIT_SLOTS = 65536
#: Pages of the index kept in memory: about 20 MB, and lookups for 128 GiB without touching LMDB.
PAGES_KEPT = 32768
#: How long to wait after a failed commit: the state directory may be full.
COMMIT_RETRY_SECONDS = 1.0
#: So many slots one after the other cannot be read at all: it is not the slots.
UNREADABLE_MOST = 16
#: How often the loop asks whether memory that it took for resident was paged out.
RESIDENCY_SECONDS = 0.05


class Follower(Protocol):
    """Holds on to :attr:`Cache.ready` and :attr:`Device.map`. Counts reads."""

    hits: int
    misses: int

    def follow(self) -> None:
        """Take them anew."""


class Round:
    """Those who wait for the same sync or commit."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = False
        self.error: BaseException | None = None


class Together:
    """Runs a piece of work for all who ask: one running, one queued, later askers join the queued one."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work
        self._lock = trio.Lock()
        self._queued: Round | None = None

    async def __call__(self) -> None:
        """Returns after a run of the work that began after this call. Raises what the work raised.

        Cancellation while waiting leaves the run to the others; a run that was begun is finished.
        """
        turn = self._queued
        if turn is None:
            turn = self._queued = Round()
        try:
            self._lock.acquire_nowait()  # without the pass through the scheduler that acquire() always makes
        except trio.WouldBlock:
            await self._lock.acquire()
        try:
            if not turn.done:
                self._queued = None
                with trio.CancelScope(shield=True):
                    try:
                        await self._work()
                    except Exception as error:  # noqa: BLE001  (all who wait for the run get it)
                        turn.error = error
                turn.done = True
        finally:
            self._lock.release()
        if turn.error is not None:
            raise turn.error

    @property
    def running(self) -> bool:
        """Whether the work is being done."""
        return self._lock.locked()

    async def idle(self) -> None:
        """Wait until the run that is going on, if any, has ended."""
        async with self._lock:
            pass

    @contextlib.asynccontextmanager
    async def suspended(self) -> AsyncIterator[None]:
        """Within it the work is not done; who asks for it waits."""
        async with self._lock:
            yield


def _anonymous(size: int) -> mmap.mmap:
    return mmap.mmap(-1, max(size, 4096), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _low_water(slots: int) -> int:
    """Fewer free slots than this, and something is evicted."""
    return min(max(16, slots // 64), 2048, max(1, slots // 4))


class Cache:
    """An open cache. Made by :func:`forebay_cache.offline.recovery.open_cache`; :meth:`run` has to be running."""

    def __init__(
        self, device: Device, index: Index, journal: Journal, placement: Placement
    ) -> None:
        self.device = device
        self.index = index
        self.journal = journal
        self.placement = placement
        self.meta: Meta = index.meta
        self.uuid = index.meta.uuid
        slots = device.slots
        # Anonymous maps: memory is taken only for the slots that are used.
        self._ready_map = _anonymous(slots * 2)
        #: per slot, sectors that were checked and are believed to be in memory: these are served from the map
        self.ready = memoryview(self._ready_map).cast("H")
        self.forgotten = 0
        """How often all of that was forgotten."""
        #: per slot, the key of its block
        self._owner_map = _anonymous(slots * 8)
        self.owner = memoryview(self._owner_map).cast("Q")
        self.layers: dict[int, Layer] = {}
        self._by_name: dict[str, Layer] = {}
        self.sums = Sums(slots)
        #: sectors written since the last sync began (by key of the block), and those being synced
        self.open_sectors: dict[int, int] = {}
        self.syncing: dict[int, int] = {}
        self._ops: list[bytes] = []
        self._ops_bytes = 0
        self._late: list[tuple[int, int, int, memoryview, list[int]]] = []
        self._freed: list[int] = []
        self._limbo: list[tuple[int, list[int]]] = []
        self._leaving = 0
        self._evicting: set[int] = set()
        self._clock = 0
        self._pins: dict[int, int] = {}
        self._next_pin = 0
        self._records: dict[tuple[str, str], dict[str, Any]] = {}
        self._records_changed: set[tuple[str, str]] = set()
        self._layers_gone: set[int] = set()
        #: regions of clean layers whose origin may be written: durable, waiting, and to be forgotten
        self.hot: set[tuple[int, int]] = set()
        self._hot_new: set[tuple[int, int]] = set()
        self._hot_gone: set[tuple[int, int]] = set()
        #: fills on their way, and the sectors of theirs that a write has overtaken: key -> masks
        self.filling: dict[int, list[list[int]]] = {}
        #: slots of clean blocks that a thread is writing to: nobody else does, or the later write could come first
        self.storing: set[int] = set()
        #: (layer, start, end) in bytes of origin writes under way: what is read there meanwhile is not stored
        self.overwriting: list[tuple[int, int, int]] = []
        #: all that read from the maps, to be told when these move
        self.views: weakref.WeakSet[Follower] = weakref.WeakSet()
        #: why the device is given up for now: nothing is written to it, and nothing on it is believed unseen
        self.failed: OSError | None = None
        #: set when that happens; another event each time
        self.broke = trio.Event()
        #: why the last commit could not be stored in the index
        self.index_error: str | None = None
        self.damaged_slots = 0
        self.evicted_blocks = 0
        #: finds out which slots are free, where that was not done at the start; None when it is known
        self.scan: Callable[[], Awaitable[None]] | None = None
        self._syncer = Syncer(device.fd, device.sync)
        self.sync = Together(self._sync)
        self.commit = Together(self._commit)
        self._commit_past_device = Together(self._store_past_device)
        self._giving_up: set[int] = set()  # layers whose end is about to be, or is, in the index
        self._unreadable = 0
        self._wanted = trio.Event()
        self._evict_wanted = trio.Event()
        self._freed_some = trio.Event()
        self._low = _low_water(slots)
        self._closing = False

    def adopt(self, layout: Superblock) -> None:
        """The device has grown, and says so durably: use the new slots. Between two awaits.

        Raises OSError when there is no memory for that; then the cache goes on as large as it was.
        """
        slots = layout.slots
        self.sums.grow(slots)
        self.owner.release()
        self.ready.release()
        try:
            self._owner_map.resize(max(slots * 8, 4096))
            self._ready_map.resize(max(slots * 2, 4096))
            self.device.adopt(layout)
        finally:
            self.owner = memoryview(self._owner_map).cast("Q")
            self.ready = memoryview(self._ready_map).cast("H")
            for view in self.views:
                view.follow()
        self.placement.grow(slots)
        self._low = _low_water(slots)
        self._release()

    # -- layers -----------------------------------------------------------------------------------------------

    def register(self, layer: Layer) -> None:
        """Take a layer, as the index has it or new, into the books; an older one of that name is dropped."""
        self.layers[layer.id] = layer
        if not layer.dead:
            older = self._by_name.get(layer.name)
            if older is not None:  # it was to be, when we were killed
                self.drop_layer(older)
            self._by_name[layer.name] = layer

    def layer(self, name: str) -> Layer | None:
        """The live layer of that name."""
        return self._by_name.get(name)

    def layers_named(self, prefix: str) -> list[Layer]:
        """Live layers whose name begins so, oldest first."""
        found = [x for n, x in self._by_name.items() if n.startswith(prefix)]
        return sorted(found, key=lambda x: x.id)

    def make_layer(self, name: str, *, private: bool) -> Layer:
        """A new empty layer; it exists after a crash if anything that was journaled after it does."""
        assert name not in self._by_name, name
        layer = Layer(self.meta.next_layer, LayerRecord(name, private))
        self.meta.next_layer += 1
        layer.changed = True
        if private:  # whose pages are never shed
            layer.missing = ABSENT
        self.register(layer)
        self.note(ops.layer_made(layer.id, private, name))
        self.want_commit()
        return layer

    async def load(self, layer: Layer, numbers: Iterable[int]) -> None:
        """Bring pages of the index into memory. Raises OSError."""
        for number in numbers:
            if layer.missing is ABSENT:
                layer.adopt(number, None)
            while number not in layer.pages:
                waiting = layer.loading.get(number)
                if isinstance(waiting, trio.Event):
                    await waiting.wait()
                    continue
                layer.loading[number] = event = trio.Event()
                try:
                    raw = await trio.to_thread.run_sync(self.index.page, layer.id, number)
                    layer.adopt(number, raw)
                finally:
                    del layer.loading[number]
                    event.set()

    def page(self, layer: Layer, number: int) -> array[int]:
        """A page that was loaded not long ago. Should it have been shed since, the index has it as it was."""
        if number not in layer.pages:
            layer.adopt(
                number, None if layer.missing is ABSENT else self.index.page(layer.id, number)
            )
        return layer.pages[number]

    def drop_layer(self, layer: Layer) -> None:
        """The layer is no more: its slots come free in the background, also after a crash in between."""
        layer.dead = True
        layer.changed = True
        self._by_name.pop(layer.name, None)
        if not layer.private:
            self.cool(layer)
        self.want_commit()

    async def _bury(self, layer: Layer) -> None:
        """Free what a dead layer holds, a piece at a time, then forget the layer."""
        number = 0
        while True:
            found = await trio.to_thread.run_sync(self.index.pages, layer.id, number, 256)
            numbers = {n for n, _ in found}
            # Pages in memory are newer than the index: empty those first.
            for n, raw in found:
                layer.adopt(n, raw)
            numbers.update(n for n, page in layer.pages.items() if page is not ABSENT)
            for n in numbers:
                self._empty_page(layer, n)
            await self.commit()
            if not found:
                break
            number = max(n for n, _ in found) + 1
        del self.layers[layer.id]
        self._layers_gone.add(layer.id)
        await self.commit()

    def _empty_page(self, layer: Layer, number: int) -> None:
        page = layer.writable(number)
        for i in range(PAGE_BLOCKS):
            self.clear_entry(layer, page, i)

    def clear_entry(self, layer: Layer, page: array[int], i: int) -> None:
        """Forget one block of a layer; its slots may be reused after the next commit."""
        entry = entry_at(page, i)
        if not entry.word:
            return
        layer.sectors -= entry.valid.bit_count()
        put_entry(page, i, Entry(0))
        for slot in entry.slots:
            if slot >= 0:
                self.free_slot(layer, slot)

    # -- slots ------------------------------------------------------------------------------------------------

    def take_slot(self, layer: Layer, block: int) -> int:
        """A slot for a block of the layer, or -1: then ask for :meth:`room` and try again.

        Whoever puts it into the layer's page counts it in ``layer.slots``; until then it is :meth:`abandon`-ed.
        """
        slot = self.placement.take()
        if self.placement.free < self._low:
            self._evict_wanted.set()
        if slot is None:
            return -1
        key = block_key(layer.id, block)
        self.owner[slot] = key
        self.ready[slot] = 0
        self.placement.insert(slot, key, held=layer.held)
        if slot >= self.meta.frontier:
            self.meta.frontier = slot + 1
        self.sums.fresh(slot)
        self.want_commit()
        return slot

    def free_slot(self, layer: Layer, slot: int) -> None:
        """The slot's content is no longer named in memory; it is reused once that is durable and nobody reads it."""
        layer.slots -= 1
        self.abandon(slot)

    def abandon(self, slot: int) -> None:
        """The same for a slot that was taken and never entered in a page."""
        if slot in self._evicting:
            self._evicting.discard(slot)
        else:
            self.placement.quarantine(slot)
        self._forget_slot(slot)

    def _forget_slot(self, slot: int) -> None:
        self.ready[slot] = 0
        self.sums.forget(slot)
        self._leaving += 1
        self._freed.append(slot)
        self.want_commit()

    def take_slot_soon(self) -> None:
        """Somebody needs a slot and there is none: start to evict."""
        self._evict_wanted.set()

    async def load_sums(self, slots: Iterable[int]) -> None:
        """Bring the checksums of slots into memory, for whoever is about to change some of them."""
        missing = [s for s in set(slots) if self.sums.state[s] == UNKNOWN]
        if missing:
            found = await trio.to_thread.run_sync(self.index.sums, missing)
            for slot in missing:
                self.sums.adopt(slot, found.get(slot))

    def load_sums_now(self, slot: int) -> None:
        """The same for one slot, at once: the index is a page fault away at most."""
        if self.sums.state[slot] == UNKNOWN:
            self.sums.adopt(slot, self.index.sums([slot]).get(slot))

    async def room(self, slots: int) -> None:
        """Wait until that many slots can be had. Raises :class:`CacheFull` when no eviction can bring them."""
        while self.placement.free < slots:
            coming = self._leaving or self._evicting or self.placement.evictable()
            coming = coming or any(x.slots for x in self.layers.values() if x.dead)
            if self.scan is None and not coming:
                raise CacheFull
            self._evict_wanted.set()
            event = self._freed_some
            with trio.move_on_after(0.5):
                await event.wait()

    def served(self) -> int:
        """Changes whenever anybody reads or writes."""
        reads = sum(view.hits + view.misses for view in self.views)
        return reads + self.journal.head.sequence

    def spare_slots(self) -> int:
        """Slots that are free, or will be when what is clean is evicted."""
        return self.placement.free + self.placement.evictable() + self._leaving

    def evicting(self, slot: int) -> bool:
        """Whether the slot was chosen to be evicted just now."""
        return slot in self._evicting

    def was_touched(self, slot: int) -> bool:
        """Whether the block was asked for since the last time this was called or a hand of the placement passed."""
        state = self.placement.state[slot]
        self.placement.state[slot] = state & ~TOUCHED
        return bool(state & TOUCHED)

    def heat(self, regions: list[tuple[int, int]]) -> None:
        """Put regions on record as hot: durable after the next sync, and in the index from the next commit on."""
        if self.failed is None:
            for layer, region in regions:
                self.note(ops.hot(layer, region))
        self._hot_new.update(regions)
        self._hot_gone.difference_update(regions)

    def adopt_hot(self, regions: set[tuple[int, int]], *, keep: bool) -> None:
        """At recovery: regions that are on record stay so, or are settled and leave it with the next commit."""
        (self._hot_new if keep else self._hot_gone).update(regions)

    def cool(self, layer: Layer) -> None:
        """Nothing written to the origin of this layer is undurable or under way: its regions are hot no longer."""
        cold = {r for r in self.hot | self._hot_new if r[0] == layer.id}
        self.hot -= cold
        self._hot_new -= cold
        self._hot_gone |= cold

    def pin(self) -> int:
        """Keep every slot from being reused until :meth:`unpin`: somebody still reads from the map."""
        self._next_pin += 1
        self._pins[self._next_pin] = self._clock
        return self._next_pin

    def unpin(self, token: int) -> None:
        """Nothing is read from the map any more under this token of :meth:`pin`."""
        del self._pins[token]
        if self._limbo:
            self._release()

    def _release(self) -> None:
        oldest = min(self._pins.values(), default=self._clock + 1)
        while self._limbo and self._limbo[0][0] < oldest:
            _, slots = self._limbo.pop(0)
            for slot in slots:
                self.placement.release(slot)
            self._leaving -= len(slots)
        event, self._freed_some = self._freed_some, trio.Event()
        event.set()

    # -- the journal ------------------------------------------------------------------------------------------

    def note(self, op: bytes) -> None:
        """Add a record to the frame that the next :meth:`publish` writes."""
        self._ops.append(op)
        self._ops_bytes += len(op)

    def write_later(self, slot: int, mask: int, at: int, data: memoryview) -> None:
        """Have :meth:`publish` write ``data`` behind the records: sectors whose data was acknowledged are overwritten.

        Killed in between, replay finds the old checksum and the new, and one of them fits.
        """
        first = (at - self.device.at(slot)) // SECTOR + slot * SECTORS
        before = self.sums.values[first : first + len(data) // SECTOR].tolist()
        self._late.append((slot, mask, at, data, before))

    def journal_room(self, length: int) -> bool:
        """Whether records for a write of ``length`` bytes can be journaled now."""
        return self.journal.fits(self._ops_bytes + 256 + (length >> 7))

    def publish(self) -> None:
        """Hand the records to the kernel: from now on a killed daemon has them.

        Raises OSError; the device has failed then, or, while its journal is full, they are kept.
        """
        if not self._ops:
            return
        late, self._late = self._late, []
        try:
            self.check()
            self.journal.append(b"".join(self._ops))
            self._ops.clear()
            self._ops_bytes = 0
            for _, _, at, data, _ in late:
                self.device.write(at, data)
        except (OSError, JournalFull) as error:
            self._undo(late)
            if isinstance(error, JournalFull):
                raise OSError(errno.ENOSPC, "the intent journal is full") from None
            self.fail(error, taken=True)
            # What they say is in memory, for whoever takes the device back.
            self._ops.clear()
            self._ops_bytes = 0
            raise
        if self.journal.used * 2 > self.device.layout.journal_size:
            self._wanted.set()

    def _undo(self, late: list[tuple[int, int, int, memoryview, list[int]]]) -> None:
        """What was to be overwritten and was not is what it was, acknowledged; the rest is as its checksum says."""
        for slot, mask, at, data, before in reversed(late):
            self.ready[slot] &= ~mask
            first = (at - self.device.at(slot)) // SECTOR + slot * SECTORS
            try:
                found = checksums(self.device.read(at, len(data)))
            except OSError:
                continue
            for n, value in enumerate(before):
                if found[n] == value:
                    self.sums.values[first + n] = value

    def check(self) -> None:
        """Raises OSError(EIO) once the device has failed: what is durable there must not be written over."""
        if self.failed is not None:
            raise OSError(errno.EIO, f"cache device: {self.failed.strerror}")

    def note_reading(self, *, good: bool) -> None:
        """A slot could be read, or nothing of it: a device of which nothing can be read has failed."""
        self._unreadable = 0 if good else self._unreadable + 1
        if self._unreadable >= UNREADABLE_MOST:
            self.fail(OSError(errno.EIO, "it cannot be read"))

    def fail(self, error: OSError, *, taken: bool = False) -> None:
        """The device cannot be used: from now on it takes nothing new, and what it has is checked at each reading.

        No room for a block, in a sparse file, is no failure; no room for what was taken already is one.
        """
        if self.failed is None and (taken or error.errno != errno.ENOSPC):
            log.error("cache device %s failed: %s", self.device.path, error.strerror or error)
            self.failed = error
            self._alive_again()  # a commit under way may be about to say so
            self.forget_ready()  # what is in memory may never have reached the device, and go from memory unseen
            self.broke.set()

    # -- durability -------------------------------------------------------------------------------------------

    async def _sync(self) -> None:
        self.publish()
        self.check()
        if self._syncer.pending:
            with self._syncing():
                await self._syncer.finish()
        self.syncing, self.open_sectors = self.open_sectors, {}
        with self._syncing():
            await self._syncer()

    async def revive(self, rewrite: Callable[[], Awaitable[None]]) -> None:
        """Take a device that has failed into use again, if it works. Raises OSError, and it stays failed.

        ``rewrite`` writes once more what may not have arrived since the last commit. Then all of it is synced, and
        committed: whatever the journal has lost is superfluous from there on. No sync or commit comes in between.
        """
        async with self.commit.suspended(), self.sync.suspended():
            if self._syncer.pending:
                with contextlib.suppress(OSError):  # that we know
                    await self._syncer.finish()
            await rewrite()
            self._alive_again()
            changes, succeeded, failed = self.snapshot()
            try:
                with trio.CancelScope(shield=True):
                    await self._syncer()
                    await self.index.commit(changes)
            except BaseException:
                failed()
                raise
            self.open_sectors, self.syncing = {}, {}  # all are durable where they are
            succeeded()
            self.failed, self.broke = None, trio.Event()
            self.forget_ready()

    @contextlib.contextmanager
    def _syncing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fail(error, taken=True)  # a later sync would succeed, and lie
            raise
        finally:
            if not self._syncer.pending:
                self.syncing = {}

    def sync_now(self) -> bool:
        """:meth:`sync`, if the device is done in a moment. False: ask for a sync. Raises OSError."""
        if self.sync.running or not self._syncer.quick or self._syncer.pending:
            return False
        self.publish()
        self.check()
        self.syncing, self.open_sectors = self.open_sectors, {}
        with self._syncing():
            if self._syncer.now():
                return True
            if not self._syncer.pending:
                self.open_sectors = self.syncing  # nothing was begun
        return False

    async def synced(self) -> None:
        """Wait until no sync is under way. Raises OSError."""
        if self._syncer.pending:
            await self.sync()
        else:
            await self.sync.idle()

    def want_commit(self) -> None:
        """Something has to become durable, within COMMIT_SECONDS."""
        if self.sums.pending >= COMMIT_SLOTS:
            self._wanted.set()

    def changed(self) -> bool:
        """Whether a commit would have anything to store, or to free."""
        return bool(
            self._closing
            or self._freed
            or self.sums.pending
            or self._records_changed
            or self._hot_gone
            or self._layers_gone
            or self.journal.used
            or self._ops
            or any(x.changed for x in self.layers.values())
        )

    def snapshot(self) -> tuple[Changes, Callable[[], None], Callable[[], None]]:
        """What a commit stores, as of now, and what to do when it succeeded or failed. Between two awaits."""
        with contextlib.suppress(
            OSError
        ):  # a full journal: what has no room there is in this commit
            self.publish()
        mark = self.journal.mark()
        meta = Meta(**vars(self.meta))
        meta.journal_offset, meta.journal_sequence = mark[0].offset, mark[0].sequence
        changes = Changes(meta)
        dirty: list[tuple[Layer, set[int]]] = []
        for layer in self.layers.values():
            if layer.dirty:
                dirty.append((layer, layer.dirty))
                for number in layer.dirty:
                    key = PAGE_KEY.pack(layer.id, number)
                    changes.pages.append((key, layer.pages[number].tobytes()))
                layer.dirty = set()
            if layer.changed:
                changes.layers[layer.id] = layer.record()
                layer.changed = False
        changes.pages.sort()
        changes.sums = self.sums.take()
        gone, self._layers_gone = self._layers_gone, set()
        changes.layers.update((ident, None) for ident in gone)
        records, self._records_changed = self._records_changed, set()
        changes.records = {key: self._records.get(key) for key in records}
        hot_new, self._hot_new = self._hot_new, set()
        hot_gone, self._hot_gone = self._hot_gone, set()
        changes.hot = [(PAGE_KEY.pack(*r), True) for r in hot_new if r not in hot_gone]
        changes.hot += [(PAGE_KEY.pack(*r), False) for r in hot_gone]
        freed, self._freed = self._freed, []
        clock = self._clock
        self._clock += 1

        def succeeded() -> None:
            self.journal.trim(mark)
            if freed:
                self._limbo.append((clock, freed))
                self._release()
            self._shed_pages()
            self.sums.shed()

        def failed() -> None:
            for layer, numbers in dirty:
                layer.dirty |= numbers
            for ident in changes.layers:
                if ident in self.layers:
                    self.layers[ident].changed = True
            self.sums.put_back(changes.sums)
            self._layers_gone |= gone
            self._records_changed |= records
            self._hot_gone |= hot_gone - self._hot_new  # heated again meanwhile
            self._hot_new |= hot_new - self._hot_gone
            self._freed = freed + self._freed

        return changes, succeeded, failed

    async def _commit(self) -> None:
        """Data first, then the index; then slots given up before may be used again."""
        if not self.changed():
            return
        changes, succeeded, failed = self.snapshot()
        try:
            await self.sync()
            self.check()  # no await from here to where the index takes it: see _store_past_device()
            await self.index.commit(changes)
        except BaseException as error:
            failed()
            if isinstance(error, IndexFault):
                self.index_error = error.strerror
            raise
        self.index_error = None
        succeeded()

    async def commit_records(self) -> None:
        """Make records, and the end of layers, durable: as :meth:`commit`, or without a device that has failed.

        Raises OSError.
        """
        if self.failed is None:
            try:
                await self.commit()
            except OSError:
                if self.failed is None:
                    raise
        if self.failed is not None:
            await self._commit_past_device()

    async def give_up(self, layer: Layer) -> None:
        """While the device has failed: have it on record that it has nothing of this clean layer any more.

        Its origin is about to be written, and the device cannot be told of it. Should the device work again, the layer
        is there again, as it is in memory then. Raises OSError: the origin must not be written.
        """
        while self.failed is not None and not layer.given_up:
            failed = self.failed
            self._giving_up.add(layer.id)
            await self._commit_past_device()
            layer.changed = True
            layer.given_up = self.failed is failed and layer.id in self._giving_up

    def _alive_again(self) -> None:
        """From the next commit of everything on, layers that were given up are not."""
        self._giving_up.clear()
        for layer in self.layers.values():
            layer.changed = layer.changed or layer.given_up
            layer.given_up = False

    async def _store_past_device(self) -> None:
        """The part of a commit that names nothing on the device. The index takes commits in the order of the calls."""
        records, self._records_changed = self._records_changed, set()
        changes = Changes(None, records={key: self._records.get(key) for key in records})
        for layer in self.layers.values():
            if layer.dead or layer.id in self._giving_up:
                changes.layers[layer.id] = replace(layer.record(), dead=True)
        try:
            await self.index.commit(changes)
        except BaseException:
            self._records_changed |= records
            raise

    def _shed_pages(self) -> None:
        """Pages of private layers stay: there are few, and every read asks for them first."""
        shared = [x for x in self.layers.values() if not x.private]
        excess = sum(len(x.pages) for x in shared) - PAGES_KEPT
        if excess <= 0:
            return
        for layer in shared:
            drop = [n for n in layer.pages if n not in layer.dirty][: max(0, excess)]
            for number in drop:
                del layer.pages[number]
            excess -= len(drop)

    # -- records of the layers above --------------------------------------------------------------------------

    def record(self, kind: str, name: str) -> dict[str, Any] | None:
        """What was stored under that kind and name; do not change it in place."""
        return self._records.get((kind, name))

    def records(self, kind: str) -> dict[str, dict[str, Any]]:
        """All records of a kind, by name."""
        return {n: v for (k, n), v in self._records.items() if k == kind}

    def put_record(self, kind: str, name: str, value: dict[str, Any] | None) -> None:
        """Store or (None) remove a record: in memory now, durable after :meth:`commit`."""
        if value is None:
            self._records.pop((kind, name), None)
        else:
            self._records[kind, name] = value
        self._records_changed.add((kind, name))

    def adopt_records(self, records: dict[tuple[str, str], dict[str, Any]]) -> None:
        """At recovery: what the index has."""
        self._records = records

    # -- background -------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Commit, evict and clean up until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._committer)
            nursery.start_soon(self._evictor)
            nursery.start_soon(self._residency)
            nursery.start_soon(self._undertaker)
            nursery.start_soon(self._scanner)
            task_status.started()

    async def _committer(self) -> None:
        told = False
        while True:
            with trio.move_on_after(COMMIT_SECONDS):
                await self._wanted.wait()
            self._wanted = trio.Event()
            try:
                if self.failed is None:
                    await self.commit()
            except OSError as error:
                if self.failed is None and not told:
                    log.error("index commit failed, trying again: %s", error.strerror or error)
                    told = True
                await trio.sleep(COMMIT_RETRY_SECONDS)
            else:
                if told and self.failed is None:
                    log.info("the index can be written again")
                    told = False

    async def _undertaker(self) -> None:
        told = False
        while True:
            for layer in [x for x in self.layers.values() if x.dead and self.failed is None]:
                try:
                    await self._bury(layer)
                    told = False
                except OSError as error:
                    if self.failed is None and not told:
                        log.error("freeing %s failed, trying again: %s", layer.name, error.strerror)
                        told = True
            await trio.sleep(COMMIT_RETRY_SECONDS / 4)

    async def _evictor(self) -> None:
        told = False
        while True:
            await self._evict_wanted.wait()
            self._evict_wanted = trio.Event()
            try:
                await self._evict_some()
            except OSError as error:
                if self.failed is None and not told:
                    log.error("nothing can be evicted, trying again: %s", error.strerror or error)
                    told = True
                await trio.sleep(COMMIT_RETRY_SECONDS)
                self._evict_wanted.set()
            else:
                told = False

    async def _evict_some(self) -> None:
        if self.failed is not None:
            return  # nothing is stored either
        missing = self._low - self.placement.free - self._leaving
        if missing > 0 and self.scan is None:
            await self._evict(self.placement.victims(missing))
        if self._freed:
            await self.commit()

    async def _evict(self, victims: list[int]) -> None:
        self._evicting.update(victims)
        try:
            for slot in victims:
                key = self.owner[slot]
                layer = self.layers.get(layer_of_key(key))
                if layer is None or slot not in self._evicting:
                    continue
                number, i = divmod(block_of_key(key), PAGE_BLOCKS)
                if number not in layer.pages:
                    await self.load(layer, [number])
                # Whoever freed the slot in the meantime has taken it out of the set.
                if slot in self._evicting and self.evict_slot(layer, number, i, slot):
                    self._evicting.discard(slot)
        finally:
            for slot in self._evicting:
                self.placement.keep(slot)
                layer = self.layers.get(layer_of_key(self.owner[slot]))
                if layer is not None and layer.held:
                    self.placement.hold(slot)
            self._evicting.clear()

    def evict_slot(self, layer: Layer, number: int, i: int, slot: int) -> bool:
        """Take a clean block, whose slot is quarantined, out of its layer; what is known to be zero stays known."""
        word = self.page(layer, number)[i]
        if slot_of(word) != slot or layer.held:
            return False
        layer.sectors -= data_of(word).bit_count()
        layer.writable(number)[i] = zeros_only(word)
        self.placement.evicted(slot, self.owner[slot])
        layer.slots -= 1
        self._forget_slot(slot)
        self.evicted_blocks += 1
        return True

    def retire(self, layer: Layer, block: int, slot: int) -> None:
        """Give up a damaged clean block, and its slot for as long as the daemon runs."""
        number, i = divmod(block, PAGE_BLOCKS)
        page = layer.pages.get(number)
        if page is None or slot_of(page[i]) != slot or slot in self._evicting:
            return
        word = page[i]
        layer.sectors -= data_of(word).bit_count()
        layer.writable(number)[i] = zeros_only(word)
        if self.failed is not None:  # there is nothing wrong with this slot more than with others
            self.free_slot(layer, slot)
            return
        layer.slots -= 1
        self.ready[slot] = 0
        self.placement.quarantine(slot)

    async def _scanner(self) -> None:
        while self.scan is not None:
            try:
                await self.scan()
            except OSError as error:
                log.error("looking for free slots failed, trying again: %s", error)
                await trio.sleep(COMMIT_RETRY_SECONDS)
                continue
            self.scan = None
            self._evict_wanted.set()

    async def _residency(self) -> None:
        """When reads through the map had to wait for the device, trust no page to be in memory any more."""
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
        while True:
            await trio.sleep(RESIDENCY_SECONDS)
            now = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
            if now != faults:
                faults = now
                self.forget_ready()

    def forget_ready(self) -> None:
        """Check and fetch every sector again before it is served from the map."""
        self._ready_map.madvise(mmap.MADV_DONTNEED)  # private and anonymous: reads as zeros again
        self.forgotten += 1

    def note_ready(self, slot: int, mask: int, since: int) -> None:
        """Sectors of a slot were written by a thread that began when `forgotten` was ``since``.

        If all was forgotten meanwhile the device may have failed, and lost them after they were written.
        """
        if self.failed is None and self.forgotten == since:
            self.ready[slot] |= mask

    # -- life -------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """Figures for ``forebay cache info``; bytes unless named otherwise."""
        layout = self.device.layout
        clean = sum(x.slots for x in self.layers.values() if not x.private)
        private = sum(x.slots for x in self.layers.values() if x.private)
        return {
            "device": str(self.device.path),
            "uuid": self.uuid,
            "format": self.meta.format,
            "size": layout.size,
            "block_size": layout.block_size,
            "slots": layout.slots,
            "free_slots": self.placement.free,
            "used_bytes": (clean + private) * BLOCK,
            "clean_bytes": clean * BLOCK,
            "private_bytes": private * BLOCK,
            "journal_bytes": self.journal.used,
            "evicted_blocks": self.evicted_blocks,
            "damaged_slots": self.damaged_slots,
            "state": self._state(),
            "error": self.failed.strerror if self.failed else self.index_error,
        }

    def _state(self) -> str:
        if self.failed is not None:
            return "failed"
        if self.index_error is not None:
            return "unrecorded"
        return "recovering" if self.scan else "ok"

    async def close(self) -> None:
        """Commit, mark the end as clean, let go of device and index."""
        self.meta.clean = self._closing = True
        try:
            await self.commit_records()
        except OSError as error:
            log.error("the last commit failed, the next start will recover: %s", error)
        self.release()

    def release(self) -> None:
        """Let go of device and index without a commit, as a crash would."""
        self._syncer.close()
        self.index.close()
        self.device.close()


def boot_id() -> str:
    """The running kernel's boot id: what the page cache held is gone when it changes."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
