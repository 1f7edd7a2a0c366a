# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The failing store of a soak: fault_fs.py as a process, mounted on a directory."""

import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from real.processes import START_TIMEOUT

SCRIPT = Path(__file__).with_name("fault_fs.py")


def why_not() -> str:
    """Why nothing can be mounted here; empty: it can."""
    if shutil.which("fusermount3") is None:
        return "fusermount3 is not installed"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be opened"
    return "" if importlib.util.find_spec("pyfuse3") else "pyfuse3 is not installed"


class FaultyStore:
    """`path` is the store, `source` the directory below it, which never fails."""

    def __init__(self, directory: Path) -> None:
        self.source, self.path = directory / "below", directory / "faulty"
        self.source.mkdir()
        self.path.mkdir()
        self.active: dict[str, Any] = {}
        self._log = (directory / "faulty.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(self.source), str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # ^C is for who started us
        )
        self._hear(b"ready\n")

    def _hear(self, what: bytes) -> None:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        assert select.select([fd], [], [], START_TIMEOUT)[0], "the failing store does not answer"
        found = os.read(fd, 64)
        assert found == what, f"the failing store ended: {found!r}"

    def fail(self, **fault: Any) -> None:
        """Begin a fault, as fault_fs.py takes it; without any, end it."""
        self.active = fault
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(fault).encode() + b"\n")
        self._process.stdin.flush()
        self._hear(b"done\n")

    def remove(self) -> None:
        """Unmount. The directory below stays."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(START_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        subprocess.run(
            ["fusermount3", "-u", "-z", "-q", str(self.path)], check=False, capture_output=True
        )
        self._log.close()
