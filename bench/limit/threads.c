/* SPDX-FileCopyrightText: Forebay developers
 * SPDX-License-Identifier: Apache-2.0
 *
 * The tables of the cache as flat arrays, and threads that read and write blocks through them: what `make
 * bench-threads` measures, see cache/THREADS.md. No server, no device: memory stands for its map, and a copy into
 * memory for `pwrite` and `sendmsg`. Words, ready bits, checksums, sides and frames are the cache's own.
 *
 *     threads HOW WORK THREADS SECONDS [BUSY]
 *
 * HOW: `bare`, without any lock, each thread with tables of its own: one thread as today, or what the machine has for
 * several. `one`: one lock for each step in the tables. `pages`: a lock for each page, one for the journal, readers
 * without a lock. In the latter two a loop closes the gate 1000 times a second, for BUSY microseconds each.
 * WORK: `read`, 4 KiB; `write`, 4 KiB in runs of 16; `mixed`, 64 KiB, every other one a write.
 *
 * Prints requests a second, microseconds of processor time for each, the share of its time for which a thread waited
 * for a processor, and how often something had to be tried again.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "sector.h"

enum { BLOCK = 65536, SECTOR = 4096, SECTORS = 16, PAGE_BLOCKS = 64, BLOCKS = 2048, SLOTS = 2 * BLOCKS };
enum { RING = 8 << 20, RECORD = 16, RUN = 16, MOST_THREADS = 16, TOUCHED = 1, SYNC_MICROSECONDS = 5000 };

typedef enum { BARE, ONE, PAGES } How;
typedef enum { READ, WRITE, MIXED } Work;

typedef struct {
    _Alignas(64) pthread_mutex_t lock; /* who changes anything of the page has it */
    _Atomic uint32_t version;          /* odd while words change: readers look again */
    uint32_t synced;                   /* the number of the sync that `open` counts from */
    _Atomic uint64_t words[2 * PAGE_BLOCKS];
    uint16_t open[PAGE_BLOCKS];    /* written since that sync began: `Intent.open_sectors` */
    uint16_t writing[PAGE_BLOCKS]; /* a thread writes their data */
    bool dirty;
} Page;

typedef struct {
    Page *pages;
    uint32_t *sums;
    _Atomic uint16_t *ready;
    _Atomic uint8_t *state;
    uint8_t *map;
    pthread_mutex_t journal, all;
    uint8_t *ring;
    size_t head;
    uint64_t sequence;
} Tables;

typedef struct {
    _Alignas(64) atomic_int inside; /* in a turn: the loop waits for its end */
    Tables *tables;
    pthread_t thread;
    uint64_t random, requests, again;
    double cpu, took, displaced;
    uint8_t data[BLOCK], reply[BLOCK], records[RUN * (RECORD + 4 * SECTORS)];
} Worker;

typedef struct {
    int side;
    uint32_t mask;
    int64_t slot;
} Part;

typedef struct {
    Page *page;
    uint32_t block, mask;
    Part late[2]; /* what is overwritten in place, behind its record; mask 0: nothing */
} Late;

static How how;
static Work work;
static int threads;
static Worker *workers;
static _Alignas(64) atomic_uint sync_number;
static atomic_bool closed, over;

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

/* Seconds for which this thread could have run, and others had the processor. */
static double displaced(void) {
    unsigned long ran = 0, waited = 0;
    FILE *file = fopen("/proc/thread-self/schedstat", "r");
    if (file && fscanf(file, "%lu %lu", &ran, &waited) != 2) waited = 0;
    if (file) fclose(file);
    return waited * 1e-9;
}

static void *memory(size_t length) {
    void *got = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (got == MAP_FAILED) abort();
    return got;
}

static uint64_t random_of(Worker *worker) {
    worker->random ^= worker->random << 13;
    worker->random ^= worker->random >> 7;
    worker->random ^= worker->random << 17;
    return worker->random;
}

