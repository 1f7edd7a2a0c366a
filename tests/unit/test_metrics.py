# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

import re
from itertools import groupby

import pytest
from prometheus_client.parser import text_string_to_metric_families

from forebay.control.prometheus.metrics import metrics_text
from unit.control_fake import CACHE, GATEWAY, disk

SAMPLE = re.compile(
    r'(forebay_[a-z_]+)(\{[a-z_]+="(?:[^"\\\n]|\\.)*"(,[a-z_]+="(?:[^"\\\n]|\\.)*")*\})? \S+'
)


def samples(text: str) -> dict[str, str]:
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_what_status_tells_is_exported() -> None:
    found = samples(metrics_text([disk("a", dirty_bytes=7, lag_seconds=1.5), disk("b")], CACHE))
    assert found['forebay_cache_hits_total{disk="a",op="read"}'] == "900"
    assert found['forebay_cache_misses_total{disk="b",op="write"}'] == "5"
    assert found['forebay_dirty_bytes{disk="a"}'] == "7"
    assert found['forebay_oldest_dirty_seconds{disk="a"}'] == "1.5"
    assert found["forebay_evicted_blocks_total"] == "7"
    assert found["forebay_cache_ok"] == "1"
    assert "forebay_client_memory_bytes" not in found
    found = samples(metrics_text([], CACHE, GATEWAY))
    assert found["forebay_client_memory_bytes"] == str(5 << 20)
    assert found["forebay_client_memory_limit_bytes"] == str(256 << 20)
    assert samples(metrics_text([], CACHE | {"state": "failed"}))["forebay_cache_ok"] == "0"


@pytest.mark.parametrize(
    "disks", [[], [disk("a")], [disk("a", reads=5, origin_errors=2), disk("b")]]
)
def test_text_is_in_the_exposition_format(disks: list[dict[str, object]]) -> None:
    text = metrics_text(disks, CACHE)
    assert text.endswith("\n")
    lines = text.splitlines()
    families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    plain = [line for line in lines if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) for line in plain)
    # the samples of a family stand together, under its TYPE
    assert [name for name, _ in groupby(re.split("[ {]", line)[0] for line in plain)] == families


def test_names_follow_the_rules() -> None:
    text = metrics_text([disk("a", read_bytes=1, written_bytes=1, origin_errors=0)], CACHE)
    for kind in re.findall(r"(?m)^# TYPE (\S+ \S+)$", text):
        name, what = kind.split()
        assert name.endswith("_total") == (what == "counter"), name


@pytest.mark.parametrize("image", ['x"y\\z\nw', "\r\t", "ä\u2028", "a\\nb", "{}=,"])
def test_prometheus_reads_what_is_told(image: str) -> None:
    text = metrics_text([disk("a", image=image), disk("b", reads=5)], CACHE, GATEWAY)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    of_image = {s.labels["image"] for s in families["forebay_disk_info"].samples}
    assert image in of_image
    assert {s.labels["disk"] for s in families["forebay_dirty_bytes"].samples} == {"a", "b"}
    typed = set(re.findall(r"(?m)^# TYPE (\S+)", text))
    assert {name.removesuffix("_total") for name in typed} == {
        name.removesuffix("_total") for name in families
    }
    assert all(family.documentation for family in families.values())


def test_labels_are_escaped() -> None:
    text = metrics_text([disk("a", image='x"y\\z\nw')], {})
    assert r'image="x\"y\\z\nw"' in text
