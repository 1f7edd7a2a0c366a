# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Real servers for the tests: nbdkit and qemu-nbd on Unix sockets, loop devices, images with known content.

Everything here ends what it started, by its own pid, also when the test fails.
"""

import contextlib
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

START_TIMEOUT = 20.0
"""Seconds a server may take until it accepts. They need tens of milliseconds; a loaded machine needs more."""

STOP_TIMEOUT = 20.0
"""Seconds a server may take to end after SIGTERM before it gets SIGKILL."""

MIB = 1 << 20


def need(*tools: str) -> None:
    """Skip the test, with the reason, unless every tool is installed."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: `make setup` installs it")


def accepts(path: Path) -> bool:
    """Whether somebody listens on the Unix socket `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def wait_accepting(process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    """Return once `path` accepts; RuntimeError with the server's log when it ended or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT
    with pid_descriptor(process) as ended:
        while not accepts(path):
            if select.select([ended], [], [], 0.01)[0]:
                raise RuntimeError(f"{process.args!r} ended at once:\n{log.read_text()}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{process.args!r} does not listen on {path}:\n{log.read_text()}"
                )


@contextlib.contextmanager
def pid_descriptor(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """A descriptor that becomes readable when `process` ends."""
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def end(process: subprocess.Popen[Any], how: signal.Signals = signal.SIGTERM) -> int:
    """End this one process and reap it: `how` first, SIGKILL where that is not enough. Its exit code."""
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


ONE_THREAD = "--threads=1"
"""For an nbdkit whose client leaves with several requests under way: two threads that find out together end nbdkit
1.32 (connections.c: raw_send_socket: Assertion `sock >= 0' failed)."""


class NbdServer:
    """One running nbdkit or qemu-nbd. `sock` is its socket, `uri` names its export."""

    def __init__(self, command: Sequence[str], sock: Path, export: str = "") -> None:
        self.sock = sock
        self.uri = f"nbd+unix:///{export}?socket={sock}"
        self.log = sock.with_suffix(".log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            wait_accepting(self.process, sock, self.log)
        except BaseException:
            self.stop()
            raise

    def pause(self) -> None:
        """Hang: requests are taken by the kernel and never answered."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.resume()
        end(self.process)
        self.sock.unlink(missing_ok=True)

    def kill(self) -> None:
        end(self.process, signal.SIGKILL)
        self.sock.unlink(missing_ok=True)


def nbdkit(
    sock: Path, *plugin: str, filters: Sequence[str] = (), options: Sequence[str] = ()
) -> NbdServer:
    """Start nbdkit: `nbdkit(sock, "file", image, "rdelay=200ms", filters=["delay"])`."""
    need("nbdkit")
    command = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", str(sock), *options]
    command += [f"--filter={name}" for name in filters]
    return NbdServer([*command, *map(str, plugin)], sock)


def qemu_nbd(
    sock: Path, image: Path, *options: str, fmt: str = "raw", export: str = ""
) -> NbdServer:
    """Start qemu-nbd for any number of clients, one after the other and at once."""
    need("qemu-nbd")
    command = ["qemu-nbd", "--persistent", "--shared=0", f"--socket={sock}", f"--format={fmt}"]
    command += [f"--export-name={export}", *options, str(image)]
    return NbdServer(command, sock, export)


@contextlib.contextmanager
def loop_device(backing: Path, sector_size: int) -> Iterator[Path]:
    """A block device with sectors of `sector_size` bytes on top of a file; skips where there is none to have."""
    need("losetup")
    command = ["losetup", "--find", "--show", f"--sector-size={sector_size}", str(backing)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device to have here: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


def random_image(path: Path, size: int, seed: int, holes: Sequence[tuple[int, int]] = ()) -> bytes:
    """Make a raw image of `size` bytes and return its content.

    The content follows from `seed`; each (offset, length) of `holes`, bytes, is left sparse and reads as zeros.
    """
    generator = random.Random(seed)
    content = bytearray()
    while len(content) < size:  # randbytes() has an upper limit
        content += generator.randbytes(min(size - len(content), 16 * MIB))
    for offset, length in holes:
        content[offset : offset + length] = bytes(length)
    with path.open("wb") as file:
        file.truncate(size)
        position = 0
        for offset, length in [*sorted(holes), (size, 0)]:
            file.seek(position)
            file.write(memoryview(content)[position:offset])
            position = offset + length
    return bytes(content)