/* --- locks ------------------------------------------------------------------------------------------------------- */

static void take(pthread_mutex_t *lock) {
    if (how != BARE) pthread_mutex_lock(lock);
}

static void give(pthread_mutex_t *lock) {
    if (how != BARE) pthread_mutex_unlock(lock);
}

static pthread_mutex_t *lock_of(Tables *tables, Page *page) { return how == ONE ? &tables->all : &page->lock; }

/* A turn begins: the loop changes nothing until it has ended. */
static void enter(Worker *worker) {
    if (how == BARE) return;
    for (;;) {
        atomic_store(&worker->inside, 1);
        if (!atomic_load(&closed)) return;
        atomic_store(&worker->inside, 0);
        worker->again++;
        while (atomic_load_explicit(&closed, memory_order_relaxed)) sched_yield();
    }
}

static void leave(Worker *worker) { atomic_store_explicit(&worker->inside, 0, memory_order_release); }

/* The loop has something to change: no thread is in a turn between these two. */
static void close_gate(void) {
    atomic_store(&closed, true);
    for (int n = 0; n < threads; n++) {
        while (atomic_load(&workers[n].inside)) sched_yield();
    }
}

static void open_gate(void) { atomic_store(&closed, false); }

/* --- reading ----------------------------------------------------------------------------------------------------- */

static uint32_t mask_of(uint32_t first, uint32_t count) { return ((1u << count) - 1) << first; }
static int64_t slot_of(uint64_t word) { return (int64_t)(word >> 32) - 1; }

static void words_of(Tables *tables, Page *page, int i, uint64_t *word, uint64_t *second, Worker *worker) {
    if (how == ONE) take(&tables->all);
    for (;;) {
        uint32_t version = atomic_load_explicit(&page->version, memory_order_acquire);
        *word = atomic_load_explicit(&page->words[i], memory_order_relaxed);
        *second = atomic_load_explicit(&page->words[PAGE_BLOCKS + i], memory_order_relaxed);
        atomic_thread_fence(memory_order_acquire);
        if (how != PAGES) break;
        if (!(version & 1) && version == atomic_load_explicit(&page->version, memory_order_relaxed)) break;
        worker->again++;
    }
    if (how == ONE) give(&tables->all);
}

/* Sectors of one block that lie in one slot each: the reply is a copy, as `sendmsg` makes one. */
static void read_block(Worker *worker, uint32_t block, uint32_t first, uint32_t count) {
    Tables *tables = worker->tables;
    Page *page = &tables->pages[block / PAGE_BLOCKS];
    uint64_t word, second;
    words_of(tables, page, block % PAGE_BLOCKS, &word, &second, worker);
    for (uint32_t n = first, run; n < first + count; n += run) {
        uint32_t side = second >> n & 1;
        for (run = 1; n + run < first + count && (second >> (n + run) & 1) == side; run++);
        int64_t slot = slot_of(side ? second : word);
        uint32_t need = mask_of(n, run);
        if ((atomic_load_explicit(&tables->ready[slot], memory_order_relaxed) & need) != need) abort();
        uint8_t state = atomic_load_explicit(&tables->state[slot], memory_order_relaxed);
        if (!(state & TOUCHED)) atomic_store_explicit(&tables->state[slot], state | TOUCHED, memory_order_relaxed);
        memcpy(worker->reply + (n - first) * SECTOR, tables->map + (size_t)slot * BLOCK + n * SECTOR, run * SECTOR);
    }
    worker->requests++;
}

/* --- writing ----------------------------------------------------------------------------------------------------- */

/* `entry.moved`, of sectors that all have data. */
static uint32_t moved(uint64_t second, uint32_t mask, uint32_t staying) {
    return (uint32_t)(second ^ ~(uint64_t)staying) & mask;
}

