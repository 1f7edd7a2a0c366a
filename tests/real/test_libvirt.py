# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Forebay under a real libvirt and a real guest: boot, restarts, hot-plug, block jobs, save and restore, the hook."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from real import libvirt_guest
from real.gateway_process import GatewayProcess
from real.libvirt_host import Console, Libvirt
from real.processes import MIB

pytestmark = pytest.mark.slow

SETTINGS = {
    "gateway": {"socket_group": "kvm", "socket_mode": "0660"},
    "stores.images": {"mode": "write-back", "max_lag": "1s"},
}


@pytest.fixture(scope="module")
def libvirt() -> Iterator[Libvirt]:
    host = Libvirt()
    try:
        host.start()
        yield host
    finally:
        host.remove()


@pytest.fixture(scope="module")
def guest_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; tests copy it."""
    directory = tmp_path_factory.mktemp("guest")
    libvirt_guest.make_image(directory / "guest.raw", directory)
    return directory / "guest.raw"


@pytest.fixture
def gateway(
    make_gateway: Callable[..., GatewayProcess], libvirt: Libvirt, guest_image: Path
) -> GatewayProcess:
    """A daemon whose sockets QEMU's user may use, a bootable image in its store, and the hook pointing at it."""
    gateway = make_gateway(SETTINGS)
    gateway.directory.chmod(0o711)
    shutil.copy(guest_image, gateway.images / "guest.raw")
    libvirt.hooked(gateway)
    return gateway


def disk_xml(gateway: GatewayProcess, name: str, target: str = "vda") -> str:
    return gateway.cli("xml", name, "--target", target).stdout


def in_image(image: Path, path: str) -> bytes:
    """A file in the root file system of a guest's image. The guest has unmounted it, or made it read-only."""
    place = f"{image}?offset={libvirt_guest.ROOT_START * libvirt_guest.SECTOR}"
    return subprocess.run(
        ["/usr/sbin/debugfs", "-R", f"cat {path}", place], check=True, capture_output=True
    ).stdout


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def write_and_verify(console: Console, name: str, mebibytes: int) -> str:
    """Have the guest write a file, forget it, and read it back from its disk; its MD5."""
    console.run(f"dd if=/dev/urandom of={name} bs=1M count={mebibytes} conv=fsync 2>/dev/null")
    written = console.run(f"md5sum {name}").split()[0]
    console.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    assert console.run(f"md5sum {name}").split()[0] == written
    return written


def metadata(*disks: str) -> str:
    """The metadata of a domain with these disks, each the attributes of one."""
    inner = "".join(f"<f:disk {attributes}/>" for attributes in disks)
    return f"<f:disks xmlns:f='urn:forebay:libvirt:1'>{inner}</f:disks>"


def expected_disk(gateway: GatewayProcess, name: str, target: str = "vda") -> str:
    """The element of a disk that is not attached yet, as a person would write it once and for all."""
    return (
        "<disk type='network' device='disk'><driver name='qemu' type='raw' cache='none' discard='unmap'/>"
        f"<source protocol='nbd' name='{name}'><host transport='unix' socket='{gateway.sock(name)}'/>"
        f"<reconnect delay='30'/></source><target dev='{target}' bus='virtio'/></disk>"
    )


def disks(gateway: GatewayProcess) -> list[str]:
    return [line.split()[0] for line in gateway.cli("status").stdout.splitlines()[1:]]


RESTARTS = int(os.environ.get("FOREBAY_LIBVIRT_RESTARTS", "1"))
"""How often the daemon is restarted, and how often it is killed, while the guest works."""

LONGEST_PAUSE = 20.0
"""Seconds. Beyond 30 the guest would have seen an error."""

WRITER = (
    "touch /tmp/go; (i=0; while [ -e /tmp/go ]; do f=/data/w$((i % 8)); read t0 _ </proc/uptime; "
    "dd if=/dev/urandom of=$f bs=64k count=8 conv=fsync 2>/dev/null || echo write $i >>/tmp/bad; "
    "want=$(md5sum <$f); echo 1 >/proc/sys/vm/drop_caches; "
    '[ "$want" = "$(md5sum <$f)" ] || echo read $i >>/tmp/bad; read t1 _ </proc/uptime; '
    "echo $t0 $t1 >>/tmp/times; i=$((i + 1)); echo $i >/tmp/count; done; touch /tmp/ended) & true"
)
"""In the background: write, flush, forget, read back, compare, until /tmp/go is removed."""


