# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The requests in a receive buffer, of which whoever decodes them sees those that may be carried out. No I/O here.

What has to wait stays in the buffer, as it came: it costs no memory but the buffer's own, and whoever takes the
connection over finds it there. A FLUSH is brought to the front: it is about writes that were answered, so it may
overtake all others, and it never waits for them.
"""

from collections.abc import Callable

from forebay_nbd.protocol.requests import RequestReader
from forebay_nbd.protocol.wire import MAX_PAYLOAD, REQUEST, REQUEST_MAGIC, Cmd
from forebay_nbd.throttle.throttle import FREE

_HEADER = REQUEST.size
MOST_AT_ONCE = 64
"""Requests that are let in at one time: then others get a turn of the event loop."""


class Held:
    """What `reader` has, from its `start` on: first what it shows, up to its `end`, then what is kept from it."""

    def __init__(self, reader: RequestReader, in_place: int) -> None:
        """`in_place` is the longest payload that the reader hands out as a part of the buffer."""
        self._reader = reader
        self._in_place = in_place
        self._end: int | None = None
        """Where what was received ends, while the reader's own `end` says less."""
        self._ahead = 0
        """So many bytes, from the first on that is not let in, hold whole requests, and no FLUSH."""

    def show_all(self) -> None:
        """Let the reader see everything that was received."""
        if self._end is not None:
            self._reader.end, self._end = self._end, None

    def forget(self) -> None:
        """The same; and what lies there may be taken by others now."""
        self.show_all()
        self._ahead = 0

    def hide_all(self) -> None:
        """Let the reader see nothing."""
        self.show_all()
        self._show(self._reader.start)

    def _show(self, end: int) -> None:
        if end != self._reader.end:
            self._end, self._reader.end = self._reader.end, end

    def let_in(self, admit: Callable[[int, int], float]) -> float | None:
        """Show the reader what it may carry out: 0.0, and it shows at least one request, or what is none.

        Otherwise the seconds after which the first one is worth another try, or None if the first one is not complete:
        more has to be received; the reader shows everything then. `admit` is asked for (command, length).
        """
        self.show_all()
        reader = self._reader
        start = at = reader.start
        wait: float | None = None
        for _ in range(MOST_AT_ONCE):
            length = self._length_at(at)
            if length is None:
                break
            wait = self._asked(at, admit)
            if wait:
                break
            at += length
        if at == start and wait and self._bring_flush_forward():
            at = start + _HEADER
        elif at > start:
            self._ahead = max(0, self._ahead - (at - start))
        if at == start:
            return wait
        self._show(at)
        return 0.0

    def _length_at(self, at: int) -> int | None:
        """Bytes of the request there, as far as they were received; None while it is not complete.

        One whose payload gets memory of its own is complete with its header. What is no request counts as one, with all
        that follows: it ends the connection.
        """
        have = self._reader.end - at
        if have < _HEADER:
            return None
        magic, _, command, _, _, length = REQUEST.unpack_from(self._reader.view, at)
        if magic != REQUEST_MAGIC:
            return have
        if command != Cmd.WRITE:
            return _HEADER
        if _HEADER + length <= have:
            return _HEADER + int(length)
        return None if length <= self._in_place else have

    def _asked(self, at: int, admit: Callable[[int, int], float]) -> float:
        magic, _, command, _, _, length = REQUEST.unpack_from(self._reader.view, at)
        if magic != REQUEST_MAGIC or command in FREE:
            return 0.0
        if command in (Cmd.READ, Cmd.WRITE) and length > MAX_PAYLOAD:
            return 0.0  # an error, and nothing else comes of it
        return admit(command, length)

    def _bring_flush_forward(self) -> bool:
        """Have the first FLUSH that is complete be the first request. False if there is none."""
        reader, view = self._reader, self._reader.view
        start = reader.start
        at = start + self._ahead
        while (length := self._length_at(at)) is not None:
            magic, _, command, _, _, _ = REQUEST.unpack_from(view, at)
            if magic != REQUEST_MAGIC or command == Cmd.DISC:  # nothing counts behind it
                break
            if command == Cmd.FLUSH:
                flush = bytes(view[at : at + _HEADER])
                view[start + _HEADER : at + _HEADER] = view[start:at]
                view[start : start + _HEADER] = flush
                return True
            at += length
            self._ahead = at - start
        return False

    def space(self) -> memoryview:
        """The memory to receive more into; empty if the buffer is full. The reader shows everything then."""
        self.show_all()
        return self._reader.room()
