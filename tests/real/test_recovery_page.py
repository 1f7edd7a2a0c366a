# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""RECOVERY.md, followed to the letter: each procedure's commands are run as they stand there, and answer as it says.

A section's test prepares what went wrong, then plays the section's commands one after the other; what is left over at
the end, or a section without a test, fails. Paths and host names of the page are put in the place of the test's.
"""

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from real import fault_plants
from real.disk_fixture import ask, run, small_tmpfs, wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB

PAGE = Path(__file__).parents[2] / "RECOVERY.md"
SIZE = 4 * MIB

SLOW = {"defaults": {"max_lag": "1h"}}
"""What is dirty stays so until somebody asks, however long the machine takes for a test."""

MakeGateway = Callable[..., GatewayProcess]


@dataclass
class Step:
    """One command of the page: on which host (empty: the only one), what, and the lines it answers."""

    host: str
    command: str
    answer: list[str] = field(default_factory=list)


def sections() -> dict[str, list[Step]]:
    """The page's commands by heading, those without any left out."""
    found: dict[str, list[Step]] = {}
    heading, inside = "", False
    for line in PAGE.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```console"
        elif line.startswith("## "):
            heading = line.removeprefix("## ")
        elif inside:
            if prompt := re.match(r"(host\d)?# (.*)", line):
                found.setdefault(heading, []).append(Step(prompt[1] or "", prompt[2]))
            else:
                found[heading][-1].answer.append(line)
    return found


class Player:
    """Plays the steps of one section on `hosts`; a page that names none has one, called "" here."""

    def __init__(self, heading: str, hosts: dict[str, GatewayProcess]) -> None:
        self._steps = iter(sections()[heading])
        self._hosts = hosts
        self._waiting: subprocess.Popen[str] | None = None
        self._said = ""

    def play(self, *begins: str) -> None:
        """The next steps, whose commands begin so."""
        for text in begins:
            step = next(self._steps, None)
            assert step is not None, f"the page has no command '{text}' here"
            assert step.command.startswith(text), f"the page says '{step.command}', not '{text}'"
            self._one(step)

    def end(self) -> None:
        left = [step.command for step in self._steps]
        assert not left, f"the page has more commands: {left}"

    def _one(self, step: Step) -> None:
        gateway = self._hosts[step.host]
        command = step.command.replace("/mnt/nfs/images", str(gateway.images))
        command = command.replace("/etc/forebay/forebay.toml", str(gateway.config))
        code, text = self._run(gateway, command)
        for here, there in (
            (str(gateway.images), "/mnt/nfs/images"),
            (str(gateway.config), "/etc/forebay/forebay.toml"),
            (str(gateway.run), "/run/forebay"),
            (str(gateway.state), "/var/lib/forebay"),
            (f"host {socket.gethostname()}", "host host1"),
        ):
            text = text.replace(here, there)
        said = f"$ {step.command}\n{text}"
        fails = step.command.split()[0] != "journalctl" and _fails(step.answer)
        assert (code != 0) == fails, f"exit code {code}\n{said}"
        pattern = "\n".join(_pattern(line) for line in step.answer)
        assert re.fullmatch(pattern, _plain(text), re.DOTALL), f"not as the page says:\n{said}"

    def _run(self, gateway: GatewayProcess, command: str) -> tuple[int, str]:
        words = shlex.split(command)
        if words[0] == "forebay" and words[-1] == "&":
            arguments = [*words[1:-1], "--config", str(gateway.config)]
            self._waiting = subprocess.Popen(
                [sys.executable, "-m", "forebay", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            return 0, ""
        if words[0] == "wait":
            assert self._waiting is not None
            text, _ = self._waiting.communicate(timeout=60)
            return self._waiting.returncode, self._said + text
        if words[0] == "forebay":
            done = gateway.cli(*words[1:], check=False)
            return done.returncode, done.stdout + done.stderr
        if words[0] == "systemctl":
            return _service(gateway, words[1])
        if words[0] == "journalctl":
            return 0, gateway.log_text().splitlines()[-1]
        done = run("sh", "-c", command, check=False)
        return done.returncode, done.stdout + done.stderr

    def wait_until_it_waits(self) -> None:
        """Until the command in the background has said whom it waits for."""
        assert self._waiting is not None
        assert self._waiting.stdout is not None
        self._said = self._waiting.stdout.readline()

    def close(self) -> None:
        if self._waiting is not None and self._waiting.poll() is None:
            self._waiting.kill()
            self._waiting.communicate()


def _fails(answer: list[str]) -> bool:
    """Whether a command that answers so ends with an exit code above 0."""
    return any(re.match(r"forebay: (?!waiting)|Job for", line) for line in answer)


def _service(gateway: GatewayProcess, verb: str) -> tuple[int, str]:
    """What the unit does, and what systemctl says."""
    if verb in ("stop", "restart") and gateway.alive:
        assert gateway.stop() == 0
    if verb in ("start", "restart"):
        try:
            gateway.start()
        except RuntimeError:
            return 1, "Job for forebay.service failed because ..."
    return 0, ""


def _plain(text: str) -> str:
    """Lines without the spaces that only align them, and without what depends on the libvirt of this host."""
    text = re.sub(r"(?m)^forebay: warning: libvirt .*\n?", "", text)
    return "\n".join(
        re.sub(r"(?<=\S) +", " ", line.rstrip()) for line in text.strip("\n").split("\n")
    )


def _pattern(line: str) -> str:
    return ".*" if line == "..." else ".*".join(map(re.escape, _plain(line).split("...")))


# ----------------------------------------------------------------------------------------------------- the procedures


@pytest.fixture
def hosts(make_gateway: MakeGateway) -> Callable[..., dict[str, GatewayProcess]]:
    """Two that see one store; both may say what they like in their logs."""

    def make() -> dict[str, GatewayProcess]:
        one, other = make_gateway(SLOW), make_gateway(start=False)
        other.configure({**SLOW, "stores.images": {"path": str(one.images)}})
        other.images = one.images
        other.start()
        for gateway in (one, other):
            gateway.allow_log(".*")
        return {"host1": one, "host2": other}

    return make


@pytest.fixture
def host(make_gateway: MakeGateway) -> GatewayProcess:
    gateway = make_gateway(SLOW)
    gateway.allow_log(".*")
    return gateway


def dirty(gateway: GatewayProcess, *, attach: bool = True) -> None:
    """Disk vm1: written back once, and written to again."""
    if attach:
        (gateway.images / "vm1.raw").write_bytes(b"o" * SIZE)
        gateway.attach("vm1", "vm1.raw", mode="write-back")
    write(gateway, 1)
    gateway.cli("flush", "vm1")
    write(gateway, 2)


def write(gateway: GatewayProcess, what: int, length: str = "64k") -> None:
    commands = ("-c", f"write -P {what} 0 {length}", "-c", "flush")
    run("qemu-io", "-f", "raw", *commands, gateway.uri("vm1"))


def reads(gateway: GatewayProcess, what: int) -> None:
    """What vm1 has at its start."""
    run("qemu-io", "-r", "-f", "raw", "-c", f"read -P {what} 0 64k", gateway.uri("vm1"))


@pytest.fixture
def player(request: pytest.FixtureRequest) -> Iterator[Callable[..., Player]]:
    """`player(hosts)`, for the section whose heading is the test's name."""
    heading = request.node.name.removeprefix("test_").replace("_", " ").capitalize()
    made: list[Player] = []

    def make(hosts: dict[str, GatewayProcess]) -> Player:
        made.append(Player(heading, hosts))
        return made[-1]

    yield make
    for one in made:
        one.close()


Make = Callable[[dict[str, GatewayProcess]], Player]


def test_the_host_is_gone(hosts: Callable[..., dict[str, GatewayProcess]], player: Make) -> None:
    both = hosts()
    page = player(both)
    dirty(both["host1"])
    both["host1"].kill()
    page.play("forebay attach", "forebay recover", "forebay takeover", "forebay takeover")
    page.play("forebay attach")
    reads(both["host2"], 1)
    write(both["host2"], 3)
    both["host2"].cli("flush", "vm1")
    both["host1"].start()
    page.play("forebay status", "forebay detach")
    assert (both["host1"].images / "vm1.raw").read_bytes()[:1] == b"\3"
    page.end()


def test_the_cache_disk_is_gone(host: GatewayProcess, player: Make) -> None:
    page = player({"": host})
    dirty(host)
    host.kill()
    (host.state / "cache.img").unlink()
    page.play("systemctl start", "journalctl", "forebay cache format", "systemctl start")
    page.play("ls", "forebay takeover", "forebay attach")
    reads(host, 1)
    page.end()


def test_the_store_is_full(make_gateway: MakeGateway, player: Make, tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "store", 8 * MIB) as store:
        host = make_gateway({**SLOW, "stores.images": {"path": str(store)}})
        host.allow_log(".*")
        host.images = store
        try:
            page = player({"": host})
            dirty(host)
            (store / "old.raw").write_bytes(bytes(8 * MIB - SIZE - 64 * 1024))
            write(host, 3, "1M")
            page.play(
                "forebay flush", "forebay status", "df", "rm", "forebay flush", "forebay status"
            )
            assert (store / "vm1.raw").read_bytes()[:MIB] == b"\3" * MIB
            page.end()
        finally:
            host.kill()


def test_the_image_changed(host: GatewayProcess, player: Make) -> None:
    page = player({"": host})
    path = host.images / "vm1.raw"
    dirty(host)
    host.stop()
    path.write_bytes(b"n" * SIZE)
    host.start()
    page.play("forebay status", "forebay resolve", "forebay resolve")
    assert (host.images / "rescued.raw").read_bytes() == b"\2" * 65536 + bytes(SIZE - 65536)
    page.play("forebay resolve", "forebay resolve", "forebay status")
    reads(host, 2)
    assert path.read_bytes() == b"\2" * 65536 + b"n" * (SIZE - 65536)
    write(host, 3)
    host.stop()
    path.write_bytes(b"n" * SIZE)
    host.start()
    page.play("forebay resolve", "forebay resolve")
    reads(host, ord("n"))
    # The second half: another file in its place.
    dirty(host, attach=False)
    path.rename(host.images / "vm1.old")
    path.write_bytes(b"w" * SIZE)
    wait_for(lambda: ask(host, "/disks/vm1")["state"] == "conflict", "not noticed", 60)
    page.play("forebay status", "mv", "mv", "systemctl restart", "forebay flush")
    assert path.read_bytes() == b"\2" * 65536 + b"n" * (SIZE - 65536)
    assert (host.images / "wrong.raw").read_bytes() == b"w" * SIZE
    page.end()


def test_a_disk_has_stopped(make_gateway: MakeGateway, player: Make) -> None:
    host = make_gateway({"defaults": {"max_lag": "2s"}}, start=False)
    host.allow_log(".*")
    page = player({"": host})
    armed = host.directory / "armed"
    planted = [str(Path(fault_plants.__file__)), "write-back", str(armed)]

    def stop_disk(what: int) -> None:
        armed.write_text(fault_plants.ALWAYS)
        write(host, what)
        wait_for(lambda: ask(host, "/disks/vm1")["state"] == "stopped", "it is not stopped", 60)

    host.start(planted)
    dirty(host)
    stop_disk(3)
    page.play("forebay status", "systemctl restart", "forebay status")
    reads(host, 3)
    host.cli("flush", "vm1")
    host.stop()
    armed.unlink()
    host.start(planted)
    stop_disk(4)
    page.play("forebay detach", "forebay detach")
    assert (host.images / "vm1.raw").read_bytes()[:1] == b"\3"
    page.end()


def test_two_hosts_want_it(hosts: Callable[..., dict[str, GatewayProcess]], player: Make) -> None:
    both = hosts()
    page = player(both)
    dirty(both["host1"])
    page.play("forebay attach", "forebay attach")
    page.wait_until_it_waits()
    page.play("forebay detach", "wait")
    reads(both["host2"], 2)
    page.end()


def test_the_daemon_does_not_start(host: GatewayProcess, player: Make) -> None:
    page = player({"": host})
    host.stop()
    host.configure({"defaults": {"mode": "write-bakc"}})
    page.play("systemctl start", "journalctl", "forebay check-config", "sed")
    page.play("forebay check-config", "systemctl start")
    page.end()


def test_the_index_is_damaged(host: GatewayProcess, player: Make) -> None:
    page = player({"": host})
    content = b"golden! " * (SIZE // 8)
    (host.images / "base.raw").write_bytes(content)
    host.attach("base", "base.raw", "--read-only")
    run("qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", host.uri("base"))
    dirty(host)
    host.cli("mode", "base", "write-around")  # what was read is on record with that
    host.stop()
    device = host.state / "cache.img"
    with device.open("r+b") as file:
        file.seek(device.read_bytes().index(b"golden! " * 512))
        file.write(b"tarnish!")
    page.play(
        "systemctl stop", "forebay cache check", "forebay cache repair", "forebay cache check"
    )
    page.play("systemctl start")
    reads(host, 2)
    host.kill()
    index = host.state / "index" / "data.mdb"
    index.write_bytes(b"\xff" * index.stat().st_size)
    page.play("systemctl start", "forebay cache check", "forebay cache format")
    page.play("forebay takeover", "systemctl start", "forebay attach")
    page.end()


@pytest.mark.parametrize("heading", sections())
def test_each_section_with_commands_is_followed(heading: str) -> None:
    assert f"test_{heading.lower().replace(' ', '_')}" in globals()


def test_the_page_leads_to_its_sections() -> None:
    text = PAGE.read_text()
    anchors = {
        re.sub(r"[^a-z -]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"(?m)^## (.*)$", text)
    }
    assert anchors == set(re.findall(r"\]\(#([^)]*)\)", text))
    for target in re.findall(r"\]\(([^#)]+)\)", text):
        assert (PAGE.parent / target).exists(), target
    assert "(RECOVERY.md)" in (PAGE.parent / "README.md").read_text()
