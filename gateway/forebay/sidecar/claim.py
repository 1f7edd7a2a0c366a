# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The claim of a disk on the image file that it writes, off the event loop: its marker, locks and redo journals."""

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TypeVar

import trio

from forebay.origin.addresses import FileAddress
from forebay.origin.opening import OpenImage
from forebay.origin.threads import Call, Descriptor, StoreThreads, bounded
from forebay.sidecar.applying import Before, Place
from forebay.sidecar.incoming import Incoming
from forebay.sidecar.marker import Marker
from forebay.sidecar.record import Owner, TakenOver, UnreadableError
from forebay.sidecar.redo import RedoFile
from forebay_cache.blocks.frozen import Range

T = TypeVar("T")

log = logging.getLogger("forebay.origin")


class Claim:
    """The claim of one disk on its image: made with the disk, held from `take` until `release` or `leave`.

    Once somebody else has the image the claim is lost for good: `on_lost` is called once, and everything that needs the
    claim raises OSError from then on. The calls of its `Marker` are made one at a time, in order, also after one that
    was given up because its store did not answer within the time-out.
    """

    def __init__(
        self,
        address: FileAddress,
        label: str,
        *,
        gateway: str,
        disk: str,
        threads: StoreThreads,
        timeout: float,
        need_locks: bool = True,
        is_ours: bool = False,
        is_coming: bool = False,
    ) -> None:
        """`gateway` and `disk` are who claims, `label` is the image as the operator wrote it, `timeout` is in seconds.

        With `is_ours` a marker of this gateway was left at the last end, and the image is to be taken only if that
        still lies there. With `need_locks` an image whose file system has no locks is refused. With `is_coming` another
        gateway hands the image over to us.
        """
        self.asked_by: Incoming | None = None
        """Which gateway asked for the image when `check` looked last."""
        self.on_lost: Callable[[str], None] = log.error
        """Called with a sentence that says who has the image now."""
        self.dirty_bytes: Callable[[], int] = lambda: 0
        """Returns how many bytes the image lacks, for the marker to say."""
        self.begins_dirty = False
        """True where the marker is to say from the first on that the image lacks data: a write waits for it."""
        self._address = address
        self._label = label
        self._gateway = gateway
        self._disk = disk
        self._threads = threads
        self.timeout = timeout
        self._need_locks = need_locks
        self._is_ours = is_ours
        self._is_coming = is_coming
        self._drops_checkpoint = False
        """True once the operator gave up what was committed beside the image."""
        self._marker: Marker | None = None
        """The marker while the claim is held."""
        self._taking: trio.Event | None = None
        """Set when the thread of the last `take` has ended, also of one that was given up."""
        self._lost: str | None = None
        """Who has the image, once the claim is lost."""
        self._turn = trio.Lock()
        self._last: trio.Event | None = None
        """Set when the thread of the last call has ended."""

    # ------------------------------------------------------------------------------------------------------ taking it

    @property
    def is_held(self) -> bool:
        """True from `take` until `release` or `leave`, also when the claim was lost in between."""
        return self._marker is not None

    @property
    def is_of_before(self) -> bool:
        """True while the image was ours already, in this life or in the one before: what the cache has of it counts."""
        return self._is_ours

    async def take(self, file: OpenImage, descriptor: Descriptor | None = None) -> None:
        """Become the owner of the open image; where the claim is held, lock this descriptor of the image as well.

        `descriptor` is the file's, where that may be closed while the call hangs. Raises ForebayError when another
        gateway is the owner, and UnreadableError when nobody knows who is; TakenOver when the image was ours, and
        another one took it since; OSError when the store fails.
        """
        if self._marker is not None:
            await self._admit(self._marker, file, descriptor)
            return
        me = Owner.of_this_process(self._gateway, self._disk).of_image(self._address.format)
        if self.begins_dirty:
            me = replace(me, state="dirty", dirty_since=me.since)

        def take() -> Marker:
            with descriptor or nullcontext():
                return Marker.take(
                    self._address,
                    file,
                    me,
                    again=self._is_ours,
                    need_locks=self._need_locks,
                    drop_checkpoint=self._drops_checkpoint,
                    handed_over=self._is_coming,
                )

        call = Call(take, drop=lambda late: late.close())
        self._taking = call.ended
        with bounded(self.timeout, f"claiming {self._address.key}"):
            self._marker = await self._threads.wait_for(call)
        self._is_ours = True

    async def settle(self) -> None:
        """Wait until no `take` that was given up can make the image ours any more. Raises OSError: one still can."""
        if self._taking is not None:
            with bounded(self.timeout, f"waiting for a hung claim of {self._address.key}"):
                await self._taking.wait()

    async def _admit(self, marker: Marker, file: OpenImage, descriptor: Descriptor | None) -> None:
        def admit() -> None:
            with descriptor or nullcontext():
                marker.admit(file, need_locks=self._need_locks)

        await self._in_turn("locking", admit)

    def begin_anew(self) -> None:
        """Let the next `take` claim the image as if for the first time: nothing is left of what we had of it."""
        self._is_ours = False

    # ------------------------------------------------------------------------------------------- what the image lacks

    @property
    def is_dirty(self) -> bool:
        """True if the marker says that the image lacks data, or may say so; False while the claim is not held."""
        return self._marker is not None and self._marker.is_dirty

    async def mark_dirty(self) -> None:
        """Have the marker say, durably, that the image lacks data: before the first such write is acknowledged.

        Raises OSError, also before the claim was taken; the marker then says what it said before, or this.
        """
        with self._held() as marker:
            await self._in_turn("marking", lambda: marker.set_state("dirty"))

    async def mark_clean(self) -> None:
        """Have the marker say, durably, that the image lacks nothing: after the last such write is durable in it.

        Raises OSError, as `mark_dirty`.
        """
        with self._held() as marker:
            await self._in_turn("marking", lambda: marker.set_state("clean"))

    async def check(self, *, asked_only: bool = False) -> None:
        """See that the image is still ours to write, if it was, and have the marker say how much the image lacks.

        With `asked_only` nothing is looked at but who asks for the image. Raises OSError, after `on_lost` when it is
        not ours any more.
        """
        if self._marker is None:
            return
        with self._held() as marker:
            dirty_bytes = self.dirty_bytes()

            def check() -> Incoming | None:
                if asked_only:
                    return marker.asked_now()
                marker.check()
                marker.count(dirty_bytes)
                return marker.asked_by()

            self.asked_by = await self._in_turn("looking at the owner of", check)

    async def set_phase(self, phase: str, to: str) -> None:
        """Have the marker say, durably, how far a handover is: see `Marker.set_phase`. Raises OSError."""
        with self._held() as marker:
            await self._in_turn("marking", lambda: marker.set_phase(phase, to))

    async def forget_asked(self, by: Incoming) -> None:
        """Remove what a gateway that is gone has asked. Raises OSError."""
        with self._held() as marker:
            await self._in_turn("looking at the owner of", lambda: marker.forget_asked(by))

    # ---------------------------------------------------------------------------------------------- the redo journal

    async def begin_redo(self, as_of: str) -> "RedoJournal":
        """A redo journal for a checkpoint of that instant (UTC, ISO 8601; empty: not known). Raises OSError."""
        with self._held() as marker:
            file = await self._in_turn(
                "beginning a checkpoint of",
                lambda: marker.begin_redo(as_of),
                drop=lambda late: late.drop(),
            )
        return RedoJournal(self, marker, file, as_of, self._threads, self.timeout)

    async def commit_redo(self, made_by: Marker, file: RedoFile) -> None:
        """See `RedoJournal.commit`, which calls this."""
        with self._held(made_by) as marker:
            await self._in_turn("committing a checkpoint of", lambda: marker.commit_redo(file))

    async def drop_redo(self, made_by: Marker, file: RedoFile) -> None:
        """See `RedoJournal.drop`, which calls this."""
        self._check_held(made_by)
        await self._in_turn("dropping a checkpoint of", file.drop)

    async def end_redo(self, made_by: Marker, as_of: str, dirty_bytes: int) -> None:
        """See `RedoJournal.end`, which calls this."""
        with self._held(made_by) as marker:
            await self._in_turn(
                "ending a checkpoint of", lambda: marker.end_redo(as_of, dirty_bytes)
            )

    # ------------------------------------------------------------------------------------------------------- the end

    async def drop_checkpoint(self) -> None:
        """Remove a committed journal, now or in the next `take`: the operator gave it up. Raises OSError, TakenOver."""
        self._drops_checkpoint = True
        if self._marker is not None:
            await self._in_turn("dropping a checkpoint of", self._marker.drop_checkpoint)

    async def mark_clean_to_release(self) -> None:
        """As `mark_clean`, at the end: what the image lacked is in it, or was dropped on purpose. No-op if not held.

        A marker that is somebody else's by now stays as it is, and the claim is let go. So it is with one that cannot
        be read, but that raises UnreadableError. Raises OSError.
        """
        marker = self._marker
        if marker is None:
            return
        try:
            await self._in_turn("marking", lambda: marker.set_state("clean"))
        except TakenOver:
            await self.leave()
        except UnreadableError:
            await self.leave()
            raise

    async def release(self) -> None:
        """Remove the marker and let the locks go; with state dirty the marker stays. Does nothing if not held.

        Raises OSError; TakenOver: the marker is somebody else's, and stays; UnreadableError: that may be so.
        """
        marker, self._marker = self._marker, None
        if marker is not None:
            await self._finally("releasing", marker.release, marker)

    async def leave(self) -> None:
        """Let the locks go and leave the marker, as a crash would: at a restart. Raises OSError."""
        marker, self._marker = self._marker, None
        if marker is not None:
            await self._finally("unlocking", marker.close, marker)

    async def _finally(self, what: str, do: Callable[[], None], marker: Marker) -> None:
        """Call `do`, the last call of a marker, which closes it. If that fails it is closed as soon as it can be."""
        try:
            await self._in_turn(what, do)
        except BaseException:
            trio.lowlevel.spawn_system_task(_close_late, marker, self._last)
            raise

    # ------------------------------------------------------------------------------------------------- how it is done

    @contextmanager
    def _held(self, made_by: Marker | None = None) -> Iterator[Marker]:
        """The marker, for the body. Raises OSError where the claim is not held, is lost, or is lost in the body.

        `made_by` is the marker that made the journal which the body is about: OSError, too, where it is another by now.
        """
        if self._lost is not None:
            raise OSError(errno.EIO, self._lost)
        try:
            yield self._check_held(made_by)
        except (TakenOver, UnreadableError) as fault:
            self._lost = str(fault)
            if isinstance(fault, UnreadableError):
                self._lost = f"{fault.what}, so another gateway may have the image by now"
            self.on_lost(self._lost)
            raise OSError(errno.EIO, self._lost) from fault

    def _check_held(self, made_by: Marker | None = None) -> Marker:
        if self._marker is None:
            raise OSError(
                errno.EIO, f"{self._label} was not reached yet, so it is not ours to write"
            )
        if made_by not in (None, self._marker):  # the directory of its journal is closed
            raise OSError(errno.EIO, f"{self._label} was opened anew during a checkpoint")
        return self._marker

    async def _in_turn(
        self, what: str, do: Callable[[], T], *, drop: Callable[[T], object] | None = None
    ) -> T:
        """Call `do` in a thread once the call before has ended, and return what it returns. Raises what it raises.

        `what` names it in the error of a time-out; a result that comes too late goes to `drop`.
        """
        with bounded(self.timeout, f"{what} {self._address.key}"):
            async with self._turn:
                if self._last is not None:
                    await self._last.wait()
                call = Call(do, drop=drop)
                self._last = call.ended
                return await self._threads.wait_for(call)
        raise AssertionError("bounded() raises")


