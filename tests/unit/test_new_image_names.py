# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where `forebay save` and `forebay import` may make an image: what they make can be attached by that very name."""

from pathlib import Path

import pytest

from forebay.config.model import Config, Store
from forebay.errors import ForebayError
from forebay.origin.addresses import resolve
from forebay.origin.new_image import address_of_new

CONFIG = Config(stores={"images": Store(path=Path("/srv/images"))})


@pytest.mark.parametrize(
    "text",
    ["images:a.raw", "/srv/images/a.raw", "images:sub/a?format=raw", "images:" + "n" * 247],
)
def test_what_is_made_is_what_the_name_means_later(text: str) -> None:
    address = address_of_new(CONFIG, text)
    assert address == resolve(CONFIG, text)
    assert resolve(CONFIG, address.key) == address


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("images:a.raw?format=qcow2", "leave out '?format='"),
        ("images:a?format=vmdk", "leave out '?format='"),
        ("/srv/images/a.raw?format=qcow2", "leave out '?format='"),
        ("images:a?format=qcow2?format=raw", "leave out '?format='"),
        ("images:" + "n" * 248, "248 bytes: use at most 247"),
        ("images:" + "\u2603" * 83, "249 bytes: use at most 247"),
        ("scratch:1G", "is not in a store"),
    ],
)
def test_what_would_have_another_name_is_refused(text: str, says: str) -> None:
    with pytest.raises(ForebayError, match="(?s).*") as refused:
        address_of_new(CONFIG, text)
    assert says in str(refused.value)
