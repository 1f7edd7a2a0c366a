# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A disk is its VM's: other processes of the same user, another VM's QEMU above all, are kept out of it."""

import grp
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from real.gateway_process import GatewayProcess
from real.processes import random_image
from real.service_manager import ManagedGateway
from real.tenant_process import TenantProcess

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")

QEMU = 65534
"""The user that stands for libvirt-qemu: nobody."""

LIBNBD = """
import os, nbd
client = nbd.NBD()
os.setuid({uid})
client.connect_uri({uri!r})
print("connected", flush=True)
input()
print(len(client.pread(9, 0)))
"""

Make = Callable[..., TenantProcess]


@pytest.fixture
def process() -> Iterator[Make]:
    """Makes processes, of QEMU's user unless another is said, and ends them."""
    made: list[TenantProcess] = []

    def make(uid: int = QEMU, groups: tuple[int, ...] = ()) -> TenantProcess:
        made.append(TenantProcess(uid, QEMU, groups))
        return made[-1]

    yield make
    for one in made:
        one.end()


def prepared(gateway: GatewayProcess, *options: str) -> None:
    """A disk 'd' whose path everybody may walk."""
    random_image(gateway.images / "d.raw", 1 << 20, 1, [])
    gateway.attach("d", "d.raw", *options)
    for path in (gateway.directory, gateway.run, gateway.run / "disks"):
        path.chmod(0o755)
    gateway.allow_log("is refused")


@pytest.fixture
def gateway(make_gateway: Callable[..., GatewayProcess]) -> GatewayProcess:
    found = make_gateway({"gateway": {"socket_mode": "0666"}})
    prepared(found)
    return found


def holder(gateway: GatewayProcess) -> int | None:
    return gateway.status("d")["peer_process"]  # type: ignore[no-any-return]


def test_a_disk_is_the_first_process_until_it_ends(gateway: GatewayProcess, process: Make) -> None:
    disk = gateway.sock("d")
    mine, other = process(), process()
    assert mine.gets_in(disk)
    assert not other.gets_in(disk)
    assert mine.gets_in(disk), "further connections of the same process"
    mine.close()
    assert not other.gets_in(disk), "it may come back"
    status = gateway.status("d")
    assert (status["peer"], status["peer_process"], status["refused_clients"]) == (
        "first",
        mine.pid,
        2,
    )
    assert (
        f"d: process {other.pid} of user {QEMU} is refused: process {mine.pid}"
        in gateway.log_text()
    )
    mine.end()
    assert holder(gateway) is None
    assert other.gets_in(disk)
    assert holder(gateway) == other.pid
    assert not process().gets_in(disk)


def test_a_child_that_has_the_connection_has_the_disk(
    gateway: GatewayProcess, process: Make
) -> None:
    disk = gateway.sock("d")
    mine, other = process(), process()
    assert mine.gets_in(disk)
    child = mine.fork()
    mine.end()
    try:
        assert not other.gets_in(disk)
    finally:
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not other.gets_in(disk):
        assert time.monotonic() < deadline


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "stopped"])
def test_a_disk_stays_its_process_while_the_daemon_is_away(
    gateway: GatewayProcess, process: Make, kill: bool
) -> None:
    disk = gateway.sock("d")
    mine, other = process(), process()
    assert mine.gets_in(disk)
    gateway.restart(kill=kill)
    assert not other.gets_in(disk)
    assert mine.gets_in(disk)
    mine.end()
    gateway.restart(kill=kill)
    assert other.gets_in(disk)


