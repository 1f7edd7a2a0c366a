# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The end of a disk's private data, when the disk is detached."""

import contextlib
import logging
from collections.abc import Iterator

from forebay.checkpoint.dirty import Dirty
from forebay.checkpoint.schedule import WriteBack
from forebay.image.image import Image
from forebay.image.source import Source

log = logging.getLogger("forebay.disk")


@contextlib.contextmanager
def in_any_case(disk: str) -> Iterator[None]:
    """Around each step of an end that is decided: an OSError is said in the log, and the next step follows."""
    try:
        yield
    except OSError as error:
        log.warning("%s: while it was detached: %s", disk, error.strerror or error)


async def finish_checkpoint(image: Image, source: Source, writeback: WriteBack) -> None:
    """Before what is dirty is dropped: have the image get all of a checkpoint of which it may have a part.

    A failure is said in the log: the journal beside the image keeps the checkpoint, and its marker.
    """
    if image.conflict is None and source.use.writes:
        try:
            await writeback.finish_committed()
        except OSError as error:
            log.warning("%s: a checkpoint was not finished: %s", source.use.disk, error.strerror)


def drop_private(image: Image, dirty: Dirty, *, discard: bool) -> None:
    """Drop what only the cache has of a disk, and what its image may contradict; one commit has all of it.

    `discard`: what is dirty is meant to be lost. If the image is in conflict, its clean blocks go then, too.
    """
    # A pass that was not finished wrote to the image under clean blocks that its frozen layer hides.
    was_in_pass = bool(dirty.bytes and dirty.frozen)
    dirty.drop()
    if discard and image.conflict is not None:
        image.begin_anew()
    elif was_in_pass:
        image.clean.refresh()
    dirty.ages.forget()


async def clear_mark(image: Image, dirty: Dirty, disk: str) -> None:
    """Say beside the image that it lacks nothing: what it lacked is gone for good. A failure is said in the log.

    `disk`: the disk's name.
    """
    try:
        await image.cache.commit.records()  # else a kill now would bring it back, unmarked
        await image.flush()  # of a pass that was not finished
        await dirty.mark.clear()
    except OSError as error:
        log.warning("%s: its marker could not be cleared: %s", disk, error.strerror)
