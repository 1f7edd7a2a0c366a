"""A system call of the event loop's own thread that never returns, as pyfuse3's read of /dev/fuse can."""

import ctypes
import errno
import os
import time

import pytest

from forebay import fuse_awake
from forebay.fuse_awake import kept_awake


async def test_a_read_that_nothing_comes_to_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_awake, "TURN_SECONDS", 0.02)
    monkeypatch.setattr(fuse_awake, "STILL_SECONDS", 0.2)
    read, write = os.pipe()
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(1)
    begin = time.monotonic()
    async with kept_awake():
        for _ in range(2):
            assert libc.read(read, buffer, 1) == -1
            assert ctypes.get_errno() == errno.EINTR
    assert 0.3 < time.monotonic() - begin < 10
    for fd in (read, write):
        os.close(fd)
