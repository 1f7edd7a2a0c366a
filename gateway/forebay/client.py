# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The command's side of the control API: requests over the daemon's Unix socket.

HTTP/1.0 by hand, one request a connection: the answer ends where the connection does, so status
line, headers and body are all there is to read. http.client would add 40 ms to each start of the
command (it imports email and ssl), and hooks start it often.
"""

from __future__ import annotations

import io
import json
import math
from _socket import AF_UNIX, SOCK_STREAM
from _socket import socket as Socket  # noqa: N812  (what `socket` adds to it are 4 ms of enumerations)
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from forebay.errors import ForebayError, InUseError

TYPE_CHECKING = False  # `typing` takes 3 ms, on each start of the command
if TYPE_CHECKING:
    from typing import IO, Any

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

CONNECT_TIMEOUT = 5.0
"""Seconds. A daemon that runs accepts at once."""

ANSWER_TIMEOUT = 30.0
"""Seconds for what the daemon answers from memory. What does I/O waits without limit."""

FOLLOW_TIMEOUT = 60.0
"""Seconds. A daemon that is followed says so often that it is there, and more."""

LONGEST_ANSWER = 64 << 20
"""Bytes. A disk takes less than 3 KiB of the longest one, the list of all disks."""

MOST_HEADERS = 100

LONGEST_LINE = 64 << 10
"""Bytes of a header, or of one line of progress."""

_TEXTS = {"name", "image", "mode", "state", "socket", "error", "device", "what", "text", "disk"}
_MAY_BE_NULL = {"error", "disk", "device"}
_LISTS = {"damage", "faults", "not_served", "tags", "disks", "purged", "kept"}
_NUMBERS = {"size", "clients", "done", "total", "offset", "length", "reads", "writes"}
_NUMBERS_END = ("_bytes", "_seconds", "_hits", "_misses")


class NoDaemonError(ForebayError):
    """Nobody answers at the control socket."""


class StrangeAnswerError(ForebayError):
    """What answers is no Forebay daemon, or one of a version that this command does not understand."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the daemon's answer {what}: see that daemon and command are of one version, "
            "and that gateway.run names the daemon's directory"
        )


class Answer(dict[str, "Any"]):
    """An object of an answer. Raises StrangeAnswerError for a key that it lacks."""

    def __missing__(self, key: str) -> Any:
        raise StrangeAnswerError(f"lacks '{key}'")


def _object(pairs: list[tuple[str, Any]]) -> Answer:
    """An object, whose keys have values of the kinds that every version gave them. Raises StrangeAnswerError."""
    for key, value in pairs:
        if not _is_of_its_kind(key, value):
            raise StrangeAnswerError(f"has a '{key[:64]}' that cannot be")
    return Answer(pairs)


def _is_of_its_kind(key: str, value: Any) -> bool:
    if key in _TEXTS:
        return isinstance(value, str) or (value is None and key in _MAY_BE_NULL)
    if key in _LISTS:
        return isinstance(value, list)
    if key in _NUMBERS or key.endswith(_NUMBERS_END):
        return isinstance(value, (int, float)) and math.isfinite(value)
    return True


def _refused(answer: Any) -> ForebayError:
    """What an answer that is an error says."""
    if not isinstance(answer, Answer):
        return StrangeAnswerError("is no object")
    if isinstance(answer.get("holder"), dict):
        return InUseError(answer["error"], answer["holder"])
    return ForebayError(answer["error"] or "refused, and it did not say why")


def _checked(answer: Any) -> Answer:
    """An answer that is an object. Raises StrangeAnswerError for any other."""
    if isinstance(answer, Answer):
        return answer
    raise StrangeAnswerError("is no object")


LISTS = ("disks", "images", "stores", "overlays", "snapshots", "stages", "settings", "events")
"""What is answered with a list of objects."""


class _Received(io.RawIOBase):
    """What a connection receives, as a file. Raises OSError, TimeoutError among it."""

    def __init__(self, connection: Socket) -> None:
        self._connection = connection

    def readable(self) -> bool:
        """True, always."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Wait for bytes, and say how many came; 0 at the end."""
        return self._connection.recv_into(buffer)


