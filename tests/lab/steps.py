# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Steps that are made once: each has a directory, and a key of what goes into it.

A step's key follows from its own inputs and from the keys of the steps before, so a step is made again when one of
them changes, and only then.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lab.outcome import Failure

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Step:
    """A directory that `make` fills, and what its content follows from."""

    name: str
    inputs: str
    make: Callable[[Path], None]


class Builder:
    """Steps in the directory `place`, made in order; `told` gets a line for each that was made."""

    def __init__(self, place: Path, told: Callable[[str], None]) -> None:
        self._place = place
        self._told = told
        self._key = hashlib.sha256()

    def directory(self, name: str) -> Path:
        """Where the step of that name lies."""
        return self._place / name

    def run(self, step: Step) -> Path:
        """The step's directory, made anew unless it is there with the same key."""
        self._key.update(f"{step.name}\0{step.inputs}\0".encode())
        key, place = self._key.hexdigest(), self.directory(step.name)
        stamp = place / "key"
        if not stamp.exists() or stamp.read_text() != key:
            began = time.monotonic()
            clear(place)
            place.mkdir(parents=True)
            step.make(place)
            stamp.write_text(key)
            self._told(f"made {step.name} ({time.monotonic() - began:.0f} s)")
        return place


def clear(place: Path) -> None:
    """Remove a directory, and nothing that a debootstrap that was interrupted left mounted in it."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        point = line.split()[4]
        if Path(point).is_relative_to(place):
            run("umount", "--lazy", point)
    shutil.rmtree(place, ignore_errors=True)


def digest(paths: Iterable[Path]) -> str:
    """Of the names and contents of files."""
    total = hashlib.sha256()
    for path in paths:
        total.update(json.dumps([str(path.relative_to(ROOT)), os.access(path, os.X_OK)]).encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def path_of(command: str) -> str | None:
    """Where a command lies, also one of root's."""
    return shutil.which(command, path=f"{os.environ['PATH']}:{SYSTEM_PATH}")


def run(
    *command: str,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
) -> str:
    """What a command prints; Failure with the end of that where it fails."""
    environment = (
        {**os.environ, "PATH": f"{os.environ['PATH']}:{SYSTEM_PATH}"} if env is None else env
    )
    done = subprocess.run(
        command, env=environment, cwd=cwd, text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if log is not None:
        log.write_text(done.stdout)
    if done.returncode != 0:
        raise Failure(f"{' '.join(command)[:120]}: {done.stdout.strip()[-600:]}")
    return done.stdout
