# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the host around the daemon is like: the unit, the clock, the kernel and its limits, libvirt."""

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from forebay.doctor.daemon import Daemon
from forebay.doctor.finding import Finding, fault, ok, unknown, warning
from forebay.libvirt.version import (
    format_version,
    installed_version,
    knows_reconnect,
    reconnect_warning,
)
from forebay.units import GIB, format_size

HOOK = Path("/etc/libvirt/hooks/qemu.d/forebay")
UNIT = "forebay.service"
LEAST_KERNEL = (5, 6)
"""The first with openat2(2), without which no file of a store is opened."""
LEAST_FILES = 4096
"""Descriptors: each disk and each connection takes some."""
LEAST_MEMORY = GIB // 2
ASK_SECONDS = 10.0
_UNSYNCHRONISED = 5
"""TIME_ERROR of adjtimex(2)."""
_TIMEX = 512
"""Bytes, more than struct timex has."""


def check(daemon: Daemon) -> Iterator[Finding]:
    """All of them."""
    yield from _unit()
    yield _kernel(os.uname().release)
    yield from _limits(daemon)
    yield from _memory(Path("/proc/meminfo"))
    yield from _clock()
    yield from _libvirt()


def asked(words: Sequence[str], seconds: float = ASK_SECONDS) -> str | None:
    """What a program prints on stdout; None where there is none, or it does not end in time."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=seconds,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace")


def _unit() -> Iterator[Finding]:
    """The unit under systemd."""
    if not Path("/run/systemd/system").is_dir():
        yield ok("unit", "no systemd here")
        return
    keys = (
        "LoadState",
        "ActiveState",
        "SubState",
        "UnitFileState",
        "NRestarts",
        "NeedDaemonReload",
    )
    words = ["systemctl", "show", UNIT, *(f"--property={key}" for key in keys)]
    yield of_unit(asked(words) or "")


def of_unit(text: str) -> Finding:
    """What `systemctl show` tells of the unit."""
    told = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    state = f"{told.get('ActiveState', '?')} ({told.get('SubState', '?')})"
    if not told:
        return unknown("unit", "systemctl tells nothing", "see 'systemctl status forebay'")
    if told.get("LoadState") != "loaded":
        return warning(
            "unit", f"{UNIT} is not installed", "make install, or watch the daemon by other means"
        )
    if told.get("ActiveState") == "failed":
        return fault("unit", f"{UNIT} has failed", "see 'journalctl -u forebay', then start it")
    if told.get("NeedDaemonReload") == "yes":
        return warning(
            "unit", f"{UNIT} was changed since systemd read it", "systemctl daemon-reload"
        )
    if told.get("UnitFileState") not in ("enabled", "enabled-runtime", "static", "generated"):
        todo = "systemctl enable forebay"
        return warning("unit", f"{UNIT} is {state}, and not started at boot", todo)
    if told.get("NRestarts", "0") not in ("0", ""):
        text = f"{UNIT} is {state}, after {told['NRestarts']} restarts by itself"
        return warning("unit", text, "see 'journalctl -u forebay' for why")
    return ok("unit", f"{UNIT} is {state}, and started at boot")


def _kernel(release: str) -> Finding:
    found = re.match(r"(\d{1,4})\.(\d{1,4})", release)
    version = tuple(map(int, found.groups())) if found else ()
    if version and version < LEAST_KERNEL:
        return fault("kernel", f"Linux {release}", "use 5.6 or later: openat2 is needed")
    return ok("kernel", f"Linux {release}")


def _limits(daemon: Daemon) -> Iterator[Finding]:
    """How many descriptors the daemon may have."""
    if not daemon.pid:
        return
    try:
        text = Path(f"/proc/{daemon.pid}/limits").read_text()
    except OSError:
        yield unknown("limits", "those of the daemon cannot be read", "run it as root")
        return
    found = re.search(r"^Max open files +(\d+)", text, re.MULTILINE)
    most = int(found[1]) if found else LEAST_FILES
    if most < LEAST_FILES:
        todo = "set LimitNOFILE=65536 in the unit"
        yield warning("limits", f"the daemon may open {most} files", todo)
    else:
        yield ok("limits", f"the daemon may open {most} files")


def _memory(meminfo: Path) -> Iterator[Finding]:
    with suppress(OSError, ValueError):
        found = re.search(r"^MemAvailable: +(\d+) kB", meminfo.read_text(), re.MULTILINE)
        free = int(found[1]) << 10 if found else LEAST_MEMORY
        if free < LEAST_MEMORY:
            text = f"{format_size(free)} of memory are available"
            yield warning("memory", text, "what is warm is read from memory: give the host more")


def _clock() -> Iterator[Finding]:
    """Whether the clock is kept: markers beside images, lag and logs of several hosts are compared by it."""
    timex = ctypes.create_string_buffer(_TIMEX)
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    if state == _UNSYNCHRONISED:
        todo = "start chrony or systemd-timesyncd: times in markers are compared between hosts"
        yield warning("time", "the clock is not synchronised", todo)
    elif state < 0:
        yield unknown("time", "the kernel does not tell", "see 'timedatectl'")
    else:
        yield ok("time", "the clock is synchronised")


def _libvirt() -> Iterator[Finding]:
    version = installed_version()
    if version is None:
        yield ok("libvirt", "not installed")
        return
    if knows_reconnect(version):
        yield ok("libvirt", f"{format_version(version)}, which knows <reconnect>")
    else:
        text, _, todo = reconnect_warning(version).rpartition("; ")
        yield warning("libvirt", text, todo)
    if not os.access(HOOK, os.X_OK):
        todo = "install it (make install) and restart libvirt, or attach disks by hand"
        yield warning("hook", f"no {HOOK} that can be run: domains' disks are not attached", todo)
    else:
        yield ok("hook", str(HOOK))
