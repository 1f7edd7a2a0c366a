# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The nbdkit door: who gets in, what arrives at the daemon and the origin, and what outlives a killed daemon."""

import contextlib
import json
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from real.gateway_process import GatewayProcess
from real.nbdkit_door import PLUGIN, Authority, NbdkitDoor, free_port, need_nbdkit
from real.processes import MIB, NbdServer, need, random_image

SIZE = 6 * MIB
HOLES = [(MIB, MIB), (4 * MIB, MIB)]
STRANGER = "aa" * 24

pytest.importorskip("libnbdmod", reason="python3-libnbd is not installed: `make setup` installs it")


@pytest.fixture(scope="module")
def shared() -> Iterator[GatewayProcess]:
    """One daemon with the disks `a`, `b` and `ro` (read-only), for tests that leave both as they are."""
    need_nbdkit()
    gateway = GatewayProcess()
    try:
        gateway.start()
        for seed, name in enumerate(("a", "b", "ro")):
            random_image(gateway.images / f"{name}.raw", SIZE, seed, HOLES)
        gateway.attach("a", "a.raw", mode="write-back")
        gateway.attach("b", "b.raw", mode="write-through")
        gateway.attach("ro", "ro.raw", "--read-only")
        yield gateway
        assert gateway.stop() == 0, gateway.log_text()
        assert not gateway.unexpected_log()
    finally:
        gateway.remove()


@pytest.fixture
def attach(shared: GatewayProcess) -> Iterator[Callable[..., None]]:
    """As gateway.attach(), to the shared daemon; the disk is detached after the test."""
    with contextlib.ExitStack() as stack:

        def make(name: str, image: str, *options: str, mode: str | None = None) -> None:
            shared.attach(name, image, *options, mode=mode)
            stack.callback(shared.cli, "detach", name, "--force")

        yield make


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories: of the server, of a client, of one that knows the authority only, of another authority's client."""
    top = tmp_path_factory.mktemp("tls")
    ours = Authority(top / "ours", "Forebay test")
    theirs = Authority(top / "theirs", "Somebody else")
    anonymous = top / "anonymous"
    anonymous.mkdir()
    (anonymous / "ca-cert.pem").write_bytes(ours.certificate.read_bytes())
    wrong = theirs.issue("client", top / "wrong", "host7")
    (wrong / "ca-cert.pem").write_bytes(ours.certificate.read_bytes())  # it does trust the server
    return {
        "server": ours.issue("server", top / "server", "127.0.0.1"),
        "client": ours.issue("client", top / "client", "host7"),
        "anonymous": anonymous,
        "wrong": wrong,
    }


@pytest.fixture(scope="module")
def x509(certificates: dict[str, Path]) -> list[str]:
    """nbdkit's options for certificates, as the unit has them."""
    return ["--tls=require", f"--tls-certificates={certificates['server']}", "--tls-verify-peer"]


MakeDoor = Callable[..., NbdkitDoor]


@pytest.fixture
def make_door() -> Iterator[MakeDoor]:
    """`make_door(gateway, "reconnect=1", rules=TOML)`; it has to live until the test ends."""
    with contextlib.ExitStack() as stack:

        def make(gateway: GatewayProcess, *parameters: str, **options: Any) -> NbdkitDoor:
            door = NbdkitDoor(gateway, *parameters, **options)
            stack.callback(door.remove)
            made.append(door)
            return door

        made: list[NbdkitDoor] = []
        yield make
        for door in made:
            assert door.process.poll() in {None, 0}, f"nbdkit ended: {door.log_text()}"


@pytest.fixture
def handles() -> Iterator[Callable[..., Any]]:
    """`handles(uri)`: a libnbd handle that may read files of keys; `source`: the address to come from."""
    import nbd

    made: list[Any] = []

    def make(uri: str, source: str | None = None, disk: str = "", keys: Path | None = None) -> Any:
        handle = nbd.NBD()
        made.append(handle)
        handle.add_meta_context("base:allocation")
        handle.set_uri_allow_local_file(True)
        if source is None:
            handle.connect_uri(uri)
            return handle
        handle.set_tls(nbd.TLS_REQUIRE)
        handle.set_tls_username("alice")
        handle.set_tls_psk_file(str(keys))
        handle.set_export_name(disk)
        sock = socket.create_connection(("127.0.0.1", int(uri)), source_address=(source, 0))
        handle.connect_socket(sock.detach())
        return handle

    yield make
    for handle in made:
        with contextlib.suppress(nbd.Error):
            handle.shutdown()


