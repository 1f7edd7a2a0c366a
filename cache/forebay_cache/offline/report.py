# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a check of a cache found, and what would mend it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from forebay_cache.format.records import LayerName

MOST_TOLD = 1000
"""Faults that are told one by one; of more there are counts only."""


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it has to be. The names are those that operators see as JSON."""

    what: str
    """Of what kind: "superblock", "lmdb", "index", "overlap", "journal", "checksum" or "unreadable"."""
    text: str
    layer: LayerName | None = None
    """The layer that it is in; None if it is in none, or nobody knows in which."""
    private: bool = False
    """True if only the cache has what is concerned."""
    offset: int = 0
    """Where it begins, in bytes of the image or disk, if it is in a layer ..."""
    length: int = 0
    """... and how many bytes are concerned."""
    slot: int = -1
    """Where these lie; -1: nowhere, or there are none."""


@dataclass
class Fix:
    """What would make one block right again: its entry forgotten, or only some sectors of it."""

    private: bool
    """True if that loses data that only the cache has."""
    entry: bool = False
    """True if the entry makes no sense, and has to go as a whole."""
    sectors: int = 0
    """Otherwise the mask of the damaged sectors."""


@dataclass
class Mending:
    """What a repair has to do. Nothing of it is told."""

    fixes: dict[int, Fix] = field(default_factory=dict)
    """By key of the block."""
    pages: dict[bytes, bool] = field(default_factory=dict)
    """Whole pages that cannot be read, by their key in the index; True if they may hold private data."""
    entries: dict[tuple[str, bytes], bool] = field(default_factory=dict)
    """Other entries of the index that make no sense, by (table, key); True if dropping one may lose dirty data."""
    superblocks: bool = True
    """False: the superblock, or its copy, has to be written again."""
    totals: bool = True
    """False: a layer does not have as many slots and sectors as it says."""


@dataclass
class Report:
    """What a check found. Numbers of things, and bytes. The names are those of ``forebay cache check --json``."""

    device: str
    index: str
    uuid: str = ""
    size: int = 0
    slots: int = 0
    clean_slots: int = 0
    private_slots: int = 0
    free_slots: int = 0
    layers: int = 0
    records: int = 0
    hot_regions: int = 0
    journal_records: int = 0
    ended: str = "unknown"
    """Whether the daemon had time to write everything down: "cleanly", "not cleanly" or "unknown"."""
    checked_bytes: int = 0
    damaged_clean: int = 0
    damaged_private: int = 0
    damaged_index: int = 0
    faults: list[Fault] = field(default_factory=list)
    hopeless: str = ""
    """Why nothing can be repaired; empty if something can, or needs not be."""
    mending: Mending = field(default_factory=Mending)

    @property
    def used_slots(self) -> int:
        """Slots that anything names, in the index or in the journal."""
        return self.clean_slots + self.private_slots

    @property
    def damaged(self) -> bool:
        """True if anything is wrong."""
        return bool(self.faults or self.hopeless)

    def note(self, fault: Fault) -> None:
        """Count a fault in; the first ones are told one by one."""
        if len(self.faults) < MOST_TOLD:
            self.faults.append(fault)

    def wrong(self, text: str, what: str = "index", **where: Any) -> None:
        """Note a fault of the index, or of what leads to it. ``where``: what of :class:`Fault` is known."""
        self.damaged_index += 1
        self.note(Fault(what, text, **where))

    def json(self) -> dict[str, Any]:
        """As a dict of plain values: counts, and the faults, with ``layer`` as LayerName.json() has it, or None."""
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name == "clean_slots":
                found["used_slots"] = self.used_slots
            if name != "mending":
                found[name] = value
        for told, fault in zip(found["faults"], self.faults, strict=True):
            told["layer"] = None if fault.layer is None else fault.layer.json()
        return found
