# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""STATE is one daemon's, and nothing that lies there leads out of it."""

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from forebay.config.model import Config
from forebay.config.sections import GatewaySection
from forebay.errors import ForebayError
from forebay.storage import state


def test_a_link_in_the_place_of_the_lock_leads_nowhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("of somebody else")
    directory = tmp_path / "state"
    directory.mkdir()
    (directory / "lock").symlink_to(victim)
    with pytest.raises(ForebayError), state.held(directory, None, 0o700):
        pass
    assert victim.read_text() == "of somebody else"


def left_by(directory: Path, pid: int) -> int:
    """A descriptor that holds the lock of the directory, as a child does that its daemon had not quite started."""
    directory.mkdir(exist_ok=True)
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, f"{pid}\n".encode(), 0)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def a_dead_process() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_a_lock_that_outlives_its_daemon_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = left_by(tmp_path / "state", a_dead_process())
    waited: list[float] = []

    def goes(seconds: float) -> None:
        waited.append(seconds)
        os.close(left)

    monkeypatch.setattr("time.sleep", goes)
    with state.held(tmp_path / "state", "--state", 0o700):
        assert len(waited) == 1


@pytest.mark.parametrize("pid", [os.getpid(), 1], ids=["ours", "somebody's"])
def test_a_daemon_that_lives_is_told_of_at_once(
    tmp_path: Path, pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = left_by(tmp_path / "state", pid)
    monkeypatch.setattr("time.sleep", pytest.fail)
    with (
        pytest.raises(ForebayError, match=f"in use by another daemon .pid {pid}.: stop that one"),
        state.held(tmp_path / "state", "--state", 0o700),
    ):
        pass
    os.close(left)


def test_a_lock_that_stays_without_a_daemon_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "LOCK_SECONDS", 0.1)
    left = left_by(tmp_path / "state", a_dead_process())
    with (
        pytest.raises(ForebayError, match="in use by"),
        state.held(tmp_path / "state", None, 0o700),
    ):
        pass
    os.close(left)


def test_so_it_is_for_a_command_that_only_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(gateway=GatewaySection(state=tmp_path, run=tmp_path, socket_group=None))
    left = left_by(tmp_path, a_dead_process())
    monkeypatch.setattr("time.sleep", lambda _seconds: os.close(left))
    with state.untouched(config):
        pass
    left = left_by(tmp_path, os.getpid())
    monkeypatch.setattr("time.sleep", pytest.fail)
    with pytest.raises(ForebayError, match="in use by a daemon"), state.untouched(config):
        pass
    os.close(left)
