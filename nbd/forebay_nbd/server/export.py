# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The interface between the server and what it serves: a disk, and which disks a client may have."""

import math
from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

from forebay_fast.latency import FLUSH, HIT, REQUESTS, WRITE, Latency
from forebay_nbd.protocol.wire import Buffer, Cmd, Flag, Rep
from forebay_nbd.throttle.throttle import Throttle

LONGEST_REASON: Final = 500
"""Characters of a refusal that a client is told: below the protocol's bound of a string, whatever name is in it."""


class Flushing(Protocol):
    """A flush that was begun, see :meth:`Export.begin_flush`."""

    @property
    def has_ended(self) -> bool:
        """True once somebody has seen its end."""

    def fileno(self) -> int:
        """A descriptor that becomes readable when look() may tell something new."""

    def look(self) -> bool | None:
        """None as long as it has not ended; True if everything is durable; False: flush() has to be called instead."""

    async def wait(self) -> bool:
        """Returns what look() does when it has ended."""


KINDS: Final = {Cmd.READ: HIT, Cmd.WRITE: WRITE, Cmd.WRITE_ZEROES: WRITE, Cmd.FLUSH: FLUSH}
"""Of the commands of which is counted how long they took, the kind that they count as if nothing else is known."""


class Timing:
    """How long the requests of one export took, each from when it had come until its reply was given to the kernel.

    Times are seconds. What is answered at once is counted in `latency` by the server, many at a time; of each other
    one `carried_out` is told, which exports may overrule.
    """

    def __init__(self, latency: Latency | None = None, slow_seconds: float = math.inf) -> None:
        """`latency`: its first kinds are REQUESTS, and it stays what it is. `held_up` is told of what was answered at
        once after `slow_seconds` or more; a hundredth of a second is never slow.
        """
        self.latency = latency if latency is not None else Latency(REQUESTS)
        self.slow_seconds = slow_seconds

    def carried_out(self, command: int, offset: int, length: int, seconds: float) -> None:
        """Called in the task of a request, when its reply was sent, or as much of it as the client takes."""
        del offset, length
        kind = KINDS.get(Cmd(command))
        if kind is not None:
            self.latency.note(kind, seconds)

    def held_up(self, seconds: float) -> None:
        """Called where what needs no waiting for took longer than `slow_seconds` all the same."""


