# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Who may use the daemon's sockets: asked of the kernel at each connection, whatever the sockets' modes are by then."""

import grp
import os
import pwd
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay.config.sections import GatewaySection
from forebay.doors.peers import Admission, Peer
from real.gateway_process import GatewayProcess
from real.processes import random_image

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")

STRANGER = 65534
"""nobody, of no group that matters."""

CALLER = """
import os, socket, sys
path, uid, gid, groups, say, count = sys.argv[1:]
os.setgroups([int(one) for one in groups.split(",") if one])
os.setgid(int(gid))
os.setuid(int(uid))
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(20)
try:
    sock.connect(path)
    sock.sendall(bytes.fromhex(say))
    print(sock.recv(int(count)).hex())
except OSError as error:
    print(type(error).__name__)
"""

NBD = ("", "18")
HTTP = (b"GET /disks HTTP/1.0\r\n\r\n".hex(), "12")
HEARD_NBD, HEARD_HTTP = b"NBDMAGICIHAVEOPT\0\3", b"HTTP/1.1 200"
REFUSED = {b"", "ConnectionResetError", "BrokenPipeError"}


def ask(
    path: Path, asked: tuple[str, str], uid: int, gid: int = STRANGER, *groups: int
) -> bytes | str:
    """What a process of that user and these groups hears; the name of the error where it cannot connect."""
    arguments = [str(path), str(uid), str(gid), ",".join(map(str, groups)), *asked]
    done = subprocess.run(
        [sys.executable, "-c", CALLER, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    said = done.stdout.strip()
    return said if said.endswith("Error") else bytes.fromhex(said)


@pytest.fixture
def served(make_gateway: Callable[..., GatewayProcess]) -> Callable[..., GatewayProcess]:
    """A daemon with these settings of [gateway], and a disk 'd' whose path anybody may walk."""

    def make(**settings: object) -> GatewayProcess:
        gateway = make_gateway({"gateway": settings})
        random_image(gateway.images / "d.raw", 1 << 20, 1, [])
        gateway.attach("d", "d.raw")
        gateway.allow_log("is refused")
        for path in (gateway.directory, gateway.run, gateway.run / "disks"):
            path.chmod(0o755)
        return gateway

    return make


@needs_root
def test_a_disks_socket_that_was_opened_to_all_lets_no_stranger_in(
    served: Callable[..., GatewayProcess],
) -> None:
    kvm = grp.getgrnam("daemon").gr_gid
    gateway = served(socket_group="daemon")
    path = gateway.sock("d")
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert ask(path, NBD, STRANGER) == "PermissionError"
    path.chmod(0o666)
    assert ask(path, NBD, STRANGER) in REFUSED
    assert ask(path, NBD, STRANGER, kvm) == HEARD_NBD
    assert ask(path, NBD, STRANGER, STRANGER, 7, kvm, 8) == HEARD_NBD
    assert ask(path, NBD, STRANGER, STRANGER, 7, *range(2000, 2300)) in REFUSED
    assert ask(path, NBD, 0) == HEARD_NBD
    assert f"of user {STRANGER} is refused" in gateway.log_text()


@needs_root
def test_a_mode_for_all_is_for_all(served: Callable[..., GatewayProcess]) -> None:
    assert ask(served(socket_mode="0666").sock("d"), NBD, STRANGER) == HEARD_NBD


@needs_root
def test_only_named_peers(served: Callable[..., GatewayProcess]) -> None:
    user, group = pwd.getpwnam("daemon").pw_uid, grp.getgrnam("mail").gr_gid
    gateway = served(socket_mode="0666", socket_peers=["daemon", "@mail"])
    path = gateway.sock("d")
    assert ask(path, NBD, STRANGER) in REFUSED
    assert ask(path, NBD, user) == HEARD_NBD
    assert ask(path, NBD, STRANGER, group) == HEARD_NBD
    gateway.restart()
    assert ask(path, NBD, STRANGER) in REFUSED


@needs_root
def test_the_control_socket(served: Callable[..., GatewayProcess]) -> None:
    gateway = served()
    assert stat.S_IMODE(gateway.control.stat().st_mode) == 0o600
    assert ask(gateway.control, HTTP, STRANGER) == "PermissionError"
    gateway.control.chmod(0o666)
    assert ask(gateway.control, HTTP, STRANGER) in REFUSED
    assert ask(gateway.control, HTTP, 0) == HEARD_HTTP
    group = grp.getgrnam("daemon").gr_gid
    gateway.configure({"gateway": {"control_group": "daemon"}})
    gateway.restart()
    assert stat.S_IMODE(gateway.control.stat().st_mode) == 0o660
    gateway.control.chmod(0o666)
    assert ask(gateway.control, HTTP, STRANGER) in REFUSED
    assert ask(gateway.control, HTTP, STRANGER, STRANGER, group) == HEARD_HTTP


def test_what_the_kernel_says_of_us() -> None:
    here, there = socket.socketpair()
    with here, there:
        peer = Peer.of(here)
        assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
        assert peer.groups >= {os.getegid(), *os.getgroups()}
        assert Admission().refused(here) is None
        assert Admission.to_disks(GatewaySection()).refused(here) is None
