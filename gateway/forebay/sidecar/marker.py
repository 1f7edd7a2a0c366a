# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One writer: the marker beside an image that a gateway may write, and the lock on it (promise 6).

Whoever is to write an image takes the locks on the image itself (locks.py), then reads the owner marker, then becomes
the next owner, with a directory and a marker of its own beside the image (files.py, tenure.py). The same gateway comes
after itself after a crash; a clean release removes directory and marker. The marker outlives the process: it says who
has data for this image, and keeps others out until that data is in the image.

While a checkpoint is written back a redo journal lies there as well: see redo.py. Whoever becomes the owner applies the
one of the owner before, before anything else is done with the image.

Before the marker is changed, and before a checkpoint is committed, it is looked at again: once there is a marker with a
higher token, or ours is gone, nothing more is done, for somebody else has the image now.

Everything here blocks and belongs in a thread; `Claim` (claim.py) does that.
"""

import contextlib
import errno
import logging
import time
from dataclasses import replace
from typing import Self

from forebay.errors import ForebayError
from forebay.formats.magic import RAW
from forebay.origin.addresses import FileAddress
from forebay.origin.calls import Status, SystemCalls
from forebay.origin.opening import OpenImage, look
from forebay.origin.worker import syscalls
from forebay.sidecar import incoming, own_files, redo, redo_header
from forebay.sidecar.files import Sidecar, lock_image
from forebay.sidecar.incoming import Incoming
from forebay.sidecar.record import (
    NOBODY,
    Owner,
    State,
    TakenOver,
    left_behind,
    now,
    taken_over,
)
from forebay.sidecar.tenure import Tenure

log = logging.getLogger("forebay.origin")

FULL = (errno.ENOSPC, errno.EDQUOT)

COUNT_SECONDS = 15.0
"""How often, at most, the marker is written anew only to say how much is dirty."""


class Marker:
    """The owner marker of one image, held by this process. Every method blocks, and raises OSError."""

    def __init__(self, sidecar: Sidecar, file: OpenImage) -> None:
        """Use `sidecar` from now on. `file` is the open, locked image, which stays the caller's. See `take`."""
        self.address = sidecar.address
        self.owner: Owner | None = None
        """What the marker says, or was last told to say; None before it was written, and after the release."""
        self._sidecar = sidecar
        self._file = SystemCalls().status(file.fd)
        """What the image was when it was claimed: that is what its name has to lead to."""
        self._counted = time.monotonic()
        """When the marker was written last."""
        self._handed_over = False

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
        handed_over: bool = False,
    ) -> Self:
        """Make `me` the owner of the open image `file`; with `again` only if its gateway is that already.

        `handed_over`: also where another gateway is, whose marker says that we may.

        Raises InUseError that names the owner and says what to do, when there is another one; TakenOver with `again`;
        ForebayError, if `need_locks`, where the file system has none: then only the marker keeps others out.
        ChangedError where a checkpoint of before cannot be finished, for the image was changed since; with
        `drop_checkpoint` it is dropped instead, as it was given up.
        """
        with contextlib.ExitStack() as undo:
            sidecar = undo.enter_context(Sidecar(address))
            sidecar.check_beside(file)
            if again:
                sidecar.check_left_by(me)
            lock_image(address, file, lambda: _read_leniently(sidecar), need_locks=need_locks)
            marker = cls(sidecar, file)
            marker._handed_over = handed_over and need_locks
            marker._begin(me, file, drop_checkpoint, again=again, has_locks=need_locks)
            undo.pop_all()
            return marker

    def _begin(
        self, me: Owner, file: OpenImage, drop_checkpoint: bool, *, again: bool, has_locks: bool
    ) -> None:
        """Finish what was left behind, and become the owner. Raises InUseError where it is another gateway's.

        With `again` what was left has to be ours still, now that we have the locks: before that another gateway may
        have had the image, and given it back. Raises TakenOver then. Where a full store has no room for the next owner,
        we go on as the one before, if `has_locks` and that was us.
        """
        with self._sidecar.find() or contextlib.nullcontext() as before:
            mine = me
            if again and (before is None or not _is_of(before, me)):
                raise taken_over(self.address, before.owner if before is not None else None)
            if before is not None:
                mine = self._after(before, me, file, drop_checkpoint)
            self._sidecar.make()
            try:
                self.owner = self._sidecar.begin(mine, before, sweeps=not self._handed_over)
            except ForebayError:
                self._sidecar.remove_if_empty()
                raise
            except OSError as error:
                if error.errno not in FULL or not (has_locks and _is_of_this_boot(before, me)):
                    raise
                assert before is not None
                self.owner = self._sidecar.go_on(before)
                log.warning("%s: %s: its marker stays as it is", self.address.key, error.strerror)
        self._counted = time.monotonic()

    def _after(self, before: Tenure, me: Owner, file: OpenImage, drop_checkpoint: bool) -> Owner:
        """What our marker is to say, once what the owner before left is finished. The directory of that one stays."""
        owner = before.owner
        if owner is not None and owner.gateway not in (me.gateway, NOBODY):
            # we have the locks, so its gateway does not go on with the image, whatever phase that had come to
            given = self._handed_over and owner.is_for(me.gateway) and not before.has(redo.NAME)
            if not given:
                raise left_behind(self.address, owner)
        found = None
        if not drop_checkpoint:
            found = finish_checkpoint(self.address, before, file)
        if found is not None:
            log.info("%s: a checkpoint of '%s' was finished", self.address.key, found.disk)
        as_of = found.as_of if found else owner.as_of if owner else ""
        if owner is None:
            return replace(me, as_of=as_of)
        if me.state == "clean":
            me = replace(me, state=owner.state, dirty_since=owner.dirty_since)
        return replace(me, as_of=as_of, dirty_bytes=owner.dirty_bytes)

    @property
    def _own(self) -> Tenure:
        """Our directory beside the image."""
        assert self._sidecar.own is not None, "take makes it"
        return self._sidecar.own

    def _write(self, owner: Owner) -> None:
        self._sidecar.write_owner(owner)
        self.owner = owner
        self._counted = time.monotonic()

    def admit(self, file: OpenImage, *, need_locks: bool = True) -> None:
        """Lock another descriptor of the same image, which takes the place of one that was closed.

        Raises as `take` and `check` do.
        """
        self.check()
        lock_image(self.address, file, lambda: self.owner, need_locks=need_locks)

    # ------------------------------------------------------------------------------------------- what the image lacks

    def set_state(self, state: State) -> None:
        """Say durably whether this gateway has data that the image lacks: `dirty` before the first such write is
        acknowledged, `clean` after the last was made durable in the image. Raises TakenOver, with nothing changed.
        """
        assert self.owner is not None, "released"
        if self._sidecar.is_marker_unsure or self.owner.state != state:
            self._check_ours()
            since = now() if state == "dirty" else ""
            owner = replace(self.owner, state=state, dirty_since=since, dirty_bytes=0)
            self._write(owner if state == "clean" else replace(owner, phase="", to=""))

    def set_phase(self, phase: str, to: str) -> None:
        """Say durably how far a handover to the gateway `to` is: see `Owner.phase`. Raises TakenOver, as above.

        The image has everything, durably, unless `phase` is empty.
        """
        assert self.owner is not None, "released"
        if self._sidecar.is_marker_unsure or (self.owner.phase, self.owner.to) != (phase, to):
            self._check_ours()
            if phase:
                assert self.owner.state == "clean", "what only the cache has is never handed over"
                self._check_no_checkpoint()
            self._write(replace(self.owner, phase=phase, to=to))

    def asked_by(self) -> Incoming | None:
        """Which gateway asks for the image; None if none does."""
        return incoming.read(self._sidecar.fd, self._sidecar.look_beside())

    def asked_now(self) -> Incoming | None:
        """The same, when nothing else was looked at just now."""
        return own_files.looked(self._look_who_asks)

    def _look_who_asks(self) -> Incoming | None:
        fd = self._sidecar.open_anew()
        if fd is None:
            return None
        try:
            return incoming.read(fd, self._sidecar.look_beside())
        finally:
            syscalls.close(fd)

    def forget_asked(self, by: Incoming) -> None:
        """Remove what that gateway has asked: it is gone."""
        incoming.remove(self._sidecar.fd, by, self._sidecar.look_beside())

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
            self._own.fd,
            redo_header.Checkpoint(
                me.gateway, me.host, me.disk, file.size, file.inode, as_of, token=me.token
            ),
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
        redo.remove(self._own.fd)

    # --------------------------------------------------------------------------------------------- whose the image is

    def check(self) -> None:
        """Raise TakenOver when the marker names somebody else now or is gone, or the image is another file."""
        self._look()

    def _look(self) -> Status:
        """What the image is now. Raises as `check`."""
        self._check_ours()
        self._sidecar.sweep()
        key = self.address.key
        try:
            found = look(self.address, SystemCalls())
        except FileNotFoundError:
            raise TakenOver(f"{key} was deleted or renamed") from None
        if (found.device, found.inode) != (self._file.device, self._file.inode):
            raise TakenOver(f"{key} was replaced by another file")
        is_raw = (
            self.address.format == RAW
        )  # else the file may grow, and the disk in it stays as large
        if is_raw and found.size != self._file.size:
            raise TakenOver(f"{key} has {found.size} bytes and had {self._file.size}")
        return found

    def _check_ours(self) -> None:
        """Raise TakenOver unless the marker that counts bears our gateway and our token."""
        assert self.owner is not None, "released"
        self._sidecar.check_ours(self.owner)

    def release(self) -> None:
        """Remove the marker. With state dirty it stays, for only this gateway can bring that data home.

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
        if self._own.has(redo.NAME):
            key = self.address.key
            raise ForebayError(
                f"{key} holds part of a checkpoint, which 'forebay recover {key}' finishes, as the next attach does"
            )

    def drop_checkpoint(self) -> None:
        """Remove a committed journal that the image is not to get: it was given up. Raises TakenOver."""
        self._check_ours()
        redo.remove(self._own.fd)

    def close(self) -> None:
        """Leave the marker where it is, as a crash would. The second call does nothing."""
        self.owner = None
        self._sidecar.close()


def _is_of(before: Tenure, me: Owner) -> bool:
    """True if the owner before was my gateway."""
    return before.owner is not None and before.owner.gateway == me.gateway


def _is_of_this_boot(before: Tenure | None, me: Owner) -> bool:
    """True if the owner before was a process of our gateway under this very kernel: it has ended, with all its calls,
    now that we have its lock.
    """
    found = before.owner if before is not None else None
    return (
        before is not None
        and found is not None
        and before.token == found.token
        and (found.gateway, found.disk, found.boot_id) == (me.gateway, me.disk, me.boot_id)
        and me.boot_id != ""
    )


def _read_leniently(sidecar: Sidecar) -> Owner | None:
    """What the owner marker says; None if there is none, or it cannot be read."""
    try:
        return sidecar.read_owner()
    except (OSError, ForebayError):
        return None


def finish_checkpoint(
    address: FileAddress, left: Tenure, file: OpenImage, *, sure: bool = False
) -> redo_header.Checkpoint | None:
    """Apply the committed redo journal that an owner left to the open image; it stays until there is the next owner.

    The checkpoint; None if none was committed, or the journal is of another owner than the marker. Raises ForebayError
    for a journal that cannot be applied, with the image unchanged; ChangedError, unless the operator is `sure`, where
    the image is not what it was at the commit; and OSError.
    """
    owner = left.owner
    if owner is not None and left.has(redo.NAME) and owner.image_format != address.format:
        raise ForebayError(
            f"{address.key} holds part of a checkpoint of the disk in it, which is in {owner.image_format} format: run "
            f"'forebay recover {address.name}' first"
        )
    return redo.recover(
        left.fd,
        file.fd,
        address.key,
        SystemCalls(),
        left.owner,
        sure=sure,
        place=left.place(redo.NAME),
    )
