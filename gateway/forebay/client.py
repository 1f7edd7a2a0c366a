# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The command's side of the control API: requests over the daemon's Unix socket.

HTTP/1.0 by hand, one request a connection: the answer ends where the connection does, so status
line, headers and body are all there is to read. http.client would add 40 ms to each start of the
command (it imports email and ssl), and hooks start it often.
"""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from forebay.errors import ForebayError, InUseError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

CONNECT_TIMEOUT = 5.0
"""Seconds. A daemon that runs accepts at once."""

ANSWER_TIMEOUT = 30.0
"""Seconds for what the daemon answers from memory. What does I/O waits without limit."""


class NoDaemonError(ForebayError):
    """Nobody answers at the control socket."""


def _refused(answer: dict[str, Any]) -> ForebayError:
    """What an answer that is an error says."""
    if "holder" in answer:
        return InUseError(answer["error"], answer["holder"])
    return ForebayError(answer["error"])


class Client:
    """The daemon at the control socket `path`. Every method raises ForebayError."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get(self, target: str) -> Any:
        """What the daemon says at `target`, decoded from JSON."""
        with self._exchange("GET", target, None, ANSWER_TIMEOUT) as answer:
            return self._decode(answer.read())

    def post(self, target: str, content: dict[str, Any]) -> Any:
        """Send a JSON object and wait for the answer, however long it takes."""
        with self._exchange("POST", target, content, None) as answer:
            return self._decode(answer.read())

    def follow(
        self, method: str, target: str, content: dict[str, Any] | None, progress: Progress
    ) -> Any:
        """Start work, pass its progress on, and return its result, however long that takes."""
        with self._exchange(method, target, content, None) as answer:
            for text in answer:
                line = self._decode(text)
                if "error" in line:
                    raise ForebayError(line["error"])
                if "result" in line:
                    return line["result"]
                progress(line["done"], line["total"])
        raise self._gone()

    @contextmanager
    def _exchange(
        self, method: str, target: str, content: dict[str, Any] | None, timeout: float | None
    ) -> Iterator[IO[bytes]]:
        """One request; the body is given the body of its answer as a file. Raises what the answer says is wrong.

        `timeout` in seconds, for each wait; None: without limit.
        """
        with self._connect() as connection, connection.makefile("rb") as answer:
            try:
                connection.settimeout(timeout)
                self._send(connection, method, target, content)
                status = self._head(answer)
                if status >= 400:
                    raise _refused(self._decode(answer.read()))
                yield answer
            except TimeoutError:
                raise NoDaemonError(
                    f"the daemon at {self.path} has not answered for {timeout:.0f} s: "
                    "see 'journalctl -u forebay'"
                ) from None
            except OSError:
                raise self._gone() from None

    def _connect(self) -> socket.socket:
        """A connection to the daemon. Raises NoDaemonError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
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
    def _send(
        connection: socket.socket, method: str, target: str, content: dict[str, Any] | None
    ) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        head = f"{method} {target} HTTP/1.0\r\nHost: forebay\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode("ascii") + body)

    def _head(self, answer: IO[bytes]) -> int:
        """The HTTP status of the answer. Its headers are read and passed over."""
        words = answer.readline().split()
        while answer.readline().strip():
            pass
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise self._gone()
        return int(words[1])

    def _decode(self, text: bytes) -> Any:
        """What a JSON text means. One that is cut short means that the daemon ended while it spoke, and raises that."""
        try:
            return json.loads(text)
        except ValueError:
            raise self._gone() from None

    def _gone(self) -> NoDaemonError:
        """For an answer that ended early."""
        return NoDaemonError(
            f"the daemon at {self.path} went away in the middle: see 'journalctl -u forebay', "
            "then try again"
        )
