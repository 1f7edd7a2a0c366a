# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The steady client as a process: started, stopped, and what it saw."""

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SCRIPT = Path(__file__).with_name("steady_client.py")

ANSWER_SECONDS = 60.0


class SteadyGuest:
    """`with SteadyGuest(uri, first=0, length=MIB, depth=16) as guest: ...; guest.finish()`: what the script prints."""

    def __init__(
        self, uri: str, *, first: int = 0, length: int, depth: int = 8, reconnect: bool = False
    ) -> None:
        words = [uri, *map(str, (first, length, depth)), *(["--reconnect"] if reconnect else [])]
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line != "ready\n":
            self.process.kill()
            raise AssertionError(f"the guest did not begin: {line}{self.process.communicate()}")
        return self

    def finish(self) -> dict[str, Any]:
        """Let it end its requests and compare everything."""
        out, err = self.process.communicate(timeout=ANSWER_SECONDS)
        assert self.process.returncode == 0, err
        found = json.loads(out)
        assert isinstance(found, dict)
        return found

    def __exit__(
        self, _1: type[BaseException] | None, _2: BaseException | None, _3: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
