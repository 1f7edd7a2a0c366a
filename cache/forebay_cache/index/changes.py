# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What one commit stores in the index, and how the parts of the cache take part in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from forebay_cache.format.records import LayerRecord, Meta


class Taken(NamedTuple):
    """The checksums of some slots of one group of 16: bit n of ``slots`` for the n-th of them, ``raw`` for all 16."""

    group: int
    slots: int
    raw: bytes


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
