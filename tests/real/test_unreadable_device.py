# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A cache device that cannot be read any more: errors, not signals.

Whoever touches a page of a map that cannot be read gets SIGBUS. A file that was made shorter behaves as a block device
with bad sectors does whose pages were needed for something else; the one who touches it is a process of its own here.
"""

import subprocess
import sys
from pathlib import Path

import pytest

MAPPED = """
import errno, mmap, os, sys, trio
from pathlib import Path
path = Path(sys.argv[1])
"""

READERS = {
    "replies that a client does not take": """
path.write_bytes(bytes(1 << 20))
with open(path, "r+b") as file:
    view = memoryview(mmap.mmap(file.fileno(), 1 << 20, prot=mmap.PROT_READ))
    os.ftruncate(file.fileno(), 1 << 19)
from forebay_nbd.server.outbox import kernel_copy
assert kernel_copy([view[:4096]] * 3000 + [b"", b"x"]) == bytes(3000 * 4096) + b"x"
def read():
    kernel_copy([b"x", view[1 << 19 :]])
""",
    "reading for write-back, or to complete a sector": """
from forebay_cache import View, open_cache
from forebay_cache.format.records import LayerName
from forebay_cache.blocks import private
cache = open_cache(path, path.with_name("index"), size=8 << 20)
layer = cache.layers.make(LayerName.of_disk("d", 1, "i"))
layer.pages.adopt(0, None)
assert private.write(cache, layer, 0, memoryview(b"x" * 65536))
cache.intent.publish()
view = View(cache, [layer], None, None)
assert len(view.read_now(0, 65536)) == 65536
os.truncate(path, cache.device.data_offset)
def read():
    trio.run(view.read, 0, 65536)
""",
    "reading what is ready beside what is not": """
from forebay_cache import View, open_cache
from forebay_cache.format.records import LayerName
from forebay_cache.blocks import private
from forebay_cache.format.entry import slot_of
cache = open_cache(path, path.with_name("index"), size=8 << 20)
layer = cache.layers.make(LayerName.of_disk("d", 1, "i"))
layer.pages.adopt(0, None)
assert private.write(cache, layer, 0, memoryview(b"x" * 131072))
cache.intent.publish()
view = View(cache, [layer], None, None)
cache.ready.masks[slot_of(layer.pages.page(0)[1])] = 0
os.truncate(path, cache.device.data_offset)
async def both():
    await view.read(0, 131072, slices=True)
def read():
    trio.run(both)
""",
}

CATCH = """
try:
    read()
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("reader", READERS)
def test_it_is_an_error_of_a_system_call(reader: str, tmp_path: Path) -> None:
    code = MAPPED + READERS[reader] + CATCH
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "device"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.strip() in ("EIO", "EFAULT"), done.stderr
