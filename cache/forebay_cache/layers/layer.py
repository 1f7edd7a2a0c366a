"""Layers: maps from the blocks of an image or disk to slots.

A *clean* layer holds what the origin has too; one lies under every disk of an image and is shared. A *private* layer
holds what only the cache has: a disk's dirty data, or an overlay's own. A disk reads through its private layers,
newest first, then through the clean one. Freezing what is dirty at one instant is therefore one assignment: the open
layer becomes a frozen one, and new writes go to a new layer on top.

What a page says of each of its blocks is described in ``format.entry``.
"""

from __future__ import annotations

from array import array

from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.index.index import LayerRecord

#: Stands for a page that the layer does not have: every lookup in it is a miss. Never written.
ABSENT = array("Q", bytes(16 * PAGE_BLOCKS))


def new_page(private: bool) -> array[int]:
    """An empty page that may be written."""
    return array("Q", bytes((16 if private else 8) * PAGE_BLOCKS))


class Layer:
    """One layer in memory: the pages that were needed so far, and totals over all of it.

    ``pages`` holds what is loaded: a page, or ABSENT. For a page that is not a key ``missing`` stands: None where it
    has to be loaded from the index first, ABSENT in a layer that has nothing but what is in memory. ``dirty`` are the
    page numbers that the next commit stores.
    """

    __slots__ = (
        "cap",
        "changed",
        "dead",
        "dirty",
        "given_up",
        "hand",
        "id",
        "loading",
        "missing",
        "name",
        "pages",
        "pinned",
        "private",
        "sectors",
        "slots",
    )

    def __init__(self, ident: int, record: LayerRecord) -> None:
        self.id = ident
        self.name = record.name
        self.private = record.private
        self.slots = record.slots
        self.sectors = record.sectors
        self.dead = record.dead
        self.pinned = record.pinned
        self.cap = 0  # most slots it may hold, 0: no limit of its own
        self.hand = 0  # where the search for a victim among its own blocks goes on
        self.pages: dict[int, array[int]] = {}
        self.dirty: set[int] = set()
        self.loading: dict[int, object] = {}
        self.changed = False
        self.given_up = False  # the index says that it is dead: see Cache.give_up()
        self.missing: array[int] | None = None

    def record(self) -> LayerRecord:
        """As the index keeps it."""
        return LayerRecord(
            self.name, self.private, self.slots, self.sectors, self.dead, self.pinned
        )

    @property
    def held(self) -> bool:
        """Whether its slots must not be evicted."""
        return self.private or self.pinned

    def writable(self, number: int) -> array[int]:
        """The page, which must be loaded, ready to be changed: it will be in the next commit."""
        page = self.pages[number]
        if page is ABSENT:
            page = self.pages[number] = new_page(self.private)
        self.dirty.add(number)
        self.changed = True
        return page

    def adopt(self, number: int, raw: bytes | None) -> None:
        """Put a page that was read from the index in place, unless a newer one is there."""
        if number not in self.pages:
            self.pages[number] = ABSENT if raw is None else array("Q", raw)
