# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Overlays that were detached and are kept: what is on record of them until they are attached again.

Their private layers stay in the cache as they are. What their image looked like when they were detached is kept with
them: over another one their changes mean nothing.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any, Self

from forebay.checkpoint.snapshots import Snapshot, Snapshots
from forebay.errors import ForebayError
from forebay.image.source import Source
from forebay.origin.protocol import Identity
from forebay_cache import Cache
from forebay_cache.format.geometry import SECTOR

KIND = "kept"
"""Kind of the record, by the disk's name."""


@dataclass(frozen=True)
class Kept:
    """One of them. The names of the fields are part of the format."""

    record: dict[str, Any]
    """What was on record of the disk."""
    identity: list[int] | None
    """What the image looked like; None: nobody knew."""
    since: int
    """When it was detached, seconds since the epoch."""
    leaving: bool = False
    """True once it is given up: a start goes on with that."""

    @classmethod
    def now(cls, record: dict[str, Any], cache: Cache) -> Self:
        """One that is being detached."""
        return cls(record, identity_of(cache, record["key"]), int(time.time()))

    @property
    def key(self) -> str:
        """The key of its image."""
        return str(self.record["key"])

    def is_of(self, found: Identity) -> bool:
        """True if an image that looks like that is the one it was detached from, as far as anybody knows."""
        return self.identity is None or Identity(*self.identity).content == found.content


def identity_of(cache: Cache, key: str) -> list[int] | None:
    """What the image with that key looked like when that was put on record last; None where nobody knows."""
    found: list[int] | None = (cache.records.get("image", key) or {}).get("identity")
    return found


class KeptOverlays:
    """All of them, by name. A change is in memory at once, and durable with the next commit."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def all(self) -> dict[str, Kept]:
        """By name."""
        return {name: Kept(**found) for name, found in self._cache.records.all(KIND).items()}

    def get(self, name: str) -> Kept | None:
        """The one of that name; None where there is none."""
        found = self._cache.records.get(KIND, name)
        return None if found is None else Kept(**found)

    def put(self, name: str, kept: Kept | None) -> None:
        """Keep it on record, or (None) not any more."""
        self._cache.records.put(KIND, name, None if kept is None else asdict(kept))

    def on(self, key: str) -> list[str]:
        """The names of those that lie on the image with that key."""
        known = self._cache.records.all(KIND)
        return sorted(name for name, found in known.items() if found["record"]["key"] == key)

    def check(self, name: str, source: Source) -> None:
        """See that a disk of that name may be attached with that source. Raises ForebayError."""
        kept = self.get(name)
        if kept is not None and kept.leaving:
            raise ForebayError(f"the changes of '{name}' are being given up: try again")
        if kept is not None and not (source.use.overlay and source.key == kept.key):
            raise ForebayError(
                f"'{name}' is an overlay on {kept.key} that is kept: attach it with that image and --overlay, choose "
                f"another name, or give its changes up with 'forebay revert {name}'"
            )
        if source.use.writes and (names := self.on(source.key)):
            raise ForebayError(
                f"{source.key} is the base of '{names[0]}', an overlay that is kept: attach it with --overlay or "
                f"--read-only, or give those changes up with 'forebay revert {names[0]}'"
            )

    def snapshots(self, name: str) -> list[Snapshot]:
        """The snapshots of one, the oldest first."""
        return Snapshots(self._cache, name).all()

    def forget(self, name: str) -> None:
        """Give up one, with all that the cache has of it."""
        self.put(name, None)
        Snapshots(self._cache, name).put([])
        for layer in self._cache.layers.private_of(name):
            self._cache.layers.drop(layer)

    def finish(self) -> None:
        """At a start: give up what was to be given up."""
        for name in [name for name, kept in self.all().items() if kept.leaving]:
            self.forget(name)

    def bytes_of(self, name: str) -> int:
        """Bytes that the cache has of it."""
        return sum(x.sectors for x in self._cache.layers.private_of(name)) * SECTOR
