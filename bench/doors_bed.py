# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The doors of `make bench-doors`, started on throw-away directories: how fio gets there, and whose CPU time counts."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.bed import make_gateway
from bench.doors_report import OURS, PEER
from bench.measure import copy_out

from real.fuse_mount import FuseMount
from real.gateway_process import GatewayProcess
from real.processes import end, random_image

CIPHERS = ("aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com")
START_SECONDS = 20.0
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
"""sshd is not on everybody's."""

PROGRAMS = {
    "fio": "fio",
    "nbdcopy": "libnbd-bin",
    "fusermount3": "fuse3",
    "nbdfuse": "libnbd-bin",
    "sshfs": "sshfs",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
}
"""What takes part, and Debian's package of each."""

SEPARATION = Path("/run/sshd")
"""The empty directory that sshd insists on when root runs it."""

CACHE = 8
"""Images' worth of cache: so much that no checkpoint begins during a turn. sshfs writes nothing twice either."""

Process = subprocess.Popen[bytes]


@dataclass
class Door:
    """One way to the image. `job` are fio's options for it; `pids` are the processes that serve it now.

    `settle` is called after each turn that wrote, unmeasured.
    """

    name: str
    job: dict[str, str]
    pids: Callable[[], set[int]]
    settle: Callable[[], None] = lambda: None


def missing() -> list[str]:
    """What is not installed, each with the package that has it."""
    found = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    lacking = [f"{name} (package {PROGRAMS[name]})" for name in found]
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        lacking.append("/dev/fuse (module fuse)")
    return lacking


def doors(stack: contextlib.ExitStack, parent: Path, size: int) -> Iterator[Door]:
    """All of them, on one image of `size` bytes each, below `parent`; `stack` ends them."""
    yield from _through_forebay(stack, parent, size)
    folder = Path(tempfile.mkdtemp(prefix="fbd-", dir=parent))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    plain = folder / "plain.raw"
    random_image(plain, size, seed=1)
    yield from _through_ssh(stack, plain)
    yield Door("plain file", {"filename": str(plain)}, set)


def family(*pids: int) -> set[int]:
    """These processes and all that descend from them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = set[int](), list(pids)
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += children.get(pid, [])
    return found


def until(holds: Callable[[], bool], process: Process, what: str) -> None:
    """Wait for it. Raises RuntimeError when the process ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while not holds():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not start")
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------- one warm disk


def _through_forebay(stack: contextlib.ExitStack, parent: Path, size: int) -> Iterator[Door]:
    """The socket, the mount, and nbdfuse: three ways to one warm disk in write-back."""
    gateway = make_gateway(parent, CACHE * size)
    stack.callback(gateway.remove)
    calm = {"path": str(gateway.images), "max_lag": "1h", "max_dirty": str(CACHE * size)}
    cache = {"size": str(CACHE * size)}
    gateway.configure({"cache": cache, "stores.images": calm})
    gateway.start()
    random_image(gateway.images / "d.raw", size, seed=1)
    gateway.attach("d", "d.raw", mode="write-back")
    copy_out(gateway.uri("d"), size)

    def settle() -> None:
        gateway.cli("flush", "--all", timeout=600)

    socket_job = {"ioengine": "nbd", "uri": gateway.uri("d"), "filename": "nbd"}
    yield Door("NBD socket", socket_job, lambda: {gateway.pid}, settle)
    mount = FuseMount(gateway)
    stack.callback(mount.remove)
    file = {"filename": str(mount.disk("d"))}
    yield Door(OURS, file, lambda: {gateway.pid, mount.pid}, settle)
    peer, process = _nbdfuse(stack, gateway)
    file = {"filename": str(peer)}
    yield Door(PEER, file, lambda: {gateway.pid, *family(process.pid)}, settle)


def _nbdfuse(stack: contextlib.ExitStack, gateway: GatewayProcess) -> tuple[Path, Process]:
    """The disk as a file, by libnbd's own mount."""
    directory = Path(tempfile.mkdtemp(dir=gateway.directory))
    file, ready = directory / "nbd", directory.with_suffix(".pid")
    process = subprocess.Popen(["nbdfuse", "--pidfile", str(ready), str(file), gateway.uri("d")])
    stack.callback(_unmount, directory, process)
    until(ready.exists, process, "nbdfuse")
    return file, process


def _unmount(directory: Path, process: Process) -> None:
    subprocess.run(["fusermount3", "-u", "-z", str(directory)], check=False, capture_output=True)
    end(process)


# --------------------------------------------------------------------------------------------------------------- sshfs


def _through_ssh(stack: contextlib.ExitStack, plain: Path) -> Iterator[Door]:
    """sshfs with each cipher, to an sshd with a port, keys and a configuration of its own."""
    home = Path(tempfile.mkdtemp(prefix="ssh-", dir=plain.parent))
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
        subprocess.run(command, check=True)
    port = _free_port()
    server = _sshd(stack, home, port)
    for cipher in CIPHERS:
        name = cipher.partition("@")[0]
        file, process = _sshfs(stack, home / name, cipher, port, plain)
        yield Door(f"sshfs {name}", {"filename": str(file)}, _pids(process, server))


def _pids(*processes: Process) -> Callable[[], set[int]]:
    return lambda: family(*(process.pid for process in processes))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _sshd(stack: contextlib.ExitStack, home: Path, port: int) -> Process:
    """A server that takes the one key, on loopback."""
    if os.geteuid() == 0 and not SEPARATION.exists():
        SEPARATION.mkdir(0o755)
        stack.callback(SEPARATION.rmdir)
    (home / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nPidFile none\n"
        f"AuthorizedKeysFile {home}/user.pub\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f"Ciphers {','.join(CIPHERS)}\nSubsystem sftp internal-sftp\n"
    )
    program = shutil.which("sshd", path=PATH)
    assert program is not None
    log = stack.enter_context((home / "log").open("wb"))
    process = subprocess.Popen([program, "-D", "-e", "-f", str(home / "config")], stderr=log)
    stack.callback(end, process)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(listens, process, "sshd")
    return process


def _sshfs(
    stack: contextlib.ExitStack, where: Path, cipher: str, port: int, plain: Path
) -> tuple[Path, Process]:
    """The folder of `plain`, mounted at `where`; the file there."""
    home = where.parent
    where.mkdir()
    options = (
        f"Ciphers={cipher}",
        f"IdentityFile={home / 'user'}",
        f"UserKnownHostsFile={home / 'known'}",
        "StrictHostKeyChecking=no",
        "IdentitiesOnly=yes",
        "LogLevel=ERROR",
        "Compression=no",
    )
    words = [word for option in options for word in ("-o", option)]
    place = f"{getpass.getuser()}@127.0.0.1:{plain.parent}"
    command = ["sshfs", "-f", "-F", "/dev/null", "-p", str(port), *words, place, str(where)]
    process = subprocess.Popen(command)
    stack.callback(_unmount, where, process)
    until((where / plain.name).exists, process, "sshfs")
    return where / plain.name, process
