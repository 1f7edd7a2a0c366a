# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The receive buffer on which both roles' readers of the transmission phase are built. No I/O happens here.

Whoever has the socket receives into space() and reports with received() how many bytes came. Long data can be given a
target of their own: then they are received there, and not copied.
"""

from forebay_nbd.protocol.wire import Buffer


class ReceiveBuffer:
    """`capacity` bytes of memory. view[start:end] are the bytes that were received and not decoded yet."""

    def __init__(self, capacity: int) -> None:
        self.view = memoryview(bytearray(capacity))
        self.start = 0
        self.end = 0
        self._target: memoryview | None = None
        self._filled = 0

    def space(self) -> memoryview:
        """The memory to receive the next bytes into. It is not empty if next_event() has returned NEED_DATA."""
        if self._target is not None:
            return self._target[self._filled :]
        if self.start == self.end:
            self.start = self.end = 0
        return self.view[self.end :]

    def room(self) -> memoryview:
        """As space(), but never empty unless the buffer is full: what is not decoded yet is moved to the front."""
        if 2 * self.end > len(self.view):
            self._make_room(len(self.view))
        return self.space()

    def received(self, count: int) -> None:
        """Reports that `count` bytes were put at the beginning of space()."""
        if self._target is not None:
            self._filled += count
        else:
            self.end += count

    def feed(self, data: Buffer) -> int:
        """Copies as much of `data` into space() as fits, and returns how many bytes that were."""
        space = self.space()
        count = min(len(space), len(data))
        space[:count] = memoryview(data)[:count]
        self.received(count)
        return count

    def _make_room(self, needed: int) -> None:
        """Makes room for a message of `needed` bytes from `start` on, by moving it to the front if need be."""
        if self.start + needed > len(self.view):
            have = self.end - self.start
            # Both may overlap: an assignment within one buffer behaves as memmove.
            self.view[:have] = self.view[self.start : self.end]
            self.start, self.end = 0, have

    def _set_target(self, target: memoryview) -> None:
        """Receives into `target` until it is full. It begins with the bytes in view[start:end], which must be fewer."""
        count = self.end - self.start
        target[:count] = self.view[self.start : self.end]
        self.start = self.end = 0
        self._target, self._filled = target, count

    def _finish_target(self) -> bool:
        """True if the target is full; then bytes are received into the buffer again."""
        if self._target is None or self._filled < len(self._target):
            return False
        self._target, self._filled = None, 0
        return True
