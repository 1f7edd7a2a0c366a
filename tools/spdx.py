#!/usr/bin/env python3
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Puts the two SPDX lines (who holds the copyright, which licence) at the top of every source file that lacks them.

    tools/spdx.py [--check] [--no-python] [FILE ...]

Without FILE: all of this repository. It may be run as often as one likes. `--check` changes nothing, names the files
that lack the lines, and ends with 1 if there are any. tests/unit/test_spdx.py asks the same.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

COPYRIGHT = "SPDX-FileCopyrightText: Forebay developers"
LICENCE = "SPDX-License-Identifier: Apache-2.0"

OTHERS = {"config/proxmox": "SPDX-License-Identifier: AGPL-3.0-or-later"}
"""Folders whose files have another licence, with its line."""

WITHIN_LINES = 5
"""The lines of a file among which the identifier has to stand: below a shebang, above all else."""

ROOTS = (
    "Makefile", "pyproject.toml", "hatch_build.py", "mkdocs.yml", ".ci",
    "bench", "cache", "config", "docs", "fast", "gateway", "nbd", "systemd", "tests", "tools",
)  # fmt: skip

HASH = {
    ".py",
    ".pyi",
    ".pyx",
    ".pxi",
    ".sh",
    ".toml",
    ".yml",
    ".service",
    ".target",
    ".conf",
    ".rules",
    ".pm",
    ".pl",
}
"""Endings of files in which a comment begins with a hash."""

HASH_NAMES = {
    "Makefile", ".ci/run", "systemd/drain", "systemd/holds-cache", "config/libvirt/qemu-forebay",
    "config/libvirt/hooks/qemu.d/forebay", "config/apparmor/libvirt-qemu", "config/apparmor/libvirtd",
    "config/opennebula/bin/forebay-one", "config/opennebula/remotes/tm/forebay/clone",
    "config/opennebula/remotes/tm/forebay/mvds", "config/opennebula/remotes/vmm/kvm/attach_disk.forebay",
    "config/opennebula/remotes/vmm/kvm/deploy.forebay",
}  # fmt: skip
"""The same for files whose name does not tell."""

NO_SOURCE = {".md", ".json", ".png", ".typed", ".pyc"}
"""Endings of what takes no comment, or is prose: the licence is in LICENSE."""

DATA = (
    "fast/forebay_fast/core.c",
    "bench/results",
    "config/completions",
    "tests/data",
    "tests/fuzz/corpus",
)
"""Folders of what was recorded, or is made by a program."""


def sources(*, python: bool = True) -> Iterator[Path]:
    """Every file that has to have the lines. Raises ValueError for one of which nobody said how it is commented."""
    for root in ROOTS:
        place = ROOT / root
        for path in sorted(place.rglob("*") if place.is_dir() else [place]):
            name = path.relative_to(ROOT).as_posix()
            hidden = any(part.startswith((".", "__pycache__")) for part in Path(name).parts[1:])
            if not path.is_file() or hidden or name.startswith(DATA) or path.suffix in NO_SOURCE:
                continue
            if path.name == "LICENSE":
                continue
            if comment(path) is None:
                raise ValueError(f"{name}: tools/spdx.py does not know how a comment begins there")
            if python or path.suffix != ".py":
                yield path


def comment(path: Path) -> tuple[str, str] | None:
    """How a comment on a line of its own begins and ends in this file."""
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    if path.suffix in HASH or name in HASH_NAMES:
        return "# ", ""
    if path.suffix == ".cil":
        return "; ", ""
    if path.suffix in {".xml", ".svg", ".html"}:
        return "<!-- ", " -->"
    if path.suffix in {".c", ".h"}:
        return "/* ", " */"
    return None


def licence(path: Path) -> str:
    """The line that says which licence this file has."""
    return next(
        (line for folder, line in OTHERS.items() if path.is_relative_to(ROOT / folder)), LICENCE
    )


def has_lines(text: str, named: str = LICENCE) -> bool:
    """True if both lines stand at the top of a file that holds this text; `named` is that of its licence."""
    top = text.splitlines()[:WITHIN_LINES]
    return all(any(wanted in line for line in top) for wanted in (COPYRIGHT, named))


def with_lines(text: str, begin: str, end: str, named: str = LICENCE) -> str:
    """The text with the two lines, below a shebang or an XML declaration, above all else; as it is if it has them."""
    if has_lines(text, named):
        return text
    lines = text.splitlines(keepends=True)
    first = lines[:1] if lines and lines[0].startswith(("#!", "<?xml")) else []
    rest = lines[len(first) :]
    header = [f"{begin}{line}{end}\n" for line in (COPYRIGHT, named)]
    if rest and not end and rest[0].startswith(begin.rstrip()):
        header.append(
            f"{begin.rstrip()}\n"
        )  # what the file said first stays a paragraph of its own
    elif rest and rest[0].strip():
        header.append("\n")
    return "".join(first + header + rest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if lines are missing"
    )
    parser.add_argument("--no-python", action="store_true", help="leave out *.py")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    options = parser.parse_args()
    lacking = 0
    chosen = [path.resolve() for path in options.files] or sources(python=not options.no_python)
    for path in chosen:
        text = path.read_text()
        if has_lines(text, licence(path)):
            continue
        lacking += 1
        print(path)
        if not options.check:
            style = comment(path)
            assert style is not None, f"{path}: unknown comment style"
            path.write_text(with_lines(text, *style, licence(path)))
    return int(bool(lacking) and options.check)


if __name__ == "__main__":
    sys.exit(main())
