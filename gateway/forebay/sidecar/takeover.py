# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image whose gateway is gone: finish or drop what it left beside the image, and take the image over.

This needs no daemon: `forebay recover` and `forebay takeover` (recover.py) call it, on any host that sees the image.
"""

import contextlib
from dataclasses import dataclass, replace

from forebay.errors import ForebayError, InUseError
from forebay.origin.addresses import FileAddress
from forebay.origin.opening import OpenImage
from forebay.sidecar import redo, redo_header
from forebay.sidecar.files import Sidecar, lock_image
from forebay.sidecar.marker import finish_checkpoint
from forebay.sidecar.record import NOBODY, Owner
from forebay.sidecar.tenure import Tenure


@dataclass(frozen=True)
class Recovered:
    """What was found beside an image, and is done with now."""

    finished: redo_header.Checkpoint | None
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
        with sidecar.find() or contextlib.nullcontext() as left:
            if left is None:
                return Recovered(None, dropped=False, owner=None)
            owner = left.owner
            try:
                lock_image(address, file, lambda: owner, need_locks=need_locks)
            except InUseError as fault:
                if "gateway" not in fault.holder:
                    raise
                raise ForebayError(
                    f"{address.key} is in use by {owner or 'another gateway'}, which serves it now: detach it there"
                ) from None
            return _finish(sidecar, left, file, take_over=take_over, sure=sure)


def _finish(
    sidecar: Sidecar, left: Tenure, file: OpenImage, *, take_over: bool, sure: bool
) -> Recovered:
    """The same once the image is locked. `left` is what the last owner left.

    Where something is changed there is a next owner, which is that gateway still, or nobody: so that one that is only
    cut off, and comes back, learns that it was.
    """
    dropped, found = left.has(redo.UNFINISHED), left.has(redo.NAME)
    finished = finish_checkpoint(sidecar.address, left, file, sure=sure)
    recovered, owner = Recovered(finished, dropped, left.owner), left.owner
    if not (take_over or dropped or found):
        return recovered
    sidecar.make()
    if owner is None:
        owner = Owner.of_this_process(NOBODY, finished.disk if finished else "")
    elif take_over:
        owner = Owner.of_this_process(NOBODY, owner.disk)
    sidecar.begin(replace(owner, as_of=recovered.as_of), left)
    if recovered.owner is None:
        sidecar.remove()
    return recovered