class Client:
    """The daemon at the control socket `path`. Every method raises ForebayError."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get(self, target: str) -> Any:
        """What the daemon says at `target`, decoded from JSON."""
        with self._exchange("GET", target, None, ANSWER_TIMEOUT) as answer:
            found = self._whole(answer)
        *above, last = target.partition("?")[0].strip("/").split("/")
        if last in LISTS and len(above) % 2 == 0:  # else it is the name of a disk
            if isinstance(found, list) and all(isinstance(one, Answer) for one in found):
                return found
            raise StrangeAnswerError(f"is no list of {last}")
        return _checked(found)

    def post(self, target: str, content: dict[str, Any]) -> Any:
        """Send a JSON object and wait for the answer, however long it takes."""
        with self._exchange("POST", target, content, None) as answer:
            return _checked(self._whole(answer))

    def follow(
        self, method: str, target: str, content: dict[str, Any] | None, progress: Progress
    ) -> Any:
        """Start work, pass its progress on, and return its result, however long that takes."""
        with self._exchange(method, target, content, None) as answer:
            while text := answer.readline(LONGEST_LINE):
                line = _checked(self._decode(text))
                if "error" in line:
                    raise _refused(line)
                if "result" in line:
                    return Answer() if line["result"] is None else _checked(line["result"])
                progress(line["done"], line["total"])
        raise self._gone()

    def lines(self, target: str) -> Iterator[Answer | None]:
        """Each object of an answer that goes on until the daemon ends; None for a line that says nothing but that.

        Raises ForebayError, also for a daemon that says nothing at all for FOLLOW_TIMEOUT.
        """
        with self._exchange("GET", target, None, FOLLOW_TIMEOUT) as answer:
            while text := answer.readline(LONGEST_LINE):
                yield _checked(self._decode(text)) if text.strip() else None

    @contextmanager
    def _exchange(
        self, method: str, target: str, content: dict[str, Any] | None, timeout: float | None
    ) -> Iterator[IO[bytes]]:
        """One request; the body is given the body of its answer as a file. Raises what the answer says is wrong.

        `timeout` in seconds, for each wait; None: without limit.
        """
        with (
            closing(self._connect()) as connection,
            io.BufferedReader(_Received(connection)) as answer,
        ):
            try:
                connection.settimeout(timeout)
                self._send(connection, method, target, content)
                status = self._head(answer)
                if status >= 400:
                    raise _refused(self._whole(answer))
                yield answer
            except TimeoutError:
                raise NoDaemonError(
                    f"the daemon at {self.path} has not answered for {timeout:.0f} s: "
                    "see 'journalctl -u forebay'"
                ) from None
            except OSError:
                raise self._gone() from None

    def _connect(self) -> Socket:
        """A connection to the daemon. Raises NoDaemonError."""
        connection = Socket(AF_UNIX, SOCK_STREAM)
        connection.settimeout(CONNECT_TIMEOUT)
        try:
            connection.connect(self.path)
        except PermissionError:
            connection.close()
            raise NoDaemonError(
                f"no permission to use {self.path}: run as root, or join the group that "
                "gateway.control_group names"
            ) from None
        except OSError:
            connection.close()
            raise NoDaemonError(
                f"no daemon at {self.path}: start it with 'forebay serve' or "
                "'systemctl start forebay'"
            ) from None
        return connection

    @staticmethod
    def _send(connection: Socket, method: str, target: str, content: dict[str, Any] | None) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        head = f"{method} {target} HTTP/1.0\r\nHost: forebay\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode("ascii") + body)

    def _head(self, answer: IO[bytes]) -> int:
        """The HTTP status of the answer. Its headers are read and passed over."""
        first = answer.readline(LONGEST_LINE)
        words = first.split()
        if first and not first.startswith(b"HTTP/1."):
            raise StrangeAnswerError("is not HTTP")
        for _ in range(MOST_HEADERS):
            if not answer.readline(LONGEST_LINE).strip():
                break
        if len(words) < 2 or len(words[1]) != 3 or not words[1].isdigit():
            raise self._gone()
        return int(words[1])

    def _whole(self, answer: IO[bytes]) -> Any:
        """The rest of the answer, decoded. Raises StrangeAnswerError for one that does not end."""
        text = answer.read(LONGEST_ANSWER + 1)
        if len(text) > LONGEST_ANSWER:
            raise StrangeAnswerError(f"is longer than {LONGEST_ANSWER >> 20} MiB")
        return self._decode(text)

    def _decode(self, text: bytes) -> Any:
        """What a JSON text means. One that is cut short means that the daemon ended while it spoke, and raises that."""
        try:
            return json.loads(text, object_pairs_hook=_object)
        except RecursionError:
            raise StrangeAnswerError("is nested too deeply") from None
        except ValueError:
            raise self._gone() from None

    def _gone(self) -> NoDaemonError:
        """For an answer that ended early."""
        return NoDaemonError(
            f"the daemon at {self.path} went away in the middle: see 'journalctl -u forebay', "
            "then try again"
        )
