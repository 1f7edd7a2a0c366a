"""One writer: the marker and the lock beside an image that a gateway may write (promise 6).

Beside `IMAGE` lies a directory `IMAGE.forebay/` with two files:

- `lock`, held with an OFD write lock (fcntl(2)) for as long as the disk is attached. It ends with the process that
  holds it, however that ends; on NFSv4 and GPFS it is seen by every host.
- `owner`, a JSON object: `format` (1), `gateway` (its uuid), `host`, `pid`, `boot_id`, `disk`, `since` (UTC, ISO 8601),
  `state` (`clean`: the image has everything; `dirty`: that gateway has data that the image lacks), `as_of` (UTC, of the
  last checkpoint that the image has; empty where that is not known), `dirty_since` (UTC: all that the image lacks was
  written later) and `dirty_bytes` (how much that was when it was last counted), and `token`, which only grows. It
  outlives the process: it says who has data for this image, and keeps others out until that is here.

While a checkpoint is written back there is a third, the redo journal: see `redo.py`. Whoever takes the marker applies
or drops a journal that was left behind, before anything else is done with the image.

The lock is asked for first, then QEMU's locks on the image itself (`image_lock.py`), then the marker is read, then
replaced (temporary name, fsync, rename, fsync of the directory). The same gateway takes its own marker back after a
crash. A clean release removes both. Before it is changed, and before a checkpoint is committed, the marker is read
again: one that is not ours any more is left as it is, for somebody else has the image now.

Everything in `Marker` blocks and belongs in a thread; `Claim` does that.
"""

import contextlib
import fcntl
import json
import logging
import os
import stat
import time
from dataclasses import asdict, dataclass, replace
from typing import Self

from forebay.errors import ForebayError
from forebay.origin.addresses import SIDECAR, FileAddress
from forebay.origin.calls import Calls
from forebay.origin.opening import OpenImage, look, open_folder
from forebay.sidecar import redo
from forebay.sidecar.locks import WRITES, InUse, NoLocks, hold, set_lock
from forebay.sidecar.record import (
    NOBODY,
    Owner,
    State,
    TakenOver,
    held,
    in_use,
    left_behind,
    now,
    taken_over,
)

__all__ = ["Marker", "Owner", "Recovered", "TakenOver", "read_owner"]

log = logging.getLogger("forebay.origin")

LONGEST_OWNER = 64 << 10
"""Bytes of an owner file that are read: what is longer was not written by a gateway."""

LOCK_TRIES = 8
"""How often the lock file may vanish under us (its holder is just leaving) before we give up."""

COUNT_SECONDS = 15.0
"""How often, at most, the marker is written anew only to say how much is dirty."""


