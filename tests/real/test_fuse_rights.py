# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The mount gives nobody more than the stores do, keeps no writer out, and has no right that it does not need."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from real.fuse_mount import FuseMount, need_fuse
from real.gateway_process import GatewayProcess
from real.processes import MIB
from real.tenant_process import TenantProcess

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")

NOBODY = 65534


@pytest.fixture
def mount(make_gateway: Callable[..., GatewayProcess]) -> Iterator[FuseMount]:
    """A mount for all users, of a store with one image that its mode lets everybody read."""
    need_fuse()
    gateway = make_gateway({"fuse": {"mode": "0444"}, "gateway": {"socket_mode": "0666"}})
    (gateway.images / "a.raw").write_bytes(bytes(MIB))
    (gateway.images / "a.raw").chmod(0o644)
    for path in (gateway.directory, gateway.images, gateway.run, gateway.run / "disks"):
        path.chmod(0o755)
    mount = FuseMount(gateway, "--allow-other")
    yield mount
    mount.remove()


def read(path: Path) -> bool:
    """True if nobody may read the file."""
    done = subprocess.run(
        ["head", "-c", "16", str(path)], user=NOBODY, group=NOBODY, extra_groups=[],
        capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode == 0


def test_a_store_in_a_private_directory_stays_private(mount: FuseMount) -> None:
    image = mount.image("a.raw")
    assert read(image)
    mount.gateway.directory.chmod(0o700)
    try:
        time.sleep(1.1)  # the kernel believes in attributes for a second
        assert image.parent.stat().st_mode & 0o077 == 0
    finally:
        mount.gateway.directory.chmod(0o755)


def test_a_reader_gives_way_to_a_writer(mount: FuseMount) -> None:
    reader = subprocess.Popen(
        ["tail", "-f", "-c", "1", str(mount.image("a.raw"))],
        user=NOBODY, group=NOBODY, extra_groups=[], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert reader.stdout is not None
    try:
        assert reader.stdout.read(1) == b"\0", "it has the image open"
        assert "fuse-" in mount.gateway.cli("status").stdout
        mount.gateway.attach("d", "a.raw", mode="write-back")
        assert [
            line.split()[0] for line in mount.gateway.cli("status").stdout.splitlines()[1:]
        ] == ["d"]
    finally:
        reader.kill()
        reader.wait()
        reader.stdout.close()


def test_a_disk_that_a_process_has_is_no_others_file(mount: FuseMount) -> None:
    mount.gateway.attach("d", "a.raw", mode="write-back")
    assert read(mount.disk("d"))
    process = TenantProcess(NOBODY, NOBODY)
    try:
        assert process.gets_in(mount.gateway.sock("d"))
        assert not read(mount.disk("d"))
        assert len(mount.disk("d").read_bytes()) == MIB, "root reads it"
    finally:
        process.end()
    assert read(mount.disk("d"))


def rights(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {one.split(":")[0]: int(one.split()[1], 16) for one in lines if one.startswith("Cap")}


def test_the_right_to_mount_is_given_up(mount: FuseMount) -> None:
    assert mount.process is not None
    sys_admin = 1 << 21
    for task in Path(f"/proc/{mount.process.pid}/task").iterdir():
        for name, value in rights(int(task.name)).items():
            assert not value & sys_admin, name
    status = Path(f"/proc/{mount.process.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert read(mount.image("a.raw"))
    assert mount.stop() == 0
    assert not os.path.ismount(mount.path)


def test_the_mount_of_a_daemon_of_another_user_is_that_users(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    need_fuse()
    gateway = make_gateway()
    gateway.directory.chmod(0o755)
    os.chown(gateway.run, NOBODY, NOBODY)
    mount = FuseMount(gateway)
    try:
        assert mount.process is not None
        status = Path(f"/proc/{mount.process.pid}/status").read_text()
        assert f"Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}" in status
        assert set(rights(mount.process.pid).values()) == {0}
        mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(60) == 0
        assert not os.path.ismount(mount.path)
    finally:
        mount.remove()
