"""What a journal holds that its index does not have yet, as a check sees it: claims, and places that do not count.

The rules are those of ``recovery``; nothing is changed here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from forebay_cache.device.device import Device
from forebay_cache.durable.journal import Journal, Position
from forebay_cache.format import ops
from forebay_cache.format.entry import block_key
from forebay_cache.format.geometry import FULL, SECTORS
from forebay_cache.format.records import Meta

Claim = tuple[int, int] | None
"""What a record says of one sector: (slot, checksum) of its data, or None: zeros."""


@dataclass
class Pending:
    """Keys are those of blocks; a region is (layer, number)."""

    records: int = 0
    claims: dict[int, dict[int, list[Claim]]] = field(default_factory=dict)
    """By key of the block and by sector, oldest first."""
    dropped: dict[int, int] = field(default_factory=dict)
    """By key of the block: the mask of the clean sectors that are not valid any more."""
    hot: set[tuple[int, int]] = field(default_factory=set)
    """(layer, region) of the regions that became hot."""
    made: dict[int, tuple[str, bool]] = field(default_factory=dict)
    """Layers that were made, by number: (name, private)."""
    slots: dict[int, int] = field(default_factory=dict)
    """The slots that records name, each with the key of the block that it is for."""
    last: dict[int, int] = field(default_factory=dict)
    """By key of the block: sectors that the last frame names. After a kill nobody may have been told of them."""
    fault: str = ""
    """Why the records end where they do, if they make no sense from there on."""

    @classmethod
    def read(cls, device: Device, meta: Meta) -> Pending:
        """All records from the position in the index on. Raises OSError."""
        found = cls()
        journal = Journal(device, Position(meta.journal_offset, meta.journal_sequence))
        for payload in journal.replay():
            found.last.clear()
            try:
                for op in ops.unpack(payload):
                    found._take(op)
            except (ValueError, IndexError, struct.error) as fault:
                found.fault = f"a record that makes no sense behind {found.records}: {fault}"
                break
        return found

    def _take(self, op: ops.Op) -> None:
        self.records += 1
        key = block_key(op.layer, op.a)
        match op.kind:
            case ops.LAYER:
                self.made[op.layer] = op.name, bool(op.side)
            case ops.HOT:
                self.hot.add((op.layer, op.a))
            case ops.DROP:
                self.dropped[key] = self.dropped.get(key, 0) | op.mask
            case ops.WRITE:
                self.slots[op.b] = key
                self.last[key] = self.last.get(key, 0) | op.mask
                sectors = [s for s in range(SECTORS) if op.mask >> s & 1]
                for sector, crc in zip(sectors, op.crcs, strict=True):
                    self._of(key, sector).append((op.b, crc))
            case ops.ZERO:
                for sector in range(SECTORS):
                    if op.mask >> sector & 1:
                        self._of(key, sector).append(None)
            case _:
                raise ValueError(f"kind {op.kind}")

    def _of(self, key: int, sector: int) -> list[Claim]:
        return self.claims.setdefault(key, {}).setdefault(sector, [])

    def named(self, key: int) -> int:
        """Mask of the sectors of a private block that records say something of."""
        return sum(1 << sector for sector in self.claims.get(key, ())) & FULL
