# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A service manager that does not read what it is told keeps nobody waiting."""

import contextlib
import socket
import time
from pathlib import Path

import pytest

from forebay import systemd as module
from forebay.systemd import notify


def test_a_manager_that_does_not_read_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    monkeypatch.setattr(module, "SEND_SECONDS", 0.3)
    monkeypatch.setattr(module._Patience, "seconds", 0.3)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        while notify("STATUS=filling up", wait=False):
            pass
        times = []
        for wait in (False, True, True, True):
            begin = time.monotonic()
            assert not notify("STATUS=anybody?", wait=wait)
            times.append(time.monotonic() - begin)
        assert times[0] < 0.2
        assert times[1] >= 0.3
        assert max(times[2:]) < 0.2
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                manager.recv(100)
        assert notify("STATUS=there you are")
        assert manager.recv(100) == b"STATUS=there you are"
        assert module._Patience.seconds == 0.3
    assert not notify("STATUS=gone")
