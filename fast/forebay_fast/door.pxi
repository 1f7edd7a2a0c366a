# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

# --- the FUSE door ---------------------------------------------------------------------------------------------------
#
# A part of core.pyx. What `forebay.doors.fuse.files.Files` does with READ, WRITE, FSYNC, FLUSH and GETATTR of open files, and
# `forebay.doors.fuse.link.Link` with its requests, in the event loop's thread: FuseDevice takes requests from the kernel
# and gives them to the DiskConnection of their file, which sends what came at once, and answers the kernel as replies
# come. Everything else is handed to pyfuse3. Requests without a reply are kept: another connection may follow.

from cpython.bytearray cimport PyByteArray_FromStringAndSize
from libc.errno cimport ECONNABORTED, EINVAL, ENODEV, ENOENT, ENOMEM, ENOSPC, EOPNOTSUPP, EOVERFLOW, EPERM, ESHUTDOWN
from libc.stdint cimport int32_t
from libc.string cimport memcmp

cdef extern from "<linux/fuse.h>" nogil:
    struct fuse_in_header:
        uint32_t len, opcode
        uint64_t unique, nodeid
    struct fuse_read_in:
        uint64_t fh, offset
        uint32_t size
    struct fuse_write_in:
        uint64_t fh, offset
        uint32_t size
    struct fuse_fsync_in:
        uint64_t fh
    struct fuse_flush_in:
        uint64_t fh
    struct fuse_write_out:
        uint32_t size
    struct fuse_out_header:
        uint32_t len
        int32_t error
        uint64_t unique
    int FUSE_READ, FUSE_WRITE, FUSE_FSYNC, FUSE_FLUSH, FUSE_GETATTR, FUSE_INTERRUPT

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *space, size_t length)
    ssize_t write(int fd, const void *data, size_t length)

cdef extern from "<sys/uio.h>" nogil:
    ssize_t writev(int fd, const iovec *parts, int count)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_WAITALL

cdef enum:
    NBD_READ = 0             # wire.Cmd
    NBD_WRITE = 1
    NBD_FLUSH = 3
    NBD_WRITE_ZEROES = 6
    CAN_FLUSH = 4            # wire.Flag
    CAN_WRITE_ZEROES = 64
    MOST_DATA = 1048576      # of one request of the kernel
    LANDING = MOST_DATA + 8192
    COPIED = 16384           # bytes of a WRITE that are copied; more stay where they were received
    LEAST_ZEROS = 4096       # doors.fuse.files
    AT_ONCE = 64             # requests taken before they are sent, and
    DATA_AT_ONCE = 65536     # bytes to be written: the daemon is to begin with these
    PARTS = 64               # buffers of one sendmsg
    AHEAD = 131072           # bytes received beyond the reply that has to be completed
    RECEIVED = MOST_DATA + 2 * AHEAD
    SPARE = 16               # landing places that wait for their next use
    MOST_HANDED = 131072     # bytes of a request to pyfuse3: it has to fit into a socket
    MOST_ASKED = 4096        # requests without an answer, of all disks: then the kernel has to wait
    MOST_KEPT = 268435456    # bytes of data of these


cdef inline int errno_of(uint32_t code) noexcept nogil:
    """As `wire.local_errno`."""
    if code in (EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, EOPNOTSUPP, ESHUTDOWN):
        return code
    return EINVAL


