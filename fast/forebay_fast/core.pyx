# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, binding=False

"""The compiled core: see fast/README.md.

Each part does what some Python does that its docstring names, on the same objects, in the event loop's thread and
between two awaits. Objects keep their Python types, so whatever is rare is a call of their own methods. The GIL is
given up for system calls and hashing only, and no other thread touches what is in use here.
"""

import os

from cpython.array cimport array
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItemWithError
from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from cpython.object cimport PyObject
from libc.errno cimport EINTR, EIO
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "sector.h" nogil:
    enum: SECTOR_BYTES
    uint32_t sum_of_sector(const uint8_t *sector)
    uint32_t sum_of_sector_portable(const uint8_t *sector)
    void crc_begin()
    uint32_t crc_of(uint32_t crc, const uint8_t *data, size_t length)

cdef extern from "<unistd.h>" nogil:
    ssize_t pwrite(int fd, const void *data, size_t count, int64_t offset)

cdef extern from *:
    """
    #include <errno.h>
    #ifdef FOREBAY_PLANTS
    enum { PLANTS = 1 };
    #else
    enum { PLANTS = 0 };
    #endif
    static inline int last_error(void) { return errno; }
    """
    enum: PLANTS
    int last_error() nogil
    int count_bits "__builtin_popcount"(unsigned int) nogil
    int lowest_bit "__builtin_ctz"(unsigned int) nogil

crc_begin()

# Units, as `forebay_cache.format.geometry` has them, and what words say, as `forebay_cache.format.entry` does.
cdef enum:
    BLOCK = 65536
    SECTORS = 16
    PAGE_BLOCKS = 64
    IN_SECTOR = SECTOR_BYTES - 1
    TOUCHED = 1      # slots.placement
    CHANGED = 2      # index.sums
    WRITE = 1        # format.ops
    RECORD = 16      # bytes of a record before its checksums
    MIXED = -1
    ALL_ZERO = -2
    RECORDS = 8192   # bytes of records that are gathered before they are noted

ZERO_BLOCK = bytes(BLOCK)

bugs = frozenset()
"""What tests have planted, by name; of no effect unless it was compiled with --plants."""
has_plants = bool(PLANTS)
"""True if bugs can be planted."""

cdef bint writes_by_python = False


def write_by_python(bint wanted):
    """Have the cache device written by `Device.write`, so that who stands in for the system sees each write."""
    global writes_by_python
    writes_by_python = wanted


def checksum(sector, *, bint portable=False):
    """The checksum of one sector, as `forebay_cache.format.checksum.checksum`.

    `portable`: by the code for processors without AVX2. Raises ValueError for anything but 4096 bytes.
    """
    cdef Py_buffer view
    cdef const uint8_t *at
    PyObject_GetBuffer(sector, &view, PyBUF_SIMPLE)
    try:
        if view.len != SECTOR_BYTES:
            raise ValueError(f"{view.len} bytes are no sector")
        at = <const uint8_t *> view.buf
        return sum_of_sector_portable(at) if portable else sum_of_sector(at)
    finally:
        PyBuffer_Release(&view)


