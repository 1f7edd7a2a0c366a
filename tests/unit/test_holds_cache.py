# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The script by which udev tells a device with a cache on it from any other."""

import subprocess
import uuid
from pathlib import Path

import pytest

from forebay_cache.format.superblock import COPY_OFFSET, plan

SCRIPT = Path(__file__).resolve().parents[2] / "systemd" / "holds-cache"
WHOLE = plan(64 << 20, uuid.UUID(int=7)).pack()


def is_taken(content: bytes, path: Path) -> bool:
    path.write_bytes(content)
    return subprocess.run([SCRIPT, path], check=False).returncode == 0


def damaged(at: int) -> bytes:
    content = bytearray(WHOLE)
    content[at] ^= 1
    return bytes(content)


@pytest.mark.parametrize("size", [64 << 20, 1 << 40])
def test_a_cache_is_known(size: int, tmp_path: Path) -> None:
    content = plan(size, uuid.uuid4()).pack()
    assert is_taken(content + bytes(8192), tmp_path / "d")
    assert is_taken(bytes(COPY_OFFSET) + content, tmp_path / "d")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"FOREBAY",
        b"FOREBAY\0" + bytes(1 << 16),
        b"FOREBAYS are pools above turbines\n" * 1000,
        WHOLE[:4095],
        bytes(1 << 16),
        b"\0" * 512 + WHOLE,
        damaged(0),
        damaged(40),
        damaged(4095),
    ],
)
def test_what_only_looks_like_one_is_not(content: bytes, tmp_path: Path) -> None:
    assert not is_taken(content, tmp_path / "d")


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "no", tmp_path):
        assert subprocess.run([SCRIPT, path], check=False).returncode == 1
