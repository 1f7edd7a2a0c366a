"""Which slot a block goes to, and which block leaves when there is none: see cache/PLACEMENT.md.

S3-FIFO on one byte per slot. A slot's byte says whether it is free, on *probation* (new, or not asked for again since)
or in *main* (has proved itself), held, or on its way out. The queues are the slots themselves in slot order, with a
circular hand for each; nothing is linked, moved or allocated per block. The hit path is `state[slot] |= TOUCHED` and
nothing else: the hands find out later what was touched.

The module knows slots (0 .. slots - 1) and opaque integer keys of blocks. It does no I/O and never waits.
"""

from array import array
from collections import deque
from itertools import product
from typing import Final

# One slot's byte. Only the hit path's TOUCHED may be set from outside, in any state.
FREE: Final = 0x00
TOUCHED: Final = 0x01
HELD: Final = 0x02  # dirty, private or pinned: no search ever matches it
PROBATION: Final = 0x10
MAIN: Final = 0x20
QUARANTINED: Final = 0x40  # leaving: not reusable before its removal is durable
TAKEN: Final = 0x80  # given by take(), not yet settled by insert()
UNSCANNED: Final = 0x84  # below the frontier: free or not, recovery has yet to say

_DETAIL: Final = 0x0C  # on probation: which of two generations; in main: how often the hand found it touched, 0 to 3
_STEP: Final = 0x04
_LEVELS: Final = (0x00, 0x04, 0x08, 0x0C)

_REGION_BITS: Final = 12
_REGION: Final = 1 << _REGION_BITS  # slots one step of a hand looks at: 3 us of bytes.translate
_PATIENCE: Final = 256  # fruitless steps before victims() takes what is there: about 1 ms
_PROBATION_SHARE: Final = 10  # one evictable block in so many is on probation
_FRESH_SHARE: Final = 40  # one slot in so many is fresh, see _settle()
_FRESH_MAX: Final = 1024  # but no more than 64 MiB of blocks
_GHOST_SHARE: Final = 4  # one slot in so many gets an entry in a generation of ghosts
_GHOST_MAX: Final = 1 << 22  # entries: 8 MiB
_MARK_BITS: Final = 16  # of a key in a generation of ghosts
_MARK: Final = (1 << _MARK_BITS) - 1
_RECYCLED_MAX: Final = 1 << 14  # free slots remembered by number; the others are found by search


class _Pool:
    """The evictable slots of one kind: how many lie in each region, and the hand that goes round them."""

    def __init__(self, slots: int, untouched: int) -> None:
        regions = (slots + _REGION - 1) >> _REGION_BITS
        self.untouched = untouched
        self.total = 0
        self.hand = 0
        self._slots = slots
        self._counts = [0] * regions
        self._present = bytearray(regions)

    def grow(self, slots: int) -> None:
        """There are `slots` now."""
        more = ((slots + _REGION - 1) >> _REGION_BITS) - len(self._counts)
        self._slots = slots
        self._counts += [0] * more
        self._present += bytes(more)

    def add(self, slot: int, count: int = 1) -> None:
        """Count `count` slots of the region of `slot` in."""
        region = slot >> _REGION_BITS
        self._counts[region] += count
        self._present[region] = 1
        self.total += count

    def drop(self, slot: int, count: int = 1) -> None:
        """Count `count` slots of the region of `slot` out."""
        region = slot >> _REGION_BITS
        self._counts[region] -= count
        self.total -= count
        if not self._counts[region]:
            self._present[region] = 0

    def span(self) -> tuple[int, int]:
        """Move the hand on to a region with any slot of the pool: the hand and the region's end."""
        if self.hand >= self._slots:
            self.hand = 0
        region = self.hand >> _REGION_BITS
        if not self._counts[region]:
            region = self._present.find(1, region)
            if region < 0:
                region = self._present.find(1)
            self.hand = region << _REGION_BITS
        return self.hand, min((region + 1) << _REGION_BITS, self._slots)


