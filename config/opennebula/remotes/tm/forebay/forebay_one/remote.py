# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What every script does: say what happens as OpenNebula's drivers do, read driver.conf, run a command on a host."""

from __future__ import annotations

import os
import sys

from forebay_one.vm import Failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Callable, NoReturn

HERE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
"""Where this driver lies: remotes/tm/forebay."""

REMOTES = os.path.dirname(os.path.dirname(HERE))

ALPHANUMERIC = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

LONGEST_HOST = 255
"""Characters."""

LONGEST_LINE = 1000
"""Characters of what is told."""

HOOK = r"error: Hook script execution failed: .* unexpected exit status [0-9]+: ?(?=\S)"
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


class Settings:
    """driver.conf."""

    def __init__(self, fallback: bool = True, run: str = "/run/forebay") -> None:
        self.fallback = fallback
        self.run = run


def settings() -> Settings:
    """What driver.conf says; without the file, the defaults. Raises Failed for what it must not say."""
    try:
        with open(f"{HERE}/driver.conf", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return Settings()
    found = dict(line.partition("=")[::2] for line in lines if "=" in line.partition("#")[0])
    given = {key.strip(): value.partition("#")[0].strip() for key, value in found.items()}
    fallback, run = given.get("fallback", "yes"), given.get("run", Settings().run)
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
    """The host, unchanged. Raises Failed for what ssh could take for something else, an option above all."""
    is_plain = not host.strip(ALPHANUMERIC + "_.@-") and host[:1] not in (".", "@", "-")
    if not is_plain or not 0 < len(host) <= LONGEST_HOST:
        raise Failed(f"{host!r} is not the name of a host")
    return host


def words(*given: object) -> str:
    """A command line for a shell, in which every word stays what it is."""
    return " ".join(_quoted(str(word)) for word in given)


def _quoted(word: str) -> str:
    """As a shell takes it for one word; shlex does the same, and takes 5 ms to import."""
    if word and not word.strip(ALPHANUMERIC + "@%+=:,./-_"):
        return word
    return "'" + word.replace("'", "'\"'\"'") + "'"


def in_uri(text: str, also: str = "") -> str:
    """The text with all that means something in a URI as percent and number, but for the characters `also`."""
    plain = ALPHANUMERIC + "_.-~" + also
    return "".join(
        c if c in plain else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text
    )


class Outcome:
    """What came of a script on a host."""

    def __init__(self, code: int, output: str, errors: str, why: str) -> None:
        """`why` is the last line on stderr that says more than that something failed, as `qemu-img` adds."""
        self.code = code
        self.output = output
        self.errors = errors
        self.why = why


IGNORED_BY_PYTHON = (13, 25)
"""SIGPIPE and SIGXFSZ: no program that is started expects that."""


def run(command: Sequence[str], given: bytes = b"") -> tuple[int, bytes, bytes]:
    """Run a command with this on stdin; its exit code, and what it prints. Raises OSError where it cannot be started.

    What goes in and out lies in memory: subprocess would take as long to import as Python to start.
    """
    files = [os.fdopen(os.memfd_create(name), "w+b") for name in ("stdin", "stdout", "stderr")]
    try:
        files[0].write(given)
        files[0].seek(0)
        leads = [(os.POSIX_SPAWN_DUP2, file.fileno(), n) for n, file in enumerate(files)]
        pid = os.posix_spawnp(
            command[0], list(command), os.environ, file_actions=leads, setsigdef=IGNORED_BY_PYTHON
        )
        _, status = os.waitpid(pid, 0)
        for file in files[1:]:
            file.seek(0)
        return os.waitstatus_to_exitcode(status), files[1].read(), files[2].read()
    finally:
        for file in files:
            file.close()


def _ssh() -> list[str]:
    """How ssh is called."""
    named = os.environ.get("SSH", "ssh")
    if not named.strip(ALPHANUMERIC + "-_./ "):
        return named.split()
    import shlex  # noqa: PLC0415  (not where it is a plain name)

    return shlex.split(named)


def _without_hook(line: str) -> str:
    """Without what libvirt puts before the line of a hook that refuses a start."""
    import re  # noqa: PLC0415  (only where something failed)

    return re.sub(HOOK, "", line)


def run_on(host: str, script: str) -> Outcome:
    """Run a script by bash on the host. Raises OSError where there is no ssh."""
    command = [*_ssh(), checked_host(host), "bash", "-s"]
    code, *printed = run(command, script.encode(errors="surrogateescape"))
    output, errors = (text.decode(errors="replace") for text in printed)
    lines = errors.splitlines()
    told = [line for line in lines if ": " in line] or [line for line in lines if line.strip()]
    why = in_line(_without_hook(told[-1])) if told else f"exit code {code}"
    return Outcome(code, output, errors, why)


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
        code, output, errors = run(command)
    except OSError as fault:
        raise Failed(f"{command[0]}: {fault.strerror}") from None
    if code != 0:
        lines = (errors or output).decode(errors="replace").strip().splitlines()
        why = lines[-1] if lines else f"exit code {code}"
        raise Failed(f"{' '.join(command[:3])}: {why}")
    return output
