# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Opening an image in some format: what comes out is an open file as `open_image` has it, of the virtual disk.

The files of the image, and its server, are had by a process of the image (worker/program.py). It ends when this one
does, or when the descriptor is closed: then it has the server end first, which writes what it still has in memory to
the files. Whoever writes the image next waits for that, by a lock.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from forebay.errors import ForebayError, InUseError
from forebay.origin.addresses import FileAddress
from forebay.origin.opening import Backing, OpenImage
from forebay.origin.virtual.chain import Link, Locate, open_chain
from forebay.origin.virtual.disk import VirtualDisk
from forebay.origin.virtual.graph import PROGRAM, command
from forebay.origin.worker import process, syscalls
from forebay.origin.worker.process import Worker, folder_in, here
from forebay.origin.worker.server import Connection, Server, start
from forebay_nbd.client.blocking import BlockingClient

END_SECONDS = 10.0
"""How long a command waits for the processes of an image that it has closed."""


class Keeper:
    """The process of one image: it opens what this thread opens. Implements worker.process.Process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def is_local(self, _path: str) -> bool:
        """False: it opens all."""
        return False

    def worker(self) -> Worker:
        """The process, which is started once."""
        return self._worker

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[None]:
        """For the body, this thread's calls are made by it."""
        before = getattr(here, "process", None)
        here.process = self
        try:
            yield
        finally:
            here.process = before


def open_virtual(
    address: FileAddress,
    *,
    read_only: bool,
    run: Path | None,
    locate: Locate,
    admitted: bool = False,
    need_locks: bool = True,
) -> OpenImage:
    """The virtual disk of an image, as an open file whose format is that of `address`.

    `run` is the daemon's RUN; None in a command. `admitted` is as for `open_image`. The server is started with the
    first call that needs it. Raises ForebayError for what the operator has to change, OSError for failing storage.
    """
    if shutil.which(PROGRAM) is None:
        raise ForebayError(
            f"{address.name} is in {address.format} format, and {PROGRAM} is not installed: install it (Debian: "
            "qemu-system-common), or convert the image with qemu-img convert -O raw"
        )
    keeper = Keeper(Worker(address.name, _lock(address, run, read_only=read_only)))
    worker = keeper.worker()
    try:
        with keeper.at_hand():
            chain = open_chain(address, read_only=read_only, admitted=admitted, locate=locate)
    except BaseException:
        worker.leave()
        if run is None:
            worker.wait(END_SECONDS)
        raise
    top = chain[0]
    assert top.file.status is not None, "a file has one"
    serve = partial(_serve, chain, run, writable=not read_only, need_locks=need_locks)
    disk = VirtualDisk(
        address.name, worker, top.file.fd, top.header.size, serve, writes=not read_only
    )
    return replace(
        top.file,
        fd=disk.handle,
        size=top.header.size,
        status=replace(top.file.status, size=top.header.size),
        format=address.format,
        backing=[Backing(link.address, link.file.fd) for link in chain[1:]],
        fresh=None,
    )


def start_server(fd: int) -> None:
    """Start the server of an open virtual disk, unless it was. Raises ForebayError with what that says, OSError."""
    disk = process.worker_of(fd)
    assert isinstance(disk, VirtualDisk), "a virtual disk"
    disk.start()


@contextlib.contextmanager
def closing(fd: int) -> Iterator[None]:
    """For a command: after the body the virtual disk is closed, and its processes have ended."""
    disk = process.worker_of(fd)
    assert isinstance(disk, VirtualDisk), "a virtual disk"
    try:
        yield
    finally:
        syscalls.close(fd)
        disk.wait(END_SECONDS)


def _lock(address: FileAddress, run: Path | None, *, read_only: bool) -> Path | None:
    """The file by which the process waits for the one before; None for readers, of which there may be many."""
    if run is None or read_only:
        return None
    name = sha256(address.key.encode(errors="surrogateescape")).hexdigest()[:32]
    return folder_in(run) / f"{name}.lock"


def _serve(
    chain: list[Link], run: Path | None, worker: Worker, *, writable: bool, need_locks: bool
) -> list[Connection]:
    """Start the server of a chain; connections to it. Raises ForebayError, OSError."""
    handles = [link.file.fd for link in chain]
    fds = [process.number_at(handle) for handle in handles]
    name, size = chain[0].address.name, chain[0].header.size
    writes = 1 if writable else 0
    with contextlib.ExitStack() as scratch:
        if run is None:
            folder = Path(scratch.enter_context(tempfile.TemporaryDirectory(prefix="forebay-")))
        else:
            folder = folder_in(run)
        server = Server(
            command(chain, fds, writable=writable, need_locks=need_locks),
            reads=handles[writes:],
            writes=handles[:writes],
        )
        found = start(worker, server, folder, partial(_refusal, name))
    check_size(found, size, f"{name}: {PROGRAM}", "its header")
    return found


def check_size(found: list[Connection], size: int, who: str, other: str) -> None:
    """Raise ForebayError, with all connections closed, unless a server has the size that something else told."""
    told = {one.negotiated.size for one in found if isinstance(one, BlockingClient)}
    if told != {size}:
        for one in found:
            one.close()
        raise ForebayError(
            f"{who} takes it for a disk of {told} bytes, and {other} says {size}: see qemu-img check"
        )


def _refusal(name: str, said: str) -> ForebayError:
    """What to raise where the server has said something instead of serving."""
    if "Failed to get" in said and "lock" in said:
        return InUseError(
            f"{name} is in use by another program, or one of the files that it lies on: stop that, then try again",
            {"program": "qemu"},
        )
    why = said.rpartition("}: ")[2].removeprefix(f"{PROGRAM}: ")[:400]
    return ForebayError(f"{name}: {PROGRAM} does not serve it ({why}): see qemu-img check")
