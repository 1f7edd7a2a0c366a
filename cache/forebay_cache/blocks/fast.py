# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Private writes by the compiled core, where this process serves with it: see fast/README.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import forebay_fast
from forebay_cache.blocks import private
from forebay_cache.cache import Cache
from forebay_cache.device import pace
from forebay_cache.durable.intent import Late
from forebay_cache.index.pages import EMPTY
from forebay_cache.layers.layer import Layer

WriteRun = Callable[[Layer, list[tuple[int, memoryview]]], int]


def write_run_of(cache: Cache) -> WriteRun:
    """:func:`private.write_run` of that cache, or what the core has of it."""
    if not forebay_fast.serves():
        return partial(private.write_run, cache)
    return forebay_fast.core.Writes(
        cache.failure,
        cache.threads,
        cache.publish,
        cache.intent,
        cache.sums,
        cache.ready,
        cache.slots,
        cache.device,
        timing=pace,
        empty=EMPTY,
        late=Late,
    ).run
