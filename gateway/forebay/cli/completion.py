"""Completion scripts for shells, made by shtab; disks are completed from their sockets."""

import argparse

import shtab

PREAMBLE = {
    "bash": """
_forebay_disks() {
  local socket
  for socket in /run/forebay/disks/"$1"*.sock; do
    [ -S "$socket" ] && basename "$socket" .sock
  done
}
""",
    "zsh": """
_forebay_disks() {
  local -a disks
  disks=(/run/forebay/disks/*.sock(N:t:r))
  _describe 'disk' disks
}
""",
}

COMPLETERS = {
    "NAME": {"bash": "_forebay_disks", "zsh": "_forebay_disks"},
    "FILE": shtab.FILE,
    "DIR": shtab.DIRECTORY,
}
"""By metavar: how its values are completed."""


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script for `bash`, `zsh` or `tcsh`."""
    for command in _parsers(parser):
        for action in command._actions:  # noqa: SLF001  (shtab reads them there too)
            if action.metavar in COMPLETERS:
                action.complete = COMPLETERS[action.metavar]  # type: ignore[attr-defined]
    # shtab takes a text or one for each shell; its types know the text only
    return shtab.complete(parser, shell, preamble=PREAMBLE.get(shell, ""))


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            found += action.choices.values()
    return found