cdef inline bint is_zeros(const uint8_t *data, size_t length) noexcept nogil:
    """True for a range that is written as zeroes: as `forebay.doors.fuse.files`."""
    if length < LEAST_ZEROS or data[0] or data[length - 1] or data[length // 2]:
        return False
    return not memcmp(data, data + 1, length - 1)


cdef class FuseFile:
    """One open(2) of `size` bytes of the disk that `connection` leads to; None: of nothing.

    `unflushed`: something was written through it since the last flush. `touched` is called after a flush.
    """

    cdef DiskConnection connection
    cdef uint64_t size
    cdef bint writable
    cdef object touched
    cdef readonly bint unflushed

    def __init__(self, DiskConnection connection, uint64_t size, bint writable, touched):
        self.connection, self.size, self.writable, self.touched = connection, size, writable, touched


@cython.freelist(64)
cdef class Asked:
    """A request of the kernel that has no answer, and the NBD request made of it."""

    cdef uint64_t unique, cookie, offset
    cdef uint32_t length
    cdef int command
    cdef bint sent
    cdef FuseFile file
    cdef object owner           # of `data`; None: it has none
    cdef const uint8_t *data
    cdef uint8_t head[HEADER]


cdef class FuseDevice(Rest):
    """The kernel's side of a mount: /dev/fuse, which must not block.

    `others` has the requests for pyfuse3, whole, in their order; :meth:`run` returns OTHER when there are some, GONE
    when it is unmounted. `attributes` has the answers to GETATTR of open files, by inode: the kernel asks after each
    write. `complain` is called with the errno where the kernel does not take an answer.
    """

    cdef readonly dict files, attributes
    cdef readonly object others
    cdef object landing, complain
    cdef uint8_t *land
    cdef list spare, asking
    cdef size_t asked, kept

    def __init__(self, int fd, others, complain):
        self.sock, self.others, self.complain = fd, others, complain
        self.files, self.attributes, self.spare, self.asking = {}, {}, [], []
        self.new_landing()

    cdef int new_landing(self) except -1:
        self.landing = self.spare.pop() if self.spare else PyByteArray_FromStringAndSize(NULL, LANDING)
        self.land = <uint8_t *> PyByteArray_AS_STRING(self.landing)
        return 0

    def opened(self, number, FuseFile file):
        """Serve the file that the kernel knows by this number."""
        self.files[number] = file

    def closed(self, number):
        """Serve it no more. True if something was written through it since the last flush."""
        return (<FuseFile> self.files.pop(number)).unflushed

    def end(self):
        """The descriptor is about to be closed: nobody is answered any more."""
        self.sock = -1

    cpdef int run(self, double turn_ends) except -1:
        cdef int status = YIELD, n = 0
        cdef size_t kept = 0
        while status == YIELD and seconds_now() < turn_ends:
            n, kept = 0, self.kept
            while status == YIELD and n < AT_ONCE and self.kept < kept + DATA_AT_ONCE:
                status = self.take()
                n += 1
            self.send()
        return OTHER if self.others and status != GONE else status

    cdef int take(self) except -1:
        """Take one request from the kernel. WAIT: there is none; GONE: there will be none; YIELD: it was taken."""
        cdef ssize_t got
        cdef int error
        cdef fuse_in_header *head = <fuse_in_header *> self.land
        if self.asked >= MOST_ASKED or self.kept >= MOST_KEPT:
            self.look_for(0)
            return WAIT
        with nogil:
            got = read(self.sock, self.land, LANDING)
            error = last_error()
        if got <= 0:
            if got < 0 and error == EAGAIN:
                return WAIT
            if got < 0 and error in (EINTR, ENOENT):  # it was given up at this moment
                return YIELD
            if got == 0 or error in (ENODEV, ECONNABORTED):
                return GONE
            raise OSError(error, os.strerror(error))
        if got < <ssize_t> sizeof(fuse_in_header) or head.len != got:
            raise OSError(EIO, f"a request of {got} bytes")
        if head.opcode == FUSE_INTERRUPT:
            return YIELD  # what is with the daemon is waited for; pyfuse3 does nothing with these either
        if head.opcode == FUSE_READ:
            self.read(head.unique, got)
        elif head.opcode == FUSE_WRITE:
            self.write(head.unique, got)
        elif head.opcode in (FUSE_FSYNC, FUSE_FLUSH):
            self.flush(head.unique, got, head.opcode == FUSE_FLUSH)
        elif head.opcode == FUSE_GETATTR and (found := self.attributes.get(head.nodeid)) is not None:
            self.reply(head.unique, 0, PyBytes_AS_STRING(found), len(found))
        elif got > MOST_HANDED:
            self.reply(head.unique, EIO, NULL, 0)
        else:
            self.others.append(PyBytes_FromStringAndSize(<const char *> self.land, got))
        return YIELD

    cdef FuseFile file_of(self, ssize_t got, size_t length):
        """The file of the request at `land`, whose arguments take so many bytes. None: there is none."""
        cdef uint64_t number
        if got < <ssize_t> (sizeof(fuse_in_header) + length):
            return None
        memcpy(&number, self.land + sizeof(fuse_in_header), 8)  # all of them begin with it
        if PLANTS and "wrong handle" in bugs:
            number = max(self.files, default=number)
        return self.files.get(number)

    cdef int read(self, uint64_t unique, ssize_t got) except -1:
        cdef fuse_read_in *told = <fuse_read_in *> (self.land + sizeof(fuse_in_header))
        cdef FuseFile file = self.file_of(got, sizeof(fuse_read_in))
        if file is None or told.size > MOST_DATA:
            return self.reply(unique, EIO, NULL, 0)
        if file.connection is None or told.offset >= file.size:
            return self.reply(unique, 0, NULL, 0)
        asked = self.new_asked(unique, file, NBD_READ)
        asked.offset, asked.length = told.offset, <uint32_t> min(<uint64_t> told.size, file.size - told.offset)
        return self.ask(asked)

    cdef int write(self, uint64_t unique, ssize_t got) except -1:
        cdef fuse_write_in *told = <fuse_write_in *> (self.land + sizeof(fuse_in_header))
        cdef const uint8_t *data = self.land + sizeof(fuse_in_header) + sizeof(fuse_write_in)
        cdef FuseFile file = self.file_of(got, sizeof(fuse_write_in))
        if file is None or self.land + got < data + told.size:
            return self.reply(unique, EIO, NULL, 0)
        if file.connection is None or told.offset >= file.size:
            return self.reply(unique, ENOSPC, NULL, 0)
        asked = self.new_asked(unique, file, NBD_WRITE)
        asked.offset, asked.length = told.offset, <uint32_t> min(<uint64_t> told.size, file.size - told.offset)
        file.unflushed = True
        if file.connection.flags & CAN_WRITE_ZEROES and is_zeros(data, asked.length):
            asked.command = NBD_WRITE_ZEROES
        else:
            self.keep(asked, data)
        return self.ask(asked)

    cdef int keep(self, Asked asked, const uint8_t *data) except -1:
        """Have what is to be written for as long as there is no answer."""
        if asked.length > COPIED:
            asked.owner, asked.data = self.landing, data
            self.new_landing()
        else:
            asked.owner = PyBytes_FromStringAndSize(<const char *> data, asked.length)
            asked.data = <const uint8_t *> PyBytes_AS_STRING(asked.owner)
        self.kept += asked.length
        return 0

    cdef int flush(self, uint64_t unique, ssize_t got, bint closes) except -1:
        """FSYNC, and FLUSH, which comes with each close(2) and is to tell what has failed until then."""
        cdef FuseFile file = self.file_of(got, sizeof(fuse_flush_in) if closes else sizeof(fuse_fsync_in))
        if file is None:
            return self.reply(unique, EIO, NULL, 0)
        if not file.writable or file.connection is None or (closes and not file.unflushed):
            return self.reply(unique, 0, NULL, 0)
        file.unflushed = False
        asked = self.new_asked(unique, file, NBD_FLUSH)
        if not file.connection.flags & CAN_FLUSH:
            return self.answer(asked, 0, NULL)
        return self.ask(asked)

    cdef Asked new_asked(self, uint64_t unique, FuseFile file, int command):
        cdef Asked asked = Asked.__new__(Asked)
        asked.unique, asked.file, asked.command = unique, file, command
        self.asked += 1
        return asked

    cdef int ask(self, Asked asked) except -1:
        cdef DiskConnection connection = asked.file.connection
        if connection.refusal:
            return self.answer(asked, connection.refusal, NULL)
        if connection.ask(asked):
            self.asking.append(connection)
        return 0

    cdef int send(self) except -1:
        """Have all connections send what they were given."""
        cdef DiskConnection connection
        if self.asking:
            for one in self.asking:
                connection = one
                connection.send()
            self.asking.clear()
        return 0

    # --- answers

    cdef int answer(self, Asked asked, int error, const uint8_t *data) except -1:
        """Tell the kernel what came of a request: `data` of a READ, or an errno."""
        cdef fuse_write_out written
        if error and asked.command != NBD_READ:
            asked.file.unflushed = True
        if error:
            self.reply(asked.unique, error, NULL, 0)
        elif asked.command == NBD_READ:
            self.reply(asked.unique, 0, data, asked.length)
        elif asked.command == NBD_FLUSH:
            asked.file.touched()
            self.reply(asked.unique, 0, NULL, 0)
        else:
            memset(&written, 0, sizeof(written))
            written.size = asked.length
            self.reply(asked.unique, 0, &written, sizeof(written))
        self.asked -= 1
        if asked.owner is not None:
            self.kept -= asked.length
            if asked.length > COPIED and len(self.spare) < SPARE:
                self.spare.append(asked.owner)
            asked.owner, asked.data = None, NULL
        if not self.events and self.asked < MOST_ASKED and self.kept < MOST_KEPT:
            self.look_for(EPOLLIN)
        return 0

    cdef int reply(self, uint64_t unique, int error, const void *data, size_t length) except -1:
        cdef fuse_out_header head
        cdef iovec parts[2]
        cdef ssize_t done
        cdef int why
        if self.sock < 0:
            return 0
        head.len, head.error, head.unique = <uint32_t> (sizeof(head) + length), -error, unique
        parts[0].iov_base, parts[0].iov_len = &head, sizeof(head)
        parts[1].iov_base, parts[1].iov_len = <void *> data, length
        with nogil:
            done = writev(self.sock, parts, 2 if length else 1)
            why = last_error()
        if done >= 0 or why in (ENOENT, ENODEV, ECONNABORTED):  # nobody waits for it any more
            return 0
        self.complain(why)
        return 0 if error else self.reply(unique, EIO, NULL, 0)


cdef class DiskConnection(Rest):
    """The NBD requests of all who have a disk open, on one connection after the other, without structured replies.

    It begins with none. `run` returns GONE when the connection is of no use any more, which `why` tells: what has no
    answer then waits until :meth:`begin` gives it the next one, or :meth:`refuse` answers it.
    """

    cdef FuseDevice device
    cdef dict asked             # by cookie, in their order: what has no answer
    cdef list unsent
    cdef Py_ssize_t next_unsent
    cdef size_t sent            # bytes of the next one
    cdef uint64_t cookie
    cdef uint32_t flags
    cdef int refusal
    cdef bint up
    cdef object received
    cdef uint8_t *at
    cdef size_t start, end, need
    cdef readonly object why
    cdef readonly double heard  # seconds of the monotonic clock: the last reply, or the first request after a rest
    cdef readonly uint64_t answers

    def __init__(self, FuseDevice device):
        self.device, self.asked, self.unsent = device, {}, []
        self.flags = CAN_FLUSH  # until a server has said what it can
        self.received = PyByteArray_FromStringAndSize(NULL, RECEIVED)
        self.at = <uint8_t *> PyByteArray_AS_STRING(self.received)

    @property
    def owed(self):
        """Requests without an answer."""
        return len(self.asked)

    def begin(self, int sock, uint32_t flags):
        """Go on with a connection that has just entered transmission: all that has no answer is sent, again too."""
        cdef Asked asked
        self.sock, self.flags, self.refusal, self.up, self.why = sock, flags, 0, True, None
        self.start = self.end = self.sent = self.next_unsent = 0
        self.need = SIMPLE
        self.heard = seconds_now()
        self.unsent = list(self.asked.values())
        if PLANTS and "forgotten on reconnect" in bugs:
            self.unsent = [one for one in self.unsent if not (<Asked> one).sent]
        for one in self.unsent:
            asked = one
            asked.sent = False
        self.look_for(EPOLLIN | EPOLLOUT if self.unsent else EPOLLIN)

    def refuse(self, int error):
        """Answer all that waits with this errno, and all that comes, until there is a connection again."""
        self.up, self.refusal = False, error
        waiting, self.asked, self.unsent = self.asked, {}, []
        for one in waiting.values():
            self.device.answer(one, error, NULL)

    def give_up(self, why):
        """Have `run` return GONE once something comes on the socket, as when it is shut down."""
        self.fail(why)

    cdef bint ask(self, Asked asked) except -1:
        """Take a request. True if it is the first that is to be sent."""
        cdef uint32_t word = htobe32(0x25609513)
        cdef uint64_t offset = htobe64(asked.offset)
        cdef uint32_t length = htobe32(asked.length)
        self.cookie += 1
        asked.cookie = self.cookie
        memcpy(asked.head, &word, 4)
        word = htobe32(asked.command)
        memcpy(asked.head + 4, &word, 4)
        memcpy(asked.head + 8, &asked.cookie, 8)
        memcpy(asked.head + 16, &offset, 8)
        memcpy(asked.head + 24, &length, 4)
        if not self.asked:
            self.heard = seconds_now()
        self.asked[asked.cookie] = asked
        if not self.up:
            return False
        self.unsent.append(asked)
        return len(self.unsent) == 1

    cdef bint fail(self, why) except -1:
        """The connection is of no use any more. False."""
        self.up, self.why = False, why
        return False

    cdef bint send(self) except -1:
        """Send what can be sent. False if the connection broke."""
        cdef iovec parts[PARTS]
        cdef msghdr message
        cdef ssize_t got
        cdef int count, error
        cdef Py_ssize_t n
        cdef Asked asked
        if not self.up:
            return False
        memset(&message, 0, sizeof(message))
        while self.next_unsent < len(self.unsent):
            count = 0
            for n in range(self.next_unsent, min(len(self.unsent), self.next_unsent + PARTS // 2)):
                asked = self.unsent[n]
                count += self.parts_of(asked, self.sent if n == self.next_unsent else 0, parts + count)
            message.msg_iov, message.msg_iovlen = parts, count
            with nogil:
                got = sendmsg(self.sock, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
                error = last_error()
            if got < 0 and error == EAGAIN:
                self.look_for(EPOLLIN | EPOLLOUT)
                return True
            if got < 0:
                return self.fail(os.strerror(error))
            self.note_sent(got)
        self.unsent.clear()
        self.next_unsent = 0
        self.look_for(EPOLLIN)
        return True

    cdef int parts_of(self, Asked asked, size_t sent, iovec *parts) noexcept:
        """What is left of a request when so many bytes of it were sent: how many buffers that are."""
        cdef int count = 0
        if sent < HEADER:
            parts[0].iov_base, parts[0].iov_len = asked.head + sent, HEADER - sent
            count, sent = 1, HEADER
        if asked.data != NULL:
            parts[count].iov_base = <void *> (asked.data + (sent - HEADER))
            parts[count].iov_len = asked.length - (sent - HEADER)
            count += 1
        return count

    cdef int note_sent(self, size_t got) except -1:
        cdef Asked asked
        cdef size_t left
        while got:
            asked = self.unsent[self.next_unsent]
            left = HEADER + (asked.length if asked.data != NULL else 0) - self.sent
            if got < left:
                self.sent += got
                return 0
            asked.sent = True
            got -= left
            self.sent = 0
            self.next_unsent += 1
        return 0

    cpdef int run(self, double turn_ends) except -1:
        cdef ssize_t got
        cdef size_t length
        cdef int error
        if self.unsent:
            self.send()
        while self.up:
            self.make_room()
            length = min(RECEIVED - self.end, max(self.start + self.need - self.end, <size_t> AHEAD))
            with nogil:
                got = recv(self.sock, self.at + self.end, length, MSG_DONTWAIT)
                error = last_error()
            if got < 0 and error == EAGAIN:
                return WAIT
            if got <= 0:
                self.fail(os.strerror(error) if got else "the server closed the connection")
            elif self.take(got):
                if got < <ssize_t> length:
                    return WAIT
                if seconds_now() > turn_ends:
                    return YIELD
        return GONE

    cdef void make_room(self) noexcept:
        """Have room for the reply that is being received."""
        if self.start == self.end:
            self.start = self.end = 0
        elif self.start + self.need > RECEIVED or self.end == RECEIVED:
            memmove(self.at, self.at + self.start, self.end - self.start)
            self.start, self.end = 0, self.end - self.start

    cdef bint take(self, size_t got) except -1:
        """Answer the kernel as far as whole replies have come. False if the server broke the protocol, or goes."""
        cdef uint32_t magic, code
        cdef uint64_t cookie
        cdef size_t length
        cdef Asked asked
        self.end += got
        self.heard = seconds_now()
        while self.end - self.start >= SIMPLE:
            memcpy(&magic, self.at + self.start, 4)
            memcpy(&code, self.at + self.start + 4, 4)
            memcpy(&cookie, self.at + self.start + 8, 8)
            asked = self.asked.get(cookie)
            if be32toh(magic) != 0x67446698:
                return self.fail(f"the server broke the protocol: bad reply magic {be32toh(magic):#x}")
            if asked is None or not asked.sent:
                return self.fail("the server broke the protocol: a reply to no request")
            code = be32toh(code)
            if code == ESHUTDOWN:
                return self.fail("the server is shutting down")
            length = asked.length if asked.command == NBD_READ and not code else 0
            self.need = SIMPLE + length
            if self.end - self.start < self.need:
                if not (PLANTS and "short read padded" in bugs and self.end - self.start > SIMPLE):
                    return True
                self.end = self.start + self.need
            del self.asked[cookie]
            self.answers += 1
            self.device.answer(asked, errno_of(code) if code else 0, self.at + self.start + SIMPLE)
            self.start += self.need
            self.need = SIMPLE
        return True


def relay(int source, int device):
    """Pass on to /dev/fuse what pyfuse3 answers on a stream socket, until that ends. For a thread of its own."""
    cdef fuse_out_header head
    cdef object space = PyByteArray_FromStringAndSize(NULL, LANDING)
    cdef uint8_t *at = <uint8_t *> PyByteArray_AS_STRING(space)
    with nogil:
        while recv(source, at, sizeof(head), MSG_WAITALL) == sizeof(head):
            memcpy(&head, at, sizeof(head))
            if head.len < sizeof(head) or head.len > LANDING:
                break
            if head.len > sizeof(head):
                if recv(source, at + sizeof(head), head.len - sizeof(head), MSG_WAITALL) < 0:
                    break
            write(device, at, head.len)
