# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How a block is taken out of a layer, and its slots out of the hands of the block.

None of these functions awaits: a page, the totals of its layer and the state of the slot are changed together.
"""

from __future__ import annotations

from forebay_cache.device.failure import Failure
from forebay_cache.format.entry import NO_SLOT, data_of, pack, slot_of, valid_of, zero_of
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.index.pages import Page
from forebay_cache.layers.layer import Layer
from forebay_cache.slots.pool import SlotPool


class Removal:
    """Takes blocks out of layers of one cache."""

    def __init__(self, slots: SlotPool, failure: Failure) -> None:
        self._slots = slots
        self._failure = failure

    def clear(self, layer: Layer, page: Page, i: int) -> None:
        """Forget all that a layer has of the block ``i`` of a page of it, which is writable, and free its slots."""
        word = page[i]
        if not word:
            return
        layer.sectors -= valid_of(word).bit_count()
        page[i] = 0
        self.free(layer, slot_of(word))
        if layer.private:
            second = page[PAGE_BLOCKS + i]
            page[PAGE_BLOCKS + i] = 0
            self.free(layer, slot_of(second))

    def free(self, layer: Layer, slot: int) -> None:
        """Give back a slot (or NO_SLOT) that a page of the layer named until now."""
        if slot != NO_SLOT:
            layer.slots -= 1
            self._slots.abandon(slot)

    def evict(self, layer: Layer, number: int, i: int, slot: int) -> bool:
        """Take the block ``i`` of a page out of its clean layer; what is known to be zeros stays known.

        ``slot`` is the one that it was chosen for, and is quarantined in the placement. Returns False, and does
        nothing, if the block is not there any more, or must not be evicted by now. Raises IndexFault.
        """
        if slot_of(layer.pages.page(number)[i]) != slot or layer.is_held:
            return False
        self._keep_zeros(layer, number, i)
        self._slots.evicted(slot)
        return True

    def retire(self, layer: Layer, block: int, slot: int) -> None:
        """Take a damaged block out of its clean layer, and its slot out of use for as long as the daemon runs.

        Does nothing if the block is not there any more. One that was chosen to be evicted is not evicted then.
        """
        number, i = divmod(block, PAGE_BLOCKS)
        page = layer.pages.look(number)
        if page is None or slot_of(page[i]) != slot:
            return
        self._keep_zeros(layer, number, i)
        if (
            self._failure.error is not None
        ):  # there is nothing wrong with this slot more than with others
            self._slots.abandon(slot)
        else:
            self._slots.retire(slot)

    def _keep_zeros(self, layer: Layer, number: int, i: int) -> None:
        """Forget the data of a clean block, and that it has a slot."""
        page = layer.pages.writable(number)
        zero = zero_of(page[i])
        layer.sectors -= data_of(page[i]).bit_count()
        layer.slots -= 1
        page[i] = pack(NO_SLOT, zero, zero)
