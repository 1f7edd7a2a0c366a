# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, binding=False

"""The compiled core: see fast/README.md.

Each part does what some Python does that its docstring names, on the same objects, in the event loop's thread and
between two awaits. Objects keep their Python types, so whatever is rare is a call of their own methods. The GIL is
given up for system calls and hashing only, and no other thread touches what is in use here.
"""

import os

cimport cython
from cpython.array cimport array
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItemWithError
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EINTR, EIO, ENOENT
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove, memset

cdef extern from "sector.h" nogil:
    enum: SECTOR_BYTES
    uint32_t sum_of_sector(const uint8_t *sector)
    uint32_t sum_of_sector_portable(const uint8_t *sector)
    void crc_begin()
    uint32_t crc_of(uint32_t crc, const uint8_t *data, size_t length)

cdef extern from "<unistd.h>" nogil:
    ssize_t pwrite(int fd, const void *data, size_t count, int64_t offset)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events, revents
    struct timespec:
        long tv_sec
        long tv_nsec
    int ppoll(pollfd *fds, unsigned long count, const timespec *timeout, void *signals)
    short POLLIN

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int what, unsigned long value)
    enum: PR_SET_TIMERSLACK

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long what, int *value)

cdef extern from "<linux/sockios.h>" nogil:
    enum: SIOCOUTQ

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int what, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int most, int milliseconds)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLIN, EPOLLOUT, EPOLLONESHOT

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<endian.h>" nogil:
    uint64_t htobe64(uint64_t)
    uint64_t be64toh(uint64_t)
    uint32_t htobe32(uint32_t)
    uint32_t be32toh(uint32_t)

cdef extern from "<sys/socket.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int sock, msghdr *message, int flags)
    ssize_t recv(int sock, void *space, size_t length, int flags)
    int MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from *:
    """
    #include <errno.h>
    #include <time.h>
    #ifdef FOREBAY_PLANTS
    enum { PLANTS = 1 };
    #else
    enum { PLANTS = 0 };
    #endif
    static inline int last_error(void) { return errno; }
    static inline double seconds_now(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec + now.tv_nsec * 1e-9;
    }
    """
    enum: PLANTS
    int last_error() nogil
    double seconds_now() nogil
    int count_bits "__builtin_popcount"(unsigned int) nogil
    int lowest_bit "__builtin_ctz"(unsigned int) nogil
    int leading_zeros "__builtin_clzll"(unsigned long long) nogil

crc_begin()

# Units, as `forebay_cache.format.geometry` has them, and what words say, as `forebay_cache.format.entry` does.
cdef enum:
    BLOCK = 65536
    SECTORS = 16
    FULL = 0xFFFF
    MANY_RUNS = 4    # blocks.private
    PAGE_BLOCKS = 64
    NUMBERED = 131072  # index.pages
    TABLES = 16        # layers of a view that are looked through here
    IN_SECTOR = SECTOR_BYTES - 1
    TOUCHED = 1      # slots.placement
    CHANGED = 2      # index.sums
    HITS = 0         # read.view
    READ_BYTES = 1
    WRITE = 1        # format.ops
    RECORD = 16      # bytes of a record before its checksums
    MIXED = -1
    ALL_ZERO = -2
    LIMIT = 0        # slots.samples
    USED = 1
    VISITS = 2
    SAMPLES = 512
    HIT = 0
    PUT = 2
    RECORDS = 8192   # bytes of records that are gathered before they are noted
    TIME_UNIT = 250  # forebay_fast.latency: nanoseconds
    TIME_BUCKETS = 110
    TIME_SUM = TIME_BUCKETS
    TIME_MAX = TIME_BUCKETS + 1
    TIME_WIDTH = TIME_BUCKETS + 2
    TIMED_HIT = 0
    TIMED_MISS = 1
    TIMED_WRITE = 2
    TIMED_FLUSH = 3
    TIMED_KINDS = 4

ZERO_BLOCK = bytes(BLOCK)
cdef const uint8_t *zeros = <const uint8_t *> PyBytes_AS_STRING(ZERO_BLOCK)

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


# --- how long requests took ------------------------------------------------------------------------------------------


cdef double LONGEST = 1e6  # seconds


cdef inline void note_time(uint64_t *counts, int kind, double seconds, uint64_t times) noexcept nogil:
    """`forebay_fast.latency.Latency.note`."""
    cdef uint64_t nanoseconds = <uint64_t> (min(seconds, LONGEST) * 1e9) if seconds > 0 else 0
    cdef uint64_t units = nanoseconds // TIME_UNIT
    cdef int octave, bucket = 0
    counts += kind * TIME_WIDTH
    if units >= 4:
        octave = 61 - leading_zeros(units)
        bucket = 4 * octave + <int> (units >> octave & 3) + 1
        if bucket >= TIME_BUCKETS:
            bucket = TIME_BUCKETS - 1
    counts[bucket] += times
    counts[TIME_SUM] += nanoseconds * times
    if nanoseconds > counts[TIME_MAX]:
        counts[TIME_MAX] = nanoseconds


def note_latency(array counts, int kind, double seconds, uint64_t times):
    """`Latency.note` as the core does it, for comparison. Raises IndexError for a kind that has no words there."""
    if not 0 <= kind < len(counts) // TIME_WIDTH:
        raise IndexError(f"there is no kind {kind}")
    note_time(<uint64_t *> counts.data.as_ulonglongs, kind, seconds, times)


# --- words of pages --------------------------------------------------------------------------------------------------


cdef inline uint32_t mask_of(uint32_t start, uint32_t length) noexcept nogil:
    """`geometry.covered`: the sectors that a byte range inside one block touches."""
    return (2 << ((start + length - 1) >> 12)) - (1 << (start >> 12))


cdef inline int64_t slot_of(uint64_t word) noexcept nogil:
    return <int64_t> (word >> 32) - 1


cdef inline uint32_t moved(uint64_t word, uint64_t second, uint32_t mask, uint32_t staying) noexcept nogil:
    """`entry.moved`: which sectors of `mask` go to the second slot."""
    cdef uint32_t tied, sides, loose, follow
    if not word >> 32 and not second >> 32:
        return 0
    tied = <uint32_t> (word & (~(word >> 16) | staying)) & FULL
    sides = (<uint32_t> second ^ mask & ~staying) & tied
    if not mask & ~tied:
        return sides & mask
    loose = FULL & ~tied
    follow = loose & ~(loose + (sides << 1 & loose))
    if sides & tied & -tied:
        follow |= (tied & -tied) - 1
    return (sides | follow) & mask


cdef inline int runs_of(uint32_t target) noexcept nogil:
    """`entry.runs_of`: in how many runs a whole block is written, of which `target` goes to the second slot."""
    return count_bits((target ^ target >> 1) & FULL >> 1) + 1


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


cdef inline uint64_t *addresses_of(object pages) except NULL:
    """Where a PageTable keeps addresses of pages, by their numbers."""
    addresses = pages.addresses
    return <uint64_t *> memory_of(pages.table_of_addresses() if addresses is None else addresses)


cdef uint64_t *words_of(object pages, uint64_t number, uint64_t *addresses) except? NULL:
    """Where the words of a page lie that `addresses` does not have yet; NULL: it has to be loaded."""
    cdef array page
    cdef uint64_t *words
    found = pages.look(number)
    if found is None:
        return NULL
    page = found
    words = <uint64_t *> page.data.as_ulonglongs
    if number < NUMBERED:
        addresses[number] = <uint64_t> words
    return words


