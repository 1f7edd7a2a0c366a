# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which slot a block goes to, and which block leaves when there is none: see cache/PLACEMENT.md.

S3-FIFO on one byte per slot. A slot's byte says whether it is free, on *probation* (new, or not asked for again since)
or in *main* (has proved itself), held, or on its way out. The queues are the slots themselves in slot order, with a
circular hand for each; nothing is linked, moved or allocated per block. The hit path is `state[slot] |= TOUCHED` and
nothing else: the hands find out later what was touched.

The module knows slots (0 .. slots - 1) and opaque integer keys of blocks. It does no I/O and never waits.
"""

from collections import deque
from collections.abc import Callable
from itertools import product
from typing import Final

from forebay_cache.slots.queues import REGION, Ghosts, Queue

FREE: Final = 0x00
"""One slot's byte, as the following seven. Only TOUCHED may be set from outside, by the hit path, in any state."""
TOUCHED: Final = 0x01
HELD: Final = 0x02
"""Dirty, private or pinned: no search ever matches it."""
PROBATION: Final = 0x10
MAIN: Final = 0x20
QUARANTINED: Final = 0x40
"""Its block has left, or is leaving; not to be used again before that is durable."""
TAKEN: Final = 0x80
"""Given by take(), and nothing was put there by insert() yet."""
UNSCANNED: Final = 0x84
"""Below the frontier, and recovery has yet to say whether it is free."""

_DETAIL: Final = 0x0C
"""On probation: which of two generations; in main: how often the hand found it touched, 0 to 3."""
_STEP: Final = 0x04
_LEVELS: Final = (0x00, 0x04, 0x08, 0x0C)
_PATIENCE: Final = 256
"""After so many fruitless steps victims() takes what is there: about 1 ms."""
_PROBATION_SHARE: Final = 10
"""One evictable block in so many is on probation."""
_FRESH_SHARE: Final = 40
"""One slot in so many is fresh, see _settle() ..."""
_FRESH_MAX: Final = 1024
"""... but no more than 64 MiB of blocks."""
_GHOST_SHARE: Final = 4
"""One slot in so many gets an entry in a generation of ghosts ..."""
_GHOST_MAX: Final = 1 << 22
"""... of which there are no more than 8 MiB."""
_RECYCLED_MAX: Final = 1 << 14
"""Free slots remembered by number, at most; the others are found by search."""


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


