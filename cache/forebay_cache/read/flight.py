# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One read of the origin, as those see it who wait for it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import trio

from forebay_cache.format.geometry import BLOCK_SHIFT


class Flight:
    """One origin read that is on its way: of whole blocks, as far as the image has them, but for a guest's own bytes.

    ``background``: nobody waits for it yet. ``told`` is told of how many seconds it took to land.
    """

    __slots__ = (
        "_began",
        "_told",
        "data",
        "error",
        "is_ahead",
        "joined",
        "landed",
        "length",
        "needed",
        "offset",
        "stored",
    )

    def __init__(
        self,
        offset: int,
        length: int,
        *,
        background: bool = False,
        told: Callable[[float], None] | None = None,
    ) -> None:
        self._began, self._told = perf_counter(), told
        self.offset = offset
        self.length = length
        self.is_ahead = background  # it was begun when nobody waited
        self.needed = trio.Event()  # somebody waits
        if not background:
            self.needed.set()
        self.landed = trio.Event()
        self.stored = trio.Event()  # what could be kept of it is kept
        self.joined: list[Callable[[], None]] = []  # called then
        self.data = memoryview(b"")
        self.error: OSError | None = None

    def land(self) -> None:
        """Say that the read has ended: there is data, or an error."""
        self.landed.set()
        if self._told is not None:
            self._told(perf_counter() - self._began)

    def end(self) -> None:
        """Say that nothing more becomes of it."""
        self.stored.set()
        for wake in self.joined:
            wake()

    def blocks(self) -> range:
        """The numbers of the blocks that it brings."""
        return range(self.offset >> BLOCK_SHIFT, (self.offset + self.length - 1 >> BLOCK_SHIFT) + 1)
