# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One unsigned number for each slot, in memory that is taken only for the slots that are used."""

from __future__ import annotations

import mmap
from typing import Literal

_BYTES = {"H": 2, "Q": 8}


class SlotNumbers:
    """Numbers by slot, zero at first. ``code`` is their type as in ``struct``: H for 16 bits, Q for 64.

    ``values`` is what is read and written. It is another object after :meth:`grow`.
    """

    def __init__(self, slots: int, code: Literal["H", "Q"]) -> None:
        self._code = code
        self._map = mmap.mmap(-1, self._size(slots), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.values = memoryview(self._map).cast(code)

    def _size(self, slots: int) -> int:
        return max(slots * _BYTES[self._code], mmap.PAGESIZE)

    def grow(self, slots: int) -> None:
        """Have room for ``slots`` slots. Raises OSError when there is no memory; then nothing has changed."""
        self.values.release()
        try:
            self._map.resize(self._size(slots))
        finally:
            self.values = memoryview(self._map).cast(self._code)

    def clear(self) -> None:
        """Make all numbers zero, and give their memory back."""
        self._map.madvise(mmap.MADV_DONTNEED)  # private and anonymous: reads as zeros again
