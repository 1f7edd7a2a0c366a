# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Images without a disk, by the real command and the real daemon: listed, warmed, tagged, pinned, purged."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from real.disk_fixture import wait_for
from real.fault_fs import FaultFs
from real.gateway_process import GatewayProcess
from real.processes import NbdServer

MIB = 1 << 20
MakeGateway = Callable[..., GatewayProcess]


def make(gateway: GatewayProcess, name: str, mib: int = 1) -> Path:
    """An image of so many MiB, all data."""
    image = gateway.images / name
    image.write_bytes(os.urandom(mib * MIB))
    return image


def images(gateway: GatewayProcess, *words: str) -> dict[str, dict[str, Any]]:
    """What `forebay images --json` tells, by image."""
    told = json.loads(gateway.cli("images", "--json", *words).stdout)
    return {one["image"]: one for one in told}


def slots(gateway: GatewayProcess) -> int:
    info = json.loads(gateway.cli("cache", "info", "--json").stdout)
    return int(info["slots"] - info["free_slots"])


def refused(gateway: GatewayProcess, *words: str, code: int = 1) -> str:
    """The one line with which a command is refused."""
    done = gateway.cli(*words, check=False)
    assert done.returncode == code, done
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@contextmanager
def slow_warm(gateway: GatewayProcess, image: str) -> Iterator["subprocess.Popen[str]"]:
    """A warm that has read its first megabyte, and takes a quarter of a minute for each further one."""
    command = [sys.executable, "-m", "forebay", "--config", str(gateway.config)]
    command += ["warm", image, "--rate", "64K"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(
            lambda: images(gateway).get(image, {}).get("cached_bytes", 0) > 0, "nothing was warmed"
        )
        yield process
    finally:
        process.kill()
        process.communicate()


def test_an_image_that_was_warmed_is_read_from_the_cache_by_its_first_disk(
    gateway: GatewayProcess,
) -> None:
    make(gateway, "a.raw", 3)
    assert images(gateway) == {}
    said = gateway.cli("warm", "images:a.raw").stdout
    assert said == "images:a.raw: 3.0M of 3.0M cached, 3.0M read\n"
    told = images(gateway)["images:a.raw"]
    assert list(told)[:4] == ["image", "format", "size", "allocated"]
    assert (told["format"], told["size"], told["allocated"]) == ("raw", 3 * MIB, 3 * MIB)
    assert (told["cached_bytes"], told["cached_percent"]) == (3 * MIB, 100.0)
    assert (told["disks"], told["tags"], told["traces"]) == ([], [], [])
    gateway.attach("vm", "a.raw", "--overlay")
    gateway.cli("preload", "vm", "all")
    status = gateway.status("vm")
    assert (status["origin_read_bytes"], status["cached_bytes"]) == (0, 3 * MIB)
    assert images(gateway)["images:a.raw"]["disks"] == ["vm"]
    assert refused(gateway, "images", "imags").startswith("forebay: no store 'imags' (did you mean")


def test_a_warm_tells_how_far_it_is_as_json_and_of_a_part_only_that_is_read(
    gateway: GatewayProcess,
) -> None:
    make(gateway, "a.raw", 3)
    lines = gateway.cli("warm", "images:a.raw", "1M", "--json").stdout.splitlines()
    *progress, last = map(json.loads, lines)
    assert {line["total"] for line in progress} == {MIB}
    assert last["result"]["cached_bytes"] == MIB
    assert last["result"]["origin_read_bytes"] == MIB
    again = json.loads(gateway.cli("warm", "images:a.raw", "--json").stdout.splitlines()[-1])
    assert again["result"]["origin_read_bytes"] == 2 * MIB


def test_a_warm_that_is_interrupted_leaves_what_it_read(gateway: GatewayProcess) -> None:
    make(gateway, "a.raw", 8)
    with slow_warm(gateway, "images:a.raw") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 1
    assert 0 < images(gateway)["images:a.raw"]["cached_bytes"] < 8 * MIB
    gateway.cli("warm", "images:a.raw")  # nothing of the low rate is left
    assert images(gateway)["images:a.raw"]["cached_percent"] == 100


def test_a_disk_that_writes_the_image_ends_a_warm_and_keeps_what_that_read(
    gateway: GatewayProcess,
) -> None:
    make(gateway, "a.raw", 8)
    with slow_warm(gateway, "images:a.raw") as process:
        gateway.attach("vm", "a.raw", mode="write-back")
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(
        "forebay: images:a.raw was wanted by a disk meanwhile: what was read until then is kept"
    )
    assert gateway.status("vm")["cached_bytes"] > 0
    gateway.cli("warm", "images:a.raw")  # by the disk
    assert gateway.status("vm")["cached_bytes"] == 8 * MIB
    gateway.cli("detach", "vm")
    assert images(gateway)["images:a.raw"]["cached_percent"] == 100


def test_a_warm_on_a_store_that_hangs_ends_with_its_error_and_holds_up_nobody(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    faulty = FaultFs(tmp_path)
    try:
        gateway = make_gateway({"stores.slow": {"path": str(faulty.path), "origin_timeout": "2s"}})
        gateway.allow_log("cannot be reached|still|ETIMEDOUT|timed out|no answer|closing it")
        (faulty.backing / "a.raw").write_bytes(os.urandom(2 * MIB))
        make(gateway, "b.raw", 2)
        faulty.fail("read", hang=True)
        command = [sys.executable, "-m", "forebay", "--config", str(gateway.config)]
        warm = subprocess.Popen([*command, "warm", "slow:a.raw"], stderr=subprocess.PIPE, text=True)
        gateway.cli("warm", "images:b.raw")
        assert images(gateway)["images:b.raw"]["cached_percent"] == 100
        _, err = warm.communicate(timeout=60)
        assert warm.returncode == 1
        assert err.count("\n") == 1
        assert err.startswith("forebay: slow:a.raw: ")
        faulty.lift()
        gateway.cli("warm", "slow:a.raw")
        gateway.kill()
    finally:
        faulty.remove()


REFUSED = [
    (("warm", "images:../a.raw"), 1, "leads out of its store"),
    (("warm", "/etc/passwd"), 1, "is not a block device"),
    (("warm", "images:link.raw"), 1, "a symbolic link is on the way"),
    (("warm", "images:a.img"), 1, "is in qcow2 format"),
    (("warm", "images:none.raw"), 1, "no such image"),
    (("warm", "images:a.raw", "--rate", "1K"), 2, "is too slow: use at least 64 KiB"),
    (("pin", "images:a.raw"), 1, "nothing is known of images:a.raw"),
    (("tag", "images:a.raw", "x" * 65), 2, "is not a tag"),
    (("tag", "images:a.raw", "a/b"), 2, "is not a tag"),
    (("purge",), 2, "name images, or say --tag or --older-than"),
    (("purge", "images:a.raw"), 1, "nothing is known of images:a.raw"),
    (("purge", "--older-than", "soon"), 2, "is not a duration"),
    (("warm", "images:a.raw", "trace"), 1, "no boot trace of images:a.raw is there"),
]
"""Words, exit code, and what the one line says."""


def test_what_cannot_be_done_is_refused_in_one_line(gateway: GatewayProcess) -> None:
    make(gateway, "a.raw")
    (gateway.images / "link.raw").symlink_to("/etc/passwd")
    (gateway.images / "a.img").write_bytes(b"QFI\xfb" + bytes(MIB))
    for words, code, why in REFUSED:
        assert why in refused(gateway, *words, code=code)
    assert images(gateway) == {}


def test_tags_and_pins_outlive_a_kill_purge_and_an_image_that_was_replaced(
    gateway: GatewayProcess,
) -> None:
    image = make(gateway, "a.raw", 2)
    gateway.cli("warm", "images:a.raw")
    assert (
        gateway.cli("tag", "images:a.raw", "lts", "debian").stdout == "images:a.raw: debian lts\n"
    )
    assert gateway.cli("pin", "images:a.raw").stdout == "images:a.raw: pinned\n"
    gateway.restart(kill=True)
    told = images(gateway)["images:a.raw"]
    assert (told["pinned"], told["tags"], told["cached_percent"]) == (True, ["debian", "lts"], 100)
    assert "is kept (pinned)" in refused(gateway, "purge", "images:a.raw")
    image.unlink()
    make(gateway, "a.raw", 1)
    gateway.allow_log("replaced by another file|changed by somebody else")
    gateway.cli("warm", "images:a.raw")
    told = images(gateway)["images:a.raw"]
    assert (told["size"], told["cached_percent"], told["pinned"]) == (MIB, 100, True)
    gateway.cli("untag", "images:a.raw", "lts")
    assert gateway.cli("unpin", "images:a.raw").stdout == "images:a.raw: not pinned\n"
    said = gateway.cli("purge", "images:a.raw").stdout
    assert said.splitlines()[0] == "images:a.raw: freed 1.0M"
    told = images(gateway)["images:a.raw"]
    assert (told["tags"], told["cached_bytes"]) == (["debian"], 0)
    wait_for(lambda: slots(gateway) == 0, "the slots of what was purged are still taken")


def test_a_pinned_image_is_not_evicted_and_no_more_than_half_of_the_cache_is_pinned(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway({"cache": {"size": "32 MiB"}})
    make(gateway, "keep.raw", 6)
    make(gateway, "b.raw", 12)
    big = make(gateway, "big.raw", 64)
    for name in ("keep", "b"):
        gateway.cli("warm", f"images:{name}.raw")
    gateway.cli("pin", "images:keep.raw")
    why = refused(gateway, "pin", "images:b.raw")
    assert "images:b.raw may come to take 12M of the cache, and of the 15M" in why
    assert "6.0M are: unpin others" in why
    gateway.cli("warm", "images:big.raw")
    told = images(gateway)
    assert told["images:keep.raw"]["cached_percent"] == 100
    assert told["images:big.raw"]["cached_percent"] < 100
    gateway.restart(kill=True)
    big.write_bytes(os.urandom(64 * MIB))
    gateway.allow_log("changed by somebody else")
    gateway.cli("warm", "images:big.raw")
    assert images(gateway)["images:keep.raw"]["cached_percent"] == 100


def test_holes_of_a_warmed_image_count_nothing_in_what_is_pinned(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway({"cache": {"size": "32 MiB"}})
    image = make(gateway, "a.raw")
    os.truncate(image, 1 << 30)
    gateway.cli("warm", "images:a.raw", "1M")
    assert "may come to take 1.0G" in refused(gateway, "pin", "images:a.raw")
    gateway.cli("warm", "images:a.raw")
    gateway.cli("pin", "images:a.raw")
    told = images(gateway)["images:a.raw"]
    assert (told["cached_percent"], told["device_bytes"]) == (100, MIB)


def test_purge_takes_what_nobody_uses_and_nothing_that_a_disk_needs(
    gateway: GatewayProcess,
) -> None:
    for name in ("a.raw", "b.raw", "c.raw"):
        make(gateway, name)
        gateway.cli("warm", f"images:{name}")
    gateway.cli("tag", "images:a.raw", "old")
    gateway.attach("vm", "b.raw", "--overlay")
    assert "in use by vm" in refused(gateway, "purge", "images:b.raw")
    would = json.loads(gateway.cli("purge", "--older-than", "0s", "--dry-run", "--json").stdout)
    assert [one["image"] for one in would["purged"]] == ["images:a.raw", "images:c.raw"]
    assert would["kept"] == [{"image": "images:b.raw", "why": "in use by vm"}]
    assert images(gateway)["images:a.raw"]["cached_bytes"] == MIB
    assert gateway.cli("purge", "--older-than", "1d").stdout == "freed 0 of 0 images, 0 kept\n"
    gateway.cli("purge", "--tag", "old")
    told = images(gateway)
    assert (told["images:a.raw"]["cached_bytes"], told["images:c.raw"]["cached_bytes"]) == (0, MIB)
    gateway.cli("purge", "--older-than", "0s")
    assert images(gateway).keys() == {"images:a.raw", "images:b.raw"}
    gateway.restart(kill=True)
    assert images(gateway).keys() == {"images:a.raw", "images:b.raw"}
    assert gateway.status("vm")["cached_bytes"] == MIB
    wait_for(lambda: slots(gateway) == 16, "the slots of what was purged are still taken")


def test_the_table_of_images_has_the_columns_of_the_contract(gateway: GatewayProcess) -> None:
    make(gateway, "a.raw")
    gateway.cli("warm", "images:a.raw")
    gateway.cli("tag", "images:a.raw", "lts")
    heading, row = gateway.cli("images").stdout.splitlines()
    assert heading.split() == [
        *("IMAGE", "FORMAT", "SIZE", "WARM"),
        *("PINNED", "TAGS", "DISKS", "USED"),
    ]
    assert row.split()[:7] == ["images:a.raw", "raw", "1.0M", "100%", "-", "lts", "0"]


def test_an_nbd_export_is_warmed_pinned_and_purged_as_a_file_is(
    gateway: GatewayProcess, start_nbdkit: Callable[..., NbdServer]
) -> None:
    image = gateway.directory / "exported.raw"
    image.write_bytes(os.urandom(2 * MIB))
    server = start_nbdkit("file", image)
    gateway.cli("warm", server.uri)
    [(key, told)] = images(gateway).items()
    assert key.startswith("nbd+unix:///")
    assert (told["cached_percent"], told["allocated"]) == (100, None)
    gateway.cli("pin", server.uri)
    server.stop()
    assert "is kept (pinned)" in refused(gateway, "purge", server.uri)
    gateway.cli("unpin", key)
    gateway.cli("purge", key)
    assert images(gateway) == {}
