# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The page as it is sent: one file, with the rule (CSP) that nothing runs but what is in it."""

import base64
import hashlib
import re
from pathlib import Path

FILE = Path(__file__).with_name("page.html")


def document() -> bytes:
    """The HTML. Raises OSError."""
    return FILE.read_bytes()


def headers_for(page: bytes) -> dict[str, str]:
    """The headers that each answer has: what a browser may do with it, which is next to nothing."""
    rules = {
        "default-src": "'none'",
        "script-src": _hashes(page, b"script"),
        "style-src": _hashes(page, b"style"),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in rules.items()),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-store",
    }


def _hashes(page: bytes, element: bytes) -> str:
    """What stands in these elements, as the rule names it."""
    found = re.findall(b"<%b>(.*?)</%b>" % (element, element), page, re.DOTALL)
    sums = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found)
    return " ".join(f"'sha256-{one}'" for one in sums)