def rounds(console: Console) -> int:
    return int(console.run("cat /tmp/count 2>/dev/null || echo 0"))


def round_times(console: Console) -> list[float]:
    """Seconds of each round, those during which the daemon was away among them."""
    lines = console.run("cat /tmp/times").splitlines()
    return [float(ended) - float(began) for began, ended in map(str.split, lines)]


def wait_rounds(console: Console, more: int, seconds: float = 60.0) -> None:
    """Return when the writer has done this many more rounds."""
    target = rounds(console) + more
    console.run(
        f"until [ $(cat /tmp/count 2>/dev/null || echo 0) -ge {target} ]; do usleep 50000; done",
        seconds=seconds,
    )


def test_a_domain_boots_from_its_only_disk_while_the_daemon_comes_and_goes(
    libvirt: Libvirt, gateway: GatewayProcess
) -> None:
    gateway.attach("vm1", "guest.raw", mode="write-back")
    libvirt.define("vm1", disk_xml(gateway, "vm1"))
    with libvirt.domain("vm1"):
        console = libvirt.start_domain("vm1")
        console.wait_up()
        assert console.run("cat /proc/mounts | grep -c ^/dev/vda2") == "1"
        assert "vm1" in libvirt.virsh("domblklist", "vm1").stdout
        console.run(WRITER)
        wait_rounds(console, 2)
        for kill in (False, True) * RESTARTS:
            gateway.restart(kill=kill)
            wait_rounds(console, 2)
        console.run("rm /tmp/go; until [ -e /tmp/ended ]; do usleep 50000; done")
        longest = max(round_times(console))
        print(f"{2 * RESTARTS} restarts, {rounds(console)} rounds, longest {longest:.2f} s")
        assert longest < LONGEST_PAUSE
        assert console.run("cat /tmp/bad 2>/dev/null; true") == ""
        assert console.run("dmesg | grep -ciE 'i/o error|remount' ; true") == "0"
        digest = write_and_verify(console, "/data/last", 4)
        console.run("mount -o remount,ro /")
        gateway.cli("flush", "vm1")
        # the image on the store has it while the domain runs on
        assert md5(in_image(gateway.images / "guest.raw", "/data/last")) == digest
        console.close()
    gateway.cli("detach", "vm1")


def test_a_domain_whose_disk_cannot_be_attached_does_not_start(
    libvirt: Libvirt, gateway: GatewayProcess
) -> None:
    two = metadata("name='a' image='images:guest.raw'", "name='b' image='images:none.raw'")
    libvirt.define("vm1", expected_disk(gateway, "a"), metadata=two)
    with libvirt.domain("vm1"):
        failed = libvirt.virsh("start", "vm1", check=False)
        assert failed.returncode == 1
        said = re.search(
            r"forebay: domain 'vm1' cannot start: disk 'b': .*none\.raw.*", failed.stderr
        )
        assert said is not None, failed.stderr
        assert not libvirt.running("vm1")
        assert disks(gateway) == []  # what came before it is undone
        gateway.stop()
        failed = libvirt.virsh("start", "vm1", check=False)
        assert re.search(r"disk 'a': no daemon at .*: start it with", failed.stderr), failed.stderr
        # domains that have nothing of ours are not touched by any of this
        libvirt.define("other")
        with libvirt.domain("other"):
            libvirt.virsh("start", "other")
            assert libvirt.running("other")


def test_overlays_of_one_image_start_from_the_hook_and_leave_nothing(
    libvirt: Libvirt, gateway: GatewayProcess
) -> None:
    image = gateway.images / "guest.raw"
    before = md5(image.read_bytes())
    wanted = metadata("name='vm1' image='images:guest.raw' overlay='yes'")
    libvirt.define("vm1", expected_disk(gateway, "vm1"), metadata=wanted)
    with libvirt.domain("vm1"):
        console = libvirt.start_domain("vm1")
        console.wait_up()
        digest = write_and_verify(console, "/data/mine", 2)
        console.close()
        libvirt.virsh("managedsave", "vm1")
        assert disks(gateway) == ["vm1"]  # what it wrote is still needed
        console = libvirt.start_domain("vm1")
        console.run("echo 3 >/proc/sys/vm/drop_caches")
        assert console.run("md5sum /data/mine").split()[0] == digest
        console.close()
        libvirt.virsh("destroy", "vm1")
        assert disks(gateway) == []
    assert md5(image.read_bytes()) == before


