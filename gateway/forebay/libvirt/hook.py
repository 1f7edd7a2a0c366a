# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What libvirt's hook for QEMU does (libvirt's hooks.rst): attach a domain's disks before it starts, detach them after.

Nothing here asks libvirt: it waits for the hook, and would wait for ever. Nothing is printed on stdout: for `migrate`
and `restore` libvirt takes that for the domain's new XML.
"""

import contextlib
import os
import signal
import sys
import syslog
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from types import FrameType
from typing import Any

from forebay.client import Client
from forebay.config.client import DEFAULT_CONFIG, config_path, run_directory
from forebay.config.keys import RATES
from forebay.errors import ForebayError
from forebay.libvirt.behind import detach_all
from forebay.libvirt.domain import Domain, WantedDisk, read_domain
from forebay.libvirt.free import attach_when_free
from forebay.libvirt.hold import Hold
from forebay.libvirt.together import attach_together

PREPARE_SECONDS = 30.0
"""How long a domain's start waits for its disks. libvirt answers nothing about the domain meanwhile."""

RELEASE_SECONDS = 5.0
"""How long a domain's end waits until its disks have drained. What takes longer goes on behind its back."""

MIGRATE_SECONDS = 120.0
"""How long a domain that is about to come waits for all its disks: the host that it comes from writes back what is
dirty. The domain runs there meanwhile."""

ANSWER_SECONDS = 10.0
"""How long the daemon may take to say that a disk has not come."""

DOMAIN_LOGS = "/var/log/libvirt/qemu"
SHUTTING_DOWN = ": shutting down, reason="
"""What libvirt writes into a domain's log before it calls the hook (qemuProcessStop)."""

LOG_TAIL = 4096
"""Bytes at the end of a domain's log that are looked at."""

LOG_AGE = 60.0
"""Seconds. An older line is about another shutdown."""

KEPT_REASONS = ("saved", None)
"""Why a domain ended, where its overlays have to stay: it comes back, or it is not known that it does not."""


NOT_SERVED = ("failed", "stopped")
"""States of a disk that no guest can use. Its `reason` says what to do."""


class Daemon:
    """A daemon as the hook needs it: the one that the configuration points at, or another instance."""

    def __init__(self, config: str | None, instance: str | None = None) -> None:
        """`config` as in `run`; the instance's file lies beside it. Raises ForebayError."""
        if instance is not None:
            config = os.path.join(
                os.path.dirname(config_path(config) or DEFAULT_CONFIG), f"{instance}.toml"
            )
        self._config = config
        self._run = run_directory(config)
        self.client = Client(os.path.join(self._run, "control.sock"))

    def disk(self, name: str) -> dict[str, Any] | None:
        """The status of the disk of that name; None where there is none. Raises ForebayError."""
        disks: list[dict[str, Any]] = self.client.get("/disks")
        return next((disk for disk in disks if disk["name"] == name), None)

    def hold(self, name: str) -> Hold:
        """The hold on the disk of that name."""
        return Hold(self._run, name)

    def settle(self, name: str) -> None:
        """Wait until nothing else changes the disk. Raises ForebayError where it is gone."""
        self.client.follow("POST", f"/disks/{name}/settings", {"settings": {}}, _silent)

    def set_mode(self, name: str, mode: str) -> None:
        """Change the disk's mode. Raises ForebayError."""
        self.client.follow("POST", f"/disks/{name}/mode", {"mode": mode}, _silent)

    def key(self, image: str) -> str:
        """The name under which the daemon shows this image. Raises ForebayError."""
        from forebay.config.model import Config  # noqa: PLC0415  (100 ms, and most write the key itself)
        from forebay.origin.addresses import resolve  # noqa: PLC0415

        return resolve(Config.load(self._config), image).key


Held = tuple[Daemon, Hold]
"""A disk that was attached for a domain: the daemon that serves it, and the hold."""


def run(domain: str, operation: str, sub_operation: str, extra: str, config: str | None) -> int:
    """One call of the hook, the domain's XML on stdin; `config` as `--config` named it. The exit code.

    Raises ForebayError where libvirt is to be told that the domain cannot start here.
    """
    match operation, sub_operation:
        case "prepare", "begin":
            _start(domain, config)
        case "start", "begin":
            _bind(domain, config)
        case "release", "end":
            _end(domain, extra, config)
        case "migrate", "begin":
            _migrate(read_domain(sys.stdin.read()), config)
        case "restore", "begin":
            _restore(read_domain(sys.stdin.read()), config)
    return 0


# -------------------------------------------------------------------------------------------------------------- start


