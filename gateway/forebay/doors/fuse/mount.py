# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay fuse MOUNT`: the process that mounts the disks, from start to end."""

import contextlib
import ctypes
import errno
import gc
import grp
import logging
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

import forebay_fast
from forebay.config.model import Config
from forebay.config.sections import FuseSection
from forebay.doors.fuse.awake import kept_awake
from forebay.doors.fuse.daemon import Daemon
from forebay.doors.fuse.link import Link
from forebay.doors.fuse.open_files import OpenFiles
from forebay.doors.fuse.places import (
    DISKS,
    IMAGES,
    STAGE,
    DisksPlace,
    ImagesPlace,
    Place,
    Shown,
    StagePlace,
)
from forebay.doors.fuse.rights import Keeper, drop, may_mount
from forebay.errors import ForebayError
from forebay.origin.addresses import resolve
from forebay.systemd import keep_alive, notify

try:
    import pyfuse3

    from forebay.doors.fuse.files import Files
    from forebay.doors.fuse.turns import Turns, can_install
except ImportError as missing:
    raise ForebayError(
        f"FUSE is not available ({missing}): install python3-pyfuse3 and fuse3"
    ) from None

if TYPE_CHECKING:
    from forebay.doors.fuse.core_door import CoreDoor

log = logging.getLogger("forebay.fuse")

READ_AHEAD_KB = 1024
"""KiB the kernel reads ahead of a sequential reader, where we may set it: as much as one request can carry."""

IN_FLIGHT = 64
"""Requests the kernel has out at once, where we may set it: as many as the daemon takes on one connection."""

TASKS = 99
"""Requests worked on at once; each has a buffer of 1 MiB for what the kernel may send."""

IDLE_TASKS = 16
"""Of these, how many stay when there is nothing to do: to end one and start the next costs more than a small read."""

KEPT_BYTES = 32 << 20
"""Freed memory that is not given back to the system: requests come with a buffer of up to 1 MiB each."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""mallopt(3)."""

UNMOUNT_SECONDS = 5.0
"""How long an orderly unmount may take at the end; then the mount is cut off."""


class Settings:
    """What the command was told."""

    def __init__(self, *, allow_other: bool, wait: float, patience: float) -> None:
        """`allow_other`: users other than the one that mounts are let in. `wait`: seconds for which a request waits for
        a daemon that is away. `patience`: seconds for which a daemon may answer nothing until it counts as away.
        """
        self.allow_other = allow_other
        self.wait = wait
        self.patience = patience


def mount(config: Config, where: Path, settings: Settings) -> int:
    """Mount at `where` and serve until it is unmounted or SIGTERM or SIGINT comes; 0. Raises ForebayError."""
    _log_to_stderr()
    _keep_memory()
    where = _mount_point(where)
    keeper = Keeper(where, partial(_tune, where)) if may_mount() else None
    options = set(pyfuse3.default_options) | {"fsname=forebay", "subtype=forebay"}
    if settings.allow_other:
        options.add("allow_other")
    try:
        trio.run(_main, config, where, options, settings, keeper)
    except BaseExceptionGroup as group:
        fault: BaseException = group
        while isinstance(fault, BaseExceptionGroup) and len(fault.exceptions) == 1:
            fault = fault.exceptions[0]
        if isinstance(fault, ForebayError):
            raise fault from None
        raise
    return 0


async def _main(
    config: Config, where: Path, options: set[str], settings: Settings, keeper: Keeper | None
) -> None:
    """Mount, serve until it is unmounted, and give back what the mount had attached.

    `keeper` keeps the right to mount, which this process gives up; None for an ordinary user, who has fusermount3.
    """
    started = time.time_ns()
    daemon = Daemon(str(config.gateway.run / "control.sock"))
    stores = {name: store.path for name, store in config.stores.items()}
    images = ImagesPlace(stores, started, _shown(config.fuse))
    places: dict[str, Place] = {DISKS: DisksPlace(daemon, started), IMAGES: images}
    places[STAGE] = StagePlace(images)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            door = _core_door(nursery) if config.gateway.core else None
            make_link = door.link if door is not None else partial(Link, nursery)
            make_link = partial(make_link, wait=settings.wait, patience=settings.patience)
            pieces = str(config.gateway.run / "stage" / "pieces.sock")
            files = OpenFiles(
                daemon, images, _keys(config), nursery, make_link=make_link, pieces=pieces
            )
            Turns.install(door)
            _mount(Files(places, files, daemon, door), where, options)
            if keeper is not None:
                drop(config.gateway.run)
            nursery.start_soon(files.tidy)
            nursery.start_soon(_ready, where, keeper, "Python" if door is None else "the core")
            nursery.start_soon(_unmount_on, signals, where, keeper)
            nursery.start_soon(keep_alive)
            try:
                # the core does not block in its reads
                async with kept_awake() if door is None else contextlib.nullcontext():
                    await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=TASKS)
            finally:
                notify("STOPPING=1")
                if door is not None:
                    await door.close()
                pyfuse3.close(unmount=True)
                with trio.CancelScope(shield=True):
                    await files.shut()
                nursery.cancel_scope.cancel()
    log.info("%s: unmounted", where)


