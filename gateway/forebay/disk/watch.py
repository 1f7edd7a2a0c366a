# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Looking after a disk's image, and leaving write-back without being told to.

The image is opened when it comes, and looked at for what others do to it. Write-back is left after a restart that finds
another mode in the configuration, or where the image's store turns out to be mounted so that it may lose what it took.
"""

import logging

import trio

from forebay.checkpoint.dirty import Dirty
from forebay.disk.modes import PRIVATE_MODES, Modes
from forebay.errors import ForebayError
from forebay.events.telling import tell
from forebay.image.image import Image
from forebay.image.reach import WATCH_SECONDS
from forebay.image.source import Source
from forebay.units import Mode

log = logging.getLogger("forebay.disk")


class Watch:
    """Of one disk. A disk that is to leave write-back stays in it until what is dirty has been written back."""

    def __init__(self, source: Source, image: Image, dirty: Dirty, modes: Modes) -> None:
        self._source = source
        self._image = image
        self._disk = source.use.disk
        self._dirty = dirty
        self._modes = modes
        self.target: Mode | None = None
        """The mode that was asked for, where the disk comes up in write-back first; None once it was told another."""

    def choose_mode(self) -> None:
        """Choose the mode in which a disk comes up, after its dirty layers were found and before they are used."""
        modes = self._modes
        if self._dirty.mark.is_set and not modes.writes_private and self._source.use.writes:
            # The mode was changed, or the configuration, and we ended before the data had gone to the image.
            self.target, modes.mode = modes.mode, Mode.WRITE_BACK
        if self._is_unsafe():
            if self._dirty.mark.is_set:
                self.target, modes.mode = Mode.WRITE_THROUGH, Mode.WRITE_BACK
            else:
                modes.mode = Mode.WRITE_THROUGH

    def _is_unsafe(self) -> bool:
        """True, and said in the log, if the store may lose what a disk in this mode has acknowledged.

        That is known once the image was opened. The store was mounted otherwise since the attach, which refuses it.
        """
        try:
            self._source.check_safe(self._modes.mode)
        except ForebayError as fault:
            text = f"in write-through until the next restart: {fault}"
            tell("mode", text, self._disk, level=logging.WARNING, now=Mode.WRITE_THROUGH.value)
            return True
        return False

    def start(self, nursery: trio.Nursery) -> None:
        """Begin to look after the image, and the change of mode if one is to be made."""
        nursery.start_soon(self._watch, nursery)
        if self.target is not None:
            nursery.start_soon(self._change_over, self.target)

    async def _watch(self, nursery: trio.Nursery) -> None:
        image = self._image
        while True:
            was_away = image.origin is None
            await trio.sleep(image.reach.seconds_to_look())
            await image.reach.attempt()
            has_come = was_away and image.origin is not None
            if has_come and self.target is None and self._is_unsafe():
                self.target = Mode.WRITE_THROUGH
                nursery.start_soon(self._change_over, Mode.WRITE_THROUGH)
            if image.reach.is_look_due():
                await image.look()

    async def _change_over(self, target: Mode) -> None:
        """Change to that mode, however long it takes until what is dirty is in the image, unless told otherwise."""
        text = f"dirty data is written back before the mode becomes {target.value}"
        tell("mode", text, self._disk, now=self._modes.mode.value)
        while self._modes.mode in PRIVATE_MODES and self.target is target:
            try:
                await self._modes.change(target, _silent)
                tell("mode", f"mode {target.value}", self._disk, now=target.value)
            except OSError as error:
                log.info("%s: still in write-back: %s", self._disk, error.strerror)
                await trio.sleep(WATCH_SECONDS)


def _silent(done: int, total: int) -> None:
    pass
