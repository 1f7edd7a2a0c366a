# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What guests and operators say about their life, for the log of a recorder."""

import itertools
import marshal
import os
import threading
from pathlib import Path
from typing import Any


class Marks:
    """The file that marks are written to. From any thread."""

    def __init__(self, mount: Path) -> None:
        self._fd = os.open(mount / "marks", os.O_WRONLY | os.O_CLOEXEC)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def say(self, *mark: Any) -> None:
        os.pwrite(self._fd, marshal.dumps(mark), 0)

    def number(self) -> int:
        with self._lock:
            return next(self._numbers)

    def close(self) -> None:
        os.close(self._fd)