static void put(Tables *tables, Part part, const uint8_t *data, uint32_t first) {
    for (uint32_t mask = part.mask; mask;) {
        uint32_t low = __builtin_ctz(mask), run = __builtin_ctz(~(mask >> low));
        memcpy(tables->map + (size_t)part.slot * BLOCK + low * SECTOR, data + (low - first) * SECTOR, run * SECTOR);
        mask &= ~mask_of(low, run);
    }
}

/* `Writes.write_block`; adds to `records`, and leaves in `late` what has to be written behind them. */
static void write_block(Worker *worker, uint32_t block, uint32_t first, uint32_t count, size_t *recorded, Late *late) {
    Tables *tables = worker->tables;
    Page *page = &tables->pages[block / PAGE_BLOCKS];
    pthread_mutex_t *lock = lock_of(tables, page);
    uint32_t i = block % PAGE_BLOCKS, mask = mask_of(first, count), open, found[SECTORS];
    for (;;) { /* where to, and nobody else writes there meanwhile */
        take(lock);
        if (!(page->writing[i] & mask)) break;
        give(lock);
        worker->again++;
        sched_yield();
    }
    uint32_t number = atomic_load_explicit(&sync_number, memory_order_relaxed);
    if (page->synced != number) {
        memset(page->open, 0, sizeof page->open);
        page->synced = number;
    }
    uint64_t word = atomic_load_explicit(&page->words[i], memory_order_relaxed);
    uint64_t second = atomic_load_explicit(&page->words[PAGE_BLOCKS + i], memory_order_relaxed);
    open = page->open[i];
    page->writing[i] |= mask;
    give(lock);

    uint32_t target = moved(second, mask, open);
    Part parts[2] = {{0, mask & ~target, slot_of(word)}, {1, target, slot_of(second)}};
    *late = (Late){.page = page, .block = block, .mask = mask};
    for (int n = 0; n < 2; n++) {
        if (open & parts[n].mask) late->late[n] = parts[n];
        else put(tables, parts[n], worker->data, first);
    }
    for (uint32_t n = 0; n < count; n++) found[n] = sum_of_sector(worker->data + n * SECTOR);

    take(lock); /* all of it in one step */
    uint32_t version = atomic_load_explicit(&page->version, memory_order_relaxed);
    if (how == PAGES) {
        atomic_store_explicit(&page->version, version + 1, memory_order_relaxed);
        atomic_thread_fence(memory_order_release);
    }
    for (int n = 0; n < 2; n++) {
        if (!parts[n].mask) continue;
        uint8_t *record = worker->records + *recorded;
        uint32_t slot = (uint32_t)parts[n].slot, fields[4] = {1 | n << 8 | parts[n].mask << 16, 7, block, slot};
        memcpy(record, fields, RECORD);
        *recorded += RECORD;
        for (uint32_t left = parts[n].mask; left; left &= left - 1) {
            uint32_t sector = __builtin_ctz(left);
            tables->sums[slot * SECTORS + sector] = found[sector - first];
            memcpy(worker->records + *recorded, &found[sector - first], 4);
            *recorded += 4;
        }
        atomic_fetch_or_explicit(&tables->ready[slot], parts[n].mask, memory_order_relaxed);
    }
    second = atomic_load_explicit(&page->words[PAGE_BLOCKS + i], memory_order_relaxed);
    atomic_store_explicit(&page->words[PAGE_BLOCKS + i], (second & ~(uint64_t)mask) | target, memory_order_relaxed);
    page->open[i] |= mask;
    page->dirty = true;
    if (how == PAGES) atomic_store_explicit(&page->version, version + 2, memory_order_release);
    if (!late->late[0].mask && !late->late[1].mask) page->writing[i] &= ~mask;
    give(lock);
    worker->requests++;
}

