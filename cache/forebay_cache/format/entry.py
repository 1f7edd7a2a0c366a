# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Entries: what a page of the index says of one block, and the keys of blocks. No other module shifts these words.

A page is an array of 64-bit words, one for each of its 64 blocks::

    bits 63..32   slot + 1, 0: none
    bits 31..16   zero: sectors known to be all zeros, nothing is stored for them; each of them is valid as well
    bits 15..0    valid: sectors this layer answers for

A page of a private layer has a second array of 64 words behind the first::

    bits 63..32   second slot + 1, 0: none
    bits 31..16   provisioned: of the sectors that are zeros, those for which the image has to keep space
    bits 15..0    side: sectors whose data lies in the second slot

The two slots of a private block are what makes overwriting safe: a sector whose place is named by durable state is
written to the *other* slot, so that a power cut finds the old or the new data, whole, and its checksum with it.

A mask has 16 bits, bit n for sector n of the block (see ``geometry``). The lowest 16 bits of both words are masks, so
that ``word & mask`` are the sectors of ``mask`` that the layer answers for, and ``second & mask`` those that lie in the
second slot. Code that runs for every read or write uses this; all else about words is said with the functions below.

The *key* of a block among all layers has the layer's number in its upper 32 bits, the block's in its lower 32 bits.
"""

from __future__ import annotations

import sys
from array import array
from typing import Final, NamedTuple

from forebay_cache.format.geometry import BLOCK_SHIFT, FULL, PAGE_BLOCKS

assert sys.byteorder == "little", "pages are stored as they lie in memory: little endian"

_SLOT_SHIFT: Final = 32
_ZERO_SHIFT: Final = 16
_MASKS: Final = (1 << _SLOT_SHIFT) - 1
_ZERO_AND_VALID: Final = 1 << _ZERO_SHIFT | 1
"""A mask times this: the mask in the place of the zero bits and in that of the valid bits."""

_LAYER_SHIFT: Final = 32
_BLOCK_PART: Final = (1 << _LAYER_SHIFT) - 1

LAST_LAYER: Final = (1 << 32) - 1
"""No layer has a higher number."""

LAST_SLOT: Final = (1 << 32) - 2
"""No slot has a higher number: words have 32 bits for it, and 0 says that there is none."""

LARGEST_DISK: Final = 1 << 32 + BLOCK_SHIFT
"""Bytes of a disk at most, 256 TiB: the numbers of its blocks have 32 bits, in keys and in the journal."""

NO_SLOT: Final = -1
"""In the place of a slot's number: there is none."""

MIXED: Final = -1
"""Returned by :func:`whole_slot`: not all of the sectors are valid, or they do not all lie in one place."""

ALL_ZERO: Final = -2
"""Returned by :func:`whole_slot`: all of the sectors are known to be zeros."""


# -- one word ---------------------------------------------------------------------------------------------------------


def pack(slot: int, zero: int, valid: int) -> int:
    """A first word, from a slot's number (or NO_SLOT) and two masks; ``zero`` is part of ``valid``."""
    return (slot + 1) << _SLOT_SHIFT | zero << _ZERO_SHIFT | valid


def pack_second(slot: int, side: int, provisioned: int = 0) -> int:
    """A second word, from a slot's number (or NO_SLOT), the mask of the sectors whose data lies there, and that of the
    zeros for which the image has to keep space.
    """
    return (slot + 1) << _SLOT_SHIFT | provisioned << _ZERO_SHIFT | side


def slot_of(word: int) -> int:
    """The number of the slot that a first or second word names, or NO_SLOT."""
    return (word >> _SLOT_SHIFT) - 1


def has_slot(word: int) -> bool:
    """True if a first or second word names a slot."""
    return word > _MASKS


def valid_of(word: int) -> int:
    """Mask of the sectors that the layer answers for, from a first word."""
    return word & FULL


def zero_of(word: int) -> int:
    """Mask of the sectors that are known to be zeros, from a first word."""
    return word >> _ZERO_SHIFT & FULL


