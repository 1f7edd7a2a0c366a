# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Write-back: when what only the cache has is written to the image. How: :mod:`forebay.checkpoint.passes`.

A checkpoint freezes the open private layer (a new one takes its place between two awaits), makes it durable, and makes
a pass over each frozen layer. One is due when the oldest data is half as old as it may become, when so much is dirty
that writes are about to be slowed down, when somebody asks for it, and when the last one failed.
"""

import contextlib
import errno
import logging
from collections.abc import Iterator
from typing import Any

import trio

from forebay.checkpoint.counters import Counters
from forebay.checkpoint.dirty import Dirty
from forebay.checkpoint.pace import LOW, Amount, Pace
from forebay.checkpoint.passes import Pass
from forebay.checkpoint.steps import SPREAD, Progress, Steps
from forebay.config.live import LiveSettings
from forebay.events.telling import tell
from forebay.image.image import Image
from forebay.image.source import Source
from forebay.units import format_duration, format_size
from forebay_cache import Layer
from forebay_cache.format.geometry import SECTOR

log = logging.getLogger("forebay.writeback")

PASSES_BESIDE_WRITES = 2
"""How often a drain tries to catch up with a VM that writes, before it has it wait."""

AGAIN_SECONDS = 1.0
"""How soon a guest's write tries a pass again that failed, while the cache device does not work."""

LOOK_LEAST = 0.01
"""Seconds between two looks whether a checkpoint is due, at least: a `max_lag` below is as good as that."""

IDLE_SECONDS = 10.0
"""After how long without anything dirty the marker beside the image is to say so, where no pass has cleared it."""

FREEZE_ROOM = 1 << 19
"""As room for the journal records of a write of so many bytes: more than the longest name of a layer takes."""

RETRY_MOST = 30.0
"""Most seconds between two tries at an origin that fails; the first pause is one second."""