def _start(name: str, config: str | None) -> None:
    """Attach what the domain's metadata names, all of it or nothing. Raises ForebayError."""
    try:
        with _at_most(PREPARE_SECONDS):
            _attach_all(read_domain(sys.stdin.read()), config)
    except (ForebayError, OSError) as fault:
        raise ForebayError(f"domain '{name}' cannot start: {fault}") from None


def _attach_all(domain: Domain, config: str | None, *, comes_by: float | None = None) -> None:
    """Attach all disks of a domain. If one cannot be, those that were attached here are detached again.

    `comes_by`: the domain runs on another host, which hands over what it writes there, until then at the latest
    (`time.monotonic`).
    """
    done: list[Held] = []

    def attach(disk: WantedDisk) -> None:
        daemon = Daemon(config, disk.instance)
        if _attach(daemon, domain, disk, comes_by=comes_by):
            done.append((daemon, daemon.hold(disk.name)))

    try:
        if comes_by is not None:
            attach_together(domain.disks, attach)
        else:
            for disk in domain.disks:
                attach(disk)
    except BaseException:
        if done:
            _wait(_detach_behind(done))
        raise


def _attach(daemon: Daemon, domain: Domain, disk: WantedDisk, *, comes_by: float | None) -> bool:
    """See to it that the disk is attached, for this domain. True if it was not attached before. Raises ForebayError."""
    hold = daemon.hold(disk.name)
    try:
        found = daemon.disk(disk.name)
        if found is not None:
            _check_free(hold, domain)
            if hold.call_off():
                found = _settled(daemon, found)
        if found is not None and found["overlay"] and hold.domain() and not hold.is_kept():
            # left by a run whose end was not heard of, or whose detach failed
            daemon.client.follow("DELETE", f"/disks/{disk.name}", None, _silent)
            found = None
        if found is None:
            attach_when_free(daemon.client, _arguments(disk) | _coming(disk, comes_by))
        else:
            _check_same(daemon, disk, found)
            if disk.mode is not None and disk.mode != found["mode"]:
                daemon.set_mode(disk.name, disk.mode)
        hold.take(domain.uuid, domain.name)
        return found is None
    except ForebayError as fault:
        raise ForebayError(f"disk '{disk.name}': {fault}") from None


def _coming(disk: WantedDisk, by: float | None) -> dict[str, Any]:
    """What is told about a disk that the host has which the domain comes from: it has what is left of the time."""
    if by is None or disk.read_only:
        return {}
    patience = round(max(1.0, by - time.monotonic()), 1)
    return {"incoming": True, "patience": patience} | (
        {"with_data": True} if disk.with_data else {}
    )


def _bind(name: str, config: str | None) -> None:
    """Have each disk of the domain be for its processes alone. QEMU is about to run: what is connected is another's.

    Now libvirt knows label and user of the domain, which it did not when the disks were attached. Raises ForebayError.
    """
    try:
        with _at_most(PREPARE_SECONDS):
            domain = read_domain(sys.stdin.read())
            for disk in domain.disks:
                content = {
                    "peer": disk.peer,
                    "peer_label": domain.label,
                    "peer_user": domain.user,
                    "evict": True,
                }
                Daemon(config, disk.instance).client.post(f"/disks/{disk.name}/peer", content)
    except (ForebayError, OSError) as fault:
        raise ForebayError(f"domain '{name}' cannot start: {fault}") from None


def _check_free(hold: Hold, domain: Domain) -> None:
    """Raises ForebayError where the disk is attached for another domain."""
    holder = hold.domain()
    if holder is not None and holder[0] != domain.uuid:
        raise ForebayError(
            f"it is attached for domain '{holder[1]}': stop that, "
            f"or where it is gone, 'forebay detach {hold.path.name}'"
        )


def _arguments(disk: WantedDisk) -> dict[str, Any]:
    """What the control API is told about the disk. It serves one instance, and knows of no others."""
    given = asdict(disk)
    del given["instance"], given["with_data"]
    return {key: value for key, value in given.items() if value is not None or key not in RATES}


def _settled(daemon: Daemon, found: dict[str, Any]) -> dict[str, Any] | None:
    """The disk's status once a detach that was called off has ended, one way or the other."""
    with contextlib.suppress(ForebayError):  # it may be gone
        daemon.settle(found["name"])
    return daemon.disk(found["name"])


def _check_same(daemon: Daemon, disk: WantedDisk, found: dict[str, Any]) -> None:
    """Raises ForebayError where the disk that is attached already is not the one wanted, or does not work."""
    if found["state"] in NOT_SERVED:
        raise ForebayError(f"it is not served: {found['reason']}")
    for key in ("read_only", "overlay"):
        if found[key] != getattr(disk, key):
            kind = key.replace("_", "-")
            raise ForebayError(
                f"it is attached {'' if found[key] else 'not '}as {kind}: 'forebay detach {disk.name}'"
            )
    shown = found["image"].removesuffix(f"?format={found.get('format')}")
    if disk.image not in (shown, found["image"]) and shown != daemon.key(disk.image):
        raise ForebayError(
            f"it is attached to {found['image']}, not to {disk.image}: 'forebay detach {disk.name}'"
        )


