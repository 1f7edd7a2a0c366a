# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a gateway needs to have for images that a server of their own reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forebay.origin.virtual.chain import Locate


@dataclass(frozen=True)
class Web:
    """What the configuration says of web servers."""

    allowed: list[str]
    """Patterns of URLs."""
    ca_file: Path | None


@dataclass(frozen=True)
class Servers:
    """What is needed to have images served."""

    run: Path
    """The daemon's RUN."""
    web: Callable[[], Web]
    """Tells what the configuration says now."""
    locate: Locate
    """Finds the files that an image lies on."""
    is_open: Callable[[str], bool]
    """True of an image, by its key, that disks use already."""
