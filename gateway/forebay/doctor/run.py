# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay doctor`: all checks, one after the other. Each takes a bounded time, and none stops the others."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from forebay.config.client import DEFAULT_RUN
from forebay.config.model import Config
from forebay.doctor import daemon, host, places
from forebay.doctor.daemon import Daemon, ask
from forebay.doctor.finding import CODES, Finding, Level, fault, ok, unknown, worst
from forebay.errors import ConfigError
from forebay.units import printable

FORMAT = 1
"""Of the JSON. Keys are only ever added to one."""
COLOURS = {Level.OK: "", Level.UNKNOWN: "33", Level.WARNING: "33", Level.FAULT: "31"}

Check = Callable[[], Iterator[Finding]]


def run(arguments: argparse.Namespace, *, colour: bool) -> int:
    """Print what was found, and write the bundle where one is wanted. 0, 1 or 2: CODES of the worst."""
    config, of_config = read(arguments.config)
    found_daemon = ask(os.path.join(config.gateway.run if config else DEFAULT_RUN, "control.sock"))
    found = []
    for finding in [*of_config, *checked(config, found_daemon)]:
        found.append(finding)
        if not arguments.json:
            print(_coloured(finding, colour), flush=True)
    if arguments.json:
        print(json.dumps(told(found), indent=2))
    if arguments.bundle is not None:
        from forebay.doctor.bundle import write  # noqa: PLC0415  (only where it is wanted)

        names = write(Path(arguments.bundle), config, found_daemon, found)
        text = f"{arguments.bundle}: {len(names)} files, without passwords, keys and tokens as far as they can be told"
        print(f"{printable(text)}: read them before you send them", file=sys.stderr)
    return CODES[worst(found)]


def told(found: list[Finding]) -> dict[str, object]:
    """What `--json` prints."""
    findings = [one.json() for one in found]
    return {"format": FORMAT, "level": worst(found).value, "findings": findings}


def read(path: str | None) -> tuple[Config | None, list[Finding]]:
    """The configuration, and what is wrong with it."""
    try:
        config = Config.load(path)
    except ConfigError as error:
        todo = "correct it: a restart would be refused"
        return None, [fault("config", text, todo) for text in error.faults]
    return config, [ok("config", ", ".join(map(str, config.files)) or "built-in defaults")]


def checked(config: Config | None, found: Daemon) -> Iterator[Finding]:
    """What all checks find. One that fails is told, and the others go on."""
    checks: list[Check] = [lambda: daemon.check(found)]
    if config is not None:
        checks.append(lambda: daemon.check_config(config, found))
        checks.append(lambda: places.check(config, found))
    checks.append(lambda: host.check(found))
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001  (the others may find what is wrong)
            text = f"a check failed: {type(error).__name__}: {error}"
            yield unknown("doctor", text, "report this")


def _coloured(finding: Finding, colour: bool) -> str:
    line, code = printable(finding.line()), COLOURS[finding.level]
    return f"\x1b[{code}m{line}\x1b[0m" if colour and code else line
