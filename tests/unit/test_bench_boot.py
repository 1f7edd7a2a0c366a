# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`make bench-boot`: the recording, its replay, the hosts that are simulated, and what is printed."""

import socket
import struct
import threading
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from bench.boot import recording, svg
from bench.boot.hosts import Site, alone, cached, copied, simulate
from bench.boot.recording import BLOCK, Read, Recording, of_log
from bench.boot.replay import Guest, boot_together, followers_of
from bench.boot.report import Kept, Section, bars, keep, load, markdown
from bench.boot.rows import Row, table

BOOT = Recording(
    [
        Read(0, BLOCK, -1, 1.0),
        Read(BLOCK, 2 * BLOCK, 0, 0.5),
        Read(8 * BLOCK, 512, 0, 0.25),
        Read(BLOCK, 4096, 1, 2.0),
    ],
    tail=0.125,
)
LOG = """\
2026-11-28 07:00:00.000000 connection=1 Connect export="" tls=0 size=0x40000000 write=1
2026-11-28 07:00:01.500000 connection=1 Read id=1 offset=0x0 count=0x10000 ...
2026-11-28 07:00:01.600000 connection=1 Read id=2 offset=0x20000 count=0x200 ...
2026-11-28 07:00:01.700000 connection=1 ...Read id=2 return=0
2026-11-28 07:00:01.950000 connection=1 Write id=3 offset=0x0 count=0x200 ...
2026-11-28 07:00:02.700000 connection=1 Read id=4 offset=0x20200 count=0x1000 ...
2026-11-28 07:00:02.800000 connection=1 ...Read id=1 return=0
2026-11-28 07:00:02.900000 connection=1 ...Read id=4 return=0
"""


def test_the_kept_boot_can_be_replayed() -> None:
    boot = recording.load()
    assert len(boot.reads) > 1000
    assert max(read.offset + read.length for read in boot.reads) <= 1 << 30
    assert boot.seconds > 1


def test_a_boot_takes_as_long_as_its_longest_chain() -> None:
    assert BOOT.seconds == 1.0 + 0.5 + 2.0 + 0.125
    assert BOOT.faster(2).seconds == BOOT.seconds / 2
    assert BOOT.blocks == {0, 1, 2, 8}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    recording.save(BOOT, tmp_path / "boot")
    assert recording.load(tmp_path / "boot") == BOOT


@pytest.mark.parametrize(
    "line", ["8 8 0", "8 8 7 0", "-8 8 -1 0", "8 0 -1 0", "8 8 -1 -5", "a b c d"]
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "boot"
    recording.save(BOOT, path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=":7: no"):
        recording.load(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "boot").write_text("hello\n")
    with pytest.raises(ValueError, match="no recording of a boot"):
        recording.load(tmp_path / "boot")


def test_a_read_follows_from_the_last_answer_before_it() -> None:
    began = recording.seconds_of("2026-11-28 07:00:00.000000")
    boot = of_log(LOG.splitlines(), 5.0, began)
    assert [(read.offset, read.length, read.after) for read in boot.reads] == [
        (0, BLOCK, -1),
        (2 * BLOCK, 512, -1),
        (2 * BLOCK + 512, 4096, 1),
    ]
    assert [round(read.think, 3) for read in boot.reads] == [1.5, 1.6, 1.0]
    assert round(boot.tail, 3) == 2.1


# --- replay


def serve(listener: socket.socket, asked: list[tuple[int, int]]) -> None:
    """An NBD server of one client: zeros, in the reverse order of what was asked at once."""
    sock, _ = listener.accept()
    with sock, listener:
        sock.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        sock.recv(20 + len("disk"), socket.MSG_WAITALL)
        sock.sendall(struct.pack(">QH", 1 << 30, 1))
        while data := sock.recv(28 * 8):
            for at in reversed(range(0, len(data), 28)):
                cookie, offset, length = struct.unpack(">QQI", data[at + 8 : at + 28])
                asked.append((offset, length))
                sock.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + bytes(length))


def test_a_guest_asks_for_what_was_recorded(tmp_path: Path) -> None:
    listener, asked = socket.socket(socket.AF_UNIX), list[tuple[int, int]]()
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    server = threading.Thread(target=serve, args=(listener, asked))
    server.start()
    storm = boot_together([(tmp_path / "s", "disk")], BOOT.faster(1000))
    server.join()
    assert sorted(asked) == sorted((read.offset, read.length) for read in BOOT.reads)
    assert len(storm.seconds) == 1