async def _close_late(marker: Marker, last: trio.Event | None) -> None:
    """Close a marker whose last call failed, or was never made, in a thread of its own: it has the lock.

    `last`: set when the thread of the last call has ended.
    """
    if last is not None:
        await last.wait()
    with contextlib.suppress(OSError):
        await trio.to_thread.run_sync(marker.close, abandon_on_cancel=True)


class RedoJournal:
    """The redo journal of one checkpoint (see redo.py), off the event loop. Made by `Claim.begin_redo`.

    Every method raises OSError.
    """

    def __init__(
        self,
        claim: Claim,
        made_by: Marker,
        file: RedoFile,
        as_of: str,
        threads: StoreThreads,
        timeout: float,
    ) -> None:
        """`as_of` is the instant of the checkpoint. `timeout`: seconds that each call of `add` may take."""
        self._claim = claim
        self._made_by = made_by
        """The marker in whose directory it lies."""
        self._file = file
        self._as_of = as_of
        self._threads = threads
        self.timeout = timeout
        self._length = 0
        """Bytes of the image that the checkpoint covers so far."""

    async def add(self, ranges: list[Range]) -> None:
        """Write some of the checkpoint. The data must not change any more. Several of these may run at a time."""
        self._length += sum(r.length for r in ranges)
        with bounded(self.timeout, "writing a checkpoint"):
            await self._threads.run(lambda: self._file.add_all(ranges), background=True)

    async def commit(self) -> None:
        """Make it durable: from now on the checkpoint will be in the image, whatever happens.

        After an error it may be committed or not, and the next checkpoint's journal takes its place.
        """
        await self._claim.commit_redo(self._made_by, self._file)

    @property
    def places(self) -> list[Place]:
        """See `RedoFile.places`."""
        return self._file.places

    async def note_applied(self, below: int, before: Before = ()) -> None:
        """Note, not durably, that the image has all of the checkpoint below that byte, which it need not keep.

        `before`: see `RedoFile.note_applied`.
        """
        with bounded(self.timeout, "noting how far a checkpoint is"):
            await self._threads.run(lambda: self._file.note_applied(below, before), background=True)

    async def drop(self) -> None:
        """Remove it: it was not committed, and never will be."""
        await self._claim.drop_redo(self._made_by, self._file)

    async def end(self) -> None:
        """Remove it: the image has all of the checkpoint, durably."""
        left = max(0, self._claim.dirty_bytes() - self._length)
        await self._claim.end_redo(self._made_by, self._as_of, left)
