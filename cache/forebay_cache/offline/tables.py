# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The tables of an index that is open to read only, as a check reads them."""

from __future__ import annotations

from collections.abc import Iterator

import lmdb

from forebay_cache.format.checksum import GROUP, SIZE, sums_in_group
from forebay_cache.format.records import GROUP_KEY, TABLES


class Tables:
    """The tables of the index, within one transaction."""

    def __init__(self, env: lmdb.Environment, txn: lmdb.Transaction[bytes]) -> None:
        self._txn = txn
        self._db = {}
        for name in TABLES:
            try:
                self._db[name] = env.open_db(name.encode(), txn=txn, create=False)
            except lmdb.Error:
                pass  # told as a missing table
        self._group: tuple[int, bytes] = (-1, b"")

    @property
    def missing(self) -> list[str]:
        """The names of tables that should be there and are not."""
        return [name for name in TABLES if name not in self._db]

    def get(self, table: str, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        value: bytes | None = self._txn.get(key, db=self._db[table])
        return value

    def items(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        """All keys and values of a table, in the order of the keys."""
        with self._txn.cursor(db=self._db[table]) as cursor:
            yield from cursor

    def sums(self, slot: int) -> bytes:
        """The checksums of a slot as the index has them, u32[16]; zeros where it has none."""
        group = slot // GROUP
        if self._group[0] != group:
            value = self.get("sums", GROUP_KEY.pack(group)) or b""
            self._group = group, value.ljust(GROUP * SIZE, b"\0")
        return sums_in_group(self._group[1], slot)