def data_of(word: int) -> int:
    """Mask of the sectors whose data lies in a slot: those valid and not zero, from a first word."""
    return word & ~(word >> _ZERO_SHIFT) & FULL


def side_of(second: int) -> int:
    """Mask of the sectors on the second side, from a second word. Bits of sectors without data mean nothing."""
    return second & FULL


def provisioned_of(second: int) -> int:
    """Mask of the provisioned sectors, from a second word. Bits of sectors that are not zeros mean nothing."""
    return second >> _ZERO_SHIFT & FULL


def with_slot(word: int, slot: int) -> int:
    """A first or second word with its masks, and that slot (or NO_SLOT) in place of its own."""
    return word & _MASKS | (slot + 1) << _SLOT_SHIFT


def without_slot(word: int) -> int:
    """A first or second word with its masks, and no slot."""
    return word & _MASKS


def with_data(word: int, mask: int) -> int:
    """A first word once the sectors of ``mask`` have data."""
    return word & ~(mask << _ZERO_SHIFT) | mask


def with_zeros(word: int, mask: int) -> int:
    """A first word once the sectors of ``mask`` are zeros. Its slot stays, though nothing may lie there any more."""
    return word | mask * _ZERO_AND_VALID


def with_zero_places(second: int, mask: int, sides: int, *, provisioned: bool) -> int:
    """A second word once the sectors of ``mask`` are zeros, ``sides`` of them on the second side."""
    kept = second & ~(mask * _ZERO_AND_VALID) | sides
    return kept | mask << _ZERO_SHIFT if provisioned else kept


def zeros_only(word: int) -> int:
    """What a first word says once its slot is gone: the sectors known to be zeros, and no other is valid."""
    return (word >> _ZERO_SHIFT & FULL) * _ZERO_AND_VALID


ZEROS: Final = with_zeros(0, FULL)
"""The first word of a block that is all zeros and has no slot."""


# -- what every read and write asks, each in one call ---------------------------------------------------------------


def whole_slot(word: int, need: int) -> int:
    """The one slot in which all sectors of the mask ``need`` of a clean block lie; else MIXED or ALL_ZERO.

    A slot is not negative, the others are. MIXED also stands for a word that cannot be: sectors with data and no slot.
    """
    both = need * _ZERO_AND_VALID
    found = word & both
    if found == need:
        return (word >> _SLOT_SHIFT) - 1
    return ALL_ZERO if found == both else MIXED


def whole_private_slot(word: int, second: int, need: int) -> int:
    """:func:`whole_slot` of a private block, from both its words."""
    both = need * _ZERO_AND_VALID
    found = word & both
    if found != need:
        return ALL_ZERO if found == both else MIXED
    side = second & need
    if not side:
        return (word >> _SLOT_SHIFT) - 1
    return (second >> _SLOT_SHIFT) - 1 if side == need else MIXED


def moved(word: int, second: int, mask: int, staying: int) -> int:
    """Which sectors of ``mask`` lie on the second side once they are written.

    Those that are :func:`bound` change sides, or stay where they are if they are ``staying``. Any other may lie on
    either side: it goes where the nearest bound one below it then lies, or else the nearest above, so that what is
    written as a whole is in as few runs as can be. All lie on the first side where the block has no slot yet.
    """
    if word <= _MASKS and second <= _MASKS:  # neither names a slot
        return 0
    tied = bound(word, staying)
    sides = (second ^ mask & ~staying) & tied
    if not mask & ~tied:
        return sides & mask
    loose = FULL & ~tied
    lowest = tied & -tied
    # Adding a bit to the lowest one of a run of loose sectors clears the run.
    follow = loose & ~(loose + (sides << 1 & loose))
    if sides & lowest:
        follow |= lowest - 1
    return (sides | follow) & mask


def bound(word: int, staying: int) -> int:
    """Mask of the sectors of which durable state may name a place, from a first word: those with data, and zeros that
    are ``staying``, for what they were before may be what is durable. Others have no place that must be kept.
    """
    return word & (~(word >> _ZERO_SHIFT) | staying) & FULL


