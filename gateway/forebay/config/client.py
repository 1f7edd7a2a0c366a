# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a client of the daemon needs from the configuration: which file it is, and where the
daemon's sockets lie.

The command finds its daemon with this on every call, so nothing here imports pydantic or pathlib.
The whole file is checked only by `forebay.config.model`.
"""

from __future__ import annotations

import os

from forebay.config.parts import merged, paths_beside
from forebay.errors import ConfigError
from forebay.units import parse_host

TYPE_CHECKING = False  # `typing` takes 3 ms, on each start of the command
if TYPE_CHECKING:
    from typing import Any

DEFAULT_CONFIG = "/etc/forebay/forebay.toml"
DEFAULT_RUN = "/run/forebay"
VARIABLE = "FOREBAY_CONFIG"


def config_path(named: str | os.PathLike[str] | None = None) -> str | None:
    """The file to read: the one `named`, or that in FOREBAY_CONFIG, or the default; None if the default does not exist.

    A file that was named is returned whether it exists or not.
    """
    chosen = named or os.environ.get(VARIABLE)
    if chosen:
        return os.fspath(chosen)
    return DEFAULT_CONFIG if os.path.lexists(DEFAULT_CONFIG) else None


def config_files(named: str | os.PathLike[str] | None = None) -> list[str]:
    """The files that it is made of: that of `config_path`, and those of conf.d beside it, also where it does not exist.
    Raises ConfigError.
    """
    path = config_path(named)
    beside = paths_beside(path or DEFAULT_CONFIG)
    return beside if path is None else [path, *beside]


def _section(named: str | os.PathLike[str] | None, section: str) -> tuple[str, Any]:
    """What all files together say in that section, and the file to name where that is wrong. Raises ConfigError."""
    found = merged(config_files(named))
    part = found.part_of([section])
    return part.path if part else DEFAULT_CONFIG, found.data.get(section, {})


def run_directory(named: str | os.PathLike[str] | None = None) -> str:
    """Where the daemon's sockets lie, by `gateway.run` of the files alone. Raises ConfigError."""
    path, gateway = _section(named, "gateway")
    run = gateway.get("run", DEFAULT_RUN) if isinstance(gateway, dict) else None
    if not isinstance(run, str) or not os.path.isabs(run):
        raise ConfigError(
            [f"{path}: gateway.run: not an absolute path: see 'forebay check-config'"]
        )
    return run


def hosts_named(named: str | os.PathLike[str] | None = None) -> list[str]:
    """`hosts.names` of the files alone; empty where they say nothing. Raises ConfigError."""
    path, section = _section(named, "hosts")
    names = section.get("names", []) if isinstance(section, dict) else None
    try:
        if not isinstance(names, list):
            raise ValueError('is no list: write ["host1", "host2"]')  # noqa: TRY004  (told as all others)
        return [parse_host(name) for name in names]
    except ValueError as fault:
        raise ConfigError([f"{path}: hosts.names: {fault}"]) from None
