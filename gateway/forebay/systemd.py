# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Talking to systemd without its library: sd_notify(3), the file descriptor store, what it hands over at the start."""

import logging
import os
import select
import socket
import time
from collections.abc import Sequence

import trio

log = logging.getLogger("forebay.daemon")

FIRST_FD = 3
"""Where the descriptors that a service is started with begin (sd_listen_fds(3))."""

SEND_SECONDS = 5.0
"""How long a service manager may take to read what it is told. It reads at once, or never: who did not is not waited
for again until something could be sent."""

TOLD_SECONDS = 1.0
"""How often the service manager is told."""
LOGGED_SECONDS = 10.0
"""How often it is logged."""
MORE_SECONDS = 60
"""So much time the next bit of it may take: it is nothing but some reads of the device."""


class _Patience:
    """How long the manager is waited for the next time: SEND_SECONDS, or not at all after it let us wait in vain."""

    seconds = SEND_SECONDS


def notify(state: str, fds: Sequence[int] = (), *, wait: bool = True) -> bool:
    """Send `state` (`READY=1`, `STATUS=...`, several lines) to the service manager. True if there is one that took it.

    Never raises: a manager that went away is no reason to stop serving disks. Without `wait` it never waits either.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.settimeout(_Patience.seconds if wait else 0)
            sender.connect(address)
            socket.send_fds(sender, [state.encode()], list(fds))
        except TimeoutError:
            _Patience.seconds = 0
            return False
        except OSError:
            return False
    _Patience.seconds = SEND_SECONDS
    return True


def store(name: str, fd: int) -> bool:
    """Give a descriptor to the manager, which hands it to this service's next process. True if it was sent."""
    return notify(f"FDSTORE=1\nFDNAME={name}", [fd])


def unstore(name: str) -> bool:
    """Have the manager close what it holds under this name. True if that was sent."""
    return notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def settled(seconds: float) -> bool:
    """Wait until the manager has dealt with all that was sent so far. False if it does not say so within `seconds`."""
    read, write = os.pipe()
    try:
        sent = notify("BARRIER=1", [write])
        os.close(write)
        poll = select.poll()
        poll.register(read, select.POLLHUP)
        return sent and bool(poll.poll(seconds * 1000))
    finally:
        os.close(read)


def received() -> list[tuple[str, int]]:
    """(name, descriptor) of everything that the manager has started this process with. A second call returns nothing.

    The descriptors are close-on-exec, and the environment does not name them any more, so children have none of it.
    """
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    count = int(os.environ.pop("LISTEN_FDS", None) or 0)
    if os.environ.pop("LISTEN_PID", None) != str(os.getpid()):
        return []
    fds = range(FIRST_FD, FIRST_FD + count)
    for fd in fds:
        os.set_inheritable(fd, False)
    names += [""] * (count - len(names))
    return list(zip(names, fds, strict=False))


async def keep_alive() -> None:
    """Feed the watchdog for as long as the event loop turns: for a process that holds nobody's data.

    The daemon asks for more, see `forebay.process.watchdog`.
    """
    asked = watchdog_seconds()
    while asked:
        notify("WATCHDOG=1", wait=False)
        await trio.sleep(asked / 2)


def watchdog_seconds() -> float | None:
    """How often, in seconds, the manager wants to hear `WATCHDOG=1` (`WatchdogSec=`); None: it does not."""
    microseconds = int(os.environ.get("WATCHDOG_USEC") or 0)
    if not microseconds or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return microseconds / 1e6


class Starting:
    """How far the start of a daemon is, which takes long where the journal has much and the device is slow.

    The service manager gives a start so long (`TimeoutStartSec=`), and would end one that is only slow, again and
    again. So it is told how far the start is, and asked for more time, for as long as that goes on.
    """

    def __init__(self) -> None:
        self._clock = time.monotonic
        self._told = self._logged = self._clock()

    def tell(self, what: str, done: int, total: int) -> None:
        """Of so many of `what` the cache is through with so many."""
        now = self._clock()
        if now - self._told < TOLD_SECONDS:
            return
        self._told = now
        text = f"recovering the cache: {done} of {total} {what}"
        notify(f"STATUS={text}\nEXTEND_TIMEOUT_USEC={MORE_SECONDS * 1_000_000}", wait=False)
        if now - self._logged >= LOGGED_SECONDS:
            self._logged = now
            log.info("%s", text)
