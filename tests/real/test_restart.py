# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Planned restarts under load, by a descriptor store: no guest error, a pause; and what must not be handed over."""

import os
import random
import socket
import statistics
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from real.disk_fixture import wait_for
from real.processes import MIB, ONE_THREAD, accepts, random_image
from real.service_manager import ManagedGateway
from real.steady_guest import SteadyGuest

RESTARTS = int(os.environ.get("FOREBAY_RESTARTS", "5"))
"""Planned restarts and kills under load: 20 is the bar, 5 are quick."""

PAUSE_SECONDS = 1.0 if RESTARTS >= 20 else 5.0
"""The bar, for a machine that does nothing else; in a quick run it may be busy."""

SIZE = 16 * MIB

Connect = Callable[..., Any]


@pytest.fixture
def managed() -> Iterator[ManagedGateway]:
    pytest.importorskip("libnbdmod", reason="python3-libnbd is not installed")
    gateway = ManagedGateway({"defaults": {"max_lag": "500ms"}})
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.remove()
    assert not gateway.unexpected_log()


def attach(gateway: ManagedGateway, name: str, mode: str) -> bytes:
    content = random_image(gateway.images / f"{name}.raw", SIZE, sum(name.encode()))
    gateway.attach(name, f"{name}.raw", mode=mode)
    return content


def longest(seen: dict[str, Any], begin: float, end: float) -> float:
    """Seconds for which this guest had no answer, around a restart."""
    return max((b - a for a, b in seen["pauses"] if a < end and b > begin), default=0.0)


def test_no_guest_error_in_planned_restarts_under_load(managed: ManagedGateway) -> None:
    """Guests without any reconnect; several on one disk; each compares everything at the end."""
    modes = ("write-back", "write-through", "full-copy", "none")
    for mode in modes:
        attach(managed, mode, mode)
    guests = [
        SteadyGuest(managed.uri(mode), first=first, length=4 * MIB, depth=depth)
        for mode, first, depth in [
            ("write-back", 0, 16),
            ("write-back", 4 * MIB, 1),
            ("write-through", 0, 4),
            ("full-copy", 0, 4),
            ("none", 0, 2),
        ]
    ]
    windows = []
    rng = random.Random(1)
    for guest in guests:
        guest.__enter__()
    try:
        for _ in range(RESTARTS):
            time.sleep(0.2 + rng.random() / 4)
            begin = time.monotonic()
            managed.restart()
            windows.append((begin, time.monotonic() + 1))
        seen = [guest.finish() for guest in guests]
    finally:
        for guest in guests:
            guest.__exit__(None, None, None)
    assert [one["errors"] for one in seen] == [[]] * len(guests)
    assert all(one["requests"] > 20 * RESTARTS for one in seen), seen
    pauses = [max(longest(one, *window) for one in seen) for window in windows]
    print(
        f"\n{RESTARTS} planned restarts, {len(guests)} guests: 0 errors, pause median "
        f"{statistics.median(pauses):.3f} s, worst {max(pauses):.3f} s, "
        f"{sum(one['requests'] for one in seen)} requests"
    )
    assert managed.log_text().count("handed over: 4 disks, 5 clients") == RESTARTS
    assert statistics.median(pauses) < PAUSE_SECONDS
    for mode in modes:
        managed.cli("flush", mode)


def test_nothing_acknowledged_is_lost_to_kills_under_load(managed: ManagedGateway) -> None:
    """SIGKILL at random moments; guests reconnect as QEMU does, and compare everything each time."""
    for mode in ("write-back", "write-through"):
        attach(managed, mode, mode)
    guests = [
        SteadyGuest(managed.uri(mode), length=4 * MIB, depth=8, reconnect=True)
        for mode in ("write-back", "write-through")
    ]
    rng = random.Random(2)
    for guest in guests:
        guest.__enter__()
    try:
        for number in range(RESTARTS):
            time.sleep(0.2 + rng.random() / 2)
            managed.restart(kill=True)
            assert not managed.store, number
        seen = [guest.finish() for guest in guests]
    finally:
        for guest in guests:
            guest.__exit__(None, None, None)
    assert [one["errors"] for one in seen] == [[], []]
    reconnected = sum(one["reconnected"] for one in seen)
    print(
        f"\n{RESTARTS} kills, {len(guests)} guests reconnected {reconnected} times: 0 lost, "
        f"{sum(one['requests'] for one in seen)} requests"
    )
    assert reconnected >= RESTARTS