cdef inline uint64_t *words_at(object pages, uint64_t number, uint64_t *addresses) except? NULL:
    """Where the words of a page lie; NULL: it has to be loaded. `addresses` are those of the pages: PageTable has them.

    They stay there until something is awaited, or done to a page by Python.
    """
    if number < NUMBERED and addresses[number]:
        return <uint64_t *> addresses[number]
    return words_of(pages, number, addresses)


# --- reading ---------------------------------------------------------------------------------------------------------


cdef class Reads:
    """The reads of one view that can be answered at once: see `forebay_cache.read.view.View.read_now`."""

    cdef object view
    cdef object map_view, ready_view
    cdef const uint8_t *map
    cdef uint16_t *ready
    cdef uint8_t *state
    cdef uint64_t data_offset, lookahead
    cdef list layers, tables  # that are looked through, and their pages
    cdef uint64_t *addresses[TABLES]
    cdef int privates, count
    cdef bint trusting
    cdef object clean, samples
    cdef array counted        # of the view
    cdef uint64_t *counts
    cdef uint64_t first_key
    cdef uint64_t *head
    cdef uint64_t *keys
    cdef uint64_t *times
    cdef uint8_t *kinds

    def __init__(self, view):
        self.view = view
        self.data_offset = view.cache.device.data_offset
        self.layers, self.tables = [], []
        self.counted = view.counted
        self.counts = <uint64_t *> self.counted.data.as_ulonglongs
        self.samples = samples = view.cache.slots.samples
        self.head = <uint64_t *> (<array> samples.head).data.as_ulonglongs
        self.keys = <uint64_t *> (<array> samples.keys).data.as_ulonglongs
        self.times = <uint64_t *> (<array> samples.counts).data.as_ulonglongs
        self.kinds = <uint8_t *> PyByteArray_AS_STRING(samples.kinds)

    cdef int refresh(self) except -1:
        """Look at the view anew. Needed after whatever may have changed it, which is any await and any write."""
        cdef int count
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
        count = 0
        for layer in view.private:
            if layer.sectors:
                self.take(count, layer)
                count += 1
        self.privates = count
        clean = view.clean
        if clean is not None:
            self.take(count, clean)
            count += 1
            if clean is not self.clean:
                self.clean, self.first_key = clean, <uint64_t> clean.id << 32
        if len(self.layers) > count:
            del self.layers[count:], self.tables[count:]
        self.count = count if count <= TABLES else 0
        return 0

    cdef int take(self, int n, layer) except -1:
        """Look through this layer as the n-th one. Its pages are the same object for ever, their addresses are not."""
        if n == len(self.layers):
            self.layers.append(layer)
            self.tables.append(layer.pages)
        elif self.layers[n] is not layer:
            self.layers[n], self.tables[n] = layer, layer.pages
        if n < TABLES:
            self.addresses[n] = addresses_of(self.tables[n])
        return 0

    cdef int64_t one_slot(self, uint64_t block, uint32_t need) except? -3:
        """The slot in which all of these sectors lie ready, ALL_ZERO, or MIXED: somebody else has to look."""
        cdef int k, i = block & 63
        cdef uint64_t *words
        cdef uint64_t word, second
        cdef int64_t slot
        for k in range(self.count):
            words = words_at(self.tables[k], block >> 6, self.addresses[k])
            if words == NULL:
                return MIXED
            word = words[i]
            second = words[PAGE_BLOCKS + i] if k < self.privates else 0
            if k == self.privates or word & need:
                slot = whole_slot(word, second, need)
                if slot >= 0:
                    if self.ready[slot] & need != need and not self.trusting:
                        return MIXED
                    if k == self.privates:
                        self.touch(slot, block)
                return slot
        return MIXED

    cdef bint sectors(self, uint64_t block, uint32_t need, const uint8_t **where) except -1:
        """Where in memory each of these sectors lies. False: not all of them are ready, or are in any layer.

        As `read.plan.plan` has it: sectors of a block may lie in several layers, and on both sides of each.
        """
        cdef int k, i = block & 63
        cdef uint32_t hit, zero, side, main, n
        cdef uint64_t *words
        cdef uint64_t word, second
        cdef int64_t slot, other
        for k in range(self.count):
            words = words_at(self.tables[k], block >> 6, self.addresses[k])
            if words == NULL:
                return False
            word = words[i]
            second = words[PAGE_BLOCKS + i] if k < self.privates else 0
            hit = word & need
            zero = word >> 16 & hit
            side = second & hit & ~zero
            main = hit & ~zero & ~side
            slot, other = slot_of(word), slot_of(second)
            if main and (slot < 0 or self.ready[slot] & main != main):
                return False
            if side and (other < 0 or self.ready[other] & side != side):
                return False
            if main and k == self.privates:
                self.touch(slot, block)
            need &= ~hit
            while hit:
                n = lowest_bit(hit)
                if zero >> n & 1:
                    where[n] = zeros
                else:
                    where[n] = self.place(other if side >> n & 1 else slot, n * SECTOR_BYTES)
                hit &= hit - 1
            if not need:
                return True
        return False

    cdef inline void touch(self, int64_t slot, uint64_t block) noexcept:
        """A block of the clean layer is read: for the placement, and `Samples.note` of `slots.samples`."""
        cdef uint64_t n, key = self.first_key + block
        self.state[slot] |= TOUCHED
        if key * <uint64_t> 0x9E3779B97F4A7C15 >= self.head[LIMIT]:
            return
        n = self.head[USED]
        if 0 < n <= SAMPLES and self.keys[n - 1] == key and self.kinds[n - 1] != PUT:
            self.times[n - 1] += 1
            return
        if n < SAMPLES:
            self.keys[n], self.kinds[n], self.times[n] = key, HIT, 1
        self.head[USED] = n + 1

    cdef inline void note_hit(self, uint64_t length) noexcept:
        self.counts[HITS] += 1
        self.counts[READ_BYTES] += length

    cdef int note_waited(self) except -1:
        """What was noted as a hit just now came from the origin: somebody waited for it."""
        self.counts[HITS] -= 1
        self.view.misses += 1
        return 0

    cdef inline const uint8_t *place(self, int64_t slot, uint32_t start) noexcept:
        return self.map + self.data_offset + (<uint64_t> slot << 16) + start

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
        self.note_hit(length)
        self.head[VISITS] += 1
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


cdef struct LatePiece:
    Piece piece
    int64_t slot
    uint32_t mask
    Py_ssize_t within  # its view
    uint32_t before[SECTORS]


cdef class Late:
    """Data of a run that is written behind its records: a `LateRun` of `forebay_cache.durable.intent`."""

    cdef object device, make
    cdef list views
    cdef LatePiece *known
    cdef int count, room

    def __init__(self, device, make):
        """`make`: what stands for one piece there."""
        self.device, self.make = device, make
        self.views = []

    def __dealloc__(self):
        free(self.known)

    cdef LatePiece *add(self, Piece *piece, int64_t slot, uint32_t mask, view, Py_ssize_t within) except NULL:
        cdef LatePiece *more = self.known
        if self.count == self.room:
            self.room = 2 * self.room + 16
            more = <LatePiece *> realloc(self.known, self.room * sizeof(LatePiece))
            if more == NULL:
                raise MemoryError
            self.known = more
        more = &self.known[self.count]
        self.views.append(view)
        self.count += 1
        more.piece, more.slot, more.mask, more.within = piece[0], slot, mask, within
        return more

    def write(self):
        """Write all of them. Raises OSError."""
        cdef int n, error = 0, fd = self.device.fd
        if writes_by_python:
            for piece in self.pieces():
                self.device.write(piece.at, piece.data)
            return
        with nogil:
            for n in range(self.count):
                error = written_at(fd, &self.known[n].piece, 1)
                if error:
                    break
        if error:
            raise OSError(error, os.strerror(error))

    def pieces(self):
        """Each of them."""
        cdef LatePiece *one
        cdef int n, k
        found = []
        for n in range(self.count):
            one = &self.known[n]
            data = self.views[n][one.within : one.within + one.piece.length]
            before = [one.before[k] for k in range(<int> one.piece.length >> 12)]
            found.append(self.make(one.slot, one.mask, one.piece.at, data, before))
        return found


