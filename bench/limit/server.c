/* SPDX-FileCopyrightText: Forebay developers
 * SPDX-License-Identifier: Apache-2.0
 *
 * What serving from a block cache costs in C, as a limit to compare with: an NBD server over tables like those of
 * Forebay (two sides of each sector, checksums, a journal that is written before the reply), with all of an image in
 * them. It knows no misses, no eviction, no write-back, no recovery, and keeps nothing when it ends.
 *
 *     server SOCKET IMAGE DEVICE one|each
 *
 * DEVICE is made anew: the journal, then both sides. `one`: one thread serves all connections; `each`: a thread for
 * each. Sources: doc/proto.md of NetworkBlockDevice/nbd; the order of writes is that of cache/README.md.
 */
#define _GNU_SOURCE
#include "sector.h"

#include <endian.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { BLOCK = 65536, SECTORS = 16, JOURNAL = 32 << 20, MOST = 2 << 20, BUFFER = MOST + 4096, PIECES = 1024, CLIENTS = 64 };
enum { FRAME = 64 << 10 };
enum { READ = 0, WRITE = 1, DISCONNECT = 2, FLUSH = 3 };
enum { OPT_EXPORT_NAME = 1, OPT_ABORT = 2, OPT_INFO = 6, OPT_GO = 7, OPT_STRUCTURED = 8 };
enum { REP_ACK = 1, REP_INFO = 3 };
#define REP_UNSUPPORTED 0x80000001u
#define TRANSMISSION_FLAGS (1 | 1 << 2 | 1 << 8) /* has flags, FLUSH, CAN_MULTI_CONN */
#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_MAGIC 0x67446698u
#define CHUNK_MAGIC 0x668e33efu

/* The tables: which side of a sector is valid, which sectors may be written in place until the next FLUSH. */
static uint16_t *sides, *open_sectors;
static uint32_t *sums;
static uint8_t *map;
static uint64_t size, blocks, journal_end, sequence;
static int device;
static pthread_mutex_t tables = PTHREAD_MUTEX_INITIALIZER;

struct request { uint32_t magic; uint16_t flags, type; uint64_t cookie, offset; uint32_t length; } __attribute__((packed));
struct record { uint32_t block; uint16_t mask, sides; uint32_t sums[SECTORS]; };
struct connection {
    int socket, structured;
    size_t start, end, frame_used, heads_used, pieces_used;
    struct iovec pieces[PIECES];
    uint8_t buffer[BUFFER], frame[FRAME], heads[PIECES * 28];
};

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int take(int fd, void *to, size_t length) {
    for (uint8_t *at = to; length;) {
        ssize_t got = recv(fd, at, length, 0);
        if (got <= 0) return -1;
        at += got, length -= got;
    }
    return 0;
}

static int give(int fd, const void *from, size_t length) {
    for (const uint8_t *at = from; length;) {
        ssize_t done = send(fd, at, length, MSG_NOSIGNAL);
        if (done <= 0) return -1;
        at += done, length -= done;
    }
    return 0;
}

/* ---------------------------------------------------------------------------------------------------- handshake */

static int answer(int fd, uint32_t option, uint32_t type, const void *data, uint32_t length) {
    struct { uint64_t magic; uint32_t option, type, length; } __attribute__((packed)) head = {
        htobe64(0x3e889045565a9), htobe32(option), htobe32(type), htobe32(length)};
    return give(fd, &head, sizeof head) || (length && give(fd, data, length)) ? -1 : 0;
}

