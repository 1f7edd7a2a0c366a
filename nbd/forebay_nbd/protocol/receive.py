"""Memory to receive into: what both roles' readers of the transmission phase are built on.

The owner receives into space() and says how much came with received(). Long data may get a target of their own, into
which they are received directly. No I/O happens here.
"""

from forebay_nbd.protocol.wire import Buffer


class ReceiveBuffer:
    """`capacity` bytes of memory; view[start:end] has been received and not been taken yet."""

    def __init__(self, capacity: int) -> None:
        self.view = memoryview(bytearray(capacity))
        self.start = 0
        self.end = 0
        self._target: memoryview | None = None
        self._filled = 0

    def space(self) -> memoryview:
        """Where the next bytes go; never empty once the reader has said NEED_DATA."""
        if self._target is not None:
            return self._target[self._filled :]
        if self.start == self.end:
            self.start = self.end = 0
        return self.view[self.end :]

    def received(self, count: int) -> None:
        """`count` bytes were put into space()."""
        if self._target is not None:
            self._filled += count
        else:
            self.end += count

    def feed(self, data: Buffer) -> int:
        """Copies as much of `data` into space() as fits and returns how much that was."""
        space = self.space()
        count = min(len(space), len(data))
        space[:count] = memoryview(data)[:count]
        self.received(count)
        return count

    def _make_room(self, needed: int) -> None:
        """Moves an incomplete message of `needed` bytes to the front unless its rest fits where it is."""
        if self.start + needed > len(self.view):
            have = self.end - self.start
            # Both may overlap: an assignment within one buffer behaves as memmove.
            self.view[:have] = self.view[self.start : self.end]
            self.start, self.end = 0, have

    def _aim(self, target: memoryview) -> None:
        """Receives the next len(target) bytes into `target`; what has been received beyond the header goes first."""
        count = self.end - self.start
        target[:count] = self.view[self.start : self.end]
        self.start = self.end = 0
        self._target, self._filled = target, count

    def _hit(self) -> bool:
        """Is the target full? Then it is given up."""
        if self._target is None or self._filled < len(self._target):
            return False
        self._target, self._filled = None, 0
        return True
