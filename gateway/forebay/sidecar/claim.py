"""The claim on an image: its marker and its locks (owner.py), off the event loop."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Self, TypeVar

import trio

from forebay.origin.addresses import FileAddress
from forebay.origin.opening import OpenImage
from forebay.origin.threads import Call, Descriptor, StoreThreads, bounded
from forebay.sidecar import redo
from forebay.sidecar.marker import Marker
from forebay.sidecar.record import Owner, State

T = TypeVar("T")


class Claim:
    """A `Marker`, off the event loop. One call at a time, in order, also after one that was given up."""

    def __init__(self, marker: Marker, threads: StoreThreads, timeout: float) -> None:
        self._marker = marker
        self._threads = threads
        self._timeout = timeout
        self._turn = trio.Lock()
        self._last: trio.Event | None = None

    @classmethod
    async def take(
        cls,
        image: FileAddress,
        file: OpenImage,
        me: Owner,
        threads: StoreThreads,
        timeout: float,
        *,
        again: bool = False,
        need_locks: bool = True,
        descriptor: Descriptor | None = None,
    ) -> Self:
        """Become the owner. `descriptor` is the file's, where that may be closed while the call hangs.

        Raises ForebayError when another gateway is, or was in between where it is to be ours `again` (TakenOver), and
        OSError when the store fails.
        """

        def take() -> Marker:
            with descriptor or nullcontext():
                return Marker.take(image, file, me, again=again, need_locks=need_locks)

        with bounded(timeout, f"claiming {image.key}"):
            marker = await threads.run(take, drop=lambda late: late.close())
        return cls(marker, threads, timeout)

    @property
    def is_dirty(self) -> bool:
        """As `Marker`."""
        return self._marker.is_dirty

    @property
    def token(self) -> int:
        """Larger than that of every owner before."""
        assert self._marker.owner is not None, "released"
        return self._marker.owner.token

    async def dirty(self) -> None:
        """Before the first write that the image lacks is acknowledged. Durable when it returns.

        Raises OSError; the state is then as before or as asked.
        """
        await self._set_state("dirty")

    async def clean(self) -> None:
        """After the last such write was made durable in the image. As `dirty`."""
        await self._set_state("clean")

    async def _set_state(self, state: State) -> None:
        await self._one_at_a_time("marking", lambda: self._marker.set_state(state))

    async def begin_redo(self, as_of: str) -> redo.Redo:
        """See `Marker`. Raises OSError."""
        return await self._one_at_a_time(
            "beginning a checkpoint of",
            lambda: self._marker.begin_redo(as_of),
            drop=lambda late: late.drop(),
        )

    async def commit_redo(self, journal: redo.Redo) -> None:
        """Raises OSError: then it may be committed or not, and is the next one's to replace."""
        await self._one_at_a_time(
            "committing a checkpoint of", lambda: self._marker.commit_redo(journal)
        )

    async def drop_redo(self, journal: redo.Redo) -> None:
        """It was not committed, and never will be. Raises OSError."""
        await self._one_at_a_time("dropping a checkpoint of", journal.drop)

    async def end_redo(self, as_of: str, dirty_bytes: int) -> None:
        """The image has all of the checkpoint, durably. Raises OSError."""
        await self._one_at_a_time(
            "ending a checkpoint of", lambda: self._marker.end_redo(as_of, dirty_bytes)
        )

    async def check(self, dirty_bytes: int | None = None) -> None:
        """Raises TakenOver when somebody else owns the image now, OSError when the store fails.

        `dirty_bytes`: what the marker is to say that the image lacks.
        """

        def check() -> None:
            self._marker.check()
            if dirty_bytes is not None:
                self._marker.count(dirty_bytes)

        await self._one_at_a_time("looking at the owner of", check)

    async def admit(
        self, file: OpenImage, descriptor: Descriptor, *, need_locks: bool = True
    ) -> None:
        """See `Marker`. Raises ForebayError and OSError."""

        def admit() -> None:
            with descriptor:
                self._marker.admit(file, need_locks=need_locks)

        await self._one_at_a_time("locking", admit)

    async def release(self) -> None:
        """Give the image free. With state dirty the marker stays. Raises OSError."""
        await self._one_at_a_time("releasing", self._marker.release)

    async def close(self) -> None:
        """Let only the lock go, as a crash would: at a restart, and when the image is left dirty."""
        await self._one_at_a_time("unlocking", self._marker.close)

    async def _one_at_a_time(
        self, what: str, do: Callable[[], T], *, drop: Callable[[T], object] | None = None
    ) -> T:
        with bounded(self._timeout, f"{what} {self._marker.image.key}"):
            async with self._turn:
                if self._last is not None:
                    await self._last.wait()
                call = Call(do, drop=drop)
                self._last = call.ended
                return await self._threads.wait_for(call)
        raise AssertionError("bounded() raises")