def run(*command: str | Path, timeout: float = 60) -> str:
    """The command's output. Raises AssertionError with both streams unless it exits with 0."""
    need(str(command[0]))
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def fails(*command: str | Path) -> str:
    """What a command that has to fail, and not by a signal, says."""
    need(str(command[0]))
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode > 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def extents(handle: Any, length: int, offset: int = 0) -> list[tuple[int, int]]:
    """(length, flags) of base:allocation over the whole range, neighbours of one kind joined."""
    found: list[tuple[int, int]] = []
    end = offset + length
    while offset < end:
        for size, kind in block_status(handle, min(end - offset, 0xFFFFFFFF), offset):
            fitting = min(size, end - offset)
            before = found.pop()[0] if found and found[-1][1] == kind else 0
            found.append((before + fitting, kind))
            offset += fitting
    return found


def block_status(handle: Any, length: int, offset: int) -> list[tuple[int, int]]:
    entries: list[int] = []
    handle.block_status(length, offset, lambda c, o, words, e: entries.extend(words))
    return list(zip(entries[::2], entries[1::2], strict=True))


# --------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize(
    ("security", "says"),
    [
        ([], "--tls=require"),
        (["--tls=on", "--tls-psk={keys}"], "--tls=require"),
        (["--tls=require", "--tls-certificates={server}"], "--tls-verify-peer"),
    ],
)
def test_it_does_not_start_on_tcp_without_knowing_its_clients(
    shared: GatewayProcess,
    make_door: MakeDoor,
    certificates: dict[str, Path],
    tmp_path: Path,
    security: list[str],
    says: str,
) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text(f"alice:{STRANGER}\n")
    given = [x.format(server=certificates["server"], keys=keys) for x in security]
    with pytest.raises(RuntimeError, match=says):
        make_door(shared, security=given)
    assert make_door(shared, "insecure=true", security=given).alive


def test_insecure_serves_plain_tcp(
    shared: GatewayProcess, make_door: MakeDoor, handles: Callable[..., Any]
) -> None:
    door = make_door(shared, "insecure=true", security=[])
    assert handles(f"nbd://127.0.0.1:{door.port}/ro").get_size() == SIZE


@pytest.mark.parametrize(
    ("parameter", "rules", "says"),
    [
        ("reconnect=soon", "", "reconnect|could not convert"),
        ("insecure=perhaps", "", "true or false"),
        ("colour=red", "", "unknown parameter"),
        ("run=/run", '[[allow]]\nexports = ["*"]\n', "rule 1: peers"),
        ("run=/run", '[[allow]]\nexports = ["*"]\npeers = ["10.0.0.1/8"]\n', "rule 1: .*host bits"),
        ("run=/run", "[[deny]]\n", "only \\[\\[allow"),
        ("run=/run", "allow = what\n", "rules.toml"),
    ],
)
def test_wrong_parameters_and_rules_are_told_at_the_start(
    shared: GatewayProcess, make_door: MakeDoor, parameter: str, rules: str, says: str
) -> None:
    with pytest.raises(RuntimeError, match=says):
        make_door(shared, parameter, rules=rules)


def test_without_rules_it_does_not_start() -> None:
    need_nbdkit()
    command = ["nbdkit", "-f", f"--port={free_port()}", "--ipaddr=127.0.0.1", "python", str(PLUGIN)]
    assert "rules=FILE is missing" in fails(*command)


# ----------------------------------------------------------------------------------------------------------- clients


