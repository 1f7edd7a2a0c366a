# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Faults that caching NBD servers have been seen to have, each shown not to be one of Forebay.

Where a peer shows its fault in a second and every time, a test does that too: so that it is known to be looked for in
the right way. Those tests are named `..._peer`; they say nothing about Forebay, and may go when the peer is mended.
"""

import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import MODES, OneDisk, allocated, cache_info, run, small_tmpfs, wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, NbdServer, random_image

BLOCK = 65536

Connect = Callable[..., Any]
MakeGateway = Callable[..., GatewayProcess]
StartServer = Callable[..., NbdServer]


def attach(
    gateway: GatewayProcess,
    size: int,
    mode: str,
    *options: str,
    name: str = "d",
    sparse: bool = False,
) -> OneDisk:
    """A disk on a new image of its own; `sparse`: nothing but a hole."""
    path = gateway.images / f"{name}.raw"
    content = random_image(path, size, len(name), [(0, size)] if sparse else [])
    gateway.attach(name, path.name, *options, mode=mode)
    return OneDisk(gateway, name, path, content)


def write_all(client: Any, content: bytes) -> None:
    for at in range(0, len(content), BLOCK):
        client.pwrite(content[at : at + BLOCK], at)


# ------------------------------------------------------- acknowledged write-back data evicted, read back as zeros


def test_dirty_data_is_never_evicted(
    make_gateway: MakeGateway, connect: Connect, rng: random.Random
) -> None:
    """More than the cache can hold is written, no flush asked for, with cold reads to make it evict."""
    gateway = make_gateway({"cache": {"size": "16 MiB"}})
    disk = attach(gateway, 24 * MIB, "write-back")
    other = attach(gateway, 16 * MIB, "write-through", name="other")
    client, reader = connect(disk.uri), connect(other.uri)
    model = rng.randbytes(24 * MIB)
    for at in range(0, len(model), MIB):
        write_all_at(client, model, at)
        cold = at % (16 * MIB)
        assert reader.pread(MIB, cold) == other.content[cold : cold + MIB]
    for at in rng.sample(range(0, len(model), MIB), 24):
        assert client.pread(MIB, at) == model[at : at + MIB], at
    assert disk.file_after_flush() == model


def write_all_at(client: Any, content: bytes, at: int) -> None:
    for part in range(at, at + MIB, BLOCK):
        client.pwrite(content[part : part + BLOCK], part)


def test_dirty_data_is_never_evicted_while_the_origin_takes_nothing(
    start_nbdkit: StartServer, make_gateway: MakeGateway, connect: Connect, tmp_path: Path
) -> None:
    """The cache fills up with what cannot go anywhere: writes fail in the end, what was acknowledged stays."""
    import nbd

    gateway = make_gateway({"cache": {"size": "16 MiB"}, "defaults": {"origin_timeout": "2s"}})
    gateway.allow_log("write-back failed")
    path, refuse = tmp_path / "image.raw", tmp_path / "refuse"
    content = random_image(path, 32 * MIB, 1)
    server = start_nbdkit(
        "file", path, "error=EIO", "error-rate=1", f"error-file={refuse}", filters=["error"]
    )
    gateway.attach("d", server.uri, mode="write-back")
    disk = OneDisk(gateway, "d", path, content)
    client = connect(disk.uri)
    warm = client.pread(MIB, 31 * MIB)
    refuse.touch()
    acknowledged = 0
    with pytest.raises(nbd.Error, match="space|ENOSPC"):  # noqa: PT012  (which of them fails is open)
        for block in range(31 * 16):
            client.pwrite(bytes([block % 251 + 1]) * BLOCK, block * BLOCK)
            acknowledged += 1
    assert acknowledged > 4 * 16, "some of it fits"
    model = b"".join(bytes([block % 251 + 1]) * BLOCK for block in range(acknowledged))
    assert client.pread(len(model), 0) == model
    assert disk.status()["dirty_bytes"] >= len(model)
    gateway.restart(kill=True)
    client = connect(disk.uri)
    assert client.pread(len(model), 0) == model
    refuse.unlink()
    disk.flush()
    assert path.read_bytes()[: len(model)] == model
    assert path.read_bytes()[31 * MIB :] == warm
    gateway.allow_log("cannot be reached|can be reached again")


def test_dirty_data_is_evicted_peer(
    start_nbdkit: StartServer, connect: Connect, tmp_path: Path
) -> None:
    path = tmp_path / "image.raw"
    random_image(path, 32 * MIB, 1, [(0, 32 * MIB)])
    server = start_nbdkit("file", path, "cache=writeback", "cache-max-size=4M", filters=["cache"])
    client = connect(server.uri)
    write_all(client, b"x" * 32 * MIB)
    if client.pread(32 * MIB, 0) == b"x" * 32 * MIB:
        pytest.skip("this nbdkit keeps what it acknowledged")


# --------------------------------------------------------------------------------- dirty blocks reported as holes


@pytest.mark.parametrize("mode", MODES)
def test_unflushed_data_over_a_hole_is_data(
    mode: str, gateway: GatewayProcess, connect: Connect, tmp_path: Path
) -> None:
    disk = attach(gateway, 8 * MIB, mode, sparse=True)
    client = connect(disk.uri, "base:allocation")
    model = bytearray(8 * MIB)
    for offset, length in ((0, 4096), (MIB + 100, 1), (3 * MIB, 70000), (8 * MIB - 5, 5)):
        client.pwrite(b"x" * length, offset)
        model[offset : offset + length] = b"x" * length
    at = 0
    while at < 8 * MIB:
        found: list[tuple[int, int]] = []

        def note(
            _context: str, _offset: int, entries: list[int], _error: Any, into: Any = found
        ) -> None:
            into += zip(entries[::2], entries[1::2], strict=True)

        client.block_status(8 * MIB - at, at, note)
        for length, flags in found:
            assert not flags or not any(model[at : at + length]), (at, length, flags)
            at += length
    copy = tmp_path / "copy.raw"
    run("nbdcopy", disk.uri, copy)
    assert copy.read_bytes() == model
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", disk.uri, copy)
    assert copy.read_bytes() == model


def test_unflushed_data_over_a_hole_of_an_overlay_is_data(
    gateway: GatewayProcess, connect: Connect, tmp_path: Path
) -> None:
    disk = attach(gateway, 8 * MIB, "write-through", "--overlay", sparse=True)
    connect(disk.uri).pwrite(b"x" * 70000, 3 * MIB)
    copy = tmp_path / "copy.raw"
    run("nbdcopy", disk.uri, copy)
    assert copy.read_bytes() == bytes(3 * MIB) + b"x" * 70000 + bytes(5 * MIB - 70000)


def test_dirty_zeros_over_data_are_zeros(
    gateway: GatewayProcess, connect: Connect, tmp_path: Path
) -> None:
    """The other way round: what was trimmed and not written back is not the image's data."""
    disk = attach(gateway, 8 * MIB, "write-back")
    client = connect(disk.uri)
    client.trim(2 * MIB, MIB)
    client.zero(MIB, 5 * MIB)
    model = disk.content[:MIB] + bytes(2 * MIB) + disk.content[3 * MIB : 5 * MIB]
    model += bytes(MIB) + disk.content[6 * MIB :]
    copy = tmp_path / "copy.raw"
    run("nbdcopy", disk.uri, copy)
    assert copy.read_bytes() == model
    assert allocated(copy) <= 6 * MIB, "told as holes"
    assert disk.file_after_flush() == model


