# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The daemon as a process: its directories and their locks, its log, its signals, how it begins and ends."""

import contextlib
import gc
import logging
import os
import resource
import signal
import time
from collections.abc import AsyncIterator
from functools import partial
from importlib import import_module
from pathlib import Path

import trio

import forebay_cache
import forebay_fast
from forebay.config.model import Config
from forebay.daemon.figures.loop_meter import METER
from forebay.daemon.gateway import Gateway
from forebay.doors.accepting import DISKS, make_folder
from forebay.doors.restart import EarlierSockets
from forebay.errors import ForebayError
from forebay.events.held import Events
from forebay.events.journal import log_to_stderr
from forebay.events.states import watch_states
from forebay.events.telling import keep_with, subject_of, tell
from forebay.image.boundary import breaks_the_cache
from forebay.process.watchdog import feed
from forebay.storage.owner import check_not_roots
from forebay.storage.state import FAULTS, STATE_MODE, held, one_line, open_cache
from forebay.stores.listener import FOLDER as STORES
from forebay.systemd import Starting, notify

log = logging.getLogger("forebay.daemon")

STOP_SECONDS = 60.0
"""The whole of a stop. What is not done by then is given up: the journal has what was acknowledged."""

ALARM_SECONDS = 90
"""When even that hangs, SIGALRM ends the process. No worse than a crash: see promise 1."""

RUN_MODE = 0o755
"""File mode of RUN, where it is made: clients have to find their sockets in it."""

LOOK_SECONDS = 0.002
"""After a look of the garbage collector through all objects that took longer, the next ones leave out what is there."""

GENERATIONS = (700, 4, 4)
"""How much more there may be before the garbage collector looks (gc.set_threshold): so that the longest look is at some
ten thousand new objects. With Python's own numbers it is at eighty thousand, which takes 75 ms beside other work, each
time that as much has come, as with every hundredth disk that is attached."""

SOCKETS = (DISKS, STORES)
"""The folders of RUN that have sockets of NBD."""

LAST_SECONDS = 0.25
"""So long the end waits for events to be written."""

_OLDEST = 2
"""The generation whose collection looks through all objects."""


def serve(config: Config, state: Path | None = None, run: Path | None = None) -> int:
    """Run the daemon until it is told to stop; 0. Raises ForebayError when it cannot start.

    `state` and `run` are instead of the directories that the configuration names.
    """
    config = config.at(state=state, run=run)
    log_to_stderr(subject_of)
    _raise_limits()
    _choose_core(config.gateway.core)
    earlier = EarlierSockets.find()
    try:
        check_not_roots(config.gateway.state)
        with (
            held(config.gateway.state, "--state", STATE_MODE),
            held(config.gateway.run, "--run", RUN_MODE),
        ):
            for folder in SOCKETS:
                make_folder(config.gateway.run / folder)
            _remove_stale_sockets(config.gateway.run, earlier.paths)
            are_sockets_left = _run_told(config, earlier)
    except ForebayError as fault:
        earlier.failed(str(fault))
        raise
    if are_sockets_left:
        # Guests wait for the next process, and taking the interpreter apart would take as long as all of the above.
        logging.shutdown()
        os._exit(0)
    return 0


def _run_told(config: Config, earlier: EarlierSockets) -> bool:
    """As `_run`, with what happens meanwhile kept."""
    events = Events(config.gateway.state)
    with keep_with(events.keep):
        try:
            return _run(config, earlier, events)
        finally:
            events.close(LAST_SECONDS)


def _choose_core(wanted: bool) -> None:
    """Serve with the compiled core if that is wanted and there. The log says so where it is wanted and not there."""
    forebay_fast.use(wanted)
    if wanted and forebay_fast.missing:
        log.info("serving without the compiled core, which is slower: %s", forebay_fast.missing)


