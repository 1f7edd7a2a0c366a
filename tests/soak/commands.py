# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Commands to the daemon beside the work of the guests: one at a time, in a thread, cut short by kills and faults."""

import threading
from collections.abc import Callable
from typing import Any

from real.kill_checker import Tally
from real.kill_daemon import KillableGateway, Refused

PATIENCE = 90.0
"""Seconds a command may take. Those that wait for a store have a shorter time-out of their own."""

OURS = "a fault of forebay itself"
"""What the control API says when the daemon has a bug."""

Then = Callable[[Refused | None], None]


class Commands:
    """`busy` says what is under way; `then` is called in the loop's thread once it is over, with what went wrong."""

    def __init__(self, gateway: KillableGateway, tally: Tally) -> None:
        self._gateway = gateway
        self._tally = tally
        self._thread: threading.Thread | None = None
        self._outcome: BaseException | None = None
        self._then: Then | None = None
        self.busy = ""

    def begin(
        self, what: str, method: str, path: str, body: dict[str, Any] | None = None,
        then: Then | None = None,
    ) -> None:  # fmt: skip
        """Ask, and go on."""
        assert not self.busy, self.busy
        self.busy, self._then, self._outcome = what, then, None

        def ask() -> None:
            try:
                self._gateway.ask(method, path, body, timeout=PATIENCE)
            except BaseException as fault:  # noqa: BLE001  (told in the loop's thread)
                self._outcome = fault

        self._thread = threading.Thread(target=ask, daemon=True)
        self._thread.start()

    def look(self) -> None:
        """If it is over, take note, and do what comes after it."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread = None
        what, self.busy = self.busy, ""
        fault = self._outcome
        if fault is not None and not isinstance(fault, Refused):
            raise fault
        if fault is None:
            self._tally.controls += 1
        else:
            self._tally.controls_failed += 1
            if OURS in str(fault):
                self._tally.lost.append(f"{what}: {fault}")
        if self._then is not None:
            self._then(fault)

    def wait(self) -> None:
        """For the end of what is under way: the daemon has ended, or nobody may interfere."""
        if self._thread is not None:
            self._thread.join()
        self.look()
