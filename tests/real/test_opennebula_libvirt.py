# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""VMs that OpenNebula's drivers have made, under a real libvirt: a clone and a persistent disk."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from real import libvirt_guest
from real.disk_fixture import run
from real.gateway_process import GatewayProcess
from real.libvirt_host import Console, Libvirt
from real.one_bed import HASH, RAW, One, one_of
from real.processes import MIB

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VIRSH = '#!/bin/sh\nshift 2\nexec {program} --connect "qemu+unix:///system?socket={socket}" "$@"\n'


@pytest.fixture(scope="module")
def libvirt() -> Iterator[Libvirt]:
    host = Libvirt()
    try:
        host.start()
        yield host
    finally:
        host.remove()


@pytest.fixture
def one(
    make_gateway: Callable[..., GatewayProcess], libvirt: Libvirt, tmp_path: Path
) -> Iterator[One]:
    """A host with that libvirt. Datastore 100 has a guest, raw and as a qcow2 image."""
    one = one_of(make_gateway, tmp_path, group="kvm")
    one.gateway.directory.chmod(0o711)
    store = one.datastores / "100"
    (tmp_path / "guest").mkdir()
    libvirt_guest.make_image(store / RAW, tmp_path / "guest")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", store / RAW, store / HASH)
    libvirt.hooked(one.gateway)
    patient = libvirt.wrapper.read_text().replace(":30,", ":300,")  # a busy machine starts slowly
    assert ":300," in patient
    libvirt.wrapper.write_text(patient)
    program = shutil.which("virsh")
    one.script(one.bin / "virsh", VIRSH.format(program=program, socket=libvirt.socket))
    yield one
    libvirt.virsh("destroy", "one-7", check=False)


def start(one: One, libvirt: Libvirt, disk: dict[str, str], *, driver: str) -> Console:
    """Deploy VM 7 with that disk; its console when it has booted."""
    console = libvirt.vm / f"{os.urandom(4).hex()}.console"
    serial = f"<serial type='unix'><source mode='bind' path='{console}'/></serial>"
    domain = one.domain(one.disk_element(driver=driver) + serial, emulator=libvirt.wrapper)
    if driver.startswith("type"):
        domain = domain.replace(b"type='raw' type", b"type")
    done = one.deploy(domain, one.vm(disk))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = Console(console)
    found.wait_up()
    return found


def test_a_vm_on_a_clone_goes_on_when_the_daemon_is_killed(one: One, libvirt: Libvirt) -> None:
    assert one.clone(system="").returncode == 1, "no VM yet"
    disk = one.disk()
    one.vm(disk)
    assert one.clone().returncode == 0
    console = start(one, libvirt, disk, driver="type='qcow2' cache='none'")
    console.run("dd if=/dev/urandom of=/data/a bs=1M count=2 conv=fsync 2>/dev/null")
    written = console.run("md5sum /data/a").split()[0]
    for _ in range(2):
        console.run("sync; echo 3 >/proc/sys/vm/drop_caches")
        one.gateway.kill()
        with ThreadPoolExecutor() as pool:
            read = pool.submit(console.run, "md5sum /bin/busybox /data/a", seconds=240.0)
            one.gateway.start()
            assert read.result().split()[2] == written
    assert "error" not in console.run("dmesg | grep -i 'i/o error' || true").lower()
    console.close()


def test_a_persistent_disk_comes_with_its_mode_and_is_drained_at_the_end(
    one: One, libvirt: Libvirt
) -> None:
    disk = one.persistent(RAW, CACHE_MODE="BACK", CACHE_SIZE="64", PRELOAD_SIZE="1")
    console = start(one, libvirt, disk, driver="cache='unsafe' io='native'")
    told = one.gateway.status("one-7-0")
    assert (told["mode"], told["cache_size"], told["clients"] > 0) == ("write-back", 64 * MIB, True)
    assert (one.datastores / "100" / f"{RAW}.forebay" / "owner").is_symlink()
    xml = libvirt.virsh("dumpxml", "one-7").stdout
    assert "type='network'" in xml
    assert "cache='none'" in xml
    assert "io='native'" not in xml
    refused = one.mvds(RAW)
    assert refused.returncode == 1
    assert "connected" in refused.stderr
    console.run("echo persistent >/data/a; sync; mount -o remount,ro /")
    console.close()
    libvirt.virsh("destroy", "one-7")
    assert one.mvds(RAW).returncode == 0
    assert one.gateway.cli("status", "--json").stdout.strip() == "[]"
    assert not (one.datastores / "100" / f"{RAW}.forebay").exists()
    place = (
        f"{one.datastores / '100' / RAW}?offset={libvirt_guest.ROOT_START * libvirt_guest.SECTOR}"
    )
    assert run("/usr/sbin/debugfs", "-R", "cat /data/a", place).stdout.strip() == "persistent"


def test_with_the_daemon_down_virsh_shows_the_hooks_line(one: One, libvirt: Libvirt) -> None:
    one.gateway.stop()
    domain = one.domain(one.disk_element(), emulator=libvirt.wrapper)
    done = one.deploy(domain, one.vm(one.persistent(RAW)))
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "ERROR: deploy.forebay: VM 7 does not start on ham0: forebay: domain 'one-7' cannot start: disk"
    )
    assert "no daemon at" in last
