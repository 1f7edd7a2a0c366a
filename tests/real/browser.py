# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A real browser without a screen: Chromium, told by its DevTools protocol over two pipes what to do.

The package chromium-headless-shell, which `make setup` installs. Messages are JSON, each with a zero byte behind it, on
descriptors 3 and 4 (`--remote-debugging-pipe`); the names of methods and events are those of the protocol.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from real.processes import end

PROGRAM = shutil.which("chromium-headless-shell") or shutil.which("chromium")

PATIENCE = 60.0
"""Seconds for one answer, and for what a test waits for. Chromium takes some to start on a busy machine."""

FLAGS = (
    "--remote-debugging-pipe",
    "--no-sandbox",  # it is root's in tests, and what it shows is our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--lang=en-GB",
    # no name but those of this host leads anywhere
    "--host-resolver-rules=MAP rebound.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


AS_3_AND_4 = """
import fcntl, os, sys
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 10) for fd in sys.argv[1:3]]
os.dup2(high[0], 3)
os.dup2(high[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page in a browser of its own. It keeps what the page said on its console, and what it asked for."""

    def __init__(self) -> None:
        assert PROGRAM is not None
        self._home = tempfile.mkdtemp(prefix="fb-browser-")
        read_fd, self._to = os.pipe()
        self._from, write_fd = os.pipe()
        descriptors = (str(read_fd), str(write_fd))
        self._process = subprocess.Popen(
            [sys.executable, "-c", AS_3_AND_4, *descriptors, PROGRAM, *FLAGS,
             f"--user-data-dir={self._home}", "about:blank"],
            pass_fds=(read_fd, write_fd), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "HOME": self._home, "TZ": "UTC"},
        )  # fmt: skip
        os.close(read_fd)
        os.close(write_fd)
        self._number = 0
        self._pending = b""
        self._session: str | None = None
        self.console: list[str] = []
        """Errors and warnings, exceptions, and what the rules of the page kept from being done."""
        self.asked: list[str] = []
        """Addresses that it asked for."""

    def __enter__(self) -> Self:
        try:
            self._attach()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        end(self._process)
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._home, ignore_errors=True)

    # -- what tests do

    def open(self, url: str) -> None:
        """Go there."""
        self._call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What the expression comes to in the page."""
        told = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Return once the expression is true in the page."""
        deadline = time.monotonic() + PATIENCE
        while not self.value(f"!!({expression})"):
            shown = self.value("document.body && document.body.innerText")
            assert time.monotonic() < deadline, (
                f"{expression} never came true; it shows:\n{shown}\n{self.console}"
            )
            self._listen(0.05)

    def look_like(self, width: int, height: int, scheme: str) -> None:
        """Have a screen of that size (CSS pixels), and prefer `light` or `dark`."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """A PNG of what is on the screen."""
        told = self._call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(told["data"]))

    # -- the protocol

    def _attach(self) -> None:
        target = next(
            x for x in self._call("Target.getTargets")["targetInfos"] if x["type"] == "page"
        )
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        number = self._number
        found: list[dict[str, Any]] = []

        def is_answer(told: dict[str, Any]) -> bool:
            if told.get("id") == number:
                found.append(told)
            return bool(found)

        self._listen(PATIENCE, is_answer)
        assert found, f"no answer to {method}"
        assert "error" not in found[0], f"{method}: {found[0]}"
        result: dict[str, Any] = found[0]["result"]
        return result

    def _listen(
        self, seconds: float, is_last: Callable[[dict[str, Any]], Any] = lambda _: False
    ) -> None:
        """Take in messages for so long, or until one is the last."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            while b"\0" in self._pending:
                text, _, self._pending = self._pending.partition(b"\0")
                told = json.loads(text)
                self._note(told)
                if is_last(told):
                    return
            if select.select([self._from], [], [], left)[0]:
                data = os.read(self._from, 1 << 20)
                assert data, "the browser is gone"
                self._pending += data

    def _note(self, told: dict[str, Any]) -> None:
        parameters = told.get("params", {})
        match told.get("method"):
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.console.append(str([x.get("value") for x in parameters["args"]]))
            case "Runtime.exceptionThrown":
                self.console.append(json.dumps(parameters["exceptionDetails"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.console.append(
                    f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}"
                )
            case "Network.requestWillBeSent":
                self.asked.append(parameters["request"]["url"])