/* 0 when the transmission phase begins, -1 when the client has left. */
static int handshake(struct connection *c) {
    struct { uint64_t magic, option_magic; uint16_t flags; } __attribute__((packed)) hello = {
        htobe64(0x4e42444d41474943), htobe64(0x49484156454f5054), htobe16(3)};
    struct { uint16_t type; uint64_t size; uint16_t flags; } __attribute__((packed)) export = {
        0, htobe64(size), htobe16(TRANSMISSION_FLAGS)};
    uint32_t client_flags;
    if (give(c->socket, &hello, sizeof hello) || take(c->socket, &client_flags, sizeof client_flags)) return -1;
    for (;;) {
        struct { uint64_t magic; uint32_t option, length; } __attribute__((packed)) head;
        uint8_t data[4096];
        if (take(c->socket, &head, sizeof head)) return -1;
        uint32_t option = be32toh(head.option), length = be32toh(head.length);
        if (length > sizeof data || take(c->socket, data, length)) return -1;
        switch (option) {
        case OPT_STRUCTURED:
            c->structured = 1;
            if (answer(c->socket, option, REP_ACK, 0, 0)) return -1;
            break;
        case OPT_INFO:
        case OPT_GO:
            if (answer(c->socket, option, REP_INFO, &export, sizeof export)) return -1;
            if (answer(c->socket, option, REP_ACK, 0, 0)) return -1;
            if (option == OPT_GO) return 0;
            break;
        case OPT_EXPORT_NAME:
            return give(c->socket, &export.size, sizeof export - sizeof export.type);
        case OPT_ABORT:
            return -1;
        default:
            if (answer(c->socket, option, REP_UNSUPPORTED, 0, 0)) return -1;
        }
    }
}

/* --------------------------------------------------------------------------------------------------- the tables */

static uint64_t place(uint64_t block, int side, int sector) {
    return JOURNAL + (2 * block + side) * BLOCK + (uint64_t)sector * SECTOR_BYTES;
}

/* The end of the run of sectors, from `sector` on and before `end`, that lie on one side. */
static int run_end(uint16_t mask, int sector, int end) {
    int side = mask >> sector & 1;
    while (sector < end && (mask >> sector & 1) == side) sector++;
    return sector;
}

static void add_piece(struct connection *c, const void *at, size_t length) {
    c->pieces[c->pieces_used++] = (struct iovec){(void *)at, length};
}

static void add_head(struct connection *c, uint64_t cookie, int is_read, uint64_t offset, uint32_t length) {
    uint8_t *at = c->heads + c->heads_used;
    if (is_read && c->structured) {
        struct { uint32_t magic; uint16_t flags, type; uint64_t cookie; uint32_t length; uint64_t offset; } __attribute__((packed))
        head = {htobe32(CHUNK_MAGIC), htobe16(1), htobe16(1), cookie, htobe32(length + 8), htobe64(offset)};
        memcpy(at, &head, sizeof head);
        add_piece(c, at, sizeof head);
        c->heads_used += sizeof head;
        return;
    }
    struct { uint32_t magic, error; uint64_t cookie; } __attribute__((packed)) head = {htobe32(SIMPLE_MAGIC), 0, cookie};
    memcpy(at, &head, sizeof head);
    add_piece(c, at, sizeof head);
    c->heads_used += sizeof head;
}

static void serve_read(struct connection *c, uint64_t cookie, uint64_t offset, uint32_t length) {
    add_head(c, cookie, 1, offset, length);
    for (uint64_t at = offset, end = offset + length; at < end;) {
        uint64_t block = at / BLOCK, stop = (block + 1) * BLOCK < end ? (block + 1) * BLOCK : end;
        uint16_t mask = __atomic_load_n(&sides[block], __ATOMIC_ACQUIRE);
        int sector = at % BLOCK / SECTOR_BYTES, last = (stop - block * BLOCK + SECTOR_BYTES - 1) / SECTOR_BYTES;
        while (sector < last) {
            int next = run_end(mask, sector, last);
            uint64_t run = block * BLOCK + (uint64_t)next * SECTOR_BYTES, part = (run < stop ? run : stop) - at;
            add_piece(c, map + place(block, mask >> sector & 1, sector) + at % SECTOR_BYTES, part);
            at += part, sector = next;
        }
    }
}

/* Write whole sectors of one block, and note the record of it. What was durable stays on its side until a FLUSH. */
static void write_block(struct connection *c, uint64_t block, int first, int count, const uint8_t *data) {
    struct record *record = (struct record *)(c->frame + c->frame_used);
    uint16_t mask = ((1u << count) - 1) << first, target;
    pthread_mutex_lock(&tables);
    target = (sides[block] & open_sectors[block]) | (~sides[block] & ~open_sectors[block]);
    pthread_mutex_unlock(&tables);
    for (int sector = first; sector < first + count;) {
        int next = run_end(target, sector, first + count);
        size_t length = (size_t)(next - sector) * SECTOR_BYTES;
        const uint8_t *from = data + (size_t)(sector - first) * SECTOR_BYTES;
        if (pwrite(device, from, length, place(block, target >> sector & 1, sector)) != (ssize_t)length) fail("pwrite");
        sector = next;
    }
    record->block = block, record->mask = mask, record->sides = target & mask;
    for (int n = 0; n < count; n++) record->sums[n] = sum_of_sector(data + (size_t)n * SECTOR_BYTES);
    c->frame_used += offsetof(struct record, sums) + 4 * count;
}

