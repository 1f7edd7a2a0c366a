# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The socket of a store: its images by NBD, each attached while somebody reads it, for qcow2 overlays of QEMU's."""

import contextlib
import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import ask_text, run, wait_for
from real.fault_fs import FaultFs
from real.gateway_process import GatewayProcess
from real.nbd_raw import go
from real.processes import MIB, end, need, random_image
from real.service_manager import ManagedGateway
from real.shared_gateway import SharedGateways

Make = Callable[..., GatewayProcess]
Connect = Callable[..., Any]

SIZE = 4 * MIB
ACK, INFO, ERR_POLICY, ERR_UNKNOWN = 1, 3, (1 << 31) + 2, (1 << 31) + 6
STORE = {"stores.images": {"socket": True}}


def socket_of(gateway: GatewayProcess, store: str = "images") -> Path:
    return gateway.run / "stores" / f"{store}.sock"


def uri(gateway: GatewayProcess, name: str) -> str:
    return f"nbd+unix:///{name}?socket={socket_of(gateway)}"


def told(gateway: GatewayProcess) -> dict[str, Any]:
    """What `forebay stores` tells of the store `images`."""
    [store] = json.loads(ask_text(gateway, "/stores"))
    assert isinstance(store, dict)
    return store


def clients(gateway: GatewayProcess) -> dict[str, int]:
    """By image, how many read it by the socket."""
    return {one["image"]: one["clients"] for one in told(gateway)["images"]}


@pytest.fixture(scope="module")
def gateways() -> Iterator[SharedGateways]:
    shared = SharedGateways()
    yield shared
    shared.remove()


@pytest.fixture
def gateway(gateways: SharedGateways) -> Iterator[GatewayProcess]:
    with gateways.emptied(STORE) as gateway:
        yield gateway


@pytest.fixture
def content(gateway: GatewayProcess) -> bytes:
    return random_image(gateway.images / "a.raw", SIZE, 1)


@pytest.fixture
def fetched(gateway: GatewayProcess) -> Callable[[str], int]:
    """Returns the bytes of an image that were read from the store while it is attached."""

    def count(image: str) -> int:
        [one] = [x for x in told(gateway)["images"] if x["image"] == image]
        return int(one["origin_read_bytes"])

    return count


# ------------------------------------------------------------------------------------------------------- what it serves


def test_a_store_has_a_socket_only_where_the_configuration_says_so(make_gateway: Make) -> None:
    gateway = make_gateway()
    assert list((gateway.run / "stores").iterdir()) == []
    assert (told(gateway)["socket"], told(gateway)["images"]) == ("", [])


