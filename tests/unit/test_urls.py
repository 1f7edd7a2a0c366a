# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which URLs name an image, and which of them the configuration allows: host and path are matched apart."""

import pytest

from forebay.config.urls import is_allowed_url
from forebay.errors import ForebayError
from forebay.origin.addresses import parse_url

WRITTEN = [
    ("https://a.example/x.raw", "https://a.example/x.raw"),
    ("https://A.Example:443/x.raw", "https://a.example/x.raw"),
    ("https://a.example:8443/X/y%20z?v=1&w=..", "https://a.example:8443/X/y%20z?v=1&w=.."),
    ("https://[::1]/x", "https://[::1]/x"),
]


@pytest.mark.parametrize(("text", "url"), WRITTEN)
def test_a_url_is_always_written_in_the_same_way(text: str, url: str) -> None:
    assert parse_url(text).key == url
    assert parse_url(url).key == url


@pytest.mark.parametrize(
    "text",
    [
        "http://a.example/x",
        "https:///x",
        "https://a.example",
        "https://a.example/",
        "https://u:p@a.example/x",
        "https://a.example@b.example/x",
        "https://a.example/x#y",
        "https://a.example/../x",
        "https://a.example/y/%2E%2e/x",
        "https://a.example/./x",
        "https://a.example/x y",
        "https://a.example/x\\y",
        "https://a.example/x\r\nHost: b",
        "https://a.example/x\n",
        "https://a.example/\u00e9",
        "https://a.example:999999/x",
        "https://-a.example/x",
        "https://a.example/" + "x" * 3000,
        "file:///etc/passwd",
    ],
)
def test_what_is_no_url_of_an_image_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ForebayError, match="is no URL of an image") as told:
        parse_url(text)
    assert len(str(told.value)) < 400


ALLOWED = [
    ("https://a.example/", "https://a.example/x/y.raw", True),
    ("https://a.example/x/", "https://a.example/x/y/z.raw", True),
    ("https://a.example/x/", "https://a.example/xy", False),
    ("https://a.example/x", "https://a.example/x", True),
    ("https://a.example/x", "https://a.example/x/y", False),
    ("https://a.example/*.raw", "https://a.example/b.raw", True),
    ("https://a.example/*.raw", "https://a.example/b.qcow2", False),
    ("https://*.example/", "https://b.example/x", True),
    ("https://*.example/", "https://evil.test/b.example/x", False),
    ("https://a.example/", "https://a.example.evil.test/x", False),
    ("https://a.example/", "https://a.example:8443/x", False),
    ("https://a.example:8443/", "https://a.example:8443/x", True),
    ("https://A.example/", "https://a.example/x", True),
    ("http://a.example/", "https://a.example/x", False),
    ("https://a.example", "https://a.example/x", False),
    ("*", "https://a.example/x", False),
    ("", "https://a.example/x", False),
]


@pytest.mark.parametrize(("pattern", "url", "is_allowed"), ALLOWED)
def test_a_pattern_allows_what_it_says(pattern: str, url: str, is_allowed: bool) -> None:
    assert is_allowed_url([pattern], url) is is_allowed
