# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A domain migrates between two libvirts, each with the hook and a daemon of its own: `virsh migrate` is all."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from real import libvirt_guest
from real.gateway_process import GatewayProcess
from real.libvirt_host import Console, Libvirt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

META = (
    "<f:disks xmlns:f='urn:forebay:libvirt:1'><f:disk name='g' image='images:guest.raw'/></f:disks>"
)


@pytest.fixture
def hosts() -> Iterator[tuple[Libvirt, Libvirt]]:
    one, two = Libvirt("ham1"), Libvirt("ham2")
    with contextlib.ExitStack() as ends:
        for host in (one, two):
            ends.callback(host.remove)
            host.start()
        yield one, two


def gateway_of(
    host: Libvirt, make_gateway: Callable[..., GatewayProcess], images: Path | None
) -> GatewayProcess:
    store = {"mode": "write-back"} | ({"path": str(images)} if images is not None else {})
    access = {"socket_group": "kvm", "socket_mode": "0660"}
    gateway = make_gateway({"gateway": access, "stores.images": store})
    gateway.directory.chmod(0o711)
    host.hooked(gateway)
    return gateway


def disk_of(gateway: GatewayProcess) -> str:
    return (
        "<disk type='network' device='disk'><driver name='qemu' type='raw' cache='none'/>"
        f"<source protocol='nbd' name='g'><host transport='unix' socket='{gateway.sock('g')}'/>"
        "<reconnect delay='30'/></source><target dev='vda' bus='virtio'/></disk>"
    )


def test_a_domain_migrates_with_its_disk_by_virsh_migrate_alone(
    hosts: tuple[Libvirt, Libvirt],
    make_gateway: Callable[..., GatewayProcess],
    tmp_path: Path,
) -> None:
    one, two = hosts
    here = gateway_of(one, make_gateway, None)
    there = gateway_of(two, make_gateway, here.images)
    libvirt_guest.make_image(here.images / "guest.raw", tmp_path)
    (here.images / "guest.raw").chmod(0o666)
    one.define("vm1", disk_of(here), metadata=META)
    with two.domain("vm1"), one.domain("vm1"):
        console = one.start_domain("vm1")
        console.wait_up(120.0)
        console.run("mount -o remount,rw / ; mkdir -p /data; echo before >/data/a; sync")
        console.close()
        xml = one.virsh("dumpxml", "vm1", "--migratable").stdout
        xml = xml.replace(str(here.sock("g")), str(there.sock("g"))).replace(
            str(one.vm), str(two.vm)
        )
        (two.vm / "there.xml").write_text(xml)
        way = two.vm / "migration"
        one.virsh(
            "migrate", "--live", "vm1", f"qemu+unix:///system?socket={two.socket}",
            "--migrateuri", f"unix://{way}", "--xml", two.vm / "there.xml",
        )  # fmt: skip
        assert two.running("vm1")
        assert not one.running("vm1")
        console = Console(two.vm / "vm1.console")
        assert console.run("cat /data/a; echo after >/data/b; sync; cat /data/b") == "before\nafter"
        console.close()
        assert there.status("g")["state"] == "ready"
        assert here.cli("status", "--json").stdout.strip() == "[]", "the hook has detached it"
