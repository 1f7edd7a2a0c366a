# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""All layers of a cache, by number and by whose they are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from forebay_cache.durable.hot import HotRegions
from forebay_cache.durable.intent import Intent
from forebay_cache.format import ops
from forebay_cache.format.entry import LAST_LAYER, layer_of_key
from forebay_cache.format.records import LayerName, LayerRecord
from forebay_cache.index.changes import Changes, Share, nothing
from forebay_cache.index.index import Index
from forebay_cache.index.pages import PageTable
from forebay_cache.layers.layer import Layer, LayerState

PAGES_KEPT = 32768
"""Pages of clean layers kept in memory: about 20 MB, and lookups for 128 GiB without touching LMDB."""


class Layers:
    """The layers that there are. Dead ones are among them until they are reclaimed. A participant of each commit."""

    def __init__(
        self, index: Index, intent: Intent, hot: HotRegions, dirty_pages: set[int]
    ) -> None:
        """``dirty_pages``: keys of the pages that the next commit stores, see ``PageTable.dirty``."""
        self._index = index
        self._dirty = dirty_pages
        self._intent = intent
        self._hot = hot
        self._by_id: dict[int, Layer] = {}
        self._by_name: dict[LayerName, Layer] = {}  # without dead ones
        self._by_disk: dict[str, dict[int, Layer]] = {}  # those of them that are private, by number
        self._gone: set[int] = set()  # numbers of reclaimed layers that the index still has

    @property
    def dirty(self) -> set[int]:
        """Keys of the pages that the next commit stores, see ``PageTable.dirty``."""
        return self._dirty

    def __iter__(self) -> Iterator[Layer]:
        """All of them. Make a list of it before an await."""
        return iter(self._by_id.values())

    def get(self, ident: int) -> Layer | None:
        """The layer of that number; None if it was reclaimed, or never made."""
        return self._by_id.get(ident)

    def clean_of(self, image: str) -> Layer | None:
        """The clean layer of the image with that key; None if there is none that is not dead."""
        return self._by_name.get(LayerName.of_image(image))

    def private_of(self, disk: str) -> list[Layer]:
        """The private layers of the disk with that name that are not dead, oldest first."""
        of_disk = self._by_disk.get(disk, {})
        return [of_disk[ident] for ident in sorted(of_disk)]

    def has_private_on(self, image: str) -> bool:
        """True if any disk has a private layer, that is not dead, on the image with that key."""
        of_disks = self._by_disk.values()
        return any(layer.name.image == image for of_disk in of_disks for layer in of_disk.values())

    def make(self, name: LayerName) -> Layer:
        """A new empty layer. After a crash it is there if anything is that was journaled after this call.

        Raises ValueError for a name that is too long.
        """
        assert name not in self._by_name, name
        meta = self._index.meta
        assert meta.next_layer <= LAST_LAYER, "all numbers of layers are used up"
        made = ops.layer_made(meta.next_layer, name)
        # The pages of a private layer are never shed, so nothing of it ever has to be looked for in the index.
        layer = self._layer(meta.next_layer, LayerRecord(name), complete=name.is_private)
        meta.next_layer += 1
        layer.changed = True
        self._add(layer)
        self._intent.note(made)
        return layer

    def recover(self, ident: int, record: LayerRecord, *, journaled: bool) -> Layer:
        """At the start: a layer that is in the index, or (``journaled``) in the journal only."""
        layer = self._layer(ident, record, complete=False)
        layer.changed = journaled
        self._add(layer)
        return layer

    def _layer(self, ident: int, record: LayerRecord, *, complete: bool) -> Layer:
        pages = PageTable(
            self._index, ident, self._dirty, private=record.private, complete=complete
        )
        return Layer(ident, record, pages)

    def _add(self, layer: Layer) -> None:
        self._by_id[layer.id] = layer
        if layer.is_dead:
            return
        older = self._by_name.get(layer.name)
        if older is not None:  # it was about to be dropped when the daemon was killed
            self.drop(older)
        self._by_name[layer.name] = layer
        if layer.private:
            self._by_disk.setdefault(layer.name.disk, {})[layer.id] = layer

    def drop(self, layer: Layer) -> None:
        """The layer is not used any more. Its slots come free in the background, also after a crash in between."""
        layer.become(LayerState.DEAD)
        self._by_name.pop(layer.name, None)
        if layer.private:
            of_disk = self._by_disk.get(layer.name.disk, {})
            of_disk.pop(layer.id, None)
            if not of_disk:
                self._by_disk.pop(layer.name.disk, None)
        else:
            self._hot.cool(layer.id)

    def forget(self, layer: Layer) -> None:
        """A dead layer has nothing any more: the next commit takes it out of the index."""
        layer.become(LayerState.RECLAIMED)
        del self._by_id[layer.id]
        self._gone.add(layer.id)

    # -- commits ----------------------------------------------------------------------------------------------

    def has_changes(self) -> bool:
        """True if anything of a layer has changed since the last commit."""
        return bool(self._gone or self._dirty) or any(x.changed for x in self)

    def contribute(self, changes: Changes) -> Share:
        """Have a commit store all dirty pages and the records of all layers that have changed."""
        dirty = sorted(self._dirty)
        self._dirty.clear()
        for ident, keys in groupby(dirty, layer_of_key):
            layer = self._by_id.get(ident)
            if layer is not None:  # else it was reclaimed, and nothing of it is stored any more
                changes.pages += layer.pages.stored(keys)
                layer.changed = True
        changed = [x for x in self if x.changed]
        for layer in changed:
            layer.changed = False
            changes.layers[layer.id] = layer.record()
        gone, self._gone = self._gone, set()
        changes.layers.update((ident, None) for ident in gone)

        def failed() -> None:
            self._dirty.update(dirty)
            for layer in changed:
                layer.changed = True
            self._gone |= gone

        return Share(nothing, failed)

    def shed(self, most: int) -> bool:
        """Forget up to ``most`` of the pages that are more than are kept in memory. True if there may be others.

        Not during a commit. Those of private layers stay: every read asks for them first.
        """
        left = most = min(self._excess(), most)
        for layer in self:
            if left <= 0:
                break
            if not layer.private:
                left -= layer.pages.shed(left)
        return most > left

    def _excess(self) -> int:
        return sum(len(x.pages) for x in self if not x.private) - PAGES_KEPT

    def has_too_many(self) -> bool:
        """True if there are more pages of clean layers in memory than are kept."""
        return self._excess() > 0
