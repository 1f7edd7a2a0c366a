# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What clients that mean no good say, after the limits of our own and the CVE table of NBD servers.

`ENDS`: in the handshake, and the server hangs up. `REFUSED`: an option that is answered with an error. `ERRORS`: a
request that is. `BREAKS`: in transmission, and the server hangs up. `STREAMS`: anything, for hypothesis.
"""

import errno
import struct

from hypothesis import strategies as st

from real.nbd_raw import go, option, request

MIB = 1 << 20


def contexts(*queries: bytes, name: bytes = b"") -> bytes:
    body = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return body + b"".join(struct.pack(">I", len(query)) + query for query in queries)


# Sent after the flags; the server has to hang up.
ENDS = {
    "bad option magic": b"IHAVEOPX" + bytes(8),
    "option of 4 GiB (CVE-2017-15119)": option(7, b"", 0xFFFFFFFF),
    "unknown option of 4 GiB": option(99, b"", 0xFFFFFFFF),
    "option above 8 KiB": option(99, bytes(8193)),
    "export name of 4 GiB (CVE-2022-26495)": option(1, b"", 0xFFFFFFFF),
    "export name of 4097 bytes (CVE-2017-15118)": option(1, b"x" * 4097),
    "export name with NUL": option(1, b"disk\0"),
    "export name that is not UTF-8": option(1, b"\xff\xff"),
    "unknown export by EXPORT_NAME (CVE-2013-7441)": option(1, b"nobody"),
    "format string as a name": option(1, b"%3000d%n%s"),
    "path as a name": option(1, b"../../etc/passwd"),
    "flood of options": option(3) * 33,
    "abort (041e32b8)": option(2),
    "abort with data": option(2, bytes(8192)),
    "two aborts and a way in": option(2) * 2 + go(b""),
    "garbage": bytes(range(256)) * 8,
    "requests before GO (CVE-2019-14851)": request(0, 0, 512) * 3,
    "a write before GO (CVE-2017-7539)": request(1, 0, 4096, payload=bytes(4096)),
    "names around 4096 bytes": b"".join(go(b"n" * n) for n in (256, 257, 4095, 4096))
    + option(1, b"n" * 4096),
}

# Refused, and the next option is understood: (option, its data, reply type).
REFUSED = {
    "starttls": (5, b"", 2**31 + 2),
    "starttls with data": (5, b"x", 2**31 + 3),
    "peek": (4, b"payload", 2**31 + 1),
    "extended headers": (11, b"", 2**31 + 1),
    "unknown with payload (282c3b03)": (0xFFFFFFFF, bytes(8192), 2**31 + 1),
    "list with data": (3, b"x", 2**31 + 3),
    "structured with data": (8, b"x", 2**31 + 3),
    "go without data": (7, b"", 2**31 + 3),
    "go, name longer than the option (CVE-2022-26496)": (7, b"\0\0\x0f\xffdisk\0\0", 2**31 + 3),
    "go, name of 4 GiB": (7, b"\xff\xff\xff\xff\0\0", 2**31 + 3),
    "info, more requests than data": (6, b"\0\0\0\0\xff\xff", 2**31 + 3),
    "go, missing name of 4096 bytes (CVE-2020-10761)": (7, b"\0\0\x10\0" + b"x" * 4096 + b"\0\0", 2**31 + 6),
    "info of nothing": (6, b"\0\0\0\2no\0\0", 2**31 + 6),
    "go, name of 257 bytes (CVE-2017-15118)": (7, b"\0\0\1\1" + b"n" * 257 + b"\0\0", 2**31 + 6),
    "go, name cut short": (7, b"\0\0\0\4di", 2**31 + 3),
    "go, name with NUL": (7, b"\0\0\0\5disk\0\0\0", 2**31 + 3),
    "go, name that is not UTF-8": (7, b"\0\0\0\1\xff\0\0", 2**31 + 3),
    "go, more than it says": (7, b"\0\0\0\4disk\0\0more", 2**31 + 3),
    "info, name of 4 GiB (CVE-2022-26495)": (6, b"\xff\xff\xff\xff\0\0", 2**31 + 3),
    "info, name longer than the option (CVE-2022-26496)": (6, b"\0\0\x0f\xffdisk\0\0", 2**31 + 3),
    "info, missing name of 4096 bytes (CVE-2020-10761)": (6, b"\0\0\x10\0" + b"%s%n" * 1024 + b"\0\0", 2**31 + 6),
    "contexts before structured replies": (10, contexts(b"base:allocation"), 2**31 + 3),
    "list contexts before structured replies": (9, contexts(), 2**31 + 3),
}  # fmt: skip

# In transmission: what is answered with an error and goes on.
ERRORS = {
    "unknown command": (request(99, 0, 512), errno.EINVAL),
    "resize": (request(8, 0, 512), errno.EINVAL),
    "unknown flag": (request(0, 0, 512, flags=0x8000), errno.EINVAL),
    "flag of another command": (request(3, flags=8), errno.EINVAL),
    "DF without structured replies": (request(0, 0, 512, flags=4), errno.EINVAL),
    "read of 4 GiB": (request(0, 0, 0xFFFFFFFF), errno.EINVAL),
    "read beyond the end": (request(0, 8 * MIB, 1), errno.EINVAL),
    "read at 2^64-1": (request(0, 2**64 - 1, 0xFFFFFFFF), errno.EINVAL),
    "write beyond the end": (request(1, 8 * MIB - 1, 2, payload=b"ab"), errno.ENOSPC),
    "large write at 2^63": (request(1, 2**63, MIB, payload=bytes(MIB)), errno.ENOSPC),
    "trim of 4 GiB": (request(4, 0, 0xFFFFFFFF), errno.EINVAL),
    "zero at 2^64-1": (request(6, 2**64 - 1, 1), errno.ENOSPC),
    "cache of 4 GiB": (request(5, 1, 0xFFFFFFFF), errno.EINVAL),
    "flush with a range": (request(3, 0, 512), errno.EINVAL),
    "read of 32 MiB and a byte": (request(0, 0, 32 * MIB + 1), errno.EINVAL),
    "write at 2^64-1": (request(1, 2**64 - 1, 1, payload=b"x"), errno.ENOSPC),
    "trim at 2^63 (CVE-2023-5215)": (request(4, 2**63, 4096), errno.EINVAL),
    "zero of 4 GiB": (request(6, 0, 0xFFFFFFFF), errno.ENOSPC),
    "block status of 4 GiB without contexts": (request(7, 0, 0xFFFFFFFF), errno.EINVAL),
    "command of 65535": (request(0xFFFF, 0, 0), errno.EINVAL),
    "block status without contexts": (request(7, 0, 512), errno.EINVAL),
}

BREAKS = {
    "zeros": bytes(28),
    "an option after GO (CVE-2019-14851)": option(3),
    "a reply": struct.pack(">IIQ", 0x67446698, 0, 1) + bytes(12),
    "cut header": request(0)[:27],
    "write of 32 MiB + 1": request(1, 0, 32 * MIB + 1),
    "write of 4 GiB": request(1, 0, 0xFFFFFFFF),
    "cut write": request(1, 0, 4096, payload=b"half"),
    "cut large write": request(1, 0, MIB, payload=bytes(MIB // 2)),
    "after DISC": request(2) + bytes(100),
}

STREAMS = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.builds(option, st.integers(0, 12), st.binary(max_size=40)),
        st.builds(go, st.sampled_from([b"", b"disk", b"none"]), st.sampled_from([6, 7])),
        st.builds(
            request,
            st.integers(0, 9),
            st.integers(0, 9 * MIB),
            st.sampled_from([0, 1, 512, 4096, 70_000, MIB, 0xFFFFFFFF]),
            st.sampled_from([0, 0, 1, 2, 4, 8, 16, 255]),
            st.integers(0, 5),
            st.binary(max_size=600),
        ),
        st.builds(request, st.just(1), st.just(0), st.just(MIB), payload=st.just(bytes(200_000))),
    ),
    max_size=12,
)
