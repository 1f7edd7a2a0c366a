# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which process may use a disk: by label, user and process, without a daemon."""

import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forebay.doors.peers import Admission, label_of, qemu_user
from forebay.doors.tenant import Rule, Tenant
from forebay.libvirt.domain import read_domain
from forebay_nbd import Process

pytestmark = pytest.mark.expect_log("is refused|cannot be (read|written)")

SVIRT = "system_u:system_r:svirt_t:s0:c1,c2"
OTHER = "system_u:system_r:svirt_t:s0:c3,c4"
SHELL = "unconfined_u:unconfined_r:unconfined_t:s0"
QEMU = 64055
SO_PEERSEC = 31


class Caller(socket.socket):
    """Our end of a connection, of which the kernel says what the test wants. The process is this one."""

    def __init__(self, uid: int = QEMU, label: str | bytes | None = None) -> None:
        here, self.there = socket.socketpair()
        super().__init__(fileno=here.detach())
        self.uid, self.label = uid, label

    def getsockopt(self, level: int, option: int, length: int = 0, /) -> Any:
        if option == socket.SO_PEERCRED:
            return struct.pack("3i", os.getpid(), self.uid, 7)
        if option == SO_PEERSEC:
            if self.label is None:
                raise OSError(errno.ENOPROTOOPT, "no labels here")
            return self.label if isinstance(self.label, bytes) else self.label.encode() + b"\0"
        return super().getsockopt(level, option, *([length] if length else []))

    def close(self) -> None:
        self.there.close()
        super().close()


def tenant(tmp_path: Path, rule: Rule | None = None) -> Tenant:
    found = Tenant("d", tmp_path, rule or Rule("first"))
    found.admission = Admission(everybody=True)
    return found


@pytest.mark.parametrize(
    ("rule", "uid", "label", "let_in"),
    [
        (Rule("first"), QEMU, None, True),
        (Rule("first"), QEMU, SVIRT, True),
        (Rule("first", SVIRT), QEMU, SVIRT, True),
        (Rule("first", SVIRT), QEMU, OTHER, False),
        (Rule("first", SVIRT), QEMU, SHELL, False),
        (Rule("first", SVIRT), QEMU, None, True),  # this kernel tells no labels
        (Rule("first", SVIRT, QEMU), 1000, SVIRT, False),
        (Rule("first", None, QEMU), 1000, None, False),
        (Rule("first", None, QEMU), QEMU, None, True),
        (Rule("label", SVIRT), QEMU, SVIRT, True),
        (Rule("label", SVIRT), QEMU, OTHER, False),
        (Rule("label", SVIRT), QEMU, None, False),
        (Rule("label"), QEMU, SVIRT, False),
        (Rule("label", SVIRT, 0), QEMU, SVIRT, False),
        (Rule("any", SVIRT, 1000), QEMU, OTHER, True),
        # root's QEMU of another VM is none of root's tools
        (Rule("first", SVIRT), 0, OTHER, False),
        (Rule("label", SVIRT), 0, OTHER, False),
        (Rule("first", "libvirt-1", 0), 0, "libvirt-2", False),
        (Rule("first", SVIRT), 0, SHELL, True),
        (Rule("label", SVIRT, QEMU), 0, None, True),
        (Rule("label", SVIRT), 0, SVIRT, True),
    ],
)
def test_who_may_by_label_and_user(
    tmp_path: Path, rule: Rule, uid: int, label: str | None, let_in: bool
) -> None:
    with Caller(uid, label) as sock:
        assert tenant(tmp_path, rule).may_connect(sock) is let_in


@pytest.mark.parametrize(
    ("told", "label"),
    [
        (SVIRT.encode() + b"\0", SVIRT),
        (b"libvirt-0b5c (enforce)\0", "libvirt-0b5c"),
        (b"libvirt-0b5c (complain)", "libvirt-0b5c"),
        (b"unconfined\0", "unconfined"),
        (b"\0", None),
        (b"", None),
        (None, None),
    ],
)
def test_what_the_kernel_tells_of_a_label(told: bytes | None, label: str | None) -> None:
    with Caller(label=told) as sock:
        assert label_of(sock) == label


def test_doors_neither_take_a_disk_nor_are_kept_out(tmp_path: Path) -> None:
    disk = tenant(tmp_path)
    disk.admission = Admission(everybody=True, doors=7)
    with Caller() as sock:
        assert disk.may_connect(sock)
        assert disk.pid is None


def with_patience(holds: Callable[[], bool]) -> None:
    """Return when it holds; pytest has a limit of time."""
    while not holds():
        pass