def test_unflushed_data_is_told_as_a_hole_peer(
    start_nbdkit: StartServer, connect: Connect, tmp_path: Path
) -> None:
    path, copy = tmp_path / "image.raw", tmp_path / "copy.raw"
    random_image(path, 8 * MIB, 1, [(0, 8 * MIB)])
    server = start_nbdkit("file", path, "cache=writeback", filters=["cache"])
    connect(server.uri).pwrite(b"x" * BLOCK, 3 * MIB)
    run("nbdcopy", server.uri, copy)
    if any(copy.read_bytes()):
        pytest.skip("this nbdkit tells dirty blocks as data")


# --------------------------------------------------------- misses queue behind each other, hits behind misses

LATENCY = 0.4
"""Seconds of the origin: long beside what a loaded machine adds."""


@pytest.fixture
def slow(start_nbdkit: StartServer, gateway: GatewayProcess, tmp_path: Path) -> OneDisk:
    """A disk whose origin takes LATENCY for a read, and any number at a time; nothing of it is cached."""
    path = tmp_path / "image.raw"
    content = random_image(path, 32 * MIB, 1)
    server = start_nbdkit("file", path, f"rdelay={round(LATENCY * 1000)}ms", filters=["delay"])
    gateway.attach("d", server.uri, mode="write-through")
    return OneDisk(gateway, "d", path, content)


