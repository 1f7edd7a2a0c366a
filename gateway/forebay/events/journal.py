# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The log of a process: stderr, or journald with fields of its own (systemd.journal-fields(7)).

journald's native protocol is one datagram for each line of the log, with fields: a name, and a value that says how long
it is. So what a name, an image or a store says can never become a field, or another line.
"""

import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from forebay.events.kinds import KINDS

SOCKET = Path("/run/systemd/journal/socket")

SEND_SECONDS = 0.05
"""So long journald may take to read: it reads at once, or never. Who did not is not waited for again until it could be
told something."""

LONGEST_VALUE = 48 << 10
"""Bytes. A datagram may have 200 KiB; tracebacks have some."""

_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}

_LENGTH = struct.Struct("<Q")

_FIELDS = {
    "disk": "DISK",
    "image": "IMAGE",
    "store": "STORE",
    "state": "STATE",
    "kind": "FOREBAY_EVENT",
    "asked_uid": "FOREBAY_ASKED_UID",
    "asked_pid": "FOREBAY_ASKED_PID",
    "client_uid": "FOREBAY_CLIENT_UID",
    "client_pid": "FOREBAY_CLIENT_PID",
}
"""By the key of an event: the field that has it."""

_SUBJECT = re.compile(r"(disk '|)%s('|\b)")
"""How messages begin whose first argument is what they are about."""

SubjectOf = Callable[[str], dict[str, str]]
"""What is known of a disk or an image by its name: keys of events. Empty for any other word."""


def nothing_of(_word: str) -> dict[str, str]:
    """For processes that have no disks."""
    return {}


class Format(logging.Formatter):
    """With the priority that systemd reads (sd-daemon(3)) where stderr is its journal."""

    def format(self, record: logging.LogRecord) -> str:
        """Each line with its priority."""
        text = super().format(record)
        if "JOURNAL_STREAM" not in os.environ:
            return text
        prefix = f"<{priority(record)}>"
        return "\n".join(prefix + line for line in text.splitlines())


PLAIN = "%(levelname)s %(name)s: %(message)s"


def priority(record: logging.LogRecord) -> int:
    """As syslog counts."""
    return _PRIORITIES.get(record.levelno, 7)


class JournalHandler(logging.Handler):
    """Sends each line to journald. What cannot be sent goes to `otherwise`, or is counted if journald is only slow."""

    def __init__(
        self, path: Path, otherwise: logging.Handler, subject_of: SubjectOf = nothing_of
    ) -> None:
        """`path` is that of journald's socket."""
        super().__init__()
        self.setFormatter(logging.Formatter(PLAIN))
        self._path = str(path)
        self._otherwise = otherwise
        self._subject_of = subject_of
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._seconds = SEND_SECONDS
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Send it. Raises nothing."""
        try:
            self._send(self._fields(record))
        except (BlockingIOError, TimeoutError):
            self._seconds = 0
            self._lost += 1
            return
        except OSError:
            self._otherwise.handle(record)
            return
        except Exception:  # noqa: BLE001 - as logging has it
            self.handleError(record)
            return
        self._seconds = SEND_SECONDS
        if self._lost:
            lost, self._lost = self._lost, 0
            text = f"{lost} lines are missing here: journald did not take them"
            self.emit(logging.LogRecord(record.name, logging.WARNING, "", 0, text, None, None))

    def close(self) -> None:
        """Send nothing any more."""
        self._socket.close()
        super().close()

    def _send(self, fields: Iterable[tuple[str, str]]) -> None:
        self._socket.settimeout(self._seconds)
        self._socket.sendto(datagram(fields), self._path)

    def _fields(self, record: logging.LogRecord) -> list[tuple[str, str]]:
        found = [
            ("MESSAGE", self.format(record)),
            ("PRIORITY", str(priority(record))),
            ("SYSLOG_IDENTIFIER", "forebay"),
            ("FOREBAY_LOGGER", record.name),
        ]
        event: dict[str, Any] = getattr(record, "event", None) or self._subject(record)
        kind = KINDS.get(event.get("kind", ""))
        if kind is not None:
            found.append(("MESSAGE_ID", kind.message_id))
        found += [(field, str(event[key])) for key, field in _FIELDS.items() if key in event]
        return [(name, value) for name, value in found if value]

    def _subject(self, record: logging.LogRecord) -> dict[str, str]:
        """What the line is about, of one that is no event."""
        arguments = record.args
        if not isinstance(arguments, tuple) or not arguments or not isinstance(arguments[0], str):
            return {}
        return self._subject_of(arguments[0]) if _SUBJECT.match(str(record.msg)) else {}


def datagram(fields: Iterable[tuple[str, str]]) -> bytes:
    """Fields as journald reads them, each with the length of its value in front of that."""
    parts = []
    for name, text in fields:
        value = text.encode("utf-8", "backslashreplace")[:LONGEST_VALUE]
        parts.append(b"%s\n%s%s\n" % (name.encode("ascii"), _LENGTH.pack(len(value)), value))
    return b"".join(parts)


def is_journal(file: int, path: Path = SOCKET) -> bool:
    """True if that descriptor leads to journald, and journald's socket is there (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        found = os.fstat(file)
        return (
            os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}" and path.exists()
        )
    except OSError:
        return False


def log_to_stderr(subject_of: SubjectOf = nothing_of) -> None:
    """Have what this process logs on stderr, and in the journal, with fields, where stderr leads there."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Format(PLAIN))
    if is_journal(sys.stderr.fileno()):
        handler = JournalHandler(SOCKET, handler, subject_of)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
