# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A host is cut off in the middle of writing back, another one takes its image over, and the first one comes back.

Nothing that the new owner flushed may be lost, whatever the first one had under way: the wire is cut right after one
NFS call of a pass, and the cases go through the calls of a pass from its first to its last.
"""

from collections.abc import Sequence
from functools import partial

from lab.case import Case
from lab.hosts import LEASE_SECONDS, Host, Writer, until
from lab.outcome import Failure, demand
from lab.place import Lab

OLD, NEW = 7, 77
"""Seeds of what the first host's clients write, and the second's."""

EXPIRED = 3 * LEASE_SECONDS + 200.0
AT_LEAST = 24
"""Steps that a writer has flushed before anything happens to it."""

DISKS = ("a", "b", "c")
"""Each is at a step of its own when the wire is cut: their passes run at the same time."""

SHORT = (0.3, 0.7)
"""Where the short form cuts the wire: shares of the NFS calls of the passes."""

EVERY = tuple(n / 20 for n in range(21))


def comes_back(share: float, lab: Lab) -> str:
    """The whole story."""
    old = [started(lab, disk) for disk in DISKS]
    where = cut_in_passes(lab, old, share)
    for writer in old:
        writer.pause()
    taken = {disk: take_over(lab, disk) for disk in DISKS}
    new = [lab.other.writer(disk, NEW, "--pause 0.1") for disk in DISKS]
    some_steps(new)
    lab.other.flush_beside(new)
    for writer in old:
        writer.go_on()
    lab.wires["h1"].mend()
    for disk in DISKS:
        gives_way(lab.host, disk)
    some_steps(new)
    for writer in (*old, *new):
        writer.stop()
    try:
        for disk, writer in zip(DISKS, new, strict=True):
            keeps_all(lab, disk, writer, taken[disk])
            give_back(lab, disk, writer, taken[disk])
    except Failure as failure:
        raise Failure(f"cut after {where}: {failure}") from failure
    return where


def started(lab: Lab, disk: str) -> Writer:
    """An image, attached, with a client that writes."""
    lab.server.image(f"{disk}.raw")
    lab.host.attach(disk, f"{disk}.raw")
    return lab.host.writer(disk, OLD, "--pause 0.1")


def cut_in_passes(lab: Lab, writers: Sequence[Writer], share: float) -> str:
    """Have passes of all disks, and cut the first host off at that share of them.

    The number of calls of such passes is counted first, at some that are left alone. Returns where it was cut.
    """
    wire = lab.wires["h1"]
    some_steps(writers)
    wire.listen()
    lab.host.flush_beside(writers)
    usual = sum(sender == "h1" for sender, _ in wire.calls)
    some_steps(writers)
    number = 1 + round(share * (usual - 1))
    cut = wire.cut_after("h1", number)
    lab.host.console.start("forebay flush --all")
    demand(cut.wait(300.0), f"passes made fewer than {number} NFS calls: {wire.calls}")
    return f"call {number} of about {usual}, {wire.calls[-1][1]}"


def some_steps(writers: Sequence[Writer]) -> None:
    for writer in writers:
        writer.until_flushed(AT_LEAST)


def take_over(lab: Lab, disk: str) -> int:
    """What an operator does on the second host, as root, until the server has given the first one's lock up.

    The image is then as it was at one instant of the first host's writes: after which step is returned.
    """
    command = f"ls /mnt/nfs/images; forebay takeover images:{disk}.raw --yes"
    until(f"{disk} taken over", partial(lab.other.run, command), EXPIRED, 3.0)
    lab.other.attach(disk, f"{disk}.raw")
    found = lab.server.check(lab.server.path(f"{disk}.raw"), OLD)
    demand(
        found["instant"] and not found["unfit"] and not found["torn"],
        f"after the takeover the image is of no one instant: {found}",
    )
    return int(found["instant"])


def gives_way(host: Host, disk: str) -> None:
    """The host that comes back sees that the image is another's: it serves nothing of it, and keeps what it has."""
    host.until_state(disk, "conflict", 300.0)
    demand(host.status(disk).get("dirty_bytes"), f"{host.name} dropped its dirty data of {disk}")
    ask = f"nbdsh -u 'nbd+unix:///?socket={host.socket(disk)}' -c 'h.pread(4096, 0)'"
    demand(host.run(ask, 60.0).code != 0, f"{host.name} still serves {disk}")


def keeps_all(lab: Lab, disk: str, new: Writer, taken: int) -> None:
    """On the second host's disk and in its image nothing of what it flushed is lost."""
    done = new.now
    demand(not done.errors, f"the new owner's client of {disk} had errors: {done.errors[:3]}")
    lab.other.flush(disk)
    seen = lab.other.checked(disk, new)
    demand(not seen["lost"], f"blocks of the new owner are lost on {disk}: {seen}")
    in_the_image(lab, disk, new, taken, "after a flush")


def give_back(lab: Lab, disk: str, new: Writer, taken: int) -> None:
    """Both detach, and `recover` finds nothing that it would do to the new owner's data."""
    lab.host.do(f"forebay detach {disk} --discard --force")
    in_the_image(lab, disk, new, taken, "after the first host's detach")
    until("detached", partial(lab.other.run, f"forebay detach {disk}"), 300.0)
    lab.other.do(f"forebay recover images:{disk}.raw")
    in_the_image(lab, disk, new, taken, "after recover")


def in_the_image(lab: Lab, disk: str, new: Writer, taken: int, when: str) -> None:
    """What the second host flushed is there, and of the first one nothing that is newer than what was taken over."""
    found = lab.server.check(lab.server.path(f"{disk}.raw"), NEW, new.now.flushed)
    demand(not found["lost"], f"blocks of the new owner are lost in {disk}.raw {when}: {found}")
    late = lab.server.check(lab.server.path(f"{disk}.raw"), OLD)
    demand(
        late["instant"] <= taken,
        f"the first host wrote to {disk}.raw after step {taken}, {when}: {late}",
    )


def refused(lab: Lab) -> None:
    """A second host is told whose the image is, in every mode."""
    lab.server.image("a.raw")
    lab.host.attach("a", "a.raw")
    lab.host.writer("a", OLD).until_flushed(4)
    lab.other.run("ls /mnt/nfs/images")
    for mode in ("write-back", "write-through", "none"):
        answer = lab.other.run(f"forebay attach a images:a.raw --mode {mode}")
        demand(answer.code == 1 and "h1" in answer.output, f"{mode} on a second host: {answer}")


CASES = [
    *(
        Case(
            f"takeover, cut off at {share:.0%} of a pass",
            partial(comes_back, share),
            short=share in SHORT,
        )
        for share in sorted({*SHORT, *EVERY})
    ),
    Case("a second host is refused", refused, short=False),
]
