# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One pass over one frozen layer: all of it into the image, durably, and then it is clean.

Until that is done reads find the data in the frozen layer, and a crash finds it there again: the pass is done once
more. So what is written is always what the disk held at one instant, all of it.

Should the host be lost in the middle of that, the image would hold a part. So where the image is a file, all of it
goes into a redo journal beside the image first (`sidecar/redo.py`).
"""

import contextlib
import errno
from collections.abc import Callable

import trio

from forebay.checkpoint.batches import IntoImage, IntoJournal
from forebay.checkpoint.counters import ORIGIN_SYNC, Counters
from forebay.checkpoint.dirty import Dirty
from forebay.checkpoint.steps import Steps
from forebay.image.image import Image
from forebay.image.source import Source
from forebay.sidecar.claim import RedoJournal
from forebay_cache import Layer, settle, uncover


class Pass:
    """Takes one frozen layer of a disk to its image. Made for one :meth:`run`."""

    def __init__(
        self,
        source: Source,
        image: Image,
        dirty: Dirty,
        counters: Counters,
        layer: Layer,
        steps: Steps,
        check_wanted: Callable[[], None],
    ) -> None:
        """`check_wanted` is asked before the journal is committed: it raises OSError where that is not to be."""
        self._source = source
        self._image = image
        self._cache = image.cache
        self._dirty = dirty
        self._counters = counters
        self._layer = layer
        self._steps = steps
        self._check_wanted = check_wanted

    async def run(self) -> None:
        """Return when the image has all of the layer, durably, and the layer is gone.

        Raises OSError. Then, and when it is cancelled, the layer is still there, with all that was not settled, for
        another pass.
        """
        # A device that has failed may not have the layer durably, to lie over the clean blocks after a crash.
        await self._cache.invalidations.invalidate(self._image.layer)
        async with contextlib.AsyncExitStack() as writing:
            journal = await self._write_journal(writing)
            await self._write_image(journal)
            if journal is not None:
                await journal.end()
                self._image.identity.end_checkpoint()
        await self._image.look()  # what it looks like now is durable with the commit that follows
        self._image.require_origin()  # it was replaced meanwhile: what another file has now is kept for a resolve
        await self._settle()

    async def _write_journal(self, writing: contextlib.AsyncExitStack) -> RedoJournal | None:
        """A committed redo journal of the layer; None where the image is not a file. Raises OSError.

        As long as there may be a committed one, a start after a crash writes the image: its identity is not on record
        in all that time, or those writes would be taken for somebody else's. Before that it is, so that what somebody
        does to the image after a crash is noticed. `writing` ends it.
        """
        claim = self._source.claim
        if claim is None:
            await writing.enter_async_context(self._image.writing())
            return None
        self._image.require_origin()
        journal = await claim.begin_redo(self._dirty.ages.frozen_at(self._layer))
        try:
            await IntoJournal(
                self._image, self._layer, self._steps, self._counters, journal
            ).put_all()
            await writing.enter_async_context(self._image.writing())
            # The journal names the image's times as of its commit: after a power cut these must not be older ones.
            async with self._image.writes.times:
                with self._counters.timed(ORIGIN_SYNC):
                    await self._image.flush(times=True)
                self._check_wanted()
                self._image.identity.begin_checkpoint()
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(OSError):
                await journal.drop()
            raise
        await journal.commit()
        return journal

    async def _write_image(self, journal: RedoJournal | None) -> None:
        """Write the layer to the image, and flush it.

        Raises OSError, also where a flush that somebody else asked for failed meanwhile, or the image was opened anew:
        that may have lost some of this.
        """
        if not self._image.writes.kept.is_empty:
            # What went past the cache before is durable then: it is never written again over what follows.
            await self._image.flush()
        origin, failures = self._image.require_origin(), self._image.sync_failures
        async with self._image.writing():
            await IntoImage(
                self._image, self._layer, self._steps, self._counters, journal
            ).put_all()
        with self._counters.timed(ORIGIN_SYNC):
            await self._image.flush()
        if (self._image.origin, self._image.sync_failures) != (origin, failures):
            raise OSError(
                errno.EIO,
                "a flush of the image failed, or it was opened anew, meanwhile: all is written again",
            )

    async def _settle(self) -> None:
        """Make the layer's data clean and drop the layer; where the cache device has failed, drop the data with it."""
        cache, is_settled = self._cache, False
        with cache.failure.passed_over():
            await settle(cache, self._layer, self._image.filler, self._steps.stand_aside)
            # The clean layer has slots now that durable state gives to this one: nothing may be written there before.
            await cache.commit()
            is_settled = True
        if not is_settled:
            await uncover(cache, self._layer, self._image.filler)
        self._drop()
        if not is_settled:
            await cache.commit.records()

    def _drop(self) -> None:
        """Take the layer out of the disk's view and drop it, without an await in between: it holds nothing any more."""
        self._dirty.remove(self._layer)
        self._cache.layers.drop(self._layer)