def fresh_of(slots: int) -> int:
    """How many of the blocks that came in last are fresh."""
    return min(_FRESH_MAX, slots // _FRESH_SHARE)


class Placement:
    """The states of all slots, and the choice among them.

    `slots` is the number of slots of the cache device. With a `frontier`, slots below it are unknown until adopt()ed,
    and take() gives only slots from there on until scanned() says that recovery has adopted all there is. Without one
    every slot that is not adopted is free.

    Raises ValueError where a call does not fit the slot's state (a slot given back twice, say): always the caller's
    mistake, and better loud than two blocks in one slot.
    """

    def __init__(self, slots: int, *, frontier: int = 0, fresh: int | None = None) -> None:
        """`fresh`: how many blocks are fresh, see _settle(), where that is not what fresh_of() says."""
        if slots < 1 or not 0 <= frontier <= slots:
            raise ValueError(f"{slots} slots with the frontier at {frontier}")
        self.slots = slots
        self.state = bytearray(slots)
        for start in range(0, frontier, REGION):  # in pieces: a second terabyte's worth stays away
            length = min(REGION, frontier - start)
            self.state[start : start + length] = bytes((UNSCANNED,)) * length
        self.free = slots - frontier
        self.examined = 0
        """Bytes of `state` that searches have looked at: the cost of the policy."""
        self.on_forgotten: Callable[[int], None] | None = None
        """Told of each slot that was touched when that is forgotten, but for what a hand does."""
        self._frontier = frontier
        self._unscanned = frontier
        self._scanned = frontier == 0
        self._free_hand = frontier
        self._recycled: deque[int] = deque()
        self._fresh: deque[int] = deque()
        self._fresh_limit = fresh_of(slots) if fresh is None else fresh
        self._ghost = Ghosts(min(_GHOST_MAX, slots // _GHOST_SHARE))
        self._main = Queue(slots, MAIN)
        self._leaving = Queue(slots, PROBATION)  # the generation that probation's hand goes through
        self._joining = Queue(slots, PROBATION | _STEP)  # the one that new blocks join
        self._queues: list[Queue | None] = [None] * 256
        for level, touched in product(_LEVELS, (0, TOUCHED)):
            self._queues[MAIN | level | touched] = self._main
        for queue, touched in product((self._leaving, self._joining), (0, TOUCHED)):
            self._queues[queue.untouched | touched] = queue

    def grow(self, slots: int) -> None:
        """The device has `slots` slots now: the new ones are free. `state` stays the same object."""
        more = slots - self.slots
        if more < 0:
            raise ValueError(f"{self.slots} slots cannot become {slots}")
        self.state += bytes(more)
        self.slots = slots
        self.free += more
        self._fresh_limit = fresh_of(slots)
        self._ghost = Ghosts(min(_GHOST_MAX, slots // _GHOST_SHARE))  # what it remembered is lost
        for queue in (self._main, self._leaving, self._joining):
            queue.grow(slots)

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
        queue = self._main if self._ghost.take(key) else self._joining
        self.state[slot] = queue.untouched | (HELD if held else 0)
        if not held:
            queue.add(slot)
        self._settle(slot)

    def _settle(self, slot: int) -> None:
        """Forget what touched a block right after it came in.

        A reader that asks for 4 KiB at a time touches a new block 15 times more within moments: that is one use, and a
        scan made of it must not look like popularity. So the touch of a block counts only from when a number of other
        blocks came in after it.
        """
        self._fresh.append(slot)
        if len(self._fresh) > self._fresh_limit:
            self.forget_touch(self._fresh.popleft())

    def forget_touch(self, slot: int) -> bool:
        """Forget that the block in a slot was touched. True if it was."""
        state = self.state[slot]
        if not state & TOUCHED:
            return False
        self.state[slot] = state & ~TOUCHED
        if self.on_forgotten is not None:
            self.on_forgotten(slot)
        return True

    def hold(self, slot: int) -> None:
        """The block must stay (dirty, private, pinned), until unhold(). Holds do not nest."""
        state = self.state[slot]
        if state & ~TOUCHED == UNSCANNED:
            self.adopt(slot, held=True)
        elif not state & HELD:
            self._queue_of(slot).drop(slot)
            self.state[slot] = state | HELD

    def unhold(self, slot: int) -> None:
        """The block may be evicted; one on probation starts it anew."""
        state = self.state[slot]
        if state & ~TOUCHED == UNSCANNED:
            self.adopt(slot, held=False)
        elif state & HELD:
            self._admit(slot, state & ~HELD)
        else:
            self._queue_of(slot)

    def _admit(self, slot: int, state: int) -> None:
        queue = self._main if state & MAIN else self._joining
        self.state[slot] = state if state & MAIN else queue.untouched | (state & TOUCHED)
        queue.add(slot)

    def _queue_of(self, slot: int) -> Queue:
        queue = self._queues[self.state[slot]]
        if queue is None:
            raise ValueError(f"slot {slot} holds no block: state {self.state[slot]:#04x}")
        return queue

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
            queue, most = self._turn()
            self._sweep(queue, min(most, count - found), chosen, forced=patience <= 0)
            patience -= len(chosen) == found
            assert patience > -_PATIENCE, "blocks are counted where there are none"
        return chosen

    def _turn(self) -> tuple[Queue, int]:
        """The queue that gives the next victims, and how many it should give at most."""
        probation = self._leaving.total + self._joining.total
        surplus = probation - max(1, self.evictable() // _PROBATION_SHARE)
        if self._main.total and surplus <= 0:
            return self._main, self._main.total
        if not self._leaving.total:
            self._leaving, self._joining = self._joining, self._leaving
        return self._leaving, max(1, surplus)

    def _sweep(self, queue: Queue, most: int, chosen: list[int], *, forced: bool) -> None:
        """Take the hand of `queue` through the rest of one region, or until it has found `most` victims."""
        start, end = queue.span()
        self.examined += end - start
        while most and start < end:
            slot = self.state.find(queue.untouched, start, end)
            if slot < 0 and forced:
                slot = self._any_of(queue, start, end)
            stop = slot if slot >= 0 else end
            if stop > start:
                self._pass(queue, start, stop)
            if slot >= 0:
                self._quarantine(slot)
                chosen.append(slot)
                most -= 1
            start = stop + 1
        queue.hand = min(start, end)

    def _any_of(self, queue: Queue, start: int, end: int) -> int:
        """The first slot of `queue` in the least used state there is between `start` and `end`, or -1."""
        for value in range(queue.untouched, queue.untouched + 16):
            if self._queues[value] is queue and (slot := self.state.find(value, start, end)) >= 0:
                return slot
        return -1

    def _pass(self, queue: Queue, start: int, stop: int) -> None:
        """The hand leaves the slots from `start` to `stop` in place: age them, or promote what was touched."""
        window = self.state[start:stop]
        if queue is self._main:
            self.state[start:stop] = window.translate(_AGEING)
            return
        touched = window.count(queue.untouched | TOUCHED)
        if touched:
            self.state[start:stop] = window.translate(_PROMOTION[queue.untouched & _DETAIL])
            queue.drop(start, touched)
            self._main.add(start, touched)

    def _quarantine(self, slot: int) -> None:
        self._queue_of(slot).drop(slot)
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