# ------------------------------------------------------------------------- what goes over, and what does not


class Disk:
    """A disk with one connected client that wrote something."""

    def __init__(self, gateway: ManagedGateway, connect: Connect, mode: str = "write-back") -> None:
        self.content = attach(gateway, "d", mode)
        self.client = connect(gateway.uri("d"))
        self.client.pwrite(b"n" * 4096, 8192)

    def goes_on(self) -> None:
        assert bytes(self.client.pread(4096, 8192)) == b"n" * 4096
        self.client.pwrite(b"m" * 4096, 8192)
        self.client.flush()
        assert bytes(self.client.pread(4096, 8192)) == b"m" * 4096

    def is_hung_up_on(self) -> None:
        """At once; not left without an answer."""
        import nbd

        begin = time.monotonic()
        with pytest.raises(nbd.Error):
            self.client.pread(4096, 8192)
        assert time.monotonic() - begin < 5


def test_a_client_goes_on_and_the_store_is_empty(managed: ManagedGateway, connect: Connect) -> None:
    disk = Disk(managed, connect)
    for _ in range(2):
        managed.restart()
        disk.goes_on()
        wait_for(lambda: not managed.store, "what was taken is still stored")
        assert managed.status("d")["clients"] == 1
        disk.client.pwrite(b"n" * 4096, 8192)


def test_a_stop_hangs_up(managed: ManagedGateway, connect: Connect) -> None:
    disk = Disk(managed, connect)
    assert managed.stop() == 0
    disk.is_hung_up_on()
    managed.start()
    assert bytes(connect(managed.uri("d")).pread(4096, 8192)) == b"n" * 4096


def test_a_kill_after_a_restart_uses_nothing_stale(
    managed: ManagedGateway, connect: Connect
) -> None:
    disk = Disk(managed, connect)
    managed.restart()
    disk.goes_on()
    managed.restart(kill=True)
    disk.is_hung_up_on()
    assert bytes(connect(managed.uri("d")).pread(4096, 8192)) == b"m" * 4096


def test_a_set_is_used_once(managed: ManagedGateway, connect: Connect) -> None:
    """Even by a manager that did not forget it when it was told to."""
    disk = Disk(managed, connect)
    managed.end()
    copies = [(name, os.dup(fd)) for name, fd in managed.store]
    managed.start()
    disk.goes_on()
    wait_for(lambda: not managed.store, "what was taken is still stored")
    managed.kill()
    managed.store = copies
    managed.allow_log("they were in use before")
    managed.start()
    disk.is_hung_up_on()
    assert accepts(managed.sock("d"))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("version", "handed over in version 99"),
        ("damage", "is damaged"),
        ("nothing", "nothing says how to go on"),
        ("size", "size or access changed"),
        ("store", "'d': 1 clients hung up on"),
    ],
)
def test_what_cannot_be_gone_on_with_is_hung_up_on(
    what: str, why: str, managed: ManagedGateway, connect: Connect
) -> None:
    disk = Disk(managed, connect)
    managed.end()
    if what == "nothing":
        managed.drop("forebay-sessions")
    elif what == "store":
        managed.config.write_text(managed.config.read_text().replace("stores.images", "stores.x"))
        managed.allow_log("no store 'images'")
    else:
        [memory] = managed.stored("forebay-sessions")
        spoil(memory, what)
    managed.allow_log(why)
    managed.start()
    assert why in managed.log_text()
    disk.is_hung_up_on()
    wait_for(lambda: not managed.store, "still stored")
    if what == "store":
        assert not managed.sock("d").exists()
    else:
        assert bytes(connect(managed.uri("d")).pread(4096, 8192)) == b"n" * 4096