def _migrate(domain: Domain, config: str | None) -> None:
    """On the host that a domain is about to migrate to: have its disks come along, all of them or none.

    Raises ForebayError where one cannot; the domain goes on where it is.
    """
    try:
        with _at_most(MIGRATE_SECONDS + ANSWER_SECONDS):
            _attach_all(domain, config, comes_by=time.monotonic() + MIGRATE_SECONDS)
    except (ForebayError, OSError) as fault:
        raise ForebayError(f"domain '{domain.name}' cannot come here: {fault}") from None


def _restore(domain: Domain, config: str | None) -> None:
    """Before a saved domain is restored: raises ForebayError where what it wrote to an overlay is gone."""
    for disk in domain.disks:
        if disk.overlay and Daemon(config, disk.instance).disk(disk.name) is None:
            raise ForebayError(
                f"domain '{domain.name}' cannot be restored: what it wrote to overlay '{disk.name}' "
                "is gone; start it afresh with 'virsh start --force-boot'"
            )
        if disk.overlay:
            Daemon(config, disk.instance).hold(disk.name).keep()


# ---------------------------------------------------------------------------------------------------------------- end


def _end(name: str, extra: str, config: str | None) -> None:
    """Detach the domain's disks. Raises nothing: the domain has ended, and only the log can be told."""
    try:
        if held := _to_release(read_domain(sys.stdin.read()), extra, config):
            _wait(_detach_behind(held))
    except Exception as fault:  # noqa: BLE001
        _log(f"domain '{name}': {fault}")


def _to_release(domain: Domain, extra: str, config: str | None) -> list[Held]:
    """The disks that were attached for this domain, but for overlays that it will need again."""
    keep_overlays = False
    if any(disk.overlay for disk in domain.disks):
        reason = extra if extra not in ("", "-") else logged_reason(domain.name, DOMAIN_LOGS)
        keep_overlays = reason in KEPT_REASONS
    held = []
    for disk in domain.disks:
        try:
            daemon = Daemon(config, disk.instance)
            hold = daemon.hold(disk.name)
            holder = hold.domain()
        except (ForebayError, OSError) as fault:
            _log(f"disk '{disk.name}' stays attached: {fault}")
            continue
        if holder is None or holder[0] != domain.uuid:
            continue
        if disk.overlay and keep_overlays:
            hold.keep()
        else:
            held.append((daemon, hold))
    return held


def logged_reason(name: str, logs: str) -> str | None:
    """Why the domain ended, from its log in the directory `logs`; None where that does not say.

    libvirt before 10.5 does not tell hooks.
    """
    from datetime import UTC, datetime  # noqa: PLC0415

    try:
        with open(os.path.join(logs, f"{name}.log"), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL))
            lines = file.read().decode(errors="replace").splitlines()
        at, _, reason = next(line for line in reversed(lines) if SHUTTING_DOWN in line).partition(
            SHUTTING_DOWN
        )
        when = datetime.strptime(at, "%Y-%m-%d %H:%M:%S.%f%z")
    except (OSError, ValueError, StopIteration):
        return None
    return reason.strip() if (datetime.now(UTC) - when).total_seconds() < LOG_AGE else None


def _detach_behind(held: Sequence[Held]) -> int:
    """Start a process that drains and detaches these disks; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):  # libvirt waits until its pipes are closed
            os.dup2(nothing, descriptor)
        detach_all(
            [(partial(_detach, daemon, hold.path.name), hold) for daemon, hold in held], _log
        )
    finally:
        os._exit(0)


def _detach(daemon: Daemon, name: str) -> None:
    """Drain and detach the disk, if it is there. Raises ForebayError."""
    if daemon.disk(name) is not None:
        daemon.client.follow("DELETE", f"/disks/{name}", None, _silent)


def _wait(child: int) -> None:
    """Return when the process ends, or after RELEASE_SECONDS."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return
        time.sleep(0.01)


# -------------------------------------------------------------------------------------------------------------- common


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise ForebayError in the body after so many seconds."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise ForebayError(
            f"no answer for {seconds:g} s: see 'forebay status' and the daemon's log"
        )

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _silent(_done: int, _total: int) -> None:
    """Progress that nobody looks at."""


def _log(text: str) -> None:
    """Write a warning to the journal: libvirt keeps what a hook prints only when it fails."""
    syslog.openlog("forebay", 0, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_WARNING, text)
