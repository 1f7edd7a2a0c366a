# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A disk's socket as QEMU's user sees it: from the moment its name is there it may connect."""

import os
import pwd
import subprocess
import sys
from collections.abc import Callable

import pytest

from real.gateway_process import GatewayProcess
from real.processes import MIB, end

WATCHER = """
import errno, os, socket, sys
path = sys.argv[1]
os.set_blocking(0, False)
connected, refused, denied = 0, 0, 0
there = False
print("watching", flush=True)
while os.getppid() == {parent}:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
            first, there = not there, True
            connected += first
        except FileNotFoundError:
            there = False
        except ConnectionRefusedError:
            there = False
            refused += 1
        except PermissionError:
            denied += 1
    try:
        command = os.read(0, 1)
    except BlockingIOError:
        continue
    if not command:
        break
print(connected, refused, denied, flush=True)
"""
"""Connects as often as it can until its stdin is closed; prints how often the socket appeared, how often it was there
without a listener, and how often it was there and not for us."""


def qemu_user() -> pwd.struct_passwd:
    """The user that libvirt runs QEMU as, or one that has as little to do with us."""
    for name in ("libvirt-qemu", "qemu", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    pytest.skip("no user libvirt-qemu, qemu or nobody here")


def test_the_socket_is_there_only_when_qemu_may_use_it(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    user = qemu_user()
    gateway = make_gateway(
        {"gateway": {"socket_owner": user.pw_name, "socket_group": "root", "socket_mode": "0600"}}
    )
    gateway.directory.chmod(0o711)
    (gateway.images / "a.raw").write_bytes(bytes(MIB))
    sock = gateway.attach("a", "a.raw")
    status = sock.stat()
    assert (status.st_uid, status.st_gid, oct(status.st_mode & 0o777)) == (user.pw_uid, 0, "0o600")
    gateway.cli("detach", "a")
    with subprocess.Popen(
        [sys.executable, "-I", "-c", WATCHER.format(parent=os.getpid()), str(sock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
    ) as watcher:
        try:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == b"watching\n"
            for _ in range(6):
                gateway.attach("a", "a.raw")
                gateway.cli("detach", "a", "--force")
            gateway.attach("a", "a.raw")
            for kill in (False, True):  # QEMU reconnects as soon as it can
                gateway.restart(kill=kill)
            told, _ = watcher.communicate()
        finally:
            end(watcher)
    connected, _refused, denied = map(int, told.split())
    assert denied == 0
    assert connected >= 6
