"""The daemon as a process: its directories and their locks, its log, its signals, how it begins and ends."""

import contextlib
import errno
import fcntl
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import lmdb
import trio

import forebay_cache
from forebay.config.model import Config
from forebay.daemon.attached import Attached
from forebay.daemon.watchdog import feed
from forebay.doors.restart import Inheritance
from forebay.errors import ForebayError
from forebay.storage.record import locate
from forebay.systemd import notify
from forebay_cache import Cache, CacheError

log = logging.getLogger("forebay.daemon")

STOP_SECONDS = 60.0
"""The whole of a stop. What is not done by then is given up: the journal has what was acknowledged."""

ALARM_SECONDS = 90
"""When even that hangs, SIGALRM ends the process. No worse than a crash: see promise 1."""

_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}


if TYPE_CHECKING:
    from forebay.control.server import Gateway as Controlled

    class _Runnable(Controlled, Protocol):
        async def resume(self, inherited: Inheritance) -> None: ...

        def attached(self) -> list[Attached]: ...

        async def stop(self, *, hand_over: bool = False) -> bool: ...


MakeGateway = Callable[[Config, Cache, trio.Nursery], "_Runnable"]


def run_process(config: Config, state: Path | None, run: Path | None, make: MakeGateway) -> int:
    """Run until told to stop; 0. Raises ForebayError when it cannot start."""
    places = {"state": state, "run": run}
    given = {name: path for name, path in places.items() if path is not None}
    config = config.model_copy(update={"gateway": config.gateway.model_copy(update=given)})
    _log_to_stderr()
    inherited = Inheritance.find()
    try:
        with (
            _locked(config.gateway.state, "--state", 0o700),
            _locked(config.gateway.run, "--run", 0o755),
        ):
            (config.gateway.run / "disks").mkdir(exist_ok=True)
            _remove_stale_sockets(config.gateway.run, inherited.paths)
            handed_over = _run(config, make, inherited)
    except ForebayError as fault:
        inherited.failed(str(fault))
        raise
    if handed_over:
        # Guests wait for the next process, and taking the interpreter apart would take as long as all of the above.
        logging.shutdown()
        os._exit(0)
    return 0


def _run(config: Config, make: MakeGateway, inherited: Inheritance) -> bool:
    """Whether the sockets were handed over at the end."""
    try:
        return trio.run(_main, config, make, inherited)
    except BaseExceptionGroup as group:
        fault = _cause(group)
        if fault is None:
            raise
        raise _one_line(fault) from group
    except (CacheError, OSError, lmdb.Error) as fault:
        raise _one_line(fault) from fault


async def _main(config: Config, make: MakeGateway, inherited: Inheritance) -> bool:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        cache = open_cache(config)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(cache.run)
                nursery.start_soon(forebay_cache.come_back, cache)
                gateway = make(config, cache, nursery)
                handed_over = await _serve(config, gateway, inherited, nursery, signals)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(STOP_SECONDS):
                await cache.close()
    return handed_over


async def _serve(
    config: Config,
    gateway: "_Runnable",
    inherited: Inheritance,
    nursery: trio.Nursery,
    signals: AsyncIterator[int],
) -> bool:
    planned = handed_over = False
    async with trio.open_nursery() as control:
        try:
            inherited.claim()
            await gateway.resume(inherited)
            # 100 ms to import: after the guests that may be waiting, and beside what they do.
            server = await trio.to_thread.run_sync(import_module, "forebay.control.server")
            path = config.gateway.run / "control.sock"
            await control.start(server.serve_control, gateway, path)
            nursery.start_soon(feed, gateway.attached)
            notify("READY=1")
            gc.freeze()  # what is there now stays: a look through all of it takes 25 ms, and guests wait
            gc.enable()
            log.info("ready: %d disks", len(gateway.status()))
            planned = await anext(signals) == signal.SIGTERM
        finally:
            managed = notify("STOPPING=1")
            signal.alarm(ALARM_SECONDS)
            control.cancel_scope.cancel()
            with trio.move_on_after(STOP_SECONDS) as scope:
                scope.shield = True
                handed_over = await gateway.stop(hand_over=planned and managed)
            if scope.cancelled_caught:
                log.error("the stop took too long and was cut short; nothing acknowledged is lost")
    return handed_over


def open_cache(config: Config) -> Cache:
    """The cache on its device. Raises CacheError and OSError."""
    section = config.cache
    return forebay_cache.open_cache(
        locate(config),
        config.gateway.state / "index",
        size=section.size,
        block_size=section.block_size,
    )


def format_cache(config: Config, force: bool) -> None:
    """Make the cache device empty; `force`: also when something unknown is on it. The daemon must not run.

    Raises ForebayError.
    """
    with offline(config):
        forebay_cache.format_device(
            locate(config), config.gateway.state / "index", size=config.cache.size, force=force
        )


@contextlib.contextmanager
def offline(config: Config) -> Iterator[None]:
    """Hold STATE, so that no daemon runs on it meanwhile. Raises ForebayError, also for faults of the cache."""
    with _locked(config.gateway.state, "--state", 0o700), in_one_line():
        yield


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Faults of the cache become ForebayError."""
    try:
        yield
    except (CacheError, OSError, lmdb.Error) as fault:
        raise _one_line(fault) from fault


# ---------------------------------------------------------------------------------------- directories


@contextlib.contextmanager
def _locked(directory: Path, option: str, mode: int) -> Iterator[None]:
    """Make the directory, and hold its lock file: two daemons on one are impossible. Raises ForebayError."""
    try:
        directory.mkdir(mode=mode, parents=True, exist_ok=True)
        fd = os.open(
            directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    except OSError as fault:
        raise ForebayError(
            f"{directory}: {fault.strerror}: let the daemon's user write there, or choose another {option}"
        ) from fault
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            if fault.errno != errno.EWOULDBLOCK:
                raise ForebayError(
                    f"{directory}/lock: {fault.strerror}: use a local directory"
                ) from fault
            raise ForebayError(
                f"{directory} is in use by another daemon (pid {_pid(fd)}): stop that one, "
                f"or give this one {option} of its own"
            ) from None
        _note_pid(fd, directory)
        yield
    finally:
        os.close(fd)


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


def _remove_stale_sockets(run: Path, inherited: set[Path]) -> None:
    """What a killed daemon left. Its lock is ours, so nobody answers there any more."""
    for path in (run / "disks").glob("*.sock*"):
        if path not in inherited:
            path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- faults, log


def _cause(group: BaseExceptionGroup[BaseException]) -> Exception | None:
    """The one fault that an operator can do something about, if a group has nothing else."""
    known, other = group.split((ForebayError, CacheError, OSError, lmdb.Error))
    if known is None or other is not None:
        return None
    found: BaseException = known
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found if isinstance(found, Exception) else None


def _one_line(fault: Exception) -> ForebayError:
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


class _Format(logging.Formatter):
    """With the priority that systemd reads (sd-daemon(3)) where stderr is its journal."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if "JOURNAL_STREAM" not in os.environ:
            return text
        prefix = f"<{_PRIORITIES.get(record.levelno, 7)}>"
        return "\n".join(prefix + line for line in text.splitlines())


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
