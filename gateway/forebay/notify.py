"""Telling systemd how the daemon is: sd_notify(3), without its library."""

import os
import socket

import trio


def notify(state: str) -> None:
    """Send `state` (`READY=1`, `STATUS=...`, several lines) to the service manager, if there is one.

    Never raises: a manager that went away is no reason to stop serving disks.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError:
            pass


async def keep_alive() -> None:
    """Pet the watchdog (`WatchdogSec=`) from the event loop for as long as that turns, twice as often as asked."""
    microseconds = int(os.environ.get("WATCHDOG_USEC") or 0)
    if not microseconds or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await trio.sleep(microseconds / 2e6)