def read_together(client: Any, offsets: list[int]) -> tuple[float, list[bytes]]:
    """Read a sector at each offset, all at once. (seconds, what was read)."""
    import nbd

    start = time.monotonic()
    buffers = [nbd.Buffer(4096) for _ in offsets]
    cookies = [client.aio_pread(b, at) for b, at in zip(buffers, offsets, strict=True)]
    while client.aio_in_flight():
        client.poll(-1)
    taken = time.monotonic() - start
    assert all(client.aio_command_completed(cookie) for cookie in cookies)
    return taken, [bytes(buffer.to_bytearray()) for buffer in buffers]


def test_misses_wait_together(slow: OneDisk, connect: Connect) -> None:
    client = connect(slow.uri)
    one, _ = read_together(client, [MIB])
    offsets = [3 * MIB * number + 2 * MIB for number in range(8)]
    eight, found = read_together(client, offsets)
    assert found == [slow.content[at : at + 4096] for at in offsets]
    assert one >= LATENCY
    assert eight < 2 * one, "eight latencies one after the other would be eight times as long"


def test_hits_do_not_wait_for_misses(slow: OneDisk, connect: Connect) -> None:
    import nbd

    client, other = connect(slow.uri), connect(slow.uri)
    client.pread(4096, MIB)
    cookies = [client.aio_pread(nbd.Buffer(4096), at * MIB) for at in range(4, 30, 3)]
    for who in (client, other):  # on the connection that waits, and on another
        assert who.pread(4096, MIB) == slow.content[MIB : MIB + 4096]
    assert not any(client.aio_command_completed(cookie) for cookie in cookies)
    while client.aio_in_flight():
        client.poll(-1)


def test_a_block_is_fetched_once_however_many_ask(slow: OneDisk, connect: Connect) -> None:
    clients = [connect(slow.uri) for _ in range(4)]
    import nbd

    cookies = [
        (c, c.aio_pread(nbd.Buffer(4096), MIB + i * 4096)) for i, c in enumerate(clients * 2)
    ]
    for client in clients:
        while client.aio_in_flight():
            client.poll(-1)
    assert all(client.aio_command_completed(cookie) for client, cookie in cookies)
    assert slow.status()["origin_read_bytes"] == BLOCK


