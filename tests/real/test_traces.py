# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Boot traces, by the real command, the real daemon and a real client: recorded, kept, replayed, shown, dropped."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from real.disk_fixture import run, wait_for
from real.fault_fs import FaultFs
from real.gateway_process import GatewayProcess
from real.processes import NbdServer

MIB = 1 << 20
MakeGateway = Callable[..., GatewayProcess]

BOOT = ["read 20M 1M", "read 3M 4k", "read 9M 64k", "read 30M 8k", "read 12M 512k", "read 0 4k"]
"""What the guest does: 28 blocks of 64 KiB."""
BOOT_BLOCKS = 16 + 1 + 1 + 1 + 8 + 1
BOOT_BYTES = MIB + (4 + 64 + 8 + 512 + 4) * 1024


def make(gateway: GatewayProcess, name: str = "a.raw", mib: int = 40) -> Path:
    """An image of so many MiB, all data."""
    image = gateway.images / name
    image.write_bytes(os.urandom(mib * MIB))
    return image


def boot(gateway: GatewayProcess, disk: str, commands: list[str] = BOOT) -> None:
    """Have a guest boot from the disk."""
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-r", "-f", "raw", *words, gateway.uri(disk))


def trace(gateway: GatewayProcess, image: str = "images:a.raw") -> dict[str, Any] | None:
    """What `forebay trace show --json` tells; None where there is none."""
    done = gateway.cli("trace", "show", image, "--json", check=False)
    if done.returncode:
        assert done.stderr.startswith(f"forebay: no boot trace of {image} is there: ")
        return None
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def recorded(gateway: GatewayProcess, image: str = "images:a.raw", boots: int = 1) -> None:
    """Wait until so many boots are recorded."""
    wait_for(lambda: (trace(gateway, image) or {}).get("boots") == boots, f"{boots} boots recorded")


def booted_once(gateway: GatewayProcess) -> None:
    """An image from which a disk has booted, and of which the cache has nothing."""
    make(gateway)
    gateway.attach("first", "a.raw", "--overlay")
    boot(gateway, "first")
    gateway.cli("detach", "first")
    recorded(gateway)
    gateway.cli("purge", "images:a.raw")


def of_boot(gateway: GatewayProcess, disk: str) -> dict[str, Any]:
    told: dict[str, Any] = gateway.status(disk)["boot"]
    return told


def replayed(gateway: GatewayProcess, disk: str) -> None:
    wait_for(lambda: of_boot(gateway, disk)["trace"] == "replayed", "replayed")


def test_the_second_boot_waits_for_nothing_and_reads_each_block_once(
    gateway: GatewayProcess,
) -> None:
    booted_once(gateway)
    assert sorted(x.name for x in gateway.images.iterdir()) == ["a.raw", "a.raw.forebay"]
    assert os.listdir(gateway.images / "a.raw.forebay") == ["trace"]
    told = trace(gateway)
    assert told is not None
    assert (told["fits"], told["blocks"], told["bytes"]) == (True, BOOT_BLOCKS, BOOT_BLOCKS << 16)

    gateway.attach("second", "a.raw", "--overlay")
    replayed(gateway, "second")
    listed = json.loads(gateway.cli("images", "--json").stdout)[0]["traces"]
    assert [(one["boots"], one["path"]) for one in listed] == [(1, told["path"])]
    boot(gateway, "second")
    assert of_boot(gateway, "second") == {
        "trace": "replayed",
        "state": "booting",
        "read_bytes": BOOT_BYTES,
        "waited_bytes": 0,
        "ready_percent": 100.0,
    }
    assert gateway.status("second")["origin_read_bytes"] == BOOT_BLOCKS << 16
    said = gateway.cli("status", "second").stdout
    assert "boot read 1.6M so far, 100% prefetched; trace: replayed\n" in said
    gateway.cli("detach", "second")
    recorded(gateway, boots=2)