@pytest.mark.parametrize("how", ["certificate", "key"])
def test_the_usual_tools_over_tls(
    shared: GatewayProcess,
    attach: Callable[..., None],
    make_door: MakeDoor,
    certificates: dict[str, Path],
    x509: list[str],
    tmp_path: Path,
    how: str,
) -> None:
    """nbdinfo, nbdcopy both ways, qemu-img and qemu-io."""
    content = random_image(shared.images / f"{how}.raw", SIZE, 1, HOLES)
    attach(how, f"{how}.raw", mode="write-back")
    if how == "certificate":
        door = make_door(shared, security=x509)
        uri, cred = door.uri(how, tls_certificates=certificates["client"]), certificates["client"]
    else:
        door = make_door(shared)
        uri, cred = door.uri(how), None
    assert "with TLS" in run("nbdinfo", uri)
    copy, new = tmp_path / "copy.raw", tmp_path / "new.raw"
    run("nbdcopy", "--connections=4", uri, copy)
    assert copy.read_bytes() == content
    changed = random_image(new, SIZE, 2, [(0, MIB)])
    run("nbdcopy", "--connections=4", "--flush", new, uri)
    run("qemu-img", "compare", *door.qemu(how, cred), f"driver=raw,file.filename={new}")
    run("qemu-img", "convert", "-O", "raw", *door.qemu(how, cred), copy)
    assert copy.read_bytes() == changed
    commands = ["write -P 0x5a -f 65537 4096", "write -z -u 1M 64k", "discard 2M 64k", "flush"]
    checks = ["read -P 0x5a 65537 4096", "read -P 0 1M 64k"]
    said = run("qemu-io", *door.qemu(how, cred), *(x for c in commands + checks for x in ("-c", c)))
    assert "verification failed" not in said
    assert "error" not in said.lower()
    shared.cli("flush", how)
    image = (shared.images / f"{how}.raw").read_bytes()
    assert image[65537 : 65537 + 4096] == b"\x5a" * 4096
    assert image[MIB : MIB + 65536] == bytes(65536)
    assert image[3 * MIB :] == changed[3 * MIB :]


def test_what_the_disk_can_do_is_what_the_direct_socket_says(
    shared: GatewayProcess, make_door: MakeDoor
) -> None:
    """Sizes, flags, multi-conn; but the metadata contexts: nbdkit has base:allocation only."""
    found = []
    for uri in (make_door(shared).uri("a"), shared.uri("a")):
        [export] = json.loads(run("nbdinfo", "--json", uri))["exports"]
        export.pop("uri", None)
        found.append(export)
    through, direct = found
    assert sorted(direct.pop("contexts")) == [
        "base:allocation",
        "forebay:cached",
        "x-forebay:cached",
    ]
    assert through.pop("contexts") == ["base:allocation"]
    assert through == direct
    assert through["can_multi_conn"]


# ------------------------------------------------------------------------------------------------ who does not get in


def test_without_a_certificate_of_ours_nobody_gets_in(
    shared: GatewayProcess, make_door: MakeDoor, certificates: dict[str, Path], x509: list[str]
) -> None:
    door = make_door(shared, security=x509)
    good = door.uri("a", tls_certificates=certificates["client"])
    for who in ("anonymous", "wrong"):
        fails("nbdinfo", door.uri("a", tls_certificates=certificates[who]))
        fails("nbdinfo", "--list", door.uri("", tls_certificates=certificates[who]))
        assert "with TLS" in run("nbdinfo", good), who
    fails("nbdinfo", f"nbd://127.0.0.1:{door.port}/a")
    fails("nbdinfo", "--list", f"nbd://127.0.0.1:{door.port}")
    fails("qemu-img", "info", *door.qemu("a", certificates["wrong"]))
    assert "with TLS" in run("nbdinfo", good)


def test_without_a_key_of_ours_nobody_gets_in(
    shared: GatewayProcess, make_door: MakeDoor, tmp_path: Path
) -> None:
    door = make_door(shared)
    wrong = tmp_path / "wrong.psk"
    for user in ("alice", "mallory"):
        wrong.write_text(f"{user}:{STRANGER}\n")
        fails("nbdinfo", door.uri("a", tls_psk_file=wrong).replace("alice@", f"{user}@"))
    fails("nbdinfo", f"nbd://127.0.0.1:{door.port}/a")
    assert "with TLS" in run("nbdinfo", door.uri("a"))


def test_a_key_counts_as_soon_as_it_is_in_the_file(
    shared: GatewayProcess, make_door: MakeDoor
) -> None:
    door = make_door(shared)
    uri = door.uri("a").replace("alice@", "bob@")
    fails("nbdinfo", uri)
    with door.keys.open("a") as file:
        file.write(f"bob:{STRANGER}\n")
    run("nbdinfo", uri)


