"""One writer: the marker and the lock beside an image that a gateway may write (promise 6).

Beside `IMAGE` lies a directory `IMAGE.forebay/` with two files:

- `lock`, held with an OFD write lock (fcntl(2)) for as long as the disk is attached. It ends with the process that
  holds it, however that ends; on NFSv4 and GPFS it is seen by every host.
- `owner`, a JSON object: `format` (1), `gateway` (its uuid), `host`, `pid`, `boot_id`, `disk`, `since` (UTC, ISO 8601),
  `state` (`clean`: the image has everything; `dirty`: that gateway has data that the image lacks), `as_of` (UTC, of the
  last checkpoint that the image has; empty where that is not known), and `token`, which only grows. It outlives the
  process: it says who has data for this image, and keeps others out until that is here.

While a checkpoint is written back there is a third, the redo journal: see `redo.py`. Whoever takes the marker applies
or drops a journal that was left behind, before anything else is done with the image.

The lock is asked for first, then the marker is read, then replaced (temporary name, fsync, rename, fsync of the
directory). The same gateway takes its own marker back after a crash. A clean release removes both.

Everything in `Marker` blocks and belongs in a thread; `Claim` does that.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self, TypeVar

import trio

from forebay import redo
from forebay.errors import ForebayError
from forebay.origin_calls import Calls
from forebay.origin_threads import Call, StoreThreads, bounded
from forebay.store import SIDECAR, FileImage, ImageFile, open_folder

log = logging.getLogger("forebay.origin")

T = TypeVar("T")

FORMAT = 1
"""Of the owner file. A marker with another number is somebody newer's: refused."""

LONGEST_OWNER = 64 << 10
"""Bytes of an owner file that are read: what is longer was not written by a gateway."""

LOCK_TRIES = 8
"""How often the lock file may vanish under us (its holder is just leaving) before we give up."""

_FLOCK = struct.Struct(
    "hhqqi"
)  # struct flock of fcntl(2): type, whence, start, length, pid (0 for OFD locks)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

State = Literal["clean", "dirty"]


class TakenOver(ForebayError):
    """An image that was ours is so no more: others may have written it, so nothing that we know of it holds."""


NOBODY = ""
"""The gateway of a marker that was left by `forebay takeover`: the next one may take it."""


