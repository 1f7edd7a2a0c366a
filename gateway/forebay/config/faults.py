# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is wrong with a file, one line for each fault: where it stands, which key it is, and what to write instead."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from forebay.config.parts import Merged
from forebay.config.toml_text import line_of
from forebay.units import did_you_mean

Location = tuple[int | str, ...]
"""Where in the configuration a fault is: the keys, from the outermost on."""

Sections = Mapping[str, type[BaseModel]]
"""The models of the sections, by their names as in the file; the whole file's is under the empty name."""

_OF_THE_KEY = "[key]"

_PLAIN = {
    "missing": "is required: add it",
    "string_type": "must be text in quotes",
    "path_type": "must be a path in quotes",
    "list_type": 'must be a list, as ["a", "b"]',
    "model_type": "must be a section with keys of its own",
    "dict_type": "must be a section with keys of its own",
}
"""By pydantic's name of the fault."""


def faults_of(found: Merged, refused: ValidationError, sections: Sections) -> list[str]:
    """The faults in the files, in their order and in that of their lines; each in the file whose value it is."""
    places = {part.path: n for n, part in enumerate(found.parts)}
    faults = []
    for fault in refused.errors(include_url=False):
        keys = _keys(fault["loc"])
        part = found.part_of([str(key) for key in keys])
        assert part is not None, "the defaults are right"
        line = line_of(part.text, keys) or 0
        text = f"{part.path}:{line or 1}: {dotted(fault['loc'])}: {told(fault, sections)}"
        faults.append((places[part.path], line, text))
    return [text for _, _, text in sorted(faults, key=lambda one: one[:2])]


def _keys(location: Location) -> Location:
    """The keys alone: pydantic adds a mark of its own where a key is wrong, and not its value."""
    return tuple(part for part in location if part != _OF_THE_KEY)


def dotted(location: Location) -> str:
    """A key as operators write it: `stores.images.path`."""
    return ".".join(str(part) for part in _keys(location))


def told(fault: Mapping[str, Any], sections: Sections) -> str:
    """What is wrong, of one of the faults that pydantic found."""
    kind = fault["type"]
    if kind == "extra_forbidden":
        return _unknown_key(fault["loc"], sections)
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    if kind == "literal_error":
        return f"{fault['input']!r} is not known: use one of {fault['ctx']['expected']}"
    return _PLAIN.get(kind, str(fault["msg"]))


def _unknown_key(location: Location, sections: Sections) -> str:
    """Suggests the nearest key of the section, or the section in which the key would be right."""
    *_, key = (str(part) for part in location)
    section = (
        "" if len(location) == 1 else "stores.NAME" if location[0] == "stores" else str(location[0])
    )
    known = list(sections[section].model_fields)
    hint = did_you_mean(key, known)
    elsewhere = [
        name
        for name, model in sections.items()
        if name not in ("", section) and key in model.model_fields
    ]
    if elsewhere and not hint:
        return f"unknown key here: it belongs in [{'] or ['.join(elsewhere)}]"
    return f"unknown {'key' if section else 'section'}{hint}: known are {', '.join(known)}"
