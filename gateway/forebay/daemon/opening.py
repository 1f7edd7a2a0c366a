# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Opening an image for a disk that is to come: what fails there says what to do, and nothing of it is left.

And the handover of its image, once the disk is there.
"""

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from forebay.carrying.arriving import Asking
from forebay.carrying.beside import Beside
from forebay.carrying.handover import OverlayHandover
from forebay.config.model import Config, DiskSettings
from forebay.daemon.attached import Attached
from forebay.daemon.record import DiskRecord, DiskRecords
from forebay.disk.state import DiskState
from forebay.errors import ForebayError, advice
from forebay.events.telling import tell
from forebay.formats.magic import RAW
from forebay.handover.handover import handover_of
from forebay.handover.phase import Phase
from forebay.image.source import Source
from forebay.origin.addresses import FileAddress, in_format, resolve


@contextlib.asynccontextmanager
async def abandoned_on_fault(source: Source) -> AsyncIterator[None]:
    """Let the image go if the body fails."""
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True), contextlib.suppress(OSError, ForebayError):
            await source.abandon()
        raise


async def format_of(source: Source) -> str:
    """The format of an image that nobody has told that of. Raises ForebayError."""
    with _told(source):
        return await source.find_format()


async def prepared(source: Source, patience: float) -> None:
    """Open the image and claim it, or wait until its owner is about to hand it over. Raises ForebayError.

    `patience` in seconds: for an owner that has to prepare that first.
    """
    with _told(source):
        await source.prepare(patience)
        if source.comes and isinstance(source.address, FileAddress):
            beside = Beside(source.address, source.use.disk, source.use.gateway)
            await Asking(source, beside).ask(patience)


@contextlib.contextmanager
def _told(source: Source) -> Iterator[None]:
    """An error of storage in the body is a ForebayError, which says what to do."""
    try:
        yield
    except OSError as fault:
        raise ForebayError(
            f"{source.label}: {fault.strerror or fault}: "
            f"{advice(fault, 'see that its storage answers, then try again')}"
        ) from fault


def check_configured(config: Config, wanted: DiskRecord, source: Source) -> None:
    """Raise ForebayError where the configuration, which may have been taken anew, has not that image any more."""
    if in_format(resolve(config, wanted.image), wanted.format) != source.address:
        raise ForebayError(
            f"{wanted.image} is another image since the configuration was taken anew: try again"
        )


def check_kinds(wanted: DiskRecord) -> None:
    """Raise ForebayError for a disk that cannot be all that is asked for."""
    if wanted.read_only and wanted.overlay:
        raise ForebayError("a disk is either read-only or an overlay: leave one of the two out")
    if wanted.keep and not wanted.overlay:
        raise ForebayError("what is kept are the changes of an overlay: add --overlay")


def check_may_come(
    source: Source, settings: DiskSettings, *, with_data: bool, is_kept: bool
) -> None:
    """Raise ForebayError where the image cannot be handed over to the disk; `with_data`: an overlay takes along what it
    has.
    """
    use = source.use
    if use.overlay and not (with_data or settings.with_data):
        raise ForebayError(
            "what an overlay has lies on its own host only, and does not move: add --with-data, and it goes along; or "
            "'forebay save' there makes an image of it, which is attached without --incoming"
        )
    if use.overlay and not isinstance(source.address, FileAddress):
        raise ForebayError(
            f"{source.key} has no store for what an overlay takes along: only overlays of image files move"
        )
    if use.overlay and is_kept:
        raise ForebayError(
            f"an overlay '{use.disk}' is kept here: 'forebay revert {use.disk}' gives that up, or choose another name"
        )
    if use.overlay:
        return
    if use.read_only:
        raise ForebayError("a read-only disk needs no handover: attach it without --incoming")
    if source.asking is None or source.shown_format != RAW or not use.need_locks:
        raise ForebayError(
            f"{source.key} cannot be handed over by another host: only raw image files are, in a store with locks: "
            "shut the VM down there, then attach it here without --incoming"
        )


def add_handover(
    attached: Attached, records: DiskRecords, detach: Callable[[Attached], None]
) -> None:
    """Give the disk its handover. `detach` detaches a disk whose VM does not come."""
    source, disk = attached.source, attached.disk
    if source.use.overlay and isinstance(source.address, FileAddress):
        attached.handover = OverlayHandover(
            disk,
            source.address,
            lambda: attached.clients,
            partial(_note_move, attached, records),
            partial(_alone, attached),
            lambda: detach(attached),
            attached.record.move,
            is_leaving=attached.record.handover in (Phase.PREPARED, Phase.RELEASED),
        )
        return
    attached.handover = handover_of(
        attached.disk,
        lambda: attached.clients,
        partial(_note, attached, records),
        lambda: detach(attached),
    )


async def bring_in(attached: Attached) -> None:
    """Have here what an overlay has that comes from another host. Raises ForebayError."""
    if isinstance(attached.handover, OverlayHandover):
        with _told(attached.source):
            await attached.handover.bring_in()


async def _note(attached: Attached, records: DiskRecords, phase: Phase) -> None:
    """Put the phase on record, durably. Raises ForebayError; OSError where something else changes the disk just now."""
    await _note_move(attached, records, phase, "")


async def _note_move(attached: Attached, records: DiskRecords, phase: Phase, move: str) -> None:
    """The same of an overlay, with the move that it is about."""
    now = replace(attached.record, handover=phase.value, move=move)
    if now == attached.record:
        return
    async with _alone(attached):
        now = replace(attached.record, handover=phase.value, move=move)
        await records.change(attached.name, attached.record, now)
        attached.record = now


@contextlib.asynccontextmanager
async def _alone(attached: Attached) -> AsyncIterator[None]:
    """Around what no command may change the disk during, but the one that waits for it. Raises OSError where one is."""
    if attached.busy.statistics().owner is trio.lowlevel.current_task():
        yield
        return
    try:
        attached.busy.acquire_nowait()
    except trio.WouldBlock:
        raise OSError(errno.EBUSY, "another command is changing the disk") from None
    try:
        yield
    finally:
        attached.busy.release()


def tell_not_served(
    name: str, record: DiskRecord, why: str, fault: Exception | None = None
) -> None:
    """Tell that a disk on record cannot be brought back, and why."""
    told: dict[str, Any] = {"image": record.key, "state": DiskState.FAILED.value}
    line = f"disk '{name}' is not served: {why}"
    text = f"not served: {why}"
    tell("state", text, name, level=logging.ERROR, exc_info=fault, line=line, **told)