def read_owner(image: FileAddress) -> Owner | None:
    """Who holds the image for writing, by its marker; None: nobody. Blocks.

    Raises OSError, and ForebayError for a marker that cannot be read.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = _opened(stack, open_folder(image))
            sidecar = _opened(stack, _open_sidecar(folder, image))
        except FileNotFoundError:
            return None
        owner = _read(sidecar, image)
        if owner is not None and owner.gateway != NOBODY:
            return owner
        if redo.NAME in os.listdir(sidecar):
            raise ForebayError(
                f"{image.key} holds part of a checkpoint: run 'forebay recover {image.key}' first"
            )
        return None


@dataclass(frozen=True)
class Recovered:
    """What was found beside an image, and is done with: a checkpoint that was `finished`, or one that was `dropped`.

    `owner` is who holds, or held, the image; with state dirty that gateway has later writes.
    """

    finished: redo.Checkpoint | None
    dropped: bool
    owner: Owner | None

    @property
    def as_of(self) -> str:
        """The instant that the image shows, where that is known: UTC, ISO 8601; else empty."""
        if self.finished is not None:
            return self.finished.as_of
        return self.owner.as_of if self.owner else ""

    @property
    def lacks(self) -> bool:
        """Whether a gateway has writes that the image lacks."""
        return self.owner is not None and self.owner.state == "dirty"


class Marker:
    """The marker of one image, held by this process. Every method blocks, and raises OSError."""

    def __init__(
        self, image: FileAddress, file: OpenImage, folder: int, sidecar: int, lock: int
    ) -> None:
        self.image = image
        self._file = Calls().status(file.fd)
        self._counted = time.monotonic()
        self._name = os.path.basename(image.path) + SIDECAR
        self._folder = folder
        self._sidecar = sidecar
        self._lock = lock
        self.owner: Owner | None = None
        self._unsure = False  # whether that is what the marker says: writing it failed

    @classmethod
    def take(
        cls,
        image: FileAddress,
        file: OpenImage,
        me: Owner,
        *,
        again: bool = False,
        need_locks: bool = True,
    ) -> Self:
        """Make `me` the owner of the open image `file`; with `again` only if its gateway is that already.

        Raises InUseError that names the owner and says what to do, when there is another one; TakenOver with `again`;
        ForebayError, if `need_locks`, where the file system has none: then only the marker keeps others out.
        """
        for _ in range(LOCK_TRIES):
            with contextlib.ExitStack() as undo:
                folder = _opened(undo, open_folder(image))
                _check_same(image, folder, file)
                if again:
                    _check_ours(image, folder, me)
                sidecar = _opened(undo, _made_sidecar(folder, image))
                lock = _opened(undo, os.open("lock", _CREATE, 0o600, dir_fd=sidecar))
                try:
                    locked = _locked(image, lock, need_locks)
                    if locked and _still_there(sidecar, lock):
                        _hold(image, file, need_locks)
                        marker = cls(image, file, folder, sidecar, lock)
                        marker._begin(me, file)
                        undo.pop_all()
                        return marker
                except ForebayError:
                    _tidy(image, folder, sidecar)
                    raise
                if not locked:
                    raise held(image, _read_leniently(sidecar, image))
        raise ForebayError(f"{image.key}: its owner is just changing: try again")

    @classmethod
    def recover(
        cls,
        image: FileAddress,
        file: OpenImage,
        *,
        take_over: bool = False,
        need_locks: bool = True,
    ) -> Recovered:
        """Finish or drop what a gateway that is gone left beside the open image.

        With `take_over` the image is nobody's afterwards, and what that gateway has is given up. Raises ForebayError,
        with nothing changed, while a gateway serves the image, a VM has it open by itself, or (`need_locks`) nobody
        can tell for want of locks; and for a journal that cannot be applied.
        """
        with contextlib.ExitStack() as undo:
            folder = _opened(undo, open_folder(image))
            _check_same(image, folder, file)
            try:
                sidecar = _opened(undo, _open_sidecar(folder, image))
            except FileNotFoundError:
                return Recovered(None, dropped=False, owner=None)
            lock = _opened(undo, os.open("lock", _CREATE, 0o600, dir_fd=sidecar))
            owner = _read(sidecar, image)
            if not _locked(image, lock, need_locks):
                raise ForebayError(
                    f"{image.key} is in use by {owner or 'another gateway'}, which serves it now: detach it there"
                )
            _hold(image, file, need_locks)
            marker = cls(image, file, folder, sidecar, lock)
            return marker._recover(owner, file, take_over=take_over)

    def _recover(self, owner: Owner | None, file: OpenImage, *, take_over: bool) -> Recovered:
        dropped = redo.UNFINISHED in os.listdir(self._sidecar)
        finished = self._finish(owner, file)
        found = Recovered(finished, dropped, owner)
        if owner is None:
            self._remove()
        elif take_over:
            me = Owner.of_this_process(NOBODY, owner.disk)
            token = max(int(time.time()), owner.token + 1)
            self._write(replace(me, token=token, as_of=found.as_of))
        return found

    def _finish(self, owner: Owner | None, file: OpenImage) -> redo.Checkpoint | None:
        """Finish or drop a checkpoint. The marker names its instant before the journal goes, as in `end_redo`."""

        def name(finished: redo.Checkpoint) -> None:
            if owner is not None:
                self._write(replace(owner, as_of=finished.as_of))

        return redo.recover(self._sidecar, file.fd, self.image.key, Calls(), name)

    def _begin(self, me: Owner, file: OpenImage) -> None:
        before = _read(self._sidecar, self.image)
        if before is not None and before.gateway not in (me.gateway, NOBODY):
            raise left_behind(self.image, before)
        found = self._finish(before, file)
        if found is not None:
            log.info("%s: a checkpoint of '%s' was finished", self.image.key, found.disk)
        as_of = found.as_of if found else before.as_of if before else ""
        # A removed marker takes its token along; the clock keeps the next one larger.
        token = max(int(time.time()), before.token + 1 if before else 1)
        mine = replace(me, token=token, as_of=as_of)
        if before is not None:
            mine = replace(
                mine,
                state=before.state,
                dirty_since=before.dirty_since,
                dirty_bytes=before.dirty_bytes,
            )
        self._write(mine)

    def admit(self, file: OpenImage, *, need_locks: bool = True) -> None:
        """Another descriptor of the same image takes the place of the one that was closed. As `take` and `check`."""
        self.check()
        _hold(self.image, file, need_locks)

    def set_state(self, state: State) -> None:
        """Say durably whether this gateway has data that the image lacks: `dirty` before the first such write is
        acknowledged, `clean` after the last was made durable in the image. Raises TakenOver, with nothing changed.
        """
        assert self.owner is not None, "released"
        if self._unsure or self.owner.state != state:
            self._check_ours()
            since = now() if state == "dirty" else ""
            self._write(replace(self.owner, state=state, dirty_since=since, dirty_bytes=0))

    @property
    def is_dirty(self) -> bool:
        """Whether the marker says that the image lacks data, or may say so; False after release."""
        return self.owner is not None and (self._unsure or self.owner.state == "dirty")

    def begin_redo(self, as_of: str) -> redo.Redo:
        """A redo journal for a checkpoint of that instant (UTC, ISO 8601; empty: not known)."""
        assert self.owner is not None, "released"
        me, file = self.owner, self._file
        self.check()
        return redo.Redo(
            self._sidecar,
            redo.Checkpoint(me.gateway, me.host, me.disk, file.size, file.inode, as_of),
        )

    def commit_redo(self, journal: redo.Redo) -> None:
        """From now on the checkpoint is to be applied by whoever finds it. As `check`, which comes first."""
        self.check()
        journal.commit()

    def end_redo(self, as_of: str, dirty_bytes: int = 0) -> None:
        """The image has all of the checkpoint, durably; it lacks `dirty_bytes` that were written later. As `check`:
        where the name leads to another file by now, it has not.
        """
        assert self.owner is not None, "released"
        self.check()
        since = as_of or self.owner.dirty_since
        # The marker first: once the journal is gone nothing else says which instant the image shows.
        self._write(replace(self.owner, as_of=as_of, dirty_since=since, dirty_bytes=dirty_bytes))
        redo.remove(self._sidecar)

    def check(self) -> None:
        """Raise TakenOver when the marker names somebody else now or is gone, or the image is another file."""
        self._check_ours()
        try:
            found = look(self.image, Calls())
        except FileNotFoundError:
            raise TakenOver(f"{self.image.key} was deleted or renamed") from None
        if (found.device, found.inode) != (self._file.device, self._file.inode):
            raise TakenOver(f"{self.image.key} was replaced by another file")
        if found.size != self._file.size:
            raise TakenOver(f"{self.image.key} has {found.size} bytes and had {self._file.size}")

    def count(self, dirty_bytes: int) -> None:
        """Say how much the image lacks, where that changed, but not too often."""
        assert self.owner is not None, "released"
        due = time.monotonic() - self._counted >= COUNT_SECONDS
        if self.owner.state == "dirty" and due and dirty_bytes != self.owner.dirty_bytes:
            self._write(replace(self.owner, dirty_bytes=dirty_bytes))

    def _check_ours(self) -> None:
        found = _read(self._sidecar, self.image)
        assert self.owner is not None, "released"
        if found is None or (found.gateway, found.token) != (self.owner.gateway, self.owner.token):
            raise taken_over(self.image, found)

    def release(self) -> None:
        """Take marker and lock away. With dirty data the marker stays, for only this gateway can bring that home.

        Raises TakenOver: the marker is somebody else's, and stays.
        """
        assert self.owner is not None, "released"
        try:
            if self.owner.state == "clean":
                self._check_ours()
                self._remove()
        finally:
            self.close()

    def _remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink("owner", dir_fd=self._sidecar)
        os.fsync(self._sidecar)
        for name in ("lock", redo.UNFINISHED):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._sidecar)
        with contextlib.suppress(OSError):  # a boot trace may stay in it
            os.rmdir(self._name, dir_fd=self._folder)

    def close(self) -> None:
        """Let the lock go and leave the marker where it is, as a crash would. Idempotent."""
        if self.owner is None:
            return
        self.owner = None
        for fd in (self._lock, self._sidecar, self._folder):
            os.close(fd)

    def _write(self, owner: Owner) -> None:
        text = json.dumps(asdict(owner), indent=1) + "\n"
        fd = os.open("owner.new", _CREATE | os.O_TRUNC, 0o644, dir_fd=self._sidecar)
        with open(fd, "wb") as file:  # writes all of it, or raises
            file.write(text.encode())
            file.flush()
            os.fsync(fd)
        self._unsure = True
        os.rename("owner.new", "owner", src_dir_fd=self._sidecar, dst_dir_fd=self._sidecar)
        os.fsync(self._sidecar)
        self.owner, self._unsure = owner, False
        self._counted = time.monotonic()


# -------------------------------------------------------------------------------------------------------------- files

_CREATE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def _opened(stack: contextlib.ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _open_sidecar(folder: int, image: FileAddress) -> int:
    name = os.path.basename(image.path) + SIDECAR
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=folder)


def _made_sidecar(folder: int, image: FileAddress) -> int:
    name = os.path.basename(image.path) + SIDECAR
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=folder)
            os.fsync(folder)
        return _open_sidecar(folder, image)
    except (PermissionError, NotADirectoryError) as error:
        raise ForebayError(
            f"{image.key}: {name} cannot be made beside it ({error.strerror}): let the daemon's user write there, "
            "or attach with --read-only or --overlay"
        ) from error


def _tidy(image: FileAddress, folder: int, sidecar: int) -> None:
    """Leave nothing beside an image that was refused, if only we made it; under the lock, where there are any."""
    with contextlib.suppress(OSError):
        if os.listdir(sidecar) == ["lock"]:
            os.unlink("lock", dir_fd=sidecar)
            os.rmdir(os.path.basename(image.path) + SIDECAR, dir_fd=folder)


def _check_same(image: FileAddress, folder: int, file: OpenImage) -> None:
    """The marker must lie beside the very file that is open: a name can be moved in between."""
    calls = Calls()
    fd = os.open(
        os.path.basename(image.path), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder
    )
    try:
        named, ours = calls.status(fd), calls.status(file.fd)
    finally:
        os.close(fd)
    if (named.device, named.inode) != (ours.device, ours.inode):
        raise ForebayError(f"{image.key} was just replaced by another file: try again")


def _locked(image: FileAddress, fd: int, need_locks: bool) -> bool:
    """Lock the file of that name. False: another one has it."""
    try:
        set_lock(fd, fcntl.F_WRLCK)
    except BlockingIOError:
        return False
    except NoLocks as error:
        _do_without(image, error, need_locks)
    return True


def _hold(image: FileAddress, file: OpenImage, need_locks: bool) -> None:
    """QEMU's locks, on the image itself."""
    try:
        hold(file.fd, WRITES)
    except InUse as fault:
        raise in_use(image.key, fault) from None
    except NoLocks as error:
        _do_without(image, error, need_locks)