static void serve_write(struct connection *c, uint64_t offset, uint32_t length, const uint8_t *data) {
    for (uint64_t at = offset, end = offset + length; at < end;) {
        uint64_t block = at / BLOCK, stop = (block + 1) * BLOCK < end ? (block + 1) * BLOCK : end;
        write_block(c, block, at % BLOCK / SECTOR_BYTES, (stop - at) / SECTOR_BYTES, data);
        data += stop - at, at = stop;
    }
}

/* Write the frame of a batch to the journal, and put what it says into the tables. */
static void publish(struct connection *c) {
    struct head { uint32_t length, crc; uint64_t sequence; } *head = (struct head *)c->frame;
    if (c->frame_used == sizeof *head) return;
    pthread_mutex_lock(&tables);
    if (journal_end + c->frame_used > JOURNAL) journal_end = 0;
    head->length = c->frame_used, head->crc = 0, head->sequence = sequence++;
    head->crc = crc_of(0, c->frame, c->frame_used);
    if (pwrite(device, c->frame, c->frame_used, journal_end) != (ssize_t)c->frame_used) fail("journal");
    journal_end += c->frame_used;
    for (size_t at = sizeof *head; at < c->frame_used;) {
        struct record *record = (struct record *)(c->frame + at);
        int first = __builtin_ctz(record->mask), count = __builtin_popcount(record->mask);
        for (int n = 0; n < count; n++) {
            int sector = first + n, side = record->sides >> sector & 1;
            sums[(2 * (uint64_t)record->block + side) * SECTORS + sector] = record->sums[n];
        }
        open_sectors[record->block] |= record->mask;
        uint16_t now = (sides[record->block] & ~record->mask) | record->sides;
        __atomic_store_n(&sides[record->block], now, __ATOMIC_RELEASE);
        at += offsetof(struct record, sums) + 4 * count;
    }
    pthread_mutex_unlock(&tables);
    c->frame_used = sizeof *head;
}

static void serve_flush(void) {
    pthread_mutex_lock(&tables);
    memset(open_sectors, 0, blocks * sizeof *open_sectors);
    pthread_mutex_unlock(&tables);
    if (fdatasync(device)) fail("fdatasync");
}

/* ------------------------------------------------------------------------------------------------- connections */

static int send_replies(struct connection *c) {
    struct iovec *piece = c->pieces;
    size_t left = c->pieces_used;
    while (left) {
        struct msghdr message = {.msg_iov = piece, .msg_iovlen = left};
        ssize_t done = sendmsg(c->socket, &message, MSG_NOSIGNAL);
        if (done < 0) return -1;
        while (left && (size_t)done >= piece->iov_len) done -= piece->iov_len, piece++, left--;
        if (left) piece->iov_base = (uint8_t *)piece->iov_base + done, piece->iov_len -= done;
    }
    c->pieces_used = c->heads_used = 0;
    return 0;
}

