# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How a page is typed: which commands it has, and when one has not said what the page shows."""

from pathlib import Path

from real.typed_page import Typed, typed

PAGE = """
Text.

```console
# first --option
…
shown …
# cat >file <<'END'
# a comment
END
```

```sh
make nothing
```

```console
# second
```
"""


def test_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert typed(page) == [
        Typed("first --option", ["shown …"]),
        Typed("cat >file <<'END'\n# a comment\nEND"),
        Typed("second"),
    ]


def test_what_is_not_said_is_missed() -> None:
    one = Typed("", ["NAME  SIZE", "vm1: … MiB", "end."])
    assert one.missing("x\nNAME     SIZE\nvm1: 7 MiB\nbetween\nend.\n") == []
    assert one.missing("NAME SIZE\nvm1: 7 KiB\nend.") == ["vm1: … MiB"]
    assert one.missing("NAME SIZE\nend.\nvm1: 7 MiB") == ["end."], "the order counts"
    assert one.missing("NAME SIZES\nvm1:  MiB\nendx") == ["NAME  SIZE", "end."]