def delta_over(gateway: GatewayProcess, libvirt: Libvirt, name: str, base: str) -> str:
    """A qcow2 file of the domain's own over an image of the store, by the store's socket; its element."""
    path = libvirt.vm / f"{name}.qcow2"
    backing = f"nbd+unix:///{base}?socket={gateway.run / 'stores' / 'images.sock'}"
    what = ["-F", base.rpartition(".")[2], "-b", backing, str(path)]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *what], check=True)
    path.chmod(0o666)
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>"
        "<target dev='vda' bus='virtio'/></disk>"
    )


def test_domains_on_qcow2_files_over_one_image_by_the_socket_of_its_store(
    libvirt: Libvirt, make_gateway: Callable[..., GatewayProcess], guest_image: Path
) -> None:
    """One over the bytes of a qcow2 file, one over a raw one, while the daemon comes and goes."""
    gateway = make_gateway(SETTINGS | {"stores.images": {"socket": True}})
    gateway.directory.chmod(0o711)
    bases = [gateway.images / "guest.raw", gateway.images / "guest.qcow2"]
    shutil.copy(guest_image, bases[0])
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", *map(str, bases)], check=True)
    before = [md5(base.read_bytes()) for base in bases]
    with contextlib.ExitStack() as stack:
        consoles = []
        for name, base in zip(("raw1", "qcow1"), bases, strict=True):
            element = delta_over(gateway, libvirt, name, base.name)
            libvirt.define(name, element, emulator=libvirt.wrapper)
            stack.enter_context(libvirt.domain(name))
            consoles.append(libvirt.start_domain(name))
        for name, console in zip(("raw1", "qcow1"), consoles, strict=True):
            console.wait_up()
            assert "images.sock" in libvirt.virsh("dumpxml", name).stdout
            console.run(WRITER)
            wait_rounds(console, 1)
        [store] = json.loads(gateway.cli("stores", "--json").stdout)
        served = {one["image"]: one for one in store["images"]}
        assert sorted(served) == ["images:guest.qcow2", "images:guest.raw"]
        for kill in (False, True):
            gateway.restart(kill=kill)
            for console in consoles:
                console.run("echo 3 >/proc/sys/vm/drop_caches; md5sum /bin/busybox")
                wait_rounds(console, 1)
        for console in consoles:
            console.run("rm /tmp/go; until [ -e /tmp/ended ]; do usleep 50000; done")
            assert console.run("cat /tmp/bad 2>/dev/null; true") == ""
            assert console.run("dmesg | grep -ciE 'i/o error|remount' ; true") == "0"
            console.close()
        assert gateway.cli("detach", "raw1", check=False).returncode == 1  # they are no disks
    assert [md5(base.read_bytes()) for base in bases] == before


def test_a_domain_that_the_hook_serves_from_start_to_end(
    libvirt: Libvirt, gateway: GatewayProcess
) -> None:
    data = gateway.images / "data.raw"
    with data.open("wb") as file:
        file.truncate(16 * MIB)
    gateway.attach("vm1", "guest.raw", mode="write-back")
    element = gateway.cli("xml", "vm1", "--metadata").stdout
    gateway.cli("detach", "vm1")
    libvirt.define("vm1", expected_disk(gateway, "vm1"))
    key = ["urn:forebay:libvirt:1", "--key", "forebay"]
    libvirt.virsh("metadata", "vm1", *key, "--config", "--set", element)
    assert disks(gateway) == []
    with libvirt.domain("vm1"):
        console = libvirt.start_domain("vm1")
        assert disks(gateway) == ["vm1"]
        console.wait_up()
        libvirt.restart()  # calls the hook with 'reconnect'
        assert libvirt.running("vm1")
        _hot_plug(libvirt, gateway, console, data)
        _snapshot_and_commit(libvirt, console)
        _copy_and_back(libvirt, gateway, console)
        _backup(libvirt, console)
        console = _save_and_restore(libvirt, gateway, console)
        digest = write_and_verify(console, "/data/end", 2)
        console.run("mount -o remount,ro /")
        console.close()
        libvirt.virsh("destroy", "vm1")
        assert disks(gateway) == []
        assert list((gateway.directory / "libvirt-run").iterdir()) == []
        image = gateway.images / "guest.raw"
        assert md5(in_image(image, "/data/end")) == digest
        for name in ("snapshot", "copied"):
            assert in_image(image, f"/data/{name}")