class _Ghost:
    """Keys of blocks evicted from probation, remembered as 16-bit fingerprints in two generations.

    A full generation is forgotten at once, so a key is remembered for at least one and at most two generations of
    evictions, unless another key falls on its entry. A key never seen is taken for a ghost once in 2 ** 15.
    """

    def __init__(self, entries: int) -> None:
        self._bits = max(4, (entries - 1).bit_length())
        self._limit = max(1, entries)
        self._young = self._blank()
        self._old = self._blank()
        self._added = 0

    def _blank(self) -> "array[int]":
        return array("H", (0,)) * (1 << self._bits)

    def _place(self, key: int) -> tuple[int, int]:
        mixed = hash((key, key >> 61))  # mixes all bits, which an integer's own hash does not
        return (mixed >> _MARK_BITS) & ((1 << self._bits) - 1), (mixed & _MARK) or 1

    def add(self, key: int) -> None:
        if self._added >= self._limit:
            self._old, self._young = self._young, self._blank()
            self._added = 0
        entry, mark = self._place(key)
        self._young[entry] = mark
        self._added += 1

    def take(self, key: int) -> bool:
        """Whether `key` is remembered; it no longer is afterwards."""
        entry, mark = self._place(key)
        for generation in (self._young, self._old):
            if generation[entry] == mark:
                generation[entry] = 0
                return True
        return False


def _ageing() -> bytes:
    """What main's hand makes of each byte it passes: touched counts up, untouched counts down."""
    table = bytearray(range(256))
    for level in _LEVELS:
        table[MAIN | level | TOUCHED] = MAIN | min(level + _STEP, _LEVELS[-1])
        table[MAIN | level] = MAIN | max(level - _STEP, 0)
    return bytes(table)


def _promotion(generation: int) -> bytes:
    """What probation's hand makes of each byte it passes: what was touched moves to main."""
    table = bytearray(range(256))
    table[PROBATION | generation | TOUCHED] = MAIN
    return bytes(table)


_AGEING: Final = _ageing()
_PROMOTION: Final = {generation: _promotion(generation) for generation in _LEVELS[:2]}


