# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""STATE is the daemon's user's: whatever that user plants there leads root's commands nowhere."""

import contextlib
import io
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import forebay.storage.upkeep
import forebay.storage.volumes
from forebay.cli.main import main
from real.gateway_process import GatewayProcess

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be more than another")

USER = 65534
"""The daemon's user: nobody."""

SECRET = b"root's\n"
LOADED = (forebay.storage.upkeep, forebay.storage.volumes)
"""What the commands import, so that a fork has it."""

UUID = "0b5cb6cd-2222-4333-8444-555555555555"


@dataclass
class World:
    """A host whose STATE is the daemon's user's, and a directory of root's with what that user wants."""

    gateway: GatewayProcess
    roots: Path

    @property
    def state(self) -> Path:
        return self.gateway.state

    @property
    def secret(self) -> Path:
        return self.roots / "secret"

    def as_user(self, *command: str) -> None:
        subprocess.run(
            command, user=USER, group=USER, extra_groups=[], cwd="/", check=True, timeout=60
        )

    def fill(self, before: Path) -> None:
        """Have in STATE what is in that directory, and nothing else."""
        shutil.rmtree(self.state)
        shutil.copytree(before, self.state)
        for path in (self.state, *self.state.rglob("*")):
            os.chown(path, USER, USER)

    def plant(self, how: str, where: str) -> None:
        """Put something of that kind at a path below STATE, as the user could."""
        path = self.state / where
        if path.parent.is_symlink() or not path.parent.is_dir():
            path.parent.mkdir()
            os.chown(path.parent, USER, USER)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if how == "hard link":  # where the kernel does not protect others' files
            os.link(self.secret, path)
            return
        if how == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(
                self.roots / {"link": "secret", "to nothing": "made", "to a directory": ""}[how]
            )
        os.chown(path, USER, USER, follow_symlinks=False)

    def quickly(self, *words: str) -> tuple[int, str]:
        """The same as `run`, in a fork of this process: exit code and stderr."""
        told = self.gateway.directory / "stderr"
        child = os.fork()
        if not child:
            code = 99
            with contextlib.suppress(BaseException), told.open("w") as sys.stderr:
                sys.stdout = io.StringIO()
                code = main([*words, "--config", str(self.gateway.config)])
            sys.stderr.close()
            os._exit(code)
        with os.fdopen(os.pidfd_open(child)) as ended:
            hung = not select.select([ended], [], [], 30)[0]
        if hung:
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told.read_text()

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.gateway.cli(*words, check=False, timeout=60)

    def check(self) -> None:
        """Nothing of root's has changed, and nothing was made there."""
        assert sorted(one.name for one in self.roots.iterdir()) == ["empty", "secret"]
        for path, content in ((self.secret, SECRET), (self.roots / "empty", b"")):
            found = path.stat()
            assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600)
            assert path.read_bytes() == content


@pytest.fixture
def world(make_stopped: Callable[[], GatewayProcess]) -> World:
    gateway = make_stopped()
    roots = gateway.directory / "roots"
    roots.mkdir()
    for name, content in (("secret", SECRET), ("empty", b"")):
        (roots / name).write_bytes(content)
        (roots / name).chmod(0o600)
    gateway.directory.chmod(0o755)
    gateway.state.mkdir(mode=0o700)
    os.chown(gateway.state, USER, USER)
    return World(gateway, roots)


@pytest.fixture
def make_stopped() -> Iterator[Callable[[], GatewayProcess]]:
    """Makes gateways whose daemon does not run."""
    made: list[GatewayProcess] = []

    def make() -> GatewayProcess:
        made.append(GatewayProcess({"cache": {"size": "4 MiB"}}))
        return made[-1]

    yield make
    for one in made:
        one.remove()


COMMANDS: dict[str, Sequence[str]] = {
    "create": ("cache", "create", "--file", "FILE", "--size", "4M"),
    "format": ("cache", "format", "--force"),
    "check": ("cache", "check"),
    "repair": ("cache", "repair", "--yes"),
    "extend": ("cache", "extend", "--size", "6M"),
    "remove": ("cache", "remove"),
}
CASES = (
    ("link", "lock"),
    ("link", "device.json.new"),
    ("link", "index/x"),
    ("link", "index/data.mdb"),
    ("to nothing", "cache.img.new"),
    ("to a directory", "index"),
    ("hard link", "lock"),
    ("pipe", "device.json"),
)
"""Kinds, and where."""


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_planted_leads_root_nowhere(world: World, command: str) -> None:
    """Every kind and every name, one after the other: the command ends, and nothing of root's is touched."""
    words = [str(world.gateway.directory / "file") if x == "FILE" else x for x in COMMANDS[command]]
    if command != "create":
        assert world.quickly("cache", "format", "--force") == (0, "")
    before = world.gateway.directory / "before"
    shutil.copytree(world.state, before)
    for how, name in CASES:
        world.fill(before)
        (world.gateway.directory / "file").unlink(missing_ok=True)
        world.plant(how, name)
        code, told = world.quickly(*words)
        assert code in (0, 1), (how, name, code, told)
        world.check()


