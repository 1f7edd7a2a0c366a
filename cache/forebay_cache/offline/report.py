"""What a check of a cache found, and what would mend it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

#: Faults that are told one by one; of more there are counts only.
MOST_TOLD = 1000


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it has to be. ``offset`` and ``length`` in bytes of the image or disk, where known.

    ``what``: "superblock", "lmdb", "index", "overlap", "journal", "checksum" or "unreadable".
    """

    what: str
    text: str
    layer: str = ""
    private: bool = False
    offset: int = 0
    length: int = 0
    slot: int = -1


@dataclass
class Fix:
    """What would make one block right again: its entry forgotten, or only these sectors of it."""

    private: bool
    entry: bool = False
    sectors: int = 0


@dataclass
class Report:
    """What a check found. ``ended``: whether the daemon had time to write everything down."""

    device: str
    index: str
    uuid: str = ""
    size: int = 0
    slots: int = 0
    used_slots: int = 0
    clean_slots: int = 0
    private_slots: int = 0
    free_slots: int = 0
    layers: int = 0
    records: int = 0
    hot_regions: int = 0
    journal_records: int = 0
    ended: str = "unknown"
    checked_bytes: int = 0
    damaged_clean: int = 0
    damaged_private: int = 0
    damaged_index: int = 0
    faults: list[Fault] = field(default_factory=list)
    #: nothing can be repaired: the text says why
    hopeless: str = ""
    #: by key of the block
    fixes: dict[int, Fix] = field(default_factory=dict)
    #: whole pages that cannot be read, by their key in the index; whether they may hold private data
    pages: dict[bytes, bool] = field(default_factory=dict)
    #: other entries of the index that make no sense, (table, key), and whether dropping them may lose dirty data
    entries: dict[tuple[str, bytes], bool] = field(default_factory=dict)
    superblocks: bool = True
    totals: bool = True

    @property
    def damaged(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.faults or self.hopeless)

    def note(self, fault: Fault) -> None:
        """One fault more; the first ones are kept."""
        if len(self.faults) < MOST_TOLD:
            self.faults.append(fault)

    def wrong(self, text: str, what: str = "index", **where: Any) -> None:
        """A fault of the index, or of what leads to it."""
        self.damaged_index += 1
        self.note(Fault(what, text, **where))

    def json(self) -> dict[str, Any]:
        """As a dict of plain values: counts, and the faults."""
        found = asdict(self)
        for name in ("fixes", "pages", "entries", "superblocks", "totals"):
            del found[name]
        return found
