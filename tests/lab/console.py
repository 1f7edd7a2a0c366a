# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Commands in a machine, by way of the agent that runs there (guest/agent.py)."""

import contextlib
import itertools
import json
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.outcome import Failure

ANSWER_SECONDS = 300.0
"""How long a command may take unless it is told otherwise: emulated machines on a loaded host are slow."""


@dataclass(frozen=True)
class Answer:
    """How a command ended: its exit code, or None where it did not end in time; its output; seconds."""

    code: int | None
    output: str
    seconds: float

    def __bool__(self) -> bool:
        return self.code == 0

    def __str__(self) -> str:
        how = "no answer" if self.code is None else f"exit code {self.code}"
        return f"{how} after {self.seconds:.0f} s: {self.output.strip()[-400:]}"


class Job:
    """A command that runs on; `lines` grows as it prints them."""

    def __init__(self, console: "Console", number: int, *, told: bool) -> None:
        self.number = number
        self.told = told
        self.lines: list[str] = []
        self.code: int | None = None
        self.output = ""
        self.ended = threading.Event()
        self._console = console
        self._news = threading.Condition()

    def take(self, answer: dict[str, Any]) -> None:
        """What the agent says of it."""
        with self._news:
            if "line" in answer:
                self.lines.append(answer["line"])
            else:
                self.code, self.output = answer["code"], answer["output"]
                self.ended.set()
            self._news.notify_all()

    def lose(self) -> None:
        """The machine is gone: nothing more will be said."""
        with self._news:
            self.ended.set()
            self._news.notify_all()

    def until(self, words: str, seconds: float) -> bool:
        """Whether a line with these words was printed, now or within so many seconds."""
        with self._news:
            return self._news.wait_for(
                lambda: any(words in line for line in self.lines), timeout=seconds
            )

    def signal(self, which: signal.Signals = signal.SIGTERM) -> None:
        """Signal the command and what it has started."""
        self._console.send(id=self.number, signal=int(which))

    def stop(self, seconds: float = 30.0) -> None:
        """SIGTERM, then SIGKILL."""
        for which in (signal.SIGTERM, signal.SIGKILL):
            self.signal(which)
            if self.ended.wait(seconds):
                return


class Console:
    """The connection to one machine's agent."""

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(str(path))
        self._jobs: dict[int, Job] = {}
        # a machine that was saved may have jobs of an earlier connection
        self._numbers = itertools.count(time.time_ns())
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """End the connection; jobs that run count as lost."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def send(self, **request: object) -> None:
        """One request; a machine that is gone is a failure."""
        try:
            self._sock.sendall((json.dumps(request) + "\n").encode())
        except OSError as error:
            raise Failure(f"{self._name} is gone: {error}") from error

    def start(self, command: str, *, lines: bool = True) -> Job:
        """Start a command and return at once."""
        job = Job(self, next(self._numbers), told=lines)
        self._jobs[job.number] = job
        self.send(id=job.number, command=command, lines=lines)
        return job

    def run(self, command: str, seconds: float = ANSWER_SECONDS) -> Answer:
        """Run a command; one that does not end in time is killed, and its code is None."""
        return self._answer(self.start(command, lines=False), seconds)

    def get(self, path: str, seconds: float) -> Answer:
        """What the gateway's control API says to a GET; code 0 where it has what is asked for."""
        job = Job(self, next(self._numbers), told=False)
        self._jobs[job.number] = job
        self.send(id=job.number, get=path)
        return self._answer(job, seconds)

    def _answer(self, job: Job, seconds: float) -> Answer:
        began = time.monotonic()
        if not job.ended.wait(seconds):
            job.signal(signal.SIGKILL)
        del self._jobs[job.number]
        return Answer(job.code, job.output, time.monotonic() - began)

    def wait_awake(self, seconds: float) -> None:
        """Return once the agent answers; Failure where it does not. What is asked before it is there is asked again."""
        deadline = time.monotonic() + seconds
        while not self.run("true", 5.0):
            if time.monotonic() > deadline:
                raise Failure(f"{self._name} does not answer after {seconds:.0f} s")

    def _listen(self) -> None:
        rest = b""
        with contextlib.suppress(OSError):
            while part := self._sock.recv(1 << 16):
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    with contextlib.suppress(ValueError):
                        self._take(json.loads(line))
        for job in list(self._jobs.values()):
            job.lose()

    def _take(self, answer: dict[str, Any]) -> None:
        job = self._jobs.get(answer.get("id", -1))
        if job is not None:
            job.take(answer)
