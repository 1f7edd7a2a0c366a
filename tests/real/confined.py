# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a server that reads what strangers made tries once it is confined, and what the kernel is to say to it."""

import ctypes

CODE = """
import importlib.util, os, resource, socket, sys
spec = importlib.util.spec_from_file_location("program", sys.argv[1])
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
reads, writes = int(sys.argv[2]), int(sys.argv[3])
badness = os.open("/proc/self/oom_score_adj", os.O_RDWR)
try:
    os.write(badness, b"-500")
except OSError:
    pass  # only root may
program.confine([reads], [writes])
print(os.pread(badness, 9, 0).decode().strip())

def tried(do):
    try:
        do()
        return "done"
    except OSError as error:
        return type(error).__name__

print(tried(lambda: os.open(f"/proc/self/fd/{reads}", os.O_RDONLY)))
print(tried(lambda: os.open(f"/proc/self/fd/{reads}", os.O_RDWR)))
print(tried(lambda: os.open(f"/proc/self/fd/{writes}", os.O_RDWR)))
print(tried(lambda: os.open("/etc/passwd", os.O_RDONLY)))
print(tried(lambda: os.open(sys.argv[4], os.O_RDONLY)))
print(tried(lambda: os.listdir(os.path.dirname(sys.argv[4]))))
print(tried(lambda: os.mkdir(sys.argv[4] + ".d")))
print(tried(lambda: socket.socket().connect(("127.0.0.1", 9))))
print(resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_AS)[0] >> 30)
"""
"""Words: the program of a store's process, descriptors of a file to read and of one to write, another file."""

EXPECTED = ["0", "done", "PermissionError", "done", *["PermissionError"] * 5, "(0, 0) 4"]
"""What it prints."""


def landlock() -> int:
    """The version of Landlock that the kernel has; below 1 if it has none."""
    return int(ctypes.CDLL(None).syscall(444, None, 0, 1))