def test_what_no_rule_allows_does_not_exist(
    shared: GatewayProcess, make_door: MakeDoor, handles: Callable[..., Any]
) -> None:
    """By name, by address; in lists too; the default export; names that are none."""
    import nbd

    rules = """
    [[allow]]
    exports = ["b"]
    peers = ["127.0.0.0/30", "2001:db8::/32"]
    read_only = true
    [[allow]]
    exports = ["a*"]
    peers = ["127.0.0.2"]
    """
    door = make_door(shared, rules=rules)

    def opens(disk: str, source: str) -> Any:
        return handles(str(door.port), source=source, disk=disk, keys=door.keys)

    assert opens("b", "127.0.0.1").get_size() == SIZE
    assert opens("a", "127.0.0.2").is_read_only() is False
    assert opens("b", "127.0.0.2").is_read_only() is True
    for disk, source in [
        ("a", "127.0.0.1"),  # another peer's
        ("b", "127.0.0.9"),  # no rule names this peer
        ("ro", "127.0.0.2"),  # no rule names this disk
        ("a2", "127.0.0.2"),  # allowed, if it were there
        ("", "127.0.0.2"),
        ("../disks/a", "127.0.0.2"),
        ("a/../../control", "127.0.0.2"),
        ("a" * 4000, "127.0.0.2"),
        ("a\u2028\n", "127.0.0.2"),
    ]:
        with pytest.raises(nbd.Error):
            opens(disk, source)
        assert opens("b", "127.0.0.1").get_size() == SIZE, disk
    listed = json.loads(run("nbdinfo", "--list", "--json", door.uri("")))["exports"]
    assert [x["export-name"] for x in listed] == ["b"]
    log = door.log_text()
    assert "127.0.0.1 asked for a: no rule in " in log
    assert "127.0.0.2 asked for the default export: there is none" in log
    assert "127.0.0.2 asked for '../disks/a': no disk has such a name" in log


def test_changed_rules_hold_for_the_next_client_and_broken_ones_for_nobody(
    shared: GatewayProcess, make_door: MakeDoor, handles: Callable[..., Any]
) -> None:
    door = make_door(shared)
    old = handles(door.uri("a"))
    good = door.rules.read_text()
    door.rules.write_text(good.replace("*", "b"))
    fails("nbdinfo", door.uri("a"))
    run("nbdinfo", door.uri("b"))
    door.rules.write_text(good.replace("peers", "pears"))
    fails("nbdinfo", door.uri("a"))
    fails("nbdinfo", "--list", door.uri(""))
    assert "unknown key 'pears'" in door.log_text()
    door.rules.unlink()
    fails("nbdinfo", door.uri("a"))
    assert len(old.pread(4096, 0)) == 4096, "who was in stays in"
    door.rules.write_text(good)
    run("nbdinfo", door.uri("a"))


def test_a_read_only_disk_is_read_only(
    shared: GatewayProcess, make_door: MakeDoor, handles: Callable[..., Any]
) -> None:
    import nbd

    door = make_door(shared)
    for write in (
        methodcaller("pwrite", b"!" * 512, 0),
        methodcaller("zero", 512, 0),
        methodcaller("trim", 512, 0),
    ):
        handle = handles(door.uri("ro"))
        assert handle.is_read_only()
        handle.set_strict_mode(0)
        # nbdkit 1.32 refuses it, and now and then hangs up before the payload of a write that it has refused is there
        with pytest.raises(nbd.Error, match="EPERM|EINVAL|ENOTCONN"):
            write(handle)
    assert handles(door.uri("ro")).pread(512, 0) == (shared.images / "ro.raw").read_bytes()[:512]


# ------------------------------------------------------------------------------------------------- what goes through


def test_extents_are_those_of_the_direct_socket(
    shared: GatewayProcess, make_door: MakeDoor, handles: Callable[..., Any]
) -> None:
    door = make_door(shared)
    through, direct = handles(door.uri("a")), handles(shared.uri("a"))
    found = extents(through, SIZE)
    assert found == extents(direct, SIZE)
    assert [length for length, kind in found if kind == 3] == [MIB, MIB]
    assert extents(through, 3 * MIB, 777) == extents(direct, 3 * MIB, 777)


