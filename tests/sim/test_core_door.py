# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The core of the FUSE door: answers are those that Python gives, each request gets one, whatever the daemon does."""

import contextlib
import errno
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

import forebay_fast

pytest.importorskip("pyfuse3", reason="python3-pyfuse3 is not installed: `make setup` installs it")
pytestmark = pytest.mark.skipif(bool(forebay_fast.missing), reason="no core: make setup")

if not forebay_fast.missing:
    import pyfuse3

    from forebay.doors.fuse.files import Files, Handle
    from forebay.doors.fuse.link import Link
    from forebay.doors.fuse.open_files import OpenFile
    from forebay.doors.fuse.places import Found
    from forebay_fast import core
    from forebay_nbd.protocol.wire import SIMPLE_REPLY, SIMPLE_REPLY_MAGIC, Cmd, local_errno
    from sim.fuse_kernel import (
        GETATTR,
        GETATTR_IN,
        INTERRUPT,
        READ,
        STATFS,
        Asked,
        Disk,
        Kernel,
    )

KIB, MIB = 1 << 10, 1 << 20
SIZE = 3 * MIB + 512
DISK, READER, EMPTY = 3, 5, 9
"""Numbers of open files."""


class Door:
    """A kernel, a disk, and the core between them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.kernel, self.disk = Kernel(), Disk(bytearray(rng.randbytes(SIZE)))
        self.connection = core.DiskConnection(self.kernel.device)
        self.touched = 0
        self.files = {
            DISK: self._file(self.connection, SIZE, True),
            READER: self._file(self.connection, SIZE, False),
            EMPTY: self._file(None, 0, True),
        }
        for number, file in self.files.items():
            self.kernel.device.opened(number, file)

    def _file(self, connection: Any, size: int, writable: bool) -> "core.FuseFile":
        return core.FuseFile(connection, size, writable, self._touch)

    def _touch(self) -> None:
        self.touched += 1

    def connect(self) -> None:
        self.disk.connect(self.connection)

    def receive(self) -> int:
        """Have the core receive replies; what `run` returns."""
        return self.connection.run(time.monotonic() + 10)

    def go(self) -> None:
        """Until nothing waits: kernel, core, disk and back."""
        self.kernel.run()
        while replies := self.disk.serve(self.rng):
            self.disk.send(replies)
            assert self.receive() == core.WAIT
        self.kernel.collect()

    def close(self) -> None:
        self.kernel.close()
        self.disk.close()


@pytest.fixture
def door(rng: random.Random) -> Iterator[Door]:
    made = Door(rng)
    yield made
    made.close()
    assert not made.kernel.complaints


# ------------------------------------------------------------------------------------------------ as Python answers


class PythonLink(Link if not forebay_fast.missing else object):  # type: ignore[misc]
    """The requests of `Files`, on a disk in memory."""

    def __init__(self, disk: "Disk") -> None:
        self._disk = disk

    def _do(self, command: int, offset: int, length: int, data: bytes = b"") -> bytes:
        self._disk.commands.append((command, offset, length))
        one = Asked(command, 0, offset, length, data)
        self._disk.asked.append(one)
        reply = self._disk.reply_to(one)
        if error := SIMPLE_REPLY.unpack_from(reply)[1]:
            raise OSError(local_errno(error), os.strerror(error))
        return reply[SIMPLE_REPLY.size :]

    async def pread(self, offset: int, length: int) -> bytes:
        return self._do(Cmd.READ, offset, length)

    async def pread_into(self, offset: int, view: memoryview) -> None:
        view[:] = self._do(Cmd.READ, offset, len(view))

    async def pwrite(self, offset: int, data: Any) -> None:
        self._do(Cmd.WRITE, offset, len(data), bytes(data))

    async def zero(self, offset: int, length: int) -> None:
        self._do(Cmd.WRITE_ZEROES, offset, length)

    async def flush(self) -> None:
        self._do(Cmd.FLUSH, 0, 0)


class Python:
    """`Files` with the same open files, on a copy of the disk."""

    def __init__(self, disk: "Disk") -> None:
        self.disk = Disk(bytearray(disk.content), disk.errors)
        self.times_touched = 0
        self.files = Files({}, self, None)  # type: ignore[arg-type]  # what is used of OpenFiles is here
        link = PythonLink(self.disk)
        for number, size, writable in (
            (DISK, SIZE, True),
            (READER, SIZE, False),
            (EMPTY, 0, True),
        ):
            found = Found(False, 0o600, size=size)
            file = OpenFile(("disks", "d"), found, link if size else None)
            self.files._handles[number] = Handle(file, writable)

    def touched(self, _file: OpenFile) -> None:
        self.times_touched += 1

    async def answer(self, name: str, *arguments: Any) -> tuple[int, bytes]:
        try:
            found = await getattr(self.files, name)(*arguments)
        except pyfuse3.FUSEError as fault:
            return fault.errno, b""
        if name == "write":
            return 0, struct.pack("=II", found, 0)
        return 0, bytes(found or b"")


async def test_answers_are_those_that_python_gives(door: Door) -> None:
    rng = door.rng
    door.disk.errors = {64 * KIB: errno.EIO, 128 * KIB: errno.ENOSPC, 192 * KIB: 9999}
    python = Python(door.disk)
    door.connect()
    for step in range(400):
        number = rng.choice([DISK, DISK, READER, EMPTY, 77])
        offset = rng.choice(
            [*door.disk.errors, rng.randrange(SIZE), SIZE - 1, SIZE - 700, SIZE, SIZE + 9]
        )
        length = rng.choice([1, 512, 4096, 9000, 64 * KIB, MIB])
        what = rng.choice(["read", "read", "write", "zeros", "fsync", "flush"])
        if number == 77:  # no such file, which Python has no answer for
            unique, expected = door.kernel.read(number, offset, length), (errno.EIO, b"")
        elif what == "read":
            unique = door.kernel.read(number, offset, length)
            expected = await python.answer("read", number, offset, length)
        elif what in ("write", "zeros"):
            data = rng.randbytes(length) if what == "write" else bytes(length)
            if rng.random() < 0.1:
                data = bytes(length - 1) + b"\1"
            unique = door.kernel.write(number, offset, data)
            expected = await python.answer("write", number, offset, data)
        elif what == "fsync":
            unique = door.kernel.fsync(number)
            expected = await python.answer("fsync", number, True)
        else:
            unique = door.kernel.flush(number)
            expected = await python.answer("flush", number)
        door.go()
        told = door.kernel.answers.pop(unique)
        assert told == (expected[0], expected[1]), f"step {step}: {what} {length} at {offset}"
        assert door.disk.commands == python.disk.commands, f"step {step}: {what}"
        assert door.files[DISK].unflushed == python.files._handles[DISK].unflushed, step
        assert door.touched == python.times_touched, step
    assert door.disk.content == python.disk.content


# ----------------------------------------------------------------------------------------- many at once, and away


def work(door: Door, count: int) -> dict[int, Callable[[int, bytes], None]]:
    """Ask for this and that, of places of their own, so that nothing depends on the order: what checks each answer."""
    checks: dict[int, Callable[[int, bytes], None]] = {}
    for place in door.rng.sample(range(0, SIZE - 64 * KIB, 64 * KIB), count):
        length = door.rng.choice([1, 4096, 20 * KIB, 64 * KIB])
        if door.rng.random() < 0.5:
            before = bytes(door.disk.content[place : place + length])
            unique = door.kernel.read(door.rng.choice([DISK, READER]), place, length)
            checks[unique] = lambda error, data, was=before: _same((error, data), (0, was))  # type: ignore[misc]
        else:
            new = door.rng.randbytes(length)
            unique = door.kernel.write(DISK, place, new)

            def wrote(error: int, data: bytes, at: int = place, new: bytes = new) -> None:
                _same((error, data), (0, struct.pack("=II", len(new), 0)))
                _same(door.disk.content[at : at + len(new)], new)

            checks[unique] = wrote
    return checks


def _same(found: Any, expected: Any) -> None:
    assert found == expected


def check(door: Door, checks: dict[int, Callable[[int, bytes], None]]) -> None:
    door.kernel.collect()
    assert door.kernel.answers.keys() == checks.keys(), "each request has an answer"
    for unique, check_one in checks.items():
        check_one(*door.kernel.answers[unique])


def test_replies_come_in_any_order_and_cut_anywhere(door: Door) -> None:
    door.connect()
    checks = work(door, 40)
    door.kernel.run()
    replies = door.disk.serve(door.rng)
    while replies:
        cut = door.rng.choice([1, 15, 16, 17, 5000, 70 * KIB])
        door.disk.send(replies[:cut])
        replies = replies[cut:]
        assert door.receive() == core.WAIT
    check(door, checks)
    assert not door.connection.owed


def away_and_back(door: Door) -> None:
    """Connections end in the middle of replies, and of requests; some requests come meanwhile."""
    door.connect()
    for _ in range(6):
        checks = work(door, 3)
        door.kernel.run()
        replies = door.disk.serve(door.rng)
        door.disk.send(replies[: door.rng.randrange(len(replies))])
        door.receive()
        assert door.disk.sock is not None
        door.disk.sock.close()
        assert door.receive() == core.GONE
        assert "closed" in str(door.connection.why) or "reset" in str(door.connection.why)
        checks[door.kernel.fsync(DISK)] = lambda error, data: _same((error, data), (0, b""))
        door.kernel.run()
        door.connect()
        door.go()
        check(door, checks)
        door.kernel.answers.clear()


def test_what_has_no_answer_is_sent_again_and_answered_once(door: Door) -> None:
    away_and_back(door)


def test_a_disk_that_stays_away_is_an_error_and_comes_back(door: Door) -> None:
    first = [door.kernel.write(DISK, 0, b"a" * 5000), door.kernel.read(READER, 9, 9)]
    door.kernel.run()
    door.kernel.collect()
    assert not door.kernel.answers, "it is waited for"
    door.connection.refuse(errno.EIO)
    later = [door.kernel.fsync(DISK), door.kernel.read(READER, 9, 9)]
    door.kernel.run()
    door.kernel.collect()
    assert door.kernel.answers == dict.fromkeys([*first, *later], (errno.EIO, b""))
    assert door.files[DISK].unflushed
    door.connect()
    unique = door.kernel.read(READER, 9, 9)
    door.go()
    assert door.kernel.answers[unique] == (0, bytes(door.disk.content[9:18]))
    assert [one[0] for one in door.disk.commands] == [Cmd.READ], "what was given up is not done"


def hostile(cookie: int) -> dict[str, bytes]:
    """What a server sends to a READ of 4096 bytes with this cookie, and then it hangs up."""
    good = SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
    return {
        "nothing": b"",
        "half a header": good[:9],
        "no data": good,
        "data cut short": good + bytes(4095),
        "bad magic": b"\0" * 16 + bytes(4096),
        "a structured reply": struct.pack(">IHHQI", 0x668E33EF, 1, 1, cookie, 4104) + bytes(4104),
        "another cookie": SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie + 1) + bytes(4096),
        "a cookie of all ones": SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, 2**64 - 1),
        "it shuts down": SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, errno.ESHUTDOWN, cookie),
        "megabytes of nothing": b"\xff" * (2 * MIB),
    }


@pytest.mark.parametrize("case", hostile(0) if not forebay_fast.missing else [])
def test_a_server_that_breaks_the_protocol_is_left_and_nobody_is_told_nonsense(
    door: Door, case: str
) -> None:
    door.connect()
    unique = door.kernel.read(DISK, 4096, 4096)
    door.kernel.run()
    [asked] = door.disk.take()
    door.disk.send(hostile(asked.cookie)[case])
    door.receive()
    assert door.disk.sock is not None
    door.disk.sock.shutdown(socket.SHUT_RDWR)
    assert door.receive() == core.GONE
    assert door.connection.why
    door.kernel.collect()
    assert not door.kernel.answers
    door.connect()
    door.go()
    assert door.kernel.answers == {unique: (0, bytes(door.disk.content[4096:8192]))}


def test_a_second_reply_is_one_to_no_request(door: Door) -> None:
    door.connect()
    unique = door.kernel.read(DISK, 0, 512)
    door.kernel.run()
    replies = door.disk.serve(door.rng)
    door.disk.send(replies + replies)
    assert door.receive() == core.GONE
    door.kernel.collect()
    assert door.kernel.answers.keys() == {unique}


def test_a_reply_to_what_was_not_sent_yet_is_one_to_no_request(door: Door) -> None:
    """The socket is full, and the server has guessed the cookie."""
    door.connect()
    for _ in range(8):
        door.kernel.write(DISK, 0, door.rng.randbytes(MIB))
        door.kernel.run()
    waiting = door.connection.owed
    door.disk.send(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, int.from_bytes(struct.pack("=Q", 8))))
    assert door.receive() == core.GONE
    door.kernel.collect()
    assert not door.kernel.answers
    assert door.connection.owed == waiting == 8


def test_a_disk_that_hangs_stops_no_other(door: Door) -> None:
    """Its socket is full of writes that it does not read."""
    door.connect()
    other = Disk(bytearray(door.rng.randbytes(MIB)))
    connection = core.DiskConnection(door.kernel.device)
    door.kernel.device.opened(20, core.FuseFile(connection, MIB, True, lambda: None))
    other.connect(connection)
    try:
        stuck = []
        for _ in range(12):
            stuck.append(door.kernel.write(DISK, 0, door.rng.randbytes(MIB)))
            unique = door.kernel.read(20, 4096, 512)
            door.kernel.run()
            other.send(other.serve(door.rng))
            assert connection.run(time.monotonic() + 10) == core.WAIT
            door.kernel.collect()
            assert door.kernel.answers.pop(unique) == (0, bytes(other.content[4096:4608]))
        assert not door.kernel.answers
        while door.connection.owed:  # it goes on, and so does what was left of a request
            door.disk.send(door.disk.serve(door.rng))
            assert door.receive() == core.WAIT
        door.kernel.collect()
        assert door.kernel.answers == dict.fromkeys(stuck, (0, struct.pack("=II", MIB, 0)))
    finally:
        other.close()


def test_what_is_asked_without_an_answer_has_a_limit(door: Door) -> None:
    """Then the kernel has to wait; nothing is lost."""
    checks: list[int] = []
    for _ in range(45):
        checks += [door.kernel.read(DISK, 0, 1) for _ in range(100)]
        door.kernel.run()
    limit = door.connection.owed
    assert limit == 4096
    door.connect()
    door.go()
    door.go()
    assert sorted(door.kernel.answers) == checks


# --------------------------------------------------------------------------------------------- what goes to pyfuse3


def test_what_it_does_not_serve_is_handed_on_whole(door: Door) -> None:
    kernel = door.kernel
    kernel.device.attributes[7] = bytes(range(104))
    statfs = kernel.ask(STATFS, b"", node=1)
    asked = kernel.ask(GETATTR, GETATTR_IN.pack(0, 0, 0), node=7)
    kernel.ask(GETATTR, GETATTR_IN.pack(0, 0, 0), node=8)
    kernel.ask(INTERRUPT, struct.pack("=Q", statfs))
    assert kernel.run() == core.OTHER
    kernel.collect()
    assert kernel.answers == {asked: (0, bytes(range(104)))}
    assert [struct.unpack_from("=IIQQ", one)[1:] for one in kernel.others] == [
        (STATFS, statfs, 1),
        (GETATTR, statfs + 4, 8),
    ]


@pytest.mark.parametrize("length", [0, 8, 39])
def test_a_request_that_is_cut_short_is_refused(door: Door, length: int) -> None:
    unique = door.kernel.ask(READ, bytes(length))
    door.kernel.run()
    door.kernel.collect()
    assert door.kernel.answers == {unique: (errno.EIO, b"")}


def test_the_end_of_the_mount_is_seen(door: Door) -> None:
    waiting = door.kernel.read(DISK, 0, 1)
    door.kernel.run()
    door.kernel.asking.shutdown(socket.SHUT_WR)
    assert door.kernel.run() == core.GONE
    door.kernel.device.end()
    door.connection.refuse(errno.EIO)  # nobody is there to be told
    door.kernel.collect()
    assert waiting not in door.kernel.answers


def test_what_pyfuse3_answers_is_passed_on_message_by_message() -> None:
    """By a thread, also what does not fit into the socket."""
    ours, its = socket.socketpair()
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    device.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    messages = [struct.pack("=IiQ", 16 + n, 0, n) + bytes([n % 251]) * n for n in (0, 9, 900_000)]
    thread = threading.Thread(target=core.relay, args=(ours.fileno(), device.fileno()))
    thread.start()
    try:
        its.sendall(b"".join(messages))
        assert [kernel.recv(2 << 20) for _ in messages] == messages
    finally:
        its.close()
        thread.join()
        for sock in (ours, kernel, device):
            sock.close()


# --------------------------------------------------------------------------------------------------------- planted


def reads_of_two_files(door: Door) -> None:
    door.connect()
    other = Disk(bytearray(door.rng.randbytes(SIZE)))
    connection = core.DiskConnection(door.kernel.device)
    door.kernel.device.opened(20, core.FuseFile(connection, SIZE, True, lambda: None))
    other.connect(connection)
    unique = door.kernel.read(DISK, 0, 4096)
    door.go()
    other.close()
    assert door.kernel.answers == {unique: (0, bytes(door.disk.content[:4096]))}


BUGS = {
    "wrong handle": reads_of_two_files,
    "forgotten on reconnect": away_and_back,
    "short read padded": test_replies_come_in_any_order_and_cut_anywhere,
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_that_is_planted_is_found(rng: random.Random, bug: str) -> None:
    if not core.has_plants:
        pytest.skip("compiled without plants: make setup")
    made = Door(rng)
    planted = mock.patch.object(core, "bugs", frozenset({bug}))
    with planted, contextlib.closing(made), pytest.raises(AssertionError):
        BUGS[bug](made)


def test_without_a_bug_both_files_are_read(door: Door) -> None:
    reads_of_two_files(door)