/* `Intent.publish`: one frame, then the late data. */
static void publish(Worker *worker, size_t recorded, Late *late, int count, uint32_t first) {
    Tables *tables = worker->tables;
    pthread_mutex_t *journal = how == ONE ? &tables->all : &tables->journal;
    take(journal);
    if (tables->head + 24 + recorded > RING) tables->head = 0;
    uint8_t *frame = tables->ring + tables->head;
    uint64_t header[3] = {0x4c4a4246 | (uint64_t)recorded << 32, ++tables->sequence, 0};
    header[2] = crc_of(crc_of(0, (uint8_t *)header, 16), worker->records, recorded);
    memcpy(frame, header, 24);
    memcpy(frame + 24, worker->records, recorded);
    tables->head += (24 + recorded + 7) & ~(size_t)7;
    give(journal);
    for (int n = 0; n < count; n++) {
        if (!late[n].late[0].mask && !late[n].late[1].mask) continue;
        for (int side = 0; side < 2; side++) put(tables, late[n].late[side], worker->data, first);
        take(lock_of(tables, late[n].page));
        late[n].page->writing[late[n].block % PAGE_BLOCKS] &= ~late[n].mask;
        give(lock_of(tables, late[n].page));
    }
}

/* --- threads ----------------------------------------------------------------------------------------------------- */

/* What one `recv` brought. */
static void turn(Worker *worker) {
    uint64_t random = random_of(worker);
    uint32_t block = random % BLOCKS;
    size_t recorded = 0;
    Late late[RUN];
    enter(worker);
    if (work == READ || (work == MIXED && random >> 40 & 1)) {
        for (int n = 0; n < (work == READ ? RUN : 1); n++) {
            if (work == MIXED) read_block(worker, block, 0, SECTORS);
            else read_block(worker, (block + n * 131) % BLOCKS, random >> 40 & 15, 1);
        }
    } else if (work == MIXED) {
        write_block(worker, block, 0, SECTORS, &recorded, late);
        publish(worker, recorded, late, 1, 0);
    } else {
        /* of one sector number, so that a run does not wait for itself: `data` begins there */
        uint32_t first = random >> 40 & 15;
        for (int n = 0; n < RUN; n++) {
            write_block(worker, (block + n * 131) % BLOCKS, first, 1, &recorded, late + n);
        }
        publish(worker, recorded, late, RUN, first);
    }
    leave(worker);
}

/* Each thread keeps to one processor, and no two to the same while there are enough. */
static void settle(int number) {
    cpu_set_t all, one;
    if (sched_getaffinity(0, sizeof all, &all)) return;
    CPU_ZERO(&one);
    for (int cpu = 0, left = number % CPU_COUNT(&all); cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &all) && !left--) CPU_SET(cpu, &one);
    }
    sched_setaffinity(0, sizeof one, &one);
}

static void *serve(void *argument) {
    Worker *worker = argument;
    settle(worker - workers);
    double ran = seconds(CLOCK_THREAD_CPUTIME_ID), began = seconds(CLOCK_MONOTONIC), before = displaced();
    while (!atomic_load_explicit(&over, memory_order_relaxed)) turn(worker);
    worker->cpu = seconds(CLOCK_THREAD_CPUTIME_ID) - ran;
    worker->took = seconds(CLOCK_MONOTONIC) - began;
    worker->displaced = displaced() - before;
    return NULL;
}

static Tables *tables_made(void) {
    Tables *tables = memory(sizeof *tables);
    tables->pages = memory(BLOCKS / PAGE_BLOCKS * sizeof(Page));
    tables->sums = memory((size_t)SLOTS * SECTORS * 4);
    tables->ready = memory(SLOTS * 2);
    tables->state = memory(SLOTS);
    tables->map = memory((size_t)SLOTS * BLOCK);
    tables->ring = memory(RING);
    pthread_mutex_init(&tables->journal, NULL);
    pthread_mutex_init(&tables->all, NULL);
    for (uint32_t n = 0; n < BLOCKS / PAGE_BLOCKS; n++) pthread_mutex_init(&tables->pages[n].lock, NULL);
    for (uint32_t block = 0; block < BLOCKS; block++) {
        Page *page = &tables->pages[block / PAGE_BLOCKS];
        page->words[block % PAGE_BLOCKS] = (uint64_t)(2 * block + 1) << 32 | 0xffff;
        page->words[PAGE_BLOCKS + block % PAGE_BLOCKS] = (uint64_t)(2 * block + 2) << 32;
        tables->ready[2 * block] = 0xffff;
    }
    return tables;
}