def test_the_longest_block_status_of_a_large_disk(
    shared: GatewayProcess,
    attach: Callable[..., None],
    make_door: MakeDoor,
    handles: Callable[..., Any],
) -> None:
    """2**32 - 1 bytes of one kind: nbdkit 1.32 aborts on it when a plugin tells it of more (CVE-2025-47711)."""
    with (shared.images / "large1.raw").open("wb") as file:
        file.truncate(8 << 30)
    attach("large1", "large1.raw", mode="write-back")
    handle = handles(make_door(shared).uri("large1"))
    assert extents(handle, 8 << 30) == [(8 << 30, 3)]
    handle.trim(0xFFFFFFFF, 1)
    handle.cache(4096, (8 << 30) - 4096)


def test_requests_longer_than_the_daemon_takes(
    shared: GatewayProcess,
    attach: Callable[..., None],
    make_door: MakeDoor,
    handles: Callable[..., Any],
) -> None:
    """nbdkit takes 64 MiB, the daemon 32."""
    with (shared.images / "long.raw").open("wb") as file:
        file.truncate(48 * MIB)
    attach("long", "long.raw", mode="write-back")
    handle = handles(make_door(shared).uri("long"))
    handle.set_strict_mode(0)
    data = random.Random(9).randbytes(40 * MIB)
    handle.pwrite(data, 4097)
    assert handle.pread(40 * MIB, 4097) == data
    assert handle.pread(4096, 0) == bytes(4096)


