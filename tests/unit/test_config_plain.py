# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the command reads of a configuration by itself is what tomllib makes of it, or it is left to tomllib."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forebay.config.plain import read_plain

ROOT = Path(__file__).parents[2]

USUAL = """
# a comment
[gateway]
state = "/srv/forebay"          # with another
run = '/run/a\\b'
socket_mode="0660"

[stores.images]
\tpath = "/mnt/nfs/größe"
socket = true
check = false
[stores]
[origins]
uris = [ "nbd://a", 'nbd://b',]
https = []
port = 10881
"""

PIECES = st.sampled_from([
    "[", "]", "=", '"', "'", ",", "#", ".", " ", "\t", "\n", "\n", "\\", "\r", "\x7f", "\u00a0", "a", "b", "a-b",
    "0", "01", "12", "1_0", "0x1", "1.5", "true", "false", "inf", "1979-05-27", "{", "}", "é", "[a]\n", "[a.b]\n",
    "a = ", "b = ", '"x"', "'y'", '""', "''", '"a\\tb"', "[[a]]\n", "a.b = 1\n", '["x", "y"]', "[1]", "-1",
])  # fmt: skip


def test_a_usual_file_needs_no_tomllib() -> None:
    assert read_plain(USUAL) == tomllib.loads(USUAL)
    assert read_plain("") == {}


def test_the_file_that_is_installed_needs_no_tomllib() -> None:
    text = (ROOT / "config" / "forebay.toml").read_text()
    assert read_plain(text) == tomllib.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "a = 1.5", "a = [\n1]", "a = 'x' y", 'a = """x"""', "a.b = 1", "[[a]]", "a = 1\r\n", 'a = "\\u0041"', "a = 1_0",
        "a = 1\na = 2", "[a]\n[a]", "a = 1\n[a]", "[a]\nb = 1\n[a.b]", "[a.b]\n[a]\nb = 1", "a", "= 1", "a =", "[a",
        "[]", "a = 01", "a = tru", 'a = "x', "[a] b = 1", "a = [,]", "a = ['x' 'y']", "a = 1979-05-27", '"a" = 1',
        "\ufeffa = 1",
    ],
)  # fmt: skip
def test_everything_else_is_left_to_it(text: str) -> None:
    assert read_plain(text) is None


@given(st.lists(PIECES, max_size=14).map("".join))
@example("a = ''''''")
def test_what_is_read_is_what_tomllib_reads(text: str) -> None:
    found = read_plain(text)
    assert found is None or (found, str(found)) == ((read := tomllib.loads(text)), str(read))