def test_misses_queue_peer(start_nbdkit: StartServer, connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    random_image(path, 8 * MIB, 1)
    server = start_nbdkit("file", path, "rdelay=50ms", filters=["cache", "delay"])
    client = connect(server.uri)
    if read_together(client, [at * MIB for at in range(8)])[0] < 8 * 0.05:
        pytest.skip("this nbdkit's cache lets misses wait together")


# ------------------------------------------------------------------- a full cache device breaking guest reads


def test_a_cache_device_without_room_is_refused_or_passed_by(
    make_gateway: MakeGateway, connect: Connect, short_path: Path
) -> None:
    """The file system below the cache is smaller than the cache was told to be."""
    with small_tmpfs(short_path / "small", 24 * MIB) as small:
        gateway = make_gateway(
            {"gateway": {"state": str(small / "state")}, "cache": {"size": "64 MiB"}}, start=False
        )
        try:
            gateway.start()
        except RuntimeError as fault:
            gateway.allow_log(".")
            assert "exit 1" in str(fault)  # noqa: PT017  (a start that works is as good)
            lines = gateway.log_text().splitlines()
            assert len(lines) == 1, lines
            assert str(small) in lines[0]
            assert not (small / "state" / "cache.img").exists() or not allocated(
                small / "state" / "cache.img"
            ), "room that is needed elsewhere is not kept"
            return
        gateway.allow_log("cache|room|space")
        disk = attach(gateway, 48 * MIB, "write-through")
        for _ in range(2):
            assert connect(disk.uri).pread(32 * MIB, 0) == disk.content[: 32 * MIB]
        assert disk.reads() == disk.content
        gateway.kill()


def fill_up(directory: Path) -> None:
    """Take all the room there is."""
    ballast = os.open(directory / "ballast", os.O_WRONLY | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):
            while os.write(ballast, bytes(4096)):
                pass
    finally:
        os.close(ballast)
    assert not os.statvfs(directory).f_bavail


@pytest.mark.parametrize("mode", ["write-through", "write-back"])
def test_a_file_system_that_fills_up_below_the_cache_breaks_no_read(
    mode: str, make_gateway: MakeGateway, connect: Connect, short_path: Path, rng: random.Random
) -> None:
    """State and cache have their room at first; then somebody else takes the rest."""
    import nbd

    with small_tmpfs(short_path / "small", 64 * MIB) as small:
        gateway = make_gateway(
            {"gateway": {"state": str(small / "state")}, "cache": {"size": "32 MiB"}}
        )
        gateway.allow_log("cache|index|room|space|commit|ENOSPC|MDB|slow: a write")
        disk = attach(gateway, 48 * MIB, mode)
        client = connect(disk.uri)
        data = rng.randbytes(MIB)
        client.pwrite(data, 3 * MIB)
        client.flush()
        fill_up(small)
        model = bytearray(disk.content)
        model[3 * MIB : 4 * MIB] = data
        for _ in range(2):  # more than the cache holds: it fills and evicts
            for at in range(0, 48 * MIB, MIB):
                assert client.pread(MIB, at) == model[at : at + MIB], at
        assert gateway.alive
        if mode == "write-back":
            with pytest.raises(nbd.Error, match="ENOSPC"):
                client.pwrite(rng.randbytes(MIB), 20 * MIB)
            model[20 * MIB : 21 * MIB] = client.pread(MIB, 20 * MIB)
            for at in range(24 * MIB, 40 * MIB, BLOCK):  # which needs room in the journal only
                client.zero(4096, at)
                model[at : at + 4096] = bytes(4096)
        assert cache_info(gateway)["state"] != "failed", "what it has may be used"
        (small / "ballast").unlink()
        gateway.restart(kill=True)
        assert connect(disk.uri).pread(MIB, 3 * MIB) == data, "acknowledged, and flushed"
        assert disk.reads() == model
        gateway.kill()


def test_reads_fail_when_the_cache_is_full_peer(
    start_nbdkit: StartServer, connect: Connect, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libnbdmod")
    import nbd

    random_image(short_path / "image.raw", 16 * MIB, 1)
    with small_tmpfs(short_path / "small", 4 * MIB) as small:
        monkeypatch.setenv("TMPDIR", str(small))
        server = start_nbdkit(
            "file", short_path / "image.raw", "cache-on-read=true", filters=["cache"]
        )
        monkeypatch.undo()
        client = connect(server.uri)
        try:
            for at in range(0, 16 * MIB, MIB):
                client.pread(MIB, at)
        except nbd.Error as fault:
            assert "space" in str(fault)  # noqa: PT017  (a peer that is mended does not fail)
        else:
            pytest.skip("this nbdkit reads on when its cache is full")
        server.kill()


# ------------------------------------------------------------- two exports on one cache, each other's data


@pytest.mark.parametrize("mode", MODES)
def test_disks_never_see_each_others_data(
    mode: str, start_nbdkit: StartServer, gateway: GatewayProcess, connect: Connect, tmp_path: Path
) -> None:
    """Two files, and two exports of one server: same sizes, same offsets, one cache."""
    folder = tmp_path / "exports"
    folder.mkdir()
    server = start_nbdkit("file", f"dir={folder}")
    models = {}
    for name in ("a", "b", "na", "nb"):
        path = (folder if name.startswith("n") else gateway.images) / f"{name}.raw"
        models[name] = bytearray(random_image(path, 2 * MIB, sum(name.encode())))
        uri = server.uri.replace("/?", f"/{name}.raw?")
        gateway.attach(name, uri if name.startswith("n") else path.name, mode=mode)
    clients = {name: connect(gateway.uri(name)) for name in models}
    for client in clients.values():
        client.pread(MIB, 0)
    for number, (name, client) in enumerate(clients.items()):
        data = bytes([number + 1]) * 10000
        client.pwrite(data, 300_000)
        models[name][300_000:310_000] = data
        client.zero(4096 * (number + 1), MIB)
        models[name][MIB : MIB + 4096 * (number + 1)] = bytes(4096 * (number + 1))
    for name, client in clients.items():
        assert client.pread(2 * MIB, 0) == models[name], name
    gateway.cli("flush", "--all")
    for name, model in models.items():
        folder_of = folder if name.startswith("n") else gateway.images
        assert (folder_of / f"{name}.raw").read_bytes() == model, name


def test_a_new_image_under_an_old_name_has_nothing_of_the_old(
    gateway: GatewayProcess, connect: Connect
) -> None:
    """Disk and image are gone and come back with other content, size and all: the cache must not know better."""
    gateway.allow_log(
        "dropped as asked|(changed by somebody else|replaced by another file): its cached blocks are dropped"
    )
    old = attach(gateway, 4 * MIB, "write-back")
    client = connect(old.uri)
    client.pread(4 * MIB, 0)
    client.pwrite(b"x" * MIB, MIB)
    gateway.cli("detach", "d", "--force", "--discard")
    old.path.unlink()
    new = attach(gateway, 4 * MIB, "write-back", sparse=True)
    assert new.reads() == bytes(4 * MIB)


# ------------------------------------------------------------------- no start while the origin is down


@pytest.mark.parametrize("kill", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_a_warm_disk_starts_without_its_origin(
    kill: bool, start_nbdkit: StartServer, gateway: GatewayProcess, connect: Connect, tmp_path: Path
) -> None:
    gateway.allow_log("cannot be reached|can be reached again|broke|write-back failed")
    path = tmp_path / "image.raw"
    content = random_image(path, 4 * MIB, 1)
    server = start_nbdkit("file", path)
    gateway.attach("d", server.uri, mode="write-back")
    client = connect(gateway.uri("d"))
    assert client.pread(4 * MIB, 0) == content
    client.pwrite(b"x" * 4096, MIB)
    model = content[:MIB] + b"x" * 4096 + content[MIB + 4096 :]
    OneDisk(gateway, "d", path, content).commit()
    server.kill()
    gateway.restart(kill=kill)
    client = connect(gateway.uri("d"))
    assert client.pread(4 * MIB, 0) == model
    client.pwrite(b"y" * 4096, 2 * MIB)
    client.flush()
    assert client.pread(4096, 2 * MIB) == b"y" * 4096, "and it takes writes"


# ------------------------------------------------------------------------- a changed origin served stale


def change(path: Path, size: int) -> bytes:
    """As another host would: new content under the old name, of the same size."""
    new = path.with_suffix(".new")
    content = random_image(new, size, 99)
    new.rename(path)
    return content


@pytest.mark.parametrize("how", ["detached", "stopped", "killed"])
@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "written"])
def test_an_origin_that_changed_meanwhile_is_read_anew(
    how: str, replaced: bool, gateway: GatewayProcess
) -> None:
    gateway.allow_log("changed by somebody else|replaced by another file")
    disk = attach(gateway, 4 * MIB, "write-through", "--read-only")
    assert disk.reads() == disk.content
    disk.commit()
    if how == "detached":
        gateway.cli("detach", "d")
    else:
        (gateway.kill if how == "killed" else gateway.stop)()
    if replaced:
        content = change(disk.path, 4 * MIB)
    else:
        content = disk.content[:MIB] + b"!" + disk.content[MIB + 1 :]
        with disk.path.open("r+b") as file:
            file.seek(MIB)
            file.write(b"!")
    if how == "detached":
        gateway.attach("d", disk.path.name, "--read-only", mode="write-through")
    else:
        gateway.start()
    assert disk.reads() == content


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "written"])
def test_an_origin_that_changes_under_a_disk_is_noticed(
    replaced: bool, gateway: GatewayProcess, connect: Connect
) -> None:
    """Never a mixture: either all of a read is old or all of it is new, and soon it is new, or an error."""
    import nbd

    gateway.allow_log("changed by somebody else|replaced by another file|forebay resolve")
    disk = attach(gateway, 4 * MIB, "write-through", "--read-only")
    client = connect(disk.uri)
    assert client.pread(4 * MIB, 0) == disk.content
    if replaced:
        content = change(disk.path, 4 * MIB)
    else:
        content = random_image(disk.path, 4 * MIB, 99)

    def noticed() -> bool:
        try:
            found = client.pread(4 * MIB, 0)
        except nbd.Error:
            return True
        assert found in (disk.content, content), "a mixture"
        return bool(found == content)

    wait_for(noticed, "still the old content", 20)
    assert "changed" in gateway.log_text() or disk.status()["reason"]


