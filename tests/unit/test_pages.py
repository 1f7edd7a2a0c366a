# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The pages of one layer in memory: found by their numbers, however many they are, and in no dict that is large."""

import random
from array import array
from types import SimpleNamespace
from typing import Any, cast

import pytest

import forebay_cache.index.pages
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.index.pages import EMPTY, PageTable


def table(*, complete: bool) -> PageTable:
    nothing = SimpleNamespace(
        place=SimpleNamespace(is_kept=lambda: True),
        page=lambda _layer, _number: None,
        pages=lambda _layer, _after, _limit: [],
        page_numbers=lambda *_: [],
    )
    return PageTable(cast("Any", nothing), 7, set(), private=True, complete=complete)


def raw(number: int) -> bytes:
    return array("Q", [number + 1] * (2 * PAGE_BLOCKS)).tobytes()


def test_no_dict_of_pages_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dict of 700,000 pages grows in 26 ms, all at once."""
    pages = table(complete=False)
    data = raw(0)
    for number in range(100_000):
        pages.adopt(number, data)
    assert len(pages) == 100_000
    assert max(map(len, pages.by_number.parts())) <= 1 << 15
    assert max(map(len, pages.loaded())) <= 1 << 15


@pytest.mark.parametrize("count", [0, 3, 8, 30])
def test_a_hand_comes_by_all_of_them(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turns, wherever they are: a layer at its cap would never give up what lies beyond the first dict."""
    monkeypatch.setattr(forebay_cache.index.pages, "_AT_HAND", 8)
    monkeypatch.setattr(forebay_cache.index.pages, "_LOOKED_AT_ONCE", 4)
    pages = table(complete=False)
    for number in range(count):
        pages.adopt(number, raw(number))
    seen, hand = list[int](), 5
    for _ in range(count):
        found = pages.from_hand(hand, 7)
        assert len(found) == min(7, count)
        assert len(set(found)) == len(found)
        hand += len(found)
        seen += found
    assert sorted(set(seen)) == list(range(count))
    assert seen[:count] == seen[count : 2 * count] or len(seen) < 2 * count


@pytest.mark.parametrize("complete", [False, True])
async def test_all_are_found_wherever_they_are(
    complete: bool, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with one dict, over loading, changing, shedding and forgetting."""
    monkeypatch.setattr(forebay_cache.index.pages, "_AT_HAND", 8)
    monkeypatch.setattr(forebay_cache.index.pages, "_LOOKED_AT_ONCE", 4)
    pages, model = table(complete=complete), dict[int, bytes]()
    for _ in range(2000):
        number = rng.randrange(64)
        match rng.choice(("adopt", "change", "forget", "look", "shed" if not complete else "look")):
            case "adopt":
                found = rng.choice((raw(number), None))
                pages.adopt(number, found)
                model.setdefault(number, found or b"")
            case "change" if number in model:
                page = pages.writable(number)
                page[0] = rng.randrange(1 << 32)
                model[number] = page.tobytes()
            case "forget":
                pages.forget([number])
                pages.dirty.discard(pages.first_key | number)
                model.pop(number, None)
            case "shed":
                before = set(model)
                pages.shed(3)
                for gone in before - {n for part in pages.loaded() for n in part}:
                    assert pages.first_key | gone not in pages.dirty
                    del model[gone]
            case _:
                page = cast("Any", pages.look(number))
                if complete and number not in model:
                    model[number] = b""
                assert (page is None) == (number not in model)
        seen = {n: cast("Any", pages.look(n)) for part in list(pages.loaded()) for n in part}
        assert {n: b"" if p is EMPTY else p.tobytes() for n, p in seen.items()} == model
        assert len(pages) == len(model)
        if not complete:
            assert all(n in pages for n in model)
            assert 99 not in pages
    held = sorted(n for n, data in model.items() if data)
    assert await pages.numbers() == held
    assert await pages.numbers_in(0, 64, 1000) == (held, 64)
    for number in model:
        assert pages.by_number[number] is pages.look(number)