class Placement:
    """The states of all slots, and the choice among them.

    `slots` is the number of slots of the cache device. With a `frontier`, slots below it are unknown until adopt()ed,
    and take() gives only slots from there on until scanned() says that recovery has adopted all there is. Without one
    every slot that is not adopted is free.

    Raises ValueError where a call does not fit the slot's state (a slot given back twice, say): always the caller's
    mistake, and better loud than two blocks in one slot.
    """

    def __init__(self, slots: int, *, frontier: int = 0) -> None:
        if slots < 1 or not 0 <= frontier <= slots:
            raise ValueError(f"{slots} slots with the frontier at {frontier}")
        self.slots = slots
        self.state = bytearray(slots)
        for start in range(0, frontier, _REGION):  # in pieces: a second terabyte's worth stays away
            length = min(_REGION, frontier - start)
            self.state[start : start + length] = bytes((UNSCANNED,)) * length
        self.free = slots - frontier
        self.examined = 0  # bytes of `state` that searches have looked at: the cost of the policy
        self._frontier = frontier
        self._unscanned = frontier
        self._scanned = frontier == 0
        self._free_hand = frontier
        self._recycled: deque[int] = deque()
        self._fresh: deque[int] = deque()
        self._fresh_limit = min(_FRESH_MAX, slots // _FRESH_SHARE)
        self._ghost = _Ghost(min(_GHOST_MAX, slots // _GHOST_SHARE))
        self._main = _Pool(slots, MAIN)
        self._leaving = _Pool(slots, PROBATION)  # the generation that probation's hand goes through
        self._joining = _Pool(slots, PROBATION | _STEP)  # the one that new blocks join
        self._pools: list[_Pool | None] = [None] * 256
        for level, touched in product(_LEVELS, (0, TOUCHED)):
            self._pools[MAIN | level | touched] = self._main
        for pool, touched in product((self._leaving, self._joining), (0, TOUCHED)):
            self._pools[pool.untouched | touched] = pool

    def grow(self, slots: int) -> None:
        """The device has `slots` slots now: the new ones are free. `state` stays the same object."""
        more = slots - self.slots
        if more < 0:
            raise ValueError(f"{self.slots} slots cannot become {slots}")
        self.state += bytes(more)
        self.slots = slots
        self.free += more
        self._fresh_limit = min(_FRESH_MAX, slots // _FRESH_SHARE)
        self._ghost = _Ghost(min(_GHOST_MAX, slots // _GHOST_SHARE))  # what it remembered is lost
        for pool in (self._main, self._leaving, self._joining):
            pool.grow(slots)

    # Recovery

    def adopt(self, slot: int, *, held: bool) -> None:
        """Recovery found a block in `slot`: it enters main, untouched (a hit that came earlier still counts) or held.

        Ignored for a slot below the frontier whose state is known by now: the scan's view of the index may be older.
        """
        was = self.state[slot]
        if was & ~TOUCHED == UNSCANNED:
            self._unscanned -= 1
            if self._scanned:
                self.free -= 1
        elif was & ~TOUCHED == FREE and slot >= self._frontier:
            self.free -= 1
        else:
            return
        self.state[slot] = MAIN | (was & TOUCHED) | (HELD if held else 0)
        if not held:
            self._main.add(slot)

    def scanned(self) -> None:
        """Recovery has adopted all occupied slots: the others below the frontier are free."""
        if not self._scanned:
            self._scanned = True
            self.free += self._unscanned

    # Free slots

    def take(self) -> int | None:
        """A free slot, no longer free and not evictable until insert() or release(); None where there is none."""
        if not self.free:
            return None
        slot = self._find_free()
        if self.state[slot] & ~TOUCHED == UNSCANNED:
            self._unscanned -= 1
        self.free -= 1
        self.state[slot] = TAKEN
        return slot

    def _find_free(self) -> int:
        while self._recycled:
            slot = self._recycled.popleft()
            if self.state[slot] & ~TOUCHED == FREE:
                return slot
        unscanned = self._unscanned if self._scanned else 0
        for value, there in ((FREE, self.free > unscanned), (UNSCANNED, unscanned > 0)):
            if there and (slot := self._search(value)) >= 0:
                return slot
            # A touch of a slot without a block changes nothing but the value to look for.
            if there and (slot := self._search(value | TOUCHED)) >= 0:
                return slot
        raise AssertionError(f"{self.free} slots counted free, none found")

    def _search(self, value: int) -> int:
        """The next slot in that state from where the last search ended, or -1."""
        hand = self._free_hand
        slot = self.state.find(value, hand)
        self.examined += (slot + 1 if slot >= 0 else self.slots) - hand
        if slot < 0 and hand:
            slot = self.state.find(value, 0, hand)
            self.examined += slot + 1 if slot >= 0 else hand
        if slot >= 0:
            self._free_hand = slot + 1
        return slot

    def release(self, slot: int) -> None:
        """The slot is free again: its removal is durable, or it was taken and never used."""
        state = self.state[slot]
        if not state & QUARANTINED and state & ~TOUCHED != TAKEN:
            raise ValueError(f"slot {slot} is released in state {state:#04x}")
        self.state[slot] = FREE
        self.free += 1
        if len(self._recycled) < _RECYCLED_MAX:
            self._recycled.append(slot)

    # Blocks

    def insert(self, slot: int, key: int, *, held: bool) -> None:
        """The taken `slot` now holds block `key`: on probation, or in main where it was evicted from not long ago."""
        if self.state[slot] & ~TOUCHED != TAKEN:
            raise ValueError(f"slot {slot} is inserted into in state {self.state[slot]:#04x}")
        pool = self._main if self._ghost.take(key) else self._joining
        self.state[slot] = pool.untouched | (HELD if held else 0)
        if not held:
            pool.add(slot)
        self._settle(slot)

    def _settle(self, slot: int) -> None:
        """Forget what touched a block right after it came in.

        A reader that asks for 4 KiB at a time touches a new block 15 times more within moments: that is one use, and a
        scan made of it must not look like popularity. So the touch of a block counts only from when a number of other
        blocks came in after it.
        """
        self._fresh.append(slot)
        if len(self._fresh) > self._fresh_limit:
            self.state[self._fresh.popleft()] &= ~TOUCHED & 0xFF

    def hold(self, slot: int) -> None:
        """The block must stay (dirty, private, pinned), until unhold(). Holds do not nest."""
        state = self.state[slot]
        if state & ~TOUCHED == UNSCANNED:
            self.adopt(slot, held=True)
        elif not state & HELD:
            self._evictable_pool(slot).drop(slot)
            self.state[slot] = state | HELD

    def unhold(self, slot: int) -> None:
        """The block may be evicted; one on probation starts it anew."""
        state = self.state[slot]
        if state & ~TOUCHED == UNSCANNED:
            self.adopt(slot, held=False)
        elif state & HELD:
            self._admit(slot, state & ~HELD)
        else:
            self._evictable_pool(slot)

    def _admit(self, slot: int, state: int) -> None:
        pool = self._main if state & MAIN else self._joining
        self.state[slot] = state if state & MAIN else pool.untouched | (state & TOUCHED)
        pool.add(slot)

    def _evictable_pool(self, slot: int) -> _Pool:
        pool = self._pools[self.state[slot]]
        if pool is None:
            raise ValueError(f"slot {slot} holds no block: state {self.state[slot]:#04x}")
        return pool

    # Leaving

    def evictable(self) -> int:
        """How many slots victims() could give, exactly."""
        return self._main.total + self._leaving.total + self._joining.total

    def victims(self, count: int) -> list[int]:
        """Choose up to `count` evictable slots and quarantine them; none only if evictable() is 0.

        After _PATIENCE regions without one it settles for blocks that it would rather keep.
        """
        chosen: list[int] = []
        patience = _PATIENCE
        while len(chosen) < count and self.evictable():
            found = len(chosen)
            pool, most = self._turn()
            self._sweep(pool, min(most, count - found), chosen, forced=patience <= 0)
            patience -= len(chosen) == found
            assert patience > -_PATIENCE, "blocks are counted where there are none"
        return chosen

    def _turn(self) -> tuple[_Pool, int]:
        """The pool that gives the next victims, and how many it should give at most."""
        probation = self._leaving.total + self._joining.total
        surplus = probation - max(1, self.evictable() // _PROBATION_SHARE)
        if self._main.total and surplus <= 0:
            return self._main, self._main.total
        if not self._leaving.total:
            self._leaving, self._joining = self._joining, self._leaving
        return self._leaving, max(1, surplus)

    def _sweep(self, pool: _Pool, most: int, chosen: list[int], *, forced: bool) -> None:
        """Take the hand of `pool` through the rest of one region, or until it has found `most` victims."""
        start, end = pool.span()
        self.examined += end - start
        while most and start < end:
            slot = self.state.find(pool.untouched, start, end)
            if slot < 0 and forced:
                slot = self._any_of(pool, start, end)
            stop = slot if slot >= 0 else end
            if stop > start:
                self._pass(pool, start, stop)
            if slot >= 0:
                self._quarantine(slot)
                chosen.append(slot)
                most -= 1
            start = stop + 1
        pool.hand = min(start, end)

    def _any_of(self, pool: _Pool, start: int, end: int) -> int:
        """The first slot of `pool` in the least used state there is between `start` and `end`, or -1."""
        for value in range(pool.untouched, pool.untouched + 16):
            if self._pools[value] is pool and (slot := self.state.find(value, start, end)) >= 0:
                return slot
        return -1

    def _pass(self, pool: _Pool, start: int, stop: int) -> None:
        """The hand leaves the slots from `start` to `stop` in place: age them, or promote what was touched."""
        window = self.state[start:stop]
        if pool is self._main:
            self.state[start:stop] = window.translate(_AGEING)
            return
        touched = window.count(pool.untouched | TOUCHED)
        if touched:
            self.state[start:stop] = window.translate(_PROMOTION[pool.untouched & _DETAIL])
            pool.drop(start, touched)
            self._main.add(start, touched)

    def _quarantine(self, slot: int) -> None:
        self._evictable_pool(slot).drop(slot)
        self.state[slot] = self.state[slot] & ~TOUCHED | QUARANTINED

    def quarantine(self, slot: int) -> None:
        """The block is gone by other means (overwritten, dropped): the slot waits for release()."""
        state = self.state[slot]
        if state & ~TOUCHED == UNSCANNED:
            self.adopt(slot, held=False)
        elif state & HELD:
            self._admit(slot, state & ~HELD)
        self._quarantine(slot)

    def keep(self, slot: int) -> None:
        """Undo a quarantine: the block could not be removed from the index, so it stays, evictable."""
        state = self.state[slot]
        if not state & QUARANTINED:
            raise ValueError(f"slot {slot} is kept in state {state:#04x}")
        self._admit(slot, state & ~QUARANTINED)

    def evicted(self, slot: int, key: int) -> None:
        """The quarantined `slot` held block `key`: should it be asked for again soon, it goes straight to main."""
        if self.state[slot] & PROBATION:
            self._ghost.add(key)