def test_an_origin_that_changed_under_dirty_data_is_a_conflict_and_told(
    gateway: GatewayProcess, connect: Connect
) -> None:
    """Somebody ignored the owner marker: neither the old nor a mixture is served, and the image stays as it is."""
    import nbd

    gateway.allow_log("changed by somebody else|replaced by another file|dropped as asked")
    disk = attach(gateway, 4 * MIB, "write-back")
    client = connect(disk.uri)
    client.pread(4 * MIB, 0)
    client.pwrite(b"x" * 4096, 0)
    client.flush()
    gateway.stop()
    content = change(disk.path, 4 * MIB)
    gateway.start()
    for _ in range(2):
        with pytest.raises(nbd.Error):
            connect(disk.uri).pread(4096, MIB)
        assert disk.status()["state"] == "conflict"
        assert "forebay resolve d" in disk.status()["reason"]
        assert gateway.cli("flush", "d", check=False).returncode == 1
        assert disk.path.read_bytes() == content
        gateway.restart(kill=True)  # and it is not forgotten
    gateway.cli("detach", "d", "--discard", "--force")
    gateway.attach("d", disk.path.name)
    assert disk.reads() == content


# --------------------------------------------------------------------------- warm cache lost at kill -9


def test_the_cache_is_warm_after_kill_9(gateway: GatewayProcess) -> None:
    modes = ("write-around", "write-through", "write-back")
    disks = [attach(gateway, 8 * MIB, mode, name=mode) for mode in modes]
    for disk in disks:
        assert disk.reads() == disk.content
    time.sleep(4)  # what was filled in the last two seconds may be fetched again
    gateway.restart(kill=True)
    for disk in disks:
        assert disk.reads() == disk.content
        status = disk.status()
        assert status["read_hits"] > 0
        assert status["origin_read_bytes"] == 0


