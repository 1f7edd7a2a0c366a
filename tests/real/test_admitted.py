# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What was admitted goes on: the guards of attach keep no disk from coming back, nor does what its guest wrote."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forebay.image.formats import ATTRIBUTE, MOST, Formats
from forebay_cache.durable.records import Records
from real.disk_fixture import run, wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB

Make = Callable[..., GatewayProcess]
Connect = Callable[..., Any]

SIZE = 4 * MIB
MAGICS = {"qcow2": b"QFI\xfb", "qed": b"QED\0", "vmdk": b"KDMV", "vhdx": b"vhdxfile"}


def make_image(gateway: GatewayProcess, name: str = "a.img") -> Path:
    path = gateway.images / name
    path.write_bytes(os.urandom(SIZE))
    return path


def is_ready(gateway: GatewayProcess, name: str = "d") -> bool:
    return bool(gateway.status(name)["state"] == "ready")


@pytest.mark.parametrize("kill", [False, True])
def test_a_second_name_of_an_image_that_is_in_use(
    gateway: GatewayProcess, connect: Connect, kill: bool
) -> None:
    path = make_image(gateway)
    gateway.attach("d", "a.img", mode="write-through")
    os.link(path, path.with_suffix(".bak"))
    gateway.restart(kill=kill)
    assert is_ready(gateway)
    client = connect(gateway.uri("d"))
    assert client.pread(MIB, MIB) == path.read_bytes()[MIB : 2 * MIB]
    client.pwrite(b"x" * MIB, 0)
    client.flush()
    client.shutdown()
    assert path.read_bytes()[:MIB] == b"x" * MIB
    gateway.cli("detach", "d")
    refused = gateway.cli("attach", "d", "images:a.img", check=False)
    assert "has 2 names" in refused.stderr, "a guard of attach, still"
    assert "nothing to recover" in gateway.cli("recover", "images:a.img").stdout


@pytest.mark.parametrize("magic", MAGICS)
def test_a_guest_may_write_the_first_bytes_of_another_format(
    make_gateway: Make, connect: Connect, magic: str
) -> None:
    gateway = make_gateway()
    path = make_image(gateway)
    gateway.attach("d", "a.img", mode="write-back")
    client = connect(gateway.uri("d"))
    client.pwrite(MAGICS[magic].ljust(512, b"\1"), 0)
    client.flush()
    client.shutdown()
    gateway.restart(kill=True)
    assert is_ready(gateway)
    gateway.cli("detach", "d")
    assert path.read_bytes().startswith(MAGICS[magic])
    gateway.restart()
    for options in (["--mode", "write-back"], ["--read-only"], ["--overlay"]):
        gateway.attach("d", "a.img", *options)
        gateway.cli("detach", "d")
    # Another host knows by the image itself.
    assert os.getxattr(path, ATTRIBUTE) == b"%d" % SIZE
    other = make_gateway({"stores.images": {"path": str(gateway.images)}})
    other.attach("d", "a.img", mode="write-back")
    other.cli("detach", "d")


def test_an_image_that_was_replaced_by_one_of_another_format_is_refused(
    gateway: GatewayProcess,
) -> None:
    path = make_image(gateway)
    gateway.attach("d", "a.img")
    gateway.cli("detach", "d")
    path.unlink()
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "1G")
    refused = gateway.cli("attach", "d", "images:a.img", check=False)
    assert "is in qcow2 format" in refused.stderr


def test_the_index_remembers_so_many_images_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST >= 10000
    monkeypatch.setattr("forebay.image.formats.MOST", 3)

    class Cache:
        records = Records()

    now = [0.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    formats = Formats(Cache())  # type: ignore[arg-type]
    for number in range(5):
        now[0] += 10
        formats.remember(f"images:{number}", SIZE)
    assert [formats.is_raw(f"images:{n}", SIZE) for n in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert not formats.is_raw("images:4", SIZE + 1)


def test_a_full_copy_for_which_the_cache_is_too_small_by_now(
    make_gateway: Make, connect: Connect
) -> None:
    gateway = make_gateway()
    gateway.allow_log("copying paused")
    path = make_image(gateway)
    gateway.attach("d", "a.img", mode="full-copy")
    gateway.configure({"defaults": {"cache_size": "1 MiB"}})
    gateway.restart()
    assert gateway.status("d")["state"] in ("ready", "copying")
    assert connect(gateway.uri("d")).pread(SIZE, 0) == path.read_bytes()


def test_a_store_that_is_not_configured_any_more_is_shown_at_its_disks(
    make_gateway: Make, connect: Connect
) -> None:
    gateway = make_gateway({"defaults": {"max_lag": "1h"}})
    gateway.allow_log("is not served")
    make_image(gateway)
    there = gateway.directory / "there"
    there.mkdir()
    (there / "b.img").write_bytes(bytes(SIZE))
    both = {"defaults": {"max_lag": "1h"}, "stores.other": {"path": str(there)}}
    gateway.configure(both)
    gateway.restart()
    gateway.attach("d", "a.img")
    gateway.attach("e", "other:b.img", mode="write-back")
    connect(gateway.uri("e")).pwrite(b"x" * MIB, 0)
    gateway.configure({"defaults": {"max_lag": "1h"}})
    gateway.restart()
    assert is_ready(gateway)
    lost = gateway.status("e")
    assert (lost["state"], lost["dirty_bytes"]) == ("failed", MIB)
    assert "other" in lost["reason"]
    gateway.configure(both)
    gateway.restart()
    wait_for(lambda: is_ready(gateway, "e"), "it does not come back", 20)
    gateway.cli("flush", "e")
    assert (there / "b.img").read_bytes()[:MIB] == b"x" * MIB


def test_an_overlay_that_is_attached_anew_is_empty(
    gateway: GatewayProcess, connect: Connect
) -> None:
    path = make_image(gateway)
    gateway.attach("d", "a.img", "--overlay")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * MIB, 0)
    client.flush()
    client.shutdown()
    gateway.restart(kill=True)
    client = connect(gateway.uri("d"))
    assert client.pread(MIB, 0) == b"x" * MIB, "it came back"
    client.shutdown()
    gateway.cli("detach", "d")
    gateway.attach("d", "a.img", "--overlay")
    assert connect(gateway.uri("d")).pread(MIB, 0) == path.read_bytes()[:MIB]
