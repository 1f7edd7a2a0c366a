# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Starts daemons for the tests that kill them: a process with everything imported, which forks for each start.

    python kill_launcher.py

Commands come as lines of JSON on standard input, what happens goes as lines of JSON to standard output:

    {"do": "start", "config": PATH, "log": PATH, "notify": PATH, "plant": {...}, "kill_after": SECONDS}
                                    -> {"pid": N}, and once it has ended {"ended": N, "code": EXIT OR -SIGNAL}
    {"do": "signal", "number": 9}   to the daemon that runs; none is not a fault

One daemon runs at a time. It is the product as it is, `forebay serve`; only where a `plant` is given, functions are
replaced in it as kill_plants.py says. `kill_after` is counted from the fork, so that it may end in the middle of a
start. When standard input ends, or this process does, the daemon is killed.
"""

import ctypes
import faulthandler
import gc
import json
import os
import select
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).parents[1]))

# What a daemon imports as it starts, and later.
import forebay.cli.commands
import forebay.control.prometheus.metrics
import forebay.control.server
import forebay.daemon.gateway
import forebay.origin.nbd
import forebay.sidecar.redo  # noqa: F401
from forebay.cli.main import main as forebay_main
from real import kill_plants

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def become(command: dict[str, Any]) -> int:
    """In the forked process: the daemon. Its exit code."""
    die_with_parent()
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(command["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for fd, to in ((null, 0), (log, 1), (log, 2)):
        os.dup2(fd, to)
    os.closerange(3, 64)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (what the parent had read ahead is not ours)
    faulthandler.register(signal.SIGUSR2)  # says in the log where it hangs
    if command.get("notify"):
        os.environ["NOTIFY_SOCKET"] = command["notify"]
    if command.get("plant"):
        kill_plants.install(command["plant"])
    return forebay_main(["serve", "--config", command["config"]])


class Launcher:
    """The loop over commands, the daemon's end and the moment at which it is to be killed."""

    def __init__(self) -> None:
        self.pid = self.fd = -1
        self.kill_at = float("inf")
        self.buffer = b""

    def run(self) -> None:
        while self.turn():
            pass
        if self.pid > 0:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def turn(self) -> bool:
        """Wait for one thing and do it. False when the commands have ended."""
        left = self.kill_at - time.monotonic()
        watched = [0, self.fd] if self.pid > 0 else [0]
        ready = select.select(watched, [], [], None if left == float("inf") else max(0.0, left))[0]
        if self.fd in ready:
            self.ended()
        elif time.monotonic() >= self.kill_at:
            self.kill_at = float("inf")
            self.signal(signal.SIGKILL)
        if 0 not in ready:
            return True
        data = os.read(0, 65536)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            self.do(json.loads(line))
        return bool(data)

    def do(self, command: dict[str, Any]) -> None:
        if command["do"] == "signal":
            self.signal(command["number"])
            return
        assert self.pid < 0, "a daemon runs already"
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = become(command)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        if (after := command.get("kill_after")) is not None:
            self.kill_at = time.monotonic() + after
        self.pid, self.fd = pid, os.pidfd_open(pid)
        self.tell({"pid": pid})

    def signal(self, number: int) -> None:
        if self.pid > 0:  # not reaped yet, so the number is still that process's
            os.kill(self.pid, number)

    def ended(self) -> None:
        pid, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        self.pid = self.fd = -1
        self.kill_at = float("inf")
        self.tell({"ended": pid, "code": os.waitstatus_to_exitcode(status)})

    def tell(self, what: dict[str, Any]) -> None:
        os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    warnings.simplefilter("default")
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started us says when
    assert trio.__version__
    gc.freeze()
    Launcher().run()