@runtime_checkable
class Export(Protocol):
    """One disk. Offsets and lengths are bytes; the server has checked each request against `size` and `read_only`.

    All methods are called in the event loop. Those that are not async must not take long, since all connections wait
    for them. Those for requests may raise OSError(errno, text), which becomes the reply to the request. All requests of
    a connection come between its opened() and its closed().
    """

    name: str
    size: int
    read_only: bool
    rotational: bool
    preferred_block: int
    """Size and alignment at which requests are efficient, bytes: a power of two from 512 on."""
    contexts: tuple[str, ...]
    """Metadata contexts beside base:allocation, as "namespace:leaf"."""

    @property
    def throttle(self) -> Throttle | None:
        """How fast all connections together may use it; None: nobody ever says. The same as long as it is there."""

    @property
    def timing(self) -> Timing:
        """What counts how long its requests take; the same one for good."""

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """A buffer with exactly the `length` bytes from `offset` on, or None: then the server calls read().

        The buffer may be a slice of memory that the disk uses again. The server sends it before it awaits anything, or
        holds a pin (see pin()) until it is sent or copied.
        """

    def join_read(self, offset: int, length: int, wake: Callable[[], None]) -> bool:
        """True if these bytes are on their way for somebody else already; False, and nothing is done, otherwise.

        Then `wake` is called once, in the event loop, when read_now() may have them, or it has turned out that it will
        not; perhaps after closed().
        """

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """Carries out the first n of these writes (offset, data), and returns n; the server calls write() for the next.

        The server calls publish() before it acknowledges any of them, reads again, or uses the memory of `data` again.
        Raises OSError if the first write fails; if a later one does, the number of those before it is returned.
        """

    def publish(self) -> None:
        """Makes the writes of the last write_now() fit to be acknowledged; an OSError is the reply to all of them."""

    def answered(self) -> None:
        """Called when writes of write_now() were acknowledged, unless replies wait for the client: the time to prepare
        for a flush, as nobody waits. It does not have to be called.
        """

    def flush_now(self) -> bool:
        """Does what flush() does, if nothing has to be waited for; False, and nothing is done, otherwise."""

    def begin_flush(self) -> Flushing | None:
        """Begins what flush() does, if that is nothing but waiting for one descriptor; None, and nothing is done,
        otherwise.
        """

    def unreadable(self) -> None:
        """Called when the kernel could not read a buffer that was handed out, as when the medium below it is damaged.

        From then on the disk must not hand out slices of that memory without having made sure that it can be read.
        """

    def pin(self) -> int:
        """Called when buffers could not be sent at once: their memory must not be used for anything else until unpin().

        Returns a token that the server gives to unpin(). This holds for buffers that are handed out until then, and for
        those that were handed out before the call, if nothing was awaited since.
        """

    def unpin(self, token: int) -> None:
        """Called once for each pin(), with its token: the buffers are sent, copied or dropped."""

    async def read(self, offset: int, length: int) -> list[Buffer]:
        """Buffers that hold the `length` bytes from `offset` on, in order, valid as those of read_now() are."""

    async def write(self, offset: int, data: memoryview, fua: bool) -> None:
        """Returns when the write may be acknowledged; with `fua`, when it is durable. `data` is valid until then."""

    async def flush(self) -> None:
        """Returns when all writes are durable that were acknowledged before the call, on whatever connection."""

    async def trim(self, offset: int, length: int, fua: bool) -> None:
        """Takes note that the content of the range is no longer needed; with `fua`, durably."""

    async def zero(self, offset: int, length: int, fua: bool, no_hole: bool, fast: bool) -> None:
        """Makes the range read as zeros; with `fua`, durably; with `no_hole`, so that it stays allocated.

        With `fast`, raises OSError(ENOTSUP) at once if that is no faster than writing zeros.
        """

    async def cache(self, offset: int, length: int) -> None:
        """Takes note that the range is going to be read soon."""

    async def extents(
        self, context: str, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        """The extents (length, flags) in a metadata context from `offset` on: at least one; with `one`, one will do.

        They may cover more than the range, or less; the server cuts them to what the protocol allows, and to
        `Limits.status_extents`. Finding them must not take more memory than that many.
        """

    def opened(self) -> None:
        """Called when a connection to this disk enters transmission, before its first request, in the task from which
        all tasks of its requests are started: these have the context variables that are set here.
        """

    def closed(self) -> None:
        """Called once for each opened(), when no request of that connection is in flight any more, however it ended.

        It does not imply a flush.
        """


class Refused(Exception):
    """Raised for an export that a client does not get: `reason` says why in one printable line, `reply` is ERR_POLICY,
    or ERR_UNKNOWN where there is none of that name.
    """

    def __init__(self, reason: str, reply: Rep = Rep.ERR_POLICY) -> None:
        text = "".join(c if c.isprintable() else "?" for c in " ".join(reason.split()))
        half = LONGEST_REASON // 2  # what is long is a name that the client has sent
        self.reason = text if len(text) <= LONGEST_REASON else f"{text[: half - 1]}…{text[-half:]}"
        self.reply = reply
        super().__init__(self.reason)


class Exports(Protocol):
    """What one client may have. Each connection gets one of its own, which `close` ends.

    The server awaits `look` before it asks `find` about a name, and `look_around` before it asks for `names`. The time
    that they take is not the client's, so both have to be bounded.
    """

    async def look(self, name: str) -> None:
        """Finds out what `find` is going to say of that name. The name is hostile, and may be empty."""

    async def look_around(self) -> None:
        """Finds out what `names` is going to return."""

    def find(self, name: str) -> Export | None:
        """The export of that name, which stays what it is until another one is looked for, or close(); None if there is
        none. find("") is the default export. Raises Refused, which says more.
        """

    def names(self) -> list[str]:
        """What LIST shows."""

    def close(self) -> None:
        """Called once, when the connection has ended."""


class KnownExports:
    """Exports that are there all the time."""

    def __init__(
        self, resolve: Callable[[str], Export | None], names: Callable[[], list[str]]
    ) -> None:
        self.find = resolve
        self.names = names

    async def look(self, name: str) -> None:
        """Implements Exports: nothing to do."""

    async def look_around(self) -> None:
        """Implements Exports: nothing to do."""

    def close(self) -> None:
        """Implements Exports: nothing to do."""


def transmission_flags(export: Export, structured: bool) -> Flag:
    """The transmission flags with which an export is offered. `structured`: structured replies were agreed on.

    Only with them is DF offered. CAN_MULTI_CONN is true because all connections to a disk meet in one Export.
    """
    flags = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_FUA | Flag.CAN_MULTI_CONN | Flag.SEND_CACHE
    if export.read_only:
        flags |= Flag.READ_ONLY
    else:
        flags |= Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO
    if export.rotational:
        flags |= Flag.ROTATIONAL
    if structured:
        flags |= Flag.SEND_DF
    return flags