def _raise_limits() -> None:
    """Have as many descriptors as the hard limit allows: each disk and each client takes some.

    The soft limit, 1024 on most systems, is for programs that use select(2).
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run(config: Config, earlier: EarlierSockets, events: Events) -> bool:
    """The event loop, from start to end. True if the sockets were left with the service manager at the end."""
    try:
        return trio.run(_main, config, earlier, events)
    except BaseExceptionGroup as group:
        fault = _cause(group)
        if fault is None:
            raise
        raise one_line(fault) from group
    except FAULTS as fault:
        raise one_line(fault) from fault


async def _main(config: Config, earlier: EarlierSockets, events: Events) -> bool:
    """Open the cache, serve, close the cache. True if the sockets were left with the service manager at the end.

    If a task ends that all disks depend on, nothing is written any more, not even by closing the cache: what is in
    memory may be wrong, and the journal has what was acknowledged.
    """
    is_sound = False
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        cache = open_cache(config, Starting().tell)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(cache.run)
                nursery.start_soon(forebay_cache.come_back, cache)
                nursery.start_soon(forebay_cache.watch_files, cache)
                nursery.start_soon(METER.run)
                gateway = Gateway(config, cache, nursery)
                try:
                    are_sockets_left = await _serve(
                        config, gateway, earlier, events, nursery, signals
                    )
                finally:
                    is_sound = not nursery.cancel_scope.cancel_called
                nursery.cancel_scope.cancel()
        finally:
            if is_sound:
                with trio.CancelScope(shield=True), trio.move_on_after(STOP_SECONDS):
                    await cache.close()
            else:
                cache.release()
    return are_sockets_left


async def _serve(
    config: Config,
    gateway: Gateway,
    earlier: EarlierSockets,
    events: Events,
    nursery: trio.Nursery,
    signals: AsyncIterator[int],
) -> bool:
    """Serve disks and control API until a signal, or a fault. True if the sockets were left for the next process.

    `nursery` is that of what all disks depend on: when a task of it has failed, requests are given up at once.
    """
    planned = are_sockets_left = False
    async with trio.open_nursery() as control:
        try:
            await _start(config, gateway, earlier, events, nursery, control)
            while (told := await anext(signals)) == signal.SIGHUP:
                control.start_soon(_reload, gateway)
            planned = told == signal.SIGTERM
        finally:
            managed = notify("STOPPING=1")
            signal.alarm(ALARM_SECONDS)
            control.cancel_scope.cancel()
            if nursery.cancel_scope.cancel_called:
                gateway.hang_up()
            else:
                are_sockets_left = await _stop(gateway, restart=planned and managed)
            if not are_sockets_left:
                tell("stop", "the daemon ends")
    return are_sockets_left


async def _start(
    config: Config,
    gateway: Gateway,
    earlier: EarlierSockets,
    events: Events,
    nursery: trio.Nursery,
    control: trio.Nursery,
) -> None:
    """Bring the disks back, then serve the control API in the nursery `control`, and say that the daemon is ready."""
    earlier.claim()
    await gateway.resume(earlier)
    # 100 ms to import: after the guests that may be waiting, and beside what they do.
    server = await trio.to_thread.run_sync(import_module, "forebay.control.server")
    events.begin()
    path = config.gateway.run / "control.sock"
    await control.start(partial(server.serve_control, events=events), gateway, path)
    if config.metrics.listen is not None:
        scraping = await trio.to_thread.run_sync(
            import_module, "forebay.control.prometheus.scraping"
        )
        control.start_soon(scraping.Scraping(gateway, config.metrics).run)
    nursery.start_soon(feed, gateway.attached, gateway.stores.served)
    nursery.start_soon(watch_states)
    notify("READY=1")
    gc.freeze()  # what is there now stays: a look through all of it takes 25 ms, and guests wait
    gc.callbacks.append(Survivors().note)
    gc.set_threshold(*GENERATIONS)
    gc.enable()
    tell("start", f"ready: {len(gateway.status())} disks")


async def _reload(gateway: Gateway) -> None:
    """Take the configuration anew. Raises nothing: who sent a signal looks into the log."""
    try:
        await gateway.reloading.reload()
    except ForebayError:
        pass  # it is in the log
    except Exception as fault:
        if breaks_the_cache(fault):
            raise
        log.exception("the configuration is not taken anew")


class Survivors:
    """Has what a long look through all objects has found alive left out of the next ones: pages of the cache's index, a
    million of which take 50 ms each time. What of it dies in a circle later is not freed: little, for it was alive when
    so much was made that the look was long.
    """

    def __init__(self) -> None:
        self._began = 0.0

    def note(self, phase: str, info: dict[str, int]) -> None:
        """For gc.callbacks."""
        if phase == "start":
            self._began = time.perf_counter()
        elif info["generation"] == _OLDEST and time.perf_counter() - self._began > LOOK_SECONDS:
            gc.freeze()


async def _stop(gateway: Gateway, *, restart: bool) -> bool:
    """End all work, in bounded time. True if the sockets were left for the next process."""
    are_sockets_left = False
    with trio.move_on_after(STOP_SECONDS) as scope:
        scope.shield = True
        are_sockets_left = await gateway.stop(restart=restart)
    if scope.cancelled_caught:
        log.error("the stop took too long and was cut short; nothing acknowledged is lost")
    return are_sockets_left


def _remove_stale_sockets(run: Path, earlier: set[Path]) -> None:
    """What a killed daemon left. Its lock is ours, so nobody answers there any more."""
    for path in (path for folder in SOCKETS for path in (run / folder).glob("*.sock*")):
        if path not in earlier:
            with contextlib.suppress(OSError):  # the disk whose place it is says what is wrong
                path.unlink()


# ------------------------------------------------------------------------------------------- faults


def _cause(group: BaseExceptionGroup[BaseException]) -> Exception | None:
    """The one fault that an operator can do something about, if a group has nothing else."""
    known, other = group.split((ForebayError, *FAULTS))
    if known is None or other is not None:
        return None
    found: BaseException = known
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found if isinstance(found, Exception) else None
