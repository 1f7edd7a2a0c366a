# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Images in other formats, read as the files that they are: `--format raw`, and the files of the mount."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import run
from real.fuse_mount import FuseMount, need_fuse
from real.gateway_process import GatewayProcess
from real.processes import MIB, need

Connect = Callable[..., Any]

SIZE = 4 * MIB


def make_qcow2(gateway: GatewayProcess, content: bytes, name: str = "a.img") -> Path:
    """A qcow2 image in the store, whose guest sees `content`."""
    need("qemu-img", "qemu-io")
    raw, path = gateway.directory / "content", gateway.images / name
    raw.write_bytes(content)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path))
    return path


def shown(gateway: GatewayProcess) -> list[dict[str, Any]]:
    """What `forebay images` tells."""
    found = json.loads(gateway.cli("images", "--json").stdout)
    assert isinstance(found, list)
    return found


@pytest.fixture
def qcow2(gateway: GatewayProcess, random_image: Callable[..., bytes]) -> Path:
    return make_qcow2(gateway, random_image(gateway.directory / "made", SIZE))


@pytest.mark.parametrize("kill", [False, True])
def test_the_bytes_of_a_qcow2_file_are_served_to_who_asks_for_them(
    gateway: GatewayProcess, connect: Connect, qcow2: Path, kill: bool
) -> None:
    refused = gateway.cli("attach", "d", "images:a.img", "--read-only", check=False)
    assert "is in qcow2 format" in refused.stderr
    assert "--format raw" in refused.stderr
    gateway.attach("d", "a.img", "--read-only", "--format", "raw")
    gateway.restart(kill=kill)
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(qcow2.stat().st_size, 0)) == qcow2.read_bytes()
    client.shutdown()
    [told] = shown(gateway)
    assert (told["image"], told["format"]) == ("images:a.img", "qcow2")


def test_who_asked_for_the_bytes_of_an_image_has_not_said_that_it_is_a_raw_disk(
    gateway: GatewayProcess, qcow2: Path
) -> None:
    gateway.attach("d", "a.img", "--read-only", "--format", "raw")
    gateway.restart()
    gateway.cli("detach", "d")
    for words in ([], ["--read-only"], ["--overlay"]):
        refused = gateway.cli("attach", "d", "images:a.img", *words, check=False)
        assert "is in qcow2 format" in refused.stderr
    assert qcow2.read_bytes().startswith(b"QFI\xfb")


def test_a_format_that_is_not_known_is_refused_in_one_line(gateway: GatewayProcess) -> None:
    refused = gateway.cli("attach", "d", "images:a", "--format", "tar", check=False)
    assert refused.returncode == 2
    assert "'tar' is no format that can be asked for" in refused.stderr


def test_a_qcow2_file_in_the_mount_is_the_file_and_qemu_reads_it_there(
    gateway: GatewayProcess, qcow2: Path
) -> None:
    need_fuse()
    mount = FuseMount(gateway)
    try:
        file = mount.image("a.img")
        assert file.read_bytes() == qcow2.read_bytes()
        told = json.loads(run("qemu-img", "info", "--output=json", str(file)).stdout)
        assert (told["format"], told["virtual-size"]) == ("qcow2", SIZE)
        content = gateway.directory / "content"
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", file, content)
        assert [(x["image"], x["format"]) for x in shown(gateway)] == [("images:a.img", "qcow2")]
    finally:
        mount.remove()
