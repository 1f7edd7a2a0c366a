# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which process has a disk: others that may open its socket, another VM's QEMU above all, are kept out.

What is on record of a disk (`Rule`) says by what its VM is known:

- by the label that the kernel gives the VM's processes, and by their user, where libvirt's hook has told both;
- by the process: the first one that connects has the disk until it has ended and its last connection is gone. It is
  noted in RUN/peers, so that the disk stays its own while the daemon is restarted, or after it was killed.

A process is taken for what the kernel says of it when it connects. Root, the daemon's own user and the doors
(`gateway.door_group`) come beside whoever has the disk, and take it from nobody.
"""

import contextlib
import logging
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

from forebay.config.fields import PeerRule
from forebay.doors.peers import Admission, Peer, label_of
from forebay_nbd import Process

log = logging.getLogger("forebay.daemon")

DIRECTORY, DIRECTORY_MODE = "peers", 0o700
"""Below RUN: one file for each disk that a process has."""

LONGEST_NOTE = 100
"""Bytes of such a file."""

LARGEST_PID = 1 << 22
"""PID_MAX_LIMIT (linux/threads.h)."""

QUIET_SECONDS = 10.0
"""So long nothing is said in the log of further refusals at a disk: who is refused may try again in a loop."""


@dataclass(frozen=True)
class Rule:
    """By what the VM of a disk is known. `label` and `user` (a uid) are None where nobody told, `peer` is where the
    settings of the store hold.
    """

    peer: PeerRule | None = None
    label: str | None = None
    user: int | None = None


class Tenant:
    """Whether a process may use one disk, and which one has it."""

    def __init__(
        self, disk: str, run: Path, rule: Rule, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`run` is the daemon's directory RUN. Nobody has the disk before `recall`."""
        self.rule = rule
        self.admission = Admission()
        """Who may connect to the socket at all."""
        self.refused = 0
        """How many connections were."""
        self._disk = disk
        self._file = run / DIRECTORY / disk
        self._clock = clock
        self._quiet_until = float("-inf")
        self._unsaid = 0
        """Refusals since the last line of the log."""
        self._process: Process | None = None
        self._sockets: WeakSet[socket.socket] = WeakSet()
        """Connections of the one who has the disk: they may be another's by now, who was its child."""

    @property
    def pid(self) -> int | None:
        """The process that has the disk; None if none has, or it is not known which."""
        return self._process.pid if self._process is not None and self._is_held() else None

    # -- who may

    def may_connect(self, sock: socket.socket) -> bool:
        """True if whoever connected may use the disk, and has it from now on unless it is a door's."""
        try:
            why = self._why_not(sock, Peer.of(sock))
        except OSError:  # gone already
            return False
        if why is not None:
            self._refuse(why)
        return why is None

    def go_on(self, sock: socket.socket) -> None:
        """Take a connection that another process of the daemon had let in: it is the VM's, if the disk is nobody's."""
        with contextlib.suppress(OSError):
            self._why_not(sock, Peer.of(sock))

    def _why_not(self, sock: socket.socket, peer: Peer) -> str | None:
        """Why the process may not use the disk, and what says so; None if it may."""
        if not self.admission.admits(peer):
            return f"{peer} is refused: see gateway.socket_peers"
        label = label_of(sock)
        if self.admission.is_door(peer) and not (self.rule.label and _is_of_a_vm(label)):
            return None
        if self.rule.peer == "any":
            return None
        return self._not_by_label(peer, label) or self._not_by_process(sock, peer)

    def _not_by_label(self, peer: Peer, label: str | None) -> str | None:
        """Why user or label of the process are not those of the VM; None if they are, or nobody knows them."""
        rule = self.rule
        if rule.user not in (None, peer.uid):
            return f"{peer} is refused: this disk is for user {rule.user}"
        if rule.label is None:
            return (
                f"{peer} is refused: peer is 'label', and no label was given"
                if self._strict
                else None
            )
        if label is None:
            return f"{peer} is refused: the kernel tells no label" if self._strict else None
        return None if label == rule.label else f"{peer} ({label}) is refused: not {rule.label}"

    @property
    def _strict(self) -> bool:
        return self.rule.peer == "label"

    def _not_by_process(self, sock: socket.socket, peer: Peer) -> str | None:
        """Why the disk is not that process's; None if it is, or nobody had it: then it is its from now on."""
        if self._strict:
            return None
        process = Process.at(sock)
        if process is None or process != self._process:
            if self._is_held():
                holder = f"process {self._process.pid}" if self._process else "another process"
                return (
                    f"{peer} is refused: {holder} has this disk (peer = first): see 'forebay peer'"
                )
            self._give(process)
        self._sockets.add(sock)
        return None

    def _is_held(self) -> bool:
        """True until the process has ended that has the disk, and who may have taken over its connections is gone."""
        alive = self._process is not None and self._process.is_alive
        return alive or any(not _is_hung_up(one) for one in self._sockets)

    def _refuse(self, why: str) -> None:
        self.refused += 1
        self._unsaid += 1
        if self._clock() >= self._quiet_until:
            more = f" ({self._unsaid} since the last line)" if self._unsaid > 1 else ""
            log.warning("%s: %s%s", self._disk, why, more)
            self._quiet_until, self._unsaid = self._clock() + QUIET_SECONDS, 0

    def status(self) -> dict[str, Any]:
        """What `forebay status --json` says of it."""
        return {
            "peer": self.rule.peer,
            "peer_label": self.rule.label,
            "peer_user": self.rule.user,
            "peer_process": self.pid,
            "refused_clients": self.refused,
        }

    # -- who has it

    def _give(self, process: Process | None) -> None:
        """Note that the process has the disk, here and for the next daemon."""
        self._process = process
        self._sockets.clear()
        try:
            if process is None:
                self._file.unlink(missing_ok=True)
                return
            self._file.parent.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            new = self._file.with_name(f".{self._disk}.new")
            new.unlink(missing_ok=True)
            with new.open("x") as file:
                file.write(f"{process.pid} {process.mark}\n")
            new.rename(self._file)
        except OSError as fault:
            log.error(
                "%s: %s cannot be written (%s): who has the disk is forgotten when the daemon ends",
                self._disk, self._file, fault.strerror,
            )  # fmt: skip

    def recall(self) -> None:
        """Go on with the process that had the disk when the daemon ended."""
        self._process = None
        try:
            with self._file.open("rb") as file:
                pid, _, mark = file.read(LONGEST_NOTE).decode("ascii").rstrip("\n").partition(" ")
            self._process = Process(int(pid), mark) if 0 <= int(pid) <= LARGEST_PID else None
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as fault:
            log.error("%s: %s cannot be read: %s", self._disk, self._file, fault)

    def forget(self) -> None:
        """Have nobody have the disk: it is a new one, or gone. A process that is connected stays so."""
        self._give(None)

    def is_door(self, sock: socket.socket) -> bool:
        """True if whoever connected is a door, which may be connected beside the one who has the disk."""
        try:
            return self.admission.is_door(Peer.of(sock))
        except OSError:
            return False

    def release(self) -> None:
        """Have the disk be nobody's, unless a process that has it is connected."""
        if all(_is_hung_up(one) for one in self._sockets):
            self._give(None)


def _is_of_a_vm(label: str | None) -> bool:
    """True for the labels that libvirt gives to domains: root's processes have them, too, where QEMU runs as root."""
    return label is not None and (label.startswith("libvirt-") or ":svirt" in label)


def _is_hung_up(sock: socket.socket) -> bool:
    """True if nobody is at the other end any more."""
    if sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock, select.POLLHUP)
    return bool(poll.poll(0))