def test_an_image_is_attached_by_its_first_reader_and_let_go_after_the_last(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    assert clients(gateway) == {}
    one, other = (connect(uri(gateway, "a.raw"), "base:allocation") for _ in range(2))
    assert one.is_read_only()
    assert bytes(one.pread(SIZE, 0)) == bytes(other.pread(SIZE, 0)) == content
    assert clients(gateway) == {"images:a.raw": 2}
    assert gateway.cli("status", "--json").stdout.strip() == "[]"
    one.shutdown()
    wait_for(lambda: clients(gateway) == {"images:a.raw": 1}, "one reads it")
    other.shutdown()
    wait_for(lambda: clients(gateway) == {}, "nobody reads it any more")
    gateway.attach("d", "a.raw", mode="write-back")  # nothing is left that would keep a writer out


def test_a_block_is_fetched_once_for_all_who_read_it(
    gateway: GatewayProcess, content: bytes, connect: Connect, fetched: Callable[[str], int]
) -> None:
    gateway.attach("d", "a.raw", "--overlay")
    through_disk = connect(gateway.uri("d"))
    readers = [connect(uri(gateway, "a.raw")) for _ in range(5)]
    for reader in [*readers, through_disk, connect(uri(gateway, "./a.raw"))]:
        assert bytes(reader.pread(SIZE, 0)) == content
    assert fetched("images:a.raw") == SIZE
    assert gateway.status("d")["origin_read_bytes"] == 0


def test_list_names_the_images_of_the_store_and_nothing_else(
    gateway: GatewayProcess, content: bytes
) -> None:
    need("nbdinfo")
    (gateway.images / "sub").mkdir()
    (gateway.images / "sub" / "b c.qcow2").write_bytes(content)
    (gateway.images / "empty.raw").touch()
    (gateway.images / ".hidden").write_bytes(content)
    (gateway.images / "new\nline.raw").write_bytes(content)
    (gateway.images / os.fsdecode(b"\xff.raw")).write_bytes(content)
    (gateway.images / "link.raw").symlink_to("a.raw")
    os.mkfifo(gateway.images / "fifo")
    gateway.attach("d", "a.raw", "--overlay")
    many = [f"many/{number:02}.raw" for number in range(20)]
    (gateway.images / "many").mkdir()
    for name in many:
        (gateway.images / name).write_bytes(content)
    found = json.loads(run("nbdinfo", "--list", "--json", uri(gateway, "")).stdout)
    assert [one["export-name"] for one in found["exports"]] == ["a.raw", *many, "sub/b c.qcow2"]
    assert all(one["is_read_only"] for one in found["exports"])


def test_list_stops_at_a_thousand(gateway: GatewayProcess) -> None:
    nbd = pytest.importorskip("nbd")
    folder = gateway.images / "many"
    folder.mkdir()
    for number in range(1100):
        (folder / f"{number:04}.raw").write_bytes(b"x")
    (gateway.images / "top.raw").write_bytes(b"x")
    names: list[str] = []

    def are_listed() -> bool:
        """What is told may be a second old."""
        names.clear()
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        handle.connect_unix(str(socket_of(gateway)))
        handle.opt_list(lambda name, _text: names.append(name))
        handle.opt_abort()
        return len(names) >= 1000

    wait_for(are_listed, "all are listed")
    assert len(names) == 1000
    assert names[-1] == "top.raw", "what lies highest first"


def test_the_statuses_of_blocks_are_told_as_of_a_disk(
    gateway: GatewayProcess, connect: Connect
) -> None:
    random_image(gateway.images / "holes.raw", SIZE, 2, [(MIB, 2 * MIB)])
    handle = connect(uri(gateway, "holes.raw"), "base:allocation", "x-forebay:cached")
    found: dict[str, list[int]] = {}

    def take(name: str, _offset: int, entries: list[int], _error: object) -> int:
        found[name] = list(entries)
        return 0

    def is_kept() -> bool:
        """What was read is kept behind the reader's back."""
        handle.block_status(SIZE, 0, take)
        return found["x-forebay:cached"][:2] == [MIB, 1]

    handle.pread(MIB, 0)
    wait_for(is_kept, "what was read is kept")
    assert found["base:allocation"] == [MIB, 0, 2 * MIB, 3, MIB, 0]


# ------------------------------------------------------------------------------------------------------- who is refused


REFUSED = {
    "": "there is no default export: name an image by its path in the store 'images'",
    "none.raw": "no such image in",
    "../images/a.raw": "leads out of its store",
    "sub/../../x": "leads out of its store",
    "/etc/passwd": "leads out of its store",
    "//host/a.raw": "is in no store",
    "a.raw.forebay/owner": "one of Forebay's own files",
    "a\nb": "cannot name an image",
    "\x1b[31ma": "cannot name an image",
    "link.raw": "a symbolic link is on the way",
    "linked/a.raw": "a symbolic link is on the way",
    "folder": "is a directory",
    "a.raw?format=qcow2": "files are served here, as they are",
    "fifo": "is not a regular file",
    "empty.raw": "is empty",
    "x" * 300: "no such image",
    "y/" * 2000: "no such image",
}


def test_a_name_that_leads_to_no_image_is_refused_with_one_line(
    gateway: GatewayProcess, content: bytes
) -> None:
    images = gateway.images
    (images / "link.raw").symlink_to("/etc/passwd")
    (images / "linked").symlink_to(gateway.directory)
    (images / "folder").mkdir()
    (images / "empty.raw").touch()
    os.mkfifo(images / "fifo")
    for name, why in REFUSED.items():
        said = refusal(gateway, name)
        assert why in said, name[:50]
        assert said.isprintable()
        assert len(said) <= 500
    assert len(content) == SIZE
    assert refusal(gateway, "a.raw") == "", "and who asks for an image gets it"


def refusal(gateway: GatewayProcess, name: str, store: str = "images") -> str:
    """What the server says to GO of that name; empty where it serves it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(socket_of(gateway, store)))
        stream = sock.makefile("rwb")
        stream.read(18)
        stream.write(struct.pack(">I", 3) + go(name.encode()))
        stream.flush()
        while True:
            _magic, _option, reply, length = struct.unpack(">QIII", stream.read(20))
            text = stream.read(length)
            if reply != INFO:
                assert reply in (ACK, ERR_POLICY, ERR_UNKNOWN)
                return text.decode() if reply != ACK else ""


def test_old_clients_that_cannot_be_told_are_hung_up_on(
    gateway: GatewayProcess, content: bytes
) -> None:
    nbd = pytest.importorskip("nbd")
    for name in ("a.raw", "none.raw"):
        handle = nbd.NBD()
        handle.set_handshake_flags(0)
        handle.set_export_name(name)
        with contextlib.nullcontext() if name == "a.raw" else pytest.raises(nbd.Error):
            handle.connect_unix(str(socket_of(gateway)))
            assert bytes(handle.pread(MIB, 0)) == content[:MIB]
            handle.shutdown()


def test_nobody_writes(gateway: GatewayProcess, content: bytes) -> None:
    need("qemu-io")
    told = run("qemu-io", "-f", "raw", "-c", "write 0 4k", uri(gateway, "a.raw"), check=False)
    assert "Permission denied" in told.stderr
    assert (gateway.images / "a.raw").read_bytes() == content


def test_a_disk_that_writes_the_image_and_its_readers_keep_each_other_out(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    reader = connect(uri(gateway, "a.raw"))
    refused = gateway.cli("attach", "d", "images:a.raw", check=False)
    assert "images:a.raw: a client reads it by the socket of store 'images'" in refused.stderr
    assert bytes(reader.pread(SIZE, 0)) == content
    gateway.attach("o", "a.raw", "--overlay")
    gateway.cli("detach", "o")
    reader.shutdown()
    wait_for(lambda: not any(clients(gateway).values()), "nobody reads it")
    gateway.attach("d", "a.raw", mode="write-back")  # what lingers gives way
    assert "images:a.raw is written by a disk" in refusal(gateway, "a.raw")
    gateway.cli("detach", "d")
    assert refusal(gateway, "a.raw") == ""


def test_another_program_that_has_the_image_open_for_writing_is_named(
    gateway: GatewayProcess, content: bytes, start_qemu_nbd: Callable[..., Any]
) -> None:
    server = start_qemu_nbd(gateway.images / "a.raw")
    assert "is being written by qemu-nbd" in refusal(gateway, "a.raw")
    server.stop()
    assert refusal(gateway, "a.raw") == ""


def test_an_image_that_was_replaced_is_served_anew_when_those_who_read_the_old_one_are_gone(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    nbd = pytest.importorskip("nbd")
    gateway.allow_log("was deleted or replaced while in use|its cached blocks are dropped")
    reader = connect(uri(gateway, "a.raw"))
    assert bytes(reader.pread(MIB, 0)) == content[:MIB]
    other = random_image(gateway.directory / "other", SIZE, 9)
    (gateway.directory / "other").rename(gateway.images / "a.raw")
    wait_for(lambda: told(gateway)["images"][0]["state"] == "conflict", "it is noticed")
    with pytest.raises(nbd.Error):  # never the new content, below what was written over the old
        reader.pread(MIB, 0)
    said = refusal(gateway, "a.raw")
    assert "it is served as it is now when nobody reads it by the socket of its store" in said
    reader.shutdown()
    wait_for(lambda: refusal(gateway, "a.raw") == "", "it is served again")
    again = connect(uri(gateway, "a.raw"))
    assert bytes(again.pread(SIZE, 0)) == other
    again.shutdown()


def test_who_may_connect_is_what_the_configuration_says_of_disks(make_gateway: Make) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to be root to be another user")
    settings = {"gateway": {"socket_mode": "0666", "socket_peers": ["daemon"]}, **STORE}
    gateway = make_gateway(settings)
    gateway.allow_log("is refused: see gateway.socket_peers")
    random_image(gateway.images / "a.raw", MIB, 1)
    gateway.directory.chmod(0o755)
    gateway.run.chmod(0o755)
    need("nbdinfo", "setpriv")
    for user, code in (("daemon", 0), ("nobody", 1)):
        words = ["setpriv", "--reuid", user, "--regid", "nogroup", "--clear-groups", "nbdinfo"]
        done = run(*words, "--size", uri(gateway, "a.raw"), check=False)
        assert done.returncode == code, done.stderr
    assert told(gateway)["refused_clients"] == 1


# --------------------------------------------------------------------------------------------------------- QEMU's tools


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_qcow2_file_lies_over_an_image_of_the_store(
    gateway: GatewayProcess, content: bytes, tmp_path: Path, kind: str
) -> None:
    name = "a.raw"
    if kind == "qcow2":
        name = "base.qcow2"
        source, base = gateway.images / "a.raw", gateway.images / name
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, base)
    before = (gateway.images / name).read_bytes()
    top, flat = tmp_path / "top.qcow2", tmp_path / "flat.raw"
    backing = uri(gateway, name)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", kind, "-b", backing, top, "8M")
    chain = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", top).stdout)
    assert [one["format"] for one in chain] == ["qcow2", kind]
    words = ["write -P 9 1M 64k", "read -P 9 1M 64k", "read -P 0 6M 64k"]
    run("qemu-io", *(word for one in words for word in ("-c", one)), top)
    run("qemu-img", "convert", "-O", "raw", top, flat)
    wanted = content[:MIB] + b"\x09" * 65536 + content[MIB + 65536 :] + bytes(4 * MIB)
    assert flat.read_bytes() == wanted
    assert (gateway.images / name).read_bytes() == before


def test_a_base_that_is_not_there_fails_at_once(gateway: GatewayProcess, tmp_path: Path) -> None:
    words = ["qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", uri(gateway, "none.raw")]
    done = run(*words, tmp_path / "top.qcow2", check=False)
    assert done.returncode == 1
    assert "server reported: images:none.raw: no such image in" in done.stderr


@contextlib.contextmanager
def slow_copy(gateway: GatewayProcess, to: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """qemu-img reads a.raw through a qcow2 file over it, slowly; its connection comes back for a minute.

    What a program is told of the base is instead of what the qcow2 file says, which says nothing: as with libvirt.
    """
    top = gateway.directory / "top.qcow2"
    size = (gateway.images / "a.raw").stat().st_size
    run("qemu-img", "create", "-q", "-f", "qcow2", top, str(size))
    server = {"type": "unix", "path": str(socket_of(gateway))}
    nbd = {"driver": "nbd", "server": server, "export": "a.raw", "reconnect-delay": 60}
    over = {"driver": "raw", "file": nbd}
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(top)}, "backing": over}
    words = ["qemu-img", "convert", "-r", "16M", "-O", "raw", "json:" + json.dumps(image), str(to)]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            end(process)


@pytest.mark.parametrize("way", ["killed", "restarted"])
def test_a_clone_goes_on_when_the_daemon_comes_back(gateway: GatewayProcess, way: str) -> None:
    size = 64 * MIB
    content = random_image(gateway.images / "a.raw", size, 3)
    copy = gateway.directory / "copy.raw"
    with slow_copy(gateway, copy) as process:
        wait_for(lambda: clients(gateway) == {"images:a.raw": 1}, "one reads it")
        for _ in range(2):
            time.sleep(0.5)
            assert process.poll() is None, "it ended too early for this test"
            gateway.restart(kill=way == "killed")
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert copy.read_bytes() == content


def test_the_clients_of_a_store_are_handed_over_at_a_planned_restart() -> None:
    nbd = pytest.importorskip("nbd")
    gateway = ManagedGateway(STORE)
    try:
        gateway.start()
        contents = {
            name: random_image(gateway.images / name, SIZE, seed)
            for seed, name in enumerate(("a.raw", "b.raw"))
        }
        handles = {name: nbd.NBD() for name in contents}
        for name, handle in handles.items():
            handle.connect_uri(uri(gateway, name))
            handle.pread(MIB, 0)
        for _ in range(2):
            gateway.restart()
            for name, handle in handles.items():
                assert bytes(handle.pread(SIZE, 0)) == contents[name]
            assert clients(gateway) == {"images:a.raw": 1, "images:b.raw": 1}
        assert gateway.log_text().count("2 clients, in") == 2
        for handle in handles.values():
            handle.shutdown()
        wait_for(lambda: clients(gateway) == {}, "nobody reads it any more")
    finally:
        gateway.remove()
    assert not gateway.unexpected_log()


def test_a_client_that_was_handed_over_needs_no_store(connect: Connect) -> None:
    """Its image is gone while the daemon is away: what the cache has is served."""
    gateway = ManagedGateway(STORE)
    try:
        gateway.start()
        content = random_image(gateway.images / "a.raw", SIZE, 4)
        handle = connect(uri(gateway, "a.raw"))
        assert bytes(handle.pread(SIZE, 0)) == content
        gateway.images.rename(gateway.directory / "away")
        gateway.restart()
        assert bytes(handle.pread(SIZE, 0)) == content
        (gateway.directory / "away").rename(gateway.images)
        handle.shutdown()
    finally:
        gateway.remove()


# ----------------------------------------------------------------------------------------------------------- the store


def test_a_store_that_hangs_holds_up_no_client_of_another_one_and_no_stop(
    make_gateway: Make, connect: Connect, tmp_path: Path
) -> None:
    faulty = FaultFs(tmp_path)
    try:
        slow = {"path": str(faulty.path), "socket": True, "origin_timeout": "3s"}
        gateway = make_gateway({**STORE, "stores.slow": slow})
        gateway.allow_log("no answer|cannot be reached|is not recorded")
        content = random_image(gateway.images / "a.raw", SIZE, 7)
        warm = random_image(faulty.backing / "warm.raw", SIZE, 8)
        (faulty.backing / "cold.raw").write_bytes(content)
        reader = connect(f"nbd+unix:///warm.raw?socket={socket_of(gateway, 'slow')}")
        assert bytes(reader.pread(SIZE, 0)) == warm
        for call in ("open", "read", "getattr", "readdir"):
            faulty.fail(call, hang=True)
        with ThreadPoolExecutor() as pool:
            cold = [pool.submit(refusal, gateway, "cold.raw", "slow") for _ in range(20)]
            other = connect(uri(gateway, "a.raw"))
            assert bytes(other.pread(SIZE, 0)) == content
            assert not any(one.done() for one in cold), "it is the other one that hangs"
            assert bytes(reader.pread(SIZE, 0)) == warm, "what is cached is served"
            assert all("no answer within 3 s" in one.result() for one in cold)
        gateway.restart(kill=True)
        again = connect(f"nbd+unix:///warm.raw?socket={socket_of(gateway, 'slow')}")
        assert bytes(again.pread(SIZE, 0)) == warm, "although nobody can open it now"
        assert gateway.stop() == 0
        faulty.lift()
    finally:
        faulty.remove()


def test_the_preload_of_a_store_is_done_once_for_an_image(
    make_gateway: Make, connect: Connect
) -> None:
    gateway = make_gateway({"stores.images": {"socket": True, "preload": "2 MiB"}})
    random_image(gateway.images / "a.raw", SIZE, 5)
    first = connect(uri(gateway, "a.raw"))
    wait_for(lambda: told(gateway)["images"][0].get("cached_bytes") == 2 * MIB, "it is preloaded")
    first.shutdown()
    wait_for(lambda: clients(gateway) == {}, "nobody reads it any more")
    gateway.cli("purge", "images:a.raw")
    again = connect(uri(gateway, "a.raw"))
    again.pread(4096, 3 * MIB)
    time.sleep(0.5)
    assert told(gateway)["images"][0]["cached_bytes"] <= MIB
    again.shutdown()


def test_what_a_boot_reads_by_the_socket_is_recorded_and_brought_in_for_the_next_one(
    gateway: GatewayProcess, connect: Connect
) -> None:
    random_image(gateway.images / "a.raw", SIZE, 6)
    first = connect(uri(gateway, "a.raw"))
    first.pread(2 * MIB, MIB)
    first.shutdown()
    wait_for(lambda: clients(gateway) == {}, "nobody reads it any more")
    trace = gateway.images / "a.raw.forebay" / "trace"
    wait_for(trace.exists, "the boot is recorded")
    gateway.cli("purge", "images:a.raw")
    again = connect(uri(gateway, "a.raw"))
    wait_for(lambda: told(gateway)["images"][0]["cached_bytes"] >= 2 * MIB, "it is brought in")
    assert told(gateway)["images"][0]["read_misses"] == 0
    again.shutdown()


def test_metrics_tell_how_many_read_by_the_socket(
    gateway: GatewayProcess, content: bytes, connect: Connect
) -> None:
    handle = connect(uri(gateway, "a.raw"))
    assert len(content) == SIZE
    text = ask_text(gateway, "/metrics")
    assert 'forebay_store_connections{store="images"} 1\n' in text
    assert 'forebay_store_images{store="images"} 1\n' in text
    handle.shutdown()


def test_two_hundred_clones_read_one_base(gateway: GatewayProcess, content: bytes) -> None:
    nbd = pytest.importorskip("nbd")
    handles = [nbd.NBD() for _ in range(200)]
    for handle in handles:
        handle.connect_uri(uri(gateway, "a.raw"))
    assert clients(gateway) == {"images:a.raw": 200}
    for handle in handles:
        assert bytes(handle.pread(MIB, 0)) == content[:MIB]
    [one] = told(gateway)["images"]
    assert one["origin_read_bytes"] <= SIZE
    for handle in handles:
        handle.shutdown()
