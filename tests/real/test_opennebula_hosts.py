# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Persistent disks of OpenNebula's VMs on two hosts: by the deploy driver, libvirt's hook and the end of the disk."""

import contextlib
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from real.disk_fixture import run, wait_for
from real.gateway_process import GatewayProcess
from real.one_bed import HASH, RAW, One, one_of
from real.processes import MIB, need, random_image

Make = Callable[..., GatewayProcess]

SIZE = 4 * MIB


@pytest.fixture
def one(make_gateway: Make, tmp_path: Path) -> One:
    need("qemu-io")
    found = one_of(make_gateway, tmp_path / "1")
    random_image(found.datastores / "100" / RAW, SIZE, 1)
    return found


@pytest.fixture
def other(make_gateway: Make, tmp_path: Path, one: One) -> One:
    """Another host, whose daemon has the same datastore."""
    return one_of(make_gateway, tmp_path / "2", shares=one)


def write(one: One, pattern: int = 7) -> None:
    run(
        "qemu-io",
        "-f",
        "raw",
        "-c",
        f"write -P {pattern} 0 64k",
        "-c",
        "flush",
        one.gateway.uri("one-7-0"),
    )


def begins_with(one: One, pattern: int) -> bool:
    with (one.datastores / "100" / RAW).open("rb") as image:
        return image.read(64 << 10) == bytes([pattern]) * (64 << 10)


def disks(one: One) -> list[str]:
    return [x["name"] for x in json.loads(one.gateway.cli("status", "--json").stdout)]


def test_a_vm_starts_with_the_mode_it_was_given_and_its_end_leaves_the_image_whole(
    one: One,
) -> None:
    for _ in range(2):  # off and on again
        assert one.start(CACHE_MODE="BACK", CACHE_SIZE="8", PRELOAD_SIZE="1").returncode == 0
        told = one.gateway.status("one-7-0")
        assert (told["mode"], told["cache_size"], told["preload"]) == ("write-back", 8 * MIB, MIB)
        write(one)
        one.end()
        assert disks(one) == []
    assert begins_with(one, 7)
    assert one.mvds(RAW).returncode == 0


def test_with_the_daemon_down_a_start_is_refused_in_one_line_and_goes_well_when_it_is_up(
    one: One,
) -> None:
    one.gateway.stop()
    done = one.start()
    assert done.returncode == 255
    last = done.stderr.splitlines()[-1]
    begin = (
        "ERROR: deploy.forebay: VM 7 does not start on ham0: forebay: domain 'one-7' cannot start: "
    )
    assert last.startswith(f"{begin}disk 'one-7-0': no daemon at ")
    one.gateway.start()
    assert one.start().returncode == 0


def test_a_clone_of_a_host_that_is_lost_starts_on_another_as_it_is(
    one: One, other: One, tmp_path: Path
) -> None:
    """Its directory is shared, and its base has the same path on each host."""
    content = (one.datastores / "100" / RAW).read_bytes()
    run(
        "qemu-img",
        "convert",
        "-O",
        "qcow2",
        one.datastores / "100" / RAW,
        one.datastores / "100" / HASH,
    )
    one.vm(one.disk())
    assert one.clone().returncode == 0
    disk = one.sysdir / "disk.0"
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", disk)
    one.gateway.kill()
    there = one.gateway.run / "stores" / "one-100.sock"
    there.unlink(missing_ok=True)
    there.symlink_to(other.gateway.run / "stores" / "one-100.sock")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, tmp_path / "seen")
    assert (tmp_path / "seen").read_bytes() == b"\7" * (64 << 10) + content[64 << 10 :]


def test_on_a_soft_mount_clones_are_made_and_write_back_waits_until_it_is_hard(
    one: One, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = one.datastores / "100"
    run("qemu-img", "convert", "-O", "qcow2", store / RAW, store / HASH)
    one.gateway.stop()
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
        one.gateway.start(["-m", "real.soft_mount", str(store)])
    one.vm(one.disk())
    done = one.clone()
    assert (done.returncode, "WARNING" in done.stderr) == (0, False), done.stderr
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", one.sysdir / "disk.0")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", store / RAW, store / HASH)
    done = one.start(CACHE_MODE="BACK")
    assert done.returncode == 255
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ERROR: deploy.forebay: VM 7 does not start on ham0: ")
    assert "'soft'" in last
    assert "mount it hard" in last
    assert disks(one) == []
    assert not (store / f"{RAW}.forebay").exists(), "nothing is left of it"
    assert one.start(CACHE_MODE="THRU").returncode == 0, "with it the guest hears of each error"
    one.end()
    one.gateway.restart()
    assert one.start(CACHE_MODE="BACK").returncode == 0
    write(one)
    one.end()
    assert begins_with(one, 7)


def test_the_image_of_a_host_that_is_lost_is_refused_by_name_until_it_is_taken_over(
    one: One, other: One
) -> None:
    assert one.start(CACHE_MODE="BACK").returncode == 0
    write(one)
    one.gateway.kill()
    done = other.start(CACHE_MODE="BACK")
    assert done.returncode == 255
    assert "belongs to" in done.stderr
    assert "forebay takeover" in done.stderr
    assert Path("/proc/sys/kernel/hostname").read_text().strip() in done.stderr
    assert disks(other) == []
    other.gateway.cli("takeover", f"one-100:{RAW}", "--yes")
    assert other.start(CACHE_MODE="BACK").returncode == 0
    write(other, 9)
    other.end()
    assert begins_with(other, 9)


def test_a_start_waits_for_a_host_that_still_writes_the_image_back(one: One, other: One) -> None:
    assert one.start(CACHE_MODE="BACK").returncode == 0
    write(one)
    with ThreadPoolExecutor() as pool:
        started = pool.submit(other.start, CACHE_MODE="BACK")
        wait_for((other.directory / "virsh").exists, "its start is begun")
        one.end()
        assert started.result().returncode == 0
    assert begins_with(other, 7)
    assert disks(other) == ["one-7-0"]


def test_a_wrong_attribute_is_told_by_the_hook(one: One) -> None:
    done = one.start(CACHE_MODE="FAST", CACHE_SIZE="8")
    assert done.returncode == 255
    assert "<disk name='one-7-0'>: mode: " in done.stderr
    assert disks(one) == []


def test_the_daemon_may_be_killed_between_start_and_end(one: One) -> None:
    assert one.start(CACHE_MODE="BACK").returncode == 0
    write(one)
    one.gateway.restart(kill=True)
    write(one, 9)
    one.gateway.kill()
    one.end()  # nobody hears of it: the disk stays attached
    behind = int((one.gateway.directory / "libvirt-run" / "one-7-0").read_text().split()[-1])
    assert one.mvds(RAW).returncode == 1
    one.gateway.start()
    assert one.mvds(RAW).returncode == 0
    assert begins_with(one, 9)
    with contextlib.suppress(ProcessLookupError):  # what the hook left to try again has seen it
        os.kill(behind, signal.SIGTERM)