def test_a_planned_restart_keeps_it_too(process: Make) -> None:
    gateway = ManagedGateway({"gateway": {"socket_mode": "0666"}})
    try:
        gateway.start()
        prepared(gateway)
        mine, other = process(), process()
        program = LIBNBD.format(uid=QEMU, uri=gateway.uri("d"))
        client = subprocess.Popen(
            ["/usr/bin/python3", "-c", program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert client.stdout is not None
        assert client.stdout.readline()
        (gateway.run / "peers" / "d").unlink()  # the connection that is handed on says it as well
        gateway.restart()
        assert not other.gets_in(gateway.sock("d"))
        assert holder(gateway) == client.pid
        assert client.communicate("\n", timeout=60)[0]
        assert mine.gets_in(gateway.sock("d"))
    finally:
        gateway.remove()


def test_doors_come_beside_it_and_do_not_take_it(
    make_gateway: Callable[..., GatewayProcess], process: Make
) -> None:
    group = grp.getgrnam("mail").gr_gid
    gateway = make_gateway({"gateway": {"socket_mode": "0666", "door_group": "mail"}})
    prepared(gateway)
    disk = gateway.sock("d")
    door, root, mine, other = process(QEMU, (group,)), process(0), process(), process()
    assert door.gets_in(disk)
    assert root.gets_in(disk)
    assert holder(gateway) is None
    assert mine.gets_in(disk)
    assert door.gets_in(disk)
    assert root.gets_in(disk)
    assert not other.gets_in(disk)
    assert holder(gateway) == mine.pid


def test_idle_connections_keep_nobody_out(gateway: GatewayProcess, process: Make) -> None:
    disk = gateway.sock("d")
    mine, other = process(), process()
    assert mine.gets_in(disk)
    other.connect_idly(disk, 120)
    mine.close()
    assert mine.gets_in(disk)
    assert gateway.status("d")["refused_clients"] == 120
    assert gateway.log_text().count("is refused") < 5


def test_any_process_where_that_is_said(gateway: GatewayProcess, process: Make) -> None:
    disk = gateway.sock("d")
    mine, other = process(), process()
    assert mine.gets_in(disk)
    assert gateway.cli("peer", "d", "any").stdout == f"d: any, process {mine.pid} has it\n"
    assert other.gets_in(disk)
    gateway.restart(kill=True)
    assert gateway.status("d")["peer"] == "any"
    assert other.gets_in(disk)
    gateway.cli("peer", "d", "first", "--evict")
    assert other.gets_in(disk)
    assert not mine.gets_in(disk)


def test_a_disk_of_a_user_is_not_for_another(gateway: GatewayProcess, process: Make) -> None:
    disk = gateway.sock("d")
    gateway.cli("peer", "d", "first", "--user", "nobody")
    assert gateway.status("d")["peer_user"] == QEMU
    assert not process(7).gets_in(disk)
    assert process().gets_in(disk)


def test_with_label_a_process_without_one_is_refused(
    gateway: GatewayProcess, process: Make
) -> None:
    disk = gateway.sock("d")
    gateway.cli("peer", "d", "label")
    assert not process().gets_in(disk)
    gateway.cli("peer", "d", "label", "--label", "system_u:system_r:svirt_t:s0:c1,c2")
    assert not process().gets_in(disk)
    assert process(0).gets_in(disk)
    gateway.restart()
    assert gateway.status("d")["peer_label"] == "system_u:system_r:svirt_t:s0:c1,c2"
    assert not process().gets_in(disk)


def test_what_is_attached_anew_is_nobodys(gateway: GatewayProcess, process: Make) -> None:
    mine, other = process(), process()
    assert mine.gets_in(gateway.sock("d"))
    gateway.cli("detach", "d", "--force")
    prepared(gateway, "--peer", "first")
    assert other.gets_in(gateway.sock("d"))
    assert not mine.gets_in(gateway.sock("d"))


def test_a_wrong_rule_is_refused(gateway: GatewayProcess) -> None:
    for words, says in (
        (["--user", "nobody-at-all"], "no user 'nobody-at-all'"),
        (["--user", "99999999999"], "not the number of a user"),
        (["--label", "a\nb"], "not the label of a process"),
        (["--label", "a" * 513], "not the label of a process"),
    ):
        done = gateway.cli("peer", "d", "label", *words, check=False)
        assert done.returncode == 1
        assert says in done.stderr
    assert gateway.cli("peer", "d", "all", check=False).returncode == 2
    assert gateway.status("d")["peer"] == "first"