def record(world: World, **keys: str) -> None:
    """A record of the cache's volume, as the user would have it."""
    text = json.dumps({"kind": "file", "path": "", "uuid": UUID, "state": "ready"} | keys)
    program = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
    world.as_user(sys.executable, "-c", program, str(world.state / "device.json"), text)


@pytest.mark.parametrize("name", ["secret", "empty", "made"])
@pytest.mark.parametrize("state", ["ready", "creating", "removing"])
@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_record_of_the_volume_is_no_order_to_root(
    world: World, name: str, state: str, kind: str
) -> None:
    for words in COMMANDS.values():
        record(world, path=str(world.roots / name), state=state, kind=kind)
        file = str(world.gateway.directory / "file")
        code, told = world.quickly(*(file if word == "FILE" else word for word in words))
        assert code in (0, 1), told
        world.check()


def test_a_state_that_its_owner_could_replace_by_another_is_refused(world: World) -> None:
    other = world.state / "deeper"
    world.as_user("ln", "-s", str(world.roots), str(other))
    world.gateway.configure({"gateway": {"state": str(other)}})
    done = world.run("cache", "format", "--force")
    assert done.returncode == 1
    world.check()
    world.as_user("rm", str(other))
    world.as_user("mkdir", str(other))
    assert world.run("cache", "format", "--force").returncode == 0
    assert (other / "index").stat().st_uid == USER


def test_the_process_that_a_daemon_names_is_ended_as_its_user(world: World) -> None:
    """`cache remove` ends the daemon, which says itself which process that is."""
    victim = subprocess.Popen(["sleep", "60"])
    program = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
sock.listen()
print(flush=True)
while True:
    one = sock.accept()[0]
    request = one.recv(65536)
    body = b'{"result": {"pid": %d}}\\n' % int(sys.argv[2])
    head = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/x-ndjson\\r\\nContent-Length: %d\\r\\n\\r\\n"
    one.sendall(head % len(body) + body)
    one.close()
"""
    world.gateway.run.mkdir()
    os.chown(world.gateway.run, USER, USER)
    path = str(world.gateway.control)
    daemon = subprocess.Popen(
        [sys.executable, "-c", program, path, str(victim.pid)],
        user=USER, group=USER, extra_groups=[], cwd="/", stdout=subprocess.PIPE,
    )  # fmt: skip
    assert daemon.stdout is not None
    try:
        daemon.stdout.readline()
        done = world.run("cache", "remove")
        assert done.returncode == 1
        assert "is another user's" in done.stderr
        assert victim.poll() is None
    finally:
        for one in (victim, daemon):
            one.kill()
            one.wait()
        daemon.stdout.close()


# ---------------------------------------------------------------------------------------------- whose the files are


def owners(directory: Path) -> set[int]:
    return {path.lstat().st_uid for path in directory.rglob("*")}


@pytest.mark.parametrize(
    "words",
    [
        ("cache", "create", "--vg", "nosuch", "--size", "1G"),
        ("cache", "create", "--file", "/nosuch/file", "--size", "4M"),
        ("cache", "create", "--device", "/dev/null", "--size", "4M"),
        ("cache", "format", "--force"),
        ("cache", "format"),
        ("cache", "check"),
        ("cache", "repair"),
        ("cache", "extend", "--size", "6M"),
        ("cache", "remove"),
        ("check-config",),
        ("status",),
    ],
    ids=" ".join,
)
def test_what_roots_command_leaves_is_the_daemons(world: World, words: Sequence[str]) -> None:
    world.run(*words)
    assert owners(world.state) <= {USER}
    assert world.run("cache", "format", "--force").returncode == 0
    world.run(*words)
    assert owners(world.state) <= {USER}


def test_a_file_for_the_cache_in_roots_directory_is_the_daemons(world: World) -> None:
    file = world.gateway.directory / "cache.img"
    done = world.run("cache", "create", "--file", str(file), "--size", "4M")
    assert done.returncode == 0, done.stderr
    found = file.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (USER, USER, 0o600)
    assert owners(world.state) == {USER}
    assert world.run("cache", "remove").returncode == 0
    assert not file.exists()


@pytest.mark.parametrize("name", ["index/data.mdb", "lock", "device.json", "cache.img", "index"])
def test_a_file_of_roots_is_named_at_the_start_and_what_to_do(world: World, name: str) -> None:
    assert world.run("cache", "format", "--force").returncode == 0
    path = world.state / name
    path.touch()
    path.chmod(0o700 if path.is_dir() else 0o600)
    os.chown(path, 0, 0)
    world.gateway.run.mkdir()
    os.chown(world.gateway.run, USER, USER)
    command = [sys.executable, "-m", "forebay", "serve", "--config", str(world.gateway.config)]
    done = subprocess.run(
        command,
        user=USER,
        group=USER,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"{path} belongs to user root, and this is user nobody" in last
    assert f"run 'chown -hR nobody: {world.state}' as root" in last


def test_root_does_not_run_the_daemon_on_anothers_state(world: World) -> None:
    done = world.run("serve")
    assert done.returncode == 1
    assert f"{world.state} belongs to user nobody" in done.stderr
    assert owners(world.state) == set()
