# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A server that reads what strangers made has its files, and nothing else: the kernel sees to that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forebay.origin.worker import program
from real.confined import CODE, EXPECTED, landlock


def test_a_server_has_its_files_and_nothing_else(tmp_path: Path) -> None:
    if landlock() < 4:
        pytest.skip("needs Landlock with rules for the network: Linux 6.7")
    for name in ("reads", "writes", "secret"):
        (tmp_path / name).write_bytes(b"x")
    reads, writes = (
        os.open(tmp_path / "reads", os.O_RDONLY),
        os.open(tmp_path / "writes", os.O_RDWR),
    )
    words = [program.__file__, str(reads), str(writes), str(tmp_path / "secret")]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CODE, *words],
        capture_output=True,
        text=True,
        check=True,
        pass_fds=(reads, writes),
    )
    os.close(reads)
    os.close(writes)
    assert done.stdout.splitlines() == EXPECTED