/* Every sector has to be what its checksum says, on the side that its word names: 0, or how many are not. */
static int damaged(Tables *tables) {
    int found = 0;
    for (uint32_t block = 0; block < BLOCKS; block++) {
        Page *page = &tables->pages[block / PAGE_BLOCKS];
        uint64_t word = page->words[block % PAGE_BLOCKS], second = page->words[PAGE_BLOCKS + block % PAGE_BLOCKS];
        for (uint32_t n = 0; n < SECTORS; n++) {
            int64_t slot = slot_of(second >> n & 1 ? second : word);
            uint32_t sum = tables->sums[slot * SECTORS + n];
            found += sum && sum != sum_of_sector(tables->map + (size_t)slot * BLOCK + n * SECTOR);
        }
        found += page->writing[block % PAGE_BLOCKS] != 0;
    }
    return found;
}

static int index_of(const char *name, const char *const *names) {
    for (int n = 0; names[n]; n++) {
        if (!strcmp(name, names[n])) return n;
    }
    fprintf(stderr, "threads: '%s' is not known: see the head of threads.c\n", name);
    exit(2);
}

int main(int count, char **arguments) {
    if (count < 5) {
        fprintf(stderr, "usage: threads bare|one|pages read|write|mixed THREADS SECONDS [BUSY]\n");
        return 2;
    }
    how = (How)index_of(arguments[1], (const char *const[]){"bare", "one", "pages", NULL});
    work = (Work)index_of(arguments[2], (const char *const[]){"read", "write", "mixed", NULL});
    threads = atoi(arguments[3]);
    double length = atof(arguments[4]), busy = count > 5 ? atof(arguments[5]) * 1e-6 : 0;
    if (threads < 1 || threads > MOST_THREADS || length <= 0) {
        fprintf(stderr, "threads: 1 to %d threads, and more than 0 seconds\n", MOST_THREADS);
        return 2;
    }
    crc_begin();
    workers = memory(threads * sizeof *workers);
    for (int n = 0; n < threads; n++) {
        workers[n].tables = n && how != BARE ? workers[0].tables : tables_made();
        workers[n].random = 88172645463325252u + n * 7919;
        memset(workers[n].data, n + 1, BLOCK);
    }
    double began = seconds(CLOCK_MONOTONIC), synced = began;
    for (int n = 0; n < threads; n++) pthread_create(&workers[n].thread, NULL, serve, &workers[n]);
    for (double now; (now = seconds(CLOCK_MONOTONIC)) < began + length;) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        if (how != BARE) close_gate();
        if (now - synced > SYNC_MICROSECONDS * 1e-6) {
            atomic_fetch_add(&sync_number, 1);
            synced = now;
        }
        for (double until = seconds(CLOCK_MONOTONIC) + busy; seconds(CLOCK_MONOTONIC) < until;);
        open_gate();
    }
    atomic_store(&over, true);
    uint64_t requests = 0, again = 0;
    double cpu = 0, rate = 0, share = 0;
    for (int n = 0; n < threads; n++) {
        pthread_join(workers[n].thread, NULL);
        requests += workers[n].requests, again += workers[n].again, cpu += workers[n].cpu;
        rate += workers[n].requests / workers[n].took;
        share += workers[n].displaced / workers[n].took / threads;
    }
    int bad = 0;
    for (int n = 0; n < (how == BARE ? threads : 1); n++) bad += damaged(workers[n].tables);
    printf("%.0f %.4f %.4f %lu\n", rate, cpu / requests * 1e6, share, again);
    if (bad) fprintf(stderr, "threads: %d sectors are not what their checksum says\n", bad);
    return bad != 0;
}
