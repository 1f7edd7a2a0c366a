# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The logical volume of the cache fails, under a daemon that has it open, grows, and is made where a tag says."""

import json
from collections.abc import Callable
from functools import partial

from lab.case import Case
from lab.hosts import Host, Writer, until
from lab.outcome import demand
from lab.place import Lab

SEED = 60
VOLUME = "vg0-forebay"
GROWN = 600 << 20
TAGGED = "/dev/vg1/forebay"


def table(host: Host) -> str:
    """Of the volume, as it is."""
    return host.do(f"dmsetup table {VOLUME}").strip()


def load(host: Host, lines: str) -> None:
    """Give the volume another table while it is in use."""
    swap = f"dmsetup load {VOLUME} --table '{lines}' && dmsetup suspend --noflush {VOLUME}"
    host.do(f"modprobe dm-flakey; {swap}; dmsetup resume {VOLUME}")


def failing_writes(lines: str) -> str:
    """A table whose writes fail, and whose reads work."""
    start, length, _, device, offset = lines.split()[:5]
    return f"{start} {length} flakey {device} {offset} 0 3600 1 error_writes"


def gone(lines: str) -> str:
    """A table of a volume that is not there any more."""
    start, length = lines.split()[:2]
    return f"{start} {length} error"


def prepared(lab: Lab) -> Writer:
    lab.server.image("a.raw")
    lab.host.attach("a", "a.raw")
    writer = lab.host.writer("a", SEED)
    writer.until_flushed(12)
    return writer


def back_again(lab: Lab, writer: Writer, good: str) -> None:
    """The volume works again: so does the disk, by itself, with all that was flushed."""
    host = lab.host
    load(host, good)
    host.until_state("a", "ready", 200.0)
    writer.until_flushed(8, 200.0)
    writer.stop()
    host.flush("a")
    seen = host.checked("a", writer)
    demand(not seen["lost"] and not seen["torn"], f"flushed data is lost on the disk: {seen}")
    image = lab.server.check(lab.server.path("a.raw"), SEED, writer.now.flushed)
    demand(not image["lost"], f"flushed data is lost in the image: {image}")


def writes_fail(lab: Lab) -> str:
    """What is dirty goes to the image, requests go past the cache, and no client hears of it."""
    host, writer = lab.host, prepared(lab)
    good = table(host)
    load(host, failing_writes(good))
    host.until_state("a", "pass-through", 200.0)
    writer.until_flushed(8, 200.0)
    errors = writer.now.errors
    demand(not errors, f"the client heard of errors: {errors[:4]}")
    back_again(lab, writer, good)
    return f"{writer.now.acknowledged} steps, no error"


def all_fails(lab: Lab) -> str:
    """Dirty data cannot be read either: errors to its client, never anything else, and all of it when it is back."""
    host, writer = lab.host, prepared(lab)
    good = table(host)
    load(host, gone(good))
    until("noticed", lambda: host.state("a") in ("broken", "pass-through"), 200.0)
    state = host.state("a")
    flushed = writer.now.flushed
    back_again(lab, writer, good)
    return f"{state} meanwhile, after step {flushed}"


def grows(lab: Lab) -> str:
    """`lvextend` and `forebay cache extend`, under a client that writes."""
    host, writer = lab.host, prepared(lab)
    host.do(f"lvextend -q -L {GROWN}b vg0/forebay")
    said = host.do("forebay cache extend")
    size = int(json.loads(host.do("forebay cache info --json"))["size"])
    demand(size == GROWN, f"the cache has {size} bytes, not {GROWN}: {said}")
    writer.until_flushed(12)
    host.do("systemctl restart forebay", 200.0)
    writer.until_flushed(12)
    done = writer.stop()
    demand(not done.errors, f"the client heard of errors: {done.errors[:4]}")
    host.flush("a")
    seen = host.checked("a", writer)
    demand(not seen["lost"], f"flushed data is lost: {seen}")
    return said.strip()


def where_a_tag_says(lab: Lab) -> str:
    """`cache create --vg --tag @ssd` puts the volume on the physical volumes with that tag, and refuses without any."""
    host = lab.host
    host.do("systemctl stop forebay", 300.0)
    for number in (0, 1):
        host.do(f"truncate -s 500M /root/pv{number} && losetup /dev/loop{number} /root/pv{number}")
    host.do("pvcreate -q /dev/loop0 /dev/loop1 && vgcreate -q vg1 /dev/loop0 /dev/loop1")
    host.do("rm -rf /var/lib/forebay/*; sed -i s,/dev/vg0/,/dev/vg1/, /etc/forebay/forebay.toml")
    create = "forebay cache create --vg vg1 --size 200M --tag @ssd"
    refused = host.run(create)
    demand(refused.code == 1 and "ssd" in refused.output, f"no such tag, and yet: {refused}")
    host.do("pvchange -q --addtag ssd /dev/loop1")
    host.do(create, 300.0)
    devices = host.do("lvs --noheadings -o devices,lv_tags vg1/forebay").split()
    demand(devices[0].startswith("/dev/loop1("), f"the volume lies on {devices}")
    host.do("systemctl start forebay", 300.0)
    writer = prepared(lab)
    writer.stop()
    host.flush("a")
    demand(not host.checked("a", writer)["lost"], "flushed data is lost")
    host.do("forebay detach a && forebay cache remove", 300.0)
    demand(not host.run("lvs vg1/forebay"), "the volume is still there")
    return " ".join(devices)


FAULTS: dict[str, Callable[[Lab], str]] = {
    "writes fail (dm-flakey)": writes_fail,
    "is gone (dm-error)": all_fails,
    "grows": grows,
}
CASES = [
    *(
        Case(f"the cache volume {what}", partial(does), short=False)
        for what, does in FAULTS.items()
    ),
    Case("the cache volume lies where a tag says", where_a_tag_says, short=False),
]