cdef class Writes:
    """The writes of one cache into private layers: see `forebay_cache.blocks.private`, which has the rules.

    Made of the parts of a cache, and not of the cache, which holds it.
    """

    cdef object failure, pace, timing, publisher, intent, sums, ready, slots, device, empty, late_piece
    cdef array latency
    cdef uint64_t *times
    cdef object values_view, state_view, masks_view
    cdef uint32_t *values
    cdef uint8_t *state
    cdef uint16_t *masks
    cdef uint64_t data_offset
    cdef int fd
    # of a run: what is done to its layer, and is not yet told
    cdef object layer, pages
    cdef uint64_t *addresses
    cdef const uint64_t *empty_words
    cdef dict syncing, open_sectors
    cdef set dirty
    cdef uint64_t layer_id, first_key
    cdef int64_t more_sectors, more_slots
    cdef Late late
    cdef uint8_t records[RECORDS]
    cdef int recorded
    cdef bint two_sided, careless

    def __init__(self, failure, threads, publisher, intent, sums, ready, slots, device, *, timing, empty, late):
        """`timing`: the module that has the clock. `empty`: the page that stands for those that hold nothing. `late`:
        what stands for data that is written behind its record.
        """
        self.latency = threads.pace.latency.counts
        self.times = <uint64_t *> self.latency.data.as_ulonglongs
        self.failure = failure
        self.pace = threads.pace
        self.timing = timing
        self.publisher = publisher
        self.intent = intent
        self.sums = sums
        self.ready = ready
        self.slots = slots
        self.device = device
        self.empty, self.late_piece = empty, late
        self.empty_words = <uint64_t *> (<array> empty).data.as_ulonglongs
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
        self.addresses, self.dirty = addresses_of(self.pages), self.pages.dirty
        self.first_key = self.pages.first_key
        self.syncing, self.open_sectors = self.intent.syncing, self.intent.open_sectors
        self.more_sectors = self.more_slots = 0
        self.recorded = 0
        self.careless = PLANTS and "wrong side" in bugs
        return 0

    cdef int tell(self) except -1:
        """Have intent and layer know what was done since :meth:`begin`, or the last call. A publish may follow."""
        self.late = None
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
                    note_time(self.times, 0, now - began, 1)
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
        cdef int64_t replaced = -1
        cdef uint64_t *words = words_at(self.pages, block >> 6, self.addresses)
        cdef PyObject *value
        if words == NULL:
            return 0
        key = self.layer_id << 32 | block
        if self.syncing:
            value = PyDict_GetItemWithError(self.syncing, key)
            if value != NULL and <uint32_t> <object> value & mask and not (PLANTS and "check skipped" in bugs):
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
        if mask == FULL and runs_of(part[1]) >= MANY_RUNS and self.slots.has_plenty:
            replaced, slot[0] = slot[0], -1
            part[0], part[1], opened = FULL, 0, 0
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
        if words == self.empty_words:
            self.pages.writable(block >> 6)
            words = words_of(self.pages, block >> 6, self.addresses)
        else:
            self.dirty.add(self.first_key | block >> 6)
        self.more_slots += (slot[0] != had[0]) + (slot[1] != had[1]) - (replaced >= 0)
        self.more_sectors += count_bits(<uint32_t> (mask & ~word))
        words[i] = (word & 0xFFFFFFFF & ~(<uint64_t> mask << 16)) | mask | <uint64_t> (slot[0] + 1) << 32
        words[PAGE_BLOCKS + i] = (second & 0xFFFFFFFF & ~<uint64_t> mask) | part[1] | <uint64_t> (slot[1] + 1) << 32
        self.open_sectors[key] = opened | mask
        if replaced >= 0:
            self.slots.abandon(replaced)
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
        cdef LatePiece *one
        cdef uint64_t sector
        cdef int n
        if self.late is None:
            self.late = Late(self.device, self.late_piece)
            self.intent.write_run_later(self.late)
        for n in range(self.cut(slot, mask, data, first, pieces)):
            one = self.late.add(&pieces[n], slot, mask, view, within + (pieces[n].data - data))
            sector = (pieces[n].at - self.data_offset) >> 12
            memcpy(one.before, self.values + sector, 4 * (pieces[n].length >> 12))
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


# --- a turn of a connection ------------------------------------------------------------------------------------------

WAIT, YIELD, OTHER, UNSENT, GONE = range(5)
"""Why :meth:`Turn.run` returned; see there."""

cdef enum:
    HEADER = 28                # wire.REQUEST
    SIMPLE = 16                # wire.SIMPLE_REPLY
    CHUNK = 28                 # wire.DATA_CHUNK_FAST
    MAX_PAYLOAD = 33554432
    BUFFERS = 1024             # UIO_MAXIOV
    HEADS = BUFFERS // 2 * CHUNK
    ROOM = 2 + SECTORS         # buffers that a request of one block takes at most
    COPIED_AT_ONCE = 65536     # bytes of replies; more are sent without the GIL
    SMALL_REPLY = 8192         # bytes
    ENOUGH_TO_READ = 16384     # bytes in a socket, as the kernel counts them, that keep a client busy
    MUCH_TO_READ = 65536       # and for so long that it pays to sleep meanwhile
    NAP_NANOSECONDS = 25000
    NAPS = 8                   # one after the other at most
    TIMER_SLACK = 1000         # nanoseconds that the kernel may add to it
    QUANTUM = 16               # what the heaviest export gets in a round, where weights differ: so many small requests,
    UNIT_SHIFT = 14            # or as many times 16 KiB
    MOST_UNITS = 64            # a request counts no more: the lightest one has to come to its turn
    MOST_WEIGHT = 10000        # throttle.weight.MOST
    ON = 0                     # forebay_nbd.throttle.words
    WAITING = 1
    CLOCK = 2
    MOST_BYTES = 3
    REQUESTS = 4
    BYTES = 8
    WORDS = 12
    RATE = 0
    FULL_AT = 1
    LEFT = 2
    LOOKED_AT = 3
    WEIGHT = 0                 # `Weight.turns`
    CREDIT = 1
    ROUND = 2

cdef double TURN_SECONDS = 500e-6  # of what has no limits of its own
cdef double NO_QUOTA = 1e300
cdef double GATHER_SECONDS = 30e-6 # a client that has replies to read may send more meanwhile: Wait.gather
cdef double HELD_UP_SECONDS = 0.01 # whoever answers sooner is never slow
cdef double FLUSH_SECONDS = 0.05   # a flush that takes longer is waited for by Python, which knows limits of time
cdef uint64_t PLAIN_READ = 0x2560951300000000
cdef uint64_t PLAIN_WRITE = 0x2560951300000001
cdef uint64_t PLAIN_FLUSH = 0x2560951300000003
cdef uint64_t SIMPLE_OK = 0x6744669800000000
cdef uint64_t DATA_DONE = 0x668E33EF00010001


cdef struct Request:
    uint64_t head, offset
    uint32_t length
    uint64_t cookie  # as it came


