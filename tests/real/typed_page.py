# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A page of the documentation, typed: its console blocks, command by command, with what each is to say."""

import re
from dataclasses import dataclass, field
from pathlib import Path

PROMPT = "# "
ANYTHING = "…"


@dataclass
class Typed:
    """One command of a page, here-documents included, and the lines that it is shown to write."""

    command: str
    expected: list[str] = field(default_factory=list)

    def missing(self, output: str) -> list[str]:
        """The lines that it was to write and has not; they have to come in that order."""
        lines = [line.rstrip() for line in output.splitlines()]
        missing = []
        for wanted in self.expected:
            pattern = re.compile(_pattern(wanted))
            at = next((n for n, line in enumerate(lines) if pattern.fullmatch(line)), None)
            if at is None:
                missing.append(wanted)
            else:
                lines = lines[at + 1 :]
        return missing


def _pattern(line: str) -> str:
    """`…` is anything, and columns may be wider."""
    parts = [re.sub(r"(\\ )+", r"\\s+", re.escape(part)) for part in line.split(ANYTHING)]
    return ".*".join(parts)


def typed(page: Path) -> list[Typed]:
    """The commands of a page, in order."""
    found: list[Typed] = []
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
        lines = iter(block.splitlines())
        for line in lines:
            if not line.startswith(PROMPT):
                if line != ANYTHING:
                    found[-1].expected.append(line)
                continue
            command = line.removeprefix(PROMPT)
            if end := re.search(r"<<'(\w+)'", command):
                for more in lines:
                    command += "\n" + more
                    if more == end[1]:
                        break
            found.append(Typed(command))
    return found