def spoil(memory: int, what: str) -> None:
    head = struct.Struct(">8sIIQI")
    magic, version, used, length, checksum = head.unpack(os.pread(memory, head.size, 0))
    body = os.pread(memory, length, head.size)
    if what == "version":
        version = 99
    elif what == "damage":
        body = body[:-1] + bytes([body[-1] ^ 1])
    else:
        body = body.replace(str(SIZE).encode(), str(SIZE + 4096).encode())
        checksum = zlib.crc32(body)
    os.pwrite(memory, head.pack(magic, version, used, length, checksum) + body, 0)


def test_who_connects_meanwhile_is_served_afterwards(managed: ManagedGateway) -> None:
    """The socket is listened to all the time."""
    attach(managed, "d", "write-through")
    managed.end()
    with socket.socket(socket.AF_UNIX) as early:
        early.connect(str(managed.sock("d")))
        managed.start()
        early.settimeout(10)
        assert early.recv(8) == b"NBDMAGIC"


def test_the_socket_of_a_new_configuration(managed: ManagedGateway, connect: Connect) -> None:
    """Mode and group as they are set now, also of a socket that was handed over."""
    disk = Disk(managed, connect)
    managed.end()
    managed.configure({"gateway": {"socket_mode": "0600"}})
    managed.start()
    disk.goes_on()
    assert managed.sock("d").stat().st_mode & 0o777 == 0o600


def test_a_manager_that_keeps_nothing(managed: ManagedGateway, connect: Connect) -> None:
    """As with FileDescriptorStoreMax=0: a restart is then what a crash is."""
    disk = Disk(managed, connect)
    managed.refusing = True
    managed.restart()
    disk.is_hung_up_on()
    assert bytes(connect(managed.uri("d")).pread(4096, 8192)) == b"n" * 4096


def test_clients_wait_for_a_daemon_that_fails_once(
    managed: ManagedGateway, connect: Connect
) -> None:
    disk = Disk(managed, connect)
    managed.end()
    before = managed.config.read_text()
    managed.config.write_text(before.replace("[cache]", '[cache]\ndevice = "/dev/none/such"'))
    managed.allow_log("no such device")
    with pytest.raises(RuntimeError):
        managed.start()
    assert managed.stored("client-d-0"), "left for the next try"
    managed.config.write_text(before)
    managed.start()
    disk.goes_on()


@pytest.mark.parametrize("still", [False, True], ids=["meanwhile", "afterwards too"])
def test_a_store_that_hangs_does_not_hold_up_a_restart(
    still: bool, managed: ManagedGateway, connect: Connect, start_nbdkit: Callable[..., Any]
) -> None:
    """Requests that wait for it move unanswered, and wait on; the other disks do not even notice."""
    image = managed.directory / "slow.raw"
    content = random_image(image, MIB, 7)
    server = start_nbdkit("file", image, options=[ONE_THREAD])
    managed.attach("slow", server.uri, mode="write-through")
    disk = Disk(managed, connect)
    client = connect(managed.uri("slow"))
    assert bytes(client.pread(4096, 0)) == content[:4096]
    managed.allow_log("slow|nbd")
    server.pause()
    import nbd

    data = nbd.Buffer(4096)
    written = nbd.Buffer.from_bytearray(bytearray(b"w" * 4096))
    left = {
        client.aio_pread(data, 512 << 10),
        client.aio_pwrite(written, 768 << 10),
        client.aio_flush(),
    }
    client.poll(100)
    begin = time.monotonic()
    managed.end()
    ended = time.monotonic() - begin
    if not still:
        server.resume()
    managed.start()
    disk.goes_on()
    if still:
        assert managed.status("slow")["state"] == "degraded"
        assert client.poll(500) == 0
        server.resume()
    while left := {one for one in left if not client.aio_command_completed(one)}:
        client.poll(1000)
    assert bytes(data.to_bytearray()) == content[512 << 10 :][:4096]
    assert bytes(client.pread(4096, 768 << 10)) == b"w" * 4096
    assert ended < 5
    assert managed.stop() == 0, "nbdkit waits for who is connected"