cdef inline bint has_units(double *bucket, double units, double now) noexcept nogil:
    """`Bucket.seconds_until` of forebay.disk.rates says 0."""
    if not bucket[RATE]:
        return True
    if now > bucket[LOOKED_AT]:
        bucket[LEFT] = min(bucket[FULL_AT], bucket[LEFT] + (now - bucket[LOOKED_AT]) * bucket[RATE])
        bucket[LOOKED_AT] = now
    return bucket[LEFT] >= min(units, bucket[FULL_AT])


cdef inline void use_units(double *bucket, double units) noexcept nogil:
    if bucket[RATE]:
        bucket[LEFT] -= units


cdef bint admitted(double *words, uint32_t length, double now) noexcept nogil:
    """`Rates.admit` of a READ or a WRITE says 0.0, and has counted it. `now` is CLOCK_MONOTONIC."""
    cdef double units = min(<double> length, words[MOST_BYTES])
    if words[WAITING] or words[CLOCK] != words[CLOCK]:
        return False
    now += words[CLOCK]
    if not has_units(words + REQUESTS, 1, now) or not has_units(words + BYTES, units, now):
        return False
    use_units(words + REQUESTS, 1)
    use_units(words + BYTES, units)
    return True


cdef void take_back(double *words, uint32_t length) noexcept nogil:
    """What was admitted is not carried out: whoever does it asks again."""
    use_units(words + REQUESTS, -1)
    use_units(words + BYTES, -min(<double> length, words[MOST_BYTES]))


def admit(array words, uint32_t length, double now):
    """Whether the core lets a READ of so many bytes in, for comparison. Raises ValueError if it has not all words."""
    if len(words) < WORDS:
        raise ValueError("words are missing")
    return admitted(words.data.as_doubles, length, now)


cdef inline double units_of(uint32_t length) noexcept nogil:
    """What a request counts as: one, and one for each 16 KiB behind the first ones."""
    return min(1 + (length >> UNIT_SHIFT), MOST_UNITS)


cdef inline Request request_at(const uint8_t *at) noexcept nogil:
    cdef Request request
    memcpy(&request.head, at, 8)
    memcpy(&request.cookie, at + 8, 8)
    memcpy(&request.offset, at + 16, 8)
    memcpy(&request.length, at + 24, 4)
    request.head = be64toh(request.head)
    request.offset = be64toh(request.offset)
    request.length = be32toh(request.length)
    return request


cdef class Wait


cdef class Rest:
    """What `Wait` serves while the loop waits: a descriptor, and `run`, called when something comes there."""

    cdef int sock
    cdef uint32_t events, watched  # of epoll: looked for, and as the epoll object has them
    cdef Wait wait                 # None: not at rest
    cdef bint is_next              # in `Wait.again`
    cdef object woken
    cdef double turn_seconds, turn_share
    cdef double asleep, longest_poll, soon_seconds
    cdef bint soon
    cdef int polls_lost, most_lost, waits_without, pause
    cdef bint small_replies        # the last ones were: Wait.gather
    # the FLUSH that was begun
    cdef object flushing           # as the export gave it; None if there is none
    cdef double flush_began
    cdef bint flush_is_new         # to `Wait`
    cdef readonly bint waits       # for something that is not of the socket, and is not to be polled
    cdef double ready              # seconds_now() when something had come; 0: nobody has looked
    cdef array weight              # Weight.turns of what it serves; None: nobody has to share with it
    cdef double *purse             # that, in memory
    cdef double quota              # what `run` may use up: see `units_of`
    cdef bint is_kept              # since `ready`, by `Wait.has_quota`

    def __cinit__(self):
        self.events, self.quota = EPOLLIN, NO_QUOTA
        self.turn_seconds, self.turn_share = TURN_SECONDS, 0.2

    cdef int look_for(self, uint32_t events) except -1:
        """Have `run` called at these events of epoll from now on."""
        self.events = events
        if self.wait is not None:
            self.wait.look(self, events)
        return 0

    cpdef int run(self, double turn_ends) except -1:
        """Do what can be done until `turn_ends`. WAIT: nothing is left; YIELD: some is; else Python has to go on."""
        raise NotImplementedError

    cdef bint polls(self) noexcept:
        """True if it pays to look for the next request before sleeping: as `server.polling.Polling.pays`."""
        if self.waits:
            return False
        if self.waits_without:
            self.waits_without -= 1
            return False
        return self.soon and self.longest_poll > 0


