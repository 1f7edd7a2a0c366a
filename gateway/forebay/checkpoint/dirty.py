# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a disk holds that its image lacks: its private layers, the open one and the frozen ones."""

from forebay.checkpoint.ages import Ages, oldest_on_record
from forebay.checkpoint.mark import DirtyMark
from forebay.checkpoint.pace import Amount, share
from forebay.errors import ForebayError
from forebay.image.image import Image
from forebay.image.source import Source
from forebay_cache import Cache, Layer, LayerName, View
from forebay_cache.format.geometry import SECTOR


class Dirty:
    """The private layers of one disk, which are `view.private`, newest first.

    The first one is *open*: writes go there. The others are *frozen*: nothing in them changes until a pass has taken
    them to the image, oldest first, and they are dropped. An overlay has an open one only, and what that holds is not
    meant for the image, so that nothing of an overlay counts as dirty.

    `ages` knows how old each layer's data is, `mark` what stands beside the image about it.
    """

    def __init__(self, view: View, source: Source, image: Image, max_dirty: int) -> None:
        """`max_dirty`: bytes that may be dirty, as the operator has set it."""
        self._view = view
        self._cache = image.cache
        self._disk = source.use.disk
        self._image_key = image.key
        self._max_dirty = max_dirty
        self._generation = 0
        self.overlay = source.use.overlay
        self._begins_empty = source.use.overlay and not source.resumed
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
        for layer in layers:
            self._check_image(layer)
        for layer in layers[:-1]:
            layer.freeze()
        self._view.private = layers[::-1]
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
        return self._view.private[:0:-1]

    def open_layer(self) -> None:
        """Open a layer for writes unless there is one."""
        if not self._view.private:
            self._view.private = [self._make_layer()]

    def freeze(self) -> None:
        """Have writes go to a new layer from now on. A critical section: what is dirty now stays together."""
        self.ages.note_frozen(self._view.private[0])
        self._view.private[0].freeze()
        self._view.private = [self._make_layer(), *self._view.private]
        self._count_frozen()

    def remove(self, layer: Layer) -> None:
        """Take a frozen layer out of the view: all that it held is in the image, and clean in the cache."""
        self._view.private = [x for x in self._view.private if x is not layer]
        self._count_frozen()
        self.ages.note_removed(layer)

    def drop(self) -> None:
        """Give up all layers, with what they hold; the next commit makes that durable, all of it at once.

        A critical section: a commit that comes in between would have a part of them.
        """
        for layer in self._view.private:
            self._cache.layers.drop(layer)
        self._view.private = []
        self._count_frozen()

    def _make_layer(self) -> Layer:
        layers = self._cache.layers
        used = [layer.name.generation for layer in layers.private_of(self._disk)]
        self._generation = max([self._generation, *used]) + 1
        return layers.make(LayerName.of_disk(self._disk, self._generation, self._image_key))

    def _count_frozen(self) -> None:
        frozen = self._view.private[1:]
        self.frozen_sectors = sum(x.sectors for x in frozen)
        self.frozen_slots = sum(x.slots for x in frozen)

    # -- how much ---------------------------------------------------------------------------------------------

    @property
    def private_bytes(self) -> int:
        """Bytes that only the cache has, an overlay's own included."""
        return sum(x.sectors for x in self._view.private) * SECTOR

    @property
    def bytes(self) -> int:
        """Bytes that the image lacks and is meant to get."""
        return 0 if self.overlay else self.private_bytes

    def lag_seconds(self) -> float:
        """Age of the oldest data that the image lacks and is meant to get; 0 where it lacks nothing."""
        return 0.0 if self.overlay else self.ages.oldest(self._view.private)

    def amounts(self) -> tuple[Amount, Amount]:
        """What is dirty, and what may be: `max_dirty` bytes, and all slots that the cache has room for."""
        slots = sum(x.slots for x in self._view.private)
        room = slots + self._cache.slots.spare()
        if self._cache.slots.scan is not None:  # which slots can be had is not known yet
            room = self._cache.device.slots
        return Amount(self.bytes, slots), Amount(self._max_dirty, room)

    def share(self) -> float:
        """Which part of what may be dirty is dirty, of bytes or of slots, whichever is more: 0 to 1, and beyond."""
        return share(*self.amounts())


def left_dirty(cache: Cache, disk: str) -> tuple[int, float]:
    """Of a disk that is not served: bytes that its image lacks, and the age of the oldest of them in seconds."""
    dirty = sum(x.sectors for x in cache.layers.private_of(disk)) * SECTOR
    return dirty, oldest_on_record(cache, disk) if dirty else 0.0
