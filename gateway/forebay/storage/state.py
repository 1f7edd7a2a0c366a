# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The directory STATE: who holds it, and the cache that lies in it or is named there.

One process at a time holds a directory: the daemon for as long as it runs, or a command that works on the cache
without it (`forebay cache create`, `check`, `repair`, ...). What all of these need is here; what the daemon does
beyond that is in `forebay.process.process`.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import lmdb

import forebay_cache
from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.storage.owner import as_owner, check_access, check_is_file
from forebay.storage.record import locate, record_path
from forebay_cache import Cache, CacheError
from forebay_cache.offline.replay import Telling, nobody_is_told

FAULTS = (CacheError, OSError, lmdb.Error)
"""What `one_line` makes a ForebayError of: faults of the cache, of the host, and of the index."""

LOCK_SECONDS = 5.0
"""How long the lock of a directory may outlive the daemon that had it."""
_LOCK_STEP = 0.05

STATE_MODE = 0o700
"""File mode of STATE, where it is made: what guests wrote lies in it."""


def index_path(config: Config) -> Path:
    """Where the LMDB environment of the cache lies: the directory `index` in STATE."""
    return config.gateway.state / "index"


def open_cache(config: Config, telling: Telling = nobody_is_told) -> Cache:
    """The cache on its device, opened for use; whoever calls this holds STATE. `telling` is told how far that is.

    Raises CacheError and OSError.
    """
    section, index = config.cache, index_path(config)
    check_access(config.gateway.state, _needed(config))
    cache = forebay_cache.open_cache(
        locate(config),
        index,
        size=section.size,
        block_size=section.block_size,
        timeout=section.timeout,
        telling=telling,
    )
    cache.index.reserve.keep()
    return cache


def _needed(config: Config) -> Iterator[Path]:
    """What the daemon has to be able to read and write."""
    state, index = config.gateway.state, index_path(config)
    yield from (state, record_path(state), index)
    if os.access(index, os.R_OK | os.X_OK, effective_ids=True):
        yield from sorted(index.iterdir())
    yield locate(config)


def format_cache(config: Config, force: bool) -> None:
    """Make the cache device empty; with `force` also one that holds something unknown. No daemon may run.

    Raises ForebayError.
    """
    with offline(config):
        forebay_cache.format_device(
            locate(config), index_path(config), size=config.cache.size, force=force
        )


@contextlib.contextmanager
def offline(config: Config) -> Iterator[None]:
    """Hold STATE, as its owner, so that no daemon runs on it meanwhile.

    Raises ForebayError, also for faults of the cache.
    """
    state = config.gateway.state
    with as_owner(state), held(state, None, STATE_MODE), in_one_line():
        yield


@contextlib.contextmanager
def untouched(config: Config) -> Iterator[None]:
    """Keep daemons from starting on STATE, without making or changing anything there.

    Several processes may do so at once. Raises ForebayError where a daemon runs, or STATE cannot be read.
    """
    state = config.gateway.state
    path = state / "lock"
    with as_owner(state) if state.exists() else contextlib.nullcontext():
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            yield  # no daemon has run here yet
            return
        except OSError as fault:
            raise ForebayError(
                f"{path}: {fault.strerror}: run this as root, or as the daemon's user"
            ) from None
        try:
            _lock_shared(fd, state)
            yield
        finally:
            os.close(fd)


def _lock_shared(fd: int, state: Path) -> None:
    if not _is_locked(fd, fcntl.LOCK_SH):
        raise ForebayError(
            f"{state} is in use by a daemon: 'forebay cache scrub' checks the cache meanwhile, "
            "or stop the daemon first"
        )


# ---------------------------------------------------------------------------------------- holding a directory


@contextlib.contextmanager
def held(directory: Path, option: str | None, mode: int) -> Iterator[None]:
    """Make the directory, with that file mode, and hold its lock file: no two daemons can have one directory.

    `option` is the one of `forebay serve` that names another directory; None for a command that works without a
    daemon. Raises ForebayError.
    """
    fd = _open_lock(directory, option, mode)
    try:
        _lock(fd, directory, option)
        _note_pid(fd, directory)
        yield
    finally:
        os.close(fd)


def _open_lock(directory: Path, option: str | None, mode: int) -> int:
    try:
        directory.mkdir(mode=mode, parents=True, exist_ok=True)
        path = directory / "lock"
        fd = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600
        )
    except OSError as fault:
        check_access(directory, [directory, directory / "lock"])
        other = f", or choose another {option}" if option else ""
        raise ForebayError(
            f"{directory}: {fault.strerror}: let the daemon's user write there{other}"
        ) from fault
    try:
        check_is_file(fd, path)
    except OSError as fault:
        os.close(fd)
        raise ForebayError(f"{path}: {fault.strerror}") from None
    return fd


def _lock(fd: int, directory: Path, option: str | None) -> None:
    try:
        is_locked = _is_locked(fd, fcntl.LOCK_EX)
    except OSError as fault:
        raise ForebayError(f"{directory}/lock: {fault.strerror}: use a local directory") from fault
    if not is_locked:
        raise _in_use(directory, option, _pid(fd))


def _is_locked(fd: int, kind: int) -> bool:
    """Take flock(2)'s lock of that kind; False if somebody has one that forbids it. Raises OSError.

    A daemon that is dead may have left its lock to a process that it was just starting: that is waited for.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not _is_dead(_pid(fd)) or time.monotonic() > deadline:
                return False
        else:
            return True
        time.sleep(_LOCK_STEP)


def _is_dead(pid: str) -> bool:
    """True if there is no process of that number."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


def _in_use(directory: Path, option: str | None, pid: str) -> ForebayError:
    if option is None:
        return ForebayError(
            f"{directory} is in use by a daemon (pid {pid}): stop it first, then run this again"
        )
    return ForebayError(
        f"{directory} is in use by another daemon (pid {pid}): stop that one, "
        f"or give this one {option} of its own"
    )


def _pid(fd: int) -> str:
    text = os.pread(fd, 20, 0).decode(errors="replace").strip()
    return text if text.isdecimal() else "unknown"


def _note_pid(fd: int, directory: Path) -> None:
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as fault:
        raise ForebayError(
            f"{directory}: {fault.strerror}: make room there, then start again"
        ) from fault


# ------------------------------------------------------------------------------------------- faults in one line


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Whatever of FAULTS the body raises is raised as ForebayError."""
    try:
        yield
    except FAULTS as fault:
        raise one_line(fault) from fault


def one_line(fault: Exception) -> ForebayError:
    """A fault of the cache or of the host, as one line that says what is wrong and what to do."""
    if isinstance(fault, ForebayError):
        return fault
    if isinstance(fault, OSError):
        where = f"{fault.filename}: " if fault.filename else ""
        what = fault.strerror or str(fault)
        hint = (
            "make room there" if fault.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right"
        )
        return ForebayError(f"{where}{what}: {hint}, then start again")
    if isinstance(fault, lmdb.Error):
        return ForebayError(
            f"the index cannot be opened ({fault}): see that its disk has room and works"
        )
    return ForebayError(str(fault))
