# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A system call of the event loop's own thread that never returns, as pyfuse3's read of /dev/fuse can."""

import subprocess
import sys

STANDS = """
import ctypes, errno, os, time, trio
from forebay.doors.fuse import awake as fuse_awake

fuse_awake.TURN_SECONDS, fuse_awake.STILL_SECONDS = 0.02, 0.2
libc = ctypes.PyDLL(None, use_errno=True)  # holds the interpreter's lock during the call, as pyfuse3 does
read, _ = os.pipe()
buffer = ctypes.create_string_buffer(1)

async def main():
    async with fuse_awake.kept_awake():
        for _ in range(2):
            assert libc.read(read, buffer, 1) == -1
            assert ctypes.get_errno() == errno.EINTR
        await trio.sleep(0.5)  # a loop that turns is not interrupted
        started = time.monotonic()
        assert libc.read(read, buffer, 1) == -1
        assert time.monotonic() - started > 0.1
    await trio.sleep(0.5)  # and nothing is left of it

trio.run(main)
"""


def test_a_read_that_nothing_comes_to_is_interrupted() -> None:
    """In a process of its own: the timer is one for each process."""
    done = subprocess.run(
        [sys.executable, "-c", STANDS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
