# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What hides an overlay from its clients while another host has it, or may have it: each request waits, or fails."""

import errno
from collections.abc import Awaitable, Callable

import trio

from forebay.disk.disk import Disk
from forebay.units import Mode
from forebay_cache import View
from forebay_cache.format.geometry import Buffer

Read = Callable[[int, int], Awaitable[Buffer]]


class Curtain:
    """Of one disk. While it is drawn `inner` sees the layers of the disk, which its clients do not."""

    def __init__(self, disk: Disk, on_wanted: Callable[[], None]) -> None:
        """`on_wanted` is called when a request begins to wait."""
        self._disk = disk
        self._on_wanted = on_wanted
        self._lifted = trio.Event()
        self._waiting = 0
        self._gone = ""
        self.inner = disk.view

    def _see(self) -> View:
        image = self._disk.image
        clean = None if self._disk.mode is Mode.NONE else image.layer
        return View(image.cache, [], clean, self._disk.reads.fetch)

    @property
    def is_drawn(self) -> bool:
        """True while it hides the disk."""
        return self._disk.modes.veil is self

    @property
    def is_waited_for(self) -> bool:
        """True while a request waits for it to be lifted."""
        return self._waiting > 0

    def draw(self, why: str, read: Read) -> None:
        """Hide the disk; `read` serves reads meanwhile. No write may be under way. A critical section."""
        disk = self._disk
        self._lifted, self._gone, self.inner = trio.Event(), "", self._see()
        disk.source.kept_back = why
        disk.modes.put_behind(self)
        disk.modes.show_clean(shown=False)
        disk.dirty.show_by(self.inner)
        disk.reads.elsewhere = read
        disk.image.clean.watch(self.inner)

    def lift(self) -> None:
        """Show the disk again. A critical section."""
        disk = self._disk
        disk.image.clean.unwatch(self.inner)
        disk.reads.elsewhere = None
        disk.dirty.show_by(disk.view)
        disk.source.note_come()
        disk.modes.show_clean(shown=True)
        disk.modes.put_behind(None)
        self._lifted.set()

    def fail(self, why: str) -> None:
        """Have each request fail from now on: another host has it."""
        self._gone = self._disk.source.kept_back = why
        self._lifted.set()

    async def arrive(self) -> None:
        """Wait until it is lifted. Raises OSError(EIO) after the disk's `origin_timeout`, or where it never will be."""
        self._waiting += 1
        try:
            with trio.move_on_after(self._disk.settings.origin_timeout):
                while self.is_drawn and not self._gone:
                    self._on_wanted()
                    await self._lifted.wait()
        finally:
            self._waiting -= 1
        if self.is_drawn:
            raise OSError(errno.EIO, f"'{self._disk.name}': {self._disk.source.kept_back}")


def joined(buffers: list[Buffer]) -> Buffer:
    """One buffer of them all."""
    return buffers[0] if len(buffers) == 1 else b"".join(bytes(one) for one in buffers)
