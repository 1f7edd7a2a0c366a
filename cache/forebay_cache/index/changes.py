"""What one commit stores in the index, and how the parts of the cache take part in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

FORMAT = 2
"""The format of the index, of which there is one that this code reads and writes."""


class Taken(NamedTuple):
    """The checksums of some slots of one group of 16: bit n of ``slots`` for the n-th of them, ``raw`` for all 16."""

    group: int
    slots: int
    raw: bytes


@dataclass
class Meta:
    """What the index says of itself and of the whole cache. Stored as JSON: the names are part of the format."""

    uuid: str
    """That of the device: both or none are opened."""
    fresh: bool = True
    """True while nothing was ever stored: a blank device may be formatted for this index."""
    boot_id: str = ""
    """The boot id of the kernel under which the index was opened last."""
    clean: bool = True
    """True if the cache was closed. Nothing but `forebay cache check` reads it."""
    journal_offset: int = 0
    """Where replay of the journal begins: bytes from its start ..."""
    journal_sequence: int = 1
    """... and the sequence number of the frame there."""
    frontier: int = 0
    """No slot with this number or a higher one was ever used."""
    next_layer: int = 1
    """The number of the next layer that is made; numbers are not used again."""
    format: int = FORMAT


@dataclass
class LayerRecord:
    """A layer as the index has it. Stored as JSON: the names are part of the format."""

    name: str
    private: bool
    slots: int = 0
    """How many slots its pages name."""
    sectors: int = 0
    """How many sectors it answers for."""
    dead: bool = False
    """True if it is not used any more, and what it holds is to be freed."""
    pinned: bool = False
    """True if it is clean, and nothing of it may be evicted: the whole image is to stay."""


@dataclass
class Changes:
    """One commit: what is to become durable together. What is not named here stays as it is in the index."""

    meta: Meta | None
    """None: it stays as it is."""
    pages: list[tuple[bytes, bytes]] = field(default_factory=list)
    """(key, words) of pages, in the order of the keys. Pages of nothing but zeros are deleted."""
    sums: list[Taken] = field(default_factory=list)
    layers: dict[int, LayerRecord | None] = field(default_factory=dict)
    """By number; None: deleted."""
    hot: list[tuple[bytes, bool]] = field(default_factory=list)
    """(key, whether it is hot) of regions."""
    records: dict[tuple[str, str], dict[str, Any] | None] = field(default_factory=dict)
    """By (kind, name); None: deleted."""


class Share(NamedTuple):
    """What one part of the cache has in a commit. Exactly one of the two is called when the commit has ended.

    Neither awaits, and nothing else runs between the calls for two parts of one commit.
    """

    succeeded: Callable[[], None]
    """The index has it, durably."""
    failed: Callable[[], None]
    """The index may not have it: keep it for the next commit, together with what has changed meanwhile."""


class Participant(Protocol):
    """A part of the cache whose changes commits make durable."""

    def has_changes(self) -> bool:
        """True if a commit would have anything of this part to store, or would let it free anything."""

    def contribute(self, changes: Changes) -> Share:
        """Put everything that has changed since the last commit into ``changes``. Must not await.

        All parts are asked in one critical section, so what is in one commit belongs to one instant.
        """


def nothing() -> None:
    """For a :class:`Share` that has nothing to do in one of the two cases."""