def _core_door(nursery: trio.Nursery) -> "CoreDoor | None":
    """What serves with the compiled core; None where Python does, and the log says why."""
    if not forebay_fast.serves():
        if forebay_fast.missing:
            log.info("without the compiled core, which is slower: %s", forebay_fast.missing)
        return None
    from forebay.doors.fuse.core_door import CoreDoor  # noqa: PLC0415  (it wants a core)
    from forebay_fast.loop import wait_of_loop  # noqa: PLC0415

    wait = wait_of_loop()
    return CoreDoor(nursery, wait) if wait is not None and can_install() else None


def _shown(section: FuseSection) -> Shown:
    """Who may read images. The configuration has found user and group to exist."""
    return Shown(
        section.mode,
        pwd.getpwnam(section.owner).pw_uid if section.owner else None,
        grp.getgrnam(section.group).gr_gid if section.group else None,
    )


def _keys(config: Config) -> Callable[[str], str | None]:
    """A function that returns the image of a disk, by how it was attached; None where none is configured so."""

    def key_of(text: str) -> str | None:
        try:
            return resolve(config, text).key
        except ForebayError:
            return None

    return key_of


# ------------------------------------------------------------------------------------------------------------- mounting


def _mount_point(where: Path) -> Path:
    """The absolute path of a directory to mount at. A mount that a killed process left there is removed.

    Raises ForebayError where nothing can be mounted there.
    """
    where = Path(os.path.abspath(where))
    try:
        # for a moment the kernel knows the attributes of a dead one, but never this
        os.statvfs(where)
        found = where.stat()
    except OSError as fault:
        if fault.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise ForebayError(f"{where}: {fault.strerror}: make the directory first") from None
        log.warning("%s: a process that ended had it mounted; mounting anew", where)
        _fusermount("-u", "-z", str(where))
        found = where.stat()
    if not where.is_dir():
        raise ForebayError(f"{where} is not a directory: mount at an empty directory")
    if found.st_dev != where.parent.stat().st_dev and os.path.ismount(where):
        raise ForebayError(f"{where} has something mounted already: unmount that first")
    return where


def _mount(files: "Files", where: Path, options: set[str]) -> None:
    """Mount the file system. Raises ForebayError, which says what to do."""
    try:
        pyfuse3.init(files, str(where), options)
    except RuntimeError:
        hint = "see the line above"
        if not Path("/dev/fuse").exists():
            hint = "there is no /dev/fuse: load the module fuse"
        elif "allow_other" in options and os.geteuid() != 0:
            hint = "--allow-other needs user_allow_other in /etc/fuse.conf, or root"
        raise ForebayError(f"{where} cannot be mounted: {hint}") from None


async def _ready(where: Path, keeper: Keeper | None, server: str) -> None:
    """Tell the service manager once the mount answers; then let the kernel ask for more at once."""
    if keeper is not None:
        await trio.to_thread.run_sync(keeper.wait_mounted, abandon_on_cancel=True)
    else:
        await trio.to_thread.run_sync(os.stat, where, abandon_on_cancel=True)
    log.info("%s: mounted, served by %s", where, server)
    notify("READY=1")
    gc.freeze()  # what is there now stays: requests do not wait for a look through it


def _tune(where: Path) -> None:
    """Let the kernel ask for more at once. Root may; without it the mount is as right and somewhat slower."""
    minor = os.minor(os.stat(where).st_dev)
    for path, value in (
        (f"/sys/class/bdi/0:{minor}/read_ahead_kb", READ_AHEAD_KB),
        (f"/sys/fs/fuse/connections/{minor}/max_background", IN_FLIGHT),
        (f"/sys/fs/fuse/connections/{minor}/congestion_threshold", IN_FLIGHT * 3 // 4),
    ):
        with contextlib.suppress(OSError):
            Path(path).write_text(str(value))


async def _unmount_on(signals: AsyncIterator[int], where: Path, keeper: Keeper | None) -> None:
    """At a signal, unmount while requests are still answered, so that what is mapped and dirty arrives.

    If files are open, the mount is cut off after UNMOUNT_SECONDS.
    """
    await anext(signals)
    with trio.move_on_after(UNMOUNT_SECONDS):
        unmount = keeper.unmount if keeper is not None else partial(_fusermount, "-u", str(where))
        if await trio.to_thread.run_sync(unmount, abandon_on_cancel=True):
            return
    log.warning("%s: in use: those who have files open there get errors from now on", where)
    if keeper is not None:
        await trio.to_thread.run_sync(keeper.cut_off, abandon_on_cancel=True)
    pyfuse3.terminate()


def _fusermount(*arguments: str) -> bool:
    """Run fusermount3; True if it succeeded. Blocks. Raises ForebayError where it is not installed."""
    try:
        command = ["fusermount3", *arguments]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        raise ForebayError("fusermount3 is not installed: install fuse3") from None


def _keep_memory() -> None:
    """Have malloc keep freed memory, instead of asking the system for each large buffer anew: new pages cost time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # not every C library has it
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)