def test_what_a_trace_says_is_shown_exported_warmed_and_dropped(gateway: GatewayProcess) -> None:
    booted_once(gateway)
    said = gateway.cli("trace", "show", "images:a.raw").stdout.splitlines()
    assert said[0].startswith("images:a.raw: 1 boot, the last recorded ")
    assert said[2] == "kept in images:a.raw.forebay/trace"
    exported = json.loads(gateway.cli("trace", "export", "images:a.raw").stdout)
    assert sorted(block for block, *_ in exported["trace"])[:3] == [0, 48, 144]
    assert {tuple(counts) for _, _, *counts in exported["trace"]} == {(1, 1)}

    last = json.loads(
        gateway.cli("warm", "images:a.raw", "trace", "--json").stdout.splitlines()[-1]
    )
    assert last["result"]["origin_read_bytes"] == BOOT_BLOCKS << 16
    gateway.cli("purge", "images:a.raw")
    gateway.attach("d", "a.raw", "--read-only")
    assert of_boot(gateway, "d")["trace"] == "none"  # the default of overlays alone
    gateway.cli("preload", "d", "trace")
    assert gateway.status("d")["cached_bytes"] == BOOT_BLOCKS << 16
    gateway.cli("detach", "d")

    assert gateway.cli("trace", "drop", "images:a.raw").stdout == "images:a.raw: dropped\n"
    assert not (gateway.images / "a.raw.forebay").exists()
    assert trace(gateway) is None
    assert json.loads(gateway.cli("images", "--json").stdout)[0]["traces"] == []
    done = gateway.cli("warm", "images:a.raw", "trace", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_overlays_have_no_replay_where_somebody_says_so(make_gateway: MakeGateway) -> None:
    gateway = make_gateway({"stores.images": {"preload": "0"}})
    booted_once(gateway)
    gateway.attach("a", "a.raw", "--overlay")
    gateway.attach("b", "a.raw", "--overlay", "--preload", "64K")
    wait_for(lambda: gateway.status("b")["cached_bytes"] == 65536, "preloaded")
    assert of_boot(gateway, "a")["trace"] == of_boot(gateway, "b")["trace"] == "none"
    gateway.attach("c", "a.raw", "--overlay", "--preload", "trace")
    replayed(gateway, "c")


def test_a_host_that_never_saw_the_image_replays_what_another_one_has_recorded(
    gateway: GatewayProcess, make_gateway: MakeGateway
) -> None:
    booted_once(gateway)
    other = make_gateway({"stores.images": {"path": str(gateway.images)}})
    other.attach("d", "a.raw", "--overlay")
    replayed(other, "d")
    assert other.status("d")["origin_read_bytes"] == BOOT_BLOCKS << 16


def test_an_image_that_was_changed_loses_its_trace(gateway: GatewayProcess) -> None:
    booted_once(gateway)
    image = gateway.images / "a.raw"
    with image.open("r+b") as file:
        file.write(b"new")
    assert "changed since" in gateway.cli("trace", "show", "images:a.raw").stdout
    gateway.attach("d", "a.raw", "--overlay")
    wait_for(lambda: trace(gateway) is None, "dropped")
    assert of_boot(gateway, "d")["trace"] == "none"
    assert gateway.status("d")["origin_read_bytes"] == 0


def test_the_trace_of_an_image_goes_with_a_purge_that_says_so_and_with_the_image(
    gateway: GatewayProcess,
) -> None:
    booted_once(gateway)
    beside = gateway.images / "a.raw.forebay"
    gateway.cli("warm", "images:a.raw")
    gateway.cli("purge", "images:a.raw", "--traces", "--dry-run")
    assert beside.exists()
    said = gateway.cli("purge", "images:a.raw", "--traces").stdout.splitlines()[0]
    assert said == "images:a.raw: freed 40M, boot trace: dropped"
    assert not beside.exists()
    booted_once(gateway)
    (gateway.images / "a.raw").unlink()
    assert gateway.cli("trace", "drop", "images:a.raw").stdout == "images:a.raw: dropped\n"
    assert not beside.exists()
    booted_once(gateway)
    gateway.attach("d", "a.raw", "--overlay")
    gateway.cli("detach", "d")
    (gateway.images / "a.raw").unlink()
    wait_for(lambda: not beside.exists(), "gone with its image")


def test_a_kill_in_the_middle_of_a_recording_leaves_the_trace_of_before(
    gateway: GatewayProcess,
) -> None:
    booted_once(gateway)
    before = (gateway.images / "a.raw.forebay" / "trace").read_bytes()
    gateway.attach("d", "a.raw", "--overlay")
    replayed(gateway, "d")
    boot(gateway, "d", ["read 33M 2M", *BOOT])
    gateway.restart(kill=True)
    boot(gateway, "d")
    assert of_boot(gateway, "d")["state"] == "not begun"
    gateway.cli("detach", "d")
    assert (gateway.images / "a.raw.forebay" / "trace").read_bytes() == before
    gateway.attach("e", "a.raw", "--overlay")
    boot(gateway, "e", ["read 36M 1M", *BOOT])
    gateway.stop()
    assert (gateway.images / "a.raw.forebay" / "trace").read_bytes() == before


def test_a_store_that_is_not_ours_to_write_has_its_traces_in_state(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    faulty = FaultFs(tmp_path)
    try:
        gateway = make_gateway({"stores.images": {"path": str(faulty.path)}})
        (faulty.backing / "a.raw").write_bytes(os.urandom(40 * MIB))
        faulty.fail("mkdir", "EROFS", times=-1)
        gateway.attach("d", "a.raw", "--overlay")
        boot(gateway, "d")
        gateway.cli("detach", "d")
        recorded(gateway)
        told = trace(gateway)
        assert told is not None
        assert Path(told["path"]).parent == gateway.state / "traces"
        assert os.listdir(faulty.backing) == ["a.raw"]
        gateway.cli("purge", "images:a.raw")
        gateway.restart()
        gateway.attach("d", "a.raw", "--overlay")
        replayed(gateway, "d")
    finally:
        faulty.remove()


def test_a_trace_that_somebody_planted_brings_in_nothing(gateway: GatewayProcess) -> None:
    gateway.allow_log("its boot trace, images:a.raw.forebay/trace, is passed over")
    booted_once(gateway)
    place = gateway.images / "a.raw.forebay" / "trace"
    good = place.read_bytes()
    for planted in (good[:-5], good.replace(b'"boots": 1', b'"boots": 2'), b"", os.urandom(70_000)):
        place.write_bytes(planted)
        gateway.attach("d", "a.raw", "--overlay")
        boot(gateway, "d", ["read 0 4k"])
        assert gateway.status("d")["origin_read_bytes"] == 65536
        gateway.cli("detach", "d")
        gateway.cli("purge", "images:a.raw")
    place.unlink()
    os.mkfifo(place)
    gateway.attach("d", "a.raw", "--overlay")
    boot(gateway, "d", ["read 0 4k"])


def test_a_store_that_hangs_holds_up_no_attach_and_no_boot_for_a_trace(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    faulty = FaultFs(tmp_path)
    try:
        gateway = make_gateway({"stores.slow": {"path": str(faulty.path)}})
        gateway.allow_log(
            "boot is not recorded|kept on this host only|cannot be reached|still|closing"
        )
        (faulty.backing / "a.raw").write_bytes(os.urandom(40 * MIB))
        gateway.cli("attach", "d", "slow:a.raw", "--overlay")
        boot(gateway, "d")
        faulty.fail("fsync", hang=True, name="trace.*")
        gateway.cli("detach", "d")
        gateway.cli("attach", "e", "slow:a.raw", "--overlay")
        boot(gateway, "e")
        assert gateway.status("e")["origin_read_bytes"] == 0
        gateway.cli("detach", "e")
        faulty.lift()
        recorded(gateway, "slow:a.raw")
    finally:
        faulty.remove()


def test_an_image_on_an_nbd_server_has_its_trace_in_state(
    gateway: GatewayProcess, start_nbdkit: Callable[..., NbdServer]
) -> None:
    server = start_nbdkit("file", make(gateway))
    gateway.attach("d", server.uri, "--overlay")
    boot(gateway, "d")
    gateway.cli("detach", "d")
    recorded(gateway, server.uri)
    gateway.cli("purge", server.uri)
    gateway.attach("d", server.uri, "--overlay")
    replayed(gateway, "d")
    assert len(os.listdir(gateway.state / "traces")) == 1
    gateway.cli("detach", "d")


def test_a_storm_of_disks_reads_each_block_once(gateway: GatewayProcess) -> None:
    booted_once(gateway)
    names = [f"vm{n}" for n in range(10)]
    for name in names:
        gateway.attach(name, "a.raw", "--overlay")
    words = [word for command in BOOT for word in ("-c", command)]
    guests = [
        subprocess.Popen(
            ["qemu-io", "-r", "-f", "raw", *words, gateway.uri(name)], stdout=subprocess.DEVNULL
        )
        for name in names
    ]
    assert [guest.wait(60) for guest in guests] == [0] * len(names)
    total = sum(gateway.status(name)["origin_read_bytes"] for name in names)
    assert total == BOOT_BLOCKS << 16
    for name in names:
        gateway.cli("detach", name)
    recorded(gateway, boots=2)


def test_an_image_that_was_removed_with_its_directory_leaves_nothing(
    gateway: GatewayProcess,
) -> None:
    booted_once(gateway)
    (gateway.images / "a.raw").unlink()
    shutil.rmtree(gateway.images / "a.raw.forebay")
    done = gateway.cli("trace", "show", "images:a.raw", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    make(gateway)
    assert trace(gateway) is None
