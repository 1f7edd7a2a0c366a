# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay top` on a real terminal: keys, resizing, a daemon that goes and comes, terminals that can do little."""

import json
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from real.gateway_process import COMPILED, GatewayProcess
from real.processes import MIB, random_image
from real.shared_gateway import SharedGateways
from real.terminal import SHOTS, Terminal, as_svg

LONG = "n" * 64
NAMES = ("vm1", "vm2", LONG)


@pytest.fixture(scope="module")
def gateways() -> Iterator[SharedGateways]:
    shared = SharedGateways()
    yield shared
    shared.remove()


@pytest.fixture
def gateway(gateways: SharedGateways) -> Iterator[GatewayProcess]:
    with gateways.emptied() as running:
        yield running


@pytest.fixture
def disks(gateway: GatewayProcess) -> GatewayProcess:
    for number, name in enumerate(NAMES):
        random_image(gateway.images / f"{number}.raw", MIB, 1)
        gateway.attach(name, f"{number}.raw")
    return gateway


def top(
    gateway: GatewayProcess, *words: str, term: str = "xterm-256color", **more: str
) -> Terminal:
    command = [
        sys.executable,
        "-m",
        "forebay",
        "top",
        "--config",
        str(gateway.config),
        "-d",
        "500ms",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    return Terminal(
        [*command, *words], {**environment, **COMPILED, "TERM": term, "LC_ALL": "C.UTF-8", **more}
    )


def row(shown: str, name: str) -> int:
    """The line that begins with it; -1 for none."""
    lines = shown.splitlines()
    return next((n for n, line in enumerate(lines) if line.startswith(name)), -1)


def test_keys_change_what_is_shown(disks: GatewayProcess) -> None:
    with top(disks) as terminal:
        shown = terminal.wait_for(lambda text: "vm2" in text)
        assert row(shown, "NAME ") >= 0
        assert row(shown, "nnnn") > 0
        assert "3 disks, all is well" in shown
        terminal.type("i")
        terminal.wait_for(lambda text: "images:2.raw" in text)
        terminal.type("s")
        terminal.wait_for(lambda text: row(text, "images  ok") > 0)
        terminal.type("d>")
        terminal.wait_for(
            lambda text: row(text, "NAME^") >= 0 and 0 < row(text, "nnn") < row(text, "vm1")
        )
        terminal.type("r")
        terminal.wait_for(
            lambda text: row(text, "NAMEv") >= 0 and row(text, "vm2") < row(text, "vm1")
        )
        terminal.type("/VM2\r")
        terminal.wait_for(lambda text: row(text, "vm2") > 0 and row(text, "vm1") < 0)
        terminal.type("/\x1b")
        terminal.wait_for(lambda text: row(text, "vm1") > 0)
        terminal.type("x")
        terminal.wait_for(lambda text: "none that needs a look" in text)
        terminal.type("h")
        terminal.wait_for(lambda text: "space      look now" in text)
        terminal.type("hq")
        assert terminal.ended() == 0


def test_what_a_disk_does_is_shown(disks: GatewayProcess) -> None:
    with top(disks, "--sort", "rmb/s") as terminal:
        terminal.wait_for(lambda text: "vm2" in text)
        command = [
            "qemu-io",
            "-f",
            "raw",
            *(x for _ in range(200) for x in ("-c", "read 0 1M")),
            disks.uri("vm2"),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        terminal.wait_for(lambda text: re.search(r"^vm2 .* [1-9]\d*\.\d+ ", text, re.MULTILINE))
        assert row(terminal.shown, "vm2") == row(terminal.shown, "NAME") + 1
        SHOTS.mkdir(parents=True, exist_ok=True)
        (SHOTS / "top.svg").write_text(as_svg(terminal.screen))


def test_it_fits_whatever_the_size_becomes(disks: GatewayProcess) -> None:
    with top(disks) as terminal:
        terminal.wait_for(lambda text: "vm2" in text)
        terminal.resize(160, 30)
        terminal.wait_for(lambda text: "images:1.raw" in text)
        assert LONG[:24] in terminal.shown
        terminal.resize(40, 8)
        terminal.wait_for(lambda text: row(text, "NAME") >= 0 and "images:" not in text)
        assert row(terminal.shown, "q quit") == 7
        terminal.resize(10, 3)
        terminal.wait_for(lambda text: text.startswith("larger"))
        terminal.resize(80, 24)
        terminal.wait_for(lambda text: row(text, "vm2") > 0)
        assert row(terminal.shown, "q quit") == 23
        terminal.type("q")
        assert terminal.ended() == 0


def test_a_daemon_that_is_gone_is_told_and_what_was_known_stays(disks: GatewayProcess) -> None:
    with top(disks) as terminal:
        terminal.wait_for(lambda text: "vm2" in text)
        disks.kill()
        shown = terminal.wait_for(lambda text: "no daemon at" in text)
        assert row(shown, "vm2") > 0
        disks.start()
        terminal.wait_for(lambda text: "no daemon at" not in text and row(text, "vm2") > 0)
        terminal.type("q")
        assert terminal.ended() == 0


def test_it_may_be_started_before_the_daemon(gateway: GatewayProcess) -> None:
    gateway.kill()
    with top(gateway) as terminal:
        terminal.wait_for(lambda text: "no daemon at" in text)
        gateway.start()
        terminal.wait_for(lambda text: "0 disks, all is well" in text and "none yet" in text)
        terminal.type("q")
        assert terminal.ended() == 0


@pytest.mark.parametrize(
    "end", [lambda t: t.type("\x03"), lambda t: t.process.send_signal(signal.SIGTERM)]
)
def test_the_terminal_is_left_as_it_was(
    disks: GatewayProcess, end: Callable[[Terminal], object]
) -> None:
    with top(disks) as terminal:
        modes = termios.tcgetattr(terminal._ours)
        terminal.wait_for(lambda text: "vm2" in text)
        assert termios.tcgetattr(terminal._ours) != modes
        end(terminal)
        assert terminal.ended() == 0
        assert termios.tcgetattr(terminal._ours) == modes
        assert b"\x1b[?1049l" in terminal.raw


@pytest.mark.parametrize(
    ("more", "is_red"), [({}, True), ({"NO_COLOR": "1"}, False), ({"term": "vt100"}, False)]
)
def test_what_needs_a_look_is_told_and_red_where_colours_are_wanted(
    disks: GatewayProcess, more: dict[str, str], is_red: bool
) -> None:
    disks.allow_log("deleted or renamed")
    (disks.images / "0.raw").unlink()
    with top(disks, **more) as terminal:
        shown = terminal.wait_for(lambda text: "1 need a look" in text and "vm1: conflict" in text)
        assert row(shown, "vm1") == row(shown, "NAME") + 1
        terminal.type("x")
        terminal.wait_for(lambda text: row(text, "vm2") < 0 and row(text, "vm1") > 0)
        assert bool(re.search(rb"\x1b\[(\d+;)*3[0-7](;\d+)*m", terminal.raw)) == is_red


@pytest.mark.parametrize("term", ["dumb", "", "no-such-terminal"])
def test_a_terminal_that_can_do_little_gets_lines(disks: GatewayProcess, term: str) -> None:
    with top(disks, "-n", "2", term=term) as terminal:
        assert terminal.ended() == 0
        text = terminal.raw.decode()
    assert f"the terminal '{term}' cannot show more than lines" in text
    assert text.count("\nNAME") == 2
    assert "\x1b" not in text


def test_a_script_gets_tables_and_json(disks: GatewayProcess) -> None:
    done = disks.cli("top", "-n", "1", "-d", "100ms")
    assert (done.stderr, "\x1b" in done.stdout) == ("", False)
    assert LONG in done.stdout
    told = json.loads(disks.cli("top", "--json", "-n", "1", "-d", "100ms").stdout)
    assert {one["name"] for one in told["disks"]} == set(NAMES)


def test_the_picture_in_the_documentation_is_one_of_it() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/top.svg").read_text()
    assert "forebay top on" in text
    assert "<script" not in text