def _do_without(image: FileAddress, error: NoLocks, need_locks: bool) -> None:
    if need_locks:
        raise ForebayError(
            f"{image.key}: its store has no file locks ({error.strerror}), so another host could write it at the same "
            "time: mount it with locks (NFS 4, or NFS 3 without nolock); only where no other host and no other "
            "program writes there, set require_locks = false for the store"
        ) from None
    log.warning(
        "%s: its store has no file locks: only the marker beside it keeps other gateways out, and nothing keeps "
        "out QEMU",
        image.key,
    )


def _still_there(sidecar: int, lock: int) -> bool:
    """A lock on a file that its last holder has just removed keeps nobody out."""
    try:
        named = os.stat("lock", dir_fd=sidecar, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return named.st_ino == os.fstat(lock).st_ino


def _read(sidecar: int, image: FileAddress) -> Owner | None:
    try:
        fd = os.open(
            "owner", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=sidecar
        )
    except FileNotFoundError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("not a file")
        return Owner.parse(os.read(fd, LONGEST_OWNER))
    except ValueError as fault:
        raise ForebayError(
            f"{image.key}: its owner marker {image.path}{SIDECAR}/owner cannot be read ({fault}): "
            "find out which gateway wrote the image, then remove that file"
        ) from fault
    finally:
        os.close(fd)


def _read_leniently(sidecar: int, image: FileAddress) -> Owner | None:
    try:
        return _read(sidecar, image)
    except (OSError, ForebayError):
        return None


def _check_ours(image: FileAddress, folder: int, me: Owner) -> None:
    """Whoever takes an image over replaces or removes the marker that we left."""
    with contextlib.ExitStack() as stack:
        try:
            found = _read(_opened(stack, _open_sidecar(folder, image)), image)
        except FileNotFoundError:
            found = None
        if found is None or found.gateway != me.gateway:
            raise taken_over(image, found)