def another() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_what_is_on_record_holds_for_a_process_and_not_for_its_number(tmp_path: Path) -> None:
    with another() as other:
        found = Process.of(other.pid)
        assert found is not None
        assert found.is_alive
        note = tmp_path / "peers" / "d"
        note.parent.mkdir()
        note.write_text(f"{other.pid} {found.mark}\n")
        disk = tenant(tmp_path)
        disk.recall()
        with Caller() as sock:
            assert not disk.may_connect(sock)
            assert disk.pid == other.pid
            note.write_text(f"{other.pid} {found.mark}0\n")  # an earlier process of that number
            disk = tenant(tmp_path)
            disk.recall()
            assert disk.pid is None
            assert disk.may_connect(sock)
            assert disk.status()["peer_process"] == os.getpid()
        other.kill()
        with_patience(lambda: not found.is_alive)  # before anybody has waited for it
        assert Path(f"/proc/{other.pid}").exists()
    assert Process.of(other.pid) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"-1 i7", b"1e9 i7", b"\xff\xfe", b"9" * 5000, b"4194305 " + b"i" * 200, b"0 "],
)
def test_a_note_that_makes_no_sense_keeps_nobody_out(tmp_path: Path, content: bytes) -> None:
    note = tmp_path / "peers" / "d"
    note.parent.mkdir()
    note.write_bytes(content)
    disk = tenant(tmp_path)
    disk.recall()
    with Caller() as sock:
        assert disk.may_connect(sock)
        assert disk.pid == os.getpid()


def test_where_nothing_can_be_noted_the_disk_is_served_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "peers").write_text("in the way")
    disk = tenant(tmp_path)
    disk.recall()
    with Caller() as sock:
        assert disk.may_connect(sock)
        assert disk.pid == os.getpid()
    assert "cannot be written" in caplog.text


def test_notes_of_two_disks_are_two_files(tmp_path: Path) -> None:
    disks = [Tenant(name, tmp_path, Rule("first")) for name in ("d", "d.new")]
    for disk in disks:
        disk.admission = Admission(everybody=True)
    with Caller() as one, Caller() as other:
        assert disks[1].may_connect(one)
        assert disks[0].may_connect(other)
    again = Tenant("d.new", tmp_path, Rule("first"))
    again.recall()
    assert again.pid == os.getpid()


def test_refusals_fill_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    disk = Tenant("d", tmp_path, Rule("label"), lambda: now)
    disk.admission = Admission(everybody=True)
    with Caller() as sock:
        for _ in range(50):
            assert not disk.may_connect(sock)
        now = 10.0
        assert not disk.may_connect(sock)
    assert disk.refused == 51
    assert [text.partition("refused")[2] for text in caplog.messages] == [
        ": peer is 'label', and no label was given",
        ": peer is 'label', and no label was given (50 since the last line)",
    ]


# ----------------------------------------------------------------------------------------------- what libvirt says


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ('user = "root"', 0),
        ('#user = "root"\nuser = "+64055"\n', 64055),
        ('user="0"', 0),
        ('  user = "nobody"\ngroup = "kvm"\n', 65534),
        ('user = "no-such-user-here"', None),
        ('user = ""', None),
    ],
)
def test_the_user_that_libvirts_file_names(tmp_path: Path, text: str, user: int | None) -> None:
    (tmp_path / "qemu.conf").write_text(text)
    assert qemu_user(tmp_path / "qemu.conf") == user


def test_without_libvirts_file_nobody_knows(tmp_path: Path) -> None:
    assert qemu_user(tmp_path / "qemu.conf") is None


DAC = "<seclabel type='dynamic' model='dac' relabel='yes'><label>{}</label></seclabel>"
MAC = "<seclabel type='dynamic' model='{}' relabel='yes'><label>{}</label><imagelabel>x</imagelabel></seclabel>"


@pytest.mark.parametrize(
    ("elements", "label", "user"),
    [
        ("", None, None),
        ("<seclabel type='dynamic' model='selinux' relabel='yes'/>", None, None),
        (MAC.format("selinux", SVIRT) + DAC.format("+107:+107"), SVIRT, 107),
        (
            DAC.format("nobody:nogroup") + MAC.format("apparmor", "libvirt-0b5c"),
            "libvirt-0b5c",
            65534,
        ),
        ("<seclabel type='none' model='dac'/>", None, None),
        (
            "<seclabel type='static' model='dac'><label>no such user:x</label></seclabel>",
            None,
            None,
        ),
        (DAC.format("99999999999"), None, None),
    ],
)
def test_what_a_domains_xml_says_of_its_processes(
    elements: str, label: str | None, user: int | None
) -> None:
    domain = read_domain(f"<domain><name>vm1</name><uuid>1</uuid>{elements}</domain>")
    assert (domain.label, domain.user) == (label, user)