def test_a_guest_that_cannot_boot_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        boot_together([(tmp_path / "none", "disk")], BOOT)


def test_an_error_of_the_server_is_told() -> None:
    ours, theirs = socket.socketpair()
    guest = Guest(0, BOOT, followers_of(BOOT))
    guest.sock.close()
    guest.sock = ours
    ours.setblocking(False)
    theirs.sendall(struct.pack(">IIQ", 0x67446698, 5, 2))
    with ours, theirs, pytest.raises(OSError, match="read 2 of guest 0"):
        guest.receive(memoryview(bytearray(4096)))


# --- hosts


def test_on_one_host_a_block_is_fetched_once_and_waited_for_by_all() -> None:
    site = Site(1, 8 * BLOCK, 8 * BLOCK, 0.0, latency=0.0)  # a block in a second
    found = simulate(site, 10, BOOT, cached(site))
    assert found.store_bytes == len(BOOT.blocks) * BLOCK
    # the first block, what the guest computes, two blocks, and so on: for all of them the same
    assert (
        found.seconds == found.median == 1 + 1 + 0.5 + 1 + 2 + 2 + 0.125
        or found.seconds > BOOT.seconds
    )


def test_each_alone_takes_as_much_as_all_read() -> None:
    site = Site(2, 8e9, 8e9, 0.0)
    assert simulate(site, 10, BOOT, alone).store_bytes == 10 * BOOT.bytes


def test_copies_share_the_store_and_the_links() -> None:
    site = Site(4, 4e9, 1e9, 0.0)
    found = simulate(site, 100, BOOT, copied, copy_bytes=10**9)
    assert found.seconds == 200 + BOOT.seconds
    assert simulate(site, 1, BOOT, copied, copy_bytes=10**9).seconds == 8 + BOOT.seconds


def test_a_daemon_that_computes_is_waited_for() -> None:
    site = Site(1, 8e12, 8e12, 1.0, latency=0.0)
    assert simulate(site, 10, BOOT, cached(site)).seconds >= 10 * len(BOOT.reads)


def test_a_replay_is_ahead_of_the_guests() -> None:
    site = Site(1, 8 * BLOCK, 8 * BLOCK, 0.0, latency=0.0)
    cold = simulate(site, 1, BOOT, cached(site))
    ahead = simulate(site, 1, BOOT, cached(site), replays=True)
    assert ahead.seconds < cold.seconds
    assert ahead.store_bytes == cold.store_bytes


# --- report


def section() -> Section:
    rows = [
        Row("Forebay, cold, no trace", 1, 10.0, 10.0, 150, 3, 50.0, 1.0, 0.5),
        Row("Forebay, cold, no trace", 100, 14.0, 13.5, 150, 3, 50.0, 20.0, 5.0),
        Row("copy, then boot", 100, 800.0, is_computed=True),
    ]
    return Section(rows, "conditions", 100)


def test_the_table_says_what_was_measured_and_leaves_out_what_was_not() -> None:
    lines = table([Row("a", 1, 1.25, 1.25, 50, 7), Row("b", 25, 30.0, 20.0, is_computed=True)], 100)
    assert lines.splitlines() == [
        "| how | VMs | median / last has booted, s | bytes from the store | requests to it |",
        "| --- | --- | --- | --- | --- |",
        "| a | 1 | 1.2 | 0.50 | 7 |",
        "| b | 25 | 20.0 / 30.0 (computed) |  |  |",
    ]


def test_a_bar_says_what_the_processors_allow() -> None:
    ((title, figure, most, passed),) = bars(Kept({"storm": section()}))
    assert title == "100 at once against one: Forebay, cold, no trace, pauses as recorded"
    assert (figure, most, passed) == ("1.40 (processors: 2.00)", "1.5", "yes")


def test_what_is_kept_is_loaded_and_drawn(tmp_path: Path) -> None:
    kept = Kept({"storm": section()})
    keep(kept, tmp_path / "boot.json")
    assert load(tmp_path / "boot.json") == kept
    assert load(tmp_path / "other.json") == Kept()
    assert "| copy, then boot | 100 | 800.0 (computed) |" in markdown(kept)
    drawn = ET.parse(tmp_path / "boot.svg").getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}rect")) == 1 + 3


def test_a_label_is_not_taken_for_markup() -> None:
    ET.fromstring(svg.panels([("a < b & c", [svg.Bar("<x>", 0.0, is_ours=True)])]))
