# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Text without what is nobody else's business: passwords and tokens in URLs, values of keys that are called so, keys.

It leaves out too much rather than too little: who reads a report can ask.
"""

import re

GONE = "***"

_KEY = (
    r"[\w.-]{0,40}(?:pass(?:word|wd|phrase)|(?<![\w-])pass(?![\w-])|secret|token|api[_-]?key|access[_-]?key|"
    r"private[_-]?key|credentials?|signature|psk|cookie)[\w.-]{0,40}"
)
_VALUE = r"(?:\"(?:[^\"\\]|\\.)*\"|'[^']*'|\[[^\]]{0,4000}\]|[^\s,;&\"']+)"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [^-]*-----|\Z)", re.DOTALL
        ),
        f"-----{GONE}-----",
    ),
    # user and password of a URL
    (re.compile(r"(?<=://)[^/\s\"'<>?#]*@"), f"{GONE}@"),
    # what a URL is asked with, but where a socket lies and what an export is called
    (
        re.compile(r"(?<=[?&])(?!(?:socket|export)=)([\w.~%\[\]-]+)=[^&#\s\"'<>]*"),
        rf"\1={GONE}",
    ),
    (re.compile(r"(\b(?:proxy-)?authorization\b[\"']?\s*[:=]\s*).*", re.IGNORECASE), rf"\1{GONE}"),
    (re.compile(rf"(\b{_KEY}[\"']?\s{{0,8}}[:=]\s{{0,8}}){_VALUE}", re.IGNORECASE), rf'\1"{GONE}"'),
    (re.compile(rf"(--?{_KEY}\s{{1,8}}){_VALUE}", re.IGNORECASE), rf"\1{GONE}"),
)


def without_secrets(text: str) -> str:
    """The text, with what looks like a secret replaced."""
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    return text
