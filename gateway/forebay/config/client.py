# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a client of the daemon needs from the configuration: which file it is, and where the
daemon's sockets lie.

The command finds its daemon with this on every call, so nothing here imports pydantic or pathlib.
The whole file is checked only by `forebay.config.model`.
"""

import os
from typing import Any

from forebay.errors import ConfigError
from forebay.units import parse_host

DEFAULT_CONFIG = "/etc/forebay/forebay.toml"
DEFAULT_RUN = "/run/forebay"
VARIABLE = "FOREBAY_CONFIG"

_UNQUOTED = ("Expected newline or end of document", "Invalid value")
"""How tomllib's messages begin where somebody wrote `size = 20 GiB` or `mode = write-back`."""


def config_path(named: str | os.PathLike[str] | None = None) -> str | None:
    """The file to read: the one `named`, or that in FOREBAY_CONFIG, or the default; None if the default does not exist.

    A file that was named is returned whether it exists or not.
    """
    chosen = named or os.environ.get(VARIABLE)
    if chosen:
        return os.fspath(chosen)
    return DEFAULT_CONFIG if os.path.lexists(DEFAULT_CONFIG) else None


def read_toml(path: str) -> tuple[str, dict[str, Any]]:
    """The text of the file, and what it holds. Raises ConfigError when it cannot be read or is not TOML."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
    except FileNotFoundError:
        raise ConfigError(
            [f"{path}: no such file: create it, or name another with --config or {VARIABLE}"]
        ) from None
    except OSError as fault:
        raise ConfigError(
            [f"{path}: cannot be read: {fault.strerror}: check the file and its permissions"]
        ) from None
    except UnicodeDecodeError as fault:
        raise ConfigError(
            [f"{path}: not UTF-8 text (byte {fault.start}): save it as UTF-8"]
        ) from None
    import tomllib  # noqa: PLC0415  (not where there is no file)

    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise ConfigError([_syntax_fault(path, text, str(fault))]) from None


def _syntax_fault(path: str, text: str, fault: str) -> str:
    """What tomllib says is wrong, with the line that it means.

    Its messages end with `(at line 3, column 5)` or `(at end of document)`.
    """
    what, _, where = fault.rpartition(" (at ")
    where = where.rstrip(")")
    lines = text.splitlines()
    number = int(where.split(",")[0].split()[1]) if where.startswith("line ") else len(lines)
    shown = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    quotes = ': text needs quotes, as in size = "20 GiB"' if what.startswith(_UNQUOTED) else ""
    return f"{path}:{number}: not TOML: {what}: {shown!r}{quotes}"


def run_directory(named: str | os.PathLike[str] | None = None) -> str:
    """Where the daemon's sockets lie, by `gateway.run` of the file alone. Raises ConfigError."""
    path = config_path(named)
    if path is None:
        return DEFAULT_RUN
    gateway = read_toml(path)[1].get("gateway", {})
    run = gateway.get("run", DEFAULT_RUN) if isinstance(gateway, dict) else None
    if not isinstance(run, str) or not os.path.isabs(run):
        raise ConfigError(
            [f"{path}: gateway.run: not an absolute path: see 'forebay check-config'"]
        )
    return run


def hosts_named(named: str | os.PathLike[str] | None = None) -> list[str]:
    """`hosts.names` of the file alone; empty where it says nothing. Raises ConfigError."""
    path = config_path(named)
    if path is None:
        return []
    section = read_toml(path)[1].get("hosts", {})
    names = section.get("names", []) if isinstance(section, dict) else None
    try:
        if not isinstance(names, list):
            raise ValueError('is no list: write ["host1", "host2"]')  # noqa: TRY004  (told as all others)
        return [parse_host(name) for name in names]
    except ValueError as fault:
        raise ConfigError([f"{path}: hosts.names: {fault}"]) from None