def test_flush_fua_trim_and_zero_reach_the_origin(
    start_nbdkit: Callable[..., NbdServer],  # first, so that it ends after its client has
    shared: GatewayProcess,
    attach: Callable[..., None],
    make_door: MakeDoor,
    handles: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """In mode none an acknowledged flush is one that the origin made durable: its log shows what came."""
    import nbd

    log = tmp_path / "origin.log"
    origin = start_nbdkit("memory", "8M", f"logfile={log}", filters=["log"])
    attach("n2", origin.uri, mode="none")
    handle = handles(make_door(shared).uri("n2"))

    def arrived(act: Callable[[], Any]) -> str:
        before = len(log.read_text())
        act()
        return log.read_text()[before:]

    data = b"x" * 4096
    assert "Flush" not in arrived(lambda: handle.pwrite(data, 8192))
    assert " Flush " in arrived(handle.flush)
    said = arrived(lambda: handle.pwrite(data, 0, nbd.CMD_FLAG_FUA))
    assert "fua=1" in said or " Flush " in said
    assert " Zero " in arrived(lambda: handle.zero(1 << 20, 1 << 20, nbd.CMD_FLAG_NO_HOLE))
    said = arrived(lambda: handle.trim(1 << 20, 2 << 20, nbd.CMD_FLAG_FUA))
    assert " Trim " in said or " Zero " in said
    assert "fua=1" in said or " Flush " in said


def test_prefetch_fills_the_cache(
    shared: GatewayProcess,
    attach: Callable[..., None],
    make_door: MakeDoor,
    handles: Callable[..., Any],
    random_image: Callable[..., bytes],
) -> None:
    random_image(shared.images / "a3.raw", SIZE)
    attach("a3", "a3.raw", mode="write-back")
    handle = handles(make_door(shared).uri("a3"))
    assert shared.status("a3")["cached_bytes"] == 0
    handle.cache(MIB, 0)
    assert shared.status("a3")["cached_bytes"] >= MIB


@pytest.mark.parametrize("connections", [1, 4])
def test_requests_wait_for_the_origin_together(
    start_nbdkit: Callable[..., NbdServer],
    shared: GatewayProcess,
    attach: Callable[..., None],
    make_door: MakeDoor,
    handles: Callable[..., Any],
    connections: int,
) -> None:
    """Eight misses on blocks far apart: one latency, not eight. Also those of one client connection."""
    import nbd

    latency = 0.4
    origin = start_nbdkit("pattern", "64M", f"rdelay={int(latency * 1000)}ms", filters=["delay"])
    attach("p4", origin.uri, "--read-only", mode="write-back")
    door = make_door(shared)
    clients = [handles(door.uri("p4")) for _ in range(connections)]
    buffers = [nbd.Buffer(4096) for _ in range(8)]
    began = time.monotonic()
    pending = [
        (clients[i % connections], clients[i % connections].aio_pread(buffer, i * 8 * MIB + MIB))
        for i, buffer in enumerate(buffers)
    ]
    for client, cookie in pending:
        complete(client, cookie)
    took = time.monotonic() - began
    for i, buffer in enumerate(buffers):
        assert buffer.to_bytearray()[:8] == (i * 8 * MIB + MIB).to_bytes(8, "big")
    assert latency <= took < 2 * latency


def test_four_connections_read_and_write_at_once(
    shared: GatewayProcess,
    attach: Callable[..., None],
    make_door: MakeDoor,
    handles: Callable[..., Any],
    rng: random.Random,
) -> None:
    """Each its own sectors of the same blocks; a flush of one covers what the others were told is written."""
    content = bytearray(random_image(shared.images / "a5.raw", SIZE, 3))
    attach("a5", "a5.raw", mode="write-back")
    door = make_door(shared)
    clients = [handles(door.uri("a5")) for _ in range(4)]
    assert all(client.can_multi_conn() for client in clients)
    faults: list[Exception] = []

    def work(index: int, own: random.Random) -> None:
        try:
            for _ in range(150):
                sector = own.randrange(SIZE // 16384) * 4 + index
                at = slice(sector * 4096, sector * 4096 + 4096)
                if own.random() < 0.5:
                    content[at] = data = own.randbytes(4096)
                    clients[index].pwrite(data, at.start)
                else:
                    assert clients[index].pread(4096, at.start) == content[at]
        except Exception as fault:  # noqa: BLE001  told below
            faults.append(fault)

    threads = [
        threading.Thread(target=work, args=(index, random.Random(rng.getrandbits(32))))
        for index in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    clients[0].flush()
    assert clients[3].pread(SIZE, 0) == content
    shared.cli("flush", "a5")
    assert (shared.images / "a5.raw").read_bytes() == content


def test_fio_verifies(
    shared: GatewayProcess, attach: Callable[..., None], make_door: MakeDoor
) -> None:
    with (shared.images / "f6.raw").open("wb") as file:
        file.truncate(32 * MIB)
    attach("f6", "f6.raw", mode="write-back")
    """fio's own URIs may not name a file of keys, so here TLS is left out."""
    door = make_door(shared, "insecure=true", security=[])
    run(
        *("fio", "--name=v", "--ioengine=nbd", f"--uri=nbd://127.0.0.1:{door.port}/f6"),
        *("--rw=randwrite", "--bs=4k", "--size=16M", "--iodepth=16", "--verify=crc32c"),
        *("--verify_fatal=1", "--randrepeat=1"),
    )


# ----------------------------------------------------------------------------------------- the daemon goes and returns


@pytest.mark.parametrize("planned", [False, True])
def test_a_connected_client_sees_no_error_when_the_daemon_restarts(
    gateway: GatewayProcess,
    make_door: MakeDoor,
    handles: Callable[..., Any],
    rng: random.Random,
    planned: bool,
) -> None:
    """Two clients work while the daemon is killed or stopped, twice. What they wrote is there."""
    content = bytearray(random_image(gateway.images / "a.raw", SIZE, 4))
    gateway.attach("a", "a.raw", mode="write-back")
    door = make_door(gateway)
    clients = [handles(door.uri("a")) for _ in range(2)]
    stop = threading.Event()
    faults: list[Exception] = []
    counts = [0, 0]

    def work(index: int, own: random.Random) -> None:
        try:
            while not stop.is_set():
                at = own.randrange(SIZE // 8192) * 8192 + index * 4096
                content[at : at + 4096] = data = own.randbytes(4096)
                clients[index].pwrite(data, at)
                again = own.randrange(SIZE // 8192) * 8192 + index * 4096
                assert clients[index].pread(4096, again) == content[again : again + 4096]
                if own.random() < 0.1:
                    clients[index].flush()
                counts[index] += 1
        except Exception as fault:  # noqa: BLE001  told below
            faults.append(fault)

    def work_goes_on() -> None:
        goal = counts[0] + 50
        wait_for(lambda: faults or counts[0] > goal)

    threads = [
        threading.Thread(target=work, args=(index, random.Random(rng.getrandbits(32))))
        for index in range(2)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            work_goes_on()
            gateway.restart(kill=not planned)
        work_goes_on()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults, faults
    clients[0].flush()
    assert clients[0].pread(SIZE, 0) == content


def complete(handle: Any, cookie: int) -> None:
    """Wait until this request was answered. Raises nbd.Error when that is with an error."""
    while not handle.aio_command_completed(cookie):
        handle.poll(-1)


def wait_for(done: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_daemon_that_stays_away_is_an_error_after_the_time_set_and_no_longer_when_it_returns(
    gateway: GatewayProcess, make_door: MakeDoor, handles: Callable[..., Any]
) -> None:
    import nbd

    content = random_image(gateway.images / "a.raw", SIZE, 5)
    gateway.attach("a", "a.raw", mode="write-back")
    door = make_door(gateway, "reconnect=0.6")
    handle = handles(door.uri("a"))
    assert handle.pread(4096, 0) == content[:4096]
    gateway.kill()
    began = time.monotonic()
    with pytest.raises(nbd.Error, match="EIO"):
        handle.pread(4096, 0)
    assert 0.4 < time.monotonic() - began < 5
    fails("nbdinfo", door.uri("a"))
    gateway.start()
    assert handle.pread(SIZE, 0) == content
    run("nbdinfo", door.uri("a"))


def test_nbdkit_ends_although_a_request_waits_for_the_daemon(
    gateway: GatewayProcess, handles: Callable[..., Any]
) -> None:
    """The request fails at once. (nbdkit itself waits on for clients to hang up, whatever the plugin.)"""
    import nbd

    random_image(gateway.images / "a.raw", SIZE, 5)
    gateway.attach("a", "a.raw")
    door = NbdkitDoor(gateway, "reconnect=600", options=["--verbose"])
    try:
        handle = handles(door.uri("a"))
        gateway.kill()
        cookie = handle.aio_pread(nbd.Buffer(4096), 0)
        while "pread count=4096" not in door.log_text():
            handle.poll(10)
        began = time.monotonic()
        door.process.terminate()
        with pytest.raises(nbd.Error):
            complete(handle, cookie)
        handle.shutdown()
        door.process.wait(20)
        assert time.monotonic() - began < 5
    finally:
        door.remove()


def test_a_disk_that_is_another_by_now_is_not_passed_off_as_the_old_one(
    gateway: GatewayProcess, make_door: MakeDoor, handles: Callable[..., Any]
) -> None:
    import nbd

    random_image(gateway.images / "a.raw", SIZE, 5)
    other = random_image(gateway.images / "b.raw", SIZE + MIB, 6)
    gateway.attach("d", "a.raw")
    door = make_door(gateway, "reconnect=5")
    old = handles(door.uri("d"))
    gateway.cli("detach", "d", "--force")
    gateway.attach("d", "b.raw")
    for _ in range(2):
        with pytest.raises(nbd.Error, match="EIO"):
            old.pread(4096, 0)
    new = handles(door.uri("d"))
    assert new.pread(SIZE + MIB, 0) == other
    with pytest.raises(nbd.Error, match="EIO"):
        old.pwrite(bytes(4096), 0)
    assert new.pread(4096, 0) == other[:4096]


def test_a_client_of_nbdkit_is_a_client_of_the_disk(
    gateway: GatewayProcess, make_door: MakeDoor, handles: Callable[..., Any]
) -> None:
    """Detach refuses while it is there, and works once it has gone."""
    random_image(gateway.images / "a.raw", SIZE, 5)
    gateway.attach("a", "a.raw")
    door = make_door(gateway)
    handle = handles(door.uri("a"))
    handle.pread(4096, 0)
    refused = gateway.cli("detach", "a", check=False)
    assert refused.returncode == 1, refused
    assert gateway.status("a")["clients"] >= 1
    handle.shutdown()
    wait_for(lambda: gateway.status("a")["clients"] == 0)
    gateway.cli("detach", "a")


# ----------------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("names", "parameters"),
    [
        (["rate"], ["rate=1G"]),
        (["stats"], ["statsfile={out}"]),
        (["log"], ["logfile={out}"]),
        (["readahead", "cacheextents"], []),
    ],
)
def test_filters_on_top(
    shared: GatewayProcess, make_door: MakeDoor, tmp_path: Path, names: list[str], parameters: Any
) -> None:
    out = tmp_path / "out"
    door = make_door(shared, *(x.format(out=out) for x in parameters), filters=names)
    copy = tmp_path / "copy"
    run("nbdcopy", door.uri("ro"), copy)
    assert copy.read_bytes() == (shared.images / "ro.raw").read_bytes()
    if names == ["log"]:
        assert " Connect export=ro tls=1 " in out.read_text(), out.read_text()
    if names == ["stats"]:
        door.process.terminate()
        door.process.wait(20)
        assert "read:" in out.read_text()


def test_the_rate_filter_slows_down(
    shared: GatewayProcess, make_door: MakeDoor, tmp_path: Path
) -> None:
    door = make_door(
        shared, "rate=32M", "burstiness=0.1", filters=["rate"]
    )  # in bits: 4 MiB a second
    began = time.monotonic()
    run("nbdcopy", door.uri("a"), tmp_path / "copy")
    assert time.monotonic() - began > 0.5


def test_the_partition_filter(
    shared: GatewayProcess,
    attach: Callable[..., None],
    make_door: MakeDoor,
    handles: Callable[..., Any],
) -> None:
    content = bytearray(random_image(shared.images / "p7.raw", 4 * MIB, 7))
    start, sectors = 2048, 4096
    entry = bytes([0, 0, 0, 0, 0x83, 0, 0, 0])
    entry += start.to_bytes(4, "little") + sectors.to_bytes(4, "little")
    content[446:510] = entry + bytes(48)
    content[510:512] = b"\x55\xaa"
    (shared.images / "p7.raw").write_bytes(content)
    attach("p7", "p7.raw", mode="write-through")
    door = make_door(shared, "partition=1", filters=["partition"])
    handle = handles(door.uri("p7"))
    assert handle.get_size() == sectors * 512
    assert handle.pread(sectors * 512, 0) == content[start * 512 : (start + sectors) * 512]


def encrypt(plain: Path, image: Path, key: Path) -> None:
    """Make an image of LUKS. qemu-img measures how quick the host is, and refuses to if its clock does not move."""
    for last in (False, False, False, False, True):
        try:
            run(
                *("qemu-img", "convert", "-O", "luks", "--object", f"secret,id=s,file={key}"),
                *("-o", "key-secret=s,iter-time=10,cipher-mode=xts", "-f", "raw", plain, image),
            )
            return
        except AssertionError as error:
            if last or "accurate CPU usage" not in str(error):
                raise


def test_the_luks_filter(
    shared: GatewayProcess,
    attach: Callable[..., None],
    make_door: MakeDoor,
    handles: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """The disk lies encrypted in the image and the cache; clients see it in clear, inside TLS."""
    plain, key = tmp_path / "plain", tmp_path / "key"
    content = random_image(plain, 2 * MIB, 8)
    key.write_text("a passphrase")
    image = shared.images / "l8.raw"
    encrypt(plain, image, key)
    attach("l8", "l8.raw", mode="write-back")
    door = make_door(shared, f"passphrase=+{key}", filters=["luks"])
    handle = handles(door.uri("l8"))
    assert handle.pread(len(content), 0) == content
    handle.pwrite(b"secret" * 1024, 4096)
    handle.flush()
    shared.cli("flush", "l8")
    assert b"secretsecret" not in image.read_bytes()
    assert handle.pread(6144, 4096) == b"secret" * 1024


# ---------------------------------------------------------------------------------------------------------- the unit


def test_the_unit_is_valid_and_hardened() -> None:
    need("systemd-analyze", "nbdkit")
    unit = PLUGIN.parents[2] / "systemd" / "forebay-nbdkit.service"
    assert run("systemd-analyze", "verify", "--man=no", unit) == ""
    run("systemd-analyze", "security", "--offline=true", "--threshold=20", unit)


def test_the_sample_of_rules_lets_nobody_in(shared: GatewayProcess, make_door: MakeDoor) -> None:
    sample = (PLUGIN.parents[2] / "config" / "nbdkit.toml").read_text()
    door = make_door(shared, rules=sample)
    assert json.loads(run("nbdinfo", "--list", "--json", door.uri("")))["exports"] == []
    fails("nbdinfo", door.uri("a"))
    door.rules.write_text(re.sub(r"^#(\[\[|\w+ = )", r"\1", sample, flags=re.MULTILINE))
    assert '\npeers = ["192.0.2.200"]\n' in door.rules.read_text()
    before = len(door.log_text())
    fails("nbdinfo", door.uri("a"))
    assert "no rule in" in door.log_text()[before:], "the commented rules are right"
