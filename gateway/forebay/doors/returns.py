# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Giving images back whose disks are gone: at once where their store lets us, else again and again until it is done."""

import logging
from dataclasses import dataclass, field

import trio

from forebay.errors import ForebayError
from forebay.image.source import Source
from forebay.origin.threads import bounded

log = logging.getLogger("forebay.daemon")

RETURN_SECONDS = 10.0
"""How long a store may take to take an image back, each time."""

RETRY_SECONDS = 1.0
"""How soon it is tried again; doubled each time, up to RETRY_MOST."""
RETRY_MOST = 30.0


@dataclass(eq=False)
class _Return:
    """One that is tried again in the background."""

    source: Source
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class Returns:
    """The images that are on their way back: what nobody uses is not left locked, nor with a marker, for long."""

    def __init__(self, nursery: trio.Nursery) -> None:
        """`nursery` outlives every disk; what it has not done when it ends, the next attach of the image does."""
        self._nursery = nursery
        self._under_way: list[_Return] = []

    async def give_back(self, source: Source, *, drop_checkpoint: bool = False) -> None:
        """Have the image given back, by the time this returns if its store lets us. Raises nothing that is expected.

        `drop_checkpoint` as in `Source.release`.
        """
        why = await _try(source, drop_checkpoint)
        if why is not None:
            log.warning(
                "%s: its owner marker stays for now, and is tried again: %s", source.use.disk, why
            )
            self.give_back_later(source, drop_checkpoint=drop_checkpoint)

    def give_back_later(self, source: Source, *, drop_checkpoint: bool = False) -> None:
        """The same in the background, for as long as it takes."""
        one = _Return(source)
        self._under_way.append(one)
        self._nursery.start_soon(self._go_on, one, drop_checkpoint)

    async def _go_on(self, one: _Return, drop_checkpoint: bool) -> None:
        pause = RETRY_SECONDS
        try:
            with one.scope:
                while await _try(one.source, drop_checkpoint) is not None:
                    await trio.sleep(pause)
                    pause = min(2 * pause, RETRY_MOST)
                log.info("%s: its image was given back", one.source.use.disk)
        finally:
            self._under_way.remove(one)
            one.ended.set()

    async def call_off(self, source: Source) -> None:
        """Before the same image is claimed by a new disk: that takes over what was left beside it."""
        for one in [x for x in self._under_way if x.source.is_same_image(source)]:
            one.scope.cancel()
            await one.ended.wait()
            if one.source.claim is not None:
                try:
                    with bounded(RETURN_SECONDS, "letting the image go"):
                        await one.source.leave()
                except OSError as error:
                    log.warning("%s: %s", source.key, error.strerror)


async def _try(source: Source, drop_checkpoint: bool) -> str | None:
    """Give the image back. None if that is done, else why it is not."""
    try:
        with bounded(RETURN_SECONDS, "giving the image back"):
            await source.release(drop_checkpoint=drop_checkpoint)
    except OSError as fault:
        return fault.strerror or str(fault)
    except ForebayError as fault:
        return str(fault)
    except Exception:
        log.exception("%s: a fault of Forebay itself when its image was given back", source.key)
    return None