/* Receive once, and serve every whole request that is there: -1 when the client has left. */
static int turn(struct connection *c) {
    ssize_t got = recv(c->socket, c->buffer + c->end, BUFFER - c->end, 0);
    if (got <= 0) return -1;
    c->end += got;
    while (c->end - c->start >= 28) {
        struct request request;
        memcpy(&request, c->buffer + c->start, sizeof request);
        uint16_t type = be16toh(request.type);
        uint64_t offset = be64toh(request.offset);
        uint32_t length = be32toh(request.length);
        size_t whole = sizeof request + (type == WRITE ? length : 0);
        int fits = type > WRITE || (offset <= size && length <= size - offset && length <= MOST);
        int whole_sectors = type != WRITE || !((offset | length) % SECTOR_BYTES);
        if (request.magic != htobe32(REQUEST_MAGIC) || !fits || !whole_sectors) return -1;
        if (c->end - c->start < whole) break;
        if (c->pieces_used + 2 + length / SECTOR_BYTES + 1 > PIECES || c->frame_used > FRAME / 2) {
            publish(c);
            if (send_replies(c)) return -1;
        }
        if (type == READ) serve_read(c, request.cookie, offset, length);
        if (type == WRITE) serve_write(c, offset, length, c->buffer + c->start + sizeof request);
        if (type == FLUSH) publish(c), serve_flush();
        if (type == DISCONNECT) return -1;
        if (type != READ) add_head(c, request.cookie, 0, 0, 0);
        c->start += whole;
    }
    publish(c);
    memmove(c->buffer, c->buffer + c->start, c->end - c->start);
    c->end -= c->start, c->start = 0;
    return send_replies(c);
}

static struct connection *accepted(int listener) {
    struct connection *c = calloc(1, sizeof *c);
    if (!c || (c->socket = accept(listener, 0, 0)) < 0) fail("accept");
    c->frame_used = 16;
    if (handshake(c)) {
        close(c->socket);
        free(c);
        return 0;
    }
    return c;
}

static void *serve_alone(void *given) {
    struct connection *c = given;
    while (!turn(c)) {}
    close(c->socket);
    free(c);
    return 0;
}

static void serve_each(int listener) {
    for (;;) {
        struct connection *c = accepted(listener);
        pthread_t thread;
        if (c && (pthread_create(&thread, 0, serve_alone, c) || pthread_detach(thread))) fail("pthread_create");
    }
}

static void serve_together(int listener) {
    struct pollfd watched[CLIENTS + 1] = {{.fd = listener, .events = POLLIN}};
    struct connection *clients[CLIENTS + 1];
    for (int count = 1;;) {
        if (poll(watched, count, -1) < 0) fail("poll");
        for (int n = count - 1; n > 0; n--) {
            if (!watched[n].revents || !turn(clients[n])) continue;
            close(clients[n]->socket);
            free(clients[n]);
            watched[n] = watched[--count], clients[n] = clients[count];
        }
        if (!watched[0].revents || count > CLIENTS || !(clients[count] = accepted(listener))) continue;
        watched[count] = (struct pollfd){.fd = clients[count]->socket, .events = POLLIN};
        count++;
    }
}

/* ------------------------------------------------------------------------------------------------------- start */

static void *table(uint64_t count, size_t width) {
    void *found = calloc(count, width);
    if (!found) fail("calloc");
    return found;
}

static void open_files(const char *image_path, const char *device_path) {
    struct stat is;
    int image = open(image_path, O_RDONLY);
    if (image < 0 || fstat(image, &is)) fail(image_path);
    size = is.st_size, blocks = (size + BLOCK - 1) / BLOCK;
    device = open(device_path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (device < 0 || ftruncate(device, place(blocks, 0, 0))) fail(device_path);
    map = mmap(0, place(blocks, 0, 0), PROT_READ | PROT_WRITE, MAP_SHARED, device, 0);
    if (map == MAP_FAILED) fail("mmap");
    sides = table(blocks, sizeof *sides), open_sectors = table(blocks, sizeof *open_sectors);
    sums = table(2 * blocks * SECTORS, sizeof *sums);
    for (uint64_t block = 0; block < blocks; block++) {
        uint8_t *to = map + place(block, 0, 0);
        if (pread(image, to, BLOCK, block * BLOCK) < 0) fail(image_path);
        memset(to + BLOCK, 0, BLOCK); /* both sides take their room now */
        for (int n = 0; n < SECTORS; n++) sums[2 * block * SECTORS + n] = sum_of_sector(to + (size_t)n * SECTOR_BYTES);
    }
    close(image);
}

int main(int count, char **words) {
    if (count != 5) {
        fprintf(stderr, "usage: server SOCKET IMAGE DEVICE one|each\n");
        return 2;
    }
    crc_begin();
    open_files(words[2], words[3]);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    strncpy(address.sun_path, words[1], sizeof address.sun_path - 1);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, CLIENTS)) fail(words[1]);
    if (strcmp(words[4], "each")) serve_together(listener);
    serve_each(listener);
}
