# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The tar for a bug report: what the doctor found, what the daemon tells, its log, its settings. No data of guests."""

import importlib.metadata
import io
import json
import os
import platform
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from forebay import __version__
from forebay.config.model import Config
from forebay.config.parts import content_of
from forebay.doctor.daemon import Daemon
from forebay.doctor.finding import Finding
from forebay.doctor.host import UNIT, asked
from forebay.doctor.secrets import without_secrets
from forebay.errors import ConfigError, ForebayError, advice

LONGEST = 8 << 20
"""Bytes of one file: the last ones of a log, the first ones of anything else."""
EDGE = 64 << 10
"""Characters: what is looked through for secrets is longer by so many than what is kept, since a secret that a cut
goes through is not known for one. None is as long."""
LOG_LINES = 10_000
PACKAGES = ("trio", "lmdb", "pydantic", "h11", "pyfuse3", "rich")
PROGRAMS = (
    ("qemu-system-x86_64", "--version"),
    ("qemu-storage-daemon", "--version"),
    ("nbdkit", "--version"),
    ("systemctl", "--version"),
)


def write(path: Path, config: Config | None, daemon: Daemon, found: list[Finding]) -> list[str]:
    """Write the tar, packed by gzip, readable for this user alone. The names of its files.

    Raises ForebayError where there is a file of that name, or it cannot be written: then nothing is left.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise ForebayError(f"{path} is there already: choose another name") from None
    except OSError as error:
        raise _unwritten(path, error) from None
    names = []
    try:
        with os.fdopen(fd, "wb") as file:
            with tarfile.open(fileobj=file, mode="w:gz") as tar:
                for name, text in members(config, daemon, found):
                    _add(tar, name, kept(name, text))
                    names.append(name)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            path.unlink()
        if isinstance(error, OSError):
            raise _unwritten(path, error) from None
        raise
    return names


def _unwritten(path: Path, error: OSError) -> ForebayError:
    text = f"{path} cannot be written: {error.strerror or error}"
    return ForebayError(f"{text}: {advice(error, 'choose another place')}")


def kept(name: str, text: str) -> str:
    """What is kept of a text under that name, without secrets. However long it is, no more than that is looked at."""
    most = LONGEST + EDGE
    if len(text) <= most:
        return without_secrets(text)
    if name.endswith(".log"):
        return without_secrets(text[-most:])[EDGE:]
    return without_secrets(text[:most])[:-EDGE]


def _add(tar: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode(errors="replace")
    data = data[-LONGEST:] if name.endswith(".log") else data[:LONGEST]
    info = tarfile.TarInfo(f"forebay-report/{name}")
    info.size, info.mtime, info.mode = len(data), int(time.time()), 0o600
    tar.addfile(info, io.BytesIO(data))


def members(
    config: Config | None, daemon: Daemon, found: list[Finding]
) -> Iterator[tuple[str, str]]:
    """Name and content of each file; secrets are still in it."""
    yield "doctor.txt", "".join(f"{one.line()}\n" for one in found)
    yield "doctor.json", json.dumps([one.json() for one in found], indent=2)
    yield "versions.txt", _versions()
    if config is not None:
        yield "settings.toml", config.to_toml()
        for n, path in enumerate(config.files):
            with suppress(OSError, ConfigError):
                yield (
                    f"{path.parent.name}/{path.name}" if n else "forebay.toml",
                    content_of(str(path)).decode(errors="replace"),
                )
    for what, told in daemon.told.items():
        yield f"daemon/{what}.json", json.dumps(told, indent=2)
    for name, file in (("mounts.txt", "mountinfo"), ("limits.txt", "limits")):
        with suppress(OSError):
            pid = "self" if name == "mounts.txt" or not daemon.pid else daemon.pid
            yield name, Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    yield "unit.txt", asked(["systemctl", "cat", "--no-pager", UNIT]) or ""
    words = ["journalctl", "--no-pager", "--output=short-iso", "-u", UNIT, "-n", str(LOG_LINES)]
    yield "journal.log", asked(words) or ""


def _versions() -> str:
    """What runs here."""
    lines = [
        f"forebay {__version__}",
        f"python {sys.version.split()[0]}",
        f"linux {platform.release()} {platform.machine()}",
    ]
    with suppress(OSError):
        text = Path("/etc/os-release").read_text(errors="replace")
        lines += [line for line in text.splitlines() if line.startswith("PRETTY_NAME=")]
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{package} {importlib.metadata.version(package)}")
    for program in PROGRAMS:
        told = asked(program)
        if told:
            lines.append(told.splitlines()[0])
    return "\n".join(lines) + "\n"
