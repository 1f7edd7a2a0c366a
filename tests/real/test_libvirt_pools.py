# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Storage pools of a real libvirt on the FUSE mount, deltas on a socket, virt-install: docs/libvirt-pools.md."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from real.fuse_mount import FuseMount, need_fuse
from real.gateway_process import GatewayProcess
from real.libvirt_host import EMULATOR, Libvirt
from real.processes import MIB, random_image

pytestmark = pytest.mark.slow

SETTINGS: dict[str, dict[str, Any]] = {
    "gateway": {"socket_group": "kvm", "socket_mode": "0660"},
    "stores.images": {"socket": True, "mode": "write-back"},
    "fuse": {"owner": "root", "group": "kvm"},
}

TOP = "libvirt-1-format"
"""The first disk of a domain, as QEMU knows it."""

LISTED = [
    "SHA256SUMS", "cloud.qcow2", "damaged.qcow2", "disk.vmdk", "empty.raw", "golden.raw", "notes.txt", "odd é.raw",
    "on-golden.qcow2", "orphan.qcow2", "sparse.raw", "sub",
]  # fmt: skip


@dataclass
class Host:
    """libvirt with the pool `golden` on the mount's images, and the pool `vms` on a directory of its own."""

    libvirt: Libvirt
    gateway: GatewayProcess
    golden: Path
    vms: Path

    def volumes(self, pool: str) -> list[str]:
        lines = self.libvirt.virsh("vol-list", pool).stdout.splitlines()[2:]
        return sorted(line.rsplit("/", 1)[-1] for line in lines if line.strip())

    def number(self, pool: str, volume: str, key: str) -> int:
        """`capacity` or `allocation` of a volume, in bytes."""
        text = self.libvirt.virsh("vol-dumpxml", volume, "--pool", pool).stdout
        return int(ET.fromstring(text).findtext(key) or "")

    def delta(self, name: str, backing: str) -> None:
        """Make `name` in `vms` over a raw image of `golden`, as virt-manager does."""
        self.libvirt.virsh(
            "vol-create-as", "vms", name, "1G", "--format", "qcow2",
            "--backing-vol", self.golden / backing, "--backing-vol-format", "raw",
        )  # fmt: skip

    def delta_on_socket(self, name: str, backing: str) -> None:
        """The same, over an image that the socket of its store serves."""
        uri = f"nbd+unix:///{backing}?socket={self.gateway.run}/stores/images.sock"
        words = ["-f", "qcow2", "-F", "raw", "-b", uri, str(self.vms / name), "1G"]
        subprocess.run(["qemu-img", "create", "-q", *words], check=True)
        self.libvirt.virsh("pool-refresh", "vms")

    def define(self, name: str, volume: str, emulator: Path = EMULATOR) -> None:
        """A domain whose disk is a volume of `vms`."""
        self.libvirt.define(
            name,
            "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
            f"<source pool='vms' volume='{volume}'/><target dev='vda' bus='virtio'/></disk>",
            emulator=emulator,
        )

    def export(self, domain: str) -> str:
        """Have QEMU serve the domain's disk; the URI."""
        path = self.libvirt.vm / f"{domain}.nbd"
        self._ask(domain, "nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        export = {"type": "nbd", "id": "seen", "node-name": TOP, "name": "disk"}
        self._ask(domain, "block-export-add", **export)
        return f"nbd+unix:///disk?socket={path}"

    def _ask(self, domain: str, command: str, **arguments: object) -> None:
        """One command to QEMU's monitor."""
        text = json.dumps({"execute": command, "arguments": arguments})
        answer = self.libvirt.virsh("qemu-monitor-command", domain, text).stdout
        assert "return" in json.loads(answer), answer


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    need_fuse()
    if os.geteuid() != 0:
        pytest.skip("needs root, for libvirtd")
    gateway = GatewayProcess(SETTINGS)
    gateway.directory.chmod(0o711)
    fill(gateway.images)
    gateway.start()
    mount = FuseMount(gateway, "--allow-other")
    try:
        libvirt = Libvirt()  # it sees the mounts that were there before it
        try:
            libvirt.start()
            vms = libvirt.directory / "vms"
            vms.mkdir(mode=0o755)
            golden = mount.path / "images" / "images"
            for name, place in (("golden", golden), ("vms", vms)):
                libvirt.virsh("pool-define-as", name, "dir", "--target", place)
                libvirt.virsh("pool-start", name)
            yield Host(libvirt, gateway, golden, vms)
        finally:
            libvirt.remove()
    finally:
        mount.remove()
        loud = gateway.unexpected_log()
        gateway.remove()
    assert not loud, loud


def fill(store: Path) -> None:
    """What people keep in stores: images in formats, overlays, files that are no images, and names of all kinds."""
    random_image(store / "golden.raw", 8 * MIB, 1)
    random_image(store / "odd é.raw", MIB, 2)

    def create(name: str, *words: str) -> None:
        subprocess.run(["qemu-img", "create", "-q", *words, name, "64M"], check=True, cwd=store)

    create("cloud.qcow2", "-f", "qcow2")
    create("disk.vmdk", "-f", "vmdk")
    create("on-golden.qcow2", "-f", "qcow2", "-F", "raw", "-b", "golden.raw")
    create("orphan.qcow2", "-f", "qcow2", "-u", "-F", "raw", "-b", "/nowhere/gone.raw")
    (store / "damaged.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(range(256)) * 4)
    with (store / "sparse.raw").open("wb") as file:
        file.truncate(1 << 30)
    (store / "empty.raw").touch()
    (store / "notes.txt").write_text("notes")
    (store / "SHA256SUMS").write_text("0" * 100)
    (store / "sub").mkdir()
    shutil.copy(store / "golden.raw", store / "sub" / "deep.raw")
    # what is not there in the mount: no images, or of names that no image can have
    for name in (b"two\nlines.raw", b"tab\t.raw", b"no-text-\xff.raw", b"a.raw?format=qcow2"):
        with open(os.fsencode(store) + b"/" + name, "wb") as file:
            file.write(bytes(4096))
    (store / "link.raw").symlink_to("golden.raw")
    os.mkfifo(store / "fifo")


def test_a_pool_starts_whatever_lies_in_its_store(host: Host) -> None:
    """One file that cannot be opened would keep the whole pool from starting."""
    assert host.volumes("golden") == LISTED
    host.gateway.allow_log("later.raw was deleted or replaced while in use")
    (host.gateway.images / "later.raw").write_bytes(bytes(MIB))
    host.libvirt.virsh("pool-refresh", "golden")
    (host.gateway.images / "later.raw").unlink()
    assert host.volumes("golden") == sorted([*LISTED, "later.raw"])
    host.libvirt.virsh("pool-destroy", "golden")
    host.libvirt.virsh("pool-start", "golden")
    assert host.volumes("golden") == LISTED


def test_volumes_have_the_sizes_of_the_disks_in_them(host: Host) -> None:
    assert host.number("golden", "cloud.qcow2", "capacity") == 64 * MIB
    assert host.number("golden", "golden.raw", "capacity") == 8 * MIB
    assert host.number("golden", "golden.raw", "allocation") == 8 * MIB
    assert host.number("golden", "sparse.raw", "capacity") == 1 << 30
    assert host.number("golden", "sparse.raw", "allocation") < MIB


@pytest.mark.parametrize(
    "words",
    [
        ("vol-create-as", "golden", "new.raw", "1M", "--format", "raw"),
        ("vol-delete", "golden.raw", "--pool", "golden"),
        ("vol-resize", "golden.raw", "20M", "--pool", "golden"),
        ("vol-wipe", "golden.raw", "--pool", "golden"),
        ("vol-upload", "golden.raw", "/etc/hostname", "--pool", "golden"),
    ],
)
def test_nothing_is_made_or_changed_in_a_store(host: Host, words: tuple[str, ...]) -> None:
    done = host.libvirt.virsh(*words, check=False)
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr
    assert host.volumes("golden") == LISTED


def test_an_image_is_copied_out_of_its_pool(host: Host, tmp_path: Path) -> None:
    host.libvirt.virsh("vol-download", "golden.raw", tmp_path / "copy", "--pool", "golden")
    assert (tmp_path / "copy").read_bytes() == (host.gateway.images / "golden.raw").read_bytes()


def test_an_nbd_uri_is_no_backing_volume(host: Host) -> None:
    """virsh looks for a volume; qemu-img makes these deltas."""
    uri = f"nbd+unix:///golden.raw?socket={host.gateway.run}/stores/images.sock"
    done = host.libvirt.virsh(
        "vol-create-as", "vms", "x.qcow2", "1G", "--format", "qcow2", "--backing-vol", uri,
        "--backing-vol-format", "raw", check=False,
    )  # fmt: skip
    assert "no storage vol with matching path" in done.stderr


def test_domains_run_from_deltas_on_the_mount_and_on_the_socket(
    host: Host, connect: Callable[..., Any]
) -> None:
    """Base images are attached by themselves, and read through the cache."""
    before = (host.gateway.images / "golden.raw").read_bytes()
    host.delta("by-path.qcow2", "golden.raw")
    host.delta_on_socket("by-socket.qcow2", "golden.raw")
    assert host.number("vms", "by-socket.qcow2", "capacity") == 1 << 30
    names = ("by-path", "by-socket")
    for name in names:
        host.define(name, f"{name}.qcow2")
    with host.libvirt.domain(names[0]), host.libvirt.domain(names[1]):
        for name in names:
            host.libvirt.virsh("start", name, "--paused")
            assert connect(host.export(name)).pread(MIB, 4 * MIB) == before[4 * MIB : 5 * MIB]
        assert "nbd" in host.libvirt.virsh("dumpxml", "by-socket").stdout
        served = host.gateway.cli("stores", "images").stdout
        assert "images:golden.raw" in served


def test_virt_install_takes_a_volume_a_new_delta_and_a_disks_socket(
    host: Host, connect: Callable[..., Any]
) -> None:
    if shutil.which("virt-install") is None:
        pytest.skip("needs virt-install: make setup-libvirt")
    host.delta("ready.qcow2", "golden.raw")
    host.gateway.cli("attach", "vm1", "images:odd é.raw")
    socket = host.gateway.sock("vm1")
    ways = {
        "ready": "vol=vms/ready.qcow2,target.bus=virtio",
        "fresh": f"pool=vms,size=1,backing_store={host.golden}/golden.raw,backing_format=raw,target.bus=virtio",
        "socket": (
            f"source.protocol=nbd,source.name=vm1,source.host0.transport=unix,source.host0.socket={socket},"
            "driver.type=raw,driver.cache=none,driver.discard=unmap,target.bus=virtio,"
            "xpath1.set=./source/reconnect/@delay=30"
        ),
    }
    uri = f"qemu+unix:///system?socket={host.libvirt.socket}"
    for name, disk in ways.items():
        with host.libvirt.domain(name):
            done = subprocess.run(
                ["virt-install", "--connect", uri, "--name", name, "--memory", "64", "--import", "--disk", disk,
                 "--virt-type", "qemu", "--osinfo", "detect=off,require=off", "--network", "none", "--graphics", "none",
                 "--noautoconsole"],
                capture_output=True, text=True, check=False, timeout=100,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            image = "odd é.raw" if name == "socket" else "golden.raw"
            content = (host.gateway.images / image).read_bytes()
            assert connect(host.export(name)).pread(MIB // 2, MIB // 2) == content[MIB // 2 : MIB]
    host.gateway.cli("detach", "vm1")


def test_a_daemon_that_is_killed_takes_no_domain_along(
    host: Host, connect: Callable[..., Any]
) -> None:
    """A pool that is refreshed meanwhile stops, and starts again with the daemon."""
    host.delta("lives.qcow2", "golden.raw")
    host.delta_on_socket("lives2.qcow2", "golden.raw")
    host.define("lives", "lives.qcow2")
    host.define("lives2", "lives2.qcow2", emulator=host.libvirt.wrapper)
    with host.libvirt.domain("lives"), host.libvirt.domain("lives2"):
        guests = []
        for name in ("lives", "lives2"):
            host.libvirt.virsh("start", name, "--paused")
            guests.append(connect(host.export(name)))
        content = (host.gateway.images / "golden.raw").read_bytes()
        assert all(guest.pread(MIB, 0) == content[:MIB] for guest in guests)
        host.gateway.kill()
        done = host.libvirt.virsh("pool-refresh", "golden", check=False)
        assert "Input/output error" in done.stderr
        host.gateway.start()
        host.libvirt.virsh("pool-start", "golden")
        assert host.volumes("golden") == LISTED
        assert all(guest.pread(MIB, 6 * MIB) == content[6 * MIB : 7 * MIB] for guest in guests)