cdef class Turn(Rest):
    """Receives and answers the plain requests of one connection: READs, WRITEs and FLUSHes without flags.

    What `forebay_nbd.server.batch.Batch` does with them, with `RequestReader` and `Outbox`. The export is asked as it
    is there; reads of a view that has `Reads` do not leave the core. `refusal` makes the reply to a WRITE that was not
    published: (cookie, error). `polling` is the module that has the numbers of polls and turns.

    At rest, a READ of what is being fetched for somebody else stays where it was received, and waits for that; unless
    something else comes from the client, which Python then carries out beside it. One that misses right behind another
    client's is put off for some turns of the loop, by when it is known whether both want the same.

    How long requests took is counted in `timing` of the export: from the moment when the loop saw that something had
    come until the replies were given to the kernel. All that one `sendmsg` answers took the same.

    If `may_flush`, it begins a FLUSH where the export can, one at a time, and answers it when it is run after the end
    of that. Meanwhile it goes on with what else comes. Whoever takes the connection from it takes the flush as well.
    """

    cdef object reader, export, out, view, read_now, refusal
    cdef Reads reads
    cdef bint structured, read_only, looked, has_written, waits_early, answers_early
    cdef uint64_t size
    cdef uint8_t *received
    cdef Py_ssize_t start, end, capacity, in_place
    cdef size_t batch_bytes
    cdef int batch_buffers
    # what was gathered
    cdef iovec buffers[BUFFERS]
    cdef PyObject *owners[BUFFERS]  # what a buffer is part of, and kept by `held`; NULL: of `heads`
    cdef list held
    cdef int count
    cdef size_t total, sent
    cdef uint8_t heads[HEADS]
    cdef size_t heads_used
    cdef public bint may_flush
    cdef uint64_t flush_cookie
    # the READ at `start` that waits for what is fetched for others: `waits`
    cdef object join_read
    cdef bint is_woken             # since that has ended, and until the READ is answered
    cdef bint is_put_off           # `waits` for others to begin a fetch
    cdef int put_off               # so often
    # how long requests took
    cdef array throttle            # its words; None: nobody has to ask
    cdef double *words             # these, in memory
    cdef object timing
    cdef array latency
    cdef uint64_t *times
    cdef readonly double since     # seconds_now() when what is answered now had come
    cdef bint keeps_since          # what is in the buffer had come before `run` is called the next time
    cdef uint64_t answered[TIMED_KINDS]  # by the replies that were gathered
    cdef bint has_answered

    def __init__(self, reader, export, out, int sock, limits, *, bint structured, refusal, polling):
        self.reader, self.out, self.sock, self.structured = reader, out, sock, structured
        self.refusal = refusal
        self.view = reader.view
        self.received, self.capacity = <uint8_t *> memory_of(self.view), len(self.view)
        self.size, self.read_only = export.size, export.read_only
        self.read_now = export.read_now
        owner = getattr(export.read_now, "__self__", None)
        self.reads = owner if isinstance(owner, Reads) else None
        self.export, self.join_read = export, export.join_read
        self.batch_bytes = limits.batch_bytes
        self.batch_buffers = max(ROOM, min(limits.batch_buffers, BUFFERS))
        self.in_place = limits.in_place_bytes
        self.turn_seconds, self.turn_share = limits.turn_seconds, polling.TURN_SHARE
        self.longest_poll, self.soon_seconds = limits.poll_seconds, polling.SOON_POLLS * limits.poll_seconds
        self.most_lost, self.pause = polling.LOST_IN_A_ROW, polling.WAITS_WITHOUT
        self.held = []
        self.timing = timing = export.timing
        self.latency = timing.latency.counts
        if len(self.latency) < TIMED_KINDS * TIME_WIDTH:
            raise ValueError("the histograms of the export are too few")
        self.times = <uint64_t *> self.latency.data.as_ulonglongs
        throttle = getattr(export, "throttle", None)
        if throttle is not None:
            self.weight = throttle.weight.turns
            if len(self.weight) <= ROUND:
                raise ValueError("a weight is three numbers")
            self.purse = self.weight.data.as_doubles
            self.throttle = throttle.words
            if len(self.throttle) < WORDS:
                raise ValueError("words of the throttle are missing")
            self.words = self.throttle.data.as_doubles

    def may_receive(self):
        """True if nothing, or the beginning of what may be a plain request, was received and not answered."""
        cdef Py_ssize_t have = self.reader.end - self.reader.start
        cdef Request request
        if have < HEADER:
            return True
        request = request_at(self.received + <Py_ssize_t> self.reader.start)
        return self.is_plain(&request)

    cdef bint is_plain(self, Request *request) noexcept:
        if request.head == PLAIN_FLUSH:
            return self.may_flush and self.flushing is None and not request.offset and not request.length
        if not request.length or request.offset + request.length > self.size:
            return False
        if request.offset + request.length < request.offset:
            return False
        if request.head == PLAIN_READ:
            return request.length <= MAX_PAYLOAD
        return request.head == PLAIN_WRITE and request.length <= self.in_place and not self.read_only

    def poll(self, double seconds):
        """Receive what comes within so many seconds, giving the processor away meanwhile. False if nothing does."""
        cdef double limit = seconds_now() + seconds
        cdef ssize_t got = -1
        self.start, self.end = self.reader.start, self.reader.end
        self.make_room()
        with nogil:
            while True:
                sched_yield()  # the client may be waiting for this very core
                got = recv(self.sock, self.received + self.end, self.capacity - self.end, MSG_DONTWAIT)
                if got >= 0 or last_error() != EAGAIN or seconds_now() >= limit:
                    break
        if got > 0:
            self.end += got
        self.reader.start, self.reader.end = self.start, self.end
        return got > 0

    cpdef int run(self, double turn_ends) except -1:
        """Answer what was received, then what comes without waiting, until `turn_ends` (CLOCK_MONOTONIC, seconds).

        Returns WAIT: nothing is left to answer, and the socket is empty. YIELD: the time is over. OTHER: Python has to
        look at the next request. UNSENT: replies wait in the outbox, which has to be drained. GONE: the client is.
        Whatever an export raises beside OSError is passed on.
        """
        cdef int status
        cdef Py_ssize_t start, end
        if self.out.broken:
            return GONE
        if self.out._unsent and not (PLANTS and "past the outbox" in bugs):
            return UNSENT
        start, end = self.reader.start, self.reader.end
        self.start, self.end = start, end
        self.looked = self.has_written = False
        self.waits_early = PLANTS and "waits too early" in bugs
        self.answers_early = PLANTS and "record after reply" in bugs
        if not self.keeps_since:
            self.since = self.ready if self.ready else seconds_now()
        self.ready, self.keeps_since = 0, False
        if self.has_answered:  # what an exception kept from being sent
            self.has_answered = False
            memset(self.answered, 0, sizeof(self.answered))
        try:
            if self.flushing is not None and not self.end_flush():
                return OTHER
            if self.waits:
                self.waits = False
                if not (self.is_woken or self.is_put_off):
                    return OTHER
                self.is_put_off = False
            status = self.serve(turn_ends)
            self.keeps_since = status == YIELD or self.waits
        finally:
            if self.start == self.end:
                self.start = self.end = 0
            if self.start != start or self.end != end:
                self.reader.start, self.reader.end = self.start, self.end
            self.forget()
        return status

    cdef void forget(self) noexcept:
        """Nothing is gathered any more."""
        self.count, self.total, self.sent, self.heads_used = 0, 0, 0, 0
        if self.held:
            self.held.clear()

    cdef int serve(self, double turn_ends) except -1:
        cdef int why, error = 0
        cdef ssize_t got, room
        cdef bint is_first = True, is_drained = False, is_alone
        cdef double now = self.since
        while True:
            why = self.answer()
            is_alone = self.heads_used <= CHUNK  # what was answered
            if self.count:
                self.small_replies = self.total <= self.heads_used // SIMPLE * SMALL_REPLY
            if self.count and not self.send():
                self.note_answered(seconds_now())
                return UNSENT if not self.out.broken else GONE
            if self.has_answered or not is_first:
                now = seconds_now()
                if self.has_answered:
                    self.note_answered(now)
            if self.has_written:
                self.has_written = False
                self.export.answered()
            if why == OTHER:
                return OTHER
            if self.waits:
                return WAIT
            if (not is_first and now > turn_ends) or self.quota <= 0:
                if why != YIELD:
                    self.since = now
                return YIELD
            is_first = False
            if why == YIELD:
                continue
            self.since = now
            if is_drained and is_alone and self.start == self.end:
                return WAIT  # who sends one request at a time has not sent the next one yet
            self.make_room()
            room = self.capacity - self.end
            got = recv(self.sock, self.received + self.end, room, MSG_DONTWAIT)
            error = last_error()
            if got <= 0:
                return WAIT if got < 0 and error == EAGAIN else GONE
            self.end += got
            is_drained = got < room

    cdef int note_answered(self, double now) except -1:
        """The replies that were gathered are sent: count how long their requests took."""
        cdef double took = now - self.since
        cdef int kind
        if not self.has_answered:
            return 0
        self.has_answered = False
        for kind in range(TIMED_KINDS):
            if self.answered[kind]:
                note_time(self.times, kind, now - self.flush_began if kind == TIMED_FLUSH else took, self.answered[kind])
                self.answered[kind] = 0
        if took >= HELD_UP_SECONDS and took >= <double> self.timing.slow_seconds:
            self.timing.held_up(took)
        return 0

    cdef void make_room(self) noexcept:
        """As `ReceiveBuffer._make_room`: have room for the request that is being received, whatever it is."""
        if self.start == self.end:
            self.start = self.end = 0
        elif self.capacity - self.start < HEADER + self.in_place:
            memmove(self.received, self.received + self.start, self.end - self.start)
            self.start, self.end = 0, self.end - self.start

    cdef int answer(self) except -1:
        """Gather replies. WAIT: more has to be received; YIELD: that is enough for once; OTHER: as `run` returns it."""
        cdef Request request
        while True:
            if self.end - self.start < HEADER:
                return WAIT
            request = request_at(self.received + self.start)
            if not self.is_plain(&request):
                return OTHER
            if request.head == PLAIN_READ:
                if not self.admits(&request):
                    self.put_off, self.is_woken = 0, False
                    return OTHER
                if not self.read(&request):
                    if self.is_throttled():
                        take_back(self.words, request.length)
                    return WAIT if self.joins(&request) else OTHER
                self.put_off, self.has_answered = 0, True
                if self.is_woken:
                    self.is_woken = False
                    self.answered[TIMED_MISS] += 1
                    if self.reads is not None:
                        self.reads.note_waited()
                else:
                    self.answered[TIMED_HIT] += 1
                self.start += HEADER
                self.quota -= units_of(request.length)
                if self.waits_early:
                    return WAIT
            elif request.head == PLAIN_FLUSH:
                if not self.flush(&request):
                    return OTHER
            else:
                if self.end - self.start < HEADER + <Py_ssize_t> request.length:
                    return WAIT
                if not self.write():
                    return OTHER
            if self.total >= self.batch_bytes or self.heads_used > HEADS - CHUNK:
                return YIELD
            if self.count > self.batch_buffers - ROOM or self.quota <= 0:
                return YIELD

    cdef inline bint is_throttled(self) noexcept:
        return self.words != NULL and self.words[ON] != 0 and not (PLANTS and "asks nobody" in bugs)

    cdef inline bint admits(self, Request *request) noexcept:
        """Have the throttle count a READ or a WRITE. False: that it has to wait, or who is to be asked, is for Python.

        Together with whatever else came at the same time: what the time has brought since is there the next time.
        """
        return not self.is_throttled() or admitted(self.words, request.length, self.since)

    cdef bint joins(self, Request *request) except -1:
        """Have the READ at `start`, with nothing behind it, wait for what is being fetched for others, if that is so.

        Once: what was not there when that had ended is for Python to see to.
        """
        if not self.is_woken and self.wait is not None and self.flushing is None and self.end - self.start == HEADER:
            if self.join_read(request.offset, request.length, self.woken_up):
                self.put_off, self.waits = 0, True
                return True
            if self.wait.left and self.put_off < PUT_OFF:
                self.put_off += 1
                self.is_put_off = self.waits = True
                self.wait.serve_next(self)
                return True
        self.put_off, self.is_woken = 0, False
        return False

    def woken_up(self):
        """What a READ has joined has ended. It may be one of long ago, which Python has answered since."""
        if self.waits and not self.is_woken:
            self.is_woken = True
            if self.wait is not None:
                self.wait.serve_next(self)

    # --- replies

    cdef int add(self, const void *data, size_t length, PyObject *owner) noexcept:
        """Gather bytes of `owner`, which whoever calls keeps; NULL: of `heads`. False if there is no room."""
        cdef iovec *last
        if self.count and self.owners[self.count - 1] == owner:
            last = &self.buffers[self.count - 1]
            if <const uint8_t *> last.iov_base + last.iov_len == data:
                last.iov_len += length
                self.total += length
                return True
        if self.count == self.batch_buffers:
            return False
        self.buffers[self.count].iov_base, self.buffers[self.count].iov_len = <void *> data, length
        self.owners[self.count] = owner
        self.count += 1
        self.total += length
        return True

    cdef bint read(self, Request *request) except -1:
        """Gather the reply to a READ. False, and nothing was gathered: somebody else has to do it."""
        cdef int count = self.count
        cdef size_t total = self.total, used = self.heads_used
        cdef iovec last
        cdef uint8_t *head = self.heads + used
        cdef uint64_t word = htobe64(DATA_DONE if self.structured else SIMPLE_OK)
        cdef uint32_t length = htobe32(request.length + 8)
        if count:
            last = self.buffers[count - 1]
        memcpy(head, &word, 8)
        memcpy(head + 8, &request.cookie, 8)
        if self.structured:
            memcpy(head + 16, &length, 4)
            word = htobe64(request.offset)
            memcpy(head + 20, &word, 8)
        self.heads_used += CHUNK if self.structured else SIMPLE
        if self.add(head, self.heads_used - used, NULL) and self.gather(request):
            return True
        self.count, self.total, self.heads_used = count, total, used
        if count:
            self.buffers[count - 1] = last
        return False

    cdef bint gather(self, Request *request) except -1:
        """Gather the data of a READ."""
        cdef Py_buffer *found
        if self.reads is not None:
            if not self.looked:
                self.reads.refresh()
                self.looked = True
            if not self.gather_sectors(request.offset, request.length):
                return False
            self.reads.note_hit(request.length)
            return True
        try:
            data = self.read_now(request.offset, request.length)
        except OSError:
            return False
        if data is None:
            return False
        data = memoryview(data)
        self.held.append(data)
        found = PyMemoryView_GET_BUFFER(data)
        return self.add(found.buf, found.len, <PyObject *> data)

    cdef bint gather_sectors(self, uint64_t offset, uint32_t length) except -1:
        cdef uint64_t end = offset + length
        cdef uint32_t start, part, n, sector_end
        cdef int64_t slot
        cdef const uint8_t *where[SECTORS]
        cdef PyObject *map_owner = <PyObject *> self.reads.map_view
        if offset >= self.reads.lookahead:
            return False
        while offset < end:
            start = offset & (BLOCK - 1)
            part = <uint32_t> min(<uint64_t> (BLOCK - start), end - offset)
            slot = self.reads.one_slot(offset >> 16, mask_of(start, part))
            if slot >= 0:
                if not self.add(self.reads.place(slot, start), part, map_owner):
                    return False
            elif slot == ALL_ZERO:
                if not self.add(zeros, part, <PyObject *> ZERO_BLOCK):
                    return False
            else:
                if not self.reads.sectors(offset >> 16, mask_of(start, part), where):
                    return False
                sector_end = start + part
                while start < sector_end:
                    n = start >> 12
                    part = min((n + 1) * SECTOR_BYTES, sector_end) - start
                    if not self.add(
                        where[n] + (start & IN_SECTOR),
                        part,
                        <PyObject *> ZERO_BLOCK if where[n] == zeros else map_owner,
                    ):
                        return False
                    start += part
                part = sector_end - <uint32_t> (offset & (BLOCK - 1))
            self.reads.head[VISITS] += 1
            offset += part
        return True

    cdef bint write(self) except -1:
        """Have the export carry out the WRITEs at `start`, and gather their replies. False: somebody else has to."""
        cdef Py_ssize_t at = self.start, stop, done = 0, n
        cdef Request request
        cdef size_t head = self.heads_used
        cdef double quota = self.quota
        writes = []
        while self.end - at >= HEADER and head + SIMPLE <= HEADS and quota > 0:
            request = request_at(self.received + at)
            stop = at + HEADER + request.length
            if request.head != PLAIN_WRITE or stop > self.end or not self.is_plain(&request):
                break
            if not self.admits(&request):
                break
            writes.append((request.offset, self.view[at + HEADER : stop]))
            quota -= units_of(request.length)
            head += SIMPLE
            at = stop
        if not writes:
            return False
        try:
            done = self.export.write_now(writes)
        except OSError:
            return False
        finally:
            if self.is_throttled():
                for _, data in writes[done:]:
                    take_back(self.words, <uint32_t> PyMemoryView_GET_BUFFER(data).len)
        self.looked = False
        if not done:
            return False
        refused = None
        try:
            if not self.answers_early:
                self.export.publish()
        except OSError as error:
            refused = error
        replies = []
        self.answered[TIMED_WRITE] += done
        self.has_answered = True
        for n in range(done):
            request = request_at(self.received + self.start)
            if refused is None:
                self.has_written = True
                self.acknowledge(request.cookie)
            else:
                replies.append(self.refusal(be64toh(request.cookie), refused))
            self.quota -= units_of(request.length)
            self.start += HEADER + <Py_ssize_t> request.length
        if replies:
            reply = memoryview(b"".join(replies))
            self.held.append(reply)
            self.add(memory_of(reply), len(reply), <PyObject *> reply)
        if self.answers_early:
            self.send()
            self.export.publish()
        return done == len(writes)

    cdef void acknowledge(self, uint64_t cookie) noexcept:
        """Gather the reply to a WRITE. There is room: `answer` goes on only where there is, and these are one buffer."""
        cdef uint8_t *head = self.heads + self.heads_used
        cdef uint64_t word = htobe64(SIMPLE_OK)
        memcpy(head, &word, 8)
        memcpy(head + 8, &cookie, 8)
        self.add(head, SIMPLE, NULL)
        self.heads_used += SIMPLE

    # --- flushing

    cdef bint flush(self, Request *request) except -1:
        """Have the export begin a FLUSH. False: somebody else has to do it."""
        try:
            begun = self.export.begin_flush()
        except OSError:
            return False
        if begun is None:
            return False
        self.start += HEADER
        if PLANTS and "reply before sync" in bugs:
            self.acknowledge(request.cookie)
            return True
        self.flushing, self.flush_cookie = begun, request.cookie
        self.flush_began, self.flush_is_new = seconds_now(), True
        return True

    cdef bint end_flush(self) except -1:
        """Gather the reply to the FLUSH that was begun, if it has ended. False: somebody else has to go on with it."""
        ended = self.flushing.look()
        if ended is None:
            return seconds_now() - self.flush_began < FLUSH_SECONDS
        if not ended:
            return False
        self.flushing = None
        self.acknowledge(self.flush_cookie)
        self.answered[TIMED_FLUSH] += 1
        self.has_answered = True
        return True

    def take_flush(self):
        """The FLUSH that was begun, to be answered by the caller: (cookie, what the export gave, when it was begun).

        None if there is none.
        """
        if self.flushing is None:
            return None
        begun, self.flushing = self.flushing, None
        return be64toh(self.flush_cookie), begun, self.flush_began

    # --- sending

    cdef bint send(self) except -1:
        """Send what was gathered. False if the outbox has some of it now, or the client is gone, as `out.broken` says."""
        cdef msghdr message
        cdef ssize_t sent
        cdef int error
        memset(&message, 0, sizeof(message))
        message.msg_iov, message.msg_iovlen = self.buffers, self.count
        if self.total > COPIED_AT_ONCE:
            with nogil:
                sent = sendmsg(self.sock, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
                error = last_error()
        else:
            sent = sendmsg(self.sock, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
            error = last_error()
        if sent == <ssize_t> self.total:
            self.forget()
            return True
        if sent < 0 and error != EAGAIN:
            self.out.fail(OSError(error, os.strerror(error)))
            return False
        unsent = self.unsent(max(sent, 0))
        self.forget()
        self.out.keep(unsent)
        return False

    cdef list unsent(self, size_t sent):
        """What is left of the buffers when so many bytes of them were sent."""
        cdef int n
        cdef size_t length
        cdef Py_ssize_t first
        cdef const char *data
        left = []
        for n in range(self.count):
            data, length = <const char *> self.buffers[n].iov_base, self.buffers[n].iov_len
            if sent >= length:
                sent -= length
                continue
            data, length, sent = data + sent, length - sent, 0
            if self.owners[n] == NULL:
                left.append(PyBytes_FromStringAndSize(data, length))
                continue
            owner = memoryview(<object> self.owners[n])
            first = data - <const char *> memory_of(owner)
            left.append(owner[first : first + <Py_ssize_t> length])
        return left


# --- the wait of the event loop --------------------------------------------------------------------------------------

cdef enum:
    EVENTS = 64
    PUT_OFF = 3  # turns of the loop: the client's own task, the one of its request, which begins the fetch, and one more


cdef class Wait:
    """Stands for the epoll object of trio's loop, and serves the connections at rest while the loop waits.

    A connection is at rest from :meth:`add` until its turn ends with something that Python has to look at. `poll` is
    what `select.epoll` has, and returns what the loop's own object does; so do the other methods.
    """

    cdef object loops
    cdef int epoll, loops_fd
    cdef dict turns
    cdef list again, flushing
    cdef double ready  # seconds_now() when the connections were looked at of which one is served; 0: not yet
    cdef int left  # not 0: so many turns of the loop ago, less than PUT_OFF, Python was given a request
    cdef double round  # number of the last one in which weights differed

    def __init__(self, loops):
        self.loops, self.loops_fd = loops, loops.fileno()
        self.turns, self.again, self.flushing = {}, [], []
        prctl(PR_SET_TIMERSLACK, TIMER_SLACK)
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll < 0:
            PyErr_SetFromErrno(OSError)
        self.watch(self.loops_fd, EPOLLIN, EPOLL_CTL_ADD)

    def __dealloc__(self):
        if self.epoll >= 0:
            close(self.epoll)

    cdef int watch(self, int fd, uint32_t events, int how) except -1:
        cdef epoll_event event
        memset(&event, 0, sizeof(event))
        event.events, event.data.fd = events, fd
        if epoll_ctl(self.epoll, how, fd, &event) < 0:
            PyErr_SetFromErrno(OSError)
        return 0

    cdef int look(self, Rest turn, uint32_t events) except -1:
        """Look for these events from now on, and no others."""
        if events != turn.watched:
            turn.watched = events
            self.watch(turn.sock, events, EPOLL_CTL_MOD)
        return 0

    def add(self, Rest turn, woken):
        """Serve it from now on. `woken` is called once, with a status of `run` or an exception."""
        turn.watched = turn.events
        self.watch(turn.sock, turn.events, EPOLL_CTL_ADD)
        turn.woken, turn.asleep, turn.wait = woken, seconds_now(), self
        self.turns[turn.sock] = turn
        try:
            self.follow_flush(turn)
        except OSError:
            self.remove(turn)
            raise

    def remove(self, Rest turn):
        """Do not serve it any more; `woken` is not called."""
        turn.wait = None
        turn.is_kept = False
        if self.turns.pop(turn.sock, None) is not None:
            epoll_ctl(self.epoll, EPOLL_CTL_DEL, turn.sock, NULL)  # fails where the socket is closed: it is out then
        if turn.is_next:
            turn.is_next = False
            self.again.remove(turn)
        if turn in self.flushing:
            self.flushing.remove(turn)

    cdef void serve_next(self, Rest turn) noexcept:
        """Serve it in the next turn of the loop, whether something comes or not. There may be hundreds of them."""
        if not turn.is_next:
            turn.is_next = True
            self.again.append(turn)

    cdef int follow_flush(self, Rest turn) except -1:
        """Look on while a flush of a connection at rest is under way."""
        cdef epoll_event event
        if turn.flushing is None:
            if self.flushing and turn in self.flushing:
                self.flushing.remove(turn)
            return 0
        if turn not in self.flushing:
            self.flushing.append(turn)
        elif not turn.flush_is_new:
            return 0
        turn.flush_is_new = False
        memset(&event, 0, sizeof(event))
        event.events, event.data.fd = EPOLLIN | EPOLLONESHOT, turn.flushing.fileno()
        if epoll_ctl(self.epoll, EPOLL_CTL_MOD, event.data.fd, &event) < 0:
            if last_error() != ENOENT or epoll_ctl(self.epoll, EPOLL_CTL_ADD, event.data.fd, &event) < 0:
                PyErr_SetFromErrno(OSError)
        return 0

    cdef int see_flushes(self, list again) except -1:
        """Have connections served whose flush has ended, as far as anybody has seen, or takes long.

        With `again`, which is served now, all that have one: a descriptor says that one of them has ended.
        """
        cdef double now = seconds_now()
        cdef Rest turn
        for one in self.flushing:
            turn = one
            if again is not None:
                if turn not in again:
                    again.append(turn)
            elif turn.flushing.has_ended or now - turn.flush_began >= FLUSH_SECONDS:
                self.serve_next(turn)
        return 0

    # What trio calls:

    def register(self, *args):
        self.loops.register(*args)

    def modify(self, *args):
        self.loops.modify(*args)

    def unregister(self, fd):
        self.loops.unregister(fd)

    def fileno(self):
        return self.loops_fd

    def close(self):
        if self.epoll >= 0:
            close(self.epoll)
            self.epoll = -1
        self.loops.close()

    def poll(self, double timeout, int most):
        """What the loop has to look at, at once if there is something, else within so many seconds."""
        cdef double deadline, now, heaviest
        cdef int n, k, ready, milliseconds
        cdef epoll_event events[EVENTS]
        cdef bint asks = False, flushed
        cdef Rest turn, last = None
        if not self.turns:
            return self.loops.poll(timeout, most)
        if self.left:
            self.left -= 1
        now = seconds_now()
        deadline = now + timeout
        while True:
            if self.flushing:
                self.see_flushes(None)
            milliseconds = 0 if self.again or asks else self.rest(deadline - now)
            if self.flushing:
                milliseconds = min(milliseconds, <int> (FLUSH_SECONDS * 1000))
            with nogil:
                n = -2
                if last is not None and milliseconds:
                    n = self.polled(last, events)
                if n == -2:
                    n = epoll_wait(self.epoll, events, EVENTS, milliseconds)
            if n < 0:
                if last_error() != EINTR:
                    PyErr_SetFromErrno(OSError)
                PyErr_CheckSignals()
                n = 0
            ready = 0
            flushed = False
            last = None
            again, self.again = self.again[:EVENTS], self.again[EVENTS:]
            for one in again:
                turn = one
                turn.is_next = False
            for k in range(n):
                if events[k].data.fd == self.loops_fd:
                    ready = 1
                    continue
                turn = self.turns.get(events[k].data.fd)
                if turn is None:
                    flushed = True
                elif turn not in again:
                    again.append(turn)
            if flushed:
                self.see_flushes(again)
            self.ready = 0
            heaviest = 0
            if len(again) > 1:
                heaviest = self.heaviest_of(again)
                if heaviest:
                    self.round += 1
                    kept = []
            for one in again:
                turn = one
                if turn.wait is None:  # what another one's turn brought about
                    continue
                if heaviest and not self.has_quota(turn, heaviest):
                    kept.append(turn)
                    continue
                if self.serve(turn, len(again) == 1):
                    asks = True
                    self.left = PUT_OFF
                else:
                    last = turn if len(again) == 1 and not self.again and turn.flushing is None and turn.polls() else None
            if heaviest and kept:
                self.keep(kept)
            now = seconds_now()
            if ready or asks or now >= deadline:
                return self.loops.poll(0, most)

    # Where weights differ. Of exports that all have requests waiting each gets so many units a round: QUANTUM, or as much
    # less as it is lighter than the heaviest one. It may use up more, by a part of its last request, and gets so much
    # less later. So none gets more by having more connections, and where the others have nothing to do it has all.

    cdef double heaviest_of(self, list again) noexcept:
        """The largest weight of those that are served in this round; 0 where all have the same."""
        cdef double least = MOST_WEIGHT, most = 0
        cdef Rest turn
        for one in again:
            turn = one
            if turn.purse != NULL:
                least, most = min(least, turn.purse[WEIGHT]), max(most, turn.purse[WEIGHT])
        return most if least < most else 0

    cdef bint has_quota(self, Rest turn, double heaviest) noexcept:
        """Give it what its export has left of this round. False: nothing, it has to wait for the next one."""
        if turn.purse == NULL:
            return True
        if turn.purse[ROUND] != self.round:
            turn.purse[ROUND] = self.round
            turn.purse[CREDIT] += QUANTUM * turn.purse[WEIGHT] / heaviest
        if turn.purse[CREDIT] <= 0:
            if not turn.is_kept:
                turn.is_kept, turn.ready = True, self.ready if self.ready else seconds_now()
            return False
        turn.quota = turn.purse[CREDIT]
        return True

    cdef void settle(self, Rest turn, bint has_more) noexcept:
        """Take what it has used up from what its export has. An export saves nothing up."""
        turn.purse[CREDIT] = turn.quota if has_more else min(0, turn.quota)
        turn.quota = NO_QUOTA

    cdef void keep(self, list kept) noexcept:
        """Have these be the first of the next round."""
        cdef Rest turn
        first = []
        for one in kept:
            turn = one
            if turn.wait is not None and not turn.is_next:
                turn.is_next = True
                first.append(turn)
        self.again = first + self.again

    cdef int rest(self, double seconds) noexcept:
        """In milliseconds, not less."""
        if seconds <= 0:
            return 0
        return 3600000 if seconds > 3600 else <int> (seconds * 1000 + 0.999)

    cdef int polled(self, Rest turn, epoll_event *events) noexcept nogil:
        """Look again and again for a while, giving the processor away: what epoll_wait returned, -2 for nothing."""
        cdef double limit
        cdef int n
        if turn.small_replies:
            self.gather(turn)
        limit = seconds_now() + turn.longest_poll
        while True:
            sched_yield()
            n = epoll_wait(self.epoll, events, EVENTS, 0)
            if seconds_now() >= limit:  # also where something came: others wanted the processor, and had it for long
                turn.polls_lost += 1
                if turn.polls_lost == turn.most_lost:
                    turn.polls_lost, turn.waits_without = 0, turn.pause
                return n or -2
            if n:
                turn.polls_lost = 0
                return n

    cdef void gather(self, Rest turn) noexcept nogil:
        """Give the processor away while the client has much to read, but not for long.

        It waits for nothing then. What it sends meanwhile is answered together, and costs both of them less.
        """
        cdef double limit = seconds_now() + GATHER_SECONDS
        cdef int unread = 0, naps = NAPS
        while ioctl(turn.sock, SIOCOUTQ, &unread) == 0 and unread > ENOUGH_TO_READ:
            if unread > MUCH_TO_READ and naps:
                naps -= 1
                if self.nap(turn):
                    return
            elif seconds_now() < limit:
                sched_yield()
            else:
                return

    cdef bint nap(self, Rest turn) noexcept nogil:
        """Sleep for a while, or until somebody else wants something, of whom it returns True."""
        cdef epoll_event event
        cdef pollfd others
        cdef timespec time
        cdef int n
        memset(&event, 0, sizeof(event))
        event.data.fd = turn.sock
        if epoll_ctl(self.epoll, EPOLL_CTL_MOD, turn.sock, &event) < 0:
            return True
        others.fd, others.events = self.epoll, POLLIN
        time.tv_sec, time.tv_nsec = 0, NAP_NANOSECONDS
        n = ppoll(&others, 1, &time, NULL)
        event.events = turn.watched
        epoll_ctl(self.epoll, EPOLL_CTL_MOD, turn.sock, &event)
        return n != 0

    cdef bint serve(self, Rest turn, bint alone) except -1:
        """Give a connection its turn. True if Python has to go on with it: it is not at rest any more."""
        cdef double now = seconds_now()
        if not self.ready:
            self.ready = now
        if not turn.is_kept:
            turn.ready = self.ready
        turn.is_kept = False
        turn.soon = now - turn.asleep < turn.soon_seconds
        try:
            told = turn.run(now + turn.turn_seconds * (1 if alone else turn.turn_share))
            if told == WAIT or told == YIELD:
                self.follow_flush(turn)
        except Exception as error:
            told = error
        if turn.quota < NO_QUOTA:
            self.settle(turn, told == YIELD)
        turn.asleep = seconds_now()
        if told == WAIT:
            return False
        if told == YIELD:
            self.serve_next(turn)
            return False
        self.remove(turn)
        woken, turn.woken = turn.woken, None
        woken(told)
        return True


include "door.pxi"
