# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where traces are kept: beside the image, `IMAGE.forebay/trace`; else under STATE, in a file named by the image's key.

Beside the image, every host has it. Where that cannot be written, and for devices and NBD servers, it is under STATE.
Of two that fit the image the one that was recorded last counts. A new one takes the name when it is whole: two hosts
that record at the same time leave that of one of them.

Everything here blocks, raises OSError, and belongs in a thread.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from forebay.boot.encoding import LONGEST, BadTraceError, decoded, encoded
from forebay.boot.trace import Boot, Run, Trace
from forebay.errors import ForebayError
from forebay.origin.addresses import SIDECAR, Address, FileAddress
from forebay.origin.protocol import Identity
from forebay.origin.worker import syscalls
from forebay.sidecar import own_files
from forebay.sidecar.files import Sidecar, identity
from forebay.sidecar.record import UnreadableError

log = logging.getLogger("forebay.boot")

NAME = "trace"
"""The file, in the directory beside the image; of a virtual disk its format stands behind that."""

RAW = "raw"
"""The format of a file whose bytes are the disk."""

MOST_KEPT = 1024
"""Files under STATE: the oldest go."""

_NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Nobody need hear of it: the image is not ours to write beside."""


@dataclass(frozen=True)
class Found:
    """A trace that was found, and where."""

    image: str
    """The key of the image."""
    trace: Trace
    path: str
    """Where it lies: a file under STATE, or beside the image, as STORE:path."""
    fits: bool | None
    """True if it is of the image as that is now; None where nobody knows."""
    usual: frozenset[int] = frozenset()
    """As `Trace.usual`."""
    runs: tuple[Run, ...] = ()
    """As `Trace.runs`."""

    @classmethod
    def of(cls, image: str, trace: Trace, path: str, now: Identity | None) -> Self:
        """The trace at `path`, of an image that looks like that now; None: nobody knows."""
        fits = None if now is None else trace.content == now.content
        return cls(image, trace, path, fits, frozenset(trace.usual()), tuple(trace.runs()))

    def told(self) -> dict[str, Any]:
        """What an operator is told of it: the keys of `forebay trace show --json`."""
        return {
            "image": self.image,
            "path": self.path,
            "fits": self.fits,
            "boots": self.trace.boots,
            "recorded": self.trace.recorded,
            "bytes": sum(run.length for run in self.runs),
            "requests": len(self.runs),
            "seconds": max((self.trace.blocks[n].ms for n in self.usual), default=0) / 1000,
            "blocks": len(self.usual),
            "unusual_blocks": len(self.trace.blocks) - len(self.usual),
        }

    def exported(self) -> bytes:
        """The same with every block, as JSON: [number of the block of 64 KiB, ms, seen, told]."""
        told = self.told() | {
            "size": self.trace.size,
            "mtime_ns": self.trace.mtime_ns,
            "inode": self.trace.inode,
            "trace": [[n, *read] for n, read in self.trace.blocks.items()],
        }
        return json.dumps(told).encode()


class TraceFiles:
    """The traces of all images, as this host finds them."""

    def __init__(self, state: Path, gateway: str) -> None:
        """`state` is the directory STATE; `gateway` is the uuid of this gateway's cache."""
        self._state = state / "traces"
        self._gateway = gateway

    # ------------------------------------------------------------------------------------------------------- reading

    def find(self, address: Address, now: Identity | None) -> Found | None:
        """The trace of an image; None if there is none. One that does not fit comes only where no other does.

        `now` is what the image looks like; with None it is looked at, if it is the bytes of a file. Raises OSError
        where that cannot be done.
        """
        now = now or self.identity(address)
        found = [
            Found.of(address.key, trace, path, now)
            for trace, path in (*self._beside(address), *self._in_state(address))
        ]
        return max(found, key=lambda one: (one.fits is True, one.trace.recorded), default=None)

    def identity(self, address: Address) -> Identity | None:
        """What the image looks like now; None for one that is not the bytes of a file. Raises OSError."""
        if not isinstance(address, FileAddress) or address.format != RAW:
            return None
        return identity(address)

    def _beside(self, address: Address) -> list[tuple[Trace, str]]:
        if not isinstance(address, FileAddress):
            return []
        place = _place(address)
        try:
            with Sidecar(address) as sidecar:
                sidecar.open()
                image = sidecar.look_beside()
                data = own_files.read(sidecar.fd, _name(address), image, LONGEST + 1)
            return [(decoded(data), place)]
        except FileNotFoundError:
            return []
        except OSError as fault:
            log.info("%s: its boot trace, %s, is passed over: %s", address.key, place, fault)
            return []
        except (ValueError, UnreadableError) as fault:
            log.warning("%s: its boot trace, %s, is passed over: %s", address.key, place, fault)
            return []

    def _in_state(self, address: Address) -> list[tuple[Trace, str]]:
        path = self._path(address)
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(path, flags), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError(errno.EINVAL, "it is no file: remove it")
                data = file.read(LONGEST + 1)
            return [(decoded(data, address.key), str(path))]
        except FileNotFoundError:
            return []
        except (OSError, BadTraceError) as fault:
            log.warning("%s: its boot trace, %s, is passed over: %s", address.key, path, fault)
            return []

    def _path(self, address: Address) -> Path:
        return self._state / hashlib.sha256(address.key.encode()).hexdigest()[:40]

    # ------------------------------------------------------------------------------------------------------- writing

    def add(self, address: Address, before: Trace, boot: Boot) -> Found:
        """Keep the trace of before with one boot more; the one that is there then. Raises OSError."""
        trace = before.with_boot(boot, time.time())
        now = Identity(trace.size, trace.mtime_ns, 0, trace.inode)
        return Found.of(address.key, trace, self.keep(address, trace), now)

    def keep(self, address: Address, trace: Trace) -> str:
        """Keep the trace in the place of the one of before; where it is then. Raises OSError if that cannot be."""
        data = encoded(trace, address.key)
        if isinstance(address, FileAddress):
            try:
                self._keep_beside(address, data)
            except (OSError, ForebayError) as fault:
                if not _is_refusal(fault):
                    log.info("%s: its boot trace is kept on this host only: %s", address.key, fault)
            else:
                self._path(address).unlink(missing_ok=True)
                return _place(address)
        self._keep_in_state(address, data)
        return str(self._path(address))

    def _keep_beside(self, address: FileAddress, data: bytes) -> None:
        with Sidecar(address) as sidecar:
            name = _name(address)
            try:
                sidecar.make()
                own_files.keep(sidecar.fd, name, f"{name}.{self._gateway}", data)
            except BaseException:
                sidecar.remove_if_empty()
                raise
            syscalls.fsync(sidecar.fd)

    def _keep_in_state(self, address: Address, data: bytes) -> None:
        self._state.mkdir(mode=0o700, exist_ok=True)
        path = self._path(address)
        new = path.with_suffix(".new")
        try:
            new.unlink(missing_ok=True)
            _write(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), data)
            new.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        with os.scandir(self._state) as entries:
            aged = sorted((entry.stat().st_mtime_ns, entry.path) for entry in entries)
        for _, path in aged[:-MOST_KEPT]:
            Path(path).unlink(missing_ok=True)

    def drop(self, address: Address) -> bool:
        """Remove the trace of the image, wherever it is. True if there was one. Raises OSError."""
        dropped = self._path(address).exists()
        self._path(address).unlink(missing_ok=True)
        if isinstance(address, FileAddress):
            with (
                Sidecar(address) as sidecar,
                contextlib.suppress(FileNotFoundError, UnreadableError),
            ):
                sidecar.open()
                syscalls.stat(_name(address), dir_fd=sidecar.fd, follow_symlinks=False)
                own_files.remove(sidecar.fd, _name(address))
                syscalls.fsync(sidecar.fd)
                sidecar.remove_if_empty()
                dropped = True
        return dropped


def _name(address: FileAddress) -> str:
    """The name of the trace, in the directory beside the image."""
    return NAME if address.format == RAW else f"{NAME}.{address.format}"


def _place(address: FileAddress) -> str:
    """Where that is, as operators name it."""
    return f"{address.name}{SIDECAR}/{_name(address)}"


def _is_refusal(fault: Exception) -> bool:
    """True if the image is not ours to write beside."""
    if isinstance(fault, ForebayError):
        return isinstance(fault.__cause__, PermissionError)
    return isinstance(fault, OSError) and fault.errno in _NOT_OURS


def _write(fd: int, data: bytes) -> None:
    """Write a new file durably, and close it. Raises OSError."""
    try:
        syscalls.pwrite_all(fd, data, 0)
        syscalls.fsync(fd)
    finally:
        syscalls.close(fd)