@dataclass(frozen=True)
class Owner:
    """What the owner file says."""

    gateway: str
    host: str
    pid: int
    boot_id: str
    disk: str
    since: str
    state: State
    token: int
    as_of: str = ""
    format: int = FORMAT

    @classmethod
    def of_this_process(cls, gateway: str, disk: str) -> Self:
        """A new owner: nothing dirty, and no token yet."""
        return cls(
            gateway=gateway,
            host=socket.gethostname(),
            pid=os.getpid(),
            boot_id=_boot_id(),
            disk=disk,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            state="clean",
            token=0,
        )

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Read an owner file. Raises ValueError."""
        found = json.loads(text)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError("not an owner file of this version")
        found.setdefault("as_of", "")
        for name in ("gateway", "host", "boot_id", "disk", "since", "as_of"):
            if not isinstance(found.get(name), str) or not found[name].isprintable():
                raise ValueError(f"'{name}' is not text")
        if found.get("state") not in ("clean", "dirty"):
            raise ValueError("'state' is neither clean nor dirty")
        if not all(isinstance(found.get(name), int) for name in ("pid", "token")):
            raise ValueError("'pid' or 'token' is not a number")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        """For messages: who, what for, since when."""
        return f"host {self.host} (disk '{self.disk}', {self.state}, since {self.since})"


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""  # a sandbox hides it: the token and the gateway's uuid still decide


def read_owner(image: FileImage) -> Owner | None:
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
        self, image: FileImage, file: ImageFile, folder: int, sidecar: int, lock: int
    ) -> None:
        status = os.fstat(file.fd)
        self.image = image
        self._file_id = (status.st_size, status.st_ino)
        self._name = os.path.basename(image.path) + SIDECAR
        self._folder = folder
        self._sidecar = sidecar
        self._lock = lock
        self.owner: Owner | None = None

    @classmethod
    def take(cls, image: FileImage, file: ImageFile, me: Owner, *, again: bool = False) -> Self:
        """Make `me` the owner of the open image `file`; with `again` only if its gateway is that already.

        Raises ForebayError that names the owner and says what to do, when there is another one; TakenOver with `again`.
        """
        for _ in range(LOCK_TRIES):
            with contextlib.ExitStack() as undo:
                folder = _opened(undo, open_folder(image))
                _check_same(image, folder, file)
                if again:
                    _check_ours(image, folder, me)
                sidecar = _opened(undo, _made_sidecar(folder, image))
                lock = _opened(undo, os.open("lock", _CREATE, 0o600, dir_fd=sidecar))
                if not _locked(lock):
                    raise _held(image, _read_leniently(sidecar, image))
                if _still_there(sidecar, lock):
                    marker = cls(image, file, folder, sidecar, lock)
                    marker._begin(me, file)
                    undo.pop_all()
                    return marker
        raise ForebayError(f"{image.key}: its owner is just changing: try again")

    @classmethod
    def recover(cls, image: FileImage, file: ImageFile, *, take_over: bool = False) -> Recovered:
        """Finish or drop what a gateway that is gone left beside the open image.

        With `take_over` the image is nobody's afterwards, and what that gateway has is given up. Raises ForebayError,
        with nothing changed, while a gateway serves the image, and for a journal that cannot be applied.
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
            if not _locked(lock):
                raise ForebayError(
                    f"{image.key} is in use by {owner or 'another gateway'}, which serves it now: detach it there"
                )
            marker = cls(image, file, folder, sidecar, lock)
            return marker._recover(owner, file, take_over=take_over)

    def _recover(self, owner: Owner | None, file: ImageFile, *, take_over: bool) -> Recovered:
        dropped = redo.UNFINISHED in os.listdir(self._sidecar)
        finished = redo.recover(self._sidecar, file.fd, self.image.key, Calls())
        found = Recovered(finished, dropped, owner)
        if owner is None:
            self._remove()
        elif take_over:
            me = Owner.of_this_process(NOBODY, owner.disk)
            token = max(int(time.time()), owner.token + 1)
            self._write(replace(me, token=token, as_of=found.as_of))
        elif finished is not None:
            self._write(replace(owner, as_of=found.as_of))
        return found

    def _begin(self, me: Owner, file: ImageFile) -> None:
        before = _read(self._sidecar, self.image)
        if before is not None and before.gateway not in (me.gateway, NOBODY):
            raise _left_behind(self.image, before)
        found = redo.recover(self._sidecar, file.fd, self.image.key, Calls())
        if found is not None:
            log.info("%s: a checkpoint of '%s' was finished", self.image.key, found.disk)
        as_of = found.as_of if found else before.as_of if before else ""
        # A removed marker takes its token along; the clock keeps the next one larger.
        token = max(int(time.time()), before.token + 1 if before else 1)
        state = before.state if before else me.state
        self._write(replace(me, token=token, state=state, as_of=as_of))

    def set_state(self, state: State) -> None:
        """Say durably whether this gateway has data that the image lacks: `dirty` before the first such write is
        acknowledged, `clean` after the last was made durable in the image.
        """
        assert self.owner is not None, "released"
        if self.owner.state != state:
            self._write(replace(self.owner, state=state))

    def begin_redo(self, as_of: str) -> redo.Redo:
        """A redo journal for a checkpoint of that instant (UTC, ISO 8601; empty: not known)."""
        assert self.owner is not None, "released"
        me = self.owner
        return redo.Redo(
            self._sidecar, redo.Checkpoint(me.gateway, me.host, me.disk, *self._file_id, as_of)
        )

    def end_redo(self, as_of: str) -> None:
        """The image has all of the checkpoint, durably."""
        assert self.owner is not None, "released"
        redo.remove(self._sidecar)
        self._write(replace(self.owner, as_of=as_of))

    def check(self) -> None:
        """Raise ForebayError when the marker names somebody else now, or is gone."""
        found = _read(self._sidecar, self.image)
        assert self.owner is not None, "released"
        if found is None or (found.gateway, found.token) != (self.owner.gateway, self.owner.token):
            raise _taken_over(self.image, found)

    def release(self) -> None:
        """Take marker and lock away. With dirty data the marker stays, for only this gateway can bring that home."""
        assert self.owner is not None, "released"
        try:
            if self.owner.state == "clean":
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
        try:
            os.write(fd, text.encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename("owner.new", "owner", src_dir_fd=self._sidecar, dst_dir_fd=self._sidecar)
        os.fsync(self._sidecar)
        self.owner = owner


class Claim:
    """A `Marker`, off the event loop. One call at a time, in order, also after one that was given up."""

    def __init__(self, marker: Marker, threads: StoreThreads, timeout: float) -> None:
        self._marker = marker
        self._threads = threads
        self._timeout = timeout
        self._turn = trio.Lock()
        self._last: trio.Event | None = None

    @classmethod
    async def take(
        cls,
        image: FileImage,
        file: ImageFile,
        me: Owner,
        threads: StoreThreads,
        timeout: float,
        *,
        again: bool = False,
    ) -> Self:
        """Become the owner. Raises ForebayError when another gateway is, or was in between where it is to be ours
        `again` (TakenOver), and OSError when the store fails.
        """
        with bounded(timeout, f"claiming {image.key}"):
            marker = await threads.run(
                lambda: Marker.take(image, file, me, again=again), drop=lambda late: late.close()
            )
        return cls(marker, threads, timeout)

    @property
    def state(self) -> State | None:
        """What the marker says; None after release."""
        owner = self._marker.owner
        return owner.state if owner else None

    @property
    def token(self) -> int:
        """Larger than that of every owner before."""
        assert self._marker.owner is not None, "released"
        return self._marker.owner.token

    async def dirty(self) -> None:
        """Before the first write that the image lacks is acknowledged. Durable when it returns.

        Raises OSError; the state is then as before or as asked.
        """
        await self._set_state("dirty")

    async def clean(self) -> None:
        """After the last such write was made durable in the image. As `dirty`."""
        await self._set_state("clean")

    async def _set_state(self, state: State) -> None:
        await self._one_at_a_time("marking", lambda: self._marker.set_state(state))

    async def begin_redo(self, as_of: str) -> redo.Redo:
        """See `Marker`. Raises OSError."""
        return await self._one_at_a_time(
            "beginning a checkpoint of",
            lambda: self._marker.begin_redo(as_of),
            drop=lambda late: late.drop(),
        )

    async def commit_redo(self, journal: redo.Redo) -> None:
        """Raises OSError: then it may be committed or not, and is the next one's to replace."""
        await self._one_at_a_time("committing a checkpoint of", journal.commit)

    async def drop_redo(self, journal: redo.Redo) -> None:
        """It was not committed, and never will be. Raises OSError."""
        await self._one_at_a_time("dropping a checkpoint of", journal.drop)

    async def end_redo(self, as_of: str) -> None:
        """The image has all of the checkpoint, durably. Raises OSError."""
        await self._one_at_a_time("ending a checkpoint of", lambda: self._marker.end_redo(as_of))

    async def check(self) -> None:
        """Raises ForebayError when somebody else owns the image now, OSError when the store fails."""
        await self._one_at_a_time("looking at the owner of", self._marker.check)

    async def release(self) -> None:
        """Give the image free. With state dirty the marker stays. Raises OSError."""
        await self._one_at_a_time("releasing", self._marker.release)

    async def close(self) -> None:
        """Let only the lock go, as a crash would: at a restart, and when the image is left dirty."""
        await self._one_at_a_time("unlocking", self._marker.close)

    async def _one_at_a_time(
        self, what: str, do: Callable[[], T], *, drop: Callable[[T], object] | None = None
    ) -> T:
        with bounded(self._timeout, f"{what} {self._marker.image.key}"):
            async with self._turn:
                if self._last is not None:
                    await self._last.wait()
                call = Call(do, drop=drop)
                self._last = call.ended
                return await self._threads.wait_for(call)
        raise AssertionError("bounded() raises")


# -------------------------------------------------------------------------------------------------- files and messages

_CREATE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def _opened(stack: contextlib.ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _open_sidecar(folder: int, image: FileImage) -> int:
    name = os.path.basename(image.path) + SIDECAR
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=folder)


def _made_sidecar(folder: int, image: FileImage) -> int:
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


def _check_same(image: FileImage, folder: int, file: ImageFile) -> None:
    """The marker must lie beside the very file that is open: a name can be moved in between."""
    named = os.stat(os.path.basename(image.path), dir_fd=folder, follow_symlinks=False)
    ours = os.fstat(file.fd)
    if (named.st_dev, named.st_ino) != (ours.st_dev, ours.st_ino):
        raise ForebayError(f"{image.key} was just replaced by another file: try again")


def _locked(fd: int) -> bool:
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _still_there(sidecar: int, lock: int) -> bool:
    """A lock on a file that its last holder has just removed keeps nobody out."""
    try:
        named = os.stat("lock", dir_fd=sidecar, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return named.st_ino == os.fstat(lock).st_ino


def _read(sidecar: int, image: FileImage) -> Owner | None:
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


def _read_leniently(sidecar: int, image: FileImage) -> Owner | None:
    try:
        return _read(sidecar, image)
    except (OSError, ForebayError):
        return None


def _check_ours(image: FileImage, folder: int, me: Owner) -> None:
    """Whoever takes an image over replaces or removes the marker that we left."""
    with contextlib.ExitStack() as stack:
        try:
            found = _read(_opened(stack, _open_sidecar(folder, image)), image)
        except FileNotFoundError:
            found = None
        if found is None or found.gateway != me.gateway:
            raise _taken_over(image, found)


def _taken_over(image: FileImage, found: Owner | None) -> TakenOver:
    by = f" by {found}" if found is not None and found.gateway != NOBODY else ""
    return TakenOver(f"{image.key} was taken over{by}")


def _held(image: FileImage, owner: Owner | None) -> ForebayError:
    return ForebayError(
        f"{image.key} is in use by {owner or 'another gateway'}: detach it there first, "
        "or attach it here with --read-only"
    )


def _left_behind(image: FileImage, owner: Owner) -> ForebayError:
    if owner.state == "dirty":
        has, then = "has data that the image lacks", "gives that data up"
    else:
        has, then = "did not release it", "frees it, and nothing is lost"
    return ForebayError(
        f"{image.key} belongs to {owner}, which {has}: detach it there; only if that gateway is "
        f"gone for good, 'forebay takeover {image.key}' {then}"
    )
