# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Whatever is given to it wrongly: one line that says what and what to do, exit code 1 or 2, nothing changed."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from real.disk_fixture import ask, cache_info, run, small_tmpfs, wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, NbdServer, accepts, loop_device, need, random_image

Connect = Callable[..., Any]
MakeGateway = Callable[..., GatewayProcess]
Done: TypeAlias = "subprocess.CompletedProcess[str]"

SIZE = 2 * MIB
SMALL = {"cache": {"size": "16 MiB"}}
"""What is compared byte by byte."""


def one_line(done: Done, *says: str) -> None:
    assert done.returncode in (1, 2), (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout, done.stdout
    assert len(done.stderr) < 500, "a line is something a person reads"
    for text in says:
        assert text in done.stderr, (text, done.stderr)


def files(directory: Path) -> dict[str, Any]:
    """Everything below a directory: what it is, and what is in it."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name, status = str(path.relative_to(directory)), path.lstat()
        found[name] = (status.st_mode, status.st_size, status.st_mtime_ns)
        if path.is_file() and not path.is_symlink():
            found[name] += (hashlib.sha256(path.read_bytes()).hexdigest(),)
    return found


def state_files(gateway: GatewayProcess) -> dict[str, Any]:
    """What a start that is refused must leave as it was; that it took its locks may show."""
    found = files(gateway.state)
    return {name: found[name] for name in ("cache.img", "index/data.mdb") if name in found}


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def busy() -> Iterator[GatewayProcess]:
    """A daemon with a disk `d` on a.raw, and beside it all that must not be served."""
    gateway = GatewayProcess()
    try:
        images = gateway.images
        for name in ("a.raw", "b.raw"):
            random_image(images / name, SIZE, 1)
        outside = gateway.directory / "outside"
        outside.mkdir()
        random_image(outside / "secret.raw", SIZE, 2)
        (images / "out").symlink_to(outside)
        (images / "out.raw").symlink_to(outside / "secret.raw")
        (images / "folder").mkdir()
        (images / "folder" / "up.raw").symlink_to("../../outside/secret.raw")
        (images / "dangling.raw").symlink_to("nowhere")
        (images / "empty.raw").touch()
        os.mkfifo(images / "pipe.raw")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(images / "socket.raw"))
        gateway.start()
        gateway.attach("d", "a.raw", mode="write-back")
        yield gateway
        assert gateway.stop() == 0
        assert not gateway.unexpected_log()
    finally:
        gateway.remove()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        # sizes and times
        (["attach", "x", "images:b.raw", "--cache-size", "12X"], "12X"),
        (["attach", "x", "images:b.raw", "--cache-size", "-1"], "-1"),
        (["attach", "x", "images:b.raw", "--cache-size", "1.5.2G"], "1.5.2G"),
        (["attach", "x", "images:b.raw", "--cache-size", ""], "size"),
        (["attach", "x", "images:b.raw", "--preload", "some"], "some"),
        (["preload", "d", "9" * 60], "9"),
        (["flush", "d", "--timeout", "soon"], "soon"),
        (["stats", "d", "-3"], "-3"),
        # names
        (["attach", "", "images:b.raw"], "name"),
        (["attach", "../x", "images:b.raw"], "../x"),
        (["attach", "-x", "images:b.raw"], "name"),
        (["attach", "x/y", "images:b.raw"], "x/y"),
        (["attach", "x\ny", "images:b.raw"], "x"),
        (["attach", "x" * 65, "images:b.raw"], "64"),
        (["attach", "é", "images:b.raw"], "é"),
        (["attach", "d", "images:b.raw"], "detach it"),
        (["status", "e"], "no disk 'e'"),
        (["flush", "e"], "no disk 'e'"),
        (["mode", "e", "none"], "no disk 'e'"),
        (["detach", "e"], "no disk 'e'"),
        (["preload", "e", "all"], "no disk 'e'"),
        (["xml", "e"], "no disk 'e'"),
        (["xml", "d", "--target", 'vda"/><x'], "target"),
        # modes
        (["attach", "x", "images:b.raw", "--mode", "write-bakc"], "write-back"),
        (["mode", "d", "fast"], "fast"),
        (["mode", "d", ""], "mode"),
        # images
        (["attach", "x", "images:c.raw"], "no such image"),
        (["attach", "x", "images:"], "directory"),
        (["attach", "x", "images:/etc/passwd"], "out of its store"),
        (["attach", "x", "images:../outside/secret.raw"], "out of its store"),
        (["attach", "x", "images:folder/../../outside/secret.raw"], "out of its store"),
        (["attach", "x", "/etc/passwd"], ""),
        (["attach", "x", "images:out.raw"], "symbolic link"),
        (["attach", "x", "images:out/secret.raw"], "symbolic link"),
        (["attach", "x", "images:folder/up.raw"], "symbolic link"),
        (["attach", "x", "images:dangling.raw"], "symbolic link"),
        (["attach", "x", "images:folder"], "directory"),
        (["attach", "x", "images:empty.raw"], "empty"),
        (["attach", "x", "images:pipe.raw"], "regular file"),
        (["attach", "x", "images:socket.raw"], ""),
        (["attach", "x", "images:b.raw/more"], "no such image"),
        (["attach", "x", "images:" + "y" * 300], "no such image"),
        (["attach", "x", "image:b.raw"], "images"),
        (["attach", "x", ""], "empty"),
        (["attach", "x", "images:a.raw"], "'d'"),
        (["attach", "x", "images:a.raw.forebay/owner"], "own files"),
        (["attach", "x", "nbd://"], "NBD URI"),
        (["attach", "x", "nbd://host:port/x"], "NBD URI"),
        (["attach", "x", "nbd+unix:///x"], "socket"),
        (["attach", "x", "nbd+unix:///x?socket=/none/none"], "/none/none"),
        (["attach", "x", "nbd://127.0.0.1:1/x"], "127.0.0.1"),
        (["attach", "x", "nbds://host/x"], "nbds"),
        (["attach", "x", "http://host/x"], ""),
        (["attach", "x", "images:b.raw", "--overlay", "--read-only"], "overlay"),
        # the command itself
        ([], "COMMAND"),
        (["attahc"], "attach"),
        (["attach", "x"], "IMAGE"),
        (["status", "d", "e"], "e"),
        (["flush", "d", "--all"], "--all"),
        (["cache", "clean"], "clean"),
        (["cache", "format"], ""),  # the daemon runs
        (["cache", "format", "--force"], ""),
        (["serve", "--state"], "--state"),
    ],
    ids=lambda words: "-".join(words)[:60].replace("\n", "\\n") if isinstance(words, list) else "",
)
def test_a_wrong_command_is_one_line(busy: GatewayProcess, words: list[str], says: str) -> None:
    def everything() -> Any:
        run = {
            k: v
            for k, v in files(busy.run).items()
            if not k.startswith(("peers", "stores", "processes"))
        }
        return files(busy.images), run, ask(busy, "/disks"), cache_info(busy)

    before = everything()
    one_line(busy.cli(*words, check=False), says)
    assert everything() == before
    assert busy.alive


# ----------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[gateway\n", "forebay.toml"),
        (b"\xff\xfe", "forebay.toml"),
        (b"\0", "forebay.toml"),
        (b"[cache]\nsize = '12 XB'\n", "cache.size"),
        (b"[cache]\nsiez = '1G'\n", "size"),
        (b"[cahce]\nsize = '1G'\n", "cache"),
        (b"[defaults]\nmode = 'fast'\n", "defaults.mode"),
        (b"[defaults]\nmax_lag = 'later'\n", "max_lag"),
        (b"[gateway]\nsocket_mode = '0999'\n", "socket_mode"),
        (b"[gateway]\nstate = 'relative'\n", "state"),
        (b"[stores.images]\nmode = 'none'\n", "path"),
        (b"gateway = 3\n", "gateway"),
    ],
)
def test_a_wrong_configuration_is_one_line(
    make_gateway: MakeGateway, text: bytes, says: str
) -> None:
    gateway = make_gateway(start=False)
    before = files(gateway.directory)
    gateway.config.write_bytes(text)
    for command in ("serve", "check-config", "dump-config") if says == "cache.size" else ("serve",):
        one_line(gateway.cli(command, check=False, timeout=30), says)
    gateway.config.unlink()
    del before["forebay.toml"]
    assert files(gateway.directory) == before


def test_every_fault_of_a_configuration_is_told(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(start=False)
    text = b"[cache]\nsize = 'x'\nblok_size = 1\n[defaults]\nmode = 'y'\n[stores.a]\n"
    gateway.config.write_bytes(text)
    done = gateway.cli("serve", check=False, timeout=30)
    assert done.returncode in (1, 2)
    lines = done.stderr.splitlines()
    for path in ("cache.size", "cache.blok_size", "defaults.mode", "stores.a.path"):
        assert sum(path in line for line in lines) == 1, (path, lines)


def test_a_configuration_that_cannot_be_read_is_one_line(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(start=False)
    gateway.config.unlink()
    for command in ("serve", "status", "check-config"):
        one_line(gateway.cli(command, check=False), "forebay.toml")
    gateway.config.mkdir()
    for command in ("serve", "status", "check-config"):
        one_line(gateway.cli(command, check=False), "forebay.toml")
    gateway.config.rmdir()
    assert os.listdir(gateway.directory) == ["images"]


def test_a_configuration_of_somebody_else_is_one_line(make_gateway: MakeGateway) -> None:
    if os.getuid() != 0:
        pytest.skip("becoming a user who may not read it needs root")
    need("setpriv")
    gateway = make_gateway(start=False)
    gateway.directory.chmod(0o755)
    gateway.config.chmod(0o600)
    command = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-m", "forebay"]
    probe = run(*command, "--version", check=False)
    if probe.returncode:
        pytest.skip("nobody else may run this interpreter")
    for words in (["serve"], ["status"], ["check-config"]):
        done = run(*command, *words, "--config", gateway.config, check=False)
        one_line(done, "forebay.toml")


# --------------------------------------------------------------------------------------- state and device


def test_a_second_daemon_is_refused_whatever_it_shares(
    gateway: GatewayProcess, make_gateway: MakeGateway, connect: Connect
) -> None:
    content = random_image(gateway.images / "a.raw", SIZE, 1)
    gateway.attach("d", "a.raw", mode="write-back")
    pid = str(gateway.pid)
    state, runtime = str(gateway.state), str(gateway.run)
    device = str(gateway.state / "cache.img")
    for section, values, says in (
        ("gateway", {"state": state}, pid),
        ("gateway", {"run": runtime}, pid),
        ("cache", {"device": device}, device),
    ):
        second = make_gateway({section: values}, start=False)
        one_line(second.cli("serve", check=False, timeout=30), says)
        if section == "cache":
            for force in ([], ["--force"]):
                one_line(second.cli("cache", "format", *force, check=False), device)
    assert accepts(gateway.sock("d"))
    assert connect(gateway.uri("d")).pread(SIZE, 0) == content
    gateway.restart()
    assert connect(gateway.uri("d")).pread(SIZE, 0) == content


FOREIGN = {
    "text": b"the only copy of something\n" * 400,
    "gpt": bytes(512) + b"EFI PART" + bytes(8192),
    "zeros with one byte": bytes(MIB // 2) + b"\1",
    "at the end": bytes(20 * MIB - 1) + b"\1",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_with_foreign_content_is_refused(
    what: str, make_gateway: MakeGateway, tmp_path: Path
) -> None:
    device = tmp_path / "cache"
    device.write_bytes(FOREIGN[what].ljust(20 * MIB, b"\0"))
    before = files(tmp_path)
    gateway = make_gateway({"cache": {"device": str(device)}}, start=False)
    one_line(gateway.cli("serve", check=False, timeout=30), str(device))
    one_line(gateway.cli("cache", "format", check=False), str(device), "--force")
    assert files(tmp_path) == before
    assert "cache.img" not in state_files(gateway)


def test_a_file_with_foreign_content_in_its_middle_is_refused(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    device = tmp_path / "cache"
    device.write_bytes((bytes(3 * MIB) + b"x" * 4096).ljust(20 * MIB, b"\0"))
    before = files(tmp_path)
    gateway = make_gateway({"cache": {"device": str(device)}}, start=False)
    one_line(gateway.cli("cache", "format", check=False), str(device), "--force")
    assert files(tmp_path) == before


def test_format_with_force_takes_a_foreign_device(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    device = tmp_path / "cache"
    device.write_bytes(FOREIGN["text"].ljust(20 * MIB, b"\0"))
    gateway = make_gateway({"cache": {"device": str(device)}}, start=False)
    gateway.cli("cache", "format", "--force")
    gateway.start()
    assert cache_info(gateway)["device"] == str(device)


def test_a_file_system_on_the_device_is_refused(make_gateway: MakeGateway, tmp_path: Path) -> None:
    need("mkfs.ext4")
    backing = tmp_path / "disk"
    with backing.open("wb") as file:
        file.truncate(32 * MIB)
    run("mkfs.ext4", "-q", backing)
    with loop_device(backing, 512) as device:
        before = backing.read_bytes()
        gateway = make_gateway({"cache": {"device": str(device)}}, start=False)
        one_line(gateway.cli("serve", check=False, timeout=30), str(device))
        one_line(gateway.cli("cache", "format", check=False), str(device), "--force")
        mounted = tmp_path / "mounted"
        mounted.mkdir()
        if run("mount", device, mounted, check=False).returncode == 0:
            try:
                one_line(gateway.cli("cache", "format", "--force", check=False), str(device))
            finally:
                run("umount", mounted)
        else:
            assert backing.read_bytes() == before
    assert "cache.img" not in state_files(gateway)


def test_a_device_that_shrank_is_refused_and_works_again_when_it_is_whole(
    make_gateway: MakeGateway, connect: Connect
) -> None:
    gateway = make_gateway(SMALL)
    content = random_image(gateway.images / "a.raw", SIZE, 1)
    gateway.attach("d", "a.raw", mode="write-back")
    client = connect(gateway.uri("d"))
    client.pread(SIZE, 0)
    client.pwrite(b"x" * 4096, 0)
    gateway.stop()
    device = gateway.state / "cache.img"
    whole = gateway.directory / "whole"
    shutil.copy(device, whole)
    for size in (device.stat().st_size // 2 + 4096, 4096, 0):
        os.truncate(device, size)
        before = state_files(gateway)
        one_line(gateway.cli("serve", check=False, timeout=30), str(device))
        assert state_files(gateway) == before
    shutil.copy(whole, device)
    gateway.start()
    assert connect(gateway.uri("d")).pread(SIZE, 0) == b"x" * 4096 + content[4096:]


def test_a_device_of_another_index_is_refused(make_gateway: MakeGateway, connect: Connect) -> None:
    """The LV of another instance: its data is not this index's, and this index is not given up for it."""
    first, second = make_gateway(SMALL), make_gateway(SMALL)
    for gateway in (first, second):
        random_image(gateway.images / "a.raw", SIZE, 1)
        gateway.attach("d", "a.raw", mode="write-back")
        connect(gateway.uri("d")).pwrite(b"x" * 4096, 0)
        gateway.stop()
    first.configure({"cache": {"device": str(second.state / "cache.img")}})
    before = state_files(first), state_files(second)
    one_line(first.cli("serve", check=False, timeout=30), str(second.state / "cache.img"))
    assert (state_files(first), state_files(second)) == before
    first.configure({})
    for gateway in (first, second):
        gateway.start()
        assert connect(gateway.uri("d")).pread(4096, 0) == b"x" * 4096


def test_a_device_that_is_gone_is_one_line_and_no_file_in_its_place(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    gateway = make_gateway({"cache": {"device": "/dev/forebay-none"}}, start=False)
    one_line(gateway.cli("serve", check=False, timeout=30), "/dev/forebay-none")
    assert not Path("/dev/forebay-none").exists()
    gateway.configure({"cache": {"device": str(tmp_path)}})
    one_line(gateway.cli("serve", check=False, timeout=30), str(tmp_path))
    gateway.configure({"cache": {"device": "/dev/null"}})
    one_line(gateway.cli("serve", check=False, timeout=30), "/dev/null")


@pytest.mark.parametrize("room", [0, 64 << 10, 600 << 10])
def test_a_full_disk_under_the_state_is_one_line(
    make_gateway: MakeGateway, short_path: Path, room: int
) -> None:
    with small_tmpfs(short_path / "small", MIB) as small:
        (small / "ballast").write_bytes(bytes(MIB - room - 4096 * 3))
        (small / "state").mkdir()
        gateway = make_gateway({"gateway": {"state": str(small / "state")}}, start=False)
        one_line(gateway.cli("serve", check=False, timeout=30), str(small))
        (small / "ballast").unlink()


def test_an_image_in_another_gateways_hands_is_refused(
    gateway: GatewayProcess, make_gateway: MakeGateway, connect: Connect
) -> None:
    random_image(gateway.images / "a.raw", SIZE, 1)
    other = make_gateway({"stores.images": {"path": str(gateway.images)}})
    gateway.attach("d", "a.raw", mode="write-back")
    connect(gateway.uri("d")).pwrite(b"x" * 4096, 0)
    before = files(gateway.images)
    for options in ([], ["--overlay"], ["--mode", "none"]):
        done = other.cli("attach", "mine", "images:a.raw", *options, check=False)
        one_line(done, socket.gethostname(), "'d'", "detach")
    gateway.kill()
    one_line(other.cli("attach", "mine", "images:a.raw", check=False), "'d'")
    assert files(gateway.images) == before
    assert json.loads(other.cli("status", "--json").stdout) == []


def test_an_nbd_origin_that_may_not_be_used_is_refused(
    start_nbdkit: Callable[..., NbdServer], make_gateway: MakeGateway
) -> None:
    gateway = make_gateway({"origins": {"nbd": [], "devices": []}})
    server = start_nbdkit("memory", "1M")
    one_line(gateway.cli("attach", "x", server.uri, check=False), "[origins]")
    one_line(gateway.cli("attach", "x", "/dev/null", check=False), "[origins]")


# ------------------------------------------------------------------------------------------ hostile clients

NEGOTIATED = b"NBDMAGIC" + b"IHAVEOPT"


class Raw:
    """An NBD client by hand, as far as it is told to go."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))

    def negotiate(self) -> None:
        """Fixed newstyle and NBD_OPT_EXPORT_NAME (NBD protocol, "Fixed newstyle negotiation")."""
        assert self.receive(18)[:16] == NEGOTIATED
        self.sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
        self.receive(10)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length and (part := self.sock.recv(length - len(data))):
            data += part
        return data

    def send(
        self, command: int, offset: int, length: int, data: bytes = b"", flags: int = 0
    ) -> None:
        header = struct.pack(">IHHQQI", 0x25609513, flags, command, 7, offset, length)
        self.sock.sendall(header + data)

    def is_hung_up_on(self) -> bool:
        """Whether the server ended it, in the time of the socket's time-out."""
        with contextlib.suppress(ConnectionError):
            while self.sock.recv(1 << 16):
                pass
        return True


@pytest.fixture
def hostile(gateway: GatewayProcess) -> Iterator[Callable[[], Raw]]:
    """`hostile()`: one more hand-made client of the disk `d`, whose image is a.raw."""
    random_image(gateway.images / "a.raw", SIZE, 1)
    gateway.attach("d", "a.raw", mode="write-back")
    made: list[Raw] = []

    def make() -> Raw:
        made.append(Raw(gateway.sock("d")))
        return made[-1]

    yield make
    for raw in made:
        raw.sock.close()


def test_garbage_ends_its_own_connection_only(
    gateway: GatewayProcess, hostile: Callable[[], Raw], connect: Connect, rng: Any
) -> None:
    gateway.allow_log("protocol|magic|flags|option")
    content = (gateway.images / "a.raw").read_bytes()
    good = connect(gateway.uri("d"))
    for garbage in (
        b"GET / HTTP/1.1\r\n\r\n" * 9,
        bytes(1 << 16),
        b"\xff" * 300,
        rng.randbytes(999),
    ):
        early, late = hostile(), hostile()
        with contextlib.suppress(ConnectionError):
            early.sock.sendall(garbage)
        assert early.is_hung_up_on()
        late.negotiate()
        with contextlib.suppress(ConnectionError):
            late.sock.sendall(garbage)
        assert late.is_hung_up_on()
        assert good.pread(SIZE, 0) == content
    wait_for(lambda: gateway.status("d")["clients"] == 1, "hostile clients are still counted")


def test_a_client_that_stops_half_way_keeps_nobody_waiting(
    gateway: GatewayProcess, hostile: Callable[[], Raw], connect: Connect
) -> None:
    """In the greeting, in an option, in a request, in the data of a write. Nothing of it happens."""
    content = (gateway.images / "a.raw").read_bytes()
    greeting, option, request, data = hostile(), hostile(), hostile(), hostile()
    greeting.sock.sendall(b"\0\0")
    option.receive(18)
    option.sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, 4000) + b"x" * 10)
    request.negotiate()
    request.sock.sendall(struct.pack(">IHH", 0x25609513, 0, 1))
    data.negotiate()
    data.send(1, 0, MIB, b"x" * (MIB // 2))
    good = connect(gateway.uri("d"))
    assert good.pread(SIZE, 0) == content
    good.pwrite(b"y" * 4096, MIB)
    good.flush()
    for raw in (greeting, option, request, data):
        raw.sock.close()
    assert good.pread(MIB, 0) == content[:MIB], "half a write is no write"
    wait_for(lambda: gateway.status("d")["clients"] == 1, "gone clients are still counted")
    gateway.cli("detach", "d", "--force")


def test_a_client_that_never_reads_its_replies_costs_little(
    gateway: GatewayProcess, hostile: Callable[[], Raw], connect: Connect
) -> None:
    """It asks for 16 GiB; the daemon neither keeps them nor stops for others, nor grows without bound."""
    content = (gateway.images / "a.raw").read_bytes()
    good = connect(gateway.uri("d"))
    assert good.pread(SIZE, 0) == content
    before = memory(gateway)
    for _ in range(4):
        raw = hostile()
        raw.negotiate()
        raw.sock.setblocking(False)
        request = struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, SIZE)
        with contextlib.suppress(BlockingIOError):
            for _ in range(2000):
                raw.sock.send(request)
    for _ in range(20):
        assert good.pread(SIZE, 0) == content
    good.pwrite(b"z" * SIZE, 0)
    assert good.pread(SIZE, 0) == b"z" * SIZE
    assert memory(gateway) - before < 200 * MIB
    gateway.allow_log("stall|slow")


def memory(gateway: GatewayProcess) -> int:
    """Bytes that are the daemon's alone: what it maps of the cache file is the page cache's."""
    text = Path(f"/proc/{gateway.pid}/status").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) << 10


