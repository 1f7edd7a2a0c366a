# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Layers: maps from the blocks of an image or disk to slots.

A *clean* layer holds what the origin has too; one lies under every disk of an image and is shared. A *private* layer
holds what only the cache has: a disk's dirty data, or an overlay's own. A disk reads through its private layers,
newest first, then through the clean one. Freezing what is dirty at one instant is therefore one assignment: the open
layer becomes a frozen one, and new writes go to a new layer on top.

What a page of a layer says is in ``format.entry``; the pages that are in memory are in ``index.pages``.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from forebay_cache.format.records import LayerRecord
from forebay_cache.index.pages import PageTable
from forebay_cache.states import Machine, Table


class LayerState(Enum):
    """What a layer is good for."""

    OPEN = "open"  # private, and takes writes
    FROZEN = "frozen"  # private, and is read only
    CLEAN = "clean"  # not private
    INVALIDATED = "invalidated"  # clean in memory, dead in the index
    DEAD = "dead"  # used by nobody, and still has slots
    RECLAIMED = "reclaimed"  # gone


MOVES: Final[Table[LayerState]] = {
    LayerState.OPEN: {
        LayerState.FROZEN: "a new layer takes the writes: a pass begins, or the disk was found with several",
        LayerState.DEAD: "the disk does not need it any more",
    },
    LayerState.FROZEN: {
        LayerState.DEAD: "the origin has all of it, or the data was given up",
    },
    LayerState.CLEAN: {
        LayerState.INVALIDATED: "the device has failed, and the origin is about to be written",
        LayerState.DEAD: "the image has changed or is not used any more, or a newer layer has its name",
    },
    LayerState.INVALIDATED: {
        LayerState.CLEAN: "the device works again, or has failed once more",
        LayerState.DEAD: "as a clean one",
    },
    LayerState.DEAD: {
        LayerState.RECLAIMED: "its slots were freed, and the index has forgotten it",
    },
    LayerState.RECLAIMED: {},
}
"""See the heading "States of a layer" in cache/README.md."""


class Layer:
    """One layer in memory: its totals, its state, and the pages of it that were needed so far."""

    __slots__ = (
        "_machine",
        "cap",
        "changed",
        "hand",
        "id",
        "name",
        "pages",
        "pinned",
        "private",
        "sectors",
        "slots",
    )

    def __init__(self, ident: int, record: LayerRecord, pages: PageTable) -> None:
        self.id = ident
        self.name = record.name
        self.private = record.private
        self.pinned = record.pinned
        """True if it is clean, and nothing of it may be evicted."""
        self.slots = record.slots
        """How many slots its pages name."""
        self.sectors = record.sectors
        """How many sectors it answers for. Readers skip a private layer in which there are none."""
        self.pages = pages
        self.cap = 0
        """The most slots it may have; 0: it has no limit of its own."""
        self.hand = 0
        """Where among its pages the search for a block to evict goes on when it is at its cap."""
        self.changed = False
        """True if its record has to go into the next commit although none of its pages has changed."""
        start = LayerState.OPEN if record.private else LayerState.CLEAN
        self._machine = Machine(MOVES, LayerState.DEAD if record.dead else start, str(self.name))

    @property
    def state(self) -> LayerState:
        """What it is good for now."""
        return self._machine.state

    def become(self, state: LayerState) -> None:
        """Enter a state; the next commit stores what of it the index is to know. See MOVES."""
        self._machine.become(state)
        self.changed = True

    def freeze(self) -> None:
        """Take no more writes: another layer lies above this one now."""
        self._machine.become(LayerState.FROZEN)

    @property
    def is_dead(self) -> bool:
        """True if nobody uses it any more; what it holds comes free in the background."""
        return self._machine.state in (LayerState.DEAD, LayerState.RECLAIMED)

    @property
    def is_held(self) -> bool:
        """True if its slots must not be evicted."""
        return self.private or self.pinned

    def record(self) -> LayerRecord:
        """As the index keeps it. An invalidated layer is dead there only until the device works again."""
        return LayerRecord(self.name, self.slots, self.sectors, self.is_dead, self.pinned)
