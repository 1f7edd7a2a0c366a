# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import pytest

from forebay.cli.terminal import wait as cli_wait
from forebay.errors import ForebayError, InUseError

HELD = "images:a.raw is in use by host one (disk 'd', dirty, since 2026): detach it there first"


class Daemon:
    """Refuses so often, with each of these texts in turn, then attaches."""

    def __init__(self, *refusals: str) -> None:
        self._refusals = list(refusals)
        self.asked = 0

    def attach(self) -> dict[str, Any]:
        self.asked += 1
        if self._refusals:
            raise InUseError(self._refusals.pop(0), {"host": "one"})
        return {"name": "d"}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_wait, "PAUSE", 0.0)


def test_it_asks_until_the_image_is_free_and_tells_what_is_new(
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = HELD.replace("one", "two")
    daemon = Daemon(HELD, HELD, other)
    assert cli_wait.when_free(daemon.attach, "d", 60) == {"name": "d"}
    assert daemon.asked == 4
    told = capsys.readouterr()
    assert told.err.splitlines() == [f"forebay: waiting: {x}" for x in (HELD, other)]
    assert told.out == ""


def test_at_a_terminal_it_is_one_line_that_goes_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    cli_wait.when_free(Daemon(HELD, HELD).attach, "d", 60)
    text = capsys.readouterr().err
    assert "\n" not in text
    assert text.count("images:a.raw is in use by host one (disk 'd', dirty, since 2026)") == 2
    assert text.endswith("\r\x1b[K")


def test_no_time_left_is_the_last_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(cli_wait, "PAUSE", 1.0)
    monkeypatch.setattr("forebay.cli.terminal.wait.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("forebay.cli.terminal.wait.time.sleep", sleep)
    daemon = Daemon(*[HELD] * 9)
    with pytest.raises(InUseError, match="detach it there first; waited 2.5s$") as refused:
        cli_wait.when_free(daemon.attach, "d", 2.5)
    assert refused.value.holder == {"host": "one"}
    assert daemon.asked == 4  # at once, after 1 and 2 seconds, and when the time is over


def test_what_no_waiting_mends_is_told_at_once() -> None:
    def attach() -> dict[str, Any]:
        raise ForebayError("no such image")

    with pytest.raises(ForebayError, match="no such image"):
        cli_wait.when_free(attach, "d", 60)


def test_an_interrupt_says_that_nothing_was_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("forebay.cli.terminal.wait.time.sleep", interrupt)
    with pytest.raises(ForebayError, match="'d' is not attached"):
        cli_wait.when_free(Daemon(HELD).attach, "d", 60)
