# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""URLs of images: written in one way, and which of them the configuration allows."""

import fnmatch
import re
from urllib.parse import unquote

LONGEST_URL = 2048

_URL = re.compile(
    r"https://([A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?"
    r"(/[A-Za-z0-9._~!$&'()*+,;=:@%/-]+(?:\?[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?)",
    re.ASCII,
)
"""Host, port, and path with query, of characters that a URL may have (RFC 3986): no user, no fragment."""


def written_url(text: str) -> str | None:
    """The URL in `https://host[:port]/path`, always written in the same way; None for anything else."""
    found = _URL.fullmatch(text) if len(text) <= LONGEST_URL else None
    if found is None or {".", ".."} & set(unquote(found[3].partition("?")[0]).split("/")):
        return None
    host, port, path = found.groups(default="")
    port = "" if port in ("", "443") else f":{port}"
    return f"https://{host.lower()}{port}{path}"


def is_allowed_url(patterns: list[str], url: str) -> bool:
    """True if one of the patterns allows the URL. Server and path are matched apart; a / at the end means all below."""
    server, _, path = url.removeprefix("https://").partition("/")
    for pattern in patterns:
        scheme, _, rest = pattern.partition("://")
        host, slash, below = rest.partition("/")
        below += "*" if not below or below.endswith("/") else ""
        is_server = scheme == "https" and slash and fnmatch.fnmatchcase(server, host.lower())
        if is_server and fnmatch.fnmatchcase(path, below):
            return True
    return False
