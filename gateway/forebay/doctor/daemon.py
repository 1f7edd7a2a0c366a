# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the running daemon says: who it is, its disks, their lag, its cache."""

import os
import pwd
import socket
import struct
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from forebay import __version__
from forebay.client import Client, NoDaemonError
from forebay.config.model import FIXED, Config
from forebay.doctor.finding import Finding, fault, ok, unknown, warning
from forebay.doctor.probe import User
from forebay.errors import ForebayError
from forebay.units import HEALTHY, LAG_TIMES, format_duration, format_size

Told = dict[str, Any]

USER = "forebay"
"""Whom the unit runs the daemon as."""
LIVE = ("defaults", "origins")
"""Sections that a reload takes, as it does the stores."""
PLACES = ("gateway.state", "gateway.run")
"""May be said to the daemon otherwise than by the files."""
MOST_NAMED = 5
"""Keys that a line names."""
NEARLY_FULL = 0.9
"""Of a budget of memory."""
ANSWERS = (
    "summary",
    "disks",
    "cache",
    "gateway",
    "stores",
    "images",
    "overlays",
    "config",
    "events",
)
"""What the daemon is asked for; all of it goes into a bundle."""


def daemon_user() -> User:
    """Whom the daemon would run as: the user of the unit where there is one, else this one."""
    try:
        found = pwd.getpwnam(USER)
    except KeyError:
        return User(os.geteuid(), os.getegid())
    return User(found.pw_uid, found.pw_gid)


@dataclass
class Daemon:
    """The daemon, as far as it answers."""

    path: str
    error: str = ""
    """Why it does not answer; empty where it does."""
    pid: int | None = None
    user: User = field(default_factory=daemon_user)
    """Whom it runs as, or would."""
    told: dict[str, Any] = field(default_factory=dict)
    """By the words of ANSWERS: what it told."""

    @property
    def answers(self) -> bool:
        """True if it answered."""
        return not self.error


def ask(path: str) -> Daemon:
    """All that the daemon at that control socket tells. Raises nothing: what keeps it from telling is noted."""
    found = Daemon(path)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(5)
            probe.connect(path)
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        found.pid, uid, gid = struct.unpack("3i", credentials)
        found.user = User(uid, gid)
    except OSError:
        pass  # the client says it better
    client = Client(path)
    for what in ANSWERS:
        try:
            found.told[what] = client.get(f"/{what}")
        except NoDaemonError as error:
            found.error = str(error)
            return found
        except ForebayError as error:
            found.told[what] = {"error": str(error)}
    return found


# -------------------------------------------------------------------------------------------------------------- checks


def check(daemon: Daemon) -> Iterator[Finding]:
    """The daemon itself, its disks, their lag, its memory, its cache."""
    if not daemon.answers:
        yield fault("daemon", *_split(daemon.error))
        return
    yield from _itself(daemon)
    disks = daemon.told["disks"] if isinstance(daemon.told["disks"], list) else []
    yield from _disks(disks)
    yield from _lag(disks)
    yield from _cache(daemon.told["cache"])


def check_config(config: Config, daemon: Daemon) -> Iterator[Finding]:
    """Whether the daemon has what the files say."""
    told = daemon.told.get("config", {}).get("toml")
    if told is None:
        return  # it does not answer, or is of a version that does not tell
    running = Config.model_validate(tomllib.loads(told))
    for sections, todo in ((LIVE, "reload"), (FIXED, "restart")):
        other = [key for key in running.changed(config, sections) if key not in PLACES]
        if sections is LIVE:
            names = sorted({*config.stores, *running.stores})
            other += [f"stores.{x}" for x in names if config.stores.get(x) != running.stores.get(x)]
        if other:
            text = f"the daemon has something else than the files say: {_in_short(other)}"
            yield warning("config", text, f"systemctl {todo} forebay")


def _in_short(names: list[str]) -> str:
    others = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + others


def _itself(daemon: Daemon) -> Iterator[Finding]:
    info = daemon.told["gateway"]
    version = info.get("forebay")
    if version is None:
        yield unknown("daemon", str(info.get("error")), "see its log")
        return
    if version != __version__:
        text = f"version {version}, and this command is {__version__}"
        yield warning("daemon", text, "restart it: systemctl restart forebay")
    else:
        yield ok("daemon", f"version {version}, process {daemon.pid}, as {daemon.user.name}")
    if info.get("core") is False:
        text = "the compiled core does not serve: about half the speed"
        yield warning("core", text, "see gateway.core, and its log for why it is missing")
    for key, limit in info.items():
        used = info.get(key.replace("_limit_bytes", "_bytes"), 0)
        if key.endswith("_limit_bytes") and limit and used > NEARLY_FULL * limit:
            text = (
                f"{key.removesuffix('_limit_bytes')}: {format_size(used)} of {format_size(limit)}"
            )
            yield warning("memory", text, "clients wait for it: see Memory in gateway/README.md")


def _disks(disks: list[Told]) -> Iterator[Finding]:
    bad = [disk for disk in disks if disk["state"] not in HEALTHY]
    for disk in bad:
        state, why = disk["state"], disk.get("reason") or "no reason is told"
        text, todo = _split(f"{disk['name']} is {state}: {why}")
        make = warning if state in ("lagging", "incomplete", "degraded") else fault
        yield make("disks", text, todo)
    if not bad:
        plural = "disk" if len(disks) == 1 else "disks"
        yield ok("disks", f"{len(disks)} {plural}, all fine")


def _lag(disks: list[Told]) -> Iterator[Finding]:
    oldest = max((disk["lag_seconds"] for disk in disks), default=0.0)
    behind = False
    for disk in disks:
        most, lag = disk.get("max_lag_seconds"), disk["lag_seconds"]
        if most and disk["mode"] == "write-back" and lag > LAG_TIMES * most:
            behind = True
            text = f"{disk['name']} is {format_duration(lag)} behind, with max_lag {format_duration(most)}"
            yield warning("lag", text, "see whether its store is slow, or away")
    if not behind:
        dirty = sum(disk["dirty_bytes"] for disk in disks)
        yield ok("lag", f"{format_duration(oldest)}, {format_size(dirty)} dirty")


def _cache(cache: Told) -> Iterator[Finding]:
    if "state" not in cache:
        yield unknown("cache", str(cache.get("error")), "see the daemon's log")
        return
    used, size = format_size(cache["used_bytes"]), format_size(cache["size"])
    if cache["state"] not in ("ok", "recovering"):
        text = f"{cache['device']}: {cache['state']}: {cache['error']}"
        yield fault("cache", text, "put the device right, then 'forebay cache repair'")
    elif cache.get("damaged_slots"):
        text = (
            f"{cache['damaged_slots']} blocks of {cache['device']} were damaged, and are not used"
        )
        yield warning("cache", text, "replace the device, or see what 'forebay cache scrub' says")
    else:
        slow = ", slow: reads go through threads" if cache.get("slow") else ""
        yield ok("cache", f"{cache['device']}: {used} of {size}{slow}")
    if cache["size"] and cache["private_bytes"] > NEARLY_FULL * cache["size"]:
        text = f"{format_size(cache['private_bytes'])} of {size} belong to single disks"
        yield warning("cache", text, "writes go past it soon: flush, save or detach, or extend it")


def _split(text: str) -> tuple[str, str]:
    """What is wrong, and what to do, of a line that says both."""
    what, colon, todo = text.rpartition(": ")
    return (what, todo) if colon else (text, "see the daemon's log")
