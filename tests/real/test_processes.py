# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The fixtures themselves: what the other real tests stand on."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from real.gateway_process import LOUD, toml
from real.processes import MIB, NbdServer, loop_device, random_image


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, bytes]:
    path = tmp_path / "image.raw"
    return path, random_image(path, 4 * MIB, seed=1, holes=[(MIB, MIB)])


def test_image_is_what_it_says_and_sparse(image: tuple[Path, bytes]) -> None:
    path, content = image
    assert path.read_bytes() == content
    assert content[MIB : 2 * MIB] == bytes(MIB)
    assert content.count(0) < 1.1 * MIB
    assert path.stat().st_blocks * 512 < 4 * MIB


def test_nbdkit_with_a_filter_serves_the_image(
    image: tuple[Path, bytes],
    start_nbdkit: Callable[..., NbdServer],
    connect: Callable[..., Any],
) -> None:
    path, content = image
    server = start_nbdkit("file", path, "rdelay=1ms", filters=["delay"])
    assert bytes(connect(server.uri).pread(MIB, 3 * MIB)) == content[3 * MIB :]


def test_qemu_nbd_serves_the_image(
    image: tuple[Path, bytes],
    start_qemu_nbd: Callable[..., NbdServer],
    connect: Callable[..., Any],
) -> None:
    path, content = image
    server = start_qemu_nbd(path, export="disk")
    assert bytes(connect(server.uri).pread(4 * MIB, 0)) == content


def test_a_server_that_cannot_start_says_why(start_nbdkit: Callable[..., NbdServer]) -> None:
    with pytest.raises(RuntimeError, match="no-such-plugin"):
        start_nbdkit("no-such-plugin")


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_loop_device_has_the_sectors_asked_for(image: tuple[Path, bytes], sector_size: int) -> None:
    with loop_device(image[0], sector_size) as device:
        asked = subprocess.run(
            ["blockdev", "--getss", str(device)], capture_output=True, text=True, check=True
        )
        assert int(asked.stdout) == sector_size
        assert os.path.exists(device)


def test_configuration_text() -> None:
    assert toml({"a.b": {"x": "1", "y": ["*"], "z": 3}}) == '[a.b]\nx = "1"\ny = ["*"]\nz = 3\n'


@pytest.mark.parametrize(
    ("line", "loud"),
    [
        ("12:00:00 WARNING forebay.disk: it burns", True),
        ("Traceback (most recent call last):", True),
        ("INFO no error happened", False),
    ],
)
def test_what_is_loud_in_a_log(line: str, loud: bool) -> None:
    assert bool(re.search(LOUD, line)) is loud
