"""What the server needs of a disk."""

from typing import Protocol, runtime_checkable

from forebay_nbd.protocol.wire import Buffer, Flag


@runtime_checkable
class Export(Protocol):
    """One disk. Offsets and lengths in bytes; the server has checked them against `size` and `read_only`.

    Methods raise OSError(errno, text), which becomes the answer to the request. Nothing here is called after closed().
    """

    name: str
    size: int
    read_only: bool
    rotational: bool
    preferred_block: int
    """Size and alignment at which requests are efficient, bytes: a power of two from 512 on."""
    contexts: tuple[str, ...]
    """Metadata contexts beside base:allocation, as "namespace:leaf"."""

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """One contiguous buffer of exactly `length` bytes, or None where that would mean waiting or several buffers.

        The buffer may be a slice of memory that is used again: it is valid until the caller next awaits, and longer
        only between pin() and unpin().
        """

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """Takes the first n of some (offset, data) and returns n; the next one, if any, goes to write().

        What was taken may be acknowledged, read, and its memory used again, only after publish(). Raises OSError for
        the first one; when a later one fails, those before it are returned.
        """

    def publish(self) -> None:
        """Called after each write_now(). An OSError here is the answer to all that it took."""

    def flush_now(self) -> bool:
        """True: as flush(), in a moment. False: use flush(). Raises OSError."""

    def unreadable(self) -> None:
        """The kernel could not read a buffer that was handed out: no other one without being sure of it."""

    def pin(self) -> int:
        """From now on buffers handed out stay as they are; the token ends that, given to unpin()."""

    def unpin(self, token: int) -> None:
        """Ends what pin() began."""

    async def read(self, offset: int, length: int) -> list[Buffer]:
        """Buffers in order, lengths adding up to `length`; as valid as those of read_now()."""

    async def write(self, offset: int, data: memoryview, fua: bool) -> None:
        """Returns when the write may be acknowledged, with `fua` when it is durable. `data` is valid until then."""

    async def flush(self) -> None:
        """All that was acknowledged before, on any connection, is durable when this returns."""

    async def trim(self, offset: int, length: int, fua: bool) -> None:
        """The content is no longer needed."""

    async def zero(self, offset: int, length: int, fua: bool, no_hole: bool, fast: bool) -> None:
        """The range reads as zeros from now on. `fast`: OSError(ENOTSUP) at once if that is no faster than writing."""

    async def cache(self, offset: int, length: int) -> None:
        """A hint that the range will be read soon."""

    async def extents(
        self, context: str, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        """At least one (length, flags) from `offset` on; only the first is used where `one` is set."""

    def opened(self) -> None:
        """A client entered transmission."""

    def closed(self) -> None:
        """It left, in whatever way. Not a flush."""


def transmission_flags(export: Export, structured: bool) -> Flag:
    """The flags under which an export is offered. DF exists only where structured replies were agreed on."""
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
