# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The daemon's wiring: start and end, sockets, disks that come back, and who may have an image."""

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import forebay_fast
from real.gateway_process import GatewayProcess
from real.processes import MIB, ONE_THREAD, NbdServer, loop_device, need, random_image

MakeGateway = Callable[..., GatewayProcess]
Connect = Callable[..., Any]
SIZE = 4 * MIB


@pytest.fixture
def content(gateway: GatewayProcess) -> bytes:
    return random_image(gateway.images / "a.raw", SIZE, seed=1)


def one_line(done: "subprocess.CompletedProcess[str]", *says: str, code: int = 1) -> None:
    """The command failed as it should: with this exit code, and one line that says all of this."""
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for text in says:
        assert text in done.stderr


def start_another(
    gateway: GatewayProcess, *options: str | Path
) -> "subprocess.CompletedProcess[str]":
    """A daemon that ends at once: with the same configuration, and options over it."""
    return gateway.cli("serve", *options, check=False, timeout=30)


def tree(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


# ---------------------------------------------------------------------------------- start and end


def test_a_second_daemon_is_refused(gateway: GatewayProcess, tmp_path: Path) -> None:
    pid = f"pid {gateway.pid}"
    one_line(start_another(gateway), str(gateway.state), pid, "stop that one")
    one_line(start_another(gateway, "--state", tmp_path / "s"), str(gateway.run), pid)
    one_line(start_another(gateway, "--run", tmp_path / "r"), str(gateway.state), pid)
    assert gateway.alive


def test_what_keeps_a_daemon_from_starting_is_one_line(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    gateway = make_gateway(start=False)
    (tmp_path / "file").write_text("")
    one_line(start_another(gateway, "--state", tmp_path / "file"), "file", "let the daemon's user")
    one_line(start_another(gateway, "--run", tmp_path / "file" / "x"), "Not a directory")
    gateway.configure({"cache": {"device": "/dev/none"}})
    one_line(start_another(gateway), "/dev/none: no such device")
    gateway.configure({"cache": {"device": str(tmp_path / "foreign")}})
    (tmp_path / "foreign").write_bytes(b"precious" * MIB)
    one_line(start_another(gateway), "foreign")
    assert (tmp_path / "foreign").read_bytes() == b"precious" * MIB
    assert not Path("/dev/none").exists()


@contextlib.contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Path]:
    """A file system of its own of `size` bytes, without room for anything."""
    need("mkfs.ext4", "mount")
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    image, mounted = directory / "small.ext4", directory / "small"
    mounted.mkdir()
    with image.open("wb") as made:
        made.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], check=False)
    if done.returncode:
        pytest.skip("mounting a loop device is not possible here")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def fill(directory: Path, keep: int) -> None:
    with (directory / "ballast").open("wb") as ballast, contextlib.suppress(OSError):
        while True:
            os.write(ballast.fileno(), bytes(4096))
    os.truncate(directory / "ballast", (directory / "ballast").stat().st_size - keep)


@pytest.mark.parametrize("room", [0, 8 << 10, 20 << 10])
def test_a_full_disk_under_the_state_is_one_line(
    make_gateway: MakeGateway, tmp_path: Path, room: int
) -> None:
    with small_disk(tmp_path, 4 * MIB) as small:
        fill(small, room)
        gateway = make_gateway(start=False)
        device = gateway.directory / "cache.img"
        gateway.configure({"cache": {"device": str(device)}})
        one_line(start_another(gateway, "--state", small / "state"), str(small), "No space left")


def test_the_end_is_clean_while_clients_are_connected(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * 4096, 0)
    assert gateway.stop() == 0, gateway.log_text()
    assert not gateway.sock("d").exists()
    assert not gateway.control.exists()


@pytest.mark.parametrize("wanted", [True, False])
def test_status_says_whether_the_compiled_core_serves(
    make_gateway: MakeGateway, connect: Connect, wanted: bool
) -> None:
    gateway = make_gateway({"gateway": {"core": wanted}})
    random_image(gateway.images / "a.raw", MIB, seed=1)
    gateway.attach("d", "a.raw", mode="write-back")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * 8192, 4096)
    assert client.pread(8192, 4096) == b"x" * 8192
    serves = wanted and forebay_fast.serves()
    assert gateway.status("d")["gateway"]["core"] is serves


