# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A server that reads what strangers made has its files, and nothing else: the kernel sees to that."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forebay.origin.worker import program

CODE = """
import importlib.util, os, resource, socket, sys
spec = importlib.util.spec_from_file_location("program", sys.argv[1])
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
reads, writes = int(sys.argv[2]), int(sys.argv[3])
program.confine([reads], [writes])

def tried(do):
    try:
        do()
        return "done"
    except OSError as error:
        return type(error).__name__

print(tried(lambda: os.open(f"/proc/self/fd/{reads}", os.O_RDONLY)))
print(tried(lambda: os.open(f"/proc/self/fd/{reads}", os.O_RDWR)))
print(tried(lambda: os.open(f"/proc/self/fd/{writes}", os.O_RDWR)))
print(tried(lambda: os.open("/etc/passwd", os.O_RDONLY)))
print(tried(lambda: os.open(sys.argv[4], os.O_RDONLY)))
print(tried(lambda: os.listdir(os.path.dirname(sys.argv[4]))))
print(tried(lambda: os.mkdir(sys.argv[4] + ".d")))
print(tried(lambda: socket.socket().connect(("127.0.0.1", 9))))
print(resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_AS)[0] >> 30)
"""


def landlock() -> int:
    """The version of Landlock that the kernel has; below 1 if it has none."""
    return int(ctypes.CDLL(None).syscall(444, None, 0, 1))


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
    *found, limits = done.stdout.splitlines()
    assert found == ["done", "PermissionError", "done"] + ["PermissionError"] * 5
    assert limits == "(0, 0) 4"
