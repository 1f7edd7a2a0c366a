# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What every script does: say what happens as OpenNebula's drivers do, read driver.conf, run a command on a host."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, NamedTuple, NoReturn

from forebay_one.vm import Failed

HERE = Path(__file__).resolve().parent.parent
"""Where this driver lies: remotes/tm/forebay."""

REMOTES = HERE.parent.parent

HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,254}")
"""What may stand for a host. None is taken for an option of ssh."""

LONGEST_LINE = 1000
"""Characters of what is told."""

HOOK = re.compile(r"error: Hook script execution failed: .* unexpected exit status [0-9]+: ?(?=\S)")
"""What libvirt puts before the line of a hook that refuses a start."""


def called(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a script on its arguments; what it raises is one line for the VM's log."""
    try:
        code = main(sys.argv[1:])
    except (Failed, OSError) as fault:
        error(str(fault))
        code = 1
    sys.exit(code)


def script_name() -> str:
    """The name under which this was called: `clone.ssh` is a link to `clone`."""
    return os.path.basename(sys.argv[0])


def _say(level: str, text: str) -> None:
    print(f"{level}: {script_name()}: {in_line(text)}", file=sys.stderr, flush=True)


def info(text: str) -> None:
    """A line of the VM's log."""
    _say("INFO", text)


def warning(text: str) -> None:
    """The same, for what is not as it should be. OpenNebula has no level of its own for that."""
    _say("INFO", f"WARNING: {text}")


def error(text: str) -> None:
    """Why the action has failed: OpenNebula shows it to the user."""
    _say("ERROR", text)


def in_line(text: str) -> str:
    """The text in one line, without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else " " for c in text).strip()[:LONGEST_LINE]


class Settings(NamedTuple):
    """driver.conf."""

    fallback: bool = True
    run: str = "/run/forebay"


def settings() -> Settings:
    """What driver.conf says; without the file, the defaults. Raises Failed for what it must not say."""
    try:
        lines = (HERE / "driver.conf").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return Settings()
    found = dict(line.partition("=")[::2] for line in lines if "=" in line.partition("#")[0])
    given = {key.strip(): value.partition("#")[0].strip() for key, value in found.items()}
    fallback, run = given.get("fallback", "yes"), given.get("run", Settings.run)
    if fallback not in ("yes", "no"):
        raise Failed(f"driver.conf: fallback is {fallback!r}: write yes or no")
    if not run.startswith("/") or not run.isprintable():
        raise Failed(f"driver.conf: run is {run!r}: write the path of a directory")
    return Settings(fallback == "yes", run.rstrip("/"))


def location(text: str) -> tuple[str, str]:
    """Host and path of HOST:PATH. Raises Failed."""
    host, colon, path = text.partition(":")
    if not colon:
        raise Failed(f"{text!r} is not HOST:PATH")
    return checked_host(host), path


def checked_host(host: str) -> str:
    """The host, unchanged. Raises Failed for what ssh could take for something else."""
    if HOST.fullmatch(host) is None:
        raise Failed(f"{host!r} is not the name of a host")
    return host


def words(*given: object) -> str:
    """A command line for a shell, in which every word stays what it is."""
    return " ".join(shlex.quote(str(word)) for word in given)


class Outcome(NamedTuple):
    """What came of a script on a host."""

    code: int
    output: str
    errors: str
    why: str
    """The last line on stderr that says more than that something failed, as `qemu-img` adds."""


def run_on(host: str, script: str) -> Outcome:
    """Run a script by bash on the host. Raises OSError where there is no ssh."""
    command = [*shlex.split(os.environ.get("SSH", "ssh")), checked_host(host), "bash", "-s"]
    done = subprocess.run(
        command, input=script.encode(errors="surrogateescape"), capture_output=True, check=False
    )
    output, errors = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    lines = errors.splitlines()
    told = [line for line in lines if ": " in line] or [line for line in lines if line.strip()]
    why = in_line(HOOK.sub("", told[-1])) if told else f"exit code {done.returncode}"
    return Outcome(done.returncode, output, errors, why)


def pass_on(outcome: Outcome) -> int:
    """What one of OpenNebula's own scripts has printed, as it would have printed it here; its exit code."""
    sys.stdout.write(outcome.output)
    sys.stderr.write(outcome.errors)
    sys.stdout.flush()
    sys.stderr.flush()
    return outcome.code if outcome.code >= 0 else 1


def asked(command: Sequence[str]) -> bytes:
    """What one of OpenNebula's commands prints. Raises Failed with its last line."""
    try:
        done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as fault:
        raise Failed(f"{command[0]}: {fault.strerror}") from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        why = lines[-1] if lines else f"exit code {done.returncode}"
        raise Failed(f"{' '.join(command[:3])}: {why}")
    return done.stdout
