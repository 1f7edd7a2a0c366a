# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An overlay as it is at one instant, while its VM goes on writing; or as it was at a snapshot."""

import contextlib
from collections.abc import AsyncIterator

from forebay.checkpoint.schedule import FREEZE_ROOM
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.keeping.compact import compact
from forebay.keeping.overlays import generation_of
from forebay_cache import View
from forebay_cache.read.merged import seen_through


@contextlib.asynccontextmanager
async def frozen_view(disk: Disk, snapshot: str | None) -> AsyncIterator[View]:
    """A view of the overlay as it is now, or was at the snapshot. Nobody changes its layers meanwhile.

    Raises OSError, and ForebayError, also where the image was changed meanwhile.
    """
    cache, dirty, image = disk.image.cache, disk.dirty, disk.image
    if snapshot is not None:
        generation = generation_of(dirty, disk.name, snapshot)
    else:
        await cache.journal_room(FREEZE_ROOM)
        generation = dirty.freeze_changes()
    layers = [x for x in dirty.layers if x.name.generation <= generation]
    merged = seen_through(cache.index, layers, None)
    view = View(
        cache, layers if merged is None else merged.levels, disk.view.clean, disk.view.fetch
    )
    image.clean.watch(view)
    before = image.layer
    try:
        yield view
        if image.layer is not before:
            raise ForebayError(f"{image.key} was changed meanwhile: nothing was saved")
    finally:
        image.clean.unwatch(view)
    if snapshot is None:
        with contextlib.suppress(OSError):  # what cannot be joined now can be later
            await compact(cache, dirty, _silent, whole=False)


def _silent(_done: int, _total: int) -> None:
    """Progress that nobody looks at."""
