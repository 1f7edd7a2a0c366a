# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False

"""The compiled core: see fast/README.md. What it does is said by the Python that does the same, which each part names."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint32_t

cdef extern from "sector.h" nogil:
    enum: SECTOR_BYTES
    uint32_t sum_of_sector(const uint8_t *sector)
    uint32_t sum_of_sector_portable(const uint8_t *sector)
    void crc_begin()
    uint32_t crc_of(uint32_t crc, const uint8_t *data, size_t length)

crc_begin()


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