# ---------------------------------------------------------------------- more that peers do, or do not do


def test_an_acknowledged_write_survives_the_stop_unflushed(
    gateway: GatewayProcess, connect: Connect
) -> None:
    """The peer: SIGTERM with one acknowledged, unflushed write, and it is gone."""
    disk = attach(gateway, 4 * MIB, "write-back")
    connect(disk.uri).pwrite(b"x" * 5000, 123)
    gateway.restart()
    assert disk.reads()[:5123] == disk.content[:123] + b"x" * 5000


def test_an_origin_that_fails_a_flush_loses_nothing(
    start_nbdkit: StartServer, gateway: GatewayProcess, connect: Connect, tmp_path: Path
) -> None:
    """The drain says so and keeps everything; the next one, with the origin well again, succeeds."""
    gateway.allow_log("write-back failed")
    path, refuse = tmp_path / "image.raw", tmp_path / "refuse"
    content = random_image(path, 4 * MIB, 1)
    server = start_nbdkit(
        "file", path, "error-pwrite=EIO", "error-pwrite-rate=1", f"error-pwrite-file={refuse}",
        filters=["error"],
    )  # fmt: skip
    gateway.attach("d", server.uri, mode="write-back")
    disk = OneDisk(gateway, "d", path, content)
    client = connect(disk.uri)
    refuse.touch()
    client.pwrite(b"x" * MIB, MIB)
    client.flush()
    failed = gateway.cli("flush", "d", check=False)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1, failed.stderr
    assert disk.status()["dirty_bytes"] == MIB
    assert client.pread(MIB, MIB) == b"x" * MIB
    refuse.unlink()
    assert disk.file_after_flush() == content[:MIB] + b"x" * MIB + content[2 * MIB :]
