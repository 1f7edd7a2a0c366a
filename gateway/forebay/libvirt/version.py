# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which libvirt this host has, and what it understands."""

import os
import re
import shutil
import subprocess

Version = tuple[int, int, int]
"""Major, minor, patch."""

RECONNECT_SINCE: Version = (9, 2, 0)
"""The first version that knows `<reconnect>` in an NBD source (libvirt's NEWS.rst)."""

PROGRAMS = ("virtqemud", "libvirtd", "virsh")
"""Asked in this order: the daemons run the guests; virsh may come from another package."""

SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where daemons lie; an ordinary user's PATH lacks it."""

ASK_TIMEOUT = 5.0
"""Seconds. A program needs 20 ms to print its version."""


def parse_version(text: str) -> Version:
    """A version as people write it: `9.2`, `10.0.0`. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", text.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a version of libvirt: write 9.2 or 10.0.0")
    major, minor, patch = match.groups(default="0")
    return int(major), int(minor), int(patch)


def format_version(version: Version) -> str:
    """`9.0.0`, as libvirt prints it."""
    return ".".join(map(str, version))


def installed_version() -> Version | None:
    """The version of the libvirt on this host, or None where there is none.

    It is read from the program, not asked of the running daemon: that would wait for its probe of
    the emulators, up to a minute after it started, and from inside one of libvirt's hooks for ever.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}"
    for program in PROGRAMS:
        if found := shutil.which(program, path=path):
            version = _printed_version(found)
            if version is not None:
                return version
    return None


def _printed_version(program: str) -> Version | None:
    """The version in what `PROGRAM --version` prints, `libvirtd (libvirt) 9.0.0` or `9.0.0`; None if none."""
    try:
        told = subprocess.run(
            [program, "--version"],
            capture_output=True,
            check=False,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=ASK_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = told.stdout.split()
    try:
        return parse_version(words[-1]) if words else None
    except ValueError:
        return None


def knows_reconnect(version: Version | None) -> bool:
    """True if a libvirt of that version passes `<reconnect>` on to QEMU. An unknown one is taken to be new enough."""
    return version is None or version >= RECONNECT_SINCE


def reconnect_warning(version: Version) -> str:
    """What an operator whose libvirt drops `<reconnect>` has to know, in one line."""
    return (
        f"libvirt {format_version(version)} drops <reconnect> (known from 9.2 on): if the daemon "
        "crashes, the guest gets I/O errors until it is back; config/libvirt/README.md says what helps"
    )