class WriteBack:
    """The write-back of one disk. :meth:`run` begins checkpoints by itself; others have one made, or wait for one."""

    def __init__(
        self,
        source: Source,
        image: Image,
        settings: LiveSettings,
        dirty: Dirty,
        counters: Counters,
    ) -> None:
        self._source = source
        self._image = image
        self._cache = image.cache
        self._settings = settings
        self._dirty = dirty
        self._counters = counters
        self._lock = trio.Lock()
        """Held by whoever makes a checkpoint."""
        self._wanted = trio.Event()
        """Set when :meth:`run` is to make one; another event takes its place then."""
        self._passed = trio.Event()
        """Set when one ends, whether it succeeds or fails; another event takes its place then."""
        self._failed_at = 0.0
        """Trio time at which one failed last."""
        self._hurried = 0
        """How many wait for one to end."""
        self.pace = Pace()
        self.automatic = False
        """True while passes begin because of the age or the amount of what is dirty: in mode write-back."""
        self.error: str | None = None
        """Why the last checkpoint failed; None: it did not."""
        self.failure: int | None = None
        """The error number that belongs to `error`."""
        self.is_given_up = False
        """True once what is dirty is to be dropped; whoever decides otherwise takes it back."""
        self.moved_at = 0.0
        """Trio time at which write-back was seen to go on last."""

    # -- when -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Make checkpoints when they are due, until cancelled. After one that fails it waits 1 s, then 2 s, up to
        RETRY_MOST, before it tries again.
        """
        pause = 1.0
        while True:
            await self._wait_until_due()
            try:
                await self.checkpoint()
                pause = 1.0
            except OSError as error:
                await trio.sleep(pause)
                pause = min(2 * pause, RETRY_MOST)
                log.debug("%s: %s", self._source.use.disk, error)

    async def _wait_until_due(self) -> None:
        """Wait until a checkpoint is due."""
        idle_since = trio.current_time()
        while not self._must_begin():
            if self._dirty.bytes or not self._dirty.mark.is_set:
                idle_since = trio.current_time()
            elif trio.current_time() - idle_since >= IDLE_SECONDS:
                return
            if self.automatic and self._is_old_or_much():
                return
            with trio.move_on_after(_look_seconds(self._settings.now.max_lag)):
                await self._wanted.wait()
            if self._wanted.is_set():
                self._wanted = trio.Event()
                if self._dirty.bytes:
                    return

    def _must_begin(self) -> bool:
        """True if a checkpoint is due whatever the mode, because something is not as it should be."""
        if self.error is not None or self._dirty.mark.is_stale():
            return True
        return self._dirty.bytes > 0 and self._cache.failed is not None

    def _is_old_or_much(self) -> bool:
        """True if data is half as old as it may become, or so much that writes are about to be slowed down."""
        if not self._dirty.bytes:
            return False
        if self._dirty.share() >= LOW:
            return True
        return self._dirty.lag_seconds() * 2 >= self._settings.now.max_lag

    def want(self) -> None:
        """Have :meth:`run` make a checkpoint as soon as possible, if anything is dirty."""
        self._wanted.set()

    # -- one checkpoint ---------------------------------------------------------------------------------------

    async def checkpoint(self, progress: Progress | None = None) -> None:
        """Take everything that is dirty as this begins to the image, and say beside the image that it has everything
        if it has. `progress` is told of each piece: its bytes, and 0.

        Raises OSError; nothing is lost then. Cancelled, it leaves a frozen layer, which the next checkpoint finishes.
        """
        async with self._lock:
            self._check_not_given_up()
            try:
                await self._image.reach.made_again(lambda: self._checkpoint(progress))
                if self.error is not None:
                    tell("pass", "write-back goes again", self._source.use.disk, log=log, ok=True)
                self.error = self.failure = None
            except OSError as error:
                self._note_failure(error)
                raise
            finally:
                event, self._passed = self._passed, trio.Event()
                event.set()

    async def _checkpoint(self, progress: Progress | None) -> None:
        if not self._dirty.frozen and self._dirty.private_bytes:
            await self._freeze()

        async def sync() -> None:
            """Have it durable in the cache, unless the device has failed."""
            with self._cache.failure.passed_over():
                await self._cache.make_durable()

        await self._cache.failure.in_one_state(sync)
        for layer in self._dirty.frozen:
            await self._take(layer, progress)
        await self._clear_mark()

    def _note_failure(self, error: OSError) -> None:
        if self.error is None:
            disk = self._source.use.disk
            text = f"write-back failed, trying again: {error.strerror}"
            tell("pass", text, disk, level=logging.WARNING, log=log, ok=False)
        self.error, self.failure = error.strerror or str(error), error.errno
        self._failed_at = trio.current_time()
        self._counters.origin_errors += 1

    async def _freeze(self) -> None:
        """Freeze the open layer, once the cache's journal, which writes may have filled, has room for a new one."""
        with self._cache.failure.passed_over():
            await self._cache.journal_room(FREEZE_ROOM)
        self._dirty.freeze()

    async def _take(self, layer: Layer, progress: Progress | None) -> None:
        """Make a pass over one frozen layer, and learn from it how fast write-back is. Raises OSError."""
        began, size = trio.current_time(), layer.sectors * SECTOR
        self.pace.begin_pass(began, Amount(size, layer.slots))
        whole = False
        try:
            steps = self._steps(layer, progress)
            await Pass(
                self._source,
                self._image,
                self._dirty,
                self._counters,
                layer,
                steps,
                self._check_not_given_up,
            ).run()
            self.moved_at = trio.current_time()
            whole = True
            _tell_checkpoint(self._source.use.disk, size, self.moved_at - began)
        finally:
            self.pace.end_pass(trio.current_time(), whole=whole)

    def _steps(self, layer: Layer, progress: Progress | None) -> Steps:
        def advanced(length: int, share: float) -> None:
            if self.error is None:  # a pass that fails time and again goes nowhere
                self.moved_at = trio.current_time()
            self.pace.advance(share)
            if progress is not None:
                progress(length, 0)

        return Steps(
            layer.sectors * SECTOR,
            1 if self._source.claim is None else 2,  # the journal is half of the work
            lambda: SPREAD * self._settings.now.max_lag,
            served=self._cache.served,
            is_urgent=self._is_urgent,
            advanced=advanced,
        )

    def _is_urgent(self) -> bool:
        return self._hurried > 0 or self._dirty.share() > LOW

    async def _clear_mark(self) -> None:
        """Say beside the image that it has everything, if it has. Raises OSError."""
        mark = self._dirty.mark
        if self._dirty.bytes == 0 and (mark.is_set or mark.is_stale()):
            await self._cache.commit.records()
            await self._image.flush()  # what went past the cache
            await mark.clear()

    # -- those who wait ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _hurry(self) -> Iterator[None]:
        """While somebody is in it, passes are not spread over time."""
        self._hurried += 1
        try:
            yield
        finally:
            self._hurried -= 1

    async def wait_for_pass(self) -> None:
        """Wait for the end of a checkpoint, whether it succeeds or fails, or for a second."""
        if not self._lock.locked():
            self.want()
        with self._hurry(), trio.move_on_after(1.0):
            await self._passed.wait()

    def check_goes_on(self, why: str, began: float) -> None:
        """Raises OSError(ENOSPC) where it makes no sense to wait any longer for what write-back is to bring.

        That is so if the storage of the image is full, and if write-back has not moved for `origin_timeout` seconds
        while the caller has waited since `began`, in trio time. `why` says what the caller waits for.
        """
        if self.failure in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                errno.ENOSPC, f"{why}, and the storage of the image is full: {self.error}"
            )
        if trio.current_time() - max(began, self.moved_at) >= self._settings.now.origin_timeout:
            raise OSError(errno.ENOSPC, f"{why}, and nothing could be written back")

    async def catch_up(self) -> None:
        """Make a checkpoint that somebody waits for. Raises OSError."""
        with self._hurry():
            await self.checkpoint()

    async def leave_cache(self) -> None:
        """Have in the image what only the cache has, as far as that can be read: the cache device has failed, or is
        full.

        Raises OSError, without trying if that failed less than AGAIN_SECONDS ago.
        """
        if self._dirty.bytes:
            if self.error is not None and trio.current_time() < self._failed_at + AGAIN_SECONDS:
                raise OSError(errno.EIO, self.error)
            await self.catch_up()

    async def finish_committed(self) -> None:
        """Return when no journal is committed beside the image that the image has only in part. Raises OSError.

        For a disk whose dirty data is about to be dropped: from now on no other checkpoint is committed.
        """
        self.is_given_up = True
        with self._hurry():
            async with self._lock:
                pass  # a pass that is under way, whoever asked for it, has ended
        if self._image.identity.has_checkpoint:  # it failed, or was cancelled
            await self.catch_up()

    def _check_not_given_up(self) -> None:
        """Raise OSError where what is dirty is being dropped, unless a committed checkpoint is to be finished."""
        if self.is_given_up and not self._image.identity.has_checkpoint:
            raise OSError(errno.ECANCELED, "what is dirty was given up")

    @property
    def is_done(self) -> bool:
        """True if the image has everything, and the marker beside it says so."""
        return not (self._dirty.bytes or self._dirty.mark.is_set)

    async def nearly_finish(self, progress: Progress) -> None:
        """Take to the image most of what is dirty, while a VM may go on writing. Raises OSError.

        Afterwards :attr:`is_done`, or what was written during the last of PASSES_BESIDE_WRITES checkpoints is left.
        """
        for _ in range(PASSES_BESIDE_WRITES):
            if self.is_done:
                break
            await self._checkpoint_with_progress(progress)

    async def finish(self, progress: Progress) -> None:
        """Return when :attr:`is_done`. Raises OSError. The caller has closed the gate, so that nothing is written."""
        while not self.is_done:
            await self._checkpoint_with_progress(progress)

    async def _checkpoint_with_progress(self, progress: Progress) -> None:
        """One checkpoint that somebody waits for, with bytes done and bytes in all told to `progress`."""
        total = self._dirty.bytes
        done = 0

        def advance(part: int, _total: int) -> None:
            nonlocal done
            done += part
            progress(done, max(total, done))

        progress(0, total)
        with self._hurry():
            await self.checkpoint(advance)


def _tell_checkpoint(disk: str, size: int, seconds: float) -> None:
    text = f"{format_size(size)} written back in {format_duration(seconds)}"
    told: dict[str, Any] = {"written_bytes": size, "took_seconds": round(seconds, 3)}
    tell("checkpoint", text, disk, log=log, **told)


def _look_seconds(max_lag: float) -> float:
    """How soon it looks again whether a checkpoint is due: `max_lag` may be another by then, and none has it look all
    the time.
    """
    return max(LOOK_LEAST, min(1.0, max_lag / 8))