def runs_of(target: int) -> int:
    """In how many runs the sectors of a whole block lie, of which ``target`` lie on the second side."""
    return ((target ^ target >> 1) & FULL >> 1).bit_count() + 1


def written(word: int, second: int, mask: int, target: int) -> tuple[int, int]:
    """Both words of a private block once ``mask`` was written, ``target`` of it on the second side."""
    return word & ~(mask << _ZERO_SHIFT) | mask, second & ~mask | target


# -- both words -------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """Both words of a block; ``second`` is 0 for one of a clean layer."""

    word: int
    second: int = 0

    @property
    def valid(self) -> int:
        """Mask of the sectors that the layer answers for."""
        return valid_of(self.word)

    @property
    def zero(self) -> int:
        """Mask of the sectors that are known to be zeros."""
        return zero_of(self.word)

    @property
    def data(self) -> int:
        """Mask of the sectors whose data lies in a slot."""
        return data_of(self.word)

    @property
    def side(self) -> int:
        """Mask of the sectors whose data lies in the second slot."""
        return self.second & data_of(self.word)

    @property
    def provisioned(self) -> int:
        """Mask of the zeros for which the image has to keep space."""
        return provisioned_of(self.second) & zero_of(self.word)

    @property
    def slots(self) -> tuple[int, int]:
        """First and second slot; NO_SLOT where there is none."""
        return slot_of(self.word), slot_of(self.second)

    @property
    def sides(self) -> tuple[int, int]:
        """Masks of the sectors whose data lies in the first and in the second slot."""
        data, side = data_of(self.word), self.side
        return data & ~side, side

    def places(self) -> list[tuple[int, int]]:
        """(slot, mask of the sectors whose data lies there) of each slot that is named, even where nothing lies there.

        Of a damaged entry also (NO_SLOT, mask): sectors that have data and no slot.
        """
        found = zip(self.slots, self.sides, strict=True)
        return [(slot, mask) for slot, mask in found if slot >= 0 or mask]

    def fault(self) -> str:
        """What about the words cannot be, whichever slots there are; empty if they are sound."""
        if self.zero & ~self.valid:
            return "zeros that are not valid"
        for slot, mask in self.places():
            if slot < 0:
                return f"sectors {mask:#06x} lie in no slot"
        return ""


def entry_at(page: array[int], i: int) -> Entry:
    """What a page says of its block ``i``; a page with two words for each block is that of a private layer."""
    return Entry(page[i], page[PAGE_BLOCKS + i] if len(page) > PAGE_BLOCKS else 0)


def put_entry(page: array[int], i: int, entry: Entry) -> None:
    """Have a page say this of its block ``i``."""
    page[i] = entry.word
    if len(page) > PAGE_BLOCKS:
        page[PAGE_BLOCKS + i] = entry.second


def slots_in(page: array[int] | bytes) -> list[tuple[int, int]]:
    """(block in the page, slot) of every slot that a page names, in memory or as the index has it.

    The second slots of a private page come behind all of the first ones.
    """
    upper = memoryview(page).cast("B").cast("I")[1::2]
    return [(i % PAGE_BLOCKS, above - 1) for i, above in enumerate(upper) if above]


def masks_in(page: array[int]) -> set[int]:
    """The first words of a page without their slots, each once: `zero_of` and `valid_of` take them apart."""
    return set(memoryview(page)[:PAGE_BLOCKS].cast("B").cast("I")[::2])


# -- keys of blocks ---------------------------------------------------------------------------------------------------


def block_key(layer: int, block: int) -> int:
    """The key of a block of the layer with that number."""
    return layer << _LAYER_SHIFT | block


def layer_of_key(key: int) -> int:
    """The number of the layer that a block with this key belongs to."""
    return key >> _LAYER_SHIFT


def block_of_key(key: int) -> int:
    """The number of the block within its layer."""
    return key & _BLOCK_PART
