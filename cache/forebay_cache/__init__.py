# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A persistent block cache: clean blocks shared by image, private ones by disk, on one local device, indexed by LMDB.

It knows nothing of NBD, of images' homes or of modes: those are the business of whoever puts the layers together.
"""

from forebay_cache.blocks.clean import invalidate, mark_hot, uncover
from forebay_cache.blocks.join import join
from forebay_cache.blocks.pin import pin_layer
from forebay_cache.blocks.settle import settle
from forebay_cache.cache import Cache
from forebay_cache.errors import CacheError, CacheFull
from forebay_cache.format.records import LayerName
from forebay_cache.layers.in_flight import UNSTORED
from forebay_cache.layers.layer import Layer
from forebay_cache.offline.check import check
from forebay_cache.offline.formatting import format_device
from forebay_cache.offline.opening import open_cache
from forebay_cache.offline.repair import Repaired, repair
from forebay_cache.offline.report import Fault, Report
from forebay_cache.read.ahead import ReadAhead
from forebay_cache.read.fill import Filler, Reader
from forebay_cache.read.salvage import salvage
from forebay_cache.read.survey import Holding, survey
from forebay_cache.read.used import Use, uses_of, watch_uses
from forebay_cache.read.view import View
from forebay_cache.upkeep.growth import extend, extend_device
from forebay_cache.upkeep.presence import watch_files
from forebay_cache.upkeep.revive import Revived, come_back, revive
from forebay_cache.upkeep.scrub import Damage, Found, scrub

__all__ = [
    "UNSTORED",
    "Cache",
    "CacheError",
    "CacheFull",
    "Damage",
    "Fault",
    "Filler",
    "Found",
    "Holding",
    "Layer",
    "LayerName",
    "ReadAhead",
    "Reader",
    "Repaired",
    "Report",
    "Revived",
    "Use",
    "View",
    "check",
    "come_back",
    "extend",
    "extend_device",
    "format_device",
    "invalidate",
    "join",
    "mark_hot",
    "open_cache",
    "pin_layer",
    "repair",
    "revive",
    "salvage",
    "scrub",
    "settle",
    "survey",
    "uncover",
    "uses_of",
    "watch_files",
    "watch_uses",
]