def _hot_plug(libvirt: Libvirt, gateway: GatewayProcess, console: Console, data: Path) -> None:
    gateway.attach("vm1-data", "data.raw", mode="write-through")
    element = libvirt.vm / "data.xml"
    element.write_text(disk_xml(gateway, "vm1-data", "vdb"))
    libvirt.virsh("attach-device", "vm1", element, "--live")
    console.run("until [ -b /dev/vdb ]; do usleep 20000; done")
    assert console.run("cat /sys/block/vdb/serial") == "vm1-data"
    console.run("dd if=/dev/urandom of=/tmp/r bs=1M count=16 2>/dev/null")
    console.run("dd if=/tmp/r of=/dev/vdb bs=1M conv=fsync 2>/dev/null")
    digest = console.run("md5sum /tmp/r; rm /tmp/r").split()[0]
    libvirt.virsh("detach-disk", "vm1", "vdb", "--live")
    console.run("while [ -b /dev/vdb ]; do usleep 20000; done")
    gateway.cli("detach", "vm1-data")
    assert md5(data.read_bytes()) == digest


def _snapshot_and_commit(libvirt: Libvirt, console: Console) -> None:
    overlay = libvirt.vm / "snapshot.qcow2"
    spec = f"vda,snapshot=external,file={overlay}"
    libvirt.virsh(
        "snapshot-create-as", "vm1", "s1", "--disk-only", "--no-metadata", "--diskspec", spec
    )
    assert str(overlay) in libvirt.virsh("domblklist", "vm1").stdout
    digest = write_and_verify(console, "/data/snapshot", 2)
    libvirt.virsh("blockcommit", "vm1", "vda", "--active", "--pivot", "--wait")
    assert str(overlay) not in libvirt.virsh("domblklist", "vm1").stdout
    console.run("echo 3 >/proc/sys/vm/drop_caches")
    assert console.run("md5sum /data/snapshot").split()[0] == digest


def _copy_and_back(libvirt: Libvirt, gateway: GatewayProcess, console: Console) -> None:
    copy = libvirt.vm / "copy.raw"
    job = ["--wait", "--pivot", "--transient-job"]
    libvirt.virsh("blockcopy", "vm1", "vda", "--dest", copy, "--format", "raw", *job)
    assert str(copy) in libvirt.virsh("domblklist", "vm1").stdout
    digest = write_and_verify(console, "/data/copied", 2)
    back = libvirt.vm / "back.xml"
    back.write_text(expected_disk(gateway, "vm1"))
    libvirt.virsh("blockcopy", "vm1", "vda", "--xml", back, "--reuse-external", *job)
    assert str(copy) not in libvirt.virsh("domblklist", "vm1").stdout
    console.run("echo 3 >/proc/sys/vm/drop_caches")
    assert console.run("md5sum /data/copied").split()[0] == digest
    copy.unlink()


def _backup(libvirt: Libvirt, console: Console) -> None:
    console.run("sync")
    target = libvirt.vm / "backup.raw"
    job = libvirt.vm / "backup.xml"
    job.write_text(
        "<domainbackup mode='push'><disks><disk name='vda' backup='yes' type='file'>"
        f"<target file='{target}'/><driver type='raw'/></disk></disks></domainbackup>"
    )
    libvirt.virsh("backup-begin", "vm1", job)
    console.run("sleep 0.5")
    while "None" not in libvirt.virsh("domjobinfo", "vm1").stdout:
        console.run("usleep 100000")
    assert in_image(target, "/sbin/init") == libvirt_guest.ROOT_INIT.encode()
    target.unlink()


def _save_and_restore(libvirt: Libvirt, gateway: GatewayProcess, console: Console) -> Console:
    console.run("echo here >/tmp/memory")
    console.close()
    saved = libvirt.vm / "saved"
    libvirt.virsh("save", "vm1", saved)
    assert disks(gateway) == []
    libvirt.virsh("restore", saved)
    saved.unlink()
    assert disks(gateway) == ["vm1"]
    console = Console(libvirt.vm / "vm1.console")
    assert console.run("cat /tmp/memory") == "here"
    return console
