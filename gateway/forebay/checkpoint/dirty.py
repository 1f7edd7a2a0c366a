# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a disk holds that its image lacks: its private layers, the open one and the frozen ones."""

from forebay.checkpoint.ages import Ages, oldest_on_record
from forebay.checkpoint.mark import DirtyMark
from forebay.checkpoint.pace import Amount, share
from forebay.checkpoint.snapshots import Snapshot, Snapshots
from forebay.config.live import LiveSettings
from forebay.errors import ForebayError
from forebay.image.image import Image
from forebay.image.source import Source
from forebay_cache import Cache, Layer, LayerName, View
from forebay_cache.format.geometry import SECTOR
from forebay_cache.read.merged import Merged, seen_through


class Dirty:
    """The private layers of one disk, newest first.

    The first one is *open*: writes go there. The others are *frozen*: nothing in them changes until a pass has taken
    them to the image, oldest first, and they are dropped. Those of an overlay are not meant for the image, so that
    nothing of an overlay counts as dirty; they are frozen for snapshots, and stay. Where they are many, `view.private`
    has them merged.

    `ages` knows how old each layer's data is, `mark` what stands beside the image about it.
    """

    def __init__(self, view: View, source: Source, image: Image, settings: LiveSettings) -> None:
        self._view = view
        self._cache = image.cache
        self._disk = source.use.disk
        self._image_key = image.key
        self._settings = settings
        self._generation = 0
        self.overlay = source.use.overlay
        self._begins_empty = source.use.overlay and not (source.resumed or source.use.comes_back)
        self._layers: list[Layer] = []
        self._merged: Merged | None = None
        self.snapshots = Snapshots(image.cache, self._disk)
        self.ages = Ages(image.cache, self._disk, kept=not self.overlay)
        self.mark = DirtyMark(source, image, lambda: self.bytes)
        self.frozen_sectors = 0
        """Sectors in the frozen layers when the latest of them was frozen, or settled."""
        self.frozen_slots = 0
        """Slots of the cache that these had then."""

    def recall(self) -> None:
        """Take over what the cache holds of the disk from an earlier life. For a view without private layers.

        An overlay that is just being attached begins empty, whatever was left. Raises ForebayError where that was
        written for another image.
        """
        layers = self._cache.layers.private_of(self._disk)
        if self._begins_empty:
            for layer in layers:
                self._cache.layers.drop(layer)
            layers = []
            self.snapshots.put([])
        after, upto = self.snapshots.gone()
        for layer in [x for x in layers if after < x.name.generation <= upto]:
            self._cache.layers.drop(layer)
            layers.remove(layer)
        self.snapshots.put(self.snapshots.all())
        for layer in layers:
            self._check_image(layer)
        for layer in layers[:-1]:
            layer.freeze()
        self._generation = self.snapshots.boundary()
        self._show(layers[::-1])
        if layers and layers[-1].name.generation <= self._generation:  # it belongs to a snapshot
            layers[-1].freeze()
            self._show([self._make_layer(), *self._layers])
        self._count_frozen()
        self.mark.is_set = self.bytes > 0
        self.ages.recall(layers)

    def _check_image(self, layer: Layer) -> None:
        key = layer.name.image  # empty where an older version made it
        if key and key != self._image_key:
            raise ForebayError(
                f"the cache holds data that disk '{self._disk}' wrote for {key}: attach that image "
                "under this name and detach it again, or choose another name"
            )

    # -- layers -----------------------------------------------------------------------------------------------

    @property
    def frozen(self) -> list[Layer]:
        """The frozen layers, oldest first: what passes have yet to take to the image."""
        return self._layers[:0:-1]

    @property
    def layers(self) -> list[Layer]:
        """All of them, newest first. The list is replaced, never changed."""
        return self._layers

    def _show(self, layers: list[Layer]) -> None:
        """Have these layers, and the view read through them from now on."""
        self._layers = layers
        frozen = layers[1:]
        if self.overlay:
            self._merged = seen_through(self._cache.index, frozen, self._merged)
        merged = self._merged
        self._view.private = layers[:1] + (frozen if merged is None else merged.levels)
        self._count_frozen()

    def show_by(self, view: View) -> None:
        """Have another view read through the layers from now on, and the one that did through none."""
        before, self._view = self._view, view
        view.private, before.private = before.private, []

    def decide(self, snapshots: list[Snapshot], generation: int) -> None:
        """Have it on record that the disk goes back to that generation, with these snapshots: :meth:`go_back` does.

        Nothing may be written from when this is durable until that is done.
        """
        self.snapshots.put(snapshots, (generation, self._layers[0].name.generation))

    def go_back(self) -> None:
        """Give up the layers of which that was decided, with a new one on top.

        A critical section: a commit that comes in between would have a part of it.
        """
        after, upto = self.snapshots.gone()
        gone = [layer for layer in self._layers if after < layer.name.generation <= upto]
        self._show([self._make_layer(), *[x for x in self._layers if x not in gone]])
        for layer in gone:
            self._cache.layers.drop(layer)
        self.snapshots.put(self.snapshots.all())

    def forget_page(self, number: int) -> None:
        """What frozen layers hold in that page of theirs has moved: whoever reads it looks anew."""
        if self._merged is not None:
            self._merged.forget(number)

    def open_layer(self) -> None:
        """Open a layer for writes unless there is one."""
        if not self._layers:
            self._show([self._make_layer()])

    def freeze(self) -> None:
        """Have writes go to a new layer from now on. A critical section: what is dirty now stays together."""
        self.ages.note_frozen(self._layers[0])
        self._layers[0].freeze()
        self._show([self._make_layer(), *self._layers])

    def freeze_changes(self) -> int:
        """Freeze what an overlay holds, if it was written since it was frozen last; the newest generation that is.

        0: it holds nothing. A critical section, as `freeze` is.
        """
        if self._layers[0].sectors:
            self.freeze()
        return self._layers[1].name.generation if self.frozen else 0

    def remove(self, layer: Layer) -> None:
        """Take a frozen layer out of the view: all that it held is in the image, and clean in the cache."""
        self._show([x for x in self._layers if x is not layer])
        self.ages.note_removed(layer)

    def drop(self) -> None:
        """Give up all layers, with what they hold; the next commit makes that durable, all of it at once.

        A critical section: a commit that comes in between would have a part of them.
        """
        gone = self._layers
        self._show([])
        for layer in gone:
            self._cache.layers.drop(layer)
        self.snapshots.put([])

    def _make_layer(self) -> Layer:
        layers = self._cache.layers
        used = [layer.name.generation for layer in layers.private_of(self._disk)]
        self._generation = max([self._generation, *used]) + 1
        return layers.make(LayerName.of_disk(self._disk, self._generation, self._image_key))

    def _count_frozen(self) -> None:
        frozen = self._layers[1:]
        self.frozen_sectors = sum(x.sectors for x in frozen)
        self.frozen_slots = sum(x.slots for x in frozen)

    # -- how much ---------------------------------------------------------------------------------------------

    @property
    def private_bytes(self) -> int:
        """Bytes that only the cache has, an overlay's own included."""
        return sum(x.sectors for x in self._layers) * SECTOR

    def has_changes(self) -> bool:
        """True if an overlay has anything that it would be kept for."""
        return self.private_bytes > 0 or bool(self.snapshots.all())

    @property
    def bytes(self) -> int:
        """Bytes that the image lacks and is meant to get."""
        return 0 if self.overlay else self.private_bytes

    def lag_seconds(self) -> float:
        """Age of the oldest data that the image lacks and is meant to get; 0 where it lacks nothing."""
        return 0.0 if self.overlay else self.ages.oldest(self._layers)

    def amounts(self) -> tuple[Amount, Amount]:
        """What is dirty, and what may be: `max_dirty` bytes, and all slots that the cache has room for."""
        slots = sum(x.slots for x in self._layers)
        room = slots + self._cache.slots.spare()
        if self._cache.slots.scan is not None:  # which slots can be had is not known yet
            room = self._cache.device.slots
        return Amount(self.bytes, slots), Amount(self._settings.now.max_dirty, room)

    def share(self) -> float:
        """Which part of what may be dirty is dirty, of bytes or of slots, whichever is more: 0 to 1, and beyond."""
        return share(*self.amounts())


def left_dirty(cache: Cache, disk: str) -> tuple[int, float]:
    """Of a disk that is not served: bytes that its image lacks, and the age of the oldest of them in seconds."""
    dirty = sum(x.sectors for x in cache.layers.private_of(disk)) * SECTOR
    return dirty, oldest_on_record(cache, disk) if dirty else 0.0
