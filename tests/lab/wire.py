# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The cable between two machines: Ethernet frames over Unix datagrams. It can be cut, also after a chosen NFS call."""

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

from lab.nfs_calls import call_of

LARGEST_FRAME = 1 << 16
PATIENCE = 1.0
"""Seconds that a frame waits for a machine that takes none, before it is dropped."""


@dataclass
class Trap:
    """Cut the wire right after one NFS call of one end."""

    sender: str
    calls: int
    """That many are let through, this one included; its answer is not."""

    sprung: threading.Event = field(default_factory=threading.Event)


class Wire:
    """A cable between the machines `ends`. QEMU's sockets lie beside the wire's own, in `place`."""

    def __init__(self, place: Path, ends: tuple[str, str]) -> None:
        self.name = "-".join(ends)
        self.ends = ends
        self.calls: list[tuple[str, str]] = []
        """Sender and name of each NFS call that passed, since `listen`."""
        self.dropped = dict.fromkeys(ends, 0)
        """Frames of each end that came while the wire was cut."""
        self._place = place
        self._whole = True
        self._trap: Trap | None = None
        self._sockets = {end: self._bound(end) for end in ends}

    def own(self, end: str) -> Path:
        """The socket at which the wire takes what `end` sends."""
        return self._place / f"{self.name}.wire.{end}"

    def machines(self, end: str) -> Path:
        """The socket at which the machine `end` takes frames."""
        return self._place / f"{self.name}.{end}"

    def _bound(self, end: str) -> socket.socket:
        self.own(end).unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind(str(self.own(end)))
        sock.settimeout(PATIENCE)
        return sock

    def start(self) -> None:
        """Carry frames until `close`."""
        for sender, receiver in (self.ends, self.ends[::-1]):
            threading.Thread(target=self._carry, args=(sender, receiver), daemon=True).start()

    def close(self) -> None:
        """Carry nothing any more."""
        sockets, self._sockets = self._sockets, {}
        for sock in sockets.values():
            sock.close()

    def cut(self) -> None:
        """From now on nothing arrives, either way; neither end is told."""
        self._whole = False

    def mend(self) -> None:
        """Frames pass again, and no trap is set."""
        self._trap = None
        self._whole = True

    def listen(self) -> None:
        """Begin to count NFS calls anew."""
        self.calls = []

    def cut_after(self, sender: str, calls: int) -> threading.Event:
        """Cut right after so many further NFS calls of `sender`. The event is set when that has happened."""
        self.listen()
        self._trap = Trap(sender, calls)
        return self._trap.sprung

    def _carry(self, sender: str, receiver: str) -> None:
        taken, given = self._sockets[sender], self._sockets[receiver]
        while self._sockets:
            try:
                frame = taken.recv(LARGEST_FRAME)
            except TimeoutError:
                continue
            except OSError:
                return
            if not self._whole:
                self.dropped[sender] += 1
                continue
            # nobody there, or a machine that is stopped: as with a real cable, the frame is lost
            with contextlib.suppress(OSError):
                given.sendto(frame, str(self.machines(receiver)))
            self._note(sender, frame)

    def _note(self, sender: str, frame: bytes) -> None:
        call = call_of(frame)
        if call is None:
            return
        self.calls.append((sender, call))
        trap = self._trap
        if trap is not None and sender == trap.sender:
            trap.calls -= 1
            if trap.calls <= 0:
                self._trap = None
                self._whole = False
                trap.sprung.set()