def test_requests_that_cannot_be_are_answered_with_errors(
    gateway: GatewayProcess, hostile: Callable[[], Raw]
) -> None:
    """Beyond the end, unknown, with unknown flags: an error each (EINVAL 22, ENOSPC 28), and the next is served."""
    content = (gateway.images / "a.raw").read_bytes()
    raw = hostile()
    raw.negotiate()

    def error() -> int:
        magic, number, handle = struct.unpack(">IIQ", raw.receive(16))
        assert (magic, handle) == (0x67446698, 7)
        return int(number)

    for command, offset, length, data, flags in (
        (0, SIZE - 10, 11, b"", 0),
        (0, 1 << 63, 512, b"", 0),
        (0, (1 << 64) - 1, 2, b"", 0),
        (1, SIZE - 10, 11, b"x" * 11, 0),
        (1, (1 << 64) - 512, 512, b"x" * 512, 0),
        (4, SIZE, 1, b"", 0),
        (6, 0, SIZE + 1, b"", 0),
        (99, 0, 0, b"", 0),
        (0, 0, 4096, b"", 0x8000),
    ):
        raw.send(command, offset, length, data, flags)
        assert error() in (22, 28), (command, offset, length)
    raw.send(0, 100, 50)
    assert error() == 0
    assert raw.receive(50) == content[100:150]
    raw.send(2, 0, 0)
    assert raw.is_hung_up_on()
    assert gateway.status("d")["dirty_bytes"] == 0
