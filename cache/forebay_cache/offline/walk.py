# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One walk through the index of a cache that nobody has open, and through the slots that it names.

See ``check``, whose middle part this is.
"""

from __future__ import annotations

import struct
from array import array
from functools import lru_cache
from typing import NamedTuple

from forebay_cache.device.device import Device
from forebay_cache.device.extend import Progress
from forebay_cache.durable.journal import Journal, Position
from forebay_cache.format.checksum import UNREADABLE, matching
from forebay_cache.format.entry import (
    NO_SLOT,
    Entry,
    block_key,
    block_of_key,
    entry_at,
    layer_of_key,
)
from forebay_cache.format.geometry import BLOCK, FULL, PAGE_BLOCKS, SECTOR, SECTORS, sector_runs
from forebay_cache.format.records import LAYER_KEY, PAGE_KEY, LayerRecord, Meta, unpack_record
from forebay_cache.offline.claims import Claims, Judge
from forebay_cache.offline.report import Fault, Fix, Report
from forebay_cache.offline.tables import Tables
from forebay_cache.upkeep.medium import Medium


class Located(NamedTuple):
    """What a page says of one block, and which block that is."""

    layer: int
    block: int
    record: LayerRecord
    entry: Entry

    @property
    def key(self) -> int:
        """The key of the block."""
        return block_key(self.layer, self.block)

    def nonsense(self, slots: int, frontier: int) -> str:
        """What about it cannot be, whatever lies on the device; empty if all of it can."""
        if fault := self.entry.fault():
            return fault
        for slot, _ in self.entry.places():
            if slot >= min(slots, frontier):
                return f"names slot {slot}, of {slots} of which {frontier} were ever used"
        return ""


class Walk:
    """Fills in a report. ``boot`` is the boot id of the running kernel."""

    def __init__(
        self, report: Report, tables: Tables, meta: Meta, device: Device, medium: Medium, boot: str
    ) -> None:
        self._report = report
        self._tables = tables
        self._device = device
        self._format = meta.format
        self._survived = meta.boot_id == boot
        journal = Journal(device, Position(meta.journal_offset, meta.journal_sequence))
        self._claims = Claims.read(journal.replay())
        self._judge = Judge(self._survived, self._lies, self._stored)
        self._frontier = max(meta.frontier, self._claims.frontier)
        self._sums = lru_cache(maxsize=64)(medium.sums)
        self._owners = array("Q", bytes(8 * device.slots))  # key of the block, + 1
        self._named: dict[int, Located] = {}  # private blocks that the journal has something of

    def run(self, progress: Progress) -> None:
        """Look at all of it; ``progress`` is called with (bytes done, bytes in all).

        Raises OSError, and what LMDB raises.
        """
        report, claims = self._report, self._claims
        report.journal_records = claims.records
        if claims.fault is not None:
            text = f"a record that makes no sense behind {claims.records}: {claims.fault}"
            report.wrong(text, "journal")
        self._layers = self._read_layers()
        self._counted = {ident: [0, 0] for ident in self._layers}
        report.layers = len(self._layers)
        self._read_records()
        self._read_hot()
        total = sum(x.slots for x in self._layers.values() if not x.dead) * BLOCK
        progress(0, total)
        for key, raw in self._tables.items("pages"):
            self._page(key, raw)
            progress(min(report.checked_bytes, total), total)
        self._check_slots_of_journal()
        for block in claims.blocks:
            self._check_claims(block)
        self._compare_totals()
        report.free_slots = report.slots - report.used_slots
        progress(total, total)

    # -- tables -----------------------------------------------------------------------------------------------

    def _read_layers(self) -> dict[int, LayerRecord]:
        found = {}
        for key, raw in self._tables.items("layers"):
            try:
                found[LAYER_KEY.unpack(key)[0]] = LayerRecord.unpack(raw, self._format)
            except (ValueError, TypeError, struct.error) as fault:
                self._wrong_record("layers", key, f"the record of layer {key.hex()}: {fault}")
        for ident, record in self._claims.made.items():
            found.setdefault(ident, record)
        return found

    def _read_records(self) -> None:
        for key, raw in self._tables.items("records"):
            self._report.records += 1
            try:
                unpack_record(key, raw)
            except (ValueError, OSError) as fault:
                self._wrong_record("records", key, f"record {key!r}: {fault}")

    def _wrong_record(self, table: str, key: bytes, text: str) -> None:
        self._report.wrong(text, private=True)
        self._report.mending.entries[table, key] = True

    def _read_hot(self) -> None:
        self._hot = set(self._claims.hot)
        for key, _ in self._tables.items("hot"):
            if len(key) == PAGE_KEY.size:
                self._hot.add(PAGE_KEY.unpack(key))
            else:
                self._report.wrong(f"hot region {key.hex()}: no such key can be")
                self._report.mending.entries["hot", key] = False
        self._report.hot_regions = len(self._hot)

    # -- pages ------------------------------------------------------------------------------------------------

    def _page(self, key: bytes, raw: bytes) -> None:
        ident, number = PAGE_KEY.unpack(key) if len(key) == PAGE_KEY.size else (-1, 0)
        record = self._layers.get(ident)
        where = f"page {number} of layer {ident}"
        if record is None:
            self._bad_page(key, f"{where}: there is no such layer", private=True)
        elif len(raw) != (16 if record.private else 8) * PAGE_BLOCKS:
            self._bad_page(key, f"{where} ('{record.name}') has {len(raw)} bytes", record.private)
        else:
            words = array("Q", raw)
            for i in range(PAGE_BLOCKS):
                entry = entry_at(words, i)
                if any(entry):
                    self._entry(Located(ident, number * PAGE_BLOCKS + i, record, entry))

    def _bad_page(self, key: bytes, text: str, private: bool) -> None:
        self._report.wrong(text, private=private)
        self._report.mending.pages[key] = private

    def _entry(self, found: Located) -> None:
        text, what = found.nonsense(self._device.slots, self._frontier), "index"
        if not text:
            text, what = self._claimed_twice(found), "overlap"
        if text:
            self._wrong_entry(found, text, what)
            return
        counted = self._counted[found.layer]
        for slot, mask in found.entry.places():
            counted[0] += 1
            self._own(slot, found)
            if mask and not found.record.dead:
                self._check_place(found, slot, mask)
        counted[1] += found.entry.valid.bit_count()
        if found.record.private and found.key in self._claims.blocks:
            self._named[found.key] = found

    def _claimed_twice(self, found: Located) -> str:
        slots = [slot for slot, _ in found.entry.places()]
        for slot in slots:
            owner = self._owners[slot]
            if owner or slots.count(slot) > 1:
                other = self._name((owner or found.key + 1) - 1)
                return f"slot {slot} belongs to {other} as well"
        return ""

    def _name(self, key: int) -> str:
        record = self._layers.get(layer_of_key(key))
        layer = f"'{record.name}'" if record else f"layer {layer_of_key(key)}"
        return f"block {block_of_key(key)} of {layer}"

    def _own(self, slot: int, found: Located) -> None:
        self._owners[slot] = found.key + 1
        if found.record.private:
            self._report.private_slots += 1
        else:
            self._report.clean_slots += 1

    def _wrong_entry(self, found: Located, text: str, what: str) -> None:
        record = found.record
        self._report.wrong(
            f"{self._name(found.key)}: {text}",
            what,
            layer=record.name,
            private=record.private,
            offset=found.block * BLOCK,
            length=BLOCK,
            slot=found.entry.slots[0],
        )
        self._report.mending.fixes[found.key] = Fix(record.private and not record.dead, entry=True)

    # -- the device -------------------------------------------------------------------------------------------

    def _check_place(self, found: Located, slot: int, mask: int) -> None:
        self._report.checked_bytes += BLOCK
        mask &= ~self._does_not_count(found)
        bad = mask & ~matching(self._sums(slot), self._tables.sums(slot))
        if bad:
            self._damaged(found.key, found.record, slot, bad)

    def _does_not_count(self, found: Located) -> int:
        """The mask of the sectors that the next start drops, or of which the journal says something newer."""
        if found.record.private:
            claimed = self._claims.blocks.get(found.key)
            return claimed.mask if claimed is not None else 0
        region = found.layer, found.block // PAGE_BLOCKS
        if not self._survived and region in self._hot:
            return FULL
        return self._claims.dropped.get(found.key, 0)

    def _damaged(self, key: int, record: LayerRecord, slot: int, bad: int) -> None:
        report = self._report
        if record.private:
            report.damaged_private += 1
        else:
            report.damaged_clean += 1
        fix = report.mending.fixes.setdefault(key, Fix(record.private))
        fix.sectors |= bad
        sums = self._sums(slot) if slot >= 0 else [0] * SECTORS
        for first, count in sector_runs(bad):
            unread = any(sums[s] == UNREADABLE for s in range(first, first + count))
            report.note(
                Fault(
                    "unreadable" if unread else "checksum",
                    f"{'dirty' if record.private else 'clean'} data of {self._name(key)}",
                    record.name,
                    record.private,
                    block_of_key(key) * BLOCK + first * SECTOR,
                    count * SECTOR,
                    slot,
                )
            )

    # -- the journal ------------------------------------------------------------------------------------------

    def _check_slots_of_journal(self) -> None:
        """Count the slots that only records of the journal name; each must be that block's alone."""
        for slot, key in self._claims.slots.items():
            record = self._layers.get(layer_of_key(key))
            if record is None or record.dead:
                continue  # recovery passes these records over
            if slot >= self._device.slots:
                self._report.wrong(f"{self._name(key)}: the journal names slot {slot}", "journal")
            elif self._owners[slot] not in (0, key + 1):
                other = self._name(self._owners[slot] - 1)
                self._report.wrong(
                    f"{self._name(key)}: the journal has it in slot {slot}, which belongs to {other}",
                    "overlap",
                    layer=record.name,
                    private=record.private,
                    slot=slot,
                )
            elif not self._owners[slot]:
                self._owners[slot] = key + 1
                self._report.private_slots += 1

    def _check_claims(self, key: int) -> None:
        """Note damage unless, for each sector of a block, one of its claims holds, or what the index says."""
        record = self._layers.get(layer_of_key(key))
        if record is None or record.dead:
            return
        found = self._named.get(key)
        if found is None:
            found = Located(layer_of_key(key), block_of_key(key), record, Entry(0))
        claimed = self._claims.blocks[key]
        self._report.checked_bytes += SECTOR * len(claimed.sectors)
        bad = sum(
            1 << sector
            for sector in claimed.sectors
            if self._judge.verdict(claimed, sector, found.entry).is_damaged
        )
        if bad:
            slot = next((s for s, mask in found.entry.places() if mask & bad), NO_SLOT)
            self._damaged(key, record, slot, bad)

    def _lies(self, slot: int, sector: int, value: int) -> bool:
        """For the judge: true if what lies there has that checksum."""
        return slot < self._device.slots and self._sums(slot)[sector] == value

    def _stored(self, slot: int, sector: int) -> int:
        """For the judge: the checksum that the index has."""
        return array("I", self._tables.sums(slot))[sector]

    # -- totals -----------------------------------------------------------------------------------------------

    def _compare_totals(self) -> None:
        """Note layers that do not have as much as they say: readers skip a private layer that says it has nothing."""
        for ident, (slots, sectors) in self._counted.items():
            record = self._layers[ident]
            if record.dead or (record.slots, record.sectors) == (slots, sectors):
                continue
            if ident in self._claims.made or any(
                layer_of_key(key) == ident for key in self._report.mending.fixes
            ):
                continue  # not in the index yet; or what is forgotten counts differently
            self._report.mending.totals = False
            self._report.wrong(
                f"'{record.name}' says {record.slots} slots and {record.sectors} sectors, "
                f"and has {slots} and {sectors}",
                layer=record.name,
                private=record.private,
            )
