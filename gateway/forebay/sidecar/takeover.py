# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image whose gateway is gone: finish or drop what it left beside the image, and take the image over.

This needs no daemon: `forebay recover` and `forebay takeover` (recover.py) call it, on any host that sees the image.
"""

from dataclasses import dataclass, replace

from forebay.errors import ForebayError
from forebay.origin.addresses import FileAddress
from forebay.origin.opening import OpenImage
from forebay.sidecar import redo
from forebay.sidecar.files import Sidecar, lock_image
from forebay.sidecar.record import NOBODY, Owner, next_token


@dataclass(frozen=True)
class Recovered:
    """What was found beside an image, and is done with now."""

    finished: redo.Checkpoint | None
    """The checkpoint that was committed, and is in the image now."""
    dropped: bool
    """True if there was a checkpoint that was not committed; nothing of it is in the image."""
    owner: Owner | None
    """What the owner marker said: who holds, or held, the image."""

    @property
    def as_of(self) -> str:
        """The instant that the image shows, where that is known: UTC, ISO 8601; else empty."""
        if self.finished is not None:
            return self.finished.as_of
        return self.owner.as_of if self.owner else ""

    @property
    def lacks_data(self) -> bool:
        """True if a gateway has later writes that the image lacks."""
        return self.owner is not None and self.owner.state == "dirty"


def recover_image(
    address: FileAddress,
    file: OpenImage,
    *,
    take_over: bool = False,
    need_locks: bool = True,
    sure: bool = False,
) -> Recovered:
    """Finish or drop what a gateway that is gone left beside the open image `file`. Blocks.

    A checkpoint is finished in an image that was changed since, or copied, only if the operator is `sure`: else that
    is a ChangedError. With `take_over` the image is nobody's afterwards, and what that gateway has is given up.
    Raises ForebayError, with nothing changed, while a gateway serves the image, a VM has it open by itself, or
    (`need_locks`) nobody can tell for want of locks; and for a journal that cannot be applied. Raises OSError.
    """
    with Sidecar(address) as sidecar:
        sidecar.check_beside(file)
        try:
            sidecar.open()
        except FileNotFoundError:
            return Recovered(None, dropped=False, owner=None)
        owner = sidecar.read_owner()
        if not sidecar.try_lock(need_locks=need_locks):
            raise ForebayError(
                f"{address.key} is in use by {owner or 'another gateway'}, which serves it now: detach it there"
            )
        lock_image(address, file, need_locks=need_locks)
        return _finish(sidecar, owner, file, take_over=take_over, sure=sure)


def _finish(
    sidecar: Sidecar, owner: Owner | None, file: OpenImage, *, take_over: bool, sure: bool
) -> Recovered:
    """The same once the image is locked. `owner` is what the marker says."""
    dropped = redo.UNFINISHED in sidecar.names()
    finished = sidecar.finish_checkpoint(owner, file, sure=sure)
    found = Recovered(finished, dropped, owner)
    if owner is None:
        sidecar.remove()
    elif take_over:
        me = Owner.of_this_process(NOBODY, owner.disk)
        sidecar.write_owner(replace(me, token=next_token(owner), as_of=found.as_of))
    return found
