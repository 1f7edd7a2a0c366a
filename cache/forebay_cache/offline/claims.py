# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Claims: what the journal says that its index does not have yet, and the one rule of what of it holds.

A record of a private layer is a claim: a sector has data in that slot, with that checksum, or it is all zeros. A start
reads the claims and applies them to the layers (``replay``); a check reads them and compares (``walk``). Both ask
:class:`Judge`, so that they cannot disagree.

The rule, for each sector: the newest claim whose data has its checksum holds, or else what the index says. The kernel
that the records were given to (same boot id) still has every page that was written: then that is the newest claim, or
the one before where the daemon was killed between a record and its data; if none holds, and the index does not either,
the sector is damaged. Another boot id: the machine went down. Everything that was flushed is there, whole; of what was
not flushed, data may be missing or torn, and the index has the last word.

Nothing here changes anything.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from forebay_cache.format import ops
from forebay_cache.format.entry import NO_SLOT, Entry, block_key
from forebay_cache.format.geometry import FULL, SECTORS
from forebay_cache.format.records import LayerRecord


class Claim(NamedTuple):
    """What one record says of one sector of a private block."""

    slot: int
    """Where its data lies; NO_SLOT: it is all zeros."""
    side: int = 0
    """0 if that is the block's first slot, 1 if it is the second."""
    checksum: int = 0
    is_provisioned: bool = False
    """Of zeros: True if the image has to keep space for them."""

    @property
    def is_zeros(self) -> bool:
        """True if the record says that there is no data, but zeros."""
        return self.slot == NO_SLOT


@dataclass
class Claimed:
    """What the records say of one private block."""

    sectors: dict[int, list[Claim]] = field(default_factory=dict)
    """The claims of each sector of which there are any, oldest first."""
    slots: list[int] = field(default_factory=lambda: [NO_SLOT, NO_SLOT])
    """The slots that were named last, first and second; NO_SLOT: as the index has it."""
    is_replaced: bool = False
    """True if it was zeroed as a whole at some time: of what the index says nothing counts, slots included."""
    unanswered: int = 0
    """Mask of the sectors that the last frame names: nobody may have been told that they were written."""

    @property
    def mask(self) -> int:
        """Of the sectors of which there are claims."""
        return sum(1 << sector for sector in self.sectors)

    def add(self, sectors: int, claims: Iterable[Claim]) -> None:
        """The claims of one record, newer than all before, one for each sector of the mask."""
        for sector, claim in zip(bits(sectors), claims, strict=True):
            self.sectors.setdefault(sector, []).append(claim)


@dataclass
class Claims:
    """All that the records say. Blocks are named by their keys, a region is (layer, number)."""

    records: int = 0
    """How many there are."""
    blocks: dict[int, Claimed] = field(default_factory=dict)
    """Private blocks."""
    dropped: dict[int, int] = field(default_factory=dict)
    """Of clean blocks, the mask of the sectors that are not valid any more."""
    hot: set[tuple[int, int]] = field(default_factory=set)
    """Regions of clean layers whose origin may have been written."""
    made: dict[int, LayerRecord] = field(default_factory=dict)
    """Layers that were made; the index may have them as well."""
    slots: dict[int, int] = field(default_factory=dict)
    """The slots that records name, and the block that each was named for last."""
    fault: Exception | None = None
    """Why the records end before the journal does: one of them makes no sense."""
    _last: list[Claimed] = field(default_factory=list)

    @classmethod
    def read(cls, frames: Iterable[bytes]) -> Claims:
        """What the frames of a journal say, up to the first record that makes no sense. Raises what ``frames`` does."""
        claims = cls()
        for frame in frames:
            claims._begin_frame()
            try:
                for op in ops.unpack(frame):
                    claims._take(op)
            except (ValueError, IndexError, struct.error) as fault:
                claims.fault = fault
                break
        return claims

    @property
    def frontier(self) -> int:
        """No record names a slot with this number or a higher one."""
        return max(self.slots, default=NO_SLOT) + 1

    def _begin_frame(self) -> None:
        """Whoever waited for the frame before was answered by then."""
        for block in self._last:
            block.unanswered = 0
        self._last.clear()

    def _take(self, op: ops.Op) -> None:
        self.records += 1
        key = block_key(op.layer, op.a)
        match op.kind:
            case ops.LAYER:
                assert op.name is not None
                self.made.setdefault(op.layer, LayerRecord(op.name))
            case ops.HOT:
                self.hot.add((op.layer, op.a))
            case ops.DROP:
                self.dropped[key] = self.dropped.get(key, 0) | op.mask
            case ops.WRITE:
                self._written(key, op)
            case ops.ZERO:
                self._zeroed(key, op.mask, is_provisioned=bool(op.side))

    def _written(self, key: int, op: ops.Op) -> None:
        block = self.blocks.setdefault(key, Claimed())
        block.add(op.mask, (Claim(op.b, op.side, checksum) for checksum in op.sums))
        block.slots[op.side] = op.b
        block.unanswered |= op.mask
        self._last.append(block)
        self.slots[op.b] = key

    def _zeroed(self, key: int, mask: int, *, is_provisioned: bool) -> None:
        block = self.blocks.setdefault(key, Claimed())
        claim = Claim(NO_SLOT, is_provisioned=is_provisioned)
        block.add(mask, [claim] * mask.bit_count())
        if mask == FULL:
            block.slots = [NO_SLOT, NO_SLOT]
            block.is_replaced = True


class Verdict(NamedTuple):
    """What holds for one sector."""

    claim: Claim | None
    """None: what the index says."""
    is_damaged: bool
    """True if that does not hold either, and nothing does: reading it has to fail."""


@dataclass(frozen=True)
class Judge:
    """The rule. ``lies`` and ``stored`` are asked for one sector at a time."""

    survived: bool
    """True if the kernel that the records were given to is still running."""
    lies: Callable[[int, int, int], bool]
    """(slot, sector, checksum) -> whether what lies there has that checksum. Of a slot that the device does not have,
    and of a sector that cannot be read, this is false."""
    stored: Callable[[int, int], int]
    """(slot, sector) -> the checksum that the index has."""

    def verdict(self, claimed: Claimed, sector: int, entry: Entry) -> Verdict:
        """What holds for a sector of which there are claims. ``entry``: what the index says of the block."""
        claims = claimed.sectors[sector]
        for claim in reversed(claims):
            if self.holds(claim, sector):
                return Verdict(claim, is_damaged=False)
        answered = not claimed.unanswered >> sector & 1
        if self._index_holds(entry, sector, answered=answered):
            return Verdict(None, is_damaged=False)
        # Where the newest claim is what was acknowledged, it stays, and whoever reads it is told that it is damaged.
        return Verdict(claims[-1] if self.survived else None, is_damaged=True)

    def holds(self, claim: Claim, sector: int) -> bool:
        """True if what the claim says is so."""
        return claim.is_zeros or self.lies(claim.slot, sector, claim.checksum)

    def _index_holds(self, entry: Entry, sector: int, *, answered: bool) -> bool:
        """True if what the index says is so, or may be so although it is older than the claims.

        That there is no data was true only before the first claim. It may be so again after a power loss, or where
        nobody was ``answered``.
        """
        if not entry.data >> sector & 1:
            return not (self.survived and answered)
        slot = entry.slots[entry.side >> sector & 1]
        return slot != NO_SLOT and self.lies(slot, sector, self.stored(slot, sector))


def bits(mask: int) -> list[int]:
    """The sectors of a mask, in order: there is one checksum in a record for each."""
    return [sector for sector in range(SECTORS) if mask >> sector & 1]
