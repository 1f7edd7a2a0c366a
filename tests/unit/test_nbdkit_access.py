# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The rules of the nbdkit door (nbd/nbdkit/access.py): which disk a peer may use, and how."""

import importlib.util
import ipaddress
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "nbd" / "nbdkit" / "access.py"


@pytest.fixture(scope="module")
def access() -> ModuleType:
    """nbdkit loads it by its path, and so do we: it is in no package."""
    spec = importlib.util.spec_from_file_location("nbdkit_access", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RULES = """
[[allow]]
exports = ["vm1", "web*"]
peers = ["192.0.2.17", "2001:db8:7::/64"]

[[allow]]
exports = ["*"]
peers = ["192.0.2.16/30", "unix"]
read_only = true

[[allow]]
exports = ["local-[ab]"]
peers = ["unix"]
"""


@pytest.mark.parametrize(
    ("name", "peer", "access_to_it"),
    [
        ("vm1", "192.0.2.17", "write"),  # both rules fit: the one that grants more
        ("vm2", "192.0.2.17", "read"),
        ("vm1", "192.0.2.18", "read"),
        ("vm1", "192.0.2.20", None),
        ("web", "2001:db8:7::1", "write"),
        ("web17", "2001:db8:7:0:ffff::", "write"),
        ("web17", "2001:db8:8::1", None),
        ("vm11", "2001:db8:7::1", None),
        ("WEB1", "2001:db8:7::1", None),
        ("vm1", "::1", None),
        ("vm1", None, "read"),
        ("local-a", None, "write"),
        ("local-c", None, "read"),
        ("local-a", "127.0.0.1", None),
        ("vm1", "::c000:211", None),  # the number of 192.0.2.17 in the other family
    ],
)
def test_a_peer_has_what_a_rule_gives_it(
    access: Any, tmp_path: Path, name: str, peer: str | None, access_to_it: str | None
) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(RULES)
    rule = access.Rules(file).rule_for(name, None if peer is None else ipaddress.ip_address(peer))
    found = None if rule is None else ("read" if rule.read_only else "write")
    assert found == access_to_it


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[allow]]", "rule 1: exports"),
        ('[[allow]]\nexports = "vm1"\npeers = ["unix"]', "rule 1: exports"),
        ('[[allow]]\nexports = ["vm1"]\npeers = []', "rule 1: peers"),
        ('[[allow]]\nexports = ["vm1"]\npeers = ["host7"]', "rule 1: 'host7'"),
        ('[[allow]]\nexports = ["vm1"]\npeers = ["10.0.0.1/8"]', "rule 1: .*host bits"),
        ('[[allow]]\nexports = ["vm1"]\npeers = ["unix"]\nread_only = 1', "rule 1: read_only"),
        (RULES + "readonly = true", "rule 3: unknown key 'readonly'"),
        ("[allow]\nexports = []", "only \\[\\[allow"),
        ('deny = ["*"]', "only \\[\\[allow"),
        ("allow = [", "rules.toml"),
    ],
)
def test_a_wrong_file_gives_nothing_and_says_why(
    access: Any, tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        access.Rules(file).rule_for("vm1", None)


def test_a_changed_file_counts_and_a_broken_one_hides_the_old_rules(
    access: Any, tmp_path: Path
) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(RULES)
    rules = access.Rules(file)
    assert rules.rule_for("vm1", None)
    file.write_text("")
    assert rules.rule_for("vm1", None) is None
    file.write_text(RULES)
    assert rules.rule_for("vm1", None)
    for _ in range(2):
        file.write_text("broken")
        with pytest.raises(ValueError, match="rules.toml"):
            rules.rule_for("vm1", None)
    new = tmp_path / "new"
    new.write_text(RULES.replace("unix", "::1"))
    os.replace(new, file)
    assert rules.rule_for("vm1", None) is None
    file.unlink()
    with pytest.raises(OSError, match="rules.toml"):
        rules.rule_for("vm1", None)
