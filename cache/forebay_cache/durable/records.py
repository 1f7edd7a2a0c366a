# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Records of the layers above: what the gateway wants to find again after a restart (disks, images, ages of data)."""

from __future__ import annotations

from typing import Any

from forebay_cache.format.records import pack_record
from forebay_cache.index.changes import Changes, Share, nothing

Record = dict[str, Any]
"""What is stored as JSON. Whoever gets one must not change it in place."""


class Records:
    """All records, by kind and name. A participant of each commit, with or without the device."""

    def __init__(self) -> None:
        self._records: dict[str, dict[str, Record]] = {}  # by kind, then by name
        self._changed: set[tuple[str, str]] = set()

    def recover(self, records: dict[tuple[str, str], Record]) -> None:
        """At the start: these are in the index."""
        for (kind, name), value in records.items():
            self._records.setdefault(kind, {})[name] = value

    def get(self, kind: str, name: str) -> Record | None:
        """The record of that kind and name; None if there is none."""
        return self._records.get(kind, {}).get(name)

    def all(self, kind: str) -> dict[str, Record]:
        """All records of a kind, by name."""
        return dict(self._records.get(kind, {}))

    def put(self, kind: str, name: str, value: Record | None) -> None:
        """Store a record, or (None) remove it: in memory at once, durably with the next commit.

        Raises OSError for one that no commit could store, and keeps nothing of it: others would wait for it for ever.
        """
        if value is None:
            if self._records.get(kind, {}).pop(name, None) is None:
                return  # nothing of it was ever stored
        else:
            pack_record(kind, name, value)
            self._records.setdefault(kind, {})[name] = value
        self._changed.add((kind, name))

    def has_changes(self) -> bool:
        """True if a record was put since the last commit."""
        return bool(self._changed)

    def contribute(self, changes: Changes) -> Share:
        """Have a commit store the records that have changed."""
        taken, self._changed = self._changed, set()
        changes.records = {key: self.get(*key) for key in taken}

        def failed() -> None:
            self._changed |= taken

        return Share(nothing, failed)