def crc32(data, uint32_t crc=0):
    """As `zlib.crc32`."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return crc_of(crc, <const uint8_t *> view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


# --- words of pages --------------------------------------------------------------------------------------------------


cdef inline uint32_t mask_of(uint32_t start, uint32_t length) noexcept nogil:
    """`geometry.covered`: the sectors that a byte range inside one block touches."""
    return (2 << ((start + length - 1) >> 12)) - (1 << (start >> 12))


cdef inline int64_t slot_of(uint64_t word) noexcept nogil:
    return <int64_t> (word >> 32) - 1


cdef inline uint32_t moved(uint64_t word, uint64_t second, uint32_t mask, uint32_t staying) noexcept nogil:
    """`entry.moved`: which sectors of `mask` go to the second slot."""
    if not word >> 32 and not second >> 32:
        return 0
    return <uint32_t> ((second ^ word & ~<uint64_t> staying) & mask & word)


cdef inline int64_t whole_slot(uint64_t word, uint64_t second, uint32_t need) noexcept nogil:
    """`entry.whole_private_slot`, and with 0 for `second` `entry.whole_slot`."""
    cdef uint64_t both = need | <uint64_t> need << 16, found = word & both
    cdef uint32_t side = second & need
    if found != need:
        return ALL_ZERO if found == both else MIXED
    if not side:
        return slot_of(word)
    return slot_of(second) if side == need else MIXED


cdef inline void *memory_of(object view) noexcept:
    return PyMemoryView_GET_BUFFER(view).buf


cdef inline object page_at(object by_number, object pages, object number):
    """The page, None where it has to be loaded. A dict that makes pages up does so only in `look`."""
    cdef PyObject *found = PyDict_GetItemWithError(by_number, number)
    return <object> found if found != NULL else pages.look(number)


# --- reading ---------------------------------------------------------------------------------------------------------


cdef class Reads:
    """The reads of one view that can be answered at once: see `forebay_cache.read.view.View.read_now`."""

    cdef object view
    cdef object map_view, ready_view
    cdef const uint8_t *map
    cdef uint16_t *ready
    cdef uint8_t *state
    cdef uint64_t data_offset, lookahead
    cdef list tables
    cdef int privates
    cdef bint trusting

    def __init__(self, view):
        self.view = view
        self.data_offset = view.cache.device.data_offset

    cdef int refresh(self) except -1:
        """Look at the view anew. Needed after whatever may have changed it, which is any await and any write."""
        view = self.view
        if view._map is not self.map_view:
            self.map_view = view._map
            self.map = <const uint8_t *> memory_of(self.map_view)
        if view._ready is not self.ready_view:
            self.ready_view = view._ready
            self.ready = <uint16_t *> memory_of(self.ready_view)
        self.state = <uint8_t *> PyByteArray_AS_STRING(view._state)
        self.lookahead = view.lookahead
        self.trusting = PLANTS and "stale ready" in bugs
        self.tables = [layer.pages for layer in view.private if layer.sectors]
        self.privates = <int> len(self.tables)
        if view.clean is not None:
            self.tables.append(view.clean.pages)
        return 0

    cdef int64_t one_slot(self, uint64_t block, uint32_t need) except? -3:
        """The slot in which all of these sectors lie ready, ALL_ZERO, or MIXED: somebody else has to look."""
        cdef int k = 0, i = block & 63
        cdef array page
        cdef uint64_t word, second
        cdef int64_t slot
        number = block >> 6
        for pages in self.tables:
            found = page_at(pages.by_number, pages, number)
            if found is None:
                return MIXED
            page = found
            word = page.data.as_ulonglongs[i]
            second = page.data.as_ulonglongs[PAGE_BLOCKS + i] if k < self.privates else 0
            if k == self.privates or word & need:
                slot = whole_slot(word, second, need)
                if slot >= 0:
                    if self.ready[slot] & need != need and not self.trusting:
                        return MIXED
                    if k == self.privates:
                        self.state[slot] |= TOUCHED
                return slot
            k += 1
        return MIXED

    def read_now(self, uint64_t offset, uint64_t length):
        """As `View.read_now`."""
        cdef uint32_t start = offset & (BLOCK - 1)
        cdef int64_t slot
        self.refresh()
        if not length or start + length > BLOCK or offset >= self.lookahead:
            return None
        slot = self.one_slot(offset >> 16, mask_of(start, <uint32_t> length))
        if slot == MIXED:
            return None
        self.view.hits += 1
        self.view.read_bytes += length
        if slot == ALL_ZERO:
            return ZERO_BLOCK[:length] if length != BLOCK else ZERO_BLOCK
        at = self.data_offset + (<uint64_t> slot << 16) + start
        return self.map_view[at : at + length]


# --- writing ---------------------------------------------------------------------------------------------------------


cdef struct Piece:
    # sectors in a row that go to one place
    const uint8_t *data
    uint64_t at       # on the device, bytes
    uint32_t length


cdef int written_at(int fd, Piece *pieces, int count) noexcept nogil:
    """Write the pieces; 0, or the number of the error."""
    cdef int n
    cdef ssize_t part
    cdef uint32_t done
    for n in range(count):
        done = 0
        while done < pieces[n].length:
            part = pwrite(fd, pieces[n].data + done, pieces[n].length - done, pieces[n].at + done)
            if part < 0 and last_error() == EINTR:
                continue
            if part <= 0:
                return last_error() if part < 0 else EIO
            done += <uint32_t> part
    return 0


cdef class Writes:
    """The writes of one cache into private layers: see `forebay_cache.blocks.private`, which has the rules.

    Made of the parts of a cache, and not of the cache, which holds it.
    """

    cdef object failure, pace, timing, publisher, intent, sums, ready, slots, device, empty
    cdef object values_view, state_view, masks_view
    cdef uint32_t *values
    cdef uint8_t *state
    cdef uint16_t *masks
    cdef uint64_t data_offset
    cdef int fd
    # of a run: what is done to its layer, and is not yet told
    cdef object layer, pages, by_number
    cdef dict syncing, open_sectors
    cdef set dirty
    cdef uint64_t layer_id, first_key
    cdef int64_t more_sectors, more_slots
    cdef uint8_t records[RECORDS]
    cdef int recorded
    cdef bint two_sided, careless

    def __init__(self, failure, threads, publisher, intent, sums, ready, slots, device, *, timing, empty):
        """`timing`: the module that has the clock. `empty`: the page that stands for those that hold nothing."""
        self.failure = failure
        self.pace = threads.pace
        self.timing = timing
        self.publisher = publisher
        self.intent = intent
        self.sums = sums
        self.ready = ready
        self.slots = slots
        self.device = device
        self.empty = empty
        self.fd = device.fd
        self.data_offset = device.data_offset

    cdef int begin(self, layer) except -1:
        """Take what the cache is made of anew, and begin to write to a layer."""
        cdef object values = self.sums.values, state = self.sums.state, masks = self.ready.masks
        if values is not self.values_view:
            self.values_view, self.values = values, <uint32_t *> memory_of(values)
        if state is not self.state_view:
            self.state_view, self.state = state, <uint8_t *> memory_of(state)
        if masks is not self.masks_view:
            self.masks_view, self.masks = masks, <uint16_t *> memory_of(masks)
        self.layer = layer
        self.layer_id = layer.id
        self.pages = layer.pages
        self.by_number, self.dirty = self.pages.by_number, self.pages.dirty
        self.first_key = self.pages.first_key
        self.syncing, self.open_sectors = self.intent.syncing, self.intent.open_sectors
        self.more_sectors = self.more_slots = 0
        self.recorded = 0
        self.careless = PLANTS and "wrong side" in bugs
        return 0

    cdef int tell(self) except -1:
        """Have intent and layer know what was done since :meth:`begin`, or the last call."""
        if self.recorded:
            record = PyBytes_FromStringAndSize(<char *> self.records, self.recorded)
            self.recorded = 0
            self.intent.note(record)
        if self.more_sectors:
            self.layer.sectors += self.more_sectors
        if self.more_slots:
            self.layer.slots += self.more_slots
        self.more_sectors = self.more_slots = 0
        return 0

    def run(self, layer, list writes):
        """As `private.write_run`. Raises OSError."""
        cdef Py_ssize_t taken = 0, total = 0
        cdef double began, now, slow
        cdef Py_buffer *data
        cdef uint64_t offset
        if self.failure.error is not None:
            self.failure.check()
        if self.pace.is_slow and self.publisher.needs_thread:
            return 0
        for _, view in writes:
            if not isinstance(view, memoryview):
                raise TypeError(f"{type(view)} is no memoryview")
            total += PyMemoryView_GET_BUFFER(view).len
        if not self.intent.has_room(total):
            return 0
        clock = self.timing.clock
        slow = self.timing.SLOW_SECONDS
        began = clock()
        self.begin(layer)
        try:
            try:
                for place, view in writes:
                    offset, data = place, PyMemoryView_GET_BUFFER(view)
                    if (offset | <uint64_t> data.len) & IN_SECTOR or not self.write(offset, data, view):
                        break
                    taken += 1
                    now = clock()
                    if now - began > slow and self.pace.note_write_of_loop(now - began):
                        break
                    began = now
            finally:
                self.tell()
        except OSError as error:
            self.failure.fail(error)
            if not taken:
                raise
        finally:
            self.layer = self.pages = None
        return taken

    cdef int write(self, uint64_t offset, Py_buffer *data, view) except -1:
        """As `private.write`: 1 if it was done. Raises OSError."""
        cdef uint32_t start = offset & (BLOCK - 1)
        cdef Py_ssize_t at = 0, part
        cdef int done = 1
        if start + data.len <= BLOCK:
            self.two_sided = False
            done = self.write_block(offset, <const uint8_t *> data.buf, <uint32_t> data.len, view, 0)
            if done or not self.two_sided:
                return done
            self.tell()
            self.intent.publish()
            return 0
        self.tell()
        if not self.intent.has_room(data.len):
            return 0
        try:
            while at < data.len:
                part = min(BLOCK - <Py_ssize_t> ((offset + at) & (BLOCK - 1)), data.len - at)
                if not self.write_block(offset + at, <const uint8_t *> data.buf + at, <uint32_t> part, view, at):
                    self.tell()
                    self.intent.publish()  # what it wrote of `view` so far may be late data, and `view` may change
                    return 0
                at += part
        except OSError as error:
            self.tell()
            self.failure.fail(error)
            try:
                self.intent.publish()
            except OSError:
                pass
            raise
        return 1

    cdef int write_block(
        self, uint64_t offset, const uint8_t *data, uint32_t length, view, Py_ssize_t within
    ) except -1:
        """As `private._write_block`, for `length` bytes of `view` from byte `within` on, which lie at `data`.

        1 if it was done, 0 if something has to be waited for first. Raises OSError; then nothing was done either.
        """
        cdef uint64_t block = offset >> 16, word, second
        cdef uint32_t start = offset & (BLOCK - 1), first = start >> 12, mask = mask_of(start, length), opened = 0
        cdef uint32_t part[2]
        cdef int64_t slot[2]
        cdef int64_t had[2]
        cdef uint32_t found[SECTORS]
        cdef Piece pieces[SECTORS]
        cdef int side, count = 0, error = 0, missing = 0, i = block & 63
        cdef array page
        cdef uint64_t *words
        cdef PyObject *value
        number = block >> 6
        at_hand = page_at(self.by_number, self.pages, number)
        if at_hand is None:
            return 0
        page = at_hand
        words = <uint64_t *> page.data.as_ulonglongs
        key = self.layer_id << 32 | block
        if self.syncing:
            value = PyDict_GetItemWithError(self.syncing, key)
            if value != NULL and <uint32_t> <object> value & mask:
                return 0
        value = PyDict_GetItemWithError(self.open_sectors, key)
        if value != NULL:
            opened = <object> value
        word, second = words[i], words[PAGE_BLOCKS + i]
        part[1] = moved(word, second, mask, opened)
        if self.careless:
            part[1] = <uint32_t> (second & mask & word)
        part[0] = mask & ~part[1]
        slot[0] = had[0] = slot_of(word)
        slot[1] = had[1] = slot_of(second)
        self.two_sided = part[0] and part[1]
        for side in range(2):
            missing += part[side] and slot[side] < 0
        if missing and missing > self.slots.placement.free:
            self.slots.want_eviction()
            return 0
        for side in range(2):
            if part[side] and slot[side] >= 0 and self.state[slot[side]] != CHANGED:
                if not self.sums.change(slot[side]):
                    return 0
        for side in range(2):
            if part[side] and slot[side] < 0:
                slot[side] = self.slots.take(key, held=self.layer.is_held)
                if slot[side] < 0:
                    self.give_back(slot, had)
                    return 0
        for side in range(2):
            if not opened & part[side]:
                count += self.cut(slot[side], part[side], data, first, pieces + count)
        if writes_by_python:
            self.hash(data, length, found)
            try:
                for n in range(count):
                    at = within + (pieces[n].data - data)
                    self.device.write(pieces[n].at, view[at : at + pieces[n].length])
            except BaseException:
                self.give_back(slot, had)
                raise
        else:
            with nogil:
                self.hash(data, length, found)
                error = written_at(self.fd, pieces, count)
            if error:
                self.give_back(slot, had)
                raise OSError(error, os.strerror(error))
        for side in range(2):
            if part[side]:
                if opened & part[side]:
                    self.write_later(slot[side], part[side], data, first, view, within)
                self.note(side, slot[side], part[side], block, found - first)
                self.masks[slot[side]] |= part[side]
        if page is self.empty:
            page = self.pages.writable(number)
            words = <uint64_t *> page.data.as_ulonglongs
        else:
            self.dirty.add(self.first_key | block >> 6)
        self.more_slots += (slot[0] != had[0]) + (slot[1] != had[1])
        self.more_sectors += count_bits(<uint32_t> (mask & ~word))
        words[i] = (word & 0xFFFFFFFF & ~(<uint64_t> mask << 16)) | mask | <uint64_t> (slot[0] + 1) << 32
        words[PAGE_BLOCKS + i] = (second & 0xFFFFFFFF & ~<uint64_t> mask) | part[1] | <uint64_t> (slot[1] + 1) << 32
        self.open_sectors[key] = opened | mask
        return 1

    cdef int cut(self, int64_t slot, uint32_t mask, const uint8_t *data, uint32_t first, Piece *pieces) noexcept nogil:
        """Put the sectors of `mask`, which go to `slot`, into pieces; how many. `data` begins at sector `first`."""
        cdef int count = 0
        cdef uint32_t low, run
        while mask:
            low = lowest_bit(mask)
            run = lowest_bit(~(mask >> low))
            pieces[count].data = data + (low - first) * SECTOR_BYTES
            pieces[count].at = self.data_offset + (<uint64_t> slot << 16) + low * SECTOR_BYTES
            pieces[count].length = run * SECTOR_BYTES
            count += 1
            mask &= ~(((1 << run) - 1) << low)
        return count

    cdef void hash(self, const uint8_t *data, uint32_t length, uint32_t *found) noexcept nogil:
        cdef uint32_t n
        for n in range(length >> 12):
            found[n] = sum_of_sector(data + n * SECTOR_BYTES)

    cdef int write_later(
        self, int64_t slot, uint32_t mask, const uint8_t *data, uint32_t first, view, Py_ssize_t within
    ) except -1:
        """Have it written behind its record. Before the checksums are changed: intent remembers those."""
        cdef Piece pieces[SECTORS]
        cdef int n
        for n in range(self.cut(slot, mask, data, first, pieces)):
            at = within + (pieces[n].data - data)
            self.intent.write_later(slot, mask, pieces[n].at, view[at : at + pieces[n].length])
        return 0

    cdef int note(self, int side, int64_t slot, uint32_t mask, uint64_t block, uint32_t *found) except -1:
        """Have sums and a record (`ops.write`) say what was written. `found`: the checksums, by sector."""
        cdef uint8_t *record
        cdef uint16_t sectors = <uint16_t> mask
        cdef uint32_t field, n
        if self.recorded + RECORD + 4 * SECTORS > RECORDS:
            self.tell()
        record = self.records + self.recorded
        record[0], record[1] = WRITE, <uint8_t> side
        memcpy(record + 2, &sectors, 2)
        field = <uint32_t> self.layer_id
        memcpy(record + 4, &field, 4)
        field = <uint32_t> block
        memcpy(record + 8, &field, 4)
        field = <uint32_t> slot
        memcpy(record + 12, &field, 4)
        self.recorded += RECORD
        while mask:
            n = lowest_bit(mask)
            self.values[slot * SECTORS + n] = found[n]
            memcpy(self.records + self.recorded, found + n, 4)
            self.recorded += 4
            mask &= mask - 1
        return 0

    cdef int give_back(self, int64_t *slot, int64_t *had) except -1:
        """What was taken is of no use."""
        cdef int side
        for side in range(2):
            if slot[side] != had[side] and slot[side] >= 0:
                self.slots.abandon(slot[side])
        return 0
