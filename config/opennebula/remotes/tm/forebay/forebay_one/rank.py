# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay-one rank TEMPLATE`: the two lines by which VMs go to hosts that have their images warm."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from forebay_one.remote import asked
from forebay_one.vm import Failed, read_xml

HASH = re.compile(r"[0-9a-f]{12,64}")
"""The names that OpenNebula gives to the files of images."""

MOST_IMAGES = 32

OURS = re.compile(r'\s*&?\s*FOREBAY_STATE\s*=\s*"ok"\s*&\s*LS_FREE\s*>\s*[0-9]+')
"""What is written into SCHED_REQUIREMENTS."""


def main(arguments: Sequence[str]) -> int:
    """Print the lines, or put them into the template. The exit code; raises Failed and OSError."""
    chosen = _parser().parse_args(arguments)
    template = read_xml(asked(["onetemplate", "show", "-x", chosen.template]))
    lines = written(template, [_source(one) for one in _images(template)], chosen.free)
    if not chosen.update:
        print(lines, end="")
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".template") as file:
        file.write(lines)
        file.flush()
        asked(["onetemplate", "update", chosen.template, "--append", file.name])
    print(f"template {chosen.template}: SCHED_RANK and SCHED_REQUIREMENTS are set")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="forebay-one", description="Forebay under OpenNebula")
    rank = parser.add_subparsers(dest="command", required=True).add_parser(
        "rank",
        help="SCHED_RANK and SCHED_REQUIREMENTS for hosts that have a template's images warm",
    )
    rank.add_argument("template", metavar="TEMPLATE", type=_template, help="name or number")
    rank.add_argument(
        "--free",
        type=_megabytes,
        default=10000,
        metavar="MB",
        help="cache that has to be free (10000)",
    )
    rank.add_argument("--update", action="store_true", help="write them into the template")
    return parser


def _template(text: str) -> str:
    if not text or text.startswith("-") or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not a template")
    return text


def _megabytes(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of MB")
    return int(text)


def _images(template: ET.Element) -> list[str]:
    """The numbers of the images of a template's disks. Raises Failed."""
    found = []
    for disk in template.iterfind("./TEMPLATE/DISK"):
        number, name = disk.findtext("IMAGE_ID"), disk.findtext("IMAGE")
        if number:
            found.append(number)
        elif name:
            owner = disk.findtext("IMAGE_UNAME")
            found.append(_by_name(name, owner or template.findtext("UNAME") or ""))
    return found[:MOST_IMAGES]


def _by_name(name: str, owner: str) -> str:
    pool = read_xml(asked(["oneimage", "list", "-x"]))
    for image in pool.iterfind("./IMAGE"):
        if (image.findtext("NAME"), image.findtext("UNAME")) == (name, owner):
            return image.findtext("ID") or ""
    raise Failed(f"{owner} has no image '{name}'")


def _source(number: str) -> str:
    if not (number.isascii() and number.isdecimal()):
        raise Failed(f"IMAGE_ID is {number!r}")
    return read_xml(asked(["oneimage", "show", "-x", number])).findtext("SOURCE") or ""


def written(template: ET.Element, sources: Sequence[str], free: int) -> str:
    """The two lines. What the template requires besides is kept; of the rank, what Forebay is not concerned with."""
    names = [os.path.basename(source) for source in sources]
    warm = [f"FOREBAY_WARM_{name[:12].upper()} * 100" for name in names if HASH.fullmatch(name)]
    if not warm:
        raise Failed("the template has no image whose file is named as OpenNebula names them")
    rank = " + ".join([*dict.fromkeys(warm), "FREE_CPU"])
    ours = f'FOREBAY_STATE = "ok" & LS_FREE > {free}'
    others = _without_ours(template.findtext("./TEMPLATE/SCHED_REQUIREMENTS") or "")
    if others and not _is_in_brackets(others):
        others = f"({others})"
    required = f"{others} & {ours}" if others else ours
    return f"SCHED_RANK={_quoted(rank)}\nSCHED_REQUIREMENTS={_quoted(required)}\n"


def _without_ours(required: str) -> str:
    """What a template requires, without what was written before. Raises Failed where nobody can tell them apart."""
    others = OURS.sub("", required)
    if "FOREBAY_STATE" in others or re.search(r"(^|\()\s*[)|&]", others.lstrip(" &\t\n")):
        raise Failed(
            f"SCHED_REQUIREMENTS has FOREBAY_STATE otherwise: change it by hand: {required}"
        )
    return others.strip(" &\t\n")


def _is_in_brackets(text: str) -> bool:
    depth = 0
    for at, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0 and at < len(text) - 1:
            return False
    return depth == 0


def _quoted(text: str) -> str:
    """A value for OpenNebula's parser."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
