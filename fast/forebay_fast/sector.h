/* SPDX-FileCopyrightText: Forebay developers
 * SPDX-License-Identifier: Apache-2.0
 *
 * Checksums of the on-disk format: XXH3 (64 bits, no seed, default secret) of a sector of exactly 4096 bytes, of which
 * the lower 32 bits are kept, and CRC-32 of frames of the journal.
 *
 * XXH3 as doc/xxhash_spec.md of Cyan4973/xxHash has it: eight accumulators take stripes of 64 bytes; after each block
 * of 16 stripes they are scrambled; the last stripe counts once more, with a secret of its own. For this one length
 * there are 4 blocks, of which the last one is a stripe short. tests/unit/test_fast.py compares it with the wheel.
 */
#ifndef FOREBAY_SECTOR_H
#define FOREBAY_SECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { SECTOR_BYTES = 4096, STRIPE = 64, STRIPES_IN_BLOCK = 16, BLOCKS_IN_SECTOR = 4 };
enum { SECRET_SCRAMBLE = 128, SECRET_LAST = 121, SECRET_MERGE = 11 };

#define PRIME32_1 0x9E3779B1U
#define PRIME32_2 0x85EBCA77U
#define PRIME32_3 0xC2B2AE3DU
#define PRIME64_1 0x9E3779B185EBCA87ULL
#define PRIME64_2 0xC2B2AE3D27D4EB4FULL
#define PRIME64_3 0x165667B19E3779F9ULL
#define PRIME64_4 0x85EBCA77C2B2AE63ULL
#define PRIME64_5 0x27D4EB2F165667C5ULL
#define PRIME_MX 0x165667919E3779F9ULL
#define ACCUMULATORS {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1}

static const uint8_t secret[192] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

static inline uint64_t load64(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint64_t folded_product(uint64_t a, uint64_t b) {
    __uint128_t product = (__uint128_t)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* What all eight accumulators make of the sector, as its checksum. */
static inline uint32_t merged(const uint64_t acc[8]) {
    uint64_t hash = SECTOR_BYTES * PRIME64_1;
    for (int i = 0; i < 4; i++) {
        const uint8_t *key = secret + SECRET_MERGE + 16 * i;
        hash += folded_product(acc[2 * i] ^ load64(key), acc[2 * i + 1] ^ load64(key + 8));
    }
    hash ^= hash >> 37;
    hash *= PRIME_MX;
    return (uint32_t)(hash ^ hash >> 32);
}

static inline void accumulate(uint64_t acc[8], const uint8_t *stripe, const uint8_t *key) {
    for (int i = 0; i < 8; i++) {
        uint64_t data = load64(stripe + 8 * i), keyed = data ^ load64(key + 8 * i);
        acc[i ^ 1] += data;
        acc[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
    }
}

static inline uint32_t sum_of_sector_portable(const uint8_t *sector) {
    uint64_t acc[8] = ACCUMULATORS;
    for (int block = 0; block < BLOCKS_IN_SECTOR; block++, sector += STRIPE * STRIPES_IN_BLOCK) {
        int is_last = block == BLOCKS_IN_SECTOR - 1;
        for (int n = 0; n < STRIPES_IN_BLOCK - is_last; n++) accumulate(acc, sector + STRIPE * n, secret + 8 * n);
        if (is_last) break;
        for (int i = 0; i < 8; i++) {
            acc[i] = (acc[i] ^ acc[i] >> 47 ^ load64(secret + SECRET_SCRAMBLE + 8 * i)) * PRIME32_1;
        }
    }
    accumulate(acc, sector + STRIPE * (STRIPES_IN_BLOCK - 1), secret + SECRET_LAST);
    return merged(acc);
}

#ifdef __x86_64__
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i accumulated(__m256i acc, const uint8_t *stripe, const uint8_t *key) {
    __m256i data = _mm256_loadu_si256((const __m256i *)stripe);
    __m256i keyed = _mm256_xor_si256(data, _mm256_loadu_si256((const __m256i *)key));
    __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    return _mm256_add_epi64(acc, _mm256_add_epi64(_mm256_shuffle_epi32(data, 0x4E), product));
}

AVX2 static inline __m256i scrambled(__m256i acc, const uint8_t *key) {
    const __m256i prime = _mm256_set1_epi32((int)PRIME32_1);
    acc = _mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47));
    acc = _mm256_xor_si256(acc, _mm256_loadu_si256((const __m256i *)key));
    __m256i upper = _mm256_mul_epu32(_mm256_srli_epi64(acc, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(acc, prime), _mm256_slli_epi64(upper, 32));
}

/* The same with vectors of four accumulators: a third of the time. */
AVX2 static inline uint32_t sum_of_sector_avx2(const uint8_t *sector) {
    uint64_t acc[8] __attribute__((aligned(32))) = ACCUMULATORS;
    __m256i low = _mm256_load_si256((__m256i *)acc), high = _mm256_load_si256((__m256i *)(acc + 4));
    for (int block = 0; block < BLOCKS_IN_SECTOR; block++, sector += STRIPE * STRIPES_IN_BLOCK) {
        int is_last = block == BLOCKS_IN_SECTOR - 1;
        for (int n = 0; n < STRIPES_IN_BLOCK - is_last; n++) {
            const uint8_t *stripe = sector + STRIPE * n, *key = secret + 8 * n;
            __builtin_prefetch(stripe + 8 * STRIPE);
            low = accumulated(low, stripe, key);
            high = accumulated(high, stripe + 32, key + 32);
        }
        if (is_last) break;
        low = scrambled(low, secret + SECRET_SCRAMBLE);
        high = scrambled(high, secret + SECRET_SCRAMBLE + 32);
    }
    const uint8_t *last = sector + STRIPE * (STRIPES_IN_BLOCK - 1);
    low = accumulated(low, last, secret + SECRET_LAST);
    high = accumulated(high, last + 32, secret + SECRET_LAST + 32);
    _mm256_store_si256((__m256i *)acc, low);
    _mm256_store_si256((__m256i *)(acc + 4), high);
    return merged(acc);
}

static inline uint32_t sum_of_sector(const uint8_t *sector) {
    return __builtin_cpu_supports("avx2") ? sum_of_sector_avx2(sector) : sum_of_sector_portable(sector);
}
#else
static inline uint32_t sum_of_sector(const uint8_t *sector) { return sum_of_sector_portable(sector); }
#endif

/* CRC-32 as zlib's, eight bytes a step. crc_begin() has to have been called once. */
static uint32_t crc_table[8][256];

static void crc_begin(void) {
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t crc = n;
        for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >> 1 ^ 0xEDB88320U : crc >> 1;
        crc_table[0][n] = crc;
    }
    for (int step = 1; step < 8; step++) {
        for (int n = 0; n < 256; n++) {
            uint32_t crc = crc_table[step - 1][n];
            crc_table[step][n] = crc >> 8 ^ crc_table[0][crc & 255];
        }
    }
}

static inline uint32_t crc_of(uint32_t crc, const uint8_t *data, size_t length) {
    crc = ~crc;
    for (; length >= 8; data += 8, length -= 8) {
        uint64_t value = load64(data) ^ crc;
        crc = 0;
        for (int n = 0; n < 8; n++) crc ^= crc_table[7 - n][value >> 8 * n & 255];
    }
    while (length--) crc = crc >> 8 ^ crc_table[0][(crc ^ *data++) & 255];
    return ~crc;
}

#endif
