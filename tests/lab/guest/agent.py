# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Runs commands in a machine of the lab for the one who started it, over a virtio serial port.

No network is needed for it, so it answers whatever the case does to the network. One JSON object a line, both ways:
`{"id", "command", "lines"}` starts a command in bash, `{"id", "signal"}` signals its process group. Answers are
`{"id", "line"}` as the command prints them, where `lines` was true, and `{"id", "code", "output"}` when it has ended.
`{"id", "get"}` asks the gateway's control API for a path, which costs an emulated machine much less than the command.
"""

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

PORT = Path("/dev/virtio-ports/lab.agent")
CONTROL = "/run/forebay/control.sock"
CONTROL_SECONDS = 20.0
LONGEST_OUTPUT = 200_000
"""Characters of a command's output that are sent, from its end."""

ENVIRONMENT = {
    **os.environ,
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONUNBUFFERED": "1",
}


class Agent:
    """Commands that came over the port `fd`, each in a thread of its own."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._writing = threading.Lock()
        self._running: dict[int, subprocess.Popen[str]] = {}

    def serve(self) -> None:
        """Take requests for as long as the machine runs. A read of nothing means that nobody is connected."""
        rest = b""
        while True:
            with contextlib.suppress(OSError):
                rest += os.read(self._fd, 1 << 16)
            *lines, rest = rest.split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError, KeyError):
                    self._take(json.loads(line))
            if not lines:
                time.sleep(0.05)

    def _take(self, request: dict[str, Any]) -> None:
        if "signal" in request:
            process = self._running.get(request["id"])
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, request["signal"])
        else:
            does = self._get if "get" in request else self._run
            threading.Thread(target=does, args=(request,), daemon=True).start()

    def _get(self, request: dict[str, Any]) -> None:
        try:
            status, text = asked(request["get"])
        except (OSError, HTTPException) as error:
            status, text = 0, str(error)
        self._say(id=request["id"], code=int(status != HTTPStatus.OK), output=text)

    def _run(self, request: dict[str, Any]) -> None:
        number = request["id"]
        process = subprocess.Popen(
            ["bash", "-c", request["command"]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            cwd="/root",
            env=ENVIRONMENT,
        )
        self._running[number] = process
        output = self._follow(process, number, told=request.get("lines", False))
        code = process.wait()
        del self._running[number]
        self._say(id=number, code=code, output=output[-LONGEST_OUTPUT:])

    def _follow(self, process: subprocess.Popen[str], number: int, *, told: bool) -> str:
        assert process.stdout is not None
        kept = []
        for line in process.stdout:
            if told:
                self._say(id=number, line=line.rstrip("\n"))
            else:
                kept.append(line)
        return "".join(kept)

    def _say(self, **answer: Any) -> None:
        data = (json.dumps(answer) + "\n").encode()
        with self._writing:
            while data:
                data = data[os.write(self._fd, data) :]


class UnixConnection(HTTPConnection):
    """HTTP over a Unix socket, whose path is the host."""

    def connect(self) -> None:
        """Connect, or OSError."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(CONTROL_SECONDS)
        self.sock.connect(self.host)


def asked(path: str) -> tuple[int, str]:
    """Status and text of the gateway's answer."""
    connection = UnixConnection(CONTROL)
    try:
        connection.request("GET", path, headers={"Host": "localhost"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


if __name__ == "__main__":
    while not PORT.exists():
        time.sleep(0.1)
    Agent(os.open(PORT, os.O_RDWR)).serve()
