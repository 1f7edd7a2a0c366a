# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One writer: the marker and the lock beside an image that a gateway may write (promise 6).

Whoever is to write an image takes the lock beside it (files.py has the list of what lies there), then QEMU's locks on
the image itself (locks.py), then reads the owner marker, then replaces it. The same gateway takes its own marker back
after a crash; a clean release removes marker and lock. The marker outlives the process: it says who has data for this
image, and keeps others out until that data is in the image.

While a checkpoint is written back a redo journal lies there as well: see redo.py. Whoever takes the marker applies or
drops a journal that was left behind, before anything else is done with the image.

Before the marker is changed, and before a checkpoint is committed, it is read again: one that is not ours any more is
left as it is, for somebody else has the image now.

Everything here blocks and belongs in a thread; `Claim` (claim.py) does that.
"""

import contextlib
import logging
import time
from dataclasses import replace
from typing import Self

from forebay.errors import ForebayError
from forebay.origin.addresses import FileAddress
from forebay.origin.calls import Status, SystemCalls
from forebay.origin.opening import OpenImage, look
from forebay.sidecar import redo
from forebay.sidecar.files import Sidecar, lock_image
from forebay.sidecar.record import (
    NOBODY,
    Owner,
    State,
    TakenOver,
    in_use_by_gateway,
    left_behind,
    next_token,
    now,
    taken_over,
)

log = logging.getLogger("forebay.origin")

LOCK_TRIES = 8
"""How often the lock file may vanish under us (its holder is just leaving) before we give up."""

COUNT_SECONDS = 15.0
"""How often, at most, the marker is written anew only to say how much is dirty."""


class Marker:
    """The owner marker of one image, held by this process. Every method blocks, and raises OSError."""

    def __init__(self, sidecar: Sidecar, file: OpenImage) -> None:
        """Take over `sidecar`, which is locked. `file` is the open image, which stays the caller's. See `take`."""
        self.address = sidecar.address
        self.owner: Owner | None = None
        """What the marker says, or was last told to say; None before it was written, and after the release."""
        self._sidecar = sidecar
        self._file = SystemCalls().status(file.fd)
        """What the image was when it was claimed: that is what its name has to lead to."""
        self._counted = time.monotonic()
        """When the marker was written last."""

    @classmethod
    def take(
        cls,
        address: FileAddress,
        file: OpenImage,
        me: Owner,
        *,
        again: bool = False,
        need_locks: bool = True,
        drop_checkpoint: bool = False,
    ) -> Self:
        """Make `me` the owner of the open image `file`; with `again` only if its gateway is that already.

        Raises InUseError that names the owner and says what to do, when there is another one; TakenOver with `again`;
        ForebayError, if `need_locks`, where the file system has none: then only the marker keeps others out.
        ChangedError where a checkpoint of before cannot be finished, for the image was changed since; with
        `drop_checkpoint` it is dropped instead, as it was given up.
        """
        for _ in range(LOCK_TRIES):
            with contextlib.ExitStack() as undo:
                sidecar = undo.enter_context(Sidecar(address))
                sidecar.check_beside(file)
                if again:
                    sidecar.check_left_by(me)
                sidecar.make()
                marker = cls._take(sidecar, file, me, need_locks, drop_checkpoint)
                if marker is not None:
                    undo.pop_all()
                    return marker
        raise ForebayError(f"{address.key}: its owner is just changing: try again")

    @classmethod
    def _take(
        cls, sidecar: Sidecar, file: OpenImage, me: Owner, need_locks: bool, drop_checkpoint: bool
    ) -> Self | None:
        """One attempt of `take`, in the directory beside the image. None: the lock's last holder was just leaving."""
        try:
            locked = sidecar.try_lock(need_locks=need_locks)
            if locked and sidecar.is_lock_named():
                lock_image(sidecar.address, file, need_locks=need_locks)
                marker = cls(sidecar, file)
                marker._begin(me, file, drop_checkpoint)
                return marker
        except ForebayError:
            sidecar.remove_if_unused()
            raise
        if not locked:
            raise in_use_by_gateway(sidecar.address, _read_leniently(sidecar))
        return None

    def _begin(self, me: Owner, file: OpenImage, drop_checkpoint: bool) -> None:
        """Finish what was left behind, and write the marker. Raises InUseError where it is another gateway's."""
        before = self._sidecar.read_owner()
        if before is not None and before.gateway not in (me.gateway, NOBODY):
            raise left_behind(self.address, before)
        if drop_checkpoint:
            redo.remove(self._sidecar.fd)
        found = self._sidecar.finish_checkpoint(before, file)
        if found is not None:
            log.info("%s: a checkpoint of '%s' was finished", self.address.key, found.disk)
        as_of = found.as_of if found else before.as_of if before else ""
        mine = replace(me, token=next_token(before), as_of=as_of)
        if before is not None:
            mine = replace(
                mine,
                state=before.state,
                dirty_since=before.dirty_since,
                dirty_bytes=before.dirty_bytes,
            )
        self._write(mine)

    def _write(self, owner: Owner) -> None:
        self._sidecar.write_owner(owner)
        self.owner = owner
        self._counted = time.monotonic()

    def admit(self, file: OpenImage, *, need_locks: bool = True) -> None:
        """Lock another descriptor of the same image, which takes the place of one that was closed.

        Raises as `take` and `check` do.
        """
        self.check()
        lock_image(self.address, file, need_locks=need_locks)

    # ------------------------------------------------------------------------------------------- what the image lacks

    def set_state(self, state: State) -> None:
        """Say durably whether this gateway has data that the image lacks: `dirty` before the first such write is
        acknowledged, `clean` after the last was made durable in the image. Raises TakenOver, with nothing changed.
        """
        assert self.owner is not None, "released"
        if self._sidecar.is_marker_unsure or self.owner.state != state:
            self._check_ours()
            since = now() if state == "dirty" else ""
            self._write(replace(self.owner, state=state, dirty_since=since, dirty_bytes=0))

    @property
    def is_dirty(self) -> bool:
        """True if the marker says that the image lacks data, or may say so; False after the release."""
        if self.owner is None:
            return False
        return self._sidecar.is_marker_unsure or self.owner.state == "dirty"

    def count(self, dirty_bytes: int) -> None:
        """Have the marker say how much the image lacks, where that changed, but not too often."""
        assert self.owner is not None, "released"
        due = time.monotonic() - self._counted >= COUNT_SECONDS
        if self.owner.state == "dirty" and due and dirty_bytes != self.owner.dirty_bytes:
            self._write(replace(self.owner, dirty_bytes=dirty_bytes))

    # ---------------------------------------------------------------------------------------------- the redo journal

    def begin_redo(self, as_of: str) -> redo.RedoFile:
        """A redo journal for a checkpoint of that instant (UTC, ISO 8601; empty: not known). Raises as `check`."""
        assert self.owner is not None, "released"
        me, file = self.owner, self._file
        self.check()
        return redo.RedoFile(
            self._sidecar.fd,
            redo.Checkpoint(me.gateway, me.host, me.disk, file.size, file.inode, as_of),
        )

    def commit_redo(self, journal: redo.RedoFile) -> None:
        """Commit the journal: from now on whoever finds it applies it. Raises as `check`, with nothing committed."""
        found = self._look()
        journal.note_times(found.mtime_ns, found.ctime_ns)
        journal.commit()
        journal.note_applied(0, durable=True)

    def end_redo(self, as_of: str, dirty_bytes: int = 0) -> None:
        """Remove the committed journal: the image has all of the checkpoint, durably.

        The image lacks `dirty_bytes` that were written later. Raises as `check`, with nothing changed: where the name
        leads to another file by now, the image does not have the checkpoint.
        """
        assert self.owner is not None, "released"
        self.check()
        since = as_of or self.owner.dirty_since
        # The marker first: once the journal is gone nothing else says which instant the image shows.
        self._write(replace(self.owner, as_of=as_of, dirty_since=since, dirty_bytes=dirty_bytes))
        redo.remove(self._sidecar.fd)

    # --------------------------------------------------------------------------------------------- whose the image is

    def check(self) -> None:
        """Raise TakenOver when the marker names somebody else now or is gone, or the image is another file."""
        self._look()

    def _look(self) -> Status:
        """What the image is now. Raises as `check`."""
        self._check_ours()
        key = self.address.key
        try:
            found = look(self.address, SystemCalls())
        except FileNotFoundError:
            raise TakenOver(f"{key} was deleted or renamed") from None
        if (found.device, found.inode) != (self._file.device, self._file.inode):
            raise TakenOver(f"{key} was replaced by another file")
        if found.size != self._file.size:
            raise TakenOver(f"{key} has {found.size} bytes and had {self._file.size}")
        return found

    def _check_ours(self) -> None:
        """Raise TakenOver unless the marker bears our gateway and our token."""
        found = self._sidecar.read_owner()
        assert self.owner is not None, "released"
        if found is None or (found.gateway, found.token) != (self.owner.gateway, self.owner.token):
            raise taken_over(self.address, found)

    def release(self) -> None:
        """Remove marker and lock. With state dirty the marker stays, for only this gateway can bring that data home.

        Raises TakenOver: the marker is somebody else's, and stays. Raises ForebayError where a committed journal lies
        there, without which nobody could tell what the image holds: both stay.
        """
        assert self.owner is not None, "released"
        try:
            if self.owner.state == "clean":
                self._check_ours()
                self._check_no_checkpoint()
                self._sidecar.remove()
        finally:
            self.close()

    def _check_no_checkpoint(self) -> None:
        if redo.NAME in self._sidecar.names():
            key = self.address.key
            raise ForebayError(
                f"{key} holds part of a checkpoint, which 'forebay recover {key}' finishes, as the next attach does"
            )

    def drop_checkpoint(self) -> None:
        """Remove a committed journal that the image is not to get: it was given up. Raises TakenOver."""
        self._check_ours()
        redo.remove(self._sidecar.fd)

    def close(self) -> None:
        """Let the lock go and leave the marker where it is, as a crash would. The second call does nothing."""
        self.owner = None
        self._sidecar.close()


def _read_leniently(sidecar: Sidecar) -> Owner | None:
    """What the owner marker says; None if there is none, or it cannot be read."""
    try:
        return sidecar.read_owner()
    except (OSError, ForebayError):
        return None
