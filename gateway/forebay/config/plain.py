# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""TOML as most configurations have it: one key a line, with a string, a whole number, yes or no, or a list of strings.

The command reads the configuration on every start, and tomllib takes 6 ms to import: a sixth of what asking the daemon
takes. What is read here is exactly what tomllib would make of it; everything else, what is wrong included, is left to
it.
"""

Value = str | int | bool | list[str]


def read_plain(text: str) -> dict[str, object] | None:
    """What the text holds; None where it has anything that is not plain, and for a key or table that comes twice."""
    if not text.replace("\n", "").replace("\t", "").isprintable():
        return None
    data: dict[str, object] = {}
    table, headings = data, set[str]()
    for full in text.split("\n"):
        line = full.strip()
        if not line or line[0] == "#":
            continue
        if line[0] == "[":
            heading, end, rest = line[1:].partition("]")
            found = None if heading in headings else _table(data, heading.split("."))
            if found is None or not end or not _is_over(rest):
                return None
            headings.add(heading)
            table = found
            continue
        key, equals, given = line.partition("=")
        key, value = key.rstrip(), _value(given.lstrip())
        if not equals or value is None or key in table or not _is_bare(key):
            return None
        table[key] = value
    return data


def _is_bare(key: str) -> bool:
    """True for a key without quotes and dots."""
    return key.isascii() and key.replace("-", "").replace("_", "").isalnum()


def _is_over(rest: str) -> bool:
    """True if a line has nothing more to say."""
    return not rest or rest.lstrip()[:1] in ("", "#")


def _table(data: dict[str, object], keys: list[str]) -> dict[str, object] | None:
    """The table of a heading, made where it is not there."""
    found: object = data
    for key in keys:
        if not isinstance(found, dict) or not _is_bare(key):
            return None
        found = found.setdefault(key, {})
    return found if isinstance(found, dict) else None


def _value(given: str) -> Value | None:
    """What stands behind a `=`."""
    if given[:1] == "[":
        return _list(given[1:])
    if (quoted := _quoted(given)) is not None:
        text, rest = quoted
        return text if _is_over(rest) else None
    word = given.partition("#")[0].rstrip()
    if word in ("true", "false"):
        return word == "true"
    is_number = word.isascii() and word.isdecimal() and len(word) < 19
    return int(word) if is_number and (word == "0" or word[0] != "0") else None


def _quoted(given: str) -> tuple[str, str] | None:
    """A string that is in quotes and has no escapes, and what is behind it. Three quotes are those of an empty one."""
    mark = given[:1]
    if mark not in ('"', "'") or not mark:
        return None
    text, end, rest = given[1:].partition(mark)
    if not end or (mark == '"' and "\\" in text):
        return None
    return text, rest


def _list(given: str) -> list[str] | None:
    """A list of strings that ends in its line; `given` is what stands behind the bracket."""
    found = list[str]()
    while (given := given.lstrip())[:1] != "]":
        quoted = _quoted(given)
        if quoted is None:
            return None
        found.append(quoted[0])
        given = quoted[1].lstrip()
        if given[:1] == ",":
            given = given[1:]
        elif given[:1] != "]":
            return None
    return found if _is_over(given[1:]) else None