# ---------------------------------------------------------------------------------------- sockets


def test_the_socket_is_as_configured(make_gateway: MakeGateway) -> None:
    settings: dict[str, dict[str, Any]] = {
        "gateway": {"socket_mode": "0640", "socket_owner": "nobody"}
    }
    if os.getuid() != 0:
        pytest.skip("giving a socket away needs root")
    gateway = make_gateway(settings)
    random_image(gateway.images / "a.raw", SIZE, seed=1)
    path = gateway.attach("d", "a.raw")
    found = path.stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert path.owner() == "nobody"
    assert os.listdir(path.parent) == ["d.sock"]
    assert stat.S_IMODE(gateway.control.stat().st_mode) == 0o600


def test_a_socket_leads_to_its_own_disk_only(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    gateway.attach("d", "a.raw")
    random_image(gateway.images / "b.raw", MIB, seed=2)
    gateway.attach("e", "b.raw")
    assert connect(gateway.uri("d", "")).get_size() == SIZE
    assert connect(gateway.uri("e", "e")).get_size() == MIB
    with pytest.raises(Exception, match="e"):
        connect(gateway.uri("d", "e"))


def test_sockets_that_an_operator_removes_are_there_again(
    gateway: GatewayProcess, connect: Connect
) -> None:
    content = random_image(gateway.images / "a.raw", MIB, 1)
    gateway.allow_log("somebody removed .*: made anew")
    gateway.attach("d", "a.raw")
    client = connect(gateway.uri("d"))
    shutil.rmtree(gateway.run / "disks")
    (gateway.run / "control.sock").unlink()
    wait_for(lambda: gateway.cli("status", "d", check=False).returncode == 0)
    wait_for((gateway.run / "disks" / "d.sock").exists)
    for one in (client, connect(gateway.uri("d"))):
        assert one.pread(MIB, 0) == content


def test_stale_sockets_are_removed_at_the_start(gateway: GatewayProcess) -> None:
    gateway.kill()
    stale = gateway.run / "disks" / "old.sock"
    stale.touch()
    gateway.start()
    assert not stale.exists()


# ---------------------------------------------------------------------------- attaching and detaching


REFUSED = [
    (["x", "images:none.raw"], "no such image"),
    (["x", "images:../secret"], "leads out of its store"),
    (["x", "imags:a.raw"], "did you mean 'images'"),
    (["x", "images:link"], "symbolic link"),
    (["x", "images:folder"], "is a directory"),
    (["x", "images:empty"], "is empty"),
    (["x", "images:q.qcow2"], "qemu-img check"),
    (["d", "images:b.raw"], "there is a disk 'd' already, of images:a.raw"),
    (["d", "images:a.raw", "--mode", "none"], "already, with another mode"),
    (["x", "images:a.raw"], "written by disk 'd'"),
    (["x", "images:a.raw", "--read-only"], "written by disk 'd'"),
    (["x", "images:a.raw", "--overlay"], "written by disk 'd'"),
    (["x", "images:b.raw", "--overlay", "--read-only"], "leave one"),
    (["x", "nbd+unix:///?socket=/none.sock"], "/none.sock"),
    (["x", "/etc/passwd"], "not a block device"),
    (["x/y", "images:b.raw"], "is not a name"),
    (["n" * 64, "images:b.raw"], "choose a shorter name"),
]


def test_what_cannot_be_attached_is_one_line_and_changes_nothing(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway(start=False)
    gateway.run = gateway.directory / ("r" * 30)  # so that a long name makes too long a path
    gateway.configure({"gateway": {"run": str(gateway.run)}})
    gateway.start()
    images = gateway.images
    for name in ("a.raw", "b.raw"):
        random_image(images / name, MIB, seed=2)
    (images / "folder").mkdir()
    (images / "empty").touch()
    (images / "link").symlink_to("/etc/passwd")
    (images / "q.qcow2").write_bytes(b"QFI\xfb" + bytes(1000))
    gateway.attach("d", "a.raw")
    before = tree(images), gateway.cli("status", "--json").stdout
    for arguments, says in REFUSED:
        done = gateway.cli("attach", *arguments, check=False)
        one_line(done, says, code=2 if says == "is not a name" else 1)
    # What a disk that was refused had on record is in the journal a moment later, and no more in memory.
    wait_for(lambda: (tree(images), gateway.cli("status", "--json").stdout) == before)


def test_many_may_read_what_nobody_writes(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    gateway.attach("r1", "a.raw", "--read-only")
    gateway.attach("r2", "a.raw", "--read-only")
    gateway.attach("o", "a.raw", "--overlay")
    one_line(gateway.cli("attach", "w", "images:a.raw", check=False), "in use by disk", "--overlay")
    for name in ("r1", "r2", "o"):
        assert bytes(connect(gateway.uri(name)).pread(SIZE, 0)) == content
    assert tree(gateway.images) == ["a.raw"], "who does not write claims nothing"


def test_an_image_in_two_stores_is_one_image(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(start=False)
    deep = gateway.images / "deep"
    deep.mkdir()
    random_image(deep / "a.raw", SIZE, seed=1)
    gateway.configure({"stores.deep": {"path": str(deep)}})
    gateway.start()
    gateway.attach("d", "deep:a.raw")
    one_line(
        gateway.cli("attach", "x", "images:deep/a.raw", "--read-only", check=False),
        "written by disk 'd'",
    )


def test_detach_waits_for_the_last_client(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    gateway.attach("d", "a.raw", mode="write-back")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * 4096, 0)
    one_line(gateway.cli("detach", "d", check=False), "1 client is connected", "--force")
    assert bytes(client.pread(4096, 0)) == b"x" * 4096
    gateway.cli("detach", "d", "--force")
    assert (gateway.images / "a.raw").read_bytes() == b"x" * 4096 + content[4096:]
    assert tree(gateway.images) == ["a.raw"], "no marker stays"
    assert not gateway.sock("d").exists()
    assert json.loads(gateway.cli("status", "--json").stdout) == []
    gateway.attach("d", "a.raw")


def test_detach_with_discard_drops_what_is_dirty(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    gateway.allow_log("4096 dirty bytes are dropped as asked")
    gateway.attach("d", "a.raw", mode="full-copy")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * 4096, 0)
    client.flush()
    gateway.cli("detach", "d", "--discard", "--force")
    assert (gateway.images / "a.raw").read_bytes() == content
    assert tree(gateway.images) == ["a.raw"]


# --------------------------------------------------------------------------------------- coming back


@pytest.mark.parametrize("kill", [False, True])
def test_disks_come_back(
    gateway: GatewayProcess, content: bytes, connect: Connect, kill: bool
) -> None:
    random_image(gateway.images / "b.raw", MIB, seed=2)
    gateway.attach("d", "a.raw", mode="write-back")
    gateway.attach("o", "b.raw", "--overlay", "--cache-size", "64M")
    gateway.cli("mode", "d", "write-through")
    before = [gateway.status(name) for name in ("d", "o")]
    gateway.restart(kill=kill)
    same = ("name", "image", "mode", "read_only", "overlay", "size", "socket")
    for old in before:
        new = gateway.status(old["name"])
        assert {key: new[key] for key in same} == {key: old[key] for key in same}
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(SIZE, 0)) == content
    client.pwrite(b"y" * 4096, 4096)
    client.flush()
    client.shutdown()
    gateway.cli("detach", "d")
    gateway.cli("detach", "o")
    assert tree(gateway.images) == ["a.raw", "b.raw"]


def test_a_guest_may_write_the_mark_of_another_format(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    gateway.attach("d", "a.raw", mode="write-through")
    connect(gateway.uri("d")).pwrite(b"QFI\xfb" + bytes(508), 0)
    gateway.restart(kill=True)
    assert bytes(connect(gateway.uri("d")).pread(4, 0)) == b"QFI\xfb"


@pytest.mark.parametrize("wrote", [False, True])
def test_an_image_that_changed_while_the_daemon_was_stopped_is_read_anew(
    gateway: GatewayProcess, content: bytes, connect: Connect, wrote: bool
) -> None:
    gateway.allow_log("was changed by somebody else|was replaced by another file")
    gateway.attach("d", "a.raw", mode="write-through")
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(SIZE, 0)) == content
    if wrote:  # just before the end, so that only the end can take down what the image looks like
        client.pwrite(b"guest" * 100, MIB)
        client.flush()
    assert gateway.stop() == 0
    with (gateway.images / "a.raw").open("r+b") as image:
        image.write(b"other" * 100)
    gateway.start()
    assert bytes(connect(gateway.uri("d")).pread(500, 0)) == b"other" * 100


def test_a_warm_disk_comes_up_without_its_store(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    gateway.allow_log("cannot be reached|can be reached again")
    gateway.attach("d", "a.raw", mode="write-back")
    assert bytes(connect(gateway.uri("d")).pread(SIZE // 2, 0)) == content[: SIZE // 2]
    gateway.stop()
    gone = gateway.images.rename(gateway.directory / "gone")
    gateway.configure({"defaults": {"origin_timeout": "1s"}})
    gateway.start()
    assert gateway.status("d")["state"] == "degraded"
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(SIZE // 2, 0)) == content[: SIZE // 2], "the warm half"
    with pytest.raises(Exception, match="rror"):
        client.pread(4096, SIZE - 4096)
    gone.rename(gateway.images)
    wait_for(lambda: gateway.status("d")["state"] != "degraded")
    assert bytes(client.pread(SIZE, 0)) == content
    client.shutdown()
    gateway.cli("detach", "d")
    assert tree(gateway.images) == ["a.raw"]


def wait_for(true: Callable[[], bool], seconds: float = 30) -> None:
    """Ask again and again, each time by a command that takes long enough not to be a busy loop."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"


def old_store(gateway: GatewayProcess) -> Path:
    """A folder with an image `a.raw`, for a store 'old' that disk 'd' will have lost after a restart."""
    gateway.allow_log("disk 'd' is not served: no store 'old'")
    old = gateway.directory / "old"
    old.mkdir()
    random_image(old / "a.raw", SIZE, seed=1)
    return old


def test_a_disk_whose_store_is_no_longer_configured_is_shown(
    gateway: GatewayProcess, content: bytes
) -> None:
    old = old_store(gateway)
    gateway.configure({"stores.old": {"path": str(old)}})
    gateway.restart()
    gateway.attach("d", "old:a.raw")
    gateway.attach("e", "a.raw")
    gateway.configure({})
    gateway.restart()
    shown = gateway.status("d")
    assert shown["state"] == "failed"
    assert gateway.status("e")["state"] != "failed"
    one_line(gateway.cli("detach", "d", check=False), "no store 'old'", "--discard")
    gateway.configure({"stores.old": {"path": str(old)}})
    gateway.restart()
    assert gateway.status("d")["state"] != "failed"
    gateway.configure({})
    gateway.restart()
    gateway.cli("detach", "d", "--discard")
    assert [one["name"] for one in json.loads(gateway.cli("status", "--json").stdout)] == ["e"]


def test_an_image_that_lacks_what_a_disk_that_is_not_served_has_is_left_alone(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    """Its store got another name; under that one the image is the same."""
    old = old_store(gateway)
    gateway.configure({"stores.old": {"path": str(old)}, "defaults": {"max_lag": "1h"}})
    gateway.restart()
    gateway.attach("d", "old:a.raw", mode="write-back")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * 65536, 0)
    client.shutdown()
    gateway.configure({"stores.new": {"path": str(old)}})
    gateway.restart()
    marker = old / "a.raw.forebay" / "owner"
    before = marker.read_bytes()
    for how in (["--mode", "write-through"], ["--overlay"]):
        refused = gateway.cli("attach", "e", "new:a.raw", *how, check=False)
        one_line(refused, "new:a.raw", "65536 bytes", "disk 'd'", "forebay detach d --discard")
    assert marker.read_bytes() == before
    gateway.cli("detach", "d", "--discard")
    gateway.attach("e", "new:a.raw", mode="write-through")
    gateway.cli("detach", "e")
    assert not marker.exists()


def test_a_disk_that_is_not_served_leaves_nothing_to_the_next_of_its_name(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    old = old_store(gateway)
    gateway.configure({"stores.old": {"path": str(old), "mode": "full-copy"}})
    gateway.restart()
    gateway.attach("d", "old:a.raw")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * 65536, 0)
    client.shutdown()
    gateway.configure({})
    gateway.restart()
    gateway.cli("detach", "d", "--discard")
    gateway.attach("d", "a.raw", mode="write-back")
    assert gateway.status("d")["dirty_bytes"] == 0
    assert connect(gateway.uri("d")).pread(65536, 0) == content[:65536]


# ----------------------------------------------------------------------------------- two gateways


def neighbour(make_gateway: MakeGateway, gateway: GatewayProcess) -> GatewayProcess:
    """A gateway with a cache of its own on the same store, as another host has it."""
    return make_gateway({"stores.images": {"path": str(gateway.images)}})


def test_one_gateway_writes(
    gateway: GatewayProcess, content: bytes, make_gateway: MakeGateway
) -> None:
    other = neighbour(make_gateway, gateway)
    other.allow_log("is written by host")
    gateway.attach("d", "a.raw", mode="write-back")
    for _ in range(2):
        done = other.cli("attach", "x", "images:a.raw", check=False)
        one_line(done, "host ", "disk 'd'", "clean", "since ", "detach it there")
        done = other.cli("attach", "x", "images:a.raw", "--overlay", check=False)
        one_line(done, "host ", "disk 'd'", "detach it there")
        other.attach("r", "a.raw", "--read-only")  # legal, and said in the log
        other.cli("detach", "r")
        gateway.kill()  # its lock is gone, its marker stays
    assert "is written by host" in other.log_text()
    gateway.start()
    gateway.cli("detach", "d")
    other.attach("x", "a.raw")


def test_dirty_data_keeps_others_out_until_it_is_home(
    gateway: GatewayProcess, content: bytes, make_gateway: MakeGateway, connect: Connect
) -> None:
    other = neighbour(make_gateway, gateway)
    gateway.attach("d", "a.raw", mode="write-back")
    client = connect(gateway.uri("d"))
    client.pwrite(b"x" * 4096, 0)
    client.flush()
    gateway.kill()
    marker = json.loads((gateway.images / "a.raw.forebay" / "owner").read_text())
    assert marker["state"] == "dirty", "durable before the write was acknowledged"
    one_line(other.cli("attach", "x", "images:a.raw", check=False), "dirty", "the image lacks")
    gateway.start()
    gateway.cli("flush", "d")
    gateway.cli("detach", "d")
    path = other.attach("x", "a.raw")
    assert path.exists()
    assert (gateway.images / "a.raw").read_bytes()[:4096] == b"x" * 4096


# ------------------------------------------------------------------------------------ other origins


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_block_device_as_origin(
    gateway: GatewayProcess, content: bytes, connect: Connect, sector: int
) -> None:
    backing = gateway.images / "a.raw"
    with loop_device(backing, sector) as device:
        gateway.attach("d", device, mode="write-back")
        client = connect(gateway.uri("d"))
        assert bytes(client.pread(SIZE, 0)) == content
        client.pwrite(b"x" * 5000, 777)
        client.shutdown()
        one_line(gateway.cli("attach", "e", device, check=False), "written by disk 'd'")
        gateway.restart(kill=True)
        gateway.cli("detach", "d")
    assert backing.read_bytes() == content[:777] + b"x" * 5000 + content[5777:]


def test_an_nbd_server_as_origin(
    gateway: GatewayProcess,
    content: bytes,
    connect: Connect,
    start_nbdkit: Callable[..., NbdServer],
) -> None:
    need("nbdkit")
    server = start_nbdkit("file", gateway.images / "a.raw")
    gateway.attach("d", server.uri, mode="write-back")
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(SIZE, 0)) == content
    client.pwrite(b"x" * 5000, 777)
    client.shutdown()
    gateway.restart(kill=True)
    assert gateway.status("d")["image"] == server.uri
    gateway.cli("detach", "d")
    assert (gateway.images / "a.raw").read_bytes() == content[:777] + b"x" * 5000 + content[5777:]


def test_an_origin_that_hangs_stops_only_its_own_disk(
    gateway: GatewayProcess,
    content: bytes,
    connect: Connect,
    start_nbdkit: Callable[..., NbdServer],
) -> None:
    pytest.importorskip("libnbdmod", reason="python3-libnbd is not installed")
    import nbd

    gateway.allow_log("cannot be reached|can be reached again")
    gateway.configure({"defaults": {"origin_timeout": "3s"}})
    gateway.restart()
    random_image(gateway.images / "b.raw", SIZE, seed=2)
    server = start_nbdkit("file", gateway.images / "b.raw", options=[ONE_THREAD])
    gateway.attach("hung", server.uri)
    gateway.attach("well", "a.raw")
    warm = bytes(connect(gateway.uri("hung")).pread(65536, 0))
    server.pause()
    try:
        client = connect(gateway.uri("hung"))
        pending = client.aio_pread(nbd.Buffer(4096), SIZE - 4096)
        assert bytes(connect(gateway.uri("well")).pread(SIZE, 0)) == content
        assert bytes(connect(gateway.uri("hung")).pread(65536, 0)) == warm, "a hit is a hit"
        assert not client.aio_command_completed(pending)
        gateway.restart()  # ends in time, and comes up without it
        assert bytes(connect(gateway.uri("hung")).pread(65536, 0)) == warm
        assert bytes(connect(gateway.uri("well")).pread(SIZE, 0)) == content
        assert gateway.status("hung")["state"] == "degraded"
    finally:
        server.resume()
    wait_for(lambda: gateway.status("hung")["state"] != "degraded")
    assert len(connect(gateway.uri("hung")).pread(SIZE, 0)) == SIZE
    gateway.kill()  # nbdkit ends when its clients are gone


# ------------------------------------------------------------------------------------------ systemd


def test_the_watchdog_is_petted(tmp_path: Path) -> None:
    address = tmp_path / "n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(20)
        code = "import trio; from forebay.systemd import keep_alive; trio.run(keep_alive)"
        environment = {**os.environ, "NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "20000"}
        with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
            assert [manager.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            process.kill()


@contextlib.contextmanager
def hanging_store(directory: Path, server: NbdServer) -> Iterator[Path]:
    """A directory whose one file, `nbd`, is in the kernel's hands: with the server paused, reading it hangs."""
    need("nbdfuse", "umount")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse may not be used here")
    store = directory / "store"
    store.mkdir()
    process = subprocess.Popen(["nbdfuse", str(store), server.uri], stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: (store / "nbd").exists() or process.poll() is not None)
        yield store
    finally:
        server.resume()
        subprocess.run(["umount", "-l", str(store)], check=False)
        process.kill()
        process.wait()


def test_a_store_that_hangs_in_the_kernel_stops_only_its_own_disk(
    gateway: GatewayProcess,
    content: bytes,
    connect: Connect,
    start_nbdkit: Callable[..., NbdServer],
    tmp_path: Path,
) -> None:
    pytest.importorskip("libnbdmod", reason="python3-libnbd is not installed")
    import nbd

    gateway.allow_log("cannot be reached|can be reached again")
    random_image(tmp_path / "b.raw", SIZE, seed=2)
    server = start_nbdkit("file", tmp_path / "b.raw")
    with hanging_store(tmp_path, server) as store:
        gateway.configure(
            {"stores.slow": {"path": str(store)}, "defaults": {"origin_timeout": "3s"}}
        )
        gateway.restart()
        gateway.attach("hung", "slow:nbd", "--read-only")
        gateway.attach("well", "a.raw")
        client = connect(gateway.uri("hung"))
        warm = bytes(client.pread(65536, 0))
        server.pause()
        pending = [client.aio_pread(nbd.Buffer(4096), MIB + i * 65536) for i in range(40)]
        assert bytes(connect(gateway.uri("well")).pread(SIZE, 0)) == content
        assert bytes(connect(gateway.uri("hung")).pread(65536, 0)) == warm, "a hit is a hit"
        assert not any(client.aio_command_completed(one) for one in pending)
        server.resume()
        gateway.stop()  # not before: what FUSE has in hand outlives SIGKILL, unlike NFS
        server.pause()
        gateway.start()  # it comes up although the store hangs
        assert bytes(connect(gateway.uri("hung")).pread(65536, 0)) == warm
        assert bytes(connect(gateway.uri("well")).pread(SIZE, 0)) == content
        server.resume()
        wait_for(lambda: gateway.status("hung")["state"] != "degraded")
        assert len(connect(gateway.uri("hung")).pread(SIZE, 0)) == SIZE
        gateway.stop()
