# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The snapshots of a disk: names for boundaries between its private layers.

A snapshot is what the disk showed at one instant: the private layers up to a generation, over the image. Taking one
has a new layer take the writes from then on, and copies nothing. They are in the index, one record for all of a disk.
"""

from dataclasses import asdict, dataclass

from forebay_cache import Cache

KIND = "snapshots"
"""Kind of the record, by the disk's name."""

MOST = 1000
"""Snapshots of one disk at most: each is a layer that a lookup has to merge."""


NONE = (0, 0)
"""No generations."""


@dataclass(frozen=True)
class Snapshot:
    """One of them. The names of the fields are part of the format."""

    name: str
    generation: int
    """Of the newest private layer that belongs to it; 0: none does, it is the image as it is."""
    created: int
    """Seconds since the epoch."""


class Snapshots:
    """Those of one disk. A change is in memory at once, and durable with the next commit."""

    def __init__(self, cache: Cache, disk: str) -> None:
        self._records = cache.records
        self._disk = disk

    def all(self) -> list[Snapshot]:
        """The oldest first."""
        found = self._records.get(KIND, self._disk)
        return [Snapshot(**one) for one in found["snapshots"]] if found else []

    def boundary(self) -> int:
        """The newest generation that belongs to a snapshot; 0 where there is none."""
        return max((one.generation for one in self.all()), default=0)

    def put(self, snapshots: list[Snapshot], gone: tuple[int, int] = NONE) -> None:
        """Have these, the oldest first, and no others.

        `gone`: layers of generations after the first and up to the second one are given up. That is decided when this
        is durable; whoever has given them up puts it without.
        """
        value = {"snapshots": [asdict(one) for one in snapshots], "gone": list(gone)}
        self._records.put(KIND, self._disk, value if snapshots or gone != NONE else None)

    def gone(self) -> tuple[int, int]:
        """Generations of which it was decided that they go: after the first, up to the second."""
        after, upto = (self._records.get(KIND, self._disk) or {}).get("gone", NONE)
        return after, upto
