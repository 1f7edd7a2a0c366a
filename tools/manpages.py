# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Manual pages, made of what there is: `python tools/manpages.py DIRECTORY`.

forebay(1) and one page for each command are made of the command's own arguments, forebay.toml(5) of the commented
configuration, forebay(7) of the README. groff_man(7) has the macros.
"""

# ruff: noqa: SLF001  (argparse tells what its parsers have in no other way)

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from forebay import __version__
from forebay.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]

EXIT_STATUS = "0: done; 1: failed, and stderr says in one line what and what to do; 2: wrong usage."
OTHER_STATUS = {
    "forebay doctor": "0: all is well; 1: a warning, or what could not be looked at; 2: a fault, or wrong usage."
}
"""By command, where it is another one."""


def escaped(text: str) -> str:
    """As roff takes it for text, wherever it stands on a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"(?m)^(?=[.'])", r"\\&", text)


def heading(name: str, section: int) -> str:
    return f'.TH "{name.upper()}" {section} "" "Forebay {__version__}" "Forebay"\n'


# ---------------------------------------------------------------------------------------------------------- commands


def of_command(parser: argparse.ArgumentParser, name: str, short: str) -> str:
    """The page of one command, or of the command as a whole."""
    usage = re.sub(r"\s+", " ", parser.format_usage().removeprefix("usage: ")).strip()
    page = heading(name, 1) + f".SH NAME\n{escaped(name)} \\- {escaped(short)}\n"
    page += f".SH SYNOPSIS\n{escaped(usage)}\n"
    page += f".SH DESCRIPTION\n{escaped(parser.description or short)}\n"
    if parser.epilog:
        page += f".PP\n{escaped(parser.epilog)}\n"
    page += "".join(of_group(parser, group) for group in parser._action_groups)
    page += f".SH EXIT STATUS\n{OTHER_STATUS.get(parser.prog, EXIT_STATUS)}\n"
    page += ".SH SEE ALSO\n.BR forebay (1),\n.BR forebay.toml (5),\n.BR forebay (7)\n"
    return page


def of_group(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> str:
    """The arguments, or the options, each with its help."""
    shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
    if not shown:
        return ""
    page = f".SH {escaped((group.title or 'options').upper())}\n"
    for action in shown:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                page += f".TP\n.B {escaped(choice.dest)}\n{escaped(choice.help or '')}\n"
            continue
        formatter = parser._get_formatter()
        said = formatter._expand_help(action) if action.help else ""
        page += f".TP\n.B {escaped(formatter._format_action_invocation(action))}\n{escaped(said)}\n"
    return page


def commands() -> Iterator[tuple[str, str]]:
    """Name and text of each page of section 1."""
    whole = build_parser()
    yield (
        "forebay.1",
        of_command(whole, "forebay", "VM disk images on shared storage, through a local cache"),
    )
    [sub] = [a for a in whole._actions if isinstance(a, argparse._SubParsersAction)]
    for choice in sub._choices_actions:
        page = of_command(sub.choices[choice.dest], f"forebay-{choice.dest}", choice.help or "")
        yield f"forebay-{choice.dest}.1", page


# ----------------------------------------------------------------------------------------------------- configuration


def of_configuration() -> str:
    """forebay.toml(5): the commented file, whose comments say what each key is."""
    page = (
        heading("forebay.toml", 5)
        + ".SH NAME\nforebay.toml \\- configuration of forebay(1)\n.SH DESCRIPTION\n"
    )
    for block in (ROOT / "config/forebay.toml").read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if "SPDX" not in line]
        text = " ".join(line.lstrip("# ") for line in lines if line.startswith("# "))
        keys = [line.lstrip("#") for line in lines if re.match(r"#?[a-z_]+ = ", line)]
        for line in lines:
            if found := re.match(r"#?(\[.*\])", line):
                page += f".SH {escaped(found[1])}\n"
        page += "".join(f".TP\n.B {escaped(key)}\n" for key in keys[:1])
        page += f"{escaped(text)}\n" if text else ""
        page += "".join(f".TP\n.B {escaped(key)}\n" for key in keys[1:])
        page += ".PP\n" if not keys and text else ""
    return page + ".SH SEE ALSO\n.BR forebay (1)\n"


# ---------------------------------------------------------------------------------------------------------- overview


def of_readme() -> str:
    """forebay(7): the README, whose links and emphasis are left out."""
    page = heading("forebay", 7) + ".SH NAME\nforebay \\- VM disk images through a local cache\n"
    text = re.sub(
        r"!?\[!?\[[^]]*\]\([^)]*\)\]\([^)]*\)|!\[[^]]*\]\([^)]*\)",
        "",
        (ROOT / "README.md").read_text(),
    )
    text = re.sub(r"(?s)<!--.*?-->", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    is_code = False
    for line in text.splitlines():
        if line.startswith("```"):
            is_code = not is_code
            page += ".PP\n.nf\n" if is_code else ".fi\n"
        elif is_code:
            page += f"{escaped(line)}\n"
        elif found := re.match(r"(#+) (.*)", line):
            page += f".{'SH' if len(found[1]) < 3 else 'SS'} {escaped(plain(found[2]))}\n"
        elif line.startswith(("|", "    ")):
            page += "" if re.fullmatch(r"[|\s:-]+", line) else f".br\n{escaped(plain(line))}\n"
        elif line.startswith(("- ", "* ")):
            page += f".IP \\(bu 2\n{escaped(plain(line[2:]))}\n"
        else:
            page += f"{escaped(plain(line.strip()))}\n" if line.strip() else ".PP\n"
    return page + ".SH SEE ALSO\n.BR forebay (1),\n.BR forebay.toml (5)\n"


def plain(text: str) -> str:
    """Markdown's text without its marks."""
    return re.sub(r"\*\*|`", "", text)


def main() -> None:
    """Write all pages."""
    directory = Path(sys.argv[1])
    pages = dict(commands()) | {"forebay.toml.5": of_configuration(), "forebay.7": of_readme()}
    for name, page in pages.items():
        path = directory / f"man{name[-1]}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page)
    print(f"manpages: {len(pages)} in {directory}")


if __name__ == "__main__":
    main()
