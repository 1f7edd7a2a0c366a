# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Completion scripts for shells, made by shtab; disks are completed from their sockets.

They are shipped ready made in config/completions. shtab is needed to make them anew, and for nothing else.
"""

import argparse
from types import ModuleType

from forebay.errors import ForebayError

PREAMBLE = {
    "bash": """
_forebay_changes() {
  compopt -o nospace 2>/dev/null
  compgen -W "CHANGES" -- "$1"
}
_forebay_settings() {
  compgen -W "SETTINGS" -- "$1"
}
_forebay_disks() {
  local socket
  for socket in /run/forebay/disks/"$1"*.sock; do
    [ -S "$socket" ] && basename "$socket" .sock
  done
}
""",
    "zsh": """
_forebay_changes() {
  compadd -S '' -- CHANGES
}
_forebay_settings() {
  compadd -- SETTINGS
}
_forebay_disks() {
  local -a disks
  disks=(/run/forebay/disks/*.sock(N:t:r))
  _describe 'disk' disks
}
""",
}


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script for `bash`, `zsh` or `tcsh`. Raises ForebayError where shtab is not installed."""
    shtab = _shtab()
    completers = {
        "NAME": {"bash": "_forebay_disks", "zsh": "_forebay_disks"},
        "KEY": {"bash": "_forebay_settings", "zsh": "_forebay_settings"},
        "KEY=VALUE": {"bash": "_forebay_changes", "zsh": "_forebay_changes"},
        "FILE": shtab.FILE,
        "DIR": shtab.DIRECTORY,
    }
    for command in _parsers(parser):
        for action in command._actions:  # noqa: SLF001  (shtab reads them there too)
            if action.metavar in completers:
                action.complete = completers[action.metavar]  # type: ignore[attr-defined]
    made: str = shtab.complete(parser, shell, preamble=_preamble(shell))
    return made


def _preamble(shell: str) -> str:
    """The functions that complete disks, settings, and changes of them."""
    from forebay.config.keys import KEYS, listed

    changes = " ".join(f"{key}=" for key in KEYS)
    text = PREAMBLE.get(shell, "")
    return text.replace("CHANGES", changes).replace("SETTINGS", " ".join(listed()))


def _shtab() -> ModuleType:
    try:
        import shtab
    except ImportError:
        raise ForebayError(
            "making a completion script needs shtab, which is not installed: use the one that is shipped "
            "in config/completions, or 'pip install shtab'"
        ) from None
    return shtab


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            found += action.choices.values()
    return found
